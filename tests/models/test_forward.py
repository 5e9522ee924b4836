"""The forward block by block, with test-time registers and without, against timm's own blocks: `reference_forward`."""

import copy
import dataclasses
import itertools
import pickle
import shutil
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from dispatch import needs_simulated_pinning
from random_models import DEPTH, GRIDS, NARROW, OTHERS, PLAIN, SOME, assert_close, built, images_for, patches, picture
from reference_forward import Reference, reference
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lostreg.images.decode import Picture
from lostreg.images.patches import PatchedPicture, cut_patches
from lostreg.models import blocks
from lostreg.models.backbone import Backbone, build_backbone, find_spec, place_model, placed_copy
from lostreg.models.features import FeatureExtractor, collect_features
from lostreg.models.forward import Forward, Grid, Walk
from lostreg.models.pixels import normalised, transfer
from lostreg.models.registers import RegisterNeurons
from lostreg.models.table import BACKBONES, FEATURES

pytestmark = pytest.mark.usefixtures("one_thread")

# One of each way through attention, positions and MLPs.
NAMES = (
    "dino_vits16",
    "dinov2_vits14_reg",
    "dinov2_vitg14",
    "dinov3_vits16",
    "openclip_vitb16",
    "sbb_vitm16_reg",
    "RoPE, no CLS",
    "RMS norm, SwiGLU",
    "sub-norms",
    "EVA-02, fused",
    *SOME,
)
PACK = [*GRIDS[:4], (1, 1), (2, 4), (4, 2), (3, 5)]


def neurons_of(backbone: Backbone, per_layer: int = 2, seed: int = 0) -> tuple[tuple[int, int], ...]:
    """Some hidden units of every layer."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        (layer, unit)
        for layer in range(backbone.depth)
        for unit in torch.randperm(backbone.hidden_units(layer), generator=generator)[:per_layer].tolist()
    )


def with_tokens(backbone: Backbone, count: int, neurons: Sequence[tuple[int, int]] | None = None) -> Backbone:
    return backbone.with_registers(RegisterNeurons(tuple(neurons or neurons_of(backbone)), count))


def small(name: str) -> Backbone:
    table_name, options = OTHERS.get(name, (name, NARROW))
    return built(table_name, **options)


@pytest.fixture(scope="module", params=NAMES)
def plain(request: pytest.FixtureRequest) -> Backbone:
    return small(request.param)


@pytest.fixture(scope="module", params=[0, 2], ids=["none added", "2 added"])
def backbone(plain: Backbone, request: pytest.FixtureRequest) -> Backbone:
    return with_tokens(plain, request.param) if request.param else plain


@pytest.fixture(scope="module", params=["dinov2_vits14_reg", "dinov2_vitg14", "dinov3_vits16"])
def cured(request: pytest.FixtureRequest) -> Backbone:
    return with_tokens(small(request.param), 2)


def start(backbone: Backbone, grids: Sequence[Grid], numbers: Sequence[int] | None = None) -> tuple[Forward, Walk]:
    numbers = range(len(grids)) if numbers is None else numbers
    pictures = [picture(backbone, grid, number) for grid, number in zip(grids, numbers, strict=True)]
    forward = Forward(backbone)
    return forward, forward.start([patches(image, backbone.spec.patch_size) for image in pictures], grids)


def references(backbone: Backbone, grids: Sequence[Grid], monkeypatch: pytest.MonkeyPatch) -> list[Reference]:
    return [reference(backbone, picture(backbone, grid, number), monkeypatch) for number, grid in enumerate(grids)]


def test_every_step_of_a_pack_is_that_of_timms_own_blocks(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens, queries, keys, values, attention and what is shown to a watcher, of every layer."""
    expected = references(backbone, PACK, monkeypatch)
    forward, walk = start(backbone, PACK)
    assert walk.prefix == backbone.prefix_tokens
    spans = list(walk.packing.spans)
    assert [span.stop - span.start for span in spans] == [walk.prefix + rows * columns for rows, columns in PACK]
    for layer in range(DEPTH):
        assert walk.layer == layer
        for feature in ("q", "k", "v"):
            projected = forward.project(walk, feature)  # type: ignore[arg-type]
            for span, one in zip(spans, expected, strict=True):
                assert_close(projected[span], one.features[feature, layer], f"{feature} of layer {layer}")
        before = walk.tokens.clone()
        rows = min(3, walk.prefix + 1)
        for attention, one in zip(forward.attention(walk, rows), expected, strict=True):
            assert attention.dtype == torch.float32
            assert (attention.sum(dim=-1) - 1).abs().max() < 1e-5
            assert_close(attention.double(), one.attention[layer][:, :rows].transpose(0, 1), f"layer {layer}", 2e-5)
        assert torch.equal(walk.tokens, before)
        seen: list[tuple[slice, Tensor]] = []
        forward.advance(walk, lambda part, hidden, seen=seen: seen.append((part, hidden.clone())))
        assert torch.equal(torch.cat([torch.arange(len(before))[part] for part, _ in seen]), torch.arange(len(before)))
        hidden = torch.cat([shown for _, shown in seen])
        for span, one in zip(spans, expected, strict=True):
            assert_close(hidden[span], one.hidden[layer], f"hidden units of layer {layer}", 2e-5)
            assert_close(walk.tokens[span], one.layers[layer], f"tokens after layer {layer}")
    for span, one in zip(spans, expected, strict=True):
        assert_close(forward.output(walk)[span], one.final, "output")


@pytest.mark.parametrize("name", [name for name in OTHERS if name not in NAMES])
def test_attention_and_added_tokens_in_every_other_architecture(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = with_tokens(small(name), 2)
    grids = [(3, 5), (1, 2), (5, 3)]
    expected = references(backbone, grids, monkeypatch)
    forward, walk = start(backbone, grids)
    for layer in range(DEPTH):
        for attention, one in zip(forward.attention(walk, backbone.prefix_tokens), expected, strict=True):
            rows = one.attention[layer][:, : backbone.prefix_tokens].transpose(0, 1)
            assert_close(attention.double(), rows, f"attention of layer {layer}", 2e-5)
        forward.advance(walk)
        for span, one in zip(walk.packing.spans, expected, strict=True):
            assert_close(walk.tokens[span], one.layers[layer], f"tokens after layer {layer}")


def test_features_of_a_pack_are_those_of_timms_own_blocks(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [(feature, layer) for feature in FEATURES for layer in range(DEPTH)]
    pictures = [picture(backbone, grid, number) for number, grid in enumerate(PACK)]
    pixels = [patches(image, backbone.spec.patch_size) for image in pictures]
    expected = references(backbone, PACK, monkeypatch)
    prefix = backbone.prefix_tokens
    for (feature, layer), actual in zip(wanted, FeatureExtractor(backbone, wanted)(pixels, PACK), strict=True):
        if feature == "out":
            tensors = [one.final if layer == DEPTH - 1 else one.layers[layer] for one in expected]
        else:
            tensors = [one.features[feature, layer] for one in expected]
        assert_close(actual, torch.cat([tensor[prefix:] for tensor in tensors]), f"{feature} of layer {layer}")


def test_the_moved_activation_is_each_images_own_largest(cured: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Per image and per neuron, with its sign: seen by what the second projection gets."""
    assert cured.registers is not None
    expected = references(cured, PACK, monkeypatch)
    given: list[Tensor] = []
    fc2s = [block.mlp.fc2 for block in cured.model.blocks]  # type: ignore[union-attr]
    handles = [fc2.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0].clone())) for fc2 in fc2s]
    forward, walk = start(cured, PACK)
    own, count = cured.own_prefix_tokens, cured.registers.count
    signs = set()
    for layer in range(DEPTH):
        units = cured.registers.by_layer()[layer]
        given.clear()
        forward.advance(walk)
        everywhere, added = given  # all tokens, then the added ones again
        assert not everywhere[:, units].any()
        rows = added[:, units].view(len(PACK), count, len(units))
        for image, one in enumerate(expected):
            largest = torch.tensor([one.moved[layer, unit] for unit in units])
            for row in rows[image]:
                assert_close(row, largest, f"image {image}, layer {layer}", 1e-4)
            others = torch.cat([one.hidden[layer][:own], one.hidden[layer][own + count :]])[:, units]
            assert_close(largest.abs(), others.abs().amax(dim=0))
            signs |= set(largest.sign().tolist())
    for handle in handles:
        handle.remove()
    largest_of_images = [[one.moved[neuron] for one in expected] for neuron in cured.registers.neurons]
    assert all(len(set(values)) == len(PACK) for values in largest_of_images)  # no image has another one's
    if cured.spec.name == "dinov2_vitg14":
        assert signs == {-1.0, 1.0}  # gated units have large negative activations, and these count as well


def test_what_added_tokens_hold_themselves_does_not_count() -> None:
    """A unit that is driven most of all by the blank token itself: what it holds is replaced, not moved."""
    plain = built(PLAIN, depth=1)
    (block,) = plain.model.blocks  # type: ignore[misc]
    block.attn.proj.weight[:] = 0
    block.attn.proj.bias[:] = 0
    block.norm2.bias[:] = 0
    block.mlp.fc1.weight[5] = 0
    block.mlp.fc1.weight[5, 0], block.mlp.fc1.bias[5] = 0.3, -0.75  # blank tokens, zeros, are at GELU's minimum
    block.norm2.weight[0] = 1
    forward, walk = start(plain.with_registers(RegisterNeurons(((0, 5),), 2)), PACK)
    shown: list[Tensor] = []
    replaced: list[Tensor] = []
    handle = block.mlp.fc2.register_forward_pre_hook(lambda module, given: replaced.append(given[0][:, 5].clone()))
    forward.advance(walk, lambda part, hidden: shown.append(hidden[:, 5].clone()))
    handle.remove()
    blank = float(torch.nn.functional.gelu(torch.tensor(-0.75)))
    found = torch.cat(shown)
    largest = []
    for span in walk.packing.spans:
        image = found[span]
        assert_close(image[1:3], torch.full((2,), blank))
        others = torch.cat([image[:1], image[3:]])
        largest += [float(others[others.abs().argmax()])] * 2
    assert max(abs(number) for number in largest) < abs(blank)
    assert_close(replaced[1], torch.tensor(largest))


def test_the_order_of_a_pack_does_not_matter_with_added_tokens(cured: Backbone) -> None:
    _, walk = run_all(cured, PACK)
    first = {number: walk.tokens[span] for number, span in enumerate(walk.packing.spans)}
    order = [4, 1, 6, 0, 7, 2, 5, 3]
    _, walk = run_all(cured, [PACK[number] for number in order], order)
    for number, span in zip(order, walk.packing.spans, strict=True):
        assert_close(walk.tokens[span], first[number], f"image {number}")


def run_all(backbone: Backbone, grids: Sequence[Grid], numbers: Sequence[int] | None = None) -> tuple[Forward, Walk]:
    forward, walk = start(backbone, grids, numbers)
    for _ in range(backbone.depth):
        forward.advance(walk)
    return forward, walk


def test_patches_keep_their_number_and_order(cured: Backbone) -> None:
    """Right after the start the patches are the very same, and added tokens are blank, behind the model's own."""
    assert cured.registers is not None
    plain = cured.with_registers(None)
    _, without = start(plain, PACK)
    _, walk = start(cured, PACK)
    assert torch.equal(walk.patches(), without.patches())
    own = plain.prefix_tokens
    assert walk.prefixes().shape == (len(PACK), own + cured.registers.count, walk.tokens.shape[1])
    assert torch.equal(walk.prefixes()[:, :own], without.prefixes())
    assert not walk.prefixes()[:, own:].any()
    images = images_for(cured, (3, 5))
    (features,) = collect_features(cured, images, [("k", 0)])
    assert features.shape[:2] == (2, 15)
    assert torch.equal(features, collect_features(plain, images, [("k", 0)])[0])  # before attention nothing is changed


def test_a_norm_before_the_blocks_leaves_blank_tokens_blank() -> None:
    plain = small("openclip_vitb16")
    assert plain.model.norm_pre.bias.abs().min() > 0  # type: ignore[union-attr]
    _, without = start(plain, PACK)
    _, walk = start(with_tokens(plain, 2), PACK)
    assert not walk.prefixes()[:, plain.prefix_tokens :].any()
    assert torch.equal(walk.patches(), without.patches())


@pytest.mark.parametrize("name", ["dinov3_vits16", "mixed RoPE", "RoPE, no CLS"])
def test_added_tokens_are_not_rotated(name: str) -> None:
    plain = small(name)
    _, without = start(plain, PACK)
    _, walk = start(with_tokens(plain, 2), PACK)
    own = plain.prefix_tokens
    for before, after in zip(without.ropes, walk.ropes, strict=True):
        assert before is not None
        assert after is not None
        half = after.shape[-1] // 2
        for short, span in zip(without.packing.spans, walk.packing.spans, strict=True):
            rope = after[..., span, :]
            still = rope[..., own : own + 2, :]
            assert not still[..., :half].any()
            assert (still[..., half:] == 1).all()
            assert torch.equal(torch.cat([rope[..., :own, :], rope[..., own + 2 :, :]], dim=-2), before[..., short, :])


def test_tokens_that_nobody_heeds_change_nothing() -> None:
    """One block in which blank tokens' keys lie far from every query, and a neuron that never fires."""
    plain = built(PLAIN, depth=1)
    model = plain.model
    (block,) = model.blocks  # type: ignore[misc]
    width = model.embed_dim
    common = torch.tensor([1.0, -1.0]).repeat(width // 2)
    model.pos_embed += 20 * common  # what all tokens share but blank ones
    block.norm1.bias[:] = 0  # blank tokens are zeros behind the norm too
    block.attn.qkv.weight[: 2 * width] = 0
    block.attn.qkv.weight[width : 2 * width] = common / width  # keys: about 1 everywhere, 0 for blank tokens
    block.attn.qkv.bias[: 2 * width] = 0
    block.mlp.fc1.weight[7] = 0
    block.mlp.fc1.bias[7] = 0  # gelu(0) = 0
    images = images_for(plain)
    with_three = plain.with_registers(RegisterNeurons(((0, 7),), 3))

    def outputs() -> list[Tensor]:
        return [collect_features(backbone, images, [("out", 0)])[0] for backbone in (plain, with_three)]

    without, heeded = outputs()
    assert (without - heeded).abs().max() > 0.005  # queries of zero: everyone heeds all alike, blank tokens too
    block.attn.qkv.bias[:width] = 100.0
    without, unheeded = outputs()
    assert_close(unheeded, without)


@pytest.mark.parametrize("name", [*BACKBONES, "distilled", "RoPE, no CLS", "plain"])
def test_tokens_in_front_of_the_patches_are_named(name: str) -> None:
    table_name, options = OTHERS.get(name, (name, {"embed_dim": 96, "num_heads": 4}))
    backbone = build_backbone(find_spec(table_name), depth=1, **options)
    model = backbone.model
    names = backbone.prefix_names
    assert len(names) == backbone.prefix_tokens == model.num_prefix_tokens
    assert names[: int(model.cls_token is not None)] == ["CLS"] * int(model.cls_token is not None)
    rest = names[int(model.cls_token is not None) :]
    assert rest == [f"register {number + 1}" for number in range(len(rest))]
    added = with_tokens(backbone, 2, [(0, 0)])
    assert added.prefix_names == [*names, "test-time register 1", "test-time register 2"]
    assert (added.prefix_tokens, added.own_prefix_tokens) == (len(names) + 2, len(names))


def test_off_means_off(cured: Backbone) -> None:
    """Nothing is changed but what the new object does."""
    plain = cured.with_registers(None)
    state = {name: tensor.clone() for name, tensor in plain.model.state_dict().items()}
    attributes = [(name, sorted(vars(module))) for name, module in plain.model.named_modules()]
    wanted = [(feature, layer) for feature in FEATURES for layer in range(DEPTH)]
    images = images_for(plain)
    before = collect_features(plain, images, wanted)
    again = dataclasses.replace(plain).with_registers(cured.registers)
    with_one = collect_features(again, images, wanted)
    assert not torch.allclose(with_one[-1], before[-1], rtol=1e-2)
    assert plain.registers is None
    assert again.model is plain.model
    assert again.with_registers(None) == plain
    for one, other in zip(before, collect_features(plain, images, wanted), strict=True):
        assert torch.equal(one, other)
    assert all(torch.equal(tensor, state[name]) for name, tensor in plain.model.state_dict().items())
    assert [(name, sorted(vars(module))) for name, module in plain.model.named_modules()] == attributes
    for module in plain.model.modules():
        assert not any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks))


def test_watching_changes_nothing(plain: Backbone) -> None:
    forward, walk = start(plain, PACK)
    watched, looked = start(plain, PACK)
    for _ in range(DEPTH):
        forward.advance(walk)
        watched.advance(looked, lambda part, hidden: None)
        assert_close(looked.tokens, walk.tokens)


@pytest.mark.parametrize("chunk", [1, 7, 20])
def test_chunks_change_nothing_that_is_moved(cured: Backbone, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """An image's largest activation may lie in another chunk than its added tokens."""
    _, whole = run_all(cured, PACK)
    monkeypatch.setattr(blocks, "_CPU_CHUNK", chunk)
    _, walk = run_all(cured, PACK)
    assert_close(walk.tokens, whole.tokens)


@pytest.mark.parametrize("placed", [False, True], ids=["all of it", "but for norms"])
def test_half_precision_is_close(cured: Backbone, placed: bool) -> None:
    half = small(cured.spec.name)
    if placed:
        place_model(half.model, "cpu", torch.bfloat16)
    else:
        half.model.to(torch.bfloat16)
    half = half.with_registers(cured.registers)
    _, single = run_all(cured, PACK)
    forward, walk = run_all(half, PACK)
    assert walk.tokens.dtype == torch.float32
    assert torch.isfinite(walk.tokens).all()
    assert (walk.tokens - single.tokens).norm() < 0.05 * single.tokens.norm()
    walk.layer = 0
    for rows in forward.attention(walk, 2):
        assert (rows.sum(dim=-1) - 1).abs().max() < 1e-5


@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="compiling needs a C++ compiler")
def test_compiled_blocks_move_the_same() -> None:
    """Slow: a real compiler, for two blocks of a tiny model, one of which has neurons."""
    torch._dynamo.reset()
    plain = built("dinov2_vits14_reg", depth=2, embed_dim=32, num_heads=2)
    backbone = with_tokens(plain, 2, [(0, 3), (0, 70)])
    wanted = [("k", 1), ("out", 1)]
    pixels = [patches(picture(backbone, grid, number), 14) for number, grid in enumerate(PACK[:4])]
    eager, compiled = (
        FeatureExtractor(backbone, wanted, compiled=flag)(pixels, PACK[:4])  # type: ignore[arg-type]
        for flag in (False, True)
    )
    for one, other in zip(eager, compiled, strict=True):
        assert_close(other, one)
    torch._dynamo.reset()


def test_copies_of_patches_and_prefixes_do_not_change_with_the_walk(plain: Backbone) -> None:
    forward, walk = start(plain, PACK)
    parts, prefixes = walk.patches(), walk.prefixes()
    kept = (parts.clone(), prefixes.clone())
    counts = np.cumsum([0, *(rows * columns for rows, columns in PACK)])
    for span, (first, last), prefix in zip(walk.packing.spans, itertools.pairwise(counts), prefixes, strict=True):
        assert torch.equal(walk.tokens[span], torch.cat([prefix, parts[first:last]]))
    forward.advance(walk)
    assert torch.equal(parts, kept[0])
    assert torch.equal(prefixes, kept[1])


SIZES = [(28, 42), (28, 41), (28, 42), (28, 42), (27, 42), (15, 29), (14, 14), (28, 28)]  # grids (2, 3), (1, 1), (2, 2)


def pictures_of(sizes: Sequence[tuple[int, int]]) -> list[PatchedPicture]:
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    return [cut_patches(Picture(one, one.shape[1], one.shape[0]), 14) for one in images]


def test_images_of_one_grid_are_normalised_together_but_on_a_cpu() -> None:
    """To the bit as each alone; padding is zero after it, though sizes within a grid differ."""
    taken = pictures_of(SIZES)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    backbone: Any = SimpleNamespace(mean=mean, std=std)
    patches = transfer(taken, torch.device("cpu"))
    assert [len(run) for run in patches] == [1] * len(SIZES)
    by_grid = [torch.cat(patches[:6]), *patches[6:]]
    together = [image for run in normalised(backbone, by_grid, SIZES) for image in run]
    apart = [image for (image,) in normalised(backbone, patches, SIZES)]
    for size, one, alone, image in zip(SIZES, taken, apart, together, strict=True):
        assert torch.equal(image, alone)
        rows, columns = one.grid
        whole = image.view(rows, columns, 14, 14, 3).transpose(1, 2).reshape(rows * 14, columns * 14, 3)
        assert not whole[size[0] :].any()
        assert not whole[:, size[1] :].any()


def test_a_run_of_images_starts_as_each_of_them_does(backbone: Backbone) -> None:
    grids = [(2, 3)] * 3 + [(3, 2)] * 2 + [(1, 1)]
    single = [patches(picture(backbone, grid, number), backbone.spec.patch_size) for number, grid in enumerate(grids)]
    forward = Forward(backbone)
    expected = forward.start(single, grids)
    walk = forward.start([torch.stack(single[:3]), torch.stack(single[3:5]), single[5]], grids)
    assert_close(walk.tokens, expected.tokens)
    assert_close(walk.patches(), expected.patches())
    with pytest.raises(ValueError, match="expected pixels of 6 images, not of 5"):
        forward.start(single[:5], grids)


def test_what_a_forward_keeps_travels_and_is_made_once(cured: Backbone) -> None:
    forward, walk = start(cured, PACK)
    weight = forward._patch_weight
    assert forward._patch_weight is weight
    pixels = [patches(picture(cured, grid, number), cured.spec.patch_size) for number, grid in enumerate(PACK)]
    for other in (copy.deepcopy(forward), pickle.loads(pickle.dumps(forward)), Forward(cured.with_registers(None))):
        assert torch.equal(other._patch_weight, weight)
        assert torch.equal(other.start(pixels, PACK).patches(), walk.patches())


def test_where_added_tokens_lie_is_written_once_a_pack(cured: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a tensor of numbers from the host waits for what is queued there."""
    forward, walk = start(cured, PACK)
    own, count = cured.own_prefix_tokens, cured.prefix_tokens - cured.own_prefix_tokens
    assert walk.added is not None
    assert walk.added.tolist() == [[span.start + own + n for n in range(count)] for span in walk.packing.spans]
    assert forward._units  # of the backbone, once

    def refuse(*_: object, **__: object) -> Tensor:
        raise AssertionError("a tensor from the host")

    monkeypatch.setattr(torch, "tensor", refuse)
    for _ in range(DEPTH):
        forward.advance(walk)
    walk.patches()
    walk.prefixes()


class Operations(TorchDispatchMode):
    """Notes the operations that a device would be given: not those that only say how to look at memory."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not (function.is_view or "prim" in str(function) or "lift_fresh" in str(function)):
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@needs_simulated_pinning
def test_a_run_of_images_costs_as_many_operations_as_one_image() -> None:
    """On a GPU, each would be queued by the host."""
    plain = built("dinov2_vits14_reg", depth=1, **NARROW)
    counts = []
    with FakeTensorMode(allow_non_fake_inputs=True):
        backbone = dataclasses.replace(plain, model=placed_copy(plain.model, "cuda", torch.bfloat16))
        forward = Forward(backbone)
        for images in (2, 2, 32):  # once more, since the first finds nothing cached
            taken = [torch.zeros(images, 2, 3, 14, 14, 3, dtype=torch.uint8, device="cuda")]
            with Operations() as operations:
                walk = forward.start(normalised(backbone, taken, [(28, 41)] * images), [(2, 3)] * images)
                walk.patches()
                walk.prefixes()
            assert walk.tokens.device.type == "cuda"
            counts.append(len(operations.names))
    assert counts[1] == counts[2] <= 16, operations.names
