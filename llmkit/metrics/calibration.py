"""How far a classifier's confidence is from its accuracy, before and after its logits are divided by a temperature.

Guo et al., "On Calibration of Modern Neural Networks", 2017: https://arxiv.org/abs/1706.04599. N examples, C classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from llmkit.metrics.statistic import Metric, NoValueError, Predictions, Sums

BINS = 15  # of confidence, equally wide
FOLDS = 5
_FEWEST = 10  # examples for a temperature


def fit_temperature(log_probabilities: np.ndarray, actual: np.ndarray) -> float:
    """The temperature, 0.05 to 20, with the least cross entropy: of (N, C) log probabilities and (N,) labels."""
    from scipy.optimize import minimize_scalar

    rows = np.arange(len(actual))

    def loss(log_temperature: float) -> float:
        scaled = _scaled(log_probabilities, np.exp(log_temperature))
        return float(-scaled[rows, actual].mean())

    return float(np.exp(minimize_scalar(loss, bounds=(np.log(0.05), np.log(20.0)), method="bounded").x))


def cross_fitted(log_probabilities: np.ndarray, actual: np.ndarray, seed: int) -> np.ndarray:
    """Calibrated log probabilities, (N, C): each fifth with the temperature that was fitted on the other four.

    Raises NoValueError where there are too few examples.
    """
    if len(actual) < _FEWEST:
        raise NoValueError(f"a temperature needs {_FEWEST} examples or more, and there are {len(actual)}")
    fold_of = np.random.default_rng([seed, 3]).permutation(len(actual)) % FOLDS
    found = np.empty_like(log_probabilities, dtype=np.float64)
    for fold in range(FOLDS):
        held_out = fold_of == fold
        temperature = fit_temperature(log_probabilities[~held_out], actual[~held_out])
        found[held_out] = _scaled(log_probabilities[held_out], temperature)
    return found


def calibration_table(predictions: Predictions) -> dict[str, Any]:
    """The temperature of all examples, how the calibrated scores were fitted, and accuracy by confidence."""
    log_probabilities, actual = predictions["log_probabilities"], predictions["actual"]
    table: dict[str, Any] = {"bins": _bins(log_probabilities, actual)}
    try:
        after = cross_fitted(log_probabilities, actual, predictions.seed)
    except NoValueError as error:
        return table | {"temperature": None, "why": str(error)}
    return table | {
        "temperature": fit_temperature(log_probabilities, actual),
        "bins_after": _bins(after, actual),
        "fitted_on": f"the held-out examples themselves, cross-fitted: each of {FOLDS} parts by a temperature that was "
        "fitted on the others; `temperature` is fitted on all",
    }


def _scaled(log_probabilities: np.ndarray, temperature: float) -> np.ndarray:
    from scipy.special import log_softmax

    found: np.ndarray = log_softmax(log_probabilities / temperature, axis=1)
    return found


def _confidence(log_probabilities: np.ndarray, actual: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each example the bin, the confidence and whether it is right, each (N,)."""
    confidence = np.exp(log_probabilities.max(axis=1))
    right = (log_probabilities.argmax(axis=1) == actual).astype(np.float64)
    return np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1), confidence, right


def _bins(log_probabilities: np.ndarray, actual: np.ndarray) -> list[dict[str, float]]:
    place, confidence, right = _confidence(log_probabilities, actual)
    return [
        {
            "from": number / BINS,
            "to": (number + 1) / BINS,
            "examples": int(np.sum(place == number)),
            "confidence": float(confidence[place == number].mean()),
            "accuracy": float(right[place == number].mean()),
        }
        for number in range(BINS)
        if np.any(place == number)
    ]


def _calibration_error(predictions: Predictions, log_probabilities: np.ndarray) -> Sums:
    place, confidence, right = _confidence(log_probabilities, predictions["actual"])
    apart = np.eye(BINS)[place] * (confidence - right)[:, None]
    parts = np.concatenate([apart, np.ones((len(place), 1))], axis=1)

    def error(sums: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.abs(sums[..., :BINS]).sum(axis=-1) / sums[..., BINS]
        return found

    return Sums(predictions.everything(), parts, error, biased=True)


def _ece(predictions: Predictions) -> Sums:
    return _calibration_error(predictions, predictions["log_probabilities"])


def _ece_after(predictions: Predictions) -> Sums:
    after = cross_fitted(predictions["log_probabilities"], predictions["actual"], predictions.seed)
    return _calibration_error(predictions, after)


_NEEDS = ("actual", "log_probabilities")
ECE = Metric(_NEEDS, _ece, lower_is_better=True)
ECE_CALIBRATED = Metric(_NEEDS, _ece_after, lower_is_better=True)
