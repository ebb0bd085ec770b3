"""Input from outside runs no code and reaches no other file, and errors name what is broken in a folder.

Random damage is the fuzzer's, see `reliability/fuzz.py`; here are the kinds of it, with what must be said.
"""

import json
import pickle
import shutil

import pytest
import torch
from jinja2.exceptions import SecurityError
from safetensors.torch import load_file, save_file

from modeling_blsp_kd import BlspKdConfig, BlspKdForCausalLM
from processing import BlspKdPipeline, BlspKdProcessor
from tests.helpers.models import make_config, make_model
from tests.helpers.prompts import SAMPLING_RATE, clip


class Trap:
    """Unpacking it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def folder(tmp_path):
    make_model(plora=False).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_pickle_is_not_unpacked(folder, tmp_path):
    sprung = tmp_path / "sprung"
    pickle.loads(pickle.dumps(Trap(sprung))).close()
    assert sprung.exists(), "the trap works"
    sprung.unlink()
    pickled = pickle.dumps({"weights": Trap(sprung)})
    (folder / "pytorch_model.bin").write_bytes(pickled)
    BlspKdForCausalLM.from_pretrained(folder)  # the safetensors beside it
    (folder / "model.safetensors").unlink()
    with pytest.raises((pickle.UnpicklingError, OSError, ValueError, RuntimeError)):
        BlspKdForCausalLM.from_pretrained(folder)
    assert not sprung.exists()


def test_a_chat_template_reaches_nothing_of_python(processor):
    reach = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(SecurityError, match="is unsafe"):
        processor.apply_chat_template([{"role": "user", "content": "hello"}], chat_template=reach)


# -- text -------------------------------------------------------------------------------------------------------------


def test_half_of_a_surrogate_pair_is_named(processor):
    """JSON may hold it, and tokenizers said that a string was no string."""
    with pytest.raises(ValueError, match=r"The text 'say .ud800' is no Unicode: character 4 is half of a surrogate"):
        processor("say \ud800")


def test_chats_among_other_inputs_are_understood(processor):
    """transformers' pipelines look at the first of several inputs alone: KeyError: 0."""
    chat = [{"role": "user", "content": [{"type": "audio", "audio": clip(0.5), "sampling_rate": SAMPLING_RATE}]}]
    one_clip = {"audio": clip(0.5), "sampling_rate": SAMPLING_RATE}
    pipe = BlspKdPipeline(model=make_model(), processor=processor)
    answers = pipe([chat, one_clip], max_new_tokens=2)
    assert answers == [pipe(each, max_new_tokens=2) for each in (chat, one_clip)]


@pytest.mark.parametrize("text", [7, None, ["a"]])
def test_a_text_block_without_text_is_named(text, processor):
    with pytest.raises(ValueError, match="needs a 'text' that is a string, but got"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "text", "text": text}]}], tokenize=True)


# -- weights ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["full", "thin", "sharded"])
def damaged(request, folder, backbones, tmp_path):
    """A model's folder that a test may damage, and one of its files of weights."""
    if request.param == "full":
        return folder, folder / "model.safetensors"
    if request.param == "thin":
        speech, text = backbones
        model = BlspKdForCausalLM.from_backbones(speech, text, thin=True, audio_token_id=300)
        model.save_pretrained(tmp_path / "thin")
        return tmp_path / "thin", tmp_path / "thin" / "model.safetensors"
    BlspKdForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    first, second, *_ = sorted((tmp_path / "sharded").glob("model-*.safetensors"))
    return tmp_path / "sharded", second


def test_broken_weights_are_named(damaged):
    """safetensors' own errors tell neither which file is broken nor what to do."""
    folder, file = damaged
    BlspKdForCausalLM.from_pretrained(folder)
    whole = file.read_bytes()
    for contents in (whole[:-1], whole[:1000], b"", b"\xff" * 8 + whole[8:]):
        file.write_bytes(contents)
        with pytest.raises(ValueError, match=rf"{file.name} \({len(contents)} bytes\) is no whole safetensors file"):
            BlspKdForCausalLM.from_pretrained(folder)


def test_weights_of_another_size_are_named(damaged):
    folder, file = damaged
    weights = load_file(file)
    name = next(name for name in weights if name.startswith("adapter.") or "layers" in name)
    save_file({**weights, name: torch.zeros(3, 1)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"do not fit its config: {name} is .*\(3, 1\) instead of .*\(1 in all\)"):
        BlspKdForCausalLM.from_pretrained(folder)


def test_sizes_that_do_not_fit_can_still_be_ignored(folder):
    weights = load_file(folder / "model.safetensors")
    weights["adapter.output_proj.bias"] = torch.zeros(3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = BlspKdForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True)
    assert model.adapter.output_proj.bias.shape == (model.config.text_config.hidden_size,)


def with_index(folder, file_name, **replaced):
    """The weights as one shard of a name, and an index of it."""
    weights = folder / "model.safetensors"
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(weights), file_name), **replaced}
    weights.rename(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_an_index_of_shards_is_read(folder):
    expected = load_file(folder / "model.safetensors")
    with_index(folder, "part.safetensors")
    assert BlspKdForCausalLM.from_pretrained(folder).state_dict().keys() == expected.keys()


@pytest.mark.parametrize("kind", ["relative", "absolute", "of a backbone"])
def test_an_index_of_shards_reaches_no_file_elsewhere(kind, folder, backbones, tmp_path):
    """transformers joined the folder and whatever the index names, and read it."""
    outside = tmp_path / "outside.safetensors"
    shutil.copy(folder / "model.safetensors", outside)
    if kind == "of a backbone":
        speech, text = shutil.copytree(backbones[0], tmp_path / "speech"), backbones[1]
        with_index(speech, "../outside.safetensors")
        with pytest.raises(ValueError, match="names the file '../outside.safetensors', but shards are read only from"):
            BlspKdForCausalLM.from_backbones(speech, text, audio_token_id=300)
        return
    with_index(folder, "../outside.safetensors" if kind == "relative" else str(outside))
    with pytest.raises(ValueError, match="names the file .*outside.safetensors', but shards are read only from"):
        BlspKdForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    "file_name, replaced, error, message",
    [
        ("lost.safetensors", {}, FileNotFoundError, "lost.safetensors is missing, which model.safetensors.index.json"),
        ("config.json", {}, ValueError, r"config.json \(\d+ bytes\) is no whole safetensors file"),
        (
            "part.safetensors",
            {"weight_map": {"a": "part.safetensors"}},
            ValueError,
            r"part.safetensors lacks \['a'\] \(1 in all\)",
        ),
        ("part.safetensors", {"weight_map": {"a": [7]}}, ValueError, "index.json must hold an object of 'metadata'"),
        ("part.safetensors", {"weight_map": [7]}, ValueError, "index.json must hold an object of 'metadata'"),
        ("part.safetensors", {"metadata": None}, ValueError, "index.json must hold an object of 'metadata'"),
    ],
)
def test_a_broken_index_of_shards_is_named(file_name, replaced, error, message, folder):
    with_index(folder, file_name, **replaced)
    with pytest.raises(error, match=message):
        BlspKdForCausalLM.from_pretrained(folder)


# -- JSON files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contents", [None, "{}", "[1]"])
def test_a_folder_without_a_config_is_no_model(contents, folder):
    """transformers took its defaults, a Llama of 7B, for a missing config, and made room for that."""
    (folder / "config.json").unlink()
    if contents is not None:
        (folder / "config.json").write_text(contents)
    with pytest.raises(OSError, match="has no config.json, or none with options"):
        BlspKdForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("contents", ["{", "[1]", '{"cache_implementation": ["a"]}'])
def test_a_broken_generation_config_is_named(contents, folder):
    """transformers took one that is no JSON for a missing one."""
    (folder / "generation_config.json").write_text(contents)
    with pytest.raises((ValueError, OSError), match="generation_config.json"):
        BlspKdForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    "part, options, message",
    [
        ("speech_config", 7, "speech_config must be a config, got 7"),
        ("text_config", {"model_type": ["llama"]}, "text_config in it, is wrong: TypeError: unhashable"),
        ("text_config", {"model_type": "llama", "hidden_size": "wide"}, "text_config in it, is wrong: .*hidden_size"),
    ],
)
def test_a_wrong_config_within_the_config_is_named(part, options, message):
    given = make_config().to_dict()
    given[part] = options
    with pytest.raises(ValueError, match=message):
        BlspKdConfig(**given)


def test_a_part_that_cannot_be_built_is_named():
    config = make_config()
    config.text_config.hidden_size = 10**30
    with torch.device("meta"), pytest.raises(ValueError, match="The LLM of text_config cannot be built: TypeError"):
        BlspKdForCausalLM(config)


@pytest.mark.parametrize(
    "file, contents",
    [
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"\xff\xfe"),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer.json", b'{"model": 7}'),
        ("processor_config.json", b'{"feature_extractor": {"feature_size": "x"}}'),
        ("processor_config.json", b'{"feature_extractor": 7}'),
    ],
)
def test_a_broken_file_of_the_processor_is_named(file, contents, processor, tmp_path):
    processor.save_pretrained(tmp_path)
    BlspKdProcessor.from_pretrained(tmp_path)
    (tmp_path / file).write_bytes(contents)
    with pytest.raises(
        ValueError, match=rf"The tokenizer or feature extractor of {tmp_path} cannot be read \(.*{file}"
    ):
        BlspKdProcessor.from_pretrained(tmp_path)


def test_a_wrong_option_of_a_processor_is_no_broken_file(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="^transcription_instruction must be a non-empty string"):
        BlspKdProcessor.from_pretrained(tmp_path, transcription_instruction="")
