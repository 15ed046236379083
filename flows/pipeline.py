"""The line: shard -> train (-> sweep) -> evaluate -> register -> (distill -> evaluate -> register) -> deploy."""

import time

from prefect import flow

from diffusion.recipe import Frozen, Recipe
from diffusion.store.refs import DatasetRef, EvaluationRef, ModelRef, RunRef, SweepRef
from flows.deploy import deploy_stage
from flows.distill import student_stages
from flows.endpoint import Endpoint
from flows.evaluate import evaluate_stage
from flows.living import living
from flows.offer import Offer
from flows.origin import resolved, started_from, warm_start
from flows.planned import held_against, plan_for
from flows.preflight import Until, check
from flows.register import check_champion, register_stage
from flows.shard import shard_stage
from flows.site import Site
from flows.stage import Done
from flows.sweep import swept_stages
from flows.told import show, tell_failed
from flows.train import train_stage


class Line(Frozen):
    """What the line made.  sweep: the ways of drawing that were tried, and student: the measure of one, where the recipe
    asks for it; `model` is then the student's.  seconds: per stage; reused: the stages that took no work, why: the reason
    of each.
    """

    dataset: DatasetRef
    run: RunRef
    sweep: SweepRef | None = None
    evaluation: EvaluationRef
    student: EvaluationRef | None = None
    model: ModelRef
    endpoint: Endpoint | None
    seconds: dict[str, float]
    reused: tuple[str, ...]
    why: dict[str, str] = {}


@flow(name="pipeline", on_failure=[tell_failed], on_crashed=[tell_failed])
def pipeline(
    recipe: Recipe = Recipe(),
    source: str = "embedded",
    until: Until = "deploy",
    site: Site | None = None,
    dataset: DatasetRef | None = None,
    init: str | None = None,
    warm: bool = False,
) -> Line:
    """From pictures to an endpoint.

    source: a folder, a .zip, or "embedded".  until: the last stage.  site: None for the one the worker's environment
    describes.  dataset: a published one to go on from, instead of the source.  init: the registered model whose weights
    training starts from, see `flows.origin`.  warm: it is the champion of recipe.name, where there is one yet: so a schedule
    goes on from what it has.  What is finished already is not done again.
    """
    site = site or Site.from_environment()
    check(recipe, source, until, site, dataset, init)
    site.prepare()
    with living(site):
        line = _line(recipe, source, until, site, dataset, warm_start(recipe, init, site) if warm else init)
        show(line, site)
    return line


def _line(recipe: Recipe, source: str, until: Until, site: Site, dataset: DatasetRef | None, init: str | None) -> Line:
    init = init and resolved(init, site)  # an alias may move meanwhile
    sharded = () if dataset is not None else (shard_stage(recipe.shard, source, site),)
    dataset = dataset or sharded[0].ref
    train = started_from(recipe.train, init, dataset, site)
    plan = plan_for(recipe.model_copy(update={"train": train}), source, dataset, site, deploys=until == "deploy")
    run = train_stage(train, dataset, recipe.name, site, recipe.evaluate, recipe.sweep.ema)
    recipe, swept = swept_stages(recipe, run.ref, site)
    evaluation = evaluate_stage(recipe.evaluate, run.ref, recipe.name, site)
    model = register_stage(recipe, evaluation.ref, site)
    done: tuple[Done, ...] = (*sharded, run, *swept, evaluation, model)
    if recipe.distill.steps:
        done += (taught := student_stages(recipe, evaluation.ref, site))
        model = taught[-1]
    times: dict[str, float] = {}
    for stage in done:  # a student is evaluated and registered after its teacher
        times[stage.stage] = times.get(stage.stage, 0.0) + stage.seconds
    worked = {stage.stage for stage in done if not stage.reused}
    endpoint = None
    if until == "deploy":
        started = time.monotonic()
        check_champion(model.ref, site)
        # the champion, not the model just made: where the gate refused that one, the one before it goes on
        endpoint = deploy_stage(recipe.serve, Offer(name=recipe.name), site)
        times["deploy"] = time.monotonic() - started
        worked.add("deploy")
    held_against(plan, {stage: taken for stage, taken in times.items() if stage in worked}, recipe.name, run.ref, site)
    return Line(
        dataset=dataset,
        run=run.ref,
        sweep=swept[0].ref if swept else None,
        evaluation=evaluation.ref,
        student=taught[1].ref if recipe.distill.steps else None,
        model=model.ref,
        endpoint=endpoint,
        seconds=times,
        reused=tuple(dict.fromkeys(stage.stage for stage in done if stage.stage not in worked)),
        why={stage.stage: stage.why for stage in done if stage.stage not in worked},
    )
