#!/bin/bash
# A kind cluster with Holdfast on it, for machines that have Docker. `make kind` calls it; the second time it builds the
# images anew, loads them and upgrades the release.
#
# Decided here: what is checked before anything is made, and that every node gets a bpffs: the agents' pods may not mount
# one, and a kind node, which is a container, comes without. It is a file system of its own on each node, so the nodes
# do not share pins although they share a kernel.
set -euo pipefail

cd "$(dirname "$0")/.."
cluster=$(sed -n 's/^name: *//p' kind-config.yaml)
version=$(sed -n 's/^appVersion: *"\{0,1\}\([^"]*\)"\{0,1\}$/\1/p' charts/holdfast/Chart.yaml)

. tools/progress.sh

for tool in docker kind kubectl helm; do
	command -v "$tool" >/dev/null || cannot "$tool is missing; install it, or use \`make e2e\`, which needs no Docker."
done
docker info >/dev/null 2>&1 || cannot "the Docker engine does not answer; start it, or run this as a user that may use it."

echo "==> images"
for image in operator lb; do
	docker build -f "images/$image.Dockerfile" -t "holdfast/$image:$version" .
done

if ! kind get clusters 2>/dev/null | grep -qx "$cluster"; then
	echo "==> cluster $cluster"
	kind create cluster --config kind-config.yaml --wait 120s
fi
echo "==> images onto the nodes"
kind load docker-image --name "$cluster" "holdfast/operator:$version" "holdfast/lb:$version"
for node in $(kind get nodes --name "$cluster"); do
	docker exec "$node" sh -c 'grep -q " /sys/fs/bpf bpf " /proc/mounts || mount -t bpf bpf /sys/fs/bpf'
done

echo "==> chart"
kubectl config use-context "kind-$cluster" >/dev/null
was_there=no
! helm --namespace holdfast-system status holdfast >/dev/null 2>&1 || was_there=yes
helm upgrade --install holdfast charts/holdfast --namespace holdfast-system --create-namespace --wait --timeout 5m
if [ $was_there = yes ]; then
	# An image that was built anew has the tag that it had, so nothing else makes the pods take it.
	kubectl --namespace holdfast-system rollout restart deployment/holdfast-operator daemonset/holdfast-lb
	for what in deployment/holdfast-operator daemonset/holdfast-lb; do
		kubectl --namespace holdfast-system rollout status "$what" --timeout 5m
	done
fi
kubectl --namespace holdfast-system get pods -o wide
echo "Next: kubectl apply -f examples/virtualservice.yaml; what a VIP needs from the network is in docs/standalone.md (5. The router) and docs/distances.md."
