"""The Grafana dashboard shows what a running endpoint tells, and all of it.  Grafana itself is not asked: its file's shape
is checked as far as its documentation has it [grafana.com/docs, "Dashboard JSON model"]."""

import json
import re
from itertools import combinations
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from diffusion.serving.engine import Engine
from tests.integration.test_http import LIMITS, URL, served
from tests.random_bundle import random_bundle

FILE = Path(__file__).parents[2] / "infra" / "grafana-dashboard.json"
DASHBOARD = json.loads(FILE.read_text())
TARGETS = [target for panel in DASHBOARD["panels"] for target in panel["targets"]]
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
Series = dict[str, set[str]]  # labels by name


@pytest.fixture(scope="module")
def told(one_thread: None) -> Series:
    """What /metrics tells once something was drawn, refused and left."""
    engine = Engine(random_bundle(), slots=LIMITS.slots, queue=LIMITS.queue, timeout_s=LIMITS.timeout_s)
    with served(engine, replica="r1") as client:
        assert client.post(URL, json={"label": "cat", "steps": 2}).status_code == 200
        assert client.post(URL, json={"label": "bird"}).status_code == 422
        with pytest.raises(httpx.ReadTimeout):
            client.post(URL, json={"label": "cat", "n": 6, "steps": 1000}, timeout=0.3)
        families = text_string_to_metric_families(client.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples]
    found: Series = {}
    for sample in samples:
        found.setdefault(sample.name, set()).update(sample.labels)
    return found


def selectors(query: str) -> list[tuple[str, str]]:
    """(name, labels asked for) of each series in a query."""
    return re.findall(r"\b(diffusion_\w+)(?:\{([^}]*)\})?", query)


def test_every_series_and_label_that_it_names_is_there(told: Series) -> None:
    for target in TARGETS:
        named = selectors(target["expr"])
        assert named, target
        for name, labels in named:
            assert name in told
            assert set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", labels)) <= told[name], target["expr"]
        grouped = {label.strip() for by in re.findall(r"by \(([^)]*)\)", target["expr"]) for label in by.split(",")}
        assert grouped <= set.intersection(*(told[name] for name, _ in named)), target["expr"]
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= grouped, target
    for name, variable in VARIABLES.items():
        for series in re.findall(r"label_values\((\w+),", variable.get("definition", "")):
            assert name in told[series]


def test_every_series_that_is_told_is_shown(told: Series) -> None:
    shown = {name for target in TARGETS for name, _ in selectors(target["expr"])}
    ending = r"_(bucket|sum|count)$"
    assert {re.sub(ending, "", name) for name in told} == {re.sub(ending, "", name) for name in shown}


def test_its_queries_are_whole_and_its_variables_exist() -> None:
    for target in TARGETS:
        query = re.sub(r'"[^"]*"', "", target["expr"])
        for opening, closing in ("()", "[]", "{}"):
            assert query.count(opening) == query.count(closing)
        assert set(re.findall(r"\$(\w+)", target["expr"])) <= {*VARIABLES, "__rate_interval"}
        if re.search(r"_(total|bucket|count|sum)\b", query):  # counters are looked at by their rates
            assert len(re.findall(r"rate\(", query)) == len(re.findall(r"_(?:total|bucket|count|sum)\b", query))
    assert {target["datasource"]["uid"] for target in TARGETS} == {"${datasource}"}


def test_it_has_the_shape_that_grafana_reads() -> None:
    assert {"title", "uid", "schemaVersion", "panels", "templating", "time", "refresh"} <= DASHBOARD.keys()
    assert isinstance(DASHBOARD["schemaVersion"], int)
    assert len(DASHBOARD["uid"]) <= 40
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        for at in (panel["gridPos"] for panel in panels)
    ]
    assert all(0 <= x < 24 for cell in cells for x, _ in cell)
    assert all(one.isdisjoint(other) for one, other in combinations(cells, 2))
    for panel in panels:
        assert panel["type"] in ("timeseries", "stat")
        assert {"title", "description", "datasource", "fieldConfig", "options"} <= panel.keys()
        assert set(panel["fieldConfig"]) == {"defaults", "overrides"}
        assert panel["fieldConfig"]["defaults"]["unit"] in {"none", "short", "bytes", "s", "reqps", "ops"}
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
