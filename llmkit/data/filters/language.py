"""Takes out text that is not in a wanted language, told offline by the model that comes with py3langid (Barbaresi, 2021)."""

from __future__ import annotations

from typing import Any

from llmkit.data.filters import row_text
from llmkit.data.specs import needed
from llmkit.errors import RecipeError, did_you_mean

_LOOKED_AT = 600  # characters; of a longer text thirds from its beginning, middle and end


class LanguageFilter:
    """Keeps text in the languages of `keep` (ISO 639-1 codes), of which the model is at least `min_probability` sure.

    The model knows 140 languages, and is sure of most sentences; of a few words it often is not. Raises ValueError for
    a `min_probability` that is none, and RecipeError for languages that the model does not know, and without py3langid.
    """

    def __init__(self, keep: list[str], min_probability: float = 0.5) -> None:
        if not keep:
            raise ValueError("keep names no language")
        if not 0 <= min_probability <= 1:
            raise ValueError(f"min_probability is {min_probability}, not from 0 to 1")
        try:
            from py3langid.langid import MODEL_FILE, LanguageIdentifier
        except ImportError:
            raise needed("filter", "language", "py3langid") from None
        self._identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        for language in keep:
            if language not in self._identifier.labels:
                raise _unknown(language, sorted(self._identifier.labels))
        self.keep = frozenset(keep)
        self.min_probability = min_probability

    def __call__(self, row: dict[str, Any]) -> dict[str, Any] | str:
        """The row, or which language it is in, or that this is not certain."""
        language, probability = self._identifier.classify(_part(row_text(row)))
        if probability < self.min_probability:
            return "language not certain"
        return row if language in self.keep else f"language {language}"


def _part(text: str) -> str:
    if len(text) <= _LOOKED_AT:
        return text
    third = _LOOKED_AT // 3
    middle = (len(text) - third) // 2
    return "\n".join((text[:third], text[middle : middle + third], text[-third:]))


def _unknown(language: str, known: list[str]) -> RecipeError:
    names = {"english": "en", "german": "de", "french": "fr", "spanish": "es", "chinese": "zh"}
    code = names.get(language.lower(), language.lower().replace("_", "-").partition("-")[0])
    return RecipeError(
        f"the filter `language` does not know `{language}`",
        got=language,
        expected="codes of " + ", ".join(known),
        hint=f"did you mean `{code}`?" if code in known else did_you_mean(language, known),
    )
