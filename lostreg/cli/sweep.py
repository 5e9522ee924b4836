"""``lostreg sweep``: corloc over features, layers and biases, beside what ``auto`` makes of them."""

import argparse
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lostreg.cli.build import (
    OBJECTNESS_FILE,
    REGISTERS_FILE,
    make_discoverer,
    open_benchmark,
    transductive,
    with_objectness,
    with_registers,
)
from lostreg.cli.files import check_place
from lostreg.cli.options import (
    Subparsers,
    add_backbone_options,
    add_benchmark_options,
    add_frame,
    add_max_side,
    add_method_choice,
    as_finite,
    run_place,
)
from lostreg.cli.progress import ProgressBar, describe_misses, judge_failures
from lostreg.models.table import FEATURES

if TYPE_CHECKING:
    from lostreg.runs.sweep import SweepRow

_BIASES = "-0.95:0.25:25"
_PLOT = "sweep.png"


def add_parser(commands: Subparsers) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "sweep",
        help="corloc over features, layers and biases, beside the automatic bias",
        description="Score many fixed biases on many features of a backbone, from one forward an image, beside the "
        "automatic bias: what labels could choose at best, and what is reached without them. Features are "
        "L2-normalised. A run that was stopped goes on where it was.",
    )
    parser.add_argument("benchmark", help="voc07, voc12, coco20k, sample, voc or coco: see `lostreg datasets`")
    parser.add_argument(
        "--out",
        type=run_place,
        required=True,
        metavar="DIR",
        help="folder for sweep.jsonl, sweep.json and sweep.png, or a URI (s3://BUCKET/DIR and so on)",
    )
    parser.add_argument("--overwrite", action="store_true", help="start anew instead of going on")
    parser.add_argument(
        "--features", nargs="+", choices=FEATURES, default=FEATURES, help=f"(default: {' '.join(FEATURES)})"
    )
    parser.add_argument(
        "--layers",
        nargs="+",
        type=int,
        default=(-1,),
        metavar="LAYER",
        help="blocks, from 0, or from the end when negative (default: -1)",
    )
    parser.add_argument(
        "--biases",
        type=bias_list,
        default=_BIASES,
        metavar="LOW:HIGH:COUNT|LIST",
        help=f"so many biases from LOW to HIGH, or a list with commas (default: {_BIASES})",
    )
    add_method_choice(parser.add_argument_group("objects"))
    add_benchmark_options(parser)
    add_frame(parser)
    add_max_side(parser, None)
    add_backbone_options(parser, feature=False, registers=True)
    parser.set_defaults(run=run, goes_on=True)


def bias_list(text: str) -> tuple[float, ...]:
    """``LOW:HIGH:COUNT``, or numbers with commas between them, for argparse."""
    ends, commas = text.split(":"), text.split(",")
    if len(ends) == 3:
        low, high = as_finite(ends[0]), as_finite(ends[1])
        count = int(ends[2]) if ends[2].isdecimal() else 0
        if low is not None and high is not None and low < high and 2 <= count <= 1000:
            return tuple(round(low + (high - low) * index / (count - 1), 6) for index in range(count))
    else:
        values = [value for value in map(as_finite, commas) if value is not None]
        if len(values) == len(commas):
            return tuple(values)
    raise argparse.ArgumentTypeError(
        f"expected LOW:HIGH:COUNT with LOW < HIGH and COUNT from 2 to 1000, or numbers with commas, not '{text}'"
    )


def run(args: argparse.Namespace) -> int:
    """Sweep, and print the table."""
    from lostreg.models.features import resolve_layer
    from lostreg.runs.remote import folder_of
    from lostreg.runs.sweep import LINES_FILE, RESULTS_FILE, sweep
    from lostreg.runs.sweep_figure import plot_sweep

    check_place(args.out)
    benchmark = open_benchmark(args)
    discoverer = make_discoverer(args, args.backbone, exif=False)  # but for images of which more is known
    for layer in args.layers:
        resolve_layer(discoverer.backbone, layer)  # before anything is looked for in images
    paths = [example.source for example in benchmark.examples]
    with folder_of(args.out) as folder:
        discoverer = with_registers(args, discoverer, paths, kept=folder / REGISTERS_FILE)
        discoverer = with_objectness(args, discoverer, paths, kept=folder / OBJECTNESS_FILE)
        marks = {"transductive": True} if transductive(args, discoverer, paths) else {}
        with ProgressBar(args.backbone) as bar:
            rows = sweep(
                benchmark,
                discoverer,
                [(feature, layer) for layer in args.layers for feature in args.features],
                args.biases,
                folder,
                overwrite=args.overwrite,
                extra={"limit": args.limit, "no_hard": args.no_hard, **marks},
                on_progress=bar,
            )
        plot_sweep(folder / _PLOT, rows, f"{args.backbone} on {benchmark.title}, {len(benchmark)} images")
    print(_table(rows, args.method))
    unreadable = rows[0].auto.images - len(rows[0].auto_biases)
    if unreadable:
        print(describe_misses(unreadable, bar.unavailable))
    print(f"written to {args.out}: {LINES_FILE}, {RESULTS_FILE}, {_PLOT}")
    print(_last_line(rows), flush=True)
    return judge_failures(unreadable, bar.unavailable, len(benchmark), retry="--overwrite")


def _table(rows: "Sequence[SweepRow]", method: str) -> str:
    heading = "feature  layer   auto  95 % interval  median bias   AUC   best fixed  at bias  auto - best"
    lines = [heading if rows[0].other is None else f"{heading}  {method:>8}"]
    for row in rows:
        low, high = row.auto.wilson_interval()
        auc = " -  " if row.auc is None else f"{row.auc:.2f}"
        median = f"{statistics.median(row.auto_biases):.3f}" if row.auto_biases else "-"
        behind = "" if row.other is None else f"  {row.other.percent:>8.2f}"
        gap = f"{row.difference:>+11.2f}{behind}"
        lines.append(
            f"{row.feature:<7}  {row.layer:>5}  {row.auto.percent:>5.2f}  {low:>5.2f} - {high:<5.2f}  {median:>11}  "
            f"{auc}  {row.fixed[row.best].percent:>10.2f}  {row.biases[row.best]:>7.3f}  {gap}"
        )
    return "\n".join(lines)


def _last_line(rows: "Sequence[SweepRow]") -> str:
    from lostreg.runs.sweep import summary

    ends = summary(rows)
    count = f"{len(rows)} feature{'s' if len(rows) > 1 else ''}"
    return f"auto - best fixed: mean {ends['mean']:+.2f}, worst {ends['worst']:+.2f} ({count})"
