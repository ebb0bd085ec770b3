"""Serve a model: speech encoder and adapter here, and an engine for its LLM elsewhere.

    python -m processing.serving MODEL --engine http://localhost:8000/v1

MODEL is a folder or a Hub id. docs/serving.md has the options in use, and docs/serving_engine.md starts the engine.
"""

import argparse
import asyncio
import sys

import torch
from pydantic import ValidationError
from transformers.utils import logging

from modeling_blsp_kd.devices import fast_dtype
from processing import BlspKdProcessor

from .app import serve
from .clip_encoder import ClipEncoder
from .engine import Engine
from .engine_check import EngineFacts, MisfitError, check_engine
from .errors import ServingError
from .front import Front
from .metrics import Metrics
from .model_without_llm import load_without_llm
from .settings import Settings, add_options

logger = logging.get_logger("processing.serving")


def main():
    parser = argparse.ArgumentParser(
        prog="python -m processing.serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id of a BLSP-KD model")
    add_options(parser)
    given = vars(parser.parse_args())
    name = given.pop("model")
    try:
        settings = Settings(**given)
    except ValidationError as error:
        first = error.errors()[0]
        parser.error(f"--{'.'.join(map(str, first['loc']))}: {first['msg']}, got {first['input']!r}.")
    try:
        serve(make_front(name, settings))
    except (MisfitError, ServingError) as error:
        sys.exit(f"error: {error}")


def make_front(name: str, settings: Settings) -> Front:
    """Load a model without its LLM, and check that its engine fits.

    Raises:
        MisfitError, EngineUnreachable: it does not.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = torch.device(settings.device or accelerator or "cpu")
    model, has_plora = load_without_llm(name, fast_dtype(settings.dtype, device), device)
    processor = BlspKdProcessor.from_pretrained(name)
    facts = asyncio.run(_check(settings, model, processor, has_plora))
    metrics = Metrics()
    return Front(
        name=settings.served_name or name,
        settings=settings,
        processor=processor,
        encoder=ClipEncoder(
            model,
            processor,
            metrics,
            max_frames=settings.max_frames,
            max_waiting=settings.max_waiting,
            cache_bytes=settings.cache_bytes,
            num_decoders=settings.num_decoders,
        ),
        engine=_engine(settings, metrics),
        facts=facts,
        metrics=metrics,
    )


def _engine(settings: Settings, metrics: Metrics) -> Engine:
    return Engine(str(settings.engine), metrics, settings.engine_api_key, settings.engine_timeout_s)


async def _check(settings: Settings, model, processor, has_plora: bool) -> EngineFacts:
    engine = _engine(settings, Metrics())
    logger.warning(f"Waiting until the engine at {engine.url} is ready, at most {settings.engine_wait_s:g} s.")
    try:
        await engine.wait_until_healthy(settings.engine_wait_s)
        return await check_engine(engine, model, processor, has_plora, settings.engine_model, settings.engine_adapter)
    finally:
        await engine.close()


if __name__ == "__main__":
    main()
