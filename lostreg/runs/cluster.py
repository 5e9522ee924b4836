"""Workers that Ray Data runs, on this machine or on many: each computes chunks of a run's list as one process would.

The process that has the run's folder (the driver) makes a data set of the chunks that the run misses, has a pool of
actors map it, and appends what comes back. A worker has a few chunks at hand and feeds them to one stream of images, so
that the next is being decoded while one is computed. Chunks are whole batches of the list, and nothing of one batch
shares a pack with another: what is found in an image is what one process finds, to the bit, on the same kind of device.

What a worker or node had at hand that is lost is left out: the run misses it still, and has it computed in another
pass. A driver that is killed takes its workers with it, and goes on by the lines of its folder, as any run.
"""

import logging
import os
import pickle
import queue
import signal
import socket
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple
from weakref import WeakSet

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
_MOST_FRUITLESS: Final = 5  # passes in a row in which all chunks were lost, after which a run ends
_PATIENCE: Final = 60.0  # seconds without any worker, after which a person is told
_EXECUTOR: Final = "StreamingExecutor"  # how the names of Ray Data's threads begin
_NOTHING: Final = logging.CRITICAL + 1  # a level of logs
_CONNECTING: Final = 5.0  # seconds
_LEAST_ROOM: Final = 2  # workers, on a machine of one core, too
_HTTP2_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # RFC 9113, 3.4
_HTTP2_SETTINGS: Final = b"\4"  # the kind of the first frame that comes back
_ENVIRONMENT: Final = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # its core writes errors to the terminal, ordinary ones among them
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # what its daemons say of workers that end; read when Ray is imported
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


class _Job(NamedTuple):
    """A chunk at a worker."""

    chunk: Sequence[Asked]
    done: "Future[list[Entry]]"


class _Worker:
    """What Ray Data runs in a process of its own, in several threads: one a chunk that is at hand.

    Args:
        held: the discoverer in Ray's store, alone in a list.
        device: where this one computes.
        threads: of PyTorch on a CPU.
        elsewhere: where others compute, as `describe_device` says it.
        make: makes the entry of an image.
    """

    def __init__(self, held: list[Any], device: str, threads: int, elsewhere: str, make: Make) -> None:
        self._make = make
        self._told: list[str] = []
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        warnings.simplefilter("always", LostregWarning)
        warnings.showwarning = self._hear  # type: ignore[assignment]
        self._discoverer = _discoverer_on(held[0], device, threads)
        here = describe_device(self._discoverer.backbone.device, self._discoverer.backbone.dtype)
        if here != elsewhere:
            self._told.append(f"workers compute on {elsewhere} and on {here}: products are rounded otherwise there")
        threading.Thread(target=self._work, daemon=True).start()

    def _hear(self, message: Warning | str, category: type[Warning], *_: Any) -> None:
        if issubclass(category, LostregWarning):
            self._told.append(str(message))

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        """The entries of a chunk, with warnings that came up meanwhile, and what was raised: all pickled."""
        from ray import cloudpickle

        job = _Job(pickle.loads(batch["chunk"][0]), Future())  # noqa: S301 - of our own driver
        self._jobs.put(job)
        error = job.done.exception()
        entries = [] if error else job.done.result()
        if error is not None:
            try:
                pickle.loads(cloudpickle.dumps(error))  # type: ignore[no-untyped-call]  # noqa: S301
            except Exception:  # some kinds cannot be made again
                error = RuntimeError(f"{type(error).__name__}: {error}")
        told, self._told = self._told, []
        return {"answer": [cloudpickle.dumps((entries, told, error))]}  # type: ignore[no-untyped-call]

    def _work(self) -> None:
        while True:
            self._stream(self._jobs.get())

    def _stream(self, job: _Job) -> None:
        """Compute a chunk, and in the same stream those that are at hand when its last image is taken."""
        begun: deque[_Job] = deque()
        entries: list[Entry] = []
        try:
            for outcome in self._discoverer.outcomes(self._sources(job, begun)):
                chunk, done = begun[0]
                entries.append(self._make(chunk[len(entries)], outcome))
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


def _where(device: str, dtype: torch.dtype, threads: int) -> str:
    """Where a worker computes."""
    if device == "cpu":
        torch.set_num_threads(threads)
    return describe_device(torch.device(device), dtype)


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


class RayWorkers:
    """Workers that hold one discoverer: see `RaySession.workers`.

    Attributes:
        device: where they compute, as `describe_device` says it.
        chunk_images: images that one is given at a time: a multiple of what shares packs.
    """

    def __init__(
        self, worker: dict[str, Any], resources: dict[str, Any], count: int, chunk_images: int, logs: str
    ) -> None:
        self.device: str = worker["elsewhere"]
        self.chunk_images = chunk_images
        self._worker = worker
        self._resources = resources
        self._count = count
        self._logs = logs
        self._fruitless = 0  # passes, one after the other
        self._last_words = f"Ray's logs are in {logs}"  # of workers that are lost
        self._computed: Iterator[Any] = iter(())  # of the pass that is under way

    def entries(self, make: Make, chunks: Iterable[Sequence[Asked]]) -> Iterator[Sequence[Entry]]:
        """The entries of chunks, in whatever order they are done; those of a worker or node that is lost are left out.

        Raises:
            ClusterError: if they are all left out, several times in a row.
        """
        import ray.data
        from ray.util.annotations import RayDeprecationWarning

        self.close()  # a pass that was interrupted would go on beside this one
        items: list[dict[str, Any]] = [
            {"first": chunk[0].image_id, "last": chunk[-1].image_id, "chunk": pickle.dumps(chunk)} for chunk in chunks
        ]
        pool = ray.data.ActorPoolStrategy(
            size=min(self._count, len(items)),
            max_tasks_in_flight_per_actor=_AT_HAND,
            max_concurrent_calls_per_actor=_AT_HAND,
            enable_true_multi_threading=True,
        )
        parts = ray.data.from_items(items, override_num_blocks=len(items))
        with warnings.catch_warnings(action="ignore", category=RayDeprecationWarning):
            computed = parts.map_batches(
                _Worker,
                fn_constructor_kwargs={**self._worker, "make": make},
                batch_size=1,
                compute=pool,
                max_task_retries=0,  # chunks of a lost worker would wait until it is back
                **self._resources,
            )
        # Ray Data's other iterators have threads of their own, which end the process once Ray is gone.
        self._computed = computed.iter_internal_ref_bundles()
        self._fruitless += 1
        for answer in self._answers():
            entries, told, error = pickle.loads(answer)  # noqa: S301 - of our own workers
            for message in told:
                warnings.warn(message, LostregWarning, stacklevel=2)
            if error is not None:
                raise self._explained(error)
            self._fruitless = 0
            yield entries
        if self._fruitless == _MOST_FRUITLESS:
            names = f"any of {items[0]['first']} to {items[-1]['last']}"
            message = f"{_MOST_FRUITLESS} times workers ended before they had computed {names}"
            raise ClusterError(f"{message}: {self._last_words}")

    def _answers(self) -> Iterator[bytes]:
        """What workers answer to chunks; what is lost with a node is left out."""
        import ray
        from ray.exceptions import RayError

        while True:
            try:
                bundle = next(self._computed, None)  # held by nobody else, see `close`
            except RayError as error:  # no worker starts
                self._last_words = _last_words(error, self._logs)
                return
            if bundle is None:
                return
            for block in bundle.block_refs:
                try:
                    table: Any = ray.get(block)
                except RayError as error:
                    self._last_words = _last_words(error, self._logs)
                    continue
                yield from table.column("answer").to_pylist()

    def close(self) -> None:
        """Stop a pass that is under way: Ray Data does so once nobody takes its results."""
        self._computed = iter(())

    def _explained(self, error: Exception) -> Exception:
        """What a worker has raised."""
        if not isinstance(error, LostregError):
            error.add_note(f"in a worker; Ray's logs are in {self._logs}")
        return error


def _last_words(error: Exception, logs: str) -> str:
    return f"{str(error).strip().splitlines()[-1]} (Ray's logs are in {logs})"


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
        open: workers whose passes are stopped before it ends.
    """

    logs: str
    is_here: bool
    open: "WeakSet[RayWorkers]" = field(default_factory=WeakSet)

    def workers(self, discoverer: Discoverer, count: int | None = None) -> RayWorkers:
        """Workers on the kind of device that a discoverer is on.

        Args:
            discoverer: what each of them holds. On a CPU its results depend on PyTorch's threads: a worker has as many
                as this process, or as ``count`` of them leave each.
            count: how many; None for one a GPU, or as many as there are cores for.

        Raises:
            OptionError: if there is no room for so many, or the device is neither a CPU nor NVIDIA's.
            ClusterError: if none of them starts.
        """
        import ray

        backbone = discoverer.backbone
        device = backbone.device.type
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
        task: Any = ray.remote(_where).options(**resources)
        where = self._answer(task.remote(device, backbone.dtype, threads))
        held = [ray.put(discoverer.on("cpu"))]
        worker = {"held": held, "device": device, "threads": threads, "elsewhere": where}
        chunk = discoverer.options.batch_size * _BATCHES.get(device, _OTHER_BATCHES)
        workers = RayWorkers(worker, resources, count, chunk, self.logs)
        self.open.add(workers)
        return workers

    def _answer(self, asked: Any) -> Any:
        """What a task says that needs what a worker needs."""
        import ray
        from ray.exceptions import GetTimeoutError, RayError

        while True:
            try:
                return ray.get(asked, timeout=_PATIENCE)
            except GetTimeoutError:
                message = f"no worker has started for {_PATIENCE:g} seconds: waiting for Ray to find room for one"
                warnings.warn(f"{message}; its logs are in {self.logs}", LostregWarning, stacklevel=4)
            except RayError as error:
                raise ClusterError(f"no worker starts: {_last_words(error, self.logs)}") from error


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
            with _data_context(RaySession("its temporary folder", is_here=False)) as session:
                yield session
            return
        cores = max(available_cores(), _LEAST_ROOM)
        if address == HERE and (workers or 0) > cores:  # Ray would try to start a process for each
            raise OptionError(f"expected at most {cores} workers on this machine of that many cores, not {workers}")
        try:
            logs = _start_ray(address, cores)
            with _data_context(RaySession(logs, is_here=address == HERE)) as session:
                yield session
        finally:
            ray.shutdown()
    finally:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_terminate)


@contextmanager
def _data_context(session: RaySession) -> Iterator[RaySession]:
    """Ray Data without bars and lines on the terminal, that goes on without what is lost with a worker."""
    from ray.data import DataContext

    context = DataContext.get_current().copy()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.max_errored_blocks = -1
    terminals = [one for one in logging.getLogger("ray.data").handlers if isinstance(one, logging.StreamHandler)]
    levels = [one.level for one in terminals]
    try:
        for one in terminals:
            one.setLevel(_NOTHING)
        with DataContext.current(context):
            yield session
    finally:
        for workers in list(session.open):
            workers.close()
        for thread in threading.enumerate():
            if thread.name.startswith(_EXECUTOR):  # it asks Ray, and would end the process once that is gone
                thread.join(_PATIENCE)
        for one, level in zip(terminals, levels, strict=True):
            one.setLevel(level)


def _start_ray(address: str, cores: int) -> str:
    """Start Ray on this machine, which counts so many cores, or join a cluster; where its logs are."""
    import ray

    place: dict[str, Any] = {"address": "local", "num_cpus": cores, "include_dashboard": False}
    if address != HERE:
        _check_listening(address)
        place = {"address": address}
    try:
        with _terminal_closed():  # its core says how much it is going to say
            started: Any = ray.init(**place, log_to_driver=False, logging_level=logging.CRITICAL)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        does = "does not start" if address == HERE else f"cannot join the cluster at {address}"
        raise ClusterError(f"Ray {does}: {error}") from error
    return f"{started.address_info['session_dir']}/logs"


@contextmanager
def _terminal_closed() -> Iterator[None]:
    """Without what is written to standard error, by C++ too."""
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


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
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECTING) as connection:
            connection.sendall(_HTTP2_PREFACE)
            answer = connection.recv(9)
    except (OSError, OverflowError) as error:
        raise ClusterError(f"no cluster at {address}: {error}; `ray start --head` starts one") from error
    if answer[3:4] != _HTTP2_SETTINGS and "RAY_USE_TLS" not in os.environ:
        raise ClusterError(f"no cluster at {address}: something else listens there; `ray start --head` tells its own")
