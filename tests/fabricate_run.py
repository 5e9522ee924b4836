"""Folders of runs that no model made, and what a page holds of them."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from conftest import scene
from PIL import Image

from lostreg.datasets.base import ImageId
from lostreg.runs.maps import ImageMaps
from lostreg.runs.predictions import Prediction

WIDTH, HEIGHT, PATCH = 150, 110, 14
GRID = (8, 11)
TRUTH = [[40, 20, 90, 90]]


def predict(image_id: ImageId, number: int = 0, **fields: Any) -> Prediction:
    """A box that is a hit against `TRUTH` for even numbers, with a score of its own."""
    box = [40, 20, 92, 88] if number % 2 == 0 else [100, 70, 140, 105]
    score = round((number * 37 % 101) / 100, 3)
    found = Prediction(image_id, [box], WIDTH, HEIGHT, [score], [[2, 4]])
    return replace(found, **fields)


def map_of(image_id: ImageId, path: Path, number: int = 0, **fields: Any) -> ImageMaps:
    """Degrees that rise from patch to patch, beginning with the number."""
    degrees = np.arange(GRID[0] * GRID[1], dtype=np.int64).reshape(GRID) + number
    return replace(ImageMaps(image_id, str(path), degrees, PATCH, PATCH), **fields)


def write_photo(path: Path, number: int, width: int = WIDTH, height: int = HEIGHT) -> Path:
    """A generated picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(scene(number, width, height)).save(path, quality=90)
    return path


def write_lines(path: Path, lines: Sequence[Prediction | ImageMaps]) -> None:
    """A predictions or maps file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line.to_line() + "\n" for line in lines), encoding="utf-8")


def write_run(
    folder: Path,
    ids: Sequence[ImageId],
    *,
    truth: Sequence[Sequence[float]] | None = None,
    results: Mapping[str, Any] | None = None,
    changes: Mapping[int, Mapping[str, Any]] | None = None,
    maps_changes: Mapping[int, Mapping[str, Any]] | None = None,
) -> Path:
    """A finished run over as many pictures, which lie in ``photos`` beside the folder; returns the folder.

    Args:
        folder: of the run.
        ids: of the images.
        truth: ground truth of each image.
        results: for ``results.json``.
        changes: fields of predictions that are set to something else, by the image's place.
        maps_changes: of its maps, likewise.
    """
    photos = folder.parent / "photos"
    paths = [write_photo(photos / f"im{number:04}.jpg", number) for number in range(len(ids))]
    found = [predict(name, number, **(changes or {}).get(number, {})) for number, name in enumerate(ids)]
    write_lines(folder / "predictions.jsonl", found)
    of_maps = [{"truth": truth, **(maps_changes or {}).get(number, {})} for number in range(len(ids))]
    maps = [map_of(name, paths[at], at, **of_maps[at]) for at, name in enumerate(ids) if found[at].boxes]
    write_lines(folder / "maps.jsonl", maps)
    known = {"complete": True, "options": {"backbone": "imgfocus_vits14", "feature": "k", "exif": True}}
    (folder / "results.json").write_text(json.dumps(known if results is None else results))
    return folder


@dataclass
class Page(HTMLParser):
    """What a browser would find in a page."""

    path: Path
    text: str = ""
    cards: list[dict[str, Any]] = field(default_factory=list)
    by_id: dict[str, str] = field(default_factory=dict)
    links: list[str] = field(default_factory=list)
    scripts: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        self._script: dict[str, str | None] | None = None
        self._inside = ""
        self.feed(self.path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.links += [str(value) for name, value in attrs if name in ("src", "href", "action", "data")]
        self._inside = ""
        if tag == "script":
            self.scripts += 1
            self._script = found
        if tag == "style":
            self._script = {"id": "style"}

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("script", "style") or self._script is None:
            return
        if self._script.get("class") == "card-data":
            self.cards.append(json.loads(self._inside))
        self.by_id[str(self._script.get("id"))] = self._inside
        self._script, self._inside = None, ""

    def handle_data(self, data: str) -> None:
        if self._script is None:
            self.text += data
        else:
            self._inside += data

    def maps(self, number: int) -> dict[str, Any]:
        """What the large view needs."""
        found: dict[str, Any] = json.loads(self.by_id[f"maps-{number}"])
        return found

    def picture(self, number: int) -> np.ndarray | None:
        """RGB pixels; None for a placeholder."""
        data = base64.b64decode(self.by_id[f"jpeg-{number}"])
        if not data:
            return None
        return cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
