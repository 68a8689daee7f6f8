"""Which rank of a mesh holds which tokens of a sequence."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

MOST_CHUNKS = 16
"""Chunks that a rank holds of a balanced layout."""


@dataclass(frozen=True)
class Layout:
    """A sequence cut into equal chunks, and the chunks that each rank holds.

    It says nothing of lengths: any sequence that the number of chunks divides may be laid out so.

    Attributes:
        owners: by rank the chunks that it holds, as many for each, in ascending order.
    """

    owners: tuple[tuple[int, ...], ...]

    @classmethod
    def contiguous(cls, ranks: int) -> Layout:
        """Rank r holds the run r of ``ranks``."""
        return cls(tuple((rank,) for rank in range(ranks)))

    @classmethod
    def head_tail(cls, ranks: int) -> Layout:
        """Rank r holds parts r and 2 W - 1 - r of 2 W: each has the same work under causality."""
        return cls(tuple((rank, 2 * ranks - 1 - rank) for rank in range(ranks)))

    @classmethod
    def balanced(cls, ranks: int, work: Sequence[float]) -> Layout:
        """As many chunks for each rank, dealt out so that their work is about equal.

        The largest goes first, to the rank with the least work so far that has room.

        Args:
            work: of each chunk; their number is a multiple of ``ranks``.

        Raises:
            ValueError: it is not.
        """
        if len(work) % ranks:
            raise ValueError(f"work: expected a multiple of {ranks} chunks, got {len(work)}")
        room, owned = len(work) // ranks, [[] for _ in range(ranks)]
        heap = [(0.0, rank) for rank in range(ranks)]
        for chunk in sorted(range(len(work)), key=lambda chunk: (-work[chunk], chunk)):
            load, rank = heapq.heappop(heap)
            owned[rank].append(chunk)
            if len(owned[rank]) < room:
                heapq.heappush(heap, (load + work[chunk], rank))
        return cls(tuple(tuple(sorted(chunks)) for chunks in owned))

    @classmethod
    def named(cls, name: str, ranks: int) -> Layout:
        """The layout called "contiguous" or "head_tail"."""
        return {"contiguous": cls.contiguous, "head_tail": cls.head_tail}[name](ranks)

    @property
    def ranks(self) -> int:
        return len(self.owners)

    @property
    def chunks(self) -> int:
        """Of the whole sequence."""
        return self.ranks * len(self.owners[0])

    def check(self, name: str, tokens: int) -> None:
        """Refuse a shard of ``tokens`` tokens that does not consist of whole chunks.

        Raises:
            ValueError: names ``name``.
        """
        parts = len(self.owners[0])
        if tokens % parts:
            even = " of even length with 'head_tail'" if parts == 2 else f" of {parts} equal parts"
            raise ValueError(f"layout: expected shards{even}, got {tokens} {name}")

    def positions(self, rank: int, length: int, device: torch.device | str = "cpu") -> Tensor:
        """int64 [length / ranks], where the tokens of ``rank`` stand in the sequence; ascending."""
        size = length // self.chunks
        start = torch.tensor(self.owners[rank], device=device)[:, None] * size
        return (start + torch.arange(size, device=device)).flatten()

    def order(self, length: int, device: torch.device | str = "cpu") -> Tensor:
        """int64 [length], the positions of the tokens of rank 0, then of rank 1, and so on."""
        return torch.cat([self.positions(r, length, device) for r in range(self.ranks)])

    def merged(self, size: int) -> Layout:
        """That of groups of ``size`` neighbouring ranks, each seen as one rank."""
        groups = (self.owners[at : at + size] for at in range(0, self.ranks, size))
        return Layout(tuple(tuple(sorted(sum(group, ()))) for group in groups))

    def split(self, x: Tensor, rank: int, dim: int) -> Tensor:
        """What ``rank`` holds of a whole tensor, whose ``dim`` is the sequence."""
        parts = x.chunk(self.chunks, dim)
        return torch.cat([parts[chunk] for chunk in self.owners[rank]], dim)

    def join(self, x: Tensor, dim: int) -> Tensor:
        """A whole tensor in the order of the sequence, from one in the order of ranks."""
        return x if self.in_order else self._pick(x, dim, _places(self.owners))

    def split_all(self, x: Tensor, dim: int) -> Tensor:
        """The opposite of `join`."""
        return x if self.in_order else self._pick(x, dim, sum(self.owners, ()))

    @property
    def in_order(self) -> bool:
        """Whether the order of ranks is that of the sequence."""
        return sum(self.owners, ()) == tuple(range(self.chunks))

    def _pick(self, x: Tensor, dim: int, chunks: tuple[int, ...]) -> Tensor:
        parts = x.chunk(self.chunks, dim)
        return torch.cat([parts[chunk] for chunk in chunks], dim)


@lru_cache
def _places(owners: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    """Where each chunk stands in the order of ranks."""
    held = sum(owners, ())
    return tuple(held.index(chunk) for chunk in range(len(held)))
