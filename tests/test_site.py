"""docs/site: every page is in the navigation, every public name in the reference, tools are pinned.

tests/hf/test_documentation.py checks that links and anchors exist.
"""

from __future__ import annotations

import re
import runpy
import tomllib
from pathlib import Path

import pytest

import hf_flash_two

ROOT = Path(__file__).parents[1]
SITE = ROOT / "docs" / "site"


@pytest.fixture(scope="module")
def conf() -> dict:
    return runpy.run_path(str(SITE / "conf.py"))


def test_every_page_is_in_the_navigation_once(conf: dict) -> None:
    listed = [page for pages in conf["NAVIGATION"].values() for page in pages]
    paths = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *SITE.glob("*.rst")]
    pages = {str(path.relative_to(ROOT).with_suffix("")) for path in paths}
    assert sorted(listed) == sorted(pages - {conf["root_doc"]})


def test_the_first_page_gets_the_navigation(conf: dict) -> None:
    first, other = ["# Title\n"], ["# Title\n"]
    conf["add_navigation"](None, "README", first)
    conf["add_navigation"](None, "docs/masks", other)
    assert other == ["# Title\n"]
    assert re.findall(r":caption: (.*)", first[0]) == list(conf["NAVIGATION"])


def test_every_public_name_is_in_the_reference(conf: dict) -> None:
    reference = (SITE / "api.rst").read_text()
    named = re.findall(r"^\.\. autoapi\w+:: hf_flash_two\.(\w+)$", reference, re.M)
    assert sorted(named) == sorted(hf_flash_two.__all__)
    assert conf["version"] == hf_flash_two.__version__


def test_the_tools_are_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {re.split("[>=]", x)[0] for x in project["optional-dependencies"]["docs"]}
    lines = (SITE / "requirements.txt").read_text().split()
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    assert not wanted - {line.split("==")[0].lower() for line in lines}
