"""What users get wrong: the right exit code, no traceback, and a message that names the culprit and the way out.

Mistakes inside a recipe are in tests/recipe; here is what the command line, models, data and runs can have wrong.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli, Outcome, write_rows

QUICK = ("--set", "finetune.steps=2")


class Bench:
    """The good inputs, and a way to make a damaged copy of each."""

    def __init__(self, cli: Cli, llama: Path, bert: Path, chat: Path, labels: Path, folder: Path) -> None:
        self._cli = cli
        self.llama, self.bert, self.chat, self.labels, self.folder = llama, bert, chat, labels, folder
        self.run = folder / "run"

    def finetune(self, *extra: object, model: object = None, data: object = None) -> Outcome:
        share = () if "--eval-data" in extra else ("--eval-data", "20%")
        options = ("-m", model or self.llama, "-d", data or self.chat, "-o", self.run, *QUICK, *share)
        return self._cli("finetune", *options, *extra)

    def llmkit(self, *arguments: object) -> Outcome:
        return self._cli(*arguments)

    def broken_model(self, damage: Callable[[Path], Any], of: Path | None = None) -> Path:
        copy = self.folder / "broken-model"
        shutil.copytree(of or self.llama, copy)
        damage(copy)
        return copy

    def changed_data(self, change: Callable[[list[str]], list[str]], name: str = "changed.jsonl") -> Path:
        path = self.folder / name
        path.write_text("".join(change(self.chat.read_text().splitlines(keepends=True))))
        return path

    def rows(self, *rows: Any) -> Path:
        return write_rows(self.folder / "rows.jsonl", rows)


@pytest.fixture
def bench(cli: Cli, tiny_llama: Path, tiny_bert: Path, chat_rows: Path, label_rows: Path, tmp_path: Path) -> Bench:
    return Bench(cli, tiny_llama, tiny_bert, chat_rows, label_rows, tmp_path)


def refused(outcome: Outcome, code: int, *needles: object) -> None:
    """The code, no traceback, no log of a bug, and every needle in the message."""
    said = outcome.out + outcome.err
    assert outcome.code == code, said
    assert "Traceback" not in said
    assert not Path("error.log").exists()
    assert "error:" in outcome.err
    missing = [str(needle) for needle in needles if str(needle) not in outcome.err]
    assert not missing, f"{missing} not in:\n{outcome.err}"


def with_line(number: int, text: str) -> Callable[[list[str]], list[str]]:
    return lambda lines: [*lines[: number - 1], text + "\n", *lines[number:]]


USER_ONLY = json.dumps({"messages": [{"role": "user", "content": "hi"}]})

COMMAND_LINES: dict[str, tuple[Callable[[Bench], Outcome], int, tuple[str, ...]]] = {
    "unknown command": (lambda b: b.llmkit("fientune"), 2, ("fientune", "finetune")),
    "unknown option": (lambda b: b.llmkit("run", "--modle", "x"), 2, ("--modle", "--model")),
    "option without its value": (lambda b: b.llmkit("run", "r.yaml", "--seed"), 2, ("--seed",)),
    "seed that is no number": (lambda b: b.llmkit("run", "r.yaml", "--seed", "x"), 2, ("--seed", "integer")),
    "two recipes": (lambda b: b.llmkit("run", "a.yaml", "b.yaml"), 2, ("b.yaml",)),
    "nothing at all": (lambda b: b.llmkit("finetune"), 2, ("nothing to work on", "--model", "--data")),
    "model without data": (lambda b: b.llmkit("finetune", "-m", b.llama), 2, ("--data is missing",)),
    "data without model": (lambda b: b.llmkit("finetune", "-d", b.chat), 2, ("--model is missing",)),
    "freeze without what": (lambda b: b.llmkit("freeze", "-m", b.llama), 2, ("freeze.blocks",)),
    "--set without =": (lambda b: b.finetune("--set", "finetune.lr"), 2, ("KEY=VALUE", "finetune.lr")),
    "--set of an unknown key": (
        lambda b: b.finetune("--set", "finetune.stpes=3"),
        2,
        ("unknown key `finetune.stpes`", "did you mean `steps`?", "--set finetune.stpes=3"),
    ),
    "missing recipe": (lambda b: b.llmkit("run", "quickstrat.yaml"), 2, ("does not exist", "quickstrat.yaml")),
    "folder that is no run": (lambda b: b.llmkit("run", b.folder), 2, ("folder", "run.json")),
    "one key by two flags": (
        lambda b: b.finetune("--set", "data.eval=30%"),
        2,
        ("`data.eval` is given twice", "--eval-data 20%", "--set data.eval=30%"),
    ),
    "unknown task": (lambda b: b.finetune("-t", "chatt"), 2, ("--task chatt", "did you mean `chat`?")),
    "prompt that is empty": (lambda b: b.llmkit("generate", b.llama, " "), 2, ("prompt is empty",)),
    "--raw with a system message": (
        lambda b: b.llmkit("generate", b.llama, "x", "--raw", "--system", "y"),
        2,
        ("--raw",),
    ),
    "an answer of a classifier": (lambda b: b.llmkit("generate", b.bert, "x"), 2, ("does not write text", "BertModel")),
}


@pytest.mark.parametrize(("act", "code", "needles"), COMMAND_LINES.values(), ids=COMMAND_LINES)
def test_a_wrong_command_line(
    act: Callable[[Bench], Outcome], code: int, needles: tuple[str, ...], bench: Bench
) -> None:
    refused(act(bench), code, *needles)


NAMES: dict[str, tuple[str, tuple[str, ...]]] = {
    "filter": ("data.filters=[lenght]", ("`data.filters.0`", "did you mean `length`?")),
    "filter option": ("data.filters=[{length: {max_chrs: 3}}]", ("no option `max_chrs`", "did you mean `max_chars`?")),
    "filter option of a wrong type": ("data.filters=[{length: {max_chars: x}}]", ("max_chars", "'x'")),
    "optimizer": ("finetune.optimizer=adamm", ("did you mean `adamw`?",)),
    "optimizer option": ("finetune.optimizer.bettas=[0.9, 0.99]", ("no option `bettas`", "did you mean `betas`?")),
    "optimizer option out of range": ("finetune.optimizer.betas=[1, 2]", ("adamw", "beta")),
    "schedule": ("finetune.schedule=cosin", ("did you mean `cosine`?",)),
    "metric": ("evaluate.metrics=[loss, rogueL]", ("no metric `rogueL`", "did you mean `rougeL`?")),
    "tracker": ("finetune.trackers=[tensorbord]", ("unknown tracker `tensorbord`", "did you mean `tensorboard`?")),
    "export format": ("export.formats=[transformer]", ("did you mean `transformers`?",)),
    "stage": ("stages=[preprocess, finetnue]", ("`stages.1`", "did you mean `finetune`?")),
    "chat template": ("data.chat_template=nowhere.jinja", ("nowhere.jinja", "does not exist")),
}


@pytest.mark.parametrize(("setting", "needles"), NAMES.values(), ids=NAMES)
def test_an_unknown_name(setting: str, needles: tuple[str, ...], bench: Bench) -> None:
    refused(bench.finetune("--set", setting), 2, *needles)


def damage_weights(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 100)


def damage_header(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(b"\xff" * 64)


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def other_architecture(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llamma"}')


MODELS: dict[str, tuple[Callable[[Path], Any], int, tuple[str, ...]]] = {
    "weights cut short": (damage_weights, 4, ("model.safetensors", "cut short", "bytes")),
    "weights with a damaged header": (damage_header, 4, ("model.safetensors", "damaged")),
    "weights only as a pickle": (pickle_only, 4, ("pytorch_model.bin", "safetensors")),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), 4, ("no weights", "model.safetensors")),
    "no config": (lambda f: (f / "config.json").unlink(), 4, ("does not hold a model", "config.json")),
    "config that is not JSON": (lambda f: (f / "config.json").write_text('{"a":'), 4, ("config.json", "damaged")),
    "unknown architecture": (other_architecture, 4, ("llamma",)),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), 4, ("no tokenizer", "tokenizer.json")),
    "damaged tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), 4, ("tokenizer.json", "damaged")),
    "no chat template": (lambda f: (f / "chat_template.jinja").unlink(), 2, ("no chat template", "data.chat_template")),
    "template without an end of answers": (
        lambda f: (f / "chat_template.jinja").write_text(
            "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}"
        ),
        3,
        ("does not end an answer", "data.chat_template"),
    ),
    "template without a place for answers": (
        lambda f: (f / "chat_template.jinja").write_text(
            "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
        ),
        3,
        ("does not show where the answer starts", "data.chat_template"),
    ),
    "template that changes answers": (
        lambda f: (f / "chat_template.jinja").write_text(
            "{% for m in messages %}{{ m['content'] | upper + '<|im_end|>' }}{% endfor %}"
        ),
        3,
        ("does not render the answer as it was written",),
    ),
    "template that is not Jinja": (
        lambda f: (f / "chat_template.jinja").write_text("{% for m in messages %}{{ m"),
        3,
        ("chat template", "unexpected end"),
    ),
}


@pytest.mark.parametrize(("damage", "code", "needles"), MODELS.values(), ids=MODELS)
def test_a_model_that_cannot_be_used(
    damage: Callable[[Path], Any], code: int, needles: tuple[str, ...], bench: Bench
) -> None:
    refused(bench.finetune(model=bench.broken_model(damage)), code, *needles)


@pytest.mark.parametrize(
    ("uri", "needles"),
    [
        ("no-such-model", ("no-such-model", "pkg://PACKAGE/path")),
        ("no-owner/no-name", ("no-owner/no-name", "hub")),
        ("pkg://no_such_package/model", ("no_such_package", "pip install")),
        ("pkg://json/model", ("`json` has no `model`",)),
        ("pkg://json/../../etc", ("leads out of its package",)),
    ],
)
def test_a_model_that_is_not_there(uri: str, needles: tuple[str, ...], bench: Bench) -> None:
    refused(bench.finetune(model=uri), 4, *needles)


def test_a_misspelt_model_names_the_near_one(bench: Bench) -> None:
    shutil.copytree(bench.llama, bench.folder / "my-model")
    refused(bench.finetune(model=bench.folder / "my-modle"), 4, "did you mean `my-model`?")


def test_a_file_is_no_model(bench: Bench) -> None:
    refused(bench.finetune(model=bench.chat), 4, "folder or a .gguf file", bench.chat)


def test_a_run_without_a_model_is_none_either(bench: Bench) -> None:
    assert bench.llmkit("freeze", "-m", bench.llama, "-o", bench.run, "--set", "freeze.blocks=0").code == 0
    refused(bench.llmkit("generate", bench.run, "hi"), 4, "no model yet")


def test_missing_data_names_the_near_file(bench: Bench) -> None:
    refused(bench.finetune(data=bench.folder / "chatt.jsonl"), 3, "missing", "did you mean `chat.jsonl`?")


def test_empty_data(bench: Bench) -> None:
    refused(bench.finetune(data=bench.changed_data(lambda lines: [])), 3, "no rows", "changed.jsonl")


def test_data_that_is_not_utf8(bench: Bench) -> None:
    path = bench.folder / "latin.jsonl"
    path.write_bytes(bench.chat.read_text().replace("stone", "stöne").encode("latin-1"))
    refused(bench.finetune(data=path), 3, "not valid UTF-8", f"{path}:", "byte 0xf6")


def test_data_that_is_cut_short(bench: Bench) -> None:
    data = bench.changed_data(lambda lines: [*lines[:-1], lines[-1][:-20]])
    refused(bench.finetune(data=data), 3, f"{data}:60", "invalid JSON")


@pytest.mark.parametrize("cut", [True, False], ids=["cut short", "not compressed at all"])
def test_compressed_data_that_is_damaged(cut: bool, bench: Bench) -> None:
    path = bench.folder / "rows.jsonl.gz"
    raw = bench.chat.read_bytes()
    path.write_bytes(gzip.compress(raw)[:-50] if cut else raw)
    refused(bench.finetune(data=path), 3, path.name, "compressed")


def test_json_error_names_its_line_and_rejected_jsonl_has_it(bench: Bench) -> None:
    data = bench.changed_data(with_line(8, '{"messages": [}'))
    refused(bench.finetune(data=data), 3, "1 of 60 rows", f"{data}:8", "invalid JSON", "rejected.jsonl", "max_rejected")
    (rejected,) = (bench.run / "preprocess" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(rejected) == {"source": str(data), "line": 8, "reason": json.loads(rejected)["reason"]}


def test_a_conversation_without_an_answer(bench: Bench) -> None:
    data = bench.changed_data(with_line(11, USER_ONLY))
    refused(bench.finetune(data=data), 3, f"{data}:11", "no assistant turn")
    allowed = bench.finetune("--set", "data.max_rejected=1", data=data)
    assert allowed.code == 0
    assert "rejected.jsonl" in allowed.err


def test_rows_that_are_all_unusable(bench: Bench) -> None:
    data = bench.changed_data(lambda lines: [USER_ONLY + "\n"] * 5)
    refused(bench.finetune(data=data), 3, "no row of `data.train`", f"{data}:1", "no assistant turn")


def test_rows_that_a_filter_takes_all(bench: Bench) -> None:
    refused(bench.finetune("--set", "data.filters=[{length: {max_chars: 3}}]"), 3, "no row", "filter length")


def test_rows_without_a_known_column(bench: Bench) -> None:
    data = bench.rows({"a": 1, "b": "x"})
    refused(bench.finetune(data=data), 3, "which task", "`a`, `b`", "--task")
    refused(bench.finetune("-t", "chat", data=data), 3, "`a`, `b`", "data.columns")
    refused(bench.finetune("-t", "chat", "--set", "data.columns={messages: mesages}"), 3, "no column `mesages`")


def test_a_row_without_the_needed_column(bench: Bench) -> None:
    data = bench.changed_data(with_line(5, '{"text": "hello"}'))
    refused(bench.finetune(data=data), 3, f"{data}:5", "column `messages` is missing")


def test_rows_that_are_not_objects(bench: Bench) -> None:
    refused(bench.finetune("-t", "chat", data=bench.rows([1, 2], [3])), 3, "rows.jsonl:1", "a list, not an object")


def test_data_of_another_task(bench: Bench) -> None:
    refused(bench.finetune("-t", "classify"), 3, "`messages`", "text_label")


def test_a_file_of_an_unknown_kind(bench: Bench) -> None:
    (bench.folder / "rows.xlsx").write_bytes(b"PK\x03\x04")
    refused(bench.finetune(data=bench.folder / "rows.xlsx"), 3, "rows.xlsx", ".jsonl")


def test_an_unknown_builtin(bench: Bench) -> None:
    refused(bench.finetune(data="builtin:docstring"), 2, "did you mean `docstrings`?")


def test_labels_that_training_never_saw(bench: Bench) -> None:
    held_out = bench.rows({"text": "apple", "label": "a"}, {"text": "river", "label": "zzz"})
    done = bench.finetune("--eval-data", held_out, model=bench.bert, data=bench.labels)
    refused(done, 3, f"{held_out}:2", "zzz", "one of a, b, c")


def test_one_label_only(bench: Bench) -> None:
    data = bench.rows(*({"text": f"text {i}", "label": "a"} for i in range(20)))
    done = bench.finetune(model=bench.bert, data=data)
    refused(done, 3, "two labels", "got      a")


def test_examples_longer_than_the_model_takes(bench: Bench) -> None:
    words = " ".join(["apple"] * 300)
    turns = [{"role": "user", "content": words}, {"role": "assistant", "content": "yes"}]
    data = bench.changed_data(with_line(3, json.dumps({"messages": turns})))
    refused(bench.finetune(data=data), 2, "longer than the model can take", "at most 256", "data.max_length")


def test_answers_that_are_all_cut_off(bench: Bench) -> None:
    refused(bench.finetune("--set", "data.max_length=5"), 3, "no answer within the first 5 tokens", "data.max_length")


@pytest.mark.parametrize(
    ("setting", "needles"),
    [
        ("freeze.blocks=7", ("no block 7", "2 blocks, 0 to 1")),
        ("freeze.blocks=1-0", ("backwards",)),
        ("freeze.blocks=sum", ("freeze.blocks", "sum", "all but the last 4")),
        ("freeze.patterns=[nothing.*]", ("matches no parameter", "nothing.*", "model.embed_tokens.weight")),
        ("freeze.patterns=['re:(']", ("re:(",)),
        ("freeze={blocks: all, embeddings: true, head: true, norms: true}", ("everything would be frozen",)),
    ],
)
def test_freezing_that_cannot_be(setting: str, needles: tuple[str, ...], bench: Bench) -> None:
    refused(bench.finetune("--set", setting), 2, *needles)


def test_a_run_of_another_recipe(bench: Bench) -> None:
    assert bench.llmkit("preprocess", "-m", bench.llama, "-d", bench.chat, "-o", bench.run).code == 0
    recipe = bench.folder / "other.yaml"
    recipe.write_text(f"name: other\ntask: chat\nmodel: {bench.llama}\ndata: {{train: {bench.chat}}}\n")
    for extra in ((), ("--dry-run",)):
        refused(bench.llmkit("run", recipe, "-o", bench.run, *extra), 2, "another recipe", "`other`", "`run`", "-o")


def test_an_out_folder_with_other_things(bench: Bench) -> None:
    bench.run.mkdir()
    (bench.run / "thesis.txt").write_text("x")
    refused(bench.finetune(), 2, "not a run directory", bench.run, "-o")
    assert [item.name for item in bench.run.iterdir()] == ["thesis.txt"]


def test_an_out_that_is_a_file(bench: Bench) -> None:
    bench.run.write_text("x")
    refused(bench.finetune(), 2, "is a file", bench.run)


def test_an_out_that_cannot_be_written(bench: Bench) -> None:
    (bench.folder / "file").write_text("x")
    bench.run = bench.folder / "file" / "run"
    refused(bench.finetune(), 5, "cannot be written", bench.run)


def test_a_run_record_that_is_damaged(bench: Bench) -> None:
    bench.run.mkdir()
    (bench.run / "run.json").write_text('{"name":')
    refused(bench.finetune(), 4, "damaged", bench.run / "run.json")


def test_training_that_diverges(bench: Bench) -> None:
    refused(bench.finetune("--set", "finetune.lr=1e30", "--set", "finetune.steps=5"), 6, "not a finite number", "lower")


def test_a_mistake_in_the_recipe_does_not_wait_for_training(bench: Bench) -> None:
    recipe = bench.folder / "recipe.yaml"
    text = f"name: late\ntask: chat\nmodel: {bench.llama}\ndata: {{train: {bench.chat}, eval: 20%}}\n"
    recipe.write_text(text + "evaluate: {metrics: [f1]}\nfinetune: {steps: 2}\n")
    for command in (("run", recipe), ("run", recipe, "--dry-run")):
        refused(bench.llmkit(*command, "-o", bench.run), 2, "no metric `f1`")
        assert not bench.run.exists()


def test_mistakes_of_several_stages_are_told_at_once(bench: Bench) -> None:
    wrong = ("evaluate.metrics=[f1]", "finetune.optimizer.bettas=[1]", "data.filters=[{length: {max_chrs: 3}}]")
    options = [word for setting in wrong for word in ("--set", setting)]
    done = bench.llmkit("run", "-m", bench.llama, "-d", bench.chat, "-o", bench.run, *options)
    refused(done, 2, "3 mistakes", "`f1`", "did you mean `betas`?", "did you mean `max_chars`?")


def test_a_freeze_rule_that_matches_nothing_does_not_wait_for_pretraining(bench: Bench) -> None:
    recipe = bench.folder / "recipe.yaml"
    text = f"name: late\ntask: chat\nmodel: {bench.llama}\ndata: {{train: {bench.chat}}}\n"
    recipe.write_text(text + f"pretrain: {{data: {bench.labels}, steps: 2}}\nfreeze: {{blocks: 0-7}}\n")
    refused(bench.llmkit("run", recipe, "-o", bench.run), 2, "no block", "2 blocks, 0 to 1")
    assert not bench.run.exists()


def test_a_bug_is_called_one_and_its_traceback_is_kept(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("llmkit.stages.preprocess.settings_for", broken)
    done = bench.finetune("--json")
    assert done.code == 1
    assert done.json["kind"] == "error"
    assert "ZeroDivisionError: oops" in done.json["got"]
    assert "ZeroDivisionError: oops" in (bench.run / "error.log").read_text()
