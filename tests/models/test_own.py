"""Models of one's own: timm's are what the same row would be, functions are checked and take the same way."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import disc_picture, same, scene
from random_models import OTHERS, enliven
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import VisionTransformer
from torch import Tensor, nn

from lostreg import Discoverer, artifacts, find_registers
from lostreg.errors import BackboneError, LostregError, OptionError
from lostreg.images.decode import Picture
from lostreg.images.patches import cut_patches
from lostreg.inference.study import Study
from lostreg.models.backbone import Backbone, build_backbone, find_spec
from lostreg.models.own import FunctionBackbone, own_backbone
from lostreg.models.pixels import normalise_patches

KINDS = ("plain", "flexible", "EVA", "distilled")


def _patches(images: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Each patch of 14x14 pixels as it is."""
    rows = images.unfold(2, 14, 14).unfold(3, 14, 14).permute(0, 2, 3, 1, 4, 5)
    return rows.flatten(3).flatten(1, 2), (rows.shape[1], rows.shape[2])


@pytest.mark.parametrize("kind", KINDS)
def test_a_timm_model_finds_what_its_row_finds(kind: str) -> None:
    name, options = OTHERS[kind]
    row = build_backbone(find_spec(name), depth=2, **options)
    enliven(row.model)
    model = timm.create_model(row.spec.timm_name, depth=2, num_classes=7, **options)  # of one size, with a classifier
    model.load_state_dict(row.model.state_dict(), strict=False)
    model.train()
    own = Discoverer(model, device="cpu")
    assert same(own.discover(scene(3)), Discoverer(row, device="cpu").discover(scene(3)))
    assert (own.backbone.mean, own.backbone.std) == (row.mean, row.std)
    assert own.options.backbone == row.spec.timm_name
    assert model.training
    assert model.head.out_features == 7
    assert all(parameter.requires_grad for parameter in model.head.parameters())


def test_other_weights_have_another_fingerprint_and_training_on_changes_nothing() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    first = own_backbone(model)
    weights = first.model.state_dict()["blocks.0.mlp.fc1.weight"].clone()
    model.blocks[0].mlp.fc1.weight.data += 1
    assert torch.equal(first.model.state_dict()["blocks.0.mlp.fc1.weight"], weights)
    assert own_backbone(model).weights != first.weights
    assert first.weights.startswith("given sha256:")


def test_what_cannot_be_read_is_named() -> None:
    class Adapted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x.mean()

    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    model.blocks[0].attn.qkv = Adapted(192, 576)
    with pytest.raises(BackboneError, match="has Adapted for queries, keys and values"):
        Discoverer(model, device="cpu")
    with pytest.raises(BackboneError, match="dynamic_img_size=True"):
        own_backbone(timm.create_model("eva02_tiny_patch14_224", depth=1))
    with pytest.raises(OptionError, match="a timm model or a function, not 3"):
        Discoverer(3, device="cpu")  # type: ignore[arg-type]


def test_a_model_that_timm_did_not_create_needs_no_configuration() -> None:
    model = VisionTransformer(img_size=224, patch_size=16, embed_dim=64, depth=2, num_heads=2).eval()
    discoverer = Discoverer(model, device="cpu")
    assert len(discoverer.discover(scene(3)))
    assert (discoverer.backbone.mean, discoverer.backbone.std) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    own = own_backbone(model, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    assert (own.mean, own.std, own.spec.name) == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "VisionTransformer")


class Renamed(VisionTransformer):
    """Nothing of the forward is its own."""

    def __init__(self) -> None:
        super().__init__(img_size=32, embed_dim=64, depth=2, num_heads=2)

    def classes(self) -> int:
        return self.num_classes


class Halved(Renamed):
    def forward_features(self, x: Tensor, *masks: Any) -> Tensor:
        return super().forward_features(x / 2)


class Placed(Renamed):
    def _pos_embed(self, x: Tensor) -> Tensor:
        return 2 * super()._pos_embed(x)


class Twice(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


class Squared(nn.Module):
    gamma = torch.ones(64)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma**2


def _looped(model: Any) -> None:
    model.blocks = Twice(*model.blocks)


def _squared(model: Any) -> None:
    model.blocks[1].ls2 = Squared()


def _skipping(model: Any) -> None:
    model.blocks[0].forward = lambda x: x


@pytest.mark.parametrize(
    ("kind", "change", "told"),
    [
        (Halved, None, "Halved.forward_features"),
        (Placed, None, "Placed._pos_embed"),
        (Renamed, _looped, "Twice.forward"),
        (Renamed, _squared, "Squared.forward"),
        (Renamed, _skipping, "lambda"),
    ],
)
def test_no_step_of_the_user_s_own_is_left_out_in_silence(kind: Any, change: Any, told: str) -> None:
    assert own_backbone(Renamed().eval()).depth == 2
    model = kind().eval()
    if change:
        change(model)
    with pytest.raises(BackboneError, match=f"{told}.* of its own.*: give a function of images"):
        own_backbone(model)


@pytest.mark.parametrize("channels", [1, 4])
def test_a_model_of_other_images_than_rgb_is_refused_at_once(channels: int) -> None:
    with pytest.raises(BackboneError, match=f"takes images of {channels} channels: expected 3"):
        own_backbone(VisionTransformer(img_size=32, embed_dim=64, depth=1, num_heads=2, in_chans=channels))


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_what_is_wrapped_around_a_model_is_named(wrap: Any) -> None:
    with pytest.raises(BackboneError, match=r"expected the Renamed itself, not .*compile=True"):
        own_backbone(wrap(Renamed().eval()))


def test_a_function_sees_normalised_pixels_and_zeros_beyond_the_image() -> None:
    seen: list[Tensor] = []

    def look(images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        seen.append(images.clone())
        return _patches(images)

    pixels = disc_picture(150, 110)
    discoverer = Discoverer(look, device="cpu")
    assert discoverer.discover(pixels).degrees.shape == (8, 11)
    picture = cut_patches(Picture(pixels, 150, 110), 14)
    patches = torch.from_numpy(picture.patches)[None]
    backbone = discoverer.backbone
    expected = normalise_patches(patches, [picture.size], backbone.mean, backbone.std)
    assert torch.equal(_patches(seen[-1])[0].view(88, 3, 196).mT.flatten(1), expected[0])
    assert not seen[-1][:, :, 110:].any()
    assert not seen[-1][:, :, :, 150:].any()


def test_a_function_of_a_model_finds_what_the_model_finds(backbone: Backbone) -> None:
    model: Any = backbone.model

    def tokens(images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        grid = images.shape[2] // 14, images.shape[3] // 14
        return model.forward_features(images)[:, backbone.prefix_tokens :], grid

    function = Discoverer(own_backbone(tokens, name="mine", mean=backbone.mean, std=backbone.std), device="cpu")
    row = Discoverer(backbone, feature="out", device="cpu")
    images = [scene(number, *size) for number, size in enumerate([(150, 110), (98, 70), (150, 110)])]
    for one, other in zip(function.discover_many(images), row.discover_many(images), strict=True):
        assert np.array_equal(one.xyxy, other.xyxy)
        assert np.abs(one.degrees - other.degrees).max() <= 1  # rounding
    record = function.options.record()
    weights = f"given, patches of 14 pixels, {backbone.model.embed_dim} dimensions"
    assert (record["backbone"], record["weights"], record["feature"]) == ("mine", weights, "out")
    assert same(Study(function, images[0]).discover(), function.discover(images[0]))


def test_discoverers_of_functions_travel() -> None:
    discoverer = Discoverer(_patches, device="cpu")
    assert same(pickle.loads(pickle.dumps(discoverer)).discover(scene(3)), discoverer.discover(scene(3)))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda _: 1 / 0, "failed on a blank image .* ZeroDivisionError: division by zero"),
        (lambda images: images, r"not a tensor \(1, 3, 448, 448\) of torch.float32"),
        (lambda images: (images, (32, 32)), r"the features are a tensor \(1, 3, 448, 448\)"),
        (lambda _: (torch.ones(1, 4, 2, dtype=torch.int64), (2, 2)), "of torch.int64"),
        (lambda _: (torch.ones(1, 4, 0), (2, 2)), r"the features are a tensor \(1, 4, 0\)"),
        (lambda _: (torch.ones(1, 4, 2).to_sparse(), (2, 2)), r"the features are a tensor \(1, 4, 2\)"),
        (lambda _: (torch.ones(1, 4, 2, device="meta"), (2, 2)), r"the features are a tensor \(1, 4, 2\)"),
        (lambda _: (torch.ones(1, 4, 2), 2), "the grid is 2"),
        (lambda _: (torch.ones(1, 5, 2), (2, 2)), r"shape \(1, 4, D\), not \(1, 5, 2\); CLS and registers are dropped"),
        (lambda _: (torch.ones(2, 4, 2), (2, 2)), r"not \(2, 4, 2\)"),
        (lambda _: (torch.ones(1, 6, 2), (2, 3)), "expected square patches"),
        (lambda _: (torch.ones(1, 9, 2), (3, 3)), "of a whole number of pixels"),
    ],
)
def test_what_a_function_gives_is_checked_before_the_first_image(answer: Any, message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        Discoverer(answer, device="cpu")


def test_what_a_function_gives_is_checked_with_each_image() -> None:
    with pytest.raises(BackboneError, match=r"gave a grid \(4, 4\) and 2 dimensions for .*: expected \(1, 2\) and 2"):
        Discoverer(lambda images: (torch.ones(len(images), 16, 2), (4, 4)), device="cpu").discover(scene(0))
    with pytest.raises(OptionError, match="features must be finite"):
        Discoverer(lambda images: (_patches(images)[0] / 0, _patches(images)[1]), device="cpu").discover(scene(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature": "k"}, "its features are what it gives, 'out', not 'k'"),
        ({"layer": 1}, r"layer must be in \[-1, 0\]"),
        ({"precision": "fp16"}, "expected fp32"),
        ({"method": "dinoseg"}, "CLS token"),
        ({"weights": "file.pth"}, "this one is loaded already"),
    ],
)
def test_options_that_a_function_has_not_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Discoverer(_patches, device="cpu", **options)


def test_nothing_looks_into_a_function(tmp_path: Path) -> None:
    discoverer = Discoverer(_patches, device="cpu", precision="auto")
    assert isinstance(discoverer.backbone, FunctionBackbone)
    for look in (artifacts.measure, lambda images, found: find_registers(images, found)):
        with pytest.raises(LostregError, match="it has no blocks to look into"):
            look([scene(0)], discoverer)
    assert discoverer.with_registers(None).backbone == discoverer.backbone


def test_a_module_in_training_mode_is_refused() -> None:
    class Mine(nn.Module):
        def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
            return _patches(images)

    with pytest.raises(BackboneError, match=r"Mine is in training mode: call its eval\(\) first"):
        Discoverer(Mine(), device="cpu")
    assert Discoverer(Mine().eval(), device="cpu").options.backbone == "Mine"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"mean": ()}, "mean must be three numbers, not"),
        ({"mean": (0.5, float("nan"), 0.5)}, r"mean must be three numbers in \[0, 1\]"),
        ({"mean": (123, 117, 104)}, r"mean must be three numbers in \[0, 1\], .*not \(123, 117, 104\)"),
        ({"std": (58, 57, 57)}, "std must be three numbers above 0, 1 at most"),
        ({"device": "nope"}, "device must be auto, cpu"),
        ({"std": (0.5, 0.0, 0.5)}, "std must be three numbers above 0"),
    ],
)
def test_mean_and_deviation_are_checked(options: dict[str, Any], told: str) -> None:
    with pytest.raises(OptionError, match=told):
        own_backbone(_patches, **options)
    assert own_backbone(_patches, mean=torch.full((3,), 0.5)).mean == (0.5, 0.5, 0.5)
