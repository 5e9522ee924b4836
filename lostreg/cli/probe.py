"""``lostreg probe``: linear heads on frozen tokens, trained or made of texts, backbones side by side."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lostreg import defaults
from lostreg.cli.build import chosen_backbones, make_discoverer, with_registers_if_any
from lostreg.cli.files import check_writable, make_folder
from lostreg.cli.options import (
    Subparsers,
    add_backbone_options,
    add_max_side,
    backbone_name,
    local_place,
    positive_int,
    tell,
)
from lostreg.cli.progress import ProgressBar
from lostreg.errors import PredictionsError

if TYPE_CHECKING:
    from lostreg.inference.discoverer import Discoverer
    from lostreg.probing.data import ProbeData

_LOWER_IS_BETTER = "RMSE"


def add_parser(commands: Subparsers) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "probe",
        help="evaluation of frozen features: classification, segmentation, depth, zero-shot",
        description="Train a linear head on the frozen tokens of each backbone, and measure it on images that it has "
        "not seen: top-1 accuracy, mIoU or RMSE, with an interval, the spread over seeds, and the difference to the "
        "first backbone on the same images. Zero-shot trains nothing: the text tower of a CLIP backbone (extra clip) "
        "makes the head of the classes' names. With --out a run that was stopped goes on with the next backbone, and "
        "others, or the same with other weights or registers, join the table. docs/probes.md has the method.",
    )
    parser.add_argument(
        "backbone", nargs="+", type=backbone_name, metavar="BACKBONE", help="rows of `lostreg backbones`, or timm:NAME"
    )
    parser.add_argument("--task", choices=defaults.PROBE_TASKS, required=True, help="what is read off the tokens")
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="DIR",
        help="classification and zero-shot: a sub-folder a class; segmentation: VOC 2012, or images and masks; depth: "
        "images and depth; in parts train and val, or one, which each seed splits",
    )
    parser.add_argument(
        "--out", type=local_place, metavar="FILE", help="every figure as JSON, written after each backbone"
    )
    parser.add_argument("--overwrite", action="store_true", help="start anew instead of adding to --out")
    parser.add_argument(
        "--tokens",
        choices=defaults.PROBE_TOKENS,
        default=defaults.PROBE_TOKENS[0],
        help="what stands for an image in classification: CLS, CLS and the mean of the patches, or that mean, which it "
        "is without CLS (default: cls)",
    )
    parser.add_argument(
        "--ignore",
        nargs="*",
        type=int,
        default=list(defaults.IGNORED),
        metavar="VALUE",
        help="values of masks that are no class (default: 255)",
    )
    parser.add_argument(
        "--seeds",
        type=positive_int,
        default=defaults.PROBE_SEEDS,
        metavar="N",
        help=f"splits that a head is trained for, each (default: {defaults.PROBE_SEEDS})",
    )
    parser.add_argument(
        "--cache",
        type=local_place,
        metavar="DIR",
        help="where the tokens are kept while the command runs (default: the system's folder for temporary files)",
    )
    add_max_side(parser, argparse.SUPPRESS, f"{defaults.PROBE_SIDE}; with zero-shot {defaults.ZERO_SHOT_SIDE}")
    add_backbone_options(parser, feature=False, lost=False, registers=True, several=True, named=False)
    parser.set_defaults(run=run, goes_on=True)


def run(args: argparse.Namespace) -> int:
    """Probe, and print the table; the exit code is 2 if any image could not be read, though the others count."""
    from lostreg.jsonio import write_json
    from lostreg.models.backbone import find_spec
    from lostreg.probing.data import load_probe_data
    from lostreg.probing.zero_shot import require_text_tower

    backbones = chosen_backbones(args)
    is_zero_shot = args.task == "zero-shot"
    if is_zero_shot:
        for name in backbones:
            require_text_tower(find_spec(name))
    if "max_side" not in args:
        args.max_side = defaults.ZERO_SHOT_SIDE if is_zero_shot else defaults.PROBE_SIDE
    if args.out:
        check_writable(args.out, "figures")
    if args.cache:
        make_folder(args.cache)
    data = load_probe_data(args.data, args.task, ignore=args.ignore)
    settings = _settings(args, data)
    records = _earlier(args, settings)
    mine: list[dict[str, Any]] = []
    apart = [False] * len(data.images) if data.held_out is None else data.held_out.tolist()
    # Register neurons are looked for in images that are not set apart to be measured on.
    images = [image for image, is_apart in zip(data.images, apart, strict=True) if not is_apart]
    try:
        for backbone in backbones:
            discoverer = with_registers_if_any(args, make_discoverer(args, backbone), images)
            mine.append(_record(args, discoverer, data, records))
            if args.out:
                args.out.absolute().parent.mkdir(parents=True, exist_ok=True)
                write_json(args.out, {"settings": settings, "backbones": records})
    finally:  # what comes next may fail
        if records:
            print("\n".join(_table(records)))
    if args.out:
        print(f"written to {args.out}")
    scores = ", ".join(f"{one['title']} {one['score']['mean']:.4g}" for one in records)
    print(f"{records[0]['metric']}: {scores}", flush=True)
    return 2 if any(one["errors"] for one in mine) else 0


def _record(
    args: argparse.Namespace, discoverer: "Discoverer", data: "ProbeData", records: list[dict[str, Any]]
) -> dict[str, Any]:
    """The figures of a backbone, which are put behind the others unless they are among them."""
    from lostreg.probing.probe import identity, probe

    who = identity(discoverer.backbone)
    known = next((one for one in records if who.items() <= one.items()), None)
    if known is not None:
        tell(f"{known['title']} is in {args.out} already")
        return known
    with ProgressBar(discoverer.backbone.title, tell_errors=True) as bar:
        found = probe(discoverer, data, tokens=args.tokens, seeds=range(args.seeds), cache=args.cache, on_progress=bar)
    records.append({**found.record(), **_facts(discoverer)})
    return records[-1]


def _settings(args: argparse.Namespace, data: "ProbeData") -> dict[str, Any]:
    """What makes figures comparable."""
    return {
        "task": args.task,
        "data": data.fingerprint(),
        "images": len(data.images),
        "classes": len(data.classes),
        "tokens": {"classification": args.tokens, "zero-shot": "cls"}.get(args.task, "patches"),
        "ignore": sorted(args.ignore) if args.task == "segmentation" else None,
        "seeds": None if args.task == "zero-shot" else args.seeds,
        "max_side": args.max_side,
        "precision": args.precision,
    }


def _facts(discoverer: "Discoverer") -> dict[str, Any]:
    from lostreg.runs.results import describe_device, package_versions

    backbone = discoverer.backbone
    return {"device": describe_device(backbone.device, backbone.dtype), "versions": package_versions()}


def _earlier(args: argparse.Namespace, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The backbones that are in the file already, from a run with the same settings."""
    from lostreg.probing.probe import ProbeResult
    from lostreg.runs.results import AFRESH, check_same_run, results_of

    if args.out is None or args.overwrite or not args.out.exists():
        return []
    records: Any = (results_of(args.out.parent, args.out.name) or {}).get("backbones")
    fields = ProbeResult.__dataclass_fields__.keys()
    if not isinstance(records, list) or not all(isinstance(one, dict) and fields <= one.keys() for one in records):
        raise PredictionsError(f"{args.out} is no file of `lostreg probe`; {AFRESH}")
    check_same_run(args.out, {"settings": settings}, place=args.out)
    return records


def _table(records: Sequence[dict[str, Any]]) -> list[str]:
    from lostreg.probing.probe import difference

    first = records[0]
    metric = first["metric"]
    name = f"{metric} (lower is better)" if metric == _LOWER_IS_BETTER else f"{metric} %"
    rows: list[tuple[str, ...]] = [("backbone", name, "over seeds", "95 % interval", "chance", "to the first (95 %)")]
    for one in records:
        gap = None if one is first else difference(first, one)
        rows.append(
            (
                one["title"],
                f"{one['score']['mean']:.4g}",
                f"+- {one['score']['deviation']:.2g}",
                "{:.4g} - {:.4g}".format(*one["interval"]),
                f"{one['chance']:.4g}",
                "" if gap is None else f"{gap[0]:+.3g} ({gap[1]:+.3g} to {gap[2]:+.3g})",
            )
        )
    if len(first["penalties"]) < 2:  # nothing was trained, or with one seed, which has no spread
        rows = [(*row[:2], *row[3:]) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for title, *figures in rows:
        cells = [title.ljust(widths[0])]
        cells += [figure.rjust(width) for figure, width in zip(figures, widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines
