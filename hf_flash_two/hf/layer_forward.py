"""A ``forward`` of its own for one layer that computes attention itself: it runs under the tracer.

What lies on an instance is looked up without binding. A forward that held its layer would run that
layer's weights in every shallow copy (`nn.DataParallel` makes one per device and call), and would
keep a deleted model until the garbage collector runs. So it holds none: a forward pre-hook, which
is given the layer that was called, hands it over.
"""

from __future__ import annotations

import inspect
from functools import cache, partial

import torch
from torch import nn
from torch.utils._pytree import tree_map

from hf_flash_two.hf.forward_pass import asks_for_weights
from hf_flash_two.hf.tracer.mode import own_attention

_UNPATCHED = "flash_two_unpatched"


class LayerForward:
    """Stands for the forward of ``layer``, which it takes the place of.

    Attributes:
        name: of the layer, for errors.
        previous: the forward that the instance had; None for that of its class.
        believed: an ``output_attentions`` that the layer is given says what the caller wants.
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
                f"{self.name}: its `forward` was called by itself; call the layer, or undo with "
                "hf_flash_two.unpatch(model)"
            )
        # Not a bound method: the compiler takes one for the layer's own forward, which is this.
        unpatched = kwargs.pop(_UNPATCHED)
        if torch.compiler.is_compiling() and isinstance(unpatched.args[0], nn.MultiheadAttention):
            return unpatched(*args, **kwargs)  # PyTorch's own is compiled whole, and as thrifty
        return self._traced(unpatched, args, kwargs)

    @torch.compiler.disable(reason="attention that a layer writes out itself runs uncompiled")
    def _traced(self, unpatched: partial, args: tuple, kwargs: dict):
        layer, forward = unpatched.args[0], self.previous or unpatched
        if self.believed and _asked(type(layer), args, kwargs) or asks_for_weights():
            return forward(*args, **kwargs)  # the caller wants what is saved here
        with own_attention(self.name) as tracer:
            outputs = forward(*args, **kwargs)
        return tree_map(tracer.settled, outputs)

    def remove(self, layer: nn.Module) -> None:
        """``layer`` is as it was; Accelerate's hooks, which wrap what they find, stay."""
        slot = _slot(layer)
        if slot is None:
            return
        self._handle.remove()
        delattr(layer, slot)
        if self.previous is not None or slot != "forward":
            setattr(layer, slot, self.previous or type(layer).forward.__get__(layer))


def of(layer: nn.Module) -> LayerForward | None:
    """That of ``layer``; None if it has none."""
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
    position = _position(cls)
    if position is not None and position < len(args):
        return bool(args[position])
    return bool(kwargs.get("output_attentions"))


@cache
def _position(cls: type[nn.Module]) -> int | None:
    names = list(inspect.signature(cls.forward).parameters)
    return names.index("output_attentions") - 1 if "output_attentions" in names else None
