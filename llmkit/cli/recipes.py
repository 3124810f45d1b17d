"""From the command line to a recipe: a file, flags that change it, or flags alone."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from llmkit.errors import DataError, LlmkitError, UsageError
from llmkit.files import read_json
from llmkit.recipe.load import Override, load_recipe, parse_set
from llmkit.recipe.schema import Recipe
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
        )
        if value is not None
    ]
    if flags.recipe is not None:
        path = flags.recipe / "recipe.yaml" if (flags.recipe / "run.json").is_file() else flags.recipe
        return load_recipe(path, [*named, *settings])
    return load_recipe(None, [*_defaults(flags, command, settings, reporter), *named, *settings])


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
    given = {override.key for override in settings}
    known = {"model": flags.model, "data": flags.data}
    if not any(known.values()) and not given:
        raise UsageError(
            "there is nothing to work on",
            expected="a recipe, or --model and --data",
            hint=f"`llmkit {command} RECIPE`, or `llmkit {command} --model M --data rows.jsonl`",
        )
    defaults = []
    if "name" not in given:
        name = flags.out.resolve().name if flags.out else Path(str(flags.data or flags.model or command)).name
        defaults.append(Override("name", _plain_name(name), "--out" if flags.out else "--data"))
    if "stages" not in given:
        stages = list(_STAGES_OF[command])
        if any(key.split(".")[0] == "freeze" for key in given) and "finetune" in stages:
            stages.insert(stages.index("finetune"), "freeze")
        defaults.append(Override("stages", stages, command))
    if flags.task is None and "task" not in given:
        defaults.append(Override("task", _guess_task(flags.data, reporter), "--data"))
    return defaults


def _plain_name(text: str) -> str:
    """A file name as a recipe name: `rows.jsonl.gz` becomes `rows`."""
    stem = text.removeprefix("builtin:").split(".")[0]
    return "".join(c if c.isalnum() or c in "_-" else "-" for c in stem).strip("-_") or "run"


def _guess_task(data: str | None, reporter: Reporter) -> str:
    """The task that the rows look made for: conversations before labels before plain text."""
    from llmkit.data.rows import choose_format
    from llmkit.data.sources import Row, read_rows

    if data is None:
        reporter.guess("task", "text", "there is no data to tell it from")
        return "text"
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
