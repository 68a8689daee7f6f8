"""Measure time and peak memory of FlashAttentionTwo against its bucket sizes.

    python scripts/bucket_sizes.py --tokens 8192

Each pair of sizes runs in a fresh process; on a CPU the memory is what the process grew by.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from datetime import date

import torch
from tqdm import tqdm

from hf_flash_two import FlashAttentionTwo

SIZES = ((32, 64), (64, 128), (128, 256), (256, 512), (512, 1024), (1024, 2048), (4096, 8192))


def measure(tokens: int, buckets: tuple[int, int], repeats: int) -> dict[str, float]:
    """Milliseconds of a forward and backward, and MiB beyond a call with small buckets."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = FlashAttentionTwo(dim=512, causal=True).to(device)
    x = torch.randn(1, tokens, 512, device=device, requires_grad=True)

    def step(q_bucket_size: int, k_bucket_size: int) -> float:
        start = time.perf_counter()
        out = model(x, q_bucket_size=q_bucket_size, k_bucket_size=k_bucket_size)
        out.backward(x.detach())
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    step(16, 64)
    before = _peak(device)
    times = [step(*buckets) for _ in range(repeats + 1)][1:]
    return {"ms": statistics.median(times) * 1e3, "mib": (_peak(device) - before) / 2**20}


def _peak(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.tokens, tuple(args.one), args.repeats)))
        return
    print(f"{platform.machine()} | torch {torch.__version__} | {date.today()}")
    print(f"{args.tokens} tokens, 8 heads of 64, causal, forward and backward")
    rows = []
    for q_size, k_size in tqdm(SIZES, unit="size", file=sys.stderr):
        command = [sys.executable, __file__, "--tokens", str(args.tokens)]
        command += ["--repeats", str(args.repeats), "--one", str(q_size), str(k_size)]
        rows.append((q_size, k_size, json.loads(subprocess.check_output(command, text=True))))
    print(f"{'q_bucket_size':>14}{'k_bucket_size':>14}{'ms':>10}{'extra MiB':>11}")
    for q_size, k_size, found in rows:
        print(f"{q_size:14}{k_size:14}{found['ms']:10.0f}{found['mib']:11.0f}")


if __name__ == "__main__":
    main()
