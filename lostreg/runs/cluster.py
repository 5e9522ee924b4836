"""Workers that Ray runs, on this machine or on many: each computes chunks of a run's list as one process would.

The process that has the run's folder (the driver) hands out chunks, a few at a time to a worker, and appends what comes
back: so much is in memory and no more, however many images there are. A worker feeds its chunks to one stream of
images, so that the next is being decoded while one is computed. Chunks are whole batches of the list, and nothing of
one batch shares a pack with another: what is found in an image is what one process finds, to the bit, on the same kind
of device.

A worker or node that is lost costs the chunks that it had at hand: they are handed out again. A driver that is killed
takes its workers with it, and goes on by the lines of its folder, as any run.
"""

import logging
import os
import queue
import signal
import socket
import threading
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, NamedTuple

import torch

from lostreg.errors import ClusterError, LostregError, LostregWarning, OptionError
from lostreg.images.allocator import keep_freed_memory
from lostreg.images.decode import ImageSource
from lostreg.inference.discoverer import Discoverer
from lostreg.inference.stream import available_cores
from lostreg.runs.entries import Asked, Entry, Make
from lostreg.runs.results import describe_device

HERE: Final = "auto"  # the address that starts Ray on this machine
_AT_HAND: Final = 3  # chunks of a worker: one is computed, the next is being decoded, and one is there when that ends
_BATCHES: Final = {"cuda": 16}  # of a chunk: some seconds of work
_OTHER_BATCHES: Final = 2
_MOST_LOSSES: Final = 5  # workers that a chunk may lose, and fewest failed starts in a row that end a run
_PATIENCE: Final = 60.0  # seconds without any worker, after which a person is told
_CONNECTING: Final = 5.0  # seconds
_LEAST_ROOM: Final = 2  # workers, on a machine of one core, too
_HTTP2_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # RFC 9113, 3.4
_HTTP2_SETTINGS: Final = b"\4"  # the kind of the first frame that comes back
_ENVIRONMENT: Final = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # what its daemons say of workers that end; read when Ray is imported
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


class _Job(NamedTuple):
    """A chunk at a worker."""

    make: Make
    chunk: Sequence[Asked]
    done: "Future[list[Entry]]"


class _Worker:
    """What Ray runs in a process of its own.

    Args:
        held: the discoverer in Ray's store, alone in a list.
        device: where this one computes.
        threads: of PyTorch on a CPU.
    """

    def __init__(self, held: list[Any], device: str, threads: int) -> None:
        self._failure: Exception | None = None
        self._told: list[str] = []
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        warnings.simplefilter("always", LostregWarning)
        warnings.showwarning = self._hear  # type: ignore[assignment]
        try:
            self._discoverer = _discoverer_on(held[0], device, threads)
        except Exception as error:
            self._failure = error
        threading.Thread(target=self._work, daemon=True).start()

    def _hear(self, message: Warning | str, category: type[Warning], *_: Any) -> None:
        if issubclass(category, LostregWarning):
            self._told.append(str(message))

    def device(self) -> str:
        """Where this one computes, as `describe_device` says it."""
        if self._failure is not None:
            raise self._failure
        backbone = self._discoverer.backbone
        return describe_device(backbone.device, backbone.dtype)

    def compute(self, make: Make, chunk: Sequence[Asked]) -> tuple[list[Entry], list[str]]:
        """The entries of a chunk, and warnings that came up meanwhile. Called while another chunk is computed."""
        job = _Job(make, chunk, Future())
        self._jobs.put(job)
        entries = job.done.result()
        told, self._told = self._told, []
        return entries, told

    def _work(self) -> None:
        while True:
            self._stream(self._jobs.get())

    def _stream(self, job: _Job) -> None:
        """Compute a chunk, and in the same stream those that are at hand when its last image is taken."""
        begun: deque[_Job] = deque()
        entries: list[Entry] = []
        try:
            for outcome in self._discoverer.outcomes(self._sources(job, begun)):
                make, chunk, done = begun[0]
                entries.append(make(chunk[len(entries)], outcome))
                if len(entries) == len(chunk):
                    begun.popleft()
                    done.set_result(entries)
                    entries = []
        except BaseException as error:
            for one in begun or [job]:
                if not one.done.done():
                    one.done.set_exception(error)

    def _sources(self, job: _Job | None, begun: deque[_Job]) -> Iterator[ImageSource]:
        while job is not None:
            begun.append(job)
            yield from (asked.source for asked in job.chunk)
            if len(job.chunk) % self._discoverer.options.batch_size:
                return  # the end of the list: what follows would be in its last batch
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return


def _discoverer_on(held: Any, device: str, threads: int) -> Discoverer:
    """The discoverer that a worker holds, with its share of this machine."""
    import ray

    keep_freed_memory()
    cores = threads
    if device == "cpu":
        torch.set_num_threads(threads)
    else:
        node = ray.get_runtime_context().get_node_id()
        gpus = [one["Resources"].get("GPU", 1) for one in _nodes() if one["NodeID"] == node]
        cores = available_cores() // max(1, int(max(gpus, default=1)))
    discoverer: Discoverer = ray.get(held)
    discoverer = discoverer.on(device)
    discoverer.stream.cores = cores
    return discoverer


@dataclass
class _Chunk:
    """Images that are handed out together, and how many workers were lost with them."""

    images: Sequence[Asked]
    losses: int = 0


class RayWorkers:
    """Workers that hold one discoverer: see `RaySession.workers`.

    Attributes:
        device: where they compute, as `describe_device` says it.
        chunk_images: images that one is given at a time: a multiple of what shares packs.
    """

    def __init__(self, start: Callable[[], Any], count: int, chunk_images: int, logs: str) -> None:
        self.chunk_images = chunk_images
        self.device = ""
        self._start = start
        self._logs = logs
        self._starting: dict[Any, Any] = {}  # workers, by what they will answer first
        self._at_hand: Counter[Any] = Counter()  # chunks of each worker that has answered
        self._failed = 0  # starts, one after the other
        self._most_failed = max(count, _MOST_LOSSES)  # a lost node may take all of its own
        for _ in range(count):
            self._add()
        while not self._at_hand:
            self._welcome(self._next([]))

    def entries(self, make: Make, chunks: Iterable[Sequence[Asked]]) -> Iterator[Sequence[Entry]]:
        """The entries of each chunk, in whatever order chunks are done.

        Raises:
            ClusterError: if workers are lost again and again.
        """
        from ray.exceptions import RayError, RayTaskError

        fresh, waiting = map(_Chunk, chunks), deque[_Chunk]()
        running: dict[Any, tuple[Any, _Chunk]] = {}  # by what will be answered
        try:
            while True:
                self._hand_out(make, fresh, waiting, running)
                if not running and not waiting:
                    return
                answer = self._next(list(running))
                if answer in self._starting:
                    self._welcome(answer)
                    continue
                worker, chunk = running.pop(answer)
                self._at_hand.subtract([worker] if worker in self._at_hand else [])
                try:
                    entries, told = _get(answer)
                except RayTaskError as error:
                    raise self._explained(error) from error
                except RayError as error:  # the worker or its node is gone
                    self._replace(worker)
                    self._count_loss(chunk, error)
                    waiting.append(chunk)
                    continue
                for message in told:
                    warnings.warn(message, LostregWarning, stacklevel=2)
                yield entries
        finally:
            self._at_hand.subtract(worker for worker, _ in running.values() if worker in self._at_hand)

    def _hand_out(
        self, make: Make, fresh: Iterator[_Chunk], waiting: deque[_Chunk], running: dict[Any, tuple[Any, _Chunk]]
    ) -> None:
        """Give chunks to whoever has the fewest; afterwards one is waiting, if there is any."""
        while True:
            if not waiting:
                waiting.extend(islice(fresh, 1))
            worker = min(self._at_hand, key=self._at_hand.__getitem__, default=None)
            if not waiting or worker is None or self._at_hand[worker] == _AT_HAND:
                return
            chunk = waiting.popleft()
            running[worker.compute.remote(make, chunk.images)] = worker, chunk
            self._at_hand[worker] += 1

    def _next(self, running: list[Any]) -> Any:
        """What is answered next, be it by a worker that starts."""
        import ray

        while True:
            done, _ = ray.wait([*running, *self._starting], timeout=_PATIENCE)
            if done:
                return done[0]
            if not self._at_hand:
                message = f"no worker has started for {_PATIENCE:g} seconds: waiting for Ray to find room for one"
                warnings.warn(f"{message}; its logs are in {self._logs}", LostregWarning, stacklevel=2)

    def close(self) -> None:
        """End the workers, whatever they are at."""
        import ray

        for worker in (*self._at_hand, *self._starting.values()):
            with suppress(Exception):  # the cluster may be gone
                ray.kill(worker)

    def _add(self) -> None:
        worker = self._start()
        self._starting[worker.device.remote()] = worker

    def _welcome(self, answer: Any) -> None:
        """Take in a worker that has started, or start another one."""
        from ray.exceptions import RayError, RayTaskError

        worker = self._starting.pop(answer)
        try:
            device = _get(answer)
        except RayTaskError as error:
            raise self._explained(error) from error
        except RayError as error:
            self._failed += 1
            if self._failed == self._most_failed:
                raise ClusterError(f"no worker starts: {self._last_words(error)}") from error
            self._add()
            return
        self._failed = 0
        self._at_hand[worker] = 0
        self.device = self.device or device
        if device != self.device:
            message = f"workers compute on {self.device} and on {device}: products are rounded otherwise there"
            warnings.warn(message, LostregWarning, stacklevel=2)

    def _replace(self, worker: Any) -> None:
        """Start another one in the place of one that is gone, or cannot be reached."""
        import ray

        if worker in self._at_hand:
            del self._at_hand[worker]
            ray.kill(worker)
            self._add()

    def _count_loss(self, chunk: _Chunk, error: Exception) -> None:
        chunk.losses += 1
        if chunk.losses == _MOST_LOSSES:
            names = f"{chunk.images[0].image_id} to {chunk.images[-1].image_id}"
            message = f"{_MOST_LOSSES} workers ended while they computed {names}"
            raise ClusterError(f"{message}: {self._last_words(error)}") from error

    def _last_words(self, error: Exception) -> str:
        return f"{str(error).strip().splitlines()[-1]} (Ray's logs are in {self._logs})"

    def _explained(self, error: Any) -> Exception:
        """What a worker has raised."""
        cause: Exception = error.cause
        if not isinstance(cause, LostregError):
            cause.add_note(f"in a worker; Ray's logs are in {self._logs}")
        return cause


def _get(answer: Any) -> Any:
    import ray

    return ray.get(answer)


def _nodes() -> list[dict[str, Any]]:
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return nodes


@dataclass(frozen=True)
class RaySession:
    """A Ray that this process has started or joined.

    Attributes:
        logs: where it writes what it would say.
        is_here: whether it is this machine's alone.
    """

    logs: str
    is_here: bool

    @contextmanager
    def workers(self, discoverer: Discoverer, count: int | None = None) -> Iterator[RayWorkers]:
        """Start workers on the kind of device that a discoverer is on; they end with this.

        Args:
            discoverer: what each of them holds. On a CPU its results depend on PyTorch's threads: a worker has as many
                as this process, or as ``count`` of them leave each.
            count: how many; None for one a GPU, or as many as there are cores for.

        Raises:
            OptionError: if there is no room for so many, or the device is neither a CPU nor NVIDIA's.
            ClusterError: if none of them starts.
        """
        import ray

        device = discoverer.backbone.device.type
        nodes = [node["Resources"] for node in _nodes() if node["Alive"]]
        gpus = int(sum(node.get("GPU", 0) for node in nodes))
        threads = 1
        if device == "cuda":
            room, resources = gpus, {"num_gpus": 1, "num_cpus": 0}
        elif device == "cpu":
            if gpus and not self.is_here:
                message = f"{gpus} GPUs of the cluster are not used, as this process computes on a CPU"
                warnings.warn(message, LostregWarning, stacklevel=3)
            cores = [int(node.get("CPU", 0)) for node in nodes]
            threads = _threads_each(cores, count or 1, torch.get_num_threads())
            room, resources = sum(one // threads for one in cores), {"num_cpus": threads}
        else:
            raise OptionError(f"workers compute on CPUs and NVIDIA GPUs, not on {device}: use --device cpu")
        count = count or room
        if room < count and (self.is_here or not room):
            raise OptionError(f"{count} workers on {device}: Ray has room for {room}")
        if room < count:
            message = f"the cluster has room for {room} of {count} workers: the others join when there is more"
            warnings.warn(message, LostregWarning, stacklevel=3)
        held = [ray.put(discoverer.on("cpu"))]
        actor = ray.remote(_Worker).options(**resources, max_concurrency=_AT_HAND + 1, scheduling_strategy="SPREAD")
        chunk = discoverer.options.batch_size * _BATCHES.get(device, _OTHER_BATCHES)
        workers = RayWorkers(lambda: actor.remote(held, device, threads), count, chunk, self.logs)
        try:
            yield workers
        finally:
            workers.close()


def _threads_each(cores: Sequence[int], workers: int, most: int) -> int:
    """How many threads so many workers can have each, on nodes of so many cores: at most those of this process."""
    fitting = (each for each in range(most, 1, -1) if sum(one // each for one in cores) >= workers)
    return next(fitting, 1)


@contextmanager
def ray_session(address: str = HERE, workers: int | None = None) -> Iterator[RaySession]:
    """Start Ray on this machine, or join a cluster; it is stopped or left in the end, whatever happens.

    A process that has joined one already uses that, and stays in it.

    Args:
        address: ``auto`` starts Ray here; HOST:PORT is that of a cluster's head.
        workers: how many there will be, which cores are found for.

    Raises:
        OptionError: if Ray is not installed, the address is none, or there are more workers than cores.
        ClusterError: if nobody listens at the address, or Ray does not start.
    """
    environment, on_terminate = dict(os.environ), signal.getsignal(signal.SIGTERM)
    os.environ.update(_ENVIRONMENT)
    try:
        ray = _import_ray()
        if ray.is_initialized():
            yield RaySession("its temporary folder", is_here=False)
            return
        cores = max(available_cores(), _LEAST_ROOM)
        if address == HERE and (workers or 0) > cores:  # Ray would try to start a process for each
            raise OptionError(f"expected at most {cores} workers on this machine of that many cores, not {workers}")
        try:
            logs = _start_ray(address, cores)
            yield RaySession(logs, is_here=address == HERE)
        finally:
            ray.shutdown()
    finally:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_terminate)


def _start_ray(address: str, cores: int) -> str:
    """Start Ray on this machine, which counts so many cores, or join a cluster; where its logs are."""
    import ray

    place: dict[str, Any] = {"address": "local", "num_cpus": cores, "include_dashboard": False}
    if address != HERE:
        _check_listening(address)
        place = {"address": address}
    try:
        started: Any = ray.init(**place, log_to_driver=False, logging_level=logging.CRITICAL)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        does = "does not start" if address == HERE else f"cannot join the cluster at {address}"
        raise ClusterError(f"Ray {does}: {error}") from error
    return f"{started.address_info['session_dir']}/logs"


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise OptionError('Ray is not installed: pip install "lostreg[ray]"') from error
    return ray


def _check_listening(address: str) -> None:
    """Ray itself would try for minutes.

    Raises:
        OptionError: if the address is none.
        ClusterError: if nobody listens there, or somebody who does not speak gRPC.
    """
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdecimal() and "/" not in host):
        raise OptionError(f"expected auto or the HOST:PORT of a cluster's head, such as 10.0.0.1:6379, not '{address}'")
    try:
        with socket.create_connection((host, int(port)), timeout=_CONNECTING) as connection:
            connection.sendall(_HTTP2_PREFACE)
            answer = connection.recv(9)
    except (OSError, OverflowError) as error:
        raise ClusterError(f"no cluster at {address}: {error}; `ray start --head` starts one") from error
    if answer[3:4] != _HTTP2_SETTINGS and "RAY_USE_TLS" not in os.environ:
        raise ClusterError(f"no cluster at {address}: something else listens there; `ray start --head` tells its own")
