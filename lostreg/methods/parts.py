"""Parts beside LOST's trials: clusters of an image's patches, cut into connected pieces, are candidates too.

LOST asks what is connected to one seed. Here the features themselves are parted, coarsely and, for further objects,
finely:

    Z = X V₄, X = F - mean(F), V₄ a basis of the four directions of largest variance        (principal components)
    labels_K = k-means of the rows of Z into K clusters, from farthest points: K = 2, 3, 4; and 6, 8 for further objects
    candidates = LOST's objects, and each 4-connected piece of a cluster
    objects = candidates by rank, without those whose box overlaps a better one's; the main one is no piece of 6 or 8

Distances between rows of Z are the same for any basis of the same directions, so no single component is needed. Shapes:
B images, N = h*w patches row by row, D dimensions. Memory grows with N*D, never with N².
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final, NamedTuple, cast

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from lostreg.defaults import OVERLAP
from lostreg.images.boxes import pairwise_iou
from lostreg.methods.bias import on_device
from lostreg.methods.exact import exact_float32
from lostreg.methods.learned import taught_ranks
from lostreg.methods.lost import Candidates, Objects, tight_boxes
from lostreg.methods.objectness import Contrasts, contrasts, object_scores, size_factor

CLUSTERS: Final = (2, 3, 4)
FINE_CLUSTERS: Final = (6, 8)  # whose pieces are further objects alone: small ones win too often
_COMPONENTS: Final = 4
_POWER_STEPS: Final = 8
_LLOYD_STEPS: Final = 10
_RESOLUTION: Final = 1e-5  # of float32: shares below are rounding
_LEAST_PATCHES: Final = 4  # of a part
_LARGEST_SHARE: Final = 0.9  # of the image
_MOST_PARTS: Final = 64  # of an image, of either kind: the largest
_MOST_TOLD: Final = 12  # candidates that a result tells of
_LEAST_SIZE: Final = 1e-6  # so that an image that is all object can be divided by it

Mask = NDArray[np.bool_]


@torch.no_grad()
def part_labels(features: Tensor, *, several: bool = False) -> Tensor:
    """Clusters of each image's patches, from coarse to fine.

    Args:
        features: shape (B, N, D), float32, rows of length 1.
        several: whether several objects are wanted.

    Returns:
        For each number of `CLUSTERS`, for several objects of `FINE_CLUSTERS`, too, the cluster of each patch, shape
        (B, 3 or 5, N), uint8, on the device of the features. Nothing is told of features that are not finite: their
        labels mean nothing.
    """
    with exact_float32(features.device):
        return _cluster(_principal_components(_centred(features)), _numbers(several))


@torch.no_grad()
def labels_of_pack(runs: Sequence[Tensor], *, several: bool = False) -> list[Tensor]:
    """`part_labels` of images of several grids; on a GPU, which would wait for the host to queue each step, together.

    Args:
        runs: of images of one grid each, as `part_labels` takes them.
        several: as there.
    """
    if runs[0].device.type == "cpu" or len(runs) == 1:
        return [part_labels(features, several=several) for features in runs]
    with exact_float32(runs[0].device):
        return _padded_labels(runs, _numbers(several))


def _numbers(several: bool) -> tuple[int, ...]:
    return CLUSTERS + FINE_CLUSTERS if several else CLUSTERS


def _padded_labels(runs: Sequence[Tensor], numbers: tuple[int, ...]) -> list[Tensor]:
    sizes, counts = [len(features) for features in runs], [features.shape[1] for features in runs]
    most = max(counts)
    padded = torch.cat([functional.pad(_centred(one), (0, 0, 0, most - one.shape[1])) for one in runs])
    patches = torch.cat([padded.new_full((size,), count) for size, count in zip(sizes, counts, strict=True)])
    present = torch.arange(most, device=padded.device) < patches[:, None]
    labels = torch.split(_cluster(_principal_components(padded, patches), numbers, present), sizes)
    return [of_run[:, :, :count].contiguous() for of_run, count in zip(labels, counts, strict=True)]


def _centred(features: Tensor) -> Tensor:
    return features - features.mean(dim=1, keepdim=True)


def _principal_components(centred: Tensor, counts: Tensor | None = None) -> Tensor:
    """Each patch in the four directions of largest variance, (B, N, D) to (B, 4, N), by subspace iteration.

    Counts, shape (B,), say how many of the N are patches; what follows them is zero.
    """
    batch, count, dimensions = centred.shape
    # A start that is the same for all images and whatever the order of patches: no patch's own vector.
    numbers = torch.arange(_COMPONENTS * dimensions, device=centred.device, dtype=torch.float32)
    basis = (0.37 * numbers.square()).sin().view(1, _COMPONENTS, dimensions).expand(batch, -1, -1)
    for _ in range(_POWER_STEPS):
        basis = _orthonormal((basis @ centred.mT) @ centred)  # V <- orthonormal(V XᵀX)
    components = basis @ centred.mT
    length = torch.linalg.vector_norm(components, dim=2, keepdim=True)
    spread = length / count**0.5 if counts is None else length / counts.sqrt().view(-1, 1, 1)
    return components.where(spread > _RESOLUTION, 0)  # what varies less is rounding


def _orthonormal(basis: Tensor) -> Tensor:
    """V <- L⁻¹ V for V Vᵀ = L Lᵀ, which asks nothing of the device; (B, C, D). What has no length stays so."""
    gram = basis @ basis.mT
    least = _RESOLUTION * gram.diagonal(dim1=1, dim2=2).mean(dim=1) + torch.finfo(torch.float32).tiny
    gram.diagonal(dim1=1, dim2=2).add_(least[:, None])  # rows that depend on each other would have no L
    lower = torch.linalg.cholesky_ex(gram).L
    return cast("Tensor", torch.linalg.solve_triangular(lower, basis, upper=False))


def _cluster(points: Tensor, numbers: tuple[int, ...], present: Tensor | None = None) -> Tensor:
    """k-means for each number of clusters at once, (B, C, N) to (B, numbers, N), from starts that they share.

    Points that are not present, (B, N), have no say.
    """
    most = numbers[-1]
    places = torch.arange(most, device=points.device, dtype=torch.uint8)
    unused = places >= on_device(numbers, points.device)[:, None]  # (numbers, most)
    centres = _farthest_points(points, most, present)[:, None].expand(-1, len(numbers), -1, -1)
    for _ in range(_LLOYD_STEPS):
        members = _nearest(points, centres, unused)[:, :, None] == places[:, None]  # (B, numbers, most, N)
        members = (members if present is None else members & present[:, None, None]).float()
        sizes = members.sum(dim=3, keepdim=True)
        means = members @ points[:, None].mT / sizes.clamp(min=1)
        centres = torch.where(sizes > 0, means, centres)
    return _nearest(points, centres, unused)


def _farthest_points(points: Tensor, count: int, present: Tensor | None) -> Tensor:
    """The point farthest from the mean, and again the one farthest from all before; of equal ones the first.

    Points (B, C, N) of mean 0, to (B, count, C).
    """
    distance = points.square().sum(dim=1)
    chosen: list[Tensor] = []
    for _ in range(count):
        reach = distance if present is None else distance.masked_fill(~present, -1)
        farthest = reach.argmax(dim=1)[:, None, None].expand(-1, points.shape[1], 1)
        point = points.gather(2, farthest)
        own = (points - point).square().sum(dim=1)
        distance = torch.minimum(distance, own) if chosen else own
        chosen.append(point[..., 0])
    return torch.stack(chosen, dim=1)


def _nearest(points: Tensor, centres: Tensor, unused: Tensor) -> Tensor:
    """The nearest centre of each point, (B, C, N) and (B, 5, most, C) to (B, 5, N), uint8; of equal ones the first."""
    # |z - c|² = |z|² - 2 z·c + |c|², of which the first is the same for all centres
    distances = centres.square().sum(dim=3, keepdim=True) - 2 * centres @ points[:, None]
    distances = distances.masked_fill(unused[..., None], torch.inf)
    least, nearest = distances[:, :, 0], torch.zeros_like(distances[:, :, 0], dtype=torch.uint8)
    for cluster in range(1, unused.shape[1]):
        nearest = nearest.masked_fill(distances[:, :, cluster] < least, cluster)
        least = torch.minimum(least, distances[:, :, cluster])
    return nearest


def part_masks(labels: NDArray[np.uint8], grid: tuple[int, int]) -> Mask:
    """The 4-connected pieces of the clusters of one image.

    Args:
        labels: shape (L, N): the cluster of each patch, of L clusterings.
        grid: (h, w), rows and columns of patches.

    Returns:
        Shape (P, h, w), bool, P from 0 to 64: pieces of at least 4 patches and at most 90 % of the image, each of them
        once; where there are more, the largest.
    """
    height, width = grid
    panels = [of_one == cluster for of_one in labels for cluster in range(of_one.max() + 1)]
    # One tall picture, as for LOST's components.
    tall = np.zeros((len(panels), height + 1, width), dtype=np.uint8)
    tall[:, :height] = np.reshape(panels, (-1, height, width))
    _, pieces, stats, _ = cv2.connectedComponentsWithStats(tall.reshape(-1, width), connectivity=4)
    areas = stats[:, cv2.CC_STAT_AREA]
    fits = (areas >= _LEAST_PATCHES) & (areas <= _LARGEST_SHARE * height * width)
    fits[0] = False  # what is in no panel
    chosen = np.flatnonzero(fits)
    chosen = chosen[np.argsort(-areas[chosen], kind="stable")[:_MOST_PARTS]]
    panel = stats[chosen, cv2.CC_STAT_TOP] // (height + 1)
    masks: Mask = pieces.reshape(tall.shape)[panel, :height] == chosen[:, None, None]
    return masks[_first_of_equal(masks)]


def _first_of_equal(masks: Mask) -> NDArray[np.int64]:
    """Places of the masks that equal none before them, in order."""
    packed = np.packbits(masks.reshape(len(masks), masks[0].size if len(masks) else 0), axis=1)
    places: NDArray[np.int64] = np.sort(np.unique(packed, axis=0, return_index=True)[1])
    return places


class Parted(NamedTuple):
    """What may be an object in one image.

    Attributes:
        masks: shape (P, h, w), bool, each once: what LOST found with each bias, then coarse parts, then fine ones.
        scores: of each, shape (P,), float32, see `lostreg.methods.objectness`.
        contrasts: of each, shape (P,); None where a score of a user's own stands alone.
        leading: how many of the first ones may be the main object.
    """

    masks: Mask
    scores: NDArray[np.float32]
    contrasts: Contrasts | None
    leading: int

    def ranks(self) -> NDArray[np.float32]:
        """By what they are chosen where nothing was taught: score times local contrast, shape (P,)."""
        return self.scores if self.contrasts is None else self.scores * self.contrasts.local

    def clear(self, taught: NDArray[np.float32] | None) -> NDArray[np.float32]:
        """What holds between images, shape (P,); taught ranks as for `ranked_objects`.

        score · apart / size^(1/2)        or, taught, rank · apart
        """
        if self.contrasts is None:
            return self.scores
        of_patches = self.scores / np.sqrt(size_factor(self.masks).clip(_LEAST_SIZE)) if taught is None else taught
        return (of_patches * self.contrasts.apart).astype(np.float32)


def candidate_masks(candidates: Candidates, labels: NDArray[np.uint8]) -> list[Parted]:
    """What may be an object in each image of a batch.

    Args:
        candidates: what LOST found, with K biases an image; the first K of the masks, whether they differ or not.
        labels: of the same images, shape (B, 3 or 5, N), as `part_labels` gives them.
    """
    parts, leading = [], []
    for trials, of_image in zip(candidates.masks, labels, strict=True):
        grid = trials.shape[1:]
        split = (of_image[: len(CLUSTERS)], of_image[len(CLUSTERS) :])
        coarse, fine = (part_masks(some, grid) if len(some) else trials[:0] for some in split)
        new = _first_of_equal(np.concatenate([trials, coarse, fine]))
        new = new[new >= len(trials)]
        parts.append(np.concatenate([trials, coarse, fine])[new])
        leading.append(len(trials) + int((new < len(trials) + len(coarse)).sum()))
    masks = [np.concatenate(pair) for pair in zip(candidates.masks, parts, strict=True)]
    scorer = candidates.maps.scorer
    if scorer is not object_scores:  # a user's own, which stands alone
        scored = [scorer(one[None], new[None])[0] for one, new in zip(candidates.features, parts, strict=True)]
        return [
            Parted(of_image, np.concatenate([of_trials, scores]), None, count)
            for of_image, of_trials, scores, count in zip(masks, candidates.scores, scored, leading, strict=True)
        ]
    with exact_float32(candidates.features.device):
        compared = _compare(candidates.features, masks)
    return [
        Parted(of_image, np.concatenate([of_trials, scores[len(of_trials) :]]), of_masks, count)
        for of_image, of_trials, (scores, of_masks), count in zip(
            masks, candidates.scores, compared, leading, strict=True
        )
    ]


def _compare(features: Tensor, images: Sequence[Mask]) -> list[tuple[NDArray[np.float32], Contrasts]]:
    """Scores and contrasts of each image's masks; of all images at once on a GPU, which would wait for the host."""
    if features.device.type == "cpu":
        batches = [(one[None], masks[None]) for one, masks in zip(features, images, strict=True)]
    else:
        padded = np.zeros((len(images), max(map(len, images)), *images[0].shape[1:]), dtype=np.bool_)
        for place, masks in zip(padded, images, strict=True):
            place[: len(masks)] = masks
        batches = [(features, padded)]
    rows = [
        row for some, masks in batches for row in zip(object_scores(some, masks), *contrasts(some, masks), strict=True)
    ]
    return [
        (scores[: len(masks)], Contrasts(apart[: len(masks)], local[: len(masks)]))
        for (scores, apart, local), masks in zip(rows, images, strict=True)
    ]


def find_parts(
    candidates: Candidates,
    labels: NDArray[np.uint8],
    max_objects: int,
    min_score: float,
    probabilities: NDArray[np.float32] | None = None,
) -> list[Objects]:
    """The objects of each image of a batch, among LOST's and the parts.

    Args:
        candidates: what LOST found, with the biases of ``auto``.
        labels: of the same images, shape (B, 3 or 5, N), as `part_labels` gives them.
        max_objects: at least 1.
        min_score: in [0, 1]; a further object with a lower score is left out.
        probabilities: how likely each patch is part of an object, see `lostreg.methods.learned`, shape (B, N), which
            then helps to rank the candidates. None for none.

    Returns:
        One `Objects` an image, with one object at least: see `ranked_objects`.
    """
    objects = []
    for image, parted in enumerate(candidate_masks(candidates, labels)):
        chances = None if probabilities is None else probabilities[image]
        taught = None if chances is None else taught_ranks(chances, parted.masks)
        one = ranked_objects(candidates, image, parted, taught, max_objects, min_score)
        if chances is not None:
            one = replace(one, objectness=chances.reshape(parted.masks.shape[1:]))
        objects.append(one)
    return objects


def ranked_objects(
    candidates: Candidates,
    image: int,
    parted: Parted,
    taught: NDArray[np.float32] | None,
    max_objects: int,
    min_score: float,
) -> Objects:
    """The best candidate of an image, and further ones whose boxes overlap none before them.

    Overlap is an intersection over union of `lostreg.defaults.OVERLAP` or more. The main object is the best of those
    that may lead, by what was taught if anything was; further ones are chosen by `Parted.ranks`. What an object's own
    score says has to hold between images, too: it is `Parted.clear`, and at most that of the main object, so that
    scores never rise from one object to the next; likewise a candidate's.

    Args:
        candidates: what LOST found.
        image: its place among them.
        parted: what may be an object.
        taught: see `lostreg.methods.learned.taught_ranks`, shape (P,); None for nothing.
        max_objects: at least 1.
        min_score: as for `find_parts`.

    Returns:
        At least one object. A box is that of the candidate; of its mask those patches are left out that belong to an
        object before it, which may be all of them. The seed of a part is its patch of lowest degree in LOST's first
        trial, whose bias and degrees stand for it.
    """
    masks, leading, boxes = parted.masks, parted.leading, tight_boxes(parted.masks)
    ranks = parted.ranks()
    lead = ranks if taught is None else taught
    main = int(lead[:leading].argmax())
    clear = parted.clear(taught)
    kept = _suppress(boxes, ranks, main, max_objects)
    told = _told(boxes, lead, kept)
    clear = np.minimum(clear, clear[main])
    enough = clear[kept] >= min_score
    enough[0] = True
    kept = kept[enough]
    kept = kept[np.argsort(-clear[kept], kind="stable")]
    own = masks[kept]
    own[1:] &= ~np.logical_or.accumulate(own, axis=0)[:-1]
    maps, trials = candidates.maps, candidates.masks.shape[1]
    degrees = maps.degrees[image, 0].numpy()
    lowest = [_lowest(degrees, mask.ravel()) for mask in masks[kept]]
    trial = np.minimum(kept, trials - 1)
    seeds = np.where(kept < trials, maps.seeds[image].numpy()[trial], lowest)
    height, width = masks.shape[1:]
    return Objects(
        xyxy=boxes[kept],
        scores=clear[kept],
        masks=own,
        heat=degrees.reshape(height, width),
        seeds=np.stack(np.divmod(seeds, width), axis=1),
        biases=maps.bias[image].numpy()[np.where(kept < trials, kept, 0)],
        candidates=np.column_stack([boxes[told], clear[told]]).astype(np.float32),
    )


def _told(boxes: NDArray[np.int64], ranks: NDArray[np.float32], kept: NDArray[np.int64]) -> NDArray[np.int64]:
    """Places of those that are kept and of the best others, see `Objects`, the best first."""
    order = np.concatenate([kept, np.argsort(-ranks, kind="stable")])
    order = order[np.sort(np.unique(boxes[order], axis=0, return_index=True)[1])][
        :_MOST_TOLD
    ]  # of equal boxes the first
    best: NDArray[np.int64] = order[np.argsort(-ranks[order], kind="stable")]
    return best


def _lowest(degrees: NDArray[np.int64], mask: Mask) -> int:
    """The patch of a mask that has the lowest degree, of equal ones the first."""
    places = np.flatnonzero(mask)
    return int(places[degrees[places].argmin()])


def _suppress(boxes: NDArray[np.int64], ranks: NDArray[np.float32], main: int, max_objects: int) -> NDArray[np.int64]:
    """Places of the candidates that are kept, the main one first and then by rank; of equal ranks the first."""
    kept: list[int] = []
    free = np.ones(len(boxes), dtype=bool)
    for place in (main, *np.argsort(-ranks, kind="stable")):
        if len(kept) == max_objects:
            break
        if free[place]:
            kept.append(place)
            free &= pairwise_iou(boxes[place, None], boxes)[0] < OVERLAP
    return np.array(kept)
