{{- define "tpserve.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "tpserve.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else if contains (include "tpserve.name" .) .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "tpserve.name" .) | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "tpserve.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{ include "tpserve.selector" . }}
{{- end -}}

{{- define "tpserve.selector" -}}
app.kubernetes.io/name: {{ include "tpserve.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* Which pods answer HTTP. */}}
{{- define "tpserve.httpComponent" -}}
{{- if .Values.router.enabled }}router{{ else }}{{ ternary "gateway" "engine" .Values.gateway.separate }}{{ end -}}
{{- end -}}

{{- define "tpserve.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{- define "tpserve.compileImage" -}}
{{- $image := .Values.compile.image -}}
{{- if $image.repository -}}
{{- printf "%s:%s" $image.repository ($image.tag | default .Chart.AppVersion) -}}
{{- else -}}
{{- include "tpserve.image" . -}}
{{- end -}}
{{- end -}}

{{- define "tpserve.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "tpserve.fullname" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name | default "default" -}}
{{- end -}}
{{- end -}}

{{- define "tpserve.modelClaim" -}}
{{- .Values.model.volume.existingClaim | default (printf "%s-models" (include "tpserve.fullname" .)) -}}
{{- end -}}

{{- define "tpserve.cacheClaim" -}}
{{- .Values.cache.existingClaim | default (printf "%s-cache" (include "tpserve.fullname" .)) -}}
{{- end -}}

{{- define "tpserve.hasKeys" -}}
{{- if or .Values.apiKeys.existingSecret .Values.apiKeys.keys -}}yes{{- end -}}
{{- end -}}

{{- define "tpserve.keySecret" -}}
{{- .Values.apiKeys.existingSecret | default (printf "%s-api-keys" (include "tpserve.fullname" .)) -}}
{{- end -}}

{{/* The TLS files of an HTTP door, whose values are given: flags, volumes, and where they are mounted. */}}
{{- define "tpserve.tlsArgs" -}}
{{- if .existingSecret }}
- --ssl-certfile=/etc/tpserve/tls/tls.crt
- --ssl-keyfile=/etc/tpserve/tls/tls.key
{{- if .clientCASecret }}
- --ssl-ca-certs=/etc/tpserve/client-ca/{{ .clientCAKey }}
- --ssl-client-auth={{ .clientAuth }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "tpserve.tlsMounts" -}}
{{- if .existingSecret }}
- {name: tls, mountPath: /etc/tpserve/tls, readOnly: true}
{{- if .clientCASecret }}
- {name: client-ca, mountPath: /etc/tpserve/client-ca, readOnly: true}
{{- end }}
{{- end }}
{{- end -}}

{{- define "tpserve.tlsVolumes" -}}
{{- if .existingSecret }}
- name: tls
  secret: {secretName: {{ .existingSecret }}, defaultMode: 0440}
{{- if .clientCASecret }}
- name: client-ca
  secret: {secretName: {{ .clientCASecret }}, defaultMode: 0440}
{{- end }}
{{- end }}
{{- end -}}

{{- define "tpserve.scheme" -}}
{{- ternary "HTTPS" "HTTP" (not (empty .existingSecret)) -}}
{{- end -}}

{{/* The values of TLS at the pods that answer clients. */}}
{{- define "tpserve.monitorScheme" -}}
{{- $tls := ternary .Values.router.tls .Values.gateway.tls .Values.router.enabled -}}
{{- if $tls.existingSecret }}
scheme: https
# Of pods, by addresses that no certificate has; what is read is no secret.
tlsConfig: {insecureSkipVerify: true}
{{- end }}
{{- end -}}

{{/* Whether the engine has a port of its own for probes and metrics. */}}
{{- define "tpserve.hasOperations" -}}
{{- $tls := .Values.gateway.tls -}}
{{- if or .Values.gateway.separate (and $tls.existingSecret (eq $tls.clientAuth "required")) -}}yes{{- end -}}
{{- end -}}

{{/* Whether gateways and engine meet within TLS. */}}
{{- define "tpserve.engineTls" -}}
{{- if and .Values.gateway.separate .Values.gateway.engineTls.existingSecret -}}yes{{- end -}}
{{- end -}}

{{- define "tpserve.engineTokenSecret" -}}
{{- .Values.gateway.engineTls.tokenSecret | default (printf "%s-engine-token" (include "tpserve.fullname" .)) -}}
{{- end -}}

{{- define "tpserve.engineTlsEnv" -}}
{{- if include "tpserve.engineTls" . }}
- name: TPSERVE_ENGINE_TOKEN
  valueFrom: {secretKeyRef: {name: {{ include "tpserve.engineTokenSecret" . }}, key: {{ .Values.gateway.engineTls.tokenKey }}}}
{{- end }}
{{- end -}}

{{- define "tpserve.engineTlsVolume" -}}
{{- if include "tpserve.engineTls" . }}
- name: engine-tls
  secret: {secretName: {{ .Values.gateway.engineTls.existingSecret }}, defaultMode: 0440}
{{- end }}
{{- end -}}

{{- define "tpserve.engineTlsMount" -}}
{{- if include "tpserve.engineTls" . }}
- {name: engine-tls, mountPath: /etc/tpserve/engine-tls, readOnly: true}
{{- end }}
{{- end -}}

{{- define "tpserve.routerSecret" -}}
{{- .Values.router.existingSecret | default (printf "%s-router" (include "tpserve.fullname" .)) -}}
{{- end -}}

{{/* Of routers and replicas: by it a stream may move. */}}
{{- define "tpserve.routerEnv" -}}
{{- if .Values.router.enabled -}}
- name: TPSERVE_ROUTER_TOKEN
  valueFrom: {secretKeyRef: {name: {{ include "tpserve.routerSecret" . }}, key: {{ .Values.router.key }}}}
{{- end -}}
{{- end -}}

{{/* GPUs of one replica. */}}
{{- define "tpserve.numGpus" -}}
{{- $draft := .Values.engine.draft -}}
{{- $dedicated := and $draft.model (eq $draft.placement "dedicated") -}}
{{- add .Values.engine.tensorParallelSize (ternary $draft.tensorParallelSize 0 (not (not $dedicated))) -}}
{{- end -}}

{{/* Whether the ranks are in several pods of a RayCluster. */}}
{{- define "tpserve.acrossPods" -}}
{{- if and (eq .Values.engine.ray.mode "kuberay") (gt (int .Values.engine.ray.workers) 0) -}}yes{{- end -}}
{{- end -}}

{{/* GPUs of one pod of an engine. */}}
{{- define "tpserve.podGpus" -}}
{{- if include "tpserve.acrossPods" . }}{{ .Values.engine.ray.ranksPerPod }}{{ else }}{{ include "tpserve.numGpus" . }}{{ end -}}
{{- end -}}

{{/* What a rank's pod asks for. */}}
{{- define "tpserve.rankResources" -}}
{{- $v := .Values -}}
requests:
  {{- toYaml $v.engine.resources.requests | nindent 2 }}
  {{- if eq $v.engine.device "cuda" }}
  {{ $v.engine.gpuResource }}: {{ include "tpserve.podGpus" . }}
  {{- end }}
limits:
  {{- toYaml $v.engine.resources.limits | nindent 2 }}
  {{- if eq $v.engine.device "cuda" }}
  {{ $v.engine.gpuResource }}: {{ include "tpserve.podGpus" . }}
  {{- end }}
{{- end -}}

{{/* Most draft tokens of a step, which the library is compiled for; coordinator/speculation.py has the table. */}}
{{- define "tpserve.maxDraftTokens" -}}
{{- $draft := .Values.engine.draft -}}
{{- if or $draft.model $draft.method -}}
{{- $most := get (dict "auto" 5 "mlc" 4) (toString $draft.numSpeculativeTokens) -}}
{{- $most | default $draft.numSpeculativeTokens -}}
{{- else -}}
0
{{- end -}}
{{- end -}}

{{/* Longer than what the pod may take to end: not receiving traffic any more, draining, ending ranks and Ray. */}}
{{- define "tpserve.grace" -}}
{{- add .Values.shutdown.preStopSeconds .Values.shutdown.drainSeconds 30 -}}
{{- end -}}

{{/* Flags that decide the compiled library: the compile Job and the engine must agree on them. */}}
{{- define "tpserve.libraryArgs" -}}
- --quantization={{ .Values.engine.quantization }}
- --kv-cache-dtype={{ .Values.engine.kvCacheDtype }}
- --max-num-seqs={{ .Values.engine.maxNumSeqs }}
- --max-num-batched-tokens={{ .Values.engine.maxNumBatchedTokens }}
{{- with .Values.engine.maxModelLen }}
- --max-model-len={{ . }}
{{- end }}
{{- end -}}

{{- define "tpserve.serveArgs" -}}
{{- $v := .Values -}}
- serve
- {{ $v.model.path }}
- --tp={{ $v.engine.tensorParallelSize }}
- --device={{ $v.engine.device }}
- --mode={{ $v.engine.mode }}
{{ include "tpserve.libraryArgs" . }}
- --max-num-queued-reqs={{ $v.engine.maxNumQueuedRequests }}
- --step-timeout={{ $v.engine.stepTimeoutSeconds }}
- --replay-timeout={{ $v.engine.replayTimeoutSeconds }}
- --drain-timeout={{ $v.shutdown.drainSeconds }}
- --log-format={{ $v.logFormat }}
- --metrics-compat={{ $v.metrics.compat }}
- --jit-policy={{ ternary "READONLY" "ON" $v.compile.enabled }}
{{- if $v.model.offline }}
- --download-cache-policy=READONLY
{{- end }}
{{- if $v.model.servedNames }}
- --served-model-name
{{- range $v.model.servedNames }}
- {{ . | quote }}
{{- end }}
{{- end }}
{{- if $v.gateway.separate }}
- --no-gateway
- --engine-host=0.0.0.0
- --engine-port={{ $v.ports.engine }}
- --operations-port={{ $v.ports.operations }}
{{- if include "tpserve.engineTls" . }}
- --engine-ssl-certfile=/etc/tpserve/engine-tls/tls.crt
- --engine-ssl-keyfile=/etc/tpserve/engine-tls/tls.key
- --engine-ssl-ca-certs=/etc/tpserve/engine-tls/ca.crt
{{- else }}
- --engine-insecure
{{- end }}
{{- else }}
- --host=0.0.0.0
- --port={{ $v.ports.http }}
{{- include "tpserve.tlsArgs" $v.gateway.tls }}
{{- if include "tpserve.hasOperations" . }}
- --operations-host=0.0.0.0
- --operations-port={{ $v.ports.operations }}
{{- end }}
{{- if include "tpserve.hasKeys" . }}
- --api-key-file=/etc/tpserve/keys/{{ $v.apiKeys.key }}
{{- end }}
{{- if $v.gateway.allowOrigins }}
- --allow-origins
{{- range $v.gateway.allowOrigins }}
- {{ . | quote }}
{{- end }}
{{- end }}
{{- end }}
{{- with $v.engine.draft.model }}
- --draft-model={{ . }}
- --draft-tp={{ $v.engine.draft.tensorParallelSize }}
- --draft-placement={{ $v.engine.draft.placement }}
{{- end }}
{{- with $v.engine.draft.method }}
- --spec-method={{ . }}
{{- end }}
{{- if or $v.engine.draft.model $v.engine.draft.method }}
- --num-speculative-tokens={{ $v.engine.draft.numSpeculativeTokens }}
{{- end }}
{{- with $v.tracing.otlpEndpoint }}
- --otlp-traces-endpoint={{ . }}
{{- end }}
{{- if $v.enableDebug }}
- --enable-debug
{{- end }}
{{- if eq $v.engine.ray.mode "kuberay" }}
- --ray-address=auto
{{- end }}
{{- if include "tpserve.acrossPods" . }}
- --tp-across-nodes=pack
{{- end }}
{{- with $v.engine.extraArgs }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "tpserve.env" -}}
- {name: TPSERVE_HOME, value: /cache}
- {name: HOME, value: /tmp}
{{- if .Values.model.offline }}
- {name: HF_HUB_OFFLINE, value: "1"}
{{- end }}
{{- with .Values.model.hubTokenSecret }}
{{- if .name }}
- name: HF_TOKEN
  valueFrom: {secretKeyRef: {name: {{ .name }}, key: {{ .key }}}}
{{- end }}
{{- end }}
{{- if .Values.tracing.otlpEndpoint }}
- {name: OTEL_EXPORTER_OTLP_TRACES_PROTOCOL, value: {{ .Values.tracing.protocol | quote }}}
{{- end }}
{{- end -}}

{{/* Probes of a container whose HTTP port is named by .port; .scheme is HTTP or HTTPS, which kubelets do not verify. */}}
{{- define "tpserve.probes" -}}
startupProbe:
  httpGet: {path: /health/startup, port: {{ .port }}, scheme: {{ .scheme }}}
  periodSeconds: 5
  timeoutSeconds: 3
  failureThreshold: {{ div (add .budget 4) 5 }}
readinessProbe:
  httpGet: {path: /health/ready, port: {{ .port }}, scheme: {{ .scheme }}}
  periodSeconds: 2
  timeoutSeconds: 2
  failureThreshold: 2
livenessProbe:
  httpGet: {path: /health/live, port: {{ .port }}, scheme: {{ .scheme }}}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
{{- end -}}

{{/* The pod of an engine, without its metadata. */}}
{{- define "tpserve.enginePodSpec" -}}
{{- $v := .Values -}}
serviceAccountName: {{ include "tpserve.serviceAccount" . }}
automountServiceAccountToken: false
{{- with $v.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  {{- toYaml $v.podSecurityContext | nindent 2 }}
terminationGracePeriodSeconds: {{ include "tpserve.grace" . }}
{{- with $v.engine.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $v.engine.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with $v.engine.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $v.engine.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $v.engine.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if $v.compile.enabled }}
initContainers:
  # Until the Job has filled the cache; the engine itself compiles nothing.
  - name: library
    image: {{ include "tpserve.image" . | quote }}
    imagePullPolicy: {{ $v.image.pullPolicy }}
    command: [timeout, {{ $v.compile.activeDeadlineSeconds | quote }}, sh, -c]
    args:
      - until tpserve "$@" --jit-policy=READONLY; do sleep 5; done
      - sh
      {{- include "tpserve.compileArgs" (dict "root" . "size" $v.engine.tensorParallelSize) | nindent 6 }}
    env:
      {{- include "tpserve.env" . | nindent 6 }}
    resources:
      {{- toYaml $v.compile.resources | nindent 6 }}
    securityContext:
      {{- toYaml $v.securityContext | nindent 6 }}
    volumeMounts:
      - {name: models, mountPath: /models, readOnly: true}
      - {name: cache, mountPath: /cache}
      - {name: tmp, mountPath: /tmp}
  {{- if $v.engine.draft.model }}
  - name: draft-library
    image: {{ include "tpserve.image" . | quote }}
    imagePullPolicy: {{ $v.image.pullPolicy }}
    command: [timeout, {{ $v.compile.activeDeadlineSeconds | quote }}, sh, -c]
    args:
      - until tpserve "$@" --jit-policy=READONLY; do sleep 5; done
      - sh
      {{- include "tpserve.draftCompileArgs" . | nindent 6 }}
    env:
      {{- include "tpserve.env" . | nindent 6 }}
    resources:
      {{- toYaml $v.compile.resources | nindent 6 }}
    securityContext:
      {{- toYaml $v.securityContext | nindent 6 }}
    volumeMounts:
      - {name: models, mountPath: /models, readOnly: true}
      - {name: cache, mountPath: /cache}
      - {name: tmp, mountPath: /tmp}
  {{- end }}
{{- end }}
containers:
  - name: engine
    image: {{ include "tpserve.image" . | quote }}
    imagePullPolicy: {{ $v.image.pullPolicy }}
    {{- if eq $v.engine.ray.mode "kuberay" }}
    # KubeRay says how this pod's Ray is started; the engine joins it and is the process that gets SIGTERM.
    command: [/bin/bash, -c]
    args:
      - |
        ulimit -n 65536 || true
        $KUBERAY_GEN_RAY_START_CMD &
        for _ in $(seq 60); do ray health-check && break; sleep 1; done
        exec tpserve "$@"
      - tpserve
      {{- include "tpserve.serveArgs" . | nindent 6 }}
    {{- else }}
    command: [tpserve]
    args:
      {{- include "tpserve.serveArgs" . | nindent 6 }}
    {{- end }}
    env:
      {{- include "tpserve.env" . | nindent 6 }}
      {{- if eq $v.engine.ray.mode "kuberay" }}
      - {name: RAY_worker_niceness, value: "0"}  # or ranks come after all else in the pod
      {{- end }}
      {{- include "tpserve.routerEnv" . | nindent 6 }}
      {{- include "tpserve.engineTlsEnv" . | trim | nindent 6 }}
      {{- with $v.engine.extraEnv }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    ports:
      {{- if $v.gateway.separate }}
      - {name: grpc, containerPort: {{ $v.ports.engine }}}
      - {name: operations, containerPort: {{ $v.ports.operations }}}
      {{- else }}
      - {name: http, containerPort: {{ $v.ports.http }}}
      {{- if include "tpserve.hasOperations" . }}
      - {name: operations, containerPort: {{ $v.ports.operations }}}
      {{- end }}
      {{- end }}
      {{- if eq $v.engine.ray.mode "kuberay" }}
      - {name: gcs-server, containerPort: 6379}
      {{- end }}
    {{- $port := ternary "operations" "http" (not (empty (include "tpserve.hasOperations" .))) }}
    {{- $scheme := ternary "HTTP" (include "tpserve.scheme" $v.gateway.tls) (eq $port "operations") }}
    {{- include "tpserve.probes" (dict "port" $port "scheme" $scheme "budget" $v.startup.budgetSeconds) | nindent 4 }}
    lifecycle:
      # Endpoints forget the pod before it stops taking requests.
      preStop: {exec: {command: [sleep, {{ $v.shutdown.preStopSeconds | quote }}]}}
    resources:
      {{- include "tpserve.rankResources" . | nindent 6 }}
    securityContext:
      {{- toYaml $v.securityContext | nindent 6 }}
    volumeMounts:
      - {name: models, mountPath: /models, readOnly: true}
      - {name: cache, mountPath: /cache}
      - {name: tmp, mountPath: /tmp}
      - {name: shm, mountPath: /dev/shm}
      {{- if and (include "tpserve.hasKeys" .) (not $v.gateway.separate) }}
      - {name: keys, mountPath: /etc/tpserve/keys, readOnly: true}
      {{- end }}
      {{- if not $v.gateway.separate }}
      {{- include "tpserve.tlsMounts" $v.gateway.tls | trim | nindent 6 }}
      {{- end }}
      {{- include "tpserve.engineTlsMount" . | trim | nindent 6 }}
volumes:
  - name: models
    persistentVolumeClaim: {claimName: {{ include "tpserve.modelClaim" . }}, readOnly: true}
  - name: cache
    persistentVolumeClaim: {claimName: {{ include "tpserve.cacheClaim" . }}}
  - name: tmp
    emptyDir: {sizeLimit: {{ $v.engine.tmpSize }}}
  - name: shm
    emptyDir: {medium: Memory, sizeLimit: {{ $v.engine.shmSize }}}
  {{- if and (include "tpserve.hasKeys" .) (not $v.gateway.separate) }}
  - name: keys
    secret: {secretName: {{ include "tpserve.keySecret" . }}, defaultMode: 0440}
  {{- end }}
  {{- if not $v.gateway.separate }}
  {{- include "tpserve.tlsVolumes" $v.gateway.tls | trim | nindent 2 }}
  {{- end }}
  {{- include "tpserve.engineTlsVolume" . | trim | nindent 2 }}
{{- end -}}

{{/* A pod of further ranks, which KubeRay starts Ray in and watches. */}}
{{- define "tpserve.rankPodSpec" -}}
{{- $v := .Values -}}
serviceAccountName: {{ include "tpserve.serviceAccount" . }}
automountServiceAccountToken: false
{{- with $v.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  {{- toYaml $v.podSecurityContext | nindent 2 }}
terminationGracePeriodSeconds: 30
{{- with $v.engine.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $v.engine.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with $v.engine.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $v.engine.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $v.engine.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
containers:
  - name: ranks
    image: {{ include "tpserve.image" . | quote }}
    imagePullPolicy: {{ $v.image.pullPolicy }}
    env:
      {{- include "tpserve.env" . | nindent 6 }}
      - {name: RAY_worker_niceness, value: "0"}
      {{- with $v.engine.extraEnv }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    resources:
      {{- include "tpserve.rankResources" . | nindent 6 }}
    securityContext:
      {{- toYaml $v.securityContext | nindent 6 }}
    volumeMounts:
      - {name: models, mountPath: /models, readOnly: true}
      - {name: cache, mountPath: /cache}
      - {name: tmp, mountPath: /tmp}
      - {name: shm, mountPath: /dev/shm}
volumes:
  - name: models
    persistentVolumeClaim: {claimName: {{ include "tpserve.modelClaim" . }}, readOnly: true}
  - name: cache
    persistentVolumeClaim: {claimName: {{ include "tpserve.cacheClaim" . }}}
  - name: tmp
    emptyDir: {sizeLimit: {{ $v.engine.tmpSize }}}
  - name: shm
    emptyDir: {medium: Memory, sizeLimit: {{ $v.engine.shmSize }}}
{{- end -}}

{{/* What cannot go together; the schema checks the single values. */}}
{{- define "tpserve.validate" -}}
{{- $v := .Values -}}
{{- if and $v.gateway.separate (ne (int $v.engine.replicas) 1) -}}
{{- fail "gateway.separate with engine.replicas > 1: a gateway talks to one engine; leave gateway.separate false for several replicas" -}}
{{- end -}}
{{- if and $v.gateway.separate (hasPrefix "HF://" $v.model.path) -}}
{{- fail (printf "gateway.separate with model.path %s: gateways read the tokenizer from the model volume; give a folder under /models" $v.model.path) -}}
{{- end -}}
{{- if and $v.autoscaling.keda.enabled $v.autoscaling.hpa.enabled -}}
{{- fail "autoscaling.keda and autoscaling.hpa are both enabled: KEDA makes an HPA of its own; choose one" -}}
{{- end -}}
{{- if and $v.autoscaling.keda.enabled (or $v.gateway.separate (eq $v.engine.ray.mode "kuberay")) -}}
{{- fail "autoscaling.keda scales whole replicas: it needs gateway.separate false and engine.ray.mode local" -}}
{{- end -}}
{{- if and $v.autoscaling.hpa.enabled (eq $v.engine.ray.mode "kuberay") (not $v.gateway.separate) -}}
{{- fail "autoscaling.hpa cannot scale a RayCluster: use engine.ray.mode local, or gateway.separate to scale gateways" -}}
{{- end -}}
{{- if and (eq $v.engine.ray.mode "kuberay") (ne (int $v.engine.replicas) 1) -}}
{{- fail "engine.ray.mode kuberay with engine.replicas > 1: a RayCluster is one replica; install the chart once for each" -}}
{{- end -}}
{{- if and $v.inferencePool.enabled (not $v.inferencePool.endpointPicker.name) -}}
{{- fail "inferencePool.enabled needs inferencePool.endpointPicker.name, the Service of the endpoint picker" -}}
{{- end -}}
{{- if and $v.inferencePool.enabled $v.gateway.separate -}}
{{- fail "inferencePool picks engine pods, which answer HTTP only with gateway.separate false" -}}
{{- end -}}
{{- if and $v.httpRoute.enabled (not $v.httpRoute.parentRefs) -}}
{{- fail "httpRoute.enabled needs httpRoute.parentRefs, the Gateway to attach to" -}}
{{- end -}}
{{- if and $v.ingress.enabled (not $v.ingress.hosts) -}}
{{- fail "ingress.enabled needs ingress.hosts" -}}
{{- end -}}
{{- $ray := $v.engine.ray -}}
{{- if and (gt (int $ray.workers) 0) (ne $ray.mode "kuberay") -}}
{{- fail "engine.ray.workers needs engine.ray.mode kuberay: Ray inside one pod has no others" -}}
{{- end -}}
{{- if and (include "tpserve.acrossPods" .) (lt (int (mul (add $ray.workers 1) $ray.ranksPerPod)) (int $v.engine.tensorParallelSize)) -}}
{{- fail (printf "engine.ray.ranksPerPod %v in %v pods is less than engine.tensorParallelSize %v: raise it, or engine.ray.workers" $ray.ranksPerPod (add $ray.workers 1) $v.engine.tensorParallelSize) -}}
{{- end -}}
{{- range $name, $tls := dict "gateway" $v.gateway.tls "router" $v.router.tls -}}
{{- if and (not $tls.existingSecret) (or $tls.clientCASecret (ne $tls.clientAuth "none")) -}}
{{- fail (printf "%s.tls asks for client certificates and has no existingSecret, the server's own" $name) -}}
{{- end -}}
{{- if ne (empty $tls.clientCASecret) (eq $tls.clientAuth "none") -}}
{{- fail (printf "%s.tls.clientCASecret and clientAuth need each other: the first has the authorities of what the second asks for" $name) -}}
{{- end -}}
{{- end -}}
{{- if and $v.router.enabled $v.gateway.tls.existingSecret -}}
{{- fail "gateway.tls with router.enabled: the router speaks HTTP with its replicas, which the NetworkPolicy keeps for it; give router.tls" -}}
{{- end -}}
{{- if and $v.router.tls.existingSecret (not $v.router.enabled) -}}
{{- fail "router.tls needs router.enabled: without a router it is gateway.tls" -}}
{{- end -}}
{{- if and $v.gateway.separate (eq $v.gateway.tls.clientAuth "required") -}}
{{- fail "gateway.tls.clientAuth required with gateway.separate: the gateways' probes have no certificate; take optional" -}}
{{- end -}}
{{- if and (eq $v.gateway.tls.clientAuth "required") $v.metrics.serviceMonitor.enabled -}}
{{- fail "gateway.tls.clientAuth required with metrics.serviceMonitor: Prometheus has no certificate; take metrics.podMonitor, which reads the engine's own port" -}}
{{- end -}}
{{- if and $v.gateway.tls.existingSecret $v.inferencePool.enabled -}}
{{- fail "gateway.tls with inferencePool.enabled: endpoint pickers read the pods' metrics over HTTP" -}}
{{- end -}}
{{- if and $v.router.enabled $v.gateway.separate -}}
{{- fail "router.enabled with gateway.separate: the router is before whole replicas, which have their own gateways; leave gateway.separate false" -}}
{{- end -}}
{{- if and $v.router.enabled (eq $v.engine.ray.mode "kuberay") -}}
{{- fail "router.enabled with engine.ray.mode kuberay: a RayCluster is one replica; take engine.ray.mode local" -}}
{{- end -}}
{{- if and $v.router.enabled (or $v.autoscaling.keda.enabled $v.autoscaling.hpa.enabled) -}}
{{- fail "router.enabled with autoscaling: the router is given its replicas by name; set engine.replicas" -}}
{{- end -}}
{{- if and $v.router.enabled $v.inferencePool.enabled -}}
{{- fail "router.enabled with inferencePool.enabled: both choose the replica of a request; take one" -}}
{{- end -}}
{{- if and $v.router.enabled (lt (int $v.engine.replicas) 1) -}}
{{- fail "router.enabled needs engine.replicas of 1 or more" -}}
{{- end -}}
{{- if and $v.engine.draft.model $v.engine.draft.method (ne $v.engine.draft.method "draft") -}}
{{- fail (printf "engine.draft.method %s looks tokens up: leave engine.draft.model empty" $v.engine.draft.method) -}}
{{- end -}}
{{- if and (eq $v.engine.draft.method "draft") (not $v.engine.draft.model) -}}
{{- fail "engine.draft.method draft needs engine.draft.model" -}}
{{- end -}}
{{- if ne (mod $v.engine.tensorParallelSize $v.engine.draft.tensorParallelSize) 0 -}}
{{- fail (printf "engine.draft.tensorParallelSize %v does not divide engine.tensorParallelSize %v" $v.engine.draft.tensorParallelSize $v.engine.tensorParallelSize) -}}
{{- end -}}
{{- if and (eq $v.engine.device "cuda") $v.engine.draft.model (not (has (int $v.engine.draft.tensorParallelSize) (list 1 (int $v.engine.tensorParallelSize)))) -}}
{{- fail (printf "engine.draft.tensorParallelSize %v: on GPUs each has the whole draft or its shard; set engine.draft.tensorParallelSize to 1 or %v" $v.engine.draft.tensorParallelSize $v.engine.tensorParallelSize) -}}
{{- end -}}
{{- if and $v.compile.enabled $v.engine.draft.model (not $v.engine.maxModelLen) -}}
{{- fail "compile.enabled with engine.draft.model needs engine.maxModelLen: the draft is compiled for the same length" -}}
{{- end -}}
{{- if and $v.compile.enabled (hasPrefix "HF://" $v.model.path) $v.model.offline -}}
{{- fail "model.offline with an HF:// model: nothing would be downloaded; put the folder on the model volume" -}}
{{- end -}}
{{- if and $v.gateway.separate (not $v.gateway.engineTls.existingSecret) (not $v.gateway.engineTls.insecure) -}}
{{- fail "gateway.separate: whoever reaches the engine's port would use it without a key; give gateway.engineTls.existingSecret, or set gateway.engineTls.insecure" -}}
{{- end -}}
{{- if and $v.gateway.engineTls.existingSecret $v.gateway.engineTls.insecure -}}
{{- fail "gateway.engineTls has both existingSecret and insecure: choose one" -}}
{{- end -}}
{{- end -}}

{{- define "tpserve.compileArgs" -}}
- compile
- {{ .root.Values.model.path }}
- --tp={{ .size }}
- --device={{ ternary "cuda:sm_90a" "cpu" (eq .root.Values.engine.device "cuda") }}
{{ include "tpserve.libraryArgs" .root }}
- --max-num-draft-tokens={{ include "tpserve.maxDraftTokens" .root }}
{{- with .root.Values.engine.draft.model }}
- --draft-model={{ . }}
{{- end }}
{{- end -}}

{{/* draft_step_tokens() of coordinator/speculation.py: on a GPU a round begins with four tokens of each sequence. */}}
{{- define "tpserve.draftStepTokens" -}}
{{- $engine := .Values.engine -}}
{{- max $engine.maxNumBatchedTokens (ternary (mul 4 $engine.maxNumSeqs) 0 (eq $engine.device "cuda")) -}}
{{- end -}}

{{/* As `tpserve serve` compiles a draft. */}}
{{- define "tpserve.draftCompileArgs" -}}
- compile
- {{ .Values.engine.draft.model }}
- --tp={{ .Values.engine.draft.tensorParallelSize }}
- --device={{ ternary "cuda:sm_90a" "cpu" (eq .Values.engine.device "cuda") }}
- --max-num-seqs={{ .Values.engine.maxNumSeqs }}
- --max-num-batched-tokens={{ include "tpserve.draftStepTokens" . }}
- --max-model-len={{ .Values.engine.maxModelLen }}
- --cut-model-len
- --target-model={{ .Values.model.path }}
{{- end -}}

{{/* One container of the compile Job. */}}
{{- define "tpserve.compileContainer" -}}
- name: {{ .name }}
  image: {{ include "tpserve.compileImage" .root | quote }}
  imagePullPolicy: {{ .root.Values.image.pullPolicy }}
  command: [tpserve]
  args:
    {{- .args | nindent 4 }}
    - --jit-policy=ON
  env:
    {{- include "tpserve.env" .root | nindent 4 }}
  resources:
    {{- toYaml .root.Values.compile.resources | nindent 4 }}
  securityContext:
    {{- toYaml .root.Values.securityContext | nindent 4 }}
  volumeMounts:
    - {name: models, mountPath: /models, readOnly: true}
    - {name: cache, mountPath: /cache}
    - {name: tmp, mountPath: /tmp}
{{- end -}}
