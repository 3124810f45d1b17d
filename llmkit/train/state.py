"""Where a training stands: everything that is not weights, optimizer or random numbers."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from llmkit.recipe.training import EarlyStopping


@dataclass
class TrainState:
    """Counts since the first step, and the best held-out loss so far."""

    step: int = 0
    tokens: int = 0
    computed: int = 0  # positions: more than tokens with padding, fewer where examples share a beginning
    supervised: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    eval_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    loss_to_beat: float | None = None  # by min_delta, for early stopping; the best may be a little lower
    evaluations_without_gain: int = 0
    micro_batch_tokens: int | None = None  # most that a process computes at once; lower once memory ran out
    held_out_losses: list[float] = field(default_factory=list)  # all of them, in order
    stream: dict[str, Any] | None = None  # where a stream of training data is to be read on
    save_seconds: float = 0.0  # that training waited for saving
    recent_losses: list[float] = field(default_factory=list)  # of the last steps, for judging the next
    refused_steps: int = 0  # that diverged, and were skipped or rolled back
    passed_over: int = 0  # batches that a rollback left behind: step n learns from batch n + passed_over

    @property
    def train_loss(self) -> float | None:
        """The mean loss over everything supervised since the first step."""
        return self.loss_sum / self.supervised if self.supervised else None

    @property
    def batch(self) -> int:
        """The 0-based batch that the next step learns from."""
        return self.step + self.passed_over

    @property
    def tokens_per_second(self) -> float:
        """Over the whole training, without evaluation and saving."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def note_evaluation(self, loss: float, rule: EarlyStopping | None) -> bool:
        """Takes in a held-out loss; True when it is the best so far."""
        self.eval_loss = loss
        self.held_out_losses.append(loss)
        margin = rule.min_delta if rule else 0.0
        if self.loss_to_beat is None or loss < self.loss_to_beat - margin:
            self.loss_to_beat, self.evaluations_without_gain = loss, 0
        else:
            self.evaluations_without_gain += 1
        if self.best_loss is None or loss < self.best_loss:
            self.best_loss, self.best_step = loss, self.step
            return True
        return False

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


def random_state() -> dict[str, Any]:
    """The state of all random numbers of this process, as JSON values."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Puts back what `random_state` gave."""
    torch.set_rng_state(as_bytes(state["torch"]))
    np.random.set_state(tuple(state["numpy"]))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(as_bytes(state["cuda"]))


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def as_bytes(text: str) -> torch.Tensor:
    """What was written in hex, shape (N,)."""
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
