"""What the demo keeps, and how many forwards each step costs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gradio")

from serving import FIRST, NEURONS, NO_TOKEN, SECOND, small, small_models

from lostreg.demo.session import DemoSettings, Models, Visitor
from lostreg.errors import ImageError, OptionError
from lostreg.inference.discoverer import Discoverer
from lostreg.inference.jobs import FeaturesJob
from lostreg.inference.options import Options

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def models() -> Iterator[Models]:
    with small_models(neurons=NEURONS) as models:
        yield models


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry a forward."""
    seen: list[int] = []
    forward = FeaturesJob.forward

    def counted(job: FeaturesJob, patches: list, sizes: list) -> list:
        seen.append(len(patches))
        return forward(job, patches, sizes)

    monkeypatch.setattr(FeaturesJob, "forward", counted)
    return seen


@pytest.fixture
def visitor(photo: Path) -> Visitor:
    visitor = Visitor()
    visitor.take(photo, "disc.jpg")
    return visitor


def chosen(backbone: str, feature: Any, layer: int = -1, registers: int = 0) -> Options:
    settings = DemoSettings((FIRST, SECOND, NO_TOKEN), Options(bias="auto", device="cpu"), neurons=NEURONS)
    return settings.chosen(backbone, feature, layer, registers)


def hush(_: str) -> None:
    """No one is told."""


def test_a_change_of_view_costs_no_forward_and_a_change_of_choice_costs_one(
    visitor: Visitor, models: Models, forwards: list[int]
) -> None:
    visitor.look(models, chosen(FIRST, "k"), hush)
    boxes = [visitor.discover(bias=bias).xyxy[0].tolist() for bias in (0.0, -0.9, -0.3)]
    visitor.discover(bias="auto", max_objects=4, refine=True)
    assert forwards == [1]
    assert len({tuple(box) for box in boxes}) > 1
    visitor.look(models, chosen(FIRST, "v"), hush)
    assert forwards == [1, 1]


def test_the_features_of_two_choices_are_kept_and_no_more(
    visitor: Visitor, models: Models, forwards: list[int]
) -> None:
    choices = [chosen(FIRST, "k"), chosen(FIRST, "v"), chosen(FIRST, "k", layer=0)]
    visitor.look(models, choices[0], hush)
    visitor.look(models, choices[1], hush)
    visitor.look(models, choices[0], hush)
    assert len(forwards) == 2
    visitor.look(models, choices[2], hush)
    visitor.look(models, choices[0], hush)
    assert len(forwards) == 3
    visitor.look(models, choices[1], hush)  # the one that was longest unused
    assert len(forwards) == 4


def test_an_answer_is_that_of_a_discoverer(visitor: Visitor, models: Models, photo: Path) -> None:
    plain = Discoverer(small(FIRST), feature="out", bias="auto", device="cpu")
    cured = plain.with_registers(NEURONS)
    for choice, discoverer in ((chosen(FIRST, "out"), plain), (chosen(FIRST, "out", registers=2), cured)):
        visitor.look(models, choice, hush)
        found, expected = visitor.discover(), discoverer.discover(photo)
        assert visitor.found is found
        assert np.array_equal(found.xyxy, expected.xyxy)
        assert np.array_equal(found.degrees, expected.degrees)
        assert found.scores == pytest.approx(expected.scores, abs=1e-5)
        assert visitor.study is not None
        assert visitor.study.discoverer.backbone.prefix_names == discoverer.backbone.prefix_names


def test_a_model_is_loaded_once_and_the_longest_unused_one_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    def load(name: str, **options: object) -> object:
        loaded.append(name)
        return small(name)

    monkeypatch.setattr("lostreg.inference.discoverer.load_backbone", load)
    models = Models(DemoSettings((FIRST, SECOND, NO_TOKEN), Options(bias="auto", device="cpu")), limit=2)
    for name in (FIRST, SECOND, FIRST, NO_TOKEN, FIRST):
        models.get(name)
    assert loaded == [FIRST, SECOND, NO_TOKEN]
    assert not models.is_loaded(SECOND)
    models.get(SECOND)
    assert loaded == [FIRST, SECOND, NO_TOKEN, SECOND]
    assert not models.is_loaded(NO_TOKEN)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (("dino_vits16", "k"), "backbone must be one of imgfocus_vits14"),
        ((FIRST, "k", 2), "layer"),
        ((SECOND, "k", -1, 1), "those of imgfocus_vits14, not of dinov2_vits14_reg"),
    ],
)
def test_a_choice_that_does_not_fit_is_refused_and_leaves_no_old_answer(
    visitor: Visitor, models: Models, choice: tuple[Any, ...], message: str
) -> None:
    visitor.look(models, chosen(FIRST, "k"), hush)
    with pytest.raises(OptionError, match=message):
        visitor.look(models, chosen(*choice), hush)
    with pytest.raises(OptionError, match="drop it again"):
        visitor.discover()


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ((FIRST, "z"), "feature must be one of"),
        ((FIRST, "k", -1, 9), "expected 0 to 8 blank tokens"),
        ((FIRST, "k", -1, -1), "expected 0 to 8 blank tokens"),
    ],
)
def test_a_choice_that_no_backbone_has_is_refused(choice: tuple[Any, ...], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        chosen(*choice)


@pytest.mark.parametrize("changes", [{"max_objects": 0}, {"max_objects": 11}, {"bias": float("nan")}])
def test_a_view_out_of_range_is_refused(visitor: Visitor, models: Models, changes: dict[str, Any]) -> None:
    visitor.look(models, chosen(FIRST, "k"), hush)
    with pytest.raises(OptionError):
        visitor.discover(**changes)


def test_a_photo_that_cannot_be_read_is_an_image_error(models: Models, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_text("no picture")
    visitor = Visitor()
    visitor.take(broken, "broken.jpg")
    with pytest.raises(ImageError, match="not a readable image"):
        visitor.look(models, chosen(FIRST, "k"), hush)


def test_attention_is_looked_at_once_for_a_photo_and_model(
    visitor: Visitor, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = visitor.attention(models, chosen(FIRST, "k"))
    assert first.names[0] == "CLS"
    assert visitor.attention(models, chosen(FIRST, "v", layer=0)) is first
    assert visitor.attention(models, chosen(FIRST, "k", registers=1)).names[-1] == "test-time register 1"
    with pytest.raises(OptionError, match="no CLS"):
        visitor.attention(models, chosen(NO_TOKEN, "v"))


def test_loading_is_told_only_where_a_model_is_not_there_yet(visitor: Visitor, models: Models) -> None:
    told: list[str] = []
    visitor.look(models, chosen(FIRST, "k"), told.append)
    visitor.look(models, chosen(FIRST, "v"), told.append)
    visitor.look(models, chosen(FIRST, "v"), told.append)
    assert told == [f"Loading {FIRST}", "Looking at the photo", "Looking at the photo"]
