"""Child processes: results and errors come back, memory and crashes do not, and nobody outlives the parent."""

import ctypes
import operator
import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from edgesd.child import Child, Watch, in_child
from edgesd.errors import DataError, SetupError


def say_and(then, *args):
    print("to stdout, by Python")
    os.system("echo to stdout, by a program")
    print("to stderr", file=sys.stderr)
    return then(*args)


def refuse():
    raise DataError("a truncated file", "a whole one", "Get it again")


def fail():
    raise ValueError("opset 99 is not known")


def full_disk():
    with open("/dev/full", "wb") as file:
        file.write(b"x" * 100_000)


def hold(megabytes):
    return int(np.ones(megabytes << 17).sum())


def kill(number):
    os.kill(os.getpid(), number)


def give_a_lambda():
    return lambda: None


def remember(value):
    previous, remember.value = getattr(remember, "value", None), value
    return previous


def read_stdin():
    return sys.stdin.read()


def start_a_sleeper():
    return subprocess.Popen(["sleep", "600"]).pid


def gone(pid, patience_s=10.0):
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


@pytest.fixture(scope="module")
def child():
    with Child() as child:
        yield child


def test_a_function_runs_elsewhere_and_gives_its_value(child):
    ran = child.run(operator.add, 2, 3)
    assert ran.value == 5
    assert ran.seconds > 0
    assert 1e6 < ran.peak_bytes < 1e9
    assert child.run(os.getpid).value != os.getpid()


def test_steps_share_one_process(child):
    child.run(remember, "first")
    assert child.run(remember, "second").value == "first"


def test_the_peak_is_of_one_step(child):
    before = child.run(hold, 1).peak_bytes
    large = child.run(hold, 200).peak_bytes
    assert large - before > 190 << 20
    if sys.platform == "linux":
        assert child.run(hold, 1).peak_bytes < large - (150 << 20)


def test_nothing_it_prints_reaches_our_stdout(child, capfd):
    assert child.run(say_and, operator.add, 1, 1).value == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err == ""


def test_a_log_keeps_all_it_prints(tmp_path):
    in_child(say_and, abs, 1, log=tmp_path / "log")
    said = (tmp_path / "log").read_text()
    assert "by Python" in said
    assert "by a program" in said
    assert "to stderr" in said


def test_an_error_of_ours_arrives_as_itself(child):
    with pytest.raises(DataError, match="truncated") as caught:
        child.run(refuse)
    assert caught.value.do == "Get it again"
    assert child.run(abs, -1).value == 1


def test_any_other_error_names_the_step_and_its_last_words(child):
    with pytest.raises(SetupError, match="export of unet failed: ValueError: opset 99") as caught:
        child.run(say_and, fail, label="export of unet")
    assert "by a program" in caught.value.do
    with pytest.raises(SetupError, match="SystemExit") as caught:
        child.run(sys.exit, 3)
    assert "by a program" not in str(caught.value)
    with pytest.raises(SetupError, match="give_a_lambda failed"):
        child.run(give_a_lambda)
    assert child.run(abs, -1).value == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_in_a_child_is_said(child):
    with pytest.raises(SetupError, match="no space left"):
        child.run(full_disk)


def test_it_has_no_stdin(child):
    assert child.run(read_stdin).value == ""


def test_what_cannot_be_found_by_name_is_refused(child):
    with pytest.raises(TypeError, match="cannot be found by name"):
        child.run(give_a_lambda())
    assert child.run(abs, -1).value == 1


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize(
    ("function", "argument", "phrase"),
    [
        (kill, signal.SIGKILL, "was killed by SIGKILL, which most often means .* out of memory"),
        (ctypes.string_at, 0, "was killed by SIGSEGV"),
        (os._exit, 7, "ended with exit code 7"),
    ],
)
def test_a_death_names_its_cause(function, argument, phrase):
    with pytest.raises(SetupError, match=f"lowering {phrase}"):
        in_child(function, argument, label="lowering")


def test_more_memory_than_allowed_ends_it():
    with pytest.raises(SetupError, match=r"reached [0-9.]+ GB. Allowed: up to 0.20 GB"):
        in_child(say_and, hold_and_wait, 400, memory_limit_bytes=200_000_000)


def hold_and_wait(megabytes):
    kept = np.ones(megabytes << 17)
    time.sleep(60)
    return kept.size


PARENT = """
import sys; sys.path[:] = {path!r}
import os, time
from edgesd.child import Child
child = Child()
print(child.run(os.getpid).value, flush=True)
child.run({busy})
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what processes share")
def test_a_forked_copy_counts_once():
    forks = "import os, time; held = b'x' * (300 << 20); child = os.fork(); time.sleep(0.6); child and os.wait()"
    process = subprocess.Popen([sys.executable, "-c", forks])
    with Watch(process.pid, None, whole_tree=True) as watch:
        process.wait()
    assert 300 << 20 < watch.peak_bytes < 400 << 20


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize("busy", ["time.sleep, 60", "sum, range(10**12)"])
def test_it_dies_with_its_parent(busy):
    code = PARENT.format(path=sys.path, busy=busy)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert psutil.pid_exists(pid)
        parent.kill()
    assert gone(pid)


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_ends_the_child_and_what_it_started():
    # In a process of its own: a stray Ctrl-C here would end the tests.
    code = PARENT.format(path=[*sys.path, os.path.dirname(__file__)], busy="time.sleep, 60")
    code = code.replace("child = Child()", "from test_child import start_a_sleeper; child = Child()")
    code = code.replace("getpid).value", "getpid).value, child.run(start_a_sleeper).value")
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        time.sleep(0.3)
        parent.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in parent.communicate(timeout=30)[1]
    assert len(pids) == 2
    assert all(gone(pid) for pid in pids)
