"""What is known of a data set, as tables: lengths, labels, sources, what filters took out, leaks; and two side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from llmkit.cli.console import make_table
from llmkit.errors import ArtifactError
from llmkit.files import read_json

STATISTICS = "preprocess/statistics.json"  # in a run
_BAR = 30  # characters
_SHOWN_CHARS = 100


def statistics_of(run: Path) -> dict[str, Any]:
    """What preprocess noted of a run's data. Raises ArtifactError when it has not run."""
    path = run / STATISTICS
    if not path.is_file():
        raise ArtifactError(
            "the run has no data yet", got=run, hint=f"`llmkit preprocess {run}` makes them", where=path
        )
    found: dict[str, Any] = read_json(path)
    return found


def show_corpora(console: Console, statistics: Mapping[str, Any]) -> None:
    """Counts, lengths, labels and sources of each corpus."""
    for name, entry in statistics["corpora"].items():
        counts = ("rows", "examples", "tokens", "supervised_tokens", "rows_cut", "tokens_cut", "bytes_per_token")
        facts = [(key.replace("_", " "), entry[key]) for key in counts if key in entry]
        console.print(make_table(f"\n{name}", ("", ""), facts))
        show_counts(console, f"{name}: tokens, up to", entry.get("lengths_up_to", {}))
        show_counts(console, f"{name}: labels", entry.get("labels", {}))
        if len(entry.get("sources", {})) > 1:
            show_counts(console, f"{name}: sources", entry["sources"])


def show_counts(console: Console, title: str, counts: Mapping[str, int]) -> None:
    """A table with a bar for each count."""
    most = max(counts.values(), default=0)
    rows = [(name, count, "█" * round(_BAR * count / most)) for name, count in counts.items()] if most else []
    if rows:
        console.print(make_table(f"\n{title}", ("", "", ""), rows))


def show_filters(console: Console, filters: Mapping[str, Any], dropped: int) -> None:
    """What each filter took out and changed, and some rows that it took out."""
    rows = []
    for name, entry in filters.items():
        rows += [(name, "took out", reason, count) for reason, count in entry["taken_out"].items()]
        rows += [(name, "changed", what, count) for what, count in entry["changed"].items()]
    if rows:
        console.print(make_table("\nfilters", ("filter", "", "what", "rows or places"), rows))
    for name, entry in filters.items():
        if entry["samples"][:dropped]:
            shown = [(s["where"], s["reason"], _short(s["text"])) for s in entry["samples"][:dropped]]
            console.print(make_table(f"\ntaken out by {name}", ("where", "why", "text"), shown))


def show_leaks(console: Console, leaks: Mapping[str, Any], shown: int) -> None:
    """What training and held-out data have in common."""
    rows = [
        (name, found["exact"], found["near"], found["passages"], f"{found['held_out_covered']} of {found['held_out']}")
        for name, found in leaks.items()
    ]
    if not rows:
        console.print("\nleaks: nothing was compared (no held-out examples, or data.leaks: off)")
        return
    columns = ("examples", "held out exactly", "nearly", "share a passage", "held out, nearly all found")
    console.print(make_table("\nleaks", columns, rows))
    for name, found in leaks.items():
        pairs = [(pair["jaccard"], _short(pair["train"]), _short(pair["held_out"])) for pair in found["shown"][:shown]]
        if pairs:
            console.print(make_table(f"\nnearly held out, of {name}", ("alike", "learnt", "held out"), pairs))


def show_difference(console: Console, first: Path, second: Path, examples: int) -> dict[str, Any]:
    """Two runs' corpora side by side; gives the counts of examples that both or one of them have."""
    from llmkit.data.corpus import Corpus
    from llmkit.data.differences import compare_corpora

    one, other = statistics_of(first), statistics_of(second)
    found: dict[str, Any] = {}
    for name in dict.fromkeys([*one["corpora"], *other["corpora"]]):
        entries = [statistics["corpora"].get(name, {}) for statistics in (one, other)]
        _show_side_by_side(console, name, entries, (first, second))
        if not all(entries):
            continue
        corpora = [Corpus(run / "preprocess" / name) for run in (first, second)]
        if corpora[0].meta["identity"].get("tokenizer") != corpora[1].meta["identity"].get("tokenizer"):
            console.print(f"{name}: other tokenizers, so that examples cannot be compared")
            continue
        difference = compare_corpora(corpora[0], corpora[1])
        only = (difference.only_first, difference.only_second)
        found[name] = {"common": difference.common, "only_first": len(only[0]), "only_second": len(only[1])}
        rows = [
            ("in both", difference.common),
            *((f"only in {run}", len(o)) for run, o in zip((first, second), only, strict=True)),
        ]
        console.print(make_table(f"\n{name}: examples", ("", ""), rows))
        for run, corpus, numbers in zip((first, second), corpora, only, strict=True):
            _show_examples(console, f"only in {run}", run, corpus, numbers[:examples])
    return found


def _show_side_by_side(console: Console, name: str, entries: list[dict[str, Any]], runs: tuple[Path, Path]) -> None:
    rows = []
    for key in dict.fromkeys([*entries[0], *entries[1]]):
        values = [entry.get(key) for entry in entries]
        if values[0] == values[1]:
            continue
        if isinstance(values[0] or values[1], dict):
            flat = [value or {} for value in values]
            for inner in dict.fromkeys([*flat[0], *flat[1]]):
                pair = [value.get(inner, "-") for value in flat]
                if pair[0] != pair[1]:
                    rows.append((f"{key.replace('_', ' ')} {inner}", *pair))
        else:
            rows.append((key.replace("_", " "), *("-" if value is None else value for value in values)))
    title = f"\n{name}" if rows else f"\n{name}: the same counts"
    console.print(make_table(title, ("", *map(str, runs)), rows))


def _show_examples(console: Console, title: str, run: Path, corpus: Any, numbers: Any) -> None:
    if not len(numbers):
        return
    from llmkit.model.loading import load_tokenizer

    tokenizer = load_tokenizer(run / "preprocess" / "tokenizer")
    rows = [(int(n), _short(tokenizer.decode(corpus[int(n)]["input_ids"]))) for n in numbers]
    console.print(make_table(f"\n{title}", ("example", "text"), rows))


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN_CHARS else line[: _SHOWN_CHARS - 1] + "…"
