"""Devices without float64, the dtype that is chosen for a device, and the check of a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, ParakeetEncoder, ParakeetEncoderConfig

from modeling_blsp_kd import BlspKdConfig, BlspKdForCausalLM, devices
from modeling_blsp_kd.devices import fast_dtype, float64_device
from modeling_blsp_kd.stored_dtypes import part_of
from tests.gpu_check import BUDGETS_S, PARTS
from tests.helpers.models import make_model
from tests.helpers.prompts import spoken_prompts

TESTS = Path(__file__).parent


def test_float64_is_computed_on_the_device_where_it_exists():
    assert float64_device(torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert float64_device(torch.device("cpu")) == torch.device("cpu")
    assert float64_device(torch.device("mps")) == torch.device("cpu")


@pytest.mark.long
def test_a_device_without_float64_does_all_that_the_cpu_does():
    """On a Mac, where the Trainer and pipelines take MPS by themselves, any prompt with audio failed in CIF."""
    checks = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", TESTS / "on_device.py"],
        env={**os.environ, "BLSP_KD_TEST_DEVICE": "standin"},
        capture_output=True,
        text=True,
    )
    assert checks.returncode == 0, checks.stdout[-5000:]


# -- the cores of this process -----------------------------------------------------------------------------------------


def test_a_process_that_may_use_one_core_counts_one():
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system cannot take cores from a process")
    counted = subprocess.run(
        [
            sys.executable,
            "-c",
            "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
            "from modeling_blsp_kd.devices import usable_cores; print(usable_cores())",
        ],
        cwd=TESTS.parent,
        check=True,
        capture_output=True,
        text=True,
    )
    assert counted.stdout.split() == ["1"]


# -- the dtype that is chosen for a device ----------------------------------------------------------------------------


def test_a_cpu_gets_float32_and_says_so_once(monkeypatch):
    said = []
    monkeypatch.setattr(devices.logger, "warning_once", said.append)
    assert fast_dtype(device=torch.device("cpu")) == "float32" and len(said) == 1
    assert "float32" in said[0] and "slower" in said[0]
    assert fast_dtype(device=torch.device("cuda")) == fast_dtype(device=torch.device("mps")) == "auto"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert fast_dtype() == "auto"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert len(said) == 1 and fast_dtype() == "float32"


@pytest.mark.parametrize("asked", ["bfloat16", "auto", torch.float16])
def test_an_explicit_dtype_is_obeyed(asked, monkeypatch):
    monkeypatch.setattr(devices.logger, "warning_once", lambda _: pytest.fail("nothing was chosen"))
    assert fast_dtype(asked, torch.device("cpu")) == asked
    assert fast_dtype(asked, torch.device("cuda")) == asked


# -- the dtypes of parts ----------------------------------------------------------------------------------------------


def dtypes_of(model) -> dict:
    return {
        part: {tensor.dtype for name, tensor in model.named_parameters() if part_of(name) == part}
        for part in ("audio_tower", "adapter", "language_model", "plora")
    }


def half_model(backbones, dtype=torch.bfloat16, **options):
    """Backbones in half precision, and what is trained in float32, with values that half precision cannot hold."""
    model = BlspKdForCausalLM.from_backbones(*backbones, audio_token_id=300, dtype=dtype, plora=True, **options)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("freeze_speech_encoder", [True, False])
@pytest.mark.parametrize("options", [{}, {"dtype": "auto"}, {"device_map": "cpu"}])
def test_what_was_trained_in_float32_comes_back_in_float32(backbones, tmp_path, dtype, freeze_speech_encoder, options):
    """A full checkpoint came back in one dtype, that of its first weight: the frozen encoder's half precision rounded
    the adapter, and a trained encoder's float32 doubled the memory of the LLM."""
    model = half_model(backbones, dtype, freeze_speech_encoder=freeze_speech_encoder)
    model.save_pretrained(tmp_path)
    loaded = BlspKdForCausalLM.from_pretrained(tmp_path, **options)
    encoder = {dtype} if freeze_speech_encoder else {torch.float32}
    trained = {torch.float32}
    expected = {"audio_tower": encoder, "adapter": trained, "language_model": {dtype}, "plora": trained}
    assert dtypes_of(loaded) == expected
    for name, values in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name].float(), values.float()), name
    assert loaded.config.part_dtypes is None and model.config.part_dtypes is None
    loaded.save_pretrained(tmp_path / "again")
    assert dtypes_of(AutoModelForCausalLM.from_pretrained(tmp_path / "again")) == expected


def test_a_model_of_several_dtypes_answers_and_learns(backbones, processor, collator, rows, tmp_path):
    half_model(backbones, freeze_speech_encoder=False).save_pretrained(tmp_path)
    model = BlspKdForCausalLM.from_pretrained(tmp_path)
    inputs = spoken_prompts(processor)
    assert model(**inputs).logits.dtype == torch.bfloat16
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[0] == 2
    model.train()(**collator(rows)).loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(gradient is None or gradient.dtype == torch.float32 for gradient in gradients)
    assert sum(gradient is not None and bool(gradient.any()) for gradient in gradients) > 10


@pytest.mark.parametrize("freeze_speech_encoder", [True, False])
def test_batch_statistics_have_the_dtype_of_the_weights_beside_them(backbones, freeze_speech_encoder, tmp_path):
    """A Parakeet in half precision that was trained, or converted for a CPU, raised an error at its first clip."""
    torch.manual_seed(0)
    options = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    encoder = ParakeetEncoder(ParakeetEncoderConfig(**options, subsampling_conv_channels=8))
    encoder.to(torch.float16).save_pretrained(tmp_path)
    model = half_model((tmp_path, backbones[1]), freeze_speech_encoder=freeze_speech_encoder)
    for converted in (model, model.cast_frozen("float32")):
        norms = [module for module in converted.audio_tower.modules() if isinstance(module, torch.nn.BatchNorm1d)]
        assert norms and all(norm.running_mean.dtype == norm.weight.dtype for norm in norms)
        audio = converted.get_audio_features(torch.randn(1, 200, 80), torch.ones(1, 200, dtype=torch.bool))
        assert audio.pooler_output.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, "bfloat16"])
@pytest.mark.parametrize("with_config", [False, True])
def test_an_explicit_dtype_is_that_of_all_parts(backbones, tmp_path, dtype, with_config):
    half_model(backbones).save_pretrained(tmp_path)
    config = BlspKdConfig.from_pretrained(tmp_path) if with_config else None
    loaded = BlspKdForCausalLM.from_pretrained(tmp_path, config=config, dtype=dtype)
    assert set.union(*dtypes_of(loaded).values()) == {getattr(torch, dtype) if isinstance(dtype, str) else dtype}
    if with_config:
        assert config.part_dtypes["adapter"] == "float32"  # the caller's own is as it was


def test_a_model_of_one_dtype_names_no_parts(tmp_path):
    make_model(plora=True).to(torch.bfloat16).save_pretrained(tmp_path)
    assert "part_dtypes" not in (tmp_path / "config.json").read_text() or (
        BlspKdConfig.from_pretrained(tmp_path).part_dtypes is None
    )
    assert dtypes_of(BlspKdForCausalLM.from_pretrained(tmp_path))["adapter"] == {torch.bfloat16}


def test_a_thin_model_saved_in_full_keeps_its_dtypes(backbones, tmp_path):
    model = half_model(backbones, thin=True)
    model.save_pretrained(tmp_path / "thin")
    assert BlspKdConfig.from_pretrained(tmp_path / "thin").part_dtypes is None
    thin = BlspKdForCausalLM.from_pretrained(tmp_path / "thin")
    thin.save_pretrained(tmp_path / "full", full=True)
    full = BlspKdForCausalLM.from_pretrained(tmp_path / "full")
    assert dtypes_of(full) == dtypes_of(thin) == dtypes_of(model)


@pytest.mark.long
def test_a_quantised_llm_beside_float32_parts(backbones, tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    model = half_model(backbones)
    model.save_pretrained(tmp_path)
    quantised = BlspKdForCausalLM.from_pretrained(
        tmp_path, quantization_config=TorchAoConfig(torchao.Int8WeightOnlyConfig())
    )
    for name, values in model.state_dict().items():
        if part_of(name) in ("adapter", "plora"):
            assert quantised.state_dict()[name].dtype == torch.float32
            assert torch.equal(quantised.state_dict()[name], values), name


def test_wrong_dtypes_of_parts_are_named():
    with pytest.raises(ValueError, match="part_dtypes must be None, or give the name of a floating point dtype"):
        BlspKdConfig(part_dtypes={"adapter": "int8"})


# -- the check of a GPU -----------------------------------------------------------------------------------------------


def gpu_check(report, *options):
    return subprocess.run(
        [sys.executable, "-m", "tests.gpu_check", "--output", report, "--device", "cpu", "--small", *options],
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )


def test_the_check_of_a_gpu_fits_into_eight_minutes():
    assert sum(BUDGETS_S.values()) <= 8 * 60 and set(BUDGETS_S) == set(PARTS)


@pytest.mark.long
@pytest.mark.parametrize("part", BUDGETS_S)
def test_each_part_of_the_check_of_a_gpu_runs(tmp_path, part):
    done = gpu_check(tmp_path / "report.md", "--only", part, "--patience", "10")
    report = (tmp_path / "report.md").read_text()
    assert done.returncode == 0 and f"| {part} | passed |" in report, report[-3000:]
    assert len(report.split(f"## {part}")[1].split("```")[1].strip()) > 0


@pytest.mark.long
def test_a_part_that_hangs_leaves_the_others_alone(tmp_path):
    done = gpu_check(tmp_path / "report.md", "--only", "compile,attention", "--patience", "0.001")
    report = (tmp_path / "report.md").read_text()
    assert done.returncode == 1
    assert "| compile | not finished within 0 s |" in report and "| attention | not finished within 0 s |" in report
