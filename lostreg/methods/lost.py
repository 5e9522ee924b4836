"""LOST (Siméoni et al., BMVC 2021) as batched tensor functions: features in, one box per image out.

    G = F Fᵀ + b                        similarities of all pairs of patches, plus a bias       (section 3.1)
    d_i = #{j ≠ i : G[i, j] > 0}        degree; the seed p* is the patch of lowest degree       (section 3.2)
    S = {p among the k lowest degrees : G[p*, p] > 0}                                           (section 3.3)
    M[j] = Σ_{p in S} G[p, j] > 0       the mask; its 4-connected part around p* is boxed       (section 3.4)

Nothing here knows of models or files. Shapes: B images, K biases each, N = h*w patches row by row, D dimensions.
Similarities are float32, whatever the features were computed in. Ties go to the lowest patch index, always.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self, TypeVar

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from lostreg.checks import shown, whole_number
from lostreg.errors import OptionError
from lostreg.methods.bias import check_bias, resolve_normalize, trial_biases
from lostreg.methods.exact import exact_float32
from lostreg.methods.objectness import Scorer, near_one, object_scores
from lostreg.methods.own import BiasFunction, OwnBias, OwnScore, ScoreFunction
from lostreg.methods.similarity import Similarities

OfMethod = TypeVar("OfMethod", bound="Maps")
Bias = float | Literal["auto"] | Tensor | Callable[[Similarities], Tensor]
GivenBias = float | Literal["auto"] | Tensor | BiasFunction  # as users give it


@dataclass(frozen=True)
class Objects:
    """The objects that a method finds in one image, in units of patches, the main object first.

    Attributes:
        xyxy: boxes, shape (n, 4), int64, ``x1, y1, x2, y2`` with exclusive right and bottom edges.
        scores: how clearly each box is an object, see `lostreg.methods.objectness`; shape (n,), float32, in [0, 1].
        masks: the patches of each object, shape (n, h, w), bool; no patch belongs to two.
        heat: what the method judged the patches by, shape (h, w): in LOST their degrees, int64.
        seeds: row and column of each object's seed, shape (n, 2), int64.
        biases: the Gram bias that each object was found with, shape (n,), float32.
        candidates: what the objects were chosen from, by rank: box in patches and score, shape (m, 5), float32. Of
            equal boxes one; at most 12, the objects before others. None where nothing was compared.
        objectness: how likely each patch is part of an object, by what a collection taught, shape (h, w), float32, in
            [0, 1]; None where nothing was taught.
    """

    xyxy: NDArray[np.int64]
    scores: NDArray[np.float32]
    masks: NDArray[np.bool_]
    heat: NDArray[np.int64]
    seeds: NDArray[np.int64]
    biases: NDArray[np.float32]
    candidates: NDArray[np.float32] | None = None
    objectness: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class LostResult:
    """What LOST found in a batch, in units of patches.

    Attributes:
        xyxy: boxes, shape (B, 4), int64, ``x1, y1, x2, y2`` with exclusive right and bottom edges.
        scores: how clearly each box is an object, see `lostreg.methods.objectness`; shape (B,), float32, in [0, 1]; 0
            where the seed is not connected even to itself.
        seeds: row and column of each seed, shape (B, 2), int64.
        degrees: connections of each patch, shape (B, h, w), int64.
        masks: the patches of each object, shape (B, h, w), bool.
        bias: the bias that was added to each image's similarities, shape (B,), float32.
    """

    xyxy: Tensor
    scores: Tensor
    seeds: Tensor
    degrees: Tensor
    masks: Tensor
    bias: Tensor

    def split(self) -> list[Objects]:
        """One object an image."""
        xyxy, scores, seeds, degrees, masks, bias = (getattr(self, field.name).numpy() for field in fields(self))
        images = [slice(image, image + 1) for image in range(len(xyxy))]
        return [
            Objects(xyxy[one], scores[one], masks[one], degrees[one.start], seeds[one], bias[one]) for one in images
        ]


@torch.no_grad()
def lost_boxes(
    features: Tensor,
    grid: tuple[int, int],
    bias: GivenBias = 0.0,
    k_patches: int = 100,
    *,
    normalize: bool | None = None,
    score: ScoreFunction | None = None,
) -> LostResult:
    """Find the main object of each image from its patch features.

    Args:
        features: shape (B, N, D), any floating dtype, finite.
        grid: (h, w), rows and columns of patches; N = h * w.
        bias: added to every similarity: one number, a tensor (B,) with one number an image, a tensor (B, K) with
            several, a function that makes the number of one image's features, (N, D), or ``auto``, which is
            `lostreg.methods.bias.trial_biases`. Of several, the one whose object has the highest score is kept.
        k_patches: how many patches of lowest degree may join the seed, at least 1; images with fewer patches
            use all of them.
        normalize: whether to scale every feature vector to length 1 first. None does so for ``auto`` alone,
            which is defined on cosine similarities.
        score: a function in the place of lostreg's score: of one image's features, (N, D), and K masks, (K, h, w),
            bool, it gives K numbers in [0, 1].

    Returns:
        A `LostResult` on the CPU.

    Raises:
        OptionError: if the shapes disagree, a number is of another kind or out of its range, ``auto`` meets
            ``normalize=False``, a feature is not finite, or a function answers with something else.

    Example:
        >>> features = torch.eye(3).repeat_interleave(torch.tensor([4, 14, 2]), dim=0)  # 20 patches of three kinds
        >>> found = lostreg.lost_boxes(features[None], grid=(4, 5), bias=-0.5)
        >>> found.xyxy.shape, found.seeds.tolist()
        (torch.Size([1, 4]), [[3, 3]])

    See Also:
        `lost_objects` for several objects an image.
    """
    return searched(features, grid, bias, k_patches, normalize, score).best()


def searched(
    features: Tensor,
    grid: tuple[int, int],
    bias: GivenBias,
    k_patches: int,
    normalize: bool | None,
    score: ScoreFunction | None,
) -> "Candidates":
    """What `lost_boxes` chooses from; takes and raises what it does."""
    if not is_features(features):
        what = [features.dtype, features.layout, features.device] if isinstance(features, Tensor) else [type(features)]
        kind = ", ".join(str(part) for part in what)
        raise OptionError(f"features must be a dense PyTorch tensor of a floating dtype, not {kind}")
    if features.ndim != 3:
        raise OptionError(f"features must have shape (B, N, D), not {tuple(features.shape)}")
    grid = _checked_grid(grid)
    fixed = bias if callable(bias) or (isinstance(bias, Tensor) and bias.ndim) else check_bias(bias)
    normalize = resolve_normalize(fixed, normalize, default=False)
    added = OwnBias.of(fixed) if callable(fixed) else fixed
    scorer = object_scores if score is None else OwnScore.of(score)
    return find_candidates(prepare(features, normalize=normalize), grid, added, k_patches, scorer)


def find_candidates(
    features: Tensor, grid: tuple[int, int], bias: Bias, k_patches: int, scorer: Scorer = object_scores
) -> "Candidates":
    """The object of each image at each bias; waits for the device.

    Args:
        features: shape (B, N, D), as `prepare` gives them.
        grid: as for `lost_boxes`.
        bias: as for `lost_maps`, like the rest.
        k_patches: as there.
        scorer: as there.
    """
    return lost_maps(features, grid, bias, k_patches, scorer).to_host().candidates(features, grid)


def prepare(features: Tensor, *, normalize: bool) -> Tensor:
    """Features as the other functions take them: float32, and of length 1 if asked for.

    Args:
        features: shape (B, N, D) or (N, D), any floating dtype.
        normalize: whether to scale every feature vector to length 1.

    Returns:
        The same shape, float32.
    """
    features = features.float()
    if features.device.type == "mps":  # which lacks some of what follows
        features = features.cpu()
    return functional.normalize(near_one(features), dim=-1) if normalize else features


@dataclass(frozen=True)
class Lost:
    """LOST with its options.

    Attributes:
        bias: as for `lost_maps`.
        k_patches: as there.
        scorer: as there.
    """

    bias: Bias
    k_patches: int
    scorer: Scorer = object_scores

    def __call__(self, runs: Sequence[Sequence[Tensor]], grids: Sequence[tuple[int, int]]) -> list[list["LostMaps"]]:
        """`lost_maps` of several features of images of several grids."""
        return [
            [lost_maps(features, grid, self.bias, self.k_patches, self.scorer) for features in run]
            for run, grid in zip(runs, grids, strict=True)
        ]


@dataclass(frozen=True)
class Candidates:
    """The object of each of K biases of each image, on the CPU.

    Attributes:
        masks: their patches, shape (B, K, h, w), bool: one connected part each.
        scores: see `lostreg.methods.objectness`, shape (B, K), float32; 0 where the seed is not connected.
        connected: whether each seed is connected to itself, shape (B, K), bool.
        maps: what they come from, on the CPU.
        features: what the maps come from, shape (B, N, D), on any device.
    """

    masks: NDArray[np.bool_]
    scores: NDArray[np.float32]
    connected: NDArray[np.bool_]
    maps: "LostMaps"
    features: Tensor

    def boxes(self) -> NDArray[np.int64]:
        """Shape (B, K, 4), ``x1, y1, x2, y2`` in patches, exclusive right and bottom edges."""
        return tight_boxes(self.masks)

    def best(self) -> LostResult:
        """Of each image the object with the highest score, of equal ones the first."""
        images = np.arange(len(self.masks))
        chosen = images, self.scores.argmax(axis=1)
        height, width = self.masks.shape[2:]
        # By NumPy: PyTorch's threads would wait for cores that decode.
        seeds, degrees, bias = (maps.numpy()[chosen] for maps in (self.maps.seeds, self.maps.degrees, self.maps.bias))
        return LostResult(
            xyxy=torch.from_numpy(self.boxes()[chosen]),
            scores=torch.from_numpy(self.scores[chosen]),
            seeds=torch.from_numpy(np.stack(np.divmod(seeds, width), axis=1)),
            degrees=torch.from_numpy(degrees.reshape(-1, height, width)),
            masks=torch.from_numpy(self.masks[chosen]),
            bias=torch.from_numpy(bias),
        )


@dataclass(frozen=True)
class Maps:
    """What a method computes for images of one grid, where their features are: tensors, and whatever else it holds."""

    def to_host(self, *, wait: bool = True) -> Self:
        """The same on the CPU.

        Args:
            wait: whether the copies are there on return. Else they are only queued where the device is a GPU, behind
                what is queued already: synchronise with its stream before looking.
        """
        tensors = _tensors(self)
        inner = {name: maps.to_host(wait=wait) for name, maps in vars(self).items() if isinstance(maps, Maps)}
        on_host = replace(self, **inner, **{name: _copy_to_host(tensor) for name, tensor in tensors.items()})
        for device in {tensor.device for tensor in tensors.values() if wait and tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        return on_host

    def candidates(self, features: Tensor, grid: tuple[int, int]) -> Any:
        """What objects are chosen from: here the maps, which are on the CPU, with what they were made of."""
        return self, features, grid


@dataclass(frozen=True)
class LostMaps(Maps):
    """What LOST computes where the features are: all but the connected components.

    Attributes:
        masks: patches that are similar to the seed and its companions, shape (B, K, N), bool.
        degrees: connections of each patch, shape (B, K, N), int64.
        seeds: patch index of each seed, shape (B, K), int64.
        bias: what was added to each image's similarities, shape (B, K), float32.
        finite: whether each image's features were, shape (B,), bool.
        scorer: what scores the objects.
    """

    masks: Tensor
    degrees: Tensor
    seeds: Tensor
    bias: Tensor
    finite: Tensor
    scorer: Scorer = object_scores

    def candidates(self, features: Tensor, grid: tuple[int, int]) -> Candidates:
        """The connected components around the seeds (LOST, section 3.4), and their scores. Takes maps on the CPU.

        Args:
            features: what the maps were made of, shape (B, N, D), on any device.
            grid: (h, w), rows and columns of patches.

        Raises:
            OptionError: if a feature was not finite.
        """
        require_finite(self.finite)
        shape = self.seeds.shape
        rows, columns = np.divmod(self.seeds.numpy().ravel(), grid[1])
        components = seed_components(self.masks.view(-1, *grid).numpy(), rows, columns)
        seeds = np.arange(len(components)), rows, columns
        connected = components[seeds].reshape(shape)
        components[seeds] = True  # an unsuitable bias: the seed itself is the answer, with no confidence
        components = components.reshape(*shape, *grid)
        with exact_float32(features.device):
            scores = self.scorer(features, components)
        return Candidates(components, np.where(connected, scores, np.float32(0)), connected, self, features)


def joined_maps(parts: Sequence[OfMethod]) -> OfMethod:
    """The maps of several batches of one grid as those of one."""
    if len(parts) == 1:
        return parts[0]
    names = _tensors(parts[0])
    return replace(parts[0], **{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def _tensors(maps: Maps) -> dict[str, Tensor]:
    return {name: value for name, value in vars(maps).items() if isinstance(value, Tensor)}


def _copy_to_host(tensor: Tensor) -> Tensor:
    """A copy in pinned memory, queued, of what is on a GPU; the same where it is on the CPU."""
    if not tensor.is_cuda:
        return tensor.cpu()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


@torch.no_grad()
def lost_maps(
    features: Tensor, grid: tuple[int, int], bias: Bias, k_patches: int, scorer: Scorer = object_scores
) -> LostMaps:
    """LOST up to the connected components, in memory that grows with the number of patches and not its square.

    Args:
        features: shape (B, N, D), as `prepare` gives them; of length 1 for ``auto``.
        grid: (h, w), rows and columns of patches; N = h * w.
        bias: as for `lost_boxes`, but a function makes (B, K) of the images' `Similarities`.
        k_patches: as for `lost_boxes`.
        scorer: scores the objects that come of the maps.

    Returns:
        `LostMaps` on the device of the features. Whether these were finite is noted, not raised: asking would
        wait for the device.

    Raises:
        OptionError: if the shapes disagree or ``k_patches`` is below 1.
    """
    k_patches = whole_number(k_patches, "k_patches")
    _check_input(features, grid, bias)
    at_once = Similarities.images_at_once(features.shape[1], features.device)
    parts = []
    for start in range(0, max(1, len(features)), at_once):  # one part for an empty batch too
        part = slice(start, start + at_once)
        part_bias = bias[part] if isinstance(bias, Tensor) else bias
        with exact_float32(features.device):
            parts.append(_maps_of_part(features[part], part_bias, k_patches, scorer))
    return joined_maps(parts)


def lowest_degrees(degree: Tensor, k: int) -> Tensor:
    """The ``k`` patches of lowest degree, lowest first; of equal ones the lowest index first.

    Args:
        degree: shape (..., N), int64.
        k: in [1, N].

    Returns:
        Patch indices, shape (..., k), int64. The first is the seed (LOST, section 3.2).

    Raises:
        OptionError: if ``k`` is outside [1, N].
    """
    count = degree.shape[-1]
    if not 1 <= k <= count:
        raise OptionError(f"k must be in [1, {count}], not {k}")
    index = torch.arange(count, device=degree.device)
    return (degree * count + index).topk(k, dim=-1, largest=False, sorted=True).indices


def expand_seed(features: Tensor, candidates: Tensor, bias: Tensor, among: Tensor | None = None) -> Tensor:
    """Grow object masks from their seeds (LOST, section 3.3).

    Args:
        features: shape (B, N, D), float32.
        candidates: the patches of lowest degree, which may join the seed, shape (B, K, k), int64; the first is the
            seed.
        bias: added to every similarity, shape (B, K), float32.
        among: the patches that may be companions and part of the mask, shape (B, N), bool, the seeds among them; None
            for all.

    Returns:
        Boolean masks, shape (B, K, N), on the device of ``features``: patches whose biased similarities to the seed
        and its companions add up to more than 0. Not yet reduced to one connected component.
    """
    image = torch.arange(len(features), device=features.device).view(-1, 1, 1)
    chosen = features[image, candidates]  # F[p] of the k candidates, (B, K, k, D)
    seed = chosen[:, :, :1]
    # S = {p : G[p*, p] > 0}, G = F Fᵀ + b
    similar = (chosen @ seed.mT).squeeze(3) + bias[..., None] > 0
    kept = (similar if among is None else similar & among[image, candidates]).float()
    # M[j] = Σ_{p in S} G[p, j] = (Σ_{p in S} F[p]) · F[j] + |S| b
    summed = (kept.unsqueeze(2) @ chosen).squeeze(2) @ features.mT + (kept.sum(dim=2) * bias)[..., None]
    mask = summed > 0 if among is None else (summed > 0) & among[:, None]
    # Each of S is connected to the seed, so M[p*] is positive: rounding may not decide that.
    return mask.scatter(2, candidates[..., :1], kept.any(dim=2, keepdim=True))


def seed_components(masks: NDArray[np.bool_], rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.bool_]:
    """The 4-connected part of each mask that holds its seed (LOST, section 3.4).

    Args:
        masks: shape (S, h, w), bool.
        rows: of the seeds, shape (S,).
        columns: of the seeds, shape (S,).

    Returns:
        Shape (S, h, w), bool: all False where the seed is not in the mask.
    """
    count, height, width = masks.shape
    if not masks.size:
        return np.zeros_like(masks)
    # One tall picture, labelled at once: an empty row below each mask keeps it apart from the next.
    tall = np.zeros((count, height + 1, width), dtype=np.uint8)
    tall[:, :height] = masks
    _, labels = cv2.connectedComponents(tall.reshape(-1, width), connectivity=4)
    parts = labels.reshape(tall.shape)[:, :height]
    components: NDArray[np.bool_] = masks & (parts == parts[np.arange(count), rows, columns][:, None, None])
    return components


def tight_boxes(masks: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The box around each mask, in patches.

    Args:
        masks: shape (..., h, w), bool, none of them empty.

    Returns:
        Shape (..., 4), ``x1, y1, x2, y2``, exclusive right and bottom edges.
    """
    columns, rows = np.any(masks, axis=-2), np.any(masks, axis=-1)
    left, top = columns.argmax(axis=-1), rows.argmax(axis=-1)
    right = columns.shape[-1] - columns[..., ::-1].argmax(axis=-1)
    bottom = rows.shape[-1] - rows[..., ::-1].argmax(axis=-1)
    return np.stack([left, top, right, bottom], axis=-1).astype(np.int64)


def main_objects(
    features: Tensor,
    masks: NDArray[np.bool_],
    seeds: NDArray[np.int64],
    heat: NDArray[np.int64],
    bias: float,
    scorer: Scorer,
) -> list[Objects]:
    """One object an image, and its score.

    Args:
        features: shape (B, N, D), on any device, which is waited for.
        masks: the patches of each object, shape (B, h, w), bool.
        seeds: the patch index of each object's seed, shape (B,).
        heat: shape (B, h, w), int64.
        bias: that the objects were found with.
        scorer: what scores them.
    """
    with exact_float32(features.device):
        scores = scorer(features, masks[:, None])
    boxes, biases = tight_boxes(masks), np.full(len(masks), bias, dtype=np.float32)
    places = np.stack(np.divmod(seeds, masks.shape[2]), axis=1)
    images = [slice(image, image + 1) for image in range(len(masks))]
    return [
        Objects(boxes[one], scores[one.start], masks[one], heat[one.start], places[one], biases[one]) for one in images
    ]


def require_finite(finite: Tensor) -> None:
    """Make sure that the features of each image were finite; (B,), bool, on the CPU.

    Raises:
        OptionError: if those of one were not.
    """
    if not finite.all():
        raise OptionError("features must be finite, in float32 too (what is too large for fp16 may fit bf16)")


def is_features(value: object) -> bool:
    """Whether something is a tensor that can hold features: dense, of a floating dtype, and with values."""
    return (
        isinstance(value, Tensor) and value.is_floating_point() and value.layout == torch.strided and not value.is_meta
    )


def check_shape(features: Tensor, grid: tuple[int, int]) -> None:
    """Make sure that features are those of a grid's patches, and at least one.

    Raises:
        OptionError: if they are not.
    """
    height, width = grid
    if features.ndim != 3 or features.shape[1] != height * width or not features.shape[1]:
        raise OptionError(
            f"features must have shape (B, N, D) with N = {height} * {width} > 0, not {tuple(features.shape)}"
        )


def _checked_grid(grid: tuple[int, int]) -> tuple[int, int]:
    try:
        height, width = grid
    except (TypeError, ValueError) as error:
        raise OptionError(f"grid must be (h, w), rows and columns of patches, not {shown(grid)}") from error
    return whole_number(height, "rows of the grid", least=0), whole_number(width, "columns of the grid", least=0)


def _check_input(features: Tensor, grid: tuple[int, int], bias: Bias) -> None:
    check_shape(features, grid)
    if isinstance(bias, Tensor) and (bias.ndim not in (1, 2) or len(bias) != len(features) or 0 in bias.shape[1:]):
        raise OptionError(f"bias must have shape ({len(features)},) or ({len(features)}, K), not {tuple(bias.shape)}")
    if isinstance(bias, Tensor) and not bias.to(features).isfinite().all():
        raise OptionError("every bias must be a finite number, in float32 too")


def _maps_of_part(features: Tensor, bias: Bias, k_patches: int, scorer: Scorer) -> LostMaps:
    batch, count, _ = features.shape
    finite = features.sum(dim=2).isfinite().all(dim=1)
    similarities = Similarities(features)
    if isinstance(bias, Tensor):
        biases = bias.to(features)
        biases = biases[:, None] if biases.ndim == 1 else biases
    elif callable(bias):
        biases = bias(similarities)
    elif bias == "auto":
        biases = trial_biases(similarities)
    else:
        biases = features.new_full((batch, 1), float(bias))
    # d_i = #{j ≠ i : F[i] · F[j] > -b}: the bias is the register paper's addition to LOST's section 3.2.
    degrees = similarities.counts_above(-biases)
    candidates = lowest_degrees(degrees, min(k_patches, count))  # the first is the seed p*
    masks = expand_seed(features, candidates, biases)
    return LostMaps(masks, degrees, candidates[..., 0], biases, finite, scorer)
