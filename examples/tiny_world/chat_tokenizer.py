"""The tokenizer of the tiny LLMs: a small byte-level BPE with a ChatML-like template.

A token never extends across a line end or a special token, so a sentence has the same tokens alone and in a prompt.
Leaves out: characters outside ASCII, which become `<|unk|>`.
"""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .world import INSTRUCTIONS, questions, sentences

SYSTEM_MESSAGES = ("You are a helpful assistant.", "Answer with few words.")
SPECIAL_TOKENS = ("<|pad|>", "<|unk|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"
)


def build_tokenizer(num_pieces=384, seed=0):
    """Train the tiny world's tokenizer, in which content words take one to five pieces."""
    corpus = [*SYSTEM_MESSAGES, *[text for wordings in INSTRUCTIONS.values() for text in wordings]] * 40
    for sentence in sentences("train", 6000, seed):
        corpus += [sentence.text, sentence.answers.get("spanish", "")]
    return train_tokenizer(corpus, num_pieces)


def train_tokenizer(corpus, num_pieces):
    """Train a byte-level BPE on lines of text.

    Returns:
        `PreTrainedTokenizerFast` of `num_pieces` tokens; a character outside ASCII becomes `<|unk|>`.
    """
    bpe = Tokenizer(models.BPE(unk_token="<|unk|>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    printable_ascii = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]  # the last two are space and line end
    bpe.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=num_pieces,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=printable_ascii,
            show_progress=False,
        ),
    )
    return for_chats(bpe)


def for_chats(bpe):
    """Return `bpe` as a tokenizer of transformers, with a chat template of `SPECIAL_TOKENS`."""
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def check_tokens_are_the_same_alone_and_in_prompts(tokenizer, num_sentences=3000):
    """Raise `RuntimeError` if a sentence's tokens in a prompt are not exactly its tokens alone."""

    def tokens(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    for split in ("train", "test"):
        for sentence in sentences(split, num_sentences // 2, seed=2):
            for question in questions(sentence):
                content = f"{question.instruction}\n{sentence.text}"
                messages = [{"role": "user", "content": content}]
                prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
                before, after = prompt.split(sentence.text)
                if tokens(before) + tokens(sentence.text) + tokens(after) != tokens(prompt):
                    raise RuntimeError(
                        f"A token reaches over the border of the sentence in {prompt!r}. Check the pre-tokenizer."
                    )
