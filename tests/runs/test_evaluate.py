import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from fabricate import set_box, write_voc

from lostreg.cli.main import main
from lostreg.datasets import Benchmark, Example, load_benchmark
from lostreg.defaults import MAPS_FILE, PREDICTIONS_FILE, RESULTS_FILE
from lostreg.errors import ImageError, ImageUnavailableError, PredictionsError
from lostreg.images.decode import ImageSource
from lostreg.inference.discoverer import Discoverer
from lostreg.inference.discovery import Discovery
from lostreg.inference.stream import ImageStream
from lostreg.metrics import Corloc, score_auc
from lostreg.models.backbone import Backbone
from lostreg.progress import Progress
from lostreg.runs.evaluate import evaluate, named_by_files, score_predictions
from lostreg.runs.maps import read_maps
from lostreg.runs.predictions import Prediction

COUNT = 9  # more than a window of 4 batches of 2
KILLED_COUNT = 16  # of the run that is killed


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def discoverer(backbone: Backbone) -> Discoverer:
    return Discoverer(backbone, device="cpu", batch_size=2, exif=False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_voc(tmp_path / "voc", COUNT)


@pytest.fixture
def benchmark(root: Path) -> Benchmark:
    return load_benchmark("voc", root=root)


@pytest.fixture
def finished(benchmark: Benchmark, discoverer: Discoverer, tmp_path: Path) -> Path:
    """The folder of an uninterrupted run."""
    evaluate(benchmark, discoverer, tmp_path / "finished")
    return tmp_path / "finished"


def results(out: Path) -> dict[str, object]:
    return json.loads((out / RESULTS_FILE).read_text())


def lines(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / PREDICTIONS_FILE).read_text().splitlines()]


def unreadable(root: Path, stem: str) -> None:
    (root / "JPEGImages" / f"{stem}.jpg").write_text("not a picture")


def test_every_image_has_a_line_in_the_benchmarks_order(finished: Path, benchmark: Benchmark) -> None:
    written = lines(finished)
    assert [line["image_id"] for line in written] == [example.image_id for example in benchmark.examples]
    assert {(line["width"], line["height"]) for line in written} == {(98, 70), (78, 70)}
    assert all(len(line["boxes"]) == len(line["scores"]) == len(line["seeds"]) == 1 for line in written)
    assert len({str(line["boxes"]) for line in written}) > 3


def test_results_say_what_was_measured(
    root: Path, benchmark: Benchmark, discoverer: Discoverer, finished: Path, tmp_path: Path
) -> None:
    for number, line in enumerate(lines(finished)):  # every other image is a hit, the others cannot be
        x1, y1, x2, y2 = line["boxes"][0]
        set_box(root, line["image_id"], (x1 + 1, y1 + 1, x2, y2) if number % 2 == 0 else (78, 70, 78, 70))
    benchmark = load_benchmark("voc", root=root)
    evaluation = evaluate(benchmark, discoverer, tmp_path / "out", extra={"limit": None})
    assert evaluation.score == Corloc(5, 9)
    assert (evaluation.computed, evaluation.unreadable) == (9, 0)
    found = results(tmp_path / "out")
    assert found["complete"] is True
    assert (found["corloc"], found["hits"], found["images"], found["unreadable"]) == (55.5556, 5, 9, 0)
    assert found["wilson_95"] == pytest.approx([26.665, 81.122], abs=0.01)
    scores = [line["scores"][0] for line in lines(tmp_path / "out")]
    pairs = list(itertools.product(scores[::2], scores[1::2]))
    assert evaluation.auc == pytest.approx(sum((hit > miss) + (hit == miss) / 2 for hit, miss in pairs) / 20)
    assert found["score_auc"] == pytest.approx(evaluation.auc, abs=1e-4)
    assert found["benchmark"] == {
        "name": "voc",
        "split": "trainval",
        "images": 9,
        "fingerprint": benchmark.fingerprint(),
        "limit": None,
    }
    assert found["options"] == {**discoverer.options.record(), "masks": False}
    assert found["run"]["computed"] == 9
    assert found["run"]["images_per_s"] > 0
    assert {"python", "lostreg", "torch", "timm", "numpy"} <= found["versions"].keys()
    assert found["device"].startswith("cpu: ")


@pytest.fixture
def close_scores(discoverer: Discoverer, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Scores that the discoveries are given, so close that the file's three decimals tell few of them apart."""
    scores = [0.5 + 0.0001 * (number * 7 % COUNT) for number in range(COUNT)]
    outcomes = discoverer.outcomes

    def scored(images: Iterable[ImageSource], **_: object) -> Iterator[Discovery | ImageError]:
        for outcome in outcomes(images):
            assert isinstance(outcome, Discovery)
            score = scores[int(Path(str(outcome.source)).stem.removeprefix("im"))]
            yield dataclasses.replace(outcome, scores=np.array([score], dtype=np.float32))

    monkeypatch.setattr(discoverer, "outcomes", scored)
    return scores


@pytest.mark.parametrize("known", [1, 5, COUNT])
def test_the_auc_does_not_depend_on_where_a_run_goes_on(
    root: Path, discoverer: Discoverer, finished: Path, tmp_path: Path, close_scores: list[float], known: int
) -> None:
    for line in lines(finished)[::2]:
        x1, y1, x2, y2 = line["boxes"][0]
        set_box(root, line["image_id"], (x1 + 1, y1 + 1, x2, y2))
    benchmark, out = load_benchmark("voc", root=root), tmp_path / "out"
    whole = evaluate(benchmark, discoverer, out)
    assert 0 < whole.score.hits < COUNT
    expected = results(out)["score_auc"]
    path = out / PREDICTIONS_FILE
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:known]))
    (out / RESULTS_FILE).write_text(json.dumps({**results(out), "complete": False}))
    assert evaluate(benchmark, discoverer, out).auc == whole.auc
    assert results(out)["score_auc"] == expected


def test_the_auc_of_misses_alone_cannot_be_said(
    root: Path, benchmark: Benchmark, discoverer: Discoverer, tmp_path: Path
) -> None:
    for example in benchmark.examples:
        set_box(root, str(example.image_id), (200, 200, 210, 210))
    evaluation = evaluate(load_benchmark("voc", root=root), discoverer, tmp_path / "out")
    assert (evaluation.score.hits, evaluation.auc) == (0, None)
    assert results(tmp_path / "out")["score_auc"] is None


def test_images_that_cannot_be_read_have_no_score_to_judge(
    root: Path, benchmark: Benchmark, discoverer: Discoverer, finished: Path, tmp_path: Path
) -> None:
    for line in lines(finished)[::2]:
        x1, y1, x2, y2 = line["boxes"][0]
        set_box(root, line["image_id"], (x1 + 1, y1 + 1, x2, y2))
    unreadable(root, "im02")
    unreadable(root, "im03")
    evaluation = evaluate(load_benchmark("voc", root=root), discoverer, tmp_path / "out")
    judged = [line for line in lines(finished) if line["image_id"] not in ("im02", "im03")]
    hits = [int(line["image_id"][2:]) % 2 == 0 for line in judged]
    assert evaluation.auc == score_auc([line["scores"][0] for line in judged], hits)
    assert evaluation.auc is not None


def test_a_run_with_the_trials_of_another_day_is_not_gone_on_with(
    benchmark: Benchmark, discoverer: Discoverer, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lostreg.inference.options.TRIALS", (0.0, -1.0))
    with pytest.raises(PredictionsError, match=r"auto_trials was \[0\.0, -0\.25, .*\] and is now \[0\.0, -1\.0\]"):
        evaluate(benchmark, discoverer, finished)
    before = json.loads((finished / RESULTS_FILE).read_text())
    del before["options"]["auto_trials"]  # as runs before there were trials
    (finished / RESULTS_FILE).write_text(json.dumps(before))
    with pytest.raises(PredictionsError, match=r"auto_trials was null and is now \[0\.0, -1\.0\]"):
        evaluate(benchmark, discoverer, finished)


def test_progress_is_told_after_each_image(
    root: Path, benchmark: Benchmark, discoverer: Discoverer, tmp_path: Path
) -> None:
    unreadable(root, "im03")
    told: list[Progress] = []
    evaluation = evaluate(benchmark, discoverer, tmp_path / "out", on_progress=told.append)
    assert [progress.done for progress in told] == list(range(1, COUNT + 1))
    assert {progress.total for progress in told} == {COUNT}
    assert [progress.done for progress in told if progress.error is not None] == [4]
    assert told[-1].note == f"corloc {evaluation.score.percent:.2f}"


def test_a_run_cut_at_any_byte_ends_with_the_same_bytes(
    benchmark: Benchmark, discoverer: Discoverer, finished: Path
) -> None:
    path = finished / PREDICTIONS_FILE
    content, maps = path.read_bytes(), (finished / MAPS_FILE).read_bytes()
    ends = [index + 1 for index, byte in enumerate(content) if byte == ord("\n")]
    score = results(finished)["corloc"]
    for cut in sorted({0, 1, len(content) - 1, *ends, *(end + 40 for end in ends[::2])}):
        path.write_bytes(content[:cut])
        whole = content[:cut].count(b"\n")
        evaluation = evaluate(benchmark, discoverer, finished)
        assert path.read_bytes() == content
        assert (finished / MAPS_FILE).read_bytes() == maps
        assert evaluation.computed == COUNT - whole
        assert results(finished)["corloc"] == score


def test_maps_hold_the_ground_truth(benchmark: Benchmark, finished: Path) -> None:
    found = list(read_maps(finished / MAPS_FILE))
    assert [one.image_id for one in found] == [example.image_id for example in benchmark.examples]
    assert [one.truth for one in found] == [example.boxes.tolist() for example in benchmark.examples]


@pytest.mark.parametrize("lines", [slice(0), slice(4), slice(3, None)], ids=["all", "the last", "the first"])
def test_images_whose_maps_were_lost_are_computed_again(
    benchmark: Benchmark, discoverer: Discoverer, finished: Path, lines: slice
) -> None:
    maps = finished / MAPS_FILE
    whole = maps.read_bytes().splitlines(keepends=True)
    maps.write_bytes(b"".join(whole[lines]))
    evaluation = evaluate(benchmark, discoverer, finished)
    assert evaluation.computed == len(whole) - len(whole[lines])
    for path in (maps, finished / PREDICTIONS_FILE):
        ids = [json.loads(line)["image_id"] for line in path.open()]
        assert ids == [example.image_id for example in benchmark.examples]
    maps.unlink()  # as in the folder of an early version
    assert evaluate(benchmark, discoverer, finished).computed == COUNT
    assert evaluate(benchmark, discoverer, finished).computed == 0


def test_a_run_of_a_version_without_several_objects_goes_on(
    benchmark: Benchmark, backbone: Backbone, discoverer: Discoverer, finished: Path
) -> None:
    recorded = results(finished)
    for name in ("max_objects", "min_score", "refine", "box_from", "masks"):
        del recorded["options"][name]  # type: ignore[attr-defined]
    (finished / RESULTS_FILE).write_text(json.dumps(recorded))
    assert evaluate(benchmark, discoverer, finished).computed == 0
    several = Discoverer(backbone, device="cpu", batch_size=2, exif=False, max_objects=2)
    with pytest.raises(PredictionsError, match="max_objects was 1 and is now 2"):
        evaluate(benchmark, several, finished)


def test_masks_are_a_setting_of_the_run(benchmark: Benchmark, discoverer: Discoverer, finished: Path) -> None:
    with pytest.raises(PredictionsError, match="masks was false and is now true"):
        evaluate(benchmark, discoverer, finished, masks=True)
    evaluate(benchmark, discoverer, finished, masks=True, overwrite=True)
    assert all(len(line["masks"]) == 1 for line in lines(finished))  # type: ignore[arg-type]


@pytest.mark.parametrize("after", [1, 4, 8])
def test_an_interrupted_run_keeps_its_lines_and_goes_on(
    benchmark: Benchmark, discoverer: Discoverer, finished: Path, tmp_path: Path, after: int
) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.done == after:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        evaluate(benchmark, discoverer, out, on_progress=interrupt)
    assert len(lines(out)) == after
    assert results(out)["complete"] is False
    evaluate(benchmark, discoverer, out)
    assert (out / PREDICTIONS_FILE).read_bytes() == (finished / PREDICTIONS_FILE).read_bytes()
    assert results(out)["complete"] is True


def test_a_finished_run_computes_nothing(
    benchmark: Benchmark, discoverer: Discoverer, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, score = (finished / PREDICTIONS_FILE).read_bytes(), results(finished)["hits"]

    def never(*_: object) -> None:
        raise AssertionError("an image was computed again")

    monkeypatch.setattr(ImageStream, "_start", never)
    measured = (finished / RESULTS_FILE).read_bytes()
    evaluation = evaluate(benchmark, discoverer, finished)
    assert (evaluation.computed, evaluation.score.hits) == (0, score)
    assert (finished / PREDICTIONS_FILE).read_bytes() == before
    assert (finished / RESULTS_FILE).read_bytes() == measured  # the speed that was measured is not lost


def test_a_run_killed_before_its_results_were_written_gets_them(
    benchmark: Benchmark, discoverer: Discoverer, finished: Path
) -> None:
    unfinished = {key: value for key, value in results(finished).items() if key in ("benchmark", "options")}
    (finished / RESULTS_FILE).write_text(json.dumps({"complete": False, **unfinished}))
    assert evaluate(benchmark, discoverer, finished).computed == 0
    assert results(finished)["complete"] is True
    assert results(finished)["images"] == COUNT


def test_progress_tells_images_of_an_earlier_run_apart(
    benchmark: Benchmark, discoverer: Discoverer, finished: Path
) -> None:
    path = finished / PREDICTIONS_FILE
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]))
    told: list[Progress] = []
    evaluate(benchmark, discoverer, finished, on_progress=told.append)
    assert [progress.known for progress in told] == [1, 2, 3] + [4] * (COUNT - 3)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_a_killed_run_goes_on_and_holds_its_folder_until_then(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_voc(tmp_path / "voc", KILLED_COUNT)
    lostreg = str(Path(sys.executable).with_name("lostreg"))

    def command(out: Path) -> list[str]:
        options = ["--backbone", "imgfocus_vits14", "--device", "cpu", "--batch-size", "1"]
        return ["eval", "voc", "--root", str(root), "--out", str(out), *options]

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen([lostreg, *command(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_lines(killed / PREDICTIONS_FILE, 3, process)
        os.kill(process.pid, signal.SIGSTOP)
        assert main(command(killed)) == 2
        assert "killed is in use: another run is writing there" in capsys.readouterr().err
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    survived = (killed / PREDICTIONS_FILE).read_bytes()
    assert 3 <= survived.count(b"\n") < KILLED_COUNT
    assert results(killed)["complete"] is False

    assert main(command(killed)) == 0
    resumed = capsys.readouterr().out.splitlines()[-1]
    assert main(command(whole)) == 0
    assert capsys.readouterr().out.splitlines()[-1] == resumed
    assert (killed / PREDICTIONS_FILE).read_bytes() == (whole / PREDICTIONS_FILE).read_bytes()
    assert (killed / PREDICTIONS_FILE).read_bytes().startswith(survived)
    assert results(killed)["run"]["computed"] == KILLED_COUNT - survived.count(b"\n")


def wait_for_lines(path: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "the run wrote nothing"
        time.sleep(0.005)


def test_changed_options_are_named(benchmark: Benchmark, backbone: Backbone, finished: Path) -> None:
    other = Discoverer(backbone, device="cpu", batch_size=2, exif=False, k_patches=7, bias=-0.5)
    before = (finished / PREDICTIONS_FILE).read_bytes()
    with pytest.raises(PredictionsError, match="other settings") as caught:
        evaluate(benchmark, other, finished)
    assert 'bias was "auto" and is now -0.5; k_patches was 100 and is now 7' in str(caught.value)
    assert "use --overwrite or another --out" in str(caught.value)
    assert "backbone" not in str(caught.value)
    assert (finished / PREDICTIONS_FILE).read_bytes() == before


def test_a_changed_benchmark_is_named(root: Path, discoverer: Discoverer, finished: Path) -> None:
    set_box(root, "im04", (1, 1, 2, 2))
    with pytest.raises(PredictionsError, match=r"fingerprint was .* and is now"):
        evaluate(load_benchmark("voc", root=root), discoverer, finished)


def test_a_changed_limit_is_named(benchmark: Benchmark, discoverer: Discoverer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    evaluate(benchmark.limited(3), discoverer, out, extra={"limit": 3})
    with pytest.raises(PredictionsError, match=r"images was 3 and is now 9.*limit was 3 and is now null"):
        evaluate(benchmark, discoverer, out, extra={"limit": None})


def test_overwriting_starts_anew(benchmark: Benchmark, backbone: Backbone, finished: Path) -> None:
    other = Discoverer(backbone, device="cpu", exif=False, k_patches=7)
    evaluation = evaluate(benchmark, other, finished, overwrite=True)
    assert evaluation.computed == COUNT
    assert results(finished)["options"]["k_patches"] == 7


def test_overwriting_a_broken_run_is_possible(benchmark: Benchmark, discoverer: Discoverer, finished: Path) -> None:
    (finished / PREDICTIONS_FILE).write_text("nonsense\n")
    (finished / RESULTS_FILE).write_text("{")
    assert evaluate(benchmark, discoverer, finished, overwrite=True).computed == COUNT


@pytest.mark.parametrize("content", [None, "", "{", "\x00"])
def test_predictions_without_their_settings_are_not_gone_on_with(
    benchmark: Benchmark, discoverer: Discoverer, finished: Path, content: str | None
) -> None:
    (finished / RESULTS_FILE).unlink()
    if content is not None:
        (finished / RESULTS_FILE).write_text(content)
    with pytest.raises(PredictionsError, match=r"no readable results\.json: not a run to go on with; use --overwrite"):
        evaluate(benchmark, discoverer, finished)


def test_lines_in_another_order_count_and_what_is_missing_among_them_is_computed(
    benchmark: Benchmark, discoverer: Discoverer, finished: Path
) -> None:
    before = {name: (finished / name).read_bytes() for name in (PREDICTIONS_FILE, MAPS_FILE)}
    path, measured = finished / PREDICTIONS_FILE, results(finished)
    first, second, *rest = path.read_text().splitlines(keepends=True)
    for content, computed in (([second, first, *rest], 0), ([first, *rest], 1), ([first, second, *rest, first], 0)):
        path.write_text("".join(content))
        evaluation = evaluate(benchmark, discoverer, finished)
        assert evaluation.computed == computed
        assert results(finished)["hits"] == measured["hits"]
        assert {name: (finished / name).read_bytes() for name in before} == before


def test_lines_of_images_that_the_benchmark_does_not_have_are_not_gone_on_with(
    benchmark: Benchmark, discoverer: Discoverer, finished: Path
) -> None:
    path = finished / PREDICTIONS_FILE
    content = path.read_text().replace("im03", "other")
    path.write_text(content)
    with pytest.raises(PredictionsError, match="1 images that are none of this run, such as 'other'"):
        evaluate(benchmark, discoverer, finished)
    assert path.read_text() == content


def test_a_second_run_into_a_folder_in_use_is_refused(
    benchmark: Benchmark, discoverer: Discoverer, finished: Path, tmp_path: Path
) -> None:
    out, refused = tmp_path / "out", []

    def intrude(progress: Progress) -> None:
        for overwrite in (False, True):
            with pytest.raises(PredictionsError, match="is in use: another run is writing there"):
                evaluate(benchmark, discoverer, out, overwrite=overwrite)
            refused.append(progress.done)

    evaluate(benchmark, discoverer, out, on_progress=intrude)
    assert len(refused) == 2 * COUNT
    assert (out / PREDICTIONS_FILE).read_bytes() == (finished / PREDICTIONS_FILE).read_bytes()
    assert evaluate(benchmark, discoverer, out).computed == 0  # and now it is free


def test_an_unreadable_image_is_a_miss_with_a_reason(
    root: Path, benchmark: Benchmark, discoverer: Discoverer, tmp_path: Path
) -> None:
    unreadable(root, "im02")
    evaluation = evaluate(benchmark, discoverer, tmp_path / "out")
    assert (evaluation.unreadable, evaluation.score.images) == (1, COUNT)
    line = lines(tmp_path / "out")[2]
    assert line["boxes"] == []
    assert "im02.jpg: not a readable image" in line["error"]
    assert results(tmp_path / "out")["unreadable"] == 1
    assert evaluate(benchmark, discoverer, tmp_path / "out").unreadable == 1  # also when it is only read back


def test_strict_stops_at_an_unreadable_image_and_keeps_what_came_before(
    root: Path, benchmark: Benchmark, discoverer: Discoverer, tmp_path: Path
) -> None:
    unreadable(root, "im05")
    out = tmp_path / "out"
    with pytest.raises(ImageError, match=r"im05\.jpg"):
        evaluate(benchmark, discoverer, out, strict=True)
    assert [line["image_id"] for line in lines(out)] == ["im00", "im01", "im02", "im03", "im04"]
    assert evaluate(benchmark, discoverer, out).computed == 4
    with pytest.raises(ImageError, match=r"im05\.jpg"):  # a line of an earlier run is no excuse
        evaluate(benchmark, discoverer, out, strict=True)


def test_discoveries_are_shown_before_their_line_is_written(
    benchmark: Benchmark, discoverer: Discoverer, tmp_path: Path
) -> None:
    out, seen = tmp_path / "out", []

    def look(example: Example, found: object) -> None:
        assert len(lines(out)) == len(seen)
        seen.append(example.image_id)

    evaluate(benchmark, discoverer, out, on_discovery=look)
    assert seen == [example.image_id for example in benchmark.examples]


def test_a_file_in_the_place_of_the_folder(benchmark: Benchmark, discoverer: Discoverer, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(PredictionsError, match=r"cannot write to .*file, expected a folder: it is a file"):
        evaluate(benchmark, discoverer, file)
    with pytest.raises(PredictionsError, match=r"cannot write to .*below, expected a folder: Not a directory"):
        evaluate(benchmark, discoverer, file / "below")
    assert file.read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(benchmark: Benchmark, discoverer: Discoverer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir(mode=0o500)
    with pytest.raises(PredictionsError, match=r"(?i)cannot write to .*permission denied"):
        evaluate(benchmark, discoverer, out)


def test_a_moved_run_goes_on(benchmark: Benchmark, discoverer: Discoverer, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "elsewhere")
    assert evaluate(benchmark, discoverer, tmp_path / "elsewhere").computed == 0


def test_images_that_have_moved_are_known_in_their_new_places(
    root: Path, discoverer: Discoverer, finished: Path, tmp_path: Path
) -> None:
    moved = root.rename(tmp_path / "moved")
    assert evaluate(load_benchmark("voc", root=moved), discoverer, finished).computed == 0
    places = [json.loads(line)["path"] for line in (finished / "maps.jsonl").read_text().splitlines()]
    assert places == sorted(str(path) for path in (moved / "JPEGImages").iterdir())


def three() -> Benchmark:
    box = np.array([[0.0, 0.0, 10.0, 10.0]])
    return Benchmark("voc", "val", tuple(Example(image_id, Path("none"), box) for image_id in ("a", "b", "c")))


def prediction(image_id: str | int, *boxes: Sequence[float]) -> Prediction:
    return Prediction(image_id, boxes)


def test_scoring_does_not_depend_on_order() -> None:
    hit, also, miss = prediction("a", [0, 0, 10, 10]), prediction("c", [0, 0, 10, 5]), prediction("b", [0, 0, 4, 4])
    for order in ([hit, also, miss], [miss, also, hit], [also, hit, miss]):
        assert score_predictions(order, three()) == (Corloc(2, 3), 0)


def test_only_the_first_box_is_scored() -> None:
    found = [prediction("a", [0, 0, 1, 1], [0, 0, 10, 10])]
    assert score_predictions(found, three())[0].hits == 0


def test_missing_and_empty_predictions_are_misses() -> None:
    found = [prediction("b", [0, 0, 10, 10]), prediction("c")]
    assert score_predictions(found, three()) == (Corloc(1, 3), 1)


def test_two_predictions_for_one_image_are_refused() -> None:
    with pytest.raises(PredictionsError, match="two predictions for image 'b': expected one an image"):
        score_predictions([prediction("a"), prediction("b"), prediction("b")], three())


@pytest.mark.parametrize("image_id", ["d", 7, "a.jpg"])
def test_predictions_for_other_images_are_refused(image_id: str | int) -> None:
    with pytest.raises(PredictionsError, match=r"1 of 2 predictions .* voc val does not have") as caught:
        score_predictions([prediction("a"), prediction(image_id)], three())
    assert f"such as {image_id!r}: expected ids like 'a'" in str(caught.value)


@pytest.mark.parametrize("scores", [[], None])
def test_boxes_without_scores_take_no_part_in_the_auc(
    benchmark: Benchmark, discoverer: Discoverer, finished: Path, scores: object
) -> None:
    path = finished / PREDICTIONS_FILE
    lines = [{**json.loads(line), "scores": scores} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluation = evaluate(benchmark, discoverer, finished)
    assert evaluation.auc is None
    assert evaluation.detection is None
    assert evaluation.score.hits == results(finished)["hits"]


@pytest.mark.parametrize("scores", [["high"], 5, {"a": 1}, [None], [float("nan")], [True]])
def test_scores_that_are_no_numbers_are_not_gone_on_with(
    benchmark: Benchmark, discoverer: Discoverer, finished: Path, scores: object
) -> None:
    path = finished / PREDICTIONS_FILE
    lines = [{**json.loads(line), "scores": scores} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(PredictionsError, match=r"is not of this run \(line 1: expected one finite score for each of 1"):
        evaluate(benchmark, discoverer, finished)


def test_images_that_could_not_be_had_are_tried_again_by_the_next_run(
    root: Path, benchmark: Benchmark, discoverer: Discoverer, finished: Path, tmp_path: Path, away: set[str]
) -> None:
    out = tmp_path / "out"
    away.add("im02.jpg")
    seen: list[Progress] = []
    evaluation = evaluate(benchmark, discoverer, out, on_progress=seen.append)
    assert (evaluation.unreadable, evaluation.unavailable) == (1, 1)
    assert [type(now.error) for now in seen if now.error] == [ImageUnavailableError]
    assert lines(out)[2]["unavailable"] is True
    away.clear()
    again = evaluate(benchmark, discoverer, out)
    assert (again.computed, again.unreadable, again.unavailable) == (1, 0, 0)
    assert (out / PREDICTIONS_FILE).read_bytes() == (finished / PREDICTIONS_FILE).read_bytes()


def test_who_is_overwritten_is_told(benchmark: Benchmark, discoverer: Discoverer, finished: Path) -> None:
    gone: list[object] = []
    evaluate(benchmark.limited(2), discoverer, finished, overwrite=True, on_gone=gone.append)
    assert gone == [example.image_id for example in benchmark.examples]


# Ids that are paths, as those of `discover` are


def paths(*ids: str | int) -> list[Prediction]:
    return [Prediction(image_id, [[9, 9, 60, 60]]) for image_id in ids]


def test_a_run_of_discover_is_scored_by_the_names_of_files(
    root: Path, benchmark: Benchmark, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = named_by_files(paths(*(f"some/where/{one.image_id}.png" for one in benchmark.examples)), benchmark)
    assert named is not None
    assert [one.image_id for one in named] == [one.image_id for one in benchmark.examples]
    first = benchmark.examples[0].image_id
    predictions = tmp_path / "predictions.jsonl"
    predictions.write_text(paths(f"a/{first}.jpg")[0].to_line() + "\n")
    assert main(["score", str(predictions), "voc", "--root", str(root)]) == 0
    told = capsys.readouterr()
    assert told.out.splitlines()[-1].endswith(f"(1/{len(benchmark)})")
    assert f"lostreg: images are known by their files' names: a/{first}.jpg is {first}" in told.err.splitlines()


def test_ids_of_the_benchmark_or_of_nothing_are_no_paths(benchmark: Benchmark) -> None:
    first, second = (str(one.image_id) for one in benchmark.examples[:2])
    for ids in ([first, second], [first, f"a/{second}.jpg"], ["other.jpg", "another.jpg"]):
        assert named_by_files(paths(*ids), benchmark) is None


def test_names_of_files_that_leave_something_open_are_refused(benchmark: Benchmark) -> None:
    first = benchmark.examples[0].image_id
    with pytest.raises(PredictionsError, match=f"'a/{first}.jpg' and 'b/{first}.jpg' have one file name"):
        named_by_files(paths(f"a/{first}.jpg", f"b/{first}.jpg"), benchmark)
    with pytest.raises(PredictionsError, match=r"1 of 2 predictions .* by the names of their files, such as 'a/x.jpg'"):
        named_by_files(paths(f"a/{first}.jpg", "a/x.jpg"), benchmark)
    twins = [
        dataclasses.replace(benchmark.examples[0], path=Path(f"{folder}/same.jpg"), image_id=number)
        for number, folder in enumerate("ab")
    ]
    with pytest.raises(PredictionsError, match=r"'a/same.jpg' and 'b/same.jpg' have one file name"):
        named_by_files(paths("c/same.jpg"), dataclasses.replace(benchmark, examples=tuple(twins)))


def test_images_of_coco_that_are_not_scored_are_known_by_their_numbers(benchmark: Benchmark) -> None:
    example = dataclasses.replace(benchmark.examples[0], image_id=9, path=Path("x/COCO_train2014_000000000009.jpg"))
    coco = Benchmark("coco20k", "", (example,), left_out=frozenset({30}))
    named = named_by_files(paths("COCO_train2014_000000000009.jpg", "COCO_train2014_000000000030.jpg"), coco)
    assert named is not None
    assert [one.image_id for one in named] == [9, 30]


@pytest.mark.parametrize("given", ["9", "000000000009", "COCO_train2014_000000000009"])
def test_numbers_of_coco_may_be_text(benchmark: Benchmark, given: str) -> None:
    for path in ("x/COCO_train2014_000000000009.jpg", "x/cat.jpg"):
        example = dataclasses.replace(benchmark.examples[0], image_id=9, path=Path(path))
        named = named_by_files(paths(given, "30"), Benchmark("coco", "", (example,), left_out=frozenset({30})))
        assert named is not None
        assert [one.image_id for one in named] == [9, 30]
