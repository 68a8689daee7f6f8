"""What importing the package brings in, and that imports point one way only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hf_flash_two

ROOT = Path(hf_flash_two.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))


def name_of(path: Path) -> str:
    """hf_flash_two/kernels/blockwise.py -> hf_flash_two.kernels.blockwise"""
    return ".".join([ROOT.name, *path.relative_to(ROOT).with_suffix("").parts])


def imports_of(path: Path) -> set[str]:
    """Every module named in an import, at the top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def in_fresh_process(code: str) -> str:
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


# Where each layer may reach inside the package; a name stands for all that is below it.
MAY_IMPORT = {
    "tensor_cache": [],
    "masks": ["tensor_cache"],
    "kernels": ["masks", "tensor_cache", "kernels"],
    "op": ["kernels", "masks"],
    "attention": ["op", "kernels", "masks"],
    "module": ["attention", "masks", "parallel"],
    "parallel": ["attention", "op", "masks", "parallel"],
    "hf": ["attention", "kernels", "masks", "tensor_cache", "hf", "parallel"],
    "__init__": ["attention", "masks", "module", "parallel", "hf"],
}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path: Path) -> None:
    layer = path.relative_to(ROOT).with_suffix("").parts[0]
    inside = {name for name in imports_of(path) if name.startswith("hf_flash_two.")}
    for name in inside:
        assert name.split(".")[1] in MAY_IMPORT[layer], f"{layer} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_other_packages_stay_in_their_places(path: Path) -> None:
    layer = path.relative_to(ROOT).with_suffix("").parts[0]
    packages = {name.split(".")[0] for name in imports_of(path)}
    if layer != "hf":
        assert not packages & {"transformers", "peft", "trl"}
    if layer != "parallel":
        assert "accelerate" not in packages
    if layer != "kernels":
        assert "triton" not in packages


def test_the_kernels_do_not_need_transformers() -> None:
    """The layers up to the attention, loaded as a package without its front door."""
    in_fresh_process(f"""
import importlib, sys, types
package = types.ModuleType("hf_flash_two")
package.__path__ = [{str(ROOT)!r}]
sys.modules["hf_flash_two"] = package
sys.modules["transformers"] = sys.modules["accelerate"] = None
import torch
attention = importlib.import_module("hf_flash_two.attention")
x = torch.ones(1, 1, 3, 4)
assert torch.equal(attention.flash_attention(x, x, x), x)
""")


def test_triton_is_not_needed() -> None:
    """Without it the package imports and computes; asked for by name it says what is missing."""
    in_fresh_process("""
import sys
from importlib.machinery import PathFinder

class NoTriton(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            return None
        return super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = NoTriton
import torch
from hf_flash_two import flash_attention
assert "triton" not in sys.modules
x = torch.ones(1, 1, 3, 4)
assert torch.equal(flash_attention(x, x, x), x)
try:
    flash_attention(x, x, x, kernel="triton")
except ValueError as error:
    assert "not installed" in str(error), error
else:
    raise AssertionError("nothing was raised")
""")


def test_importing_touches_nothing() -> None:
    """No process group, no accelerator state, no threads setting, no random number."""
    in_fresh_process("""
import torch
before = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()
import hf_flash_two
from accelerate.state import PartialState
assert not PartialState._shared_state
assert not torch.distributed.is_initialized() and not torch.cuda.is_initialized()
after = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()
assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
""")


def test_public_names() -> None:
    assert hf_flash_two.__all__ == sorted(hf_flash_two.__all__)
    for name in hf_flash_two.__all__:
        assert getattr(hf_flash_two, name).__doc__
    assert hf_flash_two.__version__
    assert (ROOT / "py.typed").exists()
