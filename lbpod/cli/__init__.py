"""The `holdfast` command: reads options, builds the parts, and prints; it decides nothing about packets.

Each command imports what it needs only when it runs, so that `holdfast --help` stays quick.
"""
