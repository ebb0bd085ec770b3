"""The options of the adapters, CFormer and Subsampler: their legal values, and defaults that the speech encoder sets.

Defaults follow the authors' public code. Leaves out: the adapters themselves (`adapters.py`, `subsampler.py`).
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from .config_options import Options, is_count, is_positive, is_positive_count, is_share, require
from .encoder_families import ENCODER_FAMILIES
from .expected_embeddings import OUTPUTS


@dataclass(frozen=True)
class CFormerOptions(Options):
    """Options of `adapter={"type": "cformer", ...}`.

    Args:
        num_pre_layers, num_post_layers (`int`): transformer layers before and after CIF, at least 0. With none before
            and no joined frames, CIF's weights are a channel of the encoder's own frames: train the encoder, too.
        num_attention_heads (`int`, *optional*): must divide the encoder width; omitted: the encoder's own.
        ffn_dim (`int`, *optional*): omitted: the encoder's own.
        dropout (`float`): in [0, 1).
        frame_stride (`int`): encoder frames that are joined to one for the pre-CIF layers, at least 1. Their cost falls
            in proportion; CIF integrates all frames as before.
        attention_window (`int`, *optional*): joined frames, at least 1. The pre-CIF layers attend within stretches of
            this length, which begin half a stretch earlier in every other layer, so that their cost grows with the
            length of a clip, not with its square. Omitted: they attend to the whole clip (at most 30 s).
        output (`str`): what the LLM reads: `"projection"`, the last layer's output in the LLM's width, or
            `"expected_embedding"`, the LLM's token embeddings averaged by softmax, see `expected_embeddings.py`.
        output_temperature (`float`): of this softmax, above 0. The lower, the more the most probable token counts.
    """

    where: ClassVar[str] = "the cformer adapter"
    type: ClassVar[str] = "cformer"
    one_to_one: ClassVar[bool] = True

    num_pre_layers: int = 4
    num_post_layers: int = 4
    num_attention_heads: int | None = None
    ffn_dim: int | None = None
    dropout: float = 0.0
    frame_stride: int = 1
    attention_window: int | None = None
    output: str = "projection"
    output_temperature: float = 1.0

    def __post_init__(self):
        self.check(
            lambda value: is_count(value, 0), "must be an integer of at least 0", "num_pre_layers", "num_post_layers"
        )
        self.check(is_positive_count, "must be an integer of at least 1", "ffn_dim", or_none=True)
        self.check(is_positive_count, "must be an integer of at least 1", "frame_stride")
        self.check(is_positive_count, "must be None or an integer of at least 1", "attention_window", or_none=True)
        self.check(is_share, "must lie in [0, 1)", "dropout")
        self.check(lambda value: value in OUTPUTS, f"must be one of {OUTPUTS}", "output")
        self.check(is_positive, "must be above 0", "output_temperature")

    @property
    def reads_encoder(self) -> bool:
        """Return whether CIF reads its weights off the encoder's own frames."""
        return self.num_pre_layers == 0 and self.frame_stride == 1

    def for_encoder(self, speech_config: Any) -> Self:
        """Return the options, of which those that were omitted come from the encoder's config.

        Raises:
            ValueError: its width cannot be divided among the attention heads.
        """
        heads, ffn_dim, width = self.num_attention_heads, self.ffn_dim, speech_config.hidden_size
        heads = speech_config.num_attention_heads if heads is None else heads
        require(
            is_count(heads, 1) and width % heads == 0,
            f"adapter option num_attention_heads must divide the encoder width {width}",
            heads,
        )
        if ffn_dim is None:
            ffn_dim = getattr(speech_config, ENCODER_FAMILIES[speech_config.model_type].ffn_dim)
        return replace(self, num_attention_heads=heads, ffn_dim=ffn_dim)


@dataclass(frozen=True)
class SubsamplerOptions(Options):
    """Options of `adapter={"type": "subsampler", ...}`.

    Args:
        num_layers (`int`): stride-2 convolutions; three make 6.25 tokens/s of 50 frames/s.
        kernel_size (`int`): odd.
        bottleneck_dim (`int`): width of the bottleneck.
    """

    where: ClassVar[str] = "the subsampler adapter"
    type: ClassVar[str] = "subsampler"
    one_to_one: ClassVar[bool] = False
    reads_encoder: ClassVar[bool] = False

    num_layers: int = 3
    kernel_size: int = 5
    bottleneck_dim: int = 512

    def __post_init__(self):
        self.check(is_positive_count, "must be at least 1", "num_layers", "bottleneck_dim")
        self.check(lambda value: is_count(value, 1) and value % 2 == 1, "must be odd", "kernel_size")

    def for_encoder(self, speech_config: Any) -> Self:
        """Return the options as they are: they fit any encoder."""
        return self


AdapterOptions = CFormerOptions | SubsamplerOptions
ADAPTERS: dict[str, type[AdapterOptions]] = {"cformer": CFormerOptions, "subsampler": SubsamplerOptions}


def check_frozen_encoder(options: AdapterOptions):
    """Check that something learns the token counts although the encoder is frozen.

    Raises:
        ValueError: CIF reads its weights off the encoder.
    """
    if options.reads_encoder:
        raise ValueError(
            "With num_pre_layers=0 CIF reads its weights off the encoder, so while that is frozen nothing would learn "
            "the token counts. Set freeze_speech_encoder=False, or have a pre-CIF layer or a frame_stride above 1."
        )


def read_adapter(given: Any, speech_config: Any) -> AdapterOptions:
    """Return the options of an adapter that is given by its name, or by a dict with its name as `type`.

    Raises:
        ValueError: it is neither, or an option is unknown or does not fit the encoder of `speech_config`.
    """
    given = {"type": given} if isinstance(given, str) else given
    kind = given.get("type") if isinstance(given, dict) else given
    require(
        isinstance(kind, str) and kind in ADAPTERS,
        f"adapter must be one of {sorted(ADAPTERS)}, or a dict whose 'type' is",
        kind,
    )
    given = {name: value for name, value in given.items() if name != "type"}
    return ADAPTERS[str(kind)].read(given).for_encoder(speech_config)
