"""Dense attention as the textbook writes it, with masks of its own: what every kernel must equal.

Nothing here uses the package, so a mask that is wrong there cannot hide here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def dense_mask(
    batch: int, query_length: int, key_length: int, sees: Callable, offset: int | None = None
) -> Tensor:
    """bool [B, 1, Tq, Tk] from ``sees(b, i, j)``, where query i stands at position i.

    Args:
        sees: takes index tensors that broadcast and answers with & | and comparisons.
        offset: position of the first query; None puts the last query on the last key.
    """
    offset = key_length - query_length if offset is None else offset
    b = torch.arange(batch)[:, None, None]
    i = torch.arange(offset, offset + query_length)[:, None]
    j = torch.arange(key_length)
    seen = torch.as_tensor(sees(b, i, j)).expand(batch, query_length, key_length)
    return seen[:, None]


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    visible: Tensor | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    alibi_offset: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(out, lse): matrix products in the dtype of the inputs, softmax and lse in float32 at least.

    A row that sees nothing has out 0, lse -inf and no gradient.

    Args:
        visible: bool broadcastable to [B, H, Tq, Tk].
        alibi_offset: position of the first query; None puts the last query on the last key.
        keep: bool [B, H, Tq, Tk], which probabilities dropout spares.
    """
    batch, heads, query_length, _ = query.shape
    key_length = key.shape[2]
    value = value.repeat_interleave(heads // key.shape[1], 1)
    scores = dense_scores(query, key, visible, scale, bias, alibi_slopes, alibi_offset, softcap)
    column = query.new_tensor(-math.inf) if sinks is None else sinks.reshape(-1, heads, 1, 1)
    scores = torch.cat([scores, column.expand(batch, heads, query_length, 1)], dim=-1)
    if scores.dtype.itemsize < 4:
        scores = scores.float()
    peak = scores.detach().amax(-1, keepdim=True)
    peak = peak.masked_fill(peak == -math.inf, 0)
    weights = torch.exp(scores - peak)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1)
    lse = (peak + total.log()).masked_fill(empty, -math.inf)[..., 0]
    probabilities = (weights / total)[..., :key_length].to(value.dtype)
    if keep is not None:
        probabilities = probabilities * keep / (1 - dropout_p)
    return probabilities @ value, lse


def dense_scores(
    query: Tensor,
    key: Tensor,
    visible: Tensor | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    alibi_offset: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """[B, Hq, Tq, Tk] of `dense_attention`, -inf where nothing is visible, in the inputs' dtype."""
    heads, query_length, head_dim = query.shape[1:]
    key_length = key.shape[2]
    key = key.repeat_interleave(heads // key.shape[1], 1)
    scores = query @ key.transpose(-1, -2) * (head_dim**-0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if alibi_slopes is not None:
        offset = key_length - query_length if alibi_offset is None else alibi_offset
        position = torch.arange(offset, offset + query_length, device=query.device)[:, None]
        distance = (position - torch.arange(key_length, device=query.device)).abs()
        scores = scores - alibi_slopes.reshape(-1, heads, 1, 1) * distance.to(scores.dtype)
    return scores if visible is None else scores.masked_fill(~visible, -math.inf)


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def assert_within_budget(
    name: str, actual: Tensor, exact: Tensor, same_dtype: Tensor, inherited: float = 0.0
) -> None:
    """The RMS error is at most twice that of the dense formula; in float32 three times, on a GPU,
    whose library splits long sums, four times.

    The largest error would not do: a low-precision accumulator triples the RMS over long rows and
    leaves the maximum where it was.

    Args:
        exact: the float64 result.
        same_dtype: the dense formula's result in the dtype under test.
        inherited: relative error that no kernel can avoid, allowed on top.
    """
    assert actual.shape == exact.shape, f"{name}: shape {actual.shape}, expected {exact.shape}"
    assert actual.isfinite().all(), f"{name}: {(~actual.isfinite()).sum()} values not finite"
    dtype = actual.dtype
    factor = {torch.float64: 200.0, torch.float32: 4.0 if actual.is_cuda else 3.0}.get(dtype, 2.0)
    floor = torch.finfo(dtype).eps * rms(exact) / 4
    error, allowed = rms(actual.double() - exact), max(rms(same_dtype.double() - exact), floor)
    limit = factor * allowed + inherited * rms(exact)
    assert error <= limit, f"{name}: rms error {error:.2e} > {limit:.2e}, dense {allowed:.2e}"
