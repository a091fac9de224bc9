"""Every bound of Holdfast, in one place, with the relations between them asserted.

Why one file: a bound that lives beside its use is a bound that nobody can compare with the next one. The C program has
the same names in ``lbpod/bpf/limits.h`` (prefixed ``HF_``); a tidy test keeps the two equal. Times are nanoseconds,
sizes are bytes, counts are plain integers; the last part of each name says which.
"""

from typing import Final

# --- Tables -----------------------------------------------------------------------------------------------------------
SLOT_COUNT: Final = 65_536
"""Slots of one VIP's lookup table: a power of two, for a slot is the top bits of a hash."""

VIPS_MAX: Final = 4_096
"""VIPs (address + port + protocol) of one cluster; ids are 1..VIPS_MAX-1."""

VIP_INDEX_COUNT: Final = 28_672
"""Places of the VIP index: the first VIPS_MAX by hash, the rest for chained collisions. A VIP takes two entries at most
(its address has one for ICMP). Two snapshots may be in the index at one time (committed and prepared), and the places
of a third (prepared before, and replaced) may rest for readers inside."""

VIP_CHAIN_MAX: Final = 8
"""Entries that the fast path visits for one VIP look-up at most (a longer chain is refused at configuration time)."""

BACKENDS_MAX: Final = 65_536
"""Backends of one cluster at one time, over all VIPs."""

BACKEND_IDS_MAX: Final = 131_072
"""Size of the id space. Twice BACKENDS_MAX, so that an id rests for many changes before it is used again."""

NODES_MAX: Final = 4_096
"""Nodes (hosts of backends or of LBs)."""

MEMBERS_MAX: Final = 1_024
"""Ring members (LBs); ids are 0..MEMBERS_MAX-1."""

MEMBER_NONE: Final = 0xFFFF
"""'No member' in the ownership arrays."""

REPLICAS_MAX: Final = 6
"""Replicas of one slot: owner and backup in each of own, next and prev."""

RELAY_HOPS_MAX: Final = 3
"""Times that a packet may be relayed before it is decided where it is."""

# --- Flow maps --------------------------------------------------------------------------------------------------------
CACHE_MAX: Final = 262_144
"""Leases that one LB holds about flows of slots that it does not own (LRU)."""

RECORDS_MAX: Final = 1_048_576
"""Authoritative flow records at one replica (hash; never evicts)."""

EMBRYONIC_MAX: Final = 65_536
"""Records made by a SYN alone (LRU)."""

PENDING_MAX: Final = 65_536
"""Flows waiting to be asked about (LRU)."""

NAT_MAX: Final = 1_048_576
UNASSURED_MAX: Final = 524_288
"""Flows that a host agent translates (LRU)."""

MAP_ENTRIES_MAX: Final = 1 << 26
"""Entries that a hash map may be given by a setting; kernels refuse some tens of millions more."""

BATCH_MAX: Final = 4_096
"""Flows in one resolve request, and in one batched system call."""

LOOKUP_BATCH_MAX: Final = 1_024
"""Keys that the look-up program walks in one call."""

# --- Wire -------------------------------------------------------------------------------------------------------------
GENEVE_PORT: Final = 6_081
VNI_MAX: Final = 0xFFFFFF
BODY_BYTES_MAX: Final = 32 * 1024 * 1024
"""Largest HTTP body accepted (a snapshot of BACKENDS_MAX backends fits)."""

FORWARD_OVERHEAD_BYTES: Final = 60
"""Outer IPv4 20 + UDP 8 + Geneve 8 + FORWARD option 24."""

RELAY_OVERHEAD_BYTES: Final = 48
"""Outer IPv4 20 + UDP 8 + Geneve 8 + RELAY option 12."""

CHAIN_OVERHEAD_BYTES: Final = 64
"""Outer IPv4 20 + UDP 8 + Geneve 8 + CHAIN option 28."""

UNDERLAY_EXTRA_BYTES: Final = 64
"""How much larger the underlay's MTU has to be than the clients' for packets of full size to pass."""

# --- Times ------------------------------------------------------------------------------------------------------------
MARGIN_NS: Final = 1_000_000_000
"""Longest life of a packet in the cluster (DESIGN: section 3)."""

LEASE_DIVISOR: Final = 4
"""A lease is idle / LEASE_DIVISOR ..."""

LEASE_NS_MAX: Final = 30_000_000_000
"""... but never longer than this: below the 60 s of TIME_WAIT, so that a five-tuple used again cannot meet an answer
that was given about its predecessor."""

IDLE_TIMEOUT_SECONDS_DEFAULT: Final = 3_600
UDP_IDLE_TIMEOUT_SECONDS_DEFAULT: Final = 60
IDLE_TIMEOUT_SECONDS_MIN: Final = 4
IDLE_TIMEOUT_SECONDS_MAX: Final = 7 * 24 * 3_600
DRAIN_TIMEOUT_SECONDS_DEFAULT: Final = 3_600
CHANGE_GATHER_NS: Final = 5_000_000
"""What arrives within this time of the first event becomes part of the same change."""

PEER_TIMEOUT_NS: Final = 2_000_000_000
"""A call to a peer that is not answered within this time has failed."""

QUESTION_AGE_NS_MAX: Final = MARGIN_NS // 2
"""A backup acts on a question of the owner (settle, forget) that is no older: the margin in the window pays for it."""

RETRY_NS: Final = 500_000_000
"""Pause before a failed effect is tried again."""

TICK_NS: Final = 100_000_000
"""The shell sends a Tick event this often; an agent at rest with its beats (``watch.pause_ns``)."""

FORGET_SCAN_NS: Final = 10_000_000_000
"""The owner looks for records to forget this often."""

EARLY_ASK_NS: Final = 500_000_000
"""Pause between two questions to host agents about the same slots."""

OUTSTANDING_MAX: Final = 64
"""Requests that one Keeper may have under way to one peer."""

QUEUE_MAX: Final = 1_024
"""Events waiting in a shell's queue; beyond it HTTP answers 503 and the pending map keeps its flows."""

EARLIER_MAX: Final = 4
"""Backends besides base and current that a tracking slot remembers for its flows; beyond, any of the VIP's may be."""

NAT_DUMP_AGE_NS: Final = 200_000_000
"""A host agent answers from a list of its translated flows that was begun no longer than this before the question."""

NAT_SWEEP_NS: Final = 30_000_000_000
"""A host agent looks for translated flows that are over this often ..."""

NAT_SWEEP_NS_MIN: Final = 5_000_000_000
"""... and the sooner, the fuller the map, but never sooner than this."""

NAT_CLOSED_NS: Final = 60_000_000_000
"""A closed flow (RST, or both FINs) is kept for so long: its pod's TIME_WAIT is over by then."""

NAT_SILENT_MARGIN_NS: Final = 60_000_000_000
"""A flow that has not been closed is kept for so much longer than its VIP's idle timeout."""

NAT_UNKNOWN_IDLE_NS: Final = 3_600_000_000_000
"""The least idle timeout that flows of a VIP that is not known (any more) are credited with."""

NAT_TAKEN_NS: Final = 3_600_000_000_000
"""A flow that has not been closed keeps its place at the pod against those of other VIPs for so long after its last
packet: the default idle timeout, until which flows are promised to live. The programs do not know that of a VIP; where
it is shorter, the agent sweeps the entry sooner ..."""

NAT_TAKEN_BRIEFLY_NS: Final = 60_000_000_000
"""... and for so long where it is UDP's, whose end nobody can see, or its client has sent nothing but a SYN."""

NAT_HALF_OPEN_NS: Final = 120_000_000_000
"""What began with a SYN, after which its client has sent nothing else, is over when it has been silent for so long: a
client sends its SYN again after 64 seconds at most, a server its SYN-ACK after 32 (Linux, by default)."""

EARLY_FRESH_NS: Final = 1_000_000_000
"""What host agents said may be used for an early settle for so long, counted from the question."""

EARLY_AFTER_NS: Final = MARGIN_NS + EARLY_FRESH_NS + QUESTION_AGE_NS_MAX + NAT_DUMP_AGE_NS
"""A backup agrees to an early settle only where it is asked later than this after its own commit: however old the host
agents' answers are when it hears of them, they looked later than the margin after it."""

EARLY_NODES_MAX: Final = 256
"""Host agents that an owner asks about one VIP at one time; the others have their turn later."""

SETTLE_PAUSE_NS_MAX: Final = 8_000_000_000
"""The pause between two attempts to settle slots of one VIP doubles up to this while none succeeds."""

SETTLE_VIPS_MAX: Final = 8
"""Tracking VIPs whose slots one tick looks at, at some milliseconds each where all of them track."""

STEADY_ASK_NS: Final = 5_000_000_000
"""Pause before an LB asks the owner whether slots that it still tracks have settled without it."""

PURGE_NS: Final = 1_000_000_000
"""Pause between two lists of all records made to drop those of settled slots."""

WEIGHT_MAX: Final = 1_000
"""Largest weight of a backend."""

TABLE_CANDIDATES_MAX: Final = 16
"""Nearest backends that a table's builder keeps for each slot, 8 bytes each: 8.5 MiB per VIP in all."""

TABLE_INCREMENTAL_MIN: Final = 64
"""Backends from which a builder keeps anything at all; below, a table built anew is as quick."""

TABLE_FEW_MAX: Final = 32
"""Up to so many backends a table is matched on all pairs of slot and backend: 512 KiB a backend while it is built."""

TABLE_COLUMNS_MAX: Final = 32
"""Backends whose scores are kept for the next table of few, 512 KiB each: 16 MiB for all VIPs together."""

QUICK_VIPS_MAX: Final = 8
"""A change of so many VIPs, those that still track included, takes an LB no longer than answers may wait: 20 ms."""

COLUMNS_KEPT_NS: Final = 10_000_000_000
"""An LB lets these scores go when it has built no table for so long."""

# --- At rest ---------------------------------------------------------------------------------------------------------
REST_NS: Final = 1_000_000_000
"""An LB looks this often for what it may keep in less memory ..."""

FOLD_VIPS_MAX: Final = 16
"""... and then folds the slots of so many VIPs at most, at half a millisecond each."""

INNER_MAPPED_MAX: Final = 8
"""Arrays of VIPs that an agent has mapped at one time, 512 KiB each; there are two for each VIP."""

# --- Ring changes and failover ---------------------------------------------------------------------------------------
BEAT_NS: Final = 200_000_000
"""An LB asks those that it watches whether they are there this often."""

BEAT_DOWN_NS: Final = 500_000_000
"""A member that has been asked and not heard for so long is believed to be down: a lost beat alone is not enough, and
those of both sides count. A client whose packet went to it sends again after 0.2, 0.6 and 1.4 s (RFC 6298's doubling,
from Linux's smallest pause): the belief is there for the second of these, or soon after it."""

BEATS_BOTH_ASK: Final = 16
"""Of two that watch each other one asks for both at rest; the other asks, too, once in so many beats."""

AWAY_NS: Final = 4_000_000_000
"""So long after it was heard a member counts as heard whose machine refuses connections to its agent (and is down
BEAT_DOWN_NS later): the fast path goes on without it, and a start takes a second or two."""

WATCH_MAX: Final = 8
"""Members that one LB watches; of the others it hears from these."""

BEATS_OPEN_MAX: Final = PEER_TIMEOUT_NS // BEAT_NS
"""Beats of one LB to one other that may wait for an answer: none is left out where a shell takes so long to give up."""

BEATS_MAX: Final = 2 * WATCH_MAX * BEATS_OPEN_MAX
"""Beats of one LB that may wait for an answer in all: to those that it watches, and as many that others suspect. They
come on top of QUEUE_MAX, so that neither other questions nor beats keep each other from being asked."""

ALONE_NS: Final = 1_500_000_000
"""An LB that hears no other, nor the controller for so long, takes itself to be cut off: it asks to be told what it has
missed before it serves again."""

FENCE_NS: Final = 3_000_000_000
"""An LB that has heard neither the controller nor a peer for so long tracks all its slots."""

LEFT_NS: Final = 6_000_000_000
"""One that has switched to a ring without itself, and does not answer for so long, is not waited for any more: it has
nothing left to do but to drop what it knows of the ring before. A router notices a silent /readyz sooner."""

LOST_NS: Final = 10_000_000_000
"""A ring member that has not answered the controller for so long is taken out of the ring. An agent that restarts is
back by then (its start takes a second or two), and one slow call is no loss."""

OWED_NS: Final = 3_000_000_000
"""A backup that nobody has heard for so long decides no more about slots whose settling it owes an answer to: long
enough for an agent to restart, short enough for a client that sends again."""

OWED_HOLD_NS: Final = 3_000_000_000
"""How long a member that was cut off waits for what it has missed because an answer to a settle was lost between two:
until the question has failed, the margin after it, and an answer. What an LB that has fallen behind cannot answer must
not keep it from serving for longer."""

JOIN_RETRY_NS: Final = 30_000_000_000
"""An LB that refuses to join the ring is not asked to again before this. Where a member refuses a change of it, nobody
joins or leaves for so long but the lost."""

HANDOVER_RECORDS_MAX: Final = 16_384
"""Records in one page of a handover (640 KiB)."""

HANDOVER_PAGES_MAX: Final = 4
"""Pages that one LB has under way to one other."""

HANDOVER_VIPS_MAX: Final = 16
"""Steady VIPs that one page of a handover tells of: its receiver walks over the slots of each, some milliseconds, and
has to have answered within PEER_TIMEOUT_NS, other pages that wait there included."""

HANDOVER_HOLD_NS: Final = 2_000_000_000
"""A call to hand over is answered when it is done, or after so long with how far it has got."""

LEAVE_NS_MAX: Final = 20_000_000_000
"""An LB that wants to leave waits for so long to be taken out of the ring, then it ends all the same."""

FAREWELL_NS: Final = 300_000_000_000
"""For so long after it was told that Holdfast is being removed, the end of an agent is that of all that it has put on
its node. Longer than helm and kubelet take to end it; an uninstallation that was given up is forgotten after it."""

WITHDRAW_SECONDS_MAX: Final = 120
"""Longest time that an agent may be told to wait between its saying 503 and its asking to leave."""

# --- Agent ------------------------------------------------------------------------------------------------------------
PEER_CONNECTIONS_MAX: Final = 4
"""Keep-alive connections of one agent to one peer; calls beyond wait for one of them, within their own time."""

BEAT_CONNECTIONS_MAX: Final = 2
"""The same for beats, apart from all other calls. Two: one may be stuck."""

BEAT_LINE_NS: Final = 10_000_000_000
"""A connection for beats on which nobody asks for so long is closed."""

BEAT_BYTES_MAX: Final = 4 * 1024
"""Largest beat: all members are found to be silent."""

SENTENCE_BYTES_MAX: Final = 500
"""How much of a refusal's text is passed on."""

PEER_BODY_BYTES_MAX: Final = 2 * 1024 * 1024
"""Largest body of a call other than a snapshot: a page of a handover is 1.4 MiB at most."""

TRACE_LINES_MAX: Final = 1_024
"""Trace lines that an agent keeps for people."""

DRAIN_PAUSE_NS_MIN: Final = 2_000_000
"""Pause between two looks into `pending` while many flows are found there ..."""

DRAIN_PAUSE_NS_MAX: Final = 50_000_000
"""... and the longest one while few or none are: a look at an empty map costs 50 microseconds, and
waking up for it 500."""

DRAIN_REST_NS: Final = 1_000_000_000
"""The pause where no slot tracks: nothing is put into the map then, only what came just before is still in it."""

DRAIN_WORTH: Final = 64
"""So many flows are many. Fewer are no reason to look again soon: a call to an owner costs each side as much for one
flow as for fifty, and the packets of who waits are relayed."""

EVENTS_PER_TURN_MAX: Final = 256
"""Events that an agent handles before it looks at its clock and its sockets again ..."""

TURN_NS: Final = 50_000_000
"""... and so long at most, where it can stop: between two events, and between two VIPs of many that change."""

BREATH_ROUNDS: Final = 4
"""In the middle of these it lets its sockets have so many turns: a message is read, understood, answered and sent."""

CASCADE_MAX: Final = 4_096
"""Events that may follow one from the other without the world's doing; more would be a Keeper that asks in circles."""

NEXT_HOP_GRACE_NS: Final = 10_000_000_000
"""How long the next hop that an earlier agent wrote is believed, while this one does not know one yet."""

LOOK_AFTER_NS: Final = 5_000_000_000
"""What changes seldom and tells nobody (certificates on disk, what the kernel lacks) is looked at this often."""

SYN_RETRY_NS: Final = 1_000_000_000
"""The kernel sends a SYN, or a question for a next hop's link address, again after this time (RFC 6298, RFC 1122)."""

ENDED_NS: Final = 10_000_000_000
"""What an owner remembers of flows that have ended with their backend: nobody gets a lease for their last packets.
Longer than the pauses between a client's last words."""

CHAIN_SURE_NS: Final = 900_000_000
"""For so long after a SYN, an answer from its client can only be to that: the SYN has come through the chain, and its
record is right. Later the client has sent another one, and who knows where that has begun the flow."""

REUSE_NS: Final = 1_500_000_000
"""A first packet whose five-tuple another flow had, with a record that a settle is about to void, is dropped where the
record was not seen for so long: once, for the client sends it again after SYN_RETRY_NS."""

CHAIN_AGAIN_MAX: Final = 3
"""Packets of a flow without a first packet (UDP, ClientIP) that travel the chain after the one that was recorded. A SYN
that is lost there is sent again; nobody can tell whether such a packet was, and a replica that has missed all of them
takes the flow for new: once the slot is rebased, to the new backend."""

READY_WAIT_NS: Final = 1_500_000_000
"""How long an agent in doubt holds its answer to /readyz back, so that other LBs can tell what is in force."""

CLOSE_NS_MAX: Final = 3_000_000_000
"""How long a server that stops waits for calls under way."""

# --- Diagnostics (Redis) ----------------------------------------------------------------------------------------------
DIAGNOSTICS_QUEUE_MAX: Final = 4_096
"""Entries that wait to be written (half a KiB each, 2 KiB at most); beyond, the oldest goes."""

DIAGNOSTICS_BATCH_MAX: Final = 256
"""Entries in one round trip."""

DIAGNOSTICS_PAUSE_NS: Final = 200_000_000
"""Pause between two looks into the outbox."""

DIAGNOSTICS_TIMEOUT_NS: Final = 1_000_000_000
"""Redis answers, or takes a connection, within this time, or it is slow."""

DIAGNOSTICS_RETRY_NS_MAX: Final = 15_000_000_000
"""The pause after a failure doubles from RETRY_NS up to this."""

DIAGNOSTICS_CLOSE_NS_MAX: Final = 500_000_000
"""How long the end of an agent waits for the last entries, where Redis takes them at all."""

DIAGNOSTICS_STREAM_MAX: Final = 5_000
"""Entries of one stream that Redis keeps (and a few more: it trims by whole blocks)."""

DIAGNOSTICS_KEEP_SECONDS: Final = 7 * 24 * 3_600
"""A stream goes so long after its last entry."""

DIAGNOSTICS_STATE_SECONDS: Final = 20
"""An LB's state goes so long after it was last written."""

DIAGNOSTICS_QUESTIONS_MAX: Final = 4_096
"""Questions to peers that are kept to be matched with their answers."""

SLOT_ENTRIES_MAX: Final = 64
"""VIPs that have an entry of their own for what one event has written; the others share one."""

SLOTS_SHOWN_MAX: Final = 8
"""Slots that such an entry shows."""

DECISION_ENTRIES_PER_SECOND_MAX: Final = 20
"""Decisions on single flows that are shown."""

ANSWER_ENTRIES_PER_SECOND_MAX: Final = 20
"""Wrong, late and missing answers that have an entry; the others are counted as dropped."""

# --- Datapath ---------------------------------------------------------------------------------------------------------
KERNEL_LOG_LINES_MAX: Final = 20
"""Last lines of libbpf's and the verifier's log that an error message quotes."""

KERNEL_LOG_BYTES_MAX: Final = 1 << 20
"""Largest single message of libbpf that is read (the verifier's log comes as one)."""

DUMP_CHUNK: Final = 16_384
"""Entries that one batched system call takes out of a map."""

KERNEL_BUSY_RETRIES_MAX: Final = 8
"""Times that a batched call is repeated because another CPU held the bucket."""

NETLINK_TIMEOUT_NS: Final = 2_000_000_000
"""The kernel answers a netlink request at once; beyond this it has not."""

NETLINK_RETRIES_MAX: Final = 5
"""Times that a table is read again because it changed meanwhile."""

NETLINK_DATAGRAMS_MAX: Final = 256
"""Netlink datagrams that are read in one go, so that a storm of changes leaves time for everything else."""

NEIGHBOUR_REFRESH_NS: Final = 10_000_000_000
"""Routes are looked up again, and neighbours confirmed where the kernel does not do it by itself, this often."""

REROUTE_PAUSE_NS: Final = 100_000_000
"""Pause between two look-ups of all routes because of events, at least: each pod that starts has some to tell."""

REROUTE_REST: Final = 3
"""That pause is so many times as long as the look-up took, where this is more: a quarter of the loop's time at most."""

PUBLISH_BATCH_MAX: Final = 256
"""VIPs that are made visible to the fast path in one system call; each takes a file descriptor meanwhile."""

NAT_FULL_RESERVE: Final = 256
"""Free entries per CPU below which an LRU map may already evict: its free list is kept in stocks of 128 per CPU."""

# --- Controller -------------------------------------------------------------------------------------------------------
GENERATION_MAX: Final = 0xFFFF_FFFF
"""Generations are 32 bits wide in the tunnel's options; at one change a second they last 136 years."""

NAME_BYTES_MAX: Final = 253
"""Names of nodes, and each part of a VIP's name (a DNS name, as in Kubernetes)."""

DRAIN_TIMEOUT_SECONDS_MAX: Final = 7 * 24 * 3_600

BUILDERS_MAX: Final = 32
"""Table builders that a Planner keeps (8.5 MiB each); the table of a VIP beyond them is built anew when it changes."""

PORTION_COST_MAX: Final = 640
"""Backends whose VIPs one generation changes: tables of a second or so, for which every other change waits."""

PORTION_VIP_COST: Final = 4
"""What a VIP costs beside its backends."""

RETRY_NS_MAX: Final = 1_000_000_000
"""The pause after a failed call doubles from RETRY_NS up to this: an agent that restarts is away for a second or two,
and changes wait for it."""

REFUSED_RETRY_NS: Final = 5_000_000_000
"""Pause after a refusal (4xx): asking again seldom helps, but what was wrong may have been put right."""

PROBE_NS: Final = 1_000_000_000
"""A ring member that has nothing to do is asked for its state this often: one that restarted empty is found by it."""

FOREIGN_WAIT_NS: Final = 3_000_000_000
"""Where a node that is no ring member has what another controller has made, members are listened to for so long first:
if that controller lives, they will have it, too."""

HOST_PROBE_NS: Final = 10_000_000_000
"""The same for a node that runs no LB."""

START_WAIT_NS: Final = 5_000_000_000
"""How long a Planner that starts waits for ring members that do not say what they know."""

HOST_WAIT_NS: Final = 3_000_000_000
"""How long a change waits for nodes that run no LB."""

CONTROL_TIMEOUT_NS: Final = 8_000_000_000
"""A controller's call may take longer than a peer's: an LB builds the tables of all VIPs that changed."""

CONFIG_BYTES_MAX: Final = 32 * 1024 * 1024
"""Largest configuration file that is read."""

CONFIG_NESTING_MAX: Final = 32
"""Levels of lists and mappings in a configuration file; what is meant needs eight."""

CONFIG_LOOK_NS: Final = 1_000_000_000
"""A configuration file is looked at this often even if no edit was noticed (some file systems do not tell)."""

CONFIG_QUIET_NS: Final = 1_000_000_000
"""A configuration file that is written in place is used once it has been the same for so long: it may be half
written."""

CONFIG_REPLACED_QUIET_NS: Final = 100_000_000
"""The same for a file that another one was put in place of, which is whole where that was a rename. Not zero, for some
editors move the old file away and write a new one."""

CALLS_MAX: Final = 64
"""Places for a controller's calls to LBs, and as many for those to other nodes: more wait for their turn."""

CALL_PLACE_NS: Final = 250_000_000
"""A call that takes longer goes on without a place: whoever lives has mostly answered by then, and the living are not
to wait for the others' timeouts."""

DARK_CALLS_MAX: Final = 64
"""Calls to nodes without an LB that did not answer the last one; each keeps its place until it ends. By it, nodes that
are away cost a controller no more than so many calls in PEER_TIMEOUT_NS, however many they are."""

CALL_LOST_NS: Final = 10_000_000_000
"""A call of the Planner that its shell has not answered within this time counts as failed."""

# --- Kubernetes operator ----------------------------------------------------------------------------------------------
AGENT_GRACE_NS: Final = 15_000_000_000
"""A node whose agent's pod is gone counts as one with an agent for so long: pods are replaced within seconds, and who
is really lost the Planner finds out by itself."""

API_TIMEOUT_NS: Final = 10_000_000_000
"""A call to the Kubernetes API that is not answered within this time has failed."""

API_RETRY_NS: Final = 1_000_000_000
"""Pause before such a call is tried again."""

API_CALLS_MAX: Final = 8
"""Statuses that are written side by side."""

OBSERVE_REST: Final = 3
"""The operator rests that many times as long as its last look at the cluster took, API_RETRY_NS at most."""

STATUS_GATHER_NS: Final = 200_000_000
"""Statuses are looked at so long after something has changed: a change of the backends is in force by then, and one
write says all of it."""

TRACKING_SHOWN_NS: Final = 10_000_000_000
"""How many slots track is written into statuses this often at most ..."""

TRACKING_WRITE_NS: Final = 100_000_000
"""... and later the more of them it changes: when the ring changes, all slots of all VIPs track for a while."""

SWEEP_NS: Final = 60_000_000_000
"""What is known of the cluster is compared with what the API lists this often: a watch that was interrupted does not
tell of what was deleted meanwhile."""

SWEEP_LATE_MAX: Final = 10
"""An object that a watch has not told of in so many looks, though it tells of others, it never will."""

SWEEP_START_LOOKS: Final = 10
"""So many looks of an operator that starts count as one: they are API_RETRY_NS apart, and a watch that begins on a busy
machine has told nothing for some seconds."""

SWEEP_PAGE: Final = 500
"""Objects that one call of such a comparison lists."""

PERSIST_TRIES_MAX: Final = 3
"""Times that the generation is read and written anew because somebody else wrote in between."""

LEASE_HOLD_NS: Final = 15_000_000_000
"""An operator that has not renewed its Lease for so long does not hold it any more."""

LEASE_RENEW_NS: Final = 4_000_000_000
"""It is renewed, or tried for, this often."""

MINTED_NODES_MAX: Final = 800
"""Nodes that certificates are made for: with theirs, a Secret has nearly the mebibyte that it may have."""

CERTIFICATES_LOOK_NS: Final = 3_600_000_000_000
"""Certificates are looked at this often, even where no node has come or gone."""

ISSUED_LOOK_NS: Final = 30_000_000_000
"""Certificates that somebody else issues and renews are looked at this often."""

ISSUED_TOLD_NS: Final = 20_000_000_000
"""What is wrong with them for so long is told as an event; before that, an issuer may just be about to begin."""

CA_SPREAD_NS: Final = 300_000_000_000
"""A CA that is new has reached every agent by then (kubelet brings a Secret within two minutes): what it signed is not
shown before, and what it replaces is trusted for as long."""

SECRET_BYTES_MAX: Final = 1_000_000
"""What a Secret of certificates may hold: a little less than the API allows."""

# --- Certificates -----------------------------------------------------------------------------------------------------
CA_DAYS: Final = 3_650
CERTIFICATE_DAYS: Final = 730
CERTIFICATE_RENEW_DAYS: Final = 60
"""A certificate with less than this left is made anew when `holdfast certs` runs again."""

CERTIFICATE_WARN_DAYS: Final = 30
"""An agent or controller whose own certificate ends within so many days says so, for it should have been renewed."""

CERTIFICATE_WARN_PART: Final = 10
"""The same where less than this part of its life is left, for certificates that live for days only."""

CERTIFICATE_WARN_NS: Final = 86_400_000_000_000
"""It says so this often."""

CLOCK_SKEW_DAYS: Final = 1
"""A new certificate is valid from this long ago, for machines whose clocks are behind."""


def check() -> None:
    """Assert how the bounds relate."""
    assert SLOT_COUNT.bit_count() == 1 and SLOT_COUNT <= 1 << 16, "a slot is the top bits of a hash, 16 at most"
    assert VIPS_MAX.bit_count() == 1, "a place in the VIP index is the top bits of a hash"
    assert VIP_INDEX_COUNT >= VIPS_MAX + 3 * 2 * (VIPS_MAX - 1), "whatever collides has a place, and so has what rests"
    assert MARGIN_NS <= NAT_CLOSED_NS and MARGIN_NS <= NAT_SILENT_MARGIN_NS, (
        "nothing is swept that early settle calls live"
    )
    assert TICK_NS < NAT_SWEEP_NS_MIN <= NAT_SWEEP_NS, "a sweep takes a slice each tick"
    assert NAT_TAKEN_NS == IDLE_TIMEOUT_SECONDS_DEFAULT * 1_000_000_000, "what is promised by default is kept"
    assert NAT_HALF_OPEN_NS > NAT_TAKEN_BRIEFLY_NS == UDP_IDLE_TIMEOUT_SECONDS_DEFAULT * 1_000_000_000
    assert ENDED_NS + FORGET_SCAN_NS <= LEASE_NS_MAX, (
        "an id rests until the last lease is over: until then its records are"
    )
    assert BACKEND_IDS_MAX >= 2 * BACKENDS_MAX, "an id must rest before it is used again"
    assert BACKEND_IDS_MAX < 1 << 24, "a slot holds its current backend in 24 bits"
    assert MEMBERS_MAX <= MEMBER_NONE, "member ids must differ from MEMBER_NONE"
    assert LOOKUP_BATCH_MAX <= BATCH_MAX <= PENDING_MAX, "a batch must fit where it comes from"
    assert EMBRYONIC_MAX <= RECORDS_MAX, "every embryonic record must have room to be promoted"
    assert IDLE_TIMEOUT_SECONDS_MIN * 1_000_000_000 // LEASE_DIVISOR >= MARGIN_NS, "a lease is at least the margin"
    assert max(FORWARD_OVERHEAD_BYTES, RELAY_OVERHEAD_BYTES, CHAIN_OVERHEAD_BYTES) <= UNDERLAY_EXTRA_BYTES
    assert DIAGNOSTICS_BATCH_MAX <= DIAGNOSTICS_QUEUE_MAX <= DIAGNOSTICS_STREAM_MAX, "what waited finds room"
    assert CHAIN_SURE_NS < SYN_RETRY_NS < REUSE_NS < PEER_TIMEOUT_NS, "a second try gets through"
    assert SYN_RETRY_NS + 2 * BEAT_NS < READY_WAIT_NS < PEER_TIMEOUT_NS, (
        "a beat has an answer by then although its SYN was lost just before, and whoever asks waits two seconds"
    )
    assert 3 * LOOK_AFTER_NS < DIAGNOSTICS_STATE_SECONDS * 1_000_000_000, "three writes may be lost"
    assert RETRY_NS <= DIAGNOSTICS_RETRY_NS_MAX < DIAGNOSTICS_STATE_SECONDS * 1_000_000_000
    assert DRAIN_PAUSE_NS_MAX < TICK_NS < DRAIN_REST_NS, "what rests is looked at less often than what does not"
    assert DRAIN_PAUSE_NS_MIN <= DRAIN_PAUSE_NS_MAX < TICK_NS, "flows are looked for more often than ticks come"
    assert PEER_TIMEOUT_NS < CONTROL_TIMEOUT_NS < CALL_LOST_NS, (
        "a shell gives up before the Planner gives up on the shell"
    )
    assert MEMBERS_MAX * CALL_PLACE_NS // CALLS_MAX + PEER_TIMEOUT_NS < CALL_LOST_NS, (
        "where all LBs are silent, each of them has been asked before its call counts as lost"
    )
    assert CALL_PLACE_NS < PEER_TIMEOUT_NS < HOST_WAIT_NS, "a host that answers just in time is not left behind"
    assert FENCE_NS + MARGIN_NS <= AWAY_NS < LEFT_NS < LOST_NS < AGENT_GRACE_NS, "fenced, or back; the Planner knows"
    assert LEASE_RENEW_NS + API_TIMEOUT_NS < LEASE_HOLD_NS, "one call may fail"
    assert STATUS_GATHER_NS < API_RETRY_NS <= API_TIMEOUT_NS
    assert CERTIFICATE_WARN_DAYS < CERTIFICATE_RENEW_DAYS < CERTIFICATE_DAYS < CA_DAYS
    assert CONFIG_REPLACED_QUIET_NS < CONFIG_QUIET_NS, "a file that was replaced is whole more often than not"
    assert LOOK_AFTER_NS < ISSUED_TOLD_NS < ISSUED_LOOK_NS < CA_SPREAD_NS
    assert 2 * BEAT_NS + TICK_NS <= BEAT_DOWN_NS < 1_000_000_000, (
        "two beats each way have to be lost, and the backup serves within a second"
    )
    assert CONTROL_TIMEOUT_NS < LOST_NS, "a call that takes as long as it may is no loss"
    assert PEER_TIMEOUT_NS + MARGIN_NS <= OWED_HOLD_NS < LOST_NS, "the question has failed, and has been asked anew"
    assert BEAT_DOWN_NS < OWED_NS < LOST_NS, "the others have found it silent, and it still is a member"
    assert 2 * BEATS_BOTH_ASK * BEAT_NS < BEAT_LINE_NS, "a line for beats is there before it is needed"
    assert BEAT_DOWN_NS < AWAY_NS and AWAY_NS + BEAT_DOWN_NS < LOST_NS, (
        "an agent that starts is waited for, and no loss"
    )
    assert BEAT_DOWN_NS < ALONE_NS < FENCE_NS, "who tracks all its slots knows that it has missed something"
    assert PROBE_NS < ALONE_NS, "a controller that lives is heard by then"
    assert BEAT_DOWN_NS < FENCE_NS and FENCE_NS + MARGIN_NS < LOST_NS, (
        "a fence is up before anybody acts on the absence"
    )
    assert HANDOVER_HOLD_NS + PEER_TIMEOUT_NS < CONTROL_TIMEOUT_NS, (
        "a handover is answered within the controller's time"
    )
    assert 40 * HANDOVER_RECORDS_MAX + 12 * SLOT_COUNT + 4 * VIPS_MAX < PEER_BODY_BYTES_MAX, (
        "a page of a handover fits a body"
    )
    assert 2 * PROBE_NS < FOREIGN_WAIT_NS < HOST_PROBE_NS, "every member is asked twice, and a host only once"
    assert RETRY_NS <= RETRY_NS_MAX <= REFUSED_RETRY_NS
    assert REROUTE_PAUSE_NS < RETRY_NS < NEIGHBOUR_REFRESH_NS, "what events and failures bring forward comes sooner"
    assert RETRY_NS <= SETTLE_PAUSE_NS_MAX and EARLY_ASK_NS <= SETTLE_PAUSE_NS_MAX


check()
