"""The examples in the docstrings run, with small random backbones in place of those that would be loaded."""

import doctest
import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import disc_picture, scenes
from fabricate import write_voc
from PIL import Image

import lostreg
from lostreg import artifacts, checks, metrics
from lostreg.images.boxes import spread
from lostreg.models.backbone import build_backbone, find_spec
from lostreg.text import Unused, printable, spreadsheet_text

PUBLIC = [
    *[getattr(lostreg, name) for name in lostreg.__all__ if name not in ("LostregError", "artifacts", "metrics")],
    *[getattr(artifacts, name) for name in artifacts.__all__],
    *[getattr(metrics, name) for name in ("is_hit", "class_overlaps", "root_mean_square")],
    checks.whole_number,
    checks.real_number,
    spread,
    printable,
    spreadsheet_text,
    Unused,
]
MADE_BY_OTHERS = {
    *("AttentionMaps", "Backbone", "BackboneSpec", "Corloc", "DetectionScores", "LostResult", "Measurement", "Objects"),
    *("Prediction", "Trained"),
}
EXPLAINED = [thing for thing in PUBLIC if callable(thing) and thing.__name__ not in MADE_BY_OTHERS]


@pytest.fixture
def _a_place_for_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A photo ``dog.jpg``, a folder of photos, one of classes, a VOC folder, and backbones of two random blocks."""

    def small(name: str, **_: Any) -> object:
        torch.manual_seed(0)
        return build_backbone(find_spec(name), depth=2)

    monkeypatch.chdir(tmp_path)
    Image.fromarray(disc_picture()).save("dog.jpg")
    Path("photos").mkdir()
    for number, pixels in enumerate(scenes(3)):
        Image.fromarray(pixels).save(f"photos/{number}.png")
    write_voc(Path("VOCdevkit/VOC2007"), 3)
    for number, pixels in enumerate(scenes(10)):
        folder = Path("pets", ("cat", "dog")[number % 2])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    monkeypatch.setattr("lostreg.inference.discoverer.load_backbone", small)
    if "load_backbone" not in request.node.name:
        monkeypatch.setattr(lostreg, "load_backbone", small, raising=False)


@pytest.mark.usefixtures("_a_place_for_examples", "one_thread")
@pytest.mark.parametrize("name", sorted({thing.__module__ for thing in EXPLAINED}))
def test_examples_do_what_they_say(name: str) -> None:
    module: ModuleType = importlib.import_module(name)
    names = {"lostreg": lostreg, "np": np, "torch": torch, "Path": Path}
    told: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, name, globs=names):
        runner.run(test, out=told.append)
    assert not runner.failures, "".join(told)
    assert runner.tries


@pytest.mark.usefixtures("_a_place_for_examples", "one_thread")
def test_the_page_of_the_api_runs(repository: Path) -> None:
    page = (repository / "docs" / "python.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    for block in blocks:
        exec(block.replace("pretrained=True", "depth=2"), names)
    assert len(blocks) > 4
    assert Path("found.png").is_file()
    rows = [(name, what) for group in lostreg._PUBLIC.values() for name, (_, what) in group.items()]
    assert re.findall(r"^\| `(\w+)` \| (.*) \|$", page, re.MULTILINE) == rows


@pytest.mark.parametrize("thing", EXPLAINED, ids=lambda thing: thing.__name__)
def test_everything_public_has_an_example(thing: Any) -> None:
    assert ">>> " in (inspect.getdoc(thing) or "")
