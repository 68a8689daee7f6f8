"""What is released: the metadata, the changelog, and that a file more or less is noticed."""

from __future__ import annotations

import re
import sys
import tarfile
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml

import hf_flash_two

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
sys.path.insert(0, str(ROOT / "scripts"))

import package_check  # noqa: E402

TRACKED = [".ci/run", ".github/a.yml", "README.md", "hf_flash_two/a.py", "hf_flash_two/b.json"]
IN_WHEEL = [*TRACKED[3:], "hf_flash_two-1.dist-info/RECORD"]
IN_SDIST = [*TRACKED[1:], "PKG-INFO", "setup.cfg", "hf_flash_two.egg-info/SOURCES.txt"]


def compared(folder: Path, in_wheel: list[str], in_sdist: list[str]) -> list[str]:
    wheel, sdist, file = folder / "a.whl", folder / "a.tar.gz", folder / "file"
    file.touch()
    with ZipFile(wheel, "w") as archive:
        for name in in_wheel:
            archive.write(file, name)
    with tarfile.open(sdist, "w:gz") as archive:
        for name in in_sdist:
            archive.add(file, f"hf_flash_two-1/{name}")
    return package_check.compared(TRACKED, wheel, sdist)


def test_what_git_tracks_is_what_is_released(tmp_path: Path) -> None:
    assert compared(tmp_path, IN_WHEEL, IN_SDIST) == []


def test_files_that_are_missing_or_too_many_are_named(tmp_path: Path) -> None:
    differences = compared(tmp_path, [*IN_WHEEL[1:], "tests/a.py"], [*IN_SDIST[1:], "a.pyc"])
    assert differences == [
        "a.whl lacks hf_flash_two/a.py",
        "a.whl should not hold tests/a.py",
        "a.tar.gz lacks .github/a.yml",
        "a.tar.gz should not hold a.pyc",
    ]


def test_files_of_the_package_that_are_not_python_are_in_the_wheel() -> None:
    package = ROOT / "hf_flash_two"
    ignored = {".py", ".pyc"}
    others = [x for x in package.rglob("*") if x.is_file() and x.suffix not in ignored]
    listed = PYPROJECT["tool"]["setuptools"]["package-data"]["hf_flash_two"]
    assert {str(x.relative_to(package)) for x in others} == set(listed)


def test_the_version_has_one_source() -> None:
    assert "version" in PYPROJECT["project"]["dynamic"]
    source = PYPROJECT["tool"]["setuptools"]["dynamic"]["version"]
    assert source == {"attr": "hf_flash_two.__version__"}
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == hf_flash_two.__version__
    assert citation["license"] == PYPROJECT["project"]["license"]


def test_the_changelog_has_its_form() -> None:
    """Newest first, a date for each release, known sections, a link for each heading."""
    text = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## (.*)$", text, re.M)
    assert headings[0] == "[Unreleased]"
    dates = [re.fullmatch(r"\[\d+\.\d+\.\d+\] - (\d{4}-\d\d-\d\d)", x)[1] for x in headings[1:]]  # pyright: ignore
    assert dates == sorted(dates, reverse=True)
    sections = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.*)$", text, re.M)) <= sections
    for name in re.findall(r"^## (\[.*?\])", text, re.M):
        assert re.search(rf"^{re.escape(name)}: https://", text, re.M), name


@pytest.mark.parametrize("name", ["Homepage", "Documentation", "Source", "Issues", "Changelog"])
def test_the_project_says_where_it_is(name: str) -> None:
    assert PYPROJECT["project"]["urls"][name].startswith(
        "https://github.com/hf-flash-two/hf_flash_two"
    )
