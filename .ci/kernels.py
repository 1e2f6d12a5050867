#!/usr/bin/env python3
"""Boots stock Debian kernels in QEMU and proves the daemon inside.

    sudo python3 .ci/kernels.py                            all kernels, all scenarios: a table
    sudo python3 .ci/kernels.py --only 5.10 --scenario ipvs --keep
    sudo python3 .ci/kernels.py --only 6.12 --exec 'python3 -m pytest -q test_pmtud.py -k sigkill'

The scenarios are those of .ci/scenarios.py. Everything is a Debian package: one small root that all
kernels share, and each kernel with its modules.
    apt-get install qemu-system-x86 debootstrap e2fsprogs kmod python3-venv
The root and the kernels are kept in the folder .kernels beside the virtual environment (or in
$PMTUD_KERNELS). KVM is used where it works, else QEMU translates (TCG).

Exit status 1 if a scenario fails on any kernel; its log is shown. With --exec a command runs
instead, as root in a copy of this repository (or of --tree), without a way out; what it writes to
$OUT comes back in --out, and its exit status is this program's.
"""

from __future__ import annotations

import argparse
import ast
import fcntl
import hashlib
import lzma
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Callable, NamedTuple, Optional

HERE = Path(__file__).resolve().parent.parent
VENV = Path(os.environ.get("PMTUD_VENV", HERE / ".venv"))
CACHE = Path(os.environ.get("PMTUD_KERNELS", VENV.parent / ".kernels"))

KERNELS = {"5.10": "bullseye", "6.1": "bookworm", "6.12": "trixie", "newest": "forky"}
ROOT_SUITE = "bookworm"
ROOT_PACKAGES = (
    "python3",
    "iproute2",
    "nftables",
    "iptables",
    "ipset",
    "ipvsadm",
    "conntrack",
    "tcpdump",
    "kmod",
    "systemd",
    "systemd-sysv",
    "libpam-systemd",
    "dbus",
    "firewalld",
    "wireguard-tools",
    "dnsmasq-base",
    "iputils-ping",
    "curl",
    "openssl",
    "procps",
    "util-linux",
    "ethtool",
    "initramfs-tools",
    "zstd",
)
# Of a kernel's modules only what a virtual machine's network needs: the rest is nine tenths.
MODULE_FOLDERS = (
    "arch",
    "block",
    "crypto",
    "lib",
    "net",
    "drivers/block",
    "drivers/virtio",
    "drivers/char/hw_random",
    "drivers/net",
    "fs/ext4",
    "fs/jbd2",
    "fs/mbcache.ko",
    "fs/overlayfs",
    "fs/autofs",
    "fs/configfs",
)
NOT_MODULES = tuple(f"drivers/net/{name}" for name in ("ethernet", "wireless", "usb", "can", "phy"))
# What the initial RAM disk needs to find the root
BOOT_MODULES = (
    "virtio_pci",
    "virtio_blk",
    "ext4",
)
GUEST_MEMORY = "2G"
DISK_BYTES = 4 << 30  # both the root and the disk for results are sparse
BOOT_SECONDS = 300  # from power on to the first line of the job; 7 to 20 on an idle machine
# The whole life of the machine: unpack the job, run it, pack what it left, power off.
INIT = r"""#!/bin/bash
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export HOME=/root LANG=C.UTF-8 OUT=/job/out
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev 2>/dev/null
mkdir -p /dev/pts /dev/shm; mount -t devpts devpts /dev/pts; mount -t tmpfs shm /dev/shm
mount -t tmpfs run /run; mount -t tmpfs tmp /tmp; mount -t cgroup2 cgroup /sys/fs/cgroup
ip link set lo up; hostname guest
mkdir -p /job; mount -t tmpfs -o size=75% job /job; mkdir /job/out
stty -F /dev/ttyS1 raw -echo
tar -C /job -xf /dev/vdb
echo "<job starts>" >/dev/ttyS1
cd /job/tree; bash /job/command >/dev/ttyS1 2>&1 </dev/null
echo $? >/job/status
tar -C /job -cf /dev/vdc status out; sync
echo "<job ends>" >/dev/ttyS1
echo o >/proc/sysrq-trigger; sleep 60
"""
BOOTING = "did not reach its job"
RUNNING = "did not end its job"
ENDED = "ended its job"
LATE = "was not done with its job in time"
STARTS = b"<job starts>\n"
ENDS = b"<job ends>\n"
NOT_COPIED = {
    ".git",
    ".venv",
    ".kernels",
    "__pycache__",
    ".hypothesis",
    ".mypy_cache",
    ".ruff_cache",
}


class Failure(Exception):
    """What ends the program with a one-line message."""


# -----------------------------------------------------------------------------
# Section: root -- one small Debian that every kernel boots


def run(*argv: str, env: Optional[dict[str, str]] = None) -> str:
    """What the command wrote to its standard output. Failure with all that it printed."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise Failure(
            f"{' '.join(argv)}: exit status {done.returncode}\n{done.stdout}{done.stderr}"
        )
    return done.stdout


def run_shown(*argv: str) -> None:
    """Run a command for minutes: a terminal shows its last line, a file each hundredth."""
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if sys.stderr.isatty():
            print(f"\r\x1b[K{line.rstrip()[:100]}", end="", file=sys.stderr, flush=True)
        elif len(lines) % 100 == 0:
            say(line.rstrip())
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    if process.wait():
        raise Failure(f"{' '.join(argv)}: exit status {process.returncode}\n{''.join(lines[-20:])}")


def in_root(root: Path, *argv: str, mounts: str = "true") -> str:
    """Run a command in the root. What is mounted for it is gone when it ends."""
    script = f'mount -t proc proc "$0/proc" && {mounts} && exec chroot "$0" "$@"'
    environ = {**os.environ, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
    return run("unshare", "--mount", "sh", "-c", script, str(root), *argv, env=environ)


def say(text: str) -> None:
    """A line of progress, on the standard error: the standard output belongs to the command."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def step(text: str) -> Iterator[None]:
    """Say what takes time, and afterwards how much it took."""
    start = time.monotonic()
    say(f"{text} ...")
    yield
    say(f"{text}: {time.monotonic() - start:.0f} s")


def mirror() -> str:
    """Where this machine's apt gets Debian from."""
    targets = run(
        "apt-get",
        "indextargets",
        "--format",
        "$(REPO_URI)",
        "Created-By: Packages",
        "Origin: Debian",
    )
    for uri in targets.split():
        if "security" not in uri:
            return uri
    raise Failure("no Debian mirror in apt's lists: name one with --mirror, or run apt-get update")


def python_packages() -> list[str]:
    """What test_pmtud.py needs, read from its source, without the fuzzer's large library."""
    tree = ast.parse((HERE / "test_pmtud.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "REQUIREMENTS":
            return [name for name in ast.literal_eval(node.value) if not name.startswith("atheris")]
    raise Failure("test_pmtud.py has no REQUIREMENTS")


def install_python_packages(root: Path, venv: Path) -> None:
    """Into the root, for the root's Python, with a pip of this machine."""
    python = (root / "usr/bin/python3").readlink().name  # python3.11
    target = root / "usr/local/lib" / python / "dist-packages"
    run(sys.executable, "-m", "venv", "--clear", str(venv))
    platforms = ("--platform", "manylinux2014_x86_64", "--platform", "manylinux_2_28_x86_64")
    run(
        str(venv / "bin/python"),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--target",
        str(target),
        "--upgrade",
        "--only-binary=:all:",
        "--python-version",
        python.removeprefix("python"),
        *platforms,
        *python_packages(),
    )
    shutil.rmtree(venv)
    in_root(root, "python3", "-m", "compileall", "-q", f"/{target.relative_to(root)}")


def make_root(root: Path, source: str) -> None:
    """Debian with ROOT_PACKAGES, all kernels' sources, the tests' Python packages, INIT."""
    options = ["--variant=minbase", f"--include={','.join(ROOT_PACKAGES)}"]
    run_shown("unshare", "--mount", "debootstrap", *options, ROOT_SUITE, str(root), source)
    lines = [f"deb {source} {suite} main" for suite in {ROOT_SUITE, *KERNELS.values()}]
    (root / "etc/apt/sources.list").write_text("\n".join(lines) + "\n")
    install_python_packages(root, root.with_name("pip"))
    (root / "etc/initramfs-tools/conf.d/few").write_text("MODULES=list\nCOMPRESS=zstd\n")
    (root / "etc/initramfs-tools/modules").write_text("\n".join(BOOT_MODULES) + "\n")
    init = root / "usr/sbin/job"
    init.write_text(INIT)
    init.chmod(0o755)
    (root / "job").mkdir()


# -----------------------------------------------------------------------------
# Section: kernels -- a suite's newest kernel, pruned, with its initial RAM disk


class Kernel(NamedTuple):
    """What QEMU boots."""

    name: str  # as in KERNELS
    version: str  # what uname -r says
    image: Path
    initrd: Path


def kernel_packages(root: Path, suite: str) -> list[str]:
    """The packages of a suite's kernel: one up to trixie, four since."""
    found: list[str] = []
    waiting = [f"linux-image-amd64/{suite}"]
    while waiting:
        shown = in_root(root, "apt-cache", "show", "--no-all-versions", waiting.pop())
        for name in re.findall(
            r"\blinux-(?:image|modules|binary|base)-\d[\w.+~-]*-amd64(?= \(=)", shown
        ):
            if name not in found:
                found.append(name)
                waiting.append(name)
    return found


def unpack(root: Path, suite: str, folder: Path) -> None:
    """The files of a suite's kernel packages, in a folder; apt checks their signatures."""
    folder.mkdir()
    downloads = root / "var/cache/kernels"
    downloads.mkdir(exist_ok=True)
    names = kernel_packages(root, suite)
    in_root(
        root, "sh", "-c", 'cd /var/cache/kernels && exec apt-get -qq download "$@"', "-", *names
    )
    for package in downloads.iterdir():
        run("dpkg-deb", "-x", str(package), str(folder))
    shutil.rmtree(downloads)


def is_wanted(module: str) -> bool:
    """Whether a module, named by its path below kernel/, can matter in here."""
    if any(module.startswith(folder + "/") for folder in NOT_MODULES):
        return False
    return any(module.startswith(folder) for folder in MODULE_FOLDERS)


def move_modules(unpacked: Path, root: Path) -> str:
    """The modules that matter, from the unpacked packages into the root; their version."""
    (modules,) = [*unpacked.glob("lib/modules/*"), *unpacked.glob("usr/lib/modules/*")]
    for file in list((modules / "kernel").rglob("*.ko*")):
        if not is_wanted(str(file.relative_to(modules / "kernel"))):
            file.unlink()
        elif file.suffix == ".xz":  # a translated processor takes seconds to unpack each
            file.with_suffix("").write_bytes(lzma.decompress(file.read_bytes()))
            file.unlink()
    target = root / "usr/lib/modules" / modules.name
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(exist_ok=True)
    shutil.move(modules, target)
    return modules.name


def add_kernel(root: Path, name: str, folder: Path) -> None:
    """Put a kernel and its RAM disk into a folder, and its modules into the root."""
    unpacked = folder / "unpacked"
    unpack(root, KERNELS[name], unpacked)
    for file in ("vmlinuz", "config"):
        path, *_ = [*unpacked.glob(f"boot/{file}-*"), *unpacked.glob(f"usr/lib/modules/*/{file}")]
        shutil.move(path, folder / file)
    version = move_modules(unpacked, root)
    shutil.copy(folder / "config", root / f"boot/config-{version}")
    in_root(root, "depmod", version)
    in_root(root, "mkinitramfs", "-o", "/boot/initrd", version)
    shutil.move(root / "boot/initrd", folder / "initrd")
    shutil.rmtree(unpacked)
    (folder / "version").write_text(version)


# -----------------------------------------------------------------------------
# Section: cache -- made once, by one process at a time


def recipe() -> str:
    """Changes with everything that goes into the root."""
    parts = (
        INIT,
        ROOT_SUITE,
        ROOT_PACKAGES,
        KERNELS,
        MODULE_FOLDERS,
        NOT_MODULES,
        BOOT_MODULES,
        python_packages(),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def prepare(names: Sequence[str], source: Optional[str]) -> list[Kernel]:
    """The kernels by these names, and the image of their root; what is missing is made."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return [prepare_kernel(name, source) for name in names]


def prepare_kernel(name: str, source: Optional[str]) -> Kernel:
    """One kernel; the root's image is made again, because it holds the modules of all."""
    root = CACHE / "root"
    folder = CACHE / name
    stamp = CACHE / "recipe"
    if not stamp.exists() or stamp.read_text() != recipe():
        for old in (root, *(CACHE / kernel for kernel in KERNELS)):
            shutil.rmtree(old, ignore_errors=True)
        with step(f"making a root of Debian {ROOT_SUITE} in {CACHE}"):
            make_root(root, source or mirror())
        stamp.write_text(recipe())
    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        with step(f"fetching the kernel of Debian {KERNELS[name]}"):
            # A mirror may be weeks behind, and testing's index says that it ends after one.
            in_root(root, "apt-get", "-qq", "-o", "Acquire::Check-Valid-Until=false", "update")
            add_kernel(root, name, folder)
            make_image(root, CACHE / "root.img")
        (folder / "done").touch()
    return Kernel(name, (folder / "version").read_text(), folder / "vmlinuz", folder / "initrd")


def make_image(root: Path, image: Path) -> None:
    """An ext4 file system with the root's files."""
    in_root(root, "apt-get", "clean")
    new = image.with_suffix(".new")
    new.unlink(missing_ok=True)
    run(
        "mkfs.ext4",
        "-q",
        "-F",
        "-E",
        "root_owner=0:0",
        "-d",
        str(root),
        str(new),
        f"{DISK_BYTES >> 20}M",
    )
    new.rename(image)


# -----------------------------------------------------------------------------
# Section: machine -- one boot, one command, its output while it runs, and its files


class Ended(NamedTuple):
    """How a machine ended."""

    status: Optional[int]  # None: the machine itself failed
    why: str  # then: what happened
    late: bool  # then: the machine was well, and its job not done in time
    seconds: float


def qemu(kernel: Kernel, accelerator: str, *more: str) -> list[str]:
    """The command line of a machine; its console is the first serial line."""
    words = "console=ttyS0 root=/dev/vda rw init=/usr/sbin/job quiet panic=-1 fsck.mode=skip"
    # For speed:
    words += " mitigations=off init_on_alloc=0 audit=0 apparmor=0 nokaslr no_timer_check"
    words += " tsc=reliable"
    return [
        "qemu-system-x86_64",
        "-accel",
        accelerator,
        "-cpu",
        "max",
        "-m",
        GUEST_MEMORY,
        "-smp",
        "2",
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
        "-kernel",
        str(kernel.image),
        "-initrd",
        str(kernel.initrd),
        "-append",
        words,
        *more,
    ]


@cache
def accelerator(kernel: Kernel) -> str:
    """KVM if a kernel without a root gets as far as its first line with it, and soon; else TCG."""
    slow = "tcg,thread=multi"
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return slow
    argv = [
        *qemu(kernel, "kvm", "-serial", "stdio"),
        "-append",
        "console=ttyS0 panic=-1 root=/dev/none",
    ]
    try:
        shown = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=10, check=False
        ).stdout
    except subprocess.TimeoutExpired as problem:
        shown = problem.stdout or b""
    return "kvm" if b"Linux version" in shown else slow


def copy_tree(tree: Path, job: Path) -> None:
    """The tree, with its Python compiled for pytest: seconds here, two minutes translated."""
    shutil.copytree(tree, job / "tree", symlinks=True, ignore=shutil.ignore_patterns(*NOT_COPIED))
    script = (
        "cd /job/tree && python3 -m compileall -q . && test ! -e test_pmtud.py || "
        "python3 -m pytest -q --collect-only -p no:cacheprovider test_pmtud.py"
    )
    mounts = f'mount --bind {shlex.quote(str(job))} "$0/job"'
    in_root(CACHE / "root", "sh", "-c", script, mounts=mounts)


def pack(tree: Path, command: str, folder: Path) -> Path:
    """The job as a tar in the folder: the tree, and the command in a file of its own."""
    job = folder / "files"
    target = folder / "job"
    job.mkdir()
    copy_tree(tree, job)
    (job / "command").write_text(command + "\n")
    with tarfile.open(target, "w") as tar:
        tar.add(job, "")
    with open(target, "ab") as file:  # QEMU wants whole sectors
        file.truncate(-(-file.tell() // 4096) * 4096)
    shutil.rmtree(job)
    return target


Show = Callable[[bytes], object]  # takes a line that the job has printed


class Machine:
    """A booted kernel, for the length of a `with` block."""

    def __init__(self, kernel: Kernel, folder: Path) -> None:
        """The folder takes the job, the result and the console's log."""
        self.console = folder / "console"
        disks = [
            f"file={CACHE / 'root.img'},if=virtio,format=raw,snapshot=on",
            f"file={folder / 'job'},if=virtio,format=raw,readonly=on",
            f"file={folder / 'result'},if=virtio,format=raw",
        ]
        drives = [word for disk in disks for word in ("-drive", disk)]
        self._argv = qemu(
            kernel,
            accelerator(kernel),
            *drives,
            "-device",
            "virtio-rng-pci",
            "-serial",
            f"file:{self.console}",
            "-serial",
            "stdio",
        )

    def __enter__(self) -> Machine:
        # A session of its own: Ctrl-C in a terminal reaches this program only, which ends it.
        self._process = subprocess.Popen(
            self._argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def follow(self, show: Show, seconds: float) -> str:
        """Show what the job prints until the machine ends; what went wrong, if anything."""
        self._phase = BOOTING
        reader = threading.Thread(target=self._copy, args=(show,), daemon=True)
        reader.start()
        reader.join(BOOT_SECONDS)
        if reader.is_alive() and self._phase != BOOTING:
            reader.join(seconds)
        if reader.is_alive() and self._phase == RUNNING:
            return LATE
        return "" if self._phase == ENDED else self._phase

    def _copy(self, show: Show) -> None:
        pipe = self._process.stdout
        assert pipe is not None
        for line in iter(pipe.readline, b""):
            if line == STARTS:
                self._phase = RUNNING
            elif line == ENDS:
                self._phase = ENDED
            else:
                show(line)


KEEP = "PMTUD_KEEP_MACHINES"  # set by --keep


@contextmanager
def machine_folder() -> Iterator[Path]:
    """A folder for a machine's job, result and console; with --keep it stays, and is named."""
    name = tempfile.mkdtemp(prefix="pmtud-kernel-")
    try:
        yield Path(name)
    finally:
        if KEEP in os.environ:
            say(f"kept: {name}")
        else:
            shutil.rmtree(name)


def boot(
    kernel: Kernel, tree: Path, command: str, out: Optional[Path], show: Show, seconds: float
) -> Ended:
    """Run a command on a kernel."""
    start = time.monotonic()
    with machine_folder() as folder:
        pack(tree, command, folder)
        with open(folder / "result", "wb") as file:
            file.truncate(DISK_BYTES)
        with Machine(kernel, folder) as machine:
            why = machine.follow(show, seconds)
        taken = time.monotonic() - start
        if why:
            console = (
                machine.console.read_text(errors="replace") if machine.console.exists() else ""
            )
            late = why == LATE
            return Ended(
                None,
                f"Linux {kernel.version} {why}; the end of its console:\n{console[-3000:]}",
                late,
                taken,
            )
        return Ended(unpack_result(folder / "result", out), "", False, taken)


def unpack_result(disk: Path, out: Optional[Path]) -> int:
    """The job's exit status; its files go to the folder out."""
    with tarfile.open(disk, "r:") as tar:
        status = tar.extractfile("status")
        assert status is not None
        code = int(status.read())
        if out is not None:
            members = [member for member in tar.getmembers() if member.name.startswith("out/")]
            for member in members:
                member.name = member.name.removeprefix("out/")
            tar.extractall(out, members)
    return code


def boot_again(
    kernel: Kernel, tree: Path, command: str, out: Optional[Path], show: Show, seconds: float
) -> Ended:
    """The same, once more if the machine fails: under load one boot in thirty panics."""
    ended = boot(kernel, tree, command, out, show, seconds)
    if ended.status is None and not ended.late:
        say(f"{ended.why}\nOnce more:")
        ended = boot(kernel, tree, command, out, show, seconds)
    return ended


# -----------------------------------------------------------------------------
# Section: table -- kernel x scenario, filled in as results come


class Cell(NamedTuple):
    """What one scenario came to on one kernel."""

    state: str  # ok or FAIL
    text: str
    seconds: int
    log: str  # all that it printed


class Column:
    """The results of one kernel. take() is given each line that .ci/scenarios.py prints."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.planned: list[str] = []
        self.cells: dict[str, Cell] = {}
        self.log = ""

    def take(self, line: bytes) -> None:
        """PLAN and CELL lines are results, all others the log of the scenario that runs."""
        word, *fields = line.decode(errors="replace").rstrip("\n").split("\t")
        if word == "PLAN":
            self.planned += [name for name in fields if name not in self.planned]
        elif word == "CELL":
            name, state, text, seconds = fields
            self.add(name, Cell(state, text, int(seconds), self.log))
        else:
            self.log += line.decode(errors="replace")

    def add(self, name: str, cell: Cell) -> None:
        """One more cell; its log follows if it failed."""
        self.cells[name] = cell
        print(
            f"{self.kernel.version:26} {name:15} {cell.state:5} {cell.seconds:4d} s  {cell.text}",
            flush=True,
        )
        if cell.state != "ok":
            print(cell.log, flush=True)
        self.log = ""

    def left(self) -> list[str]:
        """The scenarios without a result."""
        return [name for name in self.planned if name not in self.cells]


def prove(kernel: Kernel, tree: Path, names: Sequence[str], seconds: float) -> Column:
    """Run scenarios, all if none is named; what a failing machine leaves gets a second one."""
    column = Column(kernel)
    for _ in range(2):
        command = shlex.join(["python3", ".ci/scenarios.py", *(column.left() or names)])
        ended = boot(kernel, tree, command, None, column.take, seconds)
        if ended.status is not None or ended.late:
            break
        say(ended.why)
    left = column.left() if column.planned else list(names) or ["boot"]
    for name in left:
        column.add(name, Cell("FAIL", "no result: see the log", 0, f"{column.log}{ended.why}"))
    return column


def as_markdown(columns: Sequence[Column]) -> str:
    """The table for the README."""
    names = list(dict.fromkeys(name for column in columns for name in column.cells))
    lines = [
        "| | " + " | ".join(column.kernel.version for column in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name in names:
        states = [column.cells[name].state if name in column.cells else "-" for column in columns]
        lines.append(f"| {name} | " + " | ".join(states) + " |")
    return "\n".join(lines)


def prove_all(kernels: Sequence[Kernel], tree: Path, names: Sequence[str], seconds: float) -> int:
    """0 if every scenario is proved on every kernel."""
    columns = [prove(kernel, tree, names, seconds) for kernel in kernels]
    print(as_markdown(columns))
    states = {cell.state for column in columns for cell in column.cells.values()}
    return 0 if states == {"ok"} else 1


# -----------------------------------------------------------------------------
# Section: command line


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """What the user wants."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=KERNELS,
        metavar="KERNEL",
        help=f"one of {', '.join(KERNELS)}; repeatable; default: all",
    )
    parser.add_argument(
        "--scenario", action="append", metavar="NAME", help="repeatable; default: all"
    )
    parser.add_argument(
        "--exec", metavar="COMMAND", help="run a shell command instead of the scenarios"
    )
    parser.add_argument(
        "--tree", type=Path, default=HERE, metavar="DIR", help="what to copy into the machine"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the files of $OUT go")
    parser.add_argument(
        "--seconds", type=float, default=1800, help="how long a machine may take; default 1800"
    )
    parser.add_argument(
        "--keep", action="store_true", help="keep the console and the files of each machine"
    )
    parser.add_argument(
        "--prepare", action="store_true", help="only fetch and make what the machines need"
    )
    parser.add_argument(
        "--mirror", metavar="URL", help="a Debian mirror, instead of the one in apt's lists"
    )
    return parser.parse_args(argv)


def execute(kernels: Sequence[Kernel], options: argparse.Namespace) -> int:
    """The exit status of the command; the worst of all kernels."""

    def show(line: bytes) -> None:
        sys.stdout.buffer.write(line)
        sys.stdout.flush()

    status = 0
    for kernel in kernels:
        ended = boot_again(kernel, options.tree, options.exec, options.out, show, options.seconds)
        if ended.status is None:
            raise Failure(ended.why)
        say(
            f"Linux {kernel.version} ({accelerator(kernel)}): "
            f"exit status {ended.status} after {ended.seconds:.0f} s"
        )
        status = max(status, ended.status)
    return status


def main(argv: Sequence[str]) -> int:
    """The exit status."""
    options = parse(argv)
    if options.keep:
        os.environ[KEEP] = "yes"
    kernels = prepare(options.only or list(KERNELS), options.mirror)
    if options.prepare:
        return 0
    if options.exec:
        return execute(kernels, options)
    return prove_all(kernels, options.tree, options.scenario or [], options.seconds)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Failure as failure:
        sys.exit(f"kernels.py: {failure}")
    except KeyboardInterrupt:
        sys.exit(130)
