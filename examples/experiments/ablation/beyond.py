"""The second matrix: options that newer work adds to distillation, each beside the same BLSP-KD model, at equal time.

docs/losses.md has their formulas and sources. Leaves out: how a configuration's number of steps follows from its speed
(`speeds.py`).
"""

import json

from modeling_blsp_kd.training.building import TINY_ADAPTERS

from .matrix import BOTH, BY_NAME, Claim, Configuration, _trained

STAGES = "ablation/train_stages.py"
BASELINE = BY_NAME["cformer_both"]


def _with(name: str, title: str, **options) -> Configuration:
    """Return the baseline with further options of the losses."""
    return Configuration(name, f"BLSP-KD + {title}", _trained("cformer", {**BOTH, **options}))


def _staged(name: str, title: str, *stages: dict) -> Configuration:
    """Return the baseline in stages; each has its share of the steps, and options of `train.py` of its own."""
    return Configuration(
        name, f"BLSP-KD + {title}", {**_trained("cformer", BOTH), "stages": json.dumps(stages)}, STAGES
    )


def _losses(**options) -> dict:
    return {"distillation": {**BOTH, **options}}


EXPECTED = {**TINY_ADAPTERS["cformer"], "output": "expected_embedding"}
WARM_UP = {"response_kl": 0.0, "input_kl": 0.0, "quantity": 1.0, "transcript_ce": 1.0}
OPTIONS = (
    _with("reverse", "reverse KL", divergence="reverse"),
    # Its gradient is about half as large.
    _with("jsd", "Jensen-Shannon", divergence="jsd", response_kl=2.0, input_kl=2.0),
    _with("early", "weight on early tokens", early_tokens=2, early_weight=3.0),
    _with("hardest", "half of the tokens", hardest_share=0.5),
    _with("end_of_turn", "end-of-turn KL", end_of_turn_kl=1.0),
    _with("aligned", "alignment of layers 1 and 2", layer_alignment=1.0, alignment_layers=[1, 2]),
    _with("aligned_mse", "the same by MSE", layer_alignment=1.0, alignment_layers=[1, 2], alignment_distance="mse"),
    _with("ctc", "auxiliary CTC", ctc=0.5),
    _staged("warm_up", "recognition first", {"share": 0.5, "distillation": WARM_UP}, {"share": 0.5, **_losses()}),
    Configuration(
        "expected",
        "BLSP-KD + expected embeddings",
        {**_trained("cformer", BOTH), "adapter_options": json.dumps(EXPECTED)},
    ),
    _staged(
        "expected_warm_up",
        "expected embeddings, recognition first",
        {"share": 0.5, "distillation": WARM_UP, "adapter_options": EXPECTED},
        {"share": 0.5, **_losses()},
    ),
    _staged(
        "sharp_warm_up",
        "sharp expected embeddings, recognition first",
        {"share": 0.5, "distillation": WARM_UP, "adapter_options": {**EXPECTED, "output_temperature": 0.25}},
        {"share": 0.5, **_losses()},
    ),
    _staged(
        "on_policy",
        "own answers",
        {"share": 0.7},
        {"share": 0.3, "on_policy_share": 0.5, "learning_rate": 3e-4},
    ),
    _staged(
        "on_policy_reverse",
        "own answers, reverse KL, early tokens",
        {"share": 0.7},
        {
            "share": 0.3,
            "on_policy_share": 0.5,
            "learning_rate": 3e-4,
            **_losses(divergence="reverse", early_tokens=2, early_weight=3.0),
        },
    ),
    # Without it, a gain of the stages could be that of their second learning rate schedule.
    _staged("two_schedules", "a second schedule", {"share": 0.7}, {"share": 0.3, "learning_rate": 3e-4}),
)
CONFIGURATIONS = (BY_NAME["untrained"], BASELINE, *OPTIONS, BY_NAME["cascade_ctc"])
CLAIMS = (
    *(Claim(f"{each.title} beats BLSP-KD", (each.name, "speech"), (BASELINE.name, "speech")) for each in OPTIONS),
    *(
        Claim(f"{each.title} beats a cascade with a CTC recogniser", (each.name, "speech"), ("cascade_ctc", "cascade"))
        for each in (BASELINE, *OPTIONS)
    ),
)
