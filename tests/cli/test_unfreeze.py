"""Rates by depth and gradual unfreezing from a recipe: what is said, what is recorded, and what is refused."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli, Outcome
from safetensors.torch import load_file

Write = Callable[..., Path]


@pytest.fixture
def recipe(tiny_llama: Path, chat_rows: Path, tmp_path: Path) -> Write:
    """Writes a recipe of 4 steps in fp32 with the given lines; `freeze:` is line 5, `finetune:` comes last."""

    def write(freeze: str, finetune: str = "", steps: int = 4) -> Path:
        path = tmp_path / "recipe.yaml"
        text = f"name: thawing\ntask: chat\nmodel: {tiny_llama}\ndata: {{train: {chat_rows}, eval: 20%}}\n"
        tuned = f"finetune:\n  steps: {steps}\n  lr: 1e-2\n  warmup: 0\n  precision: fp32\n  trackers: []\n"
        path.write_text(text + freeze + tuned + finetune)
        return path

    return write


@pytest.fixture
def train(cli: Cli, recipe: Write, tmp_path: Path) -> Callable[..., tuple[Path, Outcome]]:
    def run(freeze: str = "", finetune: str = "", steps: int = 4, name: str = "run") -> tuple[Path, Outcome]:
        done = cli("finetune", recipe(freeze, finetune, steps), "-o", tmp_path / name)
        assert done.code == 0, done.err
        return tmp_path / name, done

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def groups(run: Path) -> dict[str, tuple[int, int, float, float]]:
    """Tensors, parameters, peak rate and weight decay of each group in run.json."""
    facts = json.loads((run / "run.json").read_text())["stages"]["finetune"]["facts"]
    return {name: tuple(rest) for name, *rest in facts["parameter_groups"]}  # type: ignore[misc]


def refused(outcome: Outcome, *needles: object) -> None:
    assert outcome.code == 2, outcome.out + outcome.err
    assert "Traceback" not in outcome.err
    missing = [str(needle) for needle in needles if str(needle) not in outcome.err]
    assert not missing, f"{missing} not in:\n{outcome.err}"


CONSTANT = "  schedule: constant\n"
LIST = "freeze:\n  blocks: all\n  embeddings: true\n  unfreeze:\n    - {at: 50%, blocks: 1}\n"


def test_a_list_of_what_thaws_runs(train: Any, tiny_llama: Path) -> None:
    run, done = train(LIST)
    assert "step 3: blocks 1 thaws, 9 tensors" in done.err
    plan = json.loads((run / "freeze" / "freeze.json").read_text())
    assert [(thaw["at"], thaw["what"], len(thaw["names"])) for thaw in plan["thaws"]] == [("50%", "blocks 1", 9)]
    before, after = weights(tiny_llama), weights(run / "finetune" / "model")
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == {name for name in before if "layers.0." in name or "embed" in name}


@pytest.mark.parametrize(
    ("preset", "thaws"),
    [
        ("head-first", ["step 1: all but the head thaws, 19 tensors"]),
        ("ulmfit", ["step 2: block 1 thaws, 9 tensors", "step 3: block 0 and the embeddings thaws, 10 tensors"]),
    ],
)
def test_a_preset_runs(preset: str, thaws: list[str], train: Any, tiny_llama: Path) -> None:
    run, done = train(f"freeze: {{unfreeze: {preset}}}\n")
    said = " ".join(done.err.split())
    assert [said.index(line) for line in thaws] == sorted(said.index(line) for line in thaws)
    before, after = weights(tiny_llama), weights(run / "finetune" / "model")
    assert not any(torch.equal(before[name], after[name]) for name in before)


def test_a_classifier_learns_head_first(cli: Cli, tiny_bert: Path, label_rows: Path, tmp_path: Path) -> None:
    settings = ("freeze.unfreeze=head-first", "freeze.embeddings=true", "finetune.steps=5", "finetune.layer_decay=0.5")
    options = [
        word for setting in (*settings, "finetune.lr=1e-2", "finetune.schedule=constant") for word in ("--set", setting)
    ]
    done = cli("finetune", "-m", tiny_bert, "-d", label_rows, "-o", tmp_path / "run", *options)
    assert done.code == 0, done.err
    assert "step 2: all but the head thaws, 32 tensors" in done.err
    before, after = weights(tiny_bert), weights(tmp_path / "run" / "finetune" / "model")
    same = {name for name in before if torch.equal(before[name], after["bert." + name])}
    assert same == {name for name in before if name.startswith("embeddings.")}
    assert {name: rest[2] for name, rest in groups(tmp_path / "run").items() if "no_decay" not in name} == {
        "block 0, decay, from step 2": 0.0025,
        "block 1, decay, from step 2": 0.005,
        "head, decay": 0.01,
    }


def test_the_freeze_stage_shows_when_what_moves(cli: Cli, recipe: Write, tmp_path: Path) -> None:
    done = cli("freeze", recipe(LIST + "    - {at: 3, embeddings: true}\n"), "-o", tmp_path / "run")
    assert done.code == 0, done.err
    assert "moves from 50% of the steps on" in done.err
    assert "moves from step 3 on" in done.err


def test_sgd_has_momentum_of_one_age_in_each_group(train: Any) -> None:
    run, _ = train("freeze: {unfreeze: ulmfit}\n", "  optimizer: {name: sgd, momentum: 0.9}\n")
    assert any("from step" in name for name in groups(run))


def test_the_groups_are_recorded_with_their_rates(train: Any) -> None:
    """What thaws later is in its group from the start."""
    run, done = train(
        LIST, CONSTANT + "  layer_decay: 0.5\n  weight_decay: 0.1\n  rates: [{head: true, lr_scale: 10}]\n"
    )
    found = groups(run)
    assert {name: (tensors, rate, decay) for name, (tensors, _, rate, decay) in found.items()} == {
        "block 1, decay, from step 3": (7, 0.005, 0.1),
        "block 1, no_decay, from step 3": (2, 0.005, 0.0),
        "head, decay": (1, 0.1, 0.1),
        "head, no_decay": (1, 0.01, 0.0),
    }
    assert found["head, no_decay"][1] == 32
    assert "parameter groups" in done.err


def test_a_part_moves_as_far_as_its_rate_says(cli: Cli, recipe: Write, tiny_llama: Path, tmp_path: Path) -> None:
    def moved(name: str, keys: str) -> dict[str, torch.Tensor]:
        plain = CONSTANT + "  optimizer: {name: sgd, momentum: 0}\n  max_grad_norm: null\n  weight_decay: 0\n"
        path = recipe("", plain + keys, steps=1)
        assert cli("finetune", path, "--set", "finetune.lr=1", "-o", tmp_path / name).code == 0
        after = weights(tmp_path / name / "finetune" / "model")
        return {name: after[name] - start for name, start in weights(tiny_llama).items()}

    same = moved("plain", "")
    changed = moved("rates", "  layer_decay: 0.5\n  rates: [{head: true, lr_scale: 4}, {blocks: 1, lr: 3}]\n")
    times = {"embed_tokens": 1 / 8, "layers.0.": 1 / 4, "layers.1.": 3.0, "model.norm": 1.0, "lm_head": 4.0}
    for name, way in same.items():
        expected = next(times[part] for part in times if part in name) * way
        assert (changed[name] - expected).norm() < 1e-3 * expected.norm(), name


def test_a_stop_between_two_thaws_ends_with_the_same_bits(cli: Cli, recipe: Write, tmp_path: Path) -> None:
    from llmkit.train.hooks.progress import ProgressHook

    path = recipe(LIST + "    - {at: 3, embeddings: true}\n", steps=5)
    done = ProgressHook.after_step

    def after_step(self: Any, state: Any, values: dict[str, Any]) -> None:
        done(self, state, values)
        if state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    assert cli("finetune", path, "-o", tmp_path / "whole").code == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProgressHook, "after_step", after_step)
        assert cli("finetune", path, "-o", tmp_path / "parts").code == 75
    again = cli("finetune", path, "-o", tmp_path / "parts")
    assert again.code == 0, again.err
    assert "embeddings thaws" in again.err
    whole, parts = (weights(tmp_path / name / "finetune" / "model") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("at", ["4", "100%"])
def test_what_would_never_thaw_is_refused(at: str, cli: Cli, recipe: Write, tmp_path: Path) -> None:
    done = cli("finetune", recipe(LIST.replace("50%", at)), "-o", tmp_path / "run")
    refused(done, "freeze.unfreeze", "step 4")


UNFREEZE = "freeze:\n  blocks: 0\n  unfreeze:\n"


@pytest.mark.parametrize(
    ("freeze", "needles"),
    [
        (UNFREEZE + "    - {at: 50%, blocks: 2}\n", ("freeze.unfreeze.0.blocks", "no block 2", "2 blocks, 0 to 1")),
        (UNFREEZE + "    - {at: 50%, head: true}\n", ("freeze.unfreeze.0", "`head` does not stand still")),
        (UNFREEZE + "    - {at: 1, blocks: 0}\n    - {at: 2, blocks: 0}\n", ("freeze.unfreeze.1", "thaws twice")),
        (
            UNFREEZE + "    - {at: 1, patterns: [nothing.*]}\n    - {at: 2, norms: true}\n",
            ("nothing.*", "matches no parameter", "`norms` does not stand still"),
        ),
        ("freeze: {blocks: all, embeddings: true, unfreeze: ulmfit}\n", ("nothing to thaw", "freeze.unfreeze")),
    ],
)
def test_what_cannot_thaw_is_refused(
    freeze: str, needles: tuple[str, ...], cli: Cli, recipe: Write, tmp_path: Path
) -> None:
    refused(cli("freeze", recipe(freeze), "-o", tmp_path / "run"), *needles)


def test_wrong_rates_are_refused_before_anything_runs(cli: Cli, recipe: Write, tmp_path: Path) -> None:
    rates = "  rates: [{blocks: 0, lr: 1}, {blocks: 7, lr: 1}, {blocks: 1, lr: 1}, {norms: true, lr: 1}]\n"
    done = cli("finetune", recipe("freeze: {blocks: 0}\n", rates), "-o", tmp_path / "run")
    refused(done, "3 mistakes", "finetune.rates.0", "`blocks 0` stands still")
    refused(done, "finetune.rates.1.blocks", "no block 7", "finetune.rates.3", "`norms` and `blocks 1` give two rates")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("freeze", "line", "needles"),
    [
        ("freeze: {blocks: 0, unfrezze: ulmfit}\n", 5, ("freeze.unfrezze", "did you mean `unfreeze`?")),
        ("freeze: {blocks: 0, unfreeze: ulmfitt}\n", 5, ("freeze.unfreeze", "did you mean `ulmfit`?")),
        (UNFREEZE + "    - {at: 50%, blocsk: 0}\n", 8, ("freeze.unfreeze.0.blocsk", "did you mean `blocks`?")),
        (UNFREEZE + "    - {at: 1, blocks: 0}\n    - at: later\n      head: true\n", 9, ("unfreeze.1.at", "later")),
        (UNFREEZE + "    - blocks: 0\n", 8, ("freeze.unfreeze.0.at", "is missing")),
        (UNFREEZE + "    - {at: 50%}\n", 8, ("freeze.unfreeze.0", "thaws nothing")),
        (UNFREEZE + "    - {at: -1, blocks: 0}\n", 8, ("freeze.unfreeze.0.at", "not negative")),
        (UNFREEZE + "    - {at: 101%, blocks: 0}\n", 8, ("freeze.unfreeze.0.at", "100%")),
        ("freeze:\n  unfreeze: [{at: 1, blocks: 0}]\n", 5, ("freezes nothing",)),
    ],
)
def test_a_mistake_in_the_keys_has_its_line(
    freeze: str, line: int, needles: tuple[str, ...], cli: Cli, recipe: Write, tmp_path: Path
) -> None:
    path = recipe(freeze)
    refused(cli("run", path, "-o", tmp_path / "run"), f"{path}:{line}", *needles)
    assert not (tmp_path / "run").exists()


def test_mistakes_of_both_sections_are_told_at_once(cli: Cli, recipe: Write, tmp_path: Path) -> None:
    path = recipe(UNFREEZE + "    - {at: 50%, blocsk: 0}\n", "  layer_decya: 0.9\n  rates: [{head: true}]\n")
    done = cli("run", path, "-o", tmp_path / "run")
    refused(done, "blocsk", f"{path}:8", "layer_decya", f"{path}:15", "finetune.rates.0", f"{path}:16")
