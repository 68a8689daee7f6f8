"""Dropout whose bits are a pure function of (seed, batch, head, query, key).

All kernels compute the same bits, whatever their tiles: recomputation drops the same pairs, and a
test on a CPU knows those of a GPU. The generator is a counter run through the 32-bit mixer
``lowbias32`` (https://nullprogram.com/blog/2018/07/31/).
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def mix(x: Tensor) -> Tensor:
    """lowbias32 of values in [0, 2**32) held as int64."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def keep(
    seed: Tensor, batch: int, heads: Tensor, rows: Tensor, cols: Tensor, dropout_p: float
) -> Tensor:
    """bool [heads, rows, cols]: True where a probability is kept, with chance 1 - dropout_p."""
    bits = row_bits(seed, batch, heads, rows)[:, :, None] ^ col_bits(cols)
    return ~is_dropped(bits, torch.empty_like(bits), dropout_p)


def row_bits(seed: Tensor, batch: int, heads: Tensor, rows: Tensor) -> Tensor:
    """int32 [heads, rows]"""
    low, high = seed & _MASK, (seed >> 32) & _MASK
    # Both halves go into the stream: were low met by the row alone, neighbouring seeds would only
    # permute the rows. Batches count from 1 because mix(0) is 0: seed 0 would be a degenerate one.
    stream = mix(((mix(low) ^ high) + (batch + 1) * 0x9E3779B9) & _MASK)
    stream = mix((stream ^ heads) & _MASK)  # [heads]
    return mix((mix(low ^ rows)[None] + stream[:, None]) & _MASK).to(torch.int32)


def col_bits(cols: Tensor) -> Tensor:
    """int32 [cols]"""
    return mix(cols).to(torch.int32)


def is_dropped(bits: Tensor, scratch: Tensor, dropout_p: float) -> Tensor:
    """bool, of `row_bits` ^ `col_bits`; overwrites both tensors, int32 of one shape.

    It is `mix` in half the memory: products wrap around, and what a shift brings in is masked.
    """
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32), (16, 1)):
        torch.bitwise_right_shift(bits, shift, out=scratch)
        bits.bitwise_xor_(scratch.bitwise_and_(_MASK >> shift))
        if factor != 1:
            bits.mul_(factor)
    # Of numbers without a sign, in the order of those with one.
    return bits.bitwise_xor_(-(2**31)) < threshold(dropout_p) - 2**31


def threshold(dropout_p: float) -> int:
    """A pair is dropped if its 32 bits are below this."""
    return min(int(dropout_p * 2**32), _MASK)
