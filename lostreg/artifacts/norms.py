"""Norms of tokens at every layer: where artifacts show."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lostreg.artifacts.outliers import NormTally
from lostreg.models.forward import Forward, Grid


@dataclass(frozen=True)
class TokenNorms:
    """L2 norms of one image's tokens.

    Attributes:
        layers: as they leave each block, before any final norm, shape (layers, prefix + N), float32. The last row is
            what the register paper calls the output: its outliers have norms of 150 and more with DINOv2-g.
        final: after the model's final LayerNorm, shape (prefix + N,), float32: there the outliers are gone, since
            the norm gives every token about the same length. Equal to the last of ``layers`` in models without one.
        prefix: tokens in front of the patches.
        grid: (h, w) of the patches; N = h * w.
    """

    layers: NDArray[np.float32]
    final: NDArray[np.float32]
    prefix: int
    grid: Grid

    @property
    def output(self) -> NDArray[np.float32]:
        """Norms of the patches at the output, before the final norm, shape (N,)."""
        norms: NDArray[np.float32] = self.layers[-1, self.prefix :]
        return norms


def token_norms(forward: Forward, pixels: Sequence[Tensor], grids: Sequence[Grid]) -> list[TokenNorms]:
    """The norms of each image's tokens at every layer.

    Args:
        forward: of a backbone.
        pixels: as `Forward.start` takes them.
        grids: (h, w) of each image.
    """
    walk = forward.start(pixels, grids)
    layers = []
    for _ in range(forward.backbone.depth):
        forward.advance(walk)
        layers.append(torch.linalg.vector_norm(walk.tokens, dim=1))
    final = torch.linalg.vector_norm(forward.output(walk), dim=1).cpu().numpy()
    stacked = torch.stack(layers).cpu().numpy()
    return [
        TokenNorms(stacked[:, span].copy(), final[span].copy(), walk.prefix, grid)
        for span, grid in zip(walk.packing.spans, grids, strict=True)
    ]


def emergence(tallies: Sequence[NormTally], cutoff: float) -> int | None:
    """The layer at which outliers emerge: the first that has half as many of them as the output, or more.

    Args:
        tallies: of the patches' norms as they leave each block.
        cutoff: norm from which a patch is an outlier.

    Returns:
        Block index from 0, or None where the output has no outliers.
    """
    counts = [tally.above(cutoff) for tally in tallies]
    if not counts or not counts[-1]:
        return None
    return next(layer for layer, count in enumerate(counts) if 2 * count >= counts[-1])
