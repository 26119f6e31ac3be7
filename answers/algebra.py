r"""Compare two answers by computer algebra: Math-Verify (LaTeX -> SymPy), in processes that can be killed.

SymPy can loop forever or eat all memory on a short string (`9^{9^{9^9}}`), and nothing inside a Python process stops
it reliably. So Math-Verify runs in a few long-lived children that the kernel kills at a deadline. A child is this very
file, started as a program. Unlike a fork, it inherits no CUDA context, thread or lock. Unlike a `multiprocessing`
spawn, it does not import the parent's `__main__`. So torchrun, pytest, threads, notebooks and `python -` all work.
"""

import functools
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

CPU_SECONDS = 2.0  # per comparison, in CPU time: a busy machine must not change a verdict
MEMORY_BYTES = 1 << 30  # address space of one child
# Exit codes of a child that was killed from outside, or that crashed: neither says anything about the pair.
KILLED = (-signal.SIGKILL, -signal.SIGTERM)
CRASHED = (-signal.SIGSEGV, -signal.SIGABRT)

# ------------------------------------------------------------ the child


@functools.lru_cache(maxsize=4096)
def parse_answer(answer: str) -> list[object]:
    r"""Parse an answer with Math-Verify: [SymPy object, text], or [text] if it cannot read the answer.

    Its units are off, because they take the variable c off `f(x) = bx + c`. Its search for any number in an
    unreadable answer is off, because it reads `0.\overline{3}` as 0.
    """
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    normalization = NormalizationConfig(malformed_operators=True, nits=True, units=False, boxed="none")
    config = LatexExtractionConfig(boxed_match_priority=-1, normalization_config=normalization)
    return list(parse(f"${answer}$", [config], extraction_mode="first_match", parsing_timeout=None))


def verdict(first: str, second: str) -> bytes:
    """Return b"=" for equal, b"!" for not equal or unreadable.

    Math-Verify reads an equation as its right-hand side more readily on the answer's side than on the gold's.
    So both orders must agree: the circle `x^2 + y^2 = 1` is not `1`.
    """
    from math_verify import verify
    from sympy.core.random import seed

    seed(0)  # SymPy tries equality at random points: a verdict must not depend on those before it
    one = parse_answer(first)
    two = parse_answer(second)
    readable = len(one) == len(two) == 2
    agree = functools.partial(verify, allow_set_relation_comp=True, timeout_seconds=None)
    return b"=" if readable and agree(one, two) and agree(two, one) else b"!"


def serve() -> None:
    """Run the child: read JSON pairs, write a byte of verdict for each, until a deadline or the end of input."""
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)  # what a library prints must not look like a verdict
    with suppress(ValueError, OSError):  # macOS refuses
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable()
    ready = verdict("x", "y")  # imports everything
    os.dup2(devnull, 2)
    replies.write(ready)
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # waiting takes none
        replies.write(verdict(*json.loads(line)))


_mine = threading.local()  # the child of each thread of the pool


def get_worker() -> subprocess.Popen[bytes]:
    """Return the worker process of this thread, restarting it if it is dead.

    Raises:
        RuntimeError: It cannot start. A silent False here would make every reward 0.
    """
    child: subprocess.Popen[bytes] | None = getattr(_mine, "child", None)
    if child and child.poll() is None:
        return child
    _mine.child = child = subprocess.Popen(
        [sys.executable, "-P", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        env={**os.environ, "PYTHONHASHSEED": "0"},  # SymPy's choices follow the order of its sets
        start_new_session=True,  # Ctrl-C is for the parent, which may want verdicts while it saves
    )
    assert child.stdout
    if not child.stdout.read(1) and child.wait() not in KILLED:
        raise RuntimeError("Math-Verify does not start, see above; pip install math-verify")
    return child


def judge(first: str, second: str) -> bytes:
    """Return the byte of `verdict`, or b"" if this pair ended the child; try once more if something else did."""
    for _ in range(2):
        child = get_worker()
        assert child.stdin and child.stdout
        with suppress(BrokenPipeError):
            child.stdin.write(json.dumps([first, second]).encode() + b"\n")
        reply = child.stdout.read(1)
        if reply or child.wait() not in KILLED + CRASHED:
            break
    return reply


@functools.cache
def pool() -> ThreadPoolExecutor:
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # Each thread waits for a child of its own.
    return ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 1) // ranks_here)))


@functools.lru_cache(maxsize=1 << 14)
def submit(first: str, second: str) -> Future[bytes]:
    return pool().submit(judge, first, second)


for remembered in (submit, pool):  # a fork has none of the threads, and its verdicts must not mix with its parent's
    os.register_at_fork(after_in_child=remembered.cache_clear)


if __name__ == "__main__":
    serve()
