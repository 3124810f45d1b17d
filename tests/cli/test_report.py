"""`llmkit report`, and the page that each command leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Cli

QUICK = ("--set", "finetune.steps=4", "--set", "data.eval=20%", "--set", "finetune.log_every=1")


@pytest.fixture
def tuned(cli: Cli, tiny_llama: Path, chat_rows: Path, tmp_path: Path) -> Path:
    """A run that `llmkit finetune` made."""
    done = cli("finetune", "--model", tiny_llama, "--data", chat_rows, "-o", tmp_path / "tuned", *QUICK)
    assert done.code == 0, done.err
    return tmp_path / "tuned"


def test_every_command_leaves_a_page(tuned: Path, cli: Cli) -> None:
    page = (tuned / "report.html").read_text(encoding="utf-8")
    assert "fine-tuned" in page
    assert "Did it get better?" not in page
    scored = cli("evaluate", tuned, "--set", "evaluate.max_new_tokens=2", "--json")
    assert scored.code == 0, scored.out
    assert scored.json["artifacts"]["report"] == str(tuned / "report.html")
    page = (tuned / "report.html").read_text(encoding="utf-8")
    assert "Did it get better?" in page
    assert "Changed most" in page or "The worst now" in page


def test_where_the_page_is_is_said(tuned: Path, cli: Cli) -> None:
    done = cli("finetune", tuned)
    assert f"report in {tuned}/report.html" in " ".join(done.out.split())


def test_preprocess_and_freeze_alone(cli: Cli, tiny_bert: Path, label_rows: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = cli("preprocess", "--model", tiny_bert, "--data", label_rows, "-o", run, "--set", "data.eval=20%")
    assert done.code == 0, done.err
    assert "This run made 60 examples of 60 rows" in (run / "report.html").read_text()
    done = cli("freeze", "--model", tiny_bert, "--task", "text", "-o", tmp_path / "frozen", "--set", "freeze.blocks=0")
    assert done.code == 0, done.err
    assert "The model, from input to output" in (tmp_path / "frozen" / "report.html").read_text()


def test_report_writes_where_it_is_told(tuned: Path, cli: Cli, tmp_path: Path) -> None:
    (tuned / "report.html").unlink()
    done = cli("report", tuned)
    assert (done.code, done.out.strip()) == (0, str(tuned / "report.html"))
    again = cli("report", tuned, "-o", tmp_path / "page.html", "--json").json
    assert again["artifacts"] == {"report": str(tmp_path / "page.html")}
    assert (tmp_path / "page.html").read_bytes() == (tuned / "report.html").read_bytes()


def test_diverged_trainings_leave_a_page(cli: Cli, tiny_llama: Path, chat_rows: Path, tmp_path: Path) -> None:
    wild = ("--set", "finetune.lr=1e30", "--set", "finetune.max_grad_norm=null", "--set", "finetune.warmup=0")
    done = cli("finetune", "-m", tiny_llama, "-d", chat_rows, "-o", tmp_path / "wild", *QUICK, *wild)
    assert done.code == 6, done.err
    assert "finetune diverged" in (tmp_path / "wild" / "report.html").read_text()


def test_a_page_that_cannot_be_written_takes_nothing_from_the_command(tuned: Path, cli: Cli) -> None:
    (tuned / "report.html").unlink()
    (tuned / "report.html").mkdir()
    done = cli("finetune", tuned, "--no-resume")
    assert done.code == 0
    assert "no new report.html: the page cannot be written" in done.err


def test_a_bug_in_the_page_takes_nothing_from_the_command(
    tuned: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(run: Path) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("llmkit.report.page.write_report", broken)
    done = cli("finetune", tuned, "--no-resume")
    assert done.code == 0
    assert "no new report.html, for a bug: RuntimeError: a bug" in done.err


@pytest.mark.parametrize(("file", "text", "code"), [("run.json", "{", 4), ("preprocess/statistics.json", "[]", 4)])
def test_damaged_runs(file: str, text: str, code: int, tuned: Path, cli: Cli) -> None:
    (tuned / file).write_text(text)
    done = cli("report", tuned, "--json")
    assert done.code == code
    assert file in json.dumps(done.json)


def test_what_is_no_run(cli: Cli, tmp_path: Path) -> None:
    done = cli("report", tmp_path, "--json")
    assert (done.code, done.json["kind"]) == (2, "usage")
    assert cli("report").code == 2
