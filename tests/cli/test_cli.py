import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from fabricate import write_voc
from PIL import Image

import lostreg
from lostreg.backbone_table import BACKBONES
from lostreg.backbones import Backbone, build_backbone, find_spec
from lostreg.cli.main import main
from lostreg.datasets import BENCHMARKS
from lostreg.engine import Engine

COMMANDS = ("predict", "eval", "score", "backbones", "datasets")
FAST = ["--backbone", "imgfocus_vits14", "--device", "cpu"]
_small: dict[str, Backbone] = {}


@pytest.fixture(autouse=True)
def _small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each backbone is two random blocks: the command line is tested here, not what is found."""

    def load(name: str, **_: Any) -> Backbone:
        if name not in _small:
            torch.manual_seed(0)
            _small[name] = build_backbone(find_spec(name), depth=2)
        return _small[name]

    monkeypatch.setattr("lostreg.discoverer.load_backbone", load)


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
    forward = Engine.forward

    def crowded(engine: Engine, patches: list[torch.Tensor], sizes: list[tuple[int, int]]) -> torch.Tensor:
        if len(patches) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(engine, patches, sizes)

    monkeypatch.setattr(Engine, "forward", crowded)
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
    assert first[5] == "1.00"
    assert captured.err == ""


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


def test_folders_are_searched_to_the_bottom_and_sorted(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deep = tmp_path / "top" / "deep"
    deep.mkdir(parents=True)
    (tmp_path / "top" / "folder.jpg").mkdir()  # named like an image
    (deep / "notes.txt").write_text("no image")
    for target in (tmp_path / "top" / "z.JPG", deep / "a.jpeg"):
        target.write_bytes((images / "im00.jpg").read_bytes())
    assert predict(tmp_path / "top") == 0
    assert [Path(row[0]).name for row in table(capsys.readouterr().out)[1:]] == ["a.jpeg", "z.JPG"]


def test_globs_are_expanded_and_sorted(
    images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert predict(images / "im0[2-4].jpg", images / "im00.jpg") == 0
    names = [Path(row[0]).name for row in table(capsys.readouterr().out)[1:]]
    assert names == ["im02.jpg", "im03.jpg", "im04.jpg", "im00.jpg"]
    monkeypatch.chdir(images.parent)
    assert predict("**/*1.jpg") == 0
    assert table(capsys.readouterr().out)[1][0] == "JPEGImages/im01.jpg"


def test_a_file_whose_name_looks_like_a_glob_is_itself(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = tmp_path / "a[1].jpg"
    odd.write_bytes((images / "im00.jpg").read_bytes())
    assert predict(odd) == 0
    assert table(capsys.readouterr().out)[1][0] == odd.as_posix()


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
    limits = "--max-pixels 123456"
    assert (
        main(["eval", "voc", "--root", str(root), "--out", str(tmp_path), *FAST, *method.split(), *limits.split()]) == 0
    )
    options = json.loads((tmp_path / "results.json").read_text())["options"]
    del options["weights"]
    assert options == {
        "backbone": "imgfocus_vits14",
        "feature": "v",
        "layer": 0,
        "bias": -0.5,
        "normalize": False,
        "k_patches": 9,
        "device": "cpu",
        "precision": "bf16",
        "batch_size": 3,
        "compile": False,
        "max_side": None,
        "exif": False,
        "max_pixels": 123456,
    }


def test_eval_ends_with_the_score_and_score_agrees(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["eval", "voc", "--root", str(root), "--out", str(out), *FAST]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    results = json.loads((out / "results.json").read_text())
    assert last == f"corloc {results['corloc']:.2f} ({results['hits']}/5)"
    assert main(["score", str(out / "predictions.jsonl"), "voc", "--root", str(root)]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == last
    assert captured.err == ""


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
from lostreg.cli.main import main
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

    monkeypatch.setattr("lostreg.discoverer.load_backbone", interrupt)
    assert predict(images) == 130
    assert capsys.readouterr().err == "\nlostreg: interrupted; what was written so far is kept\n"


def test_a_mistake_costs_no_earlier_predictions(images: Path, tmp_path: Path) -> None:
    target = tmp_path / "found.jsonl"
    target.write_text("earlier\n")
    assert main(["predict", str(images), "--json", str(target), "--device", "nonsense"]) == 2
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


def test_linked_folders_are_searched_and_circles_end(images: Path, tmp_path: Path, capsys) -> None:
    place = tmp_path / "linked"
    place.mkdir()
    (place / "more").symlink_to(images, target_is_directory=True)
    (place / "circle").symlink_to(place, target_is_directory=True)
    assert predict(place) == 0
    assert len(table(capsys.readouterr().out)) == 6


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
