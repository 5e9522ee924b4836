"""Published figures: the table's rows say what eval/published.toml says, with the same source."""

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
