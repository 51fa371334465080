"""Open workers by their description on the command line."""

from llava_cot.workers.names import check_workers
from llava_cot.workers.task import ModelSettings, Workers


def open_workers(workers: str, settings: ModelSettings, in_flight: int) -> Workers:
    """Load the models of workers that were described as "local" or "ray:N"."""
    check_workers(workers)
    if workers == "local":
        from llava_cot.workers.local import LocalWorker

        return LocalWorker(settings, in_flight)
    from llava_cot.workers.ray import RayWorkers

    return RayWorkers(settings, int(workers.removeprefix("ray:")), in_flight)
