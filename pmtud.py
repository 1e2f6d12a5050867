#!/usr/bin/env python3
"""pmtud makes Path MTU Discovery work on nodes behind ECMP and strict reverse path filtering.

A router that cannot forward a packet because it is too big tells the sender so, with an ICMP
error: IPv4 "fragmentation needed" (type 3 code 4), IPv6 "packet too big" (type 2 code 0). When
the sender is a service address shared by many nodes, the fabric delivers that error to any one
of them; when the router answers from its management address, strict rp_filter drops it on the
right one. Either way the connection hangs and nobody logs why. This program runs on each node:

    router R --error (src R, dst VIP)--> node A
                                          | raw PREROUTING, before rp_filter
                                          v
                                        NFLOG group 33 --> pmtud: parse, classify, validate, limit
                                                             |                      |
             copy (src A, dst B, same ICMP bytes) <----------+                      v
                        |                                 deliver (src A, dst VIP), marked
                        v                                                           |
    node B: raw PREROUTING --> NFLOG --> pmtud: "a copy"                  OUTPUT: conntrack, guard
                                           |                                        |
                                           v                                        v
                               deliver (src B, dst VIP), marked          the socket or the pod that
                                           |                             owns the flow learns its MTU;
                                           +--> OUTPUT, as on A          not the owner: dropped (EPERM)

Delivery sends the error again from this node, with outer destination = quoted source (the VIP).
That passes through OUTPUT: conntrack sees it as RELATED and NAT takes it to the pod behind the
VIP, and locally generated packets are exempt from rp_filter. The guard, three nftables rules on
our mark, drops what this node does not own before it can leave.

What it promises: an error is replicated once, by the node a router sent it to, never by a node
that got it as a copy, so there can be no loop; no packet to a service address leaves a node
that does not own the flow; no sysctl is changed; the nftables table is owned by this process and
the kernel removes it when the process ends, SIGKILL included; no packet ends the daemon.

What it does not do: invent MTU values, clamp MSS, read or change payload, help where routers
send no errors at all (see tcp_mtu_probing for those).

Privileges: CAP_NET_ADMIN (netlink, nftables, marks) and CAP_NET_RAW (raw sockets), nothing else.
Needs Linux 4.17 or later and Python 3.9 or later; prometheus-client only for /metrics.
"""
# /// script
# requires-python = ">=3.9"
# dependencies = ["prometheus-client"]
# ///
from __future__ import annotations

import argparse
import contextlib
import ctypes
import enum
import errno
import http.server
import ipaddress
import json
import logging
import os
import platform
import re
import select
import shlex
import signal
import socket
import stat
import struct
import sys
import threading
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Callable, NamedTuple, NoReturn, Optional, Protocol, Union

__version__ = "0.1.0"

# -----------------------------------------------------------------------------
# Section: constants -- names and layouts of the kernel's headers and the RFCs

# linux/netlink.h
NETLINK_ROUTE, NETLINK_NETFILTER = 0, 12
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP, NLM_F_CREATE, NLM_F_APPEND = 0x001, 0x004, 0x300, 0x400, 0x800
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLA_F_NESTED, NLA_TYPE_MASK = 0x8000, 0x3FFF
NLMSG_ALIGNTO = 4
NLMSGHDR = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port id
NLATTR = struct.Struct("=HH")  # struct nlattr: length, type
NLMSG_HDRLEN, NLA_HDRLEN = NLMSGHDR.size, NLATTR.size
NETLINK_BUFFER_BYTES = 1 << 16


class nfgenmsg(ctypes.BigEndianStructure):
    """struct nfgenmsg of linux/netfilter/nfnetlink.h; res_id is big-endian."""

    _fields_ = [("nfgen_family", ctypes.c_uint8), ("version", ctypes.c_uint8), ("res_id", ctypes.c_uint16)]


class nfulnl_msg_config_mode(ctypes.BigEndianStructure):
    """struct nfulnl_msg_config_mode of linux/netfilter/nfnetlink_log.h; copy_range is big-endian."""

    _pack_ = 1
    _fields_ = [("copy_range", ctypes.c_uint32), ("copy_mode", ctypes.c_uint8), ("_pad", ctypes.c_uint8)]


class iovec(ctypes.Structure):
    """struct iovec of linux/uio.h; c_char_p keeps the bytes object it points into alive."""

    _fields_ = [("iov_base", ctypes.c_char_p), ("iov_len", ctypes.c_size_t)]


class sockaddr_storage(ctypes.Structure):
    """Room for struct sockaddr_in or sockaddr_in6, as sockaddr() lays them out."""

    _fields_ = [("raw", ctypes.c_ubyte * 28)]


class msghdr(ctypes.Structure):
    """struct msghdr as user space sees it, sys/socket.h."""

    _fields_ = [
        ("msg_name", ctypes.POINTER(sockaddr_storage)), ("msg_namelen", ctypes.c_uint32),
        ("msg_iov", ctypes.POINTER(iovec)), ("msg_iovlen", ctypes.c_size_t),
        ("msg_control", ctypes.c_void_p), ("msg_controllen", ctypes.c_size_t), ("msg_flags", ctypes.c_int),
    ]  # fmt: skip


class mmsghdr(ctypes.Structure):
    """struct mmsghdr of sys/socket.h."""

    _fields_ = [("msg_hdr", msghdr), ("msg_len", ctypes.c_uint)]


UIO_MAXIOV = 1024  # linux/uio.h: the most messages one sendmmsg() takes

# linux/netfilter/nfnetlink.h
NFNL_SUBSYS_ULOG, NFNL_SUBSYS_NFTABLES = 4, 10
NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END = 0x10, 0x11

# linux/netfilter/nfnetlink_log.h
NFULNL_MSG_PACKET, NFULNL_MSG_CONFIG = 0, 1
NFULA_PREFIX, NFULA_PAYLOAD, NFULA_SEQ = 10, 9, 12
NFULA_CFG_CMD, NFULA_CFG_MODE, NFULA_CFG_QTHRESH, NFULA_CFG_FLAGS = 1, 2, 5, 6
NFULNL_CFG_CMD_BIND = 1
NFULNL_COPY_PACKET = 2
NFULNL_CFG_F_SEQ = 1
NFGENMSG_LEN = ctypes.sizeof(nfgenmsg)
NFLOG_PACKET = NFNL_SUBSYS_ULOG << 8 | NFULNL_MSG_PACKET

# linux/netfilter/nf_tables.h, linux/netfilter.h
NFPROTO_INET, NFPROTO_IPV4, NFPROTO_IPV6 = 1, 2, 10
NF_DROP, NF_ACCEPT, NFT_GOTO, NFT_RETURN = 0, 1, -4, -5
NF_INET_PRE_ROUTING, NF_INET_LOCAL_OUT = 0, 3
NF_IP_PRI_RAW, NF_IP_PRI_MANGLE = -300, -150  # conntrack sits between them, at -200
NFT_MSG_NEWTABLE, NFT_MSG_DELTABLE, NFT_MSG_NEWCHAIN, NFT_MSG_NEWRULE, NFT_MSG_DELRULE = 0, 2, 3, 6, 8
NFT_TABLE_F_OWNER = 0x2
NFTA_TABLE_NAME, NFTA_TABLE_FLAGS = 1, 2
NFTA_CHAIN_TABLE, NFTA_CHAIN_NAME, NFTA_CHAIN_HOOK, NFTA_CHAIN_TYPE = 1, 3, 4, 7
NFTA_HOOK_HOOKNUM, NFTA_HOOK_PRIORITY = 1, 2
NFTA_RULE_TABLE, NFTA_RULE_CHAIN, NFTA_RULE_EXPRESSIONS = 1, 2, 4
NFTA_LIST_ELEM, NFTA_EXPR_NAME, NFTA_EXPR_DATA = 1, 1, 2
NFTA_DATA_VALUE, NFTA_DATA_VERDICT, NFTA_VERDICT_CODE, NFTA_VERDICT_CHAIN = 1, 2, 1, 2
NFT_REG_VERDICT, NFT_REG_1 = 0, 1
NFT_META_MARK, NFT_META_IIFNAME, NFT_META_NFPROTO, NFT_META_L4PROTO = 3, 6, 15, 16
NFT_PAYLOAD_TRANSPORT_HEADER = 2
NFT_FIB_RESULT_OIF, NFT_FIB_RESULT_ADDRTYPE = 1, 3
NFTA_FIB_F_SADDR, NFTA_FIB_F_DADDR, NFTA_FIB_F_IIF = 1, 2, 8
NFT_CT_STATE, NF_CT_STATE_RELATED_BIT = 0, 1 << 2
NFT_CMP_EQ, NFT_CMP_NEQ = 0, 1
RTN_UNICAST, RTN_LOCAL = 1, 2
IFNAMSIZ = 16

# linux/rtnetlink.h
RTM_NEWADDR, RTM_GETADDR, RTM_NEWROUTE, RTM_GETROUTE = 20, 22, 24, 26
RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR = 0x10, 0x100
RT_TABLE_MAIN = 254
RTA_OIF, RTA_PRIORITY, RTA_MULTIPATH = 4, 6, 9
IFA_ADDRESS, IFA_LOCAL, IFA_BROADCAST = 1, 2, 4
IFADDRMSG = struct.Struct("=BBBBI")  # struct ifaddrmsg: family, prefix length, flags, scope, interface index
RTMSG = struct.Struct("=BBBBBBBBI")  # struct rtmsg: family, dst_len, src_len, tos, table, protocol, scope, type, flags
RTNEXTHOP = struct.Struct("=HBBi")  # struct rtnexthop: length, flags, hops, interface index

# asm-generic/socket.h, linux/in.h, linux/icmp.h, linux/in6.h, linux/icmpv6.h
SO_MARK, SO_SNDBUFFORCE, SO_RCVBUFFORCE = 36, 32, 33
IP_MTU_DISCOVER, IPV6_MTU_DISCOVER, PMTUDISC_DONT = 10, 23, 0
SOL_RAW, ICMP_FILTER = 255, 1
ICMP6_FILTER = 1

# RFC 791, 792, 1191, 4443, 8200
ICMP_DEST_UNREACH, ICMP_FRAG_NEEDED = 3, 4
ICMPV6_PKT_TOOBIG = 2
IPV4_HEADER = struct.Struct("!BxHxxHxBxx4s4s")  # version+IHL, total length, flags+fragment offset, protocol, src, dst
IPV4_HEADER_LEN = 20
IPV4_OFFSET_MASK, IPV4_MORE_FRAGMENTS = 0x1FFF, 0x2000
IPV6_HEADER = struct.Struct("!B3xHBx16s16s")  # version+class, payload length, next header, src, dst
IPV6_HEADER_LEN = 40
IPV6_EXTENSIONS_MAX = 8  # RFC 8200 section 4.1 recommends an order of at most 7 headers
HOPOPTS, ROUTING, FRAGMENT, AUTH, DSTOPTS = 0, 43, 44, 51, 60
IPV6_FRAGMENT = struct.Struct("!BxH4x")  # next header, offset (13 bits) + reserved + more flag
ICMPV4_FRAG_NEEDED = struct.Struct("!BBHxxH")  # type, code, checksum, unused, next-hop MTU (RFC 1191 section 4)
ICMPV6_TOO_BIG = struct.Struct("!BBHI")  # type, code, checksum, MTU (RFC 4443 section 3.2)
ICMP_HEADER_LEN = 8
QUOTED_TRANSPORT_MIN = 8  # RFC 792: the quoted header plus 64 bits
PORTS = struct.Struct("!HH")  # source and destination port: TCP, UDP, DCCP, SCTP
PROTOCOLS_WITH_PORTS = frozenset((6, 17, 33, 132))
PROTOCOLS_QUOTED = PROTOCOLS_WITH_PORTS | {4, 41, 47, 50}  # and IPIP, 6in4, GRE, ESP, plus the family's own ICMP
IPV4_MIN_MTU, IPV6_MIN_MTU = 68, 1280  # RFC 791, RFC 8200
IPV4_MIN_PMTU = 552  # net.ipv4.route.min_pmtu: the kernel clamps what is below it

MARK_DELIVER = 0x2C  # on errors given to this node's own stack; bits that Kubernetes, Calico and Cilium leave alone
MARK_COPY = 0x2E  # on copies on their way to a peer
RPF_PREFIX = "pmtud rpf"  # log prefix of errors that strict reverse path filtering would drop
CONNTRACK_COUNT = "/proc/sys/net/netfilter/nf_conntrack_count"
NFLOG_INSTANCES = "/proc/net/netfilter/nfnetlink_log"

# -----------------------------------------------------------------------------
# Section: errors -- what ends the program, and the one name for each dropped packet


class PmtudError(Exception):
    """A failure with a one-line message that says what to do; ends the program with exit_code."""

    exit_code = 1


class UsageError(PmtudError):
    """A bad option or configuration value."""

    exit_code = 2


class NetlinkError(PmtudError):
    """The kernel refused a netlink request; `number` is its errno."""

    def __init__(self, operation: str, number: int) -> None:
        super().__init__(f"{operation}: {os.strerror(number)} (errno {number})")
        self.number = number


class PeerSourceError(PmtudError):
    """A peer source gave no usable answer; the last good set stays in force."""


class Reason(str, enum.Enum):
    """Why an error was dropped: the label in the metric, the word in the log, the name in the test."""

    TRUNCATED = "truncated"
    NOT_FRAG_NEEDED = "not_frag_needed"
    BAD_CHECKSUM = "bad_checksum"
    QUOTED_SHORT = "quoted_short"
    QUOTED_FAMILY = "quoted_family"
    QUOTED_FRAGMENT = "quoted_fragment"
    QUOTED_PROTO = "quoted_proto"
    MTU_TOO_SMALL = "mtu_too_small"
    MTU_NOT_SMALLER = "mtu_not_smaller"
    PORT_NOT_LISTED = "port_not_listed"
    NOT_SERVICE = "not_service"
    IGNORED_NETWORK = "ignored_network"
    OWN = "own"
    MISADDRESSED = "misaddressed"
    LIMITED_FLOW = "limited_flow"
    LIMITED_SOURCE = "limited_source"
    LIMITED_TOTAL = "limited_total"
    DRY_RUN = "dry_run"


# -----------------------------------------------------------------------------
# Section: configuration -- one frozen record, and the parsers of its values

Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]
PEERS_MAX = 16384  # a bound for every list of peers; beyond it use a subnet broadcast address


class PeerAddress(NamedTuple):
    """An address to send copies to: packed in network byte order, and the zone of a link-local one."""

    packed: bytes
    zone: str = ""

    @property
    def is_multicast(self) -> bool:
        """Whether this is an IPv6 multicast group; IPv4 ones are no peers."""
        return len(self.packed) == 16 and self.packed[0] == 0xFF

    def __str__(self) -> str:
        text = str(ipaddress.ip_address(self.packed))
        return f"{text}%{self.zone}" if self.zone else text


@dataclass(frozen=True)
class Config:
    """Everything the options say. Rates are per second, intervals in seconds, MTUs in bytes."""

    peers: tuple[PeerAddress, ...] = ()
    peer_sources: tuple[str, ...] = ()  # like file:/etc/pmtud/peers
    ifaces: tuple[str, ...] = ()
    nodename: str = ""
    nflog_group: int = 33
    metrics_port: int = 30040
    metrics_addr: str = ""
    metrics_required: bool = False
    ttl: int = 10
    ignore_networks: tuple[Network, ...] = ()
    rules: str = "auto"
    rescue: bool = True
    service_networks: tuple[Network, ...] = ()
    ports: frozenset[int] = frozenset()
    min_mtu: tuple[int, int] = (IPV4_MIN_PMTU, IPV6_MIN_MTU)
    flow_interval: float = 0.1
    source_rate: float = 500.0
    rate: float = 1000.0
    dry_run: bool = False
    log_level: str = "info"
    log_format: str = "text"


def split_list(text: str) -> list[str]:
    """The non-empty items of a comma-separated list, stripped."""
    return [item.strip() for item in text.split(",") if item.strip()]


def number_between(low: float, high: float, convert: Callable[[str], float] = int) -> Callable[[str], Any]:
    """A parser of numbers in [low, high]; raises ValueError with the range."""

    def parse_number(text: str) -> float:
        try:
            value = convert(text)
        except ValueError:
            kind = "whole number" if convert is int else "number"
            raise ValueError(f"{text!r} is not a {kind}") from None
        if not low <= value <= high:
            raise ValueError(f"{text} is not between {low} and {high}")
        return value

    return parse_number


def parse_networks(text: str) -> tuple[Network, ...]:
    """Networks in CIDR form, comma-separated; a bare address is a network of one; host bits are an error."""
    try:
        return tuple(ipaddress.ip_network(item) for item in split_list(text))
    except ValueError as problem:
        raise ValueError(f"{problem}; networks are written like 10.0.0.0/8 or fd00::/64") from None


def parse_ports(text: str) -> frozenset[int]:
    """Source ports and ranges of them, like 443,8000-8100."""
    ports: set[int] = set()
    for item in split_list(text) or [text]:
        match = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", item)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= low <= high <= 65535:
            raise ValueError(f"{item!r} is not a port or a range of ports; write them like 443,8000-8100")
        ports.update(range(low, high + 1))
    return frozenset(ports)


def parse_min_mtu(text: str) -> tuple[int, int]:
    """IPV4 or IPV4,IPV6: the smallest MTUs believed, in bytes."""
    items = split_list(text)
    if not 1 <= len(items) <= 2:
        raise ValueError(f"{text!r} is not one MTU (IPv4) or two (IPv4,IPv6)")
    ipv4: int = number_between(IPV4_MIN_MTU, 65535)(items[0])
    ipv6: int = number_between(IPV6_MIN_MTU, 65535)(items[1]) if len(items) == 2 else IPV6_MIN_MTU
    return ipv4, ipv6


def parse_iface(text: str) -> tuple[str, ...]:
    """Interface names, comma-separated."""
    names = tuple(split_list(text))
    for name in names:
        if len(name.encode()) >= IFNAMSIZ or name in (".", "..") or re.search(r'[/:"\s]', name):
            raise ValueError(f"{name!r} is not an interface name")
    return names


def parse_peer(text: str) -> PeerAddress:
    """One peer address: IPv4, subnet broadcast, IPv6, or link-local or multicast IPv6 with %interface."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise ValueError(f"{text!r} is not an IP address") from None
    mapped = getattr(address, "ipv4_mapped", None)
    address = mapped or address
    zone = getattr(address, "scope_id", None) or ""
    scoped = address.version == 6 and (address.is_link_local or address.is_multicast)
    if scoped and not zone:
        raise ValueError(f"{text} needs its interface, like {text}%eth0")
    group = address.packed == b"\xff" * 4 or (address.version == 4 and address.is_multicast)
    if address.is_loopback or address.is_unspecified or group:
        raise ValueError(f"{text} cannot be a peer; list node addresses or a subnet broadcast address")
    return PeerAddress(address.packed, zone if scoped else "")


def parse_peer_lines(text: str) -> tuple[PeerAddress, ...]:
    """The addresses of a peer file: one per line, `#` starts a comment; raises ValueError naming the line."""
    found: list[PeerAddress] = []
    for number, line in enumerate(text.splitlines(), 1):
        for item in split_list(line.partition("#")[0]):
            try:
                found.append(parse_peer(item))
            except ValueError as problem:
                raise ValueError(f"line {number}: {problem}") from None
    if len(found) > PEERS_MAX:
        raise ValueError(f"{len(found)} peers are more than {PEERS_MAX}; use a subnet broadcast address")
    return tuple(found)


# -----------------------------------------------------------------------------
# Section: packets -- from bytes to one error or one Reason, both families, pure

# protocol, source, destination, length of the whole packet, offset of the transport header,
# fragment offset, more fragments
IPHeader = tuple[int, bytes, bytes, int, int, int, bool]


def ipv4_header(packet: bytes, at: int, end: int) -> Optional[IPHeader]:
    """The IPv4 header at offset `at`, None where it does not fit before `end` (RFC 791 section 3.1)."""
    if end - at < IPV4_HEADER_LEN:
        return None
    version_ihl, length, fragment, protocol, src, dst = IPV4_HEADER.unpack_from(packet, at)
    header_len = (version_ihl & 0x0F) * 4
    if version_ihl >> 4 != 4 or header_len < IPV4_HEADER_LEN or end - at < header_len:
        return None
    offset, more = fragment & IPV4_OFFSET_MASK, bool(fragment & IPV4_MORE_FRAGMENTS)
    return protocol, src, dst, length, at + header_len, offset, more


def ipv6_header(packet: bytes, at: int, end: int) -> Optional[IPHeader]:
    """The IPv6 header at offset `at` with its extension headers walked, None where they do not fit (RFC 8200)."""
    if end - at < IPV6_HEADER_LEN or packet[at] >> 4 != 6:
        return None
    _, payload, protocol, src, dst = IPV6_HEADER.unpack_from(packet, at)
    length, offset, more = IPV6_HEADER_LEN + payload, 0, False
    at += IPV6_HEADER_LEN
    for _ in range(IPV6_EXTENSIONS_MAX):
        if protocol not in (HOPOPTS, ROUTING, FRAGMENT, AUTH, DSTOPTS) or offset:
            return protocol, src, dst, length, at, offset, more
        if end - at < 8:
            return None
        if protocol == FRAGMENT:
            protocol, fragment = IPV6_FRAGMENT.unpack_from(packet, at)
            offset, more, at = fragment >> 3, bool(fragment & 1), at + 8
        elif protocol == AUTH:
            protocol, at = packet[at], at + (packet[at + 1] + 2) * 4
        else:
            protocol, at = packet[at], at + (packet[at + 1] + 1) * 8
    return None


class Family(NamedTuple):
    """What differs between IPv4 and IPv6; everything else is one code path."""

    name: str
    version: int
    af: int
    header: Callable[[bytes, int, int], Optional[IPHeader]]
    icmp_protocol: int
    icmp: struct.Struct  # type, code, checksum, MTU
    error: tuple[int, int]  # type and code
    protocols: frozenset[int]
    pseudo_header: bool  # the ICMP checksum covers the addresses
    nfproto: int
    probe_address: str  # where guard_holds() sends: it never leaves the node


IPV4 = Family(
    "ipv4", 4, socket.AF_INET, ipv4_header, socket.IPPROTO_ICMP, ICMPV4_FRAG_NEEDED,
    (ICMP_DEST_UNREACH, ICMP_FRAG_NEEDED), PROTOCOLS_QUOTED | {socket.IPPROTO_ICMP}, False,
    NFPROTO_IPV4, "192.0.2.1",
)  # fmt: skip
IPV6 = Family(
    "ipv6", 6, socket.AF_INET6, ipv6_header, socket.IPPROTO_ICMPV6, ICMPV6_TOO_BIG,
    (ICMPV6_PKT_TOOBIG, 0), PROTOCOLS_QUOTED | {socket.IPPROTO_ICMPV6}, True,
    NFPROTO_IPV6, "ff01::1",
)  # fmt: skip
FAMILIES = (IPV4, IPV6)


def family_of(packed: bytes) -> Family:
    """The family of a packed address."""
    return IPV4 if len(packed) == 4 else IPV6


class MtuError(NamedTuple):
    """A well-formed ICMP error. Addresses are packed; `icmp` is the message from its type on, unchanged."""

    family: Family
    src: bytes
    dst: bytes
    quoted_src: bytes
    quoted_dst: bytes
    quoted_protocol: int
    quoted_length: int
    source_port: int
    destination_port: int
    mtu: int
    icmp: bytes

    def __str__(self) -> str:
        addresses = [str(ipaddress.ip_address(a)) for a in (self.src, self.dst, self.quoted_src, self.quoted_dst)]
        return (
            f"router={addresses[0]} dst={addresses[1]} flow={addresses[2]}:{self.source_port}>"
            f"{addresses[3]}:{self.destination_port}/{self.quoted_protocol} mtu={self.mtu}"
        )


def checksum_holds(family: Family, src: bytes, dst: bytes, icmp: bytes) -> bool:
    """Whether the ICMP checksum is right (RFC 1071: words sum to 0 modulo 65535, 0.6 us for 556 bytes).

    Copies to IPv6 peers leave with a checksum made by the kernel, so a corrupt error must end here.
    """
    total = int.from_bytes(icmp, "big") << 8 * (len(icmp) & 1)
    if family.pseudo_header:
        total += int.from_bytes(src + dst, "big") + len(icmp) + family.icmp_protocol
    return total % 0xFFFF == 0


def parse(packet: bytes) -> Union[MtuError, Reason]:
    """The error in a raw IP packet, or the first Reason it is not one. Never raises, whatever the bytes."""
    family = IPV6 if packet and packet[0] >> 4 == 6 else IPV4
    outer = family.header(packet, 0, len(packet))
    if outer is None:
        return Reason.TRUNCATED
    protocol, src, dst, end, at, offset, more = outer
    if offset or more or end > len(packet):
        return Reason.TRUNCATED
    if protocol != family.icmp_protocol:
        return Reason.NOT_FRAG_NEEDED
    if end < at + ICMP_HEADER_LEN:
        return Reason.TRUNCATED
    kind, code, _, mtu = family.icmp.unpack_from(packet, at)
    if (kind, code) != family.error:
        return Reason.NOT_FRAG_NEEDED
    icmp = packet[at:end]
    if not checksum_holds(family, src, dst, icmp):
        return Reason.BAD_CHECKSUM
    quoted_at = at + ICMP_HEADER_LEN
    if end > quoted_at and packet[quoted_at] >> 4 != family.version:
        return Reason.QUOTED_FAMILY
    quoted = family.header(packet, quoted_at, end)
    if quoted is None:
        return Reason.QUOTED_SHORT
    protocol, quoted_src, quoted_dst, length, transport, offset, _ = quoted
    if offset:
        return Reason.QUOTED_FRAGMENT
    if end < transport + QUOTED_TRANSPORT_MIN:
        return Reason.QUOTED_SHORT
    ports = PORTS.unpack_from(packet, transport) if protocol in PROTOCOLS_WITH_PORTS else (0, 0)
    return MtuError(family, src, dst, quoted_src, quoted_dst, protocol, length, ports[0], ports[1], mtu, icmp)


# -----------------------------------------------------------------------------
# Section: netlink codec -- messages to bytes and back, bounded, pure


def attribute(kind: int, data: bytes) -> bytes:
    """One netlink attribute, padded to four bytes."""
    return NLATTR.pack(NLA_HDRLEN + len(data), kind) + data + bytes(-len(data) % NLMSG_ALIGNTO)


def nested(kind: int, *attributes: bytes) -> bytes:
    """An attribute that contains attributes."""
    return attribute(kind | NLA_F_NESTED, b"".join(attributes))


def be16(kind: int, value: int) -> bytes:
    """An attribute with a big-endian 16-bit number."""
    return attribute(kind, struct.pack("!H", value))


def be32(kind: int, value: int) -> bytes:
    """An attribute with a big-endian 32-bit number; negative numbers are two's complement."""
    return attribute(kind, struct.pack("!I", value & 0xFFFFFFFF))


def be64(kind: int, value: int) -> bytes:
    """An attribute with a big-endian 64-bit number."""
    return attribute(kind, struct.pack("!Q", value))


def string(kind: int, text: str) -> bytes:
    """An attribute with a NUL-terminated string."""
    return attribute(kind, text.encode() + b"\0")


def message(kind: int, flags: int, sequence: int, payload: bytes) -> bytes:
    """One netlink request."""
    header = NLMSGHDR.pack(NLMSG_HDRLEN + len(payload), kind, NLM_F_REQUEST | flags, sequence, 0)
    return header + payload + bytes(-len(payload) % NLMSG_ALIGNTO)


def messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """The (type, sequence, payload) of each message; ends at the first one that does not fit."""
    at = 0
    while len(data) - at >= NLMSG_HDRLEN:
        length, kind, _, sequence, _ = NLMSGHDR.unpack_from(data, at)
        if not NLMSG_HDRLEN <= length <= len(data) - at:
            return
        yield kind, sequence, data[at + NLMSG_HDRLEN : at + length]
        at += length + -length % NLMSG_ALIGNTO


def attributes(data: bytes, at: int = 0) -> dict[int, bytes]:
    """The attributes from offset `at` on, last one of a type wins; ends at the first one that does not fit."""
    found: dict[int, bytes] = {}
    while len(data) - at >= NLA_HDRLEN:
        length, kind = NLATTR.unpack_from(data, at)
        if not NLA_HDRLEN <= length <= len(data) - at:
            break
        found[kind & NLA_TYPE_MASK] = data[at + NLA_HDRLEN : at + length]
        at += length + -length % NLMSG_ALIGNTO
    return found


def error_number(payload: bytes) -> int:
    """The errno in the payload of an NLMSG_ERROR message, 0 for an acknowledgement."""
    return -int.from_bytes(payload[:4], sys.byteorder, signed=True) if len(payload) >= 4 else errno.EBADMSG


class Logged(NamedTuple):
    """One packet from NFLOG: the raw IP packet, its sequence number in the group, and whether RPF drops it."""

    packet: bytes
    sequence: Optional[int]
    rpf: bool


def parse_nflog(data: bytes) -> list[Logged]:
    """The packets in one NFLOG datagram (nfnetlink_log.h); other messages are skipped."""
    found = []
    for kind, _, payload in messages(data):
        if kind != NFLOG_PACKET:
            continue
        attrs = attributes(payload, NFGENMSG_LEN)
        sequence = attrs.get(NFULA_SEQ)
        rpf = attrs.get(NFULA_PREFIX, b"").startswith(RPF_PREFIX.encode())
        number = int.from_bytes(sequence, "big") if sequence else None
        found.append(Logged(attrs.get(NFULA_PAYLOAD, b""), number, rpf))
    return found


# -----------------------------------------------------------------------------
# Section: policy -- whose error it is, whether it is believed, and how often, pure


class Origin(str, enum.Enum):
    """Who sent an error to this node."""

    ROUTER = "router"
    PEER = "peer"


class Action(str, enum.Enum):
    """What to do with an error."""

    REPLICATE = "replicate"  # a copy to every peer, and deliver here
    DELIVER = "deliver"  # deliver here only


class Membership:
    """Whether a packed address is in any of some networks; answers are remembered, at most 4096 of them."""

    def __init__(self, networks: Iterable[Network] = ()) -> None:
        self._networks = tuple(networks)
        self._known: dict[bytes, bool] = {}

    def __contains__(self, packed: bytes) -> bool:
        if not self._networks:
            return False
        answer = self._known.get(packed)
        if answer is None:
            address = ipaddress.ip_address(packed)
            answer = any(address in network for network in self._networks)
            if len(self._known) >= 4096:
                self._known.clear()
            self._known[packed] = answer
        return answer


@dataclass(frozen=True)
class View:
    """Who is who, as this node sees it now; replaced as a whole when addresses or peers change."""

    own: frozenset[bytes] = frozenset()  # every address of this node
    node: frozenset[bytes] = frozenset()  # those of them by which peers know it: never shared
    groups: frozenset[bytes] = frozenset()  # broadcast and multicast addresses that reach it
    peers: frozenset[bytes] = frozenset()
    networks: Membership = field(default_factory=Membership)  # --ignore-networks and the subnets of broadcast peers


class Recent:
    """A bounded memory of keys: at least `seconds` long unless more than `capacity` keys came in that time."""

    def __init__(self, seconds: float, capacity: int = 8192) -> None:
        self._seconds, self._capacity, self._turned = seconds, capacity, 0.0
        self._young: dict[Any, Any] = {}
        self._old: dict[Any, Any] = {}

    def get(self, key: Any) -> Any:
        """What was put last under this key, None if it is forgotten."""
        value = self._young.get(key)
        return self._old.get(key) if value is None else value

    def put(self, key: Any, value: Any, now: float) -> None:
        """Remember; two generations make forgetting cost nothing."""
        if now - self._turned >= self._seconds or len(self._young) >= self._capacity:
            self._young, self._old, self._turned = {}, self._young, now
        self._young[key] = value

    def __len__(self) -> int:
        return len(self._young) + len(self._old)


class TokenBuckets:
    """Lets `rate` events a second through for each key, a second's worth at once; 0 lets everything through."""

    def __init__(self, rate: float) -> None:
        self._rate, self._burst = rate, max(rate, 1.0)
        # A bucket untouched for burst/rate seconds is full again: no need to remember it.
        self._buckets = Recent(self._burst / rate if rate else 0.0)

    def take(self, key: Any, now: float) -> bool:
        """Whether this event may pass."""
        if not self._rate:
            return True
        tokens, since = self._buckets.get(key) or (self._burst, now)
        tokens = min(self._burst, tokens + (now - since) * self._rate)
        if tokens < 1.0:
            return False
        self._buckets.put(key, (tokens - 1.0, now), now)
        return True


class Policy:
    """The rules of this run: the options that judge an error, and the memory of the limits."""

    def __init__(self, config: Config, view: View) -> None:
        self.view = view
        self._min_mtu = {4: config.min_mtu[0], 6: config.min_mtu[1]}
        self._ports = config.ports
        self._services = Membership(config.service_networks) if config.service_networks else None
        self._interval = config.flow_interval
        self._flows = Recent(config.flow_interval, capacity=32768)
        self._sources = TokenBuckets(config.source_rate)
        self._total = TokenBuckets(config.rate)

    def invalid(self, error: MtuError) -> Optional[Reason]:
        """The first reason not to believe this error, or not to act on it; None if there is none."""
        if error.quoted_protocol not in error.family.protocols:
            return Reason.QUOTED_PROTO
        if error.mtu < self._min_mtu[error.family.version]:
            return Reason.MTU_TOO_SMALL
        if error.mtu >= error.quoted_length:
            return Reason.MTU_NOT_SMALLER
        if self._ports and error.source_port not in self._ports:
            return Reason.PORT_NOT_LISTED
        if self._services is not None and error.quoted_src not in self._services:
            return Reason.NOT_SERVICE
        return None

    def limited(self, error: MtuError, origin: Origin, now: float) -> Optional[Reason]:
        """The limit this error exceeds, None if it may pass; peers and routers have separate budgets."""
        flow = (origin, error.quoted_src, error.quoted_dst, error.quoted_protocol,
                error.source_port, error.destination_port, error.mtu)  # fmt: skip
        last = self._flows.get(flow)
        if last is not None and now - last < self._interval:
            return Reason.LIMITED_FLOW
        if not self._sources.take(error.src, now):
            return Reason.LIMITED_SOURCE
        if not self._total.take(origin, now):
            return Reason.LIMITED_TOTAL
        if self._interval:
            self._flows.put(flow, now, now)
        return None


def is_unicast(packed: bytes) -> bool:
    """Whether a packet of a routed flow can have this source; loopback, link-local and group addresses cannot.

    Without this, a forged error could reach flows on 127.0.0.1 that the kernel shields as martians.
    """
    if len(packed) == 4:
        return packed[0] not in (0, 127) and packed[0] < 224 and packed[:2] != b"\xa9\xfe"
    link_local = packed[0] == 0xFE and packed[1] & 0xC0 == 0x80
    return packed[0] != 0xFF and not link_local and packed[:10] != bytes(10)


def classify(error: MtuError, view: View) -> Union[Origin, Reason]:
    """Who sent this error, by its addresses alone.

    Only an error whose outer destination equals its quoted source and that comes from outside the
    cluster is ever replicated; a copy never has that shape, so no option can make a loop.
    """
    if error.src in view.own:
        return Reason.OWN
    from_cluster = error.src in view.peers or error.src in view.networks
    if error.dst == error.quoted_src and is_unicast(error.dst):
        # A link-local source is a neighbour: with a multicast peer its copies are believed, but an error of this
        # shape is a first-hop router's own; nodes send theirs from routed addresses.
        return Reason.IGNORED_NETWORK if from_cluster and is_unicast(error.src) else Origin.ROUTER
    if from_cluster and (error.dst in view.own or error.dst in view.groups) and is_unicast(error.quoted_src):
        return Origin.PEER
    return Reason.MISADDRESSED


def decide(error: MtuError, policy: Policy, now: float) -> tuple[Origin, Union[Action, Reason]]:
    """Who sent the error, and what to do with it or why to drop it; `now` in seconds of a monotonic clock."""
    view = policy.view
    origin = classify(error, view)
    if isinstance(origin, Reason):
        inside = error.src in view.own or error.src in view.peers or error.src in view.networks
        return (Origin.PEER if inside else Origin.ROUTER), origin
    reason = policy.invalid(error) or policy.limited(error, origin, now)
    if reason is not None:
        return origin, reason
    if origin is Origin.PEER or error.quoted_src in view.node:
        return origin, Action.DELIVER
    return origin, Action.REPLICATE


# -----------------------------------------------------------------------------
# Section: counters -- plain integers on the packet's way, a collector that reads them at scrape time

MTU_BUCKETS = (576, 1024, 1280, 1300, 1350, 1380, 1400, 1420, 1440, 1450, 1460, 1480, 1492, 1500, 4000, 8950, 9000)
SECONDS_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
DELIVERY_RESULTS = ("owner", "not_owner", "error")
ACTIONS = ("replicate", "deliver", "none")


class Histogram:
    """Counts per bucket and a sum; `bounds` are inclusive upper bounds, +Inf is added."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def cumulative(self) -> list[tuple[str, float]]:
        """The (le, count) pairs Prometheus expects."""
        total, pairs = 0, []
        for bound, count in zip([*map(str, self.bounds), "+Inf"], self.counts):
            total += count
            pairs.append((bound, float(total)))
        return pairs


class CopyCounts:
    """Copies sent and refused for each peer of one set; peers that stay keep their totals.

    A round is one copy to every peer, so that counting costs the same for 1 peer and for 1,000.
    """

    def __init__(self, peers: Sequence[str], before: Optional[CopyCounts] = None) -> None:
        self.rounds = 0
        self.refused = [0] * len(peers)
        self._peers = tuple(peers)
        self._sent_before = before.sent() if before else {}
        self._refused_before = before.errors() if before else {}

    def sent(self) -> dict[str, int]:
        """Copies the kernel took, by peer."""
        return {p: self._sent_before.get(p, 0) + self.rounds - n for p, n in zip(self._peers, self.refused)}

    def errors(self) -> dict[str, int]:
        """Copies the kernel refused, by peer."""
        return {p: self._refused_before.get(p, 0) + n for p, n in zip(self._peers, self.refused)}


class Counters:
    """Everything counted since the start."""

    def __init__(self) -> None:
        self.received = {(f.name, o.value): 0 for f in FAMILIES for o in Origin}
        self.dropped = dict.fromkeys(Reason, 0)
        self.acted = dict.fromkeys(ACTIONS, 0)
        self.delivered = {(f.name, result): 0 for f in FAMILIES for result in DELIVERY_RESULTS}
        self.copies: dict[str, CopyCounts] = {}  # by family
        self.peers: dict[str, int] = {}  # by source
        self.refresh_failures: dict[str, int] = {}
        self.rpf_rescued = 0
        self.nflog_lost = 0
        self.last_error_received = 0.0  # seconds since the epoch
        self.reported_mtu = Histogram(MTU_BUCKETS)
        self.batch_duration = Histogram(SECONDS_BUCKETS)

    def copies_sent(self) -> dict[str, int]:
        """Copies handed to the kernel, by peer, for the peers of now."""
        return {peer: count for copies in self.copies.values() for peer, count in copies.sent().items()}

    def copy_errors(self) -> dict[str, int]:
        """Copies the kernel refused, by peer, for the peers of now."""
        return {peer: count for copies in self.copies.values() for peer, count in copies.errors().items()}

    def summary(self) -> dict[str, int]:
        """The totals of the minute's log line."""
        totals = {
            "received": sum(self.received.values()),
            "replicated": self.acted["replicate"],
            "copies": sum(self.copies_sent().values()),
            "owned": sum(n for (_, result), n in self.delivered.items() if result == "owner"),
            "rpf_rescued": self.rpf_rescued,
            "copy_errors": sum(self.copy_errors().values()),
            "nflog_lost": self.nflog_lost,
        }
        totals.update({f"dropped_{reason.value}": count for reason, count in self.dropped.items()})
        return totals


class Metric(NamedTuple):
    """One exported metric: name without suffix, type, help, label names, and how to read its values."""

    name: str
    kind: str
    help: str
    labels: tuple[str, ...]
    read: Callable[[Counters], Mapping[Any, Any]]


METRICS = (
    Metric("pmtud_received", "counter", "ICMP errors taken from NFLOG.", ("family", "origin"), lambda c: c.received),
    Metric("pmtud_dropped", "counter", "Errors not acted on, by reason.", ("reason",),
           lambda c: {(reason.value,): count for reason, count in c.dropped.items()}),
    Metric("pmtud_acted", "counter", "Errors acted on: replicated and delivered, delivered only, or nothing to do.",
           ("action",), lambda c: c.acted),
    Metric("pmtud_copies_sent", "counter", "Copies the kernel took, by peer.", ("peer",), lambda c: c.copies_sent()),
    Metric("pmtud_copy_errors", "counter", "Copies the kernel refused to send, by peer.", ("peer",),
           lambda c: c.copy_errors()),
    Metric("pmtud_delivered", "counter", "Errors given to this node's stack; owner: the kernel took it.",
           ("family", "result"), lambda c: c.delivered),
    Metric("pmtud_rpf_rescued", "counter", "Errors that strict rp_filter drops and this node owned.", (),
           lambda c: {(): c.rpf_rescued}),
    Metric("pmtud_nflog_lost", "counter", "Errors lost between kernel and daemon (NFLOG sequence gaps).", (),
           lambda c: {(): c.nflog_lost}),
    Metric("pmtud_peers", "gauge", "Peers in force, own addresses removed.", ("source",), lambda c: c.peers),
    Metric("pmtud_peer_refresh_failures", "counter", "Failed refreshes of a peer source.", ("source",),
           lambda c: c.refresh_failures),
    Metric("pmtud_last_error_received_timestamp_seconds", "gauge", "When the last error came in; 0: none yet.", (),
           lambda c: {(): c.last_error_received}),
    Metric("pmtud_reported_mtu_bytes", "histogram", "Next-hop MTU of the errors acted on.", (),
           lambda c: {(): c.reported_mtu}),
    Metric("pmtud_batch_duration_seconds", "histogram", "Time to handle one batch of errors.", (),
           lambda c: {(): c.batch_duration}),
    Metric("pmtud_build_info", "gauge", "Always 1.", ("version", "python_version"),
           lambda c: {(__version__, platform.python_version()): 1}),
)  # fmt: skip


class Collector:
    """A prometheus_client collector over the counters."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters

    def collect(self) -> Iterator[Any]:
        """One metric family for each row of METRICS."""
        from prometheus_client import core

        families = {"counter": core.CounterMetricFamily, "gauge": core.GaugeMetricFamily}
        for metric in METRICS:
            values = dict(metric.read(self._counters))
            if metric.kind == "histogram":
                histogram = values[()]
                yield core.HistogramMetricFamily(
                    metric.name, metric.help, buckets=histogram.cumulative(), sum_value=histogram.sum
                )
                continue
            family = families[metric.kind](metric.name, metric.help, labels=metric.labels)
            for key, value in values.items():
                family.add_metric([key] if isinstance(key, str) else list(key), value)
            yield family


# -----------------------------------------------------------------------------
# Section: log -- one line per event on standard error, text or JSON

LOGGER = logging.getLogger("pmtud")


class Formatter(logging.Formatter):
    """A log line with its fields: `time LEVEL message key=value ...`, or one JSON object."""

    default_time_format, default_msec_format = "%Y-%m-%dT%H:%M:%S", "%s.%03dZ"

    def __init__(self, as_json: bool) -> None:
        super().__init__()
        self.converter = time.gmtime
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        fields = getattr(record, "fields", {})
        now, level, text = self.formatTime(record), record.levelname, record.getMessage()
        if self._as_json:
            return json.dumps({"time": now, "level": level.lower(), "message": text, **fields}, default=str)
        pairs = [f"{key}={json.dumps(str(value)) if ' ' in str(value) else value}" for key, value in fields.items()]
        return " ".join([now, level, text, *pairs])


def log(level: str, text: str, **fields: object) -> None:
    """One line on standard error."""
    LOGGER.log(getattr(logging, level.upper()), text, extra={"fields": fields})


def set_up_logging(level: str, form: str) -> None:
    """Send the program's log to standard error; a closed or full standard error is nobody's problem."""
    logging.raiseExceptions = False
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter(form == "json"))
    LOGGER.handlers[:] = [handler]
    LOGGER.propagate = False
    LOGGER.setLevel(level.upper())


# -----------------------------------------------------------------------------
# Section: kernel -- one class per descriptor: netlink, NFLOG, nftables, raw sockets

PRIVILEGES = "CAP_NET_ADMIN and CAP_NET_RAW are needed: run as root, or grant both"


class Descriptor:
    """Something with a socket that is closed by `close()` or the end of a `with` block."""

    socket: socket.socket

    def fileno(self) -> int:
        """The descriptor, for poll()."""
        return self.socket.fileno()

    def close(self) -> None:
        """Free the socket; harmless when repeated."""
        self.socket.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_socket(family: int, kind: int, protocol: int) -> socket.socket:
    """A socket, or a PmtudError that names the missing privilege."""
    try:
        return socket.socket(family, kind, protocol)
    except PermissionError as problem:
        raise PmtudError(f"cannot open a raw or netlink socket ({problem.strerror}); {PRIVILEGES}") from problem


class Netlink(Descriptor):
    """A netlink socket for requests; answers are awaited at most two seconds."""

    def __init__(self, protocol: int, groups: int = 0) -> None:
        self.socket = open_socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)
        self.socket.bind((0, groups))
        self.socket.settimeout(2.0)
        self._sequence = 0

    def next_sequence(self) -> int:
        """A sequence number not used before on this socket."""
        self._sequence += 1
        return self._sequence

    def send(self, operation: str, data: bytes, last: int) -> list[tuple[int, bytes]]:
        """Send requests and collect the answers up to the one with sequence number `last`.

        Raises NetlinkError with the first error the kernel reports.
        """
        self.socket.send(data)
        found: list[tuple[int, bytes]] = []
        try:
            while True:
                for kind, sequence, payload in messages(self.socket.recv(NETLINK_BUFFER_BYTES)):
                    if kind == NLMSG_ERROR and error_number(payload):
                        raise NetlinkError(operation, error_number(payload))
                    if sequence == last and kind in (NLMSG_ERROR, NLMSG_DONE):
                        return found
                    if sequence:
                        found.append((kind, payload))
        except TimeoutError:
            raise NetlinkError(operation, errno.ETIMEDOUT) from None

    def request(self, operation: str, kind: int, flags: int, payload: bytes) -> list[tuple[int, bytes]]:
        """One request; with NLM_F_DUMP its many answers."""
        sequence = self.next_sequence()
        wanted = flags if flags & NLM_F_DUMP else flags | NLM_F_ACK
        return self.send(operation, message(kind, wanted, sequence, payload), sequence)


class LocalAddress(NamedTuple):
    """An address of this node; packed in network byte order, `broadcast` empty where there is none."""

    packed: bytes
    prefix_length: int
    ifindex: int
    broadcast: bytes


def dump(operation: str, request: int, answer: int, header: bytes) -> Iterator[bytes]:
    """The payloads of all answers to one rtnetlink dump request, at least as long as its header."""
    with Netlink(NETLINK_ROUTE) as netlink:
        for kind, payload in netlink.request(operation, request, NLM_F_DUMP, header):
            if kind == answer and len(payload) >= len(header):
                yield payload


def local_addresses() -> list[LocalAddress]:
    """All addresses configured in this network namespace (RTM_GETADDR).

    Asking the kernel for its list, not trying to bind: net.ipv4.ip_nonlocal_bind lets every bind succeed.
    """
    found = []
    for payload in dump("list addresses", RTM_GETADDR, RTM_NEWADDR, bytes(IFADDRMSG.size)):
        _, prefix_length, _, _, ifindex = IFADDRMSG.unpack_from(payload)
        attrs = attributes(payload, IFADDRMSG.size)
        packed = attrs.get(IFA_LOCAL, attrs.get(IFA_ADDRESS, b""))
        if len(packed) in (4, 16):
            found.append(LocalAddress(packed, prefix_length, ifindex, attrs.get(IFA_BROADCAST, b"")))
    return found


def route_interfaces(attrs: dict[int, bytes]) -> list[int]:
    """The interface indexes of a route, several for a multipath route."""
    if RTA_OIF in attrs:
        return [int.from_bytes(attrs[RTA_OIF], sys.byteorder)]
    hops, at, found = attrs.get(RTA_MULTIPATH, b""), 0, []
    while len(hops) - at >= RTNEXTHOP.size:
        length, _, _, ifindex = RTNEXTHOP.unpack_from(hops, at)
        if length < RTNEXTHOP.size:
            break
        found.append(ifindex)
        at += length + -length % NLMSG_ALIGNTO
    return found


def default_route_interfaces() -> tuple[str, ...]:
    """The interfaces of the default routes with the lowest metric, IPv4 and IPv6, in order, each once."""
    names: dict[str, None] = {}
    for family in FAMILIES:
        routes: list[tuple[int, list[int]]] = []
        for payload in dump("list routes", RTM_GETROUTE, RTM_NEWROUTE, RTMSG.pack(family.af, *bytes(8))):
            af, dst_len, _, _, table, _, _, kind, _ = RTMSG.unpack_from(payload)
            if (af, dst_len, table, kind) == (family.af, 0, RT_TABLE_MAIN, RTN_UNICAST):
                attrs = attributes(payload, RTMSG.size)
                routes.append((int.from_bytes(attrs.get(RTA_PRIORITY, b"\0"), sys.byteorder), route_interfaces(attrs)))
        lowest = min((metric for metric, _ in routes), default=0)
        for ifindex in (number for metric, found in routes if metric == lowest for number in found):
            with contextlib.suppress(OSError):
                names[socket.if_indextoname(ifindex)] = None
    return tuple(names)


def describe_process(pid: int) -> str:
    """`pid 4711 (python3 pmtud.py)`, or what is known of it."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as stream:
            words = stream.read(4096).replace(b"\0", b" ").decode("ascii", "replace").strip()
    except OSError:
        return "a process not visible from here"
    return f"pid {pid} ({words[:80]})"


def netlink_holder(port: int) -> str:
    """The process behind a netlink port id of NETLINK_NETFILTER, found through its socket's inode."""
    with contextlib.suppress(OSError, ValueError):
        with open("/proc/net/netlink") as stream:
            rows = [line.split() for line in stream.readlines()[1:]]
        inodes = {f"socket:[{row[-1]}]" for row in rows if row[1] == str(NETLINK_NETFILTER) and int(row[2]) == port}
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                for descriptor in os.scandir(f"/proc/{pid}/fd"):
                    if os.readlink(descriptor.path) in inodes:
                        return describe_process(int(pid))
    return "a process not visible from here"


def group_holder(group: int) -> Optional[int]:
    """The netlink port id that holds an NFLOG group, None if the kernel lists none."""
    with contextlib.suppress(OSError, ValueError), open(NFLOG_INSTANCES) as stream:
        for fields in (line.split() for line in stream):
            if int(fields[0]) == group:
                return int(fields[1])
    return None


class Nflog(Descriptor):
    """The receiving end of one NFLOG group."""

    RECEIVE_BUFFER_BYTES = 4 << 20  # some 2,000 errors while the process is not scheduled

    def __init__(self, group: int) -> None:
        self.lost = 0  # errors, counted by gaps in the group's sequence numbers
        self._expected: Optional[int] = None
        netlink = Netlink(NETLINK_NETFILTER)
        self.socket = netlink.socket
        mode = nfulnl_msg_config_mode(0xFFFF, NFULNL_COPY_PACKET, 0)
        payload = b"".join((
            bytes(nfgenmsg(socket.AF_UNSPEC, 0, group)),
            attribute(NFULA_CFG_CMD, bytes([NFULNL_CFG_CMD_BIND])),
            attribute(NFULA_CFG_MODE, bytes(mode)),
            be32(NFULA_CFG_QTHRESH, 1),
            be16(NFULA_CFG_FLAGS, NFULNL_CFG_F_SEQ),
        ))  # fmt: skip
        try:
            self.socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, self.RECEIVE_BUFFER_BYTES)
            kind = NFNL_SUBSYS_ULOG << 8 | NFULNL_MSG_CONFIG
            netlink.request(f"bind NFLOG group {group}", kind, 0, payload)
            self.socket.setblocking(False)
        except (NetlinkError, PermissionError) as problem:
            self.close()
            number = problem.number if isinstance(problem, NetlinkError) else errno.EPERM
            raise self._explain(group, number) from problem

    @staticmethod
    def _explain(group: int, number: int) -> PmtudError:
        """What to do about a group that cannot be bound."""
        port = group_holder(group)
        if port is not None:  # the kernel says EPERM to whoever is not the holder
            return PmtudError(f"NFLOG group {group} is taken by port id {port}, {netlink_holder(port)} "
                              f"(see {NFLOG_INSTANCES}); choose another with --nflog-group")  # fmt: skip
        if number == errno.EPERM:
            return PmtudError(f"NFLOG group {group} cannot be bound; {PRIVILEGES}")
        return PmtudError(f"NFLOG group {group} cannot be bound: {os.strerror(number)}; "
                          "is CONFIG_NETFILTER_NETLINK_LOG in this kernel (modprobe nfnetlink_log)?")  # fmt: skip

    def read(self, datagrams: int) -> list[Logged]:
        """What has arrived, from at most this many datagrams; raises OSError if the socket is broken."""
        found: list[Logged] = []
        for _ in range(datagrams):
            try:
                logged = parse_nflog(self.socket.recv(NETLINK_BUFFER_BYTES))
            except BlockingIOError:
                break
            except OSError as problem:
                if problem.errno != errno.ENOBUFS:  # ENOBUFS: the kernel dropped some; the sequence tells how many
                    raise
                continue
            for item in logged:
                self._count_gap(item.sequence)
            found.extend(logged)
        return found

    def _count_gap(self, sequence: Optional[int]) -> None:
        if sequence is None:
            return
        if self._expected is not None:
            self.lost += (sequence - self._expected) & 0xFFFFFFFF
        self._expected = (sequence + 1) & 0xFFFFFFFF


class Rule(NamedTuple):
    """One nftables rule: its chain, its text for people, its expressions for the kernel."""

    chain: str
    text: str
    expressions: bytes


class Chain(NamedTuple):
    """One chain; hook -1: a regular chain, reached by goto."""

    name: str
    text: str
    hook: int = -1
    priority: int = 0


CHAINS = (
    Chain("mtu_errors", ""),
    Chain("prerouting", "type filter hook prerouting priority raw; policy accept;", NF_INET_PRE_ROUTING, NF_IP_PRI_RAW),
    Chain("copies", "type filter hook output priority raw; policy accept;", NF_INET_LOCAL_OUT, NF_IP_PRI_RAW),
    Chain("guard", "type filter hook output priority mangle; policy accept;", NF_INET_LOCAL_OUT, NF_IP_PRI_MANGLE),
)


def expression(name: str, *attrs: bytes) -> bytes:
    """One nftables expression; numbers inside registers are in host byte order."""
    return nested(NFTA_LIST_ELEM, string(NFTA_EXPR_NAME, name), nested(NFTA_EXPR_DATA, *attrs))


def compare(operator: int, value: bytes) -> bytes:
    """register 1 OPERATOR value."""
    return expression("cmp", be32(1, NFT_REG_1), be32(2, operator), nested(3, attribute(NFTA_DATA_VALUE, value)))


def match(name: str, *operands: int, value: bytes) -> bytes:
    """Load `meta KEY`, `payload BASE OFFSET LENGTH` or `fib RESULT FLAGS` into register 1; it must equal value.

    The attributes of these three are numbered alike: 1 is the register, the operands follow.
    """
    load = [be32(number, operand) for number, operand in enumerate((NFT_REG_1, *operands), 1)]
    return expression(name, *load) + compare(NFT_CMP_EQ, value)


def host32(number: int) -> bytes:
    """A number as nftables registers hold it, in host byte order."""
    return struct.pack("=I", number)


def match_related() -> bytes:
    """ct state related."""
    mask, zero = (nested(number, attribute(NFTA_DATA_VALUE, host32(bits)))
                  for number, bits in ((4, NF_CT_STATE_RELATED_BIT), (5, 0)))  # fmt: skip
    state = expression("ct", be32(1, NFT_REG_1), be32(2, NFT_CT_STATE))
    masked = expression("bitwise", be32(1, NFT_REG_1), be32(2, NFT_REG_1), be32(3, 4), mask, zero)
    return state + masked + compare(NFT_CMP_NEQ, bytes(4))


def verdict(code: int, chain: str = "") -> bytes:
    """accept, drop, return, or goto CHAIN."""
    target = string(NFTA_VERDICT_CHAIN, chain) if chain else b""
    data = nested(2, nested(NFTA_DATA_VERDICT, be32(NFTA_VERDICT_CODE, code), target))
    return expression("immediate", be32(1, NFT_REG_VERDICT), data)


def log_to(group: int, prefix: str = "") -> bytes:
    """log group GROUP [prefix PREFIX]."""
    return expression("log", be16(1, group), string(2, prefix) if prefix else b"")


def limit_rate(per_second: int) -> bytes:
    """limit rate PER_SECOND/second burst PER_SECOND packets."""
    return expression("limit", be64(1, per_second), be64(2, 1), be32(3, per_second))


def nflog_rules(config: Config, ifaces: Sequence[str]) -> list[Rule]:
    """The rules that feed the NFLOG group."""
    group = config.nflog_group
    rpf = match("fib", NFT_FIB_RESULT_OIF, NFTA_FIB_F_SADDR | NFTA_FIB_F_IIF, value=host32(0))
    text = f'fib saddr . iif oif 0 log prefix "{RPF_PREFIX}" group {group} return'
    rules = [
        Rule("mtu_errors", text, rpf + log_to(group, RPF_PREFIX) + verdict(NFT_RETURN)),
        Rule("mtu_errors", f"log group {group}", log_to(group)),
    ]
    # Twice the daemon's own limit: the kernel sheds a flood for next to nothing before it costs a wake-up.
    shed = 2 * max(1, int(config.rate)) if config.rate else 0
    limit_text = f" limit rate {shed}/second burst {shed} packets" if shed else ""
    words = {IPV4: "icmp type destination-unreachable icmp code frag-needed",
             IPV6: "icmpv6 type packet-too-big icmpv6 code 0"}  # fmt: skip
    for iface in ifaces:
        for family in FAMILIES:
            matches = match("meta", NFT_META_NFPROTO, value=bytes([family.nfproto]))
            matches += match("meta", NFT_META_IIFNAME, value=iface.encode().ljust(IFNAMSIZ, b"\0"))
            matches += match("meta", NFT_META_L4PROTO, value=bytes([family.icmp_protocol]))
            matches += match("payload", NFT_PAYLOAD_TRANSPORT_HEADER, 0, 2, value=bytes(family.error))
            matches += limit_rate(shed) if shed else b""
            text = f'iifname "{iface}" {words[family]}{limit_text} goto mtu_errors'
            rules.append(Rule("prerouting", text, matches + verdict(NFT_GOTO, "mtu_errors")))
    return rules


def guard_rules(conntrack: bool) -> list[Rule]:
    """The rules that keep our packets out of conntrack's way, and inside a node that does not own the flow.

    A `ct` expression makes the kernel track connections: without conntrack in use it is left out.
    """
    copy = match("meta", NFT_META_MARK, value=host32(MARK_COPY))
    delivery = match("meta", NFT_META_MARK, value=host32(MARK_DELIVER))
    local = match("fib", NFT_FIB_RESULT_ADDRTYPE, NFTA_FIB_F_DADDR, value=host32(RTN_LOCAL))
    mark = f"meta mark {MARK_DELIVER:#x}"
    related = Rule("guard", f"{mark} ct state related accept", delivery + match_related() + verdict(NF_ACCEPT))
    return [
        Rule("copies", f"meta mark {MARK_COPY:#x} notrack", copy + expression("notrack")),
        *([related] if conntrack else []),
        Rule("guard", f"{mark} fib daddr type local accept", delivery + local + verdict(NF_ACCEPT)),
        Rule("guard", f"{mark} drop", delivery + verdict(NF_DROP)),
    ]


def conntrack_in_use() -> bool:
    """Whether this network namespace tracks any connection now; asking does not start tracking."""
    with contextlib.suppress(OSError, ValueError), open(CONNTRACK_COUNT) as stream:
        return int(stream.read()) > 0
    return False


class Firewall(Descriptor):
    """Our nftables table, owned by this socket: the kernel deletes it when the socket is closed or the process dies.

    Kernels before 5.12 refuse ownership; there the table is replaced at start and deleted by close().
    """

    def __init__(self, config: Config, ifaces: Sequence[str], owned: bool = True) -> None:
        self.table = f"pmtud_{config.nflog_group}"
        self.conntrack = conntrack_in_use()
        self._config = config
        self._netlink = Netlink(NETLINK_NETFILTER)
        self.socket = self._netlink.socket
        self.owned = owned
        try:
            self._delete_stale()
            try:
                self._create(ifaces)
            except NetlinkError as problem:
                if not self.owned or problem.number not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                self.owned = False
                self._create(ifaces)
        except NetlinkError as problem:
            self.socket.close()
            raise self._explain(problem) from problem

    def _explain(self, problem: NetlinkError) -> PmtudError:
        advice = "use --rules off and install the output of `pmtud.py rules` by other means"
        if problem.number == errno.EPERM:
            advice = f"{PRIVILEGES}; or the table inet {self.table} belongs to another process"
        return PmtudError(f"nftables refused our table: {problem}; {advice}")

    def _message(self, kind: int, flags: int, payload: bytes) -> bytes:
        header = bytes(nfgenmsg(NFPROTO_INET, 0, 0))
        number = NFNL_SUBSYS_NFTABLES << 8 | kind
        return message(number, flags, self._netlink.next_sequence(), header + payload)

    def _commit(self, operation: str, requests: Sequence[bytes]) -> None:
        """Send requests as one transaction: all take effect or none."""
        header = bytes(nfgenmsg(socket.AF_UNSPEC, 0, NFNL_SUBSYS_NFTABLES))
        begin = message(NFNL_MSG_BATCH_BEGIN, 0, self._netlink.next_sequence(), header)
        final = self._message(NFT_MSG_NEWTABLE, NLM_F_ACK, self._table_attributes())
        if operation == "delete table":
            final, requests = requests[0], ()
        last = NLMSGHDR.unpack_from(final)[3]
        end = message(NFNL_MSG_BATCH_END, 0, self._netlink.next_sequence(), header)
        self._netlink.send(operation, b"".join((begin, *requests, final, end)), last)

    def _table_attributes(self) -> bytes:
        return string(NFTA_TABLE_NAME, self.table) + be32(NFTA_TABLE_FLAGS, NFT_TABLE_F_OWNER if self.owned else 0)

    def _delete_stale(self) -> None:
        """Remove what a previous run on an old kernel, ended by SIGKILL, may have left."""
        request = self._message(NFT_MSG_DELTABLE, NLM_F_ACK, string(NFTA_TABLE_NAME, self.table))
        try:
            self._commit("delete table", [request])
        except NetlinkError as problem:
            if problem.number != errno.ENOENT:
                raise

    def _chain_message(self, chain: Chain) -> bytes:
        payload = string(NFTA_CHAIN_TABLE, self.table) + string(NFTA_CHAIN_NAME, chain.name)
        if chain.hook >= 0:
            hook = be32(NFTA_HOOK_HOOKNUM, chain.hook) + be32(NFTA_HOOK_PRIORITY, chain.priority)
            payload += nested(NFTA_CHAIN_HOOK, hook) + string(NFTA_CHAIN_TYPE, "filter")
        return self._message(NFT_MSG_NEWCHAIN, NLM_F_CREATE, payload)

    def _rule_message(self, rule: Rule) -> bytes:
        payload = string(NFTA_RULE_TABLE, self.table) + string(NFTA_RULE_CHAIN, rule.chain)
        payload += nested(NFTA_RULE_EXPRESSIONS, rule.expressions)
        return self._message(NFT_MSG_NEWRULE, NLM_F_CREATE | NLM_F_APPEND, payload)

    def _flush_message(self, chain: str) -> bytes:
        payload = string(NFTA_RULE_TABLE, self.table) + string(NFTA_RULE_CHAIN, chain)
        return self._message(NFT_MSG_DELRULE, 0, payload)

    def _create(self, ifaces: Sequence[str]) -> None:
        requests = [self._message(NFT_MSG_NEWTABLE, NLM_F_CREATE, self._table_attributes())]
        requests += map(self._chain_message, CHAINS)
        requests += map(self._rule_message, [*nflog_rules(self._config, ifaces), *guard_rules(self.conntrack)])
        self._commit("create table", requests)

    def replace(self, ifaces: Sequence[str]) -> None:
        """Put new rules in place of the old ones at once, with conntrack as it is used now."""
        self.conntrack = self.conntrack or conntrack_in_use()
        requests = [self._flush_message(chain.name) for chain in CHAINS]
        requests += map(self._rule_message, [*nflog_rules(self._config, ifaces), *guard_rules(self.conntrack)])
        self._commit("replace rules", requests)

    def close(self) -> None:
        """Remove the table; the kernel does it by itself where it is owned."""
        if not self.owned:
            with contextlib.suppress(PmtudError, OSError):
                self._delete_stale()
        super().close()


class IcmpSocket(Descriptor):
    """A raw socket for ICMP messages of one family; the kernel makes the IP header (and the ICMPv6 checksum).

    Measured against IP_HDRINCL with headers of our own: the same 3.6 us per copy, and nothing to rewrite here.
    """

    SEND_BUFFER_BYTES = 4 << 20
    SEND_TIMEOUT = struct.pack("@ll", 0, 50_000)  # struct timeval: a device that takes nothing costs 50 ms, then EAGAIN

    def __init__(self, family: Family, mark: int, ttl: int = 0, source: bytes = b"") -> None:
        self.family = family
        self.socket = open_socket(family.af, socket.SOCK_RAW, family.icmp_protocol)
        option = self.socket.setsockopt
        try:
            self._receive_nothing()
            option(socket.SOL_SOCKET, SO_MARK, mark)
            option(socket.SOL_SOCKET, SO_SNDBUFFORCE, self.SEND_BUFFER_BYTES)
            option(socket.SOL_SOCKET, socket.SO_SNDTIMEO, self.SEND_TIMEOUT)
            if family is IPV4:
                option(socket.IPPROTO_IP, IP_MTU_DISCOVER, PMTUDISC_DONT)
            else:
                option(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, PMTUDISC_DONT)
                option(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_LOOP, 0)
            if ttl:
                self._set_ttl(ttl)
            if source:
                self.socket.bind((socket.inet_ntop(family.af, source), 0))
        except PermissionError as problem:
            self.close()
            raise PmtudError(f"cannot set up a raw socket ({problem.strerror}); {PRIVILEGES}") from problem
        except OSError:
            self.close()
            raise

    def _receive_nothing(self) -> None:
        """Keep the kernel from queueing the node's incoming ICMP here."""
        if self.family is IPV4:
            self.socket.setsockopt(SOL_RAW, ICMP_FILTER, b"\xff" * 4)
        else:
            self.socket.setsockopt(socket.IPPROTO_ICMPV6, ICMP6_FILTER, b"\xff" * 32)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)

    def _set_ttl(self, ttl: int) -> None:
        if self.family is IPV4:
            self.socket.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        else:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, ttl)
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, ttl)

    def join(self, peer: PeerAddress) -> None:
        """Receive packets sent to this IPv6 multicast group on its interface."""
        request = peer.packed + struct.pack("@I", socket.if_nametoindex(peer.zone))
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, request)

    def deliver(self, icmp: bytes, destination: bytes) -> int:
        """Send one message to a packed address; 0 or the errno. EPERM: the guard says this node is not the owner."""
        try:
            self.socket.sendto(icmp, (socket.inet_ntop(self.family.af, destination), 0))
        except OSError as problem:
            return problem.errno or errno.EIO
        return 0


def guard_holds(family: Family, iface: str) -> Optional[bool]:
    """Whether something stops a marked packet that this node does not own; None if it cannot be told.

    Probed with an error about no flow at all that stays inside the node whatever the answer: for IPv4 to a
    documentation address (RFC 5737) on a socket bound to the loopback interface, for IPv6, where that finds
    no route, to interface-local multicast (RFC 4291 section 2.7), which the kernel never puts on a wire.
    """
    icmp = family.icmp.pack(*family.error, 0, IPV6_MIN_MTU) + bytes(IPV6_HEADER_LEN + QUOTED_TRANSPORT_MIN)
    device = "lo" if family is IPV4 else iface
    with contextlib.suppress(OSError), IcmpSocket(family, MARK_DELIVER) as probe:
        probe.socket.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
        result: int = probe.deliver(icmp, socket.inet_pton(family.af, family.probe_address))
        return result == errno.EPERM if result in (0, errno.EPERM) else None
    return None


def sockaddr(peer: PeerAddress) -> tuple[sockaddr_storage, int]:
    """struct sockaddr_in or sockaddr_in6 of a peer, and its length; raises OSError if its zone is gone."""
    if len(peer.packed) == 4:
        raw = struct.pack("=H", socket.AF_INET) + bytes(2) + peer.packed + bytes(8)
    else:
        zone = socket.if_nametoindex(peer.zone) if peer.zone else 0
        raw = struct.pack("=HHI", socket.AF_INET6, 0, 0) + peer.packed + struct.pack("=I", zone)
    return sockaddr_storage.from_buffer_copy(raw.ljust(ctypes.sizeof(sockaddr_storage), b"\0")), len(raw)


class Fanout:
    """Sends the same messages to all peers of one family, many copies per system call.

    The message headers are made once per peer set; several errors x all peers go out in one sendmmsg().
    One sendto() per copy ran at half the speed of a C loop, this at 0.95 of it with 100 peers.
    """

    def __init__(self, sender: IcmpSocket, peers: Sequence[PeerAddress], counts: CopyCounts) -> None:
        self.sender = sender
        self.peers = tuple(peers)
        self.counts = counts
        self._slots = max(1, min(64, UIO_MAXIOV // max(1, len(self.peers))))  # errors in one call
        self._bodies = (iovec * self._slots)()
        self._addresses = [sockaddr(peer) for peer in self.peers]
        self._messages = (mmsghdr * (self._slots * len(self.peers)))()
        for number, entry in enumerate(self._messages):
            address, length = self._addresses[number % len(self.peers)]
            entry.msg_hdr.msg_name, entry.msg_hdr.msg_namelen = ctypes.pointer(address), length
            entry.msg_hdr.msg_iov = ctypes.pointer(self._bodies[number // len(self.peers)])
            entry.msg_hdr.msg_iovlen = 1
        self._sendmmsg = ctypes.CDLL(None, use_errno=True).sendmmsg
        self._sendmmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int)
        self._sendmmsg.restype = ctypes.c_int

    def send(self, bodies: Sequence[bytes]) -> list[tuple[PeerAddress, int]]:
        """Send every body to every peer; the (peer, errno) of each copy the kernel refused."""
        refused: list[tuple[PeerAddress, int]] = []
        for start in range(0, len(bodies), self._slots):
            batch = bodies[start : start + self._slots]
            for slot, body in zip(self._bodies, batch):
                slot.iov_base, slot.iov_len = body, len(body)
            for number, code in self._transmit(len(batch) * len(self.peers)):
                peer = number % len(self.peers)
                self.counts.refused[peer] += 1
                refused.append((self.peers[peer], code))
            self.counts.rounds += len(batch)
        return refused

    def _transmit(self, count: int) -> Iterator[tuple[int, int]]:
        """Send the first `count` prepared messages; yields (message number, errno) of those that failed."""
        start, size, done = ctypes.addressof(self._messages), ctypes.sizeof(mmsghdr), 0
        while done < count:
            sent = self._sendmmsg(self.sender.fileno(), start + done * size, min(count - done, UIO_MAXIOV), 0)
            if sent > 0:
                done += sent
                continue
            code = ctypes.get_errno()
            if code != errno.EINTR:  # the first of these failed: name it, go on with the next
                yield done, code
                done += 1


# -----------------------------------------------------------------------------
# Section: peers -- where addresses come from, and what they mean on this node


class PeerSource(Protocol):
    """Something that names peers and may change its mind; polled off the packet's way."""

    name: str  # the `source` label
    interval: float  # seconds between two looks

    def load(self) -> Optional[tuple[PeerAddress, ...]]:
        """The addresses now, None if unchanged; raises PeerSourceError."""

    def forget(self) -> None:
        """Make the next load() look afresh, whatever it remembers."""


class FileSource:
    """`file:PATH`: read again when the file changes and on SIGHUP."""

    interval = 1.0
    SIZE_MAX = 1 << 20

    def __init__(self, path: str) -> None:
        self.name = f"file:{path}"
        self._path = path
        self._signature: object = None

    def forget(self) -> None:
        """Read the file at the next look even if it seems unchanged."""
        self._signature = None

    def load(self) -> Optional[tuple[PeerAddress, ...]]:
        """The addresses in the file, None if it has not changed; raises PeerSourceError."""
        try:
            status = os.stat(self._path)
            signature = (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)
            if signature == self._signature:
                return None
            self._signature = signature
            if not stat.S_ISREG(status.st_mode) or status.st_size > self.SIZE_MAX:
                raise PeerSourceError(f"{self.name}: not a regular file of at most {self.SIZE_MAX} bytes")
            with open(self._path, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as stream:
                return parse_peer_lines(stream.read(self.SIZE_MAX).decode())
        except OSError as problem:
            self._signature = None
            raise PeerSourceError(f"{self.name}: {problem.strerror}") from problem
        except ValueError as problem:
            raise PeerSourceError(f"{self.name}: {problem}") from problem


def open_source(text: str) -> PeerSource:
    """The source that a peer item names; raises ValueError for a kind that does not exist."""
    kind, _, rest = text.partition(":")
    if kind == "file" and rest:
        return FileSource(rest)
    raise ValueError(f"{text!r} is not an IP address and not file:PATH")


class Peers:
    """The static addresses and what each source said last; sources are followed by a thread each."""

    def __init__(self, config: Config, counters: Counters, changed: Callable[[], None]) -> None:
        self._answers: dict[str, tuple[PeerAddress, ...]] = {"static": config.peers}
        self._sources = [open_source(text) for text in config.peer_sources]
        self._kick = {source.name: threading.Event() for source in self._sources}
        self._failures = counters.refresh_failures
        self._complaints: dict[str, str] = {}
        self._changed = changed
        self._closed = False
        for source in self._sources:
            self._failures[source.name] = 0

    def start(self) -> None:
        """Read the files once, raising UsageError if one is bad, and follow all sources from then on."""
        for source in self._sources:
            if isinstance(source, FileSource):
                try:
                    self._answers[source.name] = source.load() or ()
                except PeerSourceError as problem:
                    raise UsageError(f"peers: {problem}") from problem
        for source in self._sources:
            threading.Thread(target=self._follow, args=(source,), name=source.name, daemon=True).start()

    def listed(self) -> dict[str, tuple[PeerAddress, ...]]:
        """The last good answer of each source that has given one."""
        return dict(self._answers)

    def answered(self) -> bool:
        """Whether every source has answered once."""
        return all(source.name in self._answers for source in self._sources)

    def reload(self) -> None:
        """Look at every source now, even if it seems unchanged."""
        for source in self._sources:
            source.forget()
            self._kick[source.name].set()

    def close(self) -> None:
        """Let the threads end."""
        self._closed = True
        for kick in self._kick.values():
            kick.set()

    def _follow(self, source: PeerSource) -> None:
        kick = self._kick[source.name]
        while not self._closed:
            kick.wait(source.interval)
            kick.clear()
            self._refresh(source)

    def _refresh(self, source: PeerSource) -> None:
        try:
            answer = source.load()
        except PeerSourceError as problem:
            self._failures[source.name] += 1
            if self._complaints.get(source.name) != str(problem):
                self._complaints[source.name] = str(problem)
                kept = len(self._answers.get(source.name, ()))
                log("warning", "peer source failed, its last good peers stay", problem=str(problem), kept=kept)
            return
        if answer is None:
            return
        self._complaints.pop(source.name, None)
        if answer != self._answers.get(source.name):
            self._answers[source.name] = answer
            self._changed()


class Arrangement(NamedTuple):
    """What the peers and this node's addresses mean together."""

    targets: dict[str, tuple[PeerAddress, ...]]  # by family name: where copies go
    removed: tuple[PeerAddress, ...]  # own addresses that were listed
    sources: dict[str, bytes]  # by family name: source address of what we send; missing: the kernel chooses
    per_source: dict[str, int]  # peers in force by source
    view: View


def kernel_source(peer: PeerAddress) -> bytes:
    """The source address the kernel would use towards a peer, empty if it has no route; sends nothing."""
    family = family_of(peer.packed)
    with contextlib.suppress(OSError), socket.socket(family.af, socket.SOCK_DGRAM) as probe:
        zone = (0, socket.if_nametoindex(peer.zone)) if peer.zone else ()
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        probe.connect((socket.inet_ntop(family.af, peer.packed), 9, *zone))
        return socket.inet_pton(family.af, probe.getsockname()[0].partition("%")[0])
    return b""


def networks_of(peer: PeerAddress, local: Iterable[LocalAddress]) -> list[Network]:
    """The networks of a group peer's nodes: a broadcast address means its subnet, multicast its link's prefixes."""
    ifindex = 0
    with contextlib.suppress(OSError):
        ifindex = socket.if_nametoindex(peer.zone) if peer.zone else 0
    return [
        ipaddress.ip_interface((address.packed, address.prefix_length)).network
        for address in local
        if address.broadcast == peer.packed or (ifindex == address.ifindex and len(address.packed) == 16)
    ]


def arrange(
    listed: Mapping[str, Sequence[PeerAddress]], local: Sequence[LocalAddress], ignored: Iterable[Network]
) -> Arrangement:
    """Remove this node from the peers, and work out who is who."""
    own = {address.packed for address in local}
    broadcasts = {address.broadcast for address in local if address.broadcast}
    everyone = dict.fromkeys(peer for peers in listed.values() for peer in peers)
    removed = tuple(peer for peer in everyone if peer.packed in own)
    targets = [peer for peer in everyone if peer.packed not in own]
    groups = [peer for peer in targets if peer.packed in broadcasts or peer.is_multicast]
    by_family = {f.name: tuple(p for p in targets if family_of(p.packed) is f) for f in FAMILIES}
    sources: dict[str, bytes] = {}
    for peer in removed:  # peers know this node by the address in their list: send from it
        sources.setdefault(family_of(peer.packed).name, peer.packed)
    node = {peer.packed for peer in removed}
    node |= {kernel_source(p) for name, peers in by_family.items() if name not in sources for p in peers} - {b""}
    networks = [*ignored, *(network for group in groups for network in networks_of(group, local))]
    view = View(
        own=frozenset(own),
        node=frozenset(node),
        groups=frozenset(broadcasts | {group.packed for group in groups}),
        peers=frozenset(peer.packed for peer in targets),
        networks=Membership(networks),
    )
    per_source = {name: sum(peer.packed not in own for peer in peers) for name, peers in listed.items()}
    return Arrangement(by_family, removed, sources, per_source, view)


# -----------------------------------------------------------------------------
# Section: service -- HTTP, and the loop that ties everything together


class StatusServer(http.server.ThreadingHTTPServer):
    """/metrics, /healthz and /readyz; at most CONNECTIONS_MAX at a time, five seconds for each."""

    daemon_threads = True
    CONNECTIONS_MAX = 16

    def __init__(self, address: str, port: int, render: Callable[[], Optional[bytes]],
                 healthy: Callable[[], bool], ready: Callable[[], bool]) -> None:  # fmt: skip
        self.render, self.healthy, self.ready = render, healthy, ready
        self._places = threading.BoundedSemaphore(self.CONNECTIONS_MAX)
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        super().__init__((address, port), StatusHandler)

    def server_bind(self) -> None:
        """Bind; `::` takes IPv4 as well."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super(http.server.HTTPServer, self).server_bind()  # not HTTPServer's: it would ask DNS for our name

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve in a thread, or hang up where all places are taken."""
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve one connection and give its place back."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up or stalls is no news."""


class StatusHandler(http.server.BaseHTTPRequestHandler):
    """Answers GET on the three paths; one request per connection."""

    timeout = 5.0
    server: StatusServer
    server_version = "pmtud"
    sys_version = ""

    def do_GET(self) -> None:
        """Serve /metrics, /healthz or /readyz."""
        if self.path == "/metrics":
            body = self.server.render()
            if body is None:
                self._answer(503, b"prometheus-client is not installed: pip install prometheus-client\n")
            else:
                self._answer(200, body, "text/plain; version=0.0.4; charset=utf-8")
        elif self.path in ("/healthz", "/readyz"):
            good = self.server.healthy() if self.path == "/healthz" else self.server.ready()
            self._answer(200 if good else 503, b"ok\n" if good else b"not ok\n")
        else:
            self._answer(404, b"/metrics /healthz /readyz\n")

    def _answer(self, code: int, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are not logged."""


def metrics_renderer(counters: Counters) -> Callable[[], Optional[bytes]]:
    """A function that returns the text exposition, or None without prometheus-client; imports it at first use."""

    def render() -> Optional[bytes]:
        try:
            from prometheus_client import exposition, registry
        except ImportError:
            return None
        ours = registry.CollectorRegistry()
        ours.register(Collector(counters))
        return exposition.generate_latest(ours)

    return render


def open_status_server(config: Config, *serve: Callable[[], Any]) -> StatusServer:
    """The HTTP server on --metrics-addr, by default on all addresses of both families; raises OSError."""
    if config.metrics_addr:
        return StatusServer(config.metrics_addr, config.metrics_port, *serve)
    try:
        return StatusServer("::", config.metrics_port, *serve)
    except OSError as problem:
        if problem.errno == errno.EADDRINUSE:
            raise
        return StatusServer("0.0.0.0", config.metrics_port, *serve)  # IPv6 is switched off here


class Outlet:
    """The two ways out for one family: delivery to this node's own stack, and copies to its peers."""

    def __init__(self, family: Family, config: Config, arrangement: Arrangement, counts: CopyCounts) -> None:
        self.family = family
        peers = arrangement.targets[family.name]
        source = arrangement.sources.get(family.name, b"")
        with contextlib.ExitStack() as stack:
            self.delivery: IcmpSocket = stack.enter_context(IcmpSocket(family, MARK_DELIVER, 0, source))
            self.copies: IcmpSocket = stack.enter_context(IcmpSocket(family, MARK_COPY, config.ttl, source))
            self.fanout: Optional[Fanout] = None
            reachable = []
            for peer in peers:
                try:
                    sockaddr(peer)
                    if peer.is_multicast:
                        self.copies.join(peer)
                    reachable.append(peer)
                except OSError as problem:
                    log("warning", "peer left out", peer=peer, problem=problem.strerror)
            if reachable:
                self.fanout = Fanout(self.copies, reachable, counts)
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Close both sockets."""
        self._stack.close()


class Service:
    """The running daemon: owns every descriptor, turns the loop, acts on each error as decide() says."""

    BATCH = 64  # datagrams per turn, so that signals and timers are never starved by a flood
    TICK = 1.0  # seconds between housekeeping
    SLOW_TICKS = 10  # every tenth: default route, guard
    NEWS_PER_MINUTE = 20  # lines about routers and destinations not seen before

    def __init__(self, config: Config) -> None:
        self.config = config
        self.counters = Counters()
        self.policy = Policy(config, View())
        self.ifaces: tuple[str, ...] = ()
        self.guarded: dict[str, bool] = {}  # by family name, as last probed
        self._outlets: dict[str, Outlet] = {}
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self.peers = Peers(config, self.counters, self.wake)
        self._stack = contextlib.ExitStack()
        self._firewall: Optional[Firewall] = None
        self._stopping = self._hangup = self._stale = False
        self._ticks = 0
        self._turned = time.monotonic()
        self._known = Recent(3600.0, capacity=1024)
        self._news_left = self.NEWS_PER_MINUTE
        self._summarized = self.counters.summary()
        self._summary_at = self._turned + 60.0

    def wake(self) -> None:
        """Make the loop look at the peers again; callable from any thread or signal handler."""
        self._stale = True
        with contextlib.suppress(OSError):
            os.write(self._wake_write, b"!")

    # -- start and stop

    def open(self) -> None:
        """Open everything and say what will be done; raises PmtudError before anything is left behind."""
        config = self.config
        with contextlib.ExitStack() as stack:
            stack.callback(self.peers.close)
            self.peers.start()
            self.ifaces = self._choose_ifaces()
            self._nflog = stack.enter_context(Nflog(config.nflog_group))
            if config.rules == "auto":
                self._firewall = stack.enter_context(Firewall(config, self.ifaces))
            self._monitor = stack.enter_context(Netlink(NETLINK_ROUTE, RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR))
            self._monitor.socket.setblocking(False)
            stack.callback(self._close_outlets)
            self._rearrange()
            self._probe_guard()
            self._serve_status(stack)
            self._stack = stack.pop_all()
        self._announce()

    def _choose_ifaces(self) -> tuple[str, ...]:
        if not self.config.ifaces:
            found = default_route_interfaces()
            if not found and self.config.rules == "auto":
                raise PmtudError("there is no default route; name the interface errors come in on with --iface")
            return found
        existing = [name for _, name in socket.if_nameindex()]
        for name in self.config.ifaces:
            if name not in existing:
                raise UsageError(f"--iface: there is no interface {name}; there are {', '.join(existing)}")
        return self.config.ifaces

    def _serve_status(self, stack: contextlib.ExitStack) -> None:
        config = self.config
        if not config.metrics_port:
            return
        render = metrics_renderer(self.counters)
        try:
            server = open_status_server(config, render, self.healthy, self.ready)
        except OSError as problem:
            text = f"metrics port {config.metrics_port} cannot be bound ({problem.strerror})"
            if config.metrics_required:
                raise PmtudError(f"{text}; choose another with --metrics-port, 0 for none") from problem
            log("warning", f"{text}; running without metrics, choose another with --metrics-port")
            return
        stack.callback(server.server_close)
        stack.callback(server.shutdown)
        threading.Thread(target=server.serve_forever, name="http", daemon=True).start()
        threading.Thread(target=render, name="import", daemon=True).start()  # 100 ms that no scrape should wait for

    def _announce(self) -> None:
        config, arrangement = self.config, self._arrangement
        peers = [str(peer) for peers in arrangement.targets.values() for peer in peers]
        shown = ", ".join(peers[:8]) + (f" and {len(peers) - 8} more" if len(peers) > 8 else "")
        table = "the operator's NFLOG rule"
        if self._firewall:
            table = f"table inet {self._firewall.table}" + ("" if self._firewall.owned else " (not owned: old kernel)")
        log("info", f"pmtud {__version__} on {config.nodename}: errors come in on {', '.join(self.ifaces) or 'any'}, "
            f"NFLOG group {config.nflog_group}, rules: {table}")  # fmt: skip
        log("info", f"peers: {len(peers)} ({shown})" if peers else "peers: none, standalone: local rescue only")
        if arrangement.removed:
            log("info", f"own address removed from peers: {', '.join(map(str, arrangement.removed))}")
        log("info", f"limits: one per flow each {config.flow_interval:g} s, {config.source_rate:g}/s per router, "
            f"{config.rate:g}/s in all; MTU at least {config.min_mtu[0]} (IPv4), {config.min_mtu[1]} (IPv6)"
            + ("; dry run: nothing is sent" if config.dry_run else ""))  # fmt: skip

    def close(self) -> None:
        """Undo everything open() did."""
        self._stack.close()
        for descriptor in (self._wake_read, self._wake_write):
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def _close_outlets(self) -> None:
        for outlet in self._outlets.values():
            outlet.close()
        self._outlets = {}

    # -- state that changes while running

    def _rearrange(self) -> None:
        """Work out peers and addresses anew and put them in force."""
        arrangement = arrange(self.peers.listed(), local_addresses(), self.config.ignore_networks)
        outlets: dict[str, Outlet] = {}
        for family in FAMILIES:
            labels = [str(peer) for peer in arrangement.targets[family.name]]
            counts = CopyCounts(labels, self.counters.copies.get(family.name))
            try:
                outlets[family.name] = Outlet(family, self.config, arrangement, counts)
                self.counters.copies[family.name] = counts
            except OSError as problem:  # this family is switched off in the kernel, or the source just vanished
                if labels:
                    log("warning", f"no {family.name} sockets", problem=problem.strerror)
        old, self._outlets, self._arrangement = self._outlets, outlets, arrangement
        self.policy.view = arrangement.view
        self.counters.peers = arrangement.per_source
        for outlet in old.values():
            outlet.close()

    def _probe_guard(self) -> None:
        """Learn whether the guard is in force; without it only errors for local addresses are delivered."""
        for family in FAMILIES:
            if family.name not in self._outlets or not self.ifaces:
                continue
            before, holds = self.guarded.get(family.name), guard_holds(family, self.ifaces[0])
            if holds is False and self._firewall:
                log("warning", "our rules are gone, someone flushed them: installing them again", family=family.name)
                self._replace_rules()
                holds = guard_holds(family, self.ifaces[0])
            if holds is False and before is not False:
                log("warning", f"no guard on mark {MARK_DELIVER:#x}: pods behind NAT will not be served; "
                    "install the output rules that `pmtud.py rules` prints", family=family.name)  # fmt: skip
            if holds is not None:
                self.guarded[family.name] = holds

    def _replace_rules(self) -> None:
        if not self._firewall:
            return
        try:
            self._firewall.replace(self.ifaces)
        except PmtudError as problem:
            log("warning", "cannot replace our rules", problem=str(problem))

    def _conntrack_appeared(self) -> bool:
        """Put the conntrack rule in place if conntrack came into use after our start (kube-proxy starts after us)."""
        if not self._firewall or self._firewall.conntrack or not conntrack_in_use():
            return False
        log("info", "conntrack came into use: the guard now asks it who owns a flow")
        self._replace_rules()
        return True

    def _tick(self, now: float) -> None:
        """Housekeeping, once a second."""
        self._ticks += 1
        if self._ticks % self.SLOW_TICKS == 0:
            self._probe_guard()
            self._follow_default_route()
        if now >= self._summary_at:
            self._summarize(now)

    def _follow_default_route(self) -> None:
        if self.config.ifaces:
            return
        with contextlib.suppress(PmtudError, OSError):
            found = default_route_interfaces()
            if found and found != self.ifaces:
                log("info", "the default route moved", before=",".join(self.ifaces), now=",".join(found))
                self.ifaces = found
                self._replace_rules()

    def _summarize(self, now: float) -> None:
        totals = self.counters.summary()
        changes = {name: count - self._summarized.get(name, 0) for name, count in totals.items()}
        if any(changes.values()):
            log("info", "last minute", **{name: count for name, count in changes.items() if count})
        self._summarized, self._summary_at, self._news_left = totals, now + 60.0, self.NEWS_PER_MINUTE

    def healthy(self) -> bool:
        """Whether the loop turned within the last ten seconds."""
        return time.monotonic() - self._turned < 10.0

    def ready(self) -> bool:
        """Whether errors can come in and go out: group bound, rules in place, every peer source answered."""
        guarded = any(self.guarded.values()) or self.config.rules == "off"
        return self.healthy() and guarded and self.peers.answered()

    # -- the loop

    def run(self) -> None:
        """Turn until SIGTERM or SIGINT."""
        poll = select.poll()
        for descriptor in (self._nflog, self._monitor, self._wake_read):
            poll.register(descriptor, select.POLLIN)
        tick_at = time.monotonic() + self.TICK
        while not self._stopping:
            ready = {number for number, _ in poll.poll(max(0, int((tick_at - time.monotonic()) * 1000) + 1))}
            self._turned = now = time.monotonic()
            if self._wake_read in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake_read, 4096)
            if self._monitor.fileno() in ready:
                self._drain_monitor()
            if self._hangup:
                self._hangup = False
                log("info", "SIGHUP: reading the peer sources again")
                self.peers.reload()
            if self._nflog.fileno() in ready:
                self._handle_batch(now)
            if now >= tick_at:
                tick_at = now + self.TICK
                self._tick(now)
            if self._stale:
                self._stale = False
                self._peers_changed()

    def stop(self, *_: object) -> None:
        """Signal handler: end the loop."""
        self._stopping = True

    def hang_up(self, *_: object) -> None:
        """Signal handler: look at the peer sources again."""
        self._hangup = True

    def handle_signals(self) -> None:
        """SIGTERM and SIGINT stop, SIGHUP reloads; each wakes the loop through the pipe."""
        signal.signal(signal.SIGTERM, self.stop)
        signal.signal(signal.SIGINT, self.stop)
        signal.signal(signal.SIGHUP, self.hang_up)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)

    def _drain_monitor(self) -> None:
        """An address came or went: rearrange at the end of this turn, once for a burst of changes."""
        with contextlib.suppress(OSError):
            while True:
                self._monitor.socket.recv(NETLINK_BUFFER_BYTES)
        self._stale = True

    def _peers_changed(self) -> None:
        before = self._arrangement
        try:
            self._rearrange()
        except (PmtudError, OSError) as problem:
            log("warning", "cannot put the new peers in force, the old ones stay", problem=str(problem))
            return
        if self._arrangement.targets != before.targets:
            log("info", "peers changed", **{f"peers_{name}": len(p) for name, p in self._arrangement.targets.items()})

    # -- the packet's way

    def _handle_batch(self, now: float) -> None:
        """Take what arrived, decide on each error, send the copies together, then deliver here."""
        counters = self.counters
        copies: dict[str, list[bytes]] = {family.name: [] for family in FAMILIES}
        deliveries: list[tuple[MtuError, bool]] = []
        logged = self._nflog.read(self.BATCH)
        for packet, _, rpf in logged:
            error = parse(packet)
            if isinstance(error, Reason):
                family = IPV6 if packet and packet[0] >> 4 == 6 else IPV4
                counters.received[family.name, Origin.ROUTER.value] += 1
                counters.dropped[error] += 1
                continue
            origin, what = decide(error, self.policy, now)
            counters.received[error.family.name, origin.value] += 1
            if isinstance(what, Reason):
                counters.dropped[what] += 1
                self._explain_drop(error, what, now)
                continue
            self._note(error, origin, now)
            if self.config.dry_run:
                counters.dropped[Reason.DRY_RUN] += 1
                log("info", f"dry run: would {what.value}", origin=origin.value, error=error)
                continue
            replicate = what is Action.REPLICATE and self._has_peers(error.family)
            deliver = origin is Origin.PEER or self.config.rescue
            counters.acted["replicate" if replicate else "deliver" if deliver else "none"] += 1
            if replicate:
                copies[error.family.name].append(error.icmp)
            if deliver:
                deliveries.append((error, rpf))
        for name, bodies in copies.items():
            if bodies:
                self._replicate(name, bodies)
        for error, rpf in deliveries:
            self._deliver(error, rpf)
        counters.nflog_lost = self._nflog.lost
        if logged:
            counters.last_error_received = time.time()
            counters.batch_duration.observe(time.monotonic() - now)

    def _has_peers(self, family: Family) -> bool:
        outlet = self._outlets.get(family.name)
        return outlet is not None and outlet.fanout is not None

    def _replicate(self, family_name: str, bodies: Sequence[bytes]) -> None:
        fanout = self._outlets[family_name].fanout
        assert fanout is not None  # _has_peers() said so in this same turn
        for peer, code in fanout.send(bodies):
            log("debug", "copy not sent", peer=peer, problem=os.strerror(code))

    def _deliver(self, error: MtuError, rpf: bool) -> None:
        """Give the error to this node's own stack; the guard decides whether it is the owner."""
        name, view = error.family.name, self.policy.view
        outlet = self._outlets.get(name)
        if outlet is None or not (self.guarded.get(name) or error.quoted_src in view.own):
            result = "error"  # without a guard the error could leave this node towards the VIP
        else:
            code = outlet.delivery.deliver(error.icmp, error.quoted_src)
            if code == errno.EPERM and self._conntrack_appeared():
                code = outlet.delivery.deliver(error.icmp, error.quoted_src)
            result = {0: "owner", errno.EPERM: "not_owner"}.get(code, "error")
            if result == "error":
                log("debug", "not delivered", error=error, problem=os.strerror(code))
        self.counters.delivered[name, result] += 1
        self.counters.rpf_rescued += rpf and result == "owner"

    def _note(self, error: MtuError, origin: Origin, now: float) -> None:
        """Count the MTU; one log line for a (router, destination, MTU) not seen in the last hour."""
        self.counters.reported_mtu.observe(error.mtu)
        if LOGGER.isEnabledFor(logging.DEBUG):
            log("debug", "error", origin=origin.value, error=error)
        key = (error.src, error.quoted_dst, error.mtu)
        if origin is Origin.PEER or self._known.get(key) is not None:
            return
        self._known.put(key, now, now)
        if self._news_left:
            self._news_left -= 1
            log("info", "a router reports an MTU", router=ipaddress.ip_address(error.src),
                destination=ipaddress.ip_address(error.quoted_dst), mtu=error.mtu)  # fmt: skip

    def _explain_drop(self, error: MtuError, reason: Reason, now: float) -> None:
        if LOGGER.isEnabledFor(logging.DEBUG):
            log("debug", "dropped", reason=reason.value, error=error)
        if reason is Reason.MISADDRESSED and self._known.get(error.src) is None:
            self._known.put(error.src, now, now)
            if self._news_left:
                self._news_left -= 1
                source = ipaddress.ip_address(error.src)
                log("warning", f"dropped an error that is neither a router's nor a peer's copy; if {source} is an "
                    f"address of a peer, add it to --peers or --ignore-networks", error=error)  # fmt: skip


# -----------------------------------------------------------------------------
# Section: command line -- options, environment, exit codes


class Parser(argparse.ArgumentParser):
    """Errors are one line and exit 2."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise UsageError(message)


def option_type(parse_value: Callable[[str], Any]) -> Callable[[str], Any]:
    """Make argparse show a parser's own message."""

    def convert(text: str) -> Any:
        try:
            return parse_value(text)
        except ValueError as problem:
            raise argparse.ArgumentTypeError(str(problem)) from None

    return convert


def parse_peer_items(text: str) -> list[Union[PeerAddress, str]]:
    """The items of one --peers value: addresses, and the texts of sources."""
    items: list[Union[PeerAddress, str]] = []
    for item in split_list(text):
        if re.match("[a-z]+:", item) and not re.match("[0-9a-f]*:[0-9a-f]*:", item):
            open_source(item)
            items.append(item)
            continue
        try:
            items.append(parse_peer(item))
        except ValueError as problem:
            raise ValueError(f"{problem}; a peer is an address or file:PATH") from None
    return items


EPILOG = """\
examples:
  sudo python3 pmtud.py                                   local rescue only (strict rp_filter)
  sudo python3 pmtud.py --peers 10.0.0.11,10.0.0.12       copies to these nodes; this node's own address may be listed
  sudo python3 pmtud.py --peers 10.0.0.255                one broadcast copy reaches the whole subnet
  sudo python3 pmtud.py --peers file:/etc/pmtud/peers     one address per line, read again when it changes
  sudo python3 pmtud.py --dry-run --log-level debug       look, send nothing
  python3 pmtud.py rules --iface eth0                     the rules it installs, for pasting

Every option can come from the environment: --flow-interval from PMTUD_FLOW_INTERVAL, and so on.
The command line wins. Exit codes: 0 clean stop, 1 runtime failure, 2 usage or configuration.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Every option of the daemon; no defaults here, Config has them."""
    add = parser.add_argument
    add("--peers", action="append", metavar="LIST", type=option_type(parse_peer_items),
        help="nodes to send copies to: addresses, a subnet broadcast address, file:PATH; comma-separated, repeatable")
    add("--iface", action="append", metavar="NAME", type=option_type(parse_iface),
        help="where errors come in; repeatable (default: the interface of the default route)")
    add("--nodename", metavar="NAME", help="this node's name in the log (default: the host name)")
    add("--nflog-group", metavar="N", type=option_type(number_between(0, 65535)), help="NFLOG group (default: 33)")
    add("--metrics-port", metavar="PORT", type=option_type(number_between(0, 65535)),
        help="port of /metrics, /healthz and /readyz; 0: none (default: 30040)")
    add("--metrics-addr", metavar="ADDR", type=option_type(lambda text: str(ipaddress.ip_address(text))),
        help="address to serve them on (default: all)")
    add("--ttl", metavar="N", type=option_type(number_between(1, 255)), help="TTL or hop limit of copies (default: 10)")
    add("--ignore-networks", action="append", metavar="LIST", type=option_type(parse_networks),
        help="networks of the cluster besides the peers: errors from there are not replicated; repeatable")
    add("--rules", choices=("auto", "off"),
        help="auto: install our own nftables table; off: your NFLOG rule feeds us (default: auto)")
    add("--no-rescue", action="store_true", help="do not deliver a router's error on the node that receives it")
    add("--service-networks", action="append", metavar="LIST", type=option_type(parse_networks),
        help="act only on errors about packets sent from these networks (default: all); repeatable")
    add("--ports", action="append", metavar="LIST", type=option_type(parse_ports),
        help="act only on errors about packets sent from these ports (default: all); repeatable")
    add("--min-mtu", metavar="V4[,V6]", type=option_type(parse_min_mtu),
        help="smallest MTU believed, in bytes (default: 552,1280)")
    add("--flow-interval", metavar="SECONDS", type=option_type(number_between(0, 3600, float)),
        help="act on one error per flow and MTU in this time; 0: on each (default: 0.1)")
    add("--source-rate", metavar="N", type=option_type(number_between(0, 1e9, float)),
        help="errors acted on per second from one router or peer; 0: unlimited (default: 500)")
    add("--rate", metavar="N", type=option_type(number_between(0, 1e9, float)),
        help="errors acted on per second, from routers and from peers each; 0: unlimited (default: 1000)")
    add("--dry-run", action="store_true", help="send nothing; count and log what would be done")
    add("--log-level", choices=("debug", "info", "warning", "error"), help="(default: info)")
    add("--log-format", choices=("text", "json"), help="(default: text)")  # fmt: skip


def build_parser() -> Parser:
    """The whole command line; every default is SUPPRESS, so that what was given can be told from what was not."""
    parser = Parser(
        prog="pmtud.py",
        description="Make Path MTU Discovery work behind ECMP and strict reverse path filtering.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("command", nargs="?", choices=("run", "rules"), default="run",
                        help="run: the daemon (default); rules: print the rules it would install")  # fmt: skip
    parser.add_argument("--version", action="version", version=f"pmtud {__version__}")
    add_options(parser)
    return parser


def environment_options(parser: Parser, environ: Mapping[str, str]) -> dict[str, Any]:
    """The options set by PMTUD_* variables; an error names the variable."""
    found: dict[str, Any] = {}
    for action in parser._actions:
        if not action.option_strings or action.dest in ("help", "version"):
            continue
        variable = "PMTUD_" + action.dest.upper()
        text = environ.get(variable, "").strip()
        if not text:
            continue
        option = action.option_strings[0]
        if action.nargs == 0:
            if text.lower() not in ("1", "true", "yes", "on", "0", "false", "no", "off"):
                raise UsageError(f"{variable}: {text!r} is not yes or no")
            arguments = [option] if text.lower() in ("1", "true", "yes", "on") else []
        else:
            arguments = [f"{option}={text}"]
        try:
            found.update(vars(parser.parse_args(arguments)))
        except UsageError as problem:
            raise UsageError(str(problem).replace(f"argument {option}", variable)) from None
    return found


def config_from(options: Mapping[str, Any]) -> Config:
    """The Config that options amount to; raises UsageError where they contradict each other."""
    values = {name: value for name, value in options.items() if name not in ("command", "no_rescue")}
    for name in ("ignore_networks", "service_networks", "iface"):
        if name in values:
            values[name] = tuple(item for group in values[name] for item in group)
    if "ports" in values:
        values["ports"] = frozenset().union(*values["ports"])
    items = [item for group in values.pop("peers", ()) for item in group]
    values["ifaces"] = values.pop("iface", ())
    values["peers"] = tuple(dict.fromkeys(item for item in items if isinstance(item, PeerAddress)))
    values["peer_sources"] = tuple(dict.fromkeys(item for item in items if isinstance(item, str)))
    values.setdefault("nodename", socket.gethostname())
    values["metrics_required"] = bool(options.get("metrics_port"))
    values["rescue"] = not options.get("no_rescue", False)
    if not values["rescue"] and not items:
        raise UsageError("--no-rescue without --peers leaves nothing to do; give --peers")
    return Config(**values)


def parse_args(argv: Sequence[str], environ: Mapping[str, str]) -> tuple[str, Config]:
    """The command (run or rules) and its configuration; raises UsageError."""
    parser = build_parser()
    given = vars(parser.parse_args(list(argv)))
    options = {**environment_options(parser, environ), **given}
    return given["command"], config_from(options)


def print_rules(config: Config) -> None:
    """The rules the daemon would install, as nft and as iptables commands, on standard output."""
    ifaces = config.ifaces or default_route_interfaces()
    if not ifaces:
        raise PmtudError("there is no default route; name the interface errors come in on with --iface")
    rules = [*nflog_rules(config, ifaces), *guard_rules(conntrack=True)]
    print("# nftables: save as a file and run `nft -f FILE`, then start pmtud.py with --rules off")
    print(f"table inet pmtud_{config.nflog_group} {{")
    for chain in CHAINS:
        print(f"\tchain {chain.name} {{" + (f"\n\t\t{chain.text}" if chain.text else ""))
        for rule in rules:
            if rule.chain == chain.name:
                print(f"\t\t{rule.text}")
        print("\t}")
    print("}\n\n# or iptables (nft or legacy); `-m conntrack` starts connection tracking where nothing else has")
    for line in iptables_rules(config, ifaces):
        print(line)


def iptables_rules(config: Config, ifaces: Sequence[str]) -> list[str]:
    """The same rules as iptables and ip6tables commands; reverse path verdicts by the rpfilter match."""
    lines = []
    for command, match in (
        ("iptables", "-p icmp -m icmp --icmp-type 3/4"),
        ("ip6tables", "-p icmpv6 -m icmp6 --icmpv6-type packet-too-big"),
    ):
        for iface in ifaces:
            rule = f"{command} -t raw -A PREROUTING -i {shlex.quote(iface)} {match}"
            target = f"-j NFLOG --nflog-group {config.nflog_group}"
            lines.append(f'{rule} -m rpfilter --invert {target} --nflog-prefix "{RPF_PREFIX}"')
            lines.append(f"{rule} -m rpfilter {target}")
        lines.append(f"{command} -t raw -A OUTPUT -m mark --mark {MARK_COPY:#x} -j CT --notrack")
        lines.append(f"{command} -t mangle -A OUTPUT -m mark --mark {MARK_DELIVER:#x} "
                     "-m conntrack ! --ctstate RELATED -m addrtype ! --dst-type LOCAL -j DROP")  # fmt: skip
    return lines


def check_metrics_library(config: Config) -> None:
    """Without prometheus-client: exit 2 if metrics were asked for, a warning if not."""
    import importlib.util

    if not config.metrics_port or importlib.util.find_spec("prometheus_client"):
        return
    if config.metrics_required:
        raise UsageError("--metrics-port needs prometheus-client: pip install prometheus-client, or --metrics-port 0")
    log("warning", "prometheus-client is not installed: running without metrics (pip install prometheus-client)")


def run(config: Config) -> None:
    """The daemon: open, turn until a signal, close."""
    set_up_logging(config.log_level, config.log_format)
    check_metrics_library(config)
    service = Service(config)
    service.handle_signals()
    try:
        service.open()
        service.run()
        log("info", "stopped", **{name: count for name, count in service.counters.summary().items() if count})
    finally:
        signal.set_wakeup_fd(-1)
        service.close()


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the program; the exit code. Unexpected exceptions keep their traceback."""
    try:
        command, config = parse_args(sys.argv[1:] if argv is None else argv, os.environ)
        if command == "rules":
            print_rules(config)
        else:
            run(config)
    except PmtudError as problem:
        print(f"pmtud: {problem}", file=sys.stderr)
        return problem.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
