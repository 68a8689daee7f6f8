"""Where the documents of a mask start, and where their keys belong for batch-invariant attention.

A document is a run of keys that hang together: it ends between two keys if all queries that see a
key before stand before all queries that see one after. Keys that nobody sees belong to none.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from hf_flash_two.masks import FAR, AttentionMask

TILE = 128
"""Documents start at multiples of this, which is one of all tiles that they are computed with."""


def shifts(start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
    """How far each key moves if documents start with a tile, and who sees it or a later key first.

    Args:
        start, stop: [B or 1, Tk], ``query_start`` and ``query_stop`` of an `AttentionMask`.

    Returns:
        both [B or 1, Tk]: the first int64, rising; the second positions of queries, rising too.
    """
    reach = stop.cummax(1).values
    ahead = start.flip(1).cummin(1).values.flip(1)
    begins = (start < stop) & (pad(reach[:, :-1], (1, 0), value=-FAR) <= ahead)
    index = torch.arange(start.shape[1], device=start.device)
    latest = torch.where(begins, index, 0).cummax(1).values
    before = pad(latest[:, :-1], (1, 0))
    gaps = torch.where(begins, (before - index) % TILE, 0)
    return gaps.cumsum(1), ahead


def without_dropped(
    mask: AttentionMask, dropped: int, queries: int, keys: int
) -> tuple[AttentionMask, int]:
    """The mask of the keys that a cache still has, and how many more it has in front of them.

    Nobody sees these; they stand for the keys of the first document that share its first tile.

    Args:
        mask: of all keys.
        dropped: how many of them are gone, which no query sees.
    """
    lead = dropped % TILE
    intervals = mask.intervals
    if intervals is None or mask.dense is not None:
        return mask.slice_keys(dropped - lead, keys, queries, keys), lead
    start, stop = intervals
    shift, _ = shifts(start, stop)
    within = (dropped + shift[:, dropped, None]) % TILE
    reach = stop[:, :dropped].amax(1, keepdim=True)
    slot = torch.arange(TILE, device=start.device)
    # Seen by earlier queries only, as the keys that they stand for.
    stands = slot >= TILE - within
    front = torch.where(stands, -FAR, FAR), torch.where(stands, reach, -FAR)
    offset = mask.resolve_offset(queries, keys) - dropped + TILE
    pairs = zip(front, intervals, strict=True)
    start, stop = (torch.cat([a, b[:, dropped:]], 1) - dropped + TILE for a, b in pairs)
    return AttentionMask.from_intervals(start, stop, query_offset=offset), TILE
