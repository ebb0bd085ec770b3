"""Speech synthesizers behind one interface: espeak-ng, flite, festival, and neural voices of Kokoro and Piper (ONNX).

Each class has `voices`, draws the settings of a clip (`draw`) and says a text with them (`say`). All run off line on
one core. Leaves out: voice cloning, and languages other than English.
"""

import functools
import itertools
import json
import os
import random
import shutil
import subprocess
import tempfile
import unicodedata
from pathlib import Path

import espeakng_loader
import numpy as np
import soundfile

from ...tiny_world.espeak import SAMPLING_RATE, phonemes, synthesize_words

# Samples (float32, mono), their rate (Hz), and the times of the words where the synthesizer knows them.
Speech = tuple[np.ndarray, int, list[dict] | None]


class MissingSynthesizer(RuntimeError):
    """Raised when a synthesizer's program, package or files are not there; the message says how to get them."""


class Espeak:
    """Formant synthesis: every accent with every timbre. Tells when it says each word."""

    name = "espeak-ng"
    accents = ("en", "en-us", "en-gb-x-rp", "en-gb-scotland", "en-us-nyc")
    left_out = {"Alien", "Demonic", "Mr_Serious", "Mr serious", "UniRobot", "croak", "klatt6", "whisper", "whisperf"}

    def __init__(self, assets: Path | None = None):
        variants = Path(espeakng_loader.get_data_path()) / "voices" / "!v"
        timbres = sorted(path.name for path in variants.iterdir() if path.name not in self.left_out)
        self.voices = tuple(f"{accent}+{timbre}" for accent, timbre in itertools.product(self.accents, timbres))

    def draw(self, rng: random.Random) -> dict:
        return {"voice": rng.choice(self.voices), "speed": rng.randint(130, 210), "pitch": rng.randint(25, 75)}

    def say(self, text: str, settings: dict) -> Speech:
        """Speak in a fork: the library's sound depends on what its process said before, see `tiny_world.espeak`."""
        _load_espeak_once()
        with tempfile.TemporaryDirectory() as folder:
            child = os.fork()
            if child == 0:
                try:
                    samples, words = synthesize_words(text, **settings)
                    np.save(f"{folder}/samples.npy", samples)
                    Path(folder, "words.json").write_text(json.dumps(words))
                    os._exit(0)
                finally:
                    os._exit(1)
            _, status = os.waitpid(child, 0)
            if status != 0:
                raise RuntimeError(f"espeak-ng could not say {text!r} with {settings} (status {status}).")
            return np.load(f"{folder}/samples.npy"), SAMPLING_RATE, json.loads(Path(folder, "words.json").read_text())


class Flite:
    """Four voices made from people's recordings. A factor on the sampling rate gives longer and shorter speakers."""

    name = "flite"
    voices = ("kal16", "awb", "rms", "slt")

    def __init__(self, assets: Path | None = None):
        self.program = _program("flite", "apt-get install flite")

    def draw(self, rng: random.Random) -> dict:
        return _draw_size_and_speed(self.voices, rng)

    def say(self, text: str, settings: dict) -> Speech:
        size = settings["size"]
        stretch = f"duration_stretch={1 / (size * settings['speed']):.3f}"
        return _run_program(
            [self.program, "-voice", settings["voice"], "--setf", stretch, "-t", text, "-o", "{wav}"], "", size
        )


class Festival:
    """A voice of hidden Markov models and two of diphones. Two of the speakers are flite's kal and slt, too."""

    name = "festival"
    voices = ("cmu_us_slt_arctic_hts", "kal_diphone", "ked_diphone")

    def __init__(self, assets: Path | None = None):
        packages = "festival festvox-us-slt-hts festvox-kallpc16k festvox-kdlpc16k"
        self.program = _program("text2wave", f"apt-get install {packages}")

    def draw(self, rng: random.Random) -> dict:
        return _draw_size_and_speed(self.voices, rng)

    def say(self, text: str, settings: dict) -> Speech:
        size = settings["size"]
        stretch = 1 / (size * settings["speed"])
        scheme = f"(begin (voice_{settings['voice']}) (Parameter.set 'Duration_Stretch {stretch:.3f}))"
        return _run_program([self.program, "-eval", scheme, "-o", "{wav}"], text, size)


class Kokoro:
    """Kokoro-82M, natural: each English style by itself, or two of them blended.

    Follows kokoro-onnx and kokoro-js: espeak-ng's phonemes, a style per number of tokens. Needs in the assets
    `kokoro/model.onnx`, `kokoro/vocab.json` (the field "vocab" of its config) and `kokoro/voices/*.bin`.
    """

    name = "kokoro"
    max_tokens = 510

    def __init__(self, assets: Path | None = None):
        folder = _folder(assets, "kokoro", "model.onnx", "vocab.json", "voices/af_heart.bin")
        self.model = _onnx(folder / "model.onnx")
        self.ids = json.loads((folder / "vocab.json").read_text())["vocab"]
        self.styles = {
            path.stem: np.fromfile(path, dtype=np.float32).reshape(-1, 256)
            for path in sorted((folder / "voices").glob("[ab][fm]_*.bin"))
        }
        self.voices = tuple(self.styles)

    def draw(self, rng: random.Random) -> dict:
        voice = rng.choice(self.voices)
        settings = {"voice": voice, "speed": round(rng.uniform(0.8, 1.25), 3)}
        if rng.random() < 0.5:
            # A blend keeps to one accent, since the phonemes do.
            partner = rng.choice([other for other in self.voices if other[0] == voice[0] and other != voice])
            settings |= {"voice": f"{voice}+{partner}", "share": round(rng.uniform(0.3, 0.7), 3)}
        return settings

    def say(self, text: str, settings: dict) -> Speech:
        first, _, second = settings["voice"].partition("+")
        told = phonemes(text, "en-us" if first.startswith("a") else "en-gb-x-rp")
        told = told.replace("r", "ɹ").replace("x", "k").replace("ɬ", "l").replace("ʲ", "j")
        ids = [self.ids[symbol] for symbol in told if symbol in self.ids]
        if not 0 < len(ids) <= self.max_tokens:
            raise ValueError(f"Kokoro takes 1 to {self.max_tokens} phonemes, got {len(ids)} of {text!r}.")
        style = self.styles[first][len(ids) - 1]
        if second:
            style = settings["share"] * style + (1 - settings["share"]) * self.styles[second][len(ids) - 1]
        inputs = {"tokens": np.array([[0, *ids, 0]], dtype=np.int64), "style": style[None].astype(np.float32)}
        samples = self.model.run(None, {**inputs, "speed": np.array([settings["speed"]], dtype=np.float32)})[0]
        return samples.ravel(), 24_000, None


class Piper:
    """Voices of Piper (VITS), natural. Needs in the assets `piper/*.onnx`, each with its `.onnx.json`.

    Follows Piper's own id sequences: a blank between phonemes. Its noise has no seed: a clip made again differs.
    """

    name = "piper"

    def __init__(self, assets: Path | None = None):
        folder = _folder(assets, "piper")
        if not (models := {path.stem: path for path in sorted(folder.glob("*.onnx"))}):
            raise MissingSynthesizer(f"{folder} holds no voice of Piper (NAME.onnx with NAME.onnx.json).")
        self.models, self.voices = models, tuple(models)

    def draw(self, rng: random.Random) -> dict:
        return {"voice": rng.choice(self.voices), "speed": round(rng.uniform(0.8, 1.25), 3)}

    def say(self, text: str, settings: dict) -> Speech:
        model, config = _piper_voice(self.models[settings["voice"]])
        map_of = config["phoneme_id_map"]
        ids = [*map_of["^"], *map_of["_"]]
        for symbol in unicodedata.normalize("NFD", phonemes(text, config["espeak"]["voice"])):
            ids += [*map_of[symbol], *map_of["_"]] if symbol in map_of else []
        ids += map_of["$"]
        noise = config["inference"]
        scales = [noise["noise_scale"], noise["length_scale"] / settings["speed"], noise["noise_w"]]
        inputs = {"input": np.array([ids], dtype=np.int64), "input_lengths": np.array([len(ids)], dtype=np.int64)}
        samples = model.run(None, {**inputs, "scales": np.array(scales, dtype=np.float32)})[0]
        return samples.ravel(), config["audio"]["sample_rate"], None


SYNTHESIZERS = {kind.name: kind for kind in (Espeak, Flite, Festival, Kokoro, Piper)}


@functools.cache
def open_synthesizer(name: str, assets: Path | None = None):
    """Return the synthesizer of that name, opened once per process.

    Args:
        assets: folder with the files of neural voices.

    Raises:
        ValueError: there is no such synthesizer.
        MissingSynthesizer: its program, package or files are missing.
    """
    if name not in SYNTHESIZERS:
        raise ValueError(f"There is no synthesizer {name!r}. Those that there are: {', '.join(SYNTHESIZERS)}.")
    return SYNTHESIZERS[name](assets)


@functools.cache
def _load_espeak_once():
    synthesize_words("ready", "en", 175, 50)


@functools.cache
def _piper_voice(path: Path):
    return _onnx(path), json.loads(Path(f"{path}.json").read_text())


def _onnx(path: Path):
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingSynthesizer("Kokoro and Piper need onnxruntime: pip install onnxruntime.") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # clips are made side by side in processes
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _program(name: str, how_to_install: str) -> str:
    if (program := shutil.which(name)) is None:
        raise MissingSynthesizer(f"The program {name} is not on the PATH: {how_to_install}.")
    return program


def _folder(assets: Path | None, name: str, *files: str) -> Path:
    if assets is None:
        raise MissingSynthesizer(f"{name} needs its files: name the folder that holds {name}/ with --assets.")
    folder = Path(assets) / name
    missing = [file for file in files if not (folder / file).is_file()]
    if missing or not folder.is_dir():
        raise MissingSynthesizer(f"{folder} lacks {', '.join(missing) or 'everything'}. README.md says where from.")
    return folder


def _draw_size_and_speed(voices: tuple[str, ...], rng: random.Random) -> dict:
    """Draw a voice, how tall its speaker is (a factor on the sampling rate), and how fast."""
    voice, size, speed = rng.choice(voices), rng.uniform(0.9, 1.12), rng.uniform(0.8, 1.25)
    return {"voice": voice, "size": round(size, 3), "speed": round(speed, 3)}


def _run_program(command: list[str], text: str, size: float) -> Speech:
    """Run a program that writes the file named {wav}, and scale its speaker's size by the sampling rate."""
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        command = [file.name if part == "{wav}" else part for part in command]
        run = subprocess.run(command, input=text, text=True, capture_output=True)
        if run.returncode != 0:
            raise RuntimeError(f"{command} failed on {text!r}: {run.stderr.strip()[-300:]}")
        samples, rate = soundfile.read(file.name, dtype="float32")
    return samples, round(rate * size), None
