"""Every digest of a store compared with the bytes it stands for: datasets, checkpoints, bundles, reports, features, works.

Nothing is changed, and nothing is decoded: `diffusion data lint` looks at the pictures.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

from diffusion.lineage.looks import Finding, Look
from diffusion.store.storage import StorageRefused, StorageUnavailable


def verify(looks: Sequence[Look], *, threads: int | None = None, progress: Callable[[int, int], None]) -> list[Finding]:
    """What all looks find, in their order; of a file that several are about what the first one says.

    progress(bytes looked at, bytes in all).  Threads: one for each core, at most 8; hashing lets go of Python's lock.
    """
    total, done, lock = sum(look.bytes for look in looks), 0, Lock()

    def tell(size: int) -> None:
        nonlocal done
        with lock:
            if done < total:  # a file may have grown meanwhile
                done = min(done + size, total)
                progress(done, total)

    def found(look: Look) -> list[Finding]:
        try:
            return look.work(tell)
        except FileNotFoundError:
            return [
                Finding("missing", look.place, "it was there a moment ago: verify again when nothing else is at work")
            ]
        except (StorageRefused, StorageUnavailable):
            raise
        except (OSError, ValueError) as error:
            return [Finding("damaged", look.place, f"it cannot be read ({error})")]

    findings: dict[tuple[str, str], list[Finding]] = {}
    with ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1)) as pool:
        for part in pool.map(found, looks):
            told = set(
                findings
            )  # by looks before this one: a report is looked at for itself and for the note that names it
            for finding in map(_named_once, part):
                if (which := finding[:2]) not in told:
                    findings.setdefault(which, []).append(finding)
    if done < total or not total:
        progress(total, total)
    return [finding for same in findings.values() for finding in same]


def _named_once(finding: Finding) -> Finding:
    """Errors begin with the file that they are about, as findings do."""
    return finding._replace(what=finding.what.removeprefix(f"{finding.place} ").removeprefix(f"{finding.place}: "))
