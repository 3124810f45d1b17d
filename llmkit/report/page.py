"""The report of a run: one HTML file that needs no network and no scripts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llmkit.errors import ResourceError
from llmkit.files import write_atomically
from llmkit.report.blocks import Section
from llmkit.report.data import data_section
from llmkit.report.examples import example_section
from llmkit.report.folds import CROSSVAL, folds_html
from llmkit.report.learning_curve import curve_section
from llmkit.report.record import Record, read_record, reading
from llmkit.report.render import render
from llmkit.report.scores import error_section, score_section, slice_section
from llmkit.report.states import failures, states
from llmkit.report.summary import key_figures, what_was_done
from llmkit.report.surroundings import cost_section, recipe_section, surroundings_section
from llmkit.report.training import model_section, training_section
from llmkit.report.verdict import verdict

REPORT = "report.html"  # in a run
_SECTIONS = (
    (score_section, "evaluate/results.json"),
    (example_section, "evaluate/predictions.jsonl"),
    (error_section, "evaluate/results.json"),
    (slice_section, "evaluate/results.json"),
    (curve_section, "learning_curve.json"),
    (training_section, "metrics.jsonl"),
    (model_section, "freeze/freeze.json"),
    (data_section, "preprocess/statistics.json"),
    (cost_section, "run.json"),
    (surroundings_section, "run.json"),
    (recipe_section, "run.json"),
)


def write_report(run: Path, file: Path | None = None) -> Path:
    """Writes the page of a run or a cross-validation, into its folder when no file is named.

    Raises UsageError when it is no run directory, ArtifactError when a file of it is damaged, and ResourceError when the
    page cannot be written.
    """
    target = file or run / REPORT
    write_page(target, folds_html(run) if (run / CROSSVAL).is_file() else report_html(read_record(run)))
    return target


def write_page(file: Path, text: str) -> None:
    """Writes a page in one step, unless it is what is there. Raises ResourceError."""
    text = text.encode("utf-8", "replace").decode()
    try:
        if not file.is_file() or file.read_bytes() != text.encode():
            write_atomically(file, text)
    except OSError as error:
        raise ResourceError(
            "the page cannot be written", got=error.strerror or str(error), hint="choose another -o", where=file
        ) from None


def report_html(record: Record) -> str:
    """The page as text; the same run gives the same page."""
    sections: list[Section] = []
    for make, file in _SECTIONS:
        with reading(record.path / file):
            sections.append(make(record))
    with reading(record.path / "run.json"):
        return render(
            "report.html.j2",
            kind="run",
            title=record.name,
            sentence=what_was_done(record),
            failures=failures(record),
            states=states(record),
            verdict=verdict(record),
            figures=key_figures(record),
            sections=_named(sections),
        )


def _named(sections: Sequence[Section]) -> list[Section]:
    return [section for section in sections if section.blocks]
