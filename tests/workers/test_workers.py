"""Handing tasks out to workers, and the worker of this process."""

import io
from collections import Counter

import pytest

from llava_cot import SwiresGenerator
from llava_cot.data import shapes
from llava_cot.data.clean_view import CleanView
from llava_cot.stages import LLAVA_COT
from llava_cot.workers.local import LocalWorker
from llava_cot.workers.names import check_workers
from llava_cot.workers.open import open_workers
from llava_cot.workers.run import run_tasks
from llava_cot.workers.task import ModelSettings, Reply, Task, WorkerDied

SETTINGS = {"max_new_tokens": 120}


def png(image):
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def world_tasks(numbers):
    samples = [(number, shapes.sample(shapes.TEST_SEEDS[number])) for number in numbers]
    return [Task((f"q{number}", 0), sample.question, (png(sample.image),), number) for number, sample in samples]


class Deck:
    """Workers that answer at once, except that they die of the tasks in ``poison`` with all that they have."""

    def __init__(self, count, in_flight, poison=(), fails=()):
        self.sets = [set() for _ in range(count)]
        self.in_flight, self.poison, self.fails = in_flight, set(poison), Counter(fails)
        self.alone, self.starts = set(), Counter()

    def has_room(self, alone):
        return any(len(tasks) < (1 if alone else self.in_flight) and not tasks & self.alone for tasks in self.sets)

    def start(self, task, alone=False):
        self.starts[task.key] += 1
        tasks = min((t for t in self.sets if not t & self.alone), key=len)
        assert len(tasks) < (1 if alone else self.in_flight)
        tasks.add(task)
        if alone:
            self.alone.add(task)

    def wait(self):
        tasks = next(tasks for tasks in self.sets if tasks)
        died = any(task.key[0] in self.poison for task in tasks)
        ended = [*tasks] if died else [min(tasks, key=lambda task: task.key)]
        for task in ended:
            tasks.discard(task)
            self.alone.discard(task)
            if died:
                yield task, WorkerDied("it died")
            elif self.fails[task.key[0]] > 0:
                self.fails[task.key[0]] -= 1
                yield task, RuntimeError("once more")
            else:
                yield task, Reply("text", "text", "complete", {}, {}, True)

    def close(self):
        pass


@pytest.mark.parametrize("count, in_flight", [(1, 1), (1, 5), (2, 3), (7, 1)])
def test_every_task_ends_once_and_poison_alone_is_given_up(count, in_flight):
    tasks = [Task((f"q{number}", 0), "?", (), 0) for number in range(23)]
    deck = Deck(count, in_flight, poison={"q3", "q11"}, fails={"q5": 2, "q7": 3})
    ended = dict((task.key[0], reply) for task, reply in run_tasks(iter(tasks), deck))
    assert len(ended) == 23 and set(deck.starts) == {task.key for task in tasks}
    assert {name for name, reply in ended.items() if isinstance(reply, WorkerDied)} == {"q3", "q11"}
    assert {name for name, reply in ended.items() if isinstance(reply, RuntimeError)} == {"q7"}
    assert deck.starts["q3", 0] == max(deck.starts.values()) == 4  # three of them alone


def test_bad_input_is_not_tried_again_and_no_task_is_fine():
    class Refuses(Deck):
        def wait(self):
            for task, _ in super().wait():
                yield task, ValueError("image must be readable")

    tasks = [Task(("q", 0), "?", (), 0)]
    deck = Refuses(1, 4)
    assert [str(reply) for _, reply in run_tasks(iter(tasks), deck)] == ["image must be readable"]
    assert deck.starts["q", 0] == 1
    assert [*run_tasks(iter(()), Deck(2, 2))] == []


def test_tasks_are_taken_as_there_is_room():
    taken = 0

    def tasks():
        nonlocal taken
        for number in range(100):
            taken += 1
            yield Task((f"q{number}", 0), "?", (), 0)

    for done, _ in enumerate(run_tasks(tasks(), Deck(2, 3)), 1):
        assert taken <= done + 6  # a million questions are not read at once


def test_replies_are_those_of_answer():
    settings = ModelSettings("tiny", "best_of_n", {**SETTINGS, "n": 2, "temperature": 1.0})
    worker = LocalWorker(settings, in_flight=3)
    tasks = [*world_tasks(range(4)), Task(("bad", 0), "What?", (b"no image",), 0), Task(("blank", 0), " ", (), 0)]
    found = {task.key[0]: reply for task, reply in run_tasks(iter(tasks), worker)}
    worker.close()
    generator = SwiresGenerator.from_pretrained("tiny")
    for task in tasks[:4]:
        answer = generator.answer(
            task.images[0], task.question, "best_of_n", seed=task.seed, n=2, temperature=1.0, **SETTINGS
        )
        reply = found[task.key[0]]
        assert (reply.text, reply.conclusion) == (answer.text, answer.conclusion)
        assert reply.usage["generated_tokens"] == answer.usage.generated_tokens and reply.usage["retraces"] == 0
        assert [node["tokens"] for node in reply.trace["nodes"]] == [
            node["tokens"] for node in answer.trace.data["nodes"]
        ]
    assert "image must be a readable image" in str(found["bad"]) and "question must" in str(found["blank"])
    assert worker.generator.engine.pages_in_use == 0


def test_closing_gives_everything_back():
    worker = LocalWorker(ModelSettings("tiny", "greedy", SETTINGS), in_flight=4)
    for task in world_tasks(range(3)):
        worker.start(task)
    worker.generator.engine.step()
    worker.close()
    assert worker.generator.engine.pages_in_use == 0


def test_the_verifier_scores_by_the_clean_view():
    view = CleanView()
    for number in (5, 0, 3):
        seed = shapes.TEST_SEEDS[number]
        assert view(shapes.sample(seed).image).tobytes() == shapes.clean_view(seed).tobytes()
    settings = ModelSettings("tiny", "best_of_n", {**SETTINGS, "n": 2, "temperature": 1.0}, scorer="verifier")
    worker = LocalWorker(settings, in_flight=2)
    ((_, reply),) = run_tasks(iter(world_tasks([1])), worker)
    assert reply.trace["config"]["scorer"] == "verifier" and reply.usage["scorer_calls"] == 2


@pytest.mark.parametrize("workers", ["", "ray", "ray:", "ray:0", "ray:-1", "ray:2x", "LOCAL"])
def test_a_bad_description_of_workers(workers):
    with pytest.raises(ValueError, match="workers must be 'local' or 'ray:N'"):
        check_workers(workers)


def test_a_bad_scorer():
    with pytest.raises(ValueError, match="scorer must be one of"):
        open_workers("local", ModelSettings("tiny", "best_of_n", scorer="nobody"), 1)


@pytest.mark.parametrize(
    "text, conclusion, outcome",
    [
        ("<CONCLUSION> 4 </CONCLUSION>", "4", "complete"),
        (" 4\n", "4", "missing"),  # no stage at all: the text is the answer
        ("<SUMMARY> a </SUMMARY> 4", "", "missing"),  # stages, but no conclusion
        ("<CONCLUSION> 4", "4", "unclosed"),
        ("", "", "missing"),
    ],
)
def test_the_conclusion_of_a_text(text, conclusion, outcome):
    stage = LLAVA_COT.conclusion_of(text, LLAVA_COT.parse(text))
    assert (stage.text, stage.outcome) == (conclusion, outcome)
