"""`python -m hf_flash_two`: what it says of versions, kernels and the machine; when it fails."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from machine import GPU

from hf_flash_two import doctor, kernels
from hf_flash_two.testing import kernel_calls

FEATURES = """full,causal,window,padding,packed,constant bias,softcap,alibi,sinks,dropout,float32,
bfloat16,float16,head dim 64,head dim 128,head dim 256,decode""".replace("\n", "").split(",")

INPUTS = ("query", "key", "value")


@pytest.fixture(scope="module")
def report() -> dict:
    command = [sys.executable, "-m", "hf_flash_two", "--json"]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return json.loads(finished.stdout)


def test_every_kernel_is_right_or_says_why_it_declines(report: dict) -> None:
    states = {name: test["state"] for name, test in report["self_tests"].items()}
    assert states.keys() == {*kernels.NAMES} - {"auto"}
    assert states["blockwise"] == states["fused_cpu"] == "passed"
    assert (states["triton"] == "passed") == GPU
    if states["hopper"] == "declined":
        assert "Hopper GPU" in report["self_tests"]["hopper"]["result"]


def test_every_feature_has_a_kernel_for_both_passes(report: dict) -> None:
    chosen = report["kernels"]["of"]
    assert list(chosen) == FEATURES
    for passes in chosen.values():
        assert passes.keys() == {"forward", "backward"}
        assert {*passes.values()} <= {*kernels.NAMES} - {"auto"}


@pytest.mark.parametrize("feature", ["causal", "padding", "packed", "softcap", "sinks", "decode"])
def test_the_kernels_named_are_those_that_run(feature: str, monkeypatch) -> None:
    """With fewer tokens, so that it takes no time."""
    monkeypatch.setattr(doctor, "_LENGTH", 192)
    device = torch.device("cuda" if GPU else "cpu")
    call = dict(doctor._features(device, torch.float32))[feature]
    filled = [x.normal_().requires_grad_() for x in (call.query, call.key, call.value)]
    options = {name: value for name, value in call._asdict().items() if name not in INPUTS}
    with kernel_calls(backward=True) as calls:
        doctor.flash_attention(*filled, **options).sum().backward()
    assert {x.direction: x.kernel for x in calls} == doctor._kernels_of(call)


def test_versions_are_tested_by_their_minor_part(monkeypatch) -> None:
    installed = {"torch": "2.15.3+cu130", "triton": "99.1.0", "transformers": "5.24.1"}
    monkeypatch.setattr(doctor, "version", lambda name: installed.get(name, "1.15.0"))
    versions = doctor._versions()
    tested = {name: versions[name]["tested"] for name in installed}
    assert tested == {"torch": True, "triton": False, "transformers": True}
    report = doctor.examine()
    assert any(
        line.startswith("triton 99.1.0 is not among those tested (3.6, ")
        for line in report["notes"]
    )
    assert any("newer than those that they were tried with" in line for line in report["notes"])
    assert not report["problems"]


def test_a_version_known_to_be_bad_is_a_problem(monkeypatch, capsys) -> None:
    monkeypatch.setattr(doctor, "version", lambda name: "3.5.1")
    assert doctor.main([]) == 1
    said = capsys.readouterr().out
    assert "Problems\n  the Hopper kernels: Triton 3.5.1 does not suit them" in said
    assert "No problems found" not in said


def test_without_triton(monkeypatch, capsys) -> None:
    def version(name: str) -> str:
        if name == "triton":
            raise doctor.PackageNotFoundError
        return "1.0"

    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr(doctor, "packages_distributions", dict)
    assert doctor.main([]) == 0
    said = capsys.readouterr().out
    assert "triton         not installed\n" in said and "Triton is not installed" in said


@pytest.mark.parametrize("fault", ["output", "gradient", "raises"])
def test_a_kernel_that_computes_wrongly_is_a_problem(fault: str, monkeypatch, capsys) -> None:
    def attention(query, key, value, mask, kernel):
        if kernel == "blockwise" and fault == "raises":
            raise RuntimeError("a reason\nand more")
        # By so little that it could be rounding in half precision.
        if fault == "gradient":
            value = value + 1e-3 * (value - value.detach())
        out = right(query, key, value, mask=mask, kernel=kernel)
        return out + 1e-3 if fault == "output" else out

    right = doctor.flash_attention
    monkeypatch.setattr(doctor, "flash_attention", attention)
    monkeypatch.setattr(doctor, "_device_and_dtype", lambda: (torch.device("cpu"), torch.float32))
    assert doctor.main([]) == 1
    said = capsys.readouterr().out
    assert "  blockwise      failed    on cpu in float32: " in said
    assert ("RuntimeError: a reason\n" in said) == (fault == "raises")


def test_the_compiler_is_the_one_that_triton_takes(monkeypatch, tmp_path) -> None:
    found = {"gcc": "/bin/gcc", "clang": "/bin/clang"}
    monkeypatch.setattr(doctor.shutil, "which", found.get)
    monkeypatch.delenv("CC", raising=False)
    assert doctor._c_compiler() == "/bin/gcc"
    del found["gcc"]
    assert doctor._c_compiler() == "/bin/clang"
    monkeypatch.setenv("CC", "none")
    assert doctor._c_compiler() is None


def test_what_a_gpu_lacks_is_said(monkeypatch) -> None:
    machine = doctor._machine() | {"gpus": [None], "c_compiler": None, "python_headers": None}
    monkeypatch.setattr(doctor, "_machine", lambda: machine)
    monkeypatch.setattr(doctor, "_installed", lambda name: "3.6.0")
    notes = doctor.examine()["notes"]
    assert any(
        "no C compiler" in note and "CUDA toolkit and nvcc are not needed" in note for note in notes
    )
    assert any("no Python.h" in note for note in notes)


def test_what_transformers_makes_impossible_is_said(monkeypatch) -> None:
    monkeypatch.setitem(doctor.compat._missing, "serving", "a name is missing")
    notes = doctor.examine()["notes"]
    assert any(note.startswith("continuous batching: not possible with") for note in notes)
