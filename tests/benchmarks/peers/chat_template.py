"""SmolLM2's chat template with `{% generation %}` around answers, which TRL needs to supervise them alone.

It marks an answer with the token that ends it, but not the line break that the template writes after that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

TRAINING_TEMPLATE = Path(__file__).parent / "smollm2-training.jinja"

_CONVERSATION = [
    {"role": "user", "content": "What does it do?\n\n    return 1"},
    {"role": "assistant", "content": "It returns one."},
]


def check_training_template(tokenizer: Any) -> None:
    """Raises ValueError when the marked template renders anything else than the tokenizer's own."""
    marked = TRAINING_TEMPLATE.read_text(encoding="utf-8")
    for messages, asked in ((_CONVERSATION, False), (_CONVERSATION[:1], True)):
        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": asked}
        own = tokenizer.apply_chat_template(messages, **options)
        if tokenizer.apply_chat_template(messages, chat_template=marked, **options) != own:
            raise ValueError(f"{TRAINING_TEMPLATE.name} does not render conversations as the model's template does")
