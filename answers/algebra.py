r"""Whether two answers are the same by computer algebra: Math-Verify (LaTeX -> SymPy), in processes that can be killed.

SymPy can loop forever or eat all memory on a short string (`9^{9^{9^9}}`), and nothing inside a Python process stops it
reliably. So Math-Verify runs in a few long-lived children that the kernel kills at a deadline. A child is this very
file, started as a program: unlike a fork it inherits no CUDA context, thread or lock; unlike a `multiprocessing` spawn
it neither imports the parent's `__main__` (torch and all) nor needs one to exist. So torchrun, pytest, threads,
notebooks and `python -` all work, and this file stays cheap to import.
"""

import functools
import json
import logging
import os
import queue
import re
import resource
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

CPU_SECONDS = 2.0  # per comparison, in CPU time: a busy machine must not change a verdict
WALL_SECONDS = 60  # the same in real time, as a safety net, and the limit for a child to start
MEMORY_BYTES = 1 << 30  # address space of one child
SOMEBODY_ELSE = (-signal.SIGKILL, -signal.SIGTERM)  # exit codes of a child that no deadline and no answer has ended

# ------------------------------------------------------------ the child

FUNCTION = r"\\(?:frac|sqrt|sin|cos|tan|log|ln|times|cdot|div|bmod|pi)(?![A-Za-z])"
NAME = rf"(?!.*{FUNCTION})\s*[A-Za-z\\(][^-+*/^<>|]*"  # x, AB, f(2), S_{10}, \angle ABC, (x, y)
ARITHMETIC = rf"(?:[^A-Za-z\\]|{FUNCTION})*"


def right_hand_side(answer: str) -> str:
    """`f(2) = 5` and `2 + 3 = 5` -> `5`; a true equation, `x^2 + y^2 = 1`, stays."""
    *left, right = sides = re.split(r"(?<![<>!\\])=", answer)
    named = all(re.fullmatch(NAME, side) for side in left)
    return right if named or all(re.fullmatch(ARITHMETIC, side) for side in sides) else answer


@functools.lru_cache(maxsize=4096)
def parse_answer(answer: str) -> list[object]:
    r"""Math-Verify's reading: [SymPy object, text], or [text] if it cannot read the answer.

    Its units are off, because they take the variable c off `f(x) = bx + c`, and so is its search for any
    number in an unreadable answer, which reads `0.\overline{3}` as 0.
    """
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    normalization = NormalizationConfig(malformed_operators=True, nits=True, units=False, boxed="none")
    config = LatexExtractionConfig(boxed_match_priority=-1, normalization_config=normalization)
    return list(parse(f"${answer}$", [config], extraction_mode="first_match", parsing_timeout=None))


def verdict(first: str, second: str) -> bytes:
    """b"=" equal, b"!" not equal, b"?" at least one is unreadable.

    Math-Verify reads an equation as its right-hand side more readily on the answer's side than on the gold's;
    both orders must agree, so that the circle `x^2 + y^2 = 1` is not `1`.
    """
    from math_verify import verify
    from sympy.core.random import seed

    seed(0)  # SymPy tries equality at random points: a verdict must not depend on those before it
    if ("=" in first) != ("=" in second):
        first, second = right_hand_side(first), right_hand_side(second)
    if len(parse_answer(first)) < 2 or len(parse_answer(second)) < 2:
        return b"?"
    one, two = parse_answer(first), parse_answer(second)
    agree = functools.partial(verify, allow_set_relation_comp=True, timeout_seconds=None)
    return b"=" if agree(one, two) and agree(two, one) else b"!"


def serve() -> None:
    """The child's life: JSON pairs in, a byte of verdict out for each, until a deadline or end of input."""
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)  # what a library prints must not look like a verdict
    deadlines = (signal.SIGPROF, signal.SIGALRM)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, deadlines)  # a parent's masks and ignored signals survive exec
    for deadline in deadlines:
        signal.signal(deadline, signal.SIG_DFL)
    with suppress(ValueError, OSError):  # macOS refuses
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable()
    signal.alarm(WALL_SECONDS)
    ready = verdict("x", "y")  # imports everything
    signal.alarm(0)
    os.dup2(devnull, 2)
    replies.write(ready)
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        signal.alarm(WALL_SECONDS)
        reply = verdict(*json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        replies.write(reply)


# ------------------------------------------------------------ the parent


class Child:
    """One Math-Verify process, used by one thread at a time."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Returns at once; the first `judge` waits for the imports."""
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, "PYTHONHASHSEED": "0"},  # SymPy's choices follow the order of its sets
            start_new_session=True,  # Ctrl-C is for the parent, which may want verdicts while it saves
        )
        assert self.process.stdin and self.process.stdout
        self.requests, self.replies = self.process.stdin, self.process.stdout
        self.ready = False

    def restart(self) -> None:
        self.process.kill()
        self.process.wait()
        self.requests.close()
        self.replies.close()
        self.start()

    def judge(self, first: str, second: str) -> bytes:
        """A byte of `verdict`, or b"" if this pair killed the child; asked again, once, if somebody else did.

        Raises:
            RuntimeError: the child cannot start. A silent False here would make every reward 0.
        """
        reply, exit_code = self.ask_once(first, second)
        return self.ask_once(first, second)[0] if exit_code in SOMEBODY_ELSE else reply

    def ask_once(self, first: str, second: str) -> tuple[bytes, int | None]:
        """The reply, or b"" and the exit code of the child that died over it and has been replaced."""
        if self.process.poll() is not None:
            self.restart()
        try:
            self.ready = self.ready or bool(self.replies.read(1))
            with suppress(BrokenPipeError):
                self.requests.write(json.dumps([first, second]).encode() + b"\n")
            reply = self.replies.read(1)
        except BaseException:  # Ctrl-C here would leave a verdict for the next pair to read
            self.restart()
            raise
        if reply:
            return reply, None
        started, exit_code = self.ready, self.process.wait()
        if not started and exit_code not in SOMEBODY_ELSE:
            raise RuntimeError("Math-Verify does not start, see above; pip install math-verify")
        self.restart()
        return b"", exit_code


def number_of_children() -> int:
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(8, (os.cpu_count() or 1) // ranks_here))


@functools.cache
def idle_children() -> "queue.SimpleQueue[Child]":
    children: queue.SimpleQueue[Child] = queue.SimpleQueue()
    for _ in range(number_of_children()):
        children.put(Child())
    return children


os.register_at_fork(after_in_child=idle_children.cache_clear)  # two processes on one pipe would mix verdicts

_counts = Counter(equivalence_timeouts=0, equivalence_unparsed=0)
_lock = threading.Lock()


@functools.lru_cache(maxsize=1 << 16)
def ask_child(first: str, second: str) -> bool:
    with _lock:  # or threads that ask first would each start a set
        children = idle_children()
    child = children.get()
    try:
        reply = child.judge(first, second)
    finally:
        children.put(child)
    with _lock:
        _counts["equivalence_timeouts"] += reply == b""
        _counts["equivalence_unparsed"] += reply == b"?"
    return reply == b"="


def ask_children(pairs: Collection[tuple[str, str]]) -> None:
    """The same for many pairs, spread over the children; `ask_child` has the verdicts at hand afterwards."""
    with ThreadPoolExecutor(number_of_children()) as threads:
        list(threads.map(lambda pair: ask_child(*pair), pairs))


def counts() -> dict[str, int]:
    """Distinct comparisons so far that exceeded time or memory, and that Math-Verify could not read."""
    with _lock:
        return dict(_counts)


if __name__ == "__main__":
    serve()
