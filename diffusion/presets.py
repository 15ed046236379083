"""Presets: functions that return a whole recipe.  Each docstring states command, hardware, time and expected result."""

from collections.abc import Callable
from typing import get_args

from diffusion.recipe import (
    DistillRecipe,
    EvaluateRecipe,
    GateRecipe,
    Recipe,
    SamplingRecipe,
    ServeRecipe,
    ShardRecipe,
    TaskName,
    TrainRecipe,
    UNetRecipe,
)


def demo() -> Recipe:
    """`make demo`, or `diffusion run --preset demo`: 64 x 64 emoji by class.

    Hardware: two CPU cores, 4 GiB of memory.  Time: 7:45, of which training 6:04.  Result: waving flags, round
    yellow faces, square signs; Frechet distance 1,176 (efficientnet-lite0, 512 samples; real pictures: 290).
    """
    return Recipe(shard=ShardRecipe(holdout=0.11))  # 207 pictures, on which restoration is measured


def emoji_text() -> Recipe:
    """`diffusion run --preset emoji-text`: the demo's pictures by class and caption, the captions read by MiniLM.

    Hardware: two CPU cores.  Time: 9:19, of which training 7:07, on a machine with other work to do.
    Result: prompts bring kind and colour, seldom the thing itself; Frechet distance 1,204 (demo: 1,176).
    """
    line = demo()
    train = line.train.model_copy(
        update={
            "text_encoder": "minilm",
            "text_tokens": 20,  # the longest caption has 18
            "unet": UNetRecipe(text_width=384),
        }
    )
    return line.model_copy(update={"name": "emoji-text", "train": train})


def restorer() -> Recipe:
    """`diffusion run --preset restorer`: the demo's pictures and network, trained to enlarge, fill in and colour.

    Hardware: two CPU cores, 4 GiB of memory.  Time: 7:16, of which training 5:37.  Result: 207 held-out
    pictures enlarged by 4 at 23.3 dB, a quarter filled in at 18.7, coloured at 18.2, in two answers each.  Drawing freely it
    is worse than the demo: Frechet distance 1,419.
    """
    line = demo()
    train = line.train.model_copy(
        update={
            "degradations": get_args(TaskName),
            "noise_mean": 0.3,  # more of the levels at which the measurement is all there is
            "noise_std": 1.6,
        }
    )
    return line.model_copy(update={"name": "restorer", "train": train})


def few_steps() -> Recipe:
    """`diffusion run --preset few-steps`: the demo, and a student that draws in 4 evaluations what it draws in 48.

    Hardware: two CPU cores, 4 GiB of memory.  Time: TIME.  Result: RESULT.
    """
    return demo().model_copy(update={"name": "few-steps", "distill": DistillRecipe(steps=4)})


def smoke() -> Recipe:
    """`diffusion run --preset smoke`: every stage on 32 x 32 pictures, to see that an installation works.

    Hardware: two CPU cores, 4 GiB of memory.  Time: about two minutes.  Result: an endpoint; the pictures are noise.
    """
    return Recipe(
        name="smoke",
        shard=ShardRecipe(resolution=32, shard_size=16, holdout=0.2),
        train=TrainRecipe(
            unet=UNetRecipe(channels=16, multipliers=(1, 2), blocks=(1, 1), attention=()),
            images=128,
            batch_size=8,
            warmup_images=16,
            checkpoint_images=32,
            window=32,
            streams=4,
        ),
        evaluate=EvaluateRecipe(
            samples=16,
            batch_size=8,
            sampling=SamplingRecipe(steps=3),
            extractor_resolution=32,
            loss_pictures=8,
            grid_columns=4,
        ),
        gate=GateRecipe(max_loss=10.0),
        serve=ServeRecipe(slots=4, queue=32, max_n=8),
    )


PRESETS: dict[str, Callable[[], Recipe]] = {
    "demo": demo,
    "emoji-text": emoji_text,
    "restorer": restorer,
    "few-steps": few_steps,
    "smoke": smoke,
}
