"""Scores of written text against a reference: exact match, ROUGE, BLEU and chrF.

ROUGE: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004; 0 to 1, as Google's rouge-score computes it,
with stemming. BLEU: Papineni et al., 2002; chrF: Popović, 2015; both 0 to 100 over all answers together, as sacrebleu
computes them (Post, 2018: https://arxiv.org/abs/1804.08771).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from llmkit.metrics.statistic import Metric, NoValueError, Predictions, Sums, mean_of

_ORDERS_OF_BLEU = 4
_BETA = 2  # of chrF: how much more recall counts


def rouge(kind: str, references: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """The F-measure of `rouge1`, `rouge2` or `rougeL` for each answer, (N,)."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([kind], use_stemmer=True)
    pairs = zip(references, answers, strict=True)
    return np.array([scorer.score(reference, answer)[kind].fmeasure for reference, answer in pairs])


def rouge_l(references: Sequence[str], answers: Sequence[str]) -> float:
    """The mean F-measure of ROUGE-L."""
    return float(rouge("rougeL", references, answers).mean())


def exact_match(references: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """1 where an answer is its reference, letter by letter, but for white space at both ends, else 0, (N,)."""
    pairs = zip(references, answers, strict=True)
    return np.array([float(reference.strip() == answer.strip()) for reference, answer in pairs])


def bleu_of(sums: np.ndarray) -> np.ndarray:
    """BLEU of summed counts, (..., 10): lengths of answers and references, matches and totals by order (`exp` smoothing)."""
    lengths, references = sums[..., 0], sums[..., 1]
    matches, totals = sums[..., 2 : 2 + _ORDERS_OF_BLEU], sums[..., 2 + _ORDERS_OF_BLEU :]
    smooth = np.cumprod(np.where((matches == 0) & (totals > 0), 2.0, 1.0), axis=-1)
    precisions = np.where(
        matches == 0, 1.0 / (smooth * np.maximum(totals, 1e-300)), matches / np.maximum(totals, 1e-300)
    )
    mean = np.exp(np.log(np.maximum(precisions, 1e-300)).mean(axis=-1))
    brevity = np.where(lengths < references, np.exp(1 - references / np.maximum(lengths, 1e-300)), 1.0)
    nothing = (totals == 0).any(axis=-1) | (matches == 0).all(axis=-1)
    return np.where(nothing, 0.0, 100 * brevity * mean)


def chrf_of(sums: np.ndarray) -> np.ndarray:
    """chrF2 of summed counts, (..., 18): n-grams of answers, of references, and matches, for each of six orders."""
    counts = sums.reshape(*sums.shape[:-1], -1, 3)
    ours, theirs, matches = counts[..., 0], counts[..., 1], counts[..., 2]
    there = (ours > 0) & (theirs > 0)
    orders = there.sum(axis=-1)
    precision = np.where(there, matches / np.maximum(ours, 1e-300), 0.0).sum(axis=-1) / np.maximum(orders, 1)
    recall = np.where(there, matches / np.maximum(theirs, 1e-300), 0.0).sum(axis=-1) / np.maximum(orders, 1)
    below = _BETA**2 * precision + recall
    return np.where(below > 0, 100 * (1 + _BETA**2) * precision * recall / np.maximum(below, 1e-300), 0.0)


def _answered(predictions: Predictions) -> tuple[np.ndarray, list[str], list[str]]:
    """The examples that have an answer and a reference that says something, with both."""
    references = predictions["reference"]
    used = [int(number) for number in predictions.known("answer") if references[number]]
    if not used:
        raise NoValueError("no answer was written (evaluate.generate), or none has a reference")
    answers = predictions["answer"]
    return np.array(used), [references[number] for number in used], [answers[number] for number in used]


def _exact_match(predictions: Predictions) -> Sums:
    used, references, answers = _answered(predictions)
    return mean_of(used, exact_match(references, answers), share=True)


def _rouge(kind: str, predictions: Predictions) -> Sums:
    used, references, answers = _answered(predictions)
    return mean_of(used, rouge(kind, references, answers))


def _counted(scorer: Any, answers: list[str], references: list[str]) -> np.ndarray:
    """What sacrebleu counts in each answer, (N, K)."""
    return np.array(scorer._extract_corpus_statistics(answers, [references]), np.float64)  # has no public name


def _bleu(predictions: Predictions) -> Sums:
    from sacrebleu.metrics import BLEU as Scorer

    used, references, answers = _answered(predictions)
    return Sums(used, _counted(Scorer(), answers, references), bleu_of)


def _chrf(predictions: Predictions) -> Sums:
    from sacrebleu.metrics import CHRF as Scorer

    used, references, answers = _answered(predictions)
    return Sums(used, _counted(Scorer(), answers, references), chrf_of)


_NEEDS = ("reference", "answer")
EXACT_MATCH = Metric(_NEEDS, _exact_match)
ROUGE_1 = Metric(_NEEDS, partial(_rouge, "rouge1"))
ROUGE_2 = Metric(_NEEDS, partial(_rouge, "rouge2"))
ROUGE_L = Metric(_NEEDS, partial(_rouge, "rougeL"))
BLEU = Metric(_NEEDS, _bleu)
CHRF = Metric(_NEEDS, _chrf)
