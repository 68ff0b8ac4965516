"""Pages for people, from the Jinja templates beside this file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def render(
    template: str, filters: Mapping[str, Callable[[Any], str]] | None = None, **values: Any
) -> str:
    """The page of a template: every value escaped, for names come from strangers; one that is missing is an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("pathfm", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters or {})
    return environment.get_template(template).render(**values)
