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

from hf_flash_two.kernels.lane import KeyTile, Lane, QueryTile, lanes
from hf_flash_two.kernels.problem import LOG2E, Problem, empty_lse, empty_output, statistics_dtype

_SAFE_MEAN = 2.0**4


def forward(query: Tensor, key: Tensor, value: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Tq, Dv] in the dtype of ``query`` and lse [B, Hq, Tq] in float32 (float64)."""
    out, lse = empty_output(query, value.shape[3]), empty_lse(query)
    with torch.autocast(query.device.type, enabled=False):
        for lane in lanes(query, key, value, problem):
            for tile in lane.query_tiles:
                lane_out, lane_lse = _attend(lane, tile)
                out[lane.index][:, :, tile.rows] = lane.ungroup(lane_out)
                lse[lane.index][:, :, tile.rows] = lane.ungroup(lane_lse)[..., 0]
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
        for lane in lanes(query, key, value, problem, gradients=True):
            dk_blocks, dv_blocks = lane.accumulators(dk), lane.accumulators(dv)
            for tile in lane.query_tiles:
                rows = tile.rows
                row_lse = lane.group(lse[lane.index][:, :, rows, None])
                row_d_out = lane.group(d_out[lane.index][:, :, rows]).to(stats)
                delta = (row_d_out * lane.group(out[lane.index][:, :, rows])).sum(-1, keepdim=True)
                if d_lse is not None:
                    delta -= lane.group(d_lse[lane.index][:, :, rows, None])
                if d_sinks is not None:
                    weight = torch.exp(lane.per_row(problem.sinks, rows) - row_lse)
                    share = lane.ungroup(weight.nan_to_num_(0.0) * delta).sum((2, 3))
                    lane_sinks = d_sinks[lane.index_of(d_sinks)]
                    lane_sinks -= share.sum_to_size(lane_sinks.shape)
                lane_dq = _differentiate(
                    lane, tile, row_lse, row_d_out, delta, dk_blocks, dv_blocks, d_bias
                )
                dq[lane.index][:, :, rows] = lane.ungroup(lane_dq)
            lane.store(dk, dk_blocks, problem.scale)
            lane.store(dv, dv_blocks, 1)
    if d_bias is not None:
        d_bias = d_bias.to(problem.bias.dtype)
    return dq, dk, dv, d_bias, d_sinks


def _attend(lane: Lane, tile: QueryTile) -> tuple[Tensor, Tensor]:
    """Output and natural-log lse of one tile of queries, [heads, group * rows, Dv or 1]."""
    query = lane.query(tile.rows)
    lazily = tile.probe and len(tile.key_tiles) > 1
    state = _attend_lazily(lane, query, tile) if lazily else None
    reference, total, acc = state or _attend_online(lane, query, tile)
    if lane.problem.sinks is not None:
        sink = lane.per_row(lane.problem.sinks, tile.rows) * LOG2E
        peak = torch.maximum(reference, sink)
        origin = peak.masked_fill(peak == -math.inf, 0)
        shrink = torch.exp2(reference - origin)
        reference, total, acc = peak, total * shrink + torch.exp2(sink - origin), acc * shrink
    # Only rows that share a key are sure to see any.
    out = acc.div_(total if state else total.masked_fill(total == 0, 1))
    return out, (reference + total.log2()).div_(LOG2E)


def _attend_lazily(lane: Lane, query: Tensor, tile: QueryTile):
    """(reference, sum, sum of p V) with one reference; None if a row's sum shows it a poor one."""
    reference = lane.scores(query, tile.rows, tile.probe, None)[0].amax(-1, keepdim=True)
    shift = reference.neg()
    total = acc = None
    for keys in tile.key_tiles:
        s = lane.scores(query, tile.rows, keys, shift)[0]
        narrow = s.dtype != lane.stats
        p = lane.workspace.take("p", s.shape, lane.stats).copy_(s) if narrow else s
        part = p.exp2_().sum(-1, keepdim=True)
        total = part if total is None else total.add_(part)
        p = _drop(lane, p, tile.rows, keys)
        acc = lane.add_product(acc, s.copy_(p) if narrow else p, lane.value(keys))
    # Scores far above the reference have lost bits where the product rounded their distance to it;
    # those of a reference that is no number make a sum that is none, and fails the test too.
    safe = total.amax() < _SAFE_MEAN * sum(keys.width for keys in tile.key_tiles)
    return (reference.to(lane.stats), total, acc) if safe else None


def _attend_online(lane: Lane, query: Tensor, tile: QueryTile):
    """The running maximum of the textbook; rows that see nothing end with reference -inf, sum 0."""
    reference = total = acc = None
    for keys in tile.key_tiles:
        s = lane.scores(query, tile.rows, keys, None, by_key=lane.few)[0]
        s = s.to(lane.stats).contiguous()
        peak = s.amax(-1, keepdim=True)
        if reference is not None:
            peak = torch.maximum(reference, peak)
        origin = peak.masked_fill(peak == -math.inf, 0)
        p = s.sub_(origin).exp2_()
        part = p.sum(-1, keepdim=True)
        if reference is not None:
            shrink = torch.exp2(reference - origin)
            part, acc = part.add_(total.mul_(shrink)), acc.mul_(shrink)
        acc = lane.add_product(acc, _drop(lane, p, tile.rows, keys), lane.value(keys))
        reference, total = peak, part
    if reference is None:
        reference = query.new_full((*query.shape[:2], 1), -math.inf, dtype=lane.stats)
        total = torch.zeros_like(reference)
        acc = total.repeat(1, 1, lane.value_blocks[0].shape[2])
    return reference, total, acc


def _drop(lane: Lane, p: Tensor, rows: slice, keys: KeyTile) -> Tensor:
    return p * lane.kept(rows, keys.cols) if lane.problem.dropout_p else p


def _differentiate(
    lane: Lane,
    tile: QueryTile,
    lse: Tensor,
    d_out: Tensor,
    delta: Tensor,
    dk_blocks: list[Tensor],
    dv_blocks: list[Tensor],
    d_bias: Tensor | None,
) -> Tensor:
    """dQ of one tile of queries, [heads, group * rows, D]; adds its share to dK, dV and d_bias.

    Tiles are laid out key by key: two of the three products that follow read them transposed.
    """
    problem, rows, query = lane.problem, tile.rows, lane.query(tile.rows)
    reference = (lse * LOG2E).masked_fill(lse == -math.inf, 0)
    if lane.plain:
        # The product rounds scores by their distance from the reference, so it lies midway between
        # a lone probability and that of equal ones. What this and its own rounding took from it
        # multiplies the whole row of P: hand it to the other factor.
        count = sum(keys.width for keys in tile.key_tiles)
        rounded = (reference - math.log2(max(count, 1)) / 2).to(lane.dtype)
        correction = torch.exp2(rounded.to(lane.stats) - reference)
        d_out, delta, reference = d_out * correction, delta * correction, rounded
    d_out = d_out.to(lane.dtype)
    shift, d_shift = reference.neg(), delta.to(lane.dtype).neg()
    dq = torch.zeros(query.shape, dtype=lane.stats, device=query.device)
    for keys in tile.key_tiles:
        key, value = lane.key(keys), lane.value(keys)
        s, capped = lane.scores(query, rows, keys, shift, by_key=True)
        p = s.exp2_()
        if problem.dropout_p:
            kept = lane.kept(rows, keys.cols)
            ds = lane.product("ds", d_out, value, None, 1, by_key=True).to(lane.stats)
            ds = ds.mul_(kept).sub_(delta).mul_(p)
            p = p * kept
        else:
            ds = lane.product("ds", d_out, value, d_shift, 1, by_key=True)
            ds = ds.to(s.dtype).mul_(p)
        lane.add_product(dv_blocks[keys.block][:, keys.inside], p.transpose(1, 2), d_out)
        if d_bias is not None:
            part = lane.part(d_bias, rows, keys.cols)
            part += lane.by_head(ds).sum_to_size(part.shape)
        if capped is not None:
            ds = ds.mul_(1 - capped.square())
        ds = ds.to(lane.dtype)
        lane.add_product(dk_blocks[keys.block][:, keys.inside], ds.transpose(1, 2), query)
        lane.add_product(dq, ds, key)
    return dq.mul_(problem.scale)
