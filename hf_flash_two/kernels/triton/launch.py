"""Kernel launches with all but their tensors decided, remembered for the next call of their kind.

Small models are bound by what the host does before a kernel runs. All layers and most steps make
calls of the same layout, so tiles, grid, strides and flags are worked out for the first of them,
and the compiled kernel is launched directly from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from hf_flash_two.kernels.params import TENSORS, AttentionParams
from hf_flash_two.kernels.triton.config import Tiles, device_of

Plan = TypeVar("Plan")
_MOST_PLANS = 4096
plans: dict[tuple, Any] = {}
_DIRECT = (3, 6) <= tuple(int(part) for part in triton.__version__.split(".")[:2]) <= (3, 9)
"""Whether `CompiledKernel.run` is known to take a kernel's arguments as they are, tuples included;
of other versions all launches go through the JIT."""
_TENSORS, _NUMBERS = slice(0, len(TENSORS)), slice(len(TENSORS), None)


def planned(
    make: Callable[..., Plan], params: AttentionParams, query: Tensor, *tensors: Tensor | None
) -> Plan:
    """What ``make`` makes of these, once for all calls that differ in tensors' values only."""
    fields = cast(Sequence, params)
    layouts = tuple(
        [
            None if x is None else (x.dtype, x.shape, x.stride(), x.data_ptr() % 16)
            for x in (query, *tensors, *fields[_TENSORS])
        ]
    )
    index = query.device.index
    key = (
        make, layouts, index, device_of(index), torch.backends.cuda.matmul.fp32_precision,
        fields[_NUMBERS],
    )  # fmt: skip
    plan = plans.get(key)
    if plan is None:
        if len(plans) >= _MOST_PLANS:
            plans.clear()
        plan = plans[key] = make(params, query, *tensors)
    return plan


class Launch:
    """A kernel with all but its tensors decided; called with them, in order.

    A kernel takes first what comes anew in every call, then ``scalars``, then ``constants``.

    Args:
        templates: of parameters that are a named tuple of a pointer and numbers, that tuple; a call
            gives the tensor to put into its first place.
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

    def __call__(self, *given: Tensor | TensorDescriptor | tuple | None) -> None:
        if self._run is not None and not _watched():
            self._run(self._current_stream(self._device), *given)
            return
        arguments = [
            x if template is None else type(template)(x, *template[1:])
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
            self._run = _caller(run, self._grid, handles, self._templates, rest)


_LITERALS = (int, bool, type(None))


def _caller(run: Callable, grid: tuple, handles: tuple, templates: list, rest: tuple) -> Callable:
    """A function of the stream and of what a call gives, which puts ``run``'s arguments together.

    It is written out: one expression with everything known in its place costs the least.
    """
    known: dict[str, Any] = {"run": run}

    def written(values: Iterable) -> list[str]:
        names = []
        for value in values:
            if type(value) in _LITERALS:
                names.append(repr(value))
            else:
                names.append(f"known_{len(known)}")
                known[names[-1]] = value
        return names

    given = [f"x_{index}" for index in range(len(templates))]
    filled = [
        x if template is None else f"({', '.join([x, *written(template[1:])])})"
        for x, template in zip(given, templates, strict=True)
    ]
    arguments = [*written(grid), "stream", *written(handles), *filled, *written(rest)]
    return eval(f"lambda {', '.join(['stream', *given])}: run({', '.join(arguments)})", known)


def _watched() -> bool:
    """Whether a profiler is to be told of every launch."""
    hooks = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    return any([getattr(hook, "calls", hook) for hook in hooks])
