"""Settings and memory of the agent: what is refused, and what survives."""

from pathlib import Path

import pytest

from lbpod.agent.remembered import FILE_NAME, Memory
from lbpod.agent.settings import Endpoint, OnTerm, RedisTarget, Settings, SettingsError, read_settings
from lbpod.core.messages import Remember
from lbpod.core.model import Cluster, Node, Ring, Snapshot, parse_address


def test_the_command_line_wins_over_the_environment() -> None:
    settings = read_settings(
        {"node": "one", "listen": None}, {"HOLDFAST_NODE": "two", "HOLDFAST_LISTEN": "[::1]:9000", "HOME": "/x"}
    )
    assert ("one", Endpoint("::1", 9000)) == (settings.node, settings.listen)
    assert "[::1]:9000" == str(settings.listen)


def test_defaults() -> None:
    settings = read_settings({}, {})
    assert Settings() == settings
    assert not settings.detach_on_exit
    assert "127.0.0.1:9902" == str(settings.metrics_listen)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("listen", "9900", "--listen is '9900'; it must be ADDRESS:PORT"),
        ("listen", "0.0.0.0:99999", "ADDRESS:PORT"),
        ("map_sizes", "records", "--map-sizes has 'records'"),
        ("map_sizes", "records=0", "records=65536,nat=65536"),
        ("map_sizes", "vips=5", "--map-sizes names 'vips'; sizes can be set for cache, embryonic, nat"),
        ("map_sizes", "nat=99999999999", "a map has room for 67108864 entries at most"),
        ("map_sizes", f"nat={'9' * 5_000}", "it must be a list like"),
        ("detach_on_exit", "perhaps", "yes or no"),
        ("on_term", "die", "--on-term is 'die'; it must be leave or stay"),
        ("withdraw_seconds", "soon", "a number of seconds from 0 to 120"),
        ("withdraw_seconds", "121", "a number of seconds from 0 to 120"),
        ("withdraw_seconds", "-1", "a number of seconds from 0 to 120"),
        ("redis_url", "10.0.0.9:6379", "--redis-url is '10.0.0.9:6379'; it must be redis://[USER@]HOST[:PORT]"),
        ("redis_url", "redis://10.0.0.9:0", "for example redis://10.0.0.9:6379"),
        ("redis_url", "redis://10.0.0.9/0?timeout=1", "it must be redis://"),
        ("redis_url", "redis://:hush@10.0.0.9", "--redis-url has a password in it"),
        ("log_level", "loud", "debug, info, warning, error"),
        ("node", "", "1 to 253 bytes"),
        ("tls", "", "empty"),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(name: str, value: str, said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read_settings({name: value}, {})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_sigterm_means() -> None:
    assert (OnTerm.LEAVE, 1.0) == (read_settings({}, {}).on_term, read_settings({}, {}).withdraw_seconds)
    settings = read_settings({"withdraw_seconds": "0.25"}, {"HOLDFAST_ON_TERM": "stay"})
    assert (OnTerm.STAY, 0.25) == (settings.on_term, settings.withdraw_seconds)


def test_where_diagnostics_go(tmp_path: Path) -> None:
    assert read_settings({}, {"HOLDFAST_REDIS_URL": ""}).redis_url is None
    password = {"HOLDFAST_REDIS_PASSWORD_FILE": str(tmp_path / "password")}
    assert read_settings({}, password).redis_url is None
    settings = read_settings({"redis_url": "rediss://lb@[fd00::9]:7000/3"}, password)
    assert RedisTarget("fd00::9", 7000, 3, "lb", tls=True, password_file=tmp_path / "password") == settings.redis_url
    assert "rediss://lb@[fd00::9]:7000/3" == str(settings.redis_url)
    assert "redis://redis.tools:6379/0" == str(read_settings({"redis_url": "redis://redis.tools/"}, {}).redis_url)


def test_a_password_in_a_url_is_not_repeated() -> None:
    with pytest.raises(SettingsError) as caught:
        read_settings({"redis_url": "redis://lb:hush@10.0.0.9"}, {})
    assert "hush" not in str(caught.value)


def test_map_sizes() -> None:
    settings = read_settings({}, {"HOLDFAST_MAP_SIZES": "records=100,nat=7"})
    assert {"records": 100, "nat": 7, "unassured": 3} == dict(settings.map_sizes), "half of nat"
    settings = read_settings({}, {"HOLDFAST_MAP_SIZES": "nat=1,unassured=9"})
    assert {"nat": 1, "unassured": 9} == dict(settings.map_sizes)
    assert {"records": 5} == dict(read_settings({}, {"HOLDFAST_MAP_SIZES": "records=5"}).map_sizes)


def snapshot(generation: int) -> Snapshot:
    node = Node(1, "n1", parse_address("10.0.0.1"), "10.0.0.1:9900", 0)
    return Snapshot(Cluster(7, 8), generation, Ring(1, (0,)), (node,))


def test_what_is_kept_is_recalled(tmp_path: Path) -> None:
    memory = Memory(tmp_path / "state")
    assert (None, None, "") == (memory.recall().committed, memory.recall().prepared, memory.recall().why_not)
    memory.keep(Remember(snapshot(1), None))
    memory.keep(Remember(snapshot(2), snapshot(3)))
    found = Memory(tmp_path / "state").recall()
    assert (snapshot(2), snapshot(3), "") == (found.committed, found.prepared, found.why_not)
    memory.forget()
    memory.forget()
    assert memory.recall().committed is None


def test_a_folder_that_is_none_is_no_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    memory = Memory(tmp_path / "file")
    assert memory.recall().committed is None
    assert "Not a directory" in memory.recall().why_not


@pytest.mark.parametrize("keep_bytes", [0, 1, 40])
def test_a_torn_file_is_no_memory(tmp_path: Path, keep_bytes: int) -> None:
    memory = Memory(tmp_path)
    memory.keep(Remember(snapshot(1), None))
    file = tmp_path / FILE_NAME
    file.write_bytes(file.read_bytes()[:keep_bytes])
    assert memory.recall().committed is None
    assert "cannot be used" in memory.recall().why_not


def test_what_is_from_before_the_last_boot_is_no_memory(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    memory.keep(Remember(snapshot(1), None))
    file = tmp_path / FILE_NAME
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip().encode()
    file.write_bytes(file.read_bytes().replace(boot, boot[::-1]))
    assert memory.recall().committed is None
    assert "last boot" in memory.recall().why_not
