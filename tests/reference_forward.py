"""The oracle of `lostreg.models.forward`: timm's own blocks, an image at a time, test-time registers put in by hand.

Tokens are appended to what timm embeds, timm's blocks run as they are, and a hook on the input of each MLP's second
projection moves activations. Queries, keys and values are what timm hands its attention kernel.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from random_models import joined, model_for_grid
from torch import Tensor, nn

from lostreg.models.backbone import Backbone

Grid = tuple[int, int]


@dataclass
class Reference:
    """What one image's tokens are on the way.

    Attributes:
        layers: as they leave each block, (T, D).
        final: after the final norm, (T, D).
        hidden: what each MLP's second projection reads, before activations are moved, (T, hidden).
        moved: the activation that each neuron gives to the added tokens.
        features: of each q, k, v and layer, (T, heads * head_dim), before rotary embedding.
        attention: of each layer, (heads, T, T).
    """

    layers: list[Tensor] = field(default_factory=list)
    final: Tensor = field(default_factory=lambda: torch.empty(0))
    hidden: list[Tensor] = field(default_factory=list)
    moved: dict[tuple[int, int], float] = field(default_factory=dict)
    features: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    attention: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def reference(backbone: Backbone, image: Tensor, monkeypatch: pytest.MonkeyPatch) -> Reference:
    """One image, normalised, (1, 3, H, W), through a copy of the model."""
    patch = backbone.spec.patch_size
    grid = (image.shape[2] // patch, image.shape[3] // patch)
    model: Any = copy.deepcopy(model_for_grid(backbone, grid))
    own = model.num_prefix_tokens
    added = list(range(own, own + (backbone.registers.count if backbone.registers else 0)))
    found = Reference()
    tokens = model._pos_embed(model.patch_embed(image))
    tokens, rope = tokens if isinstance(tokens, tuple) else (tokens, None)
    tokens = model.norm_pre(tokens)
    blank = torch.zeros(1, len(added), tokens.shape[2])
    tokens = torch.cat([tokens[:, :own], blank, tokens[:, own:]], dim=1)
    with monkeypatch.context() as patched:
        patched.setattr(nn.functional, "scaled_dot_product_attention", _spy(found))
        for layer, block in enumerate(model.blocks):
            if hasattr(block.attn, "num_prefix_tokens"):  # it is these that timm does not rotate
                block.attn.num_prefix_tokens += len(added)
            _hook(block, layer, found, backbone, added)
            options = {} if rope is None else {"rope": rope[layer] if model.rope_mixed else rope}
            tokens = block(tokens, **options)
            found.layers.append(tokens[0])
    found.final = model.norm(tokens)[0]
    return found


def _spy(found: Reference) -> Any:
    kernel = nn.functional.scaled_dot_product_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        scores = q[0].double() @ k[0].double().transpose(1, 2) / q.shape[-1] ** 0.5
        layer = len(found.attention)
        found.attention.append(scores.softmax(dim=-1))
        groups = v.shape[1] // (found.features["k", layer].shape[1] // v.shape[3])
        found.features["v", layer] = joined(v[:, ::groups])[0]
        return kernel(q, k, v, **options)

    return attend


def _hook(block: Any, layer: int, found: Reference, backbone: Backbone, added: list[int]) -> None:
    """On a copy of the model, so that nothing has to be taken off again."""

    def keep(feature: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            heads = output if output.ndim == 4 else output.unflatten(-1, (-1, block.attn.head_dim)).transpose(1, 2)
            found.features[feature, layer] = joined(heads)[0]

        return hook

    def move(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        hidden = inputs[0].clone()
        found.hidden.append(inputs[0][0].clone())
        others = [place for place in range(hidden.shape[1]) if place not in added]
        rows = hidden[0].tolist() if backbone.registers else []
        for at, unit in backbone.registers.neurons if backbone.registers else ():
            if at == layer:
                activations = [rows[place][unit] for place in others]
                largest = max(activations, key=abs)
                hidden[0, :, unit] = 0
                hidden[0, added, unit] = largest
                found.moved[layer, unit] = largest
        return (hidden,)

    block.attn.q_norm.register_forward_hook(keep("q"))
    block.attn.k_norm.register_forward_hook(keep("k"))
    block.mlp.fc2.register_forward_pre_hook(move)
