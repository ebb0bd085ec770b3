"""The kinds of input that are fuzzed: each makes a case from valid material, and does something with it.

A case is a function of a random generator alone. Leaves out: running cases and judging how they end (`fuzz.py`).
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, WhisperFeatureExtractor

from modeling_blsp_kd import BlspKdConfig, BlspKdForCausalLM
from modeling_blsp_kd.speech_encoder import TrueLengthWhisperEncoder
from processing import BlspKdProcessor
from processing.audio_loading import MAX_DURATION_S, load_audio
from processing.evaluation.rows import check_rows
from processing.manifests import OutsideFolderError
from processing.publishing.handler import MAX_AUDIO_BYTES, EndpointHandler, read_inputs
from processing.response_generation.sources import ManifestSource, check_audio
from processing.spoken_inputs import AudioBudget
from tests.helpers.audio_files import encode, encode_by_ffmpeg
from tests.helpers.models import SMALL_CFORMER, speech_config, text_config
from tests.helpers.prompts import SAMPLING_RATE, clip, make_tokenizer
from tests.helpers.spoken_cases import base64_of, make_repository

from .mutations import MUTATIONS, lie, mutate_bytes, mutate_json, nasty_value

AUDIO = {
    "wav": ("WAV", ("PCM_16", "PCM_24", "PCM_U8", "FLOAT", "DOUBLE", "ULAW", "IMA_ADPCM", "MS_ADPCM", "GSM610")),
    "flac": ("FLAC", ("PCM_S8", "PCM_16", "PCM_24")),
    "ogg": ("OGG", ("VORBIS", "OPUS")),
    "mp3": ("MP3", ("MPEG_LAYER_III",)),
}
# What phones and browsers write: container, codec and rate.
BY_FFMPEG = [
    ("ipod", "aac", 44_100),
    ("webm", "libopus", 48_000),
    ("adts", "aac", 16_000),
    ("amr", "libopencore_amrnb", 8_000),
    ("3gp", "libopencore_amrnb", 8_000),
    ("matroska", "flac", 16_000),
    ("asf", "wmav2", 44_100),
    ("caf", "alac", 16_000),
    ("wav", "g726", 8_000),
]
RATES = (8_000, 16_000, 44_100, 48_000)
PARAMETERS = {"max_new_tokens": 2}


@dataclass
class Kind:
    """`make(rng)` gives a case; `use(case)` does with it what a user would, and checks what comes out.

    Args:
        share: cases of this kind for one of "audio".
    """

    name: str
    share: float
    make: Callable
    use: Callable


class Material:
    """Valid files, and the models and processors that read them; made once, in `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        torch.manual_seed(0)
        speech, text = folder / "speech", folder / "text"
        TrueLengthWhisperEncoder(speech_config()).save_pretrained(speech)
        WhisperFeatureExtractor().save_pretrained(speech)
        AutoModelForCausalLM.from_config(text_config()).save_pretrained(text)
        make_tokenizer().save_pretrained(text)
        self.processor = BlspKdProcessor.from_backbones(speech, text)
        self.repository = make_repository(folder / "repository", self.processor)
        self.handler = EndpointHandler(str(self.repository))
        self.thin = folder / "thin"
        BlspKdForCausalLM.from_backbones(
            speech, text, thin=True, audio_token_id=300, adapter=SMALL_CFORMER, plora=True
        ).save_pretrained(self.thin)
        self.audio = {name: self._encode(*formats) for name, formats in AUDIO.items()}
        self.audio["phone"] = [
            encode_by_ffmpeg(clip(0.3), container, codec, coded_rate=rate) for container, codec, rate in BY_FFMPEG
        ]
        self.clips = [contents for files in self.audio.values() for contents in files]
        (folder / "data").mkdir()
        for index, contents in enumerate(self.clips[::7]):
            (folder / "data" / f"{index}.bin").write_bytes(contents)
        self.scratch = folder / "scratch"  # emptied before each case

    def _encode(self, format, subtypes) -> list[bytes]:
        files = []
        for subtype in subtypes:
            for index, rate in enumerate(RATES):
                if subtype == "OPUS" and rate == 44_100 or subtype == "GSM610" and index > 1:
                    continue
                channels = 1 if subtype == "GSM610" else 1 + index % 2
                waveform = np.stack([clip(0.3, seed=index, rate=rate)] * channels, axis=1)
                files.append(encode(waveform, rate, format, subtype))
        return files


def kinds(material: Material) -> list[Kind]:
    audio = [audio_kind(material, name) for name in material.audio]
    return [*audio, manifests(material), chats(material), configs(material), checkpoints(material)]


def write(path: Path, contents: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    return path


# -- audio ------------------------------------------------------------------------------------------------------------


def audio_kind(material: Material, name: str) -> Kind:
    def make(rng):
        contents = material.audio[name][rng.integers(len(material.audio[name]))]
        mutated = mutate_bytes(contents, rng, material.clips, mutations=(lie, lie, *MUTATIONS))
        return mutated, ("bytes", "file", "endpoint")[rng.integers(3)]

    def use(case):
        contents, way = case
        if way == "file":
            audio = write(material.scratch / f"clip.{name}", contents)
        elif way == "endpoint":
            audio = read_inputs(contents, AudioBudget(MAX_AUDIO_BYTES, MAX_DURATION_S))["audio"]
        else:
            audio = contents
        waveform = load_audio(audio, SAMPLING_RATE)
        expect(waveform.dtype == np.float32 and waveform.ndim == 1, "not mono float32")
        expect(0 < len(waveform) <= MAX_DURATION_S * SAMPLING_RATE + 1, f"{len(waveform)} samples")
        expect(bool(np.isfinite(waveform).all()), "samples that are not finite")

    return Kind(f"audio: {name}", 0.2, make, use)


class WrongResultError(Exception):
    """Something came out that must not."""


def expect(condition: bool, otherwise: str):
    if not condition:
        raise WrongResultError(otherwise)


# -- manifests --------------------------------------------------------------------------------------------------------


def manifests(material: Material) -> Kind:
    rows = [
        {"audio": f"{index}.bin", "text": "the red cat", "id": index, "instruction": "repeat the words"}
        for index in range(4)
    ]

    def make(rng):
        mutated = mutate_json(rows, rng)
        lines = mutated if isinstance(mutated, list) else [mutated]
        text = "\n".join(json.dumps(line) for line in lines).encode()
        return mutate_bytes(text, rng, [text, b'{"audio": "'], at_most=1) if rng.random() < 0.4 else text

    def use(manifest):
        path = write(material.folder / "data" / "manifest.jsonl", manifest)
        source = ManifestSource(path)
        for _, lines in source.blocks(8):
            for line in lines:
                try:
                    row = source.parse(line)
                    check_audio(source.audio(row), max_duration_s=30.0)
                    list(check_rows([row]))
                except OutsideFolderError as error:
                    raise WrongResultError("a path that leaves the folder came through") from error
                except ValueError as error:
                    if not is_explained(error):
                        raise

    return Kind("manifests", 0.1, make, use)


def is_explained(error: Exception) -> bool:
    """Return whether a `raise` in this project made the error."""
    return type(error) is ValueError or type(error).__name__ == "BadRow"


# -- chats ------------------------------------------------------------------------------------------------------------


def chats(material: Material) -> Kind:
    audio = base64_of(encode(clip(0.3), subtype="PCM_16"))
    valid = [
        {"role": "system", "content": "be brief"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "repeat the words"},
                {"type": "audio", "audio": {"base64": audio}, "sampling_rate": 16_000},
                {"type": "audio", "url": f"data:audio/wav;base64,{audio}"},
                {"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{audio}"}},
            ],
        },
        {"role": "assistant", "content": "the red cat"},
        {"role": "user", "content": [{"type": "audio", "path": str(material.folder / "data" / "0.bin")}]},
    ]
    for_endpoint = {
        "inputs": [
            {"role": "user", "content": [{"type": "text", "text": "say"}, {"type": "audio", "audio": audio}]},
            {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": audio, "format": "wav"}}]},
        ],
        "parameters": PARAMETERS,
    }
    of_one_clip = {
        "inputs": {"audio": audio, "instruction": "repeat"},
        "parameters": {**PARAMETERS, "generate_kwargs": {"num_beams": 2}},
    }

    def make(rng):
        way = ("processor", "pipeline", "endpoint", "endpoint")[rng.integers(4)]
        if way == "endpoint":
            return way, mutate_json((for_endpoint, of_one_clip)[rng.integers(2)], rng)
        return way, mutate_json(valid, rng)

    def use(case):
        way, value = case
        if way == "endpoint":
            answer = material.handler(value)
            expect(isinstance(answer.get("text", answer.get("generated_text")), str), f"{answer!r:.80}")
        elif way == "pipeline":
            material.handler.answers(value, **PARAMETERS)
        else:
            inputs = material.processor.apply_chat_template(
                value, add_generation_prompt=True, tokenize=True, return_dict=True
            )
            expect("input_ids" in inputs, f"no input_ids but {list(inputs)}")

    return Kind("chats", 0.15, make, use)


# -- configs ----------------------------------------------------------------------------------------------------------


def configs(material: Material) -> Kind:
    """Of one file of a repository: config.json, those of the processor, or the one of generation."""
    names = [
        *["config.json"] * 3,
        "processor_config.json",
        "tokenizer_config.json",
        "generation_config.json",
    ]
    texts = {name: (material.repository / name).read_text() for name in names}

    def make(rng):
        name = names[rng.integers(len(names))]
        text = json.dumps(mutate_json(json.loads(texts[name]), rng, at_most=2))
        if rng.random() < 0.2:
            return name, mutate_bytes(text.encode(), rng, [text.encode()], at_most=1)
        return name, text.encode()

    def use(case):
        name, contents = case
        folder = copy_of(material.repository, material.scratch, without=name)
        write(folder / name, contents)
        if name == "config.json":
            BlspKdConfig.from_pretrained(folder)
        if name in ("config.json", "generation_config.json"):
            BlspKdForCausalLM.from_pretrained(folder)
        else:
            BlspKdProcessor.from_pretrained(folder)

    return Kind("configs", 0.15, make, use)


def copy_of(folder: Path, target: Path, without: str) -> Path:
    """A folder of links to the files of another, all but one."""
    target.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.name != without and path.is_file():
            (target / path.name).symlink_to(path)
    return target


# -- checkpoints ------------------------------------------------------------------------------------------------------


def checkpoints(material: Material) -> Kind:
    def make(rng):
        folder = (material.repository, material.thin)[rng.integers(2)]
        how = CHECKPOINT_MUTATIONS[rng.integers(len(CHECKPOINT_MUTATIONS))]
        return folder, lambda target: how(target, rng)

    def use(case):
        folder, damage = case
        shutil.copytree(folder, material.scratch, ignore=shutil.ignore_patterns("*.py"))
        damage(material.scratch)
        BlspKdForCausalLM.from_pretrained(material.scratch)

    return Kind("checkpoints", 0.1, make, use)


def break_bytes(folder: Path, rng):
    path = folder / "model.safetensors"
    path.write_bytes(mutate_bytes(path.read_bytes(), rng, [b"{}" * 100]))


def break_header(folder: Path, rng):
    """The length of the header, or the header itself as JSON."""
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    if rng.random() < 0.3:
        data[:8] = int(2 ** rng.uniform(0, 63)).to_bytes(8, "little")
    else:
        header = json.dumps(mutate_json(json.loads(data[8 : 8 + length]), rng)).encode()
        data[: 8 + length] = len(header).to_bytes(8, "little") + header
    path.write_bytes(data)


def break_tensors(folder: Path, rng):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name in [list(tensors)[index] for index in rng.integers(len(tensors), size=2)]:
        draw = rng.integers(5)
        if draw == 0:
            tensors.pop(name, None)
        elif draw == 1:
            tensors[f"{name}.more"] = torch.zeros(2)
        elif name in tensors:
            tensor = tensors[name]
            tensors[name] = (tensor.flatten(), tensor[:1].clone(), tensor.to(torch.int8))[draw - 2].contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


def remove_file(folder: Path, rng):
    files = sorted(path for path in folder.iterdir() if path.is_file())
    files[rng.integers(len(files))].unlink()


def write_index(folder: Path, rng):
    """An index in the place of the one file: right, of a file that lies elsewhere, or that is none."""
    path = folder / "model.safetensors"
    names = list(load_file(path))
    (folder / "part.safetensors").write_bytes(path.read_bytes())
    outside = str(folder.parent / "text" / "model.safetensors")
    targets = ["part.safetensors", "../text/model.safetensors", outside, "missing.safetensors", "config.json"]
    target = targets[rng.integers(len(targets))]
    index = {"metadata": {"total_size": 10}, "weight_map": dict.fromkeys(names, target)}
    if rng.random() < 0.4:
        index = mutate_json(index, rng)
    elif rng.random() < 0.2:
        index["weight_map"][names[0]] = nasty_value(rng)
    path.unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


CHECKPOINT_MUTATIONS = (break_bytes, break_header, break_tensors, remove_file, write_index)
