"""Checks that several processes run together, on one CPU or a GPU each; a test for each reads how
it went.

A file of such tests is also the script that its processes run.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.multiprocessing import start_processes

Check = Callable[[DeviceMesh], None]


def run(checks: Sequence[Check], results: Path, device: str = "cpu") -> None:
    """In each of as many processes as `launch` wants: every check, and what it raised."""
    # Forks need not import anything again; a GPU that somebody has looked at cannot be forked.
    method, world = "fork" if device == "cpu" else "spawn", int(os.environ["WORLD_SIZE"])
    named = {check.__name__: check for check in checks}
    gc.freeze()
    start_processes(_run_as, (named, results, device), world, start_method=method)


def _run_as(rank: int, checks: Mapping[str, Check], results: Path, device: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{results}/store",
        rank=rank,
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    raised = {}
    for name, check in checks.items():
        try:
            check(mesh)
            raised[name] = None
        except (Exception, pytest.fail.Exception):
            raised[name] = traceback.format_exc()
        dist.barrier()
    (results / f"{rank}.json").write_text(json.dumps(raised))
    # A model with DDP that outlives its process group can wait for Gloo's threads for ever.
    gc.collect()
    dist.destroy_process_group()


def launch(
    file: str, world: int, results: Path, device: str = "cpu", **environment: str
) -> list[dict[str, str | None]]:
    """By rank: what each check of ``file`` raised, None for those that passed."""
    # Transformers would put models on a GPU if it saw one.
    hidden = {} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path)}
    # As torchrun tells it.
    environment |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(world))
    finished = subprocess.run(
        [sys.executable, file, str(results)],
        capture_output=True,
        text=True,
        env=os.environ | hidden | environment,
    )
    assert finished.returncode == 0, finished.stderr
    return [json.loads((results / f"{rank}.json").read_text()) for rank in range(world)]


def assert_passed(outcomes: list[dict[str, str | None]], name: str) -> None:
    for rank, raised in enumerate(outcomes):
        assert raised[name] is None, f"rank {rank}:\n{raised[name]}"
