"""Build `llm/`, the text LLM of the tiny world: train it, score it on held-out sentences, save it.

Follows the Qwen2 architecture; training takes about 25 minutes on one core. Leaves out: speech, and the tokenizer
(`chat_tokenizer.py`).

    python -m examples.tiny_world.build_llm
"""

import argparse
import random
from itertools import chain
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen2Config

from .chat_tokenizer import SYSTEM_MESSAGES, build_tokenizer, check_tokens_are_the_same_alone_and_in_prompts
from .world import KINDS, questions, sentences

LLM_DIR = Path(__file__).parent / "llm"


def build_model(tokenizer):
    """Return a Qwen2 of 0.9 M random parameters that pads and stops as `tokenizer` does and decodes greedily."""
    model = AutoModelForCausalLM.from_config(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=48,
    )
    return model


def draw_dialogue(sentence, rng):
    """Draw one to three questions about a sentence, of different kinds in any order; the first turn quotes it.

    Returns:
        list of chat messages, for one dialogue in eight with a system message first.
    """
    messages = []
    if rng.random() < 1 / 8:
        messages.append({"role": "system", "content": rng.choice(SYSTEM_MESSAGES)})
    kinds = list(sentence.answers)
    rng.shuffle(kinds)
    for turn, kind in enumerate(kinds[: rng.choice([1, 2, 3, 3])]):
        question = rng.choice([question for question in questions(sentence) if question.kind == kind])
        content = question.instruction if turn else f"{question.instruction}\n{sentence.text}"
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": question.answer})
    return messages


def batches(tokenizer, draw_dialogues, rng, batch_size=16):
    """Yield batches of dialogues of similar length without end.

    Args:
        draw_dialogues: returns as many lists of chat messages as it is asked for.

    Yields:
        `input_ids` (B, T) and `is_answer` (B, T), True at the answers' tokens and the <|end|> after each.
    """
    user_id, assistant_id = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])
    while True:
        texts = tokenizer.apply_chat_template(draw_dialogues(16 * batch_size), tokenize=False)
        rows = sorted(tokenizer(texts, add_special_tokens=False)["input_ids"], key=len)
        groups = [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]
        rng.shuffle(groups)
        for group in groups:
            input_ids = pad_sequence(
                [torch.tensor(row) for row in group], batch_first=True, padding_value=tokenizer.pad_token_id
            )
            num_assistants = (input_ids == assistant_id).cumsum(1)
            in_answer = (num_assistants > 0) & (num_assistants == (input_ids == user_id).cumsum(1))
            yield input_ids, in_answer & (input_ids != assistant_id) & (input_ids != tokenizer.pad_token_id)


def batches_about(tokenizer, corpus, seed):
    """Yield batches of dialogues about the sentences of a corpus."""
    rng = random.Random(seed)
    corpus = corpus + [sentence for sentence in corpus if sentence.kind in ("digits", "sum")]  # the hardest ones twice
    return batches(tokenizer, lambda num: [draw_dialogue(sentence, rng) for sentence in rng.sample(corpus, num)], rng)


def train(model, batches, num_steps, rate=1.0, prompt_weight=0.2):
    """Train next-token prediction on every token; the prompt's tokens, most of them unpredictable, weigh less.

    Muon for the matrices inside the layers and AdamW for the rest; small batches, many steps; `rate` scales both
    learning rates, which fall to zero over the second half. The model is left in evaluation mode.
    """
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    others = [*model.model.embed_tokens.parameters(), *model.model.norm.parameters()]
    others += [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 1]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02 * rate, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=3e-3 * rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / 100, max(0.0, min(1.0, 2 * (num_steps - step) / num_steps)))
        )
        for optimizer in optimizers
    ]
    model.train()
    progress = tqdm(range(num_steps), desc="training the LLM", mininterval=5)
    mean_answer_loss = None
    for _, (input_ids, is_answer) in zip(progress, batches):
        logits = model(input_ids=input_ids).logits[:, :-1]
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), input_ids[:, 1:], reduction="none")
        is_answer = is_answer[:, 1:]
        weights = torch.where(is_answer, 1.0, prompt_weight) * (input_ids[:, 1:] != model.config.pad_token_id)
        ((losses * weights).sum() / weights.sum()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        answer_loss = losses[is_answer].mean().item()
        mean_answer_loss = answer_loss if mean_answer_loss is None else 0.98 * mean_answer_loss + 0.02 * answer_loss
        progress.set_postfix(answer_loss=f"{mean_answer_loss:.4f}", refresh=False)
    model.eval()


def score_on_held_out(model, tokenizer, num_sentences=1500, max_per_kind=200, seed=1):
    """Score single-turn answers about held-out sentences; see [`score`]."""
    prompts: dict[str, list[tuple[str, str]]] = {kind: [] for kind in KINDS}
    rng = random.Random(seed)
    for sentence in sentences("test", num_sentences, seed):
        for question in questions(sentence):
            prompts[question.kind].append((f"{question.instruction}\n{sentence.text}", question.answer))
    return score(
        model, tokenizer, {kind: rng.sample(asked, min(max_per_kind, len(asked))) for kind, asked in prompts.items()}
    )


@torch.no_grad()
def score(model, tokenizer, prompts):
    """Return the exact-match share of greedy answers.

    Args:
        prompts: kind -> pairs of a user's turn and the right answer.

    Returns:
        dict: kind -> (share of correct answers, number of prompts).
    """
    table = {}
    for kind, asked in tqdm(prompts.items(), desc="scoring the LLM"):
        texts = tokenizer.apply_chat_template(
            [[{"role": "user", "content": content}] for content, _ in asked], tokenize=False, add_generation_prompt=True
        )
        inputs = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
        output = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        answers = tokenizer.batch_decode(output, skip_special_tokens=True)
        num_right = sum(answer == right for answer, (_, right) in zip(answers, asked, strict=True))
        table[kind] = (num_right / len(asked), len(asked))
    return table


def print_scores(table):
    for kind, (share, num_prompts) in table.items():
        print(f"{kind:10} {share:.3f} of {num_prompts} held-out prompts")
    mean_share = sum(share * num for share, num in table.values()) / sum(num for _, num in table.values())
    print(f"{'all':10} {mean_share:.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", type=Path, default=LLM_DIR)
    parser.add_argument("--num_steps", type=int, default=5000, help="of each of the two rounds")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # for a model this small, waiting for more threads costs more than they save
    tokenizer = build_tokenizer(seed=args.seed)
    check_tokens_are_the_same_alone_and_in_prompts(tokenizer)
    model = build_model(tokenizer)
    corpus = sentences("train", 15_000, args.seed)
    train(model, batches_about(tokenizer, corpus, args.seed), args.num_steps)
    # A small draw holds a fuller share of the few short digit strings than a large one without repetition.
    corpus = [*chain(*(sentences("train", 500, args.seed + 1 + draw) for draw in range(30)))]
    train(model, batches_about(tokenizer, corpus, args.seed + 1), args.num_steps, rate=0.5)
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)

    model = AutoModelForCausalLM.from_pretrained(args.output_dir)
    tokenizer = AutoTokenizer.from_pretrained(args.output_dir)
    print_scores(score_on_held_out(model, tokenizer))


if __name__ == "__main__":
    main()
