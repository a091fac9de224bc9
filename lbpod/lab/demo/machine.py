"""What keeps this machine from moving packets for the demo: one sentence, or none.

Asked before anything is made, so that people hear it first, and the show goes on in the simulator. The lab itself would
say the same things, one after the other, in the middle of its building.
"""

import os
import subprocess
from typing import Final

from lbpod.datapath.features import Feature, Need, probe
from lbpod.lab.errors import LabError
from lbpod.lab.kernel import bpffs_mount

_UNSHARE: Final = ("unshare", "--net", "true")


def lack() -> str:
    """One sentence, without its full stop; empty: nothing is missing."""
    if os.geteuid() != 0:
        return "it takes root to make network namespaces and to load BPF programs"
    for finding in probe():
        if finding.need is Need.REQUIRED and finding.feature is not Feature.BPFFS:  # which the lab mounts itself
            return finding.sentence.removesuffix(".")
    try:
        bpffs_mount()
    except LabError as error:
        return str(error)
    try:
        subprocess.run(_UNSHARE, check=True, capture_output=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "no network namespace can be made here (is this a container?)"
    return ""
