"""Certificates: what is minted, what is kept, and who gets through a real TLS handshake with whom."""

import ssl
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cryptography import x509

from lbpod.certs import (
    Caller,
    CertsError,
    Credentials,
    Role,
    client_context,
    files_in,
    prove,
    role_of,
    server_context,
    server_name,
)
from lbpod.core.errors import RemoteError
from lbpod.core.limits import CA_DAYS, CERTIFICATE_DAYS, CERTIFICATE_RENEW_DAYS, CERTIFICATE_WARN_DAYS
from lbpod.expiry import Life, life_of
from lbpod.minting import mint, minted_nodes


@pytest.fixture(scope="module")
def minted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("certs")
    mint(directory, ["n1", "n2"])
    return directory


def shake(client: ssl.SSLContext, server: ssl.SSLContext, name: str) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """A handshake in memory: the two ends, once a byte has passed each way. Raises ssl.SSLError as OpenSSL does."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    near = client.wrap_bio(down, up, server_hostname=name)
    far = server.wrap_bio(up, down, server_side=True)
    for _ in range(4):
        for end in (near, far):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    near.write(b"x")
    assert b"x" == far.read(1)
    return near, far


def test_mint_makes_a_ca_and_one_pair_for_each(minted: Path) -> None:
    names = {"ca", "controller", "viewer", "n1", "n2"}
    assert {f"{name}.{kind}" for name in names for kind in ("crt", "key")} == {path.name for path in minted.iterdir()}
    for name in sorted(names):
        assert 0o600 == stat.S_IMODE((minted / f"{name}.key").stat().st_mode)


def test_mint_keeps_what_is_valid_and_mends_what_is_not(tmp_path: Path) -> None:
    mint(tmp_path, ["n1", "n2"])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert [] == mint(tmp_path, ["n1", "n2"])
    (tmp_path / "n1.key").unlink()
    (tmp_path / "n2.crt").write_bytes(b"nonsense")
    assert {"n1.crt", "n1.key", "n2.crt", "n2.key", "n3.crt", "n3.key"} == {
        p.name for p in mint(tmp_path, ["n1", "n2", "n3"])
    }
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert [] == [name for name in before if not name.startswith("n") and before[name] != after[name]]


def test_a_certificate_of_another_role_or_ca_is_made_anew(tmp_path: Path, minted: Path) -> None:
    mint(tmp_path, ["n1"])
    for kind in ("crt", "key"):
        (tmp_path / f"n1.{kind}").write_bytes((minted / f"n1.{kind}").read_bytes())
    assert ["n1.key", "n1.crt"] == [path.name for path in mint(tmp_path, ["n1"])]
    for kind in ("crt", "key"):
        (tmp_path / f"n1.{kind}").write_bytes((tmp_path / f"viewer.{kind}").read_bytes())
    assert ["n1.key", "n1.crt"] == [path.name for path in mint(tmp_path, ["n1"])]


def test_a_ca_is_never_replaced(tmp_path: Path) -> None:
    mint(tmp_path, [])
    (tmp_path / "ca.key").unlink()
    with pytest.raises(CertsError, match="restore both, or remove both"):
        mint(tmp_path, [])


def test_a_folder_that_cannot_be_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "tls"):
        with pytest.raises(CertsError, match=r"file.* cannot be written: "):
            mint(folder, [])


@pytest.mark.parametrize("name", ["../n1", "ca", "controller", "", "N1", "a b", "-"])
def test_names_that_would_be_trouble_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CertsError, match="cannot be the name"):
        mint(tmp_path, [name])


@pytest.mark.parametrize(("name", "role"), [("controller", Role.CONTROLLER), ("viewer", Role.VIEWER), ("n2", Role.LB)])
def test_a_server_knows_its_caller(minted: Path, name: str, role: Role) -> None:
    client, server = client_context(files_in(minted, name)), server_context(files_in(minted, "n1"))
    near, far = shake(client, server, server_name("n1"))
    assert Caller(role, name) == role_of(far)
    assert Caller(Role.LB, "n1") == role_of(near)
    assert "TLSv1.3" == far.version()


def test_a_client_reaches_the_node_it_means_and_no_other(minted: Path) -> None:
    client, server = client_context(files_in(minted, "controller")), server_context(files_in(minted, "n2"))
    with pytest.raises(ssl.SSLCertVerificationError, match=r"n1\.lb\.holdfast"):
        shake(client, server, server_name("n1"))


def test_a_viewer_cannot_pose_as_a_server(minted: Path) -> None:
    client, server = client_context(files_in(minted, "controller")), server_context(files_in(minted, "viewer"))
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(client, server, server_name("viewer", Role.VIEWER))


def test_another_cluster_is_a_stranger(tmp_path: Path, minted: Path) -> None:
    mint(tmp_path, ["n1"])
    for client, server in ((tmp_path, minted), (minted, tmp_path)):
        with pytest.raises(ssl.SSLError):
            shake(client_context(files_in(client, "n1")), server_context(files_in(server, "n1")), server_name("n1"))


def test_no_certificate_no_entry(minted: Path) -> None:
    bare = ssl.create_default_context(cafile=minted / "ca.crt")
    with pytest.raises(ssl.SSLError):
        shake(bare, server_context(files_in(minted, "n1")), server_name("n1"))
    with pytest.raises(RemoteError) as caught:
        role_of(None)
    assert 403 == caught.value.status


def test_older_tls_is_not_spoken(minted: Path) -> None:
    old = client_context(files_in(minted, "controller"))
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError):
        shake(old, server_context(files_in(minted, "n1")), server_name("n1"))


def contents(folder: Path, name: str) -> tuple[bytes, bytes, bytes]:
    files = files_in(folder, name)
    return files.ca.read_bytes(), files.certificate.read_bytes(), files.key.read_bytes()


@pytest.mark.parametrize(("name", "role"), [("controller", Role.CONTROLLER), ("viewer", Role.VIEWER), ("n2", Role.LB)])
def test_a_good_pair_proves_itself(minted: Path, name: str, role: Role) -> None:
    ca, certificate, key = contents(minted, name)
    prove(ca, certificate, key, Caller(role, name))
    with pytest.raises(CertsError, match="n9"):
        prove(ca, certificate, key, Caller(role, "n9"))


def test_a_certificate_that_cannot_answer_calls_proves_no_lb(tmp_path: Path, minted: Path) -> None:
    with pytest.raises(CertsError, match="purpose"):
        prove(*contents(minted, "viewer"), Caller(Role.LB, "viewer"))
    mint(tmp_path, ["n1"])
    ca, _, _ = contents(tmp_path, "n1")
    _, certificate, key = contents(minted, "n1")
    with pytest.raises(CertsError, match="verify failed"):
        prove(ca, certificate, key, Caller(Role.LB, "n1"))
    _, _, other = contents(minted, "n2")
    with pytest.raises(CertsError, match="cannot be used"):
        prove(ca, certificate, other, Caller(Role.LB, "n1"))


def test_a_missing_file_is_named(tmp_path: Path, minted: Path) -> None:
    with pytest.raises(CertsError, match=r"n9\.crt is not there; .* copy ca\.crt, n9\.crt and n9\.key from there"):
        server_context(files_in(minted, "n9"))
    (tmp_path / "ca.crt").write_text("nonsense")
    files = files_in(tmp_path, "n1")
    for path in (files.certificate, files.key):
        path.write_text("nonsense")
    with pytest.raises(CertsError, match="cannot be used"):
        client_context(files)


def renewed(folder: Path, name: str) -> None:
    """As after `holdfast certs`, shortly before a certificate expires."""
    for path in (files_in(folder, name).certificate, files_in(folder, name).key):
        path.unlink()
    mint(folder, ["n1", "n2"])


def shown(ends: tuple[ssl.SSLObject, ssl.SSLObject]) -> list[object]:
    """Serial numbers of the server's certificate, then the client's."""
    return [(end.getpeercert() or {})["serialNumber"] for end in ends]


def test_renewed_files_are_used_on_both_sides_from_the_next_handshake(tmp_path: Path) -> None:
    mint(tmp_path, ["n1", "n2"])
    one, two = Credentials(files_in(tmp_path, "n1")), Credentials(files_in(tmp_path, "n2"))
    before = shown(shake(two.client, one.server, server_name("n1")))
    assert not one.renew()
    for credentials, name in ((one, "n1"), (two, "n2")):
        renewed(tmp_path, name)
        assert credentials.renew()
        assert not credentials.renew()
    after = shown(shake(two.client, one.server, server_name("n1")))
    assert not set(before) & set(after)


def test_files_that_are_of_no_use_change_nothing_and_are_looked_at_again(tmp_path: Path) -> None:
    mint(tmp_path, ["n1", "n2"])
    files = files_in(tmp_path, "n1")
    one, two = Credentials(files), Credentials(files_in(tmp_path, "n2"))
    before = shown(shake(two.client, one.server, server_name("n1")))
    certificate, key = files.certificate.read_bytes(), files.key.read_bytes()
    renewed(tmp_path, "n1")
    whole = files.certificate.read_bytes()
    for broken in (certificate, b"nonsense", whole[: len(whole) // 2], b""):
        files.certificate.write_bytes(broken)
        for _ in range(2):
            with pytest.raises(CertsError, match=r"n1\.crt"):
                one.renew()
        assert before == shown(shake(two.client, one.server, server_name("n1")))
        assert before == shown(shake(two.client, one.server, server_name("n1"))), "and the key is still there"
    files.certificate.unlink()
    with pytest.raises(CertsError, match=r"n1\.crt cannot be read"):
        one.renew()
    files.certificate.write_bytes(whole)
    assert one.renew()
    assert before != shown(shake(two.client, one.server, server_name("n1")))
    files.certificate.write_bytes(certificate)
    files.key.write_bytes(key)
    assert one.renew()
    assert before == shown(shake(two.client, one.server, server_name("n1")))


def test_a_ca_that_is_added_is_trusted(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        mint(folder, ["n1", "n2"])
    one, stranger = Credentials(files_in(ours, "n1")), Credentials(files_in(theirs, "n2"))
    with pytest.raises(ssl.SSLError):
        shake(one.client, stranger.server, server_name("n2"))
    both = (ours / "ca.crt").read_bytes() + (theirs / "ca.crt").read_bytes()
    for folder, credentials in ((ours, one), (theirs, stranger)):
        (folder / "ca.crt").write_bytes(both)
        assert credentials.renew()
    shake(one.client, stranger.server, server_name("n2"))


DAY_S = 86_400


def holdfast_certs(*argv: str) -> str:
    """What the command prints."""
    command = [sys.executable, "-m", "lbpod.cli", "certs", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def test_without_names_the_nodes_are_those_whose_certificates_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mint(tmp_path, ["n1", "n2"])
    for kind in ("crt", "key"):
        (tmp_path / f"n1.{kind}").unlink()
        (tmp_path / f"copy.{kind}").write_bytes((tmp_path / f"n2.{kind}").read_bytes())
    with monkeypatch.context() as brief:
        brief.setattr("lbpod.minting.CERTIFICATE_DAYS", 0)
        mint(tmp_path, ["n1"])
    (tmp_path / "nonsense.crt").write_bytes(b"nonsense")
    assert ["n1", "n2"] == minted_nodes(tmp_path)
    assert [] == minted_nodes(tmp_path / "none")
    assert f"{tmp_path}/n1.key\n{tmp_path}/n1.crt\n" == holdfast_certs(str(tmp_path)), "that one had ended"
    assert f"everything in {tmp_path} is still good\n" == holdfast_certs(str(tmp_path))


def test_the_help_says_how_long_certificates_live() -> None:
    said = " ".join(holdfast_certs("--help").split())
    assert f"valid for {CERTIFICATE_DAYS} days, the CA for {CA_DAYS:,}" in said
    assert f"less than {CERTIFICATE_RENEW_DAYS} days left" in said


def test_the_dates_of_a_certificate_are_read_as_the_library_reads_them(minted: Path) -> None:
    for name in ("ca", "controller", "n1"):
        data = (minted / f"{name}.crt").read_bytes()
        certificate = x509.load_pem_x509_certificate(data)
        since, until = (
            certificate.not_valid_before_utc.timestamp(),
            certificate.not_valid_after_utc.timestamp(),
        )
        assert Life(since, until) == life_of(data) == life_of(b"a comment\n" + data + b"and another " + data)
    good = (minted / "n1.crt").read_bytes()
    whole = ssl.PEM_cert_to_DER_cert(good.decode())
    for length in range(len(whole)):
        life_of(ssl.DER_cert_to_PEM_cert(whole[:length]).encode())
    for bad in (b"", b"nonsense", good[:200], good.replace(b"MII", b"AAA", 1)):
        assert None is life_of(bad)


def test_a_certificate_that_is_about_to_end_is_named_once_a_day(tmp_path: Path) -> None:
    mint(tmp_path, ["n1"])
    credentials = Credentials(files_in(tmp_path, "n1"))
    end_s = credentials.expires_s
    assert end_s is not None
    assert CERTIFICATE_DAYS == round((end_s - time.time()) / DAY_S)
    assert "" == credentials.reminder(end_s - CERTIFICATE_WARN_DAYS * DAY_S - 1)
    said = credentials.reminder(end_s - 20 * DAY_S)
    assert "n1.crt ends on " in said
    assert ", in 20 days; renew it where it was made" in said
    assert "" == credentials.reminder(end_s - 20 * DAY_S + 3_600)
    assert ", in 19 days;" in credentials.reminder(end_s - 19 * DAY_S)
    assert "n1.crt ended on " in credentials.reminder(end_s + 1)
    renewed(tmp_path, "n1")
    assert credentials.renew()
    assert "n1.crt ended on " in credentials.reminder(end_s + DAY_S), "the new one has ended by then, too: said at once"
    assert "" == credentials.reminder(time.time())


def test_a_certificate_that_lives_for_days_only_is_not_always_about_to_end() -> None:
    life = Life(0, 10 * DAY_S)
    assert not life.ends_soon(8.9 * DAY_S)
    assert life.ends_soon(9.1 * DAY_S)
