"""Bars on standard error for whatever reports its progress."""

import logging
import sys
import time
from typing import TYPE_CHECKING

from lostreg.cli.options import tell
from lostreg.errors import ImageUnavailableError
from lostreg.progress import Progress

if TYPE_CHECKING:
    from tqdm import tqdm

_UNITS = {"probes": "probe", "heads": "head", "training": "step"}  # of steps that go through something else than images
_MANY = 0.1  # of all images: a run that fails on more is not one with a few broken photos


def judge_failures(failed: int, unavailable: int, images: int, *, retry: str) -> int:
    """Tell what a run could not read, loudly where that is much.

    Args:
        failed: images that could not be read.
        unavailable: of these, those that could not be had this time.
        images: all of them.
        retry: the option that tries all of them again.

    Returns:
        The exit code: 2 where nothing could be read, or more than a tenth could not be had, so that a script does not
        go on with what an unmounted disk has left; 0 for broken files, of which there will be as many the next time.
    """
    if failed > _MANY * images:
        share = f"{failed:,} of {images:,} images ({100 * failed / images:.0f} %)"
        again = f"; {retry} tries them again" if failed > unavailable else ""
        tell(f"WARNING: {share} could not be read{again}", logging.WARNING)
    if unavailable:
        tell(
            f"{unavailable:,} images could not be had this time (not there, not to be opened, or out of memory): "
            "the same command tries them again",
            logging.WARNING,
        )
    return 2 if failed == images or unavailable > _MANY * images else 0


def describe_misses(unreadable: int, unavailable: int) -> str:
    """A line on images of a benchmark that could not be read; see `judge_failures` for those that could not be had."""
    again = " (--overwrite tries them again)" if unreadable > unavailable else ""
    return f"{unreadable} images could not be read and count as misses{again}"


class ProgressBar:
    """A bar for each step of some work, from the first report on: an error before that is one line, without a bar.

    Args:
        description: in front of the bar.
        tell_errors: whether what could not be done is told as it comes, each on a line; else it is counted in the bar.

    Attributes:
        errors: how many could not be done.
        unavailable: of these, images that could not be had this time.
    """

    def __init__(self, description: str, *, tell_errors: bool = False) -> None:
        self._description = description
        self._tell_errors = tell_errors
        self._step = ""
        self._since = time.time()  # the last report: what comes next takes its time from then on
        self.errors = self.unavailable = 0
        self._bar: tqdm[None] | None = None

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def __call__(self, progress: Progress) -> None:
        """Show where the work stands; what an earlier run did does not count as fast."""
        if progress.error is not None:
            self.errors += 1
            self.unavailable += isinstance(progress.error, ImageUnavailableError)
        if logging.getLogger("lostreg").isEnabledFor(logging.INFO):
            self._draw(progress)
        if progress.error is not None and self._tell_errors:
            self.tell(f"error: {progress.error}", logging.ERROR)
        self._since = time.time()

    def _draw(self, progress: Progress) -> None:
        bar = self._bar_of(progress)
        if progress.error is not None and not self._tell_errors:
            bar.set_description_str(f"{self._description}, {self.errors} unreadable", refresh=False)
        if progress.note:
            bar.set_postfix_str(progress.note, refresh=False)
        if progress.done <= progress.known:
            bar.initial = bar.n = bar.last_print_n = progress.done
            bar.start_t = bar.last_print_t = time.time()
        else:
            bar.update(progress.done - bar.n)

    def tell(self, message: str, level: int = logging.INFO) -> None:
        """A line for the person at the terminal, on a line of its own."""
        if self._bar is not None:
            self._bar.clear()
        tell(message, level)

    def _bar_of(self, progress: Progress) -> "tqdm[None]":
        """The bar of a step: another one where another step begins, or the same one again."""
        from tqdm import tqdm

        if self._bar is None or progress.step != self._step or progress.done <= self._bar.n:
            self._close()
            self._step = progress.step
            self._bar = tqdm(
                total=progress.total,
                initial=progress.known,
                desc=f"{self._description}, {progress.step}" if progress.step else self._description,
                unit=_UNITS.get(progress.step, "img"),
                file=sys.stderr,
            )
            self._bar.start_t = self._bar.last_print_t = self._since
        return self._bar

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
