"""From YAML and overrides to a Recipe: what is accepted, and how mistakes are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from llmkit.errors import LlmkitError, Problem, RecipeError, UsageError
from llmkit.recipe.load import Override, dump_recipe, load_recipe, parse_set
from llmkit.recipe.schema import Recipe, result_keys

RECIPE = """\
name: tiny
task: chat
model: owner/name
data:
  train: rows.jsonl
freeze: {blocks: 0-3}
finetune:
  lr: 1e-4
  optimizer: sgd
"""


def write(folder: Path, text: str = RECIPE) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(path: Path, *settings: str) -> tuple[Problem, ...]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, [parse_set(text) for text in settings])
    return caught.value.problems


def test_numbers_are_read_as_people_write_them(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, RECIPE + "  weight_decay: 1e-2\n  warmup: 5\n"))
    assert recipe.finetune.lr == 1e-4
    assert recipe.finetune.weight_decay == 0.01
    assert recipe.finetune.warmup == 5


def test_words_such_as_no_and_on_stay_words(tmp_path: Path) -> None:
    text = RECIPE.replace("train: rows.jsonl", "train: {uri: on, columns: {text: yes, label: no}}")
    source = (load_recipe(write(tmp_path, text)).data.train or ())[0]
    assert (source.uri, source.columns) == ("on", {"text": "yes", "label": "no"})


def test_short_forms_mean_the_long_ones(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path))
    assert [source.uri for source in recipe.data.train or ()] == ["rows.jsonl"]
    assert recipe.finetune.optimizer.name == "sgd"
    listed = load_recipe(write(tmp_path, RECIPE.replace("rows.jsonl", "[a.jsonl, {uri: b.jsonl, weight: 2}]")))
    assert [(s.uri, s.weight) for s in listed.data.train or ()] == [("a.jsonl", 1.0), ("b.jsonl", 2.0)]


def test_stages_that_the_recipe_has_nothing_for_are_left_out(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path)).plan == ("preprocess", "freeze", "finetune", "evaluate", "export")


def test_what_is_dumped_loads_as_the_same_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path), [parse_set("data.filters=[duplicates]")])
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(again).model_dump() == recipe.model_dump() | {"stages": recipe.plan}


def test_paths_that_exist_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    recipe = load_recipe(write(tmp_path))
    assert (recipe.data.train or ())[0].uri == str(tmp_path / "rows.jsonl")
    assert recipe.model == "owner/name"


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("seed=3", "seed", 3),
        ("finetune.lr=5e-5", "finetune.lr", 5e-5),
        ("data.eval=null", "data.eval", None),
        ("freeze.patterns=[a.*, b]", "freeze.patterns", ["a.*", "b"]),
        ("model=a=b", "model", "a=b"),
        ("name=", "name", None),
    ],
)
def test_set_reads_its_value_as_yaml(text: str, key: str, value: Any) -> None:
    assert parse_set(text) == Override(key, value, f"--set {text}")


@pytest.mark.parametrize("text", ["seed", "=3", "a..b=1", ".a=1", "a=[1", "a=*x"])
def test_set_that_cannot_be_read_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_set(text)
    assert text in str(caught.value.got)
    assert "\n" not in str(caught.value.expected)


@pytest.mark.parametrize(
    ("setting", "get", "value"),
    [
        ("finetune.optimizer.momentum=0.5", lambda r: (r.finetune.optimizer.name, r.finetune.optimizer.options), ...),
        ("data.train.0.weight=2", lambda r: [(s.uri, s.weight) for s in r.data.train], [("rows.jsonl", 2.0)]),
        ("data.train.weight=2", lambda r: [(s.uri, s.weight) for s in r.data.train], [("rows.jsonl", 2.0)]),
        ("evaluate.samples=1", lambda r: r.evaluate.samples, 1),
    ],
)
def test_set_reaches_into_short_forms(setting: str, get: Any, value: Any, tmp_path: Path) -> None:
    expected = ("sgd", {"momentum": 0.5}) if value is ... else value
    assert get(load_recipe(write(tmp_path), [parse_set(setting)])) == expected


def test_set_reaches_into_a_list_of_plain_uris(tmp_path: Path) -> None:
    path = write(tmp_path, RECIPE.replace("rows.jsonl", "[a.jsonl, b.jsonl]"))
    recipe = load_recipe(path, [parse_set("data.train.1.weight=3")])
    assert [(s.uri, s.weight) for s in recipe.data.train or ()] == [("a.jsonl", 1.0), ("b.jsonl", 3.0)]


def test_set_beyond_a_list_names_the_numbers_there_are(tmp_path: Path) -> None:
    path = write(tmp_path, RECIPE.replace("rows.jsonl", "[a.jsonl, b.jsonl]"))
    with pytest.raises(UsageError, match="no item `7`") as caught:
        load_recipe(path, [parse_set("data.train.7.weight=3")])
    assert caught.value.expected == "a number from 0 to 1"


def test_a_misspelt_key_is_told_with_its_line_and_the_nearest_key(tmp_path: Path) -> None:
    path = write(tmp_path, RECIPE.replace("  lr:", "  leaning_rate: 1\n  l_r:").replace("blocks", "block"))
    found = problems(path)
    assert [(p.what, p.where) for p in found] == [
        ("unknown key `freeze.block`", f"{path}:6"),
        ("unknown key `finetune.leaning_rate`", f"{path}:8"),
        ("unknown key `finetune.l_r`", f"{path}:9"),
    ]
    assert found[0].hint == "did you mean `blocks`?"
    assert "lr_scale" in (found[1].expected or "")


@pytest.mark.parametrize(
    ("setting", "key", "got", "expected", "hint"),
    [
        ("seed=many", "seed", "'many'", "a whole number", None),
        ("seed=-1", "seed", "-1", "a number from 0 up", None),
        ("name=2024", "name", "2024", "text", 'put it in quotes: "2024"'),
        ("name=my run", "name", "'my run'", "letters, digits", None),
        ("task=chatt", "task", "'chatt'", "text, chat, classify", "did you mean `chat`?"),
        ("stages=[preproces]", "stages.0", "'preproces'", "one of preprocess", "did you mean `preprocess`?"),
        ("stages=[export, freeze]", "stages", "[", "in this order", None),
        ("data.max_length=lots", "data.max_length", "'lots'", "a whole number", None),
        ("data.max_rejected=-1", "data.max_rejected", "-1", "a share", None),
        ("data.eval=100%", "data.eval", "'100%'", "below 100%", None),
        ("data.eval=0.05", "data.eval", "0.05", "`5%`", None),
        ("freeze.blocks=[0, 1]", "freeze.blocks", "[0, 1]", "`0-3,8`", None),
        ("data.filters=[lenght]", "data.filters.0", "'lenght'", "length", "did you mean `length`?"),
        ("data.format=aplaca", "data.format", "'aplaca'", "one of", "did you mean `alpaca`?"),
        ("data.columns={text:foo}", "data.columns.text:foo", "nothing", "text", "a space after the colon"),
        ("data.train=[{weight: 2}]", "data.train.0.uri", None, "a value for it", None),
        ("finetune=null", "finetune", "nothing", "a mapping", "leave the key out"),
        ("finetune.lr=fast", "finetune.lr", "'fast'", "a number above 0 such as `2e-5`, or `auto`", None),
        ("finetune.lr=0", "finetune.lr", "0", "a number above 0", None),
        ("finetune.steps=-4", "finetune.steps", "-4", "a number above 0", None),
        ("finetune.warmup=300%", "finetune.warmup", "'300%'", "from 0% to 100%", None),
        ("finetune.save_every=10 parsecs", "finetune.save_every", "parsecs", "10min", None),
        ("finetune.optimizer=adamm", "finetune.optimizer", "'adamm'", "adamw, sgd", "did you mean `adamw`?"),
        ("finetune.schedule=cosin", "finetune.schedule", "'cosin'", "cosine", "did you mean `cosine`?"),
        ("finetune.precision=bf61", "finetune.precision", "'bf61'", "`bf16` or", "did you mean `bf16`?"),
        ("finetune.early_stopping=true", "finetune.early_stopping", "true", "a mapping", None),
        ("export.formats=[transformer]", "export.formats.0", "'transformer'", "transformers", "`transformers`?"),
        ("evaluate.metrics=accuracy", "evaluate.metrics", "'accuracy'", "`auto`, or a list", None),
        ("freeze.embeddings=perhaps", "freeze.embeddings", "'perhaps'", "true or false", None),
    ],
)
def test_a_wrong_value_says_what_was_got_and_expected(
    setting: str, key: str, got: str | None, expected: str, hint: str | None, tmp_path: Path
) -> None:
    (found,) = problems(write(tmp_path), setting)
    assert f"`{key}`" in found.what
    assert found.where == f"--set {setting}"
    assert (got or "") in (found.got or "")
    assert expected in (found.expected or "")
    assert (hint or "") in (found.hint or "")
    assert bool(found.hint) is bool(hint)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["model=null"], "the recipe needs `model`"),
        (["finetune.steps=2", "finetune.epochs=1"], "`finetune` takes `epochs` or `steps`, not both"),
        (["freeze={}"], "`freeze` freezes nothing"),
        (["stages=[pretrain, finetune]"], "the recipe has the stage `pretrain`, but no `pretrain:` section"),
        (["freeze=null", "stages=[freeze, finetune]"], "the recipe has the stage `freeze`, but no `freeze:` section"),
        (["pretrain={architecture: {model_type: gpt2}, tokenizer: x}"], "takes `model` or `pretrain.architecture`"),
        (["model=null", "pretrain={architecture: {model_type: gpt2}}"], "needs `pretrain.tokenizer`"),
        (["data.train=null"], "needs `data.train`"),
        (["data.eval=null"], "has the stage `evaluate`, but `data.eval` is null"),
        (["finetune.early_stopping={}"], "`early_stopping` needs `eval_every`"),
    ],
)
def test_keys_that_contradict_each_other(settings: list[str], sentence: str, tmp_path: Path) -> None:
    (found,) = problems(write(tmp_path), *settings)
    assert sentence in found.what


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, RECIPE.replace("task: chat", "task: chatt\nsede: 1") + "  steps: many\n")
    with pytest.raises(RecipeError, match="the recipe has 3 mistakes") as caught:
        load_recipe(path)
    assert {p.where for p in caught.value.problems} == {f"{path}:2", f"{path}:3", f"{path}:11"}


def test_contradictions_are_told_together(tmp_path: Path) -> None:
    found = problems(write(tmp_path), "model=null", "data.eval=null", "data.train=null")
    assert [p.what.split(",")[0] for p in found] == [
        "the recipe needs `model`",
        "the recipe needs `data.train`",
    ]
    assert all(str(tmp_path) in str(p.where) for p in found)


def test_a_union_is_told_once_and_by_the_branch_that_got_further(tmp_path: Path) -> None:
    found = problems(write(tmp_path), "pretrain={tokenizer: {train: bpe, vocab_size: 3}}")
    assert [(p.what, p.expected) for p in found] == [
        ("`pretrain.tokenizer.vocab_size` has a wrong value", "a number from 300 up")
    ]


@pytest.mark.parametrize(
    ("text", "kind", "needles"),
    [
        ("", RecipeError, ("is empty",)),
        ("# nothing\n", RecipeError, ("is empty",)),
        ("hello", RecipeError, ("not a mapping", "'hello'")),
        ("- a\n", RecipeError, ("not a mapping", "a list")),
        (RECIPE + "name: again\n", RecipeError, ("`name` stands twice", "lines 1 and 10", "recipe.yaml:10")),
        (RECIPE + "  lr: 2\n", RecipeError, ("`finetune.lr` stands twice", "lines 8 and 10")),
        (RECIPE + "x: [1, 2\ny: 2\n", RecipeError, ("not YAML", "recipe.yaml:11", "line 10")),
        (RECIPE + "x:\n\ty: 1\n", RecipeError, ("not YAML", "recipe.yaml:11", "no tabs")),
        (RECIPE + "x: !!python/object/apply:os.system [ls]\n", RecipeError, ("not YAML", "recipe.yaml:10")),
        (RECIPE + "x: !!int many\n", RecipeError, ("not YAML",)),
        (RECIPE + "x: *nowhere\n", RecipeError, ("not YAML", "nowhere", "recipe.yaml:10")),
        (RECIPE + "[a, b]: 2\n", RecipeError, ("a key is not text", "recipe.yaml:10")),
        (RECIPE + "1: 2\n", RecipeError, ("`1`", "recipe.yaml:10")),
        (RECIPE + "---\nname: x\n", RecipeError, ("not YAML", "recipe.yaml:10")),
    ],
)
def test_a_file_that_is_not_a_recipe(
    text: str, kind: type[LlmkitError], needles: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises(kind) as caught:
        load_recipe(write(tmp_path, text))
    said = " ".join(str(part) for part in (*vars(caught.value.problems[0]).values(), caught.value.what))
    assert all(needle in said for needle in needles), said


def test_a_recipe_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(RECIPE.replace("tiny", "tïny").encode("latin-1"))
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(path)


def test_a_missing_recipe_names_the_nearest_one(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(UsageError) as caught:
        load_recipe(tmp_path / "recipy.yaml")
    assert caught.value.hint == "did you mean `recipe.yaml`?"


def test_a_folder_is_no_recipe_but_names_those_inside(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(UsageError, match="folder") as caught:
        load_recipe(tmp_path)
    assert "recipe.yaml" in str(caught.value.hint)


def test_every_key_of_the_schema_that_changes_no_result_is_left_out_of_it() -> None:
    found = result_keys(Recipe(name="a", task="text", model="m", data={"train": "x"}).finetune)  # type: ignore[arg-type]
    assert {"lr", "schedule", "warmup", "keep", "weight_decay"} <= set(found)
    assert not [key for key, value in found.items() if value is None], "what is absent is no input"
    assert not {"log_every", "save_every", "keep_checkpoints", "trackers"} & set(found)


def test_a_recipe_is_immutable(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path))
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3


def test_dumped_yaml_is_plain(tmp_path: Path) -> None:
    values = yaml.safe_load(dump_recipe(load_recipe(write(tmp_path))))
    assert values["finetune"]["optimizer"] == {"name": "sgd"}
    assert values["freeze"]["blocks"] == "0-3"
