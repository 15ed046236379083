"""Which ways of drawing are tried before a model is measured, and how one of them is chosen."""

from itertools import product
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from diffusion.recipe.sampling import SamplerName
from diffusion.recipe.values import Frozen, Share

if TYPE_CHECKING:
    from diffusion.recipe.line import EvaluateRecipe

MOST = 256  # settings of a grid


class Setting(Frozen):
    """A point of the grid: one average of the weights, drawn with in one way."""

    ema: float
    sampler: SamplerName
    steps: int
    guidance: float

    def __str__(self) -> str:
        return f"{self.sampler}, {self.steps} steps, guidance {self.guidance:g}, average {self.ema:g}"

    @property
    def options(self) -> str:
        """The same for the command line, without a sweep."""
        keys = (("ema", self.ema), ("sampling.sampler", self.sampler))
        keys += (("sampling.steps", self.steps), ("sampling.guidance", self.guidance))
        return " ".join(f"--set evaluate.{key}={value}" for key, value in keys)


class SweepRecipe(Frozen):
    """Every combination of these is tried; a list that is empty has the value of `evaluate` alone.  All empty: no sweep.

    Sampled on seeds of its own, so that what the evaluation then says of the chosen one was not chosen by.
    """

    ema: tuple[float, ...] = Field((), description="Relative widths of the average to try, in place of evaluate.ema")
    sampler: tuple[SamplerName, ...] = Field((), description="Samplers, in place of evaluate.sampling.sampler")
    steps: tuple[int, ...] = Field((), description="Numbers of steps, in place of evaluate.sampling.steps")
    guidance: tuple[float, ...] = Field((), description="Scales, in place of evaluate.sampling.guidance")
    samples: int = Field(512, ge=32, le=50_000, description="Pictures drawn of each setting that is not dropped before")
    first_samples: int = Field(128, ge=32, description="Of the first round; each round doubles them and drops some")
    tolerance: Share = Field(
        0.02,
        description="The fastest setting is chosen whose Frechet distance exceeds no other's by this share or more",
    )
    confidence: float = Field(0.95, ge=0.5, lt=1, description="With which that holds, and of what drops a setting")
    seed: int = Field(1, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _checks(self) -> "SweepRecipe":
        limits = {"ema": (0, 0.28, "above 0 and below 0.28"), "guidance": (-1e-9, 20.1, "from 0 to 20")}
        for name, (low, high, words) in limits.items():
            if wrong := [value for value in getattr(self, name) if not low < value < high]:
                raise ValueError(f"{name}: {wrong[0]:g} is not {words}")
        if wrong := [steps for steps in self.steps if not 2 <= steps <= 1_000]:
            raise ValueError(f"steps: {wrong[0]} is not from 2 to 1000")
        return self

    @property
    def on(self) -> bool:
        """Whether there is anything to try."""
        return bool(self.ema or self.sampler or self.steps or self.guidance)


def grid(sweep: SweepRecipe, evaluate: "EvaluateRecipe") -> tuple[Setting, ...]:
    """Every setting that the sweep tries, each once."""
    drawn = evaluate.sampling
    axes = (
        sweep.ema or (evaluate.ema,),
        sweep.sampler or (drawn.sampler,),
        sweep.steps or (drawn.steps,),
        sweep.guidance or (drawn.guidance,),
    )
    names = Setting.model_fields
    return tuple(dict.fromkeys(Setting(**dict(zip(names, values, strict=True))) for values in product(*axes)))


def tuned(evaluate: "EvaluateRecipe", setting: Setting, chosen_by: str | None = None) -> "EvaluateRecipe":
    """The same evaluation of a model that is served with this setting.  chosen_by: digest of the sweep."""
    values = evaluate.model_dump()
    values |= {"ema": setting.ema, "chosen_by": chosen_by}
    values["sampling"] |= setting.model_dump(exclude={"ema"})
    return type(evaluate).model_validate(values)


def check_sweep(sweep: SweepRecipe, evaluate: "EvaluateRecipe") -> None:
    """Raises ValueError where this sweep cannot be that of this evaluation."""
    if not sweep.on:
        return
    tried = grid(sweep, evaluate)
    if len(tried) > MOST:
        raise ValueError(f"sweep: {len(tried)} settings are more than {MOST}: leave out some values of an axis")
    if sweep.seed == evaluate.seed:
        raise ValueError(
            f"sweep.seed={sweep.seed} is that of the evaluation, whose numbers would then be of the very samples by which"
            f" the setting was chosen: give another"
        )
