"""The backward of Hopper GPUs for intervals, and head dims above 128: dQ, in tiles of 128 queries.

A program goes through the keys that its queries see, as in the forward. Each of two consumers of
four warps has 64 queries: it computes S and dP of them, and adds dS K to dQ in its registers. While
one computes dS, the products of the other run. A producer, one warp, copies tiles by TMA.

S and dP are computed here and with dK and dV: 7 products for 5. Above head dim 128, one kernel for
all gradients would add 64 KiB of dQ for each 64 x 64 pairs, for which the L2 cache takes longer
than the two products. With intervals, programs that take turns would wait for each other.

Named barriers, behind those of Triton: for each stage, that its keys may be overwritten; for each,
that its values may.
"""

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
    tma_store,
    tma_store_read,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from hf_flash_two.kernels.hopper.parts import tile_of
from hf_flash_two.kernels.hopper.scores import (
    allocate,
    copy,
    expect_keys,
    visible_scores,
    work_of,
)
from hf_flash_two.kernels.hopper.tile import (
    INTERVALS,
    arrive,
    exponent_factor,
    keep_bits,
    modified,
    nth_tile,
    sync,
)
from hf_flash_two.kernels.params import LOG2E
from hf_flash_two.kernels.triton.args import Dropout, PerHead

_LOG2E = gl.constexpr(LOG2E)
_ROWS = gl.constexpr(ROWS)
_CONSUMERS = gl.constexpr(2)
_THREADS = gl.constexpr(288)
_NAMED = gl.constexpr(5)


@jit
def _producer(
    FLAGS: gl.constexpr,
    q_desc, do_desc, k_desc, v_desc, run_desc, ranges_ptr,
    q_s, do_s, k_s, v_s, run_s, q_full, do_full, k_full, v_full,
    heads, group, query_length, key_length, offset, left, right, row_tiles, head_tiles, together,
):  # fmt: skip
    """The warp that copies tiles into shared memory: Q and dO once, then keys and values."""
    BLOCK_K: gl.constexpr = k_s.shape[1]
    K_STAGES: gl.constexpr = k_s.shape[0]
    V_STAGES: gl.constexpr = v_s.shape[0]
    tile, batch, head, total, masked, tile_start, full_start, full_stop = work_of(
        gl.program_id(0), ranges_ptr, heads, query_length, key_length, offset, left, right,
        row_tiles, head_tiles, together, FLAGS, BLOCK_K,
    )  # fmt: skip
    for n in range(total):
        key_tile = nth_tile(n, masked, tile_start, full_start, full_stop)
        stage = n % K_STAGES
        full = k_full.index(stage)
        if n >= K_STAGES:
            sync(_NAMED + stage, _THREADS, 1)
        expect_keys(
            full, k_desc.block_type.nbytes, run_desc, key_length, batch, key_tile,
            run_s, stage, n < masked, FLAGS,
        )  # fmt: skip
        copy(k_desc, batch, head // group, key_tile * BLOCK_K, 0, full, k_s.index(stage))
        if n == 0:
            for w in gl.static_range(_CONSUMERS):
                first_row = (tile * _CONSUMERS + w) * _ROWS
                mbarrier.expect(q_full.index(w), q_desc.block_type.nbytes)
                copy(q_desc, batch, head, first_row, 0, q_full.index(w), q_s.index(w))
                mbarrier.expect(do_full.index(w), do_desc.block_type.nbytes)
                copy(do_desc, batch, head, first_row, 0, do_full.index(w), do_s.index(w))
        stage = n % V_STAGES
        full = v_full.index(stage)
        if n >= V_STAGES:
            sync(_NAMED + K_STAGES + stage, _THREADS, 1)
        mbarrier.expect(full, v_desc.block_type.nbytes)
        copy(v_desc, batch, head // group, key_tile * BLOCK_K, 0, full, v_s.index(stage))


@jit
def _step(
    n, masked, key_tile, dq, q_s, do_s, k_s, v_s, run_s, k_full, v_full, lse, delta,
    row, position, head, batch, key_length, left, right, scale, softcap, slope, factor,
    seed_ptr, threshold, keep_scale, FLAGS: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """Adds to dQ what comes from one tile of keys."""
    BLOCK_K: gl.constexpr = k_s.shape[1]
    K_STAGES: gl.constexpr = k_s.shape[0]
    V_STAGES: gl.constexpr = v_s.shape[0]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    LEFT_FACTOR: gl.constexpr = gl.DotOperandLayout(0, dq.type.layout, 2)
    zeros = gl.zeros((_ROWS, BLOCK_K), gl.float32, SCORES)
    # 0, but not known to be: what tells the products where their factors lie would be worked out
    # before the loop, and fill the registers.
    zero = n >> 30
    q, do = q_s.index(W + zero), do_s.index(W + zero)
    stage, v_stage = n % K_STAGES, n % V_STAGES + zero
    k, v, run = k_s.index(stage), v_s.index(v_stage), run_s.index(stage)
    mbarrier.wait(k_full.index(stage), n // K_STAGES & 1)
    s = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(v_stage), n // V_STAGES & 1)
    dp = warpgroup_mma(do, v.permute((1, 0)), zeros, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    col = key_tile * BLOCK_K + gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, SCORES))
    s, d_cap = modified(s, position[:, None], col[None, :], scale, softcap, slope, FLAGS)
    if n < masked:
        s = visible_scores(s, position, key_tile, key_length, left, right, run, FLAGS)
    p = gl.exp2(s * factor - lse[:, None])
    if FLAGS.SOFTCAP:
        p = p * d_cap
    dp = warpgroup_mma_wait(0, deps=(dp,))
    arrive(_NAMED + K_STAGES + v_stage, _THREADS, 4)
    if FLAGS.DROPOUT:
        kept = keep_bits(seed_ptr, threshold, batch, head, row[:, None], col[None, :])
        dp = gl.where(kept, dp * keep_scale, 0.0)
    ds = gl.convert_layout((p * (dp - delta[:, None])).to(k.dtype), LEFT_FACTOR)
    dq = warpgroup_mma(ds, k, dq, is_async=True)
    dq, ds = warpgroup_mma_wait(0, deps=(dq, ds))
    arrive(_NAMED + stage, _THREADS, 4)
    return dq


@jit
def _consumer(
    FLAGS: gl.constexpr, W: gl.constexpr,
    dq_desc, rows_ptr, rows_size, marked_ptr, ranges_ptr, slopes_ptr, slopes_b, slopes_h,
    seed_ptr, threshold, keep_scale,
    q_s, do_s, k_s, v_s, run_s, q_full, do_full, k_full, v_full,
    scale, softcap, heads,
    query_length, key_length, offset, left, right, row_tiles, head_tiles, together,
):  # fmt: skip
    """dQ of 64 queries."""
    BLOCK_K: gl.constexpr = k_s.shape[1]
    D: gl.constexpr = k_s.shape[2]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    DQ: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    tile, batch, head, total, masked, tile_start, full_start, full_stop = work_of(
        gl.program_id(0), ranges_ptr, heads, query_length, key_length, offset, left, right,
        row_tiles, head_tiles, together, FLAGS, BLOCK_K,
    )  # fmt: skip
    first_row = (tile * _CONSUMERS + W) * _ROWS
    row = first_row + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, SCORES))
    at = rows_ptr + (batch * heads + head).to(gl.int64) * (row_tiles * _CONSUMERS * _ROWS) + row
    lse, delta = gl.load(at), gl.load(at + rows_size)
    if not FLAGS.PLAIN:
        lse = lse * _LOG2E
    slope = 0.0
    if FLAGS.ALIBI:
        slope = gl.load(slopes_ptr + batch * slopes_b + head * slopes_h)
    factor = exponent_factor(scale, FLAGS)
    dq = gl.zeros((_ROWS, D), gl.float32, DQ)
    mbarrier.wait(q_full.index(W), 0)
    mbarrier.wait(do_full.index(W), 0)
    for n in range(total):
        dq = _step(
            n, masked, nth_tile(n, masked, tile_start, full_start, full_stop), dq,
            q_s, do_s, k_s, v_s, run_s, k_full, v_full, lse, delta,
            row, row + offset, head, batch, key_length, left, right,
            scale, softcap, slope, factor, seed_ptr, threshold, keep_scale, FLAGS, W,
        )  # fmt: skip
    if FLAGS.RESCUE:
        spoiled = gl.max((dq != dq).to(gl.int32), 1)
        row = first_row + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, DQ))
        marked_at = marked_ptr + (batch * heads + head).to(gl.int64) * query_length + row
        gl.store(marked_at, spoiled.to(gl.int8), row < query_length)
    q = q_s.index(W)
    q.store((dq * scale).to(q.dtype))
    fence_async_shared()
    barrier()
    tma_store(dq_desc, [batch, head, first_row, 0], tile_of(dq_desc, q))
    tma_store_read(0)


@jit(do_not_specialize=[
    "rows_size", "heads", "group", "query_length", "key_length", "offset", "left", "right",
    "row_tiles", "head_tiles", "together",
])  # fmt: skip
def queries_kernel(
    q_desc, do_desc, k_desc, v_desc, dq_desc, run_desc, rows_ptr, ranges_ptr, marked_ptr,
    slopes: PerHead, dropout: Dropout,
    rows_size, scale, softcap, heads, group,
    query_length, key_length, offset, left, right, row_tiles, head_tiles, together,
    FLAGS: gl.constexpr,
):  # fmt: skip
    """dQ of 128 queries.

    The grid is tiles of queries x batch rows x query heads, see `scores.work_of`.

    Args:
        q_desc, do_desc, dq_desc: of [B, Hq, Tq, D or Dv], tiles of 64 rows.
        k_desc, v_desc: of [B, Hk, Tk, D or Dv]. run_desc, ranges_ptr: see `attend_kernel`.
        rows_ptr: float32 [2, B, Hq, padded Tq], see `rows.prepare_kernel`. rows_size: of each half.
        marked_ptr: int8 [B, Hq, Tq] or None, see `triton.backward.replace_marked`.
        row_tiles: of one head. head_tiles: B * Hq. together: see `attend_kernel`.
        FLAGS: `config.ForwardFlags`.
    """
    BLOCK_K: gl.constexpr = k_desc.block_type.shape[2]
    D: gl.constexpr = k_desc.block_type.shape[3]
    DV: gl.constexpr = v_desc.block_type.shape[3]
    DTYPE: gl.constexpr = q_desc.dtype
    LINEAR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    V_STAGES: gl.constexpr = 1 if DV == 256 else 2
    q_s = allocate(DTYPE, _CONSUMERS, _ROWS, D)
    do_s = allocate(DTYPE, _CONSUMERS, _ROWS, DV)
    k_s = allocate(DTYPE, 2, BLOCK_K, D)
    v_s = allocate(DTYPE, V_STAGES, BLOCK_K, DV)
    # What a call has none of is another thing at compile time, and unused.
    run_s = q_s
    if FLAGS.MASK == INTERVALS:
        run_s = gl.allocate_shared_memory(gl.int32, [2, 2 * BLOCK_K], LINEAR)
    else:
        run_desc, ranges_ptr = q_desc, rows_ptr
    if not FLAGS.RESCUE:
        marked_ptr = rows_ptr
    slopes_ptr, seed_ptr = slopes.ptr, dropout.seed_ptr
    if not FLAGS.ALIBI:
        slopes_ptr = rows_ptr
    if not FLAGS.DROPOUT:
        seed_ptr = rows_ptr
    q_full, do_full = allocate_barriers(_CONSUMERS, 1), allocate_barriers(_CONSUMERS, 1)
    k_full, v_full = allocate_barriers(2, 1), allocate_barriers(V_STAGES, 1)
    flags: gl.constexpr = FLAGS
    of_producer = (
        q_desc, do_desc, k_desc, v_desc, run_desc, ranges_ptr,
        q_s, do_s, k_s, v_s, run_s, q_full, do_full, k_full, v_full, heads, group,
        query_length, key_length, offset, left, right, row_tiles, head_tiles, together,
    )  # fmt: skip
    of_consumer = (
        dq_desc, rows_ptr, rows_size, marked_ptr, ranges_ptr,
        slopes_ptr, slopes.stride_b, slopes.stride_h,
        seed_ptr, dropout.threshold, dropout.keep_scale,
        q_s, do_s, k_s, v_s, run_s, q_full, do_full, k_full, v_full, scale, softcap, heads,
        query_length, key_length, offset, left, right, row_tiles, head_tiles, together,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_consumer, (flags, 0) + of_consumer),
            (_consumer, (flags, 1) + of_consumer),
            (_producer, (flags,) + of_producer),
        ],
        [4, 1],
        [240, 24],
    )
