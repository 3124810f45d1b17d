"""Training on data without a known end: blocks, weights, and going on from where it stood."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli, sentence, write_rows

from llmkit.data import stream as streams
from llmkit.data.gather import Request
from llmkit.data.stream import Stream
from llmkit.files import digest_file
from llmkit.train.loop import Fit


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams.Stream.__init__, "__defaults__", (2000,))


def texts(count: int, word: str) -> list[dict[str, Any]]:
    return [{"text": f"{word} {n} {sentence(n)}"} for n in range(count)]


def rows_of(stream: Stream, blocks: int, folder: Path) -> list[str]:
    found, position = [], stream.start
    for number in range(blocks):
        gathered, position = stream.block(position, folder / str(number))
        assert json.loads(json.dumps(position)) == position
        found += [kept.row["text"] for kept in gathered.rows]
    return found


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json"])
def test_blocks_are_all_rows_in_order_again_and_again(tmp_path: Path, suffix: str) -> None:
    import gzip

    paths = [tmp_path / f"{name}{suffix}" for name in "ab"]
    written = [texts(60, "first"), texts(45, "second")]
    for path, rows in zip(paths, written, strict=True):
        text = json.dumps(rows) if suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    stream = Stream([Request(str(tmp_path / f"*{suffix}"))], "text", [], 2000)
    expected = [row["text"] for rows in written for row in rows]
    found = rows_of(stream, 12, tmp_path / "work")
    assert len(found) > 2 * len(expected)
    assert found == (expected * 4)[: len(found)]


def test_a_block_is_a_pure_function_of_its_position(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", texts(200, "a"))
    stream = Stream([Request(str(tmp_path / "a.jsonl"))], "text", [], 2000)
    position = stream.start
    for number in range(3):
        first, after = stream.block(position, tmp_path / f"x{number}")
        again, after_again = Stream([Request(str(tmp_path / "a.jsonl"))], "text", [], 2000).block(
            position, tmp_path / f"y{number}"
        )
        assert [kept.row for kept in first.rows] == [kept.row for kept in again.rows]
        assert [str(kept.where) for kept in first.rows] == [str(kept.where) for kept in again.rows]
        assert after == after_again
        position = after


def test_every_block_has_of_each_source_its_share_by_weight(tmp_path: Path) -> None:
    for name in "ab":
        write_rows(tmp_path / f"{name}.jsonl", texts(300, name))
    requests = [Request(str(tmp_path / "a.jsonl"), weight=3), Request(str(tmp_path / "b.jsonl"))]
    stream, position = Stream(requests, "text", [], 8000), None
    for number in range(3):
        gathered, position = stream.block(position or stream.start, tmp_path / f"{number}")
        first = sum(len(kept.row["text"]) for kept in gathered.rows if kept.row["text"].startswith("a "))
        every = sum(len(kept.row["text"]) for kept in gathered.rows)
        assert abs(first / every - 0.75) < 0.05


def command(cli: Cli, model: Path, data: Path, run: Path, *more: str) -> Any:
    settings = ["stages=[preprocess,finetune]", "data.stream=true", "data.eval=null", "finetune.steps=9"]
    settings += ["finetune.batch_size=8", "finetune.save_every=2", "finetune.log_every=1", *more]
    flags = [part for each in settings for part in ("--set", each)]
    return cli("run", "-m", model, "-d", data, "--task", "text", "-o", run, "--json", "-q", *flags)


def test_a_training_that_was_stopped_ends_with_the_same_bits(
    cli: Cli, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "a.jsonl"
    write_rows(data, texts(300, "a"))
    assert command(cli, tiny_llama, data, tmp_path / "whole").code == 0
    real = Fit._step

    def fails(fit: Fit, *rest: Any) -> bool:
        if fit.state.step == 7:
            raise OSError("the machine went down")
        return real(fit, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Fit, "_step", fails)
        assert command(cli, tiny_llama, data, tmp_path / "cut").code != 0
    opened: list[Any] = []
    block = Stream.block

    def watched(stream: Stream, position: Any, folder: Path) -> Any:
        opened.append(position)
        return block(stream, position, folder)

    monkeypatch.setattr(Stream, "block", watched)
    assert command(cli, tiny_llama, data, tmp_path / "cut").code == 0
    assert opened[0][0]["offset"] > 0, "it does not begin at the start again"
    weights = [digest_file(tmp_path / run / "finetune" / "model" / "model.safetensors") for run in ("whole", "cut")]
    assert weights[0] == weights[1]
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut" / "metrics.jsonl").open()]
    assert steps == list(range(1, 10))
    assert not list((tmp_path / "cut" / "finetune").glob("stream*"))


def test_what_does_not_go_with_a_stream_is_refused_by_name(cli: Cli, tiny_llama: Path, tmp_path: Path) -> None:
    data = tmp_path / "a.jsonl"
    write_rows(data, texts(50, "a"))
    for setting, named in (
        ("data.eval=5%", "share"),
        ("data.filters=[duplicates]", "duplicates"),
        ("finetune.steps=null", "finetune.steps"),
        ("data.group=text", "group"),
    ):
        refused = command(cli, tiny_llama, data, tmp_path / "run", setting)
        assert refused.code == 2
        assert named in refused.json["what"] + str(refused.json["got"]) + str(refused.json)


def test_a_block_with_too_many_bad_rows_stops_and_says_where(cli: Cli, tiny_llama: Path, tmp_path: Path) -> None:
    data = tmp_path / "a.jsonl"
    lines = [json.dumps(row) for row in texts(200, "a")]
    lines[60] = "{broken"
    data.write_text("\n".join(lines) + "\n")
    stopped = command(cli, tiny_llama, data, tmp_path / "run", "data.max_rejected=0")
    assert stopped.code == 3
    assert "a.jsonl:61" in str(stopped.json)
