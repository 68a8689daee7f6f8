#!/usr/bin/env python
"""Time the Hopper kernels beside the portable ones and the other attentions for these GPUs.

    python scripts/benchmark_hopper.py | tee run.txt
    python scripts/benchmark_hopper.py --rows "D128 causal" packed --fa3 DIR
    python scripts/benchmarks_page.py --enter run.txt --into h100-hopper

Everything runs in turn within a row, so a ratio holds when the clock drifts; times are medians.
FlashAttention-3 and -4 and cuDNN are timed where they can be imported and know the mask; of padded
and packed rows FlashAttention-3 and -4 get the documents alone, without the padding. Each result is
compared with ours before it is timed. "ordered" backward passes give the same bits every time, as
ours do but for "flash_two-free"; FLOP/s count 4 * B * H * D per visible pair forward, 2.5 times
that backward.

``--fa3 DIR`` loads FlashAttention-3 from DIR/_C.so, as its wheels and xformers' contain it, with
DIR/libcudart.so.12 if that is there. The last line of the output is the table as JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import benchmark
import torch
import torch.nn.functional as F
from benchmark import failure
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_flash_two import AttentionMask, flash_attention
from hf_flash_two.testing import kernel_calls

TOKENS = 16384
PADDED = (4096, 3000, 2000, 1000)
TEN = (100, 400, 900, 2000, 37, 4096, 3000, 1500, 2351, 2000)
MODES = ("forward", "backward")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Row:
    """One shape of [batch, heads, length, head_dim] in bfloat16.

    Attributes:
        documents: lengths that other implementations are given one after another, or none.
    """

    workload: str
    length: int
    head_dim: int
    batch: int
    heads: int
    key_heads: int
    documents: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return f"D{self.head_dim} {self.workload} {self.length}"

    def mask(self) -> AttentionMask:
        if self.workload == "full":
            return AttentionMask.full()
        if self.workload == "window":
            return AttentionMask.causal(window=1024)
        if self.workload == "left-padded":
            start = self.length - torch.tensor(self.documents, device=DEVICE)
            keep = torch.arange(self.length, device=DEVICE) >= start[:, None]
            return AttentionMask.causal() & AttentionMask.from_padding(keep)
        if self.documents:
            return AttentionMask.from_documents(self.boundaries(), causal=True)
        return AttentionMask.causal()

    def boundaries(self) -> Tensor:
        """int32 [documents + 1], where each begins."""
        lengths = torch.tensor((0, *self.documents), device=DEVICE)
        return lengths.cumsum(0).int()

    def flops(self, mode: str) -> float:
        pairs = self.batch * self.length**2
        if self.documents:
            pairs = sum(n * (n + 1) // 2 for n in self.documents)
        elif self.workload == "window":
            pairs = self.batch * sum(min(i + 1, 1024) for i in range(self.length))
        elif self.workload == "causal":
            pairs = self.batch * self.length * (self.length + 1) // 2
        return pairs * 4 * self.heads * self.head_dim * (2.5 if mode == "backward" else 1)

    def tensors(self) -> list[Tensor]:
        """Query, key, value and the gradient of the output, a token's heads side by side."""
        heads = (self.heads, self.key_heads, self.key_heads, self.heads)
        kind = {"dtype": torch.bfloat16, "device": DEVICE}
        shapes = ((self.batch, self.length, count, self.head_dim) for count in heads)
        return [torch.randn(shape, **kind).transpose(1, 2) for shape in shapes]


def plain_rows() -> Iterator[Row]:
    for head_dim, workload, length in product((64, 128), ("full", "causal"), (TOKENS, 2048)):
        heads = 2048 // head_dim
        yield Row(workload, length, head_dim, TOKENS // length, heads, heads)
    yield Row("causal", TOKENS, 256, 1, 8, 8)
    yield Row("causal", 2048, 256, 8, 8, 8)


ROWS = (
    *plain_rows(),
    Row("causal", 8192, 128, 2, 32, 8),
    Row("window", 4096, 128, 4, 32, 8),
    Row("left-padded", 4096, 128, 4, 32, 8, PADDED),
    Row("documents", TOKENS, 128, 1, 32, 8, TEN),
    Row("packed", TOKENS, 128, 1, 32, 8, (512,) * 32),
)

Forward = Callable[[], Tensor]
Backward = Callable[[], "tuple[Tensor, ...]"]


class Ours:
    """`flash_attention` by one kernel, or by those that "auto" takes."""

    def __init__(self, row: Row, tensors: list[Tensor], **settings: Any) -> None:
        self._leaves = [x.detach().requires_grad_() for x in tensors[:3]]
        self._d_out, self._given = tensors[3], {"mask": row.mask(), **settings}
        self._out = self._attend()

    def _attend(self) -> Tensor:
        return flash_attention(*self._leaves, **self._given)

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self._attend()

    def backward(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self._out, self._leaves, self._d_out, retain_graph=True)


class Sdpa(Ours):
    """PyTorch's function by one of its backends."""

    def __init__(self, row: Row, tensors: list[Tensor], backend: str) -> None:
        self._backend = getattr(SDPBackend, backend)
        grouped = row.heads != row.key_heads
        self._settings = {"is_causal": row.workload == "causal", "enable_gqa": grouped}
        super().__init__(row, tensors)

    def _attend(self) -> Tensor:
        with sdpa_kernel(self._backend):
            return F.scaled_dot_product_attention(*self._leaves, **self._settings)


class FlashAttention(Ours):
    """FlashAttention-3 or -4: [batch, length, heads, head_dim], or documents without padding."""

    def __init__(self, row: Row, tensors: list[Tensor], ordered: bool) -> None:
        self._row, self._ordered = row, ordered
        self._padding = None
        if row.workload == "left-padded":
            lengths = torch.tensor(row.documents, device=DEVICE)
            self._padding = torch.arange(row.length, device=DEVICE) >= row.length - lengths[:, None]
        super().__init__(row, [self._packed(x) for x in tensors])

    def _packed(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        if self._padding is not None:
            return x[self._padding]
        return x[0] if self._row.documents else x

    def _unpacked(self, x: Tensor) -> Tensor:
        if self._padding is not None:
            padded = x.new_zeros(*self._padding.shape, *x.shape[1:])
            padded[self._padding] = x
            return padded.transpose(1, 2)
        return (x[None] if self._row.documents else x).transpose(1, 2)

    def shown(self, results: tuple[Tensor, ...]) -> list[Tensor]:
        """In the layout of the others."""
        return [self._unpacked(x) for x in results]

    def _varlen(self) -> dict:
        if not self._row.documents:
            return {}
        lengths, most = self._row.boundaries(), max(self._row.documents)
        return {
            "cu_seqlens_q": lengths, "cu_seqlens_k": lengths,
            "max_seqlen_q": most, "max_seqlen_k": most,
        }  # fmt: skip


class FlashAttention4(FlashAttention):
    def _attend(self) -> Tensor:
        from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

        settings: dict = {"causal": self._row.workload != "full", "deterministic": self._ordered}
        if self._row.workload == "window":
            settings["window_size"] = (1023, 0)
        varlen = self._varlen()
        function = flash_attn_varlen_func if varlen else flash_attn_func
        out = function(*self._leaves, **settings, **varlen)
        return out[0] if isinstance(out, tuple) else out


class FlashAttention3(FlashAttention):
    def __init__(self, row: Row, tensors: list[Tensor], ordered: bool) -> None:
        self._ops = torch.ops.flash_attn_3
        window = 1023 if row.workload == "window" else -1
        self._settings = {
            "softmax_scale": row.head_dim**-0.5, "is_causal": row.workload != "full",
            "window_size_left": window, "window_size_right": 0 if window > 0 else -1,
            "softcap": 0.0,
        }  # fmt: skip
        super().__init__(row, tensors, ordered)

    def _attend(self) -> Tensor:
        query, key, value = (x.detach() for x in self._leaves)
        out, self._lse, *_ = self._ops.fwd(
            query, key, value, num_splits=1, **self._settings, **self._varlen()
        )
        return out

    def backward(self) -> tuple[Tensor, ...]:
        inputs = [x.detach() for x in self._leaves]
        grads = [torch.empty_like(x) for x in inputs]
        self._ops.bwd(
            self._d_out, *inputs, self._out, self._lse, *grads, deterministic=self._ordered,
            **self._settings, **self._varlen(),
        )  # fmt: skip
        return tuple(grads)


def load_fa3(folder: Path) -> None:
    runtime = folder / "libcudart.so.12"
    if runtime.exists():
        ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
    torch.ops.load_library(folder / "_C.so")


def implementations(row: Row, with_fa3: bool) -> dict[str, Callable[[list[Tensor]], Ours]]:
    """Name -> what makes it of query, key, value and the gradient of the output; ours first."""
    found: dict[str, Callable[[list[Tensor]], Ours]] = {
        "flash_two": lambda tensors: Ours(row, tensors),
        "flash_two-hopper": lambda tensors: Ours(row, tensors, kernel="hopper"),
        "flash_two-triton": lambda tensors: Ours(row, tensors, kernel="triton"),
        "flash_two-free": lambda tensors: Ours(row, tensors, deterministic=False),
    }
    if row.workload in ("full", "causal"):
        for name, backend in (("cudnn", "CUDNN_ATTENTION"), ("flash", "FLASH_ATTENTION")):
            found[f"sdpa-{name}"] = lambda tensors, backend=backend: Sdpa(row, tensors, backend)
    peers = [("fa3", FlashAttention3)] if with_fa3 else []
    # A package of this name may be FlashAttention-2 alone.
    peers += [("fa4", FlashAttention4)] if _has("flash_attn.cute") else []
    for (name, peer), ordered in product(peers, (False, True)):
        found[f"{name}-ordered" if ordered else name] = lambda tensors, make=peer, by=ordered: make(
            row, tensors, by
        )
    return found


def _has(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def measure(row: Row, repeats: int, with_fa3: bool, modes: Sequence[str] = MODES) -> list[dict]:
    """A result for each implementation and pass: ms, FLOP/s and peak memory, or why none."""
    tensors, made, results, wanted = row.tensors(), {}, [], None
    for name, make in implementations(row, with_fa3).items():
        try:
            with kernel_calls(backward=True) as calls:
                it = made[name] = make(tensors)
                shown = [it.forward(), *it.backward()]
            torch.cuda.synchronize()
        except (RuntimeError, TypeError, ValueError, AssertionError, NotImplementedError) as error:
            made.pop(name, None)
            results += [_result(row, mode, name) | {"failed": failure(error)} for mode in modes]
            if name == "flash_two":
                raise
            continue
        if isinstance(it, FlashAttention):
            shown = it.shown(tuple(shown))
        wanted = shown if wanted is None else wanted
        _compare(row, name, shown, wanted)
        by = {call.direction: call.kernel for call in calls}
        for mode in modes:
            result = _result(row, mode, name)
            if mode in by:
                result["kernel"] = by[mode]
            if mode == "backward" or not name.endswith(("-ordered", "-free")):
                results.append(result | {"peak_mib": benchmark._cuda_peak(getattr(it, mode))})
    for mode in modes:
        timed = [r for r in results if r["mode"] == mode and "failed" not in r]
        times: dict[str, list[float]] = {r["attention"]: [] for r in timed}
        for _ in range(repeats):
            # In another order each time: what runs before sets the clock.
            for name, taken in random.sample([*times.items()], len(times)):
                taken.append(benchmark._seconds(getattr(made[name], mode), "cuda"))
        ours = statistics.median(times["flash_two"])
        for result in timed:
            seconds = statistics.median(times[result["attention"]])
            result |= {"ms": seconds * 1e3, "gflops": row.flops(mode) / seconds / 1e9}
            result["ratio"] = seconds / ours
    return results


def _result(row: Row, mode: str, name: str) -> dict:
    shape = {name: value for name, value in vars(row).items() if name != "documents"}
    return shape | {"dtype": "bf16", "device": "cuda", "mode": mode, "attention": name}


def _compare(row: Row, name: str, results: list[Tensor], wanted: list[Tensor]) -> None:
    """Output and gradients, but for the rows of padding."""
    seen = slice(None)
    if row.workload == "left-padded":
        start = row.length - torch.tensor(row.documents, device=DEVICE)
        seen = torch.arange(row.length, device=DEVICE) >= start[:, None]
    for what, got, want in zip(("out", "dq", "dk", "dv"), results, wanted, strict=True):
        got, want = (x.transpose(1, 2)[seen].float() for x in (got, want))
        error = (got - want).norm() / want.norm()
        if not error < 2e-2:
            raise RuntimeError(f"{name} disagrees on {row.name}: {what}, error {error:.1e}")


def show(results: list[dict]) -> None:
    line = "{:22} {:8} {:17} {:>8} {:>8} {:>9} {:>6}"
    print("\n" + line.format("row", "pass", "attention", "ms", "TFLOP/s", "peak MiB", "ratio"))
    for result in results:
        shape = f"D{result['head_dim']} {result['workload']} {result['length']}"
        names = (shape, result["mode"], result["attention"])
        if "failed" in result:
            print(line.format(*names, result["failed"][:40], "", "", ""))
            continue
        figures = (f"{result['ms']:.3f}", f"{result['gflops'] / 1e3:.0f}")
        print(
            line.format(*names, *figures, f"{result['peak_mib']:.0f}", f"{result['ratio']:.2f}"),
            result.get("kernel", ""),
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", help=f"parts of names: {[row.name for row in ROWS]}")
    parser.add_argument("--fa3", type=Path, metavar="DIR", help="where FlashAttention-3 lies")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--passes", nargs="+", choices=MODES, default=MODES)
    args = parser.parse_args()
    rows = [row for row in ROWS if not args.rows or any(part in row.name for part in args.rows)]
    if not rows:
        parser.error(f"--rows: expected parts of {[row.name for row in ROWS]}, got {args.rows}")
    if not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU")
    if args.fa3 is not None:
        load_fa3(args.fa3)
    print(
        f"{torch.cuda.get_device_name()} | {torch.get_num_threads()} threads | "
        f"torch {torch.__version__} | {date.today()} | median of {args.repeats}",
        flush=True,
    )
    torch.manual_seed(0)
    results = []
    for row in rows:
        found = measure(row, args.repeats, args.fa3 is not None, args.passes)
        show(found)
        results += found
        torch.cuda.empty_cache()
    print(json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
