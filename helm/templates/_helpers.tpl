{{- define "apiscope.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end }}

{{- define "apiscope.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" -}}
{{- else if contains (include "apiscope.name" .) .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "apiscope.name" .) | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end }}

{{- define "apiscope.selector" -}}
app.kubernetes.io/name: {{ include "apiscope.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "apiscope.labels" -}}
{{ include "apiscope.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/component: agent
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "apiscope.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "apiscope.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end }}

{{- define "apiscope.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) -}}
{{- end -}}
{{- end }}

{{- define "apiscope.principalSecret" -}}
{{- default (printf "%s-principal-key" (include "apiscope.fullname" .)) .Values.principalKey.existingSecret -}}
{{- end }}

{{/* One attribute a line: sorted, so that equal values give equal pods. */}}
{{- define "apiscope.resourceAttributes" -}}
{{- $all := merge (dict) .Values.otlp.resourceAttributes -}}
{{- with .Values.clusterName }}{{ $_ := set $all "k8s.cluster.name" . }}{{ end -}}
{{- $pairs := list "k8s.node.name=$(NODE_NAME)" -}}
{{- range $key, $value := $all }}{{ $pairs = append $pairs (printf "%s=%v" $key $value) }}{{ end -}}
{{- join "," $pairs -}}
{{- end }}

{{/* The agent's configuration. */}}
{{- define "apiscope.config" -}}
{{- $capture := dict "sides" .Values.capture.sides -}}
{{- with .Values.capture.exclude }}{{ $_ := set $capture "exclude" . }}{{ end -}}
{{- with .Values.capture.include }}{{ $_ := set $capture "include" . }}{{ end -}}
{{- $limits := dict "endpoints" (int .Values.limits.endpoints) "ring_bytes" (int .Values.limits.ringBytes) -}}
{{- $kubernetes := dict "enabled" .Values.kubernetes.enabled "peers" .Values.kubernetes.peers "well_known_labels" .Values.kubernetes.wellKnownLabels "labels" .Values.kubernetes.labels -}}
{{- $agent := dict "socket" "/run/apiscope/agent.sock" -}}
{{- if .Values.metrics.enabled }}{{ $_ := set $agent "metrics" (printf "[::]:%d" (int .Values.metrics.port)) }}{{ end -}}
{{- $config := dict "capture" $capture "limits" $limits "kubernetes" $kubernetes "agent" $agent "routes" (dict "patterns" .Values.routePatterns) "identity" (dict "key_file" "/etc/apiscope-key/key") -}}
{{- /* Helm reads every number as a fraction. */}}
{{ regexReplaceAll "(?m)(= [0-9]+)\\.0$" ($config | toToml) "${1}" }}
{{- with .Values.extraConfig }}
{{ . }}
{{- end }}
{{- end }}
