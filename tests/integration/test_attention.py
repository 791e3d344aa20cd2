"""Which attention is taken, and that it is exact; kernels for GPUs are stood in for by one that computes the same."""

import os
import sys
import types

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from fixtures.models import qwen2_vl
from fixtures.packed_rows import GROUPS, token_losses
from qwen_vl_sft import tiny
from qwen_vl_sft.batching.packed_collator import join
from qwen_vl_sft.batching.positions import Positions
from qwen_vl_sft.compat.packed_batches import take_packed_batches
from qwen_vl_sft.config.settings import ModelSettings
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.modeling import attention, attention_kernels, image_attention
from qwen_vl_sft.modeling.attention import use_packed_attention, use_segmented_vision_attention
from qwen_vl_sft.modeling.attention_kernels import FLASH, has_varlen_kernel, resolve_attention, varlen_kernel
from qwen_vl_sft.modeling.base_model import load_model
from qwen_vl_sft.modeling.kernel_check import TOLERANCE, CheckedKernel, difference
from qwen_vl_sft.modeling.plain_attention import attend_by_piece

TINY = str(tiny.MODEL_DIR)
MODULES = {
    "flash_attention_2": "flash_attn",
    "flash_attention_3": "flash_attn_interface",
    "flash_attention_4": "flash_attn.cute",
}
HOPPER, AMPERE, TURING = (9, 0), (8, 0), (7, 5)


@pytest.fixture
def installed(monkeypatch):
    """A machine with a GPU and these packages."""

    def install(*packages, capability=HOPPER):
        monkeypatch.setattr(attention_kernels, "_is_installed", lambda package: package in packages)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
        attention_kernels._capability.cache_clear()

    yield install
    attention_kernels._capability.cache_clear()


@pytest.mark.parametrize(
    ("packages", "capability", "packed", "padded"),
    [
        ((), HOPPER, "sdpa", "sdpa"),
        (("flash-attn",), HOPPER, "flash_attention_2", "flash_attention_2"),
        (("flash-attn", "flash-attn-3", "flash-attn-4"), HOPPER, "flash_attention_3", "flash_attention_3"),
        (("flash-attn", "flash-attn-4"), HOPPER, "flash_attention_4", "flash_attention_2"),
        (("flash-attn-4",), HOPPER, "flash_attention_4", "sdpa"),
        (("flash-attn-4",), AMPERE, "sdpa", "sdpa"),
        (("flash-attn", "flash-attn-4"), AMPERE, "flash_attention_2", "flash_attention_2"),
        (("flash-attn", "flash-attn-4"), TURING, "sdpa", "sdpa"),
    ],
)
def test_automatic_attention_is_the_best_that_is_installed(installed, packages, capability, packed, padded):
    installed(*packages, capability=capability)
    assert resolve_attention("auto", on_cpu=False, dtype="bfloat16", packing=True) == packed
    assert resolve_attention("auto", on_cpu=False, dtype="bfloat16") == padded
    assert resolve_attention("auto", on_cpu=True, dtype="bfloat16", packing=True) == "sdpa"
    assert resolve_attention("auto", on_cpu=False, dtype="float32", packing=True) == "sdpa"


@pytest.mark.parametrize(
    ("wanted", "changes", "told"),
    [
        ("fast", {}, "'fast' is unknown; auto, sdpa, eager, flash_attention_2, flash_attention_3, flash_attention_4"),
        (
            "flash_attention_3",
            {},
            "flash_attention_3 is not installed (its package is flash-attn-3); leave the key out",
        ),
        ("flash_attention_2", {"on_cpu": True}, "runs on CUDA only"),
        ("flash_attention_2", {"dtype": "float32"}, "takes bfloat16 or float16, not float32"),
        ("flash_attention_4", {}, "flash_attention_4 does not run on NVIDIA A100"),
        ("eager", {"packing": True}, "eager cannot keep packed rows apart"),
    ],
)
def test_attention_that_cannot_be(installed, wanted, changes, told):
    installed("flash-attn", "flash-attn-4", capability=AMPERE)
    with pytest.raises(UserError) as error:
        resolve_attention(wanted, **{"on_cpu": False, "dtype": "bfloat16", **changes})
    assert told in str(error.value)


@pytest.mark.parametrize(("capability", "has"), [(HOPPER, True), (AMPERE, True), (TURING, False)])
def test_a_gpu_that_runs_no_kernel_attends_piece_by_piece(installed, capability, has):
    installed(capability=capability)
    on_gpu = types.SimpleNamespace(is_cuda=True, dtype=torch.float16, device=torch.device("cuda", 0))
    assert has_varlen_kernel(on_gpu) == has
    assert not has_varlen_kernel(torch.zeros(1, dtype=torch.float16))


def test_attention_that_is_asked_for_is_taken(installed):
    installed("flash-attn", "flash-attn-3", "flash-attn-4")
    for wanted in ("flash_attention_2", "flash_attention_4", "sdpa"):
        assert resolve_attention(wanted, on_cpu=False, dtype="bfloat16", packing=True) == wanted


def test_packages_are_told_apart_by_name():
    """flash-attn and flash-attn-4 are both imported as flash_attn."""
    assert attention_kernels._is_installed("torch")
    assert not attention_kernels._is_installed("flash-attn-of-nobody")
    assert len(set(FLASH.values())) == len(FLASH)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, softmax_scale, causal, deterministic
):
    """What the packages compute; keys of a segment end with its last query."""
    sizes_q, sizes_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    assert (max(sizes_q), max(sizes_k)) == (max_seqlen_q, max_seqlen_k)
    outputs = []
    for one, keys, values in zip(q.split(sizes_q), k.split(sizes_k), v.split(sizes_k), strict=True):
        mask = torch.ones(len(one), len(keys), dtype=torch.bool)
        mask = mask.tril(len(keys) - len(one)) if causal else mask
        parts = [part.transpose(0, 1) for part in (one, keys, values)]
        out = scaled_dot_product_attention(*parts, attn_mask=mask, scale=softmax_scale, enable_gqa=True)
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture
def flash(monkeypatch):
    """Put a package in place; the list it returns grows by one with each call of its function."""

    def install(implementation, returns_more=False):
        calls = []

        def function(*args, **kwargs):
            calls.append(kwargs["causal"])
            out = flash_attn_varlen_func(*args, **kwargs)
            return (out, None) if returns_more else out

        name = MODULES[implementation]
        module = types.ModuleType(name)
        module.flash_attn_varlen_func = function
        for parent in (name.partition(".")[0], name):
            monkeypatch.setitem(sys.modules, parent, module)
        monkeypatch.setattr(attention, "has_varlen_kernel", lambda value: True)
        varlen_kernel.cache_clear()
        return calls

    yield install
    varlen_kernel.cache_clear()


@pytest.mark.parametrize("implementation", FLASH)
@pytest.mark.parametrize("share", [False, True])
def test_an_installed_kernel_computes_packed_rows_and_their_images(
    implementation,
    share,
    flash,
    encoded,
    tmp_path,
    monkeypatch,
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = flash(implementation, returns_more=implementation != "flash_attention_2")
    plain, with_kernel = qwen2_vl(), qwen2_vl()
    groups = [[encoded[place] for place in group] for group in GROUPS]
    if not share:
        groups = [[row] for group in groups for row in group]
    found = {}
    for model, kernel in ((with_kernel, implementation), (plain, "sdpa")):
        use_segmented_vision_attention(model, kernel)
        use_packed_attention(model, kernel)
        take_packed_batches(model)
        if kernel == "sdpa":
            monkeypatch.undo()
        found[kernel] = token_losses(model.eval(), join(groups, Positions(model.config)))
    config = with_kernel.config
    # One more each: the kernel is compared with float32 when it is first called.
    assert calls.count(False) == config.vision_config.depth + 1
    assert calls.count(True) == config.get_text_config().num_hidden_layers + 1
    torch.testing.assert_close(found[implementation], found["sdpa"], rtol=0, atol=1e-5)


HEADS = {"q": torch.zeros(5, 4, 16, dtype=torch.bfloat16), "k": torch.zeros(5, 2, 16, dtype=torch.bfloat16)}


@pytest.mark.parametrize("causal", [False, True])
def test_a_kernel_that_computes_attention_passes_the_check(causal):
    kernel = attention_kernels._from_flash(flash_attn_varlen_func)
    before = torch.get_rng_state()
    assert difference(kernel, **HEADS, causal=causal, learns=True) < TOLERANCE / 2
    assert difference(kernel, **HEADS, causal=causal, learns=False) < TOLERANCE / 2
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_check_of_a_kernel_disturbs_no_checkpointed_layer(reentrant):
    """What it computes with gradients, inside a layer whose activations are not kept, is no part of that layer."""
    calls = []

    def flash(*args, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
        calls.append(len(args[0]))
        return flash_attn_varlen_func(*args, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options)

    def gradients(kernel):
        q, k, v = (tensor.requires_grad_() for tensor in torch.randn(3, 5, 2, 16, generator=torch.manual_seed(0)))
        bounds = torch.tensor([0, 2, 5], dtype=torch.int32)

        def layer(q, k, v):
            return kernel(2 * q, k, v, bounds, bounds, 3, 3, scale=None, causal=True).square()

        out = torch.utils.checkpoint.checkpoint(layer, q, k, v, use_reentrant=reentrant)
        out.sum().backward()
        return [tensor.grad for tensor in (q, k, v)]

    found = gradients(CheckedKernel("flash_attention_4", attention_kernels._from_flash(flash)))
    # The layer's own 5 tokens forward and once more backward, and the example's, without gradients where it takes none.
    assert [count for count in calls if count == 5] == [5, 5]
    assert len(calls) == (4 if reentrant else 3)
    for one, other in zip(found, gradients(attention_kernels._from_flash(flash)), strict=True):
        assert torch.equal(one, other)


def sees_other_rows(q, k, v, *bounds, **options):
    whole = torch.tensor([0, len(q)]), torch.tensor([0, len(k)]), len(q), len(k)
    return flash_attn_varlen_func(q, k, v, *whole, **options)


def sees_what_comes_later(*args, causal, **options):
    return flash_attn_varlen_func(*args, causal=False, **options)


def has_no_gradient_of_keys(q, k, *args, **options):
    return flash_attn_varlen_func(q, k.detach() + 0 * k, *args, **options)


def has_nan_as_gradient_of_values(q, k, v, *args, **options):
    v = 1 * v
    if v.requires_grad:
        v.register_hook(lambda grad: grad * torch.nan)
    return flash_attn_varlen_func(q, k, v, *args, **options)


def forgets_the_scale(*args, softmax_scale, **options):
    return flash_attn_varlen_func(*args, softmax_scale=1.0, **options)


def is_not_made_for_this(*args, **options):
    raise AssertionError("head_dim must be divisible by 32\nand so on")


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (sees_other_rows, "computes something else than attention with 4 heads of 16 values, 2 of them with keys"),
        (sees_what_comes_later, "computes something else"),
        (has_no_gradient_of_keys, "% off float32; set attn_implementation: sdpa"),
        (has_nan_as_gradient_of_values, "it is nan% off float32"),
        (forgets_the_scale, "computes something else"),
        (is_not_made_for_this, "does not run here with 4 heads of 16 values, 2 of them with keys: head_dim must be"),
    ],
)
def test_a_kernel_that_computes_something_else_is_refused_on_its_first_call(function, told):
    keywords = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")

    def flash(q, k, v, softmax_scale, causal, deterministic, **bounds):
        options = {"softmax_scale": softmax_scale, "causal": causal, "deterministic": deterministic}
        return function(q, k, v, *(bounds[name] for name in keywords), **options)

    kernel = CheckedKernel("flash_attention_4", attention_kernels._from_flash(flash))
    q, k = HEADS.values()
    bounds = torch.tensor([0, 5], dtype=torch.int32)
    if function is has_no_gradient_of_keys:
        kernel(q, k, k, bounds, bounds, 5, 5, scale=None, causal=True)
    with pytest.raises(UserError) as error:
        kernel(q.clone().requires_grad_(), k, k, bounds, bounds, 5, 5, scale=None, causal=True)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_a_package_that_cannot_be_imported_is_told(monkeypatch):
    broken = types.ModuleType("flash_attn_interface")  # without its function
    monkeypatch.setitem(sys.modules, "flash_attn_interface", broken)
    varlen_kernel.cache_clear()
    with pytest.raises(UserError) as error:
        varlen_kernel("flash_attention_3")
    told = "flash_attention_3 is installed (flash-attn-3) but cannot be imported: cannot import name"
    assert told in str(error.value)
    assert str(error.value).endswith("set attn_implementation: sdpa")


def test_what_flash_attention_4_compiles_is_kept_in_the_user_s_own_folder(flash, tmp_path, monkeypatch):
    names = ("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR")
    for name in names:
        monkeypatch.setenv(name, "of the test")  # so that it is put back
        monkeypatch.delenv(name)
    flash("flash_attention_4")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("no folder")
    varlen_kernel("flash_attention_4")
    assert not any(name in os.environ for name in names)
    varlen_kernel.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    varlen_kernel("flash_attention_4")
    assert os.environ[names[0]] == "1"
    assert os.path.isdir(os.environ[names[1]])
    assert os.environ[names[1]].startswith(str(tmp_path))


@pytest.mark.parametrize("sizes", [[(56, 56), (56, 56)], [(56, 84), (28, 56), (112, 28)]])
def test_segmented_vision_attention_is_exact(sizes):
    from transformers import AutoModelForImageTextToText

    ours = load_model(ModelSettings(model_name_or_path=TINY, dtype="float32"), on_cpu=True)
    theirs = AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.float32, attn_implementation="sdpa")
    grids = torch.tensor([[1, height // 14, width // 14] for height, width in sizes])
    pixels = torch.randn(int(grids.prod(-1).sum()), 1176, generator=torch.Generator().manual_seed(0))
    assert ours.model.visual.config._attn_implementation == "segmented_flash"
    assert ours.model.language_model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        mine = torch.cat(ours.model.get_image_features(pixels, grids).pooler_output)
        reference = torch.cat(theirs.model.get_image_features(pixels, grids).pooler_output)
    torch.testing.assert_close(mine, reference, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("own", "width", "longest", "learns", "right", "taken"),
    [
        (True, 80, 300, False, True, True),
        (True, 72, 256, False, True, True),
        (False, 80, 300, False, True, False),
        (True, 64, 300, False, True, False),
        (True, 80, 200, False, True, False),
        (True, 80, 300, True, True, False),
        (True, 80, 300, False, False, False),
    ],
)
def test_the_kernel_for_images_takes_what_it_is_made_for(own, width, longest, learns, right, taken, monkeypatch):
    def plain(q, k, v, bounds, scale):
        return attend_by_piece(q, k, v, bounds, bounds, scale, causal=False)

    def called(name, attend):
        return lambda *arguments, **_: names.append(name) or attend(*arguments)

    names = []
    monkeypatch.setattr(attention, "has_varlen_kernel", lambda value: True)
    monkeypatch.setattr(image_attention, "_is_right", lambda *_: right)
    monkeypatch.setattr(
        attention, "attend_to_images", called("own", lambda q, k, v, b, _, scale: plain(q, k, v, b, scale))
    )
    pytorchs = called("PyTorch's", lambda q, k, v, b, *_: plain(q, k, v, b, None))
    monkeypatch.setattr(attention, "varlen_kernel", lambda name: pytorchs)
    q, k, v = (torch.randn(1, 2, longest + 40, width, requires_grad=learns) for _ in range(3))
    bounds = torch.tensor([0, 40, longest + 40], dtype=torch.int32)
    found, _ = attention._segmented_attention(
        "sdpa", own, None, q, k, v, None, cu_seq_lens_q=bounds, max_length_q=torch.tensor(longest)
    )
    assert names == ["own" if taken else "PyTorch's"]
    assert torch.equal(found[0], plain(*(one[0].transpose(0, 1) for one in (q, k, v)), bounds, None))


def test_the_kernel_for_images_is_asked_for_by_its_own_name():
    model = load_model(ModelSettings(model_name_or_path=TINY, dtype="float32"), on_cpu=True)
    attention.use_segmented_vision_attention(model, own=True)
    assert model.model.visual.config._attn_implementation == "segmented_flash_own"
    attention.use_segmented_vision_attention(model, "flash_attention_4", own=True)
    assert model.model.visual.config._attn_implementation == "segmented_flash_4"
