"""From validated settings to a kernel: through a library op, or straight in eager mode.

Whatever traces, transforms or watches operations meets library ops, opaque to the compiler, with
autograd kernels that hold no arithmetic: the forward, the backward, and the derivative of each
along a direction, of which forward mode and second derivatives consist. Their names contain
``flash_attn`` so that policies of selective checkpointing recognise them. Where nobody does, one
small autograd function calls the same kernels: small models are bound by what the host does before
a kernel runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch._ops import OpOverloadPacket
from torch.autograd import forward_ad
from torch.autograd.function import Function, _SingleLevelFunction
from torch.nn import Parameter
from torch.utils._device import DeviceContext

from hf_flash_two.kernels import Kernel, derivatives, invariant, select
from hf_flash_two.kernels.blockwise.tangents import Tangents
from hf_flash_two.kernels.params import (
    SCHEMA,
    TENSORS,
    AttentionParams,
    Prepared,
    empty_lse,
    empty_output,
    lowest_logits,
)
from hf_flash_two.masks import KEY_GROUP

_DTENSOR: type | tuple[type, ...] = ()
if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor as _DTENSOR

_INPUTS = {"query": "Tensor", "key": "Tensor", "value": "Tensor"}
_RESULTS = {"out": "Tensor", "lse": "Tensor"}
_SETTINGS = SCHEMA | {"kernel": "str"}
_FORWARD_SCHEMA = _INPUTS | _SETTINGS
_BACKWARD_SCHEMA = (
    {"d_out": "Tensor?", "d_lse": "Tensor?"}
    | _INPUTS
    | _RESULTS
    | _SETTINGS
    | {"need_d_bias": "bool"}
)
FORWARD_NAMES, BACKWARD_NAMES = tuple(_FORWARD_SCHEMA), tuple(_BACKWARD_SCHEMA)
"""The arguments of the two ops in order."""
DIFFERENTIABLE = (*_INPUTS, "bias", "sinks")
"""The arguments whose gradients the backward op returns, and those that `_Eager` takes first."""
_TANGENTS = {f"{name}_dot": "Tensor?" for name in DIFFERENTIABLE}
_FORWARD_JVP_SCHEMA = _INPUTS | _RESULTS | _TANGENTS | _SETTINGS
_BACKWARD_JVP_SCHEMA = (
    {"d_out": "Tensor?", "d_lse": "Tensor?"}
    | _INPUTS
    | _RESULTS
    | {"out_dot": "Tensor?", "lse_dot": "Tensor?"}
    | _TANGENTS
    | _SETTINGS
    | {"need_d_bias": "bool"}
)
_FORWARD_JVP_NAMES = tuple(_FORWARD_JVP_SCHEMA)


def _signature(schema: dict[str, str]) -> str:
    return ", ".join(f"{kind} {name}" for name, kind in schema.items())


_LIBRARY = torch.library.Library("hf_flash_two", "DEF")
_LIBRARY.define(f"flash_attn_fwd({_signature(_FORWARD_SCHEMA)}) -> (Tensor, Tensor, Tensor)")
_GRADIENTS = f"({', '.join(['Tensor'] * len(DIFFERENTIABLE))})"
_LIBRARY.define(f"flash_attn_bwd({_signature(_BACKWARD_SCHEMA)}) -> {_GRADIENTS}")
_LIBRARY.define(f"flash_attn_fwd_jvp({_signature(_FORWARD_JVP_SCHEMA)}) -> (Tensor, Tensor)")
_LIBRARY.define(f"flash_attn_bwd_jvp({_signature(_BACKWARD_JVP_SCHEMA)}) -> {_GRADIENTS}")
# Where an argument of the forward op stands, for what is done in every call.
_SAVED = slice(0, len(_INPUTS) + len(TENSORS))
_NOT_SAVED = slice(_SAVED.stop, None)
_BIAS, _SINKS = FORWARD_NAMES.index("bias"), FORWARD_NAMES.index("sinks")
# The arguments of the backward op that do not come last, and those of the forward's derivative.
_HEAD, _JVP_HEAD = 2 + len(_INPUTS) + len(_RESULTS), len(_INPUTS | _RESULTS | _TANGENTS)

observers: list[Callable[[str, str, Tensor, Tensor, Tensor, AttentionParams], None]] = []
"""Called when a kernel is to run, with "forward" or "backward", its name and what it is given."""


def is_eager(*tensors: Tensor | None) -> bool:
    """Whether these are plain tensors and what is done to them is run, and nothing else.

    The compiler, functorch, modes, forward-mode derivatives and subclasses want to see operations.
    A default device is a mode too, but sees none: see `_without_default_device`.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if torch._C._len_torch_dispatch_stack():
        return False
    for place in range(torch._C._len_torch_function_stack()):
        if type(torch._C._get_function_stack_at(place)) is not DeviceContext:
            return False
    if forward_ad._current_level >= 0 or torch._C._is_tracing():
        return False
    return are_plain(tensors)


_AS_IT_IS = nullcontext()


def _without_default_device() -> AbstractContextManager:
    """Kernels say where their tensors are; with a default all of PyTorch's functions are slower."""
    return torch._C.DisableTorchFunction() if torch._C._len_torch_function_stack() else _AS_IT_IS


def are_plain(tensors: Iterable[Tensor | None]) -> bool:
    """Whether all have values, and none is of a subclass, which may do anything with operations."""
    for x in tensors:
        if x is not None and (type(x) is not Tensor and type(x) is not Parameter or x.is_meta):
            return False
    return True


def is_recorded(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is done to any of them."""
    return torch.is_grad_enabled() and any([x is not None and x.requires_grad for x in tensors])


def _laid_out(params: AttentionParams, keys: int) -> AttentionParams:
    """The settings, as every kernel may rely on it: what is per key and per head without gaps."""
    if params.query_start is None and params.alibi_slopes is None and params.sinks is None:
        return params
    groups = -(-keys // KEY_GROUP)
    if params.key_bounds is not None and params.key_bounds.shape[1] != groups:
        params = params._replace(key_bounds=params.key_bounds[:, :groups])
    names = ("query_start", "query_stop", "key_bounds", "alibi_slopes", "sinks")
    strided = {
        name: tensor.contiguous()
        for name in names
        if (tensor := getattr(params, name)) is not None and not tensor.is_contiguous()
    }
    return params._replace(**strided) if strided else params


def _select(
    direction: str, name: str, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
) -> Kernel:
    kernel = select(name, query, key, value, params, direction == "backward")
    for observe in observers:
        observe(direction, kernel.name, query, key, value, params)
    return kernel


def _forward(
    query: Tensor, key: Tensor, value: Tensor, params: AttentionParams, kernel: str
) -> tuple[Tensor, ...]:
    if not query.numel():
        results = empty_output(query, value.shape[3]), empty_lse(query)
        return (*results, lowest_logits(query)) if params.max_logits else results
    params = _laid_out(params, key.shape[2])
    chosen = _select("forward", kernel, query, key, value, params)
    if params.batch_invariant:
        return invariant.forward(chosen, query, key, value, params)
    return chosen.forward(query, key, value, params)


def _backward(
    d_out: Tensor | None,
    d_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    params: AttentionParams,
    kernel: str,
    need_d_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    d_out = torch.zeros_like(out) if d_out is None else d_out
    params = _laid_out(params, key.shape[2])
    if query.numel():
        out = out if out.stride(3) == 1 else out.contiguous()
        chosen = _select("backward", kernel, query, key, value, params)
        run = partial(invariant.backward, chosen) if params.batch_invariant else chosen.backward
        return run(d_out, d_lse, query, key, value, out, lse, params, need_d_bias)
    dq, dk, dv = (empty_output(x, x.shape[3]).zero_() for x in (query, key, value))
    extras = (params.bias if need_d_bias else None, params.sinks)
    d_bias, d_sinks = (None if x is None else x.new_zeros(x.shape) for x in extras)
    return dq, dk, dv, d_bias, d_sinks


# Gradients are on where the levels of torch.func are passed: nothing inside may be recorded.
@torch.no_grad()
def _forward_op(query, key, value, *settings):
    *params, kernel = settings
    results = _forward(query, key, value, AttentionParams(*params), kernel)
    return results if len(results) == 3 else (*results, query.new_empty(0))


@torch.no_grad()
def _backward_op(d_out, d_lse, query, key, value, out, lse, *settings):
    *params, kernel, need_d_bias = settings
    params = AttentionParams(*params)
    grads = _backward(d_out, d_lse, query, key, value, out, lse, params, kernel, need_d_bias)
    return tuple(query.new_empty(0) if grad is None else grad for grad in grads)


def _or_zeros(given: Iterable[Tensor | None], like: Iterable[Tensor]) -> list[Tensor]:
    pairs = zip(given, like, strict=True)
    return [torch.zeros_like(x) if tensor is None else tensor for tensor, x in pairs]


@torch.no_grad()
def _forward_jvp_op(query, key, value, out, lse, *more):
    along, bias_and_sinks, (*params, kernel) = more[:3], more[3:5], more[5:]
    tangents = Tangents(*_or_zeros(along, (query, key, value)), *bias_and_sinks)
    compute, _ = derivatives(kernel)
    params = _laid_out(AttentionParams(*params), key.shape[2])
    _check_derived(params)
    return compute(query, key, value, out, lse, tangents, params)


@torch.no_grad()
def _backward_jvp_op(d_out, d_lse, query, key, value, out, lse, out_dot, lse_dot, *more):
    along, bias_and_sinks, (*params, kernel, need_d_bias) = more[:3], more[3:5], more[5:]
    tangents = Tangents(*_or_zeros(along, (query, key, value)), *bias_and_sinks)
    d_out, out_dot, lse_dot = _or_zeros((d_out, out_dot, lse_dot), (out, out, lse))
    _, compute = derivatives(kernel)
    params = _laid_out(AttentionParams(*params), key.shape[2])
    _check_derived(params)
    grads = compute(
        query, key, value, out, lse, tangents, params, d_out, d_lse, out_dot, lse_dot, need_d_bias
    )
    return tuple(query.new_empty(0) if grad is None else grad for grad in grads)


def _check_derived(params: AttentionParams) -> None:
    if params.batch_invariant:
        raise ValueError(
            "batch_invariant: forward-mode and second derivatives are not batch-invariant; compute "
            "the call without it"
        )


def _forward_fake(query, key, value, *settings):
    *params, _ = settings
    wanted = AttentionParams(*params).max_logits
    max_logits = lowest_logits(query) if wanted else query.new_empty(0)
    return empty_output(query, value.shape[3]), empty_lse(query), max_logits


def _backward_fake(d_out, d_lse, query, key, value, out, lse, *settings):
    *params, _, need_d_bias = settings
    params = AttentionParams(*params)
    inputs = (query, key, value)
    d_inputs = tuple(empty_output(tensor, tensor.shape[3]) for tensor in inputs)
    extras = (params.bias if need_d_bias else None, params.sinks)
    return d_inputs + tuple(
        query.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)
        for tensor in extras
    )


def _forward_jvp_fake(query, key, value, out, lse, *more):
    return empty_output(query, value.shape[3]), empty_lse(query)


def _backward_jvp_fake(d_out, d_lse, query, key, value, out, lse, *more):
    return _backward_fake(d_out, d_lse, query, key, value, out, lse, *more[7:])


def _fold(tensor: Tensor | None, dim: int | None, size: int, batch: int, share: bool):
    """[B or 1, ...] with an extra axis ``dim``, or none, as [size * B, ...]; [1, ...] if shared."""
    if tensor is None:
        return None
    if dim is None:
        if share and tensor.shape[0] == 1:
            return tensor
        tensor = tensor.expand(size, *tensor.shape)
    else:
        tensor = tensor.movedim(dim, 0)
    return tensor.expand(size, batch, *tensor.shape[2:]).reshape(size * batch, *tensor.shape[2:])


def _fold_all(schema: dict[str, str], args, dims, size: int, batch: int, shared: tuple[str, ...]):
    """The op's arguments, all that have batch rows with ``size`` times as many."""
    if dims[tuple(schema).index("seed")] is not None:
        raise ValueError("dropout_seed: vmap over seeds is not supported; the batch index varies")
    return [
        _fold(arg, dim, size, batch, name in shared)
        if kind.startswith("Tensor") and name != "seed"
        else arg
        for (name, kind), arg, dim in zip(schema.items(), args, dims, strict=True)
    ]


def _batch_of(query: Tensor, dim: int | None) -> int:
    return query.shape[0] if dim is None else query.movedim(dim, 0).shape[1]


def _map_forward(op: OpOverloadPacket, schema: dict[str, str], info, in_dims, *args):
    """The rule for vmap of an op that returns out, lse and more, or tangents of theirs."""
    query = tuple(schema).index("query")
    size, batch = info.batch_size, _batch_of(args[query], in_dims[query])
    results = op(*_fold_all(schema, args, in_dims, size, batch, shared=TENSORS))
    unfolded = [x.unflatten(0, (size, batch)) if x.dim() > 1 else x for x in results]
    return tuple(unfolded), tuple(0 if x.dim() > 1 else None for x in results)


def _map_backward(op: OpOverloadPacket, schema: dict[str, str], info, in_dims, *args):
    """The rule for vmap of an op that returns gradients, or tangents of theirs."""
    names = tuple(schema)
    query = names.index("query")
    size, batch = info.batch_size, _batch_of(args[query], in_dims[query])
    # Bias and sinks need a gradient for each mapped sample, so they are never shared.
    grads = op(*_fold_all(schema, args, in_dims, size, batch, shared=()))
    unfolded = [grad.unflatten(0, (size, batch)) if grad.numel() else grad for grad in grads]
    for name in ("bias", "sinks"):
        position, index = names.index(name), DIFFERENTIABLE.index(name)
        if grads[index].numel() and _batch_of(args[position], in_dims[position]) != batch:
            unfolded[index] = unfolded[index].sum(1, keepdim=True)
    return tuple(unfolded), tuple(0 if grad.numel() else None for grad in grads)


def _implement(
    name: str, schema: dict[str, str], run: Callable, fake: Callable, rule: Callable
) -> None:
    full = f"hf_flash_two::{name}"
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(full, fake)
    torch.library.register_vmap(full, partial(rule, getattr(torch.ops.hf_flash_two, name), schema))


_implement("flash_attn_fwd", _FORWARD_SCHEMA, _forward_op, _forward_fake, _map_forward)
_implement("flash_attn_bwd", _BACKWARD_SCHEMA, _backward_op, _backward_fake, _map_backward)
_implement(
    "flash_attn_fwd_jvp", _FORWARD_JVP_SCHEMA, _forward_jvp_op, _forward_jvp_fake, _map_forward
)
_implement(
    "flash_attn_bwd_jvp", _BACKWARD_JVP_SCHEMA, _backward_jvp_op, _backward_jvp_fake, _map_backward
)


def _recording() -> bool:
    """Whether autograd records, backward or forward; no_grad does not end the latter."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


class _Recorded(_SingleLevelFunction):
    """The op's kernel of autograd.

    `torch.func` works one level at a time: each records a node and hands the op on to the next.
    """

    op: ClassVar[OpOverloadPacket]
    apply: ClassVar[Callable]
    _compiled_autograd_key = Function._compiled_autograd_key

    @classmethod
    def call(cls, *args):
        if not _recording():
            return cls.forward(*args)
        with enable_single_level_autograd_function():
            return cls.apply(*args)

    @classmethod
    def forward(cls, *args):
        # Autograd forbids gradients here, also to the levels that are still to come.
        with (
            torch.enable_grad(),
            forward_ad._set_fwd_grad_enabled(True),
            torch._C._AutoDispatchBelowAutograd(),
        ):
            return cls.op(*args)


def _keep(ctx, *tensors: Tensor | None) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


class _Forward(_Recorded):
    op = torch.ops.hf_flash_two.flash_attn_fwd

    @staticmethod
    def setup_context(ctx, inputs, output):
        _keep(ctx, *inputs[_SAVED], *output[:2])
        ctx.mark_non_differentiable(output[2])
        ctx.settings = inputs[_NOT_SAVED]

    @staticmethod
    def backward(ctx, *grad_outputs):
        d_out, d_lse, _ = grad_outputs
        query, key, value, *tensors, out, lse = ctx.saved_tensors
        grads: list[Tensor | None] = [None] * len(FORWARD_NAMES)
        needed = ctx.needs_input_grad
        dq, dk, dv, d_bias, d_sinks = torch.ops.hf_flash_two.flash_attn_bwd(
            d_out, d_lse, query, key, value, out, lse, *tensors, *ctx.settings, needed[_BIAS]
        )
        grads[:3] = dq, dk, dv
        grads[_BIAS] = d_bias if needed[_BIAS] else None
        grads[_SINKS] = d_sinks if needed[_SINKS] else None
        return tuple(grads)

    @staticmethod
    def jvp(ctx, *tangents):
        query, key, value, *tensors, out, lse = ctx.saved_tensors
        along = (*tangents[:3], tangents[_BIAS], tangents[_SINKS])
        found = torch.ops.hf_flash_two.flash_attn_fwd_jvp(
            query, key, value, out, lse, *along, *tensors, *ctx.settings
        )
        return *found, None


class _Backward(_Recorded):
    """The backward op, whose ``out`` and ``lse`` are those of its query, key and value."""

    op = torch.ops.hf_flash_two.flash_attn_bwd

    @staticmethod
    def setup_context(ctx, inputs, output):
        _keep(ctx, *inputs[: _HEAD + len(TENSORS)])
        ctx.settings = inputs[_HEAD + len(TENSORS) :]

    @staticmethod
    def backward(ctx, *along):
        """The gradient of <gradients, along> is the derivative of the gradients along it."""
        d_out, d_lse, *call = ctx.saved_tensors
        inputs, tensors = call[:5], call[5:]
        *numbers, need_d_bias = ctx.settings
        settings = (*along, *tensors, *numbers)
        moved = torch.ops.hf_flash_two.flash_attn_fwd_jvp(*inputs, *settings)
        found = torch.ops.hf_flash_two.flash_attn_bwd_jvp(
            d_out, d_lse, *inputs, *moved, *settings, need_d_bias
        )
        return _placed(BACKWARD_NAMES, ctx, found, d_out=moved[0], d_lse=moved[1])

    @staticmethod
    def jvp(ctx, *tangents):
        d_out, d_lse, *call = ctx.saved_tensors
        inputs, tensors = call[:5], call[5:]
        along = dict(zip(BACKWARD_NAMES, tangents, strict=True))
        moved = [along[name] for name in ("out", "lse", *DIFFERENTIABLE)]
        found = torch.ops.hf_flash_two.flash_attn_bwd_jvp(
            d_out, d_lse, *inputs, *moved, *tensors, *ctx.settings
        )
        if along["d_out"] is None and along["d_lse"] is None:
            return found
        linear = torch.ops.hf_flash_two.flash_attn_bwd(
            along["d_out"], along["d_lse"], *inputs, *tensors, *ctx.settings
        )
        return tuple(a + b for a, b in zip(found, linear, strict=True))


class _ForwardJvp(_Recorded):
    """The forward's derivative, whose ``out`` and ``lse`` are those of its query, key and value."""

    op = torch.ops.hf_flash_two.flash_attn_fwd_jvp

    @staticmethod
    def setup_context(ctx, inputs, output):
        _keep(ctx, *inputs[: _JVP_HEAD + len(TENSORS)], *output)
        ctx.settings = inputs[_JVP_HEAD + len(TENSORS) :]

    @staticmethod
    def backward(ctx, *grad_outputs):
        """It is linear in the tangents, and the derivative of the backward is symmetric."""
        *call, out_dot, lse_dot = ctx.saved_tensors
        inputs, along, tensors = call[:5], call[5:_JVP_HEAD], call[_JVP_HEAD:]
        needs = dict(zip(_FORWARD_JVP_NAMES, ctx.needs_input_grad, strict=True))
        settings = (*tensors, *ctx.settings, needs["bias"] or needs["bias_dot"])
        linear = torch.ops.hf_flash_two.flash_attn_bwd(*grad_outputs, *inputs, *settings)
        found = torch.ops.hf_flash_two.flash_attn_bwd_jvp(
            *grad_outputs, *inputs, out_dot, lse_dot, *along, *settings
        )
        tangents = {f"{name}_dot": x for name, x in zip(DIFFERENTIABLE, linear, strict=True)}
        return _placed(_FORWARD_JVP_NAMES, ctx, found, **tangents)

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError(_TOO_OFTEN)


class _BackwardJvp(_Recorded):
    op = torch.ops.hf_flash_two.flash_attn_bwd_jvp

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(_TOO_OFTEN)

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError(_TOO_OFTEN)


_TOO_OFTEN = (
    "flash_attention: it is differentiated twice at most, and one of the two in reverse mode "
    "(functional.hvp needs a third: use functional.vhp, or torch.func.jvp of torch.func.grad); "
    "compute further derivatives through eager attention"
)


def _placed(names: tuple[str, ...], ctx, found, **more: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients in the order of an op's arguments, of those that need one."""
    found = dict(zip(DIFFERENTIABLE, found, strict=True)) | more
    needed = zip(names, ctx.needs_input_grad, strict=True)
    return tuple(found.get(name) if needs else None for name, needs in needed)


for _class in (_Forward, _Backward, _ForwardJvp, _BackwardJvp):
    _LIBRARY.impl(_class.op.__name__, _class.call, "Autograd")


class _Eager(_SingleLevelFunction):
    """`_Forward` without the op."""

    apply: ClassVar[Callable]
    _compiled_autograd_key = Function._compiled_autograd_key

    @staticmethod
    def forward(ctx, query, key, value, bias, sinks, params, kernel, run, return_lse):
        with _without_default_device():
            out, lse, *max_logits = run.forward(query, key, value, params)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*max_logits)
        tensors = params.tensors
        ctx.save_for_backward(query, key, value, out, lse, *[x for x in tensors if x is not None])
        ctx.settings = [x is not None for x in tensors], params.numbers, kernel, run.backward
        return _wanted((out, lse, *max_logits), return_lse)

    @staticmethod
    def backward(ctx, *grad_outputs):
        d_out, d_lse = (*grad_outputs, None)[:2]
        query, key, value, out, lse, *saved = ctx.saved_tensors
        are_saved, numbers, kernel, run = ctx.settings
        tensors = iter(saved)
        fields = ([next(tensors) if x else None for x in are_saved], numbers)
        params = AttentionParams._make(chain(*fields))
        need_d_bias, need_d_sinks = ctx.needs_input_grad[3:5]
        args = (d_out, d_lse, query, key, value, out, lse)
        batched = any([x is not None and is_legacy_batchedtensor(x) for x in grad_outputs])
        if batched or torch.is_grad_enabled() or not is_eager(*args):
            settings = (*params, kernel, need_d_bias)
            grads = torch.ops.hf_flash_two.flash_attn_bwd(*args, *settings)
        else:
            with _without_default_device():
                if run is None or d_out is None or observers:
                    grads = _backward(*args, params, kernel, need_d_bias)
                else:
                    grads = run(*args, params, need_d_bias)
        dq, dk, dv, d_bias, d_sinks = grads
        if not need_d_bias:
            d_bias = None
        if not need_d_sinks:
            d_sinks = None
        return dq, dk, dv, d_bias, d_sinks, None, None, None, None


def prepared(
    query: Tensor, key: Tensor, value: Tensor, params: AttentionParams, kernel: str, with_lse: bool
) -> Prepared | None:
    """What computes, in eager mode, calls that differ in their tensors' values only; see `kernels`.

    None if there is no such thing.
    """
    laid_out = _laid_out(params, key.shape[2])
    if not query.numel() or laid_out is not params or not are_plain(params.tensors):
        return None
    if params.batch_invariant:
        return None
    chosen = select(kernel, query, key, value, params)
    run = chosen.prepare(query, key, value, params, with_lse)
    if run is None or run.backward is not None:
        return run
    return run._replace(backward=_KnownBackward(kernel))


class _KnownBackward:
    """The backward of calls of one kind, decided once for each layout of their tensors.

    A gradient is laid out as it likes, and hooks may save tensors in other layouts.
    """

    def __init__(self, kernel: str) -> None:
        self._kernel = kernel
        self._runs: dict[tuple[tuple[int, ...], ...], Callable] = {}

    def __call__(
        self,
        d_out: Tensor,
        d_lse: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        params: AttentionParams,
        need_d_bias: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        given = (d_out, d_lse, query, key, value, out, lse, params)
        addresses = d_out.data_ptr() | query.data_ptr() | key.data_ptr() | value.data_ptr()
        addresses |= out.data_ptr() | lse.data_ptr()
        if addresses % 16 or d_lse is not None or not lse.is_contiguous() or out.stride(3) != 1:
            return _backward(*given, self._kernel, need_d_bias)
        layout = d_out.stride(), query.stride(), key.stride(), value.stride(), out.stride()
        run = self._runs.get(layout)
        if run is None:
            chosen = select(self._kernel, query, key, value, params, backward=True)
            run = chosen.prepare_backward(*given, need_d_bias) or chosen.backward
            self._runs[layout] = run
        return run(*given, need_d_bias)


def flash_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    params: AttentionParams,
    kernel: str,
    return_lse: bool,
    eager: bool,
    recorded: bool,
    run: Prepared | None,
) -> Tensor | tuple[Tensor, ...]:
    """out[, lse][, max_logits] of validated settings.

    Gradients are those of query, key, value, bias and sinks.

    Args:
        eager: `is_eager` of query, key and value.
        recorded: `is_recorded` of what has a gradient.
        run: `prepared` of a call like this one.
    """
    if eager and are_plain(params.tensors):
        if run is None or observers:
            run = Prepared(partial(_forward, kernel=kernel))
        if recorded:
            inputs = (query, key, value, params.bias, params.sinks)
            return _Eager.apply(*inputs, params, kernel, run, return_lse)
        with _without_default_device():
            result = run.forward(query, key, value, params)
    else:
        # A DTensor that is gathered first is laid out as its parts were, and results as it is; all
        # believe the strides of the whole.
        query, key, value = (
            x.contiguous() if isinstance(x, _DTENSOR) else x for x in (query, key, value)
        )
        result = torch.ops.hf_flash_two.flash_attn_fwd(query, key, value, *params, kernel)
    return _wanted(result if params.max_logits else result[:2], return_lse)


def _wanted(results: tuple[Any, ...], return_lse: bool) -> Any:
    """Of out, lse and perhaps max_logits, what a caller gets."""
    out, lse, *rest = results
    if return_lse:
        rest = [lse, *rest]
    return (out, *rest) if rest else out
