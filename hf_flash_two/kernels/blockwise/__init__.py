"""FlashAttention-2 in PyTorch tiles: the specification of what every kernel computes.

Source: Dao 2023, arXiv:2307.08691, Algorithms 1 and 2. Memory is linear in the sequence, and a
tile's passes stay in a CPU's L2 cache.

The running maximum is lazy. Softmax is invariant to the reference that is subtracted from a row's
scores, so instead of following the maximum tile by tile, a row takes as reference the maximum over
a few keys that all rows of its tile see, and hands it to the matrix product, which subtracts it
for nothing. Only if a row's sum shows that to be a poor reference is the tile of queries computed
again with the usual online softmax.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hf_flash_two.kernels.blockwise.head_blocks import KeyTile, Lane, QueryTile, lanes
from hf_flash_two.kernels.params import AttentionParams, empty_lse, empty_output, statistics_dtype

_SAFE_MEAN = 2.0**4
_FINE = 2.0**10
"""Beyond this, what a row's lse adds to its largest score is worn by rounding."""


def declines(
    query: Tensor, key: Tensor, value: Tensor, params: AttentionParams, by_name: bool
) -> str | None:
    """None: it computes every call, on every device."""
    return None


def load() -> tuple[Callable, Callable]:
    """The forward and the backward."""
    return forward, backward


def forward(
    query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Tq, Dv] in the dtype of ``query`` and lse [B, Hq, Tq] in float32 (float64)."""
    result = _forward(query, key, value, params, guarded=False)
    if _polluted(params, result[0]):
        result = _forward(query, key, value, params, guarded=True)
    return result


def _polluted(params: AttentionParams, *results: Tensor | None) -> bool:
    """Whether something hidden that is not finite may stand behind what is not in the results."""
    hiding = (params.window_left, params.window_right, params.first_query, params.dense)
    if all(x is None for x in hiding):
        return False
    sums = [x.sum(dtype=statistics_dtype(x.dtype)) for x in results if x is not None]
    return not torch.stack(sums).isfinite().all()


def _forward(
    query: Tensor, key: Tensor, value: Tensor, params: AttentionParams, guarded: bool
) -> tuple[Tensor, Tensor]:
    out, lse = empty_output(query, value.shape[3]), empty_lse(query)
    with torch.autocast(query.device.type, enabled=False):
        for lane in lanes(query, key, value, params, guarded):
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
    params: AttentionParams,
    need_d_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of query, key, value, bias, sinks; tiles in a fixed order: bitwise repeatable."""
    inputs = (d_out, d_lse, query, key, value, out, lse, params, need_d_bias)
    grads = _backward(*inputs, guarded=False)
    return _backward(*inputs, guarded=True) if _polluted(params, *grads) else grads


def _backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    params: AttentionParams,
    need_d_bias: bool,
    guarded: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    dq, dk, dv = (empty_output(tensor, tensor.shape[3]) for tensor in (query, key, value))
    stats = statistics_dtype(query.dtype)
    d_bias = params.bias.new_zeros(params.bias.shape, dtype=stats) if need_d_bias else None
    d_sinks = None if params.sinks is None else torch.zeros_like(params.sinks)
    with torch.autocast(query.device.type, enabled=False):
        for lane in lanes(query, key, value, params, guarded, gradients=True):
            dk_blocks, dv_blocks = lane.accumulators(dk), lane.accumulators(dv)
            for tile in lane.query_tiles:
                rows = tile.rows
                row_lse = lane.group(lse[lane.index][:, :, rows, None])
                row_d_out = lane.group(d_out[lane.index][:, :, rows]).to(stats)
                row_out = lane.group(out[lane.index][:, :, rows])
                delta = row_d_out * row_out
                if guarded:
                    # Of rows that see nothing.
                    delta.masked_fill_(row_out == 0, 0)
                delta = delta.sum(-1, keepdim=True)
                if d_lse is not None:
                    delta -= lane.group(d_lse[lane.index][:, :, rows, None])
                if d_sinks is not None:
                    weight = torch.exp(lane.per_row(params.sinks, rows) - row_lse)
                    share = lane.ungroup(weight.nan_to_num_(0.0) * delta).sum((2, 3))
                    lane_sinks = d_sinks[lane.index_of(d_sinks)]
                    lane_sinks -= share.sum_to_size(lane_sinks.shape)
                lane_dq = _differentiate(
                    lane, tile, row_lse, row_d_out, delta, dk_blocks, dv_blocks, d_bias
                )
                dq[lane.index][:, :, rows] = lane.ungroup(lane_dq)
            lane.store(dk, dk_blocks, params.scale)
            lane.store(dv, dv_blocks, 1)
    if d_bias is not None:
        d_bias = d_bias.to(params.bias.dtype)
    return dq, dk, dv, d_bias, d_sinks


def _attend(lane: Lane, tile: QueryTile) -> tuple[Tensor, Tensor]:
    """Output and natural-log lse of one tile of queries, [heads, group * rows, Dv or 1]."""
    reference, total, acc = _softmax(lane, tile)
    return acc.div_(total.masked_fill(total == 0, 1)), reference.div_(lane.unit).add_(total.log())


def _softmax(lane: Lane, tile: QueryTile) -> tuple[Tensor, Tensor, Tensor]:
    """A reference for each row's scores, the sum of their powers less it, and that times V.

    Rows that see nothing have reference -inf and sum 0.
    """
    query = lane.query(tile.rows)
    lazily = tile.probe and len(tile.key_tiles) > 1
    state = _attend_lazily(lane, query, tile) if lazily else None
    reference, total, acc = state or _attend_online(lane, query, tile)
    if lane.params.sinks is not None:
        sink = lane.per_row(lane.params.sinks, tile.rows) * lane.unit
        peak = torch.maximum(reference, sink)
        origin = peak.masked_fill(peak == -math.inf, 0)
        shrink = lane.exp(reference - origin)
        reference, total, acc = peak, total * shrink + lane.exp(sink - origin), acc * shrink
    return reference, total, acc


def _attend_lazily(lane: Lane, query: Tensor, tile: QueryTile):
    """(reference, sum, sum of p V) with one reference; None if a row's sum shows it a poor one."""
    reference = lane.scores(query, tile.rows, tile.probe, None)[0].amax(-1, keepdim=True)
    shift = reference.neg()
    total = acc = None
    for keys in tile.key_tiles:
        s = lane.scores(query, tile.rows, keys, shift)[0]
        seen = lane.seen(s)
        narrow = s.dtype != lane.stats
        p = lane.workspace.take("p", s.shape, lane.stats).copy_(s) if narrow else s
        part = lane.exp(p).sum(-1, keepdim=True)
        total = part if total is None else total.add_(part)
        p = _drop(lane, p, tile.rows, keys)
        acc = lane.add_product(acc, s.copy_(p) if narrow else p, lane.value(keys), seen)
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
        seen = lane.seen(s)
        peak = s.amax(-1, keepdim=True)
        if reference is not None:
            peak = torch.maximum(reference, peak)
        origin = peak.masked_fill(peak == -math.inf, 0)
        p = lane.exp(s.sub_(origin))
        part = p.sum(-1, keepdim=True)
        if reference is not None:
            shrink = lane.exp(reference - origin)
            part, acc = part.add_(total.mul_(shrink)), acc.mul_(shrink)
        acc = lane.add_product(acc, _drop(lane, p, tile.rows, keys), lane.value(keys), seen)
        reference, total = peak, part
    if reference is None:
        reference = query.new_full((*query.shape[:2], 1), -math.inf, dtype=lane.stats)
        total = torch.zeros_like(reference)
        acc = total.repeat(1, 1, lane.value_blocks[0].shape[2])
    return reference, total, acc


def _drop(lane: Lane, p: Tensor, rows: slice, keys: KeyTile) -> Tensor:
    return p * lane.kept(rows, keys.cols) if lane.params.dropout_p else p


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
    params, rows, query = lane.params, tile.rows, lane.query(tile.rows)
    reference = (lse * lane.unit).masked_fill(lse == -math.inf, 0)
    if lane.plain:
        # The product rounds scores by their distance from the reference, so it lies midway between
        # a lone probability and that of equal ones. What this and its own rounding took from it
        # multiplies the whole row of P: hand it to the other factor.
        count = sum(keys.width for keys in tile.key_tiles)
        rounded = (reference - math.log2(max(count, 1)) / 2).to(lane.dtype)
        correction = torch.exp2(rounded.to(lane.stats) - reference)
        d_out, delta, reference = d_out * correction, delta * correction, rounded
    elif reference.abs().amax() > _FINE:
        reference, total, _ = _softmax(lane, tile)
        reference = reference.masked_fill(reference == -math.inf, 0)
        correction = total.masked_fill(total == 0, 1).reciprocal()
        d_out, delta = d_out * correction, delta * correction
    d_out = d_out.to(lane.dtype)
    shift, d_shift = reference.neg(), delta.to(lane.dtype).neg()
    dq = torch.zeros(query.shape, dtype=lane.stats, device=query.device)
    for keys in tile.key_tiles:
        key, value = lane.key(keys), lane.value(keys)
        s, capped = lane.scores(query, rows, keys, shift, by_key=True)
        seen = lane.seen(s)
        p = _where(seen, lane.exp(s))
        if params.dropout_p:
            kept = lane.kept(rows, keys.cols)
            ds = lane.product("ds", d_out, value, None, 1, by_key=True).to(lane.stats)
            ds = ds.mul_(kept).sub_(delta).mul_(p)
            p = p * kept
        else:
            ds = lane.product("ds", d_out, value, d_shift, 1, by_key=True)
            ds = ds.to(s.dtype).mul_(p)
        ds = _where(seen, ds)
        by_key = None if seen is None else seen.transpose(1, 2)
        lane.add_product(dv_blocks[keys.block][:, keys.inside], p.transpose(1, 2), d_out, by_key)
        if d_bias is not None:
            part = lane.part(d_bias, rows, keys.cols)
            part += lane.by_head(ds).sum_to_size(part.shape)
        if capped is not None:
            ds = _where(seen, ds.mul_(1 - capped.square()))
        ds = ds.to(lane.dtype)
        lane.add_product(dk_blocks[keys.block][:, keys.inside], ds.transpose(1, 2), query, by_key)
        lane.add_product(dq, ds, key, seen)
    return dq.mul_(params.scale)


def _where(seen: Tensor | None, x: Tensor) -> Tensor:
    """``x`` where it is seen, 0 elsewhere; as it is if that need not be said."""
    return x if seen is None else x.masked_fill_(~seen, 0)
