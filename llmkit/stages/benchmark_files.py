"""A benchmark of the user's own: a task file for lm-eval, what it names, and what of it can be checked without running it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any

import yaml

from llmkit.errors import Problem
from llmkit.files import digest_file, digest_json

_LONGEST_NAME = 1000
_SECONDS_FOR_THE_HUB = 6.0
_READERS = ("json", "csv", "parquet", "text", "arrow", "xml", "sql", "pandas")  # of datasets, for local files


class _Function(str):
    """What stands behind `!function`: `module.name`, in a file beside the task file or an installed package."""


class _Loader(yaml.SafeLoader):
    """Reads a task file without importing its functions."""


def _function(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> _Function:
    return _Function(loader.construct_scalar(node))


_Loader.add_constructor("!function", _function)


def is_file(name: str) -> bool:
    """True for a benchmark that is named by its file."""
    return Path(name).suffix in (".yaml", ".yml")


def called(name: str) -> str:
    """A benchmark for people: its name, or that of its file."""
    return Path(name).name if is_file(name) else name


class TaskFile:
    """A task file; its data files are named from the working directory, as the lm_eval command takes them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def keys(self) -> dict[str, Any]:
        """What the file says, with what it includes; of no use where `problems` has something to say."""
        found = self._read(self.path)
        return found if isinstance(found, dict) else {}

    def _read(self, path: Path) -> Any:
        found = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        if isinstance(found, dict) and "include" in found:
            named = found["include"]
            for include in named if isinstance(named, list) else [named]:
                more = self._read(path.parent / include)
                found = {**more, **found} if isinstance(more, dict) else found
        return found

    def problems(self, where: str) -> list[Problem]:
        """The mistakes that can be seen without loading the data."""
        try:
            keys = self.keys
        except FileNotFoundError as error:
            return [Problem(f"there is no file {Path(str(error.filename)).name}", got=str(error.filename), where=where)]
        except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
            return [Problem(f"{self.path.name} is not YAML", got=" ".join(str(error).split()), where=str(self.path))]
        if not ({"task", "group"} & set(keys)):
            hint = (
                "a task file says `task: NAME`, where its data are and how to ask: see lm-eval's docs/new_task_guide.md"
            )
            return [
                Problem(
                    f"{self.path.name} is not a task of lm-eval", expected="`task:`", hint=hint, where=str(self.path)
                )
            ]
        return [
            Problem(
                f"the data of the benchmark {self.path.name} are not there",
                got=name,
                expected="a file, from the working directory",
                where=str(self.path),
            )
            for name in self._data_files
            if "://" not in name and not _matches(name)
        ]

    @property
    def names_others(self) -> bool:
        """True for a group, which names tasks that lm-eval knows."""
        return isinstance(self.keys.get("task"), list)

    @property
    def needs_hub(self) -> bool:
        """True when the data are not read from local files."""
        source = self.keys.get("dataset_path")
        if self.names_others:
            return any(isinstance(task, str) for task in self.keys["task"])
        local = source is None or source in _READERS or Path(str(source)).is_dir()
        return not local or any("://" in name for name in self._data_files)

    @property
    def _data_files(self) -> list[str]:
        options = self.keys.get("dataset_kwargs") or {}
        return list(_texts(options.get("data_files"))) if isinstance(options, dict) else []

    @property
    def content(self) -> str:
        """The digest of the file, of what it includes, of its functions' modules and of its data."""
        data = [match for name in self._data_files if "://" not in name for match in _matches(name)]
        return digest_json([digest_file(path) for path in [*self._files, *data]])

    @property
    def _files(self) -> list[Path]:
        """All files that the task file names, itself first."""
        found = {self.path.resolve(): None}
        waiting = [self.path]
        while waiting:
            path = waiting.pop()
            for named in self._named_in(path):
                if named.resolve() not in found:
                    found[named.resolve()] = None
                    waiting += [named] if named.suffix in (".yaml", ".yml") else []
        return list(found)

    def _named_in(self, path: Path) -> Iterator[Path]:
        for text in _texts(yaml.load(path.read_text(encoding="utf-8"), _Loader)):
            if isinstance(text, _Function):
                module = path.parent / f"{text.rpartition('.')[0].replace('.', '/')}.py"
                if module.is_file():
                    yield module
            elif len(text) < _LONGEST_NAME and "\n" not in text and "\0" not in text:
                yield from (file for file in (Path(text), path.parent / text) if file.is_file())

    def line_of(self, error: BaseException) -> str | None:
        """`file:line` of the innermost of the user's own lines in a traceback; None where there is none."""
        own = {str(path) for path in self._files if path.suffix == ".py"}
        found, trace = None, error.__traceback__
        while isinstance(trace, TracebackType):
            if trace.tb_frame.f_code.co_filename in own:
                found = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
            trace = trace.tb_next
        return found


def hub_is_off() -> bool:
    """True when HF_HUB_OFFLINE says that the hub is not to be asked."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def hub_answers() -> bool:
    """False when the hub is asked and does not answer within seconds; with HF_HUB_OFFLINE it is not asked, and True."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if hub_is_off():
        return True
    answers: list[Any] = []

    def ask() -> None:
        try:
            answers.append(get_session().head(constants.ENDPOINT, timeout=_SECONDS_FOR_THE_HUB))
        except Exception:  # whatever the network and its libraries can raise
            return

    asking = Thread(target=ask, daemon=True)  # looking up a name has no time limit of its own
    asking.start()
    asking.join(_SECONDS_FOR_THE_HUB)
    return bool(answers)


def _matches(name: str) -> list[Path]:
    """The files of a name that may have wildcards."""
    anchor = Path(Path(name).anchor)
    return sorted(anchor.glob(str(Path(name).relative_to(anchor)))) if name else []


def _texts(value: Any) -> Iterator[str]:
    """All texts in a YAML value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)
