"""Scores of predicted labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def classification_scores(
    actual: np.ndarray, predicted: np.ndarray, labels: Sequence[str]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Accuracy and macro precision, recall and F1; and tables: the confusion matrix (rows are actual) and F1 by label.

    `actual` and `predicted` are label numbers, shape (N,). A label that neither holds counts for nothing in the macro
    averages; one that is never predicted has precision 0.
    """
    from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

    present = np.union1d(actual, predicted)
    precision, recall, f1, support = precision_recall_fscore_support(actual, predicted, labels=present, zero_division=0)
    scores = {
        "accuracy": float(accuracy_score(actual, predicted)),
        "precision": float(precision.mean()),
        "recall": float(recall.mean()),
        "f1": float(f1.mean()),
    }
    by_label = {
        labels[number]: {"precision": float(p), "recall": float(r), "f1": float(f), "examples": int(n)}
        for number, p, r, f, n in zip(present, precision, recall, f1, support, strict=True)
    }
    matrix = confusion_matrix(actual, predicted, labels=np.arange(len(labels))).tolist()
    return scores, {"labels": list(labels), "confusion_matrix": matrix, "by_label": by_label}
