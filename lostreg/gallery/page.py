"""The page's HTML: everything in one file, nothing from elsewhere, and no text of the run taken for markup."""

import base64
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from importlib import resources
from typing import Any, Final, TypedDict

from markupsafe import Markup

from lostreg.defaults import CLEAR_SCORE
from lostreg.gallery.entries import Entry
from lostreg.jsonio import is_finite_number
from lostreg.runs.reader import RunFolder, Survey
from lostreg.templates import stream

_IN_HEADER: Final = ("corloc", "hits", "images", "wilson_95", "unreadable", "complete")


class Facts(TypedDict):
    """What the page's script is told of all images.

    Attributes:
        gone: images shown whose files cannot be read any more.
        changed: images shown whose files have another size than in the run.
        sort: the order to begin with, a value of the page's list.
    """

    gone: int
    changed: int
    sort: str


def page(
    run: RunFolder, survey: Survey, left_out: int, choice: str, entries: Iterable[Entry], facts: Callable[[], Facts]
) -> Iterator[str]:
    """The page, piece by piece: no more than one image is in memory.

    Args:
        run: the folder.
        survey: its counts.
        left_out: images with boxes that the page does not show.
        choice: how those that it shows were chosen, for the reader.
        entries: the images.
        facts: asked for after the last image.
    """
    style, script = _asset("gallery.css"), _asset("gallery.js")
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; img-src blob: data:; "
        "base-uri 'none'; form-action 'none'"
    )
    beyond = survey.failures - len(survey.failed)
    return stream(
        "lostreg.gallery",
        "page.html",
        policy=Markup(policy),  # noqa: S704 - ours
        style=style,
        script=script,
        name=run.folder.absolute().name or "run",
        lead=_lead(run, survey),
        tiles=_tiles(run, survey),
        notes=_notes(survey, left_out, choice),
        settings=[row for row in _flat(run.results or {}, "") if row[0] and row[0] not in _IN_HEADER],
        failures=_count(survey.failures) if survey.failures else "",
        failed=survey.failed,
        beyond=f"{beyond:,}" if beyond else "",
        clear=f"{CLEAR_SCORE:g}",
        entries=entries,
        facts=facts,
    )


def _asset(name: str) -> Markup:
    content = resources.files("lostreg.gallery").joinpath(name).read_text(encoding="utf-8")
    return Markup(content)  # noqa: S704 - ours


def _hash(content: str) -> str:
    """What the content security policy calls this style or script by: no other one may run."""
    digest = base64.b64encode(hashlib.sha256(content.encode("utf-8")).digest()).decode("ascii")
    return f"'sha256-{digest}'"


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
    yield ("images", f"{survey.images:,}")
    yield ("boxes", f"{survey.boxes:,}")
    yield (f"no clear object (score below {CLEAR_SCORE:g})", f"{survey.unclear:,}")
    yield ("unreadable", f"{survey.unreadable:,}")
    found = survey.corloc
    if found is not None:
        low, high = found.wilson_interval()
        yield (f"corloc ({found.hits:,} of {found.images:,} hit)", f"{found.percent:.2f} %")
        yield ("its 95 % interval (Wilson)", f"{low:.1f} to {high:.1f} %")
    else:
        yield from _recorded(run.results or {})


def _recorded(results: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Corloc as the run wrote it, where there are no maps with ground truth."""
    corloc, bounds = results.get("corloc"), results.get("wilson_95")
    if is_finite_number(corloc):
        yield ("corloc", f"{corloc:.2f} %")
    if isinstance(bounds, list) and len(bounds) == 2 and all(is_finite_number(bound) for bound in bounds):
        yield ("its 95 % interval (Wilson)", f"{bounds[0]:.1f} to {bounds[1]:.1f} %")


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
