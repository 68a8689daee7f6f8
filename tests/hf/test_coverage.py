"""scripts/coverage on one family of each kind; that it notices what is wrong; its table."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from models import NOT_KNOWN, is_not_known

from hf_flash_two.hf import interface
from hf_flash_two.masks import AttentionMask
from scripts.coverage import overrides, table
from scripts.coverage.build import families
from scripts.coverage.compare import Row, check

ROOT = Path(__file__).parents[2]

FAMILIES = {family.name: family for family in families()}
# Windows, chunks, sinks, caps, biases, indices, documents laid end to end, masks as tensors.
INTERFACE = (
    "bart bert chinese_clip deepseek_v3 doge efficientloftr gemma2 gemma3 glm_moe_dsa gpt_oss "
    "kosmos2 llama llama4 mllama modernbert moonshine muse_glimmer_assistant nllb_moe parakeet "
    "phi3 qwen2_5_vl sam3 siglip t5 whisper"
).split()
OWN = (
    "bloom cvt deberta_v2 falcon fsmt gptj layoutlmv3 luke mpt prophetnet speecht5 swinv2 tapas "
    "wavlm xlnet"
).split()


def row_of(name: str) -> Row:
    if name not in FAMILIES:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return check(FAMILIES[name])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", INTERFACE + OWN)
def test_a_family_is_equal(name: str) -> None:
    row = row_of(name)
    if is_not_known(FAMILIES[name].build("eager")):
        assert (row.status, row.ours) == ("partly", 0)
        assert NOT_KNOWN in " ".join(row.notes)
        return
    assert row.status == "equal", row
    assert row.layers == row.ours > 0
    assert row.calls >= row.layers


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["flint", "gpt_oss", "mllama", "nllb_moe", "switch_transformers"])
def test_every_kind_of_layer_is_built(name: str) -> None:
    """A layer with experts, or with another attention, may change what the mask is used for."""
    if name not in FAMILIES:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    assert not FAMILIES[name].left_out()


@pytest.mark.filterwarnings("ignore")
def test_a_kind_of_layer_that_is_not_built_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(overrides.OVERRIDES, "nllb_moe", overrides.Override())
    assert "NllbMoeTop2Router" in FAMILIES["nllb_moe"].left_out()
    assert "not built: " in " ".join(row_of("nllb_moe").notes)


@pytest.mark.filterwarnings("ignore")
def test_a_family_of_another_one_s_classes() -> None:
    row = row_of("internlm3")
    assert (row.model, row.status) == ("LlamaForCausalLM", "equal")


def with_fault(monkeypatch: pytest.MonkeyPatch, fault: Callable[[dict], dict]) -> Row:
    attention = interface.flash_attention

    def faulty(*args, **kwargs):
        return attention(*args, **{**kwargs, **fault(kwargs)})

    monkeypatch.setattr(interface, "flash_attention", faulty)
    return row_of("llama")


def test_a_wrong_scale_differs_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    row = with_fault(monkeypatch, lambda given: {"scale": given["scale"] * 1.001})
    assert row.status == "differs"
    assert min(row.forward.values()) > 2e-5
    assert min(row.gradient.values()) > 1e-4


def test_lost_padding_differs_where_there_is_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    row = with_fault(monkeypatch, lambda _: {"mask": AttentionMask.causal()})
    assert row.status == "differs"
    assert row.forward["plain"] < 2e-5 < row.forward["left"]
    assert row.forward["packed"] > 2e-5


def test_a_gradient_that_stops_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = interface.flash_attention
    monkeypatch.setattr(
        interface,
        "flash_attention",
        lambda query, *args, **kwargs: attention(query.detach(), *args, **kwargs),
    )
    row = row_of("llama")
    assert row.status == "differs"
    assert max(row.forward.values()) < 2e-5 and min(row.gradient.values()) == float("inf")


def test_layers_that_run_their_own_code_are_counted() -> None:
    row = row_of("nystromformer")
    assert (row.kind, row.status, row.ours) == ("not softmax", "partly", 0)
    assert row.layers == 2
    assert "low-rank" in " ".join(row.notes)


def test_what_goes_wrong_is_an_error_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_, **__):
        raise ValueError("broken by hand")

    monkeypatch.setattr(interface, "flash_attention", broken)
    row = row_of("llama")
    assert row.status == "error"
    assert "broken by hand" in row.notes[0]


def families_on(page: str) -> list[str]:
    """The first column of all tables of families."""
    tables = page.split("\n| family |")[1:]
    return [name for table in tables for name in re.findall(r"^\| (\w+) \|", table, re.MULTILINE)]


def test_the_table_names_every_exception(tmp_path: Path) -> None:
    rows = [
        Row("right", kind="interface", status="equal", layers=2, ours=2, forward={"plain": 3e-7}),
        Row("wrong", kind="interface", status="differs", notes=["cause | one"]),
        Row("half", kind="own", status="partly", layers=2, ours=1, notes=["cause two"]),
        Row("mixed", kind="own", status="equal", layers=2, ours=1, notes=["cause four"]),
        Row("rest", kind="none", status="error", notes=["cause five"]),
        Row("other", kind="not softmax", status="partly", layers=1, notes=["cause three"]),
    ]
    table.write(rows, tmp_path)
    page = (tmp_path / "coverage.md").read_text()
    assert "interface | 2 | 1 | 0 | 1 |" in page
    assert "themselves | 2 | 1 | 1 | 1 |" in page
    assert "- `wrong`: differs. cause \\| one" in page
    assert "Not compared, the tables say why: `rest`." in page
    assert "- `half`: equal in part. cause two" in page
    assert "| right |  | 2/2 | equal | 3e-07 |" in page
    assert sorted(families_on(page)) == ["half", "mixed", "other", "rest", "right", "wrong"]


def test_the_table_in_the_documentation_is_whole() -> None:
    page = (ROOT / "docs" / "coverage.md").read_text()
    (version,) = re.findall(r"with transformers ([\d.]+),", page)
    if version != transformers.__version__:
        pytest.skip(f"written with transformers {version}")
    assert sorted(families_on(page)) == sorted(FAMILIES)


RUN = """
import json, sys
from scripts.coverage import __main__ as coverage, table

FAMILIES = {family.name: family for family in coverage.families()}
coverage.families = lambda: [FAMILIES["llama"], FAMILIES["gpt2"]]
table.write = lambda rows, folder: print(json.dumps([row.as_dict() for row in rows]))
sys.argv = ["coverage", "--progress", sys.argv[1]]
sys.exit(coverage.main())
"""


def test_a_run_that_was_interrupted_goes_on(tmp_path: Path) -> None:
    """In a process of its own: it forks, which those with threads of compilers must not do."""
    progress = tmp_path / "progress.jsonl"
    progress.write_text(json.dumps(Row("llama", notes=["done before"]).as_dict()) + "\n")
    run = subprocess.run(
        [sys.executable, "-c", RUN, progress], capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr
    assert not progress.exists()
    done, new = (Row(**row) for row in json.loads(run.stdout.strip().splitlines()[-1]))
    assert (done.family, done.notes) == ("llama", ["done before"])
    assert (new.family, new.status) == ("gpt2", "equal"), new
