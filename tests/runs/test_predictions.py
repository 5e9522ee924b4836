import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lostreg.errors import ImageError, ImageUnavailableError, PredictionsError
from lostreg.inference.discovery import Discovery
from lostreg.runs.predictions import (
    Prediction,
    from_discovery,
    from_error,
    parse_prediction,
    read_predictions,
    stream_predictions,
)

IDS = st.one_of(st.text(min_size=1), st.integers(-(2**53), 2**53))
COORDINATES = st.integers(0, 10**7).map(lambda thousandths: thousandths / 1000)


@st.composite
def sound(draw: st.DrawFn) -> Prediction:
    """A prediction that may be, with a score and a seed a box or none at all."""
    side = st.lists(COORDINATES, min_size=2, max_size=2).map(sorted)
    corners = draw(st.lists(st.tuples(side, side), max_size=3))
    boxes = [[across[0], down[0], across[1], down[1]] for across, down in corners]
    score = st.integers(0, 1000).map(lambda thousandths: thousandths / 1000)
    seed = st.lists(st.integers(0, 99), min_size=2, max_size=2)
    error = draw(st.none() | st.text(min_size=1))
    return Prediction(
        draw(IDS),
        boxes,
        draw(st.integers(0, 10**5)),
        draw(st.integers(0, 10**5)),
        draw(st.lists(score, min_size=len(boxes), max_size=len(boxes)) | st.just(())),
        draw(st.lists(seed, min_size=len(boxes), max_size=len(boxes)) | st.just(())),
        error=error,
        unavailable=error is not None and draw(st.booleans()),
    )


PREDICTIONS = sound()
GOOD = '{"image_id": "a", "boxes": [[0, 0, 5, 5]]}'


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


@given(st.lists(PREDICTIONS, min_size=1, max_size=5))
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, predictions: list[Prediction]) -> None:
    path = tmp_path_factory.mktemp("predictions") / "predictions.jsonl"
    write(path, *(prediction.to_line() for prediction in predictions))
    assert [vars(one) for one in read_predictions(path)] == [plain(one) for one in predictions]
    assert list(stream_predictions(path)) == read_predictions(path)


def plain(prediction: Prediction) -> dict[str, Any]:
    """Its fields, with none of a thing as an empty tuple."""
    return {
        name: () if value == [] and name in ("scores", "seeds") else value for name, value in vars(prediction).items()
    }


@given(PREDICTIONS)
def test_a_prediction_is_one_line_of_json(prediction: Prediction) -> None:
    line = prediction.to_line()
    assert "\n" not in line
    assert "\r" not in line
    assert json.loads(line)["image_id"] == prediction.image_id


def test_a_line_looks_as_documented() -> None:
    prediction = Prediction("000005", [[1.0, 2.5, 3.12345, 4.0]], 500, 375, [1.0], [[3, 7]])
    assert prediction.to_line() == (
        '{"image_id": "000005", "width": 500, "height": 375, "boxes": [[1, 2.5, 3.123, 4]], '
        '"scores": [1], "seeds": [[3, 7]]}'
    )


def test_a_discovery_becomes_a_line() -> None:
    found = Discovery(
        xyxy=np.array([[14, 0, 28, 42]], np.float32),
        scores=np.array([1], np.float32),
        seeds=np.array([[1, 1]]),
        width=60,
        height=50,
        degrees=np.zeros((4, 5), np.int64),
        biases=np.zeros(1, np.float32),
        masks=np.zeros((1, 4, 5), bool),
        patch_width=14.0,
        patch_height=14.0,
    )
    assert json.loads(from_discovery(17, found).to_line()) == {
        "image_id": 17,
        "width": 60,
        "height": 50,
        "boxes": [[14, 0, 28, 42]],
        "scores": [1],
        "seeds": [[1, 1]],
    }


def test_an_unreadable_image_has_a_line_with_its_reason(tmp_path: Path) -> None:
    prediction = from_error("a", ImageError("a.jpg: no such file"))
    (again,) = read_predictions(write(tmp_path / "p.jsonl", prediction.to_line()))
    assert (again.boxes, again.error) == ([], "a.jpg: no such file")


def test_a_passing_fault_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    errors = (ImageUnavailableError(f"{path}: gone"), ImageError(f"{path}: broken"))
    gone, broken = (from_error("a", error, path).to_line() for error in errors)
    assert gone.endswith('"error": "a.jpg: gone", "unavailable": true}')
    assert "unavailable" not in broken
    assert [parse_prediction(line.encode()).unavailable for line in (gone, broken)] == [True, False]
    assert not parse_prediction(b'{"image_id": "a", "boxes": [], "unavailable": true}').unavailable  # nothing failed


def test_ids_keep_their_letters_and_their_type(tmp_path: Path) -> None:
    ids = ["naïve_日本_🐕", "7", 7, "a\u2028b", "", "a b"]
    lines = [Prediction(image_id, []).to_line() for image_id in ids]
    assert "naïve_日本_🐕" in lines[0]
    assert [prediction.image_id for prediction in read_predictions(write(tmp_path / "p.jsonl", *lines))] == ids


def test_a_file_name_that_is_no_utf8_survives(tmp_path: Path) -> None:
    name = "caf\udce9.jpg"  # how Python holds the byte E9
    line = Prediction(name, []).to_line()
    assert read_predictions(write(tmp_path / "p.jsonl", line))[0].image_id == name


def test_only_image_id_and_boxes_are_needed(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", GOOD, "", '{"image_id": 2, "boxes": [], "more": "ignored"}')
    assert [prediction.image_id for prediction in read_predictions(path)] == ["a", 2]


@pytest.mark.parametrize("ending", ["\r\n", "\n"])
def test_files_of_other_systems_are_read(tmp_path: Path, ending: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + (GOOD + ending + GOOD).encode())
    assert len(read_predictions(path)) == 2


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        "[1, 2]",
        "null",
        '"text"',
        "{}",
        '{"boxes": []}',
        '{"image_id": "a"}',
        '{"image_id": null, "boxes": []}',
        '{"image_id": true, "boxes": []}',
        '{"image_id": 1.5, "boxes": []}',
        '{"image_id": "a", "boxes": null}',
        '{"image_id": "a", "boxes": [1, 2, 3, 4]}',
        '{"image_id": "a", "boxes": [[1, 2, 3]]}',
        '{"image_id": "a", "boxes": [[1, 2, 3, 4, 5]]}',
        '{"image_id": "a", "boxes": [[1, 2, 3, "4"]]}',
        '{"image_id": "a", "boxes": [[1, 2, 3, null]]}',
        '{"image_id": "a", "boxes": [[1, 2, 3, true]]}',
        '{"image_id": "a", "boxes": [[1, 2, 3, NaN]]}',
        '{"image_id": "a", "boxes": [[1, 2, 3, Infinity]]}',
        '{"image_id": "a", "boxes": [[1, 2, 3, -Infinity]]}',
        '{"image_id": "a", "boxes": [[1, 2, 3, 1e999]]}',
        '{"image_id": "a", "boxes": [[1, 2, 3, 1' + "0" * 400 + "]]}",
        "[" * 100_000,
        GOOD + GOOD,
        GOOD[:-1],
    ],
    ids=lambda line: line[:60],
)
def test_a_malformed_line_is_named_by_its_number(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "p.jsonl", GOOD, "", line, GOOD)
    for read in (read_predictions, stream_predictions):
        with pytest.raises(PredictionsError, match=r"p\.jsonl, line 3: expected an object with image_id and boxes"):
            list(read(path))


RLE = {"size": [2, 2], "counts": "04"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": "60"}, r"width and height must be whole numbers below 2\*\*31, not '60'"),
        ({"width": 10**400}, r"must be whole numbers .*, not 1000.*\.\.\.0000.*"),
        ({"height": 2**31}, "must be whole numbers"),
        ({"width": -60}, "must be whole numbers"),
        ({"width": 60.5}, "must be whole numbers"),
        ({"width": True}, "must be whole numbers"),
        ({"scores": [0.5]}, "one finite score for each of 2 boxes"),
        ({"scores": [0.5, math.nan]}, "one finite score for each of 2 boxes"),
        ({"scores": [0.5, 10**400]}, "one finite score for each of 2 boxes"),
        ({"scores": "ab"}, "one finite score for each of 2 boxes"),
        ({"scores": [None, 0.5]}, "one finite score for each of 2 boxes"),
        ({"scores": [0.5, True]}, "one finite score for each of 2 boxes"),
        ({"scores": {"a": 1}}, "one finite score for each of 2 boxes"),
        ({"seeds": 7}, "one seed .* for each of 2 boxes"),
        ({"seeds": [[1, 2], [3.0, 4]]}, "one seed .* for each of 2 boxes"),
        ({"seeds": [[1, 2]]}, "one seed .* for each of 2 boxes"),
        ({"seeds": [[1, 2], [3]]}, "one seed .* for each of 2 boxes"),
        ({"masks": [RLE]}, "one mask, as COCO encodes them, for each of 2 boxes"),
        ({"masks": [RLE, None]}, "one mask, as COCO encodes them, for each of 2 boxes"),
        ({"error": {"a": 1}}, "expected the error as text, not {'a': 1}"),
        ({"error": True}, "expected the error as text, not True"),
        ({"error": 0}, "expected the error as text, not 0"),
        ({"scores": ""}, "one finite score for each of 2 boxes"),
        ({"boxes": [], "scores": ""}, "one finite score for each of 0 boxes"),
        ({"boxes": [], "seeds": {}}, "one seed .* for each of 0 boxes"),
        ({"seeds": [[1, 2], [3, 10**30]]}, "one seed .* for each of 2 boxes"),
        ({"seeds": [[1, 2], [3, -1]]}, "one seed .* for each of 2 boxes"),
        ({"boxes": [[0, 0, 1e300, 1], [0, 0, 1, 1]]}, "boxes is not a list"),
        ({"boxes": [[0, 0, 2**31 + 1, 1], [0, 0, 1, 1]]}, "boxes is not a list"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_whatever_else_a_line_has_must_fit_its_boxes(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    line = json.dumps({"image_id": "a", "boxes": [[1, 2, 3, 4], [5, 6, 7, 8]], **fields})
    with pytest.raises(PredictionsError, match=rf"p\.jsonl, line 2: .*{message}") as caught:
        read_predictions(write(tmp_path / "p.jsonl", GOOD, line))
    assert len(str(caught.value)) < len(str(tmp_path)) + 250  # long values lose their middle


@pytest.mark.parametrize("box", [[60, 9, 9, 60], [9, 60, 60, 9]])
def test_boxes_with_swapped_corners_are_named_by_their_line(tmp_path: Path, box: list[int]) -> None:
    path = write(tmp_path / "p.jsonl", GOOD, json.dumps({"image_id": "b", "boxes": [[0, 0, 5, 5], box]}))
    for read in (read_predictions, stream_predictions):
        with pytest.raises(
            PredictionsError, match=r"p\.jsonl, line 2: expected boxes .* with x1 <= x2 and y1 <= y2, not"
        ):
            list(read(path))


def write_list(path: Path, *entries: Any) -> Path:
    path.write_text(json.dumps(entries, indent=1), encoding="utf-8-sig")
    return path


def result(image_id: str | int, bbox: list[float], score: float, category: int = 1) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": category, "bbox": bbox, "score": score}


def test_results_of_coco_become_a_prediction_an_image_by_falling_score(tmp_path: Path) -> None:
    path = write_list(
        tmp_path / "results.json",
        result(9, [1, 2, 3, 4.5], 0.2, category=18),
        result(7, [0, 0, 5, 5], 3),
        result(9, [10, 20, 30, 40], 0.9, category=1),
    )
    expected = [
        Prediction(9, [[10, 20, 40, 60], [1, 2, 4, 6.5]], scores=[0.9, 0.2]),
        Prediction(7, [[0, 0, 5, 5]], scores=[3]),
    ]
    assert read_predictions(path) == list(stream_predictions(path)) == expected


def test_a_list_of_our_own_objects_is_read(tmp_path: Path) -> None:
    path = write_list(tmp_path / "p.json", json.loads(GOOD), {"image_id": 2, "boxes": []})
    assert read_predictions(path) == [Prediction("a", [[0, 0, 5, 5]]), Prediction(2, [])]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (result(1, [0, 0, -5, 5], 1), "with x1 <= x2 and y1 <= y2, not"),
        (result(1, [0, 0, 5, -0.5], 1), "with x1 <= x2 and y1 <= y2, not"),
        (result(1, [0, 0, 5], 1), r"bbox as \[x, y, width, height\] and a finite score"),
        (result(1, [0, 0, 5, 2**32], 1), r"bbox as \[x, y, width, height\] and a finite score"),
        (result(1, [0, 0, 5, 5], math.nan), "a finite score"),
        ({"image_id": 1, "bbox": [0, 0, 5, 5]}, "a finite score"),
        ({"bbox": [0, 0, 5, 5], "score": 1}, "expected an object with image_id, bbox"),
        ({"image_id": 1, "segmentation": {}, "score": 1}, "expected an object with image_id, bbox"),
        ({"image_id": 1, "boxes": []}, "expected an object with image_id, bbox"),
        (result(1, [2**31 - 1, 0, 2**31 - 1, 5], 1), "expected boxes within ±2147483648"),
        ([1], "expected an object with image_id and boxes"),
    ],
    ids=str,
)
def test_a_malformed_entry_of_a_list_is_named_by_its_number(tmp_path: Path, entry: Any, message: str) -> None:
    path = write_list(tmp_path / "results.json", result(1, [0, 0, 5, 5], 1), entry)
    with pytest.raises(PredictionsError, match=rf"results\.json, entry 2 of the list: .*{message}"):
        read_predictions(path)


@pytest.mark.parametrize("content", ["[", "[" * 100_000, '[{"image_id": 1}', "[1] [2]"])
def test_a_list_that_is_no_json_is_one_clear_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(PredictionsError, match=r"results\.json: expected a JSON list of COCO results"):
        read_predictions(tmp_path / "results.json")


def test_lines_are_read_one_by_one(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", GOOD, "nonsense")
    assert next(stream_predictions(path)).image_id == "a"  # before the second is looked at


def test_the_folder_of_a_run_is_read(tmp_path: Path) -> None:
    write(tmp_path / "predictions.jsonl", GOOD)
    assert read_predictions(tmp_path) == read_predictions(tmp_path / "predictions.jsonl")


@pytest.mark.parametrize("depth", [900, 950, 990, 1_000, 100_000])
@pytest.mark.parametrize("name", ["image_id", "boxes", "width", "scores", "seeds", "masks", "error"])
def test_values_of_many_levels_are_one_clear_error(tmp_path: Path, name: str, depth: int) -> None:
    line = json.dumps({"image_id": "a", "boxes": [[1, 2, 3, 4]], name: "@"}).replace('"@"', "[" * depth + "]" * depth)
    with pytest.raises(PredictionsError, match=r"p\.jsonl, line 1: ") as caught:
        read_predictions(write(tmp_path / "p.jsonl", line))
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("absent", [None, [], False, ""])
def test_what_other_programs_leave_empty_is_absent(tmp_path: Path, absent: Any) -> None:
    names = ("width", "height", "scores", "seeds", "masks", "error")
    empty = {None: names, "[]": ("scores", "seeds")}.get(absent if absent is None else str(absent), ("error",))
    line = json.dumps({"image_id": "a", "boxes": [[1, 2, 3, 4]], **dict.fromkeys(empty, absent)})
    assert read_predictions(write(tmp_path / "p.jsonl", line)) == [Prediction("a", [[1, 2, 3, 4]])]


def test_bytes_that_are_no_text_are_named_by_their_line(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(GOOD.encode() + b"\n\xff\xfe\x00\n")
    with pytest.raises(PredictionsError, match="line 2"):
        read_predictions(path)


def test_missing_and_empty_files_cannot_be_scored(tmp_path: Path) -> None:
    with pytest.raises(PredictionsError, match=r"none\.jsonl: No such file"):
        read_predictions(tmp_path / "none.jsonl")
    with pytest.raises(PredictionsError, match=r"predictions\.jsonl: No such file"):
        read_predictions(tmp_path)
    for content in ("", "\n\n", "[]"):
        path = tmp_path / "empty.jsonl"
        path.write_text(content)
        with pytest.raises(PredictionsError, match="holds no predictions"):
            read_predictions(path)


def test_a_file_cut_at_any_byte_is_streamed_as_far_as_its_whole_lines(tmp_path: Path) -> None:
    predictions = [
        Prediction("日本", [[0, 1, 20.5, 30]], 50, 40, [1.0], [[0, 0]]),
        from_error(12, ImageError("12.jpg: no such file")),
        Prediction("z", [[3, 3, 4, 4]]),
    ]
    lines = [(prediction.to_line() + "\n").encode() for prediction in predictions]
    content = b"".join(lines)
    path = tmp_path / "p.jsonl"
    ends = [len(b"".join(lines[: count + 1])) - 1 for count in range(3)]  # of the objects, without their line breaks
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        assert [one.image_id for one in stream_predictions(path)] == ["日本", 12, "z"][
            : sum(cut >= end for end in ends)
        ]


def test_a_file_cut_inside_a_line_cannot_be_scored_unnoticed(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    for cut in range(1, len(GOOD)):
        path.write_text(f"{GOOD}\n{GOOD[:cut]}")
        with pytest.raises(PredictionsError, match="line 2"):
            read_predictions(path)


def test_a_last_line_is_left_out_only_if_it_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    malformed = GOOD[:-1] + ', "scores": ["high"]}'
    for cut in range(len(malformed)):
        path.write_text(f"{GOOD}\n{malformed[:cut]}")
        assert [prediction.image_id for prediction in stream_predictions(path)] == ["a"]
    path.write_text(f"{GOOD}\n{malformed}")
    with pytest.raises(PredictionsError, match="line 2: expected one finite score"):
        list(stream_predictions(path))
