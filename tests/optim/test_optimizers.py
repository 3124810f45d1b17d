"""Optimizers are built from a recipe's options, keep their groups, and go on after loading as if nothing had been."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from optimizer_cases import CASES, DECOUPLED, build, groups, take_steps, tensors
from safetensors.torch import load_file, save_file

from llmkit import catalog
from llmkit.optim import build_optimizer
from llmkit.optim.state import optimizer_from_parts, optimizer_to_parts


@pytest.mark.parametrize(
    ("name", "options", "kept"),
    [
        ("adamw", {"betas": [0.9, 0.95], "eps": "1e-6"}, {"betas": (0.9, 0.95), "eps": 1e-6, "fused": True}),
        ("adamw", {}, {"betas": (0.9, 0.999), "eps": 1e-8}),
        ("sgd", {"momentum": 0.5, "nesterov": True}, {"momentum": 0.5, "nesterov": True, "fused": True}),
        ("sgd", {}, {"momentum": 0.9, "nesterov": False}),
        ("adagrad", {"eps": 1e-6}, {"eps": 1e-6, "lr_decay": 0, "fused": True}),
        ("rmsprop", {"alpha": 0.9, "centered": True}, {"alpha": 0.9, "eps": 1e-8, "momentum": 0.0, "centered": True}),
        ("adafactor", {"beta1": 0.9}, {"beta1": 0.9, "relative_step": False, "scale_parameter": False}),
        ("adafactor", {"beta1": None, "eps": [1e-20, 1]}, {"beta1": None, "eps": (1e-20, 1.0), "warmup_init": False}),
    ],
)
def test_options_reach_the_optimizer(name: str, options: dict[str, Any], kept: dict[str, Any]) -> None:
    optimizer = build_optimizer(name, groups(), lr=0.1, options=options)
    for group in optimizer.param_groups:
        assert {key: group[key] for key in kept} == kept


def test_every_optimizer_of_the_catalogue_has_a_case() -> None:
    assert {name for name, _ in CASES.values()} == set(catalog.names("optimizer"))


@pytest.mark.parametrize("case", CASES)
def test_groups_keep_what_they_came_with(case: str) -> None:
    given = groups()
    optimizer = build(case, given)
    assert given[0].keys() == groups()[0].keys(), "the caller's groups are not changed"
    assert {name: id(tensor) for name, tensor in tensors(optimizer).items()} == {
        name: id(tensor) for group in given for name, tensor in zip(group["names"], group["params"], strict=True)
    }
    for group in optimizer.param_groups:
        of_vectors = group["names"] == ["vector"]
        assert (group["group"], group["weight_decay"]) == (("no_decay", 0.0) if of_vectors else ("decay", 0.5))
        assert group["lr"] == 0.1
        assert len(group["names"]) == len(group["hidden"]) == len(group["params"])


@pytest.mark.parametrize("case", CASES)
def test_k_steps_saved_and_k_more_are_the_bits_of_2k(case: str, tmp_path: Path) -> None:
    """Through the files of a checkpoint."""
    through = build(case)
    take_steps(through, range(6))

    first = build(case)
    take_steps(first, range(3))
    saved, values = optimizer_to_parts(first)
    save_file(saved, tmp_path / "optimizer.safetensors")
    (tmp_path / "state.json").write_text(json.dumps(values))
    weights = {name: tensor.detach().clone() for name, tensor in tensors(first).items()}

    second = build(case)
    with torch.no_grad():
        for name, tensor in tensors(second).items():
            tensor.copy_(weights[name])
    optimizer_from_parts(
        second, load_file(tmp_path / "optimizer.safetensors"), json.loads((tmp_path / "state.json").read_text())
    )
    take_steps(second, range(3, 6))
    expected = tensors(through)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors(second).items())
    ends, found = optimizer_to_parts(through)[0], optimizer_to_parts(second)[0]
    assert ends.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in ends.items())


@pytest.mark.parametrize("case", CASES)
def test_loading_a_state_dict_goes_on_too(case: str) -> None:
    first, second = build(case), build(case)
    take_steps(first, range(3))
    with torch.no_grad():
        for name, tensor in tensors(second).items():
            tensor.copy_(tensors(first)[name])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    take_steps(first, range(3, 6))
    take_steps(second, range(3, 6))
    assert all(torch.equal(tensor, tensors(first)[name]) for name, tensor in tensors(second).items())


@pytest.mark.parametrize("case", CASES)
def test_only_groups_with_a_decay_decay(case: str) -> None:
    """Without a gradient there is nothing but decay: the decoupled kind is a factor of 1 - rate * decay a step."""
    optimizer = build(case, groups(lr=1e-3, weight_decay=0.5))
    before = {name: tensor.detach().clone() for name, tensor in tensors(optimizer).items()}
    for parameter in tensors(optimizer).values():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(2):
        optimizer.step()
    after = tensors(optimizer)
    assert torch.equal(after["vector"], before["vector"])
    for name in ("matrix", "embedding"):
        if case in DECOUPLED:
            torch.testing.assert_close(after[name], before[name] * (1 - 1e-3 * 0.5) ** 2)
        else:
            assert (after[name].abs() < before[name].abs()).float().mean() > 0.9


@pytest.mark.parametrize("case", CASES)
def test_a_group_without_weight_decay_does_not_decay(case: str) -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = build(case, [{"params": [parameter], "hidden": [True]}])
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(parameter, torch.ones(2, 2))


@pytest.mark.parametrize("case", CASES)
def test_a_parameter_without_a_gradient_stays_and_has_no_moments(case: str) -> None:
    optimizer = build(case)
    before = {name: tensor.detach().clone() for name, tensor in tensors(optimizer).items()}
    parameters = tensors(optimizer)
    parameters["embedding"].grad = torch.ones_like(parameters["embedding"])
    optimizer.step()
    assert torch.equal(parameters["matrix"], before["matrix"])
    assert torch.equal(parameters["vector"], before["vector"])
    assert not torch.equal(parameters["embedding"], before["embedding"])
    if "adagrad" not in case:  # which allocates at once
        assert set(optimizer.state) <= {parameters["embedding"]}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("overflow", [True, False])
def test_a_scaler_for_fp16_leaves_out_a_step_that_overflowed(case: str, overflow: bool) -> None:
    optimizer, plain = build(case), build(case)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(
        sum(tensor.sum() for tensor in tensors(optimizer).values()) * (float("inf") if overflow else 1.0)
    ).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == (4.0 if overflow else 8.0)
    if not overflow:
        for tensor in tensors(plain).values():
            tensor.grad = torch.ones_like(tensor)
        plain.step()
    assert all(torch.equal(tensor, tensors(plain)[name]) for name, tensor in tensors(optimizer).items())


NUMBERS = {  # that are kept for the matrix of 96 x 64
    "adamw": 2 * 96 * 64,
    "sgd": 96 * 64,
    "sgd without momentum": 0,
    "adagrad": 96 * 64,
    "rmsprop": 96 * 64,
    "rmsprop, centred, with momentum": 3 * 96 * 64,
    "adafactor": 96 + 64,
    "adafactor, all options": 96 + 64 + 96 * 64,
    "muon": 96 * 64,
    "lion": 96 * 64,
}


@pytest.mark.parametrize("case", NUMBERS)
def test_the_state_is_as_small_as_the_docstring_says(case: str) -> None:
    optimizer = build(case)
    take_steps(optimizer, range(2))
    state = optimizer.state[tensors(optimizer)["matrix"]].values()
    kept = sum(value.numel() for value in state if isinstance(value, torch.Tensor) and value.ndim)
    assert kept == NUMBERS[case]
