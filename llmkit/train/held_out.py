"""The loss on held-out data, while a model is being trained."""

from __future__ import annotations

from typing import Any

import torch

from llmkit.data.batches import by_length
from llmkit.data.corpus import Corpus
from llmkit.data.states import CorpusWithStates
from llmkit.model.objective import Objective, to_device
from llmkit.model.precision import autocast
from llmkit.train.micro_batches import cut_corpus


def held_out_loss(
    accelerator: Any,
    model: Any,
    objective: Objective,
    corpus: Corpus | CorpusWithStates,
    size_column: str,
    precision: str,
    *,
    batch_size: int,
    tokens: int | None,
) -> float:
    """The mean loss over everything supervised in a corpus, over all processes, at most so many tokens at once.

    Leaves the model in evaluation mode.
    """
    model.eval()
    device = accelerator.device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    lengths, padded = corpus.lengths(size_column), objective.padded
    parts = [
        part
        for numbers in by_length(lengths, batch_size)
        for part in cut_corpus(corpus, numbers.tolist(), lengths, padded=padded, tokens=tokens)
    ]
    with torch.inference_mode(), objective.computing(), autocast(device, precision):
        for numbers in parts[accelerator.process_index :: accelerator.num_processes]:
            batch = objective.collate([corpus[int(number)] for number in numbers])
            loss = objective.loss(model, to_device(batch, device)).item()
            sums += torch.tensor([loss, objective.count(batch)], dtype=torch.float64, device=device)
    total, count = accelerator.reduce(sums, "sum").tolist()
    return float(total / count)
