"""What several files of tests in several processes share."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
from ranks import launch


@pytest.fixture(scope="module")
def outcomes_of(
    request, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], list[dict[str, str | None]]]:
    """`launch` of the test's file in so many processes, once for each number of them."""
    return cache(
        lambda world: launch(str(request.path), world, tmp_path_factory.mktemp(f"{world}"))
    )
