"""A mask as pieces of attention that PyTorch's fused CPU op can compute, each in one call.

The op knows three kinds: every query sees every key, the causal square, and an additive mask. Each
row of queries is part of one piece, so nothing is merged and no result is rounded twice.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_flash_two.kernels.hidden import band_hides
from hf_flash_two.kernels.params import AttentionParams
from hf_flash_two.masks import FAR
from hf_flash_two.tensor_cache import derive

_FEWEST_ROWS = 128
"""A causal or full piece has on average at least so many rows; shorter ones share masked calls."""
_BLOCKS = (512, 128)
"""Rows of a masked piece."""
KEYS = 512
"""Keys that the op takes at a time."""
_CALL = 2**19
"""What a call costs beside its products, in pairs of queries and keys times head dims."""
_ONE_CALL = 2**24
"""With so little to compute, in the same measure, a batch row is not worth calls of its own."""
_WASTE = 2.0
"""Masked pieces may compute so many times the pairs that tiles of 64 by 64 would."""


class Piece(NamedTuple):
    """One call of the op.

    Attributes:
        batch, rows, keys: what it attends with, and to.
        causal: the square in which the first row sees the first key only.
        masked: some pairs are hidden that ``causal`` does not tell of.
        lag: row r sees keys up to r + lag, in a part of a causal square; else None.
        together: the batch rows need not be alike; else they see the same.
    """

    batch: slice
    rows: slice
    keys: slice
    causal: bool = False
    masked: bool = False
    lag: int | None = None
    together: bool = False


class Plan(NamedTuple):
    """The pieces of a call.

    Attributes:
        blind: bool [B or 1, 1, Tq], the rows that see nothing; None if there are none.
        is_whole: one piece has all rows and keys.
    """

    pieces: tuple[Piece, ...]
    blind: Tensor | None
    is_whole: bool


def plan_of(
    params: AttentionParams,
    batch: int,
    query_length: int,
    key_length: int,
    width: int,
    few: bool = False,
) -> Plan | str:
    """The pieces, or why there are none that pay.

    Args:
        width: query heads times head dim: what a pair of a query and a key costs.
        few: so few queries that all batch rows go in one piece.
    """
    # Nothing here depends on the batch: what others see must not decide how a row is rounded.
    small = key_length <= KEYS and query_length * key_length * width <= _ONE_CALL
    lengths = (query_length, key_length, width, few, small)
    if params.query_start is None and not band_hides(query_length, key_length, params):
        everything = (slice(0, batch), slice(0, query_length), slice(0, key_length))
        return Plan((Piece(*everything, together=few or small),), None, True)
    if params.query_start is None or params.query_stop is None:
        return _plan_of_band(
            batch, params.window_left, params.window_right, params.query_offset, *lengths
        )
    runs = (params.query_start, params.query_stop)

    def build() -> Plan | str:
        first, last = (run.numpy() for run in runs)
        return _plan(first, last, params.query_offset, batch, *lengths)

    return derive(("pieces", batch, params.query_offset, *lengths), build, *runs)


@lru_cache(maxsize=64)
def _plan_of_band(
    batch: int,
    left: int | None,
    right: int | None,
    offset: int,
    query_length: int,
    key_length: int,
    width: int,
    few: bool,
    small: bool,
) -> Plan | str:
    key = np.arange(key_length)[None]
    first = np.full_like(key, -FAR) if right is None else key - right
    last = np.full_like(key, FAR) if left is None else key + left + 1
    return _plan(first, last, offset, batch, query_length, key_length, width, few, small)


def _plan(
    first: np.ndarray,
    last: np.ndarray,
    offset: int,
    batch: int,
    query_length: int,
    key_length: int,
    width: int,
    few: bool,
    small: bool,
) -> Plan | str:
    """Of the half-open runs of positions that see each key, [B or 1, Tk]."""
    starts = np.clip(first - offset, 0, query_length)
    stops = np.clip(last - offset, 0, query_length)
    if few or small:
        return _one_piece(starts, stops, batch, query_length, few)
    pieces: list[Piece] = []
    blind = np.zeros((len(starts), 1, query_length), dtype=bool)
    for rows in _alike(starts, stops):
        start, stop = starts[rows.start], stops[rows.start]
        where = slice(0, batch) if len(starts) == 1 else rows
        blind[rows, 0] = _blind(start, stop, query_length)
        found = _whole_runs(start, stop, query_length)
        if found is None:
            found = _masked_blocks(start, stop, query_length, width)
        if found is None:
            return "its mask has holes, which tiles skip and PyTorch's fused op does not"
        pieces += [Piece(where, *part) for part in found]
    everything = (slice(0, batch), slice(0, query_length), slice(0, starts.shape[1]))
    whole = len(pieces) == 1 and pieces[0][:3] == everything
    return Plan(tuple(pieces), torch.from_numpy(blind) if blind.any() else None, whole)


def share_no_key(pieces: tuple[Piece, ...]) -> bool:
    """Whether no key of a batch row is in two pieces: gradients are then no sums."""
    ordered = sorted(pieces, key=lambda piece: (piece.batch.start, piece.keys.start))
    return all(
        a.batch.start != b.batch.start or a.keys.stop <= b.keys.start
        for a, b in zip(ordered, ordered[1:], strict=False)
    )


def _one_piece(
    starts: np.ndarray, stops: np.ndarray, batch: int, query_length: int, few: bool
) -> Plan:
    """One piece of all rows, with the keys that any of them sees, in whole blocks of the op.

    Where a block begins decides how sums are rounded: not what others of the batch see.
    """
    blind = np.stack([_blind(*run, query_length) for run in zip(starts, stops, strict=True)])
    not_seeing = torch.from_numpy(blind[:, None]) if blind.any() else None
    key_length = starts.shape[1]
    everything = (slice(0, batch), slice(0, query_length))
    keys = np.flatnonzero((starts < stops).any(0))
    if not len(keys):
        return Plan((), not_seeing, False)
    # Few rows are those of several heads, one after the other, and no square.
    if not few and query_length == key_length and (stops == query_length).all():
        if (starts == np.arange(key_length)).all():
            square = Piece(*everything, slice(0, key_length), causal=True, together=True)
            return Plan((square,), None, True)
    stop = -(-(int(keys[-1]) + 1) // KEYS) * KEYS
    seen = slice(int(keys[0]) // KEYS * KEYS, min(stop, key_length))
    masked = bool((starts[:, seen] > 0).any() or (stops[:, seen] < query_length).any())
    piece = Piece(*everything, seen, masked=masked, together=True)
    return Plan((piece,), not_seeing, seen == slice(0, key_length))


def _alike(starts: np.ndarray, stops: np.ndarray) -> list[slice]:
    """Neighbouring batch rows that see the same."""
    same = ((starts[1:] == starts[:-1]) & (stops[1:] == stops[:-1])).all(1)
    edges = [0, *(np.flatnonzero(~same) + 1).tolist(), len(starts)]
    return [slice(low, high) for low, high in zip(edges[:-1], edges[1:], strict=True)]


def _blind(start: np.ndarray, stop: np.ndarray, query_length: int) -> np.ndarray:
    """bool [Tq], the rows that see no key."""
    seen = start < stop
    changes = np.bincount(start[seen], minlength=query_length + 1)
    changes = changes - np.bincount(stop[seen], minlength=query_length + 1)
    return changes[:query_length].cumsum() == 0


def _whole_runs(start: np.ndarray, stop: np.ndarray, query_length: int) -> list[tuple] | None:
    """(rows, keys, causal) of causal and full pieces; None if rows need two, or they are short."""
    keys = np.flatnonzero(start < stop)
    if not len(keys):
        return []
    start, stop = start[keys], stop[keys]
    step = np.diff(start)
    new = (np.diff(keys) != 1) | (np.diff(stop) != 0) | (step < 0) | (step > 1)
    edges = np.concatenate([[0], np.flatnonzero(new) + 1, [len(keys)]])
    parts = []
    if (len(edges) - 1) * _FEWEST_ROWS > max(query_length, _FEWEST_ROWS):
        return None
    for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        begin, end, count = int(start[low]), int(stop[low]), high - low
        seen = slice(int(keys[low]), int(keys[low]) + count)
        steps = step[low : high - 1]
        if not steps.any():
            parts.append((slice(begin, end), seen, False))
        elif steps.all():
            parts.append((slice(begin, begin + count), seen, True))
            if begin + count < end:
                parts.append((slice(begin + count, end), seen, False))
        else:
            return None
    parts.sort(key=lambda part: part[0].start)
    apart = all(a[0].stop <= b[0].start for a, b in zip(parts, parts[1:], strict=False))
    return parts if apart else None


def _masked_blocks(
    start: np.ndarray, stop: np.ndarray, query_length: int, width: int
) -> list[tuple] | None:
    """(rows, keys, causal, masked) of blocks of rows, each with the keys from first to last."""
    best, least, computed = None, np.inf, 0
    for block in _BLOCKS:
        parts, pairs = [], 0
        for low in range(0, query_length, block):
            high = min(low + block, query_length)
            keys = np.flatnonzero((start < high) & (stop > low))
            if not len(keys):
                continue
            seen = slice(int(keys[0]), int(keys[-1]) + 1)
            masked = bool((start[seen] > low).any() or (stop[seen] < high).any())
            parts.append((slice(low, high), seen, False, masked))
            pairs += (high - low) * (seen.stop - seen.start)
        cost = pairs * width + len(parts) * _CALL
        if cost < least:
            best, least, computed = parts, cost, pairs
    return best if computed <= _WASTE * _tiled(start, stop, query_length) else None


def _tiled(start: np.ndarray, stop: np.ndarray, query_length: int) -> int:
    """Pairs in the tiles of 64 by 64 that hold anything visible."""
    count = -(-len(start) // 64) * 64 - len(start)
    seen = start < stop
    start = np.pad(np.where(seen, start, query_length), (0, count), constant_values=query_length)
    stop = np.pad(np.where(seen, stop, 0), (0, count))
    low, high = start.reshape(-1, 64).min(1) // 64, -(-stop.reshape(-1, 64).max(1) // 64)
    return int((high - low).clip(0).sum()) * 64 * 64
