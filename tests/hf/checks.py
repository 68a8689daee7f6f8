"""How models' outputs are compared: relative to the largest entry."""

from __future__ import annotations

import torch
from torch import Tensor

FORWARD = 2e-5


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest entry of ``expected``."""
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def assert_close(actual: Tensor, expected: Tensor, limit: float = FORWARD) -> None:
    assert error(actual, expected) <= limit, f"error {error(actual, expected):.1e} > {limit:.0e}"


def backward(output: Tensor) -> None:
    """Gradients of a sum with fixed random weights, the same for equal shapes."""
    generator = torch.Generator().manual_seed(7)
    (output * torch.randn(output.shape, generator=generator)).sum().backward()
