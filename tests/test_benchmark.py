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
    assert {row["workload"] for row in rows} == {*benchmark.WORKLOADS, *benchmark.TERMS}
    assert all(row["ms"] > 0 and row["gflops"] > 0 and row["ratio"] > 0 for row in rows)
    for row in rows:
        baselines = {"sdpa"} if row["workload"] in benchmark.WORKLOADS else {"eager", "sdpa"}
        assert row["attention"] in {"flash_two", *baselines}


def test_a_busy_machine_is_told(run, monkeypatch) -> None:
    """The processes run while it is timed, and end with it."""
    started = []
    start = benchmark.subprocess.Popen

    def kept(*args):
        started.append(start(*args))
        return started[-1]

    monkeypatch.setattr(benchmark.subprocess, "Popen", kept)
    sizes = "--lengths 40 --head-dims 16 --repeats 1 --workloads causal --modes forward"
    rows = run(*sizes.split(), "--busy", "2")
    assert len(started) == 2 and all(process.poll() is not None for process in started)
    assert {row["busy"] for row in rows} == {2}
    assert all("busy" not in row for row in run(*sizes.split()))


def test_eager_is_the_dense_formula() -> None:
    """It is what score terms are compared with."""
    for workload in benchmark.TERMS:
        if workload != "dropout":
            case = benchmark.Case(workload, "fp32", 40, 16, "both", "cpu", 1, 2, 2)
            tensors, found = case.tensors(), benchmark.implementations(case, None)
            torch.testing.assert_close(found["flash_two"](*tensors), found["eager"](*tensors))


def test_models_are_timed_against_eager(run, monkeypatch) -> None:
    monkeypatch.setattr(benchmark_model, "IMPLEMENTATIONS", ("flash_two", "eager"))
    sizes = "--lengths 40 --width 64 --layers 1 --repeats 1 --new-tokens 2".split()
    rows = run("--model", *sizes)
    assert {row["workload"] for row in rows} == set(benchmark_model.WORKLOADS)
    assert not [row for row in rows if "failed" in row]
    assert all(row["tokens_per_s"] > 0 for row in rows)


def test_models_are_timed_against_any_that_is_named(run) -> None:
    """What this machine has not is a row that says so."""
    sizes = "--lengths 40 --width 64 --layers 1 --repeats 1 --workloads plain --modes train"
    rows = run("--model", *sizes.split(), "--baselines", "flash_attention_4", "eager")
    assert [row["attention"] for row in rows] == ["flash_two", "flash_attention_4", "eager"]
    assert ["failed" in row for row in rows] == [False, True, False]


def test_a_baseline_that_disagrees_is_not_timed(run, monkeypatch) -> None:
    attend = benchmark.F.scaled_dot_product_attention
    monkeypatch.setattr(
        benchmark.F, "scaled_dot_product_attention", lambda *a, **k: 1.01 * attend(*a, **k)
    )
    with pytest.raises(RuntimeError, match="sdpa disagrees"):
        run("--lengths", "64", "--head-dims", "16", "--workloads", "full", "--repeats", "1")


def test_a_missing_matplotlib_is_told_before_the_run(run, monkeypatch, capsys) -> None:
    monkeypatch.setattr(benchmark, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        run("--plot", "bars.png")
    assert "pip install matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize("options", ["", "--model --width 64 --layers 1 --new-tokens 1"])
def test_a_plot_that_fails_loses_no_result(options, run, monkeypatch, capsys) -> None:
    """Neither library nor file need be what they are said to be."""
    monkeypatch.setattr(benchmark, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    sizes = "--lengths 40 --workloads {} --repeats 1 --plot bars.png"
    sizes = sizes.format("plain --modes train" if options else "full --head-dims 16")
    with pytest.raises(ImportError):
        run(*sizes.split(), *options.split())
    *_, last = capsys.readouterr().out.strip().split("\n")
    assert json.loads(last)[0]["ms"] > 0


@pytest.mark.parametrize("timing", [benchmark, benchmark_model], ids=["attention", "models"])
def test_columns_do_not_touch(timing, capsys) -> None:
    row = {
        "workload": "softcapped", "mode": "backward", "dtype": "bfloat16", "length": 12345678,
        "head_dim": 12345, "batch": 1234, "attention": "sdpa-a-long-name-of-it", "ms": 1e9,
        "gflops": 1e12, "tokens_per_s": 1e12, "peak_mib": 1e12, "ratio": 0.4,
    }  # fmt: skip
    timing.show([row])
    head, shown = capsys.readouterr().out.strip().split("\n")
    columns = ["softcapped", "backward", "bfloat16", "12345678"]
    assert shown.split()[:4] == columns and len(shown.split()) == 11
    assert shown.endswith("2.50x slower") and len(head.split()) == 12


def test_faster_and_slower() -> None:
    assert benchmark_model.compared(1.25) == "1.25x faster"
    assert benchmark_model.compared(0.8) == "1.25x slower"


def test_an_unknown_workload_is_refused(run, capsys) -> None:
    with pytest.raises(SystemExit):
        run("--workloads", "plain")
    assert "expected some of" in capsys.readouterr().err


def test_graphs_are_refused_where_there_are_none(run, capsys) -> None:
    with pytest.raises(SystemExit):
        run("--graphs")
    assert "use --device cuda" in capsys.readouterr().err
