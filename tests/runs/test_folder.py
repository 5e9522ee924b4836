"""The folder of a run: what a kill may leave, who may write there, and whether it is the same run."""

import json
import os
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lostreg
from lostreg.checks import cut
from lostreg.datasets import Benchmark, Example
from lostreg.errors import PredictionsError
from lostreg.jsonio import write_json
from lostreg.runs import results
from lostreg.runs.folder import locked
from lostreg.runs.results import benchmark_settings, check_same_run, describe_device, package_versions, run_facts


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


def test_a_run_says_how_attention_was_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    capabilities = {"avx512_bf16": True, "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    kinds = [
        run_facts(1, 1.0, torch.device("cpu"), dtype)["run"]["attention"] for dtype in (torch.float32, torch.bfloat16)
    ]
    assert kinds == ["fused", "tiled"]


def test_a_device_is_described_with_what_decides_its_speed() -> None:
    told = describe_device(torch.device("cpu"))
    assert told.startswith("cpu: ")
    assert told.endswith(f", {torch.get_num_threads()} threads")
