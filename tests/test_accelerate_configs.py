"""The files of `examples/accelerate` say what the installed accelerate accepts, and name layers that exist.

Leaves out: running them (`test_equivalence.py`).
"""

from pathlib import Path

import pytest
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser

from tests.helpers.models import make_model

CONFIGS = sorted((Path(__file__).parents[1] / "examples" / "accelerate").glob("*.yaml"))
OF_ENGINE = {"FSDP": "fsdp_config", "DEEPSPEED": "deepspeed_config", "MULTI_GPU": None}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_knows_every_setting(path):
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    assert config.num_processes == 8 * config.num_machines == (32 if "four_nodes" in path.stem else 8)
    engine = OF_ENGINE[config.distributed_type.value]
    assert engine is None or getattr(config, engine)
    # accelerate passes unknown settings of an engine over in silence: the launcher's own options tell which exist.
    options = vars(launch_command_parser().parse_args(["train.py"]))
    assert set(config.fsdp_config) | set(config.deepspeed_config) | set(config.parallelism_config) <= set(options)


def fsdp_configs():
    configs = [load_config_from_file(str(path)).fsdp_config for path in CONFIGS]
    return [config for config in configs if config]


@pytest.mark.parametrize("config", fsdp_configs(), ids=lambda config: str(len(config)))
def test_fsdp_wraps_layers_that_the_model_has(config):
    model = make_model(plora={})
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=config["fsdp_version"], auto_wrap_policy=config["fsdp_auto_wrap_policy"].lower()
    )
    plugin.set_auto_wrap_policy(model)  # raises where a named class is not in the model
    wrapped = {layer.__name__ for layer in plugin.auto_wrap_policy.keywords["transformer_layer_cls"]}
    assert {"LlamaDecoderLayer", "WhisperEncoderLayer"} <= wrapped
