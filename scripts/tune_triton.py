"""Time candidate tile sizes of the Triton kernels on this GPU, for the table in triton/config.py.

    python scripts/tune_triton.py --passes forward dkdv dq --head-dims 64 128 256

Candidates are compiled first, in parallel processes that fill Triton's cache, then timed one by
one. Prints TFLOP/s: 4 B H D visible pairs forward, 2.5 times that for the backward passes together.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
from dataclasses import replace

import torch
import triton

from hf_flash_two import AttentionMask, flash_attention
from hf_flash_two.kernels.triton import backward, config, forward, launch

Candidate = tuple[int, int, int, int]
Job = tuple[str, int, str, Candidate]
# Rows of the tile that stays and of those that pass it, and warps.
SIZES = (
    (128, 128, 8), (128, 64, 8), (128, 32, 8), (128, 128, 4), (128, 64, 4),
    (64, 128, 4), (64, 64, 4), (64, 32, 4), (64, 64, 8), (64, 32, 8),
)  # fmt: skip


def candidates(which: str) -> list[Candidate]:
    """(block_q, block_k, warps, stages)"""
    stages = (2, 3, 4) if which == "forward" else (1, 2, 3)
    found = [(*size, n) for size in SIZES for n in stages]
    return [(k, q, w, n) for q, k, w, n in found] if which in ("dkdv", "dv") else found


def use(which: str, candidate: Candidate) -> None:
    """Make the kernels take this candidate."""
    block_q, block_k, warps, stages = candidate
    launch.plans.clear()
    chosen = {"block_q": block_q, "block_k": block_k, "warps": warps, "stages": stages}
    if which == "forward":

        def forward_tiles(*args):
            return replace(config.forward_tiles(*args), **chosen)

        forward.forward_tiles = forward_tiles
    else:

        def backward_tiles(*args):
            tiles = config.backward_tiles(*args)
            # A dV pass of its own begins as the dK/dV pass.
            return replace(tiles, **{which: replace(getattr(tiles, which) or tiles.dkdv, **chosen)})

        backward.backward_tiles = backward_tiles


def problem(head_dim: int, mask: str, length: int):
    heads = 2048 // head_dim
    batch = max(1, 16384 // length)
    shape = (batch, heads, length, head_dim)
    tensors = [
        torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    ]
    made = {
        "full": AttentionMask.full(),
        "causal": AttentionMask.causal(),
        "window": AttentionMask.causal(1024),
        "documents": AttentionMask.from_documents(
            segment_ids=torch.arange(length, device="cuda") // 512, causal=True
        ),
    }[mask]
    pairs = length * length
    if mask == "causal":
        pairs //= 2
    elif mask != "full":
        pairs = int(made.to_dense(length, length, "cuda").sum())
    return tensors, made, 4 * batch * heads * head_dim * pairs


def runner(which: str, tensors, mask):
    if which == "forward":
        return lambda: flash_attention(*tensors, mask=mask)
    out = flash_attention(*tensors, mask=mask)
    d_out = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, tensors, d_out, retain_graph=True)


def compile_one(job: Job) -> None:
    which, head_dim, mask, candidate = job
    use(which, candidate)
    tensors, made, _ = problem(head_dim, mask, 256)
    try:
        runner(which, tensors, made)()
    except triton.runtime.errors.OutOfResources:
        pass
    except Exception as error:
        print(f"{job}: {type(error).__name__}", flush=True)


def measure(which: str, head_dim: int, mask: str, length: int) -> list[tuple[float, Candidate]]:
    tensors, made, flops = problem(head_dim, mask, length)
    rows = []
    for candidate in candidates(which):
        use(which, candidate)
        try:
            run = runner(which, tensors, made)
            ms = triton.testing.do_bench(run, warmup=5, rep=30, return_mode="median")
        except triton.runtime.errors.OutOfResources:
            continue
        rows.append(((1.0 if which == "forward" else 2.5) * flops / ms / 1e9, candidate))
    return sorted(rows, reverse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    passes = ["forward", "dkdv", "dq", "dv"]
    parser.add_argument("--passes", nargs="+", choices=passes, default=passes[:3])
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument(
        "--masks",
        nargs="+",
        default=["causal"],
        choices=["full", "causal", "window", "documents"],
    )
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--show", type=int, default=5, help="rows per pass, head dim and mask")
    args = parser.parse_args()
    settings = list(itertools.product(args.passes, args.head_dims, args.masks))
    jobs = [(*chosen, candidate) for chosen in settings for candidate in candidates(chosen[0])]
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        for _ in pool.imap_unordered(compile_one, jobs):
            pass
    for which, head_dim, mask in settings:
        for tflops, candidate in measure(which, head_dim, mask, args.length)[: args.show]:
            print(f"{which} d{head_dim} {mask} {tflops:6.0f} TFLOP/s {candidate}", flush=True)


if __name__ == "__main__":
    main()
