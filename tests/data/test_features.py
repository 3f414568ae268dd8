"""Precomputed features: `precompute_features.py` as a user runs it, and reading the store that it writes."""

import errno
import json
import os
import pickle
import re
import shutil
import subprocess
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoModel

from qformer_captioner import precompute_features
from qformer_captioner.common.errors import InputError
from qformer_captioner.data.feature_shards import FeatureBatch, SplitLayout
from qformer_captioner.data.feature_store import FeatureStore, finish_store
from qformer_captioner.data.loading import load_rows
from qformer_captioner.data.vision_fingerprint import VisionFingerprint
from qformer_captioner.images_qformer import open_image

from ..conftest import ROOT
from ..fixtures import tiny
from ..fixtures.feature_stores import command, with_embeddings
from ..fixtures.hub_server import files_of

ROWS, BROKEN = 19, 3  # of the split "train"
VIEWS = ["--views", "3", "--random_resized_crop_scale", "0.3", "--horizontal_flip_prob", "0.5"]


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    return tiny.save_vision(tmp_path_factory.mktemp("vision"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Return a data set of 19 training pictures, one of them damaged, and 4 in a split "dev"."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for i in range(ROWS + 4):
        tiny.picture(seed=i).save(folder / f"{i}.png")
        rows.append(
            {"file_name": f"{i}.png", "split": "train" if i < ROWS else "dev", "caption": "a star", "number": i}
        )
    (folder / f"{BROKEN}.png").write_bytes(b"no picture")
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def store(vision, pictures, tmp_path_factory):
    """Return the store of all pictures, with one view in float32."""
    folder = tmp_path_factory.mktemp("features")
    precompute_features.precompute(command(vision, pictures, folder, "--dtype", "float32"))
    return folder


@pytest.fixture(scope="module")
def views(vision, pictures, tmp_path_factory):
    """Return the store with three views of each training picture."""
    folder = tmp_path_factory.mktemp("views")
    precompute_features.precompute(command(vision, pictures, folder, *VIEWS))
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """Return the content of all files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- Features and images ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("float32", 1e-6)])
def test_features_and_images_give_the_same_loss(vision, pictures, tmp_path, dtype, tolerance):
    precompute_features.precompute(command(vision, pictures, tmp_path / "store", "--dtype", dtype))
    model = tiny.captioner()
    model.vision_model = AutoModel.from_pretrained(vision)
    rows = [5, 0, 17]
    images = load_rows(str(pictures))["train"][rows]["image"]
    pixel_values = model.processor.image_processor(images, return_tensors="pt")["pixel_values"]
    text = {name: value for name, value in tiny.batch().items() if name != "pixel_values"}
    embeds = FeatureStore(tmp_path / "store").split("train").read(rows).image_embeds
    from_images = model(pixel_values=pixel_values, **text).loss
    others = model(image_embeds=embeds[[1, 2, 0]].float(), **text).loss
    assert abs(model(image_embeds=embeds.float(), **text).loss - from_images) < tolerance
    assert abs(others - from_images) > 10 * tolerance, "the loss does not depend on the features"


def test_the_vision_encoder_of_a_blip2_can_be_used(pictures, tmp_path):
    from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2QFormerConfig, Blip2VisionConfig

    sizes = dict(hidden_size=24, num_hidden_layers=1, num_attention_heads=4, intermediate_size=40)
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**sizes, image_size=32, patch_size=16).to_dict(),
        qformer_config=Blip2QFormerConfig(**sizes, encoder_hidden_size=24).to_dict(),
        text_config=tiny.text_config("opt").to_dict(),
    )
    Blip2ForConditionalGeneration(config).save_pretrained(tmp_path / "blip2")
    tiny.image_processor().save_pretrained(tmp_path / "blip2")
    precompute_features.precompute(command(tmp_path / "blip2", pictures, tmp_path / "store", "--splits", "dev"))
    assert FeatureStore(tmp_path / "store").split("dev").shape == (5, 24)


def test_a_shard_is_a_file_that_numpy_opens(store):
    array = np.load(store / "train" / "00001.npy", mmap_mode="r")
    assert (array.shape, array.dtype) == ((4, 1, 5, 24), np.float32)
    np.testing.assert_array_equal(array[2, 0], FeatureStore(store).split("train")[6])


def test_a_split_has_as_many_rows_as_the_data_set(store, pictures):
    features = FeatureStore(store)
    rows = load_rows(str(pictures))
    assert {name: len(features.split(name)) for name in rows} == {name: len(own) for name, own in rows.items()}


def test_a_damaged_image_is_recorded_and_does_not_affect_others(store, pictures):
    train = FeatureStore(store).split("train")
    assert np.flatnonzero(~train.present).tolist() == list(train.reasons) == [BROKEN]
    entry = json.loads((store / "skipped_rows.jsonl").read_text())
    assert (entry["split"], entry["row"], entry["file"]) == ("train", BROKEN, str(pictures / f"{BROKEN}.png"))
    with pytest.raises(ValueError, match=f"Row {BROKEN} has no features: The image .* cannot be read"):
        train.read([0, BROKEN])


def test_the_current_folder_is_stored_by_its_absolute_path(vision, pictures, store, tmp_path, monkeypatch):
    monkeypatch.chdir(pictures)
    precompute_features.precompute(command(vision, ".", tmp_path / "store", "--dtype", "float32"))
    assert FeatureStore(tmp_path / "store").dataset == FeatureStore(store).dataset
    ours, theirs = (FeatureStore(each).split("dev").read(range(4)).image_embeds for each in (tmp_path / "store", store))
    assert torch.equal(ours, theirs)


def test_max_samples_takes_the_first_rows(vision, pictures, store, tmp_path):
    precompute_features.precompute(
        command(vision, pictures, tmp_path / "few", "--max_samples", "6", "--dtype", "float32", "--max_skipped", "1")
    )
    few = FeatureStore(tmp_path / "few").split("train")
    assert len(few) == 6
    torch.testing.assert_close(few[5], FeatureStore(store).split("train")[5])


# --- Views ------------------------------------------------------------------------------------------------------------


def test_only_the_training_split_gets_views_and_the_first_is_the_whole_image(views, store):
    several, one = FeatureStore(views), FeatureStore(store).split("train")
    train = several.split("train")
    assert (train.views, several.split("dev").views) == (3, 1)
    torch.testing.assert_close(train[5].float(), one[5], atol=2e-3, rtol=0)
    assert len({tuple(train[5, view][1].tolist()) for view in range(3)}) == 3


def test_views_do_not_depend_on_the_number_of_workers(views, vision, pictures, tmp_path):
    torch.manual_seed(7)
    more = ["--dataloader_num_workers", "2", *VIEWS]
    precompute_features.precompute(command(vision, pictures, tmp_path / "again", *more))
    assert content(tmp_path / "again") == content(views)


def test_another_seed_draws_other_views(views, vision, pictures, tmp_path):
    precompute_features.precompute(command(vision, pictures, tmp_path / "other", *VIEWS, "--seed", "1"))
    ours, theirs = (FeatureStore(folder).split("train") for folder in (tmp_path / "other", views))
    assert torch.equal(ours[0, 0], theirs[0, 0]) and not torch.equal(ours[0, 1], theirs[0, 1])


def test_one_read_returns_a_view_of_each_row(views):
    train = FeatureStore(views).split("train")
    several = train.read([9, 2, 9], [1, 2, 0]).image_embeds
    assert torch.equal(several, torch.stack([train[9, 1], train[2, 2], train[9, 0]]))


# --- Interrupted runs, and several processes --------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_run_that_two_processes_finish_writes_the_bytes_of_an_uninterrupted_run(
    commands, views, vision, pictures, tmp_path
):
    program = [str(ROOT / "precompute_features.py"), *command(vision, pictures, tmp_path / "run", *VIEWS)]
    environment = commands.environment()
    process = subprocess.Popen(["python", *program], env=environment, stderr=subprocess.DEVNULL)
    give_up = time.time() + 300
    while not (tmp_path / "run" / "train" / "00001.npy").exists():
        assert process.poll() is None, "the run ended before it was killed"
        assert time.time() < give_up, "the run writes nothing"
        time.sleep(0.001)
    commands.kill()
    process.wait()
    with pytest.raises(InputError, match="are not complete: give the same command"):
        FeatureStore(tmp_path / "run")
    run = ["torchrun", "--standalone", "--nproc_per_node", "2", *program]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert content(tmp_path / "run") == content(views)


@pytest.mark.slow
def test_two_processes_share_the_shards(commands, views, vision, pictures, tmp_path):
    """Each process logs the shards that it writes. Together they write every shard, and no shard twice."""
    program = (
        "import os, sys\n"
        "from qformer_captioner import precompute_features\n"
        "from qformer_captioner.data.feature_shards import SplitLayout\n"
        "write = SplitLayout.write\n"
        "def logged(layout, shard, features):\n"
        "    write(layout, shard, features)\n"
        "    with open(f'{sys.argv[1]}/written-' + os.environ['RANK'], 'a') as file:\n"
        "        file.write(str(layout.path(shard).relative_to(layout.folder.parent)) + '\\n')\n"
        "SplitLayout.write = logged\n"
        "precompute_features.precompute(sys.argv[2:])"
    )
    (tmp_path / "program.py").write_text(program)
    run = ["torchrun", "--standalone", "--nproc_per_node", "2"]
    run += [str(tmp_path / "program.py"), str(tmp_path), *command(vision, pictures, tmp_path / "two", *VIEWS)]
    done = subprocess.run(run, env=commands.environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    written = [(tmp_path / f"written-{rank}").read_text().split() for rank in (0, 1)]
    assert [len(own) for own in written] == [3, 3]
    assert set(written[0]) | set(written[1]) == {name for name in content(views) if re.search(r"/\d+\.npy$", name)}
    assert content(tmp_path / "two") == content(views)


def test_complete_shards_are_kept_and_incomplete_ones_are_computed_again(views, vision, pictures, tmp_path):
    folder = tmp_path / "store"
    shutil.copytree(views, folder)
    (folder / "index.json").unlink()
    (folder / "train" / "00003.npy").rename(folder / "train" / "00003.123.tmp")  # as after a kill before the rename
    whole = (folder / "train" / "00004.npy").read_bytes()
    (folder / "train" / "00004.npy").write_bytes(whole[:-1])  # as after an error of the disk
    kept = (folder / "train" / "00002.npy").stat().st_ino
    precompute_features.precompute(command(vision, pictures, folder, *VIEWS))
    assert content(folder) == content(views)
    assert (folder / "train" / "00002.npy").stat().st_ino == kept


def test_after_a_full_disk_the_same_command_computes_the_other_shards(views, vision, pictures, tmp_path, monkeypatch):
    def write_two(self, shard, batches):
        if shard == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, shard, batches)

    original = SplitLayout.write
    folder = tmp_path / "store"
    with monkeypatch.context() as patch:
        patch.setattr(SplitLayout, "write", write_two)
        with pytest.raises(InputError, match=f"the disk of '{folder}' .*Finished shards are kept"):
            precompute_features.precompute(command(vision, pictures, folder, *VIEWS))
    kept = [path.stat().st_ino for path in sorted(folder.glob("*/0*.npy"))]
    assert len(kept) >= 2
    precompute_features.precompute(command(vision, pictures, folder, *VIEWS))
    assert content(folder) == content(views)
    assert set(kept) < {path.stat().st_ino for path in folder.glob("*/0*.npy")}


# --- Refusals ---------------------------------------------------------------------------------------------------------


def test_features_are_accepted_for_their_vision_encoder_wherever_its_folder_is(store, vision, tmp_path):
    shutil.copytree(vision, tmp_path / "elsewhere")
    FeatureStore(store).check(str(tmp_path / "elsewhere"), None, AutoImageProcessor.from_pretrained(vision))
    FeatureStore(store).check(vision, None, tiny.captioner().processor.image_processor)


def test_another_vision_encoder_is_refused(store, vision, tmp_path):
    other = tiny.save_vision(tmp_path / "other", "dinov2")
    with pytest.raises(InputError, match=f"of the vision model '{vision}' .*, not of '{other}'"):
        FeatureStore(store).check(other, None, tiny.image_processor())


def test_the_same_folder_with_other_weights_is_refused(vision, pictures, tmp_path):
    folder = tmp_path / "vision"
    shutil.copytree(vision, folder)
    precompute_features.precompute(command(folder, pictures, tmp_path / "store"))
    model = AutoModel.from_pretrained(folder)
    model.post_layernorm.bias.data += 1
    model.save_pretrained(folder)
    with pytest.raises(InputError, match="are those of the vision model"):
        FeatureStore(tmp_path / "store").check(str(folder), None, tiny.image_processor())
    with pytest.raises(InputError, match="holds another run: it differs in vision_model"):
        precompute_features.precompute(command(folder, pictures, tmp_path / "store"))


@pytest.mark.slow
def test_commits_on_the_hub_are_stored_and_other_commits_are_refused(hub, commands, vision, tmp_path):
    data = with_embeddings(tmp_path / "data", torch.ones(7, 5, tiny.VISION_WIDTH).tolist())
    program = (
        "import sys\n"
        "from transformers import AutoImageProcessor\n"
        "from qformer_captioner import precompute_features\n"
        "from qformer_captioner.data.feature_store import FeatureStore\n"
        "if sys.argv[2:]:\n"
        "    precompute_features.precompute(sys.argv[2:])\n"
        "FeatureStore(sys.argv[1]).check('org/encoder', None, AutoImageProcessor.from_pretrained('org/encoder'))"
    )
    store = tmp_path / "store"
    words = command("org/encoder", "org/data", store, "--embeddings_column", "own")
    files = files_of(Path(vision))
    hub.files["model", "org/encoder"] = files
    hub.files["dataset", "org/data"] = {"train.parquet": (data / "train.parquet").read_bytes()}
    commits = [hub.commit_sha(("model", "org/encoder")), hub.commit_sha(("dataset", "org/data"))]

    def run(*words: str) -> subprocess.CompletedProcess:
        run = ["python", "-c", program, str(store), *words]
        return subprocess.run(run, env=commands.environment(), capture_output=True, text=True, timeout=300)

    done = run(*words)
    assert done.returncode == 0, done.stderr
    features = FeatureStore(store)
    assert [features.vision_model_revision, features.dataset["revision"]] == commits
    files["README.md"] = b"another commit"
    done = run()
    assert f"of the vision model 'org/encoder' (revision {commits[0]}), not of 'org/encoder' (rev" in done.stderr


def test_another_image_processor_is_refused(store, vision):
    with pytest.raises(
        InputError, match=r"were prepared by another image processor. It differs in size \(size was .*32.*48"
    ):
        FeatureStore(store).check(vision, None, tiny.image_processor(side=48))


def test_a_folder_without_a_store_is_named_with_a_remedy(tmp_path):
    with pytest.raises(InputError, match="no features in .*nowhere.*precompute_features.py"):
        FeatureStore(tmp_path / "nowhere")


def test_an_unknown_split_is_answered_with_the_existing_ones(store):
    with pytest.raises(InputError, match="no split 'test'; they have 'dev', 'train'"):
        FeatureStore(store).split("test")


@pytest.mark.parametrize("damage", ["gone", "cut off", "another shape", "no numpy file"])
def test_a_damaged_shard_is_named_and_restored_by_the_same_command(store, vision, pictures, tmp_path, damage):
    folder = tmp_path / "store"
    shutil.copytree(store, folder)
    shard = folder / "train" / "00002.npy"
    {
        "gone": lambda: shard.unlink(),
        "cut off": lambda: shard.write_bytes(shard.read_bytes()[:-1]),
        "another shape": lambda: np.save(shard, np.zeros((4, 1, 5, 23), np.float32)),
        "no numpy file": lambda: shard.write_bytes(b"gibberish"),
    }[damage]()
    with pytest.raises(InputError, match=r"00002\.npy' of the features is missing or damaged .*give the same command"):
        FeatureStore(folder).split("train")
    precompute_features.precompute(command(vision, pictures, folder, "--dtype", "float32"))
    assert content(folder) == content(store)


def test_a_shard_that_shrinks_while_it_is_read_is_an_error(store, tmp_path):
    shutil.copytree(store, tmp_path / "store")
    train = FeatureStore(tmp_path / "store").split("train")
    os.truncate(tmp_path / "store" / "train" / "00001.npy", 1000)
    with pytest.raises(InputError, match=r"00001\.npy.*cut off"):
        train.read([7])


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}', ""])
def test_a_damaged_index_is_named(store, tmp_path, text):
    shutil.copytree(store, tmp_path / "store")
    (tmp_path / "store" / "index.json").write_text(text)
    with pytest.raises(InputError, match=r"index\.json' of the features is missing or damaged"):
        FeatureStore(tmp_path / "store")


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(vision, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(InputError, match=r"need another 0\.0 MB, and the disk of .* free: free some space"):
        precompute_features.precompute(command(vision, pictures, tmp_path / "store"))
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dtype", "float64"], "--dtype must be float16 or float32, not 'float64'"),
        (
            ["--views", "2"],
            "--views 2 or more goes together with --random_resized_crop_scale or --horizontal_flip_prob",
        ),
        (
            ["--horizontal_flip_prob", "0.5"],
            "--views 2 or more goes together with --random_resized_crop_scale or --horizontal_flip_prob",
        ),
        (["--splits", "test"], "has no split 'test'; it has"),
        (["--image_column", "picture"], "no column 'picture'; its columns are .*'image'"),
        (["--image_column", "caption"], "The images of 4 of 4 rows of dev cannot be read .There is no image file"),
        (
            ["--image_column", "number"],
            "The column 'number' holds Value.*int64.*, not images or paths. Choose .* with --image_column or --emb",
        ),
        (["--batch_size", "0"], "--batch_size must be at least 1, not 0"),
        (["--dataloader_num_workers", "-1"], "--dataloader_num_workers must be at least 0, not -1"),
        (
            ["--views", "2", "--horizontal_flip_prob", "7"],
            "--horizontal_flip_prob is a probability between 0 and 1, not 7",
        ),
        (["--views", "2", "--horizontal_flip_prob", "0.5", "--seed", "-1"], "--seed must be at least 0, not -1"),
        (["--view", "2"], "Unknown option '--view'. Did you mean '--views'"),
    ],
)
def test_options_that_cannot_work_end_in_one_sentence(vision, pictures, tmp_path, words, message):
    with pytest.raises(InputError, match=message):
        precompute_features.precompute(command(vision, pictures, tmp_path / "store", *words))


def test_a_model_that_cannot_be_loaded_is_named(pictures, tmp_path):
    with pytest.raises(OSError, match=r"The vision model '.*nowhere' .* could not be loaded"):
        precompute_features.precompute(command(tmp_path / "nowhere", pictures, tmp_path / "store"))


# --- Reading ----------------------------------------------------------------------------------------------------------


def layout_of(folder: Path, rows: int, rows_per_shard: int, shape: tuple[int, int] = (5, 24)) -> SplitLayout:
    """Return the layout of a training split."""
    return SplitLayout(folder / "train", rows, rows_per_shard, views=1, shape=shape, dtype="float16")


def made_up(folder: Path, rows: int, rows_per_shard: int) -> Path:
    """Write a store in which the features of each row are its number."""
    layout = layout_of(folder, rows, rows_per_shard)
    for shard in layout.shards:
        own = np.array(layout.rows_of(shard), np.float16)
        values = np.repeat(own, 5)[:, None] * np.ones((1, 24), np.float16)
        layout.write(shard, [FeatureBatch(values, np.full((len(own), 1), 5), [])])
    finish_store(folder, VisionFingerprint("org/vision", "1" * 40, None, {}), {}, {"train": layout})
    return folder


def test_a_store_may_have_more_shards_than_open_files_are_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr("qformer_captioner.data.features.MAX_OPEN_FILES", 3)
    train = FeatureStore(made_up(tmp_path, 50, 4)).split("train")
    order = np.random.default_rng(0).permutation(50)
    for rows in (order, order[::-1]):
        np.testing.assert_array_equal(train.read(rows).image_embeds[:, 0, 0], rows)
    assert len(train._files) == 3


def test_a_batch_stays_valid_when_more_is_read(tmp_path):
    train = FeatureStore(made_up(tmp_path, 50, 20)).split("train")
    kept = [(row, train.read([row, 0]).image_embeds) for row in range(20)]
    kept = [(row, batch[0]) for row, batch in kept]  # a view keeps its batch alive
    train.read(range(20, 50))
    assert all((features == row).all() for row, features in kept)


def test_the_memory_of_a_batch_is_reused_when_its_last_tensor_is_gone(tmp_path):
    train = FeatureStore(made_up(tmp_path, 50, 20)).split("train")
    first = train.read([1, 2, 3]).image_embeds
    place, second = first.data_ptr(), train.read([4, 5, 6]).image_embeds
    assert second.data_ptr() != place
    del first
    assert train.read([7, 8]).image_embeds.data_ptr() == place


@pytest.mark.parametrize("row", [-1, 50])
def test_a_row_that_does_not_exist_is_an_error(tmp_path, row):
    train = FeatureStore(made_up(tmp_path, 50, 20)).split("train")
    with pytest.raises(IndexError, match="There are 50 rows with 1 views each, numbered from 0"):
        train.read([0, row])


def test_workers_read_the_same_rows(tmp_path):
    train = FeatureStore(made_up(tmp_path, 50, 20)).split("train")
    loader = torch.utils.data.DataLoader(
        range(50), batch_size=8, collate_fn=train.read, num_workers=2, multiprocessing_context="fork"
    )
    assert torch.cat([batch.image_embeds for batch in loader])[:, 0, 0].tolist() == list(range(50))
    assert torch.equal(pickle.loads(pickle.dumps(train)).read([3, 30]).image_embeds, train.read([3, 30]).image_embeds)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_memory_does_not_grow_with_the_rows_that_are_read(commands, tmp_path):
    """The second store has a hundred times the rows, of which 256 MB are read. Its files are sparse."""
    program = (
        "import re, sys\n"
        "import numpy as np\n"
        "from qformer_captioner.data.feature_store import FeatureStore\n"
        "for folder in sys.argv[1:]:\n"
        "    train = FeatureStore(folder).split('train')\n"
        "    for start in range(0, len(train), 2000):\n"
        "        train.read(range(start, start + 1000), np.zeros(1000, int))\n"
        "    print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])"
    )
    folders = [tmp_path / "few", tmp_path / "many"]
    for folder, rows in zip(folders, (10_000, 1_000_000), strict=True):
        layout = layout_of(folder, rows, 100_000, shape=(4, 64))
        for shard in layout.shards:
            layout.write(shard, [])  # a header without features
            os.truncate(layout.path(shard), layout.path(shard).stat().st_size + layout.bytes_of(shard, 4))
        finish_store(folder, VisionFingerprint("org/vision", "1" * 40, None, {}), {}, {"train": layout})
    read = ["python", "-c", program, *map(str, folders)]
    done = subprocess.run(read, env=commands.environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    few, many = (int(peak) / 1024 for peak in done.stdout.split())
    assert many < few + 2


def test_paths_in_the_image_column_are_opened(vision, pictures, tmp_path, store):
    paths = {"image": [str(pictures / f"{i}.png") for i in range(3)], "caption": ["a"] * 3}
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict(paths).to_parquet(tmp_path / "data" / "train.parquet")
    more = ["--dtype", "float32", "--image_folder", str(pictures)]
    precompute_features.precompute(command(vision, tmp_path / "data", tmp_path / "own", *more))
    ours, theirs = (FeatureStore(folder).split("train") for folder in (tmp_path / "own", store))
    torch.testing.assert_close(ours.read(range(3)).image_embeds, theirs.read(range(3)).image_embeds)
    assert open_image(paths["image"][0]).size == (40, 50)
