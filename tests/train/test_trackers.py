"""Trackers: the recipe, the steps and the final scores reach them, and one that fails takes nothing from a training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli

from llmkit.errors import RecipeError, ResourceError
from llmkit.train.hooks.trackers import TrackersHook, Tracking, flat_config, track_scores
from llmkit.train.state import TrainState

QUICK = (
    "finetune.steps=6",
    "finetune.log_every=2",
    "finetune.eval_every=3",
    "data.eval=20%",
    "evaluate.max_new_tokens=2",
)


def flags(*settings: str) -> list[str]:
    return [word for setting in (*QUICK, *settings) for word in ("--set", setting)]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All numbers that TensorBoard finds below a folder: name -> (step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def hyperparameters(folder: Path) -> list[dict[str, Any]]:
    """The configs that TensorBoard's HParams view finds: one for each session."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    sessions = []
    for file in sorted({path.parent for path in folder.rglob("events.out.*")}):
        contents = EventAccumulator(str(file)).Reload().summary_metadata
        for metadata in contents.values():
            if metadata.plugin_data.plugin_name == "hparams":
                data = HParamsPluginData.FromString(metadata.plugin_data.content)
                if data.HasField("session_start_info"):
                    fields = data.session_start_info.hparams
                    sessions.append({name: value.string_value or value.number_value for name, value in fields.items()})
    return sessions


def tracking(tmp_path: Path, *names: str) -> Tracking:
    return Tracking(names, tmp_path, "project", "run", "finetune.trackers")


def test_tensorboard_has_steps_recipe_and_scores(cli: Cli, tiny_llama: Path, chat_rows: Path, tmp_path: Path) -> None:
    done = cli("run", "-m", tiny_llama, "-d", chat_rows, "-o", tmp_path / "run", *flags())
    assert done.code == 0, done.err
    folder = tmp_path / "run" / "finetune" / "trackers" / "run"
    found = scalars(folder)
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = {line["step"]: line["loss"] for line in logged if "loss" in line}
    assert [step for step, _ in found["train/loss"]] == list(steps) == [1, 2, 4, 6]
    assert [value for _, value in found["train/loss"]] == pytest.approx(list(steps.values()), rel=1e-6)
    assert [step for step, _ in found["held-out/eval_loss"]] == [3, 6]
    results = json.loads((tmp_path / "run" / "evaluate" / "results.json").read_text())
    for who in ("model", "parent"):
        assert found[f"scores/{who}.loss"][-1][1] == pytest.approx(results[who]["loss"], rel=1e-6)
    assert "scores/train_loss" in found
    for config in hyperparameters(folder):
        assert (config["seed"], config["finetune.steps"], config["task"]) == (17, 6, "chat")
    assert hyperparameters(folder)


def test_a_training_that_is_resumed_goes_on_in_the_same_place(tmp_path: Path) -> None:
    first = tracking(tmp_path, "tensorboard").open({"seed": 1}, step=0)
    hook = TrackersHook(first, lambda step: True, pytest.fail)
    for step in (1, 2, 3):
        hook.after_step(TrainState(step=step), {"loss": float(step)})
    hook.close()
    again = TrackersHook(tracking(tmp_path, "tensorboard").open({"seed": 1}, step=2), lambda step: True, pytest.fail)
    again.after_step(TrainState(step=3), {"loss": 30.0})
    again.after_event(TrainState(step=3), "rolled back", "a spike")
    again.close()
    found = scalars(tmp_path / "trackers" / "project")
    assert found["train/loss"] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert found["event/rolled_back"] == [(3, 1.0)]
    assert len(hyperparameters(tmp_path / "trackers")) == 1


def test_scores_of_a_training_that_was_not_tracked_go_nowhere(tmp_path: Path) -> None:
    track_scores(tracking(tmp_path, "tensorboard"), {}, {"accuracy": 1.0}, 3, pytest.fail)
    assert not list(tmp_path.iterdir())


class Failing:
    """A tracker whose server is gone."""

    name = "failing"

    def __init__(self) -> None:
        self.calls = 0

    def log(self, values: dict[str, Any], step: int) -> None:
        self.calls += 1
        raise ConnectionError("https://me:hunter2@host is gone")

    def finish(self) -> None:
        self.calls += 1


class Listening(Failing):
    name = "listening"

    def log(self, values: dict[str, Any], step: int) -> None:
        self.calls += 1


def test_a_tracker_that_fails_is_left_out_and_told_of_once() -> None:
    warnings: list[str] = []
    failing, listening = Failing(), Listening()
    hook = TrackersHook([failing, listening], lambda step: True, warnings.append)
    for step in (1, 2, 3):
        hook.after_step(TrainState(step=step), {"loss": 1.0})
    hook.close()
    assert (failing.calls, listening.calls) == (1, 4)
    (warning,) = warnings
    assert "the tracker failing failed, and is left out from here on: ConnectionError" in warning
    assert "hunter2" not in warning


def test_a_tracker_that_is_not_installed_is_refused(tmp_path: Path) -> None:
    from accelerate.tracking import get_available_trackers

    absent = next(
        name for name in ("aim", "clearml", "comet_ml") if name not in {k.value for k in get_available_trackers()}
    )
    with pytest.raises(RecipeError, match="is not installed"):
        tracking(tmp_path, "tensorboard", absent).open({}, step=0)


def test_a_tracker_that_does_not_start_is_named(tmp_path: Path) -> None:
    (tmp_path / "trackers").write_text("a file, where the folder should be")
    with pytest.raises(ResourceError, match="the tracker `tensorboard` does not start"):
        tracking(tmp_path, "tensorboard").open({}, step=0)


def test_a_recipe_as_trackers_take_it() -> None:
    recipe = {
        "seed": 17,
        "stages": ["preprocess", "finetune"],
        "data": {"train": [{"uri": "https://me:hunter2@host/rows", "weight": 0.5}], "eval": None},
        "freeze": {"embeddings": True},
    }
    found = flat_config(recipe)
    assert found["seed"] == 17
    assert found["stages"] == "preprocess, finetune"
    assert found["freeze.embeddings"] is True
    assert "data.eval" not in found
    assert json.loads(str(found["data.train"])) == [{"uri": "https://<SECRET>@host/rows", "weight": 0.5}]


def test_mlflow_keeps_one_run_for_training_and_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    hook = TrackersHook(tracking(tmp_path, "mlflow").open({"seed": 17}, step=0), lambda step: True, pytest.fail)
    hook.after_step(TrainState(step=1), {"loss": 2.0})
    hook.close()
    again = TrackersHook(tracking(tmp_path, "mlflow").open({"seed": 17}, step=1), lambda step: True, pytest.fail)
    again.after_step(TrainState(step=2), {"loss": 1.0})
    again.close()
    track_scores(tracking(tmp_path, "mlflow"), {"seed": 17}, {"model.accuracy": 0.9}, 2, pytest.fail)
    (run,) = mlflow.search_runs(experiment_names=["project"], output_format="list")
    assert run.data.params["seed"] == "17"
    assert (run.data.metrics["train/loss"], run.data.metrics["scores/model.accuracy"]) == (1.0, 0.9)
    assert run.info.run_name == "run"


def test_wandb_keeps_one_run_for_training_and_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    hook = TrackersHook(tracking(tmp_path, "wandb").open({"seed": 17}, step=0), lambda step: True, pytest.fail)
    hook.after_step(TrainState(step=1), {"loss": 2.0})
    hook.close()
    track_scores(tracking(tmp_path, "wandb"), {"seed": 17}, {"model.accuracy": 0.9}, 2, pytest.fail)
    wandb.teardown()  # its service writes the files when it ends
    identity = json.loads((tmp_path / "trackers.json").read_text())["wandb"]["id"]
    files = list((tmp_path / "wandb").glob(f"offline-run-*/run-{identity}.wandb"))
    contents = b"".join(file.read_bytes() for file in files)
    assert b"scores/model.accuracy" in contents
    assert b"train/loss" in contents
