"""What is estimated and asked of the system, and what LOST really takes."""

import copy
import ctypes
import dataclasses
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lostreg.inference.allocator import keep_freed_memory
from lostreg.inference.memory import required_bytes
from lostreg.models.backbone import Backbone, build_backbone, find_spec

CPU = torch.device("cpu")
needs_linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")


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


class Library:
    """Stands in for a C library: notes what its allocator is told."""

    def __init__(self, answer: int = 1) -> None:
        self.told: list[tuple[int, int]] = []
        self._answer = answer

    def mallopt(self, option: int, value: int) -> int:
        self.told.append((option, value))
        return self._answer


@pytest.fixture
def linux(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A Linux whose user has chosen nothing of the allocator's."""
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "platform", "linux")
    keep_freed_memory.cache_clear()
    yield monkeypatch
    keep_freed_memory.cache_clear()


def test_the_allocator_is_told_once_to_keep_memory(linux: pytest.MonkeyPatch) -> None:
    library = Library()
    linux.setattr(ctypes, "CDLL", lambda name: library)
    assert [keep_freed_memory(), keep_freed_memory()] == [True, True]
    assert library.told == [(-3, 32 << 20), (-1, 1 << 30)]  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h


def test_an_allocator_that_refuses_is_left_alone(linux: pytest.MonkeyPatch) -> None:
    linux.setattr(ctypes, "CDLL", lambda name: Library(answer=0))
    assert keep_freed_memory() is False


def test_a_c_library_without_the_setting_is_left_alone(linux: pytest.MonkeyPatch) -> None:
    linux.setattr(ctypes, "CDLL", lambda name: object())
    assert keep_freed_memory() is False


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "MALLOC_TRIM_THRESHOLD_"])
def test_what_the_user_chose_of_the_allocators_stands(linux: pytest.MonkeyPatch, name: str) -> None:
    library = Library()
    linux.setattr(ctypes, "CDLL", lambda name: library)
    linux.setenv(name, "1")
    assert keep_freed_memory() is False
    assert not library.told


def test_other_systems_are_left_alone(linux: pytest.MonkeyPatch) -> None:
    library = Library()
    linux.setattr(ctypes, "CDLL", lambda name: library)
    linux.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False
    assert not library.told


FAULTS = """
import ctypes, resource, torch
from lostreg import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        [torch.ones(6 << 20) for _ in range(4)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

ctypes.CDLL(None).mallopt(-3, 1 << 17)  # glibc's defaults, fixed: it would adapt them to what was freed so far
ctypes.CDLL(None).mallopt(-1, 1 << 17)
faults()
given_back = faults()
assert keep_freed_memory()
faults()
print(given_back, faults())
"""


def output(script: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    ).stdout


@needs_linux
@needs_glibc
def test_kept_memory_is_not_cleared_by_the_system_again() -> None:
    given_back, kept = map(int, output(FAULTS).split())
    assert kept < given_back / 10


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
