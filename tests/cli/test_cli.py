import copy
import json
import logging
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from conftest import disc_picture
from fabricate import encoded, turned_block, with_exif, write_voc
from PIL import Image

import lostreg
from lostreg.cli.main import build_parser, main
from lostreg.cli.sweep import bias_list
from lostreg.datasets import BENCHMARKS
from lostreg.inference.discovery import Discovery
from lostreg.inference.jobs import FeaturesJob
from lostreg.models.backbone import Backbone, build_backbone, find_spec
from lostreg.models.table import BACKBONES

COMMANDS = ("predict", "eval", "score", "calibrate", "sweep", "reproduce", "backbones", "datasets")
FAST = ["--backbone", "imgfocus_vits14", "--device", "cpu"]
_small: dict[str, Backbone] = {}


@pytest.fixture(autouse=True)
def _small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each backbone is two random blocks: the command line is tested here, not what is found."""

    def load(name: str, **_: Any) -> Backbone:
        if name not in _small:
            torch.manual_seed(0)
            _small[name] = build_backbone(find_spec(name), depth=2)
        return copy.deepcopy(_small[name])  # the caller may change what it has loaded

    monkeypatch.setattr("lostreg.inference.discoverer.load_backbone", load)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_voc(tmp_path / "voc", 5)


@pytest.fixture
def images(root: Path) -> Path:
    return root / "JPEGImages"


def predict(*arguments: object) -> int:
    return main(["predict", *map(str, arguments), *FAST])


def test_going_on_with_less_memory_is_told_in_a_line_and_is_no_failure(
    images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert predict(images) == 0
    expected = capsys.readouterr().out
    forward = FeaturesJob.forward

    def crowded(job: FeaturesJob, patches: list[torch.Tensor], sizes: list[tuple[int, int]]) -> torch.Tensor:
        if len(patches) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(job, patches, sizes)

    monkeypatch.setattr(FeaturesJob, "forward", crowded)
    assert predict(images) == 0
    captured = capsys.readouterr()
    assert captured.out == expected
    (line,) = captured.err.splitlines()
    assert line.startswith("lostreg: out of memory on cpu with 5 images together: going on with half as much at once")


def table(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def json_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_predict_prints_a_table(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict(images / "im01.jpg", images / "im00.jpg") == 0
    captured = capsys.readouterr()
    heading, first, second = table(captured.out)
    assert heading == ["image", "x1", "y1", "x2", "y2", "score"]
    assert [first[0], second[0]] == [(images / name).as_posix() for name in ("im01.jpg", "im00.jpg")]
    x1, y1, x2, y2 = map(int, first[1:5])
    assert 0 <= x1 < x2 <= 78
    assert 0 <= y1 < y2 <= 70
    assert captured.err == ""
    assert predict(images / "im01.jpg", images / "im00.jpg", "--json", "-") == 0
    scores = [line["scores"][0] for line in json_lines(capsys.readouterr().out)]
    assert [float(first[5]), float(second[5])] == pytest.approx(scores, abs=0.006)  # two decimals, and three
    assert 0 < min(scores) < max(scores) < 1


def test_boxes_below_a_score_are_marked_in_the_table_and_kept_in_the_file(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(images, "--json", tmp_path / "all.jsonl") == 0
    scores = [line["scores"][0] for line in json_lines((tmp_path / "all.jsonl").read_text())]
    assert min(scores) < 0.25 < max(scores)
    table_of_default = capsys.readouterr().out
    middle = sorted(scores)[2]  # of a box itself: it is not below
    for options, limit in (
        ([], 0.25),
        (["--min-score", "0.25"], 0.25),
        (["--min-score", str(middle - 0.001)], middle - 0.001),
        (["--min-score", "1"], 1.0),
        (["--min-score", "0"], 0.0),
    ):
        assert predict(images, "--json", tmp_path / "found.jsonl", *options) == 0
        found = capsys.readouterr().out
        rows = found.splitlines()[1:]
        assert [row.endswith("  no clear object") for row in rows] == [score < limit for score in scores]
        assert found.replace("  no clear object", "") == table_of_default.replace("  no clear object", "")
        assert (tmp_path / "found.jsonl").read_bytes() == (tmp_path / "all.jsonl").read_bytes()
    assert predict(images, "--json", "-", "--min-score", "1") == 0
    assert "no clear object" not in capsys.readouterr().out
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")  # of one patch, whose score is 0: not below 0
    assert predict(tmp_path / "dot.png", "--min-score", "0") == 0
    assert capsys.readouterr().out.endswith("  0.00\n")
    assert predict(tmp_path / "dot.png") == 0
    assert capsys.readouterr().out.endswith("  0.00  no clear object\n")


def test_predict_to_standard_output_is_json_lines_and_nothing_else(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(images / "im00.jpg", images / "im01.jpg", "--json", "-") == 0
    first, second = json_lines(capsys.readouterr().out)
    assert first["image_id"] == (images / "im00.jpg").as_posix()
    assert (first["width"], first["height"], second["width"]) == (98, 70, 78)
    assert len(first["boxes"]) == len(first["scores"]) == len(first["seeds"]) == 1


def test_predict_writes_the_same_json_to_a_file_beside_the_table(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "new" / "found.jsonl"
    assert predict(images, "--json", target) == 0
    assert len(table(capsys.readouterr().out)) == 6
    assert predict(images, "--json", "-") == 0
    assert capsys.readouterr().out == target.read_text(encoding="utf-8")


def test_predict_draws_one_picture(images: Path, tmp_path: Path) -> None:
    target = tmp_path / "new" / "picture.jpg"
    assert predict(images / "im00.jpg", "--plot", target) == 0
    height, width = cv2.imread(str(target)).shape[:2]
    assert height > 400
    assert width > 2 * 640


def test_pictures_of_images_with_one_name_do_not_replace_each_other(images: Path, tmp_path: Path) -> None:
    for folder, name in (("a", "im00.jpg"), ("b", "im03.jpg")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.jpg").write_bytes((images / name).read_bytes())
    plots = tmp_path / "plots"
    assert predict(tmp_path / "a", tmp_path / "b", images / "im01.jpg", "--plot", plots) == 0
    assert sorted(path.name for path in plots.iterdir()) == ["im01.png", "same-2.png", "same.png"]
    assert not np.array_equal(cv2.imread(str(plots / "same.png")), cv2.imread(str(plots / "same-2.png")))


def test_a_picture_of_one_pixel_can_be_drawn(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    assert predict(tmp_path / "dot.png", "--plot", tmp_path / "plot.png") == 0
    assert cv2.imread(str(tmp_path / "plot.png")).shape[0] > 600


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="file names are Unicode there")
def test_a_file_name_that_is_no_utf8_is_printed_and_written(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg")
    Path(odd).write_bytes((images / "im00.jpg").read_bytes())
    assert predict(odd, "--json", tmp_path / "found.jsonl") == 0
    assert "caf\\udce9.jpg" in capsys.readouterr().out
    assert json_lines((tmp_path / "found.jsonl").read_text())[0]["image_id"] == odd


def test_the_side_limit_can_be_changed_and_taken_away(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (1400, 28)).save(tmp_path / "wide.png")
    sizes = {}
    for limit in ([], ["--max-side", "140"], ["--max-side", "none"]):
        assert predict(tmp_path / "wide.png", "--json", "-", *limit) == 0
        (line,) = json_lines(capsys.readouterr().out)
        assert (line["width"], line["height"]) == (1400, 28)
        sizes[limit[1] if limit else "default"] = line["boxes"][0]
    # The size of a patch in pixels of the original tells how the image was scaled.
    whole_patches = {limit: box[2] % 14 == 0 for limit, box in sizes.items()}
    assert whole_patches["none"]
    assert sizes["140"][2] % 140 == 0


def test_method_options_reach_the_results(root: Path, tmp_path: Path) -> None:
    method = "--feature v --layer 0 --bias=-0.5 --no-normalize --k-patches 9 --precision bf16 --batch-size 3"
    limits = "--max-pixels 123456 --max-objects 3 --min-score 0.1 --masks refined --box-from mask"
    assert (
        main(["eval", "voc", "--root", str(root), "--out", str(tmp_path), *FAST, *method.split(), *limits.split()]) == 0
    )
    options = json.loads((tmp_path / "results.json").read_text())["options"]
    del options["weights"]
    assert options == {
        "backbone": "imgfocus_vits14",
        "feature": "v",
        "layer": 0,
        "method": "lost",
        "objectness": None,
        "bias": -0.5,
        "auto_trials": None,
        "normalize": False,
        "k_patches": 9,
        "device": "cpu",
        "precision": "bf16",
        "batch_size": 3,
        "compile": False,
        "max_side": None,
        "exif": False,
        "max_pixels": 123456,
        "test_time_registers": None,
        "max_objects": 3,
        "min_score": 0.1,
        "score": None,
        "refine": True,
        "box_from": "mask",
        "masks": True,
    }


def test_eval_ends_with_the_score_and_score_agrees(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["eval", "voc", "--root", str(root), "--out", str(out), *FAST]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    results = json.loads((out / "results.json").read_text())
    assert last == f"corloc {results['corloc']:.2f} ({results['hits']}/5)"
    assert main(["score", str(out), "voc", "--root", str(root)]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == last
    assert captured.err == ""


def test_eval_tells_how_well_scores_tell_hits_from_misses(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", "voc", "--root", str(root), *FAST]
    assert main([*command, "--out", str(tmp_path / "all")]) == 0
    auc = json.loads((tmp_path / "all" / "results.json").read_text())["score_auc"]
    assert auc is not None
    told = f"a hit has the higher score than a miss in {100 * auc:.0f} % of pairs (AUC)"
    assert told in capsys.readouterr().out.splitlines()
    assert main([*command, "--out", str(tmp_path / "one"), "--limit", "1"]) == 0
    assert "AUC" not in capsys.readouterr().out  # of one image there are no pairs
    assert json.loads((tmp_path / "one" / "results.json").read_text())["score_auc"] is None


def calibrate(*arguments: object) -> int:
    return main(["calibrate", *map(str, arguments), *FAST])


def test_calibrate_writes_a_bias_that_predict_and_eval_take(
    images: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "deep" / "found.json"
    assert calibrate(images, "--out", path) == 0
    captured = capsys.readouterr()
    content = json.loads(path.read_text())
    low, high = content["interval"]
    assert captured.out.splitlines() == [
        "imgfocus_vits14, k of layer 1, 5 of 5 images",
        f"bias          {content['bias']:.4f}  (90 % of resamples of the images: {low:.4f} to {high:.4f})",
        f"connectivity  {100 * content['connectivity']:.1f} % of pairs of patches",
        f"agreement     about {100 * content['agreement']:.0f} % of images have the box of --bias auto",
        f"written to {path}: use it as --bias {path}",
    ]
    assert captured.err.splitlines()[-1].startswith("lostreg: 5 images say little about a bias")
    assert (content["images"], content["unreadable"], content["seed"]) == (5, 0, 0)
    assert predict(images, "--bias", path) == 0
    by_file = capsys.readouterr()
    assert by_file.err == ""
    assert predict(images, f"--bias={content['bias']}") == 0
    assert capsys.readouterr().out == by_file.out
    assert predict(images, "--bias", "auto") == 0
    assert capsys.readouterr().out != by_file.out
    assert main(["eval", "voc", "--root", str(root), "--out", str(tmp_path / "out"), "--bias", str(path), *FAST]) == 0
    options = json.loads((tmp_path / "out" / "results.json").read_text())["options"]
    assert (options["bias"], options["normalize"], options["auto_trials"]) == (content["bias"], True, None)


def test_calibrate_writes_beside_the_caller_unless_told_where(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert calibrate(images / "im0[01].jpg", images / "im04.jpg") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "written to bias.json: use it as --bias bias.json"
    assert json.loads((tmp_path / "bias.json").read_text())["images"] == 3


def test_calibrate_takes_the_options_of_the_method(images: Path, tmp_path: Path) -> None:
    path = tmp_path / "bias.json"
    method = "--feature v --layer 0 --k-patches 9 --batch-size 2 --max-side 60 --sample 3 --seed 4"
    assert calibrate(images, "--out", path, *method.split()) == 0
    content = json.loads(path.read_text())
    assert (content["feature"], content["layer"], content["k_patches"]) == ("v", 0, 9)
    assert (content["images"], content["seed"], content["backbone"]) == (3, 4, "imgfocus_vits14")
    assert predict(images, "--bias", path, "--feature", "v", "--layer", "-2", "--normalize") == 0


def test_a_sample_of_images_is_drawn_with_its_seed(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = []
    for seed in (0, 0, 1):
        assert calibrate(images, "--sample", 2, "--seed", seed, "--out", tmp_path / "bias.json") == 0
        assert "2 of 5 images" in capsys.readouterr().out
        written.append(json.loads((tmp_path / "bias.json").read_text()))
    assert written[0] == written[1]
    assert written[0]["mean"] != written[2]["mean"]
    assert calibrate(images, "--sample", 100, "--out", tmp_path / "bias.json") == 0
    assert "5 of 5 images" in capsys.readouterr().out


def test_one_image_is_enough_to_calibrate_though_it_says_little(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert calibrate(images / "im00.jpg", "--out", tmp_path / "bias.json") == 0
    captured = capsys.readouterr()
    assert "1 of 1 images" in captured.out
    assert "agreement     about 100 %" in captured.out
    assert "lostreg: 1 images say little about a bias: calibrate on more, or use --bias auto" in captured.err


def test_many_images_are_no_reason_for_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(30):
        Image.new("RGB", (28, 28), (number, 0, 0)).save(tmp_path / f"{number}.png")
    assert calibrate(tmp_path, "--out", tmp_path / "bias.json") == 0
    assert "lostreg:" not in capsys.readouterr().err


def sweep(root: Path, out: Path, *arguments: object) -> int:
    return main(["sweep", "voc", "--root", str(root), "--out", str(out), *map(str, arguments), *FAST])


def test_sweep_ends_with_a_table_and_how_far_auto_is_from_the_best(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert sweep(root, out, "--layers", "-1", "0", "1", "--features", "k", "q", "--biases", "-0.5,0.25,-0.1") == 0
    heading, *rows, written, last = capsys.readouterr().out.splitlines()
    results = json.loads((out / "sweep.json").read_text())
    assert heading.split()[:3] == ["feature", "layer", "auto"]
    assert [row.split()[:2] for row in rows] == [["k", "1"], ["q", "1"], ["k", "0"], ["q", "0"]]
    for row, entry in zip(rows, results["rows"], strict=True):
        low, high = entry["auto_wilson_95"]
        feature, layer, *numbers = row.replace(" - ", " ").split()
        assert (feature, int(layer)) == (entry["feature"], entry["layer"])
        auc = entry["auto_score_auc"]
        assert numbers == [
            f"{entry['auto_corloc']:.2f}",
            f"{low:.2f}",
            f"{high:.2f}",
            f"{entry['auto_median_bias']:.3f}",
            *([] if auc is None else [f"{auc:.2f}"]),
            f"{entry['best_corloc']:.2f}",
            f"{entry['best_bias']:.3f}",
            f"{entry['auto_corloc'] - entry['best_corloc']:+.2f}",
        ]
    assert written == f"written to {out}: sweep.jsonl, sweep.json, sweep.png"
    ends = results["auto_minus_best_fixed"]
    assert last == f"auto - best fixed: mean {ends['mean']:+.2f}, worst {ends['worst']:+.2f} (4 features)"
    assert results["options"]["biases"] == [-0.5, 0.25, -0.1]
    with Image.open(out / "sweep.png") as picture:
        picture.load()
        assert picture.format == "PNG"


def test_sweep_takes_all_features_of_the_last_layer_unless_told_otherwise(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert sweep(root, out, "--limit", 2) == 0
    results = json.loads((out / "sweep.json").read_text())
    assert results["options"]["features"] == ["q 1", "k 1", "v 1", "out 1"]
    biases = results["options"]["biases"]
    assert (len(biases), biases[0], biases[1], biases[-1]) == (25, -0.95, -0.9, 0.25)
    assert results["options"]["exif"] is False  # boxes refer to pixels as they are stored
    assert results["options"]["max_side"] is None
    assert (results["images"], results["benchmark"]["limit"], results["benchmark"]["no_hard"]) == (2, 2, False)


def test_sweep_and_eval_agree_on_auto(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", "voc", "--root", str(root), "--out", str(tmp_path / "eval"), "--bias", "auto", *FAST]
    assert main(command) == 0
    found = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert sweep(root, tmp_path / "sweep", "--features", "k", "--biases", "0") == 0
    (row,) = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["rows"]
    assert (row["auto_corloc"], row["auto_score_auc"]) == (found["corloc"], found["score_auc"])


def test_a_sweep_goes_on_where_it_was_and_starts_anew_when_told(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, options = tmp_path / "out", ["--features", "k", "--biases", "-0.5,0"]
    assert sweep(root, out, *options) == 0
    first = capsys.readouterr().out
    lines = (out / "sweep.jsonl").read_bytes()
    (out / "sweep.jsonl").write_bytes(lines[: len(lines) // 2])
    (out / "sweep.png").unlink()
    assert sweep(root, out, *options) == 0
    assert capsys.readouterr().out == first
    assert (out / "sweep.jsonl").read_bytes() == lines
    assert (out / "sweep.png").exists()
    assert sweep(root, out, "--features", "v", "--biases", "-0.5,0", "--overwrite") == 0
    assert json.loads((out / "sweep.json").read_text())["options"]["features"] == ["v 1"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("-0.5", (-0.5,)),
        ("-1e-3", (-0.001,)),
        ("0.25, -.5,1", (0.25, -0.5, 1.0)),
        ("-0.3:0:4", (-0.3, -0.2, -0.1, 0.0)),
        ("-1:1:2", (-1.0, 1.0)),
    ],
)
def test_biases_are_a_range_or_a_list(text: str, expected: tuple[float, ...], root: Path, tmp_path: Path) -> None:
    assert bias_list(text) == expected
    for number, words in enumerate((["--biases", text], [f"--biases={text}"])):
        assert sweep(root, tmp_path / str(number), "--features", "k", "--limit", 1, *words) == 0
        options = json.loads((tmp_path / str(number) / "sweep.json").read_text())["options"]
        assert tuple(options["biases"]) == expected


def test_eval_of_the_sample_that_comes_with_the_source(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    assert main(["eval", "sample", "--limit", "2", "--out", str(tmp_path), *FAST]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("/2)")


def test_eval_draws_a_picture_an_image(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["eval", "voc", "--root", str(root), "--out", str(out), "--limit", "2", "--plots", *FAST]) == 0
    assert sorted(path.name for path in (out / "plots").iterdir()) == ["im00.png", "im01.png"]
    (out / "plots" / "mine.png").touch()
    (out / "mine.png").touch()
    with (out / "predictions.jsonl").open("a") as file:
        for name in ("../mine", str(out / "mine"), "\0"):
            file.write(json.dumps({"image_id": name, "boxes": []}) + "\n")
    command = ["eval", "voc", "--root", str(root), "--out", str(out), "--limit", "1", "--plots", *FAST]
    assert main([*command, "--overwrite"]) == 0
    assert sorted(path.name for path in (out / "plots").iterdir()) == ["im00.png", "mine.png"]
    assert (out / "mine.png").exists()
    (out / "plots" / "im00.png").unlink()
    assert main(command) == 0
    assert (out / "plots" / "im00.png").exists()


@pytest.mark.parametrize("name", ["boxes.jsonl", "plots/im00.png", "masks/im00.png"])
def test_predict_does_not_tell_of_files_that_someone_deleted(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    command = ["--json", tmp_path / "boxes.jsonl", "--plot", tmp_path / "plots", "--mask-dir", tmp_path / "masks"]
    draw, drawn = Discovery.labels, []

    def delete_then_draw(found: Discovery) -> np.ndarray:
        drawn.append(found)
        if len(drawn) == 4:
            (tmp_path / name).unlink()
        return draw(found)

    with monkeypatch.context() as patched:
        patched.setattr(Discovery, "labels", delete_then_draw)
        assert predict(images, *command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert name in error
    assert "run the command again" in error
    assert predict(images, *command) == 0


def test_a_run_of_which_much_could_not_be_had_is_no_success(
    root: Path, images: Path, tmp_path: Path, away: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    commands = [
        ["discover", str(images), "--out", str(tmp_path / "discover")],
        ["eval", "voc", "--root", str(root), "--out", str(tmp_path / "eval")],
        ["sweep", "voc", "--root", str(root), "--out", str(tmp_path / "sweep"), "--features", "k", "--biases", "0"],
    ]
    for command in commands:
        away.add("im01.jpg")
        assert main([*command, *FAST]) == 2
        captured = capsys.readouterr()
        assert "lostreg: WARNING: 1 of " in captured.err
        assert "1 images could not be had this time" in captured.err
        for option in ("--overwrite", "--retry-failed"):  # no option that computes everything again
            assert option not in captured.err + captured.out
        away.clear()
        assert main([*command, *FAST]) == 0
        assert "WARNING" not in capsys.readouterr().err


def test_several_backbones_end_with_one_table(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["dinov2_vits14", "dinov2_vits14_reg", "dinov2_vits14"]  # one of them twice
    out = tmp_path / "out"
    command = ["eval", "voc", "--root", str(root), "--out", str(out), "--device", "cpu", "--backbone", *names]
    assert main(command) == 0
    heading, *rows = table("\n".join(capsys.readouterr().out.splitlines()[-3:]))
    assert heading[:2] == ["backbone", "corloc"]
    assert [row[0] for row in rows] == ["dinov2_vits14", "dinov2_vits14_reg"]
    for row in rows:
        results = json.loads((out / row[0] / "results.json").read_text())
        assert results["options"]["backbone"] == row[0]
        assert float(row[1]) == pytest.approx(results["corloc"], abs=0.005)
        assert row[-1] == f"{results['hits']}/5"


def test_score_counts_what_is_missing(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "found.jsonl"
    path.write_text(
        '{"image_id": "im03", "boxes": [[9, 9, 60, 60]]}\n{"image_id": "im01", "boxes": [], "error": "gone"}\n'
    )
    assert main(["score", str(path), "voc", "--root", str(root)]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == "corloc 20.00 (1/5)"
    assert "3 of 5 images have no prediction and count as misses" in captured.err
    assert "1 images could not be read" in captured.err


def test_two_runs_are_compared_image_by_image(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hit, miss = [[9, 9, 60, 60]], [[0, 0, 5, 5]]
    for name, boxes in (("a", [hit, hit, hit, hit, miss]), ("b", [hit, miss, hit, hit])):  # one without a prediction
        lines = [json.dumps({"image_id": f"im{number:02}", "boxes": box}) for number, box in enumerate(boxes)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "predictions.jsonl").write_text("\n".join(lines))
    score = ["score", str(tmp_path / "a"), "voc", "--root", str(root), "--against", str(tmp_path / "b")]
    assert main(score) == 0
    output = capsys.readouterr()
    assert f"1 of 5 images have no prediction in {tmp_path / 'b'} and count as misses" in output.err
    *_, told, last = output.out.splitlines()
    assert told.startswith("+20.00 over the 60.00 of ")
    assert told.endswith("/b: 95 % interval +0.00 to +60.00, paired by image")
    assert last == "corloc 80.00 (4/5)"


def test_score_of_a_coco_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "coco.json").write_text(
        json.dumps(
            {
                "images": [{"id": 7, "file_name": "7.jpg"}, {"id": 9, "file_name": "9.jpg"}],
                "annotations": [
                    {"image_id": 7, "bbox": [0, 0, 10, 10], "iscrowd": 0},
                    {"image_id": 9, "bbox": [0, 0, 10, 10], "iscrowd": 0},
                ],
            }
        )
    )
    (tmp_path / "found.jsonl").write_text(
        '{"image_id": 9, "boxes": [[0, 0, 10, 9]]}\n{"image_id": 7, "boxes": [[20, 20, 30, 30]]}\n'
    )
    options = ["--images", str(tmp_path), "--annotations", str(tmp_path / "coco.json")]
    assert main(["score", str(tmp_path / "found.jsonl"), "coco", *options]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "corloc 50.00 (1/2)"
    for image_id in (9, "9", "000000000009"):  # results of a detector
        boxes = {0.3: [50, 50, 9, 9], 0.8: [0, 0, 10, 9]}
        results = [{"image_id": image_id, "category_id": 3, "bbox": box, "score": n} for n, box in boxes.items()]
        (tmp_path / "results.json").write_text(json.dumps(results))
        assert main(["score", str(tmp_path / "results.json"), "coco", *options]) == 0
        out = capsys.readouterr().out
        assert "all objects, of no class: AP 45.45, AP50 50.50" in out
        assert out.splitlines()[-1] == "corloc 50.00 (1/2)"


def test_backbones_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backbones"]) == 0
    heading, *rows = table(capsys.readouterr().out)
    assert heading[0] == "backbone"
    assert [row[0] for row in rows] == list(BACKBONES)
    assert main(["backbones", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in listed] == list(BACKBONES)
    assert all(row["licence"] and row["timm_name"] and row["patch_size"] for row in listed)


def test_datasets_are_listed_with_where_they_are(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = repository / "datasets"
    assert main(["datasets", "--root", str(root)]) == 0
    heading, *rows = table(capsys.readouterr().out)
    assert heading[0] == "name"
    assert [row[0] for row in rows] == list(BENCHMARKS)
    assert main(["datasets", "list", "--root", str(root), "--json"]) == 0
    listed = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert listed["sample"]["path"] == str(root / "sample")
    assert listed["voc07"]["images"] == 5011


@pytest.mark.parametrize("command", [[], *([command] for command in COMMANDS)], ids=str)
def test_help_fits_a_terminal_and_names_the_command(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(" ".join(["usage: lostreg", *command]))
    assert all(name in text for name in (() if command else COMMANDS))


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"lostreg {lostreg.__version__}\n"


def test_help_and_tables_import_no_model_library() -> None:
    commands = [["--help"], *([command, "--help"] for command in COMMANDS), ["backbones"], ["predict"]]
    program = f"""
import sys
from lostreg.cli.main import build_parser, main
from lostreg.cli.sweep import bias_list
for command in {commands!r}:
    try:
        main(command)
    except SystemExit:
        pass
    loaded = sorted({{"torch", "timm", "cv2"}} & sys.modules.keys())
    assert not loaded, (command, loaded)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_reader_that_goes_away_is_no_error_of_the_user() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    lostreg_script = str(Path(sys.executable).with_name("lostreg"))
    done = subprocess.run([lostreg_script, "backbones"], stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_an_interrupt_is_told_in_one_line(
    images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lostreg.inference.discoverer.load_backbone", interrupt)
    assert predict(images) == 130
    kept = "\nlostreg: interrupted; what was written so far is kept"
    assert capsys.readouterr().err == f"{kept}\n"
    assert main(["discover", str(images), "--out", "my photos", "--overwrite", "--precision", "fp32"]) == 130
    command = shlex.join(["lostreg", "discover", str(images), "--out", "my photos", "--precision", "fp32"])
    assert capsys.readouterr().err == f"{kept}: `{command}` goes on\n"


def test_a_file_that_is_not_there_costs_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing, found = tmp_path / "none.jpg", tmp_path / "found.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lostreg.inference.discoverer.load_backbone", None)
        for command in ("predict", "calibrate", "learn", "artifacts", "attention"):
            assert main([command, str(missing)]) == 2
            printed = capsys.readouterr()
            assert f"error: {missing}: no such file\n" in printed.err
            assert printed.out == ""  # no heading where no row follows
        assert main(["predict", str(missing), "--json", str(found)]) == 2
    (line,) = json_lines(found.read_text())
    assert line["error"] == f"{missing}: no such file"


def test_what_is_wrong_without_a_model_is_told_before_it_is_loaded(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lostreg.inference.discoverer.load_backbone", None)
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    for options, told in (
        (["--test-time-registers", str(broken)], "broken.json"),
        (["--objectness", str(broken), "--method", "parts"], "broken.json"),
        (["--objectness", "self"], "add --method parts"),
    ):
        assert predict(images, *options) == 2
        assert told in capsys.readouterr().err
    for command in ("discover", "eval voc --root"):
        assert main([*command.split(), str(images.parent), "--out", str(broken / "out")]) == 2
        assert "broken.json is a file, expected a folder" in capsys.readouterr().err


def test_the_environment_names_defaults_and_errors_name_it(
    images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOSTREG_BACKBONE", "dino_vits61")
    monkeypatch.setenv("LOSTREG_DEVICE", "gpu")
    for argv, told in (
        (["--device", "cpu"], "unknown backbone 'dino_vits61' .*LOSTREG_BACKBONE says so"),
        (["--backbone", "dino_vits16"], "not 'gpu' .LOSTREG_DEVICE says so"),
    ):
        with pytest.raises(SystemExit):
            main(["predict", str(images), *argv])
        assert re.search(told, capsys.readouterr().err)
    assert main(["artifacts", str(images), "--device", "cpu"]) == 2
    assert "LOSTREG_BACKBONE says so" in capsys.readouterr().err
    monkeypatch.setenv("LOSTREG_BACKBONE", "imgfocus_vits14")
    monkeypatch.setenv("LOSTREG_DEVICE", "cpu")
    args = build_parser().parse_args(["predict", "a.jpg"])
    assert (args.backbone, args.device) == ("imgfocus_vits14", "cpu")
    assert build_parser().parse_args(["predict", "a.jpg", "--device", "cuda:1"]).device == "cuda:1"


def test_quiet_leaves_errors_and_verbose_tells_what_the_library_does(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["discover", str(images), "--out", str(tmp_path / "out"), "--precision", "auto", "--overwrite"]
    assert main(command) == 0
    assert "img/s" in (usual := capsys.readouterr()).err
    assert main([*command, "--quiet"]) == 0
    assert capsys.readouterr() == (usual.out, "")
    assert main([*command, "--verbose"]) == 0
    told = capsys.readouterr().err
    assert "lostreg.inference.stream: a pack of" in told
    assert logging.getLogger("lostreg").handlers == []
    assert main(["predict", str(tmp_path / "none.jpg"), "--quiet"]) == 2
    assert capsys.readouterr().err == f"lostreg: error: {tmp_path / 'none.jpg'}: no such file\n"


def test_the_package_is_run_as_the_command_is() -> None:
    run = subprocess.run([sys.executable, "-m", "lostreg", "backbones"], capture_output=True, text=True, check=True)
    assert "dinov2_vits14_reg" in run.stdout


def test_bash_completes_options_backbones_and_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("shtab", reason="needs shtab: pip install shtab")
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    (tmp_path / "photo.jpg").touch()
    for words, wanted in (
        (["pre"], "predict"),
        (["predict", "--backb"], "--backbone"),
        (["predict", "--backbone", "imgf"], "imgfocus_vits14"),
        (["predict", "pho"], "photo.jpg"),
        (["registers", "find", "a", "--out", "pho"], "photo.jpg"),
    ):
        line = (
            f"COMP_WORDS=(lostreg {' '.join(words)}); COMP_CWORD={len(words)}; _shtab_lostreg; echo ${{COMPREPLY[@]}}"
        )
        done = subprocess.run(["bash", "-c", f"{script}\n{line}"], capture_output=True, text=True, cwd=tmp_path)
        assert done.stdout.split() == [wanted], done.stderr
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "zsh"]) == 2
    assert "pip install shtab" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        RuntimeError("CUDA error: out of memory"),
    ],
)
def test_a_lack_of_memory_is_told_in_one_line(
    images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("lostreg.inference.discoverer.load_backbone", fail)
    assert predict(images) == 2
    told = capsys.readouterr().err
    assert told == "lostreg predict: error: not enough memory; what was written so far is kept\n"


def test_a_mistake_costs_no_earlier_predictions(images: Path, tmp_path: Path) -> None:
    target = tmp_path / "found.jsonl"
    target.write_text("earlier\n")
    assert main(["predict", str(images), "--json", str(target), "--layer", "99"]) == 2
    assert target.read_text() == "earlier\n"
    assert predict(images / "im00.jpg", "--json", target) == 0
    assert len(json_lines(target.read_text())) == 1


def test_a_picture_of_a_format_that_is_not_written_is_refused(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(images / "im00.jpg", "--plot", tmp_path / "found.bmp") == 2
    assert "expected a folder or a file ending in .png" in capsys.readouterr().err
    assert not (tmp_path / "found.bmp").exists()


@pytest.mark.parametrize("bias", [["--bias", "-0.5"], ["--bias=-1e-3"], ["--bias", "-1e-3"], ["--bias", "auto"]])
def test_a_bias_is_written_as_numbers_are(images: Path, bias: list[str]) -> None:
    assert predict(images / "im00.jpg", *bias) == 0


def test_backbones_may_be_named_one_by_one(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", "voc", "--root", str(root), "--out", str(tmp_path / "out"), "--limit", "1", "--device", "cpu"]
    assert main([*command, "--backbone", "dino_vits16", "--backbone", "deit3_vits16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-3:]] == ["backbone", "dino_vits16", "deit3_vits16"]


def test_a_backbone_that_fails_costs_nothing_of_those_before_it(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (out / "deit3_vits16").mkdir(parents=True)
    (out / "deit3_vits16" / "predictions.jsonl").write_text("mine\n")
    command = ["eval", "voc", "--root", str(root), "--out", str(out), "--limit", "1", "--device", "cpu"]
    assert main([*command, "--backbone", "dino_vits16", "deit3_vits16"]) == 2
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1].startswith("dino_vits16 ")
    assert "not a run to go on with" in captured.err


def test_images_of_a_benchmark_can_be_bounded(root: Path, tmp_path: Path) -> None:
    command = ["eval", "voc", "--root", str(root), "--limit", "2", *FAST]
    for side in ("none", "60"):
        assert main([*command, "--out", str(tmp_path / side), "--max-side", side]) == 0
    boxes = [json_lines((tmp_path / side / "predictions.jsonl").read_text()) for side in ("none", "60")]
    assert [line["width"] for line in boxes[0]] == [line["width"] for line in boxes[1]] == [98, 78]
    assert json.loads((tmp_path / "60" / "results.json").read_text())["options"]["max_side"] == 60


def test_predictions_go_into_a_pipe(images: Path) -> None:
    assert predict(images / "im00.jpg", "--json", os.devnull) == 0


def test_coco_is_scored_without_its_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotations = tmp_path / "boxes.json"
    content = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [], "categories": [{"id": 1}]}
    content["annotations"] = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10]}]
    annotations.write_text(json.dumps(content))
    predictions = tmp_path / "predictions.jsonl"
    predictions.write_text('{"image_id": 1, "boxes": [[0, 0, 10, 10]]}')
    assert main(["score", str(predictions), "coco", "--annotations", str(annotations)]) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("coco: 95 % interval")
    assert last == "corloc 100.00 (1/1)"


@pytest.mark.skipif(os.name != "posix", reason="closes a file descriptor")
def test_a_closed_standard_output_is_no_traceback() -> None:
    script = Path(sys.executable).with_name("lostreg")
    done = subprocess.run(["sh", "-c", f"'{script}' backbones >&-"], capture_output=True, text=True)
    assert "Traceback" not in done.stderr


def test_photos_are_scored_in_the_frame_of_their_annotations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, orientation in (("phone", 6), ("upside down", 3), ("plain", 1)):
        content = with_exif(encoded(disc_picture(154, 98), "JPEG", quality=95), turned_block(orientation))
        (photos / f"{name}.jpg").write_bytes(content)
    truth, out = tmp_path / "boxes.json", str(tmp_path / "scored")
    assert main(["discover", str(photos), "--out", str(tmp_path / "run"), *FAST]) == 0
    assert main(["export", str(tmp_path / "run"), "--format", "coco", "--out", str(truth)]) == 0
    scored = ["eval", "coco", "--images", str(photos), "--annotations", str(truth), *FAST, "--method", "parts", "--out"]
    capsys.readouterr()
    assert main([*scored, out]) == 0
    told = capsys.readouterr()
    assert told.out.endswith("corloc 100.00 (3/3)\n")
    assert "2 of 3 images are turned as their EXIF orientation says (the size in their annotations says so)" in told.err
    assert "of these, 1 are taken as turned though sizes do not tell: --no-exif takes all the other way" in told.err
    assert main([*scored, out, "--no-exif"]) == 2  # a run goes on in its own frame
    assert "holds a run with other settings: turned was 2 and is now null" in capsys.readouterr().err
    assert main([*scored, f"{out}-2", "--no-exif"]) == 0
    assert "such as phone.jpg: 154x98, not 98x154; boxes may lie elsewhere" in capsys.readouterr().err
    assert main([*scored, f"{out}-3", "--exif"]) == 0
    assert capsys.readouterr().out.endswith("corloc 100.00 (3/3)\n")
    assert main(["score", f"{out}-2/predictions.jsonl", "coco", "--annotations", str(truth)]) == 0
    assert "1 predictions are for images of another size than the annotations say" in capsys.readouterr().err
    assert main(["sweep", *scored[1:], f"{out}-4", "--biases", "0,-0.1"]) == 0
    assert "2 of 3 images are turned" in capsys.readouterr().err
