"""The backward of Hopper GPUs up to head dim 128: dK, dV and mostly dQ of one tile of keys.

Source: Shah et al. 2024, arXiv:2407.08608, and the order of FlashAttention-4's ``flash_bwd_sm90``.
One program is one tile of 128 keys of one key head. It goes through the queries that see them,
of all query heads of the group, in tiles of `BLOCK_Q` rows. Its warps have four parts:

- two consumers of four warps, each of 64 keys: they keep dK and dV of these in registers;
- a producer: copies K and V once, and Q, dO and `Rows` of each tile of queries;
- two store warps: add each tile's dQ, in turns, to a float32 sum in global memory. While one waits
  until its part has reached memory, so that the next program may add, the other has the next tile.

Where `queries` computes dQ, there are no such warps, and the consumers hand each other nothing.

Scores are computed transposed, so that P^T and dS^T multiply from registers. Both consumers write
their dS into one tile, and each computes a half of dQ from all 128 keys: half as many bytes are
added as if each had its own. dQ is added in pieces of 64 x 64 in the order in which the product
leaves them in registers, which `rows.convert_kernel` undoes. `schedule` has their order.

Barriers. Of TMA: mbarriers. Between warps: named barriers, since an mbarrier's arrival costs four
warps two more barriers; Triton itself takes 0 to 5, and would take 6 for a part that it adds, had
that any code. 6, 7: a stage of Q is free; 14, 15: one of dO; 8: both consumers have written dS, or
are done with K; 10, 11: the first half of dQ is ready, for one store warp or the other; 12, 13: the
second half.
"""

# What stands in a kernel is Triton's language, which its types do not describe.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

from typing import Any, NamedTuple

from hf_flash_two.kernels.hopper.gluon import (
    allocate_barriers,
    asm,
    fence_async_shared,
    gl,
    jit,
    mbarrier,
    tma_add,
    tma_store,
    tma_store_done,
    tma_store_read,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from hf_flash_two.kernels.hopper.parts import (
    Barriers,
    Descriptors,
    head_of,
    in_order_of_registers,
    keys_of,
    nan_keys,
    probabilities,
    producer,
    score_gradient,
    store_gradients,
    tile_of,
    weights,
)
from hf_flash_two.kernels.hopper.schedule import (
    Scores,
    Sizes,
    await_turn,
    end_turn,
    first_row_of,
    heads_inside,
    loops_of,
    place_of,
    rank_of,
    visit,
)
from hf_flash_two.kernels.hopper.tile import arrive, sync
from hf_flash_two.kernels.triton.args import Dropout, Heads, Intervals, PerHead

_STAGES = gl.constexpr(2)


class Memory(NamedTuple):
    """Shared memory: tiles, those but K's and V's in two stages; dQ in two halves."""

    k: Any
    v: Any
    q: Any
    do: Any
    rows: Any
    ds: Any
    dq: Any


@jit
def _add(desc, at, source, first):
    """Adds a piece of dQ; the first that comes is stored."""
    if first:
        tma_store(desc, [at, 0], source)
    else:
        tma_add(desc, [at, 0], source)


@jit
def _store_dq(
    PART: gl.constexpr, SETUP: gl.constexpr, sizes, counter_ptr, dq_desc, dq_s, dq_empty
):  # fmt: skip
    """A warp that adds every other tile of dQ to its sum, in two halves."""
    place = place_of(sizes, SETUP)
    half_0 = tile_of(dq_desc, dq_s.index(0))
    half_1 = tile_of(dq_desc, dq_s.index(1))
    outer, inner = loops_of(place, sizes, SETUP)
    for done in range(PART, outer * inner, 2):
        i = done // inner
        query_tile, member = visit(i, done - i * inner, place, SETUP)
        _, first_row = first_row_of(place, member, sizes, SETUP)
        tile = first_row + query_tile
        first = False
        if SETUP.ORDERED:
            rank = rank_of(place, query_tile, sizes, SETUP)
            await_turn(counter_ptr + tile, rank)
            first = rank == 0
        sync(10 + PART, 160, 1)
        _add(dq_desc, tile * 32, half_0, first)
        sync(12 + PART, 160, 1)
        _add(dq_desc, tile * 32 + 16, half_1, first)
        tma_store_read(1)
        mbarrier.arrive(dq_empty.index(0), count=1)
        tma_store_read(0)
        mbarrier.arrive(dq_empty.index(1), count=1)
        if SETUP.ORDERED:
            tma_store_done(0, 1)
            end_turn(counter_ptr + tile)
    tma_store_done(0, 1)


@jit
def _step(
    HALF: gl.constexpr, SETUP: gl.constexpr, done, tile, keys, head,
    k, v, sizes, scores, memory, bars, dq_empty, dk, dv,
):  # fmt: skip
    """One tile of queries: adds to dK and dV, and may hand on half a tile of dQ."""
    BLOCK_Q: gl.constexpr = SETUP.BLOCK_Q
    DTYPE: gl.constexpr = memory.q.dtype
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_Q, 16])
    DQ: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, dk.type.layout, 2)
    ROW: gl.constexpr = gl.SliceLayout(0, S)
    stage = done % _STAGES
    phase = (done // _STAGES) & 1
    q, do, rows = memory.q.index(stage), memory.do.index(stage), memory.rows.index(stage)
    no_scores = gl.zeros((64, BLOCK_Q), gl.float32, S)
    mbarrier.wait(bars.q_full.index(stage), phase)
    s_async = warpgroup_mma(k, q.permute((1, 0)), no_scores, use_acc=False, is_async=True)
    if not SETUP.LATE_LSE:
        lse = rows.slice(0, BLOCK_Q).load(ROW)
    mbarrier.wait(bars.do_full.index(stage), phase)
    dp_async = warpgroup_mma(v, do.permute((1, 0)), no_scores, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s_async,))
    if SETUP.LATE_LSE:
        lse = rows.slice(0, BLOCK_Q).load(ROW)
    p, d_cap = probabilities(s, lse, tile, keys, head, sizes, scores, SETUP)
    if not SETUP.LATE_DELTA:
        delta = rows.slice(BLOCK_Q, BLOCK_Q).load(ROW)
    p_half = gl.convert_layout(weights(p, scores, SETUP).to(DTYPE), A)
    if SETUP.SOFTCAP:
        p = p * d_cap
    if SETUP.DV_FIRST:
        dv_async = warpgroup_mma(p_half, do, dv, is_async=True)
        dp = warpgroup_mma_wait(1, deps=(dp_async,))
    else:
        dp, p_half = warpgroup_mma_wait(0, deps=(dp_async, p_half))
    if SETUP.LATE_DELTA:
        delta = rows.slice(BLOCK_Q, BLOCK_Q).load(ROW)
    ds = score_gradient(p, dp, delta[None, :], scores, SETUP).to(DTYPE)
    ds_half = gl.convert_layout(ds, A)
    if SETUP.WITH_DQ:
        ds_tile = memory.ds.index(stage)
        ds_tile.slice(HALF * 64, 64, dim=0).store(ds)
    if not SETUP.DV_FIRST:
        dv_async = warpgroup_mma(p_half, do, dv, is_async=True)
    if SETUP.WITH_DQ:
        fence_async_shared()
        asm("bar.sync 8, 256;", 4)
        no_dq = gl.zeros((64, 64), gl.float32, DQ)
        if BLOCK_Q == 64:
            ds_rows, k_columns = ds_tile, memory.k.slice(HALF * 64, 64, dim=1)
        else:
            ds_rows, k_columns = ds_tile.slice(HALF * 64, 64, dim=1), memory.k
        dq_async = warpgroup_mma(
            ds_rows.permute((1, 0)), k_columns, no_dq, use_acc=False, is_async=True
        )
        dv, p_half = warpgroup_mma_wait(1, deps=(dv_async, p_half))
        arrive(14 + stage, 288, 4)
        dk_async = warpgroup_mma(ds_half, q, dk, is_async=True)
        dq = warpgroup_mma_wait(1, deps=(dq_async,))
        dq = in_order_of_registers(dq)
        mbarrier.wait(dq_empty.index(HALF), (done & 1) ^ 1)
        memory.dq.index(HALF).store(dq)
        fence_async_shared()
        arrive(10 + 2 * HALF + stage, 160, 4)
    else:
        dk_async = warpgroup_mma(ds_half, q, dk, is_async=True)
        dv, p_half = warpgroup_mma_wait(1, deps=(dv_async, p_half))
        arrive(14 + stage, 288, 4)
    dk, ds_half = warpgroup_mma_wait(0, deps=(dk_async, ds_half))
    arrive(6 + stage, 288, 4)
    return dk, dv


@jit
def _consumer(
    HALF: gl.constexpr, SETUP: gl.constexpr,
    sizes, scores, marked_ptr, descs, memory, bars, dq_empty,
):  # fmt: skip
    BLOCK_Q: gl.constexpr = SETUP.BLOCK_Q
    D: gl.constexpr = memory.k.type.shape[1]
    DV: gl.constexpr = memory.v.type.shape[1]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_Q, 16])
    DK: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    DV_: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    place = place_of(sizes, SETUP)
    k = memory.k.slice(HALF * 64, 64, dim=0)
    v = memory.v.slice(HALF * 64, 64, dim=0)
    dk = gl.zeros((64, D), gl.float32, DK)
    dv = gl.zeros((64, DV), gl.float32, DV_)
    col = place.tile * SETUP.BLOCK_K + HALF * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, S))
    keys = keys_of(place, col, sizes, SETUP)
    mbarrier.wait(bars.k_full, 0)
    mbarrier.wait(bars.v_full, 0)
    INSIDE: gl.constexpr = heads_inside(SETUP)
    outer, inner = loops_of(place, sizes, SETUP)
    for i in range(outer):
        # In the inner loop it takes more registers.
        if not INSIDE:
            head = head_of(place, i, sizes, scores, SETUP)
        for j in range(inner):
            if INSIDE:
                head = head_of(place, j, sizes, scores, SETUP)
            tile, _ = visit(i, j, place, SETUP)
            dk, dv = _step(
                HALF, SETUP, i * inner + j, tile, keys, head,
                k, v, sizes, scores, memory, bars, dq_empty, dk, dv,
            )  # fmt: skip
    if SETUP.RESCUE:
        marked = nan_keys(dk, dv)
        key = place.tile * SETUP.BLOCK_K + HALF * 64
        key += gl.arange(0, 64, layout=gl.SliceLayout(1, DK))
        head = place.batch * (sizes.heads.count // sizes.heads.group) + place.key_head
        gl.store(
            marked_ptr + head.to(gl.int64) * sizes.key_length + key, marked.to(gl.int8),
            key < sizes.key_length,
        )  # fmt: skip
    store_gradients(
        HALF, "bar.sync 8, 256;", SETUP, dk, dv, k, v, place, scores, descs, memory
    )  # fmt: skip


@jit(
    do_not_specialize=[
        "query_length", "key_length", "offset", "left", "right", "interval_stride_b", "key_heads",
        "together",
    ]
)  # fmt: skip
def gradients_kernel(
    q_desc, k_desc, v_desc, do_desc, rows_desc, dk_desc, dv_desc,
    of_keys: Intervals, slopes: PerHead, dropout: Dropout, marked_ptr, dq_desc, counter_ptr,
    heads: Heads, query_length, key_length, offset, left, right, interval_stride_b,
    key_heads, together, scale, softcap,
    SETUP: gl.constexpr,
):  # fmt: skip
    """dK, dV of one tile of keys, and with `Setup.WITH_DQ` what it adds to dQ.

    The grid is key tiles x batch rows x key heads, see `place_of`.

    Args:
        q_desc, k_desc, v_desc, do_desc, dk_desc, dv_desc: of [B, H, T, D] tensors.
        rows_desc: of [2, B * Hq * padded Tq / BLOCK_Q, BLOCK_Q].
        marked_ptr: int8 [B, Hk, Tk], see `triton.backward.replace_marked`.
        dq_desc: of [pieces * 16, 256], float32.
        counter_ptr: int32, one of each tile of dQ, zeros. Both None without `Setup.WITH_DQ`.
    """
    BLOCK_Q: gl.constexpr = SETUP.BLOCK_Q
    BLOCK_K: gl.constexpr = SETUP.BLOCK_K
    D: gl.constexpr = k_desc.block_type.shape[3]
    DV: gl.constexpr = v_desc.block_type.shape[3]
    DTYPE: gl.constexpr = q_desc.dtype
    K: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_K, D], DTYPE)
    V: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_K, DV], DTYPE)
    DS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_K, BLOCK_Q], DTYPE)
    LINEAR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    rows = gl.allocate_shared_memory(gl.float32, [_STAGES, 2 * BLOCK_Q], LINEAR)
    # What a call has none of is another thing at compile time, and unused.
    ds, dq = rows, rows
    if SETUP.WITH_DQ:
        ds = gl.allocate_shared_memory(DTYPE, [_STAGES, BLOCK_K, BLOCK_Q], DS)
        dq = gl.allocate_shared_memory(gl.float32, [2, 4096], LINEAR)
    memory = Memory(
        gl.allocate_shared_memory(DTYPE, [BLOCK_K, D], K),
        gl.allocate_shared_memory(DTYPE, [BLOCK_K, DV], V),
        gl.allocate_shared_memory(DTYPE, [_STAGES, BLOCK_Q, D], K),
        gl.allocate_shared_memory(DTYPE, [_STAGES, BLOCK_Q, DV], V),
        rows, ds, dq,
    )  # fmt: skip
    bars = Barriers(
        allocate_barriers(1, 1).index(0), allocate_barriers(1, 1).index(0),
        allocate_barriers(_STAGES, 1), allocate_barriers(_STAGES, 1),
    )  # fmt: skip
    dq_empty = allocate_barriers(2, 1)
    descs = Descriptors(q_desc, k_desc, v_desc, do_desc, rows_desc, dk_desc, dv_desc)
    sizes = Sizes(
        heads, key_heads, together, query_length, key_length, offset, left, right,
        of_keys, interval_stride_b,
    )  # fmt: skip
    scores = Scores(scale, softcap, slopes, dropout)
    # Written out each: a sum of tuples forgets names, one given a name forgets constants.
    if SETUP.WITH_DQ:
        gl.warp_specialize(
            [
                (_consumer, (0, SETUP, sizes, scores, marked_ptr, descs, memory, bars, dq_empty)),
                (_consumer, (1, SETUP, sizes, scores, marked_ptr, descs, memory, bars, dq_empty)),
                (producer, (SETUP, sizes, descs, memory, bars)),
                (_store_dq, (0, SETUP, sizes, counter_ptr, dq_desc, memory.dq, dq_empty)),
                (_store_dq, (1, SETUP, sizes, counter_ptr, dq_desc, memory.dq, dq_empty)),
            ],
            [4, 1, 1, 1],
            [240, 24, 24, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consumer, (0, SETUP, sizes, scores, marked_ptr, descs, memory, bars, dq_empty)),
                (_consumer, (1, SETUP, sizes, scores, marked_ptr, descs, memory, bars, dq_empty)),
                (producer, (SETUP, sizes, descs, memory, bars)),
            ],
            [4, 1],
            [240, 24],
        )
