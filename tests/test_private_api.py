"""Every private name of other libraries that our code leans on: that it exists, and takes what it is given.

An upgrade that renames one is red here within a second, and says which file needs another way. A name that is used but
not in the table is red, too: look for a public way first. The table is what a search of the syntax trees of installed
code and of `examples/` finds, and a plain search of their text finds no more. Leaves out: Python's own library.
"""

import ast
import importlib
import inspect
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("modeling_blsp_kd", "processing")
FOLDERS = (*PACKAGES, "examples")
# Public in Python's own library, in spite of their names; glibc's stderr; and ends of other names.
PUBLIC = {"_exit", "_fields", "_IO_2_1_stderr_", "_norm", "_unfinished"}
# No more than half of those at commit 60f1148, which were 57.
MOST_ROWS = 28

TRAINER = "transformers.Trainer"
MODEL = "transformers.PreTrainedModel"
CONFIG = "transformers.PreTrainedConfig"
PIPELINE = "transformers.Pipeline"


class Private(NamedTuple):
    """A private name of another library.

    Args:
        owner: where it is looked up: a class, a function (whose parameter it is) or a namespace.
        name: an attribute, a method, or a parameter.
        files: who uses it.
        reason: what for, and why there is no other way.
        takes: the parameters that our calls name, or that our override reads.
    """

    owner: str
    name: str
    files: tuple[str, ...]
    reason: str
    takes: tuple[str, ...] = ()


def of(package: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{package}/{name}.py" for name in names)


TABLE = [
    # -- training -----------------------------------------------------------------------------------------------------
    Private(
        TRAINER,
        "_get_grad_norm",
        of("modeling_blsp_kd", "trainer"),
        "the last place before a step at which it can still be left out",
        ("model", "grad_norm"),
    ),
    Private(
        TRAINER,
        "_get_output_dir",
        of("modeling_blsp_kd/training", "saving"),
        "checkpoints are written aside and renamed when complete",
        ("trial",),
    ),
    Private(
        TRAINER,
        "_push_from_checkpoint",
        of("modeling_blsp_kd/training", "saving"),
        "a checkpoint is pushed when complete, not while it is written aside",
        ("checkpoint_folder",),
    ),
    Private(
        TRAINER,
        "_save_checkpoint",
        of("modeling_blsp_kd/training", "saving"),
        "checkpoints are written aside and renamed when complete",
        ("model", "trial"),
    ),
    Private(
        f"{TRAINER}.save_model",
        "_internal_call",
        of("examples", "train"),
        "saving without pushing: what is pushed has results and samples, too",
    ),
    # -- models -------------------------------------------------------------------------------------------------------
    *(
        Private(MODEL, name, of("modeling_blsp_kd", "pretrained_blsp_kd"), "a model declares what it supports by it")
        for name in (
            "_can_compile_fullgraph",
            "_supports_attention_backend",
            "_supports_flash_attn",
            "_supports_flex_attn",
            "_supports_sdpa",
        )
    ),
    Private(
        MODEL,
        "_no_split_modules",
        of("modeling_blsp_kd", "modeling_blsp_kd", "pretrained_blsp_kd"),
        "FSDP's units, device maps' too",
    ),
    Private(
        MODEL,
        "_skip_keys_device_placement",
        of("modeling_blsp_kd", "pretrained_blsp_kd"),
        "a key-value cache stays with its layers",
    ),
    Private(MODEL, "_keys_to_ignore_on_save", of("modeling_blsp_kd", "pretrained_blsp_kd"), "thin checkpoints"),
    *(
        Private(MODEL, name, of("modeling_blsp_kd", "backbones"), "no report of the parts of a speech model not taken")
        for name in ("_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected")
    ),
    Private(
        MODEL,
        "_finalize_model_loading",
        of("modeling_blsp_kd", "pretrained_blsp_kd"),
        "weights of other shapes are an error with names, before they are allocated",
        ("model", "load_config", "loading_info"),
    ),
    Private(
        MODEL,
        "_set_gradient_checkpointing",
        of("modeling_blsp_kd", "pretrained_blsp_kd"),
        "a recomputation needs the speech mask of the pass it repeats",
        ("enable", "gradient_checkpointing_func"),
    ),
    Private(
        CONFIG,
        "_attn_implementation",
        of(
            "modeling_blsp_kd",
            "adapters",
            "blockwise_attention",
            "modeling_blsp_kd",
            "pretrained_blsp_kd",
            "thin_checkpoints",
        ),
        "what attention a model runs with stands nowhere else",
    ),
    # -- layers -------------------------------------------------------------------------------------------------------
    Private(
        "torch.ops.aten",
        "_embedding_bag_per_sample_weights_backward",
        of("modeling_blsp_kd", "cif_integral"),
        "what autograd itself calls; all else costs several times the frames in time and memory",
    ),
    # -- the estimate of a training's cost ----------------------------------------------------------------------------
    *(
        Private(
            owner, name, of("modeling_blsp_kd/training", "step_cost"), "the only tensors with a shape and no contents"
        )
        for owner, name in (("torch", "_subclasses"), ("torch.utils", "_python_dispatch"))
    ),
    # -- pipelines ----------------------------------------------------------------------------------------------------
    *(
        Private(PIPELINE, name, of("processing", "pipeline_blsp_kd", "spoken_pipeline"), "documented for pipelines")
        for name in ("_forward", "_sanitize_parameters")
    ),
    *(
        Private(PIPELINE, name, of("processing", "spoken_pipeline"), "documented for pipelines: what it loads")
        for name in (
            "_load_feature_extractor",
            "_load_processor",
            "_load_tokenizer",
        )
    ),
    # -- evaluation ---------------------------------------------------------------------------------------------------
    *(
        Private(
            "evaluate.Metric",
            name,
            tuple(
                f"processing/evaluation/metrics/{metric}/{metric}.py"
                for metric in ("answer_match", "transcript_errors", "translation_quality")
            ),
            "documented for metrics",
        )
        for name in ("_info", "_compute")
    ),
]


def is_private(name: str) -> bool:
    return re.fullmatch(r"_[A-Za-z]\w*", name) is not None and name not in PUBLIC


@cache
def sources() -> dict[str, ast.Module]:
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in paths}


def names_in(tree: ast.Module, defined: bool) -> set[str]:
    """The private names that a file defines, or that it mentions."""
    found = set()
    in_strings = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found |= {node.name} if defined else set()
        elif isinstance(node, ast.arg):
            found |= {node.arg} if defined else set()
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found |= {node.id} if defined else set()
        elif isinstance(node, ast.Attribute):
            is_own = isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id == "self"
            found |= {node.attr} if is_own or not defined else set()
        elif defined:
            continue
        elif isinstance(node, ast.keyword):
            found |= {node.arg or ""}
        elif isinstance(node, (ast.Import, ast.ImportFrom)) and not getattr(node, "level", 0):
            found |= {part for name in node.names for part in name.name.split(".")}
            found |= set((getattr(node, "module", None) or "").split("."))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in in_strings:
            found |= {node.value}
    return {name for name in found if is_private(name)}


@cache
def ours(folders: tuple[str, ...]) -> set[str]:
    """The private names that the files of folders define."""
    return set().union(*(names_in(tree, defined=True) for file, tree in sources().items() if file.startswith(folders)))


def others(file: str, names: set[str]) -> set[str]:
    """Those of a file's names that are another library's. Installed code does not see those of `examples/`."""
    return names - ours(PACKAGES if file.startswith(PACKAGES) else FOLDERS)


def classes_of(file: str) -> list[tuple[type, ast.ClassDef]]:
    if not file.startswith(PACKAGES):
        return []  # scripts are not imported
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    return [(getattr(module, node.name), node) for node in sources()[file].body if isinstance(node, ast.ClassDef)]


def foreign_bases(cls: type) -> list[type]:
    return [base for base in cls.__mro__[1:] if base is not object and not base.__module__.startswith(PACKAGES)]


@cache
def text_of(cls: type) -> str:
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):  # written in C
        return ""


def belongs_to(name: str, cls: type) -> bool:
    return name in vars(cls) or re.search(rf"\bself\.{name}\b", text_of(cls)) is not None


def scan() -> set[tuple[str, str]]:
    """(file, name) of every private name that is another library's."""
    found = {(file, name) for file, tree in sources().items() for name in others(file, names_in(tree, defined=False))}
    for file in sources():
        for cls, node in classes_of(file):
            tree = ast.Module([node], [])
            for name in names_in(tree, defined=True) | names_in(tree, defined=False):
                if any(belongs_to(name, base) for base in foreign_bases(cls)):
                    found.add((file, name))
    return found


def look_up(path: str):
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for name in parts[length:]:
            found = getattr(found, name)
        return found
    raise ImportError(path)


def test_every_private_name_that_is_used_is_in_the_table():
    expected = {(file, entry.name) for entry in TABLE for file in entry.files}
    found = scan()
    assert not found - expected, "private names of other libraries: use a public way, or add them to the table"
    assert not expected - found, "no longer used: take them off the table"


def test_the_text_holds_no_other_private_name():
    """Searched are all words that begin with one underscore: in code, strings, comments and docstrings.

    One that no file of ours defines is another library's, and needs its row.
    """
    known = PUBLIC | {entry.name for entry in TABLE}
    found = {file: set(re.findall(r"(?<![\w}*])_[A-Za-z]\w*", (ROOT / file).read_text())) for file in sources()}
    assert not {(file, word) for file, words in found.items() for word in others(file, words) - known}


def test_the_table_does_not_grow_again():
    assert len(TABLE) == len({(entry.owner, entry.name) for entry in TABLE}) <= MOST_ROWS


@pytest.mark.parametrize("entry", TABLE, ids=lambda entry: entry.name)
def test_it_exists_and_takes_what_it_is_given(entry):
    owner = look_up(entry.owner)
    if not inspect.isclass(owner) and hasattr(owner, entry.name):
        return  # of a namespace
    classes = owner.__mro__ if inspect.isclass(owner) else ()
    is_there = any(belongs_to(entry.name, cls) for cls in classes) or (
        not classes and re.search(rf"\b{entry.name}\b", inspect.getsource(owner))
    )
    assert is_there, f"{entry.owner} has no {entry.name}: {entry.files} need it, since {entry.reason}"
    if entry.takes:
        parameters = inspect.signature(getattr(owner, entry.name)).parameters
        missing = [name for name in entry.takes if name not in parameters]
        assert not missing, f"{entry.owner}.{entry.name} takes {list(parameters)}, and no {missing}"


def test_what_is_overridden_is_given_to_us_whole():
    """An override that lacks a parameter fails only where the library comes to pass it."""
    checked = 0
    for file in sources():
        for cls, node in classes_of(file):
            for name in [
                part.name for part in node.body if isinstance(part, ast.FunctionDef) and is_private(part.name)
            ]:
                base = next((base for base in foreign_bases(cls) if name in vars(base)), None)
                if base is None:
                    continue
                own = inspect.signature(getattr(cls, name)).parameters
                kinds = {parameter.kind for parameter in own.values()}
                if inspect.Parameter.VAR_KEYWORD in kinds:
                    continue
                missing = set(inspect.signature(getattr(base, name)).parameters) - set(own)
                assert not missing, f"{cls.__name__}.{name} is not given {sorted(missing)}"
                checked += 1
    assert checked
