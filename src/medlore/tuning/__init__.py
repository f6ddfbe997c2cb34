"""Floor 7: few-shot tuning of image classifiers, and what is done with a tuned one."""
