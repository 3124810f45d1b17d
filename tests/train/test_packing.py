"""However the examples of a batch are laid out, the loss and its gradients are those of each example alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fitting import (
    FAMILIES,
    WORDS,
    by_hand,
    check,
    gradients,
    gradients_by_hand,
    make_fit,
    one_thread,
    random_corpus,
    take_step,
    tiny_model,
    tiny_task,
)

from llmkit.data.corpus import Corpus
from llmkit.model.causal import read_causal_model
from llmkit.model.objective import sizes
from llmkit.tasks.base import Regularisation
from llmkit.tasks.causal_objective import CausalObjective
from llmkit.train.loop import Fit

_one_thread = pytest.fixture(autouse=True)(one_thread)
NUMBERS = [0, 5, 7, 11, 20, 21, 30, 39]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return random_corpus(tmp_path / "corpus", 40)


def padded_fit(folder: Path, corpus: Corpus, model: Any) -> Fit:
    """A Fit that pads although its model could pack."""
    fit = make_fit(folder, corpus, model=model)
    causal = read_causal_model(model)
    fit.objective = CausalObjective(replace(causal, packs=False), 0, Regularisation())
    fit.stepper.objective = fit.feeder.objective = fit.objective
    return fit


def plain_padded(model: Any, corpus: Corpus, side: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of padded rows by Transformers' own forward and attention."""
    model.zero_grad()
    rows = [np.asarray(corpus[n]["input_ids"], np.int64) for n in NUMBERS]
    chosen = [np.asarray(corpus[n]["supervised"]) for n in NUMBERS]
    width = max(map(len, rows))
    ids, mask, labels = (np.full((len(rows), width), fill, np.int64) for fill in (0, 0, -100))
    for row, (tokens, wanted) in enumerate(zip(rows, chosen, strict=True)):
        where = slice(width - len(tokens), None) if side == "left" else slice(len(tokens))
        ids[row, where], mask[row, where] = tokens, 1
        labels[row, where] = np.where(np.arange(len(tokens)) > 0, np.where(wanted, tokens, -100), -100)
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    tensors = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    logits = model(**{name: torch.from_numpy(array) for name, array in tensors.items()}, use_cache=False).logits
    flat = torch.from_numpy(labels[:, 1:]).flatten()
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), flat)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_in_any_cut_equals_each_alone(tmp_path: Path, corpus: Corpus, family: str) -> None:
    expected = gradients_by_hand(tiny_model(family), corpus, NUMBERS)
    for cut, parts in (({}, 1), ({"micro_batch_size": 2}, 4), ({"tokens": 40}, 3), ({"micro_batch_size": 1}, 8)):
        fit = make_fit(tmp_path / "fit", corpus, model=tiny_model(family))
        assert not fit.objective.padded
        loss, found, count = gradients(fit, NUMBERS, **cut)  # type: ignore[arg-type]
        assert count == parts or (count > 1 and "tokens" in cut)
        check((loss, found), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_in_any_cut_equals_each_alone(tmp_path: Path, corpus: Corpus, family: str) -> None:
    expected = gradients_by_hand(tiny_model(family), corpus, NUMBERS)
    for cut in ({}, {"micro_batch_size": 3}, {"tokens": 60}):
        fit = padded_fit(tmp_path / "fit", corpus, tiny_model(family))
        loss, found, count = gradients(fit, NUMBERS, **cut)  # type: ignore[arg-type]
        assert count > 1 or not cut
        check((loss, found), expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_a_plain_padded_forward_of_transformers(
    tmp_path: Path, corpus: Corpus, family: str, side: str
) -> None:
    expected = plain_padded(tiny_model(family), corpus, side)
    loss, found, _ = gradients(make_fit(tmp_path / "fit", corpus, model=tiny_model(family)), NUMBERS)
    check((loss, found), expected)


def test_the_window_of_the_tests_hides_something(corpus: Corpus) -> None:
    whole, narrow = tiny_model("mistral", sliding_window=64), tiny_model("mistral", sliding_window=6)
    assert abs(by_hand(whole, corpus, NUMBERS).item() - by_hand(narrow, corpus, NUMBERS).item()) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_examples_never_see_each_other(corpus: Corpus, family: str) -> None:
    """Other tokens in one example leave the logits of the rest as they are, and their gradients."""
    model = tiny_model(family).eval()
    objective = tiny_task().objective(model)
    examples = [dict(corpus[n]) for n in NUMBERS[:4]]
    for example in examples:
        example["supervised"] = np.ones(len(example["input_ids"]), bool)
    spans = np.cumsum([0, *(len(e["input_ids"]) - 1 for e in examples)])  # nothing is predicted from the last token

    def run(changed: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [dict(e) for e in examples]
        if changed is not None:
            rows[changed]["input_ids"] = (np.asarray(rows[changed]["input_ids"]) + 17) % WORDS
        batch = objective.collate(rows)
        embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        inputs = {k: v for k, v in batch.items() if k not in ("input_ids", "kept", "targets", "lengths")}
        with objective.computing():
            logits = model(inputs_embeds=embedded, **inputs, use_cache=False).logits[0]
            (gradient,) = torch.autograd.grad(logits.square().sum(), embedded)
        return logits.detach(), gradient[0]

    before = run(None)
    for changed in range(4):
        after = run(changed)
        for other in range(4):
            own = slice(spans[other], spans[other + 1])
            for one, two in zip(before, after, strict=True):
                if other == changed:
                    assert not torch.allclose(one[own], two[own], atol=1e-3)
                else:
                    torch.testing.assert_close(one[own], two[own], atol=1e-6, rtol=1e-6)


def test_the_order_within_a_pack_does_not_matter(tmp_path: Path, corpus: Corpus) -> None:
    forward = gradients(make_fit(tmp_path / "fit", corpus), NUMBERS)
    backward = gradients(make_fit(tmp_path / "fit", corpus), NUMBERS[::-1])
    check(forward[:2], backward[:2])


def test_examples_longer_than_the_explicit_products_reach(tmp_path: Path) -> None:
    """Above 1,024 tokens PyTorch's own attention takes over, with and without a window; the numbers stay."""
    from fitting import COLUMNS

    from llmkit.data.corpus import CorpusWriter

    rng = np.random.default_rng(0)
    writer = CorpusWriter(tmp_path / "long", COLUMNS)
    for length in (1100, 30, 1025):
        writer.add({"input_ids": rng.integers(0, WORDS, length), "supervised": np.ones(length, bool)})
    corpus = writer.finish({})
    for family, changes in (("llama", {}), ("mistral", {"sliding_window": 100})):
        build = {"max_position_embeddings": 2048, "num_hidden_layers": 1} | changes
        expected = gradients_by_hand(tiny_model(family, **build), corpus, [0, 1, 2])
        fit = make_fit(tmp_path / "fit", corpus, model=tiny_model(family, **build))
        check(gradients(fit, [0, 1, 2])[:2], expected)


def test_nothing_is_padding_when_packed(tmp_path: Path, corpus: Corpus) -> None:
    fit = make_fit(tmp_path / "fit", corpus, steps=5)
    state = fit.run([])
    assert state.computed == state.tokens - 5 * 8, "what is left out is the last token of each example"
    padded = padded_fit(tmp_path / "padded", corpus, tiny_model())
    batch = padded.objective.collate([corpus[n] for n in NUMBERS])
    lengths = corpus.lengths("input_ids")[NUMBERS]
    assert sizes(batch) == (lengths.sum(), 8 * (lengths.max() - 1))
    assert sizes(batch)[1] > lengths.sum(), "what it is held against"
    result = take_step(padded, NUMBERS)
    assert result.tokens == lengths.sum()
    assert lengths.sum() - 8 <= result.computed < 1.03 * lengths.sum(), "cut so that little is padding"
