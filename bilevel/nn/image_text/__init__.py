"""Image–text training: two towers, contrastive losses, and a weighting network over small images."""
