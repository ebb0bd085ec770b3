"""Train a speech recogniser of the same size as the end-to-end model, and write its transcripts, for a cascade.

"cformer" reads the transcript off the speech tokens (`transcript_ce` and `quantity`), "ctc" is a linear layer on the
encoder (Graves et al. 2006); both spell in the LLM's tokens. Leaves out: language models and beams.

Takes the options of `examples/train.py`, and `--recognizer`. Leaves a model whose LLM is the original, and
`heard.jsonl`: the rows of `--eval_manifest` with the recognised text in place of their transcripts.
"""

import json
import logging
import os
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import HfArgumentParser, set_seed

from modeling_blsp_kd.speech_encoder import encode_speech
from modeling_blsp_kd.training.batch_order import ExactOrder
from modeling_blsp_kd.training.building import make_trainer
from modeling_blsp_kd.training.command_line import HelpFormatter
from modeling_blsp_kd.training.options import Arguments, ModelOptions, encoder_learning_rate
from modeling_blsp_kd.training.parameter_groups import optimizer_with_groups
from processing.evaluation.recognition import read_off
from processing.training_rows.options import DataOptions

from ...train import with_tiny_world

# The text of a row without a recognised token, because manifests have no empty transcripts.
NOTHING = "..."


@dataclass
class RecognizerOptions:
    recognizer: str = field(metadata={"help": "cformer or ctc.", "choices": ["cformer", "ctc"]})


class CtcRecognizer(nn.Module):
    """A speech encoder with a linear CTC head over the LLM's tokens; the blank is the class after the last token.

    Args:
        audio_tower (`PreTrainedModel`): trained in place. Clips of up to 30 seconds.
        num_tokens (`int`): of the tokeniser.
    """

    def __init__(self, audio_tower, num_tokens: int):
        super().__init__()
        self.audio_tower = audio_tower
        self.head = nn.Linear(audio_tower.config.hidden_size, num_tokens + 1)

    @property
    def blank(self) -> int:
        return self.head.out_features - 1

    def forward(self, input_features, input_features_mask, token_ids, num_tokens) -> dict[str, torch.Tensor]:
        """Return the CTC loss of N clips.

        Args:
            input_features, input_features_mask: N clips, as the encoder takes them.
            token_ids (sum of num_tokens,): the transcripts' tokens, one after another.
            num_tokens (N,): of each transcript.
        """
        frames = encode_speech(self.audio_tower, input_features, input_features_mask)
        log_probs = self.head(frames.last_hidden_state).float().log_softmax(-1).transpose(0, 1)
        num_frames = frames.frame_mask.sum(1)
        loss = nn.functional.ctc_loss(
            log_probs, token_ids, num_frames, num_tokens, blank=self.blank, zero_infinity=True
        )
        return {"loss": loss}

    def read_off(self, input_features, input_features_mask) -> list[list[int]]:
        """Return the token ids of the likeliest path of each clip."""
        frames = encode_speech(self.audio_tower, input_features, input_features_mask)
        paths = self.head(frames.last_hidden_state).argmax(-1)
        merged = [path[is_frame].unique_consecutive() for path, is_frame in zip(paths, frames.frame_mask)]
        return [path[path != self.blank].tolist() for path in merged]


class CtcTrainer(ExactOrder):
    """Batches as in a distillation, the recogniser's own loss."""


def train_ctc(distillation_trainer, model_options: ModelOptions, args: Arguments) -> CtcRecognizer:
    """Train CTC on the encoder, clips, batches, steps and learning rates of a distillation."""
    model, processor = distillation_trainer.model, distillation_trainer.processing_class
    recognizer = CtcRecognizer(model.audio_tower, len(processor.tokenizer)).to(args.device)

    def collate(rows):
        batch = distillation_trainer.data_collator(rows)
        return {
            "input_features": batch["input_features"],
            "input_features_mask": batch["input_features_mask"],
            "token_ids": batch["teacher_input_ids"][batch["teacher_is_content"]],
            "num_tokens": batch["num_speech_tokens"],
        }

    trainer = CtcTrainer(
        model=recognizer,
        args=args,
        train_dataset=distillation_trainer.train_dataset,
        data_collator=collate,
        optimizer_cls_and_kwargs=optimizer_with_groups(recognizer, args, encoder_learning_rate(model_options, args)),
    )
    trainer.train()
    return recognizer.eval()


@torch.inference_mode()
def transcribe(read_clips, processor, rows: list[dict], device, batch_size: int = 64) -> list[str]:
    """Return transcripts of the rows' clips; `read_clips` turns features and their mask into token ids."""
    transcripts = []
    for start in tqdm(range(0, len(rows), batch_size), desc="recognising", mininterval=1):
        features = processor.extract_features([row["audio"] for row in rows[start : start + batch_size]])
        tensors = [torch.as_tensor(features[name]).to(device) for name in ("input_features", "input_features_mask")]
        transcripts += processor.tokenizer.batch_decode(read_clips(*tensors), skip_special_tokens=True)
    return [" ".join(text.split()) for text in transcripts]


def main():
    parser = HfArgumentParser(
        (RecognizerOptions, ModelOptions, DataOptions, Arguments), description=__doc__, formatter_class=HelpFormatter
    )
    options, model_options, data_options, args = parser.parse_args_into_dataclasses()
    if not data_options.eval_manifest:
        raise ValueError("A cascade needs --eval_manifest: the rows whose clips are recognised.")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    set_seed(args.seed)
    trainer, _, eval_rows = make_trainer(model_options, with_tiny_world(data_options, args), args)
    start = time.time()
    if options.recognizer == "ctc":
        read_clips = train_ctc(trainer, model_options, args).read_off
    else:
        trainer.train()
        read_clips = partial(read_off, trainer.model.eval())
    results = {"train_seconds": round(time.time() - start, 1)}
    trainer.save_model()
    heard = transcribe(read_clips, trainer.processing_class, eval_rows, args.device)
    folder = Path(args.output_dir)
    with (folder / "heard.jsonl").open("w") as file:
        for row, text in zip(eval_rows, heard):
            audio = os.path.relpath(row["audio"], folder.absolute())
            own = {name: value for name, value in row.items() if name != "response" and value is not None}
            file.write(json.dumps({**own, "audio": audio, "said": row["text"], "text": text or NOTHING}) + "\n")
    results["exact_transcripts"] = sum(text == row["text"] for row, text in zip(eval_rows, heard)) / len(eval_rows)
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
