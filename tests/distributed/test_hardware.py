"""Precision by measurement, FLOPs against a count by hand, and launches that are not what they look like."""

import json
import mmap
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForMaskedLM

from minilm.data.batch_plan import Step
from minilm.data.packing import pack
from minilm.distributed import hardware
from minilm.distributed import precision as precision_module
from minilm.distributed.flops import Cost, count_flops
from minilm.distributed.hardware import advise_threads, describe, fair_threads
from minilm.distributed.launch_checks import check_devices, check_launch
from minilm.distributed.precision import choose_precision, device_peak, gemm_rate
from minilm.models.sparse_head import SparseHead
from minilm.utils import processor_load
from minilm.utils.openmp import limit_spinning, stop_spinning_if_busy
from minilm.utils.processor_load import ProcessorLoad
from tests.jobs import launched

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LAYERS, HIDDEN, INNER, VOCABULARY = 2, 32, 48, 90


@pytest.fixture
def cpu_of_ratio(monkeypatch):
    """A CPU whose bf16 products run at the given multiple of the rate of fp32, and a launch without a precision."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)

    def pretend(ratio):
        monkeypatch.setattr(precision_module, "gemm_rate", lambda dtype, *_: ratio if dtype is torch.bfloat16 else 1.0)

    return pretend


@pytest.mark.parametrize(
    ("setting", "launcher", "ratio", "name", "reason"),
    [
        ("auto", "no", 9.0, "bf16", "here runs at 9 times"),
        ("auto", "no", 0.01, "fp32", "here runs at 0.01 times"),
        ("auto", "bf16", 9.0, "bf16", "set by the launcher; a bf16"),
        ("auto", "bf16", 0.01, "bf16", "set by the launcher; WARNING: .* at 0.01 times"),
        ("bf16", "no", 9.0, "bf16", "set by run.precision; a bf16"),
        ("bf16", "no", 0.01, "bf16", "set by run.precision; WARNING: .* at 0.01 times"),
        ("fp32", "bf16", 9.0, "fp32", "set by run.precision"),
    ],
)
def test_a_chosen_precision_is_kept_and_auto_measures_the_cpu(
    setting, launcher, ratio, name, reason, cpu_of_ratio, monkeypatch
):
    cpu_of_ratio(ratio)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    precision = choose_precision(setting, CPU)
    assert precision.name == name
    assert re.search(reason, precision.reason)


@pytest.mark.parametrize("undisturbed", [0, 3, 7])
def test_one_undisturbed_measurement_of_each_precision_is_enough(undisturbed, monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    calls = {torch.bfloat16: 0, torch.float32: 0}

    def rate(dtype, *_):
        calls[dtype] += 1
        # Another program slows down fp32 at other times than bf16.
        quick = calls[dtype] - 1 == (undisturbed if dtype is torch.bfloat16 else 7 - undisturbed)
        return (4.0 if dtype is torch.bfloat16 else 1.0) * (1.0 if quick else 0.01)

    monkeypatch.setattr(precision_module, "gemm_rate", rate)
    precision = choose_precision("auto", CPU)
    assert precision.name == "bf16"
    assert "at 4 times" in precision.reason


@pytest.mark.parametrize(
    ("setting", "launcher", "message"),
    [
        ("fp16", "no", "fp16, set by run.precision, needs a GPU: on a CPU use auto, bf16 or fp32"),
        ("auto", "fp16", "fp16, set by the launcher, needs a GPU: launch with --mixed_precision no"),
    ],
)
def test_fp16_on_a_cpu_is_refused_with_what_to_change(setting, launcher, message, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    with pytest.raises(ValueError, match=f"^{message}$"):
        choose_precision(setting, CPU)


@pytest.mark.parametrize(("native", "name"), [(True, "bf16"), (False, "fp16")])
def test_auto_on_a_gpu_takes_bf16_only_where_the_hardware_has_it(native, name, cpu_of_ratio, monkeypatch):
    cpu_of_ratio(9.0)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    assert choose_precision("auto", CUDA).name == name
    assert choose_precision("fp32", CUDA).name == "fp32"


def test_the_rate_of_a_matrix_product_is_measured():
    peak = device_peak(CPU, "fp32")
    assert peak.source == "measured"
    assert peak.flops > 1e8
    assert gemm_rate(torch.float32, 128, 0.0) > 1e7


@pytest.mark.parametrize(("slow", "products"), [(0, 1000), (9, 10), (10**6, 5)], ids=["idle", "busy", "no AMX"])
def test_a_rate_is_not_taken_from_a_few_products_that_were_disturbed(slow, products, monkeypatch):
    clock = [0.0]
    done = []

    def product(a, b):
        if len(a) == 256:
            clock[0] += 2.0 if len(done) < slow else 0.01
            done.append(a)

    monkeypatch.setattr(precision_module.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch, "mm", product)
    rate = gemm_rate(torch.float32, 256, 2.0 if slow > 10 else 10.0)
    assert rate == pytest.approx(2 * 256**3 / (2.0 if slow > 10 else 0.01))
    assert abs(len(done) - products) <= 1


@pytest.mark.parametrize(
    ("card", "precision", "tera"),
    [
        ("NVIDIA H200", "bf16", 989),
        ("NVIDIA H100 80GB HBM3", "fp32", 67),
        ("NVIDIA A100-SXM4-40GB", "fp16", 312),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA L4", "bf16", 121),
        ("Tesla T4", "fp16", 65),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA L40", "bf16", None),
        ("NVIDIA RTX A1000", "bf16", None),
        ("NVIDIA T400 4GB", "fp16", None),
    ],
)
def test_the_datasheet_peak_is_that_of_this_card_or_measured(card, precision, tera, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
    monkeypatch.setattr(precision_module, "gemm_rate", lambda *_: 7.0)
    peak = device_peak(CUDA, precision)
    assert peak.source == ("datasheet" if tera else "measured")
    assert peak.flops == pytest.approx(1e12 * tera if tera else 7.0)


def tiny_head(kind: str = "bert", attention: str | None = None, **fields) -> SparseHead:
    size = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": INNER}
    config = AutoConfig.for_model(kind, **size, **fields, vocab_size=VOCABULARY, pad_token_id=0)
    return SparseHead(AutoModelForMaskedLM.from_config(config, attn_implementation=attention))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_flops_of_bert_are_those_counted_by_hand(attention):
    cost = count_flops(tiny_head(attention=attention), 32)
    attention, mlp = 4 * HIDDEN * HIDDEN, 2 * HIDDEN * INNER  # query, key, value, output; the two of the MLP
    last = HIDDEN * HIDDEN + mlp  # what follows attention in the last layer: a target's cost, and no other token's
    assert cost.per_token == pytest.approx(2 * (LAYERS * (attention + mlp) - last))
    assert cost.per_square == pytest.approx(LAYERS * 2 * 2 * HIDDEN)  # queries with keys, weights with values
    assert cost.per_target == pytest.approx(2 * (last + HIDDEN * (HIDDEN + VOCABULARY)))


@pytest.mark.parametrize(
    ("kind", "lengths"),
    [
        *[(kind, (23,)) for kind in ("bert", "modernbert", "mpnet", "distilbert", "albert")],
        *[(kind, (23, 10, 10, 1)) for kind in ("bert", "modernbert", "distilbert", "albert")],
    ],
)
def test_flops_at_other_lengths_and_numbers_of_targets_are_predicted(kind, lengths, monkeypatch):
    monkeypatch.setattr(
        "minilm.data.packing.SHORT_ROW_TOKENS", 0
    )  # in bins attention works on masked pairs too, which do not count
    head = tiny_head(kind).train()
    cost = count_flops(head, 32)
    assert head.training
    head.eval()
    tokens = sum(lengths)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # CPU kernels are not counted
        head.logits(torch.full((tokens,), 7), pack(lengths), torch.arange(5))
    predicted = tokens * cost.per_token + sum(n**2 for n in lengths) * cost.per_square + 5 * cost.per_target
    assert predicted == counter.get_total_flops()


def test_counting_keeps_nothing_for_a_gradient():
    head, failures = tiny_head(), []

    def go_back(module, inputs, output):
        try:
            output.logits.sum().backward()
        except (RuntimeError, TypeError) as error:
            failures.append(error)

    head.model.register_forward_hook(go_back)
    count_flops(head, 32)
    assert len(failures) == 3


def test_a_model_that_shares_relative_positions_can_be_counted():
    head = tiny_head("deberta-v2", relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=False)
    assert count_flops(head, 32).per_token > 0


def test_a_step_costs_three_forwards_of_its_real_tokens():
    step = Step(epoch=0, micro_batches=[[np.arange(2)]], tokens=30, square_lengths=500, padded_tokens=40)
    assert Cost(per_token=7.0, per_square=2.0, per_target=10.0).step(step, 0.1) == 3 * (30 * 7 + 500 * 2 + 3 * 10)


LAUNCHED = {"ACCELERATE_MIXED_PRECISION": "no"}
ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.scorecard(20)
def test_more_processes_than_gpus_are_refused_with_the_number_that_works():
    for devices, here in ((1, 2), (2, 8)):
        with pytest.raises(ValueError, match=rf"^{here} processes .* type .*--num_processes {devices} [^\n]*$"):
            check_devices(devices, launched(0, here))
    for devices, environment in ((0, launched(0)), (2, launched(0)), (2, {}), (1, {"LOCAL_WORLD_SIZE": "2"})):
        check_devices(devices, environment)


@pytest.mark.scorecard(20)
@pytest.mark.parametrize(
    ("processes", "environment"),
    [
        (1, {**LAUNCHED, **ADDRESS, "ACCELERATE_USE_CPU": "True"}),  # --cpu --num_processes 2
        (1, {**LAUNCHED, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}),  # --multi_gpu --num_processes 2, no GPU
        (2, {}),
    ],
)
def test_launches_that_do_not_do_what_they_say_are_refused_with_the_command_that_does(processes, environment):
    with pytest.raises(ValueError, match="accelerate launch --multi_gpu --num_processes N") as caught:
        check_launch(processes, environment)
    assert "\n" not in str(caught.value)


@pytest.mark.scorecard(20)
@pytest.mark.parametrize(
    ("processes", "environment"),
    [
        (1, {}),
        (1, {**LAUNCHED, "ACCELERATE_USE_CPU": "True"}),
        (2, {**LAUNCHED, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}),
        (2, {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}),  # torchrun
        (1, ADDRESS),  # left over in a shell
        (1, {**LAUNCHED, "MASTER_ADDR": "127.0.0.1"}),
    ],
)
def test_right_launches_pass(processes, environment):
    check_launch(processes, environment)


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({}, None),
        ({"OMP_NUM_THREADS": "1"}, None),
        ({**LAUNCHED, "OMP_NUM_THREADS": "3"}, None),
        (LAUNCHED, None),
        ({**LAUNCHED, "OMP_NUM_THREADS": "1"}, 8),
        ({"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}, None),  # left over in a shell
        ({**launched(0, 2), "OMP_NUM_THREADS": "1"}, 4),
        ({**launched(0, 3), "OMP_NUM_THREADS": "1"}, 2),
        ({**launched(0, 20), "OMP_NUM_THREADS": "1"}, 1),
    ],
)
def test_a_process_gets_its_share_of_the_cores_where_a_launcher_took_them(environment, threads, monkeypatch):
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert fair_threads(environment) == threads


@pytest.mark.parametrize(
    ("seconds", "others"),
    [(10.0, 1.2), (0.05, 0.0)],  # too short a time gives no figure
)
def test_the_load_counts_other_programs_on_the_processors_of_this_process(seconds, others, monkeypatch):
    now = [0.0]

    def times(percpu):
        # Processors 0 and 2 are for this process, and 3 s of 0 and all of 2 are taken. Of that it takes 1 s.
        shares = ((0.1, 0.1, 0.1), (1.0, 0.0, 0.0), (0.9, 0.0, 0.1))
        return [SimpleNamespace(user=now[0] * a, nice=now[0] * b, system=now[0] * c) for a, b, c in shares]

    monkeypatch.setattr(psutil, "cpu_times", times)
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda pid: {0, 2}, raising=False)
    monkeypatch.setattr(processor_load.os, "times", lambda: (now[0] * 0.08, now[0] * 0.02, 0.0, 0.0, now[0]))
    monkeypatch.setattr(processor_load.time, "perf_counter", lambda: now[0])
    load = ProcessorLoad()
    now[0] = seconds
    assert load.others() == pytest.approx(others)


@pytest.mark.parametrize(
    ("busy", "threads", "usable", "left"),
    [
        (0.4, 2, 2, None),
        (1.0, 2, 2, 1),
        (1.0, 1, 2, None),  # the run leaves a processor
        (5.0, 2, 2, 1),
        (1.7, 4, 4, 2),
        (1.2, 4, 8, None),
        (1.2, 8, 8, 7),
    ],
)
def test_fewer_threads_are_advised_where_other_programs_leave_fewer_processors(busy, threads, usable, left):
    advice = advise_threads(busy, threads, usable)
    assert (advice is None) == (left is None)
    assert left is None or f"OMP_NUM_THREADS={left} python" in advice


@pytest.mark.parametrize(
    ("environment", "after"),
    [
        ({}, True),
        ({"GOMP_SPINCOUNT": "7"}, False),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, False),
        ({"OMP_NUM_THREADS": "2"}, True),
    ],
)
def test_threads_spin_for_a_short_time_unless_the_user_says_otherwise(environment, after, monkeypatch):
    now = dict(environment)
    monkeypatch.delitem(sys.modules, "torch")
    limit_spinning(now)
    assert now == environment | ({"GOMP_SPINCOUNT": now.get("GOMP_SPINCOUNT")} if after else {})
    assert not after or int(now["GOMP_SPINCOUNT"]) > 0


@pytest.mark.parametrize(
    ("environment", "others", "stops"),
    [
        ({}, 1.0, True),
        ({}, 0.3, False),
        (launched(0, 2), 1.0, False),  # the other processes of the job
        ({"GOMP_SPINCOUNT": "7"}, 1.0, False),
        ({"GOMP_SPINCOUNT": "5000"}, 1.0, False),  # the user's, though minilm would choose it too
        ({"OMP_WAIT_POLICY": "ACTIVE"}, 1.0, False),
    ],
)
def test_threads_sleep_at_once_where_other_programs_run(environment, others, stops, monkeypatch):
    monkeypatch.delitem(sys.modules, "torch")
    now = dict(environment)
    limit_spinning(now)
    before = dict(now)
    stop_spinning_if_busy(now, others)
    assert now == (before | {"GOMP_SPINCOUNT": "0"} if stops else before)


@pytest.mark.parametrize("program", ["import minilm, torch", "import torch, minilm"])
def test_the_library_that_torch_loads_sees_the_setting(program):
    environment = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment["OMP_DISPLAY_ENV"] = "verbose"
    program += "; import os; print(os.environ.get('GOMP_SPINCOUNT'))"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    if (seen := re.search(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)) is None:
        pytest.skip("torch does not load GNU OpenMP here")
    ours = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "torch")
        limit_spinning(ours)
    expected = ours["GOMP_SPINCOUNT"]
    assert done.stdout.strip() == (expected if program.startswith("import minilm") else "None")
    assert (seen[1] == expected) == program.startswith("import minilm")


@pytest.mark.parametrize("readable", [True, False])
def test_the_description_of_the_machine_holds_three_plain_facts(readable, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError

    if not readable:
        monkeypatch.setattr(hardware.Path, "read_text", refuse)
    facts = describe(CPU)
    assert set(facts) == {"device", "cpu_capability", "threads_per_process"}
    assert json.loads(json.dumps(facts)) == facts
    assert str(facts["device"]).endswith(f" processors ({facts['cpu_capability']})")
    assert facts["threads_per_process"] == torch.get_num_threads()


@pytest.mark.parametrize(
    ("used", "flags", "told"),
    [
        ("AVX2", "avx512_bf16 amx_bf16", "AVX2"),  # ATEN_CPU_CAPABILITY=avx2
        ("AVX512", "avx512f", "AVX512"),
        ("AVX512", "avx512f avx512_bf16", "AVX512_BF16"),
        ("AVX512", "amx_bf16 avx512f avx512_bf16", "AMX"),
    ],
)
def test_the_description_of_the_machine_tells_how_its_processors_compute_bf16(used, flags, told, monkeypatch):
    processor = f"processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 {flags}\n\n"
    monkeypatch.setattr(hardware.Path, "read_text", lambda *args, **kwargs: 2 * processor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: used)
    assert describe(CPU)["device"] == f"Some CPU, 2 processors ({told})"


class CLibrary:
    """A C library that records its calls, and whose malloc returns a block of memory or none."""

    def __init__(self, block):
        self.told = []
        self.malloc = lambda size: self.told.append(("malloc", size.value)) or block
        self.madvise = lambda at, size, advice: self.told.append(("madvise", at.value, size.value, advice))
        self.free = lambda at: self.told.append(("free", at.value))

    def mallopt(self, parameter, value):
        self.told.append(("mallopt", parameter, value))


KEPT = [("mallopt", -4, 0), ("mallopt", -1, -1)]
PAGE = mmap.PAGESIZE


@pytest.fixture
def c_library(monkeypatch):
    library = CLibrary(block=3 * PAGE + 16)
    monkeypatch.setattr(hardware.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(hardware.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(hardware.os, "sysconf", lambda name: 200)
    monkeypatch.setattr(hardware, "_memory_is_rationed", lambda: False)
    for key in [key for key in os.environ if key.startswith("MALLOC_")]:
        monkeypatch.delenv(key)
    return library


def test_the_c_library_keeps_memory_and_gets_half_of_the_machine_s_in_huge_pages(c_library):
    hardware.keep_freed_memory(CPU)
    advised = ("madvise", 4 * PAGE, 99 * PAGE + 16, mmap.MADV_HUGEPAGE)
    assert c_library.told == [*KEPT, ("malloc", 100 * PAGE), advised, ("free", 3 * PAGE + 16)]


def test_no_huge_pages_where_memory_is_rationed_or_there_is_no_such_block(c_library, monkeypatch):
    monkeypatch.setattr(hardware, "_memory_is_rationed", lambda: True)
    hardware.keep_freed_memory(CPU)
    assert c_library.told == KEPT
    monkeypatch.setattr(hardware, "_memory_is_rationed", lambda: False)
    monkeypatch.setattr(c_library, "malloc", lambda size: None)
    hardware.keep_freed_memory(CPU)
    assert c_library.told == KEPT * 2


@pytest.mark.parametrize(
    ("device", "name", "environment"),
    [("cpu", "", {}), ("cpu", "glibc", {"MALLOC_ARENA_MAX": "1"}), ("cuda", "glibc", {})],
)
def test_other_c_libraries_gpus_and_the_user_s_own_settings_are_left_alone(
    device, name, environment, c_library, monkeypatch
):
    monkeypatch.setattr(hardware.platform, "libc_ver", lambda: (name, ""))
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    hardware.keep_freed_memory(torch.device(device))
    assert c_library.told == []


@pytest.mark.parametrize(
    ("limited", "accounting", "rationed"),
    [(None, "0", False), (None, "1", False), (None, "2", True), ("RLIMIT_AS", "0", True), ("RLIMIT_DATA", "0", True)],
)
def test_memory_is_rationed_by_a_limit_or_by_strict_accounting(limited, accounting, rationed, monkeypatch):
    resource = pytest.importorskip("resource")
    limits = {getattr(resource, limited): 2**40} if limited else {}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits.get(kind, resource.RLIM_INFINITY),) * 2)
    monkeypatch.setattr(hardware.Path, "read_text", lambda path, encoding: f"{accounting}\n")
    assert hardware._memory_is_rationed() == rationed


def test_a_process_has_its_tensors_in_huge_pages():
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text() or platform.libc_ver()[0] != "glibc":
        pytest.skip("no huge pages to be had by asking for them")
    if hardware._memory_is_rationed():
        pytest.skip("the addresses of this process are limited")
    script = """
import torch
from minilm.distributed.hardware import keep_freed_memory
keep_freed_memory(torch.device("cpu"))
held = torch.ones(2**24)
print(next(line for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages")))
"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[1]) > 48 * 1024  # kB, of 64 MB


@pytest.mark.parametrize(("environment", "made"), [({}, 41), ({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "99"}, 40)])
def test_kernels_that_fp32_has_little_use_for_are_forgotten_unless_the_user_says_otherwise(environment, made):
    script = """
import torch
from minilm.distributed.hardware import keep_few_kernels
keep_few_kernels("fp32")
for rows in [*range(1, 41), 1]:
    torch.nn.functional.gelu(torch.ones(rows, 64))
"""
    variables = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY")
    environment = {key: value for key, value in os.environ.items() if key not in variables} | environment
    environment["ONEDNN_VERBOSE"] = "2"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    if "eltwise" not in done.stdout:
        pytest.skip("torch does not take GELUs from oneDNN here")
    assert done.stdout.count("create:cache_miss") == made


@pytest.mark.parametrize(
    ("asked", "capability", "few"),
    [("fp32", "AVX512", True), ("auto", "AVX2", True), ("auto", "AVX512", False), ("bf16", "AVX512", False)],
)
def test_all_kernels_are_kept_where_products_may_be_in_bf16(asked, capability, few, monkeypatch):
    variable = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.setenv(variable, "")
    monkeypatch.delenv(variable)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    hardware.keep_few_kernels(asked)
    assert (variable in os.environ) == few
