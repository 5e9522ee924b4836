"""The page as Python writes it."""

import base64
import hashlib
import json
import re
import weakref
from pathlib import Path

import numpy as np
import pytest
from fabricate_run import GRID, HEIGHT, PATCH, TRUTH, WIDTH, Page, map_of, predict, write_lines, write_photo, write_run
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco

from lostreg.cli.main import main
from lostreg.errors import OptionError, PredictionsError
from lostreg.gallery import build
from lostreg.gallery.build import choose_images, write_gallery
from lostreg.gallery.entries import Entry, small_mask
from lostreg.runs.predictions import read_predictions, stream_predictions
from lostreg.runs.reader import RunFolder

NASTY = [
    "</script><script>document.title = 'taken'</script>",
    "<!--<script>",
    """a "b" 'c' & &lt; ]]>.jpg""",
    "caf\udce9 \u2028 日本.jpg",
    "${name} $style {{ name }} {% raw %} {# style #}",
]


def page_of(run: Path, **options: object) -> Page:
    write_gallery(RunFolder(run, needs_maps="images" not in options), run / "report.html", **options)  # type: ignore[arg-type]
    return Page(run / "report.html")


def test_a_page_holds_pictures_boxes_and_maps_in_the_order_of_the_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [f"a/{number}.jpg" for number in range(25)])
    page = page_of(run)
    assert [card["name"] for card in page.cards] == [f"a/{number}.jpg" for number in range(25)]
    for number, (card, found) in enumerate(
        zip(page.cards, read_predictions(run / "predictions.jsonl"), strict=True), 1
    ):
        assert (card["boxes"], card["scores"], card["seeds"]) == (found.boxes, found.scores, found.seeds)
        assert (card["number"], card["size"], card["patch"]) == (number, [WIDTH, HEIGHT], [PATCH, PATCH])
        assert "note" not in card
        maps = page.maps(number)
        assert maps["grid"] == list(GRID)
        degrees = np.frombuffer(base64.b64decode(maps["degrees"]), "<u2")
        assert np.array_equal(degrees, np.arange(GRID[0] * GRID[1]) + number - 1)
    original = np.asarray(Image.open(tmp_path / "photos/im0007.jpg"))
    picture = page.picture(8)
    assert picture is not None
    assert picture.shape == original.shape
    assert np.abs(picture.astype(int) - original).mean() < 4
    assert "finished run" in page.text
    assert "imgfocus_vits14" in page.text


def test_candidates_and_objectness_are_on_the_page_where_a_run_has_them(tmp_path: Path) -> None:
    objectness = np.arange(GRID[0] * GRID[1], dtype=np.uint8).reshape(GRID)
    why = {"candidates": [[1, 2.346, 3, 4, 0.567]], "objectness": objectness}
    page = page_of(write_run(tmp_path / "run", ["a", "b"], maps_changes={0: why}))
    assert page.maps(1)["candidates"] == [[1, 2.35, 3, 4, 0.567]]
    assert base64.b64decode(page.maps(1)["objectness"]) == objectness.tobytes()
    assert page.maps(2).keys() == {"grid", "degrees"}


def test_a_large_picture_becomes_small(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ["one"], changes={0: {"width": 1500, "height": 1100}})
    write_photo(tmp_path / "photos/im0000.jpg", 0, 1500, 1100)
    page = page_of(run)
    assert page.cards[0]["size"] == [1500, 1100]
    assert page.picture(1).shape == (352, 480, 3)  # type: ignore[union-attr]


def test_a_page_refers_to_nothing_outside_itself(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", NASTY, truth=TRUTH)
    page = page_of(run)
    content = page.path.read_text(encoding="utf-8")
    assert page.links == ["data:,"]
    assert set(re.findall(r"https?://[^\s\"']+", content)) == {"http://www.w3.org/2000/svg"}
    assert str(tmp_path) not in content
    assert "@import" not in content
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', content)
    assert policy is not None
    assert "default-src 'none'" in policy[1]
    assert "unsafe" not in policy[1]
    for asset in (page.by_id["style"], page.by_id["None"]):
        digest = hashlib.sha256(asset.encode("utf-8")).digest()
        assert f"'sha256-{base64.b64encode(digest).decode()}'" in policy[1]


def test_names_are_never_taken_for_markup(tmp_path: Path) -> None:
    changes = {
        number: {"boxes": [], "scores": [], "seeds": [], "error": f"because {name}"}
        for number, name in enumerate(NASTY)
    }
    plain, failed = write_run(tmp_path / "a", NASTY), write_run(tmp_path / "b", [*NASTY, "good"], changes=changes)
    results = {"complete": True, "options": {"backbone": NASTY[0]}, NASTY[1]: NASTY[3]}
    (failed / "results.json").write_text(json.dumps(results))
    page = page_of(plain)
    shown = [name.encode("utf-8", "backslashreplace").decode() for name in NASTY]
    assert [card["name"] for card in page.cards] == shown
    assert page.scripts == 3 * len(NASTY) + 2
    page = page_of(failed)
    assert page.scripts == 3 + 2
    for name in shown:
        assert f"because {name}" in page.text
    assert f"{len(NASTY)} images without a box" in page.text


def test_the_name_of_the_run_is_never_taken_for_markup(tmp_path: Path) -> None:
    for name in ("<img src=x> & \"b\" 'c'", "{{ lead }}", "caf\udce9"):
        page = page_of(write_run(tmp_path / name, ["a"]))
        assert page.links == ["data:,"]
        shown = name.encode("utf-8", "backslashreplace").decode()
        assert f"{shown} - lostreg report" in page.text
        assert page.text.count(shown) == 2  # title and heading


@pytest.mark.parametrize("truth", [TRUTH, None])
def test_corloc_is_told_where_there_is_ground_truth(tmp_path: Path, truth: list[list[float]] | None) -> None:
    gone = {"boxes": [], "scores": [], "seeds": [], "error": "cut"}
    run = write_run(tmp_path / "run", list(range(8)), truth=truth, changes={7: gone})
    page = page_of(run)
    assert [card.get("hit") for card in page.cards] == [
        None if truth is None else number % 2 == 0 for number in range(7)
    ]
    text = " ".join(page.text.split())
    assert "images8 boxes7 " in text
    assert "unreadable1 " in text
    if truth is None:
        assert "corloc" not in text
    else:
        assert "corloc (4 of 8 hit)50.00 %" in text
        assert "(Wilson)21.5 to 78.5 %" in text
    assert "cut" in text


def test_without_maps_corloc_comes_from_the_results(tmp_path: Path) -> None:
    results = {"complete": True, "corloc": 61.9043, "wilson_95": [60.55, 63.24], "images": 2}
    run = write_run(tmp_path / "run", ["im0000", "im0001"], results=results)
    (run / "maps.jsonl").unlink()
    page = page_of(run, images=tmp_path / "photos")
    assert "61.90 %" in page.text
    assert "60.5 to 63.2 %" in page.text


def test_counts_of_the_header(tmp_path: Path) -> None:
    two = {"boxes": [[1, 2, 3, 4], [5, 6, 7, 8]], "scores": [0.2, 0.9], "seeds": [[0, 0], [1, 1]]}
    run = write_run(tmp_path / "run", ["a", "b"], changes={0: two, 1: {"scores": [0.25]}})
    survey = RunFolder(run).survey()
    assert (survey.images, survey.boxes, survey.unclear, survey.unreadable, survey.corloc) == (2, 3, 1, 0, None)


def test_an_unfinished_run_is_shown_as_far_as_it_is(tmp_path: Path) -> None:
    results = {"complete": False, "collection": {"root": "/photos", "images": 9}}
    run = write_run(tmp_path / "run", ["a", "b", "c"], results=results)
    for name in ("predictions.jsonl", "maps.jsonl"):
        content = (run / name).read_bytes()
        (run / name).write_bytes(content[:-30])
    before = (run / "predictions.jsonl").read_bytes()
    page = page_of(run)
    assert [card["name"] for card in page.cards] == ["a", "b"]
    assert "unfinished run: 2 of 9 images so far" in page.text
    assert (run / "predictions.jsonl").read_bytes() == before  # whoever is writing it goes on


def test_predictions_may_be_ahead_of_their_maps(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ["a", "b", "c"])
    lines = (run / "maps.jsonl").read_text().splitlines(keepends=True)
    (run / "maps.jsonl").write_text(lines[0] + lines[2])
    page = page_of(run)
    assert ["patch" in card for card in page.cards] == [True, False, True]
    assert page.cards[1]["note"] == "no line in the maps file says where the image is"
    assert "1 image without a line in maps.jsonl" in page.text


def test_without_results_the_page_says_that_it_does_not_know(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ["a"])
    for content in ("", "[1]", "{"):
        (run / "results.json").write_text(content)
        assert "no results.json that says whether the run is finished" in page_of(run).text
    (run / "results.json").unlink()
    assert "No settings are known" in page_of(run).text


def test_images_that_are_gone_or_changed_are_counted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ["a", "b", "c", "d"])
    (tmp_path / "photos/im0001.jpg").unlink()
    (tmp_path / "photos/im0002.jpg").write_text("no image")
    write_photo(tmp_path / "photos/im0003.jpg", 0, 90, 120)
    written = write_gallery(RunFolder(run), run / "report.html")
    assert (written.shown, written.gone, written.changed) == (4, 2, 1)
    page = Page(run / "report.html")
    facts = json.loads(page.by_id["facts"])
    assert [facts[name] for name in ("gone", "changed", "bare", "sort", "overlap")] == [2, 1, 0, "run", 0.5]
    assert [page.picture(number) is None for number in (1, 2, 3, 4)] == [False, True, True, False]
    assert page.cards[1]["note"] == "im0001.jpg: no such file"
    assert page.cards[2]["note"].startswith("im0002.jpg: not a readable image")
    assert page.cards[3]["note"] == "the file has changed since the run: it was 150x110 and is 90x120"
    assert page.cards[1]["boxes"] == [[100, 70, 140, 105]]


@pytest.mark.parametrize("exif", [True, False])
def test_pictures_are_turned_as_in_the_run(tmp_path: Path, exif: bool) -> None:
    path = write_photo(tmp_path / "photos/a.jpg", 0)
    image = Image.open(path)
    image.getexif()[274] = 6
    image.save(path, exif=image.getexif())
    size = (HEIGHT, WIDTH) if exif else (WIDTH, HEIGHT)
    run = tmp_path / "run"
    write_lines(run / "predictions.jsonl", [predict("a.jpg", width=size[0], height=size[1])])
    write_lines(run / "maps.jsonl", [map_of("a.jpg", path, exif=exif)])
    page = page_of(run)
    assert page.picture(1).shape == (size[1], size[0], 3)  # type: ignore[union-attr]
    (run / "maps.jsonl").unlink()
    (run / "results.json").write_text(json.dumps({"options": {"exif": exif}}))
    page = page_of(run, images=path.parent)
    assert "note" not in page.cards[0]
    assert page.picture(1).shape == (size[1], size[0], 3)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("image_id", "name"),
    [("x y/a.png", "x y/a.png"), ("000005", "000005.jpg"), (9, "000000000009.jpg"), ("x", "im0000.jpg")],
)
def test_images_are_found_in_another_folder(tmp_path: Path, image_id: str | int, name: str) -> None:
    """By id, by id and suffix, by COCO's number, by the recorded file's name."""
    run = write_run(tmp_path / "run", [image_id])
    (tmp_path / "photos/im0000.jpg").unlink()
    write_photo(tmp_path / "moved" / name, 0)
    assert page_of(run).picture(1) is None
    page = page_of(run, images=tmp_path / "moved")
    assert page.picture(1) is not None
    assert page.maps(1)["grid"] == list(GRID)


def test_predictions_of_other_programs_are_shown_with_what_they_have(tmp_path: Path) -> None:
    run = tmp_path / "run"
    lines: list[dict[str, object]] = [
        {"image_id": "bare", "boxes": [[1.5, 2, 30, 40.25]]},
        {"image_id": "null", "boxes": [[1, 2, 3, 4]], "scores": None, "seeds": None, "width": None, "masks": None},
        {"image_id": "outside", "boxes": [[-9, 2, -3, 4]], "scores": [12.5], "masks": [{"size": [2]}]},
        {"image_id": "counts", "boxes": [[1, 2, 3, 4]], "masks": [{"size": [2, 2], "counts": "\u00e9"}], "error": ""},
        {"image_id": "none", "boxes": []},
    ]
    run.mkdir()
    (run / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = page_of(run, images=tmp_path)
    assert [card["scores"] for card in page.cards] == [[None], [None], [12.5], [None]]
    assert [card["seeds"] for card in page.cards] == [[]] * 4
    assert [card["size"] for card in page.cards] == [[30, 41], [3, 4], [1, 4], [3, 4]]
    assert page.maps(3)["masks"] == [None]
    assert page.maps(4)["masks"] == [None]
    assert "no box was predicted" in page.text


def test_a_line_that_is_malformed_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ["a", "b"])
    lines = (run / "predictions.jsonl").read_text()
    (run / "predictions.jsonl").write_text("{}\n" + lines)
    with pytest.raises(PredictionsError, match=r"predictions\.jsonl, line 1: expected an object"):
        page_of(run)
    (run / "predictions.jsonl").write_text('{"image_id": "a", "boxes": [[1, 2, 3, 4]], "scores": ["high"]}\n' + lines)
    with pytest.raises(PredictionsError, match="line 1: expected one finite score for each of 1 boxes"):
        page_of(run)
    (run / "predictions.jsonl").write_text("")
    with pytest.raises(PredictionsError, match="holds no predictions yet"):
        page_of(run)


def test_a_last_line_without_a_line_break_counts_if_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    write_lines(path, [predict("a"), predict("b")])
    path.write_bytes(path.read_bytes().rstrip())
    assert list(stream_predictions(path)) == read_predictions(path)
    path.write_bytes(path.read_bytes()[:-1])
    assert [found.image_id for found in stream_predictions(path)] == ["a"]


@pytest.mark.parametrize(
    ("choose", "expected"), [("first", {1, 2, 3}), ("lowest", {2, 4, 6}), ("highest", {1, 3, 5}), ("even", {1, 3, 5})]
)
def test_some_images_are_chosen(choose: build.Choice, expected: set[int]) -> None:
    scores = [(1, 0.9), (2, 0.1), (3, 0.8), (4, 0.2), (5, 0.7), (6, 0.3), (7, None)]
    assert choose_images(scores, 3, choose) == expected
    assert choose_images(scores, 7, choose) == set(range(1, 8))


def test_a_limit_below_one_or_an_unknown_choice_is_refused() -> None:
    for limit, choose in ((0, "first"), (1, "best")):
        with pytest.raises(OptionError, match="expected a limit of at least 1 and one of first, lowest, highest, even"):
            choose_images([(1, 0.5)], limit, choose)  # type: ignore[arg-type]


def test_what_a_limit_leaves_out_is_told(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [f"n{number}" for number in range(10)])
    page = page_of(run, limit=4, choose="lowest")
    scores = sorted(found.scores[0] for found in read_predictions(run / "predictions.jsonl"))
    assert sorted(card["scores"][0] for card in page.cards) == scores[:4]
    assert "shows 4 of 10 images: those with the lowest scores. 6 are left out" in page.text
    assert json.loads(page.by_id["facts"])["sort"] == "low"


def test_few_images_are_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", [str(number) for number in range(60)])
    alive: weakref.WeakSet[Entry] = weakref.WeakSet()
    most = 0

    class Watched(Entry):
        __hash__ = object.__hash__

    def make(*args: object, **options: object) -> Entry:
        nonlocal most
        entry = Watched({"number": 1}, {}, b"x")
        alive.add(entry)
        most = max(most, len(alive))
        return entry

    monkeypatch.setattr(build, "make_entry", make)
    monkeypatch.setattr(build.os, "cpu_count", lambda: 64)
    assert write_gallery(RunFolder(run), run / "report.html").shown == 60
    assert 1 <= most <= 12


def test_a_page_that_cannot_be_finished_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", ["a", "b"])
    page_of(run)
    before = (run / "report.html").read_bytes()

    def fail(*args: object, **options: object) -> Entry:
        raise RuntimeError("no")

    monkeypatch.setattr(build, "make_entry", fail)
    with pytest.raises(RuntimeError):
        page_of(run)
    assert (run / "report.html").read_bytes() == before
    assert not list(run.glob("*.part*"))


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31), st.sampled_from([0.0, 0.1, 0.5, 0.95, 1.0]))
def test_masks_are_those_of_coco(height: int, width: int, seed: int, share: float) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < share
    encoded = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    rle = {"size": [height, width], "counts": encoded["counts"].decode()}
    assert np.array_equal(_laid_out(small_mask(rle)), mask)
    small = _laid_out(small_mask(rle, 10))
    rows = ((np.arange(small.shape[0]) + 0.5) * height / small.shape[0]).astype(int)
    columns = ((np.arange(small.shape[1]) + 0.5) * width / small.shape[1]).astype(int)
    assert max(small.shape) <= max(10, min(height, width))
    assert np.array_equal(small, mask[rows][:, columns])


def _laid_out(found: dict[str, list[int]] | None) -> np.ndarray:
    assert found is not None
    height, width = found["size"]
    flat = np.repeat(np.arange(len(found["runs"])) % 2, found["runs"]).astype(bool)
    return flat.reshape(width, height).T


@given(st.text(max_size=40), st.integers(-3, 9), st.integers(-3, 9))
def test_what_is_no_mask_is_left_out(text: str, height: int, width: int) -> None:
    found = small_mask({"size": [height, width], "counts": text})
    assert found is None or sum(found["runs"]) == height * width
    assert small_mask({"size": [3, 3], "counts": [4, 5]}) is None
    assert small_mask(None) is None


def test_a_maps_line_that_stands_there_twice_costs_no_other_image_its_map(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ["a", "b", "c"])
    first, *rest = (run / "maps.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (run / "maps.jsonl").write_text("".join([first, first, *rest]), encoding="utf-8")
    page = page_of(run)
    assert [page.maps(number)["grid"] for number in (1, 2, 3)] == [list(GRID)] * 3


@pytest.mark.parametrize(
    ("degrees", "patch"),
    [(np.zeros((300, 300), np.int64), 1), (np.zeros((8, 8), np.int64), 14)],
    ids=["large", "other"],
)
def test_degree_maps_that_do_not_fit_are_left_out_and_counted(
    tmp_path: Path, degrees: np.ndarray, patch: float, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", ["a", "b"], changes={0: {"width": 300, "height": 300}} if patch == 1 else None)
    second = map_of("b", tmp_path / "photos/im0001.jpg", 1)
    maps = map_of("a", tmp_path / "photos/im0000.jpg", degrees=degrees, patch_width=patch, patch_height=patch)
    write_lines(run / "maps.jsonl", [maps, second])
    assert main(["report", str(run)]) == 0
    page = Page(run / "report.html")
    assert "degrees" not in page.maps(1)
    assert page.picture(1) is not None
    assert "degrees" in page.maps(2)
    assert "1 of 2 degree maps are left out: they do not fit" in capsys.readouterr().err


def test_masks_of_another_size_than_the_image_are_left_out(tmp_path: Path) -> None:
    fits, other = ({"size": [height, 150], "counts": coco_counts(height * 150)} for height in (110, 111))
    run = write_run(tmp_path / "run", ["a", "b"], changes={0: {"masks": [fits]}, 1: {"masks": [other]}})
    page = page_of(run)
    assert page.maps(1)["masks"][0]["size"] == [110, 150]
    assert page.maps(2)["masks"] == [None]


def coco_counts(length: int) -> str:
    return str(coco.frPyObjects({"size": [length, 1], "counts": [length]}, length, 1)["counts"].decode())


def test_numbers_beyond_all_bounds_do_no_harm(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ["a", "b"])
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    (run / "results.json").write_text(json.dumps({**results, "corloc": 10**400, "wilson_95": [10**400, 1]}))
    assert len(page_of(run).cards) == 2
