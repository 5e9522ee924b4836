"""JSON files of one object."""

import json
from pathlib import Path
from typing import Any

import pytest

from lostreg.documents import load_document, save_document, write_json
from lostreg.errors import CalibrationError, OptionError, RegistersError

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
