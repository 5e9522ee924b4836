"""What a run says of itself: its settings, which make two runs the same, and the facts of time and machine."""

import json
import platform
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import torch

from lostreg.checks import cut
from lostreg.datasets import Benchmark
from lostreg.defaults import RESULTS_FILE
from lostreg.errors import PredictionsError
from lostreg.jsonio import read_json
from lostreg.models.blocks import attention_kind

AFRESH: Final = "use --overwrite or another --out"
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
    "open_clip_torch",
)


def benchmark_settings(benchmark: Benchmark, options: dict[str, Any], extra: dict[str, Any] | None) -> dict[str, Any]:
    """What makes two runs the same: the data and every option.

    Args:
        benchmark: what is scored.
        options: of the method.
        extra: further settings of the benchmark to record and compare, such as a limit.
    """
    turned = sum(example.exif for example in benchmark.examples)  # as their EXIF orientation says
    return {
        "benchmark": {
            "name": benchmark.name,
            "split": benchmark.split,
            "images": len(benchmark),
            "fingerprint": benchmark.fingerprint(),
            **({"turned": turned} if turned else {}),
            **(extra or {}),
        },
        "options": options,
    }


def run_facts(computed: int, seconds: float) -> dict[str, Any]:
    """What belongs to one run and not to its results: speed, time, versions.

    Args:
        computed: images that this run computed.
        seconds: what that took.
    """
    return {
        "run": {
            "computed": computed,
            "seconds": round(seconds, 3),
            "images_per_s": round(computed / seconds, 3) if seconds else None,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        },
        "versions": {"python": platform.python_version(), **package_versions()},
    }


def results_of(folder: Path, name: str = RESULTS_FILE) -> dict[str, Any] | None:
    """What a run says of itself; None where it says nothing that can be read."""
    path = folder / name
    try:
        results = read_json(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError):
        return None
    return results if isinstance(results, dict) else None


def check_same_run(
    results: Path, settings: dict[str, Any], apart: Sequence[str] = (), *, place: Path | None = None
) -> dict[str, Any]:
    """The results of an earlier run with the same settings.

    Args:
        results: what the earlier run wrote.
        settings: by section.
        apart: settings that may differ.
        place: what the run is called; None for the folder of the results.

    Raises:
        PredictionsError: if it had other settings, which it names, or its results cannot be read.
    """
    earlier = results_of(results.parent, results.name)
    if earlier is None:
        raise PredictionsError(
            f"{results.parent} holds a run but no readable {results.name}: not a run to go on with; {AFRESH}"
        )
    changes = [
        f"{key} was {_show(before)} and is now {_show(now)}"
        for section, values in settings.items()
        for key, before, now in _differences(earlier.get(section), values)
        if key not in apart
    ]
    if changes:
        named = place or results.parent
        raise PredictionsError(f"{named} holds a run with other settings: {'; '.join(changes)}; {AFRESH}")
    return earlier


# What an earlier version did that did not record it.
_UNRECORDED: Final = {"max_objects": 1, "refine": False, "box_from": "patches", "masks": False, "method": "lost"}


def _differences(earlier: Any, now: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    before = earlier if isinstance(earlier, dict) else {}
    if before:
        before = {**{key: value for key, value in _UNRECORDED.items() if key in now}, **before}
    for key in [*now, *(key for key in before if key not in now)]:
        # Whether figures are transductive follows from the objectness and the images, which are compared.
        if key != "transductive" and before.get(key) != now.get(key):
            yield key, before.get(key), now.get(key)


def _show(value: Any) -> str:
    return cut(json.dumps(value, ensure_ascii=False))


def package_versions() -> dict[str, str]:
    """Versions of lostreg and of what its figures depend on, where they are installed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # OpenCV goes by several names
            continue
    return found


def describe_device(device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """A line on what may round products otherwise: the GPU's name, or the processor's, PyTorch's threads and attention.

    Args:
        device: where images are computed.
        dtype: what the backbone computes in.
    """
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    kind = attention_kind(device, dtype)
    attention = "" if kind == "fused" else f", {kind} attention"
    return f"{device.type}: {processor_name()}, {torch.get_num_threads()} threads{attention}"


def processor_name() -> str:
    """The CPU's model, where Linux tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
