"""Test-time registers: the neurons that write outliers, and the file that keeps them.

Jiang et al. 2025 ("Vision Transformers Don't Need Trained Registers") found that a few hidden units of the MLPs write
the high-norm tokens of models that were trained without registers, and that their activations can be moved to blank
tokens that are added to the image. Here that is a property of a `Backbone`: its weights stay as they are.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lostreg.checks import real_number, share, shown, whole_number, whole_seed
from lostreg.errors import OptionError, RegistersError
from lostreg.jsonio import as_dataclass, load_document, save_document

FORMAT: Final = "lostreg registers 1"


@dataclass(frozen=True)
class RegisterNeurons:
    """Which hidden units a backbone writes its outliers with, and how many tokens are added to take them up.

    Attributes:
        neurons: pairs of layer and hidden unit, the strongest first; at least one.
        count: blank tokens added to each image, at least 1. Each of them takes the moved activations.
        backbone: the backbone's name.
        weights: where its weights came from.
        cutoff: norm from which a patch token at the output counts as an outlier; None where nobody asked.
        layer: where outliers emerge: neurons were looked for up to here. None where nobody asked.
        images: how many unlabelled images they were found on.
        outliers: share of patches that were outliers there, in [0, 1].
        outliers_left: the same with the activations moved, over a few of the images.
        seed: of the sample of images.

    Example:
        >>> registers = lostreg.RegisterNeurons(neurons=((1, 7), (1, 30)), count=2)
        >>> discoverer = lostreg.Discoverer("dinov2_vits14", registers=registers, device="cpu")
        >>> discoverer.backbone.prefix_names
        ['CLS', 'test-time register 1', 'test-time register 2']
    """

    neurons: tuple[tuple[int, int], ...]
    count: int = 1
    backbone: str = ""
    weights: str = ""
    cutoff: float | None = None
    layer: int | None = None
    images: int = 0
    outliers: float = 0.0
    outliers_left: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        plain: dict[str, Any] = {"count": whole_number(self.count, "count"), "neurons": _pairs(self.neurons)}
        plain |= {"images": whole_number(self.images, "images", least=0), "seed": whole_seed(self.seed)}
        plain |= {name: share(getattr(self, name), name) for name in ("outliers", "outliers_left")}
        if self.cutoff is not None:
            plain["cutoff"] = real_number(self.cutoff, "cutoff")
        if self.layer is not None:
            plain["layer"] = whole_number(self.layer, "layer", least=0)
        vars(self).update(plain)

    def by_layer(self) -> dict[int, list[int]]:
        """The units of each layer that has any."""
        found: dict[int, list[int]] = {}
        for layer, unit in self.neurons:
            found.setdefault(layer, []).append(unit)
        return found

    def describe(self) -> dict[str, Any]:
        """What decides features, as plain values: recorded with results."""
        return {"count": self.count, "neurons": [list(pair) for pair in self.neurons]}

    def require(self, backbone: str, weights: str) -> None:
        """Raise `OptionError` if they were found on another backbone, or on other weights of it."""
        if self.backbone and self.backbone != backbone:
            raise OptionError(f"the register neurons are those of {self.backbone}, not of {backbone}")
        if self.weights and self.weights != weights:
            raise OptionError(f"the register neurons are those of the weights {self.weights}, not of {weights}")

    def save(self, path: str | Path) -> None:
        """Write the file that ``--test-time-registers FILE`` takes: one JSON object.

        Raises:
            RegistersError: if it cannot be written.
        """
        save_document(path, FORMAT, dataclasses.asdict(self), RegistersError)

    @classmethod
    def load(cls, path: str | Path) -> "RegisterNeurons":
        """Read such a file.

        Raises:
            RegistersError: if it cannot be read, or is of something else.
        """
        return load_document(
            path, FORMAT, _parse, RegistersError, name="registers file", command="lostreg registers find"
        )


def _pairs(neurons: Iterable[Iterable[int]]) -> tuple[tuple[int, int], ...]:
    """As plain numbers, if they are different pairs, one at least."""
    try:
        pairs = tuple((whole_number(layer, "", least=0), whole_number(unit, "", least=0)) for layer, unit in neurons)
    except (TypeError, ValueError):
        pairs = ()
    if not pairs or len(set(pairs)) < len(pairs):
        raise OptionError(f"neurons must be different pairs of layer and unit, from 0, not {shown(neurons)}")
    return pairs


def _parse(fields: dict[str, Any]) -> RegisterNeurons:
    if "neurons" not in fields:
        raise ValueError("neurons missing")
    try:
        return as_dataclass(RegisterNeurons, fields)
    except ValueError as error:
        if str(error).startswith("neurons is "):
            raise ValueError("neurons is no list of pairs of layer and unit") from error
        raise
