"""What one tile of scores needs, shared by the Triton kernels: its place, its mask, its changes.

Everything here runs inside a kernel. Arguments are the named tuples of `args`; ``row`` and ``col``
count queries and keys, ``position`` is the row's among the keys, all in whatever shape broadcasts
to the tile, in either orientation.

No kernel transposes an accumulator to multiply with it, which Triton 3.4 to 3.7.0 computes wrongly
on Hopper, and none adds two products to one accumulator in one turn of a loop, which 3.6 to 3.8 do
on Blackwell.
"""

# What stands in a kernel is Triton's language, which its types do not describe.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from hf_flash_two.kernels.params import LOG2E
from hf_flash_two.kernels.triton.args import HeadTerms
from hf_flash_two.masks import KEY_GROUP

_LOG2E = tl.constexpr(LOG2E)
_KEY_GROUP = tl.constexpr(KEY_GROUP)

NO_MASK = tl.constexpr(0)
BAND = tl.constexpr(1)
INTERVALS = tl.constexpr(2)


@triton.jit
def key_tiles(
    ranges_at, dense, tile, start, stop, key_length, left, right,
    FLAGS: tl.constexpr, BLOCK_K: tl.constexpr, UNIFORM: tl.constexpr = False,
):  # fmt: skip
    """Key tiles for queries at positions [start, stop), and those that need no masking.

    Intervals were looked through before, for all ``tile`` of a batch row: see `ranges`.

    Returns:
        [tile_start, tile_stop) without what is empty at either end, and the one run of them
        [full_start, full_stop) in which all pairs are visible.
    """
    tiles = tl.cdiv(key_length, BLOCK_K)
    tile_start, tile_stop, full_start, full_stop = 0, tiles, 0, key_length // BLOCK_K
    if FLAGS.MASK == BAND:
        if FLAGS.LEFT:
            tile_start = tl.maximum(start - left, 0) // BLOCK_K
            full_start = tl.cdiv(tl.maximum(stop - 1 - left, 0), BLOCK_K)
        if FLAGS.RIGHT:
            tile_stop = tl.minimum(tl.cdiv(tl.maximum(stop + right, 0), BLOCK_K), tiles)
            full_stop = tl.minimum(tl.maximum(start + right + 1, 0) // BLOCK_K, full_stop)
    elif FLAGS.MASK == INTERVALS:
        at = ranges_at + tile * 4
        tile_start, tile_stop = tl.load(at), tl.load(at + 1)
        full_start, full_stop = tl.load(at + 2), tl.load(at + 3)
    tile_stop = tl.maximum(tile_stop, tile_start)
    full_start = tl.maximum(full_start, tile_start)
    full_stop = tl.minimum(full_stop, tile_stop)
    if UNIFORM or dense.ptr is not None:
        full_stop = full_start
    empty = full_stop <= full_start
    full_start = tl.where(empty, tile_start, full_start)
    full_stop = tl.where(empty, tile_start, full_stop)
    return tile_start, tile_stop, full_start, full_stop


@triton.jit
def query_tiles(
    bounds_at, dense, key_start, key_length, query_length, offset, left, right,
    FLAGS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The transposed question: query tiles that see the keys [key_start, key_start + BLOCK_K)."""
    tiles = tl.cdiv(query_length, BLOCK_Q)
    key_stop = tl.minimum(key_start + BLOCK_K, key_length)
    low, high, full_low, full_high = 0, query_length, 0, query_length
    if FLAGS.MASK == BAND:
        if FLAGS.RIGHT:
            low = tl.maximum(key_start - right - offset, 0)
            full_low = tl.maximum(key_stop - 1 - right - offset, 0)
        if FLAGS.LEFT:
            high = tl.minimum(key_stop + left - offset, query_length)
            full_high = tl.minimum(key_start + left + 1 - offset, query_length)
    elif FLAGS.MASK == INTERVALS:
        group = key_start // _KEY_GROUP + tl.arange(0, (BLOCK_K + _KEY_GROUP - 1) // _KEY_GROUP)
        inside = group < tl.cdiv(key_length, _KEY_GROUP)
        at = bounds_at + group * 4
        low = tl.maximum(tl.min(tl.load(at, inside, 2**30)) - offset, 0)
        high = tl.minimum(tl.max(tl.load(at + 3, inside, -(2**30))) - offset, query_length)
        full_low = tl.maximum(tl.max(tl.load(at + 1, inside, -(2**30))) - offset, 0)
        full_high = tl.minimum(tl.min(tl.load(at + 2, inside, 2**30)) - offset, query_length)
    tile_start = tl.minimum(low // BLOCK_Q, tiles)
    tile_stop = tl.maximum(tl.cdiv(tl.maximum(high, 0), BLOCK_Q), tile_start)
    full_start = tl.maximum(tl.cdiv(full_low, BLOCK_Q), tile_start)
    # The last, partial tile of queries counts as masked: its missing rows must not contribute.
    full_stop = tl.minimum(tl.maximum(full_high, 0) // BLOCK_Q, tile_stop)
    if FLAGS.UNIFORM or dense.ptr is not None:
        full_stop = full_start
    empty = full_stop <= full_start
    full_start = tl.where(empty, tile_start, full_start)
    full_stop = tl.where(empty, tile_start, full_stop)
    return tile_start, tile_stop, full_start, full_stop


@triton.constexpr_function
def stages_of(stages, phase, mask):
    """Tiles in flight: fewer of those whose intervals take shared memory as well."""
    if phase == 2:
        return 1
    return min(stages, 2) if phase == 1 and mask == INTERVALS else stages


@triton.constexpr_function
def phases(rescue):
    """How many: full tiles, masked ones, and all once more where a result `holds_nan`.

    Products of a tile add 0 for each hidden pair, but 0 times NaN or infinity is NaN. Such a result
    is computed again with `seen_product`, so that hidden keys, values and rows never matter.
    """
    return 3 if rescue else 2


@triton.jit
def holds_nan(x, inside):
    """Whether a row of ``x`` that is ``inside`` holds NaN.

    All axes at once: of one after the other, Triton 3.7 makes no code for Blackwell.
    """
    return tl.max(((x != x) & inside[:, None]).to(tl.int32)) != 0


@triton.jit
def seen_product(a, b, acc, seen, b_at, step, inside, PRECISION: tl.constexpr):
    """acc + A B over the pairs of A that are ``seen``, whatever B holds for the others.

    What is finite is one product. The rows of B that are not, and that matter, are read again, from
    ``b_at`` in steps of ``step``, and added one by one.
    """
    COUNT: tl.constexpr = b.shape[0]
    index = tl.arange(0, COUNT)
    finite = tl.abs(b.to(tl.float32)) < float("inf")
    left = tl.max((finite == 0).to(tl.int32), 1) * tl.max(seen.to(tl.int32), 0)
    a = a.to(b.dtype)
    acc = tl.dot(a, tl.where(finite, b, 0.0).to(b.dtype), acc, input_precision=PRECISION)
    for _ in range(tl.sum(left, 0)):
        at = tl.min(tl.where(left != 0, index, COUNT), 0)
        here = index == at
        left = tl.where(here, 0, left)
        weight = tl.sum(tl.where(here[None, :], a.to(tl.float32), 0.0), 1)
        sees = tl.max((here[None, :] & seen).to(tl.int32), 1) != 0
        row = tl.load(b_at + at.to(tl.int64) * step, inside, 0.0).to(tl.float32)
        missing = sees[:, None] & ((tl.abs(row) < float("inf")) == 0)[None, :]
        acc += tl.where(missing, weight[:, None] * row[None, :], 0.0)
    return acc


@triton.jit
def tma_load(tiles, batch, head, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One tile by TMA, zero outside of the tensor; see `config.tma_tiles`."""
    at = [batch.to(tl.int32), head.to(tl.int32), row, column]
    return tiles.load(at).reshape(ROWS, COLUMNS)


@triton.jit
def intervals(
    of_keys, start_desc, stop_desc, at, key_start, key_length,
    FLAGS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The first query that sees each key of a tile, and the first after it that does not.

    ``at`` is where the batch row begins; by TMA its end reads on, which `visible` overrules.
    """
    query_start = tl.zeros([BLOCK_K], tl.int32)
    query_stop = query_start
    if FLAGS.MASK == INTERVALS:
        if start_desc is not None:
            query_start = start_desc.load([(at + key_start).to(tl.int32)])
            query_stop = stop_desc.load([(at + key_start).to(tl.int32)])
        else:
            col = key_start + tl.arange(0, BLOCK_K)
            query_start = tl.load(of_keys.start_ptr + at + col, col < key_length, 2**30)
            query_stop = tl.load(of_keys.stop_ptr + at + col, col < key_length, -(2**30))
    return query_start, query_stop


@triton.jit
def nth_tile(n, tile_start, full_start, full_stop):
    """The n-th non-empty tile: first those that need no masking, then the others in order."""
    whole = full_stop - full_start
    rest = n - whole
    before = full_start - tile_start
    return tl.where(
        n < whole,
        full_start + n,
        tl.where(rest < before, tile_start + rest, full_stop + rest - before),
    )


@triton.jit
def batch_row(batch, count, interval_stride_b):
    """Where a batch row of `Intervals.tiles_ptr` begins, of ``count`` tiles; one row may serve all.

    A number, as Triton 3.6 makes no code for AMD where a branch decides on a pointer.
    """
    return tl.where(interval_stride_b != 0, batch * count * 4, 0)


@triton.jit
def head_ptr(x, batch, head):
    """Where a head of an `Operand` begins."""
    return x.ptr + batch * x.stride_b + head * x.stride_h


@triton.jit
def pair_offset(x, batch, head):
    """How far behind its pointer a head of a `PerPair` begins."""
    offset = 0
    if x.ptr is not None:
        offset = batch * x.stride_b + head * x.stride_h
    return offset


@triton.jit
def head_number(x, batch, head):
    """What a `PerHead` holds for a head, or for several side by side."""
    return tl.load(x.ptr + batch * x.stride_b + head * x.stride_h)


@triton.jit
def head_terms(terms, batch, head):
    """The terms of one head, or of several side by side."""
    slope = 0.0
    if terms.slopes.ptr is not None:
        slope = tl.load(
            terms.slopes.ptr + batch * terms.slopes.stride_b + head * terms.slopes.stride_h
        )
    return HeadTerms(pair_offset(terms.bias, batch, head), slope)


@triton.jit
def visible(
    row, position, col, query_length, key_length, query_start, query_stop, dense, dense_offset,
    left, right, FLAGS: tl.constexpr,
):  # fmt: skip
    """The mask of one tile."""
    seen = (col < key_length) & (row < query_length)
    if FLAGS.MASK == BAND:
        if FLAGS.LEFT:
            seen = seen & (position - col <= left)
        if FLAGS.RIGHT:
            seen = seen & (col - position <= right)
    elif FLAGS.MASK == INTERVALS:
        seen = seen & (query_start <= position) & (position < query_stop)
    if dense.ptr is not None:
        at = dense.ptr + dense_offset
        at += row.to(tl.int64) * dense.stride_q + col.to(tl.int64) * dense.stride_k
        seen = seen & (tl.load(at, seen, 0) != 0)
    return seen


@triton.constexpr_function
def unit(plain):
    """Powers of two in a unit of the row's maximum: plain scores are kept in base 2.

    The others are not: a bias of the smallest finite number is infinite in base 2, and one of -1e9
    leaves of the score's own part what rounding leaves to every key alike.
    """
    return 1.0 if plain else LOG2E


@triton.jit
def modify(s, row, position, col, seen, terms, of_head, FLAGS: tl.constexpr):
    """Scores of products, and d(capped score) / d(scaled score), ``d_cap``."""
    s = s * terms.scale
    d_cap = s
    if FLAGS.SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2x) + 1) saturates correctly at both ends; its series has more
        # correct digits around 0.
        x = s / terms.softcap
        square = x * x
        series = 1 + square * (
            -1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * 62 / 2835))
        )
        capped = 1 - 2 / (tl.exp2(x * (2 * _LOG2E)) + 1)
        capped = tl.where(square < 0.0625, x * series, capped)
        s = capped * terms.softcap
        d_cap = 1 - capped * capped
    if terms.bias.ptr is not None:
        at = terms.bias.ptr + of_head.bias
        at += row.to(tl.int64) * terms.bias.stride_q + col.to(tl.int64) * terms.bias.stride_k
        s += tl.load(at, seen, 0).to(tl.float32)
    if terms.slopes.ptr is not None:
        s -= of_head.slope * tl.abs(position - col).to(tl.float32)
    return s, d_cap


@triton.jit
def probabilities(
    s, lse, weight, row, position, col, seen, terms, of_head,
    MASKED: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Softmax of one tile given its rows' lse, in the maximum's unit, and `modify`'s ``d_cap``.

    Where a bias has moved all scores of a row far away, lse is too coarse to tell how many there
    are: ``weight`` makes their sum 1.
    """
    if FLAGS.PLAIN:
        d_cap = s
        p = tl.exp2(s * (terms.scale * _LOG2E) - lse)
    else:
        s, d_cap = modify(s, row, position, col, seen, terms, of_head, FLAGS)
        p = tl.exp2((s - lse) * _LOG2E) * weight
    if MASKED:
        p = tl.where(seen, p, 0.0)
    return p, d_cap


@triton.jit
def score_gradient(p, dp, delta, keep, keep_scale, DROPOUT: tl.constexpr):
    """d(loss) / d(score) of one tile; ``keep`` is dropout's."""
    if DROPOUT:
        dp = tl.where(keep, dp * keep_scale, 0.0)
    return p * (dp - delta)


@triton.jit
def load_tile(
    at, desc, batch, head, start, inside, column, WHOLE: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Rows from ``start`` on of one head of an operand, by TMA where it has a descriptor.

    Args:
        at: [ROWS], where each row begins; those not ``inside`` are read as 0.
        column: [COLUMNS], of which ``WIDTH`` are the operand's.
        WHOLE: all rows are inside.
    """
    if desc is not None:
        x = tma_load(desc, batch, head, start, 0, ROWS, COLUMNS)
    elif WHOLE and WIDTH == COLUMNS:
        x = tl.load(at[:, None] + column[None, :])
    else:
        x = tl.load(at[:, None] + column[None, :], inside[:, None] & (column < WIDTH)[None, :], 0.0)
    return x


@triton.jit
def _mix(x):
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def kept(dropout, batch, head, row, col):
    """`dropout.keep` for one tile: True where the probability survives."""
    seed = tl.load(dropout.seed_ptr)
    low = seed.to(tl.uint32)
    high = (seed >> 32).to(tl.uint32)
    stream = _mix((_mix(low) ^ high) + (batch.to(tl.uint32) + 1) * 0x9E3779B9)
    stream = _mix(stream ^ head.to(tl.uint32))
    bits = _mix(low ^ row.to(tl.uint32)) + stream
    return _mix(_mix(bits) ^ _mix(col.to(tl.uint32))) >= tl.cast(dropout.threshold, tl.uint32)
