"""The quiet place: every decision is made here, and nothing else happens here.

No clock, no socket, no randomness, no logging: time is an argument, the world is an event, and what is to be done
comes back as effects. That is what lets one seed replay a whole cluster, and lets a slow oracle be compared with the
kernel's program. The allow-list of imports is a test (tests/tidy).
"""
