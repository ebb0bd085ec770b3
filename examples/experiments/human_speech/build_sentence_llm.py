"""Train a text LLM that repeats sentences word for word, whatever they say, and save it.

Its small vocabulary has pieces of the words of the training sentences. Leaves out: speech.

    python -m examples.experiments.human_speech.build_sentence_llm --manifest outputs/sentences/train.jsonl \\
        --held_out_manifest outputs/sentences/validation.jsonl --output_dir outputs/sentence_llm
"""

import random
from pathlib import Path

from processing.manifests import read_objects

from ...tiny_world.chat_tokenizer import train_tokenizer
from .llm import build_llm, llm_parser
from .sentences import INSTRUCTIONS

NUM_PIECES = 512
MAX_WORDS = 48
MAX_NEW_TOKENS = 200


def draw_dialogues(num, words, rng):
    """Return `num` lists of chat messages that ask to repeat words.

    Half of them have the words in the order of the corpus, across the ends of sentences, and half in random order, so
    that knowing the corpus is not enough.
    """
    dialogues = []
    for _ in range(num):
        length = rng.randint(1, min(MAX_WORDS, len(words)))
        if rng.random() < 0.5:
            first = rng.randint(0, len(words) - length)
            said = words[first : first + length]
        else:
            said = rng.choices(words, k=length)
        text = " ".join(said)
        dialogues.append(
            [
                {"role": "user", "content": f"{rng.choice(INSTRUCTIONS)}\n{text}"},
                {"role": "assistant", "content": text},
            ]
        )
    return dialogues


def read_texts(manifest):
    return [row["text"] for _, row in read_objects(manifest)]


def main():
    parser = llm_parser(__doc__.split("\n")[0], num_steps=3000)
    parser.add_argument("--manifest", type=Path, required=True, help="of the training sentences")
    parser.add_argument("--held_out_manifest", type=Path, required=True, help="of sentences to score on")
    args = parser.parse_args()
    rng, texts = random.Random(args.seed), read_texts(args.manifest)
    words = " ".join(texts).split()
    prompts = {"repeat": [(f"{INSTRUCTIONS[0]}\n{text}", text) for text in read_texts(args.held_out_manifest)]}
    build_llm(
        args,
        train_tokenizer([*INSTRUCTIONS * 40, *texts], NUM_PIECES),
        lambda num: draw_dialogues(num, words, rng),
        prompts,
        rng,
        batch_size=32,
        max_new_tokens=MAX_NEW_TOKENS,
    )


if __name__ == "__main__":
    main()
