"""Refuses calls of a model that need what the installed Transformers does not offer."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_flash_two.hf import compat
from hf_flash_two.hf.packing import recording

_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


def guard_calls(model: PreTrainedModel) -> None:
    """Check each call of ``model`` under our names; nothing where Transformers offers everything.

    Where it does, masks tell of packed documents, and layers are told what is asked of them.
    """
    lacks = not (compat.offers("packing") and compat.offers("attentions"))
    if lacks and _check not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_check, with_kwargs=True)


def _check(model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> None:
    if not compat.is_ours(compat.name_in(model.config)):
        return
    given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    given |= given.pop("kwargs", {})
    if _packed(given):
        compat.require("packing")
    wanted = given.get("output_attentions")
    if model.config.output_attentions if wanted is None else wanted:
        compat.require("attentions")


def _packed(given: dict[str, Any]) -> bool:
    """Whether a call tells of several documents in a row: by boundaries, or visible positions."""
    if any(given.get(name) is not None for name in _BOUNDARIES):
        return True
    positions, visible = given.get("position_ids"), given.get("attention_mask")
    if not isinstance(positions, Tensor) or positions.dim() != 2 or positions.shape[1] < 2:
        return False
    if recording():
        return True  # on other values it may be
    restarts = positions[:, 1:] <= positions[:, :-1]
    if isinstance(visible, Tensor) and visible.shape[-1:] == positions.shape[1:]:
        restarts = restarts & (visible[..., 1:] != 0) & (visible[..., :-1] != 0)
    return bool(torch.any(restarts))
