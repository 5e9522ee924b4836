"""The demo's words."""

import dataclasses
import html
import json

import numpy as np
from fabricate import discovery

from lostreg import defaults
from lostreg.demo.methods import METHODS
from lostreg.demo.words import box_json, box_table, hint, problem, verdict
from lostreg.runs.predictions import from_discovery


def scored(*scores: float) -> str:
    return verdict(dataclasses.replace(discovery(), scores=np.array(scores, np.float32)), 2, "lost")


def test_the_verdict_counts_what_is_clear() -> None:
    assert "<b>2 objects found.</b> Scores: 0.60, 0.30." in scored(0.6, 0.3)
    assert "<b>1 object found.</b> Score: 0.60; 1 more under 0.25" in scored(0.6, 0.249)
    assert "<b>No clear object.</b> The best box has a score of 0.20, under 0.25" in scored(0.1, 0.2)
    assert "1 object found" in scored(0.25, 0.1)  # the limit itself is clear


def test_the_verdict_says_where_fewer_were_found_than_asked_for() -> None:
    assert "You asked for up to 5" in verdict(discovery(), 5, "maskcut")
    assert "You asked" not in verdict(discovery(), 2, "maskcut")
    assert "You asked" not in verdict(discovery(), 5, "tokencut")  # which finds one, whatever is asked for


def test_the_verdict_says_why() -> None:
    assert "Method: LOST with the bias -0.20" in verdict(discovery(), 1, "lost")
    assert set(METHODS) == set(defaults.METHODS)
    assert len({verdict(discovery(), 1, method) for method in METHODS}) == len(METHODS)
    candidates = np.array([[140, 140, 420, 420, 0.6], [840, 280, 1260, 560, 0.3], [0, 0, 140, 140, 0]], np.float32)
    found = dataclasses.replace(discovery(), candidates=candidates)
    for scores in ([0.6, 0.3], [0.1, 0.1]):
        told = verdict(dataclasses.replace(found, scores=np.array(scores, np.float32)), 2, "parts")
        assert "Of its 3 best candidates the first box ranks highest" in told
        assert "further ones overlap none" in told


def test_the_verdict_says_what_was_taught() -> None:
    taught = np.where(discovery().mask, np.float32(0.8), np.float32(0.1))
    found = dataclasses.replace(discovery(), objectness=taught)
    assert "for parts of one with 80 % on average, those around its box with 10 %." in verdict(found, 1, "parts")
    whole = dataclasses.replace(found, masks=np.ones((2, 5, 10), bool))
    assert "% on average." in verdict(whole, 1, "parts")


def test_a_photo_with_nothing_to_cut_is_told() -> None:
    complete = dataclasses.replace(discovery(), degrees=np.full((5, 10), 49))
    assert "there is nothing to cut: choose another feature" in verdict(complete, 1, "tokencut")
    assert "nothing to cut" not in verdict(complete, 1, "lost")
    assert "nothing to cut" not in verdict(discovery(), 1, "tokencut")


def test_the_table_has_a_row_a_box_and_marks_the_unclear() -> None:
    table = box_table(dataclasses.replace(discovery(), scores=np.array([0.6, 0.1], np.float32)))
    first, second = table.split("<tbody>")[1].split("</tr>")[:2]
    assert "<td>140</td><td>140</td><td>420</td><td>420</td><td>0.60</td><td></td>" in first
    assert "<td>840</td><td>280</td><td>1260</td><td>560</td><td>0.10</td><td>no clear object</td>" in second


def test_the_json_is_a_line_of_a_predictions_file() -> None:
    name = 'a "b"\n<c>.jpg'
    text = box_json(name, discovery())
    expected = json.loads(from_discovery(name, discovery()).to_line())
    expected.pop("masks", None)
    assert json.loads(text) == expected
    assert expected["image_id"] == name
    assert text.count("\n") == len(expected) + 1  # a field a line


def test_words_from_outside_are_no_html() -> None:
    message = """<script>x</script> & "q" 'r' {{ kind }}"""
    for text in (problem(message), hint(message)):
        assert "<script>" not in text
        assert "&lt;script&gt;" in text
        assert message in html.unescape(text)
