"""The demo's words: a verdict in plain language, a table of the boxes, and the same as JSON."""

import json

from lostreg.defaults import CLEAR_SCORE
from lostreg.demo.panels import colour_of
from lostreg.images.draw import score_text
from lostreg.inference.discovery import Discovery
from lostreg.runs.predictions import from_discovery
from lostreg.templates import TEMPLATES


def verdict(found: Discovery, asked: int) -> str:
    """What was found, as HTML.

    Args:
        found: at least one object.
        asked: how many were looked for.
    """
    scores = from_discovery("", found).scores
    clear = sum(score >= CLEAR_SCORE for score in scores)
    if not clear:
        best = score_text(max(scores, default=0))
        text = (
            f"The best box has a score of {best}, under {CLEAR_SCORE}: such boxes are often background. Another "
            "bias or backbone may do better."
        )
        return _note("unclear", f"{text} {_why(found)}", "No clear object.")
    plural = "s" * (clear > 1)
    text = f"Score{plural}: " + ", ".join(score_text(score) for score in scores if score >= CLEAR_SCORE)
    if len(found) > clear:
        text += f"; {len(found) - clear} more under {CLEAR_SCORE}, likely background"
    if len(found) < asked:
        text += f". You asked for up to {asked}; nothing else stands out"
    return _note("clear", f"{text}. {_why(found)}", f"{clear} object{plural} found.")


def _why(found: Discovery) -> str:
    if found.candidates is None:
        return f"Method: LOST with the bias {found.bias:.2f}, which compares no candidates."
    text = (
        "Method: parts, which compares LOST's objects and pieces of the photo whose patches are alike. Of its "
        f"{len(found.candidates)} best candidates the first box ranks highest"
    )
    return text + (", and each further one is the next that does not overlap it by half." if len(found) > 1 else ".")


def problem(message: str) -> str:
    """What went wrong, as HTML."""
    return _note("problem", message, "That did not work.")


def hint(message: str) -> str:
    """What to do next, as HTML."""
    return _note("hint", message)


def box_table(found: Discovery) -> str:
    """One row a box, in pixels of the original photo, as HTML."""
    colours = (colour_of(index) for index in range(len(found)))
    rows = zip(colours, found.xyxy.tolist(), from_discovery("", found).scores, strict=True)
    return TEMPLATES.get_template("demo/boxes.html").render(rows=rows, clear=CLEAR_SCORE, score_text=score_text)


def box_json(name: str, found: Discovery) -> str:
    """The line that a predictions file would hold, one field a line."""
    fields = json.loads(from_discovery(name, found).to_line())
    return "{\n" + ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in fields.items()) + "\n}"


def _note(kind: str, text: str, headline: str = "") -> str:
    return TEMPLATES.get_template("demo/note.html").render(kind=kind, text=text, headline=headline)
