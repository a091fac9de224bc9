"""A real Kubernetes API server on the loopback: etcd and kube-apiserver as two processes of the test's own, with
certificates, a kubeconfig and RBAC, and nothing behind it (no controllers, no nodes: tests write those objects). It may
also be inside a network namespace, for nodes that reach it there (``nodes.py``).

Why the real one: what a CRD's rules refuse, what server-side dry-run says of a manifest, what a watch does when the
server restarts, and who may do what, nobody else knows. Processes are ended by their own id, and end by themselves when
the test process dies (setpriv --pdeathsig), so that nothing is left, also after Ctrl-C.
"""

import base64
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from lbpod.lab import kernel
from tests.tidy.sources import ROOT

SERVICE_ADDRESS: Final = "10.96.0.1"
"""Of the Service `kubernetes`."""
START_S: Final = 120
STOP_S: Final = 20
Json = dict[str, Any]


def binaries() -> Path:
    """The cache folder of tools/kube.sh."""
    ran = subprocess.run([ROOT / "tools/kube.sh", "folder"], capture_output=True, text=True, check=True)
    return Path(ran.stdout.strip())


def why_not_here() -> str:
    """What is missing, as a sentence; empty: nothing is."""
    missing = [name for name in ("kube-apiserver", "kubectl", "helm") if not (binaries() / name).exists()]
    if missing:
        return f"missing feature: kubernetes ({', '.join(missing)} not built; run `make e2e`)"
    return "" if shutil.which("etcd") else "missing feature: etcd (Debian's etcd-server; `make e2e` installs it)"


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- Certificates -----------------------------------------------------------------------------------------------------
def _key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65_537, key_size=2_048)


def _pem(key: rsa.RSAPrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )


def _certificate(
    key: rsa.RSAPrivateKey,
    name: str,
    group: str,
    issuer: tuple[x509.Name, rsa.RSAPrivateKey] | None,
    addresses: Sequence[str] = ("127.0.0.1",),
) -> x509.Certificate:
    """issuer: None for the CA itself."""
    parts = [x509.NameAttribute(NameOID.COMMON_NAME, name)]
    parts += [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group)] if group else []
    subject, now = x509.Name(parts), datetime.now(UTC)
    signed_by, signing = issuer or (subject, key)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(signed_by)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=2))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
    )
    if issuer is not None:
        names: list[x509.GeneralName] = [x509.IPAddress(ip_address(one)) for one in addresses]
        names += [x509.DNSName("kubernetes.default.svc")]
        uses = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage(uses), critical=False)
    return builder.sign(signing, hashes.SHA256())


class Pki:
    """A CA and what it signs, in a folder."""

    def __init__(self, folder: Path, addresses: Sequence[str]) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self._addresses = addresses
        self._key = _key()
        self._ca = _certificate(self._key, "test-ca", "", None)
        self._write("ca.crt", self._ca.public_bytes(serialization.Encoding.PEM))
        self._write("sa.key", _pem(_key()))
        self.sign("apiserver", "kube-apiserver", "")

    def sign(self, file: str, name: str, group: str) -> None:
        """file.crt and file.key for this user in this group."""
        key = _key()
        made = _certificate(key, name, group, (self._ca.subject, self._key), self._addresses)
        self._write(f"{file}.crt", made.public_bytes(serialization.Encoding.PEM))
        self._write(f"{file}.key", _pem(key))

    def _write(self, name: str, data: bytes) -> None:
        (self.folder / name).touch(mode=0o600)
        (self.folder / name).write_bytes(data)


# --- Processes --------------------------------------------------------------------------------------------------------
@dataclass
class Process:
    """One process that is ours, with its log in a file."""

    argv: Sequence[str]
    log: Path
    running: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it; it dies with us: with the thread that calls this, as the kernel has it, so call it in the main
        one."""
        with self.log.open("ab") as log:
            argv = ["setpriv", "--pdeathsig", "KILL", "--", *self.argv]
            self.running = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Ends it, and waits until it has ended."""
        if self.running is None:
            return
        self.running.send_signal(number)
        self.reap()

    def reap(self) -> None:
        """Waits until it has ended, and kills it where it does not."""
        if self.running is None:
            return
        try:
            self.running.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.running.kill()
            self.running.wait(STOP_S)
        self.running = None

    def check(self) -> None:
        """Raises AssertionError with the end of its log where it has ended by itself."""
        assert self.running is not None, "it was started"
        if self.running.poll() is not None:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])
            raise AssertionError(f"{self.argv[0]} has ended with {self.running.returncode}:\n{tail}")


class ApiError(Exception):
    """A refusal of the API server. status: HTTP; body: its Status object."""

    def __init__(self, status: int, body: Json) -> None:
        super().__init__(f"{status}: {body.get('message', body)}")
        self.status = status
        self.body = body


@dataclass
class ApiServer:
    """A running one. Everything that it needs lies in `folder`. address: where it is reached; netns: the file of the
    network namespace that it and its tools run in, None for the test's own."""

    folder: Path
    tools: Path
    address: str = "127.0.0.1"
    netns: Path | None = None
    flags: Sequence[str] = ("--endpoint-reconciler-type=none",)
    """More flags. By default nobody is told where it is: there is nobody inside the cluster."""
    port: int = field(default_factory=free_port)
    etcd_port: int = field(default_factory=free_port)
    peer_port: int = field(default_factory=free_port)

    def __post_init__(self) -> None:
        self.inside = [] if self.netns is None else ["nsenter", f"--net={self.netns}", "--"]
        self.pki = Pki(self.folder / "pki", ("127.0.0.1", SERVICE_ADDRESS, *{self.address} - {"127.0.0.1"}))
        self.pki.sign("admin", "admin", "system:masters")
        self.kubeconfig = self.write_kubeconfig("admin")
        self._tls = ssl.create_default_context(cafile=str(self.pki.folder / "ca.crt"))
        self._tls.load_cert_chain(self.pki.folder / "admin.crt", self.pki.folder / "admin.key")
        etcd, peer = f"http://127.0.0.1:{self.etcd_port}", f"http://127.0.0.1:{self.peer_port}"
        self.etcd = Process(
            [
                *self.inside,
                *("etcd", "--data-dir", str(self.folder / "etcd"), "--log-level", "warn"),
                *("--listen-client-urls", etcd, "--advertise-client-urls", etcd),
                *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
                *("--initial-cluster", f"default={peer}"),
            ],
            self.folder / "etcd.log",
        )
        pki = self.pki.folder
        self.apiserver = Process(
            [
                *self.inside,
                str(self.tools / "kube-apiserver"),
                f"--etcd-servers={etcd}",
                f"--bind-address={self.address if self.netns is None else '0.0.0.0'}",
                f"--secure-port={self.port}",
                # The loopback may not be advertised; where only that is served, nobody asks.
                f"--advertise-address={'192.0.2.1' if self.netns is None else self.address}",
                f"--client-ca-file={pki / 'ca.crt'}",
                f"--tls-cert-file={pki / 'apiserver.crt'}",
                f"--tls-private-key-file={pki / 'apiserver.key'}",
                f"--service-account-key-file={pki / 'sa.key'}",
                f"--service-account-signing-key-file={pki / 'sa.key'}",
                "--service-account-issuer=https://kubernetes.default.svc",
                "--service-cluster-ip-range=10.96.0.0/16",
                "--authorization-mode=Node,RBAC",
                f"--cert-dir={self.folder / 'apiserver'}",
                "--profiling=false",
                *self.flags,
            ],
            self.folder / "apiserver.log",
        )

    def write_kubeconfig(self, user: str) -> Path:
        """A kubeconfig for one of the PKI's users."""
        path = self.folder / f"{user}.kubeconfig"
        pki = self.pki.folder
        data = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": user, "namespace": "default"}}],
            "clusters": [
                {
                    "name": "test",
                    "cluster": {
                        "server": f"https://{self.address}:{self.port}",
                        "certificate-authority-data": base64.b64encode((pki / "ca.crt").read_bytes()).decode(),
                    },
                }
            ],
            "users": [
                {
                    "name": user,
                    "user": {
                        "client-certificate-data": base64.b64encode((pki / f"{user}.crt").read_bytes()).decode(),
                        "client-key-data": base64.b64encode((pki / f"{user}.key").read_bytes()).decode(),
                    },
                }
            ],
        }
        path.touch(mode=0o600)
        path.write_text(yaml.safe_dump(data))
        return path

    # --- Life ---------------------------------------------------------------------------------------------------------
    def start(self) -> None:
        """Both processes, until /readyz says ok."""
        self.etcd.start()
        self.apiserver.start()
        self.wait()

    def wait(self) -> None:
        """Until it answers."""
        end = time.monotonic() + START_S
        while not self._is_ready():
            self.etcd.check()
            self.apiserver.check()
            assert time.monotonic() < end, f"the API server was not ready in time; see {self.apiserver.log}"
            time.sleep(0.2)

    def stop(self) -> None:
        """Both processes; what they wrote stays with the folder."""
        self.apiserver.stop(signal.SIGKILL)  # it has nothing of its own, and would wait for open watches
        self.etcd.stop()

    def _is_ready(self) -> bool:
        try:
            with self._open("GET", "/readyz", None, "application/json") as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    # --- Calls --------------------------------------------------------------------------------------------------------
    def _open(self, method: str, path: str, data: bytes | None, content_type: str) -> Any:
        url = f"https://{self.address}:{self.port}{path}"
        request = urllib.request.Request(url, data, {"Content-Type": content_type}, method=method)
        with self._in_netns():
            return urllib.request.urlopen(request, context=self._tls, timeout=30)

    @contextmanager
    def _in_netns(self) -> Iterator[None]:
        """The calling thread is where the API server is."""
        if self.netns is None:
            yield
            return
        fd = os.open(self.netns, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with kernel.inside(fd):
                yield
        finally:
            os.close(fd)

    def call(self, method: str, path: str, body: Any = None, content_type: str = "application/json") -> Json:
        """One call. Raises ApiError where it is refused."""
        data = None if body is None else json.dumps(body).encode()
        try:
            with self._open(method, path, data, content_type) as response:
                return dict(json.load(response))
        except urllib.error.HTTPError as error:
            text = error.read()
            said = json.loads(text) if text.startswith(b"{") else {"message": text.decode(errors="replace")}
            raise ApiError(error.code, said) from error

    def merge(self, path: str, patch: Any) -> Json:
        """A merge patch."""
        return self.call("PATCH", path, patch, "application/merge-patch+json")

    def kubectl(self, *argv: str, stdin: str | None = None) -> str:
        """What kubectl prints. Raises AssertionError with what it says where it fails."""
        return self._run("kubectl", *argv, stdin=stdin)

    def helm(self, *argv: str) -> str:
        """What helm prints."""
        return self._run("helm", *argv)

    def _run(self, tool: str, *argv: str, stdin: str | None = None) -> str:
        home = self.folder / "home"
        env = {**os.environ, "KUBECONFIG": str(self.kubeconfig), "HOME": str(home), "XDG_CACHE_HOME": str(home)}
        command = [*self.inside, str(self.tools / tool), *argv]
        ran = subprocess.run(
            command, env=env, input=stdin, capture_output=True, text=True, check=False, timeout=300, cwd=ROOT
        )
        assert 0 == ran.returncode, f"{tool} {' '.join(argv)}:\n{ran.stdout}{ran.stderr}"
        return ran.stdout


@contextmanager
def api_server(folder: Path) -> Iterator[ApiServer]:
    """One that runs until the block ends."""
    server = ApiServer(folder, binaries())
    try:
        server.start()
        yield server
    finally:
        server.stop()
