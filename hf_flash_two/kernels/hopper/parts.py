"""What the kernels share that go through queries: copies, probabilities."""

# What stands in a kernel is Triton's language, which its types do not describe.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

from typing import Any, NamedTuple

import triton

from hf_flash_two.kernels.hopper.gluon import (
    asm,
    fence_async_shared,
    gl,
    jit,
    mbarrier,
    reinterpret,
    tma_load,
    tma_store,
    tma_store_read,
)
from hf_flash_two.kernels.hopper.schedule import first_row_of, loops_of, place_of, visit
from hf_flash_two.kernels.hopper.tile import keep_bits, sync
from hf_flash_two.kernels.params import LOG2E
from hf_flash_two.kernels.triton.tile import INTERVALS
from hf_flash_two.masks import FAR

_LOG2E = gl.constexpr(LOG2E)
_FAR = gl.constexpr(FAR)


class Descriptors(NamedTuple):
    """TMA's, of tiles of Q, K, V, dO, `Rows`, dK and dV."""

    q: Any
    k: Any
    v: Any
    do: Any
    rows: Any
    dk: Any
    dv: Any


class Barriers(NamedTuple):
    k_full: Any
    v_full: Any
    q_full: Any
    do_full: Any


@jit
def tile_of(desc, memory):
    """A tile in shared memory as TMA takes it."""
    return reinterpret(memory, desc.dtype, desc.block_type.shape, desc.layout)


@jit
def load(desc, at, full, memory):
    """Starts a copy of one tile; ``full`` is told the bytes to expect."""
    mbarrier.expect(full, desc.block_type.nbytes)
    tma_load(desc, at, full, tile_of(desc, memory))


@jit
def producer(SETUP: gl.constexpr, sizes, descs, memory, bars):
    """The warp that copies tiles into shared memory: K and V once, then those of the queries."""
    STAGES: gl.constexpr = memory.q.type.shape[0]
    place = place_of(sizes, SETUP)
    of_keys = [place.batch, place.key_head, place.tile * SETUP.BLOCK_K, 0]
    load(descs.k, of_keys, bars.k_full, memory.k)
    if place.count == 0:
        load(descs.v, of_keys, bars.v_full, memory.v)
    outer, inner = loops_of(place, sizes, SETUP)
    for i in range(outer):
        for j in range(inner):
            tile, member = visit(i, j, place, SETUP)
            head, first_row = first_row_of(place, member, sizes, SETUP)
            done = i * inner + j
            stage = done % STAGES
            at = [place.batch, head, tile * SETUP.BLOCK_Q, 0]
            if done >= STAGES:
                sync(6 + stage, 288, 1)
            q_full = bars.q_full.index(stage)
            mbarrier.expect(q_full, descs.q.block_type.nbytes + descs.rows.block_type.nbytes)
            tma_load(descs.q, at, q_full, tile_of(descs.q, memory.q.index(stage)))
            rows = tile_of(descs.rows, memory.rows.index(stage))
            tma_load(descs.rows, [0, first_row + tile, 0], q_full, rows)
            if done == 0:
                load(descs.v, of_keys, bars.v_full, memory.v)
            if done >= STAGES:
                sync(14 + stage, 288, 1)
            load(descs.do, at, bars.do_full.index(stage), memory.do.index(stage))


class Keys(NamedTuple):
    """The keys of a tile, and the rows of queries from which, and until which, each is seen."""

    col: Any
    seen_from: Any
    seen_until: Any


class Head(NamedTuple):
    """A query head: its batch row, its number, ALiBi's slope."""

    batch: Any
    number: Any
    slope: Any


@jit
def keys_of(place, col, sizes, SETUP: gl.constexpr):
    """`Keys` in the layout of ``col``."""
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
    return Keys(col, seen_from, seen_until)


@jit
def head_of(place, member, sizes, scores, SETUP: gl.constexpr):
    """The query head that is one ``member`` of the group."""
    head = place.key_head * sizes.heads.group + member
    slope = 0.0
    if SETUP.ALIBI:
        at = scores.slopes.ptr + place.batch * scores.slopes.stride_b
        slope = gl.load(at + head * scores.slopes.stride_h)
    return Head(place.batch, head, slope)


@jit
def _modify(s, lse, tile, keys, head, sizes, scores, SETUP: gl.constexpr):
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
        # In float32: integers would be subtracted before the loop and fill the registers.
        first = (tile * SETUP.BLOCK_Q + sizes.offset).to(gl.float32)
        rows = gl.arange(0, SETUP.BLOCK_Q, layout=gl.SliceLayout(0, s.type.layout))
        position = rows.to(gl.float32) + first
        s -= head.slope * gl.abs(position[None, :] - keys.col.to(gl.float32)[:, None])
    return (s - lse[None, :]) * _LOG2E, d_cap


@triton.constexpr_function
def _hiding(count, ends):
    """PTX that makes numbers of hidden pairs -infinity, unless a warp sees all.

    A thread has two neighbours of every eight queries, of two keys. The arguments behind its
    ``count`` numbers say, counted from its first query, which sees a key first, and, if it ends
    anywhere, which no longer does.
    """
    tests, steps = [], []
    for key in (0, 2):
        tests.append(f"setp.gt.or.s32 some, ${2 * count + key}, 0, some;")
        if ends:
            tests.append(f"setp.le.or.s32 some, ${3 * count + key}, {2 * count - 7}, some;")
    for i in range(count):
        query, key = i // 4 * 8 + i % 2, i & 2
        steps.append(f"setp.gt.s32 hidden, ${2 * count + key}, {query};")
        if ends:
            steps.append(f"setp.le.or.s32 hidden, ${3 * count + key}, {query}, hidden;")
        steps.append(f"selp.f32 ${i}, 0fFF800000, ${i}, hidden;")
    return (
        "{ .reg .pred some, hidden; setp.ne.s32 some, 0, 0; " + " ".join(tests) +
        " vote.sync.any.pred some, some, -1; @!some bra DONE; " + " ".join(steps) + " DONE: }"
    )  # fmt: skip


@triton.constexpr_function
def _hiding_registers(count):
    """Its registers: results in the places of the first ``count`` arguments."""
    return ",".join(["=f"] * count + [str(i) for i in range(count)] + ["r"] * (2 * count))


@jit
def _seen(s, tile, keys, SETUP: gl.constexpr):
    """Scores, those of hidden pairs -infinity. Mostly a warp sees all, and goes on at once.

    One loop with this needs fewer registers than two, of tiles with a mask and of tiles without.
    """
    COUNT: gl.constexpr = s.shape[0] * s.shape[1] // 128
    TEXT: gl.constexpr = _hiding(COUNT, SETUP.LEFT or SETUP.MASK == INTERVALS)
    REGISTERS: gl.constexpr = _hiding_registers(COUNT)
    column = gl.arange(0, SETUP.BLOCK_Q, layout=gl.SliceLayout(0, s.type.layout))
    first = ((column & 6) + tile * SETUP.BLOCK_Q)[None, :]
    seen_from, seen_until = keys.seen_from[:, None] - first, keys.seen_until[:, None] - first
    return gl.inline_asm_elementwise(
        TEXT, REGISTERS, [s, seen_from, seen_until], dtype=gl.float32, is_pure=True, pack=COUNT
    )


@jit
def probabilities(s, lse, tile, keys, head, sizes, scores, SETUP: gl.constexpr):
    """P^T of one tile, and d(capped score) / d(scaled score).

    With dropout, what is dropped has a minus: one register for both.

    Args:
        s: [keys, queries], the products. lse: [queries].
    """
    d_cap = s
    if SETUP.PLAIN:
        s = s * scores.scale - lse[None, :]
    else:
        s, d_cap = _modify(s, lse, tile, keys, head, sizes, scores, SETUP)
    if SETUP.MASKED:
        s = _seen(s, tile, keys, SETUP)
    p = gl.exp2(s)
    if SETUP.DROPOUT:
        row = tile * SETUP.BLOCK_Q + gl.arange(
            0, SETUP.BLOCK_Q, layout=gl.SliceLayout(0, s.type.layout)
        )
        kept = keep_bits(
            scores.dropout.seed_ptr, scores.dropout.threshold, head.batch, head.number,
            row[None, :], keys.col[:, None],
        )  # fmt: skip
        p = gl.where(kept, p, -p)
    return p, d_cap


@jit
def weights(p, scores, SETUP: gl.constexpr):
    """What values are summed with: P after dropout."""
    if SETUP.DROPOUT:
        p = gl.maximum(p, 0.0) * scores.dropout.keep_scale
    return p


@jit
def score_gradient(p, dp, delta, scores, SETUP: gl.constexpr):
    """dS of `probabilities` and of what came for `weights`."""
    if SETUP.DROPOUT:
        dp = gl.where(p > 0, dp * scores.dropout.keep_scale, 0.0)
        p = gl.abs(p)
    return p * (dp - delta)


@jit
def gradient_scale(scores, SETUP: gl.constexpr):
    """What turns a sum of dS Q into dK."""
    scale = scores.scale
    if SETUP.PLAIN:
        scale = scale * (1 / _LOG2E)
    return scale


@jit
def nan_keys(dk, dv):
    """int32 [keys], 1 where dK or dV holds NaN."""
    marked = gl.max((dv != dv).to(gl.int32), 1)
    marked = gl.convert_layout(marked, gl.SliceLayout(1, dk.type.layout))
    return gl.maximum(marked, gl.max((dk != dk).to(gl.int32), 1))


@jit
def store_gradients(
    HALF: gl.constexpr, BARRIER: gl.constexpr, SETUP: gl.constexpr,
    dk, dv, k, v, place, scores, descs, memory,
):  # fmt: skip
    """Stores a tile of dK and dV, of which each of two consumers has a part.

    Args:
        BARRIER: PTX at which the consumers meet.
        k, v: the same parts of K and V, which become what dK and dV are stored from.
    """
    # Both are done with all of K.
    asm(BARRIER, 4)
    v.store(dv.to(v.dtype))
    k.store((dk * gradient_scale(scores, SETUP)).to(k.dtype))
    fence_async_shared()
    asm(BARRIER, 4)
    at = [place.batch, place.key_head, place.tile * SETUP.BLOCK_K, 0]
    if HALF == 0:
        tma_store(descs.dv, at, tile_of(descs.dv, memory.v))
    else:
        tma_store(descs.dk, at, tile_of(descs.dk, memory.k))
    tma_store_read(0)


@jit
def in_order_of_registers(x):
    """[64, 64] of a product as one run, each thread's numbers in groups of four.

    The bits of row and column in the order of registers, lanes and warps of the product: nothing
    moves, and each thread stores 16 bytes at a time.
    """
    return x.reshape([2] * 12).permute((6, 7, 8, 0, 1, 3, 4, 5, 9, 10, 2, 11)).reshape([4096])
