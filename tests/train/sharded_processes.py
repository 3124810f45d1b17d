"""Run by torchrun in test_sharding.py and test_local_steps.py: trainings in turn, whose outcome each process writes."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from fitting import Recorder, facts_of, make_fit, tiny_model, weights_of
from safetensors.torch import save_file

from llmkit.data.corpus import Corpus


def train(folder: Path, name: str, place: str, given: dict[str, Any], cpu: Any) -> None:
    """One training in `folder/place`; what it found is named by `name`."""
    model = tiny_model(given.pop("family", "llama"), dropout=given.pop("dropout", 0.0), **given.pop("config", {}))
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(given.get("frozen") is None or given["frozen"] not in key)
    given.pop("frozen", None)
    model._keep_in_fp32_modules_strict = given.pop("kept_in_fp32", None)
    spoil = given.pop("spoil", None)
    stop_after = given.pop("stop_after", None)
    corpora = (Corpus(folder / "train"), Corpus(folder / "eval"))
    said: list[str] = []
    fit = make_fit(folder / place, *corpora, model=model, accelerator=cpu, warn=said.append, **given)
    resumed = fit.resume()
    recorder = Recorder()
    if stop_after is not None and cpu.process_index == cpu.num_processes - 1:  # the last process alone is signalled
        recorder.at[stop_after] = lambda: os.kill(os.getpid(), signal.SIGUSR1)
    if spoil is not None and cpu.process_index == cpu.num_processes - 1:
        recorder.at[spoil] = lambda: spoil_next(fit.masters)
    status = "done"
    try:
        fit.run([recorder])
    except Exception as error:
        status = type(error).__name__
    shapes = {key: list(weight.shape) for key, weight in fit.masters.weights.items()}
    own = weights_of(fit)
    if cpu.is_main_process:
        save_file({key: tensor.contiguous() for key, tensor in own.items()}, folder / f"{name}.safetensors")
    found = {
        "status": status,
        "resumed": resumed,
        "said": said,
        "steps": [{k: v for k, v in s.items() if k != "tokens_per_second"} for s in recorder.steps],
        "evaluations": recorder.evaluations,
        "facts": facts_of(fit.state),
        "shapes": shapes,
        "sum": sum(float(tensor.double().sum()) for tensor in own.values()) if not fit.masters.sharded else None,
    }
    (folder / f"{name}-{cpu.process_index}.json").write_text(json.dumps(found))
    cpu.wait_for_everyone()


def spoil_next(masters: Any) -> None:
    """Makes the gradients of the next micro-batch infinite."""
    before = masters.backward

    def backward(loss: torch.Tensor, *, last: bool) -> None:
        masters.backward = before
        before(loss * float("inf"), last=last)

    masters.backward = backward


def main(folder: Path, jobs: str) -> None:
    torch.set_num_threads(1)
    cpu = Accelerator(cpu=True)
    for name, place, given in json.loads(jobs):
        train(folder, name, place, given, cpu)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
    os._exit(0)  # as `llmkit` itself does: gloo can wait for ever while the interpreter is taken down
