"""The options of `BlspKdConfig` that are dicts: one class for each, which raises an error for an invalid value.

Defaults follow arXiv 2405.19041 and the authors' public code. A config stores these options as plain dicts and makes
the classes again wherever they are read. Leaves out: the options of the adapters and of the losses
(`adapter_options.py`, `distillation_options.py`), and all other fields (`configuration_blsp_kd.py`).
"""

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

# Names at least this similar count as typing errors: "lora" is taken for plora, but pad_token_id, which many configs
# have, is not taken for audio_token_id.
TYPING_ERROR = 0.85
BACKBONES = ("audio_tower", "language_model")
PARTS = (*BACKBONES, "adapter", "plora")
FLOATING_POINT = ("float64", "float32", "bfloat16", "float16")


def look_alikes(name: str, known: Iterable[str]) -> list[str]:
    """Return the known name that an unknown one is a typing error of, if there is one."""
    return difflib.get_close_matches(name, list(known), n=1, cutoff=TYPING_ERROR)


def unknown_options(names: list[str], known: list[str], where: str) -> ValueError:
    """Return the error for unknown names, which proposes known ones."""
    meant = [close for name in names for close in look_alikes(name, known)]
    hint = f" Did you mean {' and '.join(meant)}?" if meant else ""
    return ValueError(f"Unknown option(s) {names} in {where}. Known: {known}.{hint}")


def check_spelling(names: Iterable[str], known: list[str], where: str):
    """Raise a ValueError if one of the names is a typing error of a known one."""
    if misspelt := sorted(name for name in names if name not in known and look_alikes(name, known)):
        raise unknown_options(misspelt, known, where)


def require(condition: bool, expected: str, got: object):
    """Raise a ValueError that says what was expected and what was given, unless a condition holds."""
    if not condition:
        raise ValueError(f"{expected}, got {got!r:.200}.")


def is_count(value: Any, at_least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < math.inf


def is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


def is_not_negative(value: Any) -> bool:
    return _is_number(value) and value >= 0


def is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def is_positive_count(value: Any) -> bool:
    return is_count(value, 1)


def _is_name_or_names(value: Any) -> bool:
    return is_text(value) or (isinstance(value, (list, tuple)) and len(value) > 0 and all(map(is_text, value)))


@dataclass(frozen=True)
class Options:
    """The base of all classes of options.

    Attributes:
        where (`str`): what the options are of, for messages.
    """

    where: ClassVar[str]

    @classmethod
    def read(cls, given: Any) -> Self:
        """Return the options in a dict; those that it leaves out have their defaults.

        Raises:
            ValueError: `given` is no dict, or an option in it is unknown or has a value that means nothing.
        """
        require(isinstance(given, dict), f"The options of {cls.where} must be a dict", given)
        known = [field.name for field in fields(cls)]
        if unknown := sorted(map(str, set(given) - set(known))):
            raise unknown_options(unknown, known, cls.where)
        return cls(**given)

    def check(self, is_fit: Callable[[Any], bool], expected: str, *names: str, or_none: bool = False):
        """Raise a ValueError if an option of one of the names is not fit, or (with `or_none`) omitted."""
        for name in names:
            value = getattr(self, name)
            is_omitted = or_none and value is None
            require(is_omitted or is_fit(value), f"{self.where.split()[-1]} option {name} {expected}", value)


def read_switch(given: Any, name: str) -> dict | None:
    """Return the options of a part that is switched by True, False (or None), or a dict; None if it is off.

    Raises:
        ValueError: it is none of these.
    """
    if given is None or given is False:
        return None
    given = {} if given is True else given
    require(isinstance(given, dict), f"{name} must be True, False or a dict of options", given)
    return given


@dataclass(frozen=True)
class PartialLoraOptions(Options):
    """Options of `plora={...}`, named as in `peft.LoraConfig`.

    Args:
        r (`int`): rank, at least 1.
        lora_alpha (`float`): the update is scaled by `lora_alpha / r`.
        lora_dropout (`float`): in [0, 1).
        target_modules (`str` or `list[str]`): `"all-linear"`: all attention and MLP projections.
    """

    where: ClassVar[str] = "plora"

    r: int = 16
    lora_alpha: float = 16
    lora_dropout: float = 0.05
    target_modules: str | Sequence[str] = "all-linear"

    def __post_init__(self):
        self.check(is_positive_count, "must be an integer of at least 1", "r")
        self.check(lambda value: _is_number(value) and value > 0, "must be above 0", "lora_alpha")
        self.check(is_share, "must lie in [0, 1)", "lora_dropout")
        self.check(_is_name_or_names, "must be a name or a list of names", "target_modules")


def read_plora(given: Any) -> PartialLoraOptions | None:
    """Return the options of partial LoRA that is given as True, False (or None), or a dict; None if it is off.

    Raises:
        ValueError: it is none of these, or an option is unknown or means nothing.
    """
    given = read_switch(given, "plora")
    if given is None:
        return None
    if given.get("use_dora"):
        raise ValueError("plora does not support use_dora: DoRA rescales the LLM's own weights, at text positions too.")
    if given.get("lora_bias") or given.get("bias", "none") != "none":
        raise ValueError("plora does not support lora_bias: a bias after B is added at every position, text included.")
    return PartialLoraOptions.read(given)


@dataclass(frozen=True)
class TimestampOptions(Options):
    """Options of `timestamps={...}`: how CIF's integral is read as a clock, see `token_times.py`.

    Args:
        delay_s (`float`): how long after the words CIF gathers their weight, seconds.
            `examples/experiments/measure_timestamps.py` fits it.
        silence (`float`): in [0, 1): frames are silent up to this share of the way from the quietest frame of a clip to
            its loudest; 0: none is.
    """

    where: ClassVar[str] = "timestamps"

    delay_s: float = 0.1
    silence: float = 0.3

    def __post_init__(self):
        self.check(lambda value: _is_number(value) and -1 <= value <= 1, "must lie in [-1, 1] (seconds)", "delay_s")
        self.check(is_share, "must lie in [0, 1)", "silence")


def check_part_dtypes(given: Any):
    """Check what a full checkpoint's config tells of the dtypes of its parts.

    Raises:
        ValueError: it is neither None nor the name of a dtype for some of the parts.
    """
    require(
        given is None
        or isinstance(given, dict)
        and set(given) <= set(PARTS)
        and all(dtype in FLOATING_POINT for dtype in given.values()),
        f"part_dtypes must be None, or give the name of a floating point dtype for parts among {PARTS}",
        given,
    )
