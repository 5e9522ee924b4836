"""``lostreg registers ablate``: what registers change, by their number, as a report folder."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lostreg import defaults
from lostreg.cli.artifacts import outliers_line, settings_of
from lostreg.cli.build import make_discoverer, open_benchmark
from lostreg.cli.files import check_there, make_folder, refuse_among_images
from lostreg.cli.options import (
    Subparsers,
    add_benchmark_options,
    add_frame,
    add_method_options,
    add_sample,
    add_threshold,
    add_training_options,
    backbone_name,
    count,
    local_place,
)
from lostreg.cli.progress import ProgressBar
from lostreg.errors import ImageError, OptionError, RegistersError
from lostreg.training.processes import launched

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lostreg.artifacts.ablation import Variant
    from lostreg.artifacts.attention_figures import AttentionRow
    from lostreg.artifacts.outliers import CutoffRule
    from lostreg.datasets import Benchmark
    from lostreg.inference.discoverer import Discoverer
    from lostreg.models.backbone import Backbone
    from lostreg.models.registers import RegisterNeurons

_COUNTS: Final = (0, 1, 2, 4, 8, 16)  # as in the register paper's figure 8
_SHOWN: Final = 3  # images whose attention is drawn


def add_parser(actions: Subparsers) -> None:
    """Add the action to those of ``lostreg registers``."""
    parser = actions.add_parser(
        "ablate",
        help="train several numbers of registers, and show what they change",
        description="Train a backbone with each of several numbers of registers, and show what they change: outliers, "
        "norms, what tokens hold, attention maps and, with --benchmark, corloc (as figure 8 of the register paper). "
        "Writes a folder with one HTML page, its pictures, and every number as JSON. A command that was stopped does "
        "not train again what is trained.",
    )
    parser.add_argument(
        "photos", nargs="+", metavar="IMAGE", help="files, folders (with all their subfolders) or globs"
    )
    parser.add_argument(
        "--out", type=local_place, required=True, metavar="DIR", help="folder of the report and of the weights"
    )
    parser.add_argument(
        "--registers",
        dest="counts",
        nargs="+",
        type=count,
        default=list(_COUNTS),
        metavar="N",
        help=f"how many are trained; 0 is the control (default: {' '.join(map(str, _COUNTS))})",
    )
    parser.add_argument(
        "--test-time",
        action="store_true",
        help="as many test-time registers (`registers find`) beside the trained ones",
    )
    parser.add_argument(
        "--beside",
        nargs="+",
        type=backbone_name,
        default=[],
        metavar="NAME",
        help="other backbones as they were released, such as *_reg",
    )
    add_sample(parser, defaults.TRAINING_IMAGES)
    add_threshold(parser)
    add_training_options(parser.add_argument_group("training"))
    parser.add_argument(
        "--benchmark", metavar="NAME", help="corloc on it, too: voc07, voc12, coco20k, sample, voc or coco"
    )
    add_benchmark_options(parser)
    add_frame(parser)
    add_method_options(parser)
    parser.set_defaults(run=run, goes_on=True)


def run(args: argparse.Namespace) -> int:
    """Train, measure and report; the exit code is 2 if any image could not be read, though the others count."""
    from lostreg.artifacts.report import FIGURE, NUMBERS, PAGE, write_report
    from lostreg.datasets.folder import find_images

    if launched() > 1:
        raise OptionError("registers ablate is one process: launch `lostreg registers train` with several")
    if args.test_time_registers is not None:
        raise OptionError("--test-time-registers: use --test-time, which adds as many as --registers says")
    paths = find_images(args.photos)
    check_there(paths)
    refuse_among_images("--out", args.out, args.photos, paths)
    ablation = _Ablation(args, paths, open_benchmark(args) if args.benchmark else None)
    make_folder(args.out)
    for done in ablation.variants():
        found = [one.measured for one in done]
        write_report(args.out, found, ablation.settings, variants=done, attention=list(ablation.attention()))
    for one in done:
        corloc = f"; {one.score}" if one.score else ""
        print(f"{outliers_line(one.measured)}{corloc}")
    print(f"written to {args.out}: {PAGE}, {FIGURE}, {NUMBERS}, pictures, and weights in a folder each")
    return 2 if any(one.measured.seen.errors for one in done) else 0


class _Ablation:
    """What is compared, one after the other, and what all have in common."""

    def __init__(self, args: argparse.Namespace, paths: Sequence[Path], benchmark: "Benchmark | None") -> None:
        from lostreg.artifacts.labels import folder_classes
        from lostreg.training.options import TrainingOptions

        names = TrainingOptions.__dataclass_fields__.keys() - {"registers", "batch_size"}
        given = {name: value for name, value in vars(args).items() if name in names}
        self._training = TrainingOptions(registers=max(args.counts), **given)
        self._args = args
        self._paths = paths
        self._labels = folder_classes(paths)
        self._benchmark = benchmark
        self.settings: dict[str, object] = {}
        self._done: list[Variant] = []
        self._columns: list[list[AttentionRow]] = []  # of each backbone, its maps of each image that is shown

    def variants(self) -> "Iterator[list[Variant]]":
        """All that there are so far, each time that there is one more."""
        from lostreg.artifacts.ablation import AS_GIVEN, TEST_TIME, TRAINED
        from lostreg.artifacts.outliers import CutoffRule
        from lostreg.artifacts.register_search import find_registers

        args = self._args
        plain = partial(make_discoverer, args, args.backbone)
        yield self._add(AS_GIVEN, plain, "given")
        cutoff = self._done[0].measured.cutoff.value
        rule = args.threshold if cutoff is None else CutoffRule("number", cutoff)
        for number in sorted(set(args.counts)):
            exact = make_discoverer(_changed(args, precision="fp32"), args.backbone)
            trained = _changed(args, weights=self._train(exact.backbone, number))
            yield self._add(TRAINED, partial(make_discoverer, trained, args.backbone), f"{number}", rule)
        for number in sorted(set(args.counts) - {0}) if args.test_time else ():
            with ProgressBar(f"test-time registers, {number}") as bar:
                try:
                    neurons = find_registers(
                        self._paths, plain(), count=number, rule=rule, seed=args.seed, on_progress=bar
                    )
                except RegistersError as error:
                    bar.tell(f"no test-time registers for {args.backbone}: {error}")
                    break
            moved = partial(_with_neurons, plain, neurons)
            yield self._add(TEST_TIME, moved, f"test-time-{number}", rule)
        for name in args.beside:
            beside = partial(make_discoverer, _changed(args, weights=None), name)
            yield self._add(AS_GIVEN, beside, name.replace(":", "_"))

    def _train(self, backbone: "Backbone", count: int) -> Path:
        from lostreg.training.train import TEACHER_FOLDER, train_registers

        args, options = self._args, replace(self._training, registers=count)
        self.settings["training"] = {name: value for name, value in asdict(options).items() if name != "registers"}
        with ProgressBar(f"{args.backbone}, {count} registers", tell_errors=True) as bar:
            trained = train_registers(
                self._paths,
                backbone,
                args.out / f"{count}",
                options,
                teacher=args.out / TEACHER_FOLDER,
                on_progress=bar,
            )
        return trained.weights

    def _add(
        self, origin: str, make: "Callable[..., Discoverer]", folder: str, rule: "CutoffRule | None" = None
    ) -> "list[Variant]":
        """Measure one more."""
        from lostreg.artifacts.ablation import Variant
        from lostreg.artifacts.measurement import measure
        from lostreg.runs.evaluate import evaluate

        args, discoverer = self._args, make()
        backbone = discoverer.backbone
        with ProgressBar(backbone.title, tell_errors=True) as bar:
            measured = measure(
                self._paths,
                discoverer,
                rule=rule or args.threshold,
                labels=self._labels,
                seed=args.seed,
                like=self._done[0].measured if rule else None,
                on_progress=bar,
            )
        score = None
        if self._benchmark is not None:
            with ProgressBar(f"{backbone.title}, corloc") as bar:
                out = args.out / folder / self._benchmark.name
                score = evaluate(self._benchmark, make(exif=False), out, on_progress=bar).score
        registers = backbone.spec.registers + (backbone.registers.count if backbone.registers else 0)
        self.settings |= settings_of(args, discoverer, len(self._paths))
        one = Variant(origin, registers, measured, score)
        self._done.append(replace(one, measured=replace(measured, title=one.title)))
        self._look(discoverer)
        return self._done

    def _look(self, discoverer: "Discoverer") -> None:
        """Keep the attention of a few images; a backbone without a token in front of the patches has none."""
        from lostreg.artifacts.attention import attention_maps
        from lostreg.artifacts.attention_figures import AttentionRow

        if discoverer.backbone.prefix_tokens:
            title, patch = self._done[-1].title, discoverer.backbone.spec.patch_size
            outcomes = attention_maps(self._paths[:_SHOWN], discoverer)
            self._columns.append([AttentionRow(title, patch, *maps) for maps in outcomes if isinstance(maps, list)])

    def attention(self) -> "Iterator[Figure]":
        """A picture of a few images, with a column a backbone, if any of them can be read."""
        from lostreg.artifacts.attention_figures import compare_attention
        from lostreg.images.decode import read_image

        pictures = []
        for path in self._paths[:_SHOWN]:
            with suppress(ImageError):
                pictures.append(read_image(path, max_side=self._args.max_side).pixels)
        if pictures and self._columns:
            yield compare_attention(pictures, self._columns)


def _changed(args: argparse.Namespace, **changes: object) -> argparse.Namespace:
    """The same options but for some."""
    return argparse.Namespace(**{**vars(args), **changes})


def _with_neurons(make: "Callable[..., Discoverer]", neurons: "RegisterNeurons", **given: bool) -> "Discoverer":
    return make(**given).with_registers(neurons)
