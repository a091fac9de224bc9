#!/bin/bash
# Make this machine ready: apt packages, the virtual environment, bpffs. `make` calls it before every target.
#
#   tools/setup.sh python     the Python packages alone: what tests on a cluster of somebody else's need; no root
#   tools/setup.sh tools      what `make check` needs: a compiler for BPF, Python packages
#   tools/setup.sh machine    that, and what moves packets: root, a kernel with BPF and namespaces, nginx, wrk, ...
#   tools/setup.sh demo       that, where the machine may move packets; where it may not (no root, no BPF), the Python
#                             packages alone, which need no root, and exit status 3: the demo then runs in the simulator
#   tools/setup.sh cluster    what `machine` has, and what a Kubernetes needs that tools/kube.sh does not build: etcd, containerd, buildah
#
# Written for a fresh Debian 12; it asks for facts (is there an `nginx`?), not for package names, so that any machine
# that has them will do. Where it cannot go on it says so in one sentence and exits 1. The second run takes a fraction
# of a second: facts are looked at again, and the Python packages are keyed by the content of pyproject.toml.
#
# Tried and dropped: a stamp file for the apt packages (it lies after an `apt remove`); apt's own output (400 lines that
# hide the one that matters; it goes to build/setup.log, and its tail is shown if it fails).
set -euo pipefail

cd "$(dirname "$0")/.."
level=${1:?usage: tools/setup.sh python|tools|machine|demo|cluster}
log=build/setup.log
with_cluster=no
if [ "$level" = cluster ]; then
	with_cluster=yes
	level=machine
fi

. tools/progress.sh

# ------------------------------------------------------------------------------------------------------ the kernel

check_root() {
	[ "$(id -u)" = 0 ] || cannot "this needs root (it makes network namespaces and loads BPF programs); run it again with sudo."
}

check_kernel() {
	local major minor
	IFS=.- read -r major minor _ < <(uname -r)
	((major > 5 || (major == 5 && minor >= 15))) ||
		cannot "the kernel is $(uname -r), and Holdfast needs 5.15 or newer."
	[ -e /proc/sys/kernel/unprivileged_bpf_disabled ] ||
		cannot "this kernel has no bpf() system call (CONFIG_BPF_SYSCALL); boot a distribution kernel."
	unshare --net true 2>/dev/null ||
		cannot "this root may not make network namespaces (a container?); run it on a machine or in a VM, or with --privileged."
	if [ "$(stat -f -c %T /sys/fs/bpf 2>/dev/null)" != bpf_fs ]; then
		mount -t bpf bpf /sys/fs/bpf 2>/dev/null ||
			cannot "/sys/fs/bpf is not a BPF file system and cannot be mounted as one (mount -t bpf bpf /sys/fs/bpf)."
	fi
}

# bpf() may be there and yet be refused (seccomp, lockdown): ask it for the smallest map there is.
check_bpf_allowed() {
	.venv/bin/python - <<-'PY' || cannot "bpf() is refused here although we are root (a container, seccomp or kernel lockdown?)."
		import ctypes, os, platform, struct, sys
		number = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "ppc64le": 361, "s390x": 351}.get(platform.machine())
		if number is None:
		    sys.exit(0)  # an unknown machine: the loader will tell
		array = struct.pack("=IIII", 2, 4, 8, 1).ljust(72, b"\0")  # BPF_MAP_TYPE_ARRAY, key, value, entries
		fd = ctypes.CDLL(None, use_errno=True).syscall(number, 0, array, len(array))
		sys.exit(fd < 0 or os.close(fd))
	PY
}

# ---------------------------------------------------------------------------------------------------- apt packages

missing=()
# need PACKAGE COMMAND...: the fact that must hold, and the package that makes it hold.
need() {
	local package=$1
	shift
	"$@" >/dev/null 2>&1 || missing+=("$package")
}

has_library() { ldconfig -p | grep "$1" >/dev/null; } # not -q: it ends at once, and with pipefail ldconfig then fails
has_package() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

find_python() {
	local python
	for python in python3 python3.13 python3.12 python3.11 /usr/bin/python3; do
		if "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
			command -v "$python"
			return
		fi
	done
	return 1
}

look_for_missing() {
	missing=()
	need python3-venv find_python
	[ "$level" != python ] || return 0
	need clang-16 tools/find-clang.sh
	need libbpf-dev test -e /usr/include/bpf/bpf_helpers.h
	need linux-libc-dev test -e "/usr/include/$(uname -m)-linux-gnu/asm/types.h"
	[ "$level" = machine ] || return 0
	need libbpf1 has_library libbpf.so.1
	need bpftool command -v bpftool
	need iproute2 command -v tc
	need iputils-ping command -v ping
	need ethtool command -v ethtool
	need nginx-light command -v nginx
	need curl command -v curl
	need wrk command -v wrk
	need tcpdump command -v tcpdump
	need procps command -v sysctl
	need redis-server command -v redis-server
	need prometheus command -v promtool
	[ $with_cluster = yes ] || return 0
	need etcd-server command -v etcd
	need containerd command -v containerd
	need runc command -v runc
	need containernetworking-plugins test -x /usr/lib/cni/ptp
	need nftables command -v nft
	need buildah command -v buildah
	need mmdebstrap command -v mmdebstrap
}

apt_install() (
	export DEBIAN_FRONTEND=noninteractive
	# No service must start here, neither now nor at the next boot: the tests start their own, in namespaces. policy-rc.d is
	# Debian's way to say so; the machine's own is put back, also after Ctrl-C.
	local policy=/usr/sbin/policy-rc.d service new=()
	for service in nginx redis-server prometheus etcd containerd; do
		command -v $service >/dev/null || new+=($service)
	done
	if [ ! -e $policy ]; then
		trap 'rm -f $policy' EXIT INT TERM
		printf '#!/bin/sh\n# while holdfast installs packages; removed afterwards\nexit 101\n' >$policy
		chmod 755 $policy
	fi
	apt-get -q -o DPkg::Lock::Timeout=120 update
	apt-get -q -o DPkg::Lock::Timeout=120 install -y --no-install-recommends "$@"
	for service in "${new[@]}"; do
		if command -v $service >/dev/null && command -v systemctl >/dev/null; then
			systemctl disable --quiet $service || true # no systemd running: nothing to disable
		fi
	done
)

install_missing() {
	PATH=$PATH:/usr/sbin:/sbin
	look_for_missing
	((${#missing[@]})) || return 0
	command -v apt-get >/dev/null ||
		cannot "this is not a Debian-like system (no apt-get); install what Debian calls ${missing[*]} and run it again."
	[ "$(id -u)" = 0 ] || cannot "${missing[*]} must be installed, and that needs root; run it again with sudo."
	step "installing ${missing[*]} (a minute or two)" apt_install "${missing[@]}"
	look_for_missing
	((${#missing[@]} == 0)) || cannot "${missing[*]} was installed but is still not usable; is this older than Debian 12?"
}

# --------------------------------------------------------------------------------------------------- Python packages

install_python_packages() {
	local python stamp=.venv/.holdfast-setup key
	if ! .venv/bin/python -c 'import pip' 2>/dev/null; then
		python=$(find_python)
		step "making .venv with $("$python" --version)" "$python" -m venv --clear .venv
	fi
	key=$({ pwd -P; .venv/bin/python --version; cat pyproject.toml; } | sha256sum)
	[ "$(cat $stamp 2>/dev/null)" != "$key" ] || return 0
	step "installing the Python packages of pyproject.toml into .venv (a minute)" \
		.venv/bin/python -m pip install --disable-pip-version-check --prefer-binary -e '.[lab,operator,test,dev]'
	echo "$key" >$stamp
}

# ---------------------------------------------------------------------------------------------------------------

# Asked instead of the stamp: who may write nothing here can still use what somebody else has installed.
can_import_the_show() { .venv/bin/python -c 'import lbpod.lab.demo.show, lbpod.simulator.baselines' 2>/dev/null; }

# simulate SENTENCE: the demo goes on without real packets, with nothing but Python; this is why.
simulate() {
	level=python
	echo "==> no real packets here: ${1#holdfast: cannot go on: }"
	! can_import_the_show || exit 3
}

can_simulate=no
if [ "$level" = demo ]; then
	can_simulate=yes
	level=machine
	lack=$( (check_root && check_kernel) 2>&1) || simulate "$lack"
fi
[ "$level" != machine ] || check_root
{ mkdir -p build && : >>build/setup.lock && : >>"$log"; } 2>/dev/null ||
	cannot "build/ cannot be written here by $(id -un); run it again with sudo, or as who owns it."
exec 9>build/setup.lock
flock -w 600 9 || cannot "another set-up has been running here for ten minutes (it holds build/setup.lock)."
: >"$log"
[ "$level" != machine ] || check_kernel
install_missing
install_python_packages
if [ "$level" = machine ]; then
	lack=$( (check_bpf_allowed) 2>&1) || { [ $can_simulate = yes ] && simulate "$lack"; } || cannot "${lack#holdfast: cannot go on: }"
fi
[ $can_simulate = no ] || [ "$level" = machine ] || exit 3
