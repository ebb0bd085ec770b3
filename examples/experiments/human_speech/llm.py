"""Train one of the small text LLMs of this folder from nothing, save it, and score it as users load it.

It is the tiny world's Qwen2 of 0.9 M parameters, trained in the same way. Leaves out: the dialogues
(`build_digit_llm.py`, `build_sentence_llm.py`).
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ...tiny_world.build_llm import batches, build_model, print_scores, score, train


def llm_parser(description: str, num_steps: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument(
        "--start_from", type=Path, help="folder of an earlier round; goes on at half the learning rates"
    )
    parser.add_argument("--num_steps", type=int, default=num_steps, help="training steps of one batch")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def build_llm(args, tokenizer, draw_dialogues, prompts, rng, batch_size=64, max_new_tokens=48):
    """Build an LLM according to `args` of [`llm_parser`], and save it to `args.output_dir` with its `scores.json`.

    Args:
        draw_dialogues: returns as many lists of chat messages as it is asked for.
        prompts: kind -> pairs of a user's turn and the right answer, to score it on.
        rng: of `draw_dialogues`, and of the order of batches.
    """
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # for a model this small, waiting for more threads costs more than they save
    model = AutoModelForCausalLM.from_pretrained(args.start_from) if args.start_from else build_model(tokenizer)
    model.generation_config.max_new_tokens = max_new_tokens
    dialogues = batches(tokenizer, draw_dialogues, rng, batch_size)
    train(model, dialogues, args.num_steps, rate=0.5 if args.start_from else 1.0)
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    model = AutoModelForCausalLM.from_pretrained(args.output_dir)
    tokenizer = AutoTokenizer.from_pretrained(args.output_dir)
    table = score(model, tokenizer, prompts)
    (args.output_dir / "scores.json").write_text(json.dumps(table, indent=2) + "\n")
    print_scores(table)
