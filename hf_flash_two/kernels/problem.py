"""Everything about one attention call besides query, key and value, as every kernel receives it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LOG2E = 1.4426950408889634
"""Kernels work in base 2: exp2 is the cheaper exponential on every device."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Settings of one call, already validated; the fields are the op's arguments in order.

    Attributes:
        first_query, last_query, key_bounds, dense: see `masks.AttentionMask`; each may be None.
        bias: [B or 1, H or 1, Tq or 1, Tk or 1], added to the scaled and capped scores.
        alibi_slopes: [B or 1, H] in `statistics_dtype`; adds ``-slope * |position - key|``.
        sinks: [B or 1, H] in `statistics_dtype`; a logit that joins each row's softmax and has no
            value.
        seed: int64 [1]; dropout's bits are a function of (seed, batch, head, query, key).
        query_offset: position of query 0 among the keys.
        window_left, window_right: the band; None is unbounded.
        scale, softcap, dropout_p: softcap 0 and dropout_p 0 are off.
        block_q, block_k: the caller's limit on tile sizes, or None.
    """

    first_query: Tensor | None
    last_query: Tensor | None
    key_bounds: Tensor | None
    dense: Tensor | None
    bias: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    seed: Tensor | None
    query_offset: int
    window_left: int | None
    window_right: int | None
    scale: float
    softcap: float
    dropout_p: float
    block_q: int | None
    block_k: int | None


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of lse and of every accumulator."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_output(query: Tensor, head_dim: int) -> Tensor:
    """An uninitialised [B, H, Tq, head_dim] whose axes lie in memory as those of ``query`` do."""
    batch, heads, length, _ = query.shape
    if query.stride(1) < query.stride(2):
        return query.new_empty(batch, length, heads, head_dim).transpose(1, 2)
    return query.new_empty(batch, heads, length, head_dim)


def empty_lse(query: Tensor) -> Tensor:
    """An uninitialised [B, H, Tq] for the log-sum-exp of each row."""
    return query.new_empty(query.shape[:3], dtype=statistics_dtype(query.dtype))
