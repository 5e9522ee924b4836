"""``lostreg datasets``: which benchmarks there are, which are found where, and fetching them."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from lostreg.cli.options import Subparsers, positive_int
from lostreg.datasets import FETCHABLE


def add_parser(commands: Subparsers) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "datasets",
        help="list or fetch benchmarks",
        description="List the benchmarks and where they are found; `lostreg datasets fetch NAME` downloads one.",
    )
    parser.add_argument("action", nargs="?", choices=("list", "fetch"), default="list", help="default: list")
    parser.add_argument("name", nargs="?", choices=FETCHABLE, help="what to fetch")
    parser.add_argument("--root", type=Path, default=Path("datasets"), metavar="DIR", help="default: ./datasets")
    parser.add_argument("--json", action="store_true", help="the list as JSON")
    parser.add_argument("--mirror", metavar="URL", help="fetch from here instead of the official servers")
    parser.add_argument("--workers", type=positive_int, default=8, metavar="N", help="downloads at a time")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """List or fetch."""
    if args.action == "fetch":
        return _fetch(args)
    if args.name:
        args.parser.error(f"'list' takes no name, found '{args.name}'")
    return _list(args)


def _fetch(args: argparse.Namespace) -> int:
    from lostreg.datasets.fetch import fetch

    if args.name is None:
        args.parser.error(f"fetch needs a name: {', '.join(FETCHABLE)}")
    print(fetch(args.name, args.root, mirror=args.mirror, workers=args.workers))
    return 0


def _list(args: argparse.Namespace) -> int:
    from lostreg.datasets import find_benchmarks

    found = find_benchmarks(args.root)
    if args.json:
        rows = [{**asdict(row.info), "path": str(row.path) if row.path else None} for row in found]
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return 0
    print(f"{'name':<8}  {'images':>6}  {'found':<32}  {'what':<40}  how to get it")
    for row in found:
        info = row.info
        images = str(info.images or "any")
        where = str(row.path or "-")
        print(f"{info.name:<8}  {images:>6}  {where:<32}  {info.title:<40}  {info.source}")
    return 0
