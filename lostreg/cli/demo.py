"""``lostreg demo``: a local page where photos are dropped and options tried."""

import argparse
import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from lostreg import defaults
from lostreg.cli.build import options_of, tell_precision
from lostreg.cli.options import (
    Subparsers,
    add_device,
    add_max_pixels,
    add_max_side,
    add_method,
    backbone_name,
    default_backbone,
    objectness_value,
    positive_int,
    tell,
)
from lostreg.errors import BackboneError, DatasetError, OptionError

if TYPE_CHECKING:
    from lostreg.demo.session import DemoSettings

_OFFLINE = "imgfocus_vits14"


def add_parser(commands: Subparsers) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "demo",
        help="try it in a browser: a local page for photos",
        description="Serve a page to this machine's browsers: drop a photo, see what is found, move the options. The "
        "method, the bias, the number of objects and the masks change the answer without another look at the photo.",
    )
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    group.add_argument(
        "--port", type=_port, default=7860, metavar="N", help="port to listen on; 0 takes a free one (default: 7860)"
    )
    group.add_argument(
        "--max-upload-mb", type=positive_int, default=20, metavar="N", help="largest file taken, in MiB (default: 20)"
    )
    _add_method(parser)
    parser.set_defaults(run=run)


def _add_method(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("method")
    group.add_argument(
        "--backbone",
        nargs="+",
        action="extend",
        type=backbone_name,
        metavar="NAME",
        help="rows of `lostreg backbones`, or timm:NAME, to choose from; the first is loaded at once, the others when "
        f"they are chosen (default: what {defaults.BACKBONE_VARIABLE} says, else {_OFFLINE} if the offline extra is "
        f"installed, else {defaults.BACKBONE})",
    )
    add_method(group, "parts")
    group.add_argument(
        "--objectness",
        type=objectness_value,
        metavar="FILE",
        help="of `lostreg learn`: ranks the candidates of parts with its backbone, and is shown as a map",
    )
    group.add_argument(
        "--test-time-registers",
        type=Path,
        metavar="FILE",
        help="of `lostreg registers find`: offers test-time registers for its backbone",
    )
    add_device(group, precision="auto")
    add_max_side(parser, defaults.MAX_SIDE)
    add_max_pixels(group)


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C."""
    _require_gradio()
    settings = _settings(args)

    from lostreg.demo.server import address_of, is_local, listen, serve
    from lostreg.demo.session import Models

    with contextlib.closing(listen(args.host, args.port)) as bound:
        try:
            models = Models(settings)
            tell(f"loading {settings.backbones[0]}")
            first = models.get(settings.backbones[0])
            if args.precision == "auto":
                tell_precision(first)
            taught = settings.options.objectness
            if taught and taught.facts.backbone == settings.backbones[0]:
                first.with_objectness(taught)
            if settings.neurons and settings.has_registers(settings.backbones[0]):
                first.with_registers(settings.neurons)
            if not is_local(bound):
                tell(f"listening on {args.host}: whoever reaches this machine can open the page and send photos")
            serve(settings, models, bound, lambda: print(f"demo at {address_of(bound)} (Ctrl-C ends it)", flush=True))
        except KeyboardInterrupt:
            pass
    tell("the demo has ended")
    return 0


def _settings(args: argparse.Namespace) -> "DemoSettings":
    """Checked as far as it goes without loading anything."""
    from lostreg.demo.session import DemoSettings
    from lostreg.inference.objectness import Objectness
    from lostreg.inference.options import Options
    from lostreg.models.backbone import find_spec
    from lostreg.models.registers import RegisterNeurons

    names = tuple(dict.fromkeys(args.backbone or [default_backbone(_default_backbone())]))
    for name in names:
        find_spec(name)
    neurons = RegisterNeurons.load(args.test_time_registers) if args.test_time_registers else None
    if neurons and neurons.backbone not in ("", *names):
        raise OptionError(f"the register neurons are those of {neurons.backbone}: add it to --backbone")
    if args.objectness == "self":
        raise OptionError(
            "--objectness self learns from a command's images, and a page has none: run `lostreg learn FOLDER` first, "
            "and give the file that it writes"
        )
    taught = Objectness.load(args.objectness) if isinstance(args.objectness, Path) else None
    if taught and taught.facts.backbone not in names:
        raise OptionError(f"the objectness was learned on {taught.facts.backbone}: add it to --backbone")
    options = Options(**{**options_of(args), "bias": "auto", "method": "parts", "objectness": taught})
    return DemoSettings(names, options, args.max_upload_mb, neurons, args.method, _examples())


def _examples() -> tuple[Path, ...]:
    """The photos of the sample benchmark, where that is: in ./datasets, or in a checkout of lostreg."""
    from lostreg.datasets.registry import DEFAULT_ROOT, find_sample

    for root in (DEFAULT_ROOT, Path(__file__).parents[2] / "datasets"):
        with contextlib.suppress(DatasetError):
            return tuple(sorted((find_sample(root) / "JPEGImages").glob("*.jpg")))
    return ()


def _default_backbone() -> str:
    from lostreg.models.imgfocus import imgfocus_path

    try:
        imgfocus_path()
    except BackboneError:
        return defaults.BACKBONE
    return _OFFLINE


def _require_gradio() -> None:
    """Raise `OptionError` if the demo's extra is not installed."""
    # Read when Gradio is imported: it tells nobody that it runs, here or elsewhere.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio  # noqa: F401
    except ModuleNotFoundError as error:
        raise OptionError('the demo needs gradio: pip install "lostreg[demo]"') from error


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 0xFFFF:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, not '{text}'")
    return int(text)
