import itertools
import os
import signal
import time

import pytest

from qformer_captioner import Captions
from qformer_captioner.captioning.arguments import parse_options
from qformer_captioner.cli.caption import caption
from qformer_captioner.common.errors import InputError
from qformer_captioner.common.ray_workers import BATCHES_PER_WORKER, check_resources, map_with_ray
from qformer_captioner.precompute_features import precompute

from ..fixtures import tiny

ray = pytest.importorskip("ray", reason="Ray is not installed (extra `ray`)")

OPTIONS = dict(max_new_tokens=8)


@pytest.fixture(scope="module")
def cluster():
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_ENABLE_UV_RUN_RUNTIME_ENV="0")
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=2**27, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captioner")
    tiny.captioner().save_pretrained(folder)
    return Captions(folder, **OPTIONS)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Rows of ten images, of which the first two are missing."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(2, 10):
        tiny.picture(number).save(folder / f"{number}.png")
    return [{"key": number, "image": str(folder / f"{number}.png")} for number in range(10)]


@pytest.mark.slow
def test_workers_give_the_captions_of_one_process_in_order(cluster, captions, rows):
    captioned = list(map_with_ray(iter(rows), captions, num_workers=2, batch_size=2))
    columns = captions({name: [row[name] for row in rows] for name in ("key", "image")})
    assert captioned == [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    assert [row["caption"] == "" for row in captioned] == [number < 2 for number in range(10)]


@pytest.mark.slow
def test_ray_data_maps_batches_by_captions(cluster, captions, rows):
    options = dict(fn_constructor_args=(captions.model_name,), fn_constructor_kwargs=OPTIONS)
    pool = ray.data.ActorPoolStrategy(size=2)
    captioned = ray.data.from_items(rows).map_batches(Captions, batch_size=5, compute=pool, **options).take_all()
    columns = captions({name: [row[name] for row in rows] for name in ("key", "image")})
    assert {row["key"]: row["caption"] for row in captioned} == dict(
        zip(columns["key"], columns["caption"], strict=True)
    )


@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced_and_nothing_is_lost(cluster):
    def slow_numbers(batch):
        time.sleep(0.3)
        return {"key": batch["key"], "pid": [os.getpid()] * len(batch["key"])}

    killed, keys, pids = None, [], set()
    rows = ({"key": number} for number in range(40))
    for row in map_with_ray(rows, slow_numbers, num_workers=2, batch_size=2):
        keys.append(row["key"])
        pids.add(row["pid"])
        if killed is None:
            killed = row["pid"]
            os.kill(killed, signal.SIGKILL)
    assert keys == list(range(40))
    assert len(pids - {killed}) == 2  # the other worker, and the new one


@pytest.mark.slow
def test_rows_are_read_only_a_few_batches_ahead(cluster):
    read = itertools.count()
    rows = map_with_ray(({"key": next(read)} for _ in itertools.count()), lambda batch: batch, batch_size=2)
    assert [row["key"] for row in itertools.islice(rows, 30)] == list(range(30))
    rows.close()
    assert next(read) <= 30 + 2 * BATCHES_PER_WORKER


@pytest.mark.slow
def test_a_batch_that_always_ends_its_worker_is_an_error(cluster):
    with pytest.raises(OSError, match="^A worker of Ray ended 4 times at the same batch: if its memory is too small"):
        list(map_with_ray([{"key": 1}], lambda batch: os._exit(1)))


@pytest.mark.slow
def test_no_rows_give_no_captions(cluster, captions):
    assert list(map_with_ray([], captions)) == []


@pytest.mark.slow
def test_a_mistake_that_a_worker_finds_is_raised_as_such(cluster):
    def refuse(batch):
        raise InputError("There is no captioner 'a'.")

    with pytest.raises(InputError, match="^There is no captioner 'a'.$"):
        list(map_with_ray([{"key": 1}], refuse))


@pytest.mark.slow
def test_the_command_writes_the_same_with_workers(cluster, captions, rows, tmp_path):
    words = [row["image"] for row in rows] + ["--model", captions.model_name, "--max_new_tokens", "8"]
    words += ["--batch_size", "3", "--output"]
    for name, engine in (("local", []), ("ray", ["--engine", "ray"])):
        with pytest.raises(InputError, match="2 of 10 images have no caption"):
            caption([*words, str(tmp_path / f"{name}.jsonl"), *engine])
    assert (tmp_path / "ray.jsonl").read_bytes() == (tmp_path / "local.jsonl").read_bytes()


@pytest.mark.slow
def test_the_features_of_workers_are_those_of_one_process(cluster, captions, rows, tmp_path):
    encoder = tiny.save_vision(tmp_path / "encoder")
    words = ["--vision_model_name_or_path", encoder, "--dataset_name", os.path.dirname(rows[0]["image"])]
    words += ["--rows_per_shard", "3", "--output_dir"]
    for name, engine in (("local", []), ("ray", ["--engine", "ray"])):
        precompute([*words, str(tmp_path / name), *engine])
    local, other = (
        {path.relative_to(tmp_path / name): path for path in (tmp_path / name).rglob("*.npy")}
        for name in ("local", "ray")
    )
    assert len(local) > 3
    assert {name: path.read_bytes() for name, path in other.items()} == {
        name: path.read_bytes() for name, path in local.items()
    }


def test_workers_that_the_cluster_cannot_run_are_refused():
    with pytest.raises(InputError, match="3 workers of Ray need 3 CPUs, and the cluster has 2"):
        check_resources({"CPU": 2.0}, 3, 0)
    with pytest.raises(InputError, match="2 workers of Ray need 1 GPUs, and the cluster has 0"):
        check_resources({"CPU": 2.0}, 2, 0.5)


def test_workers_under_torchrun_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="^--engine ray starts its own workers: run the command without torchrun"):
        parse_options(["photos", "--model", "a", "--engine", "ray"], "")
    with pytest.raises(InputError, match="^--engine ray starts its own workers: run the command without torchrun"):
        precompute(["--vision_model_name_or_path", "a", "--dataset_name", "b", "--engine", "ray"])
