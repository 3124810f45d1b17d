"""With the states of the frozen prefix known, loss and gradients are those without, or it is refused and said why."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from fitting import check, gradients, make_fit, one_thread, random_corpus, tiny_model
from knowing import (
    alike_corpus,
    classifier,
    classify_task,
    compute,
    frozen,
    labelled_corpus,
    padding,
    prefix_of,
    with_known,
)

from llmkit.data.corpus import Corpus
from llmkit.data.states import STATES
from llmkit.model.prefix import Prefix
from llmkit.train.loop import Fit

_one_thread = pytest.fixture(autouse=True)(one_thread)
CAUSAL = ("llama", "gpt2", "qwen2", "gemma2", "mistral")
NUMBERS = [0, 5, 7, 11, 20, 21, 22, 17]


def check_gradients(make: Callable[[], Fit], depth: int, folder: Path) -> None:
    """Loss and gradients on top of kept states are those without, in one part and in several."""
    plain, known = make(), with_known(make(), depth, folder)
    for cut in ({}, {"micro_batch_size": 3}):
        loss, expected, parts = gradients(plain, NUMBERS, **cut)  # type: ignore[arg-type]
        found = gradients(known, NUMBERS, **cut)  # type: ignore[arg-type]
        assert found[2] == parts
        assert all(STATES in batch for batch in known.feeder.take(0, None))
        check(found[:2], (loss, expected))
    assert any(gradient.any() for gradient in expected.values())


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Corpus]:
    folder = tmp_path_factory.mktemp("corpora")
    return {
        "random": random_corpus(folder / "random", 24),
        "alike": alike_corpus(folder / "alike", 24),
        "labelled": labelled_corpus(folder / "labelled", 24),
    }


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("family", CAUSAL)
def test_packed_examples_train_as_without(family: str, depth: int, corpora: dict[str, Corpus], tmp_path: Path) -> None:
    def make() -> Fit:
        return make_fit(tmp_path / "fit", corpora["random"], model=frozen(tiny_model(family), depth))

    assert not make().objective.padded
    check_gradients(make, depth, tmp_path / "states")


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("family", ["gpt2", "mistral"])
def test_padded_examples_train_as_without(family: str, depth: int, corpora: dict[str, Corpus], tmp_path: Path) -> None:
    def make() -> Fit:
        return padding(make_fit(tmp_path / "fit", corpora["random"], model=frozen(tiny_model(family), depth)))

    check_gradients(make, depth, tmp_path / "states")


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_examples_that_share_a_beginning_train_as_without(
    family: str, depth: int, corpora: dict[str, Corpus], tmp_path: Path
) -> None:
    def make() -> Fit:
        return make_fit(tmp_path / "fit", corpora["alike"], model=frozen(tiny_model(family), depth))

    assert make().objective.collate([corpora["alike"][number] for number in NUMBERS])["shared_prefix"] == 12
    check_gradients(make, depth, tmp_path / "states")


@pytest.mark.parametrize(
    ("family", "depth"),
    [
        *product(("bert", "distilbert", "roberta", "albert"), (1, 2)),
        *(("mpnet", 1), ("deberta-v2", 1), ("bart", 1)),
    ],
)
def test_classifiers_train_as_without(family: str, depth: int, corpora: dict[str, Corpus], tmp_path: Path) -> None:
    def make() -> Fit:
        model = frozen(classifier(family), depth)
        return make_fit(tmp_path / "fit", corpora["labelled"], model=model, task=classify_task())

    check_gradients(make, depth, tmp_path / "states")


@pytest.mark.parametrize(
    ("family", "depth", "why"),
    [
        ("t5", 1, "later blocks use more"),
        ("squeezebert", 1, "something else than hidden states"),
        ("albert", 1, "later blocks use more"),
    ],
)
def test_where_it_is_not_exact_it_says_why(
    family: str, depth: int, why: str, corpora: dict[str, Corpus], tmp_path: Path
) -> None:
    """T5's first block computes what positions mean for all; ALBERT's only group of blocks is passed several times."""
    changes = {"num_hidden_groups": 1} if family == "albert" else {}
    model = frozen(classifier(family, **changes), depth).train()
    fit = make_fit(tmp_path / "fit", corpora["labelled"], model=model, task=classify_task())
    found = prefix_of(fit, depth)
    assert isinstance(found, str)
    assert why in found
    assert model.training


def test_all_of_an_encoder_can_be_left_out_though_its_first_block_alone_cannot(
    corpora: dict[str, Corpus], tmp_path: Path
) -> None:
    def make() -> Fit:
        model = frozen(classifier("t5"), 2)
        return make_fit(tmp_path / "fit", corpora["labelled"], model=model, task=classify_task())

    check_gradients(make, 2, tmp_path / "states")


@pytest.mark.parametrize("family", ["convbert", "fnet"])
def test_a_family_that_looks_at_padding_trains_as_without_or_is_refused(
    family: str, corpora: dict[str, Corpus], tmp_path: Path
) -> None:
    def make() -> Fit:
        model = frozen(classifier(family), 1)
        return make_fit(tmp_path / "fit", corpora["labelled"], model=model, task=classify_task())

    if isinstance(prefix_of(make(), 1), Prefix):
        check_gradients(make, 1, tmp_path / "states")


def test_a_prefix_that_drops_while_the_model_trains_is_refused(corpora: dict[str, Corpus], tmp_path: Path) -> None:
    model = frozen(classifier("bart"), 1)
    model.model.encoder.dropout = 0.5  # a function's, of no module that could be told to leave off
    why = prefix_of(make_fit(tmp_path / "fit", corpora["labelled"], model=model, task=classify_task()), 1)
    assert isinstance(why, str)
    assert "random" in why


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_states_in_bf16_are_close(family: str, corpora: dict[str, Corpus], tmp_path: Path) -> None:
    task, name = (None, "random") if family == "llama" else (classify_task(), "labelled")

    def make() -> Fit:
        model = tiny_model(family) if family == "llama" else classifier(family)
        return make_fit(tmp_path / "fit", corpora[name], model=frozen(model, 1), task=task)

    known = with_known(make(), 1, tmp_path / "states", dtype=torch.bfloat16)
    loss, expected, _ = gradients(make(), NUMBERS)
    found, other, _ = gradients(known, NUMBERS)
    assert 0 < abs(found - loss) < 0.02 * loss
    for key, gradient in expected.items():
        assert (other[key] - gradient).norm() < 0.05 * gradient.norm().clamp(min=1e-3), key


def test_only_what_is_known_begins_behind_the_prefix(corpora: dict[str, Corpus], tmp_path: Path) -> None:
    def make() -> Fit:
        return make_fit(tmp_path / "fit", corpora["random"], model=frozen(tiny_model(), 1))

    known = with_known(make(), 1, tmp_path / "states", numbers=[5, 7, 21])
    loss, expected, parts = gradients(make(), NUMBERS)
    found = gradients(known, NUMBERS)
    assert (parts, found[2]) == (1, 2)
    check(found[:2], (loss, expected))
    assert sorted(STATES in batch for batch in known.feeder.take(0, None)) == [False, True]


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_states_do_not_depend_on_what_is_computed_beside_them(
    family: str, corpora: dict[str, Corpus], tmp_path: Path
) -> None:
    causal = family == "llama"
    model = frozen(tiny_model(family) if causal else classifier(family), 1)
    corpus = corpora["random" if causal else "labelled"]
    fit = make_fit(tmp_path / "fit", corpus, model=model, task=None if causal else classify_task())
    whole = compute(fit, corpus, 1, tmp_path / "whole")
    for number in (0, 7, 23):
        alone = compute(fit, corpus, 1, tmp_path / str(number), [number])
        np.testing.assert_allclose(alone[number][STATES][0], whole[number][STATES][0], atol=1e-5)
        assert STATES not in alone[1]
