"""Which warnings are errors: those of our own code, and of no other package."""

from __future__ import annotations

import warnings

import pytest


def warn_as(module: str) -> None:
    exec("warnings.warn('something')", {"__name__": module, "warnings": warnings})


@pytest.mark.parametrize(
    "module",
    [__name__, "conftest", "hf_flash_two.kernels.blockwise", "finetune", "scripts.coverage.build"],
)
def test_a_warning_of_our_own_is_an_error(module: str) -> None:
    with pytest.raises(UserWarning, match="something"):
        warn_as(module)


@pytest.mark.parametrize("module", ["triton.compiler", "pytest_benchmark", "hf_flash_twofold"])
def test_a_warning_of_another_package_is_none(module: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warn_as(module)
    assert [str(warning.message) for warning in caught] == ["something"]
