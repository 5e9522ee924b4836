"""The bar on standard error: not before there is progress, and without an earlier run's images in its speed."""

import pytest

from lostreg.cli.progress import ProgressBar, StepBars


def test_nothing_is_drawn_before_the_first_image(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("model", 3):
        assert capsys.readouterr().err == ""
    assert capsys.readouterr().err == ""
    with pytest.raises(OSError, match="disk"), ProgressBar("model", 3):
        raise OSError("disk full")
    assert capsys.readouterr().err == ""


def test_images_are_counted_one_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("model", 3) as bar:
        for _ in range(3):
            bar.advance()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith("\n")
    last = captured.err.rpartition("\r")[2]
    assert last.startswith("model: 100%")
    assert " 3/3 [" in last


def test_images_of_an_earlier_run_are_there_from_the_start(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("model", 10) as bar:
        bar.advance(9)
        assert " 8/10 [" in capsys.readouterr().err
        bar.advance(10)
    assert " 10/10 [" in capsys.readouterr().err.rpartition("\r")[2]


def test_what_is_told_has_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("model", 2) as bar:
        bar.tell("before the bar")
        assert capsys.readouterr().err == "lostreg: before the bar\n"
        bar.advance()
        capsys.readouterr()
        bar.tell("error: one\nof two lines")
        told = capsys.readouterr().err
        assert told.split("\r")[-1] == "lostreg: error: one of two lines\n"
        assert told.split("\r")[-2].strip() == ""  # the bar is wiped out first
        bar.advance()
    assert "100%" in capsys.readouterr().err


def test_steps_have_a_bar_each(capsys: pytest.CaptureFixture[str]) -> None:
    with StepBars("model") as bars:
        assert capsys.readouterr().err == ""
        for step, total in (("norms", 3), ("sample", 2), ("norms", 1)):
            for done in range(1, total + 1):
                bars.advance(step, done, total)
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line.rpartition("\r")[2] for line in captured.err.split("\n")[:-1]]
    assert [line.partition(":")[0] for line in lines] == ["model, norms", "model, sample", "model, norms"]
    for line, total in zip(lines, (3, 2, 1), strict=True):
        assert ": 100%" in line
        assert f" {total}/{total} [" in line


def test_a_step_that_begins_again_has_another_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with StepBars("model") as bars:
        for _ in range(2):
            for done in (1, 2):
                bars.advance("norms", done, 2)
    lines = [line.rpartition("\r")[2] for line in capsys.readouterr().err.split("\n")[:-1]]
    assert [" 2/2 [" in line for line in lines] == [True, True]


def test_an_error_before_the_first_step_draws_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with StepBars("model") as bars:
        bars.tell("error: before")
    assert capsys.readouterr().err == "lostreg: error: before\n"


def test_what_is_told_during_a_step_has_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with StepBars("model") as bars:
        bars.advance("norms", 1, 2)
        capsys.readouterr()
        bars.tell("error: one")
        told = capsys.readouterr().err
        assert told.split("\r")[-1] == "lostreg: error: one\n"
    assert capsys.readouterr().err.endswith("\n")  # what comes next begins below the bar
