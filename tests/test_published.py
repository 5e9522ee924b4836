"""Published figures: the table's rows say what eval/published.toml says, with the same source."""

import json
import tomllib
from pathlib import Path

from lostreg import BACKBONES


def test_rows_with_published_corloc_agree_with_the_list_of_figures(repository: Path) -> None:
    entries = tomllib.loads((repository / "eval" / "published.toml").read_text(encoding="utf-8"))["published"]
    listed = {entry["backbone"]: entry for entry in entries if "backbone" in entry}
    assert listed.keys() == {name for name, spec in BACKBONES.items() if spec.published}
    for name, entry in listed.items():
        assert dict(BACKBONES[name].published) == entry["corloc"]
        assert entry["source"].startswith(BACKBONES[name].published_source)


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
