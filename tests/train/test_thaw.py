"""Gradual unfreezing in a training: what stands still until its step, moves from it on, and resumes anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import (
    Recorder,
    facts_of,
    log_of,
    logged,
    make_fit,
    moments_of,
    one_thread,
    same_bits,
    tiny_model,
    weights_of,
)
from killing import KilledError, corpora, kill  # noqa: F401  (a fixture is among them)
from small_memory import short_of_memory

from llmkit.data.corpus import Corpus
from llmkit.data.states import CorpusWithStates, States, StatesWriter, join_parts
from llmkit.errors import RecipeError
from llmkit.model.anatomy import blocks_of
from llmkit.model.freezing import FreezePlan, ThawRule, apply_freeze, plan_freeze
from llmkit.model.parts import Parts
from llmkit.train.loop import Fit
from llmkit.train.prefix import PrefixObjective, compute_states, try_prefix
from llmkit.train.thaw import Thaw, thaws_at

_one_thread = pytest.fixture(autouse=True)(one_thread)

STEPS = 6
PREFIX = Parts(blocks="all", embeddings=True)  # of three blocks
LAST_TWO = (ThawRule(2, Parts(blocks="2")), ThawRule(4, Parts(blocks="1")))
ALL = (*LAST_TWO, ThawRule(5, Parts(blocks="0", embeddings=True)))
CONSTANT = {"schedule": "constant", "warmup": 0}


@dataclass(frozen=True)
class Build:
    """Makes Fits of three blocks, all of which are frozen with what leads into them, but for what thaws."""

    folder: Path
    corpora: tuple[Corpus, Corpus]

    def __call__(
        self,
        name: str,
        thaws: Sequence[ThawRule] = LAST_TWO,
        *,
        family: str = "llama",
        dropout: float = 0.0,
        parts: Parts = PREFIX,
        frozen_dropout: bool = False,
        **given: Any,
    ) -> Fit:
        model = tiny_model(family, dropout=dropout, **{"n_layer" if family == "gpt2" else "num_hidden_layers": 3})
        plan = plan_freeze(model, parts, thaws)
        apply_freeze(model, plan)
        corpora = self.corpora if "eval_every" in given else self.corpora[:1]
        fit = make_fit(self.folder / name, *corpora, model=model, **({"steps": STEPS} | given))
        return thawing(fit, plan, frozen_dropout)


def thawing(fit: Fit, plan: FreezePlan, frozen_dropout: bool) -> Fit:
    notes: list[str] = []
    found = replace(fit, thaws=thaws_at(plan.thaws, STEPS), frozen_dropout=frozen_dropout, note=notes.append)
    found.notes = notes  # type: ignore[attr-defined]
    return found


@pytest.fixture
def build(tmp_path: Path, corpora: tuple[Corpus, Corpus]) -> Build:
    return Build(tmp_path, corpora)


def start_of(fit: Fit) -> dict[str, int]:
    """The first 0-based step in which each parameter moves; what never does is not in it."""
    own = dict.fromkeys(fit.masters.weights, 0)
    return own | {name: thaw.step for thaw in fit.thaws for name in thaw.names}


def after_each_step(fit: Fit, look: Callable[[], Any]) -> list[Any]:
    """What is seen before the first step and after every one."""
    found = [look()]
    fit.run([Recorder({step + 1: lambda: found.append(look()) for step in range(STEPS)})])
    return found


def losses(fit: Fit) -> tuple[list[float], list[float]]:
    recorder = Recorder()
    fit.run([recorder])
    return recorder.of("loss"), [loss for _, loss in recorder.evaluations]


def with_state(fit: Fit) -> dict[str, dict[str, Any]]:
    names = {weight: name for name, weight in fit.masters.weights.items()}
    return {names[weight]: state for weight, state in fit.optimizer.state.items() if state}


def need(given: dict[str, Any]) -> None:
    if given.get("optimizer") == "lion":
        pytest.importorskip("lion_pytorch")


OPTIMIZERS = ("adamw", "muon", "adafactor", "lion", "adagrad")
WAYS: dict[str, dict[str, Any]] = {name: {"optimizer": name} for name in OPTIMIZERS} | {
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "average": {"ema": 0.8},
    "all, bf16": {"thaws": ALL, "precision": "bf16", "family": "gpt2", "dropout": 0.1, "micro_batch_size": 3},
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_held_keeps_its_bits_until_its_step_and_moves_from_it_on(way: str, build: Build) -> None:
    """A decay of the weights does not touch it either."""
    given = WAYS[way] | CONSTANT
    need(given)
    fit = build("fit", weight_decay=0.5, lr=1e-2, **given)
    starts = start_of(fit)
    assert set(starts.values()) == {0, *(thaw.step for thaw in fit.thaws)}
    seen = after_each_step(fit, lambda: weights_of(fit))
    computed = {name for name, parameter in fit.model.named_parameters() if parameter.dtype == torch.bfloat16}
    assert bool(computed) == (fit.precision == "bf16")
    for step, (before, after) in enumerate(pairwise(seen)):
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved == {name for name, start in starts.items() if start <= step}, f"in step {step}"


def test_what_computes_in_bf16_is_what_the_optimizer_holds(build: Build) -> None:
    fit = build("fit", precision="bf16")
    copies = after_each_step(fit, lambda: {n: p.detach().clone() for n, p in fit.model.named_parameters()})
    starts = start_of(fit)
    for name, first in copies[0].items():
        for step, copy in enumerate(copies):
            assert torch.equal(copy[name], first) or step > starts.get(name, STEPS)
    assert all(torch.equal(copies[-1][name], weight.bfloat16()) for name, weight in fit.masters.weights.items())


@pytest.mark.parametrize("way", ["adamw", "muon", "adafactor", "lion", "bf16"])
def test_the_optimizer_first_hears_of_a_parameter_when_it_thaws(way: str, build: Build) -> None:
    given = WAYS[way]
    need(given)
    fit = build("fit", **given)
    starts = start_of(fit)

    def look() -> dict[str, int | None]:
        return {name: int(state["step"]) if "step" in state else None for name, state in with_state(fit).items()}

    for done, known in enumerate(after_each_step(fit, look)):
        assert known.keys() == {name for name, start in starts.items() if start < done}
        for name, count in known.items():
            assert count in (None, done - starts[name]), name
        if way in ("adamw", "adafactor", "bf16"):
            assert None not in known.values()


def test_what_is_held_takes_no_gradient_and_no_part_in_its_norm(build: Build) -> None:
    fit, still = build("fit", max_grad_norm=None), build("still", (), max_grad_norm=None)
    norms, expected = Recorder(), Recorder()
    held: list[bool] = []
    norms.at = {2: lambda: held.append(any(fit.masters.weights[n].grad is not None for n in fit.thaws[1].names))}
    fit.run([norms])
    still.run([expected])
    assert norms.of("grad_norm")[:2] == expected.of("grad_norm")[:2]
    assert norms.of("grad_norm")[2] > expected.of("grad_norm")[2]
    assert held == [False]


@pytest.mark.parametrize("given", [{"precision": "bf16"}, {"family": "gpt2", "dropout": 0.2, "ema": 0.8}])
def test_until_the_first_thaw_it_trains_as_if_frozen_for_good(given: dict[str, Any], build: Build) -> None:
    found, expected = losses(build("fit", **given))[0], losses(build("still", (), **given))[0]
    same = 2 if "dropout" in given else 3  # the loss of a step is from before its update, but with its dropout
    assert found[:same] == expected[:same]
    assert all(one != other for one, other in zip(found[same:], expected[same:], strict=True))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"family": "gpt2", "dropout": 0.1, "ema": 0.8},
        {"parts": Parts(blocks="all"), "family": "gpt2", "dropout": 0.1, "micro_batch_size": 3},
        {"precision": "bf16", "parts": Parts(blocks="all")},
        {"precision": "fp16", "parts": Parts(blocks="all"), "family": "gpt2", "dropout": 0.1},
    ],
)
def test_all_thawed_at_the_first_step_is_a_training_without_it(given: dict[str, Any], build: Build) -> None:
    def trained(thaws: Sequence[ThawRule], parts: Parts) -> list[Any]:
        fit = build(str(len(thaws)), thaws, **(given | {"parts": parts}))
        return [losses(fit), weights_of(fit), moments_of(fit)]

    parts = given.get("parts", PREFIX)
    thawed, plain = trained([ThawRule(0, parts)], parts), trained([], Parts())
    assert thawed[0] == plain[0]
    assert same_bits(thawed[1], plain[1])
    assert same_bits(thawed[2], plain[2])


def test_each_thaw_is_told_once_with_its_step(build: Build) -> None:
    fit = build("fit")
    fit.run([])
    assert fit.notes == [  # type: ignore[attr-defined]
        "step 3: blocks 2 thaws, 9 tensors",
        "step 5: blocks 1 thaws, 9 tensors",
    ]


RESUMED: dict[str, dict[str, Any]] = {
    "adamw": {"family": "gpt2", "dropout": 0.2},
    "average": {"ema": 0.8, "family": "gpt2", "dropout": 0.2, "eval_every": 2},
    "bf16": {"precision": "bf16"},
    "muon": {"optimizer": "muon"},
    "all": {"thaws": ALL, "eval_every": 2, "keep": "last"},
}
SAVED = {  # before the first thaw, right at it, between the two, right at the second, and after
    "adamw": (1, 2, 3),
    "average": (2, 3),
    "bf16": (2, 3),
    "muon": (3,),
    "all": (4, 5),
}


def everything_of(fit: Fit) -> list[Any]:
    return [weights_of(fit), moments_of(fit), facts_of(fit.state), log_of(fit)]


@pytest.fixture(scope="module")
def never_killed(
    tmp_path_factory: pytest.TempPathFactory, corpora: tuple[Corpus, Corpus]
) -> Callable[[str], list[Any]]:
    @lru_cache
    def reach(way: str) -> list[Any]:
        fit = Build(tmp_path_factory.mktemp("never-killed"), corpora)("fit", **RESUMED[way])
        fit.run([logged(fit)])
        return everything_of(fit)

    return reach


def check_same(fit: Fit, expected: list[Any]) -> None:
    found = everything_of(fit)
    assert same_bits(found[0], expected[0])
    assert same_bits(found[1], expected[1])
    assert found[2:] == expected[2:]


@pytest.mark.parametrize(("way", "saved"), [(way, saved) for way, all_saved in SAVED.items() for saved in all_saved])
def test_killed_and_resumed_equals_never_killed(
    way: str, saved: int, build: Build, never_killed: Callable[[str], list[Any]]
) -> None:
    fit = build("fit", save_every=saved, **RESUMED[way])
    with pytest.raises(KilledError):
        fit.run([logged(fit), Recorder({saved + 1: kill})])
    torch.manual_seed(99)
    again = build("fit", **RESUMED[way])
    with torch.no_grad():
        for name in again.masters.weights:
            dict(again.model.named_parameters())[name].fill_(7.0)
    assert again.resume()
    assert again.state.step == saved
    again.run([logged(again)])
    check_same(again, never_killed(way))


@pytest.mark.parametrize("frozen_dropout", [False, True])
def test_dropout_comes_back_where_it_thaws(frozen_dropout: bool, build: Build) -> None:
    """Also after evaluations, which go without."""
    fit = build("fit", ALL, family="gpt2", dropout=0.2, frozen_dropout=frozen_dropout, eval_every=1)

    def look() -> list[bool]:
        return [any(module.training for module in block.modules()) for block in blocks_of(fit.model)]

    seen = after_each_step(fit, look)[1:]
    thawed = [[False, False, step >= 2] for step in range(4)] + [[False, True, True], [True, True, True]]
    assert seen == ([[True] * 3] * STEPS if frozen_dropout else thawed)


def test_what_is_held_computes_without_dropout(build: Build) -> None:
    """All dropout of this model is in what is held."""
    dropping = losses(build("dropping", (ThawRule(3, Parts(blocks="1")),), family="gpt2", dropout=0.2))[0]
    plain = losses(build("plain", (ThawRule(3, Parts(blocks="1")),), family="gpt2", dropout=0.0))[0]
    assert dropping[:3] == plain[:3]
    assert all(one != other for one, other in zip(dropping[3:], plain[3:], strict=True))


def with_known(fit: Fit, depths: Iterable[int], folder: Path, numbers: Iterable[int] | None = None) -> Fit:
    """The same Fit on top of states at some depths, of some examples or all; they are computed once for a folder."""
    depths = list(depths)
    prefix = try_prefix(fit.objective, fit.model, max(depths), [fit.train[n] for n in range(4)], fit.precision)
    assert not isinstance(prefix, str), prefix
    known = []
    for name, corpus, wanted in (("train", fit.train, numbers), ("eval", fit.held_out, None)):
        assert isinstance(corpus, Corpus)
        folders = {depth: folder / name / str(depth) for depth in depths}
        if not folder.joinpath(name).exists():
            writers = {depth: StatesWriter(place, 0, len(corpus)) for depth, place in folders.items()}
            chosen = list(range(len(corpus)) if wanted is None else wanted)
            compute_states(
                *(fit.objective, fit.model, corpus, "input_ids", chosen, writers, fit.precision, None, lambda n: None)
            )
            for depth, writer in writers.items():
                writer.close()
                join_parts(folders[depth], 1, {})
        known.append(CorpusWithStates(corpus, {depth: States(place) for depth, place in folders.items()}))
    fit.train = fit.feeder.corpus = known[0]
    fit.held_out = known[1]
    fit.objective = fit.feeder.objective = fit.stepper.objective = PrefixObjective(fit.objective, prefix)
    return fit


KNOWN: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {"thaws": ALL},
    "micro-batches": {"family": "gpt2", "dropout": 0.2, "micro_batch_size": 3, "thaws": ALL},
    "checkpointing": {"family": "gpt2", "activation_checkpointing": True},
    "not the last": {"parts": Parts(blocks="0-1", embeddings=True), "thaws": LAST_TWO[1:]},
}


@pytest.mark.parametrize(
    ("way", "depths", "used"),
    [
        ("plain", (1, 2, 3), [3, 3, 2, 2, 1, 1]),
        ("all", (1, 3), [3, 3, 1, 1, 1, 0]),
        ("micro-batches", (1, 2, 3), [3, 3, 2, 2, 1, 0]),
        ("checkpointing", (3,), [3, 3, 0, 0, 0, 0]),
        ("not the last", (1, 2), [2, 2, 2, 2, 1, 1]),
    ],
)
def test_with_known_states_the_losses_are_those_without(
    way: str, depths: tuple[int, ...], used: list[int], build: Build
) -> None:
    expected = losses(build("plain", eval_every=2, **KNOWN[way]))
    fit = with_known(build("known", eval_every=2, keep="last", **KNOWN[way]), depths, build.folder / "states")
    before, seen = weights_of(fit), []
    recorder = Recorder({step: lambda: seen.append(fit.train.depth) for step in range(1, STEPS + 1)})  # type: ignore[union-attr]
    fit.run([recorder])
    assert seen == used
    assert recorder.of("loss") == pytest.approx(expected[0], abs=1e-5)
    assert [loss for _, loss in recorder.evaluations] == pytest.approx(expected[1], abs=1e-5)
    after = weights_of(fit)
    assert {name for name in before if not torch.equal(before[name], after[name])} == start_of(fit).keys()


def test_with_some_states_known_the_losses_are_those_without(build: Build) -> None:
    expected = losses(build("plain", eval_every=2))
    found = losses(with_known(build("known", eval_every=2), (1, 3), build.folder / "states", range(0, 45, 2)))
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert found[1] == pytest.approx(expected[1], abs=1e-5)


def test_killed_with_known_states(build: Build) -> None:
    def make(name: str) -> Fit:
        return with_known(build(name, ALL, save_every=4, eval_every=3), (1, 3), build.folder / "states")

    whole = make("whole")
    whole.run([logged(whole)])
    fit = make("fit")
    with pytest.raises(KilledError):
        fit.run([logged(fit), Recorder({5: kill})])
    again = make("fit")
    assert again.resume()
    again.run([logged(again)])
    check_same(again, everything_of(whole))


def test_a_step_that_is_done_again_thaws_once(build: Build) -> None:
    fit = short_of_memory(build("fit", **CONSTANT), 100)
    seen = after_each_step(fit, lambda: weights_of(fit))
    assert fit.state.micro_batch_tokens is not None
    for step, (before, after) in enumerate(pairwise(seen)):
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved == {name for name, start in start_of(fit).items() if start <= step}
    assert len(fit.notes) == 2  # type: ignore[attr-defined]
    plain = build("plain", **CONSTANT)
    plain.run([])
    for name, weight in weights_of(plain).items():
        torch.testing.assert_close(seen[-1][name], weight, atol=1e-4, rtol=0)


PLANNED = [
    {"at": "50%", "what": "later", "names": ["b", "c"]},
    {"at": "29%", "what": "sooner", "names": ["a"]},
    {"at": 0, "what": "first", "names": ["d"]},
]


def test_shares_become_steps_in_order() -> None:
    assert thaws_at(PLANNED, 10) == (Thaw(0, "first", ("d",)), Thaw(2, "sooner", ("a",)), Thaw(5, "later", ("b", "c")))
    assert [thaw.step for thaw in thaws_at(PLANNED, 1)] == [0, 0, 0]
    assert thaws_at([], 10) == ()


@pytest.mark.parametrize("at", [10, 11, 1000, "100%"])
def test_what_would_never_thaw_is_an_error(at: Any) -> None:
    with pytest.raises(RecipeError, match="block 3 would never thaw") as caught:
        thaws_at([*PLANNED, {"at": at, "what": "block 3", "names": ["e"]}], 10)
    assert caught.value.where == "freeze.unfreeze"
    assert caught.value.got is not None
    assert "of 10" in caught.value.got


@pytest.mark.parametrize("at", [9, "99%"])
def test_the_last_step_is_not_too_late(at: Any) -> None:
    assert thaws_at([{"at": at, "what": "block 3", "names": ["e"]}], 10)[0].step == 9
