//go:build tools

// The command that the chart is tested with, named here so that go.mod and go.sum know all that it needs.
package helm

import _ "helm.sh/helm/v4/cmd/helm"
