"""`relative_error` and `gradient_errors`: what they call far off, and by what they measure."""

from __future__ import annotations

import pytest
import torch

from hf_flash_two.testing.errors import FLOOR, gradient_errors, relative_error

INF, NAN = torch.inf, torch.nan


@pytest.mark.parametrize(
    ("actual", "expected", "error"),
    [
        ([1.0, -4.0], [1.0, -4.0], 0.0),
        ([1.0, -3.0], [1.0, -4.0], 0.25),
        ([1.0, -4.0, 0.0], [1.0, -4.0], INF),
        ([1.0, NAN], [1.0, -4.0], INF),
        ([1.0, -4.0], [1.0, INF], INF),
        ([1.0, NAN], [2.0, INF], 0.5),
        ([NAN], [NAN], 0.0),
    ],
)
def test_an_error_of_one_tensor(actual, expected, error) -> None:
    assert relative_error(torch.tensor(actual), torch.tensor(expected)) == error


def errors(actual: dict, expected: dict) -> dict[str, float]:
    tensors = ({k: torch.tensor(x) for k, x in part.items()} for part in (actual, expected))
    return gradient_errors(*tensors)


def test_a_gradient_is_measured_by_its_own_largest_entry() -> None:
    got = errors({"a": [1.0, 1.5], "b": [0.0, 0.25]}, {"a": [1.0, 2.0], "b": [0.0, 0.5]})
    assert got == {"a": 0.25, "b": 0.5}


def test_one_that_vanishes_is_measured_by_a_share_of_the_largest() -> None:
    got = errors({"a": [2.0], "b": [1e-3]}, {"a": [2.0], "b": [0.0]})
    assert got == {"a": 0.0, "b": pytest.approx(1e-3 / (2 * FLOOR))}


def test_those_of_a_module_share_their_largest_entry() -> None:
    expected = {"k.weight": [2.0], "k.bias": [0.0], "v.weight": [4.0]}
    got = errors(expected | {"k.bias": [0.5]}, expected)
    assert got == {"k.weight": 0.0, "k.bias": 0.25, "v.weight": 0.0}


def test_what_is_missing_or_nan_is_infinitely_far_off() -> None:
    got = errors({"a": [1.0], "b": [NAN], "new": [0.0]}, {"a": [1.0], "b": [1.0], "lost": [1.0]})
    assert got == {"a": 0.0, "b": INF, "new": INF, "lost": INF}
