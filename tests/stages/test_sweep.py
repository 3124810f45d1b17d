"""How much to freeze, by evidence: each depth is tried once, as fine-tuning would train it, and the choice has a reason."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli, Outcome, sentence, write_rows

from llmkit.cli.app import main
from llmkit.model.freezing import FreezePlan
from llmkit.stages import sweep as sweeping
from llmkit.stages.sweep import Sweep, Trial, depths_to_try, recommend, sweep_rows

SETTINGS = (
    "data.eval=20%",
    "finetune.steps=4",
    "finetune.lr=1e-2",
    "finetune.warmup=0",
    "finetune.precision=fp32",
    "finetune.trackers=[]",
)
DEPTHS = ["the head alone", "the last block", "everything"]  # of a model of two blocks


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        (0, [0, None]),
        (1, [0, None]),
        (2, [0, 1, None]),
        (3, [0, 1, 2, None]),
        (4, [0, 1, 2, None]),
        (12, [0, 1, 2, 4, 8, None]),
        (30, [0, 1, 2, 4, 8, 16, None]),
    ],
)
def test_depths_double_from_the_head_to_everything(blocks: int, expected: list[int | None]) -> None:
    assert depths_to_try(blocks) == expected


def trial(name: str, seconds: float, loss: float, accuracy: float | None = None) -> Trial:
    return Trial(name, 0, 10, seconds, loss, accuracy)


Score = tuple[float, float]  # seconds, and loss or accuracy


@pytest.mark.parametrize(
    ("scores", "chosen", "said"),
    [
        (
            [(1, 0.70), (2, 0.90), (4, 0.904)],
            1,
            "within half a point of the best (0.9040, number 2), in 50% of its time",
        ),
        (
            [(1, 0.70), (2, 0.89), (4, 0.904)],
            2,
            "the best accuracy, 0.9040; nothing that is quicker comes within half a",
        ),
        ([(1, 0.80), (2, 0.80), (4, 0.80)], 0, "the best accuracy, 0.8000"),
        ([(4, 0.80), (2, 0.80), (1, 0.80)], 2, "in 25% of its time"),
        ([(1, 0.899), (2, 0.9), (4, 0.902)], 0, "in 25% of its time"),
        ([(1, 0.0), (2, 0.0)], 0, "the best accuracy, 0.0000"),
        ([(1, 1.0)], 0, "the best accuracy"),
    ],
)
def test_the_quickest_that_is_as_accurate_as_the_best(scores: list[Score], chosen: int, said: str) -> None:
    trials = [trial(f"number {n}", seconds, 1.0 - n, accuracy) for n, (seconds, accuracy) in enumerate(scores)]
    found, reason = recommend(trials)
    assert found is trials[chosen]
    assert said in reason


@pytest.mark.parametrize(
    ("scores", "chosen", "said"),
    [
        (
            [(1, 3.0), (2, 2.01), (4, 2.0)],
            1,
            "loss 2.0100, within 1 % of the best (2.0000, number 2), in 50% of its time",
        ),
        ([(1, 3.0), (2, 2.03), (4, 2.0)], 2, "the best loss, 2.0000; nothing that is quicker comes within 1 %"),
        ([(1, 2.0), (2, 2.5), (4, 2.2)], 0, "the best loss, 2.0000"),
        ([(1, 2.0), (2, 2.0)], 0, "the best loss"),
        ([(2, 2.0), (1, 2.0)], 1, "in 50% of its time"),
    ],
)
def test_the_quickest_whose_loss_is_as_low_as_the_best(scores: list[Score], chosen: int, said: str) -> None:
    trials = [trial(f"number {n}", seconds, loss) for n, (seconds, loss) in enumerate(scores)]
    found, reason = recommend(trials)
    assert found is trials[chosen]
    assert said in reason


def test_rows_have_bars_as_long_as_their_seconds() -> None:
    trials = (trial("short", 0.1, 2.0), trial("half", 8.0, 1.5, 0.5), trial("long", 16.0, 1.0, 0.75))
    rows = sweep_rows(Sweep(trials, trials[1], "why"))
    assert [row[3].count("█") for row in rows] == [1, 8, 16]
    assert [row[0] for row in rows] == ["", "->", ""]
    assert [row[-1] for row in rows] == ["", "0.5000", "0.7500"]


Command = Callable[..., Outcome]


def options(*settings: str) -> list[str]:
    """The settings of all runs, but for those that are given."""
    keys = {setting.partition("=")[0] for setting in settings}
    given = [setting for setting in SETTINGS if setting.partition("=")[0] not in keys]
    return [word for setting in (*given, *settings) for word in ("--set", setting)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 texts with one of three labels."""
    found = ({"text": sentence(i), "label": ("a", "b", "c")[i % 3]} for i in range(60))
    return write_rows(tmp_path_factory.mktemp("rows") / "labels.jsonl", found)


@pytest.fixture
def command(cli: Cli, tiny_bert: Path, rows: Path, tmp_path: Path) -> Command:
    """A command on the tiny classifier, with the settings given."""

    def run(
        name: str, *settings: str, flags: tuple[str, ...] = (), model: Any = None, data: Any = None, out: str = "run"
    ) -> Outcome:
        where = ("-m", model or tiny_bert, "-d", data or rows, "-o", tmp_path / out)
        return cli(name, *where, *flags, *options(*settings))

    return run


@pytest.fixture(scope="module")
def whole(tiny_bert: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has swept."""
    run, errors = tmp_path_factory.mktemp("whole") / "run", StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()), redirect_stderr(errors):
        given = ("-m", tiny_bert, "-d", rows, "-o", run, "--sweep", *options())
        patch.setattr("sys.argv", ["llmkit", "freeze", *map(str, given)])
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 0, errors.getvalue()
    return run


@pytest.fixture
def swept(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, to go on with."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """The depths that are tried from now on."""
    found: list[int | None] = []
    really = sweeping._try

    def try_(*given: Any) -> Trial:
        result = really(*given)
        found.append(result.blocks)
        return result

    monkeypatch.setattr(sweeping, "_try", try_)
    return found


def done(outcome: Outcome) -> Outcome:
    assert outcome.code == 0, outcome.err
    return outcome


def said(outcome: Outcome) -> str:
    return " ".join(outcome.err.split())


def refused(outcome: Outcome, *needles: object) -> None:
    assert outcome.code == 2, outcome.out + outcome.err
    assert "Traceback" not in outcome.err
    text = "".join(outcome.err.split())
    missing = [str(needle) for needle in needles if "".join(str(needle).split()) not in text]
    assert not missing, f"{missing} not in:\n{outcome.err}"


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def of_run(run: Path) -> Any:
    return read(run / "run.json")["stages"]


@pytest.mark.parametrize("task", ["classify", "chat"])
def test_every_depth_is_tried_and_the_best_is_written_down(
    task: str, whole: Path, command: Command, tiny_llama: Path, chat_rows: Path, tmp_path: Path
) -> None:
    run = whole
    if task == "chat":
        run = tmp_path / "run"
        text = said(done(command("freeze", flags=("--sweep",), model=tiny_llama, data=chat_rows)))
        assert all(f"{name}: loss" in text for name in DEPTHS)
    assert {path.name for path in (run / "freeze").iterdir()} == {"freeze.json", "sweep.json"}
    assert not list(run.glob("finetune*"))
    entry = of_run(run)["freeze"]
    facts, metrics = entry["facts"], entry["metrics"]
    trials = [Trial(**found) for found in facts["trials"]]
    assert [found.name for found in trials] == DEPTHS
    assert facts["trials"] == read(run / "freeze" / "sweep.json")["trials"]
    assert all((found.accuracy is None) == (task == "chat") for found in trials)
    assert [found.trainable_parameters for found in trials] == sorted({t.trainable_parameters for t in trials})
    chosen, reason = recommend(trials)
    assert (metrics["recommended"], metrics["reason"]) == (chosen.name, reason)
    assert (facts["recommended"], facts["reason"], facts["left_out"]) == (asdict(chosen), reason, [])
    plan = FreezePlan.from_json(read(run / "freeze" / "freeze.json"))
    assert plan.trainable_count == metrics["trainable_parameters"] == chosen.trainable_parameters
    assert plan.reasons["chosen by a sweep"] == reason
    assert plan.frozen_prefix_blocks == {0: 2, 1: 1, None: 0}[chosen.blocks]


def trials_of(run: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = of_run(run)["freeze"]["facts"]["trials"]
    return found


def losses(run: Path) -> list[float]:
    return [found["loss"] for found in trials_of(run)]


def test_a_trial_is_what_fine_tuning_does(whole: Path, command: Command, tmp_path: Path) -> None:
    trials = {found["blocks"]: found for found in trials_of(whole)}
    for blocks, freeze in ((0, "0-1"), (1, "0"), (None, None)):
        keys = (f"freeze={{blocks: {freeze}, embeddings: true}}",) if freeze else ()
        done(command("finetune", *keys, out=f"alone-{blocks}"))
        found = of_run(tmp_path / f"alone-{blocks}")["finetune"]["metrics"]
        assert (found["eval_loss"], found["accuracy"]) == (trials[blocks]["loss"], trials[blocks]["accuracy"])


def kill_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    really, tries = sweeping._try, []

    def try_(*given: Any) -> Trial:
        if len(tries) == count:
            raise KeyboardInterrupt
        tries.append(really(*given))
        return tries[-1]

    monkeypatch.setattr(sweeping, "_try", try_)


def test_a_sweep_that_was_stopped_goes_on(whole: Path, command: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        kill_after(2, patch)
        assert command("freeze", flags=("--sweep",)).code == 130
    before = read(run / "freeze" / "sweep.json")["trials"]
    assert [found["name"] for found in before] == DEPTHS[:2]
    assert not (run / "freeze" / "freeze.json").exists()
    with pytest.MonkeyPatch.context() as patch:
        kill_after(1, patch)
        outcome = done(command("freeze", flags=("--sweep",)))
    assert not re.search("the head alone: .* in", said(outcome))
    assert [found["name"] for found in trials_of(run)] == DEPTHS
    assert trials_of(run)[:2] == before
    assert losses(run) == losses(whole)


def test_a_trial_that_was_stopped_goes_on_from_its_checkpoint(whole: Path, command: Command, tmp_path: Path) -> None:
    from llmkit.train.loop import Fit

    really, steps = Fit.run, []

    def run(self: Fit, hooks: Any) -> Any:
        steps.append(self.state.step)
        if len(steps) == 2:
            return really(self, [*hooks, Killer()])
        return really(self, hooks)

    class Killer:
        def after_step(self, state: Any, values: dict[str, Any]) -> None:
            if state.step == 3:
                raise KeyboardInterrupt

        def after_evaluation(self, state: Any, values: dict[str, Any]) -> None: ...

        def before_save(self) -> None: ...

        def close(self) -> None: ...

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fit, "run", run)
        assert command("freeze", "finetune.save_every=1", flags=("--sweep",)).code == 130
        done(command("freeze", "finetune.save_every=1", flags=("--sweep",)))
    assert steps == [0, 0, 2, 0]
    assert losses(tmp_path / "run") == losses(whole)


def test_a_budget_leaves_out_what_costs_more(command: Command, tried: list[Any], tmp_path: Path) -> None:
    outcome = done(command("freeze", "freeze.budget=0s", flags=("--sweep",)))
    assert tried == [0]
    assert "not tried, for the budget: the last block, everything" in said(outcome)
    facts = of_run(tmp_path / "run")["freeze"]["facts"]
    assert (facts["left_out"], facts["recommended"]["name"]) == (DEPTHS[1:], DEPTHS[0])


def test_a_budget_that_is_large_leaves_nothing_out(command: Command, tried: list[Any]) -> None:
    outcome = done(command("freeze", "freeze.budget=1h", "finetune.steps=1", flags=("--sweep",)))
    assert tried == [0, 1, None]
    assert "for the budget" not in said(outcome)


def test_fine_tuning_uses_what_was_chosen(swept: Path, command: Command, cli: Cli, tried: list[Any]) -> None:
    again = done(command("freeze", flags=("--sweep",)))
    assert re.search("freeze.{0,9}unchanged", said(again))
    done(cli("finetune", swept))
    done(command("finetune", "freeze.blocks=auto"))
    assert tried == []
    facts = of_run(swept)["freeze"]["facts"]
    rows = of_run(swept)["finetune"]["facts"]["parameter_groups"]
    assert sum(row[2] for row in rows) == facts["recommended"]["trainable_parameters"]
    assert of_run(swept)["finetune"]["metrics"]["eval_loss"] == facts["recommended"]["loss"]


def test_other_keys_of_fine_tuning_sweep_again(swept: Path, command: Command, tried: list[Any]) -> None:
    outcome = done(command("freeze", "finetune.lr=1e-3", "finetune.steps=1", flags=("--sweep",)))
    assert tried == [0, 1, None]
    assert "finetune.lr 0.01 -> 0.001" in said(outcome)
    assert list((swept / "previous").iterdir())


def test_how_it_is_watched_changes_nothing(swept: Path, command: Command, tried: list[Any]) -> None:
    done(command("freeze", "finetune.log_every=1", "finetune.save_every=3", "freeze.cache=false", flags=("--sweep",)))
    assert tried == []


def test_a_plan_before_is_of_everything_and_after_of_what_was_chosen(
    command: Command, tried: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def trainable() -> str:
        shown = done(command("plan", "freeze.blocks=auto", "finetune.steps=1")).out
        found = re.search(r"trainable ([\d,]+) parameters", " ".join(shown.split()))
        assert found is not None, shown
        return found[1].replace(",", "")

    monkeypatch.setattr("llmkit.stages.plan.matrix_rate", lambda *given: 1e12)
    before = trainable()
    assert tried == []
    monkeypatch.setattr(sweeping, "recommend", lambda trials: (trials[1], "for this test"))
    done(command("freeze", "finetune.steps=1", flags=("--sweep",)))
    trials = of_run(tmp_path / "run")["freeze"]["facts"]["trials"]
    assert before == str(trials[2]["trainable_parameters"])
    assert trainable() == str(trials[1]["trainable_parameters"])


RECIPE = """\
name: sweep
task: classify
model: MODEL
data: {train: DATA, eval: 20%}
FREEZE
finetune: {steps: 1, trackers: []}
"""


def recipe(folder: Path, freeze: str, model: Path, data: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.replace("MODEL", str(model)).replace("DATA", str(data)).replace("FREEZE", freeze))
    return path


def test_a_recipe_can_be_swept(cli: Cli, tiny_bert: Path, rows: Path, tried: list[Any], tmp_path: Path) -> None:
    done(cli("freeze", recipe(tmp_path, "", tiny_bert, rows), "--sweep", "-o", tmp_path / "run"))
    assert tried == [0, 1, None]


def test_a_recipe_sweeps_on_its_way(cli: Cli, tiny_bert: Path, rows: Path, tried: list[Any], tmp_path: Path) -> None:
    path, run = recipe(tmp_path, "freeze: {blocks: auto, budget: 10min}", tiny_bert, rows), tmp_path / "run"
    done(cli("run", path, "-o", run, "--set", "stages=[preprocess, freeze, finetune]"))
    assert tried == [0, 1, None]
    assert of_run(run)["finetune"]["state"] == "done"


def test_a_model_may_come_first(cli: Cli, tiny_bert: Path, rows: Path, tried: list[Any], tmp_path: Path) -> None:
    settings = options("finetune.steps=1", "freeze.budget=0s")
    done(cli("freeze", tiny_bert, "--sweep", "--data", rows, "-o", tmp_path / "run", *settings))
    assert tried == [0]
    done(cli("freeze", tiny_bert, "-o", tmp_path / "plain", "--set", "freeze.blocks=0", "--task", "text"))


def test_a_model_that_is_given_twice_is_refused(cli: Cli, tiny_bert: Path, rows: Path, tmp_path: Path) -> None:
    outcome = cli("freeze", tiny_bert, "--sweep", "-m", tiny_bert, "-d", rows, "-o", tmp_path / "run")
    refused(outcome, "a model is given twice", tiny_bert)


def test_without_data_there_is_nothing_to_try(cli: Cli, tiny_bert: Path, tmp_path: Path) -> None:
    refused(cli("freeze", tiny_bert, "--sweep", "-o", tmp_path / "run"), "--data", "is missing")
    path = recipe(tmp_path, "freeze: {blocks: auto}\nstages: [freeze]", tiny_bert, tmp_path)
    path.write_text(path.read_text().replace(f"train: {tmp_path}, ", ""))
    refused(cli("freeze", path, "-o", tmp_path / "run"), "freeze.blocks: auto", "data.train")


def test_without_held_out_data_nothing_can_be_compared(command: Command, tried: list[Any]) -> None:
    refused(command("freeze", "data.eval=null", flags=("--sweep",)), "held-out data", "data.eval")
    assert tried == []


@pytest.mark.parametrize(
    ("freeze", "needles"),
    [
        ("freeze: {blocks: auto, embeddings: true}", ("`blocks: auto` finds out",)),
        ("freeze: {blocks: auto, unfreeze: ulmfit}", ("`blocks: auto` finds out", "unfreeze")),
        ("freeze: {blocks: auto, patterns: ['*']}", ("`blocks: auto` finds out",)),
        ("freeze: {blocks: 0, budget: 10min}", ("`budget` is for `blocks: auto`",)),
        ("freeze: {blocks: auto, budget: soon}", ("freeze.budget", "10min")),
        ("freeze: {blocks: auto, bugdet: 1h}", ("freeze.bugdet", "did you mean `budget`?")),
        ("freeze: {budget: 1h}", ("freezes nothing",)),
    ],
)
def test_a_mistake_has_its_line(
    freeze: str, needles: tuple[str, ...], cli: Cli, tiny_bert: Path, rows: Path, tmp_path: Path
) -> None:
    path = recipe(tmp_path, freeze, tiny_bert, rows)
    refused(cli("freeze", path, "-o", tmp_path / "run"), f"{path}:5", *needles)
    assert not (tmp_path / "run").exists()


def test_a_trial_with_adapters_is_what_fine_tuning_does(command: Command, tmp_path: Path) -> None:
    done(command("freeze", "finetune.adapter=lora", "finetune.steps=1", flags=("--sweep",)))
    trials = trials_of(tmp_path / "run")
    done(
        command(
            "finetune", "finetune.adapter=lora", "finetune.steps=1", "freeze={blocks: 0, embeddings: true}", out="alone"
        )
    )
    assert of_run(tmp_path / "alone")["finetune"]["metrics"]["eval_loss"] == pytest.approx(trials[0]["loss"], abs=1e-4)


def test_blocks_that_are_given_twice_are_refused(command: Command) -> None:
    refused(command("freeze", "freeze.blocks=0", flags=("--sweep",)), "freeze.blocks", "given twice")


def test_trials_too_quick_to_measure_can_be_compared() -> None:
    trials = [trial("quick", 0.0, 2.0), trial("best", 0.0, 1.99)]
    assert recommend(trials)[0] in trials
