"""Lines that survive a kill, and lines of which only the first are wanted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lostreg.lines import keep_lines, whole_lines


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
    assert whole_lines(path) == whole
    assert path.read_bytes() == whole


def test_a_file_that_is_not_there_has_no_lines_and_is_not_made(tmp_path: Path) -> None:
    assert whole_lines(tmp_path / "none.jsonl") == b""
    assert not list(tmp_path.iterdir())


def test_whole_lines_are_read_without_permission_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b"{}\n")
    monkeypatch.setattr(Path, "open", _reading_only(Path.open))
    assert whole_lines(path) == b"{}\n"


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
