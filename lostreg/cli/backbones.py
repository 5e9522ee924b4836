"""``lostreg backbones``: the backbone table."""

import argparse
import dataclasses
import json
from typing import Any

from lostreg.cli.options import Subparsers
from lostreg.models.table import BACKBONES, BackboneSpec

_BENCHMARKS = ("voc07", "voc12", "coco20k")
HEADINGS = ("backbone", "timm name", "patch", "reg", "feature", "bias", "norm", "corloc", "licence", "training")


def add_parser(commands: Subparsers) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "backbones",
        help="list the backbones",
        description="List the backbones with what the literature runs LOST on, their defaults, licence, and "
        "published corloc on VOC07/VOC12/COCO20k. Any other timm ViT works as timm:NAME.",
    )
    parser.add_argument("--json", action="store_true", help="one JSON list, with the sources")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    if args.json:
        print(json.dumps([as_json(spec) for spec in BACKBONES.values()], indent=2, ensure_ascii=False))
        return 0
    rows = [HEADINGS, *(as_row(spec) for spec in BACKBONES.values())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def as_json(spec: BackboneSpec) -> dict[str, Any]:
    """A row as plain values."""
    fields = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    return {**fields, "published": dict(spec.published)}


def as_row(spec: BackboneSpec) -> tuple[str, ...]:
    """A row as words, in the order of the printed table; ``*`` marks a feature that no paper chose."""
    published = "/".join(f"{spec.published[name]:.1f}" for name in _BENCHMARKS) if spec.published else "-"
    chosen = "" if spec.feature_source != "lostreg" else "*"
    return (
        spec.name,
        spec.timm_name,
        str(spec.patch_size),
        str(spec.registers),
        spec.feature + chosen,
        str(spec.bias) if spec.bias == "auto" else f"{spec.bias:g}",
        "yes" if spec.normalize else "no",
        published,
        spec.licence,
        spec.training,
    )
