"""Accelerate's context parallelism (``cp_size``) for models under flash_two.

Accelerate has PyTorch shard the batch, and PyTorch's own attention exchange keys. The sharding
stays as it is. What is added is a row of positions that is sharded like the rest: what this rank
gets of it is the layout.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from hf_flash_two.parallel.context import spread_over
from hf_flash_two.parallel.layout import Layout
from hf_flash_two.parallel.sequence import Spread

if TYPE_CHECKING:
    from accelerate import Accelerator

_PREPARE, _CONTEXT = "_prepare_cp", "_cp_context"
_OURS = "flash_two"


def register(is_ours: Callable[[nn.Module], bool]) -> None:
    """Hook ``Accelerator.prepare``; again does nothing.

    Where the private method is missing or takes other arguments, nothing is hooked: `current` of
    `parallel.context` then refuses models under flash_two.

    Args:
        is_ours: whether a module that is prepared attends with flash_two.
    """
    try:
        from accelerate import Accelerator
    except ImportError:  # Transformers needs it for training only
        return
    prepare = getattr(Accelerator, _PREPARE, None)
    if prepare is None or hasattr(prepare, _OURS):
        return
    if tuple(inspect.signature(prepare).parameters) == ("self", "args"):
        setattr(Accelerator, _PREPARE, _preparing(prepare, is_ours))


def _preparing(prepare: Callable, is_ours: Callable[[nn.Module], bool]) -> Callable:
    @functools.wraps(prepare)
    def _prepare_cp(self: Accelerator, *args):
        # It drops the masks of the modules that it gets, and refuses windows.
        ours = [isinstance(x, nn.Module) and is_ours(x) for x in args]
        others = iter(prepare(self, *(x for x, own in zip(args, ours, strict=True) if not own)))
        context, meshes = getattr(self, _CONTEXT, None), self.torch_device_mesh
        if context is not None and meshes is not None:
            setattr(self, _CONTEXT, functools.partial(_spreading, context, meshes["cp"]))
        return tuple(x if own else next(others) for x, own in zip(args, ours, strict=True))

    setattr(_prepare_cp, _OURS, True)
    return _prepare_cp


@contextmanager
def _spreading(
    context: Callable[..., AbstractContextManager],
    mesh: DeviceMesh,
    *,
    buffers: list[Tensor],
    buffer_seq_dims: list[int],
    no_restore_buffers: set[Tensor] | None = None,
) -> Iterator[None]:
    """PyTorch's context, and models under flash_two know of it."""
    length = buffers[0].shape[buffer_seq_dims[0]]
    positions = torch.arange(length, device=buffers[0].device)
    with context(
        buffers=[*buffers, positions],
        buffer_seq_dims=[*buffer_seq_dims, 0],
        no_restore_buffers={*(no_restore_buffers or ()), positions},
    ):
        layout = _layout_of(positions, length, mesh)
        if layout is None:
            yield
        else:
            with spread_over(Spread(mesh, layout)):
                yield


def _layout_of(positions: Tensor, length: int, mesh: DeviceMesh) -> Layout | None:
    """The layout by which this rank has these positions of a sequence; None if we have none."""
    for name in ("head_tail", "contiguous"):
        layout = Layout.named(name, mesh.size())
        if length % layout.chunks == 0:
            expected = layout.positions(mesh.get_local_rank(), length, positions.device)
            if torch.equal(positions, expected):
                return layout
    return None
