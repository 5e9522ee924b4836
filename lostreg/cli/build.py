"""Parsed options become objects: the discoverer, the benchmark, test-time registers."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lostreg import defaults
from lostreg.cli.options import default_backbone, tell
from lostreg.cli.progress import ProgressBar
from lostreg.errors import OptionError, RegistersError

if TYPE_CHECKING:
    from lostreg.artifacts.outliers import CutoffRule
    from lostreg.datasets import Benchmark
    from lostreg.images.decode import ImageSource
    from lostreg.inference.discoverer import Discoverer
    from lostreg.models.registers import RegisterNeurons
    from lostreg.runs.cluster import RaySession, RayWorkers

REGISTERS_FILE = "registers.json"
OBJECTNESS_FILE = "objectness.safetensors"
_RESULTS = ("results.json", "sweep.json")


def with_registers(
    args: argparse.Namespace,
    discoverer: "Discoverer",
    images: "Sequence[ImageSource]",
    *,
    kept: Path | None = None,
    rule: "CutoffRule | None" = None,
    seed: int = 0,
) -> "Discoverer":
    """The discoverer with the test-time registers that ``--test-time-registers`` asks for.

    Args:
        args: with the option; a number of tokens means that neurons are looked for in the images at hand.
        discoverer: without them.
        images: what is about to be processed.
        kept: file for the neurons that are found: a run that goes on takes them from there.
        rule: which tokens are outliers; None looks for a second mode of the norms.
        seed: of the sample of images that neurons are looked for in.

    Raises:
        OptionError: if that file is of another number of tokens.
    """
    wanted = args.test_time_registers
    if wanted is None:
        return discoverer

    from lostreg.artifacts.register_search import find_registers
    from lostreg.models.registers import RegisterNeurons

    if isinstance(wanted, Path):
        return discoverer.with_registers(RegisterNeurons.load(wanted))
    if kept and not args.overwrite:
        earlier = _earlier(kept, wanted)
        if earlier:
            return discoverer.with_registers(earlier)
    with ProgressBar("registers") as bar:
        found = find_registers(images, discoverer, count=wanted, rule=rule, seed=seed, on_progress=bar)
    tell(describe_neurons(found))
    if kept:
        found.save(kept)
    return discoverer.with_registers(found)


def with_registers_if_any(
    args: argparse.Namespace, discoverer: "Discoverer", images: "Sequence[ImageSource]"
) -> "Discoverer":
    """Like `with_registers`; among several backbones, one without outliers goes on without."""
    try:
        return with_registers(args, discoverer, images)
    except RegistersError as error:
        if len(chosen_backbones(args)) == 1:
            raise
        tell(f"no test-time registers for {discoverer.backbone.spec.name}: {error}")
        return discoverer


def with_objectness(
    args: argparse.Namespace, discoverer: "Discoverer", images: "Sequence[ImageSource]", *, kept: Path | None = None
) -> "Discoverer":
    """The discoverer with the objectness that ``--objectness`` asks for.

    Args:
        args: with the option; ``self`` means that it is learned from a sample of the images at hand.
        discoverer: without it.
        images: what is about to be processed.
        kept: file for what is learned: a run that goes on takes it from there.

    Raises:
        OptionError: if the folder of that file holds a run that did not learn.
    """
    wanted = args.objectness
    if wanted is None or wanted == "none":
        return discoverer

    from lostreg.inference.learn import learn
    from lostreg.inference.objectness import Objectness

    if isinstance(wanted, Path):
        return discoverer.with_objectness(Objectness.load(wanted))
    if kept and not args.overwrite:
        if kept.exists():
            return discoverer.with_objectness(Objectness.load(kept))
        if any((kept.parent / results).exists() for results in _RESULTS):
            told = "other settings: it did not learn from its images"
            raise OptionError(f"{kept.parent} holds a run with {told}; use --overwrite or another --out")
    with ProgressBar("learning") as bar:
        found = learn(images, discoverer, sample=defaults.MOST_TEACHERS, on_progress=bar)
    tell(
        f"learned from {found.facts.images} of these images, without labels, what ranks their candidates: figures "
        "with it are transductive"
    )
    if kept:
        found.save(kept)
    return discoverer.with_objectness(found)


def transductive(args: argparse.Namespace, discoverer: "Discoverer", images: "Sequence[ImageSource]") -> int:
    """How many of the images that are evaluated taught what ranks their candidates; told where that is not known."""
    objectness = discoverer.options.objectness
    if objectness is None:
        return 0
    shared = objectness.shared_with(images)
    if shared is None and args.objectness != "self":
        tell(f"{args.objectness} does not know which images taught it: if these did, figures are transductive")
        return 0
    return objectness.facts.images if shared is None else shared


def _earlier(kept: Path, wanted: int) -> "RegisterNeurons | None":
    """The neurons that an earlier run into the same folder found; None where there was none.

    Raises:
        OptionError: if it added another number of tokens, or did not look for neurons.
    """
    from lostreg.models.registers import RegisterNeurons

    if kept.exists():
        found = RegisterNeurons.load(kept)
        if found.count == wanted:
            return found
        told = f"{found.count} test-time register{'s' * (found.count > 1)}, not {wanted}"
    elif any((kept.parent / results).exists() for results in _RESULTS):
        told = "other settings: it did not look for register neurons"
    else:
        return None
    raise OptionError(f"{kept.parent} holds a run with {told}; use --overwrite or another --out")


@contextmanager
def asked_session(args: argparse.Namespace) -> "Iterator[RaySession | None]":
    """The Ray that ``--ray`` asks for, started or joined; None without it.

    Raises:
        OptionError: if there are workers without it, Ray is not installed, or the address is none.
        ClusterError: if Ray cannot be started or joined.
    """
    if args.ray is None:
        if args.workers is not None:
            raise OptionError("--workers are Ray's: add --ray")
        yield None
        return
    from lostreg.runs.cluster import ray_session

    with ray_session(args.ray, args.workers) as session:
        yield session


def asked_workers(
    args: argparse.Namespace, session: "RaySession | None", discoverer: "Discoverer"
) -> "RayWorkers | None":
    """Workers that hold a discoverer; None without a session."""
    if session is None:
        return None
    workers = session.workers(discoverer, args.workers)
    tell(f"workers on {workers.device}")
    return workers


def chosen_backbones(args: argparse.Namespace) -> list[str]:
    """The backbones that a command for several of them is to run, each known and each once.

    Raises:
        OptionError: if one file of weights or of neurons is given for several of them.
        BackboneError: if one is unknown.
    """
    from lostreg.models.backbone import find_spec

    backbones = list(dict.fromkeys(args.backbone or [default_backbone()]))
    for option, value in (("--weights", args.weights), ("--test-time-registers", args.test_time_registers)):
        if isinstance(value, Path) and len(backbones) > 1:
            raise OptionError(f"{option} is one file, but there are {len(backbones)} backbones")
    for backbone in backbones:
        find_spec(backbone)
    return backbones


def describe_neurons(found: "RegisterNeurons") -> str:
    """A line on register neurons that were found, for the person at the terminal."""
    layers = sorted({layer for layer, _ in found.neurons})
    return (
        f"{len(found.neurons)} register neurons in layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))} of "
        f"{found.backbone}: outliers have norms of {found.cutoff:.4g} and more, emerge in layer {found.layer} and are "
        f"{100 * found.outliers:.2f} % of patches of {found.images} images, {100 * found.outliers_left:.2f} % with "
        "the neurons moved (on a few of them)"
    )


def make_discoverer(args: argparse.Namespace, backbone: str, **given: Any) -> "Discoverer":
    """The `Discoverer` that the parsed options describe.

    Args:
        args: of a command.
        backbone: one of those that the command names.
        given: options that the command decides.

    Raises:
        OptionError: if options contradict each other.
    """
    from lostreg.inference.discoverer import Discoverer

    check_files(args)
    discoverer = Discoverer(backbone, **options_of(args), **given)
    if args.precision == "auto":
        tell_precision(discoverer)
    return discoverer


def check_files(args: argparse.Namespace) -> None:
    """Check what options say of registers and objectness, so that a mistake there costs no model.

    Raises:
        RegistersError: if a file of register neurons cannot be read.
        ObjectnessError: likewise for an objectness.
        OptionError: if an objectness is learned for a method that does not ask for it.
    """
    from lostreg.inference.objectness import Objectness
    from lostreg.models.registers import RegisterNeurons

    if isinstance(getattr(args, "test_time_registers", None), Path):
        RegisterNeurons.load(args.test_time_registers)
    if isinstance(getattr(args, "objectness", None), Path):
        Objectness.load(args.objectness)
    elif getattr(args, "objectness", None) == "self" and args.method != "parts":
        raise OptionError("--objectness ranks the candidates of parts: add --method parts")


def tell_precision(discoverer: "Discoverer") -> None:
    """Say on standard error what ``--precision auto`` has come to."""
    from lostreg.runs.results import describe_device

    device = describe_device(discoverer.backbone.device)
    if discoverer.options.precision == "bf16":
        tell(f"bf16, which is quick on this device ({device}); results differ a little from those of --precision fp32")
    else:
        tell(f"fp32, as bf16 is not known to be quick on this device ({device})")


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """The parsed options that are named as a field of `lostreg.Options`, but for the backbone.

    Raises:
        OptionError: if options contradict each other.
    """
    from lostreg.inference.calibration import Calibration
    from lostreg.inference.options import Options

    names = Options.__dataclass_fields__.keys() - {"backbone", "objectness"}  # which may have to be learned first
    options = {name: value for name, value in vars(args).items() if name in names}
    if isinstance(options.get("bias"), Path):
        options["bias"] = Calibration.load(options["bias"])
    if "masks" in args:
        options["refine"] = args.masks == "refined"
        if args.box_from == "mask" and not options["refine"]:
            raise OptionError("--box-from mask takes boxes from refined masks: add --masks refined")
    return options


def open_benchmark(args: argparse.Namespace, *, with_images: bool = True) -> "Benchmark":
    """The benchmark that the options name, limited as asked; what was left out is told on standard error.

    Args:
        args: of the command.
        with_images: whether its images are needed.

    Raises:
        OptionError: if nothing says where the images are.
        DatasetError: if the benchmark cannot be read, or an image is missing.
    """
    from lostreg.datasets import choose_frames, load_benchmark, require_images

    if with_images and args.benchmark == "coco" and args.images is None:
        raise OptionError(
            f"{args.command} coco needs --images, the folder that file names in the annotations are relative to"
        )
    benchmark = load_benchmark(
        args.benchmark,
        root=args.root,
        split=args.split,
        images=args.images,
        annotations=args.annotations,
        no_hard=args.no_hard,
    )
    benchmark = benchmark.limited(args.limit)
    if with_images:
        require_images(benchmark)
        benchmark = choose_frames(benchmark, args.turned)
    for note in benchmark.notes:
        tell(note)
    return benchmark
