"""What all examples of a micro-batch begin with is computed once, and nobody can tell from the loss or its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fitting import (
    COLUMNS,
    FAMILIES,
    WORDS,
    by_hand,
    check,
    gradients,
    gradients_by_hand,
    make_fit,
    one_thread,
    take_step,
    tiny_model,
    tiny_task,
)

from llmkit.data.corpus import Corpus, CorpusWriter
from llmkit.model.packing import pack
from llmkit.tasks.base import Regularisation

_one_thread = pytest.fixture(autouse=True)(one_thread)
REST = (6, 3, 2, 9, 4)


def corpus_of(folder: Path, beginning: int, rest: Sequence[int] = REST, supervised: str = "all") -> Corpus:
    """Examples with a common beginning of so many tokens, and so many tokens of their own, the first of which differ.

    `supervised`: all tokens, those after the beginning (own), or the fifth of the beginning and some of each (some).
    """
    rng = np.random.default_rng(0)
    first = rng.integers(3, WORDS, beginning)
    starts = rng.permutation(WORDS)
    writer = CorpusWriter(folder, COLUMNS)
    for number, length in enumerate(rest):
        own = rng.integers(3, WORDS, length)
        own[:1] = starts[number]
        chosen = np.ones(beginning + length, bool)
        if supervised == "own":
            chosen[:beginning] = False
        elif supervised == "some":
            chosen = rng.random(beginning + length) < 0.4
            chosen[4], chosen[beginning + length // 2] = True, True
        writer.add({"input_ids": np.concatenate([first, own]), "supervised": chosen})
    return writer.finish({})


def shared_in(fit: Any, numbers: Sequence[int]) -> int:
    return int(fit.objective.collate([fit.train[n] for n in numbers]).get("shared_prefix", 0))


@pytest.mark.parametrize("supervised", ["all", "own", "some"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_each_example_alone(tmp_path: Path, family: str, supervised: str) -> None:
    """Mistral, Qwen2 and Gemma2 have a window of 6, shorter than the beginning."""
    corpus, numbers = corpus_of(tmp_path / "corpus", 13, supervised=supervised), list(range(len(REST)))
    fit = make_fit(tmp_path / "fit", corpus, model=tiny_model(family))
    assert shared_in(fit, numbers) == 13
    for cut, parts in (({}, 1), ({"micro_batch_size": 2}, 3), ({"tokens": 40}, 4)):
        fit = make_fit(tmp_path / "fit", corpus, model=tiny_model(family))
        loss, found, count = gradients(fit, numbers, **cut)  # type: ignore[arg-type]
        assert count >= 2 if "tokens" in cut else count == parts
        check((loss, found), gradients_by_hand(tiny_model(family), corpus, numbers))


def test_the_window_reaches_from_an_example_into_its_beginning(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "corpus", 13, supervised="own")
    whole, narrow = tiny_model("mistral", sliding_window=64), tiny_model("mistral", sliding_window=6)
    assert abs(by_hand(whole, corpus, range(5)).item() - by_hand(narrow, corpus, range(5)).item()) > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma2"])
def test_an_example_that_is_the_beginning_and_one_token_more(tmp_path: Path, family: str) -> None:
    """Its last token is no input: one token less is shared, so that each example has one of its own."""
    corpus = corpus_of(tmp_path / "corpus", 12, (1, 5, 1))
    fit = make_fit(tmp_path / "fit", corpus, model=tiny_model(family))
    assert shared_in(fit, [0, 1, 2]) == 11
    check(gradients(fit, [0, 1, 2])[:2], gradients_by_hand(tiny_model(family), corpus, [0, 1, 2]))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_examples_that_are_all_the_same(tmp_path: Path, family: str) -> None:
    corpus = corpus_of(tmp_path / "corpus", 20, (0, 0, 0))
    fit = make_fit(tmp_path / "fit", corpus, model=tiny_model(family))
    assert shared_in(fit, [0, 1, 2]) == 18
    check(gradients(fit, [0, 1, 2])[:2], gradients_by_hand(tiny_model(family), corpus, [0, 1, 2]))


@pytest.mark.parametrize(("beginning", "shared"), [(0, 0), (7, 0), (8, 8), (9, 9)])
def test_a_short_beginning_is_not_worth_it(tmp_path: Path, beginning: int, shared: int) -> None:
    corpus = corpus_of(tmp_path / "corpus", beginning, (6, 3, 9, 4))
    fit = make_fit(tmp_path / "fit", corpus)
    assert shared_in(fit, [0, 1, 2, 3]) == shared
    check(gradients(fit, [0, 1, 2, 3])[:2], gradients_by_hand(tiny_model(), corpus, [0, 1, 2, 3]))


def test_a_single_example_shares_with_nobody(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "corpus", 13)
    fit = make_fit(tmp_path / "fit", corpus)
    assert shared_in(fit, [3]) == 0
    check(gradients(fit, [3])[:2], gradients_by_hand(tiny_model(), corpus, [3]))


@pytest.mark.parametrize("supervised", ["own", "some"])
def test_an_example_with_nothing_to_predict_shares_nothing(tmp_path: Path, supervised: str) -> None:
    corpus = corpus_of(tmp_path / "corpus", 13, supervised=supervised)
    objective = tiny_task().objective(tiny_model())
    examples = [dict(corpus[n]) for n in range(3)]
    examples[1]["supervised"] = np.zeros_like(examples[1]["supervised"])
    batch = objective.collate(examples)
    assert "shared_prefix" not in batch
    alone = [objective.collate([examples[n]]) for n in (0, 2)]
    with objective.computing(), torch.no_grad():
        expected = sum(float(objective.loss(objective.causal.model, one)) for one in alone)
        assert float(objective.loss(objective.causal.model, batch)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("beginning", "rest"), [(1040, (40, 7)), (20, (1100, 30, 5)), (1000, (10, 60))])
@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("mistral", {"sliding_window": 100})])
def test_longer_than_the_explicit_products_reach(
    tmp_path: Path, family: str, changes: dict[str, Any], beginning: int, rest: tuple[int, ...]
) -> None:
    corpus, numbers = corpus_of(tmp_path / "corpus", beginning, rest), list(range(len(rest)))
    build = {"max_position_embeddings": 2048, "num_hidden_layers": 1} | changes
    fit = make_fit(tmp_path / "fit", corpus, model=tiny_model(family, **build))
    assert shared_in(fit, numbers) == beginning
    check(gradients(fit, numbers)[:2], gradients_by_hand(tiny_model(family, **build), corpus, numbers))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_bf16_is_near(tmp_path: Path, family: str) -> None:
    corpus = corpus_of(tmp_path / "corpus", 13)
    fit = make_fit(tmp_path / "fit", corpus, model=tiny_model(family), precision="bf16")
    assert shared_in(fit, range(5)) == 13
    loss, found, _ = gradients(fit, range(5))
    expected, by_name = gradients_by_hand(tiny_model(family), corpus, range(5))
    assert loss == pytest.approx(expected, rel=1e-2)
    one, other = (torch.cat([g[name].flatten() for name in by_name]) for g in (found, by_name))
    assert torch.linalg.vector_norm(one - other) < 0.05 * torch.linalg.vector_norm(other)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_with_frozen_lower_blocks(tmp_path: Path, family: str) -> None:
    def frozen() -> Any:
        model = tiny_model(family)
        for name, parameter in model.named_parameters():
            lower = ("embed_tokens", "layers.0.", "wte", "wpe", "h.0.")
            parameter.requires_grad_(not any(part in name for part in lower))
        return model

    corpus = corpus_of(tmp_path / "corpus", 13)
    fit = make_fit(tmp_path / "fit", corpus, model=frozen())
    assert shared_in(fit, range(5)) == 13
    found = gradients(fit, range(5))[:2]
    assert 0 < len(found[1]) < len(list(fit.model.parameters()))
    check(found, gradients_by_hand(frozen(), corpus, range(5)))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_with_checkpointed_activations(tmp_path: Path, family: str) -> None:
    corpus = corpus_of(tmp_path / "corpus", 13)
    fit = make_fit(tmp_path / "fit", corpus, model=tiny_model(family), activation_checkpointing=True)
    assert shared_in(fit, range(5)) == 13
    check(gradients(fit, range(5))[:2], gradients_by_hand(tiny_model(family), corpus, range(5)))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_not_with_dropout_which_is_another_for_each_example(tmp_path: Path, family: str) -> None:
    fit = make_fit(tmp_path / "fit", corpus_of(tmp_path / "corpus", 13), model=tiny_model(family, dropout=0.1))
    assert fit.objective.causal.packs  # type: ignore[attr-defined]
    assert not fit.objective.causal.shares  # type: ignore[attr-defined]
    assert shared_in(fit, range(5)) == 0


def test_not_with_noise_which_is_another_for_each_example(tmp_path: Path) -> None:
    model = tiny_model()
    corpus = corpus_of(tmp_path / "corpus", 13)
    examples = [corpus[n] for n in range(5)]
    assert "shared_prefix" in tiny_task().objective(model, Regularisation(label_smoothing=0.1)).collate(examples)
    noisy = tiny_task().objective(model, Regularisation(neftune_alpha=5.0)).collate(examples)
    assert "shared_prefix" not in noisy
    assert noisy["input_ids"].numel() == int(noisy["lengths"].sum()) - 5


def test_what_is_computed_is_less_by_what_is_shared_and_what_predicts_nothing(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "corpus", 13)
    fit = make_fit(tmp_path / "fit", corpus)
    result = take_step(fit, range(5))
    assert result.tokens == int(corpus.lengths("input_ids").sum()) == 5 * 13 + sum(REST)
    assert result.computed == result.tokens - 5 - 4 * 13
    assert result.supervised == result.tokens - 5
    alone = make_fit(tmp_path / "alone", corpus)
    alone.objective = alone.stepper.objective = alone.feeder.objective = replace(
        alone.objective,
        causal=replace(alone.objective.causal, shares=False),  # type: ignore
    )
    plain = take_step(alone, range(5))
    assert plain.computed == plain.tokens - 5
    assert plain.loss == pytest.approx(result.loss, abs=1e-5)
    assert plain.grad_norm == pytest.approx(result.grad_norm, rel=1e-5)


def test_what_comes_after_the_last_prediction_is_left_out(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "corpus", 4, (20,))
    example = dict(corpus[0])
    example["supervised"] = np.isin(np.arange(24), [0, 9])
    batch = tiny_task().objective(tiny_model()).collate([example])
    assert batch["input_ids"].tolist() == [list(example["input_ids"][:9])]
    assert batch["kept"].tolist() == [8]
    assert batch["targets"].tolist() == [example["input_ids"][9]]
    assert batch["lengths"].tolist() == [24]


def test_the_places_of_tokens() -> None:
    """A beginning of 8 tokens, then what is each example's own."""
    rows = [np.concatenate([np.arange(8), own]) for own in ([50, 51], [60], [70, 71, 72])]
    packed = pack(rows, share=True)
    assert (packed.shared, packed.lengths) == (8, [8, 2, 1, 3])
    assert packed.ids.tolist() == [*range(8), 50, 51, 60, 70, 71, 72]
    for number, row in enumerate(rows):
        assert packed.ids[packed.places(number, np.arange(len(row)))].tolist() == row.tolist()
    inputs = packed.inputs()
    assert inputs["position_ids"].tolist() == [[*range(8), 8, 9, 8, 8, 9, 10]]
    assert inputs["cu_seq_lens_q"].tolist() == [0, 8, 10, 11, 14]
    assert (inputs["max_length_q"], inputs["shared_prefix"]) == (8, 8)
    apart = pack(rows, share=False)
    assert (apart.shared, apart.lengths) == (0, [10, 9, 11])
    assert "shared_prefix" not in apart.inputs()
    for number, row in enumerate(rows):
        assert apart.ids[apart.places(number, np.arange(len(row)))].tolist() == row.tolist()
