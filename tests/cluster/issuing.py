"""cert-manager beside the API server of the tests: the CRDs of its module, and its controllers as a process of our own,
which sign for real. (No webhook and no cainjector: the CRDs have one version, so nothing is converted.)

It may do everything, as it would on a cluster; the operator under test has the rights that the chart gives it.
"""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.cluster.apiserver import ApiServer, Json, Process
from tests.tidy.sources import ROOT

GROUP: Final = "/apis/cert-manager.io/v1"


def built() -> Path:
    """The cache folder of tools/kube.sh for it."""
    ran = subprocess.run([ROOT / "tools/kube.sh", "certmanager-folder"], capture_output=True, text=True, check=True)
    return Path(ran.stdout.strip())


def why_no_cert_manager() -> str:
    """What is missing, as a sentence; empty: nothing is."""
    missing = [name for name in ("cert-manager", "crds") if not (built() / name).exists()]
    return f"missing feature: cert-manager ({', '.join(missing)} not built; run `make e2e`)" if missing else ""


def install_crds(api: ApiServer) -> None:
    """All of them, whether they are there or not."""
    folder = str(built() / "crds")
    api.kubectl("apply", "--server-side", "--force-conflicts", "-f", folder)
    api.kubectl("wait", "--for=condition=Established", "--timeout=30s", "-f", folder)


def remove_crds(api: ApiServer) -> None:
    """With them, every object of their kinds; Secrets stay."""
    api.kubectl("delete", "--ignore-not-found", "--wait=true", "--timeout=60s", "-f", str(built() / "crds"))


@contextmanager
def cert_manager(api: ApiServer, log: Path) -> Iterator[Process]:
    """Its controllers, until the block ends; nothing of its kinds is left then."""
    install_crds(api)
    process = Process([str(built() / "cert-manager"), "--kubeconfig", str(api.kubeconfig)], log)
    process.start()
    try:
        yield process
    finally:
        process.stop()
        remove_crds(api)


def renewal_asked_for(certificate: Json) -> Json:
    """The status as `cmctl renew` would leave it."""
    conditions = [one for one in certificate["status"]["conditions"] if one["type"] != "Issuing"]
    generation = certificate["metadata"]["generation"]
    asked = {
        "type": "Issuing",
        "status": "True",
        "reason": "ManuallyTriggered",
        "message": "asked for by a test",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
        "observedGeneration": generation,
    }
    return {"status": {"conditions": [*conditions, asked]}}
