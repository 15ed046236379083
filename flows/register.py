"""register: an evaluation -> a version of a model, `champion` if the gate lets it pass."""

from functools import partial
from pathlib import Path

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact

from diffusion.adapters.mlflow_champion import CHAMPION
from diffusion.adapters.mlflow_gate import champion_version, settle, stands, verdict_of
from diffusion.adapters.mlflow_registry import resolve
from diffusion.evaluation.gate.again import of_one_kind, recipe_for
from diffusion.evaluation.gate.verdict import Verdict, markdown
from diffusion.evaluation.report.report import Report, load_report
from diffusion.recipe import Recipe, digest_of
from diffusion.store.bundle_spec import read_facts
from diffusion.store.refs import EvaluationRef, ModelRef, ReportRef
from diffusion.store.works import work_key
from flows.console import progress, say
from flows.retries import TASK
from flows.site import Site, ray_running
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
        again = partial(_measured_again, recipe, evaluation, site)
        return settle(mlflow, evaluation, recipe, "cuda" if site.use_gpu else "cpu", again)

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


def _measured_again(
    recipe: Recipe, evaluation: EvaluationRef, site: Site, version: str, champion: Report, challenger: Report
) -> Report | None:
    """The champion's report by the challenger's pictures and recipe; None where it cannot be asked for the same."""
    found = resolve(site.tracking(recipe.name), recipe.name, version, site.store)
    spec, _ = read_facts(Path(found.uri), found.digest)
    own, _ = read_facts(Path(evaluation.bundle_uri), evaluation.bundle_digest)
    if not of_one_kind(own, spec):
        return None
    dataset, measure = evaluation.run.dataset, recipe_for(champion, spec, challenger, recipe.evaluate)
    if measure is None:
        return None

    def make() -> ReportRef:
        from diffusion.adapters.ray_evaluate import evaluate_published  # loads Ray

        say(f"  champion   version {version} is measured as this one was, to be compared")
        with ray_running(site), progress("champion", "pictures") as update:
            return evaluate_published(
                (found.uri, found.digest),
                dataset,
                measure,
                site.store,
                actors=site.most_workers,
                use_gpu=site.use_gpu,
                reading=site.reading,
                progress=update,
            )

    same = f"version {version}, the same pictures, the same recipe"
    key = work_key("evaluate", measure, (found.digest, dataset.digest))
    ref = once("champion", key, ReportRef, site, make, same=same).ref
    report = load_report(ref.uri, ref.digest)
    return None if report.problems else report


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
