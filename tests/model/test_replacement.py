"""Stand-ins are where the choice says while they are wanted, and leave no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llmkit.model.dropout import FastDropout, fast_dropout
from llmkit.model.embedding import FastEmbedding, fast_embedding
from llmkit.model.norms import fused_norm
from llmkit.model.replacement import Choice, replaced_modules


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = LlamaRMSNorm(4)
        self.inner = nn.ModuleDict({"drop": nn.Dropout(0.5), "linear": nn.Linear(4, 4)})
        self.last = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> Any:
        return self.last(self.inner["linear"](self.inner["drop"](self.norm(x))))


def make() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(9, 4), nn.Dropout(0.3), nn.Sequential(Block(), Block()), nn.Linear(4, 9))


def state(model: nn.Module) -> list[tuple[str, int, bool]]:
    return [(path, id(module), module.training) for path, module in model.named_modules(remove_duplicate=False)]


def dropouts(model: nn.Module) -> set[type[nn.Module]]:
    return {type(module) for module in model.modules() if isinstance(module, nn.Dropout)}


def no_dropout(module: nn.Module) -> nn.Module | None:
    """A stand-in that was not told whether the model is training."""
    return nn.Identity() if isinstance(module, nn.Dropout) else None


CHOICES = [(fast_dropout, 5), (fast_embedding, 1), (fused_norm, 2), (no_dropout, 5), (lambda module: None, 0)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("choose", "count"), CHOICES)
def test_modules_come_back_to_their_places(choose: Choice, count: int, training: bool) -> None:
    model = make().train(training)
    before, names = state(model), list(model.state_dict())
    parameters = [id(parameter) for parameter in model.parameters()]
    with replaced_modules(model, choose) as replaced:
        assert replaced == count
        now = {path: key for path, key, _ in state(model)}
        assert list(now) == [path for path, _, _ in before]
        assert sum(now[path] != key for path, key, _ in before) == count
        assert list(model.state_dict()) == names
        assert [id(parameter) for parameter in model.parameters()] == parameters
        assert model(torch.tensor([[1, 2]])).shape == (1, 2, 9)
    assert state(model) == before


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_modules_come_back_after_an_exception(error: type[BaseException]) -> None:
    model = make()
    before = state(model)
    with pytest.raises(error), replaced_modules(model, fast_dropout):
        raise error
    assert state(model) == before


def test_a_choice_that_fails_changes_nothing() -> None:
    model = make()
    before = state(model)

    def choose(module: nn.Module) -> nn.Module | None:
        if isinstance(module, nn.Linear):
            raise KeyError
        return fast_dropout(module)

    with pytest.raises(KeyError), replaced_modules(model, choose):
        pass
    assert state(model) == before


@pytest.mark.parametrize("choose", [fast_dropout, fast_embedding, fused_norm, no_dropout])
@pytest.mark.parametrize(("before", "inside"), [(True, False), (False, True)])
def test_whether_the_model_is_training_is_handed_back(choose: Choice, before: bool, inside: bool) -> None:
    model = make().train(before)
    with replaced_modules(model, choose):
        model.train(inside)
        assert {module.training for module in model.modules()} == {inside}
    assert {module.training for module in model.modules()} == {inside}


@pytest.mark.parametrize("choose", [fast_dropout, fast_embedding, fused_norm, no_dropout])
@pytest.mark.parametrize("training", [True, False])
def test_stand_ins_have_the_mode_of_what_they_stand_for(choose: Choice, training: bool) -> None:
    model = make().train(training)
    with replaced_modules(model, choose):
        assert {module.training for module in model.modules()} == {training}


def test_each_module_has_a_mode_of_its_own() -> None:
    model = make()
    model[2].eval()
    before = state(model)
    with replaced_modules(model, fast_dropout):
        assert (model[1].training, model[2][0].last.training) == (True, False)
    assert state(model) == before
    with replaced_modules(model, fast_dropout):
        model[2][1].inner.train()
    assert [module.training for module in (model[1], model[2][0].last, model[2][1].inner["drop"])] == [
        True,
        False,
        True,
    ]


def test_what_is_in_a_replaced_module_gets_its_mode_too() -> None:
    model = make()

    def choose(module: nn.Module) -> nn.Module | None:
        return nn.Identity() if isinstance(module, Block) else fast_dropout(module)

    identities = [key for _, key, _ in state(model)]
    with replaced_modules(model, choose):
        assert [type(block) for block in model[2]] == [nn.Identity, nn.Identity]
        model.eval()
    assert [key for _, key, _ in state(model)] == identities
    assert {module.training for module in model.modules()} == {False}


def test_one_within_another() -> None:
    model = make()
    before = state(model)
    with replaced_modules(model, fast_dropout):
        between = state(model)
        with replaced_modules(model, fast_dropout) as replaced:
            assert replaced == 0
        with replaced_modules(model, fast_embedding), replaced_modules(model, fused_norm) as replaced:
            assert replaced == 2
            assert isinstance(model[0], FastEmbedding)
            assert dropouts(model) == {FastDropout}
        assert state(model) == between
    assert state(model) == before


def test_a_module_in_two_places_is_replaced_in_both() -> None:
    """A hook on one of them is one on both."""
    shared = nn.Dropout(0.1)
    model = nn.ModuleDict({"first": nn.Sequential(shared), "second": nn.Sequential(nn.Identity(), shared)})
    before = state(model)
    with replaced_modules(model, fast_dropout):
        first, second = model.get_submodule("first.0"), model.get_submodule("second.1")
        assert type(first) is FastDropout
        assert first is second
    assert state(model) == before


def test_a_model_cannot_be_replaced_in_itself() -> None:
    model = nn.Dropout(0.1)
    with replaced_modules(model, fast_dropout):
        assert model(torch.ones(3)).shape == (3,)
    assert len(list(model.children())) == 0
    model.eval()
