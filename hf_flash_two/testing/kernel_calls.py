"""`kernel_calls` records which kernels of flash_two ran, for which shapes and with which mask."""

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
        kernel: its name, "blockwise", "fused_cpu", "hopper" or "triton".
        direction: "forward" or "backward".
        query, key, value: their shapes, [B, Hq, Tq, D], [B, Hk, Tk, D] and [B, Hk, Tk, Dv].
        dtype, device: those of all three.
        mask: the parts that the kernel reads, of "band", "intervals" and "dense", joined by "+";
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
    """A list that grows by a `KernelCall` with each run of a forward kernel, until the block ends::

        with kernel_calls() as calls:
            model(**batch)
        print({(call.kernel, call.mask) for call in calls})

    It records all runs in this process: in eager mode, inside compiled graphs, and under gradient
    checkpointing, which runs forward kernels again. It does not see a CUDA graph that is replayed,
    whose kernels it recorded when the graph was captured. A call without queries runs no kernel.

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
