"""What is deployed fits together: dashboards and alerts ask for figures that the server has, mounts
exist, names agree.

Breaks for: operators, who would find an empty panel or a silent alert on the day they need it.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import yaml
from convserve.server.app import create_app
from convserve.server.settings import ServerSettings
from fake_engine import FakeEngine
from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
TOKENIZER = ROOT / "tests" / "data" / "tokenizer"
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "convserve.json").read_text())
PROMETHEUS_LABELS = {"instance", "job", "le"}
WORDS = {"and", "or", "unless", "bool", "by", "without", "vector"}


def load(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


def expressions() -> Iterator[str]:
    for panel in DASHBOARD["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["definition"]
    for group in load("prometheus/alerts.yml")["groups"]:
        yield from (rule["expr"] for rule in group["rules"])


def asked(expression: str) -> dict[str, set[str]]:
    """Metrics of a PromQL expression, each with the labels it is selected by."""
    found: dict[str, set[str]] = {}
    labels = ",".join(re.findall(r"\b(?:by|without)\s*\(([^)]*)\)", expression))
    variables = re.match(r"label_values\((\w+), (\w+)\)", expression)
    bare = re.sub(r"\b(?:by|without)\s*\([^)]*\)", "", expression)
    for name, selected in re.findall(r"([a-zA-Z_:][\w:]*)\b(?!\s*\()\s*(\{[^}]*\})?", bare):
        if name not in WORDS and not re.search(rf"[\[\d$]{name}\b", bare):
            found[name] = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", selected))
    if variables:
        return {variables[1]: {variables[2]}}
    grouped = {label.strip() for label in labels.split(",") if label.strip()}
    return {name: selected | grouped for name, selected in found.items()}


@pytest.fixture
async def exposed() -> dict[str, set[str]]:
    """What /metrics has: sample names, each with its labels. Prometheus itself makes `up`."""
    app = create_app(FakeEngine(), TOKENIZER, ServerSettings(model_names=("tiny",)))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
        text = (await client.get("/metrics")).text
    names: dict[str, set[str]] = {"up": set()}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            names.setdefault(sample.name, set()).update(sample.labels)
    return names


def test_metrics_are_found_in_promql() -> None:
    expression = """histogram_quantile(0.9, sum by (le, x) (rate(a_bucket{m=~"$m",n!="1"}[5m])))
        / (sum(b:c{}) > 1e3) or vector(0) and d"""
    grouped = {"le", "x"}
    assert asked(expression) == {"a_bucket": {"m", "n"} | grouped, "b:c": grouped, "d": grouped}


def test_every_figure_that_is_asked_for_is_there(exposed: dict[str, set[str]]) -> None:
    count = 0
    for expression in expressions():
        metrics = asked(expression)
        assert metrics, expression
        for name, labels in metrics.items():
            count += 1
            assert name in exposed, expression
            assert labels - PROMETHEUS_LABELS <= exposed[name], expression
            assert ("le" in labels) == name.endswith("_bucket"), expression
    assert count > 50


def test_the_dashboard_is_whole() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
    [source] = load("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    [chosen] = [v for v in DASHBOARD["templating"]["list"] if v["type"] == "datasource"]
    assert chosen["current"]["value"] == source["uid"]


def test_the_parts_of_the_composition_agree() -> None:
    services = load("compose.yaml")["services"]
    server, prometheus, grafana = (services[n] for n in ("server", "prometheus", "grafana"))
    for service in services.values():
        for published in service["ports"]:
            assert published.startswith("127.0.0.1:")
        for mount in service["volumes"]:
            if (source := mount.split(":")[0]).startswith("."):
                assert (DEPLOY / source).is_dir(), mount
            else:
                assert source in load("compose.yaml")["volumes"]
    for service in (prometheus, grafana):
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"])
    assert (DEPLOY / server["build"]["context"]).resolve() == ROOT
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert "EXPOSE 8000" in dockerfile
    [job] = load("prometheus/prometheus.yml")["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["server:8000"]}]
    assert job["job_name"] == "convserve"  # alerts and panels select it
    assert "--open-metrics" in server["command"]
    [provider] = load("grafana/provisioning/dashboards/convserve.yaml")["providers"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in grafana["volumes"]
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/convserve.json"
    [source] = load("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    arguments = set(load("compose.gpu.yaml")["services"]["server"]["build"]["args"])
    assert arguments <= set(re.findall(r"^ARG (\w+)", dockerfile, re.MULTILINE))


@pytest.mark.parametrize(
    "command",
    ["check config prometheus.yml", "check rules alerts.yml", "test rules alerts_test.yml"],
)
def test_promtool_takes_the_rules(command: str) -> None:
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("there is no promtool")
    folder = DEPLOY / "prometheus"
    done = subprocess.run(
        [promtool, *command.split()], cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
