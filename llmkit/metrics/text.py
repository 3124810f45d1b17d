"""Scores of written text."""

from __future__ import annotations

from collections.abc import Sequence


def rouge_l(references: Sequence[str], answers: Sequence[str]) -> float:
    """The mean F-measure of ROUGE-L, 0 to 1, as Google's rouge-score computes it, with stemming.

    Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = zip(references, answers, strict=True)
    return sum(scorer.score(reference, answer)["rougeL"].fmeasure for reference, answer in pairs) / len(references)
