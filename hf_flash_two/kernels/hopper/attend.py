"""The forward pass as a Gluon kernel.

Source: FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608). A program has three or four
partitions of warps: two or three consumers of four warps, each with 64 rows of a tile of queries,
and a producer, one warp that copies tiles by TMA. A consumer starts Q K^T of one tile of keys and
P V of the tile before, and computes the softmax of the one while the other runs. Consumers take
turns in starting products, so that the softmax of one falls into the products of the others.

A program goes on to other tiles of queries until none is left. The producer chooses them, tells the
consumers by a `_Message`, and copies the first tiles of the next while the last is finished.

Rows are scaled anew only where their largest score grew by much, as in FlashAttention-4.
"""

# What stands in a kernel is Triton's language, which its types do not describe.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton

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
    dropped,
    expect_keys,
    masked_scores,
    product,
    rows_of,
    store_rows,
    work_of,
)
from hf_flash_two.kernels.hopper.tile import (
    INTERVALS,
    arrive,
    exponent_factor,
    nth_tile,
    sync,
    uniform,
)
from hf_flash_two.kernels.params import LOG2E
from hf_flash_two.kernels.triton.args import PerHead

_LOG2E = gl.constexpr(LOG2E)
_ROWS = gl.constexpr(ROWS)
_MESSAGES = gl.constexpr(4)
_SLACK = gl.constexpr(8.0)
"""Powers of two by which probabilities may exceed 1 before a row is scaled anew."""

# Named barriers, behind those of Triton: for each stage, that its keys may be overwritten; for
# each, that its values may; for each consumer, that it has its turn; then these.
_NAMED = gl.constexpr(5)


@jit
def _queries_number(FLAGS: gl.constexpr):
    """Of the barriers that the queries of a turn may be overwritten."""
    return _NAMED + 2 * FLAGS.STAGES + FLAGS.CONSUMERS


@jit(do_not_specialize=[
    "threshold", "heads", "group", "query_length", "key_length", "offset", "left", "right",
    "row_tiles", "head_tiles", "together",
])  # fmt: skip
def attend_kernel(
    q_desc, q_rest, k_desc, k_rest, v_desc, v_rest, out_desc, out_rest, run_desc,
    lse_ptr, ranges_ptr, slopes: PerHead, sinks: PerHead, seed_ptr, tickets_ptr,
    scale, softcap, threshold, keep_scale, heads, group,
    query_length, key_length, offset, left, right, row_tiles, head_tiles, together,
    FLAGS: gl.constexpr,
):  # fmt: skip
    """Output and lse of tiles of queries.

    Args:
        q_desc, q_rest: [B, Hq / PACK_GQA, Tq, PACK_GQA, D], tiles of 64 rows.
        k_desc, k_rest: [B, Hk, Tk, D]. v_desc, v_rest: [B, Hk, Tk, Dv].
        out_desc, out_rest: as q, of Dv.
        run_desc: int32 [(B or 1) * key tiles, 2 BLOCK_K], ``query_start`` of each tile of keys and
            behind it how many queries see each, as 32 bits without a sign.
        lse_ptr: float32 [B, Hq, Tq].
        ranges_ptr: `ranges.key_ranges`.
        tickets_ptr: int32 [2 + 64 rows each], zeros: how many tiles were taken by programs that had
            one; whether the rows of any consumer hold NaN; whether those of each do. None if
            nothing of it is needed.
        offset, left, right: see `AttentionParams`.
        row_tiles: of one head. head_tiles: Hq / PACK_GQA of all batch rows.
        together: so many head tiles go side by side; their keys stay in the L2 cache.
        FLAGS: `config.ForwardFlags`.
    """
    BLOCK_K: gl.constexpr = k_desc.block_type.shape[2]
    D: gl.constexpr = q_desc.block_type.shape[4]
    DV: gl.constexpr = v_desc.block_type.shape[3]
    DTYPE: gl.constexpr = q_desc.dtype
    LINEAR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_s = allocate(DTYPE, FLAGS.SLOTS * FLAGS.CONSUMERS, _ROWS, D)
    k_s = allocate(DTYPE, FLAGS.STAGES, BLOCK_K, D)
    v_s = allocate(DTYPE, FLAGS.STAGES, BLOCK_K, DV)
    # What a call has none of is another thing at compile time, and unused.
    q_more, k_more, v_more = q_s, k_s, v_s
    if FLAGS.D_REST > 0:
        q_more = allocate(DTYPE, FLAGS.SLOTS * FLAGS.CONSUMERS, _ROWS, FLAGS.D_REST)
        k_more = allocate(DTYPE, FLAGS.STAGES, BLOCK_K, FLAGS.D_REST)
    else:
        q_rest, k_rest = q_desc, k_desc
    out_s, out_more = q_s, q_more
    if FLAGS.OWN_OUT:
        out_s = allocate(DTYPE, FLAGS.CONSUMERS, _ROWS, DV)
    if FLAGS.V_REST > 0:
        v_more = allocate(DTYPE, FLAGS.STAGES, BLOCK_K, FLAGS.V_REST)
        if FLAGS.OWN_OUT:
            out_more = allocate(DTYPE, FLAGS.CONSUMERS, _ROWS, FLAGS.V_REST)
    else:
        v_rest, out_rest = v_desc, out_desc
    run_s = q_s
    if FLAGS.MASK == INTERVALS:
        run_s = gl.allocate_shared_memory(gl.int32, [FLAGS.STAGES, 2 * BLOCK_K], LINEAR)
    else:
        run_desc, ranges_ptr = q_desc, lse_ptr
    slopes_ptr, sinks_ptr = slopes.ptr, sinks.ptr
    if not FLAGS.ALIBI:
        slopes_ptr = lse_ptr
    if not FLAGS.SINKS:
        sinks_ptr = lse_ptr
    if not FLAGS.DROPOUT:
        seed_ptr = lse_ptr
    if not FLAGS.PERSISTENT and not FLAGS.RESCUE:
        tickets_ptr = lse_ptr
    message_s = gl.allocate_shared_memory(gl.int32, [_MESSAGES, 32], LINEAR)
    message_full = allocate_barriers(_MESSAGES, 1)
    q_full = allocate_barriers(FLAGS.SLOTS * FLAGS.CONSUMERS, 1)
    k_full = allocate_barriers(FLAGS.STAGES, 1)
    v_full = allocate_barriers(FLAGS.STAGES, 1)
    flags: gl.constexpr = FLAGS
    of_producer = (
        q_desc, q_rest, k_desc, k_rest, v_desc, v_rest, run_desc, ranges_ptr, tickets_ptr,
        q_s, q_more, k_s, k_more, v_s, v_more, run_s, message_s,
        message_full, q_full, k_full, v_full,
        heads, group, query_length, key_length, offset, left, right,
        row_tiles, head_tiles, together,
    )  # fmt: skip
    of_consumer = (
        out_desc, out_rest, lse_ptr, slopes_ptr, slopes.stride_b, slopes.stride_h,
        sinks_ptr, sinks.stride_b, sinks.stride_h, seed_ptr, tickets_ptr,
        q_s, q_more, k_s, k_more, v_s, v_more, out_s, out_more, run_s, message_s,
        message_full, q_full, k_full, v_full,
        scale, softcap, threshold, keep_scale, heads,
        query_length, key_length, offset, left, right,
    )  # fmt: skip
    if FLAGS.CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consumer, (flags, 0) + of_consumer),
                (_consumer, (flags, 1) + of_consumer),
                (_producer, (flags,) + of_producer),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consumer, (flags, 0) + of_consumer),
                (_consumer, (flags, 1) + of_consumer),
                (_consumer, (flags, 2) + of_consumer),
                (_producer, (flags,) + of_producer),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )


# A message: total, masked, tile_start, full_start, full_stop of `tiles_of_rows`, then the tile's
# number, tile of rows, batch row and first head. A total of 0 ends a list.


@jit
def _tell(
    message_s, message_full, number,
    total, masked, tile_start, full_start, full_stop, work, tile, batch, head,
):  # fmt: skip
    """Sends the message of this number to the consumers."""
    lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    message = gl.where(lane == 0, total, masked)
    message = gl.where(lane == 2, tile_start, message)
    message = gl.where(lane == 3, full_start, message)
    message = gl.where(lane == 4, full_stop, message)
    message = gl.where(lane == 5, work, message)
    message = gl.where(lane == 6, tile, message)
    message = gl.where(lane == 7, batch, message)
    message = gl.where(lane == 8, head, message)
    slot = number % _MESSAGES
    message_s.index(slot).store(message)
    mbarrier.arrive(message_full.index(slot), count=1)


@jit
def _field(message, FIELD: gl.constexpr):
    lane = gl.arange(0, 32, layout=message.type.layout)
    return uniform(gl.max(gl.where(lane == FIELD, message, -(2**31)), 0))


@jit
def _message(message_s, number):
    """The message of this number, one word for each lane of a warp."""
    return message_s.index(number % _MESSAGES).load(gl.BlockedLayout([1], [32], [4], [0]))


@jit
def _slot_of(number, FLAGS: gl.constexpr, W: gl.constexpr):
    """Of a tile's queries: whose turn it is, a consumer's place, the phase of its barrier."""
    turn, phase = number * 0, number & 1
    if FLAGS.SLOTS == 2:
        turn, phase = number & 1, number >> 1 & 1
    return turn, turn * FLAGS.CONSUMERS + W, phase


@jit
def _copy_queries(
    q_desc, q_rest, q_s, q_more, q_full, slot, batch, head, tile, FLAGS: gl.constexpr
):  # fmt: skip
    """The rows of all consumers, the first of which has this slot."""
    D: gl.constexpr = q_desc.block_type.shape[4]
    CONSUMERS: gl.constexpr = FLAGS.CONSUMERS
    for w in gl.static_range(CONSUMERS):
        first_row = (tile * CONSUMERS + w) * _ROWS
        full = q_full.index(slot + w)
        mbarrier.expect(full, 2 * _ROWS * (D + FLAGS.D_REST))
        copy_rows(q_desc, batch, head, first_row, 0, full, q_s.index(slot + w))
        if FLAGS.D_REST > 0:
            copy_rows(q_rest, batch, head, first_row, D, full, q_more.index(slot + w))


@jit
def _producer(
    FLAGS: gl.constexpr,
    q_desc, q_rest, k_desc, k_rest, v_desc, v_rest, run_desc, ranges_ptr, tickets_ptr,
    q_s, q_more, k_s, k_more, v_s, v_more, run_s, message_s,
    message_full, q_full, k_full, v_full,
    heads, group, query_length, key_length, offset, left, right, row_tiles, head_tiles, together,
):  # fmt: skip
    """Chooses tiles of queries, and copies what the consumers take: stage by stage."""
    BLOCK_K: gl.constexpr = k_desc.block_type.shape[2]
    D: gl.constexpr = q_desc.block_type.shape[4]
    DV: gl.constexpr = v_desc.block_type.shape[3]
    STAGES: gl.constexpr = FLAGS.STAGES
    THREADS: gl.constexpr = 128 * FLAGS.CONSUMERS + 32
    K_BYTES: gl.constexpr = 2 * BLOCK_K * (D + FLAGS.D_REST)
    V_BYTES: gl.constexpr = 2 * BLOCK_K * (DV + FLAGS.V_REST)
    works = row_tiles * head_tiles
    work = gl.program_id(0)
    number = 0
    copied = 0
    while work < works:
        following = works
        tile, batch, head, total, masked, tile_start, full_start, full_stop = work_of(
            work, ranges_ptr, heads, query_length, key_length, offset, left, right,
            row_tiles, head_tiles, together, FLAGS, BLOCK_K,
        )  # fmt: skip
        _tell(
            message_s, message_full, number,
            total, masked, tile_start, full_start, full_stop, work, tile, batch, head,
        )  # fmt: skip
        key_head = head // group
        for n in range(total):
            key_tile = nth_tile(n, masked, tile_start, full_start, full_stop)
            key_row = key_tile * BLOCK_K
            stage = copied % STAGES
            full = k_full.index(stage)
            if FLAGS.PERSISTENT:
                # As late as this hides the wait: a tile that is taken early waits for this program,
                # and others have nothing left (9 % of head dim 256, causal, 16384 tokens).
                if n == total - 1:
                    following = gl.num_programs(0) + gl.atomic_add(tickets_ptr, 1, sem="relaxed")
            if copied >= STAGES:
                sync(_NAMED + stage, THREADS, 1)
            expect_keys(
                full, K_BYTES, run_desc, key_length, batch, key_tile, run_s, stage,
                n < gl.maximum(masked, 1), FLAGS,
            )  # fmt: skip
            copy(k_desc, batch, key_head, key_row, 0, full, k_s.index(stage))
            if FLAGS.D_REST > 0:
                copy(k_rest, batch, key_head, key_row, D, full, k_more.index(stage))
            if n == 0:
                turn, slot, _ = _slot_of(number, FLAGS, 0)
                if number >= FLAGS.SLOTS:
                    sync(_queries_number(FLAGS) + turn, THREADS, 1)
                _copy_queries(q_desc, q_rest, q_s, q_more, q_full, slot, batch, head, tile, FLAGS)
            if copied >= STAGES:
                sync(_NAMED + STAGES + stage, THREADS, 1)
            full = v_full.index(stage)
            mbarrier.expect(full, V_BYTES)
            copy(v_desc, batch, key_head, key_row, 0, full, v_s.index(stage))
            if FLAGS.V_REST > 0:
                copy(v_rest, batch, key_head, key_row, DV, full, v_more.index(stage))
            copied += 1
        number += 1
        work = following
    _tell(message_s, message_full, number, 0, 0, 0, 0, 0, 0, 0, 0, 0)


@jit
def _scores(q, q_more, q_held, k, k_more, zeros, FLAGS: gl.constexpr):
    """Starts Q K^T, of which the first ``FLAGS.HELD`` columns of Q are in registers."""
    HELD: gl.constexpr = FLAGS.HELD
    if HELD > 0:
        REST: gl.constexpr = q.shape[1] - HELD
        k_first = k.slice(0, HELD, dim=1).permute((1, 0))
        s = warpgroup_mma(q_held, k_first, zeros, use_acc=False, is_async=True)
        k_last = k.slice(HELD, REST, dim=1).permute((1, 0))
        s = warpgroup_mma(q.slice(HELD, REST, dim=1), k_last, s, is_async=True)
    else:
        s = product(q, q_more, k, k_more, zeros, FLAGS)
    return s


@triton.constexpr_function
def _rescaling(count):
    """PTX that multiplies ``count`` numbers of two rows, unless the factors of all lanes are 1."""
    steps = " ".join(f"mul.f32 ${i}, ${i}, ${2 * count + i};" for i in range(count))
    return (
        f"{{ .reg .pred some, any; setp.neu.f32 some, ${2 * count}, 0f3F800000; "
        f"setp.neu.or.f32 some, ${2 * count + 2}, 0f3F800000, some; "
        f"vote.sync.any.pred any, some, -1; @!any bra DONE; {steps} DONE: }}"
    )


@triton.constexpr_function
def _rescaling_registers(count):
    """Its registers: results in the places of the first ``count`` arguments."""
    return ",".join(["=f"] * count + [str(i) for i in range(count)] + ["f"] * count)


@jit
def _rescaled(acc, alpha):
    """A sum times a factor of each row. Mostly all are 1, and a warp goes on at once."""
    COUNT: gl.constexpr = acc.shape[0] * acc.shape[1] // 128
    TEXT: gl.constexpr = _rescaling(COUNT)
    REGISTERS: gl.constexpr = _rescaling_registers(COUNT)
    by = gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))[:, None]
    return gl.inline_asm_elementwise(
        TEXT, REGISTERS, [acc, by], dtype=gl.float32, is_pure=True, pack=COUNT
    )


@jit
def _packed(prob, DTYPE: gl.constexpr):
    """[rows, keys / 2], probabilities rounded to 16 bits, two neighbours in one int32.

    Triton hands 16-bit numbers from turn to turn of a loop one by one, and ptxas swaps the halves
    of each register twice on the way: 64 instructions of 500.
    """
    low, high = gl.split(prob.reshape([prob.shape[0], prob.shape[1] // 2, 2]))
    if DTYPE == gl.bfloat16:
        packed = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [low, high],
            dtype=gl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        packed = gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [low, high],
            dtype=gl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return packed


@jit
def _unpacked(packed, DTYPE: gl.constexpr, LAYOUT: gl.constexpr):
    """What was `_packed`, as the left factor of a product."""
    low, high = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [packed],
        dtype=(gl.int16, gl.int16), is_pure=True, pack=1,
    )  # fmt: skip
    both = gl.join(low.to(DTYPE, bitcast=True), high.to(DTYPE, bitcast=True))
    both = both.reshape([packed.shape[0], packed.shape[1] * 2])
    return gl.convert_layout(both, LAYOUT)


@jit
def _row_max(s):
    """The largest score of each row, by four chains of comparisons side by side."""
    PARTS: gl.constexpr = 4
    x = gl.max(s.reshape([s.shape[0], PARTS, s.shape[1] // PARTS]), 1)
    return gl.convert_layout(gl.max(x, 1), gl.SliceLayout(1, s.type.layout))


@jit
def _row_sums(s):
    """[rows, 4], the sum of what each of the four threads of a row has, in four chains."""
    x = s.reshape([s.shape[0], 4, s.shape[1] // 32, 4, 2])
    return gl.sum(gl.sum(gl.sum(x, 1), 1), 2)


@jit
def _place_of(copied, FLAGS: gl.constexpr):
    """Stage of a tile before which ``copied`` were copied, and the phase of its barriers."""
    if FLAGS.STAGES == 2:
        # What the next product waits for: a division would take longer.
        stage, phase = copied & 1, copied >> 1 & 1
    else:
        stage, phase = copied % FLAGS.STAGES, copied // FLAGS.STAGES & 1
    return stage, phase


@jit
def _turn(
    n, copied, total, masked, tile_start, full_start, full_stop,
    packed, acc, acc_more, row_max, row_sums,
    q, q_more, q_held, k_s, k_more, v_s, v_more, run_s, k_full, v_full, zeros,
    row, position, head, batch, key_length, left, right, scale, softcap, slope, factor,
    seed_ptr, threshold, MASKED: gl.constexpr, FLAGS: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """Softmax of the n-th tile of keys, beside the product of the tile before with its values.

    ``copied`` tiles of keys came before this one.
    """
    THREADS: gl.constexpr = 128 * FLAGS.CONSUMERS + 32
    TURN: gl.constexpr = _NAMED + 2 * FLAGS.STAGES
    stage, phase = _place_of(copied, FLAGS)
    before, phase_before = _place_of(copied - 1, FLAGS)
    p = _unpacked(packed, q.dtype, gl.DotOperandLayout(0, acc.type.layout, 2))
    mbarrier.wait(k_full.index(stage), phase)
    if FLAGS.TURNS:
        sync(TURN + W, 256, 4)
    s = _scores(q, q_more, q_held, k_s.index(stage), k_more.index(stage), zeros, FLAGS)
    mbarrier.wait(v_full.index(before), phase_before)
    acc = warpgroup_mma(p, v_s.index(before), acc, is_async=True)
    if FLAGS.V_REST > 0:
        acc_more = warpgroup_mma(p, v_more.index(before), acc_more, is_async=True)
    if FLAGS.TURNS:
        arrive(TURN + (W + 1) % FLAGS.CONSUMERS, 256, 4)
    OTHERS: gl.constexpr = 2 if FLAGS.V_REST > 0 else 1
    if MASKED:
        # With the rows, lest the mask is worked out before: its bits would take registers.
        s, position = warpgroup_mma_wait(OTHERS, deps=(s, position))
    else:
        s = warpgroup_mma_wait(OTHERS, deps=(s,))
    if not (MASKED and FLAGS.MASK == INTERVALS):
        arrive(_NAMED + stage, THREADS, 4)
    key_tile = nth_tile(n, masked, tile_start, full_start, full_stop)
    s = masked_scores(
        s, position, key_tile, key_length, left, right, run_s.index(stage), scale, softcap, slope,
        MASKED, FLAGS,
    )  # fmt: skip
    if MASKED and FLAGS.MASK == INTERVALS:
        arrive(_NAMED + stage, THREADS, 4)
    new_max = _row_max(s) * factor
    if FLAGS.LAZY:
        new_max = gl.where(new_max <= row_max + _SLACK, row_max, new_max)
    else:
        new_max = gl.maximum(row_max, new_max)
    safe_max = new_max
    if MASKED:
        safe_max = gl.where(new_max == float("-inf"), 0.0, new_max)
    prob = gl.exp2(s * factor - safe_max[:, None])
    alpha = gl.exp2(row_max - safe_max)
    of_sums: gl.constexpr = gl.SliceLayout(1, row_sums.type.layout)
    row_sums = row_sums * gl.convert_layout(alpha, of_sums)[:, None] + _row_sums(prob)
    if FLAGS.DROPOUT:
        prob = dropped(prob, seed_ptr, threshold, batch, head, row, key_tile)
    if FLAGS.V_REST > 0:
        acc, acc_more, p, prob = warpgroup_mma_wait(0, deps=(acc, acc_more, p, prob))
    else:
        acc, p, prob = warpgroup_mma_wait(0, deps=(acc, p, prob))
    arrive(_NAMED + FLAGS.STAGES + before, THREADS, 4)
    # Not before: the new probabilities take the registers of the old ones.
    packed = _packed(prob, q.dtype)
    if FLAGS.LAZY:
        acc = _rescaled(acc, alpha)
        if FLAGS.V_REST > 0:
            acc_more = _rescaled(acc_more, alpha)
    else:
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))[:, None]
        if FLAGS.V_REST > 0:
            by = gl.convert_layout(alpha, gl.SliceLayout(1, acc_more.type.layout))
            acc_more = acc_more * by[:, None]
    return packed, acc, acc_more, new_max, row_sums


@jit
def _consumer(
    FLAGS: gl.constexpr, W: gl.constexpr,
    out_desc, out_rest, lse_ptr, slopes_ptr, slopes_b, slopes_h,
    sinks_ptr, sinks_b, sinks_h, seed_ptr, tickets_ptr,
    q_s, q_more, k_s, k_more, v_s, v_more, out_s, out_more, run_s, message_s,
    message_full, q_full, k_full, v_full,
    scale, softcap, threshold, keep_scale, heads,
    query_length, key_length, offset, left, right,
):  # fmt: skip
    """64 rows of each tile of queries."""
    if FLAGS.TURNS and W == FLAGS.CONSUMERS - 1:
        arrive(_NAMED + 2 * FLAGS.STAGES, 256, 4)
    number = 0
    copied = 0
    mbarrier.wait(message_full.index(0), 0)
    total = _field(_message(message_s, 0), 0)
    while total > 0:
        _attend(
            number, copied, total,
            out_desc, out_rest, lse_ptr, slopes_ptr, slopes_b, slopes_h,
            sinks_ptr, sinks_b, sinks_h, seed_ptr, tickets_ptr,
            q_s, q_more, k_s, k_more, v_s, v_more, out_s, out_more, run_s, message_s,
            q_full, k_full, v_full,
            scale, softcap, threshold, keep_scale, heads,
            query_length, key_length, offset, left, right, FLAGS, W,
        )  # fmt: skip
        copied += total
        number += 1
        mbarrier.wait(message_full.index(number % _MESSAGES), number // _MESSAGES & 1)
        total = _field(_message(message_s, number), 0)
    tma_store_read(0)


@jit
def _attend(
    number, copied, total,
    out_desc, out_rest, lse_ptr, slopes_ptr, slopes_b, slopes_h,
    sinks_ptr, sinks_b, sinks_h, seed_ptr, tickets_ptr,
    q_s, q_more, k_s, k_more, v_s, v_more, out_s, out_more, run_s, message_s,
    q_full, k_full, v_full,
    scale, softcap, threshold, keep_scale, heads,
    query_length, key_length, offset, left, right, FLAGS: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """The rows of one tile."""
    BLOCK_K: gl.constexpr = k_s.shape[1]
    DV: gl.constexpr = v_s.shape[2]
    DTYPE: gl.constexpr = q_s.dtype
    STAGES: gl.constexpr = FLAGS.STAGES
    THREADS: gl.constexpr = 128 * FLAGS.CONSUMERS + 32
    V_REST: gl.constexpr = FLAGS.V_REST
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    REST: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V_REST or 16, 16])
    LEFT_FACTOR: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    message = _message(message_s, number)
    masked = _field(message, 1)
    tile_start, full_start, full_stop = _field(message, 2), _field(message, 3), _field(message, 4)
    batch = _field(message, 7)
    row, _, head = rows_of(_field(message, 6), _field(message, 8), ROW, FLAGS, W)
    position = row + offset
    slope = 0.0
    if FLAGS.ALIBI:
        slope = gl.load(slopes_ptr + batch * slopes_b + head * slopes_h)
    factor = exponent_factor(scale, FLAGS)
    zeros = gl.zeros((_ROWS, BLOCK_K), gl.float32, SCORES)
    acc = gl.zeros((_ROWS, DV), gl.float32, OUT)
    acc_more = 0.0
    if V_REST > 0:
        acc_more = gl.zeros((_ROWS, V_REST), gl.float32, REST)
    turn, slot, q_phase = _slot_of(number, FLAGS, W)
    q = q_s.index(slot)
    q_last = q_more.index(slot)

    stage, phase = _place_of(copied, FLAGS)
    mbarrier.wait(q_full.index(slot), q_phase)
    mbarrier.wait(k_full.index(stage), phase)
    q_held = 0.0
    if FLAGS.HELD > 0:
        q_held = q.slice(0, FLAGS.HELD, dim=1).load(gl.DotOperandLayout(0, SCORES, 2))
    s = _scores(q, q_last, q_held, k_s.index(stage), k_more.index(stage), zeros, FLAGS)
    s = warpgroup_mma_wait(0, deps=(s,))
    key_tile = nth_tile(0, masked, tile_start, full_start, full_stop)
    s = masked_scores(
        s, position, key_tile, key_length, left, right, run_s.index(stage), scale, softcap, slope,
        True, FLAGS,
    )  # fmt: skip
    arrive(_NAMED + stage, THREADS, 4)
    row_max = _row_max(s) * factor
    prob = gl.exp2(s * factor - gl.where(row_max == float("-inf"), 0.0, row_max)[:, None])
    row_sums = _row_sums(prob)
    if FLAGS.DROPOUT:
        prob = dropped(prob, seed_ptr, threshold, batch, head, row, key_tile)
    packed = _packed(prob, DTYPE)
    for n in range(1, masked):
        packed, acc, acc_more, row_max, row_sums = _turn(
            n, copied + n, total, masked, tile_start, full_start, full_stop,
            packed, acc, acc_more, row_max, row_sums,
            q, q_last, q_held, k_s, k_more, v_s, v_more, run_s, k_full, v_full, zeros,
            row, position, head, batch, key_length, left, right, scale, softcap, slope, factor,
            seed_ptr, threshold, True, FLAGS, W,
        )  # fmt: skip
    for n in range(gl.maximum(masked, 1), total):
        packed, acc, acc_more, row_max, row_sums = _turn(
            n, copied + n, total, masked, tile_start, full_start, full_stop,
            packed, acc, acc_more, row_max, row_sums,
            q, q_last, q_held, k_s, k_more, v_s, v_more, run_s, k_full, v_full, zeros,
            row, position, head, batch, key_length, left, right, scale, softcap, slope, factor,
            seed_ptr, threshold, False, FLAGS, W,
        )  # fmt: skip
    stage, phase = _place_of(copied + total - 1, FLAGS)
    p = _unpacked(packed, DTYPE, LEFT_FACTOR)
    if FLAGS.OWN_OUT:
        arrive(_queries_number(FLAGS) + turn, THREADS, 4)
    mbarrier.wait(v_full.index(stage), phase)
    acc = warpgroup_mma(p, v_s.index(stage), acc, is_async=True)
    if V_REST > 0:
        acc_more = warpgroup_mma(p, v_more.index(stage), acc_more, is_async=True)
        acc, acc_more, p = warpgroup_mma_wait(0, deps=(acc, acc_more, p))
    else:
        acc, p = warpgroup_mma_wait(0, deps=(acc, p))
    arrive(_NAMED + STAGES + stage, THREADS, 4)

    # Read again, and not kept: what no loop keeps takes no registers there.
    message = _message(message_s, number)
    tile, batch, first_head = _field(message, 6), _field(message, 7), _field(message, 8)
    row, head, _ = rows_of(tile, first_head, ROW, FLAGS, W)
    row_inside = row < query_length
    row_sum = gl.convert_layout(gl.sum(row_sums, 1), ROW)
    scaled = keep_scale
    if FLAGS.SINKS:
        sink = gl.load(sinks_ptr + batch * sinks_b + head * sinks_h) * _LOG2E
        new_max = gl.maximum(row_max, sink)
        safe_max = gl.where(new_max == float("-inf"), 0.0, new_max)
        alpha = gl.exp2(row_max - safe_max)
        row_sum = row_sum * alpha + gl.exp2(sink - safe_max)
        scaled = alpha * keep_scale
        row_max = new_max
    none = row_sum == 0
    lse = gl.where(none, float("-inf"), row_max + gl.log2(row_sum)) / _LOG2E
    lse_at = lse_ptr + (batch * heads + head).to(gl.int64) * query_length + row
    gl.store(lse_at, lse, row_inside)
    scaled = scaled / gl.where(none, 1.0, row_sum)
    if FLAGS.RESCUE:
        spoiled = _nan(acc, ROW)
        if V_REST > 0:
            spoiled = gl.maximum(spoiled, _nan(acc_more, ROW))
        spoiled = (spoiled > 0) & row_inside
        marks = tickets_ptr + row * 0
        gl.store(marks + 1, 1, spoiled)
        gl.store(marks + 2 + _field(message, 5) * FLAGS.CONSUMERS + W, 1, spoiled)
    if FLAGS.OWN_OUT:
        tma_store_read(0)
        barrier()
    to, to_more = out_s.index(W), out_more.index(W)
    acc = acc * gl.convert_layout(scaled, gl.SliceLayout(1, OUT))[:, None]
    to.store(acc.to(DTYPE))
    if V_REST > 0:
        acc_more = acc_more * gl.convert_layout(scaled, gl.SliceLayout(1, REST))[:, None]
        to_more.store(acc_more.to(DTYPE))
    fence_async_shared()
    barrier()
    first_row = (tile * FLAGS.CONSUMERS + W) * _ROWS
    store_rows(out_desc, batch, first_head, first_row, 0, to)
    if V_REST > 0:
        store_rows(out_rest, batch, first_head, first_row, DV, to_more)
    if not FLAGS.OWN_OUT:
        tma_store_read(0)
        arrive(_queries_number(FLAGS) + turn, THREADS, 4)


@jit
def _nan(x, ROW: gl.constexpr):
    """[rows], 1 where one holds NaN."""
    return gl.convert_layout(gl.max((x != x).to(gl.int32), 1), ROW)
