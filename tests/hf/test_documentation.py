"""Snippets of the documents run, their commands take the options shown, their links lead somewhere.

Those of docs/training.md run in test_stacks.py, those of docs/branches.md that need TRL in
test_prefix_tree.py, those of docs/masks.md in tests/test_mask_page.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers
from documentation import ROOT, anchors, run, snippets
from models import DECODERS
from transformers import ByT5Tokenizer

from hf_flash_two.hf.families import BRANCHABLE, NOT_POSSIBLE, SHARDABLE, UNLESS

DOCS = ROOT / "docs"
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("*.md"))]
NAMED = [pytest.param(path, id=path.name) for path in DOCUMENTS]
# Snippets that call no model.
PREPARES = ("patch(model)", "register_attention")


@pytest.mark.parametrize(
    "code",
    [
        *snippets(ROOT / "README.md"),
        *snippets(DOCS / "models.md"),
        *snippets(DOCS / "serving.md"),
        *snippets(DOCS / "parity.md"),
        *(x for x in snippets(DOCS / "branches.md") if "import DPO" not in x.values[0]),
        *snippets(DOCS / "troubleshooting.md"),
        snippets(DOCS / "module.md", alone=True)[0],
        *snippets(DOCS / "numerics.md"),
        *snippets(DOCS / "batch_invariance.md"),
        *snippets(DOCS / "weights.md"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_snippet(code: str, kernel_calls, monkeypatch, tmp_path) -> None:
    tokenizer = ByT5Tokenizer()
    family = next(family for family in DECODERS if family.name == "qwen3")
    end = tokenizer.eos_token_id
    model = family.build("eager", vocab_size=len(tokenizer), eos_token_id=end)
    model.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    # Inductor would compile C++ for a minute.
    run(code.replace("fullgraph=True", "fullgraph=True, backend='eager'"))
    torch._dynamo.reset()
    assert kernel_calls or any(name in code for name in PREPARES)


@pytest.mark.parametrize("path", NAMED)
def test_commands_in_documents_exist_with_their_options(path: Path) -> None:
    text = path.read_text().replace("\\\n", " ")
    makefile = (ROOT / "Makefile").read_text()
    for script, options in re.findall(r"(scripts/\w+\.py)([^\n`#]*)", text):
        source = (ROOT / script).read_text()
        for option in re.findall(r"--[a-z-]+", options.replace("--help", "")):
            assert f'"{option}"' in source, f"{script} {option}"
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), f"make {target}"


@pytest.mark.parametrize("path", NAMED)
def test_relative_links_lead_somewhere(path: Path) -> None:
    text = path.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        other = path.parent / name if name else path
        assert other.exists(), target
        assert not anchor or anchor in anchors(other), target


def test_every_page_is_linked_from_the_readme() -> None:
    linked = set(re.findall(r"\]\(docs/(\w+\.md)", (ROOT / "README.md").read_text()))
    # What developers read is a page further.
    linked |= set(re.findall(r"\]\((\w+\.md)", (DOCS / "design.md").read_text()))
    assert not {path.name for path in DOCS.glob("*.md")} - linked


def test_the_readme_is_short_and_quotes_the_benchmarks() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 180
    speed = readme.partition("## Speed")[2].partition("\n## ")[0]
    benchmarks = (DOCS / "benchmarks.md").read_text()
    quoted = [x for line in speed.splitlines() for x in re.findall(r"\d+(?= ms)", line)]
    assert len(quoted) == 6 and all(re.search(rf"\b{x}\b", benchmarks) for x in quoted)


def test_the_readme_counts_families_as_the_coverage_does() -> None:
    table = (DOCS / "coverage.md").read_text()
    rows = re.findall(r"^\| Families .* \| (\d+) \| (\d+) \| \d+ \| \d+ \|$", table, re.M)
    # Those without attention of their own come last.
    families, equal = (sum(map(int, column)) for column in zip(*rows[:-1], strict=True))
    assert f"{equal} of {families} families" in (ROOT / "README.md").read_text()


def test_scripts_in_the_design_are_all_there_are() -> None:
    line = re.search(r"^scripts/ +(.*)$", (DOCS / "design.md").read_text(), re.M)
    scripts = {path.stem for path in (ROOT / "scripts").glob("*.py")} - {"__init__"}
    assert line and {*line[1].split(", ")} == scripts


@pytest.mark.parametrize(
    "path", [ROOT / "CONTRIBUTING.md", DOCS / "design.md"], ids=lambda x: x.name
)
def test_names_in_recipes_exist(path: Path) -> None:
    """Constants, and functions of more than one word."""
    folders = (ROOT / name for name in ("hf_flash_two", "scripts", "tests"))
    files = (file for folder in folders for file in folder.rglob("*.py") if file != Path(__file__))
    code = "".join(file.read_text() for file in files)
    names = {*re.findall(r"`(_?[A-Z][A-Z_]+|\w+_\w+)[`(]", path.read_text())}
    assert len(names) > 9
    names.discard("score_mod")  # FlexAttention's
    assert not [name for name in names if not re.search(rf"\b{name}\b", code)]


def test_messages_are_quoted_as_they_are_raised() -> None:
    page = (DOCS / "troubleshooting.md").read_text().partition("## Errors")[2].partition("\n## ")[0]
    package = "".join(path.read_text() for path in (ROOT / "hf_flash_two").rglob("*.py"))
    package = re.sub(r'"\s+f?"', "", package)
    messages = re.findall(r"^\| `(.*?)` ", page, re.M)
    parts = [part.strip() for message in messages for part in message.split("...")]
    assert len(messages) > 8
    assert not [part for part in parts if len(part) > 3 and part not in package]


def test_every_layer_that_stays_as_it_is_is_documented() -> None:
    text = (DOCS / "models.md").read_text()
    missing = [name for name in (*NOT_POSSIBLE, *UNLESS) if f"`{name.split('.')[1]}`" not in text]
    assert not missing


def test_families_that_may_be_sharded_are_listed() -> None:
    listed = (DOCS / "parallel.md").read_text().rpartition("It is shown of:")[2]
    assert set(re.findall(r"`([\w-]+)`", listed)) == SHARDABLE


def test_families_that_may_branch_are_listed() -> None:
    listed = (DOCS / "branches.md").read_text().rpartition("shown equality for:")[2]
    assert set(re.findall(r"`([\w-]+)`", listed)) == BRANCHABLE


def test_commits_are_checked_by_the_ruff_of_the_constraints() -> None:
    pinned = re.search(r"^ruff==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)
    config = (ROOT / ".pre-commit-config.yaml").read_text()
    assert pinned and f"rev: v{pinned[1]}\n" in config


def test_the_tree_in_the_design_is_the_tree() -> None:
    block = re.search(
        r"^```\n(hf_flash_two/\n.*?)^```$", (DOCS / "design.md").read_text(), re.M | re.S
    )
    assert block
    shown, folders = set(), []
    for line in block[1].splitlines():
        name = line.split()[0]
        folders = [*folders[: (len(line) - len(line.lstrip())) // 2], name]
        shown.add("".join(folders))
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "hf_flash_two").rglob("*.py")}
    told = {name for name in files if not name.endswith("__init__.py") and "parallel/" not in name}
    assert not told - shown
    assert not [name for name in shown if not (ROOT / name).exists()]


@pytest.mark.parametrize("path", NAMED)
def test_files_named_exist(path: Path) -> None:
    names = re.findall(r"`((?:\w+/)+[\w.]*)`", path.read_text())
    # Pages name files of Transformers, too.
    folders = (ROOT, ROOT / "hf_flash_two", Path(transformers.__file__).parent)
    names = [name for name in names if "NAME" not in name and name != "org/repo"]
    assert not [name for name in names if not any((at / name).exists() for at in folders)]
