"""What a tile of scores needs in both passes: who sees whom, score terms, dropout, hand-overs.

Everything here runs inside a Gluon kernel. ``position`` is a row's place among the keys, ``col`` a
key's, both in whatever shape broadcasts to the tile, in either orientation. Formulas are those of
the portable kernels: Gluon runs their functions of numbers and of single elements as they are.

``FLAGS`` is a record of constants, each pass's own. It has ``MASK``, `NO_MASK`, `BAND` or
`INTERVALS`; ``LEFT`` and ``RIGHT``, whether a band hides anything on this side; ``SOFTCAP``,
``ALIBI``; and ``PLAIN``, that scores are the scaled products and nothing else and the scale is
positive. A kernel hands it to its partitions in the left operand of a sum of tuples: at any other
place Triton 3.6 takes it for a value of run time.
"""

# What stands in a kernel is Triton's language, which its types do not describe.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

from hf_flash_two.kernels.hopper.gluon import gl, jit
from hf_flash_two.kernels.params import LOG2E
from hf_flash_two.kernels.triton import tile as portable
from hf_flash_two.kernels.triton.args import Dropout, HeadTerms, PerHead, PerPair, ScoreTerms
from hf_flash_two.kernels.triton.tile import BAND, INTERVALS, NO_MASK

__all__ = [
    "BAND", "INTERVALS", "NO_MASK", "arrive", "exponent_factor", "keep_bits",
    "modified", "nth_tile", "sync", "tiles_of_rows", "uniform",
]  # fmt: skip

_LOG2E = gl.constexpr(LOG2E)
_modify, _kept, _key_tiles = portable.modify, portable.kept, portable.key_tiles


@jit
def exponent_factor(scale, FLAGS: gl.constexpr):
    """What a score, as `modified` leaves it, is multiplied by to be an exponent of 2."""
    if FLAGS.PLAIN:
        factor = scale * _LOG2E
    else:
        factor = scale * 0.0 + _LOG2E
    return factor


@jit
def modified(s, position, col, scale, softcap, slope, FLAGS: gl.constexpr):
    """Scores of products, and d(capped score) / d(scaled score); plain ones stay as they are.

    Those that are not plain are scaled, capped and bent by ALiBi. ``slope`` is one number, or one
    for each row.
    """
    d_cap = s
    if not FLAGS.PLAIN:
        terms = ScoreTerms(scale, softcap, PerPair(None, 0, 0, 0, 0), PerHead(None, 0, 0))
        s, d_cap = _modify(s, position, position, col, None, terms, HeadTerms(0, 0), FLAGS)
        if FLAGS.ALIBI:
            distance = position - col
            s -= slope * gl.maximum(distance, -distance).to(gl.float32)
    return s, d_cap


@jit
def keep_bits(seed_ptr, threshold, batch, head, row, col):
    """`dropout.keep` for one tile: True where the probability survives."""
    return _kept(Dropout(seed_ptr, threshold, 1.0), batch, head, row, col)


@jit
def tiles_of_rows(
    ranges_at, tile, start, stop, key_length, left, right,
    FLAGS: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """The key tiles of queries at positions [start, stop), in the order of `nth_tile`.

    One at least: rows that see no key go through the first tile, of which they see nothing.

    Returns:
        how many they are, how many of them need a mask, and ``tile_start``, ``full_start`` and
        ``full_stop`` of the portable kernels' `key_tiles`.
    """
    none = PerPair(None, 0, 0, 0, 0)
    tile_start, tile_stop, full_start, full_stop = _key_tiles(
        ranges_at, none, tile, start, stop, key_length, left, right, FLAGS, BLOCK_K
    )
    total = tile_stop - tile_start
    masked = total - (full_stop - full_start)
    empty = total <= 0
    tile_start = gl.where(empty, 0, tile_start)
    full_start = gl.where(empty, 0, full_start)
    full_stop = gl.where(empty, 0, full_stop)
    return gl.maximum(total, 1), gl.where(empty, 1, masked), tile_start, full_start, full_stop


@jit
def nth_tile(n, masked, tile_start, full_start, full_stop):
    """The n-th key tile of `tiles_of_rows`: those that need a mask, then the others.

    Masked tiles first let a row meet a key it sees as early as its other rows do.
    """
    before = full_start - tile_start
    return gl.where(
        n >= masked,
        full_start + n - masked,
        gl.where(n < before, tile_start + n, full_stop + n - before),
    )


@jit
def uniform(x):
    """An integer that is the same in all threads of a warp, which ptxas now knows."""
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 31, -1;", "=r,r", [x], dtype=gl.int32, is_pure=True, pack=1
    )


# Named barriers. Around an arrival at an mbarrier, Triton adds barriers of the whole partition;
# around these it adds none. It takes the numbers 0, 1 and one for each partition but the first.


@jit
def sync(number, THREADS: gl.constexpr, WARPS: gl.constexpr):
    """Arrives at the named barrier, as one of ``WARPS``, and waits until ``THREADS`` have."""
    _bar("bar.sync", number, THREADS, WARPS)


@jit
def arrive(number, THREADS: gl.constexpr, WARPS: gl.constexpr):
    """Arrives at the named barrier and goes on."""
    _bar("bar.arrive", number, THREADS, WARPS)


@jit
def _bar(INSTRUCTION: gl.constexpr, number, THREADS: gl.constexpr, WARPS: gl.constexpr):
    lane = gl.arange(0, 32 * WARPS, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    TEXT: gl.constexpr = f"{INSTRUCTION} $1, {THREADS}; mov.b32 $0, $1;"
    gl.inline_asm_elementwise(
        TEXT, "=r,r", [lane * 0 + number], dtype=gl.int32, is_pure=False, pack=1
    )
