"""What the demo's log keeps."""

import logging

import pytest

from lostreg.demo import log
from lostreg.demo.log import quiet_log


def test_a_place_speaks_once_a_minute(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(log.time, "monotonic", lambda: now)
    with quiet_log():
        for minute in range(2):
            now += 61 * minute
            for number in range(500):
                logging.getLogger("asyncio").error("too many: %s", number)
                logging.getLogger("uvicorn.error").warning("another place")
            logging.getLogger("uvicorn.error").info("not said")
    assert capfd.readouterr().err.splitlines() == ["too many: 0", "another place"] * 2


def test_what_visitors_sent_changes_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with quiet_log():
        try:
            raise ValueError("\x1b]0;title\x07 gpj.\u202eexe\r\x9b2J")
        except ValueError:
            logging.getLogger("any").exception("failed:")
    told = capfd.readouterr().err
    assert "Traceback" in told
    assert told.splitlines()[-1] == r"ValueError: \u001b]0;title\u0007 gpj.\u202eexe\u000d\u009b2J"


def test_the_log_is_as_before_once_the_demo_has_ended(capfd: pytest.CaptureFixture[str]) -> None:
    before = list(logging.getLogger().handlers)
    with quiet_log():
        assert logging.getLogger().handlers != before
    assert logging.getLogger().handlers == before
