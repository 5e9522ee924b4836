"""Entry point: parse, dispatch, and turn errors that a user can mend into one line and exit code 2."""

import argparse
import logging
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lostreg.cli import (
    artifacts,
    attention,
    backbones,
    calibrate,
    completion,
    datasets,
    demo,
    discover,
    evaluate,
    export,
    learn,
    predict,
    probe,
    registers,
    report,
    reproduce,
    score,
    sweep,
)
from lostreg.cli.options import Parser, join_bias, name_variable, one_line, tell
from lostreg.cli.terminal import standard_streams, told
from lostreg.errors import LostregError, LostregWarning, is_out_of_memory
from lostreg.training.processes import fails_first, is_main

_COMMANDS = (
    predict,
    discover,
    export,
    report,
    demo,
    evaluate,
    score,
    calibrate,
    learn,
    sweep,
    reproduce,
    artifacts,
    attention,
    registers,
    probe,
    backbones,
    datasets,
)


class _Version(argparse.Action):
    """argparse's own would look the version up on every start."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib import metadata

        print(f"lostreg {metadata.version('lostreg')}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = Parser(
        prog="lostreg",
        description="Find the main object of images without labels: LOST on frozen Vision Transformers.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show program's version number and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_parser(commands)
    completion.add_parser(commands, parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Returns:
        Exit code: 0, 1 where standard output was closed early, 2 for bad input, 130 after Ctrl-C.
    """
    with standard_streams():
        return _main(sys.argv[1:] if argv is None else argv)


def _main(argv: Sequence[str]) -> int:
    command, goes_on = "", ""
    try:
        try:
            args = build_parser().parse_args(join_bias(argv))
        except SystemExit:
            sys.stdout.flush()  # help, too, can meet a full disk
            raise
        command = f" {args.command}"
        if "goes_on" in args and args.out is not None:
            goes_on = f": `{shlex.join(['lostreg', *(word for word in argv if word != '--overwrite')])}` goes on"
        with told(getattr(args, "told_from", logging.INFO)), _told_once():
            return _run(args)
    except BrokenPipeError:  # the reader of our output went away: no error of the user's
        return 1
    except (LostregError, OSError) as error:
        sys.stderr.write(f"lostreg{command}: error: {name_variable(one_line(str(error)))}\n")
        return 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        sys.stderr.write(f"lostreg{command}: error: not enough memory; what was written so far is kept\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(f"\nlostreg: interrupted; what was written so far is kept{goes_on}\n")
        return 130


@contextmanager
def _told_once() -> Iterator[None]:
    """Of several processes the first to fail tells why; the others, whom it takes along, end quietly."""
    try:
        yield
    except (Exception, KeyboardInterrupt):
        if not fails_first():
            raise SystemExit(2) from None
        raise


def _run(args: argparse.Namespace) -> int:
    from lostreg.images.allocator import keep_freed_memory

    keep_freed_memory()
    logging.getLogger("timm").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # On files that are broken or no checkpoints: those are reported in one line.
        warnings.filterwarnings("ignore", module=r"PIL\.|torch\._weights_only")
        _tell_warnings()
        code: int = args.run(args)
    sys.stdout.flush()
    return code


def _tell_warnings() -> None:
    """Our own warnings as lines for the person at the terminal, everyone else's as Python shows them."""
    show = warnings.showwarning

    def showwarning(message: Warning | str, category: type[Warning], *where: Any) -> None:
        if not issubclass(category, LostregWarning):
            show(message, category, *where)
        elif is_main():
            tell(str(message), logging.WARNING)

    warnings.simplefilter("always", LostregWarning)
    warnings.showwarning = showwarning  # type: ignore[assignment]
