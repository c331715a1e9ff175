"""What comparing the processes of a run costs (train/peers.py).

    python -m tests.measure_peers [STEPS]

Two processes train the toy of tests/train/test_peers.py with a row every 20 steps, with and without the comparison in turn.
Printed are medians of step_sec, and the time that the loop of the first process spends in Peers, per step.
"""

import json
import pathlib
import sys
import tempfile

import numpy as np

from tests.processes import run_processes
from tests.train.test_peers import TOY

TIMED = """
import time
from voxcpm2_jax.config import run
from voxcpm2_jax.train.peers import Peers

sec = {}
def timed(name):
    inner = getattr(Peers, name)
    def outer(*args, **kwargs):
        begin = time.perf_counter()
        result = inner(*args, **kwargs)
        sec[name] = sec.get(name, 0.0) + time.perf_counter() - begin
        return result
    setattr(Peers, name, outer)

for name in ("turn", "drop", "settling", "ask", "settle", "row"):
    timed(name)
"""


def run(workdir, steps: int, share: float | None) -> tuple[float, dict[str, float]]:
    """Trains -> median of step_sec, seconds in each method of Peers per step."""
    toy = TOY.replace("every_steps=3)", f"every_steps=20, slow_share={share})").replace("every_steps=6", "every_steps=1000000")
    program = TIMED + toy + "\nimport json\nprint(json.dumps(sec))"
    results = run_processes([workdir, "none", 0, steps, 0], 2, program=("-c", program), timeout_sec=600)
    assert [result.code for result in results] == [0, 0], results
    sec = json.loads(results[0].stdout.splitlines()[-1])
    rows = [json.loads(line) for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    return float(np.median([row["step_sec"] for row in rows])), {name: total / steps for name, total in sec.items()}


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 400
    found: dict = {0.1: [], None: []}
    for i in range(6):
        share = (0.1, None)[i % 2]
        with tempfile.TemporaryDirectory() as directory:
            step_sec, in_peers = run(directory, steps, share)
        found[share].append((step_sec, sum(in_peers.values())))
        parts = ", ".join(f"{name} {1e6 * sec:.1f}" for name, sec in in_peers.items())
        print(f"slow_share {share}: step {1e3 * step_sec:.2f} ms; in Peers, microseconds per step: {parts}", flush=True)
    on, off = (1e3 * np.median([sec for sec, _ in found[share]]) for share in (0.1, None))
    in_peers_us = [1e6 * np.median([sec for _, sec in found[share]]) for share in (0.1, None)]
    print(f"step {on:.2f} ms with, {off:.2f} ms without; in Peers {in_peers_us[0]:.0f} and {in_peers_us[1]:.0f} microseconds")


if __name__ == "__main__":
    main()
