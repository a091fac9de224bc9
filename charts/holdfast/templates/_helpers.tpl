{{- define "holdfast.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "holdfast.selector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "holdfast.labels" -}}
{{ include "holdfast.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: holdfast
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* The image of a component: (dict "root" $ "image" .Values.operator.image) */}}
{{- define "holdfast.image" -}}
{{- with .root.Values.image.registry }}{{ . }}/{{ end -}}
{{ .image.repository }}
{{- if .image.digest }}@{{ .image.digest }}{{ else }}:{{ default .root.Chart.AppVersion .image.tag }}{{ end -}}
{{- end -}}

{{/* A map as a=b,c=d, in the order of its keys. */}}
{{- define "holdfast.pairs" -}}
{{- $pairs := list -}}
{{- range $name, $value := . }}{{ $pairs = append $pairs (printf "%s=%v" $name $value) }}{{ end -}}
{{- join "," $pairs -}}
{{- end -}}

{{/* Numbers of a map as a=1,c=2: helm reads large ones as floats. */}}
{{- define "holdfast.numbers" -}}
{{- $pairs := list -}}
{{- range $name, $value := . }}{{ $pairs = append $pairs (printf "%s=%d" $name (int64 $value)) }}{{ end -}}
{{- join "," $pairs -}}
{{- end -}}

{{/* Who issues certificates where that is cert-manager, as GROUP/KIND/NAME. */}}
{{- define "holdfast.issuer" -}}
{{- with .Values.tls.certManager.issuerRef -}}
{{- if .name -}}
{{- printf "%s/%s/%s" .group .kind .name -}}
{{- else -}}
{{- printf "cert-manager.io/Issuer/%s-ca" (include "holdfast.fullname" $) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "holdfast.lowPrivileges" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end -}}
