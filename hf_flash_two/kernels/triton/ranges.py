"""The key tiles that are not empty for each tile of queries, where visibility intervals decide."""

# What stands in a kernel is Triton's language, which its types do not describe.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

from dataclasses import astuple, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_flash_two.kernels.params import AttentionParams
from hf_flash_two.kernels.triton.config import Tiles
from hf_flash_two.kernels.triton.launch import Launch, plan_for
from hf_flash_two.masks import KEY_GROUP
from hf_flash_two.tensor_cache import derive

_KEY_GROUP = tl.constexpr(KEY_GROUP)
_SCAN = tl.constexpr(128)


def key_ranges(
    params: AttentionParams, tiles: Tiles, query_length: int, key_length: int
) -> Tensor | None:
    """int32 [B or 1, query tiles, 4] for `tile.key_tiles`; None without intervals.

    Worked out once for each mask and tile size, which all layers share.
    """
    bounds = params.key_bounds
    if bounds is None:
        return None

    def build() -> Tensor:
        count = triton.cdiv(tiles.pack_gqa * query_length, tiles.block_q)
        ranges = bounds.new_empty(bounds.shape[0], count, 4, dtype=torch.int32)
        kind = ("ranges", bounds.device.index, bounds.data_ptr() % 16, *astuple(tiles))
        plan_for(kind, _launch, tiles)(
            (count * bounds.shape[0], 1, 1), bounds, ranges, bounds.stride(0), count,
            query_length, key_length, params.query_offset,
        )  # fmt: skip
        return ranges

    settings = (query_length, key_length, tiles.block_q, tiles.block_k, tiles.pack_gqa)
    return derive(("key ranges", params.query_offset, *settings), build, bounds)


def _launch(tiles: Tiles) -> Launch:
    constants = {
        "PACK_GQA": tiles.pack_gqa, "BLOCK_Q": tiles.block_q, "BLOCK_K": tiles.block_k,
    }  # fmt: skip
    return Launch(_ranges_kernel, None, {}, (), constants, replace(tiles, warps=1, stages=1))


@triton.jit(do_not_specialize=["bounds_sb", "count", "query_length", "key_length", "offset"])
def _ranges_kernel(
    bounds_ptr, ranges_ptr, bounds_sb, count, query_length, key_length, offset,
    PACK_GQA: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tile = program % count
    bounds_ptr += (program // count).to(tl.int64) * bounds_sb
    start = tile * BLOCK_Q // PACK_GQA + offset
    stop = tl.minimum((tile * BLOCK_Q + BLOCK_Q - 1) // PACK_GQA + 1, query_length) + offset
    groups = tl.cdiv(key_length, _KEY_GROUP)
    low, high, whole = groups, 0, groups
    for scan in range(0, groups, _SCAN):
        group = scan + tl.arange(0, _SCAN)
        seen, complete = _classify(bounds_ptr, group, groups, start, stop)
        low = tl.minimum(low, tl.min(tl.where(seen, group, groups)))
        high = tl.maximum(high, tl.max(tl.where(seen, group + 1, 0)))
        whole = tl.minimum(whole, tl.min(tl.where(complete, group, groups)))
    broken = groups
    for scan in range((whole // _SCAN) * _SCAN, groups, _SCAN):
        group = scan + tl.arange(0, _SCAN)
        seen, complete = _classify(bounds_ptr, group, groups, start, stop)
        gap = (group >= whole) & (complete == 0) & (group < groups)
        broken = tl.minimum(broken, tl.min(tl.where(gap, group, groups)))
    at = ranges_ptr + program.to(tl.int64) * 4
    tl.store(at, low * _KEY_GROUP // BLOCK_K)
    tl.store(at + 1, tl.minimum(tl.cdiv(high * _KEY_GROUP, BLOCK_K), tl.cdiv(key_length, BLOCK_K)))
    tl.store(at + 2, tl.cdiv(whole * _KEY_GROUP, BLOCK_K))
    tl.store(at + 3, tl.minimum(broken * _KEY_GROUP // BLOCK_K, key_length // BLOCK_K))


@triton.jit
def _classify(bounds_ptr, group, groups, start, stop):
    """Which groups of keys queries at [start, stop) see at all, and which they all see wholly."""
    inside = group < groups
    at = bounds_ptr + group * 4
    min_start = tl.load(at, inside, 2**30)
    max_start = tl.load(at + 1, inside, 2**30)
    min_stop = tl.load(at + 2, inside, -(2**30))
    max_stop = tl.load(at + 3, inside, -(2**30))
    seen = (min_start < stop) & (max_stop > start)
    return seen, seen & (max_start <= start) & (min_stop >= stop)
