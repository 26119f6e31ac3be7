"""Math-Verify in its children: hostile answers, interrupts, threads, forks. Each test is named after its bug."""

import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from answers import algebra
from answers.equivalence import equivalent, equivalent_many

ROOT = Path(algebra.__file__).parents[1]

# ------------------------------------------------------------------------------------------ hostile answers

HOSTILE = [
    "9^{9^{9^9}}",
    "10!!!!!",
    r"\sqrt{" * 60 + "2" + "}" * 60,
    "{" * 190 + "1" + "}" * 190,
    "(" * 190 + "x" + ")" * 190,
    r"\frac{1}{" * 30 + "x" + "}" * 30,
    "9" * 1_000_000,
    r"\boxed{" * 100_000,
    "\x00",
    "\ud800\udfff",
    "\u202e\u0663²\U0001d7d7",
    "\\",
    "None",
    "nan",
    "$" * 399,
    r"\text{" * 60,
]


@pytest.mark.slow
def test_hostile_answers_neither_raise_nor_hang() -> None:
    assert not any(equivalent_many([("x+2", answer) for answer in HOSTILE]))
    assert equivalent("x+2", "2+x"), "the children must have been replaced"


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux tells the limits of another process")
def test_an_answer_may_not_eat_the_memory_of_the_machine() -> None:
    algebra.judge("x+1", "y")
    assert resource.prlimit(algebra.get_worker().pid, resource.RLIMIT_AS)[0] == algebra.MEMORY_BYTES


def test_an_unreadable_answer_equals_one() -> None:
    assert not equivalent("x+3", r"\frac{{{ %% \foo")
    assert algebra.judge("x+3", r"\frac{{{ %% \foo") == b"!"


# ------------------------------------------------------------------------------------------------ children


def end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """That of the thread of the tests, which asks it without the pool."""
    yield algebra.get_worker()
    end(algebra.get_worker())


def test_a_child_killed_from_outside_does_not_make_the_next_verdict_false(child: subprocess.Popen[bytes]) -> None:
    end(child)
    assert algebra.judge("x+11", "11+x") == b"="


@pytest.mark.parametrize("ready", [True, False])
def test_a_child_killed_in_the_middle_leaves_no_wrong_verdict_and_ends_no_run(
    ready: bool, child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the system, short of memory, or by an administrator: the verdict would have been kept for the whole run."""
    start, killed = subprocess.Popen, [child]

    def soon_killed(*command: Any, **settings: Any) -> subprocess.Popen[bytes]:
        if len(killed) == 1:
            killed.append(start(*command, **settings))
            stop(killed[1])
            return killed[1]
        return start(*command, **settings)

    def stop(victim: subprocess.Popen[bytes]) -> None:
        victim.send_signal(signal.SIGSTOP)  # so that it dies over the pair, however fast the machine
        threading.Timer(0.3, victim.kill).start()

    if ready:
        stop(child)
    else:
        end(child)
        monkeypatch.setattr(subprocess, "Popen", soon_killed)
    assert algebra.judge("x+1", "1+x") == b"="
    assert killed[-1].returncode == -signal.SIGKILL and algebra.get_worker() is not killed[-1]


@pytest.mark.parametrize("crash", [signal.SIGSEGV, signal.SIGABRT])
def test_a_child_that_crashes_leaves_no_wrong_verdict(crash: int, child: subprocess.Popen[bytes]) -> None:
    """The right answer was kept as wrong for the whole run."""
    child.send_signal(signal.SIGSTOP)  # so that it crashes over the pair
    threading.Timer(0.1, child.send_signal, [crash]).start()
    threading.Timer(0.2, child.send_signal, [signal.SIGCONT]).start()
    assert algebra.judge("x+1", "1+x") == b"="
    assert child.returncode == -crash


def test_a_pair_that_exceeds_its_time_is_not_asked_again(child: subprocess.Popen[bytes]) -> None:
    assert algebra.judge("5", "9^{9^{9^9}}") == b""
    assert child.returncode in (-signal.SIGPROF, 1)
    assert algebra._mine.child is child, "nobody had to start another one for it"


def test_an_interrupt_does_not_leave_a_verdict_for_the_next_pair() -> None:
    assert equivalent("x+1", "1+x")
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            equivalent("5+x", "9^{9^{9^8}}")
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert equivalent_many([(f"x+{k}", f"{k}+x") for k in range(50, 60)]) == [True] * 10


def test_a_missing_math_verify_is_not_a_reward_of_zero(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, child: subprocess.Popen[bytes]
) -> None:
    end(child)
    (tmp_path / "math_verify.py").write_text("raise ImportError('broken installation')")
    with monkeypatch.context() as broken, pytest.raises(RuntimeError, match="pip install math-verify"):
        broken.setenv("PYTHONPATH", str(tmp_path))
        algebra.judge("x", "x+0")


def test_threads_do_not_read_each_others_verdicts() -> None:
    wrong: list[int] = []

    def check(k: int) -> None:
        if not equivalent(f"x+{k}", f"{k}+x") or equivalent(f"x+{k}", f"{k + 1}+x"):
            wrong.append(k)

    threads = [threading.Thread(target=check, args=(k,)) for k in range(100, 130)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_fork_does_not_share_the_children_of_its_parent() -> None:
    equivalent("x+20", "y")
    pid = os.fork()
    if pid == 0:
        os._exit(0 if equivalent("x+21", "21+x") and not equivalent("x+21", "22+x") else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert equivalent("x+23", "23+x")


def test_a_program_read_from_stdin_or_without_main_guard_can_ask() -> None:
    script = "from answers.equivalence import equivalent; print('once'); assert equivalent('x+1', '1+x')"
    done = subprocess.run(
        [sys.executable, "-"],
        check=False,
        input=script.encode(),
        capture_output=True,
        cwd=ROOT,
    )
    assert (done.returncode, done.stdout) == (0, b"once\n"), done.stderr


def test_a_child_whose_parent_ends_first_prints_no_traceback() -> None:
    reader, writer = os.pipe()
    child = subprocess.Popen([sys.executable, "-P", algebra.__file__], stdout=writer, stderr=subprocess.PIPE)
    os.close(reader)
    os.close(writer)
    assert child.communicate()[1] == b""


def test_no_child_outlives_its_parent() -> None:
    script = (
        "from answers import algebra, equivalence; "
        "print(*{algebra.pool().submit(lambda: algebra.get_worker().pid).result() for _ in range(20)}); "
        "assert equivalence.equivalent('x+1', '1+x')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, cwd=ROOT)
    for pid in map(int, done.stdout.split()):
        for _ in range(100):
            if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]:
                break
            threading.Event().wait(0.1)
        else:
            pytest.fail(f"child {pid} is still running")
