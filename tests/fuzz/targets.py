"""What is fuzzed: one row for each kind of file that lostreg reads, with what it may say of an unsound one."""

import contextlib
import functools
import io
import json
import shutil
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from random import Random
from typing import Any, Final

import numpy as np
import pytest
import torch
from conftest import disc_picture
from fabricate_lake import struct_table, write_arrow, write_parquet
from fabricate_run import GRID, map_of, predict
from fuzz.mutations import (
    Mutation,
    mutate_bytes,
    mutate_image,
    mutate_json,
    mutate_lines,
    mutate_safetensors,
    mutate_torch,
    mutate_xml,
    random_tar,
    with_random_exif,
)
from PIL import Image
from safetensors.torch import save as save_safetensors
from small_vit import small
from torch import nn

from lostreg.artifacts.labels import annotated_classes
from lostreg.cli.recipes import load_recipe, recipe_names
from lostreg.datasets import coco20k, fetch
from lostreg.datasets.base import Benchmark, Example
from lostreg.datasets.coco import load_coco
from lostreg.datasets.folder import find_collection
from lostreg.datasets.lake import stored_at
from lostreg.datasets.voc import main_class, read_split, read_voc
from lostreg.errors import (
    CalibrationError,
    DatasetError,
    ImageError,
    LostregError,
    LostregWarning,
    ObjectnessError,
    OptionError,
    PredictionsError,
    RecipeError,
    RegistersError,
    WeightsError,
)
from lostreg.exports.items import ExportImage, gather
from lostreg.exports.pictures import Reader, plan
from lostreg.gallery.entries import make_entry
from lostreg.images.decode import Picture, read_image
from lostreg.images.rle import decode_rle, encode_rle
from lostreg.images.stores import StoredImage
from lostreg.inference.calibration import Calibration
from lostreg.inference.discoverer import Discoverer
from lostreg.inference.objectness import Facts, Objectness
from lostreg.methods.learned import LinearObjectness
from lostreg.models.checkpoints import load_file_into
from lostreg.models.registers import RegisterNeurons
from lostreg.probing.data import read_depth, read_mask
from lostreg.runs.decisions import FORMAT, boxes_fingerprint, choose_boxes, read_decisions
from lostreg.runs.evaluate import score_detections, score_predictions
from lostreg.runs.locate import ImageFinder, Source
from lostreg.runs.maps import read_maps
from lostreg.runs.predictions import parse_prediction, read_predictions
from lostreg.runs.reader import RunFolder
from lostreg.runs.results import check_same_run

MAX_PIXELS: Final = 1 << 20


@dataclass(frozen=True)
class Target:
    """A kind of file.

    Attributes:
        name: of the test.
        file: what the input is called on disk.
        seeds: sound inputs.
        mutate: makes an unsound one of them.
        read: reads it as the package does; may draw from the generator. What it returns is not looked at.
        refusals: what it may raise.
        share: of all inputs, in per cent.
    """

    name: str
    file: str
    seeds: Callable[[], Sequence[bytes]]
    mutate: Mutation
    read: Callable[[Path, Random], Any]
    refusals: tuple[type[LostregError], ...]
    share: int


# -------------------------------------------------------------------------------------------- images


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.copy().save(buffer, kind, **options)  # saving leaves settings behind in an image
    return buffer.getvalue()


def _twice(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Two frames."""
    more = [image.transpose(Image.Transpose.ROTATE_180)]
    return _saved(image, kind, save_all=True, append_images=more, **options)


@functools.cache
def _images() -> dict[str, list[bytes]]:
    """Pictures of 30 x 22 pixels in each format and in the modes that it has, by format."""
    rgb = Image.fromarray(disc_picture(30, 22))
    grey, palette, bits = rgb.convert("L"), rgb.convert("P"), rgb.convert("1")
    clear = rgb.convert("RGBA")
    clear.putalpha(grey)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    tiff = [
        _saved(rgb, "TIFF", compression=way) for way in ("raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")
    ]
    return {
        "JPEG": [_saved(image, "JPEG") for image in (rgb, grey, rgb.convert("CMYK"))]
        + [_saved(rgb, "JPEG", progressive=True, exif=exif), _twice(rgb, "MPO")],
        "PNG": [_saved(image, "PNG") for image in (rgb, grey, palette, bits, clear, deep)]
        + [_saved(palette, "PNG", transparency=0), _twice(rgb, "PNG", exif=exif)],
        "WEBP": [_saved(rgb, "WEBP", exif=exif), _saved(clear, "WEBP", lossless=True), _twice(rgb, "WEBP")],
        "BMP": [_saved(image, "BMP") for image in (rgb, grey, palette, bits)],
        "TIFF": [_saved(image, "TIFF") for image in (palette, clear, deep, rgb.convert("CMYK"))]
        + [*tiff, _saved(bits, "TIFF", compression="group4"), _twice(rgb, "TIFF", exif=exif)],
        "GIF": [_saved(palette, "GIF"), _saved(palette, "GIF", transparency=3), _twice(rgb, "GIF")],
        "PPM": [_saved(image, "PPM") for image in (rgb, grey, bits, deep)],
        "AVIF": [_saved(rgb, "AVIF", exif=exif), _saved(clear, "AVIF")],
        "JPEG2000": [_saved(image, "JPEG2000") for image in (rgb, clear, deep)],
    }


def _read_image(path: Path, rng: Random) -> None:
    """Decoded at any size, and looked at as an export looks at it."""
    exif, side = rng.random() < 0.5, rng.choice((None, None, 9))
    picture = read_image(path, exif=exif, max_side=side, max_pixels=MAX_PIXELS)
    assert picture.pixels.dtype == np.uint8
    assert picture.pixels.ndim == 3
    assert picture.pixels.size
    assert side is not None or picture.pixels.shape == (picture.height, picture.width, 3)
    _plan(path, picture, exif=exif)


def _plan(path: Path, picture: Picture, *, exif: bool) -> None:
    """What an export would do with an image that was read."""
    image = ExportImage("x", "x", picture.width, picture.height, (), Source(path, exif))
    plan(image, Reader(("JPEG", "MPO", "PNG", "TIFF"), turns=True))


@functools.cache
def _sound() -> list[bytes]:
    images = _images()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (22, 30, 3), dtype=np.uint8))
    return [images["JPEG"][0], images["JPEG"][1], _saved(noise, "PNG"), _saved(noise, "WEBP", lossless=True)]


@functools.cache
def _plain_pixels() -> dict[str, list[np.ndarray]]:
    """By format, what the sound pictures decode to."""
    plain: dict[str, list[np.ndarray]] = {}
    for content in _sound():
        with Image.open(io.BytesIO(content)) as image:
            plain.setdefault(str(image.format), []).append(np.asarray(image.convert("RGB")))
    return plain


def _read_sound(path: Path, rng: Random) -> None:
    """Whatever its EXIF block says, a sound picture is read: as it is stored, or turned into one of eight ways."""
    with Image.open(path) as image:
        plain = _plain_pixels()[str(image.format)]
    stored, turned = (read_image(path, exif=exif, max_pixels=MAX_PIXELS) for exif in (False, True))
    assert any(np.array_equal(stored.pixels, pixels) for pixels in plain), "other pixels than without EXIF"
    ways = [np.rot90(pixels, turn) for pixels in (stored.pixels, stored.pixels[:, ::-1]) for turn in range(4)]
    assert any(np.array_equal(turned.pixels, way) for way in ways), "other pixels than turned ones"
    small = read_image(path, exif=True, max_side=9, max_pixels=MAX_PIXELS)
    assert (small.width, small.height) == (turned.width, turned.height), "another size when scaled down"
    _plan(path, stored, exif=False)
    _plan(path, turned, exif=True)


def _depths() -> list[bytes]:
    depths, plain, packed = np.linspace(0, 9, 660).reshape(22, 30), io.BytesIO(), io.BytesIO()
    np.save(plain, depths)
    np.savez_compressed(packed, depth=depths.astype(np.float32))
    return [plain.getvalue(), packed.getvalue()]


def _read_answer(path: Path, rng: Random) -> None:
    """A mask or a depth map of linear probes."""
    found = read_mask(path) if path.stem == "mask" else read_depth(path)
    assert found.ndim == 2
    assert found.dtype in (np.int64, np.float32)


# ------------------------------------------------------------------------------------------ benchmarks

_XML: Final = b"""<annotation><folder>VOC2007</folder><filename>000001.jpg</filename>
<size><width>353</width><height>500</height><depth>3</depth></size><segmented>0</segmented>
<object><name>dog</name><pose>Left</pose><truncated>1</truncated><difficult>0</difficult>
<bndbox><xmin>48</xmin><ymin>240</ymin><xmax>195</xmax><ymax>371</ymax></bndbox>
<part><name>head</name><bndbox><xmin>50</xmin><ymin>250</ymin><xmax>90</xmax><ymax>290</ymax></bndbox></part></object>
<object><name>person</name><bndbox><xmin>8.5</xmin><ymin>12</ymin><xmax>352</xmax><ymax>498</ymax></bndbox></object>
</annotation>"""

_COCO: Final = json.dumps(
    {
        "info": {"year": 2014},
        "images": [{"id": n, "file_name": f"{n}.jpg", "width": 640, "height": 480} for n in (1, 2, 3)],
        "categories": [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}],
        "annotations": [
            {"id": 7, "image_id": 1, "category_id": 18, "bbox": [10, 20.5, 30, 40], "iscrowd": 0, "area": 1200},
            {"id": 8, "image_id": 1, "category_id": 1, "bbox": [0, 0, 5, 5], "iscrowd": 1},
            {"id": 9, "image_id": 2, "category_id": 1, "bbox": [1, 2, 3, 4.25]},
        ],
    }
).encode()


def _read_xml(path: Path, rng: Random) -> None:
    boxes, _ = read_voc(path, no_hard=rng.random() < 0.5)
    assert boxes.shape[1] == 4
    assert np.isfinite(boxes).all()
    main_class(path)


def _read_coco(path: Path, rng: Random) -> None:
    match rng.randrange(3):
        case 0:
            load_coco(path.parent, path).fingerprint()
        case 1:
            annotated_classes([Path("photos/1.jpg"), Path("photos/2.jpg")], path)
        case 2:
            coco20k.coco20k_sizes(path)


def _recipes() -> list[bytes]:
    return [(resources.files("lostreg") / "recipes" / f"{name}.toml").read_bytes() for name in recipe_names()]


def _read_recipe(path: Path, rng: Random) -> None:
    load_recipe(str(path)).jobs(path.parent)


def _read_split(path: Path, rng: Random) -> None:
    read_split(path.parents[2], path.stem)


def _tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        entry = tarfile.TarInfo("VOCdevkit/VOC2007/ImageSets/Main/trainval.txt")
        entry.size = 3
        tar.addfile(entry, io.BytesIO(b"a\nb"))
    return buffer.getvalue()


def _unpack_tar(path: Path, rng: Random) -> None:
    shutil.rmtree(path.parent / "root", ignore_errors=True)
    (path.parent / "root").mkdir()
    try:
        fetch._unpack_tar(path, path.parent / "root")
    finally:  # also what is refused leaves nothing outside, no link, and no folder of its own
        assert {entry.name for entry in path.parent.iterdir()} == {path.name, "root"}
        assert not any(entry.is_symlink() for entry in path.parent.rglob("*"))
        assert not (path.parent / "root" / f".unpack-{path.name}").exists()


def _zips() -> list[bytes]:
    contents = []
    for way in (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", compression=way) as archive:
            archive.writestr(coco20k.ANNOTATIONS, _COCO)
            archive.writestr("annotations/captions.json", b"{}")
        contents.append(buffer.getvalue())
    return contents


def _unpack_zip(path: Path, rng: Random) -> None:
    annotations = path.with_name("instances_train2014.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coco20k, "ANNOTATIONS_BYTES", len(_COCO))
        patch.setattr(fetch, "_get_archive", lambda *_, **__: False)  # which would refuse it by its hash
        fetch._fetch_annotations("", path.parent, annotations, progress=False)
    assert annotations.stat().st_size == len(_COCO)


# ------------------------------------------------------------------------------------- shards and tables


def _shard() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number, content in enumerate(_sound()):
            entry = tarfile.TarInfo(f"{number}.jpg")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


@functools.cache
def _tables() -> list[bytes]:
    """A Parquet file, an Arrow file and a stream."""
    table = struct_table({f"{number}.jpg": content for number, content in enumerate(_sound())})
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        paths = [
            write_parquet(place / "t.parquet", table),
            write_arrow(place / "file.arrow", table, stream=False),
            write_arrow(place / "stream.arrow", table, stream=True),
        ]
        return [path.read_bytes() for path in paths]


def _read_packed(path: Path, rng: Random) -> None:
    """Listed, and each image read: that may fail for one, and not for all."""
    with warnings.catch_warnings(action="ignore", category=LostregWarning):
        found = find_collection(str(path))
    for image in found:
        assert isinstance(image, StoredImage)
        assert stored_at(image.name, image.locator) == image
        with contextlib.suppress(ImageError):
            read_image(image, max_pixels=MAX_PIXELS)


# ----------------------------------------------------------------------------------------------- runs

_MASK: Final = np.arange(150 * 110).reshape(110, 150) % 9 < 4


@functools.cache
def _run() -> dict[str, bytes]:
    """A finished run over three images, by file name."""
    predictions = [
        predict("a.jpg", 0),
        predict("b/c.png", 1, masks=[encode_rle(_MASK)]),
        predict("broken.jpg", boxes=[], scores=[], seeds=[], error="not a readable image"),
    ]
    why = {"candidates": [[1, 2, 30, 40, 0.5]], "objectness": np.zeros(GRID, np.uint8)}
    maps = [map_of("a.jpg", Path("a.jpg"), 0, truth=[[1, 2, 30, 40]], **why), map_of("b/c.png", Path("b/c.png"), 1)]
    options = {"backbone": "imgfocus_vits14", "feature": "k", "exif": True, "max_pixels": MAX_PIXELS}
    results = {"complete": True, "options": options, "collection": {"root": "photos", "images": 3}}
    return {
        "predictions.jsonl": "".join(line.to_line() + "\n" for line in predictions).encode(),
        "maps.jsonl": "".join(line.to_line() + "\n" for line in maps).encode(),
        "results.json": json.dumps(results).encode(),
    }


def _read_run(path: Path, rng: Random) -> None:
    """One file of a run is the input, the other two are sound."""
    for name, content in _run().items():
        if name != path.name:
            path.with_name(name).write_bytes(content)
    rng.choice((_show_run, _export_run, _parse_run, _score_run, _go_on_with_run))(path.parent)


def _results() -> list[bytes]:
    entries = [
        {"image_id": "a.jpg", "category_id": 1, "bbox": [1, 2, 30, 40.5], "score": share} for share in (0.5, 0.9)
    ]
    return [json.dumps(entries).encode()]


def _show_run(folder: Path) -> None:
    run = RunFolder(folder)
    run.survey()
    assert run.max_pixels > 0
    for shown in run:
        json.dumps(make_entry(shown, None, exif=run.exif, max_pixels=run.max_pixels).card)


def _export_run(folder: Path) -> None:
    predictions = folder / "predictions.jsonl"
    exported = gather(read_predictions(predictions), ImageFinder(predictions))
    assert all(np.isfinite(box.xyxy).all() for image in exported.images for box in image.boxes)


def _decisions() -> list[bytes]:
    lines = [parse_prediction(line) for line in _run()["predictions.jsonl"].splitlines()]
    images = [
        {"image_id": line.image_id, "fingerprint": boxes_fingerprint(line), "decisions": ["reject"] * len(line.boxes)}
        for line in lines
    ]
    return [json.dumps({"format": FORMAT, "run": "run", "images": images}).encode()]


def _use_decisions(path: Path, rng: Random) -> None:
    lines = [parse_prediction(line) for line in _run()["predictions.jsonl"].splitlines()]
    assert not any(line.boxes for line in choose_boxes(lines, min_score=0.99, decided=read_decisions(path)))


def _parse_run(folder: Path) -> None:
    for line in read_predictions(folder / "predictions.jsonl"):
        line.to_line()
        for mask in line.masks or ():
            decode_rle(mask, max_pixels=MAX_PIXELS)
    for maps in read_maps(folder / "maps.jsonl"):
        maps.to_line()


def _score_run(folder: Path) -> None:
    predictions = read_predictions(folder / "predictions.jsonl")
    boxes = np.array([[1.0, 2, 30, 40]])
    names = {line.image_id: None for line in predictions}
    benchmark = Benchmark("mine", "", tuple(Example(name, Path(str(name)), boxes) for name in names))
    score_predictions(predictions, benchmark)
    score_detections(predictions, benchmark)


def _go_on_with_run(folder: Path) -> None:
    sound = json.loads(_run()["results.json"])
    check_same_run(folder / "results.json", {section: sound[section] for section in ("options", "collection")})


# ------------------------------------------------------------------------------- documents and weights


def _bias() -> list[bytes]:
    backbone = small()
    values = (-0.2, (-0.25, -0.15), 0.3, 0.8, 0.1, 0.2, 30, 0, 0, backbone.spec.name, backbone.weights, "k", 5, 9)
    return [_document(Calibration(*values))]


def _registers() -> list[bytes]:
    backbone = small()
    plain = RegisterNeurons(((0, 3), (1, 5)), 2, backbone.spec.name, backbone.weights, 4.5, 3, 30, 0.02, 0.0, 0)
    return [_document(plain), _document(RegisterNeurons(((0, 3),)))]


def _objectness() -> list[bytes]:
    backbone = small()
    facts = Facts(backbone=backbone.spec.name, weights=backbone.weights, images=3, unreadable=0, seed=0)
    width = int(backbone.model.num_features)  # type: ignore[arg-type]
    return [_document(Objectness(LinearObjectness(torch.ones(width), 0.5), facts))]


def _document(content: Calibration | RegisterNeurons | Objectness) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        content.save(Path(folder) / "document.json")
        return (Path(folder) / "document.json").read_bytes()


def _use_bias(path: Path, rng: Random) -> None:
    _discover(bias=Calibration.load(path))


def _use_registers(path: Path, rng: Random) -> None:
    _discover(registers=RegisterNeurons.load(path))  # which refuses more tokens than the model has patches


def _use_objectness(path: Path, rng: Random) -> None:
    _discover(method="parts", objectness=Objectness.load(path))


def _discover(**options: Any) -> None:
    found = Discoverer(small(), device="cpu", **options).discover(disc_picture(48, 48))
    assert np.isfinite(found.xyxy).all()


class _Small(nn.Module):
    """What timm calls the parts of a ViT, four numbers wide."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 4))
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
        self.norm = nn.LayerNorm(4)


@functools.cache
def _model() -> nn.Module:
    return _Small()


@functools.cache
def _torch_files() -> list[bytes]:
    state = _model().state_dict()
    contents = []
    for content in (state, {"state_dict": {f"module.{name}": value for name, value in state.items()}, "epoch": 3}):
        for is_zip in (True, False):
            buffer = io.BytesIO()
            torch.save(content, buffer, _use_new_zipfile_serialization=is_zip)
            contents.append(buffer.getvalue())
    return contents


def _read_weights(path: Path, rng: Random) -> None:
    load_file_into(_model(), path)


_IMAGE_SHARES: Final = dict(JPEG=6, PNG=5, WEBP=4, BMP=3, TIFF=7, GIF=3, PPM=2, AVIF=2, JPEG2000=2)  # noqa: C408
TARGETS: Final = (
    *(
        Target(f"images-{kind}", f"image.{kind.lower()}", lambda kind=kind: _images()[kind], mutate_image, _read_image,
               (ImageError, PredictionsError), share)
        for kind, share in _IMAGE_SHARES.items()
    ),
    Target("exif", "image.jpg", _sound, with_random_exif, _read_sound, (), 8),
    Target("mask", "mask.png", lambda: [_images()["PNG"][place] for place in (1, 2, 3, 5)], mutate_image, _read_answer,
           (ImageError, DatasetError), 1),
    Target("depth-npy", "depth.npy", lambda: _depths()[:1], mutate_bytes, _read_answer, (ImageError, DatasetError), 1),
    Target("depth-npz", "depth.npz", lambda: _depths()[1:], mutate_bytes, _read_answer, (ImageError, DatasetError), 1),
    Target("voc", "000001.xml", lambda: [_XML], mutate_xml, _read_xml, (DatasetError,), 7),
    Target("coco", "instances.json", lambda: [_COCO], mutate_json, _read_coco, (DatasetError, OptionError), 7),
    Target("tar", "voc.tar", lambda: [_tar()], random_tar, _unpack_tar, (DatasetError,), 2),
    Target("zip", "annotations_trainval2014.zip", _zips, mutate_bytes, _unpack_zip, (DatasetError,), 2),
    Target("recipe", "recipe.toml", _recipes, mutate_bytes, _read_recipe, (RecipeError,), 1),
    Target("split", "ImageSets/Main/dog_train.txt", lambda: [b"000001 -1\n000002  1\n", b"a\nb\n"], mutate_bytes,
           _read_split, (DatasetError,), 2),
    Target("list", "list.txt", lambda: [b"a.jpg\n# no\n\nsub/b.png\r\n", "\xe4.jpg\n".encode()], mutate_bytes,
           lambda path, rng: find_collection(str(path)).fingerprint(), (OptionError,), 2),
    Target("shard", "0.tar", lambda: [_shard()], random_tar, _read_packed, (OptionError,), 2),
    Target("parquet", "t.parquet", lambda: _tables()[:1], mutate_bytes, _read_packed, (OptionError,), 2),
    Target("arrow", "t.arrow", lambda: _tables()[1:], mutate_bytes, _read_packed, (OptionError,), 1),
    Target("predictions", "predictions.jsonl", lambda: [_run()["predictions.jsonl"]], mutate_lines, _read_run,
           (PredictionsError, OptionError, ImageError), 6),
    Target("coco results", "predictions.jsonl", _results, mutate_json,
           lambda path, rng: _score_run(path.parent), (PredictionsError, OptionError), 1),
    Target("maps", "maps.jsonl", lambda: [_run()["maps.jsonl"]], mutate_lines, _read_run, (PredictionsError,), 4),
    Target("results", "results.json", lambda: [_run()["results.json"]], mutate_json, _read_run,
           (PredictionsError,), 2),
    Target("decisions", "decisions.json", _decisions, mutate_json, _use_decisions, (PredictionsError,), 1),
    Target("bias", "bias.json", _bias, mutate_json, _use_bias, (CalibrationError, OptionError), 3),
    Target("registers", "registers.json", _registers, mutate_json, _use_registers, (RegistersError, OptionError), 3),
    Target("objectness", "objectness.safetensors", _objectness, mutate_safetensors, _use_objectness,
           (ObjectnessError, OptionError), 2),
    Target("torch", "weights.pth", _torch_files, mutate_torch, _read_weights, (WeightsError,), 3),
    Target("safetensors", "weights.safetensors", lambda: [save_safetensors(_model().state_dict())], mutate_safetensors,
           _read_weights, (WeightsError,), 2),
)  # fmt: skip
