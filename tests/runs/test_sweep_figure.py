"""Charts: that they are pictures of the format that was asked for, and what is drawn in them."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from lostreg.errors import LostregError
from lostreg.metrics import Corloc
from lostreg.models.table import FEATURES
from lostreg.runs.sweep import SweepRow
from lostreg.runs.sweep_figure import plot_sweep

BIASES = (0.0, -0.5, -0.25)


def sweep_row(feature: Any, layer: int, biases: tuple[float, ...] = BIASES, hits: int = 5, auto: int = 60) -> SweepRow:
    return SweepRow(
        feature,
        layer,
        biases=biases,
        fixed=tuple(Corloc(hits + 7 * index, 100) for index in range(len(biases))),
        auto=Corloc(auto, 100),
        auto_biases=(),
        auc=None,
        unconnected=0,
    )


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Each figure that is written, as it was when it was."""
    seen: list[Figure] = []
    save = Figure.savefig

    def record(figure: Figure, *arguments: Any, **options: Any) -> None:
        seen.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", record)
    return seen


def panels(figure: Figure) -> list[Axes]:
    return [panel for panel in figure.axes if panel.get_visible()]


def colours(path: Path) -> int:
    with Image.open(path) as picture:
        return len(picture.convert("RGB").getcolors(1 << 24))


@pytest.mark.parametrize(
    ("count", "layers", "biases"),
    [
        (1, (11,), (-0.5,)),
        (1, (0, 3, 11), BIASES),
        (2, (11,), BIASES),
        (3, (3, 11), BIASES),
        (4, (11,), (-0.5,)),
        (4, (0, 3, 11), BIASES),
    ],
    ids=str,
)
def test_a_sweep_is_a_picture_with_a_panel_a_feature(
    tmp_path: Path, figures: list[Figure], count: int, layers: tuple[int, ...], biases: tuple[float, ...]
) -> None:
    rows = [sweep_row(feature, layer, biases) for layer in layers for feature in FEATURES[:count]]
    path = tmp_path / "sweep.png"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_sweep(path, rows, "a title")
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG"
        width, height = picture.size
    assert width > 600 * min(2, count)
    assert height > 400 * (1 if count < 3 else 2)
    assert colours(path) > 20
    (figure,) = figures
    assert [panel.get_title() for panel in panels(figure)] == list(FEATURES[:count])
    for panel in panels(figure):
        legend = panel.get_legend()
        assert legend is not None
        assert [text.get_text() for text in legend.get_texts()] == [
            *(f"layer {layer}" for layer in layers),
            "auto, without labels",
        ]


def test_points_are_the_corloc_at_each_bias_in_rising_order(tmp_path: Path, figures: list[Figure]) -> None:
    plot_sweep(tmp_path / "a.png", [sweep_row("k", 3, hits=5, auto=60), sweep_row("k", 11, hits=20, auto=44)], "k")
    (panel,) = panels(figures[0])
    first, first_auto, second, second_auto, _ = panel.get_lines()
    for line, percents in ((first, [12, 19, 5]), (second, [27, 34, 20])):
        np.testing.assert_allclose(np.asarray(line.get_xydata()), list(zip([-0.5, -0.25, 0.0], percents, strict=True)))
    for line, automatic, percent in ((first, first_auto, 60), (second, second_auto, 44)):
        assert set(np.asarray(automatic.get_ydata()).tolist()) == {percent}
        assert automatic.get_linestyle() == "--"
        assert line.get_linestyle() == "-"
        assert automatic.get_color() == line.get_color()
    assert first.get_color() != second.get_color()
    low, high = panel.get_ylim()
    assert (low, high > 60) == (0, True)


def test_a_layer_has_one_colour_in_all_panels_and_panels_share_their_scale(
    tmp_path: Path, figures: list[Figure]
) -> None:
    rows = [sweep_row("q", 11, auto=10), sweep_row("v", 3, auto=95), sweep_row("v", 11), sweep_row("q", 3)]
    plot_sweep(tmp_path / "a.png", rows, "two features")
    found = [
        {line.get_label(): line.get_color() for line in panel.get_lines() if str(line.get_label()).startswith("layer")}
        for panel in panels(figures[0])
    ]
    assert found[0] == found[1]
    assert found[0].keys() == {"layer 3", "layer 11"}
    assert len({panel.get_ylim() for panel in panels(figures[0])}) == 1
    assert panels(figures[0])[0].get_ylim()[1] > 95


@pytest.mark.parametrize("count", [1, 3, 4])
def test_the_lowest_panel_of_each_column_says_what_the_numbers_are(
    tmp_path: Path, figures: list[Figure], count: int
) -> None:
    plot_sweep(tmp_path / "a.png", [sweep_row(feature, 0) for feature in FEATURES[:count]], "title")
    found = {panel.get_title(): (panel.get_xlabel(), panel.get_ylabel()) for panel in panels(figures[0])}
    named = {1: "q", 3: "kv", 4: ["v", "out"]}[count]
    assert {feature for feature, (label, _) in found.items() if label == "bias"} == set(named)
    assert {feature for feature, (_, label) in found.items() if label == "corloc (%)"} == {"q", "v"} & found.keys()
    for panel in panels(figures[0]):
        if panel.get_title() in named:
            assert any(tick.label1.get_visible() for tick in panel.xaxis.get_major_ticks())


def test_a_sweep_without_any_hit_can_be_drawn(tmp_path: Path) -> None:
    nothing = SweepRow("k", 0, (-0.5, 0.0), (Corloc(0, 3),) * 2, Corloc(0, 3), (), None, 0)
    plot_sweep(tmp_path / "a.png", [nothing], "nothing")
    assert colours(tmp_path / "a.png") > 20


def test_titles_are_drawn(tmp_path: Path, figures: list[Figure]) -> None:
    plot_sweep(tmp_path / "a.png", [sweep_row("k", 0)], "dinov2_vits14_reg on voc07 trainval, 5011 images")
    assert figures[0].get_suptitle() == "dinov2_vits14_reg on voc07 trainval, 5011 images"


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")])
def test_the_suffix_says_the_format_and_folders_are_made(tmp_path: Path, suffix: str, start: bytes) -> None:
    path = tmp_path / "deep" / f"ünïcode{suffix}"
    plot_sweep(path, [sweep_row("k", 0)], "title")
    assert path.read_bytes().startswith(start)


def test_unknown_formats_and_unwritable_places_are_said_plainly(tmp_path: Path) -> None:
    rows = [sweep_row("k", 0)]
    with pytest.raises(LostregError, match=r"cannot write .*a\.xyz: .*xyz.*png"):
        plot_sweep(tmp_path / "a.xyz", rows, "title")
    assert not (tmp_path / "a.xyz").exists()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(LostregError, match=r"cannot write .*file/a\.png"):
        plot_sweep(tmp_path / "file" / "a.png", rows, "title")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(LostregError, match=r"cannot write .*folder\.png"):
        plot_sweep(tmp_path / "folder.png", rows, "title")
    assert (tmp_path / "file").read_text() == "mine"
