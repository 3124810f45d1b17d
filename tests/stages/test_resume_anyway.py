"""A training that was begun with other inputs is not gone on with, and it is said what differs; `--resume-anyway` takes
what fits of it, and lists that."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli, Outcome, sentence, write_rows
from safetensors.torch import load_file

from llmkit.run.log import read_metrics
from llmkit.train.loop import Fit

SETTINGS = (
    *("name=one", "data.eval=20%", "finetune.steps=12", "finetune.lr=1e-3", "finetune.batch_size=6"),
    *("finetune.save_every=2", "finetune.log_every=1", "finetune.trackers=[]", "finetune.precision=fp32"),
)
Command = Callable[..., Outcome]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def command(cli: Cli, tiny_llama: Path, chat_rows: Path, run: Path) -> Command:
    def call(*more: str, data: Path = chat_rows, flags: tuple[str, ...] = (), name: str = "run") -> Outcome:
        words = [word for setting in (*SETTINGS, *more) for word in ("--set", setting)]
        return cli(name, "-m", tiny_llama, "-d", data, "-o", run, *words, *flags, "--json")

    return call


@pytest.fixture
def stopped(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that died at step 7, with a checkpoint of step 6."""
    real = Fit._step

    def dies(fit: Fit, *rest: Any) -> Any:
        if fit.state.step == 7:
            raise RuntimeError("the machine went down")
        return real(fit, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Fit, "_step", dies)
        assert command("stages=[preprocess,finetune]").code == 1
    for thread in threading.enumerate():
        if thread.name == "llmkit-checkpoint":
            thread.join()


def more_rows(folder: Path) -> Path:
    rows = (
        {"messages": [{"role": "user", "content": sentence(i)}, {"role": "assistant", "content": sentence(i + 7)}]}
        for i in range(70)
    )
    return write_rows(folder / "more.jsonl", rows)


CHANGES: dict[str, tuple[tuple[str, ...], str, str]] = {
    # what is changed, what the refusal names, what is told of taking over
    "lr": (("finetune.lr=5e-4",), "finetune.lr 0.001 -> 0.0005", "21 of 21 weights, 63 of 63 tensors of the optimizer"),
    "batch size": (("finetune.batch_size=3",), "finetune.batch_size 6 -> 3", "21 of 21 weights, 63 of 63 tensors"),
    "steps": (("finetune.steps=9",), "finetune.steps 12 -> 9", "21 of 21 weights"),
    "seed": (("seed=5",), "seed 17 -> 5", "21 of 21 weights"),
    "optimizer": (
        ("finetune.optimizer={name: sgd, momentum: 0.9}",),
        "finetune.optimizer",
        "21 of 21 weights, 0 of 63 tensors of the optimizer",
    ),
    "adafactor": (("finetune.optimizer=adafactor",), "finetune.optimizer", "21 of 21 weights, 0 of 63 tensors"),
    "muon": (("finetune.optimizer=muon",), "finetune.optimizer", "21 of 21 weights"),
    "freeze": (
        ("stages=[preprocess,freeze,finetune]", "freeze={blocks: 0, embeddings: true}"),
        "the freeze plan",
        "of 63 tensors of the optimizer",
    ),
    "an average": (("finetune.ema=0.9",), "finetune.ema None -> 0.9", "21 of 42 weights, 63 of 63 tensors"),
    "an adapter": (("finetune.adapter=lora",), "finetune.adapter", "0 of 28 weights, 0 of 63 tensors"),
    "precision": (("finetune.precision=bf16",), "finetune.precision fp32 -> bf16", "21 of 21 weights"),
}


@pytest.mark.usefixtures("stopped")
@pytest.mark.parametrize("name", CHANGES)
def test_refused_it_is_said_what_differs_and_nothing_is_touched(command: Command, run: Path, name: str) -> None:
    settings, differs, _ = CHANGES[name]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and "finetune" in path.parts}
    refused = command("stages=[preprocess,finetune]", *settings)
    assert (refused.code, refused.json["kind"]) == (2, "usage")
    assert "finetune stands at step 6" in refused.json["what"]
    assert differs in refused.json["got"]
    assert "--resume-anyway" in refused.json["hint"]
    assert "--no-resume" in refused.json["hint"]
    assert {path: path.read_bytes() for path in before} == before
    again = command("stages=[preprocess,finetune]")
    assert again.code == 0, "with the change undone it goes on"
    assert "going on after step 6 of 12" in again.err


@pytest.mark.usefixtures("stopped")
@pytest.mark.parametrize("name", CHANGES)
def test_anyway_it_takes_what_fits_and_lists_it(command: Command, run: Path, name: str) -> None:
    settings, _, taken = CHANGES[name]
    done = command("stages=[preprocess,finetune]", *settings, flags=("--resume-anyway",))
    assert done.code == 0, done.out
    said = " ".join(done.err.split())
    assert "taken over from step 6 of other inputs" in said
    assert taken in said
    assert "going on after step 6" in said
    steps = [line["step"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    last = 9 if name == "steps" else 12
    assert steps == list(range(1, last + 1))
    assert (run / "finetune" / "model" / "model.safetensors").exists()
    assert not list((run / "finetune").glob("checkpoints/unused-*"))


@pytest.mark.usefixtures("stopped")
def test_the_weights_are_really_taken_over(command: Command, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = load_file(run / "finetune" / "checkpoints" / "step-00000006" / "weights.safetensors")
    seen: dict[str, Any] = {}
    resume = Fit.resume

    def look(fit: Fit) -> bool:
        found = resume(fit)
        seen.update({name: tensor.clone() for name, tensor in fit.masters.saved().items()})
        seen["batch"], seen["rate"] = fit.state.batch, fit.base_rates[0]
        return found

    monkeypatch.setattr(Fit, "resume", look)
    assert command("stages=[preprocess,finetune]", "finetune.lr=5e-4", flags=("--resume-anyway",)).code == 0
    assert (seen.pop("batch"), seen.pop("rate")) == (6, 5e-4)
    assert seen.keys() == saved.keys()
    assert all((seen[name] == tensor).all() for name, tensor in saved.items())


@pytest.mark.usefixtures("stopped")
def test_other_data(command: Command, run: Path, tmp_path: Path) -> None:
    other = more_rows(tmp_path)
    refused = command("stages=[preprocess,finetune]", data=other)
    assert refused.code == 2, refused.out
    assert "the corpus" in refused.json["got"]
    done = command("stages=[preprocess,finetune]", data=other, flags=("--resume-anyway",))
    assert done.code == 0, done.out
    said = " ".join(done.err.split())
    assert "taken over from step 6 of other inputs: 21 of 21 weights" in said
    state = json.loads((run / "run.json").read_text())["stages"]["finetune"]
    assert state["state"] == "done"


@pytest.mark.usefixtures("stopped")
def test_killed_again_after_that_it_goes_on_exactly(
    command: Command, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From then on the inputs are the new ones: no flag is needed, and a kill changes nothing."""
    import shutil

    shutil.copytree(run, tmp_path / "copy")
    settings = ("stages=[preprocess,finetune]", "finetune.lr=5e-4")
    assert command(*settings, flags=("--resume-anyway",)).code == 0
    whole = (run / "finetune" / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(run)
    shutil.copytree(tmp_path / "copy", run)
    real = Fit._step
    for place in (6, 7, 9):  # before the first step of the new inputs, before its first checkpoint, after it

        def dies(fit: Fit, *rest: Any, place: int = place) -> Any:
            if fit.state.step == place:
                raise RuntimeError("the machine went down")
            return real(fit, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(Fit, "_step", dies)
            flags = ("--resume-anyway",) if place == 6 else ()
            died = command(*settings, flags=flags)
            assert died.code == 1, died.out
    again = command(*settings)
    assert again.code == 0, again.out
    assert (run / "finetune" / "model" / "model.safetensors").read_bytes() == whole


def test_it_changes_nothing_where_nothing_differs(command: Command, run: Path) -> None:
    assert command("stages=[preprocess,finetune]", flags=("--resume-anyway",)).code == 0
    again = command("stages=[preprocess,finetune]", flags=("--resume-anyway",))
    assert again.code == 0
    assert "unchanged" in again.err


@pytest.mark.usefixtures("stopped")
def test_no_resume_keeps_what_there_was(command: Command, run: Path) -> None:
    done = command("stages=[preprocess,finetune]", "finetune.lr=5e-4", flags=("--no-resume",))
    assert done.code == 0, done.out
    assert "taken over" not in done.err
    assert [path.name for path in (run / "previous").glob("finetune-*/checkpoints/step-*")]


@pytest.mark.usefixtures("stopped")
def test_a_dry_run_says_the_same(command: Command, run: Path) -> None:
    refused = command("stages=[preprocess,finetune]", "finetune.lr=5e-4", flags=("--dry-run",))
    assert refused.code == 2
    assert "finetune.lr 0.001 -> 0.0005" in refused.json["got"]
    would = command("stages=[preprocess,finetune]", "finetune.lr=5e-4", flags=("--dry-run", "--resume-anyway"))
    assert would.code == 0
    assert would.json["stages"]["finetune"]["runs"]
