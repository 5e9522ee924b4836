"""`artifacts`, `attention` and `registers`, and test-time registers in the other commands, with a weights file."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fabricate import SPLIT, set_box
from matplotlib.figure import Figure
from PIL import Image
from small_vit import LAYER, NAME, SHAPES, UNITS, pictures, save_weights, small, strict_json, world, write_images

from lostreg.artifacts import figures, register_search, report
from lostreg.cli.main import main
from lostreg.errors import BackboneError
from lostreg.models.registers import RegisterNeurons

pytestmark = pytest.mark.usefixtures("one_thread")

FOUND = [[LAYER, unit] for unit in UNITS]


@pytest.fixture(autouse=True)
def _coarse_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lostreg.artifacts.report._DPI", 15)


@pytest.fixture
def _one_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take most of the time of a report."""
    for name in report._FIGURES.keys() - {"norms"}:
        monkeypatch.setitem(report._FIGURES, name, lambda _: Figure((1, 1)))
    monkeypatch.setattr(figures, "example_maps", lambda _: Figure((1, 1)))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the model with outliers."""
    return save_weights(world().backbone, tmp_path_factory.mktemp("weights") / "planted.safetensors")


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the same without."""
    return save_weights(small(), tmp_path_factory.mktemp("weights") / "healthy.safetensors")


@pytest.fixture(scope="module")
def registers(weights: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("registers") / "new" / "registers.json"
    assert run(weights, "registers", "find", images, "--out", path) == 0
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures as a benchmark in VOC's layout."""
    root = tmp_path_factory.mktemp("voc")
    for folder in ("Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    stems = [path.stem for path in write_images(root / "JPEGImages", pictures())]
    for stem, (height, width) in zip(stems, SHAPES, strict=True):
        set_box(root, stem, (1, 1, width - 4, height - 4))
    (root / "ImageSets/Main" / f"{SPLIT}.txt").write_text("\n".join(stems) + "\n")
    return root


@pytest.fixture(scope="module")
def images(root: Path) -> Path:
    return root / "JPEGImages"


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each search for neurons looked at."""
    seen: list[int] = []
    find = register_search.find_registers

    def counted(given: Any, *arguments: Any, **options: Any) -> RegisterNeurons:
        seen.append(len(given))
        return find(given, *arguments, **options)

    monkeypatch.setattr(register_search, "find_registers", counted)
    return seen


def run(weights: Path | None, *arguments: object) -> int:
    method = ["--backbone", NAME, "--device", "cpu", *(["--weights", str(weights)] if weights else [])]
    try:
        return main([*map(str, arguments), *method])
    except SystemExit as done:
        return int(done.code or 0)


def refused(capsys: pytest.CaptureFixture[str], message: str, before: int = 0) -> None:
    """One line on standard error, after so many others, that says so."""
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    lines = [line for line in captured.err.split("\n") if line and "img/s" not in line and "\r" not in line]
    assert len(lines) == before + 1, lines
    assert lines[-1].startswith("lostreg")
    assert "error: " in lines[-1]
    assert re.search(message, lines[-1]), lines[-1]


# lostreg artifacts


def test_artifacts_writes_a_report_and_says_what_it_found(
    weights: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "report"
    assert run(weights, "artifacts", images, "--out", out) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{NAME}: 5 outliers of 40 patches (12.50 %), norms of ")
    assert first.endswith(f" and more, from layer {LAYER} on")
    assert last == f"written to {out}: artifacts.html, artifacts.json and pictures"
    content = strict_json((out / "artifacts.json").read_text())
    (one,) = content["backbones"]
    assert (one["outliers"], one["patches"], one["outliers_emerge_in_layer"]) == (5, 40, LAYER)
    assert one["weights"].startswith("file planted.safetensors sha256:")
    assert (content["images"], content["sample"], content["seed"]) == (6, 6, 0)
    assert (out / "artifacts.html").read_text().startswith("<!DOCTYPE html>")
    assert {path.stem for path in out.glob("*.png")} == {
        *("norms", "layers", "places", "neighbours", "probes", "gram", "examples-1")
    }


@pytest.mark.usefixtures("_one_picture")
def test_artifacts_without_outliers_say_so(
    healthy: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(healthy, "artifacts", images, "--out", tmp_path) == 0
    assert capsys.readouterr().out.startswith(f"{NAME}: no outliers found among 40 patches (not bimodal: ")
    assert "none found" in (tmp_path / "artifacts.html").read_text()
    (one,) = strict_json((tmp_path / "artifacts.json").read_text())["backbones"]
    assert (one["cutoff"]["norm"], one["outliers"]) == (None, 0)


@pytest.mark.usefixtures("_one_picture")
@pytest.mark.parametrize(
    ("rule", "outliers"), [("150", 0), ("5", 5), ("mean+2sigma", 5), ("99%", 1), ("auto", 5), (".5e1", 5)]
)
def test_rules_reach_the_report(weights: Path, images: Path, tmp_path: Path, rule: str, outliers: int) -> None:
    assert run(weights, "artifacts", images, "--out", tmp_path, "--threshold", rule) == 0
    (one,) = strict_json((tmp_path / "artifacts.json").read_text())["backbones"]
    assert one["outliers"] == outliers
    assert one["cutoff"]["rule"] == {".5e1": "5"}.get(rule, rule)


@pytest.mark.usefixtures("_one_picture")
def test_artifacts_go_on_without_unreadable_images(
    weights: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.jpg").write_text("no picture")
    assert run(weights, "artifacts", images, tmp_path / "broken.jpg", "--out", tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert "lostreg: error: " in captured.err
    assert "broken.jpg: not a readable image" in captured.err
    (one,) = strict_json((tmp_path / "out/artifacts.json").read_text())["backbones"]
    assert (one["images"], one["unreadable"], one["outliers"]) == (6, 1, 5)


def test_artifacts_of_nothing_readable_are_an_error(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/broken.jpg").write_text("no picture")
    assert run(weights, "artifacts", tmp_path / "images", "--out", tmp_path / "out") == 2
    errors = [line for line in capsys.readouterr().err.split("\n") if line.startswith("lostreg artifacts: error: ")]
    assert len(errors) == 1
    assert "none of 1 images could be read" in errors[0]
    assert not (tmp_path / "out/artifacts.json").exists()


@pytest.mark.usefixtures("_one_picture")
def test_a_sample_has_a_seed(weights: Path, images: Path, tmp_path: Path) -> None:
    written = []
    for number, seed in enumerate((0, 0, 1)):
        out = tmp_path / str(number)
        assert run(weights, "artifacts", images, "--out", out, "--sample", 2, "--seed", seed) == 0
        written.append(strict_json((out / "artifacts.json").read_text()))
    assert written[0] == written[1]
    assert written[0]["backbones"][0]["sample"]["images"] == 2
    assert written[0]["backbones"][0]["sample"]["gram"] != written[2]["backbones"][0]["sample"]["gram"]
    assert written[0]["backbones"][0]["norms"] == written[2]["backbones"][0]["norms"]


@pytest.mark.usefixtures("_one_picture")
def test_classes_come_from_folders_or_annotations(
    healthy: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    from lostreg.artifacts import measurement

    measure = measurement.measure

    def noted(*arguments: Any, labels: Any, **options: Any) -> Any:
        given.append(labels)
        return measure(*arguments, labels=labels, **options)

    monkeypatch.setattr(measurement, "measure", noted)
    for name in ("cat", "dog"):
        write_images(tmp_path / "set" / name, pictures()[:4])
    out = tmp_path / "out"
    assert run(healthy, "artifacts", tmp_path / "set", "--out", out) == 0
    assert given.pop() == ["cat"] * 4 + ["dog"] * 4
    assert run(healthy, "artifacts", root / "JPEGImages", "--out", out) == 0
    assert given.pop() == [None] * 6
    for number in range(6):
        path = root / "Annotations" / f"im{number:02}.xml"
        path.write_text(path.read_text().replace("<object><bnd", f"<object><name>class {number}</name><bnd"))
    assert run(healthy, "artifacts", root / "JPEGImages", "--out", out, "--annotations", root / "Annotations") == 0
    assert given.pop() == [f"class {number}" for number in range(6)]


@pytest.mark.usefixtures("_one_picture")
def test_several_backbones_stand_in_one_report(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import dataclasses

    def load(name: str, **_: Any) -> Any:
        backbone = world().backbone if name == NAME else small()
        return dataclasses.replace(backbone, spec=dataclasses.replace(backbone.spec, name=name))

    monkeypatch.setattr("lostreg.inference.discoverer.load_backbone", load)
    options = ["--backbone", "dino_vits16", "--test-time-registers", "1"]
    assert run(None, "artifacts", images, "--out", tmp_path, *options) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["dino_vits16", "timm", "timm", f"written to {tmp_path}"]
    assert "lostreg: no test-time registers for dino_vits16: no outliers" in captured.err.replace("\r", "\n")
    assert lines[2].startswith(f"{NAME} + 1 test-time register: no outliers found")
    first, second, third = strict_json((tmp_path / "artifacts.json").read_text())["backbones"]
    assert [first["outliers"], second["outliers"], third["outliers"]] == [0, 5, 0]
    assert third["cutoff"]["rule"] == str(float(second["cutoff"]["norm"]))
    assert third["test_time_registers"] == {"count": 1, "neurons": FOUND}


# lostreg registers, and what takes its file


def test_registers_find_writes_a_file_and_says_what_it_found(
    weights: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "r.json"
    assert run(weights, "registers", "find", images, "--out", path, "--count", 2, "--seed", 5) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"2 register neurons in layer {LAYER} of {NAME}: outliers have norms of ")
    assert "12.50 % of patches of 6 images, 0.00 % with the neurons moved" in first
    assert second == f"written to {path}: use it as --test-time-registers {path}"
    found = RegisterNeurons.load(path)
    assert (found.neurons, found.count, found.backbone) == (world().neurons, 2, NAME)
    assert found.weights.startswith("file planted.safetensors sha256:")
    assert (found.images, found.seed, found.outliers) == (6, 5, 0.125)


def test_registers_are_written_beside_the_caller(
    weights: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(weights, "registers", "find", images, "--neurons", 1, "--sample", 4) == 0
    found = RegisterNeurons.load(tmp_path / "registers.json")
    assert found.neurons == world().neurons[:1]
    assert found.images == 4


def test_no_outliers_are_no_registers(
    healthy: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(healthy, "registers", "find", images, "--out", tmp_path / "r.json") == 2
    refused(capsys, "no outliers that test-time registers could take up: not bimodal")
    assert not (tmp_path / "r.json").exists()


def test_predict_takes_a_file_or_a_number(
    weights: Path, images: Path, registers: Path, capsys: pytest.CaptureFixture[str], searches: list[int]
) -> None:
    assert run(weights, "predict", images, "--json", "-") == 0
    plain = capsys.readouterr().out
    assert run(weights, "predict", images, "--json", "-", "--test-time-registers", registers) == 0
    captured = capsys.readouterr()
    by_file = captured.out
    assert (captured.err, searches) == ("", [])
    assert by_file != plain
    assert run(weights, "predict", images, "--json", "-", "--test-time-registers", 1) == 0
    captured = capsys.readouterr()
    assert captured.out == by_file
    assert searches == [6]
    assert f"lostreg: 2 register neurons in layer {LAYER} of {NAME}" in captured.err.replace("\r", "\n")


def evaluate(weights: Path, root: Path, out: Path, *options: object) -> int:
    return run(weights, "eval", "voc", "--root", root, "--out", out, *options)


def test_eval_finds_the_neurons_itself_and_goes_on_with_them(
    weights: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], searches: list[int]
) -> None:
    out = tmp_path / "out"
    assert evaluate(weights, root, out, "--test-time-registers", 1) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["options"]["test_time_registers"] == {"count": 1, "neurons": FOUND}
    assert results["complete"] is True
    kept = (out / "registers.json").read_bytes()
    assert RegisterNeurons.load(out / "registers.json").neurons == world().neurons
    lines = (out / "predictions.jsonl").read_bytes()
    assert searches == [6]
    capsys.readouterr()
    assert evaluate(weights, root, out, "--test-time-registers", 1) == 0
    assert searches == [6]
    # As if the run had been stopped after two images.
    (out / "predictions.jsonl").write_bytes(b"".join(lines.splitlines(keepends=True)[:2]))
    assert evaluate(weights, root, out, "--test-time-registers", 1) == 0
    assert (out / "predictions.jsonl").read_bytes() == lines
    assert (out / "registers.json").read_bytes() == kept
    assert searches == [6]
    # The file is the same setting as the number it came from.
    assert evaluate(weights, root, out, "--test-time-registers", out / "registers.json") == 0
    assert evaluate(weights, root, tmp_path / "plain") == 0
    assert (tmp_path / "plain/predictions.jsonl").read_bytes() != lines
    assert not (tmp_path / "plain/registers.json").exists()
    assert json.loads((tmp_path / "plain/results.json").read_text())["options"]["test_time_registers"] is None
    assert evaluate(weights, root, out, "--test-time-registers", 1, "--overwrite") == 0
    assert searches == [6, 6]
    assert (out / "predictions.jsonl").read_bytes() == lines


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        ((), (1,), "it did not look for register neurons"),
        ((1,), (), "test_time_registers was"),
        ((1,), (2,), "holds a run with 1 test-time register, not 2"),
    ],
)
def test_eval_does_not_go_on_with_other_registers(
    weights: Path,
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    searches: list[int],
    first: tuple[int, ...],
    second: tuple[int, ...],
    told: str,
) -> None:
    def options(count: tuple[int, ...]) -> list[object]:
        return ["--test-time-registers", *count] if count else []

    assert evaluate(weights, root, tmp_path, *options(first)) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != ".lock"}
    capsys.readouterr()
    assert evaluate(weights, root, tmp_path, *options(second)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("lostreg eval: error: ")
    assert told in error
    assert "use --overwrite or another --out" in error
    assert searches == [6] * len(first)  # what is wrong is known without another search
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != ".lock"}
    assert after == before
    assert evaluate(weights, root, tmp_path, *options(first)) == 0


def test_a_run_with_a_file_does_not_go_on_with_another(
    weights: Path, root: Path, registers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(weights, root, tmp_path / "out", "--test-time-registers", registers) == 0
    other = json.loads(registers.read_text())
    other["neurons"] = other["neurons"][:1]
    (tmp_path / "other.json").write_text(json.dumps(other))
    capsys.readouterr()
    assert evaluate(weights, root, tmp_path / "out", "--test-time-registers", tmp_path / "other.json") == 2
    refused(capsys, "test_time_registers was .* and is now ")


def test_sweep_finds_keeps_and_takes_registers(
    weights: Path, root: Path, registers: Path, tmp_path: Path, searches: list[int]
) -> None:
    command = ["sweep", "voc", "--root", root, "--features", "k", "--biases", "0"]
    for out, value in (("number", 1), ("file", registers)):
        assert run(weights, *command, "--out", tmp_path / out, "--test-time-registers", value) == 0
        options = json.loads((tmp_path / out / "sweep.json").read_text())["options"]
        assert options["test_time_registers"] == {"count": 1, "neurons": FOUND}
    assert searches == [6]
    assert (tmp_path / "number/registers.json").is_file()
    assert not (tmp_path / "file/registers.json").exists()
    lines = (tmp_path / "number/sweep.jsonl").read_bytes()
    assert lines == (tmp_path / "file/sweep.jsonl").read_bytes()
    assert run(weights, *command, "--out", tmp_path / "number", "--test-time-registers", 1) == 0
    assert searches == [6]
    assert run(weights, *command, "--out", tmp_path / "number") == 2


@pytest.mark.usefixtures("_one_picture")
def test_artifacts_take_a_file_and_show_both(
    weights: Path, images: Path, registers: Path, tmp_path: Path, searches: list[int]
) -> None:
    assert run(weights, "artifacts", images, "--out", tmp_path, "--test-time-registers", registers) == 0
    first, second = strict_json((tmp_path / "artifacts.json").read_text())["backbones"]
    assert (first["outliers"], second["outliers"], searches) == (5, 0, [])
    assert second["test_time_registers"] == {"count": 1, "neurons": FOUND}


@pytest.mark.parametrize("command", ["predict", "eval", "sweep", "attention"])
def test_nothing_to_cure_is_an_error_but_for_artifacts(
    healthy: Path, images: Path, root: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[object] = [command, images]
    if command in ("eval", "sweep"):
        given = [command, "voc", "--root", root]
    if command != "predict":
        given += ["--out", tmp_path / "out"]
    assert run(healthy, *given, "--test-time-registers", 1) == 2
    refused(capsys, "no outliers that test-time registers could take up: not bimodal")
    assert not list(tmp_path.glob("out/*.json*"))


@pytest.mark.usefixtures("_one_picture")
def test_artifacts_without_anything_to_cure_go_on(
    healthy: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(healthy, "artifacts", images, "--out", tmp_path, "--test-time-registers", 1) == 0
    captured = capsys.readouterr()
    assert f"lostreg: no test-time registers for {NAME}: no outliers" in captured.err
    (one,) = strict_json((tmp_path / "artifacts.json").read_text())["backbones"]
    assert one["test_time_registers"] is None


BROKEN: dict[str, tuple[dict[str, Any] | str, str]] = {
    "text": ("no JSON", "is no file of `lostreg registers find`"),
    "list": ("[]", 'expected a JSON object with "format": "lostreg registers 1"'),
    "later": ({"format": "lostreg registers 2"}, 'expected a JSON object with "format": "lostreg registers 1"'),
    "no neurons": ({"neurons": []}, "neurons must be different pairs of layer and unit"),
    "no tokens": ({"count": 0}, "count must be an integer of at least 1, not 0"),
    "words": ({"neurons": "all"}, "neurons is no list of pairs"),
    "negative": ({"neurons": [[-1, 0]]}, "pairs of layer and unit, from 0"),
    "twice": ({"neurons": [[0, 0], [0, 0]]}, "different pairs"),
    "more": ({"x": 1}, "'x'"),
    "another backbone": ({"backbone": "dino_vits16"}, "those of dino_vits16, not of timm:test_vit"),
    "other weights": ({"weights": "file a.pth sha256:0"}, r"of the weights file a\.pth sha256:0, not of file planted"),
    "no such unit": ({"neurons": [[2, 192]]}, "timm:test_vit has no hidden unit 192 in layer 2"),
    "no such layer": ({"neurons": [[6, 0]]}, "timm:test_vit has no hidden unit 0 in layer 6"),
}


@pytest.mark.usefixtures("_one_picture")
@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("command", ["predict", "eval", "artifacts"])
def test_files_that_do_not_fit_are_refused(
    weights: Path,
    images: Path,
    root: Path,
    registers: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    change: dict[str, Any] | str,
    message: str,
) -> None:
    path = tmp_path / "r.json"
    path.write_text(change if isinstance(change, str) else json.dumps({**json.loads(registers.read_text()), **change}))
    capsys.readouterr()
    given: list[object] = {
        "predict": ["predict", images],
        "eval": ["eval", "voc", "--root", root, "--out", tmp_path / "out"],
        "artifacts": ["artifacts", images, "--out", tmp_path / "out"],
    }[command]
    assert run(weights, *given, "--test-time-registers", path) == 2
    refused(capsys, message)
    assert not (tmp_path / "out/results.json").exists()


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "none", "", "00"])
def test_other_values_are_refused(images: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(None, "predict", images, f"--test-time-registers={text}") == 2
    refused(capsys, "expected a number of tokens of at least 1, or a file of `lostreg registers find`, not '")


@pytest.mark.parametrize("command", ["eval", "artifacts", "attention"])
def test_one_file_is_not_for_several_backbones(
    images: Path, root: Path, registers: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[object] = ["eval", "voc", "--root", root] if command == "eval" else [command, images]
    capsys.readouterr()
    several = ["--backbone", "dino_vits16", "--test-time-registers", registers]
    assert run(None, *given, "--out", tmp_path / "out", *several) == 2
    refused(capsys, "--test-time-registers is one file, but there are 2 backbones")


# lostreg attention


def test_attention_draws_a_picture_an_image(
    weights: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(weights, "attention", images, "--out", tmp_path / "new") == 0
    assert capsys.readouterr().out == f"written to {tmp_path / 'new'}: 6 files for 6 of 6 images\n"
    files = sorted((tmp_path / "new").iterdir())
    assert [path.name for path in files] == [f"im{number:02}.png" for number in range(6)]
    for path in files:
        with Image.open(path) as picture:
            picture.load()
            assert picture.format == "PNG"


def test_heads_and_arrays_are_written_too(weights: Path, images: Path, tmp_path: Path, registers: Path) -> None:
    options = ["--layers", 0, -1, "--heads", "--arrays", "--test-time-registers", registers]
    assert run(weights, "attention", images / "im01.png", "--out", tmp_path, *options) == 0
    stems = [f"im01-timm-test_vit-1-test-time-register-layer-{layer}" for layer in (0, 5)]
    assert {path.name for path in tmp_path.iterdir()} == {
        "im01.png",
        *(f"{stem}{ending}" for stem in stems for ending in ("-heads.png", ".npz")),
    }
    for stem, layer in zip(stems, (0, 5), strict=True):
        with np.load(tmp_path / f"{stem}.npz", allow_pickle=False) as arrays:
            assert set(arrays) == {"rows", "names", "grid", "layer"}
            assert arrays["rows"].shape == (2, 2, 2 + 6)
            np.testing.assert_allclose(arrays["rows"].sum(axis=2), 1, atol=1e-5)
            assert arrays["names"].tolist() == ["CLS", "test-time register 1"]
            assert arrays["grid"].tolist() == [3, 2]
            assert int(arrays["layer"]) == layer


def test_images_of_one_name_get_pictures_of_their_own(weights: Path, tmp_path: Path) -> None:
    for number, folder in enumerate(("a", "b")):
        write_images(tmp_path / folder, pictures()[number : number + 1])
    out = tmp_path / "out"
    assert run(weights, "attention", tmp_path / "a", tmp_path / "b", "--out", out) == 0
    assert sorted(path.name for path in out.iterdir()) == ["im00-2.png", "im00.png"]
    assert (out / "im00.png").read_bytes() != (out / "im00-2.png").read_bytes()


def test_attention_goes_on_without_unreadable_images(
    weights: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [tmp_path / "none.png", images / "im00.png"]
    assert run(weights, "attention", *given, "--out", tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert captured.out.endswith(": 1 files for 1 of 2 images\n")
    lines = [line for line in captured.err.replace("\r", "\n").splitlines() if line.startswith("lostreg")]
    assert lines == [f"lostreg: error: {tmp_path}/none.png: no such file"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["im00.png"]


def test_attention_needs_layers_that_exist(
    weights: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(weights, "attention", images, "--out", tmp_path, "--layers", 6) == 2
    refused(capsys, r"layer must be in \[-6, 5\]")


@pytest.mark.parametrize("command", ["artifacts", "attention"])
def test_pictures_do_not_take_the_place_of_images(
    weights: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = write_images(tmp_path / "photos", pictures())
    before = {path: path.read_bytes() for path in paths}
    for given, out in ((paths[0], paths[0].parent), (paths[0].parent, tmp_path / "photos/new")):
        assert run(weights, command, given, "--out", out) == 2
        refused(capsys, f"--out {out} is among the images: give another folder")
    assert {path: path.read_bytes() for path in paths} == before
    assert sorted((tmp_path / "photos").iterdir()) == sorted(paths)


@pytest.mark.usefixtures("_one_picture")
def test_artifacts_keep_the_first_pass_when_the_cure_fails(
    weights: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*given: object, **options: object) -> None:
        raise BackboneError("cannot read the hidden units")

    monkeypatch.setattr("lostreg.artifacts.register_search.find_registers", fail)
    assert run(weights, "artifacts", images, "--out", tmp_path / "out", "--test-time-registers", 1) == 2
    refused(capsys, "cannot read the hidden units")
    assert len(strict_json((tmp_path / "out/artifacts.json").read_text())["backbones"]) == 1


def test_artifacts_refuse_a_file_that_does_not_fit_before_the_pass(
    healthy: Path, images: Path, registers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*given: object, **options: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr("lostreg.artifacts.measurement.measure", never)
    assert run(healthy, "artifacts", images, "--out", tmp_path, "--test-time-registers", registers) == 2


@pytest.mark.usefixtures("_one_picture")
def test_the_rule_for_outliers_is_that_of_the_neurons_too(
    weights: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules: list[str] = []
    find = register_search.find_registers

    def note(*given: Any, **options: Any) -> RegisterNeurons:
        rules.append(f"{options['rule']}, seed {options['seed']}")
        return find(*given, **options)

    monkeypatch.setattr("lostreg.artifacts.register_search.find_registers", note)
    arguments = ["--out", tmp_path, "--test-time-registers", 1, "--threshold", "20", "--seed", "3"]
    assert run(weights, "artifacts", images, *arguments) == 0
    assert rules == ["20, seed 3"]


def test_registers_find_tells_of_unreadable_images(
    weights: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.png").write_text("no picture")
    out = tmp_path / "registers.json"
    assert run(weights, "registers", "find", images, tmp_path / "broken.png", "--out", out) == 2
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert sum("broken.png" in line for line in lines) == 1
    assert json.loads(out.read_text())["neurons"] == FOUND
