"""Objects that users hold can be copied, pickled and sent to other processes."""

import copy
import dataclasses
import inspect
import multiprocessing
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import disc_picture, same, scene
from fabricate import write_voc

import lostreg
from lostreg import artifacts, errors, metrics
from lostreg.images.decode import read_image
from lostreg.images.patches import cut_patches
from lostreg.methods.lost import find_candidates, lost_maps
from lostreg.models.backbone import Backbone, build_backbone, find_spec
from lostreg.runs.maps import maps_of
from lostreg.runs.predictions import from_discovery
from lostreg.training.train import Look

PUBLIC = [*map(lostreg.__getattr__, set(lostreg.__all__) & lostreg._HOMES.keys()), lostreg.BackboneSpec]
PUBLIC += [*(getattr(artifacts, name) for name in artifacts.__all__), *vars(metrics).values()]
CLASSES = {
    thing
    for thing in PUBLIC
    if inspect.isclass(thing) and thing.__module__.startswith("lostreg") and not issubclass(thing, Exception)
}
REGISTERS = lostreg.RegisterNeurons(((1, 7), (1, 30)), count=2)


@pytest.fixture(scope="module")
def held(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """At least one object of each public class, and of those behind their attributes."""
    discoverer = lostreg.Discoverer(backbone, device="cpu", registers=REGISTERS, refine=True)
    features = torch.randn(2, 12, 4)
    found = discoverer.discover(scene(3))
    picture = read_image(scene(3), max_side=100, exif=False, max_pixels=10**6)
    voc = write_voc(tmp_path_factory.mktemp("voc") / "VOC2007", 3)
    detections = metrics.Detections(found.xyxy, found.scores, found.xyxy, np.zeros((0, 4)))
    result = lostreg.lost_boxes(features, (3, 4))
    return [
        backbone,
        backbone.spec,
        discoverer,
        discoverer.options,
        lostreg.MapBatches(backbone, device="cpu"),
        found,
        picture,
        cut_patches(picture, 14),
        result,
        *result.split(),
        lost_maps(features, (3, 4), 0.0, 5),
        find_candidates(features, (3, 4), 0.0, 5),
        lostreg.BACKBONES,
        lostreg.Options("dino_vits16", bias=-0.1),
        lostreg.Study(discoverer, scene(3)),
        lostreg.calibrate([scene(3)], discoverer),
        lostreg.learn([scene(3)], discoverer),
        REGISTERS,
        lostreg.TrainingOptions(registers=2),
        lostreg.Trained(Path("registers.safetensors"), 2, 9, 1, 0, 6, (Look(6, 0.2, 0.3, 0.1, 1e-3),)),
        next(iter(lostreg.attention_maps([scene(3)], discoverer)))[0],
        artifacts.measure([scene(3)], discoverer),
        lostreg.load_benchmark("voc", root=voc),
        metrics.corloc([[]], [[]]),
        detections,
        metrics.detection_scores([detections]),
        from_discovery("a", found, masks=True),
        maps_of("a", Path("a.jpg"), found),
    ]


def equal(first: Any, second: Any) -> bool:
    """Whether two objects hold the same, to the bit."""
    if type(first) is not type(second):
        return False
    if isinstance(first, np.ndarray | torch.Tensor):
        return first.shape == second.shape and np.array_equal(np.asarray(first), np.asarray(second), equal_nan=True)
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    if isinstance(first, torch.nn.Module):
        return equal(dict(first.state_dict()), dict(second.state_dict()))
    if isinstance(first, lostreg.MapBatches):
        return equal(vars(first), vars(second))
    if isinstance(first, lostreg.Discoverer):
        return equal([first.options, first.backbone], [second.options, second.backbone])
    if hasattr(first, "__dict__") and not callable(first):
        return equal(vars(first), vars(second))
    return bool(first == second)


def test_every_public_class_is_tried(held: list[Any]) -> None:
    assert {thing.__name__ for thing in CLASSES} <= {type(thing).__name__ for thing in held}


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_everything_public_comes_back_equal(held: list[Any], way: Any) -> None:
    for thing in held:
        assert equal(way(thing), thing), type(thing).__name__


@pytest.mark.parametrize("kind", [kind for kind in vars(errors).values() if inspect.isclass(kind)])
def test_errors_come_back_with_their_message(kind: type[Exception]) -> None:
    copied = pickle.loads(pickle.dumps(kind("expected a, found b")))
    assert (type(copied), str(copied)) == (kind, "expected a, found b")


def test_a_spawned_process_finds_the_same_boxes(backbone: Backbone) -> None:
    pixels = scene(3)
    discoverer = lostreg.Discoverer(backbone, device="cpu", max_objects=2, min_score=0.0, registers=REGISTERS)
    study = lostreg.Study(discoverer, pixels)
    expected = [discoverer.discover(pixels), study.discover(bias=-0.3)]  # a frame is cached by now
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = [pool.apply(discoverer.discover, (pixels,)), pool.apply(study.discover, kwds={"bias": -0.3})]
    assert all(map(same, found, expected))


def test_what_was_found_in_an_entry_of_a_folder_travels(backbone: Backbone, photo: Path) -> None:
    discoverer = lostreg.Discoverer(backbone, device="cpu")
    entries = list(os.scandir(photo.parent))
    for held in (discoverer.discover(entries[0]), *discoverer.discover_many(entries)):
        assert pickle.loads(pickle.dumps(held)).source == str(photo)
    study = lostreg.Study(discoverer, entries[0])
    assert same(copy.deepcopy(study).discover(), discoverer.discover(photo))


def test_what_else_a_discoverer_holds_travels_with_it(backbone: Backbone) -> None:
    discoverer = lostreg.Discoverer(backbone, device="cpu")
    discoverer.title = "mine"  # type: ignore[attr-defined]
    assert vars(pickle.loads(pickle.dumps(discoverer)))["title"] == "mine"


def test_weights_travel_once_and_caches_not_at_all(backbone: Backbone) -> None:
    discoverer = lostreg.Discoverer(backbone, device="cpu")
    before = len(pickle.dumps(discoverer))
    discoverer.discover(disc_picture(1000, 800))
    weights = sum(parameter.nbytes for parameter in backbone.model.parameters())
    assert len(pickle.dumps(discoverer)) == before < weights + 2**16
    assert len(pickle.dumps([discoverer, discoverer.with_registers(REGISTERS), backbone])) < weights + 2**16


def test_compiled_code_is_made_anew_where_it_arrives(backbone: Backbone) -> None:
    discoverer = copy.copy(lostreg.Discoverer(backbone, device="cpu"))
    discoverer._start(discoverer.backbone, dataclasses.replace(discoverer.options, compile=True))
    assert pickle.loads(pickle.dumps(discoverer)).options.compile


def test_a_copy_is_independent_of_what_it_was_copied_from(backbone: Backbone) -> None:
    discoverer = lostreg.Discoverer(backbone, device="cpu")
    other = copy.deepcopy(discoverer)
    with torch.no_grad():
        for parameter in other.backbone.model.parameters():
            parameter.zero_()
    assert not same(other.discover(scene(3)), discoverer.discover(scene(3)))
    assert other.stream.backbone is other.backbone is not discoverer.backbone


def test_a_model_without_memory_for_its_weights_stays_one() -> None:
    with torch.device("meta"):
        backbone = build_backbone(find_spec("imgfocus_vits14"), depth=1)
    assert pickle.loads(pickle.dumps(backbone)).device.type == copy.deepcopy(backbone).device.type == "meta"


def test_rows_of_the_table_are_values() -> None:
    spec = lostreg.BACKBONES["dino_vits16"]
    assert dataclasses.asdict(spec)["published"] == {"voc07": 61.9, "voc12": 64.0, "coco20k": 50.7}
    assert len({spec, copy.deepcopy(spec), lostreg.BACKBONES["dino_vits8"]}) == 2
    with pytest.raises(TypeError):
        spec.published["voc07"] = 99.0  # type: ignore[index]
