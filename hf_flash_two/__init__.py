"""FlashAttention-2 for every attention model in Transformers, on every device PyTorch runs on."""

from hf_flash_two.attention import flash_attention
from hf_flash_two.hf import register
from hf_flash_two.masks import AttentionMask

__all__ = ["AttentionMask", "flash_attention"]
__version__ = "0.1.0"

register()
