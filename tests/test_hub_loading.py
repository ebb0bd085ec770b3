"""A saved folder is enough: it loads where this package is not installed, from a folder and from the Hub's cache."""

import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile
import torch

from modeling_blsp_kd import BlspKdForCausalLM
from processing import BlspKdProcessor
from processing.publishing.elsewhere import MODEL_CLASSES, PACKAGES
from processing.publishing.verify import COMMIT, ELSEWHERE, as_hub_cache
from tests.helpers.models import make_model
from tests.helpers.prompts import SAMPLING_RATE, clip
from tests.helpers.shipping import PACKAGE_FOLDERS, assert_tells_no_path, run_python, unshippable

REPO_ID = "org/small-blsp_kd.1"


# Runs in a process of its own, that cannot import this package nor reach a network.
CHILD = f"""
import runpy
import sys

ATTEMPTS = runpy.run_path({str(ELSEWHERE)!r})["leave_package_and_network"]()

import torch
import transformers

torch.set_num_threads(1)
source, audio_path, results_path, resaved_path = sys.argv[1:]
config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=True)
processor = transformers.AutoProcessor.from_pretrained(source, trust_remote_code=True)
content = [{{"type": "text", "text": "repeat the words"}}, {{"type": "audio", "path": audio_path}}]
inputs = processor.apply_chat_template(
    [[{{"role": "user", "content": content}}], [{{"role": "user", "content": "the red cat ran to the river"}}]],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
)
results = {{"inputs": dict(inputs), "config": type(config).__module__, "processor": type(processor).__module__}}
for name in {MODEL_CLASSES!r}:
    model = getattr(transformers, name).from_pretrained(source, trust_remote_code=True)
    with torch.no_grad():
        logits = model(**inputs).logits
    results[name] = {{
        "class": f"{{type(model).__module__}}.{{type(model).__name__}}",
        "logits": logits,
        "tokens": model.generate(**inputs, max_new_tokens=6, do_sample=False),
        "trainable": sorted(name for name, weight in model.named_parameters() if weight.requires_grad),
    }}
model.save_pretrained(resaved_path)
processor.save_pretrained(resaved_path)
assert not set({PACKAGES!r}) & set(sys.modules)
results["attempts"] = ATTEMPTS
torch.save(results, results_path)
"""


def load_elsewhere(source, audio_path, folder, hf_home=None):
    """Return what a process without this package makes of `source`."""
    folder.mkdir(parents=True, exist_ok=True)
    hf_home = hf_home or folder / "hf_home"
    run_python(
        CHILD,
        source,
        audio_path,
        folder / "results.pt",
        folder / "resaved",
        folder=folder,
        HF_HOME=str(hf_home),
        HF_MODULES_CACHE=str(hf_home / "modules"),
        HF_HUB_OFFLINE="1",
    )
    return torch.load(folder / "results.pt")


@pytest.fixture(scope="module")
def saved(tmp_path_factory, processor):
    """The folder that a user would upload."""
    folder = tmp_path_factory.mktemp("saved") / "small-blsp_kd.1"
    make_model(plora=True).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def audio_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("audio") / "clip.wav"
    soundfile.write(path, clip(0.8), SAMPLING_RATE, subtype="FLOAT")
    return path


@pytest.fixture(scope="module")
def expected(audio_path, processor):
    """Return what this process, with the package, makes of the same model."""
    content = [{"type": "text", "text": "repeat the words"}, {"type": "audio", "path": str(audio_path)}]
    inputs = processor.apply_chat_template(
        [[{"role": "user", "content": content}], [{"role": "user", "content": "the red cat ran to the river"}]],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )
    model = make_model(plora=True)
    with torch.no_grad():
        logits = model(**inputs).logits
    return {
        "inputs": dict(inputs),
        "logits": logits,
        "tokens": model.generate(**inputs, max_new_tokens=6, do_sample=False),
        "trainable": sorted(name for name, weight in model.named_parameters() if weight.requires_grad),
    }


@pytest.fixture(scope="module")
def elsewhere(saved, audio_path, tmp_path_factory):
    """Results from the folder, from the folder saved again by a process without the package, and from the Hub."""
    folder = tmp_path_factory.mktemp("elsewhere")
    hf_home = folder / "hub_home"
    as_hub_cache(saved, hf_home, REPO_ID)
    resaved = folder / "folder" / "resaved"
    with ThreadPoolExecutor(max_workers=2) as pool:  # each waits for a process of its own
        hub = pool.submit(load_elsewhere, REPO_ID, audio_path, folder / "hub", hf_home)
        first = load_elsewhere(saved, audio_path, folder / "folder")
        again = load_elsewhere(resaved, audio_path, folder / "again")
        return {"folder": first, "saved again": again, "hub": hub.result(), "resaved folder": resaved}


@pytest.mark.parametrize("place", ["folder", "saved again", "hub"])
def test_it_loads_without_the_package(elsewhere, expected, place):
    results = elsewhere[place]
    assert results["attempts"] == []
    assert results["config"].startswith("transformers_modules.")
    assert results["processor"].startswith("transformers_modules.")
    assert sorted(results["inputs"]) == sorted(expected["inputs"])
    for name, values in expected["inputs"].items():
        assert torch.equal(results["inputs"][name], values), name
    for name in MODEL_CLASSES:
        result = results[name]
        assert result["class"].startswith("transformers_modules.")
        assert result["class"].endswith(".modeling_blsp_kd.BlspKdForCausalLM")
        assert torch.equal(result["logits"], expected["logits"])
        assert torch.equal(result["tokens"], expected["tokens"])
        assert result["trainable"] == expected["trainable"]
    assert expected["logits"].isfinite().all() and any("lora_B" in name for name in expected["trainable"])


def test_the_hub_copy_is_the_commit(elsewhere):
    assert f".{COMMIT}." in elsewhere["hub"]["AutoModel"]["class"]


def test_saving_elsewhere_ships_the_same_files(elsewhere, saved):
    again = elsewhere["resaved folder"]
    assert {path.name for path in again.iterdir()} == {path.name for path in saved.iterdir()}
    for path in saved.glob("*.py"):
        assert (again / path.name).read_text() == path.read_text(), path.name


# -- shipped code -----------------------------------------------------------------------------------------------------


def test_shipped_files_import_only_each_other_and_other_packages(saved):
    files = {path.stem: path.read_text() for path in saved.glob("*.py")}
    assert {"configuration_blsp_kd", "modeling_blsp_kd", "processing_blsp_kd"} <= set(files)
    for name, text in files.items():
        assert unshippable(text) == [], name
        assert set(re.findall(r"^\s*from\s+\.(\w+)\s+import", text, re.M)) <= set(files), name


@pytest.mark.parametrize(
    "line, problem",
    [
        ("from modeling_blsp_kd.cif import x", "imports the package by name"),
        ("    import processing", "imports the package by name"),
        ("from ..cif import x", "imports from above"),
        ("from . import cif", "imports a module, not a thing in it"),
        ("from .folder.cif import x", "imports from a folder"),
        ("def f():\n    from .cif import x", "imports late"),
    ],
)
def test_the_law_of_shipped_files_can_fail(line, problem):
    assert problem in unshippable(f'"""Text."""\n\n{line}\n')


@pytest.mark.parametrize("line", ["from .cif import x", "from transformers import processing_utils", "# from . here"])
def test_the_law_of_shipped_files_lets_good_lines_pass(line):
    assert unshippable(f"{line}\n") == []


def test_file_names_are_unique_across_the_packages():
    """Files are shipped by bare name into one folder: of two with one name, the later would overwrite the earlier.

    Sub-packages are not shipped: nothing that is imports them.
    """
    names = [path.name for folder in PACKAGE_FOLDERS for path in folder.glob("*.py") if path.name != "__init__.py"]
    assert len(names) == len(set(names)) > 5


def test_shipped_files_are_the_packages_own(saved):
    sources = {path.name: path for folder in PACKAGE_FOLDERS for path in folder.glob("*.py")}
    for path in saved.glob("*.py"):
        assert path.read_text() == sources[path.name].read_text(), path.name


# -- what a saved folder does not tell --------------------------------------------------------------------------------


def test_a_saved_folder_tells_no_path_of_this_machine(backbones, processor, tmp_path):
    """The nested configs kept the folders of the backbones as `_name_or_path`, user name included."""
    model = BlspKdForCausalLM.from_backbones(*backbones, audio_token_id=processor.audio_token_id)
    model.save_pretrained(tmp_path / "first")
    processor.save_pretrained(tmp_path / "first")
    BlspKdForCausalLM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    BlspKdProcessor.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    for name in ("first", "second"):
        assert (tmp_path / name / "config.json").is_file()
        assert_tells_no_path(tmp_path / name, tmp_path, *backbones, backbones[0].parent)


def test_the_law_of_paths_can_fail(tmp_path):
    (tmp_path / "config.json").write_text(f'{{"_name_or_path": "{tmp_path}"}}')
    with pytest.raises(AssertionError, match="config.json holds"):
        assert_tells_no_path(tmp_path, tmp_path)


# -- importing --------------------------------------------------------------------------------------------------------

IMPORTER = """
import sys

attempts = []


def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        attempts.append((event, str(args)))
        raise OSError("no network in this test")


sys.addaudithook(watch)
import modeling_blsp_kd, processing

assert attempts == [], attempts
import socket

try:
    socket.create_connection(("localhost", 9))
except OSError:
    pass
assert attempts, "the watch does not see connections"
print("quiet")
"""


@pytest.mark.long
def test_importing_touches_no_network(tmp_path):
    root = str(PACKAGE_FOLDERS[0].parent)
    assert run_python(IMPORTER, folder=tmp_path, flags=["-B"], PYTHONPATH=root).strip() == "quiet"


def test_outputs_do_depend_on_the_audio(expected):
    """Guards the comparisons above: logits that ignored the audio would be equal everywhere, too."""
    features = expected["inputs"]["input_features"]
    model = make_model(plora=True)
    with torch.no_grad():
        other = model(**{**expected["inputs"], "input_features": features.flip(-1)}).logits
    assert other.shape != expected["logits"].shape or not np.allclose(other, expected["logits"], atol=1e-3)
