"""One image's result as `supervision.Detections`."""

from typing import TYPE_CHECKING

import numpy as np

from lostreg.errors import OptionError
from lostreg.regions import Discovery

if TYPE_CHECKING:
    from supervision import Detections


def to_supervision(found: Discovery, *, masks: bool = True) -> "Detections":
    """What was found, for supervision's annotators, metrics and data sets.

    Args:
        found: in one image.
        masks: whether masks at the image's size go with the boxes: n times its pixels in memory.

    Returns:
        Boxes, scores as ``confidence``, class 0 for all; ``data`` has ``class_name`` ("object") and ``seeds``.

    Raises:
        OptionError: if supervision is not installed.
    """
    try:
        from supervision import Detections
    except ModuleNotFoundError as error:
        if error.name != "supervision":
            raise
        raise OptionError('supervision is not installed: pip install "lostreg[supervision]"') from error
    count = len(found)
    pixels = np.zeros((count, found.height, found.width), dtype=bool) if masks else None
    if pixels is not None:
        for index in range(count):
            pixels[index] = found.pixel_mask(index)
    return Detections(
        xyxy=found.xyxy.astype(np.float32),
        mask=pixels,
        confidence=found.scores.astype(np.float32),
        class_id=np.zeros(count, dtype=int),
        data={"class_name": np.full(count, "object"), "seeds": found.seeds.copy()},
    )
