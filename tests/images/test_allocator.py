"""The setting of the C library's allocator: made once, left alone where it is not ours to make, and of use."""

import ctypes
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lostreg.images.allocator import keep_freed_memory

needs_linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")


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


@needs_linux
@needs_glibc
def test_kept_memory_is_not_cleared_by_the_system_again() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", FAULTS]
    found = subprocess.run(
        command, env={**environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True
    )
    given_back, kept = map(int, found.stdout.split())
    assert kept < given_back / 10
