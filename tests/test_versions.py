"""Every admitted version of the libraries: what `setup.cfg` admits is tested, and the key-value cache has two names.

Leaves out: models that one version saved and another loads (`test_other_version.py`).
"""

import configparser
import copy
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from transformers import Trainer, TrainingArguments

from modeling_blsp_kd.versions import CACHE_NAME, CACHE_NAMES
from tests.helpers.models import make_model
from tests.helpers.prompts import spoken_prompts

pytestmark = pytest.mark.numerical

ROOT = Path(__file__).parent.parent
OUTSIDE_CI = ("deepspeed", "benchmarks")  # extras that `.ci/run` does not install
GREEDY = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}


def next_turn(told, inputs):
    """The last answer's end and the same prompt again, after the cache of the first turn."""
    turn = dict(inputs)
    turn["input_ids"] = torch.cat([told.sequences[:, -1:], inputs["input_ids"]], 1)
    cached = told.past_key_values.attention_mask
    turn["attention_mask"] = torch.cat([cached, torch.ones_like(turn["input_ids"])], 1)
    return turn


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_the_cache_goes_by_both_names(name, processor):
    """5.24 renamed it. Models that knew the old name alone refused to go on from a cache, or silently began anew."""
    model = make_model(plora=True)
    inputs = spoken_prompts(processor, durations_s=(0.5,))
    told = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    assert told[CACHE_NAME] is told.past_key_values
    turn = next_turn(told, inputs)

    def forward(**cache):
        with torch.no_grad():
            return model(**turn, **cache)

    expected = forward(**{CACHE_NAME: copy.deepcopy(told.past_key_values)})
    output = forward(**{name: copy.deepcopy(told.past_key_values)})
    assert torch.equal(output.logits, expected.logits)
    assert output[CACHE_NAME] is output.past_key_values is getattr(output, CACHE_NAME)
    assert output.past_key_values.get_seq_length() > told.past_key_values.get_seq_length()

    expected = model.generate(**turn, **GREEDY, **{CACHE_NAME: copy.deepcopy(told.past_key_values)})
    assert torch.equal(model.generate(**turn, **GREEDY, **{name: copy.deepcopy(told.past_key_values)}), expected)
    # Text goes on from it, too, and reads nothing twice.
    text = {"input_ids": turn["input_ids"][:, :3], "attention_mask": turn["attention_mask"][:, :-1]}
    text["attention_mask"] = text["attention_mask"][:, : told.past_key_values.get_seq_length() + 3]
    cache = copy.deepcopy(told.past_key_values)
    model.generate(**text, **GREEDY, **{name: cache})
    assert cache.get_seq_length() == text["attention_mask"].shape[1] + 5


def test_a_cache_by_both_names_at_once_is_an_error(processor):
    model = make_model()
    inputs = spoken_prompts(processor, durations_s=(0.5,))
    cache = model.generate(**inputs, **GREEDY, return_dict_in_generate=True).past_key_values
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="Pass the key-value cache once: as past_key_values or as cache"):
            call(**inputs, past_key_values=cache, cache=cache)
    model.generate(**inputs, **GREEDY, past_key_values=None, cache=None)


def test_accelerate_leaves_the_cache_where_it_is():
    """Layers on several devices each keep their part of it; hooks that do not know its name would move all of it."""
    assert set(CACHE_NAMES) <= set(make_model(plora=True)._skip_keys_device_placement)


def test_a_plain_trainer_predicts_logits_alone(processor, tmp_path):
    """The key-value cache is no prediction, by neither name: Trainer would gather it over all processes."""
    model = make_model()
    inputs = spoken_prompts(processor, durations_s=(0.5,))
    row = {name: values[0] for name, values in inputs.items()} | {"labels": inputs["input_ids"][0]}
    args = TrainingArguments(tmp_path, per_device_eval_batch_size=1, report_to="none", use_cpu=True)
    predictions = Trainer(model, args).predict([row]).predictions
    with torch.no_grad():
        expected = model(**inputs).logits
    torch.testing.assert_close(torch.from_numpy(predictions), expected)


# -- what setup.cfg admits ---------------------------------------------------------------------------------------------


def admitted(*without) -> list[Requirement]:
    """All requirements of `setup.cfg`, but those of some extras and the project itself."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    lists = [parser["options"]["install_requires"]]
    lists += [value for extra, value in parser["options.extras_require"].items() if extra not in without]
    lines = {line.strip() for value in lists for line in value.splitlines() if line.strip()}
    return [Requirement(line) for line in sorted(lines) if not line.startswith(("#", "blsp-kd"))]


def pinned(file: str) -> dict[str, Version]:
    pins = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / file).read_text(), re.M)
    return {canonicalize_name(name): Version(number) for name, number in pins}


def bound(requirement: Requirement, operator: str) -> Version:
    (number,) = [part.version for part in requirement.specifier if part.operator == operator]
    return Version(number)


def test_the_newest_set_is_admitted_and_nothing_beyond_is_unbounded():
    """`transformers>=5.23` admitted 5.24, with which 48 tests failed."""
    pins = pinned("constraints.txt")
    for requirement in admitted():
        pin = pins[canonicalize_name(requirement.name)]
        assert pin in requirement.specifier, f"{requirement} does not admit the tested {pin}"
        assert bound(requirement, "<") <= Version(f"{pin.major + 1}"), f"{requirement} admits an untested major version"


@pytest.mark.parametrize("name", ["transformers", "peft", "accelerate", "sacrebleu"])
def test_where_private_names_are_used_no_untested_minor_version_is_admitted(name):
    pin = pinned("constraints.txt")[name]
    for requirement in admitted():
        if requirement.name == name:
            assert bound(requirement, "<") == Version(f"{pin.major}.{pin.minor + 1}")


def test_the_oldest_set_is_what_the_lower_bounds_say():
    pins = pinned("constraints-oldest.txt")
    for requirement in admitted(*OUTSIDE_CI, "lint"):
        assert pins[canonicalize_name(requirement.name)] == bound(requirement, ">="), str(requirement)


def test_the_installed_set_is_admitted():
    for requirement in admitted(*OUTSIDE_CI, "lint", "test", "metrics", "quantization", "demo", "audio", "examples"):
        assert Version(version(requirement.name)).public in requirement.specifier, str(requirement)
