"""Energy from counters that are made up: sums, wrap-around, and silence where something cannot be read."""

import json
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import minilm.runs.energy
import minilm.train
from minilm.runs.energy import CPU_ENERGY, GPU_ENERGY, measure_energy, open_rapl_counters
from minilm.runs.model_card import _energy
from minilm.train import train
from tests.jobs import config_in

KWH = 3.6e6  # joules


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    """Two packages, with a part that is counted already, and the whole machine, which is another sum of them."""
    names = {"0": "package-0", "0:0": "core", "1": "package-1", "2": "psys"}
    for zone, name in names.items():
        folder = tmp_path / f"intel-rapl:{zone}"
        folder.mkdir()
        (folder / "name").write_text(f"{name}\n")
        (folder / "max_energy_range_uj").write_text("65000000000\n")
        (folder / "energy_uj").write_text("64000000000\n")
    (tmp_path / "intel-rapl").mkdir()
    return tmp_path


def turn(powercap: Path, **joules: float) -> None:
    """Set the counters of zones."""
    for zone, value in joules.items():
        (powercap / f"intel-rapl:{zone.removeprefix('zone')}" / "energy_uj").write_text(f"{int(value * 1e6)}\n")


def test_packages_are_counted_over_the_end_of_their_counters(powercap: Path) -> None:
    counters = open_rapl_counters(powercap)
    for first, second in ((64_500, 64_010), (300, 64_020), (64_900, 64_030), (100, 64_040)):  # the first: two rounds
        turn(powercap, zone0=first, zone1=second, zone2=first)
        for counter in counters:
            counter.update()
    assert sorted(round(counter.joules, 3) for counter in counters) == [40, 2 * 65_000 - 64_000 + 100]


def test_a_counter_that_this_user_may_not_read_is_left_out(powercap: Path) -> None:
    assert open_rapl_counters(powercap / "nowhere") == []
    (powercap / "intel-rapl:1" / "energy_uj").unlink()  # root may read all that is there
    with pytest.raises(OSError, match="energy_uj"):
        open_rapl_counters(powercap)


def fake_nvml(*millijoules: int) -> Any:
    """NVML with one GPU, whose counter gives these one by one."""
    readings = iter(millijoules)
    return SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID={"GPU-12-34": "handle"}.__getitem__,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: {"handle": next(readings)}[handle],
    )


@pytest.fixture
def run(powercap: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The figures of a run on one GPU, whose NVML is this, whose packages take so many joules."""
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(uuid="12-34"))

    def run(library: Any, joules: float = 72.0, since: int = 0, device: str = "cuda", first: bool = True) -> Any:
        monkeypatch.setattr(minilm.runs.energy, "open_rapl_counters", lambda: open_rapl_counters(powercap))
        monkeypatch.setitem(sys.modules, "pynvml", library)
        accelerator: Any = SimpleNamespace(device=SimpleNamespace(type=device), is_local_main_process=first)
        turn(powercap, zone0=0, zone1=0)
        with measure_energy(accelerator, since) as energy:
            turn(powercap, zone0=joules / 2, zone1=joules / 2)
        assert "energy" not in [thread.name for thread in threading.enumerate()]
        return energy()

    return run


def test_the_sum_and_its_parts_are_named(run: Any) -> None:
    found = run(fake_nvml(1_000, 361_000), 720)
    assert found == pytest.approx({"energy_kwh": 1080 / KWH, GPU_ENERGY: 360 / KWH, CPU_ENERGY: 720 / KWH})
    assert _energy(found).strip() == f"Energy: {1080 / KWH:.3g} kWh (GPUs and CPUs)"
    later = run(fake_nvml(1_000, 361_000), first=False, since=1500)
    assert _energy(later).strip() == f"Energy: {360 / KWH:.3g} kWh (GPUs, since step 1,500)"


def test_what_cannot_be_read_is_left_out(run: Any, powercap: Path) -> None:
    assert set(run(None)) == {"energy_kwh", CPU_ENERGY}  # no nvidia-ml-py
    assert set(run(fake_nvml(5))) == {"energy_kwh", CPU_ENERGY}  # fails at the end
    assert set(run(None, device="cpu")) == {"energy_kwh", CPU_ENERGY}
    (powercap / "intel-rapl:0" / "max_energy_range_uj").unlink()
    assert set(run(fake_nvml(5, 6))) == {"energy_kwh", GPU_ENERGY}
    assert run(None) == {}
    assert run(None, device="cpu", first=False) == {}
    assert _energy({}) == ""


def test_energy_that_one_process_cannot_count_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    job: list[dict[str, list[float]]] = [
        {GPU_ENERGY: [KWH], CPU_ENERGY: [KWH, KWH]},
        {GPU_ENERGY: []},
        {CPU_ENERGY: [KWH]},
    ]
    monkeypatch.setattr(minilm.runs.energy, "gather_object", lambda mine: job)
    assert minilm.runs.energy._figures({}, 0) == {"energy_kwh": 3.0, CPU_ENERGY: 3.0}
    job[1][GPU_ENERGY] = [0.5 * KWH]
    assert minilm.runs.energy._figures({}, 7) == {
        "energy_kwh": 4.5,
        GPU_ENERGY: 1.5,
        CPU_ENERGY: 3.0,
        "energy_since_step": 7,
    }


def test_results_and_card_of_a_run_have_it(
    powercap: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place, train_step = tmp_path_factory.mktemp("run"), minilm.train.train_step

    def costly(*args: Any, **settings: Any) -> Any:
        turn(powercap, zone0=int((powercap / "intel-rapl:0" / "energy_uj").read_text()) / 1e6 + 100)
        return train_step(*args, **settings)

    monkeypatch.setattr(minilm.runs.energy, "open_rapl_counters", lambda: open_rapl_counters(powercap))
    monkeypatch.setattr(minilm.train, "train_step", costly)
    config = config_in(place, 2, save_every=0)
    results = train(replace(config, run=replace(config.run, output_dir=str(place / "out")))).figures
    assert results["energy_kwh"] == results[CPU_ENERGY] == pytest.approx(200 / KWH)
    assert json.loads((place / "out" / "all_results.json").read_text())[CPU_ENERGY] == results[CPU_ENERGY]
    assert f"Energy: {200 / KWH:.3g} kWh (CPUs)\n" in (place / "out" / "README.md").read_text()
