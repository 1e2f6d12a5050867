#!/usr/bin/env python3
"""A real Kubernetes cluster in network namespaces, and what pmtud must do on it.

    sudo .ci/cluster.py up                   bring it up (--nodes 3, --proxy iptables|nftables, --bin DIR)
    sudo .ci/cluster.py build                make only what it needs, which takes minutes the first time
    sudo .ci/cluster.py test                 every scenario (-k WORD: only those with it in their name; --short)
    sudo .ci/cluster.py test --tree DIR      the same for another checkout's pmtud.py and daemonset.yaml
    sudo .ci/cluster.py kubectl get pods -A  ask it something
    sudo .ci/cluster.py sh node1 ip route    run something where a node (control, client, router, fabric) is
    sudo .ci/cluster.py down                 nothing is left of it

    client -- router --(1400 towards the client)-- fabric --+-- node1   each node: kubelet, containerd, kube-proxy
                      errors from a management address      +-- node2   strict reverse path filters
                                                            +-- node3
                                                            +-- control: etcd, API server, scheduler, CoreDNS, ...

Hosts, links and the ECMP fabric are those of test_pmtud.py. All of it lives in one "cell": a mount, a process and a
cgroup namespace of its own. Its file systems are in memory, its named network namespaces are mounts in the cell, and
every process in it ends with its first one. So `down`, Ctrl-C and kill -9 all leave the same: nothing.

The binaries are built once (k8s.io/kubernetes by the Go toolchain that is here) and kept in ~/.cache/pmtud, or come
from --bin DIR: kube-apiserver, kube-controller-manager, kube-scheduler, kubelet, kube-proxy, kubectl, coredns.
Debian packages: etcd-server containerd runc containernetworking-plugins debootstrap. Needs root, 2 cores, 6 GB.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
VENV = Path(os.environ.get("PMTUD_VENV", ROOT / ".venv"))
os.environ["PMTUD_VENV"] = str(VENV)

if __name__ == "__main__" and sys.argv[1:2] in (["-h"], ["--help"]):
    print(__doc__)
    sys.exit()

if __name__ == "__main__" and Path(sys.prefix) != VENV:
    # test_pmtud.py makes its environment before anything else
    made = [sys.executable, str(ROOT / "test_pmtud.py"), "--version"]
    if subprocess.run(made, stdout=subprocess.DEVNULL, check=False).returncode:
        sys.exit("cluster.py: test_pmtud.py cannot make its virtual environment")
    os.execv(VENV / "bin" / "python", [str(VENV / "bin" / "python"), *sys.argv])

import argparse
import contextlib
import hashlib
import io
import json
import math
import re
import shlex
import shutil
import signal
import tarfile
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Callable, NamedTuple, Optional

sys.path.insert(0, str(ROOT))
from test_pmtud import (
    CLIENT,
    DOWNLOAD_BYTES,
    SERVER,
    V4,
    Cluster,
    CommandFailed,
    Host,
    Process,
    calico_bpf,
    egress_filters,
    execute,
    inject,
    mtu_error,
    poll,
    tcp_start,
)

KUBERNETES = "1.34.4"
COREDNS = "1.14.7"
DNS_PLUGINS = ("bind", "cache", "errors", "kubernetes", "ready")
PROGRAMS = (
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
    "kube-proxy",
    "kubectl",
)
PACKAGES = {
    "etcd": "etcd-server",
    "containerd": "containerd",
    "runc": "runc",
    "debootstrap": "debootstrap",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
    "nft": "nftables",
    "iptables": "iptables",
    "nsenter": "util-linux",
    "openssl": "openssl",
}
CACHE = Path(os.environ.get("PMTUD_CACHE", Path.home() / ".cache" / "pmtud"))

STATE = Path("/run/pmtud-cluster.json")  # what `up` tells the later commands
WORK = Path("/run/pmtud-cluster")  # a file system in memory, seen in the cell only
# Fixed names in other people's programs: each is a folder of WORK in the cell.
SCRATCH = (
    "/run/netns",
    "/run/containerd",
    "/var/lib/cni",
    "/var/lib/kubelet",
    "/var/log/containers",
)
# What a kubelet would set on the whole machine; in the cell it finds the value there and writes nothing.
TUNABLES = {
    "vm/overcommit_memory": 1,
    "vm/panic_on_oom": 0,
    "kernel/panic": 10,
    "kernel/panic_on_oops": 1,
    "kernel/keys/root_maxkeys": 1000000,
    "kernel/keys/root_maxbytes": 25000000,
}
CONTROL = "10.0.0.2"
CONTROL6 = "fd00::2"
SERVICE_RANGE = "10.32.0.0/24,fd32::/112"
API_SERVICE = "10.32.0.1"
DNS_SERVICE = "10.32.0.10"
PODS = "10.244.0.0/16,fd44::/16"
FLOWS = 23  # as many addresses has the client
POD_IMAGE = "docker.io/library/pod:local"
PAUSE_IMAGE = "docker.io/library/pause:local"


class Trouble(Exception):
    """What the user reads, in one line."""


# -----------------------------------------------------------------------------
# Section: table -- what is printed, line by line, as it comes


def row(name: str, result: str, verdict: str, seconds: float) -> None:
    """One line of the table."""
    print(f"{name:<60} {result:<36} {verdict:<5} {seconds:6.1f} s", flush=True)


@contextlib.contextmanager
def step(name: str) -> Iterator[list[str]]:
    """A line of the table for what the block does; it may append what it found."""
    start = time.monotonic()
    found: list[str] = []
    try:
        yield found
    except BaseException:
        row(name, "", "FAIL", time.monotonic() - start)
        raise
    row(name, " ".join(found), "ok", time.monotonic() - start)


# -----------------------------------------------------------------------------
# Section: materials -- binaries, the pods' image and a wheel, made once and kept in the cache


def check_packages() -> None:
    missing = [package for program, package in PACKAGES.items() if not shutil.which(program)]
    if missing:
        raise Trouble(f"missing: apt-get install -y --no-install-recommends {' '.join(missing)}")


def run_long(*argv: str, cwd: Optional[Path] = None, **environ: str) -> str:
    """What a program that may take long printed; its last lines if it fails."""
    done = subprocess.run(
        argv,
        cwd=cwd,
        env={**os.environ, **environ},
        stdout=subprocess.PIPE,
        check=False,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode:
        raise Trouble(f"{shlex.join(argv)[:200]} failed:\n{done.stdout[-3000:]}")
    return done.stdout


def binaries(given: Optional[Path]) -> Path:
    """The folder with the programs; builds what is missing unless the folder was given."""
    folder = given or CACHE / f"kubernetes-{KUBERNETES}"
    missing = [name for name in (*PROGRAMS, "coredns") if not (folder / name).exists()]
    if missing and given:
        raise Trouble(f"{given} has no {', '.join(missing)}")
    if missing and not shutil.which("go"):
        raise Trouble("neither --bin DIR nor a Go toolchain to build Kubernetes with")
    if set(missing) & set(PROGRAMS):
        build_kubernetes(folder)
    if "coredns" in missing:
        build_coredns(folder)
    return folder


def build_coredns(folder: Path) -> None:
    """With the plugins that it is asked for; all of them, clouds' clients included, are twice as
    many packages.
    """
    plugins = "".join(f'\t_ "github.com/coredns/coredns/plugin/{name}"\n' for name in DNS_PLUGINS)
    program = CACHE / "build" / "coredns" / "main.go"
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(
        f'package main\n\nimport (\n\t"github.com/coredns/coredns/coremain"\n{plugins})\n\n'
        "func main() { coremain.Run() }\n"
    )
    module = f"module coredns\n\ngo 1.25.0\n\nrequire github.com/coredns/coredns v{COREDNS}\n"
    go_build("coredns", folder, module, ["."], "-s -w")


def build_kubernetes(folder: Path) -> None:
    """The staging modules are published with version 0.x of Kubernetes 1.x; its go.mod names them
    as folders.
    """
    source = f"k8s.io/kubernetes@v{KUBERNETES}"
    found = json.loads(run_long("go", "mod", "download", "-json", source, GOFLAGS="-mod=mod"))
    names = re.findall(r"^\t(\S+) => \./staging/", Path(found["GoMod"]).read_text(), re.MULTILINE)
    staging = "".join(f"replace {name} => {name} v0{KUBERNETES[1:]}\n" for name in names)
    head = "module cluster\n\ngo 1.24.0\n\ngodebug default=go1.24\n\n"
    module = f"{head}require {source.replace('@', ' ')}\n\n{staging}"
    version = "k8s.io/component-base/version"
    major, minor, _ = KUBERNETES.split(".")
    flags = (
        f"-s -w -X {version}.gitVersion=v{KUBERNETES} -X {version}.gitMajor={major} "
        f"-X {version}.gitMinor={minor}"
    )
    go_build(
        "kubernetes", folder, module, [f"k8s.io/kubernetes/cmd/{name}" for name in PROGRAMS], flags
    )


def go_build(name: str, folder: Path, module: str, packages: list[str], link_flags: str) -> None:
    """Build packages of other modules into folder, under a go.mod of our own."""
    work = CACHE / "build" / name
    work.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    (work / "go.mod").write_text(module)
    run_long(
        "nice",
        "-n",
        "19",
        "go",
        "build",
        "-mod=mod",
        "-trimpath",
        "-ldflags",
        link_flags,
        "-o",
        f"{folder}/",
        *packages,
        cwd=work,
        CGO_ENABLED="0",
    )


def pod_image() -> Path:
    """A docker archive: Debian with Python, once as the image of pods, once as the `pause` of their
    sandboxes.
    """
    archive = CACHE / "pod-image.tar"
    if archive.exists():
        return archive
    CACHE.mkdir(parents=True, exist_ok=True)
    tree = CACHE / "pod-image"
    shutil.rmtree(tree, ignore_errors=True)
    run_long(
        "nice",
        "-n",
        "19",
        "debootstrap",
        "--variant=minbase",
        "--include=python3",
        "bookworm",
        str(tree),
    )
    for name in (
        "usr/share/doc",
        "usr/share/locale",
        "usr/share/man",
        "var/cache/apt",
        "var/lib/apt/lists",
    ):
        shutil.rmtree(tree / name, ignore_errors=True)
    (tree / "usr/bin/python").symlink_to("python3")
    layer = CACHE / "layer.tar"
    with tarfile.open(layer, "w") as tar:
        tar.add(tree, ".")
    write_archive(archive, layer)
    layer.unlink()
    shutil.rmtree(tree)
    return archive


def write_archive(archive: Path, layer: Path) -> None:
    """`docker save` format: manifest.json, one config per image, the layer they share."""
    digest = hashlib.sha256(layer.read_bytes()).hexdigest()
    manifest = []
    unfinished = archive.with_suffix(".unfinished")
    with tarfile.open(unfinished, "w") as tar:
        tar.add(layer, "layer.tar")
        for image in (POD_IMAGE, PAUSE_IMAGE):
            config = {
                "architecture": os.uname()
                .machine.replace("x86_64", "amd64")
                .replace("aarch64", "arm64"),
                "os": "linux",
                "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
                "config": {
                    "Entrypoint": ["sleep", "infinity"],
                    "Labels": {"image": image},
                    "Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"],
                },
            }
            name = f"{image.split('/')[-1].split(':')[0]}.json"
            add_text(tar, name, json.dumps(config))
            manifest.append({"Config": name, "RepoTags": [image], "Layers": ["layer.tar"]})
        add_text(tar, "manifest.json", json.dumps(manifest))
    unfinished.rename(archive)


def add_text(tar: tarfile.TarFile, name: str, text: str) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(text.encode())
    tar.addfile(entry, io.BytesIO(text.encode()))


# -----------------------------------------------------------------------------
# Section: cell -- the namespaces that everything lives in, and its end

# The first process of the cell. It ignores SIGCHLD, so the kernel reaps whatever ends in there.
GROUP = "pmtud-cluster"
FIRST = "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)\nwhile True: signal.pause()"


class Hierarchy(NamedTuple):
    """A mounted cgroup hierarchy: one for each controller (v1), or one for all (v2)."""

    mountpoint: Path
    kind: str  # cgroup, cgroup2
    options: str
    folder: Path  # the group that becomes the root of the cell


def hierarchies() -> list[Hierarchy]:
    """proc(5), mountinfo: 36 35 98:0 /root /mountpoint options - type source superoptions.

    The cell's group is made below the one that this process is in, and so counted with it. Not so in v2: there a group
    with processes cannot have groups with controllers.
    """
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    own = {
        controllers: group.strip("/")
        for _, controllers, group in (line.split(":", 2) for line in lines)
    }
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        kind, _, options = rest.split(" ", 2)
        place = Path(fields.split()[4])
        if kind == "cgroup2":
            found.append(Hierarchy(place, kind, "rw", place / GROUP))
        elif kind == "cgroup":
            words = [
                word
                for word in options.split(",")
                if word not in ("rw", "ro", "xattr", "clone_children")
            ]
            group = own.get(",".join(words), "")
            if words[0].startswith("name="):
                words.insert(0, "none")  # a hierarchy without a controller
            found.append(Hierarchy(place, kind, ",".join(words), place / group / GROUP))
    return found


def started_at(pid: int) -> str:
    """Field 22 of /proc/PID/stat; a number that has been given to another process has another."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def cell() -> Optional[dict[str, Any]]:
    """What `up` left for the other commands, while the cell stands."""
    if not STATE.exists():
        return None
    state: dict[str, Any] = json.loads(STATE.read_text())
    known = (state["pid"], 1)  # in the cell it is the first
    return state if state["started"] in map(started_at, known) else None


def open_cell(state: dict[str, Any]) -> None:
    """Start the first process in namespaces of its own, and note its number.

    It is put into its cgroups before the cgroup namespace is made, so these are the roots it sees.
    """
    made = [folder for folder in (*SCRATCH, str(WORK)) if not Path(folder).exists()]
    for folder in made:
        Path(folder).mkdir(parents=True)
    for hierarchy in hierarchies():
        hierarchy.folder.mkdir(exist_ok=True)
        # Empty in a new group of v1, and nobody may enter it
        for name in (
            "cpuset.cpus",
            "cpuset.mems",
        ):
            if (hierarchy.folder / name).exists() and hierarchy.kind == "cgroup":
                (hierarchy.folder / name).write_text((hierarchy.folder.parent / name).read_text())
    state = {
        **state,
        "made": made,
        "cgroups": [str(hierarchy.folder) for hierarchy in hierarchies()],
    }
    enter = "".join(f"echo $$ >{item.folder}/cgroup.procs; " for item in hierarchies())
    unshare = [
        "unshare",
        "--mount",
        "--propagation",
        "slave",
        "--pid",
        "--fork",
        "--kill-child",
        "--cgroup",
        "--mount-proc",
        sys.executable,
        "-Sc",
        FIRST,
    ]
    outer = subprocess.Popen(
        ["sh", "-euc", enter + 'exec "$@"', "sh", *unshare],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
    STATE.write_text(json.dumps({**state, "pid": outer.pid, "started": started_at(outer.pid)}))
    pid = poll(lambda: children.exists() and children.read_text().strip(), 5)
    if not pid:
        raise Trouble("the cell's first process did not start")
    state = {**state, "pid": int(pid), "started": started_at(int(pid))}
    STATE.write_text(json.dumps(state))
    inside(["furnish"])


def inside(arguments: Sequence[str]) -> int:
    """Go on in the cell with these arguments; its exit status."""
    state = cell()
    if not state:
        raise Trouble("there is no cluster: .ci/cluster.py up")
    command = [
        "nsenter",
        "--target",
        str(state["pid"]),
        "--mount",
        "--pid",
        "--cgroup",
        "--wd=.",
        sys.executable,
        str(HERE / "cluster.py"),
        "--in-cell",
        *arguments,
    ]
    return subprocess.run(command, check=False).returncode


def furnish() -> None:
    """Once, in the new cell: its own file systems in memory, its own view of the cgroups, and what
    kubelets read.
    """
    execute("mount", "--make-rshared", "/")
    execute("mount", "-t", "tmpfs", "-o", "mode=755", "pmtud-cluster", str(WORK))
    for number, place in enumerate(SCRATCH):
        folder = WORK / "scratch" / str(number)
        folder.mkdir(parents=True)
        execute("mount", "--bind", str(folder), place)
        execute("mount", "--make-shared", place)
    for key, value in TUNABLES.items():
        seen = WORK / "sysctl" / key.replace("/", ".")
        seen.parent.mkdir(exist_ok=True)
        seen.write_text(f"{value}\n")
        execute("mount", "--bind", str(seen), f"/proc/sys/{key}")
    join = ""
    for hierarchy in hierarchies():
        group: Path = hierarchy.mountpoint
        execute("umount", str(group))
        execute("mount", "-t", hierarchy.kind, "-o", hierarchy.options, hierarchy.kind, str(group))
        if hierarchy.kind == "cgroup2":
            group /= "own"
            group.mkdir()
            (group / "cgroup.procs").write_text("1")
        join += f"echo $$ >{group}/cgroup.procs; "
    (WORK / "join").write_text(join)  # nsenter changes what a program sees, not where it is counted
    for name in ("logs", "components", "config"):
        (WORK / name).mkdir()


def close_cell() -> None:
    """End the cell: the kernel kills all of its processes, and its mounts and named namespaces go
    with the last.
    """
    if not STATE.exists():
        return
    state = json.loads(STATE.read_text())
    if started_at(state["pid"]) == state["started"]:
        os.kill(state["pid"], signal.SIGKILL)
    if not poll(lambda: remove_cgroups(state["cgroups"]), 20):
        raise Trouble(
            f"processes of the cluster outlived SIGKILL by 20 s: {' '.join(state['cgroups'])}"
        )
    for folder in state["made"]:
        with contextlib.suppress(OSError):  # somebody else uses it by now
            Path(folder).rmdir()
    STATE.unlink()


def remove_cgroups(folders: Sequence[str]) -> bool:
    """Whether they are gone; a group that still has a process cannot be removed."""
    roots = [Path(folder) for folder in folders]
    for root in roots:
        for group in (*sorted(root.rglob("*/"), reverse=True), root):
            with contextlib.suppress(OSError):
                group.rmdir()
    return not any(root.exists() for root in roots)


# -----------------------------------------------------------------------------
# Section: components -- the cluster's own programs, which outlive the command that started them


def launch(name: str, host: Host, *argv: str) -> None:
    """Start a program where host is.

    `ip netns exec` would hide the cgroups. Its output: WORK/logs/NAME.
    """
    note = {"argv": argv, "namespace": host.namespace}
    join = ["sh", "-euc", (WORK / "join").read_text() + 'exec "$@"', "sh"]
    command = [*join, "nsenter", f"--net=/run/netns/{host.namespace}", *argv]
    with open(WORK / "logs" / name, "ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    (WORK / "components" / name).write_text(json.dumps({**note, "pid": process.pid}))


def component(name: str) -> dict[str, Any]:
    note: dict[str, Any] = json.loads((WORK / "components" / name).read_text())
    return note


def stop(name: str, sig: int = signal.SIGTERM) -> None:
    """End a component, for a fault; start_again() brings it back."""
    pid = component(name)["pid"]
    os.kill(pid, sig)
    if not poll(lambda: not Path(f"/proc/{pid}/exe").exists(), 20):
        raise Trouble(f"{name} outlived signal {sig} by 20 s")


def start_again(cluster: KubeCluster, name: str) -> None:
    """With the same arguments, in the same place."""
    note = component(name)
    (host,) = (host for host in cluster.hosts if host.namespace == note["namespace"])
    launch(name, host, *note["argv"])


def logs(name: str, size: int = 2000) -> str:
    """The last of what a component printed."""
    path = WORK / "logs" / name
    return path.read_text(errors="replace")[-size:] if path.exists() else ""


# -----------------------------------------------------------------------------
# Section: cluster -- hosts, links and fabric of test_pmtud.py; Kubernetes in them


class KubeHost(Host):
    """A host under a fixed name (the cell has its own names), entered without hiding the cgroups."""

    def __init__(self, net: Any, name: str) -> None:
        super().__init__(net, name)
        self.namespace = name

    def run(
        self, *argv: str, check: bool = True, timeout: float = 20, input: str | None = None
    ) -> str:
        return execute(
            "nsenter",
            f"--net=/run/netns/{self.namespace}",
            *argv,
            check=check,
            timeout=timeout,
            input=input,
        )

    def start(self, *argv: str, env: dict[str, str] | None = None) -> Process:
        process = Process(["nsenter", f"--net=/run/netns/{self.namespace}", *argv], env)
        self.net.processes.append(process)
        return process


class KubeCluster(Cluster):
    """The nodes of test_pmtud.py's cluster, with Kubernetes on them in place of rules written by hand.

    10.0.0.2 is the control plane, beside the nodes (10.0.0.11 and so on). Service addresses as seen from outside are in
    10.96.0.0/24 and fd96::/64, which the fabric spreads over the nodes; pods are in 10.244.i.0/24 and fd44:i::/64.
    """

    host_class = KubeHost

    def __init__(self, nodes: int, proxy: str, programs: Path) -> None:
        super().__init__(nodes, conntrack=False)  # without its hand-written pods and rules
        self.proxy = proxy
        self.programs = programs

    @classmethod
    def planned(cls) -> KubeCluster:
        """As the options of `up` want it; nothing of it is made yet."""
        state = cell()
        if not state:
            raise Trouble("there is no cluster: .ci/cluster.py up")
        return cls(state["nodes"], state["proxy"], Path(state["programs"]))

    @classmethod
    def standing(cls) -> KubeCluster:
        """The one that `up` made, for a later command."""
        cluster = cls.planned()
        names = [f"node{i}" for i in range(1, cluster.size + 1)]
        cluster.hosts = [KubeHost(cluster, name) for name in (*FIXED_HOSTS, *names)]
        found = {host.name: host for host in cluster.hosts}
        cluster.client = found["client"]
        cluster.mgmt = found["mgmt"]
        cluster.router = found["router"]
        cluster.fabric = found["fabric"]
        cluster.control = found["control"]
        cluster.nodes = [found[name] for name in names]
        cluster.pods = []
        return cluster

    def build(self) -> None:
        """Hosts and links only; strict reverse path filters, and a router that speaks from its
        management address.
        """
        self.client = self.host("client")
        self.mgmt = self.host("mgmt")
        self.router = self.host("router", forward=True)
        self.fabric = self.host("fabric", forward=True)
        self.control = self.host("control")
        self.pods = []
        numbers = range(1, self.size + 1)
        self.nodes = [self.host(f"node{i}", forward=True) for i in numbers]
        self._build_outside()
        self._build_fabric()
        for i in numbers:
            self._build_node(i)
            for family in (4, 6):
                self.fabric.ip(
                    f"route add {self.pod_network(i, family)} via {self.node_address(i, family)}"
                )
        self.link(self.fabric, self.control, names=("", "eth0"))
        self.fabric.ip("link set to-control master nodes")
        self.control.ip(
            f"addr add {CONTROL}/24 dev eth0",
            f"addr add {CONTROL6}/64 dev eth0",
            "route add default via 10.0.0.1",
            "route add ::/0 via fd00::1",
        )
        self.error_from_management()
        self.strict_rpf()

    def error_from_management(self, on: bool = True) -> None:
        """Those about nodes' and pods' own addresses too. IPv6 has no reverse path filter."""
        super().error_from_management(on)
        ways = [
            ("10.0.0.0/24", "10.8.0.2", "172.20.20.2"),
            ("10.244.0.0/16", "10.8.0.2", "172.20.20.2"),
            ("fd00::/64", "fd08::2", "fd20::2"),
            ("fd44::/16", "fd08::2", "fd20::2"),
        ]
        self.router.ip(
            *(
                f"route replace {network} via {via}" + (f" src {source}" if on else "")
                for network, via, source in ways
            )
        )

    @staticmethod
    def pod_network(i: int, family: int = 4) -> str:
        return f"10.244.{i}.0/24" if family == 4 else f"fd44:{i}::/64"

    def kubectl(
        self, *argv: str, input: str | None = None, timeout: float = 60, check: bool = True
    ) -> str:
        """What kubectl prints, as the cluster's administrator."""
        return self.control.run(
            str(self.programs / "kubectl"),
            f"--kubeconfig={WORK}/config/admin",
            *argv,
            input=input,
            timeout=timeout,
            check=check,
        )

    def get(self, *argv: str) -> Any:
        """The object or list that kubectl gets."""
        return json.loads(self.kubectl("get", "-o", "json", *argv))

    def apply(self, *objects: dict[str, Any]) -> None:
        self.kubectl(
            "apply",
            "-f",
            "-",
            input=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}),
        )

    def flush(self) -> None:
        """Forget every learned path MTU, in nodes and pods."""
        for host in self.nodes + self.pods:
            host.sysctl("net.ipv4.route.flush", 1)
            execute("ip", "-6", "-n", host.namespace, "route", "flush", "cache")

    def ctr(self, node: Host, *argv: str, timeout: float = 120) -> str:
        """containerd's own client on a node, in the name space that the kubelet uses."""
        address = f"--address={WORK}/{node.name}/containerd.sock"
        return node.run("ctr", address, "--namespace=k8s.io", *argv, timeout=timeout)

    def pod_host(self, pod: dict[str, Any]) -> Host:
        """A pod's network namespace, as a host to look into."""
        name = f"pod-{pod['metadata']['name']}"
        host = KubeHost(self, name)
        if not Path("/run/netns", name).exists():
            execute("ip", "netns", "attach", name, str(self.pod_pid(pod)))
        return host

    def pod_pid(self, pod: dict[str, Any]) -> int:
        """The first process of a pod's first container."""
        (node,) = (node for node in self.nodes if node.name == pod["spec"]["nodeName"])
        number = pod["status"]["containerStatuses"][0]["containerID"].partition("//")[2]
        (pid,) = re.findall(rf"^{number}\s+(\d+)", self.ctr(node, "tasks", "ls"), re.MULTILINE)
        return int(pid)


FIXED_HOSTS = ("client", "mgmt", "router", "fabric", "control")


# -- the control plane

USERS = {  # token and user name, groups
    "admin": ("admin", "system:masters"),
    "manager": ("system:kube-controller-manager", ""),
    "scheduler": ("system:kube-scheduler", ""),
    "dns": ("dns", "system:masters"),
    "proxy": ("system:kube-proxy", ""),
}


def write_secrets(cluster: KubeCluster) -> None:
    """An authority, the API server's certificate, a key for service accounts, a token for each
    user.
    """
    config = WORK / "config"
    ask = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
    ]
    execute(
        *ask, "-keyout", f"{config}/ca.key", "-out", f"{config}/ca.crt", "-subj", "/CN=kubernetes"
    )
    names = f"IP:{CONTROL},IP:{API_SERVICE},IP:127.0.0.1,DNS:kubernetes.default.svc"
    execute(
        *ask,
        "-CA",
        f"{config}/ca.crt",
        "-CAkey",
        f"{config}/ca.key",
        "-keyout",
        f"{config}/api.key",
        "-out",
        f"{config}/api.crt",
        "-subj",
        "/CN=kube-apiserver",
        "-addext",
        f"subjectAltName={names}",
        "-addext",
        "basicConstraints=critical,CA:FALSE",
    )
    execute("openssl", "genrsa", "-out", f"{config}/accounts.key", "2048")
    users = dict(USERS)
    users.update(
        {node.name: (f"system:node:{node.name}", "system:nodes") for node in cluster.nodes}
    )
    lines = []
    for name, (user, group) in users.items():
        lines.append(f'token-{name},{user},{name},"{group}"')
        (config / name).write_text(kubeconfig(f"token-{name}"))
    (config / "tokens").write_text("\n".join(lines) + "\n")


def kubeconfig(token: str) -> str:
    """JSON is YAML."""
    server = {"server": f"https://{CONTROL}:6443", "certificate-authority": f"{WORK}/config/ca.crt"}
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "cell",
            "clusters": [{"name": "cell", "cluster": server}],
            "users": [{"name": "cell", "user": {"token": token}}],
            "contexts": [{"name": "cell", "context": {"cluster": "cell", "user": "cell"}}],
        }
    )


def start_control_plane(cluster: KubeCluster) -> None:
    """etcd and the API server, then those that need it; returns when it answers."""
    config = WORK / "config"
    write_secrets(cluster)
    launch(
        "etcd",
        cluster.control,
        "etcd",
        f"--data-dir={WORK}/etcd",
        "--listen-client-urls=http://127.0.0.1:2379",
        "--advertise-client-urls=http://127.0.0.1:2379",
        "--listen-peer-urls=http://127.0.0.1:2380",
        "--log-level=warn",
        "--logger=zap",
    )
    launch(
        "kube-apiserver",
        cluster.control,
        str(cluster.programs / "kube-apiserver"),
        "--etcd-servers=http://127.0.0.1:2379",
        f"--advertise-address={CONTROL}",
        "--allow-privileged=true",
        "--authorization-mode=Node,RBAC",
        f"--token-auth-file={config}/tokens",
        f"--service-cluster-ip-range={SERVICE_RANGE}",
        f"--tls-cert-file={config}/api.crt",
        f"--tls-private-key-file={config}/api.key",
        "--kubelet-preferred-address-types=InternalIP",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--cert-dir={WORK}/api",
        f"--service-account-signing-key-file={config}/accounts.key",
        f"--service-account-key-file={config}/accounts.key",
        "--enable-admission-plugins=NodeRestriction",
    )
    if not poll(lambda: "ok" in cluster.kubectl("get", "--raw=/readyz", check=False), 60):
        raise Trouble(f"the API server is not ready after 60 s:\n{logs('kube-apiserver')}")
    launch(
        "kube-controller-manager",
        cluster.control,
        str(cluster.programs / "kube-controller-manager"),
        f"--kubeconfig={config}/manager",
        "--leader-elect=false",
        f"--root-ca-file={config}/ca.crt",
        f"--service-account-private-key-file={config}/accounts.key",
        "--use-service-account-credentials",
        f"--cert-dir={WORK}/manager",
        "--allocate-node-cidrs=false",
        "--node-monitor-grace-period=20s",
    )
    launch(
        "kube-scheduler",
        cluster.control,
        str(cluster.programs / "kube-scheduler"),
        "--leader-elect=false",
        f"--kubeconfig={config}/scheduler",
        f"--cert-dir={WORK}/scheduler",
        f"--authentication-kubeconfig={config}/scheduler",
        f"--authorization-kubeconfig={config}/scheduler",
    )
    start_dns(cluster)


def start_dns(cluster: KubeCluster) -> None:
    """CoreDNS beside the API server, behind the Service that pods are told of."""
    corefile = WORK / "config" / "Corefile"
    corefile.write_text(
        f".:53 {{\n bind {CONTROL}\n errors\n ready 127.0.0.1:8181\n cache 5\n"
        " kubernetes cluster.local {\n"
        f"  endpoint https://{CONTROL}:6443\n  kubeconfig {WORK}/config/dns cell\n ttl 5\n }}\n}}\n"
    )
    launch("coredns", cluster.control, str(cluster.programs / "coredns"), f"-conf={corefile}")
    ports = [
        {"name": f"dns-{protocol.lower()}", "port": 53, "protocol": protocol}
        for protocol in ("UDP", "TCP")
    ]
    labels = {"kubernetes.io/service-name": "kube-dns"}
    cluster.apply(
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "kube-dns", "namespace": "kube-system"},
            "spec": {"clusterIP": DNS_SERVICE, "ports": ports},
        },
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "addressType": "IPv4",
            "ports": ports,
            "metadata": {"name": "kube-dns-control", "namespace": "kube-system", "labels": labels},
            "endpoints": [{"addresses": [CONTROL], "conditions": {"ready": True}}],
        },
    )


# -- a node

CONTAINERD = """version = 2
root = "{work}/containerd"
state = "{work}/containerd-state"
oom_score = 0
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs",
                    "io.containerd.snapshotter.v1.devmapper", "io.containerd.internal.v1.tracing"]
[grpc]
address = "{work}/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
disable_apparmor = true
restrict_oom_score_adj = true
disable_tcp_service = true
netns_mounts_under_state_dir = true
sandbox_image = "{pause}"
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = "{work}/cni"
"""


def start_containerd(cluster: KubeCluster, node: Host, image: Path) -> None:
    """With the pods' image in it."""
    i = cluster.nodes.index(node) + 1
    work = WORK / node.name
    (work / "cni").mkdir(parents=True)
    (work / "containerd.toml").write_text(CONTAINERD.format(work=work, pause=PAUSE_IMAGE))
    ranges = [[{"subnet": cluster.pod_network(i, family)}] for family in (4, 6)]
    bridge = {
        "type": "bridge",
        "bridge": "cni0",
        "isGateway": True,
        "hairpinMode": True,
        "ipam": {
            "type": "host-local",
            "dataDir": f"{work}/addresses",
            "ranges": ranges,
            "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
        },
    }
    network = {"cniVersion": "0.4.0", "name": "pods", "plugins": [bridge]}
    (work / "cni" / "10-pods.conflist").write_text(json.dumps(network))
    launch(
        f"containerd-{node.name}",
        node,
        "containerd",
        f"--config={work}/containerd.toml",
        "--log-level=warn",
    )
    if not poll((work / "containerd.sock").exists, 20):
        raise Trouble(f"containerd is not there after 20 s:\n{logs(f'containerd-{node.name}')}")
    cluster.ctr(node, "images", "import", str(image))


def start_kubelet(cluster: KubeCluster, node: Host) -> None:
    """Without the parts that need a machine of its own: resource groups for kinds of pods, swap
    off, disk pressure.
    """
    i = cluster.nodes.index(node) + 1
    work = WORK / node.name
    (work / "resolv.conf").write_text(f"nameserver {CONTROL}\n")
    config = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "containerRuntimeEndpoint": f"unix://{work}/containerd.sock",
        "podLogsDir": f"{work}/pods",
        "volumePluginDir": f"{work}/plugins",
        "resolvConf": f"{work}/resolv.conf",
        "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
        "authorization": {"mode": "AlwaysAllow"},
        "clusterDomain": "cluster.local",
        "clusterDNS": [DNS_SERVICE],
        "cgroupDriver": "cgroupfs",
        "cgroupsPerQOS": False,
        "enforceNodeAllocatable": ["none"],
        "failCgroupV1": False,
        "failSwapOn": False,
        "localStorageCapacityIsolation": False,
        "evictionHard": {
            "memory.available": "0%",
            "nodefs.available": "0%",
            "imagefs.available": "0%",
        },
        "imageGCHighThresholdPercent": 100,
        "nodeStatusUpdateFrequency": "5s",
        "readOnlyPort": 0,
        "shutdownGracePeriod": "0s",
    }
    (work / "kubelet.json").write_text(json.dumps(config))
    launch(
        f"kubelet-{node.name}",
        node,
        str(cluster.programs / "kubelet"),
        f"--config={work}/kubelet.json",
        f"--kubeconfig={WORK}/config/{node.name}",
        f"--hostname-override={node.name}",
        f"--root-dir={work}/kubelet",
        f"--cert-dir={work}/pki",
        f"--node-ip={cluster.node_address(i)},{cluster.node_address(i, 6)}",
    )


def start_proxy(cluster: KubeCluster, node: Host) -> None:
    """It sets conntrack's sizes for the machine unless told not to."""
    work = WORK / node.name
    config = {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": cluster.proxy,
        "clientConnection": {"kubeconfig": f"{WORK}/config/proxy"},
        "hostnameOverride": node.name,
        "clusterCIDR": PODS,
        "conntrack": {
            "maxPerCore": 0,
            "min": 0,
            "tcpEstablishedTimeout": "0s",
            "tcpCloseWaitTimeout": "0s",
        },
    }
    (work / "proxy.json").write_text(json.dumps(config))
    launch(
        f"kube-proxy-{node.name}",
        node,
        str(cluster.programs / "kube-proxy"),
        f"--config={work}/proxy.json",
    )


# -----------------------------------------------------------------------------
# Section: up -- all of it, in the order in which it is needed


def workload(kind: str, name: str, nodes: Optional[str]) -> dict[str, Any]:
    """Pods that serve what the client of test_pmtud.py fetches: on every node, or on one."""
    container = {
        "name": "web",
        "image": POD_IMAGE,
        "imagePullPolicy": "Never",
        "command": ["python3", "-ISuc", SERVER, "80", "200000"],
    }
    pod: dict[str, Any] = {
        "containers": [container],
        "terminationGracePeriodSeconds": 0,
        "nodeSelector": {"kubernetes.io/os": "linux"},
        "tolerations": [{"operator": "Exists"}],
    }
    if nodes:
        pod["nodeSelector"]["kubernetes.io/hostname"] = nodes
    labels = {"app": name}
    return {
        "apiVersion": "apps/v1",
        "kind": kind,
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }


class Service(NamedTuple):
    """A way from outside to pods."""

    name: str
    number: int  # last part of its addresses
    app: str
    spec: dict[str, Any]

    def address(self, family: int) -> str:
        return f"10.96.0.{self.number}" if family == 4 else f"fd96::{self.number}"

    def object(self) -> dict[str, Any]:
        spec = {
            "selector": {"app": self.app},
            "ports": [{"port": 80}],
            "ipFamilyPolicy": "RequireDualStack",
            **self.spec,
        }
        if self.name == "externalips":
            spec["externalIPs"] = [self.address(4), self.address(6)]
        return {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": self.name, "namespace": "default"},
            "spec": spec,
        }


BALANCED = {"type": "LoadBalancer"}
NODE_PORT = 30080
SERVICES = (
    Service("local", 11, "web", {**BALANCED, "externalTrafficPolicy": "Local"}),
    Service("cluster", 12, "web", BALANCED),
    Service("elsewhere", 13, "lone", BALANCED),
    Service("externalips", 14, "web", {}),
    Service(
        "nodeport", 0, "web", {"type": "NodePort", "ports": [{"port": 80, "nodePort": NODE_PORT}]}
    ),
)


def start_workloads(cluster: KubeCluster) -> None:
    cluster.apply(
        workload("DaemonSet", "web", None),
        workload("DaemonSet", "lone", cluster.nodes[-1].name),
        *(service.object() for service in SERVICES),
    )
    for service in SERVICES:
        if service.spec.get("type") == "LoadBalancer":
            addresses = [{"ip": service.address(family), "ipMode": "VIP"} for family in (4, 6)]
            cluster.kubectl(
                "patch",
                "service",
                service.name,
                "--subresource=status",
                "-p",
                json.dumps({"status": {"loadBalancer": {"ingress": addresses}}}),
            )
    for name in ("web", "lone"):
        cluster.kubectl("rollout", "status", f"daemonset/{name}", "--timeout=90s", timeout=100)


CONNECT = """
import socket, sys
for to in sys.argv[1:]:
    socket.create_connection((to, 80), 1)
print("all")
"""


def answers(cluster: KubeCluster) -> bool:
    """Every service in both families, so kube-proxies know them.

    Only the handshake gets through the thin link.
    """
    addresses = [service.address(family) for service in SERVICES[:-1] for family in (4, 6)]
    return cluster.client.run(sys.executable, "-ISc", CONNECT, *addresses, check=False) == "all\n"


def up_inside(cluster: KubeCluster, image: Path) -> None:
    """All steps in the cell; the nodes' images are unpacked while the API server starts."""
    with step("hosts, links, fabric"):
        cluster.build()
    with ThreadPoolExecutor() as pool:
        with step("control plane"):
            nodes = [pool.submit(start_containerd, cluster, node, image) for node in cluster.nodes]
            start_control_plane(cluster)
        with step("container runtimes, pods' image"):
            for job in nodes:
                job.result()
    with step("nodes ready") as found:
        for node in cluster.nodes:
            start_kubelet(cluster, node)
        all_nodes = [f"node/{node.name}" for node in cluster.nodes]
        if not poll(lambda: len(cluster.get("nodes")["items"]) == cluster.size, 60):
            raise Trouble(f"no nodes after 60 s:\n{logs('kubelet-node1')}")
        for node in cluster.nodes:
            start_proxy(cluster, node)  # it reads its node's addresses once
        cluster.kubectl("wait", "--for=condition=Ready", *all_nodes, "--timeout=60s", timeout=70)
        version = cluster.get("nodes")["items"][0]["status"]["nodeInfo"]
        found += [version["kubeletVersion"], version["containerRuntimeVersion"], cluster.proxy]
    with step("pods and services"):
        start_workloads(cluster)
        if not poll(lambda: answers(cluster), 60):
            raise Trouble(f"a service does not answer after 60 s:\n{logs('kube-proxy-node1')}")


# -----------------------------------------------------------------------------
# Section: pmtud -- the manifest as a user applies it


def documents(cluster: KubeCluster, text: str) -> list[dict[str, Any]]:
    """What kubectl reads in a manifest."""
    printed = cluster.kubectl("create", "--dry-run=client", "-o", "json", "-f", "-", input=text)
    decoder = json.JSONDecoder()
    found: list[dict[str, Any]] = []
    while printed.strip():
        item, end = decoder.raw_decode(printed.lstrip())
        found += item["items"] if item["kind"] == "List" else [item]
        printed = printed.lstrip()[end:]
    return found


def uncommented(text: str) -> str:
    """A manifest with its commented documents, but for the Prometheus operator's, and their kinds
    of resource.
    """
    parts = text.split("---\n")
    opened = [
        re.sub(r"^# ?", "", part.partition("\n\n")[0], flags=re.MULTILINE) for part in parts[1:]
    ]
    kept = [
        opened_part
        for part, opened_part in zip(parts[1:], opened)
        if part.startswith("# apiVersion")
        and "monitoring.coreos.com" not in part
        and "security.openshift.io" not in part
    ]
    return "\n---\n".join([text, *kept])


def watching_nodes(text: str) -> str:
    """The manifest's own advice for --peers=kube:nodes: the commented documents, the other peers,
    the token.
    """
    text = re.sub(r"^ *- [^#\n]*dns:pmtud.*\n", "", uncommented(text), flags=re.MULTILINE)
    text = re.sub(r"^( *)# (- .*kube:nodes)", r"\1\2", text, flags=re.MULTILINE)
    return text.replace(
        "automountServiceAccountToken: false #", "automountServiceAccountToken: true #"
    )


def without_pypi(pod: dict[str, Any]) -> None:
    """The manifest's own advice where there is no way to PyPI: the wheel in a ConfigMap, no init
    container.
    """
    if not pod.pop("initContainers", None):
        return
    pod["volumes"] = [
        volume for volume in pod["volumes"] if volume["name"] not in ("libs", "requirements")
    ]
    pod["volumes"].append({"name": "libs", "configMap": {"name": "pmtud-wheel"}})
    for variable in pod["containers"][0]["env"]:
        if variable["name"] == "PYTHONPATH":
            variable["value"] = f"/libs/{wheel().name}"


def wheel() -> Path:
    """prometheus_client, as pip downloads it."""
    found = list(CACHE.glob("prometheus_client-*.whl"))
    if not found:
        run_long(
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            str(CACHE),
            "prometheus-client==0.26.0",
        )
        found = list(CACHE.glob("prometheus_client-*.whl"))
    return found[0]


class Deployment:
    """pmtud on the cluster: absent, or a checkout's manifest with one kind of peers."""

    def __init__(self, cluster: KubeCluster, tree: Path) -> None:
        self.cluster = cluster
        self.tree = tree
        self.manifest = (tree / "daemonset.yaml").read_text()
        self.state = "unknown"

    def want(self, state: str) -> None:
        """`absent`, `dns` or `kube`: as if nothing else had been before."""
        if self.state != state:
            self.remove()
            if state != "absent":
                self.install(watching_nodes(self.manifest) if state == "kube" else self.manifest)
            self.state = state
        self.cluster.flush()

    def remove(self) -> None:
        """No pod is left, nor what they made in the kernel.

        The Service stays: where one is made anew too soon, the controller of its endpoints believes
        in those it has deleted ("informer cache is out of date") and gives up.
        """
        ask = ("-n", "kube-system", "--ignore-not-found", "--timeout=60s")
        self.cluster.kubectl("delete", "daemonset,serviceaccount", "pmtud", *ask, timeout=70)
        self.cluster.kubectl(
            "delete", "configmap", "pmtud", "pmtud-wheel", "pmtud-requirements", *ask
        )
        for kind in ("clusterrolebinding", "clusterrole"):
            self.cluster.kubectl("delete", kind, "pmtud", "--ignore-not-found")
        if not poll(lambda: not self.pods(), 30):
            raise Trouble("pods of pmtud are still there after 30 s")

    def install(self, manifest: str) -> None:
        """Returns when every pod is ready."""
        self.apply(manifest, "kube-system")
        self.rolled_out("kube-system")

    def apply(self, manifest: str, namespace: str) -> None:
        """Apply it with the ConfigMaps that it names."""
        found = documents(self.cluster, manifest)
        (daemonset,) = (item for item in found if item["kind"] == "DaemonSet")
        pod = daemonset["spec"]["template"]["spec"]
        without_pypi(pod)
        defined = [item["metadata"]["name"] for item in found if item["kind"] == "ConfigMap"]
        for volume in pod["volumes"]:
            name = volume.get("configMap", {}).get("name")
            if name and name not in defined:
                content = self.tree / "pmtud.py" if name == "pmtud" else wheel()
                self.cluster.kubectl(
                    "-n", namespace, "create", "configmap", name, f"--from-file={content}"
                )
        for container in pod["containers"]:
            self.tag(container["image"])
        for item in found:
            if item["kind"] not in ("ClusterRole", "ClusterRoleBinding"):
                item["metadata"]["namespace"] = namespace
        self.cluster.apply(*found)

    def rolled_out(self, namespace: str) -> None:
        """Once every pod is as the DaemonSet wants it now, and ready."""
        self.cluster.kubectl(
            "-n", namespace, "rollout", "status", "daemonset/pmtud", "--timeout=90s", timeout=100
        )

    def port(self) -> int:
        """Where the daemons listen."""
        return int(re.findall(r"containerPort: (\d+)", self.manifest)[0])

    def pid(self, pod: dict[str, Any]) -> int:
        """Of the daemon itself."""
        return self.cluster.pod_pid(pod)

    def tag(self, image: str) -> None:
        """Our pods' image under the name that the manifest uses."""
        name = f"docker.io/library/{image}"
        for node in self.cluster.nodes:
            if name not in self.cluster.ctr(node, "images", "ls", "-q").split():
                self.cluster.ctr(node, "images", "tag", POD_IMAGE, name)

    def pods(self) -> list[dict[str, Any]]:
        """In the order of their nodes."""
        found = self.cluster.get("pods", "-n", "kube-system", "-l", "app.kubernetes.io/name=pmtud")[
            "items"
        ]
        return sorted(found, key=lambda pod: str(pod["spec"].get("nodeName")))

    def log(self, pod: dict[str, Any], *options: str) -> str:
        return self.cluster.kubectl("-n", "kube-system", "logs", pod["metadata"]["name"], *options)

    def restarts(self) -> int:
        return sum(status["restartCount"] for status in self.statuses())

    def ready(self) -> int:
        return sum(status["ready"] for status in self.statuses())

    def statuses(self) -> list[dict[str, Any]]:
        """Of each container that has been started at least once."""
        return [
            status for pod in self.pods() for status in pod["status"].get("containerStatuses", ())
        ]


# -----------------------------------------------------------------------------
# Section: scenarios -- each with the figure without pmtud that shows what it is good for


class Bed:
    """What a scenario works on, and where it puts its results."""

    def __init__(self, cluster: KubeCluster, tree: Path) -> None:
        self.cluster = cluster
        self.pmtud = Deployment(cluster, tree)
        self.title = ""
        self.failed = 0
        self.done = 0
        self.since = time.monotonic()

    def row(self, name: str, result: str, good: bool) -> None:
        """One line of the table; the time is what went by since the line before."""
        row(
            f"{self.title}: {name}", result, "ok" if good else "FAIL", time.monotonic() - self.since
        )
        self.since = time.monotonic()
        self.done += 1
        self.failed += not good

    def want(self, state: str) -> None:
        """pmtud absent, or with these peers and knowing them all: the first pod hears of the others
        a little later.
        """
        is_new = self.pmtud.state != state
        self.pmtud.want(state)
        start = time.monotonic()
        if state != "absent":
            most = 2 * (self.cluster.size - 1)
            nodes = range(self.cluster.size)
            know = poll(lambda: all(peers_of(self, i) == most for i in nodes), 60)
            if is_new or not know:
                took = f"{time.monotonic() - start:.1f} s"
                self.row(f"all know their peers by {state}", took, bool(know))

    def find_pods(self) -> None:
        """The workloads' pods as hosts, so that flush() reaches them."""
        found = self.cluster.get("pods", "-n", "default")["items"]
        self.cluster.pods = [self.cluster.pod_host(pod) for pod in found]

    def web_pods(self) -> list[Host]:
        """One on each node."""
        return [host for host in self.cluster.pods if host.name.startswith("pod-web-")]

    def wait(self, name: str, condition: Callable[[], bool], seconds: float) -> None:
        """How long it takes until the condition holds; a failure after this many seconds."""
        start = time.monotonic()
        good = poll(condition, seconds)
        self.row(name, f"{time.monotonic() - start:.1f} s", bool(good))

    def show(self, lines: Sequence[str]) -> None:
        """What explains a failure."""
        for line in lines[:20]:
            print(f"    {line}", flush=True)

    def metrics(self, node: int) -> dict[str, float]:
        """Every sample of a node's daemon, by `name{labels}`."""
        url = f"http://{self.cluster.node_address(node + 1)}:{self.pmtud.port()}/metrics"
        text = self.cluster.control.run("curl", "-sS", "--max-time", "5", url)
        rows = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, _, value in rows}

    def cpu_seconds(self, pod: dict[str, Any]) -> float:
        """proc(5), stat: utime and stime in ticks."""
        fields = Path(f"/proc/{self.pmtud.pid(pod)}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self, pod: dict[str, Any]) -> None:
        """The highest that the container's group has seen, against its limit."""
        lines = Path(f"/proc/{self.pmtud.pid(pod)}/cgroup").read_text().splitlines()
        (v2,) = (line.split(":", 2)[2] for line in lines if line.startswith("0::"))
        found = [line.split(":", 2)[2] for line in lines if line.split(":")[1] == "memory"]
        if found:
            folder = f"/sys/fs/cgroup/memory{found[0]}"
            peak = "memory.max_usage_in_bytes"
            limit = "memory.limit_in_bytes"
        else:
            folder = f"/sys/fs/cgroup{v2}"
            peak = "memory.peak"
            limit = "memory.max"
        used, most = (int(Path(folder, name).read_text()) >> 20 for name in (peak, limit))
        self.row(f"memory on {pod['spec']['nodeName']}", f"{used} of {most} MiB", used < 0.9 * most)

    def transfers(
        self, name: str, act: Callable[[], list[float]], count: int, hangs: bool = True
    ) -> None:
        """The same with pmtud (all) and without (not nearly all, where an error needs help to arrive).

        `act` gives the seconds of those that finished.
        """
        self.cluster.flush()
        seconds = act()
        if self.pmtud.state == "absent":
            good = len(seconds) < count - 3 if hangs else len(seconds) == count
            self.row(f"{name}, without", f"{len(seconds)} of {count}", good)
            return
        slowest = f", slowest {max(seconds) * 1000:.0f} ms" if seconds else ""
        self.row(name, f"{len(seconds)} of {count}{slowest}", len(seconds) == count)


def download(cluster: KubeCluster, address: str, port: int, deadline: float = 3) -> list[float]:
    """Seconds of each transfer that finished, each from an address of its own."""
    family = 6 if ":" in address else 4
    sources = [cluster.client_address(k, family) for k in range(1, FLOWS + 1)]
    printed = cluster.client.run(
        sys.executable,
        "-ISc",
        CLIENT,
        address,
        str(port),
        str(DOWNLOAD_BYTES),
        str(deadline),
        *sources,
        timeout=deadline + 20,
    )
    return [float(seconds) for seconds in json.loads(printed)]


SINK = """
import socket, sys, threading
def take(connection):
    left = 200_000
    while left > 0 and (data := connection.recv(65536)):
        left -= len(data)
    if left <= 0:
        connection.sendall(b"!")
    connection.close()
listener = socket.create_server(("::", 8080), family=socket.AF_INET6, backlog=512, dualstack_ipv6=True)
print("listening", flush=True)
while True:
    threading.Thread(target=take, args=(listener.accept()[0],), daemon=True).start()
"""

UPLOAD = """
import json, socket, sys, threading, time
seconds, start = [], time.monotonic()
def send(target):
    with socket.create_connection((target, 8080), 3) as connection:
        connected.append(target)
        connection.settimeout(3)
        connection.sendall(bytes(200_000))
        if connection.recv(1):
            seconds.append(round(time.monotonic() - start, 6))
def attempt(target):
    try:
        send(target)
    except TimeoutError:
        pass
connected = []
threads = [threading.Thread(target=attempt, args=(target,)) for target in sys.argv[1:]]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert len(connected) == len(threads), f"{len(connected)} connections of {len(threads)}"
print(json.dumps(seconds))
"""


def upload(bed: Bed, family: int, count: int = 16) -> list[float]:
    """From one pod to as many of the client's addresses, 200 kB each; the sink confirms what it
    has.
    """
    targets = [bed.cluster.client_address(k, family) for k in range(1, count + 1)]
    printed = bed.web_pods()[0].run(sys.executable, "-ISc", UPLOAD, *targets, timeout=30)
    return [float(seconds) for seconds in json.loads(printed)]


Scenario = Callable[[Bed], None]
SCENARIOS: dict[str, Scenario] = {}


def scenario(title: str) -> Callable[[Scenario], Scenario]:
    def note(function: Scenario) -> Scenario:
        SCENARIOS[title] = function
        return function

    return note


def measure_services(bed: Bed) -> None:
    for service in SERVICES:
        for family in (4, 6):
            address = service.address(family)
            port = 80
            if service.name == "nodeport":
                address = bed.cluster.node_address(1, family)
                port = NODE_PORT
            # The error goes to the node that translated
            hangs = family == 4 or service.name != "nodeport"
            act = partial(download, bed.cluster, address, port)
            bed.transfers(f"{service.name}, IPv{family}", act, FLOWS, hangs)


@scenario("services")
def services(bed: Bed) -> None:
    """Downloads through each kind of service, both families."""
    for state in ("absent", "dns"):
        bed.want(state)
        measure_services(bed)


@scenario("kube:nodes")
def kube_nodes(bed: Bed) -> None:
    """The manifest's other way to find peers, with its RBAC and a service account's token."""
    bed.want("kube")
    measure_services(bed)
    peers = 2 * (bed.cluster.size - 1)
    logs = [bed.pmtud.log(pod) for pod in bed.pmtud.pods()]
    lines = [
        line for text in logs for line in text.splitlines() if "WARNING" in line or "ERROR" in line
    ]
    bed.row("warnings in the logs", str(len(lines)), not lines)
    bed.show(lines)
    found = [peers_of(bed, node) for node in range(bed.cluster.size)]
    bed.row("peers of each node", str(found), found == [peers] * bed.cluster.size)


@scenario("calico ebpf")
def calico_ebpf(bed: Bed) -> None:
    """What stands in for Felix: its interface, and a program at tc egress that wants its mark on
    errors.
    """
    bed.want("dns")
    nodes = bed.cluster.nodes
    service = SERVICES[0]
    with egress_filters(nodes):
        for family in (4, 6):
            bed.cluster.flush()
            done = len(download(bed.cluster, service.address(family), 80))
            bed.row(f"without its mark, IPv{family}", f"{done} of {FLOWS}", done < FLOWS - 3)
        with calico_bpf(nodes):
            time.sleep(3)  # the daemons look once a second
            for family in (4, 6):
                act = partial(download, bed.cluster, service.address(family), 80)
                bed.transfers(f"with its mark, IPv{family}", act, FLOWS)


ALTER = """table inet uploads {{
  chain out {{ type nat hook postrouting priority srcnat - 1;
    ip saddr 10.244.0.0/16 ip daddr 10.9.0.0/24 {rule4}
    ip6 saddr fd44::/16 ip6 daddr fd09::/64 {rule6}
  }}
}}
"""


@contextlib.contextmanager
def translated(bed: Bed, rule4: str, rule6: str) -> Iterator[None]:
    """Pods' uploads leave node 1 under another address."""
    node = bed.cluster.nodes[0]
    node.run("nft", "-f", "-", input=ALTER.format(rule4=rule4, rule6=rule6))
    try:
        yield
    finally:
        node.run("nft", "delete", "table", "inet", "uploads")


@contextlib.contextmanager
def egress_route(bed: Bed) -> Iterator[None]:
    """The fabric takes 10.96.0.90 and fd96::90 to node 1, where they are on no interface."""
    routes = [
        f"10.96.0.90/32 via {bed.cluster.node_address(1)}",
        f"fd96::90/128 via {bed.cluster.node_address(1, 6)}",
    ]
    bed.cluster.fabric.ip(*(f"route add {route}" for route in routes))
    try:
        yield
    finally:
        bed.cluster.fabric.ip(*(f"route del {route}" for route in routes))


@scenario("uploads")
def uploads(bed: Bed) -> None:
    """Pods' own connections: as they are, under the node's address, and under one that is on no
    interface.
    """
    sink = bed.cluster.client.start(sys.executable, "-ISc", SINK)
    sink.wait_for("listening")
    egress = ("snat ip to 10.96.0.90", "snat ip6 to fd96::90")
    for state in ("absent", "dns"):
        bed.want(state)
        for family in (4, 6):
            act = partial(upload, bed, family)  # the error comes to the right node; RPF drops it
            hangs = family == 4
            bed.transfers(f"routed, IPv{family}", act, 16, hangs)
            with translated(bed, "masquerade", "masquerade"):
                bed.transfers(f"masqueraded, IPv{family}", act, 16, hangs)
            with egress_route(bed), translated(bed, *egress):
                bed.transfers(f"to an address on no interface, IPv{family}", act, 16, hangs)
    sink.close()


def object_of(
    kind: str, name: str, namespace: Optional[str] = None, **fields: Any
) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": name, **fields.pop("metadata", {})}
    if namespace:
        metadata["namespace"] = namespace
    return {"apiVersion": "v1", "kind": kind, "metadata": metadata, **fields}


@contextlib.contextmanager
def namespace(bed: Bed, name: str, **labels: str) -> Iterator[None]:
    bed.cluster.apply(object_of("Namespace", name, metadata={"labels": labels}))
    try:
        yield
    finally:
        bed.cluster.kubectl("delete", "namespace", name, "--timeout=60s", timeout=70)


@scenario("nodeport 30040")
def node_port(bed: Bed) -> None:
    """A Service in somebody's namespace takes that port on every node: no daemon must be killed, no
    node deaf.
    """
    bed.want("dns")
    spec = {
        "type": "NodePort",
        "selector": {"app": "nobody"},
        "ports": [{"port": 80, "nodePort": 30040}],
        "ipFamilyPolicy": "RequireDualStack",
    }
    slice_of = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "addressType": "IPv4",
        "metadata": {
            "name": "taker",
            "namespace": "other",
            "labels": {"kubernetes.io/service-name": "taker"},
        },
        "ports": [{"port": 80}],
        "endpoints": [{"addresses": [pod_address(bed)]}],
    }
    with namespace(bed, "other"):
        bed.cluster.apply(
            object_of("Service", "taker", "other", spec={**spec, "selector": None}), slice_of
        )
        restarts = 0
        lowest = bed.cluster.size
        end = time.monotonic() + 60
        while time.monotonic() < end:
            restarts = max(restarts, bed.pmtud.restarts())
            lowest = min(lowest, bed.pmtud.ready())
            time.sleep(1)
        bed.row(
            "60 s, the service stands",
            f"{restarts} restarts, {lowest} ready",
            (restarts, lowest) == (0, bed.cluster.size),
        )
        bed.transfers(
            "downloads then", lambda: download(bed.cluster, SERVICES[0].address(4), 80), FLOWS
        )
    bed.pmtud.state = "unknown"  # whatever happened to it


def pod_address(bed: Bed) -> str:
    (pod, *_) = bed.cluster.get("pods", "-n", "default", "-l", "app=web")["items"]
    return str(pod["status"]["podIP"])


@contextlib.contextmanager
def user_folder(bed: Bed) -> Iterator[Callable[[str], str]]:
    """A shell in a folder with the user's two files, whose kubectl asks this cluster."""
    for image in re.findall(r"^ +image: (\S+)", bed.pmtud.manifest, re.MULTILINE):
        bed.pmtud.tag(image)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("pmtud.py", "daemonset.yaml"):
            shutil.copy(bed.pmtud.tree / name, folder)
        program = Path(folder, "bin", "kubectl")
        program.parent.mkdir()
        kubectl = f"{bed.cluster.programs}/kubectl --kubeconfig={WORK}/config/admin"
        words = f"nsenter --net=/run/netns/control {kubectl}"
        program.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        program.chmod(0o755)
        environ = {
            "PATH": f"{program.parent}:{VENV}/bin:{os.environ['PATH']}",
            "PIP_FIND_LINKS": str(wheel().parent),
            "PIP_NO_INDEX": "1",
        }
        yield lambda commands: run_long("bash", "-euc", commands, cwd=Path(folder), **environ)


def left_of_pmtud(bed: Bed) -> list[str]:
    """Objects of the cluster that have its name; a Service's endpoints go last."""
    kinds = "pods,daemonsets,services,endpointslices,configmaps,serviceaccounts"
    found = bed.cluster.kubectl("-n", "kube-system", "get", kinds, "-o", "name").split()
    return [name for name in found if "pmtud" in name]


@scenario("readme")
def readme(bed: Bed) -> None:
    """The README's own commands, word for word: deploy, uninstall, and the same by kustomize."""
    bed.want("absent")
    text = (bed.pmtud.tree / "README.md").read_text()
    blocks = re.findall(r"^```(?:\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (deploy,) = (block for block in blocks if "kubectl apply -f daemonset.yaml" in block)
    (uninstall,) = (block for block in blocks if "kubectl delete -f daemonset.yaml" in block)
    (kustomization,) = (block for block in blocks if block.startswith("# kustomization.yaml"))
    (apply,) = re.findall("`(kubectl apply .* -k .)`", text)
    with user_folder(bed) as shell:
        printed = shell(deploy)
        bed.pmtud.rolled_out("kube-system")
        bed.pmtud.state = "dns"
        bed.want("dns")
        good = "daemonset.apps/pmtud created" in printed
        bed.row("its commands", f"{deploy.count(chr(10))} lines", good)
        samples = bed.metrics(0)
        bed.row("metrics", f"{len(samples)} samples", "pmtud_received_total" in str(samples))
        shell(uninstall)
        bed.row("uninstall", "nothing left", bool(poll(lambda: not left_of_pmtud(bed), 30)))
        shell(f"cat >kustomization.yaml <<'EOF'\n{kustomization}EOF\n{apply}")
        bed.pmtud.rolled_out("kube-system")
        bed.row(
            "kustomize", f"{bed.pmtud.ready()} pods ready", bed.pmtud.ready() == bed.cluster.size
        )
        shell("kubectl delete -k .")
        poll(lambda: not left_of_pmtud(bed), 30)
    bed.pmtud.state = "unknown"


@scenario("exec check")
def exec_check(bed: Bed) -> None:
    """`kubectl exec ... check` has the daemon's own options, and nothing to complain of but what is
    wrong.
    """
    bed.want("dns")
    for pod in bed.pmtud.pods():
        command = [
            "exec",
            pod["metadata"]["name"],
            "-c",
            "pmtud",
            "--",
            "python",
            "/opt/pmtud/pmtud.py",
            "check",
        ]
        printed = bed.cluster.kubectl("-n", "kube-system", *command, "--json", check=False)
        findings = json.loads(printed)["checks"]
        failed = [str(item) for item in findings if item["status"] == "FAIL"]
        peers = [
            item["found"]
            for item in findings
            if item["check"] == "peers" and item["status"] == "OK"
        ]
        good = (
            not failed and len(peers) == 1 and peers[0].startswith(f"{2 * (bed.cluster.size - 1)} ")
        )
        result = f"{len(findings)} checks, {len(failed)} FAIL, {' '.join(peers)[:12]}"
        bed.row(pod["spec"]["nodeName"], result, good)
        bed.show(failed)


@scenario("pod security")
def pod_security(bed: Bed) -> None:
    """A namespace of level baseline admits no pod and only an event says so; privileged does."""
    bed.want("absent")
    level = "pod-security.kubernetes.io/enforce"

    def told() -> list[str]:
        events = bed.cluster.get("events", "-n", "secured")["items"]
        return [
            event["message"]
            for event in events
            if 'violates PodSecurity "baseline' in event["message"]
        ]

    with namespace(bed, "secured", **{level: "baseline"}):
        bed.pmtud.apply(bed.pmtud.manifest.replace("kube-system", "secured"), "secured")
        texts = poll(told, 20)
        pods = bed.cluster.get("pods", "-n", "secured")["items"]
        good = not pods and bool(texts) and "host namespaces" in texts[0]
        bed.row("baseline refuses, an event says why", f"{len(pods)} pods", good)
        bed.cluster.kubectl("label", "--overwrite", "namespace", "secured", f"{level}=privileged")
        bed.cluster.kubectl("-n", "secured", "rollout", "restart", "daemonset/pmtud")
        bed.pmtud.rolled_out("secured")
        bed.row("privileged admits", f"{bed.cluster.size} pods", True)


@scenario("dry run")
def dry_run(bed: Bed) -> None:
    """The API server takes every document of the manifest, those in comments too, and with the pods
    asking PyPI.
    """
    bed.want("absent")
    text = uncommented(bed.pmtud.manifest)
    strict = ("apply", "--dry-run=server", "--validate=strict", "-f", "-")
    with_pip = re.sub(r".*# wheel$\n", "", text.replace("#pip ", ""), flags=re.MULTILINE)
    for name, manifest in (("all documents", text), ("with pip", with_pip)):
        printed = bed.cluster.kubectl(*strict, input=manifest).splitlines()
        kinds = re.findall(r"^kind: ", manifest, re.MULTILINE)
        bed.row(name, f"{len(printed)} of {len(kinds)}", len(printed) == len(kinds) >= 5)
    broken = text.replace("terminationGracePeriodSeconds", "gracePeriod")
    refused = False
    try:
        bed.cluster.kubectl(*strict, input=broken)
    except CommandFailed as error:
        refused = "gracePeriod" in str(error)
    bed.row("a field that does not exist", "refused" if refused else "taken", refused)


# -- the API server: gone, forgetful, and with a thousand nodes


@contextlib.contextmanager
def ghost_nodes(bed: Bed, count: int) -> Iterator[None]:
    """Node objects without a machine, as large as real ones; without an operating system, so no pod is made for them.

    The fabric discards what is sent to them.
    """
    bed.cluster.fabric.ip("route add blackhole 10.250.0.0/16")
    images = [
        {"names": [f"registry.example/team/image-{i}@sha256:{i:064x}"], "sizeBytes": 10**8}
        for i in range(50)
    ]
    nodes = []
    for i in range(count):
        address = {"type": "InternalIP", "address": f"10.250.{i // 250}.{i % 250 + 1}"}
        nodes.append(
            object_of(
                "Node",
                f"ghost-{i}",
                metadata={"labels": {"ghost": "yes"}},
                status={"addresses": [address], "images": images},
            )
        )
    try:
        create_all(bed.cluster, nodes)
        yield
    finally:
        bed.cluster.kubectl("delete", "nodes", "-l", "ghost=yes", "--wait=false", timeout=300)
        bed.cluster.fabric.ip("route del blackhole 10.250.0.0/16")


CREATE = """
import http.client, json, ssl, sys
from concurrent.futures import ThreadPoolExecutor
authority, token, path, address = sys.argv[1:]
headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
def create(objects):
    connection = http.client.HTTPSConnection(address, 6443, context=ssl.create_default_context(cafile=authority))
    for item in objects:
        connection.request("POST", path, json.dumps(item), headers)
        answer = connection.getresponse()
        assert answer.status == 201, answer.read()
        answer.read()
objects = json.load(sys.stdin)
with ThreadPoolExecutor(4) as pool:
    list(pool.map(create, [objects[i::4] for i in range(4)]))
"""


def create_all(cluster: KubeCluster, nodes: Sequence[dict[str, Any]]) -> None:
    """Faster than kubectl, which creates one after the other and drops their status into the bin
    with each apply.
    """
    cluster.control.run(
        sys.executable,
        "-ISc",
        CREATE,
        f"{WORK}/config/ca.crt",
        "token-admin",
        "/api/v1/nodes",
        CONTROL,
        input=json.dumps(nodes),
        timeout=120,
    )


def peers_of(bed: Bed, node: int = 0) -> int:
    """How many peers a daemon says it has."""
    samples = bed.metrics(node)
    return int(sum(value for name, value in samples.items() if name.startswith("pmtud_peers{")))


@scenario("a node more")
def a_node_more(bed: Bed) -> None:
    """Deleted and added while the daemons watch; each knows within two seconds."""
    bed.want("kube")
    before = peers_of(bed)
    with ghost_nodes(bed, 1):
        bed.wait("known", lambda: peers_of(bed) == before + 1, 2)
    bed.wait("forgotten", lambda: peers_of(bed) == before, 2)


@scenario("api server gone")
def api_server_gone(bed: Bed) -> None:
    """For 20 s, and what it had told is compacted meanwhile: nothing is lost, and the watch goes on.

    One line for each daemon says that the server was gone; that a watch has to start anew (410) is no news.
    """
    bed.want("kube")
    before = peers_of(bed)
    said = [bed.pmtud.log(pod) for pod in bed.pmtud.pods()]
    address = SERVICES[0].address(4)
    bed.transfers("before", partial(download, bed.cluster, address, 80), FLOWS)
    stop("kube-apiserver", signal.SIGKILL)
    end = time.monotonic() + 20
    bed.transfers("it is gone", partial(download, bed.cluster, address, 80), FLOWS)
    time.sleep(max(0, end - time.monotonic()))
    compact(bed.cluster)
    start_again(bed.cluster, "kube-apiserver")
    bed.wait(
        "it is back", lambda: "ok" in bed.cluster.kubectl("get", "--raw=/readyz", check=False), 60
    )
    bed.row("peers", f"{peers_of(bed)}, were {before}", peers_of(bed) == before)
    with ghost_nodes(bed, 1):
        bed.wait("a new node is known", lambda: peers_of(bed) == before + 1, 30)
    bed.wait("and forgotten", lambda: peers_of(bed) == before, 2)
    more = [bed.pmtud.log(pod)[len(old) :] for pod, old in zip(bed.pmtud.pods(), said)]
    lines = [
        line for text in more for line in text.splitlines() if "WARNING" in line or "ERROR" in line
    ]
    good = len(lines) <= bed.cluster.size and not any("410" in line for line in lines)
    bed.row("warnings in the logs", str(len(lines)), good)
    bed.show(lines)


def compact(cluster: KubeCluster) -> None:
    """etcd forgets all but the newest revision: whoever goes on from an older one is told 410."""
    url = "http://127.0.0.1:2379/v3/kv/"
    newest = json.loads(cluster.control.run("curl", "-sS", f"{url}range", "-d", '{"key": "AA=="}'))
    command = json.dumps({"revision": newest["header"]["revision"], "physical": True})
    cluster.control.run("curl", "-sS", f"{url}compaction", "-d", command)


@scenario("token renewed")
def token_renewed(bed: Bed) -> None:
    """The key that signs service accounts' tokens is another one, so those that the daemons know are worth nothing.

    Kubelets put new ones into the pods; a daemon reads its file again with each connection.
    """
    bed.want("kube")
    before = peers_of(bed)
    pids = [bed.pmtud.pid(pod) for pod in bed.pmtud.pods()]
    stop("kube-apiserver", signal.SIGKILL)
    execute("openssl", "genrsa", "-out", f"{WORK}/config/accounts.key", "2048")
    start_again(bed.cluster, "kube-apiserver")
    bed.wait(
        "API server", lambda: "ok" in bed.cluster.kubectl("get", "--raw=/readyz", check=False), 60
    )
    bed.wait(
        "the old token is refused to each",
        lambda: all("401" in bed.pmtud.log(pod) for pod in bed.pmtud.pods()),
        30,
    )
    for node in bed.cluster.nodes:
        stop(f"kubelet-{node.name}")
        start_again(bed.cluster, f"kubelet-{node.name}")
    numbers = range(bed.cluster.size)
    with ghost_nodes(bed, 1):
        bed.wait(
            "a new node is known to all",
            lambda: all(peers_of(bed, i) == before + 1 for i in numbers),
            120,
        )
    bed.wait("and forgotten", lambda: peers_of(bed) == before, 2)
    after = [bed.pmtud.pid(pod) for pod in bed.pmtud.pods()]
    bed.row("the same processes", str(after), after == pids)


@scenario("1000 nodes")
def thousand_nodes(bed: Bed) -> None:
    """They join in one go: how late a daemon knows the last of them, what that costs, what it
    writes.
    """
    bed.want("kube")
    before = peers_of(bed)
    pod, *_ = bed.pmtud.pods()
    said = bed.pmtud.log(pod)
    used = bed.cpu_seconds(pod)
    start = time.monotonic()
    with ghost_nodes(bed, 1000):
        joined = time.monotonic() - start
        bed.row("they joined", f"within {joined:.0f} s", True)
        bed.wait("the last is known", lambda: peers_of(bed) == before + 1000, 5)
        poll(lambda: peers_of(bed) == before + 1000, 60)
        spent = bed.cpu_seconds(pod) - used
        bed.row("CPU, each change", f"{spent:.1f} s", spent < 10)
        lines = len(bed.pmtud.log(pod)[len(said) :].splitlines())
        bed.row("log lines", str(lines), lines < 60)
        bed.transfers(
            "downloads", partial(download, bed.cluster, SERVICES[0].address(4), 80), FLOWS
        )
        bed.memory(pod)
    bed.wait("all forgotten", lambda: peers_of(bed) == before, 30)
    negative = [name for name, value in bed.metrics(0).items() if value < 0]
    bed.row("totals below zero", str(len(negative)), not negative)


# -- pods that come and go


@contextlib.contextmanager
def steady_downloads(bed: Bed, rate: int = 16) -> Iterator[list[float]]:
    """That many new downloads a second, all path MTUs forgotten before each second; inf: not
    finished after 6 s.
    """
    seconds: list[float] = []
    stopped = threading.Event()
    address = SERVICES[0].address(4)
    sources = [bed.cluster.client_address(k) for k in range(1, rate + 1)]
    words = [sys.executable, "-ISc", CLIENT, address, "80", str(DOWNLOAD_BYTES), "6", *sources]

    def batch() -> None:
        found = [float(value) for value in json.loads(bed.cluster.client.run(*words))]
        seconds.extend(found + [math.inf] * (rate - len(found)))

    def repeat() -> None:
        with ThreadPoolExecutor() as pool:
            jobs = []
            while not stopped.wait(1):
                for host in bed.cluster.nodes + bed.cluster.pods:
                    host.sysctl("net.ipv4.route.flush", 1)
                jobs.append(pool.submit(batch))
        for job in jobs:
            job.result()

    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(repeat)
        try:
            yield seconds
        finally:
            stopped.set()
            job.result()


@scenario("rolling update")
def rolling_update(bed: Bed) -> None:
    """One node after the other, under 16 new downloads a second: late ones, but none lost."""
    bed.want("dns")
    with steady_downloads(bed) as seconds:
        start = time.monotonic()
        bed.cluster.kubectl("-n", "kube-system", "rollout", "restart", "daemonset/pmtud")
        bed.pmtud.rolled_out("kube-system")
        took = time.monotonic() - start
    late = [value for value in seconds if value > 0.3]
    lost = [value for value in seconds if value == math.inf]
    bed.row("all pods new", f"{took:.0f} s", took < 60)
    bed.row(
        "downloads meanwhile",
        f"{len(seconds)}, {len(late)} late, {len(lost)} lost",
        bool(seconds) and not lost,
    )


@scenario("a pod deleted")
def a_pod_deleted(bed: Bed) -> None:
    bed.want("dns")
    (pod, *_) = bed.pmtud.pods()
    with steady_downloads(bed) as seconds:
        start = time.monotonic()
        bed.cluster.kubectl("-n", "kube-system", "delete", "pod", pod["metadata"]["name"])
        bed.pmtud.rolled_out("kube-system")
        took = time.monotonic() - start
    lost = [value for value in seconds if value == math.inf]
    bed.row(
        "a new one", f"{took:.0f} s, {len(lost)} of {len(seconds)} lost", bool(seconds) and not lost
    )


@scenario("runtime restarted")
def runtime_restarted(bed: Bed) -> None:
    """containerd, then the kubelet: the daemons do not notice."""
    bed.want("dns")
    before = [bed.pmtud.pid(pod) for pod in bed.pmtud.pods()]
    for name in ("containerd-node1", "kubelet-node1"):
        with steady_downloads(bed) as seconds:
            stop(name)
            time.sleep(2)
            start_again(bed.cluster, name)
            time.sleep(15)
        late = [value for value in seconds if value > 1]
        good = bed.pmtud.ready() == bed.cluster.size and not late
        bed.row(name, f"{bed.pmtud.ready()} ready, {len(late)} of {len(seconds)} late", good)
    after = [bed.pmtud.pid(pod) for pod in bed.pmtud.pods()]
    bed.row("the same processes", str(after), after == before)


@scenario("flood")
def flood(bed: Bed) -> None:
    """Spoofed errors, each about another flow: the pod stays below its limit, and then does its
    work as before.
    """
    bed.want("dns")
    (pod, *_) = bed.pmtud.pods()
    packets = [
        mtu_error(
            V4,
            src=f"10.8.{n % 250}.{n // 250 % 250}",
            dst=SERVICES[0].address(4),
            quoted_src=SERVICES[0].address(4),
            quoted_dst=f"198.18.{n // 250 % 250}.{n % 250}",
            transport=tcp_start(80, 1024 + n),
            mtu=1400,
        )
        for n in range(20_000)
    ]
    for _ in range(3):
        inject(bed.cluster.router, 4, packets, gap=0)
    for pod in bed.pmtud.pods():
        bed.memory(pod)
    bed.row("restarts", str(bed.pmtud.restarts()), not bed.pmtud.restarts())
    time.sleep(2)
    bed.transfers(
        "downloads then", partial(download, bed.cluster, SERVICES[0].address(4), 80), FLOWS
    )


# What .ci/run has time for
SHORT = ("services", "kube:nodes", "calico ebpf", "nodeport 30040", "exec check")


def run_scenarios(word: str, tree: Path, short: bool) -> int:
    """Print the table; the exit status."""
    titles = SHORT if short else tuple(SCENARIOS)
    chosen = {title: SCENARIOS[title] for title in titles if word in title}
    if not chosen:
        raise Trouble(f"no scenario has {word!r} in its name; there are: {', '.join(SCENARIOS)}")
    bed = Bed(KubeCluster.standing(), tree)
    bed.find_pods()
    start = time.monotonic()
    for bed.title, function in chosen.items():
        bed.since = time.monotonic()
        try:
            function(bed)
        except Exception:
            traceback.print_exc()
            bed.row("the scenario itself", "", False)
            bed.pmtud.state = "unknown"
        finally:
            for process in bed.cluster.processes:
                process.close()
    print(f"{bed.done} results, {bed.failed} failed, {time.monotonic() - start:.0f} s")
    return int(bed.failed > 0)


# -----------------------------------------------------------------------------
# Section: command line


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="cluster.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="bring the cluster up")
    up.add_argument("--nodes", type=int, default=3, metavar="N", help="how many nodes (default: 3)")
    up.add_argument(
        "--proxy", choices=("iptables", "nftables"), default="iptables", help="kube-proxy's mode"
    )
    build = commands.add_parser("build", help="make what `up` needs, which takes long")
    for command in (build, up):
        command.add_argument(
            "--bin", type=Path, metavar="DIR", help="the programs, instead of building them"
        )
    up.add_argument(
        "--keep", action="store_true", help="leave what there is where a step fails, to look at it"
    )
    test = commands.add_parser("test", help="run the scenarios")
    test.add_argument(
        "-k", default="", metavar="WORD", help="only scenarios with this in their name"
    )
    test.add_argument("--short", action="store_true", help=f"only {', '.join(SHORT)}")
    test.add_argument(
        "--tree",
        type=Path,
        default=ROOT,
        metavar="DIR",
        help="the checkout to test (default: this one)",
    )
    for name, text in (
        ("kubectl", "ask the API server"),
        ("sh", "run a command in a host: HOST COMMAND..."),
    ):
        commands.add_parser(name, help=text, add_help=False)
    commands.add_parser("down", help="remove the cluster")
    return top


def materials(given: Optional[Path]) -> tuple[Path, Path]:
    """The programs and the pods' image, and a wheel beside them."""
    with step("binaries"):
        programs = binaries(given)
    with step("pods' image"):
        image = pod_image()
    wheel()
    return programs, image


def up(options: argparse.Namespace) -> int:
    """Everything that `up` does, outside first; whatever goes wrong, nothing is left."""
    if cell():
        raise Trouble("it is up already: .ci/cluster.py down")
    close_cell()  # what a killed `up` left
    check_packages()
    start = time.monotonic()
    programs, image = materials(options.bin)
    try:
        open_cell(
            {"nodes": options.nodes, "proxy": options.proxy, "programs": str(programs.resolve())}
        )
        code = inside(["build", str(image)])
    except BaseException:
        close_cell()
        raise
    if code:
        if not options.keep:
            close_cell()
        return code
    print(f"up after {time.monotonic() - start:.0f} s: .ci/cluster.py test, kubectl, sh, down")
    return 0


def main_inside(argv: Sequence[str]) -> int:
    """The part of a command that runs in the cell."""
    command, *rest = argv
    if command == "furnish":
        furnish()
        return 0
    if command == "test":
        return run_scenarios(rest[0], Path(rest[1]), "--short" in rest)
    if command == "build":
        up_inside(KubeCluster.planned(), Path(rest[0]))
    elif command == "kubectl":
        program = str(KubeCluster.planned().programs / "kubectl")
        words = ["--net=/run/netns/control", program, f"--kubeconfig={WORK}/config/admin", *rest]
        os.execvp("nsenter", ["nsenter", *words])
    elif command == "sh":
        if not rest:
            raise Trouble(f"sh HOST COMMAND...; hosts: {' '.join(FIXED_HOSTS)} node1 node2 ...")
        os.execvp("nsenter", ["nsenter", f"--net=/run/netns/{rest[0]}", *(rest[1:] or ["bash"])])
    return 0


def main(argv: Sequence[str]) -> int:
    """Outside of the cell, unless it says otherwise."""
    if argv[:1] == ["--in-cell"]:
        return main_inside(argv[1:])
    passed_on = argv[:1] in (["kubectl"], ["sh"])  # whatever it is, their words are not ours
    options = parser().parse_args(argv[:1] if passed_on else argv)
    if os.geteuid():
        raise Trouble("must run as root: network namespaces, containers")
    if passed_on:
        return inside(argv)
    if options.command == "build":
        check_packages()
        materials(options.bin)
        return 0
    if options.command == "up":
        return up(options)
    if options.command == "down":
        close_cell()
        return 0
    short = ["--short"] if options.short else []
    return inside(["test", options.k, str(options.tree.resolve()), *short])


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Trouble as problem:
        sys.exit(f"cluster.py: {problem}")
    except KeyboardInterrupt:
        sys.exit(130)
