"""Checks that run in several processes: each file runs all of its own in one set of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

Raised = list[dict[str, str | None]]
"""By rank what each check raised, None for nothing."""


def run(file: str, world: int, folder: Path) -> Raised:
    """What the checks of a test file raised in ``world`` processes; ``folder`` is an empty one."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    finished = subprocess.run(
        [*launcher, f"--nproc-per-node={world}", file, str(folder)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert finished.returncode == 0, finished.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


def main(checks: Iterable[Callable[[DeviceMesh], None]]) -> None:
    """In each of the processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    raised = {}
    for check in checks:
        try:
            check(mesh)
            raised[check.__name__] = None
        except (Exception, pytest.fail.Exception):
            raised[check.__name__] = traceback.format_exc()
        dist.barrier()
    (Path(sys.argv[1]) / f"{dist.get_rank()}.json").write_text(json.dumps(raised))
    dist.destroy_process_group()


def passed(raised: Raised, name: str) -> None:
    for rank, errors in enumerate(raised):
        assert errors[name] is None, f"rank {rank}:\n{errors[name]}"
