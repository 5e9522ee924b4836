"""Tokens of a frozen backbone, one forward an image, in files that go with the process: memory holds an image's."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lostreg.errors import ImageError, LostregError
from lostreg.images.patches import PatchedPicture
from lostreg.inference.discoverer import Discoverer
from lostreg.inference.jobs import LookJob
from lostreg.models.forward import Forward, Grid
from lostreg.probing.data import ProbeData
from lostreg.probing.heads import Targets
from lostreg.probing.maps import Frame, class_shares, mean_depths
from lostreg.progress import OnProgress, telling

MOST_TOKENS = 1 << 18  # patches that heads are trained on: of more, as many of each image are drawn


@dataclass(frozen=True)
class ImageTokens:
    """What leaves the backbone for one image, after its final norm where it has one.

    Attributes:
        prefix: CLS, registers and test-time registers, (P, D), float32.
        patches: (N, D), float32.
        frame: how the patches lie over a map of the image's original size.
    """

    prefix: NDArray[np.float32]
    patches: NDArray[np.float32]
    frame: Frame


_Seen = tuple[NDArray[np.float32], NDArray[np.float32]]


class TokensJob(LookJob[ImageTokens]):
    """The work of an `ImageStream` that ends with the last tokens.

    Args:
        forward: of the backbone.
    """

    def __init__(self, forward: Forward) -> None:
        super().__init__(forward, _last_tokens)  # type: ignore[arg-type]

    def finish(self, started: list[_Seen], pictures: Sequence[PatchedPicture]) -> list[ImageTokens]:  # type: ignore[override]
        """One outcome a picture."""
        patch = self.backbone.spec.patch_size
        return [
            ImageTokens(prefix, patches, Frame(picture.grid, (patch * picture.scale[1], patch * picture.scale[0])))
            for (prefix, patches), picture in zip(started, pictures, strict=True)
        ]


def _last_tokens(forward: Forward, pixels: list[Tensor], grids: Sequence[Grid]) -> list[_Seen]:
    """Prefix and patches of each image."""
    walk = forward.start(pixels, grids)
    while walk.layer < forward.backbone.depth:
        forward.advance(walk)
    output = forward.output(walk)
    prefixes, patches = walk.prefixes(output).cpu().numpy(), walk.patches(output).cpu().numpy()
    ends = np.cumsum([rows * columns for rows, columns in grids])
    return list(zip(prefixes, np.split(patches, ends[:-1]), strict=True))


class TokenFile:
    """Rows of tokens in a file without a name: the system removes it with the process, whatever ends that.

    Args:
        folder: of the file; None for the system's folder for temporary files.
    """

    def __init__(self, folder: Path | None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed with the object
        self._dimensions = 0
        self.count = 0

    def append(self, tokens: NDArray[np.float32]) -> slice:
        """Write rows (m, D) behind the others; where they are.

        Raises:
            LostregError: if they are not finite: no head is trained on such, nor measured.
        """
        if not np.isfinite(tokens).all():
            raise LostregError("expected finite tokens: try --precision fp32")
        self._file.write(np.ascontiguousarray(tokens, np.float32).data)
        self._dimensions = tokens.shape[1]
        self.count += len(tokens)
        return slice(self.count - len(tokens), self.count)

    def rows(self) -> NDArray[np.float32]:
        """All rows (n, D), mapped from the file."""
        self._file.flush()
        return np.memmap(self._file, np.float32, "r", shape=(self.count, self._dimensions))


@dataclass
class Collected:
    """What heads are trained and measured on.

    Attributes:
        training: rows to train on.
        images: the image that each of them is of, an array an image.
        targets: of each of them, likewise.
        measuring: rows of images that are measured on; the same file for tokens of whole images.
        spans: where each image's are among these.
        frames: of each image's patches.
        readable: places of the images that could be read.
        errors: why others could not.
    """

    training: TokenFile
    measuring: TokenFile
    images: list[NDArray[np.int64]] = field(default_factory=list)
    targets: list[Targets] = field(default_factory=list)
    spans: dict[int, slice] = field(default_factory=dict)
    frames: dict[int, Frame] = field(default_factory=dict)
    readable: list[int] = field(default_factory=list)
    errors: list[ImageError] = field(default_factory=list)


def collect_tokens(
    discoverer: Discoverer, data: ProbeData, kind: str, folder: Path | None, on_progress: OnProgress
) -> Collected:
    """Run all images once, and keep of each what the task needs.

    Args:
        discoverer: how images are read, and the backbone.
        data: of the task.
        kind: which tokens of the whole image stand for it where it has a class: ``cls``, ``mean`` or ``cls+mean``.
        folder: of the files.
        on_progress: called after each image.

    Raises:
        LostregError: if tokens are not finite.
    """
    forward = Forward(discoverer.backbone, compiled=discoverer.options.compile)
    outcomes = discoverer.stream_of(TokensJob(forward)).outcomes(data.images)
    training = TokenFile(folder)
    whole = not data.maps
    kept = Collected(training, training if whole else TokenFile(folder))
    trained = len(data.images) if data.held_out is None else int((~data.held_out).sum())
    for number, outcome in enumerate(telling(outcomes, len(data.images), on_progress, "features")):
        if isinstance(outcome, ImageError):
            kept.errors.append(outcome)
            continue
        kept.readable.append(number)
        if whole:
            kept.spans[number] = training.append(whole_image(outcome, kind)[None])
            kept.targets.append(data.labels[number : number + 1])
            kept.images.append(np.array([number]))
            continue
        if data.held_out is None or not data.held_out[number]:
            _keep_some(kept, number, outcome, data, -(-MOST_TOKENS // trained))
        if data.held_out is None or data.held_out[number]:
            kept.spans[number] = kept.measuring.append(outcome.patches)
            kept.frames[number] = outcome.frame
    return kept


def whole_image(tokens: ImageTokens, kind: str) -> NDArray[np.float32]:
    """What stands for an image: CLS, the mean of its patches, or both, (D,) or (2 D,)."""
    parts = {"cls": tokens.prefix[:1], "mean": tokens.patches.mean(axis=0, keepdims=True)}
    return np.concatenate([parts[name][0] for name in kind.split("+")])


def _keep_some(kept: Collected, number: int, tokens: ImageTokens, data: ProbeData, most: int) -> None:
    """Of an image's patches that anything is known of, so many at most, drawn alike whatever surrounds the image."""
    answer = data.read_map(number)
    if data.task == "segmentation":
        targets = class_shares(answer, tokens.frame, len(data.classes))
        known = np.flatnonzero(targets.sum(axis=1) > 0)
    else:
        targets = mean_depths(answer, tokens.frame)
        known = np.flatnonzero(targets[:, 1] > 0)
    drawn = np.sort(np.random.default_rng(number).permutation(known)[:most])
    kept.training.append(tokens.patches[drawn])
    kept.targets.append(targets[drawn])
    kept.images.append(np.full(len(drawn), number))
