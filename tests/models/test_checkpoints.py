"""Weights from files in every naming scheme, from a hub that answers, lies or is out of reach."""

import argparse
import hashlib
import http.server
import pickle
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from lostreg.errors import BackboneError, LostregWarning, WeightsError
from lostreg.models import imgfocus
from lostreg.models.backbone import Backbone, build_backbone, find_spec, load_backbone
from lostreg.models.checkpoints import load_file_into, read_state_dict, to_timm_names
from lostreg.models.table import BACKBONES

State = dict[str, Tensor]
LOOP: dict[str, Any] = {}
LOOP["model"] = LOOP  # holds itself
NARROW = {"embed_dim": 192, "num_heads": 3}


def built(name: str, depth: int = 2) -> Backbone:
    """A shortened backbone whose every parameter is random."""
    backbone = build_backbone(find_spec(name), depth=depth, **NARROW)
    with torch.no_grad():
        for parameter in backbone.model.parameters():
            parameter.normal_()
    return backbone


def state_of(model: nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def save(content: Any, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, path)
    else:
        torch.save(content, path)
    return path


def loaded_state(backbone: Backbone, path: Path) -> State:
    """What a fresh, differently random model holds after the file was loaded."""
    fresh = built(backbone.spec.name, backbone.depth)
    source = load_file_into(fresh.model, path)
    assert source == f"file {path.name} sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    return state_of(fresh.model)


def assert_same(actual: State, expected: State) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def with_head(state: State) -> State:
    return {**state, "head.weight": torch.randn(1000, 192), "head.bias": torch.randn(1000)}


# Files in timm's naming


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
@pytest.mark.parametrize("name", ["dino_vits16", "dinov3_vits16", "timm:eva02_tiny_patch14_224"])
def test_a_file_in_timms_naming_round_trips(tmp_path: Path, name: str, suffix: str) -> None:
    backbone = built(name)
    path = save(state_of(backbone.model), tmp_path / f"weights{suffix}")
    assert_same(loaded_state(backbone, path), state_of(backbone.model))


@pytest.mark.parametrize("name", BACKBONES)
def test_no_tensor_of_any_row_is_renamed_or_dropped(name: str) -> None:
    backbone = built(name, depth=1)
    assert_same(to_timm_names(state_of(backbone.model), backbone.model), state_of(backbone.model))


def test_load_backbone_takes_a_file(tmp_path: Path) -> None:
    spec = find_spec("timm:vit_tiny_patch16_224")
    model = build_backbone(spec).model
    path = save(state_of(model), tmp_path / "tiny.safetensors")
    backbone = load_backbone(spec.name, weights=str(path), dtype=torch.bfloat16)
    assert backbone.dtype == torch.bfloat16
    assert backbone.weights == f"file tiny.safetensors sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    assert torch.equal(backbone.model.pos_embed, model.pos_embed.bfloat16())


def test_load_backbone_rounds_a_model_before_it_goes_to_a_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = find_spec("timm:vit_tiny_patch16_224")
    path = save(state_of(build_backbone(spec).model), tmp_path / "tiny.safetensors")
    moved: list[tuple[object, ...]] = []
    move = torch.nn.Module.to

    def record(module: torch.nn.Module, *where: object, **options: object) -> torch.nn.Module:
        moved.append((*where, *options.values(), next(module.parameters()).dtype))
        return move(module, *where, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(torch.nn.Module, "to", record)
    monkeypatch.setattr("lostreg.models.backbone.resolve_device", lambda device: device)
    backbone = load_backbone(spec.name, weights=path, device="meta", dtype=torch.bfloat16)
    assert (backbone.device.type, backbone.dtype) == ("meta", torch.bfloat16)
    assert moved == [(torch.bfloat16, torch.float32), ("meta", torch.bfloat16)]


def test_half_precision_files_fill_a_single_precision_model(tmp_path: Path) -> None:
    backbone = built("dino_vits16")
    halved = {name: tensor.half() for name, tensor in state_of(backbone.model).items()}
    state = loaded_state(backbone, save(halved, tmp_path / "half.safetensors"))
    assert_same(state, {name: tensor.float() for name, tensor in halved.items()})


def test_a_file_fills_the_offline_row_as_well(tmp_path: Path) -> None:
    backbone = built("imgfocus_vits14")
    path = save(state_of(backbone.model), tmp_path / "own.pth")
    fresh = built("imgfocus_vits14")
    assert load_file_into(fresh.model, path).startswith("file own.pth sha256:")
    assert_same(state_of(fresh.model), state_of(backbone.model))


# Files in the releases' naming


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"teacher": {f"module.backbone.{name}": tensor for name, tensor in state.items()}},
        lambda state: {"teacher": {f"backbone.{name}": tensor for name, tensor in state.items()}, "epoch": 100},
        lambda state: {"state_dict": state},
        lambda state: {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}, "lr": 0.1},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    ],
)
def test_wrappers_and_prefixes_of_training_are_taken_off(tmp_path: Path, wrap: Callable[[State], Any]) -> None:
    backbone = built("dino_vits16")
    path = save(wrap(state_of(backbone.model)), tmp_path / "checkpoint.pth")
    assert_same(loaded_state(backbone, path), state_of(backbone.model))


def test_a_full_dino_checkpoint_gives_the_teachers_backbone(tmp_path: Path) -> None:
    """As DINO's training saves it: both networks with their heads, optimiser, arguments, NumPy learning rates."""
    backbone = built("dino_vits16")
    teacher = {f"backbone.{name}": tensor for name, tensor in state_of(backbone.model).items()}
    teacher |= {"head.mlp.0.weight": torch.randn(4, 4), "head.last_layer.weight_g": torch.randn(4, 1)}
    student = {f"module.{name}": torch.randn_like(tensor) for name, tensor in teacher.items()}
    checkpoint = {
        "student": student,
        "teacher": teacher,
        "optimizer": {"state": {0: {"step": 3}}, "param_groups": [{"lr": np.float64(0.1), "params": [0]}]},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", patch_size=16),
        "dino_loss": {"center": torch.zeros(1, 4)},
    }
    path = save(checkpoint, tmp_path / "dino_full_checkpoint.pth")
    assert_same(loaded_state(backbone, path), state_of(backbone.model))


def released_dinov2(model: nn.Module) -> State:
    """The naming of the DINOv2 release, with random values of the shapes that it has."""
    state = {}
    for name, tensor in state_of(model).items():
        if ".mlp.fc" in name and "w12" not in name and type(model.blocks[0].mlp).__name__ != "Mlp":
            name = name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
        state["register_tokens" if name == "reg_token" else name] = tensor
    if "register_tokens" in state:
        state["pos_embed"] = torch.cat([torch.randn(1, 1, 192), state["pos_embed"]], dim=1)
    return {**state, "mask_token": torch.randn(1, 192)}


@pytest.mark.parametrize("name", ["dinov2_vits14", "dinov2_vits14_reg", "dinov2_vitg14", "dinov2_vitg14_reg"])
def test_dinov2_files_become_what_timm_makes_of_them(tmp_path: Path, name: str) -> None:
    backbone = built(name)
    released = released_dinov2(backbone.model)
    assert released.keys() != state_of(backbone.model).keys()
    assert ("register_tokens" in released) == name.endswith("_reg")
    assert any(".w12." in tensor for tensor in released) == ("vitg" in name)
    expected = checkpoint_filter_fn(dict(released), backbone.model)
    assert_same(loaded_state(backbone, save(released, tmp_path / "dinov2_pretrain.pth")), expected)


def test_the_class_position_of_dinov2_with_registers_moves_into_the_class_token(tmp_path: Path) -> None:
    backbone = built("dinov2_vits14_reg")
    released = released_dinov2(backbone.model)
    state = loaded_state(backbone, save(released, tmp_path / "reg.pth"))
    torch.testing.assert_close(state["cls_token"][0, 0], released["cls_token"][0, 0] + released["pos_embed"][0, 0])
    assert torch.equal(state["pos_embed"], released["pos_embed"][:, 1:])
    assert torch.equal(state["reg_token"], released["register_tokens"])


def test_prefixes_do_not_hide_the_naming_of_the_release(tmp_path: Path) -> None:
    backbone = built("dinov2_vits14_reg")
    released = released_dinov2(backbone.model)
    plain = loaded_state(backbone, save(released, tmp_path / "plain.pth"))
    teacher = {"teacher": {f"backbone.{name}": tensor for name, tensor in released.items()}}
    assert_same(loaded_state(backbone, save(teacher, tmp_path / "teacher.pth")), plain)


def test_deit3_files_are_renamed_and_lose_their_head(tmp_path: Path) -> None:
    backbone = built("deit3_vits16")
    expected = state_of(backbone.model)
    released = {}
    for name, tensor in with_head(expected).items():
        released[name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")] = tensor
    assert "blocks.0.gamma_1" in released
    assert_same(loaded_state(backbone, save({"model": released}, tmp_path / "deit_3_small.pth")), expected)


def test_a_distilled_head_is_dropped_and_the_distillation_token_kept(tmp_path: Path) -> None:
    backbone = built("timm:deit_tiny_distilled_patch16_224")
    released = with_head(state_of(backbone.model)) | {"head_dist.weight": torch.randn(10, 192)}
    state = loaded_state(backbone, save({"model": released}, tmp_path / "deit.pth"))
    assert_same(state, state_of(backbone.model))
    assert "dist_token" in state


def test_layer_scales_that_timm_itself_calls_gamma_keep_their_names() -> None:
    backbone = built("dinov3_vits16")
    state = state_of(backbone.model)
    assert "blocks.0.gamma_1" in state
    assert_same(to_timm_names(state, backbone.model), state)


def test_renaming_leaves_the_given_tensors_alone() -> None:
    backbone = built("dinov2_vits14_reg")
    released = released_dinov2(backbone.model)
    before = {name: tensor.clone() for name, tensor in released.items()}
    to_timm_names(released, backbone.model)
    assert_same(released, before)


@pytest.mark.parametrize(
    ("wrap", "note"),
    [
        pytest.param(  # facebookresearch/dinov2: eval/training_*/teacher_checkpoint.pth
            lambda b, o: {"teacher": {**under("backbone", b), **under("dino_head", o), **under("ibot_head", o)}},
            "under 'teacher.backbone.' and left out 2 others (teacher.dino_head, teacher.ibot_head)",
            id="DINOv2's teacher",
        ),
        pytest.param(  # the same, model_final.rank_0.pth
            lambda b, o: {
                "model": {
                    **under("student.backbone", nudged(b)),
                    **under("teacher.backbone", b),
                    **under("teacher.dino_head", o),
                },
                "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}},
                "iteration": 3,
            },
            "under 'model.teacher.backbone.' and left out",
            id="DINOv2's training",
        ),
        pytest.param(  # bytedance/ibot: checkpoint_teacher.pth
            lambda b, o: {"state_dict": {**b, "masked_embed": torch.ones(1, 192), "head.mlp.0.weight": o["a"]}},
            None,
            id="iBOT",
        ),
        pytest.param(  # facebookresearch/mae: mae_pretrain_vit_base_full.pth
            lambda b, o: {
                "model": {
                    **b,
                    **under("decoder_blocks.0", {"norm1.weight": torch.ones(9)}),
                    "decoder_pos_embed": o["a"],
                    "decoder_embed.weight": o["a"],
                    "mask_token": o["a"],
                }
            },
            "left out 3 others (decoder_blocks, decoder_embed, decoder_pos_embed)",
            id="MAE",
        ),
        pytest.param(  # facebookresearch/moco-v3: vit-s-300ep.pth.tar
            lambda b, o: {
                "epoch": 300,
                "state_dict": {
                    **under("module.base_encoder", {**b, "head.0.weight": o["a"]}),
                    **under("module.momentum_encoder", nudged(b)),
                    **under("module.predictor", o),
                },
            },
            "under 'state_dict.module.base_encoder.' and left out",
            id="MoCo v3",
        ),
        pytest.param(  # timm's train.py: model_best.pth.tar
            lambda b, o: {"arch": "vit", "state_dict": under("_orig_mod", nudged(b)), "state_dict_ema": with_head(b)},
            "under 'state_dict_ema.' and left out",
            id="timm",
        ),
        pytest.param(
            lambda b, o: {"model": nudged(b), "model_ema": under("module", b), "scaler": {"scale": 2.0}},
            "under 'model_ema.module.'",
            id="DeiT",
        ),
        pytest.param(  # facebookresearch/ijepa
            lambda b, o: {
                "encoder": under("module", nudged(b)),
                "predictor": under("module.predictor_blocks.0", o),
                "target_encoder": under("module", b),
            },
            "under 'target_encoder.module.'",
            id="I-JEPA",
        ),
        pytest.param(
            lambda b, o: {
                "state_dict": {**under("net.encoder", b), **under("classifier", o)},
                "pytorch-lightning": "2",
            },
            "under 'state_dict.net.encoder.' and left out",
            id="Lightning",
        ),
        pytest.param(
            lambda b, o: {
                name.replace("blocks.0.", "blocks.0._fsdp_wrapped_module._orig_mod."): tensor
                for name, tensor in under("module._orig_mod", b).items()
            },
            None,
            id="compiled and sharded",
        ),
        pytest.param(
            lambda b, o: {re.sub(r"^blocks\.(\d)", r"blocks.\1.\1", name): tensor for name, tensor in b.items()},
            None,
            id="blocks in chunks",
        ),
        pytest.param(lambda b, o: {**b, "epoch": 3, "args": None}, None, id="numbers beside tensors"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".pth.tar", ".ckpt"])
def test_training_checkpoints_give_the_backbone_and_say_what_they_held_besides(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, wrap: Callable[[State, State], Any], note: str | None, suffix: str
) -> None:
    backbone = built("dino_vits16")
    content = wrap(state_of(backbone.model), {"a": torch.ones(4, 4)})
    assert_same(loaded_state(backbone, save(content, tmp_path / f"checkpoint{suffix}")), state_of(backbone.model))
    told = [str(warning.message) for warning in recwarn if warning.category is LostregWarning]
    assert len(told) == (note is not None)
    assert note is None or note in told[0]


def under(prefix: str, state: State) -> State:
    return {f"{prefix}.{name}": tensor for name, tensor in state.items()}


def nudged(state: State) -> State:
    return {name: tensor + 1 for name, tensor in state.items()}


def test_the_registers_of_a_dinov2_teacher_move_as_those_of_the_release(tmp_path: Path) -> None:
    backbone = built("dinov2_vits14_reg")
    released = released_dinov2(backbone.model)
    plain = loaded_state(backbone, save(released, tmp_path / "plain.pth"))
    teacher = {
        "teacher": {**under("_orig_mod.backbone", released), **under("dino_head", {"mlp.0.bias": torch.ones(2)})}
    }
    with pytest.warns(LostregWarning, match="left out 1 others"):
        assert_same(loaded_state(backbone, save(teacher, tmp_path / "teacher.pth")), plain)


def test_of_two_backbones_none_is_guessed(tmp_path: Path) -> None:
    state = state_of(built("dino_vits16").model)
    path = save({**under("left", state), **under("right", state)}, tmp_path / "two.pth")
    with pytest.raises(
        WeightsError, match=r"holds 2 backbones, under left\., right\.: expected one, or one called teach"
    ):
        load_file_into(built("dino_vits16").model, path)


@pytest.mark.parametrize(
    "state",
    [
        {"layer1.0.conv1.weight": torch.ones(1), "fc.weight": torch.ones(1)},
        {"a": torch.ones(1), "epoch": 3},
        {
            "vit.embeddings.cls_token": torch.ones(1),
            "vit.layernorm.weight": torch.ones(1),
            "norm.weight": torch.ones(1),
        },
    ],
)
def test_another_network_is_told_by_its_names(tmp_path: Path, state: Any) -> None:
    path = save(state, tmp_path / "resnet.pth")
    names = ", ".join(sorted(name for name in state if name != "epoch"))
    message = rf"resnet\.pth does not fit this backbone: it lacks most of blocks\.0.*; it holds {re.escape(names)}$"
    with pytest.raises(WeightsError, match=message):
        load_file_into(built("dino_vits16").model, path)


# Files that do not fit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("blocks.1.attn.qkv.bias"), r"lacks blocks\.1\.attn\.qkv\.bias$"),
        (lambda state: state.update(extra=torch.ones(1)), "has the unexpected extra$"),
        (
            lambda state: state.update({"blocks.2.norm1.weight": torch.ones(192), "cls": state.pop("cls_token")}),
            r"lacks cls_token and has the unexpected blocks\.2\.norm1\.weight, cls$",
        ),
        (
            lambda state: state.update(pos_embed=torch.ones(1, 10, 192)),
            r"pos_embed should be \(1, 197, 192\) and is \(1, 10, 192\)$",
        ),
        (lambda state: [state.pop(name) for name in list(state)[:5]], "and 2 more$"),
    ],
)
def test_a_tensor_too_few_too_many_or_misshapen_is_named(
    tmp_path: Path, change: Callable[[State], Any], message: str
) -> None:
    backbone = built("dino_vits16")
    state = state_of(backbone.model)
    change(state)
    path = save(state, tmp_path / "off.safetensors")
    before = state_of(backbone.model)
    with pytest.raises(WeightsError, match=f"off.safetensors.*{message}"):
        load_file_into(backbone.model, path)
    assert_same(state_of(backbone.model), before)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("dinov2_vits14_reg", "dinov2_vits14"),
        ("dinov2_vits14", "dinov2_vits14_reg"),
        ("dino_vits16", "dino_vits8"),
        ("dinov3_vits16", "dino_vits16"),
        ("dino_vits16", "siglip2_vitb16"),
        ("dinov2_vits14", "dinov2_vitg14"),
    ],
)
def test_the_weights_of_another_backbone_are_refused(tmp_path: Path, theirs: str, ours: str) -> None:
    path = save(state_of(built(theirs).model), tmp_path / "other.pth")
    backbone = built(ours)
    with pytest.raises(WeightsError, match=r"other\.pth does not fit this backbone"):
        load_file_into(backbone.model, path)


def test_a_deeper_or_shallower_model_is_refused(tmp_path: Path) -> None:
    path = save(state_of(built("dino_vits16", depth=3).model), tmp_path / "deep.pth")
    for depth, message in ((2, "unexpected blocks.2"), (4, "lacks blocks.3")):
        backbone = built("dino_vits16", depth)
        with pytest.raises(WeightsError, match=message):
            load_file_into(backbone.model, path)


# Files that are no checkpoints


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"some text here\n",
        b"a readme, by mistake\n",
        b"import torch",
        b"cannot be read",
        b"<html><title>404</title></html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        b"PK\x03\x04 no archive after all",
        bytes(range(256)),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=f"weights{suffix} .*checkpoint"):
        read_state_dict(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "cut.pth"
    torch.save({"a": torch.ones(50)}, path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 7):
        path.write_bytes(whole[:length])
        with pytest.raises(WeightsError, match=r"cut\.pth"):
            read_state_dict(path)


def test_a_cut_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = save({"a": torch.ones(50)}, tmp_path / "cut.safetensors")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(WeightsError, match=r"cut\.safetensors is not a readable checkpoint"):
        read_state_dict(path)


@pytest.mark.parametrize("name", ["weights.npz", "weights.onnx", "weights", "weights.tar.gz"])
def test_another_kind_of_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"expected a \.safetensors, \.pth, \.pt, \.bin, \.ckpt, \.tar file"):
        read_state_dict(tmp_path / name)


def test_a_missing_file_or_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no weights file at .*absent\.pth"):
        read_state_dict(tmp_path / "absent.pth")
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(WeightsError, match=r"no weights file at .*folder\.pth"):
        read_state_dict(tmp_path / "folder.pth")


class Trap:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("writer", ["torch", "torch legacy", "pickle"])
def test_code_in_a_checkpoint_does_not_run(tmp_path: Path, writer: str) -> None:
    mark, path = tmp_path / "mark", tmp_path / "trap.pth"
    content = {"model": {"a": torch.ones(1)}, "extra": Trap(mark)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps({"extra": Trap(mark)}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "torch")
    with pytest.raises(WeightsError, match="it was not loaded, since a pickle can run code"):
        read_state_dict(path)
    assert not mark.exists()
    if writer == "pickle":  # the trap itself works
        pickle.loads(path.read_bytes())
        assert mark.exists()


def test_what_is_harmless_here_is_not_so_for_the_rest_of_the_program(tmp_path: Path) -> None:
    path = save({"state_dict": {"a": torch.ones(1)}, "args": argparse.Namespace()}, tmp_path / "args.pth")
    before = set(torch.serialization.get_safe_globals())
    assert read_state_dict(path).keys() == {"state_dict.a"}
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "found list"),
        (torch.ones(1), "found Tensor"),
        ({}, "found an empty mapping$"),
        (None, "found NoneType"),
        ({"state_dict": {}, "epoch": 3}, "found epoch, state_dict without any$"),
        ({"model": {"a": [torch.ones(1)]}}, "found model without any$"),
        (LOOP, "found model without any$"),
    ],
)
def test_contents_other_than_named_tensors_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = save(content, tmp_path / "odd.pth")
    with pytest.raises(WeightsError, match=f"odd.pth: expected .*{message}"):
        read_state_dict(path)


# The hub

TINY = "timm:vit_tiny_patch16_224"  # its weights have a classifier: timm loads them loosely
HUB_ID = "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
WAYS_OUT = ("HF_ENDPOINT", "--weights FILE", imgfocus.IMGFOCUS_INSTALL)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's client, and no network."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return folder


def go_online(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    address = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def put_into_cache(cache: Path, state: State, hub_id: str = HUB_ID) -> None:
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    save(state, snapshot / "model.safetensors")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)


def assert_shows_the_ways_out(error: BackboneError) -> None:
    assert not isinstance(error, WeightsError)
    assert "could not be fetched from the hub" in str(error)
    for way in WAYS_OUT:
        assert way in str(error)


def test_without_network_the_error_names_three_ways_out(cache: Path) -> None:
    with pytest.raises(BackboneError, match="HF_HUB_OFFLINE is set") as caught:
        load_backbone(TINY)
    assert_shows_the_ways_out(caught.value)


def test_an_unreachable_hub_is_noticed_at_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:  # bound and not listening: it refuses connections
        taken.bind(("127.0.0.1", 0))
        go_online(monkeypatch, taken.getsockname()[1])
        attempts = count_calls(monkeypatch, "urlopen")
        with pytest.raises(BackboneError, match="refused") as caught:
            load_backbone(TINY)
    assert_shows_the_ways_out(caught.value)
    assert len(attempts) == 1


def count_calls(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Any]:
    import urllib.request

    calls: list[Any] = []
    real = getattr(urllib.request, name)

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return real(*arguments, **options)

    monkeypatch.setattr(urllib.request, name, counted)
    return calls


@pytest.fixture
def empty_hub() -> Iterator[int]:
    """The port of a server that has nothing: every request is answered with 404."""

    class Nothing(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        do_HEAD = do_GET  # noqa: N815 - the base class calls it so

        def log_message(self, *arguments: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Nothing)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_hub_without_the_weights_leads_to_the_ways_out(
    cache: Path, empty_hub: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_online(monkeypatch, empty_hub)
    with pytest.raises(BackboneError) as caught:
        load_backbone(TINY)
    assert_shows_the_ways_out(caught.value)


def test_an_endpoint_that_is_no_web_server_leads_to_the_ways_out(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def mumble() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1024)
                connection.sendall(b"220 mail.example ready\r\n")

        thread = threading.Thread(target=mumble)
        thread.start()
        go_online(monkeypatch, server.getsockname()[1])
        with pytest.raises(BackboneError) as caught:
            load_backbone(TINY)
        thread.join()
    assert_shows_the_ways_out(caught.value)


def test_cached_weights_need_no_network(cache: Path) -> None:
    backbone = build_backbone(find_spec(TINY))
    put_into_cache(cache, with_head(state_of(backbone.model)))
    loaded = load_backbone(TINY)
    assert loaded.weights == f"hub {HUB_ID}"
    assert_same(state_of(loaded.model), state_of(backbone.model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("blocks.0.attn.qkv.weight"), r"Missing key.*blocks\.0\.attn\.qkv\.weight"),
        (lambda state: state.update(stray=torch.ones(1)), "Unexpected key.*stray"),
        (lambda state: state.update({"norm.bias": torch.ones(3)}), r"size mismatch for norm\.bias: .*\[3\].*\[192\]"),
    ],
)
def test_weights_from_the_hub_must_fit_as_strictly_as_a_file(
    cache: Path, change: Callable[[State], Any], message: str
) -> None:
    """timm drops strictness together with a classifier: part of the model would stay random, and silently so."""
    state = with_head(state_of(build_backbone(find_spec(TINY)).model))
    change(state)
    put_into_cache(cache, state)
    with pytest.raises(WeightsError, match=f"^hub {HUB_ID} does not fit this backbone: .*{message}"):
        load_backbone(TINY)


def test_a_model_without_released_weights_asks_for_a_file(cache: Path) -> None:
    with pytest.raises(BackboneError, match="timm names no weights for 'test_vit4': give --weights FILE"):
        load_backbone("timm:test_vit4")


def test_the_offline_row_never_asks_the_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = build_backbone(find_spec("imgfocus_vits14"))
    monkeypatch.setattr("lostreg.models.checkpoints.imgfocus_state_dict", lambda: state_of(backbone.model))
    loaded = load_backbone("imgfocus_vits14")
    assert loaded.weights == imgfocus.IMGFOCUS_SOURCE
    assert_same(state_of(loaded.model), state_of(backbone.model))


def test_the_releases_own_naming_from_the_hub_is_left_to_timm(cache: Path) -> None:
    """C-RADIO's file has another naming, and positions on a grid of 128x128 that timm shrinks in a way of its own."""
    width, side = 768, 128
    model = build_backbone(find_spec("cradio3_vitb16")).model
    prefix = "radio_model.model."
    released: State = {
        f"{prefix}patch_generator.embedder.weight": torch.randn(width, 3 * 16 * 16),
        f"{prefix}patch_generator.pos_embed": torch.randn(1, side * side, width),
        f"{prefix}patch_generator.cls_token.token": torch.randn(8, width),
    }
    blocks = {name: torch.randn_like(value) for name, value in state_of(model).items() if name.startswith("blocks.")}
    released |= {prefix + name: value for name, value in blocks.items()}
    put_into_cache(cache, released, "timm/vit_base_patch16_radio_v3.c_radio")
    found = state_of(load_backbone("cradio3_vitb16").model)
    square = released[f"{prefix}patch_generator.pos_embed"].reshape(1, side, side, width).permute(0, 3, 1, 2)
    shrunk = torch.nn.functional.interpolate(square, (32, 32), mode="bilinear", align_corners=True)
    torch.testing.assert_close(found["pos_embed"], shrunk.permute(0, 2, 3, 1).reshape(1, 1024, width))
    torch.testing.assert_close(found["reg_token"][0], released[f"{prefix}patch_generator.cls_token.token"][1:])
    for name, value in blocks.items():
        torch.testing.assert_close(found[name], value)


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    backbone = built("dino_vits16")
    state = state_of(backbone.model)
    path = save({**state, "_orig_mod.norm.weight": torch.ones_like(state["norm.weight"])}, tmp_path / "twice.pth")
    with pytest.raises(WeightsError, match=r"two tensors of twice.pth are both 'norm\.weight'"):
        load_file_into(backbone.model, path)


def test_a_register_file_without_positions_names_what_it_lacks(tmp_path: Path) -> None:
    backbone = built("dinov2_vits14_reg")
    state = state_of(backbone.model)
    state["register_tokens"] = state.pop("reg_token")
    del state["pos_embed"]
    with pytest.raises(WeightsError, match=r"lacks pos_embed$"):
        load_file_into(backbone.model, save(state, tmp_path / "cut.pth"))
