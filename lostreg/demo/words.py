"""The demo's words: a verdict in plain language, a table of the boxes, and the same as JSON."""

import json

from lostreg.defaults import CLEAR_SCORE
from lostreg.demo.methods import CUTS, METHODS
from lostreg.images.draw import colour_of, score_text
from lostreg.inference.discovery import Discovery
from lostreg.methods.objectness import surroundings
from lostreg.runs.predictions import from_discovery
from lostreg.templates import TEMPLATES


def verdict(found: Discovery, asked: int, method: str) -> str:
    """What was found, as HTML.

    Args:
        found: at least one object.
        asked: how many were looked for.
        method: that found it, a row of `METHODS`.
    """
    if method in CUTS and found.degrees.min() == found.degrees.size - 1:
        text = (
            "This feature is much the same in all patches of the photo, so there is nothing to cut: choose another "
            "feature, such as values (v), another layer or another method."
        )
        return _note("unclear", text, "No clear object.")
    scores = from_discovery("", found).scores
    clear = sum(score >= CLEAR_SCORE for score in scores)
    if not clear:
        best = score_text(max(scores, default=0))
        text = (
            f"The best box has a score of {best}, under {CLEAR_SCORE}: such boxes are often background. Another "
            "method, bias or backbone may do better."
        )
        return _note("unclear", f"{text} {_why(found, method)}", "No clear object.")
    plural = "s" * (clear > 1)
    text = f"Score{plural}: " + ", ".join(score_text(score) for score in scores if score >= CLEAR_SCORE)
    if len(found) > clear:
        text += f"; {len(found) - clear} more under {CLEAR_SCORE}, likely background"
    if len(found) < asked and METHODS[method].has_several:
        text += f". You asked for up to {asked}; nothing else stands out"
    return _note("clear", f"{text}. {_why(found, method)}", f"{clear} object{plural} found.")


def _why(found: Discovery, method: str) -> str:
    text = f"Method: {METHODS[method].why.format(bias=found.bias)}."
    if found.candidates is not None:
        text += f" Of its {len(found.candidates)} best candidates the first box ranks highest"
        text += "; further ones overlap none before them by half." if len(found) > 1 else "."
    if found.objectness is not None:
        inside, around = found.objectness[found.mask], found.objectness[surroundings(found.mask)]
        rest = f", those around its box with {100 * around.mean():.0f} %" if around.size else ""
        text += " What other photos taught ranks them: it takes the patches of the first object for parts of one with "
        text += f"{100 * inside.mean():.0f} % on average{rest}."
    return text


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
