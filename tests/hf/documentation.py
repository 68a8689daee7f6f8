"""The Python snippets of a document, to be run as they stand with a tiny model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from models import CACHE

ROOT = Path(__file__).parents[2]
MODEL = "Qwen/Qwen3-0.6B"


def snippets(path: Path, *, alone: bool = False) -> list:
    """The first code block of a document with each of the others, named by their headings.

    Args:
        alone: each by itself instead.
    """
    found, heading = [], ""
    for title, code in re.findall(
        r"^##+ ([^\n]*)$|^```python\n(.*?)^```$", path.read_text(), re.M | re.S
    ):
        heading = title or heading
        if code:
            found.append((heading, code))
    first, *others = found
    runs = [(heading, first[1] + code) for heading, code in others] or [first]
    runs = found if alone else runs
    return [
        pytest.param(code, id=f"{path.stem} {number} {heading}".rstrip())
        for number, (heading, code) in enumerate(runs, 1)
    ]


def anchors(path: Path) -> set[str]:
    """The names by which links lead to the headings of a document."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^a-z0-9 _-]", "", title.lower()).replace(" ", "-") for title in titles}


def run(code: str) -> dict:
    """The names that it defines."""
    names = {"__name__": __name__}
    code = code.replace(MODEL, "tiny").replace(" cache=cache", f" {CACHE}=cache")
    exec(compile(code, "a snippet", "exec"), names)
    return names
