"""What this installation has, whether each kernel computes right here, and which is used for what.

Nothing is changed and no model is loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from packaging.version import Version
from torch import Tensor

import hf_flash_two
from hf_flash_two.attention import Settings, flash_attention, validated
from hf_flash_two.hf import compat
from hf_flash_two.kernels import NAMES, declines, select
from hf_flash_two.kernels.fused_cpu.choice import has_products
from hf_flash_two.kernels.hopper.versions import unfit
from hf_flash_two.kernels.params import AttentionParams
from hf_flash_two.masks import AttentionMask
from hf_flash_two.testing.errors import relative_error

_PACKAGES = ("torch", "triton", "transformers", "accelerate")
_TESTED = Path(__file__).with_name("tested_versions.json")
_LENGTH = 4096
"""Tokens of the calls that kernels are selected for."""
_QUERIES, _KEYS, _PADDED = 67, 83, 20
"""Of the call that kernels are tested with."""
_PASSES = {"forward": False, "backward": True}
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
_NO_COMPILER = (
    "no C compiler: Triton builds its link to the driver with one the first time a kernel runs on "
    "a GPU. Install gcc or clang (apt install gcc, dnf install gcc, conda install gcc), or name "
    "one in CC. A CUDA toolkit and nvcc are not needed"
)
_NO_HEADERS = (
    "no Python.h: Triton compiles against it. Install the headers of this Python (apt install "
    "python3-dev, dnf install python3-devel)"
)


def main(arguments: list[str] | None = None) -> int:
    """Prints the report; 1 if it names a problem, else 0."""
    parser = argparse.ArgumentParser(prog="python -m hf_flash_two", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    as_json = parser.parse_args(arguments).json
    report = examine()
    print(json.dumps(report, indent=1) if as_json else as_text(report))
    return 1 if report["problems"] else 0


def examine() -> dict[str, Any]:
    """The report, of types that JSON has.

    ``problems`` are self-tests that failed and versions known to be bad; ``notes`` is what else
    there is to do or to know.
    """
    device, dtype = _device_and_dtype()
    versions, tests = _versions(), {name: _self_test(name) for name in NAMES if name != "auto"}
    machine = _machine()
    problems = [
        f"{name}: {test['result']}" for name, test in tests.items() if test["state"] == "failed"
    ]
    notes = list(_refused())
    triton = versions["triton"]["installed"]
    if triton is None:
        notes.append("Triton is not installed: GPUs are served by plain PyTorch")
    elif reason := unfit(triton, by_name=True):
        problems.append(f"the Hopper kernels: {reason}")
    elif reason := unfit(triton, by_name=False):
        notes.append(f"the Hopper kernels: {reason}")
    if triton is not None and machine["gpus"]:
        notes += [] if machine["c_compiler"] else [_NO_COMPILER]
        notes += [] if machine["python_headers"] else [_NO_HEADERS]
    for name, found in versions.items():
        if found["installed"] is not None and not found["tested"]:
            tested = ", ".join(found["tested_versions"])
            notes.append(f"{name} {found['installed']} is not among those tested ({tested})")
    return {
        "hf_flash_two": hf_flash_two.__version__,
        "versions": versions,
        "machine": machine,
        "self_tests": tests,
        "kernels": {
            "device": str(device),
            "dtype": _name(dtype),
            "length": _LENGTH,
            "of": {feature: _kernels_of(call) for feature, call in _features(device, dtype)},
        },
        "problems": problems,
        "notes": notes,
    }


# What is installed


def _versions() -> dict[str, dict[str, Any]]:
    """Of Python and packages; tested are those of a minor version with which all tests passed."""
    runs = [run for run in json.loads(_TESTED.read_text()) if not run["failed"]]
    found = {"python": platform.python_version()} | {name: _installed(name) for name in _PACKAGES}
    versions = {}
    for name, number in found.items():
        tested = sorted({_minor(run[name]) for run in runs if run[name]})
        versions[name] = {
            "installed": number,
            "tested": number is not None and _minor(number) in tested,
            "tested_versions": [".".join(map(str, x)) for x in tested],
        }
    return versions


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        # Builds for other GPUs have other names.
        names = packages_distributions().get(package)
        return version(names[0]) if names else None


def _minor(number: str) -> tuple[int, ...]:
    """(3, 7) of 3.7.1."""
    return Version(number).release[:2]


def _refused() -> Iterator[str]:
    """What the installed Transformers makes impossible."""
    for feature in compat.NAMES:
        try:
            compat.require(feature)
        except NotImplementedError as error:
            yield str(error)


# The machine


def _machine() -> dict[str, Any]:
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "torch_build": _torch_build(),
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "cpu": {
            "capability": torch.backends.cpu.get_cpu_capability(),
            "amx": _has_amx(),
            "bfloat16_products": has_products(torch.bfloat16),
            "float16_products": has_products(torch.float16),
            "threads": torch.get_num_threads(),
        },
        "c_compiler": _c_compiler(),
        "python_headers": _python_headers(),
    }


def _torch_build() -> str:
    if torch.version.hip is not None:
        return f"ROCm {torch.version.hip}"
    return "no CUDA" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }


def _has_amx() -> bool | None:
    """None where this PyTorch does not say."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    return None if capabilities is None else bool(capabilities().get("amx_tile", False))


def _c_compiler() -> str | None:
    """The one that Triton takes."""
    if named := os.environ.get("CC"):
        return shutil.which(named)
    return shutil.which("gcc") or shutil.which("clang")


def _python_headers() -> str | None:
    scheme = sysconfig.get_default_scheme()
    # Debian's own scheme of local packages has no headers; Triton looks here, too.
    scheme = "posix_prefix" if scheme == "posix_local" else scheme
    path = Path(sysconfig.get_paths(scheme)["include"], "Python.h")
    return str(path) if path.exists() else None


def _device_and_dtype() -> tuple[torch.device, torch.dtype]:
    """Where a model would run here, and in what."""
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return torch.device("cpu"), torch.float32
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return device, torch.float16
    return device, torch.bfloat16


# What is used for what


class _Call(NamedTuple):
    """Arguments of `flash_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: AttentionMask
    softcap: float | None = None
    dropout_p: float = 0.0
    bias: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None

    @property
    def given(self) -> tuple[Tensor, Tensor, Tensor, AttentionParams]:
        """The arguments as kernels take them."""
        settings = Settings(softcap=self.softcap, dropout_p=self.dropout_p)
        terms = self.bias, self.alibi_slopes, self.sinks, None
        return validated(self.query, self.key, self.value, self.mask, settings, *terms)


def _kernels_of(call: _Call) -> dict[str, str]:
    """The kernels that compute its forward and its backward."""
    return {
        name: select("auto", *call.given, backward=backward).name
        for name, backward in _PASSES.items()
    }


def _features(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, _Call]]:
    """Calls whose tensors hold nothing yet: a kernel is selected by shapes and masks."""

    def causal(head_dim: int = 128, of: torch.dtype = dtype, queries: int = _LENGTH) -> _Call:
        query = torch.empty(1, heads, queries, head_dim, device=device, dtype=of)
        key, value = torch.empty(2, 1, 2, _LENGTH, head_dim, device=device, dtype=of).unbind()
        return _Call(query, key, value, AttentionMask.causal())

    heads = 8
    token, plain = torch.arange(_LENGTH, device=device), causal()
    per_head = torch.ones(heads, device=device)
    padding = AttentionMask.from_padding(token >= 100)
    documents = AttentionMask.from_documents(segment_ids=token // 512, causal=True)
    yield "full", plain._replace(mask=AttentionMask.full())
    yield "causal", plain
    yield "window", plain._replace(mask=AttentionMask.causal(window=1024))
    yield "padding", plain._replace(mask=plain.mask & padding)
    yield "packed", plain._replace(mask=documents)
    yield "constant bias", plain._replace(bias=torch.empty(1, 1, _LENGTH, _LENGTH, device=device))
    yield "softcap", plain._replace(softcap=50.0)
    yield "alibi", plain._replace(alibi_slopes=per_head)
    yield "sinks", plain._replace(sinks=per_head)
    yield "dropout", plain._replace(dropout_p=0.1)
    for of in (torch.float32, torch.bfloat16, torch.float16):
        yield _name(of), causal(of=of)
    for head_dim in (64, 128, 256):
        yield f"head dim {head_dim}", causal(head_dim)
    yield "decode", causal(queries=1)


# Whether it computes right


def _self_test(name: str) -> dict[str, str]:
    """A kernel's forward and backward on the first device where it computes a small call."""
    reasons = []
    for device, dtype in dict.fromkeys([_device_and_dtype(), (torch.device("cpu"), torch.float32)]):
        call = _small_call(device, dtype)
        asked = [declines(name, *call.given, backward=x) for x in _PASSES.values()]
        if any(asked):
            reasons += asked
            continue
        where = f"on {device.type} in {_name(dtype)}"
        try:
            errors = _errors(call, name)
        except Exception as error:
            message = str(error).partition("\n")[0]
            return {"state": "failed", "result": f"{where}: {type(error).__name__}: {message}"}
        right = all(x <= _TOLERANCE[dtype] for x in errors.values())
        numbers = ", ".join(f"{of} {x:.0e}" for of, x in errors.items())
        return {"state": "passed" if right else "failed", "result": f"{where}: {numbers}"}
    return {"state": "declined", "result": next(reason for reason in reasons if reason)}


def _small_call(device: torch.device, dtype: torch.dtype) -> _Call:
    """Grouped heads, odd lengths, padding and queries that see nothing."""
    generator = torch.Generator().manual_seed(0)

    def random(heads: int, length: int) -> Tensor:
        tensor = torch.randn(2, heads, length, 64, generator=generator)
        return tensor.to(device, dtype).requires_grad_()

    start = torch.tensor([[0], [_PADDED]], device=device)
    padding = AttentionMask.from_padding(torch.arange(_KEYS, device=device) >= start)
    mask = AttentionMask.causal() & padding
    return _Call(random(4, _QUERIES), random(2, _KEYS), random(2, _KEYS), mask)


def _errors(call: _Call, name: str) -> dict[str, float]:
    """The largest differences of output and gradients from `_dense` of the same numbers."""
    query, key, value, mask, *_ = call
    attention = partial(flash_attention, mask=mask, kernel=name)
    computed = _with_gradients(attention, query, key, value)
    token, start = torch.arange(_KEYS), torch.tensor([0, _PADDED])[:, None, None, None]
    visible = (token <= token[_KEYS - _QUERIES :, None]) & (token >= start)
    exact = (x.detach().cpu().double().requires_grad_() for x in (query, key, value))
    expected = _with_gradients(partial(_dense, visible=visible), *exact)
    errors = [relative_error(x.cpu(), y) for x, y in zip(computed, expected, strict=True)]
    return {"forward": errors[0], "backward": max(errors[1:])}


def _with_gradients(attention: Callable[..., Any], *inputs: Tensor) -> list[Tensor]:
    """The output, and the gradients for one of it that every dtype holds exactly."""
    out = attention(*inputs)
    d_out = (torch.arange(out.numel()) % 7 - 3).reshape(out.shape).to(out)
    return [out.detach(), *torch.autograd.grad(out, inputs, d_out)]


def _dense(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """Attention as the textbook writes it; a query that sees nothing gets 0."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.mT * query.shape[3] ** -0.5
    weights = scores.masked_fill(~visible, -1e30).softmax(-1) * visible.any(-1, keepdim=True)
    return weights @ value


# In words


def as_text(report: dict[str, Any]) -> str:
    """`examine`'s report for a person."""
    chosen = report["kernels"]
    lines = [f"hf_flash_two {report['hf_flash_two']}", "", "Versions"]
    for name, found in report["versions"].items():
        number = found["installed"] or "not installed"
        state = "tested" if found["tested"] else "not tested" if found["installed"] else ""
        lines.append(f"  {name:15}{number:16}{state}".rstrip())
    lines += ["", "Machine", *(f"  {what:15}{said}" for what, said in _machine_rows(report))]
    lines += ["", "Self-tests: the largest differences from the dense formula in float64"]
    for name, test in report["self_tests"].items():
        lines.append(f"  {name:15}{test['state']:10}{test['result']}")
    lines += [
        "",
        f"Kernels that kernel='auto' takes on {chosen['device']}: {chosen['dtype']}, causal, "
        f"{chosen['length']} tokens, head dim 128, but for",
        f"  {'':15}{'forward':14}backward",
    ]
    for feature, passes in chosen["of"].items():
        lines.append(f"  {feature:15}{passes['forward']:14}{passes['backward']}")
    for title in ("notes", "problems"):
        if report[title]:
            lines += ["", title.capitalize(), *(f"  {line}" for line in report[title])]
    return "\n".join(lines if report["problems"] else [*lines, "", "No problems found."])


def _machine_rows(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    machine, cpu = report["machine"], report["machine"]["cpu"]
    said = {True: "yes", False: "no", None: "unknown"}
    yield "platform", machine["platform"]
    yield "PyTorch for", machine["torch_build"]
    for gpu in machine["gpus"]:
        capability, memory = gpu["compute_capability"], gpu["memory_gib"]
        yield "GPU", f"{gpu['name']}, compute capability {capability}, {memory} GiB"
    if not machine["gpus"]:
        yield "GPU", "none that PyTorch sees"
    yield "CPU", f"{cpu['capability']}, threads: {cpu['threads']}, AMX: {said[cpu['amx']]}"
    bfloat16, float16 = (said[cpu[f"{name}_products"]] for name in ("bfloat16", "float16"))
    yield "fast products", f"bfloat16: {bfloat16}, float16: {float16}"
    yield "C compiler", machine["c_compiler"] or "none"
    yield "Python.h", machine["python_headers"] or "none"
    yield "", "Triton needs these two at first use on a GPU, and no CUDA toolkit."


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
