"""One file for each task, started by `accelerate launch recipes/TASK.py`."""
