"""The settings of one attention call, all but query, key and value, as kernels receive them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, get_type_hints

import torch
from torch import Tensor

LOG2E = 1.4426950408889634
"""Kernels work in base 2: exp2 is the cheaper exponential on every device."""

Layout = tuple[tuple[int, ...], tuple[int, ...]]
"""Shape and strides of a tensor."""


class AttentionParams(NamedTuple):
    """Settings of one call, already validated.

    The op's schema, its rules for vmap and for DTensors, and the cache of launches read the fields
    by name; tensors come first. CONTRIBUTING.md says what a new term of the scores touches.

    Attributes:
        query_start, query_stop, key_bounds, dense: see `masks.AttentionMask`; each may be None.
        bias: [B or 1, H or 1, Tq or 1, Tk or 1], added to the scaled and capped scores.
        alibi_slopes: [B or 1, H] in `statistics_dtype`; adds ``-slope * |position - key|``.
        sinks: [B or 1, H] in `statistics_dtype`; a logit that joins each row's softmax and has no
            value.
        seed: int64 [1]; the pairs dropped are a function of (seed, batch, head, query, key).
        query_offset: position of query 0 among the keys.
        window_left, window_right: how far a query sees behind and ahead; None is unbounded.
        scale, softcap, dropout_p: 0 turns softcap and dropout_p off.
        block_q, block_k: the caller's limit on tile sizes, or None.
        deterministic: the same inputs give the same bits. Kernels may always keep to it.
        max_logits: the forward also gives the largest score of any visible pair of each head.
        batch_invariant: a document's bits depend on nothing else; see `kernels.invariant`.
    """

    query_start: Tensor | None
    query_stop: Tensor | None
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
    deterministic: bool = True
    max_logits: bool = False
    batch_invariant: bool = False

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[: len(TENSORS)]  # pyright: ignore[reportReturnType]

    @property
    def numbers(self) -> tuple[float | None, ...]:
        """The fields that are not tensors."""
        return self[len(TENSORS) :]  # pyright: ignore[reportReturnType]

    @property
    def fixed_numbers(self) -> tuple[float | None, ...]:
        """The `numbers` that stay as they are while keys are added."""
        return self[_QUERY_OFFSET + 1 :]  # pyright: ignore[reportReturnType]

    @property
    def plain(self) -> bool:
        """Whether scores are the scaled products and nothing else."""
        return self.bias is None and self.alibi_slopes is None and not self.softcap


Forward = Callable[[Tensor, Tensor, Tensor, AttentionParams], tuple[Tensor | None, ...]]
"""A kernel's forward: query, key, value and settings -> out, lse and, on request, max_logits."""


class Prepared(NamedTuple):
    """What computes all calls that differ in their tensors' values only.

    Attributes:
        backward: has the arguments of a kernel's; None if the backward is to be selected.
    """

    forward: Forward
    backward: Callable | None = None


SCHEMA_TYPES = {
    Tensor | None: "Tensor?", int: "SymInt", int | None: "SymInt?", float: "float", bool: "bool",
}  # fmt: skip
SCHEMA = {
    name: SCHEMA_TYPES[annotation] for name, annotation in get_type_hints(AttentionParams).items()
}
"""The fields' types as PyTorch's op schemas write them."""

TENSORS = tuple(name for name, kind in SCHEMA.items() if kind == "Tensor?")
"""The fields that are tensors; they come before all others."""
_QUERY_OFFSET = AttentionParams._fields.index("query_offset")


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of lse and of every accumulator."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def output_layout(query: Tensor, head_dim: int) -> Layout:
    """Shape [B, H, Tq, head_dim], and strides that order its axes in memory as ``query``'s are."""
    batch, heads, length, _ = query.shape
    row, head = head_dim, length * head_dim
    if query.stride(1) < query.stride(2) and query.stride(3) == 1:
        row, head = heads * head_dim, head_dim
    return (batch, heads, length, head_dim), (heads * length * head_dim, head, row, 1)


def empty_output(query: Tensor, head_dim: int) -> Tensor:
    """An uninitialised tensor of `output_layout`."""
    return query.new_empty_strided(*output_layout(query, head_dim))


def empty_lse(query: Tensor) -> Tensor:
    """An uninitialised [B, H, Tq] for the log-sum-exp of each row."""
    batch, heads, length, _ = query.shape
    return query.new_empty(batch, heads, length, dtype=statistics_dtype(query.dtype))


def lowest_logits(query: Tensor) -> Tensor:
    """max_logits [B, H] of heads that see nothing: -inf."""
    return query.new_full(query.shape[:2], -math.inf, dtype=statistics_dtype(query.dtype))
