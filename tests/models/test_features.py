"""Patch features against what the model's own full forward uses, read off its own attention call.

Every parameter is random, biases, layer scales and tokens too: at their initial values (0, 1e-5) they would hide
the very mistakes that these tests look for.
"""

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from random_models import (
    DEPTH,
    GRID,
    LAYERS,
    NARROW,
    OTHERS,
    PLAIN,
    SOME,
    assert_close,
    built,
    enliven,
    images_for,
    joined,
    model_for_grid,
    stretched_by_hand,
)
from torch import Tensor, nn

from lostreg.errors import OptionError
from lostreg.models.backbone import Backbone, build_backbone
from lostreg.models.features import collect_features, patch_features, resolve_layer
from lostreg.models.forward import stretch_position_embedding
from lostreg.models.table import BACKBONES, FEATURES


@torch.no_grad()
def full_forward(model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, int], Tensor]:
    """All tokens' q, k, v and out of every layer, from `forward_features` as timm wrote it.

    q and k are what leaves their norms (or the identities in their place), v is what the attention kernel gets.
    """
    found: dict[tuple[str, int], Tensor] = {}
    kernel = nn.functional.scaled_dot_product_attention
    values: list[Tensor] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        values.append(v)
        return kernel(q, k, v, **options)

    def keep(feature: str, layer: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            found[feature, layer] = joined(output) if output.ndim == 4 else output

        return hook

    handles = []
    for layer, block in enumerate(model.blocks):
        for feature, module in (("q", block.attn.q_norm), ("k", block.attn.k_norm), ("out", block)):
            handles.append(module.register_forward_hook(keep(feature, layer)))
    with monkeypatch.context() as patched:
        patched.setattr(nn.functional, "scaled_dot_product_attention", spy)
        final = model.forward_features(images)
    for handle in handles:
        handle.remove()
    for layer, block in enumerate(model.blocks):
        found["v", layer] = joined(values[layer][:, :: getattr(block.attn, "num_kv_groups", 1)])
    found["out", len(model.blocks) - 1] = final
    return found


@pytest.fixture(scope="module", params=[*BACKBONES, *OTHERS])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    name, options = OTHERS.get(request.param, (request.param, NARROW))
    return built(name, **options)


@pytest.fixture(scope="module", params=["dino_vits16", "dinov2_vits14_reg", "dinov3_vits16", "imgfocus_vits14", *SOME])
def some_backbone(request: pytest.FixtureRequest) -> Backbone:
    """One of each way through the code."""
    name, options = OTHERS.get(request.param, (request.param, NARROW))
    return built(name, **options)


def test_features_are_those_of_the_models_own_forward(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    images = images_for(backbone)
    assert tuple(backbone.model.patch_embed.grid_size) != GRID
    expected = full_forward(model_for_grid(backbone, GRID), images, monkeypatch)
    count = GRID[0] * GRID[1]
    for feature in FEATURES:
        for layer in LAYERS:
            actual = patch_features(backbone, images, feature, layer)
            assert actual.dtype == torch.float32
            assert_close(actual, expected[feature, layer][:, -count:], f"{feature} of layer {layer}")


@pytest.mark.parametrize("name", BACKBONES)
def test_rows_at_their_full_size_agree_as_well(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The width of the weights people load, and their depth, but for the large and giant models."""
    spec = BACKBONES[name]
    fewer = {"large": {"depth": 6}, "giant": {"depth": 3}}
    options = next((less for size, less in fewer.items() if f"_{size}_" in spec.timm_name), {})
    backbone = build_backbone(spec, **options)
    enliven(backbone.model)
    images = images_for(backbone, batch=1)
    expected = full_forward(model_for_grid(backbone, GRID), images, monkeypatch)
    wanted = [(feature, layer) for feature in FEATURES for layer in (0, backbone.depth // 2, backbone.depth - 1)]
    for (feature, layer), actual in zip(wanted, collect_features(backbone, images, wanted), strict=True):
        assert_close(actual, expected[feature, layer][:, -GRID[0] * GRID[1] :], f"{feature} of layer {layer}")


def test_features_follow_the_orientation_of_the_image(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = (4, 2)
    images = images_for(backbone, grid, batch=1)
    expected = full_forward(model_for_grid(backbone, grid), images, monkeypatch)["k", DEPTH - 1]
    assert_close(patch_features(backbone, images), expected[:, -8:])


def test_no_prefix_token_is_among_the_patches(backbone: Backbone) -> None:
    """In the first layer a patch knows nothing of CLS and registers, so changing these must change nothing."""
    changed = dataclasses.replace(backbone, model=copy.deepcopy(backbone.model))
    tokens = [getattr(changed.model, name, None) for name in ("cls_token", "reg_token", "dist_token")]
    for token in tokens:
        if token is not None:
            token.add_(1.0)
    images = images_for(backbone)
    if all(token is None for token in tokens):
        assert backbone.prefix_tokens == 0
    for feature in ("q", "k", "v"):
        before = patch_features(backbone, images, feature, 0)
        assert before.shape[:2] == (2, GRID[0] * GRID[1])
        assert torch.equal(patch_features(changed, images, feature, 0), before)


def test_each_image_of_a_batch_is_on_its_own(some_backbone: Backbone) -> None:
    images = images_for(some_backbone)
    together = patch_features(some_backbone, images)
    for index in range(2):
        assert_close(patch_features(some_backbone, images[index : index + 1]), together[index : index + 1])


def test_the_same_images_give_the_same_features_bit_for_bit(some_backbone: Backbone) -> None:
    images = images_for(some_backbone)
    assert torch.equal(patch_features(some_backbone, images), patch_features(some_backbone, images.clone()))


def test_several_features_at_once_equal_each_alone(some_backbone: Backbone) -> None:
    images = images_for(some_backbone)
    wanted = [("out", DEPTH - 1), ("k", 0), ("v", -1), ("out", 0), ("k", 0), ("q", 1)]
    for pair, tensor in zip(wanted, collect_features(some_backbone, images, wanted), strict=True):
        assert torch.equal(tensor, patch_features(some_backbone, images, *pair)), pair


def test_the_model_is_left_as_it_was(some_backbone: Backbone) -> None:
    model = some_backbone.model
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    keys = [(name, sorted(vars(module))) for name, module in model.named_modules()]
    for feature in FEATURES:
        patch_features(some_backbone, images_for(some_backbone), feature, 1)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert [(name, sorted(vars(module))) for name, module in model.named_modules()] == keys
    for module in model.modules():
        assert not module.training
        assert not any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks))


@contextmanager
def unreachable(*modules: nn.Module) -> Iterator[None]:
    def refuse(module: nn.Module, inputs: Any) -> None:
        raise AssertionError(f"{type(module).__name__} was run")

    handles = [module.register_forward_pre_hook(refuse) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("layer", LAYERS)
def test_nothing_after_the_wanted_tensor_is_computed(some_backbone: Backbone, layer: int) -> None:
    model, images = some_backbone.model, images_for(some_backbone, batch=1)
    blocks = list(model.blocks)
    block = blocks[layer]
    later = blocks[layer + 1 :]
    if layer < DEPTH - 1:
        later.append(model.norm)
    with unreachable(*later):
        patch_features(some_backbone, images, "out", layer)
    with unreachable(*later, model.norm, block, block.mlp, block.norm2, block.attn, block.attn.proj):
        for feature in ("q", "k", "v"):
            patch_features(some_backbone, images, feature, layer)


@pytest.mark.parametrize(
    "name", ["dino_vits16", "dinov2_vits14", "dinov2_vits14_reg", "deit3_vits16", "imgfocus_vits14"]
)
def test_at_the_native_size_positions_stay_as_they_are(name: str) -> None:
    backbone = built(name, depth=1)
    grid = tuple(backbone.model.patch_embed.grid_size)
    images = images_for(backbone, grid, batch=1)
    with torch.no_grad():
        expected = backbone.model.forward_features(images)[:, backbone.prefix_tokens :]
    assert_close(patch_features(backbone, images, "out"), expected)


@pytest.mark.parametrize("name", [name for name in BACKBONES if name.startswith("dinov2") and name.endswith("_reg")])
def test_register_rows_stretch_positions_as_timm_does(name: str) -> None:
    backbone = built(name, depth=1)
    images = images_for(backbone, (6, 4))
    with torch.no_grad():
        expected = backbone.model.forward_features(images)[:, backbone.prefix_tokens :]
    assert_close(patch_features(backbone, images, "out"), expected)


@pytest.mark.parametrize("interpolation", ["offset", "antialias", "plain"])
def test_the_native_grid_keeps_every_bit_of_the_position_embedding(interpolation: Any) -> None:
    position = torch.randn(1, 1 + 12, 8)
    assert torch.equal(stretch_position_embedding(position, (3, 4), (3, 4), interpolation), position)


@pytest.mark.parametrize("target", [(14, 15), (1, 1), (9, 30), (7, 3), (14, 13), (15, 14), (60, 2)])
@pytest.mark.parametrize(("interpolation", "offset"), [("offset", 0.1), ("plain", 0.0)])
def test_positions_are_stretched_as_by_hand(target: tuple[int, int], interpolation: Any, offset: float) -> None:
    source = (14, 14)
    position = torch.randn(1, 1 + 196, 4)
    actual = stretch_position_embedding(position, source, target, interpolation)
    assert_close(actual, stretched_by_hand(position, source, target, offset))
    assert torch.equal(actual[:, 0], position[:, 0])


@pytest.mark.parametrize("source", [(14, 14), (28, 28), (37, 37)])
def test_the_offset_never_costs_or_adds_a_patch(source: tuple[int, int]) -> None:
    """The releases add 0.1 for fear that the factor, rounded, gives one patch too few."""
    position = torch.randn(1, 1 + source[0] * source[1], 1)
    for side in range(1, 130):
        stretched = stretch_position_embedding(position, source, (side, 3), "offset")
        assert stretched.shape == (1, 1 + side * 3, 1)


def test_half_precision_positions_are_stretched_in_single_precision() -> None:
    position = torch.randn(1, 1 + 196, 4).bfloat16()
    stretched = stretch_position_embedding(position, (14, 14), (9, 11), "offset")
    expected = stretch_position_embedding(position.float(), (14, 14), (9, 11), "offset")
    assert stretched.dtype == torch.bfloat16
    assert torch.equal(stretched, expected.bfloat16())


@pytest.mark.parametrize(("one", "other"), [("offset", "antialias"), ("plain", "antialias"), ("offset", "plain")])
def test_the_way_of_stretching_is_visible_in_the_keys_of_trained_weights(
    imgfocus: Backbone, one: Any, other: Any
) -> None:
    images = images_for(imgfocus, (12, 16), batch=1)
    keys = [
        patch_features(
            dataclasses.replace(imgfocus, spec=dataclasses.replace(imgfocus.spec, interpolation=way)), images
        )
        for way in (one, other)
    ]
    assert (keys[0] - keys[1]).norm() > 0.005 * keys[0].norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["dino_vits16", "dinov2_vits14_reg", "dinov3_vits16", "pe_spatial_vitb16"])
def test_half_precision_models_give_single_precision_features(name: str, dtype: torch.dtype) -> None:
    backbone = built(name, depth=2)
    images = images_for(backbone)
    expected = {feature: patch_features(backbone, images, feature) for feature in FEATURES}
    backbone.model.to(dtype)
    for feature in FEATURES:
        actual = patch_features(backbone, images, feature)
        assert actual.dtype == torch.float32
        assert_close(actual, expected[feature], feature, tolerance=0.05)


def test_no_gradient_is_recorded() -> None:
    backbone = built(PLAIN, depth=1)
    backbone.model.requires_grad_(True)
    assert not patch_features(backbone, images_for(backbone), "out").requires_grad


@pytest.fixture(scope="module")
def tiny() -> Backbone:
    return built(PLAIN)


def test_negative_layers_count_from_the_end(tiny: Backbone) -> None:
    assert [resolve_layer(tiny, layer) for layer in (-DEPTH, -1, 0, DEPTH - 1)] == [0, DEPTH - 1, 0, DEPTH - 1]
    images = images_for(tiny)
    for feature in FEATURES:
        assert torch.equal(patch_features(tiny, images, feature, -2), patch_features(tiny, images, feature, 1))


def test_the_last_out_alone_passes_the_final_norm(tiny: Backbone) -> None:
    images = images_for(tiny)
    with torch.no_grad():
        *_, before, last = tiny.model.forward_intermediates(images, output_fmt="NLC", intermediates_only=True)
        assert_close(patch_features(tiny, images, "out", -2), before)
        assert_close(patch_features(tiny, images, "out", -1), tiny.model.norm(last))


@pytest.mark.parametrize("layer", [DEPTH, -DEPTH - 1, 99])
def test_a_layer_that_the_backbone_lacks_is_refused(tiny: Backbone, layer: int) -> None:
    with pytest.raises(OptionError, match=rf"layer must be in \[-3, 2\] .*, not {layer}"):
        patch_features(tiny, images_for(tiny), "k", layer)


@pytest.mark.parametrize("feature", ["", "K", "qkv", "key"])
def test_an_unknown_feature_is_refused(tiny: Backbone, feature: Any) -> None:
    with pytest.raises(OptionError, match=f"feature must be one of q, k, v, out, not '{feature}'"):
        patch_features(tiny, images_for(tiny), feature)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 33, 32), "multiples of the patch size 16, not 33x32"),
        ((1, 3, 32, 40), "multiples of the patch size 16, not 32x40"),
        ((1, 3, 0, 32), "multiples of the patch size 16, not 0x32"),
        ((3, 32, 32), r"must have shape \(B, 3, H, W\), not \(3, 32, 32\)"),
        ((1, 4, 32, 32), r"must have shape \(B, 3, H, W\), not \(1, 4, 32, 32\)"),
    ],
)
def test_images_that_do_not_fit_are_refused(tiny: Backbone, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        patch_features(tiny, torch.zeros(shape))


@pytest.mark.parametrize(
    ("images", "message"),
    [(torch.zeros(0, 3, 32, 32), "at least one image"), (np.zeros((1, 3, 32, 32)), "must be a tensor .*not ndarray")],
)
def test_what_are_no_images_is_refused(tiny: Backbone, images: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        patch_features(tiny, images)
    with pytest.raises(OptionError, match=r"expected a Backbone, .*not 'dino_vits16' in its place"):
        patch_features("dino_vits16", torch.zeros(1, 3, 32, 32))  # type: ignore[arg-type]


def test_asking_for_no_feature_at_all_is_refused(tiny: Backbone) -> None:
    with pytest.raises(OptionError, match="at least one"):
        collect_features(tiny, images_for(tiny), [])
