"""Writing the page: images decoded in a few threads, each in the file before many more are read."""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args

import numpy as np

from lostreg.defaults import OVERLAP
from lostreg.errors import OptionError
from lostreg.gallery.entries import Entry, make_entry
from lostreg.gallery.page import render_page
from lostreg.images.draw import DASHES, OBJECTS
from lostreg.jsonio import as_line, whole_file
from lostreg.progress import OnProgress, Progress
from lostreg.runs.decisions import FORMAT
from lostreg.runs.reader import RunFolder, Shown

Choice: TypeAlias = Literal["first", "lowest", "highest", "even"]
CHOICES: Final[tuple[Choice, ...]] = get_args(Choice)
LIMIT: Final = 2000
_THREADS: Final = 4
_SORTS: Final = {"first": "run", "lowest": "low", "highest": "high", "even": "run"}
_WORDS: Final = {
    "first": "the first of the run",
    "lowest": "those with the lowest scores",
    "highest": "those with the highest scores",
    "even": "evenly spread over the run",
}


@dataclass(frozen=True)
class Written:
    """What went into a page.

    Attributes:
        shown: images on it.
        left_out: images with boxes that were not chosen.
        gone: images on it whose files cannot be read any more.
        changed: images on it whose files have another size than in the run.
        bare: images on it whose degree maps are left out: those of other images, and of more than `MOST_PATCHES`.
    """

    shown: int
    left_out: int
    gone: int
    changed: int
    bare: int


def write_gallery(
    run: RunFolder,
    target: Path,
    *,
    images: Path | None = None,
    limit: int = LIMIT,
    choose: Choice = "first",
    pictures: int = 0,
    on_progress: OnProgress = lambda _: None,
) -> Written:
    """Write a run's page, beside the target first, so that a reader meets the old page or the new.

    A page never takes the place of one with more pictures because image files are gone.

    Args:
        run: the folder.
        target: the file; its folder is made if need be.
        images: where the images are now; None takes the recorded paths.
        limit: images on the page at most, at least 1.
        choose: which, where there are more.
        pictures: those of the page whose place it takes, see `pictures_on`.
        on_progress: called after each image.

    Raises:
        OptionError: if the limit is below 1, the page cannot be written, or it would have fewer pictures than the page
            that is there because image files are gone.
        PredictionsError: if the run's files hold nothing or are malformed.
    """
    survey = run.survey()
    chosen = choose_images(survey.scores, limit, choose)
    left_out = len(survey.scores) - len(chosen)
    facts: dict[str, Any] = {"gone": 0, "changed": 0, "bare": 0, "sort": _SORTS[choose], "overlap": OVERLAP}
    facts |= {"colours": OBJECTS, "dashes": DASHES, "decisions": {"format": FORMAT, "run": run.name}, "key": _key(run)}
    entries = _entries(run, chosen, images, facts, on_progress)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # A file name that is not UTF-8 has lone surrogates: escapes stand for them on the page.
        with (
            whole_file(target) as beside,
            beside.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file,
        ):
            file.writelines(render_page(run, survey, left_out, _WORDS[choose], entries, facts))
            if facts["gone"] and len(chosen) - facts["gone"] < pictures <= len(chosen):
                raise OptionError(
                    f"{facts['gone']} of {len(chosen)} image files are not there or cannot be read, and {target} shows "
                    f"{pictures}, so it stays as it is: --images DIR says where they are now, --out FILE writes "
                    "another page"
                )
    except OSError as error:
        raise OptionError(f"cannot write {target}: {error.strerror}") from error
    return Written(len(chosen), left_out, facts["gone"], facts["changed"], facts["bare"])


def _key(run: RunFolder) -> str:
    """What browsers keep the decisions by: the same for a run that goes on, and where it or its photos have moved."""
    return hashlib.sha256(as_line({"run": run.name, "options": run.options}).encode()).hexdigest()[:16]


def choose_images(scores: list[tuple[int, float | None]], limit: int, choose: Choice) -> set[int]:
    """Numbers of the images to show.

    Args:
        scores: number and score of each; None counts as neither low nor high and comes last.
        limit: how many at most, at least 1.
        choose: which, where there are more.

    Raises:
        OptionError: if the limit is below 1 or the choice is unknown.
    """
    if limit < 1 or choose not in CHOICES:
        raise OptionError(f"expected a limit of at least 1 and one of {', '.join(CHOICES)}, not {limit} and {choose}")
    if len(scores) <= limit:
        return {number for number, _ in scores}
    if choose == "even":
        places = (np.arange(limit) * len(scores)) // limit
        return {scores[place][0] for place in places.tolist()}
    if choose != "first":
        sign = 1 if choose == "lowest" else -1
        scores = sorted(scores, key=lambda pair: float("inf") if pair[1] is None else sign * pair[1])
    return {number for number, _ in scores[:limit]}


def _entries(
    run: RunFolder, chosen: set[int], images: Path | None, facts: dict[str, Any], on_progress: OnProgress
) -> Iterator[Entry]:
    """The chosen images in order; whose files are gone or changed is counted as they go by."""
    read = partial(make_entry, images=images, exif=run.exif, max_pixels=run.max_pixels)
    for done, entry in enumerate(_read_ahead(read, _wanted(run, chosen)), start=1):
        yield entry
        facts["gone"] += not entry.jpeg
        facts["changed"] += bool(entry.jpeg) and "note" in entry.card
        facts["bare"] += "patch" in entry.card and "degrees" not in entry.maps
        on_progress(Progress(done, len(chosen)))


def _wanted(run: RunFolder, chosen: set[int]) -> Iterator[Shown]:
    left = len(chosen)
    for shown in run if left else ():
        if shown.number in chosen:
            yield shown
            left -= 1
            if not left:
                return


def _read_ahead(read: Callable[[Shown], Entry], wanted: Iterator[Shown]) -> Iterator[Entry]:
    """The entries in order, a few of them read ahead in threads."""
    threads = min(_THREADS, os.cpu_count() or 1)
    waiting: deque[Future[Entry]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for shown in wanted:
                waiting.append(pool.submit(read, shown))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
