"""No file that lostreg reads, however unsound, does more than be refused in words.

`make fuzz` draws 100,000 inputs in place of 2,000, and watches the time that each takes. What has been found once is
drawn again alone: ``LOSTREG_FUZZ_SEED=7 python -m pytest tests/fuzz -k exif``. An input that kills the process is in
pytest's folder of temporary files, in a folder named after its target and seed.
"""

import contextlib
import os
import resource
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from fuzz.targets import TARGETS, Target

from lostreg.errors import DatasetError

INPUTS = int(os.environ.get("LOSTREG_FUZZ", "2000"))
WATCHED = INPUTS > 2000  # no test of an ordinary run fails because the machine is busy
SECONDS = 20
MEGABYTES = 512  # that a single input may make the process grow by, at its peak


class Hang(BaseException):  # no reader may take it for an error of its own
    """An input took more than `SECONDS`."""


def count_of(target: Target) -> int:
    return INPUTS * target.share // 100


def fuzz(target: Target, seeds: range, folder: Path) -> tuple[int, dict[int, str]]:
    """How many inputs were refused, and what went wrong with which seed."""
    refused, faults = 0, {}
    for seed in seeds:
        path, rng = drawn(target, seed, folder)
        peak = _peak()
        try:
            with _watched():
                target.read(path, rng)
        except target.refusals as error:
            refused += 1
            if not str(error).strip():
                faults[seed] = "refused without a word"
        except (Exception, Hang) as error:
            at = traceback.extract_tb(error.__traceback__)
            ours = [frame for frame in at if "lostreg" in Path(frame.filename).parts[-3:]] or at
            faults[seed] = f"{error!r:.200} at {Path(ours[-1].filename).name}:{ours[-1].lineno}"
        if _peak() - peak > MEGABYTES:
            faults.setdefault(seed, f"took {_peak() - peak} MB")
        shutil.rmtree(folder / f"{target.name}-{seed}")
    return refused, faults


def drawn(target: Target, seed: int, folder: Path) -> tuple[Path, Random]:
    """The input of a seed, and the generator that goes on from there."""
    path = folder / f"{target.name}-{seed}" / target.file
    path.parent.mkdir(parents=True)
    rng = Random(f"{target.name} {seed}")
    path.write_bytes(target.mutate(rng, target.seeds()))
    return path, rng


def _peak() -> int:
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    if not WATCHED:
        yield
        return

    def stop(*_: Any) -> None:
        raise Hang(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def in_words(target: Target, faults: dict[int, str]) -> str:
    """Each kind of fault once, with the first seed that shows it."""
    kinds = Counter(fault.rpartition(" at ")[2] for fault in faults.values())
    lines = [f"{len(faults)} faults; LOSTREG_FUZZ_SEED=N python -m pytest tests/fuzz -k {target.name} shows one:"]
    for kind, count in kinds.most_common():
        seed = next(seed for seed, fault in faults.items() if fault.rpartition(" at ")[2] == kind)
        lines.append(f"  seed {seed}: {faults[seed]}" + (f" (and {count - 1} like it)" if count > 1 else ""))
    return "\n".join(lines)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_whatever_is_read_is_taken_or_refused(
    target: Target, tmp_path: Path, record_property: Callable[[str, object], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lostreg.datasets.coco20k.coco20k_ids", lambda: (1, 2, 3))
    for number, content in enumerate(target.seeds()):  # also loads what is loaded late
        path = tmp_path / f"seed-{number}" / target.file
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        for draw in range(4):
            target.read(path, Random(draw))
    if "LOSTREG_FUZZ_SEED" in os.environ:  # not caught, so that it is seen where it comes from
        with contextlib.suppress(*target.refusals):
            target.read(*drawn(target, int(os.environ["LOSTREG_FUZZ_SEED"]), tmp_path))
        return
    refused, faults = fuzz(target, range(count_of(target)), tmp_path)
    record_property("fuzz", (count_of(target), refused, len(faults)))
    assert not faults, in_words(target, faults)


def test_the_shares_make_up_the_whole() -> None:
    assert sum(target.share for target in TARGETS) == 100


def test_a_fault_is_told_with_its_seed(tmp_path: Path) -> None:
    def read(path: Path, rng: Random) -> None:
        match path.read_bytes():
            case b"0":
                raise DatasetError("expected this, found that")
            case b"1":
                raise DatasetError("")
            case b"2":
                raise ValueError("of a reader that does not expect it")

    numbers = iter(b"0123")
    target = Target("t", "x", lambda: [b""], lambda rng, seeds: bytes([next(numbers)]), read, (DatasetError,), 0)
    refused, faults = fuzz(target, range(10, 14), tmp_path)
    assert refused == 2
    assert list(faults) == [11, 12]
    told = in_words(target, faults)
    assert "seed 11: refused without a word" in told
    assert "seed 12: ValueError('of a reader that does not expect it') at test_fuzz.py" in told
    assert "-k t shows" in told
    assert list(tmp_path.iterdir()) == []
