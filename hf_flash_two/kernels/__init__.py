"""Interchangeable kernels over one `Problem`, and the choice between them.

A kernel is a pair of functions: ``forward(query, key, value, problem) -> (out, lse)`` and
``backward(d_out, d_lse, query, key, value, out, lse, problem, need_d_bias) -> (dq, dk, dv, d_bias,
d_sinks)``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from hf_flash_two.kernels import blockwise


class Kernel(NamedTuple):
    name: str
    forward: Callable
    backward: Callable


NAMES = ("auto", "blockwise", "triton")


def select(name: str, query: Tensor) -> Kernel:
    """The kernel that computes attention for ``query``.

    "auto" is Triton wherever it can run, else blockwise. One asked for by name is never replaced.

    Raises:
        ValueError: Triton was asked for and cannot run, for the reason given.
    """
    return _select(name, query.device.type, query.device.index, query.dtype)


@lru_cache
def _select(name: str, device: str, index: int | None, dtype: torch.dtype) -> Kernel:
    obstacle = None if name == "blockwise" else _triton_obstacle(name, device, index, dtype)
    if name == "triton" and obstacle:
        raise ValueError(f"kernel: 'triton' cannot run, {obstacle}; use 'auto' or 'blockwise'")
    if name == "blockwise" or obstacle:
        return Kernel("blockwise", blockwise.forward, blockwise.backward)
    from hf_flash_two.kernels.triton import backward, forward

    return Kernel("triton", forward.forward, backward.backward)


def _triton_obstacle(name: str, device: str, index: int | None, dtype: torch.dtype) -> str | None:
    if find_spec("triton") is None:
        return "it is not installed"
    if dtype == torch.float64:
        return "it has no float64 matrix product"
    if device != "cuda":
        # Triton's own switch: its interpreter runs kernels on the CPU, far too slowly to be chosen.
        interpreted = name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted else f"it needs a GPU and the tensors are on {device}"
    if torch.version.hip is None and torch.cuda.get_device_capability(index) < (8, 0):
        if dtype == torch.bfloat16:
            return "GPUs older than Ampere have no bfloat16 matrix product"
    return None
