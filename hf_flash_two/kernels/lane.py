"""A lane of the blockwise kernel: some key heads and the query heads sharing them.

The heads of a lane go through each product together, one batched product per tile: some of one
batch row, or all of several where they are small. Queries are laid out [heads, group * rows, D],
heads being the key heads of all its batch rows: the query heads of a group are simply more rows, so
no key is repeated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor

from hf_flash_two.kernels import dropout
from hf_flash_two.kernels.problem import LOG2E, Problem, statistics_dtype
from hf_flash_two.masks import KEY_GRANULE, TileMap, band_tiles, bound_tiles
from hf_flash_two.tensor_cache import derive

_BLOCK_Q = 256
_BLOCK_K = 512
_TILE_BYTES = 2**21
_WORKSPACE_BYTES = 2**24
_FEW_ROWS = 64


@dataclass(frozen=True, slots=True)
class KeyTile:
    """Neighbouring keys that a tile of queries meets at once.

    Attributes:
        cols: their indices; they are stored in ``block`` at ``inside``.
        masked: the runs of them, counted from the first, in which some pairs are hidden.
    """

    cols: slice
    block: int
    inside: slice
    masked: tuple[slice, ...]

    @classmethod
    def of(cls, start: int, stop: int, block_k: int, masked: bool) -> KeyTile:
        block, offset = divmod(start, block_k)
        width = stop - start
        return cls(
            slice(start, stop),
            block,
            slice(offset, offset + width),
            (slice(0, width),) if masked else (),
        )

    def __add__(self, other: KeyTile) -> KeyTile:
        """Both of two neighbours in the same block."""
        moved = (slice(run.start + self.width, run.stop + self.width) for run in other.masked)
        return KeyTile(
            slice(self.cols.start, other.cols.stop),
            self.block,
            slice(self.inside.start, other.inside.stop),
            (*self.masked, *moved),
        )

    @property
    def width(self) -> int:
        return self.cols.stop - self.cols.start


@dataclass(frozen=True, slots=True)
class QueryTile:
    """``rows`` of queries and all keys they meet; ``probe`` is a few keys that all of them see."""

    rows: slice
    key_tiles: list[KeyTile]
    probe: KeyTile | None


@dataclass(frozen=True, slots=True)
class Call:
    """What the lanes of one call share. Tile sizes are a function of shape and dtype alone."""

    query: Tensor
    key: Tensor
    value: Tensor
    problem: Problem
    guarded: bool
    block_q: int
    block_k: int
    workspace: Workspace
    bands: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)


def lanes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    problem: Problem,
    guarded: bool,
    gradients: bool = False,
) -> Iterator[Lane]:
    """The lanes of one call.

    Args:
        guarded: see `Lane.seen`.
        gradients: those of keys and values take room too.
    """
    batch, heads, query_length, _ = query.shape
    key_heads, key_length = key.shape[1:3]
    if not (batch and heads):
        return
    call = _call(query, key, value, problem, guarded)
    tile_bytes = (
        heads // key_heads * call.block_q * call.block_k * _product_dtype(query.dtype).itemsize
    )
    together = _TILE_BYTES // tile_bytes
    if gradients or key_length > call.block_k or key.dtype != _product_dtype(key.dtype):
        # What the lane copies of its keys and values, or adds up for them.
        row_bytes = (key.shape[3] + value.shape[3]) * statistics_dtype(key.dtype).itemsize
        together = min(together, _WORKSPACE_BYTES // max(1, key_length * row_bytes))
    together = max(1, together)
    rows = 1 if problem.dropout_p else max(1, min(together // key_heads, batch))
    if key_length > _BLOCK_K and not (_rows_are_heads(key) and _rows_are_heads(value)):
        rows = 1
    query_tiles = _query_tiles(call, rows)
    for number, at in enumerate(range(0, batch, rows)):
        tiles = query_tiles[number if len(query_tiles) > 1 else 0]
        for start in range(0, key_heads, together):
            lane_heads = slice(start, min(start + together, key_heads))
            yield Lane(call, slice(at, min(at + rows, batch)), lane_heads, tiles)


def _rows_are_heads(x: Tensor) -> bool:
    """Whether the heads of several batch rows are at even distances in memory."""
    return x.stride(0) == x.shape[1] * x.stride(1)


def _call(query: Tensor, key: Tensor, value: Tensor, problem: Problem, guarded: bool) -> Call:
    query_length, key_length = query.shape[2], key.shape[2]
    group = query.shape[1] // key.shape[1]
    rows, block_k = query_length * group, _BLOCK_K
    if rows <= _FEW_ROWS:
        # All keys at once, or of one head: products copy blocks cut out of several.
        block_k = _TILE_BYTES // max(1, rows * _product_dtype(query.dtype).itemsize)
    block_q = max(1, _BLOCK_Q // group)
    return Call(
        query, key, value, problem, guarded,
        max(1, min(problem.block_q or block_q, query_length)),
        max(1, min(problem.block_k or block_k, key_length)),
        Workspace(query.device),
    )  # fmt: skip


def _query_tiles(call: Call, rows: int) -> list[list[QueryTile]]:
    """All tiles of queries for every ``rows`` batch rows, or once where the mask is one for all."""
    problem, bounds = call.problem, call.problem.key_bounds
    lengths = (call.query.shape[2], call.key.shape[2])
    settings = (problem.query_offset, *lengths, call.block_q, call.block_k)
    dense = problem.dense is not None
    if bounds is None:
        return _tiles_of_band(problem.window_left, problem.window_right, *settings, dense)

    def build() -> list[list[QueryTile]]:
        offset, query_length, key_length, block_q, block_k = settings
        tile_map = bound_tiles(bounds, offset, query_length, block_q, KEY_GRANULE, dense)
        if rows > 1:
            visit = torch.stack([part.any(0) for part in tile_map.visit.split(rows)])
            full = torch.stack([part.all(0) for part in tile_map.full.split(rows)])
            tile_map = TileMap(visit, full)
        return _tiles_of_map(tile_map, query_length, key_length, block_q, block_k)

    return derive(("query tiles", *settings, dense, rows), build, bounds)


@lru_cache(maxsize=32)
def _tiles_of_band(
    window_left: int | None,
    window_right: int | None,
    query_offset: int,
    query_length: int,
    key_length: int,
    block_q: int,
    block_k: int,
    dense: bool,
) -> list[list[QueryTile]]:
    tile_map = band_tiles(
        window_left, window_right, query_offset, query_length, key_length, block_q, KEY_GRANULE,
        dense,
    )  # fmt: skip
    return _tiles_of_map(tile_map, query_length, key_length, block_q, block_k)


def _tiles_of_map(
    tile_map: TileMap, query_length: int, key_length: int, block_q: int, block_k: int
) -> list[list[QueryTile]]:
    found = []
    for row in (tile_map.visit.int() + tile_map.full.int()).tolist():
        tiles = []
        for start, kinds in zip(range(0, query_length, block_q), row, strict=True):
            rows = slice(start, min(start + block_q, query_length))
            tiles.append(QueryTile(rows, *_key_tiles(kinds, key_length, block_k)))
        found.append(tiles)
    return found


def _key_tiles(
    kinds: list[int], key_length: int, block_k: int
) -> tuple[list[KeyTile], KeyTile | None]:
    """
    Args:
        kinds: for every KEY_GRANULE keys whether they are hidden, masked or visible: 0, 1, 2.

    Returns:
        The tiles that a tile of queries meets, and a few keys that all its queries see.
    """
    found: list[KeyTile] = []
    probe, at = None, 0
    for kind, run in groupby(kinds):
        start, at = at * KEY_GRANULE, at + len(list(run))
        stop = min(at * KEY_GRANULE, key_length)
        while kind and start < stop:
            end = min(stop, (start // block_k + 1) * block_k)
            tile = KeyTile.of(start, end, block_k, masked=kind == 1)
            if kind == 2 and probe is None:
                probe = KeyTile.of(start, min(end, start + KEY_GRANULE), block_k, masked=False)
            if found and found[-1].cols.stop == start and start % block_k:
                found[-1] = found[-1] + tile
            else:
                found.append(tile)
            start = end
    return found, probe


def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    """float16 products are emulated or overflow on some devices: float32 is right on all."""
    return torch.float32 if dtype == torch.float16 else dtype


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


class Lane:
    """Attributes:

    batch, key_heads, heads: the batch rows, and the heads of each.
    query_tiles: what to compute.
    key_blocks, value_blocks: the lane's keys and values, cut at every ``block_k`` keys.
    dtype: of the products; stats: of sums and statistics.
    few: there are so few queries that products are bound by reading the keys.
    plain: the scores are the scaled products and nothing else.
    unit: what a score of 1 is kept as. Plain ones are in base 2, whose power is the cheaper one and
        whose factor the product takes for nothing; others, which may be as large as a float can be,
        as they are.
    """

    def __init__(self, call: Call, batch: slice, key_heads: slice, query_tiles: list[QueryTile]):
        problem = call.problem
        self.query_tiles = query_tiles
        self.call, self.problem, self.batch, self.key_heads = call, problem, batch, key_heads
        self.workspace = call.workspace
        self.group_size = call.query.shape[1] // call.key.shape[1]
        self.heads = slice(key_heads.start * self.group_size, key_heads.stop * self.group_size)
        self.index = (batch, self.heads)
        self.device = call.query.device
        self.dtype = _product_dtype(call.query.dtype)
        self.stats = statistics_dtype(call.query.dtype)
        self.few = call.query.shape[2] * self.group_size <= _FEW_ROWS
        # On CPUs PyTorch leaves a bfloat16 product with a factor of 0 unwritten.
        modified = problem.bias is not None or problem.alibi_slopes is not None or problem.softcap
        self.plain = not modified and problem.scale != 0
        self.unit = LOG2E if self.plain else 1.0
        self.batch_size = batch.stop - batch.start
        self._query = call.query[self.index].flatten(0, 1)
        self.key_blocks = self._blocks(call.key)
        self.value_blocks = self._blocks(call.value)

    def _blocks(self, x: Tensor) -> list[Tensor]:
        x = x[self.batch, self.key_heads].to(self.dtype).flatten(0, 1)
        blocks = x.split(self.call.block_k, dim=1)
        if len(blocks) == 1 or blocks[0].shape[0] == 1:
            return list(blocks)
        # A product copies a block that is not contiguous: better once than for every tile of rows.
        return [block.contiguous() for block in blocks]

    def accumulators(self, x: Tensor) -> list[Tensor]:
        """Zeros to add up this lane's blocks in of ``x``, a gradient of keys or values."""
        blocks = x[self.batch, self.key_heads].split(self.call.block_k, dim=2)
        if self._in_place(x):
            return [block[0].zero_() for block in blocks]
        return [torch.zeros_like(block, dtype=self.stats).flatten(0, 1) for block in blocks]

    def store(self, x: Tensor, accumulators: list[Tensor], scale: float) -> None:
        """``x`` is ``scale`` times what was added up."""
        blocks = x[self.batch, self.key_heads].split(self.call.block_k, dim=2)
        for block, accumulated in zip(blocks, accumulators, strict=True):
            accumulated.mul_(scale)
            if not self._in_place(x):
                block.copy_(accumulated.unflatten(0, block.shape[:2]))

    def _in_place(self, x: Tensor) -> bool:
        return x.dtype == self.stats and self.batch_size == 1

    def query(self, rows: slice) -> Tensor:
        return self.group(self._query[:, rows].to(self.dtype))

    def key(self, tile: KeyTile) -> Tensor:
        return self.key_blocks[tile.block][:, tile.inside]

    def value(self, tile: KeyTile) -> Tensor:
        return self.value_blocks[tile.block][:, tile.inside]

    def group(self, x: Tensor) -> Tensor:
        """[..., rows, D] for all query heads -> [heads, group * rows, D]"""
        return x.reshape(-1, self.group_size * x.shape[-2], x.shape[-1])

    def ungroup(self, x: Tensor) -> Tensor:
        """[heads, group * rows, D] -> [batch rows, query heads, rows, D]"""
        return x.reshape(self.batch_size, -1, x.shape[1] // self.group_size, x.shape[2])

    def by_head(self, x: Tensor) -> Tensor:
        """[heads, group * rows, cols] as [batch rows, key heads, group, rows, cols], a view."""
        return x.unflatten(1, (self.group_size, -1)).unflatten(0, (self.batch_size, -1))

    def index_of(self, x: Tensor) -> tuple[slice, slice]:
        """Where this lane's heads stand in a [B or 1, H or 1, ...] tensor."""
        return (
            self.batch if x.shape[0] > 1 else slice(0, 1),
            self.heads if x.shape[1] > 1 else slice(0, 1),
        )

    def part(self, x: Tensor, rows: slice, cols: slice) -> Tensor:
        """This lane's tile of a tensor that broadcasts to [B, H, Tq, Tk], to meet `by_head`."""
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
        return position[:, None] + self.problem.query_offset, key

    def hidden(self, rows: slice, cols: slice) -> Tensor:
        """bool, to broadcast against `by_head`: the pairs that do not see each other."""
        if self.problem.first_query is not None or self.problem.dense is not None:
            return self._hidden(rows, cols)
        # A band hides the same of every tile at the same distance from it.
        key = (rows.start - cols.start, rows.stop - rows.start, cols.stop - cols.start)
        if key not in self.call.bands:
            self.call.bands[key] = self._hidden(rows, cols)
        return self.call.bands[key]

    def _hidden(self, rows: slice, cols: slice) -> Tensor:
        problem = self.problem
        position, key = self.positions(rows, cols)
        parts = []
        if problem.window_left is not None:
            parts.append(position - key > problem.window_left)
        if problem.window_right is not None:
            parts.append(key - position > problem.window_right)
        if problem.first_query is not None:
            batch = self.batch if problem.first_query.shape[0] > 1 else slice(0, 1)
            first, last = (
                x[batch, None, None, None, cols] for x in (problem.first_query, problem.last_query)
            )
            parts += [first > position, position >= last]
        if problem.dense is not None:
            parts.append(~self.part(problem.dense, rows, cols))
        hidden = parts[0]
        for part in parts[1:]:
            hidden = hidden | part
        return hidden

    def scores(
        self, query: Tensor, rows: slice, tile: KeyTile, shift: Tensor | None, by_key: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Scores [heads, group * rows, cols] in `unit` plus ``shift``, and softcap's tanh.

        Plain scores come in the dtype of the products, shifted inside the product before it rounds;
        modified ones in the dtype of the statistics.

        Args:
            shift: [heads, group * rows, 1], in the dtype of the result.
            by_key: lay the result out in memory key by key.
        """
        problem, cols = self.problem, tile.cols
        key, capped = self.key(tile), None
        if self.plain:
            s = self.product("scores", query, key, shift, problem.scale * self.unit, by_key)
        else:
            s = self.product("scores", query, key, None, 1, by_key)
            s = s.to(self.stats).mul_(problem.scale)
            if problem.softcap:
                capped = s.div_(problem.softcap).tanh_()
                s = capped * problem.softcap
            by_head = self.by_head(s)
            if problem.bias is not None:
                by_head += self.part(problem.bias, rows, cols)
            if problem.alibi_slopes is not None:
                position, key_position = self.positions(rows, cols)
                slopes = self.by_head(self.per_row(problem.alibi_slopes, rows))
                by_head -= slopes * (position - key_position).abs()
            if shift is not None:
                s.add_(shift)
        for run in tile.masked:
            at = slice(cols.start + run.start, cols.start + run.stop)
            self.by_head(s[:, :, run]).masked_fill_(self.hidden(rows, at), -math.inf)
        return s, capped

    def exp(self, x: Tensor) -> Tensor:
        """e to the power of scores, in their place."""
        return x.exp2_() if self.plain else x.exp_()

    def seen(self, scores: Tensor) -> Tensor | None:
        """Where queries see keys, from the scores; None unless the call is guarded.

        Elsewhere weights are 0, which hides every number but NaN and infinity. A guarded call, made
        if they are in the result of one that is not, passes what is hidden over in each product.
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
        """acc + A B, added up in the dtype of the statistics; what A does not see counts nothing.

        Args:
            seen: bool, as A; None if B is known to be finite.
        """
        a, b = a.to(self.dtype), b.to(self.dtype)
        if seen is not None:
            finite = b.isfinite()
            start = None if acc is None else acc.clone()
            clean = self.add_product(start, a, b.where(finite, 0))
            met = torch.bmm(seen.to(self.dtype), (~finite).to(self.dtype)) > 0
            acc = self.add_product(acc, a, b)
            return acc.copy_(torch.where(met, acc, clean))
        if acc is None:
            return torch.bmm(a, b).to(self.stats)
        return acc.baddbmm_(a, b) if self.dtype == self.stats else acc.add_(torch.bmm(a, b))

    def kept(self, rows: slice, cols: slice) -> Tensor:
        """Dropout's multiplier of the probabilities, [heads, group * rows, cols]."""
        problem = self.problem
        heads = torch.arange(self.heads.start, self.heads.stop, device=self.device)
        row = torch.arange(rows.start, rows.stop, device=self.device)
        col = torch.arange(cols.start, cols.stop, device=self.device)
        keep = dropout.keep(problem.seed, self.batch.start, heads, row, col, problem.dropout_p)
        return self.group(keep).to(self.stats).div_(1 - problem.dropout_p)
