"""The folder of a run: what a kill may leave, who may write there, and whether it is the same run."""

import json
import os
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lostreg
from lostreg.checks import cut
from lostreg.datasets import Benchmark, Example
from lostreg.errors import LostregWarning, PredictionsError
from lostreg.jsonio import write_json
from lostreg.runs import results
from lostreg.runs.folder import Run, locked
from lostreg.runs.predictions import Prediction, parse_prediction
from lostreg.runs.results import benchmark_settings, check_same_run, describe_device, package_versions, processor_name


def two(*, moved: float = 0.0) -> Benchmark:
    box = np.array([[0.0, 0.0, 10.0, 10.0 + moved]])
    return Benchmark("voc", "val", tuple(Example(image_id, Path("none"), box) for image_id in ("a", "b")))


def test_json_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"naïve": [1.5, None]})
    with pytest.raises(TypeError):
        write_json(path, {"no JSON": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"naïve": [1.5, None]}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_a_kill_while_json_is_written_leaves_the_earlier_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"value": 1})
    write = Path.write_text

    def killed(place: Path, text: str, **options: Any) -> int:
        write(place, text[: len(text) // 2], **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            write_json(path, {"value": 2})
    assert json.loads(path.read_text()) == {"value": 1}
    write_json(path, {"value": 3})  # and what was left beside it is in no one's way
    assert json.loads(path.read_text()) == {"value": 3}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_who_reads_json_while_it_is_written_reads_the_earlier_content(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"value": 1})
    with path.open() as reader:
        write_json(path, {"value": 2})
        assert json.load(reader) == {"value": 1}
    assert json.loads(path.read_text()) == {"value": 2}


def test_a_folder_is_held_by_one_run_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with locked(out):
        assert out.is_dir()
        with pytest.raises(PredictionsError, match=r"out is in use: another run is writing there"), locked(out):
            raise AssertionError("two runs hold one folder")
        with locked(tmp_path / "other"):
            pass
    with locked(out):
        pass


def test_a_run_that_fails_lets_go_of_its_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), locked(tmp_path):
        raise KeyboardInterrupt
    with locked(tmp_path):
        pass


def test_a_file_cannot_be_held(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for out, reason in ((file, "it is a file"), (file / "below", "Not a directory")):
        with pytest.raises(PredictionsError, match=f"cannot write to .*, expected a folder: {reason}"), locked(out):
            raise AssertionError("a file is no folder")
    assert file.read_text() == "mine"


def test_a_folder_in_which_nothing_may_be_written_is_refused_and_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(os, "access", lambda path, mode: mode != os.W_OK)
        with pytest.raises(PredictionsError, match=r"cannot write to .*: permission denied"), locked(tmp_path):
            raise AssertionError("written without permission")
    with locked(tmp_path):
        pass


def test_settings_are_the_benchmark_and_every_option() -> None:
    settings = benchmark_settings(two(), {"bias": -0.5}, {"limit": 2, "no_hard": False})
    assert settings == {
        "benchmark": {
            "name": "voc",
            "split": "val",
            "images": 2,
            "fingerprint": two().fingerprint(),
            "limit": 2,
            "no_hard": False,
        },
        "options": {"bias": -0.5},
    }
    assert benchmark_settings(two(), {}, None)["benchmark"].keys() == {"name", "split", "images", "fingerprint"}


def test_the_same_settings_are_the_same_run_in_whatever_order(tmp_path: Path) -> None:
    settings = benchmark_settings(two(), {"bias": -0.5, "layer": 1, "steps": [0.0, -0.25]}, None)
    shuffled = {section: dict(reversed(values.items())) for section, values in reversed(settings.items())}
    write_json(tmp_path / "results.json", {"complete": True, "corloc": 1.0, **shuffled})
    check_same_run(tmp_path / "results.json", settings)


def test_every_difference_is_named_with_what_was_and_what_is(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_json(path, benchmark_settings(two(), {"bias": -0.5, "gone": 1, "same": [1, 2]}, {"limit": None}))
    now = benchmark_settings(two(moved=1), {"bias": "auto", "new": [0.0], "same": [1, 2]}, {"limit": 2})
    with pytest.raises(PredictionsError, match=r"holds a run with other settings: ") as caught:
        check_same_run(path, now)
    told = str(caught.value).partition("settings: ")[2]
    *changes, advice = told.split("; ")
    assert advice == "use --overwrite or another --out"
    was, now_is = (f'"{benchmark.fingerprint()}"' for benchmark in (two(), two(moved=1)))
    assert changes.pop(0) == f"fingerprint was {cut(was)} and is now {cut(now_is)}"
    assert changes == [
        "limit was null and is now 2",
        'bias was -0.5 and is now "auto"',
        "new was null and is now [0.0]",
        "gone was 1 and is now null",
    ]


@pytest.mark.parametrize("section", [None, [], "text"])
def test_settings_that_are_missing_or_of_another_kind_are_a_difference(tmp_path: Path, section: object) -> None:
    path = tmp_path / "results.json"
    write_json(path, {"options": section} if section is not None else {})
    with pytest.raises(PredictionsError, match=r"bias was null and is now -0\.5"):
        check_same_run(path, {"options": {"bias": -0.5}})


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"7", b"\xff\xfe", b"null"])
def test_a_folder_without_settings_is_not_gone_on_with(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "results.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PredictionsError, match=r"no readable results\.json: not a run to go on with; use --overwrite"):
        check_same_run(path, {})


def test_versions_of_what_is_not_installed_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "_PACKAGES", ("lostreg", "no-such-package", "torch"))
    assert package_versions() == {"lostreg": lostreg.__version__, "torch": metadata.version("torch")}


def test_a_device_is_described_with_what_may_round_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = f"cpu: {processor_name()}, {torch.get_num_threads()} threads"
    assert describe_device(torch.device("cpu")) == plain
    capabilities = {"avx512_bf16": True, "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert describe_device(torch.device("cpu"), torch.bfloat16) == f"{plain}, tiled attention"
    assert describe_device(torch.device("cpu"), torch.float32) == plain
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert describe_device(torch.device("cuda:1")) == "cuda: GPU 1"


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ("processor\t: 0\nmodel name\t: Some CPU @ 2.0GHz: 4\nmodel name\t: Another\n", "Some CPU @ 2.0GHz: 4"),
        ("processor\t: 0\n", "arm64"),  # of which Linux tells no model
        (OSError(), "arm"),
    ],
)
def test_a_processor_has_the_name_that_the_system_tells(
    monkeypatch: pytest.MonkeyPatch, content: str | OSError, name: str
) -> None:
    def read(*_: object, **__: object) -> str:
        if isinstance(content, OSError):
            raise content
        return content

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    monkeypatch.setattr("platform.processor", lambda: "arm")
    assert processor_name() == name


@pytest.fixture
def on(tmp_path: Path) -> Callable[..., list[str]]:
    """Runs over the images a to e on a device, of which so many are computed; what it warns of."""

    def run(device: str, computed: int, images: str = "abcde") -> list[str]:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", LostregWarning)
            with Run(
                tmp_path,
                list(images),
                {"options": {"bias": 0.0}},
                device,
                parse_prediction,
                memory="predictions.jsonl",
            ) as run:
                list(run.resume())
                for image in run.todo[:computed]:
                    run.append(Prediction(image, ()))
                if run.computed == len(run.todo):
                    run.put_in_order()
                    run.finish({})
        return [str(warning.message) for warning in told]

    return run


def devices(folder: Path) -> tuple[object, object]:
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return found["device"], found.get("earlier_devices")


def test_a_run_that_goes_on_elsewhere_tells_and_records_it(on: Callable[..., list[str]], tmp_path: Path) -> None:
    assert on("cuda: A", 2) == []
    assert devices(tmp_path) == ("cuda: A", None)
    (told,) = on("cuda: B", 1)
    assert told.startswith("the earlier run computed on cuda: A, this one goes on with cuda: B")
    assert devices(tmp_path) == ("cuda: B", ["cuda: A"])
    assert on("cuda: B", 1) == []
    assert devices(tmp_path) == ("cuda: B", ["cuda: A"])
    (told,) = on("cuda: A", 1)
    assert told.startswith("the earlier run computed on cuda: B, this one goes on with cuda: A")
    assert json.loads((tmp_path / "results.json").read_text())["complete"] is True
    assert devices(tmp_path) == ("cuda: A", ["cuda: A", "cuda: B"])


@pytest.mark.parametrize("killed", [False, True])
def test_where_nothing_is_left_to_compute_the_device_stays(
    on: Callable[..., list[str]], tmp_path: Path, killed: bool
) -> None:
    on("cuda: A", 2)
    on("cuda: B", 3)
    if killed:  # before its results were written
        path = tmp_path / "results.json"
        write_json(path, {**json.loads(path.read_text()), "complete": False})
    assert on("cuda: C", 0) == []
    assert devices(tmp_path) == ("cuda: B", ["cuda: A"])


def test_a_device_that_has_computed_nothing_is_not_named(on: Callable[..., list[str]], tmp_path: Path) -> None:
    on("cuda: A", 2)
    assert len(on("cuda: B", 0)) == 1
    assert devices(tmp_path) == ("cuda: A", None)
    assert on("cuda: A", 3) == []
    assert devices(tmp_path) == ("cuda: A", None)


def test_a_run_of_which_nothing_is_there_is_that_of_its_own_device(
    on: Callable[..., list[str]], tmp_path: Path
) -> None:
    on("cuda: A", 0)
    assert on("cuda: B", 5) == []
    assert devices(tmp_path) == ("cuda: B", None)


@pytest.mark.parametrize("earlier", [{}, {"device": None}, {"device": "cuda: B", "earlier_devices": 7}])
def test_results_that_name_no_devices_go_on(
    on: Callable[..., list[str]], tmp_path: Path, earlier: dict[str, object]
) -> None:
    on("cuda: A", 3)
    write_json(tmp_path / "results.json", {"complete": False, "options": {"bias": 0.0}, **earlier})
    assert on("cuda: B", 2) == []
    assert devices(tmp_path) == ("cuda: B", None)
