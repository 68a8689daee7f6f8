"""Every kernel against the dense formula in float64, and the rules of the function."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from helpers import BATCH, LargestTensor, attend, check, dtype_id, inputs, padded
from mask_cases import (
    MASKS,
    causal,
    dense,
    full,
    holed,
    packed,
    runs_of,
    two_sided_window,
    window,
)
from oracle import assert_within_budget, dense_attention, dense_mask, dense_scores
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hf_flash_two import AttentionMask, flash_attention, kernels, op

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FEW = [*DTYPES[:3], pytest.param(torch.float16, marks=pytest.mark.long)]
"""Of which an interpreted kernel computes float32 alone."""
HEADS = {"mha": (3, 3), "gqa": (6, 2), "mqa": (3, 1)}
LENGTHS = [(16, 16), (65, 65), (7, 129), (1, 100), (4, 4096), (300, 700)]


def matrix() -> list:
    """Masks x lengths x dtypes, the heads and head_dims taking turns."""
    dims = itertools.cycle([16, 64, 20, 40, 96])
    heads = itertools.cycle(HEADS)
    cases = []
    for make, (tq, tk), dtype in itertools.product(MASKS, LENGTHS, DTYPES):
        head, dim = next(heads), next(dims)
        long = tk > 130 or (tk > 16) != (dtype == torch.float32)
        cases += [pytest.param(
            make, tq, tk, dtype, head, dim,
            id=f"{make.__name__}-{tq}x{tk}-{dtype_id(dtype)}-{head}-D{dim}",
            marks=[pytest.mark.long] if long else [],
        )]  # fmt: skip
    return cases


@pytest.mark.parametrize(("make", "query_length", "key_length", "dtype", "head", "dim"), matrix())
def test_masks_within_the_budget_of_the_dense_formula(
    kernel: str,
    device: str,
    make: Callable,
    query_length: int,
    key_length: int,
    dtype: torch.dtype,
    head: str,
    dim: int,
) -> None:
    mask, visible = make(query_length, key_length)
    if make is dense:
        mask = visible = visible[:, : HEADS[head][0]]
    tensors = inputs(
        query_length, key_length, heads=HEADS[head], head_dim=dim, dtype=dtype, device=device
    )
    check(kernel, *tensors, mask=mask.to(device), visible=visible)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.long)],
    ids=dtype_id,
)
@pytest.mark.parametrize(
    ("head_dim", "value_dim"),
    [(1, 1), (1, 16), (16, 1), (8, 8), (20, 20), (64, 64), (72, 72), (128, 128), (192, 128),
     (24, 40), (256, 256), pytest.param(576, 576, marks=pytest.mark.long)],
    ids=lambda dim: f"D{dim}",
)  # fmt: skip
def test_head_dim(kernel: str, device: str, head_dim: int, value_dim: int, dtype) -> None:
    if dtype == torch.bfloat16 and head_dim == 1:
        pytest.skip("a product without a sum rounds once: no budget to compare with")
    shapes = dict(heads=(2, 1), head_dim=head_dim, value_dim=value_dim)
    tensors = inputs(33, 70, **shapes, dtype=dtype, device=device)
    mask, visible = causal(33, 70)
    check(kernel, *tensors, mask=mask, visible=visible)


def bias_shapes() -> list:
    """Every way to broadcast; four of them, which tell the axes apart, where tiles are slow."""
    few = {(1, 1, 1, 1), (BATCH, 4, 33, 70), (1, 4, 1, 70), (BATCH, 1, 33, 1)}
    shapes = itertools.product((1, BATCH), (1, 4), (1, 33), (1, 70))
    return [pytest.param(x, marks=() if x in few else pytest.mark.long) for x in shapes]


@pytest.mark.parametrize("shape", bias_shapes(), ids=str)
def test_bias_shape(kernel: str, device: str, shape: tuple[int, ...]) -> None:
    mask, visible = padded(33, 70)
    bias = torch.randn(shape, device=device)
    tensors = inputs(33, 70, heads=(4, 2), device=device)
    check(kernel, *tensors, mask=mask, visible=visible, bias=bias)


@pytest.mark.parametrize(
    ("dtype", "bias_dtype"),
    [(x, y) for x in DTYPES for y in sorted({x, torch.float32}, key=str)],
    ids=dtype_id,
)
def test_bias_dtype(kernel: str, device: str, dtype: torch.dtype, bias_dtype: torch.dtype) -> None:
    bias = torch.randn(4, 33, 70, dtype=bias_dtype, device=device)
    check(kernel, *inputs(33, 70, heads=(4, 2), dtype=dtype, device=device), bias=bias)


def test_bias_of_few_dimensions(kernel: str, device: str) -> None:
    query, key, value = inputs(9, 20, device=device)
    bias = torch.randn(20, device=device)
    out = flash_attention(query, key, value, bias=bias, kernel=kernel)
    assert torch.equal(
        out, flash_attention(query, key, value, bias=bias[None, None, None], kernel=kernel)
    )


def test_bias_strides(kernel: str, device: str) -> None:
    """A bias stored keys first, one expanded over the heads, one with gaps."""
    tensors = inputs(33, 70, heads=(2, 1), device=device)
    for bias in (
        torch.randn(70, 33, 2, 2, device=device).permute(3, 2, 1, 0),
        torch.randn(2, 1, 33, 70, device=device).expand(2, 2, 33, 70),
        torch.randn(2, 2, 33, 140, device=device)[..., ::2],
    ):
        check(kernel, *tensors, bias=bias)


@pytest.mark.parametrize("dtype", FEW, ids=dtype_id)
@pytest.mark.parametrize("per_batch", [False, True], ids=["H", "BxH"])
@pytest.mark.parametrize("make", [full, causal, window], ids=lambda make: make.__name__)
def test_alibi(kernel: str, device: str, make: Callable, per_batch: bool, dtype) -> None:
    slopes = torch.rand(*([BATCH] if per_batch else []), 4, device=device) + 0.1
    mask, visible = make(33, 70)
    tensors = inputs(33, 70, heads=(4, 2), dtype=dtype, device=device)
    check(kernel, *tensors, mask=mask, visible=visible, alibi_slopes=slopes)


def test_alibi_counts_from_the_query_offset(kernel: str, device: str) -> None:
    slopes = torch.rand(6, device=device)
    mask = AttentionMask.causal(query_offset=20)
    visible = dense_mask(BATCH, 33, 70, lambda b, i, j: j <= i, offset=20)
    tensors = inputs(33, 70, device=device)
    check(
        kernel, *tensors, mask=mask, visible=visible, alibi_slopes=slopes, alibi_offset=20
    )  # fmt: skip


@pytest.mark.parametrize("dtype", FEW, ids=dtype_id)
@pytest.mark.parametrize("make", [full, causal, holed], ids=lambda make: make.__name__)
@pytest.mark.parametrize("softcap", [0.7, pytest.param(30.0, marks=pytest.mark.long)])
def test_softcap(kernel: str, device: str, softcap: float, make: Callable, dtype) -> None:
    mask, visible = make(33, 70)
    tensors = inputs(33, 70, heads=(4, 2), dtype=dtype, device=device)
    check(kernel, *tensors, mask=mask, visible=visible, softcap=softcap)


@pytest.mark.parametrize("dtype", FEW, ids=dtype_id)
@pytest.mark.parametrize("shape", [(4,), (1, 4), (BATCH, 4)], ids=["H", "1xH", "BxH"])
@pytest.mark.parametrize("make", [causal, holed], ids=lambda make: make.__name__)
def test_sinks(kernel: str, device: str, make: Callable, shape: tuple, dtype) -> None:
    """Row 1 of the holed mask sees nothing but the sink: out 0, lse the sink."""
    sinks = 2 * torch.randn(shape).to(device)
    mask, visible = make(33, 70)
    tensors = inputs(33, 70, heads=(4, 2), dtype=dtype, device=device)
    check(kernel, *tensors, mask=mask, visible=visible, sinks=sinks)


@pytest.mark.parametrize("sink", [-200.0, 200.0])
def test_extreme_sinks(kernel: str, device: str, sink: float) -> None:
    """One that takes nothing from the keys, and one that leaves them nothing."""
    query, key, value = inputs(33, 70, device=device)
    sinks = torch.full((6,), sink, device=device)
    out, lse = attend(kernel, query, key, value, sinks=sinks)
    exact, exact_lse = dense_attention(
        query.double(), key.double(), value.double(), sinks=sinks.double()
    )
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [0.5, 0.01, -1.0, 0.0])
@pytest.mark.parametrize("softcap", [None, 3.0], ids=["plain", "capped"])
def test_scale(kernel: str, device: str, scale: float, softcap: float | None) -> None:
    query, key, value = inputs(33, 70, heads=(2, 1), device=device)
    arguments = {"scale": scale, "softcap": softcap}
    out, lse = attend(kernel, query, key, value, **arguments)
    exact = dense_attention(query.double(), key.double(), value.double(), **arguments)
    torch.testing.assert_close(out.double(), exact[0], rtol=1e-5, atol=3e-6)
    torch.testing.assert_close(lse.double(), exact[1], rtol=1e-6, atol=1e-6)
    if scale:
        check(kernel, query, key, value, **arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.long
def test_scale_of_zero(kernel: str, device: str, dtype: torch.dtype) -> None:
    """The mean of the values a query sees; tiles and lengths at which products differ in kind."""
    query, key, value = inputs(513, 600, dtype=dtype, device=device, head_dim=32)
    mask, visible = causal(513, 600)
    check(kernel, query, key, value, mask=mask, visible=visible, scale=0.0)


@pytest.mark.parametrize("part", ["all", "row", "masked", "sinks"])
@pytest.mark.parametrize(
    "bias_dtype",
    [
        torch.float32,
        *(pytest.param(x, marks=pytest.mark.long) for x in (torch.bfloat16, torch.half)),
    ],
    ids=dtype_id,
)
def test_the_smallest_bias(kernel: str, device: str, bias_dtype: torch.dtype, part: str) -> None:
    """A finite bias shifts every score of a row equally: it hides nothing from it."""
    query, key, value = inputs(33, 170, heads=(2, 1), device=device)
    bias = torch.zeros(1, 1, 33, 170, dtype=bias_dtype, device=device)
    least = torch.finfo(bias_dtype).min
    bias[:, :, 7 if part == "row" else slice(None)] = least
    mask, visible = causal(33, 170) if part == "masked" else (None, None)
    extras = {"sinks": torch.full((2,), least / 2, device=device)} if part == "sinks" else {}
    check(kernel, query, key, value, mask=mask, visible=visible, bias=bias, **extras)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    ("query_length", "key_length", "buckets"),
    [
        pytest.param(17, 70, (8, 64), id="17x70"),
        pytest.param(65, 129, (48, 64), id="65x129", marks=pytest.mark.long),
        pytest.param(300, 700, (None, None), id="300x700", marks=pytest.mark.long),
    ],
)
def test_everything_at_once(
    kernel: str, device: str, query_length: int, key_length: int, buckets, head: str, dtype
) -> None:
    mask, visible = padded(query_length, key_length)
    band, inside = two_sided_window(query_length, key_length)
    tensors = inputs(
        query_length, key_length, heads=HEADS[head], value_dim=24, dtype=dtype, device=device
    )
    count = HEADS[head][0]
    check(
        kernel,
        *tensors,
        mask=mask & band,
        visible=visible & inside,
        scale=0.3,
        bias=torch.randn(1, count, query_length, key_length, dtype=dtype, device=device),
        alibi_slopes=torch.rand(BATCH, count, device=device) / 10,
        softcap=4.0,
        sinks=torch.randn(count, device=device),
        buckets=buckets,
    )


@pytest.mark.long
def test_many_documents(kernel: str, device: str) -> None:
    """Documents of 1 to 40 tokens, so that every tile holds the ends of several."""
    lengths = torch.randint(1, 41, (30,)).tolist()
    cu = torch.tensor([0, *lengths]).cumsum(0)
    total = int(cu[-1])
    ids = runs_of(cu.tolist(), total)
    visible = (ids[:, None] == ids) & (torch.arange(total)[:, None] >= torch.arange(total))
    mask = AttentionMask.from_documents(cu, causal=True)
    check(kernel, *inputs(total, total, device=device), mask=mask, visible=visible)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("make", [full, causal, dense], ids=lambda make: make.__name__)
@pytest.mark.parametrize(("query_length", "key_length"), [(8, 4096), (4096, 64)])
@pytest.mark.long
def test_long_sums_are_not_rounded_tile_by_tile(
    kernel: str, device: str, query_length: int, key_length: int, make: Callable, dtype
) -> None:
    """Many small tiles: out and dq add up along the keys, dk and dv along the queries."""
    mask, visible = make(query_length, key_length)
    tensors = inputs(query_length, key_length, dtype=dtype, device=device)
    check(kernel, *tensors, mask=mask, visible=visible, buckets=(64, 64))


# Gradients by themselves


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("wanted", ["out", "lse"])
def test_gradient_of_one_result(kernel: str, device: str, wanted: str, dtype) -> None:
    """The other result's gradient is absent, not zeros somebody made."""
    tensors = inputs(33, 70, heads=(2, 1), dtype=dtype, device=device)
    mask, visible = causal(33, 70)
    index = ("out", "lse").index(wanted)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    result = attend(kernel, *leaves, mask=mask)[index]
    upstream = torch.randn_like(result)
    grads = torch.autograd.grad(result, leaves, upstream, allow_unused=True)

    def dense(dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [tensor.clone().to(dtype).requires_grad_() for tensor in tensors]
        result = dense_attention(*leaves, visible=visible.to(device))[index]
        return torch.autograd.grad(
            result, leaves, upstream.to(result.dtype), materialize_grads=True
        )

    for name, a, e, s in zip("qkv", grads, dense(torch.float64), dense(dtype), strict=True):
        if wanted == "lse" and name == "v":
            assert a is None or not a.any()
        else:
            assert_within_budget(f"d{name}", a, e, s, inherited=1e-6)


def test_gradient_of_one_input(kernel: str, device: str) -> None:
    """It equals the one computed with all the others, bit for bit."""
    made = inputs(33, 70, heads=(2, 1), device=device)
    tensors = dict(zip(("query", "key", "value"), made, strict=True))
    tensors["bias"] = torch.randn(1, 2, 33, 70, device=device)
    tensors["sinks"] = torch.randn(2, device=device)
    upstream = torch.randn(BATCH, 2, 33, 16, device=device)

    def grads(names: list[str]) -> list[Tensor]:
        leaves = {n: t.detach().clone().requires_grad_(n in names) for n, t in tensors.items()}
        out, _ = attend(kernel, **leaves, mask=AttentionMask.causal())
        return torch.autograd.grad(out, [leaves[name] for name in names], upstream)

    for name, together in zip(tensors, grads(list(tensors)), strict=True):
        assert torch.equal(grads([name])[0], together), name


def test_no_gradient_no_graph(kernel: str, device: str) -> None:
    query, key, value = inputs(9, 9, device=device)
    assert not flash_attention(query, key, value, kernel=kernel).requires_grad
    query.requires_grad_()
    with torch.no_grad():
        assert not flash_attention(query, key, value, kernel=kernel).requires_grad


GRADCHECKS = {
    "plain": {},
    "scale": {"scale": 0.7},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi_slopes": torch.tensor([0.3, 0.7, 0.1, 0.2])},
    "window": {"mask": AttentionMask.causal(window=3)},
    "dropout": {"dropout_p": 0.3, "dropout_seed": 5},
    "padded": {"mask": AttentionMask.from_padding(torch.tensor([1, 0, 1, 1, 1, 0]))},
}


@pytest.mark.parametrize("extras", [False, True], ids=["", "bias-sinks"])
@pytest.mark.parametrize("arguments", GRADCHECKS.values(), ids=GRADCHECKS)
@pytest.mark.parametrize("dtype", [torch.float64], ids=dtype_id)
def test_gradcheck(kernel: str, device: str, arguments: dict, extras: bool, dtype) -> None:
    """Out and lse against finite differences, for every tensor that has a gradient."""
    tensors = inputs(5, 6, heads=(4, 2), head_dim=3, value_dim=2, dtype=dtype, batch=1)
    if extras:
        tensors += [torch.randn(1, 4, 1, 6, dtype=dtype), torch.randn(4, dtype=dtype)]
    leaves = [tensor.to(device).requires_grad_() for tensor in tensors]
    arguments = {
        name: arg.to(device) if isinstance(arg, Tensor) else arg for name, arg in arguments.items()
    }

    def function(query, key, value, bias=None, sinks=None):
        return attend(kernel, query, key, value, bias=bias, sinks=sinks, **arguments)

    assert torch.autograd.gradcheck(function, leaves)


# Layouts and edges


STRIDES = {
    "transposed": lambda b, h, t, d: torch.randn(b, t, h, d).transpose(1, 2),
    "time-first": lambda b, h, t, d: torch.randn(t, b, h, d).permute(1, 2, 0, 3),
    "dim-outside": lambda b, h, t, d: torch.randn(b, h, d, t).transpose(2, 3),
    "expanded-batch": lambda b, h, t, d: torch.randn(1, h, t, d).expand(b, h, t, d),
    "expanded-heads": lambda b, h, t, d: torch.randn(b, 1, t, d).expand(b, h, t, d),
    "sliced": lambda b, h, t, d: torch.randn(b, h + 1, t + 5, 2 * d)[:, 1:, 2:-3, 3 : 3 + d],
    "last-stride-2": lambda b, h, t, d: torch.randn(b, h, t, 2 * d)[..., ::2],
    "reversed-halves": lambda b, h, t, d: torch.randn(b, t, 3, h, d)[:, :, 1].transpose(1, 2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("stride", STRIDES)
def test_strides(kernel: str, device: str, stride: str, dtype: torch.dtype) -> None:
    make = STRIDES[stride]
    shapes = ((BATCH, 4, 33, 16), (BATCH, 2, 70, 16), (BATCH, 2, 70, 24))
    tensors = [make(*shape).to(device, dtype) for shape in shapes]
    d_out = make(BATCH, 4, 33, 24).to(device, dtype)
    mask, visible = causal(33, 70)
    check(kernel, *tensors, mask=mask, visible=visible, d_out=d_out)


def test_out_is_laid_out_as_the_query(kernel: str, device: str) -> None:
    query, key, value = inputs(33, 70, device=device)
    assert flash_attention(query, key, value, kernel=kernel).is_contiguous()
    query = torch.randn(BATCH, 33, 6, 16, device=device).transpose(1, 2)
    out = flash_attention(query, key, value, kernel=kernel)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize(("query_length", "key_length"), [(70, 33), (300, 7), (40, 20)])
def test_more_queries_than_keys(
    kernel: str, device: str, query_length: int, key_length: int, dtype: torch.dtype
) -> None:
    """Bottom-right causal: the first queries stand before the first key and see nothing."""
    mask, visible = causal(query_length, key_length)
    tensors = inputs(query_length, key_length, heads=(2, 1), dtype=dtype, device=device)
    check(kernel, *tensors, mask=mask, visible=visible)


def test_rows_that_see_nothing(kernel: str, device: str) -> None:
    """Out 0, lse -inf, gradients exactly 0 whatever arrives from above."""
    query, key, value = (x.requires_grad_() for x in inputs(20, 20, device=device))
    keep = torch.ones(BATCH, 20, dtype=torch.bool)
    keep[1] = False
    mask = AttentionMask.from_padding(keep).to(device)
    out, lse = attend(kernel, query, key, value, mask=mask)
    assert not out[1].any() and (lse[1] == -math.inf).all()
    (out * 1e3).sum().backward(retain_graph=True)
    lse.sum().backward()
    for grad in (query.grad, key.grad, value.grad):
        assert grad[0].any() and not grad[1].any()


@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("mask", [None, AttentionMask.causal()], ids=["full", "causal"])
@pytest.mark.parametrize(
    ("batch", "query_length", "key_length"), [(2, 5, 0), (2, 0, 5), (2, 0, 0), (0, 5, 7)],
    ids=["Tk0", "Tq0", "T0", "B0"],
)  # fmt: skip
def test_nothing_to_do(
    kernel: str, device: str, batch: int, query_length: int, key_length: int, mask, sinks: bool
) -> None:
    tensors = inputs(query_length, key_length, batch=batch, device=device)
    extras = {"sinks": torch.randn(6, device=device)} if sinks else {}
    check(kernel, *tensors, mask=mask, **extras)


@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
def test_no_query_heads(kernel: str, device: str, masked: bool) -> None:
    """Keys and values that nobody asks for have gradients of 0; vmap over none of them, too."""
    query, key, value = inputs(5, 7, heads=(0, 1), device=device)
    bias = torch.randn(1, 1, 5, 7, device=device)
    keep = torch.rand(BATCH, 7, device=device) > 0.3
    mask = AttentionMask.from_padding(keep) if masked else None
    leaves = [x.requires_grad_() for x in (query, key, value, bias)]
    out, lse = attend(kernel, query, key, value, mask=mask, bias=bias)
    assert out.shape == (BATCH, 0, 5, 16) and lse.shape == (BATCH, 0, 5)
    for leaf, grad in zip(leaves, torch.autograd.grad(out.sum() + lse.sum(), leaves), strict=True):
        assert grad.shape == leaf.shape and not grad.any()
    per_sample = torch.func.grad(lambda k: attend(kernel, query, k, value, mask=mask)[0].sum())
    assert not torch.vmap(per_sample)(torch.stack([key.detach()] * 3)).any()


def test_padding_of_no_keys(kernel: str, device: str) -> None:
    query, key, value = inputs(5, 0, device=device)
    mask = AttentionMask.from_padding(torch.ones(BATCH, 0, dtype=torch.bool, device=device))
    out, lse = attend(kernel, query, key, value, mask=mask)
    assert not out.any() and (lse == -math.inf).all()


# Numerical range


def climbing(key: Tensor) -> Tensor:
    """Scores that rise by thousands along the keys, in steps that bfloat16 tells apart."""
    key[..., 0] = 3000 * 1.05 ** torch.arange(1.0 - key.shape[2], 1.0, device=key.device)
    return key


def falling(key: Tensor) -> Tensor:
    return climbing(key).flip(2)


def late_peak(key: Tensor) -> Tensor:
    """All the weight on the last keys, far above whatever came first."""
    key[..., 0] = -2000
    key[:, :, -2:, 0] = torch.tensor([1000.0, 2000.0], device=key.device)
    return key


def level(key: Tensor) -> Tensor:
    """Large scores that differ little."""
    key[..., 0] = 4096
    return key


RANGES = [climbing, falling, late_peak, level]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("make", [full, causal, padded], ids=lambda make: make.__name__)
@pytest.mark.parametrize("shape", RANGES, ids=lambda shape: shape.__name__)
@pytest.mark.long
def test_large_scores(kernel: str, device: str, shape: Callable, make: Callable, dtype) -> None:
    """Where a row has one key left, its scores' gradient is 0: half precision may round it only."""
    if dtype == torch.bfloat16 and shape is level:
        pytest.skip("at 4096 neighbouring bfloat16 scores lie 22 apart: nothing to compare")
    query, key, value = inputs(70, 700, dtype=dtype, device=device)
    query[..., 0] = 3 + 2 * torch.rand(query.shape[:3], device=device)
    mask, visible = make(70, 700)
    check(
        kernel, query, shape(key), value, mask=mask, visible=visible,
        vanishing_gradients=dtype != torch.float32,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("make", [full, causal], ids=lambda make: make.__name__)
@pytest.mark.parametrize("gap", [10.0, 25.0, 40.0, 60.0])
@pytest.mark.long
def test_first_keys_far_below_the_rest(
    kernel: str, device: str, gap: float, make: Callable, dtype: torch.dtype
) -> None:
    """A reference taken from the first keys would leave the others too few bits."""
    query, key, value = inputs(70, 700, dtype=dtype, device=device)
    query[..., 0] = 4
    key[..., 0] = 0
    key[:, :, :100, 0] = -gap
    mask, visible = make(70, 700)
    check(kernel, query, key, value, mask=mask, visible=visible)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_rows_far_apart(kernel: str, device: str, dtype: torch.dtype) -> None:
    """Neighbouring rows whose scores differ by thousands, up and down."""
    query, key, value = inputs(40, 70, dtype=dtype, device=device)
    query = query * (torch.arange(40, device=device)[:, None] - 20) * 30
    out, lse = attend(kernel, query.to(dtype), key, value)
    exact, exact_lse = dense_attention(query.to(dtype).double(), key.double(), value.double())
    same, same_lse = dense_attention(query.to(dtype), key, value)
    assert_within_budget("out", out, exact, same)
    assert_within_budget("lse", lse, exact_lse, same_lse)


@pytest.mark.parametrize("poison", [math.nan, pytest.param(math.inf, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_a_bad_batch_row_stays_alone(kernel: str, device: str, name: str, poison: float) -> None:
    made = inputs(33, 70, heads=(2, 1), device=device)
    tensors = dict(zip(("query", "key", "value"), made, strict=True))
    upstream = torch.randn(BATCH, 2, 33, 16, device=device)

    def run() -> list[Tensor]:
        leaves = {n: tensor.clone().requires_grad_() for n, tensor in tensors.items()}
        out, lse = attend(kernel, **leaves, mask=AttentionMask.causal())
        return [out, lse, *torch.autograd.grad(out, list(leaves.values()), upstream)]

    clean = run()
    tensors[name][1] = poison
    # Neither lse nor the gradient of the values is computed from values.
    untouched = ("lse", "d_value") if name == "value" else ()
    results = ("out", "lse", "d_query", "d_key", "d_value")
    for result, got, want in zip(results, run(), clean, strict=True):
        assert torch.equal(got[0], want[0]), result
        if result in untouched:
            assert torch.equal(got[1], want[1]), result
        else:
            assert not got[1].isfinite().all(), result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_large_scores_of_a_batch_row_stay_there(
    kernel: str, device: str, dtype: torch.dtype
) -> None:
    """Which maximum a row is computed with is no matter of its neighbours: the same bits."""
    query, key, value = inputs(24, 700, heads=(2, 1), head_dim=64, dtype=dtype, device=device)

    def run(query: Tensor) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        out, lse = attend(kernel, *leaves)
        return [out, lse, *torch.autograd.grad(out.float().sin().sum(), leaves)]

    calm = run(query)
    large = query.clone()
    large[1] *= 60
    for got, want in zip(run(large), calm, strict=True):
        assert torch.equal(got[0], want[0])


def documents_mask(length: int) -> AttentionMask:
    return AttentionMask.from_documents(torch.tensor([0, 20, 61, length - 10]), key_length=length)


HIDING = {
    "window": lambda length: AttentionMask.causal(window=9),
    "documents": documents_mask,
    "causal-documents": lambda length: documents_mask(length) & AttentionMask.causal(window=30),
    "dense": lambda length: AttentionMask.from_dense(torch.rand(length, length) < 0.04),
    "late": lambda length: AttentionMask.causal(window=9, query_offset=-40),
}
EXTRAS = {
    "plain": lambda length: {},
    "sinks": lambda length: {"sinks": torch.randn(2)},
    "bias": lambda length: {"bias": torch.randn(1, 2, length, length)},
    "all": lambda length: {
        "sinks": torch.randn(2),
        "bias": torch.randn(1, 2, length, length),
        "softcap": 3.0,
        "dropout_p": 0.3,
        "dropout_seed": 5,
    },
}


def long_but(kept: str, cases: dict[str, Callable]) -> list:
    """The cases, of which an interpreted kernel computes one."""
    return [
        pytest.param(case, id=name, marks=() if name == kept else pytest.mark.long)
        for name, case in cases.items()
    ]


@pytest.mark.parametrize("extra", long_but("sinks", EXTRAS))
@pytest.mark.parametrize("hiding", long_but("dense", HIDING))
@pytest.mark.parametrize(
    "poison", [math.nan, *(pytest.param(x, marks=pytest.mark.long) for x in (math.inf, -math.inf))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_what_is_hidden_counts_nothing(
    kernel: str, device: str, hiding: Callable, extra: Callable, poison: float, dtype: torch.dtype
) -> None:
    """Whatever it holds: it reaches neither a row nor a gradient, in its own tile or beyond."""
    length = 100
    mask = hiding(length).to(device)
    visible = mask.to_dense(length, length)[0, 0].to(device)
    shapes = dict(heads=(2, 1), head_dim=8, batch=1, dtype=dtype, device=device)
    tensors = dict(zip(("query", "key", "value"), inputs(length, length, **shapes), strict=True))
    given = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in extra(length).items()}
    tensors |= {name: given.pop(name) for name in ("bias", "sinks") if name in given}
    d_out = torch.randn(1, 2, length, 8, device=device).to(dtype)
    d_lse = torch.randn(1, 2, length, device=device)

    def run(tensors: dict[str, Tensor], d_out: Tensor) -> dict[str, Tensor]:
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        out, lse = attend(kernel, **leaves, mask=mask, q_bucket_size=64, k_bucket_size=64, **given)
        grads = torch.autograd.grad((out, lse), list(leaves.values()), (d_out, d_lse))
        return {"out": out, "lse": lse, **dict(zip(tensors, grads, strict=True))}

    clean = run(tensors, d_out)
    unseen = (~visible.any(0)).nonzero()[:, 0].tolist()
    blind = (~visible.any(1)).nonzero()[:, 0].tolist()
    keys, rows = [*unseen[:1], 70], [*blind[:1], 70]
    for name, at in itertools.product(("query", "key", "value", "d_out"), (0, 1)):
        of_rows = name in ("query", "d_out")
        spots = rows if of_rows else keys
        if at >= len(spots):
            continue
        spot = spots[at]
        given_out = d_out.clone()
        dirty = {n: tensor.clone() for n, tensor in tensors.items()}
        (given_out if name == "d_out" else dirty[name])[0, :, spot, 3] = poison
        got = run(dirty, given_out)
        met_rows = torch.zeros_like(visible[:, 0])
        met_rows[spot] = bool(visible[spot].any())
        met_rows = met_rows if of_rows else visible[:, spot]
        met_keys = visible[met_rows].any(0)
        result_rows = torch.zeros_like(met_rows) if name == "d_out" else met_rows
        free = {
            "out": ~result_rows, "lse": ~result_rows, "query": ~met_rows, "key": ~met_keys,
            "value": ~met_keys,
        }  # fmt: skip
        if "bias" in tensors:
            free["bias"] = ~(met_rows[:, None] & visible)
        if "sinks" in tensors and not met_rows.any():
            free["sinks"] = slice(None)
        for result, untouched in free.items():
            index = (0, slice(None), untouched) if result != "sinks" else untouched
            a, b = got[result][index], clean[result][index]
            where = f"{result} for {name} at {spot}"
            if met_rows.any() or device == "cuda":
                # Rows of one tile share the way in which they are computed, which a GPU's compiler
                # rounds in another order.
                torch.testing.assert_close(a, b, rtol=0.02, atol=0.02, msg=where)
            else:
                assert torch.equal(a, b), where
        if met_rows.any() and name == "value":
            assert not got["out"][0, :, met_rows, 3].isfinite().any(), "what is seen shows"


# Determinism, tiles, memory


def everything(kernel: str, device: str, **arguments) -> list[Tensor]:
    """Results and gradients of one fixed problem with every argument."""
    torch.manual_seed(3)
    tensors = dict(
        zip(("query", "key", "value"), inputs(130, 200, device=device), strict=True)
    )  # fmt: skip
    tensors["bias"] = torch.randn(1, 6, 1, 200, device=device)
    tensors["sinks"] = torch.randn(6, device=device)
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    keep = torch.rand(BATCH, 200, device=device) > 0.2
    out, lse = attend(
        kernel,
        **tensors,
        mask=AttentionMask.causal() & AttentionMask.from_padding(keep),
        softcap=5.0,
        dropout_p=0.2,
        dropout_seed=11,
        **arguments,
    )
    upstream = (torch.randn_like(out), torch.randn_like(lse))
    return [out.detach(), lse.detach(), *torch.autograd.grad((out, lse), leaves, upstream)]


@pytest.mark.long
def test_repeats_bit_for_bit(kernel: str, device: str) -> None:
    first = everything(kernel, device)
    for _ in range(29):
        for again, before in zip(everything(kernel, device), first, strict=True):
            assert torch.equal(again, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize(
    "buckets", [(1, 1), (16, 48), (7, 1000), (256, 64), (1000, 16)], ids=lambda b: f"{b[0]}x{b[1]}"
)
@pytest.mark.long
def test_tiles_of_any_size_within_the_budget(
    kernel: str, device: str, buckets: tuple[int, int], dtype
) -> None:
    mask, visible = padded(70, 140)
    tensors = inputs(70, 140, dtype=dtype, device=device)
    check(kernel, *tensors, mask=mask, visible=visible, buckets=buckets)


@pytest.mark.long
def test_buckets_do_not_change_results(kernel: str, device: str) -> None:
    default = everything(kernel, device)
    for buckets in ((16, 16), (64, 32), (1000, 1000)):
        sized = everything(kernel, device, q_bucket_size=buckets[0], k_bucket_size=buckets[1])
        for got, want in zip(sized, default, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def run_under(mode, monkeypatch: pytest.MonkeyPatch, length: int, mask: AttentionMask):
    """Forward and backward with the kernel's own calls under ``mode``, which stops at the op."""

    def select(*args) -> kernels.Kernel:
        chosen = kernels.select(*args)

        def watched(function: Callable) -> Callable:
            def run(*args):
                with mode:
                    return function(*args)

            return run

        return chosen._replace(forward=watched(chosen.forward), backward=watched(chosen.backward))

    monkeypatch.setattr(op, "select", select)
    tensors = inputs(length, length, heads=(2, 1), head_dim=8, batch=1)
    query, key, value = (tensor.requires_grad_() for tensor in tensors)
    flash_attention(query, key, value, mask=mask, kernel="blockwise").sum().backward()
    return mode


def test_memory_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor grows with Tq * Tk: the largest stays the same when the length doubles twice."""
    sizes = [
        run_under(LargestTensor(), monkeypatch, length, AttentionMask.causal()).elements
        for length in (2048, 8192)
    ]
    assert sizes[0] == sizes[1] < 2048 * 2048


@pytest.mark.parametrize(
    ("mask", "limit"),
    [
        (AttentionMask.causal(), 0.62),
        (AttentionMask.causal(window=64), 0.16),
        (AttentionMask.from_padding(torch.arange(2048) >= 1024), 0.51),
        (AttentionMask.from_documents(torch.arange(0, 2049, 256), causal=True), 0.14),
        (AttentionMask.chunked(256, 2048), 0.14),
    ],
    ids=["causal", "window", "padding", "documents", "chunks"],
)
def test_tiles_without_work_are_skipped(
    monkeypatch: pytest.MonkeyPatch, mask: AttentionMask, limit: float
) -> None:
    """The products done, as a share of those of full attention."""

    def flops(mask: AttentionMask) -> int:
        mode = FlopCounterMode(display=False)
        return run_under(mode, monkeypatch, 2048, mask).get_total_flops()

    assert flops(mask) <= limit * flops(AttentionMask.full())


# The function's own rules


def test_dtype_follows_the_value(kernel: str, device: str) -> None:
    """Rotary embeddings upcast query and key; gradients return in each tensor's own dtype."""
    query, key, value = inputs(9, 20, device=device)
    leaves = [query, key, value.bfloat16()]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    out, lse = attend(kernel, *leaves)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    grads = torch.autograd.grad(out.float().sum(), leaves)
    assert [grad.dtype for grad in grads] == [torch.float32, torch.float32, torch.bfloat16]
    same = attend(kernel, query.bfloat16(), key.bfloat16(), value.bfloat16())
    assert torch.equal(out, same[0]) and torch.equal(lse, same[1])


def test_lse_only_on_request(kernel: str, device: str) -> None:
    tensors = inputs(9, 20, device=device)
    out = flash_attention(*tensors, kernel=kernel)
    assert isinstance(out, Tensor) and torch.equal(out, attend(kernel, *tensors)[0])


TERMS = {
    "plain": lambda: {},
    "scale": lambda: {"scale": -3.0},
    "scale-0": lambda: {"scale": 0.0},
    "softcap": lambda: {"softcap": 0.5},
    "alibi": lambda: {"alibi_slopes": torch.rand(6)},
    "bias": lambda: {"bias": torch.randn(BATCH, 6, 1, 1) * 100},
    "everything": lambda: {
        "softcap": 2.0, "alibi_slopes": torch.rand(BATCH, 6), "bias": torch.randn(6, 1, 1) - 9,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("make", "query_length", "key_length", "of_pair"),
    [(full, 20, 70, "scale"), (full, 3, 600, "everything"), (causal, 65, 65, "plain"),
     (causal, 40, 30, "bias"), (window, 1, 600, "plain"), (window, 20, 130, "everything"),
     (holed, 3, 600, "alibi"), (holed, 20, 70, "plain"), (packed, 40, 40, "softcap"),
     (dense, 20, 70, "scale-0"), (dense, 2, 70, "everything")],
)  # fmt: skip
def test_max_logits(
    kernel: str, device: str, make: Callable, query_length: int, key_length: int, of_pair: str
) -> None:
    """Of visible pairs alone, whatever sinks and dropout do, and with no gradient."""
    mask, visible = make(query_length, key_length)
    mask = None if mask is None else mask.to(device)
    tensors, terms = inputs(query_length, key_length, device=device), TERMS[of_pair]()
    query, key, value = (x.requires_grad_() for x in tensors)
    there = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in terms.items()}
    _, lse, got = flash_attention(
        query, key, value, mask=mask, **there, sinks=torch.full((6,), 500.0, device=device),
        dropout_p=0.5, return_lse=True, return_max_logits=True, kernel=kernel,
    )  # fmt: skip
    double = [x.detach().double().cpu() for x in (query, key)]
    want = dense_scores(*double, visible, **terms).amax((2, 3))
    assert got.dtype == torch.float32 and not got.requires_grad and lse.requires_grad
    torch.testing.assert_close(got.double().cpu(), want, rtol=2e-6, atol=5e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("length", [1, 20])
def test_max_logits_changes_no_gradient(
    kernel: str, device: str, length: int, dtype: torch.dtype
) -> None:
    """Results come in the order out, lse, max_logits; each of them alone is the same."""
    leaves = [x.requires_grad_() for x in inputs(length, 20, dtype=dtype, device=device)]

    def attend(**wanted):
        return flash_attention(*leaves, mask=AttentionMask.causal(), kernel=kernel, **wanted)

    out, lse, largest = attend(return_lse=True, return_max_logits=True)
    short, again = attend(return_max_logits=True)
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    assert largest.dtype == lse.dtype == statistics and largest.shape == out.shape[:2]
    assert torch.equal(short, out) and torch.equal(again, largest)
    both = attend(return_lse=True)
    upstream = torch.randn_like(out), torch.randn_like(lse)
    for got, want in zip((out, lse), both, strict=True):
        torch.testing.assert_close(got, want)
    for got, want in zip(
        torch.autograd.grad((out, lse), leaves, upstream),
        torch.autograd.grad(both, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("length", "poison"), [(1, math.nan), (20, math.inf)])
def test_max_logits_of_bad_keys(kernel: str, device: str, length: int, poison: float) -> None:
    """What is hidden counts nothing; NaN and infinity that are visible are told."""
    query, key, value = (x.abs() for x in inputs(length, 300, device=device))
    keep = torch.ones(BATCH, 300, device=device)
    keep[:, 150:] = 0
    mask = AttentionMask.from_padding(keep)
    want = flash_attention(
        query, key[:, :, :150], value[:, :, :150], return_max_logits=True, kernel=kernel
    )
    for at, is_seen in ((200, False), (100, True)):
        bad = [x.clone() for x in (key, value)]
        for x in bad:
            x[0, :, at] = poison
        got = flash_attention(query, *bad, mask=mask, return_max_logits=True, kernel=kernel)
        torch.testing.assert_close(got[1][1], want[1][1])
        if not is_seen:
            torch.testing.assert_close(got, want)
        else:
            expected = torch.full((6,), poison, device=device)
            assert torch.equal(got[1][0].isnan(), expected.isnan())
            assert torch.equal(got[1][0].isinf(), expected.isinf())


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0)], ids=str)
def test_max_logits_of_nothing(kernel: str, device: str, lengths: tuple[int, int]) -> None:
    _, got = flash_attention(
        *inputs(*lengths, device=device), return_max_logits=True, kernel=kernel
    )
    assert torch.equal(got, torch.full((BATCH, 6), -math.inf, device=device))


def test_softcap_zero_is_off(kernel: str, device: str) -> None:
    tensors = inputs(9, 20, device=device)
    capped = flash_attention(*tensors, softcap=0, kernel=kernel)
    assert torch.equal(capped, flash_attention(*tensors, kernel=kernel))


@pytest.mark.parametrize(("softcap", "name"), [(5.0, "blockwise"), (None, "fused_cpu")])
def test_auto_is_a_kernel_by_name(softcap: float | None, name: str) -> None:
    tensors = inputs(99, 20)
    by_name = flash_attention(*tensors, softcap=softcap, kernel=name)
    assert torch.equal(flash_attention(*tensors, softcap=softcap), by_name)


def test_values_per_head_may_be_strided(kernel: str, device: str) -> None:
    tensors = inputs(9, 20, device=device)
    slopes, sinks = torch.rand(12, device=device)[::2], torch.randn(6, 3, device=device)[:, 1]
    check(kernel, *tensors, alibi_slopes=slopes, sinks=sinks)


def test_a_mask_first_used_in_inference_mode_trains(kernel: str, device: str) -> None:
    """What it works out at its first use is kept for the others."""
    keep = torch.arange(65) >= torch.tensor([[3], [40]])
    mask = AttentionMask.causal() & AttentionMask.from_padding(keep.to(device))
    tensors = inputs(65, 65, heads=(2, 1), device=device)
    with torch.inference_mode():
        attend(kernel, *tensors, mask=mask)
    causal = dense_mask(BATCH, 65, 65, lambda b, i, j: j <= i)
    check(kernel, *tensors, mask=mask, visible=causal & keep[:, None, None])


def test_bool_mask_broadcasts(kernel: str, device: str) -> None:
    tensors = inputs(9, 20, device=device)
    for shape in ((20,), (9, 20), (1, 9, 20), (BATCH, 1, 1, 20), (BATCH, 6, 9, 20)):
        visible = torch.rand(shape, device=device) > 0.3
        check(kernel, *tensors, mask=visible, visible=visible)


Q, K = (2, 6, 9, 16), (2, 2, 20, 16)

REFUSALS = {
    "query-3d": ({"query": torch.zeros(Q[1:])}, r"query: expected 4 dimensions .* got shape \[6"),
    "key-3d": ({"key": torch.zeros(K[1:])}, r"key: expected 4 dimensions"),
    "value-5d": ({"value": torch.zeros(1, *K)}, r"value: expected 4 dimensions"),
    "query-int": ({"query": torch.zeros(Q).long()}, r"query: expected float64, .*got torch.int64"),
    "key-fp8": (
        {"key": torch.zeros(K).to(torch.float8_e4m3fn)}, r"key: expected float64, .*float8_e4m3fn"
    ),
    "value-bool": ({"value": torch.zeros(K).bool()}, r"value: expected float64, .*torch.bool"),
    "key-elsewhere": ({"key": torch.zeros(K, device="meta")}, r"key: expected device .*got meta"),
    "dim-0": ({"query": torch.zeros(2, 6, 9, 0)}, r"query: expected head_dim from 1 to 576, got 0"),
    "dim-577": ({"value": torch.zeros(2, 2, 20, 577)}, r"value: .*from 1 to 576, got 577"),
    "batch": ({"key": torch.zeros(3, 2, 20, 16)}, r"key: expected .*\[2, \*, \*, 16\].*got \[3, 2"),
    "dims": ({"key": torch.zeros(2, 2, 20, 8)}, r"key: .* as in query, got \[2, 2, 20, 8\]"),
    "lengths": ({"value": torch.zeros(2, 2, 19, 16)}, r"value: .*\[2, 2, 20, \*\] as in key"),
    "value-heads": ({"value": torch.zeros(2, 1, 20, 16)}, r"value: expected .* as in key"),
    "heads": ({"query": torch.zeros(2, 5, 9, 16)}, r"query: .*a multiple of key's 2, got 5"),
    "no-heads": (
        {"key": torch.zeros(2, 0, 20, 16), "value": torch.zeros(2, 0, 20, 16)},
        r"query: .*a multiple of key's 0, got 6",
    ),
    "mask-type": ({"mask": [1]}, r"mask: expected an AttentionMask, .*got list"),
    "mask-float": ({"mask": torch.zeros(9, 20)}, r"mask: expected bool .*torch.float32; .*`bias`"),
    "mask-int": ({"mask": torch.ones(9, 20).long()}, r"mask: expected bool .*`mask != 0`"),
    "mask-5d": ({"mask": torch.ones(1, 1, 1, 9, 20).bool()}, r"mask: .*at most the 4 .*\[1, 1, 1"),
    "mask-dense": (
        {"mask": torch.ones(9, 19).bool()},
        r"mask: expected a tensor broadcastable to .*\[2, 6, 9, 20\], got \[1, 1, 9, 19\]",
    ),
    "mask-keys": (
        {"mask": AttentionMask.from_padding(torch.ones(2, 19))},
        r"mask: expected 20 keys and 1 or 2 batch rows, as in key, got 19 keys and 2 batch rows",
    ),
    "mask-batch": (
        {"mask": AttentionMask.from_padding(torch.ones(3, 20))},
        r"mask: expected 20 keys and 1 or 2 batch rows, as in key, got 20 keys and 3 batch rows",
    ),
    "swapped-lengths-and-heads": (
        {"query": torch.zeros(2, 1, 6, 16), "key": torch.zeros(2, 20, 2, 16),
         "value": torch.zeros(2, 20, 2, 16)},
        r"query: .*a multiple of key's 20, got 1; the layout is \[batch, .*transpose\(1, 2\)",
    ),
    "query-none": ({"query": None}, r"query: expected a tensor, got NoneType"),
    "bias-number": ({"bias": 1.0}, r"bias: expected a tensor, got float"),
    "slopes-list": ({"alibi_slopes": [1.0] * 6}, r"alibi_slopes: expected a tensor, got list"),
    "scale-nan": ({"scale": math.nan}, r"scale: expected None or a finite number, got nan"),
    "scale-inf": ({"scale": math.inf}, r"scale: expected None or a finite number, got inf"),
    "scale-text": ({"scale": "large"}, r"scale: expected a number, got 'large'"),
    "scale-gradient": (
        {"scale": torch.ones((), requires_grad=True)}, r"scale: no gradient .*multiply query by it"
    ),
    "softcap-inf": ({"softcap": math.inf}, r"softcap: .*got inf"),
    "dropout-nan": ({"dropout_p": math.nan}, r"dropout_p: .*got nan"),
    "dropout-none": ({"dropout_p": None}, r"dropout_p: expected a number, got None"),
    "seed-float": (
        {"dropout_p": 0.1, "dropout_seed": 1.5}, r"dropout_seed: expected None or an .*got 1.5"
    ),
    "seed-large": ({"dropout_p": 0.1, "dropout_seed": 2**64}, r"dropout_seed: .*of 64 bits"),
    "seed-dtype": (
        {"dropout_p": 0.1, "dropout_seed": torch.ones(1)},
        r"dropout_seed: expected an integer tensor, got torch.float32",
    ),
    "bias-bool": ({"bias": torch.ones(9, 20).bool()}, r"bias: expected a float .*`mask`"),
    "bias-shape": ({"bias": torch.zeros(9, 19)}, r"bias: .*\[2, 6, 9, 20\], got \[9, 19\]"),
    "bias-5d": ({"bias": torch.zeros(1, 1, 1, 9, 20)}, r"bias: .*broadcastable"),
    "bias-elsewhere": (
        {"bias": torch.zeros(9, 20, device="meta")}, r"bias: expected device .*got meta"
    ),
    "slopes": ({"alibi_slopes": torch.ones(2)}, r"alibi_slopes: .*\[6\] or \[2, 6\], got \[2\]"),
    "slopes-gradient": (
        {"alibi_slopes": torch.ones(6, requires_grad=True)}, r"alibi_slopes: no gradient"
    ),
    "sinks": ({"sinks": torch.ones(6, 2)}, r"sinks: .*\[6\] or \[2, 6\], got \[6, 2\]"),
    "sinks-elsewhere": (
        {"sinks": torch.ones(6, device="meta")}, r"sinks: expected device .*got meta"
    ),
    "softcap": ({"softcap": -1.0}, r"softcap: expected None, 0 \(off\) or .*got -1.0"),
    "softcap-nan": ({"softcap": math.nan}, r"softcap: .*got nan"),
    "dropout-1": ({"dropout_p": 1.0}, r"dropout_p: expected 0 <= dropout_p < 1, got 1.0"),
    "dropout-negative": ({"dropout_p": -0.1}, r"dropout_p: .*got -0.1"),
    "seed-shape": (
        {"dropout_p": 0.1, "dropout_seed": torch.zeros(2).long()},
        r"dropout_seed: expected one element, got shape \[2\]",
    ),
    "kernel": ({"kernel": "fastest"}, r"kernel: expected .*blockwise.*got 'fastest'"),
    "max-logits": ({"return_max_logits": 1}, r"return_max_logits: expected True or .*got 1"),
    "q-bucket": (
        {"q_bucket_size": 0}, r"q_bucket_size: expected None or an integer of at least 1, got 0"
    ),
    "k-bucket-float": ({"k_bucket_size": 2.5}, r"k_bucket_size: expected None or an .*got 2.5"),
    "k-bucket": ({"k_bucket_size": -3}, r"k_bucket_size: .*got -3"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refusal(arguments: dict, message: str) -> None:
    """Names the argument, what was expected and what came."""
    tensors = {"query": torch.zeros(Q), "key": torch.zeros(K), "value": torch.zeros(K)}
    with pytest.raises(ValueError, match=message):
        flash_attention(**(tensors | arguments))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("causal", r"; here it is mask=AttentionMask.causal\(\)"),
        (
            "is_causal",
            r"; here it is mask=AttentionMask.causal\(query_offset=0\), which is top-left",
        ),
        ("softmax_scale", "; here it is scale"),
        ("colour", "$"),
    ],
)
def test_names_of_other_libraries(name: str, hint: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'{hint}"):
        flash_attention(*inputs(9, 20), **{name: True})


def test_constant_slopes_may_belong_to_parameters() -> None:
    """They are refused where a gradient for them would be missing, and nowhere else."""
    tensors, slopes = inputs(9, 20), torch.rand(6, requires_grad=True)
    want = flash_attention(*tensors, alibi_slopes=slopes.detach())
    for guard in (torch.no_grad, torch.inference_mode):
        with guard():
            assert torch.equal(flash_attention(*tensors, alibi_slopes=slopes), want)
