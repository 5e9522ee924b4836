"""The blocks of a Vision Transformer over *packed* images: tokens of several images in one sequence, of any lengths.

Every step but attention works on each token alone, so images need not have one shape to be computed together: their
tokens lie one image after the other in one tensor (T, D), and attention is told where each image ends. Nothing is
padded and no image waits for another of its shape. Blocks are walked instead of hooked, so nothing is left on a model.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate, groupby
from typing import Any, Final, Literal, NamedTuple, cast

import torch
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from timm.layers.norm import LayerNorm
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn
from torch.nn import functional

from lostreg import kernels
from lostreg.errors import BackboneError, LostregWarning, OptionError, is_out_of_memory
from lostreg.models.table import Feature

varlen_attn: Callable[..., Any] | None
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before PyTorch 2.10
    varlen_attn = None

_HALF: Final = (torch.bfloat16, torch.float16)
# Tokens that go through an MLP at once: its hidden layer, four times as wide, then has a bounded size.
_CPU_CHUNK: Final = 1 << 12
_DEVICE_CHUNK: Final = 1 << 17

AttentionKind = Literal["fused", "tiled"]
_SHORTEST_TILED: Final = 256  # tokens of an image; with fewer the fused kernel is as quick
_TILE_SCORES: Final = 1 << 23  # scores that are held at once


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
        """0 and `ends`, as a tensor of int32 on the device, to which a GPU copies them without holding up the host."""
        ends = torch.tensor([0, *self.ends], dtype=torch.int32)
        on_host = torch.empty_like(ends, pin_memory=self.device.type == "cuda").copy_(ends)
        return on_host.to(self.device, non_blocking=True)


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
    exact = own == tokens.dtype == torch.float32
    if exact and dtype in _HALF and type(norm) in (nn.LayerNorm, LayerNorm) and kernels.usable(tokens):
        plain = cast("nn.LayerNorm", norm)
        return kernels.layer_norm(tokens, plain.weight, plain.bias, plain.eps, dtype)
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
    if type(mlp).forward not in (Mlp.forward, GluMlp.forward, SwiGLU.forward):
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
        attended = _attend_any_lengths(varlen_attn, q, k, v, packing)
        if attended is not None:
            return attended
    tiled = attention_kind(q.device, q.dtype) == "tiled"
    parts = []
    for tokens, count in packing.runs:
        first, second, third = (t[tokens].view(count, -1, *t.shape[1:]).transpose(1, 2) for t in (q, k, v))
        if tiled and first.shape[2] >= _SHORTEST_TILED:
            attended = _tiled_attention(first, second, third)
        else:
            attended = functional.scaled_dot_product_attention(first, second, third)
        parts.append(attended.transpose(1, 2).flatten(2).flatten(0, 1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend_any_lengths(kernel: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor | None:
    """`attend` in one call for all images; None where PyTorch cannot, and then it is not asked again.

    Raises:
        RuntimeError: if memory runs out.
    """
    global varlen_attn
    longest = max(packing.lengths)
    try:
        attended = kernel(q, k, v, packing.offsets, packing.offsets, longest, longest, **_flash_options(kernel))
    except (RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        varlen_attn = None
        reason = str(error).strip().partition("\n")[0]
        message = f"attention over images of several shapes at once does not work here ({reason}): going on run by run"
        warnings.warn(message, LostregWarning, stacklevel=2)
        return None
    return cast("Tensor", attended).flatten(1)


@cache
def _flash_options(kernel: Callable[..., Any]) -> dict[str, int]:
    """What keeps `varlen_attn` to flash attention, by its signature.

    PyTorch 2.14 prefers cuDNN on H100 and its kin, which plans for tens of milliseconds whenever the number of tokens
    or the longest image is new. It has no splits, so asking for one means flash attention, whose result for an image
    then does not depend on the others either. Before PyTorch 2.12 there is no such option, and no cuDNN.
    """
    return {"num_splits": 1} if "num_splits" in inspect.signature(kernel).parameters else {}


def attention_kind(device: torch.device, dtype: torch.dtype) -> AttentionKind:
    """How `attend` computes what has several hundred tokens: ``fused``, by PyTorch's kernel, or ``tiled``.

    Nothing is measured: one machine and one PyTorch always choose the same, so that results can be had again.
    """
    if device.type != "cpu" or dtype != torch.bfloat16 or not hasattr(torch.cpu, "get_capabilities"):
        return "fused"
    # The fused kernel of CPUs multiplies in bf16 by oneDNN only where it packs keys and values, which it does for AMX
    # alone. Without, it calls MKL, whose products of bf16 are no quicker than fp32's on an AMD EPYC with AVX512-BF16.
    # `torch.bmm` leaves bf16 to oneDNN, which uses these instructions.
    capabilities = torch.cpu.get_capabilities()
    return "tiled" if capabilities.get("avx512_bf16") and not capabilities.get("amx_bf16") else "fused"


def _tiled_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as two products of matrices with a softmax between them, some scores at a time.

    A softmax does not change when one number is taken from all scores of a row. Scores are rounded to half precision
    before it, and those of trained models reach hundreds, where that costs a unit: so about the row's largest score is
    taken off within the first product, in float32, and the scores that weigh most are rounded the least.

    Args:
        q: queries, shape (images, heads, N, head_dim).
        k: keys, of the same shape.
        v: values, of the same shape.

    Returns:
        Of the same shape.
    """
    length = q.shape[2]
    queries, keys = q.flatten(0, 1) * q.shape[3] ** -0.5, k.flatten(0, 1)  # (P, N, D), P = images * heads
    # m_i = max_j q_i k_j over the first keys, the prefix's among them, and every 16th of the others, some 128 at most
    sampled = torch.cat([keys[:, :16], keys[:, 16 :: max(16, length // 128)]], dim=1)
    largest = torch.bmm(sampled, queries.transpose(1, 2)).amax(dim=1)
    # q_i k_j - m_i = (q_i, -m_i) (k_j, 1)
    queries = torch.cat([queries, -largest.unsqueeze(2)], dim=2)
    keys = functional.pad(keys.transpose(1, 2), (0, 0, 0, 1), value=1.0)  # (P, D + 1, N)
    values = v.flatten(0, 1).transpose(1, 2).contiguous().transpose(1, 2)  # (P, N, D) in the layout oneDNN prefers
    attended = torch.empty_like(values, memory_format=torch.contiguous_format)
    together = max(1, _TILE_SCORES // length**2)
    rows = max(1, _TILE_SCORES // (together * length))
    for pairs in _slices(len(keys), together):
        for tile in _slices(length, rows):
            weights = torch.bmm(queries[pairs, tile], keys[pairs]).softmax(dim=2)
            attended[pairs, tile] = torch.bmm(weights, values[pairs])
    return attended.view(q.shape)


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _takes_any_lengths(q: Tensor) -> bool:
    """Whether PyTorch has one kernel for sequences of several lengths: on GPUs since Ampere, in half precision.

    Not on AMD's, whose builds have other kernels behind the same names, nor in builds without flash attention.
    """
    return (
        q.device.type == "cuda"
        and torch.version.hip is None
        and torch.backends.cuda.is_flash_attention_available()
        and q.dtype in _HALF
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
        _add_scaled(tokens, update, block.gamma_1 if isinstance(block, EvaBlock) else block.ls1)


def _mlp_inputs(block: Any, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    return tokens.to(dtype) if _is_post_norm(block) else normed(block.norm2, tokens, dtype)


def _add_update(block: Any, tokens: Tensor, update: Tensor) -> None:
    """Add what the MLP says to the tokens."""
    if _is_post_norm(block):
        tokens += normed(block.norm2, update, tokens.dtype)
    else:
        _add_scaled(tokens, update, block.gamma_2 if isinstance(block, EvaBlock) else block.ls2)


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
            hidden.index_fill_(1, move.units, 0)  # an assignment would copy the number from the host, and wait
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
    activations.index_fill_(0, added.flatten(), 0)
    largest = []
    for tokens, count in packing.runs:
        inside = activations[tokens].view(count, -1, activations.shape[1])
        largest.append(inside.gather(1, inside.abs().argmax(dim=1, keepdim=True)).squeeze(1))
    return torch.cat(largest).repeat_interleave(added.shape[1], dim=0)


def _chunks(tokens: Tensor) -> Iterator[slice]:
    chunk = _CPU_CHUNK if tokens.device.type == "cpu" else _DEVICE_CHUNK
    return _slices(len(tokens), chunk)


def _add_scaled(tokens: Tensor, update: Tensor, layer_scale: Any) -> None:
    gamma = None if isinstance(layer_scale, nn.Identity) else getattr(layer_scale, "gamma", layer_scale)
    exact = gamma is None or gamma.dtype == torch.float32
    if exact and update.dtype in _HALF and kernels.usable(tokens):
        kernels.add_scaled(tokens, update, gamma)
    else:
        tokens += update if gamma is None else gamma * update
