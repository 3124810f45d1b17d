"""The processes of a distributed run: how they agree, wait for each other, and learn that one of them is gone.

What one process does alone may take hours, and a step of training must not: the time-out of collectives is
`launch.hang_after`, and whoever waits for one that works alone hears from it all the while, by a thread of each process.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from llmkit.errors import LlmkitError, ResourceError
from llmkit.recipe.schema import Recipe
from llmkit.recipe.values import seconds_of
from llmkit.run.directory import Run
from llmkit.stages.rendezvous import connect, in_short

_OTHER_WAYS = {  # that a configuration of `accelerate launch` names in the environment
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "the parallelism",
}
_BEAT = 0.1  # seconds between signs of life
_LAUNCHER_FIRST = timedelta(seconds=5)  # one that watches finds a hang before a collective does, and knows more of it
_OTHERS_WORDS = re.compile(
    r"gloo/transport|connectFullMesh|NCCL|Connection (closed|reset|refused|timed out)|Timed out waiting|Broken pipe",
    re.IGNORECASE,
)
_GO_ON = (
    "look at the log of the process that failed first, or at the network where all say this; the same command goes on from "
    "the last checkpoint"
)


class Processes:
    """The processes of a distributed run; of one when WORLD_SIZE says nothing else."""

    def __init__(self, recipe: Recipe, run: Run) -> None:
        """Raises ResourceError when they do not find each other in time, or cannot train together."""
        self.count, self.number = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        self.lead = self.number == 0
        _refuse_other_ways(run)
        if self.count == 1:
            return
        from torch.distributed.distributed_c10d import _set_pg_timeout  # there is no other way to set it later

        from llmkit.stages import probe

        keys, within = recipe.launch, seconds_of(recipe.launch.connect_within)
        deciding = recipe.model_dump(mode="json", exclude={"launch", "max_time"})
        found, device, group = connect(within, deciding, run.path)
        speed = probe.measure(device, group)
        run.reporter.note(probe.in_words(found, speed))
        clocks = probe.wrong_clocks(found, speed)
        if clocks is not None:
            run.reporter.warn(clocks)
        self._found, self._group = found, group
        silence = timedelta(seconds=seconds_of(keys.hang_after)) + _LAUNCHER_FIRST
        self._pulse = _Pulse(within)
        for each in (None, group, self._pulse.group):
            _set_pg_timeout(silence, each)
        self._pulse.start()
        self._reload(run)

    def decide(self, make: Callable[[], Any]) -> Any:
        """The first process's decision, in every process."""
        made = make() if self.lead else None
        if self.count == 1:
            return made
        from torch.distributed import broadcast_object_list

        self._pulse.meet()
        decided = [made]
        broadcast_object_list(decided, group=self._group)
        return decided[0]

    def meet(self, run: Run) -> None:
        """Waits for all, however long, and lets the others see what the first has written."""
        if self.count > 1:
            self._pulse.meet()
            self._reload(run)

    def part(self) -> None:
        """The end: whoever leaves first takes the connection away, but only when all know that all is done."""
        if self.count > 1:
            self._pulse.meet()
            with suppress(RuntimeError):  # somebody has left already
                self._pulse.meet()

    def require_same(self, what: str, make: Callable[[], Mapping[str, Any]]) -> None:
        """Raises ResourceError when what a process of each host makes of its disks is not the same everywhere."""
        if self.count > 1:
            from llmkit.stages.probe import unlike

            mine = dict(make()) if os.environ.get("LOCAL_RANK", "0") == "0" else None
            self._pulse.meet()
            got = unlike(mine, self._found, self._group)
            self._pulse.meet()
            if got is not None:
                hint = "put models and data on disks that all hosts see under the same path"
                raise ResourceError(f"{what} are not the same for all processes", got=got, hint=hint)

    def _reload(self, run: Run) -> None:
        if not self.lead:
            run.reload()


def _refuse_other_ways(run: Run) -> None:
    """Takes back what `accelerate launch` says of sharing a training, which it would do its own way, and warns."""
    for name, way in _OTHER_WAYS.items():
        if os.environ.pop(name, "").lower() in ("1", "true", "yes"):
            run.reporter.warn(
                f"{way} of `accelerate launch` is left out: `parallel` says how processes share a training"
            )


class _Pulse:
    """A thread of each process that hears from all the others several times a second, whatever they are at."""

    def __init__(self, within: float) -> None:
        from torch.distributed import new_group

        self.group = new_group(backend="gloo", timeout=timedelta(seconds=within))
        self._at, self._met = 0, 0  # the meeting that this process has come to, and that all have
        self._lost: Exception | None = None
        self._news = threading.Condition()

    def start(self) -> None:
        """Begins to listen."""
        threading.Thread(target=self._beat, name="pulse", daemon=True).start()

    def meet(self) -> None:
        """Waits until all have come here as often. Raises what the library said when one of them is gone or silent."""
        self._at += 1
        with self._news:
            while self._met < self._at:
                if self._lost is not None:
                    raise self._lost
                self._news.wait(1.0)  # so that signals are heard

    def _beat(self) -> None:
        import torch
        from torch.distributed import ReduceOp, all_reduce

        while self._lost is None:
            at = torch.tensor([self._at])
            lost = None
            try:
                all_reduce(at, ReduceOp.MIN, group=self.group)
            except Exception as error:
                lost = error
            with self._news:
                self._met, self._lost = int(at[0]) if lost is None else self._met, lost
                self._news.notify_all()
            time.sleep(_BEAT)


@contextmanager
def losses_told() -> Iterator[None]:
    """Turns what the libraries say of a process that is gone into an error for people."""
    try:
        yield
    except LlmkitError:
        raise
    except Exception as error:
        lost = lost_process(error)
        if lost is None:
            raise
        raise lost from error


def lost_process(error: Exception) -> ResourceError | None:
    """The error for people, when another process is the cause of this one; None when it is not."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not isinstance(error, RuntimeError):
        return None
    from torch.distributed import DistError

    if not isinstance(error, DistError) and not _OTHERS_WORDS.search(str(error)):
        return None
    return ResourceError(
        "another process of this training is gone, or does not answer", got=in_short(error), hint=_GO_ON
    )
