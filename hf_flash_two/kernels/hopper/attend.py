"""The forward pass as a Gluon kernel.

Source: FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608). A program has three or four
partitions of warps: two or three consumers of four warps, each with 64 rows of a tile of queries,
and a producer, one warp that copies tiles by TMA. A consumer starts Q K^T of one tile of keys and
P V of the tile before, and computes the softmax of the one while the other runs. Consumers take
turns in starting products, so that the softmax of one falls into the products of the others.

A program goes on to other tiles of queries until none is left. The producer chooses them, tells the
consumers by a `_Message`, and copies the first tiles of the next while the last is finished.

A head dim that is no power of two is computed in two parts, such as 128 and 64: ``q_desc`` copies
the first and ``q_rest`` the second, if its size is not 0.
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
    reinterpret,
    tma_load,
    tma_store,
    tma_store_done,
    tma_store_read,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from hf_flash_two.kernels.hopper.tile import (
    INTERVALS,
    any_of,
    arrive,
    exponent_factor,
    keep_bits,
    modified,
    nth_tile,
    sync,
    tiles_of_rows,
    uniform,
)
from hf_flash_two.kernels.params import LOG2E
from hf_flash_two.kernels.triton.args import PerHead

_LOG2E = gl.constexpr(LOG2E)
_ROWS = gl.constexpr(ROWS)
_COLUMNS = gl.constexpr(64)
_MESSAGES = gl.constexpr(4)

# Named barriers, behind those of Triton: for each stage, that its keys may be overwritten; for
# each, that its values may; for each consumer, that it has its turn; then these.
_NAMED = gl.constexpr(5)


@jit
def _again_number(FLAGS: gl.constexpr):
    """Of the barrier for tiles that are computed again; behind it that of the consumers alone, and
    that the queries may be overwritten."""
    return _NAMED + 2 * FLAGS.STAGES + FLAGS.CONSUMERS


@jit(do_not_specialize=[
    "threshold", "heads", "group", "query_length", "key_length", "offset", "left", "right",
    "row_tiles", "head_tiles", "together",
])  # fmt: skip
def attend_kernel(
    q_desc, q_rest, k_desc, k_rest, v_desc, v_rest, out_desc, out_rest, part_desc, run_desc,
    lse_ptr, ranges_ptr, slopes: PerHead, sinks: PerHead, seed_ptr, tickets_ptr,
    scale, softcap, threshold, keep_scale, heads, group,
    query_length, key_length, offset, left, right, row_tiles, head_tiles, together,
    FLAGS: gl.constexpr,
):  # fmt: skip
    """Output and lse of tiles of queries.

    Args:
        q_desc, q_rest: [B, Hq / PACK_GQA, Tq, PACK_GQA, D], tiles of 64 rows.
        k_desc, k_rest: [B, Hk, Tk, D]. v_desc, v_rest: [B, Hk, Tk, Dv].
        out_desc, out_rest, part_desc: as q, of Dv; the last in parts of 64 columns.
        run_desc: int32 [(B or 1) * key tiles, 2 BLOCK_K], ``query_start`` of each tile of keys and
            behind it how many queries see each, as 32 bits without a sign.
        lse_ptr: float32 [B, Hq, Tq].
        ranges_ptr: `ranges.key_ranges`.
        tickets_ptr: int32 [1 + tiles], zeros: how many tiles were taken by programs that had one,
            and for each tile who computed it and is to do so again, plus 1. None if each program
            has one tile.
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
    q_s = _allocate(DTYPE, FLAGS.CONSUMERS, _ROWS, D)
    k_s = _allocate(DTYPE, FLAGS.STAGES, BLOCK_K, D)
    v_s = _allocate(DTYPE, FLAGS.STAGES, BLOCK_K, DV)
    # What a call has none of is another thing at compile time, and unused.
    q_more, k_more, v_more = q_s, k_s, v_s
    if FLAGS.D_REST > 0:
        q_more = _allocate(DTYPE, FLAGS.CONSUMERS, _ROWS, FLAGS.D_REST)
        k_more = _allocate(DTYPE, FLAGS.STAGES, BLOCK_K, FLAGS.D_REST)
    else:
        q_rest, k_rest = q_desc, k_desc
    out_s, out_more = q_s, q_more
    if FLAGS.OWN_OUT:
        out_s = _allocate(DTYPE, FLAGS.CONSUMERS, _ROWS, DV)
    if FLAGS.V_REST > 0:
        v_more = _allocate(DTYPE, FLAGS.STAGES, BLOCK_K, FLAGS.V_REST)
        if FLAGS.OWN_OUT:
            out_more = _allocate(DTYPE, FLAGS.CONSUMERS, _ROWS, FLAGS.V_REST)
    else:
        v_rest, out_rest = v_desc, out_desc
    part_s = q_s
    if FLAGS.RESCUE:
        part_s = _allocate(DTYPE, FLAGS.CONSUMERS, _ROWS, _COLUMNS)
    else:
        part_desc = out_desc
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
    if not FLAGS.PERSISTENT:
        tickets_ptr = lse_ptr
    message_s = gl.allocate_shared_memory(gl.int32, [_MESSAGES, 32], LINEAR)
    message_full = allocate_barriers(_MESSAGES, 1)
    q_full = allocate_barriers(FLAGS.CONSUMERS, 1)
    k_full = allocate_barriers(FLAGS.STAGES, 1)
    v_full = allocate_barriers(FLAGS.STAGES, 1)
    again_full = allocate_barriers(1, 1)
    flags: gl.constexpr = FLAGS
    of_producer = (
        q_desc, q_rest, k_desc, k_rest, v_desc, v_rest, run_desc, ranges_ptr, tickets_ptr,
        q_s, q_more, k_s, k_more, v_s, v_more, run_s, message_s,
        message_full, q_full, k_full, v_full, again_full,
        heads, group, query_length, key_length, offset, left, right,
        row_tiles, head_tiles, together,
    )  # fmt: skip
    of_consumer = (
        out_desc, out_rest, part_desc, lse_ptr, slopes_ptr, slopes.stride_b, slopes.stride_h,
        sinks_ptr, sinks.stride_b, sinks.stride_h, seed_ptr, tickets_ptr,
        q_s, q_more, k_s, k_more, v_s, v_more, out_s, out_more, part_s, run_s, message_s,
        message_full, q_full, k_full, v_full, again_full,
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


@jit
def _allocate(DTYPE: gl.constexpr, COUNT: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """``COUNT`` tiles of shared memory."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, COLUMNS], DTYPE)
    return gl.allocate_shared_memory(DTYPE, [COUNT, ROWS, COLUMNS], LAYOUT)


@jit
def _place(work, heads, row_tiles, head_tiles, together, FLAGS: gl.constexpr):
    """Tile of rows, batch row and first head of the tile of queries with this number.

    The last rows come first, as those of a causal mask take longest.
    """
    block = work // (together * row_tiles)
    within = work - block * (together * row_tiles)
    width = gl.minimum(together, head_tiles - block * together)
    turn = within // width
    head_tile = block * together + within - turn * width
    of_row = heads // FLAGS.PACK_GQA
    batch = head_tile // of_row
    return row_tiles - 1 - turn, batch, (head_tile - batch * of_row) * FLAGS.PACK_GQA


@jit
def _key_tiles(
    ranges_ptr, tile, batch, query_length, key_length, offset, left, right, row_tiles,
    FLAGS: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """`tiles_of_rows` of one tile of queries."""
    BLOCK_Q: gl.constexpr = FLAGS.CONSUMERS * _ROWS
    start = tile * BLOCK_Q // FLAGS.PACK_GQA
    stop = gl.minimum((tile * BLOCK_Q + BLOCK_Q - 1) // FLAGS.PACK_GQA + 1, query_length)
    ranges_at = ranges_ptr
    if FLAGS.MASK == INTERVALS and not FLAGS.SHARED_RUNS:
        ranges_at += batch * row_tiles * 4
    return tiles_of_rows(
        ranges_at, tile, start + offset, stop + offset, key_length, left, right, FLAGS, BLOCK_K
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
def _copy(desc, batch, head, row, column, full, to):
    """One tile of a [B, H, T, D] tensor into shared memory."""
    ROWS: gl.constexpr = desc.block_type.shape[2]
    COLUMNS: gl.constexpr = desc.block_type.shape[3]
    place = reinterpret(to, desc.dtype, [1, 1, ROWS, COLUMNS], desc.layout)
    tma_load(desc, [batch, head, row, column], full, place)


@jit
def _copy_queries(
    q_desc, q_rest, q_s, q_more, q_full, batch, head, tile, FLAGS: gl.constexpr
):  # fmt: skip
    """The rows of all consumers."""
    SLOTS: gl.constexpr = q_desc.block_type.shape[2]
    PACK: gl.constexpr = q_desc.block_type.shape[3]
    D: gl.constexpr = q_desc.block_type.shape[4]
    CONSUMERS: gl.constexpr = FLAGS.CONSUMERS
    for w in gl.static_range(CONSUMERS):
        at = [batch, head // PACK, (tile * CONSUMERS + w) * SLOTS, 0, 0]
        full = q_full.index(w)
        mbarrier.expect(full, 2 * _ROWS * (D + FLAGS.D_REST))
        to = reinterpret(q_s.index(w), q_desc.dtype, [1, 1, SLOTS, PACK, D], q_desc.layout)
        tma_load(q_desc, at, full, to)
        if FLAGS.D_REST > 0:
            at = [batch, head // PACK, (tile * CONSUMERS + w) * SLOTS, 0, D]
            to = reinterpret(
                q_more.index(w), q_desc.dtype, [1, 1, SLOTS, PACK, FLAGS.D_REST], q_rest.layout
            )
            tma_load(q_rest, at, full, to)


@jit
def _store_rows(desc, batch, head, first_row, column, source):
    SLOTS: gl.constexpr = desc.block_type.shape[2]
    PACK: gl.constexpr = desc.block_type.shape[3]
    COLUMNS: gl.constexpr = desc.block_type.shape[4]
    place = reinterpret(source, desc.dtype, [1, 1, SLOTS, PACK, COLUMNS], desc.layout)
    tma_store(desc, [batch, head // PACK, first_row // PACK, 0, column], place)


@jit
def _copy_runs(run_desc, key_length, batch, key_tile, full, to, FLAGS: gl.constexpr):
    """The intervals of one tile of keys into shared memory."""
    WIDTH: gl.constexpr = run_desc.block_type.shape[1]
    row = key_tile
    if not FLAGS.SHARED_RUNS:
        row += batch * gl.cdiv(key_length, WIDTH // 2)
    tma_load(run_desc, [row, 0], full, reinterpret(to, gl.int32, [1, WIDTH], run_desc.layout))


@jit
def _producer(
    FLAGS: gl.constexpr,
    q_desc, q_rest, k_desc, k_rest, v_desc, v_rest, run_desc, ranges_ptr, tickets_ptr,
    q_s, q_more, k_s, k_more, v_s, v_more, run_s, message_s,
    message_full, q_full, k_full, v_full, again_full,
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
    RUN_BYTES: gl.constexpr = 8 * BLOCK_K
    works = row_tiles * head_tiles
    work = gl.program_id(0)
    number = 0
    copied = 0
    while work < works:
        following = works
        tile, batch, head = _place(work, heads, row_tiles, head_tiles, together, FLAGS)
        total, masked, tile_start, full_start, full_stop = _key_tiles(
            ranges_ptr, tile, batch, query_length, key_length, offset, left, right, row_tiles,
            FLAGS, BLOCK_K,
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
            if FLAGS.MASK == INTERVALS:
                if n < gl.maximum(masked, 1):
                    mbarrier.expect(full, K_BYTES + RUN_BYTES)
                    run = run_s.index(stage)
                    _copy_runs(run_desc, key_length, batch, key_tile, full, run, FLAGS)
                else:
                    mbarrier.expect(full, K_BYTES)
            else:
                mbarrier.expect(full, K_BYTES)
            _copy(k_desc, batch, key_head, key_row, 0, full, k_s.index(stage))
            if FLAGS.D_REST > 0:
                _copy(k_rest, batch, key_head, key_row, D, full, k_more.index(stage))
            if n == 0:
                if number > 0:
                    sync(_again_number(FLAGS) + 2, THREADS, 1)
                _copy_queries(q_desc, q_rest, q_s, q_more, q_full, batch, head, tile, FLAGS)
            if copied >= STAGES:
                sync(_NAMED + STAGES + stage, THREADS, 1)
            full = v_full.index(stage)
            mbarrier.expect(full, V_BYTES)
            _copy(v_desc, batch, key_head, key_row, 0, full, v_s.index(stage))
            if FLAGS.V_REST > 0:
                _copy(v_rest, batch, key_head, key_row, DV, full, v_more.index(stage))
            copied += 1
        number += 1
        work = following
    _tell(message_s, message_full, number, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    if FLAGS.RESCUE:
        if any_of(0, _again_number(FLAGS), THREADS, 1):
            _copy_again(
                number,
                q_desc, q_rest, k_desc, k_rest, v_desc, run_desc, ranges_ptr, tickets_ptr,
                q_s, q_more, k_s, k_more, v_s, run_s, message_s, message_full, q_full, again_full,
                heads, group, query_length, key_length, offset, left, right,
                row_tiles, head_tiles, together, FLAGS,
            )  # fmt: skip


@jit
def _copy_again(
    number,
    q_desc, q_rest, k_desc, k_rest, v_desc, run_desc, ranges_ptr, tickets_ptr,
    q_s, q_more, k_s, k_more, v_s, run_s, message_s, message_full, q_full, again_full,
    heads, group, query_length, key_length, offset, left, right, row_tiles, head_tiles, together,
    FLAGS: gl.constexpr,
):  # fmt: skip
    """What `_compute_again` takes, one tile of keys after the other."""
    BLOCK_K: gl.constexpr = k_desc.block_type.shape[2]
    D: gl.constexpr = q_desc.block_type.shape[4]
    DV: gl.constexpr = v_desc.block_type.shape[3]
    THREADS: gl.constexpr = 128 * FLAGS.CONSUMERS + 32
    PARTS: gl.constexpr = (DV + FLAGS.V_REST + _COLUMNS - 1) // _COLUMNS
    RUN_BYTES: gl.constexpr = 8 * BLOCK_K if FLAGS.MASK == INTERVALS else 0
    BYTES: gl.constexpr = 2 * BLOCK_K * (D + FLAGS.D_REST + DV) + RUN_BYTES
    full = again_full.index(0)
    works = row_tiles * head_tiles
    copied = 0
    first = gl.program_id(0)
    stop = first + 1
    if FLAGS.PERSISTENT:
        first = 0
        stop = works
    for work in range(first, stop):
        mine = True
        if FLAGS.PERSISTENT:
            mine = gl.load(tickets_ptr + 1 + work) == gl.program_id(0) + 1
        if mine:
            tile, batch, head = _place(work, heads, row_tiles, head_tiles, together, FLAGS)
            total, masked, tile_start, full_start, full_stop = _key_tiles(
                ranges_ptr, tile, batch, query_length, key_length, offset, left, right, row_tiles,
                FLAGS, BLOCK_K,
            )  # fmt: skip
            number += 1
            _tell(
                message_s, message_full, number,
                total, masked, tile_start, full_start, full_stop, work, tile, batch, head,
            )  # fmt: skip
            key_head = head // group
            for i in range(PARTS * total):
                if copied > 0:
                    sync(_again_number(FLAGS), THREADS, 1)
                copied += 1
                if i == 0:
                    _copy_queries(q_desc, q_rest, q_s, q_more, q_full, batch, head, tile, FLAGS)
                key_tile = nth_tile(i % total, masked, tile_start, full_start, full_stop)
                key_row = key_tile * BLOCK_K
                mbarrier.expect(full, BYTES)
                _copy(k_desc, batch, key_head, key_row, 0, full, k_s.index(0))
                if FLAGS.D_REST > 0:
                    _copy(k_rest, batch, key_head, key_row, D, full, k_more.index(0))
                _copy(v_desc, batch, key_head, key_row, i // total * _COLUMNS, full, v_s.index(0))
                if FLAGS.MASK == INTERVALS:
                    run = run_s.index(0)
                    _copy_runs(run_desc, key_length, batch, key_tile, full, run, FLAGS)
    _tell(message_s, message_full, number + 1, 0, 0, 0, 0, 0, 0, 0, 0, 0)


@jit
def _product(q, q_more, k, k_more, zeros, FLAGS: gl.constexpr):
    """Starts Q K^T."""
    s = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
    if FLAGS.D_REST > 0:
        s = warpgroup_mma(q_more, k_more.permute((1, 0)), s, is_async=True)
    return s


@jit
def _rows(tile, first_head, ROW: gl.constexpr, FLAGS: gl.constexpr, W: gl.constexpr):
    """A consumer's rows, [64], and their heads: one for all, or [64] and [64, 1]."""
    packed_row = (tile * FLAGS.CONSUMERS + W) * _ROWS + gl.arange(0, _ROWS, layout=ROW)
    head, of_tile = first_head, first_head
    if FLAGS.PACK_GQA > 1:
        head = first_head + packed_row % FLAGS.PACK_GQA
        of_tile = head[:, None]
    return packed_row // FLAGS.PACK_GQA, head, of_tile


@jit
def _masked_scores(
    s, position, key_tile, key_length, left, right, run, scale, softcap, slope,
    MASKED: gl.constexpr, FLAGS: gl.constexpr,
):  # fmt: skip
    """Scores of products, those of hidden pairs -infinity."""
    BLOCK_K: gl.constexpr = s.shape[1]
    COL: gl.constexpr = gl.SliceLayout(0, s.type.layout)
    col = key_tile * BLOCK_K + gl.arange(0, BLOCK_K, layout=COL)
    s, _ = modified(s, position[:, None], col[None, :], scale, softcap, slope, FLAGS)
    if MASKED:
        if FLAGS.MASK == INTERVALS:
            start = run.slice(0, BLOCK_K).load(COL)
            length = run.slice(BLOCK_K, BLOCK_K).load(COL)
            # One comparison: before its start, the distance from it is a huge number.
            s = _kept_if("lt.u32", s, position[:, None] - start[None, :], length[None, :])
        else:
            s = _in_band(
                s,
                position - key_tile * BLOCK_K,
                key_length - key_tile * BLOCK_K,
                left,
                right,
                FLAGS,
            )
    return s


@jit
def _in_band(s, position, key_length, left, right, FLAGS: gl.constexpr):
    """The scores of a tile whose first key is key 0, outside of the band -infinity.

    A thread has two neighbours of every eight columns. What of a column's number is the thread's
    goes to the left of the comparison; the right is known at compile time.
    """
    COL: gl.constexpr = gl.SliceLayout(0, s.type.layout)
    col = gl.arange(0, s.shape[1], layout=COL)
    mine = (col % 8)[None, :]
    known = (col - col % 8)[None, :]
    last = position * 0 + key_length - 1
    if FLAGS.RIGHT:
        last = gl.minimum(position + right, last)
    s = _kept_if("ge.s32", s, last[:, None] - mine, known)
    if FLAGS.LEFT:
        s = _kept_if("le.s32", s, (position - left)[:, None] - mine, known)
    return s


@jit
def _kept_if(COMPARISON: gl.constexpr, s, a, b):
    """The scores where the comparison holds, elsewhere -infinity.

    As PTX: LLVM would gather the outcomes in words, and take them apart again.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; setp." + COMPARISON + " p, $2, $3; selp.f32 $0, $1, 0fFF800000, p; }",
        "=r,r,r,r", [s, a, b], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@jit
def _dropped(prob, seed_ptr, threshold, batch, head, row, key_tile):
    """Probabilities of a tile, those that dropout takes 0."""
    BLOCK_K: gl.constexpr = prob.shape[1]
    COL: gl.constexpr = gl.SliceLayout(0, prob.type.layout)
    col = key_tile * BLOCK_K + gl.arange(0, BLOCK_K, layout=COL)
    keep = keep_bits(seed_ptr, threshold, batch, head, row[:, None], col[None, :])
    return gl.where(keep, prob, 0.0)


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
def _row_sum(s):
    """The sum of each row, in the same way."""
    PARTS: gl.constexpr = 4
    x = gl.sum(s.reshape([s.shape[0], PARTS, s.shape[1] // PARTS]), 1)
    return gl.convert_layout(gl.sum(x, 1), gl.SliceLayout(1, s.type.layout))


@jit
def _turn(
    n, copied, total, masked, tile_start, full_start, full_stop,
    packed, acc, acc_more, row_max, row_sum,
    q, q_more, k_s, k_more, v_s, v_more, run_s, k_full, v_full, zeros,
    row, position, head, batch, key_length, left, right, scale, softcap, slope, factor,
    seed_ptr, threshold, MASKED: gl.constexpr, FLAGS: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """Softmax of the n-th tile of keys, beside the product of the tile before with its values.

    ``copied`` tiles of keys came before this one.
    """
    THREADS: gl.constexpr = 128 * FLAGS.CONSUMERS + 32
    TURN: gl.constexpr = _NAMED + 2 * FLAGS.STAGES
    stage = copied % FLAGS.STAGES
    before = (copied - 1) % FLAGS.STAGES
    p = _unpacked(packed, q.dtype, gl.DotOperandLayout(0, acc.type.layout, 2))
    if FLAGS.TURNS:
        sync(TURN + W, 256, 4)
    s = _product(q, q_more, k_s.index(stage), k_more.index(stage), zeros, FLAGS)
    mbarrier.wait(v_full.index(before), (copied - 1) // FLAGS.STAGES & 1)
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
    s = _masked_scores(
        s, position, key_tile, key_length, left, right, run_s.index(stage), scale, softcap, slope,
        MASKED, FLAGS,
    )  # fmt: skip
    if MASKED and FLAGS.MASK == INTERVALS:
        arrive(_NAMED + stage, THREADS, 4)
    new_max = gl.maximum(row_max, _row_max(s) * factor)
    safe_max = new_max
    if MASKED:
        safe_max = gl.where(new_max == float("-inf"), 0.0, new_max)
    prob = gl.exp2(s * factor - safe_max[:, None])
    alpha = gl.exp2(row_max - safe_max)
    row_sum = row_sum * alpha + _row_sum(prob)
    if FLAGS.DROPOUT:
        prob = _dropped(prob, seed_ptr, threshold, batch, head, row, key_tile)
    # This stands here, and not where the keys are needed, to keep the softmax above the next wait.
    after = copied + 1
    mbarrier.wait(k_full.index(after % FLAGS.STAGES), after // FLAGS.STAGES & 1, pred=n + 1 < total)
    if FLAGS.V_REST > 0:
        acc, acc_more, p, prob = warpgroup_mma_wait(0, deps=(acc, acc_more, p, prob))
    else:
        acc, p, prob = warpgroup_mma_wait(0, deps=(acc, p, prob))
    arrive(_NAMED + FLAGS.STAGES + before, THREADS, 4)
    # Not before: the new probabilities take the registers of the old ones.
    packed = _packed(prob, q.dtype)
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))[:, None]
    if FLAGS.V_REST > 0:
        by = gl.convert_layout(alpha, gl.SliceLayout(1, acc_more.type.layout))
        acc_more = acc_more * by[:, None]
    return packed, acc, acc_more, new_max, row_sum


@jit
def _consumer(
    FLAGS: gl.constexpr, W: gl.constexpr,
    out_desc, out_rest, part_desc, lse_ptr, slopes_ptr, slopes_b, slopes_h,
    sinks_ptr, sinks_b, sinks_h, seed_ptr, tickets_ptr,
    q_s, q_more, k_s, k_more, v_s, v_more, out_s, out_more, part_s, run_s, message_s,
    message_full, q_full, k_full, v_full, again_full,
    scale, softcap, threshold, keep_scale, heads,
    query_length, key_length, offset, left, right,
):  # fmt: skip
    """64 rows of each tile of queries."""
    THREADS: gl.constexpr = 128 * FLAGS.CONSUMERS + 32
    if FLAGS.TURNS and W == FLAGS.CONSUMERS - 1:
        arrive(_NAMED + 2 * FLAGS.STAGES, 256, 4)
    number = 0
    copied = 0
    spoiled = 0
    mbarrier.wait(message_full.index(0), 0)
    total = _field(_message(message_s, 0), 0)
    while total > 0:
        some = _attend(
            number, copied, total,
            out_desc, out_rest, lse_ptr, slopes_ptr, slopes_b, slopes_h,
            sinks_ptr, sinks_b, sinks_h, seed_ptr, tickets_ptr,
            q_s, q_more, k_s, k_more, v_s, v_more, out_s, out_more, run_s, message_s,
            q_full, k_full, v_full,
            scale, softcap, threshold, keep_scale, heads,
            query_length, key_length, offset, left, right, FLAGS, W,
        )  # fmt: skip
        spoiled = gl.maximum(spoiled, some)
        copied += total
        number += 1
        mbarrier.wait(message_full.index(number % _MESSAGES), number // _MESSAGES & 1)
        total = _field(_message(message_s, number), 0)
    if FLAGS.RESCUE:
        # In global memory, lest they overtake what is computed again.
        tma_store_done(0, 4)
        if any_of(spoiled, _again_number(FLAGS), THREADS, 4):
            _compute_again(
                number,
                part_desc, lse_ptr, slopes_ptr, slopes_b, slopes_h, seed_ptr,
                q_s, q_more, k_s, k_more, v_s, part_s, run_s, message_s,
                message_full, q_full, again_full,
                scale, softcap, threshold, keep_scale, heads,
                query_length, key_length, offset, left, right, FLAGS, W,
            )  # fmt: skip
    else:
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
    """The rows of one tile; whether some came out as NaN."""
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
    row, _, head = _rows(_field(message, 6), _field(message, 8), ROW, FLAGS, W)
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
    q = q_s.index(W)
    q_last = q_more.index(W)

    stage = copied % STAGES
    mbarrier.wait(q_full.index(W), number & 1)
    mbarrier.wait(k_full.index(stage), copied // STAGES & 1)
    s = _product(q, q_last, k_s.index(stage), k_more.index(stage), zeros, FLAGS)
    s = warpgroup_mma_wait(0, deps=(s,))
    key_tile = nth_tile(0, masked, tile_start, full_start, full_stop)
    s = _masked_scores(
        s, position, key_tile, key_length, left, right, run_s.index(stage), scale, softcap, slope,
        True, FLAGS,
    )  # fmt: skip
    arrive(_NAMED + stage, THREADS, 4)
    row_max = _row_max(s) * factor
    prob = gl.exp2(s * factor - gl.where(row_max == float("-inf"), 0.0, row_max)[:, None])
    row_sum = _row_sum(prob)
    if FLAGS.DROPOUT:
        prob = _dropped(prob, seed_ptr, threshold, batch, head, row, key_tile)
    packed = _packed(prob, DTYPE)
    after = copied + 1
    mbarrier.wait(k_full.index(after % STAGES), after // STAGES & 1, pred=total > 1)
    for n in range(1, masked):
        packed, acc, acc_more, row_max, row_sum = _turn(
            n, copied + n, total, masked, tile_start, full_start, full_stop,
            packed, acc, acc_more, row_max, row_sum,
            q, q_last, k_s, k_more, v_s, v_more, run_s, k_full, v_full, zeros,
            row, position, head, batch, key_length, left, right, scale, softcap, slope, factor,
            seed_ptr, threshold, True, FLAGS, W,
        )  # fmt: skip
    for n in range(gl.maximum(masked, 1), total):
        packed, acc, acc_more, row_max, row_sum = _turn(
            n, copied + n, total, masked, tile_start, full_start, full_stop,
            packed, acc, acc_more, row_max, row_sum,
            q, q_last, k_s, k_more, v_s, v_more, run_s, k_full, v_full, zeros,
            row, position, head, batch, key_length, left, right, scale, softcap, slope, factor,
            seed_ptr, threshold, False, FLAGS, W,
        )  # fmt: skip
    last = copied + total - 1
    stage = last % STAGES
    p = _unpacked(packed, DTYPE, LEFT_FACTOR)
    if FLAGS.OWN_OUT:
        arrive(_again_number(FLAGS) + 2, THREADS, 4)
    mbarrier.wait(v_full.index(stage), last // STAGES & 1)
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
    row, head, _ = _rows(tile, first_head, ROW, FLAGS, W)
    row_inside = row < query_length
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
    spoiled = 0
    if FLAGS.RESCUE:
        spoiled = gl.max(_nan(acc, row_inside), 0)
        if V_REST > 0:
            spoiled = gl.maximum(spoiled, gl.max(_nan(acc_more, row_inside), 0))
        if FLAGS.PERSISTENT:
            if spoiled > 0:
                gl.store(tickets_ptr + 1 + _field(message, 5), gl.program_id(0) + 1)
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
    _store_rows(out_desc, batch, first_head, first_row, 0, to)
    if V_REST > 0:
        _store_rows(out_rest, batch, first_head, first_row, DV, to_more)
    if not FLAGS.OWN_OUT:
        tma_store_read(0)
        arrive(_again_number(FLAGS) + 2, THREADS, 4)
    return spoiled


@jit
def _nan(x, row_inside):
    """[rows], 1 where one that is inside holds NaN."""
    inside = gl.convert_layout(row_inside, gl.SliceLayout(1, x.type.layout))
    return gl.max(((x != x) & inside[:, None]).to(gl.int32), 1)


@jit
def _compute_again(
    number,
    part_desc, lse_ptr, slopes_ptr, slopes_b, slopes_h, seed_ptr,
    q_s, q_more, k_s, k_more, v_s, part_s, run_s, message_s,
    message_full, q_full, again_full,
    scale, softcap, threshold, keep_scale, heads,
    query_length, key_length, offset, left, right, FLAGS: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """The output of tiles some of whose rows came out as NaN, 64 columns at a time.

    Products of a tile add 0 for each hidden pair, but 0 times NaN or infinity is NaN. Here values
    that are not finite are taken out of the product and added to the rows that see them: a second
    product, with codes in the place of values, tells which rows see which.
    """
    THREADS: gl.constexpr = 128 * FLAGS.CONSUMERS + 32
    BLOCK_K: gl.constexpr = v_s.shape[1]
    DTYPE: gl.constexpr = q_s.dtype
    PARTS: gl.constexpr = (v_s.shape[2] + FLAGS.V_REST + _COLUMNS - 1) // _COLUMNS
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _COLUMNS, 16])
    LEFT_FACTOR: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    VALUES: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    factor = exponent_factor(scale, FLAGS)
    zeros = gl.zeros((_ROWS, BLOCK_K), gl.float32, SCORES)
    nothing = gl.zeros((_ROWS, _COLUMNS), gl.float32, OUT)
    q = q_s.index(W)
    q_last = q_more.index(W)
    place = part_s.index(W)
    run = run_s.index(0)
    full = again_full.index(0)
    v = v_s.index(0).slice(0, _COLUMNS, dim=1)
    codes = v_s.index(1).slice(0, _COLUMNS, dim=1)
    copied = 0
    number += 1
    mbarrier.wait(message_full.index(number % _MESSAGES), number // _MESSAGES & 1)
    message = _message(message_s, number)
    total = _field(message, 0)
    while total > 0:
        masked = _field(message, 1)
        tile_start, full_start = _field(message, 2), _field(message, 3)
        full_stop, tile = _field(message, 4), _field(message, 6)
        batch, first_head = _field(message, 7), _field(message, 8)
        row, head_row, head = _rows(tile, first_head, gl.SliceLayout(1, SCORES), FLAGS, W)
        lse_at = lse_ptr + (batch * heads + head_row).to(gl.int64) * query_length + row
        lse = gl.load(lse_at, row < query_length, 0.0) * _LOG2E
        position = row + offset
        slope = 0.0
        if FLAGS.ALIBI:
            slope = gl.load(slopes_ptr + batch * slopes_b + head * slopes_h)
        mbarrier.wait(q_full.index(W), number - 1 & 1)
        for part in range(PARTS):
            acc = nothing
            for n in range(total):
                mbarrier.wait(full, copied & 1)
                copied += 1
                s = _product(q, q_last, k_s.index(0), k_more.index(0), zeros, FLAGS)
                s = warpgroup_mma_wait(0, deps=(s,))
                key_tile = nth_tile(n, masked, tile_start, full_start, full_stop)
                seen = _masked_scores(
                    zeros, position, key_tile, key_length, left, right, run, scale, softcap,
                    slope, True, FLAGS,
                )  # fmt: skip
                seen = seen > float("-inf")
                s = _masked_scores(
                    s, position, key_tile, key_length, left, right, run, scale, softcap, slope,
                    True, FLAGS,
                )  # fmt: skip
                prob = gl.where(seen, gl.exp2(s * factor - lse[:, None]), 0.0)
                if FLAGS.DROPOUT:
                    prob = _dropped(prob, seed_ptr, threshold, batch, head, row, key_tile)
                if W == 0:
                    value = v.load(VALUES)
                    wide = value.to(gl.float32)
                    code = gl.where(
                        wide == float("inf"), 2.0**-8, gl.where(wide == float("-inf"), 1.0, 2.0**8)
                    )
                    finite = gl.abs(wide) < float("inf")
                    v.store(gl.where(finite, wide, 0.0).to(DTYPE))
                    codes.store(gl.where(finite, 0.0, code).to(DTYPE))
                fence_async_shared()
                sync(_again_number(FLAGS) + 1, THREADS - 32, 4)
                p = gl.convert_layout(prob.to(DTYPE), LEFT_FACTOR)
                sees = gl.convert_layout(gl.where(seen, 1.0, 0.0).to(DTYPE), LEFT_FACTOR)
                acc = warpgroup_mma(p, v, acc, is_async=True)
                strange = warpgroup_mma(sees, codes, nothing, use_acc=False, is_async=True)
                acc, strange, p, sees = warpgroup_mma_wait(0, deps=(acc, strange, p, sees))
                arrive(_again_number(FLAGS), THREADS, 4)
                whole = gl.floor(strange)
                acc += gl.where(strange > whole, float("inf"), 0.0)
                acc += gl.where(whole % 256 > 0, float("-inf"), 0.0)
                acc += gl.where(strange >= 256, float("nan"), 0.0)
            place.store((acc * keep_scale).to(DTYPE))
            fence_async_shared()
            barrier()
            first_row = (tile * FLAGS.CONSUMERS + W) * _ROWS
            _store_rows(part_desc, batch, first_head, first_row, part * _COLUMNS, place)
            tma_store_read(0)
            barrier()
        number += 1
        mbarrier.wait(message_full.index(number % _MESSAGES), number // _MESSAGES & 1)
        message = _message(message_s, number)
        total = _field(message, 0)
