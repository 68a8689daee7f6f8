"""The Transformers side: ``attn_implementation="flash_two"``, or "fa_two", the same unshimmed."""

from __future__ import annotations

import warnings

import transformers

from hf_flash_two.hf import compat
from hf_flash_two.hf.interface import attention_forward
from hf_flash_two.hf.mask_function import make_mask
from hf_flash_two.hf.patching import patch_asked, patch_built
from hf_flash_two.hf.serving import check_serving

__all__ = ["register"]


def register() -> None:
    """Register attention and mask function under ``flash_two`` and ``fa_two``; again is no harm.

    Where Transformers has changed so that ``flash_two`` cannot be made to load and behave, only
    ``fa_two`` is registered, with a warning that says why.
    """
    version = f"transformers {transformers.__version__}"
    compat.describe_mask_functions()
    names = [compat.FA_TWO]
    reason = compat.allow_flash_two()
    if reason is None:
        names.append(compat.FLASH_TWO)
    else:
        warnings.warn(
            f"attn_implementation='flash_two' is not available with {version}: {reason}. Use "
            "'fa_two', the same attention under a name that Transformers does not treat specially.",
            stacklevel=2,
        )
    reason = compat.patch_at_load(patch_built, patch_asked)
    if reason is not None:
        warnings.warn(
            "attn_implementation has no effect on models that compute attention themselves with "
            f"{version}: {reason}. Call hf_flash_two.patch(model) on the loaded model.",
            stacklevel=2,
        )
    reason = compat.check_before_serving(check_serving)
    if reason is not None:
        warnings.warn(
            "continuous batching is not checked for models that do not use its cache with "
            f"{version}: {reason}. Compare its answers with those of `generate`.",
            stacklevel=2,
        )
    for name in compat.with_paged_names(names):
        transformers.AttentionInterface.register(name, attention_forward)
        transformers.AttentionMaskInterface.register(name, make_mask)
