"""How pictures are drawn."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from diffusion.recipe.values import Frozen, Positive, usual

SamplerName = Literal["heun", "ddim", "dpmpp_2m", "unipc", "ddpm", "ddpm_beta", "dpmpp_2m_sde", "heun_churn"]
DETERMINISTIC: tuple[SamplerName, ...] = ("heun", "ddim", "dpmpp_2m", "unipc")
ChainName = Literal["linear", "cosine", "source-text"]
GuidanceKind = Literal["classifier_free", "autoguidance"]


class SamplingRecipe(Frozen):
    """How a picture is drawn when a request does not say."""

    sampler: SamplerName = "dpmpp_2m"
    steps: int = Field(24, ge=2, le=1_000)
    guidance: Annotated[float, Field(ge=0, le=20)] = Field(2.5, description="1 = none; D = worse + g (D - worse)")
    guidance_kind: GuidanceKind = Field(
        "classifier_free",
        exclude_if=usual("classifier_free"),
        description="The worse answer is the null label's, or that of the model evaluate.guide_images  [Karras et al. 2024]",
    )
    guidance_interval: tuple[float, float] = Field((0.0, 1e6), description="sigma range in which guidance acts")
    guidance_rescale: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, exclude_if=usual(0.0), description="Share in which contrast is as without guidance  [Lin et al. 2024: phi]"
    )
    spacing: Literal["karras", "exponential", "trailing", "leading", "linspace"] = Field(
        "karras", description="Of the noise levels; exponential: even in log-SNR; the last three: steps t of a chain"
    )
    sigma_min: Positive = Field(0.1, description="karras, exponential: the last level above 0")
    sigma_max: Positive = Field(80.0, description="karras, exponential: the first level")
    rho: Positive = Field(7.0, description="karras: larger puts more levels where noise is low  [EDM, Eq. 5]")
    chain: ChainName = Field("linear", description="trailing, leading, linspace: beta schedule")
    chain_steps: int = Field(1_000, ge=2, le=100_000, description="trailing, leading, linspace: its length T")

    @model_validator(mode="after")
    def _checks(self) -> "SamplingRecipe":
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min={self.sigma_min} must be below sigma_max={self.sigma_max}")
        if not 0 <= self.guidance_interval[0] <= self.guidance_interval[1]:
            raise ValueError(f"guidance_interval={self.guidance_interval}: lowest sigma first, and none below 0")
        return self
