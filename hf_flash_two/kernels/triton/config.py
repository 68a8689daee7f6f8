"""How the Triton kernels are launched: tile sizes by shape, dtype and device; compile-time flags.

Tile sizes are a pure function of their arguments, never timed at run time: recomputation repeats
the forward bit for bit. The table keeps every kernel within the registers and the shared memory of
its class of GPU, as the compiler reports them; ``scripts/tune_triton.py`` times candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from hf_flash_two.kernels.hidden import hides
from hf_flash_two.kernels.params import AttentionParams
from hf_flash_two.kernels.triton.args import Flags, Tma
from hf_flash_two.kernels.triton.tile import BAND, INTERVALS, NO_MASK

_MOST_COLUMNS = 256
_DECODE_ROWS = 64
_LONG = 1024, 4
"""Keys, and keys for each query, from which on splitting them pays for more than `_DECODE_ROWS`."""
_SPLIT_KEYS = 256
_TMA_LENGTH = 256
_MOST_SCORES = 2**13
_WARPGROUPS_WAIT = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
"""Whether two warpgroups of Hopper wait for each other after a product (triton#11056).

Before, one may overwrite what the other still multiplies: launches that read a dense mask or a bias
have one warpgroup there, and tests/kernel/test_triton_compile.py reads the PTX of the others.
"""


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tile sizes of one launch: queries, keys, head dim of Q K^T and of V per product."""

    block_q: int
    block_k: int
    block_d: int
    block_v: int
    warps: int
    stages: int
    pack_gqa: int = 1


@dataclass(frozen=True, slots=True)
class Device:
    """What the choice of tiles depends on."""

    processors: int
    shared_memory: int
    tma: bool = False
    tensor_memory: bool = False


# (block_q, block_k, warps, stages) of the forward, the dK/dV pass, the dQ pass and, where dK and dV
# are better computed apart, the dV pass; by shared memory in KiB at least, dtype ("half" of 16
# bits, "single" of 32) and padded head dim at most.
_TABLE = {
    200: {
        "half": {
            64: ((64, 128, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3)),
            128: ((64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 2)),
            256: ((64, 64, 4, 3), (64, 64, 4, 2), (128, 32, 8, 3), (64, 64, 4, 3)),
        },
        "single": {
            64: ((64, 64, 4, 2), (32, 64, 4, 1), (32, 64, 4, 1)),
            256: ((32, 64, 4, 1), (32, 64, 4, 1), (32, 64, 4, 1)),
        },
    },
    128: {
        "half": {
            64: ((128, 128, 4, 3), (64, 128, 8, 2), (128, 128, 8, 2)),
            128: ((128, 64, 8, 3), (64, 128, 8, 2), (128, 64, 8, 2)),
            256: ((128, 64, 8, 2), (32, 64, 8, 1), (64, 64, 8, 1)),
        },
        "single": {
            64: ((64, 64, 4, 2), (32, 64, 4, 1), (32, 64, 4, 1)),
            256: ((32, 64, 4, 1), (32, 64, 4, 1), (32, 64, 4, 1)),
        },
    },
    96: {
        "half": {
            64: ((64, 64, 4, 2), (32, 64, 4, 1), (32, 64, 4, 1)),
            128: ((64, 64, 4, 2), (32, 32, 4, 1), (32, 32, 4, 1)),
            256: ((32, 64, 4, 1), (16, 32, 4, 1), (16, 32, 4, 1)),
        },
        "single": {256: ((32, 32, 4, 1), (16, 32, 4, 1), (16, 32, 4, 1))},
    },
    0: {
        "half": {
            64: ((64, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
            128: ((32, 32, 4, 1), (32, 32, 4, 1), (16, 32, 4, 1)),
            256: ((16, 32, 4, 1), (16, 16, 4, 1), (16, 32, 4, 1)),
        },
        "single": {256: ((16, 32, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1))},
    },
}

# Decoding: (block_k, stages, programs resident in a processor), chosen in the same way. Hopper has
# three tiles of 32 KiB of K and of V on their way.
_DECODE_TABLE = {
    200: {
        "half": {64: (256, 3, 1), 128: (128, 3, 1), 256: (64, 3, 1)},
        "single": {64: (128, 2, 2), 256: (64, 2, 2)},
    },
    128: {
        "half": {64: (128, 2, 2), 256: (64, 2, 2)},
        "single": {64: (128, 2, 2), 256: (64, 2, 2)},
    },
    0: {
        "half": {64: (128, 2, 2), 128: (64, 2, 2), 256: (32, 2, 2)},
        "single": {64: (64, 2, 2), 256: (32, 2, 2)},
    },
}


def _few_terms(params: AttentionParams) -> bool:
    """Whether no tiles of a bias or a dense mask want room beside those of K and V."""
    return params.bias is None and params.dense is None


def _look_up(table: dict[int, dict], shared_memory: int, single: bool, width: int) -> tuple:
    rows = next(rows for kib, rows in table.items() if shared_memory >= kib * 2**10)
    rows = rows["single" if single else "half"]
    return next(row for limit, row in rows.items() if width <= limit)


def _table_row(width: int, single: bool, device: Device, params: AttentionParams):
    """The launches, with fewer stages where other tiles want the room.

    Those are a bias and a dense mask, at most 32 KiB of each, and on GPUs with tensor memory what
    products take through shared memory.
    """
    row = _look_up(_TABLE, device.shared_memory, single, width)
    few = _few_terms(params)
    most = 4 if few else 2
    if width > 128 and (device.tensor_memory or device.shared_memory < 200 * 2**10):
        most //= 2
    if few:
        return [(*sizes, min(stages, most)) for *sizes, stages in row]
    if device.tma and not device.tensor_memory and not _WARPGROUPS_WAIT:
        row = [(64, block_k, 4, stages) if warps > 4 else (block_q, block_k, warps, stages)
               for block_q, block_k, warps, stages in row]  # fmt: skip
    return [
        (block_q, min(block_k, _MOST_SCORES // block_q), warps, min(stages, most))
        for block_q, block_k, warps, stages in row
    ]


@lru_cache
def device_of(index: int | None) -> Device:
    if index is None or not torch.cuda.is_available():
        return Device(processors=4, shared_memory=2**16)
    properties = torch.cuda.get_device_properties(index)
    return Device(
        properties.multi_processor_count,
        getattr(properties, "shared_memory_per_block_optin", 2**16),
        tma=torch.version.hip is None and properties.major >= 9,
        tensor_memory=torch.version.hip is None and properties.major in (10, 11),
    )


def _device(tensor: Tensor) -> Device:
    return device_of(tensor.device.index)


def sharing_programs(tensor: Tensor, tiles: int) -> int:
    """How many programs share ``tiles`` on the device of ``tensor``: one a processor at most."""
    return min(tiles, _device(tensor).processors)


def _padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _columns(size: int, single: bool, device: Device) -> int:
    """Columns of a tile of ``size``, padded to what products need."""
    # On Hopper, ptxas 12.8 makes wrong code, or crashes, for narrower tiles of half precision.
    return max(_padded(size), 64 if device.tma and not single else 16)


def _cap(block: int, limit: int | None, least: int) -> int:
    """The caller's bucket limits a tile, down to what the hardware's products need."""
    return block if limit is None else max(least, min(block, 2 ** (limit.bit_length() - 1)))


@lru_cache
def _product_columns(
    index: int | None, dtype: torch.dtype, head_dim: int, value_dim: int
) -> tuple[int, int]:
    """Head dim of Q K^T and of V per product."""
    device, single = device_of(index), dtype == torch.float32
    most = _MOST_COLUMNS if not single else 128
    block_d, block_v = (min(_columns(x, single, device), most) for x in (head_dim, value_dim))
    return 64 if head_dim > _MOST_COLUMNS else block_d, block_v


def _columns_of(query: Tensor, value: Tensor) -> tuple[int, int]:
    return _product_columns(query.device.index, query.dtype, query.shape[3], value.shape[3])


def forward_tiles(query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tiles:
    columns = _columns_of(query, value)
    single = query.dtype == torch.float32
    block_q, block_k, warps, stages = _table_row(max(columns), single, _device(query), params)[0]
    if params.batch_invariant:
        group = query.shape[1] // key.shape[1]
        # The largest power of two that divides it: few queries fill a tile too.
        pack = min(group & -group, 16)
        return Tiles(block_q, block_k, *columns, warps, stages, pack)
    block_q = min(_cap(block_q, params.block_q, 16), _padded(query.shape[2]))
    return Tiles(block_q, _cap(block_k, params.block_k, 16), *columns, warps, stages)


def decodes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the keys are to be split over programs.

    They are where a tile holds the queries of all heads of a group, and where a part of a prompt,
    or the requests of a server, meet so many keys that tiles of queries leave processors idle.
    """
    length, key_length = query.shape[2], key.shape[2]
    rows = length * (query.shape[1] // key.shape[1])
    block_q = _decode_rows(query, value)
    if length == 1 or rows <= block_q:
        return True
    least, for_each = _LONG
    if key_length < max(least, for_each * length):
        return False
    programs = triton.cdiv(rows, block_q) * query.shape[0] * key.shape[1]
    return 2 * programs <= _device(query).processors


def _decode_rows(query: Tensor, value: Tensor) -> int:
    narrow = _device(query).shared_memory < 96 * 2**10
    return _DECODE_ROWS // 2 if narrow and max(_columns_of(query, value)) > 128 else _DECODE_ROWS


@dataclass(frozen=True, slots=True)
class DecodeTiles:
    """Tile sizes of few queries, and into how many parts the keys are split.

    Attributes:
        programs: of one split.
        resident: programs that run at the same time.
    """

    tiles: Tiles
    programs: int
    resident: int

    def splits(self, key_length: int) -> int:
        blocks = triton.cdiv(key_length, max(self.tiles.block_k, _SPLIT_KEYS))
        return _splits(self.programs, self.resident, blocks)


def decode_tiles(query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> DecodeTiles:
    batch, heads, query_length, _ = query.shape
    key_heads, device = key.shape[1], _device(query)
    single = query.dtype == torch.float32
    block_d, block_v = _columns_of(query, value)
    rows = query_length * (heads // key_heads)
    block_q = min(_padded(rows), _decode_rows(query, value))
    memory, most_scores = device.shared_memory, _MOST_SCORES
    if not _few_terms(params):
        most_scores = most_scores if memory >= 128 * 2**10 else most_scores // 2
        memory = min(memory, 128 * 2**10)
    block_k, stages, resident = _look_up(_DECODE_TABLE, memory, single, max(block_d, block_v))
    block_k = min(block_k, most_scores // block_q)
    programs = batch * key_heads * triton.cdiv(value.shape[3], block_v)
    programs *= triton.cdiv(rows, block_q)
    tiles = Tiles(block_q, block_k, block_d, block_v, 4, stages, heads // key_heads)
    return DecodeTiles(tiles, programs, resident * device.processors)


@lru_cache
def _splits(programs: int, resident: int, most: int) -> int:
    """Into how many parts to split the keys of each program.

    The fewest waves of ``resident`` programs; a part more costs a fiftieth, for its merge.
    """

    def cost(splits: int) -> float:
        return triton.cdiv(programs * splits, resident) / splits * (1 + splits / 50)

    return min(range(1, max(1, most) + 1), key=cost)


@dataclass(frozen=True, slots=True)
class BackwardTiles:
    """Tile sizes of the backward passes: dK and dV, or dK alone beside a pass for dV; dQ."""

    dkdv: Tiles
    dq: Tiles
    dv: Tiles | None


def backward_tiles(
    query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
) -> BackwardTiles:
    head_dim, value_dim = query.shape[3], value.shape[3]
    device = _device(query)
    single = query.dtype == torch.float32
    width = max(_padded(head_dim), _padded(value_dim))
    limit = 128 if single else _MOST_COLUMNS
    if width > limit:
        # One program per part of the head dim; all parts together read Q, K, V once for each.
        launches = [(32, 64, 64, 64, 4, 1)] * 2
    else:
        sizes = (_columns(head_dim, single, device), _columns(value_dim, single, device))
        _, *launches = _table_row(width, single, device, params)
        launches = [(*launch[:2], *sizes, *launch[2:]) for launch in launches]

    def capped(block_q, block_k, *rest):
        if params.batch_invariant:
            return Tiles(block_q, block_k, *rest)
        return Tiles(
            min(_cap(block_q, params.block_q, 16), _padded(query.shape[2])),
            _cap(block_k, params.block_k, 16),
            *rest,
        )

    dkdv, dq, *dv = (capped(*launch) for launch in launches)
    return BackwardTiles(dkdv, dq, *dv or [None])


def marked_tiles(query: Tensor, value: Tensor) -> BackwardTiles:
    """Of the passes that compute anew what another kernel marked, which is rare.

    Small ones: they are compiled for all calls with a mask, and take a third of the time to.
    """
    device, single = _device(query), query.dtype == torch.float32
    block_d, block_v = (_columns(x.shape[3], single, device) for x in (query, value))
    tiles = Tiles(32, 32, block_d, block_v, warps=4, stages=1)
    return BackwardTiles(tiles, tiles, None)


def tma_tiles(tensor: Tensor, params: AttentionParams, rows: int, columns: int) -> Tma:
    """How TMA copies [rows, columns] tiles of a [B, H, T, D] tensor, where it can and that pays."""
    if (
        not _device(tensor).tma
        or tensor.element_size() != 2
        or params.dense is not None  # ptxas 12.8 crashes on both in one loop
        or params.batch_invariant  # products may be made of other instructions
        or tensor.shape[2] < _TMA_LENGTH
        or not tma_fits(tensor)
    ):
        return Tma()
    return tma_of(tensor, rows, columns)


def tma_fits(tensor: Tensor) -> bool:
    """Whether the strides of a [B, H, T, D] tensor, the last of them 1, are those of TMA."""
    if tensor.data_ptr() % 16:
        return False
    step, shape = 16 // tensor.element_size(), tensor.shape
    for axis, stride in enumerate(tensor.stride()[:3]):
        if (stride == 0 or stride % step) and shape[axis] > 1:
            return False
    return True


def tma_of(tensor: Tensor, rows: int, columns: int, layout: Any = None) -> Tma:
    """`tma_tiles` where TMA is known to copy them."""
    shape = tuple(tensor.shape)
    # An axis of one element is never stepped along, but its stride is checked.
    axes = zip(shape[:3], tensor.stride(), strict=False)
    strides = (*[stride if length > 1 else 16 for length, stride in axes], 1)
    return Tma(shape, strides, (1, 1, rows, columns), layout)


def tma_run(tensor: Tensor | None, tiles: Tma) -> Tma:
    """How TMA copies what belongs to the rows of ``tiles``: runs of a tensor without gaps."""
    if (
        not tiles.block
        or tensor is None
        or not tensor.is_contiguous()
        or tensor.data_ptr() % 16
        or (tensor.numel() > tensor.shape[-1] and tensor.shape[-1] % 4)  # rows start on 16 bytes
        or tensor.numel() >= 2**31
    ):
        return Tma()
    return tma_of_run(tensor, tiles.block[2])


def tma_of_run(tensor: Tensor, length: int, layout: Any = None) -> Tma:
    """`tma_run` where TMA is known to copy it."""
    return Tma((tensor.numel(),), (1,), (length,), layout)


def fp32_precision(query: Tensor) -> str | bool | None:
    """PyTorch's own switch for products of float32; None where it has no say."""
    # The switch of old, allow_tf32, cannot be read once this one was set.
    is_single = query.dtype == torch.float32
    return torch.backends.cuda.matmul.fp32_precision if is_single else None


def _tf32(query: Tensor) -> bool:
    """Whether products take TF32; only some of AMD's GPUs have it."""
    return fp32_precision(query) == "tf32" and query.is_cuda and not torch.version.hip


def launch_flags(query: Tensor, key: Tensor, params: AttentionParams) -> Flags:
    """What is decided when the kernels of this call are compiled."""
    left, right = params.window_left is not None, params.window_right is not None
    intervals = params.query_start is not None
    return Flags(
        MASK=(INTERVALS if intervals else BAND if left or right else NO_MASK).value,
        LEFT=left,
        RIGHT=right,
        SOFTCAP=params.softcap > 0,
        DROPOUT=params.dropout_p > 0,
        PLAIN=params.plain and params.scale > 0,
        RESCUE=params.batch_invariant or hides(query, key, params),
        UNIFORM=params.batch_invariant,
        PRECISION="tf32" if _tf32(query) else "ieee",
    )
