"""Two library ops, opaque to the compiler, under an autograd shell that holds no arithmetic.

The names contain ``flash_attn`` so that selective-checkpointing policies recognise them.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_flash_two.kernels import select
from hf_flash_two.kernels.problem import Problem, empty_lse, empty_output

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


# An exported program calls the ops without the shell: nothing inside them may be recorded.
@torch.no_grad()
def _forward(query, key, value, *settings):
    *problem, kernel = settings
    return select(kernel, query).forward(query, key, value, Problem(*problem))


@torch.no_grad()
def _backward(d_out, d_lse, query, key, value, out, lse, *settings):
    *problem, kernel, need_d_bias = settings
    d_out = torch.zeros_like(out) if d_out is None else d_out
    grads = select(kernel, query).backward(
        d_out, d_lse, query, key, value, out, lse, Problem(*problem), need_d_bias
    )
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
        if source is not None and _batch_of(source, dim) != batch:
            unfolded[index] = unfolded[index].sum(1, keepdim=True)
    return tuple(unfolded), tuple(0 if grad.numel() else None for grad in grads)


_LIBRARY.impl("flash_attn_fwd", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("flash_attn_bwd", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("hf_flash_two::flash_attn_fwd", _forward_fake)
torch.library.register_fake("hf_flash_two::flash_attn_bwd", _backward_fake)
torch.library.register_vmap("hf_flash_two::flash_attn_fwd", _forward_vmap)
torch.library.register_vmap("hf_flash_two::flash_attn_bwd", _backward_vmap)


class _FlashAttention(torch.autograd.Function):
    generate_vmap_rule = True

    # Named one by one: dynamo counts the parameters to see that none of them is a context.
    @staticmethod
    def forward(
        query, key, value, first_query, last_query, key_bounds, dense, bias, alibi_slopes, sinks,
        seed, query_offset, window_left, window_right, scale, softcap, dropout_p, block_q, block_k,
        kernel,
    ):  # fmt: skip
        return torch.ops.hf_flash_two.flash_attn_fwd(
            query, key, value, first_query, last_query, key_bounds, dense, bias, alibi_slopes,
            sinks, seed, query_offset, window_left, window_right, scale, softcap, dropout_p,
            block_q, block_k, kernel,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        tensors = inputs[: 3 + _PROBLEM_TENSORS]
        ctx.save_for_backward(*tensors, *output)
        ctx.settings = inputs[3 + _PROBLEM_TENSORS :]

    @staticmethod
    @once_differentiable
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


class _Given(inspect.BoundArguments):
    """Arguments that were all given, by position."""

    args = property(lambda self: tuple(self.arguments.values()))
    kwargs = property(lambda self: {})

    def apply_defaults(self) -> None:
        pass


class _Positional(inspect.Signature):
    """`apply` binds its arguments in every call: one by one, that takes an attention's time."""

    def bind(self, *args) -> _Given:
        return _Given(self, dict(zip(self.parameters, args, strict=True)))


_FlashAttention.forward.__signature__ = _Positional.from_callable(_FlashAttention.forward)


def flash_attn(
    query: Tensor, key: Tensor, value: Tensor, problem: Problem, kernel: str
) -> tuple[Tensor, Tensor]:
    """(out, lse) of a validated problem, differentiable in query, key, value, bias and sinks."""
    if not torch.is_grad_enabled():
        return torch.ops.hf_flash_two.flash_attn_fwd(query, key, value, *problem, kernel)
    return _FlashAttention.apply(query, key, value, *problem, kernel)
