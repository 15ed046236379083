"""A run on real pictures in seconds, for evaluations: two real steps on a few emoji."""

from pathlib import Path

import torch

from diffusion.data.ingest import shard_dataset
from diffusion.data.reader import ShardReader
from diffusion.data.reading_order import order_of
from diffusion.data.stream import batches
from diffusion.denoiser import Denoiser
from diffusion.recipe import Recipe, checkpoints_of, digest_of
from diffusion.store.codecs import codec_named
from diffusion.store.refs import RunRef
from diffusion.threads import one_thread
from diffusion.training import checkpoint
from diffusion.training.step import build_state, train_step


def make_run(
    source: Path, recipe: Recipe, root: Path, *, steps: int = 2, poison: bool = False, teacher: Denoiser | None = None
) -> RunRef:
    """Shard `source` below `root`, train so many steps, save the recipe's checkpoints and the last.

    poison: spoil the average's weights, as a diverged run's.  teacher: of a recipe with a lesson.
    """
    dataset, train = shard_dataset(source, recipe.shard, root), recipe.train
    shape = {"resolution": dataset.resolution, "classes": len(dataset.classes)}
    state = build_state(train, **shape, device="cpu", teacher=teacher)
    codec = codec_named(state.codec) if state.codec else None
    reader = ShardReader(dataset.uri, digest=dataset.digest, codec=codec)
    order = order_of(reader.manifest, "train", train)
    checkpoints = root / f"checkpoints-{digest_of(train)[:8]}{'-poisoned' if poison else ''}"
    frozen = {"text": state.text, "codec": state.codec}
    facts = checkpoint.facts_of(train, dataset, world=1, device=torch.device("cpu"), **frozen)
    for batch in batches(reader, order, train.batch_size, stop=steps * train.batch_size, threads=0):
        with one_thread():
            train_step(state, batch, train)
        last = state.images_seen == steps * train.batch_size
        if last and poison:
            with torch.no_grad():
                for average in state.ema.averages.values():
                    for weight in average:
                        weight.fill_(torch.nan)
        if last or state.images_seen in checkpoints_of(train):
            folder = checkpoint.folder_of(checkpoints, state.images_seen)
            digest = checkpoint.save(state, folder, facts)
    return RunRef(
        uri=str(folder),
        digest=digest,
        recipe_digest=digest_of(train),
        dataset=dataset,
        images_seen=state.images_seen,
    )
