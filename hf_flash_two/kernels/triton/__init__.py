"""The attention as Triton kernels, for every GPU that Triton supports."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from hf_flash_two.kernels.params import AttentionParams


def declines(
    query: Tensor, key: Tensor, value: Tensor, params: AttentionParams, by_name: bool
) -> str | None:
    """Why Triton does not compute this call, or None."""
    return _declines(query.device, query.dtype, by_name)


@lru_cache
def _declines(device: torch.device, dtype: torch.dtype, by_name: bool) -> str | None:
    if find_spec("triton") is None:
        return "it is not installed"
    if dtype == torch.float64:
        return "it has no float64 matrix product"
    if device.type != "cuda":
        # Triton's own switch: its interpreter runs kernels on the CPU, far too slowly to be chosen.
        interpreted = by_name and os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted else f"it needs a GPU and the tensors are on {device.type}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        if dtype == torch.bfloat16:
            return "GPUs older than Ampere have no bfloat16 matrix product"
    return None


def load() -> tuple[Callable, ...]:
    """The forward, the backward and what prepares each; imports Triton."""
    from hf_flash_two.kernels.triton import backward, forward

    return forward.forward, backward.backward, forward.prepare, backward.prepare
