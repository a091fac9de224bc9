# What the end-to-end tests need beside our own images: a pause container, and a page that says who serves it.
ARG BASE
FROM ${BASE} AS pause
ENTRYPOINT ["/usr/bin/sleep", "infinity"]

FROM ${BASE} AS page
COPY tests/cluster/images/page.sh /page.sh
ENTRYPOINT ["/bin/sh", "/page.sh"]
