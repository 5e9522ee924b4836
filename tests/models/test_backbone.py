"""Every row of the table is tested by being in it."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from random_models import DEPTH, NARROW, OTHERS
from small_vit import NAME, save_weights, small
from torch.utils._python_dispatch import TorchDispatchMode

from lostreg.errors import BackboneError, LostregError, OptionError
from lostreg.models.backbone import (
    Backbone,
    _Unfilled,
    build_backbone,
    find_spec,
    load_backbone,
    place_model,
    placed_copy,
)
from lostreg.models.table import BACKBONES, FEATURES

SHORT = 2


@pytest.fixture(scope="module", params=BACKBONES)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return build_backbone(BACKBONES[request.param], depth=SHORT)


def test_every_row_has_the_patch_size_of_its_model(backbone: Backbone) -> None:
    patch = backbone.spec.patch_size
    assert backbone.model.patch_embed.patch_size == (patch, patch)
    assert tuple(backbone.model.patch_embed.proj.kernel_size) == (patch, patch)


def test_every_row_counts_the_prefix_tokens_that_its_model_makes(backbone: Backbone) -> None:
    spec, model = backbone.spec, backbone.model
    assert spec.prefix_tokens == backbone.prefix_tokens == model.num_prefix_tokens
    assert spec.registers == (0 if model.reg_token is None else model.reg_token.shape[1])
    assert spec.class_token == (model.cls_token is not None)
    height, width = 3, 2
    tokens = model.forward_features(torch.randn(1, 3, height * spec.patch_size, width * spec.patch_size))
    assert tokens.shape[1] == spec.prefix_tokens + height * width


def test_every_row_is_normalised_as_its_weights_were_trained(backbone: Backbone) -> None:
    config = timm.get_pretrained_cfg(backbone.spec.timm_name)
    assert backbone.mean == tuple(config.mean)
    assert backbone.std == tuple(config.std)
    assert all(0 <= mean < 1 for mean in backbone.mean)
    assert all(0 < std <= 1 for std in backbone.std)


def test_every_row_is_built_frozen_and_in_evaluation_mode(backbone: Backbone) -> None:
    assert not any(module.training for module in backbone.model.modules())
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    assert backbone.depth == SHORT
    assert (backbone.device, backbone.dtype, backbone.weights) == (torch.device("cpu"), torch.float32, "random")


def test_every_row_is_built_without_a_classifier(backbone: Backbone) -> None:
    assert not any(name.startswith("head") for name in backbone.model.state_dict())


@pytest.mark.parametrize("kind", [*BACKBONES, *OTHERS])
def test_a_model_for_weights_is_built_without_a_random_number(kind: str) -> None:
    """And what is no weight, such as rotary embeddings, is there all the same."""
    name, options = OTHERS.get(kind, (kind, NARROW))
    spec = find_spec(name)
    random_weights = build_backbone(spec, depth=DEPTH, **options).model
    before = torch.get_rng_state()
    with _Unfilled():
        model = build_backbone(spec, depth=DEPTH, **options).model
    assert torch.equal(torch.get_rng_state(), before)
    model.load_state_dict(random_weights.state_dict())
    for (name, had), (_, has) in zip(random_weights.named_buffers(), model.named_buffers(), strict=True):
        assert torch.equal(had, has), name
    image = torch.ones(1, 3, 4 * int(model.patch_embed.patch_size[0]), 112)  # type: ignore[index, union-attr]
    assert torch.equal(model.forward_features(image), random_weights.forward_features(image))  # type: ignore[operator]


def test_a_backbone_that_is_loaded_leaves_the_user_s_random_numbers_alone(tmp_path: Path) -> None:
    weights = save_weights(small(), tmp_path / "weights.safetensors")
    before = torch.get_rng_state()
    loaded = load_backbone(NAME, weights=weights).model.state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in small().model.state_dict().items())


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"name": 3}, "expected the name of a backbone, not 3"),
        ({"device": "nope"}, "device must be auto, cpu"),
        ({"dtype": torch.int8}, "dtype must be a floating-point one of PyTorch, not torch.int8"),
        ({"dtype": "float32"}, "not 'float32'"),
    ],
)
def test_what_cannot_be_loaded_so_is_refused_before_it_is(given: dict[str, Any], told: str) -> None:
    with pytest.raises(OptionError, match=told):
        load_backbone(**{"name": "dinov2_vitg14", **given})


@pytest.mark.parametrize("name", BACKBONES)
def test_every_row_says_what_it_must(name: str) -> None:
    row = BACKBONES[name]
    assert row.name == name
    assert row.feature in FEATURES
    assert row.bias == "auto" or isinstance(row.bias, float)
    assert row.licence
    assert row.training
    assert row.feature_source
    assert row.interpolation in ("offset", "antialias", "plain")
    assert bool(row.published) == bool(row.published_source), "a published figure needs its source, and only that does"
    assert set(row.published) <= {"voc07", "voc12", "coco20k"}
    assert all(0 < figure < 100 for figure in row.published.values())


@pytest.mark.parametrize("name", BACKBONES)
def test_every_row_names_weights_that_timm_knows(name: str) -> None:
    row = BACKBONES[name]
    config = timm.get_pretrained_cfg(row.timm_name)
    assert config.hf_hub_id
    assert row.offline or row.timm_name == f"{config.architecture}.{config.tag}"


def test_only_rows_with_learnt_positions_stretch_them_their_own_way(backbone: Backbone) -> None:
    """The two other ways of stretching put one CLS token in front and nothing else."""
    if backbone.spec.interpolation != "antialias":
        assert backbone.spec.prefix_tokens == 1
        assert not backbone.model.no_embed_class
        assert backbone.model.pos_embed is not None


def test_each_release_stretches_positions_in_its_own_way() -> None:
    """DINO and DINOv2 pass a factor with an offset of 0.1; the register release turned to antialiased sizes."""
    for name, row in BACKBONES.items():
        if row.offline:
            expected = "plain"
        elif name.startswith(("dino_", "dinov2")) and not name.endswith("_reg"):
            expected = "offset"
        else:
            expected = "antialias"
        assert row.interpolation == expected, name


def test_registers_follow_the_name_of_the_row() -> None:
    for name, row in BACKBONES.items():
        if name.startswith("dinov2"):
            assert row.registers == (4 if name.endswith("_reg") else 0)
    assert BACKBONES["dino_vits16"].registers == 0
    assert BACKBONES["dinov3_vits16"].registers == 4


def test_the_published_settings_of_lost_belong_to_the_dino_rows() -> None:
    for name in ("dino_vits16", "dino_vits8", "dino_vitb16"):
        row = BACKBONES[name]
        assert (row.feature, row.bias, row.normalize, row.interpolation) == ("k", 0.0, False, "offset")
    assert dict(BACKBONES["dino_vits16"].published) == {"voc07": 61.9, "voc12": 64.0, "coco20k": 50.7}


def test_the_table_cannot_be_written_to() -> None:
    with pytest.raises(TypeError):
        BACKBONES["mine"] = BACKBONES["dino_vits16"]  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        BACKBONES["dino_vits16"].patch_size = 8  # type: ignore[misc]
    with pytest.raises(TypeError):
        BACKBONES["dino_vits16"].published["voc07"] = 99.0  # type: ignore[index]


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("dinov2_vits14_regs", "dinov2_vits14_reg"),
        ("dino_vit_s16", "dino_vits16"),
        ("dinov3vitb16", "dinov3_vitb16"),
        ("timm:vit_smal_patch16_224", "vit_small_patch16_224"),
        ("timm:vit_base_patch16_224.dinno", "vit_base_patch16_224.dino"),
    ],
)
def test_a_typo_is_answered_with_the_name_that_was_meant(typo: str, meant: str) -> None:
    with pytest.raises(BackboneError, match=f"'{typo.removeprefix('timm:')}'.*did you mean .*{meant}"):
        find_spec(typo)


@pytest.mark.parametrize("name", ["", "xyzzy", "resnet", "vit", "timm", "timm:", "timm:nonsense", "timm:hf_hub:a/b"])
def test_a_name_that_nothing_has_is_refused(name: str) -> None:
    with pytest.raises(BackboneError, match=r"unknown backbone|timm has no model"):
        find_spec(name)


def test_an_unknown_name_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(BackboneError, match="lostreg backbones"):
        load_backbone("dinov9")


@pytest.mark.parametrize(
    "name",
    [
        "resnet50",
        "swin_tiny_patch4_window7_224",
        "vit_base_r50_s16_224",
        "naflexvit_base_patch16_gap",
        "beit_base_patch16_224",
        "vit_relpos_small_patch16_224",
        "samvit_base_patch16",
        "mobilevit_s",
        "cait_xxs24_224",
        "xcit_nano_12_p16_224",
        "vit_srelpos_small_patch16_224",
    ],
)
def test_other_kinds_of_model_are_refused(name: str) -> None:
    with pytest.raises(BackboneError, match=f"'{name}' is not a plain Vision Transformer"):
        find_spec(f"timm:{name}")


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("vit_small_patch16_18x2_224", "ParallelThingsBlock"),
        ("vit_pwee_patch16_reg1_gap_256", "ParallelScalingBlock"),
        ("vit_dwee_patch16_reg1_gap_256", "DiffAttention"),
        ("vit_dpwee_patch16_reg1_gap_256", "DiffParallelScalingBlock"),
    ],
)
def test_attention_whose_parts_cannot_be_read_is_refused(name: str, attention: str) -> None:
    with pytest.raises(BackboneError, match=f"'{name}' has .*{attention}"):
        build_backbone(find_spec(f"timm:{name}"), depth=1)


def test_a_hybrid_is_refused_even_behind_a_plain_class() -> None:
    """Its class is VisionTransformer; only its patch embedding gives it away."""
    spec = dataclasses.replace(BACKBONES["dino_vits16"], timm_name="vit_tiny_r_s16_p8_224")
    with pytest.raises(BackboneError, match="HybridEmbed"):
        build_backbone(spec, depth=1)


def test_a_model_that_takes_only_one_size_is_refused() -> None:
    spec = dataclasses.replace(BACKBONES["dino_vits16"], timm_name="resnet18")
    with pytest.raises(BackboneError, match="'resnet18' does not take images of any size"):
        build_backbone(spec)


def test_patches_that_are_not_square_are_refused() -> None:
    with pytest.raises(BackboneError, match="has 16x8 patches: expected square ones"):
        build_backbone(find_spec("timm:vit_tiny_patch16_224"), depth=1, patch_size=(16, 8))


@pytest.mark.parametrize(
    ("name", "options", "patch_size", "registers", "class_token"),
    [
        ("vit_tiny_patch16_224", {}, 16, 0, True),
        ("vit_tiny_patch16_224.augreg_in21k", {}, 16, 0, True),
        ("deit_tiny_distilled_patch16_224", {}, 16, 1, True),  # the distillation token counts as a register
        ("vit_small_patch14_reg4_dinov2", {}, 14, 4, True),
        ("eva02_tiny_patch14_224", {}, 14, 0, True),
        ("vit_medium_patch16_rope_reg1_gap_256", {}, 16, 1, False),
        ("vit_base_patch32_siglip_256", {"embed_dim": 96, "num_heads": 3}, 32, 0, False),
        ("vit_base_patch16_sapiens2", {"embed_dim": 96, "num_heads": 3, "num_kv_heads": 3}, 16, 8, True),
    ],
)
def test_a_timm_row_is_filled_in_from_its_model(
    name: str, options: dict[str, Any], patch_size: int, registers: int, class_token: bool
) -> None:
    spec = find_spec(f"timm:{name}")
    built = build_backbone(spec, depth=1, **options)
    assert built.spec.name == f"timm:{name}"
    assert built.spec.timm_name == name
    assert (built.spec.patch_size, built.spec.registers) == (patch_size, registers)
    assert built.spec.class_token == class_token
    assert built.spec.prefix_tokens == built.prefix_tokens
    assert (built.spec.feature, built.spec.bias, built.spec.interpolation) == ("k", "auto", "antialias")
    assert not built.spec.published
    assert built.spec.licence


def test_errors_about_backbones_can_be_caught_as_errors_of_this_package() -> None:
    with pytest.raises(LostregError):
        find_spec("timm:resnet50")


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("dinov2_vits14_reg", {"norm", "norm1", "norm2", "ls1", "ls2"}),
        ("clip_vitb16", {"norm", "norm_pre", "norm1", "norm2"}),
        ("timm:eva02_base_patch14_224", {"norm1", "norm2"}),
        ("timm:vit_small_patch16_dinov3_qkvb", {"norm", "norm1", "norm2", "gamma_1", "gamma_2"}),
    ],
)
def test_half_precision_leaves_what_reads_and_scales_the_sum_of_tokens_alone(name: str, kept: set[str]) -> None:
    model = build_backbone(find_spec(name), depth=2).model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    place_model(model, "cpu", torch.bfloat16)
    full = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.float32}
    assert {part for name in full for part in name.split(".") if part in kept} == kept
    for name, tensor in model.state_dict().items():
        parts = set(name.split("."))
        assert (name in full) == (bool(parts & kept) and not parts & {"attn", "mlp"}), name
        assert torch.equal(tensor, before[name].to(tensor.dtype))
    model.to(torch.bfloat16)
    place_model(model, "cpu", torch.float32)  # back, from a model that someone has rounded as a whole
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}


class OnDevice(TorchDispatchMode):
    """Notes the precision and shape of whatever comes to the ``meta`` device, which stands in for a GPU here."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.dtype, torch.Size]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.device.type == "meta":
            self.seen.append((result.dtype, result.shape))
        return result


def test_a_device_never_holds_what_is_only_to_be_rounded() -> None:
    model = build_backbone(find_spec("dinov2_vits14_reg"), depth=2).model
    matrices = {parameter.shape for parameter in model.parameters() if parameter.ndim >= 2}
    with OnDevice() as device:
        placed = placed_copy(model, "meta", torch.bfloat16)
    assert {tensor.device.type for tensor in placed.state_dict().values()} == {"meta"}
    assert {shape for dtype, shape in device.seen if dtype == torch.bfloat16} >= matrices
    assert not {shape for dtype, shape in device.seen if dtype != torch.bfloat16} & matrices


def test_a_model_is_rounded_before_it_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_backbone(find_spec("dinov2_vits14_reg"), depth=2).model
    moved: list[torch.dtype] = []
    to = torch.Tensor.to

    def record(tensor: torch.Tensor, where: torch.dtype | str) -> torch.Tensor:
        if where == "cpu":
            moved.append(tensor.dtype)
        return to(tensor, where)

    monkeypatch.setattr(torch.Tensor, "to", record)
    place_model(model, "cpu", torch.bfloat16)
    tensors = [*model.parameters(), *model.buffers()]
    assert moved == [tensor.dtype for tensor in tensors]
    assert {torch.bfloat16, torch.float32} == set(moved)


@pytest.mark.parametrize("name", ["dinov2_vits14_reg", "dinov3_vits16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_placed_copy_is_what_placing_makes_and_shares_no_memory(name: str, dtype: torch.dtype) -> None:
    model = build_backbone(find_spec(name), depth=2).model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    copied = placed_copy(model, "cpu", dtype)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.dtype == before[name].dtype
    addresses = [{tensor.data_ptr() for tensor in (*one.parameters(), *one.buffers())} for one in (model, copied)]
    assert not addresses[0] & addresses[1]
    assert not any(parameter.requires_grad for parameter in copied.parameters())
    place_model(model, "cpu", dtype)
    tensors = [dict([*one.named_parameters(), *one.named_buffers()]) for one in (model, copied)]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        assert torch.equal(tensor, tensors[1][name])
        assert tensor.dtype == tensors[1][name].dtype
