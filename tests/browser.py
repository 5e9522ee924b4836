"""A headless Chromium for tests of pages."""

import importlib.util
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

_CHROMIUM: Final = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_DRIVER: Final = shutil.which("chromedriver")
_SWITCHES: Final = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1280,900",
)


def _lacking() -> list[str]:
    parts = {"Chromium": _CHROMIUM, "chromedriver": _DRIVER, "selenium": importlib.util.find_spec("selenium")}
    return [name for name, found in parts.items() if not found]


needs_browser = pytest.mark.skipif(bool(_lacking()), reason=f"needs a browser: no {', '.join(_lacking())} installed")


def open_browser(tmp_path: Path, width: int = 1280, height: int = 900) -> "Chrome":
    """A browser with a profile of its own; the caller quits it.

    Args:
        tmp_path: an empty folder that may be filled.
        width: of the window, in pixels.
        height: of the window, in pixels.
    """
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(_CHROMIUM)
    for switch in (*_SWITCHES, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # Through no proxy that the machine may have: pages are files, or served by the test itself.
    options.add_argument("--proxy-server=direct://")
    driver = webdriver.Chrome(options=options, service=Service(str(_DRIVER)))
    driver.set_window_size(width, height)
    driver.set_page_load_timeout(120)
    return driver


def console_errors(driver: "Chrome") -> list[str]:
    """What went wrong on the pages opened so far, by the browser's console; each message is told once."""
    return [str(entry["message"]) for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
