"""The command ``lostreg demo``: what it refuses before a page is there, and how it ends."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch

pytest.importorskip("gradio")

from serving import small

from lostreg.cli.demo import _default_backbone
from lostreg.cli.main import main
from lostreg.demo.server import listen
from lostreg.errors import BackboneError
from lostreg.inference.objectness import Facts, Objectness
from lostreg.methods.learned import LinearObjectness
from lostreg.models.registers import RegisterNeurons

PROGRAM = """
import sys
from lostreg.inference import discoverer
from lostreg.models import backbone
discoverer._has_quick_bf16 = lambda _: True
discoverer.load_backbone = lambda name, **_: backbone.build_backbone(backbone.find_spec(name), depth=1)
from lostreg.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a bad command line is answered with."""
    try:
        code = main(["demo", *map(str, arguments)])
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    line = captured.err.splitlines()[-1]
    assert line.startswith("lostreg demo: error: ")
    assert "Traceback" not in captured.err
    return line


@pytest.mark.parametrize("port", ["-1", "65536", "http", "7860.5"])
def test_a_port_is_a_number_up_to_65535(capsys: pytest.CaptureFixture[str], port: str) -> None:
    assert f"expected a port from 0 to 65535, not '{port}'" in refusal(capsys, f"--port={port}")


def test_a_port_in_use_is_refused_before_a_model_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lostreg.inference.discoverer.load_backbone", None)
    with listen("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        assert f"port {port} of 127.0.0.1 is in use" in refusal(capsys, "--port", port)


def test_an_unknown_backbone_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown backbone 'dino_vits61'" in refusal(capsys, "--backbone", "imgfocus_vits14", "dino_vits61")


def test_a_first_backbone_that_cannot_be_loaded_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise BackboneError("no weights to be had")

    monkeypatch.setattr("lostreg.inference.discoverer.load_backbone", fail)
    assert "no weights to be had" in refusal(capsys, "--port", 0)


def test_a_missing_extra_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert 'pip install "lostreg[demo]"' in refusal(capsys)


def test_a_file_that_holds_no_register_neurons_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(json.dumps({"format": "something else"}))
    assert "lostreg registers find" in refusal(capsys, "--test-time-registers", tmp_path / "other.json")
    assert "missing.json" in refusal(capsys, "--test-time-registers", tmp_path / "missing.json")


def test_neurons_of_a_backbone_that_is_not_offered_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    RegisterNeurons(((0, 1),), backbone="dinov2_vits14").save(tmp_path / "registers.json")
    line = refusal(capsys, "--backbone", "imgfocus_vits14", "--test-time-registers", tmp_path / "registers.json")
    assert "the register neurons are those of dinov2_vits14: add it to --backbone" in line


def test_an_objectness_is_a_file_of_a_backbone_that_is_offered_and_of_its_weights(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered = ("--port", 0, "--device", "cpu", "--backbone", "imgfocus_vits14")
    assert "run `lostreg learn FOLDER` first" in refusal(capsys, *offered, "--objectness", "self")
    assert "a file of `lostreg learn`, not 'missing'" in refusal(capsys, *offered, "--objectness", "missing")
    path = tmp_path / "objectness.safetensors"
    path.write_text("{}")
    assert "is no objectness of `lostreg learn`" in refusal(capsys, *offered, "--objectness", path)
    facts = Facts("imgfocus_vits14", "others", images=70, unreadable=0, seed=0)
    Objectness(LinearObjectness(torch.ones(384), 0.0), facts).save(path)
    line = refusal(capsys, "--backbone", "dinov2_vits14", "--objectness", path)
    assert "the objectness was learned on imgfocus_vits14: add it to --backbone" in line
    monkeypatch.setattr("lostreg.inference.discoverer.load_backbone", small)
    line = refusal(capsys, *offered, "--method", "lost", "--objectness", path)
    assert "learned on the weights others, not on random" in line


def test_the_offline_backbone_is_the_first_choice_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Path:
        raise BackboneError("not installed")

    monkeypatch.setattr("lostreg.models.imgfocus.imgfocus_path", lambda: Path("weights"))
    assert _default_backbone() == "imgfocus_vits14"
    monkeypatch.setattr("lostreg.models.imgfocus.imgfocus_path", missing)
    assert _default_backbone() == "dinov2_vits14_reg"


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_demo_says_where_it_is_and_ends_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-c", PROGRAM, "demo", "--port", "0", "--device", "cpu", "--host", "127.0.0.1"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("demo at http://127.0.0.1:"), line
        address = line.split()[2]
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address, timeout=30) as answer:
            assert b"lostreg demo" in answer.read()
        (folder,) = tmp_path.glob("lostreg-demo-*")
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out) == (0, "")
    assert err.splitlines()[-1] == "lostreg: the demo has ended"
    assert "lostreg: bf16, which is quick on this device" in err
    assert "Traceback" not in err
    assert not folder.exists()
