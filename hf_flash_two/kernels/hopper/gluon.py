"""Gluon as the Hopper kernels use it, under one name in Triton 3.6 to 3.9.

What was renamed is looked up when this is imported. `versions` says which of them are used.
"""

# What stands in a kernel is Triton's language, which its types do not describe.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# pyright: reportRedeclaration=false

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from triton._C.libtriton import ir
from triton.experimental.gluon import jit
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

__all__ = [
    "allocate_barriers", "asm", "barrier", "fence_async_shared", "gl", "jit", "mbarrier",
    "reinterpret", "shared_layout", "tma_add", "tma_load", "tma_store", "tma_store_done",
    "tma_store_read", "warpgroup_mma", "warpgroup_mma_wait",
]  # fmt: skip


def _first(owner: Any, *names: str) -> Callable:
    """What ``owner`` has under the first of these names that it has."""
    return next(getattr(owner, name) for name in names if hasattr(owner, name))


barrier = _first(gl, "barrier", "thread_barrier")
"""All warps of a partition wait for each other: ``barrier()``."""

# The older names are still there in 3.9, and raise.
tma_load = _first(tma, "async_load", "async_copy_global_to_shared")
"""``tma_load(desc, coord, barrier, destination)``; the barrier is told the bytes to expect."""
tma_store = _first(tma, "async_store", "async_copy_shared_to_global")
"""``tma_store(desc, coord, source)``."""
tma_store_read = tma.store_wait
"""``tma_store_read(n)``: waits until all but n stores have read what they store."""


@builtin
def _reduce_add(desc, coord, source, _semantic=None):
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(
        ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, coord, source.handle
    )


tma_add = getattr(tma, "async_atomic_add", _reduce_add)
"""``tma_add(desc, coord, source)``: adds to what is there, in whatever order additions arrive."""


@jit
def asm(INSTRUCTIONS: gl.constexpr, WARPS: gl.constexpr):
    """PTX that each thread of a partition of ``WARPS`` warps runs once."""
    x = gl.arange(0, 32 * WARPS, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    gl.inline_asm_elementwise(
        INSTRUCTIONS + " mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
    )


if "read_only" in inspect.signature(tma.store_wait).parameters:

    @jit
    def tma_store_done(N: gl.constexpr, WARPS: gl.constexpr):
        """Waits until all but N stores or additions are in global memory."""
        tma.store_wait(N, read_only=False)

else:

    @jit
    def tma_store_done(N: gl.constexpr, WARPS: gl.constexpr):
        """Waits until all but N stores or additions are in global memory."""
        if N == 0:
            asm("cp.async.bulk.wait_group 0;", WARPS)
        else:
            gl.static_assert(N == 1)
            asm("cp.async.bulk.wait_group 1;", WARPS)


_reinterpret = _first(gl.shared_memory_descriptor, "reinterpret", "_reinterpret")


@builtin
def reinterpret(memory, dtype, shape, layout, _semantic=None):
    """Shared memory read as another dtype, shape and layout of as many bytes."""
    return _reinterpret(memory, dtype, shape, layout, _semantic=_semantic)


@jit
def allocate_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """``COUNT`` mbarriers, each of ``ARRIVALS`` arrivals: shared memory to take ``index`` of."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


_DTYPES = {
    torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32,
    torch.int32: gl.int32,
}  # fmt: skip


def shared_layout(block: Sequence[int], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """The layout in shared memory of a tile that TMA copies and products read."""
    return gl.NVMMASharedLayout.get_default_for(list(block), _DTYPES[dtype])
