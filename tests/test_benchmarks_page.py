"""scripts/benchmarks_page.py: what a benchmark printed is entered; the page is what was entered."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import benchmark  # noqa: E402
import benchmarks_page  # noqa: E402
import small_calls  # noqa: E402

CASE = {"dtype": "bf16", "length": 4096, "head_dim": 128, "heads": 32, "key_heads": 8, "batch": 4}
GPU = CASE | {"device": "cuda", "workload": "window", "mode": "forward"}
MODEL = {"workload": "packed", "mode": "train", "length": 1024, "batch": 2, "layers": 8}


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "page.md").write_text("# Speed\n\n<!-- here -->\n\nEnd.\n")
    return tmp_path


@pytest.fixture
def enter(docs: Path, monkeypatch: pytest.MonkeyPatch):
    def enter(output: str, *options: str) -> str:
        (docs / "run.txt").write_text(output)
        command = ["benchmarks_page.py", "--docs", str(docs), *options]
        command += ["--enter", str(docs / "run.txt"), "--into", "here"]
        monkeypatch.setattr(sys, "argv", command)
        assert benchmarks_page.main() == 0
        return (docs / "benchmarks.md").read_text()

    return enter


def printed(*rows: dict) -> str:
    return f"A GPU | 2 threads | torch 2.99.0 | 2026-01-02 | median of 7\n\n{json.dumps(rows)}\n"


def test_a_pass_that_was_not_timed_is_a_dash(enter) -> None:
    backward = GPU | {"mode": "backward"}
    page = enter(
        printed(
            GPU | {"attention": "flash_two", "gflops": 700_000.0, "ms": 1.0},
            backward | {"attention": "flash_two", "gflops": 600_000.0, "ms": 1.0},
            backward | {"attention": "fa4-ordered", "gflops": 500_000.0, "ms": 1.0},
            GPU | {"workload": "documents", "attention": "flash_two", "gflops": 1000.0, "ms": 1.0},
        )
    )
    assert "| window of 1024 | 4 x 4096 | 32 over 8 | 128 | 700 / 600 | - / 500 |" in page
    assert "| ten packed documents of 37 to 4096 | 4 x 4096 | 32 over 8 | 128 | 1 | - |" in page


def test_a_run_stands_where_the_text_wants_it(enter) -> None:
    backward = GPU | {"mode": "backward"}
    page = enter(
        printed(
            GPU | {"attention": "flash_two", "gflops": 401_400.0, "ms": 1.0},
            backward | {"attention": "flash_two", "gflops": 300_000.0, "ms": 1.0},
            GPU | {"attention": "sdpa", "ratio": 5.71},
            backward | {"attention": "sdpa", "ratio": 1.234},
            GPU | {"attention": "flex_attention", "failed": "out of memory"},
        )
    )
    head, *_, end = page.split("\n\n")
    assert head == "# Speed" and end == "End.\n"
    assert "A GPU, 2 threads, PyTorch 2.99.0, 2026-01-02, medians of 7." in page
    assert (
        "| window of 1024 | 4 x 4096 | 32 over 8 | 128 | 401 / 300 | 5.7 / 1.23 x slower | "
        "out of memory |"
    ) in page


def test_decoding_is_told_by_how_fast_the_cache_is_read(enter) -> None:
    """Two bytes of the cache serve two FLOP of each of the four heads that share them."""
    page = enter(
        printed(GPU | {"workload": "decode", "attention": "flash_two", "gflops": 14_000.0})
    )
    assert "| 4 rows | 4096 | 32 over 8 | 128 | 3.5 |" in page


def test_models_have_a_table_of_their_own(enter) -> None:
    page = enter(
        printed(
            MODEL | {"attention": "flash_two", "ms": 123.4, "peak_mib": 5678.9},
            MODEL | {"attention": "eager", "failed": "out of memory"},
        )
    )
    assert "packed documents of 512 | train | 1 x 2048 | 123, 5679 | out of memory |" in page


def test_what_the_benchmark_prints_can_be_entered(enter, monkeypatch, capsys) -> None:
    threads = torch.get_num_threads()
    command = "benchmark.py --device cpu --lengths 64 --head-dims 16 --repeats 1 --workloads full"
    monkeypatch.setattr(sys, "argv", command.split())
    benchmark.main()
    torch.set_num_threads(threads)
    page = enter(capsys.readouterr().out, "--machine", "this one")
    assert f"this one, 2 threads, PyTorch {torch.__version__}" in page
    assert "times faster than `sdpa`" in page and "| full | 1 x 64 | 8 | 16 | " in page


def test_measured_memory_can_be_entered(enter, monkeypatch, capsys) -> None:
    measured = json.dumps({"tensors": 100.0, "peak": 126.4})
    monkeypatch.setattr(benchmark.subprocess, "check_output", lambda *args, **options: measured)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--device", "cpu", "--memory"])
    threads = torch.get_num_threads()
    benchmark.main()
    torch.set_num_threads(threads)
    assert "| bf16 | 128 | 26 |" in enter(capsys.readouterr().out)


def test_what_bucket_sizes_prints_can_be_entered(enter) -> None:
    page = enter(
        "2 threads of x86_64, torch 2.99.0, 2026-01-02:\n"
        "4096 tokens, 8 heads of 64, causal, float32, forward and backward.\n\n"
        "| q_bucket_size | k_bucket_size | ms | peak MiB |\n|---:|---:|---:|---:|\n"
        "| 512 | 1024 | 1158 | 84 |\n"
    )
    assert "2 threads of x86_64, PyTorch 2.99.0, 4096 tokens" in page
    assert "| 512 | 1024 | 1158 | 84 |" in page


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("Traceback (most recent call last):\n", "expected the output of scripts/benchmark.py"),
        (printed().replace("[]", ""), "the run has no row"),
    ],
)
def test_what_is_no_run_is_refused(output, message, enter, docs, capsys) -> None:
    with pytest.raises(SystemExit):
        enter(output)
    assert message in capsys.readouterr().err
    assert not (docs / "benchmarks" / "here.json").exists()


def test_a_run_that_the_text_leaves_out_is_told(enter, docs, capsys) -> None:
    (docs / "benchmarks" / "lost.json").write_text("{}")
    with pytest.raises(SystemExit):
        enter(printed(GPU | {"attention": "flash_two", "gflops": 1.0}))
    assert "['lost']" in capsys.readouterr().err


def test_the_page_in_the_documentation_is_what_the_script_writes() -> None:
    page = benchmarks_page.page(ROOT / "docs" / "benchmarks")
    assert (ROOT / "docs" / "benchmarks.md").read_text() == page


def test_small_calls_in_microseconds(enter) -> None:
    rows = small_calls.measure("cpu", 4, torch.float32, in_a_row=1, repeats=1)
    rows[2]["us"] = {"flash_two": 9.5, "sdpa": 8.0, "floor": 3.0}
    text = enter(f"CPU | 2 threads | torch 2.15.0 | 2026-11-26 | median of 1\n{json.dumps(rows)}\n")
    assert "| us | T | `flash_two` | `sdpa` | autograd alone |" in text
    assert "| forward + backward | 4 | 9.5 | 8.0 | 3.0 |" in text
