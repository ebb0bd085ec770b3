"""The tests inside the source distribution of the installed transformers version, importable as `transformers_tests`.

pip fetches it into a cache folder of the project. The few modules that those tests import, but that the distribution
lacks, are stood in for. Leaves out: the tests of single models.
"""

import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from urllib.parse import urlparse

import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from transformers import testing_utils

PROJECT = Path(__file__).parents[2]
VERSION = version("transformers")
CACHE = PROJECT / ".cache" / "transformers_tests" / VERSION
PACKAGE = "transformers_tests"


def fetch():
    """Download the source distribution and unpack its tests, unless an earlier run did."""
    if (CACHE / PACKAGE).is_dir():
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
        subprocess.run([*command, "--dest", folder, f"transformers=={VERSION}"], check=True)
        with tarfile.open(next(Path(folder).glob("transformers-*.tar.gz"))) as archive:
            members = [member for member in archive.getmembers() if member.name.split("/")[1:2] == ["tests"]]
            archive.extractall(folder, members=members, filter="data")
        tests = next(Path(folder).glob("transformers-*/tests"))
        (tests / "__init__.py").touch()
        tests.rename(CACHE / PACKAGE)


def make_importable(media: Path):
    """Make the tests importable, offline.

    Args:
        media: folder of the audio files that stand for the ones that the processor tests name by URL.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    spec = importlib.util.spec_from_file_location(PACKAGE, CACHE / PACKAGE / "__init__.py")
    package = sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    _stand_in("exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
    _stand_in("generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
    # Only configurations without sub-configurations are checked against it.
    _stand_in("utils.test_configuration_utils", config_common_kwargs={})
    _stand_in("distributed_testing_utils", run_distributed=run_distributed)
    fetched = ModuleType("fetch_hub_objects_for_ci")
    fetched.url_to_local_path = lambda url: str(media / Path(urlparse(url).path).with_suffix(".wav").name)
    sys.modules[fetched.__name__] = fetched
    # Some tests of audio in chats ask for librosa, which our processor reads audio without.
    testing_utils.is_librosa_available = lambda: True


def _stand_in(name: str, **members):
    """Register a module of the tests, and the packages above it, with the given members only."""
    *packages, _ = name.split(".")
    for depth in range(len(packages)):
        package = ModuleType(".".join([PACKAGE, *packages[: depth + 1]]))
        package.__path__ = []
        sys.modules[package.__name__] = package
    module = ModuleType(f"{PACKAGE}.{name}")
    vars(module).update(members)
    sys.modules[module.__name__] = module


def run_distributed(world_size: int):
    """`run_distributed(n)(function)(*args)` runs `function(rank, *args)` in n processes joined by gloo."""

    def over_ranks(function):
        def run(*args):
            with tempfile.TemporaryDirectory() as folder:
                # Forked, so that the ranks know the stood-in modules.
                multiprocessing.start_processes(
                    _run_rank,
                    args=(function, args, world_size, f"file://{folder}/store"),
                    nprocs=world_size,
                    start_method="fork",
                )

        return run

    return over_ranks


def _run_rank(rank: int, function, args, world_size: int, store: str):
    # What torchrun would tell; transformers reads it.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()
