"""Another process' memory, to be damaged: one of our children's, as the system allows it."""

import re
from pathlib import Path


def overwrite(pid: int, old: bytes, new: bytes) -> int:
    """Replaces these bytes by as many others wherever the process could write them itself.  Returns in how many places."""
    hit = 0
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span = re.match(r"([0-9a-f]+)-([0-9a-f]+) rw", line)
            if span is None:
                continue
            start, end = (int(part, 16) for part in span.groups())
            try:
                memory.seek(start)
                held = memory.read(end - start)
            except (OSError, OverflowError):  # of a device, or gone meanwhile
                continue
            at = held.find(old)
            while at >= 0:
                memory.seek(start + at)
                memory.write(new)
                hit += 1
                at = held.find(old, at + len(old))
    return hit
