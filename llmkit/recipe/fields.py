"""The types that a recipe's keys have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator

from llmkit import catalog
from llmkit.errors import did_you_mean
from llmkit.recipe.values import bytes_or_auto, duration, duration_or_steps, rate_or_auto, share_or_count

NO_RESULT: dict[str, Any] = {"changes_result": False}
ShareOrCount = Annotated[str | int, PlainValidator(share_or_count, json_schema_input_type=str | int)]
Duration = Annotated[str, PlainValidator(duration, json_schema_input_type=str)]
DurationOrSteps = Annotated[str | int, PlainValidator(duration_or_steps, json_schema_input_type=str | int)]
Bytes = Annotated[str | int, PlainValidator(bytes_or_auto, json_schema_input_type=str | int)]
Rate = Annotated[float | Literal["auto"], PlainValidator(rate_or_auto, json_schema_input_type=float | Literal["auto"])]


def named(group: str) -> Callable[[str], str]:
    """A check that the catalogue knows a name."""

    def check(name: str) -> str:
        known = catalog.names(group)
        if name not in known:
            hint = did_you_mean(name, known)
            raise ValueError(f"should be one of {', '.join(known)}" + (f"; {hint}" if hint else ""))
        return name

    return check


class Section(BaseModel):
    """A mapping of the recipe: immutable, and a key that it does not know is a mistake."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def as_blocks(value: object) -> object:
    """A block range; a single number may stand without quotes."""
    if isinstance(value, list | dict | bool | float):
        raise ValueError("should be text such as `0-19`, `0-3,8`, `all` or `all but the last 4`")
    return str(value) if isinstance(value, int) else value


class Parts(Section):
    """Parts of a model."""

    blocks: Annotated[str | None, BeforeValidator(as_blocks)] = Field(
        None,
        description="`0-19`, `0-3,8`, `all`, `all but the last 4`; to freeze also `auto`: by trying several depths",
    )
    embeddings: bool = False
    head: bool = False
    norms: bool = False
    patterns: tuple[str, ...] = Field((), description="globs over parameter names, or `re:` and a regular expression")

    @property
    def says_something(self) -> bool:
        """True when it names a part."""
        return self.blocks is not None or self.embeddings or self.head or self.norms or bool(self.patterns)


RowFormat = Annotated[str, AfterValidator(named("row format"))]


class Source(Section):
    """Where rows come from."""

    uri: str = Field(min_length=1)
    weight: float = Field(
        1.0, gt=0, description="how often an epoch passes over the source: 0.5 is half of it, 2 twice"
    )
    format: RowFormat | None = Field(None, description="row format; on sight when absent")
    columns: dict[str, str] = Field(default_factory=dict, description="canonical column -> column in the data")


def _as_sources(value: object) -> object:
    """`rows.jsonl`, or a list of URIs and mappings, as a list of mappings."""
    if isinstance(value, str):
        return [{"uri": value}]
    if isinstance(value, dict):
        return [value]
    if isinstance(value, list | tuple):
        return [{"uri": item} if isinstance(item, str) else item for item in value]
    return value


Sources = Annotated[tuple[Source, ...], BeforeValidator(_as_sources), Field(min_length=1)]
