"""How far one implementation's numbers are from another's, relative to the largest entry."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

FLOOR = 1e-3
"""Gradients of a module that are 0 up to rounding are measured by this share of the largest."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest entry of ``expected``.

    Entries that are finite in neither do not count. It is infinite if the shapes differ or an entry
    is finite in one tensor only.
    """
    if actual.shape != expected.shape:
        return torch.inf
    finite = expected.isfinite()
    if not torch.equal(actual.isfinite(), finite):
        return torch.inf
    if not finite.any():
        return 0.0
    difference = (actual.double() - expected.double())[finite].abs().max()
    return (difference / expected[finite].abs().max().double().clamp_min(1e-9)).item()


def gradient_errors(
    actual: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    *,
    floor: float = FLOOR,
) -> dict[str, float]:
    """The largest difference in each gradient, over the largest entry of its module.

    What belongs to a module is as large; but that of a key bias is 0 up to rounding, which differs
    from machine to machine.

    Args:
        actual, expected: gradients by the names of their parameters; ``expected`` has the largest
            entries. The error of one that is NaN, or that only one of the two has, is infinite.
        floor: a module's largest entry counts as at least this share of the largest of all.
    """
    largest: dict[str, float] = {}
    for name, gradient in expected.items():
        if gradient.numel():
            entry = gradient.abs().max().item()
            largest[_module(name)] = max(entry, largest.get(_module(name), 1e-30))
    least = floor * max(largest.values(), default=0.0)
    errors = {name: torch.inf for name in actual.keys() ^ expected.keys()}
    for name in actual.keys() & expected.keys():
        if expected[name].numel():
            difference = (actual[name] - expected[name]).abs().max().item()
            error = difference / max(largest[_module(name)], least)
            errors[name] = error if error == error else torch.inf
    return errors


def _module(parameter: str) -> str:
    return parameter.rpartition(".")[0] or parameter
