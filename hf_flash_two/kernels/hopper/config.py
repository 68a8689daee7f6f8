"""What the Hopper kernels compute, and with which tiles."""

from __future__ import annotations

from torch import Tensor

from hf_flash_two.kernels.params import AttentionParams


def forward_declines(
    query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
) -> str | None:
    """Why the forward does not compute this call, or None."""
    return "there is no forward yet"


def backward_declines(
    query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
) -> str | None:
    """Why the backward does not compute this call, or None."""
    return "there is no backward yet"
