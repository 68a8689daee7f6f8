"""A sample of random batches through whole models, and those that ever failed."""

from __future__ import annotations

import fuzz_models
import pytest

SAMPLE = range(1000, 1040)
# Seeds that once found a fault.
ONCE_FAILED: tuple[int, ...] = ()


@pytest.mark.parametrize("seed", [*SAMPLE, *ONCE_FAILED])
def test_each_document_is_as_alone(seed: int) -> None:
    fuzz_models.run(fuzz_models.make(seed))
