"""A backbone's forward over packed images, block by block, for whoever wants to look at it on the way.

`Forward.start` embeds the patches of several images of any shapes; each `Forward.advance` runs the next block. Between
them the tokens are there to be read. Test-time registers, where the backbone has them, are tokens of the prefix.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, cast

import torch
from timm.models.eva import Eva
from torch import Tensor, nn
from torch.nn import functional

from lostreg.models.backbone import Backbone
from lostreg.models.blocks import BlockRunner, Move, Packing, Watch, attention_rows, normed, pack_ropes, project
from lostreg.models.own import FunctionBackbone, no_blocks
from lostreg.models.table import Feature, Interpolation

_CACHED_TOKENS: Final = 1 << 15  # of position embeddings that are kept for the next images of the same grid

Grid = tuple[int, int]


@dataclass
class Walk:
    """Images on their way through a backbone.

    Attributes:
        tokens: of all images, one after the other, prefix tokens first in each: shape (T, D), float32. Overwritten by
            each block.
        packing: where each image's tokens lie.
        ropes: each block's rotary embedding, if any.
        prefix: tokens in front of each image's patches.
        added: places of the test-time registers among the tokens, shape (images, count), int64; None without them.
        layer: the block that comes next; `Backbone.depth` behind the last.
    """

    tokens: Tensor
    packing: Packing
    ropes: list[Tensor | None]
    prefix: int
    added: Tensor | None = None
    layer: int = 0

    def patches(self, tokens: Tensor | None = None) -> Tensor:
        """A copy of the patches' share of these or other tokens of the same images: (sum of all N, D), float32."""
        chosen = self.tokens if tokens is None else tokens
        count = len(chosen) - self.prefix * len(self.packing.lengths)
        patches, end = torch.empty(count, chosen.shape[1], device=chosen.device), 0
        for run in self._runs(chosen):
            inside = run[:, self.prefix :]
            start, end = end, end + inside.shape[0] * inside.shape[1]
            patches[start:end].view(inside.shape).copy_(inside)
        return patches

    def prefixes(self, tokens: Tensor | None = None) -> Tensor:
        """A copy of the prefixes' share: shape (images, prefix, D), float32."""
        chosen = self.tokens if tokens is None else tokens
        return torch.cat([run[:, : self.prefix] for run in self._runs(chosen)]).float()

    def _runs(self, tokens: Tensor) -> Iterator[Tensor]:
        """The tokens of neighbouring images of equal length together, (images, length, D)."""
        return (tokens[run].view(images, -1, tokens.shape[1]) for run, images in self.packing.runs)


class Forward:
    """The forward of a backbone.

    Args:
        backbone: a frozen model.
        compiled: whether the blocks are compiled, see `BlockRunner`.

    Raises:
        BackboneError: if it is a function, which has no blocks.
    """

    def __init__(self, backbone: Backbone, *, compiled: bool = False) -> None:
        if isinstance(backbone, FunctionBackbone):
            raise no_blocks(backbone)
        self.backbone = backbone
        self._run_block = BlockRunner(backbone.dtype, compiled=compiled)
        self._frames: OrderedDict[Grid, Frame] = OrderedDict()

    @torch.no_grad()
    def start(self, pixels: Iterable[Tensor], grids: Sequence[Grid]) -> Walk:
        """Tokens before the first block.

        Args:
            pixels: normalised pixels of each image's patches, row by row, shape (N, patch * patch * 3): in a patch
                row by row too, and of a pixel red, green, blue. On the model's device. Neighbours of one grid may come
                together, (images, N, patch * patch * 3). Taken one after the other.
            grids: (h, w) of each image; N = h * w.
        """
        model: Any = self.backbone.model
        prefix, own = self.backbone.prefix_tokens, self.backbone.own_prefix_tokens
        packing = Packing(tuple(prefix + rows * columns for rows, columns in grids), self.backbone.device)
        frames = [self._frame(grid) for grid in grids]
        tokens = torch.empty(packing.ends[-1], frames[0].tokens.shape[1], device=self.backbone.device)
        image = end = 0
        for values in pixels:
            images = values.shape[0] if values.ndim == 3 else 1
            frame, start, end = frames[image].tokens, end, end + images * packing.lengths[image]
            run = tokens[start:end].view(images, packing.lengths[image], -1)
            run[:, :own] = frame[:own]
            torch.add(frame[own:], self.embed_patches(values).view(images, *frame[own:].shape), out=run[:, prefix:])
            image += images
        if image != len(grids):
            raise ValueError(f"expected pixels of {len(grids)} images, not of {image}")
        tokens = normed(model.norm_pre, tokens, torch.float32)
        added = None
        if prefix > own:  # blank tokens are blank where the blocks begin, whatever a norm made of them
            added = packing.offsets[:-1, None].long() + torch.arange(own, prefix, device=packing.device)
            tokens.index_fill_(0, added.flatten(), 0)
        return Walk(tokens, packing, self._ropes(frames), prefix, added)

    @torch.no_grad()
    def embed_patches(self, pixels: Tensor) -> Tensor:
        """Patches right after the patch embedding, without positions: (..., patch * patch * 3) to (patches, D)."""
        embedding: Any = self.backbone.model.patch_embed
        values = pixels.flatten(0, -2).to(self.backbone.dtype)
        return cast("Tensor", embedding.norm(functional.linear(values, self._patch_weight, embedding.proj.bias)))

    @torch.no_grad()
    def advance(self, walk: Walk, watch: Watch | None = None) -> None:
        """Run the next block.

        Args:
            walk: changed in place.
            watch: is shown the hidden units of the block's MLP.
        """
        block = self._block(walk.layer)
        self._run_block(block, walk.tokens, walk.packing, walk.ropes[walk.layer], move=self._move(walk), watch=watch)
        walk.layer += 1

    @torch.no_grad()
    def project(self, walk: Walk, feature: Feature) -> Tensor:
        """The next block's queries, keys or values of all tokens: shape (T, heads * head_dim)."""
        return project(self._block(walk.layer), walk.tokens, feature, self.backbone.dtype)

    @torch.no_grad()
    def attention(self, walk: Walk, rows: int) -> list[Tensor]:
        """What the first tokens of each image attend to in the next block: see `attention_rows`."""
        rope = walk.ropes[walk.layer]
        return attention_rows(self._block(walk.layer), walk.tokens, walk.packing, rope, rows, self.backbone.dtype)

    @torch.no_grad()
    def output(self, walk: Walk) -> Tensor:
        """The tokens as they leave the block before: of the last block after the model's final norm, if it has one."""
        if walk.layer < self.backbone.depth:
            return walk.tokens
        return normed(cast("nn.Module", self.backbone.model.norm), walk.tokens, torch.float32)

    def _block(self, layer: int) -> nn.Module:
        return cast("nn.Sequential", self.backbone.model.blocks)[layer]

    @cached_property
    def _units(self) -> dict[int, Tensor]:
        """The register neurons of each layer that has any."""
        registers = self.backbone.registers
        by_layer = registers.by_layer() if registers else {}
        return {layer: torch.tensor(units, device=self.backbone.device) for layer, units in by_layer.items()}

    def _move(self, walk: Walk) -> Move | None:
        units = self._units.get(walk.layer)
        return None if units is None or walk.added is None else Move(units, walk.added)

    @cached_property
    def _patch_weight(self) -> Tensor:
        """The patch embedding's convolution in the order of the pixels; a copy, made once, since models are frozen."""
        weight: Tensor = self.backbone.model.patch_embed.proj.weight  # type: ignore[union-attr, assignment]
        return weight.permute(0, 2, 3, 1).flatten(1)

    def _ropes(self, frames: Sequence["Frame"]) -> list[Tensor | None]:
        depth, prefix = self.backbone.depth, self.backbone.prefix_tokens
        if frames[0].ropes[0] is None:
            return [None] * depth
        if not self.backbone.model.rope_mixed:  # one for all blocks
            packed = pack_ropes([cast("Tensor", frame.ropes[0]) for frame in frames], prefix)
            return [packed] * depth
        by_layer = zip(*(cast("list[Tensor]", frame.ropes) for frame in frames), strict=True)
        return [pack_ropes(ropes, prefix) for ropes in by_layer]

    def _frame(self, grid: Grid) -> "Frame":
        """What an image of this grid starts from, kept for the next one of the same grid."""
        if grid in self._frames:
            self._frames.move_to_end(grid)
            return self._frames[grid]
        frame = make_frame(self.backbone, grid)
        self._frames[grid] = frame
        while sum(len(kept.tokens) for kept in self._frames.values()) > _CACHED_TOKENS:
            self._frames.popitem(last=False)
        return frame


@dataclass(frozen=True)
class Frame:
    """What is the same for all images of one grid.

    Attributes:
        tokens: the model's own prefix tokens and position embeddings, shape (prefix + N, D), float32: the patches are
            added to it.
        ropes: each block's rotary embedding of the patches, or None.
    """

    tokens: Tensor
    ropes: list[Tensor | None]


def make_frame(backbone: Backbone, grid: Grid) -> Frame:
    """The frame of a grid; gradients reach what it is made of, where they are asked for."""
    model: Any = backbone.model
    ropes: list[Tensor | None] = [None] * backbone.depth
    if backbone.spec.interpolation != "antialias":
        position = stretch_position_embedding(
            model.pos_embed, model.patch_embed.grid_size, grid, backbone.spec.interpolation
        )
        prefix = torch.cat([token for token in (model.cls_token, model.reg_token) if token is not None], dim=1)
        if not model.no_embed_class:  # the first rows are the prefix's own
            prefix, position = prefix + position[:, : prefix.shape[1]], position[:, prefix.shape[1] :]
        return Frame(torch.cat([prefix, position], dim=1)[0].float(), ropes)
    # The model's own way with an image whose patches are embedded as zeros.
    tokens = model._pos_embed(torch.zeros(1, *grid, model.embed_dim, device=backbone.device, dtype=backbone.dtype))
    if isinstance(model, Eva):
        tokens, rope = tokens
        if rope is not None:
            ropes = list(rope) if model.rope_mixed else [rope] * backbone.depth
    return Frame(tokens[0].float(), ropes)


def stretch_position_embedding(position: Tensor, source: Grid, target: Grid, interpolation: Interpolation) -> Tensor:
    """Position embeddings for another patch grid, interpolated bicubically as the weights' release does it.

    Args:
        position: embeddings of prefix and patches, shape (1, P + h0*w0, D); the P prefix ones are kept.
        source: (h0, w0), the grid that the weights were trained on.
        target: (h, w), the grid that is wanted.
        interpolation: see `Interpolation`.

    Returns:
        Shape (1, P + h*w, D), of the dtype of ``position``.
    """
    if source == target:
        return position
    count = source[0] * source[1]
    prefix, patches = position[:, :-count], position[:, -count:]
    image = patches.float().reshape(1, *source, -1).permute(0, 3, 1, 2)
    if interpolation == "offset":
        # The releases pass the factor, not the size: sample points lie where (target + 0.1) / source puts them.
        factors = [(wanted + 0.1) / had for wanted, had in zip(target, source, strict=True)]
        stretched = functional.interpolate(image, scale_factor=factors, mode="bicubic")
    else:
        stretched = functional.interpolate(image, size=target, mode="bicubic", antialias=interpolation == "antialias")
    flat = stretched.permute(0, 2, 3, 1).reshape(1, target[0] * target[1], -1)
    return torch.cat([prefix, flat.to(position.dtype)], dim=1)
