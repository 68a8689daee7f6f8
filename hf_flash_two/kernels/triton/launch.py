"""Kernel launches with all but their tensors decided, remembered for the next call of their kind.

Small models are bound by what the host does before a kernel runs. All layers and most steps make
calls of the same layout, so tiles, grid, strides and flags are worked out for the first of them,
and the compiled kernel is launched directly from then on.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from functools import lru_cache, partial
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from hf_flash_two.kernels.params import AttentionParams, Forward
from hf_flash_two.kernels.triton.args import Tiled, Tma
from hf_flash_two.kernels.triton.config import Tiles, fp32_precision

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
    parts: list = [make, query.device.index, params.numbers, fp32_precision(query)]
    parts += [(x.dtype, x.shape, x.stride(), x.data_ptr() % 16) for x in inputs]
    parts += [x is not None and (x.dtype, x.stride(), x.data_ptr() % 16) for x in results]
    parts += [
        x is not None and (x.dtype, x.shape, x.stride(), x.data_ptr() % 16) for x in params.tensors
    ]
    with on_device(query):
        return plan_for(tuple(parts), make, params, *inputs, *results)


def plan_for(kind: tuple, make: Callable[..., Plan], *given: Any) -> Plan:
    """``make(*given)``, once for each kind."""
    plan = plans.get(kind)
    if plan is None:
        if len(plans) >= _MOST_PLANS:
            plans.clear()
        plan = plans[kind] = make(*given)
    return plan


_HERE = nullcontext()


def on_device(tensor: Tensor) -> AbstractContextManager:
    """Makes the GPU of ``tensor`` the current one, where it is not."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(tensor.device)


def current_stream(tensor: Tensor) -> int:
    """The stream that kernels on the device of ``tensor`` are put on; 0 without a GPU."""
    if not tensor.is_cuda:
        return 0
    active: Any = driver.active
    return active.get_current_stream(tensor.device.index)


def is_capturing(tensor: Tensor) -> bool:
    """Whether kernels on the device of ``tensor`` are recorded into a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def with_plan(
    make: Callable[..., Plan],
    run: Callable[..., tuple[Tensor, ...]],
    params: AttentionParams,
    query: Tensor,
    key: Tensor,
    value: Tensor,
) -> Forward:
    """``run(plan, query, key, value, params)``, planned for calls that differ in values only."""
    plan = planned(make, params, (query, key, value))

    def call(
        query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
    ) -> tuple[Tensor, ...]:
        with on_device(query):
            return run(plan, query, key, value, params)

    return call


class Launch:
    """A kernel with all but its tensors decided; called with them, in order.

    A kernel takes first what comes anew in every call, then ``scalars``, then ``constants``. If
    lengths come anew too, there is no ``grid``: each call gives it first, and numbers may change
    so far as Triton compiles the same for them.

    Args:
        templates: of parameters that are a named tuple of a pointer and numbers, that tuple, a call
            gives the tensor to put into its first place; of TMA descriptors, a `Tma`.
        constants: of compile time, by name.
        options: more of Triton's own, such as ``maxnreg``.
    """

    def __init__(
        self,
        kernel,
        grid: tuple[int, ...] | None,
        templates: Mapping[str, Any],
        scalars: tuple,
        constants: dict,
        tiles: Tiles,
        **options: Any,
    ):
        self._kernel, self._scalars, self._constants = kernel, scalars, constants
        self._grid = None if grid is None else (*grid, 1, 1)[:3]
        self._options = {
            "num_warps": tiles.warps,
            "num_stages": tiles.stages,
            "enable_fp_fusion": True,  # Triton 3.10 no longer does unless it is asked to
            **options,
        }
        count = len(kernel.arg_names) - len(scalars) - len(constants)
        self._templates = [templates.get(name) for name in kernel.arg_names[:count]]
        self._run: Callable | None = None

    def __call__(self, *given: Any) -> None:
        if self._run is not None and not _watched():
            self._run(self._current_stream(self._device), *given)
            return
        grid: Any = self._grid
        if grid is None:
            grid, given = given[0], given[1:]
        arguments = [
            _filled(template, x) for x, template in zip(given, self._templates, strict=True)
        ]
        try:
            compiled = self._kernel[grid](
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
            run, encode = _encoded(compiled)
            self._run = _caller(run, self._grid, handles, given, self._templates, rest, encode)


def _filled(template: Any, given: Any) -> Any:
    """What the JIT is to be given."""
    if isinstance(given, Tiled):
        given, template = given
    if template is None:
        return given
    if not isinstance(template, Tma):
        return type(template)(given, *template[1:])
    if not template.block:
        return None
    shape, strides, block = map(list, template[:3])
    if template.layout is None:
        return TensorDescriptor(given, shape, strides, block)
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

    return GluonDescriptor(given, shape, strides, block, template.layout)


class _Descriptor:
    """What the driver reads of a `TensorDescriptor`; it keeps no tensor alive."""

    padding, round_f32_to_tf32 = "zero", False

    def __init__(self, address: int, dtype: torch.dtype, tma: Tma) -> None:
        self._address, self.dtype = address, dtype
        self.shape, self.strides, self.block_shape = map(list, tma[:3])
        self.base = self

    def data_ptr(self) -> int:
        return self._address


def _encoded(compiled: Any) -> tuple[Callable, Callable | None]:
    """``compiled.run`` as it goes on once descriptors are encoded, and what encodes the n-th.

    Triton goes through all arguments of a launch to encode descriptors anew. Where its function
    that does so cannot be told from the one that launches, both stay as they are.
    """
    run, tiles = compiled.run, getattr(compiled.metadata, "tensordesc_meta", None)
    launch = getattr(run, "launch", None)
    encode = getattr(sys.modules.get(type(run).__module__), "make_tensordesc_arg", None)
    wrapped = inspect.getclosurevars(launch).nonlocals if inspect.isfunction(launch) else {}
    if not tiles or encode is None or "launcher" not in wrapped:
        return run, None
    run = copy(run)
    run.launch = wrapped["launcher"]
    rest = (None,) * (len(inspect.signature(encode).parameters) - 2)
    return run, lambda at, *tile: encode(_Descriptor(*tile), tiles[at], *rest)


def _caller(
    run: Callable,
    grid: tuple | None,
    handles: tuple,
    given: Sequence,
    templates: list,
    rest: tuple,
    encode: Callable | None = None,
) -> Callable:
    """A function of the stream and of what a call gives, which puts ``run``'s arguments together.

    It is written out: one expression with everything known in its place costs the least. Tensors
    become addresses, which the driver is not asked about again.

    Args:
        given: what the first call gave; which of it are tensors is the same in every call.
        encode: see `_encoded`.
    """
    known: dict[str, Any] = {"run": run}
    described = 0

    def descriptor(address: str, dtype: torch.dtype, tma: str, remembered: bool) -> str:
        nonlocal described
        make = _Descriptor if encode is None else partial(encode, described)
        described += 1
        make = constant(lru_cache(_MOST_PLANS)(make) if remembered else make)
        call = f"{make}({address}.data_ptr(), {constant(dtype)}, {tma})"
        return call if encode is None else f"*{call}"

    def constant(value: Any) -> str:
        if type(value) in (int, bool, type(None)):
            return repr(value)
        known[name := f"known_{len(known)}"] = value
        return name

    def varying(name: str, value: Any) -> str:
        if isinstance(value, Tensor):
            return f"{name}.data_ptr()"
        if isinstance(value, Tiled):
            return descriptor(f"{name}[0]", value.tensor.dtype, f"{name}[1]", remembered=False)
        if isinstance(value, tuple):
            parts = [varying(f"{name}[{index}]", part) for index, part in enumerate(value)]
            return f"({', '.join(parts)},)"
        return name if value is not None and grid is None else constant(value)

    def argument(name: str, value: Any, template: Any) -> str:
        if template is None:
            return varying(name, value)
        if not isinstance(template, Tma):
            return f"({', '.join([varying(name, value), *map(constant, template[1:])])})"
        if not template.block:
            return "None"
        return descriptor(name, value.dtype, constant(template), remembered=True)

    names = [f"x_{index}" for index in range(len(given))]
    filled = map(argument, names, given, templates)
    of_grid = ["*grid"] if grid is None else map(constant, grid)
    arguments = [*of_grid, "stream", *map(constant, handles), *filled, *map(constant, rest)]
    parameters = ["stream", *(["grid"] if grid is None else []), *names]
    return eval(f"lambda {', '.join(parameters)}: run({', '.join(arguments)})", known)


def _watched() -> bool:
    """Whether a profiler is to be told of every launch."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
