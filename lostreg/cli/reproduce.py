"""``lostreg reproduce``: the rows of a paper's table, one after the other, measured beside published."""

import argparse
import logging
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

from lostreg.cli import evaluate, sweep
from lostreg.cli.build import open_benchmark
from lostreg.cli.files import make_folder
from lostreg.cli.options import Parser, Subparsers, join_bias, local_place, one_line, tell
from lostreg.cli.recipes import DECIDED, Job, Recipe, decided, load_recipe, recipe_names
from lostreg.errors import BackboneError, LostregError, OptionError, is_out_of_memory
from lostreg.models.table import BACKBONES

TABLE: Final = "table"  # of OUT/RECIPE, as .json and .md
_OTHER_TRUTH: Final = ("--split", "--no-hard")  # options that change what published figures are of
_OPENED: Final = ("benchmark", "root", "split", "images", "annotations", "no_hard", "limit", "turned")
_ROW: Final = frozenset(("title", "benchmark", "folder", "command", "with", "measured", "fault", "note"))
_HEADINGS: Final = (
    "row",
    "benchmark",
    "corloc",
    "95 % interval",
    "hits/images",
    "published",
    "difference",
    "published for",
)


def add_parser(commands: Subparsers) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "reproduce",
        help="run the rows of a paper's table, measured beside published",
        description="Run the commands behind a paper's table, each into OUT/RECIPE/ROW/BENCHMARK, and end with one "
        "table, measured beside published, which OUT/RECIPE/table.md and table.json keep. The same command goes on "
        "after a stop. What cannot be run, for want of a benchmark or of weights, is told with what would help, the "
        "others go on, and the exit code is 2.",
    )
    parser.add_argument(
        "recipe", metavar="RECIPE", help=f"{', '.join(recipe_names())}, or a TOML file of your own (eval/README.md)"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="WORD",
        help="a part: titles, backbones or folders of rows, benchmarks, eval or sweep; of several kinds what all name",
    )
    parser.add_argument(
        "--out", type=local_place, default=Path("out"), metavar="DIR", help="folder for all recipes (default: out)"
    )
    parser.add_argument(
        "--weights",
        nargs="+",
        type=_row_weights,
        default=[],
        metavar="ROW=FILE",
        help="checkpoints for rows, by the names of their folders (default: from the hub)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the commands, what is done already and what is missing"
    )
    parser.add_argument(
        "--with",
        nargs=argparse.REMAINDER,
        default=[],
        dest="passed",
        metavar="OPTION",
        help="all that follows is passed on to each command, such as --device cuda --precision bf16 --root DIR, or "
        "--limit N, of which the table tells",
    )
    parser.set_defaults(run=run, goes_on=True)


def _row_weights(text: str) -> tuple[str, Path]:
    """``ROW=FILE``, for argparse."""
    row, _, file = text.partition("=")
    if not row or not file:
        raise argparse.ArgumentTypeError(f"expected ROW=FILE, not '{text}'")
    return row, Path(file)


def run(args: argparse.Namespace) -> int:
    """Run what was asked for; 2 where something of it could not be."""
    recipe = load_recipe(args.recipe)
    if taken := decided(args.passed, DECIDED):
        raise OptionError(f"--with {taken}: expected an option for all rows, such as --device; see --out and --weights")
    jobs = _chosen(recipe.jobs(args.out, args.passed, dict(args.weights)), args.only)
    parser = _command_parser()
    asked = [(job, _parsed(parser, job)) for job in jobs]  # all of them before the first is run
    folder = args.out / recipe.name
    if args.dry_run:
        told = _told(folder)
        refusals: dict[str, str] = {}
        for job, options in asked:
            print(f"{job.line}  # {_state(job, options, told.get(_folder(job)), refusals)}")
        return 0
    make_folder(folder)
    rows: list[dict[str, Any]] = []
    try:
        for number, (job, options) in enumerate(asked, start=1):
            tell(f"{number} of {len(jobs)}: {job.line}")
            rows.append(_outcome(job, options))
            row = {name: rows[-1][name] for name in ("title", "benchmark", "fault")}
            if row["fault"] and not any(row.items() <= other.items() for other in rows[:-1]):  # of its eval and sweep
                tell(f"{job.row.title}, {job.benchmark}: {row['fault']}", logging.WARNING)
    finally:
        rows += [_row(job, fault="not finished: the command was stopped") for job in jobs[len(rows) :]]
        _write(folder, recipe, args.passed, rows)
    return 2 if any(row["fault"] for row in rows) else 0


def _chosen(jobs: list[Job], words: Sequence[str]) -> list[Job]:
    """The jobs that words choose, each of which names rows, benchmarks or commands."""
    named: list[tuple[set[str], ...]] = [  # of each job its row, its benchmark, its command
        ({job.row.title, job.row.backbone, job.row.name}, {job.benchmark}, {job.command}) for job in jobs
    ]
    known = [set[str]().union(*kind) for kind in zip(*named, strict=True)]
    if strange := [word for word in words if not any(word in names for names in known)]:
        rows = dict.fromkeys(job.row.title for job in jobs)
        others = [*sorted(known[1]), *sorted(known[2])]
        raise OptionError(f"--only {strange[0]!r} names nothing of the recipe: expected {', '.join([*rows, *others])}")
    wanted = [names.intersection(words) for names in known]
    chosen = [
        job
        for job, names in zip(jobs, named, strict=True)
        if all(not asked or asked & own for asked, own in zip(wanted, names, strict=True))
    ]
    if not chosen:
        raise OptionError(f"--only {' '.join(words)} leaves nothing of the recipe: no row has all of it")
    return chosen


class _CommandParser(Parser):
    """Of a recipe's commands: what is wrong with one is told with its row."""

    def error(self, message: str) -> NoReturn:
        raise OptionError(f"{self.prog}: {message}")


def _command_parser() -> Parser:
    parser = _CommandParser(prog="lostreg")
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (evaluate, sweep):
        command.add_parser(commands)
    return parser


def _parsed(parser: Parser, job: Job) -> argparse.Namespace:
    try:
        if job.row.backbone not in BACKBONES:
            from lostreg.models.backbone import find_spec

            find_spec(job.row.backbone)
        return parser.parse_args(join_bias(job.words))
    except (BackboneError, OptionError) as error:
        raise OptionError(f"row {job.row.title!r}, {error}") from error


def _lacks(job: Job, options: argparse.Namespace) -> str:
    """What is not there and how to have it; empty where nothing is known to be missing."""
    from lostreg.datasets import FETCHABLE, find_benchmarks
    from lostreg.datasets.registry import fetch_command

    lacks = []
    found = {row.info.name: row for row in find_benchmarks(options.root)}[job.benchmark]
    if job.benchmark in FETCHABLE and found.path is None:
        lacks.append(f"{found.info.title} is not there, `{fetch_command(job.benchmark, options.root)}` fetches it")
    if job.weights and job.row.registers and not job.weights.is_file():
        lacks.append(f"no weights with registers at {job.weights}, `{job.training}` makes them")
    return "; ".join(lacks)


def _refusal(options: argparse.Namespace, refusals: dict[str, str]) -> str:
    """Why the command could not open its benchmark; empty where it can. Each benchmark is opened once."""
    key = str([(name, value) for name, value in vars(options).items() if name in _OPENED])
    if key not in refusals:
        try:
            open_benchmark(options)
            refusals[key] = ""
        except (LostregError, OSError) as error:
            refusals[key] = one_line(str(error))
    return refusals[key]


def _state(job: Job, options: argparse.Namespace, told: dict[str, Any] | None, refusals: dict[str, str]) -> str:
    results = _results(job)
    if results:
        other = f" as `{told['command']}`" if told and told["command"] != job.line else ""
        return ("done" if results.get("complete") else "begun") + other
    return f"missing: {lack}" if (lack := _lacks(job, options) or _refusal(options, refusals)) else "to do"


def _results(job: Job) -> dict[str, Any] | None:
    from lostreg.runs.results import results_of
    from lostreg.runs.sweep import RESULTS_FILE

    return results_of(job.out) if job.command == "eval" else results_of(job.out, RESULTS_FILE)


def _outcome(job: Job, options: argparse.Namespace) -> dict[str, Any]:
    """The row of the table of a command, which is run; what a user can mend is its fault."""
    if lack := _lacks(job, options):
        return _row(job, fault=lack)
    try:
        code = options.run(options)
    except BrokenPipeError:
        raise
    except (LostregError, OSError) as error:
        return _row(job, fault=one_line(str(error)))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _row(job, fault="not enough memory; what was written so far is kept")
    results = _results(job)
    if results is None:
        return _row(job, fault=f"{job.out} was deleted or changed while the run went on")
    return _row(job, _measured(job, results), "too many images could not be read" if code else "")


def _measured(job: Job, results: dict[str, Any]) -> dict[str, Any]:
    """The figures of a run that has come to its end; of a sweep those of its best feature and fixed bias."""
    from lostreg.metrics import Corloc

    facts = {"limit": results["benchmark"]["limit"], "unreadable": results["unreadable"]}
    images = results["images"]
    if job.command == "sweep":
        best = max(results["rows"], key=lambda row: float(row["best_corloc"]))
        facts |= {"feature": best["feature"], "layer": best["layer"], "bias": best["best_bias"]}
        score = Corloc(round(best["best_corloc"] / 100 * images), images)
    else:
        score = Corloc(results["hits"], images)
    return {
        "corloc": round(score.percent, 4),
        "hits": score.hits,
        "images": images,
        "wilson_95": [round(bound, 4) for bound in score.wilson_interval()],
        **facts,
    }


def _row(job: Job, measured: dict[str, Any] | None = None, fault: str = "") -> dict[str, Any]:
    """A row of the table; it has a difference where the same images and boxes were measured as were published."""
    published, difference = job.row.published.get(job.benchmark), None
    if measured and published is not None and measured["limit"] is None and not decided(job.passed, _OTHER_TRUTH):
        difference = round(measured["corloc"] - published, 4)
    weights = job.row.checkpoint or ("the hub's weights" if job.weights else "these weights")
    return {
        "title": job.row.title,
        "backbone": job.row.backbone,
        "benchmark": job.benchmark,
        "folder": _folder(job),
        "command": job.line,
        "with": list(job.passed),
        "measured": measured,
        "published": published,
        "published_for": None if published is None else weights,
        "difference": difference,
        "fault": fault or None,
        "note": job.row.note,
    }


def _folder(job: Job) -> str:
    """Of its run, beside the table."""
    return f"{job.row.name}/{job.out.name}"


def _told(folder: Path) -> dict[str, dict[str, Any]]:
    """The measured rows of the table that is there, by their run's folder."""
    from lostreg.runs.results import results_of

    rows: Any = (results_of(folder, f"{TABLE}.json") or {}).get("rows")
    measured = [
        row
        for row in (rows if isinstance(rows, list) else [])
        if isinstance(row, dict) and row.keys() >= _ROW and isinstance(row["measured"], dict) and row["measured"]
    ]
    return {row["folder"]: row for row in measured}


def _write(folder: Path, recipe: Recipe, passed: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """Write the table of these rows, and of those that earlier calls have measured."""
    from lostreg.jsonio import write_json, write_whole

    known = _told(folder)
    known |= {
        row["folder"]: row
        for row in rows
        if row["measured"] or row["folder"] not in known or known[row["folder"]]["command"] != row["command"]
    }
    table = [known[place] for place in map(_folder, recipe.jobs(folder.parent)) if place in known]
    document = {"recipe": recipe.name, "source": recipe.source, "method": recipe.method, "rows": table}
    text = _as_text(recipe, passed, table)
    write_json(folder / f"{TABLE}.json", document)
    write_whole(folder / f"{TABLE}.md", text, errors="backslashreplace")
    print(f"\n{text}\nwritten to {folder}: {TABLE}.json, {TABLE}.md", flush=True)


def _as_text(recipe: Recipe, passed: Sequence[str], table: Sequence[dict[str, Any]]) -> str:
    """The table, and what there is to say of it, as Markdown."""
    heading = "; ".join(part for part in (recipe.name, recipe.source, recipe.method) if part)
    options = f"Run with `{shlex.join(passed)}`" if passed else ""
    cells = [_HEADINGS, ("---",) * len(_HEADINGS), *map(_cells, table)]
    lines = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in cells)
    subjects = [(row, f"{row['title']} on {row['benchmark']}") for row in table]
    others = _listed((_options_of(row), subject) for row, subject in subjects if row["with"] != list(passed))
    faults = _listed((row["fault"], subject) for row, subject in subjects)
    notes = _listed((row["note"], row["title"]) for row in table)
    return "\n\n".join(part for part in (heading, options, lines, others, faults, notes) if part)


def _options_of(row: dict[str, Any]) -> str:
    return f"run with `{shlex.join(row['with'])}`" if row["with"] else "run without further options"


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    what, measured, published = row["benchmark"], row["measured"], row["published"]
    figures = ("not run", "-", "-")
    if row["command"].split()[1] == "sweep":
        what += ", best of the sweep"
        if measured:
            what += ", chosen by labels: {feature} of layer {layer} at bias {bias:g}".format(**measured)
    if measured:
        low, high = measured["wilson_95"]
        part = "" if measured["limit"] is None else f" (the first {measured['limit']} images alone)"
        broken = f" ({measured['unreadable']} not readable)" if measured["unreadable"] else ""
        hits = f"{measured['hits']}/{measured['images']}{part}{broken}"
        figures = (f"{measured['corloc']:.2f}", f"{low:.2f} to {high:.2f}", hits)
    return (
        row["title"],
        what,
        *figures,
        "-" if published is None else f"{published:.1f}",
        "-" if row["difference"] is None else f"{row['difference']:+.2f}",
        row["published_for"] or "-",
    )


def _listed(told: Iterable[tuple[str | None, str]]) -> str:
    """What there is to say of what, as a list with each text once."""
    subjects: dict[str, dict[str, None]] = {}
    for text, subject in told:
        if text:
            subjects.setdefault(text, {})[subject] = None
    return "\n".join(f"- {', '.join(names)}: {text}" for text, names in subjects.items())
