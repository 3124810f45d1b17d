"""How a page calls the models of the results, and their URIs."""

from __future__ import annotations

from collections.abc import Sequence

from llmkit.data.personal.masking import without_secrets
from llmkit.report.record import Record
from llmkit.report.words import listed

OTHER = "the other"


def name_of(who: str, others: Sequence[str]) -> str:
    """A model's name beside that of `others`; there is a `before` and an `after` only where one of them is the parent."""
    names = {"model": "after" if "parent" in others else "model", "parent": "before", "other": OTHER}
    return names.get(who, who)


def own_uri(record: Record) -> str:
    """The URI that the recipe gives for its model, or nothing."""
    return without_secrets(str(record.recipe.get("model") or ""))


def uris_of(record: Record) -> dict[str, str]:
    """The URIs of the models that the results hold the run's own against, by their names; none that is not known."""
    given = (record.recipe.get("evaluate") or {}).get("against")
    listed_ = given if isinstance(given, list) else [given]
    uris = list(dict.fromkeys(str(uri) for uri in listed_ if uri is not None and uri != "parent"))
    others = [who for who in record.others if who != "parent"]
    found = dict(zip(others, uris, strict=True)) if len(others) == len(uris) else {}
    if "parent" in record.others and record.recipe.get("model"):
        found["parent"] = str(record.recipe["model"])
    return {who: without_secrets(uri) for who, uri in found.items()}


def spoken(record: Record, who: str) -> str:
    """What a sentence calls a model that was held against the run's own; its URI, but for the parent, which is named before."""
    uri = uris_of(record).get(who)
    if who == "parent":
        return "its parent"
    if who == "other":
        return uri or "the other model"
    return f"{who} ({uri})" if uri else who


def legend(record: Record) -> str:
    """A sentence that gives the URI of each model of the scores; nothing where all of them come from the run itself."""
    uris = uris_of(record)
    if not set(uris) - {"parent"}:
        return ""
    own = own_uri(record)
    told = [f"`{name_of('model', record.others)}` is {own}"] if own and record.only_scores else []
    told += [f"`{name_of(who, record.others)}` is {uris[who]}" for who in record.others if who in uris]
    text = listed(told)
    return f"In the tables {text}."
