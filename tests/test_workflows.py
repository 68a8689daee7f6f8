"""What .github runs: pinned actions, few permissions, make targets and versions that there are."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
WORKFLOWS = {path.stem: path for path in sorted((GITHUB / "workflows").iterdir())}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = re.findall(r":: (3\.\d+)$", "\n".join(PROJECT["classifiers"]), re.M)
LOWEST = PROJECT["requires-python"].removeprefix(">=")
# YAML 1.1 reads the key "on" as a truth value.
ON = True
MAY_ALSO = {
    "docs": {"deploy": {"pages": "write", "id-token": "write"}},
    "publish": {"publish": {"id-token": "write"}},
}
"""What jobs need beyond reading."""

each_workflow = pytest.mark.parametrize("name", WORKFLOWS)


def load(name: str) -> dict[Any, Any]:
    return yaml.safe_load(WORKFLOWS[name].read_text())


def matrix_of(job: dict) -> list[dict[str, str]]:
    return job.get("strategy", {}).get("matrix", {}).get("include", [{}])


def make_targets(workflow: str) -> Iterator[str]:
    """Every target of a `make` that some job runs."""
    for job in load(workflow)["jobs"].values():
        for row in matrix_of(job):
            for step in job.get("steps", []):
                run = step.get("run", "").replace("$TARGETS", row.get("targets", ""))
                for words in re.findall(r"^make (.*)$", run, re.M):
                    yield from (word for word in words.split() if "=" not in word)


@each_workflow
def test_actions_are_pinned_by_commit_and_say_their_version(name: str) -> None:
    uses = re.findall(r"uses: (.*)", WORKFLOWS[name].read_text())
    assert uses
    for used in uses:
        if used.startswith("./"):
            assert (ROOT / used).exists(), used
        else:
            assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", used), used


def test_an_action_has_one_version() -> None:
    texts = (path.read_text() for path in WORKFLOWS.values())
    used = {x for text in texts for x in re.findall(r"uses: ([\w/-]+)@(.*)", text)}
    assert len(used) == len({action for action, _ in used})


@each_workflow
def test_jobs_may_read_and_no_more(name: str) -> None:
    workflow = load(name)
    assert workflow["permissions"] == {"contents": "read"}
    granted = {job: x["permissions"] for job, x in workflow["jobs"].items() if "permissions" in x}
    assert granted == MAY_ALSO.get(name, {})
    for job in workflow["jobs"].values():
        for step in job.get("steps", []):
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False


@each_workflow
def test_runs_end_and_do_not_pile_up(name: str) -> None:
    workflow = load(name)
    assert workflow["concurrency"]["group"]
    for job in workflow["jobs"].values():
        assert "uses" in job or job["timeout-minutes"] <= 120


@each_workflow
def test_make_targets_exist(name: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in make_targets(name):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_the_matrix_is_every_python_and_every_set_of_constraints() -> None:
    rows = matrix_of(load("tests")["jobs"]["test"])
    targets = {row["targets"]: row["python"] for row in rows}
    pythons = {row["python"] for row in rows if "test" in row["targets"].split()}
    assert sorted(pythons) == sorted(PYTHONS)
    sets = {path.stem.removeprefix("constraints") for path in ROOT.glob("constraints*.txt")}
    assert {f"test{name}" for name in sets} <= {x for name in targets for x in name.split()}
    assert targets["test-lowest"] == min(PYTHONS) == LOWEST
    assert set(make_targets("tests")) == {"quality", "package-check", *(f"test{x}" for x in sets)}


def test_every_week_the_newest_releases_are_tested_on_the_newest_python() -> None:
    canary = load("canary")
    (schedule,) = canary[ON]["schedule"]
    minute, hour, day, month, weekday = schedule["cron"].split()
    assert (day, month) == ("*", "*") and weekday.isdigit()
    assert set(make_targets("canary")) == {"test-newest"}
    used = re.findall(r'python-version: "(.*)"', WORKFLOWS["canary"].read_text())
    assert used == [max(PYTHONS)]


def test_a_tag_is_published_after_its_tests_and_without_a_token() -> None:
    publish = load("publish")
    assert publish[ON] == {"push": {"tags": ["v*"]}}
    jobs = publish["jobs"]
    assert jobs["publish"]["needs"] == ["tests", "build"]
    assert jobs["tests"]["uses"] == "./.github/workflows/tests.yml"
    assert "workflow_call" in load("tests")[ON]
    upload = jobs["publish"]["steps"][-1]
    assert upload["uses"].startswith("pypa/gh-action-pypi-publish@")
    assert upload["with"] == {"attestations": True}
    text = WORKFLOWS["publish"].read_text()
    assert "secrets." not in text and "cache" not in text


def test_a_bug_report_asks_for_the_doctor() -> None:
    form = yaml.safe_load((GITHUB / "ISSUE_TEMPLATE" / "bug.yml").read_text())
    fields = {part["id"]: part for part in form["body"]}
    assert "`python -m hf_flash_two`" in fields["doctor"]["attributes"]["label"]
    assert fields["doctor"]["validations"]["required"]


@pytest.mark.parametrize("path", sorted(GITHUB.rglob("*.yml")), ids=lambda x: x.stem)
def test_forms_and_settings_are_yaml(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text()), dict)
