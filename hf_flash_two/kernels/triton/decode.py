"""The forward pass of few queries over many keys: decode.

The keys of a head are split over programs (Flash-Decoding); the last of them to come merges what
all have made. A cache grows with every token. So that a step needs nothing worked out or compiled
anew, a plan is kept for all numbers of keys: lengths, the strides that follow from them and the
grid are arguments of each launch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from hf_flash_two.kernels.hidden import hides
from hf_flash_two.kernels.params import AttentionParams, Forward, Layout, output_layout
from hf_flash_two.kernels.triton.args import (
    Dropout,
    Heads,
    Operand,
    Parts,
    PerHead,
    PerPair,
    ScoreTerms,
    Tiled,
    Tma,
    broadcast_strides,
    dropout_of,
    intervals_of,
)
from hf_flash_two.kernels.triton.attend import attend_constants, attend_kernel
from hf_flash_two.kernels.triton.config import (
    DecodeTiles,
    decode_tiles,
    fp32_precision,
    launch_flags,
    tma_of,
    tma_of_run,
    tma_run,
    tma_tiles,
)
from hf_flash_two.kernels.triton.launch import (
    Launch,
    current_stream,
    is_capturing,
    on_device,
    plan_for,
)
from hf_flash_two.kernels.triton.ranges import key_ranges

_TMA_KEYS = 2**23
"""With fewer elements of keys, descriptors take the host longer than reading takes the GPU."""
_NO_PARTS = Parts()
_ZEROS: dict[tuple[int | None, int], Tensor] = {}
"""Of each device and stream; see `_kept_zeros`."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is the same for all numbers of keys.

    Attributes:
        rows, columns: tiles of queries of all heads and batch rows, and of Dv.
        tma_key, tma_value, tma_runs: whether TMA copies keys, values, intervals.
        attend: by whether keys are split, and whether lse is wanted.
    """

    sizes: DecodeTiles
    rows: int
    columns: int
    out: Layout
    dropout: Dropout
    tma_key: bool
    tma_value: bool
    tma_runs: bool
    attend: dict[tuple[bool, bool], Launch]


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    params: AttentionParams,
    *,
    with_lse: bool,
    eager: bool,
) -> Forward:
    """The forward of all calls that differ from this one in their tensors' values only.

    It returns out [B, Hq, Tq, Dv] in the dtype of ``query`` and, each if wanted, lse [B, Hq, Tq]
    and max_logits [B, Hq] in float32.

    Args:
        eager: whether memory may be kept from call to call; CUDA graphs of torch.compile forbid it.
    """
    batch, heads, query_length, _ = query.shape
    key_length = key.shape[2]
    steps = _steps(params, (batch, heads, query_length, key_length))
    kind = _kind(query, key, value, params, steps)
    with on_device(query):
        plan = plan_for(kind, _plan, params, query, key, value)
    tiles, splits = plan.sizes.tiles, plan.sizes.splits(key_length)
    attend, grid = plan.attend[splits > 1, with_lse], (plan.rows, plan.columns, splits)
    queries, keys, values = (x.stride()[:3] for x in (query, key, value))
    shape, outs = plan.out
    split_rows = batch * heads * query_length if splits > 1 else 0
    parts_size = splits * split_rows * (value.shape[3] + 2 * plan.columns)
    dense, bias, slopes, sinks = steps
    start, block_k = params.query_start, tiles.block_k
    terms = ScoreTerms(
        params.scale, params.softcap or 1.0, PerPair(None, *bias), PerHead(None, *slopes)
    )
    arrived, with_max = _kept_zeros if eager else _zeros, params.max_logits
    is_plain = params.bias is None and params.alibi_slopes is None
    numbers = (
        Heads(heads, heads // key.shape[1]), query_length, key_length, params.query_offset,
        params.window_left or 0, params.window_right or 0,
        0 if start is None or start.shape[0] == 1 else key_length, split_rows,
    )  # fmt: skip

    def run(
        query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
    ) -> tuple[Tensor | None, ...]:
        with on_device(query):
            out = query.new_empty_strided(shape, outs)
            lse = query.new_empty(shape[:3], dtype=torch.float32) if with_lse else None
            row_max = query.new_empty(shape[:3], dtype=torch.float32) if with_max else None
            parts, of_call, runs = _NO_PARTS, terms, (None, None)
            if splits > 1:
                room = query.new_empty(parts_size, dtype=torch.float32)
                parts = Parts(room, arrived(query, plan.rows * plan.columns))
            if not is_plain:
                of_call = terms._replace(
                    bias=PerPair(params.bias, *bias), slopes=PerHead(params.alibi_slopes, *slopes)
                )
            if plan.tma_runs:
                runs = [
                    Tiled(x, tma_of_run(x, block_k)) for x in params.tensors[:2] if x is not None
                ]
            attend(
                grid,
                Operand(query, *queries),
                Operand(key, *keys),
                Operand(value, *values),
                Operand(out, *outs[:3]),
                lse,
                row_max,
                parts,
                Tiled(key, tma_of(key, block_k, tiles.block_d)) if plan.tma_key else None,
                Tiled(value, tma_of(value, block_k, tiles.block_v)) if plan.tma_value else None,
                *runs,
                intervals_of(params, key_ranges(params, tiles, query_length, key_length)),
                PerPair(params.dense, *dense),
                of_call,
                PerHead(params.sinks, *sinks),
                plan.dropout._replace(seed_ptr=params.seed) if params.dropout_p else plan.dropout,
                *numbers,
            )
            return (out, lse) if row_max is None else (out, lse, row_max.amax(2))

    return run


def _zeros(query: Tensor, count: int) -> Tensor:
    """int32 [count], for programs to count in, which leave it as it was."""
    return query.new_zeros(count, dtype=torch.int32)


def _kept_zeros(query: Tensor, count: int) -> Tensor:
    """`_zeros`, of at least so many, once for a stream: its kernels follow one another."""
    if is_capturing(query):
        # The graph may run beside anything else.
        return _zeros(query, count)
    at = query.device.index, current_stream(query)
    zeros = _ZEROS.get(at)
    if zeros is None or zeros.numel() < count:
        zeros = _ZEROS[at] = _zeros(query, max(count, 1024))
    return zeros


def _steps(
    params: AttentionParams, shape: tuple[int, int, int, int]
) -> tuple[tuple[int, ...], ...]:
    """Strides of the dense mask, the bias, the slopes and the sinks of a call; 0 of what is not."""
    return (
        broadcast_strides(params.dense, *shape),
        broadcast_strides(params.bias, *shape),
        broadcast_strides(params.alibi_slopes, *shape[:2]),
        broadcast_strides(params.sinks, *shape[:2]),
    )


def _kind(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    params: AttentionParams,
    steps: tuple[tuple[int, ...], ...],
) -> tuple:
    """What decides a `_Plan`; of numbers that go up with the keys, how they are compiled for."""
    dense, bias, slopes, sinks = steps
    kind = [
        "decode", query.device.index, query.dtype, query.shape, query.stride(), key.shape[1],
        value.shape[3], key.numel() >= _TMA_KEYS, hides(query, key, params), params.fixed_numbers,
        slopes, sinks, params.bias is not None and params.bias.dtype,
        fp32_precision(query),
    ]  # fmt: skip
    if (start := params.query_start) is not None:
        kind += [start.shape[0], start.shape[0] == 1 or key.shape[2] % 4 == 0]
    # Triton compiles anew for 1, for multiples of 16 and beyond 32 bits; TMA wants multiples of 8.
    varying = (*key.stride(), *value.stride(), *dense, *bias)
    kind += [(step & 15) | (step < 2) << 4 | (step >> 31) << 5 for step in varying]
    tensors = (query, key, value, *params.tensors)
    kind += [x is not None and x.data_ptr() % 16 for x in tensors]
    return tuple(kind)


def _plan(params: AttentionParams, query: Tensor, key: Tensor, value: Tensor) -> _Plan:
    batch, heads, query_length, head_dim = query.shape
    sizes = decode_tiles(query, key, value, params)
    tiles, value_dim = sizes.tiles, value.shape[3]
    tma_key = tma_value = Tma()
    if head_dim <= tiles.block_d and key.numel() >= _TMA_KEYS:
        tma_key = tma_tiles(key, params, tiles.block_k, tiles.block_d)
        tma_value = tma_tiles(value, params, tiles.block_k, tiles.block_v)
    flags = launch_flags(query, key, params)
    constants = attend_constants(tiles, query, value, flags)
    return _Plan(
        sizes,
        rows=triton.cdiv(tiles.pack_gqa * query_length, tiles.block_q)
        * batch
        * (heads // tiles.pack_gqa),
        columns=triton.cdiv(value_dim, tiles.block_v),
        out=output_layout(query, value_dim),
        dropout=dropout_of(params),
        tma_key=bool(tma_key.block),
        tma_value=bool(tma_value.block),
        tma_runs=bool(tma_run(params.query_start, tma_key).block),
        attend={
            (split, with_lse): Launch(attend_kernel, None, {}, (), constants, tiles)
            for split in (False, True)
            for with_lse in (False, True)
        },
    )
