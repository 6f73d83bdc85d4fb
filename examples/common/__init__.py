"""What the example scripts share: command line, problems, the course of a run, reports."""

import os


os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # GKD, which TrOPD extends, is in trl.experimental
