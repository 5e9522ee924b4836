"""The student: a copy of a backbone with new registers, a part of it unlocked, and a forward with gradients."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

import torch
from timm.models import Eva
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lostreg.errors import OptionError
from lostreg.models.backbone import Backbone, with_new_registers
from lostreg.models.forward import make_frame

PARTS: Final = ("registers", "positions", "patches", "norm", "last:N", "all")
_STD: Final = 0.02  # of new registers


def make_student(backbone: Backbone, registers: int, seed: int) -> Backbone:
    """A copy of a backbone with new registers that are small random numbers; of none, the copy alone.

    Raises:
        BackboneError: if the model takes no registers, see `with_new_registers`.
    """
    if not registers:
        return replace(backbone, model=copy.deepcopy(backbone.model))
    student = with_new_registers(backbone, registers)
    token: Tensor = student.model.reg_token.data  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(seed)
    token[:, -registers:] = _STD * torch.randn(1, registers, token.shape[2], generator=generator).to(token)
    return student


def unlock(backbone: Backbone, parts: Sequence[str]) -> dict[str, nn.Parameter]:
    """Let gradients reach parts of a model, and nothing else of it.

    Args:
        backbone: changed in place.
        parts: of `PARTS`: register tokens, position embedding, patch embedding, final norm, the last N blocks, or
            everything. What a model does not have, such as a position embedding beside rotary ones, is passed over.

    Returns:
        The parameters that are unlocked, by name.

    Raises:
        OptionError: if a part is unknown, or nothing is left to be trained.
    """
    prefixes = [prefix for part in parts for prefix in _prefixes(part, backbone.depth)]
    unlocked = {}
    for name, parameter in backbone.model.named_parameters():
        parameter.requires_grad_(name.startswith(tuple(prefixes)))
        if parameter.requires_grad:
            unlocked[name] = parameter
    if not unlocked:
        raise OptionError(f"{backbone.spec.name} has nothing to train in {', '.join(parts)}: unlock more")
    return unlocked


def _prefixes(part: str, depth: int) -> Iterator[str]:
    whole = {"registers": "reg_token", "positions": "pos_embed", "patches": "patch_embed.", "norm": "norm.", "all": ""}
    kind, _, number = part.partition(":")
    if part in whole:
        yield whole[part]
    elif kind == "last" and number.isdecimal() and 1 <= int(number) <= depth:
        yield from (f"blocks.{layer}." for layer in range(depth - int(number), depth))
    else:
        raise OptionError(
            f"cannot unlock '{part}': expected {', '.join(PARTS[:-1])} (N from 1 to {depth}) or {PARTS[-1]}"
        )


def patch_tokens(backbone: Backbone, images: Tensor, *, save_memory: bool = False) -> Tensor:
    """Patch tokens after the last block, before the final norm, as `Forward` computes them, but with gradients.

    Args:
        backbone: without test-time registers.
        images: normalised RGB, shape (B, 3, H, W), H and W multiples of the patch size, on the model's device.
        save_memory: whether what is inside a block is computed again on the way back instead of being kept.

    Returns:
        Shape (B, N, D), patches row by row.
    """
    model: Any = backbone.model
    own, patch = backbone.own_prefix_tokens, backbone.spec.patch_size
    frame = make_frame(backbone, (images.shape[2] // patch, images.shape[3] // patch))
    patches = model.patch_embed(images).flatten(1, 2) + frame.tokens[own:]
    tokens: Tensor = model.norm_pre(torch.cat([frame.tokens[:own].expand(len(images), -1, -1), patches], dim=1))
    for block, rope in zip(model.blocks, frame.ropes, strict=True):
        run: Callable[..., Tensor] = partial(block, rope=rope) if isinstance(model, Eva) else block
        tokens = checkpoint(run, tokens, use_reentrant=False) if save_memory else run(tokens)
    return tokens[:, own:]
