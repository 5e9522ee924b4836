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
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from lostreg.errors import BackboneError, LostregWarning, WeightsError
from lostreg.models.imgfocus import IMGFOCUS_INSTALL, IMGFOCUS_SOURCE, imgfocus_state_dict

_SUFFIXES: Final = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
_DEEPEST: Final = 8  # mappings within mappings; a pickle may hold one that holds itself
# What torch.compile, FSDP and activation checkpointing put into names, anywhere in them.
_WRAPPED: Final = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Of several backbones in a file the one that its makers use afterwards: DINO's, iBOT's and DINOv2's teacher, the moving
# average of timm and DeiT, I-JEPA's target, MoCo v3's base encoder.
_PREFERRED: Final = ("teacher", "ema", "target_encoder", "base_encoder")
_ALIKE: Final = 0.9  # share of the tensors of the best match that makes another one
_RENAMES: Final = (
    (re.compile(r"^blocks\.\d+\.(\d+\.)"), r"blocks.\1"),  # DINOv2's blocks in chunks, counted through
    (re.compile(r"^(blocks\.\d+)\.gamma_([12])$"), r"\1.ls\2.gamma"),  # DeiT-III's layer scale
    (re.compile(r"^(blocks\.\d+\.mlp)\.w12\."), r"\1.fc1."),  # DINOv2's SwiGLU, packed
    (re.compile(r"^(blocks\.\d+\.mlp)\.w3\."), r"\1.fc2."),
    (re.compile(r"^register_tokens$"), "reg_token"),
)
_CLASSIFIER: Final = re.compile(r"^(head\.|head_dist\.|mask_token$|masked_embed$)")  # not worth a word
_HEAD: Final = re.compile(r"^(\w+_head|decoder\w*|predictor|projector|prototypes)\.|^decoder_pos_embed$")
_HUB_TIMEOUT_S: Final = 10.0
_MOST_ADDED: Final = 4096
_ADDED: Final = "lostreg added registers"  # in the metadata of a safetensors file: how many the row has not
_TIMM_FILES: Final = ("model.safetensors", "pytorch_model.bin")
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
        path: see `read_state_dict`; in timm's naming or that of the DINO, DINOv2 or DeiT-III releases, alone or as
            part of a training checkpoint. What is left out of that is told by a `LostregWarning`.

    Returns:
        The file's name and SHA-256, for the results file.

    Raises:
        WeightsError: if the file cannot be read or does not fit.
    """
    _load_strictly(model, to_timm_names(read_state_dict(path), model, path.name), path.name)
    with path.open("rb") as file:
        return f"file {path.name} sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def save_with_registers(model: nn.Module, added: int, path: Path) -> None:
    """Write a model as a ``.safetensors`` file that `load_file_into` takes, and that says how many registers are new.

    Args:
        model: timm model without a classification head.
        added: registers that the row of the backbone table does not have, see `with_new_registers`.
        path: where to write.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    path.write_bytes(save(state, {_ADDED: str(added)} if added else None))  # save_file hides files from other users


def added_registers(path: Path) -> int:
    """How many registers a weights file has beyond its row's: 0 unless `save_with_registers` says another number.

    Raises:
        WeightsError: if what the file says is no number.
    """
    if path.suffix.lower() != ".safetensors" or not path.is_file():
        return 0
    try:
        with safe_open(path, "pt") as file:
            said = (file.metadata() or {}).get(_ADDED, "0")
    except (SafetensorError, OSError):
        return 0  # whoever reads its tensors says why
    if not said.isdecimal() or not int(said) <= _MOST_ADDED:
        raise WeightsError(
            f"{path.name} says that it has {said[:20]} new registers: expected a number up to {_MOST_ADDED}"
        )
    return int(said)


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
    """The tensors of a checkpoint file, those within mappings under names such as ``teacher.backbone.cls_token``.

    Args:
        path: a ``.safetensors`` file, or a PyTorch file (read with ``weights_only``: no code in it runs).

    Raises:
        WeightsError: if the file is missing, of another kind, or holds no tensors by name.
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
    tensors = dict(_tensors(content))
    if not tensors:
        raise WeightsError(f"{path}: expected tensors by name, found {_described(content)}")
    return tensors


def _described(content: Any) -> str:
    if not isinstance(content, Mapping):
        return type(content).__name__
    return f"{_some(sorted(map(str, content)))} without any" if content else "an empty mapping"


def _tensors(content: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    for name, value in content.items() if isinstance(content, Mapping) and depth < _DEEPEST else ():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        else:
            yield from _tensors(value, f"{prefix}{name}.", depth + 1)


def to_timm_names(state: Mapping[str, Tensor], model: nn.Module, source: str = "the file") -> dict[str, Tensor]:
    """The backbone among the tensors of a checkpoint, in timm's scheme.

    It is found by its names, whatever stands in front of them all. Names that are timm's already stay as they are.
    Heads, decoders and mask tokens are dropped, since the backbone has none.

    Args:
        state: tensors by name, in timm's naming or that of the DINO, DINOv2 or DeiT-III releases.
        model: the model they are for; it says which names are timm's already, and whether CLS has a position
            embedding of its own.
        source: what the file is called, for messages.

    Raises:
        WeightsError: if nothing in it looks like this backbone, or several things do, or a tensor is there twice.
    """
    own = model.state_dict().keys()
    prefix = _find_prefix(state, own, source)
    renamed: dict[str, Tensor] = {}
    left_out: Counter[str] = Counter()
    for full_name, value in state.items():
        name = _unwrapped(full_name)
        if not name.startswith(prefix):
            left_out[_branch(name, prefix)] += 1
            continue
        name = _timm_name(name.removeprefix(prefix), own)
        if name in renamed:
            raise WeightsError(f"two tensors of {source} are both '{name}': expected one")
        if name in own or not (_CLASSIFIER.match(name) or _HEAD.match(name)):
            renamed[name] = value
        elif _HEAD.match(name):
            left_out[_branch(name, "")] += 1
    if left_out:
        place = f"under '{prefix}'" if prefix else "that are a backbone's"
        others = f"{left_out.total()} others ({_some(sorted(left_out))})"
        _tell(f"{source}: took the {len(renamed)} tensors {place} and left out {others}")
    released = f"{prefix}register_tokens" in map(_unwrapped, state) and {"cls_token", "pos_embed"} <= renamed.keys()
    if released and getattr(model, "no_embed_class", False):
        # The release adds a position embedding to CLS; timm's register models keep it inside the CLS token.
        position = renamed["pos_embed"]
        renamed["cls_token"] = renamed["cls_token"] + position[:, :1]
        renamed["pos_embed"] = position[:, 1:]
    return renamed


def _find_prefix(state: Iterable[str], own: Set[str], source: str) -> str:
    """What stands in front of the names of a backbone: the start that leaves most of the model's own names."""
    matches: Counter[str] = Counter()
    for name in map(_unwrapped, state):
        parts = name.split(".")
        for start in range(len(parts)):
            if _timm_name(".".join(parts[start:]), own) in own:
                matches["".join(f"{part}." for part in parts[:start])] += 1
    best = max(matches.values(), default=0)
    if 2 * best < len(own):
        names = sorted(state)
        raise WeightsError(
            f"{source} does not fit this backbone: it lacks most of {_some(sorted(own))}, which may all have the same "
            f"in front; it holds {_some(names)}"
        )
    prefixes = sorted(prefix for prefix, count in matches.items() if count >= _ALIKE * best)
    for word in _PREFERRED if len(prefixes) > 1 else ():
        chosen = [prefix for prefix in prefixes if re.search(rf"(\b|_){word}(\b|_)", prefix)]
        prefixes = chosen or prefixes
    if len(prefixes) > 1:
        raise WeightsError(
            f"{source} holds {len(prefixes)} backbones, under {_some(prefixes)}: expected one, or one called "
            f"{', '.join(_PREFERRED)}"
        )
    return prefixes[0]


def _branch(name: str, prefix: str) -> str:
    """A name as far as to where it leaves a prefix."""
    parts, start = name.split("."), prefix.split(".")
    apart = next((place for place, pair in enumerate(zip(parts, start, strict=False)) if pair[0] != pair[1]), 0)
    return ".".join(parts[: apart + 1])


def _unwrapped(name: str) -> str:
    return _WRAPPED.sub("", name)


def _timm_name(name: str, own: Set[str]) -> str:
    """A tensor's name in timm's scheme; names that are so already stay, such as the gamma_1 of DINOv3 in timm."""
    for pattern, replacement in _RENAMES:
        if name in own:
            break
        name = pattern.sub(replacement, name)
    return name


def _tell(message: str) -> None:
    warnings.warn(message, LostregWarning, stacklevel=2)


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
    reason = why_out_of_reach(config.hf_hub_id, _TIMM_FILES) if config.hf_hub_id else None
    if reason is not None:
        raise BackboneError(_ways_out(timm_name, reason))
    try:
        yield f"hub {source}"
    except (BackboneError, TypeError, AttributeError, MemoryError):
        raise
    except Exception as error:  # the hub's client raises whatever its transport raises
        if isinstance(error, RuntimeError) and "loading state_dict" in str(error):
            reason = "; ".join(line.strip().rstrip(". ") for line in str(error).splitlines()[1:4])
            raise WeightsError(f"hub {source} does not fit this backbone: {reason}") from error
        raise BackboneError(_ways_out(timm_name, _first_line(error))) from error


def why_out_of_reach(hub_id: str, files: Iterable[str]) -> str | None:
    """Why weights can be had neither from the hub's cache nor from the hub; None where they may be.

    The hub is asked once, since its client would try for most of a minute.

    Args:
        hub_id: of the hub's repository.
        files: names that its weights may have, one of which is enough.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    if any(isinstance(try_to_load_from_cache(hub_id, name), str) for name in files):
        return None
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")  # noqa: S310 - the client's own address
        urllib.request.urlopen(request, timeout=_HUB_TIMEOUT_S).close()  # noqa: S310
    except urllib.error.HTTPError:
        return None  # it answered
    except (OSError, ValueError, http.client.HTTPException) as error:
        return str(getattr(error, "reason", None) or _first_line(error))
    return None


def _ways_out(timm_name: str, reason: str) -> str:
    return (
        f"the weights of '{timm_name}' could not be fetched from the hub ({reason}). Three ways out: "
        "(1) go online once, or set HF_ENDPOINT to a mirror: the hub's cache is used from then on; "
        "(2) copy the checkpoint here and give --weights FILE; "
        f"(3) {IMGFOCUS_INSTALL}, and use --backbone imgfocus_vits14"
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
