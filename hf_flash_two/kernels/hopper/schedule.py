"""Which tiles a program of the backward goes through, and in which order dQ is summed.

**Order.** With `Setup.ORDERED` the key tiles of a head add to a tile of dQ one after the other, so
that the same inputs give the same bits. A counter per tile of dQ says how many have added; a tile
of keys waits until that is its own rank, which `rank_of` works out of the band. All wait only for
programs of a lower number, and the GPU starts programs in the order of their numbers.

**Way.** A program goes down from the last tile of queries that sees its keys. In a fixed order all
query heads of a group visit a tile before any visits the next: the first tile of keys is seen by
most queries, and the others would wait for it at each head. Not if the band ends on the left: most
tiles are seen by as many then, and what one head needs stays in the L2 cache.
"""

# What stands in a kernel is Triton's language, which its types do not describe.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

from typing import Any, NamedTuple

import triton

from hf_flash_two.kernels.hopper.gluon import gl, jit
from hf_flash_two.kernels.triton.tile import BAND, INTERVALS
from hf_flash_two.masks import KEY_GROUP

_KEY_GROUP = gl.constexpr(KEY_GROUP)
ROW_MULTIPLE = 128
"""`Rows` are padded to multiples of this, so that no tile needs a bounds check."""
_ROW_MULTIPLE = gl.constexpr(ROW_MULTIPLE)


class Setup(NamedTuple):
    """What is decided at compile time.

    Attributes:
        MASK, LEFT, RIGHT, SOFTCAP, PLAIN, DROPOUT, RESCUE: see `triton.args.Flags`.
        ALIBI: slopes are given.
        MASKED: some tile may hold hidden pairs or end behind the last key.
        WITH_DQ: dQ is summed beside dK and dV; else `queries` computes it.
        ORDERED: it is summed in a fixed order, of which there is none with intervals.
        DV_FIRST: dV's product is issued before dS is computed.
        LATE_LSE, LATE_DELTA: are read after the products they stand beside: fewer registers.
        BLOCK_Q, BLOCK_K: queries and keys of a tile.
    """

    MASK: int
    LEFT: bool
    RIGHT: bool
    SOFTCAP: bool
    PLAIN: bool
    RESCUE: bool
    ALIBI: bool
    DROPOUT: bool
    MASKED: bool
    WITH_DQ: bool
    ORDERED: bool
    DV_FIRST: bool
    LATE_LSE: bool
    LATE_DELTA: bool
    BLOCK_Q: int
    BLOCK_K: int


class Sizes(NamedTuple):
    """Lengths, and what the mask is made of.

    Attributes:
        heads: Hq, and how many query heads share a key head.
        key_heads: B * Hk.
        together: how many key heads have their tiles of keys side by side in the grid.
        left, right: the band.
        interval_stride_b: Tk, or 0 where one row of intervals serves all.
    """

    heads: Any
    key_heads: Any
    together: Any
    query_length: Any
    key_length: Any
    offset: Any
    left: Any
    right: Any
    of_keys: Any
    interval_stride_b: Any


class Scores(NamedTuple):
    """What makes scores of products: ``scale``, in base 2 if plain, the cap, ALiBi's slopes;

    and what drops pairs.
    """

    scale: Any
    softcap: Any
    slopes: Any
    dropout: Any


class Place(NamedTuple):
    """What a program does: a tile of keys, and the tiles of queries that it goes through.

    Attributes:
        last: the tile of queries that is visited first; from there they go down.
        count: how many they are.
    """

    batch: Any
    key_head: Any
    tile: Any
    last: Any
    count: Any


@triton.constexpr_function
def log2(size):
    return size.bit_length() - 1


@jit
def _span_of(tile, batch, sizes, SETUP: gl.constexpr):
    """Query tiles that see a tile of keys: [start, stop).

    A tile of keys and one of queries meet if their whole rectangle meets the band, inside of the
    tensors or not: `rank_of` turns the question round and must get the same answer.
    """
    SHIFT: gl.constexpr = log2(SETUP.BLOCK_Q)
    count = gl.cdiv(sizes.query_length, SETUP.BLOCK_Q)
    start, stop = 0, count
    # Rows of queries that stand at the first and the last key.
    first = tile * SETUP.BLOCK_K - sizes.offset
    last = first + SETUP.BLOCK_K - 1
    if SETUP.MASK == BAND:
        if SETUP.RIGHT:
            start = gl.maximum((first - sizes.right) >> SHIFT, 0)
        if SETUP.LEFT:
            stop = gl.minimum(((last + sizes.left) >> SHIFT) + 1, count)
    if SETUP.MASK == INTERVALS:
        first_start, last_stop = _bounds(tile, batch, sizes, SETUP)
        start = gl.minimum(gl.maximum(first_start - sizes.offset, 0) >> SHIFT, count)
        stop = gl.minimum((last_stop - sizes.offset + SETUP.BLOCK_Q - 1) >> SHIFT, count)
    return start, gl.maximum(stop, start)


@jit
def _bounds(tile, batch, sizes, SETUP: gl.constexpr):
    """The first start and the last stop of a tile of keys."""
    groups = gl.cdiv(sizes.key_length, _KEY_GROUP)
    first = gl.where(sizes.interval_stride_b != 0, batch * groups, 0)
    one = sizes.of_keys.tiles_ptr + (first + tile * (SETUP.BLOCK_K // _KEY_GROUP)) * 4
    # A tile's second group may lie behind the last: the first again.
    two = one
    if SETUP.BLOCK_K > _KEY_GROUP:
        two += gl.where(tile * 2 + 1 < groups, 4, 0)
    return (
        gl.minimum(gl.load(one), gl.load(two)),
        gl.maximum(gl.load(one + 3), gl.load(two + 3)),
    )


@jit
def place_of(sizes, SETUP: gl.constexpr):
    """Which tile of keys is this program's, and its way through the queries."""
    key_tiles = gl.cdiv(sizes.key_length, SETUP.BLOCK_K)
    program = gl.program_id(0)
    group = program // (sizes.together * key_tiles)
    program -= group * sizes.together * key_tiles
    width = gl.minimum(sizes.together, sizes.key_heads - group * sizes.together)
    tile = program // width
    head = group * sizes.together + program - tile * width
    per_batch = sizes.heads.count // sizes.heads.group
    batch = head // per_batch
    start, stop = _span_of(tile, batch, sizes, SETUP)
    return Place(batch, head - batch * per_batch, tile, stop - 1, stop - start)


@triton.constexpr_function
def heads_inside(setup):
    """Whether all heads of a group visit a tile of queries before any visits the next."""
    return setup.ORDERED and not setup.LEFT


@jit
def loops_of(place, sizes, SETUP: gl.constexpr):
    """How often the outer and the inner loop run whose turns `visit` takes."""
    if heads_inside(SETUP):
        outer, inner = place.count, sizes.heads.group
    else:
        outer, inner = sizes.heads.group, place.count
    return outer, inner


@jit
def visit(i, j, place, SETUP: gl.constexpr):
    """Tile of queries, and which head of the group, in the turns i and j of two loops."""
    if heads_inside(SETUP):
        step, member = i, j
    else:
        step, member = j, i
    return place.last - step, member


@jit
def rank_of(place, query_tile, sizes, SETUP: gl.constexpr):
    """How many tiles of keys add to a tile of dQ before this program's."""
    SHIFT: gl.constexpr = log2(SETUP.BLOCK_K)
    position = query_tile * SETUP.BLOCK_Q + sizes.offset
    first = 0
    if SETUP.LEFT:
        first = gl.maximum((position - sizes.left) >> SHIFT, 0)
    return place.tile - first


@jit
def await_turn(counter_ptr, rank):
    """One warp waits until so many have added, and sees what they added."""
    x = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 v; again: ld.acquire.gpu.global.b32 v, [$1];"
        " setp.ne.b32 p, v, $2; @p bra again; fence.proxy.async.global; mov.b32 $0, v; }",
        "=r,l,r", [counter_ptr + x * 0, rank + x * 0], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@jit
def end_turn(counter_ptr):
    """One more has added."""
    x = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.eq.b32 p, $2, 0; fence.proxy.async.global;"
        " @p red.release.gpu.global.add.s32 [$1], 1; mov.b32 $0, $2; }",
        "=r,l,r", [counter_ptr + x * 0, x], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@jit
def first_row_of(place, member, sizes, SETUP: gl.constexpr):
    """Where a query head begins, in tiles of `Rows`."""
    head = place.key_head * sizes.heads.group + member
    tiles = gl.cdiv(sizes.query_length, _ROW_MULTIPLE) * (_ROW_MULTIPLE // SETUP.BLOCK_Q)
    return head, (place.batch * sizes.heads.count + head) * tiles
