"""Recipes that come with lostreg: every command is one that lostreg takes, and every figure has its commands."""

import shlex
from pathlib import Path

import pytest

from lostreg import BACKBONES
from lostreg.cli.main import build_parser
from lostreg.cli.options import join_bias
from lostreg.cli.recipes import Recipe, load_recipe, recipe_names

BENCHMARKS = {"voc07", "voc12", "coco20k"}
PAPERS = ["dinov2-issue-381", "lost-2021", "registers-2024", "test-time-registers-2025"]


@pytest.fixture(scope="module")
def recipes() -> list[Recipe]:
    return [load_recipe(name) for name in recipe_names()]


def test_every_paper_has_its_recipe(recipes: list[Recipe]) -> None:
    assert [recipe.name for recipe in recipes] == PAPERS
    assert all(recipe.source and recipe.method for recipe in recipes)


def test_every_command_is_one_that_lostreg_takes(recipes: list[Recipe]) -> None:
    parser = build_parser()
    outs = []
    for job in (job for recipe in recipes for job in recipe.jobs(Path("out"))):
        program, *words = shlex.split(job.line)
        args = parser.parse_args(join_bias(words))
        backbones = [args.backbone] if isinstance(args.backbone, str) else args.backbone
        assert (program, args.command, args.out, args.weights) == ("lostreg", job.command, job.out, job.weights)
        assert backbones == [job.row.backbone]
        assert job.row.backbone in BACKBONES
        outs.append(args.out)
    assert len(set(outs)) == len(outs) > 60


def test_a_row_runs_on_the_benchmarks_that_have_a_figure(recipes: list[Recipe]) -> None:
    for row in (row for recipe in recipes for row in recipe.rows):
        assert set(row.benchmarks) == row.published.keys() <= BENCHMARKS
        assert all(0 < figure < 100 for figure in row.published.values())
        assert row.note


def test_rows_that_need_trained_registers_name_the_command_that_makes_them(recipes: list[Recipe]) -> None:
    (recipe,) = [recipe for recipe in recipes if recipe.name == "registers-2024"]
    assert {job.training for job in recipe.jobs(Path("out")) if job.weights} == {
        f"lostreg registers train IMAGES --backbone {backbone} --registers 4 "
        f"--out out/registers-2024/{backbone}-reg4/registers"
        for backbone in ("deit3_vitb16", "openclip_vitb16")
    }
