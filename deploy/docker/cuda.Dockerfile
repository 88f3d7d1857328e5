# Two images for hosts with NVIDIA GPUs. Build from the repository's root:
#   docker build -f deploy/docker/cuda.Dockerfile --target serve   -t tpserve:0.1.0 .
#   docker build -f deploy/docker/cuda.Dockerfile --target compile -t tpserve-compile:0.1.0 .
# `compile` has nvcc and builds libraries, with or without a GPU; `serve` loads them. Pin both bases by digest in your
# registry's mirror.
ARG RUNTIME=nvidia/cuda:13.0.1-base-ubuntu24.04
ARG DEVEL=nvidia/cuda:13.0.1-devel-ubuntu24.04

FROM ${RUNTIME} AS python
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 python3-venv g++ \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --create-home --shell /usr/sbin/nologin tpserve \
 && mkdir /cache /models && chown tpserve /cache

FROM python AS build
WORKDIR /src
COPY pyproject.toml requirements.lock README.md ./
COPY collectives collectives
COPY compile compile
COPY coordinator coordinator
COPY proto proto
COPY worker worker
COPY deploy/python deploy/python
RUN python3 -m venv /opt/tpserve \
 && /opt/tpserve/bin/pip install --no-cache-dir --disable-pip-version-check "pip>=25.1" \
 && /opt/tpserve/bin/pip install --no-cache-dir -c requirements.lock ".[otel,cuda]"

FROM python AS serve
COPY --from=build /opt/tpserve /opt/tpserve
ENV PATH=/opt/tpserve/bin:$PATH PYTHONUNBUFFERED=1 TPSERVE_HOME=/cache
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001
EXPOSE 8000
STOPSIGNAL SIGTERM
ENTRYPOINT ["tpserve"]
CMD ["serve", "--help"]

FROM ${DEVEL} AS compile
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 g++ \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --create-home --shell /usr/sbin/nologin tpserve \
 && mkdir /cache /models && chown tpserve /cache
COPY --from=build /opt/tpserve /opt/tpserve
ENV PATH=/opt/tpserve/bin:$PATH PYTHONUNBUFFERED=1 TPSERVE_HOME=/cache
USER 10001
ENTRYPOINT ["tpserve"]
CMD ["compile", "--help"]
