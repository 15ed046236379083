"""Looks at a data root: the manifests, shards and indexes of its datasets, what lies beside them, and sidecars."""

from collections.abc import Collection, Iterator

from diffusion.data import datasets, lint, manifest, quarantine, versions
from diffusion.data.datasets import Dataset
from diffusion.data.versions import Head
from diffusion.lineage import sidecars
from diffusion.lineage.looks import Finding, Look, Tell, asked, hashed, said
from diffusion.store.lease import FOLDER as LEASES
from diffusion.store.storage import Storage


def looks_at_data(root: Storage, but: Collection[str] = ()) -> Iterator[Look]:
    """At all of a data root.  but: folders in it that have something else."""
    sizes = {found.name: found.size for found in root.walk() if found.name.partition("/")[0] not in (*but, LEASES)}
    known: set[str] = set()
    damaged: list[str] = []  # datasets
    for name in sorted(sizes):
        top, _, rest = name.partition("/")
        if top == "datasets" and rest.endswith(f"/{manifest.FILE}") and rest.count("/") == 1:
            yield from _dataset(root, name.removesuffix(f"/{manifest.FILE}"), sizes, known, damaged)
    if damaged:  # which shards are its own nobody knows then
        loose = [name for name in sizes if name not in known and name.startswith("shards/")]
        known.update(loose)
        if loose:
            what = (
                f"{len(loose):,} files that no dataset has, or a damaged one alone: keep them until that is made again"
            )
            yield said("unknown", f"{root.uri}/shards", what)
    for name in sizes:
        if name not in known:
            yield from _other_data(root, name, sizes[name])


def _dataset(root: Storage, place: str, sizes: dict[str, int], known: set[str], damaged: list[str]) -> Iterator[Look]:
    """known: hears of the files that are spoken of; damaged: of a dataset whose manifest is."""
    uri = f"{root.uri}/{place}"
    aside = [name for name in sizes if name.startswith(f"{quarantine.place_of(place.rpartition('/')[2])}/")]
    own = [name for name in sizes if name.startswith(f"{place}/")]
    known.update(aside, own)
    try:
        dataset = Dataset(uri, manifest.load(uri))
    except ValueError as error:
        damaged.append(place)
        yield said("damaged", f"{uri}/{manifest.FILE}", str(error))
        return
    remedy = f"Remove it and {uri}/{manifest.FILE}, and make them again with `diffusion shard`"
    for entry in dataset.manifest.shards:
        for name, sha256 in ((entry.tar, entry.sha256), (entry.index, entry.index_sha256)):
            if name not in known:
                known.add(name)
                yield hashed(root, name, sha256, sizes.get(name), remedy)

    def beside(tell: Tell) -> list[Finding]:
        wrong = [
            Finding("damaged", f"{root.uri}/{found.place}", f"{found.what}. No picture depends on it")
            for found in lint.beside(dataset)
        ]
        tell(sum(sizes[name] for name in (*aside, *own)))
        return wrong

    yield Look(uri, sum(sizes[name] for name in (*aside, *own)), beside)


def _other_data(root: Storage, name: str, size: int) -> Iterator[Look]:
    top, place = name.partition("/")[0], f"{root.uri}/{name}"
    if top == "precomputed":

        def sidecar(tell: Tell) -> list[Finding]:
            what = sidecars.wrong_with(root, name, tell)
            return [Finding("damaged", place, f"{what}. Remove it: `diffusion shard` makes it again")] if what else []

        yield Look(place, size, sidecar)
    elif top == "heads":
        remedy = "Remove it, and the next version of its source begins anew"
        yield asked(place, size, lambda: _check_head(root, name), remedy)
    elif name == "latest.json":
        yield asked(place, size, lambda: datasets.latest(root), "")
    elif top == "shards":
        yield said(
            "unknown", place, "no dataset has it. An interrupted `diffusion shard` goes on with it; else remove it"
        )
    else:
        yield said("unknown", place, "it is nothing that is published here. Remove it, if it is not yours")


def _check_head(root: Storage, name: str) -> None:
    """A head names a dataset that is there, and is named by the source and the recipe of that."""
    head = Head.model_validate_json(root.read(name))
    try:
        made = manifest.load(f"{root.uri}/{manifest.place_of(head.digest)}", digest=head.digest)
    except ValueError as error:
        raise ValueError(f"the dataset {head.digest[:16]}, to which it leads, is missing or damaged") from error
    if name != f"heads/{versions.head_key(head.source, versions.recipe_of(root, made))}.json":
        raise ValueError("it is of another source or recipe than its name says")
