"""``lostreg completion``: the script with which a shell completes commands, options and names of files."""

import argparse
from typing import Any

from lostreg.cli.options import Parser, Subparsers, backbone_name
from lostreg.errors import OptionError
from lostreg.models.table import BACKBONES


def add_parser(commands: Subparsers, whole: Parser) -> None:
    """Add the command to the command line.

    Args:
        commands: of the command line.
        whole: the command line, with all other commands.
    """
    parser = commands.add_parser(
        "completion",
        help="a script for the shell's completion",
        description="Print the script that has a shell complete commands, options, backbones and files. For bash: "
        '`eval "$(lostreg completion bash)"` in ~/.bashrc; for zsh: `lostreg completion zsh > DIR/_lostreg`, in a '
        "folder of $fpath. Needs shtab (`pip install shtab`) to be made, not to be used.",
    )
    parser.add_argument("shell", choices=("bash", "zsh"), help="which shell")
    parser.set_defaults(run=run, whole=whole)


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    try:
        import shtab
    except ModuleNotFoundError as error:
        raise OptionError("completion scripts are made by shtab: pip install shtab") from error
    _complete_values(args.whole, shtab.FILE)
    print(shtab.complete(args.whole, shell=args.shell))
    return 0


def _complete_values(parser: argparse.ArgumentParser, files: Any) -> None:
    """Have every value completed: backbones by their rows, choices as they are, all others as names of files."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete_values(command, files)
        elif action.type is backbone_name:
            action.choices = list(BACKBONES)
        elif action.choices is None and action.nargs != 0:
            action.complete = files  # type: ignore[attr-defined]
