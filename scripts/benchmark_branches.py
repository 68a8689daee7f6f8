#!/usr/bin/env python
"""Time training steps over completions of one prompt: as branches in a row, and each with its own.

    python scripts/benchmark_branches.py                        # 8 completions of 512 after 4096
    python scripts/benchmark_branches.py --completions 2 --layers 4 --width 512

"branches" has the prompt once, "rows" a row for each completion in one batch, "one by one" a row at
a time, whose gradients add up. Each runs in a process of its own, so that its peak memory is known:
what the process, or the GPU, holds at most beyond model and batch. Times are medians. Losses must
agree. The last line of the output is the table as JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from datetime import date

import benchmark
import torch
import transformers
from benchmark_model import DTYPES
from torch import Tensor

from hf_flash_two import PrefixTreeCollator

LAYOUTS = ("branches", "rows", "one by one")


def build(args: argparse.Namespace) -> transformers.PreTrainedModel:
    heads = max(1, args.width // 64)
    config = transformers.LlamaConfig(
        hidden_size=args.width,
        intermediate_size=3 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        vocab_size=args.vocabulary,
        max_position_embeddings=args.prompt + args.completion,
    )
    torch.manual_seed(0)
    with torch.device(args.device):
        model = transformers.LlamaForCausalLM._from_config(
            config, dtype=DTYPES[args.dtype], attn_implementation="flash_two"
        )
    return model.train()


def batches(args: argparse.Namespace) -> list[dict[str, Tensor]]:
    """What one step computes, forward and backward of each in turn."""
    draw = torch.Generator().manual_seed(1)
    sizes = [args.prompt] + [args.completion] * args.completions
    prompt, *completions = torch.randint(1, args.vocabulary, (sum(sizes),), generator=draw).split(
        sizes
    )
    if args.layout == "branches":
        examples = [{"prompt_ids": prompt, "completion_ids": completions}]
        return [PrefixTreeCollator()(examples)]
    rows = torch.stack([torch.cat([prompt, completion]) for completion in completions])
    labels = rows.clone()
    labels[:, : args.prompt] = -100
    size = len(rows) if args.layout == "rows" else 1
    parts = zip(rows.split(size), labels.split(size), strict=True)
    return [{"input_ids": ids, "labels": wanted} for ids, wanted in parts]


def measure(args: argparse.Namespace) -> dict:
    """Tokens, milliseconds, MiB and loss of a step in ``args.layout``."""
    on_gpu = args.device == "cuda"
    model = build(args)
    given = [{name: x.to(args.device) for name, x in batch.items()} for batch in batches(args)]

    def step() -> float:
        model.zero_grad()
        losses = []
        for batch in given:
            loss = model(**batch, use_cache=False).loss / len(given)
            loss.backward()
            losses.append(loss.item())  # waits for the device
        return sum(losses)

    before = torch.cuda.memory_allocated() if on_gpu else benchmark._resident()
    loss = step()
    peak = torch.cuda.max_memory_allocated() if on_gpu else benchmark._peak_resident()
    times = []
    for _ in range(args.repeats):
        begin = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    tokens = sum(batch["input_ids"].numel() for batch in given)
    mib = (peak - before) / 2**20
    return {"tokens": tokens, "ms": statistics.median(times), "peak_mib": mib, "loss": loss}


def measure_alone(arguments: list[str]) -> dict:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, *arguments]
    return json.loads(subprocess.check_output(command, text=True))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prompt", type=int, default=4096, help="its tokens")
    parser.add_argument("--completion", type=int, default=512, help="the tokens of each")
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layout", choices=LAYOUTS, help="measure it in this process alone")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse_arguments()
    if args.layout is not None:
        print(json.dumps(measure(args)))
        return
    name = (
        torch.cuda.get_device_name()
        if args.device == "cuda"
        else platform.processor() or platform.machine()
    )
    print(f"{name}, torch {torch.__version__}, {date.today()}")
    print(f"\n{'layout':12}{'tokens':>9}{'ms':>10}{'peak MiB':>10}{'loss':>10}")
    results = []
    for layout in LAYOUTS:
        row = {"layout": layout, **measure_alone([*sys.argv[1:], "--layout", layout])}
        print(
            f"{layout:12}{row['tokens']:9}{row['ms']:10.1f}{row['peak_mib']:10.0f}{row['loss']:10.5f}"
        )
        results.append(row)
    limit = 1e-4 if args.dtype == "fp32" else 1e-2
    for row in results:
        if abs(row["loss"] - results[0]["loss"]) > limit * abs(row["loss"]):
            raise SystemExit(f"the losses differ: {row['loss']} and {results[0]['loss']}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
