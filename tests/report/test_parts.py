"""The pieces of a page: the model's parts, examples, numbers, secrets, drawings."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from pages import read_page
from run_directories import RECIPE, freeze_plan, make_run, prediction, tensors
from safetensors.numpy import save_file

from llmkit.data.personal.masking import without_secrets
from llmkit.report.chart import draw
from llmkit.report.examples import clipped, example_section, without_common_parts
from llmkit.report.model_parts import LEARNS, MIXED, STILL, THAWS, model_parts, parameter_sizes, runs_of
from llmkit.report.page import report_html
from llmkit.report.record import read_record
from llmkit.report.words import bytes_, duration, interval, measure, number, short_count, signed


def plan_of(frozen: list[str], trainable: list[str], **more: object) -> dict[str, object]:
    return {"frozen": frozen, "trainable": trainable, "thaws": []} | more


def test_parts_of_a_model_in_order_with_their_states() -> None:
    sizes = {name: array.size for name, array in tensors().items()}
    parts = model_parts(freeze_plan(), sizes)
    assert [(part.name, part.state, part.parameters) for part in parts] == [
        ("bert.embeddings", STILL, 80),
        ("bert.encoder.layer.0", STILL, 16),
        ("bert.encoder.layer.1", STILL, 16),
        ("bert.encoder.layer.2", THAWS, 16),
        ("bert.encoder.layer.3", LEARNS, 16),
        ("classifier", LEARNS, 12),
    ]
    assert [row[0] for row in runs_of(parts)] == [
        "bert.embeddings",
        "blocks 0–1 (bert.encoder.layer)",
        "block 2 (bert.encoder.layer)",
        "block 3 (bert.encoder.layer)",
        "classifier",
    ]


def test_a_block_of_which_only_norms_learn_and_sizes_that_are_unknown() -> None:
    names = [f"model.layers.{n}.{part}.weight" for n in range(12) for part in ("mlp.experts.0.up", "norm")]
    plan = plan_of([n for n in names if "norm" not in n], [n for n in names if "norm" in n])
    parts = model_parts(plan, {})
    assert [part.name for part in parts] == [f"model.layers.{n}" for n in range(12)]
    assert {part.state for part in parts} == {MIXED}
    assert runs_of(parts) == [("blocks 0–11 (model.layers)", MIXED, 24, None)]


def test_an_encoder_stands_before_its_decoder() -> None:
    decoder = [f"decoder.block.{n}.layer.0.w.weight" for n in range(2)]
    encoder = [f"encoder.block.{n}.layer.0.w.weight" for n in range(2)]
    parts = model_parts(plan_of(decoder, ["shared.weight", *encoder, "lm_head.weight"]), {})
    assert [part.name for part in parts] == [
        "shared",
        *("encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"),
        "lm_head",
    ]


def test_sizes_come_from_headers_and_a_broken_file_gives_none(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    folder = run / "finetune" / "model"
    assert parameter_sizes([run / "pretrain" / "model", folder])["classifier.weight"] == 12
    for broken in (b"", b"\x01", b"\xff" * 8, (9).to_bytes(8, "little") + b'{"a": 1}x', b"\x02" + b"\0" * 7 + b"[]"):
        (folder / "model.safetensors").write_bytes(broken)
        assert parameter_sizes([folder]) == {}


def chosen(run: Path) -> dict[str, list[str]]:
    section = example_section(read_record(run))
    blocks = [block for block in section.blocks if block.kind == "examples"]
    return {block.title: [example.title for example in block.examples] for block in blocks}


def test_the_examples_that_changed_most_and_the_worst(tmp_path: Path) -> None:
    lines = [prediction(n, 2.0, 2.0 - (n - 20) / 10) for n in range(40)]  # 39 gained most, 0 lost most
    found = chosen(make_run(tmp_path, predictions=lines))
    assert found["Changed most for the better"] == [f"Example {n}, rows.jsonl:{n + 1}" for n in (39, 38, 37, 36)]
    assert found["Changed most for the worse"] == [f"Example {n}, rows.jsonl:{n + 1}" for n in range(4)]
    assert found["The worst now"] == [f"Example {n}, rows.jsonl:{n + 1}" for n in range(4, 8)]  # others than those


def test_where_nothing_got_worse_there_is_no_such_heading(tmp_path: Path) -> None:
    found = chosen(make_run(tmp_path, predictions=[prediction(n, 2.0, 1.0) for n in range(9)]))
    assert set(found) == {"Changed most for the better", "The worst now"}


def test_losses_are_a_token_where_there_are_tokens_and_answers_are_preferred(tmp_path: Path) -> None:
    lines = []
    for n in range(30):
        answer = {"answer": f"said {n}"} if n < 12 else {}
        said = {"loss": 100.0 * (n + 1), "tokens": 100} | answer
        lines.append(prediction(n, 0, 0, prompt=f"ask {n}", model=said, parent=said | {"loss": 5000.0 - 100 * n}))
    section = example_section(read_record(make_run(tmp_path, predictions=lines)))
    worst = section.blocks[-1]
    assert [example.title.split(",")[0] for example in worst.examples] == [f"Example {n}" for n in (11, 10, 9, 8)]
    assert worst.examples[0].said[-1].note == "loss 12.00"
    assert worst.examples[0].said[-1].text == "said 11"


def test_samples_stand_in_for_predictions(tmp_path: Path) -> None:
    results = {"model": {"loss": 1.0}, "parent": {"loss": 2.0}, "examples": 2, "tables": {}}
    results["samples"] = [{"prompt": "p", "reference": "r", "model": "m", "parent": "b"}]
    section = example_section(read_record(make_run(tmp_path, results=results, predictions=None)))
    (block,) = section.blocks
    assert [(said.who, said.text) for said in block.examples[0].said] == [
        ("reference", "r"),
        ("before", "b"),
        ("after", "m"),
    ]


def test_common_parts_of_prompts_and_long_texts() -> None:
    prompts = ["system\nask\none\nend", "system\nask\ntwo\nand more\nend"]
    assert without_common_parts(prompts) == ["one", "two\nand more"]
    assert without_common_parts(["same", "same"]) == ["same", "same"]
    assert without_common_parts(["alone"]) == ["alone"]
    assert len(clipped("x" * 5000, 300)) < 320


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (number(1234567), "1,234,567"),
        (number(-3), "−3"),
        (number(0.87654), "0.8765"),
        (number(12.3456), "12.35"),
        (number(123456.7), "123,457"),
        (number(2e-5), "2e−05"),
        (number(None), "–"),
        (signed(0.5), "+0.5000"),
        (signed(-0.5), "−0.5000"),
        (signed(0.0), "0.0000"),
        (interval([0.1, 0.2]), "0.1000 to 0.2000"),
        (interval([2.371, 10.1028]), "2.37 to 10.10"),
        (interval([-0.001, 12.0]), "0.00 to 12.00"),
        (interval([None, None]), ""),
        (interval(None), ""),
        (bytes_(3 << 30), "3.0 GiB"),
        (bytes_(12), "12 bytes"),
        (duration(4.25), "4.2 s"),
        (duration(59.99), "60.0 s"),
        (duration(250), "4 min 10 s"),
        (duration(3600), "1 h"),
        (duration(3600 * 30), "1 d 6 h"),
        (short_count(134_515_008), "134.5 M"),
        (measure("train_seconds", 61), "1 min 1 s"),
        (measure("padding_share", 0.125), "12.5%"),
    ],
)
def test_numbers_as_people_read_them(shown: str, expected: str) -> None:
    assert shown == expected


@pytest.mark.parametrize(
    ("text", "gone", "left"),
    [
        ("https://me:hunter2@host/rows", "hunter2", "host/rows"),
        ("s3://KEY:pa55@bucket/rows", "pa55", "bucket/rows"),
        ("https://host/rows?X-Amz-Signature=abcdef&part=2", "abcdef", "part=2"),
        ("https://host/rows?access_token=plain", "plain", "host/rows"),
        ("key: hf_abcdefghijklmnopqrstuvwxyzABCDEFGH", "hf_abcdefghij", "key: "),
    ],
)
def test_secrets_are_masked(text: str, gone: str, left: str) -> None:
    found = without_secrets(text)
    assert gone not in found
    assert left in found
    assert "<SECRET>" in found


def test_plain_recipes_are_left_as_they_are() -> None:
    for recipe in (Path(__file__).parents[2] / "recipes").glob("*.yaml"):
        text = recipe.read_text(encoding="utf-8")
        assert without_secrets(text) == text


def test_a_drawing_is_the_same_each_time_and_heeds_no_settings_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    def paint(axes: object) -> None:
        axes.plot([1, 2], [3, 4], label="$x$ <b>")  # type: ignore[attr-defined]
        axes.legend()  # type: ignore[attr-defined]

    first = draw("a", "T", "D", paint)
    with matplotlib.rc_context({"svg.fonttype": "path", "axes.facecolor": "red"}):
        assert draw("a", "T", "D", paint).svg == first.svg
        assert matplotlib.rcParams["axes.facecolor"] == "red"
    assert "$x$ &lt;b&gt;" in first.svg
    assert not re.search(r"http|<metadata|<style|<image|\d{4}-\d\d-\d\d", first.svg)
    other = draw("b", "T", "D", paint)
    assert not set(re.findall(r' id="([^"]+)"', first.svg)) & set(re.findall(r' id="([^"]+)"', other.svg))


def test_json_of_a_plan_is_what_freeze_writes() -> None:
    from llmkit.model.freezing import FreezePlan

    assert FreezePlan.from_json(json.loads(json.dumps(freeze_plan()))).frozen_count == 128


ADAPTER = {"finetune": {"steps": 40, "adapter": {"name": "lora", "rank": 2}}}


def adapted_run(run: Path) -> Path:
    """A run whose adapters stand beside block 3, and whose classifier learns too."""
    make_run(run, recipe=RECIPE | ADAPTER, freeze=freeze_plan() | {"thaws": []})
    (run / "finetune" / "adapter").mkdir()
    path = "base_model.model.bert.encoder.layer.3.output.dense.lora"
    arrays = {f"{path}_A.weight": np.zeros((2, 4)), f"{path}_B.weight": np.zeros((4, 2))}
    arrays["base_model.model.classifier.weight"] = np.zeros((3, 4))
    save_file(arrays, run / "finetune" / "adapter" / "adapter_model.safetensors")
    record = json.loads((run / "run.json").read_text())
    groups = [["decay", 2, 16, 2e-4, 0.01], ["head, decay", 1, 12, 2e-4, 0.01]]
    record["stages"]["finetune"]["facts"]["parameter_groups"] = groups
    (run / "run.json").write_text(json.dumps(record))
    return run


def test_of_adapters_what_the_training_trained_is_what_learns(tmp_path: Path) -> None:
    page = read_page(report_html(read_record(adapted_run(tmp_path))))
    assert "parameters that learn 28 with adapters, beside 156" in page.text
    assert "fine-tuned ./parent with adapters (lora) to classify texts" in page.text
    model = page.by_id("model").text
    assert "144 of 156 parameters of the model (92.3%) stand still, 12 learn." in model
    assert "Adapters (lora, rank 2) learn beside what stands still: 16 parameters." in model
    assert "blocks 0–2 (bert.encoder.layer) stands still 3 48" in model
    assert "block 3 (bert.encoder.layer) stands still, adapters learn beside it 1 16" in model
    assert "classifier learns 1 12" in model


def test_adapters_that_are_not_trained_yet_are_told_by_the_plan(tmp_path: Path) -> None:
    run = adapted_run(tmp_path)
    record = json.loads((run / "run.json").read_text())
    record["stages"]["finetune"] = {"state": "running"}
    (run / "run.json").write_text(json.dumps(record))
    page = read_page(report_html(read_record(run)))
    assert "parameters that learn" not in page.text
    assert "Adapters (lora, rank 2) learn beside what stands still." in page.by_id("model").text
    assert "block 3 (bert.encoder.layer) stands still, adapters learn beside it" in page.by_id("model").text


def test_adapters_without_a_freeze_plan(tmp_path: Path) -> None:
    run = adapted_run(tmp_path)
    (run / "freeze" / "freeze.json").unlink()
    model = read_page(report_html(read_record(run))).by_id("model").text
    assert "Adapters (lora, rank 2) learn beside what stands still: 16 parameters." in model
