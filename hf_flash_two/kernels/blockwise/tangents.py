"""Derivatives of the forward and of the backward along a direction, tile by tile.

With scores S, weights P = exp(S - lse) and tangents dotted::

    lse' = sum_k P S'                     out' = sum_k P (S' - lse') V + P V'
    dS'  = dS (S' - lse') + P (dP' - delta'),   dP' = dO V'^T,   delta' = sum dO out'

and the gradients of query, key, value, bias and sinks follow from dS and dS' by the product rule.
Gradients are the gradient of one number, whose second derivatives are symmetric. So the same two
functions are what forward mode needs and what the backward of the backward needs. Memory is linear
in the sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hf_flash_two.kernels.blockwise import add_to_bias, bias_sums, is_finite, probabilities, where
from hf_flash_two.kernels.blockwise.head_blocks import HeadBlock, head_blocks
from hf_flash_two.kernels.blockwise.tiles import KeyTile, QueryTile
from hf_flash_two.kernels.hidden import hides
from hf_flash_two.kernels.params import AttentionParams, empty_lse, empty_output


class Tangents(NamedTuple):
    """The direction: a tensor of the shape of each input; None is zero, or no such input."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    sinks: Tensor | None


def forward_jvp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    tangents: Tangents,
    params: AttentionParams,
) -> tuple[Tensor, Tensor]:
    """How out and lse change along ``tangents``; laid out as they are."""
    return _guarded(_forward_jvp, query, key, value, out, lse, tangents, params)


def backward_jvp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    tangents: Tangents,
    params: AttentionParams,
    d_out: Tensor,
    d_lse: Tensor | None,
    out_dot: Tensor,
    lse_dot: Tensor,
    need_d_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """How the gradients change along ``tangents``, with ``d_out`` and ``d_lse`` as they are.

    Args:
        out_dot, lse_dot: what `forward_jvp` gives.
        need_d_bias: whether the change of the bias's gradient is wanted.

    Returns:
        Those of query, key, value, bias and sinks.
    """
    more = (d_out, d_lse, out_dot, lse_dot, need_d_bias)
    return _guarded(_backward_jvp, query, key, value, out, lse, tangents, params, *more)


def _guarded(
    compute: Callable,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    tangents: Tangents,
    params: AttentionParams,
    *more,
):
    """``compute``, and once more, guarded, if what is hidden has reached a result."""
    given = (query, key, value, out, lse, tangents, params, *more)
    results = compute(*given, guarded=False)
    if hides(query, key, params) and not is_finite(*results):
        return compute(*given, guarded=True)
    return results


def _forward_jvp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    tangents: Tangents,
    params: AttentionParams,
    guarded: bool,
) -> tuple[Tensor, Tensor]:
    out_dot, lse_dot = empty_output(query, value.shape[3]), empty_lse(query)
    with torch.autocast(query.device.type, enabled=False):
        for block in head_blocks(query, key, value, params, guarded):
            moving = _Moving(block, tangents)
            for tile in block.query_tiles:
                rows = moving.rows(out, tile), moving.rows(lse[..., None], tile)
                tile_out, tile_lse = _forward_tile(moving, tile, *rows)
                out_dot[block.index][:, :, tile.rows] = block.ungroup(tile_out)
                lse_dot[block.index][:, :, tile.rows] = block.ungroup(tile_lse)[..., 0]
    return out_dot, lse_dot


def _forward_tile(
    moving: _Moving, tile: QueryTile, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """The tangents of ``out`` and ``lse``, of one tile of queries, as they are."""
    block = moving.block
    lse_dot, acc = torch.zeros_like(lse), torch.zeros_like(out)
    for keys, seen, p, s_dot, _, _ in moving.tiles(tile, lse):
        p_dot = s_dot.mul_(p)
        lse_dot += p_dot.sum(-1, keepdim=True)
        if block.params.dropout_p:
            dropped = block.dropped(tile.rows, keys.cols)
            p, p_dot = (x.masked_fill_(dropped, 0) for x in (p, p_dot))
        block.add_product(acc, p_dot, block.value(keys), seen)
        block.add_product(acc, p, moving.value(keys), seen)
    if (sink := moving.sink(tile, lse)) is not None:
        weight, tangent = sink
        lse_dot += weight * tangent
    return acc.div_(1 - block.params.dropout_p).sub_(lse_dot * out), lse_dot


def _backward_jvp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    tangents: Tangents,
    params: AttentionParams,
    d_out: Tensor,
    d_lse: Tensor | None,
    out_dot: Tensor,
    lse_dot: Tensor,
    need_d_bias: bool,
    guarded: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    dq, dk, dv = (empty_output(x, x.shape[3]) for x in (query, key, value))
    d_bias = bias_sums(params.bias, query, key) if need_d_bias else None
    d_sinks = None if params.sinks is None else torch.zeros_like(params.sinks)
    with torch.autocast(query.device.type, enabled=False):
        for block in head_blocks(query, key, value, params, guarded, gradients=True):
            moving = _Moving(block, tangents)
            sums = block.accumulators(dk), block.accumulators(dv)
            for tile in block.query_tiles:
                row_d_out, row_lse = moving.rows(d_out, tile), moving.rows(lse[..., None], tile)
                delta, delta_dot = (
                    # A gradient of rows that see nothing may be NaN.
                    (row_d_out * row).masked_fill_(row == 0, 0).sum(-1, keepdim=True)
                    for row in (moving.rows(out, tile), moving.rows(out_dot, tile))
                )
                if d_lse is not None:
                    delta -= moving.rows(d_lse[..., None], tile)
                row_lse_dot = moving.rows(lse_dot[..., None], tile)
                if d_sinks is not None and (sink := moving.sink(tile, row_lse)) is not None:
                    weight, tangent = sink
                    share = weight * ((tangent - row_lse_dot) * delta + delta_dot)
                    share = block.ungroup(share).sum((2, 3))
                    block_sinks = d_sinks[block.index_of(d_sinks)]
                    block_sinks -= share.sum_to_size(block_sinks.shape)
                rows = row_d_out, row_lse, row_lse_dot, delta, delta_dot
                block_dq = _backward_tile(moving, tile, *rows, *sums, d_bias)
                dq[block.index][:, :, tile.rows] = block.ungroup(block_dq)
            block.store(dk, sums[0], params.scale)
            block.store(dv, sums[1], 1 / (1 - params.dropout_p))
    if params.bias is not None and d_bias is not None:
        d_bias = d_bias.to(params.bias.dtype)
    return dq, dk, dv, d_bias, d_sinks


def _backward_tile(
    moving: _Moving,
    tile: QueryTile,
    d_out: Tensor,
    lse: Tensor,
    lse_dot: Tensor,
    delta: Tensor,
    delta_dot: Tensor,
    dk_blocks: list[Tensor],
    dv_blocks: list[Tensor],
    d_bias: Tensor | None,
) -> Tensor:
    """The tangent of dQ, of one tile of queries; adds its share to those of dK, dV and d_bias."""
    block, rows, rate = moving.block, tile.rows, 1 / (1 - moving.block.params.dropout_p)
    query, query_dot = block.query(rows), moving.query(tile)
    dq = torch.zeros(query.shape, dtype=block.dtype, device=query.device)
    for keys, seen, p, s_dot, slope, slope_dot in moving.tiles(tile, lse):
        dp = block.product("dp", d_out, block.value(keys), None, rate, False)
        dp_dot = block.product("dp_dot", d_out, moving.value(keys), None, rate, False)
        p_dot = s_dot.sub_(lse_dot).mul_(p)
        dropped = block.dropped(rows, keys.cols) if block.params.dropout_p else None
        if dropped is not None:
            dp, dp_dot = (x.masked_fill_(dropped, 0) for x in (dp, dp_dot))
        dp = dp.sub_(delta)
        ds_dot = where(seen, dp_dot.sub_(delta_dot).mul_(p).addcmul_(dp, p_dot))
        ds = where(seen, dp.mul_(p))
        if d_bias is not None:
            add_to_bias(block, d_bias, rows, keys, ds_dot)
        if slope is not None and slope_dot is not None:
            ds_dot = where(seen, ds_dot.mul_(slope).addcmul_(ds, slope_dot))
            ds = where(seen, ds.mul_(slope))
        if dropped is not None:
            p_dot.masked_fill_(dropped, 0)
        by_key = None if seen is None else seen.mT
        d_key, d_value = (x[keys.block][:, keys.inside] for x in (dk_blocks, dv_blocks))
        block.add_product(d_value, p_dot.mT, d_out, by_key)
        block.add_product(d_key, ds_dot.mT, query, by_key)
        block.add_product(d_key, ds.mT, query_dot, by_key)
        block.add_product(dq, ds_dot, block.key(keys), seen)
        block.add_product(dq, ds, moving.key(keys), seen)
    return dq.mul_(block.params.scale)


class _Tile(NamedTuple):
    """[heads, group * rows, cols] of one tile of queries and keys, in memory that is used again.

    Attributes:
        seen: where queries see keys; None unless the call is guarded.
        p: weights, before dropout.
        s_dot: the tangent of the scores.
        slope, slope_dot: of softcap; None without.
    """

    keys: KeyTile
    seen: Tensor | None
    p: Tensor
    s_dot: Tensor
    slope: Tensor | None
    slope_dot: Tensor | None


class _Moving:
    """A head block whose inputs have tangents."""

    def __init__(self, block: HeadBlock, tangents: Tangents):
        self.block, self._tangents = block, tangents
        self._keys, self._values = map(block.blocks_of, (tangents.key, tangents.value))

    def rows(self, x: Tensor, tile: QueryTile) -> Tensor:
        """[B, Hq, Tq, D] -> [heads, group * rows, D]"""
        return self.block.group(x[self.block.index][:, :, tile.rows].to(self.block.dtype))

    def query(self, tile: QueryTile) -> Tensor:
        return self.rows(self._tangents.query, tile)

    def key(self, tile: KeyTile) -> Tensor:
        return self._keys[tile.block][:, tile.inside]

    def value(self, tile: KeyTile) -> Tensor:
        return self._values[tile.block][:, tile.inside]

    def sink(self, tile: QueryTile, lse: Tensor) -> tuple[Tensor, Tensor | float] | None:
        """The weight of each row's sink and the sink's tangent; None without sinks."""
        block, sinks, tangent = self.block, self.block.params.sinks, self._tangents.sinks
        if sinks is None:
            return None
        weight = torch.exp(block.per_row(sinks, tile.rows) - lse).nan_to_num_(0.0)
        return weight, 0.0 if tangent is None else block.per_row(tangent, tile.rows)

    def tiles(self, tile: QueryTile, lse: Tensor) -> Iterator[_Tile]:
        block, params, rows = self.block, self.block.params, tile.rows
        query, query_dot = block.query(rows), self.query(tile)
        for keys, p, seen, capped in probabilities(block, tile, lse, keep_capped=True):
            s_dot = block.product("s_dot", query_dot, block.key(keys), None, params.scale, False)
            s_dot = s_dot.baddbmm_(query, self.key(keys).mT, alpha=params.scale)
            slope = slope_dot = None
            if capped is not None:
                slope = 1 - capped.square()
                s_dot = s_dot.mul_(slope)
                slope_dot = capped.mul_(s_dot).mul_(-2 / params.softcap)
            if self._tangents.bias is not None:
                by_head = block.by_head(s_dot)
                by_head += block.part(self._tangents.bias, rows, keys.cols)
            yield _Tile(keys, seen, p, where(seen, s_dot), slope, slope_dot)
