"""`AttentionWeights` against the dense formula, and in linear memory."""

from __future__ import annotations

from collections.abc import Callable

import mask_cases
import pytest
import torch
from helpers import LargestTensor, inputs
from torch import Tensor

from hf_flash_two import AttentionMask, AttentionWeights, flash_attention


def dense(query: Tensor, key: Tensor, visible: Tensor | None, **terms) -> Tensor:
    """The weights in float64, as the textbook writes them."""
    scores = query.double() @ key.double().repeat_interleave(3, 1).mT
    scores *= terms.get("scale", query.shape[3] ** -0.5)
    if softcap := terms.get("softcap"):
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + terms.get("bias", 0.0)
    if "alibi_slopes" in terms:
        queries, keys = scores.shape[2:]
        position = torch.arange(keys - queries, keys)[:, None]
        scores -= terms["alibi_slopes"][:, None, None] * (position - torch.arange(keys)).abs()
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    sinks = terms.get("sinks", torch.full((6,), -torch.inf))
    column = sinks.double()[:, None, None].expand(*scores.shape[:3], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1].nan_to_num(0)


def check(weights: AttentionWeights, want: Tensor, dtype: torch.dtype) -> None:
    close = dict(rtol=1e-9, atol=1e-12) if dtype == torch.float64 else dict(rtol=1e-4, atol=1e-5)
    close |= dict(check_dtype=False)
    torch.testing.assert_close(weights.rows(), want, **close)
    torch.testing.assert_close(weights.received(), want.sum(2), **close)
    entropy = torch.special.entr(want).sum(-1)
    torch.testing.assert_close(weights.entropy(), entropy, **close)
    some = [0, want.shape[2] // 2, -1]
    torch.testing.assert_close(weights.rows(some), want[:, :, some], **close)
    last = weights.slice_queries(-7, want.shape[2])
    torch.testing.assert_close(last.received(), want[:, :, -7:].sum(2), **close)
    largest, at = weights.top_keys(5)
    torch.testing.assert_close(largest, want.topk(5, -1).values, **close)
    found = torch.where(at < 0, 0, want.gather(-1, at.clamp(min=0)))
    torch.testing.assert_close(found, largest, **close)
    assert ((at < 0) == (largest == 0)).all()
    assert weights.rows().dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("make", mask_cases.MASKS, ids=lambda x: x.__name__)
def test_masks(make: Callable, dtype: torch.dtype) -> None:
    """Grouped heads; some rows see nothing, some fewer keys than are asked for."""
    mask, visible = make(61, 150)
    query, key, _ = inputs(61, 150, dtype=dtype)
    check(AttentionWeights(query, key, mask=mask), dense(query, key, visible), dtype)


TERMS = {
    "scale": lambda: {"scale": 0.7},
    "softcap": lambda: {"softcap": 2.0},
    "bias": lambda: {"bias": torch.randn(2, 6, 61, 150)},
    "bias of keys": lambda: {"bias": torch.randn(1, 6, 1, 150), "sinks": torch.randn(6)},
    "large bias": lambda: {
        "bias": torch.full((1, 1, 1, 1), 2048.0),
        "sinks": torch.full((6,), 2048.0),
    },
    "alibi": lambda: {"alibi_slopes": torch.rand(6)},
    "sinks": lambda: {"sinks": torch.randn(6)},
}  # fmt: skip


@pytest.mark.parametrize("with_lse", [False, True], ids=["", "lse"])
@pytest.mark.parametrize("term", TERMS.values(), ids=TERMS)
def test_terms(term: Callable, with_lse: bool) -> None:
    """Whether the log-sum-exp is given or computed."""
    terms = term()
    mask, visible = mask_cases.causal(61, 150)
    query, key, value = inputs(61, 150)
    lse = None
    if with_lse:
        _, lse = flash_attention(query, key, value, mask=mask, return_lse=True, **terms)
    weights = AttentionWeights(query, key, lse=lse, mask=mask, **terms)
    check(weights, dense(query, key, visible, **terms), torch.float32)


def test_half_precision() -> None:
    query, key, _ = inputs(61, 150, dtype=torch.bfloat16)
    check(AttentionWeights(query, key), dense(query, key, None), torch.bfloat16)


def test_hidden_keys_may_hold_anything() -> None:
    query, key, _ = inputs(61, 150)
    keep = torch.arange(150) < 130
    want = dense(query, key, keep.expand(1, 1, 61, 150))
    key[:, :, 130:] = torch.nan
    check(AttentionWeights(query, key, mask=AttentionMask.from_padding(keep)), want, torch.float32)


def test_there_is_no_gradient_and_no_graph() -> None:
    query, key, _ = (x.requires_grad_() for x in inputs(61, 150))
    weights = AttentionWeights(query, key)
    results = (weights.received(), weights.entropy(), weights.rows(), *weights.top_keys(3))
    assert not any(x.requires_grad for x in results)


def test_what_does_not_fit_is_refused() -> None:
    query, key, _ = inputs(61, 150)
    with pytest.raises(ValueError, match=r"lse: expected shape \[2, 6, 61\] as of query, got"):
        AttentionWeights(query, key, lse=torch.zeros(2, 6, 150))
    with pytest.raises(ValueError, match="key: expected"):
        AttentionWeights(query, key[:1])
    weights = AttentionWeights(query, key)
    with pytest.raises(ValueError, match="count: expected from 1 to 150 keys, got 151"):
        weights.top_keys(151)
    with pytest.raises(IndexError):
        weights.rows([61])


def test_memory_is_linear() -> None:
    """No tensor grows with Tq * Tk: sums are as large as a query's tiles, whatever the length."""
    sizes = []
    for length in (2048, 4096):
        query, key, value = inputs(length, length, heads=(2, 1), head_dim=8, batch=1)
        mask = AttentionMask.causal()
        _, lse = flash_attention(query, key, value, mask=mask, return_lse=True)
        with LargestTensor() as watching:
            weights = AttentionWeights(query, key, lse=lse, mask=mask)
            weights.received(), weights.entropy(), weights.top_keys(4)
        sizes.append(watching.elements)
    assert sizes[0] == sizes[1] < 2048 * 2048
