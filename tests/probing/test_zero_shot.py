"""Zero-shot against open_clip's own image tower, with a small random CLIP whose weights both have."""

import dataclasses
import logging
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from small_vit import NAME, discoverer, small, strict_json
from timm.models.vision_transformer import checkpoint_filter_fn

from lostreg.cli.main import main
from lostreg.errors import BackboneError, DatasetError, OptionError
from lostreg.inference.discoverer import Discoverer
from lostreg.models.backbone import Backbone, build_backbone
from lostreg.models.forward import Forward
from lostreg.models.registers import RegisterNeurons
from lostreg.models.table import BACKBONES
from lostreg.probing import zero_shot
from lostreg.probing.data import ProbeData, load_probe_data
from lostreg.probing.probe import difference, probe
from lostreg.probing.tokens import TokensJob
from lostreg.probing.zero_shot import class_names, require_text_tower, text_head

pytestmark = pytest.mark.usefixtures("one_thread")
ROW = "clip_vitb16"
SIDE, PATCH, WIDTH = 32, 8, 64
SIZE = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": 3, "num_heads": 2}  # timm's words
COUNTS = {"polar_bear": 5, "n01440764": 4, "dog": 3}
CALLED = ["dog", "tench", "polar bear"]  # in the order of the folders


@pytest.fixture(scope="module")
def open_clip() -> ModuleType:
    return pytest.importorskip("open_clip", reason="open_clip is not installed: the extra clip")


@pytest.fixture
def towers(open_clip: ModuleType, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """A small CLIP, which open_clip then gives in place of every other."""
    torch.manual_seed(0)
    size = {"image_size": SIDE, "layers": 3, "width": WIDTH, "head_width": 32, "patch_size": PATCH}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    model = open_clip.CLIP(24, vision_cfg=size, text_cfg=text, quick_gelu=True).eval()
    for parameter in model.parameters():  # biases and norms are not 0 and 1
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    monkeypatch.setattr(zero_shot, "why_out_of_reach", lambda *_: None)
    monkeypatch.setattr(open_clip, "create_model", lambda *_, **__: model_like(open_clip, model, size, text))
    return model


def model_like(open_clip: ModuleType, model: torch.nn.Module, size: dict, text: dict) -> torch.nn.Module:
    """A copy: whoever loads a model may take it apart."""
    copy = open_clip.CLIP(24, vision_cfg=size, text_cfg=text, quick_gelu=True)
    copy.load_state_dict(model.state_dict())
    return copy


@pytest.fixture
def backbone(towers: torch.nn.Module) -> Backbone:
    """timm's model of the image tower, as lostreg has it."""
    built = build_backbone(dataclasses.replace(BACKBONES[ROW], patch_size=PATCH), **SIZE)
    state = checkpoint_filter_fn(dict(towers.state_dict()), built.model)
    built.model.load_state_dict({name: value for name, value in state.items() if not name.startswith("head.")})
    return built


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for name, count in COUNTS.items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(count):
            pixels = random.integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path / "photos"


def cls_of(discoverer: Discoverer, data: ProbeData) -> np.ndarray:
    """CLS of each image, (n, D)."""
    job = TokensJob(Forward(discoverer.backbone))
    return np.stack([one.prefix[0] for one in discoverer.stream_of(job).outcomes(data.images)])


def expected_cosines(
    open_clip: ModuleType, towers: torch.nn.Module, backbone: Backbone, paths: list[Path]
) -> np.ndarray:
    """open_clip from pixels and names to cosines, (images, classes)."""
    to_tensor = open_clip.image_transform(SIDE, is_train=False, mean=backbone.mean, std=backbone.std)
    images = torch.stack([to_tensor(Image.open(path)) for path in paths])
    with torch.no_grad():
        texts = open_clip.build_zero_shot_classifier(
            towers, open_clip.get_tokenizer("ViT-B-16"), CALLED, open_clip.OPENAI_IMAGENET_TEMPLATES
        )
        return (towers.encode_image(images, normalize=True) @ texts).numpy()


def test_images_of_the_towers_size_have_the_cosines_of_open_clip(
    open_clip: ModuleType, towers: torch.nn.Module, backbone: Backbone, photos: Path
) -> None:
    data = load_probe_data(photos, "zero-shot")
    paths = [image.path for image in data.images]
    expected = expected_cosines(open_clip, towers, backbone, paths)
    head = text_head(backbone, data.classes, lambda _: None)
    cls = torch.from_numpy(cls_of(discoverer(backbone), data))
    norms = (cls @ towers.visual.proj.detach()).norm(dim=1, keepdim=True)
    np.testing.assert_allclose((head(cls) / norms).numpy(), expected, atol=1e-5)
    assert np.ptp(expected, axis=1).min() > 1e-3  # classes are told apart by more than rounding
    found = probe(discoverer(backbone), data)
    right = expected.argmax(axis=1) == data.labels
    assert found.score.mean == pytest.approx(100 * right.mean())
    assert (found.metric, found.tokens, found.dimensions, found.images) == ("top-1", "cls", WIDTH, (0, 0, 12))
    assert found.chance == pytest.approx(100 * 5 / 12)
    assert found.interval[0] <= found.score.mean <= found.interval[1]
    assert found.penalties == ()


def test_registers_count(backbone: Backbone, photos: Path) -> None:
    """Those of test time, and those that other weights of the row have."""
    with_two = build_backbone(backbone.spec, **SIZE, reg_tokens=2)
    state = {"reg_token": torch.randn(1, 2, WIDTH), **backbone.model.state_dict()}
    cls, patches = state["pos_embed"][:, :1], state["pos_embed"][:, 1:]
    with_two.model.load_state_dict({**state, "pos_embed": torch.cat([cls, torch.zeros(1, 2, WIDTH), patches], dim=1)})
    data = load_probe_data(photos, "zero-shot")
    plain = cls_of(discoverer(backbone), data)
    for one, names in (
        (discoverer(with_two), ("CLS", "register 1", "register 2")),
        (discoverer(backbone, registers=RegisterNeurons(((0, 3), (1, 7)), 1)), ("CLS", "test-time register 1")),
    ):
        assert probe(one, data).prefix == names
        assert np.abs(cls_of(one, data) - plain).max() > 1e-3


def test_every_text_tower_is_that_of_the_rows_weights(open_clip: ModuleType) -> None:
    rows = [row for row in BACKBONES.values() if row.text_tower]
    assert [row.name for row in rows] == ["clip_vitb16", "clip_vitl14", "openclip_vitb16", "openclip_vitl14"]
    for row in rows:
        assert row.text_tower is not None
        size, weights = open_clip.get_model_config(row.text_tower[0]), open_clip.get_pretrained_cfg(*row.text_tower)
        config = timm.get_pretrained_cfg(row.timm_name)
        vision = size["vision_cfg"]
        assert (vision["patch_size"], vision["image_size"]) == (row.patch_size, config.input_size[1])
        assert size["embed_dim"] == config.num_classes
        assert (tuple(weights["mean"]), tuple(weights["std"])) == (config.mean, config.std)
        assert size.get("quick_gelu", False) == weights.get("quick_gelu", False) == ("quickgelu" in row.timm_name)


def test_a_class_is_called_as_its_folder_or_as_imagenet_calls_it(open_clip: ModuleType) -> None:
    folders = ["n01440764", "n02119022", "n15075141", "n00000000", "Polar_bear"]
    assert class_names(folders) == ["tench", "red fox", "toilet paper", "n00000000", "Polar bear"]


@pytest.mark.parametrize("parts", [("train", "val"), ("test",)])
def test_the_part_to_measure_on_is_all_that_counts(photos: Path, parts: tuple[str, ...]) -> None:
    for part in parts:
        (photos.parent / part).mkdir()
        (photos.parent / part / "unseen").mkdir()
        Image.new("RGB", (8, 8)).save(photos.parent / part / "unseen/0.png")
    photos.rename(photos.parent / parts[-1] / "photos")
    data = load_probe_data(photos.parent, "zero-shot")
    assert data.classes == ("photos", "unseen")
    assert data.labels.tolist() == [0] * 12 + [1]
    assert [len(images) for images in data.split(0, np.arange(13))] == [0, 0, 13]


def test_one_image_of_a_class_is_enough_and_one_class_is_not(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "0.png")
    assert len(load_probe_data(tmp_path, "zero-shot").images) == 2
    with pytest.raises(DatasetError, match="at least 2 classes, found none"):
        load_probe_data(tmp_path / "cat", "zero-shot")


def test_what_is_missing_is_told(open_clip: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackboneError, match=r"expected one of clip_vitb16, .*, not siglip2_vitb16"):
        require_text_tower(BACKBONES["siglip2_vitb16"])
    backbone = dataclasses.replace(small(), spec=BACKBONES[ROW])
    handlers = list(logging.root.handlers)
    with monkeypatch.context() as patch:
        patch.setattr(zero_shot, "why_out_of_reach", lambda *_: "refused")
        with pytest.raises(
            BackboneError, match=r"ViT-B-16-quickgelu \(openai\), could not be fetched .*\(refused\): go"
        ):
            text_head(backbone, ["cat", "dog"], lambda _: None)
    with monkeypatch.context() as patch:
        patch.setattr(zero_shot, "why_out_of_reach", lambda *_: None)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(BackboneError, match=r"\(Failed to download .*\): go online once"):
            text_head(backbone, ["cat", "dog"], lambda _: None)
    assert logging.root.handlers == handlers


def test_without_open_clip_the_extra_is_named(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(OptionError, match=r'pip install "lostreg\[clip\]"'):
        require_text_tower(BACKBONES[ROW])
    assert run(photos, ROW) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith('lostreg probe: error: zero-shot needs open_clip: pip install "lostreg[clip]"')


def run(photos: Path, *arguments: object) -> int:
    options = ["--task", "zero-shot", "--data", photos, "--device", "cpu"]
    return main([str(argument) for argument in ("probe", *arguments, *options)])


def test_the_command_writes_the_same_table(
    backbone: Backbone,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("lostreg.inference.discoverer.load_backbone", lambda *_, **__: backbone)
    neurons, out = tmp_path / "neurons.json", tmp_path / "figures.json"
    RegisterNeurons(((0, 3), (1, 7)), 1).save(neurons)
    (photos / "dog/0.png").write_text("no picture")
    assert run(photos, ROW, "--out", out) == 2
    assert run(photos, ROW, "--out", out, "--test-time-registers", neurons) == 2
    written = strict_json(out.read_text())
    assert written["settings"]["max_side"] == 224
    assert written["settings"]["seeds"] is None
    first, second = written["backbones"]
    assert first["left_out"] == [0]
    assert first["images"] == [0, 0, 11]
    captured = capsys.readouterr()
    table = captured.out.splitlines()[-5:]
    assert "over seeds" not in table[0]
    gap = difference(first, second)
    assert gap is not None
    assert table[2].endswith("{:+.3g} ({:+.3g} to {:+.3g})".format(*gap))
    assert table[4] == f"top-1: {ROW} {first['score']['mean']:.4g}, {second['title']} {second['score']['mean']:.4g}"
    assert run(photos, ROW, "--out", out, "--max-side", "none") == 2
    assert "max_side was 224 and is now null" in capsys.readouterr().err


def test_a_backbone_without_texts_is_told_before_anything_is_computed(
    open_clip: ModuleType, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(photos, ROW, NAME) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.endswith(f"expected one of clip_vitb16, clip_vitl14, openclip_vitb16, openclip_vitl14, not {NAME}")
