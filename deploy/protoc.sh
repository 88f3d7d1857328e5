#!/usr/bin/env bash
# Regenerates proto/pb/ from proto/*.proto. The virtual path makes imports and descriptor names tpserve.proto.pb.*.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
"$python" -m grpc_tools.protoc -Itpserve/proto/pb=proto --python_out=deploy/python --pyi_out=deploy/python \
  --grpc_python_out=deploy/python tpserve/proto/pb/{common,worker,engine}.proto
