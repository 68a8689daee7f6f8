"""scripts/finetune.py sharded by FSDP2: its losses, and resuming on any number of processes."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from test_finetune import (
    NOTHING_PARALLEL_OUTLIVES_THE_GROUP,
    PROCESSES,
    TEXT,
    call,
    finetune,
    kill_half_way_through_a_checkpoint,
    log,
    parsed,
    truncate,
    words,
)
from transformers import AutoModelForCausalLM

SMALL = f"--data {TEXT} --max-length 64 --batch-size 4 --steps 6 --warmup-steps 2 --save-every 2"
SMALL += " --keep 9 --eval-fraction 0.01 --sample-tokens 5"
SAVING = ["--micro-batch-size", "1", "--gradient-checkpointing"]
DOCUMENTATION = Path(__file__).parent.parent / "docs" / "finetune.md"
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
FSDP["FSDP_AUTO_WRAP_POLICY"] = "TRANSFORMER_BASED_WRAP"


def call_as(rank: int, environment: dict[str, str], *arguments) -> None:
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    call(*arguments)


def run(
    folder: Path,
    processes: int,
    *arguments: str,
    sharded: bool = True,
    sabotage: Callable[[], None] | None = None,
) -> int:
    """The exit code of the last process, which alone is sabotaged; then the others end too."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    environment |= {"WORLD_SIZE": str(processes)} | (FSDP if sharded else {})
    arguments = ["--output-dir", str(folder), *SMALL.split(), *arguments]
    started = []
    for rank in range(processes):
        last = sabotage if rank == processes - 1 else None
        task = (rank, environment, arguments, folder.with_suffix(".txt"), last)
        started.append(PROCESSES.Process(target=call_as, args=task))
        started[-1].start()
    started[-1].join()
    for process in started:
        if sabotage:
            process.kill()
        process.join()
    return started[-1].exitcode or max(process.exitcode for process in started)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one process that is not sharded."""
    folder = tmp_path_factory.mktemp("finetune") / "single"
    assert run(folder, 1, sharded=False) == 0, words(folder)
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that `accelerate launch` shards as the documentation says."""
    folder = tmp_path_factory.mktemp("finetune") / "sharded"
    config, script = folder.with_suffix(".yaml"), folder.with_suffix(".py")
    config.write_text(re.search(r"```yaml\n(.*?)```", DOCUMENTATION.read_text(), re.DOTALL)[1])
    script.write_text(NOTHING_PARALLEL_OUTLIVES_THE_GROUP)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    launch += ["--main_process_port", "0", str(script), "--output-dir", str(folder)]
    launch += [*SMALL.split(), *SAVING]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(launch, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 x cpu, sharded, 1 at once" in done.stdout
    return folder


def check_same_log(folder: Path, expected: Path) -> None:
    """The same up to rounding."""
    assert len(log(folder)) == len(log(expected))
    for entry, other in zip(log(folder), log(expected), strict=True):
        assert entry == pytest.approx(other, rel=1e-4)


def check_same_model(folder: Path, expected: Path) -> None:
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(path / "model").state_dict()
        for path in (folder, expected)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)


def test_sharded_training_gives_the_losses_of_one_process(sharded: Path, single: Path) -> None:
    """With gradients accumulated, clipped and checkpointed."""
    check_same_log(sharded, single)
    assert all(entry["grad_norm"] > 1 for entry in log(single)[1:]), "nothing was clipped"


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "whole"])
def test_processes_that_share_each_row_give_the_losses_of_one(
    sharded: bool, single: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    arguments = [*SAVING, "--context-parallel", "2"]
    assert run(folder, 2, *arguments, sharded=sharded) == 0, words(folder)
    assert "1 at once, each on 2" in words(folder)
    check_same_log(folder, single)
    check_same_model(folder, single)


def test_rows_are_shared_by_a_divisor_of_the_processes(tmp_path: Path) -> None:
    assert run(tmp_path / "run", 1, "--context-parallel", "2", sharded=False) != 0
    assert "context-parallel: expected a divisor of the 1" in words(tmp_path / "run")


def test_only_flash_two_reaches_over_processes(monkeypatch, tmp_path: Path) -> None:
    args = parsed(monkeypatch, tmp_path, "--context-parallel", "2")
    args.attn_implementation = "sdpa"
    with pytest.raises(SystemExit, match="context-parallel: needs flash_two, got sdpa"):
        finetune.check_names(args)


def test_the_model_is_saved_whole(sharded: Path, single: Path) -> None:
    check_same_model(sharded, single)


def saved(checkpoint: Path) -> dict:
    return dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata


def test_each_process_keeps_and_writes_its_shard(sharded: Path) -> None:
    for name, tensor in saved(sharded / "step-00000006").items():
        assert len(tensor.chunks) == (1 if name.endswith(".step") else 2), name


@pytest.mark.parametrize(
    ("before", "processes", "still_sharded"),
    [
        pytest.param("single", 2, True, id="one to two"),
        pytest.param("sharded", 1, False, id="two to one"),
        pytest.param("sharded", 2, False, id="two to two that hold all", marks=pytest.mark.sweep),
        pytest.param("sharded", 4, True, id="two to four", marks=pytest.mark.sweep),
    ],
)
def test_resume_continues_on_another_number_of_processes(
    before: str, processes: int, still_sharded: bool, single: Path, request, tmp_path: Path
) -> None:
    """From the newest whole checkpoint: one process names the damaged one, all pass it over."""
    folder = shutil.copytree(request.getfixturevalue(before), tmp_path / "run")
    truncate(folder / "step-00000006" / "__0_0.distcp")
    lines = (folder / "losses.jsonl").read_text().splitlines()
    assert run(folder, processes, "--resume", sharded=still_sharded) == 0, words(folder)
    told = rf"warning: {folder}/step-00000006 is no whole checkpoint .*damaged: __0_0.distcp"
    assert len(re.findall(told, words(folder))) == 1
    assert "steps  4 to 6" in words(folder) and still_sharded == ("cpu, sharded" in words(folder))
    assert (folder / "losses.jsonl").read_text().splitlines()[:5] == lines[:5]
    check_same_log(folder, single)


def test_a_killed_process_is_resumed_from_exactly(sharded: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    sabotage = kill_half_way_through_a_checkpoint
    assert run(folder, 2, *SAVING, sabotage=sabotage) == -signal.SIGKILL
    assert run(folder, 2, *SAVING, "--resume") == 0, words(folder)
    assert re.findall(r"steps  (\d) to 6", words(folder)) == ["0", "2"]
    assert log(folder) == log(sharded)


def test_sharded_adapters_give_the_losses_of_one_process(tmp_path: Path) -> None:
    arguments = ["--lora-rank", "4", "--learning-rate", "1e-2", "--steps", "4"]
    single, sharded = tmp_path / "single", tmp_path / "sharded"
    assert run(single, 1, *arguments, sharded=False) == 0, words(single)
    assert run(sharded, 2, *arguments) == 0, words(sharded)
    check_same_log(sharded, single)
    check_same_model(sharded, single)
    names = saved(sharded / "step-00000004").keys()
    assert names and all("lora_" in name for name in names)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "set up for FSDP 1; write fsdp_version: 2"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "set up for DEEPSPEED; .* its engine clips and"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "set up for MEGATRON_LM"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "set up for PARALLELISM_CONFIG"),
    ],
    ids=["FSDP 1", "DeepSpeed", "Megatron-LM", "parallelism config"],
)
def test_other_ways_to_shard_are_refused(environment, message, monkeypatch, tmp_path) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=message):
        parsed(monkeypatch, tmp_path)


@pytest.fixture
def started(monkeypatch, tmp_path: Path) -> Callable[..., list[str]]:
    """The command that replaces a process which `accelerate launch` started with a config file."""

    class Replaced(Exception):
        pass

    def replace(executable: str, command: list[str]) -> None:
        raise Replaced(*command)

    def started(distributed_type: str, processes: int, *options: str) -> list[str]:
        config = {"compute_environment": "LOCAL_MACHINE", "distributed_type": distributed_type}
        config |= {"use_cpu": True, "num_processes": processes, "num_machines": 1}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        launcher = ["python", "accelerate", "launch", "--config_file", f"{tmp_path}/config.yaml"]
        launcher += [*options, *sys.argv]
        monkeypatch.setattr(psutil.Process, "parent", lambda process: process)
        monkeypatch.setattr(psutil.Process, "cmdline", lambda process: launcher)
        with pytest.raises(Replaced) as caught:
            finetune.start_processes()
        return list(caught.value.args)

    monkeypatch.setattr(os, "execv", replace)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return started


def test_a_config_file_says_how_many_processes_start_on_cpus(started) -> None:
    assert "--nproc_per_node=3" in started("MULTI_CPU", 3)
    assert "--nproc_per_node=2" in started("MULTI_CPU", 3, "--num_processes", "2")


def test_a_launcher_that_leaves_out_sharding_is_refused(started) -> None:
    with pytest.raises(SystemExit, match="with --cpu, accelerate launch leaves out the FSDP of"):
        started("FSDP", 2, "--cpu")
