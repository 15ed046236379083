"""`--dry-run` of a command: what it would do, in words.  Nothing is written and nothing started."""

from diffusion.data import manifest
from diffusion.data.dry_run import DryRun, dry_run
from diffusion.data.pictures.buckets import shown
from diffusion.data.report import amount, few
from diffusion.recipe import Recipe, ShardRecipe
from diffusion.store.bundle_spec import BundleSpec
from diffusion.store.refs import DatasetRef
from diffusion.store.storage import open_storage
from diffusion.training.exact import worlds_of
from diffusion.training.parallel import check_sharding
from diffusion.training.plan import Plan, Ranks, plan_of, ranks_of
from diffusion.training.step import check_sizes
from diffusion.training.warm_start import carried
from flows.console import progress, say, seconds
from flows.origin import NOTHING_NEW, learned, look
from flows.site import Site


def dry_shard(recipe: ShardRecipe, source: str, site: Site, fresh: bool) -> None:
    """Say what sharding the source would do.  Writes nothing.  Raises BadSource."""
    with progress("dry run", "pictures") as update:
        found = dry_run(source, recipe, open_storage(site.data_root), fresh=fresh, progress=update)
    for title, text in told(found, recipe).items():
        say(f"  {title:<10} {text}")
    for kind, examples in found.sampled.examples.items():
        for name, detail in examples:
            say(f"    {kind}: {name}: {detail}")
    say("  nothing was published")


def told(found: DryRun, recipe: ShardRecipe) -> dict[str, str]:
    """Title -> text."""
    source, sampled = found.source, found.sampled
    size = "" if source["bytes"] is None else f" with {amount(source['bytes'])}"
    formats = few(f"{count:,} {name}" for name, count in source["formats"].items())
    lines = {
        "source": f"{source['uri']}, {source['kind']}",
        "files": f"{source['pictures']:,} pictures{size}: {formats}",
        "classes": f"{len(source['classes']):,}: "
        + few(f"{name} {count:,}" for name, count in source["classes"].items()),
        "captions": f"{source['captioned']:,} pictures have one, {source['with several captions']:,} of them several",
    }
    if unprintable := source["captions with control characters"]:
        lines["captions"] += f"; {unprintable:,} with control characters, which stay in them"
    for title in ("left out", "other files"):
        if source[title]:
            lines[title] = few(f"{count:,} {name}" for name, count in source[title].items())
    if found.changes is None:
        lines["version"] = "the first of this source with this recipe"
    else:
        since, new, changed, vanished, same = found.changes
        lines["version"] = (
            f"after {since[:16]}: {new:,} new, {changed:,} changed, {vanished:,} gone, {same:,} as they were"
        )
    lines["to decode"] = f"{found.to_decode:,} files"
    if sampled.files:
        rejected = sum(sampled.rejected.values())
        kept = sampled.files - rejected
        reasons = "".join(f", {count:,} {kind}" for kind, count in sampled.rejected.items())
        lines["sample"] = f"of {sampled.files:,} files {kept:,} can be used{reasons}"
        if rejected and sampled.files < found.to_decode:
            lines["expected"] = f"about {found.of_all(rejected):,} of {found.to_decode:,} files set aside"
        lines["shards"] = (
            f"about {amount(found.of_all(sampled.bytes))} more for {found.of_all(kept):,} pictures at"
            f" {'about ' if recipe.bucket_aspect else ''}{recipe.resolution} x {recipe.resolution}"
        )
        if recipe.bucket_aspect is not None:
            counts = (f"{shown(size)} {found.of_all(count):,}" for size, count in sampled.sizes.items())
            lines["buckets"] = f"about {', '.join(counts)}"
        took = found.of_all(sampled.seconds)
        lines["time"] = (
            f"{f'about {seconds(took)}' if took else 'under a second'} of one core for decoding and encoding"
        )
        if rejected > recipe.max_rejected * sampled.files:
            lines["refused"] = (
                f"likely: {rejected / sampled.files:.1%} of the sample cannot be used, shard.max_rejected allows"
                f" {recipe.max_rejected:.1%}"
            )
    return lines


def dry_train(recipe: Recipe, dataset: DatasetRef | None, site: Site, init: str | None = None) -> None:
    """Say what training would take on the site's workers, whether they are there or not.  dataset: None where it is yet to
    be made.  init: see `flows.origin`.  Raises ValueError where it could not be done."""
    train, world = recipe.train, worlds_of(recipe.train, site.train_workers)[-1]
    if site.shard_weights:
        check_sharding(train)
    if dataset is not None:
        check_sizes(train, dataset)
    resolution = dataset.resolution if dataset else recipe.shard.resolution
    train, model = look(train, init, resolution, site)
    side = resolution // train.codec_factor
    classes = len(dataset.classes) if dataset else 1
    with progress("dry run", "networks"):
        plan = plan_of(
            train,
            side=side,
            classes=classes,
            world=world,
            recompute=site.recompute,
            sharded=site.shard_weights,
        )
    ranks = ranks_of(manifest.load(dataset.uri), train, world) if dataset else None
    lines = plan_told(plan, ranks, dataset)
    if model:
        known = init and dataset and learned(train, model, dataset, site)
        lines |= {"starts from": NOTHING_NEW if known else start_told(train.init, model, dataset)}
    for title, text in lines.items():
        say(f"  {title:<10} {text}")
    say("  nothing was trained")


def start_told(digest: str, model: BundleSpec, dataset: DatasetRef | None) -> str:
    """The weights that a run would start from, and what would become of their classes."""
    text = f"the model {digest[:16]}, trained on {model.images_seen:,} pictures"
    classes = carried(model.classes, dataset.classes if dataset else model.classes)
    text += f"; new classes: {few(classes.new)}" if classes.new else ""
    return text + (f"; left behind: {few(classes.dropped)}" if classes.dropped else "")


def plan_told(plan: Plan, ranks: Ranks | None, dataset: DatasetRef | None) -> dict[str, str]:
    """Title -> text.  ranks: of the dataset, which is None where it is yet to be made."""
    each = " on each" if plan.world > 1 else ""
    where = f"{' x '.join(map(str, plan.shape))} on {f'each of {plan.world} workers' if each else 'one worker'}"
    parts = ", ".join(f"{name} {amount(size)}" for name, size in plan.memory._asdict().items())
    lines = {
        "network": f"{plan.parameters:,} parameters",
        "batch": f"{plan.world * plan.share:,} pictures, {where}",
        "steps": f"{plan.steps:,}, of {plan.flops / 1e9:,.3g} GFLOP{each}",
        "memory": f"about {amount(plan.memory.total)}{each}: {parts}; libraries come on top",
        "written": f"{plan.checkpoints} checkpoints with {amount(plan.checkpoint_bytes)} each",
    }
    if plan.world > 1:
        updates = f", and {amount(plan.update_bytes)} of weights" if plan.update_bytes else ""
        lines["exchanged"] = f"{amount(plan.gradient_bytes)} of gradients in each step{updates}"
    if ranks is None or dataset is None:
        lines["shards"] = "none yet: `diffusion shard` makes them of the source"
        return lines
    epochs = plan.steps * plan.world * plan.share / dataset.images
    lines["data"] = f"{dataset.images:,} pictures, each seen {epochs:.3g} times"
    first = "epoch" if ranks.pictures >= dataset.images - plan.world * plan.share else f"{ranks.pictures:,} pictures"
    low, high = min(ranks.shards), max(ranks.shards)
    opened = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    lines["shards"] = (
        f"a worker reads {opened} of {ranks.all:,} in the first {first}, up to {amount(max(ranks.bytes))}; its part of a"
        f" batch lies in {ranks.at_once:,} at most"
    )
    return lines
