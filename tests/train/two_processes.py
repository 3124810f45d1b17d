"""Run in each of the processes of test_processes.py: the training of a case, with its outcome written by the first process."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from fitting import Recorder, facts_of, make_fit, tiny_model, weights_of
from safetensors.torch import save_file
from small_memory import short_of_memory

from llmkit.data.corpus import Corpus


def write_to_a_full_disk(*arguments: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def main(place: str, case: str) -> None:
    torch.set_num_threads(1)
    folder, given = Path(place), json.loads(case)
    stop_after, cpu = given.pop("stop_after", None), Accelerator(cpu=True)
    full_disk = given.pop("full_disk", False)
    family, short = given.pop("family", "llama"), given.pop("short_of_memory", None)
    fit = make_fit(
        folder / "fit",
        Corpus(folder.parent / "train"),
        Corpus(folder.parent / "eval"),
        model=tiny_model(family, dropout=given.pop("dropout", 0.0)),
        accelerator=cpu,
        **given,
    )
    if short is not None and cpu.process_index == short["process"]:
        short_of_memory(fit, short["tokens"])
    if full_disk and cpu.is_main_process:
        fit.keeper.checkpoints.write = write_to_a_full_disk  # type: ignore[method-assign]
    resumed = fit.resume()
    recorder = Recorder()
    if stop_after is not None and cpu.process_index == cpu.num_processes - 1:  # the last process alone is signalled
        import signal

        recorder.at[stop_after] = lambda: os.kill(os.getpid(), signal.SIGUSR1)
    status, said = "done", ""
    try:
        fit.run([recorder])
    except Exception as error:
        status, said = type(error).__name__, str(error)
    own = weights_of(fit)
    save_file(own, folder / f"weights-{cpu.process_index}.safetensors")
    found = {
        "status": status,
        "processes": cpu.num_processes,
        "steps": [{k: v for k, v in s.items() if k != "tokens_per_second"} for s in recorder.steps],
        "evaluations": recorder.evaluations,
        "facts": facts_of(fit.state),
        "resumed": resumed,
        "said": said,
    }
    (folder / f"found-{cpu.process_index}.json").write_text(json.dumps(found))
    cpu.wait_for_everyone()


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # as `llmkit` itself does: gloo can wait for ever while the interpreter is taken down
