"""What ranks send each other, so that each has the keys that its queries see, or other heads.

Keys and values travel together, tokens first: what arrives lies in memory as the attention reads
it, and no rank puts it in order. Gradients go the same way back. They are added in the order of the
ranks, in float32: the same bits each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import Function

from hf_flash_two.kernels.params import statistics_dtype
from hf_flash_two.parallel.layout import Layout

Run = tuple[int, int]
"""A half-open run of tokens."""


class Pending:
    """A tensor that a collective is filling."""

    def __init__(self, tensor: Tensor, work: Any) -> None:
        # The compiler of PyTorch 2.10 gives the tensor itself.
        self._tensor, self._work = tensor, work if _asynchronous() else None

    def wait(self) -> Tensor:
        if self._work is not None:
            self._work.wait()
        return self._tensor


def _all_to_all(
    x: Tensor, sent: Sequence[int] | None, received: Sequence[int] | None, group: dist.ProcessGroup
) -> Pending:
    """Rows of ``x`` to each rank in turn; None: as many to and from each."""
    rows = x.shape[0] if received is None else sum(received)
    out = x.new_empty(rows, *x.shape[1:])
    sizes = [None if rows is None else list(rows) for rows in (received, sent)]
    work = dist.all_to_all_single(out, x, *sizes, group=group, async_op=_asynchronous())
    return Pending(out, work)


def _asynchronous() -> bool:
    # The compiler traces collectives that are waited for.
    return not torch.compiler.is_compiling()


@dataclass(frozen=True)
class Route:
    """Which tokens go to whom.

    Attributes:
        group: of the ranks.
        sent: by rank the runs of this rank's tokens that it gets.
        received: by rank how many tokens come from it.
        everything: every rank gets all tokens of all ranks.
    """

    group: dist.ProcessGroup
    sent: tuple[tuple[Run, ...], ...]
    received: tuple[int, ...]
    everything: bool

    def go(self, x: Tensor) -> Pending:
        """From this rank's tokens, [tokens, ...], to those that it gets, in the order of ranks."""
        if self.everything:
            out = x.new_empty(sum(self.received), *x.shape[1:])
            x = x.contiguous()
            work = dist.all_gather_into_tensor(out, x, self.group, _asynchronous())
            return Pending(out, work)
        return _all_to_all(self._of(x), self._counts, self.received, self.group)

    def back(self, x: Tensor) -> Pending:
        """Gradients of what `go` gave, on their way to the ranks that `add` them."""
        if self.everything:
            return _all_to_all(x.contiguous(), None, None, self.group)
        return _all_to_all(x.contiguous(), self.received, self._counts, self.group)

    def add(self, parts: Tensor, tokens: int) -> Tensor:
        """The sum of what `back` brought, [tokens, ...] in float32 (float64)."""
        dtype = statistics_dtype(parts.dtype)
        if self.everything:
            return parts.unflatten(0, (-1, tokens)).sum(0, dtype=dtype)
        total, at = parts.new_zeros(tokens, *parts.shape[1:], dtype=dtype), 0
        for runs in self.sent:
            for start, stop in runs:
                total[start:stop] += parts[at : at + stop - start]
                at += stop - start
        return total

    def _of(self, x: Tensor) -> Tensor:
        return torch.cat([x[:0], *(x[start:stop] for runs in self.sent for start, stop in runs)])

    @property
    def _counts(self) -> list[int]:
        return [sum(stop - start for start, stop in runs) for runs in self.sent]


def to_heads(x: Tensor, layout: Layout, group: dist.ProcessGroup) -> Tensor:
    """From this rank's tokens of all heads to all tokens of this rank's heads.

    Args:
        x: [B, H, T / W, D], H a multiple of the W ranks.

    Returns:
        [B, H / W, T, D], in the order of the sequence.
    """
    return _Swap.apply(x, layout, group, True)  # pyright: ignore[reportReturnType]


def to_tokens(x: Tensor, layout: Layout, group: dist.ProcessGroup) -> Tensor:
    """The opposite of `to_heads`."""
    return _Swap.apply(x, layout, group, False)  # pyright: ignore[reportReturnType]


class _Swap(Function):
    """Each is the other's gradient: both only move elements."""

    @staticmethod
    def forward(ctx, x, layout, group, heads):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.call = layout, group, heads
        return _swap(x, layout, group, heads)

    @staticmethod
    def backward(ctx, d_x):  # pyright: ignore[reportIncompatibleMethodOverride]
        layout, group, heads = ctx.call
        return _Swap.apply(d_x, layout, group, not heads), None, None, None


def _swap(x: Tensor, layout: Layout, group: dist.ProcessGroup, heads: bool) -> Tensor:
    ranks = layout.ranks
    if heads:
        # [ranks * tokens, B, heads of the rank, D]
        sent = x.unflatten(1, (ranks, -1)).permute(1, 3, 0, 2, 4).flatten(0, 1)
        got = _all_to_all(sent.contiguous(), None, None, group).wait()
        return layout.join(got, 0).permute(1, 2, 0, 3)
    tokens = x.permute(2, 0, 1, 3)
    got = _all_to_all(layout.split_all(tokens, 0).contiguous(), None, None, group).wait()
    return got.unflatten(0, (ranks, -1)).permute(2, 0, 3, 1, 4).flatten(1, 2)
