"""A UDP server that says who it is: answers every datagram with ``<name> <datagram>``, from the address it came to.

A program of its own (``python -m lbpod.lab.udp_echo --name web1 --port 9000``), started once per pod, so it imports
next to nothing. It ends with SIGTERM.
"""

from __future__ import annotations

import argparse
import socket


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True)
    parser.add_argument("--bind", default="0.0.0.0")
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    greeting = f"{options.name} ".encode()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * 1024 * 1024)
        server.bind((options.bind, options.port))
        while True:
            try:
                data, source = server.recvfrom(65_535)
                server.sendto(greeting + data, source)
            except OSError:
                continue  # an ICMP error for an earlier answer, or an answer too long: not ours to solve


if __name__ == "__main__":
    main()
