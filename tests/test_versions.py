"""scripts/versions.py: a run is entered once, with what it counted; the page is that record."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
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
    command = ["versions.py", *map(str, paths), "--docs", str(folder)]
    monkeypatch.setattr(sys, "argv", command)
    assert versions.main() == 0
    return json.loads((folder / "versions.json").read_text())


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
    runs = json.loads((ROOT / "docs" / "versions.json").read_text())
    assert (ROOT / "docs" / "versions.md").read_text() == versions.page(runs)
