"""The Transformers side: ``attn_implementation="flash_two"``, or "fa_two", the same unshimmed."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers

from hf_flash_two.hf import compat, shard
from hf_flash_two.hf.interface import attention_forward
from hf_flash_two.hf.mask_function import make_mask
from hf_flash_two.hf.patching import check_built, patch_built, patch_requested
from hf_flash_two.hf.serving import check_serving

__all__ = ["register"]


def register() -> None:
    """Register attention and mask function as ``flash_two`` and ``fa_two``; again does nothing.

    What the installed Transformers makes impossible raises `NotImplementedError` where it is asked
    for; the rest works.
    """
    compat.check_names()
    compat.install_hooks(
        compat.Listeners(
            built=patch_built, requested=patch_requested, serving=check_serving, begun=check_built
        )
    )
    for name in compat.with_paged_names([compat.FA_TWO, compat.FLASH_TWO]):
        attention, mask = attention_forward, make_mask
        if compat.FLASH_TWO in name and not compat.offers("flash_two"):
            attention = mask = _refusing("flash_two")
        transformers.AttentionInterface.register(name, attention)
        transformers.AttentionMaskInterface.register(name, mask)
    if torch.distributed.is_available():
        from hf_flash_two.parallel import accelerate

        accelerate.register(shard.attends)


def _refusing(feature: str) -> Callable[..., None]:
    def refuse(*_, **__):
        compat.require(feature)

    return refuse
