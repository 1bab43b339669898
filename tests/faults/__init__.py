"""The fault suite: every fault of the plan F1 to F20 injected, and the figure that came out.

Guarantees: a check injects real faults (SIGKILL, SIGSTOP, errors of system calls, flipped bits, a
small tmpfs) into real runs and compares every published byte with an undisturbed run's. The same
seed gives the same faults; when a signal meets a process is up to the machine.
Costs: the short form is part of pytest and takes a few minutes; the long form, `python -m
tests.faults --long`, takes an hour or more. Neither needs a network or a GPU.
"""
