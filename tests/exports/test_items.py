"""What is exported: checked, cut to the image, named."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exporting import HEIGHT, TURNED, WIDTH, as_prediction, collect, collection_of, line, save, write_lines, write_run
from hypothesis import given
from hypothesis import strategies as st

from lostreg.errors import OptionError, PredictionsError
from lostreg.exports.items import gather
from lostreg.images.rle import encode_rle
from lostreg.runs.locate import ImageFinder

MASK: dict[str, Any] = encode_rle(np.zeros((HEIGHT, WIDTH), bool)) | {}  # type: ignore[operator]


def test_a_run_gives_names_sizes_and_files(tmp_path: Path) -> None:
    found = collect(write_run(tmp_path, ["a.jpg", "trip/b.jpg"]) / "predictions.jsonl")
    assert [image.name for image in found.images] == ["a.jpg", "trip/b.jpg"]
    assert [image.source.path for image in found.images if image.source] == [
        tmp_path / "photos/a.jpg",
        tmp_path / "photos/trip/b.jpg",
    ]
    assert found.boxes == 4
    assert [one.image_id for one in found.unreadable] == ["broken.jpg"]
    assert found.images[0].boxes[0].xyxy == (6, 4, 30.5, 28.125)


def test_images_that_moved_are_found_where_the_user_says(tmp_path: Path) -> None:
    run = write_run(tmp_path, ["a.jpg"])
    (tmp_path / "photos").rename(tmp_path / "moved")
    found = collect(run / "predictions.jsonl", tmp_path / "moved")
    assert found.images[0].source is not None
    assert found.images[0].source.path == tmp_path / "moved/a.jpg"


@pytest.mark.parametrize(
    ("image_id", "file"),
    [
        ("000005", "000005.jpg"),
        ("000005", "000005.PNG"),
        (7, "000000000007.jpg"),
        (7, "COCO_train2014_000000000007.jpg"),
        ("trip/b", "trip/b.webp"),
    ],
)
def test_ids_of_benchmarks_are_found_in_a_folder(tmp_path: Path, image_id: str | int, file: str) -> None:
    save(tmp_path / "images" / file)
    found = collect(write_lines(tmp_path, [line(image_id)]), tmp_path / "images")
    assert found.images[0].name == file


def test_a_path_as_given_to_predict_is_found_and_named_below_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "photos/a.jpg")
    monkeypatch.chdir(tmp_path)
    found = collect(write_lines(tmp_path, [line("photos/a.jpg")]), Path("photos"))
    assert found.images[0].name == "a.jpg"
    assert collection_of(tmp_path, line("photos/a.jpg")).images[0].name == "photos/a.jpg"


def test_a_file_of_the_same_name_elsewhere_is_not_taken_for_the_image(tmp_path: Path) -> None:
    save(tmp_path / "images/a.jpg")
    found = collect(write_lines(tmp_path, [line("trip/a.jpg")]), tmp_path / "images")
    assert found.images[0].source is None


def test_absolute_names_lose_what_they_share(tmp_path: Path) -> None:
    found = collection_of(tmp_path, line("/home/me/a/x.jpg"), line("/home/me/b/y.jpg"))
    assert [image.name for image in found.images] == ["a/x.jpg", "b/y.jpg"]
    found = collection_of(tmp_path, line("//x/a.jpg"), line("/y/b.jpg"), line("c.jpg"))
    assert [image.name for image in found.images] == ["x/a.jpg", "y/b.jpg", "c.jpg"]


def test_a_missing_size_is_read_from_the_image(tmp_path: Path) -> None:
    save(tmp_path / "turned.jpg", exif=TURNED)
    found = collect(write_lines(tmp_path, [line("turned.jpg", width=0, height=0)]), tmp_path)
    assert (found.images[0].width, found.images[0].height) == (HEIGHT, WIDTH)
    assert found.images[0].boxes[1].xyxy == (0, 0, HEIGHT, HEIGHT)  # cut on the right


def test_the_size_of_an_image_that_is_left_out_is_not_asked_for(tmp_path: Path) -> None:
    low = line("gone.jpg", width=0, height=0, scores=[0.1, 0.1])
    found = collection_of(tmp_path, line(), low, min_score=0.25, keep_empty=False)
    assert [image.name for image in found.images] == ["a.jpg"]
    with pytest.raises(PredictionsError, match=r"gone\.jpg.* lack its width"):
        collection_of(tmp_path, line(), low, min_score=0.25)


def test_messages_cut_long_names_in_the_middle(tmp_path: Path) -> None:
    with pytest.raises(PredictionsError) as caught:
        collection_of(tmp_path, line("x" * 999 + ".jpg", boxes=[[999, 9, 1005, 15]], scores=[], seeds=[]))
    assert len(str(caught.value)) < 250
    assert ".jpg'" in str(caught.value)


def test_boxes_are_cut_to_the_image_and_counted(tmp_path: Path) -> None:
    found = collection_of(tmp_path, line(boxes=[[-3, 4, 99, 20], [1, 1, 2, 2]]))
    assert found.images[0].boxes[0].xyxy == (0, 4, WIDTH, 20)
    assert found.clipped == 1
    raw = collection_of(tmp_path, line(boxes=[[-3, 4, 99, 20], [1, 1, 2, 2]]), sized=False)
    assert raw.images[0].boxes[0].xyxy == (-3, 4, 99, 20)


@given(box=st.tuples(*[st.floats(-100, 200)] * 4))
def test_what_is_left_of_a_box_lies_in_it_and_in_the_image(box: tuple[float, ...]) -> None:
    fields = {"boxes": [list(box)], "scores": [0.5], "seeds": [[0, 0]]}
    overlaps = min(box[2], WIDTH) > max(box[0], 0) and min(box[3], HEIGHT) > max(box[1], 0)
    try:
        found = gather([as_prediction(**fields)], ImageFinder(Path("none")))
    except PredictionsError:
        assert not overlaps
    else:
        x1, y1, x2, y2 = found.images[0].boxes[0].xyxy
        assert overlaps
        assert 0 <= x1 < x2 <= WIDTH
        assert 0 <= y1 < y2 <= HEIGHT
        assert (x1, y1) >= (box[0], box[1])
        assert x2 <= box[2]
        assert y2 <= box[3]


def test_low_scores_are_left_out_and_images_without_a_box_are_known(tmp_path: Path) -> None:
    lines = [line("a.jpg"), line("b.jpg", scores=[0.1, 0.2])]
    found = collection_of(tmp_path, *lines, min_score=0.5)
    assert [len(image.boxes) for image in found.images] == [1, 0]
    assert found.empty == 0
    found = collection_of(tmp_path, *lines, min_score=0.5, keep_empty=False)
    assert [image.name for image in found.images] == ["a.jpg"]
    assert found.empty == 1
    assert collection_of(tmp_path, *lines).below(0.25) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"masks": [MASK, {"size": [1, 1], "counts": "1"}]}, "masks of 60x40 pixels, found one of 1x1"),
        (
            {"masks": [MASK, {"size": [HEIGHT, WIDTH], "counts": [1]}]},
            "malformed mask: expected counts as a compressed",
        ),
        ({"masks": [MASK, {"size": [HEIGHT, WIDTH], "counts": "PPPP"}]}, "malformed mask: expected counts as COCO"),
        ({"masks": [MASK, {"size": [HEIGHT, WIDTH], "counts": "1"}]}, "malformed mask: expected runs of 60x40 pixels"),
        (
            {"masks": [MASK, {"size": [1 << 20, 1 << 20], "counts": "1"}]},
            "expected masks of 60x40 pixels, found one of 1048576x1048576",
        ),
        ({"boxes": [[60, 0, 70, 9], [0, 0, 1, 1]]}, r"box \[60, 0, 70, 9\] covers nothing of the image of 60x40"),
        ({"width": 0}, "lack its width and height; --images DIR"),
    ],
)
def test_lines_whose_numbers_do_not_fit_are_refused_by_name(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(PredictionsError, match=f"image 'a.jpg': .*{message}"):
        collection_of(tmp_path, line(**fields))


@pytest.mark.parametrize("ids", [("a.jpg", "a.jpg"), (5, "5")])
def test_an_image_that_comes_twice_is_refused(tmp_path: Path, ids: tuple[str | int, ...]) -> None:
    with pytest.raises(PredictionsError, match="1 images twice"):
        collection_of(tmp_path, *(line(one) for one in ids))


def test_boxes_without_scores_cannot_be_chosen_among(tmp_path: Path) -> None:
    assert collection_of(tmp_path, line(scores=[])).boxes == 2
    with pytest.raises(OptionError, match="without scores"):
        collection_of(tmp_path, line(scores=[]), min_score=0.1)


def test_sound_masks_are_kept(tmp_path: Path) -> None:
    whole = encode_rle(np.ones((HEIGHT, WIDTH), bool))
    found = collection_of(tmp_path, line(masks=[whole, MASK]))
    assert [box.mask for box in found.images[0].boxes] == [whole, MASK]
    assert [box.mask_area for box in found.images[0].boxes] == [WIDTH * HEIGHT, 0]


def test_masks_that_are_not_exported_are_not_decoded(tmp_path: Path) -> None:
    broken = {"size": [HEIGHT, WIDTH], "counts": "PPPP"}
    assert collection_of(tmp_path, line(masks=[broken, broken]), masks=False).boxes == 2
    assert collection_of(tmp_path, line(masks=[MASK, broken]), min_score=0.5).boxes == 1
