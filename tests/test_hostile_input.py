"""What comes from outside runs no code: no pickle is unpacked, and templates run in transformers' sandbox."""

import pickle

import pytest
from conftest import make_model
from jinja2.exceptions import SecurityError

from modeling_blsp_kd import BlspKdForCausalLM


class Trap:
    """Unpacking it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def folder(tmp_path):
    make_model(plora=False).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_pickle_is_not_unpacked(folder, tmp_path):
    sprung = tmp_path / "sprung"
    pickle.loads(pickle.dumps(Trap(sprung))).close()
    assert sprung.exists(), "the trap works"
    sprung.unlink()
    pickled = pickle.dumps({"weights": Trap(sprung)})
    (folder / "pytorch_model.bin").write_bytes(pickled)
    BlspKdForCausalLM.from_pretrained(folder)  # the safetensors beside it
    (folder / "model.safetensors").unlink()
    with pytest.raises((pickle.UnpicklingError, OSError, ValueError, RuntimeError)):
        BlspKdForCausalLM.from_pretrained(folder)
    assert not sprung.exists()


def test_a_chat_template_reaches_nothing_of_python(processor):
    reach = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(SecurityError, match="is unsafe"):
        processor.apply_chat_template([{"role": "user", "content": "hello"}], chat_template=reach)
