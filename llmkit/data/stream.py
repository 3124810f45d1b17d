"""Data without a known end, block by block: each block is told by a position, and leads to the next one.

A position is a JSON value: for each source the file that is read, how far (bytes of JSON Lines, rows of anything else), the
lines before that, and how often the source has been read to its end. A source that ends begins again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.data.gather import Gathered, Request, RowPart, RowSet, add_up, format_of
from llmkit.data.pieces import Piece, is_seekable, next_range, pieces_of
from llmkit.data.rows import RowFormat
from llmkit.data.shards import Cleaning, CleaningTask, RowShard, clean
from llmkit.data.sources import files_of
from llmkit.data.storage import DataFile
from llmkit.errors import DataError

BLOCK_BYTES = 8 << 20
Position = list[dict[str, int]]
_START = {"file": 0, "offset": 0, "line": 0, "passes": 0}


class Stream:
    """Some sources, of which every block holds a share by weight."""

    def __init__(
        self, requests: Sequence[Request], kind: str, filters: Sequence[Any], block_bytes: int = BLOCK_BYTES
    ) -> None:
        """Raises DataError when a source cannot be read, or its rows are of no known format."""
        self._requests = requests
        self._kind, self._filters, self._block_bytes = kind, filters, block_bytes
        self._files = [files_of(request.uri, request.format) for request in requests]
        self.formats: dict[str, RowFormat] = {}
        for request in requests:
            chosen = format_of(request, pieces_of(request.uri, request.format), kind)
            if chosen is None:
                raise DataError("a stream has no row that can be read", got=request.uri, where=request.uri)
            self.formats[request.uri] = chosen

    @property
    def start(self) -> Position:
        """Where the first block begins."""
        return [dict(_START) for _ in self._requests]

    def block(self, position: Position, folder: Path) -> tuple[Gathered, Position]:
        """The rows of the block at a position, kept in a folder, and the position of the next block."""
        gathered = Gathered(formats=self.formats)
        shards: list[RowShard] = []
        after: Position = []
        weights = sum(request.weight for request in self._requests)
        for number, (request, files, place) in enumerate(zip(self._requests, self._files, position, strict=True)):
            cleaning = Cleaning(self._kind, self.formats[request.uri], tuple(self._filters))
            wanted, here = int(self._block_bytes * request.weight / weights), dict(place)
            begun = here["passes"]
            while wanted > 0:
                piece, reached = _next_piece(request, files, here, wanted)
                shard = RowShard(clean(CleaningTask(piece, cleaning, folder / f"{number:03}-{len(shards):05}", number)))
                here = _after(here, piece, reached, shard, files)
                shards.append(shard)
                wanted -= max(1, reached - piece.start if piece.end is not None else int(shard.row_bytes.sum()))
                if here["passes"] > begun + 1:  # read from end to end, whatever it gave: enough for a block
                    break
            after.append(here)
        add_up(gathered, shards)
        gathered.rows = RowSet(tuple(RowPart(shard, np.arange(len(shard)), 1.0) for shard in shards))
        if not len(gathered.rows):
            uris = ", ".join(request.uri for request in self._requests)
            raise DataError("a block of the stream has no row that can be used", got=uris, where=uris)
        return gathered, after


def _next_piece(request: Request, files: list[DataFile] | None, here: dict[str, int], wanted: int) -> tuple[Piece, int]:
    """What to read next, and how far in bytes that goes where bytes are counted."""
    if files is None:
        return Piece(request.uri, format=request.format, skip=here["offset"], most_chars=wanted), 0
    file = files[here["file"]]
    if not is_seekable(file):
        return Piece(request.uri, (file,), format=request.format, skip=here["offset"], most_chars=wanted), 0
    end = next_range(file, here["offset"], wanted)
    return Piece(request.uri, (file,), here["offset"], end, here["line"], alone=False), end


def _after(
    here: dict[str, int], piece: Piece, reached: int, shard: RowShard, files: list[DataFile] | None
) -> dict[str, int]:
    """The place behind a piece: in the same file, or at the start of the next one where there was nothing more."""
    if piece.end is not None and reached > piece.start:
        return here | {"offset": reached, "line": here["line"] + _lines(piece)}
    if piece.end is None and shard.facts["read"]:
        return here | {"offset": here["offset"] + shard.facts["read"]}
    last = files is None or here["file"] + 1 == len(files)
    return dict(_START) | {"file": 0 if last else here["file"] + 1, "passes": here["passes"] + last}


def _lines(piece: Piece) -> int:
    with piece.files[0].open_stored() as stored:
        stored.seek(piece.start)
        left, lines = (piece.end or 0) - piece.start, 0
        while left > 0 and (chunk := stored.read(min(left, 1 << 20))):
            left -= len(chunk)
            lines += chunk.count(b"\n")
        return lines
