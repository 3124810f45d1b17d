"""The keys of the stages that train."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from llmkit.recipe.fields import (
    NO_RESULT,
    Duration,
    DurationOrSteps,
    Parts,
    Rate,
    Section,
    ShareOrCount,
    Sources,
    as_blocks,
    named,
)


class _Named(BaseModel):
    """A name of the catalogue, and the options of what it stands for, which is what checks them."""

    model_config = ConfigDict(extra="allow", frozen=True)

    @property
    def options(self) -> dict[str, Any]:
        """Everything but the name."""
        return dict(self.model_extra or {})


class Optimizer(_Named):
    """An optimizer by name, and its own options."""

    name: Annotated[str, BeforeValidator(named("optimizer"))] = "adamw"


class Schedule(_Named):
    """A schedule of the learning rate by name, and its own options."""

    name: Annotated[str, BeforeValidator(named("schedule"))] = "cosine"


def _as_named(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


class EarlyStopping(Section):
    """Ends training when the held-out loss stops falling."""

    patience: int = Field(3, gt=0, description="evaluations without a better held-out loss before training ends")
    min_delta: float = Field(0.0, ge=0, description="how much lower a loss must be to count as better")


class Divergence(Section):
    """What to do at a step whose loss or gradient is not finite, or whose loss is far above those before it."""

    nan: Literal["stop", "skip", "rollback"] = Field(
        "stop", description="a loss or gradient that is not finite: end, leave the batch out, or go back and pass it by"
    )
    spike: Literal["off", "warn", "skip", "rollback", "stop"] = Field("warn", description="a loss far above others")
    spike_z: float = Field(10.0, gt=0, description="robust z-score from which a loss counts as a spike")
    window: int = Field(64, ge=16, description="steps whose losses it is compared with")
    limit: int = Field(3, gt=0, description="steps that may be refused before training stops")


class LocalSteps(Section):
    """Processes train apart for some steps, and then average what they have learnt."""

    every: int = Field(16, gt=1, description="steps after which the processes' weights are averaged")
    outer_lr: float = Field(
        1.0, gt=0, le=2, description="share of the way to their mean; DiLoCo takes 0.7 with momentum"
    )
    outer_momentum: float = Field(0.0, ge=0, lt=1, description="Nesterov's, on that way; DiLoCo takes 0.9")


class PartRate(Parts):
    """The peak rate of parts of the model."""

    lr: float | None = Field(None, gt=0)
    lr_scale: float | None = Field(None, gt=0, description="times the rate that they would have")

    @model_validator(mode="after")
    def _one_rate(self) -> PartRate:
        if not self.says_something:
            raise ValueError("names no part: give blocks, embeddings, head, norms or patterns")
        if (self.lr is None) == (self.lr_scale is None):
            raise ValueError("takes `lr` or `lr_scale`, one of the two")
        return self


class Training(Section):
    """What pretraining and fine-tuning have in common."""

    epochs: float | None = Field(None, gt=0)
    steps: int | None = Field(None, gt=0, description="optimizer steps; in place of epochs")
    batch_size: int | None = Field(None, gt=0, description="examples a step, over all processes [8]")
    batch_tokens: int | None = Field(
        None, gt=0, description="tokens a step, on average, over all processes; in place of batch_size"
    )
    micro_batch_size: int | None = Field(
        None, gt=0, description="examples a process computes at once, at most", json_schema_extra=NO_RESULT
    )
    micro_batch_tokens: Literal["auto"] | Annotated[int, Field(gt=0)] = Field(
        "auto",
        description="tokens a process computes at once, at most, one example always; auto: what memory holds",
        json_schema_extra=NO_RESULT,
    )
    activation_checkpointing: bool = Field(
        False,
        description="keep only what enters each block, and compute it again in the backward: less memory, slower",
        json_schema_extra=NO_RESULT,
    )
    compile: bool = Field(
        False,
        description="compile the blocks with torch.compile: a slow start, for GPUs",
        json_schema_extra=NO_RESULT,
    )
    dropout: float | None = Field(None, ge=0, lt=1, description="in place of every dropout rate of the model's config")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over all classes")
    neftune_alpha: float = Field(
        0.0, ge=0, description="size of the noise on embeddings (NEFTune: 5 to 15); 0 for none"
    )
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of an average of the weights, such as 0.999, which becomes the model"
    )
    layer_decay: float | None = Field(
        None, gt=0, le=1, description="each block learns at this share of the rate of the block above it"
    )
    rates: tuple[PartRate, ...] = Field(
        (), description="rates of parts of the model, as `[{head: true, lr_scale: 10}, {blocks: 20-29, lr: 1.0e-5}]`"
    )
    schedule: Annotated[Schedule, BeforeValidator(_as_named)] = Schedule()
    warmup: ShareOrCount = Field("3%", description="of the steps, or a number of steps")
    optimizer: Annotated[Optimizer, BeforeValidator(_as_named)] = Optimizer()
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float | None = Field(1.0, gt=0, description="gradients are scaled down to this norm; null for never")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    eval_every: int | None = Field(None, gt=0, description="steps between evaluations; at the end only when absent")
    early_stopping: EarlyStopping | None = None
    keep: Literal["best", "last"] = Field(
        "best", description="which weights become the model: by held-out loss, or last"
    )
    save_every: DurationOrSteps = Field("10min", description="or a number of steps", json_schema_extra=NO_RESULT)
    lose_at_most: Duration | None = Field(
        None,
        description="in place of save_every: save so often that a crash loses at most this much time",
        json_schema_extra=NO_RESULT,
    )
    keep_checkpoints: int = Field(2, gt=0, description="newest checkpoints to keep", json_schema_extra=NO_RESULT)
    keep_every: int | None = Field(
        None,
        gt=0,
        description="checkpoints after a multiple of so many steps stay for good",
        json_schema_extra=NO_RESULT,
    )
    divergence: Divergence = Divergence()
    local: LocalSteps | None = Field(
        None, description="several processes train apart and average their weights at times"
    )
    log_every: int = Field(10, gt=0, description="steps", json_schema_extra=NO_RESULT)
    trackers: tuple[str, ...] = Field(("tensorboard",), description="of Accelerate", json_schema_extra=NO_RESULT)

    @model_validator(mode="after")
    def _consistent(self) -> Training:
        mistakes = []
        if self.epochs is not None and self.steps is not None:
            mistakes.append("takes `epochs` or `steps`, not both")
        if self.batch_size is not None and self.batch_tokens is not None:
            mistakes.append("takes `batch_size` or `batch_tokens`, not both")
        if self.early_stopping is not None and self.eval_every is None:
            mistakes.append("`early_stopping` needs `eval_every`, the number of steps between evaluations")
        if self.lose_at_most is not None and self.save_every != type(self).model_fields["save_every"].default:
            mistakes.append("takes `save_every` or `lose_at_most`, not both")
        by_time = isinstance(self.save_every, str) or self.lose_at_most is not None
        if by_time and "rollback" in (self.divergence.nan, self.divergence.spike):
            mistakes.append("`divergence: rollback` needs `save_every` as a number of steps, so that it is exact")
        if self.schedule.name == "plateau" and self.eval_every is None:
            mistakes.append("`schedule: plateau` needs `eval_every`, the number of steps between evaluations")
        if self.local is not None and self.ema is not None:
            mistakes.append("takes `local` or `ema`, not both: what is averaged apart is no average of the whole")
        if self.local is not None and self.precision == "fp16":
            mistakes.append("takes `local` with `precision: bf16` or `fp32`")
        if self.local is not None and (self.eval_every or 0) % self.local.every:
            mistakes.append(
                "`eval_every` must be a multiple of `local.every`: in between there is no one model to score"
            )
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self


class Tokenizer(Section):
    """A tokenizer to train on the pretraining text."""

    train: Literal["bpe", "unigram", "wordpiece"] = "bpe"
    vocab_size: int = Field(8192, ge=300)


def _as_tokenizer(value: object) -> object:
    return value if not isinstance(value, Tokenizer) else value.model_dump()


class Pretrain(Training):
    """Learning from plain text: from scratch when `architecture` is given, else from the recipe's model."""

    data: Sources | None = Field(None, description="plain text; data.train when absent")
    architecture: dict[str, Any] | None = Field(None, description="a Transformers config: model_type and sizes")
    tokenizer: Annotated[str | Tokenizer | None, BeforeValidator(_as_tokenizer)] = Field(
        None, description="URI of a model to take it from, or {train: bpe, vocab_size: 8192}"
    )
    max_length: int | None = Field(None, gt=1, description="tokens a window; data.max_length when absent")
    lr: Rate = "auto"

    @field_validator("architecture")
    @classmethod
    def _names_a_type(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None and not isinstance(value.get("model_type"), str):
            raise ValueError("should have `model_type`, the name of a Transformers architecture such as gpt2")
        return value


class Adapter(Section):
    """Small matrices that learn beside the products of blocks that stand still."""

    name: Literal["lora", "rslora", "dora", "qlora"] = Field(
        "lora", description="qlora: lora on top of linear layers that are held in 4 bits (NF4)"
    )
    rank: int = Field(16, gt=0)
    alpha: int = Field(32, gt=0, description="the adapter counts alpha / rank times, with rslora alpha / sqrt(rank)")
    dropout: float = Field(0.0, ge=0, lt=1, description="of what goes into an adapter")
    targets: Literal["attention", "mlp", "all"] = Field("all", description="which linear layers of a block")
    blocks: Annotated[str | None, BeforeValidator(as_blocks)] = Field(
        None, description="blocks that get adapters; all that `freeze` does not name when absent"
    )
    start: str | None = Field(
        None,
        min_length=1,
        description="an adapter to go on from: a folder with adapter_config.json, which says all else",
    )

    @model_validator(mode="after")
    def _all_from_the_start(self) -> Adapter:
        fields = type(self).model_fields.items()
        said = [key for key, field in fields if key != "start" and getattr(self, key) not in (field.default, "qlora")]
        if self.start is not None and said:
            raise ValueError(f"takes `start`, whose adapter_config.json says all else: leave out {', '.join(said)}")
        return self


class Finetune(Training):
    """Learning the task, gently."""

    adapter: Annotated[Adapter | None, BeforeValidator(_as_named)] = Field(
        None, description="lora, rslora, dora or qlora, or a mapping with `name` and options"
    )
    lr: Rate = Field("auto", description="the parent's peak rate times lr_scale, or a number")
    lr_scale: float = Field(0.1, gt=0)
    l2_sp: float = Field(
        0.0, ge=0, description="pull towards the parent's weights, as weight_decay pulls towards zero (L2-SP)"
    )
