"""Checkpoints of scripts/finetune.py: written by all processes, read by any number of them.

A checkpoint is a folder, step-N:

    .metadata, __*.distcp   trained weights and optimizer, as torch.distributed.checkpoint has them
    run.json                the step, what identifies the run, its log
    SHA256SUMS              of these files; `sha256sum -c SHA256SUMS` checks them too

Like all files of a run it gets its name only when it is whole and on the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch.distributed.checkpoint as dcp
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # with a single process

SUMS = "SHA256SUMS"
OPTIONS = StateDictOptions(strict=False)  # the weights that are not trained are missing


# Files


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Stop with the name of what cannot be written, as when the disk is full."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, dcp.CheckpointException) as reason:
        if isinstance(reason, dcp.CheckpointException):
            reason, _ = next(iter(reason.failures.values()))  # of one process
        sys.exit(f"error: cannot write {path}: {reason}; --resume continues this run")


def remove(path: Path) -> None:
    """Remove a file or folder: its name at once, its content now or when the run is resumed."""
    path = path.rename(f"{path}.old.partial")
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def publish(partial: Path, final: Path) -> None:
    """Rename a finished file or folder, replacing an older one."""
    for path in (partial, *partial.rglob("*"), partial.parent):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    if partial.is_dir() and final.exists():
        remove(final)
    partial.replace(final)


def digest(path: Path) -> str:
    """The SHA-256 of a file, or why it cannot be read: other processes wait for either."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as reason:
        return str(reason)


def checksums(folder: Path) -> dict[str, str]:
    """By name, of all files but the list itself; the processes share them out."""
    names = [sorted(path.name for path in folder.iterdir() if path.name != SUMS)]
    (names,) = broadcast_object_list(names)
    process = PartialState()
    own = names[process.process_index :: process.num_processes]
    return dict(gather_object([(name, digest(folder / name)) for name in own]))


def check(folder: Path) -> None:
    """Raise ValueError or OSError if a file is not as it was written."""
    found = checksums(folder)
    lines = (line.split("  ", 1) for line in (folder / SUMS).read_text().splitlines())
    written = {name: checksum for checksum, name in lines}
    if damaged := [x for x in {**found, **written} if found.get(x) != written.get(x)]:
        raise ValueError(f"damaged: {', '.join(sorted(damaged))}")


# Checkpoints


def checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def trained_state(model, optimizer) -> tuple[dict, dict]:
    """The weights that the optimizer trains, and its own state: both by the names of weights."""
    weights, state = get_state_dict(model, optimizer, options=OPTIONS)
    trained = [name for group in state["param_groups"] for name in group["params"]]
    return {name: weights[name] for name in trained}, state


def save_checkpoint(folder: Path, run: dict, model, optimizer, keep: int) -> None:
    """Write ``run``, which is JSON, and the state of training; ``keep`` checkpoints stay."""
    main = PartialState().is_main_process
    final = folder / f"step-{run['step']:08d}"
    partial = final.with_suffix(".partial")
    weights, state = trained_state(model, optimizer)
    with writing(final):
        if main:
            partial.mkdir(exist_ok=True)  # another process may be ahead
            (partial / "run.json").write_text(json.dumps(run))
        dcp.save({"weights": weights, "optimizer": state["state"]}, checkpoint_id=partial)
        sums = checksums(partial)
        if main:
            (partial / SUMS).write_text("".join(f"{sums[name]}  {name}\n" for name in sums))
            publish(partial, final)
    if main:
        # Any newer one is damaged: these steps are taken again.
        saved = checkpoints(folder)
        for old in saved[: saved.index(final) + 1][:-keep]:
            remove(old)


def newest_checkpoint(folder: Path, identity: dict) -> tuple[Path | None, dict]:
    """The newest whole checkpoint and what it says of its run; None and step 0 if there is none.

    Raises:
        ValueError: none is whole, or it is of another run than ``identity``
    """
    (paths,) = broadcast_object_list([checkpoints(folder)])
    for path in reversed(paths):
        try:
            check(path)
            run = json.loads((path / "run.json").read_text())
            theirs = {name: run["identity"][name] for name in identity}
            if missing := {"step", "log", "scaler"} - run.keys():
                raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        except Exception as reason:  # of any kind, by what the bytes happen to mean
            PartialState().print(
                f"warning: {path} is no whole checkpoint and is passed over: {reason!r}",
                file=sys.stderr,
            )
            continue
        for name, now in identity.items():
            if theirs[name] != now:
                raise ValueError(
                    f"{path} was written with {name} {theirs[name]!r}, not {now!r}; the losses "
                    "would not continue"
                )
        return path, run
    if paths:
        raise ValueError(
            f"no checkpoint in {folder} is whole; name another --output-dir to start at the "
            "beginning"
        )
    return None, {"step": 0, "log": ""}


def load_checkpoint(path: Path, model, optimizer) -> None:
    """Load what ``save_checkpoint`` wrote, on this number of processes or another one."""
    reader = dcp.FileSystemReader(path)
    saved = reader.read_metadata().state_dict_metadata
    weights, state = trained_state(model, optimizer)
    # A weight that had no gradient so far has no moments.
    moments = {k: v for k, v in state["state"].items() if f"optimizer.{k}.step" in saved}
    dcp.load({"weights": weights, "optimizer": moments}, storage_reader=reader)
    state = {**state, "state": moments}
    set_state_dict(
        model, optimizer, model_state_dict=weights, optim_state_dict=state, options=OPTIONS
    )
