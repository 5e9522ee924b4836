"""Trainings that several processes share: two of them, on the CPU, as torchrun starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import scene
from small_vit import NAME, save_weights, small, write_images

from lostreg.cli.main import main

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = (
    *("--backbone", NAME, "--device", "cpu", "--registers", "2", "--steps", "6", "--max-side", "112", "--views", "3"),
    *("--batch-size", "4", "--learning-rate", "1e-3", "--unlock", "registers", "positions", "last:1", "--seed", "4"),
)
# The second process is killed after a checkpoint, or has not enough memory once.
ILL = """
import os, signal, sys, torch
from lostreg.cli.main import main
from lostreg.training import train
ill, update, forward = sys.argv.pop(1), train._Training._update, train.patch_tokens
def killed(training, pictures):
    if training._step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return update(training, pictures)
def short(backbone, pixels, *, save_memory):
    if torch.is_grad_enabled() and not save_memory:
        raise RuntimeError("CUDA out of memory")
    return forward(backbone, pixels, save_memory=save_memory)
if os.environ["RANK"] == "1":
    if ill == "killed":
        train._Training._update = killed
    else:
        train.patch_tokens = short
sys.exit(main())
"""


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Images, one of them broken, and all options but --out."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, [scene(number, 190, 150) for number in range(12)])
    (folder / "broken.png").write_bytes(b"no image")
    weights = save_weights(small(), tmp_path_factory.mktemp("weights") / "small.safetensors")
    return ["registers", "train", str(folder), *OPTIONS, "--weights", str(weights)]


@pytest.fixture(scope="module")
def shared(
    repository: Path, arguments: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, "subprocess.CompletedProcess[str]"]:
    """What two processes have trained, and what they said."""
    out = tmp_path_factory.mktemp("shared")
    return out, launch(repository, "-m", "lostreg", *arguments, "--out", out)


def launch(repository: Path, *arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )


def last_weights(folder: Path) -> dict[str, torch.Tensor]:
    """What has learned, after the last step, whether that was the best or not."""
    student: dict[str, torch.Tensor] = torch.load(folder / "checkpoint.pt", weights_only=True)["student"]
    return student


def test_two_processes_learn_what_one_does(
    arguments: list[str], shared: "tuple[Path, subprocess.CompletedProcess[str]]", tmp_path: Path
) -> None:
    assert main([*arguments, "--out", str(tmp_path)]) == 2  # an image is broken
    out, _ = shared
    alone, together = (json.loads((folder / "training.json").read_text()) for folder in (tmp_path, out))
    assert (alone["processes"], together["processes"]) == (1, 2)
    for name in ("learned_from", "held_out", "unreadable", "best_step"):
        assert together[name] == alone[name]
    torch.testing.assert_close(last_weights(out), last_weights(tmp_path), atol=1e-5, rtol=0)


def test_only_one_of_them_tells(shared: "tuple[Path, subprocess.CompletedProcess[str]]") -> None:
    out, run = shared
    assert run.stderr.count("broken.png: not a readable image") == 1
    assert [line.split()[0] for line in run.stdout.splitlines()] == [NAME, "written"]
    assert f"--weights {out / 'registers.safetensors'}" in run.stdout


def test_neither_a_kill_nor_a_lack_of_memory_in_one_of_them_changes_the_weights(
    repository: Path,
    arguments: list[str],
    shared: "tuple[Path, subprocess.CompletedProcess[str]]",
    tmp_path: Path,
) -> None:
    script = tmp_path / "ill.py"
    script.write_text(ILL)
    out = tmp_path / "out"
    assert launch(repository, script, "killed", *arguments, "--out", out).returncode == 1
    assert not json.loads((out / "training.json").read_text())["complete"]
    assert (out / "checkpoint.pt").exists()
    run = launch(repository, script, "short", *arguments, "--out", out)
    assert run.stderr.count("out of memory on cpu: computing what is inside blocks twice from now on") == 1
    torch.testing.assert_close(last_weights(out), last_weights(shared[0]), atol=0, rtol=0)
    name = "registers.safetensors"
    assert (out / name).read_bytes() == (shared[0] / name).read_bytes()


def test_a_mistake_is_told_once(repository: Path, arguments: list[str], tmp_path: Path) -> None:
    run = launch(repository, "-m", "lostreg", *arguments, "--out", tmp_path / "out", "--batch-size", "3")
    told = [line for line in run.stderr.splitlines() if line.startswith("lostreg")]
    assert told[0] == "lostreg registers: error: batch_size must be a multiple of 2, the number of processes, not 3"
    assert not [line for line in told[1:] if "error" in line]
    assert run.returncode == 1
    assert not (tmp_path / "out").exists()


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launcher tells the first of two processes."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("launched")
def test_without_accelerate_the_extra_is_named(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert '2 processes were launched, which need Accelerate to share a training: pip install "lostreg[train]"' in line


@pytest.mark.usefixtures("launched")
def test_an_ablation_is_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["registers", "ablate", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "registers ablate is one process" in capsys.readouterr().err
