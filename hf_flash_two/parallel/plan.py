"""What ``parallel=True`` means for one call: where its attention is computed, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from hf_flash_two.attention import flash_attention
from hf_flash_two.masks import AttentionMask
from hf_flash_two.parallel.devices import attend_over_devices

if TYPE_CHECKING or dist.is_available():
    from hf_flash_two.parallel.layout import Layout
    from hf_flash_two.parallel.sequence import Spread, attend_over_mesh
if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

LAYOUTS = ("contiguous", "head_tail")
_WORTH_SPLITTING = 2**34
"""Multiplications in Q K^T. For them and those with V a large GPU takes about 0.2 ms, which is what
sending tensors to another GPU and starting kernels there costs."""


@dataclass(frozen=True)
class ParallelPlan:
    """Where attention is computed, and why there.

    Attributes:
        kind: "local", "devices" (split over the devices of this process) or "sequence" (each rank
            of ``mesh`` holds a shard of the sequence).
        reason: why, in one clause.
        expected: False if the caller asked for parallel computation and there is none.
    """

    kind: str
    reason: str
    devices: tuple[torch.device, ...] = ()
    mesh: DeviceMesh | None = None
    layout: str = "contiguous"
    expected: bool = True

    def whole_sequence(self, keep: Tensor) -> Tensor:
        """bool [B, T] over the whole sequence, from this rank's shard of it if it is sharded."""
        return keep if self.mesh is None else self._spread(self.mesh).whole_mask(keep)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, **settings
    ) -> Tensor:
        """`flash_attention`, computed where this plan says."""
        if self.mesh is not None:
            return attend_over_mesh(query, key, value, mask, self._spread(self.mesh), **settings)
        if self.kind == "devices":
            return attend_over_devices(query, key, value, mask, self.devices, **settings)
        out = flash_attention(query, key, value, mask=mask, **settings)
        assert isinstance(out, Tensor)
        return out

    def _spread(self, mesh: DeviceMesh) -> Spread:
        return Spread(mesh, Layout.named(self.layout, mesh.size()))


def make_plan(
    query: Tensor,
    key: Tensor,
    *,
    mesh: DeviceMesh | None = None,
    layout: str = "contiguous",
    devices: Sequence[torch.device] | None = None,
) -> ParallelPlan:
    """The first plan that applies: a mesh, given devices, a distributed run, all devices, local.

    Args:
        query, key: the tensors of the call; only shapes and device are read.
        mesh: a `DeviceMesh` of one dimension; every rank passes its shard of the sequence.
        devices: those to split over; all accelerators that this process sees if None.
    """
    if mesh is not None:
        return ParallelPlan("sequence", f"over {mesh.size()} ranks", mesh=mesh, layout=layout)
    if devices is not None:
        return _split(devices)
    if dist.is_available() and dist.is_initialized():
        return ParallelPlan("local", "the ranks of the distributed run are the parallelism")
    devices = _visible_devices(query.device)
    if len(devices) == 1:
        return ParallelPlan("local", f"there is no device but {query.device}", expected=False)
    if query.numel() * key.shape[2] < _WORTH_SPLITTING:
        return ParallelPlan("local", "too little work to send to other devices")
    return _split(devices)


def _split(devices: Sequence[torch.device]) -> ParallelPlan:
    return ParallelPlan("devices", f"over {len(devices)} devices", devices=tuple(devices))


def _visible_devices(device: torch.device) -> list[torch.device]:
    if device.type == "cpu" or not torch.accelerator.is_available():
        return [device]
    return [torch.device(device.type, i) for i in range(torch.accelerator.device_count())]
