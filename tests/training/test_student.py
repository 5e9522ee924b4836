"""Students of every kind of backbone: the same tokens as their teachers', and gradients where they belong."""

from pathlib import Path

import pytest
import torch
from random_models import NARROW, OTHERS, SMALL, assert_close, built, images_for
from safetensors.torch import save_file
from torch.nn import functional

from lostreg.errors import BackboneError, OptionError, WeightsError
from lostreg.models.backbone import Backbone, load_backbone, with_new_registers
from lostreg.models.checkpoints import added_registers, load_file_into, save_with_registers
from lostreg.models.features import patch_features
from lostreg.models.table import BACKBONES
from lostreg.training.student import make_student, patch_tokens, unlock

pytestmark = pytest.mark.usefixtures("one_thread")
WITHOUT = [name for name in OTHERS if name != "distilled"]


def small(name: str) -> Backbone:
    if name in OTHERS:
        return built(OTHERS[name][0], **OTHERS[name][1])
    return built(name, **NARROW)


@torch.no_grad()
def normed_tokens(backbone: Backbone, images: torch.Tensor) -> torch.Tensor:
    return backbone.model.norm(patch_tokens(backbone, images))  # type: ignore[operator, no-any-return]


@pytest.fixture(scope="module", params=[*BACKBONES, *WITHOUT])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return small(request.param)


def test_a_forward_with_gradients_gives_the_tokens_of_one_without(backbone: Backbone) -> None:
    images = images_for(backbone)
    expected = patch_features(backbone, images, "out")
    assert_close(normed_tokens(backbone, images), expected, backbone.spec.name)


def test_registers_are_added_and_nothing_else_is_changed(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    images = images_for(backbone)
    student = make_student(backbone, 3, seed=0)
    own = backbone.own_prefix_tokens
    assert student.own_prefix_tokens == own + 3 == student.spec.prefix_tokens
    assert student.prefix_names[own:] == [f"register {backbone.spec.registers + number}" for number in (1, 2, 3)]
    assert_close(normed_tokens(student, images), patch_features(student, images, "out"), "in packs")
    attention, expected = functional.scaled_dot_product_attention, patch_features(backbone, images, "out")

    def ignoring(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> torch.Tensor:
        rest = [place for place in range(k.shape[-2]) if not own <= place < own + 3]
        return attention(q, k[..., rest, :], v[..., rest, :], **options)  # type: ignore[arg-type]

    monkeypatch.setattr(functional, "scaled_dot_product_attention", ignoring)
    assert_close(normed_tokens(student, images), expected, "registers nobody attends to")


def test_weights_with_registers_are_loaded_as_such(backbone: Backbone, tmp_path: Path) -> None:
    student = make_student(backbone, 2, seed=3)
    path = tmp_path / "registers.safetensors"
    save_with_registers(student.model, 2, path)
    (tmp_path / "any file").touch()
    assert path.stat().st_mode == (tmp_path / "any file").stat().st_mode
    assert added_registers(path) == 2
    fresh = with_new_registers(backbone, added_registers(path))
    load_file_into(fresh.model, path)
    images = images_for(backbone)
    assert torch.equal(patch_features(fresh, images, "k"), patch_features(student, images, "k"))


@pytest.mark.parametrize("name", ["dinov2_vits14", "imgfocus_vits14", "dinov2_vits14_reg", "dino_vits16"])
def test_a_file_says_by_itself_how_many_registers_it_has(name: str, tmp_path: Path) -> None:
    path = tmp_path / "registers.safetensors"
    row = BACKBONES[name]
    whole = make_student(built(name, depth=12), 2, seed=0)
    save_with_registers(whole.model, 2, path)
    loaded = load_backbone(name, weights=path)
    assert loaded.spec.registers == row.registers + 2
    assert loaded.own_prefix_tokens == row.prefix_tokens + 2
    assert loaded.spec.interpolation == row.interpolation


@pytest.mark.parametrize("said", ["many", "-1", "99999"])
def test_a_number_of_registers_that_is_none_is_an_error(said: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    save_file({"reg_token": torch.zeros(1)}, path, metadata={"lostreg added registers": said})
    with pytest.raises(WeightsError, match=r"odd\.safetensors says that it has .* new registers"):
        load_backbone("dinov2_vits14", weights=path)


def test_a_distilled_model_takes_no_registers() -> None:
    with pytest.raises(BackboneError, match="distillation token"):
        make_student(small("distilled"), 1, seed=0)


def test_of_no_registers_the_student_is_a_copy() -> None:
    backbone = built("dinov2_vits14", **NARROW)
    student = make_student(backbone, 0, seed=0)
    assert student.model is not backbone.model
    assert student.model.state_dict().keys() == backbone.model.state_dict().keys()


@pytest.mark.parametrize(
    ("parts", "names"),
    [
        (["registers"], {"reg_token"}),
        (["positions"], {"pos_embed"}),
        (["patches"], {"patch_embed.proj.weight", "patch_embed.proj.bias"}),
        (["norm", "registers"], {"norm.weight", "norm.bias", "reg_token"}),
    ],
)
def test_gradients_reach_what_is_unlocked_and_nothing_else(parts: list[str], names: set[str]) -> None:
    student = make_student(built("dinov2_vits14", **NARROW), 2, seed=0)
    assert unlock(student, parts).keys() == names
    student.model.norm(patch_tokens(student, images_for(student))).square().mean().backward()  # type: ignore[no-untyped-call]
    with_gradient = {name for name, parameter in student.model.named_parameters() if parameter.grad is not None}
    assert with_gradient == names
    assert all(dict(student.model.named_parameters())[name].grad.any() for name in names)  # type: ignore[union-attr]


def test_the_last_blocks_are_counted_from_the_end() -> None:
    student = make_student(built("dino_vits16", **NARROW), 1, seed=0)
    assert {name.split(".")[1] for name in unlock(student, ["last:2"])} == {"1", "2"}
    assert len(unlock(student, ["all"])) == len(list(student.model.parameters()))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["heads"], "cannot unlock 'heads': expected registers, positions, patches, norm, last:N"),
        (["last:4"], "cannot unlock 'last:4'.*N from 1 to 3"),
        (["last:"], "cannot unlock 'last:'"),
        (["positions"], "dinov3_vits16 has nothing to train in positions"),
    ],
)
def test_what_cannot_be_unlocked_is_told(parts: list[str], message: str) -> None:
    student = make_student(built("dinov3_vits16", **SMALL), 1, seed=0)
    with pytest.raises(OptionError, match=message):
        unlock(student, parts)


def test_computing_twice_gives_the_same_gradients() -> None:
    gradients = []
    for save_memory in (False, True):
        student = make_student(built("dinov3_vits16", **SMALL), 2, seed=0)
        unlock(student, ["registers", "patches"])
        patch_tokens(student, images_for(student), save_memory=save_memory).square().mean().backward()  # type: ignore[no-untyped-call]
        gradients.append(student.model.reg_token.grad)  # type: ignore[union-attr]
    torch.testing.assert_close(*gradients)
