"""The loss on held-out data, while a model is being trained."""

from __future__ import annotations

from typing import Any

import torch

from llmkit.data.batches import by_length
from llmkit.data.corpus import Corpus
from llmkit.data.states import CorpusWithStates
from llmkit.model.objective import Objective, to_device
from llmkit.model.precision import autocast
from llmkit.train.masters import Masters
from llmkit.train.micro_batches import cut_corpus


def held_out_loss(
    accelerator: Any,
    masters: Masters,
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
    masters.model.eval()
    device = accelerator.device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    lengths, padded = corpus.lengths(size_column), objective.padded
    parts = [
        part
        for numbers in by_length(lengths, batch_size)
        for part in cut_corpus(corpus, numbers.tolist(), lengths, padded=padded, tokens=tokens)
    ]
    mesh = masters.mesh_among(accelerator)
    mine = parts[mesh.share :: mesh.shares]
    more = -(-len(parts) // mesh.shares) - len(mine) if masters.sharded else 0  # as many as the others
    gradless = torch.no_grad() if masters.sharded else torch.inference_mode()
    with gradless, masters.computing(objective), autocast(device, precision):
        for numbers, weight in [*((numbers, 1) for numbers in mine), *[(parts[0], 0)] * more]:
            batch = objective.collate([corpus[int(number)] for number in numbers])
            loss = masters.call(objective.loss, to_device(batch, device)).item()
            sums += weight * torch.tensor([loss, objective.count(batch)], dtype=torch.float64, device=device)
    sums *= mesh.speaks
    total, count = accelerator.reduce(sums, "sum").tolist()
    return float(total / count)
