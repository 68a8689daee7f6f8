"""How models are compared: relative to the largest entry, on real tokens, all gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

FORWARD = 2e-5
GRADIENT = 1e-4


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


def assert_same_gradients(actual: nn.Module, expected: nn.Module, limit: float = GRADIENT) -> None:
    """Every parameter; one whose gradient vanishes is measured by a hundredth of the largest."""
    gradients = {name: p.grad for name, p in expected.named_parameters()}
    largest = max(g.abs().max() for g in gradients.values() if g is not None)
    assert largest > 0
    for name, parameter in actual.named_parameters():
        wanted = gradients[name]
        assert (parameter.grad is None) == (wanted is None), name
        if wanted is not None:
            scale = torch.maximum(wanted.abs().max(), largest / 100)
            off = ((parameter.grad - wanted).abs().max() / scale).item()
            assert off <= limit, f"{name}: error {off:.1e} > {limit:.0e}"
