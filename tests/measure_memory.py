"""Peak memory of a command and all it starts.

    python tests/measure_memory.py launch/quickstart.sh demo

Linux only: the proportional set sizes (PSS) of its process tree are added up every two seconds, so that memory which
processes share counts once. The last line is a JSON object; the exit code is the command's.
"""

import collections
import contextlib
import json
import pathlib
import subprocess
import sys
import time


def tree(root: int) -> list[int]:
    """A process and all below it."""
    children = collections.defaultdict(list)
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            parent = stat.read_text().rpartition(")")[2].split()[1]
            children[int(parent)].append(int(stat.parent.name))
    found = [root]
    for process in found:
        found += children[process]
    return found


def pss_gb(process: int) -> float:
    with contextlib.suppress(OSError):
        for line in pathlib.Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024 / 1e9
    return 0.0


def main(command: list[str]) -> int:
    start, peak = time.monotonic(), 0.0
    process = subprocess.Popen(command)
    while process.poll() is None:
        peak = max(peak, sum(map(pss_gb, tree(process.pid))))
        time.sleep(2)
    print(json.dumps({"peak_gb": round(peak, 2), "wall_sec": round(time.monotonic() - start, 1), "exit": process.returncode}))
    return process.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
