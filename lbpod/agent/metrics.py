"""/metrics: what the driver and the datapath count, in Prometheus' text format, from a registry of its own.

Nothing is counted here: a collector reads the counters that exist anyway, at the moment of a scrape, so that counting
costs the hot path nothing and no number is kept twice. Metrics of the interpreter and the process come with it.
"""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lbpod.agent.attachment import PROGRAMS
from lbpod.agent.outbox import Loss
from lbpod.agent.view import BYTES_PER_VIP, View
from lbpod.core.limits import QUEUE_MAX
from lbpod.core.messages import BeatCall, RingStep
from lbpod.core.verdicts import Verdict
from lbpod.datapath.port import DatapathError


class Metrics:
    """One agent's registry."""

    def __init__(self, view: View) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_AgentCollector(view))
        ProcessCollector(registry=self._registry)

    def render(self) -> bytes:
        """The text of /metrics. Only from the loop's thread."""
        return generate_latest(self._registry)


class _AgentCollector(Collector):
    def __init__(self, view: View) -> None:
        self._view = view

    def describe(self) -> list[Metric]:
        """Nothing: names are ours alone in this registry."""
        return []

    def collect(self) -> Iterator[Metric]:
        yield from self._verdicts()
        yield from self._standing()
        yield from self._ring()
        yield from self._work()
        yield from self._sizes()
        yield from self._diagnostics()

    def _verdicts(self) -> Iterator[Metric]:
        try:
            counted = self._view.counters()
        except DatapathError:
            return
        packets = CounterMetricFamily("holdfast_packets", "Packets by what became of them.", labels=["verdict"])
        octets = CounterMetricFamily("holdfast_bytes", "Bytes of their frames as they arrived.", labels=["verdict"])
        for verdict in Verdict:
            packets.add_metric([verdict.name.lower()], int(counted[verdict, 0]))
            octets.add_metric([verdict.name.lower()], int(counted[verdict, 1]))
        yield packets
        yield octets

    def _standing(self) -> Iterator[Metric]:
        status = self._view.driver.status
        generations = GaugeMetricFamily(
            "holdfast_generation", "Generation of the snapshot, by phase.", labels=["phase"]
        )
        for phase in ("committed", "prepared", "staged"):
            generations.add_metric([phase], getattr(status, phase))
        yield generations
        yield GaugeMetricFamily("holdfast_ring_epoch", "Epoch of the ring.", status.ring_epoch)
        yield GaugeMetricFamily("holdfast_tracking_slots", "Slots that are tracking.", status.tracking_slots)
        yield GaugeMetricFamily(
            "holdfast_config_problem", "1: something is wrong, /readyz says what.", int(bool(status.problem))
        )
        if (expires_s := self._view.credentials.expires_s) is not None:
            text = "When this agent's certificate ends."
            yield GaugeMetricFamily("holdfast_certificate_expiry_timestamp_seconds", text, expires_s)
        yield GaugeMetricFamily("holdfast_ready", "1: VIP traffic may come.", int(not self._view.why_not_ready()))
        yield from self._attached()

    def _attached(self) -> Iterator[Metric]:
        attachment, interface = self._view.attachment, self._view.facts.interface
        mode = self._view.xdp()["mode"]
        xdp = GaugeMetricFamily(
            "holdfast_xdp_attached", "1, with the mode; 0: gone from the uplink.", labels=["interface", "mode"]
        )
        xdp.add_metric([interface, mode], int(mode != "none"))
        yield xdp
        tc = GaugeMetricFamily("holdfast_tc_attached", "1; 0: gone from the uplink.", labels=["interface"])
        tc.add_metric([interface], int(attachment is not None and attachment.has("hf_tc")))
        yield tc
        again = CounterMetricFamily(
            "holdfast_reattached", "Times that it was gone from the uplink and was put back.", labels=["program"]
        )
        for program in PROGRAMS:
            again.add_metric([program], 0 if attachment is None else attachment.again[program])
        yield again

    def _ring(self) -> Iterator[Metric]:
        driver, peers = self._view.driver, self._view.peers
        status, beliefs = driver.status, driver.beliefs
        yield GaugeMetricFamily("holdfast_serving", "1: in the ring that is in force here.", int(status.serving))
        yield GaugeMetricFamily("holdfast_leaving", "1: on its way out.", int(driver.leaving or status.leaving))
        steps = GaugeMetricFamily("holdfast_ring_step", "1 for the step of a ring change.", labels=["step"])
        for step in RingStep:
            steps.add_metric([step.value], int(step is status.ring_step))
        yield steps
        down = GaugeMetricFamily("holdfast_member_down", "1: this LB believes it to be down.", labels=["node"])
        for member in beliefs.others:
            down.add_metric([driver.member_name(member)], int(member in beliefs.down))
        yield down
        yield GaugeMetricFamily("holdfast_members_watched", "LBs that are asked all the time.", len(beliefs.watched))
        yield GaugeMetricFamily("holdfast_fenced", "1: out of touch, all slots track.", int(bool(beliefs.fenced_why)))
        yield CounterMetricFamily("holdfast_fences", "Times that it was.", beliefs.fenced_count)
        sent, lost = peers.asked[BeatCall.__name__], peers.failed[BeatCall.__name__]
        yield CounterMetricFamily("holdfast_beats_sent", "Beats to other LBs.", sent)
        yield CounterMetricFamily("holdfast_beats_lost", "Those that were not answered in time.", lost)
        answered = driver.beats_answered
        yield CounterMetricFamily("holdfast_beats_answered", "Beats of others that were answered.", answered)

    def _work(self) -> Iterator[Metric]:
        driver, peers = self._view.driver, self._view.peers
        for name, text, counts, label in (
            ("holdfast_events", "Events that the Keeper was given.", driver.events, "event"),
            ("holdfast_effects", "Effects that it wanted.", driver.effects, "effect"),
            ("holdfast_failed_effects", "Effects that the maps or the disk refused.", driver.failures, "effect"),
            ("holdfast_traces", "Lines of the trace, by what happened.", driver.traced, "what"),
            ("holdfast_peer_calls", "Calls to peers.", peers.asked, "call"),
            ("holdfast_peer_calls_failed", "Those that were not answered.", peers.failed, "call"),
        ):
            family = CounterMetricFamily(name, text, labels=[label])
            for kind in sorted(counts):
                family.add_metric([kind], counts[kind])
            yield family
        refused = CounterMetricFamily("holdfast_calls_refused", "Calls of others, refused.", labels=["path", "status"])
        for (path, status), count in sorted(self._view.refused.items()):
            refused.add_metric([path, str(status)], count)
        yield refused
        strangers = self._view.credentials.strangers
        yield CounterMetricFamily("holdfast_strangers", "Handshakes without a certificate of this cluster.", strangers)
        yield CounterMetricFamily("holdfast_pending_flows", "Flows drained to be asked about.", driver.drained_flows)
        yield CounterMetricFamily(
            "holdfast_resolved_flows", "Flows whose answer went into the cache.", driver.resolved_flows
        )
        yield CounterMetricFamily(
            "holdfast_looked_up_flows", "Flows whose records were looked up.", driver.looked_up_flows
        )
        yield CounterMetricFamily(
            "holdfast_swept_flows",
            "Entries of translated flows deleted: the flow was over, or is in the other map.",
            driver.swept_flows,
        )
        yield CounterMetricFamily("holdfast_pending_drains", "Looks into the pending map.", driver.drains)
        yield GaugeMetricFamily("holdfast_queue", "Events that wait.", driver.queue_count)
        yield GaugeMetricFamily("holdfast_queue_max", "Calls beyond this get 503.", QUEUE_MAX)
        yield GaugeMetricFamily("holdfast_peer_calls_under_way", "Calls to peers that wait.", peers.under_way_count)

    def _sizes(self) -> Iterator[Metric]:
        maxima = GaugeMetricFamily("holdfast_map_entries_max", "Entries a map has room for.", labels=["map"])
        for name, size in sorted(self._view.facts.maps.items()):
            maxima.add_metric([name], size)
        yield maxima
        vips = self._view.vip_count()
        yield GaugeMetricFamily("holdfast_vips", "VIPs that have arrays.", vips)
        yield GaugeMetricFamily("holdfast_vip_bytes", "Bytes of one VIP's arrays.", BYTES_PER_VIP)

    def _diagnostics(self) -> Iterator[Metric]:
        standing = self._view.diagnostics()
        if standing is None:
            return
        yield CounterMetricFamily("holdfast_diagnostics_written", "Entries that Redis has.", standing.written)
        dropped = CounterMetricFamily("holdfast_diagnostics_dropped", "Entries that it has not.", labels=["why"])
        for why in Loss:
            dropped.add_metric([why.value], standing.dropped.get(why, 0))
        yield dropped
        yield GaugeMetricFamily("holdfast_diagnostics_waiting", "Entries that wait to be written.", standing.waiting)
        trouble = int(bool(standing.trouble))
        yield GaugeMetricFamily("holdfast_diagnostics_trouble", "1: /v1/state says what is in the way.", trouble)
