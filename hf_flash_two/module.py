"""`FlashAttentionTwo`: multi-head attention as a module, projections included."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Never

import torch
from einops import rearrange
from torch import Tensor, nn

from hf_flash_two.attention import MAX_HEAD_DIM, refuse_unknown
from hf_flash_two.masks import AttentionMask, check_zeros_and_ones
from hf_flash_two.parallel.plan import LAYOUTS, ParallelPlan, make_plan

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
_ELSEWHERE = {
    "embed_dim": "dim",
    "hidden_size": "dim",
    "num_heads": "heads",
    "head_dim": "dim_head",
    "is_causal": "causal",
    "bias": "not possible: the projections have none",
    "dropout": "not possible: drop what the module returns",
}
"""Names of arguments in other modules, and what to pass here instead."""


class FlashAttentionTwo(nn.Module):
    """Multi-head attention over ``x``, or from ``x`` to ``context``, in linear memory.

    Args:
        dim: features of a token, in the input and in the output.
        heads: number of heads.
        dim_head: size of each head.
        causal: a token sees only itself and those before it; with a context of another length the
            last token stands at the context's end. A mask restricts this further.
        q_bucket_size, k_bucket_size: upper limits on the tiles of queries and keys. Larger tiles
            are faster and take more memory, within limits that docs/module.md gives; the result is
            the same up to rounding.
        parallel: compute on several devices: over ``mesh`` if given, else over ``devices``; else
            locally in a distributed run (DDP, FSDP, DeepSpeed), whose ranks already are the
            parallelism; else over all accelerators that this process sees. `parallel_plan` tells
            which it was.
        mixed_precision: False or "no" casts nothing. True computes float32 inputs in bfloat16, on
            CUDA GPUs without it in float16; "bf16" and "fp16" say which. Parameters keep their
            dtype, sums are float32, the output has the dtype of ``x``; float64 is left alone. An
            autocast region around the call takes precedence: its dtype is used and returned.
        mesh: a `DeviceMesh` of one dimension. Every rank passes its shard of the sequence, all
            shards of one length, and receives its rows of the result. Gradients of the parameters
            are those of the rank's own tokens; sum them over the mesh.
        layout: how the mesh shards the sequence: "contiguous", or "head_tail" (rank r of W holds
            parts r and 2 W - 1 - r of 2 W), which gives each rank the same work under ``causal``.
        devices: those of this process to split heads, or else batch rows, over.

    The parameters are ``to_q`` [heads * dim_head, dim], ``to_kv`` [2 * heads * dim_head, dim] (keys
    first) and ``to_out`` [dim, heads * dim_head], without biases.

    Raises:
        ValueError: an argument does not fit; the message names it, what was expected and what came.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int = 8,
        dim_head: int = 64,
        causal: bool = False,
        q_bucket_size: int = 512,
        k_bucket_size: int = 1024,
        parallel: bool = False,
        mixed_precision: bool | str = False,
        mesh: DeviceMesh | None = None,
        layout: str = "contiguous",
        devices: Sequence[torch.device | str | int] | None = None,
        **unknown: Never,
    ):
        super().__init__()
        if unknown:
            refuse_unknown("FlashAttentionTwo", unknown, _ELSEWHERE)
        sizes = {"dim": dim, "heads": heads, "dim_head": dim_head}
        sizes |= {"q_bucket_size": q_bucket_size, "k_bucket_size": k_bucket_size}
        for name, size in sizes.items():
            if not isinstance(size, Integral) or size < 1:
                raise ValueError(f"{name}: expected an integer of at least 1, got {size!r}")
        if dim_head > MAX_HEAD_DIM:
            raise ValueError(f"dim_head: expected at most {MAX_HEAD_DIM}, got {dim_head}")
        for name, flag in (("causal", causal), ("parallel", parallel)):
            if not isinstance(flag, bool):
                raise ValueError(f"{name}: expected True or False, got {flag!r}")
        if mixed_precision not in (False, True, "no", *_PRECISIONS):
            raise ValueError(
                f"mixed_precision: expected a bool, 'bf16', 'fp16' or 'no', got {mixed_precision!r}"
            )
        if not parallel and (mesh is not None or devices is not None):
            raise ValueError("mesh, devices: expected None without parallel=True")
        if mesh is not None and devices is not None:
            raise ValueError("mesh, devices: expected at most one of them, got both")
        if mesh is not None and getattr(mesh, "ndim", None) != 1:
            raise ValueError(
                f"mesh: expected a DeviceMesh of one dimension, got {mesh!r}; mesh['name'] takes "
                "one dimension of several, DeviceMesh.from_group makes one of a process group"
            )
        if isinstance(devices, str | int | torch.device):
            raise ValueError(
                f"devices: expected several, such as ['cuda:0', 'cuda:1'], got {devices!r}"
            )
        if devices is not None and not devices:
            raise ValueError("devices: expected at least one, got none")
        if layout not in LAYOUTS:
            raise ValueError(f"layout: expected one of {LAYOUTS}, got {layout!r}")
        if layout != LAYOUTS[0] and mesh is None:
            raise ValueError(f"layout: expected {LAYOUTS[0]!r} without a mesh, got {layout!r}")
        self.heads, self.causal = heads, causal
        self.q_bucket_size, self.k_bucket_size = q_bucket_size, k_bucket_size
        self.parallel, self.mixed_precision = parallel, mixed_precision
        self.mesh, self.layout = mesh, layout
        self.devices = None if devices is None else tuple(_as_device(d) for d in devices)
        inner = heads * dim_head
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)
        self._plan: ParallelPlan | None = None
        self._warned: set[str] = set()

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | AttentionMask | None = None,
        q_bucket_size: int | None = None,
        k_bucket_size: int | None = None,
    ) -> Tensor:
        """Attend from each token of ``x`` to the tokens of ``context`` that ``mask`` allows.

        Args:
            x: [B, Tq, dim].
            context: [B, Tk, dim]; ``x`` itself if None.
            mask: [B or 1, Tk], bool or 0/1 of any dtype, the tokens of the context to see; or bool
                [B or 1, H or 1, Tq or 1, Tk or 1], True may attend; or an `AttentionMask`. Over a
                mesh the first is a shard like ``context``, the others are of the whole sequence.
            q_bucket_size, k_bucket_size: replace the module's in this call.

        Returns:
            [B, Tq, dim]; a token that may see nothing gets zeros.
        """
        context = x if context is None else context
        self._check_input("x", x, x)
        self._check_input("context", context, x)
        dtype = self._lower_dtype(x)
        lowered = torch.autocast(x.device.type, dtype=dtype) if dtype else contextlib.nullcontext()
        with lowered:
            query = self.to_q(x)
            key, value = self.to_kv(context).chunk(2, dim=-1)
            query, key, value = (
                rearrange(t, "b t (h d) -> b h t d", h=self.heads) for t in (query, key, value)
            )
            plan = self._plan_for(query, key)
            out = plan.attend(
                query,
                key,
                value,
                self._mask(mask, plan, x.shape[0], key.shape[2]),
                q_bucket_size=self.q_bucket_size if q_bucket_size is None else q_bucket_size,
                k_bucket_size=self.k_bucket_size if k_bucket_size is None else k_bucket_size,
            )
            out = self.to_out(rearrange(out, "b h t d -> b t (h d)"))
        return out.to(x.dtype) if dtype else out

    def parallel_plan(self) -> ParallelPlan | None:
        """Where the last call computed its attention, and why; None before the first call.

        Calls under `torch.compile` are not recorded.
        """
        return self._plan

    def extra_repr(self) -> str:
        plan = f", plan={self._plan.kind} ({self._plan.reason})" if self._plan else ""
        return (
            f"heads={self.heads}, causal={self.causal}, parallel={self.parallel}, "
            f"mixed_precision={self.mixed_precision}{plan}"
        )

    def _check_input(self, name: str, tensor: Tensor, x: Tensor) -> None:
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        dim = self.to_q.in_features
        batch = "batch" if tensor is x else x.shape[0]
        if tensor.dim() != 3 or tensor.shape[0] != x.shape[0] or tensor.shape[2] != dim:
            raise ValueError(
                f"{name}: expected shape [{batch}, length, {dim}] (batch, tokens, dim), got "
                f"{list(tensor.shape)}"
            )

    def _mask(self, mask, plan: ParallelPlan, batch: int, keys: int) -> AttentionMask:
        causal = AttentionMask.causal() if self.causal else AttentionMask.full()
        if mask is None:
            return causal
        if isinstance(mask, AttentionMask):
            return causal & mask
        if not isinstance(mask, Tensor):
            raise ValueError(
                f"mask: expected a tensor, an AttentionMask or None, got {type(mask).__name__}"
            )
        if mask.dim() == 2 and mask.shape[0] in (1, batch) and mask.shape[1] == keys:
            check_zeros_and_ones("mask", mask)
            return causal & AttentionMask.from_padding(plan.whole_sequence(mask != 0))
        if mask.dim() == 4 and mask.dtype == torch.bool:
            return causal & AttentionMask.from_dense(mask)
        raise ValueError(
            f"mask: expected [{batch}, {keys}] (batch, tokens of context), bool or 0/1, or bool "
            "[batch, heads, queries, keys] (mask[None, None] for one [queries, keys]), or an "
            f"AttentionMask, got {mask.dtype} {list(mask.shape)}"
        )

    def _lower_dtype(self, x: Tensor) -> torch.dtype | None:
        """The dtype to compute ``x`` in; None if that is left to the caller."""
        device = x.device.type
        if self.mixed_precision in (False, "no") or x.dtype == torch.float64 or x.is_meta:
            return None
        if torch.is_autocast_enabled(device):
            return None
        if x.dtype != torch.float32:
            dtype = x.dtype
        elif self.mixed_precision in _PRECISIONS:
            dtype = _PRECISIONS[self.mixed_precision]
        else:
            dtype = torch.bfloat16 if _has_bfloat16(x.device) else torch.float16
        if dtype == torch.float16 and self.training and torch.is_grad_enabled():
            self._warn_once(
                "FlashAttentionTwo trains in float16: small gradients vanish unless the training "
                "loop scales the loss, see torch.amp.GradScaler"
            )
        return dtype

    def _plan_for(self, query: Tensor, key: Tensor) -> ParallelPlan:
        if not self.parallel:
            plan = ParallelPlan("local", "parallel=False")
        else:
            plan = make_plan(query, key, mesh=self.mesh, layout=self.layout, devices=self.devices)
        if not torch.compiler.is_compiling():
            self._plan = plan
        if not plan.expected:
            self._warn_once(f"FlashAttentionTwo(parallel=True) computes locally: {plan.reason}")
        return plan

    def _warn_once(self, message: str) -> None:
        # The compiler cannot trace a warning.
        if not torch.compiler.is_compiling() and message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=6)


def _as_device(given: torch.device | str | int) -> torch.device:
    try:
        return torch.device(given)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"devices: expected devices such as 'cuda:0', got {given!r}") from error


def _has_bfloat16(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(device) >= (8, 0)
