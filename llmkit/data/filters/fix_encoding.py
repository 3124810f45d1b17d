"""Mends text that was decoded by the wrong encoding, and brings Unicode to one form."""

from __future__ import annotations

import unicodedata
from collections import Counter
from typing import Any, Literal

from llmkit.data.filters import clean_texts
from llmkit.data.specs import needed


class FixEncodingFilter:
    """Changes `schÃ¶n` to `schön` (ftfy: Speer, 2019), and characters to the Unicode form NFC or NFKC.

    Quotes, wide characters, ligatures and entities stay: they are no mistakes of an encoding. The form NFKC changes
    wide characters and ligatures, as Unicode has it. Raises RecipeError when ftfy is missing.
    """

    def __init__(self, form: Literal["NFC", "NFKC"] = "NFC") -> None:
        try:
            import ftfy
        except ImportError:
            raise needed("filter", "fix_encoding", "ftfy") from None
        self.form = form
        self.counts: Counter[str] = Counter()
        self._mend = ftfy.fix_text
        self._config = ftfy.TextFixerConfig(
            unescape_html=False,
            fix_latin_ligatures=False,
            fix_character_width=False,
            uncurl_quotes=False,
            fix_line_breaks=False,
            remove_control_chars=False,
            normalization=None,
            explain=False,
        )

    def __call__(self, row: dict[str, Any]) -> dict[str, Any] | str:
        """The row, mended, or the reason when nothing was left of a text."""
        return clean_texts(row, self._clean)

    def _clean(self, text: str) -> str:
        if text.isascii() and "\x1b" not in text:
            return text
        lines = text.split("\n")
        for at, line in enumerate(lines):
            if not line.isascii() or "\x1b" in line:
                lines[at] = self._mend(line, self._config)
        mended = "\n".join(lines)
        if mended != text:
            self.counts["wrong encoding"] += 1
        if unicodedata.is_normalized(self.form, mended):
            return mended
        self.counts["Unicode form"] += 1
        return unicodedata.normalize(self.form, mended)
