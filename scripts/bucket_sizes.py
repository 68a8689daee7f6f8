"""Measure time and peak memory of FlashAttentionTwo against its bucket sizes.

    python scripts/bucket_sizes.py --tokens 8192

Prints a Markdown table. Each pair of sizes runs in a fresh process, so that memory is its own: on a
CPU what the process grew by, on a GPU what PyTorch allocated.
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

from tqdm import tqdm

SIZES = (32, 64), (64, 128), (128, 256), (256, 512), (512, 1024), (1024, 2048), (4096, 8192)


def measure(tokens: int, q_bucket_size: int, k_bucket_size: int, repeats: int) -> dict:
    """Milliseconds and peak MiB of a forward and backward, and where they were measured."""
    # Not at the top: a process starts with the peak memory of the one that started it.
    import torch

    from hf_flash_two import FlashAttentionTwo

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = FlashAttentionTwo(
        dim=512, causal=True, q_bucket_size=q_bucket_size, k_bucket_size=k_bucket_size
    ).to(device)
    x = torch.randn(1, tokens, 512, device=device, requires_grad=True)

    def step(x: torch.Tensor) -> float:
        x.grad = None
        model.zero_grad()
        start = time.perf_counter()
        model(x).backward(x.detach())
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3

    def peak() -> float:
        if device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20

    step(torch.randn(1, 64, 512, device=device, requires_grad=True))
    before = peak()
    step(x)
    grown = peak() - before
    threads = f"{torch.get_num_threads()} threads of {platform.machine()}"
    return {
        "milliseconds": statistics.median(step(x) for _ in range(repeats)),
        "mebibytes": grown,
        "where": torch.cuda.get_device_name() if device == "cuda" else threads,
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=5, help="the median of so many steps")
    parser.add_argument("--only", type=int, nargs=2, metavar=("Q", "K"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name in ("tokens", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(args, name)}")
    if args.only:
        print(json.dumps(measure(args.tokens, *args.only, args.repeats)))
        return
    rows = []
    for sizes in tqdm(SIZES, unit="size", file=sys.stderr):
        command = [sys.executable, __file__, "--tokens", str(args.tokens)]
        command += ["--repeats", str(args.repeats), "--only", *map(str, sizes)]
        rows.append((*sizes, json.loads(subprocess.check_output(command, text=True))))
    found = rows[0][-1]
    print(f"{found['where']}, torch {found['torch']}, {date.today()}:")
    print(f"{args.tokens} tokens, 8 heads of 64, causal, float32, forward and backward.\n")
    print("| q_bucket_size | k_bucket_size | ms | peak MiB |\n|---:|---:|---:|---:|")
    for q_size, k_size, found in rows:
        print(
            f"| {q_size} | {k_size} | {found['milliseconds']:.0f} | {found['mebibytes']:.0f} |",
        )


if __name__ == "__main__":
    main()
