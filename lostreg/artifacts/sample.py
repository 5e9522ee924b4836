"""A second look at some images, once it is known which tokens are outliers: what they hold, and how LOST sees them.

Tokens are those that users of a backbone get: of the last layer, after its final norm where it has one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lostreg.artifacts.gram import GramView, GramViews, view_gram
from lostreg.artifacts.norms import TokenNorms
from lostreg.artifacts.probes import (
    ClassProbe,
    PixelProbe,
    PositionProbe,
    Skipped,
    probe_classes,
    probe_pixels,
    probe_position,
)
from lostreg.errors import LostregError
from lostreg.images.decode import ImageSource
from lostreg.inference.discoverer import Discoverer
from lostreg.inference.jobs import LookJob
from lostreg.models.forward import Forward, Grid
from lostreg.progress import OnProgress, Progress, telling

RASTER: Final = 16  # cells across and down that the position probe tells apart
TOKENS: Final = 32  # of each kind that are drawn from an image for probes of position and pixels
EXAMPLES: Final = 4
_AS_MANY: Final = "normal, as many of the same images"
_OUTLIER: Final = "one outlier token"


@dataclass(frozen=True)
class Example:
    """An image to be shown.

    Attributes:
        pixels: RGB (h, w, 3), uint8, with the backbone's mean colour where the last patches reach beyond the image's
            right and bottom edges.
        norms: of its patches at the output, before the final norm, (rows, columns).
        outliers: which of them are outliers, (rows, columns), bool.
        degrees: connections of each patch in LOST, (rows, columns), int64.
        degrees_normal: the same with outliers out of the graph; -1 at outliers. None without outliers.
    """

    pixels: NDArray[np.uint8]
    norms: NDArray[np.float32]
    outliers: NDArray[np.bool_]
    degrees: NDArray[np.int64]
    degrees_normal: NDArray[np.int64] | None


@dataclass(frozen=True)
class Sample:
    """What was measured on the sample.

    Attributes:
        images: how many could be read.
        affected: how many of them have outliers.
        outliers: how many patches are outliers.
        position: how well the position can be read off tokens, by kind of token.
        pixels: the same for the pixels of the patch, which are normalised as the backbone takes them.
        classes: the same for the class of the image, by kind; or why not.
        gram: how LOST sees the patches: `GramView` of all of them, mean over ``viewed``.
        gram_normal: the same of the same images with outliers left out; None without outliers.
        examples: images to be shown, those with the most outliers first.
        viewed: places in the sample of the images behind the Gram views: those with outliers, or all where none has
            any, or those of the measurement that this one is compared with.
        shown: of the examples.
        classed: of the images behind the classes.
    """

    images: int
    affected: int
    outliers: int
    position: dict[str, PositionProbe | Skipped]
    pixels: dict[str, PixelProbe | Skipped]
    classes: dict[str, ClassProbe | Skipped] | Skipped
    gram: GramView
    gram_normal: GramView | None
    examples: tuple[Example, ...]
    viewed: tuple[int, ...]
    shown: tuple[int, ...]
    classed: tuple[int, ...]


@dataclass(frozen=True)
class _Seen:
    """One image of the sample."""

    norms: TokenNorms
    tokens: NDArray[np.float32]  # after the final norm, prefix first, (prefix + N, D)
    pixels: NDArray[np.float32]  # normalised, (N, P)
    features: Tensor  # that LOST sees, (N, D)


@dataclass
class _Drawn:
    """Tokens of one kind for the probes of position and pixels, a list entry an image."""

    tokens: list[NDArray[np.float32]] = field(default_factory=list)
    pixels: list[NDArray[np.float32]] = field(default_factory=list)
    cells: list[NDArray[np.int64]] = field(default_factory=list)
    images: list[NDArray[np.int64]] = field(default_factory=list)

    def add(self, number: int, seen: _Seen, chosen: NDArray[np.int64]) -> None:
        height, width = seen.norms.grid
        rows, columns = chosen // width, chosen % width
        raster = np.stack([(rows + 0.5) * RASTER / height, (columns + 0.5) * RASTER / width], axis=1)
        self.tokens.append(seen.tokens[seen.norms.prefix :][chosen])
        self.pixels.append(seen.pixels[chosen])
        self.cells.append(raster.astype(np.int64))
        self.images.append(np.full(len(chosen), number))

    def probe(self) -> tuple[PositionProbe | Skipped, PixelProbe | Skipped]:
        if not self.tokens:
            nothing = Skipped("there are no such tokens")
            return nothing, nothing
        tokens, images = np.concatenate(self.tokens), np.concatenate(self.images)
        position = probe_position(tokens, np.concatenate(self.cells), images)
        return position, probe_pixels(tokens, np.concatenate(self.pixels), images)


class _Collection:
    """What is kept of the images of the sample."""

    def __init__(self, discoverer: Discoverer, cutoff: float | None, seed: int, like: Sample | None) -> None:
        self._discoverer = discoverer
        self._like = like
        self._cutoff = np.inf if cutoff is None else cutoff
        self._random = np.random.default_rng(seed)
        self.images = self.affected = self.outliers = 0
        self._drawn = {kind: _Drawn() for kind in ("outlier", _AS_MANY, "normal")}
        self._one: dict[str, list[NDArray[np.float32]]] = {}
        self._labels: list[str] = []
        self._labelled: list[int] = []
        self._views: dict[int, tuple[GramView, GramView | None]] = {}
        self._examples: list[tuple[int, int, Example]] = []

    def add(self, number: int, seen: _Seen, label: str | None) -> None:
        outlier = seen.norms.output.astype(np.float64) >= self._cutoff
        count = int(outlier.sum())
        places = {"outlier": np.flatnonzero(outlier), "normal": np.flatnonzero(~outlier)}
        shuffled = {kind: self._random.permutation(found) for kind, found in places.items()}
        chosen = {kind: found[:TOKENS] for kind, found in shuffled.items()}
        chosen[_AS_MANY] = chosen["normal"][: len(chosen["outlier"])]
        for kind, found in chosen.items():
            if len(found):
                self._drawn[kind].add(number, seen, found)
        if label is not None:
            self._add_one_of_each(seen, shuffled, label)
            self._labelled.append(number)
        views = view_gram(
            seen.features,
            seen.norms.grid,
            outlier,
            self._discoverer.options.bias,
            self._discoverer.options.k_patches,
            normalize=self._discoverer.options.normalize,
        )
        self._views[number] = (views.every, views.normal)
        if self._like is None or number in self._like.shown:
            rank = -count if self._like is None else self._like.shown.index(number)
            self._examples.append((rank, number, self._example(seen, outlier, views)))
            self._examples = sorted(self._examples, key=lambda entry: entry[:2])[:EXAMPLES]
        self.images += 1
        self.affected += bool(count)
        self.outliers += count

    def _add_one_of_each(self, seen: _Seen, places: dict[str, NDArray[np.int64]], label: str) -> None:
        prefix, patches = seen.tokens[: seen.norms.prefix], seen.tokens[seen.norms.prefix :]
        kinds = dict(zip(self._discoverer.backbone.prefix_names, prefix, strict=True))
        kinds["mean of patches"] = patches.mean(axis=0)
        for kind, found in places.items():
            nothing = np.full(patches.shape[1], np.nan, np.float32)
            kinds[f"one {kind} token"] = patches[found[0]] if len(found) else nothing
        for kind, token in kinds.items():
            self._one.setdefault(kind, []).append(token)
        self._labels.append(label)

    def _example(self, seen: _Seen, outlier: NDArray[np.bool_], views: GramViews) -> Example:
        backbone, grid = self._discoverer.backbone, seen.norms.grid
        patch = backbone.spec.patch_size
        std, mean = (np.array(values, np.float32) for values in (backbone.std, backbone.mean))
        pixels = seen.pixels.reshape(*grid, patch, patch, 3) * std + mean
        image = pixels.transpose(0, 2, 1, 3, 4).reshape(grid[0] * patch, grid[1] * patch, 3)
        return Example(
            (image * 255).round().clip(0, 255).astype(np.uint8),
            seen.norms.output.reshape(grid),
            outlier.reshape(grid),
            views.degrees.reshape(grid),
            None if views.degrees_normal is None else views.degrees_normal.reshape(grid),
        )

    def finish(self, on_progress: OnProgress) -> Sample:
        kinds = list(self._drawn) if self.outliers else ["outlier", "normal"]
        found = {}
        for done, kind in enumerate(kinds, start=1):
            found[kind] = self._drawn[kind].probe()
            on_progress(Progress(done, len(kinds) + 1, step="probes"))
        classes, classed = self._classes()
        on_progress(Progress(len(kinds) + 1, len(kinds) + 1, step="probes"))
        viewed = self._viewed()
        every, normal = zip(*(self._views[number] for number in viewed), strict=True)
        without = [view for view in normal if view is not None]
        return Sample(
            images=self.images,
            affected=self.affected,
            outliers=self.outliers,
            position={kind: position for kind, (position, _) in found.items()},
            pixels={kind: pixels for kind, (_, pixels) in found.items()},
            classes=classes,
            gram=GramView.average(every),
            gram_normal=GramView.average(without) if without else None,
            examples=tuple(example for _, _, example in self._examples),
            viewed=viewed,
            shown=tuple(number for _, number, _ in self._examples),
            classed=classed,
        )

    def _viewed(self) -> tuple[int, ...]:
        if self._like is not None:
            alike = tuple(number for number in self._like.viewed if number in self._views)
            if alike:
                return alike
        return tuple(number for number, (_, normal) in self._views.items() if normal is not None) or tuple(self._views)

    def _classes(self) -> tuple[dict[str, ClassProbe | Skipped] | Skipped, tuple[int, ...]]:
        """All kinds over the same images: those with outliers, where there are enough of them; and which these are."""
        if not self._labels:
            return Skipped("no image has a class: expected one sub-folder a class, or annotations"), ()
        kinds = {kind: np.stack(tokens) for kind, tokens in self._one.items()}
        if self._like is not None and self._like.classed:
            chosen = np.isin(self._labelled, self._like.classed)
            return self._probe_classes({kind: tokens for kind, tokens in kinds.items() if kind != _OUTLIER}, chosen)
        every = np.ones(len(self._labels), bool)
        with_outliers = self._probe_classes(kinds, every)
        if not isinstance(with_outliers[0], Skipped):
            return with_outliers
        others = {kind: tokens for kind, tokens in kinds.items() if kind != _OUTLIER}
        found, classed = self._probe_classes(others, every)
        if not isinstance(found, Skipped) and self.outliers:
            found[_OUTLIER] = Skipped(f"of images with outliers it {with_outliers[0].reason}")
        return found, classed

    def _probe_classes(
        self, kinds: dict[str, NDArray[np.float32]], chosen: NDArray[np.bool_]
    ) -> tuple[dict[str, ClassProbe | Skipped] | Skipped, tuple[int, ...]]:
        """Of the chosen images, those that have a token of every kind."""
        chosen = chosen & np.isfinite(np.concatenate(list(kinds.values()), axis=1)).all(axis=1)
        found = probe_classes({kind: tokens[chosen] for kind, tokens in kinds.items()}, np.array(self._labels)[chosen])
        if isinstance(found, Skipped):
            return found, ()
        return dict(found), tuple(np.asarray(self._labelled)[chosen].tolist())


def look_inside(
    images: Sequence[ImageSource],
    discoverer: Discoverer,
    forward: Forward,
    cutoff: float | None,
    labels: Sequence[str | None] | None,
    seed: int,
    like: Sample | None,
    on_progress: OnProgress,
) -> Sample:
    """Run the sample, and measure.

    Args:
        images: of the sample, at least one of which can be read.
        discoverer: how they are read, and the feature, layer and bias of LOST's view.
        forward: of its backbone.
        cutoff: norm from which a patch is an outlier; None for none.
        labels: the class of each image, None where it is not known; None for no classes at all.
        seed: of the tokens that are drawn.
        like: what was measured on the same sample before, to be compared with; or None.
        on_progress: called after each image and each group of probes.

    Raises:
        LostregError: if no image can be read again.
    """
    kept = _Collection(discoverer, cutoff, seed, like)
    look = _Look(discoverer)
    outcomes = discoverer.stream_of(LookJob(forward, look)).outcomes(images)
    for number, outcome in enumerate(telling(outcomes, len(images), on_progress, "sample")):
        if isinstance(outcome, _Seen):
            kept.add(number, outcome, labels[number] if labels else None)
    if not kept.images:
        raise LostregError(f"none of the {len(images)} images of the sample could be read a second time")
    return kept.finish(on_progress)


class _Look:
    """Norms, final tokens, pixels and LOST's features of a pack, from one forward."""

    def __init__(self, discoverer: Discoverer) -> None:
        self._feature, self._layer = discoverer.options.feature, discoverer.options.layer

    def __call__(self, forward: Forward, pixels: list[Tensor], grids: Sequence[Grid]) -> list[_Seen]:
        walk = forward.start(pixels, grids)
        layers: list[Tensor] = []
        features = walk.tokens
        while walk.layer < forward.backbone.depth:
            at_layer = walk.layer == self._layer
            if at_layer and self._feature != "out":
                features = walk.patches(forward.project(walk, self._feature))
            forward.advance(walk)
            if at_layer and self._feature == "out":
                features = walk.patches(forward.output(walk))
            layers.append(torch.linalg.vector_norm(walk.tokens, dim=1))
        norms, tokens = torch.stack(layers).cpu().numpy(), forward.output(walk).float().cpu().numpy()
        sizes = [rows * columns for rows, columns in grids]
        return [
            _Seen(
                TokenNorms(norms[:, span].copy(), np.linalg.norm(tokens[span], axis=1), walk.prefix, grid),
                tokens[span].copy(),
                image.float().cpu().numpy(),
                seen,
            )
            for span, grid, image, seen in zip(
                walk.packing.spans, grids, pixels, torch.split(features, sizes), strict=True
            )
        ]
