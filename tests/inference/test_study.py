import numpy as np
import pytest
from conftest import disc_picture, same, scene

from lostreg import Discoverer
from lostreg.defaults import METHODS
from lostreg.errors import ImageError, OptionError
from lostreg.inference.jobs import FeaturesJob
from lostreg.inference.study import Study
from lostreg.models.backbone import Backbone, build_backbone, find_spec


@pytest.mark.parametrize("options", [{}, {"bias": -0.3}, {"bias": "auto", "max_objects": 4, "min_score": 0.0}])
def test_a_study_finds_what_a_discoverer_with_the_same_options_finds(backbone: Backbone, options: dict) -> None:
    pixels = scene(3)
    study = Study(Discoverer(backbone, device="cpu", normalize=True), pixels)
    assert same(
        study.discover(**options), Discoverer(backbone, device="cpu", normalize=True, **options).discover(pixels)
    )


def test_one_forward_serves_many_searches(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    forwards = []
    forward = FeaturesJob.forward
    monkeypatch.setattr(FeaturesJob, "forward", lambda *args: forwards.append(1) or forward(*args))
    study = Study(Discoverer(backbone, device="cpu"), scene(3))
    found = [study.discover(bias=bias, max_objects=3) for bias in (-0.9, -0.5, 0.0, "auto")]
    assert len(forwards) == 1
    assert len({one.degrees.tobytes() for one in found}) > 1


def test_methods_answer_in_turn_and_the_attention_of_one_takes_another_forward_once(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = scene(3)
    as_it_is = Discoverer(backbone, device="cpu", normalize=False, bias=0.0)
    expected = {method: Discoverer(backbone, device="cpu", method=method).discover(pixels) for method in METHODS[1:]}
    expected["lost"] = as_it_is.discover(pixels)
    forwards = []
    forward = FeaturesJob.forward
    monkeypatch.setattr(FeaturesJob, "forward", lambda *args: forwards.append(1) or forward(*args))
    study = Study(as_it_is, pixels)
    for method in (*METHODS, *METHODS):
        bias = None if method == "lost" else "auto"
        assert same(study.discover(method=method, bias=bias), expected[method])
    assert len(forwards) == 2


def test_a_method_that_a_backbone_has_not_the_parts_for_is_refused() -> None:
    study = Study(Discoverer(build_backbone(find_spec("siglip2_vitb16"), depth=1), device="cpu"), scene(3))
    with pytest.raises(OptionError, match="the CLS token, which siglip2_vitb16 does not have"):
        study.discover(method="dinoseg")


def test_what_is_not_given_is_as_the_discoverer_has_it(backbone: Backbone) -> None:
    options = {"max_objects": 4, "min_score": 0.0, "refine": True, "box_from": "mask", "bias": -0.3, "normalize": True}
    discoverer = Discoverer(backbone, device="cpu", **options)  # type: ignore[arg-type]
    study = Study(discoverer, scene(3))
    assert len(study.discover()) > 1
    assert same(study.discover(), discoverer.discover(scene(3)))
    assert len(study.discover(max_objects=1)) == 1
    assert study.discover(box_from="patches").refined is not None


def test_bad_options_and_images_are_refused(backbone: Backbone) -> None:
    discoverer = Discoverer(backbone, device="cpu")
    with pytest.raises(ImageError, match="no such file"):
        Study(discoverer, "missing.png")
    study = Study(discoverer, np.zeros((30, 30, 3), np.uint8))
    with pytest.raises(OptionError, match="bias must be"):
        study.discover(bias=float("nan"))
    with pytest.raises(OptionError, match="max_objects must be"):
        study.discover(max_objects=0)


def test_what_needs_another_forward_is_refused(backbone: Backbone) -> None:
    study = Study(Discoverer(backbone, device="cpu"), disc_picture())
    with pytest.raises(OptionError, match="not layer, max_side, which need another forward"):
        study.discover(layer=0, max_side=100)
