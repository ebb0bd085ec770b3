"""The options of the distillation losses: their legal values, and defaults that the adapter sets.

Defaults follow arXiv 2405.19041 and the authors' public code. Leaves out: the losses themselves (`distillation.py`).
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from .config_options import Options, is_not_negative


@dataclass(frozen=True)
class DistillationOptions(Options):
    """Weights of the losses, at least 0 each (0: not computed in training), and the temperature of the KLs.

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
    """

    where: ClassVar[str] = "distillation"

    response_kl: float = 1.0
    input_kl: float | None = None
    quantity: float | None = None
    response_ce: float = 0.0
    transcript_ce: float = 0.0
    ctc: float = 0.0
    temperature: float = 2.0

    def __post_init__(self):
        names = ("response_kl", "response_ce", "transcript_ce", "ctc", "temperature")
        self.check(is_not_negative, "must be at least 0", *names)
        self.check(is_not_negative, "must be at least 0", "input_kl", "quantity", or_none=True)
        self.check(lambda value: value > 0, "must be above 0", "temperature")

    def for_adapter(self, one_to_one: bool) -> Self:
        """Return the options with what was omitted filled in.

        Args:
            one_to_one (`bool`): the adapter makes one speech token per text token.

        Raises:
            ValueError: a loss needs that, and the adapter does not do it.
        """
        omitted = {name: float(one_to_one) for name in ("input_kl", "quantity") if getattr(self, name) is None}
        options = replace(self, **omitted)
        for name in () if one_to_one else ("input_kl", "quantity", "transcript_ce", "ctc"):
            if value := getattr(options, name):
                raise ValueError(
                    f"distillation option {name}={value} needs one speech token per text token, which the "
                    "subsampler adapter does not make. Set it to 0, or use adapter='cformer'."
                )
        return options
