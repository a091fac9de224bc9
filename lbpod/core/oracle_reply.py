"""What leaves the node, in slow and plain Python: a pod's reply gets its VIP back.

``hf_tc`` in ``lbpod/bpf/reply.h`` does the same in nanoseconds. ``oracle.py`` decides what comes in, and says what both
are for.
"""

from lbpod.core import layout, packets
from lbpod.core.maps import Maps, Nat, mapped, nat_key
from lbpod.core.oracle import Action, Outcome, is_vip_address
from lbpod.core.packets import ETHERNET_BYTES, IPV4_BYTES, TCP_BYTES, UDP_BYTES
from lbpod.core.verdicts import Verdict


def tc(maps: Maps, frame: bytes, now_ns: int, *, goes_back: bool = False) -> Outcome:
    """Decide one frame that leaves the node by the uplink: a pod's reply gets its VIP back, anything else passes, but
    for what came in by the uplink (goes_back) and is to a VIP's address: it would go round in circles."""
    untouched = Outcome(Action.PASS, None, frame)
    ip = frame[ETHERNET_BYTES:]
    is_whole = len(ip) >= IPV4_BYTES and packets.ethertype(frame) == packets.ETHERTYPE_IPV4
    if goes_back and is_whole and is_vip_address(maps, packets.destination(ip)):
        maps.count(Verdict.DROP_UNSERVED, len(frame))
        return Outcome(Action.DROP, Verdict.DROP_UNSERVED, frame)
    if len(frame) < ETHERNET_BYTES or packets.ethertype(frame) != packets.ETHERTYPE_IPV4 or not packets.is_ipv4(ip):
        return untouched
    protocol = packets.protocol(ip)
    l4_bytes = {layout.PROTOCOL_TCP: TCP_BYTES, layout.PROTOCOL_UDP: UDP_BYTES}.get(protocol)
    if packets.header_words(ip) != 5 or packets.is_fragment(ip):
        return untouched
    if l4_bytes is None or len(ip) < IPV4_BYTES + l4_bytes:
        return untouched
    sport, dport = packets.ports(ip[IPV4_BYTES:])
    key = nat_key(mapped(packets.destination(ip)), mapped(packets.source(ip)), dport, sport, protocol)
    assured = maps.nat.get(key)
    entry = assured or maps.unassured.get(key)
    if entry is None:
        return untouched
    flags = ip[IPV4_BYTES + 13] if protocol == layout.PROTOCOL_TCP else 0
    noted = entry.flags
    if flags & packets.TCP_FIN:
        noted |= layout.NAT_FIN_OUT
    if flags & packets.TCP_RST:
        noted |= layout.NAT_RST
    entry = entry._replace(flags=noted, seen_ns=now_ns)
    if assured:
        maps.nat.put(key, entry)
    else:
        maps.unassured.put(key, _answered(maps, key, protocol, entry))
    ip = packets.rewrite_source(ip, entry.vip[12:], entry.vip_port)
    mss_max = maps.settings().mss_max
    syn_ack = packets.TCP_SYN | packets.TCP_ACK
    if mss_max and flags & syn_ack == syn_ack:
        ip = packets.clamp_mss(ip, mss_max)
    maps.count(Verdict.REPLY, len(frame))
    return Outcome(Action.PASS, Verdict.REPLY, frame[:ETHERNET_BYTES] + ip)


def _answered(maps: Maps, key: bytes, protocol: int, entry: Nat) -> Nat:
    """What the entry of `unassured` is after its pod has answered. Only a socket answers what is no SYN without RST."""
    if entry.flags & layout.NAT_RST:
        return entry
    was_assured = entry.flags & layout.NAT_ASSURED
    if was_assured or (protocol == layout.PROTOCOL_TCP and not entry.flags & layout.NAT_SYN):
        return maps.assure(key, entry)
    return entry._replace(flags=entry.flags | layout.NAT_ANSWERED)
