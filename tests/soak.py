"""Random calls of training sizes through the Hopper kernels, against the portable Triton kernels.

    python tests/soak.py --count 500 --jobs 8

As `fuzz`, whose masks and arguments it draws: a case is a function of its seed. Both kernels are
compared with the dense formula in float64, and the Hopper kernels may be no further from it than
the portable ones are. What the Hopper kernels decline is counted: few calls should be. Most time
goes into compiling, so 32 calls in a row are of a kind and differ in lengths and values.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed

import fuzz
import torch

from hf_flash_two.kernels.hopper import config
from hf_flash_two.testing import kernel_calls

HALF = (torch.bfloat16, torch.float16)
TRAINING = fuzz.Range(
    lengths=(65, 128, 200, 255, 256, 257, 384, 500, 513, 777, 1024, 1100),
    long=(1500, 2048, 2500),
    head_dims=(64, 64, 80, 96, 128, 128, 192, 256),
    masks=tuple(mask for mask in fuzz.MASKS if mask is not fuzz.dense),
    same_dim=0.8,
    bias=0.03,
    buckets=0.0,
    any_order=0.3,
    alike=32,
)


def soak(seeds: range) -> tuple[list[str], Counter]:
    """What failed, and which kernels ran."""
    torch.set_num_threads(1)
    # "auto" takes them for small calls too.
    config.forward_is_slow = config.backward_is_slow = lambda *call: None
    failed, ran = [], Counter()
    for seed in seeds:
        case = fuzz.make(seed, HALF, TRAINING)
        try:
            with kernel_calls(backward=True) as calls:
                fuzz.run(case, "auto", "cuda", peer="triton")
            ran.update((call.direction, call.kernel) for call in calls[:2])
        except Exception as error:
            words = ", ".join(case.words)
            failed.append(f"seed {seed}: {type(error).__name__}: {error}\n    {words}")
    return failed, ran


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--first", type=int, default=None, help="first seed; a random one if unset")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--jobs", type=int, default=4, help="processes, which mostly compile")
    options = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        print("error: it needs a Hopper GPU")
        return 1
    alike = TRAINING.alike
    chosen = random.SystemRandom().randrange(10**9) // alike * alike
    first = chosen if options.first is None else options.first
    stop = first + options.count
    print(f"seeds {first} to {stop - 1} on {torch.cuda.get_device_name()}", flush=True)
    starts = [first, *range((first // alike + 1) * alike, stop, alike), stop]
    done = failures = 0
    ran = Counter()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=spawn) as pool:
        tasks = {pool.submit(soak, part): part for part in map(range, starts, starts[1:])}
        for task in as_completed(tasks):
            failed, kernels = task.result()
            failures += len(failed)
            ran += kernels
            done += len(tasks[task])
            print(*failed, f"{done} of {options.count}, {failures} failed", sep="\n", flush=True)
    for (direction, kernel), count in sorted(ran.items()):
        print(f"{direction}: {kernel} computed {count} of {options.count}")
    print(f"{options.count} cases, {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
