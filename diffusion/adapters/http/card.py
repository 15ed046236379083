"""What GET /v1/models says of a model."""

from diffusion.adapters.http.served import Served
from diffusion.data.pictures.buckets import shown
from diffusion.degradation import FACTORS
from diffusion.sampler import SAMPLERS
from diffusion.serving.restoring import TASKS


def card(served: Served) -> dict:
    """OpenAI's fields, its lineage, what may be asked, and what is taken where nothing is."""
    model, spec, limits = served.model, served.engine.bundle.spec, served.limits
    restores = spec.codec is None and spec.lesson is None
    return {
        "id": model.name,
        "object": "model",
        "created": served.since,
        "owned_by": "diffusion",
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
