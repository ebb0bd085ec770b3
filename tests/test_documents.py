"""Every path, link, option and Python block of the documents, against what exists, and most Python blocks run."""

import ast
import contextlib
import functools
import importlib
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from modeling_blsp_kd import BlspKdForCausalLM
from processing import BlspKdProcessor
from tests.helpers.prompts import clip

ROOT = Path(__file__).parent.parent
TINY_WORLD = ROOT / "examples" / "tiny_world"
PAGES = ("README.md", "model_card.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
SCRIPTS = tuple(f"examples/{path.name}" for path in sorted((ROOT / "examples").glob("*.py")))
EXAMPLE_PAGES = tuple(
    str(path.relative_to(ROOT)) for path in (ROOT / "examples").rglob("*.md") if "results" not in path.parts
)
MODULE = re.compile(r"python -m ((?:tests|examples|processing)[.\w]*\w)([^\n`]*)")
SPOKEN_CLIP = "outputs/tiny_world_speech/42c1e598c8a08f39bad3.flac"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.mark.parametrize("page", [*PAGES, *EXAMPLE_PAGES])
def test_pages_name_only_what_exists(page):
    text = (ROOT / page).read_text()
    for path in re.findall(
        r"`((?:modeling_blsp_kd|processing|examples|tests|docs|\.ci)/[\w./-]*|[\w]+\.(?:md|txt|cfg|toml))`", text
    ):
        assert (ROOT / path).exists(), f"{page} names {path}, which does not exist"
    for link in re.findall(r"\]\((?!https?://|#)([^)]+)\)", text):
        assert ((ROOT / page).parent / link.split("#")[0]).exists(), f"{page} links to {link}, which does not exist"


@pytest.mark.parametrize("page", PAGES)
def test_every_page_but_the_card_can_be_reached_from_the_readme(page):
    if page.startswith("docs/"):
        reached = "".join(path.read_text() for path in (ROOT / "docs").glob("*.md") if path != ROOT / page)
        reached += "".join(f"({Path(link).name})" for link in re.findall(r"\((docs/[^)]+)\)", _readme()))
        assert f"({Path(page).name})" in reached, f"no page links to {page}"


def _readme() -> str:
    return (ROOT / "README.md").read_text()


def test_the_examples_page_tells_what_every_script_is_for():
    page = (ROOT / "examples" / "README.md").read_text()
    runnable = [script for script in SCRIPTS if "__main__" in (ROOT / script).read_text()]
    assert [script for script in runnable if f"| `{Path(script).name}` |" not in page] == []
    experiments = (ROOT / "examples" / "experiments").iterdir()
    names = [path.stem for path in experiments if path.suffix == ".py" or (path / "__init__.py").exists()]
    assert [name for name in names if f"| `{name}` |" not in page] == []


def test_the_readme_stays_short():
    assert len(_readme().splitlines()) <= 212


@pytest.mark.long
@pytest.mark.parametrize("document", [*PAGES, *SCRIPTS])
def test_documents_name_only_options_that_exist(document):
    text = (ROOT / document).read_text().replace("\\\n", " ").replace("\\\\", " ")
    for script, arguments in re.findall(r"(examples/\w+\.py)([^\n`]*)", text):
        known = set(re.findall(r"--\w+", _help_of(script)))
        for option in re.findall(r"(?<=\s)--\w+", arguments):
            assert option in known, f"{document} passes {option} to {script}, which does not know it"


def _help_of(script: str) -> str:
    return _run_help(script).stdout


@functools.cache
def _run_help(script: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-X", "importtime", ROOT / script, "--help"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished


@pytest.mark.long
@pytest.mark.parametrize("script", [script for script in SCRIPTS if "__main__" in (ROOT / script).read_text()])
def test_scripts_import_neither_each_other_nor_the_package_evaluate(script):
    """`import evaluate` would give them examples/evaluate.py, because their folder comes first in the search path."""
    imported = {line.rpartition("|")[2].strip() for line in _run_help(script).stderr.splitlines() if "|" in line}
    assert "site" in imported, "the list of imports is there"
    neighbours = {path.stem for path in (ROOT / "examples").glob("*.py")} | {"examples", "experiments", "tiny_world"}
    assert not imported & neighbours


def test_only_metrics_import_the_package_evaluate():
    """It loads them by path itself, so no script needs it, not even for something that it imports late."""
    folders = [ROOT / folder for folder in ("modeling_blsp_kd", "processing", "examples")]
    users = [path for folder in folders for path in folder.rglob("*.py") if _imports(path, "evaluate")]
    assert users and all(path.parent.parent.name == "metrics" for path in users)


def _imports(path: Path, package: str) -> bool:
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        if any(name.split(".")[0] == package for name in names):
            return True
    return False


@pytest.mark.long
@pytest.mark.parametrize("script", [script for script in SCRIPTS if "ArgumentParser(" in (ROOT / script).read_text()])
def test_help_keeps_the_line_breaks_of_commands(script):
    """Commands of several lines ran into the prose around them, so they could not be copied."""
    docstring = ast.get_docstring(ast.parse((ROOT / script).read_text()), clean=False)
    for line in filter(None, docstring.splitlines()):
        assert line in _help_of(script).splitlines()


def test_commands_expect_an_activated_environment():
    """Some commands named the environment's programs and others did not, and no page told of activating it."""
    commands = [line for page in PAGES for block in blocks(page, "bash") for line in block.splitlines()]
    assert "source .venv/bin/activate" in commands[0]
    whole = [line for line in commands if ".venv/bin/" in line.replace("source .venv/bin/activate", "")]
    assert len(whole) == 2 and all(line.startswith("python3 -m venv .venv && .venv/bin/pip ") for line in whole)


def test_a_cpu_build_of_torch_is_the_pinned_version():
    pinned = re.search(r"^torch==\S+", (ROOT / "constraints.txt").read_text(), re.MULTILINE).group()
    assert f"pip install {pinned} --index-url https://download.pytorch.org/whl/cpu" in blocks("README.md", "bash")[0]


@pytest.mark.parametrize("page", [*PAGES, *EXAMPLE_PAGES])
def test_modules_that_pages_run_exist(page):
    for name, _ in MODULE.findall((ROOT / page).read_text()):
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), f"{page} runs {name}"


@pytest.mark.parametrize("page", [*PAGES, *EXAMPLE_PAGES])
def test_pages_name_only_options_of_modules_that_exist(page, monkeypatch, capsys):
    text = (ROOT / page).read_text().replace("\\\n", " ")
    for name, arguments in MODULE.findall(text):
        if name.startswith(("examples.experiments.", "processing.")):
            known = set(re.findall(r"--\w+", _help_of_module(name, monkeypatch, capsys)))
            unknown = set(re.findall(r"(?<=\s)--\w+", arguments)) - known
            assert not unknown, f"{page} passes {unknown} to {name}, which does not know them"


def _help_of_module(name, monkeypatch, capsys) -> str:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit):
        module = importlib.import_module(name)
        (module if hasattr(module, "main") else importlib.import_module(f"{name}.__main__")).main()
    return capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_can_be_parsed(page):
    for block in blocks(page, "python"):
        ast.parse(block)


@pytest.fixture
def where_documents_are_read(tmp_path, monkeypatch):
    """A folder in which the models and clips that the documents name exist; the models are not trained."""
    processor = BlspKdProcessor.from_backbones(TINY_WORLD / "speech_encoder", TINY_WORLD / "llm")
    for folder, options in {"default": {}, "mine": {"thin": True, "plora": True}}.items():
        model = BlspKdForCausalLM.from_backbones(
            TINY_WORLD / "speech_encoder",
            TINY_WORLD / "llm",
            audio_token_id=processor.audio_token_id,
            adapter={"type": "cformer", "num_pre_layers": 1, "num_post_layers": 2},
            **options,
        )
        model.save_pretrained(tmp_path / "outputs" / folder)
        processor.save_pretrained(tmp_path / "outputs" / folder)
    (tmp_path / SPOKEN_CLIP).parent.mkdir()
    shutil.copy(TINY_WORLD / "clips" / "soup.flac", tmp_path / SPOKEN_CLIP)
    (tmp_path / "examples" / "tiny_world").mkdir(parents=True)
    for name in ("clips", "model"):
        shutil.copytree(TINY_WORLD / name, tmp_path / "examples" / "tiny_world" / name)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("number", [0, 1])
def test_the_shipped_model_answers_as_the_readme_says(number, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    block = blocks("README.md", "python")[number]
    exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out.splitlines() == re.findall(r"print\(.*\)  # (.+)", block)


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/generation.md",
        "docs/chat_templates.md",
        "docs/checkpoints.md",
        "docs/demo.md",
        "docs/evaluation.md",
        "docs/streaming.md",
        "docs/threads.md",
        "docs/training.md",
    ],
)
def test_python_blocks_run(page, where_documents_are_read):
    row = {"audio": (clip(1.0), 16_000), "text": "two two eight", "response": "two", "instruction": "Name the largest."}
    namespace = {"rows": [row]}
    if page == "docs/demo.md":  # it goes on with the model of the README
        exec(blocks("README.md", "python")[1], namespace)
    for block in blocks(page, "python"):
        # The Hub's backbones are the tiny ones here.
        block = block.replace("openai/whisper-small", str(TINY_WORLD / "speech_encoder"))
        block = block.replace("Qwen/Qwen2.5-0.5B-Instruct", str(TINY_WORLD / "llm"))
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(block, page, "exec"), namespace)
