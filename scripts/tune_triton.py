"""Time candidate tile sizes of the Triton kernels on this GPU, for the table in triton_config.

    python scripts/tune_triton.py --pass forward --head-dim 128 --mask causal

Candidates are compiled first, in parallel processes that fill Triton's cache, then timed one by
one. Prints TFLOP/s: 4 B H D visible pairs forward, 2.5 times that for both backward passes.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
from dataclasses import replace

import torch
import triton

from hf_flash_two import AttentionMask, flash_attention
from hf_flash_two.kernels import triton_backward, triton_config, triton_forward

Candidate = tuple[int, int, int, int]


def candidates(walk: str) -> list[Candidate]:
    """(block_q, block_k, warps, stages)"""
    if walk == "keys":
        sizes = [(32, 64), (32, 128), (64, 64), (64, 128), (128, 64), (128, 128)]
    else:
        sizes = [(64, 32), (64, 64), (64, 128), (128, 32), (128, 64), (128, 128)]
    return [(q, k, w, s) for (q, k), w, s in itertools.product(sizes, (4, 8), (1, 2, 3, 4))]


def use(walk: str, candidate: Candidate) -> None:
    """Make the kernels take this candidate."""
    block_q, block_k, warps, stages = candidate
    chosen = {"block_q": block_q, "block_k": block_k, "warps": warps, "stages": stages}
    if walk == "forward":

        def forward_tiles(*args):
            return replace(triton_config.forward_tiles(*args), **chosen)

        triton_forward.forward_tiles = forward_tiles
    else:

        def backward_tiles(*args):
            tiles = triton_config.backward_tiles(*args)
            return replace(tiles, **{walk: replace(getattr(tiles, walk), **chosen)})

        triton_backward.backward_tiles = backward_tiles


def problem(args: argparse.Namespace, length: int):
    heads = args.heads or 2048 // args.head_dim
    batch = max(1, 16384 // length)
    shape = (batch, heads, length, args.head_dim)
    tensors = [
        torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    ]
    mask = {
        "full": AttentionMask.full(),
        "causal": AttentionMask.causal(),
        "window": AttentionMask.causal(1024),
        "documents": AttentionMask.from_documents(
            segment_ids=torch.arange(length, device="cuda") // 512, causal=True
        ),
    }[args.mask]
    pairs = length * length
    if args.mask == "causal":
        pairs //= 2
    elif args.mask != "full":
        pairs = int(mask.to_dense(length, length, "cuda").sum())
    return tensors, mask, 4 * batch * heads * args.head_dim * pairs


def runner(walk: str, tensors, mask):
    if walk == "forward":
        return lambda: flash_attention(*tensors, mask=mask)
    out = flash_attention(*tensors, mask=mask)
    d_out = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, tensors, d_out, retain_graph=True)


def compile_one(job) -> None:
    args, candidate = job
    use(args.walk, candidate)
    tensors, mask, _ = problem(args, 256)
    try:
        runner(args.walk, tensors, mask)()
    except Exception as error:
        print(f"{candidate}: {type(error).__name__}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--pass", dest="walk", choices=["forward", "keys", "queries"], required=True
    )
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--heads", type=int)
    parser.add_argument(
        "--mask", default="causal", choices=["full", "causal", "window", "documents"]
    )
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--processes", type=int, default=8)
    args = parser.parse_args()
    jobs = [(args, candidate) for candidate in candidates(args.walk)]
    context = multiprocessing.get_context("spawn")
    with context.Pool(args.processes) as pool:
        pool.map_async(compile_one, jobs, chunksize=1).get(timeout=240)
    tensors, mask, flops = problem(args, args.length)
    rows = []
    for candidate in candidates(args.walk):
        use(args.walk, candidate)
        try:
            ms = triton.testing.do_bench(
                runner(args.walk, tensors, mask), warmup=20, rep=60, return_mode="median"
            )
        except triton.runtime.errors.OutOfResources:
            continue
        except Exception as error:
            print(f"{candidate}: {type(error).__name__}")
            continue
        factor = 1.0 if args.walk == "forward" else 2.5
        rows.append((factor * flops / ms / 1e9, candidate))
    for tflops, candidate in sorted(rows, reverse=True)[:8]:
        print(f"{args.walk} d{args.head_dim} {args.mask} {tflops:6.0f} TFLOP/s {candidate}")


if __name__ == "__main__":
    main()
