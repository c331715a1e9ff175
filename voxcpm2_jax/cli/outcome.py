"""What a command leaves behind: an exit code, results on standard output, an error on standard error.

A result is a JSON object on a line of its own. Progress and errors go to standard error, so that the last line of standard
output is always a result.
"""

import json
import sys

DONE = 0
FAILED = 1  # a fault of this program, or a run that diverged
MISTAKE = 2  # of the user; one line on standard error says what to do
NO = 3  # the answer is no: doctor found a fault, a plan does not fit, a comparison failed
PREEMPTED = 75  # stopped by a signal after saving; the same command continues the run
INTERRUPTED = 130


def print_result(result: dict) -> None:
    print(json.dumps(result, ensure_ascii=False), flush=True)


def print_error(error: Exception | str) -> None:
    """Prints the error as one line."""
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
