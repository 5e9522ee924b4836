"""Finds the neurons that write a backbone's outliers, from unlabelled images.

After Jiang et al. 2025: of the hidden units of all MLPs up to the layer where outliers emerge, those that are
most active at outliers. A unit that is active everywhere writes no outliers, so what counts here is how much more
active it is at outliers than at other patches. How many of them there are is measured too, where nobody says.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lostreg import defaults
from lostreg.artifacts.norms import TokenNorms, emergence, token_norms
from lostreg.artifacts.outliers import CutoffRule, NormTally, find_cutoff
from lostreg.checks import whole_number, whole_seed
from lostreg.errors import ImageError, RegistersError
from lostreg.images.decode import ImageSource
from lostreg.inference.discoverer import Discoverer, check_discoverer
from lostreg.inference.jobs import LookJob
from lostreg.inference.stream import draw_sample
from lostreg.models.backbone import Backbone
from lostreg.models.forward import Forward, Grid
from lostreg.models.registers import RegisterNeurons
from lostreg.progress import OnProgress, telling

_TRIED_IMAGES: Final = 8  # on which numbers of neurons are compared
_MOST_NEURONS: Final = 128
_ORDINARY: Final = 0.99  # quantile of the norms of other patches below which a former outlier is one of them
_CURED: Final = 0.9  # of the former outliers have to be ordinary

Outcome = TypeVar("Outcome")


def find_registers(
    images: Iterable[ImageSource],
    discoverer: Discoverer,
    *,
    count: int = 1,
    neurons: int | None = None,
    rule: CutoffRule | None = None,
    sample: int = defaults.REGISTER_IMAGES,
    seed: int = 0,
    on_progress: OnProgress = lambda _: None,
) -> RegisterNeurons:
    """Find the neurons that write outliers.

    Args:
        images: unlabelled: files, PIL images or arrays, as `Discoverer.discover` takes them.
        discoverer: the backbone, and how images are read; test-time registers that it has already play no part.
        count: blank tokens that `Backbone.with_registers` will add to each image, at least 1.
        neurons: how many to take, at least 1. None takes the fewest that make ordinary patches of nine in ten
            outliers, at most 128: their norms are then within the lowest 99 % of the norms of other patches.
        rule: which patches are outliers, see `find_cutoff`; None looks for a second mode of the norms.
        sample: how many images to look at, at least 1; of more, a random sample.
        seed: of that sample.
        on_progress: called after each image of each step.

    Raises:
        OptionError: if there are no images, or a number is below 1.
        RegistersError: if no image can be read, there are no outliers, or nothing else.

    Example:
        >>> discoverer = lostreg.Discoverer("dinov2_vits14", device="cpu")
        >>> try:
        ...     registers = lostreg.find_registers(["dog.jpg"], discoverer, count=1)
        ... except lostreg.LostregError as error:  # small backbones have no outliers
        ...     print(str(error)[:11])
        no outliers
    """
    check_discoverer(discoverer, "images and then a Discoverer")
    count = whole_number(count, "count", most=discoverer.backbone.most_registers)
    neurons = None if neurons is None else whole_number(neurons, "neurons")
    sources, seed = draw_sample(images, sample, seed), whole_seed(seed)
    search = _Search(discoverer.with_registers(None), on_progress)
    norms = search.norms(sources)
    cutoff, layer = _outliers([found for _, found in norms], rule or CutoffRule("auto"))
    affected = [(source, found) for source, found in norms if (found.output >= cutoff).any()]
    ranked = search.rank([source for source, _ in affected], cutoff, layer)
    tried = affected[:_TRIED_IMAGES]
    chosen = ranked[:neurons] if neurons else search.fewest(tried, ranked, cutoff, count)
    patches = sum(found.output.size for _, found in norms)
    return RegisterNeurons(
        neurons=chosen,
        count=count,
        backbone=discoverer.backbone.spec.name,
        weights=discoverer.backbone.weights,
        cutoff=round(cutoff, 4),
        layer=layer,
        images=len(norms),
        outliers=sum(int((found.output >= cutoff).sum()) for _, found in norms) / patches,
        outliers_left=search.left([source for source, _ in tried], chosen, cutoff, count),
        seed=seed,
    )


def _outliers(norms: Sequence[TokenNorms], rule: CutoffRule) -> tuple[float, int]:
    """From which norm on patches are outliers, and the layer where they emerge."""
    if not all(np.isfinite(found.layers).all() for found in norms):
        raise RegistersError("some norms are not finite: the model's weights are broken, or need another precision")
    edge = rule.value if rule.kind == "number" else None
    tallies = [NormTally(edge) for _ in norms[0].layers]
    for found in norms:
        for tally, layer in zip(tallies, found.layers[:, found.prefix :], strict=True):
            tally.add(layer)
    cutoff = find_cutoff(tallies[-1], rule)
    layer = None if cutoff.value is None else emergence(tallies, cutoff.value)
    if cutoff.value is None or layer is None:
        raise RegistersError(f"no outliers that test-time registers could take up: {cutoff.reason}")
    if tallies[-1].above(cutoff.value) == tallies[-1].count:
        raise RegistersError(f"all patches have norms from {cutoff.value:.4g} on: there are no others to compare with")
    return cutoff.value, layer


@dataclass(frozen=True)
class _Sums:
    """Activations of the hidden units of each layer, added up over the outliers and over the other patches of a pack.

    Attributes:
        outliers: of each layer, shape (hidden,), float64.
        others: the same.
        count: how many outliers and how many others.
    """

    outliers: list[NDArray[np.float64]]
    others: list[NDArray[np.float64]]
    count: tuple[int, int]


class _Search:
    """What is looked at: one backbone without test-time registers, fed as a discoverer is."""

    def __init__(self, discoverer: Discoverer, on_progress: OnProgress) -> None:
        self._discoverer = discoverer
        self._on_progress = on_progress

    def norms(self, sources: Sequence[ImageSource], step: str = "norms") -> list[tuple[ImageSource, TokenNorms]]:
        """The norms of every image that can be read.

        Raises:
            RegistersError: if there is none.
        """
        found = self._look(self._discoverer.backbone, token_norms, sources, step)
        readable = [(source, norms) for source, norms in found if not isinstance(norms, ImageError)]
        if not readable:
            raise RegistersError(f"none of {len(sources)} images could be read, so no neurons were found")
        return readable

    def rank(self, sources: Sequence[ImageSource], cutoff: float, layer: int) -> tuple[tuple[int, int], ...]:
        """Pairs of layer and hidden unit up to a layer, those first that are most active at outliers."""

        def look(forward: Forward, pixels: list[Tensor], grids: Sequence[Grid]) -> list[_Sums | None]:
            return [_activations(forward, pixels, grids, cutoff, layer), *[None] * (len(grids) - 1)]

        found = self._look(self._discoverer.backbone, look, sources, "neurons")
        sums = [outcome for _, outcome in found if isinstance(outcome, _Sums)]
        if not sums:
            raise RegistersError(f"none of {len(sources)} images with outliers could be read a second time")
        outliers, others = (sum(counted.count[side] for counted in sums) for side in (0, 1))
        strengths = [
            np.abs(
                sum(counted.outliers[index] for counted in sums) / max(1, outliers)
                - sum(counted.others[index] for counted in sums) / max(1, others)
            )
            for index in range(layer + 1)
        ]
        pairs = [(index, unit) for index, strength in enumerate(strengths) for unit in range(len(strength))]
        order = np.argsort(-np.concatenate(strengths), kind="stable")
        return tuple(pairs[place] for place in order)

    def fewest(
        self,
        affected: Sequence[tuple[ImageSource, TokenNorms]],
        ranked: tuple[tuple[int, int], ...],
        cutoff: float,
        count: int,
    ) -> tuple[tuple[int, int], ...]:
        """The shortest start of the ranking that cures enough outliers, or about as many as any does."""
        cured: dict[int, float] = {}

        def is_enough(number: int) -> bool:
            cured[number] = self._ordinary(affected, ranked[:number], cutoff, count)
            return cured[number] >= _CURED

        number = 1
        while not is_enough(number) and number < min(_MOST_NEURONS, len(ranked)):
            number = min(2 * number, len(ranked))
        if cured[number] < _CURED:
            best = max(cured.values())
            return ranked[: min(tried for tried, share in cured.items() if share >= best - 0.01)]
        low, high = number // 2, number
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if is_enough(middle) else (middle, high)
        return ranked[:high]

    def left(
        self, sources: Sequence[ImageSource], neurons: tuple[tuple[int, int], ...], cutoff: float, count: int
    ) -> float:
        """Share of patches that are outliers still."""
        cured = self._cured(sources, neurons, count, "checking")
        patches = np.concatenate([norms.output for _, norms in cured])
        return float((~(patches < cutoff)).mean())  # what is not finite is an outlier too

    def _ordinary(
        self,
        affected: Sequence[tuple[ImageSource, TokenNorms]],
        neurons: tuple[tuple[int, int], ...],
        cutoff: float,
        count: int,
    ) -> float:
        """Share of former outliers whose norms are like those of other patches."""
        before = np.concatenate([norms.output for _, norms in affected])
        cured = self._cured([source for source, _ in affected], neurons, count, "trying")
        after = np.concatenate([norms.output for _, norms in cured])
        others = before[before < cutoff]
        limit = np.quantile(others, _ORDINARY) if others.size else cutoff
        return float((after[before >= cutoff] <= limit).mean())

    def _cured(
        self, sources: Sequence[ImageSource], neurons: tuple[tuple[int, int], ...], count: int, step: str
    ) -> list[tuple[ImageSource, TokenNorms]]:
        backbone = self._discoverer.backbone.with_registers(RegisterNeurons(neurons, count))
        found = self._look(backbone, token_norms, sources, f"{step} {len(neurons)}")
        for _, norms in found:
            if isinstance(norms, ImageError):  # which could be read before
                raise RegistersError(f"no neurons were found: {norms}")
        return [(source, norms) for source, norms in found if not isinstance(norms, ImageError)]

    def _look(
        self,
        backbone: Backbone,
        look: Callable[[Forward, list[Tensor], Sequence[Grid]], list[Outcome]],
        sources: Sequence[ImageSource],
        step: str,
    ) -> list[tuple[ImageSource, Outcome | ImageError]]:
        job = LookJob(Forward(backbone, compiled=self._discoverer.options.compile), look)
        outcomes = self._discoverer.stream_of(job).outcomes(sources)
        return list(zip(sources, telling(outcomes, len(sources), self._on_progress, step), strict=True))


def _activations(forward: Forward, pixels: list[Tensor], grids: Sequence[Grid], cutoff: float, last: int) -> _Sums:
    """Run the images to the end for their outliers, and again, to the last layer that matters, for hidden units."""
    norms = token_norms(forward, pixels, grids)
    outlier = np.concatenate([np.r_[np.zeros(found.prefix, bool), found.output >= cutoff] for found in norms])
    patch = np.concatenate([np.arange(found.final.size) >= found.prefix for found in norms])
    masks = [torch.from_numpy(mask).to(forward.backbone.device) for mask in (outlier, patch & ~outlier)]
    walk = forward.start(pixels, grids)
    by_layer: list[list[Tensor]] = []
    for _ in range(last + 1):
        sums = [torch.zeros(forward.backbone.hidden_units(walk.layer), device=masks[0].device) for _ in masks]

        def watch(part: slice, hidden: Tensor, sums: list[Tensor] = sums) -> None:
            for total, mask in zip(sums, masks, strict=True):
                total += hidden[mask[part]].float().sum(dim=0)

        forward.advance(walk, watch)
        by_layer.append(sums)
    as_numbers = [[total.cpu().double().numpy() for total in sums] for sums in by_layer]
    return _Sums(
        [outliers for outliers, _ in as_numbers],
        [others for _, others in as_numbers],
        (int(outlier.sum()), int((patch & ~outlier).sum())),
    )
