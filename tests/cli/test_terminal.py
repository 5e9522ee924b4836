"""What commands write to a terminal, and where there is none."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import scene
from PIL import Image

from lostreg.cli.main import main
from lostreg.cli.options import one_line
from lostreg.cli.terminal import standard_streams

FAST = ["--backbone", "imgfocus_vits14", "--device", "cpu"]
HOSTILE = "\x1b]0;owned\x07\x1b[2J\u202egpj.exe\r\n\x9b31m.jpg"
FULL = Path("/dev/full")
FAILS = "error: cannot write to standard output: No space left on device"

pytestmark = pytest.mark.usefixtures("one_thread", "small_model")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full")
posix = pytest.mark.skipif(os.name != "posix", reason="closes a descriptor")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        Image.fromarray(scene(number, 98, 70)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(params=["closed", pytest.param("full", marks=needs_full)])
def nowhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Standard error as `2>&-` and `2>/dev/full` leave it."""
    if request.param == "closed":
        monkeypatch.setattr(sys, "stderr", None)
        yield
        return
    file = os.fdopen(os.open(FULL, os.O_WRONLY), "w", buffering=1)
    monkeypatch.setattr(sys, "stderr", file)
    yield
    with suppress(OSError):
        file.close()


@pytest.mark.usefixtures("nowhere")
def test_a_run_goes_on_without_anyone_to_tell(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "broken.png").write_text("no picture")
    assert main(["discover", str(photos), "--out", str(tmp_path / "out"), *FAST]) == 0
    assert len((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()) == 4
    assert json.loads((tmp_path / "out" / "results.json").read_text())["complete"] is True
    assert capsys.readouterr().out.startswith("4 photos")
    assert main(["predict", str(photos), *FAST]) == 2  # for the broken one
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert main(["discover", str(tmp_path / "none"), "--out", str(tmp_path / "out"), *FAST]) == 2


@posix
@pytest.mark.parametrize(
    ("command", "code", "told"),
    [
        pytest.param("backbones > /dev/full", 2, f"lostreg backbones: {FAILS}", marks=needs_full),
        pytest.param("--help > /dev/full", 2, f"lostreg: {FAILS}", marks=needs_full),
        pytest.param("backbones --nope 2> /dev/full", 2, "", marks=needs_full),
        ("backbones >&-", 0, ""),
        ("backbones --nope 2>&-", 2, ""),
        ("predict x.jpg --json - >&-", 2, "lostreg predict: error: --json -: standard output is closed"),
    ],
)
def test_the_exit_code_is_right_wherever_the_streams_lead(command: str, code: int, told: str) -> None:
    run = f"'{sys.executable}' -c 'import sys; from lostreg.cli.main import main; sys.exit(main())' {command}"
    done = subprocess.run(["sh", "-c", run], capture_output=True, text=True)
    assert done.returncode == code
    assert done.stderr.startswith(told)
    assert len(done.stderr.splitlines()) == bool(told)


@posix
def test_no_file_gets_the_number_of_a_stream_that_was_closed(tmp_path: Path) -> None:
    script = (
        "import os, sys; from lostreg.cli.terminal import standard_streams\n"
        "with standard_streams(), open(sys.argv[1], 'w') as file:\n"
        "    os.write(1, b'from C'); os.write(2, b'from C'); print('out'); print('err', file=sys.stderr)\n"
        "    file.write(str(file.fileno()))"
    )
    run = ["sh", "-c", f"'{sys.executable}' -c \"$0\" \"$1\" <&- >&- 2>&-", script, str(tmp_path / "file")]  # fmt: skip
    assert subprocess.run(run, check=False).returncode == 0
    assert int((tmp_path / "file").read_text()) > 2


@posix
def test_no_name_acts_on_the_terminal(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(scene(1, 98, 70)).save(tmp_path / "sound.png")
    (tmp_path / "sound.png").rename(photos / f"a{HOSTILE}")
    (photos / f"b{HOSTILE}").write_text("no picture")
    out = str(tmp_path / HOSTILE)
    assert main(["predict", str(photos), *FAST]) == 2
    assert main(["predict", str(photos), "--json", "-", *FAST]) == 2
    assert main(["discover", str(photos), "--out", out, "--strict", *FAST]) == 2
    assert main(["report", out]) == 0
    assert main(["export", out, "--format", "csv", "--out", HOSTILE]) == 2
    with pytest.raises(SystemExit):
        main(["predict", "a.jpg", "--bias", HOSTILE])
    captured = capsys.readouterr()
    for text, kept in ((captured.out, "\n"), (captured.err, "\n\r")):
        assert "gpj.exe" in text
        assert not [sign for sign in text if not sign.isprintable() and sign not in kept]
    assert "\\u001b]0;owned\\u0007" in captured.err
    lines = captured.out.splitlines()
    (row,) = [line for line in lines if line.startswith(f"{photos.as_posix()}/a")]
    assert "\\u000d\\u000a" in row
    found = [json.loads(line)["image_id"] for line in lines if line.startswith("{")]
    assert [name for name in found if "gpj" in name] == [f"{photos.as_posix()}/{start}{HOSTILE}" for start in "ab"]


@pytest.mark.parametrize(
    ("message", "line"),
    [("no  such   photo.jpg", "no  such   photo.jpg"), ("of a library:\n  two lines\n", "of a library: two lines")],
)
def test_messages_are_one_line_and_names_keep_their_spaces(message: str, line: str) -> None:
    assert one_line(message) == line


def test_bars_may_move_and_names_may_not(capsys: pytest.CaptureFixture[str]) -> None:
    with standard_streams():
        for text in ("\n", "\x1b[A\x1b[A", "\ra bar \x1b[A", "two\nlines"):
            sys.stderr.write(text)
        sys.stdout.writelines(["\x1b[1m", "é\ta\n"])
    captured = capsys.readouterr()
    assert captured.err == "\n\x1b[A\x1b[A\ra bar \\u001b[Atwo\nlines"
    assert captured.out == "\\u001b[1mé\\u0009a\n"


def test_the_streams_are_given_back() -> None:
    before = sys.stdout, sys.stderr
    with standard_streams():
        assert sys.stdout is not before[0]
    assert (sys.stdout, sys.stderr) == before
