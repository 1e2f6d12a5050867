#!/usr/bin/env python3
"""pmtud makes Path MTU Discovery work on nodes behind ECMP and strict reverse path filtering.

A router that cannot forward a packet because it is too big tells the sender so, with an ICMP
error: IPv4 "fragmentation needed" (type 3 code 4), IPv6 "packet too big" (type 2 code 0). When
the sender is a service address shared by many nodes, the fabric delivers that error to any one
of them; when the router answers from its management address, strict rp_filter drops it on the
right one. Either way the connection hangs and nobody logs why. This program runs on each node:

    router R --error (src R, dst VIP)--> node A
                                          | PREROUTING, before rp_filter
                                          v
                                   NFLOG group 33 --> pmtud: parse, classify, validate, limit
                                                        |                      |
        copy (src A, dst B, same ICMP bytes) <----------+                      v
                   |                                 deliver (src A, dst VIP), marked
                   v                                                           |
    node B: PREROUTING --> NFLOG --> pmtud: "a copy"                 OUTPUT: conntrack, guard
                                      |                                        |
                                      v                                        v
                          deliver (src B, dst VIP), marked          the socket or pod that owns
                                      |                             the flow learns its MTU; not
                                      +--> OUTPUT, as on A          the owner: dropped (EPERM)

Delivery sends the error again from this node, with outer destination = quoted source (the VIP).
That passes through OUTPUT: conntrack sees it as RELATED and NAT takes it to the pod behind the
VIP, and locally generated packets are exempt from rp_filter. Where no route leads to the VIP, the
packet is routed to this node itself, which NAT does not mind. The guard, a few nftables rules on
our mark, drops what this node does not own before it can leave.

What it promises: an error is replicated once, by the node a router sent it to, never by a node
that got it as a copy, so there can be no loop; no packet to a service address leaves a node
that does not own the flow; no sysctl is changed; the nftables table is owned by this process and
the kernel removes it when the process ends, SIGKILL included; no packet ends the daemon.

What it does not do: invent MTU values, clamp MSS, read or change payload, help where routers
send no errors at all (see tcp_mtu_probing for those).

Privileges: CAP_NET_ADMIN (netlink, nftables, marks) and CAP_NET_RAW (raw sockets); root drops all
others itself.
Needs Linux 4.17 or later and Python 3.9 or later; prometheus-client only for /metrics.
"""

# /// script
# requires-python = ">=3.9"
# dependencies = ["prometheus-client"]
# ///
from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__" and not {"check", "rules"}.intersection(sys.argv):
    # Before the other imports, which take a second where there is no bytecode: the kernel drops a
    # signal to process 1 of a container while there is no handler. So far nothing is open; run()
    # sets the handlers that close everything.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the peers have not been read so far
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(0))

import argparse
import contextlib
import ctypes
import enum
import errno
import fnmatch
import http.client
import http.server
import io
import ipaddress
import json
import logging
import math
import platform
import random
import re
import select
import shlex
import socket
import socketserver
import ssl
import stat
import struct
import threading
import time
import urllib.parse
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate, islice, product
from typing import Any, Callable, NamedTuple, NoReturn, Optional, Union

__version__ = "0.2.0"

# -----------------------------------------------------------------------------
# Section: constants -- names and layouts of the kernel's headers and the RFCs

# linux/netlink.h
NETLINK_ROUTE = 0
NETLINK_NETFILTER = 12
NLM_F_REQUEST = 0x001
NLM_F_ACK = 0x004
NLM_F_DUMP = 0x300
NLM_F_CREATE = 0x400
NLM_F_APPEND = 0x800
NLMSG_ERROR = 2
NLMSG_DONE = 3
NLA_F_NESTED = 0x8000
NLA_TYPE_MASK = 0x3FFF
NLMSG_ALIGNTO = 4
NLMSGHDR = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port id
NLMSG_HEAD = struct.Struct("=IH")  # the first two of these
NLMSG_HDRLEN = NLMSGHDR.size
NLATTR = struct.Struct("=HH")  # struct nlattr: length, type
NLA_HDRLEN = NLATTR.size
NLA_TYPE_OFFSET = 2  # in struct nlattr
NETLINK_BUFFER_BYTES = 1 << 16


class iovec(ctypes.Structure):
    """struct iovec of linux/uio.h; c_char_p keeps the bytes object it points into alive."""

    _fields_ = [("iov_base", ctypes.c_char_p), ("iov_len", ctypes.c_size_t)]


# struct mmsghdr of sys/socket.h, which begins with a struct msghdr: msg_name, msg_namelen, msg_iov,
# msg_iovlen, msg_control, msg_controllen, msg_flags, filled up to a multiple of a pointer's size;
# then msg_len, again so. A packed one takes 1 us to make where a ctypes.Structure takes 5.
MMSGHDR = struct.Struct("@PIPNPNi0PI0P")
UIO_MAXIOV = 1024  # linux/uio.h: the most messages one sendmmsg() takes

# linux/netfilter/nfnetlink.h
NFNL_SUBSYS_ULOG = 4
NFNL_SUBSYS_NFTABLES = 10
NFNL_MSG_BATCH_BEGIN = 0x10
NFNL_MSG_BATCH_END = 0x11
NFGENMSG = struct.Struct("!BBH")  # struct nfgenmsg: family, version 0, resource id

# linux/netfilter/nfnetlink_log.h
NFLOG_PACKET = NFNL_SUBSYS_ULOG << 8 | 0  # NFULNL_MSG_PACKET
NFLOG_CONFIG = NFNL_SUBSYS_ULOG << 8 | 1  # NFULNL_MSG_CONFIG
NFULA_PAYLOAD = 9
NFULA_PREFIX = 10
NFULA_SEQ = 12
NFULA_CFG_CMD = 1
NFULA_CFG_MODE = 2
NFULA_CFG_NLBUFSIZ = 3
NFULA_CFG_TIMEOUT = 4  # in hundredths of a second
NFULA_CFG_QTHRESH = 5
NFULA_CFG_FLAGS = 6
NFULNL_CFG_CMD_BIND = 1
NFULNL_COPY_PACKET = 2
NFULNL_CFG_F_SEQ = 1
NFULNL_MODE = struct.Struct("!IBx")  # struct nfulnl_msg_config_mode: copy range, copy mode
NFULNL_PACKET_HDR_LEN = 4  # struct nfulnl_msg_packet_hdr: protocol, hook, padding

# linux/netfilter.h
NFPROTO_INET = 1
NFPROTO_IPV4 = 2
NFPROTO_IPV6 = 10
NF_DROP = 0
NF_ACCEPT = 1
NF_INET_PRE_ROUTING = 0
NF_INET_LOCAL_OUT = 3
# Of hooks with equal priority the one registered last runs first, so at the usual ones (raw -300,
# mangle -150) others get before us: a filter that drops an error, a rule that overwrites our mark.
NF_IP_PRI_BEFORE_RAW = -399  # directly behind defragmentation, NF_IP_PRI_CONNTRACK_DEFRAG
NF_IP_PRI_BEHIND_RAW = -250
NF_IP_PRI_BEHIND_CONNTRACK = -199  # NF_IP_PRI_CONNTRACK is -200, NAT of destinations -100

# linux/netfilter/nf_tables.h: messages, then the attributes of each object and expression, which
# the kernel numbers from 1 in this order
NFT_MSG_NEWTABLE = 0
NFT_MSG_GETTABLE = 1
NFT_MSG_DELTABLE = 2
NFT_MSG_NEWCHAIN = 3
NFT_MSG_NEWRULE = 6
NFT_MSG_NEWSET = 9
NFT_MSG_NEWSETELEM = 12
NFT_MSG_NEWOBJ = 18
NFT_MSG_GETOBJ = 19
ListAttr = enum.IntEnum("ListAttr", "ELEM")
DataAttr = enum.IntEnum("DataAttr", "VALUE VERDICT")
VerdictAttr = enum.IntEnum("VerdictAttr", "CODE CHAIN")
TableAttr = enum.IntEnum("TableAttr", "NAME FLAGS")
ChainAttr = enum.IntEnum("ChainAttr", "TABLE HANDLE NAME HOOK POLICY USE TYPE")
HookAttr = enum.IntEnum("HookAttr", "HOOKNUM PRIORITY")
RuleAttr = enum.IntEnum("RuleAttr", "TABLE CHAIN HANDLE EXPRESSIONS")
SetAttr = enum.IntEnum(
    "SetAttr", "TABLE NAME FLAGS KEY_TYPE KEY_LEN DATA_TYPE DATA_LEN POLICY DESC ID TIMEOUT"
)
SetDescAttr = enum.IntEnum("SetDescAttr", "SIZE")
ElemAttr = enum.IntEnum("ElemAttr", "KEY")
ElemListAttr = enum.IntEnum("ElemListAttr", "TABLE SET ELEMENTS")
ExprAttr = enum.IntEnum("ExprAttr", "NAME DATA")
BitwiseAttr = enum.IntEnum("BitwiseAttr", "SREG DREG LEN MASK XOR")
CmpAttr = enum.IntEnum("CmpAttr", "SREG OP DATA")
CtAttr = enum.IntEnum("CtAttr", "DREG KEY")
DynsetAttr = enum.IntEnum(
    "DynsetAttr", "SET_NAME SET_ID OP SREG_KEY SREG_DATA TIMEOUT EXPR PAD FLAGS EXPRESSIONS"
)
FibAttr = enum.IntEnum("FibAttr", "DREG RESULT FLAGS")
HashAttr = enum.IntEnum("HashAttr", "SREG DREG LEN MODULUS")
ImmediateAttr = enum.IntEnum("ImmediateAttr", "DREG DATA")
LimitAttr = enum.IntEnum("LimitAttr", "RATE UNIT BURST TYPE FLAGS")
LogAttr = enum.IntEnum("LogAttr", "GROUP PREFIX")
LookupAttr = enum.IntEnum("LookupAttr", "SET SREG")
MetaAttr = enum.IntEnum("MetaAttr", "DREG KEY SREG")
ObjectAttr = enum.IntEnum("ObjectAttr", "TABLE NAME TYPE DATA")
ObjrefAttr = enum.IntEnum("ObjrefAttr", "IMM_TYPE IMM_NAME")
CounterAttr = enum.IntEnum("CounterAttr", "BYTES PACKETS")
PayloadAttr = enum.IntEnum("PayloadAttr", "DREG BASE OFFSET LEN")

# linux/netfilter/nf_tables.h: values
NFT_TABLE_F_OWNER = 0x2
NFT_SET_TIMEOUT = 0x10
NFT_SET_EVAL = 0x20
NFT_GOTO = -4
NFT_RETURN = -5
NFT_REG_VERDICT = 0
NFT_REG_1 = 1
NFT_CMP_EQ = 0
NFT_CMP_NEQ = 1
NFT_META_MARK = 3
NFT_META_IIFNAME = 6
NFT_META_OIFNAME = 7
NFT_META_NFPROTO = 15
NFT_META_L4PROTO = 16
NFT_META_PKTTYPE = 19
NFT_PAYLOAD_NETWORK_HEADER = 1
NFT_PAYLOAD_TRANSPORT_HEADER = 2
NFT_FIB_RESULT_OIF = 1
NFT_FIB_RESULT_ADDRTYPE = 3
NFTA_FIB_F_SADDR = 1
NFTA_FIB_F_DADDR = 2
NFTA_FIB_F_IIF = 8
NFT_CT_STATE = 0
NFT_CT_STATUS = 2
NFT_DYNSET_OP_UPDATE = 1
NFT_DYNSET_F_EXPR = 2
NFT_LIMIT_F_INV = 1
NFT_OBJECT_COUNTER = 1
NFT_TYPE_MARK = 19  # of nft, for its listing
NF_CT_STATE_RELATED_BIT = 1 << 2
IPS_SRC_NAT = 1 << 4  # linux/netfilter/nf_conntrack_common.h
IPS_DST_NAT = 1 << 5
PACKET_HOST = 0  # linux/if_packet.h
RTN_UNICAST = 1  # linux/rtnetlink.h, and the answer of fib
RTN_LOCAL = 2
IFNAMSIZ = 16

# linux/rtnetlink.h
RTM_NEWLINK = 16
RTM_GETLINK = 18
RTM_NEWADDR = 20
RTM_GETADDR = 22
RTM_NEWROUTE = 24
RTM_GETROUTE = 26
RTM_NEWNEIGH = 28
RTM_GETNEIGH = 30
RTM_GETNEXTHOP = 106
RTMGRP_IPV4_IFADDR = 0x10
RTMGRP_IPV6_IFADDR = 0x100
RT_TABLE_MAIN = 254
RTA_DST = 1
RTA_OIF = 4
RTA_GATEWAY = 5
RTA_PRIORITY = 6
RTA_MULTIPATH = 9
RTA_VIA = 18
RTA_NH_ID = 30
IFA_ADDRESS = 1
IFA_LOCAL = 2
IFA_BROADCAST = 4
IFLA_IFNAME = 3
IFLA_MASTER = 10
IFLA_LINKINFO = 18
IFLA_INFO_KIND = 1
IFINFOMSG = struct.Struct("=BxHiII")  # struct ifinfomsg: family, type, index, flags, change
# struct ifaddrmsg: family, prefix length, flags, scope, interface index
IFADDRMSG = struct.Struct("=BBBBI")
# struct rtmsg: family, dst_len, src_len, tos, table, protocol, scope, type, flags
RTMSG = struct.Struct("=BBBBBBBBI")
RTNEXTHOP = struct.Struct("=HBBi")  # struct rtnexthop: length, flags, hops, interface index
RTNH_F_ONLINK = 4

# linux/neighbour.h
NDMSG = struct.Struct("=BxxxiHBB")  # struct ndmsg: family, interface index, state, flags, type
NDA_DST = 1
NDA_LLADDR = 2
NUD_INCOMPLETE = 0x01
NUD_FAILED = 0x20

# linux/nexthop.h
NHA_ID = 1
NHA_GROUP = 2
NHA_OIF = 5
NHA_GATEWAY = 6
NHMSG = struct.Struct("=BBBBI")  # struct nhmsg: family, scope, protocol, reserved, flags
NEXTHOP_GRP = struct.Struct("=I4x")  # struct nexthop_grp: id, then its weight

# asm-generic/socket.h, linux/in.h, linux/icmp.h, linux/in6.h, linux/icmpv6.h
SO_MARK = 36
SO_SNDBUFFORCE = 32
SO_RCVBUFFORCE = 33
IP_MTU_DISCOVER = 10
IP_RECVERR = 11
IPV6_MTU_DISCOVER = 23
PMTUDISC_DONT = 0
IP_TRANSPARENT = 19
IP_NODEFRAG = 22
IP_PKTINFO = 8
IPV6_HDRINCL = 36
IN_PKTINFO = struct.Struct("=I4s4s")  # struct in_pktinfo: interface index, source, destination
SOCKADDR_IN = struct.Struct("=H2x4s8x")  # struct sockaddr_in: family, port 0, address
SOCKADDR_IN6 = struct.Struct("=H2x4x16sI")  # struct sockaddr_in6: the same, then the scope id
SOL_RAW = 255
ICMP_FILTER = 1
ICMP6_FILTER = 1

# RFC 791, 792, 1191, 4443, 8200
ICMP_DEST_UNREACH = 3
ICMP_FRAG_NEEDED = 4
ICMPV6_PKT_TOOBIG = 2
# Version+IHL, total length, flags+fragment offset, protocol, src, dst
IPV4_HEADER = struct.Struct("!BxHxxHxBxx4s4s")
IPV4_HEADER_LEN = 20
IPV4_HEADER_MAX = 60
IPV4_TTL_AT = 8
IPV4_PROTOCOL_AT = 9
IPV4_OFFSET_MASK = 0x1FFF
IPV4_MORE_FRAGMENTS = 0x2000
IPV6_HEADER = struct.Struct("!B3xHBx16s16s")  # version+class, payload length, next header, src, dst
IPV6_HEADER_LEN = 40
IPV6_HOP_LIMIT_AT = 7
# All of it: TTL, protocol and checksum stand before the addresses
IPV4_HEAD = struct.Struct("!BBHHHBBH4s4s")
# Version+class+label, payload length, next header, hop limit, addresses
IPV6_HEAD = struct.Struct("!IHBB16s16s")
HOP_LIMIT = 64  # of deliveries, which go no further than a pod
IPV6_EXTENSIONS_MAX = 8  # RFC 8200 section 4.1 recommends an order of at most 7 headers
HOPOPTS = 0
ROUTING = 43
FRAGMENT = 44
AUTH = 51
DSTOPTS = 60
IPV6_FRAGMENT = struct.Struct("!BxH4x")  # next header, offset (13 bits) + reserved + more flag
# Type, code, checksum, unused, next-hop MTU (RFC 1191 section 4)
ICMPV4_FRAG_NEEDED = struct.Struct("!BBHxxH")
ICMPV6_TOO_BIG = struct.Struct("!BBHI")  # type, code, checksum, MTU (RFC 4443 section 3.2)
ICMP_HEADER_LEN = 8
# All of an IPv4 error that has no options: the fields of IPV4_HEADER, ICMPV4_FRAG_NEEDED,
# IPV4_HEADER and PORTS
PLAIN_IPV4_ERROR = struct.Struct("!BxHxxHxBxx4s4s H4xH BxHxxHxBxx4s4s HH")
QUOTED_TRANSPORT_MIN = 8  # RFC 792: the quoted header plus 64 bits
PORTS = struct.Struct("!HH")  # source and destination port: TCP, UDP, DCCP, SCTP
PROTOCOLS_WITH_PORTS = frozenset((6, 17, 33, 132))
IPIP = 4
SIT = 41  # IPv6 in IPv4, 6in4
GRE = 47
ESP = 50
PROTOCOLS_QUOTED = PROTOCOLS_WITH_PORTS | {IPIP, SIT, GRE, ESP}  # and the family's own ICMP
ICMP_ECHO = struct.Struct("!BxxxH")  # type, id (RFC 792, RFC 4443 section 4)
# Flags and version; with GRE_KEY and without GRE_CSUM the key (RFC 2890)
GRE_HEADER = struct.Struct("!HxxI")
GRE_CSUM = 0x8000
GRE_KEY = 0x2000
ESP_HEADER = struct.Struct("!I")  # security parameters index (RFC 4303)
IPV4_MIN_MTU = 68  # RFC 791
IPV6_MIN_MTU = 1280  # RFC 8200
IPV4_MIN_PMTU = 552  # net.ipv4.route.min_pmtu: the kernel clamps what is below it

# linux/capability.h, linux/prctl.h
_LINUX_CAPABILITY_VERSION_3 = 0x20080522
CAP_NET_ADMIN = 12
CAP_NET_RAW = 13
CAPABILITIES_MAX = 64  # two __u32 of them
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
# struct __user_cap_header_struct, then two of __user_cap_data_struct
USER_CAPS = struct.Struct("=IiIIIIII")

# On errors given to this node's own stack; bits that Kubernetes, Calico and Cilium leave alone
MARK_DELIVER = 0x2C
MARK_COPY = 0x2E  # on copies on their way to a peer
# Calico's eBPF data plane drops at tc egress what it takes for an error about no flow of its own,
# but for what has exactly this mark of its own programs (3.30, 3.32)
MARK_CALICO_BYPASS = 0x03000000
CALICO_BPF_IFACE = "bpfin.cali"  # is there while that data plane is (3.24 and later)
RPF_PREFIX = "pmtud rpf"  # log prefix of errors that strict reverse path filtering would drop
CONNTRACK_COUNT = "/proc/sys/net/netfilter/nf_conntrack_count"
NFLOG_INSTANCES = "/proc/net/netfilter/nfnetlink_log"

# -----------------------------------------------------------------------------
# Section: errors -- what ends the program, and the one name for each dropped packet


class PmtudError(Exception):
    """A failure with a one-line message that says what to do; ends the program with exit_code."""

    exit_code = 1


class NoDefaultRoute(PmtudError):
    """Nothing says where errors come in."""

    def __str__(self) -> str:
        return "there is no default route; name the interface errors come in on with --iface"


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
    """Why an error was dropped.

    The label in the metric, the word in the log, the name in the test.
    """

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
    CIRCLING = "circling"
    LIMITED_FLOW = "limited_flow"
    LIMITED_SOURCE = "limited_source"
    LIMITED_TOTAL = "limited_total"
    DRY_RUN = "dry_run"


# -----------------------------------------------------------------------------
# Section: options -- one table, the parsers of their values, and the record they fill

Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]
PEERS_MAX = 16384  # a bound for every list of peers; beyond it use a subnet broadcast address
PEER_KINDS = "an address, a host name, dns:NAME, file:PATH or kube:nodes[?SELECTOR]"
# RFC 1123 section 2.1; an all-numeric last label would be an address
HOST_LABEL = "(?!-)[A-Za-z0-9-]{1,63}(?<!-)"
HOST_NAME = re.compile(rf"(?=.{{1,253}}\.?\Z)(?:{HOST_LABEL}\.)*(?![0-9]+\.?\Z){HOST_LABEL}\.?")


def address_text(packed: bytes) -> str:
    """A packed address for people; str() of ipaddress takes ten times as long."""
    if len(packed) == 4:
        return socket.inet_ntop(socket.AF_INET, packed)
    return socket.inet_ntop(socket.AF_INET6, packed)


def packed_address(text: str) -> bytes:
    """An address in network byte order, without its zone; raises ValueError."""
    return ipaddress.ip_address(text.partition("%")[0]).packed


class PeerAddress(NamedTuple):
    """An address to send copies to.

    Packed in network byte order, and the zone of a link-local one.
    """

    packed: bytes
    zone: str = ""

    @property
    def is_multicast(self) -> bool:
        """Whether this is an IPv6 multicast group; IPv4 ones are no peers."""
        return len(self.packed) == 16 and self.packed[0] == 0xFF

    def __str__(self) -> str:
        text = address_text(self.packed)
        return f"{text}%{self.zone}" if self.zone else text


class Config(NamedTuple):
    """Everything the options say. Rates are per second, intervals in seconds, MTUs in bytes."""

    peers: tuple[PeerAddress, ...] = ()
    peer_sources: tuple[str, ...] = ()  # like file:/etc/pmtud/peers, dns:node-1
    ifaces: tuple[str, ...] = ()
    nodename: str = ""
    nflog_group: int = 33
    metrics_port: int = 30040
    metrics_addr: str = ""
    metrics_required: bool = False
    ttl: int = 10
    copy_mark: Union[str, int] = "auto"
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
    items = map(str.strip, text.split(","))
    return [item for item in items if item]


def number_between(
    low: float, high: float, convert: Callable[[str], float] = int
) -> Callable[[str], Any]:
    """A parser of numbers in [low, high]; raises ValueError with the range."""

    def parse_number(text: str) -> float:
        # int() and float() also take 1_0 and the digits of other scripts
        if convert is int and not re.fullmatch("-?[0-9]+", text):
            raise ValueError(f"{text!r} is not a whole number")
        if not re.fullmatch(r"-?[0-9]*\.?[0-9]+", text):
            raise ValueError(f"{text!r} is not a number")
        value = convert(text)
        if not low <= value <= high:
            raise ValueError(f"{text} is not between {low} and {high:.10g}")
        return value

    return parse_number


def parse_networks(text: str) -> tuple[Network, ...]:
    """Networks in CIDR form, comma-separated.

    A bare address is a network of one; host bits are an error.
    """
    try:
        return tuple(ipaddress.ip_network(item) for item in split_list(text) or [text])
    except ValueError as problem:
        raise ValueError(f"{problem}; networks are written like 10.0.0.0/8 or fd00::/64") from None


def parse_ports(text: str) -> frozenset[int]:
    """Source ports and ranges of them, like 443,8000-8100."""
    ports: set[int] = set()
    for item in split_list(text) or [text]:
        first, dash, last = item.partition("-")
        if not dash:
            last = first
        try:
            low = number_between(1, 65535)(first)
            high = number_between(low, 65535)(last)
        except ValueError:
            advice = "write them like 443,8000-8100"
            raise ValueError(f"{item!r} is not a port or a range of ports; {advice}") from None
        ports.update(range(low, high + 1))
    return frozenset(ports)


def parse_min_mtu(text: str) -> tuple[int, int]:
    """IPV4 or IPV4,IPV6: the smallest MTUs believed, in bytes."""
    items = list(map(str.strip, text.split(",")))
    if len(items) > 2 or not all(items):
        raise ValueError(f"{text!r} is not one MTU (IPv4) or two (IPv4,IPv6)")
    ipv4 = number_between(IPV4_MIN_MTU, 65535)(items[0])
    ipv6 = IPV6_MIN_MTU
    if len(items) == 2:
        ipv6 = number_between(IPV6_MIN_MTU, 65535)(items[1])
    return ipv4, ipv6


def parse_copy_mark(text: str) -> Union[str, int]:
    """auto, none or a mark of 32 bits, decimal or like 0x3000000."""
    if text in ("auto", "none"):
        return text
    if re.fullmatch("0[xX][0-9a-fA-F]{1,8}", text):
        mark = int(text, 16)
    elif re.fullmatch("[0-9]{1,10}", text):
        mark = int(text)
    else:
        raise ValueError(f"{text!r} is not auto, none or a mark like 0x3000000")
    if mark > 0xFFFFFFFF:
        raise ValueError(f"{text} has more than 32 bits")
    if mark == MARK_DELIVER:
        raise ValueError(f"{text} is the mark of deliveries, which the guard keeps on this node")
    return mark


def parse_nodename(text: str) -> str:
    """A name for the log: printable and without spaces."""
    if not re.fullmatch("[!-~]+", text):
        raise ValueError(f"{text!r} is not a node name")
    return text


def parse_address(text: str) -> str:
    """An address, as Python writes it."""
    return str(ipaddress.ip_address(text))


def parse_iface(text: str) -> tuple[str, ...]:
    """Interface names, comma-separated."""
    names = tuple(split_list(text))
    for name in names:
        is_odd = name in (".", "..") or re.search(r'[/:"\s]', name)
        if is_odd or len(name.encode()) >= IFNAMSIZ:
            raise ValueError(f"{name!r} is not an interface name")
    return names


def explain_no_address(text: str) -> str:
    """What to write instead of a peer that is no address; networks are what people try."""
    try:
        given = ipaddress.ip_interface(text)
    except ValueError:
        return f"{text!r} is not an IP address"
    if given.network.prefixlen >= given.max_prefixlen - 1:
        return f"{text} is a network, no peer; name the node: {given.ip}"
    if given.version == 6:
        group = "a multicast group of their link like ff02::114%eth0"
        return f"{text} is a network, no peer; name its nodes, or {group}"
    advice = f"to reach all of it name its broadcast address, {given.network.broadcast_address}"
    return f"{text} is a network, no peer; {advice}"


def parse_peer(text: str) -> PeerAddress:
    """One peer address: IPv4, subnet broadcast, IPv6, or link-local or multicast IPv6 with
    %interface.
    """
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise ValueError(explain_no_address(text)) from None
    address = getattr(address, "ipv4_mapped", None) or address
    packed = address.packed
    is_group = packed == b"\xff" * 4 or address.is_multicast
    zone = ""
    is_zoned = address.is_link_local or address.is_multicast
    if is_zoned and isinstance(address, ipaddress.IPv6Address):
        is_group = False
        zone = address.scope_id or ""
        if not zone:
            raise ValueError(f"{text} needs its interface, like {text}%eth0")
    if address.is_loopback or address.is_unspecified or is_group:
        advice = "list node addresses or a subnet broadcast address"
        raise ValueError(f"{text} cannot be a peer; {advice}")
    return PeerAddress(packed, zone)


def parse_peer_lines(text: str) -> tuple[PeerAddress, ...]:
    """The addresses of a peer file.

    One per line, `#` starts a comment; raises ValueError naming the line.
    """
    found: list[PeerAddress] = []
    for number, line in enumerate(text.splitlines(), 1):
        for item in split_list(line.partition("#")[0]):
            try:
                found.append(parse_peer(item))
            except ValueError as problem:
                raise ValueError(f"line {number}: {problem}") from None
    if not 0 < len(found) <= PEERS_MAX:
        raise ValueError(
            f"{len(found)} peers; there must be 1 to {PEERS_MAX}, "
            "one broadcast address reaches a subnet"
        )
    return tuple(dict.fromkeys(found))


def check_source(text: str) -> None:
    """Raise ValueError unless this is file:PATH, dns:NAME or kube:nodes[?SELECTOR]."""
    kind, _, rest = text.partition(":")
    if kind == "file" and rest:
        return
    if kind == "dns" and HOST_NAME.fullmatch(rest):
        return
    if text == "kube:nodes" or text.startswith("kube:nodes?"):
        return
    raise ValueError(f"{text!r} is not {PEER_KINDS}")


def parse_peer_items(text: str) -> list[Union[PeerAddress, str]]:
    """The items of one --peers value: addresses, and the texts of sources."""
    items: list[Union[PeerAddress, str]] = []
    if not split_list(text):
        raise ValueError(f"{text!r} names no peer; without --peers only local rescue is done")
    for item in split_list(text):
        name = f"dns:{item}" if HOST_NAME.fullmatch(item) else item
        if re.match("[a-z]+:", name) and not re.match("[0-9a-f]*:[0-9a-f]*:", name):
            check_source(name)
            items.append(name)
            continue
        try:
            items.append(parse_peer(item))
        except ValueError as problem:
            raise ValueError(f"{problem}; a peer is {PEER_KINDS}") from None
    return items


class Option(NamedTuple):
    """One option: its variable, its place in Config and its text in --help follow from it.

    Its default is that of its field in Config.
    """

    flag: str
    help: str = ""
    parse: Optional[Callable[[str], Any]] = None  # raises ValueError; a switch has none
    metavar: Optional[str] = None
    choices: Optional[tuple[str, ...]] = None
    repeatable: bool = False
    default: str = ""  # in words, where the value says nothing
    renamed: str = ""  # the field, where it has another name

    @property
    def dest(self) -> str:
        """Its name in argparse."""
        return self.flag.lstrip("-").replace("-", "_")

    @property
    def field(self) -> str:
        """Its name in Config."""
        return self.renamed or self.dest


def default_text(value: Any) -> str:
    """A default as --help and people write it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


OPTION_GROUPS = {
    "where errors come in": (
        Option(
            "--iface",
            "where errors come in",
            parse_iface,
            "NAME",
            repeatable=True,
            default="the interface of the default route",
            renamed="ifaces",
        ),
        Option("--nflog-group", "NFLOG group", number_between(0, 65535), "N"),
        Option(
            "--rules",
            "auto: install our own nftables table; off: your NFLOG rule feeds us",
            choices=("auto", "off"),
        ),
        Option("--no-rescue", "do not deliver a router's error on the node that receives it"),
    ),
    "peers": (
        Option(
            "--peers",
            "nodes to send copies to: addresses, a subnet broadcast address, host names or "
            "dns:NAME (all A and AAAA, asked again every 10 s), file:PATH, kube:nodes[?SELECTOR]; "
            "comma-separated",
            parse_peer_items,
            "LIST",
            repeatable=True,
            default="none",
        ),
        Option(
            "--ignore-networks",
            "networks of the cluster besides the peers: errors from there are not replicated",
            parse_networks,
            "LIST",
            repeatable=True,
            default="none",
        ),
        Option("--ttl", "TTL or hop limit of copies", number_between(1, 255), "N"),
        Option(
            "--copy-mark",
            "packet mark with which copies leave; auto: Calico's bypass mark while its eBPF data "
            "plane is here, else none",
            parse_copy_mark,
            "auto|none|MARK",
        ),
    ),
    "what is believed": (
        Option(
            "--service-networks",
            "act only on errors about packets sent from these networks",
            parse_networks,
            "LIST",
            repeatable=True,
            default="all",
        ),
        Option(
            "--ports",
            "act only on errors about packets sent from these ports",
            parse_ports,
            "LIST",
            repeatable=True,
            default="all",
        ),
        Option("--min-mtu", "smallest MTU believed, in bytes", parse_min_mtu, "V4[,V6]"),
    ),
    "limits": (
        Option(
            "--flow-interval",
            "act on one error per flow and MTU in this time; 0: on each",
            number_between(0, 3600, float),
            "SECONDS",
        ),
        Option(
            "--source-rate",
            "errors acted on per second from one router or peer; 0: unlimited",
            number_between(0, 1e9, float),
            "N",
        ),
        Option(
            "--rate",
            "errors acted on per second, from routers and from peers each; 0: unlimited",
            number_between(0, 1e9, float),
            "N",
        ),
    ),
    "output": (
        Option(
            "--nodename",
            "this node's name in the log",
            parse_nodename,
            "NAME",
            default="the host name",
        ),
        Option(
            "--metrics-port",
            "port of /metrics, /healthz and /readyz; 0: none",
            number_between(0, 65535),
            "PORT",
        ),
        Option("--metrics-addr", "address to serve them on", parse_address, "ADDR", default="all"),
        Option("--log-level", choices=("debug", "info", "warning", "error")),
        Option("--log-format", choices=("text", "json")),
        Option("--dry-run", "send nothing; count and log what would be done"),
    ),
}
OPTIONS = tuple(option for options in OPTION_GROUPS.values() for option in options)


# -----------------------------------------------------------------------------
# Section: packets -- from bytes to one error or one Reason, both families, pure

# protocol, source, destination, length of the whole packet, offset of the transport header,
# fragment offset, more fragments
IPHeader = tuple[int, bytes, bytes, int, int, int, bool]


def ipv4_header(packet: bytes, at: int, end: int) -> Optional[IPHeader]:
    """The IPv4 header at offset `at`, None where it does not fit before `end` (RFC 791 section
    3.1).
    """
    if end - at < IPV4_HEADER_LEN:
        return None
    version_ihl, length, fragment, protocol, src, dst = IPV4_HEADER.unpack_from(packet, at)
    header_len = (version_ihl & 0x0F) * 4
    if version_ihl >> 4 != 4 or header_len < IPV4_HEADER_LEN or end - at < header_len:
        return None
    offset = fragment & IPV4_OFFSET_MASK
    more = bool(fragment & IPV4_MORE_FRAGMENTS)
    return protocol, src, dst, length, at + header_len, offset, more


def ipv6_header(packet: bytes, at: int, end: int) -> Optional[IPHeader]:
    """The IPv6 header at offset `at` with its extension headers walked, None where they do not fit
    (RFC 8200).
    """
    if end - at < IPV6_HEADER_LEN or packet[at] >> 4 != 6:
        return None
    _, payload, protocol, src, dst = IPV6_HEADER.unpack_from(packet, at)
    length = IPV6_HEADER_LEN + payload
    offset = 0
    more = False
    at += IPV6_HEADER_LEN
    for _ in range(IPV6_EXTENSIONS_MAX):
        if protocol not in (HOPOPTS, ROUTING, FRAGMENT, AUTH, DSTOPTS) or offset:
            return protocol, src, dst, length, at, offset, more
        if end - at < 8:
            return None
        if protocol == FRAGMENT:
            protocol, fragment = IPV6_FRAGMENT.unpack_from(packet, at)
            offset = fragment >> 3
            more = bool(fragment & 1)
            at += 8
        elif protocol == AUTH:
            protocol = packet[at]
            at += (packet[at + 1] + 2) * 4
        else:
            protocol = packet[at]
            at += (packet[at + 1] + 1) * 8
    return None


def ipv4_head(src: bytes, dst: bytes, icmp: bytes) -> bytes:
    """An IPv4 header for this ICMP message; a raw socket adds length, id and checksum (raw(7))."""
    first = 4 << 4 | IPV4_HEADER_LEN // 4
    return IPV4_HEAD.pack(first, 0, 0, 0, 0, HOP_LIMIT, socket.IPPROTO_ICMP, 0, src, dst)


def ipv6_head(src: bytes, dst: bytes, icmp: bytes) -> bytes:
    """An IPv6 header for this ICMP message."""
    return IPV6_HEAD.pack(6 << 28, len(icmp), socket.IPPROTO_ICMPV6, HOP_LIMIT, src, dst)


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
    head: Callable[[bytes, bytes, bytes], bytes]
    loopback: str
    probe_address: str  # a documentation address: no flow of this node has it
    address_len: int
    src_offset: int  # of the source address in the header; the destination follows
    ttl_at: int  # offset of the TTL or hop limit in the header
    uncounted: int  # bytes of the header that its length field leaves out
    unstated_mtu: int  # what Linux takes an MTU of 0 for; 0: such errors are wrong
    nft: str  # its name in nft
    nft_type: int  # of its addresses in nft sets, for nft's listing


IPV4 = Family(
    name="ipv4",
    version=4,
    af=socket.AF_INET,
    header=ipv4_header,
    icmp_protocol=socket.IPPROTO_ICMP,
    icmp=ICMPV4_FRAG_NEEDED,
    error=(ICMP_DEST_UNREACH, ICMP_FRAG_NEEDED),
    protocols=PROTOCOLS_QUOTED | {socket.IPPROTO_ICMP},
    pseudo_header=False,
    nfproto=NFPROTO_IPV4,
    head=ipv4_head,
    loopback="127.0.0.1",
    probe_address="192.0.2.1",
    address_len=4,
    src_offset=12,
    ttl_at=IPV4_TTL_AT,
    uncounted=0,
    unstated_mtu=IPV4_MIN_PMTU,
    nft="ip",
    nft_type=7,
)
IPV6 = Family(
    name="ipv6",
    version=6,
    af=socket.AF_INET6,
    header=ipv6_header,
    icmp_protocol=socket.IPPROTO_ICMPV6,
    icmp=ICMPV6_TOO_BIG,
    error=(ICMPV6_PKT_TOOBIG, 0),
    protocols=PROTOCOLS_QUOTED | {socket.IPPROTO_ICMPV6},
    pseudo_header=True,
    nfproto=NFPROTO_IPV6,
    head=ipv6_head,
    loopback="::1",
    probe_address="2001:db8::1",
    address_len=16,
    src_offset=8,
    ttl_at=IPV6_HOP_LIMIT_AT,
    uncounted=IPV6_HEADER_LEN,
    unstated_mtu=0,
    nft="ip6",
    nft_type=8,
)
FAMILIES = (IPV4, IPV6)


def family_of_packet(packet: bytes) -> Family:
    """The family of an IP packet, however broken."""
    if packet and packet[0] >> 4 == 6:
        return IPV6
    return IPV4


def family_of(packed: bytes) -> Family:
    """The family of a packed address."""
    if len(packed) == 4:
        return IPV4
    return IPV6


class MtuError(NamedTuple):
    """A well-formed ICMP error.

    Addresses are packed; `icmp` is the message from its type on, unchanged.
    """

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
    flow_id: int = 0  # of flow_id()
    ttl: int = 0  # TTL or hop limit with which it came

    @property
    def believed_mtu(self) -> int:
        """The MTU that the owner's kernel takes it for.

        Routers from before RFC 1191 leave the field 0.
        """
        return self.mtu or self.family.unstated_mtu

    @property
    def quoted_length_max(self) -> float:
        """The most bytes that the dropped packet may have had, going by the length that it is
        quoted with.

        A length of 0 tells nothing: Linux quotes so what it has aggregated to more than 64 kB (BIG
        TCP). Some stacks have taken a header off before they quote, some write the field in their
        own byte order. Linux looks at none of it, so the check refuses only what cannot be meant.
        """
        field = self.quoted_length - self.family.uncounted
        if not field:
            return math.inf
        swapped = (field & 0xFF) << 8 | field >> 8
        return max(self.quoted_length + IPV4_HEADER_MAX, swapped + self.family.uncounted)

    def __str__(self) -> str:
        start = f"{address_text(self.quoted_src)}:{self.source_port}"
        end = f"{address_text(self.quoted_dst)}:{self.destination_port}"
        return (
            f"router={address_text(self.src)} dst={address_text(self.dst)} "
            f"flow={start}>{end}/{self.quoted_protocol} mtu={self.mtu}"
        )


def checksum_remainder(family: Family, src: bytes, dst: bytes, icmp: bytes) -> int:
    """What RFC 1071 sums, modulo 65535: 0 where the ICMP checksum is right (0.6 us for 556 bytes).

    IPv6 copies and deliveries leave with a new checksum, so a corrupt error must end here. IPv4
    ones keep theirs, and the kernel of the owner refuses it (1 us less on each).
    """
    total = int.from_bytes(icmp, "big") << 8 * (len(icmp) & 1)
    if family.pseudo_header:
        total += int.from_bytes(src + dst, "big") + len(icmp) + family.icmp_protocol
    return total % 0xFFFF


def delivery_packet(family: Family, src: bytes, dst: bytes, icmp: bytes) -> bytes:
    """The IP packet with this ICMP message from src to dst, for a raw socket with IP_HDRINCL or
    IPV6_HDRINCL.
    """
    if family.pseudo_header:
        blank = icmp[:2] + bytes(2) + icmp[4:]
        checksum = 0xFFFF - checksum_remainder(family, src, dst, blank)
        icmp = icmp[:2] + checksum.to_bytes(2, "big") + icmp[4:]
    return family.head(src, dst, icmp) + icmp


def flow_id(family: Family, protocol: int, packet: bytes, at: int) -> int:
    """What tells flows between two addresses apart where there are no ports, 0 if nothing does.

    `at` is where the transport header starts; eight bytes of it are there. PPTP has the call id in
    the key of GRE.
    """
    found = 0
    if protocol == family.icmp_protocol:
        kind, number = ICMP_ECHO.unpack_from(packet, at)
        found = kind << 16 | number
    if protocol == ESP:
        (found,) = ESP_HEADER.unpack_from(packet, at)
    if protocol == GRE:
        flags, key = GRE_HEADER.unpack_from(packet, at)
        if flags & (GRE_CSUM | GRE_KEY) == GRE_KEY:
            found = key
    return found


def is_deaf_tunnel(error: MtuError) -> bool:
    """Whether it is about an IPv4 tunnel between kernels that a delivery alone does not teach.

    Linux looks for GRE's route, and for a 6in4 tunnel bound to a device, by the device that the
    error came in on; with a delivery that is lo. About an echo reply it asks the routing table,
    and learns the same. (6.1, 6.18)
    """
    return error.family is IPV4 and error.quoted_protocol in (GRE, SIT)


def as_about_echo_reply(icmp: bytes) -> bytes:
    """An IPv4 error made into one about an ICMP echo reply between the same addresses.

    A wrong checksum stays wrong.
    """
    quoted = bytearray(icmp[ICMP_HEADER_LEN:])
    start = (quoted[0] & 0x0F) * 4  # of the transport header
    # RFC 1624: what the words lose, the checksum gains. An echo reply starts with type 0 and code
    # 0.
    lost = (
        quoted[IPV4_PROTOCOL_AT]
        - socket.IPPROTO_ICMP
        + int.from_bytes(quoted[start : start + 2], "big")
    )
    checksum = (int.from_bytes(icmp[2:4], "big") + lost) % 0xFFFF
    quoted[IPV4_PROTOCOL_AT] = socket.IPPROTO_ICMP
    quoted[start : start + 2] = bytes(2)
    return icmp[:2] + checksum.to_bytes(2, "big") + icmp[4:ICMP_HEADER_LEN] + quoted


def plain_ipv4_error(packet: bytes) -> Optional[MtuError]:
    """What walk_error() finds in an error without IP options, None for any other packet.

    It saves 0.7 of the 6 us that an error costs with one peer.
    """
    if len(packet) < PLAIN_IPV4_ERROR.size:
        return None
    (
        start,
        end,
        fragment,
        protocol,
        src,
        dst,
        kind,
        mtu,
        quoted_start,
        length,
        quoted_fragment,
        quoted_protocol,
        quoted_src,
        quoted_dst,
        source_port,
        destination_port,
    ) = PLAIN_IPV4_ERROR.unpack_from(packet)
    if (
        start != 0x45
        or quoted_start != 0x45
        or protocol != socket.IPPROTO_ICMP
        or kind != 0x0304
        or fragment & (IPV4_OFFSET_MASK | IPV4_MORE_FRAGMENTS)
        or quoted_fragment & IPV4_OFFSET_MASK
        or quoted_protocol not in PROTOCOLS_WITH_PORTS
        or not PLAIN_IPV4_ERROR.size + 4 <= end <= len(packet)
    ):
        return None
    return MtuError(
        IPV4,
        src,
        dst,
        quoted_src,
        quoted_dst,
        quoted_protocol,
        length,
        source_port,
        destination_port,
        mtu,
        packet[IPV4_HEADER_LEN:end],
        0,
        packet[IPV4_TTL_AT],
    )


def parse(packet: bytes) -> Union[MtuError, Reason]:
    """The error in a raw IP packet, or the first Reason it is not one.

    Never raises, whatever the bytes.
    """
    return plain_ipv4_error(packet) or walk_error(packet)


def walk_error(packet: bytes) -> Union[MtuError, Reason]:
    """What parse() gives, for any headers."""
    family = family_of_packet(packet)
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
    if family.pseudo_header and checksum_remainder(family, src, dst, icmp):
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
    ports = (0, 0)
    if protocol in PROTOCOLS_WITH_PORTS:
        ports = PORTS.unpack_from(packet, transport)
    identifier = flow_id(family, protocol, packet, transport)
    return MtuError(
        family,
        src,
        dst,
        quoted_src,
        quoted_dst,
        protocol,
        length,
        ports[0],
        ports[1],
        mtu,
        icmp,
        identifier,
        packet[family.ttl_at],
    )


# -----------------------------------------------------------------------------
# Section: netlink codec -- messages to bytes and back, bounded, pure


def attribute(kind: int, data: bytes) -> bytes:
    """One netlink attribute, padded to four bytes."""
    head = NLATTR.pack(NLA_HDRLEN + len(data), kind)
    return head + data + bytes(-len(data) % NLMSG_ALIGNTO)


def nested(kind: int, *contents: bytes) -> bytes:
    """An attribute that contains attributes."""
    return attribute(kind | NLA_F_NESTED, b"".join(contents))


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
    length = NLMSG_HDRLEN + len(payload)
    head = NLMSGHDR.pack(length, kind, NLM_F_REQUEST | flags, sequence, 0)
    return head + payload + bytes(-len(payload) % NLMSG_ALIGNTO)


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
    """The value of each attribute from offset `at` on; the last one of a type wins.

    Ends at the first attribute that does not fit.
    """
    found = {}
    while len(data) - at >= NLA_HDRLEN:
        length, kind = NLATTR.unpack_from(data, at)
        if not NLA_HDRLEN <= length <= len(data) - at:
            break
        found[kind & NLA_TYPE_MASK] = data[at + NLA_HDRLEN : at + length]
        at += length + -length % NLMSG_ALIGNTO
    return found


def host_number(attrs: Mapping[int, bytes], kind: int) -> int:
    """The number in an attribute, in host byte order; 0 where it is not there."""
    return int.from_bytes(attrs.get(kind, b""), sys.byteorder)


def host_text(attrs: Mapping[int, bytes], kind: int) -> str:
    """The string in an attribute, without its NUL; empty where it is not there."""
    return attrs.get(kind, b"").rstrip(b"\0").decode(errors="surrogateescape")


def error_number(payload: bytes) -> int:
    """The errno in the payload of an NLMSG_ERROR message, 0 for an acknowledgement."""
    if len(payload) < 4:
        return errno.EBADMSG
    return -int.from_bytes(payload[:4], sys.byteorder, signed=True)


# A raw IP packet, its number in the group (big-endian, or empty), and whether RPF would drop it
Logged = tuple[bytes, bytes, bool]
NUMBER_HEAD = NLATTR.pack(NLA_HDRLEN + 4, NFULA_SEQ)
# From NUMBER_HEAD on: the number, then the length and type of the packet's attribute
NUMBER_AND_HEAD = struct.Struct("=4x4sHH")
# The kernel puts the prefix second, behind struct nfulnl_msg_packet_hdr
NFLOG_PREFIX_AT = NLMSG_HDRLEN + NFGENMSG.size + NLA_HDRLEN + NFULNL_PACKET_HDR_LEN
NFLOG_PREFIX_TYPE_AT = NFLOG_PREFIX_AT + NLA_TYPE_OFFSET
RPF_PREFIX_TYPE = NFULA_PREFIX.to_bytes(2, sys.byteorder) + RPF_PREFIX.encode()


def parse_nflog(data: bytes) -> list[Logged]:
    """The packets in one datagram of an NFLOG group (linux/netfilter/nfnetlink_log.h).

    Other messages are skipped, the first one that does not fit is the end.
    """
    found = []
    at = 0
    size = len(data)
    while size - at >= NLMSG_HDRLEN:
        length, kind = NLMSG_HEAD.unpack_from(data, at)
        end = at + length
        if length < NLMSG_HDRLEN or end > size:
            break
        if kind == NFLOG_PACKET:
            found.append(find_packet(data, at, end))
        at = end + -length % NLMSG_ALIGNTO
    return found


def find_packet(data: bytes, start: int, end: int) -> Logged:
    """What the message between these offsets holds.

    The kernel puts the packet last and its number before it, so the head of the number is searched
    for, and believed if a packet that fills the rest follows. A walk over all attributes costs
    three times as much; it is for messages that look otherwise.
    """
    number_at = data.find(NUMBER_HEAD, start, end)
    packet_at = number_at + NUMBER_AND_HEAD.size
    if number_at < 0 or packet_at > end:
        return walk_to_packet(data[start:end])
    number, length, kind = NUMBER_AND_HEAD.unpack_from(data, number_at)
    packet_end = packet_at + length - NLA_HDRLEN
    if kind != NFULA_PAYLOAD or packet_end + -length % NLMSG_ALIGNTO != end:
        return walk_to_packet(data[start:end])
    rpf = data.startswith(RPF_PREFIX_TYPE, start + NFLOG_PREFIX_TYPE_AT)
    return data[packet_at:packet_end], number, rpf


def walk_to_packet(data: bytes) -> Logged:
    """What find_packet() gives, for a message with attributes in any order."""
    found = attributes(data, NLMSG_HDRLEN + NFGENMSG.size)
    rpf = found.get(NFULA_PREFIX, b"").startswith(RPF_PREFIX.encode())
    return found.get(NFULA_PAYLOAD, b""), found.get(NFULA_SEQ, b""), rpf


# -----------------------------------------------------------------------------
# Section: rules -- what is installed and what is printed, made of the same parts, pure

# Routers are told apart by a hash of their addresses, with a seed nobody knows, so that the set of
# them is never full. Where 1,000 are loud, one genuine router in 65 shares a bucket with one.
BUCKETS = 1 << 16
# That one node should send: a third of a core; with more than 100 peers fewer errors pass
COPIES_PER_SECOND = 100_000
ELEMENTS_MAX = 1000  # in one message: an attribute holds 64 kB
LIMIT_SECONDS = {"second": 1, "minute": 60}


class Part(NamedTuple):
    """A piece of a rule, a chain or a set: its text for people, its attributes for the kernel."""

    text: str
    data: bytes


class Rule(NamedTuple):
    """One rule of a chain."""

    chain: str
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """The rule as nft takes it."""
        return " ".join(part.text for part in self.parts)

    @property
    def data(self) -> bytes:
        """The rule's expressions."""
        return b"".join(part.data for part in self.parts)


class Chain(NamedTuple):
    """One chain; without a hook it is reached by goto."""

    name: str
    hook: Optional[Part] = None


class Set(NamedTuple):
    """One set: its properties, and its packed elements, which are addresses."""

    name: str
    parts: tuple[Part, ...]
    elements: tuple[bytes, ...] = ()


class Table(NamedTuple):
    """A table of nftables' family inet."""

    name: str
    counters: tuple[str, ...]
    sets: tuple[Set, ...]
    chains: tuple[Chain, ...]
    rules: tuple[Rule, ...]


class CopySenders(NamedTuple):
    """Where copies may come from: addresses, packed, and networks."""

    addresses: frozenset[bytes] = frozenset()
    networks: tuple[Network, ...] = ()
    neighbours: tuple[Network, ...] = ()  # of broadcast and multicast peers

    def of(self, family: Family) -> list[bytes]:
        """The addresses of one family."""
        return sorted(address for address in self.addresses if len(address) == family.address_len)

    def rate(self, wanted: float) -> int:
        """The errors per second that the kernel lets through where `wanted` may be acted on.

        0: all.
        """
        if not wanted:
            return 0
        most = max(1, *(len(self.of(family)) for family in FAMILIES))
        return max(1, int(min(wanted, COPIES_PER_SECOND / most)))


NOBODY = CopySenders()


class Site(NamedTuple):
    """What the rules depend on beside the options."""

    ifaces: tuple[str, ...]  # where errors come in
    uplinks: tuple[str, ...]  # these, and where the default routes lead
    vrfs: tuple[str, ...] = ()  # that these interfaces belong to
    senders: CopySenders = NOBODY
    conntrack: bool = True  # whether connections are tracked
    bursts: bool = True  # whether the kernel can tell bursts: Linux 5.11 with nft_hash
    copy_mark: Optional[int] = None  # with which copies leave; none: with ours


def expression(name: str, numbers: Mapping[Any, int], *attrs: bytes) -> bytes:
    """One nftables expression: attributes with 32-bit numbers, then those built already."""
    data = b"".join(be32(kind, number) for kind, number in numbers.items())
    named = string(ExprAttr.NAME, name)
    return nested(ListAttr.ELEM, named, nested(ExprAttr.DATA, data, *attrs))


def host32(number: int) -> bytes:
    """A number as nftables registers hold it, in host byte order."""
    return struct.pack("=I", number)


def load_meta(key: int) -> bytes:
    """Metadata of the packet into register 1."""
    return expression("meta", {MetaAttr.DREG: NFT_REG_1, MetaAttr.KEY: key})


def load_ct(key: int) -> bytes:
    """What conntrack knows of the packet into register 1."""
    return expression("ct", {CtAttr.DREG: NFT_REG_1, CtAttr.KEY: key})


def load_fib(result: int, flags: int) -> bytes:
    """What the routing table says about an address into register 1."""
    return expression(
        "fib", {FibAttr.DREG: NFT_REG_1, FibAttr.RESULT: result, FibAttr.FLAGS: flags}
    )


def load_payload(base: int, offset: int, length: int) -> bytes:
    """Bytes of the packet into register 1."""
    numbers = {
        PayloadAttr.DREG: NFT_REG_1,
        PayloadAttr.BASE: base,
        PayloadAttr.OFFSET: offset,
        PayloadAttr.LEN: length,
    }
    return expression("payload", numbers)


def keep_bits(mask: bytes) -> bytes:
    """register 1 & mask."""
    size = len(mask)
    return expression(
        "bitwise",
        {BitwiseAttr.SREG: NFT_REG_1, BitwiseAttr.DREG: NFT_REG_1, BitwiseAttr.LEN: size},
        nested(BitwiseAttr.MASK, attribute(DataAttr.VALUE, mask)),
        nested(BitwiseAttr.XOR, attribute(DataAttr.VALUE, bytes(size))),
    )


def compare(operator: int, value: bytes) -> bytes:
    """register 1 OPERATOR value."""
    data = nested(CmpAttr.DATA, attribute(DataAttr.VALUE, value))
    return expression("cmp", {CmpAttr.SREG: NFT_REG_1, CmpAttr.OP: operator}, data)


def immediate(code: int, chain: str = "") -> bytes:
    """The end of a rule."""
    found = be32(VerdictAttr.CODE, code)
    if chain:
        found += string(VerdictAttr.CHAIN, chain)
    data = nested(ImmediateAttr.DATA, nested(DataAttr.VERDICT, found))
    return expression("immediate", {ImmediateAttr.DREG: NFT_REG_VERDICT}, data)


def equal(what: Part, value: Part) -> Part:
    """Goes on where the packet has this value."""
    return Part(f"{what.text} {value.text}", what.data + compare(NFT_CMP_EQ, value.data))


def set_mark(mark: int) -> Part:
    """Gives the packet this mark."""
    value = nested(ImmediateAttr.DATA, attribute(DataAttr.VALUE, host32(mark)))
    data = expression("immediate", {ImmediateAttr.DREG: NFT_REG_1}, value)
    data += expression("meta", {MetaAttr.KEY: NFT_META_MARK, MetaAttr.SREG: NFT_REG_1})
    return Part(f"meta mark set {mark:#x}", data)


def unequal(what: Part, value: Part) -> Part:
    """Goes on where the packet has another value."""
    return Part(f"{what.text} != {value.text}", what.data + compare(NFT_CMP_NEQ, value.data))


def has_bits(what: Part, bits: Part) -> Part:
    """Goes on where any of these bits is set."""
    data = what.data + keep_bits(bits.data) + compare(NFT_CMP_NEQ, bytes(len(bits.data)))
    return Part(f"{what.text} {bits.text}", data)


def interface(name: str) -> Part:
    """The name of an interface, to compare with."""
    return Part(f'"{name}"', name.encode().ljust(IFNAMSIZ, b"\0"))


def goto(chain: str) -> Part:
    """The end of a rule that goes on in another chain."""
    return Part(f"goto {chain}", immediate(NFT_GOTO, chain))


ACCEPT = Part("accept", immediate(NF_ACCEPT))
DROP = Part("drop", immediate(NF_DROP))
RETURN = Part("return", immediate(NFT_RETURN))
NOTRACK = Part("notrack", expression("notrack", {}))
IIFNAME = Part("iifname", load_meta(NFT_META_IIFNAME))
OIFNAME = Part("oifname", load_meta(NFT_META_OIFNAME))
MARK = Part("meta mark", load_meta(NFT_META_MARK))
PKTTYPE = Part("meta pkttype", load_meta(NFT_META_PKTTYPE))
CT_STATE = Part("ct state", load_ct(NFT_CT_STATE))
CT_STATUS = Part("ct status", load_ct(NFT_CT_STATUS))
DADDR_TYPE = Part("fib daddr type", load_fib(NFT_FIB_RESULT_ADDRTYPE, NFTA_FIB_F_DADDR))
WAY_BACK = Part(
    "fib saddr . iif oif", load_fib(NFT_FIB_RESULT_OIF, NFTA_FIB_F_SADDR | NFTA_FIB_F_IIF)
)
FAILS_RPF = equal(WAY_BACK, Part("0", host32(0)))
TO_LOCAL = equal(DADDR_TYPE, Part("local", host32(RTN_LOCAL)))
NOT_FORWARDED = unequal(DADDR_TYPE, Part("unicast", host32(RTN_UNICAST)))
TO_GROUP = unequal(PKTTYPE, Part("host", bytes([PACKET_HOST])))
RELATED = has_bits(CT_STATE, Part("related", host32(NF_CT_STATE_RELATED_BIT)))
TRANSLATED = has_bits(CT_STATUS, Part("snat,dnat", host32(IPS_SRC_NAT | IPS_DST_NAT)))
ERROR_WORDS = {
    IPV4: "icmp type destination-unreachable icmp code frag-needed",
    IPV6: "icmpv6 type packet-too-big icmpv6 code 0",
}


def is_family(family: Family) -> Part:
    """The packet is of this IP version."""
    data = load_meta(NFT_META_NFPROTO) + compare(NFT_CMP_EQ, bytes([family.nfproto]))
    return Part(f"meta nfproto {family.name}", data)


def load_source(family: Family) -> bytes:
    """The source address into register 1, for packets of this family."""
    base = NFT_PAYLOAD_NETWORK_HEADER
    address = load_payload(base, family.src_offset, family.address_len)
    return is_family(family).data + address


def count(name: str) -> Part:
    """Count the packet in a counter of the table."""
    numbers = {ObjrefAttr.IMM_TYPE: NFT_OBJECT_COUNTER}
    data = expression("objref", numbers, string(ObjrefAttr.IMM_NAME, name))
    return Part(f'counter name "{name}"', data)


def is_error(family: Family) -> Part:
    """The packet is an error of this family."""
    data = load_meta(NFT_META_L4PROTO) + compare(NFT_CMP_EQ, bytes([family.icmp_protocol]))
    data += load_payload(NFT_PAYLOAD_TRANSPORT_HEADER, 0, 2)
    data += compare(NFT_CMP_EQ, bytes(family.error))
    return Part(ERROR_WORDS[family], data)


def is_from_set(family: Family, name: str) -> Part:
    """The packet's source is in this set of addresses."""
    named = string(LookupAttr.SET, name)
    lookup = expression("lookup", {LookupAttr.SREG: NFT_REG_1}, named)
    return Part(f"{family.nft} saddr @{name}", load_source(family) + lookup)


def is_from_network(network: Network) -> Part:
    """The packet's source is in this network."""
    address = network.network_address.packed
    family = family_of(address)
    bits = load_source(family) + keep_bits(network.netmask.packed)
    source = Part(f"{family.nft} saddr", bits)
    return equal(source, Part(str(network), address))


def to_group(group: int, prefix: str = "") -> Part:
    """Hands the packet to an NFLOG group, with a prefix if one is given."""
    number = be16(LogAttr.GROUP, group)
    if not prefix:
        return Part(f"log group {group}", expression("log", {}, number))
    data = expression("log", {}, number, string(LogAttr.PREFIX, prefix))
    return Part(f'log prefix "{prefix}" group {group}', data)


def limit(rate: int, unit: str, burst: int, flags: int = 0) -> Part:
    """Goes on for so many packets in a unit of time, with NFT_LIMIT_F_INV for those beyond them."""
    words = "limit rate"
    if flags & NFT_LIMIT_F_INV:
        words = "limit rate over"
    speed = be64(LimitAttr.RATE, rate) + be64(LimitAttr.UNIT, LIMIT_SECONDS[unit])
    data = expression("limit", {LimitAttr.BURST: burst, LimitAttr.FLAGS: flags}, speed)
    return Part(f"{words} {rate}/{unit} burst {burst} packets", data)


def per_second(rate: int) -> Part:
    """Goes on for so many packets each second."""
    return limit(rate, "second", rate)


def key_of(name: str, number: int, length: int) -> Part:
    """The type of a set's elements; its number is for nft's listing."""
    return Part(f"type {name}", be32(SetAttr.KEY_TYPE, number) + be32(SetAttr.KEY_LEN, length))


# The routers heard of lately, by the hash of their address
ROUTERS = Set(
    "routers",
    (
        key_of("mark", NFT_TYPE_MARK, 4),
        Part(f"size {BUCKETS}", nested(SetAttr.DESC, be32(SetDescAttr.SIZE, BUCKETS))),
        Part("flags dynamic,timeout", be32(SetAttr.FLAGS, NFT_SET_EVAL | NFT_SET_TIMEOUT)),
        Part("timeout 1m", be64(SetAttr.TIMEOUT, 60_000)),
    ),
)


def in_a_burst(family: Family) -> Part:
    """The packet belongs to a burst of its router's, which is how genuine errors come.

    It is the fourth or later of a burst, and one of the first ten of its bucket or one a minute.
    Of 350,000 errors a second from random sources next to none has that shape; one loud source, or
    1,000, soon use up their own buckets (ten a minute left 1,000 of them 167 a second, and a third
    of the genuine went unheard).
    """
    numbers = {
        HashAttr.SREG: NFT_REG_1,
        HashAttr.DREG: NFT_REG_1,
        HashAttr.LEN: family.address_len,
        HashAttr.MODULUS: BUCKETS,
    }
    bucket = expression("hash", numbers)
    late = limit(100, "second", 3, NFT_LIMIT_F_INV)
    few = limit(1, "minute", 10)
    update = expression(
        "dynset",
        {
            DynsetAttr.OP: NFT_DYNSET_OP_UPDATE,
            DynsetAttr.SREG_KEY: NFT_REG_1,
            DynsetAttr.FLAGS: NFT_DYNSET_F_EXPR,
        },
        string(DynsetAttr.SET_NAME, ROUTERS.name),
        nested(DynsetAttr.EXPRESSIONS, late.data, few.data),
    )
    key = f"jhash {family.nft} saddr mod {BUCKETS}"
    text = f"update @{ROUTERS.name} {{ {key} {late.text} {few.text} }}"
    return Part(text, load_source(family) + bucket + update)


def peers_set(family: Family) -> str:
    """The name of the set of a family's peers."""
    return f"peers_{family.name}"


def make_sets(site: Site, rate: int) -> Iterator[Set]:
    """The sets that nflog_rules() uses."""
    if site.bursts and rate:
        yield ROUTERS
    for family in FAMILIES:
        addresses = site.senders.of(family)
        if addresses:
            kind = key_of(f"{family.name}_addr", family.nft_type, family.address_len)
            yield Set(peers_set(family), (kind,), tuple(addresses))


def base_chain(name: str, hook_name: str, hook: int, priority: int) -> Chain:
    """A chain that the kernel calls from a hook."""
    place = be32(HookAttr.HOOKNUM, hook) + be32(HookAttr.PRIORITY, priority)
    data = nested(ChainAttr.HOOK, place) + string(ChainAttr.TYPE, "filter")
    text = f"type filter hook {hook_name} priority {priority}; policy accept;"
    return Chain(name, Part(text, data))


CHAINS = (
    Chain("mtu_errors"),
    Chain("copies_in"),
    Chain("shed"),
    Chain("senders"),
    base_chain("prerouting", "prerouting", NF_INET_PRE_ROUTING, NF_IP_PRI_BEFORE_RAW),
    Chain("copies"),
    base_chain("output", "output", NF_INET_LOCAL_OUT, NF_IP_PRI_BEFORE_RAW),
    Chain("copies_out"),
    base_chain("copy_mark", "output", NF_INET_LOCAL_OUT, NF_IP_PRI_BEHIND_RAW),
    Chain("owned"),
    Chain("deliveries"),
    base_chain("guard", "output", NF_INET_LOCAL_OUT, NF_IP_PRI_BEHIND_CONNTRACK),
)


def nflog_rules(group: int, site: Site, rate: int) -> list[Rule]:
    """The rules that feed the NFLOG group, with `rate` errors a second at most; 0: all.

    Within a chain they stand in the order in which they are appended.
    """
    rpf = (FAILS_RPF, to_group(group, RPF_PREFIX), RETURN)
    rules = [Rule("mtu_errors", rpf)]
    rules.append(Rule("mtu_errors", (to_group(group),)))
    after_copies = "mtu_errors"  # where copies, and routers' errors, go next
    after_routers = "mtu_errors"
    if rate:
        after_copies = "copies_in"
        after_routers = "shed"
        rules.append(Rule("copies_in", (per_second(rate), goto("mtu_errors"))))
        rules += shed_rules(rate, site.bursts)
        for family in FAMILIES:
            counted = (is_family(family), count(shed_counter(family)))
            rules.append(Rule("copies_in", counted))
            rules.append(Rule("shed", counted))
    for parts in copy_senders(site.senders):
        rules.append(Rule("senders", (*parts, goto(after_copies))))
    for iface in site.ifaces:
        came_in = equal(IIFNAME, interface(iface))
        rules.append(Rule("senders", (came_in, goto(after_routers))))
    for family in FAMILIES:
        rules.append(Rule("prerouting", (is_error(family), goto("senders"))))
    return rules


def shed_counter(family: Family) -> str:
    """The name of the counter of errors that the kernel does not give to the daemon."""
    return f"shed_{family.name}"


def shed_rules(rate: int, bursts: bool) -> list[Rule]:
    """How routers share the rate, so that the kernel sheds a flood and still hears the others.

    Seven eighths are for whoever comes first, which in a flood is the flood.
    One eighth, in each family, is kept for errors in bursts: in_a_burst().
    Of a rate of 1,000, random sources that send 350,000 use up the 875; then a router sends a burst
    of ten, and its fourth to tenth error pass, out of the 125.
    """
    if not bursts:
        return [Rule("shed", (per_second(rate), goto("mtu_errors")))]
    # Of low rates more, up to half: with 1,000 peers 100 errors pass, and bursts have ten
    kept = min(max(50, rate // 8), max(1, rate // 2))
    first_come = per_second(max(1, rate - kept))
    rules = [Rule("shed", (first_come, goto("mtu_errors")))]
    for family in FAMILIES:
        parts = (in_a_burst(family), per_second(kept), goto("mtu_errors"))
        rules.append(Rule("shed", parts))
    return rules


def copy_senders(senders: CopySenders) -> Iterator[tuple[Part, ...]]:
    """What tells copies by their sender; each of these alone.

    They come in on any interface, since peers may be known by inner addresses. They have a budget
    of their own, which no flood of others' errors uses up. A copy ends here: what a peer sent to
    somebody else and this node forwards is none.
    """
    for family in FAMILIES:
        if senders.of(family):
            yield is_from_set(family, peers_set(family)), NOT_FORWARDED
    for network in senders.networks:
        yield is_from_network(network), NOT_FORWARDED
    # Routers of a group's subnet are neighbours, too: what is no broadcast or multicast may be
    # theirs.
    for network in senders.neighbours:
        yield is_from_network(network), TO_GROUP


def guard_rules(site: Site) -> list[Rule]:
    """The rules that keep our copies out of conntrack, and our deliveries inside a node that does
    not own the flow.

    `notrack` does not make the kernel track connections, and stays without conntrack: the first
    copy may be the first packet that conntrack sees, and be dropped as INVALID.
    """
    rules = marked_rules("output", MARK_COPY, "copies", (NOTRACK, ACCEPT))
    if site.copy_mark is not None:
        rules += marked_rules("copy_mark", MARK_COPY, "copies_out", (set_mark(site.copy_mark),))
    rules += marked_rules("guard", MARK_DELIVER, "deliveries", (goto("owned"),))
    for parts in owned_flows(site):
        rules.append(Rule("owned", (*parts, ACCEPT)))
    rules.append(Rule("owned", (DROP,)))
    return rules


def marked_rules(hook: str, mark: int, chain: str, action: tuple[Part, ...]) -> list[Rule]:
    """What happens to our errors with this mark; a packet that is not ours costs one test."""
    our_mark = equal(MARK, Part(f"{mark:#x}", host32(mark)))
    rules = [Rule(hook, (our_mark, goto(chain)))]
    for family in FAMILIES:
        rules.append(Rule(chain, (is_error(family), *action)))
    return rules


def owned_flows(site: Site) -> Iterator[tuple[Part, ...]]:
    """What tells a delivery about a flow of this node's own; each of these alone.

    A flow that this node only forwards passes none of them. A `ct` expression makes the kernel
    track connections, so there is none where conntrack is not in use.
    """
    # A VRF's packets pass OUTPUT twice: with this device, untracked, and then with its member
    for vrf in site.vrfs:
        yield (equal(OIFNAME, interface(vrf)),)
    # What this node translates: pods behind NAT of either kind
    if site.conntrack:
        yield RELATED, TRANSLATED
    # What it routes elsewhere than where errors come in: pods with routed addresses
    if site.uplinks:
        inward = [unequal(OIFNAME, interface(name)) for name in ("lo", *site.uplinks)]
        if site.conntrack:
            inward.insert(0, RELATED)
        yield tuple(inward)
    # Its own addresses. To `lo` alone: where an address has just gone, what was meant for it would
    # take the default route.
    yield equal(OIFNAME, interface("lo")), TO_LOCAL


def whole_name(group: int) -> str:
    """Of the table that feeds this NFLOG group and guards deliveries."""
    return f"pmtud_{group}"


def guard_name(group: int) -> str:
    """Of the table that guards only, with --rules off."""
    return f"pmtud_{group}_guard"


def whole_table(config: Config, site: Site) -> Table:
    """All that the daemon installs."""
    rate = site.senders.rate(config.rate)
    rules = nflog_rules(config.nflog_group, site, rate) + guard_rules(site)
    return make_table(whole_name(config.nflog_group), make_sets(site, rate), rules)


def guard_table(config: Config, site: Site) -> Table:
    """What the daemon installs with --rules off."""
    return make_table(guard_name(config.nflog_group), (), guard_rules(site))


def make_table(name: str, sets: Iterable[Set], rules: Sequence[Rule]) -> Table:
    """A table with the chains that these rules are in."""
    used = {rule.chain for rule in rules}
    chains = tuple(chain for chain in CHAINS if chain.name in used)
    counters = tuple(map(shed_counter, FAMILIES)) if "shed" in used else ()
    return Table(name, counters, tuple(sets), chains, tuple(rules))


def nft_text(table: Table) -> list[str]:
    """The lines with which nft puts this table in place of what is there, in one transaction."""
    name = f"table inet {table.name}"
    lines = [name, f"delete {name}", f"{name} {{"]
    lines += [f"\tcounter {counter} {{ }}" for counter in table.counters]
    for one in table.sets:
        lines += [f"\tset {one.name} {{", f"\t\t{set_text(one)}", "\t}"]
    for chain in table.chains:
        lines.append(f"\tchain {chain.name} {{")
        if chain.hook:
            lines.append(f"\t\t{chain.hook.text}")
        lines += [f"\t\t{rule.text}" for rule in table.rules if rule.chain == chain.name]
        lines.append("\t}")
    return [*lines, "}"]


def set_text(one: Set) -> str:
    """What stands between the braces of a set."""
    text = " ".join(f"{part.text};" for part in one.parts)
    if not one.elements:
        return text
    elements = ", ".join(map(address_text, one.elements))
    return f"{text} elements = {{ {elements} }}"


Request = tuple[int, bytes]  # type and payload of one message of nftables


def replace_requests(table: Table, flags: int) -> list[Request]:
    """The messages that put this table, with these NFT_TABLE_F_ flags, in place of what is there.

    Make, so that deleting never fails, delete, make anew with contents.
    """
    name = string(TableAttr.NAME, table.name)
    requests = [
        (NFT_MSG_NEWTABLE, name),
        (NFT_MSG_DELTABLE, name),
        (NFT_MSG_NEWTABLE, name + be32(TableAttr.FLAGS, flags)),
    ]
    for counter in table.counters:
        requests.append((NFT_MSG_NEWOBJ, counter_object(table.name, counter)))
    for number, one in enumerate(table.sets, 1):
        requests += set_requests(table.name, one, number)
    for chain in table.chains:
        payload = string(ChainAttr.TABLE, table.name)
        payload += string(ChainAttr.NAME, chain.name)
        if chain.hook:
            payload += chain.hook.data
        requests.append((NFT_MSG_NEWCHAIN, payload))
    for rule in table.rules:
        payload = string(RuleAttr.TABLE, table.name)
        payload += string(RuleAttr.CHAIN, rule.chain)
        payload += nested(RuleAttr.EXPRESSIONS, rule.data)
        requests.append((NFT_MSG_NEWRULE, payload))
    return requests


def counter_object(table: str, name: str) -> bytes:
    """What names a counter of a table."""
    names = string(ObjectAttr.TABLE, table) + string(ObjectAttr.NAME, name)
    return names + be32(ObjectAttr.TYPE, NFT_OBJECT_COUNTER) + nested(ObjectAttr.DATA)


def set_requests(table: str, one: Set, number: int) -> Iterator[Request]:
    """The messages that make a set, the table's first or a later one, and fill it."""
    names = string(SetAttr.TABLE, table) + string(SetAttr.NAME, one.name)
    properties = b"".join(part.data for part in one.parts)
    yield NFT_MSG_NEWSET, names + be32(SetAttr.ID, number) + properties
    names = string(ElemListAttr.TABLE, table) + string(ElemListAttr.SET, one.name)
    keys = [set_element(address) for address in one.elements]
    for start in range(0, len(keys), ELEMENTS_MAX):
        elements = nested(ElemListAttr.ELEMENTS, *keys[start : start + ELEMENTS_MAX])
        yield NFT_MSG_NEWSETELEM, names + elements


def set_element(address: bytes) -> bytes:
    """One element of a set of addresses."""
    value = attribute(DataAttr.VALUE, address)
    return nested(ListAttr.ELEM, nested(ElemAttr.KEY, value))


IPTABLES_ADDRESSES_MAX = 100  # in one command: a line that people can still read
IPTABLES_ERRORS = {
    IPV4: "-p icmp -m icmp --icmp-type 3/4",
    IPV6: "-p icmpv6 -m icmp6 --icmpv6-type packet-too-big",
}


def iptables_text(config: Config, site: Site) -> list[str]:
    """The same as iptables and ip6tables commands, without the limits.

    RPF verdicts by the rpfilter match.
    """
    lines: list[str] = []
    for family in FAMILIES:
        lines += iptables_nflog(family, config.nflog_group, site)
        lines += iptables_guard(family, site)
    return lines


def iptables_nflog(family: Family, group: int, site: Site) -> Iterator[str]:
    """The commands that feed the NFLOG group."""
    command = f"{family.nft}tables -t raw -A PREROUTING"
    error = IPTABLES_ERRORS[family]
    target = f"-j NFLOG --nflog-group {group}"
    for iface in site.ifaces:
        begin = f"{command} -i {shlex.quote(iface)} {error}"
        yield f'{begin} -m rpfilter --invert {target} --nflog-prefix "{RPF_PREFIX}"'
        yield f"{begin} -m rpfilter {target}"
    if len(site.ifaces) > 1 and site.senders != NOBODY:
        yield "# copies on further interfaces are not heard: `! -i` cannot be given twice"
    if len(site.ifaces) == 1:
        begin = f"{command} ! -i {shlex.quote(site.ifaces[0])} {error}"
        for sender in iptables_senders(family, site.senders):
            yield f"{begin} {sender} {target}"


def iptables_guard(family: Family, site: Site) -> Iterator[str]:
    """The commands that do what guard_rules() does."""
    command = f"{family.nft}tables"
    error = IPTABLES_ERRORS[family]
    copy = f"{error} -m mark --mark {MARK_COPY:#x}"
    yield f"{command} -t raw -A OUTPUT {copy} -j CT --notrack"
    if site.copy_mark is not None:
        yield f"{command} -t mangle -A OUTPUT {copy} -j MARK --set-mark {site.copy_mark:#x}"
    begin = f"{command} -t mangle -A OUTPUT {error} -m mark --mark {MARK_DELIVER:#x}"
    for vrf in site.vrfs:
        yield f"{begin} -o {shlex.quote(vrf)} -j ACCEPT"
    yield f"{begin} -m conntrack --ctstate RELATED -m conntrack --ctstate SNAT,DNAT -j ACCEPT"
    yield f"{begin} -o lo -m addrtype --dst-type LOCAL -j ACCEPT"
    for iface in ("lo", *site.uplinks):
        yield f"{begin} -o {shlex.quote(iface)} -j DROP"
    yield f"{begin} -m conntrack ! --ctstate RELATED -j DROP"


def iptables_senders(family: Family, senders: CopySenders) -> Iterator[str]:
    """What matches a copy by its sender; iptables makes a rule of each address in a list."""
    ends_here = "-m addrtype ! --dst-type UNICAST"
    addresses = list(map(address_text, senders.of(family)))
    for start in range(0, len(addresses), IPTABLES_ADDRESSES_MAX):
        yield f"-s {','.join(addresses[start : start + IPTABLES_ADDRESSES_MAX])} {ends_here}"
    for network in senders.networks:
        if network.version == family.version:
            yield f"-s {network} {ends_here}"
    for network in senders.neighbours:
        if network.version == family.version:
            yield f"-s {network} -m pkttype ! --pkt-type unicast"


# -----------------------------------------------------------------------------
# Section: policy -- whose error it is, whether it is believed, and how often, pure


ROUTER, PEER = ORIGINS = ("router", "peer")  # who sent an error to this node
# Verdicts on addresses that are remembered: 0.2 us instead of 0.6, and more with networks
KNOWN_MAX = 4096
# What becomes of an error: a copy to every peer and a delivery here, a delivery here only, nothing
# (--no-rescue)
REPLICATE, DELIVER, NOTHING = ACTIONS = ("replicate", "deliver", "none")


CIRCLE_SECONDS = 1.0  # an error that circles is known again for so long; it takes milliseconds
# What tells messages about one flow apart: checksum, MTU, and the start of the quoted header with
# its length and IPv4's id, which the checksum does not cover (the header has its own)
MESSAGE_ID = slice(2, 14)

Addresses = tuple[bytes, bytes, bytes]  # source, destination, quoted source; packed


class Verdict(NamedTuple):
    """What becomes of an error."""

    origin: str  # one of ORIGINS
    action: str  # one of ACTIONS
    reason: Optional[Reason] = None  # why nothing is done


class Membership:
    """Whether a packed address is in any of some networks."""

    def __init__(self, networks: Iterable[Network] = ()) -> None:
        self.networks = tuple(networks)

    def __contains__(self, packed: bytes) -> bool:
        if not self.networks:
            return False
        address = ipaddress.ip_address(packed)
        return any(address in network for network in self.networks)


class WhoIsWho(NamedTuple):
    """Whose addresses are whose, as this node sees it now.

    Replaced as a whole when addresses or peers change.
    """

    own: frozenset[bytes] = frozenset()  # every address of this node
    unshared: frozenset[bytes] = frozenset()  # those by which peers know it; no VIPs
    groups: frozenset[bytes] = frozenset()  # broadcast and multicast addresses that reach it
    peers: frozenset[bytes] = frozenset()
    networks: Membership = Membership()  # --ignore-networks
    neighbours: Membership = Membership()  # the networks that broadcast and multicast peers reach


class Recent:
    """A bounded memory of keys.

    At least `seconds` long unless more than `capacity` keys came in that time.
    """

    def __init__(self, seconds: float, capacity: int = 8192) -> None:
        self._seconds = seconds
        self._capacity = capacity
        self._turned = 0.0
        self._young: dict[Any, Any] = {}
        self._old: dict[Any, Any] = {}

    def get(self, key: Any) -> Any:
        """What was put last under this key, None if it is forgotten."""
        value = self._young.get(key)
        return self._old.get(key) if value is None else value

    def put(self, key: Any, value: Any, now: float) -> None:
        """Remember; two generations make forgetting cost nothing."""
        is_over = now - self._turned >= self._seconds
        if is_over or len(self._young) >= self._capacity:
            self._old = self._young
            self._young = {}
            self._turned = now
        self._young[key] = value

    def __len__(self) -> int:
        return len(self._young) + len(self._old)


class TokenBuckets:
    """Lets `rate` events a second through for each key, a second's worth at once.

    0 lets everything through.
    """

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

    def __init__(self, config: Config, who: WhoIsWho) -> None:
        self.set_who(who)
        self._min_mtu = {4: config.min_mtu[0], 6: config.min_mtu[1]}
        self._ports = config.ports
        self.services = Membership(config.service_networks) if config.service_networks else None
        self._limits = config.flow_interval or config.source_rate or config.rate
        self._interval = config.flow_interval
        self._flows = Recent(max(config.flow_interval, CIRCLE_SECONDS), capacity=32768)
        self._sources = TokenBuckets(config.source_rate)
        self._total = TokenBuckets(config.rate)

    def set_who(self, who: WhoIsWho) -> None:
        """From now on judge by this."""
        self.who = who
        self.known: dict[Addresses, Verdict] = {}  # of by_addresses()

    def by_addresses(self, error: MtuError) -> Verdict:
        """What the addresses alone decide, remembered."""
        addresses = (error.src, error.dst, error.quoted_src)
        verdict = self.known.get(addresses)
        if verdict is None:
            verdict = classify(error, self.who)
            if not verdict.reason and self.services and error.quoted_src not in self.services:
                verdict = Verdict(verdict.origin, NOTHING, Reason.NOT_SERVICE)
            if len(self.known) >= KNOWN_MAX:
                self.known.clear()
            self.known[addresses] = verdict
        return verdict

    def invalid(self, error: MtuError) -> Optional[Reason]:
        """The first reason not to believe this error, or not to act on it.

        None if there is none.
        """
        if error.quoted_protocol not in error.family.protocols:
            return Reason.QUOTED_PROTO
        mtu = error.mtu or error.believed_mtu  # mostly the first, which is faster
        if mtu < self._min_mtu[error.family.version]:
            return Reason.MTU_TOO_SMALL
        if mtu >= error.quoted_length and mtu >= error.quoted_length_max:
            return Reason.MTU_NOT_SMALLER
        if self._ports and error.source_port not in self._ports:
            return Reason.PORT_NOT_LISTED
        return None

    def limited(self, error: MtuError, origin: str, now: float) -> Optional[Reason]:
        """The limit this error exceeds, None if it may pass.

        Peers and routers have separate budgets. The same message once more with a lower TTL uses up
        none: this node has forwarded it, and the fabric has sent it back.
        """
        if not self._limits:
            return None
        flow = (
            origin,
            error.quoted_src,
            error.quoted_dst,
            error.quoted_protocol,
            error.source_port,
            error.destination_port,
            error.flow_id,
            error.mtu,
        )
        last = self._flows.get(flow)
        if last is not None:
            passed, ttl, start = last
            if error.ttl < ttl and error.icmp[MESSAGE_ID] == start:
                return Reason.CIRCLING
            if now - passed < self._interval:
                return Reason.LIMITED_FLOW
        if not self._sources.take(error.src, now):
            return Reason.LIMITED_SOURCE
        if not self._total.take(origin, now):
            return Reason.LIMITED_TOTAL
        if self._interval:
            self._flows.put(flow, (now, error.ttl, error.icmp[MESSAGE_ID]), now)
        return None


def is_martian(packed: bytes) -> bool:
    """Whether no packet on a wire can have this source: loopback, unspecified, group addresses (RFC
    1122, RFC 4291).

    Linux takes 240.0.0.0/4 as unicast, and all of 0.0.0.0/8 but 0.0.0.0 itself (since 5.3); private
    fabrics use them.
    """
    first = packed[0]
    if len(packed) == 16:
        return first == 0xFF or packed[:10] == bytes(10)
    if packed in (bytes(4), b"\xff" * 4):
        return True
    return first == 127 or 224 <= first < 240


def is_link_local(packed: bytes) -> bool:
    """169.254.0.0/16 and fe80::/10.

    A router may report from there, but no routed flow has such an end.
    """
    if len(packed) == 4:
        return packed[:2] == b"\xa9\xfe"
    return packed[0] == 0xFE and packed[1] & 0xC0 == 0x80


def classify(error: MtuError, who: WhoIsWho) -> Verdict:
    """Who sent this error, by its addresses alone, and what that makes of it.

    Only an error whose outer destination equals its quoted source and that no node sent is ever
    replicated; a copy never has that shape, so no option can make a loop. The neighbours that a
    broadcast or multicast peer reaches may send copies, but are no nodes for certain: the subnet's
    routers are among them, and report from there.
    """
    src = error.src
    quoted_src = error.quoted_src
    if src in who.own:
        return Verdict(PEER, NOTHING, Reason.OWN)
    is_node = src in who.peers or src in who.networks
    origin = PEER if is_node else ROUTER
    # A forged error must not reach flows on 127.0.0.1, which the kernel shields as martians.
    if is_martian(src) or is_martian(quoted_src) or is_link_local(quoted_src):
        return Verdict(origin, NOTHING, Reason.MISADDRESSED)
    if error.dst == quoted_src and is_node:
        return Verdict(PEER, NOTHING, Reason.IGNORED_NETWORK)
    if error.dst == quoted_src and quoted_src in who.unshared:
        return Verdict(ROUTER, DELIVER)  # this address has one owner
    if error.dst == quoted_src:
        return Verdict(ROUTER, REPLICATE)
    is_for_us = error.dst in who.own or error.dst in who.groups
    if is_for_us and (is_node or src in who.neighbours):
        return Verdict(PEER, DELIVER)
    return Verdict(origin, NOTHING, Reason.MISADDRESSED)


def decide(error: MtuError, policy: Policy, now: float) -> Verdict:
    """Who sent the error, and what to do with it or why to drop it.

    `now` in seconds of a monotonic clock.
    """
    verdict = policy.by_addresses(error)
    if verdict.reason:
        return verdict
    reason = policy.invalid(error) or policy.limited(error, verdict.origin, now)
    if reason:
        return Verdict(verdict.origin, NOTHING, reason)
    return verdict


# -----------------------------------------------------------------------------
# Section: counters -- plain integers on the packet's way, read at scrape time

MTU_BUCKETS = (
    576,
    1024,
    1280,
    1300,
    1350,
    1380,
    1400,
    1420,
    1440,
    1450,
    1460,
    1480,
    1492,
    1500,
    4000,
    8950,
    9000,
)
SECONDS_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
DELIVERY_RESULTS = ("owner", "not_owner", "error")


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
        labels = [*map(str, self.bounds), "+Inf"]
        return list(zip(labels, map(float, accumulate(self.counts))))


class CopyCounts:
    """Copies sent and refused for each peer of one set; peers that stay keep their counts.

    A round is one copy to every peer, so that counting costs the same for 1 peer and for 1,000.
    """

    def __init__(self, peers: Sequence[str], before: Optional[CopyCounts] = None) -> None:
        self.rounds = 0
        self.refused = [0] * len(peers)
        self.peers = tuple(peers)
        self._sent_before = before.sent() if before else {}
        self._refused_before = before.errors() if before else {}
        self._totals_before = before.totals() if before else (0, 0)

    def totals(self) -> tuple[int, int]:
        """Copies sent and refused, those of peers that have left included."""
        sent, refused = self._totals_before
        refused_now = sum(self.refused)
        return sent + self.rounds * len(self.peers) - refused_now, refused + refused_now

    def sent(self) -> dict[str, int]:
        """Copies the kernel took, by peer."""
        sent = {}
        for peer, refused in zip(self.peers, self.refused):
            sent[peer] = self._sent_before.get(peer, 0) + self.rounds - refused
        return sent

    def errors(self) -> dict[str, int]:
        """Copies the kernel refused, by peer."""
        found = {}
        for peer, refused in zip(self.peers, self.refused):
            found[peer] = self._refused_before.get(peer, 0) + refused
        return found


OTHER = "other"


class Counters:
    """Everything counted since the start."""

    def __init__(self) -> None:
        names = [family.name for family in FAMILIES]
        self.received = dict.fromkeys(product(names, ORIGINS), 0)
        self.dropped = dict.fromkeys(Reason, 0)
        self.acted = dict.fromkeys(ACTIONS, 0)
        self.delivered = dict.fromkeys(product(names, DELIVERY_RESULTS), 0)
        self.copies: dict[str, CopyCounts] = {}  # by family
        self.peers: Mapping[str, int] = {}  # by source
        self.refresh_failures: dict[str, int] = {}
        self.rpf_rescued = 0
        self.nflog_lost = 0
        self.copies_needed = dict.fromkeys(names, 0)
        # By peer; of those that are not listed: OTHER
        self.copies_received: dict[str, int] = {OTHER: 0}
        # What is looked up for a scrape
        self.shed: dict[str, int] = {}  # by family
        self.unready: dict[str, int] = {}  # 1 where there is this reason, else 0
        self.resolved: dict[str, int] = {}  # by peer: 0 where nobody on the link has its address
        self.node_info: dict[tuple[str, str, str], int] = {}  # by name, family and address
        self.last_error_received = 0.0  # seconds since the epoch
        self.reported_mtu = Histogram(MTU_BUCKETS)
        self.batch_duration = Histogram(SECONDS_BUCKETS)

    def follow(self, peers: Mapping[str, int], senders: Iterable[str]) -> None:
        """From now on these are the peers of each source, and those that send copies."""
        self.peers = peers
        before = self.copies_received
        self.copies_received = {label: before.get(label, 0) for label in (*senders, OTHER)}

    def copies_sent(self) -> dict[str, int]:
        """Copies handed to the kernel, by peer, for the peers of now."""
        found: dict[str, int] = {}
        for copies in self.copies.values():
            found.update(copies.sent())
        return found

    def copy_errors(self) -> dict[str, int]:
        """Copies the kernel refused, by peer, for the peers of now."""
        found: dict[str, int] = {}
        for copies in self.copies.values():
            found.update(copies.errors())
        return found

    def summary(self) -> dict[str, int]:
        """The totals of the minute's log line; they never fall."""
        copies = [counts.totals() for counts in self.copies.values()]
        totals = {
            "received": sum(self.received.values()),
            "replicated": self.acted["replicate"],
            "copies": sum(sent for sent, _ in copies),
            "owned": sum(self.delivered[family.name, "owner"] for family in FAMILIES),
            "rpf_rescued": self.rpf_rescued,
            "copy_errors": sum(refused for _, refused in copies),
            "nflog_lost": self.nflog_lost,
        }
        for reason, count in self.dropped.items():
            totals[f"dropped_{reason.value}"] = count
        return totals


class Metric(NamedTuple):
    """One exported metric: name without suffix, type, help, label names, and how to read its
    values.
    """

    name: str
    kind: str
    help: str
    labels: tuple[str, ...]
    read: Callable[[Counters], Mapping[Any, Any]]


METRICS = (
    Metric(
        "pmtud_received",
        "counter",
        "ICMP errors taken from NFLOG.",
        ("family", "origin"),
        lambda c: c.received,
    ),
    Metric(
        "pmtud_dropped",
        "counter",
        "Errors not acted on, by reason.",
        ("reason",),
        lambda c: {(reason.value,): count for reason, count in c.dropped.items()},
    ),
    Metric(
        "pmtud_acted",
        "counter",
        "Errors acted on: replicated and delivered, delivered only, or nothing to do.",
        ("action",),
        lambda c: c.acted,
    ),
    Metric(
        "pmtud_copies_sent",
        "counter",
        "Copies the kernel took, by peer.",
        ("peer",),
        lambda c: c.copies_sent(),
    ),
    Metric(
        "pmtud_copy_errors",
        "counter",
        "Copies the kernel refused to send, by peer.",
        ("peer",),
        lambda c: c.copy_errors(),
    ),
    Metric(
        "pmtud_copies_received",
        "counter",
        "Copies that came from a node, by peer; other: from one that is not listed.",
        ("peer",),
        lambda c: c.copies_received,
    ),
    Metric(
        "pmtud_copies_needed",
        "counter",
        "Copies about a flow that this node translates: nothing else told it.",
        ("family",),
        lambda c: c.copies_needed,
    ),
    Metric(
        "pmtud_delivered",
        "counter",
        "Errors given to this node's stack; owner: the kernel took it.",
        ("family", "result"),
        lambda c: c.delivered,
    ),
    Metric(
        "pmtud_rpf_rescued",
        "counter",
        "Errors that strict rp_filter drops and this node owned.",
        (),
        lambda c: {(): c.rpf_rescued},
    ),
    Metric(
        "pmtud_nflog_lost",
        "counter",
        "Errors lost between kernel and daemon (NFLOG sequence gaps).",
        (),
        lambda c: {(): c.nflog_lost},
    ),
    Metric(
        "pmtud_shed",
        "counter",
        "Errors over --rate that the kernel kept from the daemon.",
        ("family",),
        lambda c: c.shed,
    ),
    Metric(
        "pmtud_ready",
        "gauge",
        "1 where errors come in and go out, as /readyz says.",
        (),
        lambda c: {(): int(not any(c.unready.values()))},
    ),
    Metric(
        "pmtud_unready",
        "gauge",
        "1 for each reason why not.",
        ("reason",),
        lambda c: c.unready,
    ),
    Metric(
        "pmtud_peer_resolved",
        "gauge",
        "0 where nobody on the link has the peer's address.",
        ("peer",),
        lambda c: c.resolved,
    ),
    Metric(
        "pmtud_node_info",
        "gauge",
        "Always 1: the address that copies leave from.",
        ("node", "family", "address"),
        lambda c: c.node_info,
    ),
    Metric(
        "pmtud_peers",
        "gauge",
        "Peers in force, own addresses removed.",
        ("source",),
        lambda c: c.peers,
    ),
    Metric(
        "pmtud_peer_refresh_failures",
        "counter",
        "Failed refreshes of a peer source.",
        ("source",),
        lambda c: c.refresh_failures,
    ),
    Metric(
        "pmtud_last_error_received_timestamp_seconds",
        "gauge",
        "When the last error came in; 0: none yet.",
        (),
        lambda c: {(): c.last_error_received},
    ),
    Metric(
        "pmtud_reported_mtu_bytes",
        "histogram",
        "Next-hop MTU of the errors acted on, 0 as 552.",
        (),
        lambda c: {(): c.reported_mtu},
    ),
    Metric(
        "pmtud_batch_duration_seconds",
        "histogram",
        "Time to handle one batch of errors.",
        (),
        lambda c: {(): c.batch_duration},
    ),
    Metric(
        "pmtud_build_info",
        "gauge",
        "Always 1.",
        ("version", "python_version"),
        lambda c: {(__version__, platform.python_version()): 1},
    ),
)


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
                    metric.name,
                    metric.help,
                    buckets=histogram.cumulative(),
                    sum_value=histogram.sum,
                )
                continue
            family = families[metric.kind](metric.name, metric.help, labels=metric.labels)
            for key, value in values.items():
                labels = [key] if isinstance(key, str) else list(key)
                family.add_metric(labels, value)
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
        now = self.formatTime(record)
        level = record.levelname
        text = record.getMessage()
        if self._as_json:
            return json.dumps({"time": now, "level": level.lower(), "message": text, **fields})
        words = [now, level, text]
        for name, value in fields.items():
            said = str(value)
            if " " in said:
                said = json.dumps(said)
            words.append(f"{name}={said}")
        return " ".join(words)


def log(level: str, text: str, **fields: object) -> None:
    """One line on standard error."""
    number = getattr(logging, level.upper())
    if not LOGGER.isEnabledFor(number):
        return
    plain = {}
    for name, value in fields.items():
        plain[name] = value if isinstance(value, (int, float)) else str(value)
    LOGGER.log(number, text, extra={"fields": plain})


def shortened(value: Any) -> Any:
    """A text of 100 characters, which take 12 bytes each at most as JSON; numbers as they are."""
    if isinstance(value, str) and len(value) > 100:
        return f"{value[:100]} ..."
    return value


# Subscriptable from Python 3.11 on.
class PatientHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes a line only where that cannot block.

    A log that nobody reads must not stop the errors' way.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record's line, or lose it.

        A pipe that is ready takes PIPE_BUF bytes at once.
        """
        with contextlib.suppress(OSError, ValueError, TypeError):  # closed, or not there at all
            poll = select.poll()
            poll.register(self.stream, select.POLLOUT)
            for _, events in poll.poll(0):
                if events == select.POLLOUT:
                    super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        """The line; its texts are cut where it is longer than what a pipe takes, so that it stays
        JSON.
        """
        line = super().format(record)
        if len(line.encode()) < select.PIPE_BUF:
            return line
        fields = getattr(record, "fields", {})
        short = {name: shortened(value) for name, value in fields.items()}
        changed = {"msg": shortened(record.msg), "fields": short}
        cut = logging.makeLogRecord({**vars(record), **changed})
        line = super().format(cut)
        return line.encode()[: select.PIPE_BUF - 1].decode(errors="ignore")


def set_up_logging(level: str, form: str) -> None:
    """Send the program's log to standard error.

    A closed or full standard error is nobody's problem.
    """
    logging.raiseExceptions = False
    handler = PatientHandler()
    handler.setFormatter(Formatter(form == "json"))
    LOGGER.handlers[:] = [handler]
    LOGGER.propagate = False
    LOGGER.setLevel(level.upper())


class Complaints:
    """What is not in force now, and why: a warning once for as long as the problem is the same."""

    def __init__(self) -> None:
        self._said: dict[str, str] = {}

    def say(self, about: str, text: str, **fields: object) -> None:
        """Warn, unless the last warning about this said the same."""
        said = f"{text} {fields}"
        if self._said.get(about) != said:
            self._said[about] = said
            log("warning", text, **fields)

    def withdraw(self, about: str) -> None:
        """All is well again."""
        self._said.pop(about, None)

    def __contains__(self, about: str) -> bool:
        return about in self._said


class News:
    """Which lines are due: not within an hour of the last about the same, PER_MINUTE in all."""

    PER_MINUTE = 20
    SECONDS = 3600.0

    def __init__(self) -> None:
        self._known = Recent(self.SECONDS, capacity=1024)
        self._left = self.PER_MINUTE

    def is_due(self, key: object, now: float, rationed: bool = True) -> bool:
        """Whether a line about this is; `rationed` ones no more than PER_MINUTE."""
        if self._known.get(key) is not None:
            return False
        if rationed:
            if not self._left:
                return False
            self._left -= 1
        self._known.put(key, now, now)
        return True

    def renew(self) -> None:
        """A minute has gone."""
        self._left = self.PER_MINUTE


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
    except OSError as problem:
        advice = f"; {PRIVILEGES}" if isinstance(problem, PermissionError) else ""
        raise PmtudError(
            f"cannot open a raw or netlink socket ({problem.strerror}){advice}"
        ) from problem


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
        try:
            self.socket.send(data)
        except OSError as problem:
            raise NetlinkError(operation, problem.errno or errno.EIO) from problem
        first = NLMSGHDR.unpack_from(data)[3]
        found: list[tuple[int, bytes]] = []
        try:
            while True:
                for kind, sequence, payload in messages(self.socket.recv(NETLINK_BUFFER_BYTES)):
                    if 0 < sequence < first:  # more errors of a batch that failed before
                        continue
                    if kind == NLMSG_ERROR and error_number(payload):
                        raise NetlinkError(operation, error_number(payload))
                    if sequence == last and kind in (NLMSG_ERROR, NLMSG_DONE):
                        return found
                    if sequence:
                        found.append((kind, payload))
        except OSError as problem:  # a timeout has no errno
            raise NetlinkError(operation, problem.errno or errno.ETIMEDOUT) from problem

    def request(
        self, operation: str, kind: int, flags: int, payload: bytes
    ) -> list[tuple[int, bytes]]:
        """One request; with NLM_F_DUMP its many answers."""
        sequence = self.next_sequence()
        if not flags & NLM_F_DUMP:
            flags |= NLM_F_ACK
        return self.send(operation, message(kind, flags, sequence, payload), sequence)


def libc_function(name: str, *types: Any) -> Callable[..., int]:
    """A function of libc that raises OSError where it fails."""

    def check_result(result: Any, function: object, arguments: object) -> Any:
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return result

    function = ctypes.CDLL(None, use_errno=True)[name]
    function.argtypes = types
    function.restype = ctypes.c_int
    function.errcheck = check_result
    return function


def drop_privileges() -> None:
    """Keep CAP_NET_ADMIN and CAP_NET_RAW, for now and for good; raises OSError.

    For the calling thread and those it starts later. Sockets can still be opened anew and rules
    replaced; the user stays, so root still reads its own files, though no longer those of others.
    """
    capset = libc_function("capset", ctypes.c_char_p, ctypes.c_char_p)
    prctl = libc_function("prctl", ctypes.c_int, *[ctypes.c_ulong] * 4)
    needed = (CAP_NET_ADMIN, CAP_NET_RAW)
    for number in range(CAPABILITIES_MAX):
        if number not in needed:
            with contextlib.suppress(OSError):  # this kernel does not have it
                prctl(PR_CAPBSET_DROP, number, 0, 0, 0)
    kept = 1 << CAP_NET_ADMIN | 1 << CAP_NET_RAW  # effective, permitted; not inheritable
    both = USER_CAPS.pack(_LINUX_CAPABILITY_VERSION_3, 0, kept, kept, 0, 0, 0, 0)
    capset(both[:8], both[8:])
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def name_process() -> None:
    """Be `pmtud` in ps, ss and nft, which would say python3; threads started later inherit it."""
    with contextlib.suppress(OSError), open("/proc/self/comm", "w") as stream:
        stream.write("pmtud")


class LocalAddress(NamedTuple):
    """An address of this node.

    Packed in network byte order, `broadcast` empty where there is none.
    """

    packed: bytes
    prefix_length: int
    ifindex: int
    broadcast: bytes


def ask(protocol: int, operation: str, kind: int, payload: bytes) -> bytes:
    """The first answer to one netlink request; raises NetlinkError."""
    with Netlink(protocol) as netlink:
        answers: list[tuple[int, bytes]] = netlink.request(operation, kind, 0, payload)
    return answers[0][1]


def dump(operation: str, request: int, answer: int, header: bytes) -> Iterator[bytes]:
    """The payloads of all answers to one rtnetlink dump request, at least as long as its header."""
    with Netlink(NETLINK_ROUTE) as netlink:
        for kind, payload in netlink.request(operation, request, NLM_F_DUMP, header):
            if kind == answer and len(payload) >= len(header):
                yield payload


def local_addresses() -> list[LocalAddress]:
    """All addresses configured in this network namespace (RTM_GETADDR).

    Asking the kernel for its list, not trying to bind: net.ipv4.ip_nonlocal_bind lets every bind
    succeed.
    """
    found = []
    query = bytes(IFADDRMSG.size)
    for payload in dump("list addresses", RTM_GETADDR, RTM_NEWADDR, query):
        _, prefix_length, _, _, ifindex = IFADDRMSG.unpack_from(payload)
        attrs = attributes(payload, IFADDRMSG.size)
        packed = attrs.get(IFA_ADDRESS, b"")
        packed = attrs.get(IFA_LOCAL, packed)  # IFA_ADDRESS is then the other end of the link
        broadcast = attrs.get(IFA_BROADCAST, b"")
        if not broadcast and len(packed) == 4 and prefix_length < 31:
            # `ip addr add` without `brd +`
            network = ipaddress.ip_interface((packed, prefix_length)).network
            broadcast = network.broadcast_address.packed
        if len(packed) in (4, 16):
            found.append(LocalAddress(packed, prefix_length, ifindex, broadcast))
    return found


class Hop(NamedTuple):
    """One way out of a route.

    An interface index, and the packed gateway, empty if there is none.
    """

    ifindex: int
    gateway: bytes
    onlink: bool = False  # of a nexthop object; other routes say so in their flags


def nexthop_hops(number: bytes) -> list[Hop]:
    """The hops of a nexthop object (four bytes, host order), those of all members for a group.

    None if it is gone or a blackhole, or if the kernel takes the number for none.
    """
    query = NHMSG.pack(*bytes(5)) + attribute(NHA_ID, number)
    try:
        answer = ask(NETLINK_ROUTE, "find a nexthop", RTM_GETNEXTHOP, query)
    except NetlinkError:
        return []
    attrs = attributes(answer, NHMSG.size)
    if NHA_GROUP in attrs:  # of nexthops, never of groups
        hops = []
        for (member,) in NEXTHOP_GRP.iter_unpack(attrs[NHA_GROUP]):
            hops += nexthop_hops(host32(member))
        return hops
    if NHA_OIF not in attrs:
        return []
    flags = NHMSG.unpack_from(answer)[4]
    is_onlink = bool(flags & RTNH_F_ONLINK)
    return [Hop(host_number(attrs, NHA_OIF), attrs.get(NHA_GATEWAY, b""), is_onlink)]


def gateway_of(attrs: dict[int, bytes]) -> bytes:
    """The packed gateway of a route or next hop, empty where there is none."""
    via = attrs.get(RTA_VIA, b"")[2:]  # struct rtvia: the family before the address
    return attrs.get(RTA_GATEWAY, via)


def route_hops(attrs: dict[int, bytes]) -> list[Hop]:
    """The next hops of a route, several for a multipath route.

    With net.ipv4.nexthop_compat_mode 0 the kernel names a nexthop object only by its number.
    """
    if RTA_OIF in attrs:
        return [Hop(host_number(attrs, RTA_OIF), gateway_of(attrs))]
    if RTA_NH_ID in attrs and RTA_MULTIPATH not in attrs:
        return nexthop_hops(attrs[RTA_NH_ID])
    data = attrs.get(RTA_MULTIPATH, b"")
    at = 0
    found = []
    while len(data) - at >= RTNEXTHOP.size:
        length, _, _, ifindex = RTNEXTHOP.unpack_from(data, at)
        if length < RTNEXTHOP.size:
            break
        own = attributes(data[: at + length], at + RTNEXTHOP.size)
        found.append(Hop(ifindex, gateway_of(own)))
        at += length + -length % NLMSG_ALIGNTO
    return found


def interfaces_of(hops: Iterable[Hop]) -> tuple[str, ...]:
    """The names of their interfaces, each once."""
    names: dict[str, None] = {}
    for hop in hops:
        with contextlib.suppress(OSError):
            names[socket.if_indextoname(hop.ifindex)] = None
    return tuple(names)


def find_route(packed: bytes, ifindex: int = 0, flags: int = 0) -> tuple[int, list[Hop]]:
    """The flags and hops of the route to an address, on this interface if one is given.

    Raises NetlinkError.
    """
    af = family_of(packed).af
    query = RTMSG.pack(af, 8 * len(packed), *bytes(6), flags)
    query += attribute(RTA_DST, packed)
    if ifindex:
        query += attribute(RTA_OIF, host32(ifindex))
    route = ask(NETLINK_ROUTE, "find a route", RTM_GETROUTE, query)
    hops = route_hops(attributes(route, RTMSG.size))
    return RTMSG.unpack_from(route)[8], hops


class Neighbour(NamedTuple):
    """What this node knows of the way to an address of its link."""

    lladdr: bytes  # the link-layer address, empty where there is none
    is_resolved: bool  # it did not fail to answer


def neighbours() -> dict[tuple[int, bytes], Neighbour]:
    """The neighbour tables of IPv4 and IPv6 (RTM_GETNEIGH), by interface index and address."""
    found = {}
    query = bytes(NDMSG.size)
    for payload in dump("list neighbours", RTM_GETNEIGH, RTM_NEWNEIGH, query):
        _, ifindex, state, _, _ = NDMSG.unpack_from(payload)
        attrs = attributes(payload, NDMSG.size)
        lladdr = attrs.get(NDA_LLADDR, b"")
        is_resolved = not state & (NUD_INCOMPLETE | NUD_FAILED)
        key = (ifindex, attrs.get(NDA_DST, b""))
        found[key] = Neighbour(lladdr, is_resolved)
    return found


def default_route_interfaces() -> tuple[str, ...]:
    """The interfaces of the default routes with the lowest metric, IPv4 and IPv6."""
    hops: list[Hop] = []
    for family in FAMILIES:
        by_metric: dict[int, list[Hop]] = {}
        for attrs in default_routes(family):
            metric = host_number(attrs, RTA_PRIORITY)
            by_metric.setdefault(metric, []).extend(route_hops(attrs))
        if by_metric:
            hops += by_metric[min(by_metric)]
    return interfaces_of(hops)


def default_routes(family: Family) -> Iterator[dict[int, bytes]]:
    """The attributes of each default route in the main table."""
    query = RTMSG.pack(family.af, *bytes(8))
    wanted = (family.af, 0, RT_TABLE_MAIN, RTN_UNICAST)
    for payload in dump("list routes", RTM_GETROUTE, RTM_NEWROUTE, query):
        af, dst_len, _, _, table, _, _, kind, _ = RTMSG.unpack_from(payload)
        if (af, dst_len, table, kind) == wanted:
            yield attributes(payload, RTMSG.size)


def uplinks(ifaces: Sequence[str]) -> tuple[str, ...]:
    """Where errors come in, and where the default routes lead.

    No error about another node's flow may leave there.
    """
    names = [*ifaces, *default_route_interfaces()]
    return tuple(dict.fromkeys(names))


class Interface(NamedTuple):
    """A network interface as the kernel lists it."""

    ifindex: int
    flags: int
    attrs: dict[int, bytes]  # IFLA_
    info: dict[int, bytes]  # IFLA_INFO_, about its kind

    @property
    def name(self) -> str:
        """Like eth0."""
        return host_text(self.attrs, IFLA_IFNAME)

    @property
    def kind(self) -> str:
        """Like vlan or vxlan; empty for hardware."""
        return host_text(self.info, IFLA_INFO_KIND)


def list_interfaces() -> Iterator[Interface]:
    """All interfaces of this network namespace (RTM_GETLINK)."""
    query = bytes(IFINFOMSG.size)
    for payload in dump("list interfaces", RTM_GETLINK, RTM_NEWLINK, query):
        _, _, ifindex, flags, _ = IFINFOMSG.unpack_from(payload)
        attrs = attributes(payload, IFINFOMSG.size)
        info = attributes(attrs.get(IFLA_LINKINFO, b""))
        yield Interface(ifindex, flags, attrs, info)


def vrfs_of(ifaces: Iterable[str]) -> tuple[str, ...]:
    """The VRF devices that these interfaces belong to, mostly none."""
    masters: dict[str, int] = {}  # index of the master, by interface
    devices: dict[int, str] = {}
    for device in list_interfaces():
        masters[device.name] = host_number(device.attrs, IFLA_MASTER)
        if device.kind == "vrf":
            devices[device.ifindex] = device.name
    found = []
    for iface in ifaces:
        master = masters.get(iface, 0)
        if master in devices:
            found.append(devices[master])
    return tuple(dict.fromkeys(found))


def foreign_vrf(ifaces: Iterable[str]) -> str:
    """The VRF of these interfaces where this process runs in another one, or in none; empty if all
    is well.

    `ip vrf exec` binds each new socket of a process to the VRF's device.
    """
    vrfs = vrfs_of(ifaces)
    if not vrfs:
        return ""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        bound = probe.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, IFNAMSIZ)
    own = os.fsdecode(bound.rstrip(b"\0"))
    return next((vrf for vrf in vrfs if vrf != own), "")


def read_file(path: str) -> bytes:
    """What is in a file of /proc, empty where it is not there or may not be read."""
    with contextlib.suppress(OSError), open(path, "rb") as stream:
        return stream.read()
    return b""


def describe_process(pid: int) -> str:
    """`pid 4711 (python3 pmtud.py)`, or what is known of it."""
    if not os.path.exists(f"/proc/{pid}/cmdline"):
        return "a process not visible from here"
    words = read_file(f"/proc/{pid}/cmdline").split(b"\0")
    text = b" ".join(words).decode("ascii", "replace")
    return f"pid {pid} ({shortened(' '.join(text.split()))})"


def is_pmtud(pid: int) -> bool:
    """Whether a process is a daemon of ours: by the name it gives itself, or by its script."""
    if read_file(f"/proc/{pid}/comm") == b"pmtud\n":
        return True
    command = b"\0" + read_file(f"/proc/{pid}/cmdline")
    return bool(re.search(rb"[\0/]pmtud\.py\0", command))


def netlink_holder(port: int) -> int:
    """The process behind a port id of NETLINK_NETFILTER, by its socket's inode; 0: not visible."""
    sockets = set()
    for line in read_file("/proc/net/netlink").decode().splitlines():
        # The socket's address, its protocol, its port id ... its inode
        _, protocol, number, *_, inode = line.split()
        if (protocol, number) == (str(NETLINK_NETFILTER), str(port)):
            sockets.add(f"socket:[{inode}]")
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            for descriptor in os.listdir(f"/proc/{pid}/fd"):
                if os.readlink(f"/proc/{pid}/fd/{descriptor}") in sockets:
                    return int(pid)
    return 0


def group_holder(group: int) -> Optional[int]:
    """The netlink port id that holds an NFLOG group, None if the kernel lists none."""
    for line in read_file(NFLOG_INSTANCES).splitlines():
        number, port, *_ = line.split()
        if int(number) == group:
            return int(port)
    return None


def ask_nftables(operation: str, kind: int, named: bytes) -> dict[int, bytes]:
    """The attributes of an object of nftables; raises PmtudError."""
    query = NFGENMSG.pack(NFPROTO_INET, 0, 0) + named
    answer = ask(NETLINK_NETFILTER, operation, NFNL_SUBSYS_NFTABLES << 8 | kind, query)
    return attributes(answer, NFGENMSG.size)


def table_owner_lives(group: int) -> bool:
    """Whether pmtud runs for this group: the kernel removes such a table with its process."""
    for name in (whole_name(group), guard_name(group)):
        with contextlib.suppress(PmtudError):
            named = string(TableAttr.NAME, name)
            table = ask_nftables("look for our table", NFT_MSG_GETTABLE, named)
            flags = int.from_bytes(table[TableAttr.FLAGS], "big")
            if flags & NFT_TABLE_F_OWNER:
                return True
    return False


def explain_group(group: int, number: int) -> PmtudError:
    """What to do about an NFLOG group that cannot be bound, for this errno."""
    port = group_holder(group)
    if port is not None:  # the kernel says EPERM to whoever is not the holder
        return explain_holder(group, port)
    if number == errno.EPERM:
        return PmtudError(f"NFLOG group {group} cannot be bound; {PRIVILEGES}")
    return PmtudError(
        f"NFLOG group {group} cannot be bound: {os.strerror(number)}; "
        "is CONFIG_NETFILTER_NETLINK_LOG in this kernel (modprobe nfnetlink_log)?"
    )


def explain_holder(group: int, port: int) -> PmtudError:
    """Who holds an NFLOG group by this netlink port id, and what to do about it."""
    pid = netlink_holder(port)
    if pid != os.getpid() and (is_pmtud(pid) or table_owner_lives(group)):
        # No word of --nflog-group: two daemons would copy every error twice
        where = "in a process not visible from here"
        if pid:
            where = f"pid {pid}"
        return PmtudError(f"pmtud already runs here ({where})")
    holder = f"port id {port}, {describe_process(pid)} (see {NFLOG_INSTANCES})"
    advice = "choose another with --nflog-group"
    return PmtudError(f"NFLOG group {group} is taken by {holder}; {advice}")


class Nflog(Netlink):
    """The receiving end of one NFLOG group."""

    RECEIVE_BUFFER_BYTES = 4 << 20  # some 2,000 errors while the process is not scheduled
    COPY_BYTES = 16384  # of a packet; errors have at most 576 bytes (RFC 1812) or 1,280 (RFC 4443)
    # The kernel's buffer for one datagram with one error, or with those gathered in this time
    SINGLE_BYTES = 4096
    GATHER_BYTES = 32000
    GATHER_HUNDREDTHS = 5  # of a second
    # What the kernel makes of that; a larger buffer here is paged in each time: 0.2 us
    DATAGRAM_BYTES = 1 << 15

    def __init__(self, group: int) -> None:
        super().__init__(NETLINK_NETFILTER)
        self.lost = 0  # errors, counted by gaps in the group's sequence numbers
        self._last: Optional[int] = None
        self._head = NFGENMSG.pack(socket.AF_UNSPEC, 0, group)
        mode = NFULNL_MODE.pack(self.COPY_BYTES, NFULNL_COPY_PACKET)
        settings = attribute(NFULA_CFG_CMD, bytes([NFULNL_CFG_CMD_BIND]))
        settings += attribute(NFULA_CFG_MODE, mode)
        settings += be32(NFULA_CFG_QTHRESH, 1)
        settings += be16(NFULA_CFG_FLAGS, NFULNL_CFG_F_SEQ)
        try:
            self.socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, self.RECEIVE_BUFFER_BYTES)
            self.request(f"bind NFLOG group {group}", NFLOG_CONFIG, 0, self._head + settings)
            self.socket.setblocking(False)
        except NetlinkError as problem:
            self.close()
            raise explain_group(group, problem.number) from problem
        except PermissionError as problem:
            self.close()
            raise explain_group(group, errno.EPERM) from problem

    def gather(self, errors: int) -> None:
        """Let the kernel gather up to this many errors, but not for long; 1: do not wait."""
        size = self.SINGLE_BYTES
        if errors > 1:
            size = self.GATHER_BYTES
        settings = be32(NFULA_CFG_NLBUFSIZ, size)
        settings += be32(NFULA_CFG_QTHRESH, errors)
        settings += be32(NFULA_CFG_TIMEOUT, self.GATHER_HUNDREDTHS)
        self.socket.send(message(NFLOG_CONFIG, 0, 0, self._head + settings))

    def read(self) -> list[Logged]:
        """What one datagram brought, nothing if none is there.

        Raises OSError if the socket is broken.
        """
        try:
            data = self.socket.recv(self.DATAGRAM_BYTES)
        except OSError as problem:
            # ENOBUFS: errors were lost, the numbers tell how many
            if problem.errno in (errno.EAGAIN, errno.ENOBUFS):
                return []
            raise
        logged = parse_nflog(data)
        self._count_lost([number for _, number, _ in logged if number])
        return logged

    def _count_lost(self, numbers: Sequence[bytes]) -> None:
        """Count what is missing between the last datagram and this one."""
        if not numbers:
            return
        last = int.from_bytes(numbers[-1], "big")
        if self._last is not None:
            self.lost += (last - self._last - len(numbers)) & 0xFFFFFFFF
        self._last = last


def calico_bpf_is_here() -> bool:
    """Whether Calico's eBPF data plane runs in this network namespace."""
    with contextlib.suppress(OSError):
        return socket.if_nametoindex(CALICO_BPF_IFACE) > 0
    return False


def copy_mark(config: Config) -> Optional[int]:
    """The mark with which copies leave now, None for ours."""
    if isinstance(config.copy_mark, int):
        return config.copy_mark
    if config.copy_mark == "auto" and calico_bpf_is_here():
        return MARK_CALICO_BYPASS
    return None


def conntrack_in_use() -> bool:
    """Whether this network namespace tracks any connection now; asking does not start tracking."""
    return int(read_file(CONNTRACK_COUNT) or 0) > 0


def read_counter(table: str, name: str) -> Optional[int]:
    """The packets in a counter of one of our tables, None where it is not there."""
    named = counter_object(table, name)
    try:
        found = ask_nftables("read a counter", NFT_MSG_GETOBJ, named)
    except PmtudError:
        return None
    data = attributes(found[ObjectAttr.DATA])
    return int.from_bytes(data[CounterAttr.PACKETS], "big")


class Firewall(Netlink):
    """Our nftables table, owned by this socket: the kernel deletes it when the socket is closed or
    the process dies.

    Kernels before 5.12 refuse ownership; there the table is replaced at start and deleted by
    close(). With --rules off it holds the guard only, under a name of its own.
    """

    SEND_BUFFER_BYTES = 4 << 20  # a transaction with PEERS_MAX peers takes 0.6 MB

    def __init__(
        self,
        config: Config,
        ifaces: Sequence[str],
        owned: bool = True,
        senders: CopySenders = NOBODY,
    ) -> None:
        super().__init__(NETLINK_NETFILTER)
        self.senders = senders
        self.conntrack = False
        self.copy_mark: Optional[int] = None
        self.owned = owned
        self._bursts = owned
        self._config = config
        self._shed = dict.fromkeys(FAMILIES, 0)  # by the tables before this one
        self.table = whole_name(config.nflog_group)
        if config.rules == "off":
            self.table = guard_name(config.nflog_group)
        try:
            with contextlib.suppress(OSError):
                self.socket.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, self.SEND_BUFFER_BYTES)
            self.replace(ifaces)
        except NetlinkError as problem:
            self.socket.close()
            raise self._explain(problem) from problem

    def _explain(self, problem: NetlinkError) -> PmtudError:
        advice = "use --rules off and install the output of `pmtud.py rules` by other means"
        if problem.number == errno.EPERM:
            advice = f"{PRIVILEGES}; or the table inet {self.table} belongs to another process"
        return PmtudError(f"nftables refused our table: {problem}; {advice}")

    def replace(self, ifaces: Sequence[str]) -> None:
        """Put the table in place of what is there, in one transaction.

        Conntrack and the mark of copies are as they are now.
        """
        self.conntrack = self.conntrack or conntrack_in_use()
        self.copy_mark = copy_mark(self._config)
        self._shed = self.shed()
        try:
            self._commit("replace table", self._requests(ifaces))
        except NetlinkError as problem:
            self._give_up_what_is_missing(problem)
            self.replace(ifaces)

    def shed(self) -> dict[Family, int]:
        """The errors of each family that the kernel has not given to the daemon, since the start.

        From any thread.
        """
        table = whole_name(self._config.nflog_group)  # with --rules off the operator's
        found = {}
        for family, before in self._shed.items():
            found[family] = before + (read_counter(table, shed_counter(family)) or 0)
        return found

    def _give_up_what_is_missing(self, problem: NetlinkError) -> None:
        """Do without what this kernel does not have; raises the problem if it is another one."""
        if problem.number == errno.ENOENT and self._bursts:  # no nft_hash
            self._bursts = False
            return
        if problem.number in (errno.EOPNOTSUPP, errno.EINVAL) and self.owned:  # before 5.12
            self.owned = False
            self._bursts = False
            return
        raise problem

    def _requests(self, ifaces: Sequence[str]) -> list[Request]:
        site = Site(
            tuple(ifaces),
            uplinks(ifaces),
            vrfs_of(ifaces),
            self.senders,
            self.conntrack,
            self._bursts,
            self.copy_mark,
        )
        table = whole_table(self._config, site)
        if self._config.rules == "off":
            table = guard_table(self._config, site)
        flags = 0
        if self.owned:
            flags = NFT_TABLE_F_OWNER
        return replace_requests(table, flags)

    def _commit(self, operation: str, requests: Sequence[Request]) -> None:
        """Send requests as one transaction: all take effect or none."""
        batch_head = NFGENMSG.pack(socket.AF_UNSPEC, 0, NFNL_SUBSYS_NFTABLES)
        batch = [message(NFNL_MSG_BATCH_BEGIN, 0, self.next_sequence(), batch_head)]
        head = NFGENMSG.pack(NFPROTO_INET, 0, 0)
        last = 0
        for number, (kind, payload) in enumerate(requests, 1):
            flags = NLM_F_CREATE | NLM_F_APPEND
            if kind == NFT_MSG_DELTABLE:
                flags = 0
            if number == len(requests):
                flags |= NLM_F_ACK
            last = self.next_sequence()
            batch.append(message(NFNL_SUBSYS_NFTABLES << 8 | kind, flags, last, head + payload))
        batch.append(message(NFNL_MSG_BATCH_END, 0, self.next_sequence(), batch_head))
        self.send(operation, b"".join(batch), last)

    def close(self) -> None:
        """Remove the table; the kernel does it by itself where it is owned."""
        if not self.owned:
            delete = (NFT_MSG_DELTABLE, string(TableAttr.NAME, self.table))
            with contextlib.suppress(PmtudError, OSError):
                self._commit("delete table", [delete])
        super().close()


@contextlib.contextmanager
def set_up(descriptor: Descriptor) -> Iterator[None]:
    """Close the raw socket if a step of its set-up fails, and name the missing privilege."""
    try:
        yield
    except PermissionError as problem:
        descriptor.close()
        raise PmtudError(
            f"cannot set up a raw socket ({problem.strerror}); {PRIVILEGES}"
        ) from problem
    except OSError:
        descriptor.close()
        raise


SEND_BUFFER_BYTES = 4 << 20  # of a raw socket


class CopySocket(Descriptor):
    """Sends ICMP messages of one family to peers; the kernel makes the IP header (and the ICMPv6
    checksum).

    Measured against IP_HDRINCL with headers of our own: the same 3.6 us per copy, and nothing to
    rewrite here.
    """

    def __init__(self, family: Family, ttl: int, source: bytes = b"") -> None:
        self.socket = open_socket(family.af, socket.SOCK_RAW, family.icmp_protocol)
        option = self.socket.setsockopt
        with set_up(self):
            option(socket.SOL_SOCKET, SO_MARK, MARK_COPY)
            option(socket.SOL_SOCKET, SO_SNDBUFFORCE, SEND_BUFFER_BYTES)
            # With the filters: nothing the node receives queues up here
            option(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)
            if family is IPV4:
                self._set_ipv4_options(ttl)
            else:
                self._set_ipv6_options(ttl)
            if source:
                self.socket.bind((address_text(source), 0))
            if family is IPV4:
                # Our own address is not looked up again for each copy: 2 to 3 %
                option(socket.IPPROTO_IP, IP_TRANSPARENT, 1)

    def _set_ipv4_options(self, ttl: int) -> None:
        option = self.socket.setsockopt
        option(SOL_RAW, ICMP_FILTER, b"\xff" * 4)
        # Or what a program or a queue on the interface drops counts as sent; IPv6 tells it anyway.
        # ICMP errors about earlier packets fail no send of such a socket; the queue that they wait
        # in has the size of the receive buffer.
        option(socket.IPPROTO_IP, IP_RECVERR, 1)
        option(socket.IPPROTO_IP, IP_MTU_DISCOVER, PMTUDISC_DONT)
        option(socket.IPPROTO_IP, socket.IP_TTL, ttl)
        # Or IPVS takes a copy for an error about a flow that it knows
        option(socket.IPPROTO_IP, IP_NODEFRAG, 1)
        option(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)

    def _set_ipv6_options(self, ttl: int) -> None:
        option = self.socket.setsockopt
        option(socket.IPPROTO_ICMPV6, ICMP6_FILTER, b"\xff" * 32)
        option(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, PMTUDISC_DONT)
        option(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, ttl)
        option(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, ttl)
        option(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_LOOP, 0)

    def join(self, peer: PeerAddress) -> None:
        """Receive packets sent to this IPv6 multicast group on its interface."""
        request = peer.packed + struct.pack("@I", socket.if_nametoindex(peer.zone))
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, request)


class DeliverySocket(Descriptor):
    """Gives errors of one family to this node's own stack, through OUTPUT: conntrack, the guard,
    NAT.

    A raw socket that brings its own IP header is routed by the address given to sendto(), whatever
    the header says:

    * routed: to the header's destination. NAT or a route takes the error to a pod.
    * inward: to an address of this node, `at`. No route to the service address is asked for: there
      may be none, or one that BGP speakers keep to discard what nobody owns (blackhole,
      unreachable, prohibit). NAT still takes the error to a pod; what is not translated ends in
      this node's own stack, and cannot leave. It counts as come in on the interface that has the
      address, so that IPv4 sockets bound to that device are found.

    """

    def __init__(self, family: Family, at: Optional[LocalAddress] = None) -> None:
        self._family = family
        loopback = packed_address(family.loopback)
        self._at = at or LocalAddress(loopback, 8 * family.address_len, 0, b"")
        self._inside = address_text(self._at.packed)
        # It receives nothing
        self.socket = open_socket(family.af, socket.SOCK_RAW, socket.IPPROTO_RAW)
        option = self.socket.setsockopt
        with set_up(self):
            option(socket.SOL_SOCKET, SO_MARK, MARK_DELIVER)
            option(socket.SOL_SOCKET, SO_SNDBUFFORCE, SEND_BUFFER_BYTES)
            if family is IPV4:
                option(socket.IPPROTO_IP, socket.IP_HDRINCL, 1)
            else:
                option(socket.IPPROTO_IPV6, IPV6_HDRINCL, 1)
            if at is None:
                # Where it is down, ::1 has another route
                option(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")

    def deliver(self, icmp: bytes, destination: bytes, own: bool) -> int:
        """Send one message to a packed address, `own` if it is one of this node's; 0 or the errno.

        EPERM: the guard says that this node is not the owner.
        """
        packet = delivery_packet(self._family, self._at.packed, destination, icmp)
        if not own:
            code = self._send(packet, address_text(destination), 0)
            if code in (0, errno.EPERM):
                return code
        return self._send(packet, self._inside, self._at.ifindex)

    def _send(self, packet: bytes, towards: str, ifindex: int) -> int:
        """Send, routed by this address, and by this interface if one is given; 0 or the errno."""
        try:
            if ifindex and self._family is IPV4:  # IPv6 takes it from the address
                where = IN_PKTINFO.pack(ifindex, bytes(4), bytes(4))
                control = [(socket.IPPROTO_IP, IP_PKTINFO, where)]
                self.socket.sendmsg([packet], control, 0, (towards, 0))
            else:
                self.socket.sendto(packet, (towards, 0))
        except OSError as problem:
            return problem.errno or errno.EIO
        return 0


def probe_delivery(family: Family, destination: bytes) -> int:
    """0 or the errno of a delivery about no flow at all.

    Sent inward, it stays in this node whatever the answer.
    """
    quoted = bytes(IPV6_HEADER_LEN + QUOTED_TRANSPORT_MIN)
    icmp = family.icmp.pack(*family.error, 0, IPV6_MIN_MTU) + quoted
    try:
        with DeliverySocket(family) as probe:
            code: int = probe.deliver(icmp, destination, own=True)
            return code
    except OSError as problem:
        return problem.errno or errno.EIO
    except PmtudError:
        return errno.EACCES


def guard_holds(family: Family) -> Optional[bool]:
    """Whether something stops a marked packet that this node does not own.

    None if it cannot be told.
    """
    code = probe_delivery(family, packed_address(family.probe_address))
    if code in (0, errno.EPERM):
        return code == errno.EPERM
    return None


def sockaddr(peer: PeerAddress) -> tuple[Any, ...]:
    """The address of a peer as sendto() takes it; raises OSError if its zone is gone."""
    address = address_text(peer.packed)
    if len(peer.packed) == 4:
        return address, 0
    scope = 0
    if peer.zone:
        scope = socket.if_nametoindex(peer.zone)
    return address, 0, 0, scope


def packed_sockaddr(peer: PeerAddress) -> bytes:
    """The same as struct sockaddr_in or sockaddr_in6."""
    if len(peer.packed) == 4:
        return SOCKADDR_IN.pack(socket.AF_INET, peer.packed)
    return SOCKADDR_IN6.pack(socket.AF_INET6, peer.packed, sockaddr(peer)[3])


class Fanout:
    """Sends the same messages to all peers of one family, many copies per system call.

    The message headers are made once per peer set; several errors x all peers go out in one
    sendmmsg(). One sendto() per copy ran at half the speed of a C loop, this at 0.95 of it with 100
    peers.
    """

    # So few copies leave by sendto(): on an idle node the caches hold no ctypes. In twenty runs
    # with two peers, in turns, the first copy was out 60 us sooner, 12 % of the median latency.
    FEW = 16
    COPIES_IN_A_CALL = 512  # at least one error to all peers; more headers leave the cache

    def __init__(
        self, sender: CopySocket, peers: Sequence[PeerAddress], counts: CopyCounts
    ) -> None:
        self.peers = tuple(peers)
        self.counts = counts
        self._socket = sender.socket
        self._errors_in_a_call = max(1, self.COPIES_IN_A_CALL // len(self.peers))
        self._bodies = (iovec * self._errors_in_a_call)()
        self._sockaddrs = [sockaddr(peer) for peer in peers]
        # In one piece: objects cost 0.1 us a copy more
        addresses = [packed_sockaddr(peer) for peer in peers]
        self._addresses = ctypes.create_string_buffer(b"".join(addresses))
        headers = self._headers(len(addresses[0]))
        self._messages = ctypes.create_string_buffer(headers)
        types = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int)
        self._sendmmsg = libc_function("sendmmsg", *types)

    def _headers(self, size: int) -> bytes:
        """A struct mmsghdr for each body and peer, whose address has this size."""
        start = ctypes.addressof(self._addresses)
        names = [start + number * size for number in range(len(self.peers))]
        headers = []
        for body in map(ctypes.addressof, self._bodies):
            headers += [MMSGHDR.pack(name, size, body, 1, 0, 0, 0, 0) for name in names]
        return b"".join(headers)

    def send(self, bodies: Sequence[bytes]) -> list[tuple[PeerAddress, int]]:
        """Send every body to every peer; the (peer, errno) of each copy the kernel refused."""
        if len(bodies) * len(self.peers) <= self.FEW:
            refused = self._send_one_by_one(bodies)
        else:
            refused = self._send_together(bodies)
        self.counts.rounds += len(bodies)
        for number, _ in refused:
            self.counts.refused[number] += 1
        return [(self.peers[number], code) for number, code in refused]

    def _send_one_by_one(self, bodies: Sequence[bytes]) -> list[tuple[int, int]]:
        """The (number of the peer, errno) of each copy the kernel refused."""
        refused = []
        for body in bodies:
            for number, address in enumerate(self._sockaddrs):
                try:
                    self._socket.sendto(body, address)
                except OSError as problem:
                    refused.append((number, problem.errno or errno.EIO))
        return refused

    def _send_together(self, bodies: Sequence[bytes]) -> list[tuple[int, int]]:
        """The same, with as few system calls as possible."""
        refused = []
        for start in range(0, len(bodies), self._errors_in_a_call):
            refused += self._send_call(bodies[start : start + self._errors_in_a_call])
        return refused

    def _send_call(self, bodies: Sequence[bytes]) -> list[tuple[int, int]]:
        """The same for those that fit into one call."""
        refused = []
        for slot, body in zip(self._bodies, bodies):
            slot.iov_base = body
            slot.iov_len = len(body)
        done = 0
        count = len(bodies) * len(self.peers)
        while done < count:
            at = ctypes.addressof(self._messages) + done * MMSGHDR.size
            wanted = min(count - done, UIO_MAXIOV)
            try:
                done += self._sendmmsg(self._socket.fileno(), at, wanted, 0)
            except InterruptedError:
                continue
            except OSError as problem:  # the first of these failed: go on with the next
                refused.append((done % len(self.peers), problem.errno or errno.EIO))
                done += 1
        return refused


# -----------------------------------------------------------------------------
# Section: peers -- where addresses come from, and what they mean on this node


class PeerSource:
    """Something that names peers and may change its mind; one thread asks it."""

    THREADS = 1  # for all sources of a kind
    interval = 1.0  # seconds until it is asked again

    def __init__(self, name: str) -> None:
        # The label in the metrics; paths may be no UTF-8
        self.name = name.encode(errors="backslashreplace").decode()
        self.answer: Optional[tuple[PeerAddress, ...]] = None  # the last good one
        self.doubt = ""  # what failed in the last load() although it answered
        self.complaint = ""  # the failure that was logged last
        self._parsed: dict[str, PeerAddress] = {}  # of the last answer: few of the next are new
        self._left_out: set[str] = set()

    def prepare(self) -> None:
        """What can be known before the start; raises PeerSourceError where no waiting will help."""

    def load(self) -> Optional[tuple[PeerAddress, ...]]:
        """The addresses now, None if unchanged; raises PeerSourceError."""
        raise NotImplementedError

    def failed(self, problem: object) -> PeerSourceError:
        """The error that says so."""
        return PeerSourceError(f"{self.name}: {problem}")

    def _usable(self, texts: Iterable[str]) -> tuple[PeerAddress, ...]:
        """The peers among these addresses; one that no node can have is logged once."""
        parsed: dict[str, PeerAddress] = {}
        left_out = set()
        for text in set(texts):
            try:
                parsed[text] = self._parsed.get(text) or parse_peer(text)
            except ValueError as problem:
                left_out.add(str(problem))
        for why in sorted(left_out - self._left_out):
            log("warning", "an address is left out", source=self.name, problem=why)
        self._parsed = parsed
        self._left_out = left_out
        return tuple(sorted(set(parsed.values())))


class DnsSource(PeerSource):
    """`dns:NAME` or a bare host name: all A and AAAA answers, asked for every ten seconds or so.

    Loopback answers are this node itself (Debian's /etc/hosts) and no peers. Where one family
    cannot be asked, its last answer stands.
    """

    THREADS = 8
    KEEP = 30.0  # seconds: malformed answers look like none, and long ones with TCP 53 blocked

    def __init__(self, host: str) -> None:
        super().__init__(f"dns:{host}")
        self._host = host
        self._answers: dict[Family, set[str]] = {}
        self._answered_at: dict[Family, float] = {}

    def _ask(self, family: Family) -> None:
        """Take in the addresses of one family; raises OSError, for KEEP also if there are none."""
        now = time.monotonic()
        try:
            found = socket.getaddrinfo(self._host, None, family.af, socket.SOCK_DGRAM)
        except socket.gaierror as problem:
            is_empty = problem.errno in (socket.EAI_NONAME, socket.EAI_NODATA)
            answered_at = self._answered_at.get(family, -math.inf)
            if not is_empty or now < answered_at + self.KEEP:
                raise
            self._answers.pop(family, None)
            return
        self._answers[family] = {str(address[0]) for *_, address in found}
        self._answered_at[family] = now

    def load(self) -> Optional[tuple[PeerAddress, ...]]:
        """The addresses that the name has now; raises PeerSourceError also where it has none."""
        # So that the nodes of a cluster do not ask in step
        self.interval = random.uniform(7.5, 12.5)
        problems: dict[Family, str] = {}
        for family in FAMILIES:  # in one call the answer of one hides the failure of the other
            try:
                self._ask(family)
            except OSError as problem:
                problems[family] = problem.strerror or str(problem)
        texts: set[str] = set().union(*self._answers.values())
        others = {text for text in texts if not ipaddress.ip_address(text).is_loopback}
        peers = self._usable(others)
        is_this_node = bool(texts) and not others and not self.answer
        if len(problems) == len(FAMILIES) or not (peers or is_this_node):
            raise self.failed(next(iter(problems.values()), "no usable address"))
        self.doubt = ""
        for family, why in problems.items():
            if family in self._answers:
                self.doubt = f"{self.name}: {family.name}: {why}"
        return peers


class FileSource(PeerSource):
    """`file:PATH`: read every second, parsed when it has changed."""

    SIZE_MAX = 1 << 20

    def __init__(self, path: str) -> None:
        super().__init__(f"file:{path}")
        self._path = path
        self._content: Optional[bytes] = None

    def prepare(self) -> None:
        """Read it for the first time."""
        self.answer = self.load()

    def load(self) -> Optional[tuple[PeerAddress, ...]]:
        """The addresses in the file, None if it has not changed; raises PeerSourceError."""
        try:
            content = self._read()
            if content == self._content:
                return None
            peers = parse_peer_lines(content.decode())
        except OSError as problem:
            raise self.failed(problem.strerror) from problem
        except ValueError as problem:
            raise self.failed(problem) from problem
        self._content = content
        return peers

    def _read(self) -> bytes:
        """What is in the file; opening a FIFO does not wait for a writer."""
        opener = lambda path, flags: os.open(path, flags | os.O_NONBLOCK)  # noqa: E731
        with open(self._path, "rb", opener=opener) as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > self.SIZE_MAX:
                raise ValueError(f"not a regular file of at most {self.SIZE_MAX} bytes")
            return stream.read(self.SIZE_MAX)


def internal_addresses(node: Mapping[str, Any]) -> list[str]:
    """The InternalIPs of a Kubernetes Node object; none before its kubelet has told them."""
    status = node.get("status") or {}
    found = []
    for one in status.get("addresses") or ():
        if one.get("type") == "InternalIP":
            found.append(str(one.get("address")))
    return found


class Expired(Exception):
    """What is known is too old for the API server to go on from (410 Gone)."""


class KubeSource(PeerSource):
    """`kube:nodes[?SELECTOR]`: the InternalIPs of the cluster's nodes, listed and then watched.

    Finds the API server as every pod does: KUBERNETES_SERVICE_HOST and _PORT, and the service
    account's files. Each load() is one step: the list, the start of a watch, or its next event. See
    https://kubernetes.io/docs/reference/using-api/api-concepts/#efficient-detection-of-changes.
    """

    THREADS = PEERS_MAX  # one for each: the next event of a watch may take minutes
    ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
    # Parsing holds the interpreter and so the packet loop: 6 ms for 1.7 MB of JSON
    PAGE_NODES = 100
    PAGE_BYTES_MAX = 64 << 20
    EVENT_BYTES_MAX = 4 << 20  # etcd's objects have at most 1.5 MB
    READ_SECONDS = 10.0
    KEEPALIVE = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))

    def __init__(self, selector: str = "") -> None:
        super().__init__(f"kube:nodes?{selector}" if selector else "kube:nodes")
        self._selector = urllib.parse.unquote(selector)
        self._nodes: dict[str, list[str]] = {}  # InternalIPs by node name
        self._version = ""  # the resourceVersion of these; empty: list them
        self._connection: Optional[http.client.HTTPSConnection] = None
        self._steps = self._list_and_watch()
        self._failures = 0  # in a row
        self._retry_after = 0.0  # seconds

    def prepare(self) -> None:
        """Look for what a pod is told and given about the API server, which need not answer yet."""
        try:
            self._server()
        except OSError as problem:
            raise self.failed(problem) from problem
        for path in (f"{self.ACCOUNT}/token", f"{self.ACCOUNT}/ca.crt"):
            if not os.path.exists(path):
                advice = "the pod needs automountServiceAccountToken: true"
                raise self.failed(f"there is no {path}; {advice}")

    def load(self) -> Optional[tuple[PeerAddress, ...]]:
        """The addresses after the next step, None if it changes nothing; raises PeerSourceError."""
        self.interval = 0.0
        self._retry_after = 0.0
        try:
            return next(self._steps)
        except Exception as problem:  # whatever a server says, the thread goes on
            if not isinstance(problem, OSError):  # what was not understood will not come again
                self._version = ""
            self._steps = self._list_and_watch()
            self._hang_up()
            self._failures = min(self._failures + 1, 5)
            pause = random.uniform(0.5, 1.0) * min(30.0, 2.0**self._failures)
            self.interval = max(self._retry_after, pause)
            raise self.failed(str(problem) or type(problem).__name__) from problem

    def _list_and_watch(self) -> Iterator[Optional[tuple[PeerAddress, ...]]]:
        """List the nodes once, then watch them: the addresses after each step, None if the same."""
        while True:
            try:
                if not self._version:
                    yield self._list()
                watch = self._open_watch()
                yield None
                for event in self._events(watch):
                    yield self._apply(event)
            except Expired:
                self._version = ""
            self._hang_up()
            yield None

    def _hang_up(self) -> None:
        if self._connection:
            self._connection.close()
        self._connection = None
        self.interval = random.uniform(0.5, 1.0)

    @staticmethod
    def _server() -> tuple[str, int]:
        """Host and port of the API server; raises OSError outside a pod."""
        host = os.environ.get("KUBERNETES_SERVICE_HOST", "")
        if not host:
            problem = "KUBERNETES_SERVICE_HOST is not set"
            raise OSError(f"{problem}: kube:nodes works in a pod of the cluster")
        return host, int(os.environ.get("KUBERNETES_SERVICE_PORT") or 443)

    def _connect(self) -> http.client.HTTPSConnection:
        """A new connection to the API server; ACCOUNT/ca.crt says whom to believe."""
        context = ssl.create_default_context(cafile=f"{self.ACCOUNT}/ca.crt")
        # Python 3.13's default, which many a cluster does not pass
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        timeout = self.READ_SECONDS
        connection = http.client.HTTPSConnection(*self._server(), timeout=timeout, context=context)
        connection.connect()
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, seconds in self.KEEPALIVE:
            connection.sock.setsockopt(socket.IPPROTO_TCP, option, seconds)
        return connection

    def _get(self, seconds: float, **query: object) -> http.client.HTTPResponse:
        """The answer to one GET of the nodes, of which a read takes no longer; raises OSError."""
        self._server()
        with open(f"{self.ACCOUNT}/token") as stream:  # a kubelet renews it about every hour
            token = stream.read().strip()
        if not self._connection or not self._connection.sock:
            self._connection = self._connect()
        self._connection.sock.settimeout(seconds)
        asked = urllib.parse.urlencode({"labelSelector": self._selector, **query})
        headers = {"Authorization": f"Bearer {token}", "Accept": "application/json"}
        self._connection.request("GET", f"/api/v1/nodes?{asked}", headers=headers)
        response = self._connection.getresponse()
        if response.status == 410:
            raise Expired
        if response.status != 200:
            if response.status == 400:  # perhaps it does not like the version
                self._version = ""
            wait = response.getheader("Retry-After", "")
            if wait.isdecimal():
                self._retry_after = min(60.0, float(wait))
            raise OSError(f"the API server answers {response.status} {response.reason}")
        return response

    def _list(self) -> tuple[PeerAddress, ...]:
        """All nodes, page by page."""
        nodes: dict[str, list[str]] = {}
        page_token = ""
        for _ in range(math.ceil(PEERS_MAX / self.PAGE_NODES)):
            query = {"limit": self.PAGE_NODES, "continue": page_token}
            response = self._get(self.READ_SECONDS, **query)
            page = json.loads(self._read_page(response))
            for node in page["items"] or ():
                nodes[node["metadata"]["name"]] = internal_addresses(node)
            page_token = page["metadata"].get("continue") or ""
            if not page_token:
                self._version = page["metadata"]["resourceVersion"]
                if not self._version:
                    raise ValueError("the API server tells no resourceVersion")
                self._nodes = nodes
                self._failures = 0
                return self._peers()
        raise ValueError(f"more than {PEERS_MAX} nodes")

    def _read_page(self, response: http.client.HTTPResponse) -> bytes:
        """Its body, in pieces: Python 3.9 reserves all that it may read at once."""
        text = b""
        while len(text) <= self.PAGE_BYTES_MAX:
            piece = response.read(1 << 16)
            if not piece:
                return text
            text += piece
        raise ValueError(f"a page is larger than {self.PAGE_BYTES_MAX} bytes")

    def _peers(self) -> tuple[PeerAddress, ...]:
        texts: list[str] = []
        for addresses in self._nodes.values():
            texts += addresses
        return self._usable(texts)

    def _open_watch(self) -> http.client.HTTPResponse:
        """An answer that grows by a line for each event, and ends by itself after some minutes."""
        seconds = int(random.uniform(240, 480))
        return self._get(
            seconds + 30.0,
            watch=1,
            resourceVersion=self._version,
            allowWatchBookmarks="true",
            timeoutSeconds=seconds,
        )

    def _events(self, watch: http.client.HTTPResponse) -> Iterator[Any]:
        """The events of a watch until it ends; raises OSError where it was cut off."""
        opened_at = time.monotonic()
        has_told = False
        line = watch.readline(self.EVENT_BYTES_MAX)
        while line.endswith(b"\n"):
            self._failures = 0
            has_told = True
            yield json.loads(line)
            line = watch.readline(self.EVENT_BYTES_MAX)
        if len(line) == self.EVENT_BYTES_MAX:
            raise ValueError(f"an event is larger than {self.EVENT_BYTES_MAX} bytes")
        is_short = time.monotonic() - opened_at < 1.0
        if line or (is_short and not has_told):
            raise OSError("the watch was cut off")

    def _apply(self, event: Any) -> Optional[tuple[PeerAddress, ...]]:
        """The addresses after an event, None if it changes nothing."""
        node = event["object"]
        if event["type"] == "ERROR":
            if node["code"] == 410:
                raise Expired
            raise ValueError(f"the watch ended with {node['code']} {node['message']}")
        name = node["metadata"].get("name")
        before = self._nodes.get(name, [])
        if event["type"] in ("ADDED", "MODIFIED"):
            self._nodes[name] = internal_addresses(node)
        elif event["type"] == "DELETED":
            self._nodes.pop(name, None)
        # Last: an event that is not understood has not been seen
        self._version = node["metadata"]["resourceVersion"]
        if self._nodes.get(name, []) == before:
            return None
        return self._peers()


def open_source(text: str) -> PeerSource:
    """The source that a peer item names; raises ValueError for a kind that does not exist."""
    check_source(text)
    kind, _, rest = text.partition(":")
    if kind == "file":
        return FileSource(rest)
    if kind == "dns":
        return DnsSource(rest)
    return KubeSource(text.partition("?")[2])


class PeerSources:
    """The static addresses and what each source said last; a few threads follow the sources."""

    def __init__(self, config: Config, counters: Counters, changed: Callable[[], None]) -> None:
        self._static = config.peers
        self._sources = [open_source(text) for text in config.peer_sources]
        self._failures = counters.refresh_failures
        for source in self._sources:
            self._failures[source.name] = 0
        self._kicks: list[threading.Event] = []  # one for each thread
        self._changed = changed
        self._closed = False

    def prepare(self) -> None:
        """Read the files; raises UsageError for a bad one, and for kube:nodes outside a pod."""
        for source in self._sources:
            try:
                source.prepare()
            except PeerSourceError as problem:
                raise UsageError(f"peers: {problem}") from problem

    def follow(self) -> None:
        """Follow all sources from now on."""
        # glibc's own are two rounds of 5 s, for each name server
        os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:2")
        for kind in (FileSource, DnsSource, KubeSource):
            sources = [source for source in self._sources if isinstance(source, kind)]
            for first in range(min(kind.THREADS, len(sources))):
                kick = threading.Event()
                self._kicks.append(kick)
                share = sources[first :: kind.THREADS]
                work = partial(self._follow, share, kick)
                thread = threading.Thread(target=work, name=share[0].name, daemon=True)
                thread.start()

    def listed(self) -> dict[str, tuple[PeerAddress, ...]]:
        """The last good answer of each source that has given one."""
        found = {"static": self._static}
        for source in self._sources:
            if source.answer is not None:
                found[source.name] = source.answer
        return found

    def unanswered(self, listed: Collection[str]) -> list[str]:
        """What is known of each source that is not among these, which had answered."""
        waiting = [source for source in self._sources if source.name not in listed]
        return [source.complaint or f"{source.name}: no answer yet" for source in waiting]

    def reload(self) -> None:
        """Ask every source now, once more where one is being asked."""
        for source in self._sources:
            source.complaint = ""
        for kick in self._kicks:
            kick.set()

    def close(self) -> None:
        """Let the threads end."""
        self._closed = True
        self.reload()

    def _follow(self, sources: Sequence[PeerSource], kick: threading.Event) -> None:
        while not self._closed:
            for source in sources:
                self._refresh(source)
            kick.wait(min(source.interval for source in sources))
            kick.clear()

    def _refresh(self, source: PeerSource) -> None:
        """Ask a source once; count and log what fails, tell of an answer that is new."""
        answer = None
        try:
            answer = source.load()
            trouble = source.doubt
        except PeerSourceError as problem:
            trouble = str(problem)
        self._failures[source.name] += bool(trouble)
        if trouble and trouble != source.complaint:
            in_force = len(answer or source.answer or ())
            log("warning", "peer source failed", problem=trouble, in_force=in_force)
        elif source.complaint and not trouble:
            log("info", "peer source answers again", source=source.name)
        source.complaint = trouble
        if answer is not None and answer != source.answer:
            source.answer = answer
            self._changed()


def errno_text(code: int) -> str:
    """Like `No buffer space available (ENOBUFS)`."""
    return f"{os.strerror(code)} ({errno.errorcode.get(code, code)})"


def some(peers: Collection[PeerAddress], most: int = 8) -> str:
    """The addresses of a few of them, and how many more there are."""
    shown = ", ".join(map(str, islice(peers, most)))
    if len(peers) > most:
        shown += f" and {len(peers) - most} more"
    return shown


def interface_towards(packed: bytes, iface: str) -> str:
    """The interface to an address; empty if there is no way.

    `iface` is the one that an address of its link belongs to.
    """
    zone = 0
    with contextlib.suppress(NetlinkError, OSError):
        if is_link_local(packed) or PeerAddress(packed).is_multicast:
            zone = socket.if_nametoindex(iface)
        return socket.if_indextoname(find_route(packed, zone)[1][0].ifindex)
    return ""


# Who is who: PeerSources have what was last said about peers. arrange() takes this node's addresses
# into account; what comes out is an Arrangement: Endpoints for each family, and WhoIsWho, by which
# errors are judged. CopySenders are those of it that the rules know. The Arranger (section daemon)
# puts each new Arrangement in force.


class Endpoints(NamedTuple):
    """Where the errors of one family go from here."""

    targets: tuple[PeerAddress, ...] = ()  # where copies go
    source: bytes = b""  # source address of copies; empty: the kernel chooses
    inside: Optional[LocalAddress] = None  # the own address at which deliveries come in


class Arrangement(NamedTuple):
    """What the peers and this node's addresses mean together."""

    endpoints: Mapping[Family, Endpoints] = {IPV4: Endpoints(), IPV6: Endpoints()}
    removed: tuple[PeerAddress, ...] = ()  # own addresses that were listed
    per_source: Mapping[str, int] = {}  # peers in force by source
    who: WhoIsWho = WhoIsWho()

    @property
    def everyone(self) -> list[PeerAddress]:
        """The peers of both families."""
        return [*self.endpoints[IPV4].targets, *self.endpoints[IPV6].targets]

    def needs_sockets_after(self, before: Arrangement) -> bool:
        """Whether the sockets of an arrangement before do not fit."""
        if any(peer.zone for peer in self.everyone):  # its interface may have a new index
            return True
        return self.endpoints != before.endpoints

    @property
    def senders(self) -> CopySenders:
        """Where copies may come from."""
        who = self.who
        return CopySenders(who.peers, who.networks.networks, who.neighbours.networks)


def kernel_source(peer: PeerAddress) -> bytes:
    """The source address the kernel would use towards a peer, empty if it has no route."""
    family = family_of(peer.packed)
    with contextlib.suppress(OSError), socket.socket(family.af, socket.SOCK_DGRAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        host, _, *scope = sockaddr(peer)
        probe.connect((host, 9, *scope))  # a datagram socket sends nothing for it
        return packed_address(probe.getsockname()[0])
    return b""


def resolved_peers(arrangement: Arrangement) -> dict[str, int]:
    """0 for each peer whose link-layer address nobody tells, 1 for those who did.

    No word about routed ones, and about peers to which nothing was sent for long.
    """
    known: dict[bytes, int] = {}
    with contextlib.suppress(PmtudError):
        for (_, packed), neighbour in neighbours().items():
            known[packed] = int(neighbour.is_resolved)
    found = {}
    for peer in arrangement.everyone:
        if peer.packed in known:
            found[str(peer)] = known[peer.packed]
    return found


def node_info(nodename: str, arrangement: Arrangement) -> dict[tuple[str, str, str], int]:
    """The labels by which senders and receivers of copies are joined: name, family, address."""
    found = {}
    for family, endpoints in arrangement.endpoints.items():
        source = endpoints.source
        if not source and endpoints.targets:
            source = kernel_source(endpoints.targets[0])
        if source:
            found[nodename, family.name, address_text(source)] = 1
    return found


def network_of(address: LocalAddress) -> Network:
    """The network that a local address is in."""
    return ipaddress.ip_interface((address.packed, address.prefix_length)).network


def networks_of(peer: PeerAddress, local: Iterable[LocalAddress]) -> Iterator[Network]:
    """The networks of a group: the subnet of a broadcast address, the prefixes of a link."""
    ifindex = 0
    with contextlib.suppress(OSError):
        ifindex = sockaddr(peer)[-1]
    for address in local:
        is_on_link = len(address.packed) == 16 and address.ifindex == ifindex
        if is_on_link or address.broadcast == peer.packed:
            yield network_of(address)


def inside_address(
    family: Family, local: Iterable[LocalAddress], ifindexes: Sequence[int]
) -> Optional[LocalAddress]:
    """The own address at which deliveries come in.

    On the first of these interfaces that has one, where sockets bound to a device expect the error,
    else on any.
    """
    found = []
    for one in local:
        is_usable = not is_martian(one.packed) and not is_link_local(one.packed)
        if is_usable and family_of(one.packed) is family:
            found.append(one)
    for ifindex in ifindexes:
        for address in found:
            if address.ifindex == ifindex:
                return address
    return next(iter(found), None)


def arrange(
    listed: Mapping[str, Sequence[PeerAddress]],
    local: Sequence[LocalAddress],
    ignored: Iterable[Network],
    ifaces: Iterable[str] = (),
) -> Arrangement:
    """Remove this node from the peers, and work out who is who; errors come in on `ifaces`."""
    own = {address.packed for address in local}
    broadcasts = {one.broadcast for one in local if one.broadcast and not is_martian(one.packed)}
    everyone = dict.fromkeys(peer for peers in listed.values() for peer in peers)
    removed = tuple(peer for peer in everyone if peer.packed in own)
    targets = [peer for peer in everyone if peer.packed not in own]
    groups = [peer for peer in targets if peer.packed in broadcasts or peer.is_multicast]
    ifindexes = [number for number, name in socket.if_nameindex() if name in ifaces]
    endpoints = {}
    unshared: set[bytes] = set()
    for family in FAMILIES:
        mine = [peer.packed for peer in removed if family_of(peer.packed) is family]
        mine = [packed for packed in mine if not is_link_local(packed)]
        theirs = tuple(peer for peer in targets if family_of(peer.packed) is family)
        source, known = own_source(mine, theirs)
        unshared |= known
        endpoints[family] = Endpoints(theirs, source, inside_address(family, local, ifindexes))
    who = WhoIsWho(
        own=frozenset(own),
        unshared=frozenset(unshared),
        groups=frozenset(broadcasts.union(group.packed for group in groups)),
        peers=frozenset(peer.packed for peer in targets),
        networks=Membership(ignored),
        neighbours=Membership(network for group in groups for network in networks_of(group, local)),
    )
    per_source = {}
    for name, peers in listed.items():
        per_source[name] = sum(peer.packed not in own for peer in peers)
    return Arrangement(endpoints, removed, per_source, who)


def own_source(mine: Sequence[bytes], peers: Sequence[PeerAddress]) -> tuple[bytes, set[bytes]]:
    """The source address of copies, empty for the kernel's choice; all by which peers know us.

    `mine` are this node's addresses in the list of peers: they know it by the one that the kernel
    would use, or else by the first.
    """
    if len(mine) == 1:
        return mine[0], {mine[0]}
    usual = {kernel_source(peer) for peer in peers} - {b""}
    if not mine:
        return b"", usual
    source = next((address for address in mine if address in usual), mine[0])
    return source, {source}


# -----------------------------------------------------------------------------
# Section: forwarder -- the packet's way, whole: read, decide, copy, deliver, count


class FamilySockets:
    """One family's sockets, and what was counted on them.

    Delivery to this node's own stack, and copies to its peers.
    """

    def __init__(self, family: Family) -> None:
        self.family = family
        self.counts = CopyCounts(())
        self.delivery: Optional[DeliverySocket] = None
        self.fanout: Optional[Fanout] = None  # None without peers
        self.bodies: list[bytes] = []  # that are to go out to all peers
        self._stack = contextlib.ExitStack()

    def open(self, config: Config, arrangement: Arrangement) -> None:
        """Open both sockets; raises OSError, or PmtudError without privileges."""
        endpoints = arrangement.endpoints[self.family]
        with contextlib.ExitStack() as stack:
            delivery = stack.enter_context(DeliverySocket(self.family, endpoints.inside))
            copies = stack.enter_context(CopySocket(self.family, config.ttl, endpoints.source))
            join = not config.dry_run
            peers = [peer for peer in endpoints.targets if reachable(peer, copies, join)]
            self.counts = CopyCounts([str(peer) for peer in peers], self.counts)
            if peers:
                self.fanout = Fanout(copies, peers, self.counts)
            self.delivery = delivery
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Close both sockets; harmless when repeated."""
        self.delivery = self.fanout = None
        self._stack.close()


def reachable(peer: PeerAddress, copies: CopySocket, join: bool) -> bool:
    """Whether the peer's interface exists; to join a multicast group there sends reports."""
    try:
        sockaddr(peer)
        if peer.is_multicast and join:
            copies.join(peer)
    except OSError as problem:
        text = f"peer {peer} left out until its interface is there"
        log("warning", text, problem=problem.strerror or problem)
        return False
    return True


class RuleKeeper:
    """Keeps our rules in force: where errors come in, who may send copies, what may go out."""

    def __init__(self, config: Config, complaints: Complaints) -> None:
        self.ifaces: tuple[str, ...] = ()
        self.firewall: Optional[Firewall] = None
        # By family name, as last probed: whether no error about another node's flow can leave.
        self.guarded = {family.name: False for family in FAMILIES}
        self.complaints = complaints
        self._config = config
        self._default_route: tuple[str, ...] = ()
        self._marked = False  # copies leave with another mark than ours

    def choose_ifaces(self) -> None:
        """Where errors come in: --iface, or the default route; raises PmtudError."""
        self._default_route = default_route_interfaces()
        self.ifaces = self._config.ifaces
        if self.ifaces:
            check_ifaces(self.ifaces)
            return
        self.ifaces = self._default_route
        if not self.ifaces and self._config.rules == "auto":
            raise NoDefaultRoute

    def open(self, stack: contextlib.ExitStack, senders: CopySenders) -> None:
        """Install our table; with --rules off it holds the guard only, and it may be missing."""
        try:
            self.firewall = Firewall(self._config, self.ifaces, senders=senders)
            stack.enter_context(self.firewall)
        except PmtudError as problem:
            if self._config.rules == "auto":
                raise
            log("warning", "cannot install the guard", problem=str(problem))
        self._tell_copy_mark()
        self.probe_guard()

    def unready(self) -> list[str]:
        """The families whose rules are not in force; those of the operator are his."""
        if self._config.rules == "off":
            return []
        missing = [name for name, holds in self.guarded.items() if not holds]
        return [f"{name}: our rules are not in force" for name in missing]

    def shed(self) -> dict[str, int]:
        """The errors that the kernel kept from us, by family name; from any thread."""
        if not self.firewall:
            return {}
        return {family.name: count for family, count in self.firewall.shed().items()}

    def replace(self) -> None:
        """Install our table again, with what is known now."""
        if not self.firewall:
            return
        try:
            self.firewall.replace(self.ifaces)
        except PmtudError as problem:
            text = "cannot replace our rules, trying again each second"
            self.complaints.say("rules", text, problem=str(problem))
            return
        self.complaints.withdraw("rules")

    def follow_senders(self, senders: CopySenders) -> None:
        """From now on copies come from these."""
        if self.firewall and self.firewall.senders != senders:
            self.firewall.senders = senders
            self.replace()

    def tick(self) -> None:
        """Once a second: try again what was refused; follow Calico's eBPF data plane."""
        if "rules" in self.complaints:
            self.replace()
        if self.firewall and self.firewall.copy_mark != copy_mark(self._config):
            self.replace()
            self._tell_copy_mark()

    def _tell_copy_mark(self) -> None:
        """One line wherever copies leave with another mark than ours, or no longer do."""
        mark = None
        if self.firewall:
            mark = self.firewall.copy_mark
        why = "--copy-mark"
        if self._config.copy_mark == "auto":
            why = f"Calico's eBPF data plane, interface {CALICO_BPF_IFACE}"
        if mark is not None:
            log("info", f"copies leave with mark {mark:#x} ({why})")
            if calico_bpf_is_here() and self.firewall and self.firewall.senders.neighbours:
                text = "Calico's eBPF data plane does not give pods what comes by broadcast"
                log("warning", f"{text} or multicast; list the nodes in --peers")
        elif self._marked:
            log("info", f"copies leave with our mark {MARK_COPY:#x} again (no {why})")
        self._marked = mark is not None

    def follow_default_route(self) -> bool:
        """Whether it moved; the rules have followed then. One that is gone changes nothing."""
        with contextlib.suppress(PmtudError, OSError):
            found = default_route_interfaces()
            if found and found != self._default_route:
                self._default_route = found
                if not self._config.ifaces:
                    before = ",".join(self.ifaces)
                    log("info", "the default route moved", before=before, now=",".join(found))
                    self.ifaces = found
                self.replace()
                return True
        return False

    def conntrack_appeared(self) -> bool:
        """Whether conntrack came into use after our start; the guard asks it from then on."""
        if not self.firewall or self.firewall.conntrack or not conntrack_in_use():
            return False
        log("info", "conntrack came into use: the guard now asks it who owns a flow")
        self.replace()
        return True

    def probe_guard(self) -> None:
        """Learn whether the guard holds; without it only errors for own addresses are delivered."""
        for family in FAMILIES:
            holds = self._restored(family)
            about = f"no guard {family.name}"
            if holds:
                self.complaints.withdraw(about)
            else:
                text = (
                    f"no guard on mark {MARK_DELIVER:#x}: pods behind NAT will not be served; "
                    "install the output rules that `pmtud.py rules` prints"
                )
                self.complaints.say(about, text, family=family.name)
            self.guarded[family.name] = holds

    def _restored(self, family: Family) -> bool:
        """Whether the guard holds, if need be after our rules have been installed again."""
        holds = guard_holds(family)
        if holds is None:  # the probe has no way out: believe the table, if we have one
            return self.firewall is not None
        if holds or not self.firewall:
            return holds
        self.replace()
        about = f"overruled {family.name}"
        if guard_holds(family):
            self.complaints.withdraw(about)
            log("warning", "our rules were flushed: installed again", family=family.name)
            return True
        text = (
            f"our rules are overruled: another one in OUTPUT changes mark {MARK_DELIVER:#x} before "
            "our chain `guard` (find it with: nft list ruleset | grep -B 9 'mark set')"
        )
        self.complaints.say(about, text, family=family.name)
        return False


def check_ifaces(names: Sequence[str]) -> None:
    """Raise UsageError where --iface cannot work; say where it is not what was meant."""
    existing = [name for _, name in socket.if_nameindex()]
    for name in names:
        if name not in existing:
            there = ", ".join(existing)
            raise UsageError(f"--iface: there is no interface {name}; there are {there}")
        for role in ("brport", "bonding_slave"):
            if os.path.exists(f"/sys/class/net/{name}/{role}"):
                advice = "errors come in on that one; name it with --iface"
                log("warning", f"{name} belongs to a bridge or bond: {advice}")
    vrf = foreign_vrf(names)
    if vrf:
        raise UsageError(
            f"--iface: it belongs to the VRF {vrf}, and this process does not; start it with "
            f"`ip vrf exec {vrf}`"
        )


class LastSeen:
    """When each of a few things was last seen; the first `most` of them."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._at: dict[Any, float] = {}

    def note(self, key: Any, now: float) -> None:
        """It is seen now."""
        if key in self._at or len(self._at) < self._most:
            self._at[key] = now

    def since(self, moment: float) -> list[Any]:
        """Those seen after that moment; from any thread."""
        return [key for key, at in list(self._at.items()) if at > moment]


class Refusals:
    """Copies that the kernel refused: a line each at debug, a warning for all once a minute."""

    SECONDS = 60.0
    SHOWN = 8

    def __init__(self) -> None:
        self._untold: Counter[tuple[PeerAddress, int]] = Counter()  # by peer and errno
        self._copies = 0  # sent or refused in the same time
        self._tell_at = 0.0
        self._last = LastSeen(self.SHOWN)  # (peer, errno)

    def add(self, refused: Sequence[tuple[PeerAddress, int]], copies: int) -> None:
        """Remember these (peer, errno) of so many copies."""
        self._copies += copies
        self._untold.update(refused)
        for peer, code in refused:
            self._last.note((peer, code), time.monotonic())
            log("debug", "copy not sent", peer=peer, problem=os.strerror(code))

    def tell(self, now: float) -> None:
        """Warn of those since the last warning."""
        if now < self._tell_at:
            return
        copies = self._copies
        self._copies = 0
        if not self._untold:
            return
        shown = []
        for (peer, code), count in self._untold.most_common(self.SHOWN):
            shown.append(f"{peer}: {errno_text(code)}, {count} times")
        if len(self._untold) > len(shown):
            shown.append(f"and {len(self._untold) - len(shown)} more")
        text = f"the kernel refused copies to {'; '.join(shown)}"
        codes = {code for _, code in self._untold}
        if codes == {errno.ENOBUFS} and sum(self._untold.values()) >= copies:
            peer = next(iter(self._untold))[0]
            where = interface_towards(peer.packed, peer.zone) or "the way out"
            text += f"; all of them: a program or a queue on {where} drops copies"
        log("warning", text)
        self._untold.clear()
        self._tell_at = now + self.SECONDS

    def since(self, then: float) -> list[str]:
        """A line for each peer and errno that was refused since; from any thread."""
        lines = []
        for peer, code in self._last.since(then):
            text = f"copies to {peer} were refused within the last hour"
            lines.append(f"{text}: {errno_text(code)}")
        return lines


# An error that is acted on, its origin, one of ACTIONS, whether strict rp_filter drops it
Acted = tuple[MtuError, str, str, bool]


def explain_circle(service: bytes) -> str:
    """What it means that a node forwards an error to the fabric, which returns it."""
    ip = "ip -6" if family_of(service) is IPV6 else "ip"
    # A discard route would do that, too, and end what this node itself sends to services: the way
    # is looked up before kube-proxy's NAT in OUTPUT.
    return (
        f"errors about {address_text(service)} circle between the fabric and this node until "
        "their TTL ends; discard what comes in for services that are not here: "
        f"{ip} rule add iif IFACE to NETWORK blackhole"
    )


# What a node may send besides copies
NO_COPIES = (Reason.OWN, Reason.IGNORED_NETWORK, Reason.MISADDRESSED)


class Circles:
    """Service addresses about which errors circle, and when each was last heard of."""

    MAX = 16

    def __init__(self, news: News) -> None:
        self._news = news
        self._last = LastSeen(self.MAX)

    def note(self, service: bytes, now: float) -> None:
        """An error about this address was forwarded by this node, and came back."""
        self._last.note(service, now)
        if self._news.is_due(("circling", service), now):
            log("warning", explain_circle(service))

    def since(self, moment: float) -> list[str]:
        """A line for each that was heard of after that moment; in the thread that asks."""
        return list(map(explain_circle, self._last.since(moment)))


class Forwarder:
    """The packet's way: read what NFLOG has, decide on each error, copy, deliver, count."""

    # Errors in a second, beyond which the kernel gathers them: a flood that took 10 % of a core
    # takes 3 %.
    BUSY = 100
    # Errors and copies a turn then, so that no flood starves signals and timers.
    BATCH = 40
    BATCH_COPIES = 6400

    def __init__(self, config: Config, counters: Counters, keeper: RuleKeeper) -> None:
        self.news = News()
        self.circles = Circles(self.news)
        self.refusals = Refusals()
        self._config = config
        self._counters = counters
        self._keeper = keeper
        self._policy = Policy(config, WhoIsWho())
        self._families = {family.name: FamilySockets(family) for family in FAMILIES}
        self._nflog: Optional[Nflog] = None
        self._labels: dict[bytes, str] = {}  # of peers that send copies
        self._recent = 0  # errors since the last tick
        self._gathering = 1  # how many the kernel hands over at a time

    # -- read

    def open(self) -> None:
        """Bind the NFLOG group; raises PmtudError."""
        self._nflog = Nflog(self._config.nflog_group)

    def fileno(self) -> int:
        """The NFLOG socket's descriptor; another one once a broken socket was opened again."""
        return self._nflog.fileno() if self._nflog else -1

    def close(self) -> None:
        """Give the group back, and all sockets."""
        self.close_sockets()
        if self._nflog:
            self._nflog.close()

    def follow(self, arrangement: Arrangement) -> None:
        """From now on judge and send by this arrangement; raises PmtudError."""
        self.open_missing(arrangement)
        self._policy.set_who(arrangement.who)
        groups = arrangement.who.groups
        nodes = [peer for peer in arrangement.everyone if peer.packed not in groups]
        self._labels = {peer.packed: str(peer) for peer in nodes}
        self._counters.follow(arrangement.per_source, self._labels.values())
        self.gather()  # with more peers fewer errors a turn

    def open_missing(self, arrangement: Arrangement) -> None:
        """Sockets for each family that has none; one that has no use may go without."""
        complaints = self._keeper.complaints
        for name, sockets in self._families.items():
            if sockets.delivery:
                continue
            try:
                sockets.open(self._config, arrangement)
                self._counters.copies[name] = sockets.counts
                complaints.withdraw(name)
            # Switched off in the kernel, or duplicate detection on the source address.
            except OSError as problem:
                if arrangement.endpoints[sockets.family].targets:
                    complaints.say(name, f"no {name} sockets", problem=problem)

    def close_sockets(self) -> None:
        """Close the sockets of both families."""
        for sockets in self._families.values():
            sockets.close()

    def _read(self) -> list[Logged]:
        """What has arrived, nothing if nothing has.

        A broken socket is opened again; PmtudError, the end of the daemon, if that fails.
        """
        if not self._nflog:
            return []
        before = self._nflog.lost
        try:
            logged = self._nflog.read()
        except OSError as problem:
            self._nflog.close()
            self.open()
            self._gathering = 1
            log("error", "the NFLOG socket broke and was opened again", problem=problem.strerror)
            return []
        self._counters.nflog_lost += self._nflog.lost - before
        return logged

    def gather(self) -> None:
        """While errors are many, have the kernel hand over as many at a time as a turn may take."""
        errors = 1
        if self._recent > self.BUSY:
            most = max(1, *(len(sockets.counts.peers) for sockets in self._families.values()))
            errors = max(1, min(self.BATCH, self.BATCH_COPIES // most))
        if self._nflog and errors != self._gathering:
            with contextlib.suppress(OSError):
                self._nflog.gather(errors)
                self._gathering = errors

    def tick(self, now: float) -> None:
        """Once a second: see whether errors are still many, tell of refused copies."""
        self.gather()
        self._recent = 0
        self.refusals.tell(now)

    # -- decide

    def handle_batch(self, now: float) -> None:
        """Take what arrived, decide on each error, send the copies together, then deliver here."""
        logged = self._read()
        acted = []
        for packet, _, rpf in logged:
            one = self._decide(packet, rpf, now)
            if one:
                acted.append(one)
        self._replicate()
        if not self._config.dry_run:
            for error, origin, _, rpf in acted:
                if origin is PEER or self._config.rescue:
                    self._deliver(error, rpf)
        self._account(acted, now)
        if logged:
            self._counters.last_error_received = time.time()
            self._counters.batch_duration.observe(time.monotonic() - now)
        self._recent += len(logged)
        if self._recent > self.BUSY and self._gathering == 1:
            self.gather()

    def _decide(self, packet: bytes, rpf: bool, now: float) -> Optional[Acted]:
        """What to do about one packet; None if nothing, which is counted by its Reason."""
        error = parse(packet)
        if isinstance(error, Reason):
            self._counters.received[family_of_packet(packet).name, ROUTER] += 1
            self._counters.dropped[error] += 1
            return None
        verdict = decide(error, self._policy, now)
        self._counters.received[error.family.name, verdict.origin] += 1
        if verdict.origin is PEER and verdict.reason not in NO_COPIES:
            self._counters.copies_received[self._labels.get(error.src, OTHER)] += 1
        if verdict.reason:
            self._counters.dropped[verdict.reason] += 1
            self._explain_drop(error, verdict.reason, now)
            return None
        action = verdict.action
        if action is REPLICATE:
            sockets = self._families[error.family.name]
            if sockets.fanout:
                sockets.bodies.append(error.icmp)
                return error, verdict.origin, REPLICATE, rpf
            action = DELIVER
        if verdict.origin is ROUTER and not self._config.rescue:
            action = NOTHING
        return error, verdict.origin, action, rpf

    # -- copy

    def _replicate(self) -> None:
        """Send the copies of all errors of a family together."""
        for sockets in self._families.values():
            if sockets.bodies and sockets.fanout and not self._config.dry_run:
                copies = len(sockets.bodies) * len(sockets.fanout.peers)
                self.refusals.add(sockets.fanout.send(sockets.bodies), copies)
            sockets.bodies.clear()

    # -- deliver

    def _deliver(self, error: MtuError, rpf: bool) -> None:
        """Give the error to this node's own stack; the guard decides whether it is the owner."""
        sockets = self._families[error.family.name]
        own = error.quoted_src in self._policy.who.own
        result = "error"
        # Without a guard the error could leave this node towards the VIP
        if sockets.delivery and (own or self._keeper.guarded[error.family.name]):
            code = sockets.delivery.deliver(error.icmp, error.quoted_src, own)
            if code and self._keeper.conntrack_appeared():
                code = sockets.delivery.deliver(error.icmp, error.quoted_src, own)
            if code == 0 and own and is_deaf_tunnel(error):
                again = as_about_echo_reply(error.icmp)
                code = sockets.delivery.deliver(again, error.quoted_src, own)
            if code == 0:
                result = "owner"
            elif code == errno.EPERM:
                result = "not_owner"
            else:
                self._explain_refusal(error, code)
        self._counters.delivered[error.family.name, result] += 1
        if rpf and result == "owner":
            self._counters.rpf_rescued += 1
        if error.dst != error.quoted_src and result == "owner" and not own:
            self._counters.copies_needed[error.family.name] += 1

    # -- count and tell

    def _account(self, acted: Sequence[Acted], now: float) -> None:
        """Count and log what was done, after all of it: a log line costs as much as ten copies."""
        counters = self._counters
        told = LOGGER.isEnabledFor(logging.DEBUG)
        for error, origin, action, _ in acted:
            if origin is ROUTER:
                self._tell_report(error, now)
            if self._config.dry_run:
                counters.dropped[Reason.DRY_RUN] += 1
                would = "do nothing" if action is NOTHING else action
                log("info", f"dry run: would {would}", origin=origin, error=error)
                continue
            counters.acted[action] += 1
            counters.reported_mtu.observe(error.mtu or error.believed_mtu)
            if told:
                log("debug", "error", origin=origin, what=action, error=error)

    def _tell_report(self, error: MtuError, now: float) -> None:
        """One log line for each (router, destination, MTU)."""
        if self.news.is_due((error.src, error.quoted_dst, error.mtu), now):
            log(
                "info",
                "a router reports an MTU",
                router=address_text(error.src),
                destination=address_text(error.quoted_dst),
                mtu=error.mtu,
            )

    def notes(self) -> list[str]:
        """What the operator can do better: circling errors and refused copies of the last hour."""
        long_ago = time.monotonic() - News.SECONDS
        return self.circles.since(long_ago) + self.refusals.since(long_ago)

    def _explain_drop(self, error: MtuError, reason: Reason, now: float) -> None:
        """One line for each dropped error at debug, and one for a peer that is not listed."""
        if reason is Reason.CIRCLING:
            self.circles.note(error.quoted_src, now)
        if LOGGER.isEnabledFor(logging.DEBUG):
            log("debug", "dropped", reason=reason.value, error=error)
        if reason is Reason.MISADDRESSED and self.news.is_due(error.src, now):
            source = address_text(error.src)
            text = (
                f"dropped an error that is neither a router's nor a peer's copy; if {source} is an "
                "address of a peer, add it to --peers or --ignore-networks"
            )
            log("warning", text, error=error)

    def _explain_refusal(self, error: MtuError, code: int) -> None:
        """A delivery that the stack refuses is the operator's problem: a line an errno and hour."""
        problem = os.strerror(code)
        log("debug", "not delivered", error=error, problem=problem)
        if self.news.is_due(code, time.monotonic(), rationed=False):
            text = "this node's stack refuses a delivery: that flow does not learn"
            log("warning", f"{text}; see `pmtud.py check`", problem=problem, error=error)


# -----------------------------------------------------------------------------
# Section: daemon -- its life: start, loop, signals, housekeeping, systemd, HTTP


def end_connection(connection: socket.socket) -> None:
    """End it under the thread that reads or writes it."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class StatusServer(socketserver.ThreadingTCPServer):
    """/metrics, /healthz and /readyz; at most CONNECTIONS_MAX at a time, five seconds for each."""

    daemon_threads = allow_reuse_address = True
    request_queue_size = CONNECTIONS_MAX = 16

    def __init__(
        self,
        config: Config,
        address: str,
        render: Callable[[], bytes],
        unhealthy: Callable[[], list[str]],
        unready: Callable[[], list[str]],
        notes: Callable[[], list[str]],
    ) -> None:
        self.render, self.unhealthy, self.unready = render, unhealthy, unready
        self.notes = notes
        # Only one process in the cluster says this: `check` knows by it who answers.
        name = f"pmtud/{__version__} ({config.nodename}, NFLOG group {config.nflog_group})"
        self.name = name.encode("ascii", "replace").decode()
        self._started: dict[Any, float] = {}  # open connections, by socket, the oldest first
        self._ended = threading.Condition()  # guards it
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        super().__init__((address, config.metrics_port), StatusHandler)

    def server_bind(self) -> None:
        """Bind; `::` takes IPv4 as well."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def get_request(self) -> Any:
        """Accept; without a free file descriptor wait a little: serve_forever() would spin."""
        try:
            return super().get_request()
        except OSError:
            time.sleep(0.1)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve in a thread; where all places are taken the oldest connection has to go, so that
        probes get in.
        """
        with self._ended:
            if len(self._started) >= self.CONNECTIONS_MAX:
                end_connection(next(iter(self._started)))
                self._ended.wait_for(lambda: len(self._started) < self.CONNECTIONS_MAX, timeout=1.0)
            free = len(self._started) < self.CONNECTIONS_MAX
            if free:
                self._started[request] = time.monotonic()
        if free:
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        """Hang up and give the place back, also where no thread could be started."""
        with self._ended:
            self._started.pop(request, None)
            self._ended.notify_all()
            super().shutdown_request(request)

    def service_actions(self) -> None:
        """Twice a second: end connections whose time is over, however busy they are."""
        overdue = time.monotonic() - StatusHandler.timeout
        with self._ended:
            for request, started in list(self._started.items()):
                if started < overdue:
                    end_connection(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up or stalls is no news."""


class RequestReader:
    """The first bytes of a request; what comes after them is not read.

    http.server alone would keep 100 headers of 64 kB for each connection.
    """

    BYTES_MAX = 16384

    def __init__(self, stream: io.BufferedIOBase) -> None:
        self._stream = stream
        self._left = self.BYTES_MAX
        self.close = stream.close

    def readline(self, size: int) -> bytes:
        """The next line, or what there is room for."""
        line = self._stream.readline(min(size, self._left))
        self._left -= len(line)
        return line


class StatusHandler(http.server.BaseHTTPRequestHandler):
    """Answers GET on the three paths."""

    timeout = 5.0
    wbufsize = -1  # head and body leave together
    server: StatusServer

    def setup(self) -> None:
        """Bound what is read."""
        super().setup()
        self.rfile: Any = RequestReader(self.rfile)

    def do_GET(self) -> None:
        """Serve /metrics, /healthz or /readyz."""
        path = self.path.partition("?")[0]
        if path == "/metrics":
            self._answer_metrics()
        elif path == "/healthz":
            self._answer_verdict(self.server.unhealthy(), self.server.notes())
        elif path == "/readyz":
            self._answer_verdict(self.server.unready())
        else:
            self._answer(404, b"/metrics /healthz /readyz\n")

    def _answer_metrics(self) -> None:
        try:
            body = self.server.render()
        except PmtudError as problem:
            self._answer_verdict([str(problem)])
        else:
            self._answer(200, body, "text/plain; version=0.0.4; charset=utf-8")

    def _answer_verdict(self, problems: list[str], notes: Sequence[str] = ()) -> None:
        """What is wrong, one thing a line; or that all is well, and what is worth a look."""
        if problems:
            body = "".join(f"{problem}\n" for problem in problems)
            self._answer(503, body.encode("utf-8", "replace"))
        else:
            body = "".join(f"{line}\n" for line in ["ok", *notes])
            self._answer(200, body.encode())

    def _answer(self, status: int, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def version_string(self) -> str:
        """What the Server header says."""
        return self.server.name

    def log_message(self, *_: object) -> None:
        """Who asks is no news."""


def render_metrics(counters: Counters) -> bytes:
    """The text exposition; raises PmtudError where prometheus-client, imported at the first call,
    does not work.
    """
    try:
        from prometheus_client import exposition

        registry: Any = Collector(counters)  # all that a registry would do is call it
        return exposition.generate_latest(registry)
    except Exception as problem:  # a file of it may be missing, cut off, or of another version
        if isinstance(problem, ModuleNotFoundError) and problem.name == "prometheus_client":
            raise PmtudError(
                "prometheus-client is not installed: pip install prometheus-client"
            ) from None
        raise PmtudError(
            "prometheus-client does not work, install it again: "
            f"{type(problem).__name__}: {problem}"
        ) from problem


def open_status_server(config: Config, *serve: Callable[[], Any]) -> StatusServer:
    """The HTTP server on --metrics-addr, by default on all addresses of both families.

    Raises OSError.
    """
    if config.metrics_addr:
        return StatusServer(config, config.metrics_addr, *serve)
    try:
        return StatusServer(config, "::", *serve)
    except OSError as problem:
        if problem.errno == errno.EADDRINUSE:
            raise
        return StatusServer(config, "0.0.0.0", *serve)  # IPv6 is switched off here


class ServiceManager:
    """What systemd is told, as sd_notify(3) has it.

    Nothing where $NOTIFY_SOCKET is not set. Never blocks or fails.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        if address.startswith("@"):  # the abstract namespace of unix(7)
            address = "\0" + address[1:]
        self._address = address
        self._period = 0.0  # seconds from one WATCHDOG=1 to the next; 0: nobody waits for it
        own = str(os.getpid())
        wanted = environ.get("WATCHDOG_USEC", "")
        if environ.get("WATCHDOG_PID", own) == own and wanted.isdecimal():
            self._period = int(wanted) / 2e6  # half of what systemd waits
        self.watchdog_at = math.inf
        if self._address and self._period:
            self.watchdog_at = time.monotonic()

    def tell(self, *lines: str) -> None:
        """Send these VARIABLE=value lines."""
        if self._address:
            with (
                contextlib.suppress(OSError),
                socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel,
            ):
                channel.sendto("\n".join(lines).encode(), socket.MSG_DONTWAIT, self._address)

    def turned(self, now: float) -> None:
        """The packet loop is alive."""
        if now >= self.watchdog_at:
            self.watchdog_at = now + self._period
            self.tell("WATCHDOG=1")


def describe_rate(rate: float) -> str:
    """A rate for people."""
    if not rate:
        return "no limit"
    return f"{rate:.10g}/s"


def describe_rules(config: Config, firewall: Optional[Firewall]) -> str:
    """Whose rules are in force."""
    text = ""
    if config.rules == "off":
        text = "your own NFLOG rule, "
    if not firewall:
        return f"{text}no guard"
    text += f"table inet {firewall.table}"
    if not firewall.owned:
        text += " (not owned: old kernel)"
    return text


def describe_limits(config: Config, senders: CopySenders) -> str:
    """How much is acted on, and what is believed."""
    total = describe_rate(config.rate)
    passed = senders.rate(config.rate)
    if passed < config.rate and senders.addresses:
        total += f", {passed}/s for so many peers"
    ipv4, ipv6 = config.min_mtu
    text = (
        f"one per flow each {config.flow_interval:g} s, "
        f"{describe_rate(config.source_rate)} per router, {total} in all; "
        f"MTU at least {ipv4} (IPv4), {ipv6} (IPv6)"
    )
    if config.dry_run:
        text += "; dry run: nothing is sent"
    return text


class Arranger:
    """Who is who on this node: puts peers and addresses in force whenever they change."""

    CHANGE_GAP = 1.0  # seconds from one change to the next: 16 ms each with 1,000 peers

    def __init__(self, peers: PeerSources, forwarder: Forwarder, keeper: RuleKeeper) -> None:
        self.arrangement = Arrangement()
        self.stale = False  # peers or addresses have changed
        self.change_at = 0.0  # when the next change may be put in force
        self._peers = peers
        self._forwarder = forwarder
        self._keeper = keeper
        self._complaints = keeper.complaints

    def unanswered(self) -> list[str]:
        """What is known of the peer sources of which no answer is in force."""
        return self._peers.unanswered(self.arrangement.per_source)

    def rearrange(self, config: Config) -> None:
        """Work out peers and addresses anew and put them in force; raises PmtudError, OSError."""
        listed = self._peers.listed()
        ifaces = self._keeper.ifaces
        arrangement = arrange(listed, local_addresses(), config.ignore_networks, ifaces)
        # Pods come and go, and addresses with them: mostly nothing changes for us.
        if arrangement.needs_sockets_after(self.arrangement):
            self._forwarder.close_sockets()
        self._forwarder.follow(arrangement)
        self.arrangement = arrangement
        self._keeper.follow_senders(self.arrangement.senders)

    def refresh(self, config: Config) -> None:
        """Put what has changed in force, or keep the old and say why."""
        self.stale = False
        before = self.arrangement
        try:
            self.rearrange(config)
        except (PmtudError, OSError) as problem:
            text = "cannot put the new peers in force, the old ones stay"
            self._complaints.say("peers", text, problem=problem)
            return
        finally:
            self.change_at = time.monotonic() + self.CHANGE_GAP
        self._complaints.withdraw("peers")
        self._tell_change(before)

    def tick(self) -> None:
        """Once a second: open what could not be opened, try again what is not in force."""
        try:
            self._forwarder.open_missing(self.arrangement)
        except PmtudError as problem:
            text = "cannot open raw sockets any more"
            self._complaints.say("sockets", text, problem=problem)
        if "peers" in self._complaints:
            self.stale = True

    def tell(self) -> None:
        """One line about the peers in force."""
        peers = self.arrangement.everyone
        if peers:
            log("info", f"peers: {len(peers)} ({some(peers)})", **self._per_family())
        elif self.unanswered():
            log("info", "peers: none yet, asking for them")
        else:
            log("info", "peers: none, standalone: local rescue only")

    def _per_family(self) -> dict[str, int]:
        """How many of each family: a copy goes only to peers of its own."""
        endpoints = self.arrangement.endpoints
        return {f"peers_{family.name}": len(endpoints[family].targets) for family in FAMILIES}

    def _tell_change(self, before: Arrangement) -> None:
        """One line about who came and went; also where a source's first answer brings nobody."""
        old = set(before.everyone)
        new = set(self.arrangement.everyone)
        told = []
        for peers, what in ((new - old, "came"), (old - new, "went")):
            if peers:
                told.append(f"{len(peers)} {what} ({some(sorted(peers))})")
        if told:
            log("info", f"peers changed: {', '.join(told)}", **self._per_family())
        elif not new and self.arrangement.per_source.keys() != before.per_source.keys():
            self.tell()


def keep_two_capabilities() -> None:
    """Of root's, where it is root; a kernel that refuses leaves it all, and a warning."""
    if os.geteuid() != 0:
        return
    try:
        drop_privileges()
    except OSError as problem:
        text = "cannot drop privileges, going on with all"
        log("warning", text, problem=problem.strerror)


class MinuteReport:
    """One line a minute in the log: what has grown since the one before."""

    SECONDS = 60.0

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._before = counters.summary()
        self._due_at = time.monotonic() + self.SECONDS

    def is_due(self, now: float) -> bool:
        """Whether the minute is over."""
        return now >= self._due_at

    def tell(self, now: float) -> None:
        """Write the line, if there is anything to say; begin the next minute."""
        totals = self._counters.summary()
        grown = {}
        for name, count in totals.items():
            growth = count - self._before.get(name, 0)
            if growth:
                grown[name] = growth
        if grown:
            log("info", "last minute", **grown)
        self._before = totals
        self._due_at = now + self.SECONDS


class Daemon:
    """The running program: opens everything, turns the loop, keeps house, closes everything."""

    TICK = 1.0  # seconds between housekeeping
    SLOW_TICKS = 10  # every tenth: default route, guard
    HUNG = 10.0  # seconds without a turn of the loop

    def __init__(self, config: Config) -> None:
        self.config = config
        self.counters = Counters()
        self.keeper = RuleKeeper(config, Complaints())
        self.forwarder = Forwarder(config, self.counters, self.keeper)
        self.peers = PeerSources(config, self.counters, self.wake)
        self.arranger = Arranger(self.peers, self.forwarder, self.keeper)
        self._server: Optional[StatusServer] = None
        self._manager = ServiceManager(os.environ)
        self._stack = contextlib.ExitStack()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._stopping = False
        self._hangup = False
        self._ticks = 0
        self._turned = time.monotonic()
        self._report = MinuteReport(self.counters)

    # -- start and stop

    def open(self) -> None:
        """Open everything and say what will be done.

        Raises PmtudError before anything is left behind.
        """
        with contextlib.ExitStack() as stack:
            stack.callback(self.peers.close)
            self.peers.prepare()
            self.keeper.choose_ifaces()
            stack.callback(self.forwarder.close)
            self.forwarder.open()
            self._monitor = Netlink(NETLINK_ROUTE, RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR)
            stack.enter_context(self._monitor)
            self._monitor.socket.setblocking(False)
            self.arranger.rearrange(self.config)
            self.keeper.open(stack, self.arranger.arrangement.senders)
            self._open_status(stack)
            keep_two_capabilities()  # in this thread, so before any other starts
            self.peers.follow()
            if self._server:
                serve = self._server.serve_forever
                thread = threading.Thread(target=serve, name="http", daemon=True)
                thread.start()
                stack.callback(self._server.shutdown)  # which waits for that thread
            self._stack = stack.pop_all()
        self._announce()
        self._manager.tell("READY=1", self._status())

    def close(self) -> None:
        """Undo everything open() did."""
        self._manager.tell("STOPPING=1")
        self._stack.close()
        for descriptor in (self._wake_read, self._wake_write):
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def _open_status(self, stack: contextlib.ExitStack) -> None:
        """Start to listen for HTTP, if anybody wants that."""
        config = self.config
        if not config.metrics_port:
            return
        try:
            asked = (self._render, self.unhealthy, self.unready, self.forwarder.notes)
            self._server = open_status_server(config, *asked)
            stack.callback(self._server.server_close)
        except OSError as problem:
            where = f"{config.metrics_addr or '*'} port {config.metrics_port}"
            text = f"metrics cannot be served on {where} ({problem.strerror})"
            advice = "choose others with --metrics-addr and --metrics-port"
            if config.metrics_required:
                raise PmtudError(f"{text}; {advice}, port 0 for none") from problem
            log("warning", f"{text}; running without, {advice}")
            return
        self._check_status()

    def _check_status(self) -> None:
        """Say what keeps HTTP from being of use.

        prometheus-client is imported now: it may lie where only all of root's privileges reach.
        """
        address = self.config.metrics_addr
        in_pod = "KUBERNETES_SERVICE_HOST" in os.environ
        if in_pod and address and ipaddress.ip_address(address).is_loopback:
            text = "a kubelet's probes go to the node's address and fail"
            log("warning", f"{text}, HTTP is served on {address} only")
        try:
            self._render()
        except PmtudError as problem:
            log("warning", f"running without metrics: {problem}")

    def _announce(self) -> None:
        """The lines of a start: where, to whom, how much."""
        config = self.config
        arrangement = self.arranger.arrangement
        ifaces = ", ".join(self.keeper.ifaces) or "any"
        rules = describe_rules(config, self.keeper.firewall)
        log(
            "info",
            f"pmtud {__version__} on {config.nodename}: errors come in on {ifaces}, "
            f"NFLOG group {config.nflog_group}, rules: {rules}",
        )
        self.arranger.tell()
        removed = ", ".join(map(str, arrangement.removed))
        if removed:
            log("info", f"own address removed from peers: {removed}")
        log("info", f"limits: {describe_limits(config, arrangement.senders)}")

    # -- how it is

    def _status(self) -> str:
        """What systemctl status shows."""
        totals = self.counters.summary()
        peers = len(self.arranger.arrangement.everyone)
        return f"STATUS={peers} peers, {totals['received']} errors, {totals['copies']} copies"

    def unhealthy(self) -> list[str]:
        """That the loop has not turned for ten seconds; nothing while it turns."""
        idle = time.monotonic() - self._turned
        if idle < self.HUNG:
            return []
        return [f"the packet loop has not turned for {idle:.0f} s"]

    def unready(self) -> list[str]:
        """What keeps errors from coming in and going out; nothing if all is well."""
        return self.unhealthy() + self.keeper.unready() + self.arranger.unanswered()

    def _render(self) -> bytes:
        """The metrics, with what is looked up for each scrape; in the thread that answers it."""
        reasons = {
            "loop": self.unhealthy(),
            "rules": self.keeper.unready(),
            "peers": self.arranger.unanswered(),
        }
        counters = self.counters
        counters.unready = {reason: int(bool(found)) for reason, found in reasons.items()}
        counters.shed = self.keeper.shed()
        counters.resolved = resolved_peers(self.arranger.arrangement)
        counters.node_info = node_info(self.config.nodename, self.arranger.arrangement)
        return render_metrics(counters)

    # -- the loop

    def run(self) -> None:
        """Turn until SIGTERM or SIGINT."""
        tick_at = time.monotonic() + self.TICK
        while not self._stopping:
            ready = self._wait(tick_at)
            now = time.monotonic()
            self._turned = now
            if self.forwarder.fileno() in ready:
                self.forwarder.handle_batch(now)
            self._manager.turned(now)
            if self._wake_read in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake_read, 4096)
            if self._monitor.fileno() in ready:
                self._drain_monitor()
            if self._hangup:
                self._hangup = False
                self._reload()
            if now >= tick_at:
                tick_at = now + self.TICK
                self._tick(now)
            if self.arranger.stale and now >= self.arranger.change_at:
                self.arranger.refresh(self.config)
                self._manager.tell(self._status())

    def _wait(self, tick_at: float) -> set[int]:
        """Sleep until something is due or has come in; the descriptors that can be read."""
        wake_at = min(tick_at, self._manager.watchdog_at)
        if self.arranger.stale:
            wake_at = min(wake_at, self.arranger.change_at)
        poll = select.poll()
        for descriptor in (self.forwarder, self._monitor, self._wake_read):
            poll.register(descriptor, select.POLLIN)
        milliseconds = int((wake_at - time.monotonic()) * 1000) + 1
        return {descriptor for descriptor, _ in poll.poll(max(0, milliseconds))}

    def wake(self) -> None:
        """Make the loop look at the peers again; callable from any thread or signal handler."""
        self.arranger.stale = True
        with contextlib.suppress(OSError):
            os.write(self._wake_write, b"!")

    def handle_signals(self) -> None:
        """SIGTERM and SIGINT stop, SIGHUP reloads; each wakes the loop through the pipe."""
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        signal.signal(signal.SIGHUP, self._hang_up)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)

    def _stop(self, *_: object) -> None:
        self._stopping = True

    def _hang_up(self, *_: object) -> None:
        self._hangup = True

    def _reload(self) -> None:
        """SIGHUP: look at the peer sources again."""
        text = "SIGHUP: reading the peer sources again"
        if not self.config.peer_sources:
            text = (
                "SIGHUP: nothing to read again, no peer source is in use; "
                "options are read at the start"
            )
        log("info", text)
        self._manager.tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        self.peers.reload()
        self._manager.tell("READY=1", self._status())

    # -- housekeeping

    def _tick(self, now: float) -> None:
        """Housekeeping, once a second."""
        self._ticks += 1
        self.forwarder.tick(now)
        self.keeper.tick()
        self.arranger.tick()
        if self._ticks % self.SLOW_TICKS == 0:
            if self.keeper.follow_default_route():
                self.arranger.stale = True
            self.keeper.probe_guard()
        if self._report.is_due(now):
            self._report.tell(now)
            self._manager.tell(self._status())
            self.forwarder.news.renew()

    def _drain_monitor(self) -> None:
        """An address came or went: rearrange, once for a burst of changes."""
        with contextlib.suppress(OSError):  # nothing left, or events were lost: look again
            while True:
                self._monitor.socket.recv(NETLINK_BUFFER_BYTES)
        self.arranger.stale = True


# -----------------------------------------------------------------------------
# Section: doctor -- what becomes of MTU errors on this node, and how to repair it; changes nothing

OK = "OK"
WARN = "WARN"
FAIL = "FAIL"
INITIAL_PID_NAMESPACE = "pid:[4026531836]"  # linux/proc_ns.h, PROC_PID_INIT_INO
NODE_PORTS = range(30000, 32768)  # of Kubernetes' Services
OTHER_PORT = 23040  # what daemonset.yaml takes instead

# linux/rtnetlink.h, linux/if.h
RTM_F_FIB_MATCH = 0x2000
IFF_UP = 1
IFF_LOOPBACK = 8
RTM_NEWTFILTER = 44
RTM_GETTFILTER = 46
TCA_KIND = 1
TCA_OPTIONS = 2
TCA_BPF_NAME = 7
TC_H_CLSACT_EGRESS = 0xFFFFFFF3
TCMSG = struct.Struct("=BxxxiIII")  # struct tcmsg: family, interface index, handle, parent, info

# linux/bpf.h
BPF_PROG_QUERY = 16
BPF_TCX_EGRESS = 47
# union bpf_attr of BPF_PROG_QUERY: interface index, attach type, flags twice, where to put the ids,
# and how many there are
BPF_QUERY = struct.Struct("=IIIIQI44x")
BPF_SYSCALLS = {"x86_64": 321, "aarch64": 280, "ppc64le": 361, "s390x": 351, "riscv64": 280}

# linux/if_link.h, linux/if_tunnel.h
IFLA_MTU = 4
IFLA_LINK_NETNSID = 37
IFLA_XDP = 43
IFLA_XDP_ATTACHED = 2
IFLA_INFO_DATA = 2
IFLA_IPTUN_LINK = 1
IFLA_IPTUN_LOCAL = 2
IFLA_IPTUN_REMOTE = 3
IFLA_IPTUN_ENCAP_TYPE = 15
IFLA_GRE_LINK = 1
IFLA_GRE_LOCAL = 6
IFLA_GRE_REMOTE = 7
IFLA_GRE_ENCAP_TYPE = 14
TUNNEL_ENCAP_FOU = 1
TUNNEL_ENCAP_GUE = 2
IFLA_VXLAN_GROUP = 2
IFLA_VXLAN_LINK = 3
IFLA_VXLAN_LOCAL = 4
IFLA_VXLAN_GROUP6 = 16
IFLA_VXLAN_LOCAL6 = 17
IFLA_GENEVE_REMOTE = 2
IFLA_GENEVE_REMOTE6 = 7


class Step(NamedTuple):
    """A command that repairs something and touches live traffic: what it risks comes first."""

    command: str = ""
    risk: str = ""


NO_STEP = Step()


class Finding(NamedTuple):
    """The answer of one check.

    `fix` holds the commands that repair it or look further, one a line, and harm nothing; the next
    step comes after them.
    """

    check: str
    status: str
    found: str
    fix: str = ""
    next_step: str = ""
    risk: str = ""


def ok(check: str, found: str) -> Finding:
    """All is well, or cannot be better."""
    return Finding(check, OK, found)


def warn(check: str, found: str, fix: str = "", step: Step = NO_STEP) -> Finding:
    """Something is lost, or cannot be seen."""
    return Finding(check, WARN, found, fix, *step)


def fail(check: str, found: str, fix: str = "", step: Step = NO_STEP) -> Finding:
    """Errors, packets or copies vanish."""
    return Finding(check, FAIL, found, fix, *step)


class Tunnel(NamedTuple):
    """A kind of tunnel: what it adds to a packet, and how the kernel tells the interface under it.

    `link` and `addresses` are attributes in IFLA_INFO_DATA, local addresses before remote ones.
    """

    names: str  # that CNIs give it, a regular expression
    overhead_ipv4: int
    overhead_ipv6: int
    link: int = 0
    addresses: tuple[int, ...] = ()
    encap: int = 0  # the attribute that tells whether UDP is around it


ENCAP_BYTES = {TUNNEL_ENCAP_FOU: 8, TUNNEL_ENCAP_GUE: 12}
IPTUN_ADDRESSES = (IFLA_IPTUN_LOCAL, IFLA_IPTUN_REMOTE)
GRE_ADDRESSES = (IFLA_GRE_LOCAL, IFLA_GRE_REMOTE)
VXLAN_ADDRESSES = (IFLA_VXLAN_LOCAL, IFLA_VXLAN_LOCAL6, IFLA_VXLAN_GROUP, IFLA_VXLAN_GROUP6)
TUNNELS = {
    "ipip": Tunnel(r"tunl\d+", 20, 20, IFLA_IPTUN_LINK, IPTUN_ADDRESSES, IFLA_IPTUN_ENCAP_TYPE),
    # Without a key, checksum or number, which add four bytes each
    "gre": Tunnel("", 24, 44, IFLA_GRE_LINK, GRE_ADDRESSES, IFLA_GRE_ENCAP_TYPE),
    "gretap": Tunnel("", 38, 58, IFLA_GRE_LINK, GRE_ADDRESSES, IFLA_GRE_ENCAP_TYPE),
    "vxlan": Tunnel(
        r"vxlan(-v6)?\.calico|flannel(-v6)?\.\d+|cilium_vxlan",
        50,
        70,
        IFLA_VXLAN_LINK,
        VXLAN_ADDRESSES,
    ),
    "wireguard": Tunnel(r"wireguard\.cali|wg-v6\.cali|flannel-wg(-v6)?|cilium_wg0", 60, 80),
    "geneve": Tunnel(r"cilium_geneve", 50, 70, 0, (IFLA_GENEVE_REMOTE, IFLA_GENEVE_REMOTE6)),
}
OVERHEADS = {size for tunnel in TUNNELS.values() if tunnel.names for size in tunnel[1:3]}
POD_NAMES = r"(cali|lxc|veth)[0-9a-f]+|cni0|cilium_(host|net)"
NIC_KINDS = ("", "bond", "team", "vlan")
VETH_NIC_NAMES = r"eth\d|en[opsx]|mgmt"  # in kind and containerlab NICs are veths


class Link(NamedTuple):
    """A network interface that is up; `role` is tunnel, pod, nic, or empty."""

    name: str
    mtu: int
    role: str
    overhead: int = 0
    under: str = ""  # where a tunnel's packets leave, empty where the kernel does not say
    xdp: bool = False  # a program sees its packets before all else


class RunningDaemon(NamedTuple):
    """The process that is pmtud, and what its rules tell of it."""

    pid: int
    options: bytes  # its command line and environment, empty where they cannot be read
    delivers: bool  # neither --dry-run nor --no-rescue
    ifaces: tuple[str, ...] = ()  # where it takes errors, empty where that cannot be seen
    peers: tuple[PeerAddress, ...] = ()  # of its sets
    feeds_itself: bool = True  # not --rules off


def setting(path: str) -> int:
    """The number in /proc/sys/net/PATH, -1 where there is none."""
    return int(read_file(f"/proc/sys/net/{path}") or -1)


# -- interfaces


def list_links() -> Iterator[Link]:
    """Every interface that is up (RTM_GETLINK)."""
    for device in list_interfaces():
        if device.flags & IFF_UP:
            yield read_link(device)


def read_link(device: Interface) -> Link:
    """What the checks ask of an device."""
    name = device.name
    mtu = host_number(device.attrs, IFLA_MTU)
    tunnel = TUNNELS.get(device.kind) or tunnel_named(name)
    if not tunnel:
        xdp = attributes(device.attrs.get(IFLA_XDP, b""))
        has_program = host_number(xdp, IFLA_XDP_ATTACHED) > 0
        return Link(name, mtu, role_of(device), xdp=has_program)
    data = attributes(device.info.get(IFLA_INFO_DATA, b""))
    addresses = [data.get(kind, b"") for kind in tunnel.addresses]
    addresses = list(filter(any, addresses))  # 0.0.0.0 is none
    overhead = tunnel.overhead_ipv4
    if "-v6" in name or IPV6 in map(family_of, addresses):
        overhead = tunnel.overhead_ipv6
    overhead += ENCAP_BYTES.get(host_number(data, tunnel.encap), 0)
    under = interface_under(host_number(data, tunnel.link), addresses)
    return Link(name, mtu, "tunnel", overhead, under)


def tunnel_named(name: str) -> Optional[Tunnel]:
    """The kind of tunnel that CNIs call so."""
    for tunnel in TUNNELS.values():
        if re.fullmatch(tunnel.names, name):
            return tunnel
    return None


def role_of(device: Interface) -> str:
    """Whether an interface that is no tunnel is a NIC or a pod's, empty if neither."""
    is_veth = device.kind == "veth"
    if is_veth and re.match(VETH_NIC_NAMES, device.name):
        return "nic"
    if device.kind in NIC_KINDS and not device.flags & IFF_LOOPBACK:
        return "nic"
    is_elsewhere = IFLA_LINK_NETNSID in device.attrs  # its other end
    if (is_veth and is_elsewhere) or re.fullmatch(POD_NAMES, device.name):
        return "pod"
    return ""


def interface_under(index: int, addresses: Iterable[bytes]) -> str:
    """The interface that a tunnel's packets leave by, empty where the kernel does not say.

    It has this index, or the tunnel's own address, or is on the way to its peer.
    """
    hops = [Hop(index, b"")]
    own = {address.packed: address.ifindex for address in local_addresses()}
    for packed in addresses:
        if packed in own:
            hops.append(Hop(own[packed], b""))
            continue
        with contextlib.suppress(NetlinkError):
            hops += find_route(packed)[1]
    for iface in interfaces_of(hops):
        if iface != "lo":
            return iface
    return ""


# -- rules of other programs

# What a rule may name that is not for ICMP; that is not for this IP version.
OTHER_PROTOCOLS = {"tcp", "udp", "sctp", "dccp", "esp", "gre"}
OTHER_FAMILY = {4: {"ip6", "ipv6"}, 6: {"ip", "ipv4"}}
IFACE_KEYS = ({"meta": {"key": "iif"}}, {"meta": {"key": "iifname"}})


class FirewallRule(NamedTuple):
    """What the checks ask of a rule of nftables or iptables."""

    chain: str  # its family, table and name
    words: set[str]  # its family, and what it names: protocols, interfaces
    ifaces: list[str]  # where its packets come in, `eth*` is a beginning; none: anywhere
    group: Optional[int]  # where it logs to
    packets: Optional[int]  # what it counted
    drops_by_path: bool  # it drops what comes in elsewhere than an answer would leave
    is_conditional: bool = False  # it matches a mark, a set or addresses, too

    def hears(self, iface: str) -> bool:
        """Whether packets that come in on an interface can match."""
        return not self.ifaces or any(fnmatch.fnmatchcase(iface, name) for name in self.ifaces)

    def is_for_icmp(self) -> bool:
        """Whether ICMP can match."""
        return any("icmp" in word for word in self.words) or not self.words & OTHER_PROTOCOLS


class Ruleset:
    """The rules of nftables and of both iptables, as far as they can be read."""

    def __init__(self) -> None:
        self.rules: list[FirewallRule] = []
        self.hooks: dict[str, str] = {}  # where each chain begins, empty: where others jump to it
        self.jumps: dict[str, list[str]] = {}  # from each chain
        self.sets: dict[str, list[str]] = {}  # the elements of each set of nftables
        self.unseen = ""  # why the rules of nftables are not here

    def read_nft(self, listing: list[dict[str, Any]]) -> None:
        """Take in what `nft -j list ruleset` lists, see libnftables-json(5)."""
        for entry in listing:
            for kind, item in entry.items():
                table = f"{item.get('family')} {item.get('table')}"
                # A map of verdicts counts as a chain called @NAME: rules name it under "data".
                name = f"{table} {item.get('chain', '@' + item.get('name', ''))}"
                if kind == "chain":
                    self.hooks[f"{table} {item['name']}"] = item.get("hook", "")
                if kind == "rule":
                    self.rules.append(nft_rule(name, item))
                if kind == "set":
                    elements = [str(value) for _, value in leaves(item.get("elem", []))]
                    self.sets[f"{table} {item['name']}"] = elements
                for key, value in leaves(item):
                    if key in ("target", "data"):
                        self.jumps.setdefault(name, []).append(f"{table} {value}")

    def read_iptables(self, family: str, listing: str) -> None:
        """Take in what `iptables-save -c` prints."""
        table = ""
        for line in listing.splitlines():
            # Comments and prefixes may say anything.
            words = re.sub(r'"(\\.|[^"\\])*"|! -[ip] \S+', "", line).split()
            if line.startswith("*"):
                table = f"{family} {line[1:]}"
            if line.startswith(":") and words[1] != "-":
                name = words[0][1:]
                self.hooks[f"{table} {name}"] = name.lower()
            if line.startswith("["):
                packets = int(words[0][1:].partition(":")[0])
                options = dict(zip(words, words[1:]))
                chain = f"{table} {options['-A']}"
                target = options.get("-j", options.get("-g"))
                self.jumps.setdefault(chain, []).append(f"{table} {target}")
                rule = iptables_rule(chain, options, packets)
                if "! -" in line:
                    rule = rule._replace(is_conditional=True)
                self.rules.append(rule)

    def reached_from(self, *hooks: str) -> set[str]:
        """The chains that packets reach from these hooks, directly or by jumps."""
        waiting = [chain for chain, hook in self.hooks.items() if hook in hooks]
        reached: set[str] = set()
        while waiting:
            chain = waiting.pop()
            if chain not in reached:
                reached.add(chain)
                waiting += self.jumps.get(chain, [])
        return reached


def leaves(data: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every number and string in a JSON value, with the key it stands under."""
    if isinstance(data, dict):
        for name, value in data.items():
            yield from leaves(value, name)
    elif isinstance(data, list):
        for value in data:
            yield from leaves(value, key)
    else:
        yield key, data


def nft_rule(chain: str, rule: Mapping[str, Any]) -> FirewallRule:
    """A rule in JSON."""
    statements = rule.get("expr", [])
    matches = [statement["match"] for statement in statements if "match" in statement]
    conditions = [condition for condition in matches if condition["op"] != "!="]
    ifaces = [one["right"] for one in conditions if one["left"] in IFACE_KEYS]
    values = dict(leaves(statements))
    is_drop = any("drop" in statement or "reject" in statement for statement in statements)
    return FirewallRule(
        chain,
        {rule["family"], *(str(value) for _, value in leaves(conditions))},
        [str(name) for _, name in leaves(ifaces) if not str(name).startswith("@")],
        values.get("group"),
        values.get("packets"),
        is_drop and any(map(is_path_check, conditions)),
        not all(map(is_plain, matches)),
    )


PLAIN_KEYS = {"iif", "iifname", "nfproto", "protocol", "l4proto"}


def is_plain(match: Mapping[str, Any]) -> bool:
    """Whether we know if this matches an error from an interface of ours."""
    left = match["left"]
    if not isinstance(left, dict):
        return False
    if "fib" in left:
        return True
    if match["op"] == "!=" or str(match["right"]).startswith("@"):
        return False
    if "meta" in left:
        return left["meta"]["key"] in PLAIN_KEYS
    return str(left.get("payload", {}).get("protocol")).startswith("icmp")


def is_path_check(condition: Mapping[str, Any]) -> bool:
    """Whether this is `fib saddr . iif oif missing`: an answer would not leave where this came."""
    flags = condition["left"].get("fib", {}).get("flags", ())
    return {"saddr", "iif"}.issubset(flags) and condition["right"] in (False, "0")


IPTABLES_CONDITIONS = ("-s", "-d", "--mark", "--match-set", "--ctstate", "--src-type")


def iptables_rule(chain: str, options: Mapping[str, str], packets: int) -> FirewallRule:
    """A rule of iptables."""
    target = options.get("-j")
    group = None
    if target == "NFLOG":
        group = int(options.get("--nflog-group", 0))
    return FirewallRule(
        chain,
        {chain.partition(" ")[0], options.get("-p", "")},
        [options[key].replace("+", "*") for key in options if key == "-i"],
        group,
        packets,
        "--invert" in options and target in ("DROP", "REJECT"),
        not options.keys().isdisjoint(IPTABLES_CONDITIONS),
    )


def output_of(command: str) -> str:
    """What a command prints, empty where it is not installed or takes too long."""
    import subprocess

    try:
        done = subprocess.run(
            command.split(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            check=False,
            encoding="utf-8",
            errors="replace",
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def nft_listing(command: str) -> list[dict[str, Any]]:
    """What nft lists as JSON; raises ValueError."""
    found: list[dict[str, Any]] = json.loads(output_of(f"nft -j {command}"))["nftables"]
    return found


def nft_table(table: str) -> list[dict[str, Any]]:
    """The same for a table, piece by piece where need be; raises ValueError.

    nft 1.0.6 reads the flags of a table that has an owner from somewhere in its memory, and mostly
    stops there. Chains and sets alone have none.
    """
    with contextlib.suppress(ValueError):
        return nft_listing(f"list table {table}")
    text = output_of(f"nft list table {table}")
    found = []
    for kind, name in re.findall(r"^\t(chain|set) (\S+) \{", text, re.MULTILINE):
        found += nft_listing(f"list {kind} {table} {name}")
    return found


def read_ruleset() -> Ruleset:
    """All rules of this network namespace."""
    import shutil

    ruleset = Ruleset()
    try:
        ruleset.read_nft(nft_listing("list ruleset"))
    except ValueError:
        ruleset.unseen = "`nft -j list ruleset` gives no JSON"
        with contextlib.suppress(ValueError):
            tables = re.findall(r"^table (.+)$", output_of("nft list tables"), re.MULTILINE)
            for table in tables:
                ruleset.read_nft(nft_table(table))
            if tables:
                ruleset.unseen = ""
    if not shutil.which("nft"):
        ruleset.unseen = "nft is not installed"
    for family in ("ip", "ip6"):
        # nft tells the matches of iptables-nft only by their names.
        kinds = ["-nft"]
        # The legacy commands would load their modules; this file is there only where they are
        # loaded already.
        if os.path.exists(f"/proc/net/{family}_tables_names"):
            kinds += ["-legacy", ""]
        for kind in kinds:
            ruleset.read_iptables(family, output_of(f"{family}tables{kind}-save -c"))
    return ruleset


class Node(NamedTuple):
    """What the checks look at."""

    config: Config
    ifaces: tuple[str, ...]
    links: dict[str, Link]
    ruleset: Ruleset
    daemon: Optional[RunningDaemon]
    cni_dir: str
    in_kubernetes: bool


def is_kubernetes(links: Iterable[str], cni_dir: str) -> bool:
    """Whether a kubelet runs here, or this is a pod."""
    signs = (cni_dir, "/var/lib/kubelet", "/run/secrets/kubernetes.io")
    if any(map(os.path.exists, signs)):
        return True
    for name in links:
        is_cni = tunnel_named(name) and name != "tunl0"  # which comes with the kernel's module
        if is_cni or re.fullmatch(r"(cali|lxc)[0-9a-f]+|cni0|cilium_(host|net)", name):
            return True
    return False


# -- commands that repair


def own_command(config: Config, *words: str) -> list[str]:
    """This program with these words, and the interfaces and group of `config`."""
    command = ["python3", os.path.abspath(__file__), *words]
    for iface in config.ifaces:
        command += ["--iface", iface]
    if config.nflog_group != Config().nflog_group:
        command += ["--nflog-group", str(config.nflog_group)]
    return command


UNIT_FOLDERS = ("/etc/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")


def start_command(node: Node) -> str:
    """The command that starts the daemon as it is to run: a unit, or a DaemonSet."""
    if any(os.path.exists(f"{folder}/pmtud.service") for folder in UNIT_FOLDERS):
        return "systemctl enable --now pmtud"
    if node.in_kubernetes:
        return "kubectl apply -f daemonset.yaml"
    script = "install pmtud.py /usr/local/bin"
    unit = "cp pmtud.service /etc/systemd/system"
    return f"{script} && {unit} && systemctl enable --now pmtud"


def check_command(config: Config, *hosts: str) -> str:
    """The command that runs the doctor."""
    return shlex.join(own_command(config, "check", *hosts))


def paste_command(config: Config) -> str:
    """The command that installs the rules for a daemon with --rules off."""
    return shlex.join(own_command(config, "rules")) + " | sed -n '1,/^}/p' | nft -f -"


# -- checks: the kernel, the daemon, the rules that feed it


def nftables_refusal(table_flags: int) -> int:
    """The errno with which nftables refuses a table with these flags, 0 if it takes it.

    Asked in a batch without its end message, which the kernel validates and then always aborts:
    nothing is made.
    """
    every = NFGENMSG.pack(socket.AF_UNSPEC, 0, NFNL_SUBSYS_NFTABLES)
    begin = message(NFNL_MSG_BATCH_BEGIN, 0, 1, every)
    table = NFGENMSG.pack(NFPROTO_INET, 0, 0)
    table += string(TableAttr.NAME, "pmtud_probe") + be32(TableAttr.FLAGS, table_flags)
    kind = NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWTABLE
    make = message(kind, NLM_F_CREATE | NLM_F_ACK, 2, table)
    try:
        with Netlink(NETLINK_NETFILTER) as netlink:
            netlink.send("probe nftables", begin + make, 2)
    except NetlinkError as problem:
        return problem.number
    return 0


def find_daemon(group: int, ruleset: Ruleset) -> Optional[RunningDaemon]:
    """The process that is pmtud and has the group, None if there is none."""
    port = group_holder(group)
    if port is None:
        return None
    pid = netlink_holder(port)
    tables = (f"inet {whole_name(group)} ", f"inet {guard_name(group)} ")
    has_table = any(chain.startswith(tables) for chain in ruleset.hooks)
    if not has_table and not is_pmtud(pid):
        return None
    options = b"\0" + read_file(f"/proc/{pid}/cmdline") + read_file(f"/proc/{pid}/environ")
    idle = re.search(
        rb"(?i)\0(--dry-run|--no-rescue|PMTUD_(DRY_RUN|NO_RESCUE)=(1|true|yes|on))\0", options
    )
    table = f"inet {whole_name(group)}"
    ifaces = [rule.ifaces for rule in ruleset.rules if rule.chain == f"{table} senders"]
    peers = []
    for family in FAMILIES:
        for text in ruleset.sets.get(f"{table} {peers_set(family)}", ()):
            packed = packed_address(text)
            if not is_link_local(packed):  # the set knows no zones
                peers.append(PeerAddress(packed))
    return RunningDaemon(
        pid,
        options,
        not idle,
        tuple(dict.fromkeys(name for names in ifaces for name in names)),
        tuple(peers),
        f"{table}_guard guard" not in ruleset.hooks,
    )


def is_stopped(pid: int) -> bool:
    """Whether SIGSTOP or a debugger holds a process: state T or t in proc(5), stat."""
    fields = read_file(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    return bool(fields) and fields[0] in (b"T", b"t")


def option_of(options: bytes, name: str) -> str:
    """What a process was given for an option, the command line before the environment.

    Empty: nothing, or unknown.
    """
    variable = "PMTUD_" + name.upper().replace("-", "_")
    for start in (f"--{name}[=\0]", f"{variable}="):
        given = re.findall(f"\0{start}([!-~]+)".encode(), options)
        if given:
            return str(given[-1], "ascii")
    return ""


def in_container() -> bool:
    """Whether this is a container with processes of its own: what it sees is not the node's."""
    signs = ("/.dockerenv", "/run/.containerenv", "/run/secrets/kubernetes.io")
    is_one = "KUBERNETES_SERVICE_HOST" in os.environ or any(map(os.path.exists, signs))
    return is_one and os.readlink("/proc/self/ns/pid") != INITIAL_PID_NAMESPACE


def check_view(node: Node, is_privileged: bool) -> Iterator[Finding]:
    """What cannot be seen from here, and so is not judged."""
    unseen = []
    if node.ruleset.unseen and is_privileged:
        unseen.append(f"the rules of others ({node.ruleset.unseen})")
    if in_container():
        unseen.append("the node's processes (this is a container)")
        if not os.path.exists(node.cni_dir):
            unseen.append(f"the CNI's configuration ({node.cni_dir} is not here)")
    if unseen:
        yield warn("view", f"not seen from here: {'; '.join(unseen)}. Run it on the node as well")


def check_kernel(node: Node) -> Iterator[Finding]:
    """What only root can ask: whether we get sockets, a table, the group; daemon, rules, guard."""
    privileges = check_privileges(node)
    yield privileges
    yield from check_view(node, privileges.status == OK)
    if privileges.status != OK:
        return
    yield check_nftables()
    group = check_group(node)
    yield group
    yield check_daemon(node, group.status == OK)
    yield from check_differences(node)
    yield check_nflog_rule(node)
    yield check_guard(node)
    yield check_delivery()


def check_privileges(node: Node) -> Finding:
    """Whether we may do what the daemon does."""
    try:
        with Netlink(NETLINK_NETFILTER), DeliverySocket(IPV4):
            return ok("privileges", "raw sockets, marks and netlink are allowed")
    except PmtudError as problem:
        found = f"{problem}. Daemon, group, rules and guard are not looked at"
        return warn("privileges", found, f"sudo {check_command(node.config)}")


def check_nftables() -> Finding:
    """Whether the kernel takes our table."""
    refusal = nftables_refusal(NFT_TABLE_F_OWNER)
    if not refusal:
        return ok("nftables", "the kernel takes a table, and removes it when its owner dies")
    if nftables_refusal(0):
        return fail("nftables", f"a table is refused: {os.strerror(refusal)}", "modprobe nf_tables")
    return warn("nftables", "no table ownership (Linux before 5.12): after SIGKILL our table stays")


def check_group(node: Node) -> Finding:
    """Whether the NFLOG group is ours."""
    group = node.config.nflog_group
    if node.daemon:
        return ok("nflog_group", f"group {group} is held by pmtud")
    try:
        Nflog(group).close()
    except PmtudError as problem:
        if group_holder(group) is None:
            return fail("nflog_group", str(problem), "modprobe nfnetlink_log")
        pid = netlink_holder(group_holder(group) or 0)
        return fail("nflog_group", str(problem), f"ps -fp {pid}" if pid else "")
    return ok("nflog_group", f"group {group} is free")


def check_daemon(node: Node, can_start: bool) -> Finding:
    """Whether the daemon runs, and delivers."""
    if node.daemon:
        process = describe_process(node.daemon.pid)
        if is_stopped(node.daemon.pid):
            return fail("daemon", f"stopped, {process}", f"kill -CONT {node.daemon.pid}")
        if node.daemon.delivers:
            return ok("daemon", f"running, {process}")
        return warn("daemon", f"--dry-run or --no-rescue: {process}")
    found = "not running"
    table = f"inet {whole_name(node.config.nflog_group)}"
    if any(chain.startswith(f"{table} ") for chain in node.ruleset.hooks):
        found += f"; SIGKILL left its table {table}, which the next start replaces"
    if can_start:
        return warn("daemon", found, start_command(node))
    return warn("daemon", found)


def check_differences(node: Node) -> Iterator[Finding]:
    """Whether the daemon does what the options say, or the default route."""
    daemon = node.daemon
    if not daemon:
        return
    if daemon.ifaces and set(daemon.ifaces) != set(node.ifaces):
        theirs = ", ".join(daemon.ifaces)
        ours = ", ".join(node.ifaces) or "no interface"
        found = f"the daemon takes errors on {theirs}, not on {ours}"
        if node.config.ifaces:
            yield warn("daemon_iface", f"{found} as --iface says here; start it with the same")
        else:
            advice = "if they come in there too, give it both by --iface"
            yield warn("daemon_iface", f"{found}, where the default route is; {advice}")
    own = {address.packed for address in local_addresses()}
    wanted = {peer.packed for peer in node.config.peers if not peer.zone} - own
    known = {peer.packed for peer in daemon.peers}
    if wanted and wanted != known and daemon.ifaces and not node.config.peer_sources:
        missing = some_addresses(wanted - known)
        more = some_addresses(known - wanted)
        found = f"the daemon lacks {missing} of --peers, and has {more} besides"
        yield warn("daemon_peers", f"{found}; give all nodes the same list")


def some_addresses(packed: Iterable[bytes]) -> str:
    """The addresses of a few of them."""
    return some([PeerAddress(one) for one in sorted(packed)]) or "none"


def feeding_rules(node: Node) -> Iterator[FirewallRule]:
    """The rules that log errors from our interfaces to the group, but for those of the daemon."""
    config = node.config
    for rule in node.ruleset.rules:
        if rule.group != config.nflog_group or not rule.is_for_icmp():
            continue
        if rule.ifaces and not any(map(rule.hears, node.ifaces)):
            continue
        is_own = rule.chain.startswith(f"inet {whole_name(config.nflog_group)} ")
        if config.rules == "off" or not is_own:
            yield rule


def check_nflog_rule(node: Node) -> Finding:
    """Whether a rule feeds the group with ICMP errors from our interfaces, early enough."""
    config = node.config
    early = node.ruleset.reached_from("prerouting", "ingress")
    late = node.ruleset.reached_from("input")
    feeding = {rule.chain: rule for rule in feeding_rules(node) if rule.chain in early | late}
    found = "; ".join(map(describe_rule, feeding.values()))
    if config.rules == "auto" and feeding:
        twice = (
            "pmtud installs its own, and this one feeds every error in again; remove it, or start "
            f"pmtud with --rules off: {found}"
        )
        return warn("nflog_rule", twice, find_group_command(config))
    if config.rules == "auto" and node.daemon:
        return ok("nflog_rule", f"table inet {whole_name(config.nflog_group)} of the daemon")
    if config.rules == "auto":
        return ok("nflog_rule", "pmtud installs its own")
    if feeding.keys() - early:
        too_late = f"too late, rp_filter comes first: {found}"
        return warn("nflog_rule", too_late, paste_command(config))
    if feeding:
        return ok("nflog_rule", found)
    if node.ruleset.unseen:
        unseen = f"what feeds the group cannot be seen: {node.ruleset.unseen}"
        return warn("nflog_rule", f"--rules off, and {unseen}")
    nothing = f"--rules off, and nothing feeds group {config.nflog_group}"
    return fail("nflog_rule", nothing, paste_command(config))


def find_group_command(config: Config) -> str:
    """The command that shows what logs to the group."""
    every = "iptables-save; ip6tables-save; iptables-legacy-save; ip6tables-legacy-save"
    return f"(nft -a list ruleset; {every}) 2>&1 | grep -w 'group {config.nflog_group}'"


def describe_rule(rule: FirewallRule) -> str:
    """Where a rule is, and what it counted."""
    if rule.packets is None:
        return f"{rule.chain}, no counter"
    return f"{rule.chain}, {rule.packets} packets so far"


def check_guard(node: Node) -> Finding:
    """Whether something keeps errors about other nodes' flows inside."""
    is_ours = node.config.rules == "auto"
    if is_ours and not node.daemon:
        return ok("guard", "pmtud installs it")
    missing = ", ".join(family.name for family in FAMILIES if guard_holds(family) is False)
    if missing:
        found = f"none for {missing}: errors about other nodes' flows would leave this node"
        fix = "" if is_ours else paste_command(node.config)
        return fail("guard", found, fix)
    good = ", ".join(family.name for family in FAMILIES if guard_holds(family))
    if good:
        return ok("guard", f"holds for {good}")
    return warn("guard", "cannot be probed")


def check_delivery() -> Finding:
    """Whether this node's stack takes what pmtud delivers.

    Tried with an error about no flow, to an own address.
    """
    taken = []
    for family in FAMILIES:
        own = inside_address(family, local_addresses(), ())
        if not own:
            continue
        code = probe_delivery(family, own.packed)
        if code == errno.EPERM:
            found = f"a rule in OUTPUT drops {family.name} errors that pmtud delivers here: "
            fix = "nft list ruleset | grep -A 9 'hook output'"
            return fail("delivery", found + "no flow learns from them", fix)
        if code:
            found = f"this node's stack refuses {family.name} errors: {os.strerror(code)}; "
            fix = "ip link set dev lo up"
            return fail("delivery", found + "no flow learns from them", fix)
        taken.append(family.name)
    families = " and ".join(taken) or "no address"
    return ok("delivery", f"this node's stack takes errors for {families}")


# -- checks: who answers where the daemon serves HTTP


def check_http(node: Node) -> Iterator[Finding]:
    """Whether it is the daemon who answers where it listens.

    A kubelet asks there whether it is alive.
    """
    if not node.daemon or is_stopped(node.daemon.pid):
        return
    options = node.daemon.options
    port = node.config.metrics_port
    given = option_of(options, "metrics-port")
    if given.isdecimal():
        port = int(given)
    if not port:
        return
    name = re.escape(option_of(options, "nodename")) or ".*"
    says = rf"pmtud/\S+ \({name}, NFLOG group {node.config.nflog_group}\)"
    given = option_of(options, "metrics-addr") or node.config.metrics_addr
    addresses = served_addresses(node, given)
    notes: list[str] = []
    for address in addresses:
        problem = judge_answer(address, port, says, notes)
        if not problem:
            continue
        if port in NODE_PORTS:
            problem += f"; start the daemon with --metrics-port {OTHER_PORT}"
        yield fail("http", f"{address} port {port}: {problem}", f"ss -Htlnp sport = :{port}")
        return
    yield ok("http", f"the daemon answers on {', '.join(addresses)} port {port}")
    for note in dict.fromkeys(notes):
        yield warn("daemon_says", note)


def served_addresses(node: Node, address: str) -> list[str]:
    """Where HTTP on --metrics-addr is asked.

    Where that is all addresses: those of our interfaces.
    """
    if address not in ("", "::", "0.0.0.0"):
        return [address]
    names = dict(socket.if_nameindex())
    own = []
    for local in local_addresses():
        is_ours = names.get(local.ifindex) in node.ifaces
        is_served = address != "0.0.0.0" or family_of(local.packed) is IPV4
        if is_ours and is_served and not is_link_local(local.packed):
            own.append(address_text(local.packed))
    return own[:16] or ["127.0.0.1"]


def judge_answer(address: str, port: int, says: str, notes: list[str]) -> str:
    """What is wrong with the answer of /healthz, empty if all is well.

    `says`: what the daemon calls itself there. `notes` gets what else it has to say.
    """
    name = "without a name"
    body = ""
    try:
        with contextlib.closing(http.client.HTTPConnection(address, port, 2.0)) as connection:
            connection.request("GET", "/healthz")
            answer = connection.getresponse()
            name = answer.getheader("Server", name).strip()
            body = answer.read1(4096).decode("utf-8", "replace").strip()
    except http.client.HTTPException:  # no HTTP at all
        pass
    except OSError as problem:
        return f"{problem.strerror or problem}: the daemon is not heard there"
    if not re.fullmatch(says, name):
        guess = "another program?"
        if port in NODE_PORTS:
            guess = f"a Service with nodePort {port}?"
        return f"somebody else answers, {name[:60]} ({guess})"
    first, *more = body.splitlines() or [""]
    if first == "ok":
        notes += more
        return ""
    return body


# -- checks: the interfaces that errors come in on

RP_FILTER_MODES = {0: "off", 1: "strict", 2: "loose, errors from any routed address pass"}


def check_interfaces(node: Node) -> Iterator[Finding]:
    """What reverse path filtering does to a router's error, and whether IPv6 runs."""
    for iface in node.ifaces:
        if iface in node.links:
            yield check_rp_filter(node, iface)
            yield from check_conditional(node, iface)
            yield check_ipv6(node.links[iface])
            continue
        names = [name for _, name in socket.if_nameindex()]
        if iface in names:
            command = f"ip link set dev {shlex.quote(iface)} up"
            step = Step(command, "somebody may have set it down for a reason")
            yield fail("interface", f"{iface} is not up", step=step)
        else:
            yield fail("interface", f"{iface} is not there, but {', '.join(names)}")


def path_rules(node: Node, iface: str, version: int) -> Iterator[FirewallRule]:
    """The rules that drop errors on this interface by reverse path, or perhaps do."""
    reached = node.ruleset.reached_from("prerouting", "ingress", "input")
    for rule in node.ruleset.rules:
        is_for_it = rule.hears(iface) and not rule.words & OTHER_FAMILY[version]
        if rule.drops_by_path and rule.chain in reached and is_for_it:
            yield rule


def path_filter(node: Node, iface: str, version: int) -> str:
    """What drops errors on this interface by reverse path, empty if nothing does for certain."""
    names = ("all", iface)
    if version == 4 and max(setting(f"ipv4/conf/{name}/rp_filter") for name in names) == 1:
        return "rp_filter"
    for rule in path_rules(node, iface, version):
        if not rule.is_conditional:
            return f"a rule in {rule.chain}"
    return ""


def check_conditional(node: Node, iface: str) -> Iterator[Finding]:
    """Reverse path rules that also ask for a mark, a set or an address: whether they count."""
    rules = [rule for family in FAMILIES for rule in path_rules(node, iface, family.version)]
    perhaps = dict.fromkeys(rule.chain for rule in rules if rule.is_conditional)
    if not perhaps:
        return
    time.sleep(1.0)
    later = read_ruleset()
    for chain in perhaps:
        before = packets_of(node.ruleset, chain)
        found = f"{iface}: perhaps a rule in {chain} drops errors too, by more than the path; "
        if before is None:
            yield warn("rp_filter", f"{found}it has no counter")
            continue
        moved = (packets_of(later, chain) or 0) - before
        found += f"it counts {before} packets, {moved} more a second later"
        if moved > 0:
            yield warn("rp_filter", found)
        else:
            yield ok("rp_filter", found)


def packets_of(ruleset: Ruleset, chain: str) -> Optional[int]:
    """What the conditional reverse path rules of a chain have counted, None without a counter."""
    counts = [
        rule.packets
        for rule in ruleset.rules
        if rule.chain == chain and rule.drops_by_path and rule.is_conditional
    ]
    return sum(count or 0 for count in counts) if None not in counts else None


def delivers_from(node: Node, iface: str) -> bool:
    """Whether the daemon delivers what comes in on an interface."""
    if not node.daemon or not node.daemon.delivers:
        return False
    chain = f"inet {whole_name(node.config.nflog_group)} senders"
    listening = [rule for rule in node.ruleset.rules if rule.chain == chain and rule.ifaces]
    return not listening or any(rule.hears(iface) for rule in listening)


def check_rp_filter(node: Node, iface: str) -> Finding:
    """Whether a router's error from an address that is routed elsewhere gets in."""
    every = setting("ipv4/conf/all/rp_filter")
    own = setting(f"ipv4/conf/{iface}/rp_filter")
    mode = RP_FILTER_MODES.get(max(every, own), "unknown")
    found = f"{iface}: {mode} (all {every}, {iface} {own})"
    filters = [path_filter(node, iface, family.version) for family in FAMILIES]
    culprits = " and ".join(dict.fromkeys(filter(None, filters)))
    if not culprits:
        return ok("rp_filter", found)
    if delivers_from(node, iface):
        return ok("rp_filter", f"{found}; pmtud delivers what is dropped by {culprits}")
    lost = (
        f"{found}; an error from a router's address that is routed elsewhere is dropped by "
        f"{culprits}. Loosening it weakens anti-spoofing for all traffic; pmtud delivers the "
        "error and leaves it strict"
    )
    if node.daemon:
        return warn("rp_filter", f"{lost}: let it take errors on {iface}, by --iface")
    return warn("rp_filter", lost, start_command(node))


def check_ipv6(link: Link) -> Finding:
    """Whether IPv6 runs on an interface, and believes the MTU that routers advertise."""
    iface = link.name
    conf = f"ipv6/conf/{iface}"
    if link.mtu < IPV6_MIN_MTU:
        command = f"ip link set dev {shlex.quote(iface)} mtu {IPV6_MIN_MTU}"
        step = Step(command, "packets of that size must fit through what is behind it")
        found = f"{iface}: cannot run, MTU {link.mtu} is under {IPV6_MIN_MTU}"
        return fail("ipv6", found, step=step)
    if setting("ipv6/conf/all/disable_ipv6") or setting(f"{conf}/disable_ipv6"):
        return ok("ipv6", f"{iface}: switched off")
    forwarding = setting(f"{conf}/forwarding")
    accept = setting(f"{conf}/accept_ra")
    if accept != 2 and (accept != 1 or forwarding):
        why = f"(forwarding {forwarding}, accept_ra {accept})"
        return ok("ipv6", f"{iface}: router advertisements and their MTU are not read {why}")
    if not setting(f"{conf}/accept_ra_mtu"):
        fix = f"sysctl -w net/ipv6/conf/{shlex.quote(iface)}/accept_ra_mtu=1"
        return warn("ipv6", f"{iface}: the MTU in router advertisements is ignored", fix)
    return ok("ipv6", f"{iface}: router advertisements and their MTU are believed")


# -- checks: programs on the interfaces, which see packets where no rule does


def egress_filters(index: int) -> list[str]:
    """The names of the classifiers at tc egress of an interface, as `tc filter show` lists them."""
    query = TCMSG.pack(socket.AF_UNSPEC, index, 0, TC_H_CLSACT_EGRESS, 0)
    names = []
    for payload in dump("list filters", RTM_GETTFILTER, RTM_NEWTFILTER, query):
        attrs = attributes(payload, TCMSG.size)
        options = attributes(attrs.get(TCA_OPTIONS, b""))
        name = options.get(TCA_BPF_NAME) or attrs.get(TCA_KIND, b"")
        if TCA_OPTIONS in attrs:  # each priority is listed once more without them
            names.append(os.fsdecode(name.rstrip(b"\0")))
    return list(dict.fromkeys(names))


def count_tcx(index: int) -> int:
    """How many programs TCX runs at egress of an interface; `tc` does not show them.

    Raises OSError: EPERM where bpf() is refused.
    """
    number = BPF_SYSCALLS.get(platform.machine())
    if not number:
        return 0
    query = BPF_QUERY.pack(index, BPF_TCX_EGRESS, 0, 0, 0, 0)
    asked = ctypes.create_string_buffer(query, len(query))
    call = libc_function("syscall", ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_uint)
    try:
        call(number, BPF_PROG_QUERY, asked, len(query))
    except OSError as problem:
        if problem.errno in (errno.EINVAL, errno.ENOSYS):  # before 6.6
            return 0
        raise
    count: int = BPF_QUERY.unpack(asked.raw)[5]
    return count


def check_programs(node: Node) -> Iterator[Finding]:
    """What programs at tc egress or XDP mean for errors and copies."""
    if calico_bpf_is_here():
        yield judge_calico(node)
        return
    if "cilium_host" in node.links and not any("KUBE-" in name for name in node.ruleset.hooks):
        found = "Cilium without kube-proxy: pods behind it do not learn yet, sockets of the node do"
        yield warn("programs", found)
        return
    for index, name in socket.if_nameindex():
        if name in node.ifaces:
            yield judge_programs(node, index, name)


def judge_calico(node: Node) -> Finding:
    """Calico's eBPF data plane: copies need its mark, and an address of a node each."""
    found = "Calico's eBPF data plane"
    groups = arrange({"": node.config.peers}, local_addresses(), ()).who.neighbours.networks
    if groups:
        text = f"{found} does not give pods what comes by broadcast or multicast; list the nodes"
        return fail("programs", text)
    mark = copy_mark(node.config)
    if mark != MARK_CALICO_BYPASS:
        text = f"{found} drops copies without mark {MARK_CALICO_BYPASS:#x}; use --copy-mark auto"
        return fail("programs", text)
    return ok("programs", f"{found}: copies leave with its mark {MARK_CALICO_BYPASS:#x}")


def judge_programs(node: Node, index: int, name: str) -> Finding:
    """Programs that nobody knows may drop copies, or take errors away."""
    see = "see whether copies arrive: tcpdump -ni any 'icmp[0:2] == 0x304' on a peer"
    found = egress_filters(index)
    try:
        count = count_tcx(index)
    except OSError as problem:
        text = f"programs on {name} cannot be seen, bpf() is refused: {problem.strerror}"
        return warn("programs", f"{text} (in a pod seccomp does that); look on the node")
    if count:
        found.append(f"{count} by TCX")
    if found:
        return warn("programs", f"at egress of {name} ({', '.join(found)}) may drop copies; {see}")
    link = node.links.get(name)
    if link and link.xdp:
        return warn(
            "programs", f"XDP on {name} sees errors before the kernel; see whether they come"
        )
    return ok("programs", f"none at egress of {name}")


# -- checks: settings of the kernel


def check_settings(_: Node) -> Iterator[Finding]:
    """What the kernel does with an error, and the room in its connection table."""
    yield check_pmtu_discovery()
    yield check_tcp_probing()
    yield check_min_pmtu()
    yield check_conntrack()


def check_pmtu_discovery() -> Finding:
    """net.ipv4.ip_no_pmtu_disc"""
    value = setting("ipv4/ip_no_pmtu_disc")
    fix = "sysctl -w net/ipv4/ip_no_pmtu_disc=0"
    if value == 0:
        return ok("ip_no_pmtu_disc", "0: path MTU discovery is on")
    if value == 1:
        found = "1: packets leave without DF and are fragmented on their way"
        return warn("ip_no_pmtu_disc", found, fix)
    if value == 2:
        found = "2: the kernel discards every error, pmtud's deliveries too"
        return fail("ip_no_pmtu_disc", found, fix)
    if value == 3:
        found = (
            "3: only errors about TCP, SCTP and DCCP are believed; UDP, QUIC and tunnels hang. "
            "And an error that quotes an unknown protocol panics kernels before 6.6.130, 6.12.78 "
            "and 6.18.20 (CVE-2026-23398)"
        )
        return warn("ip_no_pmtu_disc", found, fix)
    return ok("ip_no_pmtu_disc", f"{value}: unknown to this program")


TCP_PROBING = {
    0: "off, TCP depends on the errors of routers",
    1: "TCP probes by itself, seconds after it hung; UDP, QUIC and tunnels do not",
    2: "TCP starts small and probes upwards; UDP, QUIC and tunnels do not",
}


def check_tcp_probing() -> Finding:
    """net.ipv4.tcp_mtu_probing, always well: only told."""
    value = setting("ipv4/tcp_mtu_probing")
    return ok("tcp_mtu_probing", f"{value}: {TCP_PROBING.get(value, 'unknown to this program')}")


def check_min_pmtu() -> Finding:
    """net.ipv4.route.min_pmtu"""
    value = setting("ipv4/route/min_pmtu")
    if value < 0:
        return ok("min_pmtu", "only the first network namespace of this kernel tells it")
    if value <= IPV4_MIN_PMTU:
        return ok("min_pmtu", f"{value}: the smallest MTU believed")
    found = f"{value}: smaller reports count as this one, and cost DF"
    return warn("min_pmtu", found, f"sysctl -w net/ipv4/route/min_pmtu={IPV4_MIN_PMTU}")


def check_conntrack() -> Finding:
    """The room in the table of connections."""
    count = setting("netfilter/nf_conntrack_count")
    most = setting("netfilter/nf_conntrack_max")
    if most <= 0:
        return ok("conntrack", "not in use")
    found = f"{count} of {most} connections ({count / most:.0%})"
    fix = f"sysctl -w net/netfilter/nf_conntrack_max={2 * most}"
    if count > 0.95 * most:
        return fail("conntrack", found, fix)
    if count > 0.80 * most:
        return warn("conntrack", found, fix)
    return ok("conntrack", found)


# -- checks: peers


ICMP_ECHO_REQUEST = 8  # RFC 792
ICMPV6_ECHO_REQUEST = 128  # RFC 4443
PING_SECONDS = 1.0


def check_peers(node: Node) -> Iterator[Finding]:
    """Whether each peer resolves, has a route, and is not an address shared with other nodes."""
    config = node.config
    listed = {"": config.peers}
    if node.daemon and not config.peers and not config.peer_sources:
        listed = {"": node.daemon.peers}
    failed = False
    for source in map(open_source, config.peer_sources):
        try:
            listed[source.name] = source.load() or ()
        except PmtudError as problem:
            failed = True
            yield fail("peers", str(problem), look_into(source.name))
    vrf = foreign_vrf(node.ifaces)
    if vrf:
        found = f"the VRF {vrf} has the interface, and this process is not in it"
        fix = f"ip vrf exec {shlex.quote(vrf)} {check_command(config)}"
        yield fail("peers", found, fix)
        return
    local = local_addresses()
    arrangement = arrange(listed, local, config.ignore_networks)
    wrong = wrong_peers(arrangement, local)
    for name, peers in listed.items():
        if wrong.keys() & set(peers):
            yield judge_peers(name, peers, wrong)
    if wrong or (failed and not arrangement.everyone):
        return
    removed = [f"{peer} is this node" for peer in arrangement.removed]
    found = "; ".join([describe_peers(node, arrangement.everyone, local), *removed])
    silent = silent_peers(arrangement, local)
    unresolved = {packed for (_, packed), one in neighbours().items() if not one.is_resolved}
    dead = [peer for peer in silent if peer.packed in unresolved]
    if dead:
        text = f"{some(dead)} does not answer, nobody on its link has the address"
        yield fail("peers", text, "ip neigh show nud failed nud incomplete")
    far = [peer for peer in silent if not is_near(peer, local)]
    if far:
        text = f"{some(far)} does not answer to ping: nobody has the address, or ping is dropped"
        yield warn("peers", text, f"tracepath -n {far[0]}")
    if not dead and not far:
        yield ok("peers", found)


def echo_request(family: Family, number: int) -> bytes:
    """An ICMP echo request with this identifier; the kernel adds the checksum of ICMPv6."""
    kind = ICMP_ECHO_REQUEST
    if family is IPV6:
        kind = ICMPV6_ECHO_REQUEST
    checksum = 0xFFFF - ((kind << 8) + number) % 0xFFFF
    return struct.pack("!BBHHH", kind, 0, checksum, number, 0)


def silent_peers(arrangement: Arrangement, local: Sequence[LocalAddress]) -> list[PeerAddress]:
    """The peers that answer no ping within a second, all asked at once; needs privileges."""
    waiting = {}
    for peer in arrangement.everyone:
        if peer.packed not in arrangement.who.groups:
            waiting[peer.packed] = peer
    number = os.getpid() & 0xFFFF
    try:
        pings = {
            family: socket.socket(family.af, socket.SOCK_RAW, family.icmp_protocol)
            for family in FAMILIES
        }
    except OSError:
        return []
    for peer in list(waiting.values()):
        family = family_of(peer.packed)
        with contextlib.suppress(OSError):  # a firewall may refuse it
            pings[family].sendto(echo_request(family, number), sockaddr(peer))
            hear_replies(pings, waiting, 0.0)
    until = time.monotonic() + PING_SECONDS
    while waiting and time.monotonic() < until:
        hear_replies(pings, waiting, until - time.monotonic())
    for ping in pings.values():
        ping.close()
    return list(waiting.values())


def hear_replies(
    pings: Mapping[Family, socket.socket], waiting: dict[bytes, PeerAddress], seconds: float
) -> None:
    """Take those who answer out of `waiting`; any ICMP message of theirs shows that they live."""
    for ping in select.select(list(pings.values()), [], [], max(0.0, seconds))[0]:
        _, sender = ping.recvfrom(0, socket.MSG_TRUNC)
        waiting.pop(packed_address(sender[0]), None)


def look_into(source: str) -> str:
    """The command that looks into a source of peers, empty where there is none."""
    kind, _, name = source.partition(":")
    if kind == "file":
        return f"${{EDITOR:-vi}} {shlex.quote(name)}"
    if kind == "dns":
        return f"getent ahosts {shlex.quote(name)}"
    return ""


def is_near(peer: PeerAddress, local: Iterable[LocalAddress]) -> bool:
    """Whether a peer is in a network of one of these addresses."""
    address = ipaddress.ip_address(peer.packed)
    return any(address in network_of(one) for one in local)


def wrong_peers(arrangement: Arrangement, local: Iterable[LocalAddress]) -> dict[PeerAddress, str]:
    """What is wrong with each peer that cannot be one."""
    lo = socket.if_nametoindex("lo")
    on_nics = [address for address in local if address.ifindex != lo]
    on_lo = {address.packed for address in local if address.ifindex == lo}
    # Where nodes are listed by addresses of their NICs, one on lo is no node's
    others = [peer for peer in arrangement.removed if peer.packed not in on_lo]
    near = [peer for peer in (*others, *arrangement.everyone) if is_near(peer, on_nics)]
    by_nic = {family_of(peer.packed) for peer in near}
    wrong = {}
    for peer in arrangement.removed:
        if peer.packed in on_lo and family_of(peer.packed) in by_nic:
            wrong[peer] = "a service address on lo, not a node"
    for peer in arrangement.everyone:
        if not kernel_source(peer):
            wrong[peer] = "no route"
    return wrong


def judge_peers(
    source: str, peers: Sequence[PeerAddress], wrong: Mapping[PeerAddress, str]
) -> Finding:
    """The verdict on a source with wrong peers; `source` is empty for those of --peers itself."""
    found = "; ".join(f"{peer}: {wrong[peer]}" for peer in peers if peer in wrong)
    if source:
        return fail("peers", f"{found} (in {source})", look_into(source))
    return fail("peers", f"{found}; take it out of --peers")


def describe_peers(node: Node, peers: Sequence[PeerAddress], local: Sequence[LocalAddress]) -> str:
    """How many share a network with this node."""
    if not peers and node.daemon and not node.daemon.ifaces:
        return "none given here; what the daemon has cannot be seen"
    if not peers:
        return "none: standalone, local rescue only"
    near = sum(is_near(peer, local) for peer in peers)
    return f"{near} on-link, {len(peers) - near} routed"


# -- checks: MTUs of tunnels and pods


class Underlay(NamedTuple):
    """What packets of tunnels and pods travel over."""

    nic: Link
    overhead: int  # that a tunnel adds

    @property
    def best(self) -> int:
        """The largest MTU that fits."""
        return self.nic.mtu - self.overhead

    def __str__(self) -> str:
        return f"{self.nic.name} {self.nic.mtu} - {self.overhead}"


def cni_command(name: str, under: Underlay) -> str:
    """The command that makes a CNI use the best MTU; empty for what is of no CNI we know.

    Known by the name of its interface or file.
    """
    base = os.path.basename(name)
    if re.search("cali|tunl0", base):
        patch = f'{{"spec":{{"calicoNetwork":{{"mtu":{under.best}}}}}}}'
        return f"kubectl patch installation default --type=merge -p '{patch}'"
    if re.search("flannel|cni0", base):
        return "kubectl -n kube-flannel rollout restart daemonset/kube-flannel-ds"
    if re.search("lxc|cilium", base):
        return f"cilium config set mtu {under.nic.mtu}"
    if ".conf" in base:
        return f"sed -i -E 's/(\"mtu\": *)[0-9]+/\\1{under.best}/' {shlex.quote(name)}"
    return ""


def cilium_subtracts(name: str, mtu: int, under: Underlay) -> bool:
    """Whether Cilium gave this interface more than fits, which it subtracts in its routes."""
    if not re.match("lxc|cilium_", name):
        return False
    return mtu > under.best and mtu <= under.nic.mtu


CNI_RISK = "new pods get it, and the CNI's agents may start anew on every node"


def judge_mtu(name: str, mtu: int, under: Underlay, step: Step, subject: str = "") -> Finding:
    """Whether the MTU of a pod or of a CNI's configuration suits what is under it."""
    found = f"{subject or name} {mtu}"
    spare = under.nic.mtu - mtu
    if mtu == under.best:
        return ok("mtu", f"{found} = {under}")
    if cilium_subtracts(name, mtu, under):
        return ok("mtu", f"{found} is right: Cilium subtracts the {under.overhead} in its routes")
    if mtu > under.best:
        told = f"only ICMP errors from this node tell pods that {under.best} is all"
        return warn("mtu", f"{found} > {under}: {told}", step=step)
    if under.overhead and spare == 2 * under.overhead:
        twice = f"{under} - {under.overhead}: the overhead is subtracted twice"
        return warn("mtu", f"{found} = {twice}", step=step)
    if spare in OVERHEADS:
        needless = f"{under.nic.name} {under.nic.mtu} - {spare}, where {under.overhead} would do"
        return ok("mtu", f"{found} = {needless}")
    unused = f"{under.best - mtu} bytes"
    if under.best >= 1.5 * mtu:
        unused = "jumbo frames"
    return ok("mtu", f"{found} < {under} = {under.best}: {unused} left unused")


def is_cni_tunnel(node: Node, link: Link) -> bool:
    """Whether a CNI made this tunnel, by its name; tunl0 also comes with the kernel's module."""
    if link.name == "tunl0" and not any(name.startswith("cali") for name in node.links):
        return False
    return bool(tunnel_named(link.name))


def check_tunnel(link: Link, nic: Link, is_cni: bool) -> Finding:
    """Whether a tunnel's MTU suits the NIC under it; a stranger's may be as small as it likes."""
    under = Underlay(nic, link.overhead)
    command = f"ip link set dev {shlex.quote(link.name)} mtu {under.best}"
    step = Step(command, "for a moment connections through the tunnel lose packets")
    if is_cni:
        step = Step(cni_command(link.name, under), CNI_RISK)
    fits = link.mtu <= under.best or cilium_subtracts(link.name, link.mtu, under)
    if fits and is_cni:
        return judge_mtu(link.name, link.mtu, under, step)
    if fits:
        return ok("mtu", f"{link.name} {link.mtu} fits {under}")
    vanish = f"packets over {under.best} are fragmented or vanish (black hole)"
    return fail("mtu", f"{link.name} {link.mtu} > {under}: {vanish}", step=step)


def check_mtu(node: Node) -> Iterator[Finding]:
    """The MTU of every tunnel, CNI configuration and pod against what they travel over."""
    nics = [node.links[name] for name in node.ifaces if name in node.links]
    nics.sort(key=lambda link: link.mtu)
    if not nics:
        found = "there is no default route; name the NIC with --iface"
        yield warn("mtu", found, check_by_widest(node))
        return
    low = nics[0]
    if low.mtu < nics[-1].mtu:
        yield unequal_nics(nics)
    tunnels = [link for link in node.links.values() if link.role == "tunnel"]
    for link in tunnels:
        yield check_tunnel(link, node.links.get(link.under, low), is_cni_tunnel(node, link))
    pods = list(check_cni(node, low, tunnels))
    yield from pods
    if not pods and not tunnels:
        yield ok("mtu", f"{low.name} {low.mtu}, without tunnels and pods")
    if not node.config.ifaces and not all(link.under for link in tunnels):
        yield from check_guess(node, nics)


def check_guess(node: Node, nics: Sequence[Link]) -> Iterator[Finding]:
    """Whether the nodes may rather talk over a wider NIC than those of the default route."""
    low = nics[0]
    widest = widest_nic(node)
    if widest and widest.mtu > nics[-1].mtu:
        found = (
            f"{widest.name} has {widest.mtu}, judged is by {low.name} {low.mtu} of the default "
            f"route; if the nodes talk over {widest.name}, name it with --iface"
        )
        yield warn("mtu", found, check_by_widest(node))


def widest_nic(node: Node) -> Optional[Link]:
    """The NIC with the largest MTU."""
    nics = [link for link in node.links.values() if link.role == "nic"]
    return max(nics, key=lambda link: link.mtu, default=None)


def check_by_widest(node: Node) -> str:
    """The command that judges by the widest NIC, empty where there is none."""
    widest = widest_nic(node)
    if not widest:
        return ""
    return check_command(node.config._replace(ifaces=(widest.name,)))


def unequal_nics(nics: Sequence[Link]) -> Finding:
    """The verdict on NICs with different MTUs, the widest last."""
    best = nics[-1].mtu
    found = ", ".join(f"{nic.name} {nic.mtu}" for nic in nics)
    resize = [
        f"ip link set dev {shlex.quote(nic.name)} mtu {best}" for nic in nics if nic.mtu < best
    ]
    step = Step("\n".join(resize), "where the switch does not take such frames, they vanish")
    return warn("mtu", f"the NICs differ: {found}", step=step)


def check_cni(node: Node, nic: Link, tunnels: Iterable[Link]) -> Iterator[Finding]:
    """The MTU in the CNI configuration, and of pods."""
    own = [link for link in tunnels if is_cni_tunnel(node, link)]
    under = pod_underlay(node, nic, own)
    is_given = bool(own)
    try:
        paths = cni_files(node.cni_dir)
    except OSError as problem:
        paths = []
        yield unreadable(node.cni_dir, problem)
    for path in paths:
        try:
            for mtu in cni_mtus(path):
                is_given = True
                yield judge_mtu(path, mtu, under, Step(cni_command(path, under), CNI_RISK))
        except OSError as problem:
            yield unreadable(path, problem)
    yield from check_pods(node, under, is_given)


def check_pods(node: Node, under: Underlay, is_given: bool) -> Iterator[Finding]:
    """The MTU of pods; where a tunnel or file gives it to them, its command stands there."""
    groups: dict[int, list[str]] = {}
    for link in node.links.values():
        if link.role == "pod":
            groups.setdefault(link.mtu, []).append(link.name)
    host = shlex.quote(node.config.nodename)
    step = NO_STEP
    if node.in_kubernetes:
        remake = f"kubectl drain {host} --ignore-daemonsets && kubectl uncordon {host}"
        step = Step(remake, "all pods leave this node, and others take their place")
    for mtu, names in groups.items():
        if node.in_kubernetes and not is_given:
            command = f"{cni_command(names[0], under)}\n{step.command}".strip()
            step = step._replace(command=command)
        subject = names[0]
        if len(names) > 1:
            subject = f"{len(names)} pods ({names[0]}, ...)"
        yield judge_mtu(names[0], mtu, under, step, subject)


def pod_underlay(node: Node, nic: Link, tunnels: Iterable[Link]) -> Underlay:
    """What pods travel over: the narrowest of the CNI's own tunnels, else the NIC."""
    found = [Underlay(node.links.get(link.under, nic), link.overhead) for link in tunnels]
    return min(found, key=lambda under: under.best, default=Underlay(nic, 0))


def unreadable(path: str, problem: OSError) -> Finding:
    """The warning about a file or folder that is left out."""
    return warn("mtu", f"{path}: {problem.strerror}", f"ls -ld {shlex.quote(path)}")


def cni_files(folder: str) -> list[str]:
    """The CNI configuration files in a folder, if there is one; raises OSError."""
    if not os.path.exists(folder):
        return []
    names = [name for name in os.listdir(folder) if name.endswith((".conf", ".conflist"))]
    return [os.path.join(folder, name) for name in sorted(names)]


def cni_mtus(path: str) -> list[int]:
    """Each MTU in a CNI configuration file but 0, which is automatic; raises OSError."""
    if not os.path.isfile(path):
        raise OSError(errno.EINVAL, "not a file")  # opening a FIFO would wait
    with open(path, errors="replace") as stream:
        found = re.findall(r'"mtu"\s*:\s*([1-9]\d{1,8})\b', stream.read())
    return [int(digits) for digits in found]


# -- checks: the path to a host

# linux/in.h, linux/in6.h, asm-generic/socket.h, linux/if_ether.h
PMTUDISC_PROBE = 3
PMTUDISC_INTERFACE = 4  # hear of an MTU, and learn nothing
IP_MTU = 14
IPV6_MTU = 24
IPV6_RECVERR = 25
SO_ATTACH_FILTER = 26
ETH_P_IP = 0x0800
ETH_P_IPV6 = 0x86DD

# linux/errqueue.h, struct sock_extended_err: errno, origin, type, code, info (the MTU), data;
# behind it struct sockaddr_in or sockaddr_in6 of who said so
EXTENDED_ERR = struct.Struct("=IBBBxII")

# linux/filter.h: struct sock_filter (code, jump if true, jump if false, operand), struct sock_fprog
SOCK_FILTER = struct.Struct("=HBBI")
SOCK_FPROG = struct.Struct("@HP")
BPF_LOAD_BYTE = 0x30
BPF_JUMP_EQUAL = 0x15
BPF_RETURN = 0x06

# linux/tcp.h: offsets in struct tcp_info, and a bit of its options
TCP_INFO_BYTES = 104
TCP_INFO_OPTIONS = 5
TCP_INFO_SND_MSS = 16
TCP_INFO_PMTU = 60
TCPI_OPT_TIMESTAMPS = 1
TCP_TIMESTAMPS_LEN = 12  # RFC 7323, with padding
TCP_HEADER_LEN = 20
UDP_HEADER_LEN = 8
UDP_HEADER = struct.Struct("!HHHH")  # source and destination port, length, checksum (RFC 768)
IPV4_DONT_FRAGMENT = 0x4000

PROBE_PORT = 33434  # traceroute's: nobody listens there, so hosts answer "port unreachable"
IP_TOTAL_LEN_MAX = 65535
PROBE_MIN_BYTES = 68  # of the first probe
PROBE_SECONDS = 4.0  # for one address
FROM_TRIES = 3  # routers limit their errors
FROM_SECONDS = 1.0  # for all of them


class ProbeOptions(NamedTuple):
    """How an IP version is probed: socket options, lengths, where packets name their protocol."""

    level: int
    mtu_discover: int
    receive_errors: int
    mtu: int
    headers: int  # bytes of IP and UDP
    protocol_offset: int
    ethertype: int
    sender: slice  # the packed address behind struct sock_extended_err


PROBES = {
    IPV4: ProbeOptions(
        level=socket.IPPROTO_IP,
        mtu_discover=IP_MTU_DISCOVER,
        receive_errors=IP_RECVERR,
        mtu=IP_MTU,
        headers=IPV4_HEADER_LEN + UDP_HEADER_LEN,
        protocol_offset=IPV4_PROTOCOL_AT,
        ethertype=ETH_P_IP,
        sender=slice(20, 24),
    ),
    IPV6: ProbeOptions(
        level=socket.IPPROTO_IPV6,
        mtu_discover=IPV6_MTU_DISCOVER,
        receive_errors=IPV6_RECVERR,
        mtu=IPV6_MTU,
        headers=IPV6_HEADER_LEN + UDP_HEADER_LEN,
        protocol_offset=6,
        ethertype=ETH_P_IPV6,
        sender=slice(24, 40),
    ),
}


class Answer(NamedTuple):
    """What became of a probe.

    `reply`, `report` of an `mtu` by `router`, `dropped` report, `error`, `silence`.
    """

    kind: str
    router: str = ""
    mtu: int = 0
    iface: str = ""  # where a dropped report came in
    size: int = 0  # of the probe
    is_delivered: bool = False  # a report that pmtud gave to this node's stack


class Passage(NamedTuple):
    """Where a router's error about a packet from a service address went."""

    iface: str = ""  # where it came in, empty: it did not
    router: str = ""  # who sent it
    copies_from: tuple[str, ...] = ()  # the nodes that sent a copy of it
    is_taken: bool = False  # this node's own stack has it


class Measurement(NamedTuple):
    """What the probes of one address found."""

    largest: int  # the largest size that was answered, 0: none
    is_settled: bool  # one byte more is surely lost
    reports: list[Answer]
    error: str = ""  # why not even the first probe went through


class Bracket:
    """The sizes between the largest that was answered, `low`, and the smallest lost, `high`.

    A silence costs a moment, an answer one of the few a host gives: so sizes are tried from the
    upper end.
    """

    def __init__(self, low: int, top: int) -> None:
        self.low = low
        self.high = top + 1
        self.is_silent = False  # the last loss was without a report

    @property
    def is_closed(self) -> bool:
        """Whether nothing is left to try."""
        return self.high - self.low <= 1

    def next(self) -> int:
        """The size to try: what a router reported, else a usual MTU, else the middle."""
        if not self.is_silent:
            return self.high - 1
        usual = [mtu for mtu in MTU_BUCKETS if self.low < mtu < self.high]
        if usual:
            return usual[-1]
        if self.low in MTU_BUCKETS:  # probably this is it
            return self.low + 1
        return (self.low + self.high) // 2

    def answered(self, size: int) -> None:
        """This size got through."""
        self.low = size

    def reported(self, size: int, mtu: int) -> None:
        """A router said that this size is too big for its next link."""
        if mtu < self.low or mtu >= size:  # it says nothing new
            self.lost(size)
            return
        self.high = mtu + 1
        self.is_silent = False

    def lost(self, size: int) -> None:
        """Nothing came back."""
        self.high = size
        self.is_silent = True


def udp_packet(family: Family, src: bytes, dst: bytes, port: int, size: int) -> bytes:
    """An IP packet of `size` bytes with DF that holds UDP of zeros, from this source port."""
    length = size - PROBES[family].headers + UDP_HEADER_LEN
    ports = UDP_HEADER.pack(port, PROBE_PORT, length, 0)
    total = int.from_bytes(src + dst, "big") + int.from_bytes(ports, "big")
    total += length + socket.IPPROTO_UDP
    udp = UDP_HEADER.pack(port, PROBE_PORT, length, 0xFFFF - total % 0xFFFF)
    udp += bytes(length - UDP_HEADER_LEN)
    if family is IPV6:
        return IPV6_HEAD.pack(6 << 28, length, socket.IPPROTO_UDP, HOP_LIMIT, src, dst) + udp
    first = 4 << 4 | IPV4_HEADER_LEN // 4
    fields = [first, 0, size, 0, IPV4_DONT_FRAGMENT, HOP_LIMIT, socket.IPPROTO_UDP, 0, src, dst]
    fields[7] = 0xFFFF - int.from_bytes(IPV4_HEAD.pack(*fields), "big") % 0xFFFF
    return IPV4_HEAD.pack(*fields) + udp


def open_tap(family: Family) -> socket.socket:
    """A socket that sees ICMP come in before rp_filter does; raises PermissionError."""
    options = PROBES[family]
    tap = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(options.ethertype))
    # Load the protocol's byte; if it is ICMP take the packet, else drop it.
    program = [
        SOCK_FILTER.pack(BPF_LOAD_BYTE, 0, 0, options.protocol_offset),
        SOCK_FILTER.pack(BPF_JUMP_EQUAL, 0, 1, family.icmp_protocol),
        SOCK_FILTER.pack(BPF_RETURN, 0, 0, 0xFFFF),
        SOCK_FILTER.pack(BPF_RETURN, 0, 0, 0),
    ]
    code = ctypes.create_string_buffer(b"".join(program))
    attached = SOCK_FPROG.pack(len(program), ctypes.addressof(code))
    tap.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, attached)
    return tap


def open_ear(family: Family) -> socket.socket:
    """A socket that hears the ICMP errors that this node's own stack takes."""
    ear = socket.socket(family.af, socket.SOCK_RAW, family.icmp_protocol)
    kind = family.error[0]
    if family is IPV4:
        ear.setsockopt(SOL_RAW, ICMP_FILTER, struct.pack("=I", ~(1 << kind) & 0xFFFFFFFF))
    else:
        others = [0xFFFFFFFF] * 8
        others[0] ^= 1 << kind
        ear.setsockopt(socket.IPPROTO_ICMPV6, ICMP6_FILTER, struct.pack("=8I", *others))
        ear.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    return ear


def open_mouth(family: Family) -> socket.socket:
    """A socket for whole IP packets, whatever the kernel knows of the path."""
    mouth = socket.socket(family.af, socket.SOCK_RAW, socket.IPPROTO_RAW)
    options = PROBES[family]
    mouth.setsockopt(options.level, options.mtu_discover, PMTUDISC_PROBE)
    if family is IPV4:
        mouth.setsockopt(socket.IPPROTO_IP, socket.IP_HDRINCL, 1)
    else:
        mouth.setsockopt(socket.IPPROTO_IPV6, IPV6_HDRINCL, 1)
    return mouth


class Sockets(NamedTuple):
    """What a probe needs privileges for."""

    tap: socket.socket
    ear: socket.socket
    mouth: socket.socket


def open_sockets(family: Family) -> Optional[Sockets]:
    """The sockets of probes, None where they are not allowed."""
    try:
        return Sockets(open_tap(family), open_ear(family), open_mouth(family))
    except PermissionError:
        return None


class Prober:
    """Sends packets with DF to an address, and hears what becomes of them.

    With privileges this node's kernel learns nothing from that: the packets leave by a raw socket,
    and the socket that has their port does not believe what comes back. Without, it learns.
    """

    def __init__(self, node: Node, address: tuple[Any, ...]) -> None:
        self.host, _ = socket.getnameinfo(address, socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)
        self.host_alone = self.host.partition("%")[0]  # without the zone
        self.packed = packed_address(self.host_alone)
        self.address = (self.host_alone, PROBE_PORT, *address[2:])
        self.family = family_of(self.packed)
        self.options = PROBES[self.family]
        zone = address[3] if self.family is IPV6 else 0
        self.hop = find_route(self.packed, zone)[1][0]
        self.iface = socket.if_indextoname(self.hop.ifindex)
        self.top = 1500
        if self.iface in node.links:
            self.top = min(node.links[self.iface].mtu, IP_TOTAL_LEN_MAX)
        self.own = {own.packed for own in local_addresses()}
        self.port = 0  # that the last probe came from
        self.replies = 0
        self.timeout = 1.0
        self.sockets = open_sockets(self.family)
        self.started = time.monotonic()

    def __enter__(self) -> Prober:
        return self

    def __exit__(self, *_: object) -> None:
        for opened in self.sockets or ():
            opened.close()

    def probe(self, size: int) -> Answer:
        """The answer to a packet of this size."""
        # Linux hosts answer six at once and then one a second (net.ipv4.icmp_ratelimit).
        time.sleep(max(0.0, self.replies - 5 - (time.monotonic() - self.started)))
        sent = time.monotonic()
        answer = self._explain(self._ask(size))._replace(size=size)
        if answer.kind == "reply":
            self.replies += 1
        if answer.kind != "silence":
            round_trip = time.monotonic() - sent
            self.timeout = min(self.timeout, max(0.08, 4 * round_trip))
        return answer

    def _ask(self, size: int) -> Answer:
        """Send one packet, and listen."""
        options = self.options
        with socket.socket(self.family.af, socket.SOCK_DGRAM) as udp:
            try:
                discover = PMTUDISC_INTERFACE if self.sockets else PMTUDISC_PROBE
                udp.setsockopt(options.level, options.mtu_discover, discover)
                udp.setsockopt(options.level, options.receive_errors, 1)
                udp.connect(self.address)
                if not self.sockets:
                    udp.send(bytes(size - options.headers))
                    return self._listen(udp)
                source, self.port, *_ = udp.getsockname()
                packed = packed_address(source)
                packet = udp_packet(self.family, packed, self.packed, self.port, size)
                self.sockets.mouth.sendto(packet, (self.host_alone, 0, *self.address[2:]))
                return self._listen(udp)
            except OSError as problem:
                return Answer("error", f"this node: {problem.strerror}")

    def _listen(self, udp: socket.socket) -> Answer:
        """What comes back to this socket, or about its packet."""
        waiting: list[Any] = [udp]
        if self.sockets:
            waiting.append(self.sockets.ear)
        until = time.monotonic() + self.timeout
        while True:
            left = max(0.0, until - time.monotonic())
            ready = select.select(waiting, [], [], left)[0]
            for error in self.taken():
                if self.is_about_probe(error):
                    router = address_text(error.src)
                    return Answer("report", router, error.believed_mtu)
            if udp in ready:
                return self._read(udp)
            if not ready:
                return Answer("silence")

    def _read(self, udp: socket.socket) -> Answer:
        """What the socket's error queue has; a datagram is a reply as well."""
        try:
            data = udp.recvmsg(1, 512, socket.MSG_ERRQUEUE)[1][0][2]
        except BlockingIOError:
            return Answer("reply")
        number, _, _, _, mtu, _ = EXTENDED_ERR.unpack_from(data)
        packed = data[self.options.sender]
        sender = address_text(packed)
        if number == errno.EMSGSIZE:
            return Answer("report", sender, mtu or self.family.unstated_mtu)
        if packed == self.packed:
            return Answer("reply")
        return Answer("error", f"{sender}: {os.strerror(number)}")

    def _explain(self, answer: Answer) -> Answer:
        """The answer in the light of what came in.

        A report that was dropped, or the router behind pmtud's delivery.
        """
        for report, iface in self.came_in():
            if not self.is_about_probe(report):
                continue
            router = address_text(report.src)
            if answer.kind in ("silence", "dropped"):
                # The last one counts: a bond or VLAN shows up after its port.
                answer = Answer("dropped", router, report.believed_mtu, iface)
            if answer.kind == "report" and report.src not in self.own and answer.router != router:
                answer = answer._replace(router=router, is_delivered=True)
        return answer

    def is_about_probe(self, error: MtuError) -> bool:
        """Whether it quotes the last probe.

        Other nodes may be probing the same host. Some routers quote another length than was sent,
        and where this node's packets are translated the quoted source is not what was sent either.
        """
        ports = (error.source_port, error.destination_port)
        return error.quoted_dst == self.packed and ports == (self.port, PROBE_PORT)

    def came_in(self) -> Iterator[tuple[MtuError, str]]:
        """The errors that have come in, before any rule, and where."""
        with contextlib.suppress(BlockingIOError):
            while self.sockets:
                packet, (iface, *_) = self.sockets.tap.recvfrom(4096, socket.MSG_DONTWAIT)
                error = parse(packet)
                if isinstance(error, MtuError):
                    yield error, iface

    def taken(self) -> Iterator[MtuError]:
        """The errors that this node's own stack has taken."""
        with contextlib.suppress(BlockingIOError):
            while self.sockets:
                ear = self.sockets.ear
                packet, control, _, sender = ear.recvmsg(4096, 64, socket.MSG_DONTWAIT)
                if self.family is IPV6:  # it gives the message alone
                    src = packed_address(sender[0])
                    packet = ipv6_head(src, control[0][2][:16], packet) + packet
                error = parse(packet)
                if isinstance(error, MtuError) and not discards(error):
                    yield error

    def ask_from(self, source: bytes, port: int, size: int) -> Passage:
        """Send a packet from an address that other nodes have as well, and see who gets the error.

        It leaves below all rules: connection tracking would take the error for one about a flow of
        this node, and forward it to an address that it does not have.
        """
        assert self.sockets
        self.port = port
        packet = udp_packet(self.family, source, self.packed, port, size)
        known = neighbours().get((self.hop.ifindex, self.hop.gateway or self.packed))
        lladdr = known.lladdr if known else b""
        place = (self.iface, self.options.ethertype, 0, 0, lladdr)
        passage = Passage()
        for _ in range(FROM_TRIES):
            self.sockets.tap.sendto(packet, place)
            until = time.monotonic() + FROM_SECONDS / FROM_TRIES
            while time.monotonic() < until:
                left = until - time.monotonic()
                select.select([self.sockets.tap, self.sockets.ear], [], [], max(0.0, left))
                passage = self._follow(passage, source)
                if passage.is_taken:
                    return passage
            if passage != Passage():
                return passage
        return passage

    def _follow(self, passage: Passage, source: bytes) -> Passage:
        """What is known after the errors that are waiting."""
        for error, iface in self.came_in():
            if error.src in self.own or not self.is_about_probe(error):
                continue
            sender = address_text(error.src)
            if error.dst == source:
                passage = passage._replace(iface=iface, router=sender)
            elif sender not in passage.copies_from:
                copies_from = (*passage.copies_from, sender)
                passage = passage._replace(copies_from=copies_from)
        for error in self.taken():
            # A copy itself is addressed to this node, not to the service
            if error.dst == source and self.is_about_probe(error):
                passage = passage._replace(is_taken=True)
        return passage

    def measure(self) -> Measurement:
        """The largest size that is answered, and the reports on the way."""
        first = self.probe(PROBE_MIN_BYTES)
        if first.kind == "silence":
            first = self.probe(PROBE_MIN_BYTES)
        if first.kind == "error":
            return Measurement(0, False, [], first.router)
        is_heard = first.kind == "reply"
        bracket = Bracket(PROBE_MIN_BYTES, self.top)
        reports = []
        while not bracket.is_closed and time.monotonic() - self.started < PROBE_SECONDS:
            size = bracket.next()
            answer = self.probe(size)
            if answer.kind == "reply":
                is_heard = True
                bracket.answered(size)
            elif answer.mtu:
                reports.append(answer)
                bracket.reported(size, answer.mtu)
            else:
                bracket.lost(size)
            if bracket.is_silent and not is_heard:  # it answers to no size
                return Measurement(0, False, reports)
        is_settled = bracket.is_closed
        if is_settled and bracket.is_silent:
            time.sleep(1.0)  # by then a host that limits its answers has one left: ask again
            is_settled = self.probe(bracket.high).kind != "reply"
        return Measurement(bracket.low, is_settled, reports)

    def handshake(self, port: int) -> str:
        """What a TCP handshake says about the path; raises OSError if there is none."""
        with socket.create_connection((self.host, port), 2.0) as tcp:
            info = tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
        (mss,) = struct.unpack_from("=I", info, TCP_INFO_SND_MSS)
        (used,) = struct.unpack_from("=I", info, TCP_INFO_PMTU)
        if info[TCP_INFO_OPTIONS] & TCPI_OPT_TIMESTAMPS:
            mss += TCP_TIMESTAMPS_LEN
        mtu = mss + self.options.headers - UDP_HEADER_LEN + TCP_HEADER_LEN
        return f"TCP port {port} answers: MSS {mss}, as for MTU {mtu}; the kernel uses {used}"

    def known_mtu(self) -> int:
        """The path MTU that this node's kernel uses."""
        with socket.socket(self.family.af, socket.SOCK_DGRAM) as udp:
            udp.connect(self.address)
            return udp.getsockopt(self.options.level, self.options.mtu)


def discards(error: MtuError) -> bool:
    """Whether a setting makes the kernel discard an error about UDP that it has taken."""
    return error.family is IPV4 and setting("ipv4/ip_no_pmtu_disc") in (2, 3)


A_FIREWALL_RULE = "a firewall rule"


def blame(node: Node, report: Answer) -> tuple[str, str]:
    """What on this node dropped a router's report.

    And the command that gets the next one through, or finds it.
    """
    packed = packed_address(report.router)
    version = family_of(packed).version
    culprit = path_filter(node, report.iface, version)
    if culprit and interface_towards(packed, report.iface) != report.iface:
        if report.iface not in node.ifaces:
            culprit += f"; pmtud delivers it with --iface {report.iface}"
        return culprit, "" if node.daemon else start_command(node)
    if version == 4 and setting("ipv4/ip_no_pmtu_disc") in (2, 3):
        return "ip_no_pmtu_disc", "sysctl -w net/ipv4/ip_no_pmtu_disc=0"
    return A_FIREWALL_RULE, "nft list ruleset | grep -E 'chain|icmp|drop|reject'"


def judge_path(node: Node, prober: Prober, measured: Measurement, port: int) -> Finding:
    """The verdict on one address."""
    handshake = ""
    is_refused = False
    if port:
        try:
            handshake = f"; {prober.handshake(port)}"
        except OSError as problem:
            handshake = f"; TCP port {port}: {problem.strerror or problem}"
            is_refused = True
    host = prober.host
    if measured.error:
        fix = f"ip route get {prober.host_alone}"
        return fail("path", f"{host}: unreachable, {measured.error}{handshake}", fix)
    if measured.largest or measured.reports:
        return judge_measurement(node, prober, measured, handshake)
    found = f"{host}: not measured, it answers nothing to UDP{handshake}"
    if is_refused:
        return fail("path", found)
    if port:
        return warn("path", found)
    if ":" in host:
        host = f"[{host}]"
    return warn("path", found, check_command(node.config, f"{host}:443"))


def judge_own(prober: Prober, port: int) -> Finding:
    """What there is to say of an address of this node."""
    found = f"{prober.host}: this node itself, no router is on the way"
    if port:
        try:
            found += f"; {prober.handshake(port)}"
        except OSError as problem:
            found += f"; TCP port {port}: {problem.strerror or problem}"
    return ok("path", f"{found}; name a client, or another node")


def judge_measurement(node: Node, prober: Prober, measured: Measurement, handshake: str) -> Finding:
    """The verdict on an address that answered, or to which a router reported an MTU."""
    host = prober.host
    largest = measured.largest
    told = [report.mtu for report in measured.reports]
    said = []
    for report in measured.reports:
        through = ", through pmtud," if report.is_delivered else ""
        said.append(f", {report.router}{through} reports {report.mtu}")
    hops = "".join(dict.fromkeys(said))
    found = f"{host}: path MTU {largest or min(told)}{hops}"
    if told and not prober.sockets:
        found += "; this node's kernel has now learned it, for 10 minutes"
    if not largest:
        found += "; the host answers nothing to UDP"
    dropped = [report for report in measured.reports if report.kind == "dropped"]
    if dropped:
        culprit, fix = blame(node, dropped[-1])
        arrived = f"the report arrived here and was dropped by {culprit}"
        return fail("path", f"{found}; {arrived}{handshake}", fix)
    if largest and not measured.is_settled:
        limits = "the host limits its answers, ask again in ten seconds"
        return warn("path", f"{host}: path MTU at least {largest}{hops}; {limits}{handshake}")
    if not largest or largest in (prober.top, *told):
        if not hops:
            found += f", all of {prober.iface}"
        return ok("path", found + handshake)
    return judge_black_hole(node, prober, largest, found, handshake)


def judge_passages(
    node: Node, prober: Prober, measured: Measurement, source: bytes
) -> Iterator[Finding]:
    """Whether the routers' errors about packets from a service address come to this node."""
    said = f"{address_text(source)} to {prober.host}"
    if not prober.sockets:
        command = f"sudo {check_command(node.config, prober.host)}"
        fix = f"{command} --from {address_text(source)}"
        yield warn("path_from", f"{said}: only root can send from an address of many nodes", fix)
        return
    reports = {report.router: report for report in measured.reports}
    if not reports and measured.largest == prober.top:
        yield ok("path_from", f"{said}: no router on the way is narrower than {prober.iface}")
        return
    for report in reports.values() or [Answer("silence", "a router", size=prober.top)]:
        passage = prober.ask_from(source, probe_port(node), report.size)
        if passage == Passage() and not reports:
            found = "no router's error came here within 1 s, and none is known to be sent"
            yield warn("path_from", f"{said}: {found}")
        else:
            router = passage.router or report.router
            yield judge_passage(node, passage, f"{said}: the error of {router}", source)


def probe_port(node: Node) -> int:
    """A source port for probes that the daemon takes errors about."""
    given = node.config.ports
    if node.daemon:
        with contextlib.suppress(ValueError):
            given = parse_ports(option_of(node.daemon.options, "ports")) or given
    return min(given, default=random.randrange(49152, 65536))


def judge_passage(node: Node, passage: Passage, said: str, source: bytes) -> Finding:
    """The verdict on the way of one router's error."""
    is_unheard = source in {own.packed for own in local_addresses()} and not passage.is_taken
    if passage.iface:
        culprit, fix = blame(node, Answer("dropped", passage.router, iface=passage.iface))
        is_filtered = culprit != A_FIREWALL_RULE and not delivers_from(node, passage.iface)
        if passage.is_taken or not (is_unheard or is_filtered):
            return ok("path_from", f"{said} came here")
        return fail("path_from", f"{said} came here and was dropped by {culprit}", fix)
    if passage.copies_from:
        said += f" came as a copy from {' and '.join(passage.copies_from)}"
        if not node.daemon or not node.daemon.delivers:
            lost = f"{said}, and no pmtud delivers it here: pods behind NAT do not learn"
            return warn("path_from", lost, start_command(node))
        if is_unheard:
            why = "pmtud dropped it (its metrics have the reason), or a firewall did"
            return warn("path_from", f"{said}, and it was not delivered: {why}")
        return ok("path_from", said)
    if passage.is_taken:
        return ok("path_from", f"{said} came here")
    lost = f"{said} did not come here within 1 s: the fabric gave it to another node"
    peers = f"the IPv{family_of(source).version} addresses of all"
    if node.daemon:
        advice = f"let pmtud run on every node, with {peers} as --peers; run this on each"
        return fail("path_from", f"{lost}; {advice}")
    advice = f"run this on each node, and pmtud with {peers} as --peers"
    return fail("path_from", f"{lost}; {advice}", start_command(node))


def judge_black_hole(
    node: Node, prober: Prober, largest: int, found: str, handshake: str
) -> Finding:
    """The verdict on a path that loses larger packets without a report that we can see."""
    if prober.sockets:
        found += f"; black hole: packets over {largest} vanish and nobody says so{handshake}"
    else:
        unseen = "and only root sees whether a router's report is dropped here"
        found += f"; packets over {largest} vanish, {unseen}{handshake}"
    known = prober.known_mtu()
    if known <= largest:
        return ok("path", f"{found}; this node knows, it uses {known}")
    if not prober.sockets:
        return fail("path", found, f"sudo {check_command(node.config, prober.host)}")
    fix = ""
    if not setting("ipv4/tcp_mtu_probing"):
        fix = "sysctl -w net/ipv4/tcp_mtu_probing=1"
    step = Step(
        route_command(prober, largest),
        "this route keeps its gateway when others change; better ask who runs the router",
    )
    return fail("path", found, fix, step)


def route_command(prober: Prober, mtu: int) -> str:
    """The command that makes this node keep to an MTU on the way to an address."""
    gateway = prober.hop.gateway
    command = f"ip route replace {prober.host_alone}"
    if len(gateway) > len(prober.packed):
        command += f" via inet6 {address_text(gateway)}"
    elif gateway:
        command += f" via {address_text(gateway)}"
    command += f" dev {shlex.quote(prober.iface)}"
    flags, hops = find_route(prober.packed, prober.hop.ifindex, RTM_F_FIB_MATCH)
    is_onlink = flags & RTNH_F_ONLINK or any(hop.onlink for hop in hops)
    if gateway and (is_onlink or len(hops) > 1):
        command += " onlink"
    return f"{command} mtu {mtu}"


def split_port(text: str) -> tuple[str, int]:
    """The two of HOST:PORT, HOST or [IPv6]:PORT; port 0 where none is given."""
    found = re.fullmatch(r"\[(.+)\](?::(\d{1,5}))?", text, re.DOTALL)
    if not found:
        found = re.fullmatch(r"([^:]+)(?::(\d{1,5}))?", text, re.DOTALL)
    if not found:
        return text, 0
    return found[1], int(found[2] or 0)


def check_hosts(node: Node, hosts: Sequence[str], source: bytes) -> Iterator[Finding]:
    """The path MTU to each HOST or HOST:PORT, over IPv4 and IPv6 where it has both.

    With a source address, what becomes of routers' errors about packets from there as well.
    """
    for text in hosts:
        name, port = split_port(text)
        if port > 65535:
            yield fail("path", f"{text}: {port} is not a port")
            continue
        fix = f"getent ahosts {shlex.quote(name)}"
        try:
            found = socket.getaddrinfo(name, None, type=socket.SOCK_DGRAM)
            fix = f"ip route get {shlex.quote(name)}"
            first = {family: address for family, _, _, _, address in reversed(found)}
            for address in first.values():
                yield from check_host(node, address, port, source)
            if source and family_of(source).af not in first:
                other = f"{text} has no {family_of(source).name} address, as --from has"
                yield fail("path_from", other)
        except UnicodeError:
            yield fail("path", f"{text}: not a host name")
        except OSError as problem:
            yield fail("path", f"{text}: {problem.strerror or problem}", fix)
        except PmtudError as problem:
            yield fail("path", f"{text}: {problem}", fix)


def check_host(node: Node, address: tuple[Any, ...], port: int, source: bytes) -> Iterator[Finding]:
    """The path to one address."""
    with Prober(node, address) as prober:
        if prober.hop.ifindex == socket.if_nametoindex("lo"):
            yield judge_own(prober, port)
            return
        measured = prober.measure()
        yield judge_path(node, prober, measured, port)
        if source and prober.family is family_of(source):
            yield from judge_passages(node, prober, measured, source)


# -- the report

REPORT_COLUMNS = 79
STATUS_COLORS = {OK: "\033[32m", WARN: "\033[33m", FAIL: "\033[1;31m"}
STATUS_COLUMNS = 5
CHECKS = (
    check_kernel,
    check_http,
    check_interfaces,
    check_programs,
    check_settings,
    check_peers,
    check_mtu,
)


def show(text: str) -> None:
    """Print lines; raises PmtudError where that fails: a closed pipe, a full disk."""
    try:
        print(text, flush=True)
    except OSError as problem:
        # Or the interpreter complains once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise PmtudError(f"cannot write the output: {problem.strerror}") from problem


def printable(text: str) -> str:
    """The text in ASCII: names of interfaces, files and hosts may hold what a terminal obeys."""
    return re.sub(r"[^\n -~]", lambda found: found[0].encode("unicode_escape").decode(), text)


def finding_text(finding: Finding, color: bool) -> str:
    """The lines of one finding: the verdict first, under it the commands that repair it."""
    import textwrap

    status = finding.status.ljust(STATUS_COLUMNS)
    words = printable(f"{status}{finding.check}: {finding.found}")
    lines = textwrap.wrap(words, REPORT_COLUMNS, subsequent_indent=" " * 7, break_on_hyphens=False)
    label = "fix, on the node:" if in_container() else "fix:"
    for command in printable(finding.fix).splitlines():
        lines += wrap_command(label, command)
    if finding.next_step:
        risk = f"{' ' * 7}next step ({finding.risk}):"
        lines += textwrap.wrap(risk, REPORT_COLUMNS, subsequent_indent=" " * 7)
        for command in printable(finding.next_step).splitlines():
            lines += wrap_command("", command)
    text = "\n".join(lines)
    if not color:
        return text
    return f"{STATUS_COLORS[finding.status]}{status}\033[0m{text[STATUS_COLUMNS:]}"


def wrap_command(label: str, command: str) -> Iterator[str]:
    """The lines of a command, broken with backslashes: sh joins them again."""
    line = f"{' ' * 7}{label}"
    for word in re.findall(r"(?:'[^']*'|\S)+", command):
        if len(f"{line} {word} \\") > REPORT_COLUMNS:
            yield f"{line} \\"
            line = " " * 11
        line += f" {word}"
        while len(line) > REPORT_COLUMNS - 2:  # a word that is too long for a line
            start = line[: REPORT_COLUMNS - 4]
            quote = "'" * (start.count("'") % 2)  # ends before the break, and begins anew
            yield f"{start}{quote}\\"
            line = quote + line[REPORT_COLUMNS - 4 :]
    yield line


def examine_node(
    config: Config, hosts: Sequence[str], cni_dir: str, source: bytes
) -> Iterator[Finding]:
    """Every finding, as soon as it is known."""
    ruleset = read_ruleset()
    daemon = find_daemon(config.nflog_group, ruleset)
    if daemon and not daemon.feeds_itself:
        config = config._replace(rules="off")
    links = {link.name: link for link in list_links()}
    node = Node(
        config=config,
        ifaces=config.ifaces or default_route_interfaces(),
        links=links,
        ruleset=ruleset,
        daemon=daemon,
        cni_dir=cni_dir,
        in_kubernetes=is_kubernetes(links, cni_dir),
    )
    for check in CHECKS:
        yield from check(node)
    yield from check_hosts(node, hosts, source)


def examine(
    config: Config,
    hosts: Sequence[str],
    as_json: bool,
    color: bool,
    cni_dir: str = "/etc/cni/net.d",
    source: bytes = b"",
) -> int:
    """Print the verdicts on this node and the paths to `hosts`, from `source` too.

    The exit code: 0 all OK, 1 warnings, 2 failures.
    """
    findings = []
    for finding in examine_node(config, hosts, cni_dir, source):
        findings.append(finding)
        if not as_json:
            show(finding_text(finding, color and sys.stdout.isatty()))
    statuses = [finding.status for finding in findings]
    summary = {status: statuses.count(status) for status in (OK, WARN, FAIL)}
    if as_json:
        checks = [finding._asdict() for finding in findings]
        report = {"schema": 1, "node": config.nodename, "summary": summary, "checks": checks}
        show(json.dumps(report, indent=2))
    else:
        counts = ", ".join(f"{count} {status}" for status, count in summary.items())
        show(printable(f"{config.nodename}: {counts}"))
    if summary[FAIL]:
        return 2
    if summary[WARN]:
        return 1
    return 0


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


USAGE = """\
pmtud.py [OPTION]...
       pmtud.py check [--from ADDRESS] [HOST[:PORT]]... [OPTION]...
       pmtud.py rules [OPTION]..."""
EPILOG = """\
examples:
  sudo python3 pmtud.py                 only rescue what strict rp_filter drops
  sudo python3 pmtud.py --peers 10.0.0.11,10.0.0.12
                                        copies to these, its own left out
  sudo python3 pmtud.py --peers 10.0.0.255
                                        one copy reaches the whole subnet
  sudo python3 pmtud.py --peers file:/etc/pmtud/peers
                                        one a line, read again when it changes
  sudo python3 pmtud.py --peers dns:nodes.example
                                        all its addresses, asked every 10 s
  sudo python3 pmtud.py --dry-run --log-level debug
                                        look, send nothing
  sudo python3 pmtud.py check           what is wrong here, what repairs it
  sudo python3 pmtud.py check 10.9.0.2 [fd09::2]:443
                                        measure paths, too
  sudo python3 pmtud.py check --from VIP CLIENT
                                        who hears of a service's MTU errors
  python3 pmtud.py rules --iface eth0   the rules it installs, for pasting

Every option can come from the environment: --flow-interval from
PMTUD_FLOW_INTERVAL, and so on. The command line wins. Exit codes: 0 clean
stop, 1 runtime failure, 2 usage or configuration; of check: 0 all OK,
1 warnings, 2 failures, 64 usage.
"""


def add_option(group: argparse._ArgumentGroup, option: Option) -> None:
    """One row of OPTIONS; no default here, Config has it."""
    if not option.parse and not option.choices:
        group.add_argument(option.flag, action="store_true", help=option.help)
        return
    described = [option.help] if option.help else []
    if option.repeatable:
        described.append("repeatable")
    default = option.default or default_text(Config._field_defaults[option.field])
    group.add_argument(
        option.flag,
        action="append" if option.repeatable else "store",
        choices=option.choices,
        metavar=option.metavar,
        type=option_type(option.parse or str),
        help=f"{'; '.join(described)} (default: {default})".strip(),
    )


COMMANDS = ("run", "check", "rules")


def build_parser() -> Parser:
    """The whole command line.

    Every default is SUPPRESS, so that what was given can be told from what was not.
    """
    parser = Parser(
        prog="pmtud.py",
        usage=USAGE,
        description="Make Path MTU Discovery work behind ECMP and strict reverse path filtering.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument(
        "command",
        nargs="?",
        metavar=f"{{{','.join(COMMANDS)}}}",
        default="run",
        help="run: the daemon (default); check: what is wrong on this node, and how to repair it; "
        "rules: print the rules the daemon would install",
    )
    parser.add_argument(
        "hosts",
        nargs="*",
        default=(),
        metavar="HOST[:PORT]",
        help="check: measure the path MTU to these, too",
    )
    parser.add_argument("--version", action="version", version=f"pmtud {__version__}")
    check = parser.add_argument_group("check")
    check.add_argument(
        "--from",
        metavar="ADDRESS",
        type=option_type(parse_address),
        help="a service address; say whether routers' errors about its packets come here",
    )
    check.add_argument("--json", action="store_true", help="JSON instead of text")
    check.add_argument("--no-color", action="store_true", help="no colours, even on a terminal")
    for title, options in OPTION_GROUPS.items():
        group = parser.add_argument_group(title)
        for option in options:
            add_option(group, option)
    return parser


# What Kubernetes tells containers of Services called pmtud or pmtud-something (makeEnvVariables and
# makeLinkVariables in its pkg/kubelet/envvars)
SERVICE_VARIABLE = re.compile(
    r"PMTUD(_\w+)?_SERVICE_(HOST|PORT(_\w+)?)=|"
    r"PMTUD(_\w+)?_PORT_\d+_[A-Z]+(_PROTO|_PORT|_ADDR)?=|"
    r"PMTUD(_\w+)?_PORT=[a-z]+://"
)


def unknown_variables(parser: Parser, environ: Mapping[str, str]) -> Iterator[str]:
    """A warning about each variable that looks like an option's and is none."""
    options = [action for action in parser._actions if action.option_strings]
    known = {f"PMTUD_{action.dest.upper()}" for action in options} - {"PMTUD_HELP", "PMTUD_VERSION"}
    for name in sorted(environ):
        if not name.upper().startswith("PMTUD_") or name in known:
            continue
        if not SERVICE_VARIABLE.match(f"{name}={environ[name]}"):
            yield f"{name} is no option; {nearest(name.upper(), known)}"


def environment_options(parser: Parser, environ: Mapping[str, str]) -> dict[str, Any]:
    """The options set by PMTUD_* variables; an error names the variable."""
    found: dict[str, Any] = {}
    for action in parser._actions:
        if not action.option_strings or action.dest in ("help", "version"):
            continue
        variable = "PMTUD_" + action.dest.upper()
        text = environ.get(variable, "").strip()
        if not text or SERVICE_VARIABLE.match(f"{variable}={text}"):
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
    values: dict[str, Any] = {"nodename": socket.gethostname()}
    for option in OPTIONS:
        if option.dest not in options:
            continue
        value = options[option.dest]
        if option.repeatable:
            items = dict.fromkeys(item for group in value for item in group)
            value = type(Config._field_defaults[option.field])(items)
        values[option.field] = value
    peers = values.pop("peers", ())
    values["peers"] = tuple(peer for peer in peers if isinstance(peer, PeerAddress))
    values["peer_sources"] = tuple(peer for peer in peers if isinstance(peer, str))
    values["rescue"] = not values.pop("no_rescue", False)
    values["metrics_required"] = bool(options.get("metrics_port", "metrics_addr" in options))
    if len(values["peers"]) > PEERS_MAX:
        raise UsageError(
            f"--peers: more than {PEERS_MAX}; one broadcast address reaches a whole subnet"
        )
    return Config(**values)


class Invocation(NamedTuple):
    """What the user asked for."""

    command: str  # one of COMMANDS
    config: Config
    hosts: tuple[str, ...] = ()
    as_json: bool = False
    color: bool = True
    warnings: tuple[str, ...] = ()
    source: bytes = b""  # of probes, packed; empty: this node's own


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a message about a word that is not known: the one that may have been meant."""
    import difflib

    for alike in difflib.get_close_matches(word, list(known), n=1):
        return f"did you mean {alike}?"
    return "see pmtud.py --help"


def refuse_unknown_options(parser: Parser, argv: Sequence[str]) -> None:
    """Name the first option that does not exist: argparse would take its value for the command."""
    options = parser._option_string_actions
    for word in argv:
        if word == "--":
            return
        option = word.partition("=")[0]
        if re.match("--|-[a-zA-Z]", word) and " " not in word and option not in options:
            raise UsageError(f"unknown option {option}; {nearest(option, options)}")


def refuse_split_lists(parser: Parser, argv: Sequence[str], stray: Optional[str] = None) -> None:
    """Say so where a list was split, like --peers A, B: at a comma, or before a stray word."""
    for before, value, word in zip(["", *argv], argv, argv[1:]):
        if word.startswith("-") or word in COMMANDS:
            continue
        if word != stray and not value.endswith(",") and not word.startswith(","):
            continue
        option = value.partition("=")[0] if value.startswith("-") else before
        if isinstance(parser._option_string_actions.get(option), argparse._AppendAction):
            values = option.rpartition("-")[2].rstrip("s") + "s"
            raise UsageError(f"{word}: separate {values} with commas")


def parse_args(argv: Sequence[str], environ: Mapping[str, str]) -> Invocation:
    """The command line and the environment together; raises UsageError."""
    parser = build_parser()
    refuse_unknown_options(parser, argv)
    refuse_split_lists(parser, argv)
    given = vars(parser.parse_intermixed_args(list(argv)))  # HOST may follow options
    options = {**environment_options(parser, environ), **given}
    command, hosts = given.pop("command"), tuple(given.pop("hosts"))
    names = ("command", "hosts", "json", "no_color", "from")
    words = {name: options.pop(name, None) for name in names}
    if command not in COMMANDS:
        refuse_split_lists(parser, argv, command)
        raise UsageError(f"unknown command {command}; {nearest(command, COMMANDS)}")
    if command != "check" and hosts:
        refuse_split_lists(parser, argv, hosts[0])
        raise UsageError(f"{hosts[0]}: only for `pmtud.py check`")
    if command != "check" and given.keys() & {"json", "no_color", "from"}:
        raise UsageError("--from, --json and --no-color: only for `pmtud.py check`")
    if "from" in given and not hosts:
        raise UsageError("--from needs the address of a client: check --from ADDRESS HOST")
    color = not words["no_color"] and "NO_COLOR" not in environ
    config = config_from(options)
    if command == "run" and not (config.rescue or config.peers or config.peer_sources):
        raise UsageError("--no-rescue without --peers leaves nothing to do; give --peers")
    warnings = tuple(unknown_variables(parser, environ))
    source = b""
    if words["from"]:
        source = packed_address(words["from"])
    return Invocation(command, config, hosts, bool(words["json"]), color, warnings, source)


def print_rules(config: Config) -> None:
    """The rules the daemon would install, as nft and as iptables commands, on standard output."""
    ifaces = config.ifaces or default_route_interfaces()
    if not ifaces:
        raise NoDefaultRoute
    listed = {source.name: source.load() or () for source in map(open_source, config.peer_sources)}
    senders = arrange(
        {"static": config.peers, **listed}, local_addresses(), config.ignore_networks
    ).senders
    site = Site(ifaces, uplinks(ifaces), vrfs_of(ifaces), senders, copy_mark=copy_mark(config))
    lines = [
        "# nftables: `pmtud.py rules | sed -n '1,/^}/p' | nft -f -`, "
        "then start pmtud.py with --rules off",
        *nft_text(whole_table(config, site)),
        "",
        "# or iptables (nft or legacy); "
        "`-m conntrack` starts connection tracking where nothing else has",
        *iptables_text(config, site),
    ]
    show("\n".join(lines))


def check_metrics_library(config: Config) -> None:
    """Exit 2 if metrics were asked for and prometheus-client is not there."""
    import importlib.util

    if (
        config.metrics_port
        and config.metrics_required
        and not importlib.util.find_spec("prometheus_client")
    ):
        raise UsageError(
            "--metrics-port and --metrics-addr need prometheus-client: "
            "pip install prometheus-client, or "
            "--metrics-port 0"
        )


def run(config: Config) -> None:
    """The daemon: open, turn until a signal, close."""
    name_process()
    check_metrics_library(config)
    daemon = Daemon(config)
    daemon.handle_signals()
    try:
        daemon.open()
        daemon.run()
        log(
            "info",
            "stopped",
            **{name: count for name, count in daemon.counters.summary().items() if count},
        )
    finally:
        signal.set_wakeup_fd(-1)
        daemon.close()


EX_USAGE = 64  # sysexits.h; of `check`, where 2 says that something is broken


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the program; the exit code. Unexpected exceptions keep their traceback."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        asked = parse_args(argv, os.environ)
        set_up_logging(asked.config.log_level, asked.config.log_format)
        for warning in asked.warnings:
            log("warning", warning)
        if asked.command == "check":
            return examine(
                asked.config, asked.hosts, asked.as_json, asked.color, source=asked.source
            )
        (run if asked.command == "run" else print_rules)(asked.config)
    except PmtudError as problem:
        print(f"pmtud: {problem}", file=sys.stderr)
        if isinstance(problem, UsageError) and "check" in argv:
            return EX_USAGE
        return problem.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
