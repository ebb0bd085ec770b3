"""Options of the data that `train.py` trains on.

Every one is off unless it is given, and a run without any is the tiny world. Leaves out: batch size, workers, seed and
sampling strategy, which are TrainingArguments.
"""

from dataclasses import dataclass, field


@dataclass
class DataOptions:
    """
    Raises:
        ValueError: options that exclude or need each other.
    """

    train_manifest: str | None = field(default=None, metadata={"help": "JSONL manifest; the tiny world if omitted."})
    train_mixture: str | None = field(
        default=None, metadata={"help": "YAML list of manifests and data sets with weights, instead of one manifest."}
    )
    eval_manifest: str | None = field(default=None, metadata={"help": "JSONL manifest to score on."})
    allow_outside_paths: bool = field(
        default=False, metadata={"help": "Let audio paths leave the folder of their manifest."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read training rows as they are needed, instead of all of them at the start."}
    )
    shuffle_buffer: int = field(
        default=2000, metadata={"help": "Streaming: rows in memory from which the next row is drawn."}
    )
    length_buffer: int = field(
        default=32, metadata={"help": "Streaming: number of batches whose rows are sorted by length together."}
    )
    seconds_per_token: float = field(
        default=0.0,
        metadata={
            "help": "Batches are grouped by seconds of audio plus this for each token of instruction, text and "
            "response; 0: by audio alone."
        },
    )
    keep_features: bool = field(
        default=False,
        metadata={
            "help": "Keep the features of all training clips in memory, some 30 kB per second of speech in each data "
            "loader worker, as long as it lives (--dataloader_persistent_workers)."
        },
    )
    kept_teacher: str | None = field(
        default=None,
        metadata={
            "help": "Folder of keep_teacher.py: read what the teacher predicts for the training rows instead of "
            "letting it read them. Evaluations run the LLM of the model itself."
        },
    )
    speeds: list[float] = field(
        default_factory=list, metadata={"help": "Play each training clip at one of these speeds, e.g. 0.9 1.0 1.1."}
    )
    noise: str | None = field(
        default=None, metadata={"help": "Add noise to training clips: white, or a folder of recordings of noise."}
    )
    noise_snr_db: list[float] = field(
        default_factory=lambda: [5.0, 25.0], metadata={"help": "Lowest and highest ratio of clip to noise, dB."}
    )
    noise_share: float = field(default=0.5, metadata={"help": "Share of the training clips that get noise, 0 to 1."})
    skip_bad_audio: bool = field(
        default=False,
        metadata={
            "help": "Leave out training rows whose audio cannot be used, and list them in skipped_audio.jsonl of the "
            "output folder. Otherwise the first one is an error."
        },
    )
    num_utterances: int = field(default=6000, metadata={"help": "Tiny world: training clips to synthesise."})
    num_eval_utterances: int = field(default=480, metadata={"help": "Tiny world: test clips per kind of voice."})
    cache_dir: str = field(default="outputs/tiny_world_speech", metadata={"help": "Tiny world: where clips are kept."})
    max_response_tokens: int = field(default=32, metadata={"help": "Longest answer of the LLM."})

    def __post_init__(self):
        if self.train_manifest and self.train_mixture:
            raise ValueError("Give --train_manifest or --train_mixture, not both: a mixture names its manifests.")
        if self.streaming and not (self.train_manifest or self.train_mixture):
            raise ValueError("--streaming is for a --train_manifest or --train_mixture; the tiny world fits in memory.")
        if self.streaming and self.kept_teacher:
            raise ValueError(
                "--kept_teacher is for rows in memory, not for --streaming. Leave out the one or the other."
            )
        if min(self.shuffle_buffer, self.length_buffer) < 1:
            raise ValueError(
                "--shuffle_buffer and --length_buffer must be at least 1 (rows and batches), got "
                f"{self.shuffle_buffer} and {self.length_buffer}."
            )
        if self.seconds_per_token < 0:
            raise ValueError(f"--seconds_per_token must be 0 or more, got {self.seconds_per_token}.")
