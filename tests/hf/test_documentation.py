"""Snippets of the documents run, their commands take the options shown, their links lead somewhere.

Those of docs/training.md run in test_stacks.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from documentation import ROOT, run, snippets
from models import DECODERS
from transformers import ByT5Tokenizer

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMED = [pytest.param(path, id=path.name) for path in DOCUMENTS]


@pytest.mark.parametrize(
    "code",
    [
        *snippets(ROOT / "README.md"),
        *snippets(ROOT / "docs" / "serving.md"),
        *snippets(ROOT / "docs" / "parity.md"),
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
    assert kernel_calls or "patch(model)" in code


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
    headings = {
        re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", text, re.M)
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif "://" not in target:
            assert (path.parent / target.partition("#")[0]).exists(), target
