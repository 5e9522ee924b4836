"""Names where a terminal shows them, where a spreadsheet opens them, and where no two may be alike."""

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lostreg.text import Unused, printable, spreadsheet_text

ANYTHING = st.text(st.characters(exclude_categories=()))
BIDIRECTIONAL = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


@given(ANYTHING)
def test_nothing_that_is_printable_acts_on_a_terminal(text: str) -> None:
    shown = printable(text)
    assert not {unicodedata.category(sign) for sign in shown} & {"Cc", "Cs", "Zl", "Zp"}
    assert not set(shown) & set(BIDIRECTIONAL)
    assert len(shown.splitlines()) <= 1
    assert printable(shown) == shown
    shown.encode()


@given(ANYTHING)
def test_json_stays_json(text: str) -> None:
    assert json.loads(printable(json.dumps({text: text}, ensure_ascii=False))) == {text: text}


@pytest.mark.parametrize(
    "text", ["été/ä ö.png", "日本.webp", "\U0001fae9.jpg", "\u0645\u06cc\u200c\u062e.jpg", "👩\u200d💻.jpg", "a\\b"]
)
def test_what_only_writes_stays(text: str) -> None:
    assert printable(text) == text


def test_what_is_kept_stays() -> None:
    assert printable("\ra\n\x1b[A", keep="\r\n") == "\ra\n\\u001b[A"


@pytest.mark.parametrize(
    "text",
    [
        *("+cmd|' /C calc'!A0.jpg", "=1+1", "-2+3", "@SUM(1)", "\uff1d1", "\uff0b1", "\uff0d1", "\uff20x", "'=1"),
        *(" =1", "\t=1", "\r=1", "\n=1", "\u00a0=1", "\ufeff=1", "\0=1", "\u200b+1", "\t", "\n"),
    ],
)
def test_no_text_is_a_formula_and_all_come_back(text: str) -> None:
    assert spreadsheet_text(text) == "'" + text


@given(ANYTHING)
def test_the_first_apostrophe_off_gives_the_text_back(text: str) -> None:
    assert spreadsheet_text(text).removeprefix("'") == text


def slow(names: list[str]) -> list[str]:
    """What `Unused` says, found by trying."""
    used: list[str] = []
    for name in names:
        number, free = 1, name
        while free.casefold() in map(str.casefold, used):
            number += 1
            free = f"{name}-{number}"
        used.append(free)
    return used


@given(st.lists(st.text(st.sampled_from("aAß-2"), max_size=5), max_size=12))
def test_each_name_is_handed_out_once_by_the_smallest_free_number(names: list[str]) -> None:
    unused = Unused(str.casefold)
    assert [unused.name(name) for name in names] == slow(names)


def test_many_like_names_cost_no_more_each_than_few() -> None:
    asked = []
    unused = Unused(lambda name: asked.append(name) or name)  # type: ignore[func-returns-value]
    names = [unused.name("a") for _ in range(20_000)]
    assert names[-1] == "a-20000"
    assert len(asked) < 5 * len(names)
