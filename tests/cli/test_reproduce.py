"""A paper's table from its recipe: run, resumed, in parts, with what is missing."""

import json
from pathlib import Path
from typing import Any

import pytest
from fabricate import write_voc

from lostreg.cli.main import main
from lostreg.runs.folder import Run

pytestmark = pytest.mark.usefixtures("small_model", "one_thread")

RECIPE = """
source = "a paper"
options = "--root {root} --batch-size 1"
benchmarks = ["voc"]
note = "of random blocks"

[[row]]
title = "Plain | ViT"
backbone = "dinov2_vits14"
published = {{ voc = 40 }}
sweep = "--features k v --biases -0.5,0"

[[row]]
title = "On COCO"
name = "on-coco"
backbone = "dinov2_vits14"
benchmarks = ["coco"]
options = "--images {root}/JPEGImages --annotations {root}/coco.json"
checkpoint = "weights of theirs"
published = {{ coco = 0.5 }}

[[row]]
title = "With registers"
name = "reg4"
backbone = "dinov2_vits14"
registers = 4
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe with its benchmarks, in the working directory."""
    root = write_voc(tmp_path / "voc", 5)
    images = [{"id": number, "file_name": f"im{number:02}.jpg"} for number in range(5)]
    boxes = [{"id": 1 + n, "image_id": n, "category_id": 1, "bbox": [9, 9, 50, 50]} for n in range(5)]
    document = {"images": images, "annotations": boxes, "categories": [{"id": 1}]}
    (root / "coco.json").write_text(json.dumps(document))
    path = tmp_path / "mine.toml"
    path.write_text(RECIPE.format(root=root))
    monkeypatch.chdir(tmp_path)
    return path


def reproduce(*words: object) -> int:
    return main(["reproduce", *map(str, words)])


def table(out: str = "out") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(Path(out, "mine", "table.json").read_text())["rows"]
    return rows


def test_what_is_measured_stands_beside_what_was_published_and_what_is_missing_is_named(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reproduce(recipe) == 2
    text = capsys.readouterr().out
    assert Path("out/mine/table.md").read_text() in text
    plain, swept, coco, missing = table()
    results = json.loads(Path("out/mine/dinov2_vits14/voc/results.json").read_text())
    assert {name: plain["measured"][name] for name in ("corloc", "hits", "images", "wilson_95")} == {
        name: results[name] for name in ("corloc", "hits", "images", "wilson_95")
    }
    low, high = results["wilson_95"]
    assert (
        f"| Plain \\| ViT | voc | {results['corloc']:.2f} | {low:.2f} to {high:.2f} | {results['hits']}/5 | 40.0 "
        f"| {results['corloc'] - 40:+.2f} | these weights |"
    ) in text
    sweep = json.loads(Path("out/mine/dinov2_vits14/voc-sweep/sweep.json").read_text())
    best = max(row["best_corloc"] for row in sweep["rows"])
    assert (swept["measured"]["corloc"], swept["difference"]) == (best, best - 40)
    chosen = next(row for row in sweep["rows"] if row["best_corloc"] == best)
    told = f"{chosen['feature']} of layer {chosen['layer']} at bias {chosen['best_bias']:g}"
    assert f"voc, best of the sweep, chosen by labels: {told} | {best:.2f}" in text
    assert (coco["published_for"], coco["published"], coco["measured"]["images"]) == ("weights of theirs", 0.5, 5)
    assert missing["measured"] is missing["published"] is missing["difference"] is None
    train = "lostreg registers train IMAGES --backbone dinov2_vits14 --registers 4 --out out/mine/reg4/registers"
    assert f"- With registers on voc: no weights with registers at {missing['command'].split()[6]}, `{train}`" in text
    assert "- Plain | ViT, With registers: of random blocks" not in text
    assert "- Plain | ViT, On COCO, With registers: of random blocks" in text


def test_a_row_whose_registers_were_trained_runs_and_others_are_left_out_by_only(recipe: Path) -> None:
    trained = Path("out/mine/reg4/registers/registers.safetensors")
    trained.parent.mkdir(parents=True)
    trained.touch()  # the model is random whatever is asked for
    assert reproduce(recipe, "--only", "With registers") == 0
    (row,) = table()
    assert (row["title"], row["fault"]) == ("With registers", None)
    assert row["measured"]["images"] == 5
    Path("mine.safetensors").touch()
    assert reproduce(recipe, "--only", "reg4", "--weights", "reg4=mine.safetensors", "--out", "again") == 0
    (again,) = table("again")
    assert "--weights mine.safetensors" in again["command"]
    assert again["measured"] == row["measured"]


def test_a_run_that_was_interrupted_goes_on_to_the_same_table(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reproduce(recipe, "--only", "dinov2_vits14", "--out", "whole") == 2
    append_all, appended = Run.append_all, []

    def stopped(run: Run[Any], entries: Any) -> None:
        append_all(run, entries)
        appended.append(run.out)
        if len(appended) == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "append_all", stopped)
        assert reproduce(recipe) == 130
    plain, swept, *others = table()
    assert plain["measured"]["images"] == 5
    assert swept["measured"] is None
    assert {row["fault"] for row in (swept, *others)} == {"not finished: the command was stopped"}
    assert len(Path("out/mine/dinov2_vits14/voc-sweep/sweep.jsonl").read_text().splitlines()) == 3
    capsys.readouterr()
    assert reproduce(recipe) == 2
    for name in (
        "table.json",
        "table.md",
        "dinov2_vits14/voc/predictions.jsonl",
        "dinov2_vits14/voc-sweep/sweep.jsonl",
    ):
        again, whole = (Path(out, "mine", name).read_text() for out in ("out", "whole"))
        assert again == whole.replace("whole/", "out/"), name
    measured = [row for row in table() if row["measured"]]
    with monkeypatch.context() as patch:
        patch.setattr("lostreg.cli.reproduce._outcome", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            reproduce(recipe)
    assert [row for row in table() if row["measured"]] == measured
    swept_facts = json.loads(Path("out/mine/dinov2_vits14/voc-sweep/sweep.json").read_text())["run"]
    assert swept_facts["computed"] == 2


def test_only_and_dry_run_show_commands_with_what_is_done_and_missing_and_run_nothing(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def states(*words: object) -> list[tuple[str, str]]:
        capsys.readouterr()
        assert reproduce(recipe, "--dry-run", *words) == 0
        lines = [line.split("  # ") for line in capsys.readouterr().out.splitlines()]
        return [(line.partition("/mine/")[2].rpartition(" --")[0] or line, state) for line, state in lines]

    assert [state.split(":")[0] for _, state in states()] == ["to do", "to do", "to do", "missing"]
    assert not Path("out").exists()
    assert reproduce(recipe, "--only", "Plain | ViT", "voc", "eval") == 0
    assert [row["folder"] for row in table()] == ["dinov2_vits14/voc"]
    assert [state.split(":")[0] for _, state in states()] == ["done", "to do", "to do", "missing"]
    assert states("--only", "voc", "eval", "dinov2_vits14", "--with", "--limit", "2")[0][1].startswith(
        "done as `lostreg eval voc --backbone dinov2_vits14 "
    )
    assert [state for _, state in states("--only", "sweep", "dinov2_vits14")] == ["to do"]
    assert [state for _, state in states("--only", "coco", "--with", "--limit", "2")] == ["to do"]
    assert reproduce(recipe, "--only", "sweep", "coco") == 2
    assert "leaves nothing" in capsys.readouterr().err


def test_a_benchmark_that_is_not_there_is_named_with_the_command_that_fetches_it(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reproduce("lost-2021", "--only", "voc07", "dino_vits8", "--with", "--root", "else where") == 2
    fetch = "PASCAL VOC 2007 is not there, `lostreg datasets fetch voc07 --root 'else where'` fetches it"
    assert f"- DINO ViT-S/8 on voc07: {fetch}\n" in capsys.readouterr().out
    assert reproduce("registers-2024", "--dry-run", "--only", "deit3_vitb16-reg4", "voc07", "eval") == 0
    weights = "out/registers-2024/deit3_vitb16-reg4/registers"
    assert capsys.readouterr().out.partition("  # ")[2] == (
        "missing: PASCAL VOC 2007 is not there, `lostreg datasets fetch voc07` fetches it; "
        f"no weights with registers at {weights}/registers.safetensors, "
        f"`lostreg registers train IMAGES --backbone deit3_vitb16 --registers 4 --out {weights}` makes them\n"
    )


def test_a_dry_run_finds_what_the_run_refuses_which_tells_it_once(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_voc(Path("few/VOCdevkit/VOC2007"), 3)
    (root / "JPEGImages/im01.jpg").unlink()
    for benchmark, fault in (("voc", "1 of 3 images are missing"), ("voc07", "expected 5011 images")):
        row = f'[[row]]\ntitle = "A"\nbackbone = "dinov2_vits14"\nbenchmarks = ["{benchmark}"]\nsweep = "--features k"'
        Path("part.toml").write_text(f'options = "--root {root}"\n{row}')
        assert reproduce("part.toml", "--dry-run") == 0
        states = [line.partition("  # ")[2] for line in capsys.readouterr().out.splitlines()]
        assert len(states) == 2
        assert all(state.startswith("missing: ") and fault in state for state in states), states
        assert reproduce("part.toml") == 2
        assert capsys.readouterr().err.count(states[0].removeprefix("missing: ")) == 1


def test_a_part_of_a_benchmark_is_told_and_not_compared(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce(recipe, "--only", "coco", "--with", "--limit", "2") == 0
    (row,) = table()
    assert (row["measured"]["limit"], row["measured"]["images"], row["difference"]) == (2, 2, None)
    text = capsys.readouterr().out
    assert "Run with `--limit 2`" in text
    assert "/2 (the first 2 images alone) | 0.5 | - | weights of theirs |" in text
    assert reproduce(recipe, "--only", "voc", "eval", "Plain | ViT", "--with", "--no-hard") == 0
    row, limited = table()  # what an earlier call has measured stays
    assert (row["measured"]["limit"], row["published"], row["difference"]) == (None, 40, None)
    assert (limited["measured"]["limit"], limited["with"]) == (2, ["--limit", "2"])
    text = capsys.readouterr().out
    assert "Run with `--no-hard`" in text
    assert "- On COCO on coco: run with `--limit 2`" in text
    assert reproduce(recipe, "--only", "coco") == 2  # other settings: the folder is the earlier run's
    row, limited = table()
    assert (row["measured"]["images"], limited["measured"]) == (5, None)
    assert "holds a run with other settings: images was 2 and is now 5" in limited["fault"]
    assert "- Plain | ViT on voc: run with `--no-hard`" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("row = 1", "expected tables [[row]], at least one"),
        ("[[row", "is no TOML file"),
        ("[[row]]\ntitle = 'A'", "expected a title and a backbone"),
        ("[[row]]\ntitle = 'A'\nbackbon = 'x'", "unknown field 'backbon': did you mean backbone?"),
        ("[[row]]\ntitle = 'A'\nbackbone = 'x'\nregisters = '4'", "expected registers as a whole number, not '4'"),
        ("[[row]]\ntitle = 'A'\nbackbone = 'x'\nnote = 'a\\nb'".replace("'", '"'), "expected note as text on one line"),
        ("[[row]]\ntitle = 'A'\nbackbone = 'x'\nbenchmarks = [['voc']]", "not [['voc']]"),
        ("[[row]]\ntitle = 'A'\nbackbone = 'x'", "expected benchmarks or published figures"),
        ("[[row]]\ntitle = 'A'\nbackbone = 'x'\nbenchmarks = ['voc08']", "not ['voc08']"),
        ("[[row]]\ntitle = 'A'\nbackbone = 'x'\npublished = { voc = 140 }", "corloc in percent, not 140"),
        ("[[row]]\ntitle = 'A'\nbackbone = 'x'\nname = '../b'\nbenchmarks = ['voc']", "a name of letters"),
        ("[[row]]\ntitle = 'A'\nbackbone = 'x'\noptions = '--out b'\nbenchmarks = ['voc']", "--out is not among"),
        (
            "[[row]]\ntitle = 'A'\nbackbone = 'dino_vits8'\noptions = '--lim 3'\nbenchmarks = ['voc']",
            "unrecognized arguments",
        ),
        ("[[row]]\ntitle = 'A'\nbackbone = 'dino'\nbenchmarks = ['voc']", "row 'A', unknown backbone 'dino'"),
        ("[[row]]\ntitle = 'A'\nbackbone = 'x'\nbenchmarks = ['voc']\n" * 2, "two rows write to 'x'"),
    ],
)
def test_a_recipe_that_is_wrong_is_refused_in_one_line(
    tmp_path: Path, content: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(content)
    assert reproduce(path, "--out", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lostreg reproduce: error: ")
    assert told in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("lost-2022", "no recipe 'lost-2022': expected dinov2-issue-381, lost-2021"),
        ("lost-2021 --only voc08", "--only 'voc08' names nothing of the recipe: expected DINO ViT-S/16"),
        ("lost-2021 --with --limit none", "row 'DINO ViT-S/16', lostreg eval: argument --limit"),
        ("lost-2021 --with --weights=x", "--with --weights=x: expected an option for all rows"),
        ("lost-2021 --weights dino=x", "no row 'dino' to give weights to: expected one of dino_vits16, dino_vits8"),
    ],
)
def test_words_that_are_wrong_are_refused_in_one_line(
    words: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reproduce(*words.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
