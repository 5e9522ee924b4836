"""HTML by Jinja2. Whatever a template is given is escaped, but for what is marked as `Markup`."""

import json
from collections.abc import Iterator
from functools import cache
from typing import Any, Final

import jinja2
from markupsafe import Markup

_ESCAPES: Final = {ord("<"): "\\u003c", ord(">"): "\\u003e", ord("&"): "\\u0026"}


def render(package: str, name: str, /, **values: Any) -> str:
    """A template of a package, whole."""
    return _template(package, name).render(values)


def stream(package: str, name: str, /, **values: Any) -> Iterator[str]:
    """A template of a package piece by piece: what it goes through is never in memory together."""
    return _template(package, name).generate(values)


def readable(text: str) -> str:
    """A text that can be written: a file name that is not UTF-8 has lone surrogates, shown as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def as_json(value: Any) -> Markup:
    """JSON for a script element: it holds neither an end of a script nor anything but ASCII."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False).translate(_ESCAPES)
    return Markup(text)  # noqa: S704 - its signs are escaped as JSON has it


@cache
def _template(package: str, name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(package, ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_finalized,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["json"] = as_json
    return environment.get_template(name)


def _finalized(value: Any) -> Any:
    return readable(value) if isinstance(value, str) and not isinstance(value, Markup) else value
