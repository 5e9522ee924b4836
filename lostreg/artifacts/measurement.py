"""One streamed pass over images for the norms of their tokens, and a second look at some of them.

The pass keeps histograms, never tokens: its memory does not grow with the number of images. Only at its end is it known
from which norm on tokens are outliers. What these hold and how LOST sees them is measured on a sample of the images,
which are run once more.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from lostreg import defaults
from lostreg.artifacts.norms import TokenNorms, emergence, token_norms
from lostreg.artifacts.outliers import Cutoff, CutoffRule, NormTally, find_cutoff
from lostreg.artifacts.sample import Sample, look_inside
from lostreg.checks import whole_seed
from lostreg.errors import ImageError, LostregError, OptionError
from lostreg.images.decode import ImageSource, listed
from lostreg.inference.discoverer import Discoverer, check_discoverer
from lostreg.inference.jobs import LookJob
from lostreg.inference.stream import draw_sample
from lostreg.models.forward import Forward, Grid
from lostreg.progress import OnProgress, telling

CELLS: Final = 32  # of the heat map, across and down
COSINE_BINS: Final = 80  # from -1 to 1


@dataclass
class Pass:
    """What is left of a pass over images.

    Attributes:
        layers: norms of patches as they leave each block, before any final norm.
        final: norms of patches after the final LayerNorm.
        prefix: mean norms of the prefix tokens as they leave each block, shape (layers, prefix).
        heat: of each bin of the output's norms, how many patches lie in each cell of the image, (bins, CELLS, CELLS); a
            patch over several cells counts in each with its share.
        cosines: of each bin, the cosine similarities of patches to their neighbours, (bins, COSINE_BINS).
        cosine_sums: of each bin, their sum, and how many they are, (bins, 2).
        images: how many could be read.
        errors: of those that could not.
    """

    layers: list[NormTally]
    final: NormTally
    prefix: NDArray[np.float64]
    heat: NDArray[np.float64]
    cosines: NDArray[np.int64]
    cosine_sums: NDArray[np.float64]
    images: int = 0
    errors: list[ImageError] = field(default_factory=list)

    @classmethod
    def empty(cls, depth: int, prefix: int, rule: CutoffRule) -> "Pass":
        """Before the first image."""
        edge = rule.value if rule.kind == "number" else None
        layers = [NormTally(edge) for _ in range(depth)]
        bins = len(layers[-1].counts)
        return cls(
            layers,
            NormTally(edge),
            np.zeros((depth, prefix)),
            np.zeros((bins, CELLS, CELLS)),
            np.zeros((bins, COSINE_BINS), np.int64),
            np.zeros((bins, 2)),
        )

    def add(self, norms: TokenNorms, cosines: NDArray[np.float32]) -> None:
        """One more image.

        Args:
            norms: of its tokens.
            cosines: see `neighbour_cosines`.

        Raises:
            LostregError: if a norm is not finite.
        """
        if not (np.isfinite(norms.layers).all() and np.isfinite(norms.final).all()):
            raise LostregError("some norms are not finite: the model's weights are broken, or need another precision")
        for tally, layer in zip(self.layers, norms.layers[:, norms.prefix :], strict=True):
            tally.add(layer)
        self.final.add(norms.final[norms.prefix :])
        self.images += 1
        self.prefix += (norms.layers[:, : norms.prefix] - self.prefix) / self.images
        bins = self.layers[-1].bins(norms.output)
        used, place = np.unique(bins, return_inverse=True)
        members = np.zeros((len(used), *norms.grid))
        members.reshape(len(used), -1)[place, np.arange(bins.size)] = 1
        down, across = (cell_shares(side, CELLS) for side in norms.grid)
        self.heat[used] += down.T @ members @ across
        known = np.isfinite(cosines)
        places = np.clip(((cosines[known] + 1) * (COSINE_BINS / 2)).astype(np.int64), 0, COSINE_BINS - 1)
        np.add.at(self.cosines, (bins[known], places), 1)
        np.add.at(self.cosine_sums[:, 0], bins[known], cosines[known])
        np.add.at(self.cosine_sums[:, 1], bins[known], 1)

    def split(self, counts: NDArray[Any], cutoff: float) -> tuple[NDArray[Any], NDArray[Any]]:
        """Sums over the bins from a cut-off on, which is an edge of the tallies, and over those below."""
        first = len(counts) if math.isinf(cutoff) else int(self.layers[-1].bins(np.array([cutoff]))[0])
        return counts[first:].sum(axis=0), counts[:first].sum(axis=0)


@dataclass(frozen=True)
class Measurement:
    """Everything that was measured on one backbone.

    Attributes:
        title: its name and its test-time registers, for people.
        backbone: its name.
        weights: where its weights came from.
        prefix_names: of the tokens in front of the patches.
        registers: test-time registers, as plain values; None without.
        feature: that LOST's view is of.
        layer: of that feature, from 0.
        seen: the pass over all images.
        cutoff: from which norm on tokens are outliers, if there are any.
        emerges: the layer at which they do; None without.
        sample: what they hold, and how LOST sees them.
    """

    title: str
    backbone: str
    weights: str
    prefix_names: tuple[str, ...]
    registers: dict[str, Any] | None
    feature: str
    layer: int
    seen: Pass
    cutoff: Cutoff
    emerges: int | None
    sample: Sample

    def cosine_histograms(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Similarities to the neighbours, of outliers and of the others, (COSINE_BINS,) each, from -1 to 1."""
        outliers, others = self.seen.split(self.seen.cosines, self._first())
        return outliers, others

    def cosine_means(self) -> tuple[float | None, float | None]:
        """Their means; None where there are none."""
        sides = self.seen.split(self.seen.cosine_sums, self._first())
        outliers, others = (float(total / count) if count else None for total, count in sides)
        return outliers, others

    def _first(self) -> float:
        return math.inf if self.cutoff.value is None else self.cutoff.value

    @property
    def outliers(self) -> int:
        """How many patches are outliers."""
        return 0 if self.cutoff.value is None else self.seen.layers[-1].above(self.cutoff.value)

    @property
    def patches(self) -> int:
        """How many patches there are."""
        return self.seen.layers[-1].count


def measure(
    images: Iterable[ImageSource],
    discoverer: Discoverer,
    *,
    rule: CutoffRule | None = None,
    labels: Sequence[str | None] | None = None,
    sample: int = defaults.ARTIFACT_IMAGES,
    seed: int = 0,
    like: Measurement | None = None,
    on_progress: OnProgress = lambda _: None,
) -> Measurement:
    """Find a backbone's high-norm tokens, where they sit, what they hold, and how LOST sees them.

    Args:
        images: files, PIL images or arrays, as `Discoverer.discover` takes them; run once, a sample of them twice.
        discoverer: the backbone with or without test-time registers, how images are read, and the feature, layer and
            bias of LOST's view.
        rule: which tokens are outliers, see `find_cutoff`; None looks for a second mode of the norms.
        labels: the class of each image, None where it is not known; None for no classes at all.
        sample: how many images to look at twice, at least 1; of more that can be read, a random sample.
        seed: of that sample and of the tokens drawn from it.
        like: an earlier measurement of the same images with the same sample and seed, to be compared with: LOST's view,
            classes and examples are then of the same images as there.
        on_progress: called after each image of each step, and each group of probes.

    Raises:
        OptionError: if there are no images, a number is out of range, or labels and images differ in number.
        LostregError: if no image can be read, or a norm is not finite.

    Example:
        >>> discoverer = lostreg.Discoverer("dinov2_vits14_reg", device="cpu")
        >>> found = lostreg.artifacts.measure(["dog.jpg"], discoverer)
        >>> found.patches, found.emerges
        (88, None)
    """
    check_discoverer(discoverer, "images and then a Discoverer")
    images, rule = listed(images), rule or CutoffRule("auto")
    if labels is not None and len(labels) != len(images):
        raise OptionError(f"expected one label an image, not {len(labels)} for {len(images)}")
    draw_sample(images, sample, seed)  # an option out of range costs no pass
    seed = whole_seed(seed)
    backbone = discoverer.backbone
    seen = Pass.empty(backbone.depth, backbone.prefix_tokens, rule)
    forward = Forward(backbone, compiled=discoverer.options.compile)
    readable: list[int] = []
    outcomes = discoverer.stream_of(LookJob(forward, _look)).outcomes(images)
    for index, outcome in enumerate(telling(outcomes, len(images), on_progress, "norms")):
        if isinstance(outcome, ImageError):
            seen.errors.append(outcome)
        else:
            seen.add(*outcome)
            readable.append(index)
    if not seen.images:
        raise LostregError(f"none of {len(images)} images could be read: {seen.errors[0]}")
    cutoff = find_cutoff(seen.layers[-1], rule)
    drawn = draw_sample(readable, sample, seed)
    found = look_inside(
        [images[index] for index in drawn],
        discoverer,
        forward,
        cutoff.value,
        [labels[index] for index in drawn] if labels else None,
        seed,
        like.sample if like else None,
        on_progress,
    )
    return Measurement(
        title=backbone.title,
        backbone=backbone.spec.name,
        weights=backbone.weights,
        prefix_names=tuple(backbone.prefix_names),
        registers=backbone.registers.describe() if backbone.registers else None,
        feature=discoverer.options.feature,
        layer=discoverer.options.layer,
        seen=seen,
        cutoff=cutoff,
        emerges=None if cutoff.value is None else emergence(seen.layers, cutoff.value),
        sample=found,
    )


def cell_shares(side: int, cells: int) -> NDArray[np.float64]:
    """Which share of each of ``side`` patches in a row lies in each of ``cells`` cells over the same length.

    Returns:
        Shape (side, cells); rows sum to 1.
    """
    patches, edges = np.arange(side)[:, None] / side, np.arange(cells) / cells
    overlap = np.minimum(patches + 1 / side, edges + 1 / cells) - np.maximum(patches, edges)
    shares: NDArray[np.float64] = overlap.clip(min=0) * side
    return shares


def neighbour_cosines(embedded: Tensor, grid: Grid) -> Tensor:
    """Each patch's mean cosine similarity to its neighbours above, below, left and right, as far as there are any.

    Args:
        embedded: patches right after the patch embedding, shape (N, D).
        grid: (h, w); N = h * w.

    Returns:
        Shape (N,), float32; NaN where the patch is the only one.
    """
    image = functional.normalize(embedded.float(), dim=1).view(*grid, -1)
    down, right = (image[1:] * image[:-1]).sum(dim=2), (image[:, 1:] * image[:, :-1]).sum(dim=2)
    total = functional.pad(down, (0, 0, 0, 1)) + functional.pad(down, (0, 0, 1, 0))
    total = total + functional.pad(right, (0, 1)) + functional.pad(right, (1, 0))
    pairs = functional.pad(torch.ones_like(down), (0, 0, 0, 1)) + functional.pad(torch.ones_like(down), (0, 0, 1, 0))
    pairs = pairs + functional.pad(torch.ones_like(right), (0, 1)) + functional.pad(torch.ones_like(right), (1, 0))
    return (total / pairs).flatten()


def _look(
    forward: Forward, pixels: list[Tensor], grids: Sequence[Grid]
) -> list[tuple[TokenNorms, NDArray[np.float32]]]:
    cosines = [neighbour_cosines(forward.embed_patches(image), grid) for image, grid in zip(pixels, grids, strict=True)]
    norms = token_norms(forward, pixels, grids)
    return [(found, cosine.cpu().numpy()) for found, cosine in zip(norms, cosines, strict=True)]
