"""A run's folder as its page needs it: read line by line, finished or not, with maps or without."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from lostreg.defaults import CLEAR_SCORE, MAPS_FILE, MAX_PIXELS, PREDICTIONS_FILE
from lostreg.errors import PredictionsError
from lostreg.metrics import Corloc, is_hit
from lostreg.runs.maps import ImageMaps, read_maps
from lostreg.runs.predictions import Prediction, stream_predictions
from lostreg.runs.results import results_of

FAILED_LISTED: Final = 1000  # images without a box that are named; the others are counted


@dataclass(frozen=True)
class Shown:
    """One image of a run.

    Attributes:
        number: its place in the run, from 1.
        prediction: its line of the predictions file.
        maps: its line of the maps file; None where there is none.
    """

    number: int
    prediction: Prediction
    maps: ImageMaps | None

    @property
    def hit(self) -> bool | None:
        """Whether the first box is a hit; None where there is no ground truth."""
        if self.maps is None or self.maps.truth is None:
            return None
        return is_hit(self.prediction.boxes, self.maps.truth)


@dataclass
class Survey:
    """What a run holds, counted in one pass.

    Attributes:
        images: predictions read.
        boxes: of all images.
        unclear: images whose first score is below `CLEAR_SCORE`.
        unreadable: images that could not be read during the run.
        unmapped: images with boxes but without a line in the maps file.
        judged: images with a box and with ground truth.
        hits: of these.
        scores: number in the run, and score, of each image that has a box.
        failed: names and reasons of images without a box, `FAILED_LISTED` at most.
        failures: how many there are.
    """

    images: int = 0
    boxes: int = 0
    unclear: int = 0
    unreadable: int = 0
    unmapped: int = 0
    judged: int = 0
    hits: int = 0
    failures: int = 0
    scores: list[tuple[int, float | None]] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)

    def add(self, shown: Shown) -> None:
        """Count one image."""
        prediction, hit = shown.prediction, shown.hit
        self.images += 1
        self.boxes += len(prediction.boxes)
        self.unreadable += prediction.error is not None
        if not prediction.boxes:
            self._add_failure(prediction)
            return
        score = main_score(prediction)
        self.scores.append((shown.number, score))
        self.unclear += score is not None and score < CLEAR_SCORE
        self.unmapped += shown.maps is None
        self.judged += hit is not None
        self.hits += hit is True

    def _add_failure(self, prediction: Prediction) -> None:
        self.failures += 1
        if len(self.failed) < FAILED_LISTED:
            self.failed.append((str(prediction.image_id), str(prediction.error or "no box was predicted")))

    @property
    def corloc(self) -> Corloc | None:
        """Over the images with ground truth; those without a box are misses. None without ground truth."""
        return Corloc(self.hits, self.judged + self.failures) if self.judged else None


class RunFolder:
    """The folder of a finished or unfinished run.

    Args:
        folder: that `lostreg discover` or `lostreg eval` wrote.
        needs_maps: whether the maps file is needed; else it is used where it is there.

    Attributes:
        results: what the run says of itself; None where it says nothing that can be read.

    Raises:
        PredictionsError: if there is no predictions file, or no maps file where one is needed.
    """

    def __init__(self, folder: Path, *, needs_maps: bool = True) -> None:
        self.folder = folder
        if folder.name == PREDICTIONS_FILE and folder.is_file():
            raise PredictionsError(f"{folder} is a predictions file: expected its folder, {folder.parent}")
        self._predictions, self._maps = folder / PREDICTIONS_FILE, folder / MAPS_FILE
        if not self._predictions.is_file():
            raise PredictionsError(f"{folder} holds no {PREDICTIONS_FILE}: {_advice(folder)}")
        if needs_maps and not self._maps.is_file():
            raise PredictionsError(
                f"{folder} holds no {MAPS_FILE}, which says where the images are: run the command again with this "
                "version, or give the images' folder with --images (then without degree maps)"
            )
        self.results = results_of(folder)

    @property
    def name(self) -> str:
        """Of the folder."""
        return self.folder.absolute().name or "run"

    @property
    def options(self) -> dict[str, Any]:
        """The method's options, as far as they are known."""
        options = (self.results or {}).get("options")
        return options if isinstance(options, dict) else {}

    @property
    def exif(self) -> bool:
        """Whether the run turned images by their EXIF orientation, for images without maps."""
        return self.options.get("exif") is not False

    @property
    def max_pixels(self) -> int:
        """The largest image that the run decoded."""
        limit = self.options.get("max_pixels")
        return limit if type(limit) is int and limit > 0 else MAX_PIXELS

    @property
    def expected(self) -> int | None:
        """How many images a finished run has."""
        for section in ("benchmark", "collection"):
            part = (self.results or {}).get(section)
            if isinstance(part, dict) and type(part.get("images")) is int:
                return int(part["images"])
        return None

    def __iter__(self) -> Iterator[Shown]:
        maps = read_maps(self._maps) if self._maps.is_file() else iter(())
        waiting = next(maps, None)
        for number, prediction in enumerate(stream_predictions(self._predictions), start=1):
            if waiting is not None and waiting.image_id == prediction.image_id:
                yield Shown(number, prediction, waiting)
                while waiting is not None and waiting.image_id == prediction.image_id:  # a line may stand there twice
                    waiting = next(maps, None)
            else:
                yield Shown(number, prediction, None)

    def survey(self) -> Survey:
        """Count what the run holds.

        Raises:
            PredictionsError: if that is nothing, or a line is malformed.
        """
        found = Survey()
        for shown in self:
            found.add(shown)
        if not found.images:
            raise PredictionsError(f"{self._predictions} holds no predictions yet: nothing to show")
        return found


def main_score(prediction: Prediction) -> float | None:
    """The first box's score; None where other programs have written none."""
    return prediction.scores[0] if prediction.scores else None


def _advice(folder: Path) -> str:
    """What to give instead: a run of several backbones has a folder for each."""
    inside = sorted(path.parent.name for path in folder.glob(f"*/{PREDICTIONS_FILE}")) if folder.is_dir() else []
    if inside:
        return f"expected the folder of one run, such as {folder / inside[0]} ({len(inside)} lie in it)"
    return "expected a folder that `lostreg discover` or `lostreg eval` wrote"
