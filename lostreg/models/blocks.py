"""The blocks of a Vision Transformer over *packed* images: tokens of several images in one sequence, of any lengths.

Every step but attention works on each token alone, so images need not have one shape to be computed together: their
tokens lie one image after the other in one tensor (T, D), and attention is told where each image ends. Nothing is
padded and no image waits for another of its shape. Blocks are walked instead of hooked, so nothing is left on a model.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from typing import Any, Final, NamedTuple, cast

import torch
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn
from torch.nn import functional

from lostreg.errors import BackboneError, OptionError
from lostreg.models.table import Feature

varlen_attn: Callable[..., Any] | None
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before PyTorch 2.10
    varlen_attn = None

# Tokens that go through an MLP at once: its hidden layer, four times as wide, then has a bounded size.
_CPU_CHUNK: Final = 1 << 12
_DEVICE_CHUNK: Final = 1 << 17


@dataclass(frozen=True)
class Packing:
    """How the tokens of several images lie in one sequence.

    Attributes:
        lengths: tokens of each image, prefix tokens included, in the order in which they lie.
        device: where the tokens are.
    """

    lengths: tuple[int, ...]
    device: torch.device

    @cached_property
    def ends(self) -> list[int]:
        """Index after each image's last token."""
        return list(accumulate(self.lengths))

    @property
    def spans(self) -> Iterator[slice]:
        """Each image's tokens."""
        return (slice(end - length, end) for length, end in zip(self.lengths, self.ends, strict=True))

    @cached_property
    def runs(self) -> list[tuple[slice, int]]:
        """Neighbouring images of equal length, as one: their tokens, and how many images they are."""
        runs, start = [], 0
        for length, group in groupby(self.lengths):
            count = len(list(group))
            runs.append((slice(start, start + count * length), count))
            start += count * length
        return runs

    @cached_property
    def offsets(self) -> Tensor:
        """0 and `ends`, as a tensor of int32 on the device."""
        return torch.tensor([0, *self.ends], dtype=torch.int32).to(self.device, non_blocking=True)


@dataclass(frozen=True)
class Move:
    """Hidden units of one block's MLP whose activations go from an image's tokens to tokens added to it.

    Attributes:
        units: which inputs of the MLP's second projection, shape (K,), int64.
        added: places of the added tokens in the pack, the same number N for each image, shape (images, N), int64.
    """

    units: Tensor
    added: Tensor


Watch = Callable[[slice, Tensor], None]
"""Is shown some tokens of the pack and their hidden units, shape (tokens, hidden), before these are moved."""


class _Projected(NamedTuple):
    """What attention needs, (T, heads, head_dim) each, and the gate, (T, heads * head_dim), of models that have one."""

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor | None


class BlockRunner:
    """Runs single blocks on packed tokens.

    Args:
        dtype: what the model computes in. Tokens themselves are float32: the sum over all blocks is then not rounded
            to half precision after each of them.
        compiled: whether what surrounds attention is compiled (`torch.compile`), with the number of tokens as a
            variable: once for all blocks that are alike and all shapes of images.
    """

    def __init__(self, dtype: torch.dtype, *, compiled: bool = False) -> None:
        self._dtype = dtype
        self._before: Callable[..., _Projected] = _before_attention
        self._after: Callable[..., None] = _after_attention
        if compiled:
            self._before = torch.compile(_before_attention, dynamic=True)
            self._after = torch.compile(_after_attention, dynamic=True)

    def __call__(
        self,
        block: nn.Module,
        tokens: Tensor,
        packing: Packing,
        rope: Tensor | None,
        *,
        move: Move | None = None,
        watch: Watch | None = None,
    ) -> None:
        """Run one block in place.

        Args:
            block: of a supported model.
            tokens: shape (T, D), float32; overwritten with the block's output.
            packing: where each image's tokens lie.
            rope: rotary embeddings of all tokens, shape (T, R) or (heads, T, R), or None; see `pack_ropes`.
            move: hidden units to be moved to added tokens.
            watch: is shown the hidden units.
        """
        projected = self._before(block, tokens, rope, self._dtype)
        attended = attend(projected.q, projected.k, projected.v, packing)
        looks_inside = move is not None or watch is not None
        after = _add_attention if looks_inside else self._after
        for part in _chunks(tokens):
            gate = None if projected.gate is None else projected.gate[part]
            # Detached, which changes nothing here: compiled code would be made anew for each kind of view.
            after(block, tokens[part].detach(), attended[part].detach(), gate)
        if looks_inside:
            _add_mlp(block, tokens, packing, self._dtype, move, watch)


def check_compiler(device: torch.device) -> None:
    """Make sure that `torch.compile` works on a device: on a CPU it needs a C++ compiler.

    Raises:
        OptionError: if it does not.
    """
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=device))
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise OptionError(f"torch.compile does not work here, leave --compile out: {reason}") from error


def normed(norm: nn.Module, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """A norm in the precision of its own parameters, rounded to ``dtype`` afterwards and not before."""
    weight = getattr(norm, "weight", None)  # not `next(norm.parameters(), tokens)`: PyTorch 2.6 cannot compile that
    own = (tokens if weight is None else weight).dtype
    return cast("Tensor", norm(tokens.to(own))).to(dtype)


def project(block: Any, tokens: Tensor, feature: Feature, dtype: torch.dtype) -> Tensor:
    """The block's queries, keys or values: one slice of the projection, and nothing else of the block.

    Args:
        block: of a supported model.
        tokens: shape (T, D), float32.
        feature: ``q``, ``k`` or ``v``.
        dtype: what the model computes in.

    Returns:
        Shape (T, heads * head_dim), of that dtype.
    """
    attention = block.attn
    inputs = _attention_inputs(block, tokens, dtype)
    if attention.qkv is None:
        projected = getattr(attention, f"{feature}_proj")(inputs)
    else:
        index = "qkv".index(feature)
        bias = _fused_bias(attention)
        projected = functional.linear(
            inputs, attention.qkv.weight.chunk(3)[index], None if bias is None else bias.chunk(3)[index]
        )
    if feature == "v":
        return cast("Tensor", projected)
    norm = attention.q_norm if feature == "q" else attention.k_norm
    return cast("Tensor", norm(projected.unflatten(-1, (-1, attention.head_dim))).flatten(-2))


def pack_ropes(ropes: Sequence[Tensor], prefix: int) -> Tensor:
    """Rotary embeddings of all tokens of a pack, where prefix tokens are turned by nothing.

    Args:
        ropes: of each image's patches, sines and cosines side by side, shape (N, R) or (heads, N, R).
        prefix: tokens in front of each image's patches.

    Returns:
        Shape (T, R) or (heads, T, R).
    """
    still = torch.zeros_like(ropes[0][..., :1, :]).expand(*ropes[0].shape[:-2], prefix, -1).clone()
    still[..., still.shape[-1] // 2 :] = 1  # sine 0, cosine 1
    return torch.cat([part for rope in ropes for part in (still, rope)], dim=-2)


def attention_rows(
    block: nn.Module, tokens: Tensor, packing: Packing, rope: Tensor | None, rows: int, dtype: torch.dtype
) -> list[Tensor]:
    """What the first tokens of each image attend to: softmax(q k / sqrt(head_dim)), written out.

    Args:
        block: of a supported model.
        tokens: that enter it, shape (T, D), float32.
        packing: where each image's tokens lie.
        rope: as for `BlockRunner`.
        rows: of how many tokens at the start of each image.
        dtype: what the model computes in.

    Returns:
        For each image, shape (rows, heads, tokens of the image), float32; each row sums to 1.
    """
    projected = _before_attention(block, tokens, rope, dtype)
    q, k = projected.q, projected.k.repeat_interleave(projected.q.shape[1] // projected.k.shape[1], dim=1)
    scale = q.shape[-1] ** -0.5
    return [
        (torch.einsum("phd,nhd->phn", q[span][:rows].float(), k[span].float()) * scale).softmax(dim=-1)
        for span in packing.spans
    ]


def check_mlp(mlp: nn.Module) -> None:
    """Make sure that an MLP is of a kind whose hidden units `hidden_units` can read.

    Raises:
        BackboneError: if it is not.
    """
    if not isinstance(mlp, Mlp | GluMlp | SwiGLU):
        raise BackboneError(f"cannot read the hidden units of a {type(mlp).__name__}: expected Mlp, GluMlp or SwiGLU")


def hidden_units(mlp: nn.Module, inputs: Tensor) -> Tensor:
    """What an MLP's second projection reads: the hidden layer after its non-linearity, gate and norm.

    Args:
        mlp: timm's `Mlp`, `GluMlp` or `SwiGLU`.
        inputs: shape (T, D).

    Returns:
        Shape (T, hidden), new memory.

    Raises:
        BackboneError: if it is of another kind.
    """
    check_mlp(mlp)
    if isinstance(mlp, SwiGLU):
        hidden = mlp.act(mlp.fc1_g(inputs)) * mlp.fc1_x(inputs)
    elif isinstance(mlp, GluMlp):
        first, second = mlp.fc1(inputs).chunk(2, dim=-1)
        hidden = first * mlp.act(second) if mlp.gate_last else mlp.act(first) * second
    else:
        hidden = cast("Mlp", mlp).act(cast("Mlp", mlp).fc1(inputs))
    return cast("Tensor", cast("nn.Module", mlp.norm)(hidden))


def attend(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """Attention of each image's tokens to those of the same image.

    Args:
        q: queries, shape (T, heads, head_dim).
        k: keys, shape (T, heads or a divisor of them, head_dim).
        v: values, of the shape of ``k``.
        packing: where each image's tokens lie.

    Returns:
        Shape (T, heads * head_dim).
    """
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    if len(packing.runs) > 1 and varlen_attn is not None and _takes_any_lengths(q):
        longest = max(packing.lengths)
        return cast("Tensor", varlen_attn(q, k, v, packing.offsets, packing.offsets, longest, longest)).flatten(1)
    parts = []
    for tokens, count in packing.runs:
        first, second, third = (t[tokens].view(count, -1, *t.shape[1:]).transpose(1, 2) for t in (q, k, v))
        attended = functional.scaled_dot_product_attention(first, second, third)
        parts.append(attended.transpose(1, 2).flatten(2).flatten(0, 1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _takes_any_lengths(q: Tensor) -> bool:
    """Whether PyTorch has one kernel for sequences of several lengths: on GPUs since Ampere, in half precision."""
    return (
        q.device.type == "cuda"
        and q.dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 256
    )


def _is_post_norm(block: nn.Module) -> bool:
    return isinstance(block, (ResPostBlock, EvaBlockPostNorm))  # not `|`: PyTorch 2.6 cannot compile that


def _attention_inputs(block: Any, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    return tokens.to(dtype) if _is_post_norm(block) else normed(block.norm1, tokens, dtype)


def _fused_bias(attention: Any) -> Tensor | None:
    if isinstance(attention, EvaAttention) and attention.q_bias is not None:
        return torch.cat([attention.q_bias, cast("Tensor", attention.k_bias), cast("Tensor", attention.v_bias)])
    return cast("Tensor | None", attention.qkv.bias)


def _before_attention(block: Any, tokens: Tensor, rope: Tensor | None, dtype: torch.dtype) -> _Projected:
    attention = block.attn
    inputs = _attention_inputs(block, tokens, dtype)
    if attention.qkv is None:
        projected = [getattr(attention, f"{feature}_proj")(inputs) for feature in "qkv"]
    else:
        projected = list(functional.linear(inputs, attention.qkv.weight, _fused_bias(attention)).chunk(3, dim=-1))
    q, k, v = (tensor.unflatten(-1, (-1, attention.head_dim)) for tensor in projected)
    q, k = attention.q_norm(q), attention.k_norm(k)
    if rope is not None:
        q, k = (_rotate(tensor, rope, attention).type_as(v) for tensor in (q, k))
    gate = None if attention.gate is None else attention.gate(inputs).sigmoid()
    return _Projected(q, k, v, gate)


def _rotate(heads: Tensor, rope: Tensor, attention: Any) -> Tensor:
    half = getattr(attention, "rotate_half", False)
    return apply_rot_embed_cat(heads.transpose(0, 1), rope, half=half).transpose(0, 1)


def _after_attention(block: Any, tokens: Tensor, attended: Tensor, gate: Tensor | None) -> None:
    _add_attention(block, tokens, attended, gate)
    _add_update(block, tokens, block.mlp(_mlp_inputs(block, tokens, attended.dtype)))


def _add_attention(block: Any, tokens: Tensor, attended: Tensor, gate: Tensor | None) -> None:
    attention = block.attn
    attended = attention.norm(attended)
    update = attention.proj(attended if gate is None else attended * gate)
    if _is_post_norm(block):
        tokens += normed(block.norm1, update, tokens.dtype)
    else:
        tokens += _scale(block.gamma_1 if isinstance(block, EvaBlock) else block.ls1, update)


def _mlp_inputs(block: Any, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    return tokens.to(dtype) if _is_post_norm(block) else normed(block.norm2, tokens, dtype)


def _add_update(block: Any, tokens: Tensor, update: Tensor) -> None:
    """Add what the MLP says to the tokens."""
    if _is_post_norm(block):
        tokens += normed(block.norm2, update, tokens.dtype)
    else:
        tokens += _scale(block.gamma_2 if isinstance(block, EvaBlock) else block.ls2, update)


def _add_mlp(
    block: Any, tokens: Tensor, packing: Packing, dtype: torch.dtype, move: Move | None, watch: Watch | None
) -> None:
    """The block's MLP with its hidden layer laid open: shown to ``watch``, changed by ``move``."""
    before = None if move is None else tokens[move.added.flatten()]
    activations: list[Tensor] = []
    for part in _chunks(tokens):
        hidden = hidden_units(block.mlp, _mlp_inputs(block, tokens[part], dtype))
        if watch is not None:
            watch(part, hidden)
        if move is not None:
            activations.append(hidden[:, move.units])
            hidden[:, move.units] = 0
        _add_update(block, tokens[part], block.mlp.fc2(hidden))
    if move is None or before is None:
        return
    # The added tokens once more, now that the largest activations of their images are known.
    hidden = hidden_units(block.mlp, _mlp_inputs(block, before, dtype))
    hidden[:, move.units] = _largest(torch.cat(activations), packing, move.added)
    _add_update(block, before, block.mlp.fc2(hidden))
    tokens[move.added.flatten()] = before


def _largest(activations: Tensor, packing: Packing, added: Tensor) -> Tensor:
    """Each image's activation of the largest magnitude of each unit, (T, K) to (images * N, K), a row an added token.

    Added tokens do not count: what they hold is replaced.
    """
    activations[added.flatten()] = 0
    largest = []
    for span in packing.spans:
        inside = activations[span]
        largest.append(inside.gather(0, inside.abs().argmax(dim=0, keepdim=True)))
    return torch.cat(largest).repeat_interleave(added.shape[1], dim=0)


def _chunks(tokens: Tensor) -> Iterator[slice]:
    chunk = _CPU_CHUNK if tokens.device.type == "cpu" else _DEVICE_CHUNK
    return (slice(start, min(start + chunk, len(tokens))) for start in range(0, len(tokens), chunk))


def _scale(layer_scale: Tensor | nn.Module | None, update: Tensor) -> Tensor:
    if layer_scale is None:
        return update
    return layer_scale * update if isinstance(layer_scale, Tensor) else cast("Tensor", layer_scale(update))
