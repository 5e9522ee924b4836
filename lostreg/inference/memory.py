"""How much memory an image will need, and how much there is."""

from pathlib import Path
from typing import Final

import torch

from lostreg.models.backbone import Backbone

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
_BLOCK_ROWS: Final = 128  # of similarities, three of them at once: see `lostreg.methods.similarity`
_MAP_BYTES: Final = 512  # a patch, for the degrees and masks of a few biases, with copies


def available_bytes(device: torch.device) -> int | None:
    """Memory that can still be had on a device, in bytes; None where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    bounds = [bound for bound in (_meminfo_bytes(), _cgroup_bytes()) if bound is not None]
    return min(bounds, default=None)


def _meminfo_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
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


def _read(path: str) -> str:
    return Path(path).read_text(encoding="ascii")


def required_bytes(backbone: Backbone, grid: tuple[int, int]) -> int:
    """An upper bound on what one image takes on the device, from decoded pixels to degrees, beside the model.

    Every term grows with the number of patches and none with its square.

    Args:
        backbone: the model.
        grid: (h, w), rows and columns of patches.
    """
    count = grid[0] * grid[1]
    size = backbone.dtype.itemsize
    width = int(backbone.model.embed_dim)  # type: ignore[arg-type]
    pixels = 3 * backbone.spec.patch_size**2
    # Decoded, padded and cut; in float32; in the model's precision.
    embedding = count * pixels * (3 + 4 + size)
    # Tokens in float32; their norm, the projections, queries and keys once more where they are turned, attention's
    # output twice.
    forward = count * width * (4 + 8 * size)
    # Features, normalised features; blocks of similarities; degrees and masks.
    search = count * (width * (size + 3 * 4) + 4 * 3 * _BLOCK_ROWS + _MAP_BYTES)
    return max(embedding + count * width * 8, forward, search) + (512 << 20)


def describe_bytes(count: int) -> str:
    """A size for people, in GB (10^9 bytes)."""
    return f"{count / 1e9:.1f} GB"
