"""What of a load balancer is on a node, as one line of JSON: run by a pod on the node's network, from its text.

Why by hand: whatever image the pod has, this needs Python's standard library and no right beyond asking; the commands
ip and tc need not be there. Names of pins in the first folder, and of links with an XDP program and with clsact.
"""

import json
import os
import socket
import struct
from collections.abc import Iterator

_HEADER = struct.Struct("=IHHII")
_DUMP = 0x301  # NLM_F_REQUEST | NLM_F_DUMP
_DONE, _GETLINK, _GETQDISC = 3, 18, 38
_IFLA_IFNAME, _IFLA_XDP, _IFLA_XDP_ATTACHED, _TCA_KIND = 3, 43, 2, 1


def attributes(data: bytes) -> dict[int, bytes]:
    """Type without flags -> value, of one netlink message or of one attribute that holds attributes."""
    found, at = {}, 0
    while at + 4 <= len(data):
        size, kind = struct.unpack_from("=HH", data, at)
        found[kind & 0x3FFF] = data[at + 4 : at + size]
        at += max(4, (size + 3) & ~3)
    return found


def dump(kind: int, header_bytes: int) -> Iterator[tuple[int, dict[int, bytes]]]:
    """Interface and attributes of each message of a table; both kinds have the interface at the fifth byte."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
        sock.bind((0, 0))
        sock.send(_HEADER.pack(_HEADER.size + header_bytes, kind, _DUMP, 1, 0) + bytes(header_bytes))
        while True:
            data, at = sock.recv(1 << 20), 0
            while at + _HEADER.size <= len(data):
                size, said, *_ = _HEADER.unpack_from(data, at)
                if said == _DONE:
                    return
                body = data[at + _HEADER.size : at + size]
                yield struct.unpack_from("=i", body, 4)[0], attributes(body[header_bytes:])
                at += (size + 3) & ~3


def main() -> None:
    names, xdp, clsact = {}, [], []
    for index, found in dump(_GETLINK, 16):
        names[index] = found[_IFLA_IFNAME].rstrip(b"\0").decode()
        if any(attributes(found.get(_IFLA_XDP, b"")).get(_IFLA_XDP_ATTACHED, b"")):
            xdp.append(names[index])
    for index, found in dump(_GETQDISC, 20):
        if found[_TCA_KIND].rstrip(b"\0") == b"clsact":
            clsact.append(names.get(index, str(index)))
    seen = {"links": names.values(), "pins": os.listdir("/sys/fs/bpf"), "xdp": xdp, "clsact": clsact}
    print(json.dumps({key: sorted(set(value)) for key, value in seen.items()}))


if __name__ == "__main__":
    main()
