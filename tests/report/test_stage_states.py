"""The states of stages on a page, and why those that failed did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pages import Element, read_page
from run_directories import make_run

from llmkit.report.page import report_html
from llmkit.report.record import read_record
from llmkit.run.directory import Run


def page_with(run: Path, **entry: Any) -> Element:
    """The page of a run whose last stage ended so."""
    make_run(run, results=None, predictions=None)
    record = json.loads((run / "run.json").read_text())
    record["stages"]["evaluate"] = entry
    (run / "run.json").write_text(json.dumps(record))
    return read_page(report_html(read_record(run)))


def badges(page: Element) -> list[str]:
    return [item.text for item in page.all("li") if item.attributes.get("class", "").startswith("state")]


@pytest.mark.parametrize("kind", ["recipe", "data", "artifact", "resource", "usage", "failed"])
def test_a_stage_that_failed_says_failed_and_why(kind: str, tmp_path: Path) -> None:
    page = page_with(tmp_path, state=kind, error="no held-out row has the column `topicz`")
    assert badges(page)[-1] == "evaluate failed"
    assert "evaluate failed" in page.by_id("cost").text
    assert "evaluate failed: no held-out row has the column `topicz`." in page.text


def test_a_failure_without_a_text_is_told_by_its_kind(tmp_path: Path) -> None:
    assert "evaluate failed: the data is wrong." in page_with(tmp_path, state="data").text


@pytest.mark.parametrize("state", ["stopped", "diverged", "running"])
def test_other_states_are_shown_as_they_are(state: str, tmp_path: Path) -> None:
    page = page_with(tmp_path, state=state)
    assert badges(page)[-1] == f"evaluate {state}"
    assert not [line for line in page.all("p") if line.attributes.get("class") == "failure"]


def test_secrets_in_an_error_are_not_on_the_page(tmp_path: Path) -> None:
    text = page_with(tmp_path, state="data", error="https://me:hunter2pass@host/rows cannot be read").text
    assert "hunter2pass" not in text
    assert "host/rows cannot be read" in text


def test_a_run_keeps_why_a_stage_failed_until_it_starts_again(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "run", "animals", "name: animals")
    run.start("evaluate", {}, keep=False)
    run.note_state("evaluate", "data", why="the rows are empty")
    kept = json.loads((run.path / "run.json").read_text())["stages"]["evaluate"]
    assert (kept["state"], kept["error"]) == ("data", "the rows are empty")
    run.start("evaluate", {}, keep=True)
    assert "error" not in json.loads((run.path / "run.json").read_text())["stages"]["evaluate"]
    run.note_state("evaluate", "data", why="once")
    run.note_state("evaluate", "stopped")
    assert "error" not in run.stage("evaluate")
    run.close()
