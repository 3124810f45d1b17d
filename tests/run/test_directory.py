"""The run directory: whose it is, what is kept, and what counts as done."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmkit.errors import ResourceError, UsageError
from llmkit.run.directory import Artifact, Run
from llmkit.run.reporter import SilentReporter


def open_run(path: Path, name: str = "one", text: str = "name: one\n") -> Run:
    return Run.open(path, name, text)


def finish(run: Run, stage: str, text: str = "made") -> None:
    file = run.folder(stage) / "out.txt"
    file.write_text(text)
    run.finish(Artifact(stage, run.folder(stage), "digest", (f"{stage}/out.txt",), {"m": 1.0}), 1.234)


def record(path: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((path / "run.json").read_text())
    return found


def test_a_new_run_says_what_it_was_made_with(tmp_path: Path) -> None:
    open_run(tmp_path / "run").close()
    found = record(tmp_path / "run")
    assert found["name"] == "one"
    assert {"python", "llmkit", "torch", "transformers"} <= set(found["versions"])  # type: ignore[call-overload]
    assert {"machine", "cpus", "memory_bytes"} <= set(found["hardware"])  # type: ignore[call-overload]
    assert "git_commit" in found
    assert (tmp_path / "run" / "recipe.yaml").read_text() == "name: one\n"


def test_a_finished_stage_is_done_until_a_file_is_gone_or_cut(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    run.start("finetune", {"a": 1}, keep=False)
    assert not run.is_done("finetune")
    finish(run, "finetune")
    assert run.is_done("finetune")
    assert run.stage("finetune")["seconds"] == 1.23
    (run.path / "finetune" / "out.txt").write_text("mad")
    assert run.missing_files("finetune") == ["finetune/out.txt"]
    assert not run.is_done("finetune")
    (run.path / "finetune" / "out.txt").unlink()
    assert not run.is_done("finetune")


def test_what_a_stage_had_made_is_kept_when_it_starts_anew(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    for text in ("first", "second", "third"):
        run.start("finetune", {"same": "inputs"}, keep=False)
        finish(run, "finetune", text)
    kept = sorted((run.path / "previous").iterdir())
    assert [(folder / "out.txt").read_text() for folder in kept] == ["first", "second"]
    assert (run.path / "finetune" / "out.txt").read_text() == "third"


def test_checkpoints_of_an_unfinished_stage_are_kept_and_an_empty_start_is_not(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    run.start("finetune", {"a": 1}, keep=False)
    run.start("finetune", {"a": 2}, keep=False)
    assert not (run.path / "previous").exists()
    (run.folder("finetune") / "checkpoints" / "step-00000001").mkdir(parents=True)
    run.start("finetune", {"a": 3}, keep=False)
    assert [folder.name[:8] for folder in (run.path / "previous").iterdir()] == ["finetune"]


def test_going_on_keeps_the_folder(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    (run.start("finetune", {"a": 1}, keep=False) / "half").write_text("x")
    assert (run.start("finetune", {"a": 1}, keep=True) / "half").read_text() == "x"


def test_the_recipe_is_replaced_when_a_stage_starts_and_not_before(tmp_path: Path) -> None:
    open_run(tmp_path / "run").close()
    run = open_run(tmp_path / "run", text="name: one\nseed: 2\n")
    assert (run.path / "recipe.yaml").read_text() == "name: one\n"
    run.start("freeze", {}, keep=False)
    assert (run.path / "recipe.yaml").read_text() == "name: one\nseed: 2\n"


def test_what_was_known_survives_reopening(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    run.guess("finetune.lr", 1e-5, "a default")
    run.start("freeze", {}, keep=False)
    finish(run, "freeze")
    run.close()
    again = open_run(tmp_path / "run")
    assert again.is_done("freeze")
    assert again.record["guesses"]["finetune.lr"] == {"value": 1e-5, "source": "a default"}


def test_what_a_killed_process_was_writing_is_cleared_away_and_nothing_else(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    run.start("finetune", {"a": 1}, keep=False)
    finish(run, "finetune")
    theirs = [tmp_path / "run/finetune" / name for name in (".best.tmp", ".table.csv.71.tmp", ".tmpmeCZrF")]
    ours = [
        tmp_path / "run/finetune" / name
        for name in ("out.txt", ".best.safetensors", ".tmp", "b.tmp", ".tmpmeCZrF.json")
    ]
    run.close()
    for path in [*theirs, *ours]:
        path.touch()
    open_run(tmp_path / "run").close()
    assert [path for path in theirs if path.exists()] == []
    assert [path for path in ours if not path.exists()] == []


def test_so_is_what_safetensors_was_writing(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    run.start("finetune", {"a": 1}, keep=False)
    finish(run, "finetune")
    run.close()
    script = "import numpy, sys; from safetensors.numpy import save_file as save; zeros = {'w': numpy.zeros(1 << 24)}\n"
    script += "while True: save(zeros, sys.argv[1])"
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "run/finetune/.best.tmp")]) as writer:
        while not (left := list((tmp_path / "run/finetune").glob(".tmp*"))):
            assert writer.poll() is None
            time.sleep(0.005)
        writer.send_signal(signal.SIGSTOP)
        left = list((tmp_path / "run/finetune").glob(".tmp*"))
        writer.kill()
    open_run(tmp_path / "run").close()
    assert [path.name for path in (tmp_path / "run/finetune").iterdir()] == ["out.txt"], left


def test_two_at_once_are_refused_and_the_lock_is_let_go(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    with pytest.raises(ResourceError, match="in use"):
        open_run(tmp_path / "run")
    run.close()
    open_run(tmp_path / "run").close()


def test_another_recipes_run_is_refused(tmp_path: Path) -> None:
    open_run(tmp_path / "run").close()
    with pytest.raises(UsageError, match="belongs to another recipe") as caught:
        open_run(tmp_path / "run", "two")
    assert "`one`" in str(caught.value.expected)
    assert "`two`" in str(caught.value.got)


def test_a_run_that_was_killed_while_it_was_made_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (".lock", ".recipe.yaml.4711.tmp", ".run.json.4711.tmp"):
        (folder / name).touch()
    run = Run.open(folder, "first", "name: first\n")
    run.close()
    assert {path.name for path in folder.iterdir()} == {".lock", "recipe.yaml", "run.json"}


def test_a_folder_with_other_things_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(UsageError, match="not a run directory"):
        open_run(tmp_path)
    assert [item.name for item in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_is_no_run_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        open_run(tmp_path / "file")


def test_a_place_that_cannot_be_written_is_a_lack_of_permission(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResourceError) as caught:
        open_run(tmp_path / "file" / "run")
    assert caught.value.exit_code == 5


def test_a_process_that_does_not_lead_writes_nothing(tmp_path: Path) -> None:
    open_run(tmp_path / "run").close()
    before = (tmp_path / "run" / "run.json").read_bytes()
    follower = Run.open(tmp_path / "run", "one", "name: changed\n", SilentReporter(), lead=False)
    follower.guess("x", 1, "y")
    follower.save()
    assert (tmp_path / "run" / "run.json").read_bytes() == before
