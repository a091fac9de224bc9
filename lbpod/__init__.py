"""Holdfast's own library: what the operator and the pod share, and what the pod runs.

One package holds both brains (`core`), because the operator, the pod, the file-driven controller and the simulator
must decide alike; around it lie the border to the kernel (`datapath`, `bpf`), the shells that act (`agent`,
`standalone`), and what people touch (`lab`, `cli`). Who may import whom is written in pyproject.toml as contracts,
and checked by `make check`.

Nothing is imported here: importing `lbpod.core` must never drag in a socket.
"""

__version__ = "0.1.0"
