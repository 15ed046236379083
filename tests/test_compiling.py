"""training/compiling.py: without a compiler it says so, before anything is trained."""

import sys

import pytest

from diffusion.recipe import TrainRecipe
from diffusion.training.compiling import check_compiler
from flows.preflight import check_devices
from flows.site import Site


def test_without_a_compiler_compiling_is_refused_by_name(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", sys.executable)
    check_compiler()
    site = Site(home=tmp_path, workers=1, gpu=False, compile=True)
    check_devices(site, TrainRecipe())
    monkeypatch.setenv("CXX", "no-such-compiler")
    for refuse in (check_compiler, lambda: check_devices(site, TrainRecipe())):
        with pytest.raises(ValueError, match=r"compiled by no-such-compiler, which is not here: install it"):
            refuse()
    check_devices(site.model_copy(update={"compile": False}), TrainRecipe())
    check_devices(site.model_copy(update={"ray": "head:6379"}), TrainRecipe())  # whose workers may be elsewhere
