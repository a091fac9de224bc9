#!/bin/sh
# Print the clang that compiles the BPF objects.
#
# 16 comes first because the figures in bench/ were made with it; any from 14 on understands `-mcpu=v3` and the BTF we need.
# CLANG=... overrides. Exit 1, silently, where there is none: the caller knows what to say.
set -eu

for clang in ${CLANG:-} clang-16 clang-19 clang-18 clang-17 clang-15 clang-14 clang; do
	path=$(command -v "$clang" 2>/dev/null) || continue
	major=$("$path" -dumpversion 2>/dev/null | cut -d. -f1)
	if [ "${major:-0}" -ge 14 ] && "$path" -print-targets | grep -q '^ *bpf '; then
		echo "$path"
		exit 0
	fi
done
exit 1
