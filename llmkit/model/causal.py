"""What a causal model can be asked to do, found out by trying: attend within packed examples, and give its hidden states.

Nothing is believed because of a family's name: each ability is compared with the model's plain forward, on the model
itself, with a few short examples.

Shapes: B rows, T tokens, D hidden size, V words, S positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llmkit.model.attention import attention
from llmkit.model.loading import dropout_rates
from llmkit.model.packing import Pack, pack
from llmkit.model.precision import default_device

_LENGTHS = (5, 9, 3)  # tokens of the examples to try
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class CausalModel:
    """A causal language model and what it can do.

    `packs` is True when examples may follow each other in one row, `shares` when they may have their common beginning
    there only once; `logits` gives hidden states' logits, (S, D) to (S, V), or is None when only the whole forward has
    them right. `why` says what stands against packing.
    """

    model: Any
    packs: bool
    logits: Callable[[torch.Tensor], torch.Tensor] | None
    why: str | None = None
    shares: bool = False

    @property
    def head_weights(self) -> tuple[torch.nn.Parameter, ...]:
        """The parameters that `logits` uses."""
        return tuple(self.model.get_output_embeddings().parameters())

    @property
    def arguments(self) -> frozenset[str]:
        """What the model's forward takes by name."""
        return _arguments(self.model)


@torch.no_grad()
def read_causal_model(model: Any) -> CausalModel:
    """Tries what a model can do; its mode stays. On the meta device only its structure can be looked at."""
    if model.device.type == "meta":
        why = _structure_against_packing(model)
        shares = why is None and _may_share(model.config, default_device())
        return CausalModel(model, why is None, _output_layer(model), why, shares)
    was_training = model.training
    model.eval()
    try:
        plain, hidden = _plain_forward(model)
        logits = _output_layer(model)
        if logits is not None and not _gives(logits, hidden, plain):
            logits = None
        why = _why_not_packed(model, plain)
        shares = why is None and _may_share(model.config, model.device) and _shares(model)
    finally:
        model.train(was_training)
    return CausalModel(model, why is None, logits, why, shares)


def _examples(model: Any) -> list[torch.Tensor]:
    words = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(words, (1, n), generator=generator).to(model.device) for n in _LENGTHS]


def _plain_forward(model: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """All logits and hidden states of the examples, each alone: (S, V) and (S, D)."""
    examples = _examples(model)
    logits = torch.cat([model(input_ids=ids, use_cache=False).logits[0] for ids in examples])
    body = model.base_model
    if body is model:
        return logits, None
    outputs = [body(input_ids=ids, use_cache=False) for ids in examples]
    if not hasattr(outputs[0], "last_hidden_state"):
        return logits, None
    return logits, torch.cat([output.last_hidden_state[0] for output in outputs])


def _output_layer(model: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The output embeddings, with the scale and the cap on logits that a config may name."""
    head = model.get_output_embeddings()
    if head is None:
        return None
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    cap = getattr(config, "final_logit_softcapping", None)

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = head(hidden)
        found = found if scale == 1.0 else found * scale
        return found if not cap else torch.tanh(found / cap) * cap

    return logits


def _structure_against_packing(model: Any) -> str | None:
    """What a model's class and config say against packing, or None."""
    config = model.config.get_text_config()
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention cannot be replaced"
    if "position_ids" not in _arguments(model):
        return "it takes no positions"
    other = set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYERS
    if other or getattr(config, "attention_chunk_size", None):
        return f"it has layers of {', '.join(sorted(other)) or 'chunked attention'}"
    return None


def _why_not_packed(model: Any, plain: torch.Tensor) -> str | None:
    """Why examples cannot be packed, or None when they can."""
    if why := _structure_against_packing(model):
        return why
    try:
        found = _packed_forward(model, pack([ids[0].cpu().numpy() for ids in _examples(model)], share=False))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        return str(error).partition("\n")[0]
    return None if _alike(found, plain) else "packed examples see each other, or other positions"


def _may_share(config: Any, device: torch.device) -> bool:
    """Not with dropout, which is another for each example; and a GPU's attention has no common beginning."""
    elsewhere = ("summary", "classifier")  # heads that a language model has not
    rates = {name: rate for name, rate in dropout_rates(config).items() if not name.startswith(elsewhere)}
    return device.type == "cpu" and not any(rates.values())


def _shares(model: Any) -> bool:
    """True when examples with a common beginning give the same logits whether it is there once or twice."""
    words = model.get_input_embeddings().weight.shape[0]
    generator = np.random.default_rng(0)
    beginning = generator.integers(words, size=11)
    rows = [np.concatenate([beginning, generator.integers(words, size=length)]) for length in _LENGTHS]
    alone = [model(input_ids=torch.from_numpy(row[None]), use_cache=False).logits[0, len(beginning) :] for row in rows]
    try:
        packed = pack(rows, share=True)
        return _alike(_packed_forward(model, packed)[packed.shared :], torch.cat(alone))
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False


def _packed_forward(model: Any, packed: Pack) -> torch.Tensor:
    """All logits of a packed row, (T, V)."""
    with attention(model, packed=True):
        found: torch.Tensor = model(use_cache=False, **packed.inputs(model.device)).logits[0]
    return found


def _gives(logits: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor | None, plain: torch.Tensor) -> bool:
    """True when logits of hidden states are those of the whole model; some have more between the two."""
    if hidden is None:
        return False
    try:
        return _alike(logits(hidden), plain)
    except RuntimeError:  # other shapes
        return False


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal but for rounding, which is coarse in bf16."""
    if one.shape != other.shape:
        return False
    tolerance = 1e-3 if other.dtype == torch.float32 else 0.1
    difference = (one.float() - other.float()).abs().max()
    return bool(difference <= tolerance * other.float().abs().max().clamp(min=1e-6))


def _arguments(model: Any) -> frozenset[str]:
    return frozenset(inspect.signature(model.forward).parameters)
