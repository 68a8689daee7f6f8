"""Visibility intervals tile by tile, as kernels copy them beside their keys."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from hf_flash_two.kernels.hopper.gluon import gl
from hf_flash_two.kernels.params import AttentionParams
from hf_flash_two.kernels.triton.args import Tma
from hf_flash_two.tensor_cache import derive


def key_runs(params: AttentionParams, block_k: int) -> Tensor | None:
    """int32 [(B or 1) * key tiles, 2 block_k]; None without intervals.

    ``query_start`` of each tile of keys, and behind it how many queries see each, as 32 bits
    without a sign. Worked out once for each mask, which all layers share.
    """
    start, stop = params.query_start, params.query_stop
    if start is None or stop is None:
        return None

    def build() -> Tensor:
        missing = -start.shape[1] % block_k
        # What FAR is from -FAR takes the sign's bit.
        length = (stop.long() - start).clamp_min(0).to(torch.int32)
        sides = (
            torch.nn.functional.pad(side, (0, missing)).view(-1, 1, block_k)
            for side in (start, length)
        )
        return torch.cat(tuple(sides), 1).view(-1, 2 * block_k)

    return derive(("key runs", block_k), build, start, stop)


def runs_tma(params: AttentionParams, key_length: int, block_k: int) -> Tma:
    """How TMA copies a row of `key_runs`; nothing without intervals."""
    if params.query_start is None:
        return Tma()
    count, width = triton.cdiv(key_length, block_k) * params.query_start.shape[0], 2 * block_k
    return Tma((count, width), (width, 1), (1, width), gl.NVMMASharedLayout(0, 32, 2))
