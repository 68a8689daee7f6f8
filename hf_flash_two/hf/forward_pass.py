"""One forward pass of a Transformers model: what its caller says, and what its layers share.

Hooks on each model that uses flash_two open a pass before its forward and close it behind. In
between, `packing` reads what the caller said of documents, also where the model hands none of it
on; layers know whether the caller asked for attention weights, and share what they derive from
tensors.
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

from hf_flash_two.hf import compat, packing

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


class ForwardPass:
    """
    Attributes:
        model: the one whose forward runs.
        said: by its caller, and by that of the model around it, if both share a config.
        around: the pass within which this one runs.
        frame: the call that opened it; None while tracing.
        ones: the mask with 1 for every visible token, where the caller's may number documents.
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
        self.model, self.said, self.around, self.frame = model, said, around, frame
        self.derived: dict = {} if around is None else around.derived
        self.ones: Tensor | None = None
        self.apart = False


Begin = Callable[[ForwardPass], dict[str, Tensor]]
"""Called with a pass that opens; returns the arguments of the model that it replaces."""
End = Callable[[ForwardPass], None]
"""Called with a pass whose forward is through."""


def watch(model: PreTrainedModel, begin: Begin, end: End) -> None:
    """Open a `ForwardPass` in every forward of ``model``; again is no harm."""
    if _HOOKS in model.__dict__:
        return
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    places = tuple(names.index(name) if name in names else len(names) for name in Said._fields)
    model.__dict__[_HOOKS] = (
        model.register_forward_pre_hook(partial(_open, places, begin), with_kwargs=True),
        model.register_forward_hook(partial(_close, end), always_call=True),
    )


def unwatch(model: PreTrainedModel) -> None:
    """Undo `watch`."""
    for handle in model.__dict__.pop(_HOOKS, ()):
        handle.remove()


def current() -> ForwardPass | None:
    """The innermost pass of this thread."""
    passes = _passes()
    return passes[-1] if passes else None


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
    if running is None or packing.recording() or any(x.is_inference() for x in tensors):
        return build()
    at = (key, *map(id, tensors))
    versions = [x._version for x in tensors]
    kept = running.derived.get(at)
    if kept is not None and kept[0] == versions:
        return kept[2]
    # What is made in inference mode cannot be saved for a later backward.
    with torch.inference_mode(False):
        derived = build()
    # The tensors are held so that no other can take the place in memory that tells them apart.
    running.derived[at] = versions, tensors, derived
    return derived


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


def _open_pass(
    places: tuple[int, ...], begin: Begin, model: PreTrainedModel, args: tuple, kwargs: dict
) -> tuple[tuple, dict] | None:
    passes, frame = _passes(), None
    if not packing.recording():
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
    passes.append(ForwardPass(model, Said(positions, *others), around, frame))
    replaced = begin(passes[-1])
    return _with(replaced, places, args, kwargs) if replaced else None


def _close_pass(end: End, model: PreTrainedModel, args: tuple, output) -> None:
    ending = _passes().pop()
    if output is not None:  # None: an error is on its way
        end(ending)


_open_in_eager, _close_in_eager = map(torch.compiler.disable, (_open_pass, _close_pass))


def _with(
    replaced: dict[str, Tensor], places: tuple[int, ...], args: tuple, kwargs: dict
) -> tuple[tuple, dict]:
    """The model's arguments with those of ``replaced`` in their places."""
    for name, tensor in replaced.items():
        at = places[Said._fields.index(name)]
        if name in kwargs:
            kwargs = {**kwargs, name: tensor}
        elif at < len(args):
            args = (*args[:at], tensor, *args[at + 1 :])
    return args, kwargs


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
