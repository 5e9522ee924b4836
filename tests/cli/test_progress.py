"""The bar on standard error: not before there is progress, and without an earlier run's images in its speed."""

import pytest

from lostreg.cli.progress import ProgressBar


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
