"""One image's result for supervision."""

import dataclasses
import sys

import numpy as np
import pytest
from conftest import disc_picture

from lostreg.errors import OptionError
from lostreg.inference.discoverer import Discoverer
from lostreg.inference.discovery import Discovery
from lostreg.models.backbone import Backbone


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
