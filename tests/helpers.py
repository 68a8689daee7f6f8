"""What several test files share: random inputs, and the check of a kernel by the dense formula."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from oracle import assert_within_budget, dense_attention, dense_mask
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_flash_two import AttentionMask, flash_attention
from hf_flash_two.testing.errors import FLOOR, gradient_errors

BATCH = 2


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def inputs(
    query_length: int,
    key_length: int,
    *,
    heads: tuple[int, int] = (6, 2),
    head_dim: int = 16,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    batch: int = BATCH,
) -> list[Tensor]:
    """Random query, key and value."""
    value_dim = head_dim if value_dim is None else value_dim
    shapes = (
        (batch, heads[0], query_length, head_dim),
        (batch, heads[1], key_length, head_dim),
        (batch, heads[1], key_length, value_dim),
    )
    # Drawn on the CPU: the same on every device.
    return [torch.randn(shape, dtype=dtype).to(device) for shape in shapes]


def attend(kernel: str, query: Tensor, key: Tensor, value: Tensor, **arguments):
    """(out, lse) with gradients on for the tensors that may have one."""
    return flash_attention(query, key, value, kernel=kernel, return_lse=True, **arguments)


def check(
    kernel: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: AttentionMask | Tensor | None = None,
    visible: Tensor | None = None,
    alibi_offset: int | None = None,
    buckets: tuple[int | None, int | None] = (None, None),
    d_out: Tensor | None = None,
    vanishing_gradients: bool = False,
    through_lse: bool = True,
    constant: tuple[str, ...] = (),
    **arguments,
) -> None:
    """Output, lse and all gradients of the kernel are within the budget of the dense formula.

    Args:
        mask: what the kernel gets; ``visible`` is what the dense formula gets.
        through_lse: the gradients are also those of lse.
        constant: the tensors that need no gradient.
        vanishing_gradients: those of the scores are differences of equal numbers, so queries and
            keys get what these were rounded by instead of a share of the dense formula's error.
        arguments: what both take as it is.
    """
    tensors = {"query": query, "key": key, "value": value}
    tensors |= {name: arguments.pop(name) for name in ("bias", "sinks") if name in arguments}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    visible = None if visible is None else visible.to(query.device)

    def dense(dtype: torch.dtype | None, exact_out: Tensor | None = None) -> list[Tensor]:
        leaves = {
            name: tensor.detach().clone().to(dtype or tensor.dtype).requires_grad_()
            for name, tensor in tensors.items()
        }
        out, lse = dense_attention(
            **leaves, visible=visible, alibi_offset=alibi_offset, keep=keep, **dense_arguments
        )
        leaves = {name: leaf for name, leaf in leaves.items() if name not in constant}
        d_row = d_lse
        if exact_out is not None:
            # Algorithm 2 takes rowsum(P * dP) from rowsum(dO * O) and so inherits the error of O.
            d_row = d_lse - (d_out.double() * (out.detach().double() - exact_out)).sum(-1)
        grads = torch.autograd.grad(
            (out, lse), list(leaves.values()), (d_out.to(out.dtype), d_row.to(lse.dtype))
        )
        return [out.detach(), lse.detach(), *grads]

    leaves = {
        name: tensor.detach().requires_grad_(name not in constant)
        for name, tensor in tensors.items()
    }
    keep = arguments.pop("keep", None)
    out, lse = attend(
        kernel,
        **leaves,
        mask=mask,
        q_bucket_size=buckets[0],
        k_bucket_size=buckets[1],
        **arguments,
    )
    dense_arguments = {name: arg for name, arg in arguments.items() if name != "dropout_seed"}
    d_out = torch.randn(out.shape, dtype=out.dtype).to(out.device) if d_out is None else d_out
    d_lse = torch.randn(lse.shape, dtype=lse.dtype).to(lse.device)
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    if through_lse:
        grads = torch.autograd.grad((out, lse), wanted, (d_out, d_lse))
    else:
        d_lse.zero_()
        grads = torch.autograd.grad(out, wanted, d_out)
    actual = [out.detach(), lse.detach(), *grads]

    exact = dense(torch.float64)
    same_dtype = dense(None, exact_out=exact[0])
    # The backward knows a row's sum by its lse, rounded when it is stored and again in base 2, and
    # sums its scores over the head dim in an order of its own.
    largest = exact[1].masked_fill(exact[1] == -math.inf, 0).abs().max() if exact[1].numel() else 0
    inherited = 2 * torch.finfo(lse.dtype).eps * float(largest)
    names = ["out", "lse", *(f"d_{name}" for name in tensors if name not in constant)]
    for name, a, e, s in zip(names, actual, exact, same_dtype, strict=True):
        if name == "lse":
            empty = e == -math.inf
            assert torch.equal(a == -math.inf, empty), "lse: -inf exactly where nothing is seen"
            a, e, s = (x.masked_fill(empty, 0) for x in (a, e, s))
        elif name != "out":
            assert a.dtype == tensors[name.removeprefix("d_")].dtype, f"{name}: {a.dtype}"
        if name in ("d_query", "d_key") and vanishing_gradients:
            # dS = P (dP - rowsum(dO * O)), and P sums to 1 over the keys of a query.
            rounding = (
                4 * torch.finfo(a.dtype).eps * d_out.abs().amax() * value.abs().sum(-1).amax()
            )
            other, terms = (key, 1) if name == "d_query" else (query, query[0, :, :, 0].numel())
            limit = rounding * query.shape[3] ** -0.5 * other.abs().amax() * terms
            assert (a.double() - e).abs().max() <= limit, name
            continue
        assert_within_budget(name, a, e, s, inherited if name.startswith("d_") else 0.0)
    assert out.dtype == query.dtype
    assert lse.dtype == (torch.float64 if query.dtype == torch.float64 else torch.float32)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name]), f"{name} was written to"


def padded(tq: int, tk: int):
    """Row 0 is padded on the left, row 1 on the right."""
    left, right = tk // 3, tk - tk // 4
    keep = torch.ones(BATCH, tk, dtype=torch.int64)
    keep[0, :left] = 0
    keep[1, right:] = 0

    def sees(b, i, j):
        return (j <= i) & torch.where(b == 0, j >= left, j < right)

    return AttentionMask.causal() & AttentionMask.from_padding(keep), dense_mask(
        BATCH, tq, tk, sees
    )


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor made inside."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                stored = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.elements = max(self.elements, stored)
        return result


class Watched(TorchDispatchMode):
    """Sees every operation, and changes none."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def gradients_of(module: nn.Module) -> dict[str, Tensor]:
    """Of the parameters that have one."""
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_same_gradients(
    actual: nn.Module | Mapping[str, Tensor],
    expected: nn.Module | Mapping[str, Tensor],
    limit: float = 1e-4,
    floor: float = FLOOR,
) -> None:
    """The same parameters have gradients, and none is further off than `gradient_errors` allows."""
    if isinstance(actual, nn.Module):
        actual = gradients_of(actual)
    if isinstance(expected, nn.Module):
        expected = gradients_of(expected)
    assert any(gradient.any() for gradient in expected.values()), "no gradient to compare with"
    assert actual.keys() == expected.keys()
    assert all(gradient.isfinite().all() for gradient in actual.values())
    errors = gradient_errors(actual, expected, floor=floor)
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= limit, f"{worst}: error {errors[worst]:.1e} > {limit:.0e}"
