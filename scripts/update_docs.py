"""Write the generated parts of the documentation: the backbone table of README.md and docs/cli.md.

python scripts/update_docs.py           writes them
python scripts/update_docs.py --check   exits with 1 if they are out of date
"""

import argparse
import re
import sys
from pathlib import Path

from lostreg.backbone_table import BACKBONES
from lostreg.cli.backbones import HEADINGS, as_row
from lostreg.cli.main import build_parser

TABLE = re.compile(r"(<!-- backbones -->\n).*?(<!-- /backbones -->)", re.DOTALL)


def backbone_table() -> str:
    """The backbone table as Markdown."""
    rows = [HEADINGS, tuple("---" for _ in HEADINGS), *(as_row(spec) for spec in BACKBONES.values())]
    return "".join(f"| {' | '.join(cell.replace('*', chr(92) + '*') for cell in row)} |\n" for row in rows)


def cli_reference() -> str:
    """Every command with its options, from the parser itself; independent of Python's own help layout."""
    parser = build_parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    parts = ["# Command line\n\nGenerated from the program by `make docs`; `lostreg COMMAND --help` says the same.\n"]
    for name, command in commands.choices.items():
        parts.append(f"\n## `lostreg {name}`\n\n{command.description}\n")
        for group in command._action_groups:
            lines = [_describe(action) for action in group._group_actions if action.dest != "help"]
            if lines:
                parts.append(f"\n{(group.title or '').capitalize()}:\n\n" + "".join(lines))
    return "".join(parts)


def _describe(action: argparse.Action) -> str:
    names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar or action.dest}`"
    value = ""
    if action.option_strings and action.nargs != 0 and not isinstance(action, argparse.BooleanOptionalAction):
        choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else None
        value = f" `{action.metavar or choices or action.dest.upper()}`"
    return f"- {names}{value}: {action.help or 'one of ' + ', '.join(map(str, action.choices or ()))}\n"


def main() -> int:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if something is out of date")
    parser.add_argument("--root", type=Path, default=Path(), help="the checkout (default: the current folder)")
    args = parser.parse_args()
    readme, reference = args.root / "README.md", args.root / "docs" / "cli.md"
    wanted = {
        readme: TABLE.sub(lambda found: found[1] + backbone_table() + found[2], readme.read_text(encoding="utf-8")),
        reference: cli_reference(),
    }
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if args.check:
            print(f"{path} is out of date: run `make docs`")
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(wanted[path], encoding="utf-8")
            print(f"wrote {path}")
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
