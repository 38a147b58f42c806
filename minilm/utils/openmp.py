"""Settings of OpenMP, whose threads compute torch's operators on CPUs. This file does not import torch.

A thread that waits for another one spins in a loop, and sleeps after a number of turns. OpenMP's default is 300,000
turns, which suits an idle machine: if there are fewer free processors than threads, the spinning takes a processor from
the thread that everyone waits for. `benchmarks/busy.py` compares numbers of turns.
"""

import sys
from collections.abc import MutableMapping

from minilm.utils.launch_variables import is_distributed

_VARIABLE = "GOMP_SPINCOUNT"
# On an idle machine, a run is about as fast as with OpenMP's default.
_SPINS = "5000"
# A thread that waits sleeps at once. This suits a machine on which other programs run.
_NO_SPINS = "0"
# Processors that other programs take on a busy machine.
_BUSY_PROCESSORS = 0.5
# Whether the last call of `limit_spinning` chose the time. The user may give the same number.
_chosen = False


def limit_spinning(environment: MutableMapping[str, str]) -> None:
    """Let the threads of GNU OpenMP spin for a short time, unless the environment says how long.

    Call this before torch is imported, which reads the variable. Afterwards it does nothing.
    """
    global _chosen
    _chosen = "torch" not in sys.modules and not {_VARIABLE, "OMP_WAIT_POLICY"} & environment.keys()
    if _chosen:
        environment[_VARIABLE] = _SPINS


def stop_spinning_if_busy(environment: MutableMapping[str, str], others: float) -> None:
    """Let the threads sleep at once if other programs take processors and `limit_spinning` chose the time.

    others: the processors that other programs take. The processes of a job would take each other for other programs, so
    nothing changes for them.
    """
    ours = _chosen and "torch" not in sys.modules and environment.get(_VARIABLE) == _SPINS
    if ours and others > _BUSY_PROCESSORS and not is_distributed(environment):
        environment[_VARIABLE] = _NO_SPINS
