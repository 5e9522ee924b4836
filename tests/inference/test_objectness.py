"""What a collection taught: learned, kept in a file, ranking candidates; and methods that a discoverer is told."""

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import same, scene, scenes
from safetensors.torch import save_file

import lostreg
from lostreg.errors import LostregError, ObjectnessError, OptionError
from lostreg.images.decode import read_image
from lostreg.images.patches import cut_patches
from lostreg.inference.discoverer import Discoverer
from lostreg.inference.learn import learn
from lostreg.inference.objectness import FORMAT, Facts, Objectness
from lostreg.inference.study import Study
from lostreg.methods.dinoseg import attended_maps, dinoseg_objects
from lostreg.methods.learned import LinearObjectness, fit
from lostreg.methods.lost import find_candidates, prepare
from lostreg.methods.parts import candidate_masks, find_parts, part_labels
from lostreg.methods.spectral import MASKCUT_TAU, TOKENCUT_TAU, maskcut_objects, spectral_maps, tokencut_objects
from lostreg.models.backbone import Backbone, build_backbone, find_spec
from lostreg.models.features import collect_features
from lostreg.models.forward import Forward
from lostreg.models.pixels import normalised, transfer
from lostreg.progress import Progress

pytestmark = pytest.mark.usefixtures("one_thread")

FACTS = Facts(backbone="dinov2_vits14_reg", weights="random", images=3, unreadable=0, seed=0)


def objectness(**changes: Any) -> Objectness:
    weight = torch.from_numpy(np.random.default_rng(0).normal(0, 5, 384).astype(np.float32))
    return Objectness(LinearObjectness(weight, -0.5), dataclasses.replace(FACTS, **changes))


def features_of(backbone: Backbone, picture: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
    """Normalised keys and output tokens of one picture whose sides are multiples of the patch."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (backbone.mean, backbone.std))
    pixels = (torch.from_numpy(picture).permute(2, 0, 1) / 255 - mean) / std
    keys, tokens = collect_features(backbone, pixels[None], [("k", -1), ("out", -1)])
    grid = (picture.shape[0] // 14, picture.shape[1] // 14)
    return prepare(keys, normalize=True), prepare(tokens, normalize=True), grid


def test_parts_of_a_stream_are_those_of_each_image(backbone: Backbone) -> None:
    pictures = [scene(number, *size) for number, size in enumerate([(112, 84), (98, 98), (112, 84), (84, 112)])]
    learned = objectness()
    for given in (None, learned):
        discoverer = Discoverer(
            backbone, device="cpu", method="parts", objectness=given, max_objects=4, min_score=0.0, batch_size=3
        )
        for picture, found in zip(pictures, discoverer.discover_many(pictures), strict=True):
            keys, tokens, grid = features_of(backbone, picture)
            chances = None if given is None else given.head.probabilities(tokens).numpy()
            candidates = find_candidates(keys, grid, "auto", 100)
            (objects,) = find_parts(candidates, part_labels(keys, several=True).numpy(), 4, 0.0, chances)
            np.testing.assert_array_equal(found.masks, objects.masks)
            np.testing.assert_array_equal(found.xyxy, objects.xyxy * 14)
            np.testing.assert_allclose(found.scores, objects.scores, atol=1e-5)
            np.testing.assert_array_equal(found.seeds, objects.seeds)
            assert objects.candidates is not None
            np.testing.assert_allclose(found.candidates, objects.candidates * [14, 14, 14, 14, 1], atol=1e-5)
            assert (found.objectness is None) == (given is None)
            if chances is not None:
                np.testing.assert_allclose(found.objectness, chances.reshape(grid), atol=1e-5)
            study = Study(discoverer, picture)
            assert same(study.discover(), found)
            lost = Discoverer(backbone, device="cpu", bias=-0.5, normalize=True).discover(picture)
            assert same(study.discover(method="lost", bias=-0.5, max_objects=1), lost)
            assert (lost.candidates, lost.objectness) == (None, None)


def test_learning_sees_every_image_once_and_says_where_it_comes_from(backbone: Backbone, tmp_path: Path) -> None:
    pictures = [scene(number, 112, 84) for number in range(5)]
    seen: list[Progress] = []
    discoverer = Discoverer(backbone, device="cpu", batch_size=2)
    found = learn([*pictures, tmp_path / "none.jpg"], discoverer, on_progress=seen.append)
    assert [progress.done for progress in seen] == [1, 2, 3, 4, 5, 6]
    assert [progress.error is not None for progress in seen] == [False] * 5 + [True]
    assert found.facts == dataclasses.replace(FACTS, images=5, unreadable=1, names=())  # arrays have no names
    assert found.shared_with([tmp_path / "none.jpg", pictures[0]]) == 0
    lessons = []
    for picture in pictures:
        keys, tokens, grid = features_of(backbone, picture)
        ((masks, scores, _, _),) = candidate_masks(find_candidates(keys, grid, "auto", 100), part_labels(keys).numpy())
        lessons.append((tokens[0], masks, scores))
    expected = fit(lessons)
    torch.testing.assert_close(found.head.weight, expected.weight, rtol=0.02, atol=0.02)
    with_it = Discoverer(backbone, device="cpu", method="parts", objectness=found)
    without = Discoverer(backbone, device="cpu", method="parts")
    assert without.with_objectness(found).options == with_it.options
    assert with_it.with_objectness(None).options == without.options


def test_a_sample_is_drawn_by_its_seed(backbone: Backbone) -> None:
    discoverer = Discoverer(backbone, device="cpu", method="parts")
    first, again, other = (learn(scenes(6), discoverer, sample=3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.head.weight, again.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)
    assert (first.facts.images, first.facts.seed) == (3, 1)


@pytest.mark.parametrize(
    ("images", "error", "told"),
    [
        ([], OptionError, "at least one image"),
        (["none.jpg", "no.png"], ObjectnessError, "none of 2 images could be read"),
    ],
)
def test_nothing_is_learned_from_nothing(
    backbone: Backbone, images: list[str], error: type[LostregError], told: str
) -> None:
    with pytest.raises(error, match=told):
        learn(images, Discoverer(backbone, device="cpu"))


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "objectness.safetensors"
    objectness().save(path)
    loaded = lostreg.Objectness.load(path)
    assert torch.equal(loaded.head.weight, objectness().head.weight)
    assert (loaded.head.bias, loaded.facts) == (-0.5, FACTS)
    assert loaded.describe() == objectness().describe()
    assert pickle.loads(pickle.dumps(loaded)).describe() == loaded.describe()
    assert objectness(images=4).describe() != loaded.describe()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"weight": torch.zeros(3, 4)}, r"expected a weight \(D,\) .* not \(3, 4\)"),
        ({"weight": torch.zeros(4, dtype=torch.float64)}, "of float32"),
        ({"bias": torch.zeros(2)}, r"and \(2,\)"),
        ({"weight": torch.full((4,), torch.inf)}, "not finite"),
        ({"weight": None}, "weight"),
        ({"format": "lostreg bias 1"}, "its format is 'lostreg bias 1'"),
        ({"facts": "{"}, "no objectness"),
        ({"facts": "{}"}, "no objectness"),
        ({"facts": json.dumps({**vars(FACTS), "images": -1})}, "images"),
        ({"weight": torch.zeros(1 << 19)}, "too large"),
    ],
    ids=str,
)
def test_a_file_of_something_else_is_refused(
    tmp_path: Path, change: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lostreg.inference.objectness._MOST_BYTES", 1 << 20)
    tensors = {"weight": torch.zeros(4), "bias": torch.zeros(1)}
    metadata = {"format": FORMAT, "facts": json.dumps(vars(FACTS))}
    for name, value in change.items():
        if value is None:
            del tensors[name]
        elif name in tensors:
            tensors[name] = value
        else:
            metadata[name] = value
    path = tmp_path / "other.safetensors"
    save_file(tensors, path, metadata)
    with pytest.raises(ObjectnessError, match=told):
        Objectness.load(path)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.safetensors"
    path.write_text("no tensors here")
    for wrong in (path, tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(ObjectnessError):
            Objectness.load(wrong)
    with pytest.raises(ObjectnessError, match="cannot write"):
        objectness().save(path / "under a file")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"method": "best"}, "method must be one of lost, parts"),
        ({"method": "tokencut", "bias": -0.5}, "'tokencut' has no bias: leave it out"),
        ({"method": "maskcut", "bias": lambda _: 0.0}, "'maskcut' has no bias"),
        ({"bias": "auto", "normalize": False}, "defined on normalised features"),
        ({"method": "parts", "normalize": False}, "'parts' is defined on normalised features"),
        ({"objectness": "self", "method": "parts"}, "objectness must be an Objectness, such as a file's, not 'self'"),
        ({"objectness": objectness()}, "ranks the candidates of method 'parts', not of 'lost'"),
        ({"objectness": objectness(), "method": "parts", "score": max}, "instead of a score: give one of the two"),
        ({"objectness": objectness(backbone="dinov2_vits14"), "method": "parts"}, "learned on dinov2_vits14, not on"),
        (
            {"objectness": objectness(weights="others"), "method": "parts"},
            "learned on the weights others, not on random",
        ),
    ],
    ids=str,
)
def test_options_that_contradict_each_other_are_refused(backbone: Backbone, options: dict[str, Any], told: str) -> None:
    with pytest.raises(OptionError, match=told):
        Discoverer(backbone, device="cpu", **options)


def test_results_record_the_method_and_what_ranked(backbone: Backbone) -> None:
    plain = Discoverer(backbone, device="cpu").options.record()
    assert (plain["method"], plain["objectness"]) == ("lost", None)
    learned = objectness()
    options = Discoverer(backbone, device="cpu", method="parts", objectness=learned).options
    assert options.record()["objectness"] == learned.describe()
    assert (options.record()["method"], options.bias, options.normalize) == ("parts", "auto", True)
    assert json.loads(json.dumps(options.record())) == options.record()
    fixed = dataclasses.replace(backbone, spec=dataclasses.replace(backbone.spec, bias=0.0, normalize=False))
    assert Discoverer(fixed, device="cpu", method="parts").options.bias == "auto"
    assert options.with_changes({"method": "lost"}).objectness is None


@pytest.mark.parametrize("method", ["tokencut", "maskcut", "dinoseg"])
def test_published_methods_of_a_stream_are_those_of_each_image(backbone: Backbone, method: str) -> None:
    pictures = [scene(number, *size) for number, size in enumerate([(112, 84), (98, 98), (112, 84), (84, 112)])]
    discoverer = Discoverer(backbone, device="cpu", method=method, max_objects=3, min_score=0.0, batch_size=3)
    for picture, found in zip(pictures, discoverer.discover_many(pictures), strict=True):
        keys, _, grid = features_of(backbone, picture)
        if method == "tokencut":
            (objects,) = tokencut_objects(spectral_maps(keys, grid, TOKENCUT_TAU), keys, grid)
        elif method == "maskcut":
            (objects,) = maskcut_objects(spectral_maps(keys, grid, MASKCUT_TAU), keys, grid, 3, 0.0)
        else:
            forward = Forward(backbone)
            walk = forward.start(transfer_of(backbone, picture), [grid])
            for _ in range(backbone.depth - 1):
                forward.advance(walk)
            (rows,) = forward.attention(walk, 1)
            attention = rows[0, :, backbone.prefix_tokens :]
            (objects,) = dinoseg_objects(attended_maps(attention[None], grid), keys, grid)
        np.testing.assert_array_equal(found.masks, objects.masks)
        np.testing.assert_array_equal(found.xyxy, objects.xyxy * 14)
        np.testing.assert_allclose(found.scores, objects.scores, atol=1e-5)
        assert same(Study(discoverer, picture).discover(), found)


def transfer_of(backbone: Backbone, picture: np.ndarray) -> list[torch.Tensor]:
    """Normalised pixels of a picture's patches, as `Forward.start` takes them."""
    patched = cut_patches(read_image(picture), backbone.spec.patch_size)
    runs = transfer([patched], backbone.device)
    return [image for run in normalised(backbone, runs, [patched.size]) for image in run]


def test_where_no_cls_token_is_none_is_asked_where_it_looks() -> None:
    torch.manual_seed(0)
    without = build_backbone(find_spec("siglip2_vitb16"), depth=1)
    with pytest.raises(
        OptionError, match="dinoseg reads the attention of the CLS token, which siglip2_vitb16 does not"
    ):
        Discoverer(without, device="cpu", method="dinoseg")


def test_an_object_within_an_earlier_one_keeps_its_box_where_boxes_come_from_masks(backbone: Backbone) -> None:
    options = {"device": "cpu", "method": "parts", "max_objects": 30, "min_score": 0.0, "refine": True}
    nested = 0
    for picture in scenes(6):
        plain = Discoverer(backbone, **options).discover(picture)
        found = Discoverer(backbone, **options, box_from="mask").discover(picture)
        empty = ~found.refined.any(axis=(1, 2))
        nested += int(empty.sum())
        np.testing.assert_array_equal(found.xyxy[empty], plain.xyxy[empty])
        assert (found.xyxy[:, 2:] > found.xyxy[:, :2]).all()
    assert nested


def test_a_file_knows_as_many_images_as_teach(tmp_path: Path) -> None:
    names = tuple(f"{number:016x}" for number in range(100_000))
    learned, path = objectness(), tmp_path / "o.safetensors"
    dataclasses.replace(learned, facts=dataclasses.replace(learned.facts, names=names)).save(path)
    assert Objectness.load(path).facts.names == names
