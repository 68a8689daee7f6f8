"""The forward pass of few queries over many keys: decode.

The keys of a head are split over programs, whose results a second kernel merges (Flash-Decoding).
A cache grows with every token. So that a step needs nothing worked out or compiled anew, a plan is
kept for all numbers of keys: lengths, the strides that follow from them and the grid are arguments
of each launch.
"""

# What stands in a kernel is Triton's language, which its types do not describe.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_flash_two.kernels.hidden import hides
from hf_flash_two.kernels.params import LOG2E, AttentionParams, Layout, output_layout
from hf_flash_two.kernels.triton.args import (
    Dropout,
    Heads,
    Operand,
    PerHead,
    PerPair,
    ScoreTerms,
    Tiled,
    Tma,
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
from hf_flash_two.kernels.triton.launch import Launch, on_device, plan_for
from hf_flash_two.kernels.triton.ranges import key_ranges
from hf_flash_two.kernels.triton.tile import head_number, head_ptr, unit

_LOG2E = tl.constexpr(LOG2E)
_MERGED = tl.constexpr(16)
_TMA_KEYS = 2**23
"""With fewer elements of keys, descriptors take the host longer than reading takes the GPU."""
_NO_PAIRS, _NO_HEADS = PerPair(None, 0, 0, 0, 0), PerHead(None, 0, 0)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is the same for all numbers of keys.

    Attributes:
        rows, columns: tiles of queries of all heads and batch rows, and of Dv.
        tma_key, tma_value, tma_runs: whether TMA copies keys, values, intervals.
        whole, split: launches over all keys and over parts of them.
    """

    sizes: DecodeTiles
    rows: int
    columns: int
    out: Layout
    dropout: Dropout
    tma_key: bool
    tma_value: bool
    tma_runs: bool
    whole: Launch
    split: Launch
    merge: Launch


def decode(
    query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Tq, Dv] in the dtype of ``query`` and lse [B, Hq, Tq] in float32."""
    batch, heads, query_length, _ = query.shape
    key_length, start, stop = key.shape[2], params.query_start, params.query_stop
    shape = (batch, heads, query_length, key_length)
    dense, bias, slopes, sinks = _NO_PAIRS, _NO_PAIRS, _NO_HEADS, _NO_HEADS
    if params.dense is not None:
        dense = PerPair(params.dense, *params.dense.expand(shape).stride())
    if params.bias is not None:
        bias = PerPair(params.bias, *params.bias.expand(shape).stride())
    if params.alibi_slopes is not None:
        slopes = PerHead(params.alibi_slopes, *params.alibi_slopes.expand(shape[:2]).stride())
    if params.sinks is not None:
        sinks = PerHead(params.sinks, *params.sinks.expand(shape[:2]).stride())
    kind = _kind(query, key, value, params, dense, bias, slopes, sinks)
    with on_device(query):
        plan = plan_for(kind, _plan, params, query, key, value)
        tiles, splits = plan.sizes.tiles, plan.sizes.splits(key_length)
        out = query.new_empty_strided(*plan.out)
        lse = query.new_empty(plan.out[0][:3], dtype=torch.float32)
        part, part_lse, attend, split_rows = Operand(out, *plan.out[1][:3]), lse, plan.whole, 0
        if splits > 1:
            split_rows, width = batch * heads * query_length, value.shape[3]
            parts = query.new_empty(splits, split_rows, width, dtype=torch.float32)
            part = Operand(parts, heads * query_length * width, query_length * width, width)
            part_lse = query.new_empty(2, splits, split_rows, dtype=torch.float32)
            attend = plan.split
        attend(
            (plan.rows, plan.columns, splits),
            Operand(query, *query.stride()[:3]),
            Operand(key, *key.stride()[:3]),
            Operand(value, *value.stride()[:3]),
            part,
            part_lse,
            Tiled(key, tma_of(key, tiles.block_k, tiles.block_d)) if plan.tma_key else None,
            Tiled(value, tma_of(value, tiles.block_k, tiles.block_v)) if plan.tma_value else None,
            Tiled(start, tma_of_run(start, tiles.block_k)) if plan.tma_runs else None,
            Tiled(stop, tma_of_run(stop, tiles.block_k)) if plan.tma_runs else None,
            intervals_of(params, key_ranges(params, tiles, query_length, key_length)),
            dense,
            ScoreTerms(params.scale, params.softcap or 1.0, bias, slopes),
            sinks,
            plan.dropout._replace(seed_ptr=params.seed),
            Heads(heads, heads // key.shape[1]),
            query_length,
            key_length,
            params.query_offset,
            params.window_left or 0,
            params.window_right or 0,
            0 if start is None or start.shape[0] == 1 else key_length,
            split_rows,
        )
        if splits > 1:
            to = Operand(out, *plan.out[1][:3])
            split_stride = split_rows * value.shape[3]
            plan.merge(
                (split_rows, 1, 1), part, part_lse, to, lse, sinks,
                heads, query_length, split_rows, split_stride, splits,
            )  # fmt: skip
    return out, lse


def _kind(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    params: AttentionParams,
    dense: PerPair,
    bias: PerPair,
    slopes: PerHead,
    sinks: PerHead,
) -> tuple:
    """What decides a `_Plan`; of numbers that go up with the keys, how they are compiled for."""
    kind = [
        "decode", query.device.index, query.dtype, query.shape, query.stride(), key.shape[1],
        value.shape[3], key.numel() >= _TMA_KEYS, hides(query, key, params), params.fixed_numbers,
        slopes[1:], sinks[1:], params.bias is not None and params.bias.dtype,
        fp32_precision(query),
    ]  # fmt: skip
    if (start := params.query_start) is not None:
        kind += [start.shape[0], start.shape[0] == 1 or key.shape[2] % 4 == 0]
    # Triton compiles anew for 1, for multiples of 16 and beyond 32 bits; TMA wants multiples of 8.
    steps = (*key.stride(), *value.stride(), *dense[1:], *bias[1:])
    kind += [(step & 15) | (step < 2) << 4 | (step >> 31) << 5 for step in steps]
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

    def launch(kernel, constants: dict) -> Launch:
        return Launch(kernel, None, {}, (), constants, tiles)

    whole, split = (
        launch(attend_kernel, attend_constants(tiles, query, value, flags, split))
        for split in (False, True)
    )
    width = triton.next_power_of_2(value_dim)
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
        whole=whole,
        split=split,
        merge=launch(_merge_kernel, {"PLAIN": flags.PLAIN, "DV": value_dim, "BLOCK_V": width}),
    )


@triton.jit(do_not_specialize=["query_length", "split_rows", "split_stride", "splits"])
def _merge_kernel(
    part: Operand, part_lse_ptr, out: Operand, lse_ptr, sinks: PerHead,
    heads, query_length, split_rows, split_stride, splits,
    PLAIN: tl.constexpr, DV: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One row: the sums of its splits, each as it would be had all keys the largest maximum.

    Args:
        part, part_lse_ptr: ``out`` and ``lse_ptr`` of `attend_kernel` where keys are split.
        out: [B, Hq, Tq, Dv].
        lse_ptr: float32 [B, Hq, Tq].
    """
    UNIT: tl.constexpr = unit(PLAIN)
    program = tl.program_id(0).to(tl.int64)
    row = program % query_length
    head = (program // query_length) % heads
    batch = program // query_length // heads
    d_v = tl.arange(0, BLOCK_V)
    part_row = head_ptr(part, batch, head) + row * part.stride_t + d_v
    row_max = float("-inf")
    row_sum = 0.0
    acc = tl.zeros([BLOCK_V], tl.float32)
    if sinks.ptr is not None:
        row_max = head_number(sinks, batch, head) * (_LOG2E / UNIT)
        row_sum = tl.where(row_max == float("-inf"), 0.0, 1.0)
    # All splits together are a few tiles per processor: 32 bits reach them.
    for some in range(0, splits, _MERGED):
        split = some + tl.arange(0, _MERGED)
        inside = split < splits
        part_at = part_lse_ptr + split * split_rows + program
        part_max = tl.load(part_at, inside, float("-inf"))
        part_sum = tl.load(part_at + splits * split_rows, inside, 0.0)
        new_max = tl.maximum(row_max, tl.max(part_max, 0))
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        alpha = tl.exp2((row_max - safe_max) * UNIT)
        share = tl.exp2((part_max - safe_max) * UNIT)
        at = part_row[None, :] + (split * split_stride)[:, None]
        partial = tl.load(at, inside[:, None] & (d_v < DV)[None, :], 0.0)
        acc = acc * alpha + tl.sum(partial * share[:, None], 0)
        row_sum = row_sum * alpha + tl.sum(part_sum * share, 0)
        row_max = new_max
    acc = acc / tl.where(row_sum == 0, 1.0, row_sum)
    lse = row_max * (UNIT / _LOG2E) + tl.log2(row_sum) / _LOG2E
    lse = tl.where(row_sum == 0, float("-inf"), lse)
    tl.store(head_ptr(out, batch, head) + row * out.stride_t + d_v, acc, d_v < DV)
    tl.store(lse_ptr + program, lse)
