"""Settings of OpenMP, whose threads compute torch's operators on CPUs. This file does not import torch."""

import sys
from collections.abc import MutableMapping

# Turns of its loop in which a thread waits before it sleeps. `benchmarks/busy.py` compares values.
_SPINS = 3000


def limit_spinning(environment: MutableMapping[str, str]) -> None:
    """Let the threads of GNU OpenMP sleep soon if they wait for each other, unless the environment has a setting.

    By default a thread spins 100 times as long. That takes the processor from the thread that it waits for if there are
    fewer free processors than threads, as on a machine that other programs use too.

    Call this before torch is imported, which reads the variable. Afterwards it does nothing.
    """
    if "torch" not in sys.modules and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & environment.keys():
        environment["GOMP_SPINCOUNT"] = str(_SPINS)
