"""One forward pass of a Transformers model: what its caller says, and what its layers share.

Hooks on each model that uses flash_two open a pass before its forward and close it after. Meanwhile
`packing` reads what the caller said of documents, whether or not the model hands it on; layers know
whether the caller wants attention weights, and share what they derive from tensors.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_flash_two.hf import compat
from hf_flash_two.hf.compat import callers
from hf_flash_two.tensor_cache import TensorCache, is_symbolic

Derived = TypeVar("Derived")

_local = threading.local()
_HOOKS = "_flash_two_hooks"
_MODULES = nn.Module.__call__.__code__.co_filename


class Said(NamedTuple):
    """The arguments of a model that may not reach its layers; None where nothing came.

    Attributes:
        position_ids: [1 or B, T].
        attention_mask: [B, L], as the caller gave it; or anything else given as one.
        cu_seq_lens_q: [N + 1]; cu_seq_lens_k: the same, or a dict of them by kind of layer.
        subtree_stop: [1 or B, T], see `branches`.
        output_attentions: whether the caller wants attention weights.
    """

    position_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    cu_seq_lens_q: Tensor | None = None
    cu_seq_lens_k: Tensor | dict | None = None
    subtree_stop: Tensor | None = None
    output_attentions: bool | None = None


LOSS = ("labels", "shift_labels", "num_items_in_batch")
"""The arguments of a model that decide its loss."""


class ForwardPass:
    """
    Attributes:
        model: the one whose forward runs.
        said: by its caller, and by that of the model around it, if both share a config.
        gathered: the same of the whole sequence, where the model gets one shard of it.
        around: the pass within which this one runs.
        frame: the call that opened it; None while tracing.
        caller: what was said to the model around it, of `Said` and of labels, and that "model",
            where it has no hooks or was called past them.
        ones: the mask with 1 for every visible token, where the caller's may number documents.
        apart: whether all documents that were described are kept apart.
        returns_weights: whether layers are to, by what decides that.
        wants_weights: whether the caller asks for them; None until a layer wants to know.
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
        self.caller: dict[str, Any] = {}
        self.gathered: Said | None = None
        self.derived = TensorCache() if around is None else around.derived
        self.ones: Tensor | None = None
        self.apart = False
        self.returns_weights: dict[tuple, bool] = {}
        self.wants_weights: bool | None = None

    @property
    def whole(self) -> Said:
        """What was said of the whole sequence."""
        return self.said if self.gathered is None else self.gathered


Begin = Callable[[ForwardPass, dict[str, Any]], dict[str, Any]]
"""Called with a pass that opens and its model's arguments; returns those that are replaced."""
End = Callable[[ForwardPass], None]
"""Called with a pass whose forward is through."""


def watch(model: PreTrainedModel, begin: Begin, end: End) -> None:
    """Open a `ForwardPass` in every forward of ``model``; a second call does nothing."""
    if _HOOKS in model.__dict__:
        return
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    model.__dict__[_HOOKS] = (
        model.register_forward_pre_hook(partial(_open, names, begin), with_kwargs=True),
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
    if running is None:
        return False
    if running.wants_weights is None:
        running.wants_weights = _wants_weights(running)
    return running.wants_weights


def _wants_weights(running: ForwardPass | None) -> bool:
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


def text_positions(positions: Any) -> Any:
    """Of [4, B, T], the text's and those of the rotary embedding, the first; others as they are."""
    several = isinstance(positions, Tensor) and positions.dim() == 3 and positions.shape[0] == 4
    return positions[0] if several else positions


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
    names: list[str], begin: Begin, model: PreTrainedModel, args: tuple, kwargs: dict
) -> tuple[tuple, dict] | None:
    passes, frame = _passes(), None
    if not is_symbolic():
        frame = next(f for f in callers(sys._getframe()) if f.f_code.co_filename == _MODULES)
        # What interrupts a forward from outside, as Ctrl-C does, leaves its pass behind.
        while passes and passes[-1].frame not in (None, *callers(frame)):
            passes.pop()
    arguments = {**dict(zip(names, args, strict=False)), **kwargs}
    given = [arguments.get(name) for name in Said._fields]
    around, caller = passes[-1] if passes else None, {}
    if around is not None and around.model.config is model.config:
        for at, name in enumerate(Said._fields):
            # Fields that are not needed are not looked at: the compiler would guard each tensor.
            given[at] = getattr(around.said, name) if given[at] is None else given[at]
    elif frame is not None and around is None:
        caller = _said_past_hooks(model, frame)
        for at, name in enumerate(Said._fields):
            given[at] = caller.get(name) if given[at] is None else given[at]
    said = Said(text_positions(given[0]), *given[1:])
    passes.append(ForwardPass(model, said, around, frame))
    passes[-1].caller = caller
    replaced = begin(passes[-1], arguments)
    if not replaced:
        return None
    in_place = [replaced.pop(name, x) for name, x in zip(names, args, strict=False)]
    return (*in_place, *args[len(in_place) :]), {**kwargs, **replaced}


def _close_pass(end: End, model: PreTrainedModel, args: tuple, output) -> None:
    ending = _passes().pop()
    if output is not None:  # None: an error is on its way
        end(ending)


_open_in_eager, _close_in_eager = map(torch.compiler.disable, (_open_pass, _close_pass))


def _said_past_hooks(model: PreTrainedModel, frame: FrameType) -> dict:
    """What the model around this one got, if it has no hooks or was called past them (PEFT)."""
    for caller in callers(frame):
        if caller.f_code.co_name != "forward":
            continue
        variables = caller.f_locals
        owner = variables.get("self")
        if isinstance(owner, PreTrainedModel) and owner.config is model.config:
            given = {**variables.get("kwargs", {}), **variables}
            said = {name: given[name] for name in (*Said._fields, *LOSS) if name in given}
            return said | {"model": owner}
    return {}
