"""The backward of Hopper GPUs for head dims above 128: dK and dV, in tiles of 64 keys.

They fill the registers of two consumers, so that each has half of the columns, of all keys. What
both need of scores is computed once: consumer 0 computes P^T, consumer 1 dP^T and dS^T. P^T goes
from one to the other in float32, each thread to the one in the same place, and to both as an
operand; dS^T to both. `queries` computes dQ.

Named barriers: 6, 7: a stage of Q is free; 14, 15: one of dO; 8: P is there; 11: nobody reads P
any more; 9, 13: the same of dS; 10: the two consumers.
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
    weights,
)
from hf_flash_two.kernels.hopper.schedule import Scores, Sizes, place_of
from hf_flash_two.kernels.hopper.tile import arrive
from hf_flash_two.kernels.triton.args import Dropout, Heads, Intervals, PerHead

_STAGES = gl.constexpr(2)


class Memory(NamedTuple):
    """Shared memory: tiles, those of the queries in two stages; P as it is exchanged."""

    k: Any
    v: Any
    q: Any
    do: Any
    rows: Any
    p: Any
    ds: Any
    exchanged: Any


@jit
def _step(
    HALF: gl.constexpr, SETUP: gl.constexpr, done, tile, keys, head,
    sizes, scores, memory, bars, dk, dv,
):  # fmt: skip
    """One tile of queries: adds to half of dK and dV."""
    D: gl.constexpr = memory.k.type.shape[1]
    DV: gl.constexpr = memory.v.type.shape[1]
    DTYPE: gl.constexpr = memory.q.dtype
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    ROW: gl.constexpr = gl.SliceLayout(0, S)
    stage = done % _STAGES
    q, do, rows = memory.q.index(stage), memory.do.index(stage), memory.rows.index(stage)
    do_half = do.slice(HALF * (DV // 2), DV // 2, dim=1)
    zeros = gl.zeros((64, 64), gl.float32, S)
    mbarrier.wait(bars.q_full.index(stage), (done // _STAGES) & 1)
    if HALF == 0:
        s = warpgroup_mma(memory.k, q.permute((1, 0)), zeros, use_acc=False, is_async=True)
        lse = rows.slice(0, 64).load(ROW)
        s = warpgroup_mma_wait(0, deps=(s,))
        p, d_cap = probabilities(s, lse, tile, keys, head, sizes, scores, SETUP)
        p_half = weights(p, scores, SETUP).to(DTYPE)
        if SETUP.SOFTCAP:
            p = p * d_cap
        asm("bar.sync 11, 256;", 4)
        memory.exchanged.store(in_order_of_registers(p))
        memory.p.store(p_half)
        fence_async_shared()
        asm("bar.sync 8, 256;", 4)
        mbarrier.wait(bars.do_full.index(stage), (done // _STAGES) & 1)
        dv_async = warpgroup_mma(memory.p, do_half, dv, is_async=True)
        asm("bar.sync 9, 256;", 4)
    else:
        mbarrier.wait(bars.do_full.index(stage), (done // _STAGES) & 1)
        dp = warpgroup_mma(memory.v, do.permute((1, 0)), zeros, use_acc=False, is_async=True)
        delta = rows.slice(64, 64).load(ROW)
        dp = warpgroup_mma_wait(0, deps=(dp,))
        RUN: gl.constexpr = in_order_of_registers(dp).type.layout
        asm("bar.sync 8, 256;", 4)
        if SETUP.DV_FIRST:
            dv_async = warpgroup_mma(memory.p, do_half, dv, is_async=True)
        # As `rows.convert_kernel` reads it.
        p = memory.exchanged.load(RUN).reshape([2] * 12)
        p = p.permute((3, 4, 10, 5, 6, 7, 0, 1, 2, 8, 9, 11)).reshape([64, 64])
        p = gl.convert_layout(p, S)
        ds = score_gradient(p, dp, delta[None, :], scores, SETUP).to(DTYPE)
        asm("bar.sync 13, 256;", 4)
        memory.ds.store(ds)
        if not SETUP.DV_FIRST:
            dv_async = warpgroup_mma(memory.p, do_half, dv, is_async=True)
        fence_async_shared()
        asm("bar.sync 9, 256;", 4)
    dk_async = warpgroup_mma(memory.ds, q.slice(HALF * (D // 2), D // 2, dim=1), dk, is_async=True)
    dv = warpgroup_mma_wait(1, deps=(dv_async,))
    arrive(14 + stage, 288, 4)
    if HALF == 1:
        asm("bar.arrive 11, 256;", 4)
    dk = warpgroup_mma_wait(0, deps=(dk_async,))
    if HALF == 0:
        asm("bar.arrive 13, 256;", 4)
    arrive(6 + stage, 288, 4)
    return dk, dv


@jit
def _consumer(
    HALF: gl.constexpr, SETUP: gl.constexpr, sizes, scores, marked_ptr, descs, memory, bars
):  # fmt: skip
    D: gl.constexpr = memory.k.type.shape[1]
    DV: gl.constexpr = memory.v.type.shape[1]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    DK: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D // 2, 16])
    DV_: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV // 2, 16])
    place = place_of(sizes, SETUP)
    dk = gl.zeros((64, D // 2), gl.float32, DK)
    dv = gl.zeros((64, DV // 2), gl.float32, DV_)
    col = place.tile * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, S))
    keys = keys_of(place, col, sizes, SETUP)
    # P and dS may be written.
    if HALF == 1:
        asm("bar.arrive 11, 256;", 4)
    else:
        asm("bar.arrive 13, 256;", 4)
    mbarrier.wait(bars.k_full, 0)
    mbarrier.wait(bars.v_full, 0)
    for member in range(sizes.heads.group):
        head = head_of(place, member, sizes, scores, SETUP)
        before = member * place.count
        for step in range(place.count):
            dk, dv = _step(
                HALF, SETUP, before + step, place.last - step, keys, head,
                sizes, scores, memory, bars, dk, dv,
            )  # fmt: skip
    if SETUP.RESCUE:
        marked = nan_keys(dk, dv)
        key = place.tile * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, DK))
        head = place.batch * (sizes.heads.count // sizes.heads.group) + place.key_head
        # Either half of the columns may hold NaN: both say so, and none says that there is none.
        gl.store(
            marked_ptr + head.to(gl.int64) * sizes.key_length + key, marked.to(gl.int8),
            (key < sizes.key_length) & (marked != 0),
        )  # fmt: skip
    k_half = memory.k.slice(HALF * (D // 2), D // 2, dim=1)
    v_half = memory.v.slice(HALF * (DV // 2), DV // 2, dim=1)
    store_gradients(
        HALF, "bar.sync 10, 256;", SETUP, dk, dv, k_half, v_half, place, scores, descs, memory
    )  # fmt: skip


@jit(
    do_not_specialize=[
        "query_length", "key_length", "offset", "left", "right", "interval_stride_b", "key_heads",
        "together",
    ]
)  # fmt: skip
def wide_keys_kernel(
    q_desc, k_desc, v_desc, do_desc, rows_desc, dk_desc, dv_desc,
    of_keys: Intervals, slopes: PerHead, dropout: Dropout, marked_ptr,
    heads: Heads, query_length, key_length, offset, left, right, interval_stride_b,
    key_heads, together, scale, softcap,
    SETUP: gl.constexpr,
):  # fmt: skip
    """dK, dV of one tile of keys: see `gradients.gradients_kernel`.

    ``marked_ptr`` holds zeros.
    """
    gl.static_assert(SETUP.BLOCK_Q == 64)
    gl.static_assert(SETUP.BLOCK_K == 64)
    D: gl.constexpr = k_desc.block_type.shape[3]
    DV: gl.constexpr = v_desc.block_type.shape[3]
    DTYPE: gl.constexpr = q_desc.dtype
    K: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], DTYPE)
    V: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, DV], DTYPE)
    P: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], DTYPE)
    LINEAR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    memory = Memory(
        gl.allocate_shared_memory(DTYPE, [64, D], K),
        gl.allocate_shared_memory(DTYPE, [64, DV], V),
        gl.allocate_shared_memory(DTYPE, [_STAGES, 64, D], K),
        gl.allocate_shared_memory(DTYPE, [_STAGES, 64, DV], V),
        gl.allocate_shared_memory(gl.float32, [_STAGES, 128], LINEAR),
        gl.allocate_shared_memory(DTYPE, [64, 64], P),
        gl.allocate_shared_memory(DTYPE, [64, 64], P),
        gl.allocate_shared_memory(gl.float32, [4096], LINEAR),
    )
    bars = Barriers(
        allocate_barriers(1, 1).index(0), allocate_barriers(1, 1).index(0),
        allocate_barriers(_STAGES, 1), allocate_barriers(_STAGES, 1),
    )  # fmt: skip
    descs = Descriptors(q_desc, k_desc, v_desc, do_desc, rows_desc, dk_desc, dv_desc)
    sizes = Sizes(
        heads, key_heads, together, query_length, key_length, offset, left, right,
        of_keys, interval_stride_b,
    )  # fmt: skip
    scores = Scores(scale, softcap, slopes, dropout)
    # Written out each: a sum of tuples forgets names, one given a name forgets constants.
    gl.warp_specialize(
        [
            (_consumer, (0, SETUP, sizes, scores, marked_ptr, descs, memory, bars)),
            (_consumer, (1, SETUP, sizes, scores, marked_ptr, descs, memory, bars)),
            (producer, (SETUP, sizes, descs, memory, bars)),
        ],
        [4, 1],
        [240, 24],
    )
