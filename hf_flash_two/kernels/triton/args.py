"""What the Triton kernels take: named tuples of pointers, strides and numbers.

Shapes are of B batch rows, Hq query heads, Hk key heads, Tq queries and Tk keys, D elements of a
query or key and Dv of a value. Strides count elements and are 0 along every axis that broadcasts. A
pointer is None, at compile time, where a call has no such tensor.

Triton compiles anew where a number in a tuple becomes 1 or a multiple of 16, or stops being one. So
lengths and what follows from them stay parameters of their own, outside of tuples. Descriptors for
TMA do too: Triton 3.6 and 3.7 find none inside of tuples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from hf_flash_two.kernels import dropout
from hf_flash_two.kernels.params import AttentionParams


class Operand(NamedTuple):
    """[B, H, T, D], its last axis without gaps; or [B, H, T]."""

    ptr: Any
    stride_b: Any
    stride_h: Any
    stride_t: Any


class PerPair(NamedTuple):
    """A tensor that broadcasts to [B, Hq, Tq, Tk]."""

    ptr: Any
    stride_b: Any
    stride_h: Any
    stride_q: Any
    stride_k: Any


class PerHead(NamedTuple):
    """A tensor that broadcasts to [B, Hq]."""

    ptr: Any
    stride_b: Any
    stride_h: Any


class Tma(NamedTuple):
    """A tensor as the tensor memory accelerator (TMA) of Hopper and later GPUs copies its tiles.

    The first three are empty where it does not: kernels then load through pointers.

    Attributes:
        layout: of a tile in shared memory, where a kernel in Gluon takes it.
    """

    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    block: tuple[int, ...] = ()
    layout: Any = None


class Tiled(NamedTuple):
    """A tensor whose tiles TMA copies, where lengths differ from call to call."""

    tensor: Tensor
    tma: Tma


class Intervals(NamedTuple):
    """Who sees each key, int32: key j is seen by the queries at positions [start[j], stop[j]).

    Attributes:
        start_ptr, stop_ptr: [B or 1, Tk].
        tiles_ptr: of a pass over keys, `ranges.key_ranges`, [B or 1, query tiles, 4]; of a pass
            over queries, `AttentionMask.key_bounds`, [B or 1, groups of keys, 4].
    """

    start_ptr: Any = None
    stop_ptr: Any = None
    tiles_ptr: Any = None


class ScoreTerms(NamedTuple):
    """What makes scores of products, in this order: scale, softcap, bias, ALiBi's slopes."""

    scale: Any
    softcap: Any
    bias: PerPair
    slopes: PerHead


class HeadTerms(NamedTuple):
    """The `ScoreTerms` of one head: where its bias begins, and its slope."""

    bias: Any
    slope: Any


class Parts(NamedTuple):
    """Where programs that share a tile of queries leave what they made of their part of the keys.

    ``rows`` is B * Hq * Tq; "tiles of Dv" are those of `attend_kernel`'s grid.

    Attributes:
        ptr: float32 [parts, rows, Dv], sums not yet divided, then [tiles of Dv, 2, parts, rows],
            maximum and sum of each row.
        arrived_ptr: int32 [tiles of queries, tiles of Dv], how many have left theirs; 0 before and
            after.
    """

    ptr: Any = None
    arrived_ptr: Any = None


class Rows(NamedTuple):
    """What the dQ pass leaves for the others to know of each row, float32 [B, Hq, Tq rounded up].

    Behind the last row all are 0, but for the lse of Hopper's kernels, which is infinite.

    Attributes:
        lse_ptr: its log-sum-exp in `tile.unit`; 0 of rows that see nothing.
        delta_ptr: sum(dO * O) - d_lse; 0 of rows that see nothing.
        weight_ptr: makes the sum of its probabilities 1, where a bias makes lse too coarse for it.
    """

    lse_ptr: Any
    delta_ptr: Any
    weight_ptr: Any


class Dropout(NamedTuple):
    """int64 [1]; `dropout.threshold`; and what survives is multiplied by ``keep_scale``."""

    seed_ptr: Any
    threshold: Any
    keep_scale: Any


class Heads(NamedTuple):
    """Hq, and how many query heads share a key head."""

    count: Any
    group: Any


class BiasShape(NamedTuple):
    """B of the call, and the shape of the bias, each axis whole or 1."""

    all_batch: Any
    batch: Any
    heads: Any
    queries: Any
    keys: Any


class Flags(NamedTuple):
    """What is decided at compile time. Features that are off cost nothing.

    Attributes:
        MASK: `tile.NO_MASK`, `tile.BAND` or `tile.INTERVALS`.
        LEFT, RIGHT: a band ends on this side.
        SOFTCAP, DROPOUT: are on.
        PLAIN: scores are the scaled products and nothing else.
        RESCUE: tiles may hold hidden pairs, whose NaN and infinities must not matter.
        UNIFORM: no tile is known to be fully visible: all are computed by the same instructions.
        PRECISION: of float32 products, "ieee" or "tf32".
    """

    MASK: int
    LEFT: bool
    RIGHT: bool
    SOFTCAP: bool
    DROPOUT: bool
    PLAIN: bool
    RESCUE: bool
    UNIFORM: bool
    PRECISION: str


def broadcast_strides(tensor: Tensor | None, *shape: int) -> tuple[int, ...]:
    """The strides of ``tensor`` broadcast to ``shape``; 0 if there is none."""
    return (0,) * len(shape) if tensor is None else tensor.expand(shape).stride()


def score_terms(params: AttentionParams, *shape: int) -> Callable[[AttentionParams], ScoreTerms]:
    """Makes the `ScoreTerms` of calls that differ from this one in their tensors' values only.

    Args:
        shape: B, Hq, Tq, Tk.
    """
    scale, softcap = params.scale, params.softcap or 1.0
    bias = broadcast_strides(params.bias, *shape)
    slopes = broadcast_strides(params.alibi_slopes, *shape[:2])

    def terms(params: AttentionParams) -> ScoreTerms:
        return ScoreTerms(
            scale, softcap, PerPair(params.bias, *bias), PerHead(params.alibi_slopes, *slopes)
        )

    if params.bias is None and params.alibi_slopes is None:
        known = terms(params)
        return lambda params: known
    return terms


def dropout_of(params: AttentionParams) -> Dropout:
    """Dropout, its seed left out."""
    return Dropout(None, dropout.threshold(params.dropout_p), 1 / (1 - params.dropout_p))


_NO_INTERVALS = Intervals()


def intervals_of(params: AttentionParams, tiles: Tensor | None) -> Intervals:
    if tiles is None:
        return _NO_INTERVALS
    return Intervals(params.query_start, params.query_stop, tiles)
