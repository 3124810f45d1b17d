"""What a recipe may say: every key, its type, its default and its meaning.

Keys marked `_NO_RESULT` change how a stage is watched or saved, never what it computes, so they are not part of a
stage's fingerprint.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, field_validator, model_validator

from llmkit import catalog
from llmkit.errors import did_you_mean
from llmkit.recipe.values import duration_or_steps, is_share, share, share_or_count

STAGES = ("preprocess", "pretrain", "freeze", "finetune", "evaluate", "export")

_NO_RESULT: dict[str, Any] = {"changes_result": False}
_ShareOrCount = Annotated[str | int, PlainValidator(share_or_count, json_schema_input_type=str | int)]
_DurationOrSteps = Annotated[str | int, PlainValidator(duration_or_steps, json_schema_input_type=str | int)]


def _named(group: str) -> Callable[[str], str]:
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


class Source(Section):
    """Where rows come from."""

    uri: str
    weight: float = Field(
        1.0, gt=0, description="how often an epoch passes over the source: 0.5 is half of it, 2 twice"
    )
    format: str | None = Field(None, description="row format; on sight when absent")
    columns: dict[str, str] = Field(default_factory=dict, description="canonical column -> column in the data")

    @field_validator("format")
    @classmethod
    def _known_format(cls, name: str | None) -> str | None:
        return name if name is None else _named("row format")(name)


def _as_sources(value: object) -> object:
    """`rows.jsonl`, or a list of URIs and mappings, as a list of mappings."""
    if isinstance(value, str):
        return [{"uri": value}]
    if isinstance(value, dict):
        return [value]
    if isinstance(value, list | tuple):
        return [{"uri": item} if isinstance(item, str) else item for item in value]
    return value


_Sources = Annotated[tuple[Source, ...], BeforeValidator(_as_sources), Field(min_length=1)]


class Data(Section):
    """The rows that the task learns from, and how they become a corpus."""

    train: _Sources | None = None
    eval: str | None = Field("5%", description="held-out rows: a share of train, or a URI; null for none")
    format: str | None = Field(None, description="row format of all sources; on sight when absent")
    columns: dict[str, str] = Field(default_factory=dict, description="canonical column -> column in the data")
    max_length: int = Field(1024, gt=1, description="tokens an example may have; the rest is cut off and counted")
    max_rejected: _ShareOrCount = Field("1%", description="rows that may be unusable before it is an error")
    filters: tuple[str | dict[str, dict[str, Any]], ...] = Field((), description="in order; see the catalogue")
    chat_template: str | None = Field(None, description="a Jinja file in place of the model's own chat template")

    @field_validator("format")
    @classmethod
    def _known_format(cls, name: str | None) -> str | None:
        return name if name is None else _named("row format")(name)

    @field_validator("filters")
    @classmethod
    def _known_filters(cls, filters: tuple[str | dict[str, Any], ...]) -> tuple[str | dict[str, Any], ...]:
        for spec in filters:
            if isinstance(spec, dict) and len(spec) != 1:
                raise ValueError("each filter should be a name or `name: {option: value}`")
            _named("filter")(spec if isinstance(spec, str) else next(iter(spec)))
        return filters

    @field_validator("eval")
    @classmethod
    def _share_in_range(cls, value: str | None) -> str | None:
        if is_share(value) and not 0 < share(str(value)) < 1:
            raise ValueError("should be a share above 0% and below 100%, or a URI")
        return value


class Optimizer(BaseModel):
    """An optimizer by name, and its own options."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: Annotated[str, BeforeValidator(_named("optimizer"))] = "adamw"

    @property
    def options(self) -> dict[str, Any]:
        """Everything but the name."""
        return dict(self.model_extra or {})


def _as_optimizer(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


class EarlyStopping(Section):
    """Ends training when the held-out loss stops falling."""

    patience: int = Field(3, gt=0, description="evaluations without a better held-out loss before training ends")
    min_delta: float = Field(0.0, ge=0, description="how much lower a loss must be to count as better")


class Training(Section):
    """What pretraining and fine-tuning have in common."""

    epochs: float | None = Field(None, gt=0)
    steps: int | None = Field(None, gt=0, description="optimizer steps; in place of epochs")
    batch_size: int = Field(8, gt=0, description="examples a step, over all processes")
    micro_batch_size: int | None = Field(None, gt=0, description="examples a process computes at once; all when absent")
    schedule: Annotated[str, BeforeValidator(_named("schedule"))] = "cosine"
    warmup: _ShareOrCount = Field("3%", description="of the steps, or a number of steps")
    optimizer: Annotated[Optimizer, BeforeValidator(_as_optimizer)] = Optimizer()
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float | None = Field(1.0, gt=0, description="gradients are scaled down to this norm; null for never")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    eval_every: int | None = Field(None, gt=0, description="steps between evaluations; at the end only when absent")
    early_stopping: EarlyStopping | None = None
    keep: Literal["best", "last"] = Field(
        "best", description="which weights become the model: by held-out loss, or last"
    )
    save_every: _DurationOrSteps = Field("10min", description="or a number of steps", json_schema_extra=_NO_RESULT)
    keep_checkpoints: int = Field(2, gt=0, description="newest checkpoints to keep", json_schema_extra=_NO_RESULT)
    log_every: int = Field(10, gt=0, description="steps", json_schema_extra=_NO_RESULT)
    trackers: tuple[str, ...] = Field(("tensorboard",), description="of Accelerate", json_schema_extra=_NO_RESULT)

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("takes `epochs` or `steps`, not both")
        if self.early_stopping is not None and self.eval_every is None:
            raise ValueError("`early_stopping` needs `eval_every`, the number of steps between evaluations")
        return self


class Tokenizer(Section):
    """A tokenizer to train on the pretraining text."""

    train: Literal["bpe", "unigram", "wordpiece"] = "bpe"
    vocab_size: int = Field(8192, ge=300)


def _as_tokenizer(value: object) -> object:
    return value if not isinstance(value, Tokenizer) else value.model_dump()


class Pretrain(Training):
    """Learning from plain text: from scratch when `architecture` is given, else from the recipe's model."""

    data: _Sources | None = Field(None, description="plain text; data.train when absent")
    architecture: dict[str, Any] | None = Field(None, description="a Transformers config: model_type and sizes")
    tokenizer: Annotated[str | Tokenizer | None, BeforeValidator(_as_tokenizer)] = Field(
        None, description="URI of a model to take it from, or {train: bpe, vocab_size: 8192}"
    )
    max_length: int | None = Field(None, gt=1, description="tokens a window; data.max_length when absent")
    lr: float | Literal["auto"] = "auto"

    @field_validator("architecture")
    @classmethod
    def _names_a_type(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None and not isinstance(value.get("model_type"), str):
            raise ValueError("should have `model_type`, the name of a Transformers architecture such as gpt2")
        return value


class Freeze(Section):
    """Which parameters stand still."""

    blocks: Annotated[str | None, BeforeValidator(lambda v: str(v) if isinstance(v, int) else v)] = Field(
        None, description="`0-19`, `0-3,8`, `all`, `all but the last 4`"
    )
    embeddings: bool = False
    head: bool = False
    norms: bool = False
    patterns: tuple[str, ...] = Field((), description="globs over parameter names, or `re:` and a regular expression")

    @model_validator(mode="after")
    def _says_something(self) -> Freeze:
        if self.blocks is None and not (self.embeddings or self.head or self.norms or self.patterns):
            raise ValueError("freezes nothing: name blocks, embeddings, head, norms or patterns, or leave it out")
        return self


class Finetune(Training):
    """Learning the task, gently."""

    lr: float | Literal["auto"] = Field("auto", description="the parent's peak rate times lr_scale, or a number")
    lr_scale: float = Field(0.1, gt=0)


class Evaluate(Section):
    """Scores on held-out data, for the model and what it is held against."""

    against: str | None = Field("parent", description="`parent`, the URI of another model, or null for none")
    metrics: Literal["auto"] | tuple[str, ...] = Field("auto", description="names of the task's metrics; auto for all")
    batch_size: int = Field(16, gt=0)
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    generate: int = Field(32, ge=0, description="held-out prompts that are answered greedily and scored (chat)")
    max_new_tokens: int = Field(48, gt=0, description="tokens of an answer")
    samples: int = Field(3, ge=0, description="held-out prompts shown with the answers before and after")


class Export(Section):
    """What to write for use elsewhere."""

    formats: tuple[Annotated[str, BeforeValidator(_named("export format"))], ...] = ("transformers",)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="auto: as the parent has it")


class Recipe(Section):
    """The whole document."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="letters, digits and . _ -")
    seed: int = Field(17, ge=0, lt=2**32)
    task: Annotated[str, BeforeValidator(_named("task"))]
    model: str | None = Field(None, description="the URI of pretrained weights")
    stages: tuple[str, ...] = Field((), description="in order; those that the recipe has something for when absent")
    data: Data = Data()
    pretrain: Pretrain | None = None
    freeze: Freeze | None = None
    finetune: Finetune = Finetune()
    evaluate: Evaluate = Evaluate()
    export: Export = Export()

    @field_validator("stages")
    @classmethod
    def _known_stages(cls, stages: tuple[str, ...]) -> tuple[str, ...]:
        for stage in stages:
            _named("stage")(stage)
        if list(stages) != sorted(set(stages), key=STAGES.index):
            raise ValueError(f"should name each stage once, in this order: {', '.join(STAGES)}")
        return stages

    @model_validator(mode="after")
    def _complete(self) -> Recipe:
        scratch = self.pretrain is not None and self.pretrain.architecture is not None
        if self.model is None and not scratch:
            raise ValueError(
                "needs `model`, the URI of pretrained weights, or `pretrain.architecture` to start from none"
            )
        if self.model is not None and scratch:
            raise ValueError(
                "takes `model` or `pretrain.architecture`, not both: which of them should training start from?"
            )
        if scratch and self.pretrain is not None and self.pretrain.tokenizer is None:
            raise ValueError("needs `pretrain.tokenizer`: a model's URI, or {train: bpe, vocab_size: 8192}")
        if self.pretrain is None and "pretrain" in self.stages:
            raise ValueError("has the stage `pretrain`, but no `pretrain:` section")
        if self.freeze is None and "freeze" in self.stages:
            raise ValueError("has the stage `freeze`, but no `freeze:` section")
        return self

    @property
    def plan(self) -> tuple[str, ...]:
        """The stages to run, in order: those that are named, or those that the recipe has something for."""
        if self.stages:
            return self.stages
        absent = {"pretrain": self.pretrain is None, "freeze": self.freeze is None}
        return tuple(stage for stage in STAGES if not absent.get(stage, False))


def result_keys(section: BaseModel | None) -> dict[str, Any]:
    """The part of a section that decides what a stage computes, as JSON values."""
    if section is None:
        return {}
    fields = type(section).model_fields
    extra = {name: field.json_schema_extra for name, field in fields.items()}
    return {key: value for key, value in section.model_dump(mode="json").items() if extra.get(key) != _NO_RESULT}
