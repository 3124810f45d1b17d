"""preprocess: rows to corpora, with everything that was left out counted and named."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmkit import catalog
from llmkit.data.augment import augmentation_files
from llmkit.data.filters import filter_files
from llmkit.data.gather import RowSet
from llmkit.data.sources import source_digest
from llmkit.data.tokenizer import train_tokenizer
from llmkit.errors import DataError, RecipeError
from llmkit.files import digest_file, digest_json, write_json
from llmkit.model.folder import tokenizer_digest
from llmkit.model.loading import load_config, load_tokenizer, longest_input
from llmkit.model.location import locate
from llmkit.recipe.fields import Source
from llmkit.recipe.schema import Data, Recipe, result_keys
from llmkit.recipe.training import Tokenizer
from llmkit.recipe.values import count_of
from llmkit.run.directory import Artifact, Run
from llmkit.stages.base import pretraining_corpora, relative_files
from llmkit.stages.encoding import Encoding, Examples, Wanted, encode_all, joined, left_out_of
from llmkit.stages.leaks import leave_out_leaks
from llmkit.stages.rows import RecipeRows, workers_of
from llmkit.stages.statistics import corpus_statistics, show_statistics
from llmkit.tasks.base import TaskSettings


class Preprocess:
    """Reads, recognises, filters, splits, renders and tokenises the rows of a recipe."""

    name = "preprocess"
    version = 1
    trains = False
    resumes = True
    distributed = False
    shares = False

    def needs(self, recipe: Recipe) -> tuple[str, ...]:
        """Nothing."""
        return ()

    def inputs(self, recipe: Recipe, run: Run) -> dict[str, Any]:
        """The content of every source, of the tokenizer and of the template, and the keys that say what to do with them."""
        data, pretrain = recipe.data, recipe.pretrain
        found: dict[str, Any] = {"recipe.task": recipe.task}
        by_content = ("train", "eval", "chat_template", "replay", "general", "seen", "benchmarks")
        for key, value in result_keys(data).items():
            if key not in by_content:
                found[f"recipe.data.{key}"] = value
        found["data.benchmarks"] = [source_digest(uri) for uri in data.benchmarks]
        for key in ("train", "replay", "general", "seen"):
            found[f"data.{key}"] = _digests(getattr(data, key), streamed=key == "train" and data.stream)
        found["data.eval"] = (
            source_digest(data.eval, data.format) if data.eval is not None and data.eval_is_uri else data.eval
        )
        for path in (*filter_files(data.filters), *augmentation_files(data.augment)):
            found[f"the file {path.name}"] = digest_file(path) if path.is_file() else None
        if data.augment:
            found["recipe.seed"] = recipe.seed
        if data.chat_template:
            found["data.chat_template"] = digest_file(_template_path(data))
        if pretrain is not None:
            found["recipe.pretrain.max_length"] = pretrain.max_length
            found["pretrain.data"] = _digests(pretrain.data)
        if pretrain is not None and isinstance(pretrain.tokenizer, Tokenizer):
            found["recipe.pretrain.tokenizer"] = pretrain.tokenizer.model_dump(mode="json")
        else:
            found["tokenizer"] = tokenizer_digest(_tokenizer_folder(recipe))
        return found

    def run(self, recipe: Recipe, run: Run) -> Artifact:
        """Writes `tokenizer/`, the corpora `train/`, `eval/` and for pretraining, `rejected.jsonl` and `statistics.json`.

        What it works with lies in `work/` until it is done; a shard that is finished there is not made again. Raises
        DataError when more rows are unusable than `data.max_rejected` allows; rejected.jsonl then names them.
        """
        folder = run.folder(self.name)
        work = folder / "work"
        rows = RecipeRows(recipe, run, work / "rows")
        tokenizer = tokenizer_for(recipe, rows)
        tokenizer.save_pretrained(folder / "tokenizer")
        examples = _encoded(recipe, run, rows, tokenizer, work)
        refuse_too_long(recipe, tokenizer, examples)
        rejected = _rejected(rows, examples)
        files = [*rows.left_out, *(path for made in examples.values() for path in left_out_of(made.parts))]
        _write_rejected(folder / "rejected.jsonl", files)
        _refuse_too_many(rejected, rows.read, recipe.data, folder / "rejected.jsonl")
        leaks = leave_out_leaks(recipe, run, rows, examples, tokenizer)
        corpora = {
            name: joined(folder / name, made, tokenizer_digest(folder / "tokenizer")) for name, made in examples.items()
        }
        statistics = corpus_statistics(corpora, rows, rejected) | {"leaks": leaks}
        write_json(folder / "statistics.json", statistics)
        show_statistics(run, corpora, statistics)
        content = digest_json({name: corpus.content for name, corpus in corpora.items()})
        facts = {"corpora": {name: corpus.content for name, corpus in corpora.items()}}
        made = tuple(name for name in relative_files(run, folder) if not (run.path / name).is_relative_to(work))
        return Artifact(self.name, folder, content, made, _flat(statistics), facts, disposable=(work,))


STAGE = Preprocess()


def _digests(sources: Sequence[Source] | None, *, streamed: bool = False) -> list[dict[str, Any]] | None:
    """Sources by content: their URIs do not count. A stream has no known end, and goes by its URI."""
    if sources is None:
        return None
    if streamed:
        return [source.model_dump(mode="json") for source in sources]
    return [
        source.model_dump(mode="json", exclude={"uri"}) | {"content": source_digest(source.uri, source.format)}
        for source in sources
    ]


def _tokenizer_folder(recipe: Recipe) -> Path:
    taken_over = recipe.pretrain.tokenizer if recipe.pretrain is not None else None
    uri = taken_over if isinstance(taken_over, str) else recipe.model
    assert uri is not None, "the schema asks for a model or a tokenizer"
    return locate(uri)


def settings_for(recipe: Recipe, rows: RecipeRows) -> TaskSettings:
    """What the recipe and its rows say to the task."""
    template = _template_path(recipe.data).read_text(encoding="utf-8") if recipe.data.chat_template else None
    return TaskSettings(recipe.data.max_length, template, rows.labels)


def tokenizer_for(recipe: Recipe, rows: RecipeRows) -> Any:
    """The model's tokenizer, the one that the recipe takes over, or one trained on the pretraining text."""
    wanted = recipe.pretrain.tokenizer if recipe.pretrain is not None else None
    if isinstance(wanted, Tokenizer):
        return train_tokenizer((kept.row["text"] for kept in rows.pretrain), wanted.train, wanted.vocab_size)
    return load_tokenizer(_tokenizer_folder(recipe))


def _template_path(data: Data) -> Path:
    path = Path(str(data.chat_template))
    if not path.is_file():
        raise RecipeError(
            "the chat template does not exist", got=path, expected="a Jinja file", where="data.chat_template"
        )
    return path


def _encoded(recipe: Recipe, run: Run, rows: RecipeRows, tokenizer: Any, work: Path) -> dict[str, Examples]:
    """The examples of every corpus that the recipe has rows for."""
    own, window = settings_for(recipe, rows), TaskSettings(recipe.data.max_length)
    wanted: list[tuple[str, RowSet, str, TaskSettings]] = []
    if len(rows.train) or len(rows.held_out):
        wanted += [("train", rows.train, recipe.task, own), ("eval", rows.held_out, recipe.task, own)]
    if len(rows.general):
        wanted.append(("general", rows.general, "text", window))
    if recipe.pretrain is not None and pretraining_corpora(recipe)[0] not in [name for name, *_ in wanted]:
        window = TaskSettings(recipe.pretrain.max_length or recipe.data.max_length)
        wanted += [("pretrain", rows.pretrain, "text", window)]
        wanted += [("pretrain-eval", rows.pretrain_held_out, "text", window)]
    corpora = []
    for name, chosen, task_name, settings in wanted:
        weighed = name in ("train", "pretrain", "general")  # what is held out is there once
        augment = recipe.data.augment if name == "train" else ()
        folder = run.folder("preprocess") / "tokenizer"
        how = Encoding(task_name, folder, settings, weighed, augment, recipe.seed)
        corpora.append(Wanted(name, chosen, how, catalog.resolve("task", task_name)(tokenizer, settings)))
    parts, sources = encode_all(run, corpora, work / "examples", workers_of(recipe.data))
    return {each.name: Examples(each.task, parts[each.name], sources[each.name]) for each in corpora}


def refuse_too_long(recipe: Recipe, tokenizer: Any, examples: dict[str, Examples]) -> None:
    """Raises RecipeError when an example is longer than the recipe's model can take; from scratch, pretrain checks it."""
    if recipe.model is None:
        return
    reach = longest_input(load_config(locate(recipe.model)), tokenizer)
    for name, made in examples.items():
        column = made.task.size_column
        longest = max((int(part.lengths(column).max(initial=0)) for part in made.parts), default=0)
        if reach is not None and longest > reach:
            raise RecipeError(
                f"an example of `{name}` is longer than the model can take",
                got=f"{longest} tokens",
                expected=f"at most {reach}",
                hint=f"set data.max_length to {reach} or less: the rest is cut off, and counted",
                where="data.max_length",
            )


def _rejected(rows: RecipeRows, examples: dict[str, Examples]) -> dict[str, list[Any]]:
    """The reasons why rows cannot be used, each with its count and the first place."""
    found = {reason: list(entry) for reason, entry in rows.rejected.items()}
    for made in examples.values():
        for part in made.parts:
            for reason, (count, where) in part.meta["rejected"].items():
                found.setdefault(reason, [0, where])[0] += count
    return found


def _write_rejected(path: Path, parts: Sequence[Path]) -> None:
    aside = path.with_name(f".{path.name}")
    with aside.open("wb") as file:
        for part in parts:
            with part.open("rb") as lines:
                shutil.copyfileobj(lines, file)
    aside.replace(path)


def _refuse_too_many(rejected: dict[str, list[Any]], read: int, data: Data, path: Path) -> None:
    total = sum(count for count, _ in rejected.values())
    allowed = count_of(data.max_rejected, read)
    if total <= allowed:
        return
    most = sorted(rejected.items(), key=lambda entry: -entry[1][0])
    shown = "; ".join(f"{count} x {reason} ({where})" for reason, (count, where) in most[:5])
    raise DataError(
        f"{total} of {read} rows cannot be used",
        got=shown + ("; ..." if len(most) > 5 else ""),
        expected=f"at most {allowed} (data.max_rejected: {data.max_rejected})",
        hint=f"all of them are named in {path}; mend them, or raise data.max_rejected",
        where=next(iter(rejected.values()))[1],
    )


def _flat(statistics: dict[str, Any]) -> dict[str, Any]:
    """The figures that a script wants."""
    flat = {key: statistics[key] for key in ("rows_read", "rows_rejected")}
    for name, entry in statistics["corpora"].items():
        flat |= {f"{name.replace('-', '_')}_{key}": entry[key] for key in ("examples", "tokens")}
    return flat
