#!/bin/bash
# Build what the tests of tests/cluster need beside Python: Kubernetes and helm, from their Go modules, into a cache
# folder outside the checkout. `make e2e` calls it.
#
#   tools/kube.sh api     kube-apiserver, kubectl, helm: what the API server's tests need (4 minutes on two cores, once)
#   tools/kube.sh all     and the rest of a cluster: controller manager, scheduler, kubelet, kube-proxy
#   tools/kube.sh folder  print the cache folder and nothing else
#   tools/kube.sh certmanager, certmanager-folder: the same for cert-manager's controllers and CRDs (5 minutes, once)
#
# The folder's name holds both versions and a key of the go.mod files, so a new version is built beside the old one and
# the second run takes a fraction of a second. A binary gets its name only when it is whole (build, then rename).
#
# Why from modules: machines that can fetch Go modules need no registry of images or of binaries, and the versions are
# pinned by go.sum. Tried and dropped: `go install MODULE@VERSION` (refuses modules with `replace`).
set -euo pipefail

cd "$(dirname "$0")/.."
what=${1:?usage: tools/kube.sh api|all|folder|certmanager|certmanager-folder}

kube=$(sed -n 's|.*k8s.io/kubernetes v\([0-9.]*\)$|\1|p' tests/cluster/kube/go.mod | head -n 1)
helm=$(sed -n 's|.*helm.sh/helm/v4 v\([0-9.]*\)$|\1|p' tests/cluster/helm/go.mod | head -n 1)
key=$(cat tests/cluster/{kube,helm}/{go.mod,go.sum} | sha256sum | cut -c 1-8)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/holdfast
folder=$cache/kube-$kube-helm-$helm-$key
# In a folder of its own: a new version of one is no reason to build the other anew.
certmanager=$(sed -n 's|^require github.com/cert-manager/cert-manager v\([0-9.]*\)$|\1|p' tests/cluster/certmanager/go.mod)
certmanager_folder=$cache/cert-manager-$certmanager-$(cat tests/cluster/certmanager/* | sha256sum | cut -c 1-8)

. tools/progress.sh

find_go() {
	local go
	for go in go /usr/local/go/bin/go /usr/lib/go-1.26/bin/go; do
		if command -v "$go" >/dev/null && "$go" version | grep -Eq 'go1\.(2[6-9]|[3-9][0-9])'; then
			command -v "$go"
			return
		fi
	done
	return 1
}

# build MODULE-FOLDER PACKAGE NAME [LDFLAGS]: one binary, unless it is there.
build() {
	[ ! -x "$folder/$3" ] || return 0
	step "building $3" compile "$1" "$2" "$folder/.$3.new" "${4:-}"
	mv "$folder/.$3.new" "$folder/$3"
}

compile() {
	cd "$1"
	exec env CGO_ENABLED=0 GOFLAGS=-buildvcs=false nice -n 19 \
		"$go" build -mod=readonly -trimpath -ldflags "-s -w $4" -o "$3" "$2"
}

kubernetes() {
	local version=k8s.io/component-base/version
	build tests/cluster/kube "k8s.io/kubernetes/cmd/$1" "$1" \
		"-X $version.gitVersion=v$kube -X $version.gitMajor=${kube%%.*} -X $version.gitMinor=$(cut -d . -f 2 <<<"$kube")"
}

# The CRDs as the module has them, so that they are of the version that was built.
copy_crds() {
	local module
	module=$(cd tests/cluster/certmanager && "$go" list -mod=readonly -m -f '{{.Dir}}' github.com/cert-manager/cert-manager)
	rm -rf "$folder/.crds.new"
	cp -r --no-preserve=mode "$module/deploy/crds" "$folder/.crds.new"
	rm "$folder/.crds.new/README.md"
	mv "$folder/.crds.new" "$folder/crds"
}

case $what in
folder)
	echo "$folder"
	exit
	;;
certmanager-folder)
	echo "$certmanager_folder"
	exit
	;;
certmanager)
	folder=$certmanager_folder
	wanted=
	;;
api) wanted="kube-apiserver kubectl" ;;
all) wanted="kube-apiserver kubectl kube-controller-manager kube-scheduler kubelet kube-proxy" ;;
*) cannot "$what is not known; use api, all, folder, certmanager or certmanager-folder." ;;
esac

mkdir -p "$folder"
log=$folder/build.log
exec 9>"$folder/.lock"
flock -w 1800 9 || cannot "another build has been running for half an hour (it holds $folder/.lock)."
go=$(find_go) || cannot "Kubernetes is built with Go 1.26 or newer, and there is none in PATH or /usr/local/go."
for name in $wanted; do
	kubernetes "$name"
done
if [ "$what" = certmanager ]; then
	build tests/cluster/certmanager . cert-manager
	[ -d "$folder/crds" ] || copy_crds
	exit
fi
build tests/cluster/helm helm.sh/helm/v4/cmd/helm helm
