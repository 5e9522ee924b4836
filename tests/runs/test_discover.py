"""Runs over collections: what is written, what is not computed twice, and what a broken photo costs."""

import csv
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import scene
from PIL import Image

from lostreg import Discoverer
from lostreg.datasets.folder import Collection, find_collection
from lostreg.errors import ImageError, LostregWarning, PredictionsError
from lostreg.images.rle import decode_rle
from lostreg.inference.stream import ImageStream
from lostreg.models.backbone import Backbone
from lostreg.progress import Progress
from lostreg.runs.discover import Summary, discover_collection, mask_path
from lostreg.runs.folder import Run
from lostreg.runs.maps import read_maps
from lostreg.runs.predictions import Prediction, read_predictions

pytestmark = pytest.mark.usefixtures("one_thread")
FILES = ("predictions.jsonl", "maps.jsonl", "failed.csv")


@pytest.fixture
def discoverer(backbone: Backbone) -> Discoverer:
    return Discoverer(backbone, device="cpu", batch_size=2, max_objects=3, min_score=0.05)


@pytest.fixture
def photos(tmp_path: Path) -> Collection:
    folder = tmp_path / "photos"
    for number in range(7):
        path = folder / ("a" if number % 2 else "b") / f"photo {number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene(number, 98, 70)).save(path)
    (folder / "a" / "photo 3.png").write_text("no picture")
    return find_collection(str(folder))


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The names of the readable images of each pack that goes through the backbone."""
    seen: list[tuple[str, ...]] = []
    start = ImageStream._start

    def record(stream: ImageStream, pack: list) -> object:
        seen.append(tuple("/".join(Path(image.name).parts[-2:]) for image in pack))
        return start(stream, pack)

    monkeypatch.setattr(ImageStream, "_start", record)
    return seen


def interrupt(progress: Progress, at: int | None) -> None:
    if progress.done == at:
        raise KeyboardInterrupt


def rows_of(out: Path) -> list[dict[str, str]]:
    """Of the table of what could not be read."""
    with (out / "failed.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def contents(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in FILES}


def settings(out: Path) -> dict[str, object]:
    return json.loads((out / "results.json").read_text())


def test_every_photo_is_accounted_for(photos: Collection, discoverer: Discoverer, tmp_path: Path) -> None:
    seen: list[int] = []
    out = tmp_path / "out"
    summary = discover_collection(photos, discoverer, out, on_progress=lambda now: seen.append(now.done))
    found = read_predictions(out / "predictions.jsonl")
    assert [one.image_id for one in found] == list(photos.names)
    assert (summary.images, summary.unreadable, summary.known) == (7, 1, 0)
    assert summary.clear + summary.unclear == 6
    assert summary.boxes == sum(len(one.boxes) for one in found) > 6
    assert seen == [1, 2, 3, 4, 5, 6, 7]
    assert [(row["image_id"], row["cause"]) for row in rows_of(out)] == [("a/photo 3.png", "unreadable")]
    maps = list(read_maps(out / "maps.jsonl"))
    assert [one.image_id for one in maps] == [one.image_id for one in found if one.error is None]
    expected = discoverer.discover(photos.path(photos.names[0]))
    np.testing.assert_array_equal(maps[0].degrees, expected.degrees)
    assert (maps[0].patch_width, maps[0].patch_height) == (expected.patch_width, expected.patch_height)
    assert maps[0].path == str(photos.path(photos.names[0]))
    assert maps[0].truth is None
    recorded = settings(out)
    assert recorded["complete"] is True
    assert (recorded["images"], recorded["unreadable"], recorded["boxes"]) == (7, 1, summary.boxes)
    assert recorded["options"]["max_objects"] == 3


@pytest.mark.parametrize("cut", ["at a line", "within a line", "maps ahead", "everything done"])
def test_a_run_goes_on_where_it_was(
    photos: Collection, discoverer: Discoverer, tmp_path: Path, cut: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    discover_collection(photos, discoverer, whole)
    discover_collection(photos, discoverer, out)
    lines = {name: (out / name).read_bytes().splitlines(keepends=True) for name in FILES[:2]}
    if cut != "everything done":
        known, maps = 4, 3 + (cut == "maps ahead")  # the second photo is the broken one
        (out / "predictions.jsonl").write_bytes(b"".join(lines["predictions.jsonl"][:known]))
        (out / "maps.jsonl").write_bytes(b"".join(lines["maps.jsonl"][:maps]))
        if cut == "within a line":
            with (out / "predictions.jsonl").open("ab") as file:
                file.write(lines["predictions.jsonl"][known][:20])
            with (out / "maps.jsonl").open("ab") as file:
                file.write(lines["maps.jsonl"][maps][:20])
        (out / "results.json").write_text(json.dumps({**settings(out), "complete": False}))
    measured = settings(out)
    summary = discover_collection(photos, discoverer, out)
    assert contents(out) == contents(whole)
    assert summary.known == (7 if cut == "everything done" else 4)
    assert (settings(out) == measured) == (cut == "everything done")
    assert settings(out)["complete"] is True


@pytest.mark.parametrize("kept", [(4, 5, 0, 1), (6, 2, 3), (5,), (3, 1, 6)])
def test_lines_of_any_batches_in_any_order_are_gone_on_with(
    photos: Collection, discoverer: Discoverer, tmp_path: Path, packs: list[tuple[str, ...]], kept: tuple[int, ...]
) -> None:
    """What several processes leave when they are stopped."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    discover_collection(photos, discoverer, whole)
    shutil.copytree(whole, out)
    order = [photos.names[place] for place in kept]
    for name in FILES[:2]:
        lines = {json.loads(line)["image_id"]: line for line in (out / name).read_bytes().splitlines(keepends=True)}
        (out / name).write_bytes(b"".join(lines[image] for image in order if image in lines))
    (out / "results.json").write_text(json.dumps({**settings(out), "complete": False}))
    packs.clear()
    assert discover_collection(photos, discoverer, out).known == len(kept)
    batches = [photos.names[start : start + 2] for start in range(0, 7, 2)]
    assert packs == [tuple(batch) for batch in batches if set(batch) - set(order)]
    assert contents(out) == contents(whole)


def test_other_options_are_refused_and_a_moved_folder_is_not(
    photos: Collection, discoverer: Discoverer, backbone: Backbone, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    discover_collection(photos, discoverer, out)
    before = contents(out)
    other = Discoverer(backbone, device="cpu", batch_size=2)
    with pytest.raises(PredictionsError, match="max_objects was 3 and is now 1"):
        discover_collection(photos, other, out)
    assert contents(out) == before
    moved = tmp_path / "moved"
    photos.root.rename(moved)
    with pytest.warns(LostregWarning, match="images that were in .* are taken for those of the same names in .*moved"):
        assert discover_collection(find_collection(str(moved)), discoverer, out).known == 7
    fresh = tmp_path / "fresh"
    discover_collection(find_collection(str(moved)), discoverer, fresh)
    shutil.copytree(moved, tmp_path / "others")  # of the same names, while the photos are where they were
    with pytest.raises(PredictionsError, match=r"images of .*moved, which are still there: .* may be others"):
        discover_collection(find_collection(str(tmp_path / "others")), discoverer, out)
    assert contents(out) == contents(fresh)  # the places of the images among them
    assert settings(out)["collection"] == settings(fresh)["collection"]
    assert discover_collection(find_collection(str(moved)), other, out, overwrite=True).known == 0
    assert contents(out) != before


def test_a_collection_of_none_of_the_earlier_photos_is_refused(
    photos: Collection, discoverer: Discoverer, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    discover_collection(Collection(photos.root, photos.names[:3]), discoverer, out)
    before = contents(out)
    refusal = r"other images, of .*: 3 of them, such as .* are not among the 4 of now, of .*; use --overw"
    with pytest.raises(PredictionsError, match=refusal):
        discover_collection(Collection(photos.root, photos.names[3:]), discoverer, out)
    assert contents(out) == before


# Of the seven photos: those that are there at first, and those that are there later.
GROWN = [
    pytest.param((0, 1, 2, 3), (0, 1, 2, 3, 4, 5, 6), id="added at the end"),
    pytest.param((1, 3, 5), (0, 1, 2, 3, 4, 5, 6), id="added in between"),
    pytest.param((0, 1, 2, 4, 6), (1, 2, 3, 5, 6), id="added and gone"),
    pytest.param((0, 1, 2, 3, 4, 5, 6), (6, 2), id="gone, in another order"),
]


@pytest.mark.parametrize(("first", "later"), GROWN)
@pytest.mark.parametrize("stopped", [False, True])
def test_a_collection_that_has_changed_goes_on(
    photos: Collection,
    discoverer: Discoverer,
    tmp_path: Path,
    first: tuple[int, ...],
    later: tuple[int, ...],
    stopped: bool,
) -> None:
    before, now = (Collection(photos.root, [photos.names[index] for index in places]) for places in (first, later))
    whole, out = tmp_path / "whole", tmp_path / "out"
    discover_collection(now, discoverer, whole)
    discover_collection(before, discoverer, out)
    if stopped:
        predictions = (out / "predictions.jsonl").read_bytes().splitlines(keepends=True)
        (out / "predictions.jsonl").write_bytes(b"".join(predictions[:-1]))
        (out / "results.json").write_text(json.dumps({**settings(out), "complete": False}))
    kept = [name for name in before.names[: len(first) - stopped] if name in now.names]
    gone = len(first) - stopped - len(kept)
    with pytest.warns(LostregWarning, match=f"{gone} images of the earlier run are gone") if gone else nullcontext():
        summary = discover_collection(now, discoverer, out)
    assert (summary.images, summary.known) == (len(later), len(kept))
    assert contents(out) == contents(whole)
    recorded, expected = settings(out), settings(whole)
    for name in ("complete", "images", "boxes", "unreadable", "collection", "options"):
        assert recorded[name] == expected[name], name
    assert discover_collection(now, discoverer, out).known == len(later)
    assert contents(out) == contents(whole)


def test_a_changed_collection_that_is_stopped_at_any_image_ends_with_the_same_bytes(
    photos: Collection, discoverer: Discoverer, tmp_path: Path, packs: list[tuple[str, ...]]
) -> None:
    first = Collection(photos.root, photos.names[1:6:2])
    reference = tmp_path / "reference"
    discover_collection(first, discoverer, reference)
    packs.clear()
    discover_collection(photos, discoverer, reference)
    missing = [name for name in photos.names if name not in first.names]
    assert packs == [tuple(missing[:2]), tuple(missing[2:])]
    for stop in range(4, 7):
        out = tmp_path / f"stopped {stop}"
        discover_collection(first, discoverer, out)
        packs.clear()
        for end in (stop, None):
            with nullcontext() if end is None else pytest.raises(KeyboardInterrupt):
                discover_collection(photos, discoverer, out, on_progress=partial(interrupt, at=end))
        assert set(packs) == {tuple(missing[:2]), tuple(missing[2:])}
        assert contents(out) == contents(reference)


def test_photos_that_could_not_be_read_are_tried_again_on_request(
    photos: Collection, discoverer: Discoverer, tmp_path: Path
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    discover_collection(photos, discoverer, out)
    Image.fromarray(scene(3, 98, 70)).save(photos.path("a/photo 3.png"))
    assert discover_collection(photos, discoverer, out).unreadable == 1
    summary = discover_collection(photos, discoverer, out, retry_failed=True)
    assert (summary.unreadable, summary.known, summary.images) == (0, 6, 7)
    discover_collection(photos, discoverer, whole)
    assert contents(out) == contents(whole)
    (photos.path("a/photo 3.png")).write_text("no picture")
    assert discover_collection(photos, discoverer, out, retry_failed=True).unreadable == 0  # it is not looked at


def test_photos_that_come_back_after_a_stop_have_all_of_their_lines(
    photos: Collection, discoverer: Discoverer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = photos.names[0::2]
    fewer = [first[0], *photos.names[1::2]]
    replaced = Path.replace
    for stop in range(5):  # at the first image, then before each of the files that are put in order is replaced
        out = tmp_path / f"stopped {stop}"
        discover_collection(Collection(photos.root, first), discoverer, out)
        left = [stop or -1]

        def replace(path: Path, target: Path, left: list[int] = left) -> Path:
            left[0] -= path.name.startswith(("maps", "predictions"))
            if not left[0]:
                raise KeyboardInterrupt
            return replaced(path, target)

        progress = partial(interrupt, at=2 if stop == 0 else None)
        stopped = pytest.raises(KeyboardInterrupt) if stop < 4 else nullcontext()
        monkeypatch.setattr(Path, "replace", replace)
        with stopped, pytest.warns(LostregWarning, match="3 images"):
            discover_collection(Collection(photos.root, fewer), discoverer, out, on_progress=progress)
        monkeypatch.setattr(Path, "replace", replaced)
        assert settings(out)["complete"] is (stop == 4)
        discover_collection(photos, discoverer, out)
        assert [one.image_id for one in read_predictions(out / "predictions.jsonl")] == list(photos.names)
        maps = [json.loads(line)["image_id"] for line in (out / "maps.jsonl").open()]
        assert maps == [name for name in photos.names if name != "a/photo 3.png"]


def test_trying_again_changes_nothing_before_it_is_sure_to_go_on(
    photos: Collection, discoverer: Discoverer, tmp_path: Path
) -> None:
    out, broken = tmp_path / "out", "a/photo 3.png"
    discover_collection(Collection(photos.root, photos.names[:4]), discoverer, out)
    before = contents(out)
    with pytest.raises(PredictionsError, match="other images"):
        discover_collection(Collection(photos.root, photos.names[4:]), discoverer, out, retry_failed=True)
    assert (contents(out), settings(out)["complete"]) == (before, True)
    with pytest.warns(LostregWarning, match="3 images"):  # only the one that is tried again is left
        assert (
            discover_collection(Collection(photos.root, [broken]), discoverer, out, retry_failed=True).unreadable == 1
        )
    new = tmp_path / "new"
    with pytest.raises(KeyboardInterrupt):
        discover_collection(photos, discoverer, new, retry_failed=True, on_progress=partial(interrupt, at=1))
    assert discover_collection(photos, discoverer, new, retry_failed=True).images == 7


def test_a_run_is_never_complete_while_its_files_are_of_another_list(
    photos: Collection, discoverer: Discoverer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    discover_collection(photos, discoverer, out)
    monkeypatch.setattr(Run, "finish", lambda *_: pytest.fail("stopped"))
    with pytest.warns(LostregWarning, match="4 images"), pytest.raises(pytest.fail.Exception):
        discover_collection(Collection(photos.root, photos.names[:3]), discoverer, out)
    assert settings(out)["complete"] is False


def test_photos_of_another_folder_with_a_name_in_common_are_others(
    photos: Collection, discoverer: Discoverer, tmp_path: Path
) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    discover_collection(photos, discoverer, out)
    before = contents(out)
    (other / photos.names[0]).parent.mkdir(parents=True)
    (other / photos.names[0]).write_bytes(photos.path(photos.names[0]).read_bytes())
    with pytest.raises(PredictionsError, match="6 of them"):
        discover_collection(Collection(other, photos.names[:1]), discoverer, out)
    assert contents(out) == before


def test_what_a_kill_or_a_hand_left_behind_does_no_harm(
    photos: Collection, discoverer: Discoverer, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    discover_collection(photos, discoverer, out)
    before = contents(out)
    (out / "maps.jsonl.part-1").write_text("half")
    line = json.dumps({"image_id": photos.names[0], "boxes": [], "error": "\ud800"}) + "\n"
    with (out / "predictions.jsonl").open("a") as file:
        file.write("\n" + line)
    discover_collection(photos, discoverer, out)
    assert contents(out) == before
    lines = (out / "predictions.jsonl").read_text().splitlines(keepends=True)
    (out / "predictions.jsonl").write_text(line + "".join(lines[1:]))
    assert discover_collection(photos, discoverer, out).unreadable == 2
    assert "\\ud800" in (out / "failed.csv").read_text()


def test_a_file_that_is_malformed_is_refused(photos: Collection, discoverer: Discoverer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    discover_collection(photos, discoverer, out)
    path = out / "predictions.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"boxes": [[', b'"boxes": [["x", ', 1))
    before = contents(out)
    with pytest.raises(
        PredictionsError, match=r"predictions\.jsonl is not of this run \(line 1: .*: use --overwrite or another --out"
    ):
        discover_collection(photos, discoverer, out)
    assert contents(out) == before


def test_strict_stops_at_a_broken_photo_and_keeps_what_came_before(
    photos: Collection, discoverer: Discoverer, tmp_path: Path
) -> None:
    with pytest.raises(ImageError, match=r"photo 3\.png: not a readable image"):
        discover_collection(photos, discoverer, tmp_path / "out", strict=True)
    kept = read_predictions(tmp_path / "out" / "predictions.jsonl")
    assert [one.image_id for one in kept] == list(photos.names[:1])


def test_masks_are_written_as_run_lengths_and_as_pictures(
    photos: Collection, backbone: Backbone, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    discoverer = Discoverer(backbone, device="cpu", max_objects=3, min_score=0.0, refine=True)
    discover_collection(photos, discoverer, out, masks=True, mask_pictures=True)
    several = 0
    for one in read_predictions(out / "predictions.jsonl"):
        if one.error is not None:
            assert not mask_path(out, str(one.image_id)).exists()
            continue
        picture = np.asarray(Image.open(mask_path(out, str(one.image_id))))
        assert picture.shape == (70, 98)
        for number, mask in enumerate(one.masks or (), start=1):
            np.testing.assert_array_equal(picture == number, decode_rle(mask))
        assert picture.max() == len(one.boxes) == len(one.masks or ())
        several += len(one.boxes) > 1
    assert several


@pytest.mark.skipif(os.name != "posix", reason="names that are no text exist on POSIX only")
def test_a_broken_photo_whose_name_is_no_text_is_listed_by_its_bytes(discoverer: Discoverer, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / os.fsdecode(b"\xff.jpg")).write_text("no picture")
    Image.fromarray(scene(1)).save(folder / "b.png")
    summary = discover_collection(find_collection(str(folder)), discoverer, tmp_path / "out")
    assert (summary.images, summary.unreadable) == (2, 1)
    assert b"\n\xff.jpg," in (tmp_path / "out" / "failed.csv").read_bytes()
    assert discover_collection(find_collection(str(folder)), discoverer, tmp_path / "out").known == 2


@pytest.mark.parametrize("name", ["a.jpg", "/srv/photos/a.jpg", "../a.jpg", "a/../../../b.jpg"])
def test_mask_pictures_stay_beneath_the_folder(tmp_path: Path, name: str) -> None:
    path = mask_path(tmp_path / "out", name)
    assert path.resolve().is_relative_to(tmp_path / "out" / "masks")
    assert path.name.endswith(".jpg.png")


def test_counts_tell_clear_from_unclear() -> None:
    def counted(predictions: Iterator[Prediction]) -> Summary:
        summary = Summary()
        for one in predictions:
            summary.add(one, 0.25)
        return summary

    boxes = [[0, 0, 1, 1], [0, 0, 2, 2]]
    summary = counted(
        iter(
            [
                Prediction("a", boxes, scores=[0.25, 0.9]),
                Prediction("b", boxes[:1], scores=[0.2]),
                Prediction("c", (), error="?"),
            ]
        )
    )
    assert (summary.images, summary.clear, summary.unclear, summary.unreadable, summary.boxes) == (3, 1, 1, 1, 3)


def test_what_is_clear_is_counted_anew_without_computing(
    photos: Collection, backbone: Backbone, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = discover_collection(photos, Discoverer(backbone, device="cpu", min_score=0.0), out)
    before = settings(out)
    again = discover_collection(photos, Discoverer(backbone, device="cpu", min_score=1.0), out)
    assert (first.clear, again.clear, again.known) == (6, 0, 7)
    assert (before["clear"], settings(out)["clear"], settings(out)["clear_from"]) == (6, 0, 1.0)
    assert settings(out)["run"] == before["run"]


def test_strict_refuses_a_run_with_a_broken_photo_however_far_it_is(
    photos: Collection, discoverer: Discoverer, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    discover_collection(photos, discoverer, out)
    before = contents(out)
    with pytest.raises(ImageError, match=r"photo 3\.png: not a readable image"):
        discover_collection(photos, discoverer, out, strict=True)
    assert contents(out) == before


def test_reasons_do_not_depend_on_where_the_photos_are_seen_from(
    photos: Collection, discoverer: Discoverer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    discover_collection(photos, discoverer, tmp_path / "one")
    monkeypatch.chdir(photos.root)
    discover_collection(find_collection("."), discoverer, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.skipif(os.name != "posix", reason="names that are no text exist on POSIX only")
def test_a_folder_whose_name_is_no_text_is_recorded(discoverer: Discoverer, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"\xff")
    folder.mkdir()
    Image.fromarray(scene(1)).save(folder / "b.png")
    assert discover_collection(find_collection(str(folder)), discoverer, tmp_path / "out").images == 1
    assert settings(tmp_path / "out")["collection"]["root"] == str(folder)  # type: ignore[index]


def test_a_name_too_long_for_a_mask_is_cut_and_stays_its_own(tmp_path: Path) -> None:
    names = [letter * 250 + ".jpg" for letter in "ab"] + ["ä" * 124 + end for end in ("1.jpg", "2.jpg")]
    names += ["0.tar/" + "d" * 300 + end for end in ("1/a.jpg", "2/a.jpg")]
    paths = [mask_path(tmp_path, name) for name in names]
    assert len(set(paths)) == len(names)
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def test_files_elsewhere_do_not_share_a_mask(tmp_path: Path) -> None:
    names = ["a.jpg", "/a.jpg", "//a.jpg", "../a.jpg", "../../a.jpg", "_/a.jpg", "x/../a.jpg", "x/a.jpg"]
    names += [f"{'_' * count}{word}/a.jpg" for word in ("up", "root", "here") for count in range(4)]
    names += ["x//a.jpg", "x/./a.jpg", "x///a.jpg", "///a.jpg", "./a.jpg"]  # of a store
    names += ["x/_up/a.jpg", "a.jpg.png/b.jpg", "a.jpg.png_/b.jpg", "a.jpg.PNG/b.jpg"]
    longest = "x" * 250 + ".jpg"
    names += [longest, mask_path(tmp_path, longest).name.removesuffix(".png")]
    paths = [mask_path(tmp_path, name) for name in names]
    assert len(set(paths)) == len(names)
    for path in paths:
        assert path.is_relative_to(tmp_path / "masks")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()  # none is a folder of another


def test_a_line_of_a_name_that_no_file_has_is_left_out(
    photos: Collection, discoverer: Discoverer, tmp_path: Path
) -> None:
    discover_collection(photos, discoverer, tmp_path, mask_pictures=True)
    before = contents(tmp_path)
    path = tmp_path / "predictions.jsonl"
    for overwrite in (False, True):
        path.write_bytes(path.read_bytes() + b'{"image_id": "\\ud800.png", "boxes": []}\n')
        discover_collection(photos, discoverer, tmp_path, mask_pictures=True, overwrite=overwrite)
        assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["predictions.jsonl", "maps.jsonl", "masks", "."])
@pytest.mark.parametrize("at", [3, 7], ids=["in the middle", "at the end"])
def test_what_was_deleted_is_not_told_to_be_written(
    photos: Collection, discoverer: Discoverer, tmp_path: Path, name: str, at: int
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"

    def delete(progress: Progress) -> None:
        if progress.done == at:
            place = out / name
            shutil.rmtree(place) if place.is_dir() else place.unlink()

    with pytest.raises(PredictionsError, match=r"deleted.* while the run went on"):
        discover_collection(photos, discoverer, out, mask_pictures=True, on_progress=delete)
    assert not (out / "results.json").exists() or settings(out)["complete"] is False
    discover_collection(photos, discoverer, out, mask_pictures=True)  # as the message says
    discover_collection(photos, discoverer, whole, mask_pictures=True)
    assert [one.image_id for one in read_predictions(out / "predictions.jsonl")] == list(photos.names)
    assert len(list(read_maps(out / "maps.jsonl"))) == 6
    assert masks_of(out) == masks_of(whole)
    assert settings(out)["complete"] is True


def masks_of(out: Path) -> list[str]:
    return sorted(path.relative_to(out).as_posix() for path in (out / "masks").rglob("*.png"))


@pytest.mark.parametrize("at", [1, 3, 7])
def test_the_table_of_failures_is_whole_whoever_deletes_it(
    photos: Collection, discoverer: Discoverer, tmp_path: Path, at: int
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    (photos.root / "a" / "photo 5.png").write_text("no picture")
    discover_collection(photos, discoverer, whole)
    discover_collection(
        photos, discoverer, out, on_progress=lambda now: (out / "failed.csv").unlink() if now.done == at else None
    )
    assert contents(out) == contents(whole)


def test_images_that_could_not_be_had_are_tried_again_by_the_next_run(
    photos: Collection, discoverer: Discoverer, tmp_path: Path, away: set[str]
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    discover_collection(photos, discoverer, whole)
    away |= {"photo 1.png", "photo 4.png"}
    summary = discover_collection(photos, discoverer, out)
    assert (summary.images, summary.unreadable, summary.unavailable) == (7, 3, 2)
    assert (settings(out)["unreadable"], settings(out)["unavailable"]) == (3, 2)
    assert [(row["image_id"], row["cause"]) for row in rows_of(out)] == [
        ("a/photo 1.png", "unavailable"),
        ("a/photo 3.png", "unreadable"),
        ("b/photo 4.png", "unavailable"),
    ]
    away.remove("photo 1.png")
    before = contents(out)
    again = discover_collection(photos, discoverer, out)
    assert (again.known, again.unreadable, again.unavailable) == (5, 2, 1)
    assert contents(out) != before
    before = contents(out)
    assert discover_collection(photos, discoverer, out).known == 6
    assert contents(out) == before
    away.clear()
    assert discover_collection(photos, discoverer, out).unavailable == 0
    assert contents(out) == contents(whole)
    assert discover_collection(photos, discoverer, out).known == 7  # what is broken is not looked at again


def test_a_stopped_run_with_passing_faults_ends_with_the_lines_of_all(
    photos: Collection, discoverer: Discoverer, tmp_path: Path, away: set[str]
) -> None:
    whole = tmp_path / "whole"
    discover_collection(photos, discoverer, whole)
    for stop in range(1, 8):
        out = tmp_path / f"stopped {stop}"
        away |= {"photo 1.png", "photo 4.png"}
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                discover_collection(photos, discoverer, out, on_progress=partial(interrupt, at=stop))
        away.clear()
        discover_collection(photos, discoverer, out)
        assert contents(out)["failed.csv"] == contents(whole)["failed.csv"]
        for name in ("predictions.jsonl", "maps.jsonl"):
            ids = [[json.loads(line)["image_id"] for line in (place / name).open()] for place in (out, whole)]
            assert ids[0] == ids[1]


def test_names_are_no_formulas_in_the_table_of_failures(discoverer: Discoverer, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    names = ["+cmd|' !A0.jpg", "'quoted.jpg", "=1+1.jpg", "a.jpg"]
    for name in names:
        (folder / name).write_text("no picture")
    discover_collection(find_collection(str(folder)), discoverer, tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    for row in rows:
        assert row["image_id"][0] not in "=+-@"
        assert row["reason"][0] not in "=+-@"
    assert sorted(row["image_id"].removeprefix("'") for row in rows) == sorted(names)


def test_masks_of_photos_that_are_gone_go_and_other_files_stay(
    photos: Collection, discoverer: Discoverer, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    discover_collection(photos, discoverer, out, mask_pictures=True)
    (out / "masks" / "b" / "mine.png").touch()
    fewer = Collection(photos.root, [name for name in photos.names if not name.endswith(("1.png", "2.png"))])
    with pytest.warns(LostregWarning, match="2 images"):
        discover_collection(fewer, discoverer, out, mask_pictures=True)
    left = ["masks/a/photo 5.png.png", "masks/b/mine.png"]
    assert masks_of(out) == sorted([*left, *(f"masks/b/photo {number}.png.png" for number in (0, 4, 6))])
    only = Collection(photos.root, ["a/photo 5.png"])
    discover_collection(only, discoverer, out, mask_pictures=True, overwrite=True)
    assert masks_of(out) == left
    discover_collection(Collection(photos.root, ["b/photo 0.png"]), discoverer, out, overwrite=True)
    assert masks_of(out) == left[1:]
    assert not (out / "masks" / "a").exists()
