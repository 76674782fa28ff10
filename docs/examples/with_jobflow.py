"""Relax one file with jobflow: jobs that call Python, each one of the processes that share the work."""

from jobflow import Flow, job, run_locally

N = 4


@job
def relax(shard: int, of: int) -> int:
    """One of the processes; returns its exit code."""
    from ase_bptt.cli import main

    files = ["starts.extxyz", "--out", "relaxed.extxyz"]
    return main(["relax", *files, "--potential", "tuned", "--shard", f"{shard}/{of}"])


@job
def merged(codes: list[int]) -> str:
    """After all: 3 says that some structures did not converge, 0 that this process was not the last."""
    if set(codes) - {0, 3}:
        raise RuntimeError(
            f"The relaxations ended with the codes {codes}; relaxed.extxyz.parts holds what has finished."
        )
    return "relaxed.extxyz"


if __name__ == "__main__":
    parts = [relax(k, N) for k in range(1, N + 1)]
    run_locally(Flow([*parts, merged([part.output for part in parts])]), create_folders=False)
