"""What the example scripts share: command line, problems, the course of a run, reports."""
