"""What is worked out from a tensor is worked out once, and never served stale."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_flash_two import AttentionMask, flash_attention, tensor_cache
from hf_flash_two.tensor_cache import TensorCache, derive, is_own, own


class Counted:
    """Builds numbers, and tells how many it built."""

    def __init__(self) -> None:
        self.built = 0

    def __call__(self) -> int:
        self.built += 1
        return self.built


def swapped(x: Tensor) -> None:
    x.data = x.clone()


WRITES = {"in place": lambda x: x.add_(1), "other memory": swapped}


def test_built_once_for_a_key_and_its_sources() -> None:
    cache, build = TensorCache(), Counted()
    a, b = torch.zeros(3), torch.zeros(3)
    for _ in range(2):
        assert [cache.once("k", build, a), cache.once("k", build, a, b)] == [1, 2]
        assert [cache.once("k", build, b), cache.once("l", build, b)] == [3, 4]


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("which", [0, 1])
def test_built_anew_after_a_source_changed(write, which: int) -> None:
    cache, build = TensorCache(), Counted()
    sources = torch.zeros(3), torch.zeros(3)
    assert cache.once("k", build, *sources) == 1
    write(sources[which])
    assert [cache.once("k", build, *sources) for _ in range(2)] == [2, 2]


def test_another_tensor_in_the_place_of_one_that_died_is_another() -> None:
    cache, build = TensorCache(), Counted()
    numbers = {cache.once("k", build, torch.zeros(3)) for _ in range(20)}
    assert len(numbers) == 20


def test_bounded() -> None:
    cache, build, source = TensorCache(), Counted(), torch.zeros(3)
    for key in range(tensor_cache._MOST + 5):
        cache.once(key, build, source)
    assert len(cache._entries) == tensor_cache._MOST
    assert cache.once(key, build, source) == build.built
    assert cache.once(0, build, source) == build.built


def test_two_threads_may_drop_the_same_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one comes in between, while the key of the oldest entry is looked up."""
    monkeypatch.setattr(tensor_cache, "_MOST", 1)
    cache, build, source = TensorCache(), Counted(), torch.zeros(3)
    others: list[Callable[[], None]] = []

    class Key:
        def __hash__(self) -> int:
            while others:
                others.pop()()
            return 0

    cache.once(Key(), build, source)
    others.append(cache._entries.clear)
    assert cache.once("k", build, source) == 2 and not others


def test_only_what_is_our_own_keeps() -> None:
    ours, theirs, build = own(torch.zeros(3)), torch.zeros(3), Counted()
    assert is_own(ours) and not is_own(theirs)
    assert [derive("k", build, ours) for _ in range(2)] == [1, 1]
    assert [derive("k", build, theirs) for _ in range(2)] == [2, 3]
    assert [derive("k", build, ours, theirs) for _ in range(2)] == [4, 5]


def test_what_is_kept_goes_with_its_source() -> None:
    gc.collect()
    before = len(tensor_cache._OWN)
    mask = AttentionMask.from_padding(torch.ones(2, 100))
    bounds = mask.key_bounds()
    query = torch.randn(2, 2, 100, 8)
    flash_attention(query, query, query, mask=mask)
    assert len(tensor_cache._OWN) == before + 3
    dies = weakref.ref(bounds)
    del mask, bounds
    gc.collect()
    assert dies() is None and len(tensor_cache._OWN) == before


def test_kept_through_slices_and_moves_of_our_own_masks_only() -> None:
    ours = AttentionMask.from_padding(torch.ones(2, 100))
    first = torch.zeros(2, 100, dtype=torch.int32)
    theirs = AttentionMask(query_start=first, query_stop=first + 100)
    for mask, kept in ((ours, True), (theirs, False)):
        for made in (mask, mask.to("cpu"), mask.each_tensor(lambda tensor: tensor[:1])):
            assert (made.key_bounds() is made.key_bounds()) == kept
    first.data.copy_(torch.full((2, 100), 7))
    assert theirs.key_bounds()[0, 0, 0] == 7


@pytest.mark.parametrize("how", ["fake", "vmap", "graph"])
def test_nothing_without_lasting_values_is_kept(how: str, monkeypatch) -> None:
    """A CUDA graph's tensors have values only once it was replayed."""
    source = own(torch.zeros(3))
    if how == "fake":
        with FakeTensorMode():
            derive("k", lambda: torch.zeros(3), source)
    elif how == "vmap":
        torch.vmap(lambda x: derive("k", lambda: x + 1, source))(torch.zeros(2))
    else:
        with monkeypatch.context() as patched:
            patched.setattr(torch.cuda, "is_initialized", lambda: True)
            patched.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            derive("k", lambda: torch.zeros(3), source)
    build = Counted()
    assert derive("k", build, source) == 1


def test_what_is_made_in_inference_mode_serves_a_backward_later() -> None:
    mask = AttentionMask.from_padding(torch.tensor([[True, False, True]]))
    with torch.inference_mode():
        mask.key_bounds()
    query = torch.randn(1, 1, 3, 8, requires_grad=True)
    flash_attention(query, query, query, mask=mask).sum().backward()
    assert query.grad.isfinite().all()


def test_a_value_waits_for_the_stream_that_made_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for each use on another stream; not while a graph is captured, which may not."""

    class Stream:
        device, waited = "cuda:0", 0

        def record_event(self) -> str:
            return "made"

        def wait_event(self, event: str) -> None:
            assert event == "made"
            self.waited += 1

    class OnGPU:
        is_cuda, device, _version = True, "cuda:0", 0

        def __init__(self) -> None:
            self.readers = []

        def data_ptr(self) -> int:
            return 0

        def is_inference(self) -> bool:
            return False

        def record_stream(self, stream: Stream) -> None:
            self.readers.append(stream)

    class Mask:
        def __init__(self) -> None:
            self.parts = [OnGPU(), OnGPU()]

        def tensors(self) -> list[OnGPU]:
            return self.parts

    first, other = Stream(), Stream()
    current, capturing = [first], [False]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[0])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(tensor_cache, "Tensor", OnGPU)
    for value in (Mask(), Mask().parts[0], (Mask(), 3)):
        monkeypatch.setattr(tensor_cache, "may_be_kept", lambda tensor: True)
        source, cache, other.waited = OnGPU(), TensorCache(), 0
        current[0], capturing[0] = first, False
        for _ in range(2):
            assert cache.once("k", lambda value=value: value, source) is value
        parts = list(tensor_cache._tensors(value))
        assert parts and not first.waited and not any(part.readers for part in parts)
        current[0] = other
        assert cache.once("k", Counted(), source) is value
        assert other.waited == 1 and all(part.readers == [other] for part in parts)
        capturing[0] = True
        assert cache.once("k", Counted(), source) is value and other.waited == 1
