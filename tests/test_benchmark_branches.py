"""The benchmark of branches runs end to end on a tiny case."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import benchmark_branches

SIZES = "--prompt 40 --completion 7 --completions 3 --layers 1 --width 64 --repeats 1 --device cpu"


@pytest.fixture
def in_this_process(monkeypatch) -> None:
    """Nothing is said of memory then, but no process has to import everything anew."""

    def run(arguments: list[str]) -> dict:
        return benchmark_branches.measure(benchmark_branches.parse_arguments(arguments))

    monkeypatch.setattr(benchmark_branches, "measure_alone", run)


def test_branches_are_measured_against_rows(in_this_process, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark_branches.py", *SIZES.split()])
    benchmark_branches.main()
    rows = json.loads(capsys.readouterr().out.strip().split("\n")[-1])
    assert [row["layout"] for row in rows] == list(benchmark_branches.LAYOUTS)
    assert [row["tokens"] for row in rows] == [40 + 3 * 7 + 2, 3 * 47, 3 * 47]
    assert all(row["ms"] > 0 for row in rows)


def test_losses_that_differ_are_told(in_this_process, monkeypatch) -> None:
    measured = benchmark_branches.measure

    def wrong(args) -> dict:
        row = measured(args)
        return row | {"loss": row["loss"] * (1 + (args.layout == "rows"))}

    monkeypatch.setattr(benchmark_branches, "measure", wrong)
    monkeypatch.setattr(sys, "argv", ["benchmark_branches.py", *SIZES.split()])
    with pytest.raises(SystemExit, match="the losses differ"):
        benchmark_branches.main()
