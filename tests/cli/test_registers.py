"""`registers train`, and its weights in the commands that take weights."""

import json
from pathlib import Path

import pytest
from conftest import scene
from small_vit import NAME, save_weights, small, strict_json, write_images

from lostreg.cli.main import main

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = ("--steps", "2", "--max-side", "112", "--views", "2", "--batch-size", "2")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_weights(small(), tmp_path_factory.mktemp("weights") / "small.safetensors")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, [scene(number, 190, 150) for number in range(4)])
    return folder


@pytest.fixture(scope="module")
def trained(weights: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    assert train(weights, images, "--out", out, "--registers", 3) == 0
    return out


def train(weights: Path, *arguments: object) -> int:
    options = ("--backbone", NAME, "--weights", weights, "--device", "cpu")
    return main(["registers", "train", *map(str, (*arguments, *QUICK, *options))])


def test_a_training_ends_with_how_its_file_is_used(
    weights: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(weights, images, "--out", tmp_path, "--unlock", "registers", "last:1") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{NAME} with 4 new registers, from 3 images: the loss on 1 others fell from ")
    assert second.endswith(f"use it as --backbone {NAME} --weights {tmp_path / 'registers.safetensors'}")
    told = json.loads((tmp_path / "training.json").read_text())["training"]
    assert told["unlock"] == ["registers", "last:1"]
    assert (tmp_path / "checkpoint.pt").is_file()


def test_a_training_that_made_nothing_better_says_so(
    weights: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(weights, images, "--out", tmp_path, "--learning-rate", "0.5") == 0
    said = capsys.readouterr()
    assert "in 0 steps" in said.out
    assert "no step made it lower: these are the weights as given" in said.err


@pytest.mark.parametrize("command", ["predict", "artifacts", "attention"])
def test_other_commands_take_it_for_a_backbone_with_registers(
    command: str, trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--backbone", NAME, "--weights", str(trained / "registers.safetensors"), "--device", "cpu"]
    out = ["--json", "-"] if command == "predict" else ["--out", str(tmp_path / "out")]
    assert main([command, str(images), *out, *options]) == 0
    if command == "predict":
        assert len([strict_json(line) for line in capsys.readouterr().out.splitlines()]) == 4
    if command == "artifacts":
        told = strict_json((tmp_path / "out/artifacts.json").read_text())
        assert "register 3" in json.dumps(told)


def test_an_image_that_cannot_be_used_is_told_and_the_others_count(
    weights: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    assert train(weights, images, broken, "--out", tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert "error: " in captured.err
    assert "broken.jpg" in captured.err
    assert "registers.safetensors" in captured.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--registers", "-1"), "expected an integer of at least 0, not '-1'"),
        (("--unlock", "head"), "cannot unlock 'head'"),
        (("--learning-rate", "nan"), "learning_rate must be a number above 0"),
        (("--max-side", "64"), "max_side 64 is too small"),
        (("--registers", "4", "--out", "trained"), "other settings: registers was 3 and is now 4"),
    ],
)
def test_a_mistake_is_one_line(
    options: tuple[str, ...],
    message: str,
    weights: Path,
    images: Path,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["registers", "train", str(images), "--out", "new", "--registers", "3", *QUICK]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trained").symlink_to(trained)
    try:
        code = main([*arguments, "--backbone", NAME, "--weights", str(weights), "--device", "cpu", *options])
    except SystemExit as end:
        code = end.code  # type: ignore[assignment]
    assert code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not Path("new/training.json").exists()  # the folder is tied to nothing
