"""Every bound of the lab, by name.

Why not in ``lbpod.core.limits``: those are promises of the product (sizes that C, the wire and every load balancer
must agree on). The lab is a workshop beside it; nothing here is seen by a packet of a real cluster, and a change here
can never make two load balancers disagree.
"""

from __future__ import annotations

from typing import Final

MS_NS: Final = 1_000_000
SECOND_NS: Final = 1_000_000_000

CLIENTS_MAX: Final = 200
"""Third byte of 10.76.c.0/24."""

NODES_MAX: Final = 200
"""Third byte of 10.77.n.0/24 and of 10.78.n.0/24."""

PODS_PER_NODE_MAX: Final = 250
"""Last byte of 10.78.n.k; .0 and the top few stay free."""

UNDERLAY_MTU: Final = 1600
CLIENT_MTU: Final = 1500
"""Pods have it too, as pods on an overlay network do."""

XDP_VETH_MTU_MAX: Final = 3498
"""Native XDP on veth wants a frame inside one page, with head room and skb_shared_info beside it (x86-64, 4 KiB)."""

NEXTHOP_WEIGHT_MAX: Final = 256
"""rtnh_hops is one byte and means weight - 1."""

RUN_SECONDS_MAX: Final = 600
STOP_WAIT_NS: Final = 3 * SECOND_NS
"""From SIGTERM to SIGKILL."""

KILL_WAIT_NS: Final = 5 * SECOND_NS
"""From SIGKILL until a process must be gone."""

LISTEN_WAIT_NS: Final = 10 * SECOND_NS
LOCK_WAIT_NS: Final = 30 * SECOND_NS
"""For another run that is cleaning up at this moment."""

POLL_NS: Final = 5 * MS_NS

PROGRAMS_MAX: Final = 4096
"""Programs started by one lab, ended ones included."""

CAPTURE_FRAMES_MAX: Final = 100_000
CAPTURE_BYTES_MAX: Final = 64 * 1024 * 1024
CAPTURE_FRAME_BYTES: Final = 65_536
"""Longest frame kept: GRO joins TCP segments to frames far above the MTU."""

WRK_FILE_BYTES: Final = 1024 * 1024
"""The static file that nginx serves as /file."""

CHECK_TIMEOUT_NS: Final = 5 * SECOND_NS
"""A request without an answer for so long is broken."""

CHECK_GRACE_NS: Final = SECOND_NS // 2
"""A failure is judged so long after it happened: the parent's word that a backend is gone may come a little later."""

CHECK_LOST_WITH_NS: Final = 4 * SECOND_NS
"""A question asked so long before its backend went may still be lost with it: the outage of a load balancer held it up,
and the retransmission that would have got through came too late. TCP sends again after 0.2, 0.6, 1.4 and 3 s (a SYN
after 1 and 3 s), and 3.5 s is the most that a loss has held up a connection with such pauses (docs/chaos.md). What has
waited for longer than that had broken before, whatever became of its backend."""

CHECK_UNANSWERED_NS: Final = 2 * SECOND_NS
"""A question open for so long when the checker is stopped is told: it may be one that would never be answered."""

CHECK_LONG_MAX: Final = 20_000
CHECK_SHORT_RATE_MAX: Final = 5_000
CHECK_SHORT_IN_FLIGHT_MAX: Final = 2_000
"""Short connections not yet answered; above it new ones are skipped and counted."""

CHECK_FAILURES_TOLD_MAX: Final = 200
"""Failures of each verdict reported one by one, unless told otherwise; later ones are only counted."""

CHECK_HELD_MAX: Final = 65_536
"""Requests that were held up, kept for the next marks."""

CHECK_MARKS_MAX: Final = 64
"""Marks that wait to be reckoned."""

CHECK_REOPEN_NS: Final = 100 * MS_NS
CHECK_REOPEN_MAX_NS: Final = 2 * SECOND_NS
"""Pause before a broken long-lived flow is opened again: doubles up to this while it cannot be opened."""

CHECK_PORT_REST_NS: Final = 65 * SECOND_NS
"""From the end of a connection until its port is used again: longer than the kernel's TIME_WAIT."""
CHECK_PORT_TRIES_MAX: Final = 3
"""Ports that are tried for one connection, where others use them."""

CHECK_BACKEND_NAME_MAX: Final = 64
CHECK_ANSWER_BYTES_MAX: Final = 16_384
CHECK_UDP_LOSSES_MAX: Final = 3
"""Unanswered datagrams in a row that make a UDP flow broken; fewer are only counted as lost."""

CHECK_UDP_GIVEN_UP_MAX: Final = 16
"""Requests given up that a UDP flow remembers, so that a late answer is not taken for a wrong one."""

assert XDP_VETH_MTU_MAX >= UNDERLAY_MTU >= CLIENT_MTU + 60, "an encapsulated full-size packet must fit the underlay"
assert CHECK_GRACE_NS < CHECK_LOST_WITH_NS < CHECK_TIMEOUT_NS
assert CHECK_UNANSWERED_NS < CHECK_TIMEOUT_NS
assert CHECK_REOPEN_NS <= CHECK_REOPEN_MAX_NS
assert CHECK_UDP_LOSSES_MAX <= CHECK_UDP_GIVEN_UP_MAX
