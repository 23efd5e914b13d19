"""What the scripts in this folder share: the kernel's account of memory, and the file of their figures."""

import json
from pathlib import Path
from typing import Any


def rss(field: str) -> int:
    """A line of the kernel's account of this process ("VmRSS", "VmHWM"), in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{field}:"))


def reset_peak() -> None:
    """The high-water mark, "VmHWM", starts again at what is held now."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def keep(path: Path | None, name: str, figures: dict[str, Any]) -> None:
    """Print figures, and put them beside those of the other scripts."""
    print(json.dumps(figures, indent=1))
    if path is not None:
        found = json.loads(path.read_text()) if path.exists() else {}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**found, name: figures}, indent=1) + "\n")
