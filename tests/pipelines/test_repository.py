"""Pipelines from a saved folder, here and where the package is not installed."""

import itertools
import json
from pathlib import Path

import pytest
from transformers import pipeline
from transformers.pipelines import PIPELINE_REGISTRY

import processing
from modeling_blsp_kd import BlspKdConfig
from modeling_blsp_kd.configuration_blsp_kd import CUSTOM_PIPELINES
from processing import BlspKdPipeline
from processing.publishing.elsewhere import PACKAGES
from tests.helpers.prompts import clip
from tests.helpers.shipping import run_python, unshippable
from tests.helpers.spoken_cases import INSTRUCTION, make_repository
from tests.pipelines.cases import CONTENTS, DURATIONS_S, SHORT, TASKS, WAVEFORM, chat, direct, text_of

# -- from a repository ------------------------------------------------------------------------------------------------


def test_the_task_without_a_pipeline_of_transformers_is_registered(answers, expected, processor, model, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    pipe = pipeline("audio-text-to-text", model=tmp_path, device="cpu")
    assert type(pipe) is BlspKdPipeline
    assert text_of(pipe(CONTENTS, instruction=INSTRUCTION, **SHORT)) == expected[0]


def test_stock_pipelines_stay_as_they_are():
    """Registering our speech recognition would have taken Whisper's pipeline away wherever this package is imported."""
    impl = PIPELINE_REGISTRY.check_task("automatic-speech-recognition")[1]["impl"]
    assert "AutomaticSpeechRecognitionPipeline" in str(impl)
    assert PIPELINE_REGISTRY.check_task("any-to-any")[1]["impl"] is not BlspKdPipeline


@pytest.fixture(scope="module")
def repository(tmp_path_factory, processor):
    return make_repository(tmp_path_factory.mktemp("repository") / "small-blsp_kd.1", processor)


def test_a_saved_pipeline_is_complete(answers, repository, expected, tmp_path, monkeypatch):
    """transformers' `Pipeline.save_pretrained` leaves the processor out, and one of the two pipelines."""
    monkeypatch.setattr(BlspKdConfig, "registered_tasks", ())  # as where the package is not installed
    answers.save_pretrained(tmp_path / "installed")
    loaded = pipeline("automatic-speech-recognition", model=str(repository), trust_remote_code=True, device="cpu")
    loaded.save_pretrained(tmp_path / "loaded")
    for name, task in itertools.product(("installed", "loaded"), TASKS):
        folder = str(tmp_path / name)
        pipe = pipeline(task, model=folder, trust_remote_code=True, device="cpu", instruction=INSTRUCTION, **SHORT)
        assert type(pipe).__module__.startswith("transformers_modules")
        assert text_of(pipe(CONTENTS)) == expected[0]


def test_the_files_of_pipelines_can_travel_alone(repository):
    names = {path.name for path in repository.glob("*.py")}
    assert {"pipeline_blsp_kd.py", "audio_decoding.py", "chat_audio.py", "spoken_inputs.py", "url_fetching.py"} <= names
    for path in repository.glob("*.py"):
        assert unshippable(path.read_text()) == [], path.name


def test_any_to_any_is_transformers_own(repository, expected, path):
    pipe = pipeline("any-to-any", model=str(repository), trust_remote_code=True, device="cpu")
    assert type(pipe).__module__ == "transformers.pipelines.any_to_any"
    messages = chat({"type": "audio", "path": str(path)})
    options = {**SHORT, "return_full_text": False}
    assert [result["generated_text"] for result in pipe(text=messages, **options)] == [expected[0]]
    several = pipe(text=[messages, chat({"type": "audio", "audio": clip(DURATIONS_S[1])})], **options)
    assert [result["generated_text"] for [result] in several] == expected[:2]


# Runs in a process of its own, that cannot import this package nor reach a network.
CHILD = f"""
import json, runpy, sys


class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {PACKAGES!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise OSError("no network in this test")


sys.meta_path.insert(0, NotInstalled())
sys.addaudithook(watch)
repository, audio, handler_file = sys.argv[1:]
from transformers import pipeline

EndpointHandler = runpy.run_path(handler_file)["EndpointHandler"]

instruction, short = {INSTRUCTION!r}, {SHORT!r}
content = [{{"type": "text", "text": instruction}}, {{"type": "audio", "path": audio}}]
texts = {{}}
for task in ("audio-text-to-text", "automatic-speech-recognition"):
    pipe = pipeline(task, model=repository, trust_remote_code=True)
    texts[task] = list(pipe(audio, instruction=instruction, **short).values())[0]
pipe = pipeline("any-to-any", model=repository, trust_remote_code=True)
result = pipe(text=[{{"role": "user", "content": content}}], return_full_text=False, **short)
texts["any-to-any"] = result[0]["generated_text"]
handler = EndpointHandler(repository)
contents = open(audio, "rb").read()
answer = handler({{"inputs": contents, "parameters": {{**short, "instruction": instruction}}}})
texts["handler"] = answer["generated_text"]
texts["transcript"] = handler({{"inputs": contents, "parameters": short}})["text"]
assert not set({PACKAGES!r}) & set(sys.modules)
print(json.dumps(texts))
"""


@pytest.mark.long
def test_pipelines_and_handler_agree_where_the_package_is_not_installed(
    repository, path, expected, model, processor, tmp_path
):
    handler = Path(processing.__file__).parent / "publishing" / "handler.py"
    output = run_python(CHILD, repository, path, handler, folder=tmp_path, HF_HUB_OFFLINE="1")
    texts = json.loads(output.splitlines()[-1])
    transcript = direct(model, processor, WAVEFORM, processor.transcription_instruction)[0].strip()
    assert texts == {
        **dict.fromkeys((*TASKS, "any-to-any", "handler"), expected[0]),
        "transcript": transcript,
    }


def test_the_table_of_pipelines_names_what_exists():
    for task, entry in CUSTOM_PIPELINES.items():
        module, name = entry["impl"].split(".")
        assert getattr(getattr(processing, module), name).__doc__.count(f'"{task}"') >= 1
