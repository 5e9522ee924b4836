"""What commands write into a store, and read of a run that lies there, is what they write and read on this machine."""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from exporting import NAMES, line, write_run
from fabricate import write_voc
from fabricate_lake import S3Server, write_parquet
from pyarrow import table

from lostreg.cli.main import main
from lostreg.exports import parquet
from lostreg.images import stores

FAST = ["--backbone", "imgfocus_vits14", "--device", "cpu"]

pytestmark = pytest.mark.usefixtures("small_model", "one_thread")


@pytest.fixture(autouse=True)
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Copies on this machine go in the end, whatever happened."""
    places = tmp_path / "temporary", tmp_path / "cache/lostreg/runs"
    places[0].mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(places[0]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    assert not [path for place in places if place.exists() for path in place.iterdir()]


@pytest.fixture
def bucket(server: S3Server, tmp_path: Path) -> str:
    name = tmp_path.name.replace("_", "-").lower()
    server.put(f"{name}/elsewhere/.here", b"")
    return name


@pytest.fixture
def run(server: S3Server, bucket: str, tmp_path: Path) -> str:
    """The URI of a run that lies in ``tmp_path / "run"``, too."""
    stores.store_folder(write_run(tmp_path), server.uri(f"{bucket}/found"))
    return server.uri(f"{bucket}/found")


def contents(uri: str) -> dict[str, bytes]:
    """All files below a store's folder."""
    names = stores.list_files(uri) if stores.kind_at(uri) else []
    return {name: stores.open_file(stores.join_uri(uri, name)).read() for name in names or ()}


def export(run: str, kind: str, out: str, *options: str) -> int:
    return main(["export", run, "--format", kind, "--out", out, *options])


def test_an_export_of_a_store_into_a_store_is_that_of_this_machine(
    server: S3Server, bucket: str, run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here, there = tmp_path / "here", server.uri(f"{bucket}/exports")
    for kind, name in {"coco": "c.json", "csv": "c.csv", "parquet": "c.parquet", "labelstudio": "tasks.json"}.items():
        assert export(str(tmp_path / "run"), kind, str(here / name)) == 0
        expected = capsys.readouterr()
        out = stores.join_uri(there, name)
        for source in (run, stores.join_uri(run, "predictions.jsonl")):
            assert export(source, kind, out, "--overwrite") == 0
            told = capsys.readouterr()
            assert told.out == expected.out.replace(str(here / name), out)
            assert told.err == expected.err
        assert export(run, kind, out) == 2
        assert "is there already: give another file, or --overwrite" in capsys.readouterr().err
    assert contents(there) == {path.name: path.read_bytes() for path in here.iterdir()}
    assert export(run, "yolo", str(here / "yolo")) == 0  # pictures lie where they lay
    assert len(list((here / "yolo/images").rglob("*.*"))) == len(NAMES)


def test_parquet_goes_into_a_folder_of_a_store_in_parts(
    server: S3Server,
    bucket: str,
    run: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = server.uri(f"{bucket}/table")
    assert export(str(tmp_path / "run"), "parquet", str(tmp_path / "whole.parquet")) == 0
    monkeypatch.setattr(parquet, "PART_ROWS", 3)
    assert export(run, "parquet", out) == 0
    assert f"exported {len(NAMES)} images, {2 * len(NAMES)} boxes to {out} (1 unreadable)" in capsys.readouterr().out
    before = contents(out)
    assert sorted(before) == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    store, path = stores._opened(out)
    assert pq.read_table(path, filesystem=store).equals(pq.read_table(tmp_path / "whole.parquet"))
    monkeypatch.setattr(parquet, "PART_ROWS", 4)  # images: one more than two parts hold
    assert export(run, "parquet", out) == 2
    assert "holds an earlier export: give another folder, or --overwrite" in capsys.readouterr().err
    twice = tmp_path / "twice.jsonl"
    twice.write_text(2 * (json.dumps(line("a.jpg")) + "\n"))
    assert export(str(twice), "parquet", out, "--overwrite") == 2  # and nothing is lost
    assert contents(out) == before
    assert export(run, "parquet", out, "--overwrite") == 0
    assert sorted(contents(out)) == ["part-00000.parquet", "part-00001.parquet"]
    server.put(f"{bucket}/table/part-00000-of-another.parquet", b"theirs")
    assert export(run, "parquet", out, "--overwrite") == 2
    assert "holds part-00000-of-another.parquet, which no export writes" in capsys.readouterr().err


def test_a_page_of_a_store_is_that_of_this_machine(
    server: S3Server, bucket: str, run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "same/found"  # whose name is on the page
    folder.parent.mkdir()
    (tmp_path / "run").rename(folder)
    assert main(["report", str(folder)]) == 0
    assert main(["report", run]) == 0
    assert f"written to {stores.join_uri(run, 'report.html')}: {len(NAMES)} images" in capsys.readouterr().out
    expected = (folder / "report.html").read_bytes()
    assert contents(run)["report.html"] == expected
    assert main(["report", run, "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_bytes() == expected
    server.put(f"{bucket}/mine.html", b"<p>mine</p>")
    assert main(["report", run, "--out", server.uri(f"{bucket}/mine.html")]) == 2
    assert "is there already, and no page of lostreg report" in capsys.readouterr().err
    assert main(["report", run]) == 0  # its own page is replaced


def test_eval_and_sweep_go_on_with_what_a_store_has(
    server: S3Server, bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_voc(tmp_path / "voc", 3)
    command = ["eval", "voc", "--root", str(root), *FAST]
    assert main([*command, "--out", str(tmp_path / "here")]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    out = server.uri(f"{bucket}/voc")
    assert main([*command, "--out", out, "--limit", "2"]) == 0
    assert main([*command, "--out", out]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"error: s3://{bucket}/voc holds a run with other settings: images was 2 and is now 3" in error
    assert str(tmp_path) not in error
    assert main([*command, "--out", out, "--overwrite"]) == 0
    assert main([*command, "--out", out]) == 0  # computes nothing
    told = capsys.readouterr()
    assert told.out.splitlines()[-1] == last
    assert told.err.splitlines()[-1] == f"lostreg: written to {out}"
    for name in ("predictions.jsonl", "maps.jsonl"):
        assert contents(out)[name] == (tmp_path / "here" / name).read_bytes()
    for place in (stores.join_uri(out, "predictions.jsonl"), out):
        assert main(["score", place, "voc", "--root", str(root)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == last
    command = ["sweep", "voc", "--root", str(root), *FAST, "--features", "k", "--biases", "0"]
    assert main([*command, "--out", server.uri(f"{bucket}/sweep")]) == 0
    assert set(contents(server.uri(f"{bucket}/sweep"))) == {"sweep.jsonl", "sweep.json", "sweep.png"}


def test_several_backbones_that_were_killed_go_on_from_this_machine(
    server: S3Server, bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["eval", "voc", "--root", str(write_voc(tmp_path / "voc", 3)), "--out", server.uri(f"{bucket}/two")]
    command += ["--device", "cpu", "--backbone", "imgfocus_vits14", "dino_vits16"]

    def killed(folder: Path, _: str) -> None:
        if folder.name == "run":
            raise MemoryError

    with monkeypatch.context() as patch:  # what is computed stays on this machine, as after a kill
        patch.setattr("lostreg.runs.remote.store_folder", killed)
        patch.setattr("lostreg.runs.remote.delete_file", lambda _: None)
        assert main(command) == 2
    assert contents(server.uri(f"{bucket}/two")) == {}
    capsys.readouterr()
    assert main(command) == 0
    assert "going on with what a run into" in capsys.readouterr().err
    stored = contents(server.uri(f"{bucket}/two"))
    assert json.loads(stored["imgfocus_vits14/results.json"])["run"]["computed"] == 3


def test_masks_that_go_among_the_photos_are_no_photos(server: S3Server, bucket: str, tmp_path: Path) -> None:
    stores.store_folder(write_voc(tmp_path / "voc", 2) / "JPEGImages", server.uri(f"{bucket}/photos"))
    out = server.uri(f"{bucket}/photos/found")
    for _ in range(2):
        assert main(["discover", server.uri(f"{bucket}/photos"), "--out", out, "--mask-png", *FAST]) == 0
    assert len(contents(out)["predictions.jsonl"].splitlines()) == 2
    assert {"masks/im00.jpg.png", "masks/im01.jpg.png"} <= set(contents(out))
    server.put(f"{bucket}/photos/found/masks/mine.txt", b"not of the run")
    stores.delete_file(server.uri(f"{bucket}/photos/im01.jpg"))  # and its picture goes with it
    assert main(["discover", server.uri(f"{bucket}/photos"), "--out", out, "--mask-png", *FAST]) == 0
    assert {name for name in contents(out) if name.startswith("masks")} == {"masks/im00.jpg.png", "masks/mine.txt"}


REFUSED = {
    "nothing there": ("export {none} --format csv --out {x}.csv", "no such file or folder in that store"),
    "a folder without a run": (
        "export {else} --format csv --out {x}.csv",
        "elsewhere: expected a predictions file, or",
    ),
    "a page of no run": ("report {else}", "elsewhere holds no predictions.jsonl"),
    "a page of predictions": ("report {run}/predictions.jsonl", "is a predictions file: expected its folder, s3://"),
    "forbidden": ("export {closed} --format csv --out {x}.csv", "cannot be read (When getting information for key"),
    "another ending": ("export {run} --format csv --out {x}.json", "expected a file ending in .csv for this format"),
    "no ending": ("export {run} --format csv --out {x}", "expected a file ending in .csv for this format"),
    "pictures": ("export {run} --format voc --out {x}", "voc is a folder with the images: expected --out on this mach"),
    "a bucket": ("export {run} --format parquet --out s3://bucket", "expected the place of a file or folder in a buck"),
    "the run's folder": ("export {run} --format parquet --out {run} --overwrite", "holds failed.csv, which no export"),
    "the results": (
        "export {run} --format coco --out {run}/results.json --overwrite",
        "is called like a file of a run",
    ),
    "up": ("export {run} --format parquet --out {x}/..", "expected the place of a file or folder in a bucket"),
    "hidden": ("export {run} --format csv --out s3://{bucket}/.x.csv", "expected the place of a file or folder in a"),
    "a secret": ("export {run} --format csv --out s3://key:secret@bucket/x.csv", "credentials in a URI"),
    "another scheme": ("export {run} --format csv --out gopher://bucket/x.csv", "pyarrow knows no such store"),
    "another machine": ("export file://there/run --format csv --out {x}.csv", "it names the machine 'there'"),
    "no bucket": ("export {run} --format csv --out s3://{bucket}-none/x.csv", "cannot be written to"),
    "a run into a file": ("eval sample --out {run}/results.json", "is a file: expected a folder"),
    "a run into no bucket": ("eval sample --out s3://{bucket}-none/run", "cannot be written to"),
    "a run where nobody may": ("eval sample --out {closed}", "cannot be read (When"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_is_one_line_and_changes_nothing(
    server: S3Server,
    bucket: str,
    run: str,
    tmp_path: Path,
    case: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server.put(f"{bucket}/closed/predictions.jsonl", b"{}")
    server.put(f"{bucket}/found/failed.csv", b"")
    before = contents(server.uri(bucket))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{server.address}")
    names = {"run": "found", "else": "elsewhere", "closed": "closed", "none": "none", "x": "x"}
    command, message = REFUSED[case]
    words = command.format(**{name: f"s3://{bucket}/{path}" for name, path in names.items()}, bucket=bucket).split()
    server.forbidden.add("closed")
    try:
        code: object = main([*words, *(FAST if words[0] == "eval" else [])])
    except SystemExit as done:
        code = done.code
    finally:
        server.forbidden.clear()
    assert code == 2
    told = [one for one in capsys.readouterr().err.splitlines() if "error" in one]
    assert len(told) == 1
    assert message in told[0]
    assert str(tmp_path) not in told[0]
    assert "what was computed" not in told[0]
    assert contents(server.uri(bucket)) == before


def test_an_export_replaces_no_table_of_images(
    server: S3Server, bucket: str, run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = write_parquet(tmp_path / "photos.parquet", table({"image": [b"1", b"2"]})).read_bytes()
    server.put(f"{bucket}/photos/part-00000.parquet", photos)
    source = server.uri(f"{bucket}/photos/part-00000.parquet")
    maps = tmp_path / "run/maps.jsonl"
    (first, *_) = map(json.loads, maps.read_text().splitlines())
    maps.write_text(json.dumps({**first, "path": f"{source}#column=image&group=0&row=0"}) + "\n")
    for out in (source, source.replace("part-", "%70art-"), server.uri(f"{bucket}/photos")):
        assert export(str(tmp_path / "run"), "parquet", out, "--overwrite") == 2
        assert "is among the files that hold the images" in capsys.readouterr().err
    assert contents(server.uri(f"{bucket}/photos")) == {"part-00000.parquet": photos}


@pytest.mark.parametrize(
    "words",
    [
        "reproduce lost-2021 --out",
        "probe dino_vits16 --task depth --data . --out",
        "probe dino_vits16 --task depth --data . --cache",
        "calibrate a.png --out",
        "learn a.png --out",
        "attention a.png --out",
        "predict a.png --plot",
        "predict a.png --mask-dir",
    ],
)
def test_what_no_store_gets_makes_no_folder_of_its_name_here(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for place, told in (
        ("s3://bucket/it", "expected a place on this machine's disks, not s3://bucket/it"),
        ("file://there/it", "it names the machine 'there'"),
    ):
        with pytest.raises(SystemExit) as exit_code:
            main([*words.split(), place])
        assert exit_code.value.code == 2
        assert told in capsys.readouterr().err
    assert not list(tmp_path.glob("s3*"))
