"""Work in a child process: its memory is given back when it ends, and its crash is an error message.

A converter loads gigabytes, prints what it likes and may die in native code. It runs in a fresh interpreter (never
a fork: torch and OpenVINO have threads), found by module and name, spoken to over two pipes that only the two hold.
The child's stdout and stderr go to a log, so the parent's stdout stays clean. It dies with its parent.
"""

from __future__ import annotations

import os
import pickle  # between a process and its own child only; never for anything read from a file
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from edgesd.errors import EdgesdError, SetupError
from edgesd.files import disk_errors

_POLL_S, _TAIL_LINES = 0.05, 12
_RETRY = "Run the same command again (finished stages are kept); if it repeats, choose another precision or target"


@dataclass(frozen=True)
class Ran:
    """What a function returned, the seconds it took, and the most memory its process held while it ran."""

    value: Any
    seconds: float
    peak_bytes: int


def in_child(
    function: Callable[..., Any],
    *args: Any,
    label: str = "",
    memory_limit_bytes: int | None = None,
    log: Path | None = None,
) -> Ran:
    """Runs one function in a child of its own. See `Child`, and use it where steps share a long import."""
    with Child(memory_limit_bytes=memory_limit_bytes, log=log) as child:
        return child.run(function, *args, label=label)


class Child:
    """A fresh Python process that runs functions one after the other; what they import stays until it is closed.

    memory_limit_bytes: resident memory beyond which it is killed (polled, so a burst may pass). log: a file that
    receives all it prints; without one, only the last lines are shown, and only after a failure.
    Belongs to the thread that made it: on Linux the child dies with that thread.
    """

    def __init__(self, *, memory_limit_bytes: int | None = None, log: Path | None = None) -> None:
        self._limit = memory_limit_bytes
        self._log: Any = open(log, "a+b") if log is not None else tempfile.TemporaryFile()  # noqa: SIM115
        code = f"import sys; sys.path[:] = {sys.path!r}; from edgesd.child import _serve; _serve({os.getpid()})"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,  # Ctrl-C reaches the parent alone, which then ends the child
        )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, function: Callable[..., Any], *args: Any, label: str = "") -> Ran:
        """Calls a module-level function with picklable arguments; it returns something small and picklable.

        label: what a person would call this step, for messages. An EdgesdError raised there is raised here. Any other
        exception, and the death of the child, is a SetupError with the last lines it printed.
        """
        name = getattr(function, "__qualname__", repr(function))
        if getattr(function, "__module__", "") == "__main__" or "<locals>" in name or "<lambda>" in name:
            raise TypeError(f"{name} cannot be found by name in another process")
        label = label if label != "" else name
        request = pickle.dumps((function, args))
        self._log.seek(0, os.SEEK_END)
        said_before = self._log.tell()
        with Watch(self._process.pid, self._limit) as watch:
            try:
                _send(self._process.stdin, request)
                error, value, seconds, peak = pickle.loads(pickle.load(self._process.stdout))  # type: ignore[arg-type]
            except (EOFError, BrokenPipeError, pickle.UnpicklingError):
                raise self._death(label, watch, said_before) from None
            except BaseException:
                self.close()
                raise
        if isinstance(error, EdgesdError):
            raise error
        if error is not None:
            raise SetupError(f"{label} failed: {error}", "a step that finishes", _RETRY + self._tail(said_before))
        return Ran(value, seconds, max(peak, watch.peak_bytes))

    def close(self) -> None:
        """Ends the child and all it started, idle or not; its memory is free when this returns."""
        if self._process.returncode is None:
            with suppress(OSError):
                if sys.platform == "win32":
                    self._process.kill()
                else:
                    os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            with suppress(OSError):
                pipe.close()  # type: ignore[union-attr]

    def _death(self, label: str, watch: Watch, said_before: int) -> SetupError:
        code = self._process.wait()
        used = f"its memory reached {watch.peak_bytes / 1e9:.2f} GB"
        if watch.over_limit:
            do = "Allow more memory, or choose a smaller size or precision"
            return SetupError(f"{label} was stopped: {used}", f"up to {(self._limit or 0) / 1e9:.2f} GB", do)
        how = f"ended with exit code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
        if code == -getattr(signal, "SIGKILL", 9):
            how += ", which most often means that the system ran out of memory"
        return SetupError(f"{label} {how}; {used}", "a step that finishes", _RETRY + self._tail(said_before))

    def _tail(self, start: int) -> str:
        """The last lines that the current step printed, to end a message with; empty if it said nothing."""
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(start, self._log.tell() - 8192))
        lines = [line for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        shown = "\n".join("".join(c if c.isprintable() else " " for c in line) for line in lines[-_TAIL_LINES:])
        return f". It said last:\n{shown}" if shown else ""


class Watch:
    """Polls a process's resident memory from outside: its peak survives its death, and it is killed at the limit.

    whole_tree: counts, and kills, what it started too. Pages that several of them hold count once (on Linux): a process
    that forks would look twice its size for as long as its copy lives.
    """

    def __init__(self, pid: int, limit_bytes: int | None, *, whole_tree: bool = False) -> None:
        self.peak_bytes, self.over_limit = 0, False
        self._pid, self._limit, self._whole_tree = pid, limit_bytes, whole_tree
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _poll(self) -> None:
        import psutil

        with suppress(psutil.Error):  # it ended
            root = psutil.Process(self._pid)
            while not self._done.is_set():
                tree = [root, *(root.children(recursive=True) if self._whole_tree else ())]
                held = root.memory_info().rss + sum(map(_resident, tree[1:]))
                if len(tree) > 1 and held > self.peak_bytes:
                    held = sum(map(_own_share, tree))  # dearer to read: only where it may matter
                self.peak_bytes = max(self.peak_bytes, held)
                if self._limit is not None and self.peak_bytes > self._limit:
                    self.over_limit = True
                    for process in tree:
                        with suppress(psutil.Error):
                            process.kill()
                    return
                self._done.wait(_POLL_S)


def _resident(process: Any) -> int:
    import psutil

    with suppress(psutil.Error):
        return process.memory_info().rss
    return 0


def _own_share(process: Any) -> int:
    """Resident pages, each divided by the processes that hold it; all resident ones where the system does not say."""
    with suppress(OSError, StopIteration), open(f"/proc/{process.pid}/smaps_rollup", "rb") as file:
        return int(next(line for line in file if line.startswith(b"Pss:")).split()[1]) * 1024
    return _resident(process)


# ---- in the child ----------------------------------------------------------------------------------------------


def _send(pipe: Any, message: bytes) -> None:
    pickle.dump(message, pipe)  # bytes in bytes: the pipe stays in step even if the message does not load
    pipe.flush()


def _serve(parent: int) -> None:
    """The child's life: answers requests until its stdin ends."""
    requests_in, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    silence = os.open(os.devnull, os.O_RDONLY)
    os.dup2(silence, 0)
    os.dup2(2, 1)  # what native code prints to stdout lands in the log, too
    sys.stdout = sys.stderr
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests_in, requests), daemon=True).start()
    _die_with(parent)
    while True:
        _send(answers, _answer(requests.get()))


def _listen(pipe: BinaryIO, requests: queue.SimpleQueue[bytes]) -> None:
    """Ends the process the moment the parent's end of the pipe closes, whatever the main thread is doing."""
    with suppress(EOFError, OSError):
        while True:
            requests.put(pickle.load(pipe))
    os._exit(1)


def _die_with(parent: int) -> None:
    """On Linux the kernel ends the child too: native code may hold the interpreter's lock, and with it `_listen`."""
    if sys.platform == "linux":
        import ctypes

        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)


def _answer(request: bytes) -> bytes:
    """(error, value, seconds, peak bytes), pickled. error: an EdgesdError, or words for any other exception."""
    error: EdgesdError | str | None = None
    value = None
    _forget_peak()
    start = time.perf_counter()
    try:
        with disk_errors("this step's files", "Free some space; finished stages are kept"):
            function, args = pickle.loads(request)
            value = function(*args)
        pickle.dumps(value)
    except EdgesdError as raised:
        error, value = raised, None
    except BaseException as raised:  # SystemExit, too: some converters call it
        traceback.print_exc()
        error, value = f"{type(raised).__name__}: {raised}"[:500], None
    return pickle.dumps((error, value, time.perf_counter() - start, _peak_bytes()))


def _forget_peak() -> None:
    with suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _peak_bytes() -> int:
    """The most resident memory since `_forget_peak` (Linux) or since the start; 0 where nobody says."""
    with suppress(OSError, StopIteration), open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith("VmHWM:")).split()[1]) * 1024
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 0
