"""Shared by the tests of the Transformers side: quiet libraries and a count of kernel calls."""

from __future__ import annotations

import pytest
import transformers

import hf_flash_two  # noqa: F401  (registers flash_two and fa_two)
from hf_flash_two import op

transformers.logging.set_verbosity_error()


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape of the queries of every call of a forward kernel so far."""
    calls: list[tuple[int, ...]] = []
    select = op.select

    def counting(*call):
        kernel = select(*call)

        def forward(query, *args):
            calls.append(tuple(query.shape))
            return kernel.forward(query, *args)

        return kernel._replace(forward=forward)

    monkeypatch.setattr(op, "select", counting)
    return calls
