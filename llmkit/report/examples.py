"""Held-out examples that are worth looking at: those that changed most, and the worst, with what was said before and after."""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmkit.report.blocks import Block, Example, Examples, Prose, Said, Section
from llmkit.report.names import name_of
from llmkit.report.record import Record
from llmkit.report.words import number

_EACH = 4  # examples of a kind
_PROMPT_CHARS = 900
_ANSWER_CHARS = 600
_FEWEST_ANSWERS = 10  # written ones, from which on only examples with one are shown


def example_section(record: Record) -> Section:
    """From predictions.jsonl, or where there is none from the samples of the results."""
    title = "Before and after" if "parent" in record.others else "Examples"
    if record.predictions is None:
        samples = (record.results or {}).get("samples") or []
        blocks: list[Block] = [_samples(samples, record.others)] if samples else []
        return Section("examples", title, blocks)
    who = record.others[0] if record.others else None
    with_answers = _count_answers(record.predictions) >= _FEWEST_ANSWERS

    def taken() -> Iterator[dict[str, Any]]:
        for line in _lines(record.predictions):
            if _loss(line, "model") is not None and (not with_answers or _has_answer(line)):
                yield line

    def change(line: Mapping[str, Any]) -> float:
        before, after = _loss(line, who or ""), _loss(line, "model")
        return 0.0 if before is None or after is None else before - after

    def now(line: Mapping[str, Any]) -> float:
        return _loss(line, "model") or 0.0

    kinds: list[tuple[str, Callable[[Mapping[str, Any]], float]]] = []
    if who is not None:
        kinds += [("Changed most for the better", change), ("Changed most for the worse", lambda line: -change(line))]
    kinds.append(("The worst now", now))
    blocks = []
    best = _largest(taken(), [key for _, key in kinds])
    shown_before: set[Any] = set()
    for (name, key), candidates in zip(kinds, best, strict=True):
        fresh = [line for line in candidates if key(line) > 0 and line.get("example") not in shown_before]
        lines = fresh[:_EACH]
        shown_before |= {line.get("example") for line in lines}
        if lines:
            shown = without_common_parts([_prompt(line) for line in lines])
            examples = [_example(line, text, record.others[:1]) for line, text in zip(lines, shown, strict=True)]
            blocks.append(Examples(name, examples))
    if blocks:
        how = (
            "by the loss of each example, the mean of its tokens"
            if record.task not in ("classify", "regress")
            else "by the loss of each example"
        )
        blocks.insert(0, Prose(f"Chosen {how}" + (", among those with a written answer." if with_answers else ".")))
    return Section("examples", title, blocks)


def _largest(
    lines: Iterator[dict[str, Any]], keys: Sequence[Callable[[Mapping[str, Any]], float]]
) -> list[list[dict[str, Any]]]:
    """For each key the lines with its largest values, enough to pass over those of other keys, in one pass."""
    heaps: list[list[tuple[float, int, dict[str, Any]]]] = [[] for _ in keys]
    for number_, line in enumerate(lines):
        for heap, key in zip(heaps, keys, strict=True):
            item = (key(line), -number_, line)
            if len(heap) < len(keys) * _EACH:
                heapq.heappush(heap, item)
            elif item > heap[0]:
                heapq.heapreplace(heap, item)
    return [[line for _, _, line in sorted(heap, reverse=True)] for heap in heaps]


def _lines(path: Path | None) -> Iterator[dict[str, Any]]:
    if path is None:
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict):
                yield line


def _count_answers(path: Path) -> int:
    found = 0
    for line in _lines(path):
        found += _has_answer(line)
        if found >= _FEWEST_ANSWERS:
            break
    return found


def _said(line: Mapping[str, Any], who: str) -> Mapping[str, Any]:
    found = line.get(who)
    return found if isinstance(found, dict) else {}


def _loss(line: Mapping[str, Any], who: str) -> float | None:
    """The loss of an example: the mean over its tokens, where it has tokens to predict."""
    found, tokens = _said(line, who).get("loss"), _said(line, who).get("tokens")
    return float(found) / (tokens or 1) if isinstance(found, int | float) else None


def _has_answer(line: Mapping[str, Any]) -> bool:
    return _said(line, "model").get("answer") is not None


def _answer(line: Mapping[str, Any], who: str) -> str | None:
    said = _said(line, who)
    found = next((said[key] for key in ("answer", "label", "predicted") if said.get(key) is not None), None)
    return None if found is None else number(found)


def _prompt(line: Mapping[str, Any]) -> str:
    return str(line.get("prompt") or line.get("text") or "")


def _example(line: Mapping[str, Any], prompt: str, others: Sequence[str]) -> Example:
    source = line.get("source")
    place = source if isinstance(source, str) else None
    if isinstance(source, dict):
        place = ":".join(str(source[key]) for key in ("file", "line") if source.get(key) is not None)
    title = f"Example {line.get('example', '')}".strip() + (f", {place}" if place else "")
    said = (
        [Said("reference", clipped(str(line["reference"]), _ANSWER_CHARS))] if line.get("reference") is not None else []
    )
    said += [_said_by(line, one, others) for one in (*others, "model") if _said(line, one)]
    return Example(title, clipped(prompt, _PROMPT_CHARS), said)


def _said_by(line: Mapping[str, Any], one: str, others: Sequence[str]) -> Said:
    """What a model answered, and its loss; the loss alone where it wrote nothing and there is nothing to hold it against."""
    loss, probability, answer = _loss(line, one), _said(line, one).get("probability"), _answer(line, one)
    name = name_of(one, others) if others else "answer" if answer is not None else "loss"
    if name == "loss":
        return Said(name, number(loss))
    notes = [f"loss {number(loss)}"] if loss is not None else []
    notes += [f"probability {probability:.0%}"] if isinstance(probability, int | float) else []
    return Said(name, clipped(answer or "", _ANSWER_CHARS), ", ".join(notes))


def _samples(samples: Sequence[Mapping[str, Any]], others: Sequence[str]) -> Examples:
    prompts = without_common_parts([str(sample.get("prompt", "")) for sample in samples])
    names = (("reference", "reference"), *((one, name_of(one, others)) for one in others))
    names += (("model", name_of("model", others) if others else "answer"),)
    examples = [
        Example(
            f"Sample {place}",
            clipped(prompt, _PROMPT_CHARS),
            [
                Said(name, clipped(str(sample[key]), _ANSWER_CHARS))
                for key, name in names
                if sample.get(key) is not None
            ],
        )
        for place, (sample, prompt) in enumerate(zip(samples, prompts, strict=True), 1)
    ]
    return Examples("Samples", examples)


def clipped(text: str, most: int) -> str:
    """The beginning and the end of a long text."""
    return text if len(text) <= most else f"{text[: most * 2 // 3]}\n[...]\n{text[-most // 3 :]}"


def without_common_parts(prompts: Sequence[str]) -> list[str]:
    """Prompts without the lines that all of them begin and end with: the template, the instruction."""
    split = [prompt.split("\n") for prompt in prompts]
    if len(split) < 2:
        return list(prompts)
    fewest = min(map(len, split))
    same = [len({lines[place] for lines in split}) == 1 for place in range(fewest)]
    same_from_end = [len({lines[-1 - place] for lines in split}) == 1 for place in range(fewest)]
    start = next((place for place, equal in enumerate(same) if not equal), 0)
    end = next((place for place, equal in enumerate(same_from_end) if not equal), 0)
    return ["\n".join(lines[start : len(lines) - end]) for lines in split]
