"""The backward pass as Triton kernels, in separate passes without atomics: bitwise repeatable.

Source: Dao 2023, arXiv:2307.08691, Algorithm 2, split in two: the dK/dV pass goes through the
queries of a tile of keys (once for each of the two where registers would run out), the dQ pass
through the keys of a tile of queries; each recomputes the probabilities from lse. The dbias pass
sums the gradient of the bias over whatever axes it broadcasts.
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
    dropout_of,
    hides,
    launch_flags,
    strides_of,
    tma_run,
    tma_strides,
    tma_tiles,
)
from hf_flash_two.kernels.triton.launch import Launch, planned
from hf_flash_two.kernels.triton.ranges import key_ranges
from hf_flash_two.kernels.triton.tile import (
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
    tma_load,
    unit,
    visible,
)
from hf_flash_two.masks import KEY_GRANULE

_LOG2E = tl.constexpr(LOG2E)
_KEY_GROUP = tl.constexpr(KEY_GRANULE)
# The rows of lse and delta are padded to multiples of this, so that no tile needs a bounds check.
_ROW_MULTIPLE = 128
_ROW_MULTIPLE_ = tl.constexpr(_ROW_MULTIPLE)


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
        lse_2, delta = (lse.new_empty(plan.rows_shape) for _ in range(2))
        weigh = params.bias is not None and params.sinks is None
        weight = torch.empty_like(delta) if weigh else None
        stats = (lse_2, delta, weight)
        tensors = (query, key, value, d_out, *stats, params.first_query, params.last_query)
        extras = (params.dense, params.bias, params.alibi_slopes, params.seed)
        if delta.numel():
            plan.preprocess(out, d_out, lse, d_lse, lse_2, delta)
        tiles = plan.tiles.dq
        ranges = key_ranges(params, tiles, query.shape[2], key.shape[2])
        if dq.numel():
            plan.dq(
                *tensors, ranges, *extras,
                tma_tiles(key, plan.tma_key, tiles.block_k, tiles.block_d),
                tma_tiles(value, plan.tma_value, tiles.block_k, tiles.block_v),
                tma_run(params.first_query, plan.tma_key, tiles.block_k),
                tma_run(params.last_query, plan.tma_key, tiles.block_k),
                dq,
            )  # fmt: skip
        if dk.numel():
            passes = [(plan.dkdv, plan.tiles.dkdv, dk, dv if plan.dv is None else None)]
            if plan.dv is not None:
                passes.append((plan.dv, plan.tiles.dv, None, dv))
            for launch, tiles, *gradients in passes:
                launch(
                    *tensors, params.key_bounds, *extras,
                    tma_tiles(query, plan.tma_query, tiles.block_q, tiles.block_d),
                    tma_tiles(d_out, plan.tma_d_out, tiles.block_q, tiles.block_v),
                    *(tma_run(x, plan.tma_query, tiles.block_q) for x in (lse_2, delta)),
                    *gradients,
                )  # fmt: skip
        d_bias = d_sinks = None
        if need_d_bias:
            d_bias = torch.empty_like(params.bias, memory_format=torch.contiguous_format)
            if d_bias.numel():
                plan.dbias(*tensors, ranges, *extras, d_bias)
    if params.sinks is not None:
        weight = torch.exp(params.sinks[:, :, None] - lse).nan_to_num_(nan=0.0)
        d_sinks = -(weight * delta[:, :, : lse.shape[2]]).sum(2).sum_to_size(params.sinks.shape)
    return dq, dk, dv, d_bias, d_sinks


@dataclass(frozen=True, slots=True)
class _Plan:
    tiles: BackwardTiles
    gradients: tuple[Layout, Layout, Layout]
    rows_shape: tuple[int, int, int]
    tma_query: list[int] | None
    tma_key: list[int] | None
    tma_value: list[int] | None
    tma_d_out: list[int] | None
    preprocess: Launch
    dkdv: Launch
    dv: Launch | None
    dq: Launch
    dbias: Launch | None


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
    row_tiles = triton.cdiv(query_length, _ROW_MULTIPLE)
    preprocess = Launch(
        _preprocess_kernel,
        (row_tiles * batch * heads,),
        (
            *out.stride()[:3], *d_out.stride()[:3],
            *((0, 0, 0) if d_lse is None else d_lse.stride()), heads, query_length,
        ),
        {
            "PLAIN": flags["PLAIN"], "DV": value_dim,
            "BLOCK_V": triton.next_power_of_2(value_dim), "ROWS": _ROW_MULTIPLE,
        },
        tiles.dq,
    )  # fmt: skip
    parts = max(
        triton.cdiv(head_dim, tiles.dkdv.block_d), triton.cdiv(value_dim, tiles.dkdv.block_v)
    )
    dkdv, dv = (
        block and launch(
            _dkdv_kernel, (triton.cdiv(key_length, block.block_k) * batch * key_heads, parts),
            block, *dk_strides[:3], *dv_strides[:3], RESCUE=rescue,
        )
        for block in (tiles.dkdv, tiles.dv)
    )  # fmt: skip
    block = tiles.dq
    parts = triton.cdiv(head_dim, block.block_d)
    dq = launch(
        _dq_kernel, (triton.cdiv(query_length, block.block_q) * batch * heads, parts), block,
        *dq_strides[:3], RESCUE=rescue,
    )  # fmt: skip
    dbias = None
    if params.bias is not None:
        bias_batch, bias_heads, bias_queries, bias_keys = params.bias.shape
        programs = (
            triton.cdiv(bias_keys, block.block_k)
            * triton.cdiv(bias_queries, block.block_q)
            * bias_batch
            * bias_heads
        )
        dbias = launch(_dbias_kernel, (programs,), block, batch, *params.bias.shape)
    # A row is read in parts where it is wider than a tile.
    whole_rows = head_dim <= block.block_d and value_dim <= block.block_v
    return _Plan(
        tiles, gradients, (batch, heads, row_tiles * _ROW_MULTIPLE),
        *(tma_strides(x, params) if whole_rows else None for x in (query, key, value, d_out)),
        preprocess, dkdv, dv, dq, dbias,
    )  # fmt: skip


@triton.jit
def _first_row(batch, heads, head, length):
    """Where the lse and delta of a head split_start."""
    return (batch * heads + head) * (tl.cdiv(length, _ROW_MULTIPLE_) * _ROW_MULTIPLE_)


@triton.jit(do_not_specialize=["length"])
def _preprocess_kernel(
    out_ptr, do_ptr, lse_ptr, d_lse_ptr, lse_2_ptr, delta_ptr,
    o_sb, o_sh, o_st, do_sb, do_sh, do_st, l_sb, l_sh, l_st, heads, length,
    PLAIN: tl.constexpr, DV: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What the backward needs of each row: lse, times `unit`, and delta; 0 for empty rows."""
    tiles = tl.cdiv(length, ROWS)
    program = tl.program_id(0)
    head = (program // tiles % heads).to(tl.int64)
    batch = (program // tiles // heads).to(tl.int64)
    row = (program % tiles * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    d_v = tl.arange(0, BLOCK_V)
    inside = (row < length)[:, None] & (d_v < DV)[None, :]
    out_at = out_ptr + batch * o_sb + head * o_sh + row[:, None] * o_st + d_v[None, :]
    do_at = do_ptr + batch * do_sb + head * do_sh + row[:, None] * do_st + d_v[None, :]
    out = tl.load(out_at, inside, 0.0).to(tl.float32)
    do = tl.load(do_at, inside, 0.0).to(tl.float32)
    # A row that sees sinks only is all 0, and what arrives for it, NaN perhaps, is of no account.
    delta = tl.where(tl.sum(tl.abs(out), 1) == 0, 0.0, tl.sum(out * do, 1))
    if d_lse_ptr is not None:
        d_lse_at = d_lse_ptr + batch * l_sb + head * l_sh + row * l_st
        delta -= tl.load(d_lse_at, row < length, 0.0)
    lse = tl.load(lse_ptr + (batch * heads + head) * length + row, row < length, 0.0)
    at = _first_row(batch, heads, head, length) + row
    empty = lse == float("-inf")
    tl.store(lse_2_ptr + at, tl.where(empty, 0.0, lse * (_LOG2E / unit(PLAIN))))
    tl.store(delta_ptr + at, tl.where(empty, 0.0, delta))


@triton.jit
def _product_in_parts(
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
def _dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, weight_ptr,
    start_ptr, stop_ptr, bounds_ptr, dense_ptr, bias_ptr, slopes_ptr, seed_ptr,
    q_desc, do_desc, lse_desc, delta_desc, dk_ptr, dv_ptr,
    q_sb, q_sh, q_st, k_sb, k_sh, k_st, v_sb, v_sh, v_st, do_sb, do_sh, do_st,
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
    IN_PARTS: tl.constexpr = (D > BLOCK_D) or (DV > BLOCK_V)
    program = tl.program_id(0)
    key_tiles_all = tl.cdiv(key_length, BLOCK_K)
    tile = program % key_tiles_all
    key_heads = heads // group
    batch = (program // key_tiles_all // key_heads).to(tl.int64)
    key_head = (program // key_tiles_all % key_heads).to(tl.int64)
    col = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    col_inside = col < key_length
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    d_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    k_at = k_ptr + batch * k_sb + key_head * k_sh + col.to(tl.int64) * k_st
    v_at = v_ptr + batch * v_sb + key_head * v_sh + col.to(tl.int64) * v_st
    if not IN_PARTS:
        k = tl.load(k_at[:, None] + d[None, :], col_inside[:, None] & (d < D)[None, :], 0.0)
        if dk_ptr is not None:
            v = tl.load(
                v_at[:, None] + d_v[None, :], col_inside[:, None] & (d_v < DV)[None, :], 0.0
            )
    # Intervals of one row may serve all.
    if MASK == 2 and mask_sb != 0:
        bounds_ptr += batch * tl.cdiv(key_length, _KEY_GROUP) * 4
    query_start, query_stop = intervals(
        start_ptr, stop_ptr, None, None,
        batch * mask_sb, tile * BLOCK_K, key_length, MASK, BLOCK_K,
    )  # fmt: skip
    tile_start, tile_stop, full_start, full_stop = query_tiles(
        bounds_ptr, tile * BLOCK_K, key_length, query_length, offset, left, right,
        MASK, LEFT, RIGHT, DENSE, BLOCK_Q, BLOCK_K,
    )  # fmt: skip
    whole = full_stop - full_start
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
            do_head = do_ptr + batch * do_sb + head * do_sh
            stats = _first_row(batch, heads, head, query_length)
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
                    run_start, run_stop = 0, whole
                elif phase == 1:
                    run_start, run_stop = whole, tile_stop - tile_start
                else:
                    run_start, run_stop = 0, tile_stop - tile_start
                for n in tl.range(run_start, run_stop, num_stages=stages_of(STAGES, phase, MASK)):
                    if phase == 0:
                        query_tile = full_start + n
                    else:
                        query_tile = nth_tile(n, tile_start, full_start, full_stop)
                    row = query_tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
                    row_inside = row < query_length
                    q_at = q_head + row.to(tl.int64) * q_st
                    do_at = do_head + row.to(tl.int64) * do_st
                    if q_desc is not None:
                        q = tma_load(q_desc, batch, head, query_tile * BLOCK_Q, 0, BLOCK_Q, BLOCK_D)
                    elif phase == 0 and D == BLOCK_D:
                        q = tl.load(q_at[:, None] + d[None, :])
                    else:
                        q = tl.load(
                            q_at[:, None] + d[None, :], row_inside[:, None] & (d < D)[None, :], 0.0
                        )
                    if do_desc is not None:
                        do = tma_load(
                            do_desc, batch, head, query_tile * BLOCK_Q, 0, BLOCK_Q, BLOCK_V
                        )
                    elif phase == 0 and DV == BLOCK_V:
                        do = tl.load(do_at[:, None] + d_v[None, :])
                    else:
                        do = tl.load(
                            do_at[:, None] + d_v[None, :],
                            row_inside[:, None] & (d_v < DV)[None, :],
                            0.0,
                        )
                    rows_at = stats + query_tile * BLOCK_Q
                    if lse_desc is not None:
                        lse = lse_desc.load([rows_at.to(tl.int32)])
                    else:
                        lse = tl.load(lse_ptr + rows_at + tl.arange(0, BLOCK_Q))
                    if IN_PARTS:
                        s = _product_in_parts(
                            k_at, q_at, col_inside, row_inside,
                            D, BLOCK_D, BLOCK_K, BLOCK_Q, PRECISION,
                        )  # fmt: skip
                    else:
                        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
                    if dk_ptr is not None:
                        if delta_desc is not None:
                            delta = delta_desc.load([rows_at.to(tl.int32)])
                        else:
                            delta = tl.load(delta_ptr + rows_at + tl.arange(0, BLOCK_Q))
                        if IN_PARTS:
                            dp = _product_in_parts(
                                v_at, do_at, col_inside, row_inside,
                                DV, BLOCK_V, BLOCK_K, BLOCK_Q, PRECISION,
                            )  # fmt: skip
                        else:
                            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
                    seen = col_inside[:, None] & row_inside[None, :]
                    position = row + offset
                    if phase != 0:
                        seen = seen & visible(
                            row[None, :], position[None, :], col[:, None],
                            query_length, key_length, query_start[:, None], query_stop[:, None],
                            dense_head, dense_sq, dense_sk, left, right, MASK, LEFT, RIGHT, DENSE,
                        )  # fmt: skip
                    weight = 1.0
                    if weight_ptr is not None:
                        weight = tl.load(weight_ptr + rows_at + tl.arange(0, BLOCK_Q))[None, :]
                    p, d_cap = probabilities(
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
                            do_rows = do_head + query_tile.to(tl.int64) * BLOCK_Q * do_st + d_v
                            dv = seen_product(
                                dropped, do, dv, seen, do_rows, do_st, d_v < DV, PRECISION
                            )
                        else:
                            dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision=PRECISION)
                    if dk_ptr is not None:
                        if DROPOUT:
                            dp = tl.where(keep, dp * keep_scale, 0.0)
                        ds = p * (dp - delta[None, :])
                        if SOFTCAP:
                            ds = ds * d_cap
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
            dv_at[:, None] + d_v[None, :],
            dv.to(dv_ptr.dtype.element_ty),
            col_inside[:, None] & (d_v < DV)[None, :],
        )


@triton.jit(do_not_specialize=_PER_LENGTH)
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, weight_ptr,
    start_ptr, stop_ptr, ranges_ptr, dense_ptr, bias_ptr, slopes_ptr, seed_ptr,
    k_desc, v_desc, start_desc, stop_desc, dq_ptr,
    q_sb, q_sh, q_st, k_sb, k_sh, k_st, v_sb, v_sh, v_st, do_sb, do_sh, do_st,
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
    IN_PARTS: tl.constexpr = (D > BLOCK_D) or (DV > BLOCK_V)
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
    d_v = tl.arange(0, BLOCK_V)
    q_at = q_ptr + batch * q_sb + head * q_sh + row.to(tl.int64) * q_st
    do_at = do_ptr + batch * do_sb + head * do_sh + row.to(tl.int64) * do_st
    k_head = k_ptr + batch * k_sb + key_head * k_sh
    v_head = v_ptr + batch * v_sb + key_head * v_sh
    if not IN_PARTS:
        q = tl.load(q_at[:, None] + d[None, :], row_inside[:, None] & (d < D)[None, :], 0.0)
        do = tl.load(do_at[:, None] + d_v[None, :], row_inside[:, None] & (d_v < DV)[None, :], 0.0)
    stats = _first_row(batch, heads, head, query_length) + row
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
    tile_start, tile_stop, full_start, full_stop = key_tiles(
        ranges_ptr, tile, start, stop, key_length, left, right, MASK, LEFT, RIGHT, DENSE, BLOCK_K
    )
    whole = full_stop - full_start
    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_Q], tl.float32)
    for phase in tl.static_range(phases(RESCUE)):
        if phase == 0:
            run_start, run_stop = 0, whole
        elif phase == 1:
            run_start, run_stop = whole, tile_stop - tile_start
        else:
            again = holds_nan(dq, row_inside)
            run_start, run_stop = 0, tl.where(again, tile_stop - tile_start, 0)
            dq = tl.where(again, 0.0, dq)
            row_sum = tl.where(again, 0.0, row_sum)
        for n in tl.range(run_start, run_stop, num_stages=stages_of(STAGES, phase, MASK)):
            if phase == 0:
                key_tile = full_start + n
            else:
                key_tile = nth_tile(n, tile_start, full_start, full_stop)
            col = key_tile * BLOCK_K + tl.arange(0, BLOCK_K)
            col_inside = col < key_length
            k_at = k_head + col.to(tl.int64) * k_st
            v_at = v_head + col.to(tl.int64) * v_st
            if k_desc is not None:
                k = tma_load(k_desc, batch, key_head, key_tile * BLOCK_K, 0, BLOCK_K, BLOCK_D)
            elif phase == 0 and D == BLOCK_D:
                k = tl.load(k_at[:, None] + d[None, :])
            else:
                k = tl.load(k_at[:, None] + d[None, :], col_inside[:, None] & (d < D)[None, :], 0.0)
            if IN_PARTS:
                s = _product_in_parts(
                    q_at, k_at, row_inside, col_inside, D, BLOCK_D, BLOCK_Q, BLOCK_K, PRECISION
                )
                dp = _product_in_parts(
                    do_at, v_at, row_inside, col_inside, DV, BLOCK_V, BLOCK_Q, BLOCK_K, PRECISION
                )
            else:
                if v_desc is not None:
                    v = tma_load(v_desc, batch, key_head, key_tile * BLOCK_K, 0, BLOCK_K, BLOCK_V)
                elif phase == 0 and DV == BLOCK_V:
                    v = tl.load(v_at[:, None] + d_v[None, :])
                else:
                    v = tl.load(
                        v_at[:, None] + d_v[None, :], col_inside[:, None] & (d_v < DV)[None, :], 0.0
                    )
                s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            seen = row_inside[:, None] & col_inside[None, :]
            if phase != 0:
                query_start, query_stop = intervals(
                    start_ptr, stop_ptr, start_desc, stop_desc,
                    batch * mask_sb, key_tile * BLOCK_K, key_length, MASK, BLOCK_K,
                )  # fmt: skip
                seen = seen & visible(
                    row[:, None], position[:, None], col[None, :], query_length, key_length,
                    query_start[None, :], query_stop[None, :], dense_ptr, dense_sq, dense_sk,
                    left, right, MASK, LEFT, RIGHT, DENSE,
                )  # fmt: skip
            p, d_cap = probabilities(
                s, lse[:, None], 1.0, row[:, None], position[:, None], col[None, :], seen, slope,
                bias_ptr, bias_sq, bias_sk, scale, softcap,
                phase != 0, PLAIN, SOFTCAP, BIAS, ALIBI,
            )  # fmt: skip
            if weight_ptr is not None:
                row_sum += tl.sum(p, 1)
            if DROPOUT:
                keep = kept(seed_ptr, batch, head, row[:, None], col[None, :], threshold)
                dp = tl.where(keep, dp * keep_scale, 0.0)
            ds = p * (dp - delta[:, None])
            if SOFTCAP:
                ds = ds * d_cap
            if phase == 2:
                ds = tl.where(seen, ds, 0.0)
                k_rows = k_head + key_tile.to(tl.int64) * BLOCK_K * k_st + d
                dq = seen_product(ds, k, dq, seen, k_rows, k_st, d < D, PRECISION)
            else:
                dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    if weight_ptr is not None:
        weight = 1 / tl.where(row_sum == 0, 1.0, row_sum)
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
def _dbias_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, weight_ptr,
    start_ptr, stop_ptr, ranges_ptr, dense_ptr, bias_ptr, slopes_ptr, seed_ptr,
    d_bias_ptr,
    q_sb, q_sh, q_st, k_sb, k_sh, k_st, v_sb, v_sh, v_st, do_sb, do_sh, do_st,
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
    batch_stop, head_stop, row_stop, col_stop = at_batch + 1, at_head + 1, at_row + 1, at_col + 1
    if bias_batch == 1:
        batch_stop = batch_size
    if bias_heads == 1:
        head_stop = heads
    if bias_queries == 1:
        row_stop = tl.cdiv(query_length, BLOCK_Q)
    if bias_keys == 1:
        col_stop = tl.cdiv(key_length, BLOCK_K)
    total = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for b in range(at_batch, batch_stop):
        batch = tl.full([], b, tl.int64)
        for h in range(at_head, head_stop):
            head = tl.full([], h, tl.int64)
            q_head = q_ptr + batch * q_sb + head * q_sh
            k_head = k_ptr + batch * k_sb + (head // group) * k_sh
            v_head = v_ptr + batch * v_sb + (head // group) * v_sh
            do_head = do_ptr + batch * do_sb + head * do_sh
            ranges_at = ranges_ptr
            dense_at = dense_ptr
            if MASK == 2 and mask_sb != 0:
                ranges_at += batch * tl.cdiv(query_length, BLOCK_Q) * 4
            if DENSE:
                dense_at += batch * dense_sb + head * dense_sh
            slope = 0.0
            if ALIBI:
                slope = tl.load(slopes_ptr + batch * slopes_sb + head * slopes_sh)
            for row_tile in range(at_row, row_stop):
                row = row_tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
                row_inside = row < query_length
                position = row + offset
                stats = _first_row(batch, heads, head, query_length) + row
                lse = tl.load(lse_ptr + stats)
                delta = tl.load(delta_ptr + stats)
                weight = 1.0
                if weight_ptr is not None:
                    weight = tl.load(weight_ptr + stats)[:, None]
                start = row_tile * BLOCK_Q + offset
                stop = tl.minimum(row_tile * BLOCK_Q + BLOCK_Q, query_length) + offset
                tile_start, tile_stop, full_start, full_stop = key_tiles(
                    ranges_at, row_tile, start, stop, key_length, left, right,
                    MASK, LEFT, RIGHT, DENSE, BLOCK_K,
                )  # fmt: skip
                run_start = tl.maximum(tile_start, at_col)
                run_stop = tl.minimum(tile_stop, col_stop)
                for key_tile in range(run_start, run_stop):
                    col = key_tile * BLOCK_K + tl.arange(0, BLOCK_K)
                    col_inside = col < key_length
                    s = _product_in_parts(
                        q_head + row.to(tl.int64) * q_st, k_head + col.to(tl.int64) * k_st,
                        row_inside, col_inside, D, BLOCK_D, BLOCK_Q, BLOCK_K, PRECISION,
                    )  # fmt: skip
                    dp = _product_in_parts(
                        do_head + row.to(tl.int64) * do_st, v_head + col.to(tl.int64) * v_st,
                        row_inside, col_inside, DV, BLOCK_V, BLOCK_Q, BLOCK_K, PRECISION,
                    )  # fmt: skip
                    query_start, query_stop = intervals(
                        start_ptr, stop_ptr, None, None,
                        batch * mask_sb, key_tile * BLOCK_K, key_length, MASK, BLOCK_K,
                    )  # fmt: skip
                    seen = (row_inside[:, None] & col_inside[None, :]) & visible(
                        row[:, None], position[:, None], col[None, :], query_length, key_length,
                        query_start[None, :], query_stop[None, :], dense_at, dense_sq, dense_sk,
                        left, right, MASK, LEFT, RIGHT, DENSE,
                    )  # fmt: skip
                    p, d_cap = probabilities(
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
