"""Recipes: the rows of a paper's table as data, and the commands that measure the same.

A recipe is a TOML file. `lostreg/recipes` holds those of the papers; eval/README.md says what one may hold.
"""

import difflib
import re
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final, Literal

from lostreg.checks import shown
from lostreg.datasets.registry import BENCHMARKS
from lostreg.defaults import TRAINED_FILE
from lostreg.errors import OptionError, RecipeError
from lostreg.jsonio import is_finite_number
from lostreg.models.table import BACKBONES

DECIDED: Final = ("--out", "--backbone", "--weights")
"""Options that the recipe decides, for every row anew."""

TRAINING: Final = "registers"
"""Folder of a row that holds a training."""

_SHIPPED: Final = resources.files("lostreg") / "recipes"
_FIELDS: Final[Mapping[str, Any]] = {  # of a row, each with what it is where nothing is said
    "title": "",
    "backbone": "",
    "name": "",
    "options": "",
    "sweep": "",
    "registers": 0,
    "benchmarks": [],
    "published": {},
    "checkpoint": "",
    "note": "",
}


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        title: as the paper calls it.
        backbone: that is run.
        name: of its folder.
        options: for ``eval`` and ``sweep``, in words.
        sweep: further ones for ``sweep``; without any there is none.
        registers: that are trained into the backbone beforehand, by ``lostreg registers train``; 0 for none.
        benchmarks: that it is run on.
        published: corloc in percent by benchmark.
        checkpoint: whose figures those are; empty where they are of exactly these weights.
        note: what may be expected.
    """

    title: str
    backbone: str
    name: str
    options: tuple[str, ...]
    sweep: tuple[str, ...]
    registers: int
    benchmarks: tuple[str, ...]
    published: Mapping[str, float]
    checkpoint: str
    note: str


@dataclass(frozen=True)
class Job:
    """One command of a row.

    Attributes:
        row: what it measures.
        command: which of the two.
        benchmark: by its name.
        folder: of the row.
        weights: file of them, with the registers that the row needs; None for those of the hub.
        passed: further words for the command.
    """

    row: Row
    command: Literal["eval", "sweep"]
    benchmark: str
    folder: Path
    weights: Path | None
    passed: tuple[str, ...]

    @property
    def out(self) -> Path:
        """Its own folder."""
        return self.folder / (self.benchmark if self.command == "eval" else f"{self.benchmark}-sweep")

    @property
    def training(self) -> str:
        """The command that makes weights with the registers that the row needs."""
        options = ["--backbone", self.row.backbone, "--registers", str(self.row.registers)]
        words = ["lostreg", "registers", "train", "IMAGES", *options, "--out", str(self.folder / TRAINING)]
        return shlex.join(words)

    @property
    def words(self) -> list[str]:
        """The command, without the program's name."""
        weights = ["--weights", str(self.weights)] if self.weights else []
        sweep = self.row.sweep if self.command == "sweep" else ()
        own = ["--backbone", self.row.backbone, *weights, *self.row.options, *sweep, "--out", str(self.out)]
        return [self.command, self.benchmark, *own, *self.passed]

    @property
    def line(self) -> str:
        """The command, as one would type it."""
        return shlex.join(["lostreg", *self.words])


@dataclass(frozen=True)
class Recipe:
    """A paper's table.

    Attributes:
        name: of the file, without its suffix.
        source: of the published figures.
        method: how they came about.
        rows: in the paper's order.
    """

    name: str
    source: str
    method: str
    rows: tuple[Row, ...]

    def jobs(self, out: Path, passed: Sequence[str] = (), weights: Mapping[str, Path] | None = None) -> list[Job]:
        """The commands, in the order in which they are run: row by row, those of ``sweep`` last.

        Args:
            out: folder of all recipes.
            passed: further words for each of them.
            weights: files of them by the name of the row; other rows that need registers look for them in their own
                folder, where `Job.training` writes them.

        Raises:
            OptionError: if there is no such row.
        """
        files = dict(weights or {})
        if strange := files.keys() - {row.name for row in self.rows}:
            rows = ", ".join(row.name for row in self.rows)
            raise OptionError(f"no row {min(strange)!r} to give weights to: expected one of {rows}")
        for row in self.rows:
            if row.registers:
                files.setdefault(row.name, out / self.name / row.name / TRAINING / TRAINED_FILE)
        commands: tuple[Literal["eval", "sweep"], ...] = ("eval", "sweep")
        return [
            Job(row, command, benchmark, out / self.name / row.name, files.get(row.name), tuple(passed))
            for row in self.rows
            for command in (commands if row.sweep else commands[:1])
            for benchmark in row.benchmarks
        ]


def recipe_names() -> list[str]:
    """The recipes that come with lostreg."""
    return sorted(file.name.removesuffix(".toml") for file in _SHIPPED.iterdir() if file.name.endswith(".toml"))


def load_recipe(name: str) -> Recipe:
    """A recipe of lostreg's by its name, or one's own by the path of its file.

    Raises:
        RecipeError: if there is none, or it is malformed.
    """
    file = _SHIPPED / f"{name}.toml" if name in recipe_names() else Path(name)
    if not file.is_file():
        raise RecipeError(f"no recipe {name!r}: expected {', '.join(recipe_names())}, or a TOML file of your own")
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{name} is no TOML file: {error}") from error
    try:
        return _recipe(file.name.removesuffix(".toml"), content)
    except ValueError as error:
        raise RecipeError(f"{name}: {error}") from error


def _recipe(name: str, content: dict[str, Any]) -> Recipe:
    """Its fields checked; a `ValueError` says what is wrong with them."""
    rows = content.pop("row", None)
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError("expected tables [[row]], at least one")
    source, method = (_checked(key, content.pop(key, ""), str) for key in ("source", "method"))
    checked = tuple(_row({**content, **row}) for row in rows)
    names = [row.name for row in checked]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"two rows write to {twice!r}: give one of them a name of its own")
    return Recipe(name, source, method, checked)


def _checked(key: str, value: Any, kind: type) -> Any:
    if type(value) is kind and (not isinstance(value, str) or value.isprintable()):
        return value
    expected = {str: "text on one line", int: "a whole number", list: "a list", dict: "a table"}[kind]
    raise ValueError(f"expected {key} as {expected}, not {shown(value)}")


def _row(given: dict[str, Any]) -> Row:
    if unknown := next((key for key in given if key not in _FIELDS), None):
        near = difflib.get_close_matches(unknown, _FIELDS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"unknown field {unknown!r}: {hint}known are {', '.join(_FIELDS)}")
    fields = {key: _checked(key, given.get(key, empty), type(empty)) for key, empty in _FIELDS.items()}
    title, backbone, registers = fields["title"], fields["backbone"], fields["registers"]
    if not title or not backbone:
        raise ValueError(f"expected a title and a backbone for each row, not {shown(title)} and {shown(backbone)}")
    name = fields["name"] or backbone.replace(":", "_")
    if not re.fullmatch(r"[\w.-]*\w", name):
        raise ValueError(f"row {title!r}: expected a name of letters, digits, _, - and ., not {shown(name)}")
    if registers < 0:
        raise ValueError(f"row {title!r}: expected a number of registers, not {shown(registers)}")
    published = _published(fields)
    benchmarks = tuple(fields["benchmarks"] or published)
    strange = [word for word in (*benchmarks, *published) if not isinstance(word, str) or word not in BENCHMARKS]
    if strange or not benchmarks or len(set(benchmarks)) < len(benchmarks):
        raise ValueError(
            f"row {title!r}: expected benchmarks or published figures, each of {', '.join(BENCHMARKS)} at most once, "
            f"not {shown(strange or list(benchmarks))}"
        )
    options, sweep = (_words(fields[key], title) for key in ("options", "sweep"))
    told = {"name": name, "options": options, "sweep": sweep, "benchmarks": benchmarks, "published": published}
    return Row(**{**fields, **told})


def _published(fields: dict[str, Any]) -> dict[str, float]:
    """Figures by benchmark: those given or, for a backbone as it is, those of its row of the table."""
    spec = BACKBONES.get(fields["backbone"])
    as_is = not (fields["options"] or fields["registers"])
    figures = fields["published"] or (dict(spec.published) if spec and as_is else {})
    for figure in figures.values():
        if not is_finite_number(figure) or not 0 <= figure <= 100:
            raise ValueError(f"row {fields['title']!r}: expected published corloc in percent, not {shown(figure)}")
    return {benchmark: float(figure) for benchmark, figure in figures.items()}


def _words(text: str, title: str) -> tuple[str, ...]:
    words = tuple(shlex.split(text))
    if taken := decided(words, ("--out", "--backbone")):
        raise ValueError(f"row {title!r}: {taken} is not among the options, the row says it otherwise")
    return words


def decided(words: Sequence[str], options: Sequence[str] = DECIDED) -> str | None:
    """The first of these options that is among the words; None where none is."""
    return next((word for word in words if word.partition("=")[0] in options), None)
