"""The launch of the forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from hf_flash_two.kernels.hopper.again import attend_again_kernel
from hf_flash_two.kernels.hopper.attend import attend_kernel
from hf_flash_two.kernels.hopper.config import (
    ROWS,
    forward_flags,
    forward_tiles,
    heads_together,
    parts,
)
from hf_flash_two.kernels.hopper.gluon import shared_layout
from hf_flash_two.kernels.hopper.runs import key_runs, runs_tma
from hf_flash_two.kernels.params import AttentionParams, Layout, Prepared, output_layout
from hf_flash_two.kernels.triton.args import PerHead, Tma, broadcast_strides, dropout_of
from hf_flash_two.kernels.triton.config import Tiles, device_of
from hf_flash_two.kernels.triton.launch import Launch, with_plan
from hf_flash_two.kernels.triton.ranges import key_ranges


@dataclass(frozen=True, slots=True)
class _Plan:
    """``tickets``: how many `attend_kernel` takes, or 0. ``again``: None if no mask hides pairs."""

    tiles: Tiles
    out: Layout
    tickets: int
    attend: Launch
    again: Launch | None


def forward(
    query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
) -> tuple[Tensor | None, ...]:
    """out [B, Hq, Tq, Dv] in the dtype of ``query`` and lse [B, Hq, Tq] in float32."""
    query, key, value = [x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value)]
    return with_plan(_plan, _attend, params, query, key, value)(query, key, value, params)


def prepare(
    query: Tensor, key: Tensor, value: Tensor, params: AttentionParams, with_lse: bool
) -> Prepared | None:
    """`forward` for all calls that differ from this one in their tensors' values only, or None."""
    if any(x.stride(3) != 1 for x in (query, key, value)):
        return None
    return Prepared(with_plan(_plan, _attend, params, query, key, value))


def _attend(
    plan: _Plan, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
) -> tuple[Tensor, Tensor]:
    out = query.new_empty_strided(*plan.out)
    lse = query.new_empty(plan.out[0][:3], dtype=torch.float32)
    ranges = key_ranges(params, plan.tiles, query.shape[2], key.shape[2])
    runs = key_runs(params, plan.tiles.block_k)
    tickets = query.new_zeros(plan.tickets, dtype=torch.int32) if plan.tickets else None
    plan.attend(
        query, query, key, key, value, value, out, out, runs, lse, ranges,
        params.alibi_slopes, params.sinks, params.seed, tickets,
    )  # fmt: skip
    if plan.again is not None:
        plan.again(
            query, query, key, key, value, out, runs, lse, ranges,
            params.alibi_slopes, params.seed, tickets,
        )  # fmt: skip
    return out, lse


def _plan(params: AttentionParams, query: Tensor, key: Tensor, value: Tensor) -> _Plan:
    batch, heads, query_length, _ = query.shape
    key_heads, key_length, value_dim = key.shape[1], key.shape[2], value.shape[3]
    tiles = forward_tiles(query, key, value)
    out = output_layout(query, value_dim)
    pack = tiles.pack_gqa
    d, d_v = parts(tiles.block_d)[0], parts(tiles.block_v)[0]
    row_tiles = triton.cdiv(query_length * pack, tiles.block_q)
    head_tiles = batch * heads // pack
    together = heads_together(key, value, heads // pack // key_heads)
    drop = dropout_of(params)
    works = row_tiles * head_tiles
    programs = min(works, device_of(query.device.index).processors)
    flags = forward_flags(query, key, params, tiles, programs < works)

    def rows(layout: Layout, columns: int) -> Tma:
        """Tiles of 64 rows, of ``pack`` heads side by side."""
        shape, strides = layout
        block = (1, 1, ROWS // pack, pack, columns)
        return _tma(
            (batch, heads // pack, query_length, pack, shape[3]),
            (strides[0], strides[1] * pack, strides[2], strides[1]),
            block if columns else (),
            query.dtype,
        )

    def keys(tensor: Tensor, columns: int) -> Tma:
        block = (1, 1, tiles.block_k, columns) if columns else ()
        return _tma(tuple(tensor.shape), tensor.stride()[:3], block, tensor.dtype)

    queries = (tuple(query.shape), query.stride())
    templates = {
        "q_desc": rows(queries, d),
        "q_rest": rows(queries, flags.D_REST),
        "k_desc": keys(key, d),
        "k_rest": keys(key, flags.D_REST),
        "run_desc": runs_tma(params, key_length, tiles.block_k),
        "slopes": PerHead(None, *broadcast_strides(params.alibi_slopes, batch, heads)),
    }
    scalars = (
        params.scale, params.softcap or 1.0, drop.threshold, float(drop.keep_scale),
        heads, heads // key_heads, query_length, key_length, params.query_offset,
        params.window_left or 0, params.window_right or 0,
        row_tiles, head_tiles, min(together, head_tiles),
    )  # fmt: skip
    size = Tiles(tiles.block_q, tiles.block_k, d, d_v, 4, 1)
    attend = Launch(
        attend_kernel,
        (programs, 1, 1),
        templates
        | {
            "v_desc": keys(value, d_v),
            "v_rest": keys(value, flags.V_REST),
            "out_desc": rows(out, d_v),
            "out_rest": rows(out, flags.V_REST),
            "sinks": PerHead(None, *broadcast_strides(params.sinks, batch, heads)),
        },
        scalars,
        {"FLAGS": flags},
        size,
        maxnreg={2: 168, 3: 128}[flags.CONSUMERS],
    )
    again, tickets = None, 1 if flags.PERSISTENT else 0
    if flags.RESCUE:
        tickets = 2 + works * flags.CONSUMERS
        again = Launch(
            attend_again_kernel,
            (programs, 1, 1),
            templates | {"v_desc": keys(value, 64), "out_desc": rows(out, 64)},
            scalars,
            {"FLAGS": flags, "VALUE_DIM": tiles.block_v},
            size,
        )
    return _Plan(tiles, out, tickets, attend, again)


def _tma(
    shape: tuple[int, ...], strides: tuple[int, ...], block: tuple[int, ...], dtype: torch.dtype
) -> Tma:
    """How TMA copies blocks of a tensor; nothing for no block."""
    if not block:
        return Tma()
    # An axis of one element is never stepped along, but its stride is checked.
    steps = [step if length > 1 else 16 for length, step in zip(shape, strides, strict=False)]
    return Tma(shape, (*steps, 1), block, shared_layout(block, dtype))
