"""Hand tasks out to workers as they have room, and try again what a worker died of. No torch."""

from collections import Counter, deque
from collections.abc import Iterable, Iterator

from llava_cot.workers.task import Reply, Task, WorkerDied, Workers

MAX_TRIES = 3


def run_tasks(
    tasks: Iterable[Task], workers: Workers, max_tries: int = MAX_TRIES
) -> Iterator[tuple[Task, Reply | Exception]]:
    """Yield every task once, with its reply or with the error of its last try, in whatever order they end.

    Tasks are handed out as workers have room, since one search may cost many times what another costs. A bad image or
    question fails at once. Anything else may be the fault of a neighbour that shared the worker: when all other tasks
    have ended, such a task is tried again on a worker of its own. It fails after ``max_tries`` tries. The death of a
    worker that it shared is no try.
    """
    waiting, again, tries = iter(tasks), deque[Task](), Counter[tuple[str, int]]()
    running, has_more, alone = 0, True, set[tuple[str, int]]()
    while True:
        while has_more and workers.has_room(alone=False):
            task = next(waiting, None)
            if task is None:
                has_more = False
            else:
                workers.start(task)
                running += 1
        while not has_more and again and workers.has_room(alone=True):
            alone.add(again[0].key)
            workers.start(again.popleft(), alone=True)
            running += 1
        if not running:
            return
        for task, reply in workers.wait():
            running -= 1
            tries[task.key] += task.key in alone or not isinstance(reply, WorkerDied)
            is_bad_input = isinstance(reply, (ValueError, TypeError))
            if isinstance(reply, Reply) or is_bad_input or tries[task.key] >= max_tries:
                del tries[task.key]
                yield task, reply
            else:
                again.append(task)
