"""Training a tokenizer on the text that a model is to learn from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

END = "<|end|>"
PAD = "<|pad|>"
UNKNOWN = "<|unknown|>"
_WORD_BYTES = 200


def train_tokenizer(texts: Iterable[str], kind: str, vocab_size: int) -> Any:
    """A fast tokenizer of `vocab_size` entries or fewer; `kind` is bpe, unigram or wordpiece.

    All three work on bytes, so that no text is unknown to them and decoding gives back what was encoded.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model: Any
    trainer: Any
    if kind == "bpe":
        model = models.BPE()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[END, PAD], initial_alphabet=alphabet, show_progress=False
        )
    elif kind == "unigram":
        model = models.Unigram()
        trainer = trainers.UnigramTrainer(
            vocab_size=vocab_size,
            special_tokens=[END, PAD, UNKNOWN],
            initial_alphabet=alphabet,
            unk_token=UNKNOWN,
            show_progress=False,
        )
    else:
        model = models.WordPiece(unk_token=UNKNOWN, max_input_chars_per_word=_WORD_BYTES)
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            special_tokens=[END, PAD, UNKNOWN],
            initial_alphabet=alphabet,
            continuing_subword_prefix="",
            show_progress=False,
        )
    tokenizer = Tokenizer(model)
    bytes_as_characters = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # WordPiece takes the longest entry that fits, again and again; it gives up on words over its limit, and slows with
    # the square of their length.
    short_words = [pre_tokenizers.FixedLength(_WORD_BYTES)] if kind == "wordpiece" else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([bytes_as_characters, *short_words])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainer)
    unknown = {} if kind == "bpe" else {"unk_token": UNKNOWN}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False, **unknown
    )
