"""Kernel launches with all but their tensors decided, remembered for the next call of their kind.

Small models are bound by what the host does before a kernel runs. All layers and most steps make
calls of the same layout, so tiles, grid, strides and flags are worked out for the first of them,
and the compiled kernel is launched directly from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from hf_flash_two.kernels.params import AttentionParams
from hf_flash_two.kernels.triton.args import Tma
from hf_flash_two.kernels.triton.config import Tiles

Plan = TypeVar("Plan")
_MOST_PLANS = 4096
plans: dict[tuple, Any] = {}
_DIRECT = (3, 6) <= tuple(int(part) for part in triton.__version__.split(".")[:2]) <= (3, 9)
"""Whether `CompiledKernel.run` is known to take a kernel's arguments as they are, tuples included;
of other versions all launches go through the JIT."""


def planned(
    make: Callable[..., Plan],
    params: AttentionParams,
    inputs: tuple[Tensor, Tensor, Tensor],
    results: tuple[Tensor | None, ...] = (),
) -> Plan:
    """What ``make`` makes of these, once for all calls that differ in tensors' values only.

    Args:
        inputs: query, key and value.
        results: what was computed of them, whose shapes follow from theirs.
    """
    query = inputs[0]
    parts: list = [make, query.device.index, params.numbers]
    parts += [(x.dtype, x.shape, x.stride(), x.data_ptr() % 16) for x in inputs]
    parts += [x is not None and (x.dtype, x.stride(), x.data_ptr() % 16) for x in results]
    parts += [
        x is not None and (x.dtype, x.shape, x.stride(), x.data_ptr() % 16) for x in params.tensors
    ]
    if query.dtype == torch.float32:
        parts.append(torch.backends.cuda.matmul.fp32_precision)
    key = tuple(parts)
    plan = plans.get(key)
    if plan is None:
        if len(plans) >= _MOST_PLANS:
            plans.clear()
        plan = plans[key] = make(params, *inputs, *results)
    return plan


_HERE = nullcontext()


def on_device(tensor: Tensor) -> AbstractContextManager:
    """Makes the GPU of ``tensor`` the current one, where it is not."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(tensor.device)


class Launch:
    """A kernel with all but its tensors decided; called with them, in order.

    A kernel takes first what comes anew in every call, then ``scalars``, then ``constants``.

    Args:
        templates: of parameters that are a named tuple of a pointer and numbers, that tuple, a call
            gives the tensor to put into its first place; of TMA descriptors, a `Tma`.
        constants: of compile time, by name.
    """

    def __init__(
        self,
        kernel,
        grid: tuple[int, ...],
        templates: Mapping[str, Any],
        scalars: tuple,
        constants: dict,
        tiles: Tiles,
    ):
        self._kernel, self._scalars, self._constants = kernel, scalars, constants
        self._grid = (*grid, 1, 1)[:3]
        self._options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
        count = len(kernel.arg_names) - len(scalars) - len(constants)
        self._templates = [templates.get(name) for name in kernel.arg_names[:count]]
        self._run: Callable | None = None

    def __call__(self, *given: Tensor | tuple | None) -> None:
        if self._run is not None and not _watched():
            self._run(self._current_stream(self._device), *given)
            return
        arguments = [
            x if template is None else _filled(template, x)
            for x, template in zip(given, self._templates, strict=True)
        ]
        try:
            compiled = self._kernel[self._grid](
                *arguments, *self._scalars, **self._constants, **self._options
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
        if _DIRECT and isinstance(compiled, CompiledKernel):
            names = self._kernel.arg_names[len(given) + len(self._scalars) :]
            rest = (*self._scalars, *(self._constants[name] for name in names))
            no_hooks = (None, None, None)
            handles = (compiled.function, compiled.packed_metadata, *no_hooks)
            # A plan is of one device.
            active: Any = driver.active
            self._device = active.get_current_device()
            self._current_stream = active.get_current_stream
            run: Any = compiled.run
            self._run = _caller(run, self._grid, handles, given, self._templates, rest)


def _filled(template: Any, tensor: Any) -> Any:
    if not isinstance(template, Tma):
        return type(template)(tensor, *template[1:])
    shape, strides, block = map(list, template)
    return TensorDescriptor(tensor, shape, strides, block) if template.block else None


class _Address(NamedTuple):
    """What `TensorDescriptor` wants to know of a tensor; it keeps none alive."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


@lru_cache(_MOST_PLANS)
def _descriptor(address: int, dtype: torch.dtype, tma: Tma) -> TensorDescriptor:
    shape, strides, block = map(list, tma)
    return TensorDescriptor(_Address(address, dtype), shape, strides, block)


def _caller(
    run: Callable, grid: tuple, handles: tuple, given: tuple, templates: list, rest: tuple
) -> Callable:
    """A function of the stream and of what a call gives, which puts ``run``'s arguments together.

    It is written out: one expression with everything known in its place costs the least. Tensors
    become addresses, which the driver is not asked about again.

    Args:
        given: what the first call gave; which of it are tensors is the same in every call.
    """
    known: dict[str, Any] = {"run": run, "descriptor": _descriptor}

    def constant(value: Any) -> str:
        if type(value) in (int, bool, type(None)):
            return repr(value)
        known[name := f"known_{len(known)}"] = value
        return name

    def varying(name: str, value: Any) -> str:
        if isinstance(value, Tensor):
            return f"{name}.data_ptr()"
        if isinstance(value, tuple):
            parts = [varying(f"{name}[{index}]", part) for index, part in enumerate(value)]
            return f"({', '.join(parts)},)"
        return constant(value)

    def argument(name: str, value: Any, template: Any) -> str:
        if template is None:
            return varying(name, value)
        if not isinstance(template, Tma):
            return f"({', '.join([varying(name, value), *map(constant, template[1:])])})"
        if not template.block:
            return "None"
        return f"descriptor({name}.data_ptr(), {constant(value.dtype)}, {constant(template)})"

    names = [f"x_{index}" for index in range(len(given))]
    filled = map(argument, names, given, templates)
    arguments = [
        *map(constant, grid), "stream", *map(constant, handles), *filled, *map(constant, rest)
    ]  # fmt: skip
    return eval(f"lambda {', '.join(['stream', *names])}: run({', '.join(arguments)})", known)


def _watched() -> bool:
    """Whether a profiler is to be told of every launch."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
