"""One recipe through all six stages: what it leaves, what runs again after a change, and what does not."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Cli, Outcome, sentence, write_rows

from llmkit.cli.app import main
from llmkit.run.log import read_metrics
from llmkit.run.seals import holds

ALL = ("preprocess", "pretrain", "freeze", "finetune", "evaluate", "export")
AFTER_FINETUNE = ("finetune", "evaluate", "export")


class Project:
    """A folder with data, a recipe and its run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe, self.run = folder / "recipe.yaml", folder / "run"
        self.chat, self.text = folder / "chat.jsonl", folder / "text.jsonl"

    def write(self, model: Path) -> None:
        chat = [
            {"messages": [{"role": "user", "content": sentence(i)}, {"role": "assistant", "content": f"It is {i}."}]}
            for i in range(60)
        ]
        write_rows(self.chat, chat)
        write_rows(self.text, ({"text": sentence(i) + " " + sentence(i + 100)} for i in range(60)))
        values = {
            "name": "tiny",
            "task": "chat",
            "model": str(model),
            "stages": list(ALL),
            "data": {"train": str(self.chat), "eval": "20%", "max_length": 64},
            "pretrain": {
                "data": str(self.text),
                "max_length": 32,
                "steps": 4,
                "batch_size": 16,  # so that four steps see every row
                "lr": 1e-3,
                "log_every": 2,
            },
            "freeze": {"blocks": 0, "embeddings": True},
            "finetune": {"steps": 4, "batch_size": 16, "warmup": 0, "log_every": 1},
            "evaluate": {"generate": 2, "max_new_tokens": 4, "samples": 1},
        }
        self.recipe.write_text(yaml.safe_dump(values))

    def edit(self, old: str, new: str, file: Path | None = None) -> None:
        file = file or self.recipe
        text = file.read_text()
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {file}"
        file.write_text(text.replace(old, new))

    def record(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.run / "run.json").read_text())
        return found

    def weights(self, stage: str, run: Path | None = None) -> bytes:
        return ((run or self.run) / stage / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="session")
def finished(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose recipe has run once."""
    project = Project(tmp_path_factory.mktemp("finished"))
    project.write(tiny_llama)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["llmkit", "run", str(project.recipe), "-o", str(project.run), "--json", "-q"])
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 0
    return project.folder


@pytest.fixture
def project(finished: Path, tmp_path: Path) -> Project:
    """A copy of the finished project, with the recipe pointing at the copy's data."""
    copy = Project(tmp_path / "project")
    shutil.copytree(finished, copy.folder)
    for file in (copy.recipe, copy.run / "recipe.yaml"):
        file.write_text(file.read_text().replace(str(finished), str(copy.folder)))
    return copy


def decisions(outcome: Outcome) -> dict[str, tuple[str, str]]:
    """What standard error says of each stage: running or unchanged, and why."""
    found = re.findall(r"^\S (\w+) (running|unchanged): (.+)$", outcome.err, re.MULTILINE)
    return {stage: (state, why) for stage, state, why in found}


def running(outcome: Outcome) -> tuple[str, ...]:
    assert outcome.code == 0, outcome.err
    found = decisions(outcome)
    assert tuple(found) == ALL
    return tuple(stage for stage in ALL if found[stage][0] == "running")


def test_the_first_run_leaves_what_the_design_says(finished: Path) -> None:
    project = Project(finished)
    record = project.record()
    assert list(record["stages"]) == list(ALL)
    for stage in ALL:
        entry = record["stages"][stage]
        assert entry["state"] == "done"
        assert entry["seconds"] >= 0
        assert len(entry["fingerprint"]) == len(entry["content"]) == 64
        assert all(holds(project.run / name, seal) for name, seal in entry["files"].items())
    for model in ("pretrain/model", "finetune/model", "export/transformers"):
        assert (project.run / model / "model.safetensors").is_file()
        assert (project.run / model / "tokenizer.json").is_file()
    assert (project.run / "freeze" / "freeze.json").is_file()
    assert not list(project.run.rglob("*.tmp"))
    assert not (project.run / "error.log").exists()


def test_results_stand_side_by_side(finished: Path) -> None:
    results = json.loads((finished / "run" / "evaluate" / "results.json").read_text())
    assert list(results["model"]) == list(results["parent"])
    assert list(results["model"])[:4] == ["loss", "perplexity", "token_accuracy", "rougeL"]
    assert results["model"] != results["parent"]
    assert results["examples"] > 0
    (sample,) = results["samples"]
    assert set(sample) == {"prompt", "reference", "model", "parent"}
    assert sample["reference"].startswith("It is ")


def test_each_logged_step_is_one_object(finished: Path) -> None:
    lines = read_metrics(finished / "run" / "metrics.jsonl")
    steps = [(line["stage"], line["step"]) for line in lines if "loss" in line]
    assert steps == [("pretrain", 1), ("pretrain", 2), ("pretrain", 4), *(("finetune", n) for n in (1, 2, 3, 4))]
    for line in lines:
        expected = {"loss", "lr", "grad_norm", "tokens_per_second", "seconds", "peak_memory_bytes"}
        expected = expected if "loss" in line else {"eval_loss"}
        assert set(line) == {"stage", "step", "tokens"} | expected
    assert [line["stage"] for line in lines if "eval_loss" in line] == ["pretrain", "finetune"]
    tokens = [line["tokens"] for line in lines if line["stage"] == "finetune" and "loss" in line]
    assert tokens == sorted(set(tokens))


def test_every_guess_is_kept_with_its_source(finished: Path) -> None:
    guesses = Project(finished).record()["guesses"]
    assert guesses["finetune.lr"]["value"] == pytest.approx(1e-4)
    assert guesses["finetune.lr"]["source"] == "the parent's peak rate 0.001 times lr_scale 0.1"
    assert {"data.train format", "pretrain.data format", "pretrain.precision", "export.dtype"} <= set(guesses)
    assert all(guess["source"] for guess in guesses.values())


def test_a_second_run_does_nothing_and_says_why(project: Project, cli: Cli) -> None:
    before = {path: path.stat().st_mtime_ns for path in project.run.rglob("*") if path.is_file()}
    metrics = (project.run / "metrics.jsonl").read_bytes()
    done = cli("run", project.recipe, "-o", project.run)
    assert running(done) == ()
    assert all("its inputs are those of the last run" in why for _, why in decisions(done).values())
    touched = {p.name for p, time in before.items() if p.stat().st_mtime_ns != time}
    assert touched <= {"run.json", ".lock"}
    assert (project.run / "metrics.jsonl").read_bytes() == metrics


CHANGES = {
    "evaluate.generate": ("evaluate.generate=1", ("evaluate",)),
    "evaluate.samples": ("evaluate.samples=2", ("evaluate",)),
    "export.dtype": ("export.dtype=bfloat16", ("export",)),
    "finetune.lr": ("finetune.lr=5e-4", AFTER_FINETUNE),
    "finetune.lr_scale": ("finetune.lr_scale=0.5", AFTER_FINETUNE),
    "finetune.batch_size": ("finetune.batch_size=8", AFTER_FINETUNE),
    "finetune.optimizer": ("finetune.optimizer=sgd", AFTER_FINETUNE),
    "finetune.log_every": ("finetune.log_every=3", ()),
    "finetune.save_every": ("finetune.save_every=2", ()),
    "finetune.keep_checkpoints": ("finetune.keep_checkpoints=1", ()),
    "finetune.trackers": ("finetune.trackers=[]", ()),
    "pretrain.log_every": ("pretrain.log_every=3", ()),
    "freeze.blocks": ("freeze.blocks=1", ("freeze", *AFTER_FINETUNE)),
    "freeze: the same in other words": ("freeze.blocks=0-0", ("freeze",)),
    "pretrain.lr": ("pretrain.lr=1e-2", ("pretrain", *AFTER_FINETUNE)),
    "pretrain.max_length": ("pretrain.max_length=16", ("preprocess", "pretrain", *AFTER_FINETUNE)),
    "seed": ("seed=3", ("pretrain", *AFTER_FINETUNE)),
    "data.eval": ("data.eval=30%", ("preprocess", "pretrain", *AFTER_FINETUNE)),
    "data.filters that take nothing": ("data.filters=[duplicates]", ("preprocess",)),
    "data.max_rejected": ("data.max_rejected=2%", ("preprocess",)),
}


@pytest.mark.parametrize(("setting", "expected"), CHANGES.values(), ids=CHANGES)
def test_a_changed_key_runs_exactly_what_depends_on_it(
    setting: str, expected: tuple[str, ...], project: Project, cli: Cli
) -> None:
    done = cli("run", project.recipe, "-o", project.run, "--set", setting)
    assert running(done) == expected
    if expected:
        why = decisions(done)[expected[0]][1]
        assert why.startswith("changed: ")
        assert setting.partition("=")[0] in why
    assert running(cli("run", project.run)) == ()


def test_a_key_that_an_older_llmkit_did_not_leave_out_is_named(project: Project, cli: Cli) -> None:
    record = project.record()
    entry = record["stages"]["evaluate"]
    entry["inputs"]["recipe.evaluate.gone"], entry["fingerprint"] = None, "0" * 64
    (project.run / "run.json").write_text(json.dumps(record))
    why = decisions(cli("run", project.recipe, "-o", project.run))["evaluate"][1]
    assert why == "changed: evaluate.gone None -> None"


def touch(project: Project) -> None:
    for file in (project.chat, project.text, project.recipe):
        os.utime(file, (1e9, 1e9))


def rename(project: Project) -> None:
    project.chat.rename(project.folder / "other.jsonl")
    project.edit(str(project.chat), str(project.folder / "other.jsonl"))


def comment(project: Project) -> None:
    project.recipe.write_text("# a comment\n" + project.recipe.read_text())


def copy_model(project: Project) -> None:
    model = Path(yaml.safe_load(project.recipe.read_text())["model"])
    shutil.copytree(model, project.folder / "copy")
    project.edit(f"model: {model}", f"model: {project.folder / 'copy'}")


DATA_CHANGES = {
    "times only": (touch, ()),
    "the name of the data": (rename, ()),
    "a comment in the recipe": (comment, ()),
    "where the model lies": (copy_model, ()),
    "a byte of the conversations": (
        lambda p: p.edit("It is 7.", "It is 8.", p.chat),
        ("preprocess", *AFTER_FINETUNE),
    ),
    "a byte of the texts": (
        lambda p: p.edit("near item 107.", "near item 108.", p.text),
        ("preprocess", "pretrain", *AFTER_FINETUNE),
    ),
    "an empty line in the data": (lambda p: p.chat.write_text(p.chat.read_text() + "\n"), ("preprocess",)),
    "scores gone": (lambda p: (p.run / "evaluate" / "results.json").unlink(), ("evaluate",)),
    "freeze plan cut": (lambda p: (p.run / "freeze" / "freeze.json").write_text("{"), ("freeze",)),
    "model gone, made again with the same bits": (
        lambda p: (p.run / "finetune" / "model" / "model.safetensors").unlink(),
        ("finetune",),
    ),
    "pretrained model gone, made again with the same bits": (
        lambda p: shutil.rmtree(p.run / "pretrain"),
        ("pretrain",),
    ),
    "corpus gone": (lambda p: shutil.rmtree(p.run / "preprocess" / "train"), ("preprocess",)),
    "exported folder gone": (lambda p: shutil.rmtree(p.run / "export"), ("export",)),
}


@pytest.mark.parametrize(("change", "expected"), DATA_CHANGES.values(), ids=DATA_CHANGES)
def test_a_changed_file_runs_exactly_what_depends_on_it(
    change: Any, expected: tuple[str, ...], project: Project, cli: Cli
) -> None:
    change(project)
    done = cli("run", project.recipe, "-o", project.run)
    assert running(done) == expected
    assert running(cli("run", project.recipe, "-o", project.run)) == ()


def test_what_was_made_before_is_kept(project: Project, cli: Cli) -> None:
    old = project.weights("finetune")
    fingerprint = project.record()["stages"]["finetune"]["fingerprint"]
    assert cli("run", project.recipe, "-o", project.run, "--set", "finetune.lr=5e-3").code == 0
    kept = project.run / "previous" / f"finetune-{fingerprint[:8]}"
    assert (kept / "model" / "model.safetensors").read_bytes() == old
    assert project.weights("finetune") != old


def test_no_resume_starts_anew_and_ends_with_the_same_bits(project: Project, cli: Cli) -> None:
    old = project.weights("finetune")
    done = cli("run", project.recipe, "-o", project.run, "--no-resume")
    assert running(done) == ALL
    assert all("--no-resume" in why for _, why in decisions(done).values())
    assert project.weights("finetune") == old
    lines = read_metrics(project.run / "metrics.jsonl")
    assert [line["step"] for line in lines if line["stage"] == "finetune" and "loss" in line] == [1, 2, 3, 4]


def test_dry_run_tells_what_run_does_and_touches_nothing(project: Project, cli: Cli) -> None:
    before = {path: path.stat().st_mtime_ns for path in project.folder.rglob("*")}
    said = cli("run", project.recipe, "-o", project.run, "--set", "freeze.blocks=1", "--dry-run", "--json").json
    assert [stage for stage, entry in said["stages"].items() if entry["runs"]] == ["freeze", *AFTER_FINETUNE]
    assert "freeze.blocks 0 -> 1" in said["stages"]["freeze"]["why"]
    assert "freeze will run before it" in said["stages"]["finetune"]["why"]
    assert {path: path.stat().st_mtime_ns for path in project.folder.rglob("*")} == before


def test_one_stage_asks_for_the_training_it_needs_and_starts_none(project: Project, cli: Cli) -> None:
    recipe = (project.run / "recipe.yaml").read_text()
    refused = cli("evaluate", project.run, "--set", "finetune.lr=5e-3", "--json")
    assert refused.code == 4
    assert "finetune has other inputs now" in refused.json["what"]
    assert "llmkit finetune" in refused.json["hint"]
    assert (project.run / "recipe.yaml").read_text() == recipe
    assert cli("evaluate", project.run).code == 0


def test_a_stage_alone_runs_alone(project: Project, cli: Cli) -> None:
    done = cli("evaluate", project.run, "--set", "evaluate.generate=1")
    assert done.code == 0
    assert [stage for stage, (state, _) in decisions(done).items() if state == "running"] == ["evaluate"]
    assert "rougeL" in done.out


def test_stages_one_by_one_make_what_run_makes(project: Project, cli: Cli) -> None:
    other = project.folder / "by-hand"
    for stage in ALL:
        assert cli(stage, project.recipe, "-o", other).code == 0
    assert running(cli("run", project.recipe, "-o", other)) == ()
    assert project.weights("finetune", other) == project.weights("finetune")
    assert (other / "evaluate" / "results.json").read_text() == (project.run / "evaluate" / "results.json").read_text()


def test_the_run_can_be_moved(project: Project, cli: Cli) -> None:
    moved = project.folder / "moved"
    project.run.rename(moved)
    done = cli("run", moved, "--json", "-q")
    assert done.json["run_dir"] == str(moved)
    assert running(cli("run", moved)) == ()
