"""``lostreg reproduce``: the rows of a paper's table, one after the other, measured beside published."""

import argparse
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from lostreg.cli import evaluate, sweep
from lostreg.cli.files import make_folder
from lostreg.cli.options import Parser, Subparsers, join_bias, local_place, one_line, tell
from lostreg.cli.recipes import DECIDED, Job, Recipe, decided, load_recipe, recipe_names
from lostreg.errors import LostregError, OptionError, is_out_of_memory

if TYPE_CHECKING:
    from lostreg.metrics import Corloc

TABLE: Final = "table"  # of OUT/RECIPE, as .json and .md
_OTHER_TRUTH: Final = ("--split", "--no-hard")  # options that change what published figures are of
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
    parser.set_defaults(run=run)


def _row_weights(text: str) -> tuple[str, Path]:
    """``ROW=FILE``, for argparse."""
    row, _, file = text.partition("=")
    if not row or not file:
        raise argparse.ArgumentTypeError(f"expected ROW=FILE, not '{text}'")
    return row, Path(file)


@dataclass(frozen=True)
class Outcome:
    """What came of a command.

    Attributes:
        job: the command.
        score: of the run or, of a sweep, of its best feature and fixed bias; None where it could not be run.
        facts: of the run: ``limit`` and ``unreadable``, of a sweep ``feature``, ``layer`` and ``bias``, too.
        fault: why it could not be run, or what was wrong with it; empty where nothing was.
    """

    job: Job
    score: "Corloc | None"
    facts: dict[str, Any]
    fault: str

    @property
    def difference(self) -> float | None:
        """Measured minus published corloc, in points; None without one of them, or on other images or boxes."""
        published = self.job.row.published.get(self.job.benchmark)
        if self.score is None or published is None:
            return None
        if self.facts["limit"] is not None or decided(self.job.passed, _OTHER_TRUTH):
            return None
        return self.score.percent - published

    @property
    def published_for(self) -> str | None:
        """Whose figure the published one is; None where there is none."""
        row = self.job.row
        weights = row.checkpoint or ("the hub's weights" if self.job.weights else "these weights")
        return weights if self.job.benchmark in row.published else None


def run(args: argparse.Namespace) -> int:
    """Run what was asked for; 2 where something of it could not be."""
    recipe = load_recipe(args.recipe)
    if taken := decided(args.passed, DECIDED):
        raise OptionError(f"--with {taken}: expected an option for all rows, such as --device; see --out and --weights")
    jobs = _chosen(recipe.jobs(args.out, args.passed, dict(args.weights)), args.only)
    parser = _command_parser()
    asked = [(job, _parsed(parser, job)) for job in jobs]  # all of them before the first is run
    if args.dry_run:
        for job, options in asked:
            print(f"{job.line}  # {_state(job, options)}")
        return 0
    folder = args.out / recipe.name
    make_folder(folder)
    outcomes: list[Outcome] = []
    try:
        for number, (job, options) in enumerate(asked, start=1):
            tell(f"{number} of {len(jobs)}: {job.line}")
            outcomes.append(_outcome(job, options))
            if outcomes[-1].fault:
                tell(f"{job.row.title}, {job.benchmark}: {outcomes[-1].fault}")
    finally:
        outcomes += [Outcome(job, None, {}, "not finished: the command was stopped") for job in jobs[len(outcomes) :]]
        _write(folder, recipe, args.passed, outcomes)
    return 2 if any(outcome.fault for outcome in outcomes) else 0


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
        return parser.parse_args(join_bias(job.words))
    except OptionError as error:
        raise OptionError(f"row {job.row.title!r}, {error}") from error


def _lacks(job: Job, options: argparse.Namespace) -> str:
    """What is not there and how to have it; empty where nothing is known to be missing."""
    from lostreg.datasets import FETCHABLE, find_benchmarks

    lacks = []
    found = {row.info.name: row for row in find_benchmarks(options.root)}[job.benchmark]
    if job.benchmark in FETCHABLE and found.path is None:
        root = [] if options.root is None else ["--root", str(options.root)]
        command = shlex.join(["lostreg", "datasets", "fetch", job.benchmark, *root])
        lacks.append(f"{found.info.title} is not there, `{command}` fetches it")
    if job.weights and job.row.registers and not job.weights.is_file():
        lacks.append(f"no weights with registers at {job.weights}, `{job.training}` makes them")
    return "; ".join(lacks)


def _state(job: Job, options: argparse.Namespace) -> str:
    results = _results(job)
    if results:
        return "done" if results.get("complete") else "begun"
    return f"missing: {lack}" if (lack := _lacks(job, options)) else "to do"


def _results(job: Job) -> dict[str, Any] | None:
    from lostreg.runs.results import results_of
    from lostreg.runs.sweep import RESULTS_FILE

    return results_of(job.out) if job.command == "eval" else results_of(job.out, RESULTS_FILE)


def _outcome(job: Job, options: argparse.Namespace) -> Outcome:
    """Run a command; what a user can mend is its fault."""
    if lack := _lacks(job, options):
        return Outcome(job, None, {}, lack)
    try:
        code = options.run(options)
    except BrokenPipeError:
        raise
    except (LostregError, OSError) as error:
        return Outcome(job, None, {}, one_line(str(error)))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return Outcome(job, None, {}, "not enough memory; what was written so far is kept")
    return _measured(job, "too many images could not be read" if code else "")


def _measured(job: Job, fault: str) -> Outcome:
    """What a run that has come to its end has written."""
    from lostreg.metrics import Corloc

    results = _results(job)
    if results is None:
        return Outcome(job, None, {}, f"{job.out} was deleted or changed while the run went on")
    facts = {"limit": results["benchmark"]["limit"], "unreadable": results["unreadable"]}
    images = results["images"]
    if job.command == "eval":
        return Outcome(job, Corloc(results["hits"], images), facts, fault)
    best = max(results["rows"], key=lambda row: float(row["best_corloc"]))
    facts |= {"feature": best["feature"], "layer": best["layer"], "bias": best["best_bias"]}
    return Outcome(job, Corloc(round(best["best_corloc"] / 100 * images), images), facts, fault)


def _write(folder: Path, recipe: Recipe, passed: Sequence[str], outcomes: list[Outcome]) -> None:
    from lostreg.jsonio import write_json, write_whole

    document = {
        "recipe": recipe.name,
        "source": recipe.source,
        "method": recipe.method,
        "with": list(passed),
        "rows": [_as_json(outcome) for outcome in outcomes],
    }
    text = _as_text(recipe, passed, outcomes)
    write_json(folder / f"{TABLE}.json", document)
    write_whole(folder / f"{TABLE}.md", text, errors="backslashreplace")
    print(f"\n{text}\nwritten to {folder}: {TABLE}.json, {TABLE}.md", flush=True)


def _as_json(outcome: Outcome) -> dict[str, Any]:
    job, score, difference = outcome.job, outcome.score, outcome.difference
    measured = None
    if score is not None:
        measured = {
            "corloc": round(score.percent, 4),
            "hits": score.hits,
            "images": score.images,
            "wilson_95": [round(bound, 4) for bound in score.wilson_interval()],
            **outcome.facts,
        }
    return {
        "title": job.row.title,
        "backbone": job.row.backbone,
        "benchmark": job.benchmark,
        "command": job.line,
        "measured": measured,
        "published": job.row.published.get(job.benchmark),
        "published_for": outcome.published_for,
        "difference": None if difference is None else round(difference, 4),
        "fault": outcome.fault or None,
        "note": job.row.note,
    }


def _as_text(recipe: Recipe, passed: Sequence[str], outcomes: list[Outcome]) -> str:
    """The table, and what there is to say of it, as Markdown."""
    heading = "; ".join(part for part in (recipe.name, recipe.source, recipe.method) if part)
    options = f"Run with `{shlex.join(passed)}`" if passed else ""
    rows = [_HEADINGS, ("---",) * len(_HEADINGS), *map(_cells, outcomes)]
    table = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)
    faults = _listed((outcome.fault, f"{outcome.job.row.title} on {outcome.job.benchmark}") for outcome in outcomes)
    notes = _listed((outcome.job.row.note, outcome.job.row.title) for outcome in outcomes)
    return "\n\n".join(part for part in (heading, options, table, faults, notes) if part)


def _cells(outcome: Outcome) -> tuple[str, ...]:
    row, benchmark, facts = outcome.job.row, outcome.job.benchmark, outcome.facts
    published = row.published.get(benchmark)
    what = benchmark
    if outcome.job.command == "sweep":
        what += ", best of the sweep"
        if facts:
            what += ", chosen by labels: {feature} of layer {layer} at bias {bias:g}".format(**facts)
    measured = ("not run", "-", "-")
    if outcome.score is not None:
        low, high = outcome.score.wilson_interval()
        part = "" if facts["limit"] is None else f" (the first {facts['limit']} images alone)"
        broken = f" ({facts['unreadable']} not readable)" if facts["unreadable"] else ""
        hits = f"{outcome.score.hits}/{outcome.score.images}{part}{broken}"
        measured = (f"{outcome.score.percent:.2f}", f"{low:.2f} to {high:.2f}", hits)
    return (
        row.title,
        what,
        *measured,
        "-" if published is None else f"{published:.1f}",
        "-" if outcome.difference is None else f"{outcome.difference:+.2f}",
        outcome.published_for or "-",
    )


def _listed(told: Iterable[tuple[str, str]]) -> str:
    """What there is to say of what, as a list with each text once."""
    subjects: dict[str, dict[str, None]] = {}
    for text, subject in told:
        if text:
            subjects.setdefault(text, {})[subject] = None
    return "\n".join(f"- {', '.join(names)}: {text}" for text, names in subjects.items())
