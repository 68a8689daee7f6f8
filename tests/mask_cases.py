"""Masks of every form over `BATCH` rows, each with what it must mean.

Each function takes (query_length, key_length) and returns the mask for the kernel and the bool that
it stands for, written from the plain description by position i of the query and index j of the key.
"""

from __future__ import annotations

import itertools

import torch
from helpers import BATCH, padded
from oracle import dense_mask
from torch import Tensor

from hf_flash_two import AttentionMask


def documents(length: int) -> list[int]:
    """Boundaries of documents of uneven lengths, two of them empty."""
    return [0, length // 8, length // 8, length, length]


def runs_of(boundaries: list[int], count: int) -> Tensor:
    """Which document each of ``count`` places belongs to."""
    ids = torch.zeros(count, dtype=torch.int64)
    for index, (start, stop) in enumerate(itertools.pairwise(boundaries)):
        ids[start:stop] = index
    return ids


def full(tq: int, tk: int):
    return AttentionMask.full(), None


def causal(tq: int, tk: int):
    return AttentionMask.causal(), dense_mask(BATCH, tq, tk, lambda b, i, j: j <= i)


def window(tq: int, tk: int):
    def sees(b, i, j):
        return (j <= i) & (j > i - 24)

    return AttentionMask.causal(window=24), dense_mask(BATCH, tq, tk, sees)


def two_sided_window(tq: int, tk: int):
    def sees(b, i, j):
        return (j <= i + 3) & (j >= i - 70)

    return AttentionMask.window(70, 3), dense_mask(BATCH, tq, tk, sees)


def holed(tq: int, tk: int):
    """Every third key of row 0 is padding, every key of row 1."""
    keep = torch.arange(tk) % 3 != 1
    keep = torch.stack([keep, torch.zeros_like(keep)]).float()

    def sees(b, i, j):
        return (b == 0) & (j % 3 != 1)

    return AttentionMask.from_padding(keep), dense_mask(BATCH, tq, tk, sees)


def packed(tq: int, tk: int):
    """Documents, bottom-right causal within each."""
    q_cu, k_cu = documents(tq), documents(tk)
    visible = torch.zeros(1, 1, tq, tk, dtype=torch.bool)
    for (q0, q1), (k0, k1) in zip(itertools.pairwise(q_cu), itertools.pairwise(k_cu), strict=True):
        for row in range(q0, q1):
            visible[..., row, k0 : max(k0, k1 - (q1 - row) + 1)] = True
    mask = AttentionMask.from_documents(
        torch.tensor(k_cu), query_cu_seqlens=torch.tensor(q_cu), causal=True
    )
    return mask, visible


def prefix(tq: int, tk: int):
    lengths = torch.tensor([tk // 3, tk // 2])

    def sees(b, i, j):
        return (j <= i) | (j < lengths[b])

    return AttentionMask.from_prefix(lengths, tk), dense_mask(BATCH, tq, tk, sees)


def blocks(tq: int, tk: int):
    """A block in each row that sees itself both ways."""
    ids = torch.full((BATCH, tk), -1)
    spans = torch.tensor([[tk // 4, tk // 2], [tk // 2, tk]])
    for row, (start, stop) in enumerate(spans.tolist()):
        ids[row, start:stop] = 7

    def sees(b, i, j):
        start, stop = spans[b, 0], spans[b, 1]
        return (j <= i) | ((i >= start) & (i < stop) & (j >= start) & (j < stop))

    return AttentionMask.from_blocks(ids), dense_mask(BATCH, tq, tk, sees)


def tree(tq: int, tk: int):
    """A trunk with two branches, the second of which forks again."""
    cuts = [0, tk // 4, tk // 2, tk - tk // 4, tk - tk // 8, tk]
    parents = [-1, 0, 0, 2, 2]
    lengths = [b - a for a, b in itertools.pairwise(cuts)]
    ancestors = torch.zeros(5, 5, dtype=torch.bool)
    for node in range(5):
        walk = node
        while walk != -1:
            ancestors[node, walk] = True
            walk = parents[walk]
    segment = runs_of(cuts, tk)

    def sees(b, i, j):
        # Queries before all keys see none: j <= i says so.
        return (j <= i) & ancestors[segment[i.clamp(min=0)], segment[j]]

    mask = AttentionMask.from_tree(lengths, parents).slice_queries(tk - tq, tk, tk, tk)
    return mask, dense_mask(BATCH, tq, tk, sees)


def chunk(tq: int, tk: int):
    starts = torch.tensor([0, 5])

    def sees(b, i, j):
        start = starts[b]
        same = torch.div(i - start, 40, rounding_mode="floor") == torch.div(
            j - start, 40, rounding_mode="floor"
        )
        return (j <= i) & same

    return AttentionMask.chunked(40, tk, starts=starts), dense_mask(BATCH, tq, tk, sees)


def dense(tq: int, tk: int):
    visible = torch.rand(BATCH, 6, tq, tk) > 0.4
    return visible, visible


def dense_and_window(tq: int, tk: int):
    """A dense tensor shared by the heads, within a band and a padding."""
    shared = torch.rand(BATCH, 1, tq, tk) > 0.4
    band, inside = two_sided_window(tq, tk)
    padding, unpadded = padded(tq, tk)
    mask = AttentionMask.from_dense(shared) & band & padding
    return mask, shared & inside & unpadded


MASKS = [
    full, causal, window, two_sided_window, padded, holed, packed, prefix, blocks, tree, chunk,
    dense, dense_and_window,
]  # fmt: skip
