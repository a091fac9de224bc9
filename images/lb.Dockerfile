# The agent of one node, with the compiled BPF objects; the compiler stays in the build stage.
#
#   docker build -f images/lb.Dockerfile -t holdfast/lb:0.1.0 .
#
# BASE is a Debian 12 or newer with Python 3.11 as `python3` and libbpf.so.1 (package libbpf1), or one that apt can install
# it into; BUILD is one that apt can install clang and pip into.
ARG BUILD=debian:bookworm
ARG BASE=debian:bookworm-slim

FROM ${BUILD} AS build
RUN apt-get update \
 && apt-get install -y --no-install-recommends clang-16 libbpf-dev linux-libc-dev python3-pip
WORKDIR /src
# What it needs, in a layer that lasts until pyproject.toml changes.
COPY pyproject.toml ./
RUN python3 -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
      > /needed.txt \
 && python3 -m pip install --no-cache-dir --target /opt/holdfast -r /needed.txt
COPY tools/find-clang.sh tools/find-clang.sh
COPY lbpod lbpod
# As the Makefile compiles it; a checkout's own objects do not count.
RUN rm -f lbpod/bpf/*.o && for source in lbpod/bpf/*.bpf.c; do \
      "$(tools/find-clang.sh)" -target bpf -mcpu=v3 -O2 -g -Wall -Werror -I lbpod/bpf \
        -idirafter "/usr/include/$(uname -m)-linux-gnu" -c "$source" -o "${source%.c}.o" || exit 1; \
    done
COPY operator operator
COPY README.md LICENSE ./
COPY LICENSES LICENSES
RUN python3 -m pip install --no-cache-dir --no-deps --target /opt/holdfast . \
 && rm -rf /opt/holdfast/bin /opt/holdfast/lbpod/lab /opt/holdfast/lboperator \
 && test -e /opt/holdfast/lbpod/bpf/lb.bpf.o

FROM ${BASE}
RUN [ -n "$(ldconfig -p | grep libbpf.so.1)" ] && command -v python3 \
 || (apt-get update && apt-get install -y --no-install-recommends python3 libbpf1 && rm -rf /var/lib/apt/lists/*)
COPY --from=build /opt/holdfast /opt/holdfast
ENV PYTHONPATH=/opt/holdfast PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
# Root, for the capabilities that the chart leaves it (NET_ADMIN, BPF, PERFMON) reach no other user.
USER 0:0
EXPOSE 9900 9902
# Not by the command line for people, whose parser takes ten megabytes.
ENTRYPOINT ["python3", "-m", "lbpod.agent"]
