"""An untrained CFormer is started at the right token count and the right size of vectors."""

import pytest
import torch

from modeling_blsp_kd.training.calibration import calibrate_adapter
from tests.helpers.models import SMALL_CFORMER, make_model

pytestmark = pytest.mark.numerical


@pytest.mark.parametrize("options", [{}, {"frame_stride": 2}, {"frame_stride": 3, "num_pre_layers": 0}])
def test_counts_and_sizes_are_those_of_the_transcripts(options, rows, collator):
    model = make_model(adapter={**SMALL_CFORMER, **options}).double().eval()
    batches = [collator(rows[:2]), collator([{**rows[0], "audio": None}, rows[2]])]
    names = list(model.state_dict())
    calibration = calibrate_adapter(model, batches)
    assert calibration.alpha_logit_shift and calibration.speech_token_scale
    assert list(model.state_dict()) == names, "no new weights"
    predicted, vectors, embeddings = 0.0, [], []
    with torch.no_grad():
        for batch in batches:
            features = batch["input_features"].double(), batch["input_features_mask"]
            predicted += model.get_audio_features(*features).alpha_sum.sum().item()
            output = model.get_audio_features(*features, num_speech_tokens=batch["num_speech_tokens"])
            vectors += [each[:count] for each, count in zip(output.pooler_output, batch["num_speech_tokens"])]
            embeddings.append(model.get_input_embeddings()(batch["teacher_input_ids"][batch["teacher_is_content"]]))
    assert predicted == pytest.approx(sum(len(each) for each in vectors), rel=1e-5)
    sizes = [torch.cat(each).square().mean().sqrt().item() for each in (vectors, embeddings)]
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-6)


def test_what_cannot_be_calibrated_is_an_error(rows, collator):
    batch = collator(rows)
    with pytest.raises(ValueError, match="Only the cformer adapter predicts token counts"):
        calibrate_adapter(make_model(adapter="subsampler"), [batch])
    with pytest.raises(ValueError, match="have no clips"):
        calibrate_adapter(make_model(), [collator([{**rows[0], "audio": None}])])
    with pytest.raises(ValueError, match=r"have \d+ tokens, but their clips only \d+ encoder frames"):
        calibrate_adapter(make_model(), [collator([{**rows[0], "text": "the red cat ran " * 20}])])
    with pytest.raises(ValueError, match="set num_pre_layers to 1 or more"):
        calibrate_adapter(make_model(adapter={**SMALL_CFORMER, "num_pre_layers": 0}), [batch])
