"""Where memory runs out, a step is done again in smaller parts: nothing is lost, and nothing changes but speed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from fitting import (
    COLUMNS,
    Recorder,
    give,
    make_fit,
    one_thread,
    random_corpus,
    same_bits,
    tiny_model,
    weights_of,
)
from small_memory import short_of_memory

from llmkit.data.corpus import Corpus, CorpusWriter
from llmkit.errors import ResourceError
from llmkit.train.loop import Fit
from llmkit.train.step import is_out_of_memory

_one_thread = pytest.fixture(autouse=True)(one_thread)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return random_corpus(tmp_path / "corpus", 45)


def corpus_of(folder: Path, lengths: Sequence[int]) -> Corpus:
    writer = CorpusWriter(folder, COLUMNS)
    rng = np.random.default_rng(0)
    for length in lengths:
        writer.add({"input_ids": rng.integers(0, 61, length), "supervised": np.ones(length, bool)})
    return writer.finish({})


def limited(fit: Fit, tokens: int) -> Fit:
    """A Fit that computes at most so many tokens at once from the start."""
    fit.state.micro_batch_tokens = tokens
    return fit


def test_a_step_is_done_again_with_half_and_nothing_is_lost(tmp_path: Path, corpus: Corpus) -> None:
    said: list[str] = []
    fit = short_of_memory(make_fit(tmp_path / "fit", corpus, warn=said.append, steps=6), 70)
    recorder = Recorder()
    fit.run([recorder])
    assert recorder.of("step") == [1, 2, 3, 4, 5, 6]
    limit = fit.state.micro_batch_tokens
    assert limit is not None
    assert limit <= 70
    assert all("out of memory in step" in text and "tokens" in text for text in said)
    assert "step 1" in said[0]
    assert len(said) <= 2, "the limit stays for what follows"
    reference = make_fit(tmp_path / "reference", corpus, steps=6)
    plain = Recorder()
    reference.run([plain])
    assert recorder.of("loss") == pytest.approx(plain.of("loss"), abs=1e-5)
    assert recorder.of("tokens") == plain.of("tokens")
    assert recorder.of("grad_norm") == pytest.approx(plain.of("grad_norm"), rel=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_ends_with_the_bits_of_a_run_that_was_cut_so_from_the_start(
    tmp_path: Path, corpus: Corpus, precision: str
) -> None:
    """With dropout, so that the random state shows."""

    def build(name: str) -> Fit:
        return make_fit(
            tmp_path / name, corpus, model=tiny_model("gpt2", dropout=0.2), steps=5, precision=precision, keep="last"
        )

    fit = short_of_memory(build("fit"), 70)
    fit.run([])
    assert fit.state.micro_batch_tokens is not None
    reference = limited(build("reference"), fit.state.micro_batch_tokens)
    reference.run([])
    assert same_bits(weights_of(fit), weights_of(reference))
    assert fit.state.loss_sum == reference.state.loss_sum


def test_the_limit_is_in_the_checkpoint_and_is_resumed(tmp_path: Path, corpus: Corpus) -> None:
    fit = short_of_memory(make_fit(tmp_path / "fit", corpus, steps=4, save_every=1, keep="last"), 70)
    fit.run([])
    [newest] = sorted((fit.folder / "checkpoints").iterdir())[-1:]
    saved = json.loads((newest / "state.json").read_text())["train"]["state"]
    assert saved["micro_batch_tokens"] == fit.state.micro_batch_tokens is not None
    said: list[str] = []
    again = make_fit(tmp_path / "fit", corpus, steps=4, save_every=1, keep="last", warn=said.append)
    short_of_memory(again, 70)
    assert again.resume()
    assert again.state.micro_batch_tokens == fit.state.micro_batch_tokens
    again.run([])
    assert said == []
    assert max(again.objective.sizes) <= 70  # type: ignore[attr-defined]
    assert same_bits(weights_of(again), weights_of(fit))


def test_the_recipe_says_how_much_is_computed_at_once(tmp_path: Path, corpus: Corpus) -> None:
    fit = short_of_memory(make_fit(tmp_path / "fit", corpus, steps=3, micro_batch_tokens=50), 50)
    said: list[str] = []
    fit.stepper.warn = said.append
    fit.run([])
    assert said == []
    assert 24 <= max(fit.objective.sizes) <= 50  # type: ignore[attr-defined]
    assert len(fit.objective.sizes) > 6  # type: ignore[attr-defined]


def test_one_example_that_does_not_fit_is_an_error(tmp_path: Path, corpus: Corpus) -> None:
    fit = short_of_memory(make_fit(tmp_path / "fit", corpus, steps=3), 2)
    before = weights_of(fit)
    with pytest.raises(ResourceError, match="one example") as caught:
        fit.run([])
    assert caught.value.exit_code == 5
    assert "step 1" in str(caught.value.got)
    assert same_bits(before, weights_of(fit))


@pytest.mark.parametrize("padded", [False, True])
def test_one_long_example_among_short_ones_is_an_error_and_not_a_loop(tmp_path: Path, padded: bool) -> None:
    """The longest example alone is too large: halving what the others share cannot help."""
    corpus = corpus_of(tmp_path / "long", [24, 4, 4, 4, 4])
    fit = short_of_memory(give(make_fit(tmp_path / "fit", corpus), [0, 1, 2, 3, 4]), 20)
    if padded:
        object.__setattr__(fit.objective.causal, "packs", False)  # type: ignore[attr-defined]
    tries: list[str] = []

    def warn(text: str) -> None:
        tries.append(text)
        assert len(tries) < 8, "it goes on for ever"

    fit.stepper.warn = warn
    with pytest.raises(ResourceError, match="one example"), fit.objective.computing():
        fit.stepper.step(0, [1e-3, 1e-3], None)
    fit.feeder.close()


def test_one_long_example_that_fits_is_no_error(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "long", [24, 4, 4, 4, 4])
    fit = short_of_memory(give(make_fit(tmp_path / "fit", corpus), [0, 1, 2, 3, 4]), 24)
    with fit.objective.computing():
        result = fit.stepper.step(0, [1e-3, 1e-3], None)
    assert result.micro_batch_tokens is not None
    assert result.tokens == 40


def test_other_errors_are_not_taken_for_it(tmp_path: Path, corpus: Corpus) -> None:
    fit = make_fit(tmp_path / "fit", corpus)
    fit.model.model.layers[0].mlp.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        fit.run([])


def test_what_is_out_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert is_out_of_memory(caught.value), "the CPU has no exception of its own for it"
    assert not is_out_of_memory(RuntimeError("expected scalar type Float but found Half"))
