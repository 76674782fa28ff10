"""Relax one file with parsl: so many tasks, each one of the processes that share the work."""

import parsl
from parsl import bash_app

N = 8


@bash_app
def relax(shard: int, of: int, stdout: str = parsl.AUTO_LOGNAME, stderr: str = parsl.AUTO_LOGNAME) -> str:
    """The command of one process; its code 3 says that some structures did not converge."""
    command = "ase-bptt relax starts.extxyz --potential tuned --out relaxed.extxyz --skip-invalid"
    return f"{command} --shard {shard}/{of} || [ $? -eq 3 ]"


if __name__ == "__main__":
    with parsl.load():  # your own configuration says where tasks run
        for task in [relax(k, N) for k in range(1, N + 1)]:
            task.result()
