"""Ray actors as workers: the same replies as in this process, and what an actor dies of."""

import pytest

ray = pytest.importorskip("ray")
from workers.test_workers import SETTINGS, world_tasks  # noqa: E402

from llava_cot.workers.local import LocalWorker  # noqa: E402
from llava_cot.workers.ray import RayWorkers  # noqa: E402
from llava_cot.workers.run import run_tasks  # noqa: E402
from llava_cot.workers.task import ModelSettings, Task  # noqa: E402

MODEL = ModelSettings("tiny", "best_of_n", {**SETTINGS, "n": 2, "temperature": 1.0})


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="warning")
    yield
    ray.shutdown()


def test_an_actor_that_is_killed_loses_no_task(tmp_path):
    tasks = world_tasks(range(8))
    local = {task.key: reply for task, reply in run_tasks(iter(tasks), LocalWorker(MODEL, 4))}
    missing = Task(("missing", 0), "What?", (tmp_path / "none.png",), 0)
    workers = RayWorkers(MODEL, 2, in_flight=3)
    try:
        found = {}
        for task, reply in run_tasks(iter([*tasks, missing]), workers):
            if len(found) == 1:
                ray.kill(workers._actors[0].handle)
            assert task.key not in found
            found[task.key] = reply
    finally:
        workers.close()
    assert "none.png" in str(found.pop(missing.key))
    assert {key: (reply.text, reply.conclusion) for key, reply in found.items()} == {
        key: (reply.text, reply.conclusion) for key, reply in local.items()
    }


def test_a_model_that_cannot_be_loaded_is_named():
    with pytest.raises(ValueError, match="no-such-folder"):
        RayWorkers(ModelSettings("./no-such-folder", "greedy", SETTINGS), 1, in_flight=1)
