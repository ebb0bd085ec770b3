"""Start an untrained CFormer near the right number of tokens and the right size of vectors.

Untrained alphas lie around 0.5 per frame: 25 tokens a second, where speech has three to five. Until training
has corrected this, the quantity loss and its gradient outweigh all else. Untrained speech tokens also differ in size
from the LLM's embeddings. One number corrects each, and a few batches suffice to find it. Other weights stay random.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch.utils.data import BatchSampler

from processing import BlspKdDataCollator
from processing.training_rows.data_sets import RowsInMemory, StreamedRows

from ..frozen import frozen
from ..modeling_blsp_kd import BlspKdForCausalLM
from ..speech_windows import is_within

NUM_ROWS, BATCH_SIZE = 64, 8


@dataclass(frozen=True)
class Calibration:
    """The two numbers that [`calibrate_adapter`] found.

    Args:
        alpha_logit_shift (`float`): added to the logit of each alpha.
        speech_token_scale (`float`): factor on the adapter's output.
    """

    alpha_logit_shift: float
    speech_token_scale: float


@torch.no_grad()
def calibrate_adapter(model: BlspKdForCausalLM, batches: Iterable[dict[str, torch.Tensor]]) -> Calibration:
    """Shift the alphas and scale the output of an untrained CFormer, in place.

    Afterwards the predicted token counts of these batches add up to their true ones, and the root mean square of their
    speech tokens equals that of the LLM's embeddings of their transcripts. Only existing weights change, so the
    checkpoint has the same format.

    Args:
        model ([`BlspKdForCausalLM`]): with a CFormer, and with whole weights: before FSDP or ZeRO-3 split them.
        batches (iterable of `dict`): of [`BlspKdDataCollator`]; some 50 clips suffice.

    Raises:
        ValueError: the model has another adapter, the batches have no clips or too few encoder frames for their
            tokens, or the CFormer has no layer before CIF.
    """
    if not model.adapter.one_to_one:
        raise ValueError(
            "Only the cformer adapter predicts token counts; leave the calibration out for the subsampler."
        )
    batches = [
        {name: tensor.to(model.device) for name, tensor in batch.items()}
        for batch in batches
        if len(batch["num_speech_tokens"])
    ]
    if not batches:
        raise ValueError("The batches to calibrate with have no clips. Pass at least one row with audio.")
    with frozen(model):
        alphas = [_audio(model, batch).alphas for batch in batches]
        logits = torch.cat([torch.logit(each.double()[each > 0], eps=1e-12) for each in alphas])
        num_tokens = sum(int(batch["num_speech_tokens"].sum()) for batch in batches)
        if num_tokens >= len(logits):
            raise ValueError(
                f"The transcripts of the batches to calibrate with have {num_tokens} tokens, but their clips only "
                f"{len(logits)} encoder frames, of which each is at most one token. Are these the right transcripts?"
            )
        shift = _shift_to_sum(logits, num_tokens)
        model.adapter.shift_alpha_logits(shift)

        token_states, embeddings = [], []
        for batch in batches:
            audio = _audio(model, batch, num_speech_tokens=batch["num_speech_tokens"])
            is_token = is_within(audio.num_speech_tokens, audio.token_states.shape[1])
            token_states.append(audio.token_states[is_token])
            embeddings.append(model.get_input_embeddings()(batch["teacher_input_ids"][batch["teacher_is_content"]]))
        scale = _root_mean_square(embeddings) / _root_mean_square(token_states)
        model.adapter.scale_speech_tokens(scale)
    return Calibration(shift, scale)


def calibration_batches(train_dataset: RowsInMemory | StreamedRows, collator: BlspKdDataCollator) -> Iterator[dict]:
    """Yield batches of some training rows, spread over the data set, or the first ones of a stream."""
    if isinstance(train_dataset, StreamedRows):
        batches: Iterable = train_dataset.batch_sampler(BATCH_SIZE)
    else:
        step = max(1, len(train_dataset) // NUM_ROWS)
        batches = BatchSampler(range(0, len(train_dataset), step), BATCH_SIZE, drop_last=False)
    for batch in islice(batches, NUM_ROWS // BATCH_SIZE):
        yield collator(train_dataset.__getitems__(batch))


def _audio(model, batch, num_speech_tokens=None):
    return model.get_audio_features(
        batch["input_features"], batch["input_features_mask"], num_speech_tokens=num_speech_tokens
    )


def _shift_to_sum(logits: torch.DoubleTensor, total: float) -> float:
    """Return the shift with which the sigmoids of the logits add up to `total`, by bisection."""
    low, high = -40.0, 40.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if torch.sigmoid(logits + middle).sum() < total else (low, middle)
    return (low + high) / 2


def _root_mean_square(vectors: list[torch.Tensor]) -> float:
    return torch.cat(vectors).double().square().mean().sqrt().item()
