"""Stopped after the last step, while the model is written or scored: what was learnt is not learnt again."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli

from llmkit.run.log import read_metrics
from llmkit.stages import finetune, training
from llmkit.train.loop import Fit

SETTINGS = (
    "name=one",
    "data.eval=20%",
    "finetune.steps=12",
    "finetune.lr=1e-3",
    "finetune.log_every=1",
    "finetune.trackers=[]",
)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
@pytest.mark.parametrize("moment", ["the model is written", "the model is scored"])
def test_no_step_is_taken_again(
    cli: Cli, tiny_llama: Path, chat_rows: Path, tmp_path: Path, number: signal.Signals, code: int, moment: str
) -> None:
    words = [word for setting in SETTINGS for word in ("--set", setting)]
    command = ("finetune", "-m", tiny_llama, "-d", chat_rows, *words)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    place, name = (training, "save_model") if "written" in moment else (finetune, "evaluate")
    real = getattr(place, name)

    def stopped(*given: Any, **more: Any) -> Any:
        os.kill(os.getpid(), number)
        return real(*given, **more)

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(place, name, stopped)
            first = cli(*command, "-o", tmp_path / "run", "--json")
    finally:
        signal.signal(signal.SIGINT, before)
    assert first.code == code, first.out
    taken: list[int] = []
    step = Fit._step

    def counted(fit: Fit, *rest: Any) -> Any:
        taken.append(fit.state.step)
        return step(fit, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fit, "_step", counted)
        again = cli(*command, "-o", tmp_path / "run")
    assert again.code == 0, again.err
    assert cli(*command, "-o", tmp_path / "whole").code == 0
    runs = (tmp_path / "run", tmp_path / "whole")
    weights = [(run / "finetune" / "model" / "model.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1]
    logs = [[(line["step"], line.get("loss")) for line in read_metrics(run / "metrics.jsonl")] for run in runs]
    assert logs[0] == logs[1]
    assert taken == [], "all steps had been taken"
