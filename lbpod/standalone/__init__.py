"""Holdfast without Kubernetes: the same Planner, driven from a file that is watched.

It exists so that the embedded default is the real thing (same decisions, same wire), and not a second, simpler
balancer.
"""
