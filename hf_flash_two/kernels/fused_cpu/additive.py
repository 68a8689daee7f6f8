"""What is added to the scores of a piece: bias, ALiBi, and -inf where the mask hides.

The op reads such a tensor as [B or 1, H or 1, rows or 1, keys or 1] in float32 or its own dtype. A
bias is handed on as it is where nothing else joins it. ALiBi, and what a band hides with it, depend
on the distance of a query and a key alone: with its rows in reverse order it is constant along
anti-diagonals, and a line of rows + keys numbers per head, read at overlapping strides, says it
all. What is left is written out, in blocks of rows that bound the memory.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from hf_flash_two.kernels.fused_cpu.pieces import KEYS, Piece, Plan
from hf_flash_two.kernels.hidden import HiddenPairs
from hf_flash_two.kernels.params import TENSORS, AttentionParams, statistics_dtype
from hf_flash_two.tensor_cache import derive

_MOST = 2**24
"""Numbers in a block that is written out."""
_KEPT = 2**16
"""Numbers in a mask of a band that is kept."""
_ROWS = 512
_FEWEST = 64
_LINE_ROWS = 768
"""Rows in a block of a causal piece with ALiBi, whose hidden half is computed."""


def in_blocks(plan: Plan, params: AttentionParams) -> Plan | str:
    """The plan with the pieces cut whose terms have to be written out, or why it cannot be."""
    if params.plain and params.dense is None:
        return plan
    pieces: list[Piece] = []
    for piece in plan.pieces:
        rows = piece.rows.stop - piece.rows.start
        if _is_line(params, piece):
            most = max(1, rows // _LINE_ROWS)
            found = _cut(piece, -(-rows // most)) if piece.causal else [piece]
        elif _is_written(params, piece):
            count = _numbers(params, piece) * (piece.keys.stop - piece.keys.start)
            most = min(_ROWS, _MOST // count)
            if most < min(rows, _FEWEST):
                return "its bias or mask is too large to be written out, even in blocks"
            found = _cut(piece, most)
        else:
            found = [piece]
        pieces += found
    # Of a dense mask, a block may turn out to see a part of the keys.
    whole = plan.is_whole and len(pieces) == 1 and params.dense is None
    return Plan(tuple(pieces), plan.blind, whole)


def _cut(piece: Piece, most: int) -> list[Piece]:
    """Blocks of ``most`` rows. Those of the causal square see as many keys as reach their last."""
    found = []
    for start in range(piece.rows.start, piece.rows.stop, most):
        rows = slice(start, min(start + most, piece.rows.stop))
        if not piece.causal:
            found.append(piece._replace(rows=rows))
            continue
        first = piece.keys.start
        keys = slice(first, first + rows.stop - piece.rows.start)
        lag = first - piece.rows.start
        found.append(piece._replace(rows=rows, keys=keys, causal=False, masked=True, lag=lag))
    return found


def _is_line(params: AttentionParams, piece: Piece) -> bool:
    if params.alibi_slopes is None or params.bias is not None or params.dense is not None:
        return False
    in_order = piece.causal or piece.lag is not None or params.query_start is None
    return not piece.together and (in_order or not piece.masked)


def _is_written(params: AttentionParams, piece: Piece) -> bool:
    """Whether more than one thing is added."""
    if params.dense is not None or params.alibi_slopes is not None:
        return True
    return params.bias is not None and piece.masked


def _numbers(params: AttentionParams, piece: Piece) -> int:
    """Numbers that are added to one pair of a row and a key: by batch row and head."""
    count = 1
    for axis, size in ((0, piece.batch.stop - piece.batch.start), (1, None)):
        sizes = [
            x.shape[axis]
            for x in (params.bias, params.dense, params.alibi_slopes)
            if x is not None and x.shape[axis] > 1
        ]
        count *= min(sizes[0], size or sizes[0]) if sizes else 1
    return count


class Additive:
    """What the op adds to the scores of each piece."""

    def __init__(self, params: AttentionParams, like: Tensor) -> None:
        self._params, self._dtype = params, like.dtype
        self._stats = statistics_dtype(like.dtype)
        self._hidden = HiddenPairs(params, like.device)
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, piece: Piece) -> tuple[Piece, Tensor | None, bool]:
        """(piece, additive, whether it is of the rows in reverse order)

        A dense mask may leave fewer keys to the piece.
        """
        params = self._params
        if _is_line(params, piece):
            return piece, self._line(piece), True
        if _is_written(params, piece):
            return *self._written(piece), False
        if params.bias is not None:
            return piece, self._bias(params.bias, piece), False
        return piece, self._of_hidden(piece), False

    def _of_hidden(self, piece: Piece) -> Tensor | None:
        if not piece.masked:
            return None
        params, dtype = self._params, self._dtype
        if piece.together and params.query_start is not None and params.query_stop is not None:
            # All layers need it.
            sizes = (piece.batch.stop, piece.rows.stop, piece.keys.start, piece.keys.stop)
            key = ("additive", dtype, params.query_offset, *sizes)

            def build() -> Tensor:
                return _as_additive(self._hidden_by_runs(piece), dtype)

            return derive(key, build, params.query_start, params.query_stop)
        hidden = self._hidden_by_runs(piece)
        # The blocks of a band hide the same, one after the other.
        if self._last is None or self._last[0] is not hidden:
            self._last = hidden, _as_additive(hidden, dtype)
        return self._last[1]

    def _hidden_by_runs(self, piece: Piece) -> Tensor:
        row = piece.batch.start
        batch = piece.batch if piece.together else slice(row, row + 1)
        hidden = self._hidden(batch, piece.rows, piece.keys)
        assert hidden is not None, "nothing is hidden without a band or intervals"
        return hidden

    def _bias(self, bias: Tensor, piece: Piece) -> Tensor:
        part = _part(bias, piece)
        if part.dtype not in (self._dtype, torch.float32) or self._dtype == torch.float64:
            part = part.to(self._stats)
        return part if part.shape[3] == 1 or part.stride(3) == 1 else part.contiguous()

    def _written(self, piece: Piece) -> tuple[Piece, Tensor]:
        params = self._params
        hidden = self._hidden_by_runs(piece)[:, None] if piece.masked else None
        if params.dense is not None:
            unseen = ~_part(params.dense, piece)
            hidden = unseen if hidden is None else hidden | unseen
            keys = _seen(hidden, piece.keys)
            piece, hidden = piece._replace(keys=keys), hidden[..., _within(keys, piece.keys)]
        total: Tensor | None = None
        if params.alibi_slopes is not None:
            position = torch.arange(piece.rows.start, piece.rows.stop)[:, None]
            key = torch.arange(piece.keys.start, piece.keys.stop)
            distance = position + params.query_offset - key
            total = self._slopes(piece)[..., None, None] * -distance.abs()
        if params.bias is not None:
            bias = _part(params.bias, piece)
            total = bias.to(self._stats) if total is None else total + bias
        if total is None:
            assert hidden is not None
            total = torch.zeros(hidden.shape, dtype=self._dtype).masked_fill_(hidden, -math.inf)
        elif hidden is not None:
            total = torch.where(hidden, -math.inf, total)
        ordered = total.shape[3] == 1 or total.stride(3) == 1
        return piece, total if ordered else total.contiguous()

    def _line(self, piece: Piece) -> Tensor:
        params, rows, keys = self._params, piece.rows, piece.keys
        count, width = rows.stop - rows.start, keys.stop - keys.start
        ahead = torch.arange(count + width - 1)
        # Of the last row, which comes first, to the first key, and then less and less.
        distance = rows.stop - 1 + params.query_offset - keys.start - ahead
        line = self._slopes(piece)[..., None] * -distance.abs()
        if piece.lag is not None:
            line.masked_fill_(rows.stop - 1 + piece.lag - keys.start < ahead, -math.inf)
        elif piece.masked:
            left, right = params.window_left, params.window_right
            if left is not None:
                line.masked_fill_(distance > left, -math.inf)
            if right is not None:
                line.masked_fill_(-distance > right, -math.inf)
        line = line.contiguous()
        batch, heads, length = line.shape
        return line.as_strided((batch, heads, count, width), (heads * length, length, 1, 1))

    def _slopes(self, piece: Piece) -> Tensor:
        slopes = self._params.alibi_slopes
        assert slopes is not None
        return slopes[piece.batch] if slopes.shape[0] > 1 else slopes


def band_additive(params: AttentionParams, piece: Piece, dtype: torch.dtype) -> Tensor:
    """-inf where a band hides pairs of a piece, [1, 1, rows, keys]; a small one is kept."""
    rows, keys = piece.rows, piece.keys
    is_small = (rows.stop - rows.start) * (keys.stop - keys.start) <= _KEPT
    build = _band_additive if is_small else _band_additive.__wrapped__
    return build(params.numbers, rows.start, rows.stop, keys.start, keys.stop, dtype)


@lru_cache(maxsize=64)
def _band_additive(
    numbers: tuple, row: int, row_stop: int, key: int, key_stop: int, dtype: torch.dtype
) -> Tensor:
    band = AttentionParams._make((*[None] * len(TENSORS), *numbers))
    pairs = slice(0, 1), slice(row, row_stop), slice(key, key_stop)
    hidden = HiddenPairs(band, torch.device("cpu"))(*pairs)
    assert hidden is not None, "nothing is hidden without a band"
    return _as_additive(hidden, dtype)


def _as_additive(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """[B or 1, rows, keys] as [B or 1, 1, rows, keys]"""
    zeros = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return zeros.masked_fill_(hidden, -math.inf)[:, None]


def _seen(hidden: Tensor, keys: slice) -> slice:
    """Of ``keys`` those from the first to the last that is seen, in whole blocks of the op.

    Where a block begins decides how sums are rounded: not what others of the batch see. One block
    stays where none is seen.
    """
    if hidden.shape[3] == 1:
        return keys
    seen = (~hidden.all((0, 1, 2))).nonzero()
    first, last = (int(seen[0]), int(seen[-1])) if len(seen) else (0, 0)
    stop = keys.start + (last // KEYS + 1) * KEYS
    return slice(keys.start + first // KEYS * KEYS, min(stop, keys.stop))


def _within(keys: slice, all_keys: slice) -> slice:
    return slice(keys.start - all_keys.start, keys.stop - all_keys.start)


def _part(x: Tensor, piece: Piece) -> Tensor:
    """What a tensor that broadcasts to [B, H, Tq, Tk] has for a piece."""
    whole = slice(None)
    return x[
        piece.batch if x.shape[0] > 1 else whole, :,
        piece.rows if x.shape[2] > 1 else whole, piece.keys if x.shape[3] > 1 else whole,
    ]  # fmt: skip


def blind(piece: Piece, additive: Tensor) -> Tensor:
    """bool [B or 1, H or 1, rows or 1]: the rows in which nothing is visible."""
    unseen = additive == -math.inf
    if piece.causal:
        count, width = piece.rows.stop - piece.rows.start, piece.keys.stop - piece.keys.start
        unseen = unseen | torch.ones(count, width, dtype=torch.bool).triu(1)
    return unseen.all(3)
