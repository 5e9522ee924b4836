"""The demo's words: a verdict in plain language, a table of the boxes, and the same as JSON."""

import json

from lostreg.defaults import CLEAR_SCORE
from lostreg.demo.panels import colour_of
from lostreg.inference.discovery import Discovery
from lostreg.runs.predictions import from_discovery
from lostreg.templates import TEMPLATES


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
            f"The best box has a score of {best:.2f}, under {CLEAR_SCORE}: such boxes are often background. Another "
            "bias or backbone may do better."
        )
        return _note("unclear", text, "No clear object.")
    plural = "s" * (clear > 1)
    text = f"Score{plural}: " + ", ".join(f"{score:.2f}" for score in found.scores.tolist() if score >= CLEAR_SCORE)
    if len(found) > clear:
        text += f"; {len(found) - clear} more under {CLEAR_SCORE}, likely background"
    if len(found) < asked:
        text += f". You asked for up to {asked}; nothing else stands out"
    return _note("clear", f"{text}.", f"{clear} object{plural} found.")


def problem(message: str) -> str:
    """What went wrong, as HTML."""
    return _note("problem", message, "That did not work.")


def hint(message: str) -> str:
    """What to do next, as HTML."""
    return _note("hint", message)


def box_table(found: Discovery) -> str:
    """One row a box, in pixels of the original photo, as HTML."""
    colours = (colour_of(index) for index in range(len(found)))
    rows = zip(colours, found.xyxy.tolist(), found.scores.tolist(), strict=True)
    return TEMPLATES.get_template("demo/boxes.html").render(rows=rows, clear=CLEAR_SCORE)


def box_json(name: str, found: Discovery) -> str:
    """The line that a predictions file would hold, one field a line."""
    fields = json.loads(from_discovery(name, found).to_line())
    return "{\n" + ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in fields.items()) + "\n}"


def _note(kind: str, text: str, headline: str = "") -> str:
    return TEMPLATES.get_template("demo/note.html").render(kind=kind, text=text, headline=headline)
