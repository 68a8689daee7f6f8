"""Which keys each tile of queries meets, read off the mask."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor

from hf_flash_two.kernels.params import AttentionParams
from hf_flash_two.masks import FAR, KEY_GROUP
from hf_flash_two.tensor_cache import derive


@dataclass(frozen=True, slots=True)
class KeyTile:
    """Neighbouring keys that a tile of queries meets at once.

    Attributes:
        cols: their indices; they are stored in ``block`` at ``inside``.
        masked: the runs of them, counted from the first, in which some pairs are hidden.
    """

    cols: slice
    block: int
    inside: slice
    masked: tuple[slice, ...]

    @classmethod
    def of(cls, start: int, stop: int, block_k: int, masked: bool) -> KeyTile:
        block, offset = divmod(start, block_k)
        width = stop - start
        return cls(
            slice(start, stop),
            block,
            slice(offset, offset + width),
            (slice(0, width),) if masked else (),
        )

    def __add__(self, other: KeyTile) -> KeyTile:
        """Both of two neighbours in the same block."""
        moved = (slice(run.start + self.width, run.stop + self.width) for run in other.masked)
        return KeyTile(
            slice(self.cols.start, other.cols.stop),
            self.block,
            slice(self.inside.start, other.inside.stop),
            (*self.masked, *moved),
        )

    @property
    def width(self) -> int:
        return self.cols.stop - self.cols.start


@dataclass(frozen=True, slots=True)
class QueryTile:
    """``rows`` of queries and all keys they meet; ``probe`` is a few keys that all of them see."""

    rows: slice
    key_tiles: list[KeyTile]
    probe: KeyTile | None


@dataclass(frozen=True)
class TileMap:
    """What each tile of queries by ``KEY_GROUP`` keys holds, for every batch row of the mask.

    Attributes:
        nonempty: bool [B or 1, query tiles, key tiles] on the CPU; False: no pair is visible.
        full: bool, same shape; True: every pair is visible, so no masking is needed.
    """

    nonempty: Tensor
    full: Tensor


def bound_tiles(
    bounds: Tensor, offset: int, query_length: int, block_q: int, dense: bool
) -> TileMap:
    """The tiles of a mask of intervals, from its `AttentionMask.key_bounds`."""
    # [B, 1, key tiles]
    min_start, max_start, min_stop, max_stop = bounds.cpu()[:, None].unbind(-1)
    start = torch.arange(0, query_length, block_q)[None, :, None] + offset
    stop = (start + block_q).clamp(max=query_length + offset)
    nonempty = (min_start < stop) & (max_stop > start)
    full = nonempty & (max_start <= start) & (min_stop >= stop)
    return TileMap(nonempty, full & (not dense))


@lru_cache(maxsize=256)
def band_tiles(
    window_left: int | None,
    window_right: int | None,
    offset: int,
    query_length: int,
    key_length: int,
    block_q: int,
    dense: bool,
) -> TileMap:
    """The tiles of a band, computed once per shape."""
    starts = torch.arange(0, key_length, KEY_GROUP)
    stops = (starts + KEY_GROUP).clamp(max=key_length)
    far = torch.full_like(starts, FAR)
    start = (
        (-far, -far) if window_right is None else (starts - window_right, stops - 1 - window_right)
    )
    stop = (far, far) if window_left is None else (starts + window_left + 1, stops + window_left)
    bounds = torch.stack([*start, *stop], dim=-1)[None]
    return bound_tiles(bounds, offset, query_length, block_q, dense)


def query_tiles(
    params: AttentionParams,
    query_length: int,
    key_length: int,
    block_q: int,
    block_k: int,
    rows: int,
) -> list[list[QueryTile]]:
    """All tiles of queries for every ``rows`` batch rows, or once where the mask is one for all."""
    bounds = params.key_bounds
    settings = (params.query_offset, query_length, key_length, block_q, block_k)
    dense = params.dense is not None
    whole = params.batch_invariant
    if bounds is None:
        return _tiles_of_band(params.window_left, params.window_right, *settings, dense, whole)

    def build() -> list[list[QueryTile]]:
        tile_map = bound_tiles(bounds, params.query_offset, query_length, block_q, dense)
        if rows > 1:
            nonempty = torch.stack([part.any(0) for part in tile_map.nonempty.split(rows)])
            full = torch.stack([part.all(0) for part in tile_map.full.split(rows)])
            tile_map = TileMap(nonempty, full)
        return _tiles_of_map(tile_map, query_length, key_length, block_q, block_k, whole)

    return derive(("query tiles", *settings, dense, rows, whole), build, bounds)


@lru_cache(maxsize=32)
def _tiles_of_band(
    window_left: int | None,
    window_right: int | None,
    query_offset: int,
    query_length: int,
    key_length: int,
    block_q: int,
    block_k: int,
    dense: bool,
    whole: bool,
) -> list[list[QueryTile]]:
    tile_map = band_tiles(
        window_left, window_right, query_offset, query_length, key_length, block_q, dense,
    )  # fmt: skip
    return _tiles_of_map(tile_map, query_length, key_length, block_q, block_k, whole)


def _tiles_of_map(
    tile_map: TileMap,
    query_length: int,
    key_length: int,
    block_q: int,
    block_k: int,
    whole: bool,
) -> list[list[QueryTile]]:
    """
    Args:
        whole: each tile holds ``block_k`` keys, of which there is a multiple.
    """
    found = []
    kinds_of_all = tile_map.nonempty.int() + tile_map.full.int()
    if whole:
        kinds = kinds_of_all.unflatten(2, (-1, block_k // KEY_GROUP))
        kinds = torch.where(kinds.amin(3) == 2, 2, kinds.amax(3).clamp(max=1))
        kinds_of_all = kinds.repeat_interleave(block_k // KEY_GROUP, dim=2)
    for row in kinds_of_all.tolist():
        tiles = []
        for start, kinds in zip(range(0, query_length, block_q), row, strict=True):
            rows = slice(start, min(start + block_q, query_length))
            tiles.append(QueryTile(rows, *_key_tiles(kinds, key_length, block_k)))
        found.append(tiles)
    return found


def _key_tiles(
    kinds: list[int], key_length: int, block_k: int
) -> tuple[list[KeyTile], KeyTile | None]:
    """
    Args:
        kinds: for every KEY_GROUP keys whether they are hidden, masked or visible: 0, 1, 2.

    Returns:
        The tiles that a tile of queries meets, and a few keys that all its queries see.
    """
    found: list[KeyTile] = []
    probe, at = None, 0
    for kind, run in groupby(kinds):
        start, at = at * KEY_GROUP, at + len(list(run))
        stop = min(at * KEY_GROUP, key_length)
        while kind and start < stop:
            end = min(stop, (start // block_k + 1) * block_k)
            tile = KeyTile.of(start, end, block_k, masked=kind == 1)
            if kind == 2 and probe is None:
                probe = KeyTile.of(start, min(end, start + KEY_GROUP), block_k, masked=False)
            if found and found[-1].cols.stop == start and start % block_k:
                found[-1] = found[-1] + tile
            else:
                found.append(tile)
            start = end
    return found, probe
