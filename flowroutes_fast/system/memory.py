"""How much memory this process can still take: of the system, its cgroups and limits, and of a CUDA device."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def available_memory() -> int | None:
    """Bytes of main memory that this process can still take: the least of what the system, its cgroups and
    RLIMIT_AS leave; None if unknown.
    """
    found = [x for x in (_system_memory(), _cgroup_memory(), address_space()) if x is not None]
    return max(0, min(found)) if found else None


def available_device_memory(device: torch.device) -> int | None:
    """Bytes free on a CUDA device, with those that torch holds unused; None if unknown."""
    try:
        free = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    except (RuntimeError, ValueError, AssertionError):
        return None


def _table(path: Path) -> dict[str, int]:
    """Lines ``name[:] number [kB]`` of a file; empty if it cannot be read."""
    try:
        fields = [line.replace(":", " ").split() for line in path.read_text().splitlines()]
        return {f[0]: int(f[1]) * (1024 if f[-1] == "kB" else 1) for f in fields if len(f) > 1 and f[1].isdigit()}
    except (OSError, ValueError):
        return {}


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # also "max"
        return None


def _system_memory(path: Path = Path("/proc/meminfo")) -> int | None:
    found = _table(path)
    return found["MemAvailable"] + found.get("SwapFree", 0) if "MemAvailable" in found else None


def _cgroup_memory(processes: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What the cgroups (version 1 or 2) of this process and those above leave, file pages that can be dropped
    included.
    """
    try:
        lines = processes.read_text().splitlines()
    except OSError:
        return None
    left = []
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not controllers:
            top, limit, usage, dropped = root, "memory.max", "memory.current", ("inactive_file", "active_file")
        elif "memory" in controllers.split(","):
            top, limit, usage = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            dropped = ("total_inactive_file", "total_active_file")
        else:
            continue
        below = top / path.strip("/")
        for folder in (below, *below.parents):
            if top not in (folder, *folder.parents):
                break
            most, used = _number(folder / limit), _number(folder / usage)
            if most is not None and used is not None:
                stat = _table(folder / "memory.stat")
                left.append(most - used + sum(stat.get(name, 0) for name in dropped))
    return min(left) if left else None


def address_space() -> int | None:
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit == resource.RLIM_INFINITY:
            return None
        return limit - int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (ImportError, OSError, ValueError, IndexError):
        return None
