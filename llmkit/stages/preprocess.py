"""preprocess: rows to corpora, with everything that was left out counted and named."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmkit import catalog
from llmkit.data.corpus import Corpus, CorpusWriter
from llmkit.data.gather import Kept
from llmkit.data.sources import Rejected, source_digest
from llmkit.data.split import copies
from llmkit.data.tokenizer import train_tokenizer
from llmkit.errors import DataError, RecipeError
from llmkit.files import digest_file, digest_json, write_atomically, write_json
from llmkit.model.folder import tokenizer_digest
from llmkit.model.loading import load_config, load_tokenizer, longest_input
from llmkit.model.location import locate
from llmkit.recipe.fields import Source
from llmkit.recipe.schema import Data, Recipe
from llmkit.recipe.training import Tokenizer
from llmkit.recipe.values import count_of, is_share
from llmkit.run.directory import Artifact, Run
from llmkit.stages.base import pretraining_corpora, relative_files, task_class
from llmkit.stages.rows import RecipeRows, encode_rows
from llmkit.stages.statistics import corpus_statistics, show_statistics
from llmkit.tasks.base import Encoded, Task, TaskSettings


class Preprocess:
    """Reads, recognises, filters, splits, renders and tokenises the rows of a recipe."""

    name = "preprocess"
    version = 1
    trains = False
    resumes = False
    distributed = False

    def needs(self, recipe: Recipe) -> tuple[str, ...]:
        """Nothing."""
        return ()

    def inputs(self, recipe: Recipe, run: Run) -> dict[str, Any]:
        """The content of every source, of the tokenizer and of the template, and the keys that say what to do with them."""
        data, pretrain = recipe.data, recipe.pretrain
        found: dict[str, Any] = {"recipe.task": recipe.task}
        for key, value in data.model_dump(
            mode="json", exclude={"train", "eval", "chat_template", "replay", "general"}
        ).items():
            found[f"recipe.data.{key}"] = value
        for key in ("train", "replay", "general"):
            found[f"data.{key}"] = _digests(getattr(data, key))
        found["data.eval"] = data.eval if data.eval is None or is_share(data.eval) else source_digest(data.eval)
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

        Raises DataError when more rows are unusable than `data.max_rejected` allows; rejected.jsonl then names them.
        """
        folder = run.folder(self.name)
        rows = RecipeRows(recipe, run)
        tokenizer = tokenizer_for(recipe, rows)
        tokenizer.save_pretrained(folder / "tokenizer")
        settings = settings_for(recipe, rows)
        corpora: dict[str, Corpus] = {}
        rejected = list(rows.rejected)
        if rows.train or rows.held_out:
            task = task_class(recipe)(tokenizer, settings)
            corpora["train"] = _write(run, folder / "train", task, settings, rows.train, rejected)
            corpora["eval"] = _write(run, folder / "eval", task, settings, rows.held_out, rejected)
        if rows.general:
            plain = TaskSettings(recipe.data.max_length)
            task = catalog.resolve("task", "text")(tokenizer, plain)
            corpora["general"] = _write(run, folder / "general", task, plain, rows.general, rejected)
        if recipe.pretrain is not None and pretraining_corpora(recipe)[0] not in corpora:
            window = TaskSettings(recipe.pretrain.max_length or recipe.data.max_length)
            text = catalog.resolve("task", "text")(tokenizer, window)
            corpora["pretrain"] = _write(run, folder / "pretrain", text, window, rows.pretrain, rejected)
            corpora["pretrain-eval"] = _write(
                run, folder / "pretrain-eval", text, window, rows.pretrain_held_out, rejected
            )
        _refuse_too_long(recipe, tokenizer, corpora)
        _write_rejected(folder / "rejected.jsonl", rejected + rows.filtered)
        _refuse_too_many(rejected, rows.read, recipe.data, folder / "rejected.jsonl")
        statistics = corpus_statistics(corpora, rows, rejected)
        write_json(folder / "statistics.json", statistics)
        show_statistics(run, corpora, statistics)
        content = digest_json({name: corpus.content for name, corpus in corpora.items()})
        facts = {"corpora": {name: corpus.content for name, corpus in corpora.items()}}
        return Artifact(self.name, folder, content, relative_files(run, folder), _flat(statistics), facts)


STAGE = Preprocess()


def _digests(sources: Sequence[Source] | None) -> list[dict[str, Any]] | None:
    """Sources by content: their URIs do not count."""
    if sources is None:
        return None
    return [
        source.model_dump(mode="json", exclude={"uri"}) | {"content": source_digest(source.uri)} for source in sources
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


def _write(
    run: Run, folder: Path, task: Task, settings: TaskSettings, rows: Sequence[Kept], rejected: list[Rejected]
) -> Corpus:
    """Encodes rows and writes them as a corpus."""
    writer = CorpusWriter(folder, task.columns)
    cut, lost, used = 0, 0, []
    progress = run.reporter.progress(f"encoding {folder.name}", len(rows), "rows")
    for kept, encoded in encode_rows(task, rows):
        progress.advance()
        if not isinstance(encoded, Encoded):
            rejected.append(Rejected(encoded, kept.where))
            continue
        weighed = folder.name.endswith("train") or folder.name == "general"  # what is held out is there once
        repeats = copies(kept.row, kept.weight) if weighed else 1
        for example in encoded.examples * repeats:
            writer.add(example)
        cut += encoded.lost_tokens > 0
        lost += encoded.lost_tokens
        used.append(kept)
    progress.close()
    tokenizer = tokenizer_digest(run.folder("preprocess") / "tokenizer")
    counts = {"rows": len(used), "rows_cut": cut, "tokens_cut": lost}
    identity = task.describe() | {"tokenizer": tokenizer}
    return writer.finish(
        {"settings": vars(settings) | {"labels": list(settings.labels)}, "identity": identity} | counts
    )


def _refuse_too_long(recipe: Recipe, tokenizer: Any, corpora: dict[str, Corpus]) -> None:
    """Raises RecipeError when an example is longer than the recipe's model can take; from scratch, pretrain checks it."""
    if recipe.model is None:
        return
    reach = longest_input(load_config(locate(recipe.model)), tokenizer)
    for name, corpus in corpora.items():
        longest = int(corpus.lengths(task_class(recipe).size_column).max(initial=0))
        if reach is not None and longest > reach:
            raise RecipeError(
                f"an example of `{name}` is longer than the model can take",
                got=f"{longest} tokens",
                expected=f"at most {reach}",
                hint=f"set data.max_length to {reach} or less: the rest is cut off, and counted",
                where="data.max_length",
            )


def _write_rejected(path: Path, rejected: Sequence[Rejected]) -> None:
    lines = ({"source": r.where.source, "line": r.where.line, "reason": r.reason} for r in rejected)
    write_atomically(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _refuse_too_many(rejected: Sequence[Rejected], read: int, data: Data, path: Path) -> None:
    allowed = count_of(data.max_rejected, read)
    if len(rejected) <= allowed:
        return
    first = {r.reason: r.where for r in reversed(rejected)}
    counts = Counter(r.reason for r in rejected).most_common(5)
    shown = "; ".join(f"{count} x {reason} ({first[reason]})" for reason, count in counts)
    raise DataError(
        f"{len(rejected)} of {read} rows cannot be used",
        got=shown + ("; ..." if len(first) > 5 else ""),
        expected=f"at most {allowed} (data.max_rejected: {data.max_rejected})",
        hint=f"all of them are named in {path}; mend them, or raise data.max_rejected",
        where=rejected[0].where,
    )


def _flat(statistics: dict[str, Any]) -> dict[str, Any]:
    """The figures that a script wants."""
    flat = {key: statistics[key] for key in ("rows_read", "rows_rejected")}
    for name, entry in statistics["corpora"].items():
        flat |= {f"{name.replace('-', '_')}_{key}": entry[key] for key in ("examples", "tokens")}
    return flat
