"""Math-Verify in its children: hostile answers, interrupts, threads, forks. Each test is named after its bug."""

import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from answers import algebra
from answers.algebra import counts
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


def test_hostile_answers_neither_raise_nor_hang_and_are_counted() -> None:
    before = counts()["equivalence_timeouts"]
    assert not any(equivalent_many([("x+2", answer) for answer in HOSTILE]))
    assert counts()["equivalence_timeouts"] > before
    assert equivalent("x+2", "2+x"), "the children must have been replaced"


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux tells the limits of another process")
def test_an_answer_may_not_eat_the_memory_of_the_machine() -> None:
    equivalent("x+4", "y")
    child = algebra.idle_children().get()
    try:
        child.judge("x+1", "y")
        assert resource.prlimit(child.process.pid, resource.RLIMIT_AS)[0] == algebra.MEMORY_BYTES
    finally:
        algebra.idle_children().put(child)


def test_an_unreadable_answer_is_a_counted_metric() -> None:
    before = counts()["equivalence_unparsed"]
    assert not equivalent("x+3", r"\frac{{{ %% \foo")
    assert counts()["equivalence_unparsed"] == before + 1


# ------------------------------------------------------------------------------------------------ children


def test_a_child_killed_from_outside_does_not_make_the_next_verdict_false() -> None:
    equivalent("x+10", "y")
    children = algebra.idle_children()
    everyone = [children.get() for _ in range(algebra.number_of_children())]
    for child in everyone:
        child.process.send_signal(signal.SIGKILL)
        child.process.wait()
        children.put(child)
    assert equivalent("x+11", "11+x")


@pytest.mark.parametrize("ready", [True, False])
def test_a_child_killed_in_the_middle_leaves_no_wrong_verdict_and_ends_no_run(ready: bool) -> None:
    """By the system, short of memory, or by an administrator: the verdict would have been kept for the whole run."""
    child = algebra.Child()
    if ready:
        child.judge("x+1", "y")
    first = child.process
    first.send_signal(signal.SIGSTOP)  # so that it dies over the pair, however fast the machine
    killer = threading.Timer(0.3, first.kill)
    killer.start()
    assert child.judge("x+1", "1+x") == b"="
    assert first.returncode == -signal.SIGKILL and child.process is not first
    child.process.kill()


def test_a_pair_that_exceeds_its_time_is_not_asked_again() -> None:
    child = algebra.Child()
    child.judge("x+1", "y")
    started, start = [], child.start
    child.start = lambda: (started.append(1), start())  # type: ignore[method-assign, assignment]
    assert child.judge("5", "9^{9^{9^9}}") == b"" and len(started) == 1
    child.process.kill()


def test_an_interrupt_does_not_leave_a_verdict_for_the_next_pair() -> None:
    child = algebra.Child()
    assert child.judge("x+1", "1+x") == b"="
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            child.judge("5", "9^{9^{9^9}}")
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert child.judge("x+1", "1+x") == b"="
    child.process.kill()


def test_a_missing_math_verify_is_not_a_reward_of_zero(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "math_verify.py").write_text("raise ImportError('broken installation')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="pip install math-verify"):
        algebra.Child().judge("x", "x+0")


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


def test_threads_that_ask_first_do_not_each_start_a_set_of_children() -> None:
    script = (
        "import threading; from answers import algebra, equivalence; start, started = algebra.Child.start, []; "
        "algebra.Child.start = lambda child: (started.append(child), start(child)); "
        "threads = [threading.Thread(target=equivalence.equivalent, args=('x+1', f'{k}+x')) for k in range(9)]; "
        "[thread.start() for thread in threads]; [thread.join() for thread in threads]; "
        "assert len(started) == algebra.number_of_children(), len(started)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


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
        "from answers import algebra, equivalence; equivalence.equivalent('x+1', '1+x'); "
        "print(*[algebra.idle_children().get().process.pid for _ in range(algebra.number_of_children())])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, cwd=ROOT)
    for pid in map(int, done.stdout.split()):
        for _ in range(100):
            if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]:
                break
            threading.Event().wait(0.1)
        else:
            pytest.fail(f"child {pid} is still running")
