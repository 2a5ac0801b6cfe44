"""Cells trained one after the other in this process, or by workers on their shares of the cores."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch

from inlay.compare.grid import Task, failed, measure
from inlay.report import Cell
from inlay.train import Progress
from inlay.work import Shared

Tell = Callable[[str, int, Any], None]
"""Called with what happened ("start", "step", "evaluated", "cell"), the number of the task, and particulars."""


class Told(Progress):
    """Passes a run's progress on to whoever shows it."""

    def __init__(self, tell: Tell, number: int) -> None:
        self.tell, self.number, self.total = tell, number, 0

    def start(self, label: str, total: int, done: int) -> None:
        self.total = total
        self.tell("start", self.number, (total, done))

    def step(self, step: int, loss: float, rate: float) -> None:
        if step % 5 == 0 or step == self.total:
            self.tell("step", self.number, (step, loss))

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        self.tell("evaluated", self.number, metrics)

    def say(self, text: str) -> None:
        return

    def close(self) -> None:
        return


def run(tasks: list[Task], workers: int, tell: Tell) -> None:
    """Train every task; ("cell", number, Cell) ends each of them, whatever becomes of it."""
    if min(workers, len(tasks)) > 1:
        with_workers(tasks, min(workers, len(tasks)), tell)
        return
    shared = Shared()
    for number, task in enumerate(tasks):
        tell("cell", number, measure(task, Told(tell, number), shared))


def with_workers(tasks: list[Task], workers: int, tell: Tell) -> None:
    """Each worker opens models and data once and takes the next task when it is done with one."""
    context = multiprocessing.get_context("spawn")
    todo, events = context.Queue(), context.Queue()
    for item in [*enumerate(tasks), *[None] * workers]:
        todo.put(item)
    threads = max(1, cores() // workers)
    processes = [context.Process(target=work, args=(todo, events, threads), daemon=True) for _ in range(workers)]
    for process in processes:
        process.start()
    left, taken = set(range(len(tasks))), dict[int, int]()
    try:
        while left:
            try:
                kind, number, particulars = events.get(timeout=1.0)
            except queue.Empty:
                dead = {p.pid: p.exitcode for p in processes if p.exitcode is not None and p.pid is not None}
                for number, cell in lost(tasks, left, taken, dead, len(dead) == workers):
                    left.discard(number)
                    tell("cell", number, cell)
                continue
            if kind == "taken":
                taken[number] = particulars
            else:
                left -= {number} if kind == "cell" else set()
                tell(kind, number, particulars)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def work(todo: Any, events: Any, threads: int) -> None:
    """What a worker does, until it is told that nothing is left or nobody listens any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us, after the files are whole
    torch.set_num_threads(threads)
    parent, shared = os.getppid(), Shared()

    def tell(kind: str, number: int, particulars: Any) -> None:
        if os.getppid() != parent:  # it was killed: its next start goes on from our files, alone
            os._exit(1)
        events.put((kind, number, particulars))

    while (item := todo.get()) is not None:
        number, task = item
        tell("taken", number, os.getpid())
        tell("cell", number, measure(task, Told(tell, number), shared))


def lost(
    tasks: list[Task], left: set[int], taken: dict[int, int], dead: dict[int, int], all_dead: bool
) -> list[tuple[int, Cell]]:
    """Tasks whose worker died (killed, out of memory), and all others when no worker is left."""
    why = "the process that trained it ended with status {}: out of memory? (a smaller batch needs less)"
    found = [(n, failed(tasks[n], why.format(dead[taken[n]]))) for n in sorted(left) if taken.get(n) in dead]
    if all_dead:
        found += [(n, failed(tasks[n], "no worker was left to train it")) for n in sorted(left) if n not in taken]
    return found


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
