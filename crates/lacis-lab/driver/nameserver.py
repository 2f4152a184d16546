"""The internet's name server: answers A and AAAA for the topology's names, by UDP and TCP; nothing else exists.

usage: nameserver.py NAMES.json      (name -> list of addresses)
"""

from __future__ import annotations

import ipaddress
import json
import socket
import socketserver
import struct
import sys
import threading
from pathlib import Path

ADDRESS = ("192.0.2.53", 53)
TTL = 5
TYPES = {1: 4, 28: 6}


def answer(query: bytes, names: dict[str, list[str]]) -> bytes:
    """The reply to one query; empty if it is none."""
    if len(query) < 12:
        return b""
    number, flags, questions = struct.unpack_from("!HHH", query)
    if flags & 0x8000 or questions != 1:
        return b""
    labels, at = [], 12
    while at < len(query) and query[at]:
        labels.append(query[at + 1 : at + 1 + query[at]].decode("ascii", "replace"))
        at += 1 + query[at]
    if at + 5 > len(query):
        return b""
    (kind,) = struct.unpack_from("!H", query, at + 1)
    name = ".".join(labels).lower()
    known = names.get(name)
    records = [
        ipaddress.ip_address(text).packed
        for text in known or []
        if ipaddress.ip_address(text).version == TYPES.get(kind)
    ]
    body = b"".join(struct.pack("!HHHIH", 0xC00C, kind, 1, TTL, len(data)) + data for data in records)
    code = 0 if known is not None else 3
    head = struct.pack("!HHHHHH", number, 0x8480 | (flags & 0x0100) | code, 1, len(records), 0, 0)
    return head + query[12 : at + 5] + body


class Datagrams(socketserver.BaseRequestHandler):
    """One query by UDP."""

    def handle(self) -> None:
        query, where = self.request
        reply = answer(query, NAMES)
        if reply:
            where.sendto(reply, self.client_address)


class Streams(socketserver.StreamRequestHandler):
    """Queries by TCP, each with its length before it."""

    def handle(self) -> None:
        while len(head := self.rfile.read(2)) == 2:
            reply = answer(self.rfile.read(int.from_bytes(head, "big")), NAMES)
            self.wfile.write(len(reply).to_bytes(2, "big") + reply)


NAMES: dict[str, list[str]] = {}


def main() -> None:
    """Serves until it is ended."""
    NAMES.update(json.loads(Path(sys.argv[1]).read_text()))
    socketserver.ThreadingTCPServer.allow_reuse_address = True
    streams = socketserver.ThreadingTCPServer(ADDRESS, Streams)
    threading.Thread(target=streams.serve_forever, daemon=True).start()
    datagrams = socketserver.ThreadingUDPServer(ADDRESS, Datagrams)
    assert isinstance(datagrams.socket, socket.socket)
    print("ready", flush=True)
    datagrams.serve_forever()


if __name__ == "__main__":
    main()
