"""Numbers, names and durations as people read them."""

from __future__ import annotations

from typing import Any

_TITLES = {
    "loss": "loss",
    "eval_loss": "held-out loss",
    "train_loss": "training loss",
    "rougeL": "ROUGE-L",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "bleu": "BLEU",
    "chrf": "chrF",
    "f1": "F1",
    "f1_micro": "F1, micro",
    "roc_auc": "ROC-AUC",
    "ece": "ECE",
    "ece_calibrated": "ECE, calibrated",
    "mae": "MAE",
    "rmse": "RMSE",
    "r2": "R²",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "bits_per_byte": "bits a byte",
}
_UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
_COUNTS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
MINUS, DASH = "\u2212", "\u2013"


def title_of(name: str) -> str:
    """A metric's or key's name in words: `general_loss` is `loss on general text`."""
    if name.startswith("general_"):
        return f"{title_of(name.removeprefix('general_'))} on general text"
    return _TITLES.get(name, name.replace("_", " "))


def number(value: Any) -> str:
    """A count in full, a measure in four digits."""
    if value is None:
        return DASH
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}".replace("-", MINUS)
    digits = _decimals(value)
    return (f"{value:.3g}" if digits is None else f"{value:,.{digits}f}").replace("-", MINUS)


def _decimals(value: float) -> int | None:
    """How many make four digits; None where the value is so small that it needs an exponent."""
    size = abs(value)
    for least, digits in ((1000, 0), (100, 1), (10, 2), (1, 3), (1e-3, 4)):
        if size >= least:
            return digits
    return None if size else 4


def signed(value: float | None) -> str:
    """A change."""
    if value is None:
        return DASH
    text = number(abs(value))
    return text if value == 0 else f"{'+' if value > 0 else MINUS}{text}"


def interval(bounds: Any) -> str:
    """`0.8100 to 0.8900`, both with the decimals of the larger; nothing where there is none."""
    if not isinstance(bounds, list | tuple) or len(bounds) != 2 or None in bounds:
        return ""
    low, high = map(float, bounds)
    digits = _decimals(max(low, high, key=abs))
    if digits is None:
        return f"{number(low)} to {number(high)}"
    return f"{low:z,.{digits}f} to {high:z,.{digits}f}".replace("-", MINUS)


def p_value(value: float | None) -> str:
    """A p-value; below a thousandth it says only that."""
    if value is None:
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def bytes_(value: float | None) -> str:
    """A size."""
    if value is None:
        return DASH
    for size, unit in _UNITS:
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f} bytes"


def short_count(value: float | None) -> str:
    """`134.5 M`, without a unit below a thousand."""
    if value is None:
        return DASH
    for size, unit in _COUNTS:
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f}"


def duration(seconds: float | None) -> str:
    """`1.3 s`, `4 min 10 s`, `3 h 12 min`, `2 d 4 h`."""
    if seconds is None:
        return DASH
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for unit, name, smaller, rest in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= unit:
            more = whole % unit // smaller
            return f"{whole // unit} {name} {more} {rest}" if more else f"{whole // unit} {name}"
    return f"{whole} s"


def measure(key: str, value: Any) -> str:
    """A value with the unit that its key names."""
    if value is None:
        return DASH
    if isinstance(value, int | float) and not isinstance(value, bool):
        if key.endswith("bytes"):
            return bytes_(value)
        if key.endswith("per_second"):
            return f"{value:,.0f} / s"
        if key.endswith("seconds"):
            return duration(value)
        if key.endswith("share"):
            return f"{value:.1%}"
    return number(value)


def listed(items: list[str], joint: str = "and") -> str:
    """`a, b and c`."""
    if len(items) < 2:
        return "".join(items)
    return f"{', '.join(items[:-1])} {joint} {items[-1]}"


def plural(count: int, noun: str) -> str:
    """`1 step`, `2,000 steps`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
