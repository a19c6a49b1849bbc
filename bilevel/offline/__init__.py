"""Learned or measured outside the step: irreducible losses, contrastive scores, domain classifier, acceleration rates."""
