"""Answers from a server of OpenAI's protocol instead of a model in this process.

Clips go there as float WAV files of the encoder's rate, so that the server hears the very samples that a model here
would. Leaves out: everything that needs the model's numbers, such as the alignment scores.
"""

import base64
import io
import os
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import soundfile

from processing.audio_loading import load_audio

TIMEOUT_S = 600
NUM_AT_ONCE = 16


class ServedAnswers:
    """Asks the server's only model for greedy answers. A key in `OPENAI_API_KEY` is passed on.

    Args:
        url (`str`): up to `/v1`.
        sampling_rate (`int`): of the speech encoder, Hz.
        chat_template_kwargs (`dict`, *optional*): options of the chat template, for all answers.

    Raises:
        ValueError: the server is not there, or serves no model.
    """

    def __init__(self, url: str, sampling_rate: int, chat_template_kwargs: dict | None = None):
        key = os.environ.get("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.url, self.sampling_rate = url.rstrip("/"), sampling_rate
        self.client = httpx.Client(headers=headers, timeout=TIMEOUT_S)
        self.options = {"temperature": 0} | (
            {"chat_template_kwargs": chat_template_kwargs} if chat_template_kwargs else {}
        )
        models = self._ask("GET", "models")["data"]
        if not models:
            raise ValueError(f"The server at {self.url} serves no model.")
        self.options["model"] = models[0]["id"]

    def __call__(self, conversations: list[list[dict]], max_new_tokens: int) -> list[str]:
        """Return the answers to conversations, in order.

        Raises:
            ValueError: the server refuses one, and says why.
        """
        with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
            return list(pool.map(lambda conversation: self._answer(conversation, max_new_tokens), conversations))

    def _answer(self, conversation: list[dict], max_new_tokens: int) -> str:
        messages = [
            {**message, "content": [self._part(block) for block in message["content"]]} for message in conversation
        ]
        body = {**self.options, "messages": messages, "max_tokens": max_new_tokens}
        return self._ask("POST", "chat/completions", json=body)["choices"][0]["message"]["content"].strip()

    def _part(self, block: dict) -> dict:
        if block["type"] != "audio":
            return block
        file = io.BytesIO()
        waveform = load_audio(block["audio"], self.sampling_rate)
        soundfile.write(file, waveform, self.sampling_rate, format="WAV", subtype="FLOAT")
        data = base64.b64encode(file.getvalue()).decode()
        return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}

    def _ask(self, method: str, path: str, **body) -> dict:
        while True:
            try:
                response = self.client.request(method, f"{self.url}/{path}", **body)
            except httpx.HTTPError as error:
                raise ValueError(
                    f"The server at {self.url} does not answer ({type(error).__name__}: {error}). Start it, or correct "
                    "--engine_url, which ends in /v1."
                ) from error
            if response.status_code != 429:
                break
            time.sleep(float(response.headers.get("Retry-After", 1)))  # its queue is full
        if response.status_code != 200:
            raise ValueError(
                f"The server at {self.url} answered with status {response.status_code}: {response.text:.500}"
            )
        return response.json()
