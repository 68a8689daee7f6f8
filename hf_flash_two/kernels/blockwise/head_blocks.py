"""A head block of the blockwise kernel: some key heads and the query heads sharing them.

The heads of a block go through each product together, one batched product per tile: some of one
batch row, or all of several where they are small. Queries are laid out [heads, group * rows, D],
heads being the key heads of all its batch rows: the query heads of a group are simply more rows, so
no key is repeated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_flash_two.kernels import dropout
from hf_flash_two.kernels.blockwise.tiles import KeyTile, QueryTile, query_tiles
from hf_flash_two.kernels.hidden import HiddenPairs
from hf_flash_two.kernels.params import LOG2E, AttentionParams, statistics_dtype

_BLOCK_Q = 256
_BLOCK_K = 512
_TILE_BYTES = 2**21
_WORKSPACE_BYTES = 2**24
_FEW_ROWS = 64
_FEW_TILES = 4
_INVARIANT_ROWS = 32
INVARIANT_KEYS = 128
"""Keys of every tile that is `AttentionParams.batch_invariant`."""


@dataclass(frozen=True, slots=True)
class Call:
    """What the blocks of one call share. Tile sizes are a function of shape and dtype alone."""

    query: Tensor
    key: Tensor
    value: Tensor
    params: AttentionParams
    guarded: bool
    block_q: int
    block_k: int
    workspace: Workspace
    hidden: HiddenPairs


def head_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    params: AttentionParams,
    guarded: bool,
    gradients: bool = False,
) -> Iterator[HeadBlock]:
    """The head blocks of one call.

    Args:
        guarded: see `HeadBlock.seen`.
        gradients: those of keys and values take room too.
    """
    batch, heads, query_length, _ = query.shape
    key_heads, key_length = key.shape[1:3]
    if not (batch and heads):
        return
    call = _call(query, key, value, params, guarded)
    tile_bytes = (
        heads // key_heads * call.block_q * call.block_k * statistics_dtype(query.dtype).itemsize
    )
    together = _TILE_BYTES // tile_bytes
    if gradients or key_length > call.block_k or key.dtype != statistics_dtype(key.dtype):
        # What a block copies of its keys and values, or adds up for them.
        row_bytes = (key.shape[3] + value.shape[3]) * statistics_dtype(key.dtype).itemsize
        together = min(together, _WORKSPACE_BYTES // max(1, key_length * row_bytes))
    if params.batch_invariant and key.dtype == torch.float64:
        # From three threads on MKL divides several products otherwise than one.
        together = 1
    together = max(1, together)
    rows = 1 if params.dropout_p else max(1, min(together // key_heads, batch))
    if key_length > _BLOCK_K and not (_rows_are_heads(key) and _rows_are_heads(value)):
        rows = 1
    found = query_tiles(params, query_length, key_length, call.block_q, call.block_k, rows)
    for number, at in enumerate(range(0, batch, rows)):
        tiles = found[number if len(found) > 1 else 0]
        for start in range(0, key_heads, together):
            heads_here = slice(start, min(start + together, key_heads))
            yield HeadBlock(call, slice(at, min(at + rows, batch)), heads_here, tiles)


def invariant_queries(group: int) -> int:
    """Queries of every tile that is `AttentionParams.batch_invariant`, a power of two."""
    return 2 ** (max(1, _INVARIANT_ROWS // group).bit_length() - 1)


def _rows_are_heads(x: Tensor) -> bool:
    """Whether the heads of several batch rows are at even distances in memory."""
    return x.stride(0) == x.shape[1] * x.stride(1)


def _call(
    query: Tensor, key: Tensor, value: Tensor, params: AttentionParams, guarded: bool
) -> Call:
    query_length, key_length = query.shape[2], key.shape[2]
    group = query.shape[1] // key.shape[1]
    rows, block_k = query_length * group, _BLOCK_K
    if rows <= _FEW_ROWS:
        # All keys at once, or of one head: products copy blocks cut out of several.
        block_k = _TILE_BYTES // max(1, rows * statistics_dtype(query.dtype).itemsize)
    block_q = max(1, _BLOCK_Q // group)
    block_q = max(1, min(params.block_q or block_q, query_length))
    block_k = max(1, min(params.block_k or block_k, key_length))
    if params.batch_invariant:
        block_q, block_k = invariant_queries(group), INVARIANT_KEYS
    return Call(
        query, key, value, params, guarded, block_q, block_k,
        Workspace(query.device), HiddenPairs(params, query.device),
    )  # fmt: skip


class Workspace:
    """Memory that tiles use again and again: fresh pages cost more than what fills them."""

    def __init__(self, device: torch.device):
        self._device = device
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor, valid until ``name`` is taken again."""
        size = math.prod(shape)
        kept = self._kept.get((name, dtype))
        if kept is None or kept.numel() < size:
            kept = torch.empty(size, dtype=dtype, device=self._device)
            self._kept[name, dtype] = kept
        return kept[:size].view(shape)


class HeadBlock:
    """Attributes:

    batch, key_heads, heads: the batch rows, and the heads of each.
    query_tiles: what to compute.
    key_blocks, value_blocks: the block's keys and values, cut at every ``block_k`` keys.
    dtype: of products, sums and statistics. Rounded to half precision, scores would differ between
        forward and backward by what large ones lose.
    few: there are so few queries that products are bound by reading the keys.
    plain: the scores are the scaled products and nothing else.
    invariant: `AttentionParams.batch_invariant`: products are of one shape and of tensors without
        gaps, and a row's bits do not depend on other rows.
    unit: what a score of 1 is kept as. Plain ones are in base 2, whose power is the cheaper one and
        whose factor the product takes for nothing; others, which may be as large as a float can be,
        as they are. So are invariant ones: PyTorch rounds powers of 2 at the end of a tensor
        otherwise than in the middle.
    """

    def __init__(self, call: Call, batch: slice, key_heads: slice, query_tiles: list[QueryTile]):
        params = call.params
        self.query_tiles = query_tiles
        self.call, self.params, self.batch, self.key_heads = call, params, batch, key_heads
        self.workspace = call.workspace
        self.group_size = call.query.shape[1] // call.key.shape[1]
        self.heads = slice(key_heads.start * self.group_size, key_heads.stop * self.group_size)
        self.index = (batch, self.heads)
        self.device = call.query.device
        self.dtype = statistics_dtype(call.query.dtype)
        self.invariant = params.batch_invariant
        self.few = not self.invariant and call.query.shape[2] * self.group_size <= _FEW_ROWS
        self.plain = params.plain and params.scale != 0
        self.unit = LOG2E if self.plain and not self.invariant else 1.0
        self.batch_size = batch.stop - batch.start
        self._query = call.query[self.index].flatten(0, 1)
        self.key_blocks = self.blocks_of(call.key)
        self.value_blocks = self.blocks_of(call.value)

    def blocks_of(self, x: Tensor) -> list[Tensor]:
        """Keys or values [B, Hk, Tk, D] of this block, [heads, cols, D] by every ``block_k``."""
        x = x[self.batch, self.key_heads].to(self.dtype).flatten(0, 1)
        blocks = x.split(self.call.block_k, dim=1)
        if len(blocks) == 1 or blocks[0].shape[0] == 1:
            return list(blocks)
        if self.invariant and len(self.query_tiles) <= _FEW_TILES:
            return list(blocks)
        # A product copies a block that is not contiguous: better once than for every tile of rows.
        return [block.contiguous() for block in blocks]

    def accumulators(self, x: Tensor) -> list[Tensor]:
        """Zeros to add up this block's parts in of ``x``, a gradient of keys or values."""
        blocks = x[self.batch, self.key_heads].split(self.call.block_k, dim=2)
        if self._in_place(x):
            return [block[0].zero_() for block in blocks]
        return [torch.zeros_like(block, dtype=self.dtype).flatten(0, 1) for block in blocks]

    def store(self, x: Tensor, accumulators: list[Tensor], scale: float) -> None:
        """``x`` is ``scale`` times what was added up."""
        blocks = x[self.batch, self.key_heads].split(self.call.block_k, dim=2)
        for block, accumulated in zip(blocks, accumulators, strict=True):
            accumulated.mul_(scale)
            if not self._in_place(x):
                block.copy_(accumulated.unflatten(0, block.shape[:2]))

    def _in_place(self, x: Tensor) -> bool:
        return x.dtype == self.dtype and self.batch_size == 1 and not self.invariant

    def query(self, rows: slice) -> Tensor:
        return self.group(self._query[:, rows].to(self.dtype))

    def key(self, tile: KeyTile) -> Tensor:
        return self._readable("key", self.key_blocks[tile.block][:, tile.inside])

    def value(self, tile: KeyTile) -> Tensor:
        return self._readable("value", self.value_blocks[tile.block][:, tile.inside])

    def _readable(self, name: str, x: Tensor) -> Tensor:
        """A tile of keys or values as products take it."""
        if not self.invariant or x.is_contiguous():
            return x
        return self.workspace.take(name, tuple(x.shape), x.dtype).copy_(x)

    def group(self, x: Tensor) -> Tensor:
        """[..., rows, D] for all query heads -> [heads, group * rows, D]"""
        x = x.reshape(-1, self.group_size * x.shape[-2], x.shape[-1])
        return x.contiguous() if self.invariant else x

    def ungroup(self, x: Tensor) -> Tensor:
        """[heads, group * rows, D] -> [batch rows, query heads, rows, D]"""
        return x.reshape(self.batch_size, -1, x.shape[1] // self.group_size, x.shape[2])

    def by_head(self, x: Tensor) -> Tensor:
        """[heads, group * rows, cols] as [batch rows, key heads, group, rows, cols], a view."""
        return x.unflatten(1, (self.group_size, -1)).unflatten(0, (self.batch_size, -1))

    def index_of(self, x: Tensor) -> tuple[slice, slice]:
        """Where this block's heads stand in a [B or 1, H or 1, ...] tensor."""
        return (
            self.batch if x.shape[0] > 1 else slice(0, 1),
            self.heads if x.shape[1] > 1 else slice(0, 1),
        )

    def part(self, x: Tensor, rows: slice, cols: slice) -> Tensor:
        """This block's tile of a tensor that broadcasts to [B, H, Tq, Tk], to meet `by_head`."""
        whole = slice(None)
        x = x[(*self.index_of(x), rows if x.shape[2] > 1 else whole)]
        x = x[..., cols if x.shape[3] > 1 else whole]
        return x.unflatten(1, (-1, self.group_size)) if x.shape[1] > 1 else x[:, None]

    def per_row(self, x: Tensor, rows: slice) -> Tensor:
        """A number per head, [B or 1, H or 1], for each row: [heads, group * rows, 1]."""
        x = x[self.index_of(x)].expand(self.batch_size, self.heads.stop - self.heads.start)
        x = x.reshape(-1, self.group_size, 1)
        return x.repeat_interleave(rows.stop - rows.start, dim=1)

    def positions(self, rows: slice, cols: slice) -> tuple[Tensor, Tensor]:
        position = torch.arange(rows.start, rows.stop, device=self.device)
        key = torch.arange(cols.start, cols.stop, device=self.device)
        return position[:, None] + self.params.query_offset, key

    def hidden(self, rows: slice, cols: slice) -> Tensor:
        """bool, to broadcast against `by_head`: the pairs that do not see each other."""
        hidden = self.call.hidden(self.batch, rows, cols)
        if hidden is not None:
            hidden = hidden[:, None, None]
        if self.params.dense is not None:
            unseen = ~self.part(self.params.dense, rows, cols)
            hidden = unseen if hidden is None else hidden | unseen
        assert hidden is not None, "only masked tiles are asked for"
        return hidden

    def scores(
        self,
        query: Tensor,
        rows: slice,
        tile: KeyTile,
        shift: Tensor | None,
        by_key: bool = False,
        keep_capped: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Scores [heads, group * rows, cols] in `unit` plus ``shift``, and softcap's tanh if kept.

        Plain scores are shifted inside the product, before it rounds.

        Args:
            shift: [heads, group * rows, 1].
            by_key: lay the result out in memory key by key.
        """
        params, cols = self.params, tile.cols
        key, capped = self.key(tile), None
        if self.plain:
            s = self.product("scores", query, key, shift, params.scale * self.unit, by_key)
            shift = None
        else:
            # Without a factor a product does not look at its factors, which may be NaN.
            factor = params.scale / params.softcap if params.softcap else 0.0
            s = self.product("scores", query, key, None, factor or 1, by_key)
            if not factor:
                s.mul_(params.scale)
        if params.softcap:
            s = capped = s.tanh_()
            if keep_capped:
                s = self.workspace.take("capped", s.mT.shape if by_key else s.shape, s.dtype)
                s = s.mT if by_key else s
            # In one pass where nothing comes between.
            if shift is not None and params.bias is None and params.alibi_slopes is None:
                torch.add(shift, capped, alpha=params.softcap, out=s)
                shift = None
            else:
                torch.mul(capped, params.softcap, out=s)
        if params.bias is not None:
            by_head = self.by_head(s)
            by_head += self.part(params.bias, rows, cols)
        if params.alibi_slopes is not None:
            position, key_position = self.positions(rows, cols)
            slopes = self.by_head(self.per_row(params.alibi_slopes, rows))
            by_head = self.by_head(s)
            by_head -= slopes * (position - key_position).abs()
        if shift is not None:
            s.add_(shift)
        for run in tile.masked:
            at = slice(cols.start + run.start, cols.start + run.stop)
            self.by_head(s[:, :, run]).masked_fill_(self.hidden(rows, at), -math.inf)
        return s, capped

    def exp(self, x: Tensor) -> Tensor:
        """e to the power of scores, in their place."""
        return x.exp_() if self.unit == 1 else x.exp2_()

    def seen(self, scores: Tensor) -> Tensor | None:
        """Where queries see keys, from the scores; None unless the call is guarded.

        Elsewhere weights are 0, which hides every number but NaN and infinity. If the result of an
        unguarded call holds those, the call is repeated guarded: products then skip hidden pairs.
        """
        return scores != -math.inf if self.call.guarded else None

    def product(
        self, name: str, a: Tensor, b: Tensor, shift: Tensor | None, scale: float, by_key: bool
    ) -> Tensor:
        """scale * A B^T + shift, [heads, rows of A, rows of B], rounded once.

        The result lies in the workspace under ``name``, key by key if ``by_key``.
        """
        a, b = (b, a) if by_key else (a, b)
        product = self.workspace.take(name, (a.shape[0], a.shape[1], b.shape[1]), a.dtype)
        if shift is None:
            torch.baddbmm(product, a, b.transpose(1, 2), beta=0, alpha=scale, out=product)
        else:
            shift = shift.transpose(1, 2) if by_key else shift
            torch.baddbmm(shift, a, b.transpose(1, 2), alpha=scale, out=product)
        return product.transpose(1, 2) if by_key else product

    def add_product(
        self, acc: Tensor | None, a: Tensor, b: Tensor, seen: Tensor | None = None
    ) -> Tensor:
        """acc + A B; what A does not see counts nothing.

        Args:
            seen: bool, as A; None if B is known to be finite.
        """
        if seen is not None:
            finite = b.isfinite()
            start = None if acc is None else acc.clone()
            clean = self.add_product(start, a, b.where(finite, 0))
            met = torch.bmm(seen.to(self.dtype), (~finite).to(self.dtype)) > 0
            acc = self.add_product(acc, a, b)
            return acc.copy_(torch.where(met, acc, clean))
        if acc is None and self.invariant:
            acc = a.new_zeros(a.shape[0], a.shape[1], b.shape[2])
        if acc is None:
            return torch.bmm(a, b)
        return acc.baddbmm_(a, b)

    def dropped(self, rows: slice, cols: slice, by_key: bool = False) -> Tensor:
        """bool [heads, group * rows, cols]: the probabilities that are dropped.

        Args:
            by_key: as in `scores`.
        """
        params = self.params
        assert params.seed is not None
        heads = torch.arange(self.heads.start, self.heads.stop, device=self.device)
        row = torch.arange(rows.start, rows.stop, device=self.device)
        of_rows = dropout.row_bits(params.seed, self.batch.start, heads, row)
        of_rows = self.group(of_rows[..., None])
        of_cols = dropout.col_bits(torch.arange(cols.start, cols.stop, device=self.device))
        a, b = of_rows, of_cols
        if by_key:
            a, b = of_cols[:, None], of_rows.mT
        shape = tuple(torch.broadcast_shapes(a.shape, b.shape))
        bits, scratch = (self.workspace.take(name, shape, torch.int32) for name in ("bits", "more"))
        dropped = dropout.is_dropped(torch.bitwise_xor(a, b, out=bits), scratch, params.dropout_p)
        return dropped.mT if by_key else dropped
