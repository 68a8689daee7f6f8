"""What README.md and CONTRIBUTING.md say of `make`, by the commands that it would run."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def commands(*arguments: str) -> str:
    # A make that runs the tests hands its own variables on.
    alone = {"PATH": os.environ["PATH"]}
    command = ["make", "--dry-run", *arguments]
    finished = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.fixture
def installed(tmp_path: Path) -> str:
    """The argument that names an environment which is ready."""
    (tmp_path / ".installed").touch()
    return f"VENV={tmp_path}"


@pytest.mark.parametrize("target", ["demo", "test"])
def test_the_environment_is_made_once(target: str, tmp_path: Path, installed: str) -> None:
    first = commands(target, f"VENV={tmp_path / 'none'}")
    assert "pip install -c constraints.txt -e '.[test]'" in first
    assert "pip" not in commands(target, installed)


def test_another_build_of_pytorch(tmp_path: Path) -> None:
    torch = "TORCH=torch==2.15.0 --index-url URL"
    first, second, third = (
        line for line in commands("demo", f"VENV={tmp_path / 'none'}", torch).splitlines()
        if "constraints" in line or "pip" in line
    )  # fmt: skip
    assert first.endswith("pip install torch==2.15.0 --index-url URL")
    assert "sed" in second and "torch|triton" in second
    assert "-c " in third and "constraints.txt -e '.[test]'" in third


def test_the_demo_trains_and_compares(installed: str) -> None:
    run = commands("demo", installed)
    assert "scripts/finetune.py" in run and "--compare eager" in run


def test_the_tests_run_twice(installed: str) -> None:
    """All of them on as many processes as wanted, then kernels in Triton's interpreter."""
    suite, kernels = commands("test", installed).replace("\\\n", "").splitlines()[1:]
    assert "-n 2" in suite and "TRITON_INTERPRET" not in suite
    assert "TRITON_INTERPRET=1" in kernels and "tests/kernel" in kernels
    assert "-n 7" in commands("test", installed, "JOBS=7")


def test_clean_removes_the_environment() -> None:
    assert "rm -rf .venv " in commands("clean")
