"""Whether the caller of a model asked for attention weights, in whichever way its family tells.

Some families hand ``output_attentions`` down to their layers; others collect what layers return,
by Transformers' hooks or by code of their own, and layers are told nothing.
"""

from __future__ import annotations

import inspect
import threading
from functools import cache

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from hf_flash_two.hf import compat

UNCOMPILED = "attention that a layer writes out itself runs uncompiled"

_running = threading.local()  # nn.DataParallel runs replicas in threads


def asked(said: bool | None) -> bool:
    """Whether a layer is to return its weights.

    Args:
        said: the ``output_attentions`` that the layer itself was given.
    """
    if said or compat.records_attentions():
        return True
    if torch.compiler.is_compiling():
        return False
    models = getattr(_running, "asked", None)
    return bool(models and models[-1])


def said(cls: type[nn.Module], args: tuple, kwargs: dict) -> bool | None:
    """The ``output_attentions`` among the arguments of a ``cls``'s forward; None without it."""
    position = _position(cls)
    if position is not None and position < len(args):
        return args[position]
    return kwargs.get("output_attentions")


@cache
def _position(cls: type[nn.Module]) -> int | None:
    names = list(inspect.signature(cls.forward).parameters)
    return names.index("output_attentions") - 1 if "output_attentions" in names else None


def listen(model: PreTrainedModel) -> tuple[RemovableHandle, RemovableHandle]:
    """While ``model`` runs, its layers know what its caller asked for."""
    return (
        model.register_forward_pre_hook(_enter, with_kwargs=True),
        model.register_forward_hook(_leave, always_call=True),
    )


@torch.compiler.disable(reason=UNCOMPILED)
def _enter(model: PreTrainedModel, args: tuple, kwargs: dict) -> None:
    wanted = said(type(model), args, kwargs)
    wanted = model.config.output_attentions if wanted is None else wanted
    if not hasattr(_running, "asked"):
        _running.asked = []
    _running.asked.append(bool(wanted))


@torch.compiler.disable(reason=UNCOMPILED)
def _leave(model: PreTrainedModel, args: tuple, output) -> None:
    _running.asked.pop()
