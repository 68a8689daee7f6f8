"""Batch dimensions of attention: however a layer lays them out, they become [batch, heads]."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate, pairwise
from math import prod
from operator import mul

from torch import Tensor

BatchShape = tuple[int, ...]


class BatchDims:
    """The finest split of the batch dimensions that all of ``shapes`` are made of.

    ``(B * windows, H)`` and ``(B, windows, H)`` are made of ``(B, windows, H)``. Tensors are first
    `split` so, then all are flattened to [batch, heads, ...] at the same dimension.

    Raises:
        ValueError: the shapes do not divide one another.
    """

    def __init__(self, shapes: Iterable[BatchShape]):
        shapes = list(shapes)
        self.ends = sorted({1}.union(*(accumulate(shape, mul) for shape in shapes)))
        if any(end % start for start, end in pairwise(self.ends)):
            raise ValueError(f"batch shapes {shapes} are not views of one another")
        self.sizes = tuple(end // start for start, end in pairwise(self.ends))

    def split(self, x: Tensor, shape: BatchShape) -> Tensor:
        """What broadcasts against [*shape, a, b] as what broadcasts against [*sizes, a, b]."""
        x = x[(None,) * (len(shape) + 2 - x.dim())]
        dims, sizes = [], list(self.sizes)
        for have, want in zip(x.shape, shape, strict=False):
            while want > 1:
                size = sizes.pop(0)
                dims.append(1 if have == 1 else size)
                want //= size
        return x.reshape(*dims, *x.shape[-2:])

    def first_head_dim(self, tensors: list[Tensor], batch: int | None = None) -> int:
        """Where the heads begin so that split ``tensors`` are smallest when flattened.

        Args:
            batch: the batch size that is wanted.
        """
        dims = [at for at, end in enumerate(self.ends) if batch in (None, end)]
        return min(dims, key=lambda at: (sum(self._size(x, at) for x in tensors), abs(at - 1)))

    def flatten(self, x: Tensor, at: int, *, full: bool = False) -> Tensor:
        """[*sizes or ones, a, b] -> [batch or 1, heads or 1, a, b]; neither is 1 if ``full``.

        Args:
            at: the first dimension of the heads.
        """
        shape = self._flat(x, at, full=full)
        x = x.expand(*shape[0], *shape[1], *x.shape[-2:])
        return x.reshape(prod(shape[0]), prod(shape[1]), *x.shape[-2:])

    def _size(self, x: Tensor, at: int) -> int:
        return prod(map(prod, self._flat(x, at))) * prod(x.shape[-2:])

    def _flat(self, x: Tensor, at: int, full: bool = False) -> list[tuple[int, ...]]:
        """The dimensions of ``x``'s batch, and of its heads, once it is flattened."""
        shape = []
        for start, stop in ((0, at), (at, len(self.sizes))):
            whole = full or any(size > 1 for size in x.shape[start:stop])
            shape.append(self.sizes[start:stop] if whole else (1,) * (stop - start))
        return shape
