"""What CLS and register tokens attend to: maps over the patches, per head, at any layer.

The rows of the attention matrix are written out for the tokens in front of the patches alone; everywhere else attention
stays as fast as it is.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lostreg.checks import shown
from lostreg.errors import ImageError, OptionError
from lostreg.images.decode import ImageSource, check_several
from lostreg.inference.discoverer import Discoverer, check_discoverer
from lostreg.inference.jobs import LookJob
from lostreg.models.backbone import Backbone
from lostreg.models.features import resolve_layer
from lostreg.models.forward import Forward, Grid


@dataclass(frozen=True)
class AttentionMaps:
    """The attention of one image's prefix tokens in one layer.

    Attributes:
        rows: of each prefix token and head, the attention to every token, prefix tokens first: shape (prefix, heads,
            prefix + N), float32; each row sums to 1.
        names: of the prefix tokens, such as ``CLS``, ``register 1`` and ``test-time register 1``.
        grid: (h, w) of the patches; N = h * w.
        layer: block index from 0.
    """

    rows: NDArray[np.float32]
    names: tuple[str, ...]
    grid: Grid
    layer: int

    @property
    def heads(self) -> NDArray[np.float32]:
        """The attention to patches alone, shape (prefix, heads, h, w); sums to 1 less what prefix tokens take."""
        maps: NDArray[np.float32] = self.rows[:, :, len(self.names) :].reshape(*self.rows.shape[:2], *self.grid)
        return maps

    @property
    def mean(self) -> NDArray[np.float32]:
        """`heads` averaged over the heads, shape (prefix, h, w)."""
        maps: NDArray[np.float32] = self.heads.mean(axis=1)
        return maps


def attention_maps(
    images: Iterable[ImageSource], discoverer: Discoverer, layers: Sequence[int] = (-1,)
) -> Iterator[list[AttentionMaps] | ImageError]:
    """Attention maps of images, streamed.

    Args:
        images: files, PIL images or arrays, as `Discoverer.discover` takes them.
        discoverer: the backbone, with or without test-time registers, and how images are read.
        layers: blocks, from 0, or from the end when negative.

    Returns:
        For each image its maps, one a layer in the order of ``layers``, or the error of one that cannot be read.

    Raises:
        OptionError: if a layer does not exist, or the backbone has no token in front of the patches.

    Example:
        >>> discoverer = lostreg.Discoverer("dinov2_vits14_reg", device="cpu")
        >>> for maps in lostreg.attention_maps(["dog.jpg"], discoverer, layers=[-1]):
        ...     print(maps[0].names[0], maps[0].mean.shape)
        CLS (5, 8, 11)
    """
    check_discoverer(discoverer, "images and then a Discoverer")
    check_several(images)
    backbone = discoverer.backbone
    if not isinstance(layers, Iterable):
        raise OptionError(f"layers must be a sequence of integers, not {shown(layers)}")
    wanted = [resolve_layer(backbone, layer) for layer in layers]
    if not wanted:
        raise OptionError("expected at least one layer")
    _check_prefix(backbone)

    def look(forward: Forward, pixels: list[Tensor], grids: Sequence[Grid]) -> list[list[AttentionMaps]]:
        return _maps_of(forward, pixels, grids, wanted)

    forward = Forward(backbone, compiled=discoverer.options.compile)
    return discoverer.stream_of(LookJob(forward, look)).outcomes(images)


def _check_prefix(backbone: Backbone) -> None:
    if not backbone.prefix_tokens:
        raise OptionError(f"{backbone.spec.name} has no CLS and no register tokens, so there is no attention to show")


def _maps_of(
    forward: Forward, pixels: list[Tensor], grids: Sequence[Grid], layers: Sequence[int]
) -> list[list[AttentionMaps]]:
    """One list an image, in the order of the layers."""
    names = tuple(forward.backbone.prefix_names)
    walk = forward.start(pixels, grids)
    found: dict[int, list[Tensor]] = {}
    while len(found) < len(set(layers)):
        if walk.layer in layers:
            found[walk.layer] = forward.attention(walk, len(names))
        if walk.layer < max(layers):
            forward.advance(walk)
    return [
        [AttentionMaps(found[layer][image].cpu().numpy(), names, grid, layer) for layer in layers]
        for image, grid in enumerate(grids)
    ]
