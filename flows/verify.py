"""verify: every digest of a home's store, and of what its site keeps elsewhere, compared with the bytes."""

from collections import Counter

from diffusion.lineage import looks_at_data, looks_at_store
from diffusion.lineage.looks import Look
from diffusion.lineage.verify import verify as look
from diffusion.store.storage import open_storage
from flows.console import progress, say, ticked, waiting, warn
from flows.site import Site

_MIB = 2**20


def verify(site: Site) -> bool:
    """Look at every file, and say what is damaged, missing or unknown, with what to do.  Nothing is changed.  Returns
    whether all that was published is there, as it was written.  Raises ValueError."""
    if not site.store.is_dir() and site.data is None:
        raise ValueError(f"{site.store} is no folder: name the home with --home or DIFFUSION_HOME")
    with waiting("looking what there is"):
        looks = list(_looks(site))
    size = sum(one.bytes for one in looks)
    with progress("verify", "MiB") as update:
        findings = look(looks, progress=lambda done, total: update(*_mib(done, total)))
    for found in findings:
        warn(f"{found.kind:<9}  {found.place}: {found.what}")
    kinds = Counter(found.kind for found in findings)
    places = ", ".join(dict.fromkeys(filter(None, (str(site.store), site.data, site.runs, site.bundles))))
    looked = f"{len(looks):,} files and folders of {places}, {size:,} bytes"
    bad = kinds["damaged"] + kinds["missing"]
    if bad:
        say(f"  {looked}: {kinds['damaged']} damaged, {kinds['missing']} missing, {kinds['unknown']} unknown")
    else:
        unknown = f"; {kinds['unknown']} that nothing names" if kinds["unknown"] else ""
        ticked(f"{looked}: all as they were written{unknown}")
    return not bad


def _mib(done: int, total: int) -> tuple[int, int]:
    """Bytes as MiB, of which the last one is done when all is."""
    whole = -(-total // _MIB)
    return (whole if done == total else done // _MIB), whole


def _looks(site: Site) -> list[Look]:
    store = open_storage(site.store)
    looks = list(looks_at_store.looks_at_store(site.store))
    looks += looks_at_data.looks_at_data(store, but=looks_at_store.TOPS)
    if open_storage(site.data_root).uri != store.uri:
        looks += looks_at_data.looks_at_data(open_storage(site.data_root))
    if site.runs:
        looks += looks_at_store.looks_at_runs(open_storage(site.runs))
    if site.bundles:
        looks += looks_at_store.looks_at_bundles(open_storage(site.bundles))
    return looks
