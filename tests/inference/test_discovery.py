"""One image's result for other programs."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import disc_picture
from PIL import Image

from lostreg.errors import LostregError, OptionError
from lostreg.images.draw import score_text
from lostreg.inference.discoverer import Discoverer
from lostreg.inference.discovery import Discovery, to_pandas
from lostreg.models.backbone import Backbone
from lostreg.runs.predictions import from_discovery, read_predictions


@pytest.fixture
def found(backbone: Backbone) -> Discovery:
    return Discoverer(backbone, device="cpu").discover(disc_picture())


def test_supervision_gets_boxes_scores_and_masks_of_the_image(found: Discovery) -> None:
    pytest.importorskip("supervision")
    detections = found.to_supervision()
    assert len(detections) == len(found)
    assert detections.xyxy.dtype == np.float32
    assert np.array_equal(detections.xyxy, found.xyxy)
    assert detections.confidence is not None
    assert np.array_equal(detections.confidence, found.scores)
    assert detections.class_id is not None
    assert detections.class_id.tolist() == [0] * len(found)
    assert detections.mask is not None
    assert np.array_equal(detections.mask[0], found.pixel_mask(0))
    assert detections.mask.shape == (len(found), 110, 150)
    assert detections["class_name"].tolist() == ["object"] * len(found)
    assert np.array_equal(detections["seeds"], found.seeds)
    assert found.to_supervision(masks=False).mask is None


@pytest.mark.parametrize("unfit", [{"candidates": np.zeros((3, 4), np.float32)}, {"objectness": np.zeros((2, 2))}])
def test_what_objects_were_chosen_from_has_its_shape(found: Discovery, unfit: dict[str, np.ndarray]) -> None:
    with pytest.raises(ValueError, match=next(iter(unfit))):
        dataclasses.replace(found, **unfit)  # type: ignore[arg-type]


def test_without_supervision_the_way_to_it_is_named(found: Discovery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(OptionError, match=r'pip install "lostreg\[supervision\]"'):
        found.to_supervision()


def test_the_repr_is_one_short_line(found: Discovery) -> None:
    score = score_text(found.scores[0])
    assert repr(found) == f"Discovery(1 box, score {score}, 150x110)"
    named = dataclasses.replace(found, source=Path("a/dog.jpg"))
    assert repr(named) == f"Discovery('dog.jpg', 1 box, score {score}, 150x110)"
    scores = np.array([0.2, 0.46], np.float32)
    several = {name: np.repeat(getattr(found, name), 2, axis=0) for name in ("xyxy", "seeds", "biases", "masks")}
    assert repr(dataclasses.replace(found, scores=scores, **several)) == "Discovery(2 boxes, best score 0.46, 150x110)"
    nothing = {name: getattr(found, name)[:0] for name in (*several, "scores")}
    assert repr(dataclasses.replace(found, **nothing)) == "Discovery(0 boxes, 150x110)"


def test_a_dictionary_with_an_id_is_the_line_of_a_predictions_file(found: Discovery, tmp_path: Path) -> None:
    fields = {"image_id": "dog", **found.to_dict(masks=True)}
    (tmp_path / "predictions.jsonl").write_text(json.dumps(fields))
    assert read_predictions(tmp_path / "predictions.jsonl") == [from_discovery("dog", found, masks=True)]
    assert found.to_dict() == {name: fields[name] for name in ("width", "height", "boxes", "scores", "seeds")}


def test_a_table_has_a_row_a_box(backbone: Backbone, photo: Path) -> None:
    pytest.importorskip("pandas")
    discoverer = Discoverer(backbone, device="cpu", max_objects=3, min_score=0.0)
    several = [discoverer.discover(photo), discoverer.discover(disc_picture())]
    table = to_pandas(several)
    assert len(table) == len(several[0]) + len(several[1])
    assert table["path"].dropna().tolist() == [str(photo)] * len(several[0])
    assert table["image"].tolist() == [0] * len(several[0]) + [1] * len(several[1])
    assert np.array_equal(table[["x1", "y1", "x2", "y2"]], np.concatenate([one.xyxy for one in several]))
    assert np.array_equal(table["score"], np.concatenate([one.scores for one in several]))
    assert list(several[1].to_pandas().columns) == list(to_pandas([]).columns)


def test_the_picture_is_saved_in_the_format_of_its_suffix(found: Discovery, tmp_path: Path) -> None:
    found.save(tmp_path / "found.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "found.png")), found.plot())
    with pytest.raises(LostregError, match=r"expected a file ending in \.png"):
        found.save("found.json")


def test_without_pandas_the_way_to_it_is_named(found: Discovery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(OptionError, match="pip install pandas"):
        found.to_pandas()
