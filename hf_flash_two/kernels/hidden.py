"""What the mask of a call hides: whether it hides anything, and which pairs of a tile."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from hf_flash_two.kernels.params import AttentionParams


def hides(query: Tensor, key: Tensor, params: AttentionParams) -> bool:
    """Whether the mask may hide pairs of these queries and keys."""
    if params.query_start is not None or params.dense is not None:
        return True
    return band_hides(query.shape[2], key.shape[2], params)


def band_hides(query_length: int, key_length: int, params: AttentionParams) -> bool:
    """Whether the band of a call cuts off any pair."""
    return any(band_ends(query_length, key_length, params))


def band_ends(query_length: int, key_length: int, params: AttentionParams) -> tuple[bool, bool]:
    """Whether the band cuts off any key behind a query, and any ahead."""
    first, last = params.query_offset, params.query_offset + query_length - 1
    left, right = params.window_left, params.window_right
    ahead = right is not None and first + right < key_length - 1
    return left is not None and last > left, ahead


class HiddenPairs:
    """The pairs that a band or intervals hide, tile by tile; a dense mask is not included."""

    def __init__(self, params: AttentionParams, device: torch.device) -> None:
        self._params, self._device = params, device
        self._bands: dict[tuple[int, int, int], Tensor | None] = {}

    def __call__(self, batch: slice, rows: slice, keys: slice) -> Tensor | None:
        """bool [batch rows or 1, rows, keys]; None if there is neither band nor intervals."""
        if self._params.query_start is not None:
            return self._find(batch, rows, keys)
        # A band hides the same of every tile at the same distance from it.
        at = (rows.start - keys.start, rows.stop - rows.start, keys.stop - keys.start)
        if at not in self._bands:
            self._bands[at] = self._find(batch, rows, keys)
        return self._bands[at]

    def _find(self, batch: slice, rows: slice, keys: slice) -> Tensor | None:
        params, parts = self._params, []
        position = torch.arange(rows.start, rows.stop, device=self._device)[:, None]
        position = position + params.query_offset
        key = torch.arange(keys.start, keys.stop, device=self._device)
        if params.window_left is not None:
            parts.append((position - key > params.window_left)[None])
        if params.window_right is not None:
            parts.append((key - position > params.window_right)[None])
        if params.query_start is not None and params.query_stop is not None:
            batch = batch if params.query_start.shape[0] > 1 else slice(0, 1)
            start, stop = (x[batch, None, keys] for x in (params.query_start, params.query_stop))
            parts += [start > position, position >= stop]
        return reduce(torch.logical_or, parts) if parts else None
