"""What docs/security.md says of the code as a whole: nothing unpickles a file, runs words, or fetches what others name."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path.relative_to(ROOT) for folder in ("diffusion", "flows", "infra") for path in (ROOT / folder).rglob("*.py")
)
NEVER = {
    "eval",
    "exec",
    "os.popen",
    "os.system",
    "marshal.load",
    "marshal.loads",
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "cloudpickle.load",
    "cloudpickle.loads",
    "joblib.load",
    "shelve.open",
    "torch.hub.load",
    "yaml.load",
    "yaml.full_load",
    "yaml.unsafe_load",
}
MUST_SAY = {  # call -> what it must say
    "torch.load": {"weights_only": True},
    "np.load": {"allow_pickle": False},
    "np.save": {"allow_pickle": False},
    "numpy.load": {"allow_pickle": False},
}
PRETRAINED = {  # likewise, by the end of its name
    "Model.from_pretrained": {"local_files_only": True, "use_safetensors": True},
    "from_pretrained": {"local_files_only": True},
}
PROGRAMS = {Path("diffusion/evaluation/extractors/features.py")}  # where a TorchScript file of the site's is run
ASKING = {
    "urllib.request",
    "http.client",
    "requests",
    "httpx",
    "httpx2",
    "aiohttp",
    "ftplib",
    "smtplib",
    "telnetlib",
    "urllib3",
}
ASKS = {  # who asks, and whom
    Path("diffusion/adapters/ray_serve.py"): "its own endpoint, whether it is well",
    Path("diffusion/serving/load.py"): "the endpoint that `bench-serve` is for",
    Path("flows/doctor/http.py"): "the servers of the site",
    Path("flows/notify.py"): "whom DIFFUSION_NOTIFY names",
    Path("flows/prefect_server.py"): "the Prefect server that it has started",
    Path("infra/requirements/audit.py"): "the database of advisories",
}


def calls(tree: ast.AST) -> Iterator[tuple[str, dict[str, object]]]:
    """Each call as it is written, with the constants that it is given by name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            given = {each.arg: each.value.value for each in node.keywords if isinstance(each.value, ast.Constant)}
            yield ast.unparse(node.func), given


def wrong(path: Path, text: str) -> list[str]:
    found = []
    for name, given in calls(ast.parse(text)):
        base = name.removeprefix("ray.")
        if (
            base in NEVER
            or given.get("shell") is True
            or given.get("trust_remote_code")
            or name.endswith(".extractall")
        ):
            found.append(name)
        if name == "torch.jit.load" and path not in PROGRAMS:
            found.append(name)
        must = MUST_SAY.get(name) or next((say for end, say in PRETRAINED.items() if name.endswith(end)), {})
        if not must.items() <= given.items():
            found.append(f"{name} without {must}")
    return found


def test_nothing_unpickles_runs_words_or_loads_from_a_hub() -> None:
    assert len(FILES) > 300
    assert [f"{path}: {each}" for path in FILES for each in wrong(path, (ROOT / path).read_text())] == []


@pytest.mark.parametrize(
    "text",
    [
        "pickle.load(file)",
        "cloudpickle.loads(data)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "subprocess.run(words, shell=True)",
        "tarfile.open(path).extractall(folder)",
        "transformers.AutoModel.from_pretrained(folder, use_safetensors=True)",
        "transformers.CLIPModel.from_pretrained(folder, local_files_only=True)",
        "torch.jit.load(path)",
        "eval(words)",
    ],
)
def test_what_would_is_found(text: str) -> None:
    assert len(wrong(Path("diffusion/x.py"), text)) == 1


def asks(tree: ast.AST) -> Iterator[str]:
    """What is used of modules that ask others.  Naming their exceptions asks nobody."""
    nodes = list(ast.walk(tree))
    here = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names} & ASKING
    for node in nodes:
        used = []
        if isinstance(node, ast.ImportFrom) and node.module in ASKING:
            used = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in here:
            used = [ast.unparse(node)]
        yield from (name for name in used if not name.endswith(("Error", "Exception")))


def test_who_asks_other_machines_is_known() -> None:
    found = {path: sorted(set(asks(ast.parse((ROOT / path).read_text())))) for path in FILES}
    unknown = {str(path): names for path, names in found.items() if names and path not in ASKS}
    assert unknown == {}, "say in ASKS whom they ask"
    assert list(asks(ast.parse("import httpx\nhttpx.get(url)\nhttpx.HTTPError"))) == ["httpx.get"]
    assert list(asks(ast.parse("from urllib.request import urlopen"))) == ["urllib.request.urlopen"]
