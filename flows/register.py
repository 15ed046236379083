"""register: an evaluation -> a version of a model, `champion` if the gate lets it pass."""

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact

from diffusion.adapters.mlflow_champion import CHAMPION
from diffusion.adapters.mlflow_gate import champion_version, settle, stands, verdict_of
from diffusion.adapters.mlflow_registry import resolve
from diffusion.evaluation.gate.verdict import Verdict, markdown
from diffusion.recipe import Recipe, digest_of
from diffusion.store.refs import EvaluationRef, ModelRef
from diffusion.store.works import work_key
from flows.retries import TASK
from flows.site import Site
from flows.stage import Done, once
from flows.told import tell_verdict


@flow(name="register")
def register(recipe: Recipe, evaluation: EvaluationRef, site: Site | None = None) -> ModelRef:
    """Register an evaluated model as recipe.name and move its aliases.  site: None for the worker's environment's."""
    site = site or Site.from_environment()
    site.prepare()
    return register_stage(recipe, evaluation, site).ref


@task(name="register", **TASK)
def register_stage(recipe: Recipe, evaluation: EvaluationRef, site: Site) -> Done[ModelRef]:
    name = recipe.name
    mlflow = site.tracking(name)

    def make() -> ModelRef:
        return settle(mlflow, evaluation, recipe, "cuda" if site.use_gpu else "cpu")

    def now(ref: ModelRef) -> ModelRef | None:
        try:
            found = resolve(mlflow, name, ref.version, site.store)  # its aliases may have moved since
        except ValueError:
            return None
        return found if found.digest == ref.digest and stands(mlflow, found, recipe.gate) else None

    same = "the same report, the same gate, and the version is in the registry"
    done = once("register", _key(recipe, evaluation, site), ModelRef, site, make, now=now, same=same)
    verdict = judged(done.ref, site)
    if not done.reused:
        tell_verdict(done.ref, verdict)
    page = _markdown(done.ref, verdict)
    create_markdown_artifact(page, key="verdict", description=f"Model {done.ref.digest}")
    return done


def judged(model: ModelRef, site: Site) -> Verdict | None:
    """How the gate last judged a registered model; None where it was registered before verdicts were kept."""
    return verdict_of(site.tracking(model.name), model.name, model.version)


def check_champion(model: ModelRef, site: Site) -> None:
    """Raises ValueError, with the gate's reasons, where neither this model nor another of its name is the champion."""
    if CHAMPION in model.aliases or champion_version(site.tracking(model.name), model.name) is not None:
        return
    raise ValueError(
        f"{model.name} version {model.version} is not served: the gate refused it and there is no champion before it."
        f" {'; '.join(model.reasons)}. Train longer (--set train.images=N), or change the gate (--set gate.max_loss=X)"
    )


def _key(recipe: Recipe, evaluation: EvaluationRef, site: Site) -> str:
    # the registry is part of it: a model registered in one is not registered in another
    served = () if recipe.gate.max_latency_s is None else (digest_of(recipe.serve),)  # it is measured as it is served
    said = (recipe.data_licence,) if recipe.data_licence else ()
    inputs = (evaluation.digest, evaluation.bundle_digest, recipe.name, site.mlflow_uri, *served, *said)
    return work_key("register", recipe.gate, inputs)


def _markdown(ref: ModelRef, verdict: Verdict | None) -> str:
    """The verdict for Prefect's page."""
    reasons = "\n".join(f"- {reason}" for reason in ref.reasons) + "\n"
    why = reasons if verdict is None else markdown(verdict)
    return f"# {ref.name} version {ref.version}\n\naliases: {', '.join(ref.aliases) or 'none'}\n\n{why}"
