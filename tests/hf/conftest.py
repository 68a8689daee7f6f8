"""Shared by the tests of the Transformers side: quiet libraries and a count of kernel calls."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import transformers

from hf_flash_two import testing

transformers.logging.set_verbosity_error()


@pytest.fixture
def kernel_calls() -> Iterator[list[testing.KernelCall]]:
    """Every call of a forward kernel so far."""
    with testing.kernel_calls() as calls:
        yield calls
