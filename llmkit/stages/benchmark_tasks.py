"""Finding the tasks of a benchmark: what can fail does so before anything is trained, and names the benchmark."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import logging
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.errors import DataError, LlmkitError, Problem, RecipeError, did_you_mean, raise_all
from llmkit.recipe.schema import Recipe
from llmkit.stages.base import task_class
from llmkit.stages.benchmark_files import TaskFile, called, hub_answers, hub_is_off, is_file

KEY = "evaluate.benchmarks"
SEEDS = {"python": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}  # those of the lm_eval command


def check_benchmarks(recipe: Recipe) -> None:
    """Raises RecipeError or DataError with what can be known to fail before anything is trained."""
    names = recipe.evaluate.benchmarks
    if not names:
        return
    if task_class(recipe).auto_class != "AutoModelForCausalLM":
        raise RecipeError(
            "benchmarks are for models that write text",
            got=f"task: {recipe.task}",
            expected="task: text or chat",
            where=KEY,
        )
    if importlib.util.find_spec("lm_eval") is None:
        raise RecipeError("benchmarks need lm-eval", hint="pip install 'llmkit[benchmarks]'", where=KEY)
    raise_all([problem for name in names if is_file(name) for problem in TaskFile(Path(name)).problems(KEY)])
    raise_all([problem for name in names if not is_file(name) for problem in _unknown(name)])
    online = [name for name in names if not is_file(name) or TaskFile(Path(name)).needs_hub]
    if online and not hub_answers():
        raise _no_network(online[0], "the hub does not answer")
    if hub_is_off():
        for name in online:
            load_tasks(name)  # what is there is there at once


@cache
def _manager(registered: bool) -> Any:
    """lm-eval's index of tasks; without `registered` it knows none by name, which takes no time."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=registered)


def load_tasks(name: str) -> dict[str, Any]:
    """The tasks of a benchmark with their data, as the lm_eval command has them. Raises DataError or RecipeError.

    That sets its seeds before it loads them: some tasks shuffle their documents then.
    """
    registered = not is_file(name) or TaskFile(Path(name)).names_others
    manager = _manager(registered)
    wanted = name if is_file(name) else manager.match_tasks([name])
    try:
        with silence(), own_failures(name):
            _seed()
            loaded: dict[str, Any] = manager.load(wanted)
    except LlmkitError:
        raise
    except (ConnectionError, FileNotFoundError) as error:
        if isinstance(error, ConnectionError) or "Hub" in str(error):
            raise _no_network(name, _first_line(error)) from None
        raise DataError(
            f"the data of the benchmark {called(name)} are not there", got=_first_line(error), where=KEY
        ) from None
    except Exception as error:  # whatever a task file and the readers of its data can raise
        got = f"{type(error).__name__}: {_first_line(error)}"
        raise RecipeError(f"lm-eval cannot load the benchmark {called(name)}", got=got, where=KEY) from None
    for task, found in loaded["tasks"].items():
        _refuse_unfit(name, task, found)
    return loaded


def _seed() -> None:
    import torch

    random.seed(SEEDS["python"])
    np.random.seed(SEEDS["numpy"])
    torch.manual_seed(SEEDS["torch"])


def _refuse_unfit(name: str, task: str, found: Any) -> None:
    if getattr(found, "UNSAFE_CODE", False):
        raise RecipeError(
            f"the benchmark {called(name)} runs code that the model wrote, which llmkit does not",
            got=task,
            hint="the lm_eval command does, with --confirm_run_unsafe_code",
            where=KEY,
        )
    if getattr(found, "MULTIMODAL", False):
        raise RecipeError(f"the benchmark {called(name)} is for models that see or hear", got=task, where=KEY)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Puts aside lm-eval's bars, prints and warnings: what they say is checked and reported by the caller."""
    log = logging.getLogger("lm_eval")
    level = log.level
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            log.setLevel(level)


@contextlib.contextmanager
def own_failures(name: str) -> Iterator[None]:
    """Tells what the user's own code raised, with its file and line."""
    try:
        yield
    except LlmkitError:
        raise
    except Exception as error:
        line = TaskFile(Path(name)).line_of(error) if is_file(name) else None
        if line is None:
            raise
        got = f"{type(error).__name__}: {_first_line(error)}"
        raise DataError(f"the benchmark {called(name)}'s own code failed", got=got, where=line) from None


def _unknown(name: str) -> list[Problem]:
    manager = _manager(True)
    if manager.match_tasks([name]):
        return []
    hint = (
        did_you_mean(name, manager.all_tasks) or "`lm_eval ls tasks` lists them; a task file of your own ends in .yaml"
    )
    return [Problem(f"lm-eval has no benchmark `{called(name)}`", got=name, hint=hint, where=KEY)]


def _no_network(name: str, got: str) -> DataError:
    return DataError(
        f"the benchmark {called(name)} needs the network, and its data are not to be had",
        got=got or None,
        expected="a Hugging Face hub that answers, or data that were downloaded before",
        hint="with HF_HUB_OFFLINE=1 only data that are there count; a task file with local data needs no network",
        where=KEY,
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def version() -> str:
    return importlib.metadata.version("lm-eval")
