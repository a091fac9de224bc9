"""The Kubernetes operator: kopf around the Planner that the standalone controller drives, too.

It may know `lbpod.core`, `lbpod.controller` and certificates, and nothing else of the pod. Its folder's parent,
`operator/`, is plain and never gets an __init__.py: as a package it would shadow the standard library's `operator` for
everything that runs from this folder.
"""
