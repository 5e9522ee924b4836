"""Small models of many architectures with lively random weights, and what is fed to them."""

import copy
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lostreg.models.backbone import Backbone, build_backbone, find_spec

Grid = tuple[int, int]

DEPTH = 3
LAYERS = (0, DEPTH // 2, DEPTH - 1)
GRID = (3, 5)
SMALL = {"embed_dim": 96, "num_heads": 4}
NARROW = {"embed_dim": 192, "num_heads": 3}  # rows of the table keep everything but their width
PLAIN = "timm:vit_tiny_patch16_224"
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": (PLAIN, {}),
    "query and key norms": (PLAIN, {"qk_norm": True}),
    "scaled attention, no bias": (PLAIN, {"scale_attn_norm": True, "qkv_bias": False}),
    "post-norm": ("timm:vit_base_patch16_rpn_224", SMALL),
    "distilled": ("timm:deit_tiny_distilled_patch16_224", {}),
    "flexible": ("timm:flexivit_small", SMALL),
    "RMS norm, SwiGLU": ("timm:aimv2_large_patch14_224", SMALL),
    "sub-norms": ("timm:beit3_base_patch16_224", SMALL),
    "EVA": ("timm:eva_large_patch14_196", SMALL),
    "EVA, no key bias": ("timm:eva_giant_patch14_224", SMALL),
    "EVA-02, fused": ("timm:eva02_tiny_patch14_224", {}),
    "EVA-02, q, k and v apart": ("timm:eva02_base_patch14_224", SMALL),
    "EVA-02, post-norm": ("timm:eva02_enormous_patch14_clip_224", SMALL),
    "RoPE, no CLS": ("timm:vit_medium_patch16_rope_reg1_gap_256", {}),
    "RoPE, no bias": ("timm:vit_mediumd_patch16_rope_reg1_gap_256", {}),
    "axial RoPE": ("timm:vit_small_patch16_rope_224", {}),
    "mixed RoPE": ("timm:vit_small_patch16_rope_mixed_224", {}),
    "mixed RoPE and positions": ("timm:vit_small_patch16_rope_mixed_ape_224", {}),
    "PE, no CLS": ("timm:vit_pe_core_gigantic_patch14_448", SMALL),
    "DINOv3 with biases": ("timm:vit_small_patch16_dinov3_qkvb", {}),
    "grouped queries": (
        "timm:vit_base_patch16_sapiens2",
        {"embed_dim": 128, "num_heads": 8, "num_kv_heads": (8, 4, 2)},
    ),
}
SOME = ("query and key norms", "post-norm", "distilled", "EVA-02, post-norm", "mixed RoPE", "grouped queries")


def built(name: str, depth: int = DEPTH, **options: Any) -> Backbone:
    """A backbone with random, lively weights; the trained one keeps its row, not its weights."""
    backbone = build_backbone(find_spec(name), depth=depth, **options)
    enliven(backbone.model)
    return backbone


@torch.no_grad()
def enliven(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim in (2, 4):  # weights of linear layers and the patch embedding
            values *= parameter[0].numel() ** -0.5
        elif parameter.ndim == 1:  # biases, norms, layer scales
            values = 0.5 + 0.3 * values
        parameter.copy_(values)


def images_for(backbone: Backbone, grid: tuple[int, int] = GRID, batch: int = 2) -> Tensor:
    patch = backbone.spec.patch_size
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, 3, grid[0] * patch, grid[1] * patch, generator=generator)


def bicubic_weights(source: int, target: int, scale: float) -> np.ndarray:
    """Keys' cubic convolution (a = -0.75), half-pixel centres, border repeated; a (target, source) matrix."""
    a = -0.75
    matrix = np.zeros((target, source))
    for i in range(target):
        centre = (i + 0.5) / scale - 0.5
        for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
            x = abs(centre - tap)
            near = (a + 2) * x**3 - (a + 3) * x**2 + 1
            far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
            matrix[i, min(max(tap, 0), source - 1)] += near if x <= 1 else far if x < 2 else 0.0
    return matrix


def stretched_by_hand(position: Tensor, source: tuple[int, int], target: tuple[int, int], offset: float) -> Tensor:
    """What `offset` (0.1) and `plain` (0) interpolation mean, in NumPy: (1, P + h0*w0, D) to (1, P + h*w, D)."""
    count = source[0] * source[1]
    prefix, patches = position[0, :-count].numpy(), position[0, -count:].double().numpy()
    rows, columns = (
        bicubic_weights(had, wanted, (wanted + offset) / had) for had, wanted in zip(source, target, strict=True)
    )
    image = patches.reshape(*source, -1)
    flat = np.einsum("ih,jw,hwd->ijd", rows, columns, image).reshape(target[0] * target[1], -1)
    return torch.from_numpy(np.concatenate([prefix, flat.astype(np.float32)])[None])


def model_for_grid(backbone: Backbone, grid: tuple[int, int]) -> nn.Module:
    """The model itself, or, where its release stretches positions unlike timm, a copy with them stretched by hand."""
    offset = {"offset": 0.1, "plain": 0.0}.get(backbone.spec.interpolation)
    if offset is None:
        return backbone.model
    model = copy.deepcopy(backbone.model)
    native = model.patch_embed.grid_size
    model.pos_embed = nn.Parameter(stretched_by_hand(model.pos_embed.data, native, grid, offset), requires_grad=False)
    model.patch_embed.grid_size = grid  # timm finds nothing left to stretch
    return model


def joined(heads: Tensor) -> Tensor:
    """(B, heads, T, D) to (B, T, heads * D)."""
    return heads.transpose(1, 2).flatten(2)


def assert_close(actual: Tensor, expected: Tensor, what: str = "", tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape, what
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"{what}: off by {error:.2e} of the largest value"


GRIDS: list[Grid] = [(3, 5), (2, 2), (2, 2), (5, 3), (1, 1), (2, 2), (1, 7)]


def picture(backbone: Backbone, grid: Grid, number: int = 0) -> Tensor:
    return images_for(backbone, grid, batch=number + 1)[number:]


def patches(image: Tensor, patch: int) -> Tensor:
    """(1, 3, H, W) to (N, patch * patch * 3): of each patch its pixels, of each pixel red, green, blue."""
    _, _, height, width = image.shape
    corners = [(y, x) for y in range(0, height, patch) for x in range(0, width, patch)]
    return torch.stack([image[0, :, y : y + patch, x : x + patch].permute(1, 2, 0).flatten() for y, x in corners])
