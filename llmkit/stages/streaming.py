"""Blocks of a stream as examples, while they are learnt from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from llmkit.data.corpus import Corpus, CorpusWriter
from llmkit.data.stream import Position
from llmkit.errors import DataError
from llmkit.recipe.values import count_of
from llmkit.stages.encoding import SOURCE, Encoding, EncodingTask, encode_part
from llmkit.stages.job import TrainingJob
from llmkit.stages.rows import stream_of
from llmkit.train.loop import batch_order
from llmkit.train.stream import StreamedExamples


class BlockMaker:
    """Makes the examples of a block: a pure function of its position."""

    def __init__(self, job: TrainingJob) -> None:
        data = job.recipe.data
        assert data.train is not None, "the schema asks for it"
        self._stream = stream_of(data, data.train, job.task.kind)
        self._task = job.task
        self._most_rejected = data.max_rejected
        tokenizer = job.run.folder("preprocess") / "tokenizer"
        self._encoding = Encoding(
            job.recipe.task, tokenizer, job.task.settings, augment=data.augment, seed=job.recipe.seed
        )

    @property
    def start(self) -> Position:
        """Where the stream begins."""
        return self._stream.start

    def __call__(self, position: Position, folder: Path) -> tuple[Corpus, Position]:
        """The examples of the block at a position, kept in a folder, and the position of the next block.

        Raises DataError when more of its rows are unusable than `data.max_rejected` allows.
        """
        shutil.rmtree(folder, ignore_errors=True)
        gathered, after = self._stream.block(position, folder / "rows")
        rejected = dict(gathered.rejected)
        writer = CorpusWriter(folder / "examples", {**self._task.columns, "source": SOURCE})
        uris = list(dict.fromkeys(part.shard.facts["uri"] for part in gathered.rows.parts))
        for number, part in enumerate(gathered.rows.parts):
            source = uris.index(part.shard.facts["uri"])
            work = EncodingTask(part, source, folder / f"{number:05}", self._encoding)
            encoded = Corpus(encode_part(self._task, work))
            writer.add_all(encoded)
            rejected |= encoded.meta["rejected"]
        self._refuse_too_many(rejected, gathered.read)
        return writer.finish({}), after

    def _refuse_too_many(self, rejected: dict[str, Any], read: int) -> None:
        total = sum(count for count, _ in rejected.values())
        if total > count_of(self._most_rejected, read):
            reason, (count, where) = max(rejected.items(), key=lambda entry: entry[1][0])
            raise DataError(
                f"{total} of {read} rows of a block of the stream cannot be used",
                got=f"{count} x {reason}",
                expected=f"data.max_rejected: {self._most_rejected}",
                hint="mend them, or raise data.max_rejected",
                where=where,
            )


def streamed_examples(job: TrainingJob, process: int, *, padded: bool) -> StreamedExamples:
    """The training rows of a recipe as a stream; every process reads it for itself."""
    make = BlockMaker(job)
    folder = job.run.folder(job.stage) / f"stream-{process}"
    shutil.rmtree(folder, ignore_errors=True)
    return StreamedExamples(
        make,
        make.start,
        folder,
        job.task.size_column,
        lambda lengths, step: batch_order(job.training, lengths, job.recipe.seed + step, padded=padded),
    )
