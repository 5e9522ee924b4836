"""Whatever comes in: exit code 2, one line that says what was expected and what came, never a traceback."""

import copy
import dataclasses
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

from lostreg.cli.main import main
from lostreg.inference.calibration import FORMAT, Calibration
from lostreg.models import backbone
from lostreg.models.backbone import Backbone, build_backbone, find_spec
from lostreg.models.registers import RegisterNeurons

FAST = "--backbone imgfocus_vits14 --device cpu"
_real_load = backbone.load_backbone
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
        return copy.deepcopy(_small[0])  # the caller may change what it has loaded

    monkeypatch.setattr("lostreg.inference.discoverer.load_backbone", load)


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
    write_biases(place)
    return place


def write_benchmarks(place: Path) -> None:
    """Benchmarks with something missing, and predictions with something wrong."""
    (write_voc(place / "gap", 4) / "JPEGImages/im02.jpg").unlink()
    for annotation in (write_voc(place / "bare", 4) / "Annotations").iterdir():
        annotation.write_text("<annotation></annotation>")
    (write_voc(place / "broken", 4) / "JPEGImages/im01.jpg").write_text("not a picture")
    (place / "coco.json").write_text(json.dumps({"images": [{"id": 1, "file_name": "good.jpg"}], "annotations": []}))
    good = '{"image_id": "im00", "boxes": [[0, 0, 9, 9]]}\n'
    (place / "cut.jsonl").write_text(good + good[:25])
    (place / "swept").mkdir()
    (place / "swept" / "sweep.jsonl").write_text(good)
    (place / "twice.jsonl").write_text(good + good)
    (place / "other.jsonl").write_text(good + good.replace("im00", "000005"))
    (place / "ids.jsonl").write_text(good.replace('"im00"', "17"))


def write_biases(place: Path) -> None:
    """Files of `lostreg calibrate`: one that fits the offline backbone, and others."""
    fitting = Calibration(
        bias=-0.25,
        interval=(-0.5, 0.0),
        connectivity=0.5,
        agreement=0.5,
        mean=0.25,
        deviation=0.5,
        images=4,
        unreadable=0,
        seed=0,
        backbone="imgfocus_vits14",
        weights="random",
        feature="k",
        layer=1,
        k_patches=100,
    )
    changes = {
        "fitting": {},
        "values": {"feature": "v"},
        "first": {"layer": 0},
        "dino": {"backbone": "dino_vits16"},
        "trained": {"weights": "file a.pth sha256:0"},
    }
    for name, change in changes.items():
        dataclasses.replace(fitting, **change).save(place / f"{name}.json")
    fields = {"format": FORMAT, **dataclasses.asdict(fitting)}
    for name, change in (
        ("nan", {"bias": float("nan")}),
        ("large", {"bias": 1e308}),
        ("later", {"format": "lostreg bias 2"}),
        ("more", {"x": 1}),
    ):
        (place / f"{name}.json").write_text(json.dumps({**fields, **change}))
    for name, count in (("endless", 10**30), ("many", 10**7)):
        RegisterNeurons(((0, 1),)).save(place / f"{name}.json")
        neurons = json.loads((place / f"{name}.json").read_text())
        (place / f"{name}.json").write_text(json.dumps({**neurons, "count": count}))
    del fields["bias"]
    (place / "less.json").write_text(json.dumps(fields))


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
    "plots in a searched folder": (
        f"predict {{}}/voc/JPEGImages --plot {{}}/voc/JPEGImages/new {FAST}",
        "is among the images",
    ),
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
    "plot that is no picture": (
        f"predict {{}}/good.jpg --plot {{}}/x.txt {FAST}",
        "expected a folder or a file ending in",
    ),
    "JSON on a full disk": (f"predict {{}}/good.jpg --json /dev/full {FAST}", "cannot write /dev/full: No space left"),
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
    "out is a file": (
        f"eval voc --root {{}}/voc --out {{}}/file {FAST}",
        "/file: .*/file is a file, expected a folder",
    ),
    "out below a file": (
        f"eval voc --root {{}}/voc --out {{}}/file/a {FAST}",
        "/file/a: .*/file is a file, expected a folder",
    ),
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
    "bias of letters": (f"predict {{}}/good.jpg --bias abc {FAST}", "or a file of `lostreg calibrate`, not 'abc'"),
    "bias NaN": (f"predict {{}}/good.jpg --bias nan {FAST}", "expected 'auto', a finite number, or a file"),
    "bias infinite": (f"predict {{}}/good.jpg --bias=-inf {FAST}", "expected 'auto', a finite number, or a file"),
    "bias beyond float32": (
        f"predict {{}}/good.jpg --bias 1e39 {FAST}",
        r"bias must be within .*float32 .* not 1e\+39",
    ),
    "bias file beyond float32": (
        f"predict {{}}/good.jpg --bias {{}}/large.json {FAST}",
        r"large\.json is no file of `lostreg calibrate`: bias must be within .* not 1e\+308",
    ),
    "swept bias beyond float32": (
        f"sweep voc --root {{}}/voc --out {{}}/out --biases 0:1e39:3 {FAST}",
        r"bias must be within .* not 5e\+38",
    ),
    "registers without end": (
        f"predict {{}}/good.jpg --test-time-registers {{}}/endless.json {FAST}",
        r"endless\.json is no file of .*: count must be an integer of at least 1 and below 2\*\*63, not 1000",
    ),
    "registers beyond the patches": (
        f"predict {{}}/good.jpg --test-time-registers {{}}/many.json {FAST}",
        "count of test-time registers of imgfocus_vits14 must be an integer from 1 to 1369, not 10000000",
    ),
    "registers to find beyond the patches": (
        f"registers find {{}}/good.jpg --out {{}}/a.json --count 10000000 {FAST}",
        "count must be an integer from 1 to 1369, not 10000000",
    ),
    "a number of thousands of digits": (
        f"predict {{}}/good.jpg --test-time-registers {'9' * 5000} {FAST}",
        r"expected a number of tokens of at least 1.*\.\.\.9+.*\(see",
    ),
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
    "unknown option": (
        f"predict {{}}/good.jpg --colour red {FAST}",
        r"^lostreg predict: error: unrecognized arguments: --colour red \(see lostreg predict --help\)$",
    ),
    "misspelt option": (
        f"discover {{}} --out {{}}/out --maxobjects=3 {FAST}",
        r"--maxobjects=3 \(did you mean --max-objects\?\) \(see lostreg discover --help\)$",
    ),
    "score above 1": (f"predict {{}}/good.jpg --min-score 2 {FAST}", r"expected a number in \[0, 1\], not '2'"),
    "score below 0": (f"predict {{}}/good.jpg --min-score=-0.1 {FAST}", r"a number in \[0, 1\], not '-0\.1'"),
    "score of letters": (f"predict {{}}/good.jpg --min-score nan {FAST}", r"a number in \[0, 1\], not 'nan'"),
    # bias files
    "no bias file": (
        f"predict {{}}/good.jpg --bias {{}}/none.json {FAST}",
        r"expected 'auto', a finite number, or a file of `lostreg calibrate`, not '.*none\.json'",
    ),
    "folder for a bias": (f"predict {{}}/good.jpg --bias {{}}/folder {FAST}", "or a file of .*, not '.*/folder'"),
    "image for a bias": (
        f"predict {{}}/good.jpg --bias {{}}/good.jpg {FAST}",
        r"good\.jpg is no file of `lostreg calibrate`: ",
    ),
    "text for a bias": (f"predict {{}}/good.jpg --bias {{}}/file {FAST}", "file is no file of `lostreg calibrate`: "),
    "empty bias file": (f"predict {{}}/good.jpg --bias {{}}/empty.jpg {FAST}", "is no file of `lostreg calibrate`: "),
    "list for a bias": (
        f"predict {{}}/good.jpg --bias {{}}/listed/results.json {FAST}",
        'results.json is no file of .*: expected a JSON object with "format": "lostreg bias 1"',
    ),
    "bias file of a later format": (
        f"predict {{}}/good.jpg --bias {{}}/later.json {FAST}",
        'later.json is no file of .*: expected a JSON object with "format": "lostreg bias 1"',
    ),
    "bias file with NaN": (f"predict {{}}/good.jpg --bias {{}}/nan.json {FAST}", r"nan\.json is no .*: bias is nan"),
    "bias file with more": (f"predict {{}}/good.jpg --bias {{}}/more.json {FAST}", r"more\.json is no file .*'x'"),
    "bias file with less": (f"predict {{}}/good.jpg --bias {{}}/less.json {FAST}", r"less\.json is no file .*'bias'"),
    "bias of another feature": (
        f"predict {{}}/good.jpg --bias {{}}/values.json {FAST}",
        "calibrated for v of layer 1 of imgfocus_vits14, not for k of layer 1 of imgfocus_vits14",
    ),
    "bias for another feature": (
        f"predict {{}}/good.jpg --feature q --bias {{}}/fitting.json {FAST}",
        "calibrated for k of layer 1 of imgfocus_vits14, not for q of layer 1 of imgfocus_vits14",
    ),
    "bias of another layer": (
        f"eval voc --root {{}}/voc --out {{}}/out --bias {{}}/first.json {FAST}",
        "calibrated for k of layer 0 of imgfocus_vits14, not for k of layer 1 of imgfocus_vits14",
    ),
    "bias of another backbone": (
        f"predict {{}}/good.jpg --bias {{}}/dino.json {FAST}",
        "calibrated for k of layer 1 of dino_vits16, not for k of layer 1 of imgfocus_vits14",
    ),
    "bias of other weights": (
        f"predict {{}}/good.jpg --bias {{}}/trained.json {FAST}",
        r"calibrated on the weights file a\.pth sha256:0, not on random",
    ),
    "bias file unnormalised": (
        f"predict {{}}/good.jpg --bias {{}}/fitting.json --no-normalize {FAST}",
        "normalised features",
    ),
    # calibrate
    "calibrate nothing": (f"calibrate {FAST}", "arguments are required: IMAGE"),
    "calibrate an empty folder": (f"calibrate {{}}/folder {FAST}", r"no images in .*folder: expected files ending in"),
    "calibrate no match": (f"calibrate {{}}/*.gif {FAST}", r"no file matches '.*\*\.gif'"),
    "calibrate into an image": (
        f"calibrate {{}}/dot.png --out {{}}/good.jpg {FAST}",
        r"--out .*good\.jpg: expected a file for a bias, not an image or a folder",
    ),
    "calibrate into a new image": (
        f"calibrate {{}}/good.jpg --out {{}}/new.PNG {FAST}",
        r"--out .*new\.PNG: expected a file for a bias, not an image or a folder",
    ),
    "calibrate into a folder": (
        f"calibrate {{}}/good.jpg --out {{}}/folder {FAST}",
        "--out .*folder: expected a file for a bias, not an image or a folder",
    ),
    "calibrate below a file": (
        f"calibrate {{}}/good.jpg --out {{}}/file/a.json {FAST}",
        r"--out .*/file/a\.json: .*/file is a file, expected a folder",
    ),
    "calibrate no sample": (f"calibrate {{}}/good.jpg --sample 0 {FAST}", "expected an integer of at least 1, not '0'"),
    "calibrate half a seed": (
        f"calibrate {{}}/good.jpg --seed 0.5 {FAST}",
        "--seed: expected an integer of at least 0, not '0.5'",
    ),
    "calibrate below a seed": (f"calibrate {{}}/good.jpg --out {{}}/a.json --seed=-1 {FAST}", "(?i)seed"),
    "calibrate a bias": (f"calibrate {{}}/good.jpg --bias auto {FAST}", "unrecognized arguments: --bias auto"),
    "calibrate no layer": (f"calibrate {{}}/good.jpg --layer 99 {FAST}", r"layer must be in \[-2, 1\] .*, not 99"),
    "calibrate no feature": (f"calibrate {{}}/good.jpg --feature z {FAST}", "invalid choice: 'z'.*q.*k.*v.*out"),
    # sweep
    "sweep without out": (f"sweep voc --root {{}}/voc {FAST}", "arguments are required: --out"),
    "sweep into a file": (
        f"sweep voc --root {{}}/voc --out {{}}/file {FAST}",
        "/file: .*/file is a file, expected a folder",
    ),
    "sweep into other results": (
        f"sweep voc --root {{}}/voc --out {{}}/swept {FAST}",
        r"no readable sweep\.json: not a run to go on with; use --overwrite or another --out",
    ),
    "sweep no layer": (
        f"sweep voc --root {{}}/voc --out {{}}/out --layers 0 99 {FAST}",
        r"layer must be in \[-2, 1\] .*, not 99",
    ),
    "sweep layers of letters": (f"sweep voc --root {{}}/voc --out {{}}/out --layers last {FAST}", "int value: 'last'"),
    "sweep no feature": (
        f"sweep voc --root {{}}/voc --out {{}}/out --features k z {FAST}",
        "invalid choice: 'z'.*q.*k",
    ),
    "sweep one feature": (f"sweep voc --root {{}}/voc --out {{}}/out --feature k {FAST}", "unrecognized .*--feature k"),
    **{
        f"sweep biases {biases!r}": (
            f"sweep voc --root {{}}/voc --out {{}}/out --biases {shlex.quote(biases)} {FAST}",
            f"expected LOW:HIGH:COUNT .*, or numbers with commas, not '{re.escape(biases)}'",
        )
        for biases in (
            "",
            "abc",
            "auto",
            "-0.5,,0",
            "-0.5,nan",
            "-inf",
            "0:1",
            "0:1:1",
            "1:0:5",
            "0:0:5",
            "0:1:5.5",
            "0:1:-5",
            "0:1:1001",
            "nan:1:5",
            "0:1:5:7",
            "0;1",
        )
    },
    "sweep an unknown benchmark": (f"sweep voc77 --root {{}}/voc --out {{}}/out {FAST}", "unknown benchmark 'voc77'"),
    "sweep missing images": (f"sweep voc --root {{}}/gap --out {{}}/out {FAST}", r"1 of 4 images are missing: .*im02"),
    "sweep coco without images": (f"sweep coco --root {{}} --out {{}}/out {FAST}", "sweep coco needs --images"),
    # artifacts, attention, registers
    "artifacts of nothing": (f"artifacts {FAST}", "arguments are required: IMAGE"),
    "artifacts of an empty folder": (f"artifacts {{}}/folder {FAST}", r"no images in .*folder: expected files ending"),
    "artifacts into a file": (
        f"artifacts {{}}/good.jpg --out {{}}/file {FAST}",
        "cannot make the folder .*/file: File exists",
    ),
    "artifacts below a file": (
        f"artifacts {{}}/good.jpg --out {{}}/file/a {FAST}",
        "cannot make the folder .*/file/a: Not a directory",
    ),
    **{
        f"artifacts above {rule!r}": (
            f"artifacts {{}}/good.jpg --out {{}}/out --threshold={shlex.quote(rule)} {FAST}",
            f"a cut-off must be 'auto', a number above 0 .*, not {re.escape(repr(rule))}",
        )
        for rule in (
            "",
            "0",
            "-150",
            "nan",
            "inf",
            "1e999",
            "abc",
            "mean+0sigma",
            "mean-3sigma",
            "3sigma",
            "0%",
            "100%",
        )
    },
    "registers above nothing": (f"registers find {{}}/good.jpg --threshold 0 {FAST}", "a cut-off must be 'auto'"),
    "artifacts of no sample": (f"artifacts {{}}/good.jpg --sample 0 {FAST}", "an integer of at least 1, not '0'"),
    "artifacts below a seed": (
        f"artifacts {{}}/good.jpg --out {{}}/out --seed=-1 {FAST}",
        "seed must be an integer of at least 0, not -1",
    ),
    "artifacts without annotations": (
        f"artifacts {{}}/good.jpg --out {{}}/out --annotations {{}}/none.json {FAST}",
        r"cannot read the COCO annotations .*none\.json",
    ),
    "artifacts of other annotations": (
        f"artifacts {{}}/good.jpg --out {{}}/out --annotations {{}}/voc/Annotations {FAST}",
        "has no annotation of any of the 1 images",
    ),
    "artifacts of no categories": (
        f"artifacts {{}}/good.jpg --out {{}}/out --annotations {{}}/coco.json {FAST}",
        "every annotation must be of a category",
    ),
    "artifacts of no JSON": (
        f"artifacts {{}}/good.jpg --out {{}}/out --annotations {{}}/text.pth {FAST}",
        r"text\.pth is not JSON",
    ),
    "artifacts of no backbone": ("artifacts {}/good.jpg --out {}/out --backbone vit", "unknown backbone 'vit'"),
    "artifacts of one backbone too many": (
        f"artifacts {{}}/good.jpg --out {{}}/out {FAST} --backbone none",
        "unknown backbone 'none'",
    ),
    "artifacts of no layer": (
        f"artifacts {{}}/good.jpg --out {{}}/out --layer 99 {FAST}",
        r"layer must be in \[-2, 1\] .*, not 99",
    ),
    "weights of artifacts for several": (
        "artifacts {}/good.jpg --out {}/out --weights {}/other.pth --backbone dino_vits16 dino_vits8",
        "--weights is one file, but there are 2 backbones",
    ),
    "attention of nothing": (f"attention {FAST}", "arguments are required: IMAGE"),
    "attention into a file": (
        f"attention {{}}/good.jpg --out {{}}/file {FAST}",
        "cannot make the folder .*/file: File exists",
    ),
    "attention of no layer": (
        f"attention {{}}/good.jpg --out {{}}/out --layers 0 99 {FAST}",
        r"layer must be in \[-2, 1\] .*, not 99",
    ),
    "attention layers of letters": (f"attention {{}}/good.jpg --layers last {FAST}", "invalid int value: 'last'"),
    "attention of a feature": (f"attention {{}}/good.jpg --feature k {FAST}", "unrecognized arguments: --feature k"),
    "registers of nothing": (f"registers find {FAST}", "arguments are required: IMAGE"),
    "registers without an action": ("registers", "arguments are required: ACTION"),
    "registers of another action": (f"registers lose {{}}/good.jpg {FAST}", "invalid choice: 'lose'.*find"),
    "registers of no token": (f"registers find {{}}/good.jpg --count 0 {FAST}", "an integer of at least 1, not '0'"),
    "registers of no neuron": (f"registers find {{}}/good.jpg --neurons 0 {FAST}", "of at least 1, not '0'"),
    "registers of no sample": (f"registers find {{}}/good.jpg --sample 0 {FAST}", "of at least 1, not '0'"),
    "registers below a seed": (
        f"registers find {{}}/good.jpg --out {{}}/a.json --seed=-1 {FAST}",
        "seed must be an integer of at least 0, not -1",
    ),
    "registers below a file": (
        f"registers find {{}}/good.jpg --out {{}}/file/a.json {FAST}",
        r"--out .*/file/a\.json: .*/file is a file, expected a folder",
    ),
    "registers into a folder": (
        f"registers find {{}}/good.jpg --out {{}}/folder {FAST}",
        "--out .*folder: expected a file for register",
    ),
    "registers into an image": (
        f"registers find {{}}/dot.png --out {{}}/good.jpg {FAST}",
        r"--out .*good\.jpg: expected a file for",
    ),
    "no registers file": (
        f"predict {{}}/good.jpg --test-time-registers {{}}/none.json {FAST}",
        r"expected a number of tokens of at least 1, or a file of `lostreg registers find`, not '.*none\.json'",
    ),
    "image for registers": (
        f"predict {{}}/good.jpg --test-time-registers {{}}/good.jpg {FAST}",
        r"good\.jpg is no file of `lostreg registers find`: ",
    ),
    "bias for registers": (
        f"attention {{}}/good.jpg --out {{}}/out --test-time-registers {{}}/fitting.json {FAST}",
        'fitting.json is no file of .*: expected a JSON object with "format": "lostreg registers 1"',
    ),
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
        r"does not fit.*lacks most of.*holds head.weight, other",
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
    "no objects": (f"eval voc --root {{}}/bare --out {{}}/out {FAST}", "all 4 images of .* have no object.*discover"),
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
    # workers
    "workers of nobody": (
        f"discover {{}}/voc/JPEGImages --workers 2 --out {{}}/out {FAST}",
        "--workers are Ray's: add --ray",
    ),
    "no workers": (
        f"discover {{}}/voc/JPEGImages --ray auto --workers 0 --out {{}}/out {FAST}",
        "expected an integer of at least 1, not '0'",
    ),
    "no address": (
        f"discover {{}}/voc/JPEGImages --ray here --out {{}}/out {FAST}",
        r"expected auto or the HOST:PORT of a cluster's head.*not 'here'|Ray is not installed: pip",
    ),
    "nobody at an address": (
        f"eval voc --root {{}}/voc --ray 127.0.0.1:9 --out {{}}/out {FAST}",
        r"no cluster at 127\.0\.0\.1:9: .*`ray start --head` starts one|Ray is not installed: pip",
    ),
    "plots of workers": (
        f"eval voc --root {{}}/voc --ray auto --plots --out {{}}/out {FAST}",
        "--plots are drawn where one process computes: leave out --ray",
    ),
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
    "unknown command": ("train", "invalid choice: 'train'.*predict.*eval.*score.*calibrate.*sweep"),
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


def test_calibrate_writes_its_file_though_an_image_is_broken_and_says_so(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = "{}/good.jpg {}/text.jpg {}/good.png {}/none.jpg"
    assert run(f"calibrate {files} --out {{}}/bias.json {FAST}", place) == 2
    captured = capsys.readouterr()
    assert captured.out.splitlines()[0] == "imgfocus_vits14, k of layer 1, 2 of 4 images"
    assert captured.out.splitlines()[-1].startswith("written to ")
    errors = [line.rpartition("\r")[2] for line in captured.err.split("\n") if "error: " in line]
    assert [line.partition(" (")[0] for line in errors] == [
        f"lostreg: error: {place}/text.jpg: not a readable image",
        f"lostreg: error: {place}/none.jpg: no such file",
    ]
    assert "Traceback" not in captured.err
    content = json.loads((place / "bias.json").read_text())
    assert (content["images"], content["unreadable"]) == (2, 2)
    assert run(f"predict {{}}/good.jpg --bias {{}}/bias.json {FAST}", place) == 0


def test_calibrate_without_one_readable_image_writes_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"calibrate {{}}/text.jpg {{}}/none.jpg --out {{}}/bias.json {FAST}", place) == 2
    captured = capsys.readouterr()
    last = captured.err.splitlines()[-1]
    assert last.startswith("lostreg calibrate: error: none of 2 images could be read, so nothing was calibrated")
    assert f"{place}/text.jpg: not a readable image" in captured.err
    assert captured.out == ""
    assert not (place / "bias.json").exists()


def test_calibrate_keeps_an_earlier_file_when_it_fails(place: Path) -> None:
    before = (place / "fitting.json").read_bytes()
    assert run(f"calibrate {{}}/text.jpg --out {{}}/fitting.json {FAST}", place) == 2
    assert run(f"calibrate {{}}/good.jpg --layer 99 --out {{}}/fitting.json {FAST}", place) == 2
    assert (place / "fitting.json").read_bytes() == before
    assert run(f"calibrate {{}}/good.jpg --out {{}}/fitting.json {FAST}", place) == 0
    assert (place / "fitting.json").read_bytes() != before


def test_a_file_of_a_bias_may_have_any_name(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    (place / "fitting.json").rename(place / "auto")
    assert run(f"predict good.jpg --bias auto {FAST}", place) == 0  # which needs no file
    assert run(f"predict good.jpg --bias ./auto {FAST}", place) == 0
    (place / "values.json").rename(place / "ünï code")
    assert run(f"predict good.jpg --feature v --bias 'ünï code' {FAST}", place) == 0


def test_a_sweep_counts_an_unreadable_image_as_a_miss(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"sweep voc --root {{}}/broken --out {{}}/out --features k --biases 0 {FAST}", place) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("auto - best fixed: mean ")
    results = json.loads((place / "out/sweep.json").read_text())
    assert (results["images"], results["unreadable"]) == (4, 1)


def test_a_sweep_does_not_go_on_with_other_settings(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = f"sweep voc --root {{}}/voc --out {{}}/out --features k --biases 0 {FAST}"
    assert run(command, place) == 0
    capsys.readouterr()
    assert run(f"{command} --k-patches 7 --limit 3", place) == 2
    (line,) = told(capsys)
    for change in ("images was 4 and is now 3", "limit was null and is now 3", "k_patches was 100 and is now 7"):
        assert change in line
    assert "use --overwrite or another --out" in line
    assert run(f"{command} --k-patches 7 --limit 3 --overwrite", place) == 0


def test_a_sweep_that_fails_before_its_first_image_draws_no_bar(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As eval: the one line on standard error is the error."""
    for out in ("file", "swept"):
        assert run(f"sweep voc --root {{}}/voc --out {{}}/{out} {FAST}", place) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1, error


def test_two_evals_do_not_write_to_one_folder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = f"eval voc --root {{}}/voc --out {{}}/out {FAST}"
    assert run(command, place) == 0
    capsys.readouterr()
    with filelock.FileLock(place / "out/.lock"):
        assert run(command, place) == 2
        (line,) = told(capsys)
        assert "out is in use: another run is writing there" in line
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
