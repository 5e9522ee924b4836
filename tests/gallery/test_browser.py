"""The page in a browser."""

import itertools
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import console_errors, needs_browser, open_browser
from fabricate_run import GRID, HEIGHT, PATCH, TRUTH, WIDTH, predict, write_lines, write_run
from pycocotools import mask as coco

from lostreg.cli.main import main
from lostreg.gallery.build import write_gallery
from lostreg.runs.reader import RunFolder

pytest.importorskip("selenium")

from selenium.webdriver import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

pytestmark = needs_browser

COUNT = 12
NASTY = "</script><script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\"> \udce9.jpg"
SEVERAL = {
    "boxes": [[40, 20, 92, 88], [5, 5, 30, 40], [100, 70, 149, 109]],
    "scores": [0.6, 0.3, 0.1],
    "seeds": [[2, 4], [1, 0], [7, 10]],
}
WHY = {
    "candidates": [
        [100, 70, 140, 105, 0.7],
        [102, 70, 140, 105, 0.655],
        [40, 20, 90, 80.5, 0],
    ],  # the box, one alike, another
    "objectness": np.arange(GRID[0] * GRID[1], dtype=np.uint8).reshape(GRID)[::-1] + 168,
}


def mask_of(columns: slice) -> dict[str, Any]:
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    pixels[20:80, columns] = 1
    found = coco.encode(pixels)
    return {"size": list(found["size"]), "counts": found["counts"].decode()}


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    driver = open_browser(tmp_path_factory.mktemp("browser"))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run with ground truth: even numbers are hits; the second image has masks, the third three boxes."""
    place = tmp_path_factory.mktemp("judged")
    names = [f"trip {number % 3}/{number}.jpg" for number in range(COUNT)]
    names[5] = NASTY
    changes = {1: {"masks": [mask_of(slice(30, 90))]}, 2: SEVERAL}
    run = write_run(place / "run", names, truth=TRUTH, changes=changes, maps_changes={1: WHY})
    (place / "photos/im0011.jpg").unlink()
    return write(run)


def write(run: Path) -> str:
    write_gallery(RunFolder(run), run / "report.html")
    return (run / "report.html").as_uri()


@pytest.fixture
def page(driver: Any, address: str) -> Iterator[Any]:
    """The page as it opens; a test that leaves errors in the console fails."""
    driver.get("about:blank")
    driver.get(address)
    yield driver
    assert console_errors(driver) == []


def find(driver: Any, selector: str) -> list[Any]:
    found: list[Any] = driver.find_elements("css selector", selector)
    return found


def numbers(driver: Any) -> list[int]:
    """What the grid shows, in order."""
    script = "return [...document.querySelectorAll('#grid li')].map((card) => Number(card.dataset.number))"
    found: list[int] = driver.execute_script(script)
    return found


def choose(driver: Any, name: str, value: str) -> None:
    """As a person would, with the events that a browser sends."""
    script = (
        "const control = document.getElementById(arguments[0]); control.value = arguments[1];"
        "control.dispatchEvent(new Event('input', { bubbles: true }))"
    )
    driver.execute_script(script, name, value)


def press(driver: Any, key: str) -> None:
    type_keys(driver, getattr(Keys, key))


def type_keys(driver: Any, *keys: str) -> None:
    for key in keys:
        ActionChains(driver).send_keys(key).perform()


def until(driver: Any, script: str) -> Any:
    return WebDriverWait(driver, 60).until(lambda _: driver.execute_script(f"return {script}"))


def is_open(driver: Any) -> bool:
    return bool(driver.execute_script("return document.getElementById('view').open"))


def attributes(elements: list[Any], *names: str) -> list[list[float]]:
    return [[float(element.get_attribute(name)) for name in names] for element in elements]


def test_the_page_opens_with_every_image(page: Any) -> None:
    assert numbers(page) == list(range(1, COUNT + 1))
    assert page.title == "run - lostreg report"
    until(
        page, "[...document.querySelectorAll('#grid img')].filter((image) => image.naturalWidth === 150).length === 11"
    )
    assert find(page, "#count")[0].text == "12 images"
    assert attributes(find(page, "#grid li:nth-child(1) .box"), "x", "y", "width", "height") == [[40, 20, 52, 68]]
    assert len(find(page, "#grid li:nth-child(3) .box")) == 3
    assert "im0011.jpg: no such file" in find(page, "#grid li:last-child")[0].text
    assert find(page, "#gone")[0].text == "1 of 12 image files could not be read any more."
    texts = [image.get_attribute("alt") for image in find(page, "#grid img")]
    assert texts[0] == "trip 0/0.jpg, 1 box, score 0.00, hit"
    assert texts[2] == "trip 2/2.jpg, 3 boxes, score 0.60, hit"


def test_names_are_text(page: Any) -> None:
    shown = NASTY.encode("utf-8", "backslashreplace").decode()
    assert find(page, "#grid li:nth-child(6) bdi")[0].get_attribute("textContent") == shown
    find(page, "#grid li:nth-child(6) .card")[0].click()
    assert find(page, "#view-name bdi")[0].get_attribute("textContent") == shown
    assert page.title == "run - lostreg report"


def test_images_are_sorted(page: Any) -> None:
    scores = {number + 1: (number * 37 % 101) / 100 for number in range(COUNT)} | {3: 0.6}
    for order, expected in (
        ("high", sorted(scores, key=lambda number: -scores[number])),
        ("low", sorted(scores, key=lambda number: scores[number])),
        ("run", sorted(scores)),
    ):
        choose(page, "sort", order)
        assert numbers(page) == expected
    choose(page, "sort", "name")
    names = [name.get_attribute("textContent") for name in find(page, "#grid bdi") if "script" not in name.text]
    assert [name for name in names if name.startswith("trip")] == [
        f"trip {trip}/{number}.jpg"
        for trip in range(3)
        for number in range(COUNT)
        if number % 3 == trip and number != 5
    ]


def test_images_are_filtered(page: Any) -> None:
    choose(page, "verdict", "hit")
    assert numbers(page) == [1, 3, 5, 7, 9, 11]
    choose(page, "verdict", "miss")
    assert numbers(page) == [2, 4, 6, 8, 10, 12]
    choose(page, "clearness", "unclear")
    assert numbers(page) == [4, 12]  # scores 0.10 and 0.03
    choose(page, "least", "0.4")
    assert numbers(page) == [2, 4, 10, 12]  # 0.37 and 0.30 too
    assert find(page, "#least-shown")[0].text == "0.40"
    choose(page, "clearness", "clear")
    assert numbers(page) == [6, 8]
    choose(page, "clearness", "any")
    choose(page, "verdict", "all")
    choose(page, "find", "TRIP 1/")
    assert numbers(page) == [2, 5, 8, 11]
    assert find(page, "#count")[0].text == "4 of 12 images"
    choose(page, "find", "nowhere")
    assert numbers(page) == []
    find(page, "#reset")[0].click()
    assert numbers(page) == list(range(1, COUNT + 1))


def test_a_click_opens_the_large_view(page: Any) -> None:
    find(page, "#grid li:nth-child(3) .card")[0].click()
    assert is_open(page)
    assert page.current_url.endswith("#3")
    assert find(page, "#view-name")[0].text.split() == ["trip", "2/2.jpg", "hit"]
    boxes = attributes(find(page, "#photo rect.box"), "x", "y", "width", "height")
    assert boxes == [[x, y, right - x, bottom - y] for x, y, right, bottom in reversed(SEVERAL["boxes"])]
    assert attributes(find(page, "#photo .first .box"), "x", "y") == [[40, 20]]
    assert [text.get_attribute("textContent") for text in find(page, "#photo text")] == ["3", "2", "1"]
    truth = attributes(find(page, "#photo .truth rect:not(.halo)"), "x", "y", "width", "height")
    assert truth == [[40, 20, 50, 70]]
    seeds = attributes(find(page, "#photo .seeds rect"), "x", "y", "width", "height")
    right = 10 * PATCH
    assert seeds == [[56, 28, 14, 14], [0, 14, 14, 14], [right, 98, WIDTH - right, HEIGHT - 98]]
    until(page, "document.querySelector('#photo img').naturalWidth === 150")
    rows = [row.text for row in find(page, "#boxes tbody tr")]
    words = ["1", "✕", "reject✓", "keep", "0.60", "40,", "20,", "92,", "88", "21", "%", f"{3400 / 3636:.2f}"]
    assert rows[0].split() == words
    assert len(rows) == 3


def test_the_degree_map_lies_over_its_patches(page: Any) -> None:
    find(page, "#grid li:nth-child(1) .card")[0].click()
    script = (
        "const canvas = document.querySelector('#degrees canvas');"
        "const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;"
        "const frame = document.querySelector('#degrees .panel').getBoundingClientRect();"
        "const own = canvas.getBoundingClientRect();"
        "return [canvas.width, canvas.height, [...data], own.width / frame.width, own.height / frame.height]"
    )
    width, height, data, wide, high = page.execute_script(script)
    assert (height, width) == GRID
    pixels = np.array(data).reshape(height * width, 4)
    assert pixels[0].tolist() == [68, 10, 85, 255]
    assert pixels[-1].tolist() == [253, 231, 37, 255]
    brightness = pixels[:, :3] @ [0.299, 0.587, 0.114]
    assert (np.diff(brightness) > 0).mean() > 0.95  # degrees rise from patch to patch
    assert wide == pytest.approx(GRID[1] * PATCH / WIDTH, abs=0.01)
    assert high == pytest.approx(GRID[0] * PATCH / HEIGHT, abs=0.01)
    assert find(page, "#degrees .lowest")[0].text == "degree 0, object-like"
    assert find(page, "#degrees .highest")[0].text == "87 of 87"
    assert len(find(page, "#degrees .seeds rect")) == 1


def test_candidates_and_what_was_taught_say_why_a_box_was_chosen(page: Any) -> None:
    find(page, "#grid li:nth-child(2) .card")[0].click()
    rows = find(page, "#boxes .candidates tr")
    assert not any(row.is_displayed() for row in rows)  # until they are asked for
    find(page, "[data-layer=candidates]")[0].click()
    assert [row.text for row in rows] == [
        "candidate, like box 1 0.66 102, 70, 140, 105 8 % 0.00",
        "candidate 0.00 40, 20, 90, 81 18 % 0.86",
    ]
    for panel in ("photo", "objectness"):
        drawn = attributes(find(page, f"#{panel} .candidates rect:last-child"), "x", "y", "width", "height")
        assert drawn == [[100, 70, 40, 35], [102, 70, 38, 35], [40, 20, 50, 60.5]]
    script = (
        "const edge = document.querySelector('#photo .candidates g:last-child rect').getBoundingClientRect();"
        "return document.elementFromPoint(edge.left + edge.width / 2, edge.bottom).parentNode.textContent"
    )
    assert page.execute_script(script) == "candidate, score 0.00"  # told beneath the pointer
    script = (
        "const canvas = document.querySelector('#objectness canvas');"
        "return [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data]"
    )
    pixels = np.array(page.execute_script(script)).reshape(*GRID, 4)
    assert pixels[0, -1].tolist() == [253, 231, 37, 255]
    assert pixels[-1, 0].tolist() != [68, 10, 85, 255]  # two thirds, though the lowest of this image
    press(page, "ARROW_RIGHT")
    assert not find(page, "#objectness")[0].is_displayed()
    assert not find(page, "[data-layer=candidates]")[0].is_displayed()


def test_a_mask_is_laid_over_the_picture(page: Any) -> None:
    find(page, "#grid li:nth-child(2) .card")[0].click()
    script = (
        "const canvas = document.querySelector('#photo canvas.mask');"
        "const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;"
        "return [canvas.width, canvas.height, [...data].filter((_, index) => index % 4 === 3)]"
    )
    width, height, alpha = page.execute_script(script)
    expected = np.zeros((HEIGHT, WIDTH), bool)
    expected[20:80, 30:90] = True
    assert np.array_equal(np.array(alpha).reshape(height, width) > 0, expected)


def test_layers_are_turned_off_and_stay_off(page: Any) -> None:
    find(page, "#grid li:nth-child(2) .card")[0].click()
    layers = {label.get_attribute("data-layer"): label for label in find(page, ".layers label")}
    drawn = {
        "boxes": "#photo .boxes .box",
        "truth": "#photo .truth rect",
        "seeds": "#photo .seeds rect",
        "masks": "#photo canvas.mask",
        "degrees": "#degrees canvas",
        "candidates": "#photo .candidates rect",
        "objectness": "#objectness canvas",
    }
    assert layers.keys() == drawn.keys()
    layers["candidates"].click()
    for layer, selector in drawn.items():
        assert find(page, selector)[0].is_displayed(), layer
        layers[layer].click()
        assert not find(page, selector)[0].is_displayed(), layer
    press(page, "ARROW_RIGHT")
    assert not any(element.is_displayed() for selector in drawn.values() for element in find(page, selector))
    assert not layers["masks"].is_displayed()  # the next image has none
    assert layers["boxes"].is_displayed()


def test_keys_lead_through_what_is_shown(page: Any) -> None:
    choose(page, "verdict", "hit")
    choose(page, "sort", "high")
    order = numbers(page)
    card = find(page, "#grid li:nth-child(1) .card")[0]
    page.execute_script("arguments[0].focus()", card)
    press(page, "ENTER")
    for expected in itertools.chain(order, order[:1]):
        assert page.current_url.endswith(f"#{expected}")
        press(page, "ARROW_RIGHT")
    for expected in (order[0], order[-1]):  # from the second one, around the end
        press(page, "ARROW_LEFT")
        assert page.current_url.endswith(f"#{expected}")
    assert find(page, "#view-place")[0].text == "6 of 6"
    press(page, "ESCAPE")
    until(page, f"document.activeElement.parentElement.dataset.number === '{order[-1]}'")
    assert not is_open(page)
    assert "#" not in page.current_url


def saved(driver: Any, folder: Path) -> dict[str, Any]:
    """The file of decisions that a click on Save downloads."""
    driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(folder)})
    find(driver, "#save")[0].click()
    WebDriverWait(driver, 60).until(lambda _: (folder / "decisions.json").is_file())
    found: dict[str, Any] = json.loads((folder / "decisions.json").read_text())
    return found


def loaded(driver: Any, file: Path) -> str:
    """What the page says of a file of decisions that it is given."""
    find(driver, "#file")[0].send_keys(str(file))
    until(driver, f"document.querySelector('#loaded').textContent.startsWith('{file.name}')")
    told: str = find(driver, "#loaded")[0].text
    return told


def tallies(driver: Any) -> dict[int, str]:
    script = (
        "return [...document.querySelectorAll('#grid li')]"
        ".map((card) => [card.dataset.number, card.querySelector('.tally').textContent])"
    )
    return {int(number): text for number, text in driver.execute_script(script) if text}


def test_boxes_are_rejected_and_kept_by_key_and_export_honours_what_is_saved(
    driver: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["a.jpg", 17, NASTY, "caf\udce9.jpg"]
    run = write_run(tmp_path / "judged run", names, changes={2: SEVERAL})
    address = write(run)
    driver.get(address)
    assert not find(driver, "#save")[0].is_enabled()
    driver.execute_script("document.querySelector('#grid li:nth-child(1) .card').focus()")
    type_keys(driver, "x", Keys.ARROW_RIGHT, "k", Keys.ARROW_RIGHT, "x")
    assert tallies(driver) == {1: "1 rejected", 2: "1 kept", 3: "3 rejected"}
    focused = "return document.activeElement.getAttribute('aria-label')"
    assert "score 0.60, 3 rejected" in driver.execute_script(focused)
    type_keys(driver, "u", Keys.ENTER)
    assert is_open(driver)
    type_keys(driver, Keys.ARROW_DOWN, "x", Keys.ARROW_DOWN, "k")
    assert find(driver, "#told")[0].text == "box 1 undecided, box 2 rejected, box 3 kept"
    pressed = [button.get_attribute("aria-pressed") for button in find(driver, "#boxes button")]
    assert pressed == ["false", "false", "true", "false", "false", "true"]
    assert find(driver, "#boxes tr.selected th")[0].text == "3"
    find(driver, "#boxes button[value=reject]")[0].click()
    type_keys(driver, "u", Keys.ARROW_RIGHT, "X", Keys.ESCAPE)
    expected = {1: "1 rejected", 2: "1 kept", 3: "1 rejected, 1 kept", 4: "1 rejected"}
    assert tallies(driver) == expected
    assert find(driver, "#decided")[0].text == "3 rejected, 2 kept"
    choose(driver, "decision", "open")
    assert numbers(driver) == [3]
    choose(driver, "decision", "keep")
    assert numbers(driver) == [2, 3]
    driver.get("about:blank")
    driver.get(write(run))  # the page made anew knows them
    assert tallies(driver) == expected
    until(driver, "document.querySelector('#grid li:nth-child(1) .reject path.box')")
    decisions = saved(driver, tmp_path)
    assert (decisions["format"], decisions["run"]) == ("lostreg decisions 1", "judged run")
    assert [one["image_id"] for one in decisions["images"]] == names
    capsys.readouterr()
    command = f"export '{run}' --format csv --out {tmp_path}/boxes.csv --decisions {tmp_path}/decisions.json"
    assert main(shlex.split(command)) == 0
    assert "exported 4 images, 3 boxes" in capsys.readouterr().out
    find(driver, "#forget")[0].click()
    driver.switch_to.alert.accept()
    assert tallies(driver) == {}
    assert loaded(driver, tmp_path / "decisions.json").endswith(": decisions on 4 images")
    assert tallies(driver) == expected
    assert find(driver, "#decided")[0].text == "3 rejected, 2 kept"
    assert loaded(driver, run / "predictions.jsonl").endswith(": no file of decisions that this page saves")
    assert tallies(driver) == expected
    assert console_errors(driver) == []


def test_decisions_on_other_boxes_are_forgotten_and_those_beyond_the_page_kept(driver: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path / "changed", ["a", "b", "c"])
    driver.get(write(run))
    driver.execute_script("document.querySelector('#grid li:nth-child(1) .card').focus()")
    type_keys(driver, "x", Keys.ARROW_RIGHT, "x", Keys.ARROW_RIGHT, "k")
    write_lines(run / "predictions.jsonl", [predict("a"), predict("b", boxes=[[1, 2, 3, 4]]), predict("c", 2)])
    write_gallery(RunFolder(run), run / "report.html", limit=2)
    driver.get("about:blank")
    driver.get((run / "report.html").as_uri())
    assert tallies(driver) == {1: "1 rejected"}
    decisions = saved(driver, tmp_path)
    assert [(one["image_id"], one["decisions"]) for one in decisions["images"]] == [("a", ["reject"]), ("c", ["keep"])]
    find(driver, "#forget")[0].click()
    driver.switch_to.alert.accept()
    assert find(driver, "#decided")[0].text == "0 rejected, 0 kept"
    assert not find(driver, "#save")[0].is_enabled()
    decisions["images"].append({"image_id": "b", "fingerprint": "0" * 16, "decisions": ["keep"]})
    (tmp_path / "others.json").write_text(json.dumps(decisions))
    told = "decisions on 1 image; left out, because boxes are others by now: 1 image; not on this page: 1 image"
    assert loaded(driver, tmp_path / "others.json") == f"others.json: {told}"
    assert find(driver, "#decided")[0].text == "1 rejected, 1 kept"  # that of the image beyond the page, too
    for name, images, told in (
        (
            "none",
            [{**decisions["images"][0], "image_id": "z"}],
            "on none of the images of this page, so nothing is taken",
        ),
        ("odd", [{**decisions["images"][0], "decisions": "x"}], "no file of decisions that this page saves"),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps({**decisions, "images": images}))
        assert loaded(driver, tmp_path / f"{name}.json") == f"{name}.json: {told}"
        assert find(driver, "#decided")[0].text == "1 rejected, 1 kept"
    assert console_errors(driver) == []


def test_an_address_opens_its_image(page: Any, address: str) -> None:
    page.get("about:blank")
    page.get(f"{address}#4")
    assert is_open(page)
    assert find(page, "#view-name bdi")[0].text == "trip 0/3.jpg"
    page.execute_script("location.hash = '#12'")
    until(page, "document.querySelector('#view-note').textContent === 'im0011.jpg: no such file'")
    assert find(page, "#photo .box")
    assert not find(page, "#photo img")
    page.execute_script("location.hash = ''")
    until(page, "!document.getElementById('view').open")
    page.get("about:blank")
    page.get(f"{address}#99")
    assert not is_open(page)


@pytest.mark.parametrize("width", [360, 640])
def test_narrow_windows_need_no_scrolling_sideways(page: Any, width: int) -> None:
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    )
    try:
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
        find(page, "#grid li:nth-child(3) .card")[0].click()
        assert page.execute_script(
            "const view = document.getElementById('view'); return view.scrollWidth <= view.clientWidth"
        )
        photo, degrees = (find(page, f"#{name} .panel")[0].rect for name in ("photo", "degrees"))
        assert degrees["y"] >= photo["y"] + photo["height"]
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_dark_and_light_are_as_the_reader_has_them(page: Any) -> None:
    colours = []
    for scheme in ("light", "dark"):
        features = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", features)
        colours.append(page.execute_script("return getComputedStyle(document.body).backgroundColor"))
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert colours == ["rgb(255, 255, 255)", "rgb(20, 22, 26)"]


def test_without_ground_truth_nothing_is_judged(driver: Any, tmp_path: Path) -> None:
    driver.get(write(write_run(tmp_path / "run", ["a", "b"])))
    assert not find(driver, "#verdict")[0].is_displayed()
    find(driver, "#grid li:nth-child(1) .card")[0].click()
    assert not find(driver, "#boxes .judged")[0].is_displayed()
    assert not find(driver, "[data-layer=truth]")[0].is_displayed()
    assert find(driver, "#view-name")[0].text == "a no clear object"
    assert console_errors(driver) == []


def test_a_thousand_images_are_decoded_where_somebody_looks(driver: Any, tmp_path: Path) -> None:
    driver.get(write(write_run(tmp_path / "run", [f"{number:04}.jpg" for number in range(1000)])))
    assert numbers(driver) == list(range(1, 1001))
    until(driver, "document.querySelector('#grid li:nth-child(1) img')?.complete")
    assert 0 < len(find(driver, "#grid img")) < 200
    assert not find(driver, "#grid li:last-child img")
    driver.execute_script("document.querySelector('#grid li:last-child').scrollIntoView()")
    until(driver, "document.querySelector('#grid li:last-child img')?.naturalWidth === 150")
    until(driver, "!document.querySelector('#grid li:nth-child(1) img')")  # let go of what is far away
    assert len(find(driver, "#grid img")) < 200
    find(driver, "#grid li:last-child .card")[0].click()
    assert find(driver, "#view-name bdi")[0].text == "0999.jpg"
    assert console_errors(driver) == []
