# The operator: Python and our package, nothing else, and nobody's user.
#
#   docker build -f images/operator.Dockerfile -t holdfast/operator:0.1.0 .
#
# BASE is any image with Python 3.11 or newer as `python3`; BUILD is the same with pip (and may have a network).
ARG BUILD=python:3.11-slim-bookworm
ARG BASE=python:3.11-slim-bookworm

FROM ${BUILD} AS build
WORKDIR /src
# What it needs, in a layer that lasts until pyproject.toml changes.
COPY pyproject.toml ./
RUN python3 -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
      print(*project["dependencies"], *project["optional-dependencies"]["operator"], sep="\n")' > /needed.txt \
 && python3 -m pip install --no-cache-dir --target /opt/holdfast -r /needed.txt
COPY lbpod lbpod
COPY operator operator
COPY README.md LICENSE ./
COPY LICENSES LICENSES
# --target: a folder that can be copied to any Python of the same version, without a virtual environment's absolute paths.
RUN python3 -m pip install --no-cache-dir --no-deps --target /opt/holdfast . \
 && rm -rf /opt/holdfast/bin /opt/holdfast/lbpod/lab /opt/holdfast/lbpod/bpf

FROM ${BASE}
COPY --from=build /opt/holdfast /opt/holdfast
ENV PYTHONPATH=/opt/holdfast PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 65532:65532
EXPOSE 9901
ENTRYPOINT ["python3", "-m", "lboperator"]
