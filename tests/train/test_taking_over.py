"""What `--resume-anyway` takes of a checkpoint: what has the same name, shape and type, and it says what it leaves."""

from __future__ import annotations

import torch

from llmkit.run.checkpoint import Checkpoint
from llmkit.train.state import TrainState
from llmkit.train.taking_over import fitting_parts


def checkpoint(weights: dict[str, torch.Tensor], *, fill: float, step: int, lr: float) -> Checkpoint:
    weights = {name: torch.full_like(tensor, fill) for name, tensor in weights.items()}
    moments = {f"{number}.exp_avg": tensor.float() for number, tensor in enumerate(weights.values())}
    values = {
        "kind": "AdamW",
        "state": {f"{n}.flag": None for n in range(len(weights))},
        "groups": [{"names": list(weights), "lr": lr}],
    }
    state = TrainState(step=step, best_loss=1.0, best_step=step).to_json()
    return Checkpoint(weights, moments, values, {"state": state, "random": [], "scaler": None})


def test_what_fits_is_taken_and_the_rest_is_named() -> None:
    there = {"body": torch.zeros(2, 3), "head": torch.zeros(3, 3), "gone": torch.zeros(2), "half": torch.zeros(4)}
    here = {"head": torch.zeros(5, 3), "body": torch.zeros(2, 3), "new": torch.zeros(2), "half": torch.zeros(4).half()}
    said: list[str] = []
    found, present = checkpoint(there, fill=7, step=9, lr=1e-3), checkpoint(here, fill=1, step=0, lr=5e-4)
    taken = fitting_parts(found, present, said.append)
    assert {name: (tuple(t.shape), t.dtype, float(t.flatten()[0])) for name, t in taken.weights.items()} == {
        "head": ((5, 3), torch.float32, 1.0),
        "body": ((2, 3), torch.float32, 7.0),
        "new": ((2,), torch.float32, 1.0),
        "half": ((4,), torch.float16, 1.0),
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in taken.optimizer_tensors.items()}
    assert shapes["1.exp_avg"] == (2, 3), "moments go with their parameter's number of now"
    assert (0, 5) not in shapes.values()
    assert "0.exp_avg" not in shapes, "of another shape"
    assert taken.optimizer_values["groups"] == [{"names": list(here), "lr": 5e-4}], "options are those of now"
    assert (taken.state["state"]["step"], taken.state["state"]["best_step"]) == (9, 0)
    assert taken.best_weights is None
    assert "1 of 4 weights" in said[0]
    assert "half, head, new" in said[1]
    assert "gone, half, head" in said[2]
