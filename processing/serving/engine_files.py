"""Write what vLLM needs of a model, and print the command that starts it.

    python -m processing.serving.engine_files outputs/mine engine --text_model Qwen/Qwen2.5-0.5B-Instruct

The folder gets the chat template, partial LoRA as a PEFT adapter with the mark that the plugin looks for, and the LLM
if `--text_model` does not name it. Leaves out: encoder and adapter, which stay in the front.
"""

import json
import shlex
import sys
from argparse import ArgumentParser
from pathlib import Path

from modeling_blsp_kd import BlspKdForCausalLM
from processing.processing_blsp_kd import BlspKdProcessor

from .vllm_plugin import MARK

LORA_NAME = "speech"
# vLLM reserves room for the ranks that it knows.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def write_engine_files(
    model: BlspKdForCausalLM, processor: BlspKdProcessor, folder: str | Path, text_model: str | None = None
) -> list[str]:
    """Write the engine's files, and return the command that starts vLLM with them.

    Args:
        model ([`BlspKdForCausalLM`]): partial LoRA is taken off its LLM if the LLM is written.
        folder (`str` or `Path`): made if missing.
        text_model (`str`, *optional*): Hub id or folder of the unchanged LLM; if omitted, the LLM is written.

    Raises:
        ValueError: partial LoRA has a higher rank than vLLM takes.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    template = processor.chat_template
    template = template.get("default", next(iter(template.values()))) if isinstance(template, dict) else template
    (folder / "chat_template.jinja").write_text(template)
    lora = []
    if model.plora is not None:
        rank = model.plora.lora_config.r
        if rank > RANKS[-1]:
            raise ValueError(f"vLLM takes LoRAs up to rank {RANKS[-1]}, but this model's partial LoRA has rank {rank}.")
        model.plora.save_pretrained(folder / LORA_NAME, text_model)
        (folder / LORA_NAME / MARK).write_text(json.dumps({"acts_at": "positions given as prompt embeddings"}) + "\n")
        max_rank = next(known for known in RANKS if known >= rank)
        # One slot more than LoRAs, see the plugin.
        lora = ["--enable-lora", "--max-loras", "2", "--max-lora-rank", str(max_rank)]
        lora += ["--lora-modules", f"{LORA_NAME}={folder / LORA_NAME}"]
    if text_model is None:
        if model.plora is not None:
            model.plora.take_off(model.language_model)
        model.language_model.generation_config = model.generation_config
        model.language_model.save_pretrained(folder / "llm")
        processor.tokenizer.save_pretrained(folder / "llm")
        if processor.audio_token_id >= model.config.get_text_config().vocab_size:
            _remove_token(processor.audio_token, folder / "llm")
    command = ["vllm", "serve", text_model or str(folder / "llm"), "--served-model-name", "llm"]
    command += ["--enable-prompt-embeds", "--chat-template", str(folder / "chat_template.jinja")]
    return command + lora


def _remove_token(token: str, folder: Path):
    """Remove a token that was added to a saved tokenizer.

    vLLM adds one of its own, and gives it to the penalties on repetitions. These have room for one token more than the
    LLM's, so that a second one would end the engine.
    """
    for name, field in (("tokenizer.json", "added_tokens"), ("tokenizer_config.json", "extra_special_tokens")):
        contents = json.loads((folder / name).read_text())
        if isinstance(tokens := contents.get(field), list):  # some tokenizers have none, or a dict of other tokens
            contents[field] = [
                each for each in tokens if (each["content"] if isinstance(each, dict) else each) != token
            ]
            (folder / name).write_text(json.dumps(contents, indent=2, ensure_ascii=False) + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m processing.serving.engine_files", description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", help="folder or Hub id of a BLSP-KD model")
    parser.add_argument("output", help="folder for the engine's files")
    parser.add_argument("--text_model", help="Hub id or folder of its LLM, unchanged; omitted, the LLM is written, too")
    options = parser.parse_args(arguments)
    model = BlspKdForCausalLM.from_pretrained(options.model, dtype="auto")
    processor = BlspKdProcessor.from_pretrained(options.model)
    command = write_engine_files(model, processor, options.output, options.text_model)
    sys.stdout.write(shlex.join(command) + "\n")


if __name__ == "__main__":
    main()
