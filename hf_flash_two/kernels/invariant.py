"""Batch-invariant calls: every document starts where a tile starts, whatever stands beside it.

A document's bits depend on nothing else if its keys and, in the backward, its queries fall into the
same tiles in every call, and a kernel computes all tiles alike. So where documents do not start
with a tile, rows are moved apart before a kernel runs and back after it. Nobody sees what fills the
gaps.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from hf_flash_two.documents import TILE, shifts
from hf_flash_two.kernels.blockwise.head_blocks import INVARIANT_KEYS, invariant_queries
from hf_flash_two.kernels.params import AttentionParams, output_layout
from hf_flash_two.masks import FAR, AttentionMask
from hf_flash_two.tensor_cache import derive

assert TILE % INVARIANT_KEYS == 0


class Rows(NamedTuple):
    """How the rows of one axis are moved.

    Attributes:
        there: int64 [B or 1, T'], the old row for each new one; the one before it in a gap.
        back: int64 [B or 1, T], the new row for each old one.
        gaps: bool [B or 1, T'].
    """

    there: Tensor
    back: Tensor
    gaps: Tensor


class Layout(NamedTuple):
    """What a call becomes; of an axis that stays as it is, the rows are None."""

    query_start: Tensor
    query_stop: Tensor
    key_bounds: Tensor | None
    query_offset: int
    queries: Rows | None
    keys: Rows | None


def forward(
    kernel: Any, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
) -> tuple[Tensor, ...]:
    """What ``kernel`` computes of a batch-invariant call, as its own ``forward`` returns it."""
    layout = _layout(kernel.name, query, key, params, moves_queries=params.alibi_slopes is not None)
    queries, keys = (None, None) if layout is None else (layout.queries, layout.keys)
    if layout is not None:
        params = _moved_params(params, layout, query.shape[0])
    new_query, new_key, new_value = _wide(kernel.name, query, key, value)
    new_query = _move(new_query, queries)
    new_key, new_value = _move(new_key, keys), _move(new_value, keys)
    out, lse, *max_logits = kernel.forward(new_query, new_key, new_value, params)
    out = _cut(_move_back(out, queries), query, value.shape[3])
    return out, _move_back(lse, queries).contiguous(), *max_logits


def backward(
    kernel: Any,
    d_out: Tensor,
    d_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    params: AttentionParams,
    need_d_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """What ``kernel`` computes of a batch-invariant call, as its own ``backward`` returns it."""
    layout = _layout(kernel.name, query, key, params, moves_queries=True)
    queries, keys = (None, None) if layout is None else (layout.queries, layout.keys)
    bias = params.bias
    if layout is not None:
        params = _moved_params(params, layout, query.shape[0])
    of_queries = _wide(kernel.name, d_out, query, out)
    of_keys = _wide(kernel.name, key, value)
    new_d_out, new_query, new_out = (_move(x, queries) for x in of_queries)
    new_key, new_value = (_move(x, keys) for x in of_keys)
    new_d_lse = None if d_lse is None else _move(d_lse, queries)
    if queries is not None:
        # What fills a gap has sinks too.
        gaps = queries.gaps[:, None]
        new_d_out = new_d_out.masked_fill(gaps[..., None], 0)
        new_d_lse = None if new_d_lse is None else new_d_lse.masked_fill(gaps, 0)
    dq, dk, dv, d_bias, d_sinks = kernel.backward(
        new_d_out, new_d_lse, new_query, new_key, new_value, new_out, _move(lse, queries),
        params, need_d_bias,
    )  # fmt: skip
    dq = _cut(_move_back(dq, queries), query, query.shape[3])
    dk, dv = (_cut(_move_back(grad, keys), x, x.shape[3]) for x, grad in ((key, dk), (value, dv)))
    if bias is not None and d_bias is not None:
        if bias.shape[2] > 1:
            d_bias = _move_back(d_bias, queries)
        if bias.shape[3] > 1:
            d_bias = _move_back(d_bias.mT, keys).mT
        d_bias = d_bias.sum_to_size(bias.shape).contiguous()
    return dq, dk, dv, d_bias, d_sinks


def _cut(x: Tensor, like: Tensor, head_dim: int) -> Tensor:
    """``x`` without what `_wide` added, and in memory as `output_layout` says."""
    x = x[..., :head_dim]
    shape, strides = output_layout(like, head_dim)
    return x if x.stride() == strides else like.new_empty_strided(shape, strides).copy_(x)


def _wide(kernel: str, *tensors: Tensor) -> list[Tensor]:
    """``tensors``, for products on CPUs with head dims of whole vectors.

    With others a row's bits depend on its place in the tile, and on the number of products.
    """
    if kernel != "blockwise":
        return list(tensors)
    return [x if x.shape[3] % 16 == 0 else pad(x, (0, -x.shape[3] % 16)) for x in tensors]


def _move(x: Tensor, rows: Rows | None) -> Tensor:
    """Rows of [B, H, T, ...] in their new places."""
    return x if rows is None else _take(x, rows.there)


def _move_back(x: Tensor, rows: Rows | None) -> Tensor:
    return x if rows is None else _take(x, rows.back)


def _take(x: Tensor, at: Tensor) -> Tensor:
    if at.shape[0] == 1:
        return x.index_select(2, at[0])
    batch = torch.arange(at.shape[0], device=at.device)[:, None]
    return x.transpose(1, 2)[batch, at].transpose(1, 2)


def _moved_params(params: AttentionParams, layout: Layout, batch: int) -> AttentionParams:
    bias = params.bias
    if bias is not None:
        by_row = layout.query_start.shape[0] > 1 and max(bias.shape[2:]) > 1
        bias = bias.expand(batch, -1, -1, -1) if by_row else bias
        bias = _move(bias, layout.queries) if bias.shape[2] > 1 else bias
        bias = _move(bias.mT, layout.keys).mT if bias.shape[3] > 1 else bias
    return params._replace(
        query_start=layout.query_start,
        query_stop=layout.query_stop,
        key_bounds=layout.key_bounds,
        query_offset=layout.query_offset,
        window_left=None,
        window_right=None,
        bias=bias,
    )


def _layout(
    kernel: str, query: Tensor, key: Tensor, params: AttentionParams, *, moves_queries: bool
) -> Layout | None:
    """How the rows of a call are to be moved; None if all stay where they are.

    Args:
        moves_queries: their places matter too.
    """
    start, stop = params.query_start, params.query_stop
    # On CPUs products must be of one shape.
    block_q, block_k = 1, 1
    if kernel == "blockwise":
        block_q, block_k = invariant_queries(query.shape[1] // key.shape[1]), INVARIANT_KEYS
    settings = (
        params.query_offset, query.shape[2], key.shape[2], moves_queries, block_q, block_k
    )  # fmt: skip
    if start is None or stop is None:
        return _layout_of_band(params.window_left, params.window_right, query.device, *settings)
    return derive(("layout", *settings), lambda: _arrange(start, stop, *settings), start, stop)


@lru_cache(maxsize=32)
def _layout_of_band(
    left: int | None,
    right: int | None,
    device: torch.device,
    offset: int,
    queries: int,
    keys: int,
    moves_queries: bool,
    block_q: int,
    block_k: int,
) -> Layout | None:
    """A band holds one document, which starts with the first key."""
    if not (moves_queries and offset % TILE or queries % block_q or keys % block_k):
        return None
    with torch.inference_mode(False):
        start, stop = AttentionMask(left, right).to_intervals(keys, device)
        shift = torch.zeros_like(start)
        settings = (offset, queries, keys, moves_queries, block_q, block_k)
        return _arrange_by(shift, start, start, stop, 0, *settings)


def _arrange(start: Tensor, stop: Tensor, offset: int, queries: int, keys: int, *more):
    shift, ahead = shifts(start, stop)
    if shift.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "batch_invariant: where the documents of a mask start is not known while a CUDA graph "
            "is captured; compute a call with the same mask before"
        )
    most = int(shift.amax()) if keys else 0
    moves_queries, block_q, block_k = more
    moved = most or moves_queries and offset % TILE
    if not (moved or queries % block_q or keys % block_k):
        return None
    return _arrange_by(shift, ahead, start, stop, most, offset, queries, keys, *more)


def _arrange_by(
    shift: Tensor,
    ahead: Tensor,
    start: Tensor,
    stop: Tensor,
    most: int,
    offset: int,
    queries: int,
    keys: int,
    moves_queries: bool,
    block_q: int,
    block_k: int,
) -> Layout:
    device = start.device
    # Rows that fill gaps see nothing.
    start, stop = start.clamp(min=offset), stop.clamp(max=offset + queries)
    of_queries = None
    position = torch.arange(queries, device=device)[None]
    if moves_queries and (most or offset % TILE):
        # Queries move as the keys of their document do.
        position = (position + offset).expand(start.shape[0], -1)
        latest = torch.searchsorted(ahead.contiguous(), position.to(ahead.dtype), right=True) - 1
        place = position - (offset - offset % TILE) + shift.gather(1, latest.clamp(min=0))
        length = offset % TILE + queries + most
        of_queries = _rows(place, -(-length // TILE) * TILE)
        start, stop = (x + shift for x in (start, stop))
        offset -= offset % TILE
    elif queries % block_q:
        of_queries = _rows(position, -(-queries // block_q) * block_q)
    of_keys = None
    if most or keys % block_k:
        place = torch.arange(keys, device=device) + shift
        length = -(-(keys + most) // block_k) * block_k
        of_keys = _rows(place, length)
        start, stop = (
            torch.full((x.shape[0], length), nobody, device=device).scatter_(1, place, x.long())
            for x, nobody in ((start, FAR), (stop, -FAR))
        )
    mask = AttentionMask.from_intervals(start, stop)
    assert mask.query_start is not None and mask.query_stop is not None
    return Layout(mask.query_start, mask.query_stop, mask.key_bounds(), offset, of_queries, of_keys)


def _rows(place: Tensor, length: int) -> Rows:
    """
    Args:
        place: int64 [B or 1, T], new places in rising order.
    """
    index = torch.arange(place.shape[1], device=place.device).expand_as(place)
    gaps = torch.ones(place.shape[0], length, dtype=torch.bool, device=place.device)
    gaps.scatter_(1, place, False)
    there = place.new_zeros(gaps.shape).scatter_(1, place, index).cummax(1).values
    return Rows(there, place, gaps)
