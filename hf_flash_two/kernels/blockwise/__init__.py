"""FlashAttention-2 in PyTorch tiles: the specification of what every kernel computes.

Source: Dao 2023, arXiv:2307.08691, Algorithms 1 and 2. Memory is linear in the sequence, and a
tile's passes stay in a CPU's L2 cache.

The running maximum is lazy. Softmax is invariant to the reference that is subtracted from a row's
scores, so instead of following the maximum tile by tile, a row takes as reference the maximum over
a few keys that all rows of its tile see, and hands it to the matrix product, which subtracts it
for nothing. Only if a row's sum shows that to be a poor reference is the tile of queries computed
again with the usual online softmax, as all are where the largest scores are wanted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from hf_flash_two.kernels.blockwise.head_blocks import INVARIANT_KEYS, HeadBlock, head_blocks
from hf_flash_two.kernels.blockwise.tiles import KeyTile, QueryTile
from hf_flash_two.kernels.hidden import hides
from hf_flash_two.kernels.params import (
    AttentionParams,
    empty_lse,
    empty_output,
    lowest_logits,
    statistics_dtype,
)

_SAFE_MEAN = 2.0**4
_FINE = 2.0**10
"""Beyond this, what a row's lse adds to its largest score is worn by rounding."""


def declines(
    query: Tensor, key: Tensor, value: Tensor, params: AttentionParams, by_name: bool
) -> str | None:
    """None: it computes every call, on every device; batch-invariant ones on CPUs only."""
    if params.batch_invariant and query.device.type != "cpu":
        return f"it is batch-invariant on CPUs only and the tensors are on {query.device.type}"
    return None


def load() -> tuple[Callable, Callable]:
    """The forward and the backward."""
    return forward, backward


def forward(
    query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
) -> tuple[Tensor, ...]:
    """out [B, Hq, Tq, Dv] in the dtype of ``query``; lse [B, Hq, Tq] and, if they are wanted,
    max_logits [B, Hq] in float32 (float64).
    """
    result = _forward(query, key, value, params, guarded=False)
    if hides(query, key, params) and not is_finite(result[0]):
        result = _forward(query, key, value, params, guarded=True)
    return result


def is_finite(*results: Tensor | None) -> bool:
    """Whether the results hold no NaN or infinity, which may come from hidden inputs."""
    sums = [x.sum(dtype=statistics_dtype(x.dtype)) for x in results if x is not None]
    return bool(torch.stack(sums).isfinite().all())


def _forward(
    query: Tensor, key: Tensor, value: Tensor, params: AttentionParams, guarded: bool
) -> tuple[Tensor, ...]:
    out, lse = empty_output(query, value.shape[3]), empty_lse(query)
    max_logits = lowest_logits(query) if params.max_logits else None
    with torch.autocast(query.device.type, enabled=False):
        for block in head_blocks(query, key, value, params, guarded):
            for tile in block.query_tiles:
                state = _softmax(block, tile)
                if max_logits is not None:
                    row_max = block.ungroup(state[0] / block.unit)
                    known = max_logits[block.index]
                    torch.maximum(known, row_max.amax((2, 3)), out=known)
                block_out, block_lse = _normalised(block, *_with_sinks(block, tile, *state))
                out[block.index][:, :, tile.rows] = block.ungroup(block_out)
                lse[block.index][:, :, tile.rows] = block.ungroup(block_lse)[..., 0]
    return (out, lse) if max_logits is None else (out, lse, max_logits)


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
    if hides(query, key, params) and not is_finite(*grads):
        return _backward(*inputs, guarded=True)
    return grads


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
    d_bias = bias_sums(params.bias, query, key) if need_d_bias else None
    d_sinks = None if params.sinks is None else torch.zeros_like(params.sinks)
    with torch.autocast(query.device.type, enabled=False):
        for block in head_blocks(query, key, value, params, guarded, gradients=True):
            dk_blocks, dv_blocks = block.accumulators(dk), block.accumulators(dv)
            for tile in block.query_tiles:
                rows = tile.rows
                row_lse = block.group(lse[block.index][:, :, rows, None])
                row_d_out = block.group(d_out[block.index][:, :, rows]).to(stats)
                row_out = block.group(out[block.index][:, :, rows])
                delta = row_d_out * row_out
                if guarded:
                    # Of rows that see nothing.
                    delta.masked_fill_(row_out == 0, 0)
                delta = delta.sum(-1, keepdim=True)
                if d_lse is not None:
                    delta -= block.group(d_lse[block.index][:, :, rows, None])
                if params.sinks is not None and d_sinks is not None:
                    weight = torch.exp(block.per_row(params.sinks, rows) - row_lse)
                    share = block.ungroup(weight.nan_to_num_(0.0) * delta).sum((2, 3))
                    block_sinks = d_sinks[block.index_of(d_sinks)]
                    block_sinks -= share.sum_to_size(block_sinks.shape)
                block_dq = _differentiate(
                    block, tile, row_lse, row_d_out, delta, dk_blocks, dv_blocks, d_bias
                )
                dq[block.index][:, :, rows] = block.ungroup(block_dq)
            block.store(dk, dk_blocks, params.scale)
            block.store(dv, dv_blocks, 1 / (1 - params.dropout_p))
    if params.bias is not None and d_bias is not None:
        d_bias = d_bias.to(params.bias.dtype)
    return dq, dk, dv, d_bias, d_sinks


def _normalised(
    block: HeadBlock, reference: Tensor, row_sum: Tensor, acc: Tensor
) -> tuple[Tensor, Tensor]:
    """Output and natural-log lse of one tile of queries, [heads, group * rows, Dv or 1]."""
    # The sum is that of all probabilities, also of those that dropout takes.
    kept = row_sum * (1 - block.params.dropout_p) if block.params.dropout_p else row_sum
    out = acc.div_(kept.masked_fill(row_sum == 0, 1))
    return out, reference.div_(block.unit).add_(row_sum.log())


def _softmax(block: HeadBlock, tile: QueryTile) -> tuple[Tensor, Tensor, Tensor]:
    """A reference for each row's scores, the sum of their powers less it, and that times V.

    Rows that see nothing have reference -inf and sum 0. Where the largest scores are wanted, they
    are the references.
    """
    query = block.query(tile.rows)
    lazy = len(tile.key_tiles) > 1 and not (block.params.max_logits or block.invariant)
    if tile.probe is not None and lazy:
        reference, row_sum, acc = _attend_lazily(block, query, tile, tile.probe)
        # Scores far above the reference have lost bits where the product rounded their distance to
        # it. If the reference is NaN, so is the row's sum, and the test fails as well. Each row is
        # judged by itself: what it is computed with in a tile must not matter.
        safe = row_sum < _SAFE_MEAN * sum(keys.width for keys in tile.key_tiles)
        if not safe.all():
            online = _attend_online(block, query, tile)
            found = (reference, row_sum, acc)
            reference, row_sum, acc = map(partial(torch.where, safe), found, online)
    else:
        reference, row_sum, acc = _attend_online(block, query, tile)
    return reference, row_sum, acc


def _with_sinks(
    block: HeadBlock, tile: QueryTile, reference: Tensor, row_sum: Tensor, acc: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What `_softmax` gives, its sinks included."""
    if block.params.sinks is None:
        return reference, row_sum, acc
    sink = block.per_row(block.params.sinks, tile.rows) * block.unit
    row_max = torch.maximum(reference, sink)
    safe_max = row_max.masked_fill(row_max == -math.inf, 0)
    alpha = block.exp(reference - safe_max)
    return row_max, row_sum * alpha + block.exp(sink - safe_max), acc * alpha


def _attend_lazily(
    block: HeadBlock, query: Tensor, tile: QueryTile, probe: KeyTile
) -> tuple[Tensor, Tensor, Tensor]:
    """(reference, sum, sum of p V) with one reference, which may be a poor one for some rows."""
    reference = block.scores(query, tile.rows, probe, None)[0].amax(-1, keepdim=True)
    shift = reference.neg()
    row_sum: Tensor | None = None
    acc: Tensor | None = None
    for keys in tile.key_tiles:
        s = block.scores(query, tile.rows, keys, shift)[0]
        seen = block.seen(s)
        p = block.exp(s)
        part = p.sum(-1, keepdim=True)
        row_sum = part if row_sum is None else row_sum.add_(part)
        acc = block.add_product(acc, _drop(block, p, tile.rows, keys), block.value(keys), seen)
    assert row_sum is not None and acc is not None
    return reference, row_sum, acc


def _attend_online(
    block: HeadBlock, query: Tensor, tile: QueryTile
) -> tuple[Tensor, Tensor, Tensor]:
    """The running maximum of the textbook; rows that see nothing end with reference -inf, sum 0."""
    state: tuple[Tensor, Tensor, Tensor] | None = None
    for keys in tile.key_tiles:
        s = block.scores(query, tile.rows, keys, None, by_key=block.few)[0]
        s = s.contiguous()
        seen = block.seen(s)
        row_max = s.amax(-1, keepdim=True)
        if state is not None:
            row_max = torch.maximum(state[0], row_max)
        safe_max = row_max.masked_fill(row_max == -math.inf, 0)
        p = block.exp(s.sub_(safe_max))
        row_sum, acc = p.sum(-1, keepdim=True), None
        if state is not None:
            reference, sum_before, acc = state
            alpha = block.exp(reference - safe_max)
            row_sum, acc = row_sum.add_(sum_before.mul_(alpha)), acc.mul_(alpha)
        acc = block.add_product(acc, _drop(block, p, tile.rows, keys), block.value(keys), seen)
        state = row_max, row_sum, acc
    if state is None:
        nothing = query.new_full((*query.shape[:2], 1), -math.inf, dtype=block.dtype)
        row_sum = torch.zeros_like(nothing)
        state = nothing, row_sum, row_sum.repeat(1, 1, block.value_blocks[0].shape[2])
    return state


def _drop(block: HeadBlock, p: Tensor, rows: slice, keys: KeyTile) -> Tensor:
    """``p`` without what dropout takes, in its place."""
    if not block.params.dropout_p:
        return p
    return p.masked_fill_(block.dropped(rows, keys.cols, by_key=not p.is_contiguous()), 0)


def reference_of(block: HeadBlock, tile: QueryTile, lse: Tensor) -> tuple[Tensor, Tensor | None]:
    """A reference for each row's scores, and what times the power of their difference is P.

    Args:
        lse: [heads, group * rows, 1], natural.

    Returns:
        Both as ``lse``; None for a factor of 1.
    """
    reference = (lse * block.unit).masked_fill(lse == -math.inf, 0)
    if block.plain:
        # The product rounds scores by their distance from the reference, so it lies midway between
        # a lone probability and that of equal ones. What this and its own rounding took from it
        # multiplies the whole row of P.
        count = sum(keys.width for keys in tile.key_tiles)
        if block.invariant:
            count = INVARIANT_KEYS
        rounded = reference - math.log2(max(count, 1)) / 2
        return rounded, block.exp(rounded - reference)
    coarse = reference.abs() > _FINE
    if coarse.any():
        row_max, row_sum, _ = _with_sinks(block, tile, *_softmax(block, tile))
        row_max = row_max.masked_fill(row_max == -math.inf, 0)
        factor = row_sum.masked_fill(row_sum == 0, 1).reciprocal()
        return torch.where(coarse, row_max, reference), torch.where(coarse, factor, 1)
    return reference, None


def probabilities(
    block: HeadBlock, tile: QueryTile, lse: Tensor, keep_capped: bool = False
) -> Iterator[tuple[KeyTile, Tensor, Tensor | None, Tensor | None]]:
    """(keys, P, where they are seen, softcap's tanh if kept) for each tile of keys.

    P is [heads, group * rows, cols], before dropout, in memory that is used again.

    Args:
        lse: as in `reference_of`.
    """
    query = block.query(tile.rows)
    reference, correction = reference_of(block, tile, lse)
    shift = reference.neg()
    for keys in tile.key_tiles:
        s, capped = block.scores(query, tile.rows, keys, shift, keep_capped=keep_capped)
        seen = block.seen(s)
        p = where(seen, block.exp(s))
        yield keys, p if correction is None else p.mul_(correction), seen, capped


def _differentiate(
    block: HeadBlock,
    tile: QueryTile,
    lse: Tensor,
    d_out: Tensor,
    delta: Tensor,
    dk_blocks: list[Tensor],
    dv_blocks: list[Tensor],
    d_bias: Tensor | None,
) -> Tensor:
    """dQ of one tile of queries, [heads, group * rows, D]; adds its share to dK, dV and d_bias.

    Tiles are laid out key by key: two of the three products that follow read them transposed. With
    a bias they are laid out as it is.
    """
    params, rows, query = block.params, tile.rows, block.query(tile.rows)
    reference, correction = reference_of(block, tile, lse)
    if correction is not None:
        d_out, delta = d_out * correction, delta * correction
    shift, d_shift, rate = reference.neg(), delta.neg(), 1 / (1 - params.dropout_p)
    by_key = params.bias is None
    dq = torch.zeros(query.shape, dtype=block.dtype, device=query.device)
    for keys in tile.key_tiles:
        key, value = block.key(keys), block.value(keys)
        s, capped = block.scores(query, rows, keys, shift, by_key, keep_capped=True)
        seen = block.seen(s)
        p = where(seen, block.exp(s))
        if params.dropout_p:
            dropped = block.dropped(rows, keys.cols, by_key)
            ds = block.product("ds", d_out, value, None, rate, by_key)
            ds = ds.masked_fill_(dropped, 0).sub_(delta).mul_(p)
            p = p.masked_fill_(dropped, 0)
        else:
            ds = block.product("ds", d_out, value, d_shift, 1, by_key)
            ds = ds.mul_(p)
        ds = where(seen, ds)
        seen_by_key = None if seen is None else seen.mT
        block.add_product(dv_blocks[keys.block][:, keys.inside], p.mT, d_out, seen_by_key)
        if d_bias is not None:
            add_to_bias(block, d_bias, rows, keys, ds)
        if capped is not None:
            ds = where(seen, ds.addcmul_(ds, capped.square_(), value=-1))
        block.add_product(dk_blocks[keys.block][:, keys.inside], ds.mT, query, seen_by_key)
        block.add_product(dq, ds, key, seen)
    return dq.mul_(params.scale)


def bias_sums(bias: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """Zeros for the gradient of ``bias``; sums, of one that broadcasts, are rounded once."""
    if bias is None:
        return None
    shared = _broadcasts(bias, query, key)
    dtype = statistics_dtype(query.dtype) if shared else bias.dtype
    return torch.zeros(bias.shape, dtype=dtype, device=bias.device)


def add_to_bias(
    block: HeadBlock, d_bias: Tensor, rows: slice, keys: KeyTile, d_scores: Tensor
) -> None:
    """Add a tile's share to `bias_sums`."""
    part, shares = block.part(d_bias, rows, keys.cols), block.by_head(d_scores)
    if _broadcasts(d_bias, block.call.query, block.call.key):
        part += shares.sum_to_size(part.shape)
    else:
        part.copy_(shares)


def _broadcasts(bias: Tensor, query: Tensor, key: Tensor) -> bool:
    """Whether pairs share a number of the bias."""
    return bias.shape != (*query.shape[:3], key.shape[2])


def where(seen: Tensor | None, x: Tensor) -> Tensor:
    """``x`` where it is seen, 0 elsewhere; as it is if that need not be said."""
    return x if seen is None else x.masked_fill_(~seen, 0)
