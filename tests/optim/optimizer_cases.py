"""Every optimizer with options that show, and a training of three tensors for it to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmkit.optim import build_optimizer

PACKAGES = {"lion": "lion_pytorch", "adamw8bit": "bitsandbytes"}  # of those that llmkit does not install
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("adamw", {"betas": [0.8, 0.95], "eps": 1e-6}),
    "sgd": ("sgd", {"momentum": 0.8}),
    "sgd with nesterov": ("sgd", {"nesterov": True}),
    "sgd without momentum": ("sgd", {"momentum": 0}),
    "adagrad": ("adagrad", {}),
    "adagrad from a value": ("adagrad", {"initial_accumulator_value": 0.3}),
    "rmsprop": ("rmsprop", {}),
    "rmsprop, centred, with momentum": ("rmsprop", {"alpha": 0.9, "momentum": 0.8, "centered": True}),
    "adafactor": ("adafactor", {}),
    "adafactor, all options": (
        "adafactor",
        {"beta1": 0.8, "scale_parameter": True, "decay_rate": -0.6, "clip_threshold": 0.9, "eps": [1e-20, 0.5]},
    ),
    "muon": ("muon", {"betas": [0.8, 0.95]}),
    "muon without nesterov": ("muon", {"nesterov": False, "momentum": 0.8, "ns_steps": 4}),
    "lion": ("lion", {"betas": [0.8, 0.95]}),
    "adamw8bit": ("adamw8bit", {"betas": [0.8, 0.95], "eps": 1e-6}),
}
DECOUPLED = {"adamw", "adafactor", "muon", "lion", "adamw8bit"}


def groups(*, lr: float = 0.1, weight_decay: float = 0.5) -> list[dict[str, Any]]:
    """A hidden matrix and an embedding that decay, and a vector that does not; the same values at every call."""
    generator = torch.Generator().manual_seed(0)

    def parameter(*shape: int) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.randn(*shape, generator=generator))

    return [
        {
            "params": [parameter(96, 64), parameter(70, 64)],
            "names": ["matrix", "embedding"],
            "hidden": [True, False],
            "group": "decay",
            "lr": lr,
            "weight_decay": weight_decay,
        },
        {
            "params": [parameter(64)],
            "names": ["vector"],
            "hidden": [False],
            "group": "no_decay",
            "lr": lr,
            "weight_decay": 0.0,
        },
    ]


def gradient(name: str, step: int, like: torch.Tensor) -> torch.Tensor:
    """The gradient of a tensor in a step: the same at every call, and of another size in every step."""
    generator = torch.Generator().manual_seed(1000 * step + len(name))
    return torch.randn(like.shape, generator=generator) * (0.1 + step % 3)


def build(case: str, given: list[dict[str, Any]] | None = None) -> torch.optim.Optimizer:
    """The optimizer of a case; the test is skipped, and says so, when its package is not installed."""
    name, options = CASES[case]
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    return build_optimizer(name, groups() if given is None else given, lr=0.1, options=options)


def tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The parameters by name."""
    pairs = [zip(group["names"], group["params"], strict=True) for group in optimizer.param_groups]
    return {name: parameter for group in pairs for name, parameter in group}


def take_steps(optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Steps with the gradients and the rates that belong to these numbers."""
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        for name, parameter in tensors(optimizer).items():
            parameter.grad = gradient(name, step, parameter)
        optimizer.step()


def rate(step: int) -> float:
    """The learning rate of a step, set from outside as the training loop does."""
    return 0.02 / (1 + step)
