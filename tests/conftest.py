"""What every test file shares: the device, the kernels under test, unwritten memory that shows."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from machine import GPU, INTERPRETED, KERNELS

torch.set_num_threads(1)
pytest.register_assert_rewrite("helpers")


def modules_beside_the_package() -> str:
    """A pattern of the names of what is in scripts/ and tests/."""
    root = Path(__file__).parent.parent
    paths = [*(root / "tests").rglob("*.py"), *(root / "scripts").glob("*.py")]
    names = {"scripts", *(path.stem for path in paths)}
    return rf"({'|'.join(sorted(names))})(\.|$)"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: too many tiles for an interpreted kernel")
    config.addinivalue_line("filterwarnings", f"error:::{modules_beside_the_package()}")
    # NumPy, which interprets Triton's kernels, warns of infinities that a GPU computes silently.
    config.addinivalue_line("filterwarnings", "ignore:.* encountered:RuntimeWarning")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """An interpreting process tests kernels only."""
    if INTERPRETED:
        kept = [x for x in items if "kernel" in x.fixturenames or x.path.name == "test_triton.py"]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


@pytest.fixture(scope="module", autouse=True)
def frozen() -> None:
    """Trainers and caches collect garbage, and need not go through all that was imported."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture
def device() -> str:
    return "cuda" if GPU else "cpu"


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, device: str) -> str:
    """Every kernel by name; one written for GPUs runs interpreted where there is none."""
    if request.param == "triton":
        dtypes = [x for x in request.node.callspec.params.values() if isinstance(x, torch.dtype)]
        if torch.float64 in dtypes:
            pytest.skip("Triton has no float64 matrix product")
        if INTERPRETED and torch.bfloat16 in dtypes:
            pytest.skip("Triton's interpreter multiplies bfloat16 as integers; runs on a GPU")
        if INTERPRETED and request.node.get_closest_marker("long"):
            pytest.skip("too long for an interpreted kernel; runs on a GPU")
    return request.param


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh floating-point memory holds NaN, so an element that nobody writes is seen."""

    def poison(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return made

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
