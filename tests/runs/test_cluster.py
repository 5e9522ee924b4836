"""Workers of Ray: the bytes of one process, whoever is lost on the way."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import scenes
from fabricate import write_voc
from PIL import Image

from lostreg import Discoverer
from lostreg.datasets import load_benchmark
from lostreg.datasets.folder import Collection, find_collection
from lostreg.errors import ClusterError, ImageError, LostregWarning, OptionError
from lostreg.models.backbone import Backbone
from lostreg.progress import Progress
from lostreg.runs import cluster as workers_of_ray
from lostreg.runs import discover as run_of_discover
from lostreg.runs.cluster import RaySession, RayWorkers, ray_session
from lostreg.runs.discover import discover_collection
from lostreg.runs.entries import make_entry
from lostreg.runs.evaluate import evaluate

ray = pytest.importorskip("ray", reason="needs Ray: pip install lostreg[ray]")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::ResourceWarning")]
FILES = ("predictions.jsonl", "maps.jsonl", "failed.csv")
CHUNK = 4  # images


@pytest.fixture(scope="module")
def nodes(repository: Path) -> Iterator[Any]:
    """Two nodes on this machine, which this process has joined."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")]))
        patched.setenv("RAY_USAGE_STATS_ENABLED", "0")
        head = {"num_cpus": 2, "num_gpus": torch.cuda.device_count(), "include_dashboard": False}
        found = Cluster(initialize_head=True, head_node_args=head)
        found.add_node(num_cpus=2)
        ray.init(address=found.address, log_to_driver=False, logging_level="CRITICAL")
        found.wait_for_nodes()
        yield found
        ray.shutdown()
        found.shutdown()


@pytest.fixture(scope="module")
def session(nodes: Any) -> Iterator[RaySession]:
    with ray_session() as found:
        yield found


@pytest.fixture(scope="module")
def pair(session: RaySession, discoverer: Discoverer, one_thread: None) -> RayWorkers:
    """Two workers, one on each node, for those who do not end them."""
    return session.workers(discoverer, 2)


@pytest.fixture(scope="module")
def discoverer(backbone: Backbone) -> Discoverer:
    return Discoverer(backbone, device="cpu", batch_size=2, max_objects=3, min_score=0.05)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """Of several shapes, so that neighbours matter; the last batch of the list is short, and one photo is broken."""
    folder = tmp_path_factory.mktemp("photos")
    for number, picture in enumerate(scenes(21)):
        Image.fromarray(picture).save(folder / f"{number:02}.png")
    (folder / "06.png").write_text("no picture")
    return find_collection(str(folder))


@pytest.fixture(scope="module")
def plain(photos: Collection, backbone: Backbone, one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    out = tmp_path_factory.mktemp("plain")
    discover_collection(photos, Discoverer(backbone, device="cpu", batch_size=2, max_objects=3, min_score=0.05), out)
    return out


@pytest.fixture
def computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Counter[str]]:
    """How often each image has been computed; workers end at those that the file ``fatal`` names, once each."""
    record, fatal = tmp_path / "computed", tmp_path / "fatal"
    record.touch()
    fatal.touch()

    def make(asked: Any, outcome: Any, **options: bool) -> Any:
        if asked.image_id in fatal.read_text().split():
            fatal.write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
        with record.open("a") as file:
            file.write(asked.image_id + "\n")
        return make_entry(asked, outcome, **options)

    monkeypatch.setattr(run_of_discover, "make_entry", make)
    return lambda: Counter(record.read_text().split())


def contents(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in FILES}


def results(out: Path) -> dict[str, Any]:
    found = json.loads((out / "results.json").read_text())
    return {name: value for name, value in found.items() if name != "run"}


def test_two_workers_on_two_nodes_write_what_one_process_writes(
    photos: Collection, discoverer: Discoverer, plain: Path, pair: RayWorkers, tmp_path: Path
) -> None:
    seen: list[Progress] = []
    assert pair.chunk_images == CHUNK
    summary = discover_collection(photos, discoverer, tmp_path, workers=pair, on_progress=seen.append)
    assert contents(tmp_path) == contents(plain)
    assert results(tmp_path) == results(plain)
    assert (summary.images, summary.unreadable) == (21, 1)
    assert [one.done for one in seen] == list(range(1, 22))
    assert sum(one.error is not None for one in seen) == 1


def test_a_benchmark_has_the_score_and_lines_of_one_process(
    discoverer: Discoverer, pair: RayWorkers, tmp_path: Path
) -> None:
    benchmark = load_benchmark("voc", root=write_voc(tmp_path / "voc", 9))
    alone = evaluate(benchmark, discoverer, tmp_path / "alone", masks=True)
    assert evaluate(benchmark, discoverer, tmp_path / "out", masks=True, workers=pair) == alone
    for name in FILES[:2]:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    with pytest.raises(OptionError, match="drawn where one process computes"):
        evaluate(benchmark, discoverer, tmp_path / "out", workers=pair, on_discovery=lambda *_: None)


def test_pictures_of_masks_come_back_and_so_does_what_a_worker_tells(
    photos: Collection, discoverer: Discoverer, pair: RayWorkers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    few = Collection(photos.root, photos.names[:3])
    pictures = []
    monkeypatch.setitem(pair._worker, "elsewhere", "an abacus")
    for workers, told in (
        (None, nullcontext()),
        (pair, pytest.warns(LostregWarning, match="on an abacus and on cpu: ")),
    ):
        out = tmp_path / str(workers is None)
        with told:
            discover_collection(few, discoverer, out, mask_pictures=True, workers=workers)
        pictures.append([path.read_bytes() for path in sorted((out / "masks").iterdir())])
    assert pictures[0] == pictures[1]
    assert len(pictures[0]) == 3


def test_who_began_a_run_and_who_goes_on_with_it_is_all_one(
    photos: Collection, discoverer: Discoverer, plain: Path, pair: RayWorkers, tmp_path: Path
) -> None:
    def stop(progress: Progress) -> None:
        if progress.done == CHUNK + 1:
            raise KeyboardInterrupt

    for first, then in ((pair, None), (None, pair)):
        out = tmp_path / str(first is None)
        with pytest.raises(KeyboardInterrupt):
            discover_collection(photos, discoverer, out, workers=first, on_progress=stop)
        assert discover_collection(photos, discoverer, out, workers=then).known > CHUNK
        assert contents(out) == contents(plain)


def test_a_list_that_has_changed_goes_on_as_in_one_process(
    photos: Collection, discoverer: Discoverer, pair: RayWorkers, tmp_path: Path
) -> None:
    fewer = Collection(photos.root, [*photos.names[1:12:2], photos.names[15]])
    later = Collection(photos.root, [name for name in photos.names if name != photos.names[15]])
    for workers in (None, pair):
        out = tmp_path / str(workers is None)
        discover_collection(fewer, discoverer, out)
        with pytest.warns(LostregWarning, match="1 images of the earlier run are gone"):
            discover_collection(later, discoverer, out, workers=workers)
    assert contents(tmp_path / "False") == contents(tmp_path / "True")


def test_with_strict_the_first_unreadable_image_ends_the_run_and_what_came_before_is_kept(
    photos: Collection, discoverer: Discoverer, plain: Path, pair: RayWorkers, tmp_path: Path
) -> None:
    with pytest.raises(ImageError, match=r"06\.png"):
        discover_collection(photos, discoverer, tmp_path, strict=True, workers=pair)
    known = len((tmp_path / "predictions.jsonl").read_bytes().splitlines())
    assert 2 <= known < 21
    assert discover_collection(photos, discoverer, tmp_path, workers=pair).known == known
    assert contents(tmp_path) == contents(plain)


def test_a_worker_that_is_killed_costs_the_chunks_that_it_had(
    photos: Collection,
    discoverer: Discoverer,
    plain: Path,
    session: RaySession,
    computed: Callable[[], Counter[str]],
    tmp_path: Path,
) -> None:
    (tmp_path / "fatal").write_text("09.png")  # the second of the batch that it has computed
    out = tmp_path / "out"
    discover_collection(photos, discoverer, out, workers=session.workers(discoverer, 2))
    assert contents(out) == contents(plain)
    assert set(computed()) == set(photos.names)
    again = {name for name, times in computed().items() if times > 1}
    assert again == {"08.png"}


def test_a_node_that_is_lost_costs_the_chunks_that_it_had(
    photos: Collection,
    discoverer: Discoverer,
    plain: Path,
    session: RaySession,
    nodes: Any,
    computed: Callable[[], Counter[str]],
    tmp_path: Path,
) -> None:
    lost = list(nodes.worker_nodes)

    def lose(progress: Progress) -> None:
        if progress.done >= CHUNK and lost:
            nodes.remove_node(lost.pop(), allow_graceful=False)

    workers = session.workers(discoverer, 2)
    discover_collection(photos, discoverer, tmp_path / "out", workers=workers, on_progress=lose)
    nodes.add_node(num_cpus=2)
    nodes.wait_for_nodes()
    assert contents(tmp_path / "out") == contents(plain)
    assert set(computed()) == set(photos.names)
    assert sum(computed().values()) - len(photos) <= 2 * CHUNK
    assert max(computed().values()) <= 2


def test_images_that_end_every_worker_end_the_run(
    photos: Collection, discoverer: Discoverer, session: RaySession, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fatal(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(run_of_discover, "make_entry", fatal)
    monkeypatch.setattr(workers_of_ray, "_MOST_FRUITLESS", 2)
    message = (
        r"2 times workers ended before they had computed any of 00.png to 20.png.*logs are in its temporary folder"
    )
    with pytest.raises(ClusterError, match=message):
        discover_collection(photos, discoverer, tmp_path / "out", workers=session.workers(discoverer, 1))


def odd_error() -> Callable[[str], Exception]:
    """Makes an error that takes more to be made than it keeps, so that its pickle is of no use."""

    class OddError(Exception):
        def __init__(self, text: str, *, more: int) -> None:
            super().__init__(text)
            self.more = more

    return partial(OddError, more=1)


@pytest.mark.parametrize(("make", "kind"), [(ArithmeticError, ArithmeticError), (odd_error(), RuntimeError)])
def test_what_a_worker_raises_is_raised(
    photos: Collection,
    discoverer: Discoverer,
    pair: RayWorkers,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    make: Callable[[str], Exception],
    kind: type[Exception],
) -> None:
    def faulty(*_: Any, **__: Any) -> None:
        raise make("a fault")

    monkeypatch.setattr(run_of_discover, "make_entry", faulty)
    with pytest.raises(kind, match="a fault") as raised:
        discover_collection(photos, discoverer, tmp_path / "out", workers=pair)
    assert raised.value.__notes__ == ["in a worker; Ray's logs are in its temporary folder"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use (CUDA)")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_worker_on_a_gpu_writes_what_one_process_writes(
    photos: Collection, backbone: Backbone, session: RaySession, tmp_path: Path, precision: str
) -> None:
    discoverer = Discoverer(backbone, device="cuda", precision=precision, batch_size=2, method="parts", max_objects=3)
    discover_collection(photos, discoverer, tmp_path / "alone")
    workers = session.workers(discoverer)
    assert workers.chunk_images == 32
    discover_collection(photos, discoverer, tmp_path / "out", workers=workers)
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    assert results(tmp_path / "out") == results(tmp_path / "alone")


DRIVER = """
    import sys
    from pathlib import Path

    import torch
    from lostreg import Discoverer
    from lostreg.datasets.folder import find_collection
    from lostreg.models.backbone import build_backbone, find_spec
    from lostreg.runs.cluster import ray_session
    from lostreg.runs.discover import discover_collection

    photos, out, address = sys.argv[1:]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    backbone = build_backbone(find_spec("dinov2_vits14_reg"), depth=2)
    discoverer = Discoverer(backbone, device="cpu", batch_size=2, max_objects=3, min_score=0.05)
    with ray_session(address) as session:
        discover_collection(find_collection(photos), discoverer, Path(out), workers=session.workers(discoverer, 2))
"""


def test_a_driver_that_is_killed_again_and_again_ends_with_the_same_bytes(
    photos: Collection, plain: Path, nodes: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", textwrap.dedent(DRIVER), str(photos.root), str(out), nodes.address]
    predictions = out / "predictions.jsonl"
    for lines in (1, 9):
        driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        while not predictions.exists() or len(predictions.read_bytes().splitlines()) < lines:
            assert driver.poll() is None, driver.communicate()[0].decode()
            time.sleep(0.001)
        driver.kill()
        driver.communicate()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert contents(out) == contents(plain)


def test_ray_is_started_and_stopped_without_a_word(photos: Collection, repository: Path, tmp_path: Path) -> None:
    """Ctrl-C in the middle: the line of any command, nothing of Ray's, and none of its processes is left."""
    script = tmp_path / "driver.py"
    before = "import lostreg.runs.discover as d, os, sys, time\nfrom lostreg.cli.main import main\n"
    slow = "append = d._append_failed\nd._append_failed = lambda *a: (time.sleep(0.05), append(*a))[1]\n"
    script.write_text(before + slow + "sys.exit(main(sys.argv[1:]))\n")
    out = tmp_path / "out"
    command = [sys.executable, str(script), "discover", str(photos.root), "--out", str(out), "--ray", "auto"]
    command += ["--backbone", "imgfocus_vits14", "--device", "cpu", "--batch-size", "1", "--objectness", "none"]
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    driver = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    predictions = out / "predictions.jsonl"
    while not predictions.exists() or not predictions.stat().st_size:
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.01)
    left = children(driver.pid)
    os.killpg(driver.pid, signal.SIGINT)  # as a terminal does
    said, told = driver.communicate(timeout=60)
    assert (driver.returncode, said) == (130, "")
    lines = [line for line in told.replace("\r", "\n").splitlines() if line and "img/s" not in line]
    assert all(line.startswith("lostreg: ") for line in lines), lines
    assert left
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in left) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in left if Path(f"/proc/{pid}").exists()]


def children(pid: int) -> list[int]:
    """All below a process."""
    below = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return below + [further for child in below for further in children(child)]


def test_an_address_where_nobody_listens_is_told_at_once() -> None:
    with pytest.raises(ClusterError, match=r"no cluster at 127\.0\.0\.1:9: .*; `ray start --head` starts one"):
        workers_of_ray._check_listening("127.0.0.1:9")
    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()
        answering = threading.Thread(target=lambda: server.accept()[0].sendall(b"HTTP/1.1 400 Bad Request\r\n"))
        answering.start()
        with pytest.raises(ClusterError, match=f"no cluster at {host}:{port}: something else listens there"):
            workers_of_ray._check_listening(f"{host}:{port}")
        answering.join()
    for wrong in ("[::1]", "here", "ray://127.0.0.1:10001", "127.0.0.1:", ":6379", ""):
        with pytest.raises(OptionError, match="expected auto or the HOST:PORT of a cluster's head"):
            workers_of_ray._check_listening(wrong)


def test_without_ray_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(OptionError, match=r'Ray is not installed: pip install "lostreg\[ray\]"'), ray_session():
        raise AssertionError("there is no Ray")


def test_more_workers_than_cores_are_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(OptionError, match=r"expected at most \d+ workers on this machine"), ray_session(workers=900):
        raise AssertionError("Ray has started")


@pytest.mark.parametrize(
    ("cores", "workers", "most", "threads"),
    [
        ([2], 1, 2, 2),
        ([2], 2, 2, 1),
        ([2], 5, 2, 1),
        ([64], 1, 64, 64),
        ([64], 16, 64, 4),
        ([64], 16, 2, 2),
        ([1, 1], 2, 4, 1),
        ([8, 2], 3, 8, 2),
    ],
)
def test_threads_are_those_of_the_driver_as_far_as_there_are_cores(
    cores: list[int], workers: int, most: int, threads: int
) -> None:
    assert workers_of_ray._threads_each(cores, workers, most) == threads


def test_more_workers_than_there_is_room_for_are_refused_or_told(discoverer: Discoverer, session: RaySession) -> None:
    here = RaySession("its logs", is_here=True)
    with pytest.raises(OptionError, match="5 workers on cpu: Ray has room for 4"):
        here.workers(discoverer, 5)
    with pytest.warns(LostregWarning, match="room for 4 of 5 workers: the others join"):
        assert session.workers(discoverer, 5).device.startswith("cpu: ")
