"""How much memory this process can still have."""

import os
from pathlib import Path
from typing import Final

# Where Linux tells a container's limit, its use, and the part of that which is files' contents and can be dropped.
_CGROUPS: Final = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)
_DROPPABLE: Final = ("total_inactive_file", "inactive_file")


def host_bytes() -> int | None:
    """Memory that this process can still have, in bytes; None where the system does not say."""
    bounds = [bound for bound in (_meminfo_bytes(), _cgroup_bytes(), _limit_bytes()) if bound is not None]
    return min(bounds, default=None)


def _meminfo_bytes() -> int | None:
    try:
        lines = _read("/proc/meminfo").splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None


def _cgroup_bytes() -> int | None:
    for limit, used, statistics in _CGROUPS:
        try:
            left = int(_read(limit)) - int(_read(used))
            fields = dict(line.split(" ", 1) for line in _read(statistics).splitlines())
        except (OSError, ValueError):  # another kind of system, or "max": no limit
            continue
        droppable = next((int(fields[name]) for name in _DROPPABLE if name in fields), 0)
        return max(0, left + droppable)
    return None


def _limit_bytes() -> int | None:
    """What is left of the process's own limit, as ``ulimit -v`` sets it."""
    try:
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        used = int(_read("/proc/self/statm").split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (ImportError, OSError, ValueError):  # Windows has no such limit
        return None
    return None if limit == resource.RLIM_INFINITY else max(0, limit - used)


def _read(path: str) -> str:
    return Path(path).read_text(encoding="ascii")


def describe_bytes(count: int) -> str:
    """A size for people, in GB (10^9 bytes)."""
    return f"{count / 1e9:.1f} GB"
