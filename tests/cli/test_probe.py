"""`lostreg probe` with weights files of the smallest model."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_vit import LAYER, NAME, UNITS, save_weights, small, strict_json

from lostreg.cli import probe
from lostreg.cli.main import main
from lostreg.images.files import ImageFile
from lostreg.models.backbone import build_backbone, find_spec
from lostreg.models.registers import RegisterNeurons

pytestmark = pytest.mark.usefixtures("one_thread")
OTHER = "timm:test_vit2"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_weights(small(), tmp_path_factory.mktemp("weights") / "first.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    return save_weights(build_backbone(find_spec(NAME)), tmp_path_factory.mktemp("weights") / "trained.safetensors")


@pytest.fixture
def _random_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without weights the model is a random one of its kind."""
    monkeypatch.setattr(
        "lostreg.inference.discoverer.load_backbone", lambda name, weights=None: build_backbone(find_spec(name))
    )


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for name, brightness in (("cat", 60), ("dog", 180)):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for number in range(6):
            pixels = np.clip(random.normal(brightness, 40, (32, 40, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pets" / name / f"{number}.png")
    return tmp_path / "pets"


def run(pets: Path, *arguments: object) -> int:
    options = ["--task", "classification", "--data", pets, "--seeds", 2, "--device", "cpu"]
    return main([str(argument) for argument in ("probe", *arguments, *options)])


def test_a_table_ends_with_a_line_for_programs(
    weights: Path, pets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "probe.json"
    assert run(pets, NAME, "--weights", weights, "--out", out, "--cache", tmp_path / "cache") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ")[0] == "backbone"
    assert re.fullmatch(rf"{NAME} \(first\.safetensors\) +[\d.]+ +\+- [\d.]+ +[\d.]+ - [\d.]+ +[\d.]+", lines[1]), lines
    assert lines[2] == f"written to {out}"
    assert re.fullmatch(rf"top-1: {NAME} \(first\.safetensors\) [\d.]+", lines[3])
    written = strict_json(out.read_text())
    assert written["settings"]["task"] == "classification"
    (one,) = written["backbones"]
    assert (one["metric"], one["tokens"], one["images"]) == ("top-1", "cls", [6, 2, 4])
    assert len(one["resamples"]) == 1000
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.usefixtures("_random_models")
def test_backbones_join_a_table_and_are_not_computed_again(
    pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "probe.json"
    torch.manual_seed(0)
    assert run(pets, NAME, OTHER, "--out", out) == 0
    table = capsys.readouterr().out
    assert re.search(rf"\n{OTHER} .* [+-][\d.]+ \([+-][\d.]+ to [+-][\d.]+\)\n", table)
    assert re.fullmatch(rf"top-1: {NAME} [\d.]+, {OTHER} [\d.]+", table.splitlines()[-1])
    registers = tmp_path / "registers.json"
    RegisterNeurons(tuple((LAYER, unit) for unit in UNITS), 1).save(registers)
    with monkeypatch.context() as patch:
        patch.setattr("lostreg.probing.probe.probe", None)
        assert run(pets, NAME, OTHER, "--out", out) == 0
    again = capsys.readouterr()
    assert again.out == table
    assert again.err.count("is in") == 2
    assert run(pets, NAME, "--test-time-registers", registers, "--out", out) == 0
    titles = [one["title"] for one in json.loads(out.read_text())["backbones"]]
    assert titles == [NAME, OTHER, f"{NAME} + 1 test-time register"]


def test_other_weights_join_it_too(
    weights: Path, trained: Path, pets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "probe.json"
    for file in (weights, trained):
        assert run(pets, NAME, "--weights", file, "--out", out) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(rf"top-1: {NAME} \(first\.safetensors\) [\d.]+, {NAME} \(trained\.safetensors\) [\d.]+", last)


@pytest.mark.usefixtures("_random_models")
def test_what_was_computed_is_kept_when_the_next_backbone_fails(
    pets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "probe.json"
    assert run(pets, NAME, "--out", out) == 0
    before, table = out.read_bytes(), capsys.readouterr().out.splitlines()[:2]
    monkeypatch.setattr("lostreg.probing.tokens.whole_image", lambda *_: np.full(64, np.nan, np.float32))
    assert run(pets, NAME, OTHER, "--out", out) == 2
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].endswith("error: expected finite tokens: try --precision fp32")
    assert captured.out.splitlines() == table
    assert out.read_bytes() == before


@pytest.mark.usefixtures("_random_models")
def test_other_settings_are_refused(pets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "probe.json"
    assert run(pets, NAME, "--out", out) == 0
    for option, told in (
        (["--tokens", "mean"], 'tokens was "cls" and is now "mean"'),
        (["--max-side", "16"], "max_side was 448 and is now 16"),
    ):
        assert run(pets, NAME, "--out", out, *option) == 2
        assert f"error: {out} holds a run with other settings: {told}" in capsys.readouterr().err
    (pets / "cat/0.png").rename(pets / "cat/x.png")
    assert run(pets, NAME, "--out", out) == 2
    assert "data was " in capsys.readouterr().err
    assert run(pets, NAME, "--out", out, "--overwrite") == 0
    for other in (json.dumps({**json.loads(out.read_text()), "backbones": [{}]}), '{"complete": true}', "[]", "{"):
        out.write_text(other)
        assert run(pets, NAME, "--out", out) == 2
        assert f"{out} is no file of `lostreg probe`; use --overwrite or another --out" in capsys.readouterr().err


@pytest.mark.usefixtures("_random_models")
def test_a_broken_image_is_told_and_the_others_count(
    pets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pets / "cat/0.png").write_text("no picture")
    out = tmp_path / "probe.json"
    assert run(pets, NAME, "--out", out) == 2
    captured = capsys.readouterr()
    told = [line for line in captured.err.replace("\r", "\n").splitlines() if line.startswith("lostreg")]
    assert len(told) == 1
    assert re.match(r"lostreg: error: .*cat/0\.png: not a readable image", told[0])
    assert captured.out.splitlines()[-1].startswith("top-1: ")
    assert json.loads(out.read_text())["backbones"][0]["left_out"] == [0]


@pytest.mark.usefixtures("_random_models")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "{pets}"], "expected a file for figures"),
        (["--cache", "{pets}/cat/1.png"], "cannot make the folder"),
        ([OTHER, "--weights", "none.pth"], "--weights is one file, but there are 2 backbones"),
        (["--data", "{pets}/none"], "no such folder"),
        (["--data", "{pets}/cat"], "expected a sub-folder for each of at least 2 classes"),
        (["--task", "depth"], "expected the folders images and depth (see"),
        (
            ["--task", "segmentation"],
            "images and masks, or VOC 2012, whose SegmentationClass was looked for in itself, V",
        ),
        (["--task", "everything"], "invalid choice: 'everything'"),
        (["--seeds", "0"], "expected an integer of at least 1"),
        (["timm:none"], "none"),
    ],
)
def test_bad_input_is_one_line(
    pets: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--task", "classification", "--data", str(pets), "--device", "cpu"]
    others = [argument.format(pets=pets) for argument in arguments]
    try:
        code = main(
            ["probe", NAME, *options, *others] if others[0].startswith("-") else ["probe", NAME, *others, *options]
        )
    except SystemExit as error:
        code = int(str(error.code))
    captured = capsys.readouterr()
    assert code == 2
    assert message in captured.err.splitlines()[-1]
    assert "Traceback" not in captured.err


def test_register_neurons_are_not_looked_for_in_images_that_are_measured_on(
    weights: Path, pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[str] = []

    def search(args: object, discoverer: object, images: list[ImageFile]) -> object:
        searched.extend(image.path.relative_to(tmp_path).parts[0] for image in images)
        return discoverer

    monkeypatch.setattr(probe, "with_registers_if_any", search)
    assert run(pets, NAME, "--weights", weights) == 0
    assert searched == ["pets"] * 12
    searched.clear()
    for part in ("train", "val"):
        shutil.copytree(pets, tmp_path / "parts" / part)
    assert run(tmp_path / "parts", NAME, "--weights", weights) == 0
    assert len(searched) == 12
