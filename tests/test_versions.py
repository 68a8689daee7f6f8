"""scripts/versions.py: a run is entered once, with what it counted; the page is that record.

And the versions that pages name are those of the constraints.
"""

from __future__ import annotations

import json
import platform
import re
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from hf_flash_two.hf import compat

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
sys.path.insert(0, str(ROOT / "scripts"))

import versions  # noqa: E402

REPORT = """<testsuites>
<testsuite name="pytest" tests="{tests}" failures="1" errors="1" skipped="3"/>
</testsuites>"""


def enter(monkeypatch: pytest.MonkeyPatch, folder: Path, *tests: int) -> list[dict]:
    paths = []
    for number, count in enumerate(tests):
        paths.append(folder / f"{number}.xml")
        paths[-1].write_text(REPORT.format(tests=count))
    record, page = folder / "versions.json", folder / "versions.md"
    command = ["versions.py", *map(str, paths), "--record", str(record), "--page", str(page)]
    monkeypatch.setattr(sys, "argv", command)
    assert versions.main() == 0
    return json.loads(record.read_text())


def test_a_run_is_counted_over_all_its_reports(monkeypatch, tmp_path) -> None:
    (run,) = enter(monkeypatch, tmp_path, 20, 10)
    assert (run["passed"], run["failed"], run["skipped"]) == (20, 4, 6)
    assert run["python"] == platform.python_version()
    assert run["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    page = (tmp_path / "versions.md").read_text()
    assert f"| {run['transformers']} |" in page and "| 20 | 4 | 6 |" in page


def test_a_later_run_replaces_the_one_of_the_same_versions(monkeypatch, tmp_path) -> None:
    (run,) = enter(monkeypatch, tmp_path, 20)
    others = [run | {"transformers": name} for name in ("4.57.1", "999.4.0", "999.24.0")]
    (tmp_path / "versions.json").write_text(json.dumps([run, *others]))
    runs = enter(monkeypatch, tmp_path, 30)
    assert [run["passed"] for run in runs] == [15, 15, 25, 15]
    assert [run["transformers"] for run in runs[:2]] == ["999.24.0", "999.4.0"]


def test_a_missing_report_is_told(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["versions.py", str(tmp_path / "none.xml")])
    with pytest.raises(SystemExit):
        versions.main()
    assert "none.xml; run `make test` first" in capsys.readouterr().err


def test_the_page_in_the_documentation_is_the_record() -> None:
    runs = json.loads(versions.RECORD.read_text())
    assert versions.PAGE.read_text() == versions.page(runs)


def pinned(name: str, constraints: str) -> str:
    """Its version up to the minor one."""
    text = (ROOT / constraints).read_text()
    found = re.search(rf"^{name}==(\d+\.\d+)", text, re.M)
    assert found, f"{name} is not in {constraints}"
    return found[1]


def test_the_lowest_versions_are_those_that_are_tested() -> None:
    lowest = dict(re.fullmatch(r"(\w+)>=([\d.]+).*", x).groups() for x in PROJECT["dependencies"])
    assert lowest == {name: pinned(name, "constraints-lowest.txt") for name in lowest}
    python = PROJECT["requires-python"].removeprefix(">=")
    needed = (
        f"You need Python {python}, PyTorch {lowest['torch']}, Transformers "
        f"{lowest['transformers']} and Accelerate {lowest['accelerate']}, or newer"
    )
    assert needed in (ROOT / "README.md").read_text().replace("\n", " ")


def test_the_range_of_transformers_is_that_of_the_constraints() -> None:
    ends = (pinned("transformers", f"constraints{x}.txt") for x in ("-lowest", ""))
    supported = " to ".join(ends)
    assert f"Transformers {supported}:" in (ROOT / "CHANGELOG.md").read_text()
    assert f"transformers {supported}." in (compat.__doc__ or "")


def test_extras_bring_what_the_readme_says() -> None:
    shown = re.findall(r"'\.\[(.*)\]' +# for [^:]*: (.*)", (ROOT / "README.md").read_text())
    assert len(shown) == 3
    for extras, packages in shown:
        brought = [re.split("[>=]", x)[0] for name in extras.split(",") for x in EXTRAS[name]]
        assert brought == packages.split(" and ")


def test_extras_named_in_pages_exist() -> None:
    for page in PAGES:
        for extras in re.findall(r"'\.\[(.*?)\]'", page.read_text()):
            assert set(extras.split(",")) <= EXTRAS.keys(), page.name
