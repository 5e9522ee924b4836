"""Parts beside LOST's trials: clusters of an image's patches, cut into connected pieces, are candidates too.

LOST asks what is connected to one seed. Here the features themselves are parted, coarsely and more finely:

    Z = X V₄, X = F - mean(F), V₄ a basis of the four directions of largest variance        (principal components)
    labels_K = k-means of the rows of Z into K = 2, 3, 4, 6, 8 clusters, from farthest points
    candidates = LOST's objects, and each 4-connected piece of a cluster
    objects = candidates by rank, without those whose box overlaps a better one's

Distances between rows of Z are the same for any basis of the same directions, so no single component is needed. Shapes:
B images, N = h*w patches row by row, D dimensions. Memory grows with N*D, never with N².
"""

from typing import Final

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lostreg.defaults import OVERLAP
from lostreg.images.boxes import pairwise_iou
from lostreg.methods.bias import on_device
from lostreg.methods.exact import exact_float32
from lostreg.methods.learned import contrast, taught_ranks
from lostreg.methods.lost import Candidates, Objects, tight_boxes
from lostreg.methods.objectness import apartness, object_scores

CLUSTERS: Final = (2, 3, 4, 6, 8)
_COMPONENTS: Final = 4
_POWER_STEPS: Final = 8
_LLOYD_STEPS: Final = 10
_RESOLUTION: Final = 1e-5  # of float32: shares below are rounding
_LEAST_PATCHES: Final = 4  # of a part
_LARGEST_SHARE: Final = 0.9  # of the image
_MOST_PARTS: Final = 64  # of an image: the largest

Mask = NDArray[np.bool_]


@torch.no_grad()
def part_labels(features: Tensor) -> Tensor:
    """Clusters of each image's patches: coarse, finer and finest.

    Args:
        features: shape (B, N, D), float32, rows of length 1.

    Returns:
        For each number of `CLUSTERS` the cluster of each patch, shape (B, 5, N), uint8, on the device of the features.
        Nothing is told of features that are not finite: their labels mean nothing.
    """
    with exact_float32(features.device):
        return _cluster(_principal_components(features))


def _principal_components(features: Tensor) -> Tensor:
    """Each patch in the four directions of largest variance, (B, N, D) to (B, 4, N), by subspace iteration."""
    batch, _, dimensions = features.shape
    centred = features - features.mean(dim=1, keepdim=True)
    # A start that is the same for all images and whatever the order of patches: no patch's own vector.
    numbers = torch.arange(_COMPONENTS * dimensions, device=features.device, dtype=torch.float32)
    basis = (0.37 * numbers.square()).sin().view(1, _COMPONENTS, dimensions).expand(batch, -1, -1)
    for _ in range(_POWER_STEPS):
        basis = _orthonormal((basis @ centred.mT) @ centred)  # V <- orthonormal(V XᵀX)
    components = basis @ centred.mT
    spread = torch.linalg.vector_norm(components, dim=2, keepdim=True) / features.shape[1] ** 0.5
    return components.where(spread > _RESOLUTION, 0)  # what varies less is rounding


def _orthonormal(basis: Tensor) -> Tensor:
    """Gram and Schmidt's way, which asks nothing of the device; zeros for what depends on rows before; (B, C, D)."""
    rows: list[Tensor] = []
    for row in basis.unbind(dim=1):
        least = _RESOLUTION * torch.linalg.vector_norm(row, dim=1, keepdim=True)
        for other in rows * 2:  # the second time removes what rounding left of them
            row = row - (row * other).sum(dim=1, keepdim=True) * other
        length = torch.linalg.vector_norm(row, dim=1, keepdim=True)
        rows.append(torch.where(length > least, row / length, 0))
    return torch.stack(rows, dim=1)


def _cluster(points: Tensor) -> Tensor:
    """k-means for each number of clusters at once, (B, C, N) to (B, 5, N), from starts that they share."""
    most = CLUSTERS[-1]
    numbers = torch.arange(most, device=points.device, dtype=torch.uint8)
    unused = numbers >= on_device(CLUSTERS, points.device)[:, None]  # (clusterings, most)
    centres = _farthest_points(points, most)[:, None].expand(-1, len(CLUSTERS), -1, -1)
    for _ in range(_LLOYD_STEPS):
        members = (_nearest(points, centres, unused)[:, :, None] == numbers[:, None]).float()  # (B, 5, most, N)
        sizes = members.sum(dim=3, keepdim=True)
        means = members @ points[:, None].mT / sizes.clamp(min=1)
        centres = torch.where(sizes > 0, means, centres)
    return _nearest(points, centres, unused)


def _farthest_points(points: Tensor, count: int) -> Tensor:
    """The point farthest from the mean, and again the one farthest from all before; of equal ones the first.

    Points (B, C, N) of mean 0, to (B, count, C).
    """
    distance = points.square().sum(dim=1)
    chosen: list[Tensor] = []
    for _ in range(count):
        farthest = distance.argmax(dim=1)[:, None, None].expand(-1, points.shape[1], 1)
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
        labels: shape (5, N), as `part_labels` gives them.
        grid: (h, w), rows and columns of patches.

    Returns:
        Shape (P, h, w), bool, P from 0 to 64: pieces of at least 4 patches and at most 90 % of the image, each of them
        once; where there are more, the largest.
    """
    height, width = grid
    panels = [labels[place] == cluster for place, count in enumerate(CLUSTERS) for cluster in range(count)]
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


def candidate_masks(candidates: Candidates, labels: NDArray[np.uint8]) -> list[tuple[Mask, NDArray[np.float32]]]:
    """What may be an object in each image: what LOST found with each bias, first, then the parts that differ from it.

    Args:
        candidates: what LOST found, with K biases an image.
        labels: of the same images, shape (B, 5, N), as `part_labels` gives them.

    Returns:
        An image: masks, shape (P, h, w), bool, the K of LOST first, and their scores, shape (P,), float32, see
        `lostreg.methods.objectness`.
    """
    gathered = []
    for image, trials in enumerate(candidates.masks):
        masks = np.concatenate([trials, part_masks(labels[image], trials.shape[1:])])
        new = _first_of_equal(masks)
        parts = masks[new[new >= len(trials)]]
        with exact_float32(candidates.features.device):
            scores = object_scores(candidates.features[image, None], parts[None])[0]
        gathered.append((np.concatenate([trials, parts]), np.concatenate([candidates.scores[image], scores])))
    return gathered


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
        labels: of the same images, shape (B, 5, N), as `part_labels` gives them.
        max_objects: at least 1.
        min_score: in [0, 1]; a further object with a lower score is left out.
        probabilities: how likely each patch is part of an object, see `lostreg.methods.learned`, shape (B, N), which
            then helps to rank the candidates. None for none.

    Returns:
        One `Objects` an image, with one object at least: see `ranked_objects`.
    """
    objects = []
    for image, (masks, scores) in enumerate(candidate_masks(candidates, labels)):
        contrasts = None if probabilities is None else contrast(probabilities[image], masks)
        objects.append(ranked_objects(candidates, image, masks, scores, contrasts, max_objects, min_score))
    return objects


def ranked_objects(
    candidates: Candidates,
    image: int,
    masks: Mask,
    scores: NDArray[np.float32],
    contrasts: NDArray[np.float32] | None,
    max_objects: int,
    min_score: float,
) -> Objects:
    """The best candidate of an image, and each further one whose box overlaps that of none before it.

    Overlap is an intersection over union of `lostreg.defaults.OVERLAP` or more. Candidates are ranked by their score,
    with contrasts by `lostreg.methods.learned.taught_ranks`. What an object's own score says has to hold between
    images, too: it is the geometric mean of score and apartness, and that of both and the contrast.

    Args:
        candidates: what LOST found.
        image: its place among them.
        masks: as `candidate_masks` gives them.
        scores: likewise.
        contrasts: see `lostreg.methods.learned.contrast`, shape (P,); None for none.
        max_objects: at least 1.
        min_score: as for `find_parts`.

    Returns:
        At least one object, ranked. A box is that of the candidate; of its mask those patches are left out that belong
        to an object before it, which may be all of them. The seed of a part is its patch of lowest degree in LOST's
        first trial, whose bias and degrees stand for it.
    """
    boxes = tight_boxes(masks)
    kept = _suppress(boxes, scores if contrasts is None else taught_ranks(scores, contrasts), max_objects)
    with exact_float32(candidates.features.device):
        clear = np.sqrt(scores[kept] * apartness(candidates.features[image], masks[kept]))
    if contrasts is not None:
        clear = np.sqrt(clear * contrasts[kept])
    enough = clear >= min_score
    enough[0] = True
    kept, clear = kept[enough], clear[enough]
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
        scores=clear,
        masks=own,
        heat=degrees.reshape(height, width),
        seeds=np.stack(np.divmod(seeds, width), axis=1),
        biases=maps.bias[image].numpy()[np.where(kept < trials, kept, 0)],
    )


def _lowest(degrees: NDArray[np.int64], mask: Mask) -> int:
    """The patch of a mask that has the lowest degree, of equal ones the first."""
    places = np.flatnonzero(mask)
    return int(places[degrees[places].argmin()])


def _suppress(boxes: NDArray[np.int64], ranks: NDArray[np.float32], max_objects: int) -> NDArray[np.int64]:
    """Places of the candidates that are kept, the best first; of equal ranks the first."""
    kept: list[int] = []
    free = np.ones(len(boxes), dtype=bool)
    for place in np.argsort(-ranks, kind="stable"):
        if len(kept) == max_objects:
            break
        if free[place]:
            kept.append(place)
            free &= pairwise_iou(boxes[place, None], boxes)[0] < OVERLAP
    return np.array(kept)
