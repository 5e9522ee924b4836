"""What is estimated and asked of the system, and what LOST really takes."""

import copy
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lostreg.inference.memory import required_bytes
from lostreg.models.backbone import Backbone, build_backbone, find_spec

CPU = torch.device("cpu")
needs_linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")


def test_memory_grows_with_the_number_of_patches_and_not_its_square(backbone: Backbone) -> None:
    needed = [required_bytes(backbone, (100 * times, 100)) for times in (1, 2, 3, 30)]
    assert 0 < needed[1] - needed[0] == needed[2] - needed[1]
    assert needed[3] - needed[0] == 29 * (needed[1] - needed[0])
    assert required_bytes(backbone, (50, 200)) == needed[0]


def test_larger_models_and_longer_numbers_need_more(backbone: Backbone) -> None:
    grid = (300, 300)
    half = dataclasses.replace(backbone, model=copy.deepcopy(backbone.model).bfloat16())
    wider = build_backbone(find_spec("dinov2_vitb14_reg"), depth=1)
    assert required_bytes(half, grid) < required_bytes(backbone, grid) < required_bytes(wider, grid)


def test_similarities_that_a_gpu_keeps_are_counted(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = (128, 128)  # the most patches whose similarities are kept: half a matrix of 2^28
    on_cpu = required_bytes(backbone, grid)
    monkeypatch.setattr(Backbone, "device", torch.device("cuda"))
    assert required_bytes(backbone, grid) > on_cpu + (512 << 20)
    assert required_bytes(backbone, (129, 128)) < required_bytes(backbone, grid)  # these are computed twice instead


def output(script: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    ).stdout


PEAK = """
import torch
from lostreg.methods import similarity
from lostreg.methods.lost import lost_maps, prepare

def peak():  # of this process alone: what getrusage says may be that of the process which started it
    with open("/proc/self/status") as file:
        return int(dict(line.split(":", 1) for line in file)["VmHWM"].split()[0]) * 1024

similarity._KEPT_ELEMENTS = {{"cpu": 0}}
features = torch.randn(1, {rows} * 100, 384)
lost_maps(prepare(features[:, :30], normalize=True), (5, 6), {bias!r}, 100).candidates(features[:, :30], (5, 6))
before = peak()
features = prepare(features, normalize=True)
maps = lost_maps(features, ({rows}, 100), {bias!r}, 100)
assert 0.1 < maps.degrees.float().mean() / ({rows} * 100) < 0.9
candidates = maps.candidates(features, ({rows}, 100))
assert (candidates.scores > 0).any()
print(peak() - before)
"""


@needs_linux
@pytest.mark.parametrize(("rows", "bias"), [(60, -0.01), (60, "auto")])
def test_lost_takes_less_memory_than_a_gram_matrix(rows: int, bias: float | str) -> None:
    grown = int(output(PEAK.format(rows=rows, bias=bias)))
    assert 100 * rows * 384 * 4 < grown < (rows * 100) ** 2 * 4  # more than its features, in any case
