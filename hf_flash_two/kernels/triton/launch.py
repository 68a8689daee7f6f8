"""Kernel launches with all but their tensors decided, remembered for the next call of their kind.

Small models are bound by what the host does before a kernel runs. All layers and most steps make
calls of the same layout, so tiles, grid, strides and flags are worked out for the first of them,
and the compiled kernel is launched directly from then on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from hf_flash_two.kernels.params import TENSORS, AttentionParams
from hf_flash_two.kernels.triton.config import Tiles, device_of

Plan = TypeVar("Plan")
_MOST_PLANS = 4096
plans: dict[tuple, object] = {}
_TENSORS, _NUMBERS = slice(0, len(TENSORS)), slice(len(TENSORS), None)


def planned(make: Callable[..., Plan], params: AttentionParams, *tensors: Tensor | None) -> Plan:
    """``make(params, *tensors)``, once for all calls that differ in their tensors' values only."""
    layouts = tuple(
        [
            None if x is None else (x.dtype, x.shape, x.stride(), x.data_ptr() % 16)
            for x in (*tensors, *params[_TENSORS])
        ]
    )
    index = tensors[0].device.index
    key = (
        make, layouts, index, device_of(index), torch.backends.cuda.matmul.fp32_precision,
        params[_NUMBERS],
    )  # fmt: skip
    plan = plans.get(key)
    if plan is None:
        if len(plans) >= _MOST_PLANS:
            plans.clear()
        plan = plans[key] = make(params, *tensors)
    return plan


class Launch:
    """A kernel, its grid, scalars and constants; called with its tensors, in order.

    A kernel takes tensors first, then ``scalars``, then compile-time ``constants``.
    """

    def __init__(
        self, kernel, grid: tuple[int, ...], scalars: tuple, constants: dict, tiles: Tiles
    ):
        self._kernel, self._scalars, self._constants = kernel, scalars, constants
        self._grid = (*grid, 1, 1)[:3]
        self._options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
        self._compiled: CompiledKernel | None = None

    def __call__(self, *tensors: Tensor | TensorDescriptor | None) -> None:
        if self._compiled is not None and not _watched():
            stream = self._current_stream(self._device)
            self._compiled.run(*self._grid, stream, *self._handles, *tensors, *self._rest)
            return
        try:
            compiled = self._kernel[self._grid](
                *tensors, *self._scalars, **self._constants, **self._options
            )
        except RuntimeError as error:
            # Going on without Triton would be right and, on a GPU, many times slower: say so.
            if "C compiler" in str(error):
                raise RuntimeError(
                    "kernel: Triton finds no C compiler, with which it builds its link to the "
                    "driver once; install gcc or clang, or set CC, or choose kernel='blockwise'"
                ) from error
            raise
        # Interpreted kernels are not compiled.
        if isinstance(compiled, CompiledKernel):
            decided = len(tensors) + len(self._scalars)
            constants = (self._constants[name] for name in self._kernel.arg_names[decided:])
            self._rest = (*self._scalars, *constants)
            no_hooks = (None, None, None)
            self._handles = (compiled.function, compiled.packed_metadata, *no_hooks)
            # A plan is of one device.
            self._device = driver.active.get_current_device()
            self._current_stream = driver.active.get_current_stream
            self._compiled = compiled


def _watched() -> bool:
    """Whether a profiler is to be told of every launch."""
    hooks = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    return any([getattr(hook, "calls", hook) for hook in hooks])
