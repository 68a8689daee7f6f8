"""Tensors as PyTorch's fused CPU op takes them, and its results as callers do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_flash_two.kernels.fused_cpu import choice
from hf_flash_two.kernels.fused_cpu.pieces import Piece
from hf_flash_two.kernels.params import Layout, output_layout


def is_few(query: Tensor, key: Tensor) -> bool:
    """Whether reading the keys is what takes time."""
    return query.shape[1] // key.shape[1] * query.shape[2] <= choice.FEW_ROWS


def readable(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in ``dtype``, its last axis without gaps."""
    x = x if x.dtype == dtype else x.to(dtype)
    return x if x.stride(3) == 1 else x.contiguous()


def result(x: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in ``dtype`` and the layout that a result has for the input ``like``."""
    return laid_out(x, like, output_layout(like, like.shape[3]), dtype)


def laid_out(x: Tensor, like: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """``x`` in ``dtype`` and ``layout``, a new tensor of the kind of ``like`` if need be."""
    if x.dtype == dtype and x.stride() == layout[1]:
        return x
    if x.dtype == dtype and layout[1][2] == layout[0][3]:
        return x.contiguous()
    return like.new_empty_strided(*layout, dtype=dtype).copy_(x)


class Rows:
    """How the op is shown the rows of a piece: as they are, in reverse, or as rows of one key head.

    Args:
        doubles: whether a lone row of a dtype goes twice.
    """

    def __init__(
        self,
        piece: Piece,
        query: Tensor,
        key: Tensor,
        reverse: bool,
        doubles: Callable[[torch.dtype, int, int], bool] = lambda *row: False,
    ) -> None:
        self._reverse, self._few = reverse, is_few(query, key) and not reverse
        self._heads, self._key_heads = query.shape[1], key.shape[1]
        self._group = self._heads // self._key_heads
        self._count = piece.rows.stop - piece.rows.start
        count = self._group * self._count
        self._doubled = self._few and doubles(query.dtype, count, key.shape[2])
        self._as_they_are = not (reverse or self._few and self._group > 1 or self._doubled)

    def arrange(self, x: Tensor) -> Tensor:
        """[B, Hq, rows, any] as the op takes it."""
        if self._as_they_are:
            return x
        if self._reverse:
            return x.flip(2)
        if self._few and self._group > 1:
            x = x.reshape(x.shape[0], self._key_heads, -1, x.shape[3])
        return x.repeat(1, 1, 2, 1) if self._doubled else x

    def restore(self, x: Tensor) -> Tensor:
        """The opposite."""
        if self._as_they_are:
            return x
        if self._reverse:
            return x.flip(2)
        x = x[:, :, :1] if self._doubled else x
        if self._few and self._group > 1:
            x = x.reshape(x.shape[0], self._heads, -1, x.shape[3])
        return x

    def arrange_lse(self, lse: Tensor) -> Tensor:
        """[B, Hq, rows] as the op takes it."""
        return lse if self._as_they_are else self.arrange(lse[..., None])[..., 0]

    def restore_lse(self, lse: Tensor) -> Tensor:
        """The opposite."""
        return lse if self._as_they_are else self.restore(lse[..., None])[..., 0]

    def arrange_mask(self, x: Tensor | None) -> Tensor | None:
        """[B or 1, Hq or 1, rows or 1, keys or 1] as the op takes it; lines come in reverse."""
        if x is None or not self._few or self._group == 1 or x.shape[1:3] == (1, 1):
            return x
        batch, heads, _, width = x.shape
        if heads == 1:
            x = x[:, :, None].expand(batch, 1, self._group, self._count, width)
            return x.reshape(batch, 1, -1, width)
        return x.expand(-1, -1, self._count, -1).reshape(batch, self._key_heads, -1, width)
