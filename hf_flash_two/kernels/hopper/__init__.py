"""The attention as Gluon kernels for Hopper GPUs: H100, H200.

Gluon is Triton's lower level: warps are given their parts, copies and products run beside each
other, and shared memory and barriers are placed by hand. What these kernels do not compute goes to
the portable ones of `triton`; forward and backward are declined separately.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from hf_flash_two.kernels.hopper.versions import unfit
from hf_flash_two.kernels.params import AttentionParams


def declines(
    query: Tensor, key: Tensor, value: Tensor, params: AttentionParams, by_name: bool
) -> str | None:
    """Why the Hopper kernels do not compute this forward, or None."""
    if reason := _device_declines(query.device, by_name):
        return reason
    from hf_flash_two.kernels.hopper import config

    if reason := config.forward_declines(query, key, value, params):
        return reason
    return None if by_name else config.forward_is_slow(query, params)


def declines_backward(
    query: Tensor, key: Tensor, value: Tensor, params: AttentionParams, by_name: bool
) -> str | None:
    """Why the Hopper kernels do not compute this backward, or None."""
    if reason := _device_declines(query.device, by_name):
        return reason
    from hf_flash_two.kernels.hopper import config

    if reason := config.backward_declines(query, key, value, params):
        return reason
    return None if by_name else config.backward_is_slow(query, value)


@lru_cache
def _device_declines(device: torch.device, by_name: bool) -> str | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return f"it needs a Hopper GPU (H100, H200) and the tensors are on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        number = ".".join(map(str, capability))
        return f"it needs a Hopper GPU (compute capability 9.0) and this one has {number}"
    if find_spec("triton") is None:
        return "Triton is not installed"
    import triton

    reason = unfit(triton.__version__, by_name)
    if reason and not by_name:
        warnings.warn(
            f"flash_two: the kernels for Hopper GPUs are not used, {reason}; the portable Triton "
            "kernels compute the same, more slowly",
            RuntimeWarning,
            stacklevel=2,
        )
    return reason


def load() -> tuple[Callable, ...]:
    """The forward, the backward and what prepares each; imports Triton."""
    from hf_flash_two.kernels.hopper import backward, forward

    return forward.forward, backward.backward, forward.prepare, backward.prepare
