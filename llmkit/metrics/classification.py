"""Scores of predicted labels. `actual` and `predicted` are label numbers, (N,); C classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llmkit.metrics.ranking import area_under_curves
from llmkit.metrics.statistic import Metric, NoValueError, Predictions, Sums, Weighted, mean_of


def classification_tables(actual: np.ndarray, predicted: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
    """The confusion matrix (rows are actual), and precision, recall, F1 and examples by label.

    A label that is never predicted has precision 0; one that neither side has is left out.
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    present = np.union1d(actual, predicted)
    found = precision_recall_fscore_support(actual, predicted, labels=present, zero_division=0)
    by_label = {
        labels[number]: {"precision": float(p), "recall": float(r), "f1": float(f), "examples": int(n)}
        for number, p, r, f, n in zip(present, *found, strict=True)
    }
    matrix = confusion_matrix(actual, predicted, labels=np.arange(len(labels))).tolist()
    return {"labels": list(labels), "confusion_matrix": matrix, "by_label": by_label}


def _accuracy(predictions: Predictions) -> Sums:
    right = (predictions["actual"] == predictions["predicted"]).astype(np.float64)
    return mean_of(predictions.everything(), right, share=True)


def _over_labels(score: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]) -> Callable[[Predictions], Sums]:
    """A macro average over the labels that the texts or the model have.

    `score` gives what is averaged of right, actual and predicted counts, each (..., C), and NaN for labels left out.
    """

    def make(predictions: Predictions) -> Sums:
        count = len(predictions.labels)
        actual, predicted = (np.eye(count)[predictions[name]] for name in ("actual", "predicted"))
        parts = np.concatenate([actual * predicted, actual, predicted], axis=1)

        def combine(sums: np.ndarray) -> np.ndarray:
            right, there, said = (sums[..., n * count : (n + 1) * count] for n in range(3))
            found = score(right, there, said)
            counted = ~np.isnan(found)
            return np.where(counted, found, 0.0).sum(axis=-1) / counted.sum(axis=-1)

        return Sums(predictions.everything(), parts, combine)

    return make


def _precision(right: np.ndarray, there: np.ndarray, said: np.ndarray) -> np.ndarray:
    return np.where(there + said > 0, right / np.maximum(said, 1e-300), np.nan)


def _recall(right: np.ndarray, there: np.ndarray, said: np.ndarray) -> np.ndarray:
    return np.where(there + said > 0, right / np.maximum(there, 1e-300), np.nan)


def _f1(right: np.ndarray, there: np.ndarray, said: np.ndarray) -> np.ndarray:
    return np.where(there + said > 0, 2 * right / np.maximum(there + said, 1e-300), np.nan)


def _balanced(right: np.ndarray, there: np.ndarray, said: np.ndarray) -> np.ndarray:
    return np.where(there > 0, right / np.maximum(there, 1e-300), np.nan)


def _roc_auc(predictions: Predictions) -> Weighted:
    """One label against the rest, averaged over the labels that some texts have and others have not."""
    actual, scores = predictions["actual"], predictions["log_probabilities"]
    there = [label for label in range(len(predictions.labels)) if 0 < np.sum(actual == label) < len(actual)]
    if not there:
        raise NoValueError("all examples have the same label: there is nothing to tell apart")
    curves = area_under_curves(np.stack([actual == label for label in there], axis=1), scores[:, there])
    return Weighted(predictions.everything(), curves, len(there), odds=True)


_NEEDS = ("actual", "predicted")
ACCURACY = Metric(_NEEDS, _accuracy)
PRECISION = Metric(_NEEDS, _over_labels(_precision))
RECALL = Metric(_NEEDS, _over_labels(_recall))
F1 = Metric(_NEEDS, _over_labels(_f1))
BALANCED_ACCURACY = Metric(_NEEDS, _over_labels(_balanced))
ROC_AUC = Metric(("actual", "log_probabilities"), _roc_auc)

F1_MICRO = ACCURACY  # of all labels' counts together; the same where each text has one label
