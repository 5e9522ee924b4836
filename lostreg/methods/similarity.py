"""Similarities between all patches of an image, tile by tile: memory grows with the number of patches, not its square.

The Gram matrix is symmetric, so half of it is enough: for each block of rows, the square tile on the diagonal and the
rest to its right. Small images keep their tiles, so each similarity is computed once; for larger ones a second look at
the matrix computes it again, which costs less than the memory would.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lostreg import kernels

_KEPT_ELEMENTS: Final = {"cpu": 1 << 25, "cuda": 1 << 28}  # of the whole matrices: their halves take 64 or 512 MiB
_BLOCK_ELEMENTS: Final = {"cpu": 1 << 19, "cuda": 1 << 26}  # of a block of rows: on a CPU, what its caches hold
_LEAST_ROWS: Final = 128  # of a block: thinner products are slow


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

    Attributes:
        keeps: whether `tiles` computes each similarity once and gives the same tiles every time.
    """

    def __init__(self, features: Tensor) -> None:
        self.features = features
        self.batch, self.count, _ = features.shape
        self._rows = max(_LEAST_ROWS, _limit(_BLOCK_ELEMENTS, features.device) // max(1, self.batch * self.count))
        self.keeps = self.batch * self.count**2 <= _limit(_KEPT_ELEMENTS, features.device)
        self._kept: list[Tile] | None = None
        self._scratch: Tensor | None = None

    @staticmethod
    def images_at_once(count: int, device: torch.device) -> int:
        """How many images of ``count`` patches make one batch whose similarities need not be computed twice."""
        return max(1, _limit(_KEPT_ELEMENTS, device) // count**2)

    @staticmethod
    def most_bytes(count: int, device: torch.device) -> int:
        """An upper bound on what the similarities of one image of ``count`` patches take at once.

        These are its tiles, kept or one of them, and beside them the distances of a block from the mean, or its
        flags: one byte each, and on a GPU, which adds up whole numbers of one kind, a copy of eight bytes each.
        """
        rows = min(count, max(_LEAST_ROWS, _limit(_BLOCK_ELEMENTS, device) // max(1, count)))
        tiles = count * (count + rows) // 2 if count**2 <= _limit(_KEPT_ELEMENTS, device) else rows * count
        return 4 * tiles + rows * count * (4 if device.type == "cpu" else 9)

    def tiles(self) -> Iterator[Tile]:
        """Half of the Gram matrices: every pair of patches is in one tile, or twice in a square one."""
        if not self.keeps:
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
        if self.keeps:
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

    def mean_and_deviation(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the similarities of pairs of different patches.

        Returns:
            Two tensors of shape (B,), float32; 0 and 0 where the patch is the only one. Not finite where features
            are not.
        """
        pairs = self.count * (self.count - 1)
        if not pairs:
            nothing = self.features.new_zeros(self.batch)
            return nothing, nothing
        # The sum of all similarities is the squared length of the sum of all features.
        whole = torch.linalg.vector_norm(self.features.sum(dim=1), dim=1).square()
        own = self.features.square().sum(dim=2)
        mean = (whole - own.sum(dim=1)) / pairs
        # Distances from the mean are squared, not the similarities: these may all be close to 1.
        squares = -(own - mean[:, None]).square().sum(dim=1)
        for tile in self.tiles():
            distances = torch.sub(tile.values, mean.view(-1, 1, 1), out=torch.empty_like(tile.values))
            squares += tile.weight * torch.linalg.vector_norm(distances, dim=(1, 2)).square()
        return mean, (squares / pairs).clamp(min=0).sqrt()

    def counts_above(self, thresholds: Tensor) -> Tensor:
        """How many other patches each patch is more similar to than a threshold, for several of them at once.

        Args:
            thresholds: K an image, shape (B, K), float32.

        Returns:
            Shape (B, K, N), int64, in [0, N - 1].
        """
        counts = torch.zeros(self.batch, thresholds.shape[1], self.count, dtype=torch.int64, device=thresholds.device)
        count = _count_on_cpu if thresholds.device.type == "cpu" else _count
        if kernels.usable(counts):
            count = _count_by_kernel
        for tile in self.tiles():
            count(tile, thresholds, counts)
        return counts


def connections_to(features: Tensor, others: Tensor, thresholds: Tensor) -> Tensor:
    """How many patches of a set each patch is more similar to than a threshold; one of the set counts itself, too.

    Args:
        features: shape (B, N, D), float32.
        others: the set, shape (B, N), bool.
        thresholds: K an image, shape (B, K), float32.

    Returns:
        Shape (B, K, N), int64.
    """
    batch, count, _ = features.shape
    sizes = others.sum(dim=1)
    most = int(sizes.max())
    # The members of each set first, in order; what follows them in the smaller sets is left out of the count.
    members = others.byte().argsort(dim=1, descending=True, stable=True)[:, :most]
    present = torch.arange(most, device=features.device) < sizes[:, None]
    image = torch.arange(batch, device=features.device)[:, None]
    block = max(_LEAST_ROWS, _limit(_BLOCK_ELEMENTS, features.device) // max(1, batch * count))
    counts = torch.zeros(batch, thresholds.shape[1], count, dtype=torch.int64, device=features.device)
    for start in range(0, most, block):
        part = slice(start, start + block)
        values = features[image, members[:, part]] @ features.mT  # (B, members, N)
        values.masked_fill_(~present[:, part, None], -torch.inf)
        for index, limit in enumerate(thresholds.unbind(dim=1)):
            counts[:, index] += _sum_of_flags(values > limit.view(-1, 1, 1))
    return counts


def _sum_of_flags(flags: Tensor) -> Tensor:
    """How many are set in each column, (B, rows, columns) to (B, columns)."""
    if flags.device.type == "cpu":
        return torch.from_numpy(_sums(flags.numpy(), axis=1).astype(np.int64))
    return flags.sum(dim=1)


def _limit(limits: dict[str, int], device: torch.device) -> int:
    return limits.get(device.type, limits["cpu"])


def _count(tile: Tile, thresholds: Tensor, counts: Tensor) -> None:
    """Add what a tile has above each threshold, (B, K), to the counts, (B, K, N)."""
    for index, limit in enumerate(thresholds.unbind(dim=1)):
        above = tile.values > limit.view(-1, 1, 1)
        counts[:, index, tile.rows] += above.sum(dim=2)
        if tile.weight == 2:
            counts[:, index, tile.columns] += above.sum(dim=1)
        else:
            counts[:, index, tile.rows] -= above.diagonal(dim1=1, dim2=2).long()


def _count_on_cpu(tile: Tile, thresholds: Tensor, counts: Tensor) -> None:
    """The same by NumPy, which adds up bytes several times as fast as PyTorch."""
    values, totals = tile.values.numpy(), counts.numpy()
    above = np.empty(values.shape[1:], dtype=np.bool_)
    for image, limits in enumerate(thresholds.numpy()):
        for index, limit in enumerate(limits):
            np.greater(values[image], limit, out=above)
            total = totals[image, index]
            total[tile.rows] += _sums(above, axis=1)
            if tile.weight == 2:
                total[tile.columns] += _sums(above, axis=0)
            else:
                total[tile.rows] -= above.diagonal()


def _count_by_kernel(tile: Tile, thresholds: Tensor, counts: Tensor) -> None:
    """The same in one pass over the tile for all thresholds."""
    kernels.count_above(tile.values, thresholds, counts, tile.rows.start, tile.columns.start)


def _sums(flags: NDArray[np.bool_], axis: int) -> NDArray[Any]:
    """How many flags are set along an axis, counted in the smallest integers that hold that many."""
    kind = np.uint16 if flags.shape[axis] < 1 << 16 else np.uint32
    sums: NDArray[Any] = flags.view(np.uint8).sum(axis=axis, dtype=kind)
    return sums
