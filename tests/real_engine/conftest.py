"""One real engine for all of these tests: the tiny world's LLM, with a partial LoRA."""

import httpx
import pytest

from processing.serving.engine_files import write_engine_files
from tests.helpers.engine_requests import tiny_world
from tests.helpers.real_engine import RealEngine, make_environment


@pytest.fixture(scope="session", autouse=True)
def environment():
    make_environment()


@pytest.fixture(scope="session")
def models():
    """Models and processors by what the engine calls them."""
    return {"llm": tiny_world(), "speech": tiny_world(plora=True)}


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """The files that the command of `processing.serving.engine_files` writes, and vLLM's arguments that it names."""
    folder = tmp_path_factory.mktemp("engine")
    command = write_engine_files(*tiny_world(plora=True), folder)
    assert command[:2] == ["vllm", "serve"]
    return folder, ["--model", *command[2:]]


@pytest.fixture(scope="session")
def engine(environment, files, tmp_path_factory):
    log = tmp_path_factory.mktemp("vllm") / "log"
    # So little, so that prompts are read in chunks and share blocks of the prefix cache.
    small = ["--max-num-batched-tokens", 64, "--block-size", 32]
    tools = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    engine = RealEngine([*files[1], *small, *tools, "--trust-request-chat-template"], log)
    try:
        engine.wait_until_ready()
        yield engine
    finally:
        engine.stop()


@pytest.fixture(scope="session")
def real(engine):
    with httpx.Client(base_url=engine.url, timeout=600) as client:
        yield client
