"""The matrix: every configuration, what it is trained with, and the paper's claims as differences between two of them.

Follows the comparisons of arXiv 2405.19041. Leaves out: settings that all share (data, steps, learning rates, batch),
which are those of `examples/train.py`.
"""

import json
from dataclasses import dataclass, field

TRAIN = "train.py"
GLOBAL_LORA = "ablation/train_global_lora.py"
RECOGNIZER = "ablation/train_recognizer.py"
UNTRAINED = "ablation/save_untrained.py"


@dataclass(frozen=True)
class Configuration:
    """One way to answer, trained or not.

    Args:
        name: of folders and files.
        title: in tables.
        options: of the script, beside those that all configurations share.
        script: `train.py` itself, or a file of `examples/experiments` that takes its options; leaves a model in
            `--output_dir`. Fingerprints of results include this name.
        systems: of `evaluate.py`, the one that the configuration stands for first. "cascade" is the LLM on the
            transcripts that the script leaves.
        has_seeds: False where nothing is drawn, so that one run (of seed 0) is all.
    """

    name: str
    title: str
    options: dict[str, str] = field(default_factory=dict)
    script: str = TRAIN
    systems: tuple[str, ...] = ("speech",)
    has_seeds: bool = True

    @property
    def keeps_llm(self) -> bool:
        """Return whether it leaves a model that listens, around the LLM of its teacher: else alignment is undefined."""
        return self.script not in (GLOBAL_LORA, RECOGNIZER, UNTRAINED)


def _trained(adapter: str, losses: dict, frozen=True, plora=False) -> dict[str, str]:
    return {
        "adapter": adapter,
        "distillation": json.dumps({"response_kl": 0.0, **losses}),
        "freeze_speech_encoder": str(frozen).lower(),
        "plora": str(plora).lower(),
    }


# The quantity loss teaches the CFormer how many tokens to make, so it goes with each of its losses.
BOTH = {"response_kl": 1.0, "input_kl": 1.0, "quantity": 1.0}
RESPONSE_ONLY = {"response_kl": 1.0, "input_kl": 0.0, "quantity": 1.0}
INPUT_ONLY = {"input_kl": 1.0, "quantity": 1.0}
RECOGNITION = {"input_kl": 0.0, "quantity": 1.0, "transcript_ce": 1.0}

CONFIGURATIONS = (
    Configuration("untrained", "the LLM alone", script=UNTRAINED, systems=("text", "blind"), has_seeds=False),
    Configuration("blsp", "BLSP: subsampler, response CE", _trained("subsampler", {"response_ce": 1.0})),
    Configuration("subsampler_kl", "subsampler, response KL", _trained("subsampler", {"response_kl": 1.0})),
    Configuration("cformer_response", "CFormer, response KL", _trained("cformer", RESPONSE_ONLY)),
    Configuration("cformer_input", "CFormer, input KL", _trained("cformer", INPUT_ONLY)),
    Configuration("cformer_both", "BLSP-KD: CFormer, both KLs", _trained("cformer", BOTH)),
    Configuration("encoder", "BLSP-KD + encoder", _trained("cformer", BOTH, frozen=False)),
    Configuration("plora", "BLSP-KD + PLoRA", _trained("cformer", BOTH, plora=True)),
    Configuration("encoder_plora", "BLSP-KD + encoder + PLoRA", _trained("cformer", BOTH, frozen=False, plora=True)),
    Configuration(
        "global_lora",
        "BLSP-KD + encoder + LoRA everywhere",
        _trained("cformer", BOTH, frozen=False, plora=True),
        GLOBAL_LORA,
        systems=("speech", "text"),
    ),
    Configuration(
        "cascade_cformer",
        "cascade: CFormer recogniser, LLM",
        {**_trained("cformer", RECOGNITION, frozen=False), "recognizer": "cformer"},
        RECOGNIZER,
        systems=("cascade",),
    ),
    Configuration(
        "cascade_ctc",
        "cascade: CTC recogniser, LLM",
        {"recognizer": "ctc", "freeze_speech_encoder": "false"},
        RECOGNIZER,
        systems=("cascade",),
    ),
)
BY_NAME = {configuration.name: configuration for configuration in CONFIGURATIONS}


@dataclass(frozen=True)
class Claim:
    """Something that holds if one system answers more questions correctly than another, or than a share of it.

    Args:
        text: what is claimed.
        better, worse: (configuration, system) each.
        share: of what `worse` answers correctly.
    """

    text: str
    better: tuple[str, str]
    worse: tuple[str, str]
    share: float = 1.0


CLAIMS = (
    Claim(
        "Distillation beats continuation cross-entropy (response KL against CE, subsampler)",
        ("subsampler_kl", "speech"),
        ("blsp", "speech"),
    ),
    Claim(
        "One-to-one tokens with input KL beat a fixed-rate adapter",
        ("cformer_both", "speech"),
        ("subsampler_kl", "speech"),
    ),
    Claim(
        "One-to-one tokens alone (response KL) beat a fixed-rate adapter",
        ("cformer_response", "speech"),
        ("subsampler_kl", "speech"),
    ),
    Claim("Input KL adds to response KL", ("cformer_both", "speech"), ("cformer_response", "speech")),
    Claim("Response KL adds to input KL", ("cformer_both", "speech"), ("cformer_input", "speech")),
    Claim("Unfreezing the encoder adds", ("encoder", "speech"), ("cformer_both", "speech")),
    Claim("PLoRA adds", ("plora", "speech"), ("cformer_both", "speech")),
    Claim("PLoRA adds to an unfrozen encoder", ("encoder_plora", "speech"), ("encoder", "speech")),
    Claim("PLoRA beats LoRA at all positions", ("encoder_plora", "speech"), ("global_lora", "speech")),
    Claim("LoRA at all positions harms answers to text", ("untrained", "text"), ("global_lora", "text")),
    Claim(
        "End to end beats a cascade with a CFormer recogniser",
        ("encoder_plora", "speech"),
        ("cascade_cformer", "cascade"),
    ),
    Claim("End to end beats a cascade with a CTC recogniser", ("encoder_plora", "speech"), ("cascade_ctc", "cascade")),
    Claim(
        "BLSP-KD + encoder + PLoRA reaches 95 % of the LLM on text",
        ("encoder_plora", "speech"),
        ("untrained", "text"),
        share=0.95,
    ),
)
