"""Attention split over the devices of one process; gradients come back through the copies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_flash_two.attention import flash_attention
from hf_flash_two.masks import AttentionMask


def attend_over_devices(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    devices: Sequence[torch.device],
    **settings,
) -> Tensor:
    """`flash_attention` with key heads (and their query heads), or else batch rows, spread out.

    Args:
        settings: arguments of `flash_attention` that are the same for all heads and batch rows.

    Returns:
        [B, Hq, Tq, Dv] on the device of ``query``, equal to that of one device up to rounding.
    """
    dim = 1 if key.shape[1] >= min(len(devices), key.shape[0]) else 0
    parts, count = [], key.shape[dim]
    ends = [count * (i + 1) // len(devices) for i in range(len(devices))]
    for start, stop, device in zip([0, *ends], ends, devices, strict=False):
        if start == stop:
            continue
        share = query.shape[dim] // count
        tensors = (
            query.narrow(dim, start * share, (stop - start) * share),
            key.narrow(dim, start, stop - start),
            value.narrow(dim, start, stop - start),
        )
        part = _part(mask, dim, slice(start * share, stop * share)).to(device)
        query_part, key_part, value_part = (x.to(device) for x in tensors)
        out = flash_attention(query_part, key_part, value_part, mask=part, **settings)
        assert isinstance(out, Tensor)
        parts.append(out.to(query.device))
    return torch.cat(parts, dim=dim)


def _part(mask: AttentionMask, dim: int, part: slice) -> AttentionMask:
    """The mask of some heads (``dim`` 1) or batch rows (0)."""
    index = (slice(None),) * dim + (part,)

    def cut(tensor: Tensor) -> Tensor:
        # Intervals are [B, Tk], one for all heads.
        by_batch = tensor.dim() == 2 and dim == 1
        return tensor if by_batch or tensor.shape[dim] == 1 else tensor[index]

    return mask.each_tensor(cut)
