"""The ``forward`` of one layer with hand-written attention, under the tracer.

What lies on an instance is looked up without binding. A forward that held its layer would run that
layer's weights in every shallow copy (`nn.DataParallel` makes one per device and call), and would
keep a deleted model until the garbage collector runs. So a forward pre-hook, which is given the
layer that was called, hands it over.
"""

from __future__ import annotations

import inspect
from functools import partial

import torch
from torch import nn
from torch.utils._pytree import tree_map

from hf_flash_two.hf.forward_pass import asks_for_weights
from hf_flash_two.hf.tracer.mode import tracing
from hf_flash_two.hf.tracer.rules import signature
from hf_flash_two.hf.watched import is_watched

_UNPATCHED = "flash_two_unpatched"


class LayerForward:
    """Takes the place of the forward of ``layer``.

    Attributes:
        name: of the layer, for errors.
        previous: the forward that the instance had; None for that of its class.
        believed: whether the ``output_attentions`` that the layer gets is what the caller wants.
    """

    def __init__(self, layer: nn.Module, name: str, *, believed: bool):
        self.name, self.believed = name, believed
        self.previous = vars(layer).get("forward")
        self.__signature__ = inspect.signature(layer.forward)
        self._handle = layer.register_forward_pre_hook(_hand_over, with_kwargs=True)
        layer.forward = self

    def __call__(self, *args, **kwargs):
        if _UNPATCHED not in kwargs:
            raise TypeError(
                f"{self.name}: `forward` was called directly; call the layer, or undo `patch` by "
                "hf_flash_two.unpatch(model)"
            )
        # Not a bound method: the compiler takes one for the layer's own forward, which is this.
        unpatched = kwargs.pop(_UNPATCHED)
        if torch.compiler.is_compiling() and isinstance(unpatched.args[0], nn.MultiheadAttention):
            return unpatched(*args, **kwargs)  # PyTorch's own is compiled whole, and as thrifty
        return self._traced(unpatched, args, kwargs)

    @torch.compiler.disable(reason="hand-written attention runs uncompiled")
    def _traced(self, unpatched: partial, args: tuple, kwargs: dict):
        layer, forward = unpatched.args[0], self.previous or unpatched
        if self.believed and _asked(type(layer), args, kwargs) or asks_for_weights():
            if is_watched(layer):
                raise ValueError(
                    f"output_attentions: {self.name} then runs its own code, where watch_attention "
                    "sees nothing; set it to False"
                )
            return forward(*args, **kwargs)  # the caller wants what is saved here
        with tracing(self.name, layer) as tracer:
            outputs = forward(*args, **kwargs)
        return tree_map(tracer.resolve, outputs)

    def remove(self, layer: nn.Module) -> None:
        """Put the forward of ``layer`` back, also below Accelerate's hooks, which stay."""
        slot = _slot(layer)
        if slot is None:
            return
        self._handle.remove()
        delattr(layer, slot)
        if self.previous is not None or slot != "forward":
            setattr(layer, slot, self.previous or type(layer).forward.__get__(layer))


def of(layer: nn.Module) -> LayerForward | None:
    """The one of ``layer``; None if it has none."""
    slot = _slot(layer)
    return None if slot is None else vars(layer)[slot]


def _slot(layer: nn.Module) -> str | None:
    for slot in ("forward", "_old_forward"):
        if isinstance(vars(layer).get(slot), LayerForward):
            return slot
    return None


def _hand_over(layer: nn.Module, args: tuple, kwargs: dict[str, object]):
    return args, {**kwargs, _UNPATCHED: partial(type(layer).forward, layer)}


def _asked(cls: type[nn.Module], args: tuple, kwargs: dict) -> bool:
    """The ``output_attentions`` among the arguments of a ``cls``'s forward."""
    names = list(signature(cls.forward).parameters)[1:]
    return bool((dict(zip(names, args, strict=False)) | kwargs).get("output_attentions"))
