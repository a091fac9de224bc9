"""The Kubernetes operator: kopf around the Planner.

It comes with its own issue; the package exists already so that its laws hold from the start.

It may know `lbpod.core` and nothing else of the pod. Its folder's parent, `operator/`, is plain and never gets an
__init__.py: as a package it would shadow the standard library's `operator` for everything that runs from this folder.
"""
