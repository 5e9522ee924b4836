"""What a photo costs beyond its main object, and how soon the demo answers: ratios measured side by side.

    python scripts/photo_speed.py --images train2017 --out eval/results/photo-speed-cpu.json

Contenders take turns, round after round, so that a busy machine is busy for all of them.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lostreg import Discoverer, __version__
from lostreg.demo.panels import draw_degrees, draw_objects
from lostreg.demo.session import DemoSettings, Models, Visitor
from lostreg.inference.options import Options
from lostreg.inference.stream import draw_sample
from lostreg.models.backbone import resolve_device
from lostreg.runs.results import describe_device

_BIASES = (-0.9, -0.8, -0.7, -0.5, 0.0)  # slider moves


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="photographs (*.jpg)")
    parser.add_argument("--backbone", default="imgfocus_vits14")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--count", type=int, default=16, help="photographs (default: 16)")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    args = parser.parse_args(argv)
    photos = draw_sample(sorted(args.images.glob("*.jpg")), args.count, seed=0)
    report = {
        "backbone": args.backbone,
        "photos": len(photos),
        "rounds": args.rounds,
        "objects": measure_objects(args.backbone, args.device, photos, args.rounds),
        "demo": measure_demo(args.backbone, args.device, photos),
        "device": describe_device(resolve_device(args.device)),
        "versions": {"lostreg": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


def measure_objects(backbone: str, device: str, photos: list[Path], rounds: int) -> dict[str, Any]:
    """Time of a run for several objects, and for refined masks, over that for the main object alone."""
    plain = Discoverer(backbone, device=device)
    contenders = {
        "one": plain,
        "five, all of them": Discoverer(plain.backbone, device=device, max_objects=5, min_score=0.0),
        "five, clear ones": Discoverer(plain.backbone, device=device, max_objects=5),
        "one, refined": Discoverer(plain.backbone, device=device, refine=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):  # the first one warms up
        for name, discoverer in contenders.items():
            taken = timed(lambda discoverer=discoverer: list(discoverer.discover_many(photos)))  # type: ignore[misc]
            if number:
                seconds[name].append(taken)
    ratios = {
        name: [other / one for other, one in zip(taken, seconds["one"], strict=True)]
        for name, taken in seconds.items()
        if name != "one"
    }
    return {
        "seconds": {name: round(statistics.median(taken), 3) for name, taken in seconds.items()},
        "ratio_to_one": {name: round(statistics.median(found), 3) for name, found in ratios.items()},
        "ratio_range": {name: [round(min(found), 3), round(max(found), 3)] for name, found in ratios.items()},
    }


def measure_demo(backbone: str, device: str, photos: list[Path]) -> dict[str, Any]:
    """Time until the demo's pictures are drawn: on a photo's first run, and after moves of the slider."""
    models = Models(DemoSettings((backbone,), Options(bias="auto", device=device)))
    options = models.settings.chosen(backbone, models.get(backbone).options.feature)
    ratios, first_times, move_times = [], [], []
    for photo in [photos[0], *photos]:  # the first one warms up
        visitor = Visitor()
        visitor.take(photo, photo.name)
        first = timed(partial(answer, visitor, "auto", models, options))
        moves = [timed(partial(answer, visitor, bias)) for bias in _BIASES]
        first_times.append(first)
        move_times.append(statistics.median(moves))
        ratios.append(move_times[-1] / first)
    return {
        "first_ms": round(1000 * statistics.median(first_times[1:]), 1),
        "slider_ms": round(1000 * statistics.median(move_times[1:]), 1),
        "slider_over_first": round(statistics.median(ratios[1:]), 4),
        "slider_over_first_worst": round(max(ratios[1:]), 4),
    }


def answer(visitor: Visitor, bias: float | str, models: Models | None = None, options: Options | None = None) -> None:
    """What the page does between a click and its pictures; without models, on features that are there."""
    if models and options:
        visitor.look(models, options, lambda _: None)
    found = visitor.discover(bias=bias)
    if visitor.study is None:
        raise AssertionError("there is nothing to draw")
    pixels = visitor.study.picture.pixels
    draw_objects(pixels, found)
    draw_degrees(pixels, found)


def timed(action: Callable[[], Any]) -> float:
    """Seconds that an action takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
