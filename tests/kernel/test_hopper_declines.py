"""Where the Hopper kernels run, by GPU and by version of Triton; needs neither."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from helpers import inputs

from hf_flash_two import flash_attention
from hf_flash_two.kernels import hopper
from hf_flash_two.kernels.hopper.versions import unfit

GPU = torch.device("cuda", 0)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str | None]]:
    """Why a GPU of this capability declines, with this Triton."""

    def ask(capability=(9, 0), version="3.6.0", by_name=False) -> str | None:
        hopper._device_declines.cache_clear()
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(hopper, "find_spec", lambda name: version)
        monkeypatch.setitem(
            __import__("sys").modules, "triton", SimpleNamespace(__version__=version)
        )
        return hopper._device_declines(GPU, by_name)

    yield ask
    hopper._device_declines.cache_clear()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("version", ["3.6.0", "3.7.1", "3.8.0", "3.9.0", "3.6.0+git9844da95"])
def test_a_hopper_gpu_computes(asked: Callable, version: str) -> None:
    assert asked(version=version) is None
    assert asked(version=version, by_name=True) is None


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_other_gpus_do_not(asked: Callable, capability: tuple[int, int]) -> None:
    """Nor those that came later: Blackwell's products are others."""
    number = ".".join(map(str, capability))
    assert f"this one has {number}" in asked(capability)


def test_amds_gpus_do_not(asked: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    asked()
    hopper._device_declines.cache_clear()
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "needs a Hopper GPU" in hopper._device_declines(GPU, False)


def test_the_cpu_does_not() -> None:
    with pytest.raises(ValueError, match="'hopper' cannot run, it needs a Hopper GPU .*on cpu"):
        flash_attention(*inputs(5, 7), kernel="hopper")


def test_without_triton_they_do_not(asked: Callable) -> None:
    assert asked(version=None) == "Triton is not installed"


def test_a_version_known_to_be_unfit_is_named_and_warned_of(asked: Callable) -> None:
    """The portable kernels compute instead, and the user learns why it is slower: once."""
    with pytest.warns(RuntimeWarning, match="Triton 3.5.1 does not suit.*portable") as caught:
        reason = asked(version="3.5.1")
    assert "install triton>=3.6,<3.10" in reason and len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert hopper._device_declines(GPU, False) == reason
        assert hopper._device_declines(GPU, True) == reason, "which raises it"


def test_a_newer_version_is_tried_by_name_only(asked: Callable) -> None:
    with pytest.warns(RuntimeWarning, match="Triton 3.10.0 is newer than those.*kernel='hopper'"):
        assert "is newer" in asked(version="3.10.0")
    assert asked(version="3.10.0", by_name=True) is None
    assert unfit("4.0", by_name=False) and not unfit("4.0", by_name=True)


def test_versions_are_compared_as_numbers() -> None:
    assert unfit("3.10.0+gitab12", by_name=False) and not unfit("3.9.10", by_name=False)
    assert unfit("2.99", by_name=False) and not unfit("3.6.0rc1", by_name=False)
