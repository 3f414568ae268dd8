"""Captioning by the workers of Ray Data, on one machine or a cluster."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import pyarrow as pa

from ..common.errors import InputError

BatchFunction = Callable[[dict[str, Any]], dict[str, Any]]


def caption_with_ray(
    rows: Iterable[dict[str, Any]],
    captions: BatchFunction,
    num_workers: int = 1,
    gpus_per_worker: float = 0,
    batch_size: int = 8,
) -> Iterator[dict[str, Any]]:
    """Caption rows by workers of Ray, and yield the rows with their captions in order.

    Each worker is a process with its own model. A worker that is killed is started again, and its batch with it. The
    batches are those that one process would make, so the captions are, too. The rows are kept by Ray, which moves them
    to the disk when they exceed its memory.

    Args:
        rows: rows with the same keys, of types that Arrow knows: paths or bytes of images, dicts of `datasets` ...
        captions: function of a batch of columns, such as a [`Captions`]. It is pickled once for each worker.
        num_workers: number of workers.
        gpus_per_worker: number of GPUs of each worker. Several workers share a GPU with a fraction, such as 0.5.
        batch_size: number of rows in a batch.

    Raises:
        InputError: if Ray is not installed, or has fewer processors or GPUs than the workers need.
        ray.exceptions.RayTaskError: if `captions` raises an error, as a subclass of that error, too.

    Example:

    ```python
    >>> from qformer_captioner import Captions
    >>> rows = [{"key": name, "image": name} for name in ("dog.jpg", "cat.jpg")]
    >>> for row in caption_with_ray(rows, Captions("outputs/own_images"), num_workers=2):  # doctest: +SKIP
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
    captioned = dataset.map_batches(
        Worker,
        fn_constructor_args=(captions,),
        batch_size=None,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=num_workers),
        num_gpus=gpus_per_worker,
    )
    yield from captioned.iter_rows()


class Worker:
    """Actor that calls a function.

    Args:
        function: the function.
    """

    def __init__(self, function: BatchFunction):
        self.function = function

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return self.function(batch)


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
