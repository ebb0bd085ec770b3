"""Train a text LLM for strings of digits from nothing, score it on held-out strings, and save it.

The LLM has one token per word, so a spoken string has as many tokens as digits.
Leaves out: speech, and dialogues of several turns.

    python -m examples.experiments.human_speech.build_digit_llm --output_dir outputs/digit_llm_1
    python -m examples.experiments.human_speech.build_digit_llm --output_dir outputs/digit_llm --seed 1 \\
        --start_from outputs/digit_llm_1
"""

import random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ...tiny_world.chat_tokenizer import SPECIAL_TOKENS, for_chats
from .digits import DIGITS, INSTRUCTIONS, KINDS, SPLITS, draw_question, draw_string, kinds_of, number_in_words
from .llm import build_llm, llm_parser

# Real text is not uniform. After a digit the LLM finds the next one likelier, so input KL distinguishes digits.
RUN_SHARE = 0.3
# Kinds that take long to learn are asked more often.
WEIGHTS = {"sort": 2, "sum": 6, "occurrences": 4}


def build_tokenizer():
    """Train a byte-level BPE (Qwen2's kind) that has merged every word of the questions and answers."""
    bpe = Tokenizer(models.BPE(unk_token="<|unk|>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    instructions = [text.format(digit) for texts in INSTRUCTIONS.values() for text in texts for digit in DIGITS]
    numbers = [number_in_words(number) for number in range(100)]
    bpe.train_from_iterator(
        [*instructions, *numbers, *(f" {digit}" for digit in DIGITS)],
        trainers.BpeTrainer(special_tokens=list(SPECIAL_TOKENS), initial_alphabet=["Ġ", "Ċ"], show_progress=False),
    )
    return for_chats(bpe)


def draw_dialogues(num, rng):
    """Return `num` lists of chat messages: a question about a string of the training split, and its answer."""
    dialogues = []
    for _ in range(num):
        words = draw_string("train", rng, min_digits=1, run_share=RUN_SHARE)
        kinds = kinds_of(words)
        (kind,) = rng.choices(kinds, [WEIGHTS.get(kind, 1) for kind in kinds])
        question = draw_question(words, kind, rng)
        dialogues.append(
            [
                {"role": "user", "content": f"{question.instruction}\n{' '.join(words)}"},
                {"role": "assistant", "content": question.answer},
            ]
        )
    return dialogues


def held_out_prompts(split, num_per_kind, rng):
    """Return kind -> pairs of a user's turn about a uniformly drawn string of a split, and the right answer."""
    prompts: dict[str, list[tuple[str, str]]] = {kind: [] for kind in KINDS}
    while any(len(asked) < num_per_kind for asked in prompts.values()):
        words = draw_string(split, rng)
        for kind in kinds_of(words):
            if len(prompts[kind]) < num_per_kind:
                question = draw_question(words, kind, rng)
                prompts[kind].append((f"{question.instruction}\n{' '.join(words)}", question.answer))
    return prompts


def main():
    parser = llm_parser(__doc__.split("\n")[0], num_steps=6000)
    parser.add_argument("--split", choices=SPLITS[1:], default="test", help="strings to score on")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    prompts = held_out_prompts(args.split, 200, random.Random(args.seed + 1))
    build_llm(args, build_tokenizer(), lambda num: draw_dialogues(num, rng), prompts, rng)


if __name__ == "__main__":
    main()
