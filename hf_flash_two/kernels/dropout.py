"""Dropout whose bits are a pure function of (seed, batch, head, query, key).

All kernels compute the same bits, whatever their tiles: recomputation drops the same pairs, and a
test on a CPU knows those of a GPU. The generator is a counter run through the 32-bit mixer
``lowbias32`` (https://nullprogram.com/blog/2018/07/31/).
"""

from __future__ import annotations

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
    low, high = seed & _MASK, (seed >> 32) & _MASK
    # Both halves go into the stream: were low met by the row alone, neighbouring seeds would only
    # permute the rows. Batches count from 1 because mix(0) is 0: seed 0 would be a degenerate one.
    stream = mix(((mix(low) ^ high) + (batch + 1) * 0x9E3779B9) & _MASK)
    stream = mix((stream ^ heads) & _MASK)  # [heads]
    row = mix((mix(low ^ rows)[None] + stream[:, None]) & _MASK)  # [heads, rows]
    bits = mix(row[:, :, None] ^ mix(cols)[None, None])
    return bits >= threshold(dropout_p)


def threshold(dropout_p: float) -> int:
    """A pair is dropped if its 32 bits are below this."""
    return min(int(dropout_p * 2**32), _MASK)
