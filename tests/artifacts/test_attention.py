"""Attention maps: against softmax written out from what timm's own blocks compute."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted import noise
from random_models import built
from reference_forward import reference
from small_vit import discoverer, pictures, small, world, write_images
from torch import nn

from lostreg.artifacts.attention import AttentionMaps, attention_maps
from lostreg.artifacts.attention_figures import AttentionRow, plot_attention, plot_heads
from lostreg.errors import ImageError, OptionError
from lostreg.models.backbone import Backbone
from lostreg.models.registers import RegisterNeurons

pytestmark = pytest.mark.usefixtures("one_thread")

NARROW = {"depth": 3, "embed_dim": 64, "num_heads": 2}
MODELS = ("dinov2_vits14_reg", "dinov2_vits14", "dinov3_vits16", "dino_vits16")


def make(name: str) -> Backbone:
    return built(name, **NARROW)


def maps(images: Sequence[Any], backbone: Backbone, *layers: int, **options: Any) -> list[list[AttentionMaps]]:
    found = list(attention_maps(images, discoverer(backbone, **options), layers or (-1,)))
    assert all(isinstance(one, list) for one in found)
    return found  # type: ignore[return-value]


def fed(image: np.ndarray, backbone: Backbone) -> torch.Tensor:
    """What the model is fed, (1, 3, H, W), with zeros up to whole patches."""
    patch = backbone.spec.patch_size
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (backbone.mean, backbone.std))
    pixels = (torch.from_numpy(image).permute(2, 0, 1) / 255 - mean) / std
    return nn.functional.pad(pixels, (0, -image.shape[1] % patch, 0, -image.shape[0] % patch))[None]


@pytest.mark.parametrize("registers", [None, 2], ids=["plain", "test-time registers"])
@pytest.mark.parametrize("name", MODELS)
def test_rows_are_the_softmax_of_the_models_own_queries_and_keys(
    name: str, registers: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = make(name)
    if registers:
        backbone = backbone.with_registers(RegisterNeurons(((0, 3), (1, 7), (1, 20)), registers))
    prefix = backbone.prefix_tokens
    images = noise([(61, 84), (28, 100), (16, 14), (100, 30)])
    found = maps(images, backbone, 0, 1, 2, batch_size=3)
    for image, layers in zip(images, found, strict=True):
        expected = reference(backbone, fed(image, backbone), monkeypatch).attention
        assert [one.layer for one in layers] == [0, 1, 2]
        for one, whole in zip(layers, expected, strict=True):
            patch = backbone.spec.patch_size
            assert one.grid == (-(-image.shape[0] // patch), -(-image.shape[1] // patch))
            count = one.grid[0] * one.grid[1]
            assert one.rows.shape == (prefix, 2, prefix + count)
            assert one.rows.dtype == np.float32
            assert np.abs(one.rows.sum(axis=2) - 1).max() < 1e-5
            np.testing.assert_allclose(one.rows, whole[:, :prefix].transpose(0, 1).numpy(), atol=1e-5)


def test_rows_are_those_of_timm_s_unfused_attention() -> None:
    backbone = make("dinov2_vits14_reg")
    (image,) = noise([(56, 70)])
    seen: list[torch.Tensor] = []
    block: Any = backbone.model.blocks[1]  # type: ignore[index]
    hook = block.attn.attn_drop.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    block.attn.fused_attn = False
    try:
        with torch.no_grad():
            backbone.model.forward_features(fed(image, backbone))  # type: ignore[operator]
    finally:
        hook.remove()
        block.attn.fused_attn = True
    ((one,),) = maps([image], backbone, 1)
    np.testing.assert_allclose(one.rows, seen[0][0, :, :5].transpose(0, 1).numpy(), atol=1e-5)


def test_maps_are_what_is_left_on_patches() -> None:
    backbone = make("dinov2_vits14_reg")
    ((one,),) = maps(noise([(42, 70)]), backbone)
    assert one.layer == 2
    assert one.names == ("CLS", "register 1", "register 2", "register 3", "register 4")
    assert one.heads.shape == (5, 2, 3, 5)
    assert one.mean.shape == (5, 3, 5)
    for patch, (row, column) in enumerate(np.ndindex(3, 5)):
        np.testing.assert_array_equal(one.heads[:, :, row, column], one.rows[:, :, 5 + patch])
    np.testing.assert_allclose(one.mean, (one.heads[:, 0] + one.heads[:, 1]) / 2, rtol=1e-6)
    np.testing.assert_allclose(one.heads.sum(axis=(2, 3)), 1 - one.rows[:, :, :5].sum(axis=2), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("dinov2_vits14", ["CLS"]),
        ("dinov3_vits16", ["CLS", "register 1", "register 2", "register 3", "register 4"]),
        ("sbb_vitm16_reg", ["register 1", "register 2", "register 3", "register 4"]),
    ],
)
def test_tokens_have_names(name: str, own: list[str]) -> None:
    backbone = make(name)
    ((one,),) = maps(noise([(32, 32)]), backbone)
    assert list(one.names) == own
    added = backbone.with_registers(RegisterNeurons(((0, 0),), 2))
    ((one,),) = maps(noise([(32, 32)]), added)
    assert list(one.names) == [*own, "test-time register 1", "test-time register 2"]
    assert one.rows.shape[0] == len(own) + 2


def test_layers_count_from_both_ends_in_the_order_asked_for() -> None:
    backbone = make("dinov2_vits14")
    (found,) = maps(noise([(42, 42)]), backbone, -1, 0, -2, 2, -3)
    assert [one.layer for one in found] == [2, 0, 1, 2, 0]
    np.testing.assert_array_equal(found[0].rows, found[3].rows)
    np.testing.assert_array_equal(found[1].rows, found[4].rows)
    assert not np.allclose(found[0].rows, found[2].rows, atol=1e-3)


@pytest.mark.parametrize("layers", [(3,), (-4,), (0, 99)])
def test_layers_that_do_not_exist_are_refused(layers: tuple[int, ...]) -> None:
    with pytest.raises(OptionError, match=r"layer must be in \[-3, 2\]"):
        attention_maps(noise([(42, 42)]), discoverer(make("dinov2_vits14")), layers)


def test_no_layer_is_refused() -> None:
    with pytest.raises(OptionError, match="at least one layer"):
        attention_maps(noise([(42, 42)]), discoverer(small()), ())


def test_a_backbone_without_prefix_tokens_has_no_rows_unless_registers_are_added() -> None:
    backbone = make("siglip2_vitb16")
    with pytest.raises(OptionError, match="siglip2_vitb16 has no CLS and no register tokens"):
        attention_maps(noise([(32, 32)]), discoverer(backbone))
    ((one,),) = maps(noise([(32, 48)]), backbone.with_registers(RegisterNeurons(((0, 0),), 1)))
    assert one.names == ("test-time register 1",)
    assert one.rows.shape == (1, 2, 7)


def test_unreadable_images_are_errors_in_their_places(tmp_path: Path) -> None:
    paths = write_images(tmp_path, pictures())
    paths[1].write_text("no picture")
    given = [*paths[:4], tmp_path / "none.png", *paths[4:]]
    found = list(attention_maps(given, discoverer(small(), batch_size=3)))
    assert [isinstance(one, ImageError) for one in found] == [False, True, False, False, True, False, False]
    assert "im01.png" in str(found[1])
    assert "none.png" in str(found[4])
    expected = maps([image for number, image in enumerate(pictures()) if number != 1], small())
    readable = [one for one in found if not isinstance(one, ImageError)]
    for (one,), (other,) in zip(readable, expected, strict=True):
        assert one.grid == other.grid
        np.testing.assert_allclose(one.rows, other.rows, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 6])
def test_neighbours_in_a_pack_do_not_matter(batch_size: int) -> None:
    images = list(pictures())
    found = maps(images, world().backbone, 4, batch_size=batch_size)
    for image, (one,) in zip(images, found, strict=True):
        ((alone,),) = maps([image], world().backbone, 4)
        np.testing.assert_allclose(one.rows, alone.rows, atol=1e-5)


def test_images_are_taken_as_they_come() -> None:
    taken: list[int] = []

    def endless() -> Any:
        number = 0
        while True:
            taken.append(number)
            yield pictures()[number % 6]
            number += 1

    stream = attention_maps(endless(), discoverer(small(), batch_size=2))
    assert not isinstance(next(iter(stream)), ImageError)
    assert len(taken) <= 6


def test_the_fast_path_stays_as_it_was() -> None:
    backbone = make("dinov2_vits14_reg")
    one = discoverer(backbone)
    (image,) = noise([(70, 84)])
    before = one.discover(image)
    state = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    list(attention_maps([image], one, (0, 1, 2)))
    after = one.discover(image)
    np.testing.assert_array_equal(before.degrees, after.degrees)
    np.testing.assert_array_equal(before.xyxy, after.xyxy)
    assert before.scores.tobytes() == after.scores.tobytes()
    assert all(torch.equal(value, state[name]) for name, value in backbone.model.state_dict().items())
    for module in backbone.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert getattr(module, "fused_attn", True)


def test_half_precision_rows_sum_to_1_too() -> None:
    ((one,),) = maps(noise([(42, 70)]), make("dinov2_vits14_reg"), precision="bf16")
    assert one.rows.dtype == np.float32
    assert np.abs(one.rows.sum(axis=2) - 1).max() < 1e-5


# Pictures


def test_a_picture_has_a_row_a_layer_and_a_column_a_token() -> None:
    (image,) = noise([(50, 70)])
    rows = []
    for name in ("dinov2_vits14_reg", "dino_vits16"):
        (found,) = maps([image], make(name), 0, -1)
        rows += [AttentionRow(f"{name} {one.layer}", make(name).spec.patch_size, one) for one in found]
    figure = plot_attention(image, rows)
    panels, bars = figure.axes[: 4 * 6], figure.axes[4 * 6 :]
    shown = [axes for axes in panels if axes.get_visible()]
    assert len(bars) == sum(len(row.maps.names) for row in rows)
    assert len(shown) == 2 * 6 + 2 * 2
    np.testing.assert_array_equal(shown[0].images[0].get_array(), image)
    heat = rows[0].maps.mean
    for axes, token in zip(shown[1:6], heat, strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), token)
        assert axes.get_xlabel() == f"{100 * token.sum():.0f} % on patches"
        assert (axes.get_xlim(), axes.get_ylim()) == ((0, 70), (50, 0))
        assert axes.images[0].get_extent() == [0, 70, 56, 0]
        assert axes.images[0].get_clim()[0] == 0
    assert [axes.get_title() for axes in figure.axes[:6]] == ["image", *rows[0].maps.names]


def test_a_picture_of_heads_has_one_each() -> None:
    (image,) = noise([(50, 70)])
    ((one,),) = maps([image], make("dinov2_vits14_reg"))
    figure = plot_heads(image, AttentionRow("title", 14, one))
    panels, bars = figure.axes[: 5 * 2], figure.axes[5 * 2 :]
    assert len(bars) == len(panels)
    for axes, heat in zip(panels, one.heads.reshape(10, 4, 5), strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), heat)
    assert [axes.get_ylabel() for axes in panels[::2]] == list(one.names)
