#!/usr/bin/env python
"""Time what batch-invariant attention costs against the default.

    python scripts/benchmark_invariant.py --json invariant.json
    python scripts/benchmark_invariant.py --only decode --dtype fp32

The batch-invariant call must give each row the bits that it has alone. Masks are made outside of
what is timed, as all layers of a model share theirs; "a new mask" has its own, as a model of one
layer. Times are medians. The last line of the output is the table as JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from benchmark_model import DTYPES
from torch import Tensor

from hf_flash_two import AttentionMask, flash_attention


@dataclass(frozen=True)
class Case:
    """Attention of ``queries`` to ``keys`` in each of ``batch`` rows.

    Attributes:
        kind: of mask: "causal", "left-padded" or "packed".
        backward: is timed too.
        new_mask: the mask is made in each call.
    """

    name: str
    batch: int
    queries: int
    keys: int
    kind: str = "causal"
    backward: bool = False
    new_mask: bool = False

    def mask(self, device: str) -> AttentionMask:
        causal = AttentionMask.causal()
        if self.kind == "left-padded":
            missing = torch.arange(self.batch, device=device)[:, None] * (self.keys // 11)
            return causal & AttentionMask.from_padding(
                torch.arange(self.keys, device=device) >= missing
            )
        if self.kind == "packed":
            ends = torch.arange(0, self.keys, max(1, self.keys // 9), device=device)
            ends = torch.cat([ends, torch.full_like(ends[:1], self.keys)])
            return AttentionMask.from_documents(ends, key_length=self.keys, causal=True)
        return causal


def cases(scale: int) -> list[Case]:
    """All that is timed, lengths divided by ``scale``."""
    short, long, cached = 2048 // scale, 16384 // scale, 4096 // scale
    found = []
    for length in (short, long):
        found.append(Case(f"prefill {length}", 1, length, length))
        found.append(Case(f"train {length}", 1, length, length, backward=True))
    for batch in (1, 8):
        found.append(Case(f"decode {cached} b{batch}", batch, 1, cached))
    padded, new = "left-padded", "left-padded, a new mask"
    found += [
        Case(f"decode {cached} b8 {padded}", 8, 1, cached, padded),
        Case(f"decode {cached} b8 {new}", 8, 1, cached, padded, new_mask=True),
        Case(f"prefill {short} b8 {padded}", 8, short, short, padded),
        Case(f"train {short} b8 {padded}", 8, short, short, padded, backward=True),
        Case(f"prefill {long} packed", 1, long, long, "packed"),
        Case(f"train {long} packed", 1, long, long, "packed", backward=True),
    ]
    return found


def inputs(case: Case, args: argparse.Namespace) -> list[Tensor]:
    """Query, key, value, and the gradient of the output."""
    torch.manual_seed(0)
    sizes = [(args.heads, case.queries), *[(args.key_heads, case.keys)] * 2]
    sizes.append((args.heads, case.queries))
    given = [torch.randn(case.batch, h, n, args.head_dim, device=args.device) for h, n in sizes]
    return [x.to(DTYPES[args.dtype]) for x in given]


def call(case: Case, tensors: list[Tensor], args: argparse.Namespace) -> Callable[[bool], Tensor]:
    *given, d_out = tensors
    kept = case.mask(args.device)

    def run(batch_invariant: bool) -> Tensor:
        mask = case.mask(args.device) if case.new_mask else kept
        parts = [x.detach().requires_grad_() for x in given] if case.backward else given
        out: Tensor = flash_attention(*parts, mask=mask, batch_invariant=batch_invariant)  # pyright: ignore
        if case.backward:
            torch.autograd.grad(out, parts, d_out)
        return out

    return run


def milliseconds(run: Callable[[], object], args: argparse.Namespace) -> float:
    run()
    times = []
    for _ in range(args.repeats):
        if args.device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            start = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def is_invariant(case: Case, tensors: list[Tensor], args: argparse.Namespace) -> bool:
    """Whether the last row has the bits that its last document has alone."""
    out = call(case, tensors, args)(True)[-1:]
    start, stop = case.mask(args.device).to_intervals(case.keys, args.device)
    start, stop = start[-1], stop[-1]
    first = int((start < stop).nonzero()[0])
    if case.kind == "packed":
        first = int((stop < stop[-1]).sum())
    offset = case.keys - case.queries
    rows = max(first - offset, 0)
    query, key, value = (x[-1:] for x in tensors[:3])
    alone = flash_attention(
        query[:, :, rows:], key[:, :, first:], value[:, :, first:],
        mask=AttentionMask.causal(), batch_invariant=True,
    )  # fmt: skip
    return torch.equal(out[:, :, rows:], alone)  # pyright: ignore[reportArgumentType]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--heads", type=int, default=32 if on_gpu else 8)
    parser.add_argument("--key-heads", type=int, default=8 if on_gpu else 2)
    parser.add_argument("--head-dim", type=int, default=128 if on_gpu else 64)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if on_gpu else "fp32")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--scale", type=int, default=1, help="divides all lengths")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="a file for the table")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse_arguments()
    name = platform.processor() or platform.machine()
    if args.device == "cuda":
        name = torch.cuda.get_device_name()
    print(
        f"{name}, torch {torch.__version__}, {date.today()}, {args.dtype}, heads {args.heads} over "
        f"{args.key_heads}, head dim {args.head_dim}"
    )
    print(f"\n{'case':44}{'default ms':>12}{'invariant ms':>14}{'ratio':>8}")
    results = []
    for case in cases(args.scale):
        if args.only not in case.name:
            continue
        tensors = inputs(case, args)
        run = call(case, tensors, args)
        usual, invariant = (
            milliseconds(lambda: run(mode), args)  # noqa: B023
            for mode in (False, True)
        )
        if not is_invariant(case, tensors, args):
            raise SystemExit(f"{case.name}: the bits are not those of the row alone")
        row = {"case": case.name, "default_ms": usual, "invariant_ms": invariant}
        print(f"{case.name:44}{usual:12.3f}{invariant:14.3f}{invariant / usual:8.2f}", flush=True)
        results.append(row | {"ratio": invariant / usual})
    if args.json is not None:
        args.json.write_text(json.dumps({"device": name, "rows": results}, indent=1) + "\n")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
