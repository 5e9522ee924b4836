"""The folder of a run: held by one process, tied to its settings, written so that a kill leaves it readable."""

import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import filelock
import torch

from lostreg.datasets import Benchmark
from lostreg.defaults import RESULTS_FILE
from lostreg.errors import PredictionsError

_PACKAGES: Final = (
    "lostreg",
    "torch",
    "timm",
    "numpy",
    "scipy",
    "scikit-learn",
    "opencv-python-headless",
    "pillow",
    "pycocotools",
)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the folder: the lock goes with the process, however it ends."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(out / ".lock", timeout=0)
        lock.acquire()
    except filelock.Timeout as error:
        raise PredictionsError(f"{out} is in use: another run is writing there") from error
    except OSError as error:
        reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror
        raise PredictionsError(f"cannot write to {out}, expected a folder: {reason}") from error
    try:
        if not os.access(out, os.W_OK):
            raise PredictionsError(f"cannot write to {out}: permission denied")
        yield
    finally:
        lock.release()


def benchmark_settings(benchmark: Benchmark, options: dict[str, Any], extra: dict[str, Any] | None) -> dict[str, Any]:
    """What makes two runs the same: the data and every option.

    Args:
        benchmark: what is scored.
        options: of the method.
        extra: further settings of the benchmark to record and compare, such as a limit.
    """
    return {
        "benchmark": {
            "name": benchmark.name,
            "split": benchmark.split,
            "images": len(benchmark),
            "fingerprint": benchmark.fingerprint(),
            **(extra or {}),
        },
        "options": options,
    }


def run_facts(computed: int, seconds: float, device: torch.device) -> dict[str, Any]:
    """What belongs to one run and not to its results: speed, time, versions, machine.

    Args:
        computed: images that this run computed.
        seconds: what that took.
        device: where.
    """
    return {
        "run": {
            "computed": computed,
            "seconds": round(seconds, 3),
            "images_per_s": round(computed / seconds, 3) if seconds else None,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        },
        "versions": {"python": platform.python_version(), **package_versions()},
        "device": describe_device(device),
    }


def is_complete(results: Path) -> bool:
    """Whether a run ended here already: its speed and versions are then what was measured, and stay."""
    return bool(read_results(results).get("complete"))


def read_results(results: Path) -> dict[str, Any]:
    """The settings and figures of an earlier run.

    Raises:
        PredictionsError: if the file is missing or is no JSON object.
    """
    try:
        found = json.loads(results.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise TypeError(f"it holds a {type(found).__name__}")
    except (OSError, ValueError, TypeError) as error:
        raise PredictionsError(
            f"{results.parent} holds a run but no readable {results.name}: not a run to go on with; "
            "use --overwrite or another --out"
        ) from error
    return found


def check_same_run(results: Path, settings: dict[str, Any], apart: Sequence[str] = ()) -> None:
    """Raise `PredictionsError`, which names the differences, unless an earlier run had the same settings.

    Args:
        results: what the earlier run wrote.
        settings: by section.
        apart: settings that may differ.
    """
    earlier = read_results(results)
    changes = [
        f"{key} was {_show(before)} and is now {_show(now)}"
        for section, values in settings.items()
        for key, before, now in _differences(earlier.get(section), values)
        if key not in apart
    ]
    if changes:
        raise PredictionsError(
            f"{results.parent} holds a run with other settings: {'; '.join(changes)}; use --overwrite or another --out"
        )


# What an earlier version did that did not record it.
_UNRECORDED: Final = {"max_objects": 1, "refine": False, "box_from": "patches", "masks": False}


def _differences(earlier: Any, now: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    before = earlier if isinstance(earlier, dict) else {}
    if before:
        before = {**{key: value for key, value in _UNRECORDED.items() if key in now}, **before}
    for key in [*now, *(key for key in before if key not in now)]:
        if before.get(key) != now.get(key):
            yield key, before.get(key), now.get(key)


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def package_versions() -> dict[str, str]:
    """Versions of lostreg and of what its figures depend on, where they are installed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # OpenCV goes by several names
            continue
    return found


def describe_device(device: torch.device) -> str:
    """A line on the machine: the GPU's name, or the processor's and how many threads PyTorch uses."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    return f"{device.type}: {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def results_of(folder: Path) -> dict[str, Any] | None:
    """What a run says of itself; None where it says nothing that can be read."""
    path = folder / RESULTS_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
