"""A score reads the same in tables, on pictures, in the demo and in the gallery."""

import argparse
import dataclasses
import json
import re
import shutil
import subprocess
from decimal import ROUND_HALF_UP, Decimal
from importlib import resources

import numpy as np
import pytest
from conftest import disc_picture
from fabricate import discovery

from lostreg.cli.predict import _report as report_line
from lostreg.demo.panels import draw_objects
from lostreg.demo.words import box_json, box_table, verdict
from lostreg.images.draw import score_text


def test_a_score_reads_the_same_wherever_it_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = dataclasses.replace(discovery(), scores=np.float32([0.3149, 0.12499]))  # 0.315 and 0.125 in files
    words = []
    monkeypatch.setattr("lostreg.images.draw.cv2.putText", lambda _, text, *__: words.append(text))
    found.plot()
    draw_objects(disc_picture(), found)
    report_line("a.jpg", found, None, argparse.Namespace(masks=None, min_score=0.25))
    assert {"1: 0.32", "2: 0.13", "scores 0.32, 0.13"} <= set(words)
    assert [line.split()[5] for line in capsys.readouterr().out.splitlines()] == ["0.32", "0.13"]
    assert "<td>0.32</td>" in box_table(found)
    assert "<td>0.13</td>" in box_table(found)
    assert "Score: 0.32" in verdict(found, 2, "parts")
    assert json.loads(box_json("a", found))["scores"] == [0.315, 0.125]


def test_two_decimals_are_those_of_three_rounded_half_up() -> None:
    for thousandths in range(1001):
        expected = Decimal(thousandths).scaleb(-3).quantize(Decimal("0.01"), ROUND_HALF_UP)
        for score in (thousandths / 1000, thousandths / 1000 + 0.0004, np.float32(thousandths / 1000 - 0.0004)):
            assert score_text(score) == str(abs(expected)), score


@pytest.mark.skipif(not shutil.which("node"), reason="needs Node.js")
def test_the_script_of_the_gallery_rounds_alike() -> None:
    script = resources.files("lostreg.gallery").joinpath("gallery.js").read_text(encoding="utf-8")
    function = re.search(r"const written = .*?;\n", script, re.DOTALL)
    assert function
    ask = f"{function[0]} for (let k = 0; k <= 1000; k++) console.log(written(k / 1000))"
    shown = subprocess.run(["node", "-e", ask], capture_output=True, text=True, check=True).stdout.split()
    assert shown == [score_text(thousandths / 1000) for thousandths in range(1001)]
