"""The demo as a visitor meets it, in a headless browser."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("gradio")

from browser import console_errors, needs_browser, open_browser
from serving import SECOND, served

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

pytestmark = [needs_browser, pytest.mark.usefixtures("one_thread")]
PATIENCE = 60


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with served() as address:
        yield address


@pytest.fixture
def photos(repository: Path) -> list[Path]:
    return sorted((repository / "datasets" / "sample").rglob("*.jpg"))


class Tab:
    """One visitor's browser."""

    def __init__(self, folder: Path, address: str) -> None:
        self.driver: Chrome = open_browser(folder)
        self.address = address

    def __enter__(self) -> "Tab":
        self.driver.get(self.address)
        self.until("return document.querySelector('#photo input[type=file]') !== null")
        return self

    def __exit__(self, *_: object) -> None:
        self.driver.quit()

    def until(self, script: str, *arguments: object) -> None:
        """Wait until a script's answer is true."""
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, PATIENCE, 0.1).until(lambda driver: driver.execute_script(script, *arguments))

    def text(self, place: str) -> str:
        return str(self.driver.execute_script("return document.querySelector(arguments[0])?.innerText || ''", place))

    def source(self, place: str) -> str:
        return str(self.driver.execute_script("return document.querySelector(arguments[0] + ' img')?.src || ''", place))

    def drop(self, photo: Path) -> None:
        """Send a photo, after taking away the one that is there."""
        from selenium.webdriver.common.by import By

        for button in self.driver.find_elements(By.CSS_SELECTOR, "#photo button[aria-label='Remove Image']"):
            button.click()
            self.until("return document.querySelector('#told').innerText.includes('Drop a photo')")
        self.driver.find_element(By.CSS_SELECTOR, "#photo input[type=file]").send_keys(str(photo))

    def answer(self) -> str:
        """The table of boxes, once everything is shown."""
        self.until("return document.querySelectorAll('#boxes td').length > 0")
        self.until("return document.querySelector('#attention img')?.complete")
        return self.text("#boxes")

    def slide(self, times: int) -> None:
        from selenium.webdriver.common.by import By
        from selenium.webdriver.common.keys import Keys

        self.driver.find_element(By.CSS_SELECTOR, "#bias input[type=range]").send_keys(Keys.ARROW_RIGHT * times)

    def shown(self, script: str) -> list[str]:
        return list(self.driver.execute_script(script))


RESOURCES = "return performance.getEntriesByType('resource').map(entry => entry.name)"


def test_a_photo_is_dropped_answered_and_redrawn(address: str, photos: list[Path], tmp_path: Path) -> None:
    with Tab(tmp_path, address) as tab:
        assert "Drop a photo to begin" in tab.text("#told")
        tab.drop(photos[0])
        tab.answer()
        assert re.search(r"object|score", tab.text("#told"))
        choose(tab, "#method", "LOST: ")
        tab.until("return document.querySelector('#told').innerText.includes('Method: LOST')")
        table, before = tab.text("#boxes"), tab.source("#picture")
        tab.slide(30)
        tab.until("return document.querySelector('#picture img').src !== arguments[0]", before)
        tab.until("return document.querySelector('#boxes').innerText !== arguments[0]", table)
        tab.until("return !document.querySelector('#automatic input').checked")
        assert console_errors(tab.driver) == []
        elsewhere = [
            name for name in tab.shown(RESOURCES) if not name.startswith((address + "/", "data:", f"blob:{address}"))
        ]
        assert elsewhere == []


def choose(tab: Tab, place: str, words: str) -> None:
    """Pick from a list, by what is read there."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    tab.driver.execute_script("document.querySelector(arguments[0]).scrollIntoView()", place)
    tab.driver.find_element(By.CSS_SELECTOR, f"{place} input").click()
    tab.until("return document.querySelectorAll('[role=option]').length > 1")
    # They have no text as long as the list fades in.
    named = WebDriverWait(tab.driver, PATIENCE, 0.1).until(
        lambda driver: [one for one in driver.find_elements(By.CSS_SELECTOR, "[role=option]") if words in one.text]
    )
    named[0].click()


def test_an_example_is_a_photo_like_any_other(photos: list[Path], tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By

    with served(examples=tuple(photos[:2])) as address, Tab(tmp_path, address) as tab:
        buttons = tab.driver.find_elements(By.CSS_SELECTOR, "#examples button")
        assert [button.text for button in buttons] == [photo.stem for photo in photos[:2]]
        for button in buttons:
            before = tab.source("#picture")
            button.click()
            tab.until("return (document.querySelector('#picture img')?.src || '') !== arguments[0]", before)
            tab.answer()
            tab.until("return document.querySelector('#photo img')?.naturalWidth > 0")
        assert console_errors(tab.driver) == []


def test_methods_are_chosen_and_offer_the_controls_that_they_know(
    address: str, photos: list[Path], tmp_path: Path
) -> None:
    usable = "return !document.querySelector(arguments[0] + ' input').disabled"
    with Tab(tmp_path, address) as tab:
        tab.drop(photos[0])
        tab.answer()
        assert "Method: parts" in tab.text("#told")
        for words, told, has_bias, has_several in (
            ("DINO-seg", "Method: DINO-seg", False, False),
            ("MaskCut", "cut", False, True),
            ("LOST", "Method: LOST", True, True),
        ):
            choose(tab, "#method", words)
            tab.until("return document.querySelector('#told').innerText.includes(arguments[0])", told)
            tab.until(f"{usable} === arguments[1]", "#automatic", has_bias)
            assert tab.driver.execute_script(usable, "#bias") is has_bias
            assert tab.driver.execute_script(usable, "#objects") is has_several
        assert console_errors(tab.driver) == []


def test_a_broken_file_is_told_in_words_and_the_next_photo_works(
    address: str, photos: list[Path], tmp_path: Path
) -> None:
    broken = tmp_path / "holiday.jpg"
    broken.write_bytes(photos[0].read_bytes()[:200])
    with Tab(tmp_path, address) as tab:
        tab.drop(broken)
        tab.until("return document.querySelector('#told').innerText.includes('That did not work')")
        told = tab.text("body")
        assert "holiday.jpg: not a readable image" in told
        assert "Traceback" not in told
        assert "lostreg-demo-" not in told
        assert tab.text("#boxes") == ""
        tab.until("return document.querySelector('#photo img') === null")  # room for another
        tab.drop(photos[1])
        assert tab.answer()


def test_why_a_file_was_not_taken_is_told_and_the_next_photo_works(photos: list[Path], tmp_path: Path) -> None:
    (tmp_path / "large.jpg").write_bytes(bytes((1 << 20) + 1))
    (tmp_path / "notes.txt").write_text("no photo")
    with served(max_upload_mb=1) as address, Tab(tmp_path, address) as tab:
        for name, told in (("notes.txt", "Invalid file type"), ("large.jpg", "exceed the maximum allowed size")):
            tab.drop(tmp_path / name)
            tab.until("return document.body.innerText.includes(arguments[0])", told)
        full = Path(os.environ["GRADIO_TEMP_DIR"]) / "full"
        full.touch()
        os.truncate(full, 100 << 20)
        tab.drop(photos[0])
        tab.until("return document.querySelector('#told').innerText.includes('There is no room for more photos')")
        full.unlink()
        tab.drop(photos[0])
        assert tab.answer()
        assert "no room" not in tab.text("#told")


def test_two_visitors_get_their_own_answers(address: str, photos: list[Path], tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
    with Tab(folders[0], address) as first, Tab(folders[1], address) as second:
        first.drop(photos[0])
        second.drop(photos[1])  # while the first waits
        answers = [first.answer(), second.answer()]
        assert first.source("#picture") != second.source("#picture")
        first.slide(30)
        first.until("return document.querySelector('#boxes').innerText !== arguments[0]", answers[0])
        assert second.text("#boxes") == answers[1]


def test_another_backbone_is_chosen_and_answers(address: str, photos: list[Path], tmp_path: Path) -> None:
    with Tab(tmp_path, address) as tab:
        tab.drop(photos[0])
        tab.answer()
        before = tab.source("#degrees")
        choose(tab, "#backbone", SECOND)
        tab.until("return document.querySelector('#degrees img').src !== arguments[0]", before)
        assert "did not work" not in tab.text("#told")
        assert console_errors(tab.driver) == []
