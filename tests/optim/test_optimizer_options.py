"""Wrong options and missing packages are errors of the recipe, with the place, what was expected and what to do."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest
from optimizer_cases import groups

from llmkit.errors import RecipeError
from llmkit.optim import build_optimizer


@pytest.mark.parametrize(
    ("name", "options", "where", "hint"),
    [
        ("adam", {}, "optimizer", "adamw"),
        ("adamw", {"beta": [0.9, 0.9]}, "optimizer.beta", "betas"),
        ("adamw", {"lr": 1.0}, "optimizer.lr", "stage"),
        ("adamw", {"weight_decay": 1.0}, "optimizer.weight_decay", "`weight_decay:` beside `optimizer:`"),
        ("adamw", {"betas": 0.9}, "optimizer.betas", None),
        ("adamw", {"betas": [0.9]}, "optimizer.betas", None),
        ("adamw", {"eps": True}, "optimizer.eps", None),
        ("adamw", {"eps": "small"}, "optimizer.eps", None),
        ("sgd", {"nesterov": "perhaps"}, "optimizer.nesterov", None),
        ("adamw", {"betas": [0.9, 1.5]}, "optimizer", None),
        ("sgd", {"nesterov": True, "momentum": 0}, "optimizer", None),
        ("adagrad", {"lr_decay": 0.1}, "optimizer.lr_decay", None),
        ("adagrad", {"eps": -1}, "optimizer", None),
        ("rmsprop", {"alpha": 1.1}, "optimizer.alpha", None),
        ("adafactor", {"relative_step": True}, "optimizer.relative_step", None),
        ("adafactor", {"clip_threshold": 0}, "optimizer.clip_threshold", None),
        ("adafactor", {"decay_rate": 0.8}, "optimizer", None),
        ("adafactor", {"beta1": 1}, "optimizer.beta1", None),
        ("muon", {"ns_steps": 0}, "optimizer.ns_steps", None),
        ("muon", {"momentum": 1}, "optimizer.momentum", None),
        ("muon", {"betas": [0.9, 1.5]}, "optimizer.betas", None),
        ("lion", {"betas": [0.9, 1]}, "optimizer.betas", None),
        ("adamw8bit", {"beta": [0.9, 0.9]}, "optimizer.beta", "betas"),
    ],
)
def test_wrong_options_are_recipe_errors(name: str, options: dict[str, Any], where: str, hint: str | None) -> None:
    with pytest.raises(RecipeError) as caught:
        build_optimizer(name, groups(), lr=0.1, options=options)
    assert caught.value.where == where
    assert hint is None or hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("rmsprop", {"alpha": 1.1}, "a number below 1"),
        ("adafactor", {"clip_threshold": 0}, "a number above 0"),
        ("adafactor", {"eps": [-1, 0]}, "a number from 0 up"),
        ("adafactor", {"clip_threshold": float("inf")}, "a number that is finite"),
        ("adamw", {"betas": 0.9}, "tuple[float, float]"),
        ("sgd", {"mass": 0.9}, "one of momentum, nesterov"),
        ("sgd", {"nesterov": 3}, "true or false"),
        ("muon", {"ns_steps": 2.5}, "a whole number"),
    ],
)
def test_a_wrong_option_says_what_was_expected(name: str, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        build_optimizer(name, groups(), lr=0.1, options=options)
    assert caught.value.expected == expected


def test_all_wrong_options_are_reported_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        build_optimizer("sgd", groups(), lr=0.1, options={"momentun": 1, "nesterov": 3})
    assert [problem.where for problem in caught.value.problems] == ["optimizer.momentun", "optimizer.nesterov"]


@pytest.mark.parametrize(("name", "package"), [("lion", "lion-pytorch"), ("adamw8bit", "bitsandbytes")])
@pytest.mark.parametrize("installed", [None, "0.1.9"])
def test_a_package_that_is_missing_or_too_old_is_named(
    name: str, package: str, installed: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(asked: str) -> str:
        assert asked == package
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(asked)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(RecipeError) as caught:
        build_optimizer(name, groups(), lr=0.1, options={})
    assert caught.value.where == "optimizer"
    assert caught.value.got == (installed or "not installed")
    assert f"pip install '{package}>=" in (caught.value.hint or "")
