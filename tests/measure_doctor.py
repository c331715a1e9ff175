"""Measures the doctor's own memory and time: recordings are not opened, their facts are made up.

    python tests/measure_doctor.py [CLIPS ...]      default: 1e5 1e6

One process for each size. A manifest of that many lines: 15 languages, 20,000 speakers, one clip in 100 a duplicate, one in
1,000 too long. Prints the peak memory, the seconds, and the bytes per clip beyond an empty corpus.
"""

import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time


def child(manifest: str, output: str) -> None:
    from voxcpm2_jax.corpus import doctor

    def facts(recording, limits):
        number = int(recording.audio.stem)
        sec = 100.0 if number % 1000 == 7 else 2 + number % 997 / 100
        return doctor.Facts(None, sec, 16000, sound=number - number % 100 if number % 100 == 1 else number)

    doctor._open = facts
    start = time.monotonic()
    report = doctor.examine([manifest], output=output)
    wall = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {finding["kind"]: finding["count"] for finding in report["findings"]}
    print(json.dumps({"clips": report["clips"], "peak_mb": peak // 10**6, "sec": round(wall, 1), "found": found}))


def measure(directory: pathlib.Path, num_clips: int) -> dict:
    manifest = directory / f"{num_clips}.jsonl"
    with manifest.open("w") as file:
        for i in range(num_clips):
            text = f"some words of clip {i} and as many more as a sentence usually has"
            file.write(f'{{"audio": "{i}.wav", "text": "{text}", "language": "l{i % 15}", "speaker": "s{i % 20000}"}}\n')
    command = [sys.executable, __file__, "--child", str(manifest), str(directory / str(num_clips))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    return json.loads(done.stdout.splitlines()[-1])


def main(sizes: list[int]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        empty = measure(pathlib.Path(directory), 100)["peak_mb"]
        for num_clips in sizes:
            figures = measure(pathlib.Path(directory), num_clips)
            print(json.dumps(figures | {"bytes_a_clip": round((figures["peak_mb"] - empty) * 1e6 / num_clips)}), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main([int(float(size)) for size in sys.argv[1:]] or [10**5, 10**6])
