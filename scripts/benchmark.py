"""Measure lostreg beside the loop it replaces and beside the bare backbone, on the same images, in one run.

python scripts/benchmark.py                               the generated images alone: anyone can run it
python scripts/benchmark.py --images coco-sample/train2017   a folder of photographs as well
python scripts/benchmark.py --quick                       minutes instead of the better part of an hour

Contenders, each in a process of its own, take turns for several rounds, so that what else the machine does meets all
of them; speeds are reported as the median over rounds of ratios within a round.

* naive: one image at a time, the whole network with the last layer's attention written out, LOST on the host.
* backbone: timm's own forward over tensors that are on the device already, batched by shape: the limit for whoever
  computes the whole network. Once as it comes, once with lostreg's setting of the C library's allocator.
* lostreg: `Discoverer.discover_many` from JPEG files to boxes, with the automatic bias; and with one bias, parts, five
  objects or refined masks, which are compared with that.

On a GPU, lostreg and the bare backbone go over the images several times a round, so that a round lasts; what share of
the time any kernel runs is reported, and how many images a second are decoded.

Writes one JSON file, with versions and device, to --out; `make docs` puts its figures into the README.
"""

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import cycle, islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final
from unittest import mock

import cv2
import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from lostreg.defaults import BATCH_SIZE, CUDA_BATCH_SIZE, Precision
from lostreg.images.allocator import keep_freed_memory
from lostreg.images.boxes import pairwise_iou
from lostreg.images.decode import read_image
from lostreg.images.patches import PatchedPicture, cut_patches
from lostreg.inference.discoverer import Discoverer
from lostreg.inference.jobs import FeaturesJob, ObjectsJob
from lostreg.jsonio import write_json
from lostreg.methods.lost import Bias, Lost, lost_boxes
from lostreg.models.backbone import Backbone, build_backbone, find_spec, load_backbone, resolve_device
from lostreg.runs.results import describe_device, package_versions, processor_name
from lostreg.runs.sweep import with_trials

DTYPES: Final[dict[Precision, torch.dtype]] = {"fp32": torch.float32, "bf16": torch.bfloat16}
GROWTH: Final = (500, 1000, 2000, 5000, 10_000, 20_000)
BUCKETING: Final = ((8, 32), (32, 128))  # batch sizes, and images that plain bucketing by shape looks ahead
# Width, height and weight of photographs: the common sizes of COCO; the rest is 640 wide or high and anything beside.
COMMON_SIZES: Final = (
    (640, 480, 21),
    (640, 427, 13),
    (480, 640, 10),
    (640, 426, 5),
    (427, 640, 4),
    (640, 428, 3),
    (500, 375, 4),
    (500, 333, 2),
    (375, 500, 2),
    (640, 360, 2),
)
UNCOMMON_SHARE: Final = 0.3
SWEPT: Final = tuple(np.linspace(-0.95, 0.25, 25).tolist())  # the biases that `lostreg sweep` tries unless told


@dataclass(frozen=True)
class Contender:
    """One way to get from images to features or boxes."""

    name: str
    kind: str  # naive, backbone or lostreg
    precision: Precision = "fp32"
    compiled: bool = False
    keeps_memory: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)  # of lostreg's, beside these

    def repeats(self, most: int) -> int:
        """How often it goes over the images in a round: the slower the less."""
        return 1 if self.kind == "naive" else most if self.precision == "bf16" else -(-most // 4)


CONTENDERS: Final = (
    Contender("naive fp32", "naive"),
    Contender("backbone fp32", "backbone"),
    Contender("backbone fp32, same allocator", "backbone", keeps_memory=True),
    Contender("lostreg fp32", "lostreg"),
    Contender("backbone bf16", "backbone", "bf16"),
    Contender("backbone bf16, same allocator", "backbone", "bf16", keeps_memory=True),
    Contender("lostreg bf16", "lostreg", "bf16"),
    Contender("lostreg bf16 compiled", "lostreg", "bf16", compiled=True),
    Contender("lostreg fp32, one bias", "lostreg", options={"bias": -0.5}),
    Contender("lostreg fp32, parts", "lostreg", options={"method": "parts"}),
    Contender("lostreg fp32, 5 objects", "lostreg", options={"max_objects": 5, "min_score": 0.0}),
    Contender("lostreg fp32, refined masks", "lostreg", options={"refine": True}),
)
LARGE: Final = "dinov2_vitl14_reg"  # of which fewer processes fit into memory
REFERENCE: Final = "lostreg fp32"  # whose boxes the others' are compared with
# What is divided by what; the first of each pair is the better the larger.
RATIOS: Final = (
    ("lostreg fp32", "backbone fp32"),
    ("lostreg fp32", "backbone fp32, same allocator"),
    ("lostreg fp32", "naive fp32"),
    ("lostreg bf16", "backbone bf16"),
    ("lostreg bf16", "backbone bf16, same allocator"),
    ("lostreg bf16", "naive fp32"),
    ("lostreg bf16 compiled", "backbone bf16"),
    ("lostreg bf16 compiled", "backbone bf16, same allocator"),
    ("lostreg bf16 compiled", "naive fp32"),
    ("lostreg fp32", "lostreg fp32, one bias"),
    ("lostreg fp32, parts", "lostreg fp32"),
    ("lostreg fp32, 5 objects", "lostreg fp32"),
    ("lostreg fp32, refined masks", "lostreg fp32"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write, and print the ratios."""
    args = parse_arguments(argv)
    device = resolve_device(args.device)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.bias_cost:
        return measure_biases(args, device)
    with tempfile.TemporaryDirectory() as folder:
        sets = image_sets(args, Path(folder))
        plan = [
            (name, images, min(len(sets[images]), limit))
            for name, images, limit in (
                ("dinov2_vits14_reg", "480x640", args.count),
                ("dinov2_vits14_reg", "mix", args.count),
                (LARGE, "mix", max(2, args.count // (4 if device.type == "cuda" else 6))),
                ("imgfocus_vits14", "photographs", args.count),
            )
            if images in sets and (not args.backbone or name in args.backbone)
        ]
        result: dict[str, Any] = {
            "device": describe_device(device),
            "cpu": processor_name(),
            "threads": torch.get_num_threads(),
            "versions": {"python": platform.python_version(), **package_versions()},
            "settings": {"rounds": args.rounds, "batch_size": args.batch_size, "repeats": args.repeats},
            "bucketing": bucketing(),
            "runs": [],
            "growth": [],
        }
        for name, images, limit in plan:
            print(f"\n{name}, {images}, {limit} images", flush=True)
            files = (
                sets[images] if images == "photographs" else sets[images][:limit]
            )  # random weights: no boxes to judge
            run = compare(name, files, limit, device, args)
            result["runs"].append({"backbone": name, "images": images, **run})
            write_json(args.out, result)
        for count in args.growth:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:  # with a peak of its own
                result["growth"].append(process.submit(growth, count, str(device)).result())
            print("growth", result["growth"][-1], flush=True)
            write_json(args.out, result)
    print(f"\nwritten to {args.out}")
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description="Measure lostreg beside naive loop and bare backbone.")
    parser.add_argument("--images", type=Path, metavar="DIR", help="photographs (*.jpg) for the trained backbone")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, help="of backbone and lostreg (default: lostreg's own)")
    parser.add_argument("--count", type=int, help="images a set (default: 12, on CUDA 256)")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument(
        "--repeats", type=int, help="of the images in a round: in fp32 a quarter, naive 1 (default: 1, on CUDA 32)"
    )
    parser.add_argument("--backbone", nargs="+", help="only these")
    names = [contender.name for contender in CONTENDERS]
    parser.add_argument(
        "--contender", nargs="+", choices=names, default=names, metavar="NAME", help=f"only these and {REFERENCE}"
    )
    parser.add_argument(
        "--growth", type=int, nargs="*", default=GROWTH, metavar="PATCHES", help="points of the growth curve"
    )
    parser.add_argument("--bias-cost", action="store_true", help="measure what biases cost, and nothing else")
    parser.add_argument("--quick", action="store_true", help="8 images, 1 round, no growth curve")
    parser.add_argument("--out", type=Path, help="default: eval/results/(benchmark|bias-cost)-DEVICE.json")
    args = parser.parse_args(argv)
    kind = resolve_device(args.device).type
    if args.quick:
        args.count, args.rounds, args.growth = 8, 1, ()
    args.count = args.count or (256 if kind == "cuda" else 12)
    args.repeats = args.repeats or (32 if kind == "cuda" else 1)
    args.out = args.out or Path("eval/results") / f"{'bias-cost' if args.bias_cost else 'benchmark'}-{kind}.json"
    return args


# Images


def image_sets(args: argparse.Namespace, folder: Path) -> dict[str, list[Path]]:
    """Files of each set: two generated ones, and the photographs if there are any."""
    random = np.random.default_rng(0)
    sizes = {"480x640": [(640, 480)] * args.count, "mix": [any_size(random) for _ in range(args.count)]}
    save = partial(save_picture, folder)
    with ThreadPoolExecutor() as pool:
        sets = {
            name: list(pool.map(save, [f"{name}-{number}.jpg" for number in range(args.count)], wanted))
            for name, wanted in sizes.items()
        }
    if args.images:
        photographs = sorted(args.images.glob("*.jpg"))
        if not photographs:
            sys.exit(f"no *.jpg in {args.images}")
        sets["photographs"] = photographs
    return sets


def any_size(random: np.random.Generator) -> tuple[int, int]:
    """Width and height of a picture of a COCO-like mix."""
    if random.random() < UNCOMMON_SHARE:
        other = int(random.integers(320, 641))
        return (640, other) if random.random() < 0.7 else (other, 640)
    weights = np.array([weight for *_, weight in COMMON_SIZES], dtype=float)
    width, height, _ = COMMON_SIZES[random.choice(len(COMMON_SIZES), p=weights / weights.sum())]
    return width, height


def save_picture(folder: Path, name: str, size: tuple[int, int]) -> Path:
    """A JPEG of ellipses over smooth noise, drawn by its name, which takes about as long to decode as a photograph."""
    random, (width, height) = np.random.default_rng(list(name.encode())), size
    coarse = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    pixels = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    for _ in range(12):
        centre, axes = random.integers(0, (width, height)), random.integers(10, 120, 2)
        colour = random.integers(0, 256, 3).tolist()
        cv2.ellipse(pixels, centre.tolist(), axes.tolist(), float(random.integers(180)), 0, 360, colour, -1)
    noisy = pixels + random.normal(0, 12, pixels.shape)
    path = folder / name
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return path


def grid_of(path: Path, patch: int) -> tuple[int, int]:
    """Rows and columns of patches of a file."""
    with Image.open(path) as image:
        return -(-image.height // patch), -(-image.width // patch)


# Contenders, each in a process of its own


def compare(
    name: str, images: list[Path], limit: int, device: torch.device, args: argparse.Namespace
) -> dict[str, Any]:
    """Rounds in which each contender runs over some images once; then the boxes of all images in each precision."""
    paths = images[:limit]
    batch_size = args.batch_size or (CUDA_BATCH_SIZE if device.type == "cuda" else BATCH_SIZE)
    patch = find_spec(name).patch_size
    grids = [grid_of(path, patch) for path in paths]
    is_small = name != LARGE
    contenders = [
        contender
        for contender in CONTENDERS
        if contender.name in {REFERENCE, *args.contender} and (is_small or not contender.options)
    ]
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    report: dict[str, Any] = {
        "count": len(paths),
        "mean_patches": round(statistics.mean(rows * columns for rows, columns in grids), 1),
        "grids": len(set(grids)),
    }
    with workers(contenders, name, paths, images, str(device), batch_size) as ask:
        for number in range(args.rounds):
            for contender in contenders:
                repeats = contender.repeats(args.repeats)
                seconds[contender.name].append(ask(contender, "run", repeats) / repeats)
                speed = len(paths) / seconds[contender.name][-1]
                print(f"  round {number + 1}  {contender.name:32s} {speed:8.3f} images/s", flush=True)
        report["contenders"] = {
            contender.name: {
                **asdict(contender),
                "images_per_s": round(len(paths) / statistics.median(seconds[contender.name]), 3),
                "seconds": [round(value, 3) for value in seconds[contender.name]],
                "peak_mb": ask(contender, "peak"),
            }
            for contender in contenders
        }
        mine = [contender for contender in contenders if contender.kind == "lostreg"]
        report["split"] = {contender.name: ask(contender, "split") for contender in mine}
        if device.type == "cuda":
            report["busy"] = {
                contender.name: ask(contender, "busy", -(-contender.repeats(args.repeats) // 4))
                for contender in contenders
            }
            decoded = ask(mine[0], "decode", args.repeats)
            report["decoded_per_s"] = round(args.repeats * len(paths) / decoded, 1)
        boxes = {contender.name: ask(contender, "boxes") for contender in mine if not contender.options}
    report["ratios"] = {
        f"{first} / {second}": round(
            statistics.median(b / a for a, b in zip(seconds[first], seconds[second], strict=True)), 3
        )
        for first, second in RATIOS
        if first in seconds and second in seconds
    }
    report["boxes_compared"] = len(images)
    report["same_boxes"] = {
        name: round(float(np.mean([overlap >= 0.9 for overlap in overlaps(boxes[REFERENCE], found)])), 4)
        for name, found in boxes.items()
        if name != REFERENCE
    }
    for key in ("ratios", "same_boxes", "split", "busy", "decoded_per_s"):
        if key not in report:
            continue
        print(" ", key, json.dumps(report[key], indent=2))
    return report


def overlaps(first: np.ndarray, second: np.ndarray) -> list[float]:
    """IoU of each image's box in two runs."""
    return [float(pairwise_iou(a[None], b[None])[0, 0]) for a, b in zip(first, second, strict=True)]


def bucketing() -> list[dict[str, Any]]:
    """How full batches of one shape would be on the generated mix, by arithmetic alone: packing makes it 1."""
    random = np.random.default_rng(0)
    grids = [(-(-height // 14), -(-width // 14)) for width, height in (any_size(random) for _ in range(4096))]
    return [
        {"batch_size": size, "window": window, "fill": round(bucket_fill(grids, size, window), 3)}
        for size, window in BUCKETING
    ]


def bucket_fill(grids: list[tuple[int, int]], batch_size: int, window: int) -> float:
    """How full batches of one shape are that are gathered within windows."""
    batches = 0
    for start in range(0, len(grids), window):
        part = grids[start : start + window]
        batches += sum(-(-part.count(grid) // batch_size) for grid in set(part))
    return len(grids) / (batches * batch_size)


@contextmanager
def workers(
    contenders: list[Contender], name: str, paths: list[Path], images: list[Path], device: str, batch_size: int
) -> Iterator[Callable[..., Any]]:
    """One process a contender, ready and warm; yields a way to have one of them do something."""
    context = multiprocessing.get_context("spawn")
    connections: dict[str, Connection] = {}
    processes = []
    for contender in contenders:
        ours, theirs = context.Pipe()
        process = context.Process(
            target=work, args=(theirs, contender, name, paths, images, device, batch_size), daemon=True
        )
        process.start()
        theirs.close()
        connections[contender.name] = ours
        processes.append(process)
    for connection in connections.values():
        connection.recv()  # warm

    def ask(contender: Contender, what: str, repeats: int = 1) -> Any:
        connections[contender.name].send((what, repeats))
        return connections[contender.name].recv()

    try:
        yield ask
    finally:
        for connection in connections.values():
            connection.close()
        for process in processes:
            process.join(timeout=30)


def work(
    connection: Connection,
    contender: Contender,
    name: str,
    paths: list[Path],
    images: list[Path],
    device: str,
    batch_size: int,
) -> None:
    """The life of a contender's process."""
    where = torch.device(device)
    run, discoverer = prepare(contender, name, paths, where, batch_size)
    run(min(len(paths), batch_size))  # warm-up, compilation included
    connection.send("ready")
    while True:
        try:
            what, repeats = connection.recv()
        except EOFError:
            return
        if what == "run":
            connection.send(timed(lambda: run(repeats * len(paths)), where))  # noqa: B023 - at once
        elif what == "busy":
            connection.send(busy_share(lambda: run(repeats * len(paths)), where))  # noqa: B023
        elif what == "peak":
            connection.send(peak_mb(where))
        elif what == "split" and discoverer is not None:
            connection.send(split(discoverer, paths))
        elif what == "decode" and discoverer is not None:
            decoded = discoverer.stream_of(DecodedJob(discoverer.backbone)).outcomes
            connection.send(timed(lambda: list(decoded(paths * repeats)), where))  # noqa: B023
        elif what == "boxes" and discoverer is not None:
            connection.send(np.stack([found.xyxy[0] for found in discoverer.discover_many(images)]))


def prepare(
    contender: Contender, name: str, paths: list[Path], where: torch.device, batch_size: int
) -> tuple[Callable[[int], None], Discoverer | None]:
    """What a contender runs over the first so many images, and lostreg's object where it is lostreg."""
    if contender.keeps_memory or contender.kind == "lostreg":  # as its command line does
        keep_freed_memory()
    backbone = benchmark_backbone(name, where)
    if contender.kind == "lostreg":  # which places the model itself, as for its users
        discoverer = Discoverer(
            backbone,
            device=where,
            precision=contender.precision,
            batch_size=batch_size,
            compile=contender.compiled,
            max_side=None,
            **contender.options,
        )
        return lostreg_run(discoverer, paths), discoverer
    backbone.model.to(DTYPES[contender.precision])
    if contender.kind == "naive":
        return naive_run(backbone, paths), None
    return backbone_run(backbone, paths, batch_size), None


def benchmark_backbone(name: str, device: torch.device) -> Backbone:
    """The offline backbone with its weights, others with random ones, in fp32: they cost the same."""
    if find_spec(name).offline:
        return load_backbone(name, device=device)
    torch.manual_seed(0)
    backbone = build_backbone(find_spec(name))
    backbone.model.to(device=device)
    return backbone


def lostreg_run(discoverer: Discoverer, paths: list[Path]) -> Callable[[int], None]:
    """From files to boxes: of so many images, from the first on again if need be."""

    def run(limit: int) -> None:
        for _ in discoverer.discover_many(islice(cycle(paths), limit)):
            pass

    return run


def backbone_run(backbone: Backbone, paths: list[Path], batch_size: int) -> Callable[[int], None]:
    """Timm's forward alone, batched by shape; on a CPU one image at a time where that is quicker."""
    patch = backbone.spec.patch_size
    model: Any = backbone.model

    def batches(size: int) -> list[torch.Tensor]:
        by_grid: dict[tuple[int, int], int] = defaultdict(int)
        for path in paths:
            by_grid[grid_of(path, patch)] += 1
        parts = [
            ((min(size, number - start), 3, grid[0] * patch, grid[1] * patch))
            for grid, number in by_grid.items()
            for start in range(0, number, size)
        ]
        return [torch.randn(shape, device=backbone.device, dtype=backbone.dtype) for shape in parts]

    @torch.no_grad()
    def forward(tensors: Sequence[torch.Tensor]) -> None:
        for tensor in tensors:
            model.forward_features(tensor)

    best = batches(batch_size)
    if backbone.device.type == "cpu":
        several = best[0]
        one_by_one = list(torch.split(several, 1))
        forward(one_by_one[:1])
        if timed(lambda: forward(one_by_one), backbone.device) < timed(lambda: forward([several]), backbone.device):
            best = batches(1)
    return lambda limit: forward(best * (limit // len(paths)) or best[:1])


def naive_run(backbone: Backbone, paths: list[Path]) -> Callable[[int], None]:
    """The loop of the public code, in our words: decode, a batch of one, the whole network, LOST on the host."""
    model: Any = backbone.model
    attention = model.blocks[-1].attn
    attention.fused_attn = False  # the attention matrix is written out, as the public code asks for it
    kept: list[torch.Tensor] = []
    attention.qkv.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (backbone.mean, backbone.std))
    patch = backbone.spec.patch_size

    @torch.no_grad()
    def run(limit: int) -> None:
        for path in paths[:limit]:
            with Image.open(path) as image:
                pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
            pixels = (pixels - mean) / std
            height, width = pixels.shape[1:]
            grid = -(-height // patch), -(-width // patch)
            padded = torch.zeros(1, 3, grid[0] * patch, grid[1] * patch)
            padded[0, :, :height, :width] = pixels
            model.forward_features(padded.to(backbone.device))
            keys = kept.pop()[0, backbone.prefix_tokens :].chunk(3, dim=1)[1]
            host_lost(keys.float().cpu(), grid)

    return run


def host_lost(features: torch.Tensor, grid: tuple[int, int]) -> tuple[int, int, int, int]:
    """LOST with a whole Gram matrix on the host, at bias 0."""
    gram = features @ features.T
    order = torch.argsort((gram > 0).sum(dim=1))
    seed = order[0]
    companions = order[:100][gram[seed, order[:100]] > 0]
    mask = (gram[companions].sum(dim=0) > 0).view(grid).numpy()
    labels, _ = ndimage.label(mask)
    rows, columns = np.nonzero(labels == labels[seed // grid[1], seed % grid[1]])
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


# Measuring


def timed(action: Callable[[], object], device: torch.device) -> float:
    """Seconds that something takes, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_mb(device: torch.device) -> float:
    """Most memory this process has held on the device so far, in MB (10^6 bytes)."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e6, 1)
    return round(resident_peak() / 1e6, 1)


def resident_peak() -> int:
    """Bytes. Linux tells it of this process alone; elsewhere it may be the parent's, in bytes on macOS."""
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class DecodedJob:
    """The work of an `ImageStream` that does nothing with the images."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone

    def start(self, pictures: Sequence[PatchedPicture]) -> None:
        """Nothing."""

    def finish(self, started: None, pictures: Sequence[PatchedPicture]) -> list[int]:
        """How many patches each has."""
        del started
        return [picture.grid[0] * picture.grid[1] for picture in pictures]


def busy_share(action: Callable[[], object], device: torch.device) -> float:
    """The share of the time between an action's first kernel and its last in which the GPU did anything."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        action()
        synchronize(device)
    spans: list[tuple[float, float]] = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.device_type == DeviceType.CUDA
    )
    busy, end = 0.0, spans[0][0]
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return round(busy / (end - spans[0][0]), 4)


def split(discoverer: Discoverer, paths: list[Path]) -> dict[str, float]:
    """Where the time of one run over the images goes, in shares of it; decoding happens in threads beside the rest.

    The stages wait for the device here, so the whole is slower than a run that is not watched.
    """
    spent: dict[str, float] = defaultdict(float)
    device = discoverer.backbone.device

    def watch(owner: object, method: str, stage: str, where: torch.device) -> AbstractContextManager[object]:
        original = getattr(owner, method)

        def watched(*arguments: Any) -> Any:
            results: list[Any] = []
            seconds = timed(lambda: results.append(original(*arguments)), where)
            spent[stage] += seconds
            return results[0]

        return mock.patch.object(owner, method, watched)

    with ExitStack() as watches:
        watches.enter_context(watch(discoverer.stream, "_read", "decode (threads)", torch.device("cpu")))
        for owner, method, stage in (
            (discoverer.features, "transfer", "transfer"),
            (discoverer.features, "forward", "forward"),
            (discoverer.stream.job, "search", "LOST"),
            (discoverer.stream.job, "candidates", "host"),
        ):
            watches.enter_context(watch(owner, method, stage, device))
        total = timed(lambda: lostreg_run(discoverer, paths)(len(paths)), device)
    shares = {stage: round(seconds / total, 5) for stage, seconds in spent.items()}
    waited = 1 - sum(share for stage, share in shares.items() if stage != "decode (threads)")
    return {**shares, "rest": round(waited, 5), "seconds": round(total, 3)}


def measure_biases(args: argparse.Namespace, device: torch.device) -> int:
    """What the automatic bias and a sweep's biases add to a run, in each precision; written and printed."""
    if device.type == "cpu":
        keep_freed_memory()
    result = {
        "device": describe_device(device),
        "cpu": processor_name(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **package_versions()},
        "rounds": args.rounds,
        "runs": [bias_cost(precision, device, args.rounds) for precision in DTYPES],
    }
    write_json(args.out, result)
    print(json.dumps(result["runs"], indent=2))
    print(f"\nwritten to {args.out}")
    return 0


def bias_cost(precision: Precision, device: torch.device, rounds: int) -> dict[str, Any]:
    """Seconds for one 640x480 image: the forward, and LOST from features to boxes with several kinds of bias."""
    discoverer = Discoverer(
        benchmark_backbone("dinov2_vits14_reg", device),
        device=device,
        precision=precision,
        max_side=None,
    )
    picture = cut_patches(read_image(np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)), 14)
    keys = FeaturesJob(discoverer.backbone, [("k", -1)])
    biases: dict[str, Bias] = {"one bias": -0.5, "auto": "auto", "auto and 25 biases": with_trials(SWEPT)}
    jobs = {
        name: ObjectsJob(keys, Lost(bias, 100), normalize=True, convert=lambda _, pictures: pictures)
        for name, bias in biases.items()
    }
    patches = keys.transfer([picture])
    features = keys.forward(patches, [picture.size])
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(10 * rounds):
        seconds["forward"].append(timed(lambda: keys.forward(patches, [picture.size]), device))
        for name, job in jobs.items():
            take = partial(lambda job: job.candidates(job.search(features, [picture.grid])), job)
            seconds[name].append(timed(take, device))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    run = medians["forward"] + medians["one bias"]
    return {
        "precision": precision,
        "patches": picture.grid[0] * picture.grid[1],
        "seconds": {name: round(value, 5) for name, value in medians.items()},
        "auto_share_of_run": round((medians["auto"] - medians["one bias"]) / run, 4),
        "swept_over_one_bias": round((medians["forward"] + medians["auto and 25 biases"]) / run, 3),
    }


def growth(count: int, device: str) -> dict[str, Any]:
    """LOST's time and peak memory above the features, then one whole image's, at some number of patches."""
    where = torch.device(device)
    keep_freed_memory()
    columns = round(count**0.5)
    grid = (round(count / columns), columns)
    features = torch.randn(1, grid[0] * grid[1], 384, device=where).add_(0.5)
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
    small = torch.randn(1, 64, 384, device=where)
    search(small, (8, 8))  # libraries are loaded
    before = peak_bytes(where)
    first = timed(lambda: search(features, grid), where)
    memory = peak_bytes(where) - before
    seconds = min(first, *(timed(lambda: search(features, grid), where) for _ in range(2)))
    backbone = benchmark_backbone("dinov2_vits14_reg", where)
    discoverer = Discoverer(backbone, device=where, max_side=None)
    patch = backbone.spec.patch_size
    picture = np.random.default_rng(0).integers(0, 256, (grid[0] * patch, grid[1] * patch, 3), dtype=np.uint8)
    whole = timed(lambda: [*discoverer.discover_many([picture])], where)
    return {
        "patches": grid[0] * grid[1],
        "lost_seconds": round(seconds, 4),
        "lost_peak_mb": round(memory / 1e6, 1),
        "gram_mb": round((grid[0] * grid[1]) ** 2 * 4 / 1e6, 1),
        "image_seconds": round(whole, 3),
    }


def peak_bytes(device: torch.device) -> int:
    """Most memory held so far: by tensors on a GPU, by the process on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_peak()


def search(features: torch.Tensor, grid: tuple[int, int]) -> None:
    """LOST with the automatic bias, from features on the device to boxes on the host."""
    lost_boxes(features, grid, "auto")


if __name__ == "__main__":
    sys.exit(main())
