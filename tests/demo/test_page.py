"""What the page's callbacks answer, called as Gradio calls them."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio")

import gradio as gr
from fabricate import png_header
from PIL import Image
from serving import FIRST, NEURONS, NO_TOKEN, SECOND, small_models

from lostreg.demo.page import Page
from lostreg.demo.session import Visitor
from lostreg.errors import ImageError
from lostreg.inference.jobs import FeaturesJob

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = (FIRST, "k", -1, 0)
VIEW = (True, 0.0, 1, "patches", False)


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


def is_skipped(update: Any) -> bool:
    return update == gr.skip()


@pytest.fixture
def visitor(page: Page, uploads: Path, photo: Path) -> Visitor:
    sent = uploads / "photo.jpg"
    sent.write_bytes(photo.read_bytes())
    return page.receive(file_data(sent, "my photo.jpg"), None)


def test_a_photo_is_answered_with_words_pictures_boxes_and_the_chosen_bias(page: Page, visitor: Visitor) -> None:
    state, told, picture, degrees, table, text, bias, photo = run(page, visitor)
    assert state is visitor
    assert "object" in told
    assert picture.shape == degrees.shape == (469, 640, 3)
    assert table.count("<tr>") == 2
    assert '"my photo.jpg"' in text
    assert -1 <= bias <= 1
    assert is_skipped(photo)


def test_the_slider_redraws_without_a_forward_and_takes_over_from_auto(
    page: Page, visitor: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(page, visitor)

    def refuse(*_: Any) -> None:
        raise AssertionError("a forward")

    monkeypatch.setattr(FeaturesJob, "forward", refuse)
    seen = {first[4]}
    for bias in (-0.95, -0.5, 0.0, 0.5):
        *answer, automatic = page.redraw_by_hand(visitor, bias, 1, "patches")
        assert automatic is False
        assert answer[0] is visitor
        assert visitor.found is not None
        assert visitor.found.bias == pytest.approx(bias)
        seen.add(answer[4])
    assert len(seen) > 1
    assert page.redraw(visitor, *VIEW)[4] == first[4]


def test_several_objects_and_refined_masks_are_asked_for(page: Page, visitor: Visitor) -> None:
    run(page, visitor, view=(False, -0.9, 1, "patches", False))
    assert visitor.found is not None
    assert visitor.found.refined is None
    page.redraw(visitor, False, -0.9, 5, "refined", False)
    assert visitor.found.refined is not None


def test_candidates_are_drawn_where_they_are_asked_for(page: Page, visitor: Visitor) -> None:
    plain, shown = run(page, visitor), run(page, visitor, view=(*VIEW[:-1], True))
    assert visitor.found is not None
    assert visitor.found.candidates is not None
    assert f"Of its {len(visitor.found.candidates)} best candidates" in plain[1]
    assert (plain[2] != shown[2]).any()
    assert plain[4:6] == shown[4:6]
    assert "LOST with the bias -0.90" in page.redraw_by_hand(visitor, -0.9, 1, "patches")[1]


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
    _, told, picture, degrees, table, text, _, photo = run(page, visitor)
    assert "&lt;b&gt;beach.jpg: not a readable image" in told
    assert str(uploads) not in told
    assert (picture, degrees, table, text, photo) == (None, None, "", "", None)
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
