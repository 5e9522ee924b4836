"""Recipes: every command is one that lostreg takes, and every figure stands in eval/published.toml."""

import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest

from lostreg import BACKBONES
from lostreg.cli.main import build_parser

BENCHMARKS = {"voc07", "voc12", "coco20k"}
PAPERS = {"lost-2021", "registers-2024", "test-time-registers-2025", "dinov2-issue-381"}


def load(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def recipes(repository: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: load(path) for path in sorted((repository / "eval" / "recipes").glob("*.toml"))}


@pytest.fixture(scope="module")
def published(repository: Path) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = load(repository / "eval" / "published.toml")["published"]
    return entries


def test_every_paper_has_its_recipes(recipes: dict[str, dict[str, Any]]) -> None:
    assert recipes.keys() == PAPERS


def test_recipes_and_published_figures_are_the_same_list(
    recipes: dict[str, dict[str, Any]], published: list[dict[str, Any]]
) -> None:
    def row(source: str, entry: dict[str, Any], figures: str) -> tuple[Any, ...]:
        return source, entry.get("backbone"), entry.get("checkpoint"), tuple(sorted(entry[figures].items()))

    told = [row(paper["source"], entry, "published") for paper in recipes.values() for entry in paper["recipe"]]
    assert sorted(told, key=str) == sorted((row(entry["source"], entry, "corloc") for entry in published), key=str)


def test_every_command_is_one_that_lostreg_takes(recipes: dict[str, dict[str, Any]]) -> None:
    parser = build_parser()
    outs = []
    for paper in recipes.values():
        for entry in paper["recipe"]:
            for command in entry["commands"]:
                program, *words = shlex.split(command)
                args = parser.parse_args(words)
                backbones = [args.backbone] if isinstance(args.backbone, str) else args.backbone
                assert program == "lostreg"
                assert set(backbones) == {entry.get("backbone", backbones[0])}
                assert set(backbones) <= BACKBONES.keys()
                assert args.benchmark in entry["published"].keys() & BENCHMARKS
                outs.append(args.out)
    assert len(set(outs)) == len(outs) > 20


def test_each_benchmark_of_a_recipe_that_can_be_run_has_a_command(recipes: dict[str, dict[str, Any]]) -> None:
    for paper in recipes.values():
        for entry in paper["recipe"]:
            evaluated = {shlex.split(command)[2] for command in entry["commands"] if "lostreg eval" in command}
            assert evaluated in (set(), set(entry["published"]))
            assert entry["note"]
