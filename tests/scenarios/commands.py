"""The words of a transcript: each command does one thing to a cluster and gives back what there is to see.

The README lists them. A command is a word, bare arguments and ``key=value`` ones; what it returns is compared with the
file. Nothing here decides anything: it hands words to ``cluster`` and ``traffic`` and results to ``show``.
"""

import shlex
from collections import Counter
from collections.abc import Callable
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from lbpod.core.hashing import flow_hash, slot_of
from lbpod.core.maps import mapped
from lbpod.core.messages import CommitCall, PrepareCall, Refuse
from lbpod.core.model import Affinity, Protocol, Snapshot, WorldVip
from lbpod.core.snapshot import digest_of
from lbpod.core.transition import is_tracking
from lbpod.core.verdicts import Verdict
from tests.scenarios import show
from tests.scenarios.cluster import SECOND_NS, START_NS, Cluster, Fate, Rule
from tests.scenarios.node import Node
from tests.scenarios.traffic import FLAGS, Flow, Traffic, Wish
from tests.scenarios.worlds import parse_seconds, parse_world

STEPS: Final = ("staged", "prepared", "committed")
"""What `run until` can wait for with a generation: fields of LbStatus."""

PATIENCE_NS: Final = 120 * SECOND_NS
"""How long `run until` waits unless it is told otherwise."""


class Stage:
    """What the commands of one file act on."""

    def __init__(self, fault_seed: int | None) -> None:
        self._fault_seed = fault_seed
        self._commands: dict[str, Callable[[list[str], dict[str, str], str], str]] = {
            name.removeprefix("do_"): getattr(self, name) for name in dir(self) if name.startswith("do_")
        }
        self._cluster: Cluster | None = None
        self._traffic: Traffic | None = None
        self._told = 0
        """Lines of the network's log that were shown."""
        self._counted: dict[str, npt.NDArray[np.uint64]] = {}

    def run(self, command: str, more: str) -> str:
        """Do one command; what it prints."""
        words = shlex.split(command)
        assert words[0] in self._commands, f"there is no command {words[0]!r}; see tests/scenarios/README.md"
        options = dict(word.split("=", 1) for word in words[1:] if "=" in word)
        bare = [word for word in words[1:] if "=" not in word]
        return self._commands[words[0]](bare, options, more)

    @property
    def cluster(self) -> Cluster:
        assert self._cluster is not None, "a scenario begins with `cluster`"
        return self._cluster

    @property
    def traffic(self) -> Traffic:
        assert self._traffic is not None, "a scenario begins with `cluster`"
        return self._traffic

    @property
    def broken(self) -> list[str]:
        """Packets of live flows that reached another pod."""
        return self._traffic.broken if self._traffic is not None else []

    def _vip(self, words: list[str]) -> WorldVip:
        """The VIP that is named among the words, else the only one."""
        named = [vip for vip in self.cluster.vips if vip.name in words]
        found = named or list(self.cluster.vips)
        assert len(found) == 1, "say which VIP is meant"
        return found[0]

    def _vip_id(self, vip: WorldVip) -> int:
        return next(one.id for one in self.cluster.snapshot().vips if one.name == vip.name)

    def _nodes(self, options: dict[str, str], names: list[str] | None = None) -> list[Node]:
        wanted = options["on"].split(",") if "on" in options else names or self.cluster.lbs
        return [self.cluster.nodes[name] for name in wanted]

    # --- Cluster and time ---------------------------------------------------------------------------------------------
    def do_cluster(self, bare: list[str], options: dict[str, str], more: str) -> str:
        lbs, hosts = int(options.get("lbs", 3)), int(options.get("hosts", 2))
        self._cluster = Cluster(lbs, hosts, int(options.get("seed", 7)), self._fault_seed)
        self._traffic = Traffic(self._cluster)
        return ""

    def do_faults(self, bare: list[str], options: dict[str, str], more: str) -> str:
        self.cluster.set_share(0.0 if bare == ["off"] else int(bare[0].rstrip("%")) / 100)
        return ""

    def do_world(self, bare: list[str], options: dict[str, str], more: str) -> str:
        self.cluster.want(parse_world(more))
        return ""

    def do_run(self, bare: list[str], options: dict[str, str], more: str) -> str:
        if bare[0] != "until":
            self.cluster.advance(parse_seconds(bare[0]))
            return ""
        within_ns = parse_seconds(options["within"]) if "within" in options else PATIENCE_NS
        reached = self._goal(bare[1:], options)
        if self.cluster.run_until(reached, within_ns):
            return ""
        return f"not within {show.seconds(within_ns)}"

    def _goal(self, bare: list[str], options: dict[str, str]) -> Callable[[], bool]:
        cluster, nodes = self.cluster, self._nodes(options)
        if bare == ["steady"] or "tracking" in options:
            count = int(options.get("tracking", 0))
            return lambda: all(_tracking(node) == count for node in nodes)
        match bare:
            case ["idle"]:
                return lambda: cluster.is_idle
            case ["slot", name, wanted]:
                flow = self.traffic.flows[name]
                vip = self._vip_id(flow.vip)
                return lambda: all(show.slot(node, vip, flow.slot) == wanted for node in nodes)
            case ["held"]:
                return lambda: len(cluster.held) >= int(options.get("count", 1))
            case []:
                ((step, generation),) = ((key, value) for key, value in options.items() if key in STEPS)
                return lambda: all(getattr(node.keeper.status(), step) == int(generation) for node in nodes)
            case ["forgotten"]:
                return lambda: not any(node.maps.records.rows or node.maps.embryonic.rows for node in nodes)
            case ["cached", name]:
                flow = self.traffic.flows[name]
                key = flow.key(self._vip_id(flow.vip))
                return lambda: all(key in node.maps.cache.rows for node in nodes)
        raise AssertionError(f"nobody knows when it is {bare}")

    def do_clock(self, bare: list[str], options: dict[str, str], more: str) -> str:
        return f"+{show.seconds(self.cluster.now_ns - START_NS)}"

    # --- Trouble ------------------------------------------------------------------------------------------------------
    def _rule(self, fate: Fate, bare: list[str], options: dict[str, str]) -> str:
        left = int(options["times"]) if "times" in options else None
        self.cluster.rules.append(Rule(bare[0], options.get("from", ""), options.get("to", ""), fate, left))
        return ""

    def do_lose(self, bare: list[str], options: dict[str, str], more: str) -> str:
        if bare[0] == "answers":
            return self._rule(Fate.ANSWER_LOST, bare[1:], options)
        return self._rule(Fate.LOST, bare, options)

    def do_hold(self, bare: list[str], options: dict[str, str], more: str) -> str:
        return self._rule(Fate.HELD, bare, options)

    def do_release(self, bare: list[str], options: dict[str, str], more: str) -> str:
        self.cluster.release()
        return ""

    def do_heal(self, bare: list[str], options: dict[str, str], more: str) -> str:
        self.cluster.rules.clear()
        return ""

    def do_believe(self, bare: list[str], options: dict[str, str], more: str) -> str:
        other = options.get("down") or options["up"]
        member = self.cluster.nodes[other].keeper.status().member
        self.cluster.believe(bare[0], other, member, up="up" in options)
        return ""

    def do_kill(self, bare: list[str], options: dict[str, str], more: str) -> str:
        self.cluster.nodes[bare[0]].kill()
        return ""

    def do_start(self, bare: list[str], options: dict[str, str], more: str) -> str:
        self.cluster.start(bare[0])
        return ""

    def do_crash(self, bare: list[str], options: dict[str, str], more: str) -> str:
        self.cluster.nodes[bare[0]].lose_everything()
        return ""

    def do_restart(self, bare: list[str], options: dict[str, str], more: str) -> str:
        assert bare == ["controller"], "an agent is killed and started; the controller restarts"
        self.cluster.restart_controller()
        return ""

    def do_limit(self, bare: list[str], options: dict[str, str], more: str) -> str:
        for node in self._nodes(options):
            for name in ("records", "embryonic", "cache", "pending", "nat", "unassured"):
                if name in options:
                    getattr(node.maps, name).count_max = int(options[name])
        return ""

    def do_push(self, bare: list[str], options: dict[str, str], more: str) -> str:
        """A call that nobody should make."""
        newest = self.cluster.snapshot()
        body = newest if "generation" not in options else self.cluster.snapshot(int(options["generation"]))
        for word in bare[1:]:
            body = _forged(body, word)
        answer = self.cluster.call_directly(bare[0], body)
        return f"{answer.status}: {answer.sentence}" if isinstance(answer, Refuse) else "taken"

    def do_call(self, bare: list[str], options: dict[str, str], more: str) -> str:
        """prepare or commit out of turn."""
        generation = int(options["generation"])
        digest = digest_of(self.cluster.snapshot(generation))
        body = PrepareCall(generation, digest) if bare[0] == "prepare" else CommitCall(generation, digest)
        answer = self.cluster.call_directly(bare[1], body)
        return f"{answer.status}: {answer.sentence}" if isinstance(answer, Refuse) else "taken"

    # --- Packets ------------------------------------------------------------------------------------------------------
    def do_flow(self, bare: list[str], options: dict[str, str], more: str) -> str:
        flows = self.traffic.flows
        wish = Wish(
            owner=options.get("owner", ""),
            backup=options.get("backup", ""),
            pods=tuple(_under(word) for word in bare if ":" in word),
            client=flows[options["client-of"]].client if "client-of" in options else None,
            slot_of=flows[options["slot-of"]] if "slot-of" in options else None,
        )
        flow = self.traffic.find(bare[0], self._vip(bare), wish)
        owner, backup = self.traffic.owner[flow.slot], self.traffic.backup[flow.slot]
        return f"{show.client(flow.client, flow.port)}, slot {flow.slot} of {owner}, backup {backup}"

    def do_packet(self, bare: list[str], options: dict[str, str], more: str) -> str:
        flow, words = self.traffic.flows[bare[0]], bare[1:]
        assert all(word in FLAGS for word in words), f"packets are {', '.join(FLAGS)}"
        via = self.cluster.lbs if options["via"] == "all" else options["via"].split(",")
        return "\n".join(str(self.traffic.send(flow, word, lb)) for word in words for lb in via)

    def do_open(self, bare: list[str], options: dict[str, str], more: str) -> str:
        """Many flows at once, each packet through another LB."""
        vip, count = self._vip(bare), int(bare[0])
        udp = vip.protocol is Protocol.UDP
        opened: Counter[str] = Counter()
        for _ in range(count):
            flow = self._another(vip)
            for word in ("DATA", "DATA") if udp else ("SYN", "ACK"):
                self.traffic.send(flow, word, self.traffic.next_lb())
            opened[f"pod{flow.pod}" if flow.pod else "nobody"] += 1
        return f"{count} open: " + ", ".join(f"{pod} {n}" for pod, n in sorted(opened.items()))

    def _another(self, vip: WorldVip) -> Flow:
        number = len(self.traffic.flows)
        client, port = bytes([198, 51, 101, number % 250 + 1]), 20_000 + number
        sport = 0 if vip.affinity is Affinity.CLIENT_IP else port
        seed = self.cluster.of.seed
        slot = slot_of(flow_hash(mapped(client), vip.address, sport, vip.port, int(vip.protocol), seed))
        flow = Flow(f"flow{number}", vip, client, port, slot, talks=True)
        self.traffic.flows[flow.name] = flow
        return flow

    def do_send(self, bare: list[str], options: dict[str, str], more: str) -> str:
        """One packet of every open flow through every LB."""
        results: Counter[str] = Counter()
        flows = [flow for flow in self.traffic.open_flows() if not bare or flow.vip.name in bare]
        for flow in flows:
            had = flow.pod
            for lb in self.cluster.lbs:
                trip = self.traffic.send(flow, "DATA" if flow.vip.protocol is Protocol.UDP else "ACK", lb)
                if trip.pod != had or trip.remark:
                    results[trip.remark or ("elsewhere" if trip.pod else "dropped")] += 1
                    break
            else:
                results["reach the pod that has them"] += 1
        return f"of {len(flows)}: " + ", ".join(f"{n} {what}" for what, n in sorted(results.items()))

    def do_close(self, bare: list[str], options: dict[str, str], more: str) -> str:
        flows = [self.traffic.flows[name] for name in bare] or self.traffic.open_flows()
        for flow in flows:
            self.traffic.send(flow, "FIN", self.traffic.next_lb())
        return f"{sum(flow.closed for flow in flows)} closed"

    def do_talk(self, bare: list[str], options: dict[str, str], more: str) -> str:
        """From now on flows (named ones, and all of `open`) speak by themselves."""
        for name in bare:
            self.traffic.flows[name].talks = True
        self.traffic.talk_every_ns = parse_seconds(options["every"]) if "every" in options else 0
        return ""

    # --- Looking ------------------------------------------------------------------------------------------------------
    def do_slots(self, bare: list[str], options: dict[str, str], more: str) -> str:
        vip = self._vip_id(self._vip(bare))
        return show.together({node.name: show.slots(node, vip, "flags" in bare) for node in self._nodes(options)})

    def do_slot(self, bare: list[str], options: dict[str, str], more: str) -> str:
        """The slot of one flow."""
        flow = self.traffic.flows[bare[0]]
        vip = self._vip_id(flow.vip)
        return show.together({node.name: show.slot(node, vip, flow.slot) for node in self._nodes(options)})

    def do_map(self, bare: list[str], options: dict[str, str], more: str) -> str:
        times_ns = self.cluster.now_ns if "times" in bare else None
        ids = {vip.name: vip.id for vip in self.cluster.snapshot().vips}
        flows = {
            flow.key(ids[flow.vip.name]): flow.name for flow in self.traffic.flows.values() if flow.vip.name in ids
        }

        def text(node: Node) -> str:
            if bare[0] == "backends":
                return show.backends(node)
            if bare[0] == "vips":
                return show.vips(node)
            if "count" in bare:
                return f"{len(show.flow_table(node.maps, bare[0]))} entries"
            return show.flow_map(node, bare[0], flows, times_ns)

        return show.together({node.name: text(node) for node in self._nodes(options)})

    def do_counters(self, bare: list[str], options: dict[str, str], more: str) -> str:
        """What each LB has counted since it was last asked."""
        texts = {}
        for node in self._nodes(options):
            now = node.maps.counters.copy()
            packets = now[:, 0] - self._counted.get(node.name, np.zeros_like(now))[:, 0]
            self._counted[node.name] = now
            texts[node.name] = ", ".join(f"{v.name} {int(packets[v])}" for v in Verdict if packets[v]) or "nothing"
        return show.together(texts)

    def do_messages(self, bare: list[str], options: dict[str, str], more: str) -> str:
        """What was said since this was last asked. Bare words: only lines that hold one of them; skip: none."""
        told, self._told = self.cluster.log[self._told :], len(self.cluster.log)
        if bare == ["skip"]:
            return ""
        return "\n".join(line for line in told if not bare or any(word in line for word in bare)) or "none"

    def do_status(self, bare: list[str], options: dict[str, str], more: str) -> str:
        if bare == ["controller"]:
            return show.controller_state(self.cluster)
        names = [*self.cluster.lbs, *self.cluster.hosts]
        return show.together({node.name: show.node_state(node) for node in self._nodes(options, names)})


def _tracking(node: Node) -> int:
    """Slots that are tracking in the maps, and in the Keeper's mind."""
    in_maps = sum(int(np.count_nonzero(is_tracking(words))) for words in node.maps.slots.values())
    return max(in_maps, node.keeper.status().tracking_slots)


def _under(word: str) -> tuple[list[int], int]:
    """'1+2:pod1': under the ready pods 1 and 2 it belongs to pod 1."""
    ready, pod = word.split(":")
    return [int(number) for number in ready.split("+")], int(pod.removeprefix("pod"))


def _forged(snapshot: Snapshot, word: str) -> Snapshot:
    """A snapshot with something wrong, or just another one."""
    vip = snapshot.vips[0]
    replace = msgspec.structs.replace
    match word:
        case "next":
            return replace(snapshot, generation=snapshot.generation + 1)
        case "altered":
            return replace(snapshot, vips=(replace(vip, idle_ns=vip.idle_ns + SECOND_NS), *snapshot.vips[1:]))
        case "reused-id":
            other = replace(vip.backends[0], port=vip.backends[0].port + 1)
            return replace(snapshot, vips=(replace(vip, backends=(other, *vip.backends[1:])), *snapshot.vips[1:]))
        case "reused-vip-id":
            return replace(snapshot, vips=(replace(vip, port=vip.port + 1), *snapshot.vips[1:]))
        case "other-table":
            heavy = replace(vip.backends[0], weight=vip.backends[0].weight + 1)
            return replace(snapshot, vips=(replace(vip, backends=(heavy, *vip.backends[1:])), *snapshot.vips[1:]))
        case "other-cluster":
            return replace(snapshot, cluster=replace(snapshot.cluster, vni=snapshot.cluster.vni + 1))
    raise AssertionError(f"nobody knows how to forge {word!r}")
