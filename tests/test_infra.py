"""What lies in infra/ is what the published schemas, the lock file and the programs themselves take."""

import json
import lzma
import os
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
import typer
import yaml
from ray.serve.schema import ServeDeploySchema

from diffusion.adapters.ray_cluster import ray_environment
from flows import serve_app
from flows.cli import app
from flows.site import PREFIX, Site
from tests.docker_compose import NoCompose, docker_compose
from tests.dockerfile import steps
from tests.kuberay_fields import KINDS, fields, mistakes

ROOT = Path(__file__).parents[1]
INFRA = ROOT / "infra"
SCHEMAS = json.loads(lzma.decompress((ROOT / "tests" / "schemas" / "kubernetes.json.xz").read_bytes()))
LOCK = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().split())
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
COMPOSE = yaml.safe_load((INFRA / "compose.yaml").read_text())
SERVICES: dict[str, dict] = COMPOSE["services"]
MANIFESTS = [path for path in sorted((INFRA / "kubernetes").glob("*.yaml")) if path.name != "kustomization.yaml"]
OBJECTS: list[dict] = [each for path in MANIFESTS for each in yaml.safe_load_all(path.read_text())]
RAY = [each for each in OBJECTS if each["kind"].startswith("Ray")]
SITE = next(each["data"] for each in OBJECTS if each["kind"] == "ConfigMap")
OURS = [service for service in SERVICES.values() if service["image"].startswith("diffusion-pipeline:")]


def named(manifest: dict) -> str:
    return f"{manifest['kind']}-{manifest['metadata'].get('name', 'new')}"


def clusters() -> Iterator[tuple[str, dict]]:
    for each in RAY:
        spec = each["spec"]
        if "headGroupSpec" in (cluster := spec.get("rayClusterConfig", spec)):
            yield named(each), cluster


def pods() -> Iterator[tuple[str, dict]]:
    """Every pod template of the Ray clusters."""
    for name, cluster in clusters():
        yield f"{name}-head", cluster["headGroupSpec"]["template"]
        for group in cluster["workerGroupSpecs"]:
            yield f"{name}-{group['groupName']}", group["template"]


PODS = dict(pods())


# --- the published schemas


@pytest.mark.parametrize("files", [["compose.yaml"], ["compose.yaml", "compose.cuda.yaml"]], ids=len)
def test_docker_compose_takes_its_files(files: list[str]) -> None:
    """It holds them against the Compose specification's schema, and more."""
    try:
        program = docker_compose()
    except NoCompose as error:
        pytest.skip(str(error))
    secrets = dict.fromkeys(secret_names(), "x")
    command = [program, *(word for file in files for word in ("-f", INFRA / file)), "config"]
    told = subprocess.run(command, env={"PATH": os.defpath, **secrets}, capture_output=True, text=True)
    assert (told.returncode, told.stderr) == (0, "")
    assert yaml.safe_load(told.stdout)["services"].keys() == SERVICES.keys()


def secret_names() -> set[str]:
    """Those that the compose file takes from .env."""
    without = set(re.findall(r"\$\{(\w+):\?", (INFRA / "compose.yaml").read_text()))
    return without | {secret["environment"] for secret in COMPOSE["secrets"].values()}


def check_kubernetes(thing: dict) -> None:
    """Raises jsonschema.ValidationError, also for a field that is not named there."""
    group, _, version = thing["apiVersion"].rpartition("/")
    kind = {"group": group, "kind": thing["kind"], "version": version}
    (found,) = (
        name for name, each in SCHEMAS["$defs"].items() if kind in each.get("x-kubernetes-group-version-kind", [])
    )
    schema = {"$defs": SCHEMAS["$defs"], "$ref": f"#/$defs/{found}"}
    jsonschema.Draft202012Validator(schema).validate(thing)


@pytest.mark.parametrize("manifest", [each for each in OBJECTS if each not in RAY], ids=named)
def test_manifests_satisfy_kubernetes_schemas(manifest: dict) -> None:
    check_kubernetes(manifest)


@pytest.mark.parametrize("name", PODS)
def test_pods_of_ray_satisfy_kubernetes_schemas(name: str) -> None:
    check_kubernetes({"apiVersion": "v1", "kind": "Pod", **PODS[name]})


def test_a_misspelt_field_is_refused() -> None:
    pod = next(iter(PODS.values()))
    with pytest.raises(jsonschema.ValidationError, match="tolerationz"):
        check_kubernetes({"apiVersion": "v1", "kind": "Pod", **pod, "spec": {**pod["spec"], "tolerationz": []}})
    assert mistakes({"rayVersio": "2"}, KINDS["RayCluster"], "spec") == ["spec.rayVersio: KubeRay has no such field"]


@pytest.mark.parametrize("manifest", RAY, ids=named)
def test_ray_objects_have_the_fields_of_kuberay(manifest: dict) -> None:
    assert manifest["apiVersion"] == "ray.io/v1"
    assert mistakes(manifest["spec"], KINDS[manifest["kind"]], "spec") == []


def crd(kind: str) -> dict:
    """The published schema of `spec`, where a checkout of KubeRay is at hand."""
    folder = os.environ.get("DIFFUSION_TEST_KUBERAY")
    if not folder:
        pytest.skip("no CRDs: set DIFFUSION_TEST_KUBERAY to helm-chart/kuberay-operator/crds of a checkout of KubeRay")
    published = yaml.load((Path(folder) / f"ray.io_{kind.lower()}s.yaml").read_text(), yaml.CSafeLoader)
    version = next(each for each in published["spec"]["versions"] if each["name"] == "v1")
    return closed(version["schema"]["openAPIV3Schema"]["properties"]["spec"])


def closed(schema: dict) -> dict:
    """As the API server has it under strict validation: no field that is not named; a quantity is a number or text."""
    if schema.pop("x-kubernetes-int-or-string", False):
        schema.pop("type", None)
    for each in (*schema.get("properties", {}).values(), *filter(None, [schema.get("items")])):
        closed(each)
    if isinstance(schema.get("additionalProperties"), dict):
        closed(schema["additionalProperties"])
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    return schema


@pytest.mark.parametrize("manifest", RAY, ids=named)
def test_ray_objects_satisfy_the_published_crds(manifest: dict) -> None:
    schema = crd(manifest["kind"])
    jsonschema.Draft202012Validator(schema).validate(manifest["spec"])
    for path in fields(KINDS[manifest["kind"]]):
        at = schema
        for key in path:
            at = at["items"] if key == "[]" else at["properties"][key]


def test_what_the_sampler_serves_is_a_configuration_of_ray_serve() -> None:
    service = next(each for each in RAY if each["kind"] == "RayService")
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (application,) = config.applications
    assert application.import_path == f"{serve_app.__name__}:{serve_app.app.__name__}"
    serve_app.Served.model_validate(application.args)
    assert config.http_options.port == int(SITE["DIFFUSION_PORT"])
    for name in (name for name in PODS if name.startswith("RayService")):
        ports = {port["name"]: port["containerPort"] for port in PODS[name]["spec"]["containers"][0]["ports"]}
        assert ports["serve"] == config.http_options.port


# --- versions


def test_versions_are_those_of_the_lock() -> None:
    assert {cluster["rayVersion"] for _, cluster in clusters()} == {LOCK["ray"]}
    images = {service["image"] for service in OURS}
    images |= {container["image"] for pod in PODS.values() for container in pod["spec"]["containers"]}
    override = yaml.safe_load((INFRA / "compose.cuda.yaml").read_text())
    images |= {service["image"] for service in override["services"].values()}
    assert images == {f"diffusion-pipeline:{VERSION}-cpu", f"diffusion-pipeline:{VERSION}-cuda"}
    assert f'org.opencontainers.image.version="{VERSION}"' in (INFRA / "Dockerfile").read_text()


def test_images_of_others_are_pinned_by_digest() -> None:
    others = [service["image"] for service in SERVICES.values() if service not in OURS]
    assert len(others) == 4
    assert all(re.fullmatch(r"[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}", image) for image in others), others


# --- what runs: settings, commands, ports, secrets


def environments() -> Iterator[dict[str, str]]:
    yield from (service["environment"] for service in OURS if "DIFFUSION_HOME" in service.get("environment", {}))
    yield SITE


@pytest.mark.parametrize("environment", environments())
def test_the_environment_is_a_site(environment: dict[str, str]) -> None:
    values = {key: re.sub(r"^\$\{\w+:-(.*)\}$", r"\1", str(value)) for key, value in environment.items()}
    site = Site.from_environment(values)
    named = {key.removeprefix(PREFIX).lower() for key in values if key.startswith(PREFIX)}
    assert named <= set(Site.model_fields)
    assert site.access.needed
    ray = ray_environment(site.home)
    ray.pop("RAY_AUTH_TOKEN_PATH")  # a secret's place here
    assert values.items() >= ray.items()


def commands() -> Iterator[list[str]]:
    yield from (list(map(str, service["command"])) for service in OURS if "command" in service)
    for each in RAY:
        job = each["spec"].get("jobTemplate", each["spec"])
        if "entrypoint" in job:
            yield shlex.split(job["entrypoint"])


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_are_understood_by_their_programs(command: list[str]) -> None:
    program, *words = command
    if program == "diffusion":
        found = typer.main.get_command(app)
    elif program == "ray":
        from ray.scripts.scripts import cli as found
    elif program == "mlflow":
        from mlflow.cli import cli as found
    elif program == "prefect":
        from prefect.cli._app import _app

        _app.parse_args(words, print_error=False, exit_on_error=False)
        return
    else:
        assert program in ("python", "sleep")
        return
    while words and words[0] in getattr(found, "commands", {}):
        found = found.commands[words.pop(0)]
    found.make_context(program, words)


def test_only_this_machine_reaches_published_ports() -> None:
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(published) >= 6
    assert all(re.fullmatch(r"127\.0\.0\.1:(\d+):\1", port) for port in published), published


def test_services_are_closed_limited_and_watched() -> None:
    for name, service in SERVICES.items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert {"cpus", "memory", "pids"} <= service["deploy"]["resources"]["limits"].keys(), name
        assert service["healthcheck"].get("test") or name in ("setup", "pod"), name
        assert service["restart"] == ("no" if name == "setup" else "unless-stopped")
        for other, how in service.get("depends_on", {}).items():
            assert other in SERVICES
            assert (how["condition"] != "service_healthy") or "test" in SERVICES[other]["healthcheck"]


def test_secrets_are_made_at_random_and_stay(tmp_path: Path) -> None:
    script = tmp_path / "secrets.sh"
    script.write_bytes((INFRA / "secrets.sh").read_bytes())
    before: dict[str, str] = {}
    for _ in range(2):
        subprocess.run(["sh", script], check=True, capture_output=True)
        made = dict(line.split("=", 1) for line in (tmp_path / ".env").read_text().splitlines())
        assert before.items() <= made.items()
        before = made
        assert len(made) == len((tmp_path / ".env").read_text().splitlines())
    assert (tmp_path / ".env").stat().st_mode & 0o777 == 0o600
    values = [value for name, value in made.items() if name != "ENDPOINT_KEY"]
    assert len(set(values)) == len(values)
    assert min(map(len, values)) >= 20
    assert secret_names() == set(made)
    defaults = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", (INFRA / "compose.yaml").read_text()))
    assert defaults == {"DIFFUSION_WORKERS": "2"}


def test_pods_are_closed_and_heads_stay_off_spot() -> None:
    for name, pod in PODS.items():
        spec, (container,) = pod["spec"], pod["spec"]["containers"]
        assert spec["securityContext"]["runAsNonRoot"], name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["requests"].keys() == container["resources"]["limits"].keys()
        assert {"startupProbe", "livenessProbe", "readinessProbe"} <= container.keys()
        written = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert {"/tmp", "/home/diffusion", SITE["DIFFUSION_HOME"]} == written
        if name.endswith("head") or name.startswith("RayService"):
            node = spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
            (term,) = node["nodeSelectorTerms"]
            assert {each["operator"] for each in term["matchExpressions"]} == {"NotIn"}
            assert not any("spot" in str(each) for each in spec.get("tolerations", []))
    assert {cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] for _, cluster in clusters()} == {"0"}
    assert {json.dumps(cluster["authOptions"]) for _, cluster in clusters()} == {
        '{"mode": "token", "secretName": "diffusion-ray"}'
    }


def test_kustomization_and_configs_name_files_that_are_there() -> None:
    folder = INFRA / "kubernetes"
    resources = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    assert {*resources, "job.yaml", "nightly.yaml"} == {path.name for path in MANIFESTS}
    for config in COMPOSE["configs"].values():
        assert (INFRA / config["file"]).is_file()


def test_prometheus_asks_services_that_are_there() -> None:
    asked = yaml.safe_load((INFRA / "compose" / "prometheus.yml").read_text())["scrape_configs"]
    targets = [target for job in asked for static in job.get("static_configs", []) for target in static["targets"]]
    names = [name for job in asked for found in job.get("dns_sd_configs", []) for name in found["names"]]
    hosts = {target.split(":")[0] for target in targets} | set(names)
    assert hosts - {"127.0.0.1"} <= set(SERVICES)
    file = next(job for job in asked if job["job_name"] == "diffusion")["authorization"]["credentials_file"]
    assert Path(file).name in SERVICES["prometheus"]["secrets"]


# --- the image


STAGES = steps(INFRA / "Dockerfile")


def test_the_base_is_pinned_and_python_is_the_one_that_packages_are_for() -> None:
    ((instruction, base),) = STAGES[""]
    assert instruction == "ARG"
    python = re.fullmatch(r"PYTHON=python:([\d.]+)-slim-\w+@sha256:[0-9a-f]{64}", base)[1]
    for name in ("common.txt", "cpu.txt", "cuda.txt"):
        assert f"for Python {python}." in (INFRA / "requirements" / name).read_text()
    bases = {stage[0].words.split()[0] for name, stage in STAGES.items() if name}
    assert bases == {"${PYTHON}", "build", "runtime"}


def test_copied_files_are_there_and_in_the_context() -> None:
    context = (ROOT / ".dockerignore").read_text().splitlines()
    copied = [words.split() for stage in STAGES.values() for instruction, words in stage if instruction == "COPY"]
    assert len(copied) > 6
    for first, *rest in copied:
        if first.startswith("--from="):
            assert first.removeprefix("--from=") in STAGES
            continue
        for source in (first, *rest[:-1]):
            assert (ROOT / source).exists(), source
            assert f"!{source}" in context, source


def test_both_images_are_built_alike() -> None:
    cpu, cuda = ([step.words.replace("cuda", "cpu") for step in STAGES[name]] for name in ("build-cpu", "build-cuda"))
    assert cpu == cuda
    assert [step.instruction for step in STAGES["cpu"]] == ["FROM", "COPY"]


def test_the_last_stage_is_no_root_and_has_no_tools() -> None:
    runtime = dict(STAGES["runtime"])
    assert runtime["USER"] == "10001:10001"
    assert not re.search(r"\bpip install|\bapt\b|\bapt-get\b", runtime["RUN"])
    assert "pip uninstall" in runtime["RUN"]
    assert {service["user"] for service in OURS} == {runtime["USER"]}
    assert f":{Site().port}/healthz" in runtime["HEALTHCHECK"]
    assert runtime["EXPOSE"] == str(Site().port)
    assert f"DIFFUSION_HOME={SITE['DIFFUSION_HOME']}" in runtime["ENV"]


def pins(name: str) -> dict[str, tuple[str, int]]:
    """Of a file and those it includes: package -> version, and how many sha256."""
    text = (INFRA / "requirements" / name).read_text()
    found: dict[str, tuple[str, int]] = {}
    for included in re.findall(r"^-r (\S+)$", text, re.MULTILINE):
        found |= pins(included)
    for line in text.replace("\\\n", " ").splitlines():
        if pin := re.match(r"([\w.-]+)(?:==| @ https://download\.pytorch\.org/\S+/torch-)([^\s%-]+)(.*)", line):
            found[normal(pin[1])] = pin[2], len(re.findall(r"--hash=sha256:[0-9a-f]{64}\b", pin[3]))
    return found


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("name", ["cpu.txt", "cuda.txt"])
def test_packages_of_the_image_are_the_locks_each_with_its_hashes(name: str) -> None:
    locked = {normal(package): version for package, version in LOCK.items()}
    found = pins(name)
    assert {"ray", "prefect", "mlflow", "torch", "psycopg", "boto3"} <= found.keys()
    others = {package for package in found if package not in locked}
    assert all(each.startswith(("nvidia-", "cuda-")) or each in ("triton", "setuptools") for each in others), others
    assert {package: version for package, (version, _) in found.items() if package not in others} == {
        package: locked[package] for package in found if package not in others
    }
    assert min(hashes for _, hashes in found.values()) >= 1
    assert not {"pytest", "ruff", "playwright"} & found.keys()
