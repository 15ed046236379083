"""Recipes: everything that changes a number, typed, frozen and hashed.  Where things run is `flows.site`, which is not."""

from diffusion.recipe.line import DistillRecipe, EvaluateRecipe, GateRecipe, Recipe, ServeRecipe, student_of
from diffusion.recipe.sampling import GuidanceKind, SamplerName, SamplingRecipe
from diffusion.recipe.shard import Columns, ShardRecipe
from diffusion.recipe.sweep import Setting, SweepRecipe, grid, tuned
from diffusion.recipe.train import Lesson, PredictionName, TaskName, TrainRecipe, UNetRecipe, checkpoints_of
from diffusion.recipe.values import Frozen, canonical_json, digest_of, first_mistake, mistake, unset, usual

__all__ = [
    "Columns",
    "DistillRecipe",
    "EvaluateRecipe",
    "Frozen",
    "GateRecipe",
    "GuidanceKind",
    "Lesson",
    "PredictionName",
    "Recipe",
    "SamplerName",
    "SamplingRecipe",
    "ServeRecipe",
    "Setting",
    "ShardRecipe",
    "SweepRecipe",
    "TaskName",
    "TrainRecipe",
    "UNetRecipe",
    "canonical_json",
    "checkpoints_of",
    "digest_of",
    "first_mistake",
    "grid",
    "mistake",
    "student_of",
    "tuned",
    "unset",
    "usual",
]
