"""The benchmark runs end to end on tiny cases; what it times is nobody's concern here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import benchmark
import benchmark_model


@pytest.fixture
def run(monkeypatch, capsys):
    threads = torch.get_num_threads()

    def run(*arguments: str) -> list[dict]:
        monkeypatch.setattr(sys, "argv", ["benchmark.py", "--device", "cpu", *arguments])
        benchmark.main()
        *_, last = capsys.readouterr().out.strip().split("\n")
        return json.loads(last)

    yield run
    torch.set_num_threads(threads)


def test_attention_is_timed_against_sdpa(run) -> None:
    rows = run("--lengths", "96", "--head-dims", "16", "--repeats", "2")
    assert {row["workload"] for row in rows} == set(benchmark.WORKLOADS)
    assert {row["peer"] for row in rows} == {"flash_two", "sdpa"}
    assert all(row["ms"] > 0 and row["gflops"] > 0 and row["ratio"] > 0 for row in rows)


def test_models_are_timed_against_eager(run, monkeypatch) -> None:
    monkeypatch.setattr(benchmark_model, "PEERS", ("flash_two", "eager"))
    sizes = "--lengths 40 --width 64 --layers 1 --repeats 1 --new-tokens 2".split()
    rows = run("--model", *sizes)
    assert {row["workload"] for row in rows} == set(benchmark_model.WORKLOADS)
    assert not [row for row in rows if "failed" in row]
    assert all(row["tokens_per_s"] > 0 for row in rows)


def test_a_peer_that_disagrees_is_not_timed(run, monkeypatch) -> None:
    attend = benchmark.F.scaled_dot_product_attention
    monkeypatch.setattr(
        benchmark.F, "scaled_dot_product_attention", lambda *a, **k: 1.01 * attend(*a, **k)
    )
    with pytest.raises(RuntimeError, match="sdpa disagrees"):
        run("--lengths", "64", "--head-dims", "16", "--workloads", "full", "--repeats", "1")


def test_an_unknown_workload_is_refused(run, capsys) -> None:
    with pytest.raises(SystemExit):
        run("--workloads", "softcap")
    assert "expected some of" in capsys.readouterr().err


def test_graphs_are_refused_where_there_are_none(run, capsys) -> None:
    with pytest.raises(SystemExit):
        run("--graphs")
    assert "use --device cuda" in capsys.readouterr().err
