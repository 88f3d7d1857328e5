"""The chart, rendered by the real helm for every example: valid, safe, and of one mind with the code."""

from __future__ import annotations

import argparse
import ast
import base64
import copy
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from starlette.routing import Route

import helm
from scripts import ROOT, load_script
from tpserve.compile.__main__ import add_compile_arguments
from tpserve.coordinator.engine_door import TOKEN_VARIABLE as ENGINE_TOKEN_VARIABLE
from tpserve.coordinator.gateway.config import GatewayConfig
from tpserve.coordinator.health import PROBES
from tpserve.coordinator.metrics import Metrics
from tpserve.coordinator.metrics_catalogue import sample_names
from tpserve.coordinator.operations import make_app
from tpserve.coordinator.router.__main__ import add_arguments as add_router_arguments
from tpserve.coordinator.router.__main__ import config_of as router_config_of
from tpserve.coordinator.router.arguments import TOKEN_VARIABLE
from tpserve.coordinator.serve_arguments import add_arguments
from tpserve.coordinator.speculation import choose_speculation, draft_step_tokens

NAMES = [path.stem for path in helm.EXAMPLES]
KUBERNETES_VERSIONS = ("1.31", "1.34", "1.37")
CUSTOM_GROUPS = ("ray.io", "monitoring.coreos.com", "keda.sh", "gateway.networking.k8s.io", "inference.networking")
KUBERAYS = {"ranks"}
"""Containers that KubeRay starts, probes and ends."""
CLIENT_AUTH = ("--set", "gateway.tls.existingSecret=a,gateway.tls.clientCASecret=b,gateway.tls.clientAuth=required")
STOP_MARGIN_S = 20
"""Ranks and Ray end after the drain."""

each_example = pytest.mark.parametrize("example", NAMES)


def of_kind(example: str, *kinds: str) -> list[dict[str, Any]]:
    return [document for document in helm.render(example) if document["kind"] in kinds]


def pods(example: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield (labels, spec) of every pod that an example starts."""
    for document in helm.render(example):
        match document["kind"]:
            case "Deployment" | "StatefulSet" | "Job":
                templates = [document["spec"]["template"]]
            case "RayCluster":
                groups = [document["spec"]["headGroupSpec"], *document["spec"].get("workerGroupSpecs", [])]
                templates = [group["template"] for group in groups]
            case _:
                continue
        for template in templates:
            yield template["metadata"]["labels"], template["spec"]


def containers(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [*spec.get("initContainers", []), *spec["containers"]]


def serve_arguments(container: dict[str, Any]) -> list[str]:
    args: list[str] = container["args"]
    return args[args.index("serve") :]


def engines(example: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return (pod spec, container) of the engine."""
    return [(spec, one) for _, spec in pods(example) for one in spec["containers"] if one["name"] == "engine"]


@each_example
def test_helm_lint_is_content(example: str) -> None:
    values = str(helm.CHART / "examples" / f"{example}.yaml")
    done = helm.run("lint", "--strict", str(helm.CHART), "--values", values)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@each_example
def test_kubernetes_knows_every_field(example: str, version: str) -> None:
    for document in helm.render(example):
        if not document["apiVersion"].startswith(CUSTOM_GROUPS):
            kubernetes_validate.validate(copy.deepcopy(document), version, strict=True)


def strict(schema: Any) -> Any:
    """Return an OpenAPI schema of a CRD as JSON schema that refuses unknown fields, as the API server does."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: strict(value) for name, value in schema.items() if not name.startswith("x-") and name != "format"}
    if "(?i)" in str(found.get("pattern", "")):  # Go takes it anywhere, Python at the begin
        found["pattern"] = "(?i)" + found["pattern"].replace("(?i)", "")
    if schema.get("x-kubernetes-int-or-string"):
        found = {"type": ["integer", "string"]}
    elif isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        found.setdefault("additionalProperties", False)
    return found


@each_example
def test_operators_know_every_field_of_their_objects(example: str) -> None:
    folder = os.environ.get("TPSERVE_CRDS")
    if folder is None:
        pytest.skip("set TPSERVE_CRDS to a folder with the CRDs' YAML of the operators")
    schemas = {}
    for path in Path(folder).glob("*.yaml"):
        for crd in yaml.safe_load_all(path.read_text()):
            for version in crd["spec"]["versions"] if crd else []:
                key = (f"{crd['spec']['group']}/{version['name']}", crd["spec"]["names"]["kind"])
                schemas[key] = strict(version["schema"]["openAPIV3Schema"])
    for document in helm.render(example):
        if document["apiVersion"].startswith(CUSTOM_GROUPS):
            schema = schemas[document["apiVersion"], document["kind"]]
            schema["properties"]["metadata"] = {"type": "object"}
            jsonschema.validate(document, schema)


# ---- of one mind with the code


class _Refused(Exception):
    pass


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise _Refused(message)


@each_example
def test_the_flags_are_those_of_tpserve(example: str) -> None:
    parser = _Parser()
    add_arguments(parser)
    ((_, container),) = engines(example)
    args = parser.parse_args(serve_arguments(container)[1:])
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    if args.no_gateway:
        assert (args.engine_host, args.engine_port, args.operations_port) == (
            "0.0.0.0",
            ports["grpc"],
            ports["operations"],
        )
    else:
        assert (args.host, args.port) == ("0.0.0.0", ports["http"])
        assert args.engine_host == "127.0.0.1"  # whoever reaches that port needs no key


@each_example
def test_the_gateways_configuration_is_the_codes(example: str) -> None:
    for labels, spec in pods(example):
        for container in spec["containers"]:
            if container["name"] != "gateway":
                continue
            assert container["command"] == ["python", "-m", "tpserve.coordinator.gateway"]
            config = GatewayConfig.from_json(container["args"][0])
            assert config.port == container["ports"][0]["containerPort"]
            host, _, port = config.engine_address.partition(":")
            (service,) = (one for one in of_kind(example, "Service") if one["metadata"]["name"] == host)
            assert int(port) in [item["port"] for item in service["spec"]["ports"]]
            assert labels["app.kubernetes.io/component"] == "gateway"
            ((_, engine),) = engines(example)
            mount = next(one for one in container["volumeMounts"] if one["name"] == "models")
            assert config.model_dir.startswith(mount["mountPath"])
            assert config.model_dir == serve_arguments(engine)[1]


@each_example
def test_the_router_knows_every_replica_by_its_name(example: str) -> None:
    routers = [one for _, spec in pods(example) for one in spec["containers"] if one["name"] == "router"]
    sets = of_kind(example, "StatefulSet")
    assert len(routers) == len(sets), "replicas have names where a router is given them, and nowhere else"
    for container, replicas in zip(routers, sets, strict=True):
        parser = _Parser()
        add_router_arguments(parser)
        assert container["args"][0] == "router"
        config = router_config_of(parser.parse_args(container["args"][1:]))
        assert (config.host, config.port) == ("0.0.0.0", container["ports"][0]["containerPort"])
        ((_, engine),) = engines(example)
        (port,) = (one["containerPort"] for one in engine["ports"] if one["name"] == "http")
        (service,) = (
            one for one in of_kind(example, "Service") if one["metadata"]["name"] == replicas["spec"]["serviceName"]
        )
        assert service["spec"]["clusterIP"] == "None"
        assert service["spec"]["publishNotReadyAddresses"] is True
        domain = f"{service['metadata']['name']}.{helm.NAMESPACE}.svc"
        assert config.backends == tuple(
            f"http://{replicas['metadata']['name']}-{number}.{domain}:{port}"
            for number in range(replicas["spec"]["replicas"])
        )
        # One secret lets streams move; who does not know it cannot make a replica go on with anything.
        tokens = [
            [one["valueFrom"]["secretKeyRef"] for one in each["env"] if one["name"] == TOKEN_VARIABLE]
            for each in (container, engine)
        ]
        assert tokens[0] == tokens[1] != []
        (secret,) = of_kind(example, "Secret")
        assert secret["metadata"]["name"] == tokens[0][0]["name"]
        assert len(base64.b64decode(secret["data"][tokens[0][0]["key"]])) >= 32


def test_pods_of_a_group_reach_each_other_and_nobody_else_reaches_their_ray() -> None:
    policies = {one["metadata"]["name"]: one["spec"] for one in of_kind("kuberay-two-nodes", "NetworkPolicy")}
    (rule,) = policies["r-tpserve-ray"]["ingress"]
    assert "ports" not in rule
    assert [source["podSelector"] for source in rule["from"]] == [policies["r-tpserve-ray"]["podSelector"]]
    (selected,) = rule["from"][0]["podSelector"]["matchExpressions"]
    assert set(selected["values"]) == {labels["app.kubernetes.io/component"] for labels, _ in pods("kuberay-two-nodes")}
    (service,) = of_kind("kuberay-two-nodes", "Service")
    assert service["spec"]["selector"]["app.kubernetes.io/component"] == "engine", "ranks beside answer no HTTP"
    (cluster,) = of_kind("kuberay-two-nodes", "RayCluster")
    head, (workers,) = cluster["spec"]["headGroupSpec"], cluster["spec"]["workerGroupSpecs"]
    assert head["rayStartParams"]["num-cpus"] == workers["rayStartParams"]["num-cpus"] == "4"
    for group in (head, workers):
        (container,) = group["template"]["spec"]["containers"]
        assert {"name": "RAY_worker_niceness", "value": "0"} in container["env"]


def test_only_the_router_and_the_scraper_reach_replicas_behind_it() -> None:
    policies = {one["metadata"]["name"]: one["spec"] for one in of_kind("router", "NetworkPolicy")}
    (rule,) = policies["r-tpserve-engine"]["ingress"]
    (source,) = rule["from"]
    assert source["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "router"
    assert policies["r-tpserve-http"]["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "router"


@each_example
def test_the_job_compiles_what_the_engine_loads(example: str) -> None:
    jobs = of_kind(example, "Job")
    if not jobs:
        return
    serve, compiler = _Parser(), _Parser()
    add_arguments(serve)
    add_compile_arguments(compiler)
    ((engine_spec, engine),) = engines(example)
    served = serve.parse_args(serve_arguments(engine)[1:])
    assert served.jit_policy == "READONLY"
    spec = jobs[0]["spec"]["template"]["spec"]
    compiled = [compiler.parse_args(container["args"][1:]) for container in containers(spec)]
    awaited = [
        compiler.parse_args([*waits["args"][3:], "--jit-policy=READONLY"]) for waits in engine_spec["initContainers"]
    ]
    speculation = choose_speculation(served)
    draft_tokens = draft_step_tokens(
        served.max_num_batched_tokens, served.max_num_seqs, on_gpu=compiled[0].device != "cpu"
    )
    for one in [*compiled, *awaited]:
        for name in ("max_num_seqs", "max_model_len"):
            assert getattr(one, name) == getattr(served, name), name
        is_draft = one.model != served.model
        assert one.max_num_batched_tokens == (draft_tokens if is_draft else served.max_num_batched_tokens)
        if not is_draft:
            assert (one.quantization, one.kv_cache_dtype) == (served.quantization, served.kv_cache_dtype)
            assert one.draft_model == served.draft_model
            assert one.max_num_draft_tokens == (0 if speculation is None else speculation.max_num_draft_tokens)
        else:  # as `tpserve serve` compiles it
            assert (one.model, one.tp) == (served.draft_model, speculation.draft_tp if speculation else None)
            assert (one.quantization, one.max_num_draft_tokens, one.cut_model_len) == ("auto", 0, True)
            assert (one.kv_cache_dtype, one.target_model) == ("auto", served.model)
    needed = [(served.model, served.tp)]
    if speculation is not None and speculation.draft_model is not None:
        needed.append((speculation.draft_model, speculation.draft_tp))
    assert [(one.model, one.tp) for one in awaited] == needed
    assert set(needed) <= {(one.model, one.tp) for one in compiled}
    assert len({one.device for one in [*compiled, *awaited]}) == 1


def test_a_dedicated_draft_has_gpus_of_its_own() -> None:
    flags = ("--set", "engine.draft.placement=dedicated,engine.draft.tensorParallelSize=2")
    for extra, gpus in (((), 2), (flags, 4)):
        documents = helm.render("draft", *extra)
        (engine,) = (one for one in documents if one["kind"] == "Deployment")
        (container,) = engine["spec"]["template"]["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == gpus
        assert container["resources"]["requests"]["nvidia.com/gpu"] == gpus


@pytest.mark.parametrize("tokens", ["auto", "mlc", "1", "8"])
def test_the_library_is_compiled_for_the_draft_tokens_that_are_served(tokens: str) -> None:
    compiler, serve = _Parser(), _Parser()
    add_compile_arguments(compiler)
    add_arguments(serve)
    documents = helm.render("draft", "--set", f"engine.draft.numSpeculativeTokens={tokens}")
    (job,) = (one for one in documents if one["kind"] == "Job")
    (target,) = job["spec"]["template"]["spec"]["containers"]
    (engine,) = (one for one in documents if one["kind"] == "Deployment")
    (container,) = engine["spec"]["template"]["spec"]["containers"]
    speculation = choose_speculation(serve.parse_args(serve_arguments(container)[1:]))
    assert speculation is not None
    assert compiler.parse_args(target["args"][1:]).max_num_draft_tokens == speculation.max_num_draft_tokens


def gateway_routes() -> set[str]:
    """Return the paths that the gateway's app declares, from its source: building it needs a model."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / "coordinator/gateway/app.py").read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("get", "post"):
            if node.args and isinstance(node.args[0], ast.Constant):
                found.add(str(node.args[0].value))
    return found


@each_example
def test_probes_and_scrapes_go_to_routes_and_ports_that_exist(example: str) -> None:
    operations = {route.path for route in make_app(None, Metrics("m")).routes if isinstance(route, Route)}  # type: ignore[arg-type]  # not asked
    for _, spec in pods(example):
        for container in spec["containers"]:
            ports = {port["name"] for port in container.get("ports", [])}
            for name in ("startup", "readiness", "liveness"):
                if f"{name}Probe" not in container:
                    assert spec.get("restartPolicy") == "Never" or container["name"] in KUBERAYS
                    continue
                get = container[f"{name}Probe"]["httpGet"]
                assert get["port"] in ports
                if container["name"] == "router":
                    assert f'"{get["path"]}"' in (ROOT / "coordinator/router/app.py").read_text()
                else:
                    routes = operations if get["port"] == "operations" else gateway_routes()
                    assert "/health/{probe}" in routes
                assert get["path"].removeprefix("/health/") in PROBES
    for service in of_kind(example, "Service"):
        backends = [
            one
            for labels, spec in pods(example)
            if service["spec"]["selector"].items() <= labels.items()
            for one in spec["containers"]
        ]
        assert backends, f"{service['metadata']['name']} selects no pod"
        named = {port["name"] for one in backends for port in one["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= named
    for monitor in of_kind(example, "PodMonitor", "ServiceMonitor"):
        selector = monitor["spec"]["selector"]["matchLabels"]
        endpoints = monitor["spec"].get("podMetricsEndpoints") or monitor["spec"]["endpoints"]
        assert [one["path"] for one in endpoints] == ["/metrics"]
        assert "/metrics" in operations & gateway_routes()
        if monitor["kind"] == "PodMonitor":
            named = {
                port["name"]
                for labels, spec in pods(example)
                if selector.items() <= labels.items()
                for one in spec["containers"]
                for port in one["ports"]
            }
        else:
            named = {
                port["name"]
                for service in of_kind(example, "Service")
                if selector.items() <= service["metadata"]["labels"].items()
                for port in service["spec"]["ports"]
            }
        assert {one["port"] for one in endpoints} <= named


@each_example
def test_scaling_reads_metrics_that_exist(example: str) -> None:
    for document in of_kind(example, "ScaledObject", "HorizontalPodAutoscaler"):
        for name in re.findall(r"tpserve_\w+", json.dumps(document["spec"])):
            assert name in sample_names()
        target = document["spec"]["scaleTargetRef"]
        (deployment,) = (one for one in of_kind(example, "Deployment") if one["metadata"]["name"] == target["name"])
        assert "replicas" not in deployment["spec"], "the scaler and helm would fight over it"


def test_the_charts_files_are_those_of_the_repository() -> None:
    for path, text in load_script("helm/make_files.py").files().items():
        assert path.read_text() == text, f"{path.name}: run helm/make_files.py"


# ---- right by default


@each_example
def test_gpus_shared_memory_and_time_fit_the_degree(example: str) -> None:
    ((spec, container),) = engines(example)
    args = serve_arguments(container)
    (tp,) = (int(arg.removeprefix("--tp=")) for arg in args if arg.startswith("--tp="))
    gpus = container["resources"]["limits"].get("nvidia.com/gpu")
    assert gpus == container["resources"]["requests"].get("nvidia.com/gpu")
    clusters = of_kind(example, "RayCluster")
    workers = clusters[0]["spec"].get("workerGroupSpecs", []) if clusters else []
    beside = sum(
        group["replicas"] * group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
        for group in workers
    )
    assert (gpus or 0) + beside == (0 if "--device=cpu" in args else tp)
    assert ("--tp-across-nodes=pack" in args) == bool(workers)
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    assert volumes[mounts["/tmp"]]["emptyDir"]["sizeLimit"]
    probe = container["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 1800


@each_example
def test_the_grace_outlasts_the_drain(example: str) -> None:
    for _, spec in pods(example):
        for container in spec["containers"]:
            if "lifecycle" not in container:
                assert spec.get("restartPolicy") == "Never" or container["name"] in KUBERAYS
                continue
            sleep_s = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
            if container["name"] == "router":
                (drain_s,) = (float(a.partition("=")[2]) for a in container["args"] if a.startswith("--drain-timeout="))
            elif container["name"] == "gateway":
                drain_s = GatewayConfig.from_json(container["args"][0]).drain_timeout_s
            else:
                args = serve_arguments(container)
                (drain_s,) = (float(a.partition("=")[2]) for a in args if a.startswith("--drain-timeout="))
            assert spec["terminationGracePeriodSeconds"] >= sleep_s + drain_s + STOP_MARGIN_S


@each_example
def test_pods_are_unprivileged_and_their_root_is_read_only(example: str) -> None:
    for _, spec in pods(example):
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers(spec):
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["requests"]
            assert container["resources"]["limits"]["memory"]
            # What the process writes to is mounted: its cache, its temporary files, nothing else.
            writable = {one["mountPath"] for one in container["volumeMounts"] if not one.get("readOnly")}
            assert writable <= {"/cache", "/tmp", "/dev/shm"}


def test_secrets_are_in_no_argument_and_no_environment() -> None:
    text = json.dumps([spec for _, spec in pods("ingress-tls")])
    (secret,) = (one for one in of_kind("ingress-tls", "Secret") if "stringData" in one)
    (keys,) = secret["stringData"].values()
    assert keys.split() == ["replace-me-by-an-existing-secret"]
    assert keys.strip() not in text
    assert "/etc/tpserve/keys/api-keys" in text


def secrets_of(spec: dict[str, Any], container: dict[str, Any]) -> dict[str, str]:
    """Return the Secret that is mounted at each folder of a container."""
    volumes = {one["name"]: one.get("secret", {}).get("secretName") for one in spec["volumes"]}
    mounts = {one["mountPath"]: volumes[one["name"]] for one in container["volumeMounts"]}
    return {folder: secret for folder, secret in mounts.items() if secret is not None}


@each_example
def test_the_files_that_flags_name_are_those_of_mounted_secrets(example: str) -> None:
    for _, spec in pods(example):
        for container in containers(spec):
            mounted = secrets_of(spec, container)
            named = re.findall(r"/etc/tpserve/[\w./-]+", json.dumps(container.get("args", [])))
            assert {path.rpartition("/")[0] for path in named} == set(mounted), container["name"]
            assert all(one["readOnly"] for one in container["volumeMounts"] if one["mountPath"] in mounted)


def test_client_certificates_are_asked_for_and_probes_need_none() -> None:
    ((spec, container),) = engines("client-certificates")
    parser = _Parser()
    add_arguments(parser)
    args = parser.parse_args(serve_arguments(container)[1:])
    mounted = secrets_of(spec, container)
    assert mounted[str(args.ssl_certfile.parent)] == mounted[str(args.ssl_keyfile.parent)] == "llm-example-com-tls"
    assert (args.ssl_certfile.name, args.ssl_keyfile.name) == ("tls.crt", "tls.key"), "as kubernetes.io/tls has them"
    assert (mounted[str(args.ssl_ca_certs.parent)], args.ssl_ca_certs.name) == ("llm-clients-ca", "ca.crt")
    assert args.ssl_client_auth == "required"
    ports = {one["name"]: one["containerPort"] for one in container["ports"]}
    assert (args.operations_host, args.operations_port) == ("0.0.0.0", ports["operations"])
    assert args.engine_host == "127.0.0.1"
    probes = [container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")]
    assert {(one["port"], one["scheme"]) for one in probes} == {("operations", "HTTP")}
    ((_, rule),) = (
        one["spec"]["ingress"]
        for one in of_kind("client-certificates", "NetworkPolicy")
        if one["metadata"]["name"] == "r-tpserve-http"
    )
    assert rule["ports"] == [{"port": "operations", "protocol": "TCP"}]
    assert rule["from"][0]["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "monitoring"}
    (monitor,) = of_kind("client-certificates", "PodMonitor")
    assert [(one["port"], "scheme" in one) for one in monitor["spec"]["podMetricsEndpoints"]] == [("operations", False)]


def test_probes_and_scrapes_speak_tls_where_the_pods_do() -> None:
    flags = (
        "--set",
        "gateway.tls.existingSecret=t,metrics.podMonitor.enabled=true,metrics.serviceMonitor.enabled=true",
    )
    for example, name, extra in (
        ("tp1", "engine", flags),
        ("ingress-tls", "gateway", flags),
        ("router", "router", ()),
    ):
        documents = helm.render(example, *extra)
        found = [
            one
            for document in documents
            if document["kind"] in ("Deployment", "StatefulSet")
            for one in document["spec"]["template"]["spec"]["containers"]
        ]
        (container,) = (one for one in found if one["name"] == name)
        for probe in ("startup", "readiness", "liveness"):
            assert container[f"{probe}Probe"]["httpGet"]["scheme"] == "HTTPS"
        for other in found:
            if other["name"] != name:
                assert other["readinessProbe"]["httpGet"]["scheme"] == "HTTP"
        (service,) = (one for one in documents if one["kind"] == "ServiceMonitor")
        assert [one["scheme"] for one in service["spec"]["endpoints"]] == ["https"]
        (monitor,) = (one for one in documents if one["kind"] == "PodMonitor")
        schemes = [one.get("scheme") for one in monitor["spec"]["podMetricsEndpoints"]]
        assert schemes == ["https" if name == "engine" else None], "of the engine's pods"


@pytest.mark.parametrize("example", ["ingress-tls", "tp4"])
def test_gateways_and_engine_show_the_same(example: str) -> None:
    ((engine_spec, engine),) = engines(example)
    ((gateway_spec, gateway),) = (
        (spec, one) for _, spec in pods(example) for one in spec["containers"] if one["name"] == "gateway"
    )
    parser = _Parser()
    add_arguments(parser)
    args = parser.parse_args(serve_arguments(engine)[1:])
    config = GatewayConfig.from_json(gateway["args"][0])
    files = (config.engine_ssl_certfile, config.engine_ssl_keyfile, config.engine_ssl_ca_certs)
    assert files == tuple(map(str, (args.engine_ssl_certfile, args.engine_ssl_keyfile, args.engine_ssl_ca_certs)))
    assert not args.engine_insecure
    folder = str(args.engine_ssl_certfile.parent)
    assert secrets_of(engine_spec, engine)[folder] == secrets_of(gateway_spec, gateway)[folder] == "tpserve-engine-tls"
    tokens = [
        [one["valueFrom"]["secretKeyRef"] for one in each["env"] if one["name"] == ENGINE_TOKEN_VARIABLE]
        for each in (engine, gateway)
    ]
    assert tokens[0] == tokens[1] != []
    made = [one for one in of_kind(example, "Secret") if one["metadata"]["name"] == tokens[0][0]["name"]]
    assert len(made) == (1 if example == "ingress-tls" else 0), "one is made where none is given"
    for secret in made:
        assert len(base64.b64decode(secret["data"][tokens[0][0]["key"]])) >= 32


def test_an_engine_without_tls_is_asked_for() -> None:
    documents = helm.render("ingress-tls", "--set", "gateway.engineTls.existingSecret=,gateway.engineTls.insecure=true")
    text = json.dumps(documents)
    assert "--engine-insecure" in text
    assert "engine-tls" not in text
    assert ENGINE_TOKEN_VARIABLE not in text


def test_only_gateways_reach_the_engines_port() -> None:
    policies = {one["metadata"]["name"]: one["spec"] for one in of_kind("ingress-tls", "NetworkPolicy")}
    grpc, operations = policies["r-tpserve-engine"]["ingress"]
    assert grpc["ports"] == [{"port": "grpc", "protocol": "TCP"}]
    assert grpc["from"][0]["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "gateway"
    assert operations["from"][0]["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "monitoring"}


def test_nothing_is_downloaded_where_nothing_can_be() -> None:
    ((_, container),) = engines("air-gapped")
    assert {"name": "HF_HUB_OFFLINE", "value": "1"} in container["env"]
    (egress,) = (one for one in of_kind("air-gapped", "NetworkPolicy") if one["spec"]["policyTypes"] == ["Egress"])
    assert 443 not in [port["port"] for rule in egress["spec"]["egress"] for port in rule.get("ports", [])]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--set", "engine.tensorParallelSize=3"), "must be one of 1, 2, 4, 8"),
        (("--set", "engine.tp=4"), "'tp' not allowed"),
        (("--set", "gateway.separate=true,engine.replicas=2"), "engine.replicas"),
        (("--set", "gateway.separate=true,model.path=HF://a/b"), "HF://a/b"),
        (("--set", "autoscaling.keda.enabled=true,autoscaling.hpa.enabled=true"), "choose one"),
        (("--set", "autoscaling.keda.enabled=true,gateway.separate=true"), "gateway.separate"),
        (("--set", "engine.ray.mode=kuberay,engine.replicas=2"), "RayCluster"),
        (("--set", "inferencePool.enabled=true"), "endpointPicker.name"),
        (("--set", "httpRoute.enabled=true"), "parentRefs"),
        (("--set", "ingress.enabled=true"), "ingress.hosts"),
        (("--set", "tracing.otlpEndpoint=collector"), "otlpEndpoint"),
        (("--set", "router.enabled=true,gateway.separate=true"), "gateway.separate"),
        (("--set", "router.enabled=true,engine.ray.mode=kuberay"), "RayCluster"),
        (("--set", "router.enabled=true,autoscaling.keda.enabled=true"), "set engine.replicas"),
        (("--set", "router.enabled=true,engine.replicas=0"), "engine.replicas"),
        (("--set", "gateway.separate=true"), "gateway.engineTls.existingSecret, or set gateway.engineTls.insecure"),
        (("--set", "gateway.engineTls.existingSecret=a,gateway.engineTls.insecure=true"), "choose one"),
        (("--set", "gateway.tls.clientCASecret=a"), "gateway.tls asks for client certificates and has no"),
        (("--set", "gateway.tls.existingSecret=a,gateway.tls.clientCASecret=b"), "need each other"),
        (
            ("--set", "router.enabled=true,router.tls.existingSecret=a,router.tls.clientAuth=optional"),
            "need each other",
        ),
        (("--set", "router.enabled=true,gateway.tls.existingSecret=a"), "give router.tls"),
        (("--set", "router.tls.existingSecret=a"), "router.tls needs router.enabled"),
        ((*CLIENT_AUTH, "--set", "gateway.separate=true"), "take optional"),
        ((*CLIENT_AUTH, "--set", "metrics.serviceMonitor.enabled=true"), "take metrics.podMonitor"),
        (
            (*CLIENT_AUTH, "--set", "inferencePool.enabled=true,inferencePool.endpointPicker.name=p"),
            "endpoint pickers read",
        ),
        (("--set", "router.tls.clientAuth=required"), "'none', 'optional'"),
        (("--set", "router.policy=random"), "'prefix', 'least-loaded', 'round-robin'"),
        (("--set", "router.enabled=true,inferencePool.enabled=true,inferencePool.endpointPicker.name=p"), "take one"),
        (("--set", "engine.ray.workers=1"), "engine.ray.mode kuberay"),
        (("--set", "engine.ray.mode=kuberay,engine.ray.workers=1,engine.tensorParallelSize=4"), "is less than"),
        (("--set", "engine.draft.method=draft"), "needs engine.draft.model"),
        (("--set", "engine.draft.method=ngram,engine.draft.model=/models/m"), "looks tokens up"),
        (("--set", "engine.draft.tensorParallelSize=2"), "does not divide"),
        (
            ("--set", "engine.tensorParallelSize=4,engine.draft.tensorParallelSize=2,engine.draft.model=/models/m"),
            "set engine.draft.tensorParallelSize to 1 or 4",
        ),
        (("--set", "engine.draft.numSpeculativeTokens=9"), "numSpeculativeTokens"),
        (("--set", "compile.enabled=true,engine.draft.model=/models/m"), "engine.maxModelLen"),
    ],
)
def test_values_that_cannot_work_are_refused_with_the_remedy(flags: tuple[str, ...], words: str) -> None:
    assert words in helm.refusal(*flags)


def test_the_rules_of_the_chart_pass_promtool(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: apt-get install prometheus")
    (rule,) = of_kind("tp1", "PrometheusRule")
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump(rule["spec"]))
    done = subprocess.run([promtool, "check", "rules", path], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert rule["spec"] == yaml.safe_load((ROOT / "deploy/prometheus/rules.yaml").read_text())
    boards = {name for one in of_kind("tp1", "ConfigMap") for name in one["data"]}
    assert boards == {path.name for path in (ROOT / "deploy/grafana").glob("*.json")}
