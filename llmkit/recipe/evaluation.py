"""What a recipe may say of evaluation: what is scored, on which data, against which models."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator

from llmkit.recipe.fields import NO_RESULT, Section

_NAMES_OF_DATA = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
RESERVED = ("held_out", "train", "general")


def _as_models(value: object) -> object:
    """One URI, or a list of them."""
    return tuple(value) if isinstance(value, list) else value


class BenchmarkOptions(Section):
    """How lm-eval asks; what is not said is as a benchmark's own task file has it."""

    num_fewshot: int | None = Field(None, ge=0, description="examples with answers before each question")
    limit: int | None = Field(None, gt=0, description="only the first so many questions of each task, to try it")
    apply_chat_template: bool = Field(False, description="ask through the model's chat template")


class Evaluate(Section):
    """Scores on held-out data, for the model and what it is held against."""

    against: Annotated[str | tuple[str, ...] | None, BeforeValidator(_as_models)] = Field(
        "parent", description="`parent`, the URI of another model, a list of these, or null for none"
    )
    metrics: Literal["auto"] | tuple[str, ...] = Field(
        "auto", description="names of the task's metrics; auto for all; `path.py:function` is your own"
    )
    batch_size: int = Field(16, gt=0)
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    generate: int = Field(32, ge=0, description="held-out prompts that are answered greedily and scored (chat)")
    max_new_tokens: int = Field(48, gt=0, description="tokens of an answer")
    samples: int = Field(3, ge=0, description="held-out prompts shown with the answers before and after")
    resamples: int = Field(
        2000, ge=0, description="of the bootstrap that gives 95 % intervals, and of p-values; 0 for neither"
    )
    slices: tuple[str, ...] = Field(
        (), description="also score parts of the held-out data: by label, source, length, or a column of the rows"
    )
    data_sets: dict[Annotated[str, Field(pattern=_NAMES_OF_DATA)], Annotated[str, Field(min_length=1)]] = Field(
        default_factory=dict, description="name -> URI of more data to score, such as another domain; gaps are named"
    )
    train_sample: int | Literal["auto"] = Field(
        "auto",
        description="training examples that are scored too, for the gap to held-out ones; auto: as many, at most 500",
    )
    benchmarks: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (),
        description="public benchmarks that lm-eval knows by name, such as hellaswag, or your own task files (.yaml)",
    )
    benchmark_options: BenchmarkOptions = BenchmarkOptions()
    cache: bool = Field(
        True, description="keep scores of examples, so that they are not computed twice", json_schema_extra=NO_RESULT
    )

    @field_validator("resamples")
    @classmethod
    def _enough(cls, value: int) -> int:
        if 0 < value < 100:
            raise ValueError("should be 100 or more, or 0 for no intervals: fewer say little")
        return value

    @field_validator("train_sample")
    @classmethod
    def _not_negative(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 0:
            raise ValueError("should be a number of examples, 0 for none, or `auto`")
        return value

    @field_validator("data_sets")
    @classmethod
    def _own_names(cls, value: dict[str, str]) -> dict[str, str]:
        if taken := sorted(set(value) & set(RESERVED)):
            raise ValueError(f"should not use the names {', '.join(RESERVED)}, which have a meaning: got {taken[0]}")
        return value

    @property
    def models(self) -> tuple[str, ...]:
        """What is held against the model: `parent` and URIs, each once."""
        given = self.against if isinstance(self.against, tuple) else (self.against,)
        return tuple(dict.fromkeys(uri for uri in given if uri is not None))
