"""Optimizers are built from a recipe's options, and their groups keep what they came with."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from llmkit.errors import RecipeError
from llmkit.optim import build_optimizer


def groups() -> list[dict[str, Any]]:
    torch.manual_seed(0)
    matrix, vector = torch.nn.Parameter(torch.randn(3, 3)), torch.nn.Parameter(torch.randn(3))
    return [
        {"params": [matrix], "names": ["matrix"], "group": "decay", "lr": 0.1, "weight_decay": 0.5},
        {"params": [vector], "names": ["vector"], "group": "no_decay", "lr": 0.1, "weight_decay": 0.0},
    ]


@pytest.mark.parametrize(
    ("name", "options", "kept"),
    [
        ("adamw", {"betas": [0.9, 0.95], "eps": "1e-6"}, {"betas": (0.9, 0.95), "eps": 1e-6, "fused": True}),
        ("adamw", {}, {"betas": (0.9, 0.999), "eps": 1e-8}),
        ("sgd", {"momentum": 0.5, "nesterov": True}, {"momentum": 0.5, "nesterov": True}),
        ("sgd", {}, {"momentum": 0.9, "nesterov": False}),
    ],
)
def test_options_reach_the_optimizer(name: str, options: dict[str, Any], kept: dict[str, Any]) -> None:
    given = groups()
    optimizer = build_optimizer(name, given, lr=0.1, options=options)
    for group in optimizer.param_groups:
        assert {key: group[key] for key in kept} == kept
    assert [group["names"] for group in optimizer.param_groups] == [["matrix"], ["vector"]]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    assert given[0].keys() == groups()[0].keys(), "the caller's groups are not changed"


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_state_is_lazy_and_survives_saving(name: str) -> None:
    def stepped(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return [parameter.detach().clone() for group in optimizer.param_groups for parameter in group["params"]]

    first = build_optimizer(name, groups(), lr=0.1, options={})
    assert not first.state
    before = stepped(first)
    second_groups = groups()
    for group, values in zip(second_groups, ([before[0]], [before[1]]), strict=True):
        group["params"] = [torch.nn.Parameter(value) for value in values]
    second = build_optimizer(name, second_groups, lr=0.1, options={})
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert [group["group"] for group in second.param_groups] == ["decay", "no_decay"]
    assert all(torch.equal(a, b) for a, b in zip(stepped(first), stepped(second), strict=True))


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_group_without_weight_decay_does_not_decay(name: str) -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = build_optimizer(name, [{"params": [parameter]}], lr=0.1, options={})
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(parameter, torch.ones(2, 2))


@pytest.mark.parametrize(
    ("name", "options", "where", "hint"),
    [
        ("adam", {}, "optimizer", "adamw"),
        ("adamw", {"beta": [0.9, 0.9]}, "optimizer.beta", "betas"),
        ("adamw", {"lr": 1.0}, "optimizer.lr", "stage"),
        ("adamw", {"betas": 0.9}, "optimizer.betas", None),
        ("adamw", {"betas": [0.9]}, "optimizer.betas", None),
        ("adamw", {"eps": True}, "optimizer.eps", None),
        ("adamw", {"eps": "small"}, "optimizer.eps", None),
        ("sgd", {"nesterov": "perhaps"}, "optimizer.nesterov", None),
        ("adamw", {"betas": [0.9, 1.5]}, "optimizer", None),
        ("sgd", {"nesterov": True, "momentum": 0}, "optimizer", None),
    ],
)
def test_wrong_options_are_recipe_errors(name: str, options: dict[str, Any], where: str, hint: str | None) -> None:
    with pytest.raises(RecipeError) as caught:
        build_optimizer(name, groups(), lr=0.1, options=options)
    assert caught.value.where == where
    assert hint is None or hint in (caught.value.hint or "")


def test_all_wrong_options_are_reported_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        build_optimizer("sgd", groups(), lr=0.1, options={"momentun": 1, "nesterov": 3})
    assert [problem.where for problem in caught.value.problems] == ["optimizer.momentun", "optimizer.nesterov"]
