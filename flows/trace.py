"""trace: from a picture back to its model, its run, its data, the training pictures most like it, and the shards of all."""

import shlex
from pathlib import Path

from diffusion.data.reader import ShardReader
from diffusion.data.shards import DamagedShard
from diffusion.lineage.chain import (
    Data,
    Missing,
    Run,
    Seen,
    find_data,
    find_run,
    first_seen,
    key_of,
    keys_in,
    missing_shards,
    origins,
    seen_by,
)
from diffusion.lineage.nearest import search, side_by_side
from diffusion.recipe import digest_of
from diffusion.serving.receipt import AnyReceipt, Opened, ReworkReceipt
from diffusion.store.bundle_spec import BundleSpec, bundle_path, read_facts
from diffusion.store.storage import open_storage
from flows.by_digest import bundle_of, read_picture
from flows.console import progress, say, warn
from flows.preflight import check_folder
from flows.site import Site

_FIRST = 5  # shards, where not all are asked for


def trace(site: Site, picture: Path, *, every: bool, nearest: int, side: Path | None = None) -> bool:
    """Say where a picture comes from, link by link.  every: print all shards and their keys.  nearest: so many training
    pictures; side: a PNG of them beside the picture.  Returns whether every link is there and fits.  Raises ValueError.
    """
    if nearest < 0 or (side is not None and not nearest):
        raise ValueError(f"--nearest {nearest}: give 0 for none, or how many; --picture shows at least one")
    if side is not None and side.exists():
        raise ValueError(f"--picture {side}: there is such a file already, and it stays as it is: give another name")
    if side is not None:
        check_folder(side.absolute().parent, "`--picture FILE`")
    _, found = read_picture(picture)
    whole = _picture(picture, found)
    spec, undamaged = _bundle(found, site)
    whole &= undamaged
    if spec is not None:
        whole &= _model(found, spec, site)
    named = spec or found.receipt
    run = _run(named, site)
    data = _data(named, site)
    if data is None:
        return False
    if nearest:
        whole &= _nearest(found, data, site, nearest, side)
    seen, first = None, tuple(range(len(data.manifest.entries("train"))))
    if run:
        how = data, run.facts.recipe, (spec or run.facts).images_seen
        seen, first = seen_by(*how), first_seen(*how, _FIRST)
    whole &= _shards(data, seen, first[:_FIRST], every=every)
    return whole and run is not None


def _picture(path: Path, found: Opened) -> bool:
    receipt = found.receipt
    if isinstance(receipt, ReworkReceipt):
        how = f"{receipt.task}, {receipt.way}" if receipt.task else f"edit of strength {receipt.strength:g}"
        say(f"  made of    the file of sha256 {receipt.given_sha256}: {how}")
    about = [f"class {receipt.label}" if receipt.label else "", f"prompt {receipt.prompt!r}" if receipt.prompt else ""]
    about += [f"seed {receipt.seed}, picture {receipt.image}", f"{receipt.sampler}, {receipt.steps} steps"]
    say(f"  picture    {path.name}: {', '.join(filter(None, about))}, guidance {receipt.guidance:g}")
    if not found.intact:
        warn(
            "picture    its pixels were changed after it was drawn: what follows is of the picture that the receipt is of;"
            f" `diffusion replay {shlex.quote(str(path))} --out FILE` draws that"
        )
    return found.intact


def _bundle(found: Opened, site: Site) -> tuple[BundleSpec | None, bool]:
    """What bundle.json says, as far as it is there and can be believed, and whether the bundle is whole."""
    receipt = found.receipt
    called = f"{receipt.model} version {receipt.version}" if receipt.version else receipt.model
    say(f"  model      {called}, as the receipt calls it")
    say(f"             bundle {receipt.bundle_digest}")
    try:
        folder, whole = bundle_of(site, receipt.bundle_digest), True
    except (ValueError, ConnectionError) as error:
        warn(f"model      {error}")
        folder, whole = bundle_path(site.store, receipt.bundle_digest), False
    try:
        return read_facts(folder, receipt.bundle_digest)[0], whole
    except ValueError:
        warn("model      run and data are those that the receipt names: nothing else says that they are this model's")
        return None, False


def _model(found: Opened, spec: BundleSpec, site: Site) -> bool:
    receipt = found.receipt
    average = f"average of relative width {spec.ema:g}"
    say(f"             {spec.parameters / 1e6:.2f} M parameters, {average}, after {spec.images_seen:,} pictures seen")
    for how, digest, facts in origins(site.store, spec):
        say(f"             {how} bundle {digest}")
        if facts is None:
            warn(f"model      that bundle is not in {site.store}, or damaged there, so its data is not known")
        elif facts.dataset_digest != spec.dataset_digest:
            say(f"             which was trained on dataset {facts.dataset_digest}")
    said = {"run": (receipt.run_digest, spec.run_digest), "dataset": (receipt.dataset_digest, spec.dataset_digest)}
    wrong = [what for what, (claimed, true) in said.items() if claimed != true]
    for what in wrong:
        warn(
            f"model      the receipt names another {what} than its bundle does: it was edited. The bundle's is followed"
        )
    return not wrong


def _run(named: BundleSpec | AnyReceipt, site: Site) -> Run | None:
    say(f"  run        checkpoint {named.run_digest}")
    try:
        run = find_run(site.store, named, site.runs)
    except Missing as missing:
        warn(f"run        {missing}")
        return None
    facts = run.facts
    workers = f", by {facts.world} worker{'s' * (facts.world > 1)}" if facts.world else ""
    say(f"             {run.uri}")
    recipe = facts.recipe
    say(f"             recipe {digest_of(recipe)}: {recipe.images:,} pictures in batches of {recipe.batch_size}")
    say(f"             trained on {facts.device} with torch {facts.torch}{workers}")
    return run


def _data(named: BundleSpec | AnyReceipt, site: Site) -> Data | None:
    say(f"  data       dataset {named.dataset_digest}")
    try:
        data = find_data(open_storage(site.data_root), named.dataset_digest)
    except Missing as missing:
        warn(f"data       {missing}")
        return None
    made = data.manifest
    say(f"             {data.uri}")
    size = f"{made.resolution} px, {len(made.classes)} classes"
    say(f"             {made.images:,} training pictures and {made.holdout:,} held out, {size}")
    if data.source:
        say(f"             made of {data.source}")
    for parent in data.parents:
        say(f"             goes on from dataset {parent}")
    for part in made.parts:
        say(f"             has in it dataset {part.dataset}, of weight {part.weight:g}")
    return data


def _shards(data: Data, seen: Seen | None, first: tuple[int, ...], *, every: bool) -> bool:
    """first: the numbers of those that are shown where not all are."""
    entries, gone = data.manifest.entries("train"), missing_shards(data)
    say(f"  shards     {len(entries):,} of training pictures, {sum(entry.bytes for entry in entries):,} bytes")
    if seen is not None:
        part = "all" if seen.pictures == data.manifest.images else f"{seen.pictures:,}"
        least, most = seen.times or (0, 0)
        times = f", each {least:,} times" if least == most else f", each {least:,} or {most:,} times"
        often = times if least else ""
        these = ", first of these" if not every and len(first) < len(seen.shards) else ""
        say(f"             the run has seen {part} of the pictures{often}, of {len(seen.shards):,} shards{these}")
    shown = range(len(entries)) if every else first
    whole = not gone
    for number in shown:
        entry = entries[number]
        unseen = "  not seen" if seen and number not in seen.shards else ""
        say(f"             {number:>5}  {entry.sha256}  {entry.pictures:>6,} of them{unseen}")
        if every and entry.index not in gone:
            whole &= _keys(data, number)
    if len(shown) < len(entries):
        say(
            f"             and {_others(len(entries), len(shown), seen)}: --all lists them and the keys of their pictures"
        )
    for name in gone[:_FIRST]:
        warn(f"shards     {data.root.uri}/{name} is missing or cut off")
    if gone:
        warn(f"shards     {len(gone)} files are not there in full; `diffusion verify` looks at every byte")
    return whole


def _others(shards: int, shown: int, seen: Seen | None) -> str:
    if seen is None or len(seen.shards) == shards:
        return f"{shards - shown:,} more"
    more = f"{len(seen.shards) - shown:,} more of these, and " if len(seen.shards) > shown else ""
    return f"{more}{shards - len(seen.shards):,} of which it has seen nothing"


def _keys(data: Data, number: int) -> bool:
    try:
        keys = keys_in(data, number)
    except DamagedShard as error:
        warn(f"shards     {error}")
        return False
    for key in keys:
        say(f"                    {key}")
    return True


def _nearest(found: Opened, data: Data, site: Site, count: int, side: Path | None) -> bool:
    try:
        _shown(found, data, site, count, side)
    except ValueError as error:  # a damaged shard, or all of them
        warn(f"nearest    {error}")
        return False
    return True


def _shown(found: Opened, data: Data, site: Site, count: int, side: Path | None) -> None:
    reader = ShardReader(data.uri, digest=data.manifest.digest, cache_mib=0, captions=False, shards=site.reading.cache)
    with progress("nearest", "pictures") as update:
        result = search(found.picture, reader, site.store, count=count, progress=update)
    say(f"  nearest    of {result.compared:,} training pictures, in features of {result.extractor}")
    say(f"             (half of them are within a distance of {result.typical:.4g})")
    for near, key in [(near, key_of(data, near.picture)) for near in result.near]:
        say(f"             {near.distance:>8.4g}  {key.key}  {key.label}  {key.source}")
    if side is not None:
        side.parent.mkdir(parents=True, exist_ok=True)
        side.write_bytes(side_by_side(found.picture, reader, result.near))
        say(f"  picture    {side}: this one, and the nearest from the left")
