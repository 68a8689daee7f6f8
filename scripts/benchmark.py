"""Time attention against the other implementations of this machine, or measure its peak memory.

    python scripts/benchmark.py                       # the default table of this device
    python scripts/benchmark.py --workloads packed --lengths 8192 --dtypes bf16
    python scripts/benchmark.py --memory              # peak memory of a forward and backward
    python scripts/benchmark.py --model               # training steps and generation of models
    python scripts/benchmark.py --device cpu --busy 2 # beside two processes that never rest

Every implementation runs in turn within a row, so a ratio holds when the machine's speed drifts;
times are medians. Score terms (a bias, ALiBi, a softcap, dropout, sinks, a dense mask) are added to
causal attention and compared with eager, the dense formula as Transformers writes it. With --graphs
every call is replayed from a CUDA graph: the kernels alone are timed, where small ones take less
time than the host takes to launch them. A row is timed only if all agree on its result. FLOP/s
count 4 * B * H * D per visible pair in the forward pass, 2.5 times that in the backward pass.
Running out of memory is a row, not a gap. The last line of the output is the table as JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from importlib.util import find_spec

import benchmark_model
import torch
import torch.nn.functional as F
from benchmark_model import DTYPES, OUT_OF_MEMORY, compared, failure
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from hf_flash_two import AttentionMask, flash_attention

WORKLOADS = ("full", "causal", "padded", "window", "packed", "decode")
TERMS = ("bias", "d_bias", "alibi", "softcap", "dropout", "sinks", "dense")
"""Workloads of CPUs; the bias of "d_bias" has a gradient."""
SOFTCAP, DROPOUT = 50.0, 0.1
DOCUMENT = 512
_IN_A_ROW = 5
# Multiples of the products of the forward: the gradients take two and a half times as many.
PRODUCTS = {"forward": 1, "backward": 2.5, "both": 3.5}


@dataclass(frozen=True)
class Case:
    """One row: a workload, its shape and what is timed."""

    workload: str
    dtype: str
    length: int
    head_dim: int
    mode: str
    device: str
    batch: int
    heads: int
    key_heads: int
    graphs: bool = False

    @property
    def queries(self) -> int:
        return 1 if self.workload == "decode" else self.length

    def tensors(self) -> list[Tensor]:
        """Query, key and value, and a bias if there is one."""
        shapes = [
            (self.batch, self.heads, self.queries, self.head_dim),
            (self.batch, self.key_heads, self.length, self.head_dim),
            (self.batch, self.key_heads, self.length, self.head_dim),
        ]
        if self.workload in ("bias", "d_bias"):
            shapes.append((1, self.heads, self.length, self.length))
        kind = {"dtype": DTYPES[self.dtype], "device": self.device}
        tensors = [torch.randn(shape, **kind) for shape in shapes]
        if self.device == "cpu":
            # As the projections of a layer lay them out: the heads of a token side by side.
            tensors[:3] = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors[:3]]
        for tensor in tensors[: 4 if self.workload == "d_bias" else 3]:
            tensor.requires_grad_(self.mode != "forward")
        return tensors

    def terms(self) -> dict:
        """What `flash_attention` is given beside the mask and a bias."""
        if self.workload == "alibi":
            slopes = 2 ** (-8 * torch.arange(1, self.heads + 1) / self.heads)
            return {"alibi_slopes": slopes.to(self.device)}
        if self.workload == "sinks":
            return {"sinks": torch.randn(self.heads, device=self.device)}
        if self.workload == "dropout":
            return {"dropout_p": DROPOUT, "dropout_seed": 0}
        return {"softcap": SOFTCAP} if self.workload == "softcap" else {}

    def mask(self) -> AttentionMask:
        if self.workload == "padded":
            padding = torch.arange(self.batch, device=self.device) % 2 * (self.length // 2)
            keep = torch.arange(self.length, device=self.device) >= padding[:, None]
            return AttentionMask.causal() & AttentionMask.from_padding(keep)
        if self.workload == "packed":
            documents = torch.arange(self.length, device=self.device) // DOCUMENT
            return AttentionMask.from_documents(segment_ids=documents, causal=True)
        if self.workload == "window":
            return AttentionMask.causal(1024 if self.device == "cuda" else 512)
        if self.workload == "dense":
            # Some pairs are hidden, no query is blind.
            index = torch.arange(self.length, device=self.device)
            distance = index[:, None] - index
            return AttentionMask.from_dense((distance >= 0) & (distance * index % 7 != 3))
        causal = self.workload == "causal" or self.workload in TERMS
        return AttentionMask.causal() if causal else AttentionMask.full()

    def flops(self) -> float:
        if self.workload in ("full", "decode"):
            pairs = float(self.batch * self.queries * self.length)
        elif self.workload == "causal" or self.workload in TERMS and self.workload != "dense":
            pairs = self.batch * self.length * (self.length + 1) / 2
        else:
            dense = self.mask().to_dense(self.length, self.length, self.device)
            pairs = dense.sum().item() * self.batch / dense.shape[0]
        return pairs * 4 * self.heads * self.head_dim * PRODUCTS[self.mode]


def implementations(
    case: Case, wanted: list[str] | None
) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Name -> attention; ours first, then those ``wanted`` of all this machine has for the case."""
    mask, length, terms = case.mask(), case.length, case.terms()
    found = {
        "flash_two": lambda q, k, v, bias=None: flash_attention(
            q, k, v, mask=mask, bias=bias, **terms
        )
    }
    gqa = case.heads != case.key_heads
    if case.workload in TERMS:
        found["eager"] = eager = Eager(case, mask, terms)
        if not (terms.keys() - {"alibi_slopes"} or case.workload == "d_bias"):
            found["sdpa"] = lambda q, k, v, bias=None: F.scaled_dot_product_attention(
                q, k, v, attn_mask=eager.added(bias)
            )
        return {n: f for n, f in found.items() if wanted is None or n in ("flash_two", *wanted)}
    if case.workload in ("full", "causal", "decode"):
        settings = {"is_causal": case.workload == "causal", "enable_gqa": gqa}
    else:
        # What Transformers hands to sdpa: a boolean tensor of one head.
        dense = mask.to_dense(length, length, case.device)
        dense = dense.expand(case.batch, -1, -1, -1).contiguous()
        settings = {"attn_mask": dense, "enable_gqa": gqa}
    found["sdpa"] = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **settings)
    if case.device == "cuda":
        for backend in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"):
            found[f"sdpa-{backend.split('_')[0].lower()}"] = _forced(backend, settings)
        if find_spec("flash_attn") and case.workload in ("full", "causal", "decode"):
            found["flash-attn"] = _flash_attn(case.workload == "causal")
        if wanted is None or "flex_attention" in wanted:
            found["flex_attention"] = _flex(case, mask)
    return {n: f for n, f in found.items() if wanted is None or n in ("flash_two", *wanted)}


class Eager:
    """The dense formula in the dtype of the inputs, as Transformers' models write it."""

    def __init__(self, case: Case, mask: AttentionMask, terms: dict) -> None:
        self._terms, self._scale = terms, case.head_dim**-0.5
        dtype = DTYPES[case.dtype]
        hidden = ~mask.to_dense(case.length, case.length, case.device)
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min)
        self._added = mask
        if "alibi_slopes" in terms:
            index = torch.arange(case.length, device=case.device)
            distance = (index[:, None] - index).abs()
            self._added = mask + (-terms["alibi_slopes"][:, None, None] * distance).to(dtype)

    def added(self, bias: Tensor | None) -> Tensor:
        return self._added if bias is None else self._added + bias

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        scores = torch.matmul(query, key.transpose(2, 3)) * self._scale
        if cap := self._terms.get("softcap"):
            scores = torch.tanh(scores / cap) * cap
        scores = scores + self.added(bias)
        if (sinks := self._terms.get("sinks")) is not None:
            column = sinks.to(scores.dtype).reshape(1, -1, 1, 1)
            scores = torch.cat([scores, column.expand(*scores.shape[:3], 1)], dim=-1)
            scores = scores - scores.max(dim=-1, keepdim=True).values
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        if sinks is not None:
            weights = weights[..., :-1]
        if dropout := self._terms.get("dropout_p"):
            weights = F.dropout(weights, dropout)
        # Layers take the heads of a token side by side.
        return torch.matmul(weights, value).transpose(1, 2).contiguous().transpose(1, 2)


def _forced(backend: str, settings: dict):
    def attend(q, k, v):
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return F.scaled_dot_product_attention(q, k, v, **settings)

    return attend


def _flash_attn(causal: bool):
    from flash_attn import flash_attn_func

    def attend(*tensors):
        out = flash_attn_func(*(x.transpose(1, 2) for x in tensors), causal=causal)
        return out.transpose(1, 2)

    return attend


def _flex(case: Case, mask: AttentionMask):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()
    compiled = torch.compile(flex_attention)
    block_mask = None
    if case.workload not in ("full", "decode"):
        visible = mask.to_dense(case.length, case.length, case.device)

        def visible_pair(b, h, q, k):
            return visible[b % visible.shape[0], 0, q, k]

        block_mask = create_block_mask(
            visible_pair, case.batch, None, case.length, case.length, device=case.device
        )
    gqa = case.heads != case.key_heads
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask, enable_gqa=gqa)


def measure(case: Case, repeats: int, wanted: list[str] | None = None) -> list[dict]:
    """One result per implementation: ms, FLOP/s, peak memory on a GPU, or why there is no time."""
    tensors, results, runs, reference = case.tensors(), [], {}, None
    found, timed = implementations(case, wanted), {}
    # A backward pass runs on the stream of its forward, and no graph takes the default one.
    stream = torch.cuda.Stream() if case.graphs else None
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream())
    for name, attend in found.items():
        row = vars(case) | {"attention": name}
        results.append(row)
        try:
            with torch.cuda.stream(stream):
                run = _runner(case, attend, tensors)
                out = run()
            timed[name] = run if stream is None else _captured(run, stream)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            row["failed"] = failure(error)
            if name == "flash_two" and row["failed"] != OUT_OF_MEMORY:
                raise
            continue
        seen = _comparable(case, out.detach())
        reference = seen if reference is None else reference
        error = (seen - reference).norm() / reference.norm()
        # No two draw the same dropout.
        if case.workload != "dropout" and not error < (1e-5 if case.dtype == "fp32" else 2e-2):
            raise RuntimeError(f"{name} disagrees on {case}: relative error {error:.1e}")
        runs[name] = run
        if case.device == "cuda":
            row["peak_mib"] = _cuda_peak(run)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name in runs:
            times[name].append(_seconds(timed[name], case.device))
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    for row in results:
        if seconds := medians.get(row["attention"]):
            row |= {"ms": seconds * 1e3, "gflops": case.flops() / seconds / 1e9}
            if "flash_two" in medians:
                row["ratio"] = seconds / medians["flash_two"]
    return results


def _runner(case: Case, attend, tensors: list[Tensor]):
    if case.mode == "forward":
        return lambda: attend(*tensors)
    d_out = torch.randn(
        case.batch, case.heads, case.queries, case.head_dim,
        dtype=DTYPES[case.dtype], device=case.device,
    )  # fmt: skip

    leaves = [tensor for tensor in tensors if tensor.requires_grad]

    def both():
        out = attend(*tensors)
        torch.autograd.grad(out, leaves, d_out)
        return out

    if case.mode == "both":
        return both
    made = attend(*tensors)

    def backward():
        torch.autograd.grad(made, leaves, d_out, retain_graph=True)
        return made

    return backward


def _captured(run, stream: torch.cuda.Stream) -> Callable[[], None]:
    """``run``, which has run on ``stream``, as a CUDA graph, which the host launches as one.

    A graph does not keep what it reads: ``run`` has to stay.
    """
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph.replay


def _comparable(case: Case, out: Tensor) -> Tensor:
    """Rows that see no key are left out: others answer 0, an average or NaN there."""
    if case.workload != "padded":
        return out.float()
    seen = case.mask().to_dense(case.length, case.length).any(-1)
    return out.float()[seen.expand(out.shape[:3])]


def _seconds(run, device: str) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # A few runs in a row, behind one that is not timed: the GPU need not wait for the host.
        run()
        start.record()
        for _ in range(_IN_A_ROW):
            run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / _IN_A_ROW
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Beside ``count`` processes, each of which keeps a core at full load."""
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def _cuda_peak(run) -> float:
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def memory(device: str) -> None:
    """Peak memory of one forward and backward at 32k tokens, each in a fresh process."""
    print(f"\n{'dtype':6}{'D':>5}{'tensors MiB':>13}{'peak MiB':>10}{'beyond MiB':>12}")
    for dtype, head_dim in (("fp32", 64), ("fp32", 128), ("bf16", 64), ("bf16", 128)):
        case = ["--memory-of", dtype, str(head_dim)]
        command = [sys.executable, __file__, "--device", device, *case]
        measured = json.loads(subprocess.check_output(command, text=True))
        beyond = measured["peak"] - measured["tensors"]
        print(
            f"{dtype:6}{head_dim:5}{measured['tensors']:13.0f}{measured['peak']:10.0f}{beyond:12.0f}"
        )


def measure_memory(dtype: str, head_dim: int, device: str) -> None:
    """Print the bytes of inputs, output and gradients, and what the process grew by at its peak."""
    small = Case("causal", dtype, 64, head_dim, "both", device, 1, 4, 4)
    _runner(small, implementations(small, [])["flash_two"], small.tensors())()
    case = Case("causal", dtype, 32768, head_dim, "both", device, 1, 4, 4)
    gc.collect()
    start = torch.cuda.memory_allocated() if device == "cuda" else _resident()
    tensors = case.tensors()
    out = flash_attention(*tensors, mask=case.mask())
    grads = torch.autograd.grad(out, tensors, torch.ones_like(out))
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else _peak_resident()
    # The gradient of the output is one more tensor of its size.
    tensors = sum(t.nbytes for t in (*tensors, out, out, *grads))
    print(json.dumps({"tensors": tensors / 2**20, "peak": (peak - start) / 2**20}))


def _resident() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def _peak_resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def show(results: list[dict]) -> None:
    columns = "workload", "mode", "dtype", "length", "head_dim", "attention"
    names, times = "{:8} {:8} {:5} {:>6} {:>4}  {:15} ", "{:>9} {:>9} {:>9} {:>13}"
    head = names.format("workload", "mode", "dtype", "T", "D", "attention")
    print("\n" + head + times.format("ms", "GFLOP/s", "peak MiB", "flash_two is"))
    for row in results:
        line = names.format(*(row[x] for x in columns))
        if "failed" in row:
            print(f"{line}{row['failed'][:60]}")
            continue
        peak = f"{row['peak_mib']:.0f}" if "peak_mib" in row else ""
        is_baseline = row["attention"] != "flash_two" and "ratio" in row
        ratio = compared(row["ratio"]) if is_baseline else ""
        print(line + times.format(f"{row['ms']:.2f}", f"{row['gflops']:.0f}", peak, ratio))


def plot(results: list[dict], path: str) -> None:
    """Bars of the ratio to each baseline, one per row; needs matplotlib."""
    import matplotlib.pyplot as plt

    rows = [r for r in results if "ratio" in r and r["attention"] != "flash_two"]
    labels = [
        " ".join(str(r[x]) for x in ("workload", "mode", "dtype", "length", "head_dim") if x in r)
        + f" vs {r['attention']}"
        for r in rows
    ]
    figure, axes = plt.subplots(figsize=(8, 0.25 * len(rows) + 1))
    axes.barh(labels, [r["ratio"] for r in rows])
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xlabel("time of the baseline / time of flash_two")
    axes.invert_yaxis()
    figure.savefig(path, bbox_inches="tight", dpi=150)


def cases(args: argparse.Namespace) -> list[Case]:
    gpu = args.device == "cuda"
    found = []
    for workload in args.workloads:
        shapes = list(gpu_shapes(args, workload) if gpu else cpu_shapes(args, workload))
        modes = args.modes or ["forward", "backward" if gpu else "both"]
        found += [
            Case(workload, dtype, length, head_dim, mode, args.device, *sizes, args.graphs)
            for dtype in args.dtypes or default_dtypes(args.device, workload)
            for length, head_dim, *sizes in shapes
            for mode in (["forward"] if workload == "decode" else modes)
        ]
    return found


def default_dtypes(device: str, workload: str) -> list[str]:
    if device == "cuda":
        return ["bf16"]
    return ["fp32", "bf16", "fp16"] if workload in ("full", "causal") else ["fp32", "bf16"]


def cpu_shapes(args: argparse.Namespace, workload: str) -> Iterator[tuple[int, ...]]:
    """(length, head_dim, batch, heads, key_heads)."""
    lengths = args.lengths or [1024, 4096, 8192]
    for head_dim in args.head_dims or [64, 128]:
        if workload == "decode":
            for batch in (1, 8):
                for length in lengths:
                    yield length, head_dim, batch, 32, 8
        elif workload not in TERMS:
            for length in lengths:
                yield length, head_dim, 2 if workload == "padded" else 1, 8, 8
        elif head_dim == 64 or args.head_dims:
            # Eager holds several tensors of rows times keys.
            for length in args.lengths or [256, 1024, 2048]:
                yield length, head_dim, 1, 8, 8


def gpu_shapes(args: argparse.Namespace, workload: str) -> Iterator[tuple[int, ...]]:
    """Sequences of 16384 tokens in all; what is masked and what decodes as models of 8B do it."""
    if workload == "decode":
        for batch, length in ((1, 32768), (16, 8192), (64, 4096)):
            yield length, 128, batch, 32, 8
    elif workload in ("full", "causal"):
        for head_dim in args.head_dims or [64, 128, 256]:
            for length in args.lengths or [2048, 16384]:
                yield length, head_dim, max(1, 16384 // length), 2048 // head_dim, 2048 // head_dim
    else:
        for length in args.lengths or [4096]:
            yield length, 128, 4, 32, 8


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default=device, choices=["cpu", "cuda"])
    parser.add_argument(
        "--workloads",
        nargs="+",
        help=f"of {WORKLOADS}, on CPUs {TERMS}, or with --model {benchmark_model.WORKLOADS}",
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    parser.add_argument("--lengths", nargs="+", type=int)
    parser.add_argument("--head-dims", nargs="+", type=int)
    parser.add_argument(
        "--modes", nargs="+", help=f"of {tuple(PRODUCTS)}, or with --model train generate"
    )
    parser.add_argument("--baselines", nargs="+", help="all that there are if left out")
    parser.add_argument(
        "--graphs", action="store_true", help="replay CUDA graphs: the kernels without the host"
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument(
        "--busy", type=int, default=0, metavar="N", help="run beside N processes that never rest"
    )
    parser.add_argument("--plot", help="write a bar chart to this file (needs matplotlib)")
    parser.add_argument("--memory", action="store_true", help="measure peak memory instead")
    parser.add_argument("--model", action="store_true", help="time whole models instead")
    parser.add_argument("--layers", type=int, help="of the models")
    parser.add_argument("--width", type=int, help="of the models")
    parser.add_argument("--batch", type=int, default=2, help="of the models")
    parser.add_argument("--new-tokens", type=int, default=32, help="that the models write")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    known = WORKLOADS + TERMS if args.device == "cpu" else WORKLOADS
    known = benchmark_model.WORKLOADS if args.model else known
    args.workloads = args.workloads or known
    if unknown := set(args.workloads) - set(known):
        parser.error(f"--workloads: expected some of {known}, got {sorted(unknown)}")
    if args.graphs and (args.model or args.device != "cuda"):
        parser.error("--graphs: times attention alone on a GPU; drop --model, or use --device cuda")
    if args.plot and find_spec("matplotlib") is None:
        parser.error("--plot: needs the package matplotlib: pip install matplotlib")
    torch.set_num_threads(args.threads)
    if args.memory_of:
        measure_memory(args.memory_of[0], int(args.memory_of[1]), args.device)
        return
    machine = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor()
    print(
        f"{machine or platform.machine()} | {args.threads} threads | torch {torch.__version__} | "
        f"{date.today()} | median of {args.repeats}"
    )
    if args.busy:
        print(f"beside {args.busy} processes at full load")
    if args.memory:
        memory(args.device)
        return
    torch.manual_seed(0)
    timing = benchmark_model if args.model else sys.modules[__name__]
    results = []
    with busy(args.busy):
        for case in tqdm(timing.cases(args), unit="case", file=sys.stderr):
            results += timing.measure(case, args.repeats, args.baselines)
    if args.busy:
        results = [row | {"busy": args.busy} for row in results]
    timing.show(results)
    print(json.dumps(results), flush=True)
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
