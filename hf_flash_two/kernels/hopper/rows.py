"""The small kernels of the backward: what the others need of each row, and dQ of its sum.

`prepare` computes delta and turns lse into what the kernel reads; `convert` makes dQ of its sum.
"""

# What stands in a kernel is Triton's language, which its types do not describe.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from hf_flash_two.kernels.hopper.schedule import ROW_MULTIPLE
from hf_flash_two.kernels.params import LOG2E
from hf_flash_two.kernels.triton.args import Operand
from hf_flash_two.kernels.triton.tile import head_ptr, unit

_LOG2E = tl.constexpr(LOG2E)
_ROW_MULTIPLE = tl.constexpr(ROW_MULTIPLE)

ROWS = 64
"""Rows of a program of `prepare` and of `convert`."""


@triton.jit(do_not_specialize=["query_length"])
def prepare_kernel(
    out: Operand, do: Operand, lse_ptr, d_lse: Operand, rows_ptr, counter_ptr, dq_sum_ptr,
    heads, query_length, rows_size,
    PLAIN: tl.constexpr, DV: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`triton.args.Rows` of one tile of queries; and zeros.

    The grid is tiles of the padded queries x batch rows x query heads.

    Args:
        out, do: [B, Hq, Tq, Dv]. lse_ptr: [B, Hq, Tq]. d_lse: [B, Hq, Tq] or None.
        rows_ptr: [2, B, Hq, padded Tq], lse and delta.
        counter_ptr: [B, Hq, padded Tq / BLOCK_Q]. dq_sum_ptr: [B, Hq, padded Tq, BLOCK_D].
            None where neither is needed, or dQ need not begin at 0.
        rows_size: B * Hq * padded Tq.
    """
    program = tl.program_id(0)
    tiles = tl.cdiv(query_length, _ROW_MULTIPLE) * (_ROW_MULTIPLE // ROWS)
    row = program % tiles * ROWS + tl.arange(0, ROWS)
    batch = (program // tiles // heads).to(tl.int64)
    head = (program // tiles % heads).to(tl.int64)
    inside = row < query_length
    d = tl.arange(0, BLOCK_V)
    both = inside[:, None] & (d < DV)[None, :]
    out_at = head_ptr(out, batch, head) + row.to(tl.int64) * out.stride_t
    do_at = head_ptr(do, batch, head) + row.to(tl.int64) * do.stride_t
    out_tile = tl.load(out_at[:, None] + d[None, :], both, 0.0).to(tl.float32)
    do_tile = tl.load(do_at[:, None] + d[None, :], both, 0.0).to(tl.float32)
    delta = tl.sum(out_tile * do_tile, 1)
    # A row that sees sinks only is all 0, and what arrives for it, NaN perhaps, is of no account.
    delta = tl.where(tl.max(tl.abs(out_tile), 1) == 0, 0.0, delta)
    if d_lse.ptr is not None:
        d_lse_at = head_ptr(d_lse, batch, head) + row.to(tl.int64) * d_lse.stride_t
        delta -= tl.load(d_lse_at, inside, 0.0)
    lse = tl.load(lse_ptr + (batch * heads + head) * query_length + row, inside, float("-inf"))
    delta = tl.where(lse == float("-inf"), 0.0, delta)
    lse = tl.where(lse == float("-inf"), 0.0, lse * (_LOG2E / unit(PLAIN)))
    # Behind the last row all probabilities are 0, whatever ALiBi adds to the scores of zeros.
    lse = tl.where(inside, lse, float("inf"))
    at = rows_ptr + program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tl.store(at, lse)
    tl.store(at + rows_size, delta)
    if counter_ptr is not None:
        if program % (BLOCK_Q // ROWS) == 0:
            tl.store(counter_ptr + program // (BLOCK_Q // ROWS), 0)
    if dq_sum_ptr is not None:
        dq_at = dq_sum_ptr + program.to(tl.int64) * (ROWS * BLOCK_D)
        tl.store(dq_at + tl.arange(0, ROWS * BLOCK_D), tl.zeros([ROWS * BLOCK_D], tl.float32))


@triton.jit(do_not_specialize=["query_length"])
def convert_kernel(
    dq_sum_ptr, counter_ptr, marked_ptr, dq: Operand,
    heads, query_length, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, ROWS: tl.constexpr,
    ORDERED: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries.

    The grid is tiles of queries x batch rows x query heads.

    Args:
        marked_ptr: int8 [B, Hq, Tq] or None, see `triton.backward.replace_marked`.
    """
    program = tl.program_id(0)
    tiles = tl.cdiv(query_length, ROWS)
    padded = tl.cdiv(query_length, _ROW_MULTIPLE) * (_ROW_MULTIPLE // ROWS)
    tile = program % tiles
    batch = (program // tiles // heads).to(tl.int64)
    head = (program // tiles % heads).to(tl.int64)
    at = (batch * heads + head) * padded + tile
    row = tile * ROWS + tl.arange(0, ROWS)
    dq_at = head_ptr(dq, batch, head) + row.to(tl.int64) * dq.stride_t
    PIECES: tl.constexpr = BLOCK_D // 64
    marked = tl.zeros([ROWS], tl.int32)
    for piece in tl.static_range(PIECES):
        # The bits of a number's place, see `gradients._step`.
        x = tl.load(dq_sum_ptr + (at * PIECES + piece) * 4096 + tl.arange(0, 4096))
        x = x.reshape(2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2)
        x = x.permute(3, 4, 10, 5, 6, 7, 0, 1, 2, 8, 9, 11).reshape(64, 64)
        if ORDERED:
            # A tile that sees nothing has never been stored.
            x = tl.where(tl.load(counter_ptr + at // (BLOCK_Q // ROWS)) == 0, 0.0, x)
        if marked_ptr is not None:
            marked = tl.maximum(marked, tl.max((x != x).to(tl.int32), 1))
        d = piece * 64 + tl.arange(0, 64)
        tl.store(
            dq_at[:, None] + d[None, :], (x * scale).to(dq.ptr.dtype.element_ty),
            (row < query_length)[:, None] & (d < D)[None, :],
        )  # fmt: skip
    if marked_ptr is not None:
        marked_at = marked_ptr + (batch * heads + head) * query_length + row
        tl.store(marked_at, marked.to(tl.int8), row < query_length)
