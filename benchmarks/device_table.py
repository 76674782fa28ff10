"""What `throughput.py` adds on a GPU: training steps, memory, equality with the CPU, and time outside the model."""

from __future__ import annotations

import copy
import statistics
import time
from contextlib import contextmanager

import torch
from relaxers import rattled
from torch.profiler import ProfilerActivity, profile, record_function

from ase_bptt import Potential, Trainer, delta_q, relax
from ase_bptt.datasets import si_defects
from ase_bptt.throughput import relax_all

ADJOINTS = ("full", "replay", "implicit", "guided:10")
BATCHES = {"cuda": (1, 8, 32), "cpu": (1, 2, 4)}
MODEL = "the model"


def print_device_table(potential: Potential, device: str) -> None:
    if device != "cpu":
        print("\n".join(equality(potential)), flush=True)
    print("\n".join(outside(potential, device)), flush=True)
    print("seconds per training step (10 frames, or to the minimum), medians of 3; peak memory above the potential")
    batches = BATCHES["cpu" if device == "cpu" else "cuda"]
    print(f"{'pairs':14}" + "".join(f"{n:>22}" for n in batches))
    for name in ADJOINTS:
        cells = (training_step(potential, name, n) for n in batches)
        print(f"{name:14}" + "".join(f"{cell:>22}" for cell in cells), flush=True)


def training_step(potential: Potential, adjoint: str, n: int) -> str:
    """Seconds, and MiB on a GPU, of one step of the optimizer on so many of the embedded pairs."""
    trainer = Trainer(copy.deepcopy(potential), adjoint=adjoint, progress=False)
    pairs = si_defects("all")[:n]
    trainer.train_step(pairs)
    on_gpu = potential.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        resident = torch.cuda.memory_allocated()
    spent = []
    for _ in range(3):
        began = time.perf_counter()
        trainer.train_step(pairs)
        if on_gpu:
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - began)
    memory = f", {(torch.cuda.max_memory_allocated() - resident) / 2**20:.0f} MiB" if on_gpu else ""
    return f"{statistics.median(spent):.2f} s{memory}"


def equality(potential: Potential) -> list[str]:
    """By how far the same relaxations and gradients differ on the CPU."""
    pairs = si_defects("all")[:8]
    ends, grads, frames = [], [], []
    for device in ("cpu", potential.device):
        here = copy.deepcopy(potential).to(device)
        run = relax(here, [pair.initial for pair in pairs], steps=40, adjoint="replay")
        delta_q(run, [pair.relaxed for pair in pairs]).mean().backward()
        ends.append(run.positions.detach().cpu())
        frames.append(run.nsteps.tolist())
        grads.append(torch.cat([p.grad.flatten().cpu() for p in here.parameters() if p.grad is not None]))
    apart, of_gradient = (ends[0] - ends[1]).abs().max(), (grads[0] - grads[1]).norm() / grads[0].norm()
    return [
        f"the GPU against the CPU: ends {apart:.0e} Å apart (wanted: at most 1e-6), gradients differ by "
        f"{of_gradient:.0e} of their length, the same frames: {frames[0] == frames[1]}"
    ]


@contextmanager
def marked(potential: Potential):
    """Calls of the model are distinguished in a profile."""
    call = potential.energy_and_forces

    def energy_and_forces(*arguments, **settings):
        with record_function(MODEL):
            return call(*arguments, **settings)

    potential.energy_and_forces = energy_and_forces
    try:
        yield
    finally:
        del potential.energy_and_forces


def outside(potential: Potential, device: str) -> list[str]:
    """The share of the time of relaxations that is not the model's: of the GPU's kernels, or of the calls on a CPU."""
    structures = rattled(32 if device != "cpu" else 6)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device != "cpu")
    with marked(potential):
        list(relax_all(potential, structures[:2]))
        with profile(activities=activities) as found:
            began = time.perf_counter()
            list(relax_all(potential, structures, steps=10))
            whole = time.perf_counter() - began
    # A device has ranges of the same name, too; those of the host say when the model was called.
    events = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CPU]
    calls = [e.time_range for e in events if e.name == MODEL]
    called = sum(call.end - call.start for call in calls) * 1e-6
    lines = [f"outside the calls of the model: {100 * (1 - called / whole):.1f} % of the time of relax_all, 10 frames"]
    if device != "cpu":
        inside, elsewhere = busy(events, calls)
        model, other = 100 * inside / whole, 100 * elsewhere / whole
        lines.append(
            f"the GPU: the model's kernels {model:.1f} % of the time, others {other:.1f} %, idle "
            f"{100 - model - other:.1f} %; outside the model's kernels {100 - model:.1f} % (wanted: below 10 %)"
        )
    return lines


def busy(events: list, calls: list) -> tuple[float, float]:
    """Seconds of the kernels that were launched while the model was called, from any thread, and of the others."""
    inside = elsewhere = 0.0
    calls = sorted(calls, key=lambda call: call.start)
    k = 0
    for event in sorted((e for e in events if e.kernels), key=lambda e: e.time_range.start):
        while k < len(calls) and calls[k].end < event.time_range.start:
            k += 1
        spent = sum(kernel.duration for kernel in event.kernels) * 1e-6
        if k < len(calls) and calls[k].start <= event.time_range.start:
            inside += spent
        else:
            elsewhere += spent
    return inside, elsewhere
