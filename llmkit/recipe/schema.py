"""What a recipe may say: every key, its type, its default and its meaning.

Keys marked `NO_RESULT` change how a stage is watched, saved or cut to the memory there is, never what it computes but for
rounding, so they are not part of a stage's fingerprint.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    field_validator,
    model_validator,
)

from llmkit.catalog import is_own_code
from llmkit.recipe.evaluation import Evaluate
from llmkit.recipe.fields import NO_RESULT, Bytes, Duration, Parts, RowFormat, Section, ShareOrCount, Sources, named
from llmkit.recipe.training import Finetune, Pretrain
from llmkit.recipe.values import is_share, seconds_of, share

STAGES = ("preprocess", "pretrain", "freeze", "finetune", "evaluate", "export")

_NUMBER = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def _known(group: str) -> Callable[[str | dict[str, Any]], str | dict[str, Any]]:
    """A check of a name, or a name with its options: one that the catalogue knows, or the user's own code."""

    def check(spec: str | dict[str, Any]) -> str | dict[str, Any]:
        if isinstance(spec, dict) and len(spec) != 1:
            raise ValueError("should be a name or `name: {option: value}`")
        name = spec if isinstance(spec, str) else next(iter(spec))
        if not is_own_code(name):
            named(group)(name)
        return spec

    return check


_Filter = Annotated[str | dict[str, dict[str, Any]], AfterValidator(_known("filter"))]
_Augmentation = Annotated[str | dict[str, dict[str, Any]], AfterValidator(_known("augmentation"))]


def _number_as_text(value: object) -> object:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _part_of_the_rows(value: str) -> str:
    if not is_share(value) or not 0 < share(value) < 1:
        raise ValueError("should be a share above 0% and below 100%")
    return value


class Data(Section):
    """The rows that the task learns from, and how they become a corpus."""

    train: Sources | None = None
    eval: Annotated[str | None, BeforeValidator(_number_as_text)] = Field(
        "5%", description="held-out rows: a share of train, a number of its rows, or a URI; null for none"
    )
    fold: Annotated[str, Field(pattern=r"^[1-9]\d*/[1-9]\d*$")] | None = Field(
        None, description="`2/5` holds out the second of five equal parts of train, in place of `eval`"
    )
    stratify: str | None = Field(
        None, description="a column, such as label: of the rows with each of its values the same share is held out"
    )
    train_share: Annotated[str, AfterValidator(_part_of_the_rows)] | None = Field(
        None, description="learn from a part of the training rows, such as 10%; what is held out stays the same"
    )
    group: str | None = Field(
        None, description="a column, such as author: rows with the same value are held out together or not at all"
    )
    leaks: Literal["drop", "report", "error", "off"] = Field(
        "drop",
        description="training rows that are held out too, exactly or nearly, or that share long passages: `drop` leaves out "
        "the first two kinds, `error` stops, `report` only counts",
    )
    seen: Sources | None = Field(
        None, description="data of earlier runs: the filters duplicates and near_duplicates take out what repeats them"
    )
    benchmarks: tuple[str, ...] = Field(
        (), description="URIs of texts that the training rows must not hold, such as public test sets"
    )
    replay: Sources | None = Field(
        None,
        description="rows of other data that are mixed into the training data, so that the model does not forget them",
    )
    replay_share: Annotated[str, AfterValidator(_part_of_the_rows)] = Field(
        "10%", description="of the training rows that are replayed"
    )
    general: Sources | None = Field(
        None, description="plain text that evaluate scores too, before and after: what has been forgotten (text, chat)"
    )
    stream: bool = Field(
        False,
        description="read, clean and encode the training rows while they are learnt from, without a known end; `steps` says "
        "how long, and weights how much of each source",
    )
    format: RowFormat | None = Field(None, description="row format of all sources; on sight when absent")
    columns: dict[str, str] = Field(default_factory=dict, description="canonical column -> column in the data")
    max_length: int = Field(1024, gt=1, description="tokens an example may have; the rest is cut off and counted")
    max_rejected: ShareOrCount = Field("1%", description="rows that may be unusable before it is an error")
    filters: tuple[_Filter, ...] = Field(
        (), description="names, or `name: {option: value}`, in order; `path.py:function` is your own"
    )
    augment: tuple[_Augmentation, ...] = Field(
        (), description="random changes to training rows, named as `filters` are; held-out rows stay as they are"
    )
    chat_template: str | None = Field(None, description="a Jinja file in place of the model's own chat template")
    workers: Annotated[int, Field(gt=0)] | Literal["auto"] = Field(
        "auto", description="processes that read and encode large data; auto: one a core", json_schema_extra=NO_RESULT
    )

    @field_validator("eval")
    @classmethod
    def _share_in_range(cls, value: str | None) -> str | None:
        if value is not None and _NUMBER.fullmatch(value) and not (value.isdigit() and int(value) > 0):
            raise ValueError("should be a share with its percent sign, such as `5%`, a whole number of rows, or a URI")
        if is_share(value) and not 0 < share(str(value)) < 1:
            raise ValueError("should be a share above 0% and below 100%, a number of rows, or a URI")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Data:
        if self.fold is not None:
            number, folds = map(int, self.fold.split("/"))
            if not number <= folds or folds < 2:
                raise ValueError("`fold` should be one of two folds or more, such as `2/5`")
        mistakes = []
        if self.eval_is_uri and (self.fold or self.stratify or self.group):
            mistakes.append("`fold`, `stratify` and `group` divide `train`: they do not go with a URI under `eval`")
        if self.eval is None and self.fold:
            mistakes.append("`fold` holds rows out, and `eval: null` none: leave one of them out")
        if self.stratify and self.group:
            mistakes.append("`stratify` and `group` do not go together: a group can have rows of several strata")
        named = {spec if isinstance(spec, str) else next(iter(spec)) for spec in self.filters}
        if self.stream:
            mistakes += self._not_with_a_stream(named)
        if self.seen and not named & {"duplicates", "near_duplicates"}:
            mistakes.append("`seen` is for the filters duplicates and near_duplicates: name one under `filters`")
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self

    def _not_with_a_stream(self, filters: set[str]) -> list[str]:
        mistakes = []
        if self.train is None:
            mistakes.append("has `stream`, but no `train` to stream")
        if self.eval is not None and not self.eval_is_uri:
            mistakes.append("a stream has no known end to take a share of: name a URI under `eval`, or null")
        for key in ("stratify", "group", "replay", "train_share"):
            if getattr(self, key):
                mistakes.append(f"`{key}` needs all rows at once: it does not go with `stream`")
        for name in sorted(filters & {"duplicates", "near_duplicates"}):
            mistakes.append(f"the filter {name} compares all rows: it does not go with `stream`")
        return mistakes

    @property
    def eval_is_uri(self) -> bool:
        """True when the held-out rows are data of their own."""
        return self.eval is not None and not is_share(self.eval) and not self.eval.isdigit()


class Thaw(Parts):
    """What begins to move, and when."""

    at: ShareOrCount = Field(description="a share of the steps, such as `30%`, or a number of them")

    @model_validator(mode="after")
    def _names_parts(self) -> Thaw:
        if not self.says_something:
            raise ValueError("thaws nothing: name blocks, embeddings, head, norms or patterns")
        return self


class Freeze(Parts):
    """Which parameters stand still."""

    budget: Duration | None = Field(
        None, description="time for `blocks: auto`, such as 10min; depths that would go beyond it are not tried"
    )
    unfreeze: tuple[Thaw, ...] | Literal["head-first", "ulmfit"] = Field(
        (),
        description="what thaws when, as `[{at: 30%, blocks: 20-29}]`; `head-first`: first the head alone, from 20 % of "
        "the steps on all but what is frozen; `ulmfit`: one block after the other, the last one first",
    )
    dropout: bool = Field(False, description="leave dropout in frozen blocks, which else compute without")
    cache: bool | Literal["auto"] = Field(
        "auto",
        description="compute leading frozen blocks once and keep what leaves them; auto: where that is exact and pays",
        json_schema_extra=NO_RESULT,
    )
    cache_bytes: Bytes = Field(
        "auto",
        description="most that is kept on disk, the rest is computed each time; auto: a quarter of the free space",
        json_schema_extra=NO_RESULT,
    )
    cache_precision: Literal["auto", "bf16"] = Field("auto", description="auto: as the states are; bf16: half of fp32")

    @property
    def by_evidence(self) -> bool:
        """True when trainings at several depths are to tell what to freeze."""
        return self.blocks == "auto"

    @model_validator(mode="after")
    def _says_something(self) -> Freeze:
        if not self.says_something and not isinstance(self.unfreeze, str):
            raise ValueError("freezes nothing: name blocks, embeddings, head, norms or patterns, or leave it out")
        if self.by_evidence and (self.embeddings or self.head or self.norms or self.patterns or self.unfreeze):
            raise ValueError("`blocks: auto` finds out what to freeze: leave out the other parts, and `unfreeze`")
        if self.budget is not None and not self.by_evidence:
            raise ValueError("`budget` is for `blocks: auto`")
        return self


class Export(Section):
    """What to write for use elsewhere."""

    formats: tuple[Annotated[str, BeforeValidator(named("export format"))], ...] = ("transformers",)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="auto: as the parent has it")


class Launch(Section):
    """How many processes a training has on this machine; under torchrun, srun and their kind they say it."""

    gpus: int | None = Field(None, gt=0, description="one process for each; all there are when absent")
    processes: int | None = Field(None, gt=0, description="where there is no GPU; 1 when absent")
    hang_after: Duration = Field(
        "30min",
        description="without a step, or without a word of a process, all end; more than a checkpoint takes to read",
    )
    connect_within: Duration = Field("2min", description="so long processes wait for each other at the start")

    @model_validator(mode="after")
    def _one_number(self) -> Launch:
        if self.gpus is not None and self.processes is not None:
            raise ValueError("takes `gpus` or `processes`, not both")
        return self


class Parallel(Section):
    """How many processes share the work on the same examples, with fsdp over the rest; or what DeepSpeed shares."""

    tensor: int = Field(1, gt=0, description="processes that compute parts of each product of a block")
    context: int = Field(1, gt=0, description="how many such groups compute parts of each example")
    deepspeed: Literal[1, 2] | None = Field(
        None, description="a ZeRO stage: optimizer state is shared (1), gradients too (2); weights too (3) is fsdp"
    )
    offload: bool = Field(False, description="DeepSpeed keeps what it shares in the machine's memory, and steps there")

    @model_validator(mode="after")
    def _one_way(self) -> Parallel:
        if self.deepspeed is not None and self.tensor * self.context > 1:
            raise ValueError("takes `deepspeed`, or `tensor` and `context`, which share by fsdp, not both")
        if self.offload and self.deepspeed is None:
            raise ValueError("takes `offload` beside `deepspeed` alone: `{deepspeed: 2, offload: true}`")
        return self


class Recipe(Section):
    """The whole document."""

    name: str = Field(description="letters, digits and . _ -")
    seed: int = Field(17, ge=0, lt=2**32)
    task: Annotated[str, BeforeValidator(named("task"))]
    model: str | None = Field(None, min_length=1, description="the URI of pretrained weights")
    stages: tuple[Annotated[str, BeforeValidator(named("stage"))], ...] = Field(
        (), description="in order; those that the recipe has something for when absent"
    )
    data: Data = Data()
    pretrain: Pretrain | None = None
    freeze: Freeze | None = None
    finetune: Finetune = Finetune()
    evaluate: Evaluate = Evaluate()
    export: Export = Export()
    launch: Launch = Launch()
    parallel: Literal["auto", "ddp", "fsdp", "tensor", "context", "deepspeed"] | Parallel = Field(
        "auto",
        description="how several processes train: ddp, each with the whole model; fsdp, with a share of its weights, "
        "gradients and optimizer state; tensor, those of one machine each with a part of each product; context, with a part of "
        "each example; deepspeed, with a share of the gradients and optimizer state; auto: ddp or fsdp; or sizes: {tensor: 2, "
        "context: 4}, and fsdp over the rest; or {deepspeed: 2, offload: true}",
        json_schema_extra=NO_RESULT,
    )
    max_time: Duration | None = Field(
        None, description="a command saves and ends within this time, such as 4h; the next one goes on from there"
    )

    @field_validator("name")
    @classmethod
    def _plain(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError("should be letters, digits and . _ - only, and begin with a letter or digit")
        return name

    @field_validator("max_time")
    @classmethod
    def _some_time(cls, value: str | None) -> str | None:
        if value is not None and not seconds_of(value):
            raise ValueError("should be more than no time, such as `4h`")
        return value

    @field_validator("stages")
    @classmethod
    def _in_order(cls, stages: tuple[str, ...]) -> tuple[str, ...]:
        if list(stages) != sorted(set(stages), key=STAGES.index):
            raise ValueError(f"should be each stage once, in this order: {', '.join(STAGES)}")
        return stages

    @model_validator(mode="after")
    def _complete(self) -> Recipe:
        scratch = self.pretrain is not None and self.pretrain.architecture is not None
        mistakes = []
        if self.model is None and not scratch:
            mistakes.append(
                "needs `model`, the URI of pretrained weights, or `pretrain.architecture` to start from none"
            )
        if self.model is not None and scratch:
            mistakes.append(
                "takes `model` or `pretrain.architecture`, not both: which of them should training start from?"
            )
        if scratch and self.pretrain is not None and self.pretrain.tokenizer is None:
            mistakes.append("needs `pretrain.tokenizer`: a model's URI, or {train: bpe, vocab_size: 8192}")
        if self.pretrain is None and "pretrain" in self.stages:
            mistakes.append("has the stage `pretrain`, but no `pretrain:` section")
        if self.freeze is None and "freeze" in self.stages:
            mistakes.append("has the stage `freeze`, but no `freeze:` section")
        if self.freeze is not None and self.freeze.by_evidence and "freeze" in self.plan and self.data.train is None:
            mistakes.append("has `freeze.blocks: auto`, but no `data.train` to try depths on")
        if self.data.general is not None and self.task in ("classify", "regress"):
            mistakes.append(f"has `data.general`, but a model that learns to {self.task} does not predict text")
        if self.data.replay is not None and self.data.train is None:
            mistakes.append("has `data.replay`, but no `data.train` to mix it into")
        if self.freeze is not None and not isinstance(self.freeze.unfreeze, str) and "finetune" in self.plan:
            steps = self.finetune.steps
            for thaw in self.freeze.unfreeze:
                if steps is not None and isinstance(thaw.at, int) and thaw.at >= steps:
                    mistakes.append(f"has `freeze.unfreeze` at step {thaw.at}, but only {steps} steps of fine-tuning")
        thaws = self.freeze is not None and bool(self.freeze.unfreeze) and {"freeze", "finetune"} <= set(self.plan)
        if thaws and self.finetune.adapter is not None:
            mistakes.append(
                "has `freeze.unfreeze` and `finetune.adapter`: what adapters stand in for cannot thaw beside them, so "
                "leave out one of the two"
            )
        mistakes += self._data_that_lacks() + self._not_streamed()
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self

    def _not_streamed(self) -> list[str]:
        """What a stream of training rows cannot give."""
        if not self.data.stream:
            return []
        mistakes = []
        for name in ("pretrain", "finetune"):
            section = getattr(self, name)
            if name in self.plan and section is not None and section.steps is None:
                mistakes.append(
                    f"has `data.stream`, but no `{name}.steps`: a stream has no end that epochs could count"
                )
        if self.freeze is not None and self.freeze.by_evidence:
            mistakes.append("has `freeze.blocks: auto`, which compares depths on the same rows: not with `data.stream`")
        if self.freeze is not None and self.freeze.cache is True:
            mistakes.append("has `freeze.cache: true`, but rows of a stream come once: not with `data.stream`")
        if self.pretrain is not None and not isinstance(self.pretrain.tokenizer, str | None):
            mistakes.append("trains a tokenizer, for which it needs all text at once: not with `data.stream`")
        if self.task == "classify":
            mistakes.append("classifies, for which all labels have to be known before: not with `data.stream`")
        return mistakes

    def _data_that_lacks(self) -> list[str]:
        """The stages that have nothing to work on."""
        mistakes = []
        if self.data.train is None and "finetune" in self.plan:
            mistakes.append("needs `data.train`, the URI of rows: the stage `finetune` learns from them")
        if self.data.eval is not None:
            return mistakes
        if "evaluate" in self.plan and self.data.train is not None:
            mistakes.append("has the stage `evaluate`, but `data.eval` is null: there is nothing to score on")
        for name in ("pretrain", "finetune"):
            section = getattr(self, name)
            if name in self.plan and section is not None and section.eval_every is not None:
                mistakes.append(f"has `{name}.eval_every`, but `data.eval` is null: there is nothing to evaluate on")
        return mistakes

    @property
    def plan(self) -> tuple[str, ...]:
        """The stages to run, in order: those that are named, or those that the recipe has something for."""
        if self.stages:
            return self.stages
        absent = {"pretrain": self.pretrain is None, "freeze": self.freeze is None}
        return tuple(stage for stage in STAGES if not absent.get(stage, False))


def result_keys(section: BaseModel | None) -> dict[str, Any]:
    """The part of a section that decides what a stage computes, as JSON values; what is absent is left out."""
    if section is None:
        return {}
    fields = type(section).model_fields
    extra = {name: field.json_schema_extra for name, field in fields.items()}
    found = section.model_dump(mode="json", exclude_none=True)
    return {key: value for key, value in found.items() if extra.get(key) != NO_RESULT}
