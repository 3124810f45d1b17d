"""Scores of predicted tokens: `loss` is summed over an example's `tokens`, in nats; a field of one number an example."""

from __future__ import annotations

import math

import numpy as np

from llmkit.metrics.statistic import Metric, NoValueError, Predictions, Sums, ratio_of

_LARGEST_EXPONENT = 700.0  # of what a double can hold


def _a_token(predictions: Predictions) -> Sums:
    if "tokens" not in predictions:
        return ratio_of(predictions.everything(), predictions["loss"], np.ones(len(predictions)))
    return ratio_of(predictions.everything(), predictions["loss"], predictions["tokens"])


def _perplexity(predictions: Predictions) -> Sums:
    return ratio_of(
        predictions.everything(),
        predictions["loss"],
        predictions["tokens"],
        lambda loss: np.exp(np.minimum(loss, _LARGEST_EXPONENT)),
    )


def _bits_per_byte(predictions: Predictions) -> Sums:
    if not np.sum(predictions["bytes"]):
        raise NoValueError("the texts have no bytes: their tokenizer does not tell which bytes a token stands for")
    return ratio_of(
        predictions.everything(), predictions["loss"], predictions["bytes"], lambda nats: nats / math.log(2)
    )


def _token_accuracy(predictions: Predictions) -> Sums:
    return ratio_of(predictions.everything(), predictions["correct"], predictions["tokens"])


LOSS = Metric(("loss",), _a_token, lower_is_better=True)
PERPLEXITY = Metric(("loss", "tokens"), _perplexity, lower_is_better=True)
BITS_PER_BYTE = Metric(("loss", "bytes"), _bits_per_byte, lower_is_better=True)
TOKEN_ACCURACY = Metric(("correct", "tokens"), _token_accuracy)
