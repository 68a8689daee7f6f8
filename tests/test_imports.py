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
    """hf_flash_two/kernels/params.py -> hf_flash_two.kernels.params"""
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
    "documents": ["masks"],
    "invariance": [],
    "kernels": ["documents", "masks", "tensor_cache", "kernels"],
    "op": ["kernels", "masks"],
    "attention": ["documents", "invariance", "op", "kernels", "masks"],
    "module": ["attention", "masks", "parallel"],
    "weights": ["attention", "kernels", "masks"],
    # Of the kernels the settings alone, for the ops on DTensors.
    "parallel": ["attention", "invariance", "kernels", "masks", "parallel", "tensor_cache"],
    "hf": [
        "attention",
        "documents",
        "invariance",
        "masks",
        "parallel",
        "tensor_cache",
        "hf",
        "weights",
    ],  # fmt: skip
    "testing": ["hf", "kernels", "op", "testing"],
    "doctor": ["attention", "hf", "kernels", "masks", "testing"],
    "__main__": ["doctor"],
    "__init__": [
        "attention",
        "invariance",
        "masks",
        "module",
        "parallel",
        "hf",
        "testing",
        "weights",
    ],  # fmt: skip
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
    if layer not in ("hf", "testing"):
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


def test_importing_changes_no_global_state_of_torch_or_accelerate() -> None:
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


REPLACED = """
modeling_utils.is_flash_attention_requested masking_utils.is_flash_attention_requested
generation.utils.is_flash_attention_requested masking_utils.and_masks masking_utils.or_masks
masking_utils.sliding_window_overlay masking_utils.chunked_overlay masking_utils.blockwise_overlay
masking_utils.sliding_window_bidirectional_overlay masking_utils.padding_mask_function
masking_utils.packed_sequence_mask_function masking_utils.remap_positions_for_packed_sequence
PreTrainedModel.post_init PreTrainedModel._check_and_adjust_attn_implementation
PreTrainedModel.set_attn_implementation GenerationMixin.init_continuous_batching
Accelerator._prepare_cp
"""


def test_importing_replaces_these_functions_of_other_packages_and_no_more() -> None:
    """Those of them that the installed Transformers has."""
    in_fresh_process(f"""
import sys
import accelerate, torch, transformers
from transformers import generation, masking_utils, modeling_utils
import transformers.generation.utils

def members():
    owners = {{
        name.removeprefix("transformers."): module for name, module in list(sys.modules.items())
        if name.partition(".")[0] in ("accelerate", "torch", "transformers")
    }}
    classes = (
        transformers.PreTrainedModel, transformers.GenerationMixin, accelerate.Accelerator
    )
    owners |= {{cls.__name__: cls for cls in classes}}
    for owner, holder in owners.items():
        # Whatever a class inherits counts: a function set on it hides that.
        for name in dir(holder) if isinstance(holder, type) else list(vars(holder)):
            value = getattr(holder, name) if isinstance(holder, type) else vars(holder)[name]
            if callable(value):
                yield owner + "." + name, value

before = dict(members())
import hf_flash_two
changed = {{name for name, value in members() if name in before and value != before[name]}}
expected = {{name for name in {REPLACED.split()} if name in before}}
assert changed == expected, changed ^ expected
""")


def test_public_names() -> None:
    assert hf_flash_two.__all__ == sorted(hf_flash_two.__all__)
    for name in hf_flash_two.__all__:
        assert getattr(hf_flash_two, name).__doc__
    assert hf_flash_two.__version__
    assert (ROOT / "py.typed").exists()
