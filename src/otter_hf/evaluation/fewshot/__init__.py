"""Few-shot evaluation as Flamingo does it: demonstrations from a training set, captions, answers and classes."""
