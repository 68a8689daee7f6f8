"""The benchmark of batch-invariant attention runs end to end on tiny cases."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import benchmark_invariant

SIZES = "--heads 2 --key-heads 1 --head-dim 16 --scale 32 --repeats 1 --device cpu --dtype fp32"


def test_each_case_is_timed_both_ways(monkeypatch, capsys, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    monkeypatch.setattr(sys, "argv", ["benchmark_invariant.py", *SIZES.split(), f"--json={path}"])
    benchmark_invariant.main()
    rows = json.loads(capsys.readouterr().out.strip().split("\n")[-1])
    assert [row["case"] for row in rows] == [case.name for case in benchmark_invariant.cases(32)]
    assert all(row["ratio"] > 0 for row in rows)
    assert json.loads(path.read_text())["rows"] == rows


def test_other_bits_are_told(monkeypatch) -> None:
    attend = benchmark_invariant.flash_attention

    def usual(*tensors, batch_invariant: bool, **settings):
        return attend(*tensors, **settings)

    monkeypatch.setattr(benchmark_invariant, "flash_attention", usual)
    only = ["--only", "left-padded"]
    monkeypatch.setattr(sys, "argv", ["benchmark_invariant.py", *SIZES.split(), *only])
    with pytest.raises(SystemExit, match="the bits are not those of the row alone"):
        benchmark_invariant.main()
