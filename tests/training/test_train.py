"""Trainings: what they learn, that a kill costs nothing, and what they say where there is nothing to learn from."""

import copy
import dataclasses
import importlib
import json
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import scene
from safetensors.torch import load_file
from small_vit import NAME, discoverer, norms_of, save_weights, small, write_images

from lostreg.errors import LostregError, LostregWarning, OptionError, PredictionsError, TrainingError
from lostreg.images.decode import read_image
from lostreg.models.backbone import Backbone, load_backbone
from lostreg.models.features import patch_features
from lostreg.models.registers import RegisterNeurons
from lostreg.progress import Progress
from lostreg.training import train
from lostreg.training.options import TrainingOptions
from lostreg.training.teacher import Teacher, pixels_of, square
from lostreg.training.train import train_registers
from lostreg.training.views import Layout

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = TrainingOptions(
    registers=2,
    steps=6,
    max_side=112,
    views=3,
    batch_size=2,
    learning_rate=1e-3,
    unlock=("registers", "positions", "last:1"),
    seed=4,
)
PLANTED = 11  # of the 49 patches of a window: row 1, column 4


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_images(tmp_path_factory.mktemp("images"), [scene(number, 190, 150) for number in range(12)])


@pytest.fixture(scope="module")
def weights(repository: Path, images: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the smallest model with outliers at one place of each image, whatever it shows."""
    backbone = dataclasses.replace(small(), model=copy.deepcopy(small().model))
    windows = [square(read_image(path).pixels, 112, path.name) for path in images]

    def read() -> torch.Tensor:
        seen: list[torch.Tensor] = []
        mlp = backbone.model.blocks[2].mlp  # type: ignore[index, union-attr]
        hook = mlp.register_forward_pre_hook(lambda module, given: seen.append(given[0].clone()))
        norms_of(backbone, windows)
        hook.remove()
        return torch.cat(seen).view(len(images), -1, 64)[:, backbone.prefix_tokens :].flatten(0, 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repository / "scripts"))
        script = importlib.import_module("plant_outliers")
        spot = (16 * 1.5 / 7, 16 * 4.5 / 7)
        constants = {"LAYER": 2, "UNITS": (5, 9), "SPOTS": (spot,), "RADIUS": 0.9}
        for name, value in {**constants, "NORM": 8 * longest(backbone, images)}.items():
            patch.setattr(script, name, value)
        direction = script.mark_positions(backbone, read)
        script.plant(backbone, read(), direction)
    return save_weights(backbone, tmp_path_factory.mktemp("weights") / "planted.safetensors")


@pytest.fixture(scope="module")
def planted(weights: Path) -> Backbone:
    return load_backbone(NAME, weights=weights)


@pytest.fixture(scope="module")
def trained(planted: Backbone, images: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train_registers(images, planted, folder, QUICK)
    return folder


def norms(backbone: Backbone, images: list[Path]) -> np.ndarray:
    """Of the patches of a window of each image at the output, (images, 49)."""
    windows = [square(read_image(path).pixels, 112, path.name) for path in images]
    return np.stack([found.output for found in norms_of(backbone, windows)])


def longest(backbone: Backbone, images: list[Path]) -> float:
    return float(norms(backbone, images).max())


def test_outliers_that_stay_with_a_position_are_unlearned(
    planted: Backbone, images: list[Path], tmp_path: Path
) -> None:
    limit = 4 * longest(small(), images)
    assert (norms(planted, images) > limit).nonzero()[1].tolist() == [PLANTED] * len(images)
    options = dataclasses.replace(QUICK, steps=40, views=8, batch_size=4, learning_rate=3e-3)
    found = train_registers(images, planted, tmp_path, options)
    cured = load_backbone(NAME, weights=found.weights)
    assert not (norms(cured, images) > limit).any()
    assert min(look.held_out for look in found.curve) < 0.1 * found.curve[0].held_out


def weights_of(folder: Path) -> bytes:
    return (folder / "registers.safetensors").read_bytes()


def test_the_weights_are_a_backbone_with_registers(trained: Path, images: list[Path]) -> None:
    found = discoverer(load_backbone(NAME, weights=trained / "registers.safetensors"))
    assert found.backbone.spec.registers == small().spec.registers + 2
    assert found.discover(images[0]).xyxy.shape == (1, 4)


def test_a_training_says_what_it_was(trained: Path) -> None:
    told = json.loads((trained / "training.json").read_text())
    assert told["complete"]
    assert told["training"] == {**asdict(QUICK), "unlock": list(QUICK.unlock)}
    assert (told["learned_from"], told["held_out"], told["unreadable"]) == (10, 2, 0)
    assert [look["step"] for look in told["curve"]] == list(range(len(told["curve"])))
    assert told["best_step"] == min(told["curve"], key=lambda look: look["held_out"])["step"]
    assert told["versions"]["torch"] == torch.__version__.partition("+")[0] or told["versions"]["torch"]


def test_only_what_was_unlocked_has_changed(planted: Backbone, trained: Path) -> None:
    before = planted.model.state_dict()
    after = load_file(trained / "registers.safetensors")
    changed = {name for name in after if name in before and not torch.equal(after[name].float(), before[name])}
    last = f"blocks.{small().depth - 1}."
    assert all(name.startswith(("pos_embed", "cls_token", "reg_token", last)) for name in changed)


def test_the_same_command_gives_the_same_weights(
    planted: Backbone, trained: Path, images: list[Path], tmp_path: Path
) -> None:
    train_registers(images, planted, tmp_path, QUICK, teacher=trained / "teacher")
    assert weights_of(tmp_path) == weights_of(trained)


@pytest.mark.parametrize("after", [("teacher", 3), ("training", 4)])
def test_a_training_that_is_stopped_goes_on_to_the_same_weights(
    planted: Backbone, after: tuple[str, int], trained: Path, images: list[Path], tmp_path: Path
) -> None:
    class StopError(Exception):
        pass

    def stop(progress: Progress) -> None:
        if (progress.step, progress.done) == after:
            raise StopError

    with pytest.raises(StopError):
        train_registers(images, planted, tmp_path, QUICK, on_progress=stop)
    assert not json.loads((tmp_path / "training.json").read_text())["complete"]
    told: list[Progress] = []
    train_registers(images, planted, tmp_path, QUICK, on_progress=told.append)
    assert weights_of(tmp_path) == weights_of(trained)
    if after[0] == "training":
        assert [(progress.done, progress.known) for progress in told if progress.step == "training"] == [(5, 4), (6, 4)]


def test_a_training_that_has_ended_is_not_repeated(planted: Backbone, trained: Path, images: list[Path]) -> None:
    told: list[Progress] = []
    found = train_registers(images, planted, trained, QUICK, on_progress=told.append)
    assert told == []
    assert found.registers == 2
    assert found.curve[0].step == 0


def test_the_loss_of_registers_that_nobody_attends_to_is_that_of_the_control(
    planted: Backbone, trained: Path, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first_loss(registers: int) -> float:
        options = dataclasses.replace(QUICK, registers=registers, steps=1, learning_rate=1e-12)
        found = train_registers(images, planted, tmp_path / str(registers), options, teacher=trained / "teacher")
        return found.curve[0].held_out

    control, attended = first_loss(0), first_loss(2)
    assert attended != control
    own, attention = small().own_prefix_tokens, torch.nn.functional.scaled_dot_product_attention

    def ignoring(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> torch.Tensor:
        if k.shape[-2] == 49 + own + 3:
            rest = [place for place in range(k.shape[-2]) if not own <= place < own + 3]
            k, v = k[..., rest, :], v[..., rest, :]
        return attention(q, k, v, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", ignoring)
    assert first_loss(3) == pytest.approx(control, rel=1e-5)


def test_teacher_and_discoverer_see_the_same_tokens() -> None:
    layout = Layout.of(112, 16)
    pixels = square(scene(3, 190, 150), layout.pixels, "scene")
    teacher = Teacher(small(), layout, 1, "mean", 0)
    patches = torch.from_numpy(teacher.teach(pixels, 0).patches)
    seen = teacher.look(pixels_of(patches, [layout.middle], layout.shape, small()), layout.shape)
    edge = layout.margin * layout.patch
    window = pixels[edge:-edge, edge:-edge]
    mean, std = (np.array(values, np.float32) for values in (small().mean, small().std))
    image = torch.from_numpy(((window / np.float32(255) - mean) / std).transpose(2, 0, 1)[None].astype(np.float32))
    torch.testing.assert_close(small().model.norm(seen), patch_features(small(), image, "out"), atol=1e-4, rtol=1e-4)


def test_a_killed_training_leaves_a_folder_that_goes_on(
    planted: Backbone, weights: Path, images: list[Path], trained: Path, tmp_path: Path
) -> None:
    script = (
        "import os, signal, sys; import torch; torch.set_num_threads(1); from pathlib import Path\n"
        "from lostreg import TrainingOptions, load_backbone, train_registers\n"
        "kill = lambda told: os.kill(os.getpid(), signal.SIGKILL) if (told.step, told.done) == ('training', 3) else 0\n"
        f"backbone, options = load_backbone({NAME!r}, weights=sys.argv[2]), TrainingOptions(**{asdict(QUICK)!r})\n"
        "train_registers([*map(Path, sys.argv[3:])], backbone, sys.argv[1], options, on_progress=kill)\n"
    )
    command = [sys.executable, "-c", script, tmp_path, weights, *images]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    train_registers(images, planted, tmp_path, QUICK)
    assert weights_of(tmp_path) == weights_of(trained)


# What cannot be trained


def refused(
    backbone: Backbone, images: list[Path], folder: Path, message: str, error: type[LostregError], **options: object
) -> None:
    with pytest.raises(error, match=message):
        train_registers(images, backbone, folder, dataclasses.replace(QUICK, **options))  # type: ignore[arg-type]


def test_other_settings_need_another_folder(planted: Backbone, trained: Path, images: list[Path]) -> None:
    refused(planted, images, trained, "other settings: registers was 2 and is now 3", PredictionsError, registers=3)
    refused(planted, images[1:], trained, "count was 12 and is now 11", PredictionsError)


def test_a_folder_can_be_begun_anew_if_the_teacher_fits(
    planted: Backbone, trained: Path, images: list[Path], tmp_path: Path
) -> None:
    shared, other = trained / "teacher", dataclasses.replace(QUICK, steps=1)
    train_registers(images, planted, tmp_path, other, teacher=shared)
    train_registers(images, planted, tmp_path, QUICK, teacher=shared, overwrite=True)
    assert weights_of(tmp_path) == weights_of(trained)
    for options in (dataclasses.replace(QUICK, views=2), dataclasses.replace(QUICK, seed=5)):
        with pytest.raises(TrainingError, match="holds the teacher's features of another backbone, of other images"):
            train_registers(images, planted, tmp_path, options, teacher=shared, overwrite=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_side": 64}, "max_side 64 is too small"),
        ({"views": 19}, "views must be from 1 to 18"),
        ({"unlock": ("head",)}, "cannot unlock 'head'"),
        ({"aggregate": "most"}, "aggregate must be one of median, mean, trimmed"),
        ({"registers": -1}, "registers must be an integer from 0"),
        ({"learning_rate": 0}, "learning_rate must be a number above 0"),
        ({"registers": 0, "unlock": ("registers",)}, "nothing to train in registers"),
    ],
)
def test_options_that_do_not_suit(
    planted: Backbone, options: dict[str, object], message: str, images: list[Path], tmp_path: Path
) -> None:
    refused(planted, images, tmp_path / "out", message, OptionError, **options)


def test_images_that_do_not_suit(planted: Backbone, images: list[Path], tmp_path: Path) -> None:
    refused(planted, [], tmp_path / "none", "at least one image", OptionError)
    refused(planted, images[:1], tmp_path / "one", "1 of 1 images can be used, expected 2", TrainingError)
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    refused(planted, [images[0], broken], tmp_path / "broken", "1 of 2 images can be used.*broken.jpg", TrainingError)
    tiny = write_images(tmp_path / "tiny", [scene(0, 140, 200)] * 2)
    refused(planted, tiny, tmp_path / "small", "140x200 pixels are too few for views, which need 144", TrainingError)


def test_an_image_that_cannot_be_read_is_left_out(planted: Backbone, images: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    found = train_registers([broken, *images], planted, tmp_path / "out", dataclasses.replace(QUICK, steps=1))
    assert (found.images, found.held_out, found.unreadable) == (10, 2, 1)


def test_what_is_damaged_is_named(planted: Backbone, images: list[Path], tmp_path: Path) -> None:
    options = dataclasses.replace(QUICK, steps=2)
    (tmp_path / "checkpoint.pt").write_bytes(b"torn")
    with pytest.raises(TrainingError, match=r"checkpoint.pt is damaged"):
        train_registers(images, planted, tmp_path, options)
    (tmp_path / "checkpoint.pt").unlink()
    lesson = tmp_path / "teacher" / "0000000.npz"
    lesson.write_bytes(b"torn")
    with pytest.raises(TrainingError, match=r"0000000.npz is gone or damaged"):
        train_registers(images, planted, tmp_path, options)
    lesson.unlink()
    assert train_registers(images, planted, tmp_path, options).images == 10


def test_a_full_disk_is_told_before(
    planted: Backbone, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    refused(planted, images, tmp_path, "12 images take .* but .* are free", OptionError)


def test_a_backbone_with_test_time_registers_is_refused(planted, images: list[Path], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="beside test-time registers"):
        train_registers(images, small().with_registers(RegisterNeurons(((1, 1),))), tmp_path, QUICK)


def test_memory_that_runs_out_is_saved_on_once(
    planted: Backbone, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, asked = train.patch_tokens, []

    def short(backbone: Backbone, pixels: torch.Tensor, *, save_memory: bool) -> torch.Tensor:
        asked.append(save_memory)
        if torch.is_grad_enabled() and not save_memory:
            raise RuntimeError("CUDA out of memory")
        return forward(backbone, pixels, save_memory=save_memory)

    monkeypatch.setattr(train, "patch_tokens", short)
    with pytest.warns(LostregWarning, match="computing what is inside blocks twice"):
        train_registers(images, planted, tmp_path, dataclasses.replace(QUICK, steps=2))
    assert asked == [False, False, True, True, True, True]
