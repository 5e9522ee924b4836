"""``lostreg report``: what it writes, says and refuses."""

import argparse
import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import disc_picture
from fabricate_run import Page, write_run
from PIL import Image

from lostreg.cli import report
from lostreg.cli.options import Parser
from lostreg.errors import LostregError
from lostreg.gallery import build

pytestmark = pytest.mark.usefixtures("on_terminal")


def run(command: str, place: Path) -> int:
    parser = Parser(prog="lostreg")
    report.add_parser(parser.add_subparsers())
    args: argparse.Namespace = parser.parse_args(shlex.split(command.format(*[place] * command.count("{}"))))
    code: int = args.run(args)
    return code


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    write_run(place / "run", ["im0000.jpg", "im0001.jpg", "im0002.jpg"])
    shutil.copytree(place / "run", place / "bare")
    (place / "bare/maps.jsonl").unlink()
    shutil.copytree(place / "run", place / "several/dino_vits16")
    (place / "folder.html").mkdir()
    (place / "file").write_text("mine")
    (place / "mine.html").write_text("<p>mine</p>")
    Image.fromarray(disc_picture()).save(place / "good.jpg")
    return place


def test_the_page_lies_in_the_run_folder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("report {}/run", place) == 0
    captured = capsys.readouterr()
    target = place / "run/report.html"
    assert len(Page(target).cards) == 3
    assert captured.out == f"written to {target}: 3 images, {target.stat().st_size / 1e6:.1f} MB\n"
    assert "report: 100%" in captured.err
    assert captured.err.count("\n") == 1


def test_the_page_goes_where_it_is_asked_for(place: Path) -> None:
    assert run("report {}/run --out {}/new/folder/page.HTM --limit 2 --choose highest", place) == 0
    assert len(Page(place / "new/folder/page.HTM").cards) == 2


def test_a_run_without_maps_needs_the_images_folder(place: Path) -> None:
    with pytest.raises(LostregError, match=r"bare holds no maps\.jsonl, .* folder with --images "):
        run("report {}/bare", place)
    assert run("report {}/bare --images {}/photos", place) == 0
    page = Page(place / "bare/report.html")
    assert page.picture(3) is not None
    assert page.maps(3) == {}


def test_an_earlier_page_is_replaced_and_nothing_beside_it_is_touched(place: Path) -> None:
    target = place / "run/again.html"
    (place / "run/again.html.part").write_text("mine")
    for limit in (1, 2):
        assert run(f"report {{}}/run --out {{}}/run/again.html --limit {limit}", place) == 0
        assert len(Page(target).cards) == limit
    assert (place / "run/again.html.part").read_text() == "mine"
    assert not list((place / "run").glob(".again*"))


def test_what_is_lacking_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", ["a", "b", "c"])
    (tmp_path / "photos/im0001.jpg").unlink()
    Image.fromarray(disc_picture(40, 30)).save(tmp_path / "photos/im0000.jpg")
    assert run("report {}/run --limit 2", tmp_path) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lostreg: ")]
    assert lines == [
        "lostreg: 1 of 2 image files cannot be read any more: placeholders stand for them; --images DIR says where "
        "they are now",
        "lostreg: 1 of 2 image files have another size than in the run",
        "lostreg: 1 of 3 images are left out: see --limit and --choose",
    ]


def test_a_page_with_pictures_outlives_a_folder_that_was_renamed(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", ["im0000.jpg", "im0001.jpg", "im0002.jpg"])
    assert run("report {}/run", tmp_path) == 0
    good = (folder / "report.html").read_bytes()
    (tmp_path / "photos").rename(tmp_path / "renamed")
    with pytest.raises(LostregError, match=r"^3 of 3 image files are not there .* shows 3, so it stays .*--images DIR"):
        run("report {}/run", tmp_path)
    assert run("report {}/run --out {}/run/other.html", tmp_path) == 0  # boxes and maps alone are better than nothing
    assert run("report {}/run --out {}/run/other.html", tmp_path) == 0
    assert run("report {}/run --images {}/renamed", tmp_path) == 0
    assert Page(folder / "report.html").picture(3) is not None
    (tmp_path / "renamed/im0001.jpg").unlink()
    with pytest.raises(LostregError, match=r"^1 of 3 image files are not there .* shows 3, "):
        run("report {}/run --images {}/renamed", tmp_path)
    assert (folder / "report.html").read_bytes() == good
    assert not list(folder.glob("*.part*"))
    assert run("report {}/run --images {}/renamed --limit 1", tmp_path) == 0  # fewer, since fewer are asked for


BAD = {
    "a picture": ("report {}/run --out {}/good.jpg", r"--out .*good\.jpg: expected a file ending in \.html or \.htm"),
    "predictions": ("report {}/run --out {}/run/predictions.jsonl", "expected a file ending in"),
    "no suffix": ("report {}/run --out {}/file", "expected a file ending in"),
    "a folder": (
        "report {}/run --out {}/folder.html",
        r"folder\.html: expected a file for the page, not an image or a",
    ),
    "below a file": ("report {}/run --out {}/file/a.html", r"file is a file, expected a folder"),
    "no run": ("report {}/none", r"none holds no predictions\.jsonl: expected a folder that `lostreg discover`"),
    "a file as run": ("report {}/file", r"file holds no predictions\.jsonl: expected a folder"),
    "several runs": ("report {}/several", r"such as .*several/dino_vits16 \(1 lie in it\)"),
    "a predictions file": ("report {}/run/predictions.jsonl", r"is a predictions file: expected its folder, .*run"),
    "another page": ("report {}/run --out {}/mine.html", r"mine\.html is there already, and no page of lostreg report"),
    "no images": ("report {}/run --images {}/none", "--images .*none: expected a folder"),
}


@pytest.mark.parametrize(("command", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_before_the_work(
    place: Path, monkeypatch: pytest.MonkeyPatch, command: str, message: str
) -> None:
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    monkeypatch.setattr(build, "write_gallery", None)
    with pytest.raises(LostregError) as caught:
        run(command, place)
    assert re.search(message, str(caught.value)), caught.value
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


def test_a_limit_of_none_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run("report {}/run --limit 0", place)
    assert caught.value.code == 2
    assert "expected an integer of at least 1, not '0'" in capsys.readouterr().err


def test_the_command_offers_what_the_gallery_can_do() -> None:
    """Its values are written out so that `--help` loads nothing heavy."""
    assert build.CHOICES == report._CHOICES
    assert build.LIMIT == report._LIMIT
