"""The forward pass on Hopper.

Source: FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608). A program computes one tile of
queries with three or four partitions of warps: two or three consumers of four warps, each with 64
rows of the tile, and a producer, one warp that copies tiles by TMA. A consumer starts Q K^T of one
tile of keys and P V of the tile before, and computes the softmax of the one while the other runs.
Consumers take turns in starting products, so that the softmax of one falls into the products of
the others.

A head dim that is no power of two is computed in two parts, such as 128 and 64: ``q_desc`` copies
the first and ``q_rest`` the second, if its size is not 0.
"""

# What stands in a kernel is Triton's language, which its types do not describe.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from hf_flash_two.kernels.hopper.config import (
    ROWS,
    forward_flags,
    forward_tiles,
    heads_together,
    parts,
)
from hf_flash_two.kernels.hopper.gluon import (
    allocate_barriers,
    barrier,
    fence_async_shared,
    gl,
    jit,
    mbarrier,
    reinterpret,
    shared_layout,
    tma_load,
    tma_store,
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
    seen_tile,
    sync,
    tiles_of_rows,
)
from hf_flash_two.kernels.params import LOG2E, AttentionParams, Layout, output_layout
from hf_flash_two.kernels.triton.args import PerHead, Tma, broadcast_strides, dropout_of
from hf_flash_two.kernels.triton.config import Tiles
from hf_flash_two.kernels.triton.launch import Launch, on_device, planned
from hf_flash_two.kernels.triton.ranges import key_ranges
from hf_flash_two.masks import FAR
from hf_flash_two.tensor_cache import derive


@dataclass(frozen=True, slots=True)
class _Plan:
    tiles: Tiles
    out: Layout
    attend: Launch


def forward(
    query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Tq, Dv] in the dtype of ``query`` and lse [B, Hq, Tq] in float32."""
    query, key, value = [x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value)]
    with on_device(query):
        plan = planned(_plan, params, (query, key, value))
        out = query.new_empty_strided(*plan.out)
        lse = query.new_empty(plan.out[0][:3], dtype=torch.float32)
        ranges = key_ranges(params, plan.tiles, query.shape[2], key.shape[2])
        runs = _key_runs(params, plan.tiles.block_k)
        plan.attend(
            query, query, key, key, value, value, out, out, out, runs, lse, ranges,
            params.alibi_slopes, params.sinks, params.seed,
        )  # fmt: skip
    return out, lse


def _plan(params: AttentionParams, query: Tensor, key: Tensor, value: Tensor) -> _Plan:
    batch, heads, query_length, _ = query.shape
    key_heads, key_length, value_dim = key.shape[1], key.shape[2], value.shape[3]
    tiles = forward_tiles(query, key, value)
    flags = forward_flags(query, key, params, tiles)
    out = output_layout(query, value_dim)
    pack = tiles.pack_gqa
    d, d_v = parts(tiles.block_d)[0], parts(tiles.block_v)[0]
    row_tiles = triton.cdiv(query_length * pack, tiles.block_q)
    head_tiles = batch * heads // pack
    together = heads_together(key, value, heads // pack // key_heads)
    drop = dropout_of(params)

    def rows(layout: Layout, columns: int) -> Tma:
        """Tiles of 64 rows, of ``pack`` heads side by side."""
        shape, strides = layout
        block = (1, 1, ROWS // pack, pack, columns)
        return _tma(
            (batch, heads // pack, query_length, pack, shape[3]),
            (strides[0], strides[1] * pack, strides[2], strides[1]),
            block if columns else (),
            query.dtype,
        )

    def keys(tensor: Tensor, columns: int) -> Tma:
        block = (1, 1, tiles.block_k, columns) if columns else ()
        return _tma(tuple(tensor.shape), tensor.stride()[:3], block, tensor.dtype)

    runs = Tma()
    if params.query_start is not None:
        count = triton.cdiv(key_length, tiles.block_k) * params.query_start.shape[0]
        width = 2 * tiles.block_k
        layout = gl.NVMMASharedLayout(0, 32, 2)
        runs = Tma((count, width), (width, 1), (1, width), layout)
    queries = (tuple(query.shape), query.stride())
    attend = Launch(
        attend_kernel,
        (row_tiles * head_tiles, 1, 1),
        {
            "q_desc": rows(queries, d),
            "q_rest": rows(queries, flags.D_REST),
            "k_desc": keys(key, d),
            "k_rest": keys(key, flags.D_REST),
            "v_desc": keys(value, d_v),
            "v_rest": keys(value, flags.V_REST),
            "out_desc": rows(out, d_v),
            "out_rest": rows(out, flags.V_REST),
            "part_desc": rows(out, 64 if flags.RESCUE else 0),
            "run_desc": runs,
            "slopes": PerHead(None, *broadcast_strides(params.alibi_slopes, batch, heads)),
            "sinks": PerHead(None, *broadcast_strides(params.sinks, batch, heads)),
        },
        (
            params.scale, params.softcap or 1.0, drop.threshold, float(drop.keep_scale),
            heads, heads // key_heads, query_length, key_length, params.query_offset,
            params.window_left or 0, params.window_right or 0,
            row_tiles, head_tiles, min(together, head_tiles),
        ),
        {"FLAGS": flags},
        Tiles(tiles.block_q, tiles.block_k, d, d_v, 4, 1),
        maxnreg={2: 168, 3: 128}[flags.CONSUMERS],
    )  # fmt: skip
    return _Plan(tiles, out, attend)


def _tma(
    shape: tuple[int, ...], strides: tuple[int, ...], block: tuple[int, ...], dtype: torch.dtype
) -> Tma:
    """How TMA copies blocks of a tensor; nothing for no block."""
    if not block:
        return Tma()
    # An axis of one element is never stepped along, but its stride is checked.
    steps = [step if length > 1 else 16 for length, step in zip(shape, strides, strict=False)]
    return Tma(shape, (*steps, 1), block, shared_layout(block, dtype))


def _key_runs(params: AttentionParams, block_k: int) -> Tensor | None:
    """The intervals tile by tile, as `attend_kernel` takes them; None if there are none.

    Worked out once for each mask, which all layers share.
    """
    start, stop = params.query_start, params.query_stop
    if start is None or stop is None:
        return None

    def build() -> Tensor:
        missing = -start.shape[1] % block_k
        sides = (
            torch.nn.functional.pad(side, (0, missing), value=value).view(-1, 1, block_k)
            for side, value in ((start, FAR), (stop, -FAR))
        )
        return torch.cat(tuple(sides), 1).view(-1, 2 * block_k)

    return derive(("key runs", block_k), build, start, stop)


_LOG2E = gl.constexpr(LOG2E)
_ROWS = gl.constexpr(ROWS)
_COLUMNS = gl.constexpr(64)
_NAMED = gl.constexpr(5)


@jit(do_not_specialize=[
    "threshold", "heads", "group", "query_length", "key_length", "offset", "left", "right",
    "row_tiles", "head_tiles", "together",
])  # fmt: skip
def attend_kernel(
    q_desc, q_rest, k_desc, k_rest, v_desc, v_rest, out_desc, out_rest, part_desc, run_desc,
    lse_ptr, ranges_ptr, slopes: PerHead, sinks: PerHead, seed_ptr,
    scale, softcap, threshold, keep_scale, heads, group,
    query_length, key_length, offset, left, right, row_tiles, head_tiles, together,
    FLAGS: gl.constexpr,
):  # fmt: skip
    """Output and lse of one tile of queries.

    Args:
        q_desc, q_rest: [B, Hq / PACK_GQA, Tq, PACK_GQA, D], tiles of 64 rows.
        k_desc, k_rest: [B, Hk, Tk, D]. v_desc, v_rest: [B, Hk, Tk, Dv].
        out_desc, out_rest, part_desc: as q, of Dv; the last in parts of 64 columns.
        run_desc: int32 [(B or 1) * key tiles, 2 BLOCK_K], ``query_start`` of each tile of keys and
            behind it ``query_stop``; nobody sees keys behind the last.
        lse_ptr: float32 [B, Hq, Tq].
        ranges_ptr: `ranges.key_ranges`.
        offset, left, right: see `AttentionParams`.
        row_tiles: of one head. head_tiles: Hq / PACK_GQA of all batch rows.
        together: so many head tiles go side by side; their keys stay in the L2 cache.
        FLAGS: `config.ForwardFlags`.
    """
    BLOCK_K: gl.constexpr = k_desc.block_type.shape[2]
    D: gl.constexpr = q_desc.block_type.shape[4]
    DV: gl.constexpr = v_desc.block_type.shape[3]
    DTYPE: gl.constexpr = q_desc.dtype
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
    # The output takes the place of the queries, where it has their size.
    out_s, out_more, part_s = q_s, q_more, q_s
    if DV != D:
        out_s = _allocate(DTYPE, FLAGS.CONSUMERS, _ROWS, DV)
    if FLAGS.V_REST > 0:
        v_more = _allocate(DTYPE, FLAGS.STAGES, BLOCK_K, FLAGS.V_REST)
        if FLAGS.V_REST != FLAGS.D_REST:
            out_more = _allocate(DTYPE, FLAGS.CONSUMERS, _ROWS, FLAGS.V_REST)
    else:
        v_rest, out_rest = v_desc, out_desc
    if FLAGS.RESCUE:
        part_s = _allocate(DTYPE, FLAGS.CONSUMERS, _ROWS, _COLUMNS)
    else:
        part_desc = out_desc
    run_s = q_s
    if FLAGS.MASK == INTERVALS:
        run_s = gl.allocate_shared_memory(
            gl.int32, [FLAGS.STAGES, 2 * BLOCK_K], gl.SwizzledSharedLayout(1, 1, 1, [0])
        )
    else:
        run_desc, ranges_ptr = q_desc, lse_ptr
    slopes_ptr, sinks_ptr = slopes.ptr, sinks.ptr
    if not FLAGS.ALIBI:
        slopes_ptr = lse_ptr
    if not FLAGS.SINKS:
        sinks_ptr = lse_ptr
    if not FLAGS.DROPOUT:
        seed_ptr = lse_ptr
    q_full = allocate_barriers(FLAGS.CONSUMERS, 1)
    k_full = allocate_barriers(FLAGS.STAGES, 1)
    v_full = allocate_barriers(FLAGS.STAGES, 1)
    again_full = allocate_barriers(1, 1)
    flags: gl.constexpr = FLAGS
    args = (
        q_desc, q_rest, k_desc, k_rest, v_desc, v_rest, out_desc, out_rest, part_desc, run_desc,
        lse_ptr, ranges_ptr, slopes_ptr, slopes.stride_b, slopes.stride_h,
        sinks_ptr, sinks.stride_b, sinks.stride_h, seed_ptr,
        q_s, q_more, k_s, k_more, v_s, v_more, out_s, out_more, part_s, run_s,
        q_full, k_full, v_full, again_full,
        scale, softcap, threshold, keep_scale, heads, group,
        query_length, key_length, offset, left, right, row_tiles, head_tiles, together,
    )  # fmt: skip
    if FLAGS.CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consumer, (flags, 0) + args),
                (_consumer, (flags, 1) + args),
                (_producer, (flags,) + args),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consumer, (flags, 0) + args),
                (_consumer, (flags, 1) + args),
                (_consumer, (flags, 2) + args),
                (_producer, (flags,) + args),
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
def _program_again():
    """This program's number, which the compiler does not know to be the same.

    What is needed before and after a loop, and is worked out anew, takes no registers within.
    """
    return gl.program_id(0) + gl.num_programs(1) - 1


@jit
def _place(program, heads, row_tiles, head_tiles, together, FLAGS: gl.constexpr):
    """A program's tile of rows, batch row and first head.

    The last rows come first, as those of a causal mask take longest.
    """
    block = program // (together * row_tiles)
    within = program - block * (together * row_tiles)
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


@jit
def _copy(desc, batch, head, row, column, full, to):
    """One tile of a [B, H, T, D] tensor into shared memory."""
    ROWS: gl.constexpr = desc.block_type.shape[2]
    COLUMNS: gl.constexpr = desc.block_type.shape[3]
    place = reinterpret(to, desc.dtype, [1, 1, ROWS, COLUMNS], desc.layout)
    tma_load(desc, [batch, head, row, column], full, place)


@jit
def _copy_queries(desc, batch, head, row, column, full, to, FLAGS: gl.constexpr):
    ROWS: gl.constexpr = desc.block_type.shape[2]
    COLUMNS: gl.constexpr = desc.block_type.shape[4]
    place = reinterpret(to, desc.dtype, [1, 1, ROWS, FLAGS.PACK_GQA, COLUMNS], desc.layout)
    tma_load(desc, [batch, head // FLAGS.PACK_GQA, row // FLAGS.PACK_GQA, 0, column], full, place)


@jit
def _store_rows(desc, batch, head, row, column, source, FLAGS: gl.constexpr):
    ROWS: gl.constexpr = desc.block_type.shape[2]
    COLUMNS: gl.constexpr = desc.block_type.shape[4]
    place = reinterpret(source, desc.dtype, [1, 1, ROWS, FLAGS.PACK_GQA, COLUMNS], desc.layout)
    tma_store(desc, [batch, head // FLAGS.PACK_GQA, row // FLAGS.PACK_GQA, 0, column], place)


@jit
def _copy_runs(run_desc, key_tiles, batch, key_tile, full, to, FLAGS: gl.constexpr):
    """The intervals of one tile of keys into shared memory."""
    row = key_tile
    if not FLAGS.SHARED_RUNS:
        row += batch * key_tiles
    WIDTH: gl.constexpr = run_desc.block_type.shape[1]
    tma_load(run_desc, [row, 0], full, reinterpret(to, gl.int32, [1, WIDTH], run_desc.layout))


@jit
def _producer(
    FLAGS: gl.constexpr,
    q_desc, q_rest, k_desc, k_rest, v_desc, v_rest, out_desc, out_rest, part_desc, run_desc,
    lse_ptr, ranges_ptr, slopes_ptr, slopes_b, slopes_h, sinks_ptr, sinks_b, sinks_h, seed_ptr,
    q_s, q_more, k_s, k_more, v_s, v_more, out_s, out_more, part_s, run_s,
    q_full, k_full, v_full, again_full,
    scale, softcap, threshold, keep_scale, heads, group,
    query_length, key_length, offset, left, right, row_tiles, head_tiles, together,
):  # fmt: skip
    """Copies the tiles that the consumers take: queries, then keys and values stage by stage."""
    BLOCK_K: gl.constexpr = k_desc.block_type.shape[2]
    D: gl.constexpr = q_desc.block_type.shape[4]
    DV: gl.constexpr = v_desc.block_type.shape[3]
    THREADS: gl.constexpr = 128 * FLAGS.CONSUMERS + 32
    Q_BYTES: gl.constexpr = 2 * _ROWS * (D + FLAGS.D_REST)
    K_BYTES: gl.constexpr = 2 * BLOCK_K * (D + FLAGS.D_REST)
    V_BYTES: gl.constexpr = 2 * BLOCK_K * (DV + FLAGS.V_REST)
    RUN_BYTES: gl.constexpr = 8 * BLOCK_K if FLAGS.MASK == INTERVALS else 0
    tile, batch, head = _place(gl.program_id(0), heads, row_tiles, head_tiles, together, FLAGS)
    total, masked, tile_start, full_start, full_stop = _key_tiles(
        ranges_ptr, tile, batch, query_length, key_length, offset, left, right, row_tiles,
        FLAGS, BLOCK_K,
    )  # fmt: skip
    key_head = head // group
    key_tiles = gl.cdiv(key_length, BLOCK_K)
    CONSUMERS: gl.constexpr = FLAGS.CONSUMERS
    for w in gl.static_range(CONSUMERS):
        row = (tile * FLAGS.CONSUMERS + w) * _ROWS
        mbarrier.expect(q_full.index(w), Q_BYTES)
        _copy_queries(q_desc, batch, head, row, 0, q_full.index(w), q_s.index(w), FLAGS)
        if FLAGS.D_REST > 0:
            _copy_queries(q_rest, batch, head, row, D, q_full.index(w), q_more.index(w), FLAGS)
    for n in range(total):
        key_tile = nth_tile(n, masked, tile_start, full_start, full_stop)
        key_row = key_tile * BLOCK_K
        stage = n % FLAGS.STAGES
        if n >= FLAGS.STAGES:
            sync(_NAMED + stage, THREADS, 1)
        k_bar = k_full.index(stage)
        if FLAGS.MASK == INTERVALS:
            if n < gl.maximum(masked, 1):
                mbarrier.expect(k_bar, K_BYTES + RUN_BYTES)
                _copy_runs(run_desc, key_tiles, batch, key_tile, k_bar, run_s.index(stage), FLAGS)
            else:
                mbarrier.expect(k_bar, K_BYTES)
        else:
            mbarrier.expect(k_bar, K_BYTES)
        _copy(k_desc, batch, key_head, key_row, 0, k_bar, k_s.index(stage))
        if FLAGS.D_REST > 0:
            _copy(k_rest, batch, key_head, key_row, D, k_bar, k_more.index(stage))
        if n >= FLAGS.STAGES:
            sync(_NAMED + FLAGS.STAGES + stage, THREADS, 1)
        v_bar = v_full.index(stage)
        mbarrier.expect(v_bar, V_BYTES)
        _copy(v_desc, batch, key_head, key_row, 0, v_bar, v_s.index(stage))
        if FLAGS.V_REST > 0:
            _copy(v_rest, batch, key_head, key_row, DV, v_bar, v_more.index(stage))
    if FLAGS.RESCUE:
        AGAIN: gl.constexpr = _NAMED + 2 * FLAGS.STAGES + FLAGS.CONSUMERS
        if any_of(0, AGAIN, THREADS, 1):
            bar = again_full.index(0)
            PARTS: gl.constexpr = (DV + FLAGS.V_REST + _COLUMNS - 1) // _COLUMNS
            for i in range(PARTS * total):
                if i > 0:
                    sync(AGAIN, THREADS, 1)
                key_tile = nth_tile(i % total, masked, tile_start, full_start, full_stop)
                key_row = key_tile * BLOCK_K
                mbarrier.expect(bar, K_BYTES + 2 * BLOCK_K * DV + RUN_BYTES)
                _copy(k_desc, batch, key_head, key_row, 0, bar, k_s.index(0))
                if FLAGS.D_REST > 0:
                    _copy(k_rest, batch, key_head, key_row, D, bar, k_more.index(0))
                column = i // total * _COLUMNS
                _copy(v_desc, batch, key_head, key_row, column, bar, v_s.index(0))
                if FLAGS.MASK == INTERVALS:
                    _copy_runs(run_desc, key_tiles, batch, key_tile, bar, run_s.index(0), FLAGS)


@jit
def _product(q, q_more, k, k_more, zeros, FLAGS: gl.constexpr):
    """Starts Q K^T."""
    s = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
    if FLAGS.D_REST > 0:
        s = warpgroup_mma(q_more, k_more.permute((1, 0)), s, is_async=True)
    return s


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
        query_start, query_stop = col, col
        if FLAGS.MASK == INTERVALS:
            query_start = run.slice(0, BLOCK_K).load(COL)
            query_stop = run.slice(BLOCK_K, BLOCK_K).load(COL)
            seen = seen_tile(
                position[:, None], col[None, :], query_start[None, :], query_stop[None, :],
                left, right, FLAGS,
            )  # fmt: skip
        else:
            seen = seen_tile(
                position[:, None], col[None, :], query_start[None, :], query_stop[None, :],
                left, right, FLAGS,
            ) & (col < key_length)[None, :]  # fmt: skip
        s = gl.where(seen, s, float("-inf"))
    return s


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
def _turn(
    n, total, masked, tile_start, full_start, full_stop, packed, acc, acc_more, row_max, row_sum,
    q, q_more, k_s, k_more, v_s, v_more, run_s, k_full, v_full, zeros,
    row, position, head, batch, key_length, left, right, scale, softcap, slope, factor,
    seed_ptr, threshold,
    MASKED: gl.constexpr, FLAGS: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """Softmax of the n-th tile of keys, beside the product of the tile before with its values."""
    THREADS: gl.constexpr = 128 * FLAGS.CONSUMERS + 32
    TURN: gl.constexpr = _NAMED + 2 * FLAGS.STAGES
    stage = n % FLAGS.STAGES
    before = (n - 1) % FLAGS.STAGES
    p = _unpacked(packed, q.dtype, gl.DotOperandLayout(0, acc.type.layout, 2))
    if FLAGS.TURNS:
        sync(TURN + W, 256, 4)
    s = _product(q, q_more, k_s.index(stage), k_more.index(stage), zeros, FLAGS)
    mbarrier.wait(v_full.index(before), (n - 1) // FLAGS.STAGES & 1)
    acc = warpgroup_mma(p, v_s.index(before), acc, is_async=True)
    if FLAGS.V_REST > 0:
        acc_more = warpgroup_mma(p, v_more.index(before), acc_more, is_async=True)
    if FLAGS.TURNS:
        arrive(TURN + (W + 1) % FLAGS.CONSUMERS, 256, 4)
    s = warpgroup_mma_wait(2 if FLAGS.V_REST > 0 else 1, deps=(s,))
    if not (MASKED and FLAGS.MASK == INTERVALS):
        arrive(_NAMED + stage, THREADS, 4)
    key_tile = nth_tile(n, masked, tile_start, full_start, full_stop)
    s = _masked_scores(
        s, position, key_tile, key_length, left, right, run_s.index(stage), scale, softcap, slope,
        MASKED, FLAGS,
    )  # fmt: skip
    if MASKED and FLAGS.MASK == INTERVALS:
        arrive(_NAMED + stage, THREADS, 4)
    new_max = gl.maximum(row_max, gl.max(s, 1) * factor)
    safe_max = new_max
    if MASKED:
        safe_max = gl.where(new_max == float("-inf"), 0.0, new_max)
    prob = gl.exp2(s * factor - safe_max[:, None])
    alpha = gl.exp2(row_max - safe_max)
    row_sum = row_sum * alpha + gl.sum(prob, 1)
    if FLAGS.DROPOUT:
        prob = _dropped(prob, seed_ptr, threshold, batch, head, row, key_tile)
    after = n + 1
    mbarrier.wait(k_full.index(after % FLAGS.STAGES), after // FLAGS.STAGES & 1, pred=after < total)
    if FLAGS.V_REST > 0:
        acc, acc_more, p, prob = warpgroup_mma_wait(0, deps=(acc, acc_more, p, prob))
    else:
        acc, p, prob = warpgroup_mma_wait(0, deps=(acc, p, prob))
    arrive(_NAMED + FLAGS.STAGES + before, THREADS, 4)
    # Not before: the new probabilities take the registers of the old ones.
    packed = _packed(prob, q.dtype)
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))[:, None]
    if FLAGS.V_REST > 0:
        acc_more = (
            acc_more * gl.convert_layout(alpha, gl.SliceLayout(1, acc_more.type.layout))[:, None]
        )
    return packed, acc, acc_more, new_max, row_sum


@jit
def _dropped(prob, seed_ptr, threshold, batch, head, row, key_tile):
    """Probabilities of a tile, those that dropout takes 0."""
    BLOCK_K: gl.constexpr = prob.shape[1]
    COL: gl.constexpr = gl.SliceLayout(0, prob.type.layout)
    col = key_tile * BLOCK_K + gl.arange(0, BLOCK_K, layout=COL)
    keep = keep_bits(seed_ptr, threshold, batch, head, row[:, None], col[None, :])
    return gl.where(keep, prob, 0.0)


@jit
def _consumer(
    FLAGS: gl.constexpr,
    W: gl.constexpr,
    q_desc, q_rest, k_desc, k_rest, v_desc, v_rest, out_desc, out_rest, part_desc, run_desc,
    lse_ptr, ranges_ptr, slopes_ptr, slopes_b, slopes_h, sinks_ptr, sinks_b, sinks_h, seed_ptr,
    q_s, q_more, k_s, k_more, v_s, v_more, out_s, out_more, part_s, run_s,
    q_full, k_full, v_full, again_full,
    scale, softcap, threshold, keep_scale, heads, group,
    query_length, key_length, offset, left, right, row_tiles, head_tiles, together,
):  # fmt: skip
    """64 rows of a tile of queries."""
    BLOCK_K: gl.constexpr = k_desc.block_type.shape[2]
    DV: gl.constexpr = v_desc.block_type.shape[3]
    DTYPE: gl.constexpr = q_desc.dtype
    THREADS: gl.constexpr = 128 * FLAGS.CONSUMERS + 32
    TURN: gl.constexpr = _NAMED + 2 * FLAGS.STAGES
    AGAIN: gl.constexpr = TURN + FLAGS.CONSUMERS
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    V_REST: gl.constexpr = FLAGS.V_REST
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    REST: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V_REST or 16, 16])
    LEFT_FACTOR: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    program = gl.program_id(0)
    tile, batch, first_head = _place(program, heads, row_tiles, head_tiles, together, FLAGS)
    total, masked, tile_start, full_start, full_stop = _key_tiles(
        ranges_ptr, tile, batch, query_length, key_length, offset, left, right, row_tiles,
        FLAGS, BLOCK_K,
    )  # fmt: skip
    row, _, head = _rows(tile, first_head, ROW, FLAGS, W)
    position = row + offset
    slope = 0.0
    if FLAGS.ALIBI:
        slope = gl.load(slopes_ptr + batch * slopes_b + head * slopes_h)
    factor = exponent_factor(scale, FLAGS)
    zeros = gl.zeros((_ROWS, BLOCK_K), gl.float32, SCORES)
    acc = gl.zeros((_ROWS, DV), gl.float32, OUT)
    acc_more = 0.0
    if FLAGS.V_REST > 0:
        acc_more = gl.zeros((_ROWS, V_REST), gl.float32, REST)
    q = q_s.index(W)
    q_last = q_more.index(W)

    if FLAGS.TURNS and W == FLAGS.CONSUMERS - 1:
        arrive(TURN, 256, 4)
    mbarrier.wait(q_full.index(W), 0)
    mbarrier.wait(k_full.index(0), 0)
    s = _product(q, q_last, k_s.index(0), k_more.index(0), zeros, FLAGS)
    s = warpgroup_mma_wait(0, deps=(s,))
    key_tile = nth_tile(0, masked, tile_start, full_start, full_stop)
    s = _masked_scores(
        s, position, key_tile, key_length, left, right, run_s.index(0), scale, softcap, slope,
        True, FLAGS,
    )  # fmt: skip
    arrive(_NAMED, THREADS, 4)
    row_max = gl.max(s, 1) * factor
    prob = gl.exp2(s * factor - gl.where(row_max == float("-inf"), 0.0, row_max)[:, None])
    row_sum = gl.sum(prob, 1)
    if FLAGS.DROPOUT:
        prob = _dropped(prob, seed_ptr, threshold, batch, head, row, key_tile)
    packed = _packed(prob, DTYPE)
    mbarrier.wait(k_full.index(1 % FLAGS.STAGES), 1 // FLAGS.STAGES & 1, pred=total > 1)
    for n in range(1, masked):
        packed, acc, acc_more, row_max, row_sum = _turn(
            n, total, masked, tile_start, full_start, full_stop, packed, acc, acc_more, row_max,
            row_sum, q, q_last, k_s, k_more, v_s, v_more, run_s, k_full, v_full, zeros,
            row, position, head, batch, key_length, left, right, scale, softcap, slope, factor,
            seed_ptr, threshold, True, FLAGS, W,
        )  # fmt: skip
    for n in range(gl.maximum(masked, 1), total):
        packed, acc, acc_more, row_max, row_sum = _turn(
            n, total, masked, tile_start, full_start, full_stop, packed, acc, acc_more, row_max,
            row_sum, q, q_last, k_s, k_more, v_s, v_more, run_s, k_full, v_full, zeros,
            row, position, head, batch, key_length, left, right, scale, softcap, slope, factor,
            seed_ptr, threshold, False, FLAGS, W,
        )  # fmt: skip
    last = (total - 1) % FLAGS.STAGES
    p = _unpacked(packed, DTYPE, LEFT_FACTOR)
    mbarrier.wait(v_full.index(last), (total - 1) // FLAGS.STAGES & 1)
    acc = warpgroup_mma(p, v_s.index(last), acc, is_async=True)
    if FLAGS.V_REST > 0:
        acc_more = warpgroup_mma(p, v_more.index(last), acc_more, is_async=True)
        acc, acc_more, p = warpgroup_mma_wait(0, deps=(acc, acc_more, p))
    else:
        acc, p = warpgroup_mma_wait(0, deps=(acc, p))

    program = _program_again()
    tile, batch, first_head = _place(program, heads, row_tiles, head_tiles, together, FLAGS)
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
    lse = gl.where(none, float("-inf"), row_max + gl.log2(row_sum))
    lse_at = lse_ptr + (batch * heads + head).to(gl.int64) * query_length + row
    gl.store(lse_at, lse / _LOG2E, row_inside)
    scaled = scaled / gl.where(none, 1.0, row_sum)
    first_row = (tile * FLAGS.CONSUMERS + W) * _ROWS
    spoiled = 0
    if FLAGS.RESCUE:
        spoiled = gl.max(_nan(acc, row_inside), 0)
        if V_REST > 0:
            spoiled = gl.maximum(spoiled, gl.max(_nan(acc_more, row_inside), 0))
        if any_of(spoiled, AGAIN, THREADS, 4):
            _compute_again(
                lse,
                q_desc, k_desc, part_desc, ranges_ptr, slopes_ptr, slopes_b, slopes_h, seed_ptr,
                q_s, q_more, k_s, k_more, v_s, part_s, run_s, again_full,
                scale, softcap, threshold, keep_scale, heads,
                query_length, key_length, offset, left, right, row_tiles, head_tiles, together,
                FLAGS, W,
            )  # fmt: skip
        else:
            _store(
                acc, acc_more, scaled, batch, first_head, first_row, out_desc, out_rest,
                out_s.index(W), out_more.index(W), FLAGS,
            )  # fmt: skip
    else:
        _store(
            acc, acc_more, scaled, batch, first_head, first_row, out_desc, out_rest,
            out_s.index(W), out_more.index(W), FLAGS,
        )  # fmt: skip


@jit
def _rows(
    tile, first_head, ROW: gl.constexpr, FLAGS: gl.constexpr,
    W: gl.constexpr,
):  # fmt: skip
    """A consumer's rows, [64], and their heads: one for all, or [64] and [64, 1]."""
    packed_row = (tile * FLAGS.CONSUMERS + W) * _ROWS + gl.arange(0, _ROWS, layout=ROW)
    head, of_tile = first_head, first_head
    if FLAGS.PACK_GQA > 1:
        head = first_head + packed_row % FLAGS.PACK_GQA
        of_tile = head[:, None]
    return packed_row // FLAGS.PACK_GQA, head, of_tile


@jit
def _nan(x, row_inside):
    """[rows], 1 where one that is inside holds NaN."""
    inside = gl.convert_layout(row_inside, gl.SliceLayout(1, x.type.layout))
    return gl.max(((x != x) & inside[:, None]).to(gl.int32), 1)


@jit
def _store(
    acc, acc_more, scaled, batch, first_head, first_row, out_desc, out_rest, to, to_more,
    FLAGS: gl.constexpr,
):  # fmt: skip
    DV: gl.constexpr = acc.shape[1]
    acc = acc * gl.convert_layout(scaled, gl.SliceLayout(1, acc.type.layout))[:, None]
    to.store(acc.to(out_desc.dtype))
    if FLAGS.V_REST > 0:
        by = gl.convert_layout(scaled, gl.SliceLayout(1, acc_more.type.layout))
        to_more.store((acc_more * by[:, None]).to(out_desc.dtype))
    fence_async_shared()
    barrier()
    _store_rows(out_desc, batch, first_head, first_row, 0, to, FLAGS)
    if FLAGS.V_REST > 0:
        _store_rows(out_rest, batch, first_head, first_row, DV, to_more, FLAGS)
    tma_store_read(0)


@jit
def _compute_again(
    lse,
    q_desc, k_desc, part_desc, ranges_ptr, slopes_ptr, slopes_b, slopes_h, seed_ptr,
    q_s, q_more, k_s, k_more, v_s, part_s, run_s, again_full,
    scale, softcap, threshold, keep_scale, heads,
    query_length, key_length, offset, left, right, row_tiles, head_tiles, together,
    FLAGS: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """The output of rows some of which came out as NaN, 64 columns at a time.

    Products of a tile add 0 for each hidden pair, but 0 times NaN or infinity is NaN. Here values
    that are not finite are taken out of the product and added to the rows that see them: a second
    product, with codes in the place of values, tells which rows see which.
    """
    THREADS: gl.constexpr = 128 * FLAGS.CONSUMERS + 32
    AGAIN: gl.constexpr = _NAMED + 2 * FLAGS.STAGES + FLAGS.CONSUMERS
    BLOCK_K: gl.constexpr = v_s.shape[1]
    PARTS: gl.constexpr = (v_s.shape[2] + FLAGS.V_REST + _COLUMNS - 1) // _COLUMNS
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _COLUMNS, 16])
    LEFT_FACTOR: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    VALUES: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    program = _program_again()
    tile, batch, first_head = _place(program, heads, row_tiles, head_tiles, together, FLAGS)
    total, masked, tile_start, full_start, full_stop = _key_tiles(
        ranges_ptr, tile, batch, query_length, key_length, offset, left, right, row_tiles,
        FLAGS, BLOCK_K,
    )  # fmt: skip
    row, _, head = _rows(
        tile, first_head, gl.SliceLayout(1, SCORES), FLAGS, W
    )  # fmt: skip
    first_row = (tile * FLAGS.CONSUMERS + W) * _ROWS
    position = row + offset
    slope = 0.0
    if FLAGS.ALIBI:
        slope = gl.load(slopes_ptr + batch * slopes_b + head * slopes_h)
    factor = exponent_factor(scale, FLAGS)
    zeros = gl.zeros((_ROWS, BLOCK_K), gl.float32, SCORES)
    q = q_s.index(W)
    last_q = q_more.index(W)
    part_s = part_s.index(W)
    full = again_full.index(0)
    v = v_s.index(0).slice(0, _COLUMNS, dim=1)
    codes = v_s.index(1).slice(0, _COLUMNS, dim=1)
    nothing = gl.zeros((_ROWS, _COLUMNS), gl.float32, OUT)
    for part in range(PARTS):
        acc = nothing
        for n in range(total):
            mbarrier.wait(full, part * total + n & 1)
            s = _product(q, last_q, k_s.index(0), k_more.index(0), zeros, FLAGS)
            s = warpgroup_mma_wait(0, deps=(s,))
            key_tile = nth_tile(n, masked, tile_start, full_start, full_stop)
            inside = _masked_scores(
                zeros, position, key_tile, key_length, left, right, run_s.index(0), scale,
                softcap, slope, True, FLAGS,
            )  # fmt: skip
            seen = inside > float("-inf")
            s = _masked_scores(
                s, position, key_tile, key_length, left, right, run_s.index(0), scale, softcap,
                slope, True, FLAGS,
            )  # fmt: skip
            prob = gl.where(seen, gl.exp2(s * factor - lse[:, None]), 0.0)
            if FLAGS.DROPOUT:
                prob = _dropped(prob, seed_ptr, threshold, batch, head, row, key_tile) * keep_scale
            if W == 0:
                value = v.load(VALUES)
                wide = value.to(gl.float32)
                code = gl.where(
                    wide == float("inf"), 2.0**-8, gl.where(wide == float("-inf"), 1.0, 2.0**8)
                )
                finite = gl.abs(wide) < float("inf")
                v.store(gl.where(finite, wide, 0.0).to(value.dtype))
                codes.store(gl.where(finite, 0.0, code).to(value.dtype))
            fence_async_shared()
            sync(AGAIN + 1, THREADS - 32, 4)
            p = gl.convert_layout(prob.to(q.dtype), LEFT_FACTOR)
            sees = gl.convert_layout(gl.where(seen, 1.0, 0.0).to(q.dtype), LEFT_FACTOR)
            acc = warpgroup_mma(p, v, acc, is_async=True)
            strange = warpgroup_mma(sees, codes, nothing, use_acc=False, is_async=True)
            acc, strange, p, sees = warpgroup_mma_wait(0, deps=(acc, strange, p, sees))
            arrive(AGAIN, THREADS, 4)
            whole = gl.floor(strange)
            acc += gl.where(strange > whole, float("inf"), 0.0)
            acc += gl.where(whole % 256 > 0, float("-inf"), 0.0)
            acc += gl.where(strange >= 256, float("nan"), 0.0)
        part_s.store(acc.to(q.dtype))
        fence_async_shared()
        barrier()
        _store_rows(part_desc, batch, first_head, first_row, part * _COLUMNS, part_s, FLAGS)
        tma_store_read(0)
