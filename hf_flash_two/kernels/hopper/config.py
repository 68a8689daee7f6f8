"""What the Hopper kernels compute, and with which tiles."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from hf_flash_two.kernels.hidden import band_ends
from hf_flash_two.kernels.hopper.schedule import Setup
from hf_flash_two.kernels.hopper.tile import BAND, INTERVALS, NO_MASK
from hf_flash_two.kernels.params import AttentionParams
from hf_flash_two.kernels.triton.config import Tiles, decodes, tma_fits

# Of the forward, by padded head dim of queries and of values at most: consumers of 64 queries each,
# keys of a tile, stages of K and V.
_FORWARD = {
    (64, 64): (3, 128, 2),
    (128, 128): (2, 128, 2),
    (192, 128): (2, 128, 2),
    (192, 192): (2, 64, 3),
    (256, 256): (2, 64, 2),
}
_WIDTHS = (64, 96, 128, 192, 256)
"""Head dims as they are padded."""
ROWS = 64
"""Queries of a consumer."""
_TIMED = 2048
"""From so many queries on they were faster than the portable kernels wherever timed, or within 4 %;
but for the forward with the intervals of short documents at head dim 96."""
_SHORT = f"it is known to be faster from {_TIMED} queries on"
_TIMED_DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
"""Head dims of queries and values at which the backward was timed."""
_CACHED = 2**25
"""Bytes of keys and values that programs at work together share in the L2 cache."""


def forward_declines(
    query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
) -> str | None:
    """Why the forward does not compute this call, or None."""
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"it computes bfloat16 and float16, not {query.dtype}"
    if max(query.shape[3], value.shape[3]) > _WIDTHS[-1]:
        return f"it has head dims up to {_WIDTHS[-1]}"
    if query.shape[3] % 8 or value.shape[3] % 8:
        return "TMA copies rows of whole 16 bytes"
    if params.dense is not None:
        return "it reads no dense masks"
    if params.bias is not None:
        return "it has no bias"
    if params.batch_invariant:
        return "it is not batch-invariant"
    if params.max_logits:
        return "it does not tell the largest scores"
    if not (query.numel() and key.numel() and value.numel()):
        return "there is nothing to compute"
    if decodes(query, key, value):
        return "there are few queries, for which the portable kernel splits the keys"
    if params.block_q is not None or params.block_k is not None:
        return "its tiles cannot be limited"
    if not all(x.stride(3) != 1 or tma_fits(x) for x in (query, key, value)):
        return "TMA does not copy tensors of these strides"
    return None


def forward_is_slow(query: Tensor, params: AttentionParams) -> str | None:
    """Why "auto" does not take the forward although it computes the call, or None."""
    if query.shape[2] < _TIMED:
        return _SHORT
    if 64 < query.shape[3] <= 96 and params.query_start is not None:
        return "it is not known to be faster with padding and documents at this head dim"
    return None


def backward_is_slow(query: Tensor, value: Tensor) -> str | None:
    """Why "auto" does not take the backward although it computes the call, or None."""
    if query.shape[2] < _TIMED:
        return _SHORT
    if (query.shape[3], value.shape[3]) not in _TIMED_DIMS:
        return f"its backward is known to be faster for head dims of {_TIMED_DIMS}"
    return None


def padded(head_dim: int) -> int:
    """The head dim that is computed with."""
    return next(width for width in _WIDTHS if head_dim <= width)


def parts(width: int) -> tuple[int, int]:
    """A padded head dim as a power of two and the rest."""
    first = 2 ** (width.bit_length() - 1)
    return first, width - first


@lru_cache
def _forward_row(width: int, value_width: int) -> tuple[int, int, int]:
    return next(row for (d, d_v), row in _FORWARD.items() if width <= d and value_width <= d_v)


def forward_tiles(query: Tensor, key: Tensor, value: Tensor) -> Tiles:
    """Tiles of the forward; where that makes fewer of them, several heads of a group share one."""
    width, value_width = padded(query.shape[3]), padded(value.shape[3])
    if max(width, value_width) == 256:
        # There is no room for an output of another size than the queries'.
        width, value_width = (256 if size == 192 else size for size in (width, value_width))
    if width == 192:
        value_width = 128 if value_width == 96 else value_width
    consumers, block_k, stages = _forward_row(width, value_width)
    block_q = ROWS * consumers
    heads, length = query.shape[1], query.shape[2]
    group = heads // key.shape[1]

    def row_tiles(pack: int) -> int:
        return -(-length * pack // block_q) * (heads // pack)

    packs = [pack for pack in (1, 2, 4, 8, 16, 32) if group % pack == 0]
    pack = min(packs, key=row_tiles)
    return Tiles(block_q, block_k, width, value_width, 4, stages, pack)


def heads_together(key: Tensor, value: Tensor, head_tiles: int) -> int:
    """How many tiles of heads go side by side; ``head_tiles`` are there for a key head."""
    size = key.shape[2] * (key.shape[3] + value.shape[3]) * key.element_size()
    return max(1, _CACHED // size) * head_tiles


class ForwardFlags(NamedTuple):
    """What is decided when a kernel is compiled that goes through keys. What is off costs nothing.

    Attributes:
        MASK, LEFT, RIGHT, SOFTCAP, ALIBI, PLAIN: see `tile`.
        SINKS, DROPOUT: are on.
        RESCUE: tiles may hold hidden pairs, whose NaN and infinities must not matter.
        SHARED_RUNS: all batch rows have the same intervals.
        CONSUMERS: of 64 queries each.
        STAGES: tiles of keys on their way at the same time, and of values.
        TURNS: consumers start their products one after the other.
        PACK_GQA: heads of a group that share a tile.
        PERSISTENT: programs compute more than one tile of queries.
        OWN_OUT: the output does not take the queries' place in shared memory.
        SLOTS: tiles of queries in shared memory: with two, the next is there when one ends.
        HELD: columns of a consumer's queries that it keeps in registers.
        LAZY: rows are scaled anew only where their largest score grew by much.
        D_REST, V_REST: the second part of the head dims, see `parts`.
    """

    MASK: int
    LEFT: bool
    RIGHT: bool
    SOFTCAP: bool
    ALIBI: bool
    PLAIN: bool
    SINKS: bool
    DROPOUT: bool
    RESCUE: bool
    SHARED_RUNS: bool
    CONSUMERS: int
    STAGES: int
    TURNS: bool
    PACK_GQA: int
    PERSISTENT: bool
    OWN_OUT: bool
    SLOTS: int
    HELD: int
    LAZY: bool
    D_REST: int
    V_REST: int


def forward_flags(
    query: Tensor, key: Tensor, params: AttentionParams, tiles: Tiles, persistent: bool
) -> ForwardFlags:
    of_query, of_value = parts(tiles.block_d), parts(tiles.block_v)
    fits = of_query[0] == of_value[0] and of_value[1] in (0, of_query[1])
    left, right = band_ends(query.shape[2], key.shape[2], params)
    start = params.query_start
    return ForwardFlags(
        MASK=(INTERVALS if start is not None else BAND if left or right else NO_MASK).value,
        LEFT=left,
        RIGHT=right,
        SOFTCAP=params.softcap > 0,
        ALIBI=params.alibi_slopes is not None,
        PLAIN=params.plain and params.scale > 0,
        SINKS=params.sinks is not None,
        DROPOUT=params.dropout_p > 0,
        RESCUE=start is not None or left or right,
        SHARED_RUNS=start is None or start.shape[0] == 1,
        CONSUMERS=tiles.block_q // ROWS,
        STAGES=tiles.stages,
        TURNS=tiles.block_d <= 128,
        PACK_GQA=tiles.pack_gqa,
        PERSISTENT=persistent,
        OWN_OUT=max(tiles.block_d, tiles.block_v) <= 128 or not fits,
        SLOTS=2 if max(tiles.block_d, tiles.block_v) <= 128 and persistent else 1,
        # Shared memory is read less: keys of 64 rows and queries would take all it can give.
        HELD=128 if tiles.block_d == 256 else 0,
        LAZY=tiles.block_v > 64,
        D_REST=of_query[1],
        V_REST=of_value[1],
    )


def backward_declines(
    query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
) -> str | None:
    """Why the backward does not compute this call, or None."""
    head_dim, value_dim = query.shape[3], value.shape[3]
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"it computes bfloat16 and float16, not {query.dtype}"
    if max(head_dim, value_dim) > 256:
        return f"its backward has head dims up to 256, not {max(head_dim, value_dim)}"
    if head_dim % 8 or value_dim % 8:
        return f"TMA copies rows of whole 16 bytes, not of {head_dim} and {value_dim} numbers"
    if params.dense is not None:
        return "it reads no dense masks"
    if params.bias is not None:
        return "it has no bias"
    if params.block_q is not None or params.block_k is not None:
        return "its tiles cannot be limited"
    if params.batch_invariant:
        return "it is not batch-invariant"
    if not (query.numel() and key.numel()):
        return "there is nothing to compute"
    return None


@dataclass(frozen=True, slots=True)
class BackwardTiles:
    """How the backward is launched.

    Attributes:
        block_d, block_v: the padded head dims.
        together: see `schedule.Sizes`.
        wide: `wide_keys` computes dK and dV, not `gradients`.
        of_queries: where dQ has a kernel of its own, that one's.
    """

    setup: Setup
    block_d: int
    block_v: int
    together: int
    wide: bool
    of_queries: Tiles | None


def backward_tiles(
    query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
) -> BackwardTiles:
    """Tiles of the backward, and the order in which its programs start."""
    left, right = band_ends(query.shape[2], key.shape[2], params)
    intervals = params.query_start is not None
    widest = max(query.shape[3], value.shape[3])
    width = 64 if widest <= 64 else 128 if widest <= 128 else 256
    narrow, wide = width == 64, width == 256
    block_q, block_k = 128 if narrow else 64, 64 if wide else 128
    value_width = 128 if wide and value.shape[3] <= 128 else width
    masked = intervals or left or right
    # With intervals, tiles of keys would often wait for each other's turns to add dQ. In any order
    # one kernel wins at head dim 64 alone.
    apart = wide or intervals and (params.deterministic or not narrow)
    ordered = params.deterministic and not apart
    group = query.shape[1] // key.shape[1]
    # As timed. The more key heads, the fewer tiles of one that share Q and dO in the L2 cache.
    if apart:
        together = 1 if group == 1 else 2 if wide else 8
    elif ordered and not left:
        # Tiles of a head start a step after each other, so there are to be few at a time.
        together = max(1, (32 if narrow and right else 16) // group)
    else:
        together = 8 if ordered or narrow or group == 1 else 4
    setup = Setup(
        MASK=(INTERVALS if intervals else BAND if left or right else NO_MASK).value,
        LEFT=left,
        RIGHT=right,
        SOFTCAP=params.softcap > 0,
        PLAIN=params.plain and params.scale > 0,
        RESCUE=masked,
        ALIBI=params.alibi_slopes is not None,
        DROPOUT=params.dropout_p > 0,
        MASKED=masked or key.shape[2] % block_k > 0,
        WITH_DQ=not apart,
        ORDERED=ordered,
        DV_FIRST=not masked and not narrow,
        LATE_LSE=narrow,
        LATE_DELTA=narrow or not masked,
        BLOCK_Q=block_q,
        BLOCK_K=block_k,
    )
    of_queries = Tiles(2 * ROWS, 64, width, value_width, 4, 2) if apart else None
    return BackwardTiles(setup, width, value_width, together, wide, of_queries)
