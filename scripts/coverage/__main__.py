"""Compares flash_two with eager on a tiny model of every family in Transformers.

Writes docs/coverage.md; a run that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from scripts.coverage import table
from scripts.coverage.build import Family, families
from scripts.coverage.compare import Row, check


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="FAMILY",
        help="print what is found about these, write no table",
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (default: 2)")
    parser.add_argument(
        "--timeout", type=int, default=240, help="seconds for one family (default: 240)"
    )
    parser.add_argument(
        "--progress", type=Path, default=Path("runs/coverage.jsonl"), help="what is done so far"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    everything = families()
    unknown = set(args.only or ()) - {family.name for family in everything}
    if unknown:
        parser.error(f"--only: no such family in transformers: {', '.join(sorted(unknown))}")
    if args.only:
        todo = [family for family in everything if family.name in args.only]
        for row in in_workers(todo, args.jobs, args.timeout):
            print(json.dumps(row.as_dict(), indent=1))
        return 0
    done = {}
    if args.progress.exists():
        lines = args.progress.read_text().splitlines()
        done = {row.family: row for row in (Row(**json.loads(line)) for line in lines)}
    todo = [family for family in everything if family.name not in done]
    args.progress.parent.mkdir(parents=True, exist_ok=True)
    with args.progress.open("a") as file:
        for row in tqdm(in_workers(todo, args.jobs, args.timeout), total=len(todo), unit="family"):
            file.write(json.dumps(row.as_dict()) + "\n")
            file.flush()
            done[row.family] = row
    table.write(done.values(), Path(__file__).parents[2] / "docs")
    args.progress.unlink()
    return 0


def in_workers(todo: list[Family], jobs: int, timeout: int) -> Iterator[Row]:
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
                    row = _failed(family, f"the process ended with {process.exitcode}")
            elif time.monotonic() > limit:
                process.kill()
                row = _failed(family, f"not done after {timeout} s")
            if row is not None:
                process.join()
                receiver.close()
                del running[process]
                yield row


def work(family: Family, sender) -> None:
    warnings.simplefilter("ignore")
    sys.stdout = sys.stderr = open(os.devnull, "w")
    sender.send(check(family))


def _failed(family: Family, reason: str) -> Row:
    return Row(family.name, kind=family.kind, status="error", notes=[reason])


if __name__ == "__main__":
    sys.exit(main())
