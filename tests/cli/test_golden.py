"""The boxes that LOST's authors published, through the command line: the metric is theirs to the last image."""

import json
from pathlib import Path

import pytest

from lostreg.cli.main import main

GOLDEN = Path(__file__).parent.parent / "golden"
OBJECT = (
    "<object><name>thing</name><difficult>{4}</difficult><bndbox><xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax>"
    "<ymax>{3}</ymax></bndbox></object>"
)


@pytest.fixture(scope="module")
def voc07(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """VOC 2007 trainval without its images."""
    root = tmp_path_factory.mktemp("voc07")
    folder = root / "VOCdevkit" / "VOC2007"
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    lines = (GOLDEN / "voc07_trainval_boxes.txt").read_text().splitlines()
    for line in lines:
        stem, *boxes = line.split()
        objects = "".join(OBJECT.format(*box.split(",")) for box in boxes)
        (folder / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{objects}</annotation>")
    (folder / "ImageSets/Main/trainval.txt").write_text("".join(line.split()[0] + "\n" for line in lines))
    return root


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published boxes as a predictions file."""
    path = tmp_path_factory.mktemp("published") / "predictions.jsonl"
    with path.open("w") as file:
        for line in (GOLDEN / "lost_vits16_voc07_trainval.txt").read_text().splitlines():
            stem, box = line.split()
            file.write(json.dumps({"image_id": stem, "boxes": [[int(value) for value in box.split(",")]]}) + "\n")
    return path


def test_published_boxes_score_exactly_what_was_published(voc07: Path, published: Path, capsys) -> None:
    assert main(["score", str(published), "voc07", "--root", str(voc07)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "corloc 61.90 (3102/5011)"


def test_a_part_of_the_benchmark_is_scored_from_the_whole_file(voc07: Path, published: Path, capsys) -> None:
    assert main(["score", str(published), "voc07", "--root", str(voc07), "--limit", "1000"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("/1000)")
    assert main(["score", str(published), "voc07", "--root", str(voc07), "--no-hard"]) == 0
    hits, images = map(int, capsys.readouterr().out.rpartition("(")[2].rstrip(")\n").split("/"))
    assert 3000 < hits < 3102  # no image has difficult objects alone, but some were hit through one
    assert images == 5011


def test_one_box_that_moves_changes_the_hits(voc07: Path, published: Path, capsys) -> None:
    lines = [json.loads(line) for line in published.read_text().splitlines()]
    for line in lines:
        line["boxes"][0][0] = line["boxes"][0][2] - 1
    worse = published.with_name("worse.jsonl")
    worse.write_text("\n".join(map(json.dumps, lines)))
    assert main(["score", str(worse), "voc07", "--root", str(voc07)]) == 0
    assert int(capsys.readouterr().out.rpartition("(")[2].partition("/")[0]) < 3102
