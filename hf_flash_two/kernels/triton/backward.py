"""The backward pass as Triton kernels, in separate passes without atomics: bitwise repeatable.

Source: Dao 2023, arXiv:2307.08691, Algorithm 2, split in two: one kernel walks the queries of a
tile of keys for dK and dV (for one at a time where registers would run out), one walks the keys of
a tile of queries for dQ; each recomputes the probabilities from lse. The gradient of the bias is a
third walk, over whatever axes it broadcasts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_flash_two.kernels.params import (
    LOG2E,
    AttentionParams,
    Layout,
    empty_output,
    output_layout,
)
from hf_flash_two.kernels.triton.config import (
    BackwardTiles,
    Tiles,
    backward_tiles,
    bulk_run,
    bulk_strides,
    bulk_tiles,
    dropout_of,
    hides,
    launch_flags,
    strides_of,
)
from hf_flash_two.kernels.triton.launch import Launch, planned
from hf_flash_two.kernels.triton.ranges import key_ranges
from hf_flash_two.kernels.triton.tile import (
    bulk_load,
    holds_nan,
    intervals,
    kept,
    key_tiles,
    nth_tile,
    phases,
    probabilities,
    query_tiles,
    seen_product,
    stages_of,
    unit,
    visible,
)
from hf_flash_two.masks import KEY_GRANULE

_LOG2E = tl.constexpr(LOG2E)
_GRANULE = tl.constexpr(KEY_GRANULE)
# The rows of lse and delta are padded to multiples of this, so that no tile needs a bounds check.
_STAT_ROWS = 128
_STAT_ROWS_ = tl.constexpr(_STAT_ROWS)


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
    """Gradients of query, key, value, bias and sinks."""
    query, key, value, d_out = (
        x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value, d_out)
    )
    lse = lse.contiguous()
    if query.numel() == 0:
        gradients = [empty_output(x, x.shape[3]).zero_() for x in (query, key, value)]
        extras = (params.bias if need_d_bias else None, params.sinks)
        return *gradients, *(x if x is None else torch.zeros_like(x) for x in extras)
    with torch.cuda.device_of(query):
        plan = planned(_plan, params, query, key, value, d_out, out, lse, d_lse)
        dq, dk, dv = (query.new_empty_strided(*layout) for layout in plan.gradients)
        lse_2, delta = (lse.new_empty(plan.stats_shape) for _ in range(2))
        weigh = params.bias is not None and params.sinks is None
        weight = torch.empty_like(delta) if weigh else None
        stats = (lse_2, delta, weight)
        tensors = (query, key, value, d_out, *stats, params.first_query, params.last_query)
        extras = (params.dense, params.bias, params.alibi_slopes, params.seed)
        if delta.numel():
            plan.stats(out, d_out, lse, d_lse, lse_2, delta)
        tiles = plan.tiles.queries
        ranges = key_ranges(params, tiles, query.shape[2], key.shape[2])
        if dq.numel():
            plan.queries(
                *tensors, ranges, *extras,
                bulk_tiles(key, plan.bulk_key, tiles.block_k, tiles.block_d),
                bulk_tiles(value, plan.bulk_value, tiles.block_k, tiles.block_v),
                bulk_run(params.first_query, plan.bulk_key, tiles.block_k),
                bulk_run(params.last_query, plan.bulk_key, tiles.block_k),
                dq,
            )  # fmt: skip
        if dk.numel():
            walks = [(plan.keys, plan.tiles.keys, dk, dv if plan.values is None else None)]
            if plan.values is not None:
                walks.append((plan.values, plan.tiles.values, None, dv))
            for launch, tiles, *gradients in walks:
                launch(
                    *tensors, params.key_bounds, *extras,
                    bulk_tiles(query, plan.bulk_query, tiles.block_q, tiles.block_d),
                    bulk_tiles(d_out, plan.bulk_d_out, tiles.block_q, tiles.block_v),
                    *(bulk_run(x, plan.bulk_query, tiles.block_q) for x in (lse_2, delta)),
                    *gradients,
                )  # fmt: skip
        d_bias = d_sinks = None
        if need_d_bias:
            d_bias = torch.empty_like(params.bias, memory_format=torch.contiguous_format)
            if d_bias.numel():
                plan.bias(*tensors, ranges, *extras, d_bias)
    if params.sinks is not None:
        weight = torch.exp(params.sinks[:, :, None] - lse).nan_to_num_(nan=0.0)
        d_sinks = -(weight * delta[:, :, : lse.shape[2]]).sum(2).sum_to_size(params.sinks.shape)
    return dq, dk, dv, d_bias, d_sinks


@dataclass(frozen=True, slots=True)
class _Plan:
    tiles: BackwardTiles
    gradients: tuple[Layout, Layout, Layout]
    stats_shape: tuple[int, int, int]
    bulk_query: list[int] | None
    bulk_key: list[int] | None
    bulk_value: list[int] | None
    bulk_d_out: list[int] | None
    stats: Launch
    keys: Launch
    values: Launch | None
    queries: Launch
    bias: Launch | None


def _plan(
    params: AttentionParams,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    d_out: Tensor,
    out: Tensor,
    lse: Tensor,
    d_lse: Tensor | None,
) -> _Plan:
    batch, heads, query_length, head_dim = query.shape
    key_heads, key_length, value_dim = key.shape[1], key.shape[2], value.shape[3]
    tiles = backward_tiles(query, key, value, params)
    flags = launch_flags(query, params)
    flags.pop("SINKS")
    *strides, _, _ = strides_of(params, batch, heads, query_length, key_length)
    gradients = tuple(output_layout(x, x.shape[3]) for x in (query, key, value))
    (_, dq_strides), (_, dk_strides), (_, dv_strides) = gradients
    scalars = (
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *d_out.stride()[:3],
        *strides, heads, heads // key_heads, query_length, key_length,
        params.query_offset, params.window_left or 0, params.window_right or 0,
        params.scale, params.softcap or 1.0, *dropout_of(params),
    )  # fmt: skip

    def launch(kernel, grid: tuple[int, ...], block: Tiles, *own_scalars: int, **own) -> Launch:
        blocks = {
            "BLOCK_Q": block.block_q, "BLOCK_K": block.block_k,
            "BLOCK_D": block.block_d, "BLOCK_V": block.block_v, "STAGES": block.stages,
        }  # fmt: skip
        constants = flags | {"D": head_dim, "DV": value_dim} | blocks | own
        return Launch(kernel, grid, (*scalars, *own_scalars), constants, block)

    rescue = hides(query, key, params)
    stat_tiles = triton.cdiv(query_length, _STAT_ROWS)
    stats = Launch(
        _stats_kernel,
        (stat_tiles * batch * heads,),
        (
            *out.stride()[:3], *d_out.stride()[:3],
            *((0, 0, 0) if d_lse is None else d_lse.stride()), heads, query_length,
        ),
        {
            "PLAIN": flags["PLAIN"], "DV": value_dim,
            "BLOCK_V": triton.next_power_of_2(value_dim), "ROWS": _STAT_ROWS,
        },
        tiles.queries,
    )  # fmt: skip
    parts = max(
        triton.cdiv(head_dim, tiles.keys.block_d), triton.cdiv(value_dim, tiles.keys.block_v)
    )
    keys, values = (
        block and launch(
            _keys_kernel, (triton.cdiv(key_length, block.block_k) * batch * key_heads, parts),
            block, *dk_strides[:3], *dv_strides[:3], RESCUE=rescue,
        )
        for block in (tiles.keys, tiles.values)
    )  # fmt: skip
    block = tiles.queries
    parts = triton.cdiv(head_dim, block.block_d)
    queries = launch(
        _queries_kernel, (triton.cdiv(query_length, block.block_q) * batch * heads, parts), block,
        *dq_strides[:3], RESCUE=rescue,
    )  # fmt: skip
    bias = None
    if params.bias is not None:
        bias_batch, bias_heads, bias_queries, bias_keys = params.bias.shape
        programs = (
            triton.cdiv(bias_keys, block.block_k)
            * triton.cdiv(bias_queries, block.block_q)
            * bias_batch
            * bias_heads
        )
        bias = launch(_bias_kernel, (programs,), block, batch, *params.bias.shape)
    # A row is read in parts where it is wider than a tile.
    whole_rows = head_dim <= block.block_d and value_dim <= block.block_v
    return _Plan(
        tiles, gradients, (batch, heads, stat_tiles * _STAT_ROWS),
        *(bulk_strides(x, params) if whole_rows else None for x in (query, key, value, d_out)),
        stats, keys, values, queries, bias,
    )  # fmt: skip


@triton.jit
def _stats_at(batch, heads, head, length):
    """Where the lse and delta of a head begin."""
    return (batch * heads + head) * (tl.cdiv(length, _STAT_ROWS_) * _STAT_ROWS_)


@triton.jit(do_not_specialize=["length"])
def _stats_kernel(
    out_ptr, d_out_ptr, lse_ptr, d_lse_ptr, lse_2_ptr, delta_ptr,
    o_sb, o_sh, o_st, g_sb, g_sh, g_st, l_sb, l_sh, l_st, heads, length,
    PLAIN: tl.constexpr, DV: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What the backward needs of each row: lse, times `unit`, and delta; 0 for empty rows."""
    tiles = tl.cdiv(length, ROWS)
    program = tl.program_id(0)
    head = (program // tiles % heads).to(tl.int64)
    batch = (program // tiles // heads).to(tl.int64)
    row = (program % tiles * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    dv = tl.arange(0, BLOCK_V)
    inside = (row < length)[:, None] & (dv < DV)[None, :]
    out_at = out_ptr + batch * o_sb + head * o_sh + row[:, None] * o_st + dv[None, :]
    d_out_at = d_out_ptr + batch * g_sb + head * g_sh + row[:, None] * g_st + dv[None, :]
    out = tl.load(out_at, inside, 0.0).to(tl.float32)
    d_out = tl.load(d_out_at, inside, 0.0).to(tl.float32)
    # A row that sees sinks only is all 0, and what arrives for it, NaN perhaps, is of no account.
    delta = tl.where(tl.sum(tl.abs(out), 1) == 0, 0.0, tl.sum(out * d_out, 1))
    if d_lse_ptr is not None:
        d_lse_at = d_lse_ptr + batch * l_sb + head * l_sh + row * l_st
        delta -= tl.load(d_lse_at, row < length, 0.0)
    lse = tl.load(lse_ptr + (batch * heads + head) * length + row, row < length, 0.0)
    at = _stats_at(batch, heads, head, length) + row
    empty = lse == float("-inf")
    tl.store(lse_2_ptr + at, tl.where(empty, 0.0, lse * (_LOG2E / unit(PLAIN))))
    tl.store(delta_ptr + at, tl.where(empty, 0.0, delta))


@triton.jit
def _wide_product(
    a_at, b_at, a_inside, b_inside, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A B^T where a whole row of A or B does not fit: [ROWS, D] and [COLS, D] read in parts."""
    product = tl.zeros([ROWS, COLS], tl.float32)
    for part in range((D + BLOCK_D - 1) // BLOCK_D):
        d = part * BLOCK_D + tl.arange(0, BLOCK_D)
        a = tl.load(a_at[:, None] + d[None, :], a_inside[:, None] & (d < D)[None, :], 0.0)
        b = tl.load(b_at[:, None] + d[None, :], b_inside[:, None] & (d < D)[None, :], 0.0)
        product = tl.dot(a, tl.trans(b), product, input_precision=PRECISION)
    return product


_PER_LENGTH = [
    "query_length", "key_length", "offset", "left", "right", "mask_sb", "threshold",
]  # fmt: skip


@triton.jit(do_not_specialize=_PER_LENGTH)
def _keys_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, lse_ptr, delta_ptr, weight_ptr,
    first_ptr, last_ptr, bounds_ptr, dense_ptr, bias_ptr, slopes_ptr, seed_ptr,
    q_tiles, g_tiles, lse_tiles, delta_tiles, dk_ptr, dv_ptr,
    q_sb, q_sh, q_st, k_sb, k_sh, k_st, v_sb, v_sh, v_st, g_sb, g_sh, g_st,
    mask_sb, dense_sb, dense_sh, dense_sq, dense_sk, bias_sb, bias_sh, bias_sq, bias_sk,
    slopes_sb, slopes_sh,
    heads, group, query_length, key_length, offset, left, right,
    scale, softcap, threshold, keep_scale,
    dk_sb, dk_sh, dk_st, dv_sb, dv_sh, dv_st,
    D: tl.constexpr, DV: tl.constexpr,
    MASK: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, DENSE: tl.constexpr,
    BIAS: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    PLAIN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr, RESCUE: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys, summed over the query heads of the group; or one of them."""
    WIDE: tl.constexpr = (D > BLOCK_D) or (DV > BLOCK_V)
    program = tl.program_id(0)
    key_tiles_all = tl.cdiv(key_length, BLOCK_K)
    tile = program % key_tiles_all
    key_heads = heads // group
    batch = (program // key_tiles_all // key_heads).to(tl.int64)
    key_head = (program // key_tiles_all % key_heads).to(tl.int64)
    col = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    col_inside = col < key_length
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    e = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    k_at = k_ptr + batch * k_sb + key_head * k_sh + col.to(tl.int64) * k_st
    v_at = v_ptr + batch * v_sb + key_head * v_sh + col.to(tl.int64) * v_st
    if not WIDE:
        k = tl.load(k_at[:, None] + d[None, :], col_inside[:, None] & (d < D)[None, :], 0.0)
        if dk_ptr is not None:
            v = tl.load(v_at[:, None] + e[None, :], col_inside[:, None] & (e < DV)[None, :], 0.0)
    # Intervals of one row may serve all.
    if MASK == 2 and mask_sb != 0:
        bounds_ptr += batch * tl.cdiv(key_length, _GRANULE) * 4
    first_query, last_query = intervals(
        first_ptr, last_ptr, None, None,
        batch * mask_sb, tile * BLOCK_K, key_length, MASK, BLOCK_K,
    )  # fmt: skip
    first, last, full, full_end = query_tiles(
        bounds_ptr, tile * BLOCK_K, key_length, query_length, offset, left, right,
        MASK, LEFT, RIGHT, DENSE, BLOCK_Q, BLOCK_K,
    )  # fmt: skip
    whole = full_end - full
    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    for attempt in tl.static_range(phases(RESCUE) - 1):
        members = group
        if attempt == 1:
            again = holds_nan(dk, col_inside) | holds_nan(dv, col_inside)
            members = tl.where(again, group, 0)
            dk = tl.where(again, 0.0, dk)
            dv = tl.where(again, 0.0, dv)
        for member in range(members):
            head = key_head * group + member
            q_head = q_ptr + batch * q_sb + head * q_sh
            g_head = g_ptr + batch * g_sb + head * g_sh
            stats = _stats_at(batch, heads, head, query_length)
            dense_head = dense_ptr
            bias_head = bias_ptr
            if DENSE:
                dense_head += batch * dense_sb + head * dense_sh
            if BIAS:
                bias_head += batch * bias_sb + head * bias_sh
            slope = 0.0
            if ALIBI:
                slope = tl.load(slopes_ptr + batch * slopes_sb + head * slopes_sh)
            for phase in tl.static_range(2 * attempt, 2 + attempt):
                if phase == 0:
                    from_tile, to_tile = 0, whole
                elif phase == 1:
                    from_tile, to_tile = whole, last - first
                else:
                    from_tile, to_tile = 0, last - first
                for n in tl.range(from_tile, to_tile, num_stages=stages_of(STAGES, phase, MASK)):
                    if phase == 0:
                        query_tile = full + n
                    else:
                        query_tile = nth_tile(n, first, full, full_end)
                    row = query_tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
                    row_inside = row < query_length
                    q_at = q_head + row.to(tl.int64) * q_st
                    g_at = g_head + row.to(tl.int64) * g_st
                    if q_tiles is not None:
                        q = bulk_load(
                            q_tiles, batch, head, query_tile * BLOCK_Q, 0, BLOCK_Q, BLOCK_D
                        )
                    elif phase == 0 and D == BLOCK_D:
                        q = tl.load(q_at[:, None] + d[None, :])
                    else:
                        q = tl.load(
                            q_at[:, None] + d[None, :], row_inside[:, None] & (d < D)[None, :], 0.0
                        )
                    if g_tiles is not None:
                        g = bulk_load(
                            g_tiles, batch, head, query_tile * BLOCK_Q, 0, BLOCK_Q, BLOCK_V
                        )
                    elif phase == 0 and DV == BLOCK_V:
                        g = tl.load(g_at[:, None] + e[None, :])
                    else:
                        g = tl.load(
                            g_at[:, None] + e[None, :], row_inside[:, None] & (e < DV)[None, :], 0.0
                        )
                    stats_at = stats + query_tile * BLOCK_Q
                    if lse_tiles is not None:
                        lse = lse_tiles.load([stats_at.to(tl.int32)])
                    else:
                        lse = tl.load(lse_ptr + stats_at + tl.arange(0, BLOCK_Q))
                    if WIDE:
                        s = _wide_product(
                            k_at, q_at, col_inside, row_inside,
                            D, BLOCK_D, BLOCK_K, BLOCK_Q, PRECISION,
                        )  # fmt: skip
                    else:
                        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
                    if dk_ptr is not None:
                        if delta_tiles is not None:
                            delta = delta_tiles.load([stats_at.to(tl.int32)])
                        else:
                            delta = tl.load(delta_ptr + stats_at + tl.arange(0, BLOCK_Q))
                        if WIDE:
                            dp = _wide_product(
                                v_at, g_at, col_inside, row_inside,
                                DV, BLOCK_V, BLOCK_K, BLOCK_Q, PRECISION,
                            )  # fmt: skip
                        else:
                            dp = tl.dot(v, tl.trans(g), input_precision=PRECISION)
                    seen = col_inside[:, None] & row_inside[None, :]
                    position = row + offset
                    if phase != 0:
                        seen = seen & visible(
                            row[None, :], position[None, :], col[:, None],
                            query_length, key_length, first_query[:, None], last_query[:, None],
                            dense_head, dense_sq, dense_sk, left, right, MASK, LEFT, RIGHT, DENSE,
                        )  # fmt: skip
                    weight = 1.0
                    if weight_ptr is not None:
                        weight = tl.load(weight_ptr + stats_at + tl.arange(0, BLOCK_Q))[None, :]
                    p, slack = probabilities(
                        s, lse[None, :], weight, row[None, :], position[None, :], col[:, None],
                        seen, slope, bias_head, bias_sq, bias_sk, scale, softcap,
                        phase != 0, PLAIN, SOFTCAP, BIAS, ALIBI,
                    )  # fmt: skip
                    if DROPOUT:
                        keep = kept(seed_ptr, batch, head, row[None, :], col[:, None], threshold)
                    if dv_ptr is not None:
                        dropped = p
                        if DROPOUT:
                            dropped = tl.where(keep, p * keep_scale, 0.0)
                        if phase == 2:
                            g_rows = g_head + query_tile.to(tl.int64) * BLOCK_Q * g_st + e
                            dv = seen_product(dropped, g, dv, seen, g_rows, g_st, e < DV, PRECISION)
                        else:
                            dv = tl.dot(dropped.to(g.dtype), g, dv, input_precision=PRECISION)
                    if dk_ptr is not None:
                        if DROPOUT:
                            dp = tl.where(keep, dp * keep_scale, 0.0)
                        ds = p * (dp - delta[None, :])
                        if SOFTCAP:
                            ds = ds * slack
                        if phase == 2:
                            ds = tl.where(seen, ds, 0.0)
                            q_rows = q_head + query_tile.to(tl.int64) * BLOCK_Q * q_st + d
                            dk = seen_product(ds, q, dk, seen, q_rows, q_st, d < D, PRECISION)
                        else:
                            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    if dk_ptr is not None:
        dk_at = dk_ptr + batch * dk_sb + key_head * dk_sh + col.to(tl.int64) * dk_st
        tl.store(
            dk_at[:, None] + d[None, :],
            (dk * scale).to(dk_ptr.dtype.element_ty),
            col_inside[:, None] & (d < D)[None, :],
        )
    if dv_ptr is not None:
        dv_at = dv_ptr + batch * dv_sb + key_head * dv_sh + col.to(tl.int64) * dv_st
        tl.store(
            dv_at[:, None] + e[None, :],
            dv.to(dv_ptr.dtype.element_ty),
            col_inside[:, None] & (e < DV)[None, :],
        )


@triton.jit(do_not_specialize=_PER_LENGTH)
def _queries_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, lse_ptr, delta_ptr, weight_ptr,
    first_ptr, last_ptr, ranges_ptr, dense_ptr, bias_ptr, slopes_ptr, seed_ptr,
    k_tiles, v_tiles, first_tiles, last_tiles, dq_ptr,
    q_sb, q_sh, q_st, k_sb, k_sh, k_st, v_sb, v_sh, v_st, g_sb, g_sh, g_st,
    mask_sb, dense_sb, dense_sh, dense_sq, dense_sk, bias_sb, bias_sh, bias_sq, bias_sk,
    slopes_sb, slopes_sh,
    heads, group, query_length, key_length, offset, left, right,
    scale, softcap, threshold, keep_scale,
    dq_sb, dq_sh, dq_st,
    D: tl.constexpr, DV: tl.constexpr,
    MASK: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, DENSE: tl.constexpr,
    BIAS: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    PLAIN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr, RESCUE: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries."""
    WIDE: tl.constexpr = (D > BLOCK_D) or (DV > BLOCK_V)
    program = tl.program_id(0)
    query_tiles_all = tl.cdiv(query_length, BLOCK_Q)
    tile = query_tiles_all - 1 - program % query_tiles_all
    batch = (program // query_tiles_all // heads).to(tl.int64)
    head = (program // query_tiles_all % heads).to(tl.int64)
    key_head = head // group
    row = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    row_inside = row < query_length
    position = row + offset
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_V)
    q_at = q_ptr + batch * q_sb + head * q_sh + row.to(tl.int64) * q_st
    g_at = g_ptr + batch * g_sb + head * g_sh + row.to(tl.int64) * g_st
    k_head = k_ptr + batch * k_sb + key_head * k_sh
    v_head = v_ptr + batch * v_sb + key_head * v_sh
    if not WIDE:
        q = tl.load(q_at[:, None] + d[None, :], row_inside[:, None] & (d < D)[None, :], 0.0)
        g = tl.load(g_at[:, None] + e[None, :], row_inside[:, None] & (e < DV)[None, :], 0.0)
    stats = _stats_at(batch, heads, head, query_length) + row
    lse = tl.load(lse_ptr + stats)
    delta = tl.load(delta_ptr + stats)
    if MASK == 2 and mask_sb != 0:
        ranges_ptr += batch * query_tiles_all * 4
    if DENSE:
        dense_ptr += batch * dense_sb + head * dense_sh
    if BIAS:
        bias_ptr += batch * bias_sb + head * bias_sh
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes_ptr + batch * slopes_sb + head * slopes_sh)
    start = tile * BLOCK_Q + offset
    stop = tl.minimum(tile * BLOCK_Q + BLOCK_Q, query_length) + offset
    first, last, full, full_end = key_tiles(
        ranges_ptr, tile, start, stop, key_length, left, right, MASK, LEFT, RIGHT, DENSE, BLOCK_K
    )
    whole = full_end - full
    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    total_p = tl.zeros([BLOCK_Q], tl.float32)
    for phase in tl.static_range(phases(RESCUE)):
        if phase == 0:
            from_tile, to_tile = 0, whole
        elif phase == 1:
            from_tile, to_tile = whole, last - first
        else:
            again = holds_nan(dq, row_inside)
            from_tile, to_tile = 0, tl.where(again, last - first, 0)
            dq = tl.where(again, 0.0, dq)
            total_p = tl.where(again, 0.0, total_p)
        for n in tl.range(from_tile, to_tile, num_stages=stages_of(STAGES, phase, MASK)):
            if phase == 0:
                key_tile = full + n
            else:
                key_tile = nth_tile(n, first, full, full_end)
            col = key_tile * BLOCK_K + tl.arange(0, BLOCK_K)
            col_inside = col < key_length
            k_at = k_head + col.to(tl.int64) * k_st
            v_at = v_head + col.to(tl.int64) * v_st
            if k_tiles is not None:
                k = bulk_load(k_tiles, batch, key_head, key_tile * BLOCK_K, 0, BLOCK_K, BLOCK_D)
            elif phase == 0 and D == BLOCK_D:
                k = tl.load(k_at[:, None] + d[None, :])
            else:
                k = tl.load(k_at[:, None] + d[None, :], col_inside[:, None] & (d < D)[None, :], 0.0)
            if WIDE:
                s = _wide_product(
                    q_at, k_at, row_inside, col_inside, D, BLOCK_D, BLOCK_Q, BLOCK_K, PRECISION
                )
                dp = _wide_product(
                    g_at, v_at, row_inside, col_inside, DV, BLOCK_V, BLOCK_Q, BLOCK_K, PRECISION
                )
            else:
                if v_tiles is not None:
                    v = bulk_load(v_tiles, batch, key_head, key_tile * BLOCK_K, 0, BLOCK_K, BLOCK_V)
                elif phase == 0 and DV == BLOCK_V:
                    v = tl.load(v_at[:, None] + e[None, :])
                else:
                    v = tl.load(
                        v_at[:, None] + e[None, :], col_inside[:, None] & (e < DV)[None, :], 0.0
                    )
                s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)
            seen = row_inside[:, None] & col_inside[None, :]
            if phase != 0:
                first_query, last_query = intervals(
                    first_ptr, last_ptr, first_tiles, last_tiles,
                    batch * mask_sb, key_tile * BLOCK_K, key_length, MASK, BLOCK_K,
                )  # fmt: skip
                seen = seen & visible(
                    row[:, None], position[:, None], col[None, :], query_length, key_length,
                    first_query[None, :], last_query[None, :], dense_ptr, dense_sq, dense_sk,
                    left, right, MASK, LEFT, RIGHT, DENSE,
                )  # fmt: skip
            p, slack = probabilities(
                s, lse[:, None], 1.0, row[:, None], position[:, None], col[None, :], seen, slope,
                bias_ptr, bias_sq, bias_sk, scale, softcap,
                phase != 0, PLAIN, SOFTCAP, BIAS, ALIBI,
            )  # fmt: skip
            if weight_ptr is not None:
                total_p += tl.sum(p, 1)
            if DROPOUT:
                keep = kept(seed_ptr, batch, head, row[:, None], col[None, :], threshold)
                dp = tl.where(keep, dp * keep_scale, 0.0)
            ds = p * (dp - delta[:, None])
            if SOFTCAP:
                ds = ds * slack
            if phase == 2:
                ds = tl.where(seen, ds, 0.0)
                k_rows = k_head + key_tile.to(tl.int64) * BLOCK_K * k_st + d
                dq = seen_product(ds, k, dq, seen, k_rows, k_st, d < D, PRECISION)
            else:
                dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    if weight_ptr is not None:
        weight = 1 / tl.where(total_p == 0, 1.0, total_p)
        dq *= weight[:, None]
        if tl.program_id(1) == 0:
            tl.store(weight_ptr + stats, weight)
    dq_at = dq_ptr + batch * dq_sb + head * dq_sh + row.to(tl.int64) * dq_st
    tl.store(
        dq_at[:, None] + d[None, :],
        (dq * scale).to(dq_ptr.dtype.element_ty),
        row_inside[:, None] & (d < D)[None, :],
    )


@triton.jit(do_not_specialize=_PER_LENGTH)
def _bias_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, lse_ptr, delta_ptr, weight_ptr,
    first_ptr, last_ptr, ranges_ptr, dense_ptr, bias_ptr, slopes_ptr, seed_ptr,
    d_bias_ptr,
    q_sb, q_sh, q_st, k_sb, k_sh, k_st, v_sb, v_sh, v_st, g_sb, g_sh, g_st,
    mask_sb, dense_sb, dense_sh, dense_sq, dense_sk, bias_sb, bias_sh, bias_sq, bias_sk,
    slopes_sb, slopes_sh,
    heads, group, query_length, key_length, offset, left, right,
    scale, softcap, threshold, keep_scale,
    batch_size, bias_batch, bias_heads, bias_queries, bias_keys,
    D: tl.constexpr, DV: tl.constexpr,
    MASK: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, DENSE: tl.constexpr,
    BIAS: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    PLAIN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile of the bias, summed over every axis where the bias has size 1."""
    col_tiles = tl.cdiv(bias_keys, BLOCK_K)
    row_tiles = tl.cdiv(bias_queries, BLOCK_Q)
    program = tl.program_id(0)
    at_col = program % col_tiles
    at_row = program // col_tiles % row_tiles
    bias_row = program // col_tiles // row_tiles
    at_batch = bias_row // bias_heads
    at_head = bias_row % bias_heads
    batch_end, head_end, row_end, col_end = at_batch + 1, at_head + 1, at_row + 1, at_col + 1
    if bias_batch == 1:
        batch_end = batch_size
    if bias_heads == 1:
        head_end = heads
    if bias_queries == 1:
        row_end = tl.cdiv(query_length, BLOCK_Q)
    if bias_keys == 1:
        col_end = tl.cdiv(key_length, BLOCK_K)
    total = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for b in range(at_batch, batch_end):
        batch = tl.full([], b, tl.int64)
        for h in range(at_head, head_end):
            head = tl.full([], h, tl.int64)
            q_head = q_ptr + batch * q_sb + head * q_sh
            k_head = k_ptr + batch * k_sb + (head // group) * k_sh
            v_head = v_ptr + batch * v_sb + (head // group) * v_sh
            g_head = g_ptr + batch * g_sb + head * g_sh
            ranges_at = ranges_ptr
            dense_at = dense_ptr
            if MASK == 2 and mask_sb != 0:
                ranges_at += batch * tl.cdiv(query_length, BLOCK_Q) * 4
            if DENSE:
                dense_at += batch * dense_sb + head * dense_sh
            slope = 0.0
            if ALIBI:
                slope = tl.load(slopes_ptr + batch * slopes_sb + head * slopes_sh)
            for row_tile in range(at_row, row_end):
                row = row_tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
                row_inside = row < query_length
                position = row + offset
                stats = _stats_at(batch, heads, head, query_length) + row
                lse = tl.load(lse_ptr + stats)
                delta = tl.load(delta_ptr + stats)
                weight = 1.0
                if weight_ptr is not None:
                    weight = tl.load(weight_ptr + stats)[:, None]
                start = row_tile * BLOCK_Q + offset
                stop = tl.minimum(row_tile * BLOCK_Q + BLOCK_Q, query_length) + offset
                first, last, full, full_end = key_tiles(
                    ranges_at, row_tile, start, stop, key_length, left, right,
                    MASK, LEFT, RIGHT, DENSE, BLOCK_K,
                )  # fmt: skip
                from_tile = tl.maximum(first, at_col)
                to_tile = tl.minimum(last, col_end)
                for key_tile in range(from_tile, to_tile):
                    col = key_tile * BLOCK_K + tl.arange(0, BLOCK_K)
                    col_inside = col < key_length
                    s = _wide_product(
                        q_head + row.to(tl.int64) * q_st, k_head + col.to(tl.int64) * k_st,
                        row_inside, col_inside, D, BLOCK_D, BLOCK_Q, BLOCK_K, PRECISION,
                    )  # fmt: skip
                    dp = _wide_product(
                        g_head + row.to(tl.int64) * g_st, v_head + col.to(tl.int64) * v_st,
                        row_inside, col_inside, DV, BLOCK_V, BLOCK_Q, BLOCK_K, PRECISION,
                    )  # fmt: skip
                    first_query, last_query = intervals(
                        first_ptr, last_ptr, None, None,
                        batch * mask_sb, key_tile * BLOCK_K, key_length, MASK, BLOCK_K,
                    )  # fmt: skip
                    seen = (row_inside[:, None] & col_inside[None, :]) & visible(
                        row[:, None], position[:, None], col[None, :], query_length, key_length,
                        first_query[None, :], last_query[None, :], dense_at, dense_sq, dense_sk,
                        left, right, MASK, LEFT, RIGHT, DENSE,
                    )  # fmt: skip
                    p, slack = probabilities(
                        s, lse[:, None], weight, row[:, None], position[:, None], col[None, :],
                        seen, slope, bias_ptr + batch * bias_sb + head * bias_sh, bias_sq, bias_sk,
                        scale, softcap, True, PLAIN, SOFTCAP, BIAS, ALIBI,
                    )  # fmt: skip
                    if DROPOUT:
                        keep = kept(seed_ptr, batch, head, row[:, None], col[None, :], threshold)
                        dp = tl.where(keep, dp * keep_scale, 0.0)
                    total += tl.where(seen, p * (dp - delta[:, None]), 0.0)
    out_row = at_row * BLOCK_Q + tl.arange(0, BLOCK_Q)
    out_col = at_col * BLOCK_K + tl.arange(0, BLOCK_K)
    if bias_queries == 1:
        total = tl.where((out_row == 0)[:, None], tl.sum(total, 0)[None, :], 0.0)
    if bias_keys == 1:
        total = tl.where((out_col == 0)[None, :], tl.sum(total, 1)[:, None], 0.0)
    at = bias_row.to(tl.int64) * bias_queries + out_row.to(tl.int64)
    tl.store(
        d_bias_ptr + at[:, None] * bias_keys + out_col[None, :],
        total.to(d_bias_ptr.dtype.element_ty),
        (out_row < bias_queries)[:, None] & (out_col < bias_keys)[None, :],
    )
