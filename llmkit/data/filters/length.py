"""Takes out rows whose text is too short or too long."""

from __future__ import annotations

from typing import Any

from llmkit.data.filters import row_text


class LengthFilter:
    """Keeps rows of `min_chars` to `max_chars` characters (None: no limit). Raises ValueError for limits that cross."""

    def __init__(self, min_chars: int = 1, max_chars: int | None = None) -> None:
        if min_chars < 0:
            raise ValueError(f"min_chars is {min_chars}, less than 0")
        if max_chars is not None and max_chars < max(min_chars, 1):
            raise ValueError(f"max_chars is {max_chars}, less than {max(min_chars, 1)}")
        self.min_chars = min_chars
        self.max_chars = max_chars

    def __call__(self, row: dict[str, Any]) -> dict[str, Any] | str:
        """The row, or a reason that names the limit (and not the length, so that equal reasons can be counted)."""
        chars = len(row_text(row))
        if chars < self.min_chars:
            return f"shorter than {self.min_chars} characters"
        if self.max_chars is not None and chars > self.max_chars:
            return f"longer than {self.max_chars} characters"
        return row
