# The CPU image: compiles for the host it starts on, so it carries g++. Build from the repository's root:
#   docker build -f deploy/docker/cpu.Dockerfile -t tpserve:0.1.0 .
# Pin the base by digest in your registry's mirror: --build-arg BASE=python@sha256:...
ARG BASE=python:3.11.14-slim-bookworm

FROM ${BASE} AS build
WORKDIR /src
COPY pyproject.toml requirements.lock README.md ./
COPY collectives collectives
COPY compile compile
COPY coordinator coordinator
COPY proto proto
COPY worker worker
COPY deploy/python deploy/python
# Every version is the lock's; nothing is built for this host.
RUN python -m venv /opt/tpserve \
 && /opt/tpserve/bin/pip install --no-cache-dir --disable-pip-version-check "pip>=25.1" \
 && /opt/tpserve/bin/pip install --no-cache-dir -c requirements.lock ".[otel]"

FROM ${BASE}
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --create-home --shell /usr/sbin/nologin tpserve \
 && mkdir /cache /models && chown tpserve /cache
COPY --from=build /opt/tpserve /opt/tpserve
ENV PATH=/opt/tpserve/bin:$PATH PYTHONUNBUFFERED=1 TPSERVE_HOME=/cache
USER 10001
EXPOSE 8000
STOPSIGNAL SIGTERM
ENTRYPOINT ["tpserve"]
CMD ["serve", "--help"]
