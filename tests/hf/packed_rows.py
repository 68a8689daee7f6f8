"""Rows of packed documents, with padding or without, and the documents by themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch


def positions(*lengths: int) -> torch.Tensor:
    return torch.cat([torch.arange(n) for n in lengths])[None]


@dataclass(frozen=True)
class Row:
    """Documents in one row of a batch, and how many padded tokens stand before each and at the end.

    A padded token has position 0, or any other.
    """

    lengths: tuple[int, ...]
    holes: tuple[int, ...] = ()
    padded_position: int = 0

    def parts(self) -> list[tuple[int, int]]:
        """(number of the document from 1, 0 for padding; how many tokens), from left to right."""
        holes = self.holes or (0,) * (len(self.lengths) + 1)
        parts = [(0, holes[0])]
        for number, (length, hole) in enumerate(zip(self.lengths, holes[1:], strict=True), 1):
            parts += [(number, length), (0, hole)]
        return parts

    def numbers(self) -> torch.Tensor:
        return torch.cat([torch.full((count,), number) for number, count in self.parts()])

    def positions(self) -> torch.Tensor:
        padded = self.padded_position
        return torch.cat(
            [torch.arange(n) if number else torch.full((n,), padded) for number, n in self.parts()]
        )


def each_alone(model, ids: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Logits of all documents of a row [T] of tokens, each run by itself, end to end."""
    parts = [ids[numbers == number][None] for number in numbers.unique() if number]
    return torch.cat([model(part).logits[0] for part in parts])


def boundaries(*lengths: int) -> dict[str, torch.Tensor | int]:
    """As trainers and collators send them."""
    ends = torch.tensor((0, *lengths)).cumsum(0).to(torch.int32)
    longest = max(lengths)
    return {
        "cu_seq_lens_q": ends, "cu_seq_lens_k": ends.clone(),
        "max_length_q": longest, "max_length_k": longest,
    }  # fmt: skip
