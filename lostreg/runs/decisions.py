"""What people decided on a run's boxes: the file that the page of ``lostreg report`` saves."""

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from lostreg.checks import cut, shown
from lostreg.datasets.base import ImageId, name_some
from lostreg.errors import LostregWarning, OptionError, PredictionsError
from lostreg.jsonio import as_line, is_id, load_document
from lostreg.runs.predictions import Prediction

FORMAT: Final = "lostreg decisions 1"
Decision: TypeAlias = Literal["keep", "reject"]


@dataclass(frozen=True)
class ImageDecisions:
    """What was decided on the boxes of one image.

    Attributes:
        image_id: as in the predictions.
        fingerprint: of the boxes that were decided on, see `boxes_fingerprint`.
        decisions: one a box, in their order; None where nothing was decided.
    """

    image_id: ImageId
    fingerprint: str
    decisions: Sequence[Decision | None]


def boxes_fingerprint(prediction: Prediction) -> str:
    """The first 16 digits of the SHA-256 of an image's id and boxes.

    Example:
        >>> lostreg.runs.decisions.boxes_fingerprint(lostreg.runs.predictions.Prediction("a.jpg", [[0, 0, 8, 6]]))
        'c91449aa6e349df6'
    """
    boxes = [[float(value) for value in box] for box in prediction.boxes]
    line = as_line({"image_id": prediction.image_id, "boxes": boxes})
    return hashlib.sha256(line.encode()).hexdigest()[:16]


def read_decisions(path: Path) -> dict[str, ImageDecisions]:
    """The decisions of a file, by the images' ids as texts.

    Raises:
        PredictionsError: if it cannot be read, or is none that `lostreg report`'s page saves.
    """
    return load_document(path, FORMAT, _parse, PredictionsError, name="decisions", command="lostreg report")


def _parse(fields: dict[str, Any]) -> dict[str, ImageDecisions]:
    images = fields.get("images")
    if not isinstance(images, list):
        raise TypeError(f"expected a list of images, not {shown(images)}")
    decided: dict[str, ImageDecisions] = {}
    for entry in images:
        match entry:
            case {"image_id": image_id, "fingerprint": str(fingerprint), "decisions": list(decisions)} if is_id(
                image_id
            ) and all(one in ("keep", "reject", None) for one in decisions):
                if str(image_id) in decided:
                    raise ValueError(f"image {cut(repr(image_id))} is decided on twice")
                decided[str(image_id)] = ImageDecisions(image_id, fingerprint, decisions)
            case _:
                raise ValueError(
                    'expected of each image image_id, fingerprint, and as decisions "keep", "reject" or null for each '
                    f"box, not {shown(entry)}"
                )
    return decided


def choose_boxes(
    predictions: Iterable[Prediction],
    *,
    min_score: float = 0.0,
    decided: Mapping[str, ImageDecisions] | None = None,
) -> Iterator[Prediction]:
    """Predictions with the boxes that somebody kept, and of those that nobody decided on the ones that score enough.

    Args:
        predictions: one an image.
        min_score: boxes with a lower score are left out, unless they were kept.
        decided: as `read_decisions` has it; None where nobody decided.

    Raises:
        OptionError: if boxes are to be left out by scores that the predictions do not have.
        PredictionsError: if decisions are on other boxes, or on no image that has a prediction.
    """
    unmet = dict(decided or {})
    for line in predictions:
        of_image = unmet.pop(str(line.image_id), None)
        if of_image is not None:
            _check_same_boxes(line, of_image)
        decisions = of_image.decisions if of_image else [None] * len(line.boxes)
        if min_score and not line.scores and None in decisions:
            name = cut(repr(line.image_id))
            raise OptionError(f"image {name} has boxes without scores: --min-score cannot choose among them")
        places = [
            place
            for place, decision in enumerate(decisions)
            if decision == "keep" or (decision is None and (not min_score or line.scores[place] >= min_score))
        ]
        yield line if len(places) == len(line.boxes) else _with_boxes(line, places)
    if unmet:
        message = (
            f"{len(unmet)} images were decided on that the predictions do not have: {name_some([*map(cut, unmet)])}"
        )
        if len(unmet) == len(decided or {}):
            raise PredictionsError(message)
        warnings.warn(message, LostregWarning, stacklevel=2)


def _check_same_boxes(line: Prediction, of_image: ImageDecisions) -> None:
    if of_image.fingerprint == boxes_fingerprint(line) and len(of_image.decisions) == len(line.boxes):
        return
    raise PredictionsError(
        f"the decisions on image {cut(repr(line.image_id))} are on other boxes than the {len(line.boxes)} that the "
        "predictions have: expected those of a page that `lostreg report` made of these predictions"
    )


def _with_boxes(line: Prediction, places: Sequence[int]) -> Prediction:
    """With some of its boxes, and what there is of each of them."""
    lists = {name: getattr(line, name) for name in ("boxes", "scores", "seeds", "masks")}
    kept: dict[str, Any] = {name: [values[place] for place in places] for name, values in lists.items() if values}
    return replace(line, **kept)
