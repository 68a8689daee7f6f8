"""FlashAttention-2 for the attention models of Transformers, on any device of PyTorch."""

from typing import TYPE_CHECKING, Any

import torch

from hf_flash_two.attention import flash_attention
from hf_flash_two.hf import register
from hf_flash_two.hf.families import register_attention
from hf_flash_two.hf.max_logits import max_logits
from hf_flash_two.hf.patching import patch, patched, unpatch
from hf_flash_two.hf.prefix_tree import PrefixTreeCollator, completion_logps, merge_rows
from hf_flash_two.hf.watching import watch_attention
from hf_flash_two.invariance import batch_invariant
from hf_flash_two.masks import AttentionMask
from hf_flash_two.module import FlashAttentionTwo
from hf_flash_two.parallel.context import context_parallel
from hf_flash_two.testing.parity import check_parity
from hf_flash_two.weights import AttentionWeights

__all__ = [
    "AttentionMask",
    "AttentionWeights",
    "FlashAttentionTwo",
    "MaxLogitsCallback",
    "PrefixTreeCollator",
    "batch_invariant",
    "check_parity",
    "completion_logps",
    "context_parallel",
    "flash_attention",
    "max_logits",
    "merge_rows",
    "patch",
    "patched",
    "register_attention",
    "unpatch",
    "watch_attention",
]
__version__ = "0.1.0"

if TYPE_CHECKING:
    from hf_flash_two.hf.max_logits_log import MaxLogitsCallback


def __getattr__(name: str) -> Any:
    # Transformers' trainers, which most programs do not need.
    if name == "MaxLogitsCallback":
        from hf_flash_two.hf.max_logits_log import MaxLogitsCallback

        return MaxLogitsCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register()
if torch.distributed.is_available():
    from hf_flash_two.parallel import dtensor

    dtensor.register()
