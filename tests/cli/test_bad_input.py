"""Whatever comes in: exit code 2, one line that says what was expected and what came, never a traceback."""

import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch
from conftest import disc_picture
from fabricate import png_header, write_voc
from PIL import Image

from lostreg import backbones
from lostreg.backbones import Backbone, build_backbone, find_spec
from lostreg.cli.main import main

FAST = "--backbone imgfocus_vits14 --device cpu"
_real_load = backbones.load_backbone
_small: list[Backbone] = []


class Payload:
    """Leaves a mark when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture(autouse=True)
def _small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The offline backbone is two random blocks; every other, and every weights file, is really loaded."""

    def load(name: str, *, weights: Path | None = None, **options: Any) -> Backbone:
        if name != "imgfocus_vits14" or weights is not None:
            return _real_load(name, weights=weights, **options)
        if not _small:
            torch.manual_seed(0)
            _small.append(build_backbone(find_spec(name), depth=2))
        return _small[0]

    monkeypatch.setattr("lostreg.discoverer.load_backbone", load)


@pytest.fixture
def _bare_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No GPU, no network, and nothing in the hub's cache."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def place(tmp_path: Path, _template: Path) -> Path:
    """A folder with one sound picture, a sound benchmark, and many things that are not sound."""
    place = shutil.copytree(_template, tmp_path / "place")
    (place / "code.pth").write_bytes(pickle.dumps({"pos_embed": Payload(place / "marker")}))
    return place


@pytest.fixture(scope="module")
def _template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("template")
    (place / "listed").mkdir()
    (place / "listed" / "results.json").write_text("[]")
    picture = Image.fromarray(disc_picture(98, 70))
    picture.save(place / "good.jpg")
    picture.save(place / "good.png")
    for suffix in ("jpg", "png"):
        content = (place / f"good.{suffix}").read_bytes()
        (place / f"cut.{suffix}").write_bytes(content[: len(content) // 2])
    picture.save(place / "whole.tif", compression="tiff_lzw")
    (place / "cut.tif").write_bytes((place / "whole.tif").read_bytes()[:3000])
    (place / "text.jpg").write_text("not a picture")
    (place / "empty.jpg").touch()
    png_header(place / "huge.png", 30_000, 30_000)
    Image.new("RGB", (1, 1)).save(place / "dot.png")
    (place / "folder").mkdir()
    (place / "file").write_text("mine")
    (place / "text.pth").write_text("no checkpoint")
    (place / "text.safetensors").write_text("no checkpoint")
    torch.save({"head.weight": torch.zeros(1), "other": torch.zeros(1)}, place / "other.pth")
    write_voc(place / "voc", 4)
    write_benchmarks(place)
    return place


def write_benchmarks(place: Path) -> None:
    """Benchmarks with something missing, and predictions with something wrong."""
    (write_voc(place / "gap", 4) / "JPEGImages/im02.jpg").unlink()
    (write_voc(place / "bare", 4) / "Annotations/im01.xml").write_text("<annotation></annotation>")
    (write_voc(place / "broken", 4) / "JPEGImages/im01.jpg").write_text("not a picture")
    (place / "coco.json").write_text(json.dumps({"images": [{"id": 1, "file_name": "good.jpg"}], "annotations": []}))
    good = '{"image_id": "im00", "boxes": [[0, 0, 9, 9]]}\n'
    (place / "cut.jsonl").write_text(good + good[:25])
    (place / "twice.jsonl").write_text(good + good)
    (place / "other.jsonl").write_text(good + good.replace("im00", "000005"))
    (place / "ids.jsonl").write_text(good.replace('"im00"', "17"))


def run(command: str, place: Path) -> int | str | None:
    arguments = shlex.split(command.replace("{}", place.as_posix()))
    try:
        return main(arguments)
    except SystemExit as done:
        return done.code


def told(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines on standard error: an error before the first image draws no progress bar."""
    return [line for line in capsys.readouterr().err.split("\n") if line and "img/s" not in line]


BAD = {
    "empty argument": (f"predict '' {FAST}", "expected a file, folder or glob, found an empty argument"),
    "abbreviated option": (f"eval voc --root {{}}/voc --out {{}}/out --lim 1 {FAST}", "unrecognized arguments: --lim"),
    "plots in a searched folder": (f"predict {{}}/voc --plot {{}}/voc/new {FAST}", "is among the images"),
    "plot as PDF": (f"predict {{}}/good.jpg --plot {{}}/found.pdf {FAST}", "expected a folder or a file ending in"),
    "a split elsewhere": (
        f"eval voc --root {{}}/voc --split ../x --out {{}}/out {FAST}",
        "expected the name of a split",
    ),
    "results that are none": (f"eval voc --root {{}}/voc --out {{}}/listed {FAST}", "no readable results.json"),
    # images
    "missing file": (f"predict {{}}/none.jpg {FAST}", r"none\.jpg: no such file"),
    "text named .jpg": (f"predict {{}}/text.jpg {FAST}", r"text\.jpg: not a readable image \(cannot identify"),
    "truncated JPEG": (f"predict {{}}/cut.jpg {FAST}", r"cut\.jpg: not a readable image \(.*truncated"),
    "truncated PNG": (f"predict {{}}/cut.png {FAST}", r"cut\.png: not a readable image \(.*truncated"),
    "empty file": (f"predict {{}}/empty.jpg {FAST}", r"empty\.jpg: not a readable image \(empty file\)"),
    "huge PNG": (f"predict {{}}/huge.png {FAST}", r"30000x30000 is 900,000,000 pixels.*limit of 200,000,000"),
    "small limit": (f"predict {{}}/good.jpg --max-pixels 99 {FAST}", "98x70 is 6,860 pixels.*limit of 99"),
    "strict": (f"predict {{}}/none.jpg {{}}/good.jpg --strict {FAST}", r"none\.jpg: no such file"),
    "empty folder": (f"predict {{}}/folder {FAST}", r"no images in .*folder: expected files ending in \.jpg"),
    "glob without match": (f"predict {{}}/*.gif {FAST}", r"no file matches '.*\*\.gif'"),
    "no image": (f"predict {FAST}", "arguments are required: IMAGE"),
    # outputs
    "one plot of several": (
        f"predict {{}}/good.jpg {{}}/dot.png --plot {{}}/a.png {FAST}",
        "one file, but .* 2 images",
    ),
    "plot over an image": (
        f"predict {{}}/good.jpg --plot {{}}/good.jpg {FAST}",
        r"--plot .*good\.jpg is among the images: give another folder",
    ),
    "plots over images": (
        f"predict {{}}/good.png {{}}/dot.png --plot {{}} {FAST}",
        "is among the images: give another folder",
    ),
    "plot below a file": (
        f"predict {{}}/good.jpg --plot {{}}/file/a.png {FAST}",
        "cannot make the folder .*/file: File exists",
    ),
    "plots below a file": (
        f"predict {{}}/good.jpg --plot {{}}/file/a {FAST}",
        "cannot make the folder .*/file/a: Not a directory",
    ),
    "json below a file": (
        f"predict {{}}/good.jpg --json {{}}/file/a.jsonl {FAST}",
        "cannot make the folder .*/file: File exists",
    ),
    "json is a folder": (f"predict {{}}/good.jpg --json {{}}/folder {FAST}", "Is a directory: '.*/folder'"),
    "json is an image": (
        f"predict --json {{}}/good.jpg {{}}/dot.png {FAST}",
        "named like an image: expected a file for",
    ),
    "out is a file": (f"eval voc --root {{}}/voc --out {{}}/file {FAST}", "/file, expected a folder: it is a file"),
    "out below a file": (f"eval voc --root {{}}/voc --out {{}}/file/a {FAST}", "/file/a, expected .*: Not a directory"),
    "no out": (f"eval voc --root {{}}/voc {FAST}", "arguments are required: --out"),
    # method
    "unknown backbone": (
        "predict {}/good.jpg --backbone dinov2_vits14_regs",
        r"unknown backbone 'dinov2_vits14_regs' \(did you mean dinov2_vits14_reg or .*lostreg backbones",
    ),
    "no ViT": (
        "predict {}/good.jpg --backbone timm:resnet50",
        "'resnet50' is not a plain Vision Transformer: expected",
    ),
    "not in timm": (
        "predict {}/good.jpg --backbone timm:vit_smal",
        r"timm has no model 'vit_smal' \(did you mean .*vit",
    ),
    "unknown feature": (f"predict {{}}/good.jpg --feature z {FAST}", "invalid choice: 'z'.*q.*k.*v.*out"),
    "no patches": (f"predict {{}}/good.jpg --k-patches 0 {FAST}", "expected an integer of at least 1, not '0'"),
    "half a batch": (f"predict {{}}/good.jpg --batch-size 0.5 {FAST}", "expected an integer of at least 1, not '0.5'"),
    "no side": (f"predict {{}}/good.jpg --max-side 0 {FAST}", "expected an integer of at least 1, not '0'"),
    "no such layer": (f"predict {{}}/good.jpg --layer 99 {FAST}", r"layer must be in \[-2, 1\] .*, not 99"),
    "layer of letters": (f"predict {{}}/good.jpg --layer last {FAST}", "--layer: invalid int value: 'last'"),
    "bias of letters": (f"predict {{}}/good.jpg --bias abc {FAST}", "expected 'auto' or a finite number, not 'abc'"),
    "bias NaN": (f"predict {{}}/good.jpg --bias nan {FAST}", "expected 'auto' or a finite number, not 'nan'"),
    "bias infinite": (f"predict {{}}/good.jpg --bias=-inf {FAST}", "expected 'auto' or a finite number, not '-inf'"),
    "auto unnormalised": (
        f"predict {{}}/good.jpg --bias auto --no-normalize {FAST}",
        "'auto' is defined on normalised",
    ),
    "precision": (f"predict {{}}/good.jpg --precision int8 {FAST}", "invalid choice: 'int8'.*fp32.*bf16.*fp16"),
    "no GPU": (
        "predict {}/good.jpg --device cuda",
        "'cuda' was asked for, but PyTorch finds none here; try --device cpu",
    ),
    "no device": ("predict {}/good.jpg --device toaster", "must be auto, cpu, cuda, cuda:N or mps, not 'toaster'"),
    "unknown option": (f"predict {{}}/good.jpg --colour red {FAST}", "unrecognized arguments: --colour red"),
    # weights
    "no weights file": (f"predict {{}}/good.jpg --weights {{}}/none.pth {FAST}", r"no weights file at .*none\.pth"),
    "weights of text": (f"predict {{}}/good.jpg --weights {{}}/text.pth {FAST}", r"text\.pth .*no checkpoint"),
    "safetensors of text": (
        f"predict {{}}/good.jpg --weights {{}}/text.safetensors {FAST}",
        "not a readable checkpoint",
    ),
    "weights by suffix": (f"predict {{}}/good.jpg --weights {{}}/good.jpg {FAST}", r"expected a \.safetensors, \.pth"),
    "weights of another": (
        f"predict {{}}/good.jpg --weights {{}}/other.pth {FAST}",
        r"does not fit.*lacks.*unexpected other",
    ),
    "weights with code": (
        f"predict {{}}/good.jpg --weights {{}}/code.pth {FAST}",
        "not loaded, since a pickle can run code",
    ),
    "weights for several": (
        "eval voc --root {}/voc --out {}/out --weights {}/other.pth --backbone dino_vits16 dino_vits8",
        "--weights is one file, but there are 2 backbones",
    ),
    "no network": (
        "predict {}/good.jpg --backbone dino_vits16 --device cpu",
        r"could not be fetched.*Three ways out: \(1\).*HF_ENDPOINT.*\(2\).*--weights FILE.*\(3\).*imgfocus_vits14",
    ),
    # benchmarks
    "unknown benchmark": (
        f"eval voc77 --root {{}}/voc --out {{}}/out {FAST}",
        "unknown benchmark 'voc77': did you mean voc",
    ),
    "no root": (f"eval voc --root {{}}/none --out {{}}/out {FAST}", "none is not in VOC layout.*none does not exist"),
    "other layout": (
        f"eval voc07 --root {{}}/folder --out {{}}/out {FAST}",
        "looked for Annotations and ImageSets/Main",
    ),
    "too few images": (f"eval voc07 --root {{}}/voc --out {{}}/out {FAST}", "expected 5011 images .*found 4"),
    "missing images": (f"eval voc --root {{}}/gap --out {{}}/out {FAST}", r"1 of 4 images are missing: .*im02\.jpg"),
    "no objects": (f"eval voc --root {{}}/bare --out {{}}/out {FAST}", r"im01\.xml has no <object>"),
    "no split": (f"eval voc --root {{}}/voc --split val --out {{}}/out {FAST}", "no split 'val'.*there are trainval"),
    "no boxes": (
        f"eval coco --images {{}} --annotations {{}}/coco.json --out {{}}/out {FAST}",
        "has no boxes for its 1 im",
    ),
    "no JSON": (f"eval coco --images {{}} --annotations {{}}/good.jpg --out {{}}/out {FAST}", r"good\.jpg is not JSON"),
    "no annotations": (
        f"eval coco --root {{}} --out {{}}/out {FAST}",
        "eval coco needs --images",
    ),
    "no limit": (
        f"eval voc --root {{}}/voc --limit 0 --out {{}}/out {FAST}",
        "expected an integer of at least 1, not '0'",
    ),
    "strict eval": (f"eval voc --root {{}}/broken --strict --out {{}}/out {FAST}", r"im01\.jpg: not a readable image"),
    # predictions
    "cut predictions": (
        "score {}/cut.jsonl voc --root {}/voc",
        r"cut\.jsonl, line 2: expected an object with image_id",
    ),
    "missing predictions": (
        "score {}/none.jsonl voc --root {}/voc",
        r"cannot read predictions .*none\.jsonl: No such file",
    ),
    "empty predictions": (
        "score {}/empty.jpg voc --root {}/voc",
        "holds no predictions: expected one JSON object a line",
    ),
    "predictions of bytes": ("score {}/good.jpg voc --root {}/voc", r"good\.jpg, line 1: expected an object"),
    "repeated predictions": ("score {}/twice.jsonl voc --root {}/voc", "two predictions for image 'im00'"),
    "foreign predictions": (
        "score {}/other.jsonl voc --root {}/voc",
        "1 of 2 .*such as '000005': expected ids like 'im00'",
    ),
    "integer ids": ("score {}/ids.jsonl voc --root {}/voc", "such as 17: expected ids like 'im00'"),
    # commands
    "no command": ("", "arguments are required: COMMAND"),
    "unknown command": ("train", "invalid choice: 'train'.*predict.*eval.*score"),
    "fetch nothing": ("datasets fetch", "fetch needs a name: voc07, voc12, coco20k"),
    "fetch the unknown": ("datasets fetch voc77", "invalid choice: 'voc77'.*voc07"),
    "list with a name": ("datasets list voc07", "'list' takes no name, found 'voc07'"),
}


@pytest.mark.usefixtures("_bare_machine")
@pytest.mark.parametrize(("command", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_told_in_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], command: str, message: str
) -> None:
    before = (place / "good.jpg").read_bytes()
    assert run(command, place) == 2
    lines = told(capsys)
    assert len(lines) == 1, lines
    assert re.search(message, lines[0]), lines[0]
    assert lines[0].startswith("lostreg")
    assert "error: " in lines[0]
    assert (place / "good.jpg").read_bytes() == before
    assert (place / "file").read_text() == "mine"
    assert not (place / "marker").exists()


def test_the_payload_works_where_pickles_are_trusted(place: Path) -> None:
    """Else the absence of the marker would prove nothing."""
    pickle.loads((place / "code.pth").read_bytes())
    assert (place / "marker").exists()


def test_a_picture_of_one_pixel_is_fine(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"predict {{}}/dot.png --json - {FAST}", place) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["boxes"] == [[0, 0, 1, 1]]
    assert captured.err == ""


def test_one_unreadable_image_does_not_stop_the_others(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = "{}/good.jpg {}/text.jpg {}/dot.png"
    assert run(f"predict {files} --json {{}}/found.jsonl {FAST}", place) == 2
    captured = capsys.readouterr()
    assert [Path(line.split()[0]).name for line in captured.out.splitlines()[1:]] == ["good.jpg", "dot.png"]
    first, second = captured.err.splitlines()
    assert "error: " in first
    assert "text.jpg: not a readable image" in first
    assert second == "lostreg: 1 of 3 images could not be read"
    found = [json.loads(line) for line in (place / "found.jsonl").read_text().splitlines()]
    assert [len(line["boxes"]) for line in found] == [1, 0, 1]
    assert "not a readable image" in found[1]["error"]


def test_plots_of_the_readable_images_are_drawn(place: Path) -> None:
    assert run(f"predict {{}}/text.jpg {{}}/good.jpg {{}}/dot.png --plot {{}}/plots {FAST}", place) == 2
    assert sorted(path.name for path in (place / "plots").iterdir()) == ["dot.png", "good.png"]


def test_eval_counts_an_unreadable_image_as_a_miss_and_says_so(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"eval voc --root {{}}/broken --out {{}}/out {FAST}", place) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "1 images could not be read and count as misses (--overwrite tries them again)" in lines
    assert lines[-1].endswith("/4)")
    assert json.loads((place / "out/results.json").read_text())["unreadable"] == 1


def test_eval_does_not_go_on_with_other_settings(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = f"eval voc --root {{}}/voc --out {{}}/out {FAST}"
    assert run(command, place) == 0
    capsys.readouterr()
    assert run(f"{command} --k-patches 7 --limit 3", place) == 2
    (line,) = told(capsys)
    for change in ("images was 4 and is now 3", "limit was null and is now 3", "k_patches was 100 and is now 7"):
        assert change in line
    assert "use --overwrite or another --out" in line
    assert run(f"{command} --k-patches 7 --limit 3 --overwrite", place) == 0


def test_two_evals_do_not_write_to_one_folder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = f"eval voc --root {{}}/voc --out {{}}/out {FAST}"
    assert run(command, place) == 0
    capsys.readouterr()
    with filelock.FileLock(place / "out/.lock"):
        assert run(command, place) == 2
        (line,) = told(capsys)
        assert "out is in use: another lostreg eval is writing there" in line
    assert run(command, place) == 0


def test_nothing_but_lostregs_own_lines_reaches_standard_error(place: Path) -> None:
    """In a process of its own: Pillow warns about such files, and pytest would catch the warnings."""
    command = [str(Path(sys.executable).with_name("lostreg")), "predict", "cut.tif", "text.jpg", "dot.png"]
    done = subprocess.run([*command, *FAST.split()], cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert [line.split(" (")[0] for line in done.stderr.splitlines()] == [
        "lostreg: error: cut.tif: not a readable image",
        "lostreg: error: text.jpg: not a readable image",
        "lostreg: 2 of 3 images could not be read",
    ]
    assert done.stdout.splitlines()[1].startswith("dot.png ")
