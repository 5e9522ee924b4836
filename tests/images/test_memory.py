"""What is asked of the system about memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lostreg.images.memory import describe_bytes, host_bytes

MEMINFO = """\
MemTotal:       16000000 kB
MemFree:         1000000 kB
MemAvailable:    8000000 kB
HugePages_Total:       0
"""

needs_linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands in for the root of the file system; it says that 8,192 MB are available."""
    monkeypatch.setattr("lostreg.images.memory.Path", lambda name: tmp_path / name.lstrip("/"))
    write(tmp_path / "proc" / "meminfo", MEMINFO)
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_systems_available_memory_is_taken_from_it(system: Path) -> None:
    assert host_bytes() == 8_192_000_000


@pytest.mark.parametrize(
    ("limit", "used"),
    [("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")],
)
def test_a_containers_limit_bounds_it(system: Path, limit: str, used: str) -> None:
    folder = system / "sys" / "fs" / "cgroup"
    statistics = (folder / used).parent / "memory.stat"
    write(folder / limit, "4000000000\n")
    write(folder / used, "1500000000\n")
    write(statistics, "anon 7\n")
    assert host_bytes() == 2_500_000_000
    # Contents of files can be dropped; the version of 2008 has a line for the group alone, too.
    write(statistics, "anon 7\ninactive_file 900000000\n")
    assert host_bytes() == 3_400_000_000
    write(statistics, "inactive_file 5\ntotal_inactive_file 500000000\n")
    assert host_bytes() == 3_000_000_000
    write(folder / used, "4600000000\n")
    assert host_bytes() == 0
    write(folder / used, "1500000000\n")
    write(statistics, "anon 7\n")
    write(folder / limit, "9223372036854771712\n")
    assert host_bytes() == 8_192_000_000
    (system / "proc" / "meminfo").unlink()
    write(folder / limit, "4000000000\n")
    assert host_bytes() == 2_500_000_000


def test_a_container_without_a_limit_leaves_what_the_system_has(system: Path) -> None:
    write(system / "sys" / "fs" / "cgroup" / "memory.max", "max\n")
    write(system / "sys" / "fs" / "cgroup" / "memory.current", "1500000000\n")
    assert host_bytes() == 8_192_000_000


@pytest.mark.parametrize("meminfo", [None, "MemTotal:       16000000 kB\n"])
def test_nothing_is_said_where_the_system_does_not_tell(system: Path, meminfo: str | None) -> None:
    (system / "proc" / "meminfo").unlink()
    if meminfo:
        write(system / "proc" / "meminfo", meminfo)
    assert host_bytes() is None


@needs_linux
def test_this_system_has_memory() -> None:
    free = host_bytes()
    assert free is not None
    assert 0 < free <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@needs_linux
def test_a_limit_of_the_process_bounds_it() -> None:
    code = (
        "import resource; from lostreg.images.memory import host_bytes; "
        "resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30)); print(host_bytes())"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 0 < int(told) < 3 << 30


def test_sizes_are_told_in_billions_of_bytes() -> None:
    assert describe_bytes(3_149_999_999) == "3.1 GB"
    assert describe_bytes(12_000_000) == "0.0 GB"
