"""HTML from templates that lie in the packages; what is filled in is text, never markup."""

import base64
from typing import Final

from jinja2 import Environment, PackageLoader, StrictUndefined


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


TEMPLATES: Final = Environment(
    loader=PackageLoader("lostreg", "."),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
TEMPLATES.filters["base64"] = _base64
TEMPLATES.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
