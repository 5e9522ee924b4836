"""Folders that are there whole or not at all, and what is left where their writer is killed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lostreg.errors import PredictionsError
from lostreg.exports.writing import MARK, put, whole_folder

KILLED = """
import os, signal, sys
from pathlib import Path
from lostreg.exports import writing
out, stage = Path(sys.argv[1]), sys.argv[2]
renamed = Path.rename
def rename(path, target):
    done = renamed(path, target)
    if stage == "taken away" and path == out:
        os.kill(os.getpid(), signal.SIGKILL)
    return done
Path.rename = rename
with writing.whole_folder(out) as folder:
    writing.put(folder / "labels" / "a.txt", "half")
    if stage == "half":
        os.kill(os.getpid(), signal.SIGKILL)
"""


def export(out: Path, content: str) -> None:
    with whole_folder(out) as folder:
        put(folder / "labels" / "a.txt", content)


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize("stage", ["half", "taken away"])
def test_what_a_killed_export_left_goes_with_the_next_one(tmp_path: Path, stage: str) -> None:
    out = tmp_path / "set"
    export(out, "old")
    mine = [tmp_path / "set.part-1", tmp_path / "set.part-two", tmp_path / "set.part-3"]
    for folder in mine[:2]:
        put(folder / "photo.txt", "mine")
    mine[2].write_text("mine")
    subprocess.run([sys.executable, "-c", KILLED, str(out), stage], check=False)
    assert len(list(tmp_path.glob("set.part-*"))) > len(mine)
    export(out, "new")
    assert (out / "labels" / "a.txt").read_text() == "new"
    assert sorted(tmp_path.iterdir()) == sorted([out, *mine])
    assert (mine[0] / "photo.txt").read_text() == "mine"


def test_the_export_of_a_live_process_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with whole_folder(tmp_path / "set") as folder:
        put(folder / "a", "first")
        with monkeypatch.context() as patched:
            patched.setattr(os, "getpid", lambda: 1)  # as in another container
            export(tmp_path / "set", "second")
        assert (folder / "a").read_text() == "first"
        shutil.rmtree(tmp_path / "set")
    assert (tmp_path / "set" / "a").read_text() == "first"
    assert (tmp_path / "set" / MARK).exists()


def test_a_folder_that_was_deleted_while_it_was_filled_is_no_export(tmp_path: Path) -> None:
    def write() -> None:
        with whole_folder(tmp_path / "set") as folder:
            put(folder / "a.txt", "lost")
            shutil.rmtree(folder)
            put(folder / "b.txt", "the rest")

    with pytest.raises(PredictionsError, match=r"cannot make the export .*: it was deleted before it was done"):
        write()
    assert not list(tmp_path.iterdir())
