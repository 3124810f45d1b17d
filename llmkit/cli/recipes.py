"""From the command line to a recipe: a file, flags that change it, or flags alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from llmkit.errors import DataError, LlmkitError, UsageError
from llmkit.files import read_json
from llmkit.recipe.load import Override, load_recipe, parse_set
from llmkit.recipe.schema import Recipe
from llmkit.recipe.values import is_share
from llmkit.run.reporter import Reporter

_STAGES_OF = {
    "run": ["preprocess", "finetune", "evaluate", "export"],
    "preprocess": ["preprocess"],
    "pretrain": ["preprocess", "pretrain"],
    "freeze": ["freeze"],
    "finetune": ["preprocess", "finetune"],
    "evaluate": ["preprocess", "evaluate"],
    "export": ["export"],
    "inspect": ["preprocess"],
    "plan": ["preprocess", "finetune"],
}
_TASK_OF_KIND = {"chat": "chat", "labelled": "classify", "text": "text"}


@dataclass(frozen=True)
class Flags:
    """What was typed."""

    recipe: Path | None
    model: str | None
    data: str | None
    eval_data: str | None
    task: str | None
    out: Path | None
    set_: tuple[str, ...]
    seed: int | None
    max_time: str | None = None
    gpus: int | None = None
    processes: int | None = None


def recipe_from(flags: Flags, command: str, reporter: Reporter) -> Recipe:
    """The recipe that a command line means. Raises UsageError and RecipeError."""
    settings = [parse_set(text) for text in flags.set_]
    scored_whole = command == "evaluate" and flags.recipe is None  # there is nothing to train: all rows are held out
    named = [
        Override(key, value, f"{flag} {value}")
        for key, value, flag in (
            ("model", flags.model, "--model"),
            ("data.eval" if scored_whole else "data.train", flags.data, "--data"),
            ("data.eval", flags.eval_data, "--eval-data"),
            ("task", flags.task, "--task"),
            ("seed", flags.seed, "--seed"),
            ("max_time", flags.max_time, "--max-time"),
            ("launch.gpus", flags.gpus, "--gpus"),
            ("launch.processes", flags.processes, "--processes"),
        )
        if value is not None
    ]
    _refuse_twice(named, settings)
    if flags.recipe is None and command in ("evaluate", "export"):
        _refuse_trained(flags.out, command)
    if flags.recipe is not None:
        path = flags.recipe / "recipe.yaml" if (flags.recipe / "run.json").is_file() else flags.recipe
        return load_recipe(path, [*named, *settings])
    return load_recipe(None, [*_defaults(flags, command, settings, reporter), *named, *settings])


def _refuse_twice(named: list[Override], settings: list[Override]) -> None:
    """Raises UsageError when two flags, or a flag and a --set, give one key; of two --set the last one counts."""
    seen: dict[str, str] = {}
    for override in [*named, *{setting.key: setting for setting in settings}.values()]:
        if override.key in seen:
            raise UsageError(
                f"`{override.key}` is given twice",
                got=f"{seen[override.key]} and {override.flag}",
                hint="leave one of them out",
            )
        seen[override.key] = override.flag


def _refuse_trained(out: Path | None, command: str) -> None:
    """Raises UsageError when --out is a run that trained a model: the flags would make a recipe without its training."""
    stages = read_json(out / "run.json").get("stages", {}) if out and (out / "run.json").is_file() else {}
    if {"pretrain", "finetune"} & set(stages):
        raise UsageError(
            f"the run directory has a model of its own, and a recipe that `{command}` should follow",
            got=f"--out {out}",
            hint=f"`llmkit {command} {out}`; to {command} another model, choose another -o",
            where=out,
        )


def recipe_or_model(text: str | None) -> tuple[Path | None, str | None]:
    """What one argument names: a recipe (YAML or a run directory), or else a model."""
    if text is None:
        return None, None
    path = Path(text)
    is_recipe = path.suffix in (".yaml", ".yml") or (path / "run.json").is_file()
    return (path, None) if is_recipe else (None, text)


def run_directory(flags: Flags, recipe: Recipe) -> Path:
    """Where the run is kept: --out, or the directory that the recipe lies in when a run wrote it, or runs/NAME."""
    if flags.out is not None:
        return flags.out
    if flags.recipe is not None:
        folder = flags.recipe if flags.recipe.is_dir() else flags.recipe.parent
        if (folder / "run.json").is_file() and read_json(folder / "run.json").get("name") == recipe.name:
            return folder
    return Path("runs") / recipe.name


def _defaults(flags: Flags, command: str, settings: list[Override], reporter: Reporter) -> list[Override]:
    """What a command line without a recipe leaves open: the name, the stages and the task."""
    given = {override.key: override.value for override in settings}
    sections = {key.split(".")[0] for key in given}
    data = flags.data or flags.eval_data or given.get("data.train") or given.get("pretrain.data")
    _refuse_gaps(flags, command, given, has_data=data is not None)
    defaults = []
    if "name" not in given:
        name = flags.out.resolve().name if flags.out else Path(str(flags.data or flags.model or command)).name
        if command == "evaluate" and not flags.out:
            name = f"{model_name(flags.model or given.get('model'))}-on-{_plain_name(name)}"
        defaults.append(Override("name", _plain_name(name), "--out" if flags.out else "--data"))
    if "stages" not in given:
        stages = (
            list(_STAGES_OF[command]) if data is not None or command != "plan" else ["export"]
        )  # which need no data
        if command == "freeze" and given.get("freeze.blocks") == "auto":
            stages.insert(0, "preprocess")
        if "freeze" in sections and "finetune" in stages:
            stages.insert(stages.index("finetune"), "freeze")
        defaults.append(Override("stages", stages, command))
    if command == "pretrain" and "pretrain" not in sections:
        defaults.append(Override("pretrain", {}, command))
    if flags.task is None and "task" not in given:
        if isinstance(data, str) and not is_share(data):
            defaults.append(Override("task", _task_of_rows(data, reporter), "--data"))
        else:
            defaults.append(Override("task", _task_of_model(flags.model, reporter), "--model"))
    return defaults


def _refuse_gaps(flags: Flags, command: str, given: Mapping[str, Any], *, has_data: bool) -> None:
    """Raises UsageError when the flags do not say what to work on, before anything is made of them."""
    has_model = flags.model is not None or "model" in given or any("architecture" in key for key in given)
    needed = [("--model", "M", has_model)]
    if command not in ("freeze", "export", "plan") or given.get("freeze.blocks") == "auto":
        needed.append(("--data", "rows.jsonl", has_data or "data" in given))
    missing = [flag for flag, _, there in needed if not there]
    if missing:
        example = " ".join(f"{flag} {value}" for flag, value, _ in needed)
        raise UsageError(
            "there is nothing to work on" if len(missing) == len(needed) else f"{missing[0]} is missing",
            expected="a recipe, or " + " and ".join(flag for flag, _, _ in needed),
            hint=f"`llmkit {command} RECIPE`, or `llmkit {command} {example}`",
        )
    if command == "freeze" and not any(key.split(".")[0] == "freeze" for key in given):
        raise UsageError(
            "nothing says what to freeze",
            expected="--set freeze.blocks=0-3, --set freeze.embeddings=true, or others",
            hint="`llmkit schema` has all keys of `freeze`",
        )


def model_name(uri: object) -> str:
    """A model's URI as a short name: that of its file, its folder, or its run."""
    parts = [part for part in str(uri).removeprefix("pkg://").rstrip("/").split("/") if part]
    telling = [part for part in parts if part not in ("model", "finetune", "pretrain", "export", "transformers")]
    return _plain_name((telling or parts or ["model"])[-1])


def _plain_name(text: str) -> str:
    """A file name as a recipe name: `rows.jsonl.gz` becomes `rows`."""
    stem = text.removeprefix("builtin:").split(".")[0]
    return "".join(c if c.isalnum() or c in "_-" else "-" for c in stem).strip("-_") or "run"


def _task_of_rows(data: str, reporter: Reporter) -> str:
    """The task that the rows look made for: conversations before labels before plain text."""
    from llmkit.data.rows import choose_format
    from llmkit.data.sources import Row, read_rows

    sample = [row for row in islice(read_rows(data), 20) if isinstance(row, Row)]
    for kind, task in _TASK_OF_KIND.items():
        try:
            found = choose_format(sample, kind, name=None, columns=None, where=data)
        except LlmkitError:
            continue
        reporter.guess("task", task, f"the rows are {found.name}: {found.guessed}")
        return task
    columns = ", ".join(f"`{name}`" for name in sample[0].values) if sample else "no readable row"
    raise DataError(
        "the rows do not tell which task they are for",
        got=f"columns {columns}" if sample else columns,
        expected="--task text, chat or classify",
        hint="name the task, and the columns with --set 'data.columns={prompt: question, completion: answer}'",
        where=data,
    )


def _task_of_model(model: str | None, reporter: Reporter) -> str:
    """The task that a model's head and template were made for."""
    task, why = "text", "there is no data to tell it from"
    if model is not None:
        from llmkit.model.folder import VOCABULARIES, files_in
        from llmkit.model.loading import load_config, load_tokenizer
        from llmkit.model.location import locate_config

        folder = locate_config(model)
        architectures = list(load_config(folder).architectures or [])
        if any(name.endswith("ForSequenceClassification") for name in architectures):
            task, why = "classify", f"the model is a {architectures[0]}"
        elif files_in(folder, VOCABULARIES) and load_tokenizer(folder).chat_template:
            task, why = "chat", "the model has a chat template"
    reporter.guess("task", task, why)
    return task
