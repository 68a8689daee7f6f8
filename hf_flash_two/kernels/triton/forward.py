"""The forward pass as Triton kernels: training and prefill, decode, and the merge of split keys.

Source: Dao 2023, arXiv:2307.08691, Algorithm 1; keys split over programs as in Flash-Decoding.
One kernel serves both ends. A tile holds ``PACK_GQA`` query heads of one group side by side: one
for long queries, the whole group in decode, so that few queries fill the tile and a key is read
once.
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
    empty_lse,
    empty_output,
    output_layout,
)
from hf_flash_two.kernels.triton.config import (
    Tiles,
    dropout_of,
    forward_tiles,
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
    modify,
    nth_tile,
    phases,
    seen_product,
    stages_of,
    tma_load,
    unit,
    visible,
)

_LOG2E = tl.constexpr(LOG2E)
_MERGED = tl.constexpr(16)


@dataclass(frozen=True, slots=True)
class _Plan:
    tiles: Tiles
    out: Layout
    tma_key: list[int] | None
    tma_value: list[int] | None
    attend: Launch
    merge: Launch | None


def forward(
    query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Tq, Dv] in the dtype of ``query`` and lse [B, Hq, Tq] in float32."""
    if query.numel() == 0:
        return empty_output(query, value.shape[3]), empty_lse(query)
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    with torch.cuda.device_of(query):
        plan = planned(_plan, params, query, key, value)
        tiles = plan.tiles
        out = query.new_empty_strided(*plan.out)
        lse = query.new_empty(plan.out[0][:3], dtype=torch.float32)
        part_out, part_lse = out, lse
        if plan.merge is not None:
            part_out = query.new_empty(tiles.splits, *out.shape, dtype=torch.float32)
            part_lse = query.new_empty(2, tiles.splits, *lse.shape, dtype=torch.float32)
        plan.attend(
            query, key, value,
            tma_tiles(key, plan.tma_key, tiles.block_k, tiles.block_d),
            tma_tiles(value, plan.tma_value, tiles.block_k, tiles.block_v),
            part_out, part_lse, params.first_query, params.last_query,
            tma_run(params.first_query, plan.tma_key, tiles.block_k),
            tma_run(params.last_query, plan.tma_key, tiles.block_k),
            key_ranges(params, tiles, query.shape[2], key.shape[2]),
            params.dense, params.bias, params.alibi_slopes, params.sinks, params.seed,
        )  # fmt: skip
        if plan.merge is not None:
            plan.merge(part_out, part_lse, out, lse, params.sinks)
    return out, lse


def _plan(params: AttentionParams, query: Tensor, key: Tensor, value: Tensor) -> _Plan:
    batch, heads, query_length, head_dim = query.shape
    key_heads, key_length, value_dim = key.shape[1], key.shape[2], value.shape[3]
    tiles = forward_tiles(query, key, value, params)
    row_tiles = triton.cdiv(tiles.pack_gqa * query_length, tiles.block_q)
    split = tiles.splits > 1
    out = output_layout(query, value_dim)
    part_strides, lse_step = (0, *out[1]), 0
    if split:
        lse_step = batch * heads * query_length
        part_strides = tuple(
            value_dim * step for step in (lse_step, heads * query_length, query_length, 1)
        )
    strides = strides_of(params, batch, heads, query_length, key_length)
    flags = launch_flags(query, params)
    attend = Launch(
        _forward_kernel,
        (
            row_tiles * batch * (heads // tiles.pack_gqa),
            triton.cdiv(value_dim, tiles.block_v),
            tiles.splits,
        ),
        (
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *part_strides[:4],
            lse_step, *strides,
            heads, heads // key_heads, query_length, key_length, row_tiles, tiles.splits,
            params.query_offset, params.window_left or 0, params.window_right or 0,
            params.scale, params.softcap or 1.0, *dropout_of(params),
        ),
        flags | {
            "D": head_dim, "DV": value_dim, "PACK_GQA": tiles.pack_gqa, "SPLIT": split,
            "BLOCK_Q": tiles.block_q, "BLOCK_K": tiles.block_k,
            "BLOCK_D": tiles.block_d, "BLOCK_V": tiles.block_v, "STAGES": tiles.stages,
            "RESCUE": hides(query, key, params),
        },
        tiles,
    )  # fmt: skip
    merge = None
    if split:
        merge = Launch(
            _merge_kernel,
            (batch * heads * query_length,),
            (
                *part_strides, lse_step, *out[1][:3], *strides[-2:], heads, query_length,
                tiles.splits,
            ),
            {
                "SINKS": flags["SINKS"],
                "PLAIN": flags["PLAIN"],
                "DV": value_dim,
                "BLOCK_V": triton.next_power_of_2(value_dim),
            },
            tiles,
        )  # fmt: skip
    whole_rows = head_dim <= tiles.block_d
    return _Plan(
        tiles,
        out,
        tma_strides(key, params) if whole_rows else None,
        tma_strides(value, params) if whole_rows else None,
        attend,
        merge,
    )


@triton.jit(do_not_specialize=[
    "query_length", "key_length", "row_tiles", "splits", "offset", "left", "right",
    "mask_sb", "l_ss", "o_ss", "threshold",
])  # fmt: skip
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, k_desc, v_desc, out_ptr, lse_ptr,
    start_ptr, stop_ptr, start_desc, stop_desc,
    ranges_ptr, dense_ptr, bias_ptr, slopes_ptr, sinks_ptr, seed_ptr,
    q_sb, q_sh, q_st, k_sb, k_sh, k_st, v_sb, v_sh, v_st, o_ss, o_sb, o_sh, o_st, l_ss,
    mask_sb, dense_sb, dense_sh, dense_sq, dense_sk, bias_sb, bias_sh, bias_sq, bias_sk,
    slopes_sb, slopes_sh, sinks_sb, sinks_sh,
    heads, group, query_length, key_length, row_tiles, splits, offset, left, right,
    scale, softcap, threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, PACK_GQA: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
    MASK: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, DENSE: tl.constexpr,
    BIAS: tl.constexpr, ALIBI: tl.constexpr, SINKS: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr,
    RESCUE: tl.constexpr,
):  # fmt: skip
    CHUNKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    UNIT: tl.constexpr = unit(PLAIN)
    program = tl.program_id(0)
    # The last tile of a causal mask is the longest: start with it.
    tile = row_tiles - 1 - program % row_tiles
    head_tiles = heads // PACK_GQA
    batch = (program // row_tiles // head_tiles).to(tl.int64)
    head = ((program // row_tiles) % head_tiles * PACK_GQA).to(tl.int64)
    key_head = head // group
    packed_row = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    row = packed_row
    rows_left = packed_row < query_length
    start = tile * BLOCK_Q
    stop = tl.minimum(start + BLOCK_Q, query_length)
    if PACK_GQA > 1:
        row = packed_row // PACK_GQA
        head = head + packed_row % PACK_GQA
        rows_left = row < query_length
        start = start // PACK_GQA
        stop = tl.minimum((tile * BLOCK_Q + BLOCK_Q - 1) // PACK_GQA + 1, query_length)
    position = row + offset

    d = tl.arange(0, BLOCK_D)
    d_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    q_at = q_ptr + batch * q_sb + head * q_sh + row.to(tl.int64) * q_st
    k_at = k_ptr + batch * k_sb + key_head * k_sh
    v_head = v_ptr + batch * v_sb + key_head * v_sh
    v_at = v_head + d_v[None, :]
    # Intervals of one row may serve all.
    if MASK == 2 and mask_sb != 0:
        ranges_ptr += batch * row_tiles * 4
    if PACK_GQA == 1:
        head_row = head
    else:
        head_row = head[:, None]
    if DENSE:
        dense_ptr += batch * dense_sb + head_row * dense_sh
    if BIAS:
        bias_ptr += batch * bias_sb + head_row * bias_sh
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes_ptr + batch * slopes_sb + head_row * slopes_sh)
    if CHUNKS == 1:
        q = tl.load(q_at[:, None] + d[None, :], rows_left[:, None] & (d < D)[None, :], 0.0)

    tile_start, tile_stop, full_start, full_stop = key_tiles(
        ranges_ptr, tile, start + offset, stop + offset, key_length, left, right,
        MASK, LEFT, RIGHT, DENSE, BLOCK_K,
    )  # fmt: skip
    whole = full_stop - full_start
    split_start, split_stop = 0, tile_stop - tile_start
    if SPLIT:
        total = tile_stop - tile_start
        split_start = tl.program_id(2) * total // splits
        split_stop = (tl.program_id(2) + 1) * total // splits

    row_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_V], tl.float32)
    score_scale = scale * _LOG2E
    for phase in tl.static_range(phases(RESCUE)):
        if phase == 0:
            run_start, run_stop = tl.minimum(split_start, whole), tl.minimum(split_stop, whole)
        elif phase == 1:
            run_start, run_stop = tl.maximum(split_start, whole), tl.maximum(split_stop, whole)
        else:
            again = holds_nan(acc, rows_left)
            run_start, run_stop = split_start, tl.where(again, split_stop, split_start)
            row_max = tl.where(again, float("-inf"), row_max)
            row_sum = tl.where(again, 0.0, row_sum)
            acc = tl.where(again, 0.0, acc)
        for n in tl.range(run_start, run_stop, num_stages=stages_of(STAGES, phase, MASK)):
            if phase == 0:
                key_tile = full_start + n
            else:
                key_tile = nth_tile(n, tile_start, full_start, full_stop)
            col = key_tile * BLOCK_K + tl.arange(0, BLOCK_K)
            col_at = col.to(tl.int64)
            if k_desc is not None:
                k = tma_load(k_desc, batch, key_head, key_tile * BLOCK_K, 0, BLOCK_K, BLOCK_D)
                s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            elif CHUNKS == 1:
                k_ptrs = k_at + col_at[None, :] * k_st + d[:, None]
                if phase == 0:
                    if D == BLOCK_D:
                        k = tl.load(k_ptrs)
                    else:
                        k = tl.load(k_ptrs, (d < D)[:, None], 0.0)
                else:
                    k = tl.load(k_ptrs, (d < D)[:, None] & (col < key_length)[None, :], 0.0)
                s = tl.dot(q, k, input_precision=PRECISION)
            else:
                s = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
                for chunk in range(CHUNKS):
                    dc = chunk * BLOCK_D + d
                    qc = tl.load(
                        q_at[:, None] + dc[None, :], rows_left[:, None] & (dc < D)[None, :], 0.0
                    )
                    kc = tl.load(
                        k_at + col_at[None, :] * k_st + dc[:, None],
                        (dc < D)[:, None] & (col < key_length)[None, :],
                        0.0,
                    )
                    s = tl.dot(qc, kc, s, input_precision=PRECISION)
            seen = rows_left[:, None] & (col < key_length)[None, :]
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
            if PLAIN:
                if phase != 0:
                    s = tl.where(seen, s, float("-inf"))
                new_max = tl.maximum(row_max, tl.max(s, 1) * score_scale)
            else:
                s, d_cap = modify(
                    s, row[:, None], position[:, None], col[None, :], seen, slope,
                    bias_ptr, bias_sq, bias_sk, scale, softcap, SOFTCAP, BIAS, ALIBI,
                )  # fmt: skip
                if phase != 0:
                    s = tl.where(seen, s, float("-inf"))
                new_max = tl.maximum(row_max, tl.max(s, 1))
            safe_max = new_max
            if phase != 0 or BIAS:
                safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
            if PLAIN:
                p = tl.exp2(s * score_scale - safe_max[:, None])
            else:
                p = tl.exp2((s - safe_max[:, None]) * UNIT)
            alpha = tl.exp2((row_max - safe_max) * UNIT)
            row_max = new_max
            row_sum = row_sum * alpha + tl.sum(p, 1)
            if DROPOUT:
                keep = kept(seed_ptr, batch, head_row, row[:, None], col[None, :], threshold)
                p = tl.where(keep, p * keep_scale, 0.0)
            acc = acc * alpha[:, None]
            v_ptrs = v_at + col_at[:, None] * v_st
            if v_desc is not None:
                v = tma_load(
                    v_desc, batch, key_head, key_tile * BLOCK_K, tl.program_id(1) * BLOCK_V,
                    BLOCK_K, BLOCK_V,
                )  # fmt: skip
            elif phase == 0:
                if DV % BLOCK_V == 0:
                    v = tl.load(v_ptrs)
                else:
                    v = tl.load(v_ptrs, (d_v < DV)[None, :], 0.0)
            else:
                v = tl.load(v_ptrs, (d_v < DV)[None, :] & (col < key_length)[:, None], 0.0)
            if phase == 2:
                v_rows = v_head + key_tile.to(tl.int64) * BLOCK_K * v_st + d_v
                acc = seen_product(p, v, acc, seen, v_rows, v_st, d_v < DV, PRECISION)
            else:
                acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)

    out_at = out_ptr + batch * o_sb + head * o_sh + row.to(tl.int64) * o_st
    lse_at = lse_ptr + (batch * heads + head) * query_length + row
    if SPLIT:
        # The parts' sums stand behind all of their maxima: one number would round their share away.
        out_at += tl.program_id(2).to(tl.int64) * o_ss
        lse_at += tl.program_id(2).to(tl.int64) * l_ss
        lse = row_max
        if tl.program_id(1) == 0:
            tl.store(lse_at + splits.to(tl.int64) * l_ss, row_sum, rows_left)
    else:
        if SINKS:
            sink = tl.load(sinks_ptr + batch * sinks_sb + head * sinks_sh) * (_LOG2E / UNIT)
            new_max = tl.maximum(row_max, sink)
            safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
            alpha = tl.exp2((row_max - safe_max) * UNIT)
            row_sum = row_sum * alpha + tl.exp2((sink - safe_max) * UNIT)
            acc = acc * alpha[:, None]
            row_max = new_max
        acc = acc / tl.where(row_sum == 0, 1.0, row_sum)[:, None]
        lse = row_max * (UNIT / _LOG2E) + tl.log2(row_sum) / _LOG2E
        lse = tl.where(row_sum == 0, float("-inf"), lse)
    tl.store(
        out_at[:, None] + d_v[None, :],
        acc.to(out_ptr.dtype.element_ty),
        rows_left[:, None] & (d_v < DV)[None, :],
    )
    if tl.program_id(1) == 0:
        tl.store(lse_at, lse, rows_left)


@triton.jit(do_not_specialize=["p_ss", "l_ss", "query_length", "splits"])
def _merge_kernel(
    part_out_ptr, part_lse_ptr, out_ptr, lse_ptr, sinks_ptr,
    p_ss, p_sb, p_sh, p_st, l_ss, o_sb, o_sh, o_st, sinks_sb, sinks_sh,
    heads, query_length, splits,
    SINKS: tl.constexpr, PLAIN: tl.constexpr, DV: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One row: the sums of its splits, each as it would be had all keys the largest maximum."""
    UNIT: tl.constexpr = unit(PLAIN)
    program = tl.program_id(0).to(tl.int64)
    row = program % query_length
    head = (program // query_length) % heads
    batch = program // query_length // heads
    d_v = tl.arange(0, BLOCK_V)
    part = part_out_ptr + batch * p_sb + head * p_sh + row * p_st + d_v
    row_max = float("-inf")
    row_sum = 0.0
    acc = tl.zeros([BLOCK_V], tl.float32)
    if SINKS:
        row_max = tl.load(sinks_ptr + batch * sinks_sb + head * sinks_sh) * (_LOG2E / UNIT)
        row_sum = tl.where(row_max == float("-inf"), 0.0, 1.0)
    # All splits together are a few tiles per processor: 32 bits reach them.
    for some in range(0, splits, _MERGED):
        split = some + tl.arange(0, _MERGED)
        inside = split < splits
        part_at = part_lse_ptr + split * l_ss + program
        part_max = tl.load(part_at, inside, float("-inf"))
        part_sum = tl.load(part_at + splits * l_ss, inside, 0.0)
        new_max = tl.maximum(row_max, tl.max(part_max, 0))
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        alpha = tl.exp2((row_max - safe_max) * UNIT)
        share = tl.exp2((part_max - safe_max) * UNIT)
        at = part[None, :] + (split * p_ss)[:, None]
        partial = tl.load(at, inside[:, None] & (d_v < DV)[None, :], 0.0)
        acc = acc * alpha + tl.sum(partial * share[:, None], 0)
        row_sum = row_sum * alpha + tl.sum(part_sum * share, 0)
        row_max = new_max
    acc = acc / tl.where(row_sum == 0, 1.0, row_sum)
    lse = row_max * (UNIT / _LOG2E) + tl.log2(row_sum) / _LOG2E
    lse = tl.where(row_sum == 0, float("-inf"), lse)
    tl.store(out_ptr + batch * o_sb + head * o_sh + row * o_st + d_v, acc, d_v < DV)
    tl.store(lse_ptr + program, lse)
