"""distill: an evaluated model -> its few-step student, measured and registered as a version beside it."""

from prefect import flow

from diffusion.recipe import Frozen, Recipe, student_of
from diffusion.store.refs import EvaluationRef, ModelRef, RunRef
from flows.evaluate import evaluate_stage
from flows.register import register_stage
from flows.site import Site
from flows.stage import Done
from flows.train import distill_stage


class Student(Frozen):
    """What was made of a teacher."""

    run: RunRef
    evaluation: EvaluationRef
    model: ModelRef


@flow(name="distill")
def distill(recipe: Recipe, teacher: EvaluationRef, site: Site | None = None) -> Student:
    """The student of an evaluated model of this recipe.  site: None for the one the worker's environment describes."""
    site = site or Site.from_environment()
    site.prepare()
    run, evaluation, model = student_stages(recipe, teacher, site)
    return Student(run=run.ref, evaluation=evaluation.ref, model=model.ref)


def student_stages(
    recipe: Recipe, teacher: EvaluationRef, site: Site
) -> tuple[Done[RunRef], Done[EvaluationRef], Done[ModelRef]]:
    """Train, measure and register the student of the evaluated model `teacher`, each once."""
    student = student_of(recipe, teacher.bundle_digest)
    run = distill_stage(student.train, teacher.run.dataset, recipe.name, site, student.evaluate)
    evaluation = evaluate_stage(student.evaluate, run.ref, recipe.name, site)
    return run, evaluation, register_stage(student, evaluation.ref, site)
