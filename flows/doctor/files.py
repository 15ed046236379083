"""The home: it can be written, there is room, and nothing half-written lies about."""

import errno
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from diffusion.store.publish import PREFIX, left_behind
from flows.doctor.finding import Asked, Finding, ok, warning, wrong
from flows.preflight import FREE_DISK_BYTES, existing_part

_GIB = 2**30
_FEW_FILES = 20_000  # that a disk can still take; a run makes some thousand
_ANOTHER = "another folder: `--home DIR` or DIFFUSION_HOME=DIR"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def home(asked: Asked) -> Iterator[Finding]:
    """A home that is not there yet is made by the first command, and not by this one."""
    folder = asked.site.home
    nearest = existing_part(folder)
    yield writable("home", folder, f"`chmod u+rwx {shlex.quote(str(nearest))}` as its owner, or {_ANOTHER}")
    yield from room(nearest)


def writable(check: str, folder: Path, mend: str) -> Finding:
    """Whether files can be written into a folder, which need not be there yet.  Nothing of the try stays."""
    nearest = existing_part(folder)
    if not nearest.is_dir():
        return wrong(check, f"{folder} cannot be made, for {nearest} is a file", _ANOTHER)
    try:
        with tempfile.TemporaryFile(
            dir=nearest, prefix=PREFIX
        ) as file:  # one without a name, where the system has them
            file.write(b"diffusion doctor")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno in _NO_ROOM:
            return wrong(check, f"the disk of {nearest} is full", f"free some (`du -sh {nearest}/*`), or {_ANOTHER}")
        if error.errno == errno.EROFS:
            mend = f"as root `mount -o remount,rw {nearest}`, or another folder, as by DIFFUSION_HOME=DIR for the home"
        return wrong(check, f"{nearest} cannot be written ({error.strerror})", mend)
    where = f"{folder} can be written" if nearest == folder else f"{folder} is not there yet, and can be made"
    return ok(check, where)


def room(folder: Path) -> Iterator[Finding]:
    """Bytes, and files, that the disk of a folder can still take."""
    free, status = shutil.disk_usage(folder).free, os.statvfs(folder)
    told = f"{free / _GIB:.1f} GiB free on the disk of {folder}"
    mend = f"make room (`du -xsh {folder}/* | sort -h` says where it went), or another disk: `--home DIR`"
    if free < FREE_DISK_BYTES:
        yield wrong("disk", f"{told}, and a run needs about {FREE_DISK_BYTES / _GIB:.0f}", mend)
    elif free < 3 * FREE_DISK_BYTES:
        yield warning("disk", f"{told}: one or two runs more", mend)
    elif status.f_files and status.f_favail < _FEW_FILES:
        yield warning("disk", f"{told}, and room for {status.f_favail:,} files only", f"{mend}; `df -i` counts files")
    else:
        yield ok("disk", told)


def left_overs(asked: Asked) -> Iterator[Finding]:
    """Of writers that were killed, and whose folder nobody has written to since."""
    folder = asked.site.home
    found = list(left_behind(folder))
    if not found:
        yield ok("left-overs", "nothing half-written lies about")
        return
    size = sum(_bytes(path) for path in found)
    paths = " ".join(shlex.quote(str(path)) for path in found[:3])
    more = f" (and {len(found) - 3:,} more: `find {shlex.quote(str(folder))} -name '{PREFIX}*'`)" if found[3:] else ""
    what = f"{len(found):,} files or folders that writers left who were killed, {size / 2**20:,.1f} MiB"
    yield warning("left-overs", what, f"`rm -r {paths}`{more}; whoever writes beside them next does it as well")


def _bytes(path: Path) -> int:
    inside = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
    return sum(each.lstat().st_size for each in (path, *inside))
