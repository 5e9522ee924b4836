"""A sweep against one run for each of its cells, and what is left of it after a kill."""

import itertools
import json
import shutil
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fabricate import set_box, write_voc
from torch import Tensor

from lostreg.datasets import Benchmark, load_benchmark
from lostreg.errors import ImageError, OptionError, PredictionsError
from lostreg.inference.discoverer import Discoverer
from lostreg.inference.jobs import FeaturesJob
from lostreg.inference.learn import learn
from lostreg.inference.stream import ImageStream
from lostreg.methods.bias import TRIALS
from lostreg.metrics import Corloc, is_hit
from lostreg.models.backbone import Backbone
from lostreg.models.blocks import BlockRunner
from lostreg.progress import Progress
from lostreg.runs import sweep as sweep_run
from lostreg.runs.evaluate import evaluate
from lostreg.runs.sweep import LINES_FILE, RESULTS_FILE, SweepRow, summary, sweep

COUNT = 9
BATCH = 2
PAIRS = [(feature, layer) for layer in (0, 1) for feature in ("q", "k", "v", "out")]
BIASES = (-0.75, 0.25, -0.4, -0.1, -2.0, 0.0, 2.0)  # in no order; with one all is connected, with one nothing

ENTRY = {"hits": "01", "auto": {"hit": True, "box": [0, 0, 1, 1], "score": 0.5, "bias": -0.1, "connected": True}}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def discoverer(backbone: Backbone) -> Discoverer:
    return Discoverer(backbone, device="cpu", batch_size=BATCH, exif=False)


def alone(backbone: Backbone, feature: Any, layer: int, bias: Any) -> Discoverer:
    """One cell of the table."""
    return Discoverer(
        backbone, device="cpu", batch_size=BATCH, exif=False, feature=feature, layer=layer, bias=bias, normalize=True
    )


@pytest.fixture(scope="module")
def _template(
    tmp_path_factory: pytest.TempPathFactory, one_thread: None, backbone: Backbone, discoverer: Discoverer
) -> Path:
    """Pictures, and the folder of an uninterrupted run over them.

    Each picture's object is what one bias in one feature boxes, so that cells differ and few are all or nothing.
    """
    place = tmp_path_factory.mktemp("template")
    root = write_voc(place / "voc", COUNT)
    cells = list(itertools.product(PAIRS, (-0.4, -0.1, "auto", -0.75)))
    for number, example in enumerate(load_benchmark("voc", root=root).examples):
        (feature, layer), bias = cells[number * 7 % len(cells)]
        x1, y1, x2, y2 = alone(backbone, feature, layer, bias).discover(example.path).xyxy[0].tolist()
        set_box(root, str(example.image_id), (x1 + 1, y1 + 1, x2, y2))  # as VOC has them
    sweep(load_benchmark("voc", root=root), discoverer, PAIRS, BIASES, place / "finished")
    return place


@pytest.fixture
def root(tmp_path: Path, _template: Path) -> Path:
    return shutil.copytree(_template / "voc", tmp_path / "voc")


@pytest.fixture
def benchmark(root: Path) -> Benchmark:
    return load_benchmark("voc", root=root)


@pytest.fixture
def finished(tmp_path: Path, _template: Path) -> Path:
    """The folder of an uninterrupted run."""
    return shutil.copytree(_template / "finished", tmp_path / "finished")


def results(out: Path) -> dict[str, Any]:
    """But for what belongs to one run alone."""

    def never(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    fields = json.loads((out / RESULTS_FILE).read_text(encoding="utf-8"), parse_constant=never)
    return {key: value for key, value in fields.items() if key != "run"}


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / LINES_FILE).read_text(encoding="utf-8").splitlines()]


def unreadable(root: Path, stem: str) -> None:
    (root / "JPEGImages" / f"{stem}.jpg").write_text("not a picture")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What each image gave, as the stream hands it on: boxes of every bias, of which the files keep the hits alone."""
    found: list[Any] = []
    outcomes = ImageStream.outcomes

    def record(stream: ImageStream[Any], images: Any, skip: int = 0) -> Iterator[Any]:
        for outcome in outcomes(stream, images, skip):
            found.append(outcome)
            yield outcome

    monkeypatch.setattr(ImageStream, "outcomes", record)
    return found


def test_every_cell_is_a_run_of_its_own(
    benchmark: Benchmark, discoverer: Discoverer, backbone: Backbone, tmp_path: Path, seen: list[Any]
) -> None:
    rows = sweep(benchmark, discoverer, PAIRS, BIASES, tmp_path / "out")
    assert [(row.feature, row.layer) for row in rows] == PAIRS
    found, written = list(seen), lines(tmp_path / "out")
    truths = [example.boxes for example in benchmark.examples]
    paths = [example.path for example in benchmark.examples]
    for place, (row, (feature, layer)) in enumerate(zip(rows, PAIRS, strict=True)):
        entries = [line["features"][f"{feature} {layer}"] for line in written]
        assert row.biases == BIASES
        for column, bias in enumerate(BIASES):
            expected = list(alone(backbone, feature, layer, bias).discover_many(paths))
            hits = [is_hit(one.xyxy, truth) for one, truth in zip(expected, truths, strict=True)]
            for outcome, one in zip(found, expected, strict=True):
                np.testing.assert_array_equal(outcome[place].boxes[column], one.xyxy[0])
            assert [entry["hits"][column] for entry in entries] == [str(int(hit)) for hit in hits]
            assert row.fixed[column] == Corloc(sum(hits), COUNT)
        expected = list(alone(backbone, feature, layer, "auto").discover_many(paths))
        hits = [is_hit(one.xyxy, truth) for one, truth in zip(expected, truths, strict=True)]
        for outcome, entry, one, hit in zip(found, entries, expected, hits, strict=True):
            assert len(outcome[place].boxes) == len(BIASES) + 1
            np.testing.assert_array_equal(outcome[place].boxes[-1], one.xyxy[0])
            assert entry["auto"]["hit"] is hit
            assert entry["auto"]["box"] == one.xyxy[0].tolist()
            assert entry["auto"]["score"] == pytest.approx(float(one.scores[0]), abs=0.00051)  # three decimals
            assert entry["auto"]["bias"] == pytest.approx(one.bias, abs=1e-6)
            assert entry["auto"]["connected"] is True
        assert row.auto == Corloc(sum(hits), COUNT)
        assert row.auto_biases == tuple(entry["auto"]["bias"] for entry in entries)
        assert row.unconnected == 0


@pytest.mark.parametrize(("method", "learns"), [("parts", False), ("parts", True), ("tokencut", False)])
def test_another_method_runs_beside_lost_on_each_feature(
    benchmark: Benchmark, backbone: Backbone, finished: Path, tmp_path: Path, method: str, learns: bool
) -> None:
    options: dict[str, Any] = {"device": "cpu", "batch_size": BATCH, "exif": False, "method": method}
    if learns:
        paths = [example.path for example in benchmark.examples]
        options["objectness"] = learn(paths, Discoverer(backbone, device="cpu", exif=False))
    rows = sweep(benchmark, Discoverer(backbone, **options), PAIRS, BIASES, tmp_path / "both")
    lost = json.loads((finished / RESULTS_FILE).read_text())["rows"]
    found = json.loads((tmp_path / "both" / RESULTS_FILE).read_text())["rows"]
    hits = []
    for number, (feature, layer) in enumerate(PAIRS):
        one = Discoverer(backbone, **options, feature=feature, layer=layer)
        expected = evaluate(benchmark, one, tmp_path / f"{feature}{layer}").score
        assert rows[number].other == expected
        hits.append(found[number].pop("other_hits"))
        assert found[number].pop("other_corloc") == pytest.approx(expected.percent, abs=1e-4)
    assert found == lost
    assert len(set(hits)) > 1, "nothing to tell apart"
    again = sweep(benchmark, Discoverer(backbone, **options), PAIRS, BIASES, tmp_path / "both")
    assert again == rows
    with pytest.raises(PredictionsError, match='method was "lost" and is now'):
        sweep(benchmark, Discoverer(backbone, **options), PAIRS, BIASES, finished)


def test_the_cells_are_worth_comparing(finished: Path) -> None:
    """Else the test above would prove little."""
    table = np.array([row["corloc"] for row in results(finished)["rows"]])
    assert len(np.unique(table)) > 4
    assert 0 < table[:, 2].min() < 100
    assert len({row["auto_hits"] for row in results(finished)["rows"]}) > 1
    assert any(row["auto_score_auc"] is not None for row in results(finished)["rows"])
    biases = [line["features"]["k 1"]["auto"]["bias"] for line in lines(finished)]
    assert len(set(biases)) == COUNT


def test_auto_is_scored_as_eval_scores_it(
    benchmark: Benchmark, discoverer: Discoverer, backbone: Backbone, tmp_path: Path
) -> None:
    rows = sweep(benchmark, discoverer, PAIRS, BIASES, tmp_path / "sweep")
    aucs = []
    for row in rows:
        evaluation = evaluate(
            benchmark, alone(backbone, row.feature, row.layer, "auto"), tmp_path / row.feature / str(row.layer)
        )
        assert row.auto == evaluation.score
        assert row.auc == (None if evaluation.auc is None else pytest.approx(evaluation.auc))
        aucs.append(row.auc)
    assert len({auc for auc in aucs if auc is not None}) > 1


def test_all_cells_come_from_one_forward_an_image(
    benchmark: Benchmark, discoverer: Discoverer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packs: list[int] = []
    blocks: list[object] = []
    forward, run_block = FeaturesJob.forward, BlockRunner.__call__

    def count(job: FeaturesJob, patches: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        packs.append(len(patches))
        return forward(job, patches, sizes)

    def count_blocks(runner: BlockRunner, block: Any, *arguments: Any, **options: Any) -> Any:
        blocks.append(block)
        return run_block(runner, block, *arguments, **options)

    monkeypatch.setattr(FeaturesJob, "forward", count)
    monkeypatch.setattr(BlockRunner, "__call__", count_blocks)
    sweep(benchmark, discoverer, PAIRS, BIASES, tmp_path / "out")
    assert packs == [BATCH] * (COUNT // BATCH) + [COUNT % BATCH]
    assert len(blocks) == len(packs) * discoverer.backbone.depth


def test_the_discoverers_own_feature_layer_and_bias_play_no_part(
    benchmark: Benchmark, backbone: Backbone, finished: Path, tmp_path: Path
) -> None:
    other = Discoverer(
        backbone, device="cpu", batch_size=BATCH, exif=False, feature="v", layer=0, bias=-0.3, normalize=False
    )
    sweep(benchmark, other, PAIRS, BIASES, tmp_path / "out")
    assert (tmp_path / "out" / LINES_FILE).read_bytes() == (finished / LINES_FILE).read_bytes()
    assert sweep(benchmark, other, PAIRS, BIASES, finished)  # the same run, gone on with
    k_patches = Discoverer(backbone, device="cpu", batch_size=BATCH, exif=False, k_patches=3)
    sweep(benchmark, k_patches, PAIRS, BIASES, tmp_path / "three")
    assert (tmp_path / "three" / LINES_FILE).read_bytes() != (finished / LINES_FILE).read_bytes()


def test_layers_count_from_either_end_and_are_swept_once(
    benchmark: Benchmark, discoverer: Discoverer, finished: Path, tmp_path: Path
) -> None:
    wanted = [("v", -1), ("k", 0), ("k", -2), ("v", 1), ("k", -1), ("v", -1)]
    rows = sweep(benchmark, discoverer, wanted, (*BIASES, BIASES[0], -0.4), tmp_path / "out")
    assert [(row.feature, row.layer) for row in rows] == [("v", 1), ("k", 0), ("k", 1)]
    assert {row.biases for row in rows} == {BIASES}
    whole = {(row["feature"], row["layer"]): row for row in results(finished)["rows"]}
    for row in results(tmp_path / "out")["rows"]:
        assert row == whole[row["feature"], row["layer"]]


def test_one_bias_of_one_feature_is_a_sweep_too(benchmark: Benchmark, discoverer: Discoverer, tmp_path: Path) -> None:
    (row,) = sweep(benchmark, discoverer, [("k", -1)], [-0.4], tmp_path)
    assert len(row.fixed) == 1
    assert row.best == 0
    assert row.difference == row.auto.percent - row.fixed[0].percent


@pytest.mark.parametrize("batch_size", [1, 4, 8])
def test_the_batch_size_does_not_change_the_table(
    benchmark: Benchmark, backbone: Backbone, finished: Path, tmp_path: Path, batch_size: int
) -> None:
    other = Discoverer(backbone, device="cpu", batch_size=batch_size, exif=False)
    sweep(benchmark, other, PAIRS, BIASES, tmp_path / "out")
    for row, expected in zip(results(tmp_path / "out")["rows"], results(finished)["rows"], strict=True):
        assert row == expected


def test_a_sweep_cut_at_any_byte_ends_with_the_same_bytes(
    benchmark: Benchmark, discoverer: Discoverer, finished: Path
) -> None:
    path = finished / LINES_FILE
    content, table = path.read_bytes(), results(finished)
    ends = [index + 1 for index, byte in enumerate(content) if byte == ord("\n")]
    for cut in sorted({0, 1, len(content) - 1, *ends[::2], *(end + 300 for end in ends[1::3])}):
        path.write_bytes(content[:cut])
        told: list[int] = []

        def note(progress: Progress, told: list[int] = told, known: int = content[:cut].count(b"\n")) -> None:
            assert (progress.total, progress.known) == (COUNT, known)
            told.append(progress.done)

        rows = sweep(benchmark, discoverer, PAIRS, BIASES, finished, on_progress=note)
        assert path.read_bytes() == content
        assert results(finished) == table
        whole = content[:cut].count(b"\n")
        assert told == list(range(whole + 1, COUNT + 1))
        assert [row.auto.hits for row in rows] == [row["auto_hits"] for row in table["rows"]]


@pytest.mark.parametrize("after", [1, 4, 8])
def test_an_interrupted_sweep_keeps_its_lines_and_goes_on(
    benchmark: Benchmark, discoverer: Discoverer, finished: Path, tmp_path: Path, after: int
) -> None:
    out = tmp_path / "out"

    def interrupt(progress: Progress) -> None:
        assert len(lines(out)) == progress.done  # a kill, which closes no file, finds it there
        if progress.done == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(benchmark, discoverer, PAIRS, BIASES, out, on_progress=interrupt)
    assert len(lines(out)) == after
    assert results(out)["complete"] is False
    assert "rows" not in results(out)
    sweep(benchmark, discoverer, PAIRS, BIASES, out)
    assert (out / LINES_FILE).read_bytes() == (finished / LINES_FILE).read_bytes()
    assert results(out) == results(finished)


def test_a_finished_sweep_computes_nothing(
    benchmark: Benchmark, discoverer: Discoverer, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("an image was computed again")

    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    monkeypatch.setattr(ImageStream, "_start", never)
    monkeypatch.setattr("lostreg.inference.stream.read_image", never)
    rows = sweep(benchmark, discoverer, PAIRS, BIASES, finished)
    assert [row.auto.hits for row in rows] == [row["auto_hits"] for row in results(finished)["rows"]]
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


def test_a_finished_sweep_keeps_the_versions_that_it_was_computed_with(
    benchmark: Benchmark, discoverer: Discoverer, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = results(finished)
    monkeypatch.setattr("lostreg.runs.results.package_versions", lambda: {"lostreg": "of another day"})
    sweep(benchmark, discoverer, PAIRS, BIASES, finished)
    assert results(finished) == before


def test_a_sweep_killed_before_its_results_were_written_gets_them(
    benchmark: Benchmark, discoverer: Discoverer, finished: Path
) -> None:
    whole = results(finished)
    settings = {key: whole[key] for key in ("benchmark", "options")}
    (finished / RESULTS_FILE).write_text(json.dumps({"complete": False, **settings}))
    sweep(benchmark, discoverer, PAIRS, BIASES, finished)
    assert results(finished) == whole


def test_results_are_plain_json_with_every_option(
    benchmark: Benchmark, discoverer: Discoverer, finished: Path, tmp_path: Path
) -> None:
    rows = sweep(benchmark, discoverer, PAIRS, BIASES, tmp_path / "out", extra={"limit": 7, "no_hard": True})
    found = results(tmp_path / "out")
    assert found["complete"] is True
    assert (found["images"], found["unreadable"]) == (COUNT, 0)
    assert found["benchmark"] == {
        "name": "voc",
        "split": "trainval",
        "images": COUNT,
        "fingerprint": benchmark.fingerprint(),
        "limit": 7,
        "no_hard": True,
    }
    chosen = {"feature", "layer", "bias", "normalize", "auto_trials"}
    assert found["options"] == {
        **{name: value for name, value in discoverer.options.record().items() if name not in chosen},
        "features": [f"{feature} {layer}" for feature, layer in PAIRS],
        "biases": list(BIASES),
        "auto_trials": list(TRIALS),
        "normalize": True,
    }
    assert {"lostreg", "torch", "timm", "numpy"} <= found["versions"].keys()
    assert found["device"].startswith("cpu: ")
    assert found["auto_minus_best_fixed"] == {
        name: pytest.approx(value, abs=1e-4) for name, value in summary(rows).items()
    }
    for row, entry in zip(rows, found["rows"], strict=True):
        assert (entry["feature"], entry["layer"]) == (row.feature, row.layer)
        assert entry["corloc"] == [pytest.approx(score.percent, abs=1e-4) for score in row.fixed]
        assert entry["best_bias"] == BIASES[row.best]
        assert entry["best_corloc"] == max(entry["corloc"])
        assert entry["auto_hits"] == row.auto.hits
        assert entry["auto_corloc"] == pytest.approx(row.auto.percent, abs=1e-4)
        assert entry["auto_wilson_95"] == [pytest.approx(bound, abs=1e-4) for bound in row.auto.wilson_interval()]
        assert entry["auto_median_bias"] == pytest.approx(statistics.median(row.auto_biases), abs=1e-4)
        assert entry["auto_score_auc"] == (None if row.auc is None else pytest.approx(row.auc, abs=1e-4))
        assert entry["auto_unconnected"] == 0


def test_an_unreadable_image_is_a_miss_everywhere(
    root: Path, benchmark: Benchmark, discoverer: Discoverer, finished: Path, tmp_path: Path
) -> None:
    unreadable(root, "im02")
    unreadable(root, "im05")
    out = tmp_path / "out"
    rows = sweep(benchmark, discoverer, PAIRS, BIASES, out)
    written, whole = lines(out), lines(finished)
    for number in (2, 5):
        assert written[number].keys() == {"image_id", "error"}
        assert written[number]["error"].startswith(f"im0{number}.jpg: not a readable image")  # and no folder
    readable = [number for number in range(COUNT) if number not in (2, 5)]
    assert [written[number]["image_id"] for number in readable] == [whole[number]["image_id"] for number in readable]
    for row in rows:
        name = f"{row.feature} {row.layer}"
        entries = [whole[number]["features"][name] for number in readable]
        for column, score in enumerate(row.fixed):
            assert score == Corloc(sum(entry["hits"][column] == "1" for entry in entries), COUNT)
        assert row.auto == Corloc(sum(entry["auto"]["hit"] for entry in entries), COUNT)
        assert len(row.auto_biases) == COUNT - 2
    assert (results(out)["images"], results(out)["unreadable"]) == (COUNT, 2)
    assert sweep(benchmark, discoverer, PAIRS, BIASES, out) == rows  # also when it is only read back


def test_images_that_could_not_be_had_are_tried_again_by_the_next_sweep(
    root: Path, benchmark: Benchmark, discoverer: Discoverer, finished: Path, tmp_path: Path, away: set[str]
) -> None:
    out = tmp_path / "out"
    unreadable(root, "im05")
    away.add("im02.jpg")
    sweep(benchmark, discoverer, PAIRS, BIASES, out)
    assert (results(out)["unreadable"], results(out)["unavailable"]) == (2, 1)
    assert lines(out)[2] == {"image_id": "im02", "error": "im02.jpg: Stale file handle", "unavailable": True}
    away.clear()
    computed: list[Progress] = []
    sweep(benchmark, discoverer, PAIRS, BIASES, out, on_progress=computed.append)
    assert [(now.done, now.known) for now in computed] == [(COUNT, COUNT - 1)]
    assert [line["image_id"] for line in lines(out)] == [line["image_id"] for line in lines(finished)]
    assert lines(out)[2] == lines(finished)[2]
    assert (results(out)["unreadable"], results(out)["unavailable"]) == (1, 0)


def test_images_of_which_none_can_be_read_are_misses(
    root: Path, benchmark: Benchmark, discoverer: Discoverer, tmp_path: Path
) -> None:
    for example in benchmark.examples:
        unreadable(root, str(example.image_id))
    rows = sweep(benchmark, discoverer, PAIRS[:2], BIASES, tmp_path / "out")
    for row in rows:
        assert {*row.fixed, row.auto} == {Corloc(0, COUNT)}
        assert (row.auto_biases, row.auc, row.unconnected, row.difference) == ((), None, 0, 0.0)
        assert row.biases[row.best] == 2.0
    found = results(tmp_path / "out")
    assert found["unreadable"] == COUNT
    assert [(row["auto_median_bias"], row["auto_score_auc"]) for row in found["rows"]] == [(None, None)] * 2


def test_a_file_name_that_is_no_utf8_is_written(tmp_path: Path, discoverer: Discoverer) -> None:
    """JSON may hold such a name, and an image of it that cannot be read is told by name."""
    image = {"id": 7, "file_name": "caf\udce9.jpg"}
    box = {"id": 1, "image_id": 7, "category_id": 1, "bbox": [0, 0, 10, 10]}
    (tmp_path / "coco.json").write_text(json.dumps({"images": [image], "annotations": [box]}))
    coco = load_benchmark("coco", images=tmp_path, annotations=tmp_path / "coco.json")
    (row,) = sweep(coco, discoverer, [("k", -1)], [-0.4], tmp_path / "out")
    assert row.auto == Corloc(0, 1)
    assert "caf\udce9.jpg: no such file" in lines(tmp_path / "out")[0]["error"]


def test_other_settings_are_refused_and_named(
    root: Path, benchmark: Benchmark, discoverer: Discoverer, backbone: Backbone, finished: Path
) -> None:
    before = {path.name: path.read_bytes() for path in finished.iterdir()}

    def refused(
        message: str,
        *,
        data: Benchmark = benchmark,
        using: Discoverer = discoverer,
        wanted: Any = PAIRS,
        biases: Any = BIASES,
        extra: Any = None,
    ) -> str:
        with pytest.raises(PredictionsError, match=message) as caught:
            sweep(data, using, wanted, biases, finished, extra=extra)
        assert "use --overwrite or another --out" in str(caught.value)
        assert {path.name: path.read_bytes() for path in finished.iterdir()} == before
        return str(caught.value)

    other = Discoverer(backbone, device="cpu", batch_size=BATCH, exif=False, k_patches=7, max_side=90)
    told = refused("k_patches was 100 and is now 7; max_side was 1024 and is now 90", using=other)
    assert "backbone was" not in told
    assert "features was" not in told
    refused(r"biases was \[-0\.75, .* and is now \[-0\.75\]", biases=[-0.75])
    refused("biases was", biases=BIASES[::-1])
    refused(r'features was \["q 0".* and is now \["k 1"\]', wanted=[("k", 1)])
    refused("images was 9 and is now 4; fingerprint was", data=benchmark.limited(4))
    refused("limit was null and is now 4", extra={"limit": 4})
    set_box(root, "im04", (1, 1, 2, 2))
    refused("fingerprint was .* and is now", data=load_benchmark("voc", root=root))


def test_trials_of_another_day_are_a_difference(
    benchmark: Benchmark, discoverer: Discoverer, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lostreg.runs.sweep.TRIALS", (0.0, -1.0))
    with pytest.raises(PredictionsError, match=r"auto_trials was \[0\.0, -0\.25, .* and is now \[0\.0, -1\.0\]"):
        sweep(benchmark, discoverer, PAIRS, BIASES, finished)


def test_overwriting_starts_anew(benchmark: Benchmark, discoverer: Discoverer, finished: Path) -> None:
    sweep(benchmark, discoverer, [("k", 1)], [-0.4], finished, overwrite=True)
    assert len(lines(finished)) == COUNT
    assert {tuple(line["features"]) for line in lines(finished)} == {("k 1",)}
    assert results(finished)["options"]["biases"] == [-0.4]


@pytest.mark.parametrize("content", ["nonsense\n", "[]\n", "7\n", "null\n", "{}\n", '{"image_id": "im00"}\n'])
def test_lines_that_no_sweep_wrote_are_refused_until_overwritten(
    benchmark: Benchmark, discoverer: Discoverer, finished: Path, content: str
) -> None:
    path = finished / LINES_FILE
    path.write_text(content)
    with pytest.raises(PredictionsError, match=r"sweep\.jsonl is not of this run \(.*: use --overwrite or another"):
        sweep(benchmark, discoverer, PAIRS, BIASES, finished)
    assert path.read_text() == content
    sweep(benchmark, discoverer, PAIRS[:1], BIASES, finished, overwrite=True)
    assert len(lines(finished)) == COUNT


def test_lines_of_other_features_are_not_gone_on_with_and_those_in_another_order_are(
    benchmark: Benchmark, discoverer: Discoverer, finished: Path
) -> None:
    path = finished / LINES_FILE
    first, second, *rest = path.read_text().splitlines(keepends=True)
    renamed = first.replace('"k 1"', '"k 7"')
    path.write_text("".join([renamed, second]))
    with pytest.raises(PredictionsError, match=r"is not of this run \(line 1: the features are others"):
        sweep(benchmark, discoverer, PAIRS, BIASES, finished)
    assert path.read_text() == "".join([renamed, second])
    for content in ([second, first, *rest], [first, *rest]):  # what is missing is computed, and put in its place
        path.write_text("".join(content))
        sweep(benchmark, discoverer, PAIRS, BIASES, finished)
        assert path.read_text() == "".join([first, second, *rest])


@pytest.mark.parametrize("content", [None, "", "{", "[]"])
def test_lines_without_their_settings_are_not_gone_on_with(
    benchmark: Benchmark, discoverer: Discoverer, finished: Path, content: str | None
) -> None:
    (finished / RESULTS_FILE).unlink()
    if content is not None:
        (finished / RESULTS_FILE).write_text(content)
    with pytest.raises(PredictionsError, match=r"no readable sweep\.json: not a run to go on with; use --overwrite"):
        sweep(benchmark, discoverer, PAIRS, BIASES, finished)


def test_a_second_sweep_into_a_folder_in_use_is_refused(
    benchmark: Benchmark, discoverer: Discoverer, finished: Path, tmp_path: Path
) -> None:
    refused: list[int] = []

    def intrude(progress: Progress) -> None:
        for overwrite in (False, True):
            with pytest.raises(PredictionsError, match="is in use: another run is writing there"):
                sweep(benchmark, discoverer, PAIRS, BIASES, tmp_path / "out", overwrite=overwrite)
            refused.append(progress.done)

    sweep(benchmark, discoverer, PAIRS, BIASES, tmp_path / "out", on_progress=intrude)
    assert len(refused) == 2 * COUNT
    assert (tmp_path / "out" / LINES_FILE).read_bytes() == (finished / LINES_FILE).read_bytes()


@pytest.mark.parametrize(
    ("wanted", "biases", "message"),
    [
        ([], [0.0], "expected at least one feature and one finite bias"),
        ([("k", -1)], [], "expected at least one feature and one finite bias"),
        ([("k", -1)], [0.0, float("nan")], "bias must be a finite number, not nan"),
        ([("k", -1)], [1e39], r"bias must be within .*, what float32 holds, not 1e\+39"),
        ([("k", 0), ("k", 2)], [0.0], r"layer must be in \[-2, 1\] for dinov2_vits14_reg, not 2"),
        ([("k", -3)], [0.0], r"layer must be in \[-2, 1\] for dinov2_vits14_reg, not -3"),
        ([("z", -1)], [0.0], "feature must be one of q, k, v, out, not 'z'"),
    ],
)
def test_what_cannot_be_swept_is_said_before_anything_is_written(
    benchmark: Benchmark, discoverer: Discoverer, tmp_path: Path, wanted: Any, biases: Any, message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        sweep(benchmark, discoverer, wanted, biases, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_place_of_the_folder(benchmark: Benchmark, discoverer: Discoverer, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(PredictionsError, match=r"cannot write to .*file, expected a folder: it is a file"):
        sweep(benchmark, discoverer, PAIRS, BIASES, file)
    assert file.read_text() == "mine"


def row(*hits: int, auto: int = 0, biases: tuple[float, ...] = (), images: int = 10) -> SweepRow:
    return SweepRow(
        "k",
        1,
        biases=biases or tuple(-0.1 * index for index in range(len(hits))),
        fixed=tuple(Corloc(count, images) for count in hits),
        auto=Corloc(auto, images),
        auto_biases=(),
        auc=None,
        unconnected=0,
    )


def test_the_best_bias_is_the_one_with_the_most_hits() -> None:
    assert row(1, 7, 3).best == 1
    assert row(9, 7, 3).best == 0


@pytest.mark.parametrize("biases", list(itertools.permutations((-0.8, -0.2, 0.1))))
def test_of_equal_biases_the_laxest_is_the_best_wherever_it_stands(biases: tuple[float, ...]) -> None:
    """The laxest connects the most: it is the highest number."""
    assert biases[row(4, 4, 4, biases=biases).best] == 0.1
    hits = tuple(4 if bias < 0 else 3 for bias in biases)
    assert biases[row(*hits, biases=biases).best] == -0.2


def test_the_difference_is_in_points_and_below_zero_where_labels_choose_better() -> None:
    assert row(2, 5, auto=4).difference == pytest.approx(-10)
    assert row(2, 5, auto=8).difference == pytest.approx(30)
    assert summary([row(2, 5, auto=4), row(2, 5, auto=8), row(5, auto=5)]) == {
        "mean": pytest.approx(20 / 3),
        "worst": pytest.approx(-10),
    }


def test_hits_or_misses_alone_have_no_auc(
    root: Path, backbone: Backbone, discoverer: Discoverer, tmp_path: Path
) -> None:
    for place, hit in (("hits", True), ("misses", False)):
        for example in load_benchmark("voc", root=root).examples:
            x1, y1, x2, y2 = alone(backbone, "k", -1, "auto").discover(example.path).xyxy[0].tolist()
            set_box(root, str(example.image_id), (x1 + 1, y1 + 1, x2, y2) if hit else (200, 200, 210, 210))
        (found,) = sweep(load_benchmark("voc", root=root), discoverer, [("k", -1)], [-0.4], tmp_path / place)
        assert found.auto == Corloc(COUNT if hit else 0, COUNT)
        assert found.auc is None
        assert results(tmp_path / place)["rows"][0]["auto_score_auc"] is None


def test_a_side_limit_maps_boxes_back_to_the_original(
    root: Path, backbone: Backbone, tmp_path: Path, seen: list[Any]
) -> None:
    limited = Discoverer(backbone, device="cpu", exif=False, max_side=60)
    benchmark = load_benchmark("voc", root=root)
    sweep(benchmark, limited, [("k", -1)], [-0.4], tmp_path / "out")
    found, fixed = list(seen), Discoverer(backbone, device="cpu", exif=False, max_side=60, bias=-0.4)
    for (one,), expected in zip(
        found, fixed.discover_many([example.path for example in benchmark.examples]), strict=True
    ):
        np.testing.assert_allclose(one.boxes[0], expected.xyxy[0], rtol=1e-6)


def test_memory_that_does_not_hold_an_image_makes_it_a_miss(
    benchmark: Benchmark, discoverer: Discoverer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = FeaturesJob.forward

    def crowded(job: FeaturesJob, patches: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        if any(width > 90 for _, width in sizes):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(job, patches, sizes)

    monkeypatch.setattr(FeaturesJob, "forward", crowded)
    with pytest.warns(UserWarning, match="out of memory on cpu with 2 images together"):
        (found,) = sweep(benchmark, discoverer, [("k", -1)], [-0.4], tmp_path / "out")
    errors = [line.get("error", "") for line in lines(tmp_path / "out")]
    assert ["out of memory on one image" in error for error in errors] == [number % 2 == 0 for number in range(COUNT)]
    assert found.auto.images == COUNT
    assert len(found.auto_biases) == COUNT // 2


def test_an_image_error_is_the_streams_own(seen: list[Any], discoverer: Discoverer, tmp_path: Path, root: Path) -> None:
    unreadable(root, "im00")
    sweep(load_benchmark("voc", root=root).limited(1), discoverer, [("k", -1)], [-0.4], tmp_path / "out")
    assert [type(outcome) for outcome in seen] == [ImageError]


@pytest.mark.parametrize("image_id", [0, 7, "im00", ""])
def test_a_line_is_read_back_whatever_its_image_is_called(image_id: str | int) -> None:
    for line in (sweep_run._Line(image_id, {"k 1": ENTRY}), sweep_run._Line(image_id, error="cut")):
        assert sweep_run._parse(line.to_line().encode(), {"k 1"}, 2) == line


@pytest.mark.parametrize(
    "entry",
    [
        {"hits": "0"},
        {"hits": "0x"},
        {"hits": 5},
        {"hits": [True, False]},
        {"auto": None},
        {"auto": {**ENTRY["auto"], "score": "0.5"}},
        {"auto": {**ENTRY["auto"], "score": 1e999}},
        {"auto": {**ENTRY["auto"], "bias": True}},
        {"auto": {**ENTRY["auto"], "bias": 10**400}},
        {"auto": {**ENTRY["auto"], "hit": 1}},
        {"auto": {"hit": True}},
    ],
    ids=str,
)
def test_a_line_of_a_sweep_holds_what_its_figures_are_made_of(entry: dict[str, Any]) -> None:
    raw = json.dumps({"image_id": "a", "features": {"k 1": {**ENTRY, **entry}}}).encode()
    with pytest.raises((ValueError, TypeError, KeyError)):
        sweep_run._parse(raw, {"k 1"}, 2)
