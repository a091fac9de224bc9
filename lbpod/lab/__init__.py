"""Hosts, routers and links in network namespaces, made and removed without a trace.

The demo, the tests and the benchmarks need real packets on one machine; they share this one way to make the machines.
Nothing that runs in production imports it.
"""
