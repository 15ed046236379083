"""What is made of pictures."""

from typing import Literal

from pydantic import Field, model_validator

from diffusion.recipe.values import Frozen, Share, unset, usual


class Columns(Frozen):
    """Which columns of a table of pictures hold what.  None and () mean the usual names; see docs/sources.md."""

    image: str | None = Field(
        None, exclude_if=unset, description="Column of paths, or of pictures; none: image, path, file_name and others"
    )
    label: str | None = Field(None, exclude_if=unset, description="Column of classes; none: label or class")
    captions: tuple[str, ...] = Field((), exclude_if=unset, description="Columns of captions; none: text or caption(s)")
    weights: tuple[str, ...] = Field(
        (), exclude_if=unset, description="Columns of the captions' weights, one for each; none: weight(s)"
    )
    root: str | None = Field(
        None, exclude_if=unset, description="Folder or s3://bucket/prefix that paths start from; none: the table's"
    )

    @model_validator(mode="after")
    def _checks(self) -> "Columns":
        if self.weights and len(self.weights) != len(self.captions):
            raise ValueError(
                f"columns: {len(self.weights)} weights for {len(self.captions)} captions: name one column of weights for"
                " each column of captions"
            )
        return self


class ShardRecipe(Frozen):
    """From pictures to shards."""

    resolution: int = Field(64, ge=8, le=1024, multiple_of=8, description="Side of the square picture, pixels")
    background: str = Field("#ffffff", pattern=r"^#[0-9a-f]{6}$", description="Colour transparency is composited on")
    shard_size: int = Field(256, ge=1, le=100_000, description="Pictures per shard; the last of a split has the rest")
    holdout: Share = Field(0.05, description="Share of the pictures held out of training, chosen by content hash")
    max_rejected: Share = Field(0.1, description="Stop when a larger share of the files cannot be used")
    min_side: int = Field(
        1, ge=1, exclude_if=usual(1), description="Pictures whose shorter side has fewer pixels are set aside"
    )
    max_aspect: float | None = Field(
        None, ge=1, exclude_if=unset, description="Set aside where the longer side is more than this times the shorter"
    )
    bucket_aspect: float | None = Field(
        None,
        gt=1,
        le=8,
        exclude_if=unset,
        description="Keep the shape of pictures, to buckets of up to this aspect; unset: all become squares",
    )
    bucket_step: int = Field(
        8, ge=1, exclude_if=usual(8), description="Pixels of which both sides of a bucket are multiples"
    )
    near_duplicates: int | None = Field(
        None, ge=0, le=16, exclude_if=unset, description="Bits of 64 in which a near duplicate's hash differs at most"
    )
    encoding: Literal["png", "jpeg"] = Field(
        "png", exclude_if=usual("png"), description="Of the pictures in the shards; jpeg: not exact, for 256 pixels up"
    )
    jpeg_quality: int = Field(95, ge=1, le=100, exclude_if=usual(95), description="jpeg: 100 is the largest and best")
    columns: Columns = Columns()

    @model_validator(mode="after")
    def _checks(self) -> "ShardRecipe":
        if self.bucket_aspect is not None and self.resolution % self.bucket_step:
            raise ValueError(
                f"bucket_step={self.bucket_step} must divide resolution={self.resolution}: the square is one of the buckets"
            )
        return self
