"""One forward pass of a Transformers model: what its caller says, and what its layers share.

Hooks on each model that uses flash_two open a pass before its forward and close it behind. In
between, masks take the packed documents from what the caller said, also where the model hands none
of it on; layers know whether the caller asked for attention weights, and share what they derive
from tensors. A pass that ends without anything having
kept the documents apart raises: a result with a leak does not leave the model.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_flash_two.hf import compat
from hf_flash_two.hf.packing import (
    demand,
    document_starts,
    ids_of_boundaries,
    may_be_packed,
    numbers_documents,
)
from hf_flash_two.tensor_cache import TensorCache, is_symbolic

Derived = TypeVar("Derived")

_local = threading.local()
_HOOKS = "_flash_two_hooks"
_MODULES = nn.Module.__call__.__code__.co_filename


class Said(NamedTuple):
    """Of the arguments of a model those that layers may not be told; None where nothing came.

    Attributes:
        position_ids: [1 or B, T].
        attention_mask: [B, L], as the caller gave it; or anything else that came in its place.
        cu_seq_lens_q: [N + 1]; cu_seq_lens_k: the same, or a dict of them by kind of layer.
        output_attentions: whether the caller wants attention weights.
    """

    position_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    cu_seq_lens_q: Tensor | None = None
    cu_seq_lens_k: Tensor | dict | None = None
    output_attentions: bool | None = None

    def padding(self, batch: int, queries: int, offset: int | Tensor) -> Tensor | None:
        """The mask of the tokens now passed in, [B, queries]: those from ``offset`` on."""
        mask = self.attention_mask
        if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] < batch:
            return None
        mask = mask[:batch] if mask.shape[0] > batch else mask
        if mask.shape[1] <= queries:
            return mask if mask.shape[1] == queries else None
        at = torch.arange(queries, device=mask.device) + offset
        return mask.index_select(1, at.clamp(max=mask.shape[1] - 1))


class ForwardPass:
    """
    Attributes:
        model: the one whose forward runs.
        said: by its caller, and by that of the model around it, if both share a config.
        around: the pass within which this one runs.
        frame: the call that opened it; None while tracing.
        ones: the mask with 1 for every visible token, where it may number documents instead.
        apart: nothing that was said of documents is left to be done.
        derived: what layers share; one for all passes within the outermost.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        said: Said,
        around: ForwardPass | None = None,
        frame: FrameType | None = None,
    ):
        self.model, self.around, self.frame = model, around, frame
        self.derived = TensorCache() if around is None else around.derived
        given = said.attention_mask
        if around is not None and given is not None and given is around.ones:
            # A model hands on the mask of ones that it got in place of one of numbers.
            said = said._replace(attention_mask=around.said.attention_mask)
        self.said = said
        self.ones: Tensor | None = None
        if _is_numbered(said.attention_mask):
            self.ones = (said.attention_mask != 0).to(said.attention_mask.dtype)
        self.apart = False

    def with_ones(self, places: tuple[int, ...], args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The model's arguments with the mask of ones: models compute with its values."""
        if "attention_mask" in kwargs:
            return args, {**kwargs, "attention_mask": self.ones}
        at = places[Said._fields.index("attention_mask")]
        return ((*args[:at], self.ones, *args[at + 1 :]) if at < len(args) else args), kwargs

    def documents(
        self, batch: int, queries: int, offset: int | Tensor, *, causal: bool
    ) -> Tensor | None:
        """The number of each token's document, [1 or B, queries]; None if no row holds several.

        While tracing, numbers come wherever a row could hold several.

        Args:
            offset: how many tokens of the row were passed in before these.
            causal: in a bidirectional model positions that restart say nothing of documents.
        """
        said = self.said
        if said.cu_seq_lens_q is not None:
            if batch != 1 or not _equal(said.cu_seq_lens_q, said.cu_seq_lens_k):
                return None
            self.apart = True
            return ids_of_boundaries(said.cu_seq_lens_q, queries)
        self.apart = True
        mask = said.padding(batch, queries, offset)
        positions = said.position_ids if causal and compat.has_positions(self.model) else None
        if not may_be_packed(positions, batch, queries):
            positions = None
        if mask is not None and positions is None and not numbers_documents(mask):
            mask = None
        given = [x for x in (positions, mask) if x is not None]
        if queries == 1 or not given:
            return None

        def build() -> Tensor | None:
            starts = document_starts(positions, mask)
            return starts.cumsum(1) if is_symbolic() or bool(starts.any()) else None

        return once(given[0], "documents", build, *given[1:])

    def close(self) -> None:
        """Raise if the caller spoke of packed documents and nothing has kept them apart."""
        if not compat.uses_ours(self.model.config):
            return
        if self.apart:
            around = self.around
            if around is not None and around.says_no_more_than(self):
                around.apart = True
            return
        ends, tokens = self.said.cu_seq_lens_q, self._tokens()
        if ends is not None:
            if ends.numel() > 2:
                self._refuse("cu_seq_lens_q")
        elif tokens is not None:
            causal = compat.is_causal_model(self.model)
            ids = self.documents(*tokens, 0, causal=causal)
            if ids is None:
                return
            if not is_symbolic():
                self._refuse("position_ids, attention_mask")
            demand(
                (ids == 0).all(), f"{type(self.model).__name__}: packed documents need eager mode"
            )

    def says_no_more_than(self, inner: ForwardPass) -> bool:
        """Whether all that was said here of documents has been said to ``inner`` as well."""
        here, there = self.said, inner.said
        if self.model.config is inner.model.config:
            return True
        if here.cu_seq_lens_q is not there.cu_seq_lens_q or (
            self.ones is not None and inner.ones is None
        ):
            return False
        positions = here.position_ids, there.position_ids
        return positions[0] is None or (
            positions[1] is not None and positions[0].shape == positions[1].shape
        )

    def _tokens(self) -> tuple[int, int] | None:
        """(batch, tokens in a row) of what was said; None if the caller made the whole mask."""
        positions, mask = self.said[:2]
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            return None
        if mask is not None:
            return mask.shape[0], mask.shape[1] if positions is None else positions.shape[-1]
        return None if positions is None else (positions.shape[0], positions.shape[-1])

    def _refuse(self, name: str) -> None:
        raise NotImplementedError(
            f"{name}: tells of packed documents, and {type(self.model).__name__} "
            f"({self.model.config.model_type}) makes masks that cannot keep them apart; pass one "
            "document in a row"
        )


def watch(model: PreTrainedModel) -> None:
    """Open a `ForwardPass` in every forward of ``model``; again is no harm."""
    if _HOOKS in model.__dict__:
        return
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    places = tuple(names.index(name) if name in names else len(names) for name in Said._fields)
    model.__dict__[_HOOKS] = (
        model.register_forward_pre_hook(partial(_open, places), with_kwargs=True),
        model.register_forward_hook(_close, always_call=True),
    )


def unwatch(model: PreTrainedModel) -> None:
    """Undo `watch`."""
    for handle in model.__dict__.pop(_HOOKS, ()):
        handle.remove()


def current() -> ForwardPass | None:
    """The innermost pass of this thread."""
    passes = _passes()
    return passes[-1] if passes else None


def keep_apart() -> None:
    """Note that the caller's documents have reached a layer."""
    running = current()
    if running is not None:
        running.apart = True


def asks_for_weights() -> bool:
    """Whether the caller of the innermost model that was told wants attention weights.

    Some families hand ``output_attentions`` down to their layers; others collect what layers
    return, by code of their own or by Transformers' hooks, and tell them nothing.
    """
    if compat.records_attentions():
        return True
    running = current()
    while running is not None:
        asked = running.said.output_attentions
        if asked is not None or running.model.config.output_attentions:
            return asked is None or bool(asked)
        running = running.around
    return False


def once(tensor: Tensor, key, build: Callable[[], Derived], *others: Tensor) -> Derived:
    """``build()``, which reads all of the tensors; kept until the pass ends or one is written to.

    Outside of a pass, and while tracing, nothing is kept.
    """
    running = current()
    tensors = (tensor, *others)
    if running is None or is_symbolic() or any(x.is_inference() for x in tensors):
        return build()
    return running.derived.once(key, build, *tensors)


def _passes() -> list[ForwardPass]:
    if not hasattr(_local, "passes"):
        _local.passes = []
    return _local.passes


@compat.only_inlined
def _open(*arguments):
    """The hook: compiled inside a model that is, and run as it is around one."""
    return (_open_pass if torch.compiler.is_compiling() else _open_in_eager)(*arguments)


@compat.only_inlined
def _close(*arguments) -> None:
    (_close_pass if torch.compiler.is_compiling() else _close_in_eager)(*arguments)


def _open_pass(places: tuple[int, ...], model: PreTrainedModel, args: tuple, kwargs: dict):
    passes, frame = _passes(), None
    if not is_symbolic():
        frame = next(f for f in _callers(sys._getframe()) if f.f_code.co_filename == _MODULES)
        # What interrupts a forward from outside, as Ctrl-C does, leaves its pass behind.
        while passes and passes[-1].frame not in (None, *_callers(frame)):
            passes.pop()
    given = [
        kwargs.get(name, args[at] if at < len(args) else None)
        for name, at in zip(Said._fields, places, strict=True)
    ]
    around = passes[-1] if passes else None
    if around is not None and around.model.config is model.config:
        for at, name in enumerate(Said._fields):
            # Fields that are not needed are not looked at: the compiler would guard each tensor.
            given[at] = getattr(around.said, name) if given[at] is None else given[at]
    elif frame is not None and around is None:
        for name, value in _said_past_hooks(model, frame).items():
            at = Said._fields.index(name)
            given[at] = value if given[at] is None else given[at]
    positions, *others = given
    if isinstance(positions, Tensor) and positions.dim() == 3 and positions.shape[0] == 4:
        positions = positions[0]  # the text's, before those of the rotary embedding
    said = Said(positions, *others)
    passes.append(ForwardPass(model, said, around, frame))
    return passes[-1].with_ones(places, args, kwargs) if passes[-1].ones is not None else None


def _close_pass(model: PreTrainedModel, args: tuple, output) -> None:
    passes = _passes()
    ending = passes.pop()
    if output is not None:  # None: an error is on its way
        ending.close()


_open_in_eager, _close_in_eager = map(torch.compiler.disable, (_open_pass, _close_pass))


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _said_past_hooks(model: PreTrainedModel, frame: FrameType) -> dict:
    """What was handed to the model around this one whose forward was called without its hooks.

    PEFT calls it so.
    """
    for caller in _callers(frame):
        if caller.f_code.co_name != "forward":
            continue
        variables = caller.f_locals
        owner = variables.get("self")
        if isinstance(owner, PreTrainedModel) and owner.config is model.config:
            given = {**variables.get("kwargs", {}), **variables}
            return {name: given[name] for name in Said._fields if name in given}
    return {}


def _is_numbered(mask) -> bool:
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] == 1:
        return False
    return numbers_documents(mask) and (is_symbolic() or bool((mask > 1).any()))


def _equal(a: Tensor, b) -> bool:
    """Whether both are known to be the same boundaries; ``b`` may be none, or a dict of them."""
    if b is None or a is b:
        return True
    return isinstance(b, Tensor) and not is_symbolic() and torch.equal(a, b)
