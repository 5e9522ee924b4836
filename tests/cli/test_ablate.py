"""`registers ablate`: registers of all three origins in one report, and a second call that trains nothing."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
from conftest import scene
from fabricate import SPLIT, set_box
from matplotlib.figure import Figure
from small_vit import NAME, save_weights, small, strict_json, write_images

from lostreg.artifacts import figures, report
from lostreg.artifacts.ablation import AS_GIVEN, TEST_TIME, TRAINED
from lostreg.cli.main import main
from lostreg.inference import discoverer as discoverers
from lostreg.training import train

pytestmark = pytest.mark.usefixtures("one_thread")
GIVEN = "dino_vits16"  # the name of the one that stands beside


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Photos large enough for views, as a benchmark in VOC's layout."""
    folder = tmp_path / "voc"
    for part in ("Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    paths = write_images(folder / "JPEGImages", [scene(number, 150, 150) for number in range(4)])
    for path in paths:
        set_box(folder, path.stem, (20, 20, 90, 90))
    (folder / "ImageSets/Main" / f"{SPLIT}.txt").write_text("\n".join(path.stem for path in paths) + "\n")
    return folder


@pytest.fixture
def command(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    load = discoverers.load_backbone

    def load_or_make(name: str, **options: Any) -> Any:
        if name != GIVEN:
            return load(name, **options)
        spec = dataclasses.replace(small().spec, name=GIVEN)
        return dataclasses.replace(small(), spec=spec, model=copy.deepcopy(small().model))

    monkeypatch.setattr(discoverers, "load_backbone", load_or_make)
    monkeypatch.setattr(report, "_DPI", 15)
    for name in report._FIGURES:  # pictures take most of the time of a report
        monkeypatch.setitem(report._FIGURES, name, lambda _: Figure((1, 1)))
    monkeypatch.setattr(figures, "example_maps", lambda _: Figure((1, 1)))
    weights = save_weights(small(), tmp_path / "small.safetensors")
    photos = str(root / "JPEGImages")
    options = ["--backbone", NAME, "--weights", str(weights), "--device", "cpu", "--precision", "bf16"]
    options += ["--out", str(tmp_path / "out")]
    quick = ["--registers", "2", "0", "--steps", "2", "--views", "3", "--max-side", "112", "--threshold", "90%"]
    scored = ["--benchmark", "voc", "--root", str(root), "--split", SPLIT]
    return ["registers", "ablate", photos, *options, *quick, *scored, "--test-time", "--beside", GIVEN]


def test_registers_of_all_origins_stand_in_one_report(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(command) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert last.startswith(f"written to {out}: artifacts.html, registers.pdf, artifacts.json")
    numbers = strict_json((out / "artifacts.json").read_text())
    assert [(one["origin"], one["registers"]) for one in numbers["registers"]] == [
        (AS_GIVEN, 0),
        (TRAINED, 0),
        (TRAINED, 2),
        (TEST_TIME, 2),
        (AS_GIVEN, 0),
    ]
    for line, one in zip(lines, numbers["registers"], strict=True):
        assert line.startswith(f"{one['title']}: ")
    given, control, trained, moved, beside = numbers["backbones"]
    assert given["cutoff"]["rule"] == "90%"
    assert control["cutoff"]["norm"] == trained["cutoff"]["norm"] == moved["cutoff"]["norm"] == given["cutoff"]["norm"]
    assert beside["norms"] == given["norms"]
    assert list(trained["norms"]["prefix_tokens_by_layer"]) == ["CLS", "register 1", "register 2"]
    assert trained["norms"]["by_layer_before_final_norm"] != control["norms"]["by_layer_before_final_norm"]
    for one, backbone in zip(numbers["registers"], numbers["backbones"], strict=True):
        assert one["outliers_percent"] == pytest.approx(100 * backbone["outlier_share"])
        low, high = one["corloc"]["interval_95"]
        assert low <= one["corloc"]["percent"] <= high
    assert (out / "registers.pdf").read_bytes().startswith(b"%PDF")
    assert {"attention-1.png", "registers.png"} <= {path.name for path in out.iterdir()}
    assert numbers["training"]["steps"] == 2

    before = (out / "artifacts.html").read_text()
    monkeypatch.setattr(train._Training, "_update", lambda *_: pytest.fail("it is trained already"))
    assert main(command) == 0
    assert (out / "artifacts.html").read_text() == before


def test_other_options_do_not_go_into_the_same_folder(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--registers", "2"]) == 0
    capsys.readouterr()
    for more, message in (
        (["--registers", "2", "--steps", "3"], "steps"),
        (["--test-time-registers", "1"], "use --test-time"),
        (["--registers", "-1"], "registers"),
    ):
        with pytest.raises(SystemExit) as done:
            raise SystemExit(main([*command, *more]))
        assert done.value.code == 2
        assert message in capsys.readouterr().err
