"""Where the Hopper kernels run, by GPU and by version of Triton, and what; needs no GPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="what they compute depends on Triton's tiles")

from compiling import params
from helpers import inputs

from hf_flash_two import AttentionMask, flash_attention
from hf_flash_two.kernels import hopper, select
from hf_flash_two.kernels.hopper import config
from hf_flash_two.kernels.hopper.tile import BAND, NO_MASK
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


# What they compute, of calls on such a GPU


def call(
    lengths: tuple[int, int] = (300, 300),
    dims: tuple[int, int] = (128, 128),
    dtype: torch.dtype = torch.bfloat16,
    **changes,
) -> tuple:
    query, key, value = inputs(*lengths, head_dim=dims[0], value_dim=dims[1], dtype=dtype)
    mask = changes.pop("mask", AttentionMask.causal())
    return query, key, value, params(mask, lengths[1], **changes)


@pytest.fixture
def declined(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str | None, str | None]]:
    """Why the forward and the backward of a call are declined where the GPU is a Hopper."""
    monkeypatch.setattr(hopper, "_device_declines", lambda device, by_name: None)
    questions = (hopper.declines, hopper.declines_backward)
    return lambda given: tuple(ask(*given, by_name=True) for ask in questions)


COMPUTED = {
    **{f"D{d}-{d_v}": {"dims": (d, d_v)} for d, d_v in (
        (64, 64), (96, 96), (128, 128), (192, 128), (256, 256), (80, 80), (8, 40),
    )},
    "float16": {"dtype": torch.float16},
    "full": {"mask": AttentionMask.full()},
    "window": {"mask": AttentionMask.causal(window=7)},
    "padded": {"mask": AttentionMask.from_padding(torch.ones(2, 300))},
    "softcap": {"softcap": 30.0},
    "sinks": {"sinks": torch.zeros(1, 6)},
    "alibi": {"alibi_slopes": torch.zeros(1, 6)},
    "dropout": {"seed": torch.zeros(1, dtype=torch.int64), "dropout_p": 0.1},
    "cache": {"lengths": (100, 900)},
}  # fmt: skip


@pytest.mark.parametrize("given", COMPUTED.values(), ids=COMPUTED)
def test_what_they_compute(declined: Callable, given: dict) -> None:
    """Declining is silent under "auto": that they still compute this is to be seen here."""
    assert declined(call(**given)) == (None, None)


DECLINED = {
    "batch-invariant": ({"batch_invariant": True}, "not batch-invariant"),
    "float32": ({"dtype": torch.float32}, "bfloat16 and float16, not torch.float32"),
    "dense": ({"mask": AttentionMask.from_dense(torch.ones(300, 300).bool())}, "no dense masks"),
    "bias": ({"bias": torch.zeros(1, 1, 300, 300)}, "no bias"),
    "wide": ({"dims": (320, 320)}, "head dims up to 256"),
    "odd": ({"dims": (60, 60)}, "rows of whole 16 bytes"),
    "no keys": ({"lengths": (300, 0)}, "nothing to compute"),
}


@pytest.mark.parametrize(("given", "reason"), DECLINED.values(), ids=DECLINED)
def test_what_they_decline(declined: Callable, given: dict, reason: str) -> None:
    for found in declined(call(**given)):
        assert found is not None and reason in found


def test_few_queries_are_left_to_decoding(declined: Callable) -> None:
    for rows in (1, 4):
        assert "few queries" in declined(call(lengths=(rows, 900)))[0]


def test_limits_on_tiles_are_left_to_the_portable_kernels(declined: Callable) -> None:
    for name in ("block_q", "block_k"):
        assert "cannot be limited" in declined(call(**{name: 32}))[0]


def test_the_largest_scores_are_left_to_the_portable_kernels(declined: Callable) -> None:
    """The backward has nothing to do with them."""
    of_forward, of_backward = declined(call(max_logits=True))
    assert of_forward == "it does not tell the largest scores" and of_backward is None


WINDOW = {"mask": AttentionMask.causal(window=9)}
PADDED = {"mask": AttentionMask.from_padding(torch.ones(2, 4096))}
TAKEN: dict[str, tuple[int, dict, tuple[bool, bool]]] = {
    "short": (1024, {}, (False, False)),
    "2k": (2048, {}, (True, True)),
    "2k D64": (2048, {"dims": (64, 64)}, (True, True)),
    "2k window": (2048, WINDOW, (True, True)),
    "16k": (16384, {}, (True, True)),
    "D64": (4096, {"dims": (64, 64)}, (True, True)),
    "D96": (2048, {"dims": (96, 96)}, (True, True)),
    "D96 padded": (4096, {"dims": (96, 96)} | PADDED, (False, True)),
    "D80 padded": (4096, {"dims": (80, 80)} | PADDED, (False, False)),
    "D64 padded": (4096, {"dims": (64, 64)} | PADDED, (True, True)),
    "D128-64": (4096, {"dims": (128, 64)}, (True, False)),
    "D192": (4096, {"dims": (192, 192)}, (True, True)),
    "D192-128": (2048, {"dims": (192, 128)}, (True, True)),
    "D256": (4096, {"dims": (256, 256)}, (True, True)),
    "window": (4096, WINDOW, (True, True)),
    "padded": (4096, PADDED, (True, True)),
    "2k padded": (2048, {"mask": AttentionMask.from_padding(torch.ones(2, 2048))}, (True, True)),
    "2k D64 padded": (
        2048,
        {"mask": AttentionMask.from_padding(torch.ones(2, 2048)), "dims": (64, 64)},
        (True, True),
    ),
}


@pytest.mark.parametrize(("length", "given", "taken"), TAKEN.values(), ids=TAKEN)
def test_auto_takes_what_was_timed(
    monkeypatch: pytest.MonkeyPatch, length: int, given: dict, taken: tuple[bool, bool]
) -> None:
    """The forward and the backward, each where it is known to beat the portable kernels."""
    monkeypatch.setattr(hopper, "_device_declines", lambda device, by_name: None)
    described = call((length, length), **given)
    for ask, want in zip((hopper.declines, hopper.declines_backward), taken, strict=True):
        reason = ask(*described, by_name=False)
        assert (reason is None) == want
        assert want or "known to be" in str(reason)
        assert ask(*described, by_name=True) is None


BACKWARDS: dict[str, tuple[dict, tuple[bool, bool, bool]]] = {
    "causal": ({}, (True, True, False)),
    "causal, any order": ({"deterministic": False}, (True, False, False)),
    "padded": (PADDED, (False, False, False)),
    "padded, any order": (PADDED | {"deterministic": False}, (False, False, False)),
    "padded D64": (PADDED | {"dims": (64, 64)}, (False, False, False)),
    "padded D64, any order": (
        PADDED | {"dims": (64, 64), "deterministic": False},
        (True, False, False),
    ),
    "D192-128": ({"dims": (192, 128)}, (False, False, True)),
}


@pytest.mark.parametrize(("given", "want"), BACKWARDS.values(), ids=BACKWARDS)
def test_which_kernels_a_backward_has(given: dict, want: tuple[bool, bool, bool]) -> None:
    """One for all gradients, in turns or not; or two, of which wide heads have their own."""
    tiles = config.backward_tiles(*call((4096, 4096), **given))
    assert (tiles.setup.WITH_DQ, tiles.setup.ORDERED, tiles.wide) == want
    assert (tiles.of_queries is None) == tiles.setup.WITH_DQ


@pytest.mark.parametrize(
    ("mask", "want"),
    [
        (AttentionMask.causal(window=299), (BAND.value, True, True)),
        (AttentionMask.causal(window=300), (BAND.value, False, True)),
        (AttentionMask.window(298, 299), (BAND.value, True, False)),
        (AttentionMask.window(299, 299), (NO_MASK.value, False, False)),
    ],
    ids=str,
)
def test_an_end_of_a_band_that_hides_nothing_costs_nothing(
    mask: AttentionMask, want: tuple[int, bool, bool]
) -> None:
    query, key, value, described = call(mask=mask)
    tiles = config.forward_tiles(query, key, value)
    forward = config.forward_flags(query, key, described, tiles, False)
    backward = config.backward_tiles(query, key, value, described).setup
    for flags in (forward, backward):
        assert (flags.MASK, flags.LEFT, flags.RIGHT) == want


def test_by_name_the_reason_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "_device_declines", lambda device, by_name: None)
    query, key, value, given = call(bias=torch.zeros(1, 1, 300, 300))
    for backward in (False, True):
        with pytest.raises(ValueError, match="'hopper' cannot run, it has no bias; use 'auto'"):
            select("hopper", query, key, value, given, backward)
        assert select("auto", query, key, value, given, backward).name != "hopper"
