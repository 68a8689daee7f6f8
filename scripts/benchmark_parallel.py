#!/usr/bin/env python
"""Training steps over a sequence that is spread over several GPUs, beside one GPU.

    torchrun --nproc-per-node 2 scripts/benchmark_parallel.py --json parallel.json

Each row is a model and a batch of one row; each column a way to spread it over the ranks: by keys
("gather"), by heads ("ulysses"), what "auto" takes, and PyTorch's own context parallelism with sdpa
(on GPUs and of plain causal rows, all that it knows). Scaling is one GPU's time over W times that
of W GPUs. Bytes are what a rank sends in a step, divided by the number of layers. With one process
there is nothing to compare. Without a GPU it runs small sizes with gloo, which tells nothing of
speed. To see which length fits into some memory: ``--rows causal --memory 12 --length 114688``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import experimental

import hf_flash_two
from hf_flash_two import context_parallel

ROWS = ("causal", "window", "packed")
WAYS = ("auto", "gather", "ulysses", "torch")
_VOCABULARY = 4096


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, help="tokens; 131072, and 512 without a GPU")
    parser.add_argument("--layers", type=int, help="8, and 2 without a GPU")
    parser.add_argument("--width", type=int, help="2048, and 64 without a GPU")
    parser.add_argument("--window", type=int, default=4096)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", type=float, help="GiB of each GPU that may be used")
    parser.add_argument("--json", type=Path, help="where rank 0 writes the results")
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
        if args.memory is not None:
            whole = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(args.memory * 2**30 / whole)
    dist.init_process_group("nccl" if gpu else "gloo")
    sizes = (131072, 8, 2048) if gpu else (512, 2, 64)
    length, layers, width = (
        given or usual
        for given, usual in zip((args.length, args.layers, args.width), sizes, strict=True)
    )
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    name = torch.cuda.get_device_name() if gpu else "CPU, gloo"
    report = Report(
        {
            "machine": f"{mesh.size()} x {name}", "torch": torch.__version__,
            "transformers": transformers.__version__, "hf_flash_two": hf_flash_two.__version__,
            "date": str(datetime.date.today()), "length": length, "layers": layers, "width": width,
            "window": args.window, "repeats": args.repeats,
        },
        args.json,
    )  # fmt: skip
    for row in args.rows:
        batch = make_batch(row, length, device)
        model = make_model(row, layers, width, args.window, length, device)
        alone = measure(model, partial(nullcontext, batch), args.repeats, layers)
        report.add({"row": row, "way": "one rank", **alone})
        for way in args.ways:
            if way == "torch" and not (gpu and row == "causal"):
                continue
            model.set_attn_implementation("sdpa" if way == "torch" else "flash_two")
            enter = partial(spread, way, mesh, batch, model)
            result = measure(model, enter, args.repeats, layers)
            if alone["ms"] and result["ms"]:
                result["scaling"] = alone["ms"] / result["ms"] / mesh.size()
            report.add({"row": row, "way": way, **result})
        del model
    dist.destroy_process_group()
    return 0


class Report:
    """What rank 0 prints, and writes to a file, as soon as it is known."""

    _COLUMNS = ("row", "way", "ms", "scaling", "GiB", "MiB sent per layer")

    def __init__(self, head: dict[str, Any], path: Path | None) -> None:
        self._head, self._path = head, path
        self._rows: list[dict[str, Any]] = []
        self._print(" | ".join(str(x) for x in head.values()))
        self._print("".join(f"{name:>20}" for name in self._COLUMNS))

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        cells = [row.get(name, "") for name in self._COLUMNS]
        shown = [f"{x:.3g}" if isinstance(x, float) else str(x) for x in cells]
        self._print("".join(f"{x:>20}" for x in shown) + f"  {row.get('note', '')}")
        if self._path and dist.get_rank() == 0:
            self._path.write_text(json.dumps({**self._head, "rows": self._rows}, indent=1) + "\n")

    def _print(self, line: str) -> None:
        if dist.get_rank() == 0:
            print(line, flush=True)


def make_model(
    row: str, layers: int, width: int, window: int, length: int, device: torch.device
) -> transformers.PreTrainedModel:
    heads = max(4, width // 128)
    family = "Mistral" if row == "window" else "Llama"
    config = getattr(transformers, f"{family}Config")(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads // 4 or 1, head_dim=width // heads,
        vocab_size=_VOCABULARY, max_position_embeddings=length, use_cache=False,
        **({"sliding_window": window} if row == "window" else {}),
    )  # fmt: skip
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="flash_two"
        )
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def make_batch(row: str, length: int, device: torch.device) -> dict[str, Tensor]:
    """One row; "packed" documents are of 2k to 30k tokens of 131072, and in proportion."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, _VOCABULARY, (1, length), generator=generator)
    batch = {"input_ids": ids, "labels": ids.clone()}
    positions = torch.arange(length)
    if row == "packed":
        least, most = length // 64, length // 4
        ends = [0]
        while length - ends[-1] > most:
            ends.append(ends[-1] + int(torch.randint(least, most, (), generator=generator)))
        starts = torch.tensor(ends)
        positions = positions - starts[torch.searchsorted(starts, positions, right=True) - 1]
        batch["labels"][0, starts] = -100
    batch["position_ids"] = positions[None]
    return {name: x.to(device) for name, x in batch.items()}


@contextmanager
def spread(
    way: str, mesh: DeviceMesh, batch: dict[str, Tensor], model: nn.Module
) -> Iterator[dict[str, Any]]:
    """What the model gets on this rank."""
    if way != "torch":
        with context_parallel(mesh, batch, exchange=way) as shard:
            yield shard.batch
        return
    # As Accelerate prepares a model: every layer is causal and sees no mask.
    hooks = [
        module.register_forward_pre_hook(_without_mask, with_kwargs=True)
        for name, module in model.named_modules()
        if name.endswith("self_attn")
    ]
    shifted = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    shards = {"shift_labels": shifted} | {name: x.clone() for name, x in batch.items()}
    buffers = list(shards.values())
    with experimental.context_parallel(
        mesh, buffers=buffers, buffer_seq_dims=[1] * len(buffers), no_restore_buffers=set(buffers)
    ):
        yield shards | {"num_items_in_batch": (shifted != -100).sum() / mesh.size()}
    for hook in hooks:
        hook.remove()


def _without_mask(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return args, kwargs | {"attention_mask": None, "is_causal": True}


def measure(
    model: nn.Module, enter: Callable[[], Any], repeats: int, layers: int
) -> dict[str, float | str | None]:
    """Medians over steps of the slowest rank; memory of the rank that needs most."""
    gpu = torch.cuda.is_available()
    times, sent = [], 0
    try:
        for repeat in range(repeats + 1):
            model.zero_grad(set_to_none=True)
            if gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            dist.barrier()
            start = time.perf_counter()
            with counted() as counter, enter() as batch:
                model(**batch).loss.backward()
            if gpu:
                torch.cuda.synchronize()
            if repeat:  # the first compiles
                times.append(time.perf_counter() - start)
                sent = counter["bytes"]
    except torch.OutOfMemoryError:
        return {"ms": None, "note": "out of memory"}
    peak = torch.cuda.max_memory_allocated() if gpu else 0
    slowest = torch.tensor([statistics.median(times), peak], dtype=torch.float64)
    slowest = slowest.to(next(model.parameters()).device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return {
        "ms": slowest[0].item() * 1e3, "GiB": slowest[1].item() / 2**30,
        "MiB sent per layer": sent / layers / 2**20,
    }  # fmt: skip


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Count the bytes that this rank sends to others by the collectives of our exchanges."""
    counter, before = {"bytes": 0}, (dist.all_gather_into_tensor, dist.all_to_all_single)

    def gather(out, x, group=None, *rest, **more):
        counter["bytes"] += x.nbytes * (dist.get_world_size(group) - 1)
        return before[0](out, x, group, *rest, **more)

    def exchange(out, x, received=None, sent=None, group=None, **more):
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        kept = x.shape[0] // ranks if sent is None else sent[rank]
        counter["bytes"] += (x.shape[0] - kept) * (x.nbytes // max(1, x.shape[0]))
        return before[1](out, x, received, sent, group=group, **more)

    dist.all_gather_into_tensor, dist.all_to_all_single = gather, exchange
    try:
        yield counter
    finally:
        dist.all_gather_into_tensor, dist.all_to_all_single = before


if __name__ == "__main__":
    raise SystemExit(main())
