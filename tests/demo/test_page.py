"""What the page's callbacks answer, called as Gradio calls them."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio")

import gradio as gr
import numpy as np
import torch
from fabricate import png_header
from PIL import Image
from serving import FIRST, NEURONS, NO_TOKEN, SECOND, small_models

from lostreg.defaults import METHODS
from lostreg.demo.page import Page
from lostreg.demo.session import Visitor
from lostreg.errors import ImageError
from lostreg.inference.discoverer import Discoverer
from lostreg.inference.jobs import FeaturesJob
from lostreg.inference.objectness import Facts, Objectness
from lostreg.methods.learned import LinearObjectness

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = (FIRST, "k", -1, 0)
VIEW = ("parts", True, 0.0, 1, "patches", False)
PLACES = ("state", "told", "picture", "degrees", "caption", "taught", "taught_side", "table", "text", "bias", "photo")


@pytest.fixture(scope="module")
def uploads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("uploads")


@pytest.fixture(scope="module")
def page(uploads: Path) -> Iterator[Page]:
    with small_models(neurons=NEURONS, max_pixels=1_000_000) as models:
        yield Page(models.settings, uploads, models)


def silent(*_: Any, **__: Any) -> None:
    """Progress that no one watches."""


def file_data(path: Path, name: str | None = None) -> dict[str, Any]:
    return {"path": str(path), "orig_name": name or path.name, "meta": {"_type": "gradio.FileData"}}


def run(page: Page, visitor: Visitor | None, *options: Any, view: tuple[Any, ...] = VIEW) -> list[Any]:
    return page.run(visitor, *(options or OPTIONS), *view, progress=silent)


def shown(answer: list[Any]) -> dict[str, Any]:
    """An answer by its parts."""
    return dict(zip(PLACES, answer, strict=False))


def is_skipped(update: Any) -> bool:
    return update == gr.skip()


@pytest.fixture
def visitor(page: Page, uploads: Path, photo: Path) -> Visitor:
    sent = uploads / "photo.jpg"
    sent.write_bytes(photo.read_bytes())
    return page.receive(file_data(sent, "my photo.jpg"), None)


def test_a_photo_is_answered_with_words_pictures_boxes_and_the_chosen_bias(page: Page, visitor: Visitor) -> None:
    answer = shown(run(page, visitor))
    assert answer["state"] is visitor
    assert "object" in answer["told"]
    assert answer["picture"].shape == answer["degrees"].shape == (469, 640, 3)
    assert answer["table"].count("<tr>") == 2
    assert '"my photo.jpg"' in answer["text"]
    assert -1 <= answer["bias"] <= 1
    assert is_skipped(answer["photo"])


def test_the_slider_redraws_without_a_forward_and_takes_over_from_auto(
    page: Page, visitor: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(page, visitor, view=("lost", *VIEW[1:]))

    def refuse(*_: Any) -> None:
        raise AssertionError("a forward")

    monkeypatch.setattr(FeaturesJob, "forward", refuse)
    seen = {shown(first)["table"]}
    for bias in (-0.95, -0.5, 0.0, 0.5):
        *answer, automatic = page.redraw_by_hand(visitor, "lost", bias, 1, "patches", False)
        assert automatic is False
        assert answer[0] is visitor
        assert visitor.found is not None
        assert visitor.found.bias == pytest.approx(bias)
        seen.add(shown(answer)["table"])
    assert len(seen) > 1
    assert shown(page.redraw(visitor, "lost", *VIEW[1:]))["text"] == shown(first)["text"]


def test_several_objects_and_refined_masks_are_asked_for(page: Page, visitor: Visitor) -> None:
    run(page, visitor, view=("lost", False, -0.9, 1, "patches", False))
    assert visitor.found is not None
    assert visitor.found.refined is None
    page.redraw(visitor, "lost", False, -0.9, 5, "refined", False)
    assert visitor.found.refined is not None


def test_candidates_are_drawn_where_they_are_asked_for(page: Page, visitor: Visitor) -> None:
    plain, drawn = shown(run(page, visitor)), shown(run(page, visitor, view=(*VIEW[:-1], True)))
    assert visitor.found is not None
    assert visitor.found.candidates is not None
    assert f"Of its {len(visitor.found.candidates)} best candidates" in plain["told"]
    assert (plain["picture"] != drawn["picture"]).any()
    assert (plain["table"], plain["text"]) == (drawn["table"], drawn["text"])


def test_every_method_answers_and_says_which_controls_it_knows(page: Page, visitor: Visitor) -> None:
    answers = [shown(run(page, visitor, view=(method, *VIEW[1:]))) for method in METHODS]
    assert len({answer["text"] for answer in answers}) > 2
    updates = [page.choose_method(method) for method in METHODS]
    knows_bias = [method for method, update in zip(METHODS, updates, strict=True) if update[2]["interactive"]]
    knows_several = [method for method, update in zip(METHODS, updates, strict=True) if update[3]["interactive"]]
    assert knows_bias == [name for name, answer in zip(METHODS, answers, strict=True) if not is_skipped(answer["bias"])]
    assert (knows_bias, knows_several) == (["lost", "parts"], ["lost", "parts", "maskcut"])
    assert all(update[1] == update[2] for update in updates)
    assert [update[4]["interactive"] for update in updates] == [method == "parts" for method in METHODS]
    assert all(is_skipped(update) for update in page.choose_method(None))  # type: ignore[arg-type]


def test_what_a_method_cannot_do_is_told_in_one_line(page: Page, visitor: Visitor) -> None:
    run(page, visitor, NO_TOKEN, "v", -1, 0)
    told, picture = page.redraw(visitor, "dinoseg", *VIEW[1:])[1:3]
    assert f"the CLS token, which {NO_TOKEN} does not have" in told
    assert picture is None
    assert "expected a method" in page.redraw(visitor, None, *VIEW[1:])[1]  # type: ignore[arg-type]
    assert "object" in page.redraw(visitor, *VIEW)[1]


def test_what_other_photos_taught_is_shown_with_the_backbone_that_it_fits(
    uploads: Path, visitor: Visitor, photo: Path
) -> None:
    weight = torch.from_numpy(np.random.default_rng(0).normal(0, 5, 384).astype(np.float32))
    objectness = Objectness(LinearObjectness(weight, -0.5), Facts(FIRST, "random", images=70, unreadable=0, seed=0))
    with small_models(objectness=objectness) as models:
        page = Page(models.settings, uploads, models)
        plain = shown(run(page, visitor, SECOND, "k", -1, 0))
        assert (plain["taught"], plain["taught_side"]["visible"]) == (None, False)
        assert (
            f"not used with it: the objectness was learned on {FIRST}, not on {SECOND}"
            in page.choose_backbone(SECOND, progress=silent)[0]["info"]
        )
        assert "not used" not in page.choose_backbone(FIRST, progress=silent)[0]["info"]
        answer = shown(run(page, visitor))
        assert (answer["taught"].shape, answer["taught_side"]["visible"]) == (answer["picture"].shape, True)
        expected = Discoverer(models.get(FIRST).backbone, device="cpu", method="parts", objectness=objectness).discover(
            photo
        )
        assert visitor.found is not None
        np.testing.assert_array_equal(visitor.found.objectness, expected.objectness)
        np.testing.assert_array_equal(visitor.found.xyxy, expected.xyxy)
        assert "What other photos taught ranks them" in answer["told"]
        other = shown(page.redraw(visitor, "lost", *VIEW[1:]))
        assert (other["taught"], other["taught_side"]["visible"]) == (None, False)


def test_nothing_is_answered_before_the_first_photo(page: Page) -> None:
    visitor, told, picture, *_ = run(page, None)
    assert isinstance(visitor, Visitor)
    assert "Drop a photo" in told
    assert picture is None
    assert all(is_skipped(update) for update in page.redraw(None, *VIEW)[1:])
    assert page.attend(None, *OPTIONS)[0] is None


def test_a_file_that_is_no_upload_is_not_taken(page: Page, photo: Path, uploads: Path) -> None:
    (uploads / "link.jpg").symlink_to(photo)
    for file in (
        file_data(photo),
        file_data(uploads / ".." / photo.name),
        file_data(uploads / "link.jpg"),
        file_data(uploads),
        {"path": None, "url": "data:image/png;base64,"},
        {"path": "http://127.0.0.1/x.jpg"},
        None,
    ):
        assert page.receive(file, None).photo is None
    sent = uploads / "mine.jpg"
    sent.write_bytes(photo.read_bytes())
    taken = page.receive(file_data(sent, "../../etc/passwd"), None)
    assert (taken.photo, taken.name) == (sent, "passwd")


def test_a_broken_photo_is_told_by_its_name_and_no_path_of_the_server(page: Page, uploads: Path) -> None:
    broken = uploads / "0123.jpg"
    broken.write_text("no picture")
    visitor = page.receive(file_data(broken, "<b>beach.jpg"), None)
    answer = shown(run(page, visitor))
    assert "&lt;b&gt;beach.jpg: not a readable image" in answer["told"]
    assert str(uploads) not in answer["told"]
    assert [answer[name] for name in ("picture", "degrees", "table", "text", "photo")] == [None, None, "", "", None]
    assert page.attend(visitor, *OPTIONS)[0] is None
    assert all(is_skipped(update) for update in page.redraw(visitor, *VIEW)[1:])  # the message stays


def test_a_name_that_turns_the_line_round_is_told_without_and_without_a_path_of_the_server(
    page: Page, uploads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = uploads / "a\u202egpj.\x9b2J.jpg"  # as Gradio leaves it
    kept.write_bytes(b"no picture")
    data = file_data(kept)
    assert r"a\u202egpj.\u009b2J.jpg: " in run(page, page.receive(data, None))[1]

    def told_in_another_way(*_: object, **__: object) -> None:
        raise ImageError(f"{uploads}/a?gpj.jpg: \x1b[2J")

    monkeypatch.setattr(Visitor, "look", told_in_another_way)
    told = run(page, page.receive(data, None))[1]
    assert r"a?gpj.jpg: \u001b[2J" in told
    assert str(uploads) not in told


def test_a_photo_that_is_gone_before_its_attention_is_told_by_its_name(page: Page, visitor: Visitor) -> None:
    assert visitor.photo
    visitor.name = "<b>beach.jpg"
    run(page, visitor)
    visitor.photo.unlink()
    picture, told = page.attend(visitor, *OPTIONS)
    assert picture is None
    assert "&lt;b&gt;beach.jpg: " in told
    assert str(visitor.photo.parent) not in told


def test_a_photo_with_too_many_pixels_is_refused_before_it_is_decoded(page: Page, uploads: Path) -> None:
    png_header(uploads / "huge.png", 30_000, 30_000)
    told = run(page, page.receive(file_data(uploads / "huge.png"), None))[1]
    assert "30000x30000" in told
    assert "more than the limit of 1,000,000" in told


def test_an_error_of_ours_goes_to_the_log_and_not_to_the_page(
    page: Page, visitor: Visitor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run(page, visitor)

    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("secret detail")

    with caplog.at_level(logging.ERROR):
        monkeypatch.setattr("lostreg.demo.page.draw_objects", fail)
        told = [page.redraw(visitor, *VIEW)[1], run(page, visitor)[1]]
        monkeypatch.setattr("lostreg.demo.page.draw_attention", fail)
        told.append(page.attend(visitor, *OPTIONS)[1])
        monkeypatch.setattr(page.models, "get", fail)
        told.append(page.choose_backbone(SECOND, progress=silent)[-1])
    for text in told:
        assert "Something unexpected" in text
        assert "secret detail" not in text
        assert "Traceback" not in text
    assert caplog.text.count("ZeroDivisionError: secret detail") == 4


def test_files_that_browsers_cannot_show_are_shown_as_they_were_read(page: Page, uploads: Path, photo: Path) -> None:
    turned = Image.Exif()
    turned[274] = 6
    Image.open(photo).save(uploads / "turned.tif", exif=turned)
    *_, preview = run(page, page.receive(file_data(uploads / "turned.tif"), None))
    assert preview.shape == (150, 110, 3)


def test_kinds_of_photos_are_read_by_lostreg_and_not_by_gradio(page: Page, uploads: Path, photo: Path) -> None:
    whole = Image.open(photo)
    whole.convert("CMYK").save(uploads / "cmyk.jpg")
    whole.convert("I;16").save(uploads / "deep.png")
    whole.save(uploads / "phone.mpo", format="MPO")
    for name in ("cmyk.jpg", "deep.png", "phone.mpo"):
        visitor = page.receive(file_data(uploads / name), None)
        assert run(page, visitor)[2] is not None, name
        assert visitor.found is not None
        assert (visitor.found.width, visitor.found.height) == (150, 110)


def test_another_backbone_brings_its_own_options(page: Page) -> None:
    backbone, feature, layer, registers, told = page.choose_backbone(NO_TOKEN, progress=silent)
    assert "image-text (SigLIP 2)" in backbone["info"]  # what it learned from is told
    assert feature == "v"
    assert layer["choices"] == [("1 (last)", 1), ("0", 0)]
    assert registers["visible"] is False
    assert is_skipped(told)
    registers = page.choose_backbone(FIRST, progress=silent)[3]
    assert (registers["visible"], registers["value"]) == (True, 2)
    assert "backbone must be one of" in page.choose_backbone("dino_vits8", progress=silent)[-1]


def test_registers_of_another_backbone_are_not_asked_for(page: Page, visitor: Visitor) -> None:
    told = run(page, visitor, SECOND, "k", -1, 2)[1]  # what the hidden field still says
    assert "did not work" not in told
    assert visitor.study is not None
    assert visitor.study.discoverer.backbone.registers is None
    run(page, visitor, FIRST, "k", -1, 2)
    assert visitor.study.discoverer.backbone.registers is not None


def test_a_list_with_nothing_chosen_is_told(page: Page, visitor: Visitor, caplog: pytest.LogCaptureFixture) -> None:
    assert "expected a layer" in run(page, visitor, FIRST, "k", None, 0)[1]
    assert "did not work" in run(page, visitor, None, None, -1, 0)[1]
    assert caplog.records == []


def test_attention_is_drawn_once_the_answer_is_there(page: Page, visitor: Visitor) -> None:
    assert page.attend(visitor, *OPTIONS)[0] is None
    picture = run(page, visitor)[2]
    panel, caption = page.attend(visitor, *OPTIONS)
    assert panel.shape == picture.shape
    assert "Attention of CLS" in caption
    run(page, visitor, NO_TOKEN, "v", -1, 0)
    panel, caption = page.attend(visitor, NO_TOKEN, "v", -1, 0)
    assert panel is None
    assert "no CLS" in caption


def test_a_photo_that_is_taken_away_leaves_an_empty_page(page: Page, visitor: Visitor) -> None:
    run(page, visitor)
    state, told, picture, *_ = page.forget(visitor)
    assert state.photo is None
    assert "Drop a photo" in told
    assert picture is None
    assert run(page, visitor)[2] is None


def test_all_work_on_the_model_stands_in_one_line_and_nothing_is_offered_as_an_api(page: Page) -> None:
    functions = page.blocks.fns.values()
    assert {fn.api_visibility for fn in functions} == {"private"}
    for fn in functions:
        if fn.name in ("run", "redraw", "redraw_by_hand", "attend", "choose_backbone"):
            assert (fn.concurrency_id, fn.concurrency_limit) == ("model", 1)
    names = [fn.name for fn in functions]
    assert {"run", "redraw", "redraw_by_hand", "attend", "choose_backbone", "receive", "forget"} <= set(names)
