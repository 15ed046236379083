"""The direction of imports: flows -> adapters -> lineage, planning -> training, evaluation, serving -> data, store ->
mathematics."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = (  # a package may import its own row and those below it
    ("flows",),
    ("diffusion.adapters",),
    ("diffusion.lineage", "diffusion.planning"),
    ("diffusion.training", "diffusion.evaluation", "diffusion.serving"),
    ("diffusion.data", "diffusion.store"),
    ("diffusion",),
)
ROOMS = {  # of diffusion.evaluation: what each may import of it; its own files stand in no room, and any may import them
    "metrics": set(),
    "extractors": set(),
    "facts": {"metrics", "extractors"},
    "report": {"metrics", "facts"},
    "sweep": {"metrics", "extractors", "report"},
    "gate": {"metrics", "facts", "report"},
}
EDGES = {
    "ray",
    "mlflow",
    "fastapi",
    "starlette",
    "uvicorn",
    "prefect",
    "typer",
    "rich",
    "sqlalchemy",
    "prometheus_client",
}
MATHEMATICS = {"torch", "numpy", "diffusion"}
FILES = sorted(path.relative_to(ROOT) for package in ("diffusion", "flows") for path in ROOT.glob(f"{package}/**/*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def layer_of(module: str) -> int:
    return next(i for i, row in enumerate(LAYERS) if any(f"{module}.".startswith(f"{package}.") for package in row))


def imported(path: Path) -> Iterator[str]:
    """Every module a file imports, at its top or inside a function; not those for type checkers only."""
    tree = ast.parse((ROOT / path).read_text())
    for_checkers = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_checkers:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield node.module
            for alias in node.names:
                submodule = Path(*node.module.split("."), alias.name)
                if (ROOT / submodule).with_suffix(".py").exists() or (ROOT / submodule / "__init__.py").exists():
                    yield f"{node.module}.{alias.name}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_downwards(path: Path) -> None:
    layer = layer_of(module_of(path))
    ours = [module for module in imported(path) if module.split(".")[0] in ("diffusion", "flows")]
    assert [module for module in ours if layer_of(module) < layer] == []


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.parent.parent == Path("diffusion/evaluation")], ids=str
)
def test_rooms_of_evaluation(path: Path) -> None:
    """The metrics know nothing of the rest, nor do the extractors; facts know no report, and no room knows the gate."""
    room = path.parent.name
    others = [module.split(".")[2] for module in imported(path) if module.startswith("diffusion.evaluation.")]
    assert {other for other in others if other in ROOMS} <= ROOMS[room] | {room}
    if not ROOMS[room]:
        assert set(others) <= {room}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_frameworks_stay_at_the_edges(path: Path) -> None:
    layer = layer_of(module_of(path))
    allowed = {0: EDGES - {"ray", "mlflow", "fastapi"} | {"ray"}, 1: EDGES - {"prefect", "typer", "rich"}}.get(
        layer, set()
    )
    assert [module for module in imported(path) if module.split(".")[0] in EDGES - allowed] == []


@pytest.mark.parametrize("path", [path for path in FILES if path.parent == Path("diffusion")], ids=str)
def test_mathematics_imports_torch_and_numpy_only(path: Path) -> None:
    roots = {module.split(".")[0] for module in imported(path)}
    assert roots - MATHEMATICS - sys.stdlib_module_names == set()


@pytest.mark.timeout(600)  # a busy machine takes minutes
def test_core_imports_without_the_frameworks() -> None:
    core = [module_of(path) for path in FILES if layer_of(module_of(path)) > 1]
    assert len(core) > 20
    program = f"""
import sys
for name in {sorted(EDGES)!r}:
    sys.modules[name] = None
import importlib
for name in {core!r}:
    importlib.import_module(name)
print(len([name for name in sys.modules if name.startswith("diffusion")]))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= len(core)


@pytest.mark.timeout(600)
def test_importing_does_nothing(tmp_path: Path) -> None:
    """No file is written, no thread or process started, no seed or default changed."""
    modules = [module_of(path) for path in FILES if layer_of(module_of(path)) > 1]
    program = f"""
import importlib, os, random, sys, threading
sys.path.insert(0, {str(ROOT)!r})
import torch
before = (random.getstate(), torch.random.get_rng_state().tolist(), torch.get_num_threads(), dict(os.environ))
for name in {modules!r}:
    importlib.import_module(name)
after = (random.getstate(), torch.random.get_rng_state().tolist(), torch.get_num_threads(), dict(os.environ))
assert before == after
assert threading.active_count() == 1
"""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("*")) == []
