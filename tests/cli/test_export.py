"""``lostreg export``: whole files and folders or none, and one line for whatever is wrong."""

import errno
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from exporting import BROKEN, NAMES, collect, line, write_lines, write_run
from pyarrow.parquet import ParquetWriter

from lostreg.cli.main import main
from lostreg.runs.decisions import boxes_fingerprint
from lostreg.runs.predictions import read_predictions

OUT = {"coco": "coco.json", "voc": "voc", "yolo": "yolo", "csv": "boxes.csv"}
OUT |= {"parquet": "boxes.parquet", "labelstudio": "tasks.json"}


def run(command: str, place: Path) -> int | str | None:
    try:
        return main(["export", *shlex.split(command.replace("{}", place.as_posix()))])
    except SystemExit as done:
        return done.code


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder; a link counts as what it leads to."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", OUT)
def test_a_run_is_exported_and_the_last_line_says_what(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path)
    assert run(f"{{}}/run --format {kind} --out {{}}/new/{OUT[kind]}", tmp_path) == 0
    out = tmp_path / "new" / OUT[kind]
    assert out.exists()
    note = "1 unreadable" if kind in ("csv", "parquet") else "1 unreadable left out"
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"exported {len(NAMES)} images, {2 * len(NAMES)} boxes to {out} ({note})"
    beside = {OUT[kind], "tasks.xml"} if kind == "labelstudio" else {OUT[kind]}
    assert {path.name for path in out.parent.iterdir()} == beside


@pytest.mark.parametrize("kind", OUT)
def test_what_is_there_is_replaced_only_if_asked_for(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path)
    command = f"{{}}/run --format {kind} --out {{}}/new/{OUT[kind]}"
    assert run(command, tmp_path) == 0
    before = contents(tmp_path / "new")
    assert run(command + " --min-score 0.5", tmp_path) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert contents(tmp_path / "new") == before
    assert run(command + " --min-score 0.5 --overwrite", tmp_path) == 0
    after = contents(tmp_path / "new")
    assert after.keys() == before.keys()
    assert after != before


@pytest.mark.parametrize("kind", OUT)
def test_an_export_comes_out_the_same_every_time(tmp_path: Path, kind: str) -> None:
    write_run(tmp_path)
    for folder in ("one", "two"):
        assert run(f"{{}}/run --format {kind} --out {{}}/{folder}/{OUT[kind]}", tmp_path) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_images_without_a_clear_box_are_left_out_or_kept_as_empty(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(tmp_path, [line("a.jpg"), line("b.jpg", scores=[0.2, 0.1])])
    command = "{}/predictions.jsonl --min-score 0.25 --format"
    assert run(command + " coco --out {}/a.json", tmp_path) == 0
    assert capsys.readouterr().out.endswith("1 images, 1 boxes to " + f"{tmp_path}/a.json (1 without a box left out)\n")
    assert run(command + " coco --out {}/b.json --keep-empty", tmp_path) == 0
    assert len(json.loads((tmp_path / "b.json").read_text())["images"]) == 2
    assert run(command + " yolo --files none --out {}/yolo --keep-empty --val-share 0", tmp_path) == 0
    assert (tmp_path / "yolo/labels/train/b.txt").read_text() == ""
    assert run(command + " labelstudio --out {}/tasks.json", tmp_path) == 0
    assert [len(task["predictions"][0]["result"]) for task in json.loads((tmp_path / "tasks.json").read_text())] == [
        1,
        0,
    ]


@pytest.mark.parametrize("kind", OUT)
def test_rejected_boxes_are_left_out_of_every_format(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path, ["a.jpg", "b.jpg"])
    first = read_predictions(tmp_path / "run/predictions.jsonl")[0]
    images = [{"image_id": "a.jpg", "fingerprint": boxes_fingerprint(first), "decisions": ["reject", "keep"]}]
    decisions = {"format": "lostreg decisions 1", "run": "run", "images": images}
    (tmp_path / "mine.json").write_text(json.dumps(decisions))
    command = f"{{}}/run --format {kind} --out {{}}/{OUT[kind]} --decisions {{}}/mine.json --min-score 0.5"
    assert run(command, tmp_path) == 0
    captured = capsys.readouterr()
    assert "exported 2 images, 2 boxes to" in captured.out  # a's second, which scores less, and b's first
    assert "mine.json: 1 boxes are rejected, 1 kept" in captured.err
    images[0]["image_id"] = "c.jpg"
    (tmp_path / "mine.json").write_text(json.dumps(decisions))
    assert run(command + " --overwrite", tmp_path) == 2
    assert "1 images were decided on that the predictions do not have: c.jpg" in capsys.readouterr().err
    if kind == "coco":
        assert run("{}/run --format coco --out {}/mine.json --decisions {}/mine.json --overwrite", tmp_path) == 2
        assert "mine.json is a file of the run" in capsys.readouterr().err


def test_formats_without_scores_say_how_many_boxes_are_unclear(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(tmp_path, [line("a.jpg"), line("b.jpg")])
    assert run("{}/predictions.jsonl --format voc --files none --out {}/voc", tmp_path) == 0
    assert "2 of 4 boxes have a score below 0.25" in capsys.readouterr().err


def test_an_unfinished_run_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (write_run(tmp_path) / "results.json").write_text('{"complete": false}')
    assert run("{}/run --format csv --out {}/boxes.csv", tmp_path) == 0
    assert "did not come to its end" in capsys.readouterr().err


def test_links_and_labels_alone(tmp_path: Path) -> None:
    write_run(tmp_path, ["a.jpg", "b.jpg"])
    assert run("{}/run --format yolo --files link --out {}/linked", tmp_path) == 0
    links = [path for path in (tmp_path / "linked/images").rglob("*.jpg") if path.is_symlink()]
    assert sorted(path.resolve() for path in links) == [tmp_path / "photos/a.jpg", tmp_path / "photos/b.jpg"]
    assert run("{}/run --format voc --files none --out {}/bare", tmp_path) == 0
    assert not (tmp_path / "bare/JPEGImages").exists()


@pytest.mark.parametrize("kind", OUT)
def test_a_full_disk_leaves_nothing_and_harms_nothing(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path)
    command = f"{{}}/run --format {kind} --out {{}}/new/{OUT[kind]}"

    def full(path: Path, *_: Any, **__: Any) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        patched.setattr(ParquetWriter, "write_table", lambda *_, **__: full(tmp_path / "half"))
        assert run(command, tmp_path) == 2
        assert "No space left on device" in capsys.readouterr().err
    assert contents(tmp_path / "new") == {}
    assert run(command, tmp_path) == 0
    before = contents(tmp_path / "new")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        patched.setattr(ParquetWriter, "write_table", lambda *_, **__: full(tmp_path / "half"))
        assert run(command + " --overwrite", tmp_path) == 2
    assert contents(tmp_path / "new") == before


def test_ctrl_c_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lostreg.exports.pictures.shutil.copyfile", stop)
    assert run("{}/run --format yolo --out {}/deep/er/yolo", tmp_path) == 130
    assert not (tmp_path / "deep").exists()


def test_an_export_never_replaces_the_images_it_would_be_made_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path, ["a.jpg", "b.jpg"])
    assert run("{}/run --format yolo --out {}/yolo", tmp_path) == 0
    images = sorted((tmp_path / "yolo/images").rglob("*.jpg"))
    write_lines(tmp_path, [line(str(path)) for path in images])
    before = contents(tmp_path / "yolo")
    assert run("{}/predictions.jsonl --format yolo --out {}/yolo --overwrite", tmp_path) == 2
    assert "b.jpg, which is exported: give another" in capsys.readouterr().err
    assert contents(tmp_path / "yolo") == before


@pytest.mark.parametrize("name", ["notes.txt", "photos/a.jpg", "run/predictions.jsonl", "lost/lostreg-export.json"])
def test_a_folder_that_holds_more_than_an_export_is_never_deleted(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path, ["a.jpg"])
    assert run("{}/run --format yolo --out {}/yolo", tmp_path) == 0
    mine = tmp_path / "yolo" / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    capsys.readouterr()
    assert run("{}/run --format voc --out {}/yolo --overwrite", tmp_path) == 2
    assert f"holds {name.partition('/')[0]}, which no export writes" in capsys.readouterr().err
    assert mine.read_text() == "mine"
    mine.unlink()
    if mine.parent.name != "yolo":
        mine.parent.rmdir()
    (tmp_path / "yolo/labels.cache").touch()  # as Ultralytics leaves it
    assert run("{}/run --format voc --out {}/yolo --overwrite", tmp_path) == 0


def test_no_export_deletes_what_it_is_made_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path, ["a.jpg"])
    assert run("{}/run --format yolo --out {}/yolo", tmp_path) == 0
    moved = tmp_path / "yolo/labels/run"
    shutil.copytree(folder, moved)
    assert run("{}/yolo/labels/run --format yolo --out {}/yolo --overwrite", tmp_path) == 2
    assert "labels/run/predictions.jsonl, which is exported" in capsys.readouterr().err
    write_lines(tmp_path, [line(str(tmp_path / "yolo/images/train/gone.jpg"))])
    assert run("{}/predictions.jsonl --format yolo --files none --out {}/yolo --overwrite", tmp_path) == 2
    assert "gone.jpg, which is exported" in capsys.readouterr().err
    (tmp_path / "photos/a.jpg").replace(tmp_path / "yolo/images/a.jpg")
    (tmp_path / "photos/a.jpg").symlink_to(tmp_path / "yolo/images/a.jpg")
    assert run("{}/run --format yolo --out {}/yolo --overwrite", tmp_path) == 2
    assert "photos/a.jpg, which is exported" in capsys.readouterr().err
    assert (moved / "predictions.jsonl").is_file()


@pytest.mark.parametrize("kind", OUT)
def test_no_export_goes_into_another_where_the_next_would_delete_it(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path, ["a.jpg"])
    assert run("{}/run --format yolo --out {}/yolo", tmp_path) == 0
    before = contents(tmp_path)
    assert run(f"{{}}/run --format {kind} --out {{}}/yolo/labels/new/{OUT[kind]}", tmp_path) == 2
    assert "lies in an earlier export" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_a_run_that_was_killed_in_a_line_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predictions = write_run(tmp_path, ["a.jpg"]) / "predictions.jsonl"
    predictions.write_text(predictions.read_text() + '{"image_id": "b.j')
    assert run("{}/run --format coco --out {}/x.json", tmp_path) == 0
    assert "exported 1 images" in capsys.readouterr().out


def test_a_file_that_may_not_be_written_is_told_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path, ["a.jpg"])
    (tmp_path / "x.xml").touch()
    monkeypatch.setattr("os.access", lambda path, *_: Path(path).name != "x.xml")
    assert run("{}/run --format labelstudio --out {}/x.json --overwrite", tmp_path) == 2
    assert "x.xml cannot be written: permission denied" in capsys.readouterr().err


@pytest.mark.parametrize("kind", OUT)
def test_names_that_are_not_utf8_are_told_where_other_tools_meet_them(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path, ["a.jpg", BROKEN])
    assert run(f"{{}}/run --format {kind} --out {{}}/{OUT[kind]}", tmp_path) == 0
    told = "1 file names are not UTF-8" in capsys.readouterr().err
    assert told == (kind in ("coco", "labelstudio"))


@pytest.mark.parametrize("kind", OUT)
@pytest.mark.parametrize("image_id", ["\ud800.jpg", "a\0b.jpg", "//x/a.jpg", "../a.jpg"])
def test_strange_ids_are_exported(tmp_path: Path, kind: str, image_id: str) -> None:
    write_lines(tmp_path, [line(image_id)])
    bare = "--files none" if kind in ("voc", "yolo") else ""
    assert run(f"{{}}/predictions.jsonl --format {kind} {bare} --out {{}}/{OUT[kind]}", tmp_path) == 0


BAD = {
    "no format": ("{}/run --out {}/x", "arguments are required: --format"),
    "no out": ("{}/run --format csv", "arguments are required: --out"),
    "unknown format": ("{}/run --format tfrecord --out {}/x", "invalid choice: 'tfrecord'"),
    "no predictions": ("{}/none --format csv --out {}/x.csv", "none: expected a predictions file, or the folder of a"),
    "folder without a run": ("{}/photos --format csv --out {}/x.csv", "expected a predictions file"),
    "an image": ("{}/photos/a.jpg --format csv --out {}/x.csv", r"a\.jpg, line 1: expected an object with image_id"),
    "results": ("{}/run/results.json --format csv --out {}/x.csv", "results.json, line 1: expected an object with"),
    "folder as a file": ("{}/run --format coco --out {}/photos", "expected a file ending in .json"),
    "a store": ("{}/run --format yolo --out s3://bucket/x", "yolo is a folder with the images: expected --out on this"),
    "wrong suffix": ("{}/run --format csv --out {}/x.json", "expected a file ending in .csv"),
    "file as a folder": ("{}/run --format yolo --out {}/run/results.json", "expected a folder for this format"),
    "plain file as a folder": ("{}/run --format voc --out {}/file", "is a file: expected a folder"),
    "below a file": ("{}/run --format yolo --out {}/file/x", "file is a file, expected a folder"),
    "a file below a file": ("{}/run --format csv --out {}/file/x.csv", "file is a file, expected a folder"),
    "a folder with something": ("{}/run --format yolo --out {}/photos --overwrite", "holds other files"),
    "the run's folder": ("{}/run --format voc --out {}/run --overwrite", "holds other files"),
    "among the images": ("{}/run --format yolo --out {}/photos/yolo", "is among the images"),
    "images that are no folder": ("{}/run --format csv --out {}/x.csv --images {}/file", "--images .*: expected a f"),
    "images without them": ("{}/run --format yolo --out {}/x --images {}/run", "no file found for image 'a.jpg'"),
    "score above 1": ("{}/run --format csv --out {}/x.csv --min-score 2", r"expected a number in \[0, 1\]"),
    "nothing left": ("{}/run --format coco --out {}/x.json --min-score 1", "nothing to export: of 2 images 1 could"),
    "whole share": ("{}/run --format yolo --out {}/x --val-share 1", "at least 0 and below 1, not '1'"),
    "share of another format": ("{}/run --format voc --out {}/x --val-share 0.5", "--val-share is for yolo, not for"),
    "share of nothing": ("{}/run --format csv --out {}/x.csv --val-share 0", "--val-share is for yolo, not for csv"),
    "files of another format": ("{}/run --format coco --out {}/x.json --files link", "--files is for voc, yolo, not"),
    "url of another format": ("{}/run --format yolo --out {}/x --image-url http://a/", "--image-url is for labelst"),
    "label of csv": ("{}/run --format csv --out {}/x.csv --label cat", "--label is for coco, voc, yolo, labelstudio"),
    "empty label": ("{}/run --format coco --out {}/x.json --label ' '", "expected the name of a class, not ' '"),
    "label of two lines": ("{}/run --format coco --out {}/x.json --label 'a\nb'", "expected the name of a class"),
    "twice": ("{}/twice.jsonl --format csv --out {}/x.csv", "1 images twice: a.jpg"),
    "twice, streamed": ("{}/twice.jsonl --format parquet --out {}/x.parquet", "have an image twice: a.jpg"),
    "streamed from a cut line": ("{}/cut.jsonl --format parquet --out {}/x.parquet", "holds no predictions: expected"),
    "NaN": ("{}/nan.jsonl --format csv --out {}/x.csv", "line 1: expected an object with image_id and boxes"),
    "outside": ("{}/outside.jsonl --format coco --out {}/x.json", "covers nothing of the image of 60x40 pixels"),
    "only a cut line": ("{}/cut.jsonl --format csv --out {}/x.csv", "holds no predictions: expected one JSON object"),
    "a bad mask": ("{}/masks.jsonl --format coco --out {}/x.json", "image 'a.jpg': malformed mask: expected counts"),
    "the predictions": ("{}/plain.json --format coco --out {}/plain.json --overwrite", "is a file of the run"),
    "the results": ("{}/run --format coco --out {}/run/results.json --overwrite", "is a file of the run"),
    "no size": ("{}/bare.jsonl --format coco --out {}/x.json", "lack its width and height; --images DIR"),
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_run(tmp_path, ["a.jpg"])
    (tmp_path / "file").write_text("mine")
    lines = {
        "twice": [line(), line()],
        "nan": [line(boxes=[[0, 0, float("nan"), 1]])],
        "outside": [line(boxes=[[99, 99, 120, 120], [0, 0, 1, 1]])],
        "bare": [{"image_id": "a.jpg", "boxes": [[0, 0, 1, 1]]}],
        "masks": [line(masks=[{"size": [40, 60], "counts": "PPPP"}] * 2)],
    }
    for name, values in lines.items():
        shutil.move(write_lines(tmp_path, values), tmp_path / f"{name}.jsonl")
    (tmp_path / "cut.jsonl").write_text('{"image_id": "a.j')
    shutil.copy(tmp_path / "run/predictions.jsonl", tmp_path / "plain.json")
    return tmp_path


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(place: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    command, message = BAD[case]
    before = contents(place)
    folders = {path for path in place.rglob("*") if path.is_dir()}
    assert run(command, place) == 2
    told = [one for one in capsys.readouterr().err.splitlines() if one]
    assert len(told) == 1
    assert re.search(message, told[0])
    assert contents(place) == before
    assert {path for path in place.rglob("*") if path.is_dir()} == folders


def test_the_mark_says_what_an_exported_folder_is(tmp_path: Path) -> None:
    write_run(tmp_path, ["a.jpg"])
    assert run("{}/run --format voc --out {}/voc", tmp_path) == 0
    mark = json.loads((tmp_path / "voc/lostreg-export.json").read_text())
    assert (mark["format"], mark["kind"], mark["images"], mark["boxes"]) == ("lostreg export 1", "voc", 1, 2)
    assert str(tmp_path) not in json.dumps(mark)


def test_sizes_that_foreign_predictions_lack_are_read(tmp_path: Path) -> None:
    write_run(tmp_path, ["a.jpg"])
    write_lines(tmp_path, [{"image_id": "a.jpg", "boxes": [[0, 0, 30, 20]]}])
    assert run("{}/predictions.jsonl --images {}/photos --format coco --out {}/x.json", tmp_path) == 0
    found = json.loads((tmp_path / "x.json").read_text())
    assert (found["images"][0]["width"], found["images"][0]["height"]) == (60, 40)
    assert "score" not in found["annotations"][0]
    assert collect(tmp_path / "predictions.jsonl", tmp_path / "photos").boxes == 1


def test_results_of_coco_are_exported_with_sizes_read_from_images(tmp_path: Path) -> None:
    write_run(tmp_path, ["a.jpg"])
    (tmp_path / "photos/a.jpg").rename(tmp_path / "photos/000000000025.jpg")
    entry = {"image_id": 25, "category_id": 3, "bbox": [10, 5, 60, 20], "score": 0.7}  # it reaches beyond the image
    (tmp_path / "results.json").write_text(json.dumps([entry]))
    command = "{}/results.json --images {}/photos --format coco --out {}/"
    assert run(command + "x.json", tmp_path) == 0
    (box,) = json.loads((tmp_path / "x.json").read_text())["annotations"]
    assert (box["image_id"], box["bbox"], box["score"]) == (25, [10, 5, 50, 20], 0.7)
    assert run(command.replace(" --images {}/photos", "") + "y.json", tmp_path) == 2
