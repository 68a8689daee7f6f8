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
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


def run(checks: Sequence[Callable[[DeviceMesh], None]], results: Path, device: str = "cpu") -> None:
    """In each process: every check, and what it raised."""
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    raised = {}
    for check in checks:
        try:
            check(mesh)
            raised[check.__name__] = None
        except (Exception, pytest.fail.Exception):
            raised[check.__name__] = traceback.format_exc()
        dist.barrier()
    (results / f"{dist.get_rank()}.json").write_text(json.dumps(raised))
    # A model with DDP that outlives its process group can wait for Gloo's threads for ever.
    gc.collect()
    dist.destroy_process_group()


def launch(
    file: str, world: int, results: Path, device: str = "cpu"
) -> list[dict[str, str | None]]:
    """By rank: what each check of ``file`` raised, None for those that passed."""
    # Transformers would put models on a GPU if it saw one.
    hidden = {} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    finished = subprocess.run(
        [*launcher, f"--nproc-per-node={world}", file, str(results)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | hidden,
    )
    assert finished.returncode == 0, finished.stderr
    return [json.loads((results / f"{rank}.json").read_text()) for rank in range(world)]


def assert_passed(outcomes: list[dict[str, str | None]], name: str) -> None:
    for rank, raised in enumerate(outcomes):
        assert raised[name] is None, f"rank {rank}:\n{raised[name]}"
