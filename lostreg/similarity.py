"""Similarities between all patches of an image, tile by tile: memory grows with the number of patches, not its square.

The Gram matrix is symmetric, so half of it is enough: for each block of rows, the square tile on the diagonal and the
rest to its right. Small images keep their tiles, so each similarity is computed once; for larger ones a second look at
the matrix computes it again, which costs less than the memory would.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, cast

import numpy as np
import torch
from torch import Tensor

_KEPT_ELEMENTS: Final = {"cpu": 1 << 25, "cuda": 1 << 28}  # of the whole matrices: their halves take 64 or 512 MiB
_BLOCK_ELEMENTS: Final = {"cpu": 1 << 19, "cuda": 1 << 26}  # of a block of rows: on a CPU, what its caches hold
_LEAST_ROWS: Final = 128  # of a block: thinner products are slow

_SAMPLED_PAIRS: Final = 1 << 15
_GATHERED_ELEMENTS: Final = 1 << 21  # of the features of sampled pairs, at once
_PATCHES_PER_ROOT_SAMPLE: Final = 148  # keeps what a quantile collects below some 400 similarities a patch
_STANDARD_ERRORS: Final = 6


@dataclass(frozen=True)
class Tile:
    """Part of a batch's Gram matrices.

    Attributes:
        rows: the patches of its rows.
        columns: the patches of its columns: those of the rows, or all that follow them.
        values: similarities, shape (B, rows, columns), float32; valid until the next tile.
        weight: how often its values stand in the whole matrix: 1 on the diagonal, 2 beside it.
    """

    rows: slice
    columns: slice
    values: Tensor
    weight: int


class Similarities:
    """The similarities of all pairs of patches of each image of a batch.

    Args:
        features: shape (B, N, D), float32, N at least 1. Products are taken in float32 as the caller has
            PyTorch set up.
    """

    def __init__(self, features: Tensor) -> None:
        self.features = features
        self.batch, self.count, _ = features.shape
        self._rows = max(_LEAST_ROWS, _limit(_BLOCK_ELEMENTS, features.device) // max(1, self.batch * self.count))
        self._keeps = self.batch * self.count**2 <= _limit(_KEPT_ELEMENTS, features.device)
        self._kept: list[Tile] | None = None
        self._scratch: Tensor | None = None

    @staticmethod
    def images_at_once(count: int, device: torch.device) -> int:
        """How many images of ``count`` patches make one batch whose similarities need not be computed twice."""
        return max(1, _limit(_KEPT_ELEMENTS, device) // count**2)

    def tiles(self) -> Iterator[Tile]:
        """Half of the Gram matrices: every pair of patches is in one tile, or twice in a square one."""
        if not self._keeps:
            return self._compute()
        if self._kept is None:
            self._kept = list(self._compute())
        return iter(self._kept)

    def _compute(self) -> Iterator[Tile]:
        for start in range(0, self.count, self._rows):
            rows = slice(start, min(start + self._rows, self.count))
            yield Tile(rows, rows, self._product(rows, rows), 1)
            if rows.stop < self.count:
                rest = slice(rows.stop, self.count)
                yield Tile(rows, rest, self._product(rows, rest), 2)

    def _product(self, rows: slice, columns: slice) -> Tensor:
        left, right = self.features[:, rows], self.features[:, columns].mT
        shape = (self.batch, left.shape[1], right.shape[2])
        if self._keeps:
            out = left.new_empty(shape)
        else:
            if self._scratch is None:
                self._scratch = left.new_empty(self.batch * self._rows * self.count)
            out = self._scratch[: math.prod(shape)].view(shape)
        if self.batch == 1:  # a plain product is quicker than a batched one of one
            torch.mm(left[0], right[0], out=out[0])
        else:
            torch.bmm(left, right, out=out)
        return out

    def counts_above(self, threshold: Tensor) -> Tensor:
        """How many other patches each patch is more similar to than the threshold.

        Args:
            threshold: one a image, shape (B,), float32.

        Returns:
            Shape (B, N), int64, in [0, N - 1].
        """
        # Counted in float32, which is exact up to 2^24 patches and quicker to add up than booleans.
        counts = self.features.new_zeros(self.batch, self.count)
        limit = threshold.view(-1, 1, 1)
        for tile in self.tiles():
            above = torch.gt(tile.values, limit, out=torch.empty_like(tile.values))
            counts[:, tile.rows] += above.sum(dim=2)
            if tile.weight == 2:
                counts[:, tile.columns] += above.sum(dim=1)
            else:
                counts[:, tile.rows] -= above.diagonal(dim1=1, dim2=2)
        return counts.long()

    def quantile(self, fraction: float) -> Tensor:
        """The lower quantile of the similarities of pairs of different patches, exact, without sorting them all.

        Exact where no patch is less similar to itself than to another, as is true of normalised features.

        A random sample of pairs brackets the quantile. One look at the matrix counts what lies below the bracket and
        collects what lies inside, and the rank is found among these. Should the bracket miss, a wider one is taken.

        Args:
            fraction: in [0, 1].

        Returns:
            Shape (B,), float32. Not finite where features are not, and NaN where the patch is the only one.
        """
        pairs = self.count * (self.count - 1)
        if not (pairs and self.batch):
            return self.features.new_full((self.batch,), torch.nan)
        # A patch's similarity to itself is the largest there is: the lowest ranks are those of other pairs.
        rank = math.floor(fraction * (pairs - 1))
        everything = self.features.new_full((self.batch,), torch.inf)
        if self.count**2 <= 4 * _SAMPLED_PAIRS:
            return self._select(rank, -everything, everything)
        sample = self._sample()
        for errors in (_STANDARD_ERRORS, 8 * _STANDARD_ERRORS):
            found = self._select(rank, *_bracket(sample, fraction, errors))
            if not found.isnan().any():
                return found
        return self._select(rank, -everything, everything)

    def _select(self, rank: int, low: Tensor, high: Tensor) -> Tensor:
        """The similarity of a rank in the whole matrix, (B,): NaN where it is not in [``low``, ``high``], (B,) each."""
        up_to_low, inside = self._collect(low, high)
        answers = []
        for image, values in enumerate(inside):
            index = rank - up_to_low[image]
            if 0 <= index < len(values):
                answers.append(_ranked(values[None], index)[0])
            elif index < 0 and rank >= self._count(torch.lt, low)[image]:
                answers.append(low[image])
            elif index >= 0 and rank < self._count(torch.le, high)[image]:
                answers.append(high[image])
            else:
                answers.append(low.new_tensor(torch.nan))
        return torch.stack(answers)

    def _count(self, compare: Callable[..., Tensor], limit: Tensor) -> list[int]:
        """How many similarities of each image's whole matrix compare so with its limit."""
        total = torch.zeros(self.batch, dtype=torch.int64, device=limit.device)
        for tile in self.tiles():
            held = compare(tile.values, limit.view(-1, 1, 1), out=torch.empty_like(tile.values))
            total += tile.weight * held.sum(dim=2).long().sum(dim=1)
        return cast("list[int]", total.tolist())

    def _collect(self, low: Tensor, high: Tensor) -> tuple[list[int], list[Tensor]]:
        """Of each image's whole matrix, how much is up to ``low``, and all that is strictly between the two limits."""
        up_to_low = [0] * self.batch
        inside: list[list[Tensor]] = [[] for _ in range(self.batch)]
        for tile in self.tiles():
            for image, (under, values) in enumerate(_between(tile.values, low, high)):
                up_to_low[image] += tile.weight * under
                inside[image] += [values] * tile.weight
        return up_to_low, [torch.cat(parts) for parts in inside]

    def _sample(self) -> Tensor:
        """Similarities of random pairs of patches, the same pairs each time; shape (B, pairs), float32."""
        if self._keeps:
            places = _sampled_places(self.count, self._rows, self.features.device)
            tiles = zip(self.tiles(), places, strict=True)
            return torch.cat([tile.values.flatten(1)[:, place] for tile, place in tiles], dim=1)
        wanted = max(_SAMPLED_PAIRS, (self.count // _PATCHES_PER_ROOT_SAMPLE) ** 2)
        pairs = _random_pairs(self.count, wanted).to(self.features.device)
        at_once = max(1, _GATHERED_ELEMENTS // (self.batch * self.features.shape[2]))
        products = [
            (self.features[:, first] * self.features[:, second]).sum(dim=2)
            for first, second in (part.unbind() for part in torch.split(pairs, at_once, dim=1))
        ]
        return torch.cat(products, dim=1)


def _limit(limits: dict[str, int], device: torch.device) -> int:
    return limits.get(device.type, limits["cpu"])


def _bracket(sample: Tensor, fraction: float, errors: float) -> tuple[Tensor, Tensor]:
    """Values that enclose a quantile unless the sample is off by more than that many standard errors; (B,) each."""
    size = sample.shape[1]
    error = errors * math.sqrt(fraction * (1 - fraction) / size)
    first, last = math.floor((fraction - error) * size) - 1, math.ceil((fraction + error) * size)
    infinite = sample.new_full((len(sample),), torch.inf)
    low = _ranked(sample, first) if first >= 0 else -infinite
    return low, _ranked(sample, last) if last < size else infinite


def _ranked(values: Tensor, rank: int) -> Tensor:
    """The value of a rank, from 0, in each row; (B, M) to (B,)."""
    if values.device.type == "cpu":  # NumPy is several times as quick at this
        return torch.from_numpy(np.partition(values.numpy(), rank, axis=1)[:, rank])
    return values.kthvalue(rank + 1).values


def _between(values: Tensor, low: Tensor, high: Tensor) -> list[tuple[int, Tensor]]:
    """For each image, how many values are up to its lower limit, and those strictly between its limits, (?,)."""
    if values.device.type == "cpu":  # at this, too
        found = []
        for image, below, above in zip(values.numpy(), low.tolist(), high.tolist(), strict=True):
            over = image > below
            found.append((over.size - np.count_nonzero(over), torch.from_numpy(image[over & (image < above)])))
        return found
    over = values > low.view(-1, 1, 1)
    chosen = over & (values < high.view(-1, 1, 1))
    counts = torch.stack([(~over).sum(dim=(1, 2)), chosen.sum(dim=(1, 2))]).tolist()
    return list(zip(counts[0], torch.split(values[chosen], counts[1]), strict=True))


def _random_pairs(count: int, wanted: int) -> Tensor:
    """Pairs of patch indices, shape (2, wanted), int64: the same for the same arguments."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(count, (2, wanted), generator=generator)


@lru_cache(maxsize=64)
def _sampled_places(count: int, block: int, device: torch.device) -> list[Tensor]:
    """Where the tiles of a matrix hold random pairs of patches: indices into each tile's values, flattened."""
    first, second = _random_pairs(count, _SAMPLED_PAIRS)
    swapped = second // block < first // block  # the tiles hold no column before their rows' block
    row, column = torch.where(swapped, second, first), torch.where(swapped, first, second)
    places = []
    for start in range(0, count, block):
        stop = min(start + block, count)
        here = (row >= start) & (row < stop)
        inside = here & (column < stop)
        places.append((row[inside] - start) * (stop - start) + column[inside] - start)
        if stop < count:
            beside = here & (column >= stop)
            places.append((row[beside] - start) * (count - stop) + column[beside] - stop)
    return [place.to(device) for place in places]
