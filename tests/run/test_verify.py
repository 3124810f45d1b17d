"""Every file that something vouches for is checked, each kind of damage is named, and nothing outside is followed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from llmkit.data.corpus import Column, CorpusWriter
from llmkit.errors import Problem, UsageError
from llmkit.files import digest_json, read_json, write_json
from llmkit.run.checkpoint import Checkpoint, Checkpoints
from llmkit.run.directory import Artifact, Run
from llmkit.run.findings import Verification
from llmkit.run.verify import verify_run

Damage = Callable[[Path], Any]


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a corpus, a stage that trained, and one that was stopped after two checkpoints."""
    path = tmp_path_factory.mktemp("verify") / "run"
    run = Run.open(path, "run", "name: run\nstages: [preprocess, pretrain, finetune]\n")
    run.start("preprocess", {"a": 1}, keep=False)
    corpus = CorpusWriter(path / "preprocess" / "train", {"ids": Column("uint16")})
    for number in range(9):
        corpus.add({"ids": np.arange(number)})
    corpus.finish({"identity": {"task": "text"}})
    finish(run, "preprocess")
    run.start("pretrain", {"a": 2}, keep=False)
    save_file({"w": torch.arange(6.0)}, path / "pretrain" / "model.safetensors")
    finish(run, "pretrain")
    run.start("finetune", {"a": 3}, keep=False)
    checkpoints = Checkpoints(path / "finetune" / "checkpoints", run.stage("finetune")["fingerprint"])
    for step in (10, 20):
        checkpoints.write(step, Checkpoint({"w": torch.ones(4)}, {}, {}, {}))
    run.note_state("finetune", "stopped")
    (path / "metrics.jsonl").write_text('{"stage": "finetune", "step": 10, "loss": 1.0}\n')
    run.close()
    return path


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "run", symlinks=True)


def finish(run: Run, stage: str) -> None:
    files = tuple(str(p.relative_to(run.path)) for p in sorted(run.folder(stage).rglob("*")) if p.is_file())
    run.finish(Artifact(stage, run.folder(stage), "digest", files), 1.0)


def flip(path: Path, place: int = -1) -> None:
    """Changes one bit, and nothing that a file's listing shows."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def change_record(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    record = read_json(run / "run.json")
    change(record)
    write_json(run / "run.json", record)


def rows(found: Verification) -> dict[str, str]:
    return {check.what: check.verdict for check in found.checks}


def only_problem(run: Path) -> Problem:
    problems = verify_run(run).problems
    assert len(problems) == 1, problems
    return problems[0]


def test_a_whole_run_holds(run: Path) -> None:
    read: list[int] = []
    found = verify_run(run, lambda nbytes: lambda done: read.append(done))
    assert rows(found) == {
        "run.json": "ok",
        "recipe.yaml": "ok",
        "metrics.jsonl": "ok",
        "preprocess": "ok",
        "pretrain": "ok",
        "finetune": "not finished (stopped)",
        "checkpoint finetune/checkpoints/step-00000010": "ok",
        "checkpoint finetune/checkpoints/step-00000020": "ok",
        "corpus preprocess/train": "ok",
        "safetensors headers": "ok",
    }
    assert not found.notes
    assert sum(read) == found.nbytes > 0
    assert found.files == 4 + 6


def test_verifying_changes_nothing(run: Path) -> None:
    def tree() -> dict[str, tuple[int, int]]:
        return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in run.rglob("*")}

    (run / ".lock").unlink()
    before = tree()
    verify_run(run)
    assert tree() == before


CHECKPOINT = "finetune/checkpoints/step-00000020"


@pytest.mark.parametrize(
    ("file", "hint"),
    [
        ("preprocess/train/ids.bin", "llmkit preprocess RUN --no-resume"),
        ("preprocess/train/ids.offsets.bin", "llmkit preprocess RUN --no-resume"),
        ("pretrain/model.safetensors", "llmkit pretrain RUN --no-resume"),
        (f"{CHECKPOINT}/weights.safetensors", "llmkit run RUN"),
        (f"{CHECKPOINT}/state.json", "llmkit run RUN"),
    ],
)
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_every_kind_of_file_is_checked(file: str, hint: str, how: str, run: Path) -> None:
    path = run / file
    size = path.stat().st_size
    if how == "flipped":
        flip(path)
    elif how == "cut":
        os.truncate(path, size - 1)
    else:
        path.unlink()
    problem = only_problem(run)
    assert problem.where == str(path)
    assert hint.replace("RUN", str(run)) in (problem.hint or "")
    said = {"flipped": "a file is damaged", "cut": "a file has another size", "gone": "a file is missing"}
    assert problem.what == said[how]
    assert "SHA-256" in (problem.expected or "") if how == "flipped" else f"{size:,} bytes" == problem.expected


@pytest.mark.parametrize("file", ["run.json", "recipe.yaml", f"{CHECKPOINT}/manifest.json"])
@pytest.mark.parametrize("text", [None, "", "{", "[]", '"x"'])
def test_what_vouches_for_others_is_checked_itself(file: str, text: str | None, run: Path) -> None:
    (run / file).unlink()
    if text is not None:
        (run / file).write_text(text)
    problem = only_problem(run)
    assert problem.where == str(run / file)
    assert problem.hint


def test_a_changed_input_of_a_stage_is_seen(run: Path) -> None:
    change_record(run, lambda record: record["stages"]["pretrain"]["inputs"].update(a=5))
    problem = only_problem(run)
    assert "the inputs of pretrain" in problem.what
    assert (problem.got, problem.expected) == (digest_json({"a": 5}), digest_json({"a": 2}))


def test_a_corpus_that_vouches_for_itself_alone_is_seen(run: Path) -> None:
    flip(run / "preprocess" / "train" / "ids.bin")
    manifest = run / "preprocess" / "train" / "corpus.json"
    corpus = read_json(manifest)
    from llmkit.files import digest_file

    corpus["sha256"]["ids.bin"] = digest_file(manifest.with_name("ids.bin"))
    write_json(manifest, corpus)
    wheres = {problem.where for problem in verify_run(run).problems}
    assert {str(manifest), str(manifest.with_name("ids.bin"))} == wheres
    assert any(problem.what == "corpus.json vouches for another corpus" for problem in verify_run(run).problems)


def test_older_runs_are_checked_by_size_and_said_so(run: Path) -> None:
    def to_sizes(record: dict[str, Any]) -> None:
        for stage in ("preprocess", "pretrain"):
            files = record["stages"][stage]["files"]
            record["stages"][stage]["files"] = {name: seal["bytes"] for name, seal in files.items()}

    change_record(run, to_sizes)
    found = verify_run(run)
    assert rows(found)["pretrain"] == "ok, 1 by size only"
    assert not found.problems
    os.truncate(run / "pretrain" / "model.safetensors", 10)
    assert {problem.what for problem in verify_run(run).problems} == {"a file has another size"}


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "pretrain/../../outside", "", "a\0b"])
@pytest.mark.parametrize("place", ["run.json", "manifest.json", "corpus.json"])
def test_a_name_that_leads_out_is_damage_and_is_not_opened(name: str, place: str, run: Path) -> None:
    os.mkfifo(run.parent / "outside")  # which to open would wait for ever
    if place == "run.json":
        seal = {"bytes": 0, "sha256": "x", "mtime_ns": 0}
        change_record(run, lambda record: record["stages"]["pretrain"]["files"].update({name: seal}))
    else:
        file = run / CHECKPOINT / place if place == "manifest.json" else run / "preprocess" / "train" / place
        manifest = read_json(file)
        manifest["files"][name] = {"bytes": 0, "sha256": "x"} if place == "manifest.json" else 0
        write_json(file, manifest)
    found = [problem for problem in verify_run(run).problems if problem.got == name]
    assert [problem.what for problem in found] == ["a file is named that lies outside"]


@pytest.mark.parametrize("file", ["pretrain/model.safetensors", f"{CHECKPOINT}/state.json", "metrics.jsonl"])
def test_a_link_that_leads_out_is_damage(file: str, run: Path) -> None:
    outside = run.parent / "outside"
    (run / file).rename(outside)
    (run / file).symlink_to(outside)
    problem = only_problem(run)
    assert problem.where == str(run / file)
    assert problem.got == f"a link to {outside.resolve()}"


def test_a_linked_folder_is_not_followed(run: Path) -> None:
    (run / CHECKPOINT).rename(run.parent / "elsewhere")
    (run / CHECKPOINT).symlink_to(run.parent / "elsewhere")
    problem = only_problem(run)
    assert (problem.where, problem.what) == (str(run / CHECKPOINT), "a folder is a link that leads out of the run")


def test_links_within_the_run_and_loops_are_told_apart(run: Path) -> None:
    model = run / "pretrain" / "model.safetensors"
    model.rename(run / "pretrain" / "real.safetensors")
    model.symlink_to("real.safetensors")
    assert not verify_run(run).problems
    model.unlink()
    model.symlink_to("model.safetensors")
    assert only_problem(run).where == str(model)


def test_what_is_no_file_is_not_opened(run: Path) -> None:
    model = run / "pretrain" / "model.safetensors"
    model.unlink()
    os.mkfifo(model)
    assert only_problem(run).got == "no regular file"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "deserializing"),
        (b"\xff" * 16, "header too large"),
        ((50).to_bytes(8, "little") + b'{"w":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}', "header"),
    ],
)
def test_a_header_that_is_not_sound_is_named(content: bytes, said: str, run: Path) -> None:
    (run / "finetune" / "best.safetensors").write_bytes(content)
    problem = only_problem(run)
    assert problem.what == "a file is no sound safetensors file"
    assert said in (problem.got or "")


def test_what_is_unfinished_or_set_aside_is_named_and_no_damage(run: Path) -> None:
    places = (f"{CHECKPOINT}/../.step-00000030.7.tmp", f"{CHECKPOINT}/../unused-step-00000005", "preprocess/work")
    for place in places:
        (run / place).mkdir()
        (run / place / "weights.safetensors").write_text("half")
    found = verify_run(run)
    assert not found.problems
    assert len(found.notes) == 3
    for name in (".step-00000030.7.tmp is not finished", "unused-step-00000005 was set aside", "work is not finished"):
        assert any(name in note for note in found.notes)


@pytest.mark.parametrize(("line", "damaged"), [("[]\n", True), ("{}\n", True), ("x\n", True), ('{"stage": "fi', False)])
def test_a_line_of_the_log_is_damage_unless_a_kill_cut_it_short(line: str, damaged: bool, run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(line)
    found = verify_run(run)
    assert bool(found.problems) is damaged
    assert bool(found.notes) is not damaged
    if damaged:
        assert found.problems[0].where == f"{run / 'metrics.jsonl'}:2"


def test_a_recipe_of_another_run_is_seen(run: Path) -> None:
    (run / "recipe.yaml").write_text("name: other\n")
    assert only_problem(run).what == "recipe.yaml is of another run"


def test_a_manifest_of_another_step_is_seen(run: Path) -> None:
    shutil.rmtree(run / CHECKPOINT)
    (run / CHECKPOINT).with_name("step-00000010").rename(run / CHECKPOINT)
    problem = only_problem(run)
    assert (problem.got, problem.expected) == ("step 10", "step 20")


@pytest.mark.parametrize("seal", [{"bytes": "x", "sha256": "y"}, {"bytes": 3}, {}, None, -1, True, "x", 1.5])
def test_a_seal_that_makes_no_sense_is_damage(seal: Any, run: Path) -> None:
    change_record(
        run, lambda record: record["stages"]["pretrain"]["files"].update({"pretrain/model.safetensors": seal})
    )
    assert only_problem(run).what == "what is said of a file is damaged"


def test_a_run_at_work_is_said_to_be(run: Path) -> None:
    held = Run.open(run, "run", "name: run\n")
    found = verify_run(run)
    held.close()
    assert not found.problems
    assert "at work" in found.notes[-1]


def test_a_checkpoint_that_a_run_at_work_deletes_meanwhile_is_no_damage(run: Path) -> None:
    def delete(nbytes: int) -> Callable[[int], None]:
        shutil.rmtree(run / CHECKPOINT)
        return lambda done: None

    held = Run.open(run, "run", "name: run\n")
    found = verify_run(run, delete)
    held.close()
    assert rows(found)[f"checkpoint {CHECKPOINT}"] == "deleted meanwhile"
    assert not found.problems


@pytest.mark.parametrize("place", ["nowhere", "."])
def test_a_folder_that_is_no_run_is_refused(place: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no run"):
        verify_run(tmp_path / place)


def test_text_that_cannot_be_written_is_damage(run: Path) -> None:
    record = read_json(run / "run.json")
    record["stages"]["pretrain"]["inputs"] = {"a": "\ud800"}
    record["stages"]["pretrain"]["files"]["\ud800"] = {"bytes": 1, "sha256": "x", "mtime_ns": 1}
    (run / "run.json").write_text(json.dumps(record))
    assert len(verify_run(run).problems) == 2
