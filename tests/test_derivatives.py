"""Forward-mode and second derivatives against the dense formula, and in linear memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import mask_cases
import pytest
import torch
from helpers import LargestTensor, inputs
from oracle import assert_within_budget, dense_attention
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from hf_flash_two import AttentionMask, flash_attention, op
from hf_flash_two.kernels.blockwise.tangents import backward_jvp, forward_jvp

func = torch.func
NAMES = ("query", "key", "value", "bias", "sinks")


def leaves(arguments: dict, *, dtype: torch.dtype, sizes=(5, 9), **shape) -> dict[str, Tensor]:
    """query, key and value, and of bias and sinks what is among the arguments."""
    found = dict(zip(NAMES, inputs(*sizes, dtype=dtype, **shape), strict=False))
    return found | {n: arguments.pop(n).to(dtype) for n in NAMES[3:] if n in arguments}


# By differences, in float64


CHECKED = {
    "plain": lambda: {},
    "causal": lambda: {"mask": AttentionMask.causal(), "scale": 0.4},
    "window": lambda: {"mask": AttentionMask.window(2, 1), "softcap": 1.5},
    # In row 1 the first queries see nothing.
    "padding": lambda: {
        "mask": AttentionMask.causal()
        & AttentionMask.from_padding(torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1, 0], [0] * 7 + [1] * 2]))
    },
    "documents": lambda: {
        "mask": AttentionMask.from_documents(
            torch.tensor([0, 4, 9]), query_cu_seqlens=torch.tensor([0, 2, 5]), causal=True
        ),
        "sinks": torch.randn(4),
    },
    "dense": lambda: {"mask": torch.rand(2, 4, 5, 9) > 0.4, "alibi_slopes": torch.rand(4)},
    "bias": lambda: {"bias": torch.randn(2, 1, 5, 9), "softcap": 2.0},
    "bias of heads": lambda: {"bias": torch.randn(1, 4, 1, 9), "sinks": torch.randn(2, 4)},
    "dropout": lambda: {"dropout_p": 0.3, "dropout_seed": 5, "sinks": torch.randn(4)},
}


@pytest.mark.parametrize("case", CHECKED.values(), ids=CHECKED)
def test_by_differences(case: Callable) -> None:
    """First derivatives both ways, second ones reverse over reverse and forward over reverse."""
    arguments = case()
    shape = dict(heads=(4, 2), head_dim=3, value_dim=2)
    tensors = leaves(arguments, dtype=torch.float64, **shape)
    names = list(tensors)

    def function(*tensors):
        given = dict(zip(names, tensors, strict=True))
        out, lse = flash_attention(**given, **arguments, return_lse=True)
        return out, lse.masked_fill(lse.isinf(), 0)

    given = [x.requires_grad_() for x in tensors.values()]
    gradcheck(function, given, check_forward_ad=True, fast_mode=True)
    gradgradcheck(function, given, check_fwd_over_rev=True, fast_mode=True)


# Against the dense formula


def derivatives(function: Callable, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """By forward mode, forward over reverse, reverse over reverse and reverse over forward."""
    names, given = list(tensors), tuple(tensors.values())
    generator = torch.Generator().manual_seed(1)

    def random(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)

    def results(*tensors):
        return function(**dict(zip(names, tensors, strict=True)))

    along, factors = tuple(map(random, given)), tuple(map(random, results(*given)))

    def loss(*tensors):
        return sum((x.sin() * w).sum() for x, w in zip(results(*tensors), factors, strict=True))

    every = tuple(range(len(given)))
    found = dict(zip(("out", "lse"), func.jvp(results, given, along)[1], strict=True))
    nodes = [x.clone().requires_grad_() for x in given]
    grads = torch.autograd.grad(loss(*nodes), nodes, create_graph=True)
    second = {
        "forward over reverse": func.jvp(func.grad(loss, every), given, along)[1],
        "reverse over reverse": torch.autograd.grad(grads, nodes, along),
        "reverse over forward": func.grad(lambda *x: func.jvp(loss, x, along)[1], every)(*given),
    }
    for way, results_of in second.items():
        found |= {f"{n}, {way}": x for n, x in zip(names, results_of, strict=True)}
    return found


def check(tensors: dict, visible: Tensor | None, **arguments) -> None:
    both = {k: x for k, x in arguments.items() if k not in ("mask", "q_bucket_size")}

    def dense(**given):
        out, lse = dense_attention(**given, visible=visible, **both)
        return out, lse.masked_fill(lse.isinf(), 0)

    def ours(**given):
        out, lse = flash_attention(**given, return_lse=True, **arguments)
        return out, lse.masked_fill(lse.isinf(), 0)

    got, same = (derivatives(f, tensors) for f in (ours, dense))
    exact = derivatives(dense, {name: x.double() for name, x in tensors.items()})
    # Weights are known by lse, rounded when it is stored and again in base 2.
    lse = dense(**{name: x.float() for name, x in tensors.items()})[1]
    inherited = 2 * torch.finfo(lse.dtype).eps * lse.abs().max().item()
    for name, want in exact.items():
        assert_within_budget(name, got[name], want, same[name], inherited)


@pytest.mark.parametrize("make", mask_cases.MASKS, ids=lambda x: x.__name__)
def test_masks(make: Callable) -> None:
    """Several tiles of grouped heads; some rows see nothing."""
    mask, visible = make(61, 150)
    tensors = leaves({}, dtype=torch.float32, sizes=(61, 150), value_dim=8)
    check(tensors, visible, mask=mask, q_bucket_size=16)


TERMS = {
    "softcap": lambda: {"softcap": 2.0, "bias": torch.randn(1, 6, 61, 1)},
    "bias": lambda: {"bias": torch.randn(2, 6, 61, 150), "sinks": torch.randn(6)},
    "alibi": lambda: {"alibi_slopes": torch.rand(6), "scale": 0.3},
    "scale 0": lambda: {"scale": 0.0},
}


@pytest.mark.parametrize("term", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_terms(dtype: torch.dtype, term: Callable) -> None:
    arguments = term()
    tensors = leaves(arguments, dtype=dtype, sizes=(61, 150))
    mask, visible = mask_cases.causal(61, 150)
    check(tensors, visible, mask=mask, **arguments)


def test_half_precision() -> None:
    """Sums are float32: what is left is the rounding of inputs and results."""
    tensors = leaves({}, dtype=torch.bfloat16, sizes=(61, 150))
    mask, visible = mask_cases.causal(61, 150)
    check(tensors, visible, mask=mask)


def test_large_scores() -> None:
    tensors = leaves({}, dtype=torch.float32, sizes=(61, 150))
    mask, visible = mask_cases.causal(61, 150)
    check(tensors | {"query": 30 * tensors["query"]}, visible, mask=mask)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_hidden_reaches_nothing(bad: float) -> None:
    """Hidden keys, values and queries, and their tangents, may hold anything."""
    keep = torch.ones(2, 150, dtype=torch.bool)
    keep[:, 100:140] = False
    mask = AttentionMask.causal() & AttentionMask.from_padding(keep)
    clean = leaves({}, dtype=torch.float32, sizes=(61, 150))
    hidden = ~keep[:, None, :, None]
    dirty = {n: x.masked_fill(hidden, bad) if n != "query" else x for n, x in clean.items()}
    found = []
    for tensors in (clean, dirty):
        given = tuple(tensors.values())

        def results(*x):
            return flash_attention(*x, mask=mask, return_lse=True)

        def loss(*x):
            return sum(y.sin().sum() for y in results(*x))

        first = func.jvp(results, given, given)[1]
        second = func.jvp(func.grad(loss, (0, 1, 2)), given, given)[1]
        found.append((*first, *second))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


# Memory


def test_memory_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor grows with Tq * Tk: the largest stays the same when the length doubles."""
    watching = LargestTensor()
    calls = []

    def under_watch(compute: Callable, *given):
        calls.append(compute)
        with watching:
            return compute(*given)

    watched = [partial(under_watch, compute) for compute in (forward_jvp, backward_jvp)]
    monkeypatch.setattr(op, "derivatives", lambda kernel: watched)
    sizes = []
    for length in (2048, 4096):
        watching.elements = 0
        given = tuple(inputs(length, length, heads=(2, 1), head_dim=8, batch=1))

        def loss(*x):
            return flash_attention(*x, mask=AttentionMask.causal()).sin().sum()

        func.jvp(func.grad(loss, (0, 1, 2)), given, given)
        sizes.append(watching.elements)
    assert calls == [forward_jvp, backward_jvp] * 2
    assert sizes[0] == sizes[1] < 2048 * 2048
