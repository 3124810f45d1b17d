"""Language modelling on plain text. Metrics: loss in nats a token, perplexity, bits a byte."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np

from llmkit.data.corpus import Column, Corpus, Example
from llmkit.tasks.base import Encoded, Fields
from llmkit.tasks.causal import CausalTask


class TextTask(CausalTask):
    """Every token of a document is supervised.

    A document longer than max_length becomes several windows. A window starts with the last token of the one before, so
    that every token but a document's first is predicted exactly once and none is cut off.
    """

    kind: ClassVar[str] = "text"
    metrics: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "bits_per_byte")

    @property
    def columns(self) -> dict[str, Column]:
        """Also `text_bytes`: the UTF-8 bytes that a window's supervised tokens stand for."""
        return super().columns | {"text_bytes": Column("int64", ragged=False)}

    def describe(self) -> dict[str, Any]:
        """The window size and the token that ends a document."""
        return {"max_length": self.settings.max_length, "end": self.tokenizer.eos_token}

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[Encoded | str]:
        """Documents as windows; the tokenizer's own special tokens come first, its end token last."""
        texts = [row["text"] for row in rows]
        if self._bytes_of_tokens is None:
            return self._encode_by_offsets(texts)
        fast = self.tokenizer.backend_tokenizer
        fast.no_truncation()
        fast.no_padding()
        encodings = fast.encode_batch_fast(texts)  # which keeps no offsets
        special = fast.num_special_tokens_to_add(False) > 0
        found = []
        for text, encoding in zip(texts, encodings, strict=True):
            ids = np.array(encoding.ids, np.int64)
            widths = self._bytes_of_tokens[ids]
            if special:
                widths[np.array(encoding.special_tokens_mask, bool)] = 0
            reached = np.minimum(np.cumsum(widths), len(text.encode()))
            reached[-1:] = len(text.encode())
            found.append(self._windows(ids, np.diff(reached, prepend=0)))
        return found

    @cached_property
    def _bytes_of_tokens(self) -> np.ndarray | None:
        """How many bytes each token stands for; None where only the tokenizer's offsets tell."""
        if not self.tokenizer.is_fast:
            return None
        decoder = json.loads(self.tokenizer.backend_tokenizer.to_str())["decoder"] or {}
        if decoder.get("type") != "ByteLevel":
            return None
        added = {token.content for token in self.tokenizer.added_tokens_decoder.values()}
        vocabulary = self.tokenizer.get_vocab()
        widths = np.zeros(max(vocabulary.values()) + 1, np.int64)
        for token, number in vocabulary.items():  # a character of a byte-level token is a byte
            widths[number] = len(token.encode() if token in added else token)
        return widths

    def _encode_by_offsets(self, texts: list[str]) -> list[Encoded | str]:
        encodings = self.tokenizer(texts, return_offsets_mapping=self.tokenizer.is_fast, verbose=False)
        return [
            self._windows(np.array(ids, np.int64), self._token_bytes(text, encodings, number))
            for number, (text, ids) in enumerate(zip(texts, encodings["input_ids"], strict=True))
        ]

    def predictions(
        self, corpus: Corpus, numbers: np.ndarray, fields: Fields, answers: Mapping[int, str]
    ) -> dict[str, Any]:
        """The sums, and the bytes of each window; the document's end token counts in the loss, not in the bytes."""
        return fields | {"bytes": np.asarray(corpus.values("text_bytes"))[numbers]}

    def shown(self, corpus: Corpus, number: int) -> dict[str, str]:
        """The text of a window."""
        return {"text": self.tokenizer.decode(corpus[number]["input_ids"], skip_special_tokens=True)}

    def _windows(self, ids: np.ndarray, widths: np.ndarray) -> Encoded | str:
        """The windows of one document, from its token ids and the bytes that each stands for, both (T,)."""
        end = self.tokenizer.eos_token_id
        if end is not None and (not len(ids) or ids[-1] != end):
            ids, widths = np.append(ids, end), np.append(widths, 0)
        if len(ids) < 2:
            return "text has fewer than two tokens: nothing to predict"
        stride = self.settings.max_length - 1
        examples: list[Example] = []
        for start in range(0, len(ids) - 1, stride):
            part = ids[start : start + stride + 1]
            supervised = np.ones(len(part), bool)
            supervised[0] = False
            text_bytes = int(widths[start + 1 : start + stride + 1].sum())
            examples.append({"input_ids": part, "supervised": supervised, "text_bytes": text_bytes})
        return Encoded(examples)

    def _token_bytes(self, text: str, encodings: Any, index: int) -> np.ndarray:
        """How many bytes of the text each token stands for, all bytes in all; a slow tokenizer spreads them evenly."""
        count = len(encodings["input_ids"][index])
        if "offset_mapping" not in encodings:
            return np.diff(np.linspace(0, len(text.encode()), count + 1).astype(int))
        ends = [end for _, end in encodings["offset_mapping"][index]]
        ends[-1:] = [len(text)] if ends else []  # white space that the tokenizer trims off the end
        reached = np.maximum.accumulate([0, *ends])
        return np.array([len(text[a:b].encode()) for a, b in pairwise(reached)], np.int64)
