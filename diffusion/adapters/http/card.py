"""What GET /v1/models says of a model."""

from diffusion.data.pictures.buckets import shown
from diffusion.degradation import FACTORS
from diffusion.recipe import ServeRecipe
from diffusion.sampler import SAMPLERS
from diffusion.serving.lineup import Key
from diffusion.serving.restoring import TASKS
from diffusion.serving.shelf import Shelf
from diffusion.store.bundle_spec import BundleSpec
from diffusion.store.refs import ModelRef


def cards(shelf: Shelf, limits: ServeRecipe) -> list[dict]:
    """Of each that can be asked for, the one first that is meant where none is named."""
    lineup, specs = shelf.offered()
    return [card(name, model, specs[Key.of(model)], limits, shelf.since) for name, model in lineup.names().items()]


def card(name: str, model: ModelRef, spec: BundleSpec, limits: ServeRecipe, since: int) -> dict:
    """OpenAI's fields, its lineage, what may be asked, and what is taken where nothing is.  name: by which it is."""
    restores = spec.codec is None and spec.lesson is None
    return {
        "id": name,
        "object": "model",
        "created": since,
        "owned_by": "diffusion",
        "name": model.name,
        "version": model.version,
        "bundle_digest": model.digest,
        "run_digest": model.run_digest,
        "dataset_digest": model.dataset_digest,
        "classes": spec.classes,
        "prompts": spec.text is not None,
        "resolution": spec.resolution,
        "sizes": [shown(size) for size in spec.sizes or (spec.size,)],
        "parameters": spec.parameters,
        "guidance_kinds": spec.guidance_kinds,
        "samplers": [spec.sampling.sampler] if spec.lesson else list(SAMPLERS),
        "fixed": ["sampler", "steps", "guidance"] if spec.lesson else [],
        "restorations": list(TASKS) if restores else [],
        "trained_restorations": list(spec.degradations),
        "factors": [factor for factor in FACTORS if not spec.resolution % factor] if restores else [],
        "edits": spec.lesson is None,
        "edit_masks": restores,
        "limits": limits.model_dump(include={"max_n", "max_steps", "queue", "timeout_s"}),
        "defaults": {name: getattr(spec.sampling, name) for name in ("sampler", "steps", "guidance", "guidance_kind")},
    }
