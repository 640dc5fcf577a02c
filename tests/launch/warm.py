"""Starts program.py without importing torch each time: every process is forked from one that has
done so.

Real processes, the agent of torchrun among them, with real signals; only `exec` is left out. What
must be seen with a new interpreter is started cold (see `programs.Program`).
"""

import contextlib
import ctypes
import faulthandler
import functools
import gc
import importlib
import json
import multiprocessing.context
import multiprocessing.popen_fork
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

HERE = Path(__file__).parent
PROGRAM = str(HERE / "program.py")
FORKED_S = 0.3  # an agent has forked all its ranks by then


class Warm:
    """What `subprocess.Popen` is for a program that was started cold."""

    server = None

    def __init__(self, request):
        self.returncode = None
        self.pid = self._ask({"start": request})

    def poll(self):
        if self.returncode is None:
            self.returncode = self._ask({"wait": self.pid})
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    @classmethod
    def _ask(cls, what):
        if cls.server is None:
            cls.server = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        cls.server.stdin.write(json.dumps(what) + "\n")
        cls.server.stdin.flush()
        return json.loads(cls.server.stdout.readline())

    @classmethod
    def end(cls):
        if cls.server is not None:
            cls.server.stdin.close()
            cls.server.wait()
            cls.server.stdout.close()
            cls.server = None


def serve():
    """In the server: fork what is asked for, and tell how it ended, until nobody asks any more."""
    for name in ("torch.distributed.run", "distaccum.launch", "distaccum.metrics.sweep"):
        importlib.import_module(name)

    for line in sys.stdin:
        asked = json.loads(line)
        if "start" in asked:
            answer = _fork(functools.partial(_program, **asked["start"]))
        else:
            pid, status = os.waitpid(asked["wait"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        print(json.dumps(answer), flush=True)


def _fork(body):
    pid = os.fork()
    if not pid:
        os.setsid()
        _exit_with(body)
    return pid


def _exit_with(body):
    """As the interpreter ends."""
    code = 1
    try:
        _as_after_exec()
        body()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _as_after_exec():
    faulthandler.disable()
    for number in (
        signal.SIGTERM,
        signal.SIGHUP,
        signal.SIGQUIT,
        signal.SIGUSR1,
        signal.SIGUSR2,
        signal.SIGCHLD,
    ):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _program(starter, args, folder, environment, output, host):
    if host is not None:
        _enter(**host)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (file, 1), (file, 2)):
        os.dup2(source, target)
    os.closerange(3, 256)
    sys.stdin = os.fdopen(0)
    sys.stdout = os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w", buffering=1)
    sys.__stderr__ = sys.stderr
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    _patch()
    if starter:
        import torch.distributed.run

        sys.argv = [torch.distributed.run.__file__]
        torch.distributed.run.main([*starter, PROGRAM, *args])
    else:
        _main(args)


def _enter(network, hosts_file, name):
    """Be on another host from here on: its network, its /etc/hosts, its name. Needs root."""
    libc = ctypes.CDLL(None, use_errno=True)

    def must(code):
        if code:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    new_mounts, new_names, private_below, bind = 0x20000, 0x4000000, 0x44000, 0x1000
    with open(f"/run/netns/{network}") as file:
        must(libc.setns(file.fileno(), 0))
    must(libc.unshare(new_mounts | new_names))
    must(libc.mount(b"none", b"/", None, private_below, None))
    must(libc.mount(hosts_file.encode(), b"/etc/hosts", None, bind, None))
    socket.sethostname(name)


def _main(args):
    sys.argv = [PROGRAM, *args]
    runpy.run_path(PROGRAM, run_name="__main__")


def _patch():
    """The two places in which launchers start an interpreter."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    SubprocessHandler._popen = lambda self, args, env: _Rank(args, env)
    multiprocessing.context.SpawnProcess._Popen = staticmethod(_Spawned)


class _Rank:
    """A rank of torchrun, as far as its agent asks."""

    def __init__(self, args, env):
        self.returncode = None

        def body():
            gc.freeze()  # what the agent holds is not for this process to close
            # The agent's store resolves names while ranks connect to it. A rank that is forked in
            # that moment finds the resolver locked for ever, so that none connects before all are
            # forked.
            time.sleep(FORKED_S)
            os.environ.clear()
            os.environ.update(env)
            _main(args[args.index(PROGRAM) + 1 :])

        self.pid = _fork(body)

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout=None):
        end = time.monotonic() + (timeout or 1e9)
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("rank", timeout)
            time.sleep(0.01)
        return self.returncode


class _Spawned(multiprocessing.popen_fork.Popen):
    """A process of the start method "spawn"."""

    def _launch(self, process):
        bootstrap = process._bootstrap

        def fresh(parent_sentinel):
            _as_after_exec()
            return bootstrap(parent_sentinel=parent_sentinel)

        process._bootstrap = fresh
        try:
            super()._launch(process)
        finally:
            del process._bootstrap


if __name__ == "__main__":
    serve()
