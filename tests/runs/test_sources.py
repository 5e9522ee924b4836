"""Runs over shards, tables and stores: the same boxes wherever pictures are kept; what an unreliable store costs."""

import functools
import json
import pickle
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import scenes
from fabricate_lake import S3Server, png, struct_table, write_arrow, write_parquet, write_saved, write_tar
from small_vit import NAME, save_weights, small

from lostreg import Discoverer
from lostreg.cli.main import main
from lostreg.datasets.folder import find_collection
from lostreg.datasets.tables import forget_tables
from lostreg.gallery.build import write_gallery
from lostreg.images import stores
from lostreg.images.decode import read_image
from lostreg.models.backbone import Backbone
from lostreg.runs.discover import discover_collection
from lostreg.runs.predictions import read_predictions
from lostreg.runs.reader import RunFolder
from lostreg.runs.remote import folder_of

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::lostreg.errors.LostregWarning"),
]


@pytest.fixture
def discoverer(backbone: Backbone) -> Discoverer:
    return Discoverer(backbone, device="cpu", batch_size=2, max_objects=2, min_score=0.05)


@functools.cache
def pictures() -> dict[str, bytes]:
    return {f"{number:03}.png": png(pixels) for number, pixels in enumerate(scenes(5))}


def kept(place: Path, server: S3Server) -> dict[str, str]:
    """The same pictures in every kind of source."""
    images = pictures()
    (place / "folder").mkdir()
    for name, content in images.items():
        (place / "folder" / name).write_bytes(content)
        server.put(f"pictures/folder/{name}", content)
    beside = {"000.json": b"{}", "000.cls": b"3"}
    tar = write_tar(place / "shards" / "0.tar", {**images, **beside})
    table = struct_table(images)
    bytes_alone = pa.table({"jpg": pa.array(images.values(), pa.large_binary()), "number": range(len(images))})
    parquet = write_parquet(place / "table.parquet", table)
    server.put("pictures/0.tar", tar.read_bytes())
    server.put("pictures/table.parquet", parquet.read_bytes())
    stream = write_arrow(place / "stream.arrow", table, stream=True)
    server.put("pictures/stream.arrow", stream.read_bytes())
    return {
        "tar": str(tar),
        "folder of shards": str(place / "shards"),
        "parquet": str(parquet),
        "parquet, bytes alone": str(write_parquet(place / "bytes.parquet", bytes_alone)),
        "arrow stream": str(stream),
        "arrow file": str(write_arrow(place / "file.arrow", table, stream=False)),
        "saved by datasets": str(write_saved(place / "saved", table)),
        "file:// folder": (place / "folder").as_uri(),
        "file:// tar": tar.as_uri(),
        "s3:// folder": server.uri("pictures/folder"),
        "s3:// glob": server.uri("pictures/fold*/*.png"),
        "s3:// tar": server.uri("pictures/0.tar"),
        "s3:// parquet": server.uri("pictures/table.parquet"),
        "s3:// arrow": server.uri("pictures/stream.arrow"),
    }


def lines_of(out: Path) -> list[str]:
    """The lines of a run without their names."""
    return [line.partition(", ")[2] for line in (out / "predictions.jsonl").read_text().splitlines()]


def test_the_same_pictures_have_the_same_boxes_wherever_they_are_kept(
    server: S3Server, discoverer: Discoverer, tmp_path: Path
) -> None:
    sources = kept(tmp_path, server)
    discover_collection(find_collection(str(tmp_path / "folder")), discoverer, tmp_path / "out")
    expected = lines_of(tmp_path / "out")
    assert len(set(expected)) == 5
    for kind, source in sources.items():
        out = tmp_path / "out of" / kind.replace("/", "_")
        summary = discover_collection(find_collection(source), discoverer, out)
        assert lines_of(out) == expected, kind
        assert summary.images == 5, kind
        found = read_predictions(out / "predictions.jsonl")
        assert str(tmp_path) not in "".join(str(one.image_id) for one in found), kind


def test_what_a_store_does_not_give_is_tried_again_by_the_next_run(
    server: S3Server, discoverer: Discoverer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "REQUEST_SECONDS", 2.0)
    monkeypatch.setattr(stores, "ATTEMPTS", 1)
    stores._store.cache_clear()
    for name in ("a.png", "forbidden.png", "gone.png", "slow.png"):
        server.put(f"faults/{name}", pictures()["000.png"])
    server.put("faults/broken.png", b"no picture")
    found = find_collection(server.uri("faults"))
    server.forbidden.add("forbidden.png")
    server.slow["slow.png"] = 5.0
    server.remove("faults/gone.png")
    try:
        summary = discover_collection(found, discoverer, tmp_path / "out")
    finally:
        server.forbidden.clear()
        server.slow.clear()
        stores._store.cache_clear()
    assert (summary.images, summary.unreadable, summary.unavailable) == (5, 4, 3)
    errors = {one.image_id: one.error for one in read_predictions(tmp_path / "out" / "predictions.jsonl") if one.error}
    assert errors["gone.png"] == "gone.png: it is not there any more"
    assert "ACCESS_DENIED" in errors["forbidden.png"]
    assert "Timeout was reached" in errors["slow.png"]
    assert errors["broken.png"].startswith("broken.png: not a readable image (cannot identify")
    assert all("\n" not in error for error in errors.values())
    server.put("faults/gone.png", pictures()["000.png"])
    again = discover_collection(find_collection(server.uri("faults")), discoverer, tmp_path / "out")
    assert (again.known, again.unavailable, again.unreadable) == (2, 0, 1)


def test_a_killed_run_over_shards_goes_on_with_the_same_bytes(discoverer: Discoverer, tmp_path: Path) -> None:
    for number, part in enumerate((list(pictures().items())[:2], list(pictures().items())[2:])):
        write_tar(tmp_path / "shards" / f"{number}.tar", dict(part))
    shards = find_collection(str(tmp_path / "shards"))
    assert shards.names == ("0.tar/000.png", "0.tar/001.png", "1.tar/002.png", "1.tar/003.png", "1.tar/004.png")
    discover_collection(shards, discoverer, tmp_path / "whole")

    def stop(progress: object) -> None:
        if progress.done == 3:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        discover_collection(shards, discoverer, tmp_path / "out", on_progress=stop)
    assert discover_collection(shards, discoverer, tmp_path / "out").known == 3
    for name in ("predictions.jsonl", "maps.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_store_is_asked_for_several_images_at_once_and_not_for_all(
    server: S3Server, backbone: Backbone, tmp_path: Path
) -> None:
    for number in range(30):
        server.put(f"many/{number:02}.png", pictures()["000.png"])
    server.slow["many/"] = 0.15
    server.most_at_once = 0
    discoverer = Discoverer(backbone, device="cpu", batch_size=4)
    try:
        outcomes = discoverer.outcomes(find_collection(server.uri("many")))
        next(outcomes)
        read = sum(method == "GET" and path.endswith(".png") for method, path, _ in server.requests if "/many/" in path)
        assert len(list(outcomes)) == 29
    finally:
        server.slow.clear()
    assert server.most_at_once >= 5  # threads that decode are as many as cores
    assert read <= 8 + 4  # two batches ahead of the first


def test_an_image_travels_to_another_process_and_is_read_there(server: S3Server, tmp_path: Path) -> None:
    expected = read_image(pictures()["003.png"]).pixels
    for source in kept(tmp_path, server).values():
        found = find_collection(source)
        image = pickle.loads(pickle.dumps(found[3]))
        assert pickle.loads(pickle.dumps(found)).source(found.names[3]) == image
        assert (read_image(image).pixels == expected).all()
        assert len(pickle.dumps(image)) < 1000


def test_a_run_over_a_source_can_be_looked_at_and_exported_with_its_pictures(
    server: S3Server, discoverer: Discoverer, tmp_path: Path
) -> None:
    sources = kept(tmp_path, server)
    for kind in ("tar", "parquet", "arrow file", "saved by datasets", "s3:// folder", "s3:// tar"):
        out = tmp_path / "out of" / kind.replace("/", "_")
        discover_collection(find_collection(sources[kind]), discoverer, out)
        written = write_gallery(RunFolder(out), out / "report.html")
        assert (written.shown, written.gone, written.changed) == (5, 0, 0), kind
        assert main(["export", str(out), "--format", "yolo", "--out", str(out / "yolo"), "--keep-empty"]) == 0
        copied = sorted((out / "yolo/images").rglob("*.png"))
        assert sorted(path.read_bytes() for path in copied) == sorted(pictures().values()), kind
    table = tmp_path / "table.parquet"
    before = table.read_bytes()
    again = ["export", str(tmp_path / "out of/parquet"), "--format", "parquet", "--overwrite", "--out"]
    assert main([*again, str(table)]) == 2
    assert main([*again, str(table.with_name("beside.parquet"))]) == 0  # the source is one file
    discover_collection(find_collection(str(table.parent / "*.parquet")), discoverer, tmp_path / "out of/glob")
    again[1] = str(tmp_path / "out of/glob")
    assert main([*again, str(table.with_name("found.parquet"))]) == 2
    assert table.read_bytes() == before
    table.write_bytes(b"no table any more")
    forget_tables()
    yolo = ["--format", "yolo", "--out", str(tmp_path / "yolo"), "--keep-empty"]
    assert main(["export", str(tmp_path / "out of/parquet"), *yolo]) == 2
    (tmp_path / "shards/0.tar").unlink()
    assert write_gallery(RunFolder(tmp_path / "out of/tar"), tmp_path / "report.html").gone == 5
    gone = ["export", str(tmp_path / "out of/tar"), "--format", "voc", "--out", str(tmp_path / "voc")]
    assert main(gone) == 2
    assert main([*gone, "--files", "none"]) == 0


def test_a_shard_that_grew_is_the_same_run(discoverer: Discoverer, tmp_path: Path) -> None:
    first = dict(list(pictures().items())[:3])
    shard = write_tar(tmp_path / "shards/0.tar", first)
    discover_collection(find_collection(str(shard)), discoverer, tmp_path / "out")
    write_tar(shard, pictures())
    write_parquet(tmp_path / "shards/1.parquet", struct_table(pictures()))
    summary = discover_collection(find_collection(str(shard.parent)), discoverer, tmp_path / "out")
    assert (summary.known, summary.images) == (3, 10)


def test_commands_take_sources(
    server: S3Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = kept(tmp_path, server)
    model = ["--backbone", NAME, "--weights", str(save_weights(small(), tmp_path / "w.safetensors")), "--device", "cpu"]
    image = server.uri("pictures/folder/001.png")
    assert main(["predict", sources["tar"], image, *model, "--json", "-", "--plot", str(tmp_path / "plots")]) == 0
    names = [json.loads(line)["image_id"] for line in capsys.readouterr().out.splitlines()]
    shard = sources["tar"]
    assert names == [*(f"{shard}/{name}" for name in pictures()), "s3://pictures/folder/001.png"]
    assert {path.name for path in (tmp_path / "plots").iterdir()} >= {"000.png.png", "001.png.png", "001.png-2.png"}
    learned = str(tmp_path / "o.safetensors")
    assert main(["learn", sources["s3:// parquet"], *model, "--out", learned]) == 0
    out = str(tmp_path / "found")
    assert main(["discover", sources["s3:// tar"], *model, "--objectness", learned, "--out", out]) == 0
    assert "5 photos" in capsys.readouterr().out
    assert main(["discover", server.uri("pictures/none"), *model, "--out", out]) == 2
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    stored, files = server.uri("pictures/runs/found"), ("predictions.jsonl", "maps.jsonl", "failed.csv")
    for known in ("", "5 of these had been done before"):  # the second goes on with what the store has
        assert main(["discover", sources["s3:// tar"], *model, "--objectness", learned, "--out", stored]) == 0
        assert known in capsys.readouterr().out
        assert not list((tmp_path / "cache/lostreg/runs").iterdir())
    stores.fetch_folder(stored, tmp_path / "fetched")
    for name in files:
        assert (tmp_path / "fetched" / name).read_bytes() == (Path(out) / name).read_bytes()
    other = ["discover", sources["tar"], *model, "--out", server.uri("pictures/runs/other")]
    server.forbidden.add("runs/other/predictions.jsonl")
    try:
        assert main(other) == 2
    finally:
        server.forbidden.clear()
    assert "cannot be written to" in capsys.readouterr().err
    path, mark, query = other[-1].partition("?")
    with folder_of(f"{path}/{mark}{query}") as held:  # a second run takes nothing away
        assert main(other) == 2
        assert "is in use: another run is writing there" in capsys.readouterr().err
        assert (held / "predictions.jsonl").exists()
        (kept_there,) = (tmp_path / "cache/lostreg/runs").iterdir()
    assert not kept_there.exists()
    assert main(other) == 0
    assert "5 of these had been done before" in capsys.readouterr().out
    stores.fetch_folder(server.uri("pictures/runs/other"), tmp_path / "other")
    assert len((tmp_path / "other/predictions.jsonl").read_bytes().splitlines()) == 5
    assert main(["attention", sources["tar"], *model]) == 2
