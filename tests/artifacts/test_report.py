"""The report: one page that needs nothing beside it, every picture as a file, every number as JSON."""

import base64
import dataclasses
import html
import io
import itertools
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from planted import noise
from small_vit import LAYER, PATCHES, discoverer, pictures, small, strict_json, world

from lostreg.artifacts import as_numbers, figures, report, write_report
from lostreg.artifacts.measurement import CELLS, COSINE_BINS, Measurement, measure
from lostreg.artifacts.outliers import parse_rule
from lostreg.artifacts.probes import Skipped
from lostreg.artifacts.report import FORMAT
from lostreg.errors import LostregError
from lostreg.models.registers import RegisterNeurons

pytestmark = pytest.mark.usefixtures("one_thread")

PICTURES = {"norms", "layers", "places", "neighbours", "probes", "gram"}


@pytest.fixture(autouse=True)
def _coarse_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lostreg.artifacts.report._DPI", 20)


@pytest.fixture
def _two_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take most of the time of a report."""
    for name in PICTURES - {"norms", "probes"}:
        monkeypatch.setitem(report._FIGURES, name, lambda _: Figure((1, 1)))
    monkeypatch.setattr(figures, "example_maps", lambda _: Figure((1, 1)))


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture(scope="module")
def found() -> Measurement:
    return measure(pictures(), discoverer(world().backbone))


@pytest.fixture(scope="module")
def plain() -> Measurement:
    return measure(pictures(), discoverer(small()))


@pytest.fixture(scope="module")
def both(found: Measurement, plain: Measurement, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reports") / "new" / "report"
    write_report(out, [found, plain], {"seed": 7, "a <b> & c": "<script>alert(1)</script>"})
    return out


def page(out: Path) -> str:
    return (out / "artifacts.html").read_text(encoding="utf-8")


def numbers(out: Path) -> Any:
    return strict_json((out / "artifacts.json").read_text(encoding="utf-8"))


def test_the_page_needs_nothing_beside_it(both: Path) -> None:
    text = page(both)
    sources = re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', text)
    assert len(sources) == 8
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://|@import|url\(|<link|<script|<iframe", re.sub('data:[^"]*', "", text))
    for source in sources:
        picture = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2], validate=True)))
        picture.load()
        assert picture.format == "PNG"
        assert min(picture.size) > 200


def test_the_page_shows_every_picture_that_is_on_disk(both: Path, found: Measurement, plain: Measurement) -> None:
    text = page(both)
    files = {path.name for path in both.iterdir()}
    names = {*PICTURES, "examples-1", "examples-2"}
    pictures = {f"{name}.{kind}" for name in names for kind in ("png", "svg", "pdf")}
    assert files == {"artifacts.html", "artifacts.json", *pictures}
    shown = dict(re.findall(r'<figure id="([^"]*)">.*?src="data:image/png;base64,([^"]*)"', text))
    assert set(shown) == names
    alts = re.findall(r'<img alt="([^"]*)"', text)
    assert len(alts) == len(names) == len(set(alts)) + 1  # one backbone twice
    assert sum("12.50 % of the patches" in alt for alt in alts) == 3
    for name in names:
        assert (both / f"{name}.svg").read_bytes().startswith(b"<?xml")
        assert (both / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    for name, data in shown.items():
        assert base64.b64decode(data) == (both / f"{name}.png").read_bytes()


def test_the_written_files_are_returned(tmp_path: Path, found: Measurement) -> None:
    written = write_report(tmp_path, [found], {})
    assert written[0] == tmp_path / "artifacts.html"
    assert set(written) == set(tmp_path.iterdir())
    assert len(written) == 2 + 3 * 7


def cells(text: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", text)
    return [
        [html.unescape(cell) for cell in re.findall(r"<t[dh](?: scope=\"col\")?>(.*?)</t[dh]>", row)] for row in rows
    ]


def test_the_page_says_what_was_found_and_what_was_not(both: Path, found: Measurement, plain: Measurement) -> None:
    rows = cells(page(both))
    heading, first, second = rows[:3]
    assert heading[:4] == ["backbone", "images", "patches", "outliers"]
    assert first[:4] == ["timm:test_vit", "6", "40", "5 (12.50 %)"]
    assert first[4] == f"{found.cutoff.value:.4g}"
    assert first[5] == str(LAYER)
    assert second[:6] == ["timm:test_vit", "6", "40", "none found", "-", "-"]
    assert second[6].startswith("auto: not bimodal")
    reasons = [row[2] for row in rows if len(row) == 5 and row[1].startswith(("position", "pixels", "class"))]
    assert len(reasons) == 12  # 3 kinds of tokens with outliers and 2 without, twice, and the classes
    assert all(reason.startswith("not measured: ") for reason in reasons)
    assert "NaN" not in re.sub('data:[^"]*', "", page(both))
    assert not re.search(r"\bnan\b|\binf\b", re.sub('data:[^"]*', "", page(both)))


def test_names_and_settings_are_escaped(both: Path, tmp_path: Path, found: Measurement) -> None:
    assert "<script>" not in page(both)
    assert ["a <b> & c", "<script>alert(1)</script>"] in cells(page(both))
    sample = dataclasses.replace(found.sample, classes=Skipped("<i>why</i> {{ cells }}"))
    odd = dataclasses.replace(found, title="<i>odd</i> & x", backbone='"a" & <b>', sample=sample)
    write_report(tmp_path, [odd], {"root": "caf\udce9 {% raw %}"})
    text = page(tmp_path)
    assert ["root", "caf\\udce9 {% raw %}"] in cells(text)
    assert ["<i>odd</i> & x", "class", "not measured: <i>why</i> {{ cells }}", "", ""] in cells(text)
    assert "<i>" not in text
    assert "&lt;i&gt;odd&lt;/i&gt; &amp; x" in text
    assert numbers(tmp_path)["backbones"][0]["backbone"] == '"a" & <b>'


def test_the_numbers_are_those_of_the_measurement(both: Path, found: Measurement, plain: Measurement) -> None:
    content = numbers(both)
    assert (content["format"], content["seed"]) == (FORMAT, 7)
    assert content["backbones"] == [json.loads(json.dumps(as_numbers(one))) for one in (found, plain)]
    first, second = content["backbones"]
    assert (first["images"], first["unreadable"], first["patches"]) == (6, 0, 40)
    assert (first["outliers"], first["outlier_share"]) == (5, 0.125)
    assert first["outliers_emerge_in_layer"] == LAYER
    assert first["cutoff"] == {"rule": "auto", "norm": found.cutoff.value, "reason": found.cutoff.reason}
    layers = first["norms"]["by_layer_before_final_norm"]
    for tally, written in zip([*found.seen.layers, found.seen.final], [*layers, final(first)], strict=True):
        assert (written["mean"], written["largest"]) == (tally.mean, tally.largest)
        assert (written["deviation"], written["smallest"]) == (tally.deviation, tally.smallest)
        assert sum(written["histogram"]["counts"]) == tally.count == 40
        assert written["quantiles"]["0.5"] == tally.quantile(0.5)
        starts = np.array(written["histogram"]["from"])
        assert (np.diff(starts) > 0).all()
    shares = [layer["share_above_cutoff"] for layer in layers]
    assert shares[LAYER:] == [0.125] * len(shares[LAYER:])
    assert max(shares[:LAYER]) == 0
    assert first["norms"]["prefix_tokens_by_layer"] == {"CLS": found.seen.prefix[:, 0].tolist()}
    places = first["places"]
    outlier, normal = np.array(places["outliers"]), np.array(places["normal"])
    assert outlier.shape == normal.shape == (CELLS, CELLS) == (places["cells"],) * 2
    assert (outlier.sum(), normal.sum()) == (pytest.approx(5, abs=1e-3), pytest.approx(35, abs=1e-3))
    cosine = first["neighbour_cosine"]
    assert (cosine["mean_of_outliers"], cosine["mean_of_normal"]) == found.cosine_means()
    assert len(cosine["outliers"]) == COSINE_BINS
    assert (sum(cosine["outliers"]), sum(cosine["normal"])) == (5, 35)
    sample = first["sample"]
    assert (sample["images"], sample["images_with_outliers"], sample["outliers"]) == (6, 4, 5)
    assert sample["gram"]["all_patches"]["effective_rank"] == found.sample.gram.effective_rank
    assert sample["gram"]["without_outliers"]["positive"] == found.sample.gram_normal.positive  # type: ignore[union-attr]
    assert (second["outliers"], second["outlier_share"], second["outliers_emerge_in_layer"]) == (0, 0, None)
    assert second["cutoff"]["norm"] is None
    assert second["neighbour_cosine"]["mean_of_outliers"] is None
    assert second["sample"]["gram"]["without_outliers"] is None
    assert second["sample"]["position"]["outlier"] == {"reason": "there are no such tokens"}


def final(backbone: dict[str, Any]) -> dict[str, Any]:
    written: dict[str, Any] = backbone["norms"]["output_after_final_norm"]
    return written


@pytest.mark.usefixtures("_two_pictures")
def test_probes_that_ran_are_in_table_and_numbers(tmp_path: Path) -> None:
    images, labels = noise([(64, 64)] * 14), ["a", "b"] * 7
    one = measure(images, discoverer(small()), rule=parse_rule("50%"), labels=labels)
    write_report(str(tmp_path), [one], {})
    rows = {row[1]: row for row in cells(page(tmp_path)) if len(row) == 5}
    sample = numbers(tmp_path)["backbones"][0]["sample"]
    assert rows["position: outlier"][2].startswith(f"top-1 {sample['position']['outlier']['accuracy']['mean']:.2f} ± ")
    assert rows["pixels: normal"][2].startswith(f"L2 error {sample['pixels']['normal']['error']['mean']:.2f} ± ")
    assert rows["class: CLS"][4] == "14 images of 2 classes"
    assert set(sample["classes"]) == {"CLS", "mean of patches", "one outlier token", "one normal token"}


@pytest.mark.usefixtures("_two_pictures")
def test_a_report_with_registers_records_them(tmp_path: Path, found: Measurement) -> None:
    registers = RegisterNeurons(world().neurons, count=2)
    cured = measure(pictures(), discoverer(world().backbone, registers=registers))
    write_report(tmp_path, [found, cured], {})
    first, second = numbers(tmp_path)["backbones"]
    assert first["test_time_registers"] is None
    assert second["test_time_registers"] == {"count": 2, "neurons": [list(pair) for pair in world().neurons]}
    assert list(second["norms"]["prefix_tokens_by_layer"]) == [
        "CLS",
        "test-time register 1",
        "test-time register 2",
    ]
    assert "timm:test_vit + 2 test-time registers" in page(tmp_path)


@pytest.mark.parametrize("count", [1, 3, 4, 7])
def test_any_number_of_backbones_stand_side_by_side(count: int, found: Measurement) -> None:
    many = [dataclasses.replace(found, title=f"model {number}") for number in range(count)]
    for draw in (figures.norm_histograms, figures.norms_by_layer, figures.outlier_places, figures.gram_spectra):
        drawn = draw(many)
        shown = [axes.get_title().split("\n")[0] for axes in drawn.axes if axes.get_visible() and axes.get_title()]
        assert shown == [f"model {number}" for number in range(count)]


def values(figure: Figure, panel: int = 0) -> Any:
    return figure.axes[panel].images[0].get_array()


def test_no_tick_or_legend_covers_another_thing(found: Measurement, plain: Measurement) -> None:
    norms, layers = figures.norm_histograms([found, plain]), figures.norms_by_layer([found, plain])
    for figure in (norms, layers):
        figure.draw_without_rendering()
    for panel in norms.axes:
        low, high = panel.get_xlim()
        labels = sorted(
            tick.label1.get_window_extent().intervalx.tolist()
            for tick in (*panel.xaxis.get_major_ticks(), *panel.xaxis.get_minor_ticks())
            if low <= tick.get_loc() <= high and tick.label1.get_text()
        )
        assert len(labels) > 1
        assert all(left[1] < right[0] for left, right in itertools.pairwise(labels))
    for panel in layers.axes:
        legend = panel.get_legend()
        assert legend is not None
        assert legend.get_window_extent().y1 < panel.xaxis.label.get_window_extent().y0


def test_a_cut_off_that_is_a_number_is_told_in_four_digits(tmp_path: Path) -> None:
    write_report(tmp_path, [measure(pictures(), discoverer(small()), rule=parse_rule("84.06272343186815"))], {})
    assert "84.06: no norm reaches 84.06" in page(tmp_path)


def test_the_map_of_places_shows_shares_of_outliers_or_norms(found: Measurement, plain: Measurement) -> None:
    shares = np.ma.masked_invalid(values(figures.outlier_places([found])))
    heat = found.seen.heat.sum(axis=0)
    assert (shares.mask == (heat == 0)).all()
    assert float((shares * heat).sum() / 100) == pytest.approx(sum(map(len, PATCHES)))
    norms = np.ma.masked_invalid(values(figures.outlier_places([plain])))
    tally = plain.seen.layers[-1]
    assert tally.smallest * 0.98 <= norms.min()
    assert norms.max() <= tally.largest * 1.02


def test_examples_show_outliers_and_degrees_without_them(found: Measurement, plain: Measurement) -> None:
    drawn = figures.example_maps(found)
    titles = [axes.get_title() for axes in drawn.axes if axes.get_title()]
    assert titles == ["image", "norm at the output", "degree", "outliers", "degree without outliers"]
    marked = [axes.images[0].get_array() for axes in drawn.axes if axes.images and axes.images[0].get_array().ndim == 3]
    reds = [int((np.asarray(picture) == (220, 50, 30)).all(axis=2).sum()) for picture in marked]
    assert sorted(count for count in reds if count) == [256, 256, 256, 512]
    without = [axes.get_title() for axes in figures.example_maps(plain).axes if axes.get_title()]
    assert without == ["image", "norm at the output", "degree"]


@pytest.mark.parametrize(
    ("images", "rule"),
    [
        (noise([(64, 64)]), "mean+3sigma"),
        (noise([(5, 9)]), "auto"),
        (noise([(5, 9)]), "1e-3"),
        ([np.zeros((48, 48, 3), np.uint8)], "auto"),
        (noise([(16, 160), (160, 16)]), "50%"),
    ],
    ids=["one", "one patch", "one patch, an outlier", "black", "thin"],
)
def test_little_to_show_is_no_failure(images: list[np.ndarray], rule: str, tmp_path: Path) -> None:
    one = measure(images, discoverer(small()), rule=parse_rule(rule))
    write_report(tmp_path, [one], {})
    (content,) = numbers(tmp_path)["backbones"]
    assert content["patches"] == one.patches
    assert ("none found" in page(tmp_path)) == (not one.cutoff.found)


@pytest.mark.usefixtures("_two_pictures")
def test_an_earlier_report_is_replaced(tmp_path: Path, found: Measurement, plain: Measurement) -> None:
    write_report(tmp_path, [found], {})
    before = (tmp_path / "norms.png").read_bytes()
    write_report(tmp_path, [plain], {})
    assert (tmp_path / "norms.png").read_bytes() != before
    assert numbers(tmp_path)["backbones"][0]["outliers"] == 0
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.usefixtures("_two_pictures")
def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, found: Measurement) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(LostregError, match=f"cannot write the report to {re.escape(str(out))}: "):
            write_report(out, [found], {})
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "taken" / "artifacts.json").mkdir(parents=True)
    with pytest.raises(LostregError, match="cannot write the report"):
        write_report(tmp_path / "taken", [found], {})
