"""What people decided on boxes: whose decisions they are, and which boxes are left."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lostreg.errors import OptionError, PredictionsError
from lostreg.runs.decisions import FORMAT, ImageDecisions, boxes_fingerprint, choose_boxes, read_decisions
from lostreg.runs.predictions import Prediction, parse_prediction

LINE = Prediction("caf\udce9.jpg", [[0, 0, 9, 9], [1, 2.5, 3, 4], [5, 5, 6, 6]], 10, 10, [0.9, 0.5, 0.1], [[0, 0]] * 3)

CORNERS = st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=2).map(sorted)


def entry(line: Prediction = LINE, decisions: Any = ("reject", None, "keep"), **changes: Any) -> dict[str, Any]:
    fields = {"image_id": line.image_id, "fingerprint": boxes_fingerprint(line), "decisions": list(decisions)}
    return {**fields, **changes}


def write(path: Path, *entries: Any, **changes: Any) -> Path:
    path.write_text(json.dumps({"format": FORMAT, "run": "found", "images": list(entries), **changes}))
    return path


def test_rejected_boxes_go_and_kept_ones_stay_whatever_their_score(tmp_path: Path) -> None:
    decided = read_decisions(write(tmp_path / "decisions.json", entry()))
    undecided = replace(LINE, image_id="b.jpg")
    first, second = choose_boxes([LINE, undecided], min_score=0.6, decided=decided)
    assert (first.boxes, first.scores, first.seeds) == ([[5, 5, 6, 6]], [0.1], [[0, 0]])
    assert second.scores == [0.9]
    assert [line.scores for line in choose_boxes([LINE], decided=decided)] == [[0.5, 0.1]]
    assert list(choose_boxes([LINE, undecided])) == [LINE, undecided]


@given(st.lists(st.tuples(CORNERS, CORNERS), max_size=4), st.integers(0, 9))
def test_a_fingerprint_outlives_the_file_and_changes_with_the_boxes(
    corners: list[tuple[list[float], list[float]]], place: int
) -> None:
    boxes = [[x1, y1, x2, y2] for (x1, x2), (y1, y2) in corners]
    line = Prediction("a.jpg", boxes, scores=[0.5] * len(boxes))
    read = parse_prediction(line.to_line().encode())
    assert boxes_fingerprint(read) == boxes_fingerprint(parse_prediction(read.to_line().encode()))
    assert boxes_fingerprint(read) != boxes_fingerprint(replace(read, image_id="b.jpg"))
    if boxes:
        moved = [list(box) for box in read.boxes]
        moved[place % len(moved)][place % 4] += 1
        assert boxes_fingerprint(read) != boxes_fingerprint(replace(read, boxes=moved))


def test_decisions_on_other_boxes_or_images_are_refused() -> None:
    other = replace(LINE, boxes=[*LINE.boxes[:2], [5, 5, 6, 7]])
    decided = {"caf\udce9.jpg": ImageDecisions(LINE.image_id, boxes_fingerprint(LINE), ("reject", None, None))}
    with pytest.raises(PredictionsError, match=r"decisions on image .* are on other boxes than the 3 that"):
        list(choose_boxes([other], decided=decided))
    short = {"caf\udce9.jpg": replace(decided["caf\udce9.jpg"], decisions=("reject",))}
    with pytest.raises(PredictionsError, match="are on other boxes"):
        list(choose_boxes([LINE], decided=short))
    with pytest.raises(PredictionsError, match="1 images were decided on that the predictions do not have: "):
        list(choose_boxes([replace(LINE, image_id="b.jpg")], decided=decided))


def test_boxes_without_scores_are_chosen_by_decisions_alone() -> None:
    line = replace(LINE, scores=())
    with pytest.raises(OptionError, match="boxes without scores: --min-score cannot choose"):
        list(choose_boxes([line], min_score=0.1))
    decided = {str(line.image_id): ImageDecisions(line.image_id, boxes_fingerprint(line), ("reject", "keep", "reject"))}
    assert [one.boxes for one in choose_boxes([line], min_score=0.1, decided=decided)] == [[[1, 2.5, 3, 4]]]


UNSOUND = {
    "no format": (
        write,
        {"format": "lostreg decisions 2"},
        'expected a JSON object with "format": "lostreg decisions 1',
    ),
    "no list": (write, {"images": {}}, "expected a list of images, not {}"),
    "another word": (entry, {"decisions": ["maybe"]}, 'expected of each image image_id, fingerprint, .* "keep"'),
    "a list in it": (entry, {"decisions": [["keep"]]}, "expected of each image"),
    "no fingerprint": (entry, {"fingerprint": None}, "expected of each image"),
    "an id of no kind": (entry, {"image_id": True}, "expected of each image"),
}


@pytest.mark.parametrize(("change", "fields", "message"), UNSOUND.values(), ids=UNSOUND)
def test_what_no_page_saves_is_refused(tmp_path: Path, change: Any, fields: dict[str, Any], message: str) -> None:
    path = tmp_path / "decisions.json"
    if change is write:
        write(path, entry(), **fields)
    else:
        write(path, entry(**fields))
    with pytest.raises(PredictionsError, match=f"decisions.json is no file of `lostreg report`: {message}"):
        read_decisions(path)


def test_an_image_is_decided_on_once(tmp_path: Path) -> None:
    path = write(tmp_path / "decisions.json", entry(Prediction(5, [])), entry(Prediction("5", [])))
    with pytest.raises(PredictionsError, match="image '5' is decided on twice"):
        read_decisions(path)
    with pytest.raises(PredictionsError, match=r"cannot read the decisions .*: No such file"):
        read_decisions(tmp_path / "none.json")
