"""What queries look at, summed up tile by tile from the log-sum-exp of their scores.

Nothing here holds a tensor of queries by keys, but `dense`, whose result is one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hf_flash_two.kernels.blockwise import probabilities
from hf_flash_two.kernels.blockwise.head_blocks import HeadBlock, head_blocks
from hf_flash_two.kernels.blockwise.tiles import KeyTile, QueryTile
from hf_flash_two.kernels.params import AttentionParams, empty_lse

_Tiles = Iterator[tuple[KeyTile, Tensor]]
"""Keys, and weights [batch rows, heads, rows, cols]."""


def dense(query: Tensor, key: Tensor, lse: Tensor, params: AttentionParams) -> Tensor:
    """All weights, [B, Hq, Tq, Tk]."""
    out = lse.new_zeros(*query.shape[:3], key.shape[2])
    for block, rows, tiles in _walk(query, key, lse, params):
        for keys, p in tiles:
            out[block.index][:, :, rows, keys.cols] = p
    return out


def received(query: Tensor, key: Tensor, lse: Tensor, params: AttentionParams) -> Tensor:
    """The sum over the queries, [B, Hq, Tk]."""
    out = lse.new_zeros(*query.shape[:2], key.shape[2])
    for block, _, tiles in _walk(query, key, lse, params):
        for keys, p in tiles:
            out[block.index][:, :, keys.cols] += p.sum(2)
    return out


def entropy(query: Tensor, key: Tensor, lse: Tensor, params: AttentionParams) -> Tensor:
    """-sum p log p of each query, [B, Hq, Tq], in nats."""
    out = empty_lse(query)
    for block, rows, tiles in _walk(query, key, lse, params):
        part = out[block.index][:, :, rows].zero_()
        for _, p in tiles:
            part += torch.special.entr(p).sum(-1)
    return out


def top_keys(
    query: Tensor, key: Tensor, lse: Tensor, params: AttentionParams, count: int
) -> tuple[Tensor, Tensor]:
    """The largest weights of each query and their keys, [B, Hq, Tq, count].

    Where fewer keys have a weight, the others are 0, of key -1.
    """
    weights = lse.new_empty(*query.shape[:3], count)
    indices = weights.new_empty(weights.shape, dtype=torch.int64)
    for block, rows, tiles in _walk(query, key, lse, params):
        best = weights[block.index][:, :, rows].zero_()
        at = indices[block.index][:, :, rows].fill_(-1)
        for keys, p in tiles:
            largest, where = p.topk(min(count, keys.width), -1)
            both = torch.cat([best, largest], -1)
            places = torch.cat([at, where + keys.cols.start], -1)
            largest, where = both.topk(count, -1)
            best.copy_(largest)
            at.copy_(places.gather(-1, where))
        at.masked_fill_(best == 0, -1)
    return weights, indices


def _walk(
    query: Tensor, key: Tensor, lse: Tensor, params: AttentionParams
) -> Iterator[tuple[HeadBlock, slice, _Tiles]]:
    """(heads, rows of queries, their tiles)"""
    with torch.autocast(query.device.type, enabled=False):
        # Values take no part.
        for block in head_blocks(query, key, key[..., :1], params, guarded=False):
            for tile in block.query_tiles:
                yield block, tile.rows, _tiles(block, tile, lse)


def _tiles(block: HeadBlock, tile: QueryTile, lse: Tensor) -> _Tiles:
    row_lse = block.group(lse[block.index][:, :, tile.rows, None])
    for keys, p, _, _ in probabilities(block, tile, row_lse):
        yield keys, block.by_head(p).flatten(1, 2)
