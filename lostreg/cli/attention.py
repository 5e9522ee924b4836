"""``lostreg attention``: what CLS and register tokens attend to, as pictures."""

import argparse
import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING

from lostreg import defaults
from lostreg.cli.build import chosen_backbones, make_discoverer, with_registers_if_any
from lostreg.cli.files import check_there, check_written, make_folder, refuse_among_images, unique_names
from lostreg.cli.options import Subparsers, add_backbone_options, add_images, add_max_side, local_place
from lostreg.cli.progress import ProgressBar
from lostreg.errors import ImageError
from lostreg.progress import Progress

if TYPE_CHECKING:
    from lostreg.artifacts.attention import AttentionMaps
    from lostreg.inference.discoverer import Discoverer

_OUT = Path("attention")


def add_parser(commands: Subparsers) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "attention",
        help="what CLS and register tokens attend to, as pictures",
        description="Draw, for each image, what CLS and every register token attends to: a row a backbone and layer. "
        "Several backbones stand side by side.",
    )
    add_images(parser)
    parser.add_argument(
        "--out", type=local_place, default=_OUT, metavar="DIR", help=f"folder for the pictures (default: {_OUT})"
    )
    parser.add_argument(
        "--layers",
        nargs="+",
        type=int,
        default=(-1,),
        metavar="LAYER",
        help="blocks, from 0, or from the end when negative (default: -1)",
    )
    parser.add_argument("--heads", action="store_true", help="a picture with every head too")
    parser.add_argument("--arrays", action="store_true", help="the numbers too, as NumPy's .npz")
    add_max_side(parser, defaults.MAX_SIDE)
    add_backbone_options(parser, feature=False, lost=False, registers=True, several=True)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Draw; the exit code is 2 if any image could not be read."""
    from lostreg.artifacts.attention import attention_maps
    from lostreg.datasets.folder import find_images
    from lostreg.models.features import resolve_layer

    backbones = chosen_backbones(args)
    paths = find_images(args.images)
    check_there(paths)
    refuse_among_images("--out", args.out, args.images, paths)
    make_folder(args.out)
    discoverers = [make_discoverer(args, backbone) for backbone in backbones]
    layers = [
        list(dict.fromkeys(resolve_layer(discoverer.backbone, layer) for layer in args.layers))
        for discoverer in discoverers
    ]
    discoverers = [with_registers_if_any(args, discoverer, paths) for discoverer in discoverers]
    streams = [attention_maps(paths, *each) for each in zip(discoverers, layers, strict=True)]
    written: list[Path] = []
    with ProgressBar("attention", tell_errors=True) as bar:
        for done, (path, name, *outcomes) in enumerate(zip(paths, unique_names(paths), *streams, strict=True), start=1):
            errors = [outcome for outcome in outcomes if isinstance(outcome, ImageError)]
            bar(Progress(done, len(paths), error=errors[0] if errors else None))
            if not errors:
                maps = [found for found in outcomes if not isinstance(found, ImageError)]
                written += _write(args, path, args.out / name, list(zip(discoverers, maps, strict=True)))
    check_written(written)
    print(f"written to {args.out}: {len(written)} files for {len(paths) - bar.errors} of {len(paths)} images")
    return 2 if bar.errors else 0


def _write(
    args: argparse.Namespace, path: Path, stem: Path, found: "list[tuple[Discoverer, list[AttentionMaps]]]"
) -> list[Path]:
    """The files of one image."""
    import numpy as np

    from lostreg.artifacts.attention_figures import AttentionRow, plot_attention, plot_heads
    from lostreg.images.decode import read_image

    pixels = read_image(path, max_side=args.max_side, max_pixels=args.max_pixels).pixels
    rows = [
        AttentionRow(f"{discoverer.backbone.title}, layer {one.layer}", discoverer.backbone.spec.patch_size, one)
        for discoverer, maps in found
        for one in maps
    ]
    written = [Path(f"{stem}.png")]
    plot_attention(pixels, rows).savefig(written[0], dpi=150)
    for row in rows:
        name = re.sub(r"[^\w.]+", "-", row.title)
        if args.heads:
            written.append(Path(f"{stem}-{name}-heads.png"))
            plot_heads(pixels, row).savefig(written[-1], dpi=150)
        if args.arrays:
            written.append(Path(f"{stem}-{name}.npz"))
            np.savez_compressed(written[-1], **dataclasses.asdict(row.maps))
    return written
