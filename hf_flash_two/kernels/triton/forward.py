"""The forward pass of many queries: training and prefill. Few go to `decode`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from hf_flash_two.kernels.params import AttentionParams, Layout, Prepared, output_layout
from hf_flash_two.kernels.triton import decode
from hf_flash_two.kernels.triton.args import (
    Heads,
    Operand,
    Parts,
    PerHead,
    PerPair,
    ScoreTerms,
    Tma,
    broadcast_strides,
    dropout_of,
    intervals_of,
    score_terms,
)
from hf_flash_two.kernels.triton.attend import attend_constants, attend_kernel
from hf_flash_two.kernels.triton.config import (
    Tiles,
    decodes,
    forward_tiles,
    launch_flags,
    tma_run,
    tma_tiles,
)
from hf_flash_two.kernels.triton.launch import Launch, with_plan
from hf_flash_two.kernels.triton.ranges import key_ranges


@dataclass(frozen=True, slots=True)
class _Plan:
    tiles: Tiles
    out: Layout
    terms: Callable[[AttentionParams], ScoreTerms]
    attend: Launch


def forward(
    query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
) -> tuple[Tensor | None, ...]:
    """out [B, Hq, Tq, Dv] in the dtype of ``query``; lse [B, Hq, Tq] and, if they are wanted,
    max_logits [B, Hq] in float32.
    """
    query, key, value = [x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value)]
    if not params.batch_invariant and decodes(query, key, value):
        run = decode.prepare(query, key, value, params, with_lse=True, eager=False)
        return run(query, key, value, params)
    return with_plan(_plan, _attend, params, query, key, value)(query, key, value, params)


def prepare(
    query: Tensor, key: Tensor, value: Tensor, params: AttentionParams, with_lse: bool
) -> Prepared | None:
    """`forward` in eager mode for all calls that differ from this one in tensors' values only.

    None where more decides: what float32 products are made of is PyTorch's to say at any time.

    Args:
        with_lse: otherwise lse may be None.
    """
    if query.dtype == torch.float32 or any(x.stride(3) != 1 for x in (query, key, value)):
        return None
    if not params.batch_invariant and decodes(query, key, value):
        run = decode.prepare(query, key, value, params, with_lse=with_lse, eager=True)
        return Prepared(run)
    return Prepared(with_plan(_plan, _attend, params, query, key, value))


def _attend(
    plan: _Plan, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
) -> tuple[Tensor, ...]:
    out = query.new_empty_strided(*plan.out)
    lse = query.new_empty(plan.out[0][:3], dtype=torch.float32)
    row_max = torch.empty_like(lse) if params.max_logits else None
    ranges = key_ranges(params, plan.tiles, query.shape[2], key.shape[2])
    plan.attend(
        query, key, value, out, lse, row_max, None, key, value,
        params.query_start, params.query_stop, intervals_of(params, ranges), params.dense,
        plan.terms(params), params.sinks, params.seed,
    )  # fmt: skip
    return (out, lse) if row_max is None else (out, lse, row_max.amax(2))


def _plan(params: AttentionParams, query: Tensor, key: Tensor, value: Tensor) -> _Plan:
    batch, heads, query_length, head_dim = query.shape
    key_heads, key_length, value_dim = key.shape[1], key.shape[2], value.shape[3]
    shape = (batch, heads, query_length, key_length)
    tiles = forward_tiles(query, key, value, params)
    out = output_layout(query, value_dim)
    tma_key = tma_value = Tma()
    if head_dim <= tiles.block_d:
        tma_key = tma_tiles(key, params, tiles.block_k, tiles.block_d)
        tma_value = tma_tiles(value, params, tiles.block_k, tiles.block_v)
    row_tiles = triton.cdiv(query_length * tiles.pack_gqa, tiles.block_q)
    attend = Launch(
        attend_kernel,
        (
            row_tiles * batch * heads // tiles.pack_gqa,
            triton.cdiv(value_dim, tiles.block_v),
            1,
        ),
        {
            "q": Operand(None, *query.stride()[:3]),
            "k": Operand(None, *key.stride()[:3]),
            "v": Operand(None, *value.stride()[:3]),
            "out": Operand(None, *out[1][:3]),
            "parts": Parts(),
            "k_desc": tma_key,
            "v_desc": tma_value,
            "start_desc": tma_run(params.query_start, tma_key),
            "stop_desc": tma_run(params.query_stop, tma_key),
            "dense": PerPair(None, *broadcast_strides(params.dense, *shape)),
            "sinks": PerHead(None, *broadcast_strides(params.sinks, batch, heads)),
            "dropout": dropout_of(params),
        },
        (
            Heads(heads, heads // key_heads), query_length, key_length,
            params.query_offset, params.window_left or 0, params.window_right or 0,
            broadcast_strides(params.query_start, batch, key_length)[0], 0,
        ),
        attend_constants(tiles, query, value, launch_flags(query, key, params)),
        tiles,
    )  # fmt: skip
    return _Plan(tiles, out, score_terms(params, *shape), attend)
