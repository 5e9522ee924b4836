"""Images of any shapes in one sequence of tokens: each as if it were alone."""

import inspect
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from dispatch import needs_simulated_pinning
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_models import DEPTH, GRIDS, LAYERS, NARROW, OTHERS, SOME, assert_close, built, patches, picture
from timm.layers.mlp import GatedMlp
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lostreg.errors import BackboneError, LostregWarning
from lostreg.methods.lost import lost_boxes
from lostreg.models import blocks
from lostreg.models.backbone import Backbone
from lostreg.models.blocks import Packing, attend, hidden_units
from lostreg.models.features import FeatureExtractor, collect_features
from lostreg.models.table import BACKBONES, FEATURES

Grid = tuple[int, int]
WANTED = [(feature, layer) for feature in FEATURES for layer in LAYERS]
CPU = torch.device("cpu")


@pytest.fixture(
    scope="module", params=["dino_vits16", "dinov2_vits14_reg", "dinov3_vits16", *SOME, "RoPE, no CLS", "plain"]
)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    name, options = OTHERS.get(request.param, (request.param, NARROW))
    return built(name, **options)


def run(extractor: FeatureExtractor, grids: Sequence[Grid], numbers: Sequence[int] | None = None) -> list[list[Tensor]]:
    """The features of pictures of these grids, of each pair the images' own: number n is the n-th picture."""
    backbone = extractor.backbone
    numbers = range(len(grids)) if numbers is None else numbers
    pictures = [picture(backbone, grid, number) for grid, number in zip(grids, numbers, strict=True)]
    packed = extractor([patches(image, backbone.spec.patch_size) for image in pictures], grids)
    return [list(torch.split(tensor, [rows * columns for rows, columns in grids])) for tensor in packed]


def test_each_image_of_a_pack_has_the_features_it_has_alone(backbone: Backbone) -> None:
    extractor = FeatureExtractor(backbone, WANTED)
    together = run(extractor, GRIDS)
    for index, grid in enumerate(GRIDS):
        alone = collect_features(backbone, picture(backbone, grid, index), WANTED)
        for pair, packed, (expected,) in zip(WANTED, together, alone, strict=True):
            assert packed[index].dtype == torch.float32
            assert_close(packed[index], expected, f"{pair} of image {index}")


def test_the_order_of_a_pack_does_not_matter(backbone: Backbone) -> None:
    extractor = FeatureExtractor(backbone, [("k", DEPTH - 1), ("out", -1)])
    order = [4, 1, 6, 0, 2, 5, 3]
    plain = run(extractor, GRIDS)
    moved = run(extractor, [GRIDS[index] for index in order], order)
    for first, second in zip(plain, moved, strict=True):
        for place, index in enumerate(order):
            assert_close(second[place], first[index], f"image {index}")


def test_a_run_leaves_nothing_behind_that_changes_the_next(backbone: Backbone) -> None:
    extractor = FeatureExtractor(backbone, [("k", DEPTH - 1), ("out", -1)])
    first = run(extractor, GRIDS)
    frames = {grid: (frame.tokens.clone(), frame.ropes) for grid, frame in extractor._forward._frames.items()}
    assert set(frames) == set(GRIDS)
    ropes = [[None if rope is None else rope.clone() for rope in each] for _, each in frames.values()]
    run(extractor, [*GRIDS[::-1], (4, 4)])
    for (grid, (tokens, each)), before in zip(frames.items(), ropes, strict=True):
        assert torch.equal(extractor._forward._frames[grid].tokens, tokens)
        assert all(rope is None or torch.equal(rope, old) for rope, old in zip(each, before, strict=True))
    for before, after in zip(first, run(extractor, GRIDS), strict=True):
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_what_is_kept_of_grids_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    extractor = FeatureExtractor(built("dinov3_vits16", **NARROW), [("out", 0)])
    expected = run(extractor, GRIDS)
    monkeypatch.setattr("lostreg.models.forward._CACHED_TOKENS", 30)
    bounded = FeatureExtractor(extractor.backbone, [("out", 0)])
    assert all(torch.equal(one, other) for one, other in zip(run(bounded, GRIDS)[0], expected[0], strict=True))
    assert list(bounded._forward._frames) == [(1, 1), (2, 2), (1, 7)]  # 6 + 9 + 12 tokens, the last ones that were used
    run(bounded, [(2, 2), (5, 3)])
    assert list(bounded._forward._frames) == [(2, 2), (5, 3)]  # 9 + 20 tokens


lengths_of_packs = st.lists(st.integers(1, 6), min_size=1, max_size=6)


@given(lengths_of_packs)
def test_a_packing_says_where_each_image_and_each_run_of_equal_lengths_lies(lengths: list[int]) -> None:
    packing = Packing(tuple(lengths), CPU)
    owner = [image for image, length in enumerate(lengths) for _ in range(length)]
    spans = list(packing.spans)
    assert [set(owner[span]) for span in spans] == [{image} for image in range(len(lengths))]
    assert [owner[place] for span in spans for place in range(span.start, span.stop)] == owner
    seen: list[int] = []
    for tokens, count in packing.runs:
        images = sorted(set(owner[tokens]))
        assert len(images) == count
        assert {lengths[image] for image in images} == {(tokens.stop - tokens.start) // count}
        seen += images
    assert seen == list(range(len(lengths)))
    assert all(lengths[owner[end - 1]] != lengths[owner[end]] for end in [run.start for run, _ in packing.runs[1:]])
    assert packing.offsets.dtype == torch.int32
    assert packing.offsets.tolist() == [0, *(span.stop for span in spans)]


def explicit(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """Attention by its formula, image by image and head by head, in float64; (T, heads * head_dim)."""
    groups = q.shape[1] // k.shape[1]
    images = []
    for first, second, third in zip(
        *(torch.split(tensor.double(), list(lengths)) for tensor in (q, k, v)), strict=True
    ):
        heads = []
        for head in range(q.shape[1]):
            scores = first[:, head] @ second[:, head // groups].T / q.shape[2] ** 0.5
            heads.append(scores.softmax(dim=1) @ third[:, head // groups])
        images.append(torch.cat(heads, dim=1))
    return torch.cat(images)


def random_heads(
    lengths: Sequence[int], heads: int, groups: int, seed: int = 0, width: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    counts = (heads, heads // groups, heads // groups)
    q, k, v = (torch.randn(sum(lengths), count, width, generator=generator) * 2 for count in counts)
    return q, k, v


@given(lengths_of_packs, st.sampled_from([(1, 1), (4, 1), (4, 2), (6, 3), (4, 4)]), st.integers(0, 1000))
@settings(deadline=None, max_examples=60)
def test_tokens_attend_to_those_of_the_same_image(lengths: list[int], heads: tuple[int, int], seed: int) -> None:
    q, k, v = random_heads(lengths, *heads, seed=seed)
    attended = attend(q, k, v, Packing(tuple(lengths), CPU))
    assert attended.shape == (sum(lengths), heads[0] * 8)
    assert_close(attended.double(), explicit(q, k, v, lengths))


REQUIRED = ("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k")
OPTIONS = {"PyTorch 2.10": ("is_causal", "return_aux"), "PyTorch 2.12": ("scale", "window_size", "num_splits")}


def relative_error(attended: Tensor, expected: Tensor) -> float:
    return float((attended.double() - expected).norm() / expected.norm())


@pytest.fixture
def tiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention as on a CPU with AVX512-BF16 and without AMX, for images of any length and whatever the precision."""
    monkeypatch.setattr(blocks, "attention_kind", lambda device, dtype: "tiled")
    monkeypatch.setattr(blocks, "_SHORTEST_TILED", 1)


@pytest.mark.usefixtures("tiled")
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
    st.sampled_from([(1, 1), (4, 1), (4, 2), (6, 3)]),
    st.sampled_from([1, 70, 900, 1 << 23]),
    st.integers(0, 1000),
)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_tiles_of_any_size_give_the_attention_of_the_formula(
    lengths: list[int], heads: tuple[int, int], scores: int, seed: int
) -> None:
    q, k, v = random_heads(lengths, *heads, seed=seed)
    packing = Packing(tuple(lengths), CPU)
    with mock.patch.object(blocks, "_TILE_SCORES", scores):
        attended = attend(q, k, v, packing)
        assert_close(attended.double(), explicit(q, k, v, lengths), tolerance=2e-5)
        halves = [tensor.bfloat16() for tensor in (q, k, v)]
        attended = attend(*halves, packing)
        assert torch.equal(attended, attend(*halves, packing))
    assert attended.dtype == torch.bfloat16
    assert relative_error(attended, explicit(*halves, lengths)) < 0.02


@pytest.mark.parametrize("offset", [0, 30, 300])
@pytest.mark.parametrize("width", [32, 64, 80])
def test_tiles_are_nearly_as_exact_as_the_fused_kernel_however_large_the_scores(offset: int, width: int) -> None:
    """Scores of some hundreds, as trained models have them: in bf16 they are whole numbers."""
    lengths = (300, 300)
    q, k, v = (tensor.bfloat16() for tensor in random_heads(lengths, 2, 1, width=width))
    q[..., 0], k[..., 0] = 8, offset * width**0.5 / 8  # adds about the offset to each score and changes no attention
    expected = explicit(q, k, v, lengths)
    packed = (tensor.view(2, 300, 2, width).transpose(1, 2) for tensor in (q, k, v))
    attended = blocks._tiled_attention(*packed).transpose(1, 2).flatten(2).flatten(0, 1)
    with mock.patch.object(blocks, "attention_kind", return_value="fused"):
        fused = relative_error(attend(q, k, v, Packing(lengths, CPU)), expected)
    assert relative_error(attended, expected) < max(2.5 * fused, 0.005)


def test_a_prefix_that_draws_all_attention_costs_no_exactness() -> None:
    """A register's key that is far larger than any patch's is among those that the scores are measured from."""
    lengths = (400,)
    q, k, v = (tensor.bfloat16() for tensor in random_heads(lengths, 2, 1, width=64))
    q[..., 0] = 8
    k[3:5, :, 0] = 150
    views = (tensor.view(1, 400, 2, 64).transpose(1, 2) for tensor in (q, k, v))
    attended = blocks._tiled_attention(*views).transpose(1, 2).flatten(2).flatten(0, 1)
    assert relative_error(attended, explicit(q, k, v, lengths)) < 0.005


def test_what_tiles_hold_grows_with_the_tokens_and_not_their_square() -> None:
    """Counted: the largest tensor that any operation returns."""
    largest = []
    for length in (4096, 8192):
        sizes: list[int] = []

        class Sizes(TorchDispatchMode):
            def __torch_dispatch__(
                self, function: Any, types: Any, arguments: Any = (), options: Any = None, sizes: list[int] = sizes
            ) -> Any:
                result = function(*arguments, **(options or {}))
                if isinstance(result, Tensor):
                    sizes.append(result.numel())
                return result

        q = torch.randn(1, 2, length, 8).bfloat16()
        with Sizes(), mock.patch.object(blocks, "_TILE_SCORES", 1 << 20):
            blocks._tiled_attention(q, q, q)
        largest.append(max(sizes))
    assert largest[1] <= 2.2 * largest[0]


@pytest.mark.usefixtures("tiled")
def test_tiled_features_are_the_fused_ones_to_rounding(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    extractor = FeatureExtractor(backbone, WANTED)
    calls: list[tuple[int, ...]] = []
    real = blocks._tiled_attention
    monkeypatch.setattr(blocks, "_tiled_attention", lambda q, k, v: calls.append(q.shape) or real(q, k, v))
    features = run(extractor, GRIDS)
    assert len(calls) == DEPTH * 6  # GRIDS has six runs of equal lengths
    monkeypatch.setattr(blocks, "attention_kind", lambda device, dtype: "fused")
    for pair, tiles, fused in zip(WANTED, features, run(extractor, GRIDS), strict=True):
        assert_close(torch.cat(tiles), torch.cat(fused), str(pair))


def test_the_same_image_among_the_same_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "attention_kind", lambda device, dtype: "tiled")
    lengths = (260, 300, 300, 20)
    heads = [tensor.bfloat16() for tensor in random_heads(lengths, 3, 1, width=32)]
    first = attend(*heads, Packing(lengths, CPU))
    attend(*(tensor[:300] for tensor in heads), Packing((300,), CPU))
    assert torch.equal(first, attend(*heads, Packing(lengths, CPU)))


def test_short_images_go_to_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    real = blocks._tiled_attention
    monkeypatch.setattr(blocks, "attention_kind", lambda device, dtype: "tiled")
    monkeypatch.setattr(blocks, "_tiled_attention", lambda q, k, v: lengths.append(q.shape[2]) or real(q, k, v))
    heads = [tensor.bfloat16() for tensor in random_heads((256, 255, 257), 1, 1)]
    attend(*heads, Packing((256, 255, 257), CPU))
    assert lengths == [256, 257]


ZEN = {"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": False}


@pytest.mark.parametrize(
    ("device", "dtype", "capabilities", "expected"),
    [
        ("cpu", torch.bfloat16, ZEN, "tiled"),
        ("cpu", torch.float32, ZEN, "fused"),
        ("cpu", torch.float16, ZEN, "fused"),
        ("cuda", torch.bfloat16, ZEN, "fused"),
        ("mps", torch.bfloat16, ZEN, "fused"),
        ("cpu", torch.bfloat16, {**ZEN, "amx_bf16": True}, "fused"),
        ("cpu", torch.bfloat16, {**ZEN, "avx512_bf16": False}, "fused"),
        ("cpu", torch.bfloat16, {"architecture": "arm64", "bf16": True}, "fused"),
        ("cpu", torch.bfloat16, None, "fused"),  # PyTorch before it told
    ],
)
def test_what_the_cpu_can_do_decides_how_attention_is_computed(
    device: str,
    dtype: torch.dtype,
    capabilities: dict[str, Any] | None,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if capabilities is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert blocks.attention_kind(torch.device(device), dtype) == expected


class SlowVarlen:
    """Stands in for PyTorch's kernel for sequences of several lengths, which wants a GPU, with one of its signatures.

    Args:
        options: that it takes beside the tensors.
        error: is raised instead.
    """

    def __init__(self, options: Sequence[str], error: Exception | None = None) -> None:
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        optional = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in options]
        self.__signature__ = inspect.Signature([*(inspect.Parameter(name, kind) for name in REQUIRED), *optional])
        self._error = error
        self.calls = 0
        self.given: dict[str, Any] = {}

    def __call__(self, *arguments: Any, **options: Any) -> Tensor:
        bound = self.__signature__.bind(*arguments, **options).arguments
        self.calls += 1
        if self._error is not None:
            raise self._error
        q, k, v, offsets, same, *longest = (bound[name] for name in REQUIRED)
        self.given = {name: value for name, value in bound.items() if name not in REQUIRED}
        assert offsets.dtype == torch.int32
        assert torch.equal(offsets, same)
        lengths = offsets.diff().tolist()
        assert offsets[0] == 0
        assert sum(lengths) == len(q)
        assert longest == [max(lengths)] * 2
        assert q.shape == k.shape == v.shape
        return explicit(q, k, v, lengths).float().view(q.shape)


def stand_in(monkeypatch: pytest.MonkeyPatch, slow: SlowVarlen) -> SlowVarlen:
    """In place of PyTorch's kernel, on every device."""
    monkeypatch.setattr(blocks, "varlen_attn", slow)
    monkeypatch.setattr(blocks, "_takes_any_lengths", lambda q: True)
    return slow


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("version", OPTIONS)
def test_one_call_for_all_lengths_gives_what_one_for_each_does(
    monkeypatch: pytest.MonkeyPatch, groups: int, version: str
) -> None:
    lengths = (3, 5, 5, 1, 3)
    q, k, v = random_heads(lengths, 6, groups)
    one_by_one = attend(q, k, v, Packing(lengths, CPU))
    varlen = stand_in(monkeypatch, SlowVarlen(OPTIONS[version]))
    assert_close(attend(q, k, v, Packing(lengths, CPU)), one_by_one)
    assert varlen.calls == 1
    # Where there may be cuDNN it is kept out, and nothing is asked for that an older version does not know.
    assert varlen.given == ({"num_splits": 1} if "num_splits" in OPTIONS[version] else {})
    attend(q[:10], k[:10], v[:10], Packing((5, 5), CPU))
    assert varlen.calls == 1  # images of one length are a plain batch


def test_this_pytorchs_kernel_takes_what_it_is_given() -> None:
    if blocks.varlen_attn is None:
        pytest.skip("this PyTorch has no kernel for sequences of several lengths")
    signature = inspect.signature(blocks.varlen_attn)
    assert tuple(signature.parameters)[: len(REQUIRED)] == REQUIRED
    signature.bind(*REQUIRED, **blocks._flash_options(blocks.varlen_attn))


def test_features_and_masks_are_the_same_with_one_call_for_all_lengths(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    extractor = FeatureExtractor(backbone, WANTED)
    one_by_one = run(extractor, GRIDS)
    varlen = stand_in(monkeypatch, SlowVarlen(OPTIONS["PyTorch 2.12"]))
    at_once = run(extractor, GRIDS)
    assert varlen.calls == DEPTH
    for pair, before, after in zip(WANTED, one_by_one, at_once, strict=True):
        assert_close(torch.cat(after), torch.cat(before), str(pair))
        for grid, first, second in zip(GRIDS, before, after, strict=True):
            if len(first) <= 4:
                continue  # of so few similarities many lie as far from their mean as others: rounding decides
            masks = [lost_boxes(features[None], grid, "auto").masks for features in (first, second)]
            assert torch.equal(*masks), f"{pair} on a grid of {grid}"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("USE_FLASH_ATTENTION was not enabled for build.\nSee the log."),
        NotImplementedError("no kernel for torch_attn::_varlen_attn"),
        TypeError("varlen_attn() got an unexpected keyword argument"),
    ],
)
def test_a_kernel_that_fails_is_not_asked_again(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    lengths = (3, 5, 1)
    heads = random_heads(lengths, 2, 1)
    expected = attend(*heads, Packing(lengths, CPU))
    varlen = stand_in(monkeypatch, SlowVarlen((), error))
    reason = re.escape(str(error).partition("\n")[0])
    with pytest.warns(LostregWarning, match=f"of several shapes at once does not work here .{reason}.: going on"):
        assert torch.equal(attend(*heads, Packing(lengths, CPU)), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(attend(*heads, Packing(lengths, CPU)), expected)
    assert varlen.calls == 1


def test_a_kernel_that_ran_out_of_memory_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = (3, 5, 1)
    varlen = stand_in(monkeypatch, SlowVarlen((), torch.OutOfMemoryError("CUDA out of memory")))
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            attend(*random_heads(lengths, 2, 1), Packing(lengths, CPU))
    assert varlen.calls == 2


@pytest.mark.parametrize(
    ("place", "name", "value", "takes"),
    [
        (torch.version, "hip", None, True),
        (torch.version, "hip", "6.4", False),
        (torch.backends.cuda, "is_flash_attention_available", lambda: False, False),
        (torch.cuda, "get_device_capability", lambda device: (7, 5), False),
    ],
)
def test_only_nvidias_gpus_since_ampere_with_flash_attention_take_any_lengths(
    monkeypatch: pytest.MonkeyPatch, place: Any, name: str, value: Any, takes: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(place, name, value)
    q = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, shape=(9, 2, 64))
    assert blocks._takes_any_lengths(q) == takes  # type: ignore[arg-type]
    q.dtype = torch.float32
    assert not blocks._takes_any_lengths(q)  # type: ignore[arg-type]


@needs_simulated_pinning
def test_where_images_end_reaches_a_gpu_without_holding_up_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy from memory that is not pinned waits for what is queued on the device."""
    pinned: list[bool] = []
    empty_like = torch.empty_like

    def record(tensor: Tensor, *, pin_memory: bool) -> Tensor:
        pinned.append(pin_memory)
        return empty_like(tensor)  # a machine without a GPU pins nothing

    monkeypatch.setattr(torch, "empty_like", record)
    with FakeTensorMode():
        offsets = Packing((3, 5), torch.device("cuda")).offsets
    assert (offsets.device.type, offsets.dtype, offsets.shape) == ("cuda", torch.int32, (3,))
    Packing((3, 5), CPU).offsets  # noqa: B018
    assert pinned == [True, False]


@pytest.mark.parametrize("chunk", [1, 7, 20])
def test_how_many_tokens_go_through_an_mlp_at_once_changes_nothing(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    extractor = FeatureExtractor(backbone, [("out", -1)])
    whole = run(extractor, GRIDS)
    monkeypatch.setattr(blocks, "_CPU_CHUNK", chunk)
    assert_close(torch.cat(run(extractor, GRIDS)[0]), torch.cat(whole[0]))


@pytest.mark.parametrize("name", [*BACKBONES, *OTHERS])
def test_hidden_units_are_what_the_second_projection_reads(name: str) -> None:
    table_name, options = OTHERS.get(name, (name, NARROW))
    backbone = built(table_name, **options)
    mlp: Any = backbone.model.blocks[0].mlp  # type: ignore[index, union-attr]
    seen: list[Tensor] = []
    handle = mlp.fc2.register_forward_pre_hook(lambda module, given: seen.append(given[0].clone()))
    inputs = torch.randn(9, backbone.model.embed_dim)
    expected = mlp(inputs)
    handle.remove()
    hidden = hidden_units(mlp, inputs)
    assert torch.equal(hidden, seen[0])
    assert hidden.shape == (9, backbone.hidden_units(0))
    assert_close(mlp.fc2(hidden), expected)
    hidden[:] = 0  # new memory
    assert torch.equal(mlp(inputs), expected)


def test_other_mlps_are_refused() -> None:
    with pytest.raises(BackboneError, match="cannot read the hidden units of a GatedMlp: expected Mlp, GluMlp or Sw"):
        hidden_units(GatedMlp(8), torch.zeros(1, 8))


@given(lengths_of_packs, st.integers(1, 3), st.integers(1, 3), st.integers(0, 1000))
@settings(deadline=None, max_examples=60)
def test_the_largest_activation_is_each_images_and_each_units_own(
    lengths: list[int], count: int, width: int, seed: int
) -> None:
    """By hand, in Python: of the tokens that are not added ones, with the sign, for each added token."""
    lengths = [length + count for length in lengths]
    packing = Packing(tuple(lengths), CPU)
    generator = torch.Generator().manual_seed(seed)
    activations = torch.randn(sum(lengths), width, generator=generator)
    first = [int(torch.randint(length - count + 1, (1,), generator=generator)) for length in lengths]
    added = torch.tensor(
        [[span.start + at + n for n in range(count)] for span, at in zip(packing.spans, first, strict=True)]
    )
    expected = []
    for span, at in zip(packing.spans, first, strict=True):
        rows = [row for place, row in enumerate(activations[span].tolist()) if not at <= place < at + count]
        expected += [[max(column, key=abs) for column in zip(*rows, strict=True)]] * count
    assert blocks._largest(activations, packing, added).tolist() == expected


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


# One image, images of one length, of several, each with fewer and with more tokens than go through an MLP at once.
SHAPES: list[list[Grid]] = [
    [(4, 4)],
    [(3, 3)] * 3,
    [(3, 5), (2, 2)],
    [(10, 10)],
    [(6, 6)] * 3,
    [(9, 4), (5, 8)],
    [(2, 2), (1, 7), (1, 7)],
    [(6, 5)],
    [(2, 4)] * 4,
    [(1, 3), (2, 3)],
    [(9, 9)],
    [(5, 6)] * 3,
    [(6, 6), (6, 6), (2, 3)],
    [(2, 2)],
]


@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="compiling needs a C++ compiler")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ["dinov2_vits14_reg", "mixed RoPE"])
def test_compiled_blocks_give_the_same_and_no_other_shape_is_compiled_again(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slow: a real compiler, for two blocks of a tiny model."""
    monkeypatch.setattr(blocks, "_CPU_CHUNK", 60)
    table_name, _ = OTHERS.get(name, (name, {}))
    backbone = built(table_name, depth=2, embed_dim=32, num_heads=2)
    wanted = [("k", 1), ("out", -1)]
    eager, compiled = FeatureExtractor(backbone, wanted), FeatureExtractor(backbone, wanted, compiled=True)
    graphs = []
    for grids in SHAPES:
        for expected, actual in zip(run(eager, grids), run(compiled, grids), strict=True):
            assert_close(torch.cat(actual), torch.cat(expected), str(grids))
        graphs.append(counters["stats"]["unique_graphs"])
    assert set(graphs) == {2}  # what comes before attention and what comes after it, once each
