"""One Gram bias for a whole collection, as a file keeps it."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from lostreg.checks import real_number, whole_number, whole_seed
from lostreg.errors import CalibrationError, OptionError
from lostreg.jsonio import as_dataclass, load_document, save_document
from lostreg.methods.bias import fixed_bias

FORMAT: Final = "lostreg bias 1"
_FIGURES: Final = ("connectivity", "agreement", "mean", "deviation")
_COUNTS: Final = ("images", "unreadable", "layer", "k_patches")


@dataclass(frozen=True)
class Calibration:
    """A bias for one feature of one backbone, and how it was found.

    Attributes:
        bias: to be added to every cosine similarity.
        interval: where 90 % of resamples of the images put it (bootstrap), lowest and highest.
        connectivity: share of pairs of different patches that it connects, mean over the images.
        agreement: about the share of images in which it gives the box of ``auto``, at an intersection over union of
            0.5: read from a ladder of biases, on the images that it was chosen by, so a little high.
        mean: of the cosine similarities, mean over the images.
        deviation: their standard deviation within an image, mean over the images.
        images: how many it was found on.
        unreadable: how many more could not be read.
        seed: of the sample.
        backbone: the backbone's name.
        weights: where its weights came from.
        feature: ``q``, ``k``, ``v`` or ``out``.
        layer: block index from 0.
        k_patches: low-degree patches that might join the seed.

    Example:
        >>> discoverer = lostreg.Discoverer("dinov2_vits14_reg", device="cpu")
        >>> lostreg.calibrate(["dog.jpg"], discoverer).save("bias.json")
        >>> calibration = lostreg.Calibration.load("bias.json")
        >>> lostreg.Discoverer("dinov2_vits14_reg", bias=calibration, device="cpu").options.bias == calibration.bias
        True
    """

    bias: float
    interval: tuple[float, float]
    connectivity: float
    agreement: float
    mean: float
    deviation: float
    images: int
    unreadable: int
    seed: int
    backbone: str
    weights: str
    feature: str
    layer: int
    k_patches: int

    def __post_init__(self) -> None:
        low, high = self.interval
        plain: dict[str, Any] = {
            "bias": fixed_bias(self.bias),
            "interval": (real_number(low, "interval"), real_number(high, "interval")),
        }
        plain |= {name: real_number(getattr(self, name), name) for name in _FIGURES}
        plain |= {name: whole_number(getattr(self, name), name, least=0) for name in _COUNTS}
        plain["seed"] = whole_seed(self.seed)
        vars(self).update(plain)

    def save(self, path: str | Path) -> None:
        """Write the file that ``--bias FILE`` takes: one JSON object.

        Raises:
            CalibrationError: if it cannot be written.
        """
        save_document(path, FORMAT, dataclasses.asdict(self), CalibrationError)

    @classmethod
    def load(cls, path: str | Path) -> "Calibration":
        """Read such a file.

        Raises:
            CalibrationError: if it cannot be read, or is of something else.
        """
        return load_document(
            path, FORMAT, partial(as_dataclass, cls), CalibrationError, name="bias file", command="lostreg calibrate"
        )

    def require(self, backbone: str, weights: str, feature: str, layer: int) -> None:
        """Raise `OptionError` unless it was found on this feature."""
        mine = (self.backbone, self.feature, self.layer)
        if mine != (backbone, feature, layer):
            raise OptionError(
                f"the bias was calibrated for {_describe(*mine)}, not for {_describe(backbone, feature, layer)}"
            )
        if self.weights != weights:
            raise OptionError(f"the bias was calibrated on the weights {self.weights}, not on {weights}")


def _describe(backbone: str, feature: str, layer: int) -> str:
    return f"{feature} of layer {layer} of {backbone}"
