"""The CUDA path without a GPU: no operation mixes devices, nothing waits unseen, and no pack starts more than it did.

What tensors hold is not looked at here: see `dispatch`, and `test_cuda` for a real GPU.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from dispatch import DEVICE, fake_gpu, on_gpu
from planted import cut
from random_models import NARROW, built
from torch import Tensor

from lostreg.artifacts.attention import _maps_of
from lostreg.artifacts.norms import token_norms
from lostreg.artifacts.register_search import _activations
from lostreg.images.patches import PatchedPicture
from lostreg.inference.jobs import FeaturesJob, LookJob, ObjectsJob
from lostreg.inference.methods import METHODS, wanted_features
from lostreg.inference.objectness import Facts, Objectness
from lostreg.inference.options import Options
from lostreg.methods.learned import LinearObjectness
from lostreg.methods.lost import Bias, Candidates, Lost, _tensors, find_candidates, lost_maps, prepare
from lostreg.methods.multi_object import find_objects
from lostreg.methods.objectness import score_factors
from lostreg.methods.similarity import Similarities, connections_to
from lostreg.models.backbone import Backbone, build_backbone, find_spec
from lostreg.models.blocks import varlen_attn
from lostreg.models.forward import Forward, Grid
from lostreg.models.registers import RegisterNeurons
from lostreg.models.table import BACKBONES, FEATURES
from lostreg.runs.sweep import with_trials

pytestmark = pytest.mark.usefixtures("one_thread")

MIXED = [(1, 1), (2, 2), (2, 2), (3, 5)]  # rows and columns of patches, in a stream's order
DEPTH = 2
PAIRS = [(feature, layer) for feature in FEATURES for layer in (0, DEPTH - 1)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="module", params=BACKBONES)
def narrow(request: pytest.FixtureRequest) -> Backbone:
    """Every row of the table, narrow, on the CPU."""
    return small(request.param)


@pytest.fixture(params=DTYPES.values(), ids=DTYPES)
def placed(narrow: Backbone, request: pytest.FixtureRequest) -> Backbone:
    return on_gpu(narrow, request.param)


def small(name: str) -> Backbone:
    return built(name, depth=DEPTH, **NARROW)


def with_tokens(backbone: Backbone) -> Backbone:
    """With two test-time registers, and two neurons in the first layer."""
    return backbone.with_registers(RegisterNeurons(((0, 3), (0, 40)), 2))


def pictures(backbone: Backbone, grids: Sequence[Grid]) -> list[PatchedPicture]:
    """Pictures that fill their last patches by half."""
    patch = backbone.spec.patch_size
    return cut([np.zeros((h * patch - patch // 2, w * patch - patch // 2, 3), np.uint8) for h, w in grids], backbone)


def through(
    backbone: Backbone, grids: Sequence[Grid], look: Callable[[Forward, list[Tensor], Sequence[Grid]], list[Any]]
) -> list[Any]:
    """What a look inside the backbone gives."""
    job = LookJob(Forward(backbone), look)
    pack = pictures(backbone, grids)
    return list(job.finish(job.start(pack), pack))


def test_mixed_devices_and_values_without_data_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the rest of this module stands on."""
    with fake_gpu(monkeypatch) as dispatched:
        there, here = torch.zeros(4, device=DEVICE), torch.zeros(4)
        assert there.is_cuda
        for mix in (lambda: there + here, lambda: torch.cat([there, here]), lambda: there.numpy()):
            with pytest.raises((RuntimeError, AssertionError), match=r"device|no NumPy"):
                mix()
        pinned = torch.empty(4, pin_memory=True)
        index = torch.arange(2, device=DEVICE)
        dispatched.take()
        unseen: list[Callable[[], Any]] = [
            lambda: pinned.to(DEVICE, non_blocking=True),
            lambda: pinned[1:].to(DEVICE, non_blocking=True),
            lambda: pinned.copy_(there, non_blocking=True),
            lambda: there[index],
            lambda: there[1:].fill_(0),
            lambda: there.masked_fill_(there > 0, 0),
            lambda: there[1:].copy_(there[1:]),
        ]
        for quick in unseen:
            quick()
        assert dispatched.take() == (7, [])
        waiting: list[Callable[[], Any]] = [
            lambda: torch.tensor([1.0, 2.0], device=DEVICE),
            lambda: here.to(DEVICE, non_blocking=True),
            lambda: pinned.to(DEVICE),
            lambda: pinned.copy_(there),
            lambda: here.copy_(there, non_blocking=True),
            lambda: there.cpu(),
            lambda: there[there > 0],
            lambda: there.__setitem__(index, 0),
            lambda: there.__setitem__(0, 1),
            lambda: there[torch.arange(2)],
            lambda: there.max().item(),
            lambda: bool(there.any()),
            lambda: there.tolist(),
        ]
        for number, slow in enumerate(waiting):
            slow()
            assert dispatched.take()[1], f"number {number} was not noticed"


@pytest.mark.parametrize("tokens", [False, True], ids=["plain", "test-time registers"])
def test_features_mix_no_devices(placed: Backbone, tokens: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = with_tokens(placed) if tokens else placed
    pack = pictures(backbone, MIXED)
    with fake_gpu(monkeypatch):
        features = FeaturesJob(backbone, PAIRS).start(pack)
    assert {(found.device, found.dtype) for found in features} == {(DEVICE, torch.float32)}
    assert {len(found) for found in features} == {sum(rows * columns for rows, columns in MIXED)}


def objects_of(candidates: list[Candidates], run: list[PatchedPicture]) -> list[Any]:
    return find_objects(candidates[0], 10, 4, 0.0)


@pytest.mark.parametrize("bias", ["auto", -0.5])
def test_objects_mix_no_devices(bias: Bias, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the end: components, scores, and further objects on what is left."""
    backbone = on_gpu(small("dinov2_vits14_reg"))
    pack = pictures(backbone, [(2, 2), *[(4, 5)] * 6])
    rounds: list[torch.device] = []

    def recorded(features: Tensor, others: Tensor, thresholds: Tensor) -> Tensor:
        found = connections_to(features, others, thresholds)
        rounds.append(found.device)
        return found

    monkeypatch.setattr("lostreg.methods.multi_object.connections_to", recorded)
    with fake_gpu(monkeypatch):
        job = ObjectsJob(FeaturesJob(backbone, [("k", 1)]), Lost(bias, 10), normalize=True, convert=objects_of)
        search = job.start(pack)
        on_host = [tensor for (maps,) in search.maps for tensor in _tensors(maps).values()]
        outcomes = job.finish(search, pack)
    assert {found.device for (found,) in search.features} == {DEVICE}
    assert {tensor.device.type for tensor in on_host} == {"cpu"}
    assert len(outcomes) == len(pack)
    assert all(isinstance(value, np.ndarray | None) for one in outcomes for value in vars(one).values())
    assert len(rounds) > 2, "nothing further was looked for"
    assert set(rounds) == {DEVICE}


@pytest.mark.parametrize(("method", "learned"), [*((method, False) for method in METHODS), ("parts", True)])
def test_no_method_mixes_devices_or_waits(method: str, learned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = on_gpu(build_backbone(find_spec("dinov2_vits14_reg"), depth=2))
    facts = Facts(backbone=backbone.spec.name, weights=backbone.weights, images=1, unreadable=0, seed=0)
    pack = pictures(backbone, [(2, 2), *[(4, 5)] * 6])
    with fake_gpu(monkeypatch) as dispatched:
        head = LinearObjectness(torch.zeros(backbone.model.num_features), 0.0)  # type: ignore[arg-type]
        objectness = Objectness(head, facts) if learned else None
        asked = Options(backbone, method=method, objectness=objectness, max_objects=3, min_score=0.0)
        options = asked.resolved(backbone)
        row = METHODS[method]
        job = ObjectsJob(
            FeaturesJob(backbone, wanted_features(options)),
            row.make(options, DEVICE),
            normalize=True,
            convert=lambda found, _: row.objects(found[0], options),
        )
        job.start(pack)  # whatever is made once is there
        features = job.features.start(pack)
        dispatched.take()
        search = job.search(features, [picture.grid for picture in pack])
        assert dispatched.take()[1] == []
        # What this host makes up are no masks of DINO-seg's, which hold a patch at least.
        outcomes = [] if method == "dinoseg" else job.finish(search, pack)
    assert {one.device for run in search.features for one in run} == {DEVICE}
    assert len(outcomes) == len(pack) * (method != "dinoseg")
    assert all(isinstance(one.masks, np.ndarray) for one in outcomes)


@pytest.mark.parametrize("bias", ["auto", -0.5, "one an image", "several", with_trials((-0.5, -0.25))])
@pytest.mark.parametrize("kept", [1, 1 << 28], ids=["computed twice", "kept"])
def test_lost_on_features_of_the_gpu_mixes_no_devices(bias: Any, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lostreg.methods.similarity._KEPT_ELEMENTS", {"cpu": kept, "cuda": kept})
    monkeypatch.setattr("lostreg.methods.similarity._BLOCK_ELEMENTS", {"cpu": 1, "cuda": 1})
    with fake_gpu(monkeypatch):
        features = prepare(torch.zeros(3, 300, 16, device=DEVICE, dtype=torch.bfloat16), normalize=True)
        if isinstance(bias, str) and bias != "auto":
            bias = torch.zeros(3) if bias == "one an image" else torch.zeros(3, 2, device=DEVICE)
        maps = lost_maps(features, (15, 20), bias, 100)
        assert {tensor.device for tensor in _tensors(maps).values()} == {DEVICE}
        scored = score_factors(features, np.ones((3, 2, 15, 20), dtype=bool))
        result = find_candidates(features, (15, 20), bias, 100).best()
    assert all(isinstance(factor, np.ndarray) for factor in scored)
    assert {tensor.device.type for tensor in vars(result).values()} == {"cpu"}


def test_a_sweeps_biases_are_where_the_features_are(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_gpu(monkeypatch):
        biases = with_trials((-0.5, -0.25))(Similarities(torch.zeros(3, 20, 4, device=DEVICE)))
    assert (biases.device, len(biases)) == (DEVICE, 3)


def test_looks_inside_mix_no_devices(placed: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms, attention of the tokens in front, and the activations that the search for registers adds up."""
    cured, layers = with_tokens(placed), list(range(DEPTH))

    def maps(forward: Forward, pixels: list[Tensor], grids: Sequence[Grid]) -> list[Any]:
        walk = forward.start(pixels, grids)
        rows = forward.attention(walk, cured.prefix_tokens)
        assert {row.device for row in rows} == {walk.prefixes().device} == {DEVICE}
        return _maps_of(forward, pixels, grids, layers)

    def sums(forward: Forward, pixels: list[Tensor], grids: Sequence[Grid]) -> list[Any]:
        return [_activations(forward, pixels, grids, 0.5, DEPTH - 1)]

    with fake_gpu(monkeypatch):
        norms = through(cured, MIXED, token_norms)
        attention = through(cured, MIXED, maps)
        (activations,) = through(placed, MIXED, sums)
    assert [len(one.final) for one in norms] == [rows * columns + cured.prefix_tokens for rows, columns in MIXED]
    assert all(len(of_image) == DEPTH for of_image in attention)
    assert len(activations.outliers) == DEPTH


def test_a_pack_of_one_grid_whose_every_layer_moves_activations_mixes_no_devices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backbone = on_gpu(small("dinov2_vitg14"), torch.bfloat16)
    every = RegisterNeurons(tuple((layer, 5) for layer in range(DEPTH)), 1)
    with fake_gpu(monkeypatch):
        (found,) = FeaturesJob(backbone.with_registers(every), [("out", -1)]).start(pictures(backbone, [(3, 4)] * 3))
    assert (found.device, found.shape[0]) == (DEVICE, 36)


# Photos in a stream's order, height and width in pixels: 32 of one shape, and 8 of as many shapes.
PHOTOS = {
    "equal": [(480, 640)] * 32,
    "mixed": [(333, 500), (350, 500), (375, 500), (480, 640), (500, 333), (500, 375), (500, 500), (640, 480)],
}
# The most operations that a pack may be asked of the GPU, where Triton is absent. Lower a number when the code asks
# less; never raise one. Pixels come in a copy an image, from memory into which threads have read them.
_LOST = {"equal": {"LOST, auto": 167, "LOST, -0.5": 59}, "mixed": {"LOST, auto": 760, "LOST, -0.5": 376}}
BUDGETS = {
    ("equal", "fp32"): {"transfer": 32, "keys of layer 0": 13, "block": 12, **_LOST["equal"]},
    ("equal", "bf16"): {"transfer": 32, "keys of layer 0": 15, "block": 14, **_LOST["equal"]},
    ("mixed", "fp32"): {"transfer": 8, "keys of layer 0": 81, "block": 20, **_LOST["mixed"]},
    ("mixed", "bf16"): {"transfer": 8, "keys of layer 0": 90, "block": 15, **_LOST["mixed"]},
}

Taken = tuple[int, list[str]]


def stages(backbone: Backbone, photos: Sequence[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> dict[str, Taken]:
    """What each stage of a pack starts, and what of it waits, once all that is kept for a shape is there.

    The stages: pixels to the device; tokens before the first block and keys from them; one block; LOST with each kind
    of bias, to the maps on their way back.
    """
    pack = cut([np.zeros((*size, 3), np.uint8) for size in photos], backbone)
    grids = [picture.grid for picture in pack]
    assert grids == sorted(grids)
    taken: dict[str, Taken] = {}
    with fake_gpu(monkeypatch) as dispatched:
        short, long = (FeaturesJob(backbone, [("k", layer)]) for layer in (0, 1))
        for job in (short, long):
            job.start(pack)
        dispatched.take()
        patches = long.transfer(pack)
        taken["transfer"] = dispatched.take()[0], []  # a stream's pictures lie in pinned memory, these do not
        short.forward(patches, photos)
        taken["keys of layer 0"] = dispatched.take()
        features = long.forward(patches, photos)
        count, waits = dispatched.take()
        taken["block"] = (count - taken["keys of layer 0"][0], waits)  # the waits of both
        for bias in ("auto", -0.5):
            job = ObjectsJob(long, Lost(bias, 100), normalize=True, convert=lambda found, _: found)
            job.search(features, grids)
            dispatched.take()
            job.search(features, grids)
            taken[f"LOST, {bias}"] = dispatched.take()
    return taken


@pytest.mark.parametrize("photos", PHOTOS)
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("tokens", [False, True], ids=["plain", "test-time registers"])
def test_no_stage_of_a_pack_waits(photos: str, precision: str, tokens: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = on_gpu(small("dinov2_vits14"), DTYPES[precision])
    found = stages(with_tokens(backbone) if tokens else backbone, PHOTOS[photos], monkeypatch)
    assert {stage: waits for stage, (_, waits) in found.items() if waits} == {}


@pytest.mark.parametrize("photos", PHOTOS)
@pytest.mark.parametrize("precision", DTYPES)
def test_a_pack_starts_no_more_than_it_did(photos: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if precision == "bf16" and varlen_attn is None:
        pytest.skip("needs PyTorch's kernel for sequences of several lengths")
    backbone = on_gpu(small("dinov2_vits14_reg"), DTYPES[precision])
    found = stages(backbone, PHOTOS[photos], monkeypatch)
    counts = {stage: count for stage, (count, _) in found.items()}
    assert counts.keys() == BUDGETS[photos, precision].keys()
    assert {stage: count for stage, count in counts.items() if count > BUDGETS[photos, precision][stage]} == {}
