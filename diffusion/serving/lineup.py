"""Which models an endpoint offers, and which of them a request gets: a function of the request alone."""

import hashlib
import json
import secrets
from collections.abc import Mapping
from itertools import accumulate
from typing import Any, NamedTuple

from pydantic import Field, model_validator

from diffusion.recipe import Frozen
from diffusion.store.refs import ModelRef

# Fields that say how an answer is wanted, and nothing of what is drawn
_OF_THE_ANSWER = {
    "model",
    "seed",
    "stream",
    "partial_images",
    "response_format",
    "output_format",
    "output_compression",
    "priority",
    "timeout",
    "user",
    "quality",
    "background",
}


class UnknownModel(ValueError):
    """No such model is offered.  `allowed`: those that are."""

    def __init__(self, asked: str, allowed: list[str]) -> None:
        there = f"{allowed[0]!r} is" if len(allowed) == 1 else f"{', '.join(map(repr, allowed))} are"
        super().__init__(f"model={asked[:80]!r} is not served here, {there}")
        self.allowed = allowed


class Key(NamedTuple):
    """What tells models apart."""

    name: str
    version: str
    digest: str

    @classmethod
    def of(cls, model: ModelRef) -> "Key":
        return cls(model.name, model.version, model.digest)


class Canary(Frozen):
    """A version that gets a share of the requests which name none."""

    version: str
    share: float = Field(gt=0, lt=1)


class Lineup(Frozen):
    """What is offered.  A name means its first version here, and no name the first model's."""

    models: tuple[ModelRef, ...] = Field(min_length=1)
    canaries: tuple[Canary, ...] = Field((), description="Versions of the first model's name")

    @model_validator(mode="after")
    def _checks(self) -> "Lineup":
        asked = [(model.name, model.version) for model in self.models]
        if len(set(asked)) < len(asked):
            raise ValueError("a version is offered once: leave out the second")
        present, *others = [model.version for model in self.models if model.name == self.models[0].name]
        versions = [canary.version for canary in self.canaries]
        if len(set(versions)) < len(versions) or not set(versions) <= set(others):
            raise ValueError(f"canaries {versions} are to be other versions than {present} that are offered, each once")
        if sum(canary.share for canary in self.canaries) >= 1:
            raise ValueError(
                "the shares of canaries are 1 or more together: nothing would be left for the present version"
            )
        return self

    @property
    def present(self) -> ModelRef:
        """What a request gets that names no model, if no canary does."""
        return self.models[0]

    @property
    def kept(self) -> tuple[ModelRef, ...]:
        """The present one and the canaries: what any request may get is always loaded."""
        versions = [canary.version for canary in self.canaries]
        return (self.present, *(self._version(self.present.name, version) for version in versions))

    def names(self) -> dict[str, ModelRef]:
        """How each can be asked for: by its name, and of one name's versions those after the first by `name@version`."""
        first = {model.name: model for model in reversed(self.models)}
        of = {True: "{0.name}", False: "{0.name}@{0.version}"}
        return {of[first[model.name] is model].format(model): model for model in self.models}

    def choose(self, asked: str | None, point: float) -> ModelRef:
        """The model for a request.  asked: `name`, `name@version`, or None; point: the request's, from `point_of`.

        Canaries lie side by side from 0, so a request that gets one gets it as well when its share has grown.  Raises
        UnknownModel.
        """
        name, at, version = (asked or self.present.name).partition("@")
        if at:
            found = self._version(name, version)
        elif name == self.present.name:
            ends = accumulate(canary.share for canary in self.canaries)
            found = next((model for end, model in zip(ends, self.kept[1:], strict=True) if point < end), self.present)
        else:
            found = next((model for model in self.models if model.name == name), None)
        if found is None:
            raise UnknownModel(asked or "", list(self.names()))
        return found

    def _version(self, name: str, version: str) -> ModelRef | None:
        return next((model for model in self.models if (model.name, model.version) == (name, version)), None)


def seeded(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a request with a seed: the one that is there, or a new one in its place."""
    return {**fields, "seed": secrets.randbelow(2**32) if fields.get("seed") in (None, "") else fields["seed"]}


def point_of(fields: Mapping[str, Any], files: Mapping[str, bytes]) -> float:
    """Where in [0, 1) a request lies, by its seed and what it wants drawn, of which pictures.  Equal ones lie together."""
    said = {name: value for name, value in fields.items() if name not in _OF_THE_ANSWER and value not in (None, "")}
    said["files"] = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    body = json.dumps([str(fields.get("seed")), said], sort_keys=True)
    return int.from_bytes(hashlib.sha256(body.encode()).digest()[:8]) / 2**64
