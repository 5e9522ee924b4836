"""Entry point: parse, dispatch, and turn errors that a user can mend into one line and exit code 2."""

import argparse
import io
import logging
import os
import sys
import warnings
from collections.abc import Sequence

from lostreg import __version__
from lostreg.cli import backbones, datasets, evaluate, predict, score
from lostreg.cli.parser import Parser
from lostreg.errors import LostregError

_COMMANDS = (predict, evaluate, score, backbones, datasets)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = Parser(
        prog="lostreg",
        description="Find the main object of images without labels: LOST on frozen Vision Transformers.",
    )
    parser.add_argument("--version", action="version", version=f"lostreg {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Returns:
        Exit code: 0, 1 where standard output was closed early, 2 for bad input, 130 after Ctrl-C.
    """
    args = build_parser().parse_args(argv)
    logging.getLogger("timm").setLevel(logging.ERROR)
    # On files that are broken or no checkpoints: those are reported in one line.
    warnings.filterwarnings("ignore", module=r"PIL\.|torch\._weights_only")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be text of any encoding
    try:
        code: int = args.run(args)
        sys.stdout.flush()
    except (LostregError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # the reader of our output went away: no error of the user's
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        message = " ".join(str(error).split())
        sys.stderr.write(f"lostreg {args.command}: error: {message}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("\nlostreg: interrupted; what was written so far is kept\n")
        return 130
    return code
