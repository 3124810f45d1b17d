"""fp32 masters behind a bf16 model: what is summed, what stays, and that it learns as fp32 does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import (
    Recorder,
    give,
    gradients,
    make_fit,
    one_thread,
    random_corpus,
    same_bits,
    take_step,
    tiny_model,
    tiny_task,
    weights_of,
)

from llmkit.data.corpus import Corpus
from llmkit.model.precision import compute_in
from llmkit.train.masters import Masters

_one_thread = pytest.fixture(autouse=True)(one_thread)
NUMBERS = [0, 5, 7, 11, 20, 21]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return random_corpus(tmp_path / "corpus", 40)


def test_the_model_computes_in_bf16_and_the_optimizer_in_fp32(tmp_path: Path, corpus: Corpus) -> None:
    fit = make_fit(tmp_path / "fit", corpus, precision="bf16")
    take_step(fit, NUMBERS)
    assert {p.dtype for p in fit.model.parameters()} == {torch.bfloat16}
    assert {w.dtype for w in fit.masters.weights.values()} == {torch.float32}
    assert fit.masters.gradients.dtype == torch.float32
    trained = [p for group in fit.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in trained} == {id(w) for w in fit.masters.weights.values()}
    assert {p.dtype for p in trained} == {torch.float32}
    moments = [v for s in fit.optimizer.state.values() for v in s.values() if v.ndim > 0]
    assert {v.dtype for v in moments} == {torch.float32}
    for name, parameter in fit.model.named_parameters():
        assert torch.equal(parameter, fit.masters.weights[name].bfloat16()), "published after the step"
        assert parameter.grad is None, "not kept twice"


def test_buffers_keep_their_precision(tmp_path: Path, corpus: Corpus) -> None:
    fit = make_fit(tmp_path / "fit", corpus, precision="bf16")
    assert {b.dtype for b in fit.model.buffers()} == {torch.float32}


def test_gradients_of_micro_batches_add_up_in_fp32(tmp_path: Path, corpus: Corpus) -> None:
    """Each part's gradient is bf16; their sum is not rounded again."""
    fit = make_fit(tmp_path / "fit", corpus, precision="bf16")
    supervised = [fit.objective.count(fit.objective.collate([corpus[n]])) for n in NUMBERS]
    _, together, count = gradients(fit, NUMBERS, micro_batch_size=1)
    assert count == len(NUMBERS)
    model = fit.model
    total = {name: torch.zeros_like(weight) for name, weight in fit.masters.weights.items()}
    plain = tiny_model().train()
    compute_in(plain, "bf16")
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), model.parameters(), strict=True))
    objective = tiny_task().objective(plain)
    with objective.computing():
        for number in NUMBERS:
            plain.zero_grad()
            objective.loss(plain, objective.collate([corpus[number]])).backward()
            for name, parameter in plain.named_parameters():
                assert parameter.grad is not None
                total[name] += parameter.grad.to_dense().float() / sum(supervised)
    for name, expected in total.items():
        tied = "embed" in name  # its two parts are added in bf16 here, and in fp32 there
        torch.testing.assert_close(together[name], expected, atol=1e-3 if tied else 1e-7, rtol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_gradients_are_one_flat_tensor(tmp_path: Path, corpus: Corpus, precision: str) -> None:
    fit = make_fit(tmp_path / "fit", corpus, precision=precision)
    for numbers in (NUMBERS, NUMBERS[:2]):
        _, found, _ = gradients(make_fit(tmp_path / "a", corpus, precision=precision), numbers)
        gradients(fit, numbers)
        norm = torch.cat([g.flatten() for g in found.values()]).norm()
        assert fit.masters.gradients.norm().item() == pytest.approx(norm.item(), rel=1e-6)
        flat = fit.masters.gradients.untyped_storage().data_ptr()
        assert {w.grad.untyped_storage().data_ptr() for w in fit.masters.weights.values()} == {flat}  # type: ignore


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_of_the_step_before_are_forgotten(tmp_path: Path, corpus: Corpus, precision: str) -> None:
    fit = make_fit(tmp_path / "fit", corpus, precision=precision)
    gradients(fit, NUMBERS[:3])
    again = gradients(fit, NUMBERS[3:])[1]
    fresh = gradients(make_fit(tmp_path / "b", corpus, precision=precision), NUMBERS[3:])[1]
    assert same_bits(again, fresh)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_parameter_without_a_gradient_has_one_of_zeros(tmp_path: Path, corpus: Corpus, precision: str) -> None:
    """An expert that no token was sent to keeps nothing of the step before."""
    fit = make_fit(tmp_path / "fit", corpus, precision=precision)
    assert gradients(fit, NUMBERS)[1]["model.layers.1.mlp.up_proj.weight"].any()
    layer = fit.model.model.layers[1]
    layer.mlp.forward = lambda hidden: torch.zeros_like(hidden)
    found = gradients(fit, NUMBERS)[1]
    assert not found["model.layers.1.mlp.up_proj.weight"].any()
    assert found["model.layers.0.mlp.up_proj.weight"].any()


def freeze(model: Any, *parts: str) -> Any:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in parts))
    return model


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_frozen_parameters_come_out_bit_identical(tmp_path: Path, corpus: Corpus, precision: str) -> None:
    model = freeze(tiny_model(), "embed_tokens", "layers.0")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fit = make_fit(tmp_path / "fit", corpus, corpus, model=model, precision=precision, steps=4, weight_decay=0.5)
    fit.run([])
    with fit.masters.in_full() as full:
        full.save_pretrained(tmp_path / "saved")
        inside = {name: p.detach().clone() for name, p in full.named_parameters()}
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "saved" / "model.safetensors")
    for name, value in before.items():
        frozen = "embed_tokens" in name or "layers.0" in name
        assert inside[name].dtype == saved[name].dtype == torch.float32
        assert torch.equal(saved[name], inside[name])
        assert torch.equal(inside[name], value) == frozen, name
    if precision == "bf16":
        assert {p.dtype for p in fit.model.parameters()} == {torch.bfloat16}, "afterwards it computes as before"
        assert any(not torch.equal(v.bfloat16().float(), v) for v in before.values()), "bf16 would have shown"


def test_small_steps_are_not_lost_in_bf16(tmp_path: Path, corpus: Corpus) -> None:
    """A weight of 1 cannot move by 1e-4 in bf16; its master can."""
    fit = make_fit(tmp_path / "fit", corpus, precision="bf16")
    for _ in range(3):
        take_step(fit, NUMBERS, 1e-4)
    norm = fit.masters.weights["model.norm.weight"]
    assert (norm.detach() - 1).abs().max().item() == pytest.approx(3e-4, rel=0.2)
    assert torch.equal(fit.model.model.norm.weight, torch.ones_like(fit.model.model.norm.weight))


def test_what_a_family_keeps_in_fp32_stays() -> None:
    model = tiny_model()
    model._keep_in_fp32_modules_strict = {"norm"}
    originals = compute_in(model, "bf16")
    for name, parameter in model.named_parameters():
        kept = "norm" in name
        assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), name
        assert (name in originals) != kept


def test_masters_of_what_stays_in_fp32_are_the_parameters_themselves() -> None:
    model = tiny_model()
    model._keep_in_fp32_modules_strict = {"norm"}
    masters = Masters(model, "bf16")
    own = dict(model.named_parameters())
    assert masters.weights["model.norm.weight"] is own["model.norm.weight"]
    assert masters.weights["lm_head.weight"] is not own["lm_head.weight"]
    masters.weights["model.norm.weight"].grad.fill_(1.0)  # type: ignore[union-attr]
    masters.forget_gradients()
    assert not masters.gradients.any()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_tied_embeddings_stay_tied_and_learn_once(tmp_path: Path, corpus: Corpus, precision: str) -> None:
    model = tiny_model(tie_word_embeddings=True)
    fit = make_fit(tmp_path / "fit", corpus, model=model, precision=precision)
    assert "lm_head.weight" not in fit.masters.weights
    take_step(fit, NUMBERS)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with fit.masters.in_full() as full:
        assert full.lm_head.weight is full.model.embed_tokens.weight
        assert full.lm_head.weight.dtype == torch.float32
    found = gradients(make_fit(tmp_path / "a", corpus, model=tiny_model(tie_word_embeddings=True)), NUMBERS)[1]
    apart = gradients(make_fit(tmp_path / "b", corpus, model=untied()), NUMBERS)[1]
    both = apart["model.embed_tokens.weight"] + apart["lm_head.weight"]
    torch.testing.assert_close(found["model.embed_tokens.weight"], both, atol=1e-5, rtol=1e-4)


def untied() -> Any:
    """The same numbers as the tied one."""
    tied, model = tiny_model(tie_word_embeddings=True), tiny_model()
    model.load_state_dict(tied.state_dict())
    return model


def test_bf16_learns_as_fp32_does(tmp_path: Path, corpus: Corpus) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        fit = make_fit(tmp_path / precision, corpus, corpus, precision=precision, steps=30, lr=5e-3)
        recorder = Recorder()
        fit.run([recorder])
        losses[precision] = [*recorder.of("loss"), fit.state.eval_loss]
    assert losses["fp32"][-1] < losses["fp32"][0] - 0.5
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=1e-2)
    assert losses["bf16"] != losses["fp32"]


def test_saving_and_loading_puts_masters_and_copies_back(tmp_path: Path, corpus: Corpus) -> None:
    fit = make_fit(tmp_path / "fit", corpus, precision="bf16")
    take_step(fit, NUMBERS)
    saved = {name: tensor.clone() for name, tensor in fit.masters.saved().items()}
    before = weights_of(fit)
    take_step(fit, NUMBERS, 0.1)
    assert not same_bits(weights_of(fit), before)
    fit.masters.load(saved)
    assert same_bits(weights_of(fit), before)
    assert torch.equal(fit.model.lm_head.weight, saved["lm_head.weight"].bfloat16())


def test_parameter_groups_are_those_of_the_model(tmp_path: Path, corpus: Corpus) -> None:
    fit = make_fit(tmp_path / "fit", corpus, precision="bf16", weight_decay=0.3)
    give(fit, NUMBERS)
    for group in fit.optimizer.param_groups:
        assert group["weight_decay"] == (0.3 if group["group"] == "decay" else 0.0)
        for name, parameter in zip(group["names"], group["params"], strict=True):
            assert parameter is fit.masters.weights[name]
