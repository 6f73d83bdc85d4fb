"""
Studies: many short runs of the trainers on the embedded tasks, all measured in the same way. Most numbers in docs/ are
theirs.

    python -m studies.run drpo erpd      # the runs that are still missing; stop and start it as you like
    python -m studies.report             # tables and pictures of docs/, from the results

A study is a module with a list `RUNS`, such as `studies/drpo.py`; one line of it describes one run (`runs.Run`), and
its result is one line of `results/drpo.jsonl`.
"""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))  # the embedded tasks and policies
