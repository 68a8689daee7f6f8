"""`kernel_calls`: which kernels of flash_two ran, on tensors of which shapes, under which mask."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from hf_flash_two import op
from hf_flash_two.kernels.params import AttentionParams


@dataclass(frozen=True)
class KernelCall:
    """One run of a kernel.

    Attributes:
        kernel: its name, "blockwise", "fused_cpu" or "triton".
        direction: "forward" or "backward".
        query: [B, Hq, Tq, D]; key: [B, Hk, Tk, D]; value: [B, Hk, Tk, Dv]: the shapes.
        dtype, device: of all three.
        mask: what the kernel reads of it, any of "band", "intervals" and "dense", joined by "+";
            "full" if every query sees every key.
    """

    kernel: str
    direction: str
    query: torch.Size
    key: torch.Size
    value: torch.Size
    dtype: torch.dtype
    device: torch.device
    mask: str


@contextmanager
def kernel_calls(*, backward: bool = False) -> Iterator[list[KernelCall]]:
    """A list that grows by a `KernelCall` with each run of a forward kernel, until the block ends.

        with kernel_calls() as calls:
            model(**batch)
        print({(call.kernel, call.mask) for call in calls})

    All runs in this process count: in eager mode, inside compiled graphs, under autograd and its
    checkpoints, which run forward kernels again. Two do not: a CUDA graph that is replayed runs
    kernels that were recorded when it was captured, and a call without queries runs none.

    Args:
        backward: also record the runs of backward kernels.
    """
    calls: list[KernelCall] = []

    def record(direction: str, kernel: str, query, key, value, params: AttentionParams) -> None:
        if backward or direction == "forward":
            shapes = query.shape, key.shape, value.shape
            where = query.dtype, query.device
            calls.append(KernelCall(kernel, direction, *shapes, *where, _mask_of(params)))

    op.observers.append(record)
    try:
        yield calls
    finally:
        op.observers.remove(record)


def _mask_of(params: AttentionParams) -> str:
    parts = {
        "band": params.window_left is not None or params.window_right is not None,
        "intervals": params.query_start is not None,
        "dense": params.dense is not None,
    }
    return "+".join(name for name, used in parts.items() if used) or "full"
