"""The bar on standard error: not before there is progress, and without an earlier run's images in its speed."""

import re
import time

import pytest

from lostreg.cli.progress import ProgressBar, judge_failures
from lostreg.errors import ImageError, ImageUnavailableError
from lostreg.progress import Progress

pytestmark = pytest.mark.usefixtures("on_terminal")


def last_line(text: str) -> str:
    return text.rpartition("\r")[2]


def test_nothing_is_drawn_before_the_first_image(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("model"):
        assert capsys.readouterr().err == ""
    assert capsys.readouterr().err == ""
    with pytest.raises(OSError, match="disk"), ProgressBar("model"):
        raise OSError("disk full")
    assert capsys.readouterr().err == ""


def test_images_are_counted_one_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("model") as bar:
        for done in (1, 2, 3):
            bar(Progress(done, 3, note="corloc 12.50"))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith("\n")
    last = last_line(captured.err)
    assert last.startswith("model: 100%")
    assert " 3/3 [" in last
    assert "corloc 12.50" in last


@pytest.mark.parametrize("is_told", [False, True], ids=["not told", "told one by one"])
def test_images_of_an_earlier_run_are_there_from_the_start(capsys: pytest.CaptureFixture[str], is_told: bool) -> None:
    with ProgressBar("model") as bar:
        for done in range(1 if is_told else 9, 9 if is_told else 10):
            bar(Progress(done, 10, known=min(done, 8)))
        if not is_told:
            assert " 8/10 [" in capsys.readouterr().err
        bar(Progress(10, 10, known=8))
    assert " 10/10 [" in last_line(capsys.readouterr().err)


def test_what_cannot_be_done_is_counted_or_told_on_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    for tell_errors in (False, True):
        with ProgressBar("model", tell_errors=tell_errors) as bar:
            bar(Progress(1, 2, error=ImageError("one\nof two lines")))
            told = capsys.readouterr().err
            bar(Progress(2, 2))
            assert bar.errors == 1
        last = last_line(capsys.readouterr().err)
        if tell_errors:
            assert told.split("\r")[-1] == "lostreg: error: one of two lines\n"
            assert told.split("\r")[-2].strip() == ""  # the bar is wiped out first
            assert last.startswith("model: 100%")
        else:
            assert "error" not in told
            assert last.startswith("model, 1 unreadable: 100%")


def test_what_is_told_before_the_first_image_draws_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("model") as bar:
        bar.tell("before the bar")
    assert capsys.readouterr().err == "lostreg: before the bar\n"


def test_steps_have_a_bar_each_and_so_has_one_that_begins_again(capsys: pytest.CaptureFixture[str]) -> None:
    steps = (("norms", 3), ("sample", 2), ("norms", 2), ("norms", 2))
    with ProgressBar("model") as bar:
        for step, total in steps:
            for done in range(1, total + 1):
                bar(Progress(done, total, step=step))
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [last_line(line) for line in captured.err.split("\n")[:-1]]
    assert [line.partition(":")[0] for line in lines] == [f"model, {step}" for step, _ in steps]
    for line, (_, total) in zip(lines, steps, strict=True):
        assert ": 100%" in line
        assert f" {total}/{total} [" in line


def test_the_first_images_take_their_time_from_the_start(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("model") as bar:
        time.sleep(0.25)
        for done in range(1, 6):  # of one batch
            bar(Progress(done, 5))
    drawn = capsys.readouterr().err
    rates = [float(rate) for rate in re.findall(r"([\d.]+)img/s", drawn)]
    assert rates
    assert max(rates) <= 20, drawn


@pytest.mark.parametrize(
    ("failed", "unavailable", "images", "code", "told"),
    [
        (0, 0, 100, 0, []),
        (10, 0, 100, 0, []),
        (11, 0, 100, 0, ["WARNING: 11 of 100 images (11 %) could not be read; --again tries them again"]),
        (99, 0, 100, 0, ["WARNING: 99 of 100 images (99 %)"]),
        (100, 0, 100, 2, ["WARNING: 100 of 100 images (100 %)"]),
        (3, 2, 100, 0, ["2 images could not be had this time"]),
        (30, 10, 100, 0, ["WARNING: 30 of 100 images", "10 images could not be had this time"]),
        (11, 11, 100, 2, ["WARNING: 11 of 100 images", "11 images could not be had this time"]),
        (1, 0, 1, 2, ["WARNING: 1 of 1 images"]),
    ],
)
def test_much_that_failed_is_told_loudly_and_passing_faults_are_no_success(
    failed: int, unavailable: int, images: int, code: int, told: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert judge_failures(failed, unavailable, images, retry="--again") == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(told)
    for line, start in zip(lines, told, strict=True):
        assert line.startswith(f"lostreg: {start}")
    assert ("--again" in "".join(lines)) == (failed > max(unavailable, images // 10))


def test_images_that_could_not_be_had_are_counted_apart(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("model") as bar:
        bar(Progress(1, 2, error=ImageError("broken")))
        bar(Progress(2, 2, error=ImageUnavailableError("gone")))
    assert (bar.errors, bar.unavailable) == (2, 1)
    assert "model, 2 unreadable" in capsys.readouterr().err
