"""The forward pass as a Triton kernel, of many queries and of few.

Source: Dao 2023, arXiv:2307.08691, Algorithm 1; keys split over programs as in Flash-Decoding. A
tile holds ``PACK_GQA`` query heads of one group side by side: one for long queries, the whole group
in decode, so that few queries fill the tile and a key is read once.
"""

# What stands in a kernel is Triton's language, which its types do not describe.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hf_flash_two.kernels.params import LOG2E
from hf_flash_two.kernels.triton.args import (
    Dropout,
    Flags,
    Heads,
    Intervals,
    Operand,
    Parts,
    PerHead,
    PerPair,
    ScoreTerms,
)
from hf_flash_two.kernels.triton.config import Tiles
from hf_flash_two.kernels.triton.tile import (
    INTERVALS,
    batch_row,
    head_number,
    head_ptr,
    head_terms,
    holds_nan,
    intervals,
    kept,
    key_tiles,
    modify,
    nth_tile,
    pair_offset,
    phases,
    seen_product,
    stages_of,
    tma_load,
    unit,
    visible,
)

_LOG2E = tl.constexpr(LOG2E)
_MOST_MERGED = 2**13
"""Numbers of parts that a program reads at a time, which its registers have to hold."""


def attend_constants(tiles: Tiles, query: Tensor, value: Tensor, flags: Flags) -> dict[str, object]:
    """What `attend_kernel` is compiled for."""
    rows = tiles.block_q
    if not flags.UNIFORM:
        rows = min(triton.next_power_of_2(tiles.pack_gqa * query.shape[2]), rows)
    return {
        "FLAGS": flags, "D": query.shape[3], "DV": value.shape[3],
        "BLOCK_Q": tiles.block_q, "BLOCK_K": tiles.block_k,
        "BLOCK_D": tiles.block_d, "BLOCK_V": tiles.block_v, "STAGES": tiles.stages,
        "PACK_GQA": tiles.pack_gqa, "ROWS": rows,
        "MERGED": min(max(_MOST_MERGED // (rows * tiles.block_v), 1), 16),
    }  # fmt: skip


@triton.jit(do_not_specialize=[
    "query_length", "key_length", "offset", "left", "right", "interval_stride_b", "split_rows",
])  # fmt: skip
def attend_kernel(
    q: Operand, k: Operand, v: Operand, out: Operand, lse_ptr, max_ptr, parts: Parts,
    k_desc, v_desc, start_desc, stop_desc,
    of_keys: Intervals, dense: PerPair, terms: ScoreTerms, sinks: PerHead, dropout: Dropout,
    heads: Heads, query_length, key_length, offset, left, right, interval_stride_b, split_rows,
    FLAGS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr, PACK_GQA: tl.constexpr, ROWS: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """Output and lse of one tile of queries, over all keys or one part of them.

    Goes through the tiles of keys that hold a visible pair, first through those that need no mask,
    with the online softmax: ``acc`` and ``row_sum`` are relative to ``row_max``, the largest score
    so far in `unit`, and are multiplied by ``alpha`` where a tile raises it.

    The grid is row tiles x batch rows x heads by ``PACK_GQA``, tiles of Dv, parts. Of the programs
    that share a tile the last to come merges the parts of all, in their order, whoever it is.

    Args:
        q: [B, Hq, Tq, D]. k: [B, Hk, Tk, D]. v: [B, Hk, Tk, Dv].
        out: [B, Hq, Tq, Dv] in the dtype of q.
        lse_ptr, max_ptr: float32 [B, Hq, Tq], log-sum-exp and largest score of each row, or None
            where nobody wants it.
        parts: its pointers are None where a program goes over all keys.
        k_desc, v_desc, start_desc, stop_desc: TMA descriptors of k, v and the intervals, or None.
        offset: position of query 0 among the keys.
        left, right: the band; see `AttentionParams`.
        interval_stride_b: Tk, or 0 where all batch rows share their intervals.
        split_rows: B * Hq * Tq, rows from one part to the next.
        ROWS: how many rows of a tile there are at most.
        MERGED: parts that are read at a time.
    """
    CHUNKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    PRECISION: tl.constexpr = FLAGS.PRECISION
    UNIT: tl.constexpr = unit(FLAGS.PLAIN)
    program = tl.program_id(0)
    row_tiles = tl.cdiv(query_length * PACK_GQA, BLOCK_Q)
    # The last tile of a causal mask is the longest: start with it.
    tile = row_tiles - 1 - program % row_tiles
    head_tiles = heads.count // PACK_GQA
    batch = (program // row_tiles // head_tiles).to(tl.int64)
    head_tile = (program // row_tiles) % head_tiles
    head = (head_tile * PACK_GQA).to(tl.int64)
    key_head = head // heads.group
    row = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    row_inside = row < query_length
    start = tile * BLOCK_Q
    stop = tl.minimum(start + BLOCK_Q, query_length)
    if PACK_GQA > 1:
        head = head + row % PACK_GQA
        row = row // PACK_GQA
        row_inside = row < query_length
        start = start // PACK_GQA
        stop = tl.minimum((tile * BLOCK_Q + BLOCK_Q - 1) // PACK_GQA + 1, query_length)
    position = row + offset

    d = tl.arange(0, BLOCK_D)
    d_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    q_at = head_ptr(q, batch, head) + row.to(tl.int64) * q.stride_t
    k_head = head_ptr(k, batch, key_head)
    v_head = head_ptr(v, batch, key_head)
    ranges_at = of_keys.tiles_ptr
    if FLAGS.MASK == INTERVALS:
        ranges_at += batch_row(batch, row_tiles, interval_stride_b)
    if PACK_GQA == 1:
        head_row = head
    else:
        head_row = head[:, None]
    dense_offset = pair_offset(dense, batch, head_row)
    of_head = head_terms(terms, batch, head_row)
    if CHUNKS == 1:
        q_tile = tl.load(q_at[:, None] + d[None, :], row_inside[:, None] & (d < D)[None, :], 0.0)

    tile_start, tile_stop, full_start, full_stop = key_tiles(
        ranges_at, dense, tile, start + offset, stop + offset, key_length, left, right,
        FLAGS, BLOCK_K, FLAGS.UNIFORM,
    )  # fmt: skip
    whole = full_stop - full_start
    split_start, split_stop = 0, tile_stop - tile_start
    if parts.ptr is not None:
        total = tile_stop - tile_start
        split_start = tl.program_id(2) * total // tl.num_programs(2)
        split_stop = (tl.program_id(2) + 1) * total // tl.num_programs(2)

    row_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_V], tl.float32)
    score_scale = terms.scale * _LOG2E
    for phase in tl.static_range(phases(FLAGS.RESCUE)):
        if phase == 0:
            run_start, run_stop = tl.minimum(split_start, whole), tl.minimum(split_stop, whole)
        elif phase == 1:
            run_start, run_stop = tl.maximum(split_start, whole), tl.maximum(split_stop, whole)
        else:
            again = holds_nan(acc, row_inside)
            run_start, run_stop = split_start, tl.where(again, split_stop, split_start)
            row_max = tl.where(again, float("-inf"), row_max)
            row_sum = tl.where(again, 0.0, row_sum)
            acc = tl.where(again, 0.0, acc)
        for n in tl.range(run_start, run_stop, num_stages=stages_of(STAGES, phase, FLAGS.MASK)):
            if phase == 0:
                key_tile = full_start + n
            else:
                key_tile = nth_tile(n, tile_start, full_start, full_stop)
            col = key_tile * BLOCK_K + tl.arange(0, BLOCK_K)
            col_at = col.to(tl.int64)
            if k_desc is not None:
                k_tile = tma_load(k_desc, batch, key_head, key_tile * BLOCK_K, 0, BLOCK_K, BLOCK_D)
                s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
            elif CHUNKS == 1:
                k_at = k_head + col_at[None, :] * k.stride_t + d[:, None]
                if phase == 0:
                    if D == BLOCK_D:
                        k_tile = tl.load(k_at)
                    else:
                        k_tile = tl.load(k_at, (d < D)[:, None], 0.0)
                else:
                    k_tile = tl.load(k_at, (d < D)[:, None] & (col < key_length)[None, :], 0.0)
                s = tl.dot(q_tile, k_tile, input_precision=PRECISION)
            else:
                s = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
                for chunk in range(CHUNKS):
                    dc = chunk * BLOCK_D + d
                    qc = tl.load(
                        q_at[:, None] + dc[None, :], row_inside[:, None] & (dc < D)[None, :], 0.0
                    )
                    kc = tl.load(
                        k_head + col_at[None, :] * k.stride_t + dc[:, None],
                        (dc < D)[:, None] & (col < key_length)[None, :],
                        0.0,
                    )
                    s = tl.dot(qc, kc, s, input_precision=PRECISION)
            seen = row_inside[:, None] & (col < key_length)[None, :]
            if phase != 0:
                query_start, query_stop = intervals(
                    of_keys, start_desc, stop_desc, batch * interval_stride_b, key_tile * BLOCK_K,
                    key_length, FLAGS, BLOCK_K,
                )  # fmt: skip
                seen = seen & visible(
                    row[:, None], position[:, None], col[None, :], query_length, key_length,
                    query_start[None, :], query_stop[None, :], dense, dense_offset,
                    left, right, FLAGS,
                )  # fmt: skip
            if FLAGS.PLAIN:
                if phase != 0:
                    s = tl.where(seen, s, float("-inf"))
                new_max = tl.maximum(row_max, tl.max(s, 1) * score_scale)
            else:
                s, d_cap = modify(
                    s, row[:, None], position[:, None], col[None, :], seen, terms, of_head, FLAGS
                )
                if phase != 0:
                    s = tl.where(seen, s, float("-inf"))
                new_max = tl.maximum(row_max, tl.max(s, 1))
            safe_max = new_max
            if phase != 0 or terms.bias.ptr is not None:
                safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
            if FLAGS.PLAIN:
                p = tl.exp2(s * score_scale - safe_max[:, None])
            else:
                p = tl.exp2((s - safe_max[:, None]) * UNIT)
            alpha = tl.exp2((row_max - safe_max) * UNIT)
            row_max = new_max
            row_sum = row_sum * alpha + tl.sum(p, 1)
            if FLAGS.DROPOUT:
                keep = kept(dropout, batch, head_row, row[:, None], col[None, :])
                p = tl.where(keep, p * dropout.keep_scale, 0.0)
            acc = acc * alpha[:, None]
            v_at = v_head + d_v[None, :] + col_at[:, None] * v.stride_t
            if v_desc is not None:
                v_tile = tma_load(
                    v_desc, batch, key_head, key_tile * BLOCK_K, tl.program_id(1) * BLOCK_V,
                    BLOCK_K, BLOCK_V,
                )  # fmt: skip
            elif phase == 0:
                if DV % BLOCK_V == 0:
                    v_tile = tl.load(v_at)
                else:
                    v_tile = tl.load(v_at, (d_v < DV)[None, :], 0.0)
            else:
                v_tile = tl.load(v_at, (d_v < DV)[None, :] & (col < key_length)[:, None], 0.0)
            if phase == 2:
                v_rows = v_head + key_tile.to(tl.int64) * BLOCK_K * v.stride_t + d_v
                acc = seen_product(p, v_tile, acc, seen, v_rows, v.stride_t, d_v < DV, PRECISION)
            else:
                acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)

    if parts.ptr is not None:
        part_row = (batch * heads.count + head) * query_length + row
        part_row += tl.program_id(2).to(tl.int64) * split_rows
        sums_at = _sums_of(parts, split_rows, DV) + part_row
        tl.store(sums_at, row_max, row_inside)
        tl.store(sums_at + tl.num_programs(2) * split_rows, row_sum, row_inside)
        acc_at = parts.ptr + part_row[:, None] * DV + d_v[None, :]
        tl.store(acc_at, acc, row_inside[:, None] & (d_v < DV)[None, :])
        # All threads have stored before one of them tells, and read after it has been told.
        tl.debug_barrier()
        arrived_at = parts.arrived_ptr + program * tl.num_programs(1) + tl.program_id(1)
        arrived = tl.atomic_add(arrived_at, 1, sem="acq_rel")
        if arrived == tl.num_programs(2) - 1:
            tl.store(arrived_at, 0)
            _merge(
                out, lse_ptr, max_ptr, parts, sinks, batch, head_tile,
                tile * BLOCK_Q + tl.arange(0, ROWS), d_v, heads, query_length, split_rows,
                UNIT, DV, PACK_GQA, MERGED,
            )  # fmt: skip
    else:
        _finish(
            out, lse_ptr, max_ptr, sinks, batch, head, row, d_v, row_max, row_sum, acc,
            heads, query_length, UNIT, DV,
        )  # fmt: skip


@triton.jit
def _sums_of(parts: Parts, split_rows, DV: tl.constexpr):
    """Where the maxima of this tile of Dv begin; the sums stand behind all of them."""
    # One number for both would round the share of small parts away.
    return parts.ptr + tl.num_programs(2).to(tl.int64) * split_rows * (DV + 2 * tl.program_id(1))


@triton.jit
def _merge(
    out: Operand, lse_ptr, max_ptr, parts: Parts, sinks: PerHead, batch, head_tile, row, d_v,
    heads: Heads, query_length, split_rows,
    UNIT: tl.constexpr, DV: tl.constexpr, PACK_GQA: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """Rows of a tile from all parts, each as it would be had all of them the largest maximum."""
    head = (head_tile * PACK_GQA + row % PACK_GQA).to(tl.int64)
    row = row // PACK_GQA
    part_row = (batch * heads.count + head) * query_length + row
    row_inside = row < query_length
    splits = tl.num_programs(2)
    row_max = tl.full([row.shape[0]], float("-inf"), tl.float32)
    row_sum = tl.zeros([row.shape[0]], tl.float32)
    acc = tl.zeros([row.shape[0], d_v.shape[0]], tl.float32)
    maxima = _sums_of(parts, split_rows, DV)
    sums = maxima + splits * split_rows
    for some in range(0, splits, MERGED):
        split = some + tl.arange(0, MERGED)
        at = (split.to(tl.int64) * split_rows)[:, None] + part_row[None, :]
        inside = (split < splits)[:, None] & row_inside[None, :]
        # Past the first cache, which does not see what other processors have stored.
        part_max = tl.load(maxima + at, inside, float("-inf"), cache_modifier=".cg")
        part_sum = tl.load(sums + at, inside, 0.0, cache_modifier=".cg")
        partial = tl.load(
            parts.ptr + at[:, :, None] * DV + d_v[None, None, :],
            inside[:, :, None] & (d_v < DV)[None, None, :],
            0.0,
            cache_modifier=".cg",
        )
        new_max = tl.maximum(row_max, tl.max(part_max, 0))
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        alpha = tl.exp2((row_max - safe_max) * UNIT)
        share = tl.exp2((part_max - safe_max[None, :]) * UNIT)
        acc = acc * alpha[:, None] + tl.sum(partial * share[:, :, None], 0)
        row_sum = row_sum * alpha + tl.sum(part_sum * share, 0)
        row_max = new_max
    _finish(
        out, lse_ptr, max_ptr, sinks, batch, head, row, d_v, row_max, row_sum, acc,
        heads, query_length, UNIT, DV,
    )  # fmt: skip


@triton.jit
def _finish(
    out: Operand, lse_ptr, max_ptr, sinks: PerHead, batch, head, row, d_v, row_max, row_sum, acc,
    heads: Heads, query_length, UNIT: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Stores output, lse and largest score of rows whose keys all have been seen."""
    row_inside = row < query_length
    row_at = (batch * heads.count + head) * query_length + row
    if max_ptr is not None:
        if tl.program_id(1) == 0:
            # A maximum passes over NaN. A sum does not, but infinity makes it NaN too.
            is_nan = (row_sum != row_sum) & (row_max < float("inf"))
            largest = tl.where(is_nan, float("nan"), row_max * (UNIT / _LOG2E))
            tl.store(max_ptr + row_at, largest, row_inside)
    if sinks.ptr is not None:
        sink = head_number(sinks, batch, head) * (_LOG2E / UNIT)
        new_max = tl.maximum(row_max, sink)
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        alpha = tl.exp2((row_max - safe_max) * UNIT)
        row_sum = row_sum * alpha + tl.exp2((sink - safe_max) * UNIT)
        acc = acc * alpha[:, None]
        row_max = new_max
    acc = acc / tl.where(row_sum == 0, 1.0, row_sum)[:, None]
    out_at = head_ptr(out, batch, head) + row.to(tl.int64) * out.stride_t
    tl.store(
        out_at[:, None] + d_v[None, :],
        acc.to(out.ptr.dtype.element_ty),
        row_inside[:, None] & (d_v < DV)[None, :],
    )
    if lse_ptr is not None:
        if tl.program_id(1) == 0:
            lse = row_max * (UNIT / _LOG2E) + tl.log2(row_sum) / _LOG2E
            lse = tl.where(row_sum == 0, float("-inf"), lse)
            tl.store(lse_ptr + row_at, lse, row_inside)
