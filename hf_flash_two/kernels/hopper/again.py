"""Rows of the forward that came out as NaN, computed again without what the mask hides."""

# What stands in a kernel is Triton's language, which its types do not describe.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

from hf_flash_two.kernels.hopper.config import ROWS
from hf_flash_two.kernels.hopper.gluon import (
    allocate_barriers,
    barrier,
    fence_async_shared,
    gl,
    jit,
    mbarrier,
    tma_store_read,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from hf_flash_two.kernels.hopper.scores import (
    allocate,
    copy,
    copy_rows,
    copy_runs,
    dropped,
    masked_scores,
    product,
    rows_of,
    store_rows,
    work_of,
)
from hf_flash_two.kernels.hopper.tile import INTERVALS, exponent_factor, nth_tile
from hf_flash_two.kernels.params import LOG2E
from hf_flash_two.kernels.triton.args import PerHead

_LOG2E = gl.constexpr(LOG2E)
_ROWS = gl.constexpr(ROWS)
_COLUMNS = gl.constexpr(64)


@jit(do_not_specialize=[
    "threshold", "heads", "group", "query_length", "key_length", "offset", "left", "right",
    "row_tiles", "head_tiles", "together",
])  # fmt: skip
def attend_again_kernel(
    q_desc, q_rest, k_desc, k_rest, v_desc, out_desc, run_desc,
    lse_ptr, ranges_ptr, slopes: PerHead, seed_ptr, marks_ptr,
    scale, softcap, threshold, keep_scale, heads, group,
    query_length, key_length, offset, left, right, row_tiles, head_tiles, together,
    FLAGS: gl.constexpr, VALUE_DIM: gl.constexpr,
):  # fmt: skip
    """The output of marked rows, 64 rows and 64 columns at a time.

    Products of a tile add 0 for each hidden pair, but 0 times NaN or infinity is NaN. Here values
    that are not finite are taken out of the product and added to the rows that see them: a second
    product, with codes in the place of values, tells which rows see which.

    Args:
        v_desc, out_desc: tiles of 64 columns. marks_ptr: ``tickets_ptr`` of `attend_kernel`, which
            has the others too.
    """
    BLOCK_K: gl.constexpr = k_desc.block_type.shape[2]
    D: gl.constexpr = q_desc.block_type.shape[4]
    DTYPE: gl.constexpr = q_desc.dtype
    PARTS: gl.constexpr = (VALUE_DIM + _COLUMNS - 1) // _COLUMNS
    RUN_BYTES: gl.constexpr = 8 * BLOCK_K if FLAGS.MASK == INTERVALS else 0
    BYTES: gl.constexpr = 2 * BLOCK_K * (D + FLAGS.D_REST + _COLUMNS) + RUN_BYTES
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _COLUMNS, 16])
    LEFT_FACTOR: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    VALUES: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    q = allocate(DTYPE, 1, _ROWS, D).index(0)
    k = allocate(DTYPE, 1, BLOCK_K, D).index(0)
    q_more, k_more = q, k
    if FLAGS.D_REST > 0:
        q_more = allocate(DTYPE, 1, _ROWS, FLAGS.D_REST).index(0)
        k_more = allocate(DTYPE, 1, BLOCK_K, FLAGS.D_REST).index(0)
    v = allocate(DTYPE, 1, BLOCK_K, _COLUMNS).index(0)
    codes = allocate(DTYPE, 1, BLOCK_K, _COLUMNS).index(0)
    place = allocate(DTYPE, 1, _ROWS, _COLUMNS).index(0)
    run = q
    if FLAGS.MASK == INTERVALS:
        LINEAR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        run = gl.allocate_shared_memory(gl.int32, [1, 2 * BLOCK_K], LINEAR).index(0)
    q_full = allocate_barriers(1, 1).index(0)
    full = allocate_barriers(1, 1).index(0)
    factor = exponent_factor(scale, FLAGS)
    zeros = gl.zeros((_ROWS, BLOCK_K), gl.float32, SCORES)
    nothing = gl.zeros((_ROWS, _COLUMNS), gl.float32, OUT)
    count = 0
    if gl.load(marks_ptr + 1) != 0:
        count = row_tiles * head_tiles * FLAGS.CONSUMERS
    copied = 0
    done = 0
    for number in range(gl.program_id(0), count, gl.num_programs(0)):
        if gl.load(marks_ptr + 2 + number) != 0:
            work = number // FLAGS.CONSUMERS
            of_work = number - work * FLAGS.CONSUMERS
            tile, batch, first_head, total, masked, tile_start, full_start, full_stop = work_of(
                work, ranges_ptr, heads, query_length, key_length, offset, left, right,
                row_tiles, head_tiles, together, FLAGS, BLOCK_K,
            )  # fmt: skip
            key_head = first_head // group
            first_row = (tile * FLAGS.CONSUMERS + of_work) * _ROWS
            row, head_row, head = rows_of(
                tile, first_head, gl.SliceLayout(1, SCORES), FLAGS, of_work
            )
            lse_at = lse_ptr + (batch * heads + head_row).to(gl.int64) * query_length + row
            lse = gl.load(lse_at, row < query_length, 0.0) * _LOG2E
            position = row + offset
            slope = 0.0
            if FLAGS.ALIBI:
                slope = gl.load(slopes.ptr + batch * slopes.stride_b + head * slopes.stride_h)
            mbarrier.expect(q_full, 2 * _ROWS * (D + FLAGS.D_REST))
            copy_rows(q_desc, batch, first_head, first_row, 0, q_full, q)
            if FLAGS.D_REST > 0:
                copy_rows(q_rest, batch, first_head, first_row, D, q_full, q_more)
            mbarrier.wait(q_full, done & 1)
            done += 1
            for part in range(PARTS):
                acc = nothing
                for n in range(total):
                    key_tile = nth_tile(n, masked, tile_start, full_start, full_stop)
                    key_row = key_tile * BLOCK_K
                    column = part * _COLUMNS
                    mbarrier.expect(full, BYTES)
                    copy(k_desc, batch, key_head, key_row, 0, full, k)
                    if FLAGS.D_REST > 0:
                        copy(k_rest, batch, key_head, key_row, D, full, k_more)
                    copy(v_desc, batch, key_head, key_row, column, full, v)
                    if FLAGS.MASK == INTERVALS:
                        copy_runs(run_desc, key_length, batch, key_tile, full, run, FLAGS)
                    mbarrier.wait(full, copied & 1)
                    copied += 1
                    s = product(q, q_more, k, k_more, zeros, FLAGS)
                    s = warpgroup_mma_wait(0, deps=(s,))
                    seen = masked_scores(
                        zeros, position, key_tile, key_length, left, right, run, scale, softcap,
                        slope, True, FLAGS,
                    )  # fmt: skip
                    seen = seen > float("-inf")
                    s = masked_scores(
                        s, position, key_tile, key_length, left, right, run, scale, softcap, slope,
                        True, FLAGS,
                    )  # fmt: skip
                    prob = gl.where(seen, gl.exp2(s * factor - lse[:, None]), 0.0)
                    if FLAGS.DROPOUT:
                        prob = dropped(prob, seed_ptr, threshold, batch, head, row, key_tile)
                    value = v.load(VALUES)
                    wide = value.to(gl.float32)
                    code = gl.where(
                        wide == float("inf"), 2.0**-8, gl.where(wide == float("-inf"), 1.0, 2.0**8)
                    )
                    finite = gl.abs(wide) < float("inf")
                    v.store(gl.where(finite, wide, 0.0).to(DTYPE))
                    codes.store(gl.where(finite, 0.0, code).to(DTYPE))
                    fence_async_shared()
                    barrier()
                    p = gl.convert_layout(prob.to(DTYPE), LEFT_FACTOR)
                    sees = gl.convert_layout(gl.where(seen, 1.0, 0.0).to(DTYPE), LEFT_FACTOR)
                    acc = warpgroup_mma(p, v, acc, is_async=True)
                    strange = warpgroup_mma(sees, codes, nothing, use_acc=False, is_async=True)
                    acc, strange, p, sees = warpgroup_mma_wait(0, deps=(acc, strange, p, sees))
                    whole = gl.floor(strange)
                    acc += gl.where(strange > whole, float("inf"), 0.0)
                    acc += gl.where(whole % 256 > 0, float("-inf"), 0.0)
                    acc += gl.where(strange >= 256, float("nan"), 0.0)
                    # What is read here is overwritten by the next copies.
                    barrier()
                place.store((acc * keep_scale).to(DTYPE))
                fence_async_shared()
                barrier()
                store_rows(out_desc, batch, first_head, first_row, part * _COLUMNS, place)
                tma_store_read(0)
                barrier()
