"""Did it get better? The paired differences in words, honest where they say nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmkit import catalog
from llmkit.report.names import spoken
from llmkit.report.record import Record
from llmkit.report.words import interval, listed, number, p_value, plural, signed, title_of

BETTER, WORSE, OPEN, NONE = "better", "worse", "open", "none"
_WORDS = {BETTER: "better", WORSE: "worse", OPEN: "not clear"}
_FIRST = {  # which metric speaks for a task
    "classify": ("accuracy", "f1", "loss"),
    "regress": ("rmse", "mae", "loss"),
}
_LEVEL = 0.05  # of p-values
_FIRST_ELSE = ("loss", "perplexity")


@dataclass(frozen=True)
class Change:
    """One metric of the model and of another: what was before, what is now, and what is known of the difference."""

    metric: str
    who: str
    before: float
    after: float
    low: float | None
    high: float | None
    p: float | None
    verdict: str  # better | worse | open | none

    @property
    def difference(self) -> float:
        """After less before."""
        return self.after - self.before

    @property
    def is_same(self) -> bool:
        """True when the two are alike in all that was resampled."""
        return self.low == self.high == 0 == self.difference

    @property
    def judgement(self) -> str:
        """What is to be said of it in a word, or nothing."""
        return "the same" if self.is_same else _WORDS.get(self.verdict, "")

    @property
    def mark(self) -> str:
        """The verdict where it is one way or the other, or open."""
        return self.verdict if self.verdict in _WORDS and not self.is_same else ""

    @property
    def words(self) -> str:
        """The difference with its interval and p-value."""
        bounds = interval([self.low, self.high])
        told = [f"95 % interval of the difference {bounds}"] if bounds else []
        if self.p is not None:
            told.append(f"p {'' if self.p < 0.001 else '= '}{p_value(self.p)}")
        return signed(self.difference) + (f" ({', '.join(told)})" if told else "")


@dataclass(frozen=True)
class Verdict:
    """A word, a sentence, and what else there is to know."""

    kind: str
    word: str
    sentence: str
    more: str = ""
    change: Change | None = None


def lower_is_better(metric: str) -> bool | None:
    """None for a metric of the user's own, which says nothing of it."""
    name = metric.removeprefix("general_")
    if name not in catalog.CATALOG.get("metric", {}):
        return None
    return bool(catalog.resolve("metric", name).lower_is_better)


def changes(results: Mapping[str, Any], who: str) -> list[Change]:
    """What became of each metric that both models have."""
    ours, theirs = results.get("model") or {}, results.get(who) or {}
    known = (results.get("differences") or {}).get(who) or {}
    found = []
    for metric, after in ours.items():
        before = theirs.get(metric)
        if not isinstance(after, int | float) or not isinstance(before, int | float):
            continue
        entry = known.get(metric) or {}
        low, high, p = entry.get("low"), entry.get("high"), entry.get("p")
        found.append(Change(metric, who, before, after, low, high, p, judged(metric, after - before, low, high, p)))
    return found


def judged(metric: str, difference: float, low: float | None, high: float | None, p: float | None = None) -> str:
    """What the interval and the p-value of a difference say: better, worse, open, or none where nothing can be said."""
    lower = lower_is_better(metric)
    if low is None or high is None:
        return NONE
    if low <= 0 <= high or (p is not None and p >= _LEVEL):
        return OPEN
    if lower is None:
        return NONE
    return BETTER if (difference < 0) == lower else WORSE


def headline_metric(record: Record, scores: Mapping[str, Any] | None = None) -> str | None:
    """The metric that speaks for the task; of a list that the recipe gives the first.

    `scores` are those to choose among, where they are not the run's own.
    """
    scores = (record.results or {}).get("model") or {} if scores is None else scores
    wanted = (record.recipe.get("evaluate") or {}).get("metrics")
    asked = tuple(wanted) if isinstance(wanted, list) else ()
    for name in (*asked, *_FIRST.get(record.task, _FIRST_ELSE), *scores):
        if isinstance(scores.get(name), int | float):
            return str(name)
    return None


def examples_of(found: Mapping[str, Any], metric: str) -> int:
    """How many examples a metric of some results, of a slice or of a data set is made of."""
    return int((found.get("scored") or {}).get(metric) or found.get("examples") or 0)


def verdict(record: Record) -> Verdict | None:
    """None when nothing was scored; says of a head that nothing was learnt in that its scores are those of chance."""
    found, untrained = _verdict(record), (record.results or {}).get("untrained") or {}
    if found is None or not untrained:
        return found
    names = [
        {"model": "the model", "parent": "the parent", "other": "the other model"}.get(who, who) for who in untrained
    ]
    text = (
        f"Nothing was ever learnt in the head of {listed(names)}: {'its' if len(names) == 1 else 'their'} scores are "
    )
    return replace(found, more=" ".join(filter(None, [f"{text}those of chance.", found.more])))


def _verdict(record: Record) -> Verdict | None:
    results, metric = record.results, headline_metric(record)
    if results is None or metric is None:
        return None
    examples = plural(examples_of(results, metric), "held-out example")
    name, score = title_of(metric), results["model"][metric]
    if not record.others:
        bounds = interval((results.get("intervals") or {}).get("model", {}).get(metric))
        with_bounds = f" (95 % interval {bounds})" if bounds else ""
        sentence = f"The {name} over {examples} is {number(score)}{with_bounds}; it was held against no other model."
        return Verdict(NONE, "Scored", sentence)
    each = []
    for who in record.others:
        against, found = spoken(record, who), changes(results, who)
        head = next((change for change in found if change.metric == metric), None)
        if head is None:
            none = f"The {name} over {examples} is {number(score)}; {against} has none."
            each.append((against, Verdict(NONE, "Scored", none)))
        else:
            each.append((against, worded(head, found, name, against, examples)))
    return together(each)


def together(each: Sequence[tuple[str, Verdict]]) -> Verdict:
    """The verdicts against several models as one, which says of all only what is so against each."""
    first = each[0][1]
    if len(each) == 1:
        return first
    kinds = [one.kind for _, one in each]
    sentence = " ".join(one.sentence for _, one in each)
    more = " ".join(f"Against {against}: {one.more[0].lower()}{one.more[1:]}" for against, one in each if one.more)
    if len({(one.kind, one.word) for _, one in each}) == 1:
        return Verdict(first.kind, first.word, sentence, more, first.change)
    parts = [
        f"{said} {kinds.count(kind)}"
        for kind, said in ((BETTER, "better than"), (WORSE, "worse than"), (OPEN, "no clear difference from"))
        if kind in kinds
    ]
    word = f"{listed(parts)} of {len(each)} models" if parts else "Scored"
    kind = WORSE if WORSE in kinds and BETTER not in kinds else OPEN if parts else NONE
    return Verdict(kind, word[0].upper() + word[1:], sentence, more, first.change)


def worded(head: Change, found: list[Change], name: str, against: str, examples: str) -> Verdict:
    """The change of the metric that speaks, called `name`, over so many `examples`, and how the others went.

    `found` is all changes, `against` what the model is held against.
    """
    went = "rose" if head.difference > 0 else "fell"
    moved = f"from {number(head.before)} to {number(head.after)}"
    facts = f"over {examples} the {name} {went} {moved} against {against}: {head.words}."
    more = _others_worded([change for change in found if change is not head])
    if head.difference == 0:
        same = f"The {name} over {examples} is {number(head.after)} for both."
        return Verdict(NONE, "Nothing changed", same, more, head)
    if head.verdict == BETTER:
        return Verdict(BETTER, "Yes, it got better", facts[0].upper() + facts[1:], more, head)
    if head.verdict == WORSE:
        return Verdict(WORSE, "No, it got worse", facts[0].upper() + facts[1:], more, head)
    if head.verdict == OPEN:
        between = head.low is not None and head.high is not None and head.low <= 0 <= head.high
        why = "The interval contains zero" if between else "The p-value is not small"
        honest = (
            f"The {name} went {moved} against {against}: {head.words}. {why}, so {examples} cannot tell a difference "
        )
        honest += "from chance."
        return Verdict(OPEN, "No clear difference", honest, more, head)
    if head.low is None:
        tells = "its size is not known well" if head.p is not None else "nothing tells how much of it may be chance"
        facts += f" There is no interval, so that {tells}."
    return Verdict(NONE, f"The {name} {went}", facts[0].upper() + facts[1:], more, head)


def _others_worded(found: list[Change]) -> str:
    """How the other metrics went; nothing where no interval tells."""
    counts = {
        "got better": sum(change.verdict == BETTER for change in found),
        "got worse": sum(change.verdict == WORSE for change in found),
        "may have changed by chance alone": sum(change.verdict == OPEN and not change.is_same for change in found),
        "stayed the same": sum(change.is_same for change in found),
    }
    without = sum(change.low is None for change in found)
    unrated = len(found) - without - sum(counts.values())
    if without == len(found):
        return ""
    parts = [f"{count} {said}" for said, count in counts.items() if count]
    parts += [f"{unrated} changed, and whether for the better is not known"] if unrated else []
    parts += [f"{without} {'has' if without == 1 else 'have'} no interval"] if without else []
    said = f"Of the {plural(len(found), 'other metric')} {listed(parts)}." if parts else ""
    alone = (
        " Each is judged by itself, as if there were no others." if counts["got better"] + counts["got worse"] else ""
    )
    return said + alone
