"""What a causal model is trained on: examples packed into one row, or padded where the model cannot keep them apart.

Shapes: B rows, T tokens, D hidden size, V words, S supervised tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from llmkit.data.corpus import Example
from llmkit.model.causal import CausalModel
from llmkit.model.context import Context
from llmkit.model.forward import fast_forward
from llmkit.model.objective import Batch
from llmkit.model.packing import pack
from llmkit.tasks.base import Regularisation, embedding_noise, padded_places, padded_rows
from llmkit.tasks.cross_entropy import losses_and_hits, summed_cross_entropy

_NOT_FOR_THE_MODEL = ("kept", "targets", "lengths", "places")


@dataclass(frozen=True)
class CausalObjective:
    """The next-token loss of one model. A batch's `kept` (S,) are the flat positions before the supervised tokens."""

    causal: CausalModel
    pad_id: int
    regularisation: Regularisation
    context: Context | None = None  # who shares each row

    @property
    def padded(self) -> bool:
        """True when examples of unlike length cost padding."""
        return not self.causal.packs

    @property
    def why_padded(self) -> str | None:
        """Why examples cannot be packed; None when they can."""
        return self.causal.why

    def shared_with(self, context: Context) -> CausalObjective | None:
        """The same with rows that processes share; None where they cannot."""
        cannot = not self.causal.packs or self.regularisation.neftune_alpha
        return None if cannot else replace(self, context=context)

    def computing(self, *, outline: bool = False) -> AbstractContextManager[None]:
        """To be entered around everything that computes with this objective's batches."""
        return fast_forward(self.causal.model, packed=self.causal.packs or outline, outline=outline)

    def collate(self, examples: Sequence[Example]) -> Batch:
        """One row of examples, (1, T), or rows padded on the right, (B, T), with `kept` and `targets`, both (S,).

        What stands after a token changes nothing for it: padding on the right needs no mask and no positions, and what
        comes after the last prediction is left out.
        """
        whole = [np.asarray(example["input_ids"], np.int64) for example in examples]
        supervised = [np.flatnonzero(np.asarray(example["supervised"])) for example in examples]
        supervised = [found[found > 0] for found in supervised]  # nothing stands before the first token to predict it
        rows = [row[: found[-1]] if len(found) else row[:1] for row, found in zip(whole, supervised, strict=True)]
        if self.causal.packs:
            share = self.causal.shares and not self.regularisation.neftune_alpha and self.context is None
            packed = pack(rows, share=share, fill=True, multiple=1 if self.context is None else self.context.pieces)
            batch: Batch = packed.inputs()
            places = [packed.places(number, np.arange(len(row))) for number, row in enumerate(rows)]
        else:
            ids, _ = padded_rows(rows, self.pad_id)
            batch = {"input_ids": torch.from_numpy(ids)}
            places = padded_places(rows)
        kept = [own[found - 1] for own, found in zip(places, supervised, strict=True)]
        batch["places"] = places
        batch["lengths"] = torch.tensor([len(row) for row in whole])
        batch["kept"] = torch.from_numpy(np.concatenate(kept))
        batch["targets"] = torch.from_numpy(
            np.concatenate([row[found] for row, found in zip(whole, supervised, strict=True)])
        )
        return batch if self.context is None else _part_of(batch, self.context)

    def count(self, batch: Batch) -> int:
        """The number of supervised tokens."""
        return len(batch["targets"])

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """The summed cross entropy of the supervised tokens, in nats."""
        smoothing = self.regularisation.label_smoothing if model.training else 0.0
        hidden, logits, weights = self._states(batch)
        return summed_cross_entropy(hidden, batch["targets"], logits, weights, smoothing)

    def losses_and_hits(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of each supervised token, and whether the model puts it first, both (S,)."""
        hidden, logits, weights = self._states(batch)
        return losses_and_hits(hidden, batch["targets"], logits, weights)

    def _states(self, batch: Batch) -> tuple[torch.Tensor, Any, tuple[torch.Tensor, ...]]:
        """Something for each supervised token, the function that makes logits of it, and its parameters."""
        model = self.causal.model
        inputs = {name: value for name, value in batch.items() if name not in _NOT_FOR_THE_MODEL}
        alpha = self.regularisation.neftune_alpha if model.training else 0.0
        with embedding_noise(model, batch, alpha) if alpha else nullcontext():
            kept = batch["kept"]
            if self.causal.logits is not None:
                states = model.base_model(**inputs, use_cache=False).last_hidden_state  # (B, T, D)
                return states.flatten(0, 1)[kept], self.causal.logits, self.causal.head_weights
            if self.causal.packs and "logits_to_keep" in self.causal.arguments:
                return model(**inputs, use_cache=False, logits_to_keep=kept).logits[0], _as_they_are, ()
            return model(**inputs, use_cache=False).logits.flatten(0, 1)[kept], _as_they_are, ()


def _part_of(batch: Batch, context: Context) -> Batch:
    """What one of the processes that share a row computes of it."""
    length = batch["input_ids"].numel()
    own = torch.from_numpy(context.places(length))
    place = torch.full((length,), -1)
    place[own] = torch.arange(len(own))
    kept = place[batch["kept"]]
    cut = {name: batch[name][:, own] for name in ("input_ids", "position_ids", "attention_mask")}
    return batch | cut | {"kept": kept[kept >= 0], "targets": batch["targets"][kept >= 0], "context": context}


def left_padded(rows: Sequence[np.ndarray], pad_id: int) -> Batch:
    """`input_ids`, `attention_mask` and `position_ids`, each (B, T)."""
    ids, mask = padded_rows(rows, pad_id, left=True)
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    arrays = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _as_they_are(logits: torch.Tensor) -> torch.Tensor:
    return logits
