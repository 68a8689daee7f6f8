#!/usr/bin/env python
"""Time calls so small that the host decides how long they take, beside sdpa.

    python scripts/small_calls.py                 # on this machine's GPU, or else its CPU
    python scripts/small_calls.py --length 512    # on a GPU, with TMA descriptors

All implementations run in turn; figures are medians in microseconds of calls in a row, which the
GPU need not wait for. ``floor`` is what autograd needs for a product of two tensors. The last line
is the table as JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_flash_two import AttentionMask, flash_attention

MASK = AttentionMask.causal()
ATTEND = {
    "flash_two": lambda q, k, v: flash_attention(q, k, v, mask=MASK),
    "sdpa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "floor": lambda q, k, v: q * k,
}
MODES = ("no gradient", "forward", "both")


def runner(attend: Callable, tensors: list[Tensor], mode: str) -> Callable[[], object]:
    if mode == "no gradient":
        return torch.no_grad()(lambda: attend(*tensors))
    if mode == "forward":
        return lambda: attend(*tensors)
    upstream = torch.ones_like(tensors[0])
    wanted = tensors[:2] if attend is ATTEND["floor"] else tensors
    return lambda: torch.autograd.grad(attend(*tensors), wanted, upstream)


def measure(device: str, length: int, dtype: torch.dtype, in_a_row: int, repeats: int) -> list:
    shape = (1, 8, length, 64)
    tensors = [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for _ in range(3)]
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times: dict[tuple[str, str], list[float]] = {}
    for repeat in range(repeats + 1):
        for name, attend in ATTEND.items():
            for mode in MODES:
                run = runner(attend, tensors, mode)
                wait()
                begin = time.perf_counter()
                for _ in range(in_a_row):
                    run()
                spent = time.perf_counter() - begin
                wait()
                if repeat:
                    times.setdefault((name, mode), []).append(1e6 * spent / in_a_row)
    found = {at: round(statistics.median(spent), 1) for at, spent in times.items()}
    about = {"length": length, "dtype": str(dtype).removeprefix("torch.")}
    return [
        {"call": mode, **about, "us": {name: found[name, mode] for name in ATTEND}}
        for mode in MODES
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if gpu else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--length", type=int, help="128 on a GPU, 16 on a CPU")
    parser.add_argument("--dtype", default=None, choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, help="of PyTorch, on a CPU")
    parser.add_argument("--in-a-row", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=21)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    on_gpu = args.device == "cuda"
    length = args.length or (128 if on_gpu else 16)
    dtype = args.dtype or ("bfloat16" if on_gpu else "float32")
    found = measure(args.device, length, getattr(torch, dtype), args.in_a_row, args.repeats)
    machine = torch.cuda.get_device_name() if on_gpu else platform.processor()
    print(
        f"{machine or platform.machine()} | {torch.get_num_threads()} threads | "
        f"torch {torch.__version__} | {date.today()} | median of {args.repeats}"
    )
    print(f"{'us':12}", *(f"{name:>10}" for name in ATTEND))
    for row in found:
        print(f"{row['call']:12}", *(f"{us:10.1f}" for us in row["us"].values()))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
