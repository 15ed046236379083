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

    Hardware: two CPU cores, 4 GiB of memory.  Time: 6:18, of which training 5:00.  Result: waving flags, round
    yellow faces, square signs; Frechet distance 1,184 (efficientnet-lite0, 512 samples; real pictures: 290).
    """
    return Recipe(shard=ShardRecipe(holdout=0.11))  # 207 pictures, on which restoration is measured


def emoji_text() -> Recipe:
    """`diffusion run --preset emoji-text`: the demo's pictures by class and caption, the captions read by MiniLM.

    Hardware: two CPU cores.  Time: 9:19, of which training 7:07, on a machine with other work to do.
    Result: prompts bring kind and colour, seldom the thing itself; Frechet distance 1,204 (the demo then: 1,176).
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

    Hardware: two CPU cores, 4 GiB of memory.  Time: the demo's, and 3:00 for the student, of which
    training 2:30, on a machine with other work to do.  Result: its teacher's pictures; Frechet distance 1,242, the
    teacher's 1,184.
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
            restoration_pictures=4,
            grid_columns=4,
        ),
        gate=GateRecipe(max_loss=10.0),
        serve=ServeRecipe(slots=4, queue=32, max_n=8),
    )


def emoji_gpu() -> Recipe:
    """`diffusion run --preset emoji-gpu`: the demo's pictures on one GPU, with a network eight times as large.

    Hardware: one GPU with 16 GiB.  Time: untested; its 2,000,000 pictures cost 29 PFLOP, so minutes.  Result: untested.
    """
    line = demo()
    unet = UNetRecipe(channels=96, blocks=(2, 2, 2), attention=(16, 8), dropout=0.1)
    train = TrainRecipe(
        unet=unet, images=2_000_000, batch_size=256, lr=2e-3, warmup_images=50_000, checkpoint_images=250_000
    )
    return line.model_copy(update={"name": "emoji-gpu", "train": train})


def fashion_mnist() -> Recipe:
    """`diffusion run --preset fashion-mnist --source fashion-mnist/`: 32 x 32 clothes by class, from its IDX files.

    Hardware: one GPU with 16 GiB.  Time: untested; its 6,000,000 pictures cost 34 PFLOP, so minutes.  Result: untested.
    """
    unet = UNetRecipe(channels=64, blocks=(2, 2, 2), attention=(8,), stem=1)
    return Recipe(
        name="fashion-mnist",
        shard=ShardRecipe(resolution=32, shard_size=1_024),
        train=TrainRecipe(
            unet=unet, images=6_000_000, batch_size=256, lr=2e-3, warmup_images=50_000, checkpoint_images=1_000_000
        ),
        evaluate=EvaluateRecipe(samples=10_000, batch_size=250),
    )


def cifar10() -> Recipe:
    """`diffusion run --preset cifar10 --source cifar-10/`: 32 x 32 photographs by class, in one folder for each class.

    Hardware: one GPU with 40 GiB.  Time: untested; its 100,000,000 pictures cost 3.8 EFLOP, three hours at 40 % of an H100's
    989 TFLOP/s.  Result: untested.
    """
    unet = UNetRecipe(channels=128, multipliers=(1, 2, 2), blocks=(4, 4, 4), attention=(16, 8), stem=1, dropout=0.13)
    return Recipe(
        name="cifar10",
        shard=ShardRecipe(resolution=32, shard_size=1_024),
        train=TrainRecipe(
            unet=unet,
            images=100_000_000,
            batch_size=512,
            lr=1e-3,
            warmup_images=1_000_000,
            hflip=True,
            noise_mean=-1.2,  # [EDM, Table 1]
            noise_std=1.2,
            checkpoint_images=5_000_000,
            window=8_192,
        ),
        evaluate=EvaluateRecipe(
            samples=50_000,
            batch_size=500,
            sampling=SamplingRecipe(sampler="heun", steps=18, sigma_min=0.002, guidance=1.0),  # [EDM, Table 1]
        ),
    )


def imagenet64() -> Recipe:
    """`diffusion run --preset imagenet64 --source s3://bucket/imagenet/ --workers 8`: 64 x 64 photographs by class.

    Hardware: eight GPUs with 40 GiB.  Time: untested; its 400,000,000 pictures cost 34 EFLOP, three hours at 40 % of eight
    H100s' 989 TFLOP/s.  Result: untested.
    """
    unet = UNetRecipe(channels=192, blocks=(3, 3, 3), attention=(16, 8), dropout=0.1)
    return Recipe(
        name="imagenet64",
        shard=ShardRecipe(shard_size=4_096, holdout=0.01),
        train=TrainRecipe(
            unet=unet,
            images=400_000_000,
            batch_size=2_048,
            lr=1e-3,
            decay="inverse_sqrt",  # [EDM2, Eq. 67]
            decay_images=70_000_000,
            warmup_images=10_000_000,
            hflip=True,
            noise_mean=-0.8,  # [EDM2, Table 6]
            noise_std=1.6,
            checkpoint_images=20_000_000,
            streams=64,
            window=16_384,
        ),
        evaluate=EvaluateRecipe(
            samples=50_000, batch_size=250, sampling=SamplingRecipe(steps=32, sigma_min=0.002), loss_pictures=1_000
        ),
    )


def latent256() -> Recipe:
    """`diffusion run --preset latent256 --source s3://bucket/photographs/ --workers 8`: 256 x 256 pictures as latents.

    Needs the weights of an AutoencoderKL with 4 channels and a factor of 8 (docs/latents.md).
    Hardware: eight GPUs with 40 GiB.  Time: untested; its 400,000,000 pictures cost 60 EFLOP, five hours at 40 % of eight
    H100s' 989 TFLOP/s.  Result: untested.
    """
    line = imagenet64()
    train = line.train.model_copy(
        update={
            "unet": UNetRecipe(channels=256, blocks=(3, 3, 3), attention=(16, 8), stem=1),
            "codec": "autoencoder-kl",
            "codec_channels": 4,
            "codec_factor": 8,
            "batch_size": 1_024,
            "hflip": False,
            "sigma_data": 1.0,
            "noise_mean": 0.3,  # [EDM2, Table 6], whose latents have half the deviation
            "noise_std": 1.0,
        }
    )
    shard = ShardRecipe(resolution=256, encoding="jpeg", shard_size=1_024, holdout=0.01)
    return line.model_copy(update={"name": "latent256", "shard": shard, "train": train})


PRESETS: dict[str, Callable[[], Recipe]] = {
    "demo": demo,
    "emoji-text": emoji_text,
    "restorer": restorer,
    "few-steps": few_steps,
    "smoke": smoke,
    "emoji-gpu": emoji_gpu,
    "fashion-mnist": fashion_mnist,
    "cifar10": cifar10,
    "imagenet64": imagenet64,
    "latent256": latent256,
}
