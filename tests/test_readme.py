"""Every command and the Python code that README.md shows, run in a folder laid out as it says."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import timm

from lostreg.cli.main import main

BLOCKS = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
CORLOC = re.compile(r"corloc \d+\.\d\d \(\d+/\d+\)")


def blocks(repository: Path, language: str) -> list[str]:
    text = (repository / "README.md").read_text(encoding="utf-8")
    return [body for found, body in BLOCKS.findall(text) if found == language]


@pytest.fixture(scope="module")
def commands(repository: Path) -> list[str]:
    """Every line that a reader would type into a shell."""
    return [line for block in blocks(repository, "sh") for line in block.splitlines()]


def of_lostreg(commands: list[str]) -> list[str]:
    return [line for line in commands if line.startswith("lostreg ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """The stranger's folder: a photo, photos, a VOC and a COCO folder, all made of the sample's pictures."""
    here = tmp_path_factory.mktemp("readme")
    sample = repository / "datasets" / "sample"
    pictures = sorted((sample / "JPEGImages").glob("*.jpg"))[:2]
    shutil.copy(pictures[0], here / "photo.jpg")
    for name in ("photos", "train2017", "annotations", "VOCdevkit/VOC2007/ImageSets/Main"):
        (here / name).mkdir(parents=True)
    voc = here / "VOCdevkit" / "VOC2007"
    shutil.copytree(sample / "Annotations", voc / "Annotations")
    shutil.copytree(sample / "JPEGImages", voc / "JPEGImages")
    (voc / "ImageSets/Main/trainval.txt").write_text("".join(f"{path.stem}\n" for path in pictures))
    for path in pictures:
        shutil.copy(path, here / "photos" / path.name)
        shutil.copy(path, here / "train2017" / path.name)
    images = [f'{{"id": {i}, "file_name": "{path.name}"}}' for i, path in enumerate(pictures, start=1)]
    boxes = [f'{{"id": {i}, "image_id": {i}, "category_id": 1, "bbox": [9, 9, 300, 300]}}' for i in (1, 2)]
    (here / "annotations/instances_train2017.json").write_text(
        f'{{"images": [{",".join(images)}], "annotations": [{",".join(boxes)}], "categories": [{{"id": 1}}]}}'
    )
    return here


@pytest.fixture
def _in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside it, with the two things replaced that need the internet: the hub, and the fetching of a benchmark."""

    def fetch(name: str, root: Path, **options: object) -> Path:
        del name, options
        shutil.copytree(folder / "VOCdevkit", root / "VOCdevkit", dirs_exist_ok=True)
        return root

    monkeypatch.chdir(folder)
    monkeypatch.setattr("lostreg.datasets.fetch.fetch", fetch)
    monkeypatch.setattr("lostreg.models.checkpoints.hub_weights", lambda name: nullcontext(f"random, not {name}"))
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **options: create(name, **options))
    monkeypatch.setattr("lostreg.datasets.registry.load_voc", _load_voc_of_any_length)


def _load_voc_of_any_length(*args: object, expected: int | None = None, **options: object) -> object:
    from lostreg.datasets.voc import load_voc

    return load_voc(*args, **options)  # type: ignore[arg-type]


def test_the_readme_shows_commands(commands: list[str]) -> None:
    assert len(of_lostreg(commands)) >= 10
    assert {line.split()[1] for line in of_lostreg(commands)} >= {
        "predict",
        "eval",
        "score",
        "sweep",
        "calibrate",
        "backbones",
        "datasets",
    }


def test_the_make_targets_are_those_that_ci_runs(repository: Path, commands: list[str]) -> None:
    others = [line for line in commands if line not in of_lostreg(commands)]
    assert others == ["make demo", "make test", "source .venv/bin/activate"]
    script = (repository / ".ci" / "run").read_text().splitlines()
    assert {"make demo", "make test", "make lint"} <= set(script)


@pytest.mark.usefixtures("_in_folder")
def test_every_lostreg_command_runs_in_the_order_shown(commands: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    for line in of_lostreg(commands):
        words = shlex.split(line)
        assert main(words[1:]) == 0, line
        last = capfd.readouterr().out.splitlines()[-1]
        if words[1] in ("eval", "score") and line.count("dino") != 2:
            assert CORLOC.fullmatch(last), line
    for made in (
        "found.png",
        "boxes.jsonl",
        "out/voc/results.json",
        "out/coco/results.json",
        "out/sweep/sweep.png",
        "out/bias.json",
    ):
        assert Path(made).exists()
    assert len(list(Path("pictures").glob("*.png"))) == 2


@pytest.mark.usefixtures("_in_folder")
def test_the_python_code_runs(repository: Path) -> None:
    code = blocks(repository, "python")[0]
    assert len(code.splitlines()) == 5
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("[[") == 5


@pytest.mark.usefixtures("_in_folder")
def test_the_pipeline_of_ray_data_runs(repository: Path) -> None:
    pytest.importorskip("ray", reason="needs Ray: pip install lostreg[ray]")
    _, code = blocks(repository, "python")
    assert len(code.splitlines()) == 6
    environment = {**os.environ, "RAY_ADDRESS": "local", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(repository)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^\d+ \d+ .*[\d.]+.* None$", done.stdout, re.MULTILINE)) == 2


def test_generated_documentation_is_up_to_date(repository: Path) -> None:
    command = [sys.executable, "scripts/update_docs.py", "--check"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_relative_link_leads_somewhere(repository: Path) -> None:
    for document in [*repository.glob("*.md"), *repository.glob("*/*.md"), *repository.glob("datasets/*/*.md")]:
        if ".venv" in document.parts:
            continue
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document}: {target}"
