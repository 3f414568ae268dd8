"""Functions of batches that workers of Ray Data call, on one machine or a cluster."""

import pickle
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import pyarrow as pa

from .errors import InputError

MISTAKE = "__mistake__"  # column of an error in place of a result
BatchFunction = Callable[[dict[str, Any]], dict[str, Any]]


def map_with_ray(
    rows: Iterable[dict[str, Any]],
    function: BatchFunction,
    num_workers: int = 1,
    gpus_per_worker: float = 0,
    batch_size: int = 8,
) -> Iterator[dict[str, Any]]:
    """Map batches of rows by workers of Ray, and yield the rows of the results in order.

    Each worker is a process with its own copy of the function. A worker that is killed is started again, and its batch
    with it. The batches are those that one process would make. Ray keeps the rows, and moves them to the disk when they
    exceed its memory.

    Args:
        rows: rows with the same keys, of types that Arrow knows: paths or bytes of images, dicts of `datasets` ...
        function: function of a batch of columns, such as a [`Captions`]. It is pickled once for each worker.
        num_workers: number of workers.
        gpus_per_worker: number of GPUs of each worker. Several workers share a GPU with a fraction, such as 0.5.
        batch_size: number of rows in a batch.

    Raises:
        InputError: if Ray is not installed, or has fewer processors or GPUs than the workers need.
        OSError, ValueError: if the function raises such an error.

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
    except ImportError as error:
        raise InputError("Ray is not installed: `pip install 'qformer-captioner[ray]'`.") from error

    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    check_resources(ray.cluster_resources(), num_workers, gpus_per_worker)
    # A block is a batch, and no operation changes the blocks.
    remaining = iter(rows)
    batches = iter(lambda: list(islice(remaining, batch_size)), [])
    blocks = [ray.put(pa.Table.from_pylist(batch)) for batch in batches]
    if not blocks:
        return
    dataset = ray.data.from_arrow_refs(blocks)
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    mapped = dataset.map_batches(
        Worker,
        fn_constructor_args=(function,),
        batch_size=None,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=num_workers),
        num_gpus=gpus_per_worker,
    )
    for row in mapped.iter_rows():
        if MISTAKE in row:
            raise pickle.loads(row[MISTAKE])
        yield row


class Worker:
    """Actor that calls a function.

    Ray loses the cause of an error, so the errors of a user's mistake are returned as rows.

    Args:
        function: the function.
    """

    def __init__(self, function: BatchFunction):
        self.function = function

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        try:
            return self.function(batch)
        except (OSError, ValueError) as error:
            return {MISTAKE: [pickle.dumps(error)]}


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
