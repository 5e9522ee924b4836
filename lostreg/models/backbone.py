"""How a row of the backbone table, or any other timm ViT, becomes a frozen model."""

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import timm
import torch
from timm.layers.attention import Attention, AttentionRope
from timm.layers.patch_embed import PatchEmbed
from timm.models import Eva, VisionTransformer
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lostreg.checks import shown, whole_number
from lostreg.errors import BackboneError, OptionError
from lostreg.models import checkpoints
from lostreg.models.blocks import check_mlp
from lostreg.models.registers import RegisterNeurons
from lostreg.models.table import BACKBONES, BackboneSpec, check_name
from lostreg.text import did_you_mean


def check_backbone(value: object) -> None:
    """Raise `OptionError` where something else stands for a backbone, such as its name."""
    if not isinstance(value, Backbone):
        raise OptionError(f"expected a Backbone, such as load_backbone gives, not {shown(value)} in its place")


@dataclass(frozen=True)
class Backbone:
    """A frozen model in evaluation mode, and what is needed to feed it.

    Attributes:
        spec: its row of the table.
        model: timm's `VisionTransformer` or `Eva`.
        mean: RGB mean of the input, in [0, 1].
        std: RGB standard deviation of the input, in [0, 1].
        weights: where the weights came from; a file is named with its SHA-256.
        registers: test-time registers, or None: then nothing is added to any image. See `with_registers`.
    """

    spec: BackboneSpec
    model: nn.Module
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    weights: str
    registers: RegisterNeurons | None = None

    @property
    def depth(self) -> int:
        """Number of transformer blocks."""
        return len(self.model.blocks)  # type: ignore[arg-type]

    @property
    def width(self) -> int:
        """Dimensions of a token."""
        return int(self.model.embed_dim)  # type: ignore[arg-type]

    @property
    def own_prefix_tokens(self) -> int:
        """Tokens in front of the patches, as the model itself counts them."""
        return int(self.model.num_prefix_tokens)  # type: ignore[arg-type]

    @property
    def prefix_tokens(self) -> int:
        """Tokens in front of the patches: the model's own, then test-time registers."""
        return self.own_prefix_tokens + (self.registers.count if self.registers else 0)

    @property
    def prefix_names(self) -> list[str]:
        """What the tokens in front of the patches are: ``CLS``, ``register 1``, ``test-time register 1``."""
        trained = self.own_prefix_tokens - int(self.spec.class_token)
        return [
            *["CLS"] * self.spec.class_token,
            *[f"register {number}" for number in range(1, trained + 1)],
            *[f"test-time register {number}" for number in range(1, self.prefix_tokens - self.own_prefix_tokens + 1)],
        ]

    @property
    def title(self) -> str:
        """Its name and its test-time registers, for people."""
        count = self.registers.count if self.registers else 0
        return self.spec.name + (f" + {count} test-time register{'s' * (count > 1)}" if count else "")

    def with_registers(self, registers: RegisterNeurons | None) -> "Backbone":
        """The same model with test-time registers (Jiang et al. 2025), or without: the weights are shared, unchanged.

        Raises:
            OptionError: if it is something else, the neurons are of another backbone, the model has no such layer or
                unit, or more tokens would be added than `most_registers`.
            BackboneError: if its MLPs are of a kind whose hidden units cannot be read.
        """
        if registers is not None:
            if not isinstance(registers, RegisterNeurons):
                raise OptionError(f"registers must be RegisterNeurons, such as a file's, not {shown(registers)}")
            registers.require(self.spec.name, self.weights)
            whole_number(registers.count, f"count of test-time registers of {self.spec.name}", most=self.most_registers)
            for layer, unit in registers.neurons:
                if layer >= self.depth or unit >= self.hidden_units(layer):
                    raise OptionError(f"{self.spec.name} has no hidden unit {unit} in layer {layer}")
        return replace(self, registers=registers)

    def hidden_units(self, layer: int) -> int:
        """How many hidden units the MLP of a block has, after gates.

        Raises:
            BackboneError: if it is of a kind whose hidden units cannot be read.
        """
        mlp: Any = self.model.blocks[layer].mlp  # type: ignore[index, union-attr]
        check_mlp(mlp)
        return int(mlp.fc2.in_features)

    @property
    def most_registers(self) -> int:
        """How many test-time registers can be added: as many as an image of the size it was made for has patches."""
        return int(self.model.patch_embed.num_patches)  # type: ignore[union-attr, arg-type]

    @property
    def device(self) -> torch.device:
        """Where the model's parameters live."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the model's parameters."""
        return next(self.model.parameters()).dtype

    def on(self, device: torch.device, dtype: torch.dtype) -> "Backbone":
        """The same on a device in a precision: never changed in place, since others may hold it too."""
        same_device = self.device.type == device.type and device.index in (None, self.device.index)
        if same_device and self.dtype == dtype:
            return self
        return replace(self, model=placed_copy(self.model, device, dtype))


_DRAWN: Final = (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default, torch.ops.aten.erfinv_.default)
_RAND: Final = torch.ops.aten.rand.default  # from which mixed rotary embeddings begin
_LOG: Final = logging.getLogger(__name__)
_TIMM_MODULES: Final = ("vision_transformer", "deit", "eva")
_BLOCKS: Final = (Block, ResPostBlock, EvaBlock, EvaBlockPostNorm)
_ATTENTIONS: Final = (Attention, AttentionRope, EvaAttention)


def find_spec(name: str) -> BackboneSpec:
    """The row called ``name``.

    Args:
        name: a key of `BACKBONES`, or ``timm:NAME``, for which a row without a model is made: patch size and
            registers are filled in by `build_backbone`.

    Raises:
        BackboneError: if there is no such row or no such timm model; the nearest names are suggested.
    """
    if not isinstance(name, str):
        raise OptionError(f"expected the name of a backbone, not {shown(name)}")
    if name in BACKBONES:
        return BACKBONES[name]
    check_name(name)
    timm_name = name.removeprefix("timm:")
    architecture = timm_name.partition(".")[0]
    if not timm.is_model(architecture):
        models = [model for module in _TIMM_MODULES for model in timm.list_models(module=module)]
        raise BackboneError(f"timm has no model '{timm_name}'{did_you_mean(architecture, models)}")
    if timm_name != architecture and timm_name not in timm.list_models(f"{architecture}.*", pretrained=True):
        tags = timm.list_pretrained(f"{architecture}.*")
        raise BackboneError(f"timm has no weights '{timm_name}'{did_you_mean(timm_name, tags)}")
    if not timm.models.is_model_in_modules(architecture, _TIMM_MODULES):
        raise BackboneError(
            f"'{timm_name}' is not a plain Vision Transformer: expected a model of timm's "
            f"{', '.join(_TIMM_MODULES)} modules (VisionTransformer or Eva), with patch tokens on one grid"
        )
    return BackboneSpec(name, timm_name, 0, 0, "k", "see the model card", "see the model card")


def build_backbone(spec: BackboneSpec, **timm_options: Any) -> Backbone:
    """Build a row's model, with random weights unless timm is told otherwise.

    Args:
        spec: a row of the table, or one that `find_spec` made.
        **timm_options: passed on to timm, such as ``depth=2`` for a shorter model.

    Raises:
        BackboneError: if the model computes attention in a way whose q, k and v lostreg cannot read.
    """
    try:
        model = timm.create_model(spec.timm_name, dynamic_img_size=True, **timm_options)
    except TypeError as error:
        raise BackboneError(f"'{spec.timm_name}' does not take images of any size: {error}") from error
    check_supported(spec, model)
    # A classifier is no part of a backbone. It goes only now, since timm loads hub weights strictly only with it.
    model.reset_classifier(0)  # type: ignore[operator]
    model.eval().requires_grad_(False)
    config: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    return Backbone(fill_row(spec, model), model, tuple(config["mean"]), tuple(config["std"]), "random")


def check_supported(spec: BackboneSpec, model: nn.Module) -> None:
    """Refuse what would silently give other tensors than the model's own queries, keys and values."""
    if not isinstance(model, VisionTransformer | Eva) or type(model.patch_embed) is not PatchEmbed:
        embedding = type(getattr(model, "patch_embed", None)).__name__
        raise BackboneError(
            f"'{spec.timm_name}' is a {type(model).__name__} with {embedding}: expected timm's VisionTransformer "
            "or Eva with a plain patch embedding"
        )
    for block in model.blocks:
        if type(block) not in _BLOCKS or type(block.attn) not in _ATTENTIONS:
            attention = type(getattr(block, "attn", block)).__name__
            raise BackboneError(
                f"'{spec.timm_name}' has {type(block).__name__} blocks with {attention}: its queries, keys "
                f"and values are not those of {', '.join(kind.__name__ for kind in _ATTENTIONS)}"
            )
    channels = model.patch_embed.proj.in_channels
    if channels != 3:
        raise BackboneError(f"'{spec.timm_name}' takes images of {channels} channels: expected 3, for RGB")
    height, width = model.patch_embed.patch_size
    if height != width:
        raise BackboneError(f"'{spec.timm_name}' has {height}x{width} patches: expected square ones")


def fill_row(spec: BackboneSpec, model: nn.Module) -> BackboneSpec:
    """Complete a ``timm:`` row from its model; a row of the table comes back as it is."""
    if spec.patch_size:
        return spec
    class_token = model.cls_token is not None
    return BackboneSpec(
        spec.name,
        spec.timm_name,
        int(model.patch_embed.patch_size[0]),  # type: ignore[index, union-attr]
        int(model.num_prefix_tokens) - int(class_token),  # type: ignore[arg-type]
        spec.feature,
        str((getattr(model, "pretrained_cfg", None) or {}).get("license") or spec.licence),
        spec.training,
        class_token=class_token,
    )


def resolve_device(device: str | torch.device) -> torch.device:
    """The device that ``auto`` or a name stands for.

    Raises:
        OptionError: if PyTorch does not know the device, or it is not there.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise OptionError(f"device must be auto, cpu, cuda, cuda:N or mps, not {shown(device)}") from error
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present.get(found.type, False):
        raise OptionError(f"device '{device}' was asked for, but PyTorch finds none here; try --device cpu")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise OptionError(f"device '{device}' was asked for, but there are {torch.cuda.device_count()} GPUs")
    return found


def load_backbone(
    name: str,
    *,
    weights: str | Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Backbone:
    """A backbone with its trained weights, frozen, on ``device``.

    Args:
        name: a row of `BACKBONES`, or ``timm:NAME``.
        weights: a ``.safetensors``, ``.pth``, ``.pt``, ``.bin``, ``.ckpt`` or ``.tar`` file in timm's naming or that of
            the original DINO, DINOv2 or DeiT-III release, alone or within a training checkpoint (of several networks
            the teacher or moving average); None takes the hub's (or the offline extra's) weights.
        device: where the model goes; ``auto`` takes a GPU where there is one.
        dtype: precision of its parameters.

    Raises:
        OptionError: if the device is not there, or the precision is of no floating-point numbers.
        BackboneError: if the name is unknown, the model unsupported, or no weights can be had.
        WeightsError: if the file is unreadable, or lacks a tensor, or has one too many.

    Example:
        >>> backbone = lostreg.load_backbone("dinov2_vits14_reg")
        >>> backbone.spec.patch_size, backbone.prefix_names
        (14, ['CLS', 'register 1', 'register 2', 'register 3', 'register 4'])
    """
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise OptionError(f"dtype must be a floating-point one of PyTorch, not {shown(dtype)}")
    device, spec = resolve_device(device), find_spec(name)
    if weights is not None:
        with _Unfilled():  # type: ignore[no-untyped-call]
            backbone = build_backbone(spec)
        added = checkpoints.added_registers(Path(weights))
        if added:
            backbone = with_new_registers(backbone, added)
        source = checkpoints.load_file_into(backbone.model, Path(weights))
    elif spec.offline:
        with _Unfilled():  # type: ignore[no-untyped-call]
            backbone = build_backbone(spec)
        source = checkpoints.load_offline_into(backbone.model)
    else:
        with checkpoints.hub_weights(spec.timm_name) as source, _Unfilled():  # type: ignore[no-untyped-call]
            backbone = build_backbone(spec, pretrained=True)
    _LOG.debug("%s: %d blocks, weights: %s", name, backbone.depth, source)
    backbone.model.to(dtype).to(device)  # a device never holds what is only to be rounded
    return replace(backbone, weights=source)


class _Unfilled(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it a model is built without random weights: all are loaded, and PyTorch's generator belongs to the user.

    What is drawn into a tensor leaves it as it is, in this thread alone.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _DRAWN:
            return args[0]
        return (torch.ops.aten.zeros.default if func is _RAND else func)(*args, **(kwargs or {}))


def with_new_registers(backbone: Backbone, count: int) -> Backbone:
    """A copy of a backbone with more register tokens, all zeros, behind those that it has.

    They have no position of their own, as in the DINOv2 releases with registers: what the position embedding had for
    CLS and earlier registers is added to these tokens, which changes nothing that the model computes of them.

    Args:
        backbone: whose weights are copied.
        count: of new registers, at least 1.

    Raises:
        BackboneError: if the model has a distillation token: timm has no such model with registers.
    """
    model: Any = copy.deepcopy(backbone.model)
    if getattr(model, "dist_token", None) is not None:
        raise BackboneError(
            f"{backbone.spec.name} has a distillation token beside CLS: registers cannot be added to it"
        )
    own = backbone.own_prefix_tokens
    if model.pos_embed is not None and not model.no_embed_class and own:
        position = model.pos_embed.data
        ends = [int(model.cls_token is not None), own]
        for token, part in zip(
            (model.cls_token, model.reg_token), position[:, :own].tensor_split(ends[:1], 1), strict=True
        ):
            if token is not None:
                token.data += part
        model.pos_embed = nn.Parameter(position[:, own:].clone(), requires_grad=False)
    model.no_embed_class = True
    blank = torch.zeros(1, count, model.embed_dim, device=backbone.device, dtype=backbone.dtype)
    trained = [] if model.reg_token is None else [model.reg_token.data]
    model.reg_token = nn.Parameter(torch.cat([*trained, blank], dim=1), requires_grad=False)
    for module in model.modules():  # rotary attention counts them too
        if hasattr(module, "num_prefix_tokens"):
            module.num_prefix_tokens += count
    if hasattr(model, "num_reg_tokens"):
        model.num_reg_tokens += count
    return replace(backbone, spec=replace(backbone.spec, registers=backbone.spec.registers + count), model=model)


def place_model(model: nn.Module, device: torch.device | str, dtype: torch.dtype) -> None:
    """Move a model to a device and into a precision, but for what reads and scales the sum of tokens over all blocks.

    That sum is kept in float32 by `BlockRunner`, so norms and layer scales are float32 too: rounding the sum before it
    is read, or what is added to it, would change more boxes. In half precision timm's own forward, which rounds the
    sum, does not run on such a model.

    Args:
        model: changed in place, tensor by tensor: no second copy of it is ever there.
        device: where it goes.
        dtype: precision of all its other floating-point tensors.
    """
    for tensor, wanted in _precisions(model, dtype):
        tensor.data = _placed(tensor.data, device, wanted)


def placed_copy(model: nn.Module, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """What `place_model` would make of a model, as a copy; the model itself stays as it is.

    Its tensors are copied one by one, so neither device holds another copy in the old precision.
    """
    copies: dict[int, Tensor] = {}
    for tensor, wanted in _precisions(model, dtype):
        held = tensor.detach()
        placed = _placed(held, device, wanted)
        placed = placed.clone() if placed is held else placed
        copies[id(tensor)] = nn.Parameter(placed, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else placed
    return copy.deepcopy(model, copies)  # all but the tensors


def _precisions(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[Tensor, torch.dtype]]:
    """A model's tensors, and the precision that `place_model` brings each into."""
    names = ("norm1", "norm2", "ls1", "ls2", "gamma_1", "gamma_2")
    parts = [getattr(block, name, None) for block in model.blocks for name in names]  # type: ignore[union-attr]
    full = set()
    for part in (model.norm, model.norm_pre, *parts):
        full |= {id(tensor) for tensor in (part.parameters() if isinstance(part, nn.Module) else [part])}
    for tensor in (*model.parameters(), *model.buffers()):
        rounded = torch.float32 if id(tensor) in full else dtype
        yield tensor, rounded if tensor.is_floating_point() else tensor.dtype


def _placed(tensor: Tensor, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """Rounded on the host, if one of the two is there: a device never holds what is only to be rounded."""
    return tensor.to(dtype).to(device) if tensor.device.type == "cpu" else tensor.to(device).to(dtype)
