"""JSON files of one object."""

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lostreg.errors import CalibrationError, OptionError, RegistersError
from lostreg.jsonio import count_lines, held, keep_lines, load_document, read_json, save_document, write_json

KIND = "lostreg test 1"


def load(path: Path, parse: Any = dict) -> Any:
    return load_document(path, KIND, parse, CalibrationError, name="test file", command="lostreg test")


def test_what_is_saved_is_loaded_without_its_format(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.json"
    fields = {"number": 1.5, "text": "ü", "nothing": None, "list": [[1, 2]]}
    save_document(path, KIND, fields, CalibrationError)
    assert load(path) == fields
    assert "ü" in path.read_text(encoding="utf-8")
    assert path.read_text(encoding="utf-8").endswith("}\n")
    save_document(str(path), KIND, {}, CalibrationError)
    assert load(path) == {}
    assert list(path.parent.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    assert json.loads(path.read_text()) == {"old": 1}


@pytest.mark.parametrize("content", ["", "{", "1", "[]", "{}", '{"format": "other"}', '{"format": null}'])
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "file.json"
    path.write_text(content)
    with pytest.raises(CalibrationError, match=r"file\.json is no file of `lostreg test`: "):
        load(path)


@pytest.mark.parametrize("depth", [33, 900, 950, 990, 1_000, 100_000])
@pytest.mark.parametrize("level", ["[", '{"a": '])
def test_documents_of_many_levels_are_refused(tmp_path: Path, depth: int, level: str) -> None:
    nested = level * depth + "1" + {"[": "]"}.get(level, "}") * depth
    path = tmp_path / "file.json"
    path.write_text(f'{{"format": "{KIND}", "a": {nested}}}')
    with pytest.raises(CalibrationError, match=r"more (levels than can be read|than 32 levels)"):
        load(path)


def test_documents_of_some_levels_and_long_integers_are_read(tmp_path: Path) -> None:
    assert read_json("[" * 32 + "]" * 32) == functools.reduce(lambda inner, _: [inner], range(31), [])
    for number in ("9" * 5000, "-" + "9" * 5000):
        (tmp_path / "file.json").write_text(f'{{"format": "{KIND}", "a": {number}}}')
        with pytest.raises(CalibrationError, match=r"no file of `lostreg test`: .*digits"):
            load(tmp_path / "file.json")


@pytest.mark.parametrize("error", [ValueError, TypeError, OptionError])
def test_what_is_wrong_with_the_fields_is_said(tmp_path: Path, error: type[Exception]) -> None:
    def parse(fields: dict[str, Any]) -> None:
        raise error("wrong with it")

    save_document(tmp_path / "file.json", KIND, {}, CalibrationError)
    with pytest.raises(CalibrationError, match="wrong with it"):
        load(tmp_path / "file.json", parse)


def test_each_caller_has_its_own_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for error in (CalibrationError, RegistersError):
        with pytest.raises(error, match="cannot write"):
            save_document(tmp_path / "file" / "x.json", KIND, {}, error)
    with pytest.raises(CalibrationError, match=r"cannot read the test file .*none: No such file or directory"):
        load(tmp_path / "none")


@pytest.mark.parametrize(
    ("content", "whole"),
    [
        (b"", b""),
        (b"{}", b""),
        (b"{}\n", b"{}\n"),
        (b'{"a": 1}\n{"a": 2}\n', b'{"a": 1}\n{"a": 2}\n'),
        (b'{"a": 1}\n{"a": ', b'{"a": 1}\n'),
        (b'{"a": 1}\n\xc3', b'{"a": 1}\n'),  # cut within a letter
        (b"\n\n{", b"\n\n"),
    ],
)
def test_what_is_no_whole_line_is_cut_off_the_file(tmp_path: Path, content: bytes, whole: bytes) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(content)
    keep_lines(path)
    assert path.read_bytes() == whole


def test_a_file_that_is_not_there_has_no_lines_and_is_not_made(tmp_path: Path) -> None:
    keep_lines(tmp_path / "none.jsonl")
    assert not list(tmp_path.iterdir())


def test_whole_lines_are_read_without_permission_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b"{}\n")
    monkeypatch.setattr(Path, "open", _reading_only(Path.open))
    keep_lines(path)
    assert path.read_bytes() == b"{}\n"


@pytest.mark.parametrize(("most", "kept"), [(0, b""), (1, b"a\n"), (2, b"a\nb\n"), (9, b"a\nb\n"), (None, b"a\nb\n")])
def test_only_the_first_lines_are_kept_of_a_file_that_is_ahead(tmp_path: Path, most: int | None, kept: bytes) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b"a\nb\nc")
    keep_lines(path, most)
    assert path.read_bytes() == kept


def _reading_only(opened: Callable[..., Any]) -> Callable[..., Any]:
    def open_to_read(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        assert mode in ("r", "rb"), f"opened with {mode}"
        return opened(path, mode, *arguments, **options)

    return open_to_read


HOLD = """
import os, sys, time
from pathlib import Path
from lostreg.jsonio import whole_file
with whole_file(Path(sys.argv[1])) as beside:
    beside.write_text("half")
    print(beside, flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be removed there")
def test_what_a_kill_left_is_removed_and_what_a_live_process_writes_is_not(tmp_path: Path) -> None:
    path = tmp_path / "a [1].json"
    writer = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        part = Path(str(writer.stdout and writer.stdout.readline()).rstrip("\n"))
        write_json(path, {"by": "another"})
        assert part.read_text() == "half"
    finally:
        writer.kill()
        writer.communicate()
    assert part.exists()  # the kill left it
    kept = [tmp_path / f"a [1].json{end}" for end in (".part", ".part-", ".part-x", ".part-01", ".part-1.gz")]
    kept += [tmp_path / "other.json.part-1", tmp_path / "a 1.json.part-1"]
    for other in kept:
        other.write_text("mine")
    with pytest.raises(TypeError):
        write_json(path, {"no JSON": object()})
    write_json(path, {"by": "us"})
    assert sorted(tmp_path.iterdir()) == sorted([path, *kept])


def test_a_part_that_is_taken_for_a_leftover_before_it_is_held_is_made_again(tmp_path: Path) -> None:
    path, made = tmp_path / "a.part-1", []

    def make() -> None:
        made.append(path)
        path.touch()
        if len(made) < 3:
            path.unlink()

    with held(path, make) as is_there:
        assert is_there()
        path.unlink()
        path.touch()
        assert not is_there() or sys.platform == "win32"
    assert len(made) == 3


@pytest.mark.parametrize(("content", "lines"), [(b"", 0), (b"a", 0), (b"a\n\nb", 2), (b"a\nb\n", 2)])
def test_whole_lines_are_counted(tmp_path: Path, content: bytes, lines: int) -> None:
    (tmp_path / "file").write_bytes(content)
    assert count_lines(tmp_path / "file") == lines
    assert count_lines(tmp_path / "none") == 0
