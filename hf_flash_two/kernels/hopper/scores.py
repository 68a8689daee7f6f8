"""Tiles of queries and keys, as the kernels take them that go through keys.

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
    gl,
    jit,
    mbarrier,
    reinterpret,
    tma_load,
    tma_store,
    warpgroup_mma,
)
from hf_flash_two.kernels.hopper.tile import INTERVALS, keep_bits, modified, tiles_of_rows

_ROWS = gl.constexpr(ROWS)


@jit
def allocate(DTYPE: gl.constexpr, COUNT: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """``COUNT`` tiles of shared memory."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, COLUMNS], DTYPE)
    return gl.allocate_shared_memory(DTYPE, [COUNT, ROWS, COLUMNS], LAYOUT)


@jit
def _place_of(work, heads, row_tiles, head_tiles, together, FLAGS: gl.constexpr):
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
def work_of(
    work, ranges_ptr, heads, query_length, key_length, offset, left, right,
    row_tiles, head_tiles, together, FLAGS: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """Tile of rows, batch row and first head of the tile of queries with this number.

    Behind these `tiles_of_rows` of it.
    """
    tile, batch, head = _place_of(work, heads, row_tiles, head_tiles, together, FLAGS)
    total, masked, tile_start, full_start, full_stop = _key_tiles_of(
        ranges_ptr, tile, batch, query_length, key_length, offset, left, right, row_tiles,
        FLAGS, BLOCK_K,
    )  # fmt: skip
    return tile, batch, head, total, masked, tile_start, full_start, full_stop


@jit
def _key_tiles_of(
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


@jit
def copy(desc, batch, head, row, column, full, to):
    """One tile of a [B, H, T, D] tensor into shared memory."""
    ROWS: gl.constexpr = desc.block_type.shape[2]
    COLUMNS: gl.constexpr = desc.block_type.shape[3]
    place = reinterpret(to, desc.dtype, [1, 1, ROWS, COLUMNS], desc.layout)
    tma_load(desc, [batch, head, row, column], full, place)


@jit
def copy_rows(desc, batch, head, first_row, column, full, to):
    """64 rows of queries into shared memory."""
    SLOTS: gl.constexpr = desc.block_type.shape[2]
    PACK: gl.constexpr = desc.block_type.shape[3]
    COLUMNS: gl.constexpr = desc.block_type.shape[4]
    place = reinterpret(to, desc.dtype, [1, 1, SLOTS, PACK, COLUMNS], desc.layout)
    tma_load(desc, [batch, head // PACK, first_row // PACK, 0, column], full, place)


@jit
def store_rows(desc, batch, head, first_row, column, source):
    """64 rows of the output from shared memory."""
    SLOTS: gl.constexpr = desc.block_type.shape[2]
    PACK: gl.constexpr = desc.block_type.shape[3]
    COLUMNS: gl.constexpr = desc.block_type.shape[4]
    place = reinterpret(source, desc.dtype, [1, 1, SLOTS, PACK, COLUMNS], desc.layout)
    tma_store(desc, [batch, head // PACK, first_row // PACK, 0, column], place)


@jit
def expect_keys(
    full, BYTES: gl.constexpr, run_desc, key_length, batch, key_tile, run_s, stage, masked,
    FLAGS: gl.constexpr,
):  # fmt: skip
    """Tells a barrier the bytes of a tile of keys; if it is ``masked``, copies its intervals."""
    if FLAGS.MASK == INTERVALS:
        if masked:
            mbarrier.expect(full, BYTES + run_desc.block_type.nbytes)
            copy_runs(run_desc, key_length, batch, key_tile, full, run_s.index(stage), FLAGS)
        else:
            mbarrier.expect(full, BYTES)
    else:
        mbarrier.expect(full, BYTES)


@jit
def copy_runs(run_desc, key_length, batch, key_tile, full, to, FLAGS: gl.constexpr):
    """The intervals of one tile of keys into shared memory."""
    WIDTH: gl.constexpr = run_desc.block_type.shape[1]
    row = key_tile
    if not FLAGS.SHARED_RUNS:
        row += batch * gl.cdiv(key_length, WIDTH // 2)
    tma_load(run_desc, [row, 0], full, reinterpret(to, gl.int32, [1, WIDTH], run_desc.layout))


@jit
def product(q, q_more, k, k_more, zeros, FLAGS: gl.constexpr):
    """Starts Q K^T."""
    s = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
    if FLAGS.D_REST > 0:
        s = warpgroup_mma(q_more, k_more.permute((1, 0)), s, is_async=True)
    return s


@jit
def rows_of(tile, first_head, ROW: gl.constexpr, FLAGS: gl.constexpr, W):
    """A consumer's rows, [64], and their heads: one for all, or [64] and [64, 1]."""
    packed_row = (tile * FLAGS.CONSUMERS + W) * _ROWS + gl.arange(0, _ROWS, layout=ROW)
    head, of_tile = first_head, first_head
    if FLAGS.PACK_GQA > 1:
        head = first_head + packed_row % FLAGS.PACK_GQA
        of_tile = head[:, None]
    return packed_row // FLAGS.PACK_GQA, head, of_tile


@jit
def masked_scores(
    s, position, key_tile, key_length, left, right, run, scale, softcap, slope,
    MASKED: gl.constexpr, FLAGS: gl.constexpr,
):  # fmt: skip
    """Scores of products, those of hidden pairs -infinity."""
    BLOCK_K: gl.constexpr = s.shape[1]
    COL: gl.constexpr = gl.SliceLayout(0, s.type.layout)
    col = key_tile * BLOCK_K + gl.arange(0, BLOCK_K, layout=COL)
    s, _ = modified(s, position[:, None], col[None, :], scale, softcap, slope, FLAGS)
    if MASKED:
        s = visible_scores(s, position, key_tile, key_length, left, right, run, FLAGS)
    return s


@jit
def visible_scores(
    s, position, key_tile, key_length, left, right, run, FLAGS: gl.constexpr
):  # fmt: skip
    """Scores, those of hidden pairs -infinity. ``run``: the tile's, of `copy_runs`."""
    BLOCK_K: gl.constexpr = s.shape[1]
    COL: gl.constexpr = gl.SliceLayout(0, s.type.layout)
    if FLAGS.MASK == INTERVALS:
        start = run.slice(0, BLOCK_K).load(COL)
        length = run.slice(BLOCK_K, BLOCK_K).load(COL)
        # One comparison: before its start, the distance from it is a huge number.
        s = _kept_if("lt.u32", s, position[:, None] - start[None, :], length[None, :])
    else:
        first = key_tile * BLOCK_K
        s = _in_band(s, position - first, key_length - first, left, right, FLAGS)
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
def dropped(prob, seed_ptr, threshold, batch, head, row, key_tile):
    """Probabilities of a tile, those that dropout takes 0."""
    BLOCK_K: gl.constexpr = prob.shape[1]
    COL: gl.constexpr = gl.SliceLayout(0, prob.type.layout)
    col = key_tile * BLOCK_K + gl.arange(0, BLOCK_K, layout=COL)
    keep = keep_bits(seed_ptr, threshold, batch, head, row[:, None], col[None, :])
    return gl.where(keep, prob, 0.0)
