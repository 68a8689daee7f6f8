"""A few random calls, and those that failed once; `make fuzz` draws thousands."""

from __future__ import annotations

import fuzz
import pytest

FAILED = (3, 17, 39, 55, 68, 69, 72, 85, 107, 109, 154, 208, 216, 243)
"""Of numbers that are not finite where nobody looks, and of biases as small as can be."""

FEW_KEYS = 50513
"""Two keys that share the sums of 200 rows."""

SMALL = (39, 55, 85)


@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(seed, marks=() if seed in SMALL else pytest.mark.long)
        for seed in (*range(1000, 1020), *FAILED)
    ],
)
def test_seed(seed: int, kernel: str, device: str) -> None:
    case = fuzz.make(seed, fuzz.dtypes_of(kernel, device))
    print(f"seed {seed}:", ", ".join(case.words))
    fuzz.run(case, kernel, device)


@pytest.mark.parametrize("seed", [*range(2000, 2040), FEW_KEYS])
def test_seed_of_whatever_kernel_is_chosen(seed: int, device: str) -> None:
    case = fuzz.make(seed, fuzz.dtypes_of("auto", device))
    print(f"seed {seed}:", ", ".join(case.words))
    fuzz.run(case, "auto", device)
