"""The page's HTML: everything in one file, nothing from elsewhere, and no text of the run taken for markup."""

import base64
import hashlib
import html
import json
from collections.abc import Iterator, Sequence
from importlib import resources
from string import Template
from typing import Any, Final

from lostreg.defaults import CLEAR_SCORE
from lostreg.gallery.entries import Entry, readable
from lostreg.jsonio import is_finite_number
from lostreg.runs.reader import RunFolder, Survey

_ITEMS: Final = "<!-- items -->\n"
_ESCAPES: Final = {ord("<"): "\\u003c", ord(">"): "\\u003e", ord("&"): "\\u0026"}
_IN_HEADER: Final = ("corloc", "hits", "images", "wilson_95", "unreadable", "complete")


def page_head(run: RunFolder, survey: Survey, left_out: int, choice: str) -> str:
    """Everything above the images.

    Args:
        run: the folder.
        survey: its counts.
        left_out: images with boxes that the page does not show.
        choice: how those that it shows were chosen, for the reader.
    """
    style, script = _asset("gallery.css"), _asset("gallery.js")
    name = run.folder.absolute().name or "run"
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; img-src blob: data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return _template()[0].substitute(
        policy=policy,
        style=style,
        name=_text(name),
        lead=_text(_lead(run, survey)),
        tiles="".join(_tiles(run, survey)),
        notes="".join(f'<p class="note">{_text(note)}</p>\n' for note in _notes(survey, left_out, choice)),
        settings=_settings(run),
        failed=_failed(survey),
        clear=f"{CLEAR_SCORE:g}",
    )


def page_item(entry: Entry) -> str:
    """One image: data that no browser runs, parses as markup or loads before the script asks for it."""
    number = entry.card["number"]
    return (
        f'<script type="application/json" class="card-data">{_json(entry.card)}</script>\n'
        f'<script type="application/json" id="maps-{number}">{_json(entry.maps)}</script>\n'
        f'<script type="text/plain" id="jpeg-{number}">{base64.b64encode(entry.jpeg).decode("ascii")}</script>\n'
    )


def page_tail(gone: int, changed: int, sort: str) -> str:
    """Everything below the images.

    Args:
        gone: images shown whose files cannot be read any more.
        changed: images shown whose files have another size than in the run.
        sort: the order to begin with, a value of the page's list.
    """
    facts = {"gone": gone, "changed": changed, "sort": sort}
    return _template()[1].substitute(facts=_json(facts), script=_asset("gallery.js"))


def _template() -> tuple[Template, Template]:
    head, _, tail = _asset("page.html").partition(_ITEMS)
    return Template(head), Template(tail)


def _asset(name: str) -> str:
    return resources.files("lostreg.gallery").joinpath(name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    """What the content security policy calls this style or script by: no other one may run."""
    digest = base64.b64encode(hashlib.sha256(content.encode("utf-8")).digest()).decode("ascii")
    return f"'sha256-{digest}'"


def _json(value: Any) -> str:
    """JSON that holds neither an end of a script nor anything but ASCII: lone surrogates become escapes."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).translate(_ESCAPES)


def _text(value: str) -> str:
    return html.escape(readable(value))


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


def _tiles(run: RunFolder, survey: Survey) -> Iterator[str]:
    yield _tile("images", f"{survey.images:,}")
    yield _tile("boxes", f"{survey.boxes:,}")
    yield _tile(f"no clear object (score below {CLEAR_SCORE:g})", f"{survey.unclear:,}")
    yield _tile("unreadable", f"{survey.unreadable:,}")
    found = survey.corloc
    if found is not None:
        low, high = found.wilson_interval()
        yield _tile(f"corloc ({found.hits:,} of {found.images:,} hit)", f"{found.percent:.2f} %")
        yield _tile("its 95 % interval (Wilson)", f"{low:.1f} to {high:.1f} %")
    else:
        yield from _recorded(run.results or {})


def _recorded(results: dict[str, Any]) -> Iterator[str]:
    """Corloc as the run wrote it, where there are no maps with ground truth."""
    corloc, bounds = results.get("corloc"), results.get("wilson_95")
    if is_finite_number(corloc):
        yield _tile("corloc", f"{corloc:.2f} %")
    if isinstance(bounds, list) and len(bounds) == 2 and all(is_finite_number(bound) for bound in bounds):
        yield _tile("its 95 % interval (Wilson)", f"{bounds[0]:.1f} to {bounds[1]:.1f} %")


def _tile(name: str, value: str) -> str:
    return f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>\n"


def _notes(survey: Survey, left_out: int, choice: str) -> Iterator[str]:
    if left_out:
        shown = len(survey.scores) - left_out
        yield (
            f"This page shows {shown:,} of {len(survey.scores):,} images: {choice}. {left_out:,} are left out; "
            "lostreg report --limit N --choose first|lowest|highest|even shows others."
        )
    if survey.unmapped:
        yield f"{_count(survey.unmapped)} without a line in maps.jsonl: no degree map, seed patch or ground truth."


def _settings(run: RunFolder) -> str:
    rows = [row for row in _flat(run.results or {}, "") if row[0] and row[0] not in _IN_HEADER]
    return _table(("setting", "value"), rows) if rows else "<p>No settings are known.</p>"


def _flat(value: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _failed(survey: Survey) -> str:
    if not survey.failures:
        return ""
    beyond = survey.failures - len(survey.failed)
    more = f"<p>and {beyond:,} more</p>" if beyond else ""
    table = _table(("image", "reason"), survey.failed)
    return f'<details id="failed"><summary>{_count(survey.failures)} without a box</summary>{table}{more}</details>\n'


def _count(images: int) -> str:
    return f"{images:,} image{'' if images == 1 else 's'}"


def _table(headings: Sequence[str], rows: Sequence[tuple[str, str]]) -> str:
    head = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in headings)
    body = "".join(f'<tr><th scope="row">{_text(name)}</th><td>{_text(value)}</td></tr>\n' for name, value in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'
