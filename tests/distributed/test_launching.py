"""The launch configurations in recipes/accelerate are what accelerate's launcher and minilm understand.

tests/test_recipes.py runs recipes under the two for CPUs.
"""

import re
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import (
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)

from minilm.distributed.sharding import read_sharding
from tests.launch import ROOT

CONFIGS = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
GUIDE = (ROOT / "docs" / "launching.md").read_text()
# By file: kind, processes in all, hosts, and whether CPUs are meant.
KINDS = {
    "cpu.yaml": (DistributedType.NO, 1, 1, True),
    "cpu_2.yaml": (DistributedType.MULTI_GPU, 2, 1, True),
    "gpu.yaml": (DistributedType.NO, 1, 1, False),
    "gpu_8.yaml": (DistributedType.MULTI_GPU, 8, 1, False),
    "gpu_8_fsdp2.yaml": (DistributedType.FSDP, 8, 1, False),
    "hosts_2x8.yaml": (DistributedType.MULTI_GPU, 16, 2, False),
}


def test_every_configuration_is_tested_and_in_the_guide_and_no_other_is() -> None:
    assert [path.name for path in CONFIGS] == sorted(KINDS)
    assert set(re.findall(r"\b\w+\.yaml\b", GUIDE)) == set(KINDS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_accelerate_reads_it_and_starts_what_minilm_takes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the launcher would set it for the tests after this one
    config = load_config_from_file(str(path))
    kind, processes, hosts, cpu = KINDS[path.name]
    assert (config.distributed_type, config.num_processes, config.num_machines, config.use_cpu) == (
        *(kind, processes, hosts),
        cpu,
    )
    known = vars(config).keys()
    assert yaml.safe_load(path.read_text()).keys() <= known

    words = ["--config_file", str(path), "recipe.py"]
    options, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    if processes == 1:
        environment = prepare_simple_launcher_cmd_env(options)[1]
        assert environment["ACCELERATE_USE_CPU"] == str(cpu)
    else:
        environment = prepare_multi_gpu_env(options)
        assert int(options.nproc_per_node) == processes // hosts
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    sharding = read_sharding(environment)
    assert (sharding is not None) == (kind == DistributedType.FSDP)
