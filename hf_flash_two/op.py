"""Two library ops, opaque to the compiler, with autograd kernels that hold no arithmetic.

The names contain ``flash_attn`` so that selective-checkpointing policies recognise them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch._ops import OpOverloadPacket
from torch.autograd import forward_ad
from torch.autograd.function import Function, _SingleLevelFunction

from hf_flash_two.kernels import Kernel, select
from hf_flash_two.kernels.params import Problem, empty_lse, empty_output
from hf_flash_two.masks import KEY_GRANULE

_PROBLEM = (
    "Tensor? first_query, Tensor? last_query, Tensor? key_bounds, Tensor? dense, Tensor? bias, "
    "Tensor? alibi_slopes, Tensor? sinks, Tensor? seed, SymInt query_offset, SymInt? window_left, "
    "SymInt? window_right, float scale, float softcap, float dropout_p, SymInt? block_q, "
    "SymInt? block_k, str kernel"
)
_LIBRARY = torch.library.Library("hf_flash_two", "DEF")
_LIBRARY.define(
    f"flash_attn_fwd(Tensor query, Tensor key, Tensor value, {_PROBLEM}) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "flash_attn_bwd(Tensor? d_out, Tensor? d_lse, Tensor query, Tensor key, Tensor value, "
    f"Tensor out, Tensor lse, {_PROBLEM}, bool need_d_bias) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_PROBLEM_TENSORS = 8

observers: list[Callable[[str, str, Tensor, Tensor, Tensor, Problem], None]] = []
"""Called when a kernel is to run, with "forward" or "backward", its name and what it is given."""


def _laid_out(fields: Sequence, keys: int) -> Problem:
    """The problem, as every kernel may rely on it: what is per key and per head without gaps."""
    problem = Problem(*fields)
    groups = -(-keys // KEY_GRANULE)
    if problem.key_bounds is not None and problem.key_bounds.shape[1] != groups:
        problem = problem._replace(key_bounds=problem.key_bounds[:, :groups])
    names = ("first_query", "last_query", "key_bounds", "alibi_slopes", "sinks")
    strided = {
        name: tensor.contiguous()
        for name in names
        if (tensor := getattr(problem, name)) is not None and not tensor.is_contiguous()
    }
    return problem._replace(**strided) if strided else problem


def _select(
    direction: str, name: str, query: Tensor, key: Tensor, value: Tensor, problem: Problem
) -> Kernel:
    kernel = select(name, query)
    for observe in observers:
        observe(direction, kernel.name, query, key, value, problem)
    return kernel


# Gradients are on where the levels of torch.func are passed: nothing inside may be recorded.
@torch.no_grad()
def _forward(query, key, value, *settings):
    *problem, kernel = settings
    if not query.numel():
        return empty_output(query, value.shape[3]), empty_lse(query)
    problem = _laid_out(problem, key.shape[2])
    chosen = _select("forward", kernel, query, key, value, problem)
    return chosen.forward(query, key, value, problem)


@torch.no_grad()
def _backward(d_out, d_lse, query, key, value, out, lse, *settings):
    *problem, kernel, need_d_bias = settings
    d_out = torch.zeros_like(out) if d_out is None else d_out
    problem = _laid_out(problem, key.shape[2])
    if query.numel():
        out = out if out.stride(3) == 1 else out.contiguous()
        chosen = _select("backward", kernel, query, key, value, problem)
        grads = chosen.backward(d_out, d_lse, query, key, value, out, lse, problem, need_d_bias)
    else:
        d_inputs = (empty_output(x, x.shape[3]).zero_() for x in (query, key, value))
        extras = (problem.bias if need_d_bias else None, problem.sinks)
        grads = (*d_inputs, *(None if x is None else x.new_zeros(x.shape) for x in extras))
    return tuple(query.new_empty(0) if grad is None else grad for grad in grads)


def _forward_fake(query, key, value, *settings):
    return empty_output(query, value.shape[3]), empty_lse(query)


def _backward_fake(d_out, d_lse, query, key, value, out, lse, *settings):
    *problem, _, need_d_bias = settings
    problem = Problem(*problem)
    inputs = (query, key, value)
    d_inputs = tuple(empty_output(tensor, tensor.shape[3]) for tensor in inputs)
    extras = (problem.bias if need_d_bias else None, problem.sinks)
    return d_inputs + tuple(
        query.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)
        for tensor in extras
    )


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


def _fold_all(tensors, dims, size, batch, share):
    return [_fold(t, d, size, batch, share) for t, d in zip(tensors, dims, strict=True)]


def _batch_of(query: Tensor, dim: int | None) -> int:
    return query.shape[0] if dim is None else query.movedim(dim, 0).shape[1]


def _forward_vmap(info, in_dims, *args):
    size, batch = info.batch_size, _batch_of(args[0], in_dims[0])
    if in_dims[3 + _PROBLEM_TENSORS - 1] is not None:
        raise ValueError("dropout_seed: vmap over seeds is not supported; the batch index varies")
    last = 3 + _PROBLEM_TENSORS - 1
    tensors = _fold_all(args[:3], in_dims[:3], size, batch, share=False)
    tensors += _fold_all(args[3:last], in_dims[3:last], size, batch, share=True)
    out, lse = torch.ops.hf_flash_two.flash_attn_fwd(*tensors, *args[last:])
    return (out.unflatten(0, (size, batch)), lse.unflatten(0, (size, batch))), (0, 0)


def _backward_vmap(info, in_dims, *args):
    size, batch = info.batch_size, _batch_of(args[2], in_dims[2])
    first, last = 7, 7 + _PROBLEM_TENSORS - 1
    tensors = _fold_all(args[:7], in_dims[:7], size, batch, share=False)
    # Bias and sinks need a gradient for each mapped sample, so they are never shared.
    problem = _fold_all(args[first:last], in_dims[first:last], size, batch, share=False)
    grads = torch.ops.hf_flash_two.flash_attn_bwd(*tensors, *problem, *args[last:])
    unfolded = [grad.unflatten(0, (size, batch)) if grad.numel() else grad for grad in grads]
    for index, position in ((3, 11), (4, 13)):
        source, dim = args[position], in_dims[position]
        if grads[index].numel() and _batch_of(source, dim) != batch:
            unfolded[index] = unfolded[index].sum(1, keepdim=True)
    return tuple(unfolded), tuple(0 if grad.numel() else None for grad in grads)


_LIBRARY.impl("flash_attn_fwd", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("flash_attn_bwd", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("hf_flash_two::flash_attn_fwd", _forward_fake)
torch.library.register_fake("hf_flash_two::flash_attn_bwd", _backward_fake)
torch.library.register_vmap("hf_flash_two::flash_attn_fwd", _forward_vmap)
torch.library.register_vmap("hf_flash_two::flash_attn_bwd", _backward_vmap)


def _recording() -> bool:
    """Whether autograd records, backward or forward; no_grad does not end the latter."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


class _Recorded(_SingleLevelFunction):
    """The op's kernel of autograd.

    `torch.func` works one level at a time: each records a node and hands the op on to the next.
    """

    op: ClassVar[OpOverloadPacket]
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
        with torch.enable_grad(), torch._C._AutoDispatchBelowAutograd():
            return cls.op(*args)


class _Backward(_Recorded):
    """The backward op: gradients whose own gradient is refused."""

    op = torch.ops.hf_flash_two.flash_attn_bwd

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(
            "flash_attention: it can be differentiated once, not twice (Hessians, gradient "
            "penalties, create_graph=True); compute second derivatives through eager attention"
        )


class _Forward(_Recorded):
    op = torch.ops.hf_flash_two.flash_attn_fwd

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        tensors = inputs[: 3 + _PROBLEM_TENSORS]
        ctx.save_for_backward(*tensors, *output)
        ctx.settings = inputs[3 + _PROBLEM_TENSORS :]

    @staticmethod
    def backward(ctx, d_out, d_lse):
        *tensors, out, lse = ctx.saved_tensors
        query, key, value, *problem = tensors
        dq, dk, dv, d_bias, d_sinks = torch.ops.hf_flash_two.flash_attn_bwd(
            d_out,
            d_lse,
            query,
            key,
            value,
            out,
            lse,
            *problem,
            *ctx.settings,
            ctx.needs_input_grad[7],
        )
        grads: list[Tensor | None] = [None] * (_PROBLEM_TENSORS + len(ctx.settings))
        grads[4] = d_bias if ctx.needs_input_grad[7] else None
        grads[6] = d_sinks if ctx.needs_input_grad[9] else None
        return dq, dk, dv, *grads


_LIBRARY.impl("flash_attn_fwd", _Forward.call, "Autograd")
_LIBRARY.impl("flash_attn_bwd", _Backward.call, "Autograd")


def flash_attn(
    query: Tensor, key: Tensor, value: Tensor, problem: Problem, kernel: str
) -> tuple[Tensor, Tensor]:
    """(out, lse) of a validated problem, differentiable in query, key, value, bias and sinks."""
    args = (query, key, value, *problem, kernel)
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return torch.ops.hf_flash_two.flash_attn_fwd(*args)
    # What the dispatcher would come to, without its detour through Python.
    return _Forward.apply(*args) if _recording() else _Forward.forward(*args)
