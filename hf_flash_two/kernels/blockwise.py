"""FlashAttention-2 in PyTorch tiles: the specification of what every kernel computes, on any device.

Source: Dao 2023, arXiv:2307.08691, Algorithms 1 and 2. Scores are kept in base 2. A tile never exceeds
`_TILE_ELEMENTS`, so memory is linear in the sequence and a tile's passes stay in a CPU's L2 cache.

The running maximum is lazy. Softmax is invariant to the reference that is subtracted from a row's scores,
so instead of following the maximum tile by tile, a row takes as reference the maximum over a few keys that
all its tile's rows see, and hands it to the matrix product, which subtracts it for nothing. Only if a row
sum leaves the safe range is the tile of queries computed again with the usual online softmax.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from hf_flash_two.kernels import dropout
from hf_flash_two.kernels.problem import LOG2E, Problem, empty_lse, empty_output, statistics_dtype
from hf_flash_two.masks import KEY_GRANULE, band_tiles, bound_tiles

_BLOCK_Q = 256
_BLOCK_K = 512
_TILE_ELEMENTS = 2**19
_WORKSPACE_BYTES = 2**24
_PROBE_KEYS = 64
_SAFE_MEAN = 2.0**4


def forward(query: Tensor, key: Tensor, value: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Tq, Dv] in the dtype of ``query`` and lse [B, Hq, Tq] in float32 (float64)."""
    out, lse = empty_output(query, value.shape[3]), empty_lse(query)
    with torch.autocast(query.device.type, enabled=False):
        for lane in _lanes(query, key, value, problem):
            for rows, tiles in lane.query_tiles():
                lane_out, lane_lse = _attend(lane, rows, tiles)
                out[lane.index][:, rows] = lane.ungroup(lane_out)
                lse[lane.index][:, rows] = lane.ungroup(lane_lse)[..., 0]
    return out, lse


def backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    problem: Problem,
    need_d_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of query, key, value, bias and sinks; tiles in a fixed order, so bitwise repeatable."""
    dq, dk, dv = (empty_output(tensor, tensor.shape[3]) for tensor in (query, key, value))
    stats = statistics_dtype(query.dtype)
    d_bias = torch.zeros_like(problem.bias, dtype=stats) if need_d_bias else None
    d_sinks = None if problem.sinks is None else torch.zeros_like(problem.sinks, dtype=stats)
    with torch.autocast(query.device.type, enabled=False):
        for lane in _lanes(query, key, value, problem, backward=True):
            lane_dk = torch.zeros(lane.key.shape, dtype=stats, device=query.device)
            lane_dv = torch.zeros(lane.value.shape, dtype=stats, device=query.device)
            for rows, tiles in lane.query_tiles():
                row_lse = lane.group(lse[lane.index][:, rows, None])
                row_d_out = lane.group(d_out[lane.index][:, rows]).to(stats)
                delta = (row_d_out * lane.group(out[lane.index][:, rows])).sum(-1, keepdim=True)
                if d_lse is not None:
                    delta -= lane.group(d_lse[lane.index][:, rows, None])
                if d_sinks is not None:
                    d_sinks[lane.index_of(d_sinks)] += lane.d_sinks(row_lse, delta)
                lane_dq = _differentiate(
                    lane, rows, tiles, row_lse, row_d_out, delta, lane_dk, lane_dv, d_bias
                )
                dq[lane.index][:, rows] = lane.ungroup(lane_dq)
            batch, heads = lane.batch, lane.key_heads
            dk[batch, heads], dv[batch, heads] = lane_dk.mul_(problem.scale), lane_dv
    if d_bias is not None:
        d_bias = d_bias.to(problem.bias.dtype)
    return dq, dk, dv, d_bias, d_sinks


@dataclass(frozen=True)
class _Tile:
    """Neighbouring keys that one tile of queries meets at once."""

    cols: slice
    masked: bool


class _Lane:
    """Some key heads of one batch row, with the query heads that share them; one batched product each.

    Queries are laid out [key heads, group * rows, D]: the query heads of a group are more rows.
    """

    def __init__(self, query, key, value, problem, batch, key_heads, block_q, tile_map):
        group = query.shape[1] // key.shape[1]
        self.problem, self.batch, self.key_heads, self.group_size = (
            problem, batch, key_heads, group,
        )  # fmt: skip
        self.heads = slice(key_heads.start * group, key_heads.stop * group)
        self.index = (batch, self.heads)
        self.query_length, self.key_length = query.shape[2], key.shape[2]
        self.block_q, self.tile_map = block_q, tile_map
        self.out_dtype = query.dtype
        # Half precision products are emulated or overflow on some devices: float32 is right on all.
        self.dtype = torch.float32 if query.dtype == torch.float16 else query.dtype
        self.stats = statistics_dtype(query.dtype)
        self.query = query[batch, self.heads]
        self.key = key[batch, key_heads].to(self.dtype)
        self.value = value[batch, key_heads].to(self.dtype)
        self.plain = problem.bias is None and problem.alibi_slopes is None and not problem.softcap

    def query_tiles(self):
        """(rows, tiles of keys) for each tile of queries; tiles that need no masking come first."""
        limit = self.problem.block_k or _BLOCK_K
        if self.problem.dense is None and self.query_length * self.group_size <= 64:
            limit = max(limit, _TILE_ELEMENTS // 64)
        batch = self.batch if self.tile_map.visit.shape[0] > 1 else 0
        state = (self.tile_map.visit[batch].int() + self.tile_map.full[batch].int()).tolist()
        for tile, kinds in enumerate(state):
            start = tile * self.block_q
            tiles, at = [], 0
            for kind, run in groupby(kinds):
                stop = at + len(list(run))
                if kind:
                    first, last = at * KEY_GRANULE, min(stop * KEY_GRANULE, self.key_length)
                    tiles += [
                        _Tile(slice(j, min(j + limit, last)), masked=kind == 1)
                        for j in range(first, last, limit)
                    ]
                at = stop
            tiles.sort(key=lambda tile: tile.masked)
            yield slice(start, min(start + self.block_q, self.query_length)), tiles

    def group(self, x: Tensor) -> Tensor:
        """[query heads, rows, D] -> [key heads, group * rows, D]"""
        return x.reshape(-1, self.group_size * x.shape[1], x.shape[2])

    def ungroup(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0] * self.group_size, -1, x.shape[2])

    def index_of(self, x: Tensor) -> tuple[int, slice]:
        """Where this lane's heads stand in a [B or 1, H or 1, ...] tensor."""
        return (
            self.batch if x.shape[0] > 1 else 0,
            self.heads if x.shape[1] > 1 else slice(0, 1),
        )

    def part(self, x: Tensor, rows: slice, cols: slice) -> Tensor:
        """This lane's tile of a tensor that broadcasts to [B, H, Tq, Tk]."""
        x = x[self.index_of(x)]
        return x[
            :, rows if x.shape[1] > 1 else slice(None), cols if x.shape[2] > 1 else slice(None)
        ]

    def by_head(self, s: Tensor, rows: slice) -> Tensor:
        """[key heads, group * rows, cols] seen as [query heads, rows, cols]."""
        return s.view(-1, rows.stop - rows.start, s.shape[2])

    def positions(self, rows: slice, cols: slice) -> tuple[Tensor, Tensor]:
        device = self.key.device
        position = torch.arange(rows.start, rows.stop, device=device) + self.problem.query_offset
        return position[:, None], torch.arange(cols.start, cols.stop, device=device)

    def visible(self, rows: slice, cols: slice) -> Tensor:
        """bool, broadcastable to [query heads, rows, cols]."""
        problem = self.problem
        position, key = self.positions(rows, cols)
        parts = []
        if problem.window_left is not None:
            parts.append(position - key <= problem.window_left)
        if problem.window_right is not None:
            parts.append(key - position <= problem.window_right)
        if problem.first_query is not None:
            batch = self.batch if problem.first_query.shape[0] > 1 else 0
            parts.append(problem.first_query[batch, cols] <= position)
            parts.append(position < problem.last_query[batch, cols])
        if problem.dense is not None:
            parts.append(self.part(problem.dense, rows, cols))
        visible = parts[0]
        for part in parts[1:]:
            visible = visible & part
        return visible

    def scores(
        self, query: Tensor, rows: slice, tile: _Tile, reference: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Base-2 scores [key heads, group * rows, cols] less ``reference``, and softcap's tanh.

        Plain scores come in the dtype of the products, with the subtraction done inside the product
        before it rounds; modified ones in the dtype of the statistics.
        """
        problem, cols = self.problem, tile.cols
        key = self.key[:, cols].transpose(1, 2)
        capped = None
        if self.plain:
            shape = (*query.shape[:2], key.shape[2])
            origin = query.new_zeros(1, 1, 1) if reference is None else -reference
            s = torch.baddbmm(
                origin.to(query.dtype).expand(shape), query, key, alpha=problem.scale * LOG2E
            )
        else:
            s = torch.bmm(query, key).to(self.stats).mul_(problem.scale)
            if problem.softcap:
                capped = s.div_(problem.softcap).tanh_()
                s = capped * problem.softcap
            by_head = self.by_head(s, rows)
            if problem.bias is not None:
                by_head += self.part(problem.bias, rows, cols)
            if problem.alibi_slopes is not None:
                slopes = problem.alibi_slopes[self.index_of(problem.alibi_slopes)]
                position, key_position = self.positions(rows, cols)
                by_head -= slopes[:, None, None] * (position - key_position).abs()
            s.mul_(LOG2E)
            if reference is not None:
                s.sub_(reference)
        if tile.masked:
            self.by_head(s, rows).masked_fill_(~self.visible(rows, cols), -math.inf)
        return s, capped

    def kept(self, rows: slice, cols: slice) -> Tensor:
        """Dropout's multiplier of the probabilities, [key heads, group * rows, cols]."""
        problem, device = self.problem, self.key.device
        heads = torch.arange(self.heads.start, self.heads.stop, device=device)
        row = torch.arange(rows.start, rows.stop, device=device)
        col = torch.arange(cols.start, cols.stop, device=device)
        keep = dropout.keep(problem.seed, self.batch, heads, row, col, problem.dropout_p)
        return self.group(keep).to(self.stats).div_(1 - problem.dropout_p)

    def sinks(self) -> Tensor:
        """Base-2 sink logits, [key heads, group, 1]."""
        sinks = self.problem.sinks[self.index_of(self.problem.sinks)].to(self.stats)
        return sinks.view(-1, self.group_size, 1) * LOG2E

    def per_row(self, x: Tensor, rows: slice) -> Tensor:
        """[key heads, group, 1] -> [key heads, group * rows, 1]"""
        return x.repeat_interleave(rows.stop - rows.start, dim=1)

    def d_sinks(self, lse: Tensor, delta: Tensor) -> Tensor:
        """Gradient of the sinks from one tile of rows, [query heads]."""
        rows = slice(0, lse.shape[1] // self.group_size)
        weight = torch.exp2(self.per_row(self.sinks(), rows) - lse * LOG2E)
        return -self.by_head(weight * delta, rows).sum((1, 2))


def _lanes(query, key, value, problem: Problem, backward: bool = False):
    batch, heads, query_length, _ = query.shape
    key_heads, key_length = key.shape[1:3]
    if query.numel() == 0 and not (backward and key.numel()):
        return
    group = heads // key_heads
    block_q = min(problem.block_q or max(1, _BLOCK_Q // group), max(query_length, 1))
    block_k = min(problem.block_k or _BLOCK_K, key_length)
    together = _TILE_ELEMENTS // max(1, group * block_q * block_k)
    if backward or query.dtype == torch.float16:
        row_bytes = (
            key_length * (key.shape[3] + value.shape[3]) * statistics_dtype(key.dtype).itemsize
        )
        together = min(together, _WORKSPACE_BYTES // max(1, row_bytes))
    together = max(1, together)
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
    for row in range(batch):
        for start in range(0, key_heads, together):
            lane_heads = slice(start, min(start + together, key_heads))
            yield _Lane(query, key, value, problem, row, lane_heads, block_q, tile_map)


def _attend(lane: _Lane, rows: slice, tiles: list[_Tile]) -> tuple[Tensor, Tensor]:
    """Output and natural-log lse of one tile of queries, [key heads, group * rows, Dv or 1]."""
    query = lane.group(lane.query[:, rows].to(lane.dtype))
    state = None
    if tiles and not tiles[0].masked:
        state = _attend_lazily(lane, query, rows, tiles)
    if state is None:
        state = _attend_online(lane, query, rows, tiles)
    reference, total, acc = state
    if lane.problem.sinks is not None:
        sink = lane.per_row(lane.sinks(), rows)
        peak = torch.maximum(reference, sink)
        origin = peak.masked_fill(peak == -math.inf, 0)
        shrink = torch.exp2(reference - origin)
        reference, total, acc = peak, total * shrink + torch.exp2(sink - origin), acc * shrink
    out = acc / total.masked_fill(total == 0, 1)
    return out, (reference + total.log2()) / LOG2E


def _attend_lazily(lane: _Lane, query: Tensor, rows: slice, tiles: list[_Tile]):
    """One reference for all tiles; None if a row's sum shows that it was a bad one."""
    first = tiles[0].cols.start
    probe = _Tile(slice(first, min(first + _PROBE_KEYS, tiles[0].cols.stop)), masked=False)
    reference = lane.scores(query, rows, probe, None)[0].amax(-1, keepdim=True)
    if not reference.isfinite().all():
        return None
    total = acc = None
    for tile in tiles:
        p = lane.scores(query, rows, tile, reference)[0].exp2_()
        part = p.sum(-1, keepdim=True, dtype=lane.stats)
        total = part if total is None else total.add_(part)
        acc = _add_product(acc, lane, _drop(lane, p, rows, tile), lane.value[:, tile.cols])
    # Scores far above the reference have lost bits where the product rounded their distance to it.
    keys = sum(tile.cols.stop - tile.cols.start for tile in tiles)
    return (reference.to(lane.stats), total, acc) if total.amax() < _SAFE_MEAN * keys else None


def _attend_online(lane: _Lane, query: Tensor, rows: slice, tiles: list[_Tile]):
    """The running maximum of the textbook; rows that see nothing end with reference -inf, sum 0."""
    shape = query.shape[:2]
    reference = torch.full((*shape, 1), -math.inf, dtype=lane.stats, device=query.device)
    total = torch.zeros_like(reference)
    acc = reference.new_zeros(*shape, lane.value.shape[2])
    for tile in tiles:
        s = lane.scores(query, rows, tile, None)[0].to(lane.stats)
        peak = torch.maximum(reference, s.amax(-1, keepdim=True))
        origin = peak.masked_fill(peak == -math.inf, 0)
        shrink = torch.exp2(reference - origin)
        p = s.sub_(origin).exp2_()
        total = total * shrink + p.sum(-1, keepdim=True)
        acc = _add_product(
            acc.mul_(shrink), lane, _drop(lane, p, rows, tile), lane.value[:, tile.cols]
        )
        reference = peak
    return reference, total, acc


def _drop(lane: _Lane, p: Tensor, rows: slice, tile: _Tile) -> Tensor:
    return p * lane.kept(rows, tile.cols) if lane.problem.dropout_p else p


def _add_product(acc: Tensor | None, lane: _Lane, a: Tensor, b: Tensor) -> Tensor:
    """acc + a @ b, accumulated in the dtype of the statistics."""
    a, b = a.to(lane.dtype), b.to(lane.dtype)
    if acc is None:
        return torch.bmm(a, b).to(lane.stats)
    return acc.baddbmm_(a, b) if lane.dtype == lane.stats else acc.add_(torch.bmm(a, b))


def _differentiate(
    lane: _Lane,
    rows: slice,
    tiles: list[_Tile],
    lse: Tensor,
    d_out: Tensor,
    delta: Tensor,
    dk: Tensor,
    dv: Tensor,
    d_bias: Tensor | None,
) -> Tensor:
    """dQ of one tile of queries, [key heads, group * rows, D]; adds its share to dk, dv and d_bias."""
    problem = lane.problem
    query = lane.group(lane.query[:, rows].to(lane.dtype))
    reference = (lse * LOG2E).masked_fill(lse == -math.inf, 0)
    if lane.plain:
        # The product rounds scores by their distance from the reference, so it lies midway between
        # a lone probability and that of equal ones. What this and its own rounding took from it
        # multiplies the whole row of P: hand it to the other factor.
        keys = sum(tile.cols.stop - tile.cols.start for tile in tiles)
        rounded = (reference - math.log2(max(keys, 1)) / 2).to(lane.dtype)
        correction = torch.exp2(rounded.to(lane.stats) - reference)
        d_out, delta = d_out * correction, delta * correction
        reference = rounded
    d_out = d_out.to(lane.dtype)
    dq = torch.zeros(query.shape, dtype=lane.stats, device=query.device)
    for tile in tiles:
        cols = tile.cols
        s, capped = lane.scores(query, rows, tile, reference)
        p = s.exp2_()
        value = lane.value[:, cols].transpose(1, 2)
        if problem.dropout_p:
            kept = lane.kept(rows, cols)
            ds = torch.bmm(d_out, value).to(lane.stats).mul_(kept).sub_(delta).mul_(p)
            p = p * kept
        elif lane.plain:
            origin = (-delta).to(lane.dtype).expand(p.shape)
            ds = torch.baddbmm(origin, d_out, value).mul_(p)
        else:
            ds = torch.bmm(d_out, value).to(lane.stats).sub_(delta).mul_(p)
        _add_product(dv[:, cols], lane, p.transpose(1, 2), d_out)
        if d_bias is not None:
            part = lane.part(d_bias, rows, cols)
            part += lane.by_head(ds, rows).sum_to_size(part.shape)
        if capped is not None:
            ds.mul_(1 - capped.square())
        ds = ds.to(lane.dtype)
        _add_product(dq, lane, ds, lane.key[:, cols])
        _add_product(dk[:, cols], lane, ds.transpose(1, 2), query)
    return dq.mul_(problem.scale)
