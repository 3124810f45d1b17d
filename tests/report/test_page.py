"""The report page: what is on it, that nothing in it runs or is fetched, and that everybody can read it."""

from __future__ import annotations

import copy
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from pages import Element, read_page
from run_directories import LABELS, RECIPE, RESULTS, STATISTICS, freeze_plan, log_lines, make_run, prediction

from llmkit.errors import ArtifactError, ResourceError, UsageError
from llmkit.report.page import report_html, write_report
from llmkit.report.record import read_record

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&</title>"


def page_of(run: Path) -> Element:
    return read_page(report_html(read_record(run)))


def changed(value: Any, /, **keys: Any) -> Any:
    return copy.deepcopy(value) | keys


def test_a_page_has_all_parts_of_a_run(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path))
    ids = [section.attributes["id"] for section in page.all("section")]
    assert ids == [
        "scores",
        "examples",
        "errors",
        "slices",
        "training",
        "model",
        "data",
        "cost",
        "environment",
        "again",
    ]
    assert "fine-tuned ./parent to classify texts (rows.jsonl, 40 steps, 3.6 k tokens)" in page.text
    assert "Yes, it got better" in page.text
    assert "+0.5000 (95 % interval of the difference 0.3900 to 0.6100, p < 0.001)" in page.text
    assert "Of the 2 other metrics 1 got better and 1 may have changed by chance alone." in page.by_id("scores").text
    assert "F1: no interval: a label has no example." in page.by_id("scores").text
    assert "hellaswag" in page.by_id("scores").text
    assert "over-fitting, accuracy" in page.by_id("scores").text
    assert "the loss spikes: 9.1" in page.by_id("training").text
    assert "blocks 0–1 (bert.encoder.layer) stands still 2 32" in page.by_id("model").text
    assert "block 2 (bert.encoder.layer) thaws at 30% of the steps 1 16" in page.by_id("model").text
    assert "bert.embeddings stands still 1 80" in page.by_id("model").text
    assert "sure 95%, right 80% of 90 examples" in page.by_id("errors").text
    assert "a very long row" in page.by_id("data").text
    assert "0123abc" in page.by_id("environment").text
    assert f"llmkit run {tmp_path}/recipe.yaml -o animals-again" in page.by_id("again").text
    assert "lr: 0.0002" in page.by_id("again").text


def test_curves_of_everything_that_is_logged(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path))
    titles = [caption.text for caption in page.by_id("training").all("figcaption")]
    assert titles == ["Loss", "Learning rate", "Gradient norm", "Speed", "Peak memory"]
    loss = page.by_id("training").all("svg")[0]
    assert "training: from 2.000 at step 1 to 0.3162 at step 40" in loss.all("desc")[0].text
    assert "held out: from 0.6957 at step 10 to 0.3479 at step 40" in loss.all("desc")[0].text


def test_absent_parts_leave_no_heading(tmp_path: Path) -> None:
    bare = {"preprocess": {"state": "done", "seconds": 1.0, "metrics": {"rows_read": 3}}}
    run = make_run(tmp_path, log=None, predictions=None, run={"stages": bare, "guesses": {}})
    page = page_of(run)
    assert [section.attributes["id"] for section in page.all("section")] == ["data", "cost", "environment", "again"]
    assert not [heading for heading in page.all("h2", "h3", "h4", "caption", "figcaption", "dt") if not heading.text]


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"name": "new", "stages": {}}))
    page = page_of(tmp_path)
    assert "has finished nothing yet" in page.text


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("stopped", "finetune was stopped at step 40 of 90"),
        ("diverged", "finetune diverged at step 40 of 90"),
        ("data", "finetune failed at step 40 of 90"),
    ],
)
def test_a_training_that_did_not_end_well(state: str, said: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, results=None, predictions=None)
    record = json.loads((run / "run.json").read_text())
    record["stages"]["finetune"] = {"state": state, "total_steps": 90}
    del record["stages"]["evaluate"]
    (run / "run.json").write_text(json.dumps(record))
    page = page_of(run)
    assert said in page.text
    assert page.by_id("training").all("svg")
    assert not [section for section in page.all("section") if section.attributes["id"] == "scores"]


def test_results_of_an_evaluation_that_was_not_finished_are_not_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    record = json.loads((run / "run.json").read_text())
    record["stages"]["evaluate"]["state"] = "running"
    (run / "run.json").write_text(json.dumps(record))
    assert "got better" not in page_of(run).text


def test_no_text_of_the_data_becomes_markup(tmp_path: Path) -> None:
    recipe = changed(RECIPE, name=EVIL, model=EVIL)
    statistics = changed(STATISTICS)
    statistics["filters"] = {
        EVIL: {
            "taken_out": {EVIL: 8},
            "changed": {EVIL: 1},
            "samples": [{"where": EVIL, "reason": EVIL, "text": EVIL}],
        }
    }
    statistics["rejected"] = {EVIL: 2}
    statistics["rows_filtered"] = {EVIL: 8}
    for entry in statistics["corpora"].values():
        entry["labels"] = {EVIL: 5, "x" + EVIL: 4}
        entry["sources"] = {EVIL: 5, "x" + EVIL: 4}
    results = changed(RESULTS)
    results["model"][EVIL] = results["parent"][EVIL] = 0.5
    results["models"] = ["model", "parent", EVIL]
    results[EVIL] = {"accuracy": 0.2}
    results["tables"]["model"]["labels"] = [EVIL, "b" + EVIL, "c"]
    results["tables"]["model"]["by_label"] = {EVIL: {EVIL: 0.5}}
    results["slices"] = [changed(entry, by=EVIL, value=EVIL) for entry in results["slices"]]
    results["data_sets"] = {EVIL: results["data_sets"]["train"]}
    results["gaps"] = [changed(results["gaps"][0], kind=EVIL, to=EVIL)]
    results["benchmarks"] = {EVIL: {EVIL: {EVIL: 0.5}}}
    results["reasons"] = {EVIL: {EVIL: EVIL}}
    said = {"answer": EVIL, "loss": 1.0}
    lines = [prediction(0, 2.0, 1.0, prompt=EVIL, reference=EVIL, source=EVIL, model=said, parent=said | {"loss": 3.0})]
    log = [*log_lines("finetune", 5), {"stage": "finetune", "step": 2, "event": EVIL, "why": EVIL}]
    log.append({"stage": EVIL, "step": 1, "loss": 1.0})
    freeze = freeze_plan()
    freeze["notes"] = [EVIL]
    freeze["trainable"] = [*freeze["trainable"], f"{EVIL}.weight"]
    run = make_run(
        tmp_path,
        **{"recipe": recipe, "statistics": statistics, "results": results, "predictions": lines, "log": log},
        freeze=freeze,
        run={
            "name": EVIL,
            "guesses": {EVIL: {"value": EVIL, "source": EVIL}},
            "versions": {EVIL: EVIL},
            "git_commit": EVIL,
        },
    )
    html = report_html(read_record(run))
    page = read_page(html)
    assert not page.all("script", "img", "iframe", "object", "embed", "form", "base")
    assert html.count("alert(1)") > 30
    assert "<script" not in html
    assert "<img" not in html
    for element in page.all():
        assert not [name for name in element.attributes if name.startswith("on")], element
    assert len(page.all("title")) - len(page.all("svg")) == 1
    assert EVIL in page.all("h1")[0].own_text


def test_nothing_is_fetched(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path))
    for element in page.all():
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            value = element.attributes.get(name, "")
            assert value == "" or value.startswith(("#", "data:")), (element.tag, value)
        assert "url(" not in element.attributes.get("style", "").replace("url(#", "")
    style = "".join(element.own_text for element in page.all("style"))
    assert "@import" not in style
    assert "url(" not in style
    (policy,) = [meta for meta in page.all("meta") if meta.attributes.get("http-equiv") == "Content-Security-Policy"]
    assert policy.attributes["content"].startswith("default-src 'none'")


def test_everybody_can_read_it(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path))
    (html,) = page.all("html")
    assert html.attributes["lang"] == "en"
    assert page.all("title")[0].text == "animals – llmkit"
    assert len(page.all("h1")) == len(page.all("main")) == 1
    levels = [int(heading.tag[1]) for heading in page.all("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    ids = [element.attributes["id"] for element in page.all() if "id" in element.attributes]
    assert len(ids) == len(set(ids))
    for link in page.all("a"):
        assert link.attributes["href"].removeprefix("#") in ids
        assert link.text
    for element in page.all():
        for name in element.attributes.get("aria-labelledby", "").split():
            assert name in ids
        for name in re.findall(r"url\(#([^)]+)\)", " ".join(element.attributes.values())):
            assert name in ids
    for drawing in page.all("svg"):
        assert drawing.attributes["role"] == "img"
        assert all(drawing.all(tag)[0].text for tag in ("title", "desc"))
    for table in page.all("table"):
        assert table.all("caption")[0].text
        assert all(cell.attributes.get("scope") in ("row", "col") and cell.text for cell in table.all("th"))
        width = {len(row.children) for row in table.all("tr")}
        assert len(width) == 1, table.all("caption")[0].text
        region = table.parent
        assert region is not None
        assert region.attributes["tabindex"] == "0"
        assert region.attributes["aria-label"]


def test_light_dark_print_and_phone_are_provided_for(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path))
    style = page.all("style")[0].own_text
    assert all(query in style for query in ("prefers-color-scheme: dark", "@media print", "max-width: 34rem"))
    used = {name for drawing in page.all("svg") for element in drawing.all() for name in _variables(element)}
    assert {"ink", "hue-1", "hue-2", "frozen", "learning", "thawing"} <= used
    light, dark, printed = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    for block in (light, dark, printed):
        assert all(f"--{name}:" in block for name in used)
    for element in (element for drawing in page.all("svg") for element in drawing.all()):
        assert not re.search(r"(?:fill|stroke): #", element.attributes.get("style", "")), "a colour of its own"


def _variables(element: Element) -> list[str]:
    return re.findall(r"var\(--([\w-]+)\)", " ".join(element.attributes.values()))


def _luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_contrast_is_that_of_wcag_aa(tmp_path: Path) -> None:
    style = page_of(make_run(tmp_path)).all("style")[0].own_text
    for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL):
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))

        def contrast(one: str, other: str, colours: dict[str, str] = colours) -> float:
            high, low = sorted((_luminance(colours[one]), _luminance(colours[other])), reverse=True)
            return (high + 0.05) / (low + 0.05)

        for paper in ("paper", "card", "none-card"):
            for ink in ("ink", "muted"):
                assert contrast(ink, paper) >= 4.5, (ink, paper)
        for word in ("good", "bad", "open"):
            assert contrast(word, f"{word}-card") >= 4.5, word
            assert contrast("ink", f"{word}-card") >= 4.5, word
        for word in ("accent", "good", "bad", "open"):
            assert contrast(word, "paper") >= 4.5, word
        for hue in ("hue-1", "hue-2", "hue-3", "hue-4", "hue-5", "hue-6", "frozen", "learning", "thawing"):
            assert contrast(hue, "paper") >= 3, hue


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert report_html(read_record(run)) == report_html(read_record(run))


def test_a_page_that_is_up_to_date_is_not_touched(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    before = write_report(run).stat().st_ino
    assert write_report(run).stat().st_ino == before
    (run / "metrics.jsonl").unlink()
    assert write_report(run).stat().st_ino != before


def test_secrets_of_a_recipe_are_not_on_the_page(tmp_path: Path) -> None:
    recipe = changed(RECIPE)
    login, key = "https://me:hunter2pass@host/rows.jsonl", "https://host/rows.jsonl?sig=abc123DEF456ghi&token=zzz"
    recipe["data"]["train"] = [{"uri": login}, {"uri": key}]
    run = make_run(tmp_path, recipe=recipe, run={"guesses": {"data": {"value": login, "source": key}}})
    html = report_html(read_record(run))
    assert "hunter2pass" not in html
    assert "abc123DEF456ghi" not in html
    assert "zzz" not in html
    assert "host/rows.jsonl" in html


def test_dropped_rows_show_a_text_only_where_the_statistics_have_one(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    lines = [
        {"source": "rows.jsonl", "line": n, "reason": "filter length: longer than 100 characters"} for n in range(40)
    ]
    lines.append({"source": "rows.jsonl", "line": 99, "reason": "no text"})
    (run / "preprocess" / "rejected.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (table,) = [t for t in page_of(run).all("table") if "that were dropped" in t.all("caption")[0].text]
    rows = [[cell.text for cell in row.children] for row in table.all("tbody")[0].all("tr")]
    assert len(rows) == 20
    assert rows[0] == ["rows.jsonl:7", "length: longer than 100 characters", "a very long row"]
    assert ["rows.jsonl:99", "no text", "–"] in rows
    assert all(row[2] == "–" for row in rows[1:])


def test_one_label_alone_and_no_difference_do_no_harm(tmp_path: Path) -> None:
    results = changed(RESULTS, parent=RESULTS["model"], differences={"parent": {}}, slices=[])
    results["tables"] = {"model": {"labels": LABELS[:1], "confusion_matrix": [[0]]}}
    assert "Nothing changed" in page_of(make_run(tmp_path, results=results)).text


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("run.json", "{"),
        ("run.json", '{"stages": [1]}'),
        ("recipe.yaml", "a: [1"),
        ("preprocess/statistics.json", '{"corpora": {"train": {"examples": 3}}, "filters": {"length": 3}}'),
        ("evaluate/results.json", '{"model": {"accuracy": 1.0}, "slices": [{"model": {"accuracy": 1.0}}]}'),
        ("freeze/freeze.json", '{"frozen": 3}'),
    ],
)
def test_a_damaged_file_is_named(file: str, text: str, tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / file).write_text(text)
    with pytest.raises(ArtifactError) as caught:
        write_report(run)
    assert file in f"{caught.value.where} {caught.value.got}"


def test_damaged_lines_of_logs_are_passed_over(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    for name in ("metrics.jsonl", "evaluate/predictions.jsonl"):
        with (run / name).open("a") as file:
            file.write('[1]\n{"stage": 3, "step": 1}\n{"cut')
    assert "3 lines of metrics.jsonl could not be read" in page_of(run).text


def test_what_is_no_run_and_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        write_report(tmp_path / "nothing")
    with pytest.raises(ResourceError):
        write_report(make_run(tmp_path), tmp_path / "no" / "such" / "folder.html")


def test_texts_that_no_encoding_holds_can_be_written(tmp_path: Path) -> None:
    lines = [prediction(0, 2.0, 1.0, text="half a sign \ud800 and \x00 and \x1b[31m")]
    results = changed(RESULTS)
    results["slices"] = [changed(entry, value="\x07\ud800 $x^2$") for entry in results["slices"]]
    run = make_run(tmp_path, predictions=lines, results=results)
    assert "half a sign" in write_report(run).read_text(encoding="utf-8")


def test_a_slice_without_a_score_has_a_reason(tmp_path: Path) -> None:
    results = changed(RESULTS)
    results["slices"][0] |= {"model": {"loss": 1.0}, "reasons": {"model": {"accuracy": "no answer was written"}}}
    results["slices"][1] |= {"parent": {}}
    slices = page_of(make_run(tmp_path, results=results)).by_id("slices")
    rows = [[cell.text for cell in row.children] for row in slices.all("tbody")[0].all("tr")]
    assert rows[0] == ["cat", "33", "0.4000", "–", "no answer was written"]
    assert rows[1][-1] == "no example that can be scored"
    assert rows[2][-1] == ""
    whole = page_of(make_run(tmp_path)).by_id("slices")
    assert "why" not in whole.text
