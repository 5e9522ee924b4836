"""Peak memory of `lostreg discover` on collections of more and more small pictures.

python scripts/collection_memory.py --out eval/results/discover-memory.json
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from lostreg import __version__

_SIDE = 28  # pixels: four patches, since memory by the number of images is what is asked
_KINDS = 50  # different pictures; further names are links to them


def main(argv: Sequence[str] | None = None) -> None:
    """Measure one collection size after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 10_000, 100_000], help="images of each run")
    parser.add_argument("--backbone", default="imgfocus_vits14")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    args = parser.parse_args(argv)
    rows = []
    for count in args.counts:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(count, args.backbone, Path(folder)))
        print(json.dumps(rows[-1]), flush=True)
    report = {
        "what": f"lostreg discover on generated pictures of {_SIDE}x{_SIDE} pixels, one process a row",
        "backbone": args.backbone,
        "lostreg": __version__,
        "python": platform.python_version(),
        "rows": rows,
    }
    args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def measure(count: int, backbone: str, folder: Path) -> dict[str, float | int]:
    """One run in a process of its own."""
    make_pictures(folder / "photos", count)
    lostreg = str(Path(sys.executable).with_name("lostreg"))
    command = [lostreg, "discover", "photos", "--out", "out", "--backbone", backbone]
    process = subprocess.Popen(  # noqa: S603 - our own command
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"lostreg discover ended with {status}")
    written = (folder / "out" / "predictions.jsonl").read_bytes().count(b"\n")
    return {"images": written, "peak_mb": round(usage.ru_maxrss / 1024, 1), "cpu_s": round(usage.ru_utime, 1)}


def make_pictures(folder: Path, count: int) -> None:
    """Some pictures of noise, and links to them in subfolders of a thousand."""
    random = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"{number // 1000:03d}" / f"{number:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number < _KINDS:
            Image.fromarray(random.integers(0, 256, (_SIDE, _SIDE, 3), dtype=np.uint8)).save(path)
        else:
            os.link(folder / "000" / f"{number % _KINDS:06d}.png", path)


if __name__ == "__main__":
    main()
