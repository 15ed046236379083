"""`diffusion shard --dry-run`: what sharding would do, in words."""

from diffusion.data.dry_run import DryRun
from diffusion.data.dry_run import dry_run as look
from diffusion.data.pictures.buckets import shown
from diffusion.data.report import amount, few
from diffusion.recipe import ShardRecipe
from diffusion.store.storage import open_storage
from flows.console import progress, say, seconds
from flows.site import Site


def dry_run(recipe: ShardRecipe, source: str, site: Site, fresh: bool) -> None:
    """Say what sharding the source would do.  Writes nothing.  Raises BadSource."""
    with progress("dry run", "pictures") as update:
        found = look(source, recipe, open_storage(site.data_root), fresh=fresh, progress=update)
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
