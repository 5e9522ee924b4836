"""One image's result for other programs."""

import dataclasses
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import disc_picture
from PIL import Image

from lostreg.errors import ImageError, LostregError, OptionError
from lostreg.images.draw import score_text
from lostreg.inference.discoverer import Discoverer
from lostreg.inference.discovery import Discovery, to_pandas
from lostreg.inference.options import BoxFrom
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


@pytest.mark.parametrize("library", ["supervision", "fiftyone"])
def test_without_a_library_the_way_to_it_is_named(
    found: Discovery, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(OptionError, match=rf'pip install "lostreg\[{library}\]"'):
        getattr(found, f"to_{library}")()


@pytest.mark.parametrize("box_from", ["patches", "mask"])
def test_fiftyone_gets_shares_of_the_image_and_masks_of_the_boxes(
    backbone: Backbone, box_from: BoxFrom, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FiftyOne spreads a mask over its box."""
    stands_in = SimpleNamespace(Detection=SimpleNamespace, Detections=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "fiftyone", stands_in)
    options = {"max_objects": 3, "min_score": 0.0, "refine": True, "box_from": box_from}
    found = Discoverer(backbone, device="cpu", max_side=99, **options).discover(disc_picture())
    labels = found.to_fiftyone().detections
    assert len(labels) == len(found) > 1
    for index, label in enumerate(labels):
        left, top, width, height = np.multiply(label.bounding_box, [150, 110, 150, 110])
        np.testing.assert_allclose([left, top, left + width, top + height], found.xyxy[index], atol=1e-4)
        assert (label.label, label.confidence) == ("object", found.scores[index])
        x, y = round(left), round(top)
        assert label.mask.shape == (round(top + height) - y, round(left + width) - x)
        expected = found.pixel_mask(index)
        assert np.array_equal(expected[y : y + label.mask.shape[0], x : x + label.mask.shape[1]], label.mask)
        assert box_from == "patches" or label.mask.sum() == expected.sum()
    assert not any(hasattr(label, "mask") for label in found.to_fiftyone(masks=False).detections)


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
    assert to_pandas(several[1]).equals(several[1].to_pandas())
    with pytest.raises(OptionError, match=r"expected discoveries alone, number 1 is ImageError: broken"):
        to_pandas([several[0], ImageError("broken")])  # type: ignore[list-item]


def test_the_picture_is_saved_in_the_format_of_its_suffix(found: Discovery, tmp_path: Path) -> None:
    found.save(tmp_path / "found.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "found.png")), found.plot())
    with pytest.raises(LostregError, match=r"expected a file ending in \.png"):
        found.save("found.json")
    with pytest.raises(OptionError, match="expected the path of a picture to write, not BytesIO"):
        found.save(io.BytesIO())  # type: ignore[arg-type]


def test_pictures_and_boxes_to_plot_are_checked(found: Discovery) -> None:
    assert found.plot(truth=[[10, 10, 30, 40]]).shape == found.plot().shape  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"boxes must have shape \(n, 4\), not \(2, 3\)"):
        found.plot(truth=np.zeros((2, 3)))
    with pytest.raises(ImageError, match=r"expected an RGB array .* got \(110, 150\) of uint8"):
        found.plot(pixels=disc_picture()[..., 0])


def test_without_pandas_the_way_to_it_is_named(found: Discovery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(OptionError, match=r"pip install .pandas"):
        found.to_pandas()
