"""What `llmkit crossval` and `--learning-curve` leave to look at, and a mistyped number of folds."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Cli

QUICK = (
    *("--set", "finetune.steps=2", "--set", "finetune.precision=fp32", "--set", "evaluate.precision=fp32"),
    *("--set", "evaluate.metrics=[loss]", "--set", "evaluate.generate=0", "--set", "evaluate.resamples=100"),
    *("--set", "evaluate.train_sample=0", "--set", "data.eval=20%", "--set", "stages=[preprocess, finetune, evaluate]"),
)


@pytest.fixture
def wanted(tiny_llama: Path, chat_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[object, ...]:
    """A model, data, and settings that make it quick."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return ("-m", tiny_llama, "-d", chat_rows, *QUICK)


def test_folds_leave_a_page_and_a_wrong_number_of_them_can_be_mended(
    cli: Cli, wanted: tuple[object, ...], tmp_path: Path
) -> None:
    folder = tmp_path / "folds"
    assert cli("crossval", *wanted, "--folds", 5000, "-o", folder).code == 3
    done = cli("crossval", *wanted, "--folds", 2, "-o", folder)
    assert done.code == 0, done.err
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "2 models trained" in page
    assert "Loss by fold" in page
    (folder / "report.html").unlink()
    again = cli("report", folder)
    assert (again.code, again.out.strip()) == (0, str(folder / "report.html"))
    assert (folder / "report.html").read_text(encoding="utf-8") == page
    other = cli("crossval", *wanted, "--folds", 3, "-o", folder)
    assert other.code == 2
    assert "another cross-validation" in other.err


def test_a_learning_curve_is_on_the_page_of_the_run(cli: Cli, wanted: tuple[object, ...], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert cli("run", *wanted, "-o", run).code == 0
    done = cli("evaluate", run, "--learning-curve", "50%,100%")
    assert done.code == 0, done.err
    assert "Loss by training examples" in (run / "report.html").read_text(encoding="utf-8")
