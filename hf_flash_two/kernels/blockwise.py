"""FlashAttention-2 in PyTorch tiles: the specification of what every kernel computes.

Source: Dao 2023, arXiv:2307.08691, Algorithms 1 and 2. Scores are kept in base 2. Memory is linear
in the sequence, and a tile's passes stay in a CPU's L2 cache.

The running maximum is lazy. Softmax is invariant to the reference that is subtracted from a row's
scores, so instead of following the maximum tile by tile, a row takes as reference the maximum over
a few keys that all rows of its tile see, and hands it to the matrix product, which subtracts it
for nothing. Only if a row's sum shows that to be a poor reference is the tile of queries computed
again with the usual online softmax.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_flash_two.kernels.lane import Lane, Tile, lanes
from hf_flash_two.kernels.problem import LOG2E, Problem, empty_lse, empty_output, statistics_dtype

_PROBE_KEYS = 64
_SAFE_MEAN = 2.0**4


def forward(query: Tensor, key: Tensor, value: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Tq, Dv] in the dtype of ``query`` and lse [B, Hq, Tq] in float32 (float64)."""
    out, lse = empty_output(query, value.shape[3]), empty_lse(query)
    with torch.autocast(query.device.type, enabled=False):
        for lane in lanes(query, key, value, problem):
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
    """Gradients of query, key, value, bias, sinks; tiles in a fixed order: bitwise repeatable."""
    dq, dk, dv = (empty_output(tensor, tensor.shape[3]) for tensor in (query, key, value))
    stats = statistics_dtype(query.dtype)
    d_bias = problem.bias.new_zeros(problem.bias.shape, dtype=stats) if need_d_bias else None
    d_sinks = None if problem.sinks is None else torch.zeros_like(problem.sinks)
    with torch.autocast(query.device.type, enabled=False):
        for lane in lanes(query, key, value, problem):
            dk_blocks = [torch.zeros_like(block, dtype=stats) for block in lane.key_blocks]
            dv_blocks = [torch.zeros_like(block, dtype=stats) for block in lane.value_blocks]
            for rows, tiles in lane.query_tiles():
                row_lse = lane.group(lse[lane.index][:, rows, None])
                row_d_out = lane.group(d_out[lane.index][:, rows]).to(stats)
                delta = (row_d_out * lane.group(out[lane.index][:, rows])).sum(-1, keepdim=True)
                if d_lse is not None:
                    delta -= lane.group(d_lse[lane.index][:, rows, None])
                if d_sinks is not None:
                    weight = torch.exp(lane.per_row(problem.sinks, rows) - row_lse)
                    share = lane.ungroup(weight.nan_to_num_(0.0) * delta).sum((1, 2))
                    d_sinks[lane.index_of(d_sinks)] -= share
                lane_dq = _differentiate(
                    lane, rows, tiles, row_lse, row_d_out, delta, dk_blocks, dv_blocks, d_bias
                )
                dq[lane.index][:, rows] = lane.ungroup(lane_dq)
            for at, (dk_block, dv_block) in enumerate(zip(dk_blocks, dv_blocks, strict=True)):
                cols = slice(at * lane.block_k, (at + 1) * lane.block_k)
                dk[lane.batch, lane.key_heads, cols] = dk_block.mul_(problem.scale)
                dv[lane.batch, lane.key_heads, cols] = dv_block
    if d_bias is not None:
        d_bias = d_bias.to(problem.bias.dtype)
    return dq, dk, dv, d_bias, d_sinks


def _attend(lane: Lane, rows: slice, tiles: list[Tile]) -> tuple[Tensor, Tensor]:
    """Output and natural-log lse of one tile of queries, [key heads, group * rows, Dv or 1]."""
    query, state = lane.query(rows), None
    if tiles and not tiles[0].masked:
        state = _attend_lazily(lane, query, rows, tiles)
    if state is None:
        state = _attend_online(lane, query, rows, tiles)
    reference, total, acc = state
    if lane.problem.sinks is not None:
        sink = lane.per_row(lane.problem.sinks, rows) * LOG2E
        peak = torch.maximum(reference, sink)
        origin = peak.masked_fill(peak == -math.inf, 0)
        shrink = torch.exp2(reference - origin)
        reference, total, acc = peak, total * shrink + torch.exp2(sink - origin), acc * shrink
    out = acc.div_(total.masked_fill(total == 0, 1))
    return out, (reference + total.log2()) / LOG2E


def _attend_lazily(lane: Lane, query: Tensor, rows: slice, tiles: list[Tile]):
    """(reference, sum, sum of p V) with one reference; None if a row's sum shows it a poor one."""
    first = tiles[0]
    few = min(_PROBE_KEYS, first.width)
    probe = Tile(
        slice(first.cols.start, first.cols.start + few),
        first.block,
        slice(first.inside.start, first.inside.start + few),
        masked=False,
    )
    reference = lane.scores(query, rows, probe, None)[0].amax(-1, keepdim=True)
    if not reference.isfinite().all():
        return None
    total = acc = None
    for tile in tiles:
        s = lane.scores(query, rows, tile, reference)[0]
        narrow = s.dtype != lane.stats
        p = lane.workspace.take("p", s.shape, lane.stats).copy_(s) if narrow else s
        part = p.exp2_().sum(-1, keepdim=True)
        total = part if total is None else total.add_(part)
        p = _drop(lane, p, rows, tile)
        acc = lane.add_product(acc, s.copy_(p) if narrow else p, lane.value(tile))
    # Scores far above the reference have lost bits where the product rounded their distance to it.
    safe = total.amax() < _SAFE_MEAN * sum(tile.width for tile in tiles)
    return (reference.to(lane.stats), total, acc) if safe else None


def _attend_online(lane: Lane, query: Tensor, rows: slice, tiles: list[Tile]):
    """The running maximum of the textbook; rows that see nothing end with reference -inf, sum 0."""
    shape = query.shape[:2]
    reference = torch.full((*shape, 1), -math.inf, dtype=lane.stats, device=query.device)
    total = torch.zeros_like(reference)
    acc = reference.new_zeros(*shape, lane.value_blocks[0].shape[2])
    for tile in tiles:
        s = lane.scores(query, rows, tile, None)[0].to(lane.stats)
        peak = torch.maximum(reference, s.amax(-1, keepdim=True))
        origin = peak.masked_fill(peak == -math.inf, 0)
        shrink = torch.exp2(reference - origin)
        p = s.sub_(origin).exp2_()
        total = total.mul_(shrink).add_(p.sum(-1, keepdim=True))
        acc = lane.add_product(acc.mul_(shrink), _drop(lane, p, rows, tile), lane.value(tile))
        reference = peak
    return reference, total, acc


def _drop(lane: Lane, p: Tensor, rows: slice, tile: Tile) -> Tensor:
    return p * lane.kept(rows, tile.cols) if lane.problem.dropout_p else p


def _differentiate(
    lane: Lane,
    rows: slice,
    tiles: list[Tile],
    lse: Tensor,
    d_out: Tensor,
    delta: Tensor,
    dk_blocks: list[Tensor],
    dv_blocks: list[Tensor],
    d_bias: Tensor | None,
) -> Tensor:
    """dQ of one tile of queries, [key heads, group * rows, D]; adds its share to dK, dV and d_bias.

    Tiles are laid out key by key: two of the three products that follow read them transposed.
    """
    problem, query = lane.problem, lane.query(rows)
    reference = (lse * LOG2E).masked_fill(lse == -math.inf, 0)
    if lane.plain:
        # The product rounds scores by their distance from the reference, so it lies midway between
        # a lone probability and that of equal ones. What this and its own rounding took from it
        # multiplies the whole row of P: hand it to the other factor.
        keys = sum(tile.width for tile in tiles)
        rounded = (reference - math.log2(max(keys, 1)) / 2).to(lane.dtype)
        correction = torch.exp2(rounded.to(lane.stats) - reference)
        d_out, delta, reference = d_out * correction, delta * correction, rounded
    d_out = d_out.to(lane.dtype)
    dq = torch.zeros(query.shape, dtype=lane.stats, device=query.device)
    for tile in tiles:
        key, value = lane.key(tile), lane.value(tile)
        s, capped = lane.scores(query, rows, tile, reference, by_key=True)
        p = s.exp2_()
        if problem.dropout_p:
            kept = lane.kept(rows, tile.cols)
            ds = lane.product("ds", d_out, value, None, 1, by_key=True).to(lane.stats)
            ds = ds.mul_(kept).sub_(delta).mul_(p)
            p = p * kept
        else:
            ds = lane.product("ds", d_out, value, delta, 1, by_key=True)
            ds = ds.to(s.dtype).mul_(p)
        lane.add_product(dv_blocks[tile.block][:, tile.inside], p.transpose(1, 2), d_out)
        if d_bias is not None:
            part = lane.part(d_bias, rows, tile.cols)
            part += lane.by_head(ds).sum_to_size(part.shape)
        if capped is not None:
            ds = ds.mul_(1 - capped.square())
        ds = ds.to(lane.dtype)
        lane.add_product(dk_blocks[tile.block][:, tile.inside], ds.transpose(1, 2), query)
        lane.add_product(dq, ds, key)
    return dq.mul_(problem.scale)
