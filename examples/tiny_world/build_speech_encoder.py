"""Build `speech_encoder/`, the speech encoder of the tiny world: clips, CTC training, score on held-out speech, files.

Follows CTC (Graves et al. 2006) over the LLM's tokens with light SpecAugment (arXiv 1904.08779), in about ten minutes
on one core. Leaves out: the CTC head, which is discarded; the rest stands in for a pretrained Whisper encoder.

    python -m examples.tiny_world.build_speech_encoder
"""

import argparse
import random
from pathlib import Path

import soundfile
import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoTokenizer, WhisperConfig, WhisperFeatureExtractor

from modeling_blsp_kd.speech_encoder import TrueLengthWhisperEncoder

from .build_llm import LLM_DIR
from .espeak import SAMPLING_RATE
from .speech import HELD_OUT_VOICES, TRAIN_VOICES, make_clips
from .world import sentences

SPEECH_ENCODER_DIR = Path(__file__).parent / "speech_encoder"


def build_encoder():
    """Return a Whisper encoder of 0.7 M random parameters; 50 mel frames a second make 25 frames, for up to 30 s."""
    unused_decoder = {
        "decoder_layers": 1,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 384,
        "max_target_positions": 1,
        "vocab_size": 1,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "decoder_start_token_id": 0,
    }
    return TrueLengthWhisperEncoder(
        WhisperConfig(
            d_model=128,
            encoder_layers=3,
            encoder_attention_heads=4,
            encoder_ffn_dim=384,
            num_mel_bins=80,
            max_source_positions=750,
            dropout=0.0,
            begin_suppress_tokens=None,
            **unused_decoder,
        )
    )


def load_examples(texts, voices, seed, cache_dir, feature_extractor, tokenizer):
    """Synthesise texts and return pairs of (log-mel of shape (num_mel_frames, 80), token ids).

    Features are taken one clip at a time, unpadded: Whisper scales them by the clip's own loudest value.
    """
    examples = []
    clips = make_clips(texts, voices, seed, cache_dir)
    for text, clip in tqdm(list(zip(texts, clips, strict=True)), desc="extracting features", mininterval=1):
        samples, _ = soundfile.read(clip, dtype="float32")
        features = feature_extractor(samples, sampling_rate=SAMPLING_RATE, padding=False, truncation=False)
        mel = torch.as_tensor(features["input_features"][0]).T.half()
        examples.append((mel, torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])))
    return examples


def collate(examples):
    """Zero-pad a batch.

    Returns:
        `input_features` (B, 80, T), `input_features_mask` bool (B, T), `token_ids` (B, U), `num_tokens` (B,).
    """
    mels, token_ids = zip(*examples, strict=True)
    num_mel_frames = torch.tensor([len(mel) for mel in mels])
    input_features = nn.utils.rnn.pad_sequence(mels, batch_first=True).float().transpose(1, 2)
    input_features_mask = torch.arange(input_features.shape[-1]) < num_mel_frames[:, None]
    num_tokens = torch.tensor([len(ids) for ids in token_ids])
    return input_features, input_features_mask, nn.utils.rnn.pad_sequence(token_ids, batch_first=True), num_tokens


def mask_some(input_features, rng):
    """Zero two bands of up to 8 mel bins and two of up to 6 frames, the same for a whole batch (light SpecAugment)."""
    input_features = input_features.clone()
    _, num_bins, num_frames = input_features.shape
    for _ in range(2):
        width = rng.randint(0, 8)
        start = rng.randint(0, num_bins - width)
        input_features[:, start : start + width] = 0
        width = rng.randint(0, 6)
        start = rng.randint(0, num_frames - width)
        input_features[:, :, start : start + width] = 0
    return input_features


def batches(examples, batch_size, rng):
    """Yield random batches of clips of similar length without end."""
    while True:
        order = rng.sample(range(len(examples)), len(examples))
        for start in range(0, len(order), 16 * batch_size):
            pool = sorted(order[start : start + 16 * batch_size], key=lambda index: len(examples[index][0]))
            groups = [pool[first : first + batch_size] for first in range(0, len(pool), batch_size)]
            rng.shuffle(groups)
            yield from ([examples[index] for index in group] for group in groups)


def train(encoder, head, examples, num_steps, batch_size=32, learning_rate=2e-3, seed=0):
    """Train with CTC; the blank is the class after the last token. Both modules are left in evaluation mode."""
    rng = random.Random(seed)
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 200, max(0.0, min(1.0, 2 * (num_steps - step) / num_steps)))
    )
    encoder.train()
    progress = tqdm(range(num_steps), desc="training the speech encoder", mininterval=5)
    for _, batch in zip(progress, batches(examples, batch_size, rng)):
        input_features, input_features_mask, token_ids, num_tokens = collate(batch)
        frames = encoder(mask_some(input_features, rng), input_features_mask)
        log_probs = head(frames.last_hidden_state).float().log_softmax(-1)
        loss = nn.functional.ctc_loss(
            log_probs.transpose(0, 1), token_ids, frames.frame_mask.sum(1), num_tokens, blank=head.out_features - 1
        )
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    encoder.eval()


@torch.no_grad()
def score(encoder, head, examples, batch_size=32):
    """Return the share of clips whose best CTC path spells exactly the transcript's tokens."""
    num_right = 0
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        input_features, input_features_mask, _, _ = collate(batch)
        frames = encoder(input_features, input_features_mask)
        best = head(frames.last_hidden_state).argmax(-1)
        for path, is_frame, (_, token_ids) in zip(best, frames.frame_mask, batch, strict=True):
            spelt = path[is_frame].unique_consecutive()
            num_right += spelt[spelt != head.out_features - 1].tolist() == token_ids.tolist()
    return num_right / len(examples)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", type=Path, default=SPEECH_ENCODER_DIR)
    parser.add_argument(
        "--cache_dir", type=Path, default=Path("outputs/tiny_world_clips"), help="folder of the synthesised clips"
    )
    parser.add_argument("--num_clips", type=int, default=6000)
    parser.add_argument("--num_steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # for a model this small, waiting for more threads costs more than they save
    tokenizer = AutoTokenizer.from_pretrained(LLM_DIR)
    feature_extractor = WhisperFeatureExtractor(hop_length=320)

    def examples(split, num, voices):
        texts = [sentence.text for sentence in sentences(split, num, args.seed + 1)]
        speakers = [voices[index % len(voices)] for index in range(num)]
        return load_examples(texts, speakers, args.seed + 1, args.cache_dir, feature_extractor, tokenizer)

    encoder = build_encoder()
    head = nn.Linear(encoder.config.d_model, len(tokenizer) + 1)
    train(encoder, head, examples("train", args.num_clips, TRAIN_VOICES), args.num_steps, seed=args.seed)
    encoder.save_pretrained(args.output_dir)
    feature_extractor.save_pretrained(args.output_dir)

    encoder = TrueLengthWhisperEncoder.from_pretrained(args.output_dir).eval()
    for name, voices in (("seen", TRAIN_VOICES), ("held-out", HELD_OUT_VOICES)):
        share = score(encoder, head, examples("test", 600, voices))
        print(f"held-out sentences of {name} voices: {share:.3f} of 600 exact")


if __name__ == "__main__":
    main()
