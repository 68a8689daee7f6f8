"""A lane of the blockwise kernel: some key heads of a batch row and the query heads sharing them.

The heads of a lane go through each product together, one batched product per tile. Queries are laid
out [key heads, group * rows, D]: the query heads of a group are simply more rows, so no key is
repeated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from hf_flash_two.kernels import dropout
from hf_flash_two.kernels.problem import LOG2E, Problem, statistics_dtype
from hf_flash_two.masks import KEY_GRANULE, TileMap, band_tiles, bound_tiles

_BLOCK_Q = 256
_BLOCK_K_BYTES = 2**11
_TILE_BYTES = 2**21
_WORKSPACE_BYTES = 2**24
_FEW_ROWS = 64


@dataclass(frozen=True, slots=True)
class Tile:
    """Neighbouring keys that a tile of queries meets at once, stored in ``block`` at ``inside``."""

    cols: slice
    block: int
    inside: slice
    masked: bool

    @property
    def width(self) -> int:
        return self.cols.stop - self.cols.start


def lanes(query: Tensor, key: Tensor, value: Tensor, problem: Problem) -> Iterator[Lane]:
    """The lanes of one call. Tile sizes are a function of shape and dtype alone."""
    batch, heads, query_length, _ = query.shape
    key_heads, key_length = key.shape[1:3]
    if not (batch and heads):
        return
    group = heads // key_heads
    few = query_length * group <= _FEW_ROWS
    itemsize = _product_dtype(query.dtype).itemsize
    block_k = (_TILE_BYTES // _FEW_ROWS if few else _BLOCK_K_BYTES) // itemsize
    block_k = problem.block_k or block_k
    block_k = max(1, min(block_k, key_length))
    row_bytes = (key.shape[3] + value.shape[3]) * statistics_dtype(key.dtype).itemsize
    room = _WORKSPACE_BYTES // max(1, key_length * row_bytes)
    # With room for one head only, more rows make up for it.
    block_q = problem.block_q or max(1, (_BLOCK_Q if room > 1 else 2 * _BLOCK_Q) // group)
    block_q = max(1, min(block_q, query_length))
    together = max(1, min(_TILE_BYTES // (group * block_q * block_k * itemsize), room))
    dense = problem.dense is not None
    if problem.key_bounds is None:
        tile_map = band_tiles(
            problem.window_left, problem.window_right, problem.query_offset,
            query_length, key_length, block_q, KEY_GRANULE, dense,
        )  # fmt: skip
    else:
        tile_map = bound_tiles(
            problem.key_bounds, problem.query_offset, query_length, block_q, KEY_GRANULE, dense
        )
    workspace = Workspace(query.device)
    for row in range(batch):
        for start in range(0, key_heads, together):
            lane_heads = slice(start, min(start + together, key_heads))
            yield Lane(
                query, key, value, problem, row, lane_heads, block_q, block_k, tile_map, workspace
            )


def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    """float16 products are emulated or overflow on some devices: float32 is right on all."""
    return torch.float32 if dtype == torch.float16 else dtype


class Workspace:
    """Memory that tiles use again and again: fresh pages cost a CPU more than what fills them."""

    def __init__(self, device: torch.device):
        self.device = device
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor, valid until ``name`` is taken again."""
        size = math.prod(shape)
        kept = self._kept.get((name, dtype))
        if kept is None or kept.numel() < size:
            kept = torch.empty(size, dtype=dtype, device=self.device)
            self._kept[name, dtype] = kept
        return kept[:size].view(shape)


class Lane:
    """Attributes:

    key_blocks, value_blocks: the lane's keys and values, cut at every ``block_k`` keys.
    dtype: of the products; stats: of sums and statistics.
    plain: the scores are the scaled products and nothing else.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        problem: Problem,
        batch: int,
        key_heads: slice,
        block_q: int,
        block_k: int,
        tile_map: TileMap,
        workspace: Workspace,
    ):
        self.problem, self.batch, self.key_heads = problem, batch, key_heads
        self.block_q, self.block_k, self.tile_map = block_q, block_k, tile_map
        self.workspace = workspace
        self.group_size = query.shape[1] // key.shape[1]
        self.heads = slice(key_heads.start * self.group_size, key_heads.stop * self.group_size)
        self.index = (batch, self.heads)
        self.query_length, self.key_length = query.shape[2], key.shape[2]
        self.device = query.device
        self.dtype = _product_dtype(query.dtype)
        self.stats = statistics_dtype(query.dtype)
        self.plain = problem.bias is None and problem.alibi_slopes is None and not problem.softcap
        self._query = query[self.index]
        self.key_blocks = self._blocks(key)
        self.value_blocks = self._blocks(value)

    def _blocks(self, x: Tensor) -> list[Tensor]:
        blocks = x[self.batch, self.key_heads].to(self.dtype).split(self.block_k, dim=1)
        if len(blocks) == 1 or blocks[0].shape[0] == 1:
            return list(blocks)
        # A product copies a block that is not contiguous: better once than for every tile of rows.
        return [block.contiguous() for block in blocks]

    def query_tiles(self) -> Iterator[tuple[slice, list[Tile]]]:
        """(rows, tiles of keys) for each tile of queries; tiles that need no masking come first."""
        batch = self.batch if self.tile_map.visit.shape[0] > 1 else 0
        kinds = (self.tile_map.visit[batch].int() + self.tile_map.full[batch].int()).tolist()
        for number, row in enumerate(kinds):
            tiles, at = [], 0
            for kind, run in groupby(row):
                stop = at + len(list(run))
                if kind:
                    last = min(stop * KEY_GRANULE, self.key_length)
                    tiles += self._tiles(at * KEY_GRANULE, last, masked=kind == 1)
                at = stop
            tiles.sort(key=lambda tile: tile.masked)
            start = number * self.block_q
            yield slice(start, min(start + self.block_q, self.query_length)), tiles

    def _tiles(self, start: int, stop: int, masked: bool) -> Iterator[Tile]:
        while start < stop:
            block, offset = divmod(start, self.block_k)
            end = min(stop, (block + 1) * self.block_k)
            yield Tile(slice(start, end), block, slice(offset, offset + end - start), masked)
            start = end

    def query(self, rows: slice) -> Tensor:
        return self.group(self._query[:, rows].to(self.dtype))

    def key(self, tile: Tile) -> Tensor:
        return self.key_blocks[tile.block][:, tile.inside]

    def value(self, tile: Tile) -> Tensor:
        return self.value_blocks[tile.block][:, tile.inside]

    def group(self, x: Tensor) -> Tensor:
        """[query heads, rows, D] -> [key heads, group * rows, D]"""
        return x.reshape(-1, self.group_size * x.shape[1], x.shape[2])

    def ungroup(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0] * self.group_size, -1, x.shape[2])

    def by_head(self, x: Tensor) -> Tensor:
        """[key heads, group * rows, cols] of any strides as [key heads, group, rows, cols]."""
        return x.unflatten(1, (self.group_size, -1))

    def index_of(self, x: Tensor) -> tuple[int, slice]:
        """Where this lane's heads stand in a [B or 1, H or 1, ...] tensor."""
        return (
            self.batch if x.shape[0] > 1 else 0,
            self.heads if x.shape[1] > 1 else slice(0, 1),
        )

    def part(self, x: Tensor, rows: slice, cols: slice) -> Tensor:
        """This lane's tile of a tensor that broadcasts to [B, H, Tq, Tk], to meet `by_head`."""
        x = x[self.index_of(x)]
        x = x[:, rows if x.shape[1] > 1 else slice(None), cols if x.shape[2] > 1 else slice(None)]
        return x.unflatten(0, (-1, self.group_size)) if x.shape[0] > 1 else x[None]

    def per_row(self, x: Tensor, rows: slice) -> Tensor:
        """A number per head, [B or 1, H], for each row: [key heads, group * rows, 1]."""
        x = x[self.index_of(x)].view(-1, self.group_size, 1)
        return x.repeat_interleave(rows.stop - rows.start, dim=1)

    def positions(self, rows: slice, cols: slice) -> tuple[Tensor, Tensor]:
        position = torch.arange(rows.start, rows.stop, device=self.device)
        key = torch.arange(cols.start, cols.stop, device=self.device)
        return position[:, None] + self.problem.query_offset, key

    def hidden(self, rows: slice, cols: slice) -> Tensor:
        """bool, to broadcast against `by_head`: the pairs that do not see each other."""
        problem = self.problem
        position, key = self.positions(rows, cols)
        parts = []
        if problem.window_left is not None:
            parts.append(position - key > problem.window_left)
        if problem.window_right is not None:
            parts.append(key - position > problem.window_right)
        if problem.first_query is not None:
            batch = self.batch if problem.first_query.shape[0] > 1 else 0
            parts.append(problem.first_query[batch, cols] > position)
            parts.append(position >= problem.last_query[batch, cols])
        if problem.dense is not None:
            parts.append(~self.part(problem.dense, rows, cols))
        hidden = parts[0]
        for part in parts[1:]:
            hidden = hidden | part
        return hidden

    def scores(
        self, query: Tensor, rows: slice, tile: Tile, reference: Tensor | None, by_key: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Base-2 scores [key heads, group * rows, cols] less ``reference``, and softcap's tanh.

        Plain scores come in the dtype of the products, with the subtraction done inside the product
        before it rounds; modified ones in the dtype of the statistics.

        Args:
            reference: [key heads, group * rows, 1]
            by_key: lay the result out in memory key by key.
        """
        problem, cols = self.problem, tile.cols
        key, capped = self.key(tile), None
        if self.plain:
            s = self.product("scores", query, key, reference, problem.scale * LOG2E, by_key)
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
            s.mul_(LOG2E)
            if reference is not None:
                s.sub_(reference)
        if tile.masked:
            self.by_head(s).masked_fill_(self.hidden(rows, cols), -math.inf)
        return s, capped

    def product(
        self,
        name: str,
        a: Tensor,
        b: Tensor,
        reference: Tensor | None,
        scale: float,
        by_key: bool,
    ) -> Tensor:
        """scale * A B^T - reference, [key heads, rows of A, rows of B], rounded once.

        The result lies in the workspace under ``name``, key by key if ``by_key``.
        """
        a, b = (b, a) if by_key else (a, b)
        product = self.workspace.take(name, (a.shape[0], a.shape[1], b.shape[1]), a.dtype)
        origin = product if reference is None else -reference.to(a.dtype)
        beta = 0 if reference is None else 1
        if by_key and beta:
            origin = origin.transpose(1, 2)
        torch.baddbmm(
            origin.expand(product.shape), a, b.transpose(1, 2), beta=beta, alpha=scale, out=product
        )
        return product.transpose(1, 2) if by_key else product

    def add_product(self, acc: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        """acc + A B, added up in the dtype of the statistics."""
        a, b = a.to(self.dtype), b.to(self.dtype)
        if acc is None:
            return torch.bmm(a, b).to(self.stats)
        return acc.baddbmm_(a, b) if self.dtype == self.stats else acc.add_(torch.bmm(a, b))

    def kept(self, rows: slice, cols: slice) -> Tensor:
        """Dropout's multiplier of the probabilities, [key heads, group * rows, cols]."""
        problem = self.problem
        heads = torch.arange(self.heads.start, self.heads.stop, device=self.device)
        row = torch.arange(rows.start, rows.stop, device=self.device)
        col = torch.arange(cols.start, cols.stop, device=self.device)
        keep = dropout.keep(problem.seed, self.batch, heads, row, col, problem.dropout_p)
        return self.group(keep).to(self.stats).div_(1 - problem.dropout_p)
