"""A step learns from the mean over everything supervised in the global batch, however the batch is cut."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fitting import (
    WORDS,
    Recorder,
    by_hand,
    gradients,
    make_fit,
    one_thread,
    random_corpus,
    same_bits,
    take_step,
    tiny_model,
    weights_of,
)

from llmkit.data.batches import BatchOrder
from llmkit.data.corpus import Corpus
from llmkit.errors import DivergedError
from llmkit.optim.schedules import Progress, cosine

_one_thread = pytest.fixture(autouse=True)(one_thread)
FAMILIES = ("llama", "gpt2")


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return random_corpus(tmp_path / "corpus", 40)


def test_examples_weigh_by_their_tokens(tmp_path: Path, corpus: Corpus) -> None:
    fit = make_fit(tmp_path / "fit", corpus)
    pair = [int(corpus.lengths("input_ids").argmin()), int(corpus.lengths("input_ids").argmax())]
    counts = [int(np.asarray(corpus[i]["supervised"])[1:].sum()) for i in pair]
    assert counts[0] != counts[1]
    losses = [gradients(make_fit(tmp_path / "fit", corpus), [i])[0] for i in pair]
    both = gradients(fit, pair, micro_batch_size=1)[0]
    assert both == pytest.approx((losses[0] * counts[0] + losses[1] * counts[1]) / sum(counts), abs=1e-6)
    assert both != pytest.approx(sum(losses) / 2, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_five_steps_are_those_of_a_plain_loop(tmp_path: Path, corpus: Corpus, family: str) -> None:
    recorder = Recorder()
    options: dict[str, Any] = {"steps": 5, "warmup": 2, "batch_size": 6, "weight_decay": 0.1, "max_grad_norm": 0.5}
    options["optimizer"] = {"name": "adamw", "eps": 1e-5}  # so that it does not make noise large
    fit = make_fit(
        tmp_path / "fit", corpus, model=tiny_model(family), micro_batch_size=4, lr=1e-2, keep="last", **options
    )
    fit.run([recorder])

    model = tiny_model(family)
    decay = [p for n, p in model.named_parameters() if p.ndim > 1]
    rest = [p for n, p in model.named_parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=1e-2, eps=1e-5
    )
    order = BatchOrder(corpus.lengths("input_ids"), 3, batch_size=6, by_length=False)
    rates = [0.5, 1.0, 1.0, 0.5 * (1 + math.cos(math.pi / 3)), 0.5 * (1 + math.cos(math.pi * 2 / 3))]
    for step, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * rate
        loss = by_hand(model, corpus, order.batch(step).tolist())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        assert recorder.of("loss")[step] == pytest.approx(loss.item(), abs=1e-5)
        assert recorder.of("grad_norm")[step] == pytest.approx(norm.item(), rel=1e-4)
        assert recorder.of("lr")[step] == pytest.approx(1e-2 * rate)
    for (name, found), (_, expected) in zip(fit.model.named_parameters(), model.named_parameters(), strict=True):
        if not name.endswith("c_attn.bias"):  # a key's bias has no gradient but noise, which Adam makes large
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-3, msg=name)
    assert max(recorder.of("grad_norm")) > 0.5, "clipping had something to do"


def test_the_rate_in_the_log_is_the_schedule(tmp_path: Path, corpus: Corpus) -> None:
    recorder = Recorder()
    fit = make_fit(tmp_path / "fit", corpus, steps=9, warmup=3, lr=2e-3)
    fit.run([recorder])
    assert recorder.of("lr") == [pytest.approx(2e-3 * cosine(Progress(step, 9, 3))) for step in range(9)]
    assert recorder.of("step") == list(range(1, 10))


def test_clipping_scales_the_step_and_the_norm_is_that_before(tmp_path: Path, corpus: Corpus) -> None:
    moved, norms = [], []
    for limit in (None, 1e-3, 1e9):
        fit = make_fit(tmp_path / "fit", corpus, optimizer="sgd", max_grad_norm=limit, lr=1.0, weight_decay=0.0)
        before = weights_of(fit)
        result = take_step(fit, [0, 1, 2, 3], 1.0)
        norms.append(result.grad_norm)
        moved.append(
            math.sqrt(sum(float((p.detach() - before[n]).square().sum()) for n, p in fit.model.named_parameters()))
        )
    assert norms[0] == pytest.approx(norms[1])
    assert norms[0] == pytest.approx(norms[2])
    assert moved[1] == pytest.approx(1e-3, rel=1e-3)
    assert moved[0] == pytest.approx(norms[0], rel=1e-3)
    assert moved[2] == pytest.approx(norms[0], rel=1e-3)


def test_counts_and_the_stop_request(tmp_path: Path, corpus: Corpus) -> None:
    fit = make_fit(tmp_path / "fit", corpus)
    result = take_step(fit, [3, 4])
    assert result.tokens == sum(len(corpus[i]["input_ids"]) for i in (3, 4))
    assert result.supervised == sum(int(np.asarray(corpus[i]["supervised"])[1:].sum()) for i in (3, 4))
    assert not result.stop
    assert take_step(fit, [3, 4], stop=True).stop


@pytest.mark.parametrize("poison", ["weight", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_leaves_the_weights(tmp_path: Path, corpus: Corpus, poison: str) -> None:
    fit = make_fit(tmp_path / "fit", corpus)
    take_step(fit, [0, 1])
    if poison == "weight":
        with torch.no_grad():
            fit.model.lm_head.weight[5, 3] = float("nan")
    else:
        fit.model.model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = weights_of(fit)
    trouble = take_step(fit, [0, 1]).trouble
    assert trouble is not None
    assert trouble.action == "stop"
    assert "not a finite number" in trouble.why
    after = weights_of(fit)
    assert all(torch.equal(value.nan_to_num(), after[name].nan_to_num()) for name, value in before.items())


def test_bf16_computes_in_bf16_on_fp32_weights(tmp_path: Path, corpus: Corpus) -> None:
    results = {}
    for precision in ("fp32", "bf16"):
        fit = make_fit(tmp_path / "fit", corpus, precision=precision)
        seen: set[torch.dtype] = set()
        fit.model.lm_head.register_forward_hook(lambda module, inputs, output, seen=seen: seen.add(output.dtype))
        results[precision] = take_step(fit, [0, 1, 2, 3])
        assert seen == {torch.bfloat16 if precision == "bf16" else torch.float32}
        assert {p.dtype for p in fit.masters.weights.values()} == {torch.float32}
    assert results["bf16"].loss == pytest.approx(results["fp32"].loss, rel=2e-2)
    assert results["bf16"].loss != results["fp32"].loss


class TestFp16:
    """The loss is scaled up before the backward pass; an overflow skips the step and is not a divergence."""

    def test_the_loss_and_the_norm_are_those_without_a_scale(self, tmp_path: Path, corpus: Corpus) -> None:
        fp32 = take_step(make_fit(tmp_path / "fit", corpus), [0, 1])
        fit = make_fit(tmp_path / "fit", corpus, precision="fp16")
        assert fit.stepper.scaler is not None
        before = weights_of(fit)
        result = take_step(fit, [0, 1])
        assert result.loss == pytest.approx(fp32.loss, rel=1e-2)
        assert result.grad_norm == pytest.approx(fp32.grad_norm, rel=3e-2)
        assert not same_bits(before, weights_of(fit))

    def test_an_overflow_lowers_the_scale_and_skips_the_step(self, tmp_path: Path, corpus: Corpus) -> None:
        fit = make_fit(tmp_path / "fit", corpus, precision="fp16")
        hook = fit.model.model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
        before, recorder = weights_of(fit), Recorder()
        result = take_step(fit, [0, 1])
        assert result.grad_norm is None
        assert math.isfinite(result.loss)
        assert same_bits(before, weights_of(fit))
        assert fit.stepper.scaler.get_scale() == 2**15
        hook.remove()
        fit.run([recorder])
        assert all(math.isfinite(value) for value in recorder.of("loss") + recorder.of("grad_norm"))

    def test_overflow_without_end_and_a_bad_loss_are_divergence(self, tmp_path: Path, corpus: Corpus) -> None:
        fit = make_fit(tmp_path / "fit", corpus, precision="fp16", steps=100)
        fit.model.model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
        with pytest.raises(DivergedError):
            fit.run([])
        assert 10 < fit.state.step < 30
        fit = make_fit(tmp_path / "other", corpus, precision="fp16")
        with torch.no_grad():
            fit.model.lm_head.weight.fill_(float("nan"))
        with pytest.raises(DivergedError):
            fit.run([])
        assert fit.state.step == 0


def test_words_fit_the_corpus() -> None:
    assert tiny_model().config.vocab_size == WORDS
