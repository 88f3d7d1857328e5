"""Writes what the chart takes from elsewhere: values.schema.json from values.yaml, rules and dashboards from deploy/.

Run: python helm/make_files.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
CHART = ROOT / "helm/tpserve"

FREE = {
    *("annotations", "labels", "nodeSelector", "affinity", "podAnnotations", "resources", "podSecurityContext"),
    "securityContext",
}
"""Objects that Kubernetes knows better."""
FACTS: dict[str, dict[str, Any]] = {
    "model.path": {"minLength": 1, "description": "A folder or GGUF file under /models, or HF://org/name."},
    "model.volume.accessModes": {"minItems": 1},
    "engine.replicas": {"minimum": 0, "description": "Whole replicas; more than 1 only without gateway.separate."},
    "engine.tensorParallelSize": {"enum": [1, 2, 4, 8], "description": "GPUs (or processes on a CPU) of one replica."},
    "engine.device": {"enum": ["cuda", "cpu"]},
    "engine.mode": {"enum": ["local", "interactive", "server"]},
    "engine.quantization": {"minLength": 1},
    "engine.kvCacheDtype": {"enum": ["auto", "bfloat16", "fp8"], "description": "fp8: half the memory, on GPUs."},
    "engine.maxNumSeqs": {"minimum": 1},
    "engine.maxNumBatchedTokens": {"minimum": 1},
    "engine.maxModelLen": {"type": ["integer", "null"], "minimum": 2},
    "engine.maxNumQueuedRequests": {"minimum": 1},
    "engine.stepTimeoutSeconds": {"minimum": 1},
    "engine.replayTimeoutSeconds": {"minimum": 1},
    "engine.ray.mode": {"enum": ["local", "kuberay"]},
    "engine.draft.model": {
        "description": "A smaller model with the same vocabulary, or an EAGLE-3 head; empty: no draft."
    },
    "engine.draft.method": {"enum": ["", "draft", "ngram", "suffix"]},
    "engine.draft.tensorParallelSize": {
        "enum": [1, 2, 4, 8],
        "description": "Ranks of one draft group; where colocated it divides the engine's degree; on GPUs 1 or all.",
    },
    "engine.draft.placement": {
        "enum": ["colocated", "dedicated"],
        "description": "dedicated: a pod asks for as many more GPUs as the draft's degree.",
    },
    "engine.draft.numSpeculativeTokens": {
        "type": ["integer", "string"],
        "enum": [*range(1, 9), "auto", "mlc"],
        "description": "Draft tokens of a step.",
    },
    "engine.ray.ranksPerPod": {"enum": [0, 1, 2, 4, 8]},
    "router.replicas": {"minimum": 1},
    "router.policy": {"enum": ["prefix", "least-loaded", "round-robin"]},
    "router.maxInFlightPerBackend": {"minimum": 1},
    "router.queueTimeoutSeconds": {"minimum": 1},
    "router.key": {"minLength": 1},
    "gateway.replicas": {"minimum": 1},
    "gateway.tls.existingSecret": {"description": "A kubernetes.io/tls Secret: HTTPS at the pods."},
    "gateway.tls.clientCAKey": {"minLength": 1},
    "gateway.tls.clientAuth": {"enum": ["none", "optional", "required"]},
    "gateway.engineTls.existingSecret": {"description": "tls.crt, tls.key and ca.crt, of engine and gateways."},
    "gateway.engineTls.tokenKey": {"minLength": 1},
    "router.tls.existingSecret": {"description": "A kubernetes.io/tls Secret: HTTPS at the router."},
    "router.tls.clientCAKey": {"minLength": 1},
    "router.tls.clientAuth": {"enum": ["none", "optional"], "description": "Its probes have no certificate."},
    "ports.http": {"minimum": 1024, "maximum": 65535},
    "ports.engine": {"minimum": 1024, "maximum": 65535},
    "ports.operations": {"minimum": 1024, "maximum": 65535},
    "service.port": {"minimum": 1, "maximum": 65535},
    "service.type": {"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
    "startup.budgetSeconds": {"minimum": 30, "description": "Download, compilation and loading must fit."},
    "shutdown.preStopSeconds": {"minimum": 0},
    "shutdown.drainSeconds": {"minimum": 1},
    "compile.tensorParallelSizes": {"items": {"type": "integer", "enum": [1, 2, 4, 8]}, "uniqueItems": True},
    "compile.activeDeadlineSeconds": {"minimum": 60},
    "image.digest": {"pattern": "^(sha256:[0-9a-f]{64})?$"},
    "image.pullPolicy": {"enum": ["IfNotPresent", "Always", "Never"]},
    "metrics.compat": {"enum": ["none", "vllm"]},
    "tracing.protocol": {"enum": ["grpc", "http/protobuf"]},
    "tracing.otlpEndpoint": {"pattern": "^(https?://.+)?$"},
    "logFormat": {"enum": ["text", "json"]},
    "podDisruptionBudget.maxUnavailable": {"type": ["integer", "string"]},
    "apiKeys.keys": {"items": {"type": "string", "minLength": 8}},
}


def schema(value: Any, path: str = "") -> dict[str, Any]:
    """Return the JSON schema of a value and of what it holds."""
    found: dict[str, Any]
    if isinstance(value, dict):
        found = {"type": "object"}
        if path.rpartition(".")[2] not in FREE:
            found["additionalProperties"] = False
            found["properties"] = {
                name: schema(item, f"{path}.{name}" if path else name) for name, item in value.items()
            }
            if not path:  # Helm's own
                found["properties"]["global"] = {"type": "object"}
    elif isinstance(value, bool):
        found = {"type": "boolean"}
    elif isinstance(value, int):
        found = {"type": "integer", "minimum": 0}
    elif isinstance(value, list):
        found = {"type": "array"}
    elif value is None:
        found = {}
    else:
        found = {"type": "string"}
    return found | FACTS.get(path, {})


def files() -> dict[Path, str]:
    """Return every file's content."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    head = {"$schema": "https://json-schema.org/draft-07/schema#", "title": "Values of the chart tpserve"}
    found = {CHART / "values.schema.json": json.dumps(head | schema(values), indent=1) + "\n"}
    found[CHART / "files/rules.yaml"] = (ROOT / "deploy/prometheus/rules.yaml").read_text()
    for board in sorted((ROOT / "deploy/grafana").glob("*.json")):
        found[CHART / "files/dashboards" / board.name] = board.read_text()
    return found


if __name__ == "__main__":
    for path, text in files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
