"""The page's HTML: everything in one file, nothing from elsewhere, and no text of the run taken for markup."""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from typing import Any, BinaryIO, Final, cast

from lostreg.defaults import CLEAR_SCORE
from lostreg.gallery.entries import Entry
from lostreg.jsonio import is_finite_number
from lostreg.runs.reader import RunFolder, Survey
from lostreg.templates import TEMPLATES

_PICTURE: Final = b'<script type="text/plain" id="jpeg-'  # begins the line with an image's picture, which may be empty
_IN_HEADER: Final = ("corloc", "hits", "images", "wilson_95", "unreadable", "complete")


def render_page(
    run: RunFolder, survey: Survey, left_out: int, choice: str, entries: Iterable[Entry], facts: Mapping[str, Any]
) -> Iterator[str]:
    """The page, piece by piece: no more than one entry is held at a time.

    Args:
        run: the folder.
        survey: its counts.
        left_out: images with boxes that the page does not show.
        choice: how those that it shows were chosen, for the reader.
        entries: the images that it shows, in order.
        facts: what the page's script is told, read after the last entry: ``gone`` and ``changed``, images whose files
            cannot be read any more or have another size than in the run; ``sort``, the order to begin with;
            ``overlap``, from which on boxes are of one object; ``colours`` and ``dashes`` of objects; ``decisions``,
            what a file of decisions begins with, and ``key``, by which browsers keep them.
    """
    assets = resources.files("lostreg.gallery")
    return TEMPLATES.get_template("gallery/page.html").generate(
        style=assets.joinpath("gallery.css").read_text(encoding="utf-8"),
        script=assets.joinpath("gallery.js").read_text(encoding="utf-8"),
        sha256=_sha256,
        name=run.name,
        lead=_lead(run, survey),
        tiles=_tiles(run, survey),
        notes=_notes(survey, left_out, choice),
        settings=[row for row in _flat(run.results or {}, "") if row[0] and row[0] not in _IN_HEADER],
        failed=survey.failed,
        failures=_count(survey.failures),
        beyond=survey.failures - len(survey.failed),
        clear=CLEAR_SCORE,
        entries=entries,
        facts=facts,
    )


def pictures_on(page: BinaryIO) -> int:
    """How many images of a page that was written before have their pictures."""
    lines = io.BufferedReader(cast("io.RawIOBase", page))  # files of stores know no lines
    return sum(line.startswith(_PICTURE) and not line.endswith(b'"></script>\n') for line in lines)


def _sha256(asset: str) -> bytes:
    """What the content security policy calls a style or script by: no other one may run."""
    return hashlib.sha256(asset.encode("utf-8")).digest()


def _lead(run: RunFolder, survey: Survey) -> str:
    method = [run.options.get(key) for key in ("backbone", "feature")]
    words = [_data(run.results or {}), ", ".join(str(part) for part in method if part)]
    complete = None if run.results is None else run.results.get("complete")
    if complete is True:
        words.append("finished run")
    elif complete is False:
        total = f" of {run.expected:,}" if run.expected else ""
        words.append(f"unfinished run: {survey.images:,}{total} images so far")
    else:
        words.append("no results.json that says whether the run is finished")
    return " · ".join(word for word in words if word)


def _data(results: dict[str, Any]) -> str:
    """What the run is about: a benchmark and its split, or a folder of images."""
    benchmark, collection = results.get("benchmark"), results.get("collection")
    if isinstance(benchmark, dict):
        return " ".join(str(benchmark[key]) for key in ("name", "split") if benchmark.get(key))
    return str(collection.get("root") or "") if isinstance(collection, dict) else ""


def _tiles(run: RunFolder, survey: Survey) -> Iterator[tuple[str, str]]:
    yield "images", f"{survey.images:,}"
    yield "boxes", f"{survey.boxes:,}"
    yield f"no clear object (score below {CLEAR_SCORE:g})", f"{survey.unclear:,}"
    yield "unreadable", f"{survey.unreadable:,}"
    found = survey.corloc
    if found is not None:
        low, high = found.wilson_interval()
        yield f"corloc ({found.hits:,} of {found.images:,} hit)", f"{found.percent:.2f} %"
        yield "its 95 % interval (Wilson)", f"{low:.1f} to {high:.1f} %"
    else:
        yield from _recorded(run.results or {})


def _recorded(results: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Corloc as the run wrote it, where there are no maps with ground truth."""
    corloc, bounds = results.get("corloc"), results.get("wilson_95")
    if is_finite_number(corloc):
        yield "corloc", f"{corloc:.2f} %"
    if isinstance(bounds, list) and len(bounds) == 2 and all(is_finite_number(bound) for bound in bounds):
        yield "its 95 % interval (Wilson)", f"{bounds[0]:.1f} to {bounds[1]:.1f} %"


def _notes(survey: Survey, left_out: int, choice: str) -> Iterator[str]:
    if left_out:
        shown = len(survey.scores) - left_out
        yield (
            f"This page shows {shown:,} of {len(survey.scores):,} images: {choice}. {left_out:,} are left out; "
            "lostreg report --limit N --choose first|lowest|highest|even shows others."
        )
    if survey.unmapped:
        yield f"{_count(survey.unmapped)} without a line in maps.jsonl: no degree map, seed patch or ground truth."


def _flat(value: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _count(images: int) -> str:
    return f"{images:,} image{'' if images == 1 else 's'}"
