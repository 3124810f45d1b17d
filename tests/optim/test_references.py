"""Each optimizer against its paper's rule, written out in float64 over several steps with rates set from outside."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from optimizer_cases import CASES, build, gradient, groups, rate, take_steps, tensors

STEPS = 5
DECAY = 0.5
Array = np.ndarray[Any, np.dtype[np.float64]]


def adamw(p: Array, steps: Iterator[tuple[int, float, Array]], decay: float, o: dict[str, Any]) -> Array:
    (b1, b2), m, v = o.get("betas", (0.9, 0.999)), np.zeros_like(p), np.zeros_like(p)
    for t, lr, g in steps:
        p = p - lr * decay * p
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        p = p - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + o.get("eps", 1e-8))
    return p


def sgd(p: Array, steps: Iterator[tuple[int, float, Array]], decay: float, o: dict[str, Any]) -> Array:
    momentum, velocity = o.get("momentum", 0.9), np.zeros_like(p)
    for _, lr, g in steps:
        g = g + decay * p
        velocity = momentum * velocity + g
        p = p - lr * (g + momentum * velocity if o.get("nesterov") else velocity)
    return p


def adagrad(p: Array, steps: Iterator[tuple[int, float, Array]], decay: float, o: dict[str, Any]) -> Array:
    total = np.full_like(p, o.get("initial_accumulator_value", 0.0))
    for _, lr, g in steps:
        g = g + decay * p
        total = total + g**2
        p = p - lr * g / (np.sqrt(total) + 1e-10)
    return p


def rmsprop(p: Array, steps: Iterator[tuple[int, float, Array]], decay: float, o: dict[str, Any]) -> Array:
    alpha, momentum = o.get("alpha", 0.99), o.get("momentum", 0.0)
    square, mean, velocity = np.zeros_like(p), np.zeros_like(p), np.zeros_like(p)
    for _, lr, g in steps:
        g = g + decay * p
        square, mean = alpha * square + (1 - alpha) * g**2, alpha * mean + (1 - alpha) * g
        variance = square - mean**2 if o.get("centered") else square
        velocity = momentum * velocity + g / (np.sqrt(variance) + 1e-8)
        p = p - lr * velocity
    return p


def adafactor(p: Array, steps: Iterator[tuple[int, float, Array]], decay: float, o: dict[str, Any]) -> Array:
    def rms(x: Array) -> float:
        return math.sqrt(float((x**2).mean()))

    eps, beta1 = o.get("eps", (1e-30, 1e-3)), o.get("beta1")
    rows, columns, every, m = 0.0, 0.0, 0.0, np.zeros_like(p)
    for t, lr, g in steps:
        lr *= max(eps[1], rms(p)) if o.get("scale_parameter") else 1.0
        beta2, square = 1 - t ** o.get("decay_rate", -0.8), g**2 + eps[0]
        if p.ndim == 2:
            rows = beta2 * rows + (1 - beta2) * square.sum(1)
            columns = beta2 * columns + (1 - beta2) * square.sum(0)
            v = np.outer(rows, columns) / np.sum(rows)
        else:
            v = every = beta2 * every + (1 - beta2) * square
        update = g / np.sqrt(v)
        update = lr * update / max(1.0, rms(update) / o.get("clip_threshold", 1.0))
        if beta1 is not None:
            update = m = beta1 * m + (1 - beta1) * update
        p = p - lr * decay * p - update
    return p


def lion(p: Array, steps: Iterator[tuple[int, float, Array]], decay: float, o: dict[str, Any]) -> Array:
    (b1, b2), m = o["betas"], np.zeros_like(p)
    for _, lr, g in steps:
        p = p - lr * (np.sign(b1 * m + (1 - b1) * g) + decay * p)
        m = b2 * m + (1 - b2) * g
    return p


def orthogonal(x: Array, iterations: int) -> Array:
    """The quintic iteration of the Muon post."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x / np.linalg.norm(x)
    for _ in range(iterations):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x


def muon(p: Array, steps: Iterator[tuple[int, float, Array]], decay: float, o: dict[str, Any]) -> Array:
    momentum, m = o.get("momentum", 0.95), np.zeros_like(p)
    for _, lr, g in steps:
        m = momentum * m + (1 - momentum) * g
        update = momentum * m + (1 - momentum) * g if o.get("nesterov", True) else m
        p = p - lr * decay * p - lr * 0.2 * math.sqrt(max(p.shape)) * orthogonal(update, o.get("ns_steps", 5))
    return p


RULES = {"adamw": adamw, "sgd": sgd, "adagrad": adagrad, "rmsprop": rmsprop, "adafactor": adafactor, "lion": lion}
RULES |= {"muon": adamw, "adamw8bit": adamw}  # for all that is not a hidden matrix


def expected(case: str, name: str, rule: Any = None) -> Array:
    """What the rule makes of a tensor."""
    kind, options = CASES[case]
    given = {n: p for group in groups() for n, p in zip(group["names"], group["params"], strict=True)}[name]
    steps = ((step + 1, rate(step), gradient(name, step, given).double().numpy()) for step in range(STEPS))
    decay = 0.0 if name == "vector" else DECAY
    result: Array = (rule or RULES[kind])(given.detach().double().numpy(), steps, decay, options)
    return result


def trained(case: str) -> dict[str, Array]:
    optimizer = build(case, groups(weight_decay=DECAY))
    take_steps(optimizer, range(STEPS))
    return {name: tensor.detach().double().numpy() for name, tensor in tensors(optimizer).items()}


@pytest.mark.parametrize("case", CASES)
def test_the_weights_are_those_of_the_rule(case: str) -> None:
    found = trained(case)
    own_way = {"muon": ("matrix",), "adamw8bit": ("matrix",)}.get(CASES[case][0], ())
    for name in set(found) - set(own_way):
        np.testing.assert_allclose(found[name], expected(case, name), rtol=2e-5, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("case", [case for case, (name, _) in CASES.items() if name == "muon"])
def test_muon_moves_a_hidden_matrix_by_its_rule(case: str) -> None:
    """It computes in bfloat16: the change is that of float64 to within a few percent of its size."""
    start = groups()[0]["params"][0].detach().double().numpy()
    change, rule = trained(case)["matrix"] - start, expected(case, "matrix", muon) - start
    assert np.linalg.norm(change - rule) < 0.03 * np.linalg.norm(rule)


@pytest.mark.parametrize("shape", [(48, 16), (16, 48)])
def test_muon_makes_all_directions_the_same_size(shape: tuple[int, int]) -> None:
    matrix = torch.nn.Parameter(torch.zeros(shape))
    optimizer = build("muon", [{"params": [matrix], "hidden": [True], "lr": 0.01}])
    matrix.grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)) @ torch.diag(
        torch.logspace(-1, 1, shape[1])
    )
    u, _, v = torch.linalg.svd(matrix.grad, full_matrices=False)
    optimizer.step()
    step = matrix.detach() / (-0.01 * 0.2 * math.sqrt(max(shape)))
    sizes = torch.linalg.svdvals(step)
    assert sizes.min() > 0.4
    assert sizes.max() < 1.3
    assert torch.nn.functional.cosine_similarity(step.flatten(), (u @ v).flatten(), dim=0) > 0.95


def test_adamw8bit_is_adamw_but_for_rounding_and_keeps_embeddings_in_32_bits() -> None:
    start = groups()[0]["params"][0].detach().double().numpy()
    change, rule = trained("adamw8bit")["matrix"] - start, expected("adamw8bit", "matrix") - start
    assert 1e-4 * np.linalg.norm(rule) < np.linalg.norm(change - rule) < 0.05 * np.linalg.norm(rule)

    optimizer = build("adamw8bit")
    take_steps(optimizer, range(1))
    kinds = {
        name: {
            value.dtype for value in optimizer.state[tensor].values() if torch.is_tensor(value) and value.numel() > 256
        }
        for name, tensor in tensors(optimizer).items()
    }
    assert kinds == {"matrix": {torch.uint8}, "embedding": {torch.float32}, "vector": set()}
