"""Features of a frozen vision tower kept on disk: exact, whole or absent, of this tower and these pixels alone."""

import copy
import itertools
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fixtures.messages import conversation_row, png
from fixtures.models import FAMILIES, newer, qwen2_vl
from fixtures.packed_rows import GROUPS, in_order, losses_of, one_at_a_time, token_losses
from fixtures.processes import launch, run_process
from fixtures.trainers import make_trainer
from qwen_vl_sft import tiny
from qwen_vl_sft.batching.collator import Collator
from qwen_vl_sft.batching.packed_collator import MICRO_BATCHES, PackedCollator, join
from qwen_vl_sft.batching.positions import Positions
from qwen_vl_sft.compat.packed_batches import take_packed_batches
from qwen_vl_sft.compat.vision_tower import run_vision_in_every_batch
from qwen_vl_sft.config.batch_rules import BATCH_RULES
from qwen_vl_sft.config.reading import build
from qwen_vl_sft.data.dataset import open_rows
from qwen_vl_sft.data.encoding import Encoder
from qwen_vl_sft.data.feature_cache import FeatureCache
from qwen_vl_sft.data.media.image import EncodedImage
from qwen_vl_sft.data.scan import scan
from qwen_vl_sft.distributed.context import DistributedContext
from qwen_vl_sft.errors import BadRow, UserError
from qwen_vl_sft.modeling.attention import use_packed_attention
from qwen_vl_sft.modeling.base_model import build_on_meta, set_pixel_limits
from qwen_vl_sft.modeling.structure import build_structure
from qwen_vl_sft.training import precompute_features
from qwen_vl_sft.training.image_features import plan_features

DISTINCT = 16  # different images among the first 24 rows of the tiny charts' val split


def planned(recipe, rows, encoder):
    return plan_features(recipe, build_structure(build_on_meta(recipe.model), recipe.model), rows, encoder)


def cache_of(model, folder, storage="float32"):
    parts = 1 + len(getattr(model.config.vision_config, "deepstack_visual_indexes", []))
    return FeatureCache(folder, storage, parts * model.config.get_text_config().hidden_size, parts)


def backbone_of(model):
    return next(module for module in model.modules() if hasattr(module, "language_model") and hasattr(module, "visual"))


def stored(model, rows, cache):
    """The rows with features that went through the disk instead of pixels."""
    for image in {image.content_hash: image for row in rows for image in row.media}.values():
        (values,) = precompute_features.run_tower(backbone_of(model), [image], torch.device("cpu"))
        cache.write(image.content_hash, values, image.grid)

    def read(image):
        features, grid = cache.read(image.content_hash)
        return EncodedImage(image.content_hash, grid, features=features)

    return [replace(row, media=tuple(read(image) for image in row.media)) for row in rows]


def refuse_to_run(*args):
    raise AssertionError("the vision tower ran")


@pytest.mark.parametrize("share", [False, True])
def test_losses_are_those_of_rows_one_at_a_time(share, model, encoded, tmp_path):
    cached = stored(model, encoded, cache_of(model, tmp_path))
    groups = GROUPS if share else [[row] for group in GROUPS for row in group]
    batch = join([[cached[place] for place in group] for group in groups], Positions(model.config))
    assert not {"pixel_values", "image_grid_thw"} & batch.keys()
    assert batch["stats"]["patches"] == 0
    assert batch["stats"]["images"] == 2
    wanted = one_at_a_time(model, [encoded[place] for place in in_order(groups)])
    hook = backbone_of(model).visual.register_forward_pre_hook(refuse_to_run)
    try:
        torch.testing.assert_close(token_losses(model, batch), wanted, rtol=0, atol=1e-5)
        other = {**batch, "image_features": batch["image_features"].flip(0)}
        assert (token_losses(model, other) - wanted).abs().max() > 1e-4
    finally:
        hook.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_features_of_a_bfloat16_tower_change_no_bit(family, encoded, tmp_path):
    model = (qwen2_vl() if family == "qwen2_vl" else newer(family)).bfloat16().eval()
    use_packed_attention(model)
    take_packed_batches(model)
    plain = join([[row] for row in encoded], Positions(model.config))
    cached = join(
        [[row] for row in stored(model, encoded, cache_of(model, tmp_path, "bfloat16"))], Positions(model.config)
    )
    assert cached["image_features"].dtype == torch.bfloat16
    assert torch.equal(token_losses(model, plain), token_losses(model, cached))


def test_no_batch_of_features_runs_the_tower_even_without_images(encoded):
    """Otherwise a process with text alone would wait under ZeRO-3 and FSDP2 for others that do not run it."""
    model = qwen2_vl()
    use_packed_attention(model)
    take_packed_batches(model)
    run_vision_in_every_batch(model)
    ran = []
    model.model.visual.register_forward_pre_hook(lambda *args: ran.append(1))
    batch = join([[encoded[5]]], Positions(model.config))
    losses = token_losses(model, batch)
    assert ran == [1]
    nothing = torch.zeros(0, model.config.get_text_config().hidden_size)
    torch.testing.assert_close(token_losses(model, {**batch, "image_features": nothing}), losses, rtol=0, atol=0)
    assert ran == [1]


@pytest.mark.parametrize(
    ("storage", "least", "most"), [("float32", 0, 0), ("bfloat16", 1e-3, 2e-3), ("int8", 5e-3, 1e-2)]
)
def test_rounding_and_size_are_as_stated(storage, least, most, tmp_path):
    cache = FeatureCache(tmp_path, storage, 2 * 1536, 2)
    scale = torch.tensor([1.0, 100.0]).repeat_interleave(1536)  # the parts of Qwen3-VL differ in size
    features = torch.randn(300, 2 * 1536, generator=torch.Generator().manual_seed(0)) * scale
    cache.write("ab", features, torch.tensor([1, 60, 20]))
    found, grid = cache.read("ab")
    assert grid.tolist() == [1, 60, 20]
    for part in (slice(0, 1536), slice(1536, None)):
        error = (found.float() - features)[:, part].norm() / features[:, part].norm()
        assert least <= error <= most
    assert cache.path("ab").stat().st_size == pytest.approx(cache.size(300), abs=300)


def test_zeros_are_stored_as_zeros(tmp_path):
    cache = FeatureCache(tmp_path, "int8", 4, 1)
    cache.write("ab", torch.zeros(3, 4), torch.tensor([1, 2, 6]))
    assert not cache.read("ab")[0].any()


def recipe(tmp_path, **keys):
    defaults = {
        "model_name_or_path": str(tiny.MODEL_DIR),
        "dataset_name": str(tiny.DATA_DIR),
        "dtype": "float32",
        "packing": True,
        "cache_image_features": "float32",
        "image_features_dir": str(tmp_path / "cache"),
        "bf16": False,
    }
    return build({**defaults, **keys})


class Filling:
    """A trainer of a frozen tower, the rows it reads, and what its run would keep on disk."""

    def __init__(self, tmp_path, processor, rows, **keys):
        encoder = Encoder(processor)
        self.scan = scan(rows, encoder, verify_images=False, content_hashes=True)
        self.features = planned(recipe(tmp_path, **keys), self.scan, encoder)
        model = qwen2_vl()
        use_packed_attention(model)
        take_packed_batches(model)
        for parameter in model.model.visual.parameters():
            parameter.requires_grad_(False)
        self.trainer = make_trainer(model, self.scan.rows, processor, tmp_path)
        padded = Collator(self.scan.rows, encoder, skip_bad_rows=True)
        self.collator = PackedCollator(padded, Positions(model.config), features=self.features.cache)
        self.trainer.data_collator = self.collator
        self.read = []
        visual, forward = model.model.visual, model.model.visual.forward
        visual.forward = lambda pixels, grid_thw, **kwargs: (
            self.read.append(len(grid_thw)) or forward(pixels, grid_thw=grid_thw, **kwargs)
        )

    def fill(self, skip_bad_rows=False):
        """Fill the cache; returns how many images went through the tower."""
        self.read.clear()
        precompute_features.fill(self.trainer, self.features, skip_bad_rows)
        return sum(self.read)

    def batch(self):
        """A micro-batch of the first six rows."""
        (batch,) = self.collator([[[row] for row in range(6)]])[MICRO_BATCHES]
        return batch

    def files(self):
        return sorted(self.features.cache.folder.glob("*/*"))


@pytest.fixture
def filling(tmp_path, tiny_processor):
    found = Filling(tmp_path, tiny_processor, open_rows(str(tiny.DATA_DIR), "val", max_rows=24))
    assert len(found.features.locations) == len(set(found.scan.lengths.prefix.tolist())) == DISTINCT
    return found


def test_every_image_is_computed_once_and_found_again(filling, tmp_path, tiny_processor, capsys):
    assert filling.fill() == DISTINCT
    assert f"{DISTINCT} of {DISTINCT} images to compute" in capsys.readouterr().out
    cached = filling.batch()
    filling.collator.features = None
    plain = filling.batch()
    assert plain["stats"]["patches"] > cached["stats"]["patches"] == 0
    weights = filling.trainer.model.eval()
    torch.testing.assert_close(*(losses(weights, batch) for batch in (plain, cached)), rtol=0, atol=1e-5)
    before = [(path, path.stat().st_mtime_ns) for path in filling.files()]
    assert filling.fill() == 0
    assert [(path, path.stat().st_mtime_ns) for path in filling.files()] == before
    assert "0 to compute" in filling.features.describe()


def losses(model, batch):
    return token_losses(model, {name: value for name, value in batch.items() if name != "row_ids"})


def test_training_decodes_no_image(filling, monkeypatch):
    filling.fill()
    monkeypatch.setattr("qwen_vl_sft.data.media.image_file.ImageFile.decode", lambda file: pytest.fail("decoded"))
    assert filling.batch()["image_features"].shape[1] == filling.features.cache.width


def test_a_run_that_was_killed_leaves_nothing_half(filling, monkeypatch):
    writes, put = itertools.count(), Path.replace

    def killed(path, target):
        if next(writes) >= 3:
            raise KeyboardInterrupt
        return put(path, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        filling.fill()
    monkeypatch.setattr(Path, "replace", put)
    assert any(path.name.endswith(".partial") for path in filling.files())
    whole = sum(filling.features.cache.holds(key) for key in filling.features.locations)
    assert whole == sum(filling.features.cache.is_sound(key) for key in filling.features.locations) == 3
    assert filling.fill() == DISTINCT - 3
    assert all(filling.features.cache.is_sound(key) for key in filling.features.locations)


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied"])
def test_a_damaged_file_is_computed_again(damage, filling, capsys):
    filling.fill()
    path = filling.files()[3]
    whole = path.read_bytes()
    changed = {"cut": whole[:-1], "flipped": whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], "emptied": b""}[damage]
    path.write_bytes(changed)
    assert filling.fill() == 1
    assert path.read_bytes() == whole
    assert "1 damaged" in capsys.readouterr().out


def test_half_files_of_killed_runs_are_removed_once_they_are_old(filling):
    filling.fill()
    folder = filling.files()[0].parent
    old, new = folder / "old.1.partial", folder / "new.1.partial"
    old.write_bytes(b"half")
    new.write_bytes(b"half")
    os.utime(old, (1, 1))
    filling.fill()
    assert not old.exists()
    assert new.exists()


def changed_model(tmp_path, name, part):
    """A copy of the tiny model with one changed number in the first tensor whose name has `part` in it; none for None."""
    folder = shutil.copytree(tiny.MODEL_DIR, tmp_path / name)
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    if part:
        tensor = tensors[next(key for key in sorted(tensors) if part in key)]
        tensor.view(-1)[0] += 1
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    return str(folder)


def test_another_tower_precision_or_pixel_limit_has_a_folder_of_its_own(tmp_path, tiny_processor):
    encoder = Encoder(tiny_processor)
    found = scan(open_rows(str(tiny.DATA_DIR), "val", max_rows=4), encoder, content_hashes=True)

    def folder(encoder=encoder, **keys):
        return planned(recipe(tmp_path, **keys), found, encoder).cache.folder.name.rpartition("-")[2]

    wider = copy.deepcopy(tiny_processor)
    set_pixel_limits(wider, None, 50176)
    folders = [
        folder(),
        folder(Encoder(wider)),
        folder(model_name_or_path=changed_model(tmp_path, "tower", "visual.")),
        folder(dtype="bfloat16"),
        folder(bf16=True),
        folder(load_in_4bit=True),
        folder(cache_image_features="int8"),
    ]
    assert len(set(folders)) == len(folders)
    assert folder() == folders[0]
    assert folder(bf16=None) == folder(bf16=True), "which is what runs when the recipe is silent"
    assert folder(model_name_or_path=changed_model(tmp_path, "moved", None)) == folders[0]
    assert folder(model_name_or_path=changed_model(tmp_path, "tuned", "model.layers")) == folders[0]


def test_the_default_folder_is_in_the_users_cache(tmp_path, tiny_processor, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    encoder = Encoder(tiny_processor)
    found = scan(open_rows(str(tiny.DATA_DIR), "val", max_rows=4), encoder, content_hashes=True)
    features = planned(recipe(tmp_path, image_features_dir=None), found, encoder)
    assert features.cache.folder.parent == tmp_path / "home/qwen_vl_sft/image_features"
    assert len(features.describe()) <= 80


@pytest.mark.parametrize(
    "keys",
    [
        {"lora_scope": "all"},
        {"lora_scope": "merger"},
        {"lora_target_modules": ["qkv", "q_proj"]},
        {"lora_modules_to_save": ["merger"]},
        {"lora_modules_to_save": ["erger"]},
    ],
)
def test_a_tower_that_trains_is_refused(keys, tmp_path, tiny_processor):
    encoder = Encoder(tiny_processor)
    found = scan(open_rows(str(tiny.DATA_DIR), "val", max_rows=4), encoder, content_hashes=True)
    with pytest.raises(UserError, match=r"cache_image_features needs a vision tower .* lora_scope: language"):
        planned(recipe(tmp_path, **keys), found, encoder)


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"packing": False}, "needs packing: true"),
        ({"use_peft": False}, "use_peft: false trains the merger"),
        ({"cache_image_features": None}, "image_features_dir is set but cache_image_features is not"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(keys, problem, tmp_path):
    context = DistributedContext("single", 1, 0, 0, True)
    problems = [found for rule in BATCH_RULES for found in rule(recipe(tmp_path, **keys), context)]
    assert [found for found in problems if problem in found]
    assert not [found for rule in BATCH_RULES for found in rule(recipe(tmp_path), context)]


def test_a_disk_without_room_is_refused_before_anything_is_computed(filling, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=f"has not enough room: {DISTINCT} of {DISTINCT} images to compute"):
        filling.fill()
    assert not filling.read
    assert not filling.files()


def test_a_folder_that_others_do_not_see_is_refused(filling, monkeypatch):
    monkeypatch.setattr(precompute_features, "_SECONDS_TO_APPEAR", 1)
    monkeypatch.setattr(FeatureCache, "write", lambda *args: None)
    with pytest.raises(
        UserError, match=rf"process 0 does not see {DISTINCT} of {DISTINCT} files .* all machines share"
    ):
        filling.fill()


def test_an_image_that_cannot_be_decoded_stops_the_run_or_leaves_its_rows_out(tmp_path, tiny_processor):
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    (folder / "images/red.png").write_bytes(png("red"))
    (folder / "images/bad.png").write_bytes(png("blue")[:60])
    rows = [conversation_row(), conversation_row(images=("images/bad.png",))]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    filling = Filling(tmp_path, tiny_processor, open_rows(str(folder), "train"))
    with pytest.raises(BadRow, match=r"row 1 image .*bad.png cannot be decoded"):
        filling.fill()
    filling.fill(skip_bad_rows=True)
    (batch,) = filling.collator([[[0], [1]]])[MICRO_BATCHES]
    assert batch["row_ids"] == [0]
    assert batch["stats"]["skipped"] == 1


def test_a_micro_batch_of_text_alone_brings_no_features_and_says_so(tmp_path, tiny_processor, messages_folder):
    rows = messages_folder([conversation_row(), conversation_row("What is one?", "one", images=())])
    filling = Filling(tmp_path, tiny_processor, open_rows(str(rows), "train"))
    assert filling.fill() == 1
    text, filler = filling.collator([[[1]], []])[MICRO_BATCHES]
    assert text["image_features"].shape == (0, filling.features.cache.width)
    assert len(filler["image_features"]) > 0
    assert "pixel_values" not in filler


def test_the_scan_tells_images_apart_when_asked(tiny_processor):
    encoder, rows = Encoder(tiny_processor), open_rows(str(tiny.DATA_DIR), "val", max_rows=8)
    found = scan(rows, encoder, content_hashes=True)
    seen = [rows.encode({"row": index}, encoder).media for index in range(len(rows))]
    assert found.content_hashes == [[image.content_hash for image in images] for images in seen]
    assert found.image_patches == [[len(image.pixel_values) for image in images] for images in seen]
    assert scan(rows, encoder).content_hashes == []


def arguments(data, folder, *more):
    keys = {
        "model_name_or_path": tiny.MODEL_DIR,
        "dataset_name": data,
        "dataset_test_split": "train",
        "output_dir": folder,
        "dtype": "float32",
        "bf16": "false",
        "use_cpu": "true",
        "global_batch_size": 4,
        "packing": "true",
        "tokens_per_batch": 500,
        "max_steps": 4,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
        "gradient_checkpointing": "false",
        "dataloader_num_workers": 1,
        "report_to": "none",
        "disable_tqdm": "true",
    }
    return ["scripts/sft.py", *(word for key, value in keys.items() for word in (f"--{key}", str(value))), *more]


@pytest.fixture(scope="module")
def uncached(mixed_data, tmp_path_factory):
    """Losses of one process that computes the features in every step."""
    folder = tmp_path_factory.mktemp("uncached") / "run"
    done = run_process(*arguments(mixed_data, folder))
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "metrics.json").read_text())["work"]["patches"] > 0
    return losses_of(folder)


@pytest.mark.parametrize(
    "config", ["cpu", *(pytest.param(name, marks=pytest.mark.long) for name in ("fsdp2", "zero3"))]
)
def test_two_processes_with_features_on_disk_have_the_losses_of_one_without(config, mixed_data, uncached, tmp_path):
    kept = ["--cache_image_features", "float32", "--image_features_dir", str(tmp_path / "cache")]
    done = launch(config, *arguments(mixed_data, tmp_path / "run", *kept))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 of 2 images to compute" in done.stdout
    assert len(list((tmp_path / "cache").glob("*/*/*.safetensors"))) == 2
    assert losses_of(tmp_path / "run") == pytest.approx(uncached, abs=1e-5 if config == "cpu" else 1e-3)
    work = json.loads((tmp_path / "run/metrics.json").read_text())["work"]
    assert work["patches"] == 0
    assert work["images"] > 0
