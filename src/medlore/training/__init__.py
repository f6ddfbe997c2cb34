"""Floor 6: the one training engine.

A training is a `Task` (`task.py`): it gives its batches by step, named terms of a loss and a judgement. `loop.train` does the
rest; how long and how fast is a `Schedule`, where to go on from a `Checkpoint`.
"""
