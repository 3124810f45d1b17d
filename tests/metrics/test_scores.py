"""Every metric against the library of its field, on predictions and on resamples of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF
from scipy import stats
from sklearn import metrics as sklearn

from llmkit import catalog
from llmkit.data.own_code import OwnCode
from llmkit.errors import DataError
from llmkit.metrics.own import own_metric
from llmkit.metrics.statistic import NoValueError, Predictions, value_of

LABELS = ("bird", "fish", "stone")
WORDS = ("the", "a", "small", "red", "boat", "river", "stone", "goes", "down", "to", "sea", "and", "Sun!")


def scored(name: str, fields: dict[str, Any], labels: tuple[str, ...] = ()) -> float:
    count = len(next(iter(fields.values())))
    return value_of(catalog.resolve("metric", name)(Predictions(fields, np.arange(count), labels)))


def resampled(name: str, fields: dict[str, Any], chosen: np.ndarray, labels: tuple[str, ...] = ()) -> float:
    """The metric with weights, as a bootstrap computes it."""
    count = len(next(iter(fields.values())))
    statistic = catalog.resolve("metric", name)(Predictions(fields, np.arange(count), labels))
    weights = np.bincount(chosen, minlength=count)[statistic.used]
    return float(statistic.values(weights[None].astype(float))[0])


def classified(count: int, seed: int) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    logits = np.round(random.normal(size=(count, 3)), 1)  # with ties
    found = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    actual = random.integers(0, 3, count)
    return {"actual": actual, "predicted": found.argmax(axis=1), "log_probabilities": found}


def auc(actual: np.ndarray, scores: np.ndarray) -> float:
    there = [label for label in range(3) if 0 < np.sum(actual == label) < len(actual)]
    return float(np.mean([sklearn.roc_auc_score(actual == label, scores[:, label]) for label in there]))


MACRO: dict[str, Any] = {"average": "macro", "zero_division": 0}
OF_LABELS = {
    "accuracy": lambda f: sklearn.accuracy_score(f["actual"], f["predicted"]),
    "f1_micro": lambda f: sklearn.f1_score(f["actual"], f["predicted"], average="micro"),
    "balanced_accuracy": lambda f: sklearn.balanced_accuracy_score(f["actual"], f["predicted"]),
    "precision": lambda f: sklearn.precision_score(f["actual"], f["predicted"], **MACRO),
    "recall": lambda f: sklearn.recall_score(f["actual"], f["predicted"], **MACRO),
    "f1": lambda f: sklearn.f1_score(f["actual"], f["predicted"], **MACRO),
    "roc_auc": lambda f: auc(f["actual"], f["log_probabilities"]),
}


@pytest.mark.filterwarnings("ignore:y_pred contains classes")
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", OF_LABELS)
def test_scores_of_labels_are_those_of_scikit_learn(name: str, seed: int) -> None:
    fields = classified(5 + 12 * seed, seed)
    assert scored(name, fields, LABELS) == pytest.approx(OF_LABELS[name](fields), abs=1e-12)
    chosen = np.random.default_rng(seed).integers(0, len(fields["actual"]), 5 + 12 * seed)
    there = {key: value[chosen] for key, value in fields.items()}
    assert resampled(name, fields, chosen, LABELS) == pytest.approx(OF_LABELS[name](there), abs=1e-12)


def test_one_label_alone_has_no_curve() -> None:
    fields = classified(10, 1) | {"actual": np.zeros(10, int)}
    with pytest.raises(NoValueError, match="the same label"):
        scored("roc_auc", fields, LABELS)


def numbers(seed: int) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    target = np.round(random.normal(1000, 3, 30), 1)
    return {"target": target, "predicted": np.round(target + random.normal(0.2, 2, 30), 1)}


OF_NUMBERS = {
    "mae": lambda t, p: sklearn.mean_absolute_error(t, p),
    "rmse": lambda t, p: sklearn.root_mean_squared_error(t, p),
    "r2": lambda t, p: sklearn.r2_score(t, p),
    "pearson": lambda t, p: stats.pearsonr(t, p).statistic,
    "spearman": lambda t, p: stats.spearmanr(t, p).statistic,
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", OF_NUMBERS)
def test_errors_and_correlations_are_those_of_the_libraries(name: str, seed: int) -> None:
    fields, by_hand = numbers(seed), OF_NUMBERS[name]
    assert scored(name, fields) == pytest.approx(by_hand(fields["target"], fields["predicted"]), abs=1e-9)
    chosen = np.random.default_rng(seed).integers(0, 30, 30)
    expected = by_hand(fields["target"][chosen], fields["predicted"][chosen])
    assert resampled(name, fields, chosen) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", ["r2", "pearson", "spearman"])
@pytest.mark.parametrize("constant", ["target", "predicted"])
def test_what_does_not_vary_has_no_correlation(name: str, constant: str) -> None:
    fields = numbers(1) | {constant: np.full(30, 2.0)}
    if name == "r2" and constant == "predicted":
        assert scored(name, fields) < 0
        return
    with pytest.raises(NoValueError, match="are the same"):
        scored(name, fields)


def sentences(count: int, seed: int) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, random.integers(1, 12))) for _ in range(count)]


def answered(seed: int) -> dict[str, Any]:
    """Answers to every other of 24 examples, some of them right, one of them empty."""
    references = sentences(24, seed)
    answers: list[Any] = [
        text if n % 6 == 0 else other
        for n, (text, other) in enumerate(zip(references, sentences(24, seed + 50), strict=True))
    ]
    answers[1::2] = [None] * 12
    answers[4] = ""
    return {"reference": references, "answer": answers}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_bleu_and_chrf_are_those_of_sacrebleu(name: str, seed: int) -> None:
    fields = answered(seed)
    scorer = {"bleu": BLEU, "chrf": CHRF}[name]()

    def expected(chosen: list[int]) -> float:
        used = [n for n in chosen if fields["answer"][n] is not None]
        ours, theirs = [fields["answer"][n] for n in used], [fields["reference"][n] for n in used]
        return float(scorer.corpus_score(ours, [theirs]).score)

    assert scored(name, fields) == pytest.approx(expected(list(range(24))), abs=1e-9)
    chosen = np.repeat(np.arange(24), np.random.default_rng(seed).integers(0, 3, 24))
    assert resampled(name, fields, chosen) == pytest.approx(expected(chosen.tolist()), abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.text("ab .,é", max_size=9), st.text("ab .,é", min_size=1, max_size=9)), min_size=1, max_size=4
    )
)
def test_bleu_and_chrf_of_any_text(pairs: list[tuple[str, str]]) -> None:
    answers, references = map(list, zip(*pairs, strict=True))
    for name, scorer in (("bleu", BLEU()), ("chrf", CHRF())):
        found = scored(name, {"answer": answers, "reference": references})
        assert found == pytest.approx(scorer.corpus_score(answers, [references]).score, abs=1e-9)


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL"])
def test_rouge_is_that_of_rouge_score(name: str) -> None:
    fields, scorer = answered(3), RougeScorer([name], use_stemmer=True)
    pairs = [(r, a) for r, a in zip(fields["reference"], fields["answer"], strict=True) if a is not None]
    by_hand = np.mean([scorer.score(reference, answer)[name].fmeasure for reference, answer in pairs])
    assert scored(name, fields) == pytest.approx(by_hand)
    assert 0 < by_hand < 1


def test_exact_match() -> None:
    fields = {"reference": ["Yes", "no", "a b", "c"], "answer": [" Yes\n", "No", "a b", None]}
    assert scored("exact_match", fields) == pytest.approx(2 / 3)


def test_without_answers_there_is_a_reason() -> None:
    for name in ("exact_match", "rougeL", "bleu", "chrf"):
        with pytest.raises(NoValueError, match="no answer was written"):
            scored(name, {"reference": ["a"], "answer": [None]})
        with pytest.raises(NoValueError, match="none has a reference"):
            scored(name, {"reference": [""], "answer": ["a"]})


def test_scores_of_tokens_by_hand() -> None:
    fields = {
        "loss": np.array([4.0, 2.0]),
        "tokens": np.array([2, 4]),
        "correct": np.array([1, 4]),
        "bytes": np.array([9, 1]),
    }
    assert scored("loss", fields) == 1.0
    assert scored("perplexity", fields) == pytest.approx(math.e)
    assert scored("bits_per_byte", fields) == pytest.approx(6 / math.log(2) / 10)
    assert scored("token_accuracy", fields) == pytest.approx(5 / 6)
    assert scored("loss", {"loss": fields["loss"]}) == 3.0, "an example counts as one where there are no tokens"
    with pytest.raises(NoValueError, match="no bytes"):
        scored("bits_per_byte", fields | {"bytes": np.zeros(2)})
    assert math.isfinite(scored("perplexity", fields | {"loss": np.array([1e6, 1e6])}))


def test_calibration_by_hand() -> None:
    sure = np.log([[0.9, 0.1], [0.9, 0.1], [0.35, 0.65], [0.35, 0.65]])
    fields = {"actual": np.array([0, 1, 1, 1]), "log_probabilities": sure}
    assert scored("ece", fields, ("a", "b")) == pytest.approx(0.5 * abs(0.9 - 0.5) + 0.5 * abs(0.65 - 1.0))


def test_a_temperature_mends_a_model_that_is_too_sure() -> None:
    random = np.random.default_rng(8)
    logits = random.normal(0, 1.5, (3000, 3))
    true = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    actual = np.array([random.choice(3, p=p) for p in true])
    from llmkit.metrics.calibration import calibration_table

    loud = 3 * logits - np.log(np.exp(3 * logits).sum(axis=1, keepdims=True))
    fields = {"actual": actual, "predicted": loud.argmax(axis=1), "log_probabilities": loud}
    table = calibration_table(Predictions(fields, np.arange(3000), LABELS))
    assert table["temperature"] == pytest.approx(3.0, rel=0.1)
    assert scored("ece", fields, LABELS) > 0.15
    assert scored("ece_calibrated", fields, LABELS) < 0.04
    assert sum(each["examples"] for each in table["bins"]) == 3000
    with pytest.raises(NoValueError, match="needs 10 examples"):
        scored("ece_calibrated", {name: value[:9] for name, value in fields.items()}, LABELS)


OWN = """
def letters(references, predictions):
    return [float(r[0] == p[0]) for r, p in zip(references, predictions)]

def share(references, predictions):
    return sum(r == p for r, p in zip(references, predictions)) / len(references)

def short(references, predictions):
    return [1.0]

def text(references, predictions):
    return "good"

def precision(references, predictions):
    said = [r == "cd" for r, p in zip(references, predictions) if p == "cd"]
    return sum(said) / len(said)

def broken(references, predictions):
    return 1 / 0

def endless(references, predictions):
    return [float("nan")] * len(references)
"""


@pytest.fixture
def own(tmp_path: Path) -> Any:
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    fields = {"reference": ["ab", "cd", "x", "q"], "answer": ["aa", "cd", "y", None]}

    def statistic(name: str) -> Any:
        metric = own_metric(OwnCode("metric", f"{path}:{name}", "evaluate.metrics"))
        return metric(Predictions(fields, np.arange(4)))

    return statistic


@pytest.mark.parametrize(("name", "value"), [("letters", 2 / 3), ("share", 1 / 3)])
def test_a_metric_of_ones_own(name: str, value: float, own: Any) -> None:
    statistic = own(name)
    assert value_of(statistic) == pytest.approx(value)
    found = statistic.values(np.array([[2.0, 0.0, 1.0], [0.0, 3.0, 0.0]]))
    assert found == pytest.approx({"letters": [2 / 3, 1.0], "share": [0.0, 1.0]}[name])


def test_a_metric_of_ones_own_may_have_no_value_for_a_resample(own: Any) -> None:
    statistic = own("precision")
    assert value_of(statistic) == 1.0
    assert np.isnan(statistic.values(np.array([[2.0, 0.0, 1.0]]))).all(), "nobody said `cd`"


@pytest.mark.parametrize(
    ("name", "got"),
    [
        ("short", "1 values"),
        ("text", "a value of type str"),
        ("broken", "ZeroDivisionError"),
        ("endless", "a value that is not finite"),
    ],
)
def test_a_metric_of_ones_own_that_is_wrong_is_named_with_its_line(name: str, got: str, own: Any) -> None:
    with pytest.raises(DataError) as failed:
        value_of(own(name))
    assert got in str(failed.value.got)
    assert "mine.py:" in str(failed.value.where)
