"""``lostreg eval``: predict and score a benchmark, going on where an earlier run stopped."""

import argparse
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lostreg.cli.build import (
    OBJECTNESS_FILE,
    REGISTERS_FILE,
    asked_session,
    asked_workers,
    chosen_backbones,
    make_discoverer,
    open_benchmark,
    transductive,
    with_objectness,
    with_registers,
)
from lostreg.cli.files import check_place, check_written
from lostreg.cli.options import (
    Subparsers,
    add_benchmark_options,
    add_frame,
    add_max_side,
    add_method_options,
    add_object_options,
    add_workers,
    run_place,
    tell,
)
from lostreg.cli.progress import ProgressBar, describe_misses, judge_failures
from lostreg.defaults import MAPS_FILE, PREDICTIONS_FILE, RESULTS_FILE
from lostreg.errors import OptionError

if TYPE_CHECKING:
    from lostreg.datasets import Benchmark, Example
    from lostreg.inference.discovery import Discovery
    from lostreg.runs.cluster import RaySession
    from lostreg.runs.evaluate import Evaluation, Hook

PLOTS: Final = "plots"


def add_parser(commands: Subparsers) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "eval",
        help="predict and score a benchmark",
        description="Predict every image of a benchmark and print its corloc. A run that was stopped, by whatever, "
        "goes on where it was. The last line is like `corloc 61.90 (3102/5011)`, or one table for several "
        "backbones.",
    )
    parser.add_argument("benchmark", help="voc07, voc12, coco20k, sample, voc or coco: see `lostreg datasets`")
    parser.add_argument(
        "--out",
        type=run_place,
        required=True,
        metavar="DIR",
        help="folder for predictions.jsonl, maps.jsonl and results.json; several backbones get a folder each in it; or "
        "a URI (s3://BUCKET/DIR and so on), to which they are copied in the end",
    )
    parser.add_argument("--overwrite", action="store_true", help="start anew instead of going on")
    parser.add_argument("--strict", action="store_true", help="stop at the first image that cannot be read")
    parser.add_argument("--plots", action="store_true", help="a picture per image, in OUT/plots")
    add_benchmark_options(parser)
    add_frame(parser)
    add_max_side(parser, None)
    add_object_options(parser)
    add_method_options(parser, several_backbones=True)
    add_workers(parser)
    parser.set_defaults(run=run, goes_on=True)


def run(args: argparse.Namespace) -> int:
    """Evaluate every backbone that was asked for; for the exit code see `judge_failures`."""
    from lostreg.runs.remote import folder_of

    backbones = chosen_backbones(args)
    if args.ray is not None and args.plots:
        raise OptionError("--plots are drawn where one process computes: leave out --ray")
    check_place(args.out)
    benchmark = open_benchmark(args)
    with folder_of(args.out) as folder:
        code = _evaluate_all(args, benchmark, backbones, folder)
    if isinstance(args.out, str):
        tell(f"written to {args.out}")
    return code


def _evaluate_all(args: argparse.Namespace, benchmark: "Benchmark", backbones: list[str], folder: Path) -> int:
    with asked_session(args) as session:
        if len(backbones) == 1:
            return _exit_code(_evaluate(args, benchmark, backbones[0], folder, session))
        found: dict[str, Evaluation] = {}
        try:
            for backbone in backbones:
                out = folder / backbone.replace(":", "_")
                found[backbone] = _evaluate(args, benchmark, backbone, out, session)
        finally:
            if found:  # where one fails, those before it are not lost
                print(_table(found), flush=True)
    return max(map(_exit_code, found.values()))


def _exit_code(evaluation: "Evaluation") -> int:
    unreadable, unavailable = evaluation.unreadable, evaluation.unavailable
    return judge_failures(unreadable, unavailable, evaluation.score.images, retry="--overwrite")


def _evaluate(
    args: argparse.Namespace, benchmark: "Benchmark", backbone: str, out: Path, session: "RaySession | None"
) -> "Evaluation":
    from lostreg.runs.evaluate import evaluate
    from lostreg.runs.locate import is_file

    discoverer = make_discoverer(args, backbone, exif=False)  # but for images of which more is known
    paths = [example.source for example in benchmark.examples]
    discoverer = with_registers(args, discoverer, paths, kept=out / REGISTERS_FILE)
    discoverer = with_objectness(args, discoverer, paths, kept=out / OBJECTNESS_FILE)
    taught = transductive(args, discoverer, paths)
    plots: list[Path] = []
    workers = asked_workers(args, session, discoverer)
    with ProgressBar(backbone) as bar:
        evaluation = evaluate(
            benchmark,
            discoverer,
            out,
            overwrite=args.overwrite,
            strict=args.strict,
            masks=args.masks is not None,
            extra={
                "limit": args.limit,
                "no_hard": args.no_hard,
                **({"transductive": True} if taught else {}),
            },
            workers=workers,
            on_progress=bar,
            on_discovery=_plotter(out / PLOTS, plots) if args.plots else None,
            on_gone=lambda image_id: _remove_plot(out / PLOTS, f"{image_id}.png"),
            try_again=lambda one: args.plots and not one.error and not is_file(out / PLOTS / f"{one.image_id}.png"),
        )
    check_written(plots)
    low, high = evaluation.score.wilson_interval()
    how = "" if args.method == "lost" else f", {args.method}"
    how += f", ranked by what {taught} of its images taught (transductive)" if taught else ""
    print(f"{backbone}{how} on {benchmark.title}: 95 % interval {low:.2f} to {high:.2f}")
    if evaluation.auc is not None:
        print(f"a hit has the higher score than a miss in {100 * evaluation.auc:.0f} % of pairs (AUC)")
    if evaluation.detection is not None:
        print(evaluation.detection)
    if evaluation.unreadable:
        print(describe_misses(evaluation.unreadable, evaluation.unavailable))
    written = [PREDICTIONS_FILE, MAPS_FILE, RESULTS_FILE] + (
        [f"plots of {evaluation.computed} images"] if args.plots else []
    )
    if isinstance(args.out, Path):  # a store gets them later
        print(f"written to {out}: {', '.join(written)}")
    print(evaluation.score, flush=True)
    return evaluation


def _plotter(folder: Path, written: list[Path]) -> "Hook":
    from lostreg.images.draw import save_picture

    def plot(example: "Example", found: "Discovery") -> None:
        path = folder / f"{example.image_id}.png"
        save_picture(path, found.plot(truth=example.boxes))
        written.append(path)

    return plot


def _remove_plot(folder: Path, name: str) -> None:
    """Remove a picture of a run that is overwritten; the name comes from a file, and may not lead elsewhere."""
    if name == Path(name).name:
        with suppress(OSError, ValueError):
            (folder / name).unlink(missing_ok=True)


def _table(found: dict[str, "Evaluation"]) -> str:
    width = max(len("backbone"), *map(len, found))
    lines = [f"{'backbone':<{width}}  corloc  95 % interval  hits/images"]
    for backbone, evaluation in found.items():
        score = evaluation.score
        low, high = score.wilson_interval()
        lines.append(
            f"{backbone:<{width}}  {score.percent:>6.2f}  {low:>6.2f}-{high:<6.2f}  {score.hits}/{score.images}"
        )
    return "\n".join(lines)
