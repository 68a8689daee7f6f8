"""The backward pass as Triton kernels, in separate passes without atomics: bitwise repeatable.

Source: Dao 2023, arXiv:2307.08691, Algorithm 2, split in two: the dK/dV pass goes through the
queries of a tile of keys (once for each of the two where registers would run out), the dQ pass
through the keys of a tile of queries; each recomputes the probabilities from lse. The dQ pass is
the first: it also writes what the others need of each row. The dbias pass sums the gradient of the
bias over whatever axes it broadcasts.
"""

# What stands in a kernel is Triton's language, which its types do not describe.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_flash_two.kernels.params import (
    LOG2E,
    AttentionParams,
    Layout,
    output_layout,
)
from hf_flash_two.kernels.triton.args import (
    BiasShape,
    Dropout,
    Heads,
    Intervals,
    Operand,
    PerPair,
    Rows,
    ScoreTerms,
    Tma,
    broadcast_strides,
    dropout_of,
    intervals_of,
    score_terms,
)
from hf_flash_two.kernels.triton.config import (
    BackwardTiles,
    Tiles,
    backward_tiles,
    launch_flags,
    marked_tiles,
    sharing_programs,
    tma_run,
    tma_tiles,
)
from hf_flash_two.kernels.triton.launch import Launch, on_device, planned
from hf_flash_two.kernels.triton.ranges import key_ranges
from hf_flash_two.kernels.triton.tile import (
    INTERVALS,
    batch_row,
    head_ptr,
    head_terms,
    holds_nan,
    intervals,
    kept,
    key_tiles,
    load_tile,
    nth_tile,
    pair_offset,
    phases,
    probabilities,
    query_tiles,
    score_gradient,
    seen_product,
    stages_of,
    unit,
    visible,
)
from hf_flash_two.masks import KEY_GROUP

_LOG2E = tl.constexpr(LOG2E)
_KEY_GROUP = tl.constexpr(KEY_GROUP)
# `Rows` are padded to multiples of this, so that no tile needs a bounds check.
_ROW_MULTIPLE = 128
_ROW_MULTIPLE_ = tl.constexpr(_ROW_MULTIPLE)
# In so many tiles at once a program looks for marks: each look waits for memory.
_AT_ONCE = tl.constexpr(128)


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
    inputs = (query, key, value, d_out)
    query, key, value, d_out = [x if x.stride(3) == 1 else x.contiguous() for x in inputs]
    lse = lse.contiguous()
    plan = planned(_plan, params, (query, key, value), (d_out, out, lse, d_lse))
    given = (d_out, d_lse, query, key, value, out, lse, params)
    return _differentiate(plan, *given, need_d_bias)


def prepare(
    d_out: Tensor,
    d_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    params: AttentionParams,
    need_d_bias: bool,
) -> Callable | None:
    """`backward` for all calls that differ from this one in tensors' values only, or None."""
    if any(x.stride(3) != 1 for x in (query, key, value, d_out)):
        return None
    plan = planned(_plan, params, (query, key, value), (d_out, out, lse, d_lse))
    return partial(_differentiate, plan)


def _differentiate(
    plan: _Plan,
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
    with on_device(query):
        dq, dk, dv = [query.new_empty_strided(*layout) for layout in plan.gradients]
        row_lse, delta = lse.new_empty(plan.rows_shape), lse.new_empty(plan.rows_shape)
        weigh = params.bias is not None and params.sinks is None
        rows = Rows(row_lse, delta, torch.empty_like(delta) if weigh else None)
        of_keys = _gradients(
            plan, rows, d_out, d_lse, query, key, value, out, lse, params, (None, None), dq, dk, dv
        )
        d_bias = None
        if need_d_bias and params.bias is not None:
            d_bias = torch.empty_like(params.bias, memory_format=torch.contiguous_format)
            if plan.dbias is not None and d_bias.numel():
                terms = (params.dense, plan.terms(params), params.seed)
                plan.dbias(query, key, value, d_out, rows, of_keys, *terms, d_bias)
    return dq, dk, dv, d_bias, gradient_of_sinks(params, lse, delta)


def gradient_of_sinks(params: AttentionParams, lse: Tensor, delta: Tensor) -> Tensor | None:
    """In the shape of the sinks; None without them.

    Args:
        lse: float32 [B, Hq, Tq]. delta: [B, Hq, at least Tq], see `Rows`.
    """
    if params.sinks is None:
        return None
    weight = torch.exp(params.sinks[:, :, None] - lse).nan_to_num_(nan=0.0)
    return -(weight * delta[:, :, : lse.shape[2]]).sum(2).sum_to_size(params.sinks.shape)


def replace_marked(
    marked: tuple[Tensor, Tensor],
    rows: Rows,
    d_out: Tensor,
    d_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    params: AttentionParams,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Computes anew what another kernel marked in its gradients: NaN that hidden pairs may cause.

    Args:
        marked: int8 [B, Hq, Tq] of dq and [B, Hk, Tk] of dk and dv, 1 where a row holds NaN.
        rows: of all rows; no weights.
    """
    plan = planned(_plan_of_marked, params, (query, key, value), (d_out, out, lse, d_lse))
    _gradients(plan, rows, d_out, d_lse, query, key, value, out, lse, params, marked, dq, dk, dv)


def _gradients(
    plan: _Plan,
    rows: Rows,
    d_out: Tensor,
    d_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    params: AttentionParams,
    marked: tuple[Tensor | None, Tensor | None],
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> Intervals:
    """The passes for dQ, dK and dV; gives what they know of the mask."""
    terms = (params.dense, plan.terms(params), params.seed)
    ranges = key_ranges(params, plan.tiles.dq, query.shape[2], key.shape[2])
    of_keys = intervals_of(params, ranges)
    plan.dq(
        query, key, value, d_out, rows, out, lse, d_lse,
        key, value, params.query_start, params.query_stop, of_keys, *terms, marked[0], dq,
    )  # fmt: skip
    if dk.numel():
        by_queries = (
            query, d_out, rows.lse_ptr, rows.delta_ptr, intervals_of(params, params.key_bounds)
        )  # fmt: skip
        args = (query, key, value, d_out, rows, *by_queries, *terms, marked[1])
        if plan.dv is None:
            plan.dkdv(*args, dk, dv)
        else:
            plan.dkdv(*args, dk, None)
            plan.dv(*args, None, dv)
    return of_keys


@dataclass(frozen=True, slots=True)
class _Plan:
    tiles: BackwardTiles
    gradients: tuple[Layout, Layout, Layout]
    rows_shape: tuple[int, int, int]
    terms: Callable[[AttentionParams], ScoreTerms]
    dkdv: Launch
    dv: Launch | None
    dq: Launch
    dbias: Launch | None


def _plan_of_marked(*given: Any) -> _Plan:
    """A plan of its own: a `Launch` takes the same kinds of arguments in every call."""
    return _plan(*given, marked=True)


def _plan(
    params: AttentionParams,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    d_out: Tensor,
    out: Tensor,
    lse: Tensor,
    d_lse: Tensor | None,
    marked: bool = False,
) -> _Plan:
    batch, heads, query_length, head_dim = query.shape
    key_heads, key_length, value_dim = key.shape[1], key.shape[2], value.shape[3]
    shape = (batch, heads, query_length, key_length)
    tiles = marked_tiles(query, value) if marked else backward_tiles(query, key, value, params)
    flags = launch_flags(query, key, params)
    gradients = tuple(output_layout(x, x.shape[3]) for x in (query, key, value))
    (_, dq_strides), (_, dk_strides), (_, dv_strides) = gradients
    operands = {
        "q": query.stride(), "k": key.stride(), "v": value.stride(), "do": d_out.stride(),
        "dq": dq_strides, "dk": dk_strides, "dv": dv_strides,
    }  # fmt: skip
    templates: dict[str, tuple] = {
        name: Operand(None, *strides[:3]) for name, strides in operands.items()
    }
    templates["dense"] = PerPair(None, *broadcast_strides(params.dense, *shape))
    templates["dropout"] = dropout_of(params)
    templates["out"] = Operand(None, *out.stride()[:3])
    templates["d_lse"] = Operand(None, *((0, 0, 0) if d_lse is None else d_lse.stride()))
    scalars = (
        Heads(heads, heads // key_heads), query_length, key_length,
        params.query_offset, params.window_left or 0, params.window_right or 0,
        broadcast_strides(params.query_start, batch, key_length)[0],
    )  # fmt: skip
    rows_shape = (batch, heads, triton.cdiv(query_length, _ROW_MULTIPLE) * _ROW_MULTIPLE)
    # A row is read in parts where it is wider than a tile.
    block = tiles.dq
    whole_rows = head_dim <= block.block_d and value_dim <= block.block_v

    def tiles_of(tensor: Tensor, rows: int, columns: int) -> Tma:
        # The loop that computes what is marked has no use for TMA.
        return tma_tiles(tensor, params, rows, columns) if whole_rows and not marked else Tma()

    def launch(kernel, grid: tuple[int, ...], block: Tiles, *own_scalars: tuple) -> Launch:
        by_key = tiles_of(key, block.block_k, block.block_d)
        by_query = tiles_of(query, block.block_q, block.block_d)
        of_row = tma_run(lse.new_empty(rows_shape, device="meta"), by_query)
        descriptors = {
            "k_desc": by_key, "v_desc": tiles_of(value, block.block_k, block.block_v),
            "start_desc": tma_run(params.query_start, by_key),
            "stop_desc": tma_run(params.query_stop, by_key),
            "q_desc": by_query, "do_desc": tiles_of(d_out, block.block_q, block.block_v),
            "lse_desc": of_row, "delta_desc": of_row,
        }  # fmt: skip
        constants = {
            "FLAGS": flags, "D": head_dim, "DV": value_dim,
            "BLOCK_Q": block.block_q, "BLOCK_K": block.block_k,
            "BLOCK_D": block.block_d, "BLOCK_V": block.block_v, "STAGES": block.stages,
        }  # fmt: skip
        numbers = (*scalars, *own_scalars)
        return Launch(kernel, grid, templates | descriptors, numbers, constants, block)

    def launch_pass(kernel, tile_count: int, parts: int, block: Tiles) -> Launch:
        if not marked:
            return launch(kernel, (tile_count, parts), block, None)
        # Mostly nothing is marked, and each program more takes its time to start.
        return launch(kernel, (sharing_programs(query, tile_count), parts), block, tile_count)

    parts = max(
        triton.cdiv(head_dim, tiles.dkdv.block_d), triton.cdiv(value_dim, tiles.dkdv.block_v)
    )
    dkdv, dv = (
        block
        and launch_pass(
            _dkdv_kernel, triton.cdiv(key_length, block.block_k) * batch * key_heads, parts, block
        )
        for block in (tiles.dkdv, tiles.dv)
    )
    parts = triton.cdiv(head_dim, block.block_d)
    dq = launch_pass(
        _dq_kernel, triton.cdiv(query_length, block.block_q) * batch * heads, parts, block
    )
    dbias = None
    if params.bias is not None:
        bias_batch, bias_heads, bias_queries, bias_keys = params.bias.shape
        programs = (
            triton.cdiv(bias_keys, block.block_k)
            * triton.cdiv(bias_queries, block.block_q)
            * bias_batch
            * bias_heads
        )
        dbias = launch(_dbias_kernel, (programs,), block, BiasShape(batch, *params.bias.shape))
    return _Plan(tiles, gradients, rows_shape, score_terms(params, *shape), dkdv, dv, dq, dbias)


@triton.jit
def _first_row(batch, heads, head, length):
    """Where the `Rows` of a head begin."""
    return (batch * heads + head) * (tl.cdiv(length, _ROW_MULTIPLE_) * _ROW_MULTIPLE_)


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


@triton.jit
def _delta(out_at, do_at, row_inside, DV: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr):
    """sum(dO * O) of each row."""
    total = tl.zeros([ROWS], tl.float32)
    size = tl.zeros([ROWS], tl.float32)
    for part in tl.static_range((DV + BLOCK_V - 1) // BLOCK_V):
        d_v = part * BLOCK_V + tl.arange(0, BLOCK_V)
        inside = row_inside[:, None] & (d_v < DV)[None, :]
        out_tile = tl.load(out_at[:, None] + d_v[None, :], inside, 0.0).to(tl.float32)
        do_tile = tl.load(do_at[:, None] + d_v[None, :], inside, 0.0).to(tl.float32)
        total += tl.sum(out_tile * do_tile, 1)
        size += tl.sum(tl.abs(out_tile), 1)
    # A row that sees sinks only is all 0, and what arrives for it, NaN perhaps, is of no account.
    return tl.where(size == 0, 0.0, total)


@triton.jit
def _clear_rows(rows, rows_at, length, tile, BLOCK_Q: tl.constexpr):
    """Zeros behind the last tile of a head: other tiles may end later."""
    for _ in range(tile + 1, tl.cdiv(length, _ROW_MULTIPLE_) * (_ROW_MULTIPLE_ // BLOCK_Q)):
        rows_at += BLOCK_Q
        zeros = tl.zeros([BLOCK_Q], tl.float32)
        tl.store(rows.lse_ptr + rows_at, zeros)
        tl.store(rows.delta_ptr + rows_at, zeros)
        if rows.weight_ptr is not None:
            tl.store(rows.weight_ptr + rows_at, zeros)


_PER_LENGTH = ["query_length", "key_length", "offset", "left", "right", "interval_stride_b"]
_PER_TILE = [*_PER_LENGTH, "tile_count"]


@triton.jit
def _marks(marked_ptr, number, count, length, ROWS: tl.constexpr):
    """int32, 1 where a tile holds a marked row.

    Args:
        marked_ptr: int8 [B, H, length].
        number: of the tiles of all heads; from ``count`` on there are none.
    """
    tiles = tl.cdiv(length, ROWS)
    row = (number % tiles * ROWS)[:, None] + tl.arange(0, ROWS)[None, :]
    at = (number // tiles).to(tl.int64)[:, None] * length + row
    inside = (number < count)[:, None] & (row < length)
    return tl.max(tl.load(marked_ptr + at, inside, 0).to(tl.int32), 1)


@triton.jit(do_not_specialize=_PER_TILE)
def _dkdv_kernel(
    q: Operand, k: Operand, v: Operand, do: Operand, rows: Rows,
    q_desc, do_desc, lse_desc, delta_desc,
    of_keys: Intervals, dense: PerPair, terms: ScoreTerms, dropout: Dropout, marked_ptr,
    dk: Operand, dv: Operand,
    heads: Heads, query_length, key_length, offset, left, right, interval_stride_b, tile_count,
    FLAGS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dK and dV, summed over the query heads of the group; or one of them.

    The grid is key tiles x batch rows x key heads, parts of a row of k or v. With marks,
    programs of the first axis share the ``tile_count`` tiles, and may be fewer.

    Args:
        q: [B, Hq, Tq, D]. k: [B, Hk, Tk, D]. v: [B, Hk, Tk, Dv]. do: [B, Hq, Tq, Dv].
        dk: [B, Hk, Tk, D]. dv: [B, Hk, Tk, Dv]. One without a pointer is not computed.
        marked_ptr: None, or int8 [B, Hk, Tk]; tiles without a marked key stay as they are.
        q_desc, do_desc, lse_desc, delta_desc: TMA descriptors of q, do and `Rows`, or None.
    """
    tiles = tl.cdiv(key_length, BLOCK_K)
    first, step = tl.program_id(0), tl.num_programs(0)
    if marked_ptr is None:
        _dkdv_tile(
            first % tiles, first // tiles,
            q, k, v, do, rows, q_desc, do_desc, lse_desc, delta_desc, of_keys, dense, terms,
            dropout, dk, dv, heads, query_length, key_length, offset, left, right,
            interval_stride_b, FLAGS, D, DV, BLOCK_Q, BLOCK_K, BLOCK_D, BLOCK_V, STAGES, False,
        )  # fmt: skip
    else:
        # Mostly none is marked: what each tile needs stays inside of the loops.
        nth = tl.arange(0, _AT_ONCE)
        for start in tl.range(first, tile_count, step * _AT_ONCE, disable_licm=True):
            marks = _marks(marked_ptr, start + nth * step, tile_count, key_length, BLOCK_K)
            for _ in tl.range(tl.sum(marks, 0), disable_licm=True):
                at = tl.min(tl.where(marks != 0, nth, _AT_ONCE), 0)
                marks = tl.where(nth == at, 0, marks)
                number = start + at * step
                _dkdv_tile(
                    number % tiles, number // tiles,
                    q, k, v, do, rows, q_desc, do_desc, lse_desc, delta_desc, of_keys, dense, terms,
                    dropout, dk, dv, heads, query_length, key_length, offset, left, right,
                    interval_stride_b, FLAGS, D, DV, BLOCK_Q, BLOCK_K, BLOCK_D, BLOCK_V, STAGES,
                    True,
                )  # fmt: skip


@triton.jit
def _dkdv_tile(
    tile, head_of_all,
    q, k, v, do, rows, q_desc, do_desc, lse_desc, delta_desc, of_keys, dense, terms, dropout,
    dk, dv, heads, query_length, key_length, offset, left, right, interval_stride_b,
    FLAGS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys; the key heads of all batch rows are counted through.

    AGAIN: it is known to hold NaN.
    """
    PRECISION: tl.constexpr = FLAGS.PRECISION
    IN_PARTS: tl.constexpr = (D > BLOCK_D) or (DV > BLOCK_V)
    key_heads = heads.count // heads.group
    batch = (head_of_all // key_heads).to(tl.int64)
    key_head = (head_of_all % key_heads).to(tl.int64)
    col = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    col_inside = col < key_length
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    d_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    k_at = head_ptr(k, batch, key_head) + col.to(tl.int64) * k.stride_t
    v_at = head_ptr(v, batch, key_head) + col.to(tl.int64) * v.stride_t
    if not IN_PARTS:
        k_tile = tl.load(k_at[:, None] + d[None, :], col_inside[:, None] & (d < D)[None, :], 0.0)
        if dk.ptr is not None:
            v_tile = tl.load(
                v_at[:, None] + d_v[None, :], col_inside[:, None] & (d_v < DV)[None, :], 0.0
            )
    bounds_at = of_keys.tiles_ptr
    if FLAGS.MASK == INTERVALS:
        bounds_at += batch_row(batch, tl.cdiv(key_length, _KEY_GROUP), interval_stride_b)
    query_start, query_stop = intervals(
        of_keys, None, None, batch * interval_stride_b, tile * BLOCK_K, key_length, FLAGS, BLOCK_K
    )
    tile_start, tile_stop, full_start, full_stop = query_tiles(
        bounds_at, dense, tile * BLOCK_K, key_length, query_length, offset, left, right,
        FLAGS, BLOCK_Q, BLOCK_K,
    )  # fmt: skip
    whole = full_stop - full_start
    dk_sum = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv_sum = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    for attempt in tl.static_range(1 if AGAIN else 0, phases(FLAGS.RESCUE) - 1):
        members = heads.group
        if attempt == 1 and not AGAIN:
            again = holds_nan(dk_sum, col_inside) | holds_nan(dv_sum, col_inside)
            members = tl.where(again, heads.group, 0)
            dk_sum = tl.where(again, 0.0, dk_sum)
            dv_sum = tl.where(again, 0.0, dv_sum)
        for member in range(members):
            head = key_head * heads.group + member
            q_head = head_ptr(q, batch, head)
            do_head = head_ptr(do, batch, head)
            first_row = _first_row(batch, heads.count, head, query_length)
            dense_offset = pair_offset(dense, batch, head)
            of_head = head_terms(terms, batch, head)
            for phase in tl.static_range(2 * attempt, 2 + attempt):
                if phase == 0:
                    run_start, run_stop = 0, whole
                elif phase == 1:
                    run_start, run_stop = whole, tile_stop - tile_start
                else:
                    run_start, run_stop = 0, tile_stop - tile_start
                for n in tl.range(
                    run_start, run_stop, num_stages=stages_of(STAGES, phase, FLAGS.MASK)
                ):
                    if phase == 0:
                        query_tile = full_start + n
                    else:
                        query_tile = nth_tile(n, tile_start, full_start, full_stop)
                    row = query_tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
                    row_inside = row < query_length
                    q_at = q_head + row.to(tl.int64) * q.stride_t
                    do_at = do_head + row.to(tl.int64) * do.stride_t
                    q_tile = load_tile(
                        q_at, q_desc, batch, head, query_tile * BLOCK_Q, row_inside, d,
                        phase == 0, D, BLOCK_Q, BLOCK_D,
                    )  # fmt: skip
                    do_tile = load_tile(
                        do_at, do_desc, batch, head, query_tile * BLOCK_Q, row_inside, d_v,
                        phase == 0, DV, BLOCK_Q, BLOCK_V,
                    )  # fmt: skip
                    rows_at = first_row + query_tile * BLOCK_Q
                    if lse_desc is not None:
                        lse = lse_desc.load([rows_at.to(tl.int32)])
                    else:
                        lse = tl.load(rows.lse_ptr + rows_at + tl.arange(0, BLOCK_Q))
                    if IN_PARTS:
                        s = _product_in_parts(
                            k_at, q_at, col_inside, row_inside,
                            D, BLOCK_D, BLOCK_K, BLOCK_Q, PRECISION,
                        )  # fmt: skip
                    else:
                        s = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
                    if dk.ptr is not None:
                        if delta_desc is not None:
                            delta = delta_desc.load([rows_at.to(tl.int32)])
                        else:
                            delta = tl.load(rows.delta_ptr + rows_at + tl.arange(0, BLOCK_Q))
                        if IN_PARTS:
                            dp = _product_in_parts(
                                v_at, do_at, col_inside, row_inside,
                                DV, BLOCK_V, BLOCK_K, BLOCK_Q, PRECISION,
                            )  # fmt: skip
                        else:
                            dp = tl.dot(v_tile, tl.trans(do_tile), input_precision=PRECISION)
                    seen = col_inside[:, None] & row_inside[None, :]
                    position = row + offset
                    if phase != 0:
                        seen = seen & visible(
                            row[None, :], position[None, :], col[:, None],
                            query_length, key_length, query_start[:, None], query_stop[:, None],
                            dense, dense_offset, left, right, FLAGS,
                        )  # fmt: skip
                    weight = 1.0
                    if rows.weight_ptr is not None:
                        weight = tl.load(rows.weight_ptr + rows_at + tl.arange(0, BLOCK_Q))[None, :]
                    p, d_cap = probabilities(
                        s, lse[None, :], weight, row[None, :], position[None, :], col[:, None],
                        seen, terms, of_head, phase != 0, FLAGS,
                    )  # fmt: skip
                    keep = seen
                    if FLAGS.DROPOUT:
                        keep = kept(dropout, batch, head, row[None, :], col[:, None])
                    if dv.ptr is not None:
                        dropped = p
                        if FLAGS.DROPOUT:
                            dropped = tl.where(keep, p * dropout.keep_scale, 0.0)
                        if phase == 2:
                            do_rows = do_head + query_tile.to(tl.int64) * BLOCK_Q * do.stride_t
                            dv_sum = seen_product(
                                dropped, do_tile, dv_sum, seen, do_rows + d_v, do.stride_t,
                                d_v < DV, PRECISION,
                            )  # fmt: skip
                        else:
                            dv_sum = tl.dot(
                                dropped.to(do_tile.dtype), do_tile, dv_sum,
                                input_precision=PRECISION,
                            )  # fmt: skip
                    if dk.ptr is not None:
                        ds = score_gradient(
                            p, dp, delta[None, :], keep, dropout.keep_scale, FLAGS.DROPOUT
                        )
                        if FLAGS.SOFTCAP:
                            ds = ds * d_cap
                        if phase == 2:
                            ds = tl.where(seen, ds, 0.0)
                            q_rows = q_head + query_tile.to(tl.int64) * BLOCK_Q * q.stride_t
                            dk_sum = seen_product(
                                ds, q_tile, dk_sum, seen, q_rows + d, q.stride_t,
                                d < D, PRECISION,
                            )  # fmt: skip
                        else:
                            dk_sum = tl.dot(
                                ds.to(q_tile.dtype), q_tile, dk_sum,
                                input_precision=PRECISION,
                            )  # fmt: skip
    if dk.ptr is not None:
        dk_at = head_ptr(dk, batch, key_head) + col.to(tl.int64) * dk.stride_t
        tl.store(
            dk_at[:, None] + d[None, :],
            (dk_sum * terms.scale).to(dk.ptr.dtype.element_ty),
            col_inside[:, None] & (d < D)[None, :],
        )
    if dv.ptr is not None:
        dv_at = head_ptr(dv, batch, key_head) + col.to(tl.int64) * dv.stride_t
        tl.store(
            dv_at[:, None] + d_v[None, :],
            dv_sum.to(dv.ptr.dtype.element_ty),
            col_inside[:, None] & (d_v < DV)[None, :],
        )


@triton.jit(do_not_specialize=_PER_TILE)
def _dq_kernel(
    q: Operand, k: Operand, v: Operand, do: Operand, rows: Rows,
    out: Operand, lse_ptr, d_lse: Operand,
    k_desc, v_desc, start_desc, stop_desc,
    of_keys: Intervals, dense: PerPair, terms: ScoreTerms, dropout: Dropout, marked_ptr,
    dq: Operand,
    heads: Heads, query_length, key_length, offset, left, right, interval_stride_b, tile_count,
    FLAGS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dQ, and what `Rows` says of the queries.

    The grid is query tiles x batch rows x query heads, parts of a row of q. With marks,
    programs of the first axis share the ``tile_count`` tiles, and may be fewer.

    Args:
        q: [B, Hq, Tq, D]. k: [B, Hk, Tk, D]. v: [B, Hk, Tk, Dv]. out, do: [B, Hq, Tq, Dv].
        lse_ptr: float32 [B, Hq, Tq]. d_lse: [B, Hq, Tq].
        dq: [B, Hq, Tq, D].
        k_desc, v_desc, start_desc, stop_desc: TMA descriptors of k, v and the intervals, or None.
        marked_ptr: None, or int8 [B, Hq, Tq]; tiles without a marked row stay as they are.
    """
    tiles = tl.cdiv(query_length, BLOCK_Q)
    first, step = tl.program_id(0), tl.num_programs(0)
    if marked_ptr is None:
        _dq_tile(
            tiles - 1 - first % tiles, first // tiles,
            q, k, v, do, rows, out, lse_ptr, d_lse, k_desc, v_desc, start_desc, stop_desc, of_keys,
            dense, terms, dropout, dq, heads, query_length, key_length, offset, left, right,
            interval_stride_b, FLAGS, D, DV, BLOCK_Q, BLOCK_K, BLOCK_D, BLOCK_V, STAGES, False,
        )  # fmt: skip
    else:
        # Mostly none is marked: what each tile needs stays inside of the loops.
        nth = tl.arange(0, _AT_ONCE)
        for start in tl.range(first, tile_count, step * _AT_ONCE, disable_licm=True):
            marks = _marks(marked_ptr, start + nth * step, tile_count, query_length, BLOCK_Q)
            for _ in tl.range(tl.sum(marks, 0), disable_licm=True):
                at = tl.min(tl.where(marks != 0, nth, _AT_ONCE), 0)
                marks = tl.where(nth == at, 0, marks)
                number = start + at * step
                _dq_tile(
                    number % tiles, number // tiles,
                    q, k, v, do, rows, out, lse_ptr, d_lse, k_desc, v_desc, start_desc, stop_desc,
                    of_keys, dense, terms, dropout, dq, heads, query_length, key_length, offset,
                    left, right, interval_stride_b, FLAGS, D, DV, BLOCK_Q, BLOCK_K, BLOCK_D,
                    BLOCK_V, STAGES, True,
                )  # fmt: skip


@triton.jit
def _dq_tile(
    tile, head_of_all,
    q, k, v, do, rows, out, lse_ptr, d_lse, k_desc, v_desc, start_desc, stop_desc,
    of_keys, dense, terms, dropout,
    dq, heads, query_length, key_length, offset, left, right, interval_stride_b,
    FLAGS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries; the query heads of all batch rows are counted through.

    AGAIN: it is known to hold NaN.
    """
    PRECISION: tl.constexpr = FLAGS.PRECISION
    IN_PARTS: tl.constexpr = (D > BLOCK_D) or (DV > BLOCK_V)
    query_tiles_all = tl.cdiv(query_length, BLOCK_Q)
    batch = (head_of_all // heads.count).to(tl.int64)
    head = (head_of_all % heads.count).to(tl.int64)
    key_head = head // heads.group
    row = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    row_inside = row < query_length
    position = row + offset
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    d_v = tl.arange(0, BLOCK_V)
    q_at = head_ptr(q, batch, head) + row.to(tl.int64) * q.stride_t
    do_at = head_ptr(do, batch, head) + row.to(tl.int64) * do.stride_t
    k_head = head_ptr(k, batch, key_head)
    v_head = head_ptr(v, batch, key_head)
    if not IN_PARTS:
        q_tile = tl.load(q_at[:, None] + d[None, :], row_inside[:, None] & (d < D)[None, :], 0.0)
        do_tile = tl.load(
            do_at[:, None] + d_v[None, :], row_inside[:, None] & (d_v < DV)[None, :], 0.0
        )
    delta = _delta(
        head_ptr(out, batch, head) + row.to(tl.int64) * out.stride_t, do_at, row_inside,
        DV, BLOCK_V, BLOCK_Q,
    )  # fmt: skip
    if d_lse.ptr is not None:
        d_lse_at = head_ptr(d_lse, batch, head) + row.to(tl.int64) * d_lse.stride_t
        delta -= tl.load(d_lse_at, row_inside, 0.0)
    lse_at = lse_ptr + (batch * heads.count + head) * query_length + row
    lse = tl.load(lse_at, row_inside, float("-inf"))
    delta = tl.where(lse == float("-inf"), 0.0, delta)
    lse = tl.where(lse == float("-inf"), 0.0, lse * (_LOG2E / unit(FLAGS.PLAIN)))
    rows_at = _first_row(batch, heads.count, head, query_length) + row
    if tl.program_id(1) == 0:
        tl.store(rows.lse_ptr + rows_at, lse)
        tl.store(rows.delta_ptr + rows_at, delta)
        if tile == query_tiles_all - 1:
            _clear_rows(rows, rows_at, query_length, tile, BLOCK_Q)
    ranges_at = of_keys.tiles_ptr
    if FLAGS.MASK == INTERVALS:
        ranges_at += batch_row(batch, query_tiles_all, interval_stride_b)
    dense_offset = pair_offset(dense, batch, head)
    of_head = head_terms(terms, batch, head)
    start = tile * BLOCK_Q + offset
    stop = tl.minimum(tile * BLOCK_Q + BLOCK_Q, query_length) + offset
    tile_start, tile_stop, full_start, full_stop = key_tiles(
        ranges_at, dense, tile, start, stop, key_length, left, right, FLAGS, BLOCK_K, FLAGS.UNIFORM
    )
    whole = full_stop - full_start
    dq_sum = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_Q], tl.float32)
    for phase in tl.static_range(2 if AGAIN else 0, phases(FLAGS.RESCUE)):
        if phase == 0:
            run_start, run_stop = 0, whole
        elif phase == 1:
            run_start, run_stop = whole, tile_stop - tile_start
        elif AGAIN:
            run_start, run_stop = 0, tile_stop - tile_start
        else:
            again = holds_nan(dq_sum, row_inside)
            run_start, run_stop = 0, tl.where(again, tile_stop - tile_start, 0)
            dq_sum = tl.where(again, 0.0, dq_sum)
            row_sum = tl.where(again, 0.0, row_sum)
        for n in tl.range(run_start, run_stop, num_stages=stages_of(STAGES, phase, FLAGS.MASK)):
            if phase == 0:
                key_tile = full_start + n
            else:
                key_tile = nth_tile(n, tile_start, full_start, full_stop)
            col = key_tile * BLOCK_K + tl.arange(0, BLOCK_K)
            col_inside = col < key_length
            k_at = k_head + col.to(tl.int64) * k.stride_t
            v_at = v_head + col.to(tl.int64) * v.stride_t
            k_tile = load_tile(
                k_at, k_desc, batch, key_head, key_tile * BLOCK_K, col_inside, d,
                phase == 0, D, BLOCK_K, BLOCK_D,
            )  # fmt: skip
            if IN_PARTS:
                s = _product_in_parts(
                    q_at, k_at, row_inside, col_inside,
                    D, BLOCK_D, BLOCK_Q, BLOCK_K, PRECISION,
                )  # fmt: skip
                dp = _product_in_parts(
                    do_at, v_at, row_inside, col_inside,
                    DV, BLOCK_V, BLOCK_Q, BLOCK_K, PRECISION,
                )  # fmt: skip
            else:
                v_tile = load_tile(
                    v_at, v_desc, batch, key_head, key_tile * BLOCK_K, col_inside, d_v,
                    phase == 0, DV, BLOCK_K, BLOCK_V,
                )  # fmt: skip
                s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
                dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION)
            seen = row_inside[:, None] & col_inside[None, :]
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
            p, d_cap = probabilities(
                s, lse[:, None], 1.0, row[:, None], position[:, None], col[None, :], seen,
                terms, of_head, phase != 0, FLAGS,
            )  # fmt: skip
            if rows.weight_ptr is not None:
                row_sum += tl.sum(p, 1)
            keep = seen
            if FLAGS.DROPOUT:
                keep = kept(dropout, batch, head, row[:, None], col[None, :])
            ds = score_gradient(p, dp, delta[:, None], keep, dropout.keep_scale, FLAGS.DROPOUT)
            if FLAGS.SOFTCAP:
                ds = ds * d_cap
            if phase == 2:
                ds = tl.where(seen, ds, 0.0)
                k_rows = k_head + key_tile.to(tl.int64) * BLOCK_K * k.stride_t + d
                dq_sum = seen_product(
                    ds, k_tile, dq_sum, seen, k_rows, k.stride_t, d < D, PRECISION
                )
            else:
                dq_sum = tl.dot(ds.to(k_tile.dtype), k_tile, dq_sum, input_precision=PRECISION)
    if rows.weight_ptr is not None:
        weight = 1 / tl.where(row_sum == 0, 1.0, row_sum)
        dq_sum *= weight[:, None]
        if tl.program_id(1) == 0:
            tl.store(rows.weight_ptr + rows_at, weight)
    dq_at = head_ptr(dq, batch, head) + row.to(tl.int64) * dq.stride_t
    tl.store(
        dq_at[:, None] + d[None, :],
        (dq_sum * terms.scale).to(dq.ptr.dtype.element_ty),
        row_inside[:, None] & (d < D)[None, :],
    )


@triton.jit(do_not_specialize=_PER_LENGTH)
def _dbias_kernel(
    q: Operand, k: Operand, v: Operand, do: Operand, rows: Rows,
    of_keys: Intervals, dense: PerPair, terms: ScoreTerms, dropout: Dropout, d_bias_ptr,
    heads: Heads, query_length, key_length, offset, left, right, interval_stride_b, bias: BiasShape,
    FLAGS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile of the bias, summed over every axis where the bias has size 1.

    The grid is tiles of the bias x its batch rows x its heads.

    Args:
        q: [B, Hq, Tq, D]. k: [B, Hk, Tk, D]. v: [B, Hk, Tk, Dv]. do: [B, Hq, Tq, Dv].
        d_bias_ptr: the shape of the bias, without gaps.
    """
    PRECISION: tl.constexpr = FLAGS.PRECISION
    col_tiles = tl.cdiv(bias.keys, BLOCK_K)
    row_tiles = tl.cdiv(bias.queries, BLOCK_Q)
    program = tl.program_id(0)
    at_col = program % col_tiles
    at_row = program // col_tiles % row_tiles
    bias_row = program // col_tiles // row_tiles
    at_batch = bias_row // bias.heads
    at_head = bias_row % bias.heads
    batch_stop, head_stop, row_stop, col_stop = at_batch + 1, at_head + 1, at_row + 1, at_col + 1
    if bias.batch == 1:
        batch_stop = bias.all_batch
    if bias.heads == 1:
        head_stop = heads.count
    if bias.queries == 1:
        row_stop = tl.cdiv(query_length, BLOCK_Q)
    if bias.keys == 1:
        col_stop = tl.cdiv(key_length, BLOCK_K)
    total = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for b in range(at_batch, batch_stop):
        batch = tl.full([], b, tl.int64)
        for h in range(at_head, head_stop):
            head = tl.full([], h, tl.int64)
            q_head = head_ptr(q, batch, head)
            k_head = head_ptr(k, batch, head // heads.group)
            v_head = head_ptr(v, batch, head // heads.group)
            do_head = head_ptr(do, batch, head)
            ranges_at = of_keys.tiles_ptr
            if FLAGS.MASK == INTERVALS:
                ranges_at += batch_row(batch, tl.cdiv(query_length, BLOCK_Q), interval_stride_b)
            dense_offset = pair_offset(dense, batch, head)
            of_head = head_terms(terms, batch, head)
            for row_tile in range(at_row, row_stop):
                row = row_tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
                row_inside = row < query_length
                position = row + offset
                rows_at = _first_row(batch, heads.count, head, query_length) + row
                lse = tl.load(rows.lse_ptr + rows_at)
                delta = tl.load(rows.delta_ptr + rows_at)
                weight = 1.0
                if rows.weight_ptr is not None:
                    weight = tl.load(rows.weight_ptr + rows_at)[:, None]
                start = row_tile * BLOCK_Q + offset
                stop = tl.minimum(row_tile * BLOCK_Q + BLOCK_Q, query_length) + offset
                tile_start, tile_stop, full_start, full_stop = key_tiles(
                    ranges_at, dense, row_tile, start, stop, key_length, left, right,
                    FLAGS, BLOCK_K,
                )  # fmt: skip
                run_start = tl.maximum(tile_start, at_col)
                run_stop = tl.minimum(tile_stop, col_stop)
                for key_tile in range(run_start, run_stop):
                    col = key_tile * BLOCK_K + tl.arange(0, BLOCK_K)
                    col_inside = col < key_length
                    s = _product_in_parts(
                        q_head + row.to(tl.int64) * q.stride_t,
                        k_head + col.to(tl.int64) * k.stride_t,
                        row_inside, col_inside, D, BLOCK_D, BLOCK_Q, BLOCK_K, PRECISION,
                    )  # fmt: skip
                    dp = _product_in_parts(
                        do_head + row.to(tl.int64) * do.stride_t,
                        v_head + col.to(tl.int64) * v.stride_t,
                        row_inside, col_inside, DV, BLOCK_V, BLOCK_Q, BLOCK_K, PRECISION,
                    )  # fmt: skip
                    query_start, query_stop = intervals(
                        of_keys, None, None, batch * interval_stride_b, key_tile * BLOCK_K,
                        key_length, FLAGS, BLOCK_K,
                    )  # fmt: skip
                    seen = (row_inside[:, None] & col_inside[None, :]) & visible(
                        row[:, None], position[:, None], col[None, :], query_length, key_length,
                        query_start[None, :], query_stop[None, :], dense, dense_offset,
                        left, right, FLAGS,
                    )  # fmt: skip
                    p, d_cap = probabilities(
                        s, lse[:, None], weight, row[:, None], position[:, None], col[None, :],
                        seen, terms, of_head, True, FLAGS,
                    )  # fmt: skip
                    keep = seen
                    if FLAGS.DROPOUT:
                        keep = kept(dropout, batch, head, row[:, None], col[None, :])
                    ds = score_gradient(
                        p, dp, delta[:, None], keep, dropout.keep_scale, FLAGS.DROPOUT
                    )
                    total += tl.where(seen, ds, 0.0)
    out_row = at_row * BLOCK_Q + tl.arange(0, BLOCK_Q)
    out_col = at_col * BLOCK_K + tl.arange(0, BLOCK_K)
    if bias.queries == 1:
        total = tl.where((out_row == 0)[:, None], tl.sum(total, 0)[None, :], 0.0)
    if bias.keys == 1:
        total = tl.where((out_col == 0)[None, :], tl.sum(total, 1)[:, None], 0.0)
    at = bias_row.to(tl.int64) * bias.queries + out_row.to(tl.int64)
    tl.store(
        d_bias_ptr + at[:, None] * bias.keys + out_col[None, :],
        total.to(d_bias_ptr.dtype.element_ty),
        (out_row < bias.queries)[:, None] & (out_col < bias.keys)[None, :],
    )
