"""What a collection taught about its objects, as a file keeps it."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Final

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lostreg.checks import whole_number, whole_seed
from lostreg.errors import ObjectnessError, OptionError
from lostreg.images.decode import ImageSource, name_of
from lostreg.images.files import ImageFile
from lostreg.images.stores import StoredImage
from lostreg.jsonio import as_dataclass, read_json, whole_file
from lostreg.methods.learned import LinearObjectness

FORMAT: Final = "lostreg objectness 1"
_MOST_BYTES: Final = 1 << 28  # of a file; one of 1,536 dimensions takes 7 kB, and 20 bytes for each image that taught


@dataclass(frozen=True)
class Facts:
    """Where an objectness comes from.

    Attributes:
        backbone: the backbone's name.
        weights: where its weights came from.
        images: how many unlabelled images taught it.
        unreadable: how many more could not be read.
        seed: of the sample of images.
        names: `fingerprint` of each image that taught, as far as they have names; None of a file that does not know.
    """

    backbone: str
    weights: str
    images: int
    unreadable: int
    seed: int
    names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        plain: dict[str, Any] = {name: whole_number(getattr(self, name), name, least=0) for name in _COUNTS}
        vars(self).update(plain | {"seed": whole_seed(self.seed)})


def fingerprint(image: ImageSource) -> str | None:
    """The first 16 digits of SHA-256 of the name of an image's file, without its folder; None where it has none."""
    if not isinstance(image, str | os.PathLike | ImageFile | StoredImage):
        return None
    return hashlib.sha256(os.fsencode(PurePath(name_of(image)).name)).hexdigest()[:16]


_COUNTS: Final = ("images", "unreadable")


@dataclass(frozen=True)
class Objectness:
    """How likely a patch is part of an object, learned from unlabelled images of one backbone: see `learn`.

    A figure that was measured with it on the images that taught it is transductive: say so beside it, see
    `shared_with`.

    Attributes:
        head: the linear map on the output tokens of the last layer.
        facts: where it comes from.

    Example:
        >>> discoverer = lostreg.Discoverer("dinov2_vits14_reg", device="cpu")
        >>> lostreg.learn(sorted(Path("photos").iterdir()), discoverer).save("objectness.safetensors")
        >>> objectness = lostreg.Objectness.load("objectness.safetensors")
        >>> ranked = lostreg.Discoverer("dinov2_vits14_reg", method="parts", objectness=objectness, device="cpu")
        >>> ranked.discover("dog.jpg").xyxy.shape
        (1, 4)
    """

    head: LinearObjectness
    facts: Facts

    def describe(self) -> dict[str, Any]:
        """What decides boxes, as plain values: recorded with results."""
        numbers = np.append(self.head.weight.numpy(), np.float32(self.head.bias))
        return {"images": self.facts.images, "fingerprint": hashlib.sha256(numbers.tobytes()).hexdigest()[:16]}

    def require(self, backbone: str, weights: str, width: int) -> None:
        """Raise `OptionError` if it was learned on another backbone, on other weights of it or on other tokens."""
        if self.facts.backbone != backbone:
            raise OptionError(f"the objectness was learned on {self.facts.backbone}, not on {backbone}")
        if self.facts.weights != weights:
            raise OptionError(f"the objectness was learned on the weights {self.facts.weights}, not on {weights}")
        if len(self.head.weight) != width:
            raise OptionError(f"the objectness is of tokens of {len(self.head.weight)} dimensions, not of {width}")

    def shared_with(self, images: Iterable[ImageSource]) -> int | None:
        """How many of these images are, by the names of their files, among those that taught; None if unknown."""
        if self.facts.names is None:
            return None
        names = set(self.facts.names)
        return sum(fingerprint(image) in names for image in images)

    def save(self, path: str | Path) -> None:
        """Write the safetensors file that ``--objectness FILE`` takes.

        Raises:
            ObjectnessError: if it cannot be written.
        """
        tensors = {"weight": self.head.weight.contiguous(), "bias": torch.tensor([self.head.bias])}
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with whole_file(Path(path)) as part:
                part.write_bytes(save(tensors, {"format": FORMAT, "facts": json.dumps(vars(self.facts))}))
        except (OSError, SafetensorError) as reason:
            raise ObjectnessError(f"cannot write {path}: {getattr(reason, 'strerror', None) or reason}") from reason

    @classmethod
    def load(cls, path: str | Path) -> "Objectness":
        """Read such a file.

        Raises:
            ObjectnessError: if it cannot be read, or is of something else.
        """
        try:
            if Path(path).stat().st_size > _MOST_BYTES:
                raise ValueError("it is too large")
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"its format is {metadata.get('format')!r}")
                weight, bias = file.get_tensor("weight"), file.get_tensor("bias")
                facts = as_dataclass(Facts, {"names": None} | read_json(metadata["facts"]))
            if weight.ndim != 1 or bias.shape != (1,) or {weight.dtype, bias.dtype} != {torch.float32}:
                shapes = f"{tuple(weight.shape)} and {tuple(bias.shape)}"
                raise ValueError(f"expected a weight (D,) and a bias (1,) of float32, not {shapes}")
            if not (weight.isfinite().all() and bias.isfinite().all()):
                raise ValueError("its numbers are not finite")
        except OSError as error:
            raise ObjectnessError(f"cannot read {path}: {error.strerror or error}") from error
        except (SafetensorError, KeyError, TypeError, ValueError, OptionError) as error:
            raise ObjectnessError(f"{path} is no objectness of `lostreg learn`: {error}") from error
        return cls(LinearObjectness(weight, float(bias[0])), facts)
