#!/usr/bin/env python
"""Compares flash_two with eager on a tiny model of every family in Transformers."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from zoo.build import Family, families
from zoo.compare import Row, check

import hf_flash_two  # noqa: F401


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--timeout", type=int, default=120, help="seconds for one family")
    parser.add_argument("--results", type=Path, default=Path("runs/coverage.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    done = {}
    if args.results.exists():
        for line in args.results.read_text().splitlines():
            row = json.loads(line)
            done[row["family"]] = row
    todo = [f for f in families() if (f.name in args.only if args.only else f.name not in done)]
    args.results.parent.mkdir(parents=True, exist_ok=True)
    with args.results.open("a") as file:
        for row in tqdm(in_workers(todo, args.jobs, args.timeout), total=len(todo), unit="family"):
            file.write(json.dumps(row) + "\n")
            file.flush()
            done[row["family"]] = row
            if args.only:
                print(json.dumps(row, indent=1))
    return 0


def in_workers(todo: list[Family], jobs: int, timeout: int):
    """The row of each family from a process of its own; one that hangs or dies gives a row too."""
    context = multiprocessing.get_context("fork")
    waiting, running = list(reversed(todo)), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            family = waiting.pop()
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=work, args=(family, sender))
            process.start()
            sender.close()
            running[process] = family, receiver, time.monotonic() + timeout
        multiprocessing.connection.wait(
            [receiver for _, receiver, _ in running.values()], timeout=1
        )
        for process, (family, receiver, limit) in list(running.items()):
            row = None
            if receiver.poll():
                try:
                    row = receiver.recv()
                except EOFError:
                    process.join()
                    row = Row(family.name, status="error")
                    row.notes.append(f"the process ended with {process.exitcode}")
                    row = row.as_dict()
            elif time.monotonic() > limit:
                process.kill()
                row = Row(family.name, status="error", notes=[f"not done after {timeout} s"])
                row = row.as_dict()
            if row is not None:
                process.join()
                receiver.close()
                del running[process]
                yield row


def work(family: Family, sender) -> None:
    import warnings

    warnings.simplefilter("ignore")
    if "COVERAGE_DEBUG" not in os.environ:
        sys.stdout = sys.stderr = open(os.devnull, "w")
    sender.send(check(family).as_dict())


if __name__ == "__main__":
    sys.exit(main())
