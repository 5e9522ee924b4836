"""Figures: published ones of the table stand in a recipe, measured ones are those of the results files."""

import json
from pathlib import Path

from lostreg import BACKBONES
from lostreg.cli.recipes import load_recipe, recipe_names


def test_published_corloc_of_the_table_is_run_by_a_recipe_with_the_same_source() -> None:
    recipes = [load_recipe(name) for name in recipe_names()]
    sources = {
        row.backbone: (dict(row.published), recipe.source)
        for recipe in recipes
        for row in recipe.rows
        if not row.checkpoint
    }
    assert sources.keys() == {name for name, spec in BACKBONES.items() if spec.published}
    for name, (figures, source) in sources.items():
        assert figures == dict(BACKBONES[name].published)
        assert source.startswith(BACKBONES[name].published_source)


def test_measured_figures_are_those_of_the_results_files(repository: Path) -> None:
    text = (repository / "eval" / "README.md").read_text(encoding="utf-8")
    files = sorted((repository / "eval" / "results").glob("coco-*.json"))
    assert files
    for path in files:
        found = json.loads(path.read_text(encoding="utf-8"))
        low, high = found["wilson_95"]
        score = f"{found['corloc']:.2f} ({found['hits']}/{found['images']})"
        assert found["complete"]
        assert f"| {score} | {low:.2f} to {high:.2f} | [results/{path.name}]" in text
