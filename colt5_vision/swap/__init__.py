"""Pretrained weights: attention trained in full, run routed; one file a step."""
