"""Image classification with noisy, irrelevant or unbalanced training data, and methods that choose what to train on."""
