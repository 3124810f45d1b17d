"""Templates to text."""

from __future__ import annotations

from typing import Any


def render(template: str, **values: Any) -> str:
    """A template of this package with values, all of which are escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("llmkit.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)
