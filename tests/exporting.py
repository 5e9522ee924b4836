"""Runs and pictures for the tests of exports."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from conftest import disc_picture
from PIL import Image, ImageOps

from lostreg.exports.items import ExportSet, gather
from lostreg.runs.decisions import choose_boxes
from lostreg.runs.locate import ImageFinder
from lostreg.runs.maps import ImageMaps
from lostreg.runs.predictions import Prediction, read_predictions

TURNED = Image.Exif()
TURNED[0x0112] = 6  # turn right
BROKEN = os.fsdecode(b"caf\xe9.jpg")  # a name that is not UTF-8
MENDED = "caf_e9.jpg"  # the same in files for other tools
WIDTH, HEIGHT = 60, 40
NAMES = ["a.jpg", "a.png", "trip one/ä b.jpg", "images/c.JPG", ".hidden/d.jpg", "=e,f.jpg", BROKEN]


def picture(number: int = 0) -> Image.Image:
    """A small picture, another one for each number."""
    return Image.fromarray(np.roll(disc_picture(WIDTH, HEIGHT), number * 7, axis=1))


def save(path: Path, number: int = 0, mode: str = "RGB", *, frames: int = 1, **options: Any) -> Path:
    """Save a picture, in a folder that is made if need be; further frames are other pictures."""
    if frames > 1:
        options |= {"save_all": True, "append_images": [picture(number + more) for more in range(1, frames)]}
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(number).convert(mode).save(path, **options)
    return path


def line(image_id: str | int = "a.jpg", **fields: Any) -> dict[str, Any]:
    """A line of a predictions file with two boxes."""
    sound = {
        "width": WIDTH,
        "height": HEIGHT,
        "boxes": [[6, 4, 30.5, 28.125], [0, 0, WIDTH, HEIGHT]],
        "scores": [0.75, 0.125],
        "seeds": [[1, 2], [0, 0]],
    }
    return {"image_id": image_id, **sound, **fields}


def write_lines(folder: Path, lines: Sequence[dict[str, Any]]) -> Path:
    """A predictions file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "predictions.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return path


def write_run(place: Path, names: Sequence[str] = NAMES) -> Path:
    """Pictures in ``place/photos`` and the run that searched them: the folder of the run."""
    photos = place / "photos"
    for number, name in enumerate(names):
        save(photos / name, number)
    unreadable = {"image_id": "broken.jpg", "boxes": [], "error": "=broken.jpg: not a readable image"}
    predictions = write_lines(place / "run", [*(line(name) for name in names), unreadable])
    maps = [ImageMaps(name, str(photos / name), np.zeros((3, 4), np.int64), 14.0, 14.0) for name in names]
    predictions.with_name("maps.jsonl").write_text("".join(one.to_line() + "\n" for one in maps))
    results = {"complete": True, "collection": {"root": str(photos)}}
    predictions.with_name("results.json").write_text(json.dumps(results))
    return predictions.parent


def collect(predictions: Path, images: Path | None = None, *, min_score: float = 0.0, **options: Any) -> ExportSet:
    """What is exported of a predictions file."""
    lines = choose_boxes(read_predictions(predictions), min_score=min_score)
    return gather(lines, ImageFinder(predictions, images), **options)


def collection_of(place: Path, *lines: dict[str, Any], **options: Any) -> ExportSet:
    """What is exported of some lines."""
    return collect(write_lines(place, lines), **options)


def upright(path: Path) -> np.ndarray:
    """The pixels as people see them, RGB."""
    with Image.open(path) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def as_prediction(**fields: Any) -> Prediction:
    """One line as it is read."""
    values = line(**fields)
    return Prediction(values.pop("image_id"), values.pop("boxes"), **values)
