"""`holdfast detach`: takes off this machine what an agent has left on it.

For maps of another layout, which no agent of this version may touch, and for a machine that Holdfast leaves: an agent
whose programs and maps stay on purpose is the normal case (a restart must not lose a packet), so nothing else removes
them. Not while an agent runs: it holds the folder's lock.
"""

from pathlib import Path

from lbpod.agent.remembered import Memory
from lbpod.datapath.attach import detach
from lbpod.datapath.pins import PinFolder


def take_off(pins: Path, state: Path) -> str:
    """What was taken off, as one sentence. Raises DatapathError where an agent runs, or the kernel refuses."""
    if not pins.exists():
        return f"there is nothing in {pins}"
    folder = PinFolder(pins)
    try:
        interfaces = detach(folder)
        Memory(state).forget()
        folder.remove()
    finally:
        folder.close()
    where = f"taken off {', '.join(interfaces)}" if interfaces else "no interface had a program of it"
    return f"{where}; the maps in {pins} are gone"
