"""The one cache of what is worked out from tensors, and the questions that decide its use.

All layers of a model share a mask, so what the mask says in tiles, ranges and documents is worked
out once. It holds as long as its sources are the same objects, of the same version, at the same
place in memory. Writes through ``.data``, NumPy or DLPack change none of the three. So there are
two caches: one that lives as long as a forward pass, for tensors of others, and one for each
tensor that is our `own`, which nobody else writes to.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import is_fake
from torch.jit._trace import is_tracing as is_jit_tracing

Derived = TypeVar("Derived")

_MOST = 256
"""Entries of a cache; one more, and the oldest goes."""


# May values decide?


def is_tracing() -> bool:
    """Whether operations are recorded, to run on other values later.

    torch.compile, torch.export, torch.jit.trace and CUDA graphs record them.
    """
    if torch.compiler.is_compiling() or is_jit_tracing():
        return True
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def is_mapped() -> bool:
    """Whether `torch.func.vmap` maps what runs."""
    if not torch._C._are_functorch_transforms_active():
        return False
    levels = functorch.get_interpreter_stack() or ()
    return any(level.key() == functorch.TransformType.Vmap for level in levels)


def is_symbolic() -> bool:
    """Whether no value may decide anything: there is none, or what runs is for others as well."""
    return is_tracing() or is_mapped() or active_fake_mode() is not None


def has_value(tensor: Tensor) -> bool:
    """Whether the values of this very tensor may decide: under vmap those of a constant may."""
    if is_tracing() or tensor.is_meta:
        return False
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return False
        tensor = functorch.get_unwrapped(tensor)
    return not is_fake(tensor)


def all_values(tensor: Tensor) -> Tensor | None:
    """``tensor`` with an axis for each vmap that maps it; None if its values may not decide."""
    if is_tracing():
        return None
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return None if tensor.is_meta or is_fake(tensor) else tensor


def may_be_kept(tensor: Tensor) -> bool:
    """Whether ``tensor``, just made, has values that last.

    Those made while a CUDA graph is captured exist only when it is replayed, those of vmap and
    fake ones only for a while.
    """
    return all_values(tensor) is tensor


# The cache


class TensorCache:
    """Values by key and sources; bounded, and it keeps no source alive."""

    def __init__(self) -> None:
        self._entries: dict[tuple, _Entry] = {}

    def once(self, key: Hashable, build: Callable[[], Derived], *sources: Tensor) -> Derived:
        """``build()``, which reads the sources and nothing else that ``key`` does not tell."""
        at = (key, *map(id, sources))
        entry = self._entries.get(at)
        if entry is not None and entry.holds(sources):
            return entry.read()
        # What is made in inference mode cannot be saved for a later backward.
        with torch.inference_mode(False):
            value = build()
        if not isinstance(value, Tensor) or may_be_kept(value):
            self._entries.pop(at, None)
            if len(self._entries) >= _MOST:
                # Threads share what follows from a mask: another may drop the same one.
                for oldest in list(self._entries)[:1]:
                    self._entries.pop(oldest, None)
            self._entries[at] = _Entry(value, sources)
        return value


class _Entry:
    """A value, which may be read on another CUDA stream than the one that made it."""

    __slots__ = ("_made", "_sources", "_states", "_stream", "_value")

    def __init__(self, value: Any, sources: tuple[Tensor, ...]) -> None:
        self._value = value
        self._sources = [weakref.ref(source) for source in sources]
        self._states = [_state(source) for source in sources]
        self._stream = None
        if sources[0].is_cuda:
            self._stream = torch.cuda.current_stream(sources[0].device)
            self._made = self._stream.record_event()

    def holds(self, sources: tuple[Tensor, ...]) -> bool:
        for source, known, state in zip(sources, self._sources, self._states, strict=True):
            if known() is not source or _state(source) != state:
                return False
        return True

    def read(self) -> Any:
        """The value, for work on the current stream."""
        if self._stream is not None:
            stream = torch.cuda.current_stream(self._stream.device)
            # A graph is captured after its device was waited for, and may wait for nothing before.
            if stream != self._stream and not torch.cuda.is_current_stream_capturing():
                stream.wait_event(self._made)
                for tensor in _tensors(self._value):
                    tensor.record_stream(stream)
        return self._value


def _state(tensor: Tensor) -> tuple[int | None, int]:
    return None if tensor.is_inference() else tensor._version, tensor.data_ptr()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif hasattr(value, "tensors"):
        yield from value.tensors()
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


# Tensors of our own

_OWN: dict[int, tuple[weakref.ref[Tensor], TensorCache]] = {}


def own(tensor: Tensor) -> Tensor:
    """``tensor``, just made, to which nobody else will ever write: what follows from it is kept.

    What is kept goes when the tensor does.
    """
    if may_be_kept(tensor):
        number = id(tensor)
        # Bound now: when the interpreter ends, modules lose their names before tensors go.
        forget = partial(_OWN.pop, number)
        _OWN[number] = weakref.ref(tensor, forget), TensorCache()
    return tensor


def is_own(tensor: Tensor) -> bool:
    return not torch.compiler.is_compiling() and _cache(tensor) is not None


def derive(key: Hashable, build: Callable[[], Derived], *sources: Tensor) -> Derived:
    """``build()``, kept if all sources are our own; see `TensorCache.once`."""
    if torch.compiler.is_compiling():
        return build()
    caches = [_cache(source) for source in sources]
    cache = None if None in caches else caches[0]
    return build() if cache is None else cache.once(key, build, *sources)


def _cache(tensor: Tensor) -> TensorCache | None:
    known = _OWN.get(id(tensor))
    return known[1] if known is not None and known[0]() is tensor else None
