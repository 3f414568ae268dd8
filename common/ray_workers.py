"""Functions of batches that workers of Ray call, on one machine or a cluster."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from queue import SimpleQueue
from typing import Any

from .errors import InputError

BatchFunction = Callable[[dict[str, Any]], dict[str, Any]]
BATCHES_PER_WORKER = 4  # that are read ahead, so that a slow batch does not stop the other workers
RETRIES = 3  # of a batch whose worker ended


def map_with_ray(
    rows: Iterable[dict[str, Any]],
    function: BatchFunction,
    num_workers: int = 1,
    gpus_per_worker: float = 0,
    batch_size: int = 8,
) -> Iterator[dict[str, Any]]:
    """Map batches of rows by workers of Ray, and yield the rows of the results in order.

    Each worker is a process with its own copy of the function. A worker that is killed is started again, and its batch
    with it. The batches are those that one process would make. They are read while the results are used, at most 4 for
    each worker ahead. So memory does not grow with the number of rows, and there may be infinitely many.

    Args:
        rows: rows with the same keys, whose values can be pickled: paths or bytes of images, dicts of `datasets` ...
        function: function of a batch of columns as lists, such as a [`Captions`]. Each worker gets a pickled copy.
        num_workers: number of workers.
        gpus_per_worker: number of GPUs of each worker. Several workers share a GPU with a fraction, such as 0.5.
        batch_size: number of rows in a batch.

    Raises:
        InputError: if Ray is not installed, or has fewer processors or GPUs than the workers need.
        OSError: if a batch ends its worker again and again, as one that does not fit in memory does.
        Exception: what the function raises.

    Example:

    ```python
    >>> from qformer_captioner import Captions
    >>> rows = [{"key": name, "image": name} for name in ("dog.jpg", "cat.jpg")]
    >>> for row in map_with_ray(rows, Captions("outputs/own_images"), num_workers=2):  # doctest: +SKIP
    ...     print(row["key"], row["caption"])
    dog.jpg a dog in the snow
    cat.jpg a cat on a bed
    ```
    """
    try:
        import ray
        from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError
    except ImportError as error:
        raise InputError("Ray is not installed: `pip install 'qformer-captioner[ray]'`.") from error

    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    check_resources(ray.cluster_resources(), num_workers, gpus_per_worker)
    actor = ray.remote(num_cpus=1, num_gpus=gpus_per_worker, max_restarts=-1, max_task_retries=RETRIES)(Worker)
    workers: list[Any] = [actor.remote(function) for _ in range(num_workers)]
    idle: SimpleQueue[Any] = SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def call(batch: list[dict[str, Any]]) -> dict[str, Any]:
        worker = idle.get()
        try:
            return ray.get(worker.call.remote({name: [row[name] for row in batch] for name in batch[0]}))
        except RayTaskError as error:
            raise error.cause from error
        except (RayActorError, OutOfMemoryError) as error:
            raise OSError(
                f"A worker of Ray ended {RETRIES + 1} times at the same batch: if its memory is too small, make the "
                "batches smaller or start fewer workers."
            ) from error
        finally:
            idle.put(worker)

    remaining = iter(rows)
    results: deque[Future[dict[str, Any]]] = deque()
    threads = ThreadPoolExecutor(num_workers)
    try:
        for batch in iter(lambda: list(islice(remaining, batch_size)), []):
            results.append(threads.submit(call, batch))
            if len(results) == num_workers * BATCHES_PER_WORKER:
                yield from rows_of(results.popleft().result())
        while results:
            yield from rows_of(results.popleft().result())
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            ray.kill(worker)


class Worker:
    """Actor that calls a function.

    Args:
        function: the function.
    """

    def __init__(self, function: BatchFunction):
        self.function = function

    def call(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return what the function makes of a batch."""
        return self.function(batch)


def rows_of(columns: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the rows of columns of equal length."""
    for values in zip(*columns.values(), strict=True):
        yield dict(zip(columns, values, strict=True))


def check_single_process() -> None:
    """Check that this process has not been started by `torchrun` with others, each of which would start workers.

    Raises:
        InputError: if it has.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise InputError(
            "--engine ray starts its own workers: run the command without torchrun, and give --num_workers."
        )


def check_resources(resources: dict[str, float], num_workers: int, gpus_per_worker: float) -> None:
    """Check that a cluster can run all workers at once, because Ray would wait for ever.

    Args:
        resources: what Ray's cluster has.
        num_workers: number of workers, each with one processor.
        gpus_per_worker: number of GPUs of each worker.

    Raises:
        InputError: if it cannot.
    """
    for name, each in (("CPU", 1.0), ("GPU", gpus_per_worker)):
        needed, available = num_workers * each, resources.get(name, 0.0)
        if needed > available:
            raise InputError(
                f"{num_workers} workers of Ray need {needed:g} {name}s, and the cluster has {available:g}: lower "
                "--num_workers or --gpus_per_worker, or start Ray on more machines."
            )
