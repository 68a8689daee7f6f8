"""`FlashAttentionTwo`: multi-head attention as a module, projections included."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from hf_flash_two.masks import AttentionMask
from hf_flash_two.parallel.plan import LAYOUTS, ParallelPlan, make_plan

_PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class FlashAttentionTwo(nn.Module):
    """Multi-head attention over ``x``, or from ``x`` to ``context``, in linear memory.

    Args:
        dim: size of the features of input and output.
        heads: number of heads.
        dim_head: size of each head.
        causal: a token sees only itself and those before it; with a context of another length the
            last token stands at the context's end. A mask restricts this further.
        q_bucket_size, k_bucket_size: upper limits on the tiles of queries and keys. Larger tiles
            are faster and take more memory, which is bounded by a few tiles; the limits change
            speed and memory only.
        parallel: compute on several GPUs, see `parallel_plan`. In a distributed run (DDP, FSDP,
            DeepSpeed) the ranks already are the parallelism, and each computes its own batch.
        mixed_precision: False or "no" never casts. True computes float32 inputs in bfloat16, on
            CUDA GPUs without it in float16; "bf16" and "fp16" say which. Parameters stay as they
            are, sums are float32, the output has the dtype of ``x``; float64 is left alone. An
            autocast region around the call wins: its dtype is used and returned.
        mesh: a one-dimensional `DeviceMesh`, with ``parallel``: every rank passes its shard of the
            sequence (and of context and padding mask) and receives its rows of the result.
        layout: of those shards: "contiguous", or "head_tail" (rank r of W holds parts r and
            2 W - 1 - r of 2 W), which balances causal work.
        devices: with ``parallel``, the devices of this process to split over; default all.

    The parameters are ``to_q`` [heads * dim_head, dim], ``to_kv`` [2 * heads * dim_head, dim], keys
    first, and ``to_out`` [dim, heads * dim_head], without biases.
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
        devices: Sequence[torch.device | str] | None = None,
    ):
        super().__init__()
        for name, size in (("dim", dim), ("heads", heads), ("dim_head", dim_head)):
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        if not isinstance(mixed_precision, bool) and mixed_precision not in _PRECISIONS:
            raise ValueError(
                f"mixed_precision: expected a bool, 'bf16', 'fp16' or 'no', got {mixed_precision!r}"
            )
        if layout not in LAYOUTS:
            raise ValueError(f"layout: expected one of {LAYOUTS}, got {layout!r}")
        if not parallel and (mesh is not None or devices is not None):
            raise ValueError("mesh, devices: have a meaning only with parallel=True")
        self.heads, self.causal = heads, causal
        self.q_bucket_size, self.k_bucket_size = q_bucket_size, k_bucket_size
        self.parallel, self.mixed_precision = parallel, mixed_precision
        self.mesh, self.layout, self.devices = mesh, layout, devices
        inner = heads * dim_head
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)
        self._plan: ParallelPlan | None = None

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | AttentionMask | None = None,
        q_bucket_size: int | None = None,
        k_bucket_size: int | None = None,
    ) -> Tensor:
        """Attend from every token of ``x`` to the tokens of ``context`` that ``mask`` allows.

        Args:
            x: [B, Tq, dim].
            context: [B, Tk, dim]; ``x`` itself if None.
            mask: [B or 1, Tk], bool or 0/1 of any dtype, the tokens of the context to see; or bool
                [B or 1, H or 1, Tq or 1, Tk], True may attend; or an `AttentionMask`.
            q_bucket_size, k_bucket_size: override the module's for this call.

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
                q_bucket_size=q_bucket_size or self.q_bucket_size,
                k_bucket_size=k_bucket_size or self.k_bucket_size,
            )
            out = self.to_out(rearrange(out, "b h t d -> b t (h d)"))
        return out.to(x.dtype) if dtype else out

    def parallel_plan(self) -> ParallelPlan | None:
        """Where the last call computed its attention, and why; None before the first."""
        return self._plan

    def extra_repr(self) -> str:
        plan = f", plan={self._plan.kind} ({self._plan.reason})" if self._plan else ""
        return (
            f"heads={self.heads}, causal={self.causal}, parallel={self.parallel}, "
            f"mixed_precision={self.mixed_precision}{plan}"
        )

    def _check_input(self, name: str, tensor: Tensor, x: Tensor) -> None:
        dim = self.to_q.in_features
        if tensor.dim() != 3 or tensor.shape[0] != x.shape[0] or tensor.shape[2] != dim:
            raise ValueError(
                f"{name}: expected shape [{x.shape[0]}, length, {dim}] (batch, tokens, dim), got "
                f"{list(tensor.shape)}"
            )

    def _mask(self, mask, plan: ParallelPlan, batch: int, keys: int) -> AttentionMask:
        causal = AttentionMask.causal() if self.causal else AttentionMask.full()
        if mask is None:
            return causal
        if isinstance(mask, AttentionMask):
            return causal & mask
        if mask.dim() == 2 and mask.shape[0] in (1, batch) and mask.shape[1] == keys:
            return causal & AttentionMask.from_padding(plan.whole_sequence(mask))
        if mask.dim() == 4 and mask.dtype == torch.bool:
            return causal & AttentionMask.from_dense(mask)
        raise ValueError(
            f"mask: expected [{batch}, {keys}] (batch, tokens of context), bool or 0/1, or bool "
            f"[batch, heads, queries, keys], or an AttentionMask, got {mask.dtype} "
            f"{list(mask.shape)}"
        )

    def _lower_dtype(self, x: Tensor) -> torch.dtype | None:
        """What to compute ``x`` in; None if it is to be left to the caller."""
        device = x.device.type
        off = self.mixed_precision in (False, "no")
        if off or torch.is_autocast_enabled(device) or x.dtype == torch.float64:
            return None
        dtype = _PRECISIONS["bf16" if self.mixed_precision is True else self.mixed_precision]
        if self.mixed_precision is True and device == "cuda":
            if torch.version.hip is None and torch.cuda.get_device_capability(x.device) < (8, 0):
                dtype = torch.float16
        dtype = dtype if x.dtype == torch.float32 else x.dtype
        if dtype == torch.float16 and torch.is_grad_enabled() and self.training:
            warnings.warn(
                "FlashAttentionTwo trains in float16: small gradients vanish without a "
                "torch.amp.GradScaler, which belongs into the training loop",
                stacklevel=3,
            )
        return dtype

    def _plan_for(self, query: Tensor, key: Tensor) -> ParallelPlan:
        if not self.parallel:
            plan = ParallelPlan("local", "parallel=False")
        else:
            plan = make_plan(query, key, mesh=self.mesh, layout=self.layout, devices=self.devices)
        if plan != self._plan and not torch.compiler.is_compiling():
            self._plan = plan
            if not plan.expected:
                warnings.warn(
                    f"FlashAttentionTwo(parallel=True) computes locally: {plan.reason}",
                    stacklevel=3,
                )
        return plan
