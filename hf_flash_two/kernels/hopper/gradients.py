"""The backward of Hopper GPUs: dK, dV and dQ of one tile of keys in one kernel.

Source: Shah et al. 2024, arXiv:2407.08608, and the order of FlashAttention-4's ``flash_bwd_sm90``.
One program is one tile of 128 keys of one key head. It goes through the queries that see them,
of all query heads of the group, in tiles of `BLOCK_Q` rows. Its warps have four parts:

- two consumers of four warps, each of 64 keys: they keep dK and dV of these in registers;
- a producer: copies K and V once, and Q, dO and `Rows` of each tile of queries;
- a store warp: adds each tile's dQ to a float32 sum in global memory.

Scores are computed transposed, so that P^T and dS^T multiply from registers. Both consumers write
their dS into one tile, and each computes a half of dQ from all 128 keys: half as many bytes are
added as if each had its own. dQ is added in pieces of 64 x 64 in the order in which the product
leaves them in registers, which `rows.convert` undoes.

**Order.** With `Setup.ORDERED` the key tiles of a head add to a tile of dQ one after the other, so
that the same inputs give the same bits. A counter per tile of dQ says how many have added; a tile
of keys waits until that is its own rank, which `_rank` works out of the mask. All wait only for
programs of a lower number, and the GPU starts programs in the order of their numbers.

Barriers. Of TMA: mbarriers. Between warps: named barriers, since an mbarrier's arrival costs four
warps two more barriers; Triton itself takes 0 to 4. 5, 6: a stage of Q is free; 14, 15: one of dO;
8: both consumers have written dS; 10, 12: a half of dQ is ready.
"""

# What stands in a kernel is Triton's language, which its types do not describe.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

from typing import Any, NamedTuple

import triton

from hf_flash_two.kernels.hopper.gluon import (
    allocate_barriers,
    asm,
    barrier,
    fence_async_shared,
    gl,
    jit,
    mbarrier,
    reinterpret,
    tma_add,
    tma_load,
    tma_store,
    tma_store_done,
    tma_store_read,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from hf_flash_two.kernels.params import LOG2E
from hf_flash_two.kernels.triton.args import Heads, Intervals, PerHead
from hf_flash_two.kernels.triton.tile import BAND, INTERVALS
from hf_flash_two.masks import FAR, KEY_GROUP

_LOG2E = gl.constexpr(LOG2E)
_KEY_GROUP = gl.constexpr(KEY_GROUP)
_FAR = gl.constexpr(FAR)

KEYS = 128
"""Keys of a tile."""
_KEYS = gl.constexpr(KEYS)
_STAGES = gl.constexpr(2)
ROW_MULTIPLE = 128
"""`Rows` are padded to multiples of this, so that no tile needs a bounds check."""
_ROW_MULTIPLE = gl.constexpr(ROW_MULTIPLE)


class Setup(NamedTuple):
    """What is decided at compile time.

    Attributes:
        MASK, LEFT, RIGHT, SOFTCAP: see `triton.args.Flags`.
        ALIBI: slopes are given.
        MASKED: some tile may hold hidden pairs or end behind the last key.
        ORDERED: dQ is summed in a fixed order.
        DOWN: the last tile of keys adds first.
        DV_FIRST: dV's product is issued before dS is computed.
        LATE_LSE, LATE_DELTA: are read after the products they stand beside: fewer registers.
    """

    MASK: int
    LEFT: bool
    RIGHT: bool
    SOFTCAP: bool
    ALIBI: bool
    MASKED: bool
    ORDERED: bool
    DOWN: bool
    DV_FIRST: bool
    LATE_LSE: bool
    LATE_DELTA: bool


class Sizes(NamedTuple):
    """Lengths, and what the mask is made of.

    Attributes:
        heads: Hq, and how many query heads share a key head.
        key_heads: B * Hk.
        together: how many key heads have their tiles of keys side by side in the grid.
        turned: how many of the last key heads add their first tile of keys first.
        left, right: the band.
        order_ptr: of intervals, see `rows.order`.
        interval_stride_b: Tk, or 0 where one row of intervals serves all.
    """

    heads: Any
    key_heads: Any
    together: Any
    turned: Any
    query_length: Any
    key_length: Any
    offset: Any
    left: Any
    right: Any
    of_keys: Any
    order_ptr: Any
    interval_stride_b: Any


class Scores(NamedTuple):
    """What makes scores of products: ``scale``, in base 2 if plain, the cap, ALiBi's slopes."""

    scale: Any
    softcap: Any
    slopes: Any


class Descriptors(NamedTuple):
    """TMA's, of tiles of Q, K, V, dO, `Rows` and the sum of dQ; of halves of tiles of dK and dV."""

    q: Any
    k: Any
    v: Any
    do: Any
    rows: Any
    dq: Any
    dk: Any
    dv: Any


class Memory(NamedTuple):
    """Shared memory: tiles, those but K's and V's in two stages; dQ in two halves."""

    k: Any
    v: Any
    q: Any
    do: Any
    rows: Any
    ds: Any
    dq: Any


class Barriers(NamedTuple):
    k_full: Any
    v_full: Any
    q_full: Any
    do_full: Any
    dq_empty: Any


class Place(NamedTuple):
    """What a program does: a tile of keys, and the tiles of queries that it goes through.

    Attributes:
        up: the first tile of keys adds first; queries then go from the last to the first.
        start: the first tile of queries in the order in which they are visited.
        step: 1 or -1.
        before, whole, count: tiles of queries: the first that need a mask, those that need none,
            all.
    """

    batch: Any
    key_head: Any
    tile: Any
    up: Any
    start: Any
    step: Any
    before: Any
    whole: Any
    count: Any


@triton.constexpr_function
def log2(size):
    return size.bit_length() - 1


@jit
def _span(tile, sizes, bounds_at, SETUP: gl.constexpr, BLOCK_Q: gl.constexpr):
    """Query tiles that see a tile of keys: [start, stop), and those without hidden pairs in it.

    A tile of keys and one of queries meet if their whole rectangle meets the mask, inside of the
    tensors or not: `_rank` turns the question round and must get the same answer.
    """
    SHIFT: gl.constexpr = log2(BLOCK_Q)
    count = gl.cdiv(sizes.query_length, BLOCK_Q)
    start, stop, full_start, full_stop = 0, count, 0, count
    # Rows of queries that stand at the first and the last key.
    first = tile * _KEYS - sizes.offset
    last = first + _KEYS - 1
    if SETUP.MASK == BAND:
        if SETUP.RIGHT:
            start = gl.maximum((first - sizes.right) >> SHIFT, 0)
            full_start = (last - sizes.right + BLOCK_Q - 1) >> SHIFT
        if SETUP.LEFT:
            stop = gl.minimum(((last + sizes.left) >> SHIFT) + 1, count)
            full_stop = (first + sizes.left + 1) >> SHIFT
    if SETUP.MASK == INTERVALS:
        min_start, max_start, min_stop, max_stop = _bounds(bounds_at, tile, sizes)
        start = gl.minimum(gl.maximum(min_start - sizes.offset, 0) >> SHIFT, count)
        full_start = (max_start - sizes.offset + BLOCK_Q - 1) >> SHIFT
        stop = gl.minimum((max_stop - sizes.offset + BLOCK_Q - 1) >> SHIFT, count)
        full_stop = (min_stop - sizes.offset) >> SHIFT
    stop = gl.maximum(stop, start)
    if SETUP.MASKED:
        full_start = gl.minimum(gl.maximum(full_start, start), stop)
        full_stop = gl.minimum(full_stop, stop)
        # Beyond the last key, scores are 0, which may be far above those of the others.
        none = (full_stop <= full_start) | (tile * _KEYS + _KEYS > sizes.key_length)
        full_start = gl.where(none, stop, full_start)
        full_stop = gl.where(none, stop, full_stop)
    return start, stop, full_start, full_stop


@jit
def _bounds(bounds_at, tile, sizes):
    """`AttentionMask.key_bounds` of a tile of keys, or of several side by side."""
    groups = gl.cdiv(sizes.key_length, _KEY_GROUP)
    one = bounds_at + tile * (_KEYS // _KEY_GROUP) * 4
    # A tile's second group may lie behind the last: the first again.
    two = one + gl.where(tile * 2 + 1 < groups, 4, 0)
    return (
        gl.minimum(gl.load(one), gl.load(two)),
        gl.maximum(gl.load(one + 1), gl.load(two + 1)),
        gl.minimum(gl.load(one + 2), gl.load(two + 2)),
        gl.maximum(gl.load(one + 3), gl.load(two + 3)),
    )


@jit
def _bounds_of(batch, sizes, SETUP: gl.constexpr):
    """Where `AttentionMask.key_bounds` of a batch row begin."""
    at = sizes.of_keys.tiles_ptr
    if SETUP.MASK == INTERVALS:
        groups = gl.cdiv(sizes.key_length, _KEY_GROUP)
        at += gl.where(sizes.interval_stride_b != 0, batch * groups * 4, 0)
    return at


@jit
def _place(sizes, SETUP: gl.constexpr, BLOCK_Q: gl.constexpr):
    """Which tile of keys is this program's, and its way through the queries."""
    key_tiles = gl.cdiv(sizes.key_length, _KEYS)
    program = gl.program_id(0)
    group = program // (sizes.together * key_tiles)
    program -= group * sizes.together * key_tiles
    width = gl.minimum(sizes.together, sizes.key_heads - group * sizes.together)
    tile = program // width
    head = group * sizes.together + program - tile * width
    up = False
    if SETUP.DOWN:
        up = head >= sizes.key_heads - sizes.turned
        tile = gl.where(up, tile, key_tiles - 1 - tile)
    per_batch = sizes.heads.count // sizes.heads.group
    batch = head // per_batch
    start, stop, full_start, full_stop = _span(
        tile, sizes, _bounds_of(batch, sizes, SETUP), SETUP, BLOCK_Q
    )
    return Place(
        batch, head - batch * per_batch, tile, up,
        gl.where(up, stop - 1, start), gl.where(up, -1, 1),
        gl.where(up, stop - full_stop, full_start - start), full_stop - full_start, stop - start,
    )  # fmt: skip


@jit
def _rank(place, query_tile, sizes, SETUP: gl.constexpr, BLOCK_Q: gl.constexpr):
    """How many tiles of keys add to a tile of dQ before this program's."""
    if SETUP.MASK == INTERVALS:
        tiles = gl.cdiv(sizes.query_length, BLOCK_Q)
        at = sizes.order_ptr + query_tile * 2
        at += gl.where(sizes.interval_stride_b != 0, place.batch * tiles * 2, 0)
        last, gaps = gl.load(at), gl.load(at + 1)
        rank = last - place.tile
        if gaps != 0:
            rank = _count_after(place, query_tile, last, sizes, SETUP, BLOCK_Q)
        return rank
    SHIFT: gl.constexpr = log2(_KEYS)
    position = query_tile * BLOCK_Q + sizes.offset
    first, last = 0, gl.cdiv(sizes.key_length, _KEYS) - 1
    if SETUP.LEFT:
        first = gl.maximum((position - sizes.left) >> SHIFT, 0)
    if SETUP.RIGHT:
        last = gl.minimum((position + BLOCK_Q - 1 + sizes.right) >> SHIFT, last)
    rank = place.tile - first
    if SETUP.DOWN:
        rank = gl.where(place.up, rank, last - place.tile)
    return rank


@jit
def sees(tile, batch, query_tile, last, sizes, SETUP: gl.constexpr, BLOCK_Q: gl.constexpr):
    """Which of several tiles of keys, up to the last, a tile of queries sees."""
    bounds_at = _bounds_of(batch, sizes, SETUP)
    start, stop, _, _ = _span(gl.minimum(tile, last), sizes, bounds_at, SETUP, BLOCK_Q)
    return (tile <= last) & (start <= query_tile) & (query_tile < stop)


@jit
def _count_after(place, query_tile, last, sizes, SETUP: gl.constexpr, BLOCK_Q: gl.constexpr):
    """How many tiles of keys behind this one a tile of queries sees, up to the last it sees."""
    lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    count = 0
    for behind in range(place.tile + 1, last + 1, 32):
        seen = sees(behind + lane, place.batch, query_tile, last, sizes, SETUP, BLOCK_Q)
        count += gl.sum(seen.to(gl.int32), 0)
    return count


@jit
def _wait_at(FIRST: gl.constexpr, stage, WARPS: gl.constexpr):
    """Waits at a named barrier of one consumer's or both consumers' and one more warp's threads."""
    x = gl.arange(0, 32 * WARPS, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    gl.inline_asm_elementwise(
        "bar.sync $1, 288; mov.b32 $0, $1;", "=r,r", [x * 0 + (FIRST + stage)],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@jit
def _arrive_at(FIRST: gl.constexpr, stage, WARPS: gl.constexpr):
    """The other side of `_wait_at`: goes on at once."""
    x = gl.arange(0, 32 * WARPS, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    gl.inline_asm_elementwise(
        "bar.arrive $1, 288; mov.b32 $0, $1;", "=r,r", [x * 0 + (FIRST + stage)],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@jit
def _await_turn(counter_ptr, rank):
    """One warp waits until so many have added, and sees what they added."""
    x = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 v; again: ld.acquire.gpu.global.b32 v, [$1];"
        " setp.ne.b32 p, v, $2; @p bra again; fence.proxy.async.global; mov.b32 $0, v; }",
        "=r,l,r", [counter_ptr + x * 0, rank + x * 0], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@jit
def _end_turn(counter_ptr):
    """One more has added."""
    x = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.eq.b32 p, $2, 0; fence.proxy.async.global;"
        " @p red.release.gpu.global.add.s32 [$1], 1; mov.b32 $0, $2; }",
        "=r,l,r", [counter_ptr + x * 0, x], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@jit
def _tile_of(desc, memory):
    """A tile in shared memory as TMA takes it."""
    return reinterpret(memory, desc.dtype, desc.block_type.shape, desc.layout)


@jit
def _first_row(place, member, sizes, BLOCK_Q: gl.constexpr):
    """Where a query head begins, in tiles of `Rows`."""
    head = place.key_head * sizes.heads.group + member
    tiles = gl.cdiv(sizes.query_length, _ROW_MULTIPLE) * (_ROW_MULTIPLE // BLOCK_Q)
    return head, (place.batch * sizes.heads.count + head) * tiles


@jit
def _producer(
    SETUP: gl.constexpr, sizes, scores, counter_ptr, descs, memory, bars
):  # fmt: skip
    BLOCK_Q: gl.constexpr = memory.q.type.shape[1]
    place = _place(sizes, SETUP, BLOCK_Q)
    key = place.tile * _KEYS
    mbarrier.expect(bars.k_full, descs.k.block_type.nbytes)
    tma_load(descs.k, [place.batch, place.key_head, key, 0], bars.k_full, _tile_of(descs.k, memory.k))
    total = place.count * sizes.heads.group
    if total == 0:
        mbarrier.expect(bars.v_full, descs.v.block_type.nbytes)
        tma_load(descs.v, [place.batch, place.key_head, key, 0], bars.v_full, _tile_of(descs.v, memory.v))
    for member in range(sizes.heads.group):
        head, first_row = _first_row(place, member, sizes, BLOCK_Q)
        for step in range(place.count):
            done = member * place.count + step
            stage = done % _STAGES
            tile = place.start + step * place.step
            at = [place.batch, head, tile * BLOCK_Q, 0]
            q_full, do_full = bars.q_full.index(stage), bars.do_full.index(stage)
            if done >= _STAGES:
                _wait_at(5, stage, 1)
            mbarrier.expect(q_full, descs.q.block_type.nbytes + descs.rows.block_type.nbytes)
            tma_load(descs.q, at, q_full, _tile_of(descs.q, memory.q.index(stage)))
            tma_load(
                descs.rows, [0, first_row + tile, 0], q_full,
                _tile_of(descs.rows, memory.rows.index(stage)),
            )  # fmt: skip
            if done == 0:
                mbarrier.expect(bars.v_full, descs.v.block_type.nbytes)
                tma_load(
                    descs.v, [place.batch, place.key_head, key, 0], bars.v_full,
                    _tile_of(descs.v, memory.v),
                )  # fmt: skip
            if done >= _STAGES:
                _wait_at(14, stage, 1)
            mbarrier.expect(do_full, descs.do.block_type.nbytes)
            tma_load(descs.do, at, do_full, _tile_of(descs.do, memory.do.index(stage)))


@jit
def _store_dq(
    SETUP: gl.constexpr, sizes, scores, counter_ptr, descs, memory, bars
):  # fmt: skip
    BLOCK_Q: gl.constexpr = memory.q.type.shape[1]
    place = _place(sizes, SETUP, BLOCK_Q)
    half_0 = _tile_of(descs.dq, memory.dq.index(0))
    half_1 = _tile_of(descs.dq, memory.dq.index(1))
    for member in range(sizes.heads.group):
        _, first_row = _first_row(place, member, sizes, BLOCK_Q)
        for step in range(place.count):
            tile = place.start + step * place.step
            at = (first_row + tile) * 32
            if SETUP.ORDERED:
                counter = counter_ptr + first_row + tile
                rank = _rank(place, tile, sizes, SETUP, BLOCK_Q)
                _await_turn(counter, rank)
                if rank == 0:
                    asm("bar.sync 10, 160;", 1)
                    tma_store(descs.dq, [at, 0], half_0)
                    asm("bar.sync 12, 160;", 1)
                    tma_store(descs.dq, [at + 16, 0], half_1)
                else:
                    asm("bar.sync 10, 160;", 1)
                    tma_add(descs.dq, [at, 0], half_0)
                    asm("bar.sync 12, 160;", 1)
                    tma_add(descs.dq, [at + 16, 0], half_1)
                tma_store_done(0, 1)
                _end_turn(counter)
                mbarrier.arrive(bars.dq_empty.index(0), count=1)
                mbarrier.arrive(bars.dq_empty.index(1), count=1)
            else:
                asm("bar.sync 10, 160;", 1)
                tma_add(descs.dq, [at, 0], half_0)
                asm("bar.sync 12, 160;", 1)
                tma_add(descs.dq, [at + 16, 0], half_1)
                tma_store_read(1)
                mbarrier.arrive(bars.dq_empty.index(0), count=1)
                tma_store_read(0)
                mbarrier.arrive(bars.dq_empty.index(1), count=1)
    tma_store_done(0, 1)


@jit
def _modify(s, lse, row, col, slope, offset, scores, SETUP: gl.constexpr):
    """Scores less lse in base 2, and d(capped score) / d(scaled score): not of plain scores."""
    d_cap = s
    if SETUP.SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2x) + 1) saturates correctly at both ends.
        capped = 1 - 2 / (gl.exp2(s * (scores.scale * (2 * _LOG2E) / scores.softcap)) + 1)
        d_cap = 1 - capped * capped
        s = capped * scores.softcap
    else:
        s = s * scores.scale
    if SETUP.ALIBI:
        s -= slope * gl.abs(row + offset - col).to(gl.float32)
    return (s - lse) * _LOG2E, d_cap


@jit
def _step(
    HALF: gl.constexpr, MASKED: gl.constexpr, SETUP: gl.constexpr, done, tile, col, seen_from,
    seen_until, slope, k, v, sizes, scores, memory, bars, dk, dv,
):  # fmt: skip
    """One tile of queries: adds to dK and dV, and hands on half a tile of dQ."""
    BLOCK_Q: gl.constexpr = memory.q.type.shape[1]
    D: gl.constexpr = memory.q.type.shape[2]
    DTYPE: gl.constexpr = memory.q.dtype
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_Q, 16])
    DQ: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, dk.type.layout, 2)
    ROW: gl.constexpr = gl.SliceLayout(0, S)
    stage = done % _STAGES
    phase = (done // _STAGES) & 1
    q, do = memory.q.index(stage), memory.do.index(stage)
    ds_tile, rows = memory.ds.index(stage), memory.rows.index(stage)
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
    row = tile * BLOCK_Q + gl.arange(0, BLOCK_Q, layout=ROW)
    if SETUP.SOFTCAP or SETUP.ALIBI:
        s, d_cap = _modify(
            s, lse[None, :], row[None, :], col[:, None], slope, sizes.offset, scores, SETUP
        )
    else:
        s = s * scores.scale - lse[None, :]
    if MASKED:
        seen = row[None, :] >= seen_from[:, None]
        if SETUP.LEFT or SETUP.MASK == INTERVALS:
            seen = seen & (row[None, :] < seen_until[:, None])
        s = gl.where(seen, s, float("-inf"))
    p = gl.exp2(s)
    if not SETUP.LATE_DELTA:
        delta = rows.slice(BLOCK_Q, BLOCK_Q).load(ROW)
    p_half = gl.convert_layout(p.to(DTYPE), A)
    if SETUP.DV_FIRST:
        dv_async = warpgroup_mma(p_half, do, dv, is_async=True)
        dp = warpgroup_mma_wait(1, deps=(dp_async,))
    else:
        dp, p_half = warpgroup_mma_wait(0, deps=(dp_async, p_half))
    if SETUP.LATE_DELTA:
        delta = rows.slice(BLOCK_Q, BLOCK_Q).load(ROW)
    ds = p * (dp - delta[None, :])
    if SETUP.SOFTCAP:
        ds = ds * d_cap
    ds = ds.to(DTYPE)
    ds_half = gl.convert_layout(ds, A)
    ds_tile.slice(HALF * 64, 64, dim=0).store(ds)
    if not SETUP.DV_FIRST:
        dv_async = warpgroup_mma(p_half, do, dv, is_async=True)
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
    _arrive_at(14, stage, 4)
    dk_async = warpgroup_mma(ds_half, q, dk, is_async=True)
    dq = warpgroup_mma_wait(1, deps=(dq_async,))
    # The bits of row and column in the order of registers, lanes and warps of the product, so that
    # nothing moves and each thread stores 16 bytes at a time.
    dq = dq.reshape([2] * 12).permute((6, 7, 8, 0, 1, 3, 4, 5, 9, 10, 2, 11)).reshape([4096])
    mbarrier.wait(bars.dq_empty.index(HALF), (done & 1) ^ 1)
    memory.dq.index(HALF).store(dq)
    fence_async_shared()
    if HALF == 0:
        asm("bar.arrive 10, 160;", 4)
    else:
        asm("bar.arrive 12, 160;", 4)
    dk, ds_half = warpgroup_mma_wait(0, deps=(dk_async, ds_half))
    _arrive_at(5, stage, 4)
    return dk, dv


@jit
def _consumer(
    HALF: gl.constexpr, SETUP: gl.constexpr, sizes, scores, counter_ptr, descs, memory, bars
):  # fmt: skip
    BLOCK_Q: gl.constexpr = memory.q.type.shape[1]
    D: gl.constexpr = memory.k.type.shape[1]
    DV: gl.constexpr = memory.v.type.shape[1]
    DTYPE: gl.constexpr = memory.q.dtype
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_Q, 16])
    DK: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    DV_: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    TAIL: gl.constexpr = SETUP.LEFT or SETUP.MASK == INTERVALS
    place = _place(sizes, SETUP, BLOCK_Q)
    k = memory.k.slice(HALF * 64, 64, dim=0)
    v = memory.v.slice(HALF * 64, 64, dim=0)
    dk = gl.zeros((64, D), gl.float32, DK)
    dv = gl.zeros((64, DV), gl.float32, DV_)
    # Rows of queries from which, and until which, each key is seen.
    col = place.tile * _KEYS + HALF * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, S))
    seen_from, seen_until = col, col
    if SETUP.MASK == INTERVALS:
        at = col + place.batch.to(gl.int64) * sizes.interval_stride_b
        inside = col < sizes.key_length
        seen_from = gl.load(sizes.of_keys.start_ptr + at, inside, _FAR) - sizes.offset
        seen_until = gl.load(sizes.of_keys.stop_ptr + at, inside, -_FAR) - sizes.offset
    elif SETUP.MASKED:
        seen_from = col * 0
        if SETUP.RIGHT:
            seen_from = col - sizes.right - sizes.offset
        seen_from = gl.where(col < sizes.key_length, seen_from, _FAR)
        seen_until = col + sizes.left + 1 - sizes.offset
    mbarrier.wait(bars.k_full, 0)
    mbarrier.wait(bars.v_full, 0)
    for member in range(sizes.heads.group):
        slope = 0.0
        if SETUP.ALIBI:
            head = place.key_head * sizes.heads.group + member
            slope = gl.load(
                scores.slopes.ptr + place.batch * scores.slopes.stride_b
                + head * scores.slopes.stride_h
            )  # fmt: skip
        before = member * place.count
        if SETUP.MASKED:
            for step in range(0, place.before):
                dk, dv = _step(
                    HALF, True, SETUP, before + step, place.start + step * place.step, col,
                    seen_from, seen_until, slope, k, v, sizes, scores, memory, bars, dk, dv,
                )  # fmt: skip
        for step in range(place.before, place.before + place.whole):
            dk, dv = _step(
                HALF, False, SETUP, before + step, place.start + step * place.step, col,
                seen_from, seen_until, slope, k, v, sizes, scores, memory, bars, dk, dv,
            )  # fmt: skip
        if TAIL:
            for step in range(place.before + place.whole, place.count):
                dk, dv = _step(
                    HALF, True, SETUP, before + step, place.start + step * place.step, col,
                    seen_from, seen_until, slope, k, v, sizes, scores, memory, bars, dk, dv,
                )  # fmt: skip
    # Both are done with all of K: K and V become what dK and dV are stored from.
    asm("bar.sync 8, 256;", 4)
    scale = scores.scale
    if not (SETUP.SOFTCAP or SETUP.ALIBI):
        scale = scale * (1 / _LOG2E)
    v.store(dv.to(DTYPE))
    k.store((dk * scale).to(DTYPE))
    fence_async_shared()
    barrier()
    at = [place.batch, place.key_head, place.tile * _KEYS + HALF * 64, 0]
    tma_store(descs.dv, at, _tile_of(descs.dv, v))
    tma_store(descs.dk, at, _tile_of(descs.dk, k))
    tma_store_read(0)


@jit(
    do_not_specialize=[
        "query_length", "key_length", "offset", "left", "right", "interval_stride_b", "key_heads",
        "together", "turned",
    ]
)  # fmt: skip
def gradients_kernel(
    q_desc, k_desc, v_desc, do_desc, rows_desc, dq_desc, dk_desc, dv_desc,
    of_keys: Intervals, order_ptr, slopes: PerHead, counter_ptr,
    heads: Heads, query_length, key_length, offset, left, right, interval_stride_b,
    key_heads, together, turned, scale, softcap,
    SETUP: gl.constexpr,
):  # fmt: skip
    """dK, dV of one tile of keys, and what it adds to dQ.

    The grid is key tiles x batch rows x key heads, see `_place`.

    Args:
        q_desc, k_desc, v_desc, do_desc, dk_desc, dv_desc: of [B, H, T, D] tensors.
        rows_desc: of [2, B * Hq * padded Tq / BLOCK_Q, BLOCK_Q].
        dq_desc: of [pieces * 16, 256], float32.
        counter_ptr: int32, one of each tile of dQ, 0.
    """
    BLOCK_Q: gl.constexpr = q_desc.block_type.shape[2]
    D: gl.constexpr = k_desc.block_type.shape[3]
    DV: gl.constexpr = v_desc.block_type.shape[3]
    DTYPE: gl.constexpr = q_desc.dtype
    K: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_KEYS, D], DTYPE)
    V: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_KEYS, DV], DTYPE)
    DS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_KEYS, BLOCK_Q], DTYPE)
    LINEAR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    memory = Memory(
        gl.allocate_shared_memory(DTYPE, [_KEYS, D], K),
        gl.allocate_shared_memory(DTYPE, [_KEYS, DV], V),
        gl.allocate_shared_memory(DTYPE, [_STAGES, BLOCK_Q, D], K),
        gl.allocate_shared_memory(DTYPE, [_STAGES, BLOCK_Q, DV], V),
        gl.allocate_shared_memory(gl.float32, [_STAGES, 2 * BLOCK_Q], LINEAR),
        gl.allocate_shared_memory(DTYPE, [_STAGES, _KEYS, BLOCK_Q], DS),
        gl.allocate_shared_memory(gl.float32, [2, 4096], LINEAR),
    )
    bars = Barriers(
        allocate_barriers(1, 1).index(0), allocate_barriers(1, 1).index(0),
        allocate_barriers(_STAGES, 1), allocate_barriers(_STAGES, 1), allocate_barriers(2, 1),
    )  # fmt: skip
    descs = Descriptors(q_desc, k_desc, v_desc, do_desc, rows_desc, dq_desc, dk_desc, dv_desc)
    sizes = Sizes(
        heads, key_heads, together, turned, query_length, key_length, offset, left, right,
        of_keys, order_ptr, interval_stride_b,
    )  # fmt: skip
    scores = Scores(scale, softcap, slopes)
    # Written out each: a sum of tuples forgets names, one given a name forgets constants.
    gl.warp_specialize(
        [
            (_consumer, (0, SETUP, sizes, scores, counter_ptr, descs, memory, bars)),
            (_consumer, (1, SETUP, sizes, scores, counter_ptr, descs, memory, bars)),
            (_producer, (SETUP, sizes, scores, counter_ptr, descs, memory, bars)),
            (_store_dq, (SETUP, sizes, scores, counter_ptr, descs, memory, bars)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )
