"""Each step of a training against Transformers' own Trainer on the same rows in the same order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from fitting import GivenOrder, Recorder, make_fit, one_thread, random_corpus, tiny_model
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from llmkit.data.corpus import Corpus
from llmkit.train.loop import Fit

_one_thread = pytest.fixture(autouse=True)(one_thread)


@pytest.fixture(autouse=True)
def _no_trace_of_the_trainer() -> Iterator[None]:
    """A Trainer sets a precision for the whole process, which the tests after it must not see."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


STEPS, BATCH, RATE = 10, 8, 5e-3


class InOrder(Trainer):
    """Takes the rows as they come."""

    def _get_train_sampler(self, *_: Any, **__: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class Log(TrainerCallback):
    """What the Trainer logs at each step."""

    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.lines.append(logs)


def rows_in_order(fit: Fit) -> list[dict[str, Any]]:
    numbers = np.concatenate([fit.order.batch(step) for step in range(STEPS)])
    rows = []
    for number in numbers:
        example = fit.train[int(number)]
        ids = np.asarray(example["input_ids"], np.int64)
        labels = np.where(np.asarray(example["supervised"]), ids, -100)
        labels[0] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def right_padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    shape = (len(rows), width)
    ids, mask, labels = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.full(shape, -100)
    for number, row in enumerate(rows):
        size = len(row["input_ids"])
        ids[number, :size], mask[number, :size], labels[number, :size] = row["input_ids"], 1, row["labels"]
    arrays = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def by_trainer(folder: Path, fit: Fit, precision: str, micro_batches: int) -> list[dict[str, float]]:
    log = Log()
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH // micro_batches,
        gradient_accumulation_steps=micro_batches,
        max_steps=STEPS,
        learning_rate=RATE,
        lr_scheduler_type="cosine",
        warmup_steps=0,
        weight_decay=0.1,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=precision == "bf16",
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=1,
    )
    trainer = InOrder(
        model=tiny_model(),
        args=arguments,
        data_collator=right_padded,
        train_dataset=rows_in_order(fit),  # type: ignore[arg-type]
        callbacks=[log],
    )
    trainer.train()
    return log.lines


@pytest.mark.parametrize(("precision", "loss", "norm"), [("fp32", 1e-5, 1e-4), ("bf16", 1e-2, 1e-2)])
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_each_step_is_that_of_the_trainer(
    tmp_path: Path, precision: str, loss: float, norm: float, micro_batches: int
) -> None:
    corpus: Corpus = random_corpus(tmp_path / "corpus", 96)
    fit = make_fit(
        tmp_path / "fit",
        corpus,
        precision=precision,
        steps=STEPS,
        batch_size=BATCH,
        warmup=0,
        lr=RATE,
        weight_decay=0.1,
        micro_batch_size=BATCH // micro_batches,
        keep="last",
    )
    assert not isinstance(fit.order, GivenOrder)
    expected = by_trainer(tmp_path / "trainer", fit, precision, micro_batches)
    recorder = Recorder()
    fit.run([recorder])
    assert len(expected) == STEPS
    assert recorder.of("lr") == pytest.approx([line["learning_rate"] for line in expected])
    assert recorder.of("loss") == pytest.approx([line["loss"] for line in expected], rel=loss)
    assert recorder.of("grad_norm") == pytest.approx([line["grad_norm"] for line in expected], rel=norm)
    assert recorder.of("loss")[-1] < recorder.of("loss")[0] - 0.1, "it learns"
