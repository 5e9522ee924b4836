"""``lostreg discover`` as a person with a folder of photos meets it, and the object options of its siblings."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import scene
from fabricate import png_header, write_voc
from fabricate_lake import write_video
from PIL import Image

from lostreg import defaults
from lostreg.cli.main import main
from lostreg.datasets.folder import find_collection
from lostreg.images.decode import read_image
from lostreg.images.rle import decode_rle
from lostreg.inference.objectness import Objectness
from lostreg.runs.folder import Run
from lostreg.runs.predictions import read_predictions

FAST = ["--backbone", "imgfocus_vits14", "--device", "cpu"]

pytestmark = pytest.mark.usefixtures("one_thread", "small_model")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Mixed photos: two of one name, broken ones, CMYK, one far too large, a turned one, names of all kinds."""
    folder = tmp_path / "my photos"
    for name in ("a.jpg", "summer 2025/a.jpg", "été/ä ö.png", "日本.webp"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene(len(name), 98, 70)).save(path)
    Image.fromarray(scene(3)).convert("CMYK").save(folder / "cmyk.jpg")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(scene(4, 98, 70)).save(folder / "turned.jpg", exif=turned)
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "broken.png").write_text("no picture")
    png_header(folder / "huge.png", 60_000, 60_000)
    (folder / "notes.txt").write_text("not a photo")
    return folder


def discover(source: object, out: Path, *options: str) -> int:
    return main(["discover", str(source), "--out", str(out), *options, *FAST])


def test_every_readable_photo_gets_boxes_and_the_others_a_reason(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert discover(photos, out, "--max-objects", "4", "--min-score", "0.05") == 0
    found = {one.image_id: one for one in read_predictions(out / "predictions.jsonl")}
    broken = {"empty.jpg", "broken.png", "huge.png"}
    assert set(found) == {"a.jpg", "summer 2025/a.jpg", "été/ä ö.png", "日本.webp", "cmyk.jpg", "turned.jpg"} | broken
    assert {name for name, one in found.items() if one.error is not None} == broken
    assert all(1 <= len(one.boxes) <= 4 for name, one in found.items() if name not in broken)
    assert (found["turned.jpg"].width, found["turned.jpg"].height) == (70, 98)
    reasons = (out / "failed.csv").read_text(encoding="utf-8").splitlines()
    assert reasons[0] == "image_id,reason,cause"
    assert len(reasons) == 4
    assert any("huge.png" in line and "60000x60000" in line for line in reasons)
    boxes = sum(len(one.boxes) for one in found.values())
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"9 photos, {boxes} boxes"
    assert printed[3:] == ["3 could not be read, see failed.csv", f"written to {out}"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_a_killed_run_ends_with_the_same_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_voc(tmp_path / "voc", 16) / "JPEGImages"
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    lostreg = str(Path(sys.executable).with_name("lostreg"))
    options = ["--batch-size", "1", "--max-objects", "2", "--min-score", "0.1"]
    command = ["discover", str(root), "--out", str(killed), *FAST, *options]
    process = subprocess.Popen([lostreg, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (killed / "predictions.jsonl").exists() or (killed / "predictions.jsonl").stat().st_size < 400:
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline, "the run wrote nothing"
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
    survived = (killed / "predictions.jsonl").read_bytes()
    for target in (killed, whole):  # the rest in processes of their own, with the real weights
        subprocess.run([lostreg, *command[:3], str(target), *command[4:]], check=True, capture_output=True)
    for name in ("predictions.jsonl", "maps.jsonl", "failed.csv"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert (killed / "predictions.jsonl").read_bytes().startswith(survived[: survived.rfind(b"\n") + 1])
    assert json.loads((killed / "results.json").read_text())["run"]["computed"] < 16


@pytest.fixture
def quick_bf16(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool | None], None]:
    """Sets whether this machine is quick at bf16; it is to begin with."""

    def set_to(answer: bool | None) -> None:
        monkeypatch.setattr("lostreg.inference.discoverer._has_quick_bf16", lambda _: answer)

    set_to(True)
    return set_to


def precision_of(out: Path) -> str:
    return str(json.loads((out / "results.json").read_text())["options"]["precision"])


@pytest.mark.parametrize(("quick", "precision"), [(True, "bf16"), (False, "fp32"), (None, "fp32")])
def test_the_precision_is_chosen_by_the_device_told_and_recorded(
    photos: Path,
    tmp_path: Path,
    quick_bf16: Callable[[bool | None], None],
    capsys: pytest.CaptureFixture[str],
    quick: bool | None,
    precision: str,
) -> None:
    quick_bf16(quick)
    assert discover(photos, tmp_path / "out") == 0
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"lostreg: {precision}, ")]
    assert precision_of(tmp_path / "out") == precision
    assert discover(photos, tmp_path / "named", "--precision", "fp32") == 0
    assert "lostreg: fp32" not in capsys.readouterr().err
    assert precision_of(tmp_path / "named") == "fp32"


@pytest.mark.parametrize(("begun", "quick"), [("fp32", True), ("bf16", False)])
def test_a_run_goes_on_in_the_precision_it_was_begun_in(
    photos: Path,
    tmp_path: Path,
    quick_bf16: Callable[[bool | None], None],
    capsys: pytest.CaptureFixture[str],
    begun: str,
    quick: bool,
) -> None:
    out = tmp_path / "out"
    chosen = "bf16" if quick else "fp32"
    assert discover(photos, out, "--precision", begun) == 0
    (photos / "cmyk.jpg").rename(photos / "one more.jpg")
    quick_bf16(quick)
    capsys.readouterr()
    for options in ([], ["--precision", "auto"]):
        assert discover(photos, out, *options) == 0
        captured = capsys.readouterr()
        assert f"lostreg: {begun}, in which the run in {out} was begun" in captured.err
        assert f"lostreg: {chosen}, " not in captured.err
        assert "of these had been done before" in captured.out
        assert precision_of(out) == begun
    assert discover(photos, out, "--precision", chosen) == 2
    refused = f'holds a run with other settings: precision was "{begun}" and is now "{chosen}"'
    assert refused in capsys.readouterr().err
    assert discover(photos, out, "--overwrite") == 0
    assert precision_of(out) == chosen


@pytest.mark.parametrize("content", ["", "[]", '{"options": []}', '{"options": {"precision": ["bf16"]}}'])
def test_results_without_a_precision_are_no_run_to_go_on_with(
    photos: Path,
    tmp_path: Path,
    quick_bf16: Callable[[bool | None], None],
    capsys: pytest.CaptureFixture[str],
    content: str,
) -> None:
    del quick_bf16
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text(content)
    assert discover(photos, tmp_path / "out") == 2
    assert "use --overwrite or another --out" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["predict", "artifacts"])
def test_other_commands_choose_the_precision_where_they_are_asked_to(
    photos: Path,
    tmp_path: Path,
    quick_bf16: Callable[[bool | None], None],
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    del quick_bf16
    options = {"predict": [], "artifacts": ["--out", str(tmp_path / "out")]}[command]
    for precision, told in (("auto", True), ("fp32", False)):
        assert main([command, str(photos / "a.jpg"), *options, "--precision", precision, *FAST]) == 0
        assert ("lostreg: bf16, " in capsys.readouterr().err) == told


def test_out_may_lie_among_the_photos(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(photos)
    assert discover(".", Path("out")) == 0
    assert discover(".", Path("out")) == 0
    assert "9 of these had been done before" in capsys.readouterr().out
    for known in (0, 9):  # what was written is no photo of the next run
        assert discover(".", Path("other"), "--mask-png") == 0
        printed = capsys.readouterr().out
        assert "9 photos" in printed
        assert ("9 of these had been done before" in printed) == (known == 9)
    assert len(list(Path("other/masks").rglob("*.png"))) == 6


def test_a_collection_without_a_readable_photo_is_an_error(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text(f"{photos}/broken.png\n{photos}/nowhere.jpg\n", encoding="utf-8")
    assert discover(listed, tmp_path / "out") == 2
    assert capsys.readouterr().out.splitlines()[0] == "2 photos, 0 boxes"
    assert "nowhere.jpg: no such file" in (tmp_path / "out" / "failed.csv").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-objects", "0"], "expected an integer of at least 1"),
        (["--min-score", "2"], "expected a number in [0, 1], not '2'"),
        (["--box-from", "mask"], "add --masks refined"),
        (["--box-from", "mask", "--masks", "patches"], "add --masks refined"),
        (["--masks", "sharp"], "invalid choice"),
        (["--strict"], "not a readable image"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    try:
        code = discover(photos, tmp_path / "out", *options)
    except SystemExit as ended:
        code = int(ended.code or 0)
    assert code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_out_that_is_a_file_or_in_use_is_refused(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert discover(photos, tmp_path / "file") == 2
    assert "expected a folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"
    assert discover(tmp_path / "nowhere", tmp_path / "out") == 2
    assert "no such folder or list" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_predict_tells_several_objects_in_a_row_each(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--max-objects", "3", "--min-score", "0.01", "--masks", "refined", "--mask-dir", str(tmp_path / "masks")]
    target = tmp_path / "boxes.jsonl"
    assert main(["predict", str(photos / "a.jpg"), *options, "--json", str(target), *FAST]) == 0
    (found,) = read_predictions(target)
    assert 2 <= len(found.boxes) <= 3
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [float(row.split()[-1]) for row in rows] == pytest.approx(found.scores, abs=0.0051)
    picture = np.asarray(Image.open(tmp_path / "masks" / "a.png"))
    for number, mask in enumerate(found.masks or (), start=1):
        np.testing.assert_array_equal(decode_rle(mask), picture == number)
    assert main(["predict", str(photos / "a.jpg"), "--json", str(target), *FAST]) == 0
    (alone,) = read_predictions(target)
    assert (alone.masks, alone.boxes) == (None, found.boxes[:1])


def test_masks_do_not_go_among_the_images(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(photos), "--mask-dir", str(photos / "masks"), *FAST]) == 2
    assert "--mask-dir" in capsys.readouterr().err


def test_eval_with_several_objects_has_the_corloc_of_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_voc(tmp_path / "voc", 5)
    last = []
    for number in ("1", "4"):
        out = tmp_path / number
        options = ["--max-objects", number, "--min-score", "0.01", "--masks", "patches"]
        assert main(["eval", "voc", "--root", str(root), "--out", str(out), *options, *FAST]) == 0
        printed = capsys.readouterr().out.splitlines()
        last.append(printed[-1])
        assert main(["score", str(out / "predictions.jsonl"), "voc", "--root", str(root)]) == 0
        scored = capsys.readouterr().out.splitlines()
        assert scored[-1] == printed[-1]
        (line,) = [line for line in printed if line.startswith("all objects")]
        assert line in scored
        results = json.loads((out / "results.json").read_text())
        assert f"AP50 {results['detection']['ap50']:.2f}" in line
        found = read_predictions(out / "predictions.jsonl")
        assert max(len(one.boxes) for one in found) == (1 if number == "1" else 4)
        for one in found:
            for box, mask in zip(one.boxes, one.masks or (), strict=True):
                rows, columns = np.nonzero(decode_rle(mask))
                assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == list(box)
    assert last[0] == last[1]
    assert os.path.getsize(tmp_path / "4" / "maps.jsonl")  # noqa: PTH202


def test_test_time_registers_are_searched_in_all_photos_and_stand_beside_masks(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched = []

    def remember(args: object, discoverer: object, paths: list[Path], kept: Path) -> object:
        searched.append(len(paths))
        return discoverer

    monkeypatch.setattr("lostreg.cli.discover.with_registers", remember)
    assert discover(photos, tmp_path / "out", "--mask-png", "--test-time-registers", "1") == 0
    assert searched == [9]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("predict {photos}/a.jpg --masks refined", "--masks shows nowhere: add --json, --plot or --mask-dir"),
        ("predict {photos}/a.jpg --max-objects 300 --mask-dir {tmp}/m", "--mask-dir tells 255 objects apart, not 300"),
        ("discover {photos} --out {tmp}/out --max-objects 300 --mask-png", "--mask-png tells 255 objects apart"),
    ],
)
def test_masks_that_cannot_be_shown_are_refused_at_once(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, message: str
) -> None:
    words = [word.format(photos=photos, tmp=tmp_path) for word in command.split()]
    assert main([*words, *FAST]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


# What looks for objects


def options_of(out: Path) -> dict[str, object]:
    options: dict[str, object] = json.loads((out / "results.json").read_text())["options"]
    return options


def test_a_collection_large_enough_teaches_what_ranks_its_objects(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_voc(tmp_path / "voc", 6) / "JPEGImages"
    small, large, lost = tmp_path / "small", tmp_path / "large", tmp_path / "lost"
    assert discover(root, small) == 0
    assert (options_of(small)["method"], options_of(small)["objectness"]) == ("parts", None)
    assert "transductive" not in capsys.readouterr().err
    monkeypatch.setattr(defaults, "LEAST_TEACHERS", 6)
    assert discover(root, large) == 0
    assert "learned from 6 of these images, without labels" in capsys.readouterr().err
    learned = Objectness.load(large / "objectness.safetensors")
    assert options_of(large)["objectness"] == learned.describe()
    # A run goes on as it was begun, whatever would now be chosen.
    kept = {out: (out / "predictions.jsonl").read_bytes() for out in (small, large)}
    kept[large / "objectness.safetensors"] = (large / "objectness.safetensors").read_bytes()
    for out in (small, large):
        assert discover(root, out) == 0
        assert (out / "predictions.jsonl").read_bytes() == kept[out]
    assert (large / "objectness.safetensors").read_bytes() == kept[large / "objectness.safetensors"]
    assert "learned from" not in capsys.readouterr().err
    assert discover(root, lost, "--method", "lost") == 0
    assert discover(root, lost) == 0
    assert f"lost, with which the run in {lost} was begun" in capsys.readouterr().err
    assert discover(root, lost, "--method", "parts") == 2
    assert 'method was "lost" and is now "parts"' in capsys.readouterr().err
    assert discover(root, tmp_path / "none", "--objectness", "none") == 0
    assert (tmp_path / "none" / "predictions.jsonl").read_bytes() == kept[small]
    assert discover(root, small, "--objectness", "self") == 2
    assert "it did not learn from its images" in capsys.readouterr().err


def test_photos_that_teach_nothing_are_listed_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(defaults, "LEAST_TEACHERS", 2)
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for name in ("a.jpg", "b.jpg"):
        (photos / name).write_bytes(b"broken")
    assert discover(photos, out) == 2
    told = capsys.readouterr()
    assert "none of 2 images could be read, so nothing was learned: going on without" in told.err
    assert "2 could not be read, see failed.csv" in told.out
    assert options_of(out)["objectness"] is None
    assert discover(photos, tmp_path / "asked", "--objectness", "self") == 2
    assert "nothing was learned" in capsys.readouterr().err
    assert not (tmp_path / "asked" / "failed.csv").exists()


def test_what_one_collection_taught_ranks_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_voc(tmp_path / "voc", 6) / "JPEGImages"
    file = tmp_path / "new" / "objectness.safetensors"
    assert main(["learn", str(root), "--out", str(file), "--sample", "4", *FAST]) == 0
    told = capsys.readouterr()
    assert f"4 of 6 images\nwritten to {file}: use it as --method parts --objectness {file}\n" in told.out
    assert "4 images teach little" in told.err
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    options = ["--method", "parts", "--objectness", str(file), *FAST]
    assert main(["predict", str(root), "--json", str(first), *options]) == 0
    assert discover(root, tmp_path / "out", "--objectness", str(file), "--precision", "fp32") == 0
    assert main(["predict", str(root), "--json", str(second), "--method", "parts", "--objectness", "self", *FAST]) == 0
    boxes = [[one.boxes for one in read_predictions(path)] for path in (first, tmp_path / "out/predictions.jsonl")]
    assert boxes[0] == boxes[1]
    assert [one.scores for one in read_predictions(first)] != [one.scores for one in read_predictions(second)]
    capsys.readouterr()
    for method, file_or_self in (("lost", "self"), ("lost", str(file))):
        assert main(["predict", str(root), "--method", method, "--objectness", file_or_self, *FAST]) == 2
        assert "parts" in capsys.readouterr().err
    (tmp_path / "none.txt").write_text("nothing")
    assert main(["predict", str(root), "--method", "parts", "--objectness", str(tmp_path / "none.txt"), *FAST]) == 2
    assert "no objectness of `lostreg learn`" in capsys.readouterr().err


def test_eval_says_where_what_ranks_comes_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_voc(tmp_path / "voc", 6)
    out = tmp_path / "out"

    def evaluate(to: Path, objectness: str) -> int:
        what = ["--method", "parts", "--objectness", objectness, *FAST]
        return main(["eval", "voc", "--root", str(root), "--out", str(to), *what])

    assert evaluate(out, "self") == 0
    assert ", parts, ranked by what 6 of its images taught (transductive) on " in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert results["benchmark"]["transductive"] is True
    kept = (out / "predictions.jsonl").read_bytes()
    assert evaluate(out, "self") == 0
    assert (out / "predictions.jsonl").read_bytes() == kept
    assert evaluate(tmp_path / "file", str(out / "objectness.safetensors")) == 0
    assert json.loads((tmp_path / "file" / "results.json").read_text())["benchmark"] == results["benchmark"]
    assert (tmp_path / "file" / "predictions.jsonl").read_bytes() == kept
    capsys.readouterr()


@pytest.mark.parametrize("shared", [0, 2, None])
def test_figures_on_images_that_taught_are_called_transductive(
    tmp_path: Path, shared: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    root, file, out = write_voc(tmp_path / "voc", 6), tmp_path / "o.safetensors", tmp_path / "out"
    teachers = tmp_path / "teachers"
    teachers.mkdir()
    for place, photo in enumerate(sorted((root / "JPEGImages").iterdir())):
        is_same = shared is not None and place < shared
        shutil.copy(photo, teachers / (photo.name if is_same else f"other{photo.name}"))
    assert main(["learn", str(teachers), "--out", str(file), *FAST]) == 0
    if shared is None:  # as files were before they knew
        learned = Objectness.load(file)
        replace(learned, facts=replace(learned.facts, names=None)).save(file)
    for command, results in (("eval", "results.json"), ("sweep", "sweep.json")):
        capsys.readouterr()
        to, what = str(out / command), ["--method", "parts", "--objectness", str(file), *FAST]
        assert main([command, "voc", "--root", str(root), "--out", to, *what]) == 0
        told = capsys.readouterr()
        assert ("does not know which images taught it" in told.err) == (shared is None)
        if command == "eval":
            assert ("ranked by what 2 of its images taught (transductive)" in told.out) == bool(shared)
        marks = json.loads((out / command / results).read_text())["benchmark"]
        assert marks.get("transductive", False) is bool(shared)


def test_frames_of_a_film_are_photos(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    film, out = write_video(tmp_path / "film.mp4"), tmp_path / "out"
    frame = read_image(find_collection(str(film), every=45)[1]).pixels
    for known in ("2 photos", "2 of these had been done before"):
        assert discover(film, out, "--every", "45") == 0
        assert known in capsys.readouterr().out
    assert main(["report", str(out)]) == 0
    assert "film.mp4#000045" in (out / "report.html").read_text(encoding="utf-8")
    names = ["film-000000", "film-000045"]
    for kind, files in (("voc", "--files none"), ("yolo", ""), ("voc", "--overwrite")):
        place = tmp_path / kind
        assert main(["export", str(out), "--format", kind, "--out", str(place), *files.split()]) == 0
        labels = sorted([*place.rglob("Annotations/*.xml"), *place.rglob("labels/*/*.txt")])
        assert [label.stem for label in labels] == names
        if kind == "voc":
            assert all(f"<filename>{label.stem}.jpg</filename>" in label.read_text() for label in labels)
        if files != "--files none":
            pictures = sorted(place.rglob("*.jpg"))
            assert [picture.stem for picture in pictures] == names
            assert abs(read_image(pictures[1]).pixels.astype(int) - frame).max() < 16  # as it was measured
    assert "all images are frames of one video" in capsys.readouterr().err
    for kind, file in (("coco", "a.json"), ("labelstudio", "b.json")):
        assert main(["export", str(out), "--format", kind, "--out", str(tmp_path / file)]) == 0
        told = "2 images are no files of their own, such as film.mp4#000000: .* --format yolo and voc write"
        assert re.search(told, capsys.readouterr().err)
    assert discover(photos, tmp_path / "other", "--every", "45") == 2
    assert f"--every 45 is for videos, and {photos} has no frame of any" in capsys.readouterr().err


def test_a_broken_video_is_one_failure_among_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    films, out = tmp_path / "films", tmp_path / "out"
    films.mkdir()
    whole = write_video(films / "b.mp4").read_bytes()
    (films / "a.mp4").write_bytes(b"")
    assert discover(films, out, "--every", "45") == 0
    assert "3 photos" in capsys.readouterr().out
    failed = (out / "failed.csv").read_text().splitlines()
    assert failed[1:] == ["a.mp4,a.mp4: cannot be read (Invalid data found when processing input),unreadable"]
    kept = (out / "predictions.jsonl").read_bytes()
    assert discover(films, out, "--every", "45", "--retry-failed") == 0
    assert (out / "predictions.jsonl").read_bytes() == kept
    assert discover(films / "a.mp4", tmp_path / "alone", "--every", "45") == 2
    assert discover(films, tmp_path / "strict", "--every", "45", "--strict") == 2
    (films / "a.mp4").write_bytes(whole)  # it was mended: its frames take its place
    assert discover(films, out, "--every", "45") == 0
    printed = capsys.readouterr()
    assert "4 photos" in printed.out
    assert "1 images of the earlier run are gone" in printed.err
    names = [one.image_id for one in read_predictions(out / "predictions.jsonl")]
    assert names == [f"{film}.mp4#{number}" for film in "ab" for number in ("000000", "000045")]
    assert (out / "failed.csv").read_text().count("\n") == 1


def test_a_full_disk_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(scene(0)).save(tmp_path / "a.png")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Run, "append_all", full)
    assert discover(tmp_path, tmp_path / "out") == 2
    assert f"error: cannot write {tmp_path / 'out'}: No space left on device\n" in capsys.readouterr().err
