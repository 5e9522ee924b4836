"""Memory and speed of `lostreg discover --ray` on more and more small pictures, beside the plain run.

One picture in a hundred is broken.

python scripts/ray_scale.py --out ray-scale.json
"""

import argparse
import io
import json
import platform
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lostreg import __version__
from lostreg.inference.stream import available_cores
from lostreg.runs.results import processor_name

_SIDE = 28  # pixels: four patches, since what surrounds the backbone is asked
_SHARD = 1000  # pictures of a folder, shard or table
_BROKEN = 100  # each so many-th picture is
_FILES = ("predictions.jsonl", "maps.jsonl", "failed.csv")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure one source after the other, of one size after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[10_000, 100_000], help="pictures of each run")
    parser.add_argument("--kinds", nargs="+", choices=("folder", "tar", "parquet"), default=["folder"])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--backbone", default="imgfocus_vits14")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    args = parser.parse_args(argv)
    rows = []
    for kind in args.kinds:
        for count in args.counts:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(measure(kind, count, args.workers, args.backbone, Path(folder)))
            print(json.dumps(rows[-1]), flush=True)
    report = {
        "what": f"lostreg discover on generated pictures of {_SIDE}x{_SIDE} pixels, 1 in {_BROKEN} broken; peaks of "
        "resident memory of the largest process of a role, pages that processes share counted in each",
        "processor": f"{processor_name()}, {available_cores()} cores",
        "backbone": args.backbone,
        "lostreg": __version__,
        "python": platform.python_version(),
        "rows": rows,
    }
    args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def measure(kind: str, count: int, workers: int, backbone: str, folder: Path) -> dict[str, Any]:
    """The plain run, and the one with workers."""
    write_pictures(kind, count, folder / "photos")
    options = ["--backbone", backbone, "--device", "cpu", "--method", "lost"]
    plain = run(folder, "plain", options)
    with_ray = run(folder, "ray", [*options, "--ray", "auto", "--workers", str(workers)])
    same = all((folder / "plain" / name).read_bytes() == (folder / "ray" / name).read_bytes() for name in _FILES)
    return {"kind": kind, "images": count, "workers": workers, "same_bytes": same, "plain": plain, "ray": with_ray}


def run(folder: Path, out: str, options: Sequence[str]) -> dict[str, Any]:
    """One run in processes of its own: its speed from the first image on, the whole time, and peaks."""
    lostreg = str(Path(sys.executable).with_name("lostreg"))
    start = time.perf_counter()
    process = subprocess.Popen(  # noqa: S603 - our own command
        [lostreg, "discover", "photos", "--out", out, *options],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    peaks: dict[int, tuple[str, float]] = {}
    while process.poll() is None:
        for pid in (process.pid, *below(process.pid)):
            peak = peak_of(pid, process.pid)
            if peak is not None:
                peaks[pid] = peak
        time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"lostreg discover ended with {process.returncode}")
    results = json.loads((folder / out / "results.json").read_text(encoding="utf-8"))
    by_role: Counter[str] = Counter()
    for role, megabytes in peaks.values():
        by_role[role] = max(by_role[role], round(megabytes))
    return {
        "images_per_s": results["run"]["images_per_s"],
        "whole_s": round(time.perf_counter() - start, 1),
        "unreadable": results["unreadable"],
        "peak_mb": {role: by_role[role] for role in ("driver", "worker", "ray") if by_role[role]},
    }


def below(pid: int) -> Iterator[int]:
    """All processes that a process has started, and theirs."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    except OSError:
        return
    for child in map(int, children):
        yield child
        yield from below(child)


def peak_of(pid: int, driver: int) -> tuple[str, float] | None:
    """What a process does, and the most that was resident of it in MB; None for one that is gone."""
    try:
        title = Path(f"/proc/{pid}/cmdline").read_bytes()
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if "VmHWM" not in status:  # it is ending
        return None
    role = "driver" if pid == driver else "worker" if title.startswith(b"ray::MapWorker") else "ray"
    return role, int(status["VmHWM"].split()[0]) / 1024


def write_pictures(kind: str, count: int, place: Path) -> None:
    """Pictures of noise in folders, shards of tar or tables of Parquet."""
    random = np.random.default_rng(0)
    for start in range(0, count, _SHARD):
        numbers = range(start, min(start + _SHARD, count))
        contents = {f"{number:07d}.png": _picture(number, random) for number in numbers}
        _WRITERS[kind](place / f"{start // _SHARD:05d}", contents)


def _picture(number: int, random: np.random.Generator) -> bytes:
    if number % _BROKEN == _BROKEN // 2:
        return b"no picture"
    file = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (_SIDE, _SIDE, 3), dtype=np.uint8)).save(file, format="PNG")
    return file.getvalue()


def _write_folder(place: Path, contents: dict[str, bytes]) -> None:
    place.mkdir(parents=True)
    for name, content in contents.items():
        (place / name).write_bytes(content)


def _write_tar(place: Path, contents: dict[str, bytes]) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(place.with_suffix(".tar"), "w") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def _write_parquet(place: Path, contents: dict[str, bytes]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    place.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": content, "path": name} for name, content in contents.items()]
    parquet.write_table(pa.table({"image": images}), place.with_suffix(".parquet"))


_WRITERS = {"folder": _write_folder, "tar": _write_tar, "parquet": _write_parquet}


if __name__ == "__main__":
    main()
