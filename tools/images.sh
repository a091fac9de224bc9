#!/bin/bash
# Build the images of tests/cluster, without a container engine and without a registry: Debian's mmdebstrap makes the
# base, buildah builds images/*.Dockerfile on it, and all of it becomes one archive that containerd imports.
#
#   tools/images.sh build   build what is not there (six minutes on two cores the first time, once)
#   tools/images.sh file    print the archive's path and nothing else
#
# Everything lies in the cache folder, outside the checkout: the base by the names of its packages, the archive by the
# content of what goes into it. So the second run takes a fraction of a second, and an edit costs its own layer only. A
# file gets its name when it is whole.
set -euo pipefail

cd "$(dirname "$0")/.."
what=${1:?usage: tools/images.sh build|file}

cache=${XDG_CACHE_HOME:-$HOME/.cache}/holdfast
packages=python3,libbpf1,ca-certificates
base=$packages,nginx-light
build=$packages,python3-pip,clang-16,libbpf-dev,linux-libc-dev

. tools/progress.sh

inputs() {
	find images tests/cluster/images lbpod operator -type f \
		! -name '*.o' ! -name '*.pyc' ! -path 'lbpod/lab/*' ! -name README.md
	printf '%s\n' pyproject.toml tools/images.sh tools/find-clang.sh # README and LICENSE change nothing that runs
}

key=$(inputs | LC_ALL=C sort | xargs -d '\n' sha256sum | sha256sum | cut -c 1-12)
archive=$cache/images-$key.tar

ours() { buildah --root "$cache/buildah" --runroot "$cache/buildah-run" "$@"; }

# rootfs NAME PACKAGES: a Debian with these packages, as an image of that name.
rootfs() {
	local name=$1 key tar
	key=$(sha256sum <<<"$2" | cut -c 1-8)
	tar=$cache/$name-$key.tar
	if [ ! -e "$tar" ]; then
		step "bootstrapping Debian for the $name image" mmdebstrap --variant=apt --format=tar \
			--dpkgopt=force-unsafe-io --include="$2" bookworm "$tar.new"
		mv "$tar.new" "$tar"
	fi
	if ! ours inspect --type image "localhost/$name:$key" >/dev/null 2>&1; then
		step "making an image of it" import "$tar" "localhost/$name:$key"
	fi
	from=localhost/$name:$key
}

import() {
	local container
	container=$(ours from scratch)
	ours add "$container" "$1" /
	ours commit --rm "$container" "$2"
}

# image FILE TAG ARGS...: the machine's certificates are mounted, for pip may have to go through a proxy that has its own.
image() {
	local file=$1 tag=$2
	shift 2
	step "building $tag" buildah --root "$cache/buildah" --runroot "$cache/buildah-run" build \
		--layers --isolation chroot --network host --volume /etc/ssl/certs:/etc/ssl/certs:ro \
		-f "$file" -t "$tag" "$@" .
}

# pack: one layout with all images, so that they share their layers. It is kept, for a layer that is there need not be
# compressed again; blobs that no image has any more are left out of the archive and removed.
pack() {
	local layout=$1 tag
	shift
	for tag in "$@"; do
		ours push "$tag" "oci:$layout:$tag"
	done
	python3 - "$layout" "$@" <<-'PY'
		import json, pathlib, sys
		layout, tags = pathlib.Path(sys.argv[1]), sys.argv[2:]
		index = json.loads((layout / "index.json").read_text())
		name = "org.opencontainers.image.ref.name"
		index["manifests"] = [one for one in index["manifests"] if one.get("annotations", {}).get(name) in tags]
		used = set()
		for one in index["manifests"]:
		    # containerd takes names from an annotation of its own.
		    one["annotations"]["io.containerd.image.name"] = "docker.io/" + one["annotations"][name]
		    manifest = json.loads((layout / "blobs/sha256" / one["digest"].split(":")[1]).read_text())
		    used |= {one["digest"], manifest["config"]["digest"], *(each["digest"] for each in manifest["layers"])}
		for blob in (layout / "blobs/sha256").iterdir():
		    if f"sha256:{blob.name}" not in used:
		        blob.unlink()
		(layout / "index.json").write_text(json.dumps(index))
	PY
	tar -C "$layout" -cf "$archive.new" .
	mv "$archive.new" "$archive"
}

case $what in
file)
	echo "$archive"
	exit
	;;
build) ;;
*) cannot "$what is not known; use build or file." ;;
esac

mkdir -p "$cache"
[ ! -e "$archive" ] || exit 0
log=$cache/images.log
exec 9>"$cache/.images.lock"
flock -w 1800 9 || cannot "another build has been running for half an hour (it holds $cache/.images.lock)."
[ ! -e "$archive" ] || exit 0
: >"$log"

version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
rootfs build "$build"
build=$from
rootfs base "$base"
base=$from
image tests/cluster/images/backend.Dockerfile holdfast/pause:test --build-arg BASE="$base" --target pause
image tests/cluster/images/backend.Dockerfile holdfast/page:test --build-arg BASE="$base" --target page
image images/operator.Dockerfile "holdfast/operator:$version" --build-arg BUILD="$build" --build-arg BASE="$base"
image images/lb.Dockerfile "holdfast/lb:$version" --build-arg BUILD="$build" --build-arg BASE="$base"
find "$cache" -maxdepth 1 -name 'images-*.tar' -mtime +7 -delete
step "packing them" pack "$cache/layout" holdfast/{pause,page}:test "holdfast/operator:$version" "holdfast/lb:$version"
