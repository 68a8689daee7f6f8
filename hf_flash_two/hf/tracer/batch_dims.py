"""Leading dimensions of attention: however a layer lays them out, they become [batch, heads]."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate, pairwise
from math import prod
from operator import mul

from torch import Tensor

Lead = tuple[int, ...]


class Leading:
    """The finest split of the leading dimensions that all of ``leads`` are made of.

    ``(B * windows, H)`` and ``(B, windows, H)`` are made of ``(B, windows, H)``. Tensors are first
    `spread` over that split, then every one is folded to [batch, heads, ...] at one `place`.

    Raises:
        ValueError: the leading shapes do not divide one another.
    """

    def __init__(self, leads: Iterable[Lead]):
        leads = list(leads)
        self.ends = sorted({1}.union(*(accumulate(lead, mul) for lead in leads)))
        if any(end % start for start, end in pairwise(self.ends)):
            raise ValueError(f"leading shapes {leads} are not views of one another")
        self.sizes = tuple(end // start for start, end in pairwise(self.ends))

    def spread(self, x: Tensor, lead: Lead) -> Tensor:
        """What broadcasts against [*lead, a, b] as what broadcasts against [*sizes, a, b]."""
        x = x[(None,) * (len(lead) + 2 - x.dim())]
        shape, sizes = [], list(self.sizes)
        for have, want in zip(x.shape, lead, strict=False):
            while want > 1:
                size = sizes.pop(0)
                shape.append(1 if have == 1 else size)
                want //= size
        return x.reshape(*shape, *x.shape[-2:])

    def place(self, tensors: list[Tensor], batch: int | None = None) -> int:
        """How many dimensions make up the batch so that ``tensors`` grow least when folded.

        Args:
            batch: the batch size that is wanted.
        """
        places = [at for at, end in enumerate(self.ends) if batch in (None, end)]
        return min(places, key=lambda at: (sum(self._growth(x, at) for x in tensors), abs(at - 1)))

    def fold(self, x: Tensor, place: int, *, full: bool = False) -> Tensor:
        """[*sizes or ones, a, b] -> [batch or 1, heads or 1, a, b]; neither is 1 if ``full``."""
        shape = []
        for start, stop in ((0, place), (place, len(self.sizes))):
            whole = full or any(size > 1 for size in x.shape[start:stop])
            shape.append(self.sizes[start:stop] if whole else (1,) * (stop - start))
        x = x.expand(*shape[0], *shape[1], *x.shape[-2:])
        return x.reshape(prod(shape[0]), prod(shape[1]), *x.shape[-2:])

    def _growth(self, x: Tensor, place: int) -> int:
        growth = 1
        for start, stop in ((0, place), (place, len(self.sizes))):
            have = prod(x.shape[start:stop])
            growth *= 1 if have == 1 else prod(self.sizes[start:stop]) // have
        return x.numel() * (growth - 1)
