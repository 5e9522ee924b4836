"""The demo's words: a verdict in plain language, a table of the boxes, and the same as JSON."""

import html
import json

from lostreg.defaults import CLEAR_SCORE
from lostreg.demo.panels import colour_of
from lostreg.inference.discovery import Discovery
from lostreg.runs.predictions import from_discovery


def verdict(found: Discovery, asked: int) -> str:
    """What was found, as HTML.

    Args:
        found: at least one object.
        asked: how many were looked for.
    """
    clear = int((found.scores >= CLEAR_SCORE).sum())
    best = float(found.scores.max(initial=0))
    if not clear:
        text = (
            f"<b>No clear object.</b> The best box has a score of {best:.2f}, under {CLEAR_SCORE}: such boxes are "
            "often background. Another bias or backbone may do better."
        )
        return _note("unclear", text)
    text = f"<b>{clear} object{'s' * (clear > 1)} found.</b> Score{'s' * (clear > 1)}: " + ", ".join(
        f"{score:.2f}" for score in found.scores.tolist() if score >= CLEAR_SCORE
    )
    if len(found) > clear:
        text += f"; {len(found) - clear} more under {CLEAR_SCORE}, likely background"
    if len(found) < asked:
        text += f". You asked for up to {asked}; nothing else stands out"
    return _note("clear", text + ".")


def problem(message: str) -> str:
    """What went wrong, as HTML."""
    return _note("problem", f"<b>That did not work.</b> {html.escape(message)}")


def hint(message: str) -> str:
    """What to do next, as HTML."""
    return _note("hint", html.escape(message))


def box_table(found: Discovery) -> str:
    """One row a box, in pixels of the original photo, as HTML."""
    head = "".join(f"<th>{name}</th>" for name in ("object", "left", "top", "right", "bottom", "score", ""))
    rows = "".join(_row(found, index) for index in range(len(found)))
    return f'<table class="boxes"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'


def box_json(name: str, found: Discovery) -> str:
    """The line that a predictions file would hold, one field a line."""
    fields = json.loads(from_discovery(name, found).to_line())
    fields.pop("masks", None)  # long, and no one reads them
    return "{\n" + ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in fields.items()) + "\n}"


def _row(found: Discovery, index: int) -> str:
    colour = "rgb({}, {}, {})".format(*colour_of(index))
    numbers = "".join(f"<td>{value:.0f}</td>" for value in found.xyxy[index].tolist())
    score = float(found.scores[index])
    remark = "" if score >= CLEAR_SCORE else "no clear object"
    swatch = f'<span class="swatch" style="background: {colour}"></span>'
    return f"<tr><td>{swatch}{index + 1}</td>{numbers}<td>{score:.2f}</td><td>{remark}</td></tr>"


def _note(kind: str, text: str) -> str:
    return f'<div class="note {kind}" role="status">{text}</div>'
