"""The options of the distillation losses: their legal values, and defaults that the adapter sets.

Defaults follow arXiv 2405.19041 and the authors' public code; docs/losses.md has the formulas and sources of the rest.
Leaves out: the losses themselves (`distillation.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from .config_options import Options, is_count, is_not_negative, require
from .divergences import check_divergence
from .layer_alignment import DISTANCES

# Losses that compare position by position, so they need one speech token per text token.
NEED_ONE_TO_ONE = ("input_kl", "quantity", "transcript_ce", "ctc", "layer_alignment")


@dataclass(frozen=True)
class DistillationOptions(Options):
    """Weights of the losses, at least 0 each (0: not computed in training), and how they compare.

    Args:
        response_kl (`float`): KL over response tokens.
        input_kl (`float`, *optional*): KL over content positions; needs one token per text token. Omitted: 1 with
            the CFormer, 0 with the subsampler.
        quantity (`float`, *optional*): CIF's token count. Omitted: as `input_kl`.
        response_ce (`float`): cross-entropy of the response (the BLSP baseline).
        transcript_ce (`float`): cross-entropy of the transcript read off the speech tokens (ASR).
        ctc (`float`): CTC of the transcript's characters on the frames before CIF, see `ctc.py`; the CFormer has a head
            for it while this is above 0.
        temperature (`float`): above 0; no temperature^2 factor follows.
        end_of_turn_kl (`float`): KL over the tokens that end an answer, beside their share of `response_kl`.
        layer_alignment (`float`): distance of hidden states of `alignment_layers` at content positions; needs one
            token per text token.
        divergence (`str`): what all KLs are: `"forward"`, `"reverse"` or `"jsd"`, see [`linear_kl`].
        jsd_beta (`float`): of `"jsd"`: weight of the teacher in the mixture, in (0, 1).
        early_tokens (`int`), early_weight (`float`): `response_kl` counts so many first tokens of each answer
            `early_weight` times.
        hardest_share (`float`): in (0, 1]: `response_kl` counts only this share of the tokens of each answer, those
            with the highest divergence.
        alignment_layers (`list[int]`): hidden states as LLMs return them: 0 for the embeddings, i for what layer i
            makes.
        alignment_distance (`str`): `"cosine"` or `"mse"`.
    """

    where: ClassVar[str] = "distillation"

    response_kl: float = 1.0
    input_kl: float | None = None
    quantity: float | None = None
    response_ce: float = 0.0
    transcript_ce: float = 0.0
    ctc: float = 0.0
    temperature: float = 2.0
    end_of_turn_kl: float = 0.0
    layer_alignment: float = 0.0
    divergence: str = "forward"
    jsd_beta: float = 0.5
    early_tokens: int = 0
    early_weight: float = 1.0
    hardest_share: float = 1.0
    alignment_layers: Sequence[int] = ()
    alignment_distance: str = "cosine"

    def __post_init__(self):
        names = ("response_kl", "response_ce", "transcript_ce", "ctc", "temperature", "end_of_turn_kl")
        numbers = ("layer_alignment", "jsd_beta", "early_weight", "hardest_share")
        self.check(is_not_negative, "must be at least 0", *names, *numbers)
        self.check(is_not_negative, "must be at least 0", "input_kl", "quantity", or_none=True)
        self.check(lambda value: value > 0, "must be above 0", "temperature", "early_weight")
        self.check(lambda value: 0 < value <= 1, "must lie in (0, 1]", "hardest_share")
        self.check(lambda value: is_count(value, 0), "must be an integer of at least 0", "early_tokens")
        check_divergence(self.divergence, self.jsd_beta)
        self.check(lambda value: value in DISTANCES, f"must be one of {DISTANCES}", "alignment_distance")
        layers = self.alignment_layers
        is_layers = isinstance(layers, (list, tuple)) and all(is_count(layer, 0) for layer in layers)
        require(is_layers, "distillation option alignment_layers must be a list of integers of at least 0", layers)
        object.__setattr__(self, "alignment_layers", list(layers))  # as JSON returns it
        for is_idle, idle, other in (
            (self.jsd_beta != 0.5 and self.divergence != "jsd", "jsd_beta", "divergence='jsd'"),
            (self.early_weight != 1 and not self.early_tokens, "early_weight", "early_tokens above 0"),
            (bool(layers) and not self.layer_alignment, "alignment_layers", "layer_alignment above 0"),
            (self.layer_alignment and not layers, "layer_alignment", "alignment_layers, for example [8, 16]"),
        ):
            if is_idle:
                raise ValueError(f"distillation option {idle}={getattr(self, idle)} has no effect without {other}.")

    def for_adapter(self, one_to_one: bool) -> Self:
        """Return the options with what was omitted filled in.

        Args:
            one_to_one (`bool`): the adapter makes one speech token per text token.

        Raises:
            ValueError: a loss needs that, and the adapter does not do it.
        """
        omitted: dict[str, Any] = {
            name: float(one_to_one) for name in ("input_kl", "quantity") if getattr(self, name) is None
        }
        options = replace(self, **omitted)
        for name in () if one_to_one else NEED_ONE_TO_ONE:
            if value := getattr(options, name):
                raise ValueError(
                    f"distillation option {name}={value} needs one speech token per text token, which the "
                    "subsampler adapter does not make. Set it to 0, or use adapter='cformer'."
                )
        return options

    def for_llm(self, num_layers: int) -> Self:
        """Return the options, or raise a ValueError if an LLM of so many layers lacks one of `alignment_layers`."""
        if beyond := [layer for layer in self.alignment_layers if layer > num_layers]:
            raise ValueError(
                f"distillation option alignment_layers names {beyond}, but the LLM has the hidden states 0 to "
                f"{num_layers}."
            )
        return self
