"""Responses made by the LLM: nothing is lost or doubled when a run is killed, or continued with other settings."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from examples.make_training_data import main
from processing.response_generation import generation
from processing.response_generation.engines import Answer
from tests.helpers.asr_data import make, options_for

EXAMPLES = Path(__file__).parent.parent / "examples"


# Killed, and begun again


def killed(arguments, hook):
    """Run it in a forked process that `hook` may kill. True if it was killed, False if it came to its end."""

    def child():
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            hook()
            main(arguments)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(timeout=120)
    if process.is_alive():
        process.kill()  # else the test run would wait for it at its own end
        pytest.fail("the forked process hangs")
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def kill_now():
    os.kill(os.getpid(), signal.SIGKILL)


def at_sync(count, torn=None):
    """Kill at the `count`-th time that something is to be on the disk; `torn`: of an appended line only so much is."""

    def hook():
        calls, sync = 0, os.fsync

        def fsync(descriptor):
            nonlocal calls
            calls += 1
            if calls == count:
                if torn is not None:
                    path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
                    if path.name.startswith("part-"):
                        content = path.read_bytes()
                        last = content.rstrip(b"\n").rfind(b"\n") + 1
                        os.truncate(path, last + int(torn * (len(content) - last)))
                kill_now()
            sync(descriptor)

        os.fsync = fsync

    return hook


@pytest.fixture
def answers_tell_their_batch(monkeypatch):
    """A stand-in for the LLM, quick, and more touchy: its answers depend on all that was asked with them."""

    class Engine:
        def answer(self, prompts, seeds):
            asked = hashlib.sha256(json.dumps([prompts, seeds]).encode()).hexdigest()
            return [Answer(f"{seed} of {asked}", True) for seed in seeds]

    monkeypatch.setattr(generation, "make_engine", lambda *arguments: Engine())


def everything_in(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.long
@pytest.mark.usefixtures("answers_tell_their_batch")
def test_killed_at_any_point_it_goes_on_and_ends_with_the_same_files(asr, parquet, backbones):
    """Every place where something must be on the disk: settings, part, audio, blocks, rejects, output."""
    files = {"parquet": sorted(parquet.glob("*.parquet")), "text_column": "sentence"}
    changes = {**files, "batch_size": 4}
    make("x.parquet", asr / "whole/train.jsonl", backbones[1], **changes)
    expected = everything_in(asr / "whole")
    assert {path.name for path in expected} >= {"train.jsonl", "train.rejects.jsonl", "train.settings.json"}
    count = 0
    while True:
        count += 1
        folder = asr / f"killed{count}"
        arguments = options_for("x.parquet", folder / "train.jsonl", backbones[1], **changes)
        if not killed(arguments, at_sync(count)):
            break
        make("x.parquet", folder / "train.jsonl", backbones[1], **changes)
        assert everything_in(folder) == expected, f"killed at sync {count}"
    assert count > 20, "the kill came at many places"
    assert everything_in(folder) == expected


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.usefixtures("answers_tell_their_batch")
def test_killed_again_and_again_in_the_middle_of_lines_nothing_is_lost_or_doubled(asr, backbones, seed):
    changes = {"templates": ["continue", "repeat"], "batch_size": 1}
    make(asr / "asr.jsonl", asr / "whole/train.jsonl", backbones[1], **changes)
    arguments = options_for(asr / "asr.jsonl", asr / "killed/train.jsonl", backbones[1], **changes)
    generator, kills = random.Random(seed), 0
    while killed(arguments, at_sync(generator.randint(1, 6), torn=generator.random())):
        kills += 1
        assert kills < 60
    assert kills >= 2
    assert everything_in(asr / "killed") == everything_in(asr / "whole")


@pytest.mark.long
def test_killed_while_removing_the_parts_it_only_removes_the_rest(asr, backbones):
    make(asr / "asr.jsonl", asr / "whole/train.jsonl", backbones[1])
    arguments = options_for(asr / "asr.jsonl", asr / "killed/train.jsonl", backbones[1])

    def hook():
        remove = shutil.rmtree

        def half(folder, **options):
            if not str(folder).endswith(".parts"):  # of a temporary folder
                return remove(folder, **options)
            next(folder.glob("part-*.jsonl")).unlink()
            kill_now()

        shutil.rmtree = half

    assert killed(arguments, hook)
    assert (asr / "killed/train.parts").exists()
    main(arguments)
    assert everything_in(asr / "killed") == everything_in(asr / "whole")


@pytest.mark.long
def test_two_processes_go_on_where_one_was_killed_and_end_with_the_same_files(asr, backbones):
    changes = {"temperature": 1.0, "batch_size": 1}
    make(asr / "asr.jsonl", asr / "whole/train.jsonl", backbones[1], **changes)
    arguments = options_for(asr / "asr.jsonl", asr / "two/train.jsonl", backbones[1], **changes)
    assert killed(arguments, at_sync(6))
    done = (asr / "two/train.parts/part-00000.jsonl").read_bytes().count(b"\n")
    assert 0 < done < 5
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    launched = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        + [str(EXAMPLES / "make_training_data.py"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert launched.returncode == 0, launched.stderr[-3000:]
    assert "8 rows, made by 2 process(es)" in launched.stdout
    assert "process 1 of 2" in launched.stderr
    assert everything_in(asr / "two") == everything_in(asr / "whole")


# Begun otherwise


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seed": 1}, r"seed: 0, now 1"),
        ({"normaliser": "none"}, r"normaliser: 'librispeech', now 'none'"),
        ({"templates": "repeat"}, r"templates: .*'continue'.*, now .*'repeat'.*"),
        ({"batch_size": 3}, r"batch_size: 2, now 3"),
    ],
)
@pytest.mark.parametrize("state", ["complete", "killed"])
def test_other_settings_are_refused_and_leave_all_as_it_was(asr, backbones, changes, message, state):
    output = asr / "train.jsonl"
    if state == "complete":
        make(asr / "asr.jsonl", output, backbones[1], limit=4)
    else:
        assert killed(options_for(asr / "asr.jsonl", output, backbones[1], limit=4), at_sync(5))
    before = everything_in(asr)
    with pytest.raises(ValueError, match=rf"train\.jsonl was begun with other settings \({message}\)"):
        make(asr / "asr.jsonl", output, backbones[1], limit=4, **changes)
    assert everything_in(asr) == before


def test_changed_data_or_another_llm_are_other_settings(asr, backbones, tmp_path):
    make(asr / "asr.jsonl", asr / "train.jsonl", backbones[1])
    shutil.copytree(backbones[1], tmp_path / "text")
    make(asr / "asr.jsonl", asr / "train.jsonl", tmp_path / "text")  # a copy is the same
    weights = tmp_path / "text/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"other settings \(model: "):
        make(asr / "asr.jsonl", asr / "train.jsonl", tmp_path / "text")
    (asr / "asr.jsonl").write_text((asr / "asr.jsonl").read_text().replace("STEW", "SOUP"))
    with pytest.raises(ValueError, match=r"other settings \(source: "):
        make(asr / "asr.jsonl", asr / "train.jsonl", backbones[1])


def test_a_complete_run_does_nothing_again(asr, backbones, capsys):
    make(asr / "asr.jsonl", asr / "train.jsonl", backbones[1])
    before = (asr / "train.jsonl").stat().st_mtime_ns
    make(asr / "asr.jsonl", asr / "train.jsonl", backbones[1])
    assert "train.jsonl is complete. Nothing to do." in capsys.readouterr().out
    assert (asr / "train.jsonl").stat().st_mtime_ns == before


def test_a_file_of_somebody_else_is_not_overwritten(asr, backbones):
    (asr / "train.jsonl").write_text("mine")
    with pytest.raises(ValueError, match=r"exists, but not .*train\.settings\.json, which tells how it was made"):
        make(asr / "asr.jsonl", asr / "train.jsonl", backbones[1])
    assert (asr / "train.jsonl").read_text() == "mine"


def test_two_runs_cannot_write_the_same_files(asr, backbones):
    arguments = options_for(asr / "asr.jsonl", asr / "train.jsonl", backbones[1])
    assert killed(arguments, at_sync(5))
    with FileLock(asr / "train.parts/part-00000.jsonl.lock"):
        with pytest.raises(RuntimeError, match=r"part-00000\.jsonl is being written by another run"):
            main(arguments)
    main(arguments)


def test_a_damaged_line_before_the_last_is_an_error_and_not_cut(asr, backbones):
    arguments = options_for(asr / "asr.jsonl", asr / "train.jsonl", backbones[1], batch_size=1)
    assert killed(arguments, at_sync(8))
    part = asr / "train.parts/part-00000.jsonl"
    lines = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(lines[0].replace(b"{", b"", 1) + b"".join(lines[1:]))
    before = part.read_bytes()
    with pytest.raises(RuntimeError, match=r"part-00000\.jsonl, line 1 is damaged"):
        main(arguments)
    assert part.read_bytes() == before
