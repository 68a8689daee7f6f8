"""What PyTorch's fused CPU op is asked to do: one readable table over shape, dtype and CPU.

Measured with ``scripts/benchmark.py --device cpu`` on CPUs with AVX-512, with and without AMX.
"""

from __future__ import annotations

from functools import lru_cache

import torch

FEW_ROWS = 64
"""With so few rows of queries to a key head, reading the keys is what takes time: query heads that
share a key head are handed to the op as rows of one, so that it reads keys once for all."""

_CACHED = 2**18
"""So many numbers of keys, and as many of values, stay in a cache once they are float32."""

_LONG = 768
"""From so many rows on the op takes 256 of them at a time."""


@lru_cache
def has_products(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of ``dtype`` at least as fast as of float32."""
    asked = {
        torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported",
    }  # fmt: skip
    if dtype not in asked:
        return True
    ask = getattr(torch.ops.mkldnn, asked[dtype], None)
    return ask is not None and ask()


def tiles_are_faster(dtype: torch.dtype, few: bool, keys: int) -> bool:
    """Whether the op loses: few rows, and keys of half precision that it has to convert first.

    Tiles convert them block by block, in a cache.

    Args:
        keys: how many numbers they are.
    """
    return few and not has_products(dtype) and keys > _CACHED


def forward_dtype(dtype: torch.dtype, sinks: bool) -> torch.dtype:
    """In which the op computes the output. What sinks take from it must not be rounded before."""
    half = dtype.itemsize == 2
    return torch.float32 if half and (sinks or not has_products(dtype)) else dtype


def backward_dtype(dtype: torch.dtype, rows: int, all_rows: bool, sinks: bool) -> torch.dtype:
    """In which the op computes the gradients of a piece.

    In half precision it adds up those of keys in it, too: over 64 rows at a time in pieces of fewer
    than 768, over 256 in longer ones. A piece of all rows is as exact as `sdpa`, which has no
    sinks: with them, eager is what others compute.
    """
    if dtype == torch.bfloat16 and not sinks and (all_rows or rows >= _LONG):
        return dtype
    return torch.float32 if dtype.itemsize == 2 else dtype


def doubled(dtype: torch.dtype, rows: int, keys: int) -> bool:
    """Whether a lone row goes twice: products of one row have no fast path in bfloat16.

    With few keys the copy takes longer than they do.
    """
    return dtype == torch.bfloat16 and rows == 1 and keys >= 128
