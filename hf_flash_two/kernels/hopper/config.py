"""What the Hopper kernels compute, and with which tiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_flash_two.kernels.hidden import band_hides
from hf_flash_two.kernels.hopper.schedule import Setup
from hf_flash_two.kernels.params import AttentionParams
from hf_flash_two.kernels.triton.tile import BAND, INTERVALS, NO_MASK


def forward_declines(
    query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
) -> str | None:
    """Why the forward does not compute this call, or None."""
    return "there is no forward yet"


def backward_declines(
    query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
) -> str | None:
    """Why the backward does not compute this call, or None."""
    head_dim, value_dim = query.shape[3], value.shape[3]
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"it computes bfloat16 and float16, not {query.dtype}"
    if max(head_dim, value_dim) > 256:
        return f"its backward has head dims up to 256, not {max(head_dim, value_dim)}"
    if head_dim % 8 or value_dim % 8:
        return f"TMA copies rows of whole 16 bytes, not of {head_dim} and {value_dim} numbers"
    if params.dense is not None:
        return "it reads no dense masks"
    if params.bias is not None:
        return "it has no bias"
    if params.block_q is not None or params.block_k is not None:
        return "its tiles cannot be limited"
    if not (query.numel() and key.numel()):
        return "there is nothing to compute"
    return None


@dataclass(frozen=True, slots=True)
class BackwardTiles:
    """How the backward is launched.

    Attributes:
        block_d, block_v: the padded head dims.
        together, turned: see `gradients.Sizes`.
    """

    setup: Setup
    block_d: int
    block_v: int
    together: int
    turned: int


def backward_tiles(
    query: Tensor, key: Tensor, value: Tensor, params: AttentionParams, ordered: bool
) -> BackwardTiles:
    """Tiles of the backward, and the order in which its programs start."""
    query_length, key_length = query.shape[2], key.shape[2]
    left, right = params.window_left is not None, params.window_right is not None
    intervals = params.query_start is not None
    widest = max(query.shape[3], value.shape[3])
    width = 64 if widest <= 64 else 128 if widest <= 128 else 256
    narrow, wide = width == 64, width == 256
    block_q, block_k = 128 if narrow else 64, 64 if wide else 128
    value_width = 128 if wide and value.shape[3] <= 128 else width
    masked = intervals or band_hides(query_length, key_length, params)
    down = intervals or right
    grouped = query.shape[1] > key.shape[1]
    together = turned = 0
    if grouped or ordered and not down:
        together = 8
    if down and not intervals:
        turned = 2**30 if grouped else 2 if key_length >= 64 * block_k else 0
    setup = Setup(
        MASK=(INTERVALS if intervals else BAND if left or right else NO_MASK).value,
        LEFT=left,
        RIGHT=right,
        SOFTCAP=params.softcap > 0,
        PLAIN=params.plain and params.scale > 0,
        RESCUE=masked,
        ALIBI=params.alibi_slopes is not None,
        DROPOUT=params.dropout_p > 0,
        MASKED=masked or key_length % block_k > 0,
        TAIL=left or intervals or turned > 0,
        ORDERED=ordered,
        DOWN=down,
        DV_FIRST=not masked and not narrow,
        LATE_LSE=narrow,
        LATE_DELTA=narrow or not masked,
        BLOCK_Q=block_q,
        BLOCK_K=block_k,
    )
    return BackwardTiles(setup, width, value_width, max(together, 1), turned)
